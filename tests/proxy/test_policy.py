"""What vendors' terms say of a kind is shown where accounts are made, and must be accepted: in the admin, the API and the command."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command
from django.test import Client

from accounts.models import AuditEntry, User
from providers import actions, registry
from providers.actions import add_credential, change_credential, secret_of
from providers.adapter import Adapter, OpenAICompatible
from providers.models import Credential, Price, State
from providers.oauth import SignIn
from proxy import snapshot
from tests.accounts.conftest import People

pytestmark = pytest.mark.django_db

SECRET = "sk-upstream-0123456789"
NOTE, SOURCE = "The vendor's terms forbid it.", "https://vendor.example/terms"


class Plan(OpenAICompatible):
    """A flat-rate plan whose vendor restricts such a use, and which a person signs in to."""

    name, title, base_url = "plan", "The Plan", "https://plan.example/v1"
    policy, policy_source, policy_note = "restricted", SOURCE, NOTE
    free = True
    settings = frozenset({"client_secret", "token_url"})

    def sign_in(self, settings: Any) -> SignIn | None:
        raise ValueError("token_url is missing")


class Gone(OpenAICompatible):
    name, title, base_url, policy, policy_source = "gone", "Gone", "https://gone.example/v1", "ended", "javascript:alert(1)"


@pytest.fixture(autouse=True)
def kinds(know: Callable[[dict[str, Adapter]], None]) -> None:
    known: dict[str, Adapter] = {name: registry.adapter(name) for name in ("demo", "openai")}
    know(known | {"plan": Plan(), "gone": Gone()})


@pytest.fixture
def people(db: None) -> People:
    return People()


def accepted() -> list[tuple[str | None, str, str]]:
    entries = AuditEntry.objects.filter(action="credential.policy_accepted")
    return [(entry.actor.email if entry.actor else None, entry.detail["kind"], entry.detail["policy"]) for entry in entries]


# The action


def test_who_accepted_and_when_is_kept_and_written_down(people: People):
    made = add_credential("plan", "P", SECRET, accept_policy=True, actor=people.olga)

    assert made.policy_accepted_at is not None
    assert made.policy_accepted_by == people.olga
    assert accepted() == [("olga@example.org", "plan", "restricted")]
    assert AuditEntry.objects.get(action="credential.policy_accepted").detail["source"] == SOURCE


@pytest.mark.parametrize("kind", ["plan", "gone"])
def test_without_acceptance_nothing_is_made(kind: str):
    with pytest.raises(ValidationError) as refused:
        add_credential(kind, "P", SECRET)
    words = " ".join(refused.value.message_dict["accept_policy"])
    assert registry.adapter(kind).policy in words
    assert SOURCE in words if kind == "plan" else True
    assert not Credential.objects.exists()
    assert accepted() == []


def test_what_is_allowed_asks_for_nothing_and_writes_nothing():
    add_credential("openai", "O", SECRET, accept_policy=True)
    assert accepted() == []


def test_a_policy_that_came_later_can_be_accepted_later(people: People, monkeypatch: pytest.MonkeyPatch):
    made = add_credential("openai", "O", SECRET)
    monkeypatch.setattr(type(registry.adapter("openai")), "policy", "restricted")
    change_credential(made, accept_policy=True, actor=people.alice)
    change_credential(made, accept_policy=True, actor=people.olga)  # the first stands

    made.refresh_from_db()
    assert made.policy_accepted_by == people.alice
    assert accepted() == [("alice@example.org", "openai", "restricted")]
    assert not AuditEntry.objects.filter(action="credential.changed", actor=people.alice).exists()


def test_a_flat_rate_plan_costs_0_from_the_start():
    add_credential("plan", "P", SECRET, accept_policy=True, prefix="flat")
    price = snapshot.price_book().find("flat/anything", 9e9)
    assert price is not None
    assert (price.input, price.output) == (0, 0)
    assert Price.objects.count() == 1


# The admin


@pytest.fixture
def operator(people: People) -> Client:
    client = Client()
    client.force_login(people.olga)
    return client


def form(**fields: str) -> dict[str, str]:
    usual = {"kind": "plan", "label": "P", "prefix": "", "base_url": "", "settings": "{}", "weight": "1", "priority": "0"}
    return usual | {"organization": "", "user": "", "new_secret": SECRET, "state": "active"} | fields


def page(client: Client, path: str) -> str:
    answer = client.get(f"/admin/providers/credential/{path}")
    assert answer.status_code == 200
    return answer.content.decode()


def test_the_admin_shows_policy_note_and_link_where_an_account_is_added(operator: Client):
    shown = page(operator, "add/")

    assert "The Plan" in shown
    assert "The vendor&#x27;s terms forbid it." in shown
    assert f'href="{SOURCE}"' in shown
    assert ">restricted</span>" in shown
    assert ">ended</span>" in shown
    assert ">allowed</span>" in shown
    assert "javascript:alert" not in shown  # an adapter may come from outside


def test_the_admin_refuses_without_acceptance_and_keeps_who_accepted(operator: Client):
    refused = operator.post("/admin/providers/credential/add/", form())
    assert refused.status_code == 200
    assert "such a use of The Plan is restricted" in refused.content.decode()
    assert not Credential.objects.exists()

    assert operator.post("/admin/providers/credential/add/", form(accept_policy="on")).status_code == 302
    assert accepted() == [("olga@example.org", "plan", "restricted")]
    made = Credential.objects.get()
    shown = page(operator, f"{made.pk}/change/")
    assert f'href="{SOURCE}"' in shown
    assert "UTC, olga@example.org" in shown
    assert "restricted" in page(operator, "")


def test_the_admins_list_shows_what_was_not_accepted(operator: Client, people: People, monkeypatch: pytest.MonkeyPatch):
    made = add_credential("openai", "O", SECRET)
    assert "not accepted" not in page(operator, "")
    monkeypatch.setattr(type(registry.adapter("openai")), "policy", "ended")
    assert "ended, not accepted" in page(operator, "")

    changed = form(kind="openai", label="O", prefix="openai", new_secret="", accept_policy="on")
    assert operator.post(f"/admin/providers/credential/{made.pk}/change/", changed).status_code == 302
    assert accepted() == [("olga@example.org", "openai", "ended")]
    assert "not accepted" not in page(operator, "")


def test_the_admin_shows_an_account_of_a_kind_that_is_gone(operator: Client, know: Callable[[dict[str, Adapter]], None]):
    add_credential("plan", "P", SECRET, accept_policy=True)
    know({})
    assert "unknown" in page(operator, "")


# The API


def call(user: User, method: str, path: str, body: object = None) -> Any:
    client = Client()
    client.force_login(user)
    answer = client.generic(method, f"/api{path}", b"" if body is None else json.dumps(body), content_type="application/json")
    assert SECRET not in answer.content.decode()
    return answer


@pytest.mark.parametrize("path", ["/", "/kinds"])
def test_the_api_lists_the_kinds_with_what_their_terms_say(people: People, path: str):
    listed = call(people.vera, "GET", path).json()
    kinds = {kind["name"]: kind for kind in (listed["kinds"] if path == "/" else listed)}

    assert kinds["plan"] == {
        "name": "plan", "title": "The Plan", "policy": "restricted", "policy_source": SOURCE, "policy_note": NOTE, "free": True,
        "needs_secret": True, "signs_in": True, "base_url": "https://plan.example/v1", "endpoints": sorted(Plan.endpoints),
        "settings": ["ca_pem", "client_secret", "http2", "listed_only", "pass_through", "proxy_url", "sticky", "token_url"],
    }  # fmt: skip
    assert (kinds["openai"]["policy"], kinds["openai"]["signs_in"]) == ("allowed", False)


def test_the_api_refuses_without_acceptance_and_keeps_who_accepted(people: People):
    body = {"kind": "plan", "label": "P", "secret": SECRET, "prefix": "acme"}
    refused = call(people.alice, "POST", "/organizations/acme/credentials", body)
    assert (refused.status_code, list(refused.json()["error"]["fields"])) == (400, ["accept_policy"])
    assert SOURCE in refused.json()["error"]["message"]
    assert not Credential.objects.exists()

    made = call(people.alice, "POST", "/organizations/acme/credentials", body | {"accept_policy": True})
    assert made.status_code == 201
    shown = made.json()
    assert (shown["organization"], shown["policy"], shown["policy_accepted_by"]) == ("acme", "restricted", "alice@example.org")
    assert (shown["has_secret"], shown["state"], shown["base_url"]) == (True, "active", "https://plan.example/v1")
    assert accepted() == [("alice@example.org", "plan", "restricted")]
    assert secret_of(Credential.objects.get()).reveal() == SECRET
    assert call(people.amy, "GET", "/organizations/acme/credentials").json() == [shown]


def test_an_account_is_changed_over_the_api(people: People):
    made = add_credential("openai", "O", SECRET, base_url="https://llm.example.org/v1", settings={"listed_only": True})
    path = f"/credentials/{made.pk}"

    changed = call(people.olga, "PATCH", path, {"label": "New", "settings": {"pass_through": True, "listed_only": None}, "weight": 4})
    assert changed.status_code == 200
    assert (changed.json()["label"], changed.json()["settings"], changed.json()["weight"]) == ("New", {"pass_through": True}, 4)
    assert call(people.olga, "PATCH", path, {"state": "disabled"}).json()["state"] == "disabled"
    moved = call(people.olga, "PATCH", path, {"base_url": "https://evil.example/v1", "state": "active"}).json()
    assert "has been forgotten" in moved["notes"][0]
    assert not moved["has_secret"]
    assert AuditEntry.objects.filter(action="credential.changed", actor=people.olga).count() == 3


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"label": ""}, "label"),
        ({"prefix": "a/b"}, "prefix"),
        ({"weight": 0}, "weight"),
        ({"state": "needs_reauth"}, "state"),
        ({"settings": {"nonesuch": 1}}, "settings"),
        ({"secret": "two\nlines"}, "secret"),
        ({"base_url": "ftp://x"}, "base_url"),
        ({"kind": "demo"}, "kind"),
    ],
)
def test_the_api_says_what_is_wrong_with_the_field(people: People, change: dict[str, Any], field: str):
    made = add_credential("openai", "O", SECRET)
    answer = call(people.olga, "PATCH", f"/credentials/{made.pk}", change)
    assert (answer.status_code, list(answer.json()["error"]["fields"])) == (400, [field])


def test_settings_that_are_secrets_are_not_shown_and_survive_being_sent_back(people: People):
    made = add_credential("plan", "P", SECRET, accept_policy=True, settings={"client_secret": "hush-hush-hush"})
    shown = call(people.olga, "GET", f"/credentials/{made.pk}")
    assert "hush" not in shown.content.decode()

    call(people.olga, "PATCH", f"/credentials/{made.pk}", {"settings": shown.json()["settings"]})
    made.refresh_from_db()
    assert made.settings == {"client_secret": "hush-hush-hush"}


def test_a_setting_that_is_a_secret_leaves_by_no_other_way_than_the_one_it_was_given_for(people: People):
    kept = {"client_secret": "hush-hush-hush", "token_url": "https://vendor.example/token"}
    made = add_credential("plan", "P", SECRET, accept_policy=True, organization=people.acme, prefix="acme-plan", settings=kept)
    path = f"/organizations/acme/credentials/{made.pk}"
    elsewhere = {"token_url": "https://evil.example/token"}

    for settings in (elsewhere, {**elsewhere, "client_secret": "(set)"}):
        answer = call(people.alice, "PATCH", path, {"secret": SECRET, "settings": settings})
        assert (answer.status_code, "client_secret" in answer.content.decode()) == (400, True)
    made.refresh_from_db()
    assert made.settings == kept
    mine = {**elsewhere, "client_secret": "mine"}
    assert call(people.alice, "PATCH", path, {"secret": SECRET, "settings": mine}).status_code == 200
    made.refresh_from_db()
    assert made.settings == mine


def test_who_is_no_operator_joins_and_prices_nobody_elses_pool(people: People):
    add_credential("openai", "Shared", SECRET)
    body = {"kind": "demo", "label": "Mine", "prefix": "openai"}
    refused = call(people.alice, "POST", "/organizations/acme/credentials", body)

    assert (refused.status_code, list(refused.json()["error"]["fields"])) == (400, ["prefix"])
    assert "acme-openai" in refused.json()["error"]["message"]
    assert not Price.objects.filter(pattern="openai/*").exists()
    own = call(people.alice, "POST", "/organizations/acme/credentials", body | {"prefix": "acme"}).json()
    assert call(people.alice, "PATCH", f"/organizations/acme/credentials/{own['id']}", {"prefix": "openai"}).status_code == 400
    assert call(people.alice, "POST", "/organizations/acme/credentials", body | {"prefix": "acme"}).status_code == 201
    assert call(people.olga, "POST", "/organizations/acme/credentials", body).status_code == 201


def test_who_is_no_operator_cannot_lead_a_secret_past_another_way(people: People):
    made = add_credential("openai", "Own", SECRET, organization=people.acme, prefix="acme")
    path, change = f"/organizations/acme/credentials/{made.pk}", {"settings": {"proxy_url": "http://evil.example:3128"}}

    assert list(call(people.alice, "PATCH", path, change).json()["error"]["fields"]) == ["settings"]
    made.refresh_from_db()
    assert made.settings == {}
    assert call(people.alice, "PATCH", path, {"settings": {"listed_only": True}}).status_code == 200
    assert call(people.alice, "PATCH", path, {**change, "secret": "sk-a-new-one-01234"}).status_code == 200


# The command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(SECRET))
    out = io.StringIO()
    call_command("add_credential", *arguments, "--label", "P", "--secret-stdin", stdout=out)
    return out.getvalue()


def test_the_command_refuses_without_acceptance_in_words(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CommandError) as refused:
        command(monkeypatch, "plan")
    for words in ("is restricted", NOTE, SOURCE, "(--accept-policy)"):
        assert words in str(refused.value)
    assert not Credential.objects.exists()

    command(monkeypatch, "plan", "--accept-policy")
    assert accepted() == [(None, "plan", "restricted")]
    assert Credential.objects.get().policy_accepted_by is None


def test_the_commands_help_lists_the_kinds_with_what_their_terms_say(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        call_command("add_credential", "--help")
    shown = capsys.readouterr().out
    assert f"is restricted. {NOTE} See {SOURCE} Needs --accept-policy." in shown
    assert "The Plan; settings: client_secret, token_url" in shown


# Accounts without a secret of their own


def test_an_account_for_callers_own_secrets_needs_none(people: People):
    made = add_credential("openai", "Theirs", "", settings={"pass_through": True})
    [upstream] = snapshot.load().upstreams
    assert (upstream.callers_key_only, upstream.pass_through) == (True, True)
    assert made.state == State.ACTIVE

    change_credential(made, label="Renamed")
    made.refresh_from_db()
    assert made.state == State.ACTIVE
    change_credential(made, settings={})
    made.refresh_from_db()
    assert made.state == State.NEEDS_REAUTH
    with pytest.raises(ValidationError):
        actions.enable(made)
    assert add_credential("openai", "Ours", SECRET).secret is not None
    assert not any(one.callers_key_only for one in snapshot.load().upstreams)
