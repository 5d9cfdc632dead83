"""Upstream accounts: added, changed, sealed again, and what is kept of who did it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.db import IntegrityError, transaction
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

from accounts.models import AuditEntry, Organization, User
from project.keyring import Keyring
from providers import actions, given, registry, tokens
from providers.actions import add_credential, change_credential, secret_of
from providers.adapters.openai import OpenAI
from providers.models import Credential, KeyringCanary, Price, PriceSource, State, UpstreamModel
from providers.secrets import SealBroken, open_sealed, redact, seal, sealed_with
from proxy import snapshot

pytestmark = pytest.mark.django_db

SECRET = "sk-upstream-0123456789"


def openai(**options: object) -> Credential:
    return add_credential("openai", "Team", SECRET, **{"base_url": "https://llm.example.org/v1"} | options)


def refusal(field: str, **options: object) -> str:
    before = Credential.objects.count()
    with pytest.raises(ValidationError) as raised:
        add_credential(**{"kind": "openai", "label": "Team", "secret": SECRET} | options)
    assert Credential.objects.count() == before
    return " ".join(raised.value.message_dict[field])


@pytest.fixture
def keyrings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keyring's entries, newest first; changing the list is a rotation."""
    entries = ["a" * 32]
    monkeypatch.setattr(settings, "KEYRING", Keyring(None, None))
    monkeypatch.setattr(Keyring, "keys", lambda self, purpose: _keys(entries, purpose))
    return iter([entries]).__next__()


_real_keys = Keyring.keys


def _keys(entries: list[str], purpose: str) -> dict[str, bytes]:
    return _real_keys(Keyring("\n".join(entries), None), purpose)


def test_a_secret_is_sealed_to_its_row_and_opens_there_alone():
    first, second = openai(), openai()

    assert SECRET.encode() not in bytes(first.secret)
    assert secret_of(Credential.objects.get(pk=first.pk)).reveal() == SECRET
    first.secret = second.secret
    with pytest.raises(SealBroken):
        secret_of(first)


def test_it_serves_at_once_with_what_was_said():
    credential = openai(weight=3, priority=-1, settings={"pass_through": "yes", "listed_only": "0"})
    [upstream] = snapshot.load().upstreams

    assert (upstream.id, upstream.prefix, upstream.base_url) == (credential.pk, "openai", "https://llm.example.org/v1")
    assert (upstream.weight, upstream.priority, upstream.pass_through, upstream.listed_only) == (3, -1, True, False)
    assert upstream.secret.reveal() == SECRET


def test_whoever_gives_or_opens_a_secret_teaches_the_redactor():
    credential = add_credential("openai", "Team", "a plain sentence", base_url="https://llm.example.org")
    assert redact("(a plain sentence)") == "([redacted])"

    redact.learn([])
    secret_of(credential)
    assert redact("(a plain sentence)") == "([redacted])"

    change_credential(credential, secret="quite another one")
    assert redact("(quite another one)") == "([redacted])"


def test_whoever_gives_or_uses_a_setting_that_is_a_secret_teaches_the_redactor():
    own = {"client_id": "an-open-client-id", "client_secret": "the first word", "token_url": "https://oauth.example.org/token"}
    credential = add_credential("gemini_cli", "Team", "", settings=own, accept_policy=True, sign_in_later=True)
    assert redact("an-open-client-id (the first word)") == "an-open-client-id ([redacted])"

    change_credential(credential, settings={**own, "client_secret": "another word"})
    assert redact("(another word)") == "([redacted])"

    for word, use in (
        ("when called", actions.target_of),
        ("when renewed", tokens.sign_in_of),
        ("when signed in", lambda credential: given.sign_in(given.kind(credential.kind), credential.settings)),
    ):
        credential.settings = {**own, "client_secret": word}  # as another process kept it
        use(credential)
        assert redact(f"({word})") == "([redacted])"


def test_the_demo_lists_its_models_without_a_call_and_they_cost_nothing():
    credential = add_credential("demo", "Demo", "")
    catalog = snapshot.load()

    assert credential.secret is None
    assert "echo" in catalog.upstreams[0].models
    assert catalog.prefixes_listing("echo") == ["demo"]
    price = catalog.prices.find("demo/echo", 9e9)
    assert (price.input, price.output) == (0, 0)


