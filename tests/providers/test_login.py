"""Signing in: from a terminal, and from the admin's page, by either flow."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from accounts.models import AuditEntry, Organization, User
from providers import actions, tokens
from providers.management.commands import login
from providers.models import Credential, OAuthToken, State
from tests.providers.test_tokens import Account, row_of, said
from tests.serving import free_port
from tests.upstreams.kit import Step
from tests.upstreams.oauth_server import OAuthUpstream
from tests.upstreams.passport import file_of

pytestmark = pytest.mark.django_db


class Terminal(io.StringIO):
    """What the command prints; whoever reads along may do something when a line has come."""

    def __init__(self, on_link: Callable[[str], None] = lambda link: None) -> None:
        super().__init__()
        self._on_link = on_link

    def write(self, text: str) -> int:
        written = super().write(text)
        for link in re.findall(r"^  (http\S+)$", text, re.MULTILINE):
            self._on_link(link)
        return written


def run(vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch, *more: str, flow: str, terminal: Terminal, stdin: Any = None) -> str:
    sets = [word for name, value in vendor.settings(flow).items() for word in ("--set", f"{name}={value}")]
    base = [] if "--credential" in more else ["--label", "Mine", "--base-url", vendor.base_url, *sets]
    monkeypatch.setattr("sys.stdin", stdin or io.StringIO())
    call_command("login", "passport", *base, *more, stdout=terminal)
    return terminal.getvalue()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch, vendor: OAuthUpstream) -> list[float]:
    """How long the command slept each time, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(login.time, "sleep", slept.append)
    vendor.interval = 1
    return slept


