"""The values that are handed along a request's trip."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from accounts.principal import Principal
from providers.adapter import Target
from providers.price import Price, Tokens
from providers.wire import Head, Json

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def new_request_id() -> str:
    """A UUIDv7: its first 48 bits are milliseconds since the epoch, which are also the `at` of the usage row."""
    number = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10), "big")
    digits = f"{number & ~_FIXED_BITS | _VERSION_7:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


_FIXED_BITS = 0xF << 76 | 0x3 << 62
_VERSION_7 = 0x7 << 76 | 0x2 << 62


def milliseconds_of(request_id: str) -> int:
    """When the request arrived: milliseconds since the epoch."""
    return int(request_id[:8] + request_id[9:13], 16)


@dataclass(slots=True)
class Incoming:
    """A request's head: its body has not been read yet."""

    id: str
    method: str
    path: str
    headers: dict[bytes, bytes]
    address: str  # of the client, as far as trusted proxies tell
    receive: Receive
    callers_key: str = ""  # `X-Upstream-Key`
    seed_errors: bool = False  # `X-Error-Format: seed`
    body_read: bool = False

    @property
    def at(self) -> float:
        """Seconds since the epoch, to the millisecond."""
        return milliseconds_of(self.id) / 1000


@dataclass(slots=True)
class Asked:
    """A request's body, read: the few fields we act on, and all of it as it came."""

    endpoint: str
    head: Head
    body: Json
    size: int  # bytes on the wire
    model: str
    stream: bool


@dataclass(frozen=True, slots=True)
class Admission:
    """A place that has been paid for, and must be settled exactly once."""

    request_id: str
    principal: Principal
    endpoint: str
    model: str  # as the client named it
    stream: bool
    input_estimate: int  # tokens
    started: float  # monotonic, for durations


@dataclass(slots=True)
class Outcome:
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
    client_left: bool = False
    complete: bool = False  # the stream's own last event has passed: who leaves now has got everything
    shadowed: tuple[str, ...] = field(default_factory=tuple)

    def begin(self, target: Target, price: Price | None) -> None:
        """A new attempt: what the one before left behind is forgotten."""
        self.target, self.price = target, price
        self.attempts += 1
        self.tokens, self.output_estimate, self.reached, self.first_byte, self.complete = None, 0, False, None, False
