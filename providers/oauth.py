"""OAuth as values and pure steps: what a kind's sign-in is, the requests of its flows, and how their answers read. No I/O here.

    code flow    begin_code -> (a person) -> code_in -> code_request -> tokens_in
    device flow  device_request -> device_in -> (a person) -> poll_request -> polled -> poll_request -> ...
    renewal      refresh_request -> tokens_in

What can go wrong (promises, section 8, step 6), each with a `code`: a short word that is kept and shown, never the vendor's text.

OAuthFailed
├── TryAgainLater   no answer, 429, 5xx, or one that cannot be read: what we hold stays as it is
├── WrongSettings   the client id, its secret or an address is wrong: for the operator to mend; what we hold stays
├── GrantDead       this refresh token will never work again
└── SignInEnded     the person said no, took too long, or pasted something else: begin again
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import parse_qs, urlencode, urlsplit

import msgspec

from providers.exchange import Outgoing, place_of
from providers.secrets import SecretText

if TYPE_CHECKING:
    from providers.adapter import Heard

Json = dict[str, Any]

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
SLOWER_SECONDS = 5.0  # RFC 8628, 3.5
POLL_SECONDS, SHORTEST_POLL_SECONDS, LONGEST_POLL_SECONDS = 5.0, 1.0, 60.0
CODE_SECONDS = 900.0
LONGEST_LIFE_SECONDS = 10 * 365 * 86400.0
MOST_TOKEN_LENGTH = 32 << 10
MOST_FACTS, MOST_FACT_LENGTH = 50, 2000


@dataclass(frozen=True, slots=True)
class SignIn:
    """How an account of one kind signs in. Client ids and secrets are the operator's settings, never values of ours."""

    flow: Literal["code", "device"]
    token_url: str
    client_id: str
    client_secret: str = ""
    authorize_url: str = ""  # of the code flow
    device_url: str = ""  # of the device flow
    scopes: tuple[str, ...] = ()
    redirect_uri: str = ""  # of the code flow: a loopback address, or the page that shows the code to paste
    pkce: bool = True
    more: Mapping[str, str] = field(default_factory=dict)  # further parameters of the first request
    # What a refresh that will never work again is answered with. A 400 that names an error is judged by that name instead.
    refresh_statuses_dead: frozenset[int] = frozenset({400, 401})


@dataclass(frozen=True, slots=True, repr=False)
class TokenSet:
    """What a sign-in, a refresh, or a tool's own credential file gave. Times are seconds since the epoch."""

    access: str
    refresh: str = ""
    expires_at: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)  # what else it said of the account, such as `resource_url`; no secrets

    def __repr__(self) -> str:
        return "TokenSet(…)"


@dataclass(frozen=True, slots=True)
class Lease:
    """Which access token a call carries. Times are on this process's monotonic clock; `expires` None = nobody said.

    `sign_in` is the generation with which a person's sign-in began: another one may be that of another account."""

    generation: int
    expires: float | None = None
    sign_in: int = 0
    renewed_at: float = 0.0

    def has_ended(self) -> bool:
        return self.expires is not None and self.expires <= monotonic()


@dataclass(frozen=True, slots=True, repr=False)
class Access:
    """An access token in use, and the account's settings with what its sign-in said merged in below them."""

    secret: SecretText
    lease: Lease
    settings: Mapping[str, str]
    origin: str = ""  # the only place that it may be sent to, as `origin_of` says it; empty: not known

    def __repr__(self) -> str:
        return f"Access(generation={self.lease.generation})"


class Via(NamedTuple):
    """How requests leave: on whose connections, and by which of an account's settings."""

    credential_id: int = 0
    ca_pem: str = ""
    proxy_url: str = ""

    @classmethod
    def of(cls, settings: Mapping[str, str], credential_id: int = 0) -> Via:
        return cls(credential_id, str(settings.get("ca_pem", "")), str(settings.get("proxy_url", "")))


@dataclass(frozen=True, slots=True, repr=False)
class CodePending:
    """A sign-in that waits for a code. `link` is what a person opens; the rest is secret until it is done."""

    link: str
    state: str
    verifier: str
    redirect_uri: str


