"""What an upstream is to the rest of Sluice: a Target to call, and an Adapter that speaks its language.

An adapter translates between OpenAI's shapes and one provider's. It does no I/O and holds no state of a request;
what a stream needs to remember lives in the reader that `reader()` makes for that stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, ClassVar

import msgspec

from providers import wire
from providers.exchange import Outgoing, Transport, place_of
from providers.failures import (
    CallersKeyRefused,
    ContentFiltered,
    ContextLength,
    CredentialRefused,
    ForbiddenAtUpstream,
    InvalidAtUpstream,
    ModelGone,
    OutOfCredit,
    Overloaded,
    RateLimited,
    UpstreamBroke,
    UpstreamFailure,
    UpstreamProtocol,
    UpstreamServer,
    UpstreamTimeout,
    UsageOptionRefused,
)
from providers.price import Tokens
from providers.secrets import SecretText, redact
from providers.wire import Json

USER_AGENT = "sluice/0.1"
LONGEST_WAIT_SECONDS = 10**8  # an upstream that asks for more says nothing of use


@dataclass(frozen=True, slots=True)
class Target:
    """One place that a call can go to: an upstream account, and the model's name there."""

    kind: str
    credential_id: int
    label: str
    base_url: str
    secret: SecretText
    model: str  # as the upstream names it
    public_model: str  # as our clients do: prefix/model
    settings: Mapping[str, str] = field(default_factory=dict)
    callers_key: bool = False  # the secret came with the request (`X-Upstream-Key`)

    def get(self, path: str, headers: Mapping[str, str]) -> Outgoing:
        """A request to `path` below the base URL. Raises UpstreamUnreachable where that is no address."""
        return self._outgoing("GET", path, headers, b"")

    def post(self, path: str, headers: Mapping[str, str], body: bytes) -> Outgoing:
        return self._outgoing("POST", path, headers, body)

    def _outgoing(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Outgoing:
        settings = self.settings
        place, prefix = place_of(self.base_url, self.credential_id, settings.get("ca_pem", ""), settings.get("proxy_url", ""))
        return Outgoing(method, place, prefix + path, headers, body)


@dataclass(slots=True)
class Ask:
    """What one client wants, as its adapter sees it. `body` is the decoded request; adapters copy before they change."""

    endpoint: str  # "chat/completions"
    body: Json
    stream: bool
    request_id: str
    client_wants_usage: bool = False
    add_usage_option: bool = True  # False once this upstream has refused `stream_options`


class Adapter:
    """Translates between OpenAI's shapes and one provider's. Holds no state of a request."""

    name: ClassVar[str]
    title: ClassVar[str] = ""
    base_url: ClassVar[str]
    # allowed, restricted or ended; a restricted kind needs the operator's acknowledgment.
    policy: ClassVar[str] = "allowed"
    free: ClassVar[bool] = False  # its models get the explicit price 0 when a credential is added
    needs_secret: ClassVar[bool] = True
    # The settings it understands beside those that every kind has.
    settings: ClassVar[frozenset[str]] = frozenset()
    endpoints: ClassVar[frozenset[str]] = frozenset({"chat/completions"})
    # An adapter that needs no network answers through a transport of its own.
    transport: Transport | None = None

    def request(self, ask: Ask, target: Target) -> Outgoing:
        raise NotImplementedError

    def reader(self, ask: Ask, target: Target) -> Reader:
        """Reads one stream of this upstream."""
        raise NotImplementedError

    def answer(self, ask: Ask, target: Target, body: bytes, content_type: str) -> Whole:
        """A whole answer as the client gets it. Raises UpstreamFailure for an error in a 200, and for rubbish."""
        raise NotImplementedError

    def failure(self, target: Target, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        """What an answer that is not a success means."""
        raise NotImplementedError

    def models_request(self, target: Target) -> Outgoing | None:
        """The call that lists models, or None where `listed()` knows them without a call."""
        return None

    def models(self, body: bytes) -> dict[str, Json]:
        """Upstream id -> what it said of the model. Raises UpstreamProtocol."""
        return {}

    def listed(self) -> dict[str, Json]:
        """The same, where the list is known without a call."""
        return {}

    def base_url_from(self, given: str) -> str:
        """What is kept of a base URL, which has been checked to be one."""
        return given.rstrip("/")

    def secret_from(self, given: str) -> str:
        """What is kept of a secret. Raises ValueError, in words, for one that cannot be right."""
        secret = given.strip()
        if not secret.isprintable() or not secret.isascii():
            raise ValueError("A secret is one line of plain characters: this one has a line break or a letter that no header can carry.")
        return secret


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole answer: bytes for the client, and what the upstream counted (None where it did not say)."""

    body: bytes
    tokens: Tokens | None
    content_type: str = "application/json"


class Reader:
    """Turns one upstream stream into events for the client. Lives for one attempt.

    `feed` and `end` raise UpstreamFailure when the stream itself says or shows that it failed.
    """

    tokens: Tokens | None = None  # what the upstream counted so far
    started = False  # a content event has been produced: no other target may be tried any more
    finished = False  # the stream said that it is complete: what follows is not read, and `end` has the last word
    failure: UpstreamFailure | None = None  # to be raised once what `feed` has returned with it has been sent
    events = 0  # content events so far: the base of an estimate when usage never comes
    content_bytes = 0

    def feed(self, data: bytes) -> bytes:
        """Bytes as they arrived -> whole events for the client (possibly none)."""
        raise NotImplementedError

    def end(self) -> bytes:
        """The upstream closed: what is left to say. Raises UpstreamBroke or UpstreamProtocol when it was cut off."""
        raise NotImplementedError

    def estimated_output(self) -> int:
        """Output tokens judged by what passed: one an event where events are short, else four bytes a token."""
        return self.events if self.content_bytes <= 16 * self.events else self.content_bytes // 4


class OpenAICompatible(Adapter):
    """Any server that speaks OpenAI's API. A vendor of that kind is a subclass with a name and a base URL."""

    endpoints = frozenset(
        {
            "chat/completions",
            "completions",
            "embeddings",
            "moderations",
            "responses",
            "rerank",
            "images/generations",
            "audio/speech",
        }
    )
    _takes_usage_option = frozenset({"chat/completions", "completions"})

    def headers(self, target: Target) -> dict[str, str]:
        headers = {"User-Agent": USER_AGENT, "Content-Type": "application/json"}
        if target.secret:
            headers["Authorization"] = f"Bearer {target.secret.reveal()}"
        return headers

    def request(self, ask: Ask, target: Target) -> Outgoing:
        headers = self.headers(target)
        headers["Accept"] = "text/event-stream" if ask.stream else "*/*"
        headers["Accept-Encoding"] = "identity" if ask.stream else "gzip"
        headers["X-Request-ID"] = ask.request_id
        body = {**ask.body, "model": target.model}
        if self._adds_usage(ask):
            body["stream_options"] = {**(ask.body.get("stream_options") or {}), "include_usage": True}
        return target.post(f"/{ask.endpoint}", headers, wire.encode_json(body))

    def _adds_usage(self, ask: Ask) -> bool:
        return ask.stream and ask.add_usage_option and not ask.client_wants_usage and ask.endpoint in self._takes_usage_option

    def reader(self, ask: Ask, target: Target) -> Reader:
        return SameShape(drop_usage_event=self._adds_usage(ask), says_done=ask.endpoint in self._takes_usage_option, target=target)

    def answer(self, ask: Ask, target: Target, body: bytes, content_type: str) -> Whole:
        if ask.endpoint == "audio/speech" and "json" not in content_type and "html" not in content_type:
            return Whole(body, None, content_type)
        try:
            seen = wire.decode_event(body)
        except (msgspec.DecodeError, RecursionError):
            raise UpstreamProtocol("The upstream's answer could not be read.") from None
        if seen.error:
            raise self.failure(target, _status_of(seen.error), {}, body)
        return Whole(body, _tokens_of(seen.usage, seen.choices))

    def failure(self, target: Target, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        said = _said(body)
        return _problem(target, status, said, _retry_after_seconds(headers))

    def models_request(self, target: Target) -> Outgoing | None:
        return target.get("/models", self.headers(target))

    def models(self, body: bytes) -> dict[str, Json]:
        """Accepts `{"data": […]}`, `{"models": […]}` and a bare list (protocol reference 4.10)."""
        try:
            listed = wire.decode_json(body)
        except (msgspec.DecodeError, RecursionError):
            raise UpstreamProtocol("The list of models could not be read.") from None
        if isinstance(listed, dict):
            listed = listed.get("data") if isinstance(listed.get("data"), list) else listed.get("models")
        if not isinstance(listed, list):
            raise UpstreamProtocol("The list of models has an unknown shape.")
        found: dict[str, Json] = {}
        for one in listed:
            detail = {"id": one} if isinstance(one, str) else one
            name = detail.get("id") or detail.get("name") if isinstance(detail, dict) else None
            if isinstance(name, str) and name:
                found[name] = detail
        return found


class SameShape(Reader):
    """A stream that already speaks OpenAI: events go back as they came, and only `usage` is read from them."""

    _HANDSHAKE = frozenset({"response.created", "response.queued", "response.in_progress"})
    # What ends a stream of the APIs that send no [DONE].
    _LAST = frozenset({"response.completed", "response.incomplete", "response.failed", "speech.audio.done"})
    # One of these comes with each image: which is the last, only the end of the stream tells.
    _MAY_BE_LAST = frozenset({"image_generation.completed"})

    def __init__(self, *, drop_usage_event: bool, says_done: bool, target: Target | None = None) -> None:
        self._target = target
        self._drop_usage_event = drop_usage_event
        self._says_done = says_done
        self._parts: list[bytes] = []  # of an event that is not whole yet; joined once, when it is
        self._parts_bytes = 0
        self._tail = b""  # the last bytes of the parts: a blank line may begin in them
        self._bad_events = 0
        self._saw_reason = False
        self._saw_complete = False
        self._saw_done = False

    def feed(self, data: bytes) -> bytes:
        if self._parts and not wire.whole_events(self._tail + data):
            return self._wait_for_more(data)
        buffer = b"".join([*self._parts, data]) if self._parts else data
        cut = wire.whole_events(buffer)
        self._parts, self._parts_bytes = [], 0
        if cut < len(buffer):
            self._wait_for_more(buffer[cut:])
        if not cut:
            return b""
        whole = buffer[:cut] if cut < len(buffer) else buffer
        if self.started and not _needs_a_look(whole):
            self.events += whole.count(b"data:")
            self.content_bytes += _text_bytes(whole)
            return whole
        out: list[bytes] = []
        for one in wire.split_events(whole):
            try:
                out.append(self._look(one) or b"")
            except UpstreamFailure as problem:
                if not self.started or not any(out):
                    raise
                self.failure = problem  # how a stream was cut into reads must not decide what the client gets of it
                break
        return b"".join(out)

    def _wait_for_more(self, data: bytes) -> bytes:
        self._parts.append(data)
        self._parts_bytes += len(data)
        self._tail = (self._tail + data)[-3:] if len(self._parts) > 1 else data[-3:]
        if self._parts_bytes > wire.MOST_EVENT_BYTES:
            raise self._broken("The upstream sent an event that is too large.")
        return b""

    def end(self) -> bytes:
        if self.failure is not None:
            raise self.failure
        if self.finished:
            return b""
        last = b""
        rest, self._parts = b"".join(self._parts), []
        if rest.strip():
            last = self._look(rest + b"\n\n") or b""
        if self._saw_complete:
            self.finished = True
        if self._saw_done or (self.finished and not self._says_done):
            return last
        if self._saw_reason:  # some servers leave out [DONE]: a finish reason is as good
            self.finished = True
            return last + wire.DONE
        raise self._broken("The upstream's stream ended before it was complete.")

    def _look(self, one: bytes) -> bytes | None:
        data = wire.data_of(one)
        if not data.strip():
            return self._not_data(one)
        if data.startswith(b"[DONE]"):
            self.finished = self._saw_done = True
            return one
        try:
            seen = wire.decode_event(data)
        except (msgspec.DecodeError, RecursionError):
            lines = data.split(b"\n")
            if len(lines) > 1:  # some servers leave out the blank line between events (reference 0.4, rule 2)
                return b"".join(filter(None, (self._look(b"data: " + line + b"\n\n") for line in lines if line.strip())))
            # One odd frame is skipped; three, or nothing else, are not a stream (reference 0.4, rule 6).
            self._bad_events += 1
            if self._bad_events >= 3:
                raise self._broken("The upstream's stream could not be read.") from None
            return None
        if seen.error or seen.type == "error":
            raise self._said_error(data)
        if tokens := _tokens_of(seen.usage or (seen.response.usage if seen.response else None), seen.choices):
            self.tokens = tokens + self.tokens if self.tokens is not None and seen.type in self._MAY_BE_LAST else tokens
            if self._drop_usage_event and not seen.choices:
                return None
        if seen.type in self._LAST:
            self.finished = True
        elif seen.type in self._MAY_BE_LAST:
            self._saw_complete = True
        if _is_content(seen, self._HANDSHAKE):
            self.started = True
            self.events += 1
            self.content_bytes += _text_bytes(one)
        if seen.choices and any(choice.finish_reason for choice in seen.choices):
            self._saw_reason = True
        # A failed response is an event of its API, but what it says of the failure is the upstream's own text.
        return redact(one.decode("utf-8", "replace")).encode() if seen.type == "response.failed" else one

    def _not_data(self, one: bytes) -> bytes | None:
        """A comment goes on; a page or plain text where a stream was promised does not."""
        stripped = one.lstrip()
        if one.startswith(b"\xef\xbb\xbf"):
            return self._look(one[3:])
        if not stripped or stripped[:1] == b":" or stripped.startswith((b"event:", b"id:", b"retry:")):
            return one
        if not self.started:
            if stripped.startswith(b'{"error"'):
                raise self._said_error(stripped)
            raise UpstreamProtocol("The upstream answered with something that is not an event stream.")
        self._bad_events += 1
        return None

    def _said_error(self, data: bytes) -> UpstreamFailure:
        said = _said(data)
        if self.started:
            return UpstreamBroke(said.message or "The upstream reported an error in the middle of the stream.", code=said.code)
        return _problem(self._target, said.status or 500, said, None)

    def _broken(self, message: str) -> UpstreamFailure:
        return UpstreamBroke(message) if self.started else UpstreamProtocol(message)


# A chunk that holds none of these passes unread.
_MARKS = (b'"error"', b"[DONE]", b'"response.', b"_generation.completed", b"audio.done")
_REASON = re.compile(rb'"finish_reason"\s*:\s*"')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')  # once asked for usage, OpenAI says `"usage": null` in every event but one


def _needs_a_look(whole: bytes) -> bool:
    # An event whose data does not end as an object does was cut off in the middle: passed on, it would break the client.
    if whole.count(b"\n\n") != whole.count(b"}\n\n"):
        return True
    return any(mark in whole for mark in _MARKS) or _REASON.search(whole) is not None or _USAGE.search(whole) is not None


_CONTENT = re.compile(rb'"(?:content|text|reasoning_content|arguments|delta)"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"')


def _text_bytes(events: bytes) -> int:
    return sum(len(text) for text in _CONTENT.findall(events))


def _is_content(seen: wire.Event, handshake: frozenset[str]) -> bool:
    if seen.type is not None and seen.choices is None:
        return seen.type not in handshake
    for choice in seen.choices or ():
        if choice.text or choice.finish_reason:
            return True
        if choice.delta is not None and any(getattr(choice.delta, name) for name in choice.delta.__struct_fields__):
            return True
    return False


def _tokens_of(usage: wire.Usage | None, choices: list[wire.Choice] | None) -> Tokens | None:
    if usage is None and choices:
        usage = next((choice.usage for choice in choices if choice.usage is not None), None)
    return usage.tokens() if usage is not None else None


@dataclass(frozen=True, slots=True)
class _Said:
    """What an upstream's error body says, cleaned: one line, at most 500 characters, no secrets."""

    message: str = ""
    code: str | None = None
    type: str | None = None
    param: str | None = None
    status: int | None = None


def _said(body: bytes) -> _Said:
    """Reads `{"error": {…}}`, `{"error": "…"}`, `{"detail": …}` and `{"message": …}` (reference 1.6, 4.4, 4.10)."""
    try:
        value: Any = wire.decode_json(body)
    except (msgspec.DecodeError, RecursionError):
        return _Said()  # a page or a dump: nothing of it is shown
    if not isinstance(value, dict):
        return _Said()
    error = value.get("error") or value
    if isinstance(error, str):
        return _Said(message=clean(error), code=_word(value.get("code")), status=_number(value.get("status")))
    if not isinstance(error, dict):
        return _Said()
    message = error.get("message") or error.get("detail") or value.get("message") or value.get("detail") or ""
    if isinstance(message, list):
        message = "; ".join(str(one.get("msg", "")) for one in message if isinstance(one, dict))
    return _Said(
        message=clean(str(message)) if isinstance(message, str) else "",
        code=_word(error.get("code")),
        type=_word(error.get("type")),
        param=_word(error.get("param")),
        status=_number(error.get("status")) or _number(error.get("code")),
    )


def clean(text: str) -> str:
    """An upstream's words as they may be shown: one line, at most 500 characters, key-like parts masked."""
    if text.lstrip().startswith("<"):
        return ""
    line = " ".join(text.split())
    return redact("".join(letter for letter in line if letter.isprintable()))[:500]


def _word(value: object) -> str | None:
    """A code or a parameter's name: short and plain, or it is not passed on."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.\[\]-]{1,100}", value) else None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 400 <= value < 600 else None


def _status_of(error: object) -> int:
    """The status that an error inside a 200 stands for."""
    said = _said(wire.encode_json({"error": error}))
    by_code = {"invalid_api_key": 401, "insufficient_quota": 429, "rate_limit_exceeded": 429, "model_not_found": 404}
    return said.status or by_code.get(said.code or "", 400 if said.type == "invalid_request_error" else 500)


_TOO_LONG = ("context_length", "context length", "maximum context", "too many tokens", "context window", "prompt is too long")
_FILTERED = ("content_policy", "content policy", "content_filter", "content management policy", "moderation")
_NO_MODEL = ("model_not_found", "model not found", "does not exist", "unknown model", "no such model")
_NO_CREDIT = ("insufficient_quota", "credit_balance_exhausted", "insufficient_funds", "billing_hard_limit_reached")


def _problem(target: Target | None, status: int, said: _Said, retry_after_seconds: float | None) -> UpstreamFailure:
    callers_key = target is not None and target.callers_key
    problem = _classify(status, said, retry_after_seconds, callers_key=callers_key)
    problem.upstream_status = status
    if target is not None and callers_key:  # nobody else knows this secret, so no redactor does
        problem.message = problem.message.replace(target.secret.reveal(), "[redacted]")
    return problem


def _classify(status: int, said: _Said, retry_after_seconds: float | None, *, callers_key: bool) -> UpstreamFailure:
    text = f"{said.code or ''} {said.type or ''} {said.message}".lower()

    def mentions(words: tuple[str, ...]) -> bool:
        return any(word in text for word in words)

    if status == 401:
        if callers_key:
            return CallersKeyRefused("The upstream refused the key given in X-Upstream-Key.")
        return CredentialRefused("The upstream refused the gateway's credential.")
    if status == 402:
        return OutOfCredit(said.message or "No credit left on the upstream account.", status=402, retry_after_seconds=retry_after_seconds)
    if status == 403:
        return ForbiddenAtUpstream(said.message or "The upstream does not allow this.", code=said.code)
    if status == 404:
        return ModelGone(said.message or "The upstream does not know this model.", param="model" if mentions(_NO_MODEL) else said.param)
    if status == 408:
        return UpstreamTimeout(said.message or "The upstream timed out.")
    if status == 429:
        if mentions(_NO_CREDIT):
            return OutOfCredit(said.message or "No quota left on the upstream account.", retry_after_seconds=retry_after_seconds)
        return RateLimited(said.message or "The upstream is limiting requests.", retry_after_seconds=retry_after_seconds)
    if status in (503, 529):
        return Overloaded(said.message or "The upstream is overloaded.", retry_after_seconds=retry_after_seconds)
    if status >= 500 or status < 400:
        return UpstreamServer(said.message or f"The upstream answered {status}.")
    if mentions(_TOO_LONG) or (status == 413 and "token" in text):
        return ContextLength(said.message or "The request is longer than the model's context.", param=said.param or "messages")
    if mentions(_FILTERED):
        return ContentFiltered(said.message or "The upstream's content policy refused this.", param=said.param)
    message = said.message or f"The upstream refused the request ({status})."
    if "stream_options" in text or "include_usage" in text:
        return UsageOptionRefused(message, param=said.param, code=said.code)
    return InvalidAtUpstream(message, status=status if status in (409, 413) else 400, param=said.param, code=said.code)


def _retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """`retry-after-ms`, else `retry-after` as seconds or as a date (reference 4.3)."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        return seconds if 0 <= seconds < LONGEST_WAIT_SECONDS else None
    return _until(headers.get("retry-after", ""))


def _until(date: str) -> float | None:
    try:
        seconds = parsedate_to_datetime(date).timestamp() - time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds) if seconds < LONGEST_WAIT_SECONDS else None
