"""OAuth's steps, pure: links, forms, and every answer that a vendor may give (RFC 6749, 7636, 8628)."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from providers import oauth
from providers.adapter import Heard
from providers.failures import UpstreamUnreachable
from providers.oauth import DevicePending, GrantDead, SignIn, SignInEnded, TokenSet, TryAgainLater, Via, WrongSettings

CODE = SignIn(
    flow="code",
    token_url="https://vendor.example/token",
    client_id="cid",
    client_secret="shh",
    authorize_url="https://vendor.example/auth",
    redirect_uri="http://127.0.0.1:8085/back",
    scopes=("a", "b"),
    more={"access_type": "offline"},
)
DEVICE = SignIn(
    flow="device",
    token_url="https://vendor.example/token",
    client_id="cid",
    device_url="https://vendor.example/device",
    scopes=("a",),
    more={"audience": "x"},
)


def form(request: oauth.Outgoing) -> dict[str, str]:
    assert (request.method, request.headers["Content-Type"]) == ("POST", "application/x-www-form-urlencoded")
    return {name: values[0] for name, values in parse_qs(request.body.decode(), keep_blank_values=True).items()}


def heard(status: int = 200, value: Any = None, **headers: str) -> Heard:
    return Heard(status, headers, value if isinstance(value, bytes) else json.dumps(value or {}).encode())


def facts(reply: dict[str, Any]) -> dict[str, str]:
    return {name: reply[name] for name in ("resource_url",) if name in reply}


# The code flow


def test_the_link_has_a_state_and_a_challenge_of_its_own_and_no_secret():
    first, second = oauth.begin_code(CODE), oauth.begin_code(CODE)
    asked = {name: values[0] for name, values in parse_qs(urlsplit(first.link).query).items()}
    digest = base64.urlsafe_b64encode(hashlib.sha256(first.verifier.encode()).digest()).rstrip(b"=").decode()
    assert asked == {
        "response_type": "code",
        "client_id": "cid",
        "redirect_uri": "http://127.0.0.1:8085/back",
        "scope": "a b",
        "state": first.state,
        "code_challenge": digest,
        "code_challenge_method": "S256",
        "access_type": "offline",
    }
    assert len(first.state) == 64
    assert (first.state, first.verifier) != (second.state, second.verifier)
    assert "shh" not in first.link
    assert first.verifier not in first.link
    assert first.verifier not in repr(first)


def test_a_vendor_without_pkce_gets_none():
    plain = SignIn(flow="code", token_url=CODE.token_url, client_id="cid", authorize_url="https://v.example/auth?x=1", pkce=False)
    pending = oauth.begin_code(plain, "http://127.0.0.1:9/")
    assert "challenge" not in pending.link
    assert pending.link.startswith("https://v.example/auth?x=1&response_type=code")
    assert "code_verifier" not in form(oauth.code_request(plain, pending, "c"))


def test_the_code_is_exchanged_with_what_the_link_was_made_with():
    pending = oauth.begin_code(CODE)
    request = oauth.code_request(CODE, pending, "4/0A", Via(7, "PEM", "http://proxy:1"))
    assert form(request) == {
        "grant_type": "authorization_code",
        "code": "4/0A",
        "redirect_uri": pending.redirect_uri,
        "client_id": "cid",
        "client_secret": "shh",
        "code_verifier": pending.verifier,
    }
    assert request.url == "https://vendor.example/token"
    assert request.place[1:4] == (7, "PEM", "http://proxy:1")


@pytest.mark.parametrize(
    "given",
    [
        "{uri}?code=4%2F0A&state={state}",
        "  {uri}?state={state}&code=4%2F0A&scope=x \n",
        "http://localhost:9999/back?code=4%2F0A&state={state}",  # another port is the person's own browser's business
        "/back?code=4%2F0A&state={state}",
        "code=4%2F0A&state={state}",
        "code=4%2F0A",
        "4/0A",
        "4/0A#{state}",
    ],
)
def test_a_code_is_found_in_whatever_is_pasted(given: str):
    pending = oauth.begin_code(CODE)
    assert oauth.code_in(given.format(uri=pending.redirect_uri, state=pending.state), pending) == "4/0A"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("{uri}?error=access_denied&state={state}", "access_denied"),
        ("{uri}?error=%3Cscript%3E&state={state}", "refused"),
        ("{uri}?code=4&state=other", "other_state"),
        ("{uri}?code=4", "other_state"),
        ("4/0A#other", "other_state"),
        ("https://vendor.example/elsewhere?code=4&state={state}", "other_address"),
        ("{uri}?state={state}", "no_code"),
        ("https://vendor.example/", "no_code"),
        ("two words", "no_code"),
        ("", "no_code"),
        ("x" * 40_000, "no_code"),
    ],
)
def test_what_is_no_answer_to_this_sign_in_is_refused_in_words(given: str, code: str):
    pending = oauth.begin_code(CODE)
    with pytest.raises(SignInEnded) as refused:
        oauth.code_in(given.format(uri=pending.redirect_uri, state=pending.state), pending)
    assert refused.value.code == code
    assert "<" not in refused.value.message


# The device flow


def device(**said: Any) -> DevicePending:
    usual = {"device_code": "dev", "user_code": "AB-1", "verification_uri": "https://v.example/a", "expires_in": 900}
    return oauth.device_in(heard(200, usual | said), "verifier", 1000.0)


def test_a_device_code_is_asked_for_with_a_challenge():
    asked = form(oauth.device_request(DEVICE, "verifier"))
    assert asked.pop("code_challenge")
    assert asked == {"client_id": "cid", "scope": "a", "code_challenge_method": "S256", "audience": "x"}


def test_what_a_person_has_to_do_is_read():
    pending = device(verification_uri_complete="https://v.example/a?c=AB-1", interval=2)
    assert (pending.link, pending.user_code, pending.interval_seconds, pending.expires_at) == (
        "https://v.example/a?c=AB-1",
        "AB-1",
        2,
        1900,
    )
    assert device().interval_seconds == 5
    assert device(interval=0).interval_seconds == 5
    assert device(interval="7").interval_seconds == 7
    assert device(interval=1e9).interval_seconds == 60
    assert device(verification_uri=None, verification_url="https://v.example/b").link == "https://v.example/b"


@pytest.mark.parametrize(
    "said", [{"verification_uri": "javascript:alert(1)"}, {"verification_uri": ""}, {"device_code": 5}, {"user_code": "a\nb"}]
)
def test_a_link_that_is_none_is_not_shown(said: dict[str, Any]):
    with pytest.raises(TryAgainLater):
        device(**said)


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        (heard(400, {"error": "authorization_pending"}), 5),
        (heard(428, {"error": "authorization_pending"}), 5),
        (heard(400, {"error": "slow_down"}), 10),
        (heard(429, {"error": "slow_down"}), 10),
        (heard(429, {}), 10),
        (heard(503, b"<html>"), 10),
        (heard(200, b"<html>"), 10),
    ],
)
def test_while_it_is_not_done_it_is_waited_on_and_slower_when_asked_to(answer: Heard, seconds: float):
    found = oauth.polled(device(), answer, 1000.0, facts)
    assert isinstance(found, DevicePending)
    assert found.interval_seconds == seconds


def test_it_never_gets_slower_than_once_a_minute():
    pending = device()
    for _ in range(20):
        pending = oauth.slower(pending)
    assert pending.interval_seconds == 60


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (heard(400, {"error": "access_denied"}), SignInEnded, "access_denied"),
        (heard(400, {"error": "expired_token"}), SignInEnded, "expired_token"),
        (heard(401, {}), SignInEnded, "expired_token"),
        (heard(400, {"error": "invalid_grant"}), SignInEnded, "invalid_grant"),
        (heard(401, {"error": "invalid_client"}), WrongSettings, "invalid_client"),
        (heard(400, {"error": "unsupported_grant_type"}), WrongSettings, "unsupported_grant_type"),
    ],
)
def test_what_ends_a_device_sign_in(answer: Heard, kind: type[Exception], code: str):
    with pytest.raises(kind) as ended:
        oauth.polled(device(), answer, 1000.0, facts)
    assert ended.value.code == code  # type: ignore[attr-defined]


def test_when_it_is_done_there_are_tokens():
    asked = form(oauth.poll_request(DEVICE, device()))
    assert asked == {
        "grant_type": "urn:ietf:params:oauth:grant-type:device_code",
        "device_code": "dev",
        "client_id": "cid",
        "code_verifier": "verifier",
    }
    answer = heard(200, {"access_token": "at", "refresh_token": "rt", "expires_in": 21600, "resource_url": "portal.example"})
    found = oauth.polled(device(), answer, 1000.0, facts)
    assert isinstance(found, TokenSet)
    assert (found.access, found.refresh, found.expires_at, found.facts) == ("at", "rt", 22600.0, {"resource_url": "portal.example"})


# Tokens


def test_a_refresh_says_who_asks_and_nothing_more():
    assert form(oauth.refresh_request(CODE, "rt")) == {
        "grant_type": "refresh_token",
        "refresh_token": "rt",
        "client_id": "cid",
        "client_secret": "shh",
    }
    assert "client_secret" not in form(oauth.refresh_request(DEVICE, "rt"))


@pytest.mark.parametrize(
    ("life", "until"),
    [(3599, 4599.0), ("60", 1060.0), (1.5, 1001.5), (None, None), (0, None), (-1, None), ("soon", None), (True, None), ([], None)],
)
def test_a_life_is_counted_from_the_answers_arrival_where_it_makes_sense(life: Any, until: float | None):
    assert oauth.tokens_in(heard(200, {"access_token": "at", "expires_in": life}), 1000.0, facts).expires_at == until


def test_a_life_of_ages_is_cut_short():
    found = oauth.tokens_in(heard(200, b'{"access_token": "at", "expires_in": 1e308}'), 0.0, facts)
    assert found.expires_at == oauth.LONGEST_LIFE_SECONDS


def test_a_refresh_token_that_no_header_could_carry_counts_as_none_given():
    assert oauth.tokens_in(heard(200, {"access_token": "at", "refresh_token": "a\r\nb"}), 0.0, facts).refresh == ""
    with pytest.raises(TryAgainLater):
        oauth.tokens_in(heard(200, {"access_token": "a\r\nb"}), 0.0, facts)


def test_facts_are_few_and_short():
    reply = {"access_token": "at", **{f"f{number}": "x" * number * 100 for number in range(100)}}
    kept = oauth.tokens_in(heard(200, reply), 0.0, lambda said: {name: said[name] for name in said if name[0] == "f"}).facts
    assert "f20" in kept
    assert "f21" not in kept
    assert "f0" not in kept


def test_a_kind_says_which_statuses_end_a_grant():
    for status, dead, kind in ((403, frozenset({403}), GrantDead), (400, frozenset(), TryAgainLater)):
        with pytest.raises(kind):
            oauth.tokens_in(heard(status, {}), 0.0, facts, dead)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_grant", GrantDead),
        (400, "refresh_token_revoked", GrantDead),
        (400, "invalid_request", WrongSettings),  # Google's word for a form that lacks something: no new sign-in would mend it
        (400, "slow_down", TryAgainLater),
        (401, "unauthorized", GrantDead),
        (400, None, GrantDead),
    ],
)
def test_a_400_that_names_an_error_is_judged_by_that_and_else_by_its_status(status: int, code: str | None, kind: type[Exception]):
    with pytest.raises(kind) as failure:
        oauth.tokens_in(heard(status, {"error": code} if code else {}), 0.0, facts)
    assert type(failure.value) is kind


def test_a_device_whose_code_is_refused_by_any_name_begins_again():
    with pytest.raises(SignInEnded) as ended:
        oauth.polled(device(), heard(400, {"error": "device_unknown"}), 0.0, facts)
    assert ended.value.code == "device_unknown"


def test_a_vendors_words_never_get_into_what_is_kept():
    for said in ("Bearer sk-secret", "x" * 50, "two words", "<b>", 5, {"a": 1}):
        with pytest.raises((GrantDead, TryAgainLater)) as failure:
            oauth.tokens_in(heard(400, {"error": said, "error_description": "sk-secret"}), 0.0, facts)
        assert failure.value.code == "http_400"
        assert "sk-secret" not in failure.value.message


def test_nothing_of_it_prints_a_secret():
    pending = oauth.begin_code(CODE)
    for value in (TokenSet("access-secret", "refresh-secret"), pending, device(), oauth.refresh_request(CODE, "refresh-secret")):
        assert "secret" not in repr(value)
        assert "verifier" not in repr(value) or "verifier" not in str(value)


def test_an_address_that_is_none_is_refused():
    with pytest.raises(UpstreamUnreachable):
        oauth.origin_of("file:///etc/passwd")
    assert oauth.origin_of("https://V.example/token") == "https://v.example:443"
