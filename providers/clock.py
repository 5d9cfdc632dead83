"""How long everything may take: the ladder of timeouts, and the clock that watches one attempt."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, fields
from itertools import pairwise
from types import TracebackType
from typing import Any, Self


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


class Overseer:
    """Looks at all clocks that run, several times within the shortest of their times, and only while there are any.

    A timer of its own for each call would cost more than all else that a clock does."""

    def __init__(self, timeouts: Timeouts) -> None:
        self.timeouts = timeouts
        self.clocks: set[Clock] = set()
        shortest = min(timeouts.first_byte_seconds, timeouts.idle_seconds, timeouts.total_seconds)
        self._every_seconds = max(0.005, min(0.5, shortest / 50))
        self._timer: asyncio.TimerHandle | None = None

    def add(self, clock: Clock) -> None:
        self.clocks.add(clock)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._every_seconds, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        for clock in [clock for clock in self.clocks if clock.deadline <= now]:
            clock.ring()
        self._timer = asyncio.get_running_loop().call_later(self._every_seconds, self._look) if self.clocks else None


class Clock:
    """Watches one attempt: `with` it raises TimeoutError when the upstream is late.

    Late is: no head of an answer within `first_byte_seconds`, silence of `idle_seconds` while we wait for more, or the
    end of the whole call. To move the deadline is to write an attribute. It does to its task what asyncio.timeout() does.
    """

    __slots__ = ("_cancelling", "_late", "_overseer", "_task", "_total_at", "deadline")

    def __init__(self, overseer: Overseer, total_at: float, task: asyncio.Task[Any] | None = None) -> None:
        """`total_at`: the end of the whole call, monotonic. `task`: the one that runs, where it is at hand."""
        task = task or asyncio.current_task()
        assert task is not None
        self._task = task
        self._overseer = overseer
        self._total_at = total_at
        first_byte_at = time.monotonic() + overseer.timeouts.first_byte_seconds
        self.deadline = total_at if total_at < first_byte_at else first_byte_at

    def __enter__(self) -> Self:
        self._cancelling, self._late = self._task.cancelling(), False
        self._overseer.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self._overseer.clocks.discard(self)
        if self._late and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            # Nobody else wanted it cancelled.
            raise TimeoutError from problem

    def waiting(self) -> None:
        """The upstream's turn: it may be silent for so long."""
        idle_at = time.monotonic() + self._overseer.timeouts.idle_seconds
        self.deadline = idle_at if idle_at < self._total_at else self._total_at

    def busy(self) -> None:
        """Our turn, or the client's: only the total counts."""
        self.deadline = self._total_at

    def served(self) -> None:
        """The call has come to its good end: nothing that is late from now on is its failure."""
        self._overseer.clocks.discard(self)

    def ring(self) -> None:
        """It is late: what is under way is cancelled."""
        self._overseer.clocks.discard(self)
        self._late = True
        self._task.cancel()