@dataclass(frozen=True, slots=True, repr=False)
class DevicePending:
    """A sign-in that waits for a person's approval elsewhere. `expires_at` is seconds since the epoch."""

    link: str
    user_code: str
    device_code: str
    verifier: str
    interval_seconds: float
    expires_at: float


class OAuthFailed(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class TryAgainLater(OAuthFailed):
    """`unsure`: the request may have been carried out, although no answer to it could be read."""

    def __init__(self, code: str, message: str, *, retry_after_seconds: float | None = None, unsure: bool = False) -> None:
        super().__init__(code, message)
        self.retry_after_seconds, self.unsure = retry_after_seconds, unsure


class WrongSettings(OAuthFailed):
    pass


class GrantDead(OAuthFailed):
    pass


class SignInEnded(OAuthFailed):
    pass


# The code flow (RFC 6749 4.1, RFC 7636)


def begin_code(sign_in: SignIn, redirect_uri: str = "") -> CodePending:
    """The link that a person opens. `redirect_uri`: where the kind's own leaves the port open."""
    pending = CodePending("", secrets.token_hex(32), new_verifier(), redirect_uri or sign_in.redirect_uri)
    asked = {
        "response_type": "code",
        "client_id": sign_in.client_id,
        "redirect_uri": pending.redirect_uri,
        "state": pending.state,
        **_scope(sign_in),
        **_challenge(sign_in, pending.verifier),
        **sign_in.more,
    }
    joint = "&" if "?" in sign_in.authorize_url else "?"
    return replace(pending, link=f"{sign_in.authorize_url}{joint}{urlencode(asked)}")


def code_in(given: str, pending: CodePending) -> str:
    """The code in what a person pasted: the address that the browser ended at, or the code alone. Raises SignInEnded."""
    given = given.strip()
    if re.search(r"(?:^|[?&#])(?:code|error)=", given):
        parts = urlsplit(given)
        if parts.scheme and parts.path.rstrip("/") != urlsplit(pending.redirect_uri).path.rstrip("/"):
            raise SignInEnded("other_address", f"This is not the address that the sign-in ends at: {pending.redirect_uri}?code=…")
        said = {name: values[0] for name, values in parse_qs(parts.query or parts.fragment or parts.path).items()}
        if parts.path.startswith("/"):
            said.setdefault("state", "")  # an address without one was not made by this sign-in
    else:
        code, _, state = given.partition("#")  # some vendors' pages show both
        said = {"code": code, "state": state} if state else {"code": code}
    if said.get("error"):
        raise SignInEnded(
            _word(said["error"]) or "refused", f"The vendor refused the sign-in: {_word(said['error']) or 'no reason given'}."
        )
    if "state" in said and not secrets.compare_digest(said["state"].encode(), pending.state.encode()):
        raise SignInEnded("other_state", "This answer belongs to another sign-in: open the link of this one.")
    code = said.get("code", "")
    if not code or len(code) > MOST_TOKEN_LENGTH or not re.fullmatch(r"[\x21-\x7e]+", code) or "://" in code:
        raise SignInEnded("no_code", "There is no code in it. Paste the whole address that the browser ended at, or the code alone.")
    return code


def code_request(sign_in: SignIn, pending: CodePending, code: str, via: Via = Via()) -> Outgoing:  # noqa: B008 a value
    verifier = {"code_verifier": pending.verifier} if sign_in.pkce else {}
    asked = {"grant_type": "authorization_code", "code": code, "redirect_uri": pending.redirect_uri, **_client(sign_in), **verifier}
    return _post(sign_in.token_url, asked, via)


# The device flow (RFC 8628)


def device_request(sign_in: SignIn, verifier: str, via: Via = Via()) -> Outgoing:  # noqa: B008
    asked = {"client_id": sign_in.client_id, **_scope(sign_in), **_challenge(sign_in, verifier), **sign_in.more}
    return _post(sign_in.device_url, asked, via)


def device_in(heard: Heard, verifier: str, arrived: float) -> DevicePending:
    """`arrived`: when the answer came, in seconds since the epoch. Raises OAuthFailed."""
    said = _granted(heard, dead=frozenset())
    link = _text(said, "verification_uri_complete") or _text(said, "verification_uri") or _text(said, "verification_url")
    device_code, user_code = _text(said, "device_code"), _text(said, "user_code")
    # It is shown as a link: what it may be is not the vendor's to say.
    if not device_code or not re.fullmatch(r"https?://[\x21-\x7e]{1,2000}", link) or not re.fullmatch(r"[\x20-\x7e]{0,100}", user_code):
        raise TryAgainLater("unreadable", "The vendor's answer is not that of a device sign-in.")
    interval = _seconds(said.get("interval")) or POLL_SECONDS
    life = _seconds(said.get("expires_in")) or CODE_SECONDS
    return DevicePending(
        link=link,
        user_code=user_code,
        device_code=device_code,
        verifier=verifier,
        interval_seconds=min(max(interval, SHORTEST_POLL_SECONDS), LONGEST_POLL_SECONDS),
        expires_at=arrived + min(life, 86400.0),
    )


def poll_request(sign_in: SignIn, pending: DevicePending, via: Via = Via()) -> Outgoing:  # noqa: B008
    verifier = {"code_verifier": pending.verifier} if sign_in.pkce else {}
    return _post(sign_in.token_url, {"grant_type": DEVICE_GRANT, "device_code": pending.device_code, **_client(sign_in), **verifier}, via)


def polled(pending: DevicePending, heard: Heard, arrived: float, facts_from: Callable[[Json], dict[str, str]]) -> TokenSet | DevicePending:
    """The tokens, or what to go on waiting with, for `interval_seconds`. Raises SignInEnded or WrongSettings."""
    code = error_in(heard)
    if code == "authorization_pending":
        return pending
    if code == "slow_down" or heard.status == 429 or heard.status >= 500:
        return slower(pending)
    if code == "access_denied":
        raise SignInEnded(code, "The sign-in was refused by the person, or by the vendor.")
    if code == "expired_token" or (heard.status == 401 and code not in _WRONG_SETTINGS):
        raise SignInEnded("expired_token", "The code has expired: begin again.")
    try:
        return tokens_in(heard, arrived, facts_from)
    except GrantDead as problem:
        raise SignInEnded(problem.code, "The vendor does not know this sign-in any more: begin again.") from None
    except TryAgainLater:
        if code and heard.status == 400:
            raise SignInEnded(code, f"The vendor refused the sign-in ({code}): begin again.") from None
        return slower(pending)


def slower(pending: DevicePending) -> DevicePending:
    return replace(pending, interval_seconds=min(pending.interval_seconds + SLOWER_SECONDS, LONGEST_POLL_SECONDS))


# Tokens


def refresh_request(sign_in: SignIn, refresh: str, via: Via = Via()) -> Outgoing:  # noqa: B008
    return _post(sign_in.token_url, {"grant_type": "refresh_token", "refresh_token": refresh, **_client(sign_in)}, via)


def tokens_in(
    heard: Heard, arrived: float, facts_from: Callable[[Json], dict[str, str]], dead: frozenset[int] = frozenset({400, 401})
) -> TokenSet:
    """What a token endpoint gave. `arrived`: when the answer came, in seconds since the epoch; `dead`: as `SignIn.refresh_statuses_dead`.

    A refresh token that it does not give stays empty: the one in use goes on. Raises TryAgainLater, WrongSettings, GrantDead."""
    said = _granted(heard, dead=dead)
    access, refresh = _token(said, "access_token"), _token(said, "refresh_token")
    if not access:
        raise TryAgainLater("unreadable", "The vendor's answer holds no access token.", unsure=True)
    life = _seconds(said.get("expires_in"))
    return TokenSet(access, refresh, arrived + life if life else None, _small(facts_from(said)))


def error_in(heard: Heard) -> str:
    """The `error` of an OAuth answer; empty where it has none. A 200 may have one, too."""
    said = _object(heard.body)
    return _word(said.get("error")) if said else ""


_WRONG_SETTINGS = frozenset({"invalid_client", "invalid_request", "unauthorized_client", "unsupported_grant_type", "invalid_scope"})
_DEAD = frozenset({
    "invalid_grant", "invalid_token", "token_expired", "token_revoked", "expired_token",
    "invalid_refresh_token", "refresh_token_invalid", "refresh_token_expired", "refresh_token_revoked", "refresh_token_reused",
})  # fmt: skip


def _granted(heard: Heard, dead: frozenset[int]) -> Json:
    """The answer's object, where it is a success. Raises OAuthFailed."""
    status, code, said = heard.status, error_in(heard), _object(heard.body)
    if status == 429 or status >= 500:
        name = "rate_limited" if status == 429 else f"http_{status}"
        wait = _seconds(heard.headers.get("retry-after"))
        raise TryAgainLater(name, f"The vendor answered {status}.", retry_after_seconds=wait, unsure=status != 429)
    if code in _WRONG_SETTINGS:
        raise WrongSettings(code, f"The vendor does not accept the settings of this sign-in ({code}).")
    if code in _DEAD:
        raise GrantDead(code, f"The vendor refused it for good ({code}).")
    if code and status in (200, 400):  # it says what is wrong, and that is not the grant
        raise TryAgainLater(code, f"The vendor refused it for now ({code}).")
    # A page is not the token endpoint's own word: something in front of it speaks.
    if status in dead and not heard.body.lstrip().startswith(b"<"):
        raise GrantDead(code or f"http_{status}", f"The vendor refused it for good ({code or status}).")
    if not 200 <= status < 300:
        raise TryAgainLater(code or f"http_{status}", f"The vendor answered {status}.")
    if said is None:
        raise TryAgainLater("unreadable", "The vendor's answer could not be read.", unsure=True)
    return said


def new_verifier() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()


def origin_of(url: str) -> str:
    """scheme://host:port. Raises UpstreamUnreachable for what is no plain address."""
    scheme, host, port = place_of(url)[0].origin
    return f"{scheme}://{host}:{port}"


def _challenge(sign_in: SignIn, verifier: str) -> dict[str, str]:
    if not sign_in.pkce:
        return {}
    digest = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    return {"code_challenge": digest, "code_challenge_method": "S256"}


def _scope(sign_in: SignIn) -> dict[str, str]:
    return {"scope": " ".join(sign_in.scopes)} if sign_in.scopes else {}


def _client(sign_in: SignIn) -> dict[str, str]:
    secret = {"client_secret": sign_in.client_secret} if sign_in.client_secret else {}
    return {"client_id": sign_in.client_id, **secret}


def _post(url: str, fields: Mapping[str, str], via: Via) -> Outgoing:
    place, path = place_of(url, *via)
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json", "User-Agent": "sluice/0.1"}
    return Outgoing("POST", place, path or "/", headers, urlencode(fields).encode())


def _object(body: bytes) -> Json | None:
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return said if isinstance(said, dict) else None


def _text(said: Json, name: str) -> str:
    value = said.get(name)
    return value if isinstance(value, str) else ""


def _token(said: Json, name: str) -> str:
    """Empty where there is none, and where it is nothing that a header could carry."""
    value = _text(said, name)
    return value if len(value) <= MOST_TOKEN_LENGTH and value.isascii() and value.isprintable() else ""


def _word(value: object) -> str:
    """A code as it may be kept and shown: a short word of plain letters, else nothing."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,39}", value) else ""


def _seconds(value: object) -> float | None:
    """A span that makes sense, given as a number or as its text. 0 and less are none: a token that is dead at birth is a slip."""
    try:
        seconds = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return min(seconds, LONGEST_LIFE_SECONDS) if seconds > 0 else None


def _small(facts: Mapping[str, str]) -> dict[str, str]:
    kept = {str(name): str(value) for name, value in facts.items() if value and len(str(value)) <= MOST_FACT_LENGTH}
    return dict(list(kept.items())[:MOST_FACTS])
