"""A vendor whose accounts sign in: a strict token server, and an OpenAI that takes its access tokens alone.

A refresh token works once. Whoever shows a used one ends the whole family, access tokens included, as strict servers do
(promises, section 8). Codes work once, PKCE is checked, and who polls too fast is told to slow down. Answers of the token
endpoint have a script of their own: `token_script(Step(...))`. A step with a status or a body of its own is not executed.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

from tests.upstreams.kit import Call, Step, compact
from tests.upstreams.openai import OpenAIUpstream, Refused

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
KNOWN = {
    "authorization_code": {"code", "redirect_uri", "code_verifier"},
    "refresh_token": {"refresh_token"},
    DEVICE_GRANT: {"device_code", "code_verifier"},
}


class OAuthError(Exception):
    def __init__(self, code: str, status: int = 400) -> None:
        super().__init__(code)
        self.status, self.code = status, code


@dataclass
class Family:
    """What came of one sign-in."""

    number: int
    refresh: str = ""
    alive: bool = True
    previous: str = ""


@dataclass
class Waiting:
    """A sign-in that a person has not finished."""

    challenge: str
    redirect_uri: str = ""
    state: str = "pending"  # approved, denied, used
    polled_at: float = 0.0


@dataclass
class Counts:
    logins: int = 0
    refreshes: int = 0
    reused: int = 0
    refused_calls: int = 0
    unknown_fields: list[str] = field(default_factory=list)


class OAuthUpstream(OpenAIUpstream):
    """`client_id` and `client_secret` are what it expects. `life_seconds` is what it says and keeps to; None = it does not say.

    Unless it is `strict`, a used refresh token is refused, and no sign-in ends by it."""

    def __init__(
        self, *, client_secret: str = "", life_seconds: float | None = 3600, rotate: bool = True, strict: bool = True, **options: Any
    ) -> None:
        super().__init__(**options)
        self.strict = strict
        self.client_id, self.client_secret = "sim-client", client_secret
        self.life_seconds, self.rotate = life_seconds, rotate
        self.interval: float | None = 1
        self.facts: dict[str, Any] = {"region": "eu"}
        self.counts = Counts()
        self.refuse_all_calls = False
        self.lost_last_rotation = False  # it fell over after its last answer: the token before works again
        self._tokens: deque[Step] = deque()
        self._families: list[Family] = []
        self._access: dict[str, tuple[Family, float]] = {}
        self._used: dict[str, Family] = {}
        self._codes: dict[str, Waiting] = {}
        self._devices: dict[str, Waiting] = {}
        self._number = 0
        self._state = threading.RLock()

    # For tests

    @property
    def token_url(self) -> str:
        return f"{self.origin}/oauth/token"

    def settings(self, flow: str = "device", **more: str) -> dict[str, str]:
        """What an operator would set for an account of kind `passport`."""
        urls = {"token_url": self.token_url, "device_url": f"{self.origin}/oauth/device", "authorize_url": f"{self.origin}/oauth/authorize"}
        secret = {"client_secret": self.client_secret} if self.client_secret else {}
        return {"flow": flow, "client_id": self.client_id, **secret, **urls, **more}

    def token_script(self, *steps: Step) -> None:
        self._tokens.extend(steps)

    def log_in(self) -> dict[str, Any]:
        """As if somebody had signed in with the vendor's own tool: what it would have been given."""
        with self._state:
            return self._new_family()

    def expire_access(self) -> None:
        """Every access token has ended, sooner than was said."""
        with self._state:
            self._access.clear()

    def revoke(self) -> None:
        """The sign-ins are ended: refresh tokens do not work any more."""
        with self._state:
            for family in self._families:
                family.alive = False

    def is_current(self, refresh: str) -> bool:
        return any(family.alive and family.refresh == refresh for family in self._families)

    def approve(self, *, deny: bool = False) -> None:
        """The person answers every device sign-in that waits."""
        for waiting in self._devices.values():
            if waiting.state == "pending":
                waiting.state = "denied" if deny else "approved"

    def browse(self, link: str, *, deny: bool = False) -> str:
        """The person opens the link and consents: the address that the browser ends at."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(link).query).items()}
        assert asked["client_id"] == self.client_id
        assert asked["response_type"] == "code"
        assert asked["code_challenge_method"] == "S256"
        if deny:
            return f"{asked['redirect_uri']}?{urlencode({'error': 'access_denied', 'state': asked['state']})}"
        code = f"4/0A{self._next()}"
        self._codes[code] = Waiting(asked["code_challenge"], asked["redirect_uri"])
        return f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}"

    # The server

    async def _answer(self, call: Call) -> None:
        path = call.seen.path
        if path in ("/oauth/token", "/oauth/device"):
            return await (self._token(call) if path == "/oauth/token" else self._device(call))
        if path.startswith(f"{self.base_path}/"):
            key = call.seen.headers.get("authorization", "").removeprefix("Bearer ")
            family, until = self._access.get(key, (None, 0.0))
            if family is None or not family.alive or until < time.monotonic() or self.refuse_all_calls:
                self.counts.refused_calls += 1
                raise Refused(401, "invalid access token or token expired", code="invalid_api_key")
        return await super()._answer(call)

    async def _token(self, call: Call) -> None:
        step = self._tokens.popleft() if self._tokens else Step()
        if step.status != 200 or step.body is not None:
            return await call.whole_with(step, step.body if step.body is not None else b"{}", step.headers)
        try:
            asked = self._form(call)
            with self._state:
                answer = self._granted(asked)
        except OAuthError as problem:
            said = {"error": problem.code, "error_description": f"It says {problem.code}, and quotes what it was given."}
            return await call.json(problem.status, said)
        return await call.whole_with(step, compact(answer), step.headers)

    async def _device(self, call: Call) -> None:
        try:
            asked = self._form(call, {"scope", "code_challenge", "code_challenge_method", "audience"})
            if not asked.get("code_challenge") or asked.get("code_challenge_method") != "S256":
                raise OAuthError("invalid_request")
        except OAuthError as problem:
            return await call.json(problem.status, {"error": problem.code})
        code = f"dev-sim-{self._next()}"
        self._devices[code] = Waiting(asked["code_challenge"])
        link = f"{self.origin}/authorize"
        answer: dict[str, Any] = {
            "device_code": code,
            "user_code": f"ABCD-{self._number}",
            "verification_uri": link,
            "verification_uri_complete": f"{link}?user_code=ABCD-{self._number}",
            "expires_in": 900,
        }
        return await call.json(200, answer | ({"interval": self.interval} if self.interval is not None else {}))

    def _form(self, call: Call, more: set[str] | None = None) -> dict[str, str]:
        seen = call.seen
        if seen.method != "POST" or seen.headers.get("content-type") != "application/x-www-form-urlencoded":
            raise OAuthError("invalid_request")
        asked = dict(parse_qsl(seen.body.decode(), keep_blank_values=True))
        if asked.get("client_id") != self.client_id or (more is None and asked.get("client_secret", "") != self.client_secret):
            raise OAuthError("invalid_client", 401)
        known = (KNOWN.get(asked.get("grant_type", ""), set()) if more is None else more) | {"client_id", "client_secret", "grant_type"}
        self.counts.unknown_fields += sorted(asked.keys() - known)
        return asked

    def _granted(self, asked: dict[str, str]) -> dict[str, Any]:
        match asked.get("grant_type"):
            case "refresh_token":
                return self._refreshed(asked.get("refresh_token", ""))
            case "authorization_code":
                waiting = self._codes.pop(asked.get("code", ""), None)
                if waiting is None or waiting.redirect_uri != asked.get("redirect_uri"):
                    raise OAuthError("invalid_grant")
            case grant if grant == DEVICE_GRANT:
                waiting = self._approved(asked.get("device_code", ""))
            case _:
                raise OAuthError("unsupported_grant_type")
        digest = hashlib.sha256(asked.get("code_verifier", "").encode()).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != waiting.challenge:
            raise OAuthError("invalid_grant")
        return self._new_family()

    def _approved(self, code: str) -> Waiting:
        waiting, now = self._devices.get(code), time.monotonic()
        if waiting is None or waiting.state == "used":
            raise OAuthError("expired_token")
        if waiting.polled_at and self.interval and now - waiting.polled_at < self.interval * 0.9:
            waiting.polled_at = now
            raise OAuthError("slow_down")
        waiting.polled_at = now
        if waiting.state == "pending":
            raise OAuthError("authorization_pending")
        if waiting.state == "denied":
            raise OAuthError("access_denied")
        waiting.state = "used"
        return waiting

    def _refreshed(self, refresh: str) -> dict[str, Any]:
        if refresh in self._used:
            family = self._used[refresh]
            if self.lost_last_rotation and family.previous == refresh:
                family.alive = True
            else:
                self.counts.reused += 1
                family.alive = family.alive and not self.strict
                raise OAuthError("invalid_grant")
        found = next((one for one in self._families if refresh in (one.refresh, one.previous)), None)
        if found is None or not found.alive or (self.lost_last_rotation and refresh == found.refresh):
            raise OAuthError("invalid_grant")
        self.counts.refreshes += 1
        return self._issue(found, rotate=self.rotate)

    def _new_family(self) -> dict[str, Any]:
        family = Family(len(self._families) + 1)
        self._families.append(family)
        self.counts.logins += 1
        return self._issue(family, rotate=True)

    def _issue(self, family: Family, *, rotate: bool) -> dict[str, Any]:
        access = f"sk-sim-ok~access-{self._next()}"
        self._access[access] = (family, time.monotonic() + (self.life_seconds or 3600))
        answer: dict[str, Any] = {"access_token": access, "token_type": "Bearer", **self.facts}
        if rotate:
            if family.refresh:
                self._used[family.refresh] = family
            family.previous, family.refresh = family.refresh, f"refresh-sim-{self._next()}"
            answer["refresh_token"] = family.refresh
        if self.life_seconds is not None:
            answer["expires_in"] = self.life_seconds
        return answer

    def _next(self) -> int:
        self._number += 1
        return self._number