def test_a_free_kind_is_priced_once_and_never_over_a_price_that_is_there():
    add_credential("demo", "One", "")
    add_credential("demo", "Two", "")
    assert Price.objects.filter(pattern="demo/*").count() == 1

    actions.set_price("own/*", "1", "1")
    add_credential("demo", "Three", "", prefix="own")
    assert [row.input for row in Price.objects.filter(pattern="own/*")] == [1_000_000]


def test_a_free_pool_does_not_make_a_vendors_models_free():
    add_credential("demo", "Demo", "", prefix="openai")
    add_credential("openai", "Vendor", SECRET)
    book = snapshot.price_book()

    assert book.find("openai/echo", 9e9).output == 0
    assert book.find("openai/gpt-4o", 9e9).output == 10_000_000


def test_a_price_by_hand_goes_before_the_free_one():
    add_credential("demo", "Demo", "")
    actions.set_price("demo/*", "2", "3")

    assert snapshot.price_book().find("demo/echo", 9e9).input == 2_000_000


def test_a_known_vendors_models_are_priced_and_a_server_of_ones_own_is_not():
    add_credential("openai", "Vendor", SECRET)
    add_credential("openai", "Mine", SECRET, prefix="mine", base_url="http://ollama:11434")
    book = snapshot.price_book()

    assert book.find("openai/gpt-4o", 9e9).output == 10_000_000
    assert book.find("openai/gpt-5.4", 9e9).long_above == 272_000
    assert book.find("mine/gpt-4o", 9e9) is None
    assert set(Price.objects.values_list("source", flat=True)) == {PriceSource.PACKAGE}


def test_prices_that_stand_are_not_written_again(monkeypatch: pytest.MonkeyPatch):
    credential = add_credential("openai", "Vendor", SECRET)
    before = Price.objects.count()

    assert actions.fill_package_prices(credential, ["gpt-4o", "unknown"]) == 0
    assert actions.fill_package_prices(credential, ["o1-2099-01-01-unseen", "gpt-4o-2024-11-20"]) <= 1
    assert Price.objects.count() - before <= 1

    schedule = actions.package_prices.prices(credential.effective_base_url)
    dearer = [actions.package_prices.Listed(None, actions.package_prices.Rates(9, 9))]
    monkeypatch.setattr(actions.package_prices, "prices", lambda *_, **__: {**schedule, "gpt-4o": dearer})
    assert actions.fill_package_prices(credential) == 1
    assert snapshot.price_book().find("openai/gpt-4o", 9e9).input == 9


def test_a_shared_account_serves_all_and_an_organizations_own_only_it():
    acme = Organization.objects.create(slug="acme", name="Acme")

    assert openai().organization_id is None
    assert openai(organization=acme).organization_id == acme.pk


@pytest.mark.parametrize(
    ("field", "options", "words"),
    [
        ("kind", {"kind": "nonesuch"}, "no kind 'nonesuch'"),
        ("label", {"label": "  "}, "1 to 100"),
        ("label", {"label": "two\nlines"}, "one line"),
        ("prefix", {"prefix": "a/b"}, "without a slash"),
        ("prefix", {"prefix": ""}, "cannot be a prefix"),
        ("prefix", {"prefix": "-x"}, "cannot be a prefix"),
        ("weight", {"weight": 0}, "from 1"),
        ("secret", {"secret": " \n"}, "needs a secret"),
        ("secret", {"secret": "two\nlines"}, "one line"),
        ("secret", {"secret": "schlüssel"}, "no header can carry"),
        ("settings", {"settings": {"api_base": "x"}}, "no setting 'api_base'"),
        ("settings", {"settings": {"pass_through": "maybe"}}, "1 or 0"),
        ("settings", {"settings": {"listed_only": ["1"]}}, "one value"),
        ("settings", {"settings": {"proxy_url": "ftp://x"}}, "not an address"),
        ("settings", {"settings": {"ca_pem": "/etc/ssl/ca.pem"}}, "BEGIN CERTIFICATE"),
        ("settings", {"settings": {"ca_pem": "ünlesbar"}}, "BEGIN CERTIFICATE"),
        ("settings", {"settings": {"proxy_url": "http://user:pass@proxy:1"}}, "no user name"),
    ],
)
def test_what_is_wrong_is_said_in_words_and_nothing_is_kept(field: str, options: dict[str, object], words: str):
    assert words in refusal(field, **options)


