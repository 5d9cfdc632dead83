"""Keys that the catalog does not have: newer than it, or nobody's. The database is asked once for all calls with one of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from accounts.principal import Principal

KEPT_SECONDS = 2.0  # since it was asked: as old as the catalog may be
MOST_KEPT = 10_000

Found = asyncio.Task[Principal | None]


class Lookups:
    """A `Loader` over another, `ask`, which knows how to ask and may raise Unavailable: that is told, and not kept."""

    def __init__(self, ask: Callable[[Sequence[bytes]], Coroutine[Any, Any, Principal | None]]) -> None:
        self._ask = ask
        self._kept: dict[bytes, tuple[float, Found]] = {}  # until when, in monotonic seconds

    async def __call__(self, digests: Sequence[bytes]) -> Principal | None:
        if not digests:
            return None
        now = time.monotonic()
        until, found = self._kept.get(digests[0], (0.0, None))
        if found is None or (found.done() and until <= now):
            if len(self._kept) >= MOST_KEPT:
                self._make_room(now)
            found = asyncio.create_task(self._ask(digests))
            self._kept[digests[0]] = (now + KEPT_SECONDS, found)
            found.add_done_callback(partial(self._forget_failure, digests[0]))
        return await asyncio.shield(found)  # who leaves does not take it from the others

    def _forget_failure(self, digest: bytes, found: Found) -> None:
        if (found.cancelled() or found.exception()) and self._kept.get(digest, (0.0, None))[1] is found:
            del self._kept[digest]

    def _make_room(self, now: float) -> None:
        self._kept = {digest: kept for digest, kept in self._kept.items() if kept[0] > now}
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
