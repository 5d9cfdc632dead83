"""How long everything may take: the ladder of timeouts, and the clock that watches one attempt."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields
from itertools import pairwise
from types import TracebackType
from typing import Self


@dataclass(frozen=True, slots=True)
class Timeouts:
    """All in seconds. The first four rise strictly, so that each can fire before the one around it."""

    pool_wait_seconds: float = 2
    connect_seconds: float = 5
    first_byte_seconds: float = 600
    total_seconds: float = 1800
    idle_seconds: float = 300
    heartbeat_seconds: float = 15
    drain_seconds: float = 120

    def __post_init__(self) -> None:
        ladder = [field.name for field in fields(self)][:4]
        for inner, outer in pairwise(ladder):
            if not getattr(self, inner) < getattr(self, outer):
                raise ValueError(f"{inner} must be less than {outer}.")
        if not self.heartbeat_seconds < self.idle_seconds < self.total_seconds:
            raise ValueError("heartbeat_seconds, idle_seconds and total_seconds must rise in this order.")


class Clock:
    """Watches one attempt: `async with` it raises TimeoutError when the upstream is late.

    Late is: no head of an answer within `first_byte_seconds`, silence of `idle_seconds` while we wait for more, or the
    end of the whole call. To move the deadline is to write an attribute: there is one timer, which looks at the deadline
    when it goes off and sleeps on if that has moved away.
    """

    __slots__ = ("_alarm_at", "_deadline", "_idle_seconds", "_limit", "_loop", "_timer", "_total_at")

    def __init__(self, timeouts: Timeouts, total_at: float) -> None:
        """`total_at`: the end of the whole call, in the loop's time."""
        self._loop = asyncio.get_running_loop()
        self._idle_seconds = timeouts.idle_seconds
        self._total_at = total_at
        self._deadline = self._alarm_at = min(total_at, self._loop.time() + timeouts.first_byte_seconds)
        self._limit = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        await self._limit.__aenter__()
        self._timer = self._loop.call_at(self._alarm_at, self._look)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self._timer.cancel()
        await self._limit.__aexit__(kind, problem, trace)

    def waiting(self) -> None:
        """The upstream's turn: it may be silent for so long."""
        self._deadline = min(self._total_at, self._loop.time() + self._idle_seconds)
        if self._deadline < self._alarm_at:
            self._timer.cancel()
            self._set_alarm()

    def busy(self) -> None:
        """Our turn, or the client's: only the total counts."""
        self._deadline = self._total_at

    def _set_alarm(self) -> None:
        self._alarm_at = self._deadline
        self._timer = self._loop.call_at(self._alarm_at, self._look)

    def _look(self) -> None:
        if self._loop.time() < self._deadline:
            return self._set_alarm()
        self._limit.reschedule(self._loop.time())
