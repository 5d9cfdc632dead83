"""The commands, as a terminal or a script sees them."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import httpx
import pytest
from django.core.management import CommandError, call_command

from accounts.models import Organization
from providers import listing
from providers.actions import secret_of
from providers.models import Credential, Price
from providers.over_httpx import OverHttpx

pytestmark = pytest.mark.django_db

SECRET = "sk-upstream-0123456789"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str, stdin: str = "") -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    out = io.StringIO()
    call_command(name, *arguments, stdout=out, stderr=out)
    assert SECRET not in out.getvalue()
    return out.getvalue()


def test_add_credential_prints_the_id_alone(monkeypatch: pytest.MonkeyPatch):
    Organization.objects.create(slug="acme", name="Acme")
    said = run(
        monkeypatch, "add_credential", "openai", "--label", "Team", "--prefix", "gpt", "--base-url", "http://llm.example.org", "--set",
        "pass_through=1", "--set", "listed_only=on", "--weight", "3", "--priority", "2", "--organization", "acme", "--accept-policy",
        "--secret-stdin", stdin=f"{SECRET}\n",
    )  # fmt: skip

    credential = Credential.objects.get()
    assert said == f"{credential.pk}\n"
    assert secret_of(credential).reveal() == SECRET
    assert (credential.label, credential.prefix, credential.base_url) == ("Team", "gpt", "http://llm.example.org/v1")
    assert (credential.weight, credential.priority, credential.organization.slug) == (3, 2, "acme")
    assert credential.settings == {"pass_through": True, "listed_only": True}
    assert credential.policy_accepted_at is not None


def test_without_an_organization_it_is_shared(monkeypatch: pytest.MonkeyPatch):
    run(monkeypatch, "add_credential", "demo", "--label", "Demo")

    assert Credential.objects.get().organization is None


def test_a_negative_priority_is_a_number(monkeypatch: pytest.MonkeyPatch):
    run(monkeypatch, "add_credential", "demo", "--label", "Demo", "--priority", "-5")

    assert Credential.objects.get().priority == -5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonesuch", "--label", "x"], "nonesuch"),
        (["openai", "--label", "x"], "--secret-stdin"),
        (["openai", "--label", "x", "--secret-stdin"], "needs a secret"),
        (["openai"], "--label"),
        (["demo", "--label", "x", "--set", "listed_only"], "name=value"),
        (["demo", "--label", "x", "--set", "nonesuch=1"], "no setting 'nonesuch'"),
        (["demo", "--label", "x", "--organization", "nowhere"], "no organization 'nowhere'"),
        (["demo", "--label", "x", "--prefix", "a/b"], "without a slash"),
        (["demo", "--label", "x", "--base-url", "ftp://x"], "not an address"),
    ],
)
def test_what_is_wrong_is_said_in_words(monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str):
    with pytest.raises(CommandError, match=words):
        run(monkeypatch, "add_credential", *arguments)
    assert not Credential.objects.exists()


def test_at_a_terminal_the_secret_is_asked_for_unseen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("providers.management.commands.add_credential.getpass.getpass", lambda prompt: SECRET)
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)

    call_command("add_credential", "openai", "--label", "x", "--secret-stdin", stdout=io.StringIO())

    assert secret_of(Credential.objects.get()).reveal() == SECRET


def test_set_price_makes_a_dated_row(monkeypatch: pytest.MonkeyPatch):
    arguments = ["--input", "2.5", "--output", "10", "--cached", "0.25", "--cache-write", "3", "--from", "2026-07-01T02:00:00+02:00"]
    said = run(monkeypatch, "set_price", "openai/gpt-*", *arguments)

    price = Price.objects.get()
    assert (price.input, price.output, price.cache_read, price.cache_write) == (2_500_000, 10_000_000, 250_000, 3_000_000)
    assert price.starts_at == datetime(2026, 7, 1, tzinfo=UTC)
    assert said == "openai/gpt-* from 2026-07-01T00:00:00+00:00\n"


def test_a_date_alone_is_utc_and_none_is_now(monkeypatch: pytest.MonkeyPatch):
    run(monkeypatch, "set_price", "a/b", "--input", "1", "--output", "1", "--from", "2026-07-01")
    run(monkeypatch, "set_price", "a/b", "--input", "1", "--output", "1")
    first, second = Price.objects.order_by("pk")

    assert first.starts_at == datetime(2026, 7, 1, tzinfo=UTC)
    assert abs((second.starts_at - second.created_at).total_seconds()) < 60
    assert (first.cache_read, first.cache_write) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a/b", "--input", "x", "--output", "1"], "not an amount"),
        (["a/b", "--input", "1", "--output", "0.0000001"], "six decimals"),
        (["a/b", "--input", "-1", "--output", "1"], "between 0"),
        (["gpt-4o", "--input", "1", "--output", "1"], "openai/gpt-4o"),
        (["a/b", "--input", "1", "--output", "1", "--from", "soon"], "2026-07-01"),
        (["a/b", "--input", "1"], "--output"),
    ],
)
def test_a_wrong_price_is_refused_in_words(monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str):
    with pytest.raises(CommandError, match=words):
        run(monkeypatch, "set_price", *arguments)
    assert not Price.objects.exists()


def test_refresh_models_tells_of_each_and_succeeds_whatever_one_says(monkeypatch: pytest.MonkeyPatch):
    def answer(request: httpx.Request) -> httpx.Response:
        if "bad" in request.url.host:
            return httpx.Response(401, json={"error": {"message": f"no {SECRET}"}})
        return httpx.Response(200, json={"data": [{"id": "a"}]})

    monkeypatch.setattr(listing, "transport_over", lambda egress: OverHttpx(httpx.MockTransport(answer)))
    for label, host in (("Good", "good"), ("Bad", "bad")):
        run(
            monkeypatch, "add_credential", "openai", "--label", label, "--base-url", f"http://{host}.example.org", "--secret-stdin",
            stdin=SECRET,
        )  # fmt: skip
    good, bad = Credential.objects.order_by("pk")

    assert run(monkeypatch, "refresh_models").splitlines() == [
        f"[1/2] {good.pk} Good (openai): 1 models",
        f"[2/2] {bad.pk} Bad (openai): The upstream refused the gateway's credential.",
    ]
    assert run(monkeypatch, "refresh_models", "--credential", str(good.pk)) == f"[1/1] {good.pk} Good (openai): 1 models\n"
    with pytest.raises(CommandError, match="no credential 999"):
        run(monkeypatch, "refresh_models", "--credential", "999")


def test_reseal_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch):
    run(monkeypatch, "add_credential", "openai", "--label", "x", "--base-url", "http://llm.example.org", "--secret-stdin", stdin=SECRET)
    assert run(monkeypatch, "reseal") == "0 sealed again, 0 left, 0 that no key of this keyring opens\n"

    monkeypatch.setattr("providers.actions.sealed_with", lambda blob: "older")
    assert run(monkeypatch, "reseal") == "1 sealed again, 0 left, 0 that no key of this keyring opens\n"
    assert secret_of(Credential.objects.get()).reveal() == SECRET
