"""What an upstream is to the rest of Sluice: a Target to call, and an Adapter that speaks its language.

An adapter translates between OpenAI's shapes and one provider's. It does no I/O and holds no state of a request;
what a stream needs to remember lives in the reader that `reader()` makes for that stream.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from typing import Any, ClassVar

import msgspec
from msgspec import Struct, field

from providers import wire
from providers.exchange import Outgoing, Transport, place_of
from providers.failures import UpstreamBroke, UpstreamFailure, UpstreamProtocol
from providers.oauth import Lease, SignIn, TokenSet
from providers.price import Rates, Tokens
from providers.said import failure_of_said, said_in, status_of, wait_seconds_in, without_callers_key, words_for
from providers.secrets import SecretText, redact
from providers.wire import Json

USER_AGENT = "sluice/0.1"
MOST_CHOICES = 128  # that are told apart in one stream: OpenAI's own limit of `n`


class Target(Struct, frozen=True):
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
    lease: Lease | None = None  # the secret is an access token, which can be renewed
    detail: Mapping[str, Any] = field(default_factory=dict)  # the plain facts of this model in the upstream's own list; empty: not listed

    def get(self, path: str, headers: Mapping[str, str]) -> Outgoing:
        """A request to `path` below the base URL. Raises UpstreamUnreachable where that is no address."""
        return self._outgoing("GET", path, headers, b"")

    def post(self, path: str, headers: Mapping[str, str], body: bytes, request_id: str = "") -> Outgoing:
        """With `request_id` the upstream is told it, as X-Request-ID."""
        return self._outgoing("POST", path, headers, body, request_id)

    def _outgoing(self, method: str, path: str, headers: Mapping[str, str], body: bytes, request_id: str = "") -> Outgoing:
        settings = self.settings
        place, prefix = place_of(
            self.base_url,
            self.credential_id,
            settings.get("ca_pem", ""),
            settings.get("proxy_url", ""),
            http2=bool(settings.get("http2")),
        )
        return Outgoing(method, place, prefix + path, headers, body, request_id)


class Ask(Struct):
    """What one client wants, as its adapter sees it. `body` is the decoded request; adapters copy before they change."""

    endpoint: str  # "chat/completions"
    body: Json
    stream: bool
    request_id: str
    client_wants_usage: bool = False
    add_usage_option: bool = True  # False once this upstream has refused `stream_options`
    left_out: set[str] = field(default_factory=set)  # what this upstream refused as OptionRefused: it is asked again without it
    # What earlier calls found out about this account (a project's id); kept as long as the process lives. Adapters may add to it.
    learned: dict[str, str] = field(default_factory=dict)
    # What the client sent of the headers that the adapter `reads`, by lower-case name.
    headers: Mapping[str, str] = field(default_factory=dict)


class Adapter:
    """Translates between OpenAI's shapes and one provider's. Holds no state of a request."""

    name: ClassVar[str]
    title: ClassVar[str] = ""
    base_url: ClassVar[str]
    # allowed, restricted or ended; all but the first need the operator's acknowledgment. Where that is said, and what it means.
    policy: ClassVar[str] = "allowed"
    policy_source: ClassVar[str] = ""
    policy_note: ClassVar[str] = ""
    free: ClassVar[bool] = False  # its models get the explicit price 0 when a credential is added
    needs_secret: ClassVar[bool] = True
    counts_tokens: ClassVar[bool] = True  # False: no answer of it says how many, so that every row is an estimate
    # The settings it understands beside those that every kind has.
    settings: ClassVar[frozenset[str]] = frozenset()
    endpoints: ClassVar[frozenset[str]] = frozenset({"chat/completions"})
    # The client's own headers that it wants to see, by lower-case name. One that carries a key is never among them.
    reads: ClassVar[frozenset[str]] = frozenset()
    # An adapter that needs no network answers through a transport of its own.
    transport: Transport | None = None

    def request(self, ask: Ask, target: Target) -> Outgoing:
        raise NotImplementedError

    def first_calls(self, ask: Ask, target: Target) -> FirstCalls | None:
        """The calls that must come before the call, if any: yields each, is sent its whole answer, and returns the call itself.

        It may yield a Pause instead of a call. Raises UpstreamFailure. None: `request` alone will do."""
        return None

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

    def price_of(self, detail: Json) -> Rates | None:
        """What the upstream's own list says that a model costs, where it does."""
        return None

    def quota_request(self, target: Target) -> Outgoing | None:
        """The call that tells what is left of the account's allowance, where there is one."""
        return None

    def quota(self, body: bytes) -> dict[str, Json]:
        """Name of a window -> `{"used", "limit", "resets_at", "unit"}` as far as the upstream says: numbers, a time as ISO 8601 with its
        zone, a currency where it is money. Raises UpstreamProtocol."""
        return {}

    def sign_in(self, settings: Mapping[str, str]) -> SignIn | None:
        """How an account signs in (OAuth); None where it has a plain secret. Raises ValueError for settings that are missing."""
        return None

    def tokens_from(self, given: str) -> TokenSet | None:
        """The tokens in a credential file of the vendor's own tool. None where it is none. Raises ValueError in words."""
        return None

    def facts_from(self, reply: Json) -> dict[str, str]:
        """What a token endpoint's reply says of the account, to be kept and merged into `target.settings`."""
        return {}

    def policy_for(self, settings: Mapping[str, object]) -> str:
        """The policy of an account with these settings: `policy`, unless the vendor's terms differ between ways to sign in."""
        return self.policy

    def setting_from(self, name: str, given: str) -> str:
        """What is kept of one of its own settings. Raises ValueError, in words, for one that cannot be right."""
        return given

    def base_url_from(self, given: str) -> str:
        """What is kept of a base URL, which has been checked to be one."""
        return given.rstrip("/")

    def secret_from(self, given: str) -> str:
        """What is kept of a secret. Raises ValueError, in words, for one that cannot be right."""
        secret = given.strip()
        if not secret.isprintable() or not secret.isascii():
            raise ValueError("A secret is one line of plain characters: this one has a line break or a letter that no header can carry.")
        return secret