class Typed(io.TextIOBase):
    """A standard input into which a person types while the command runs."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._typed = threading.Condition()

    def type(self, *lines: str) -> None:
        with self._typed:
            self._lines += [f"{line}\n" for line in lines]
            self._typed.notify()

    def readline(self, *_: Any) -> str:  # type: ignore[override]
        with self._typed:
            if not self._typed.wait_for(lambda: self._lines, timeout=10):
                return ""
            return self._lines.pop(0)


# In a terminal


def test_a_device_login_prints_the_link_waits_and_adds_the_account(
    vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch, naps: list[float]
):
    Organization.objects.create(slug="acme", name="Acme")
    vendor.interval = None  # it does not mind how often it is asked

    def approve_at_last(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 4:
            vendor.approve()

    monkeypatch.setattr(login.time, "sleep", approve_at_last)
    monkeypatch.setattr(login, "SAY_EVERY_SECONDS", 0.0)
    more = ["--prefix", "p", "--weight", "3", "--organization", "acme", "--set", "region=us"]
    out = run(vendor, monkeypatch, *more, flow="device", terminal=Terminal())

    credential = Credential.objects.get()
    assert f"  {vendor.origin}/authorize?user_code=ABCD-1" in out
    assert "ABCD-1" in out.replace("user_code=ABCD-1", "")
    assert "14 min" in out or "15 min" in out
    assert out.count("Still waiting") == 3
    assert out.split()[-1] == str(credential.pk)
    assert (credential.prefix, credential.weight, credential.organization.slug, credential.state) == ("p", 3, "acme", State.ACTIVE)
    assert credential.secret is None
    assert tokens.access_of(credential).settings["region"] == "us"
    assert vendor.counts.unknown_fields == []
    assert "sk-sim" not in out
    assert "refresh-sim" not in out
    assert naps == [5.0] * 4


def test_a_device_login_slows_down_when_it_is_told_to_and_outlives_hiccups(
    vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch, naps: list[float]
):
    vendor.interval = 1
    vendor.token_script(said(400, b'{"error": "slow_down"}'), said(503), Step(scenario="reset", status=502), said(429))
    terminal = Terminal(lambda link: vendor.approve())
    run(vendor, monkeypatch, flow="device", terminal=terminal)
    assert naps == [1, 6, 11, 16, 21]


def test_a_device_login_that_is_refused_adds_nothing(vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch, naps: list[float]):
    with pytest.raises(CommandError, match="refused"):
        run(vendor, monkeypatch, flow="device", terminal=Terminal(lambda link: vendor.approve(deny=True)))
    assert not Credential.objects.exists()


def test_a_device_login_ends_when_its_code_does(vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch, naps: list[float]):
    vendor.token_script(said(400, b'{"error": "expired_token"}'))
    with pytest.raises(CommandError, match="expired"):
        run(vendor, monkeypatch, flow="device", terminal=Terminal())
    assert not Credential.objects.exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "client_id="], "Set client_id"),
        (["--set", "flow=none"], "does not sign in"),
        (["--prefix", "a/b"], "without a slash"),
        (["--set", "nonesuch=1"], "no setting"),
        (["--organization", "nowhere"], "no organization"),
        (["--credential", "99"], "no credential 99"),
        (["--set", "device_url=ftp://x"], "cannot be used"),
        (["--set", "client_id=other"], "settings of this sign-in"),
    ],
)
def test_what_is_wrong_is_said_before_anybody_signs_in(vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch, more: list[str], words: str):
    terminal = Terminal()
    with pytest.raises(CommandError, match=words):
        run(vendor, monkeypatch, *more, flow="device", terminal=terminal)
    assert "http" not in terminal.getvalue()
    assert not Credential.objects.exists()


def test_without_a_label_there_is_nothing_to_call_it(vendor: OAuthUpstream):
    with pytest.raises(CommandError, match="--label"):
        call_command("login", "passport")


def test_a_code_login_takes_what_is_pasted_and_says_what_was_wrong_with_it(vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch):
    typed = Typed()
    terminal = Terminal(lambda link: typed.type("nonsense here", vendor.browse(link).replace("state=", "state=0"), vendor.browse(link)))
    out = run(vendor, monkeypatch, "--set", "redirect_uri=https://vendor.example/shown", flow="code", terminal=terminal, stdin=typed)

    credential = Credential.objects.get()
    assert "There is no code in it" in out
    assert "another sign-in" in out
    assert out.split()[-1] == str(credential.pk)
    assert row_of(credential).generation == 1
    assert vendor.counts.unknown_fields == []


@pytest.mark.parametrize("port", [True, False])
def test_a_browser_on_this_machine_comes_back_by_itself(vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch, port: bool):
    uri = f"http://127.0.0.1:{free_port()}/back" if port else "http://127.0.0.1/back"
    pages: list[httpx.Response] = []

    def browse(link: str) -> None:
        def visit() -> None:
            address = vendor.browse(link)
            pages.append(httpx.get(address.replace("/back", "/favicon.ico")))
            pages.append(httpx.get(address))

        threading.Thread(target=visit).start()

    out = run(vendor, monkeypatch, "--set", f"redirect_uri={uri}", flow="code", terminal=Terminal(browse))
    assert out.split()[-1] == str(Credential.objects.get().pk)
    assert "comes back by itself" in out
    assert pages[0].status_code == 404


def test_a_port_that_is_taken_leaves_pasting(vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch):
    typed = Typed()
    terminal = Terminal(lambda link: typed.type(vendor.browse(link)))
    taken = f"http://127.0.0.1:{vendor.port}/back"
    out = run(vendor, monkeypatch, "--set", f"redirect_uri={taken}", flow="code", terminal=terminal, stdin=typed)
    assert "cannot be listened on" in out
    assert Credential.objects.exists()


def test_a_person_who_says_no_and_an_input_that_ends_add_nothing(vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch):
    typed = Typed()
    terminal = Terminal(lambda link: typed.type(vendor.browse(link, deny=True)))
    shown = "redirect_uri=https://vendor.example/shown"
    with pytest.raises(CommandError, match="access_denied"):
        run(vendor, monkeypatch, "--set", shown, flow="code", terminal=terminal, stdin=typed)
    with pytest.raises(CommandError, match="No code was given"):
        run(vendor, monkeypatch, "--set", shown, flow="code", terminal=Terminal())
    assert not Credential.objects.exists()


def test_a_code_that_was_used_is_refused(vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch):
    typed = Typed()
    terminal = Terminal(lambda link: typed.type("4/0A-unknown"))
    with pytest.raises(CommandError, match="does not take this code"):
        run(vendor, monkeypatch, "--set", "redirect_uri=https://vendor.example/shown", flow="code", terminal=terminal, stdin=typed)


def test_an_account_is_signed_in_again(vendor: OAuthUpstream, account: Account, monkeypatch: pytest.MonkeyPatch, naps: list[float]):
    mine = account()
    Credential.objects.update(state=State.NEEDS_REAUTH)
    out = run(vendor, monkeypatch, "--credential", str(mine.pk), flow="device", terminal=Terminal(lambda link: vendor.approve()))
    assert out.split()[-1] == str(mine.pk)
    assert (row_of(mine).generation, Credential.objects.get().state) == (2, State.ACTIVE)


# refresh_tokens


def test_refresh_tokens_renews_what_is_due_and_succeeds_whatever_one_says(vendor: OAuthUpstream, account: Account):
    ended, fresh = account("Ended"), account("Fresh", ended_seconds=-3600)
    broken = account("Broken")
    vendor.token_script(Step(), said(503))
    out = io.StringIO()
    call_command("refresh_tokens", stdout=out)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert sum("renewed, good until" in line for line in lines) == 1
    assert sum("answered 503" in line for line in lines) == 1
    assert next(line for line in lines if "Fresh" in line).endswith("UTC")
    assert sorted(row_of(one).generation for one in (ended, broken)) == [1, 2]
    assert row_of(fresh).generation == 1

    out = io.StringIO()
    call_command("refresh_tokens", "--credential", str(fresh.pk), stdout=out)
    assert row_of(fresh).generation == 2
    with pytest.raises(CommandError, match="signed in"):
        call_command("refresh_tokens", "--credential", "99")


# On the admin's page


class Operator:
    """Olga in her browser: no page may show a token, a verifier or a device code."""

    def __init__(self) -> None:
        self.user = User.objects.create_superuser("olga@example.org", "x")
        self.client = Client()
        self.client.force_login(self.user)

    def get(self, path: str, status: int = 200) -> str:
        return self._seen(self.client.get(f"/admin/providers/{path}", follow=True), status)

    def post(self, path: str, status: int = 200, **fields: Any) -> str:
        return self._seen(self.client.post(f"/admin/providers/{path}", fields, follow=True), status)

    def poll(self, path: str) -> dict[str, Any]:
        answer = self.client.post(f"/admin/providers/{path}", {"step": "poll"}, headers={"accept": "application/json"})
        self._seen(answer, 200)
        return dict(answer.json())

    def _seen(self, response: Any, status: int) -> str:
        page = response.content.decode()
        assert response.status_code == status, page[:2000]
        for secret in ("sk-sim-ok~", "refresh-sim", "dev-sim"):
            assert secret not in page
        return page


@pytest.fixture
def olga() -> Operator:
    return Operator()


@pytest.fixture
def waiting(vendor: OAuthUpstream) -> Callable[[str], Credential]:
    def make(flow: str) -> Credential:
        vendor.interval = None
        return actions.add_credential("passport", "Mine", "", base_url=vendor.base_url, settings=vendor.settings(flow), sign_in_later=True)

    return make


def link_in(page: str) -> str:
    found = re.search(r'id="sign-in-link" href="([^"]+)"', page)
    assert found is not None
    return found[1].replace("&amp;", "&")


def test_a_new_account_without_a_secret_is_led_to_its_sign_in(olga: Operator, vendor: OAuthUpstream):
    usual = {"kind": "passport", "label": "Mine", "prefix": "", "base_url": vendor.base_url, "settings": json.dumps(vendor.settings())}
    page = olga.post("credential/add/", **usual, weight="1", priority="0", organization="", user="", new_secret="")
    assert "sign-in-link" not in page
    assert Credential.objects.get().state == State.NEEDS_REAUTH


def test_a_tools_own_file_is_taken_on_the_form(olga: Operator, vendor: OAuthUpstream):
    usual = {"kind": "passport", "label": "Mine", "prefix": "", "base_url": vendor.base_url, "settings": json.dumps(vendor.settings())}
    more = {"weight": "1", "priority": "0", "organization": "", "user": ""}
    assert "no tokens" in olga.post("credential/add/", **usual, **more, new_secret="{}")
    olga.post("credential/add/", **usual, **more, new_secret=file_of(vendor.log_in()))
    assert row_of(Credential.objects.get()).generation == 1


def test_a_device_sign_in_shows_code_and_link_and_goes_on_by_itself(olga: Operator, waiting: Any, vendor: OAuthUpstream):
    mine = waiting("device")
    path = f"credential/{mine.pk}/sign-in/"
    assert "sign-in-link" not in olga.get(path)
    page = olga.post(path, step="begin")
    assert "ABCD-1" in page
    assert link_in(page).startswith(f"{vendor.origin}/authorize")
    assert 'data-sign-in-poll="5.0"' in page
    assert "signin.js" in page

    assert olga.poll(path) == {"wait_seconds": 5.0}
    vendor.token_script(said(400, b'{"error": "slow_down"}'))
    assert olga.poll(path) == {"wait_seconds": 10.0}
    vendor.approve()
    assert olga.poll(path) == {"go": f"/admin/providers/credential/{mine.pk}/change/"}
    assert (Credential.objects.get().state, row_of(mine).generation) == (State.ACTIVE, 1)
    assert "is signed in" in olga.get(f"credential/{mine.pk}/change/")
    assert "sign-in-link" not in olga.get(path), "what was pending is forgotten"


def test_a_device_sign_in_works_without_a_script(olga: Operator, waiting: Any, vendor: OAuthUpstream):
    mine = waiting("device")
    path = f"credential/{mine.pk}/sign-in/"
    olga.post(path, step="begin")
    assert "ABCD-1" in olga.post(path, step="poll")
    vendor.approve()
    assert "is signed in" in olga.post(path, step="poll")


def test_a_refused_device_sign_in_begins_again(olga: Operator, waiting: Any, vendor: OAuthUpstream):
    mine = waiting("device")
    path = f"credential/{mine.pk}/sign-in/"
    olga.post(path, step="begin")
    vendor.approve(deny=True)
    assert olga.poll(path) == {"go": f"/admin/providers/credential/{mine.pk}/sign-in/"}
    page = olga.get(path)
    assert "refused" in page
    assert "sign-in-link" not in page
    assert not OAuthToken.objects.exists()


def test_a_code_sign_in_takes_the_pasted_address(olga: Operator, waiting: Any, vendor: OAuthUpstream):
    mine = waiting("code")
    path = f"credential/{mine.pk}/sign-in/"
    link = link_in(olga.post(path, step="begin"))
    assert "There is no code in it" in olga.post(path, step="finish", pasted="two words")
    assert link_in(olga.get(path)) == link, "the same link goes on"
    assert "is signed in" in olga.post(path, step="finish", pasted=vendor.browse(link))
    assert Credential.objects.get().state == State.ACTIVE
    assert AuditEntry.objects.filter(actor=olga.user, action="credential.changed").exists()


def test_what_is_pending_opens_for_its_own_account_and_address_alone(olga: Operator, waiting: Any, vendor: OAuthUpstream):
    mine, other = waiting("code"), waiting("code")
    olga.post(f"credential/{mine.pk}/sign-in/", step="begin")
    session = olga.client.session
    kept = session[f"sign-in-{mine.pk}"]
    assert vendor.client_id not in kept
    session[f"sign-in-{other.pk}"] = kept
    session.save()
    assert "sign-in-link" not in olga.get(f"credential/{other.pk}/sign-in/")
    actions.change_credential(mine, base_url="http://127.0.0.1:9/v1")
    assert "sign-in-link" not in olga.get(f"credential/{mine.pk}/sign-in/")


def test_a_vendor_that_cannot_be_reached_is_said(olga: Operator, waiting: Any, vendor: OAuthUpstream):
    mine = waiting("device")
    actions.change_credential(mine, settings={**mine.settings, "device_url": "http://127.0.0.1:9/device"})
    assert "could not be reached" in olga.post(f"credential/{mine.pk}/sign-in/", step="begin")


def test_only_kinds_that_sign_in_have_the_page_and_only_operators_see_it(olga: Operator, waiting: Any, passport: Any):
    plain = actions.add_credential("demo", "Demo", "")
    olga.get(f"credential/{plain.pk}/sign-in/", status=403)
    mine = waiting("code")
    staff = User.objects.create_user("staff@example.org", "x", is_staff=True)
    client = Client()
    client.force_login(staff)
    assert client.get(f"/admin/providers/credential/{mine.pk}/sign-in/").status_code in (302, 403)
    assert client.post(f"/admin/providers/credential/{mine.pk}/sign-in/", {"step": "begin"}).status_code in (302, 403)


# Seen


def test_state_last_error_and_next_refresh_are_seen_in_the_admin_and_in_the_api(olga: Operator, account: Account, vendor: OAuthUpstream):
    acme = Organization.objects.create(slug="acme", name="Acme")
    mine, other = account("Mine", organization=acme), account("Other", ended_seconds=-3600)
    plain = actions.add_credential("demo", "Demo", "")
    vendor.token_script(said(503))
    call_command("refresh_tokens", stdout=io.StringIO())

    listed = olga.get("credential/")
    assert "expiring" in listed
    assert "The vendor answered 503." in listed
    page = olga.get(f"credential/{mine.pk}/change/")
    for words in ("The vendor answered 503. (http_503)", "signed in", "Renewed next", "Good until"):
        assert words in page, words
    assert "Renewed next" not in olga.get(f"credential/{plain.pk}/change/")

    api = {one["label"]: one for one in olga.client.get("/api/credentials").json()}
    [own] = olga.client.get("/api/organizations/acme/credentials").json()
    assert (own["label"], own["state"], own["sign_in_error"]) == ("Mine", "expiring", "http_503")
    assert own["last_error"] == "The vendor answered 503."
    assert own["next_refresh_at"] is not None
    assert (api["Other"]["state"], api["Other"]["sign_in_error"], api["Other"]["last_error"]) == ("active", "", "")
    assert (api["Other"]["signed_in"], api["Other"]["has_secret"]) == (True, True)
    assert (api["Demo"]["signed_in"], api["Demo"]["next_refresh_at"], api["Demo"]["expires_at"]) == (False, None, None)
    assert olga.client.get(f"/api/credentials/{other.pk}").json() == api["Other"]
    assert olga.client.get("/api/credentials/999").status_code == 404
    where = f"/api/organizations/acme/credentials/{mine.pk}"

    vendor.token_script(said(400, b'{"error": "invalid_grant"}'))
    call_command("refresh_tokens", "--credential", str(mine.pk), stdout=io.StringIO())
    assert olga.client.get(where).json()["state"] == "needs_reauth"
    assert "needs sign-in" in olga.get("credential/")
    assert "signed in anew" in olga.post("credential/", action="renew_chosen", _selected_action=[mine.pk])
    assert olga.client.get(where).json()["state"] == "active"


@pytest.mark.parametrize(("role", "status"), [("owner", 200), ("admin", 200), ("member", 403), ("viewer", 403), (None, 404)])
def test_an_organizations_owners_and_admins_see_its_own_accounts_and_nobody_all(account: Account, role: str | None, status: int):
    acme = Organization.objects.create(slug="acme", name="Acme")
    account("Mine", organization=acme)
    shared = account("Shared")
    alice = User.objects.create_user("alice@example.org", "x")
    if role:
        alice.memberships.create(organization=acme, role=role)
    client = Client()
    assert client.get("/api/credentials").status_code == 401
    client.force_login(alice)
    answer = client.get("/api/organizations/acme/credentials")
    assert answer.status_code == status
    if status == 200:
        assert [one["label"] for one in answer.json()] == ["Mine"]
    assert client.get("/api/credentials").status_code == 403
    assert client.get(f"/api/credentials/{shared.pk}").status_code == 403