@pytest.mark.parametrize(
    "base_url",
    [
        "llm.example.org",
        "ftp://llm.example.org",
        "file:///etc/passwd",
        "http://",
        "https:///v1",
        "https://user@llm.example.org/v1",
        "https://user:pass@llm.example.org/v1",
        "https://llm.example.org/v1?key=1",
        "https://llm.example.org/v1?",
        "https://llm.example.org/v1#x",
        "https://llm.example.org:port/v1",
        "https://llm.example.org:99999/v1",
        "https://llm.example.org\\@evil.example.org/",
        "https://llm.example.org/a b",
        "https://[::1/v1",
        "https://münchen.example.org",
        "javascript:alert(1)",
        "https://llm.example.org/" + "x" * 500,
    ],
)
def test_a_base_url_is_a_plain_http_address(base_url: str):
    assert refusal("base_url", base_url=base_url)


@hypothesis_given(st.text(max_size=60) | st.text(max_size=30).map("https://{}".format))
def test_whatever_is_typed_as_a_base_url_is_kept_plain_or_refused(text: str):
    try:
        kept = given.base_url(OpenAI(), text)
    except ValidationError:
        return
    assert kept == "" or kept.startswith(("http://", "https://"))
    assert not set(kept) & set("@?#\\ \n\t")


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("http://localhost:11434", "http://localhost:11434/v1"),
        ("http://ollama:1/v1/", "http://ollama:1/v1"),
        ("http://[::1]:1", "http://[::1]:1/v1"),
    ],
)
def test_a_neighbours_address_is_fine(typed: str, kept: str):
    assert openai(base_url=typed).base_url == kept


@pytest.mark.parametrize("policy", ["restricted", "ended"])
def test_a_kind_with_a_policy_needs_it_accepted_and_keeps_when(policy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(registry.adapter("openai")), "policy", policy)

    assert f"is {policy}" in refusal("accept_policy")
    assert openai(accept_policy=True).policy_accepted_at is not None


class TwoDoors(OpenAI):
    """By one door the vendor lets programs in, by the other no longer."""

    name = "openai"
    settings = frozenset({"door"})

    def policy_for(self, settings: Mapping[str, object]) -> str:
        return "ended" if settings.get("door") == "old" else "allowed"

    def setting_from(self, name: str, given: str) -> str:
        if given not in ("old", "new"):
            raise ValueError("The door is old or new.")
        return given


@pytest.fixture
def two_doors(speak):
    speak("openai", TwoDoors())


@pytest.mark.usefixtures("two_doors")
def test_a_policy_can_depend_on_the_settings():
    assert openai(settings={"door": "new"}).policy_accepted_at is None
    assert "is ended" in refusal("accept_policy", settings={"door": "old"})
    assert openai(settings={"door": "old"}, accept_policy=True).policy_accepted_at is not None


@pytest.mark.usefixtures("two_doors")
def test_a_change_of_settings_that_brings_another_policy_needs_it_accepted():
    credential = openai(settings={"door": "new"})
    with pytest.raises(ValidationError) as raised:
        change_credential(credential, settings={"door": "old"})
    assert "is ended" in " ".join(raised.value.message_dict["accept_policy"])
    assert Credential.objects.get().settings == {"door": "new"}

    change_credential(credential, settings={"door": "old"}, accept_policy=True)
    assert credential.policy_accepted_at is not None
    change_credential(credential, settings={"door": "old", "pass_through": True})  # still the same policy: asked once
    change_credential(credential, settings={})
    assert credential.settings == {}


@pytest.mark.usefixtures("two_doors")
def test_a_kind_says_which_values_a_setting_takes():
    assert "old or new" in refusal("settings", settings={"door": "ajar"})