class Whole(Struct, frozen=True):
    """A whole answer: bytes for the client, and what the upstream counted (None where it did not say)."""

    body: bytes
    tokens: Tokens | None
    content_type: str = "application/json"
    output_estimate: int | None = None  # tokens, where something better is known than the size of the body

    def estimated_output(self) -> int:
        """Output tokens, for a row whose upstream counted nothing."""
        return self.output_estimate if self.output_estimate is not None else len(self.body) // 4


class Heard(Struct, frozen=True):
    """The whole answer to a first call, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Pause(Struct, frozen=True):
    """Yielded between first calls: go on after so many seconds. Nothing is sent back for it."""

    seconds: float


FirstCalls = Generator[Outgoing | Pause, Heard, Outgoing]


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
        body = {**ask.body, "model": target.model}
        if self._adds_usage(ask):
            body["stream_options"] = {**(ask.body.get("stream_options") or {}), "include_usage": True}
        return target.post(f"/{ask.endpoint}", headers, wire.encode_json(body), ask.request_id)

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
            raise self.failure(target, status_of(seen.error), {}, body)
        return Whole(body, _tokens_of(seen.usage, seen.choices))

    def failure(self, target: Target, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        said = said_in(body)
        return failure_of_said(target, status, said, wait_seconds_in(headers))

    def models_request(self, target: Target) -> Outgoing | None:
        return target.get("/models", self.headers(target))

    def models(self, body: bytes) -> dict[str, Json]:
        """Accepts `{"data": […]}`, `{"models": […]}` and a bare list (protocol reference 4.10)."""
        try:
            listed = wire.decode_answer(body)
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
    # Whether content events may go on unread, once one was looked at. False where an upstream's events need mending.
    passes_unread: ClassVar[bool] = True
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
        self._begun: set[int] = set()  # the choices that said something, by the hash of their index
        self._ended: set[int] = set()  # and those with a finish reason
        self._saw_complete = False
        self._saw_done = False
        self._shape: Shape | None = None  # of the content event looked at last

    def feed(self, data: bytes) -> bytes:
        if not self._parts and self._shape is not None and data.endswith(b"\n\n"):
            events, end = self._shape.run(data)
            if end == len(data):
                self._pass(events, end)
                return data
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
        out: list[bytes] = []
        at = 0
        while at < len(whole) and not self.finished:
            if self._shape is not None:
                events, end = self._shape.run(whole, at)
                if events:
                    self._pass(events, end - at)
                    out.append(whole[at:end])
                    at = end
                    continue
            one = wire.first_event(whole, at)
            at += len(one)
            try:
                out.append(self._look(one) or b"")
            except UpstreamFailure as problem:
                if not self.started or not any(out):
                    raise
                self.failure = problem  # how a stream was cut into reads must not decide what the client gets of it
                break
        return b"".join(out)

    def _pass(self, events: int, size: int) -> None:
        """Count content events like the one looked at last, of so many bytes together: they need no look of their own."""
        assert self._shape is not None
        self.events += events
        self.content_bytes += size - events * self._shape.frame_bytes

    def _unsaid(self) -> bytes:
        """What a subclass has kept for the end of a stream that is complete."""
        return b""

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
        if self._saw_reason and len(self._ended) >= len(self._begun):  # some servers leave out [DONE]: each choice's reason is as good
            self.finished = True
            return last + self._unsaid() + wire.DONE
        raise self._broken("The upstream's stream ended before it was complete.")

    def _look(self, one: bytes) -> bytes | None:
        data = wire.data_of(one)
        if not data.strip():
            return self._not_data(one)
        if data.startswith(b"[DONE]"):
            self.finished = self._saw_done = True
            return self._unsaid() + one
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
            self.events += not _is_reason_alone(seen)
            shape, text_bytes = shape_of(one, seen)
            self.content_bytes += text_bytes
            if shape is not None and self.passes_unread:
                self._shape = shape
        for choice in seen.choices or ():
            self._saw_reason = self._saw_reason or bool(choice.finish_reason)
            known = self._ended if choice.finish_reason else self._begun
            if len(known) < MOST_CHOICES:
                known.add(hash(choice.index))
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
        said = words_for(self._target, said_in(data))
        if self.started:
            message = without_callers_key(self._target, said.message)
            return UpstreamBroke(message or "The upstream reported an error in the middle of the stream.", code=said.code)
        return failure_of_said(self._target, said.status or 500, said, None)

    def _broken(self, message: str) -> UpstreamFailure:
        return UpstreamBroke(message) if self.started else UpstreamProtocol(message)


class Shape:
    """What all content events of a stream have in common: everything but the text.

    Such events are known by a few searches in each, at the speed of memory; one that says anything else (a reason, usage, an error)
    has another frame and is looked at."""

    __slots__ = ("_before", "_behind", "frame_bytes")

    def __init__(self, before: bytes, behind: bytes) -> None:
        self._before, self._behind = before, behind
        self.frame_bytes = len(before) + len(behind)

    def run(self, whole: bytes, at: int = 0) -> tuple[int, int]:
        """How many events of this shape stand together from `at` on, and where the last of them ends."""
        before, behind, length = self._before, self._behind, len(self._before)
        # A line may end in CR as well: such an event is looked at.
        odd = whole.find(b"\r", at)
        most = odd if odd >= 0 else len(whole)
        events, end = 0, at
        while whole.startswith(before, end):
            # JSON has no line breaks within a string: the first one ends the event, and a second follows it.
            after = whole.find(b"\n", end + length) + 2
            if after > most or not whole.endswith(behind, end + length, after):
                break
            events += 1
            end = after
        return events, end


_CONTENT = re.compile(rb'"(?:content|text|reasoning_content|reasoning|arguments|delta)"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"')


def shape_of(one: bytes, seen: wire.Event) -> tuple[Shape | None, int]:
    """The shape of a content event, where it has one that others can be known by; and the bytes of its text."""
    texts = list(_CONTENT.finditer(one))
    text_bytes = sum(len(text[1]) for text in texts)
    choices = seen.choices
    plain = choices is None or (len(choices) == 1 and choices[0].finish_reason is None)
    if len(texts) != 1 or not plain or seen.usage is not None or not one.endswith(b"}\n\n") or b"\r" in one:
        return None, text_bytes
    before, behind = one[: texts[0].start(1)], one[texts[0].end(1) :]
    return Shape(before, behind), text_bytes


def _is_content(seen: wire.Event, handshake: frozenset[str]) -> bool:
    if seen.type is not None and seen.choices is None:
        return seen.type not in handshake
    return any(choice.text or choice.finish_reason or _says(choice.delta) for choice in seen.choices or ())


def _is_reason_alone(seen: wire.Event) -> bool:
    """Whether it says why the stream ends and nothing else: no upstream bills a token for that."""
    return bool(seen.choices) and not any(choice.text or _says(choice.delta) for choice in seen.choices or ())


def _says(delta: wire.Delta | None) -> bool:
    return delta is not None and any(getattr(delta, name) for name in delta.__struct_fields__)


def _tokens_of(usage: wire.Usage | None, choices: list[wire.Choice] | None) -> Tokens | None:
    if usage is None and choices:
        usage = next((choice.usage for choice in choices if choice.usage is not None), None)
    return usage.tokens() if usage is not None else None
