"""The values that are handed along a request's trip."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from random import getrandbits
from typing import Any, Protocol

from msgspec import Struct

from accounts.principal import Principal
from providers.adapter import Target
from providers.price import Price, Tokens
from providers.wire import Head, Json

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

# Where a server of ours puts a Line into a scope's extensions.
LINE = "sluice.line"


class Line(Protocol):
    """What our own server can do for one request beyond ASGI: the same, without a message and a coroutine for each step."""

    task: asyncio.Task[Any]  # that serves it
    fields: dict[bytes, bytes]  # the request's headers by lower-case name; a repeated one is joined with a comma

    def whole_body(self) -> bytes | None:
        """The request's body if all of it is here, to be taken once. None: `receive` it."""

    def when_client_leaves(self, do: Callable[[], None]) -> None:
        """Call this once when the client goes away before it has had its answer; at once if it has gone already."""

    def say(self, status: int, headers: Headers, body: bytes) -> bool:
        """A whole answer; `headers` say nothing of its length. False: it has to be sent as messages, which wait for a client."""

    def begin(self, status: int, headers: Headers) -> bool:
        """The head of an answer whose length nobody knows yet; it leaves with the first piece. False as above."""

    def go_on(self, body: bytes, *, more: bool) -> bool:
        """The next piece of an answer that has begun. False as above."""


# Of the request that this task, or a thread that works for it, is about: for the log.
current_request: ContextVar[str] = ContextVar("current_request", default="")


def new_request_id() -> str:
    """A UUIDv7: its first 48 bits are milliseconds since the epoch, which are also the `at` of the usage row.

    The rest must be unlike any other's and need not be a secret, so it comes from memory (seeded by the system, anew after a
    fork): a call to the system for each request would give the interpreter's lock away."""
    at, chance = time.time_ns() // 1_000_000, getrandbits(74)
    return "%08x-%04x-7%03x-%04x-%012x" % (  # noqa: UP031 half the time of an f-string
        at >> 16,
        at & 0xFFFF,
        chance & 0xFFF,
        0x8000 | chance >> 12 & 0x3FFF,
        chance >> 26,
    )


def milliseconds_of(request_id: str) -> int:
    """When the request arrived: milliseconds since the epoch."""
    return int(request_id[:8] + request_id[9:13], 16)


class Incoming(Struct):
    """A request's head: its body has not been read yet."""

    id: str
    method: str
    path: str
    headers: dict[bytes, bytes]
    address: str  # of the client, as far as trusted proxies tell
    receive: Receive
    line: Line | None = None  # where the server is ours
    task: asyncio.Task[Any] | None = None  # that serves it
    callers_key: str = ""  # `X-Upstream-Key`
    seed_errors: bool = False  # `X-Error-Format: seed`
    body_read: bool = False
    at_ms: int = 0  # since the epoch: what the id says
    at: float = 0.0  # the same in seconds

    def __post_init__(self) -> None:
        self.at_ms = milliseconds_of(self.id)
        self.at = self.at_ms / 1000


class Room(Struct, frozen=True):
    """What is left of a limit per minute, right after a request was let in."""

    limit: int
    remaining: int
    reset_seconds: float  # until all of it is free again


class Granted(Struct, frozen=True):
    """What the limits said of a request: the tightest of those on requests and on tokens, where there are any."""

    shadowed: tuple[str, ...] = ()  # the codes that shadow limits would have refused with
    requests: Room | None = None
    tokens: Room | None = None


FREE = Granted()


class Asked(Struct):
    """A request's body, read: the few fields we act on, and all of it as it came."""

    endpoint: str
    head: Head
    body: Json
    size: int  # bytes on the wire
    model: str
    stream: bool


class Admission(Struct, frozen=True):
    """A place that has been paid for, and must be settled exactly once."""

    request_id: str
    at_ms: int
    principal: Principal
    endpoint: str
    model: str  # as the client named it
    stream: bool
    input_estimate: int  # tokens
    started: float  # monotonic, for durations


class Tried(Struct, frozen=True, omit_defaults=True):
    """An attempt that was not the last: with which account, what came of it, and why another was made."""

    credential: int
    provider: str
    error: str  # our code of its failure
    then: str  # "next": the next account's turn; "renewed": the same with a renewed sign-in; "without X": the same, without that option
    status: int = 0  # as the upstream said; 0 = it said none
    duration_ms: int = 0


class Outcome(Struct):
    """What became of the call so far. The trip fills it; `meter` turns it into the record."""

    target: Target | None = None
    price: Price | None = None
    attempts: int = 0
    status: int = 500
    error: str = ""
    tokens: Tokens | None = None  # as the upstream counted
    output_estimate: int = 0  # tokens, judged by what passed
    reached: bool = False  # an upstream has the request and may bill it
    first_byte: float | None = None  # monotonic
    read_at: float = 0.0  # monotonic: the body had come
    sent: float = 0.0  # monotonic: this attempt's turn to the upstream began
    heard: float = 0.0  # monotonic: and was over; 0 = it is still the upstream's turn
    waited: float = 0.0  # seconds that earlier attempts took
    failed: tuple[str, int] | None = None  # the last attempt: our code of its failure, and the status that the upstream said, or 0
    without: str = ""  # the option that the next attempt leaves out
    tried: tuple[Tried, ...] = ()  # the attempts before this one
    complete: bool = False  # the stream's own last event has passed: who leaves now has got everything
    granted: Granted = FREE

    def begin(self, target: Target, price: Price | None) -> None:
        """A new attempt: what the one before left behind is forgotten."""
        if self.attempts:
            now = time.monotonic()
            if self.target is not None and self.failed is not None:
                self.tried += (self._tried(self.target, *self.failed, target, now),)
            self.waited, self.sent, self.heard = self.waited_until(now), 0.0, 0.0
        self.target, self.price = target, price
        self.attempts += 1
        self.tokens, self.output_estimate, self.reached, self.first_byte, self.complete = None, 0, False, None, False
        self.failed = None

    def _tried(self, before: Target, error: str, status: int, after: Target, now: float) -> Tried:
        then, self.without = f"without {self.without}" if self.without else "renewed", ""
        is_same = (before.credential_id, before.model) == (after.credential_id, after.model)
        return Tried(
            credential=before.credential_id,
            provider=before.kind,
            error=error[:100],
            then=then if is_same else "next",
            status=status,
            duration_ms=max(0, round(self._upstreams_until(now) * 1000)),
        )

    def waited_until(self, now: float) -> float:
        """Seconds that were the upstreams' so far: the rest is what we have added ourselves."""
        return self.waited + self._upstreams_until(now)

    def _upstreams_until(self, now: float) -> float:
        """Of this attempt; none where its request could not be made."""
        return (self.heard or now) - self.sent if self.sent else 0.0