def test_nothing_is_left_behind_when_the_seal_fails(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> bytes:
        raise RuntimeError("no entropy")

    monkeypatch.setattr(actions, "seal", broken)
    with pytest.raises(RuntimeError):
        openai()
    assert not Credential.objects.exists()


def test_a_secret_stays_when_the_path_changes_and_goes_when_the_origin_does():
    credential = openai()

    assert change_credential(credential, base_url="https://llm.example.org/other/v2") == []
    assert secret_of(credential).reveal() == SECRET

    [note] = change_credential(credential, base_url="https://evil.example.org/v1")
    assert "forgotten" in note
    assert SECRET not in note
    assert credential.secret is None
    assert credential.state == State.NEEDS_REAUTH
    assert list(snapshot.load().upstreams) == []


@pytest.mark.parametrize("base_url", ["http://llm.example.org/v1", "https://llm.example.org:444/v1", "https://llm.example.com/v1", ""])
def test_another_scheme_port_or_host_is_another_origin(base_url: str):
    credential = openai()
    change_credential(credential, base_url=base_url)

    assert credential.secret is None


def test_a_new_secret_comes_along_to_a_new_origin():
    credential = openai()

    assert change_credential(credential, base_url="https://new.example.org", secret="sk-new-secret") == []
    assert secret_of(Credential.objects.get(pk=credential.pk)).reveal() == "sk-new-secret"
    assert credential.state == State.ACTIVE


def test_a_new_secret_brings_an_account_back():
    credential = openai()
    change_credential(credential, base_url="https://new.example.org")
    with pytest.raises(ValidationError, match="no secret"):
        actions.enable(credential)

    actions.replace_secret(credential, "sk-new-secret")

    assert credential.state == State.ACTIVE
    assert secret_of(credential).reveal() == "sk-new-secret"
    with pytest.raises(ValidationError, match="empty"):
        actions.replace_secret(credential, " ")


def test_disabled_it_serves_nobody_until_it_is_enabled():
    credential = openai()
    actions.disable(credential)
    assert list(snapshot.load().upstreams) == []

    actions.enable(credential)
    assert len(snapshot.load().upstreams) == 1


def test_a_new_origin_is_told_that_prices_stay():
    credential = add_credential("openai", "Vendor", SECRET)

    notes = change_credential(credential, base_url="http://localhost:1", secret=SECRET)
    assert notes == ["The prices of openai/* stay as they are: set others if the new address asks others."]


def test_a_new_prefix_gets_its_prices():
    vendor, demo = add_credential("openai", "Vendor", SECRET), add_credential("demo", "Demo", "")
    change_credential(vendor, prefix="gpt")
    change_credential(demo, prefix="toy")
    book = snapshot.price_book()

    assert book.find("gpt/gpt-4o", 9e9) is not None
    assert book.find("toy/echo", 9e9).input == 0


@pytest.mark.parametrize("change", [{"label": ""}, {"prefix": "a/b"}, {"weight": 0}, {"base_url": "x"}, {"settings": {"x": 1}}])
def test_a_change_is_checked_like_an_addition(change: dict[str, object]):
    credential = openai()
    with pytest.raises(ValidationError):
        change_credential(credential, **change)

    assert Credential.objects.filter(pk=credential.pk, label="Team", prefix="openai", weight=1).exists()


def test_each_deed_is_written_down_without_a_secret():
    olga = User.objects.create_superuser("olga@example.org", "x")
    acme = Organization.objects.create(slug="acme", name="Acme")
    credential = openai(organization=acme, actor=olga)
    change_credential(credential, label="New", weight=1, secret="sk-changed-secret", actor=olga)
    price = actions.set_price("a/b", "1", "2", starts_at=credential.created_at.replace(year=2999), actor=olga)
    actions.take_back_price(price, actor=olga)
    actions.delete_credential(credential, actor=olga)

    entries = list(AuditEntry.objects.order_by("pk"))
    assert [entry.action for entry in entries] == [
        "credential.added",
        "credential.changed",
        "price.set",
        "price.taken_back",
        "credential.deleted",
    ]
    assert {entry.actor for entry in entries} == {olga}
    assert [entry.organization for entry in entries] == [acme, acme, None, None, acme]
    assert entries[1].detail == {"fields": ["label", "secret"]}
    assert "sk-" not in str([(entry.subject, entry.detail) for entry in entries])


def test_what_is_rolled_back_was_not_written_down():
    with pytest.raises(IntegrityError), transaction.atomic():
        openai()
        raise IntegrityError
    assert not AuditEntry.objects.exists()


def test_a_price_in_force_is_never_taken_back_or_changed():
    price = actions.set_price("a/b", "1", "2")

    with pytest.raises(ValidationError, match="in force"):
        actions.take_back_price(price)
    price.input = 5
    with pytest.raises(ValidationError, match="never changes"):
        price.save()
    assert Price.objects.get().input == 1_000_000


@pytest.mark.parametrize(
    ("usd", "micro"), [("2.50", 2_500_000), ("0", 0), ("0.000001", 1), ("1000000", 10**12), ("1e-3", 1000), (" 3 ", 3_000_000)]
)
def test_dollars_become_micro_dollars_exactly(usd: str, micro: int):
    assert given.micro_dollars("input", usd) == micro


@pytest.mark.parametrize(
    "usd", ["", "much", "-1", "nan", "inf", "0.0000001", "1000001", "1e999999", "1e-999999", "1.0000000000000000000000000000001"]
)
def test_what_is_no_exact_amount_is_refused(usd: str):
    with pytest.raises(ValidationError):
        given.micro_dollars("input", usd)


@pytest.mark.parametrize("pattern", ["", "gpt-4o", "a b/c", "a/[x]*", "a/b?*", "x" * 241])
def test_what_is_no_pattern_is_refused(pattern: str):
    with pytest.raises(ValidationError):
        actions.set_price(pattern, "1", "1")


@pytest.mark.parametrize("pattern", ["*", "demo/*", "openai/gpt-4o", "a/b/c", "*gpt*"])
def test_a_pattern_is_a_public_id_with_stars(pattern: str):
    assert actions.set_price(pattern, "1", "1").pattern == pattern


# Rotation of the keyring


def test_after_a_rotation_old_seals_open_and_are_moved_to_the_new_key(keyrings: list[str]):
    first, second = openai(), openai()
    actions.check_canary()
    keyrings.insert(0, "b" * 32)
    newest = next(iter(settings.KEYRING.keys("seal")))
    assert secret_of(first).reveal() == SECRET

    steps = [(step.done, step.left, step.broken) for step in actions.reseal_all()]

    assert steps == [(1, 1, 0), (2, 0, 0)]
    keyrings.pop()
    for credential in (first, second):
        credential.refresh_from_db()
        assert sealed_with(bytes(credential.secret)) == newest
        assert secret_of(credential).reveal() == SECRET
    actions.check_canary()


def test_a_rotation_that_was_stopped_goes_on_where_it_was(keyrings: list[str]):
    for _ in range(3):
        openai()
    keyrings.insert(0, "b" * 32)
    next(actions.reseal_all())

    assert [step.left for step in actions.reseal_all()] == [1, 0]
    assert [step.left for step in actions.reseal_all()] == []


def test_what_no_key_opens_is_counted_and_left_alone(keyrings: list[str]):
    lost = openai()
    keyrings[:] = ["c" * 32]
    before = bytes(lost.secret)

    [step] = actions.reseal_all()

    assert (step.done, step.left, step.broken) == (0, 0, 1)
    assert bytes(Credential.objects.get().secret) == before


def test_a_secret_given_during_a_rotation_is_not_overwritten(keyrings: list[str], monkeypatch: pytest.MonkeyPatch):
    credential = openai()
    keyrings.insert(0, "b" * 32)

    def meanwhile(*arguments: object) -> object:
        monkeypatch.setattr(actions, "open_sealed", open_sealed)
        actions.replace_secret(Credential.objects.get(), "sk-given-meanwhile")
        return open_sealed(*arguments)

    monkeypatch.setattr(actions, "open_sealed", meanwhile)
    list(actions.reseal_all())

    credential.refresh_from_db()
    assert secret_of(credential).reveal() == "sk-given-meanwhile"


def test_the_canary_refuses_another_keyring(keyrings: list[str]):
    actions.check_canary()
    actions.check_canary()
    keyrings[:] = ["d" * 32]

    with pytest.raises(ImproperlyConfigured, match="not the one that this database was sealed with"):
        actions.check_canary()
    assert KeyringCanary.objects.count() == 1


def test_the_canary_is_no_secret_of_an_account(keyrings: list[str]):
    actions.check_canary()
    credential = openai()
    Credential.objects.filter(pk=credential.pk).update(secret=bytes(KeyringCanary.objects.get().sealed))
    credential.refresh_from_db()

    with pytest.raises(SealBroken):
        secret_of(credential)


def test_a_seal_that_does_not_open_takes_its_account_out_and_no_other(keyrings: list[str], caplog: pytest.LogCaptureFixture):
    good, bad = openai(), openai()
    wrong = seal(SECRET, good.place(), settings.KEYRING.keys("seal"))
    Credential.objects.filter(pk=bad.pk).update(secret=wrong)

    assert [upstream.id for upstream in snapshot.load().upstreams] == [good.pk]
    assert "cannot be opened" in caplog.text


def test_models_are_listed_once_each():
    credential = add_credential("demo", "Demo", "")
    with pytest.raises(IntegrityError), transaction.atomic():
        UpstreamModel.objects.create(credential=credential, upstream_id="echo")
