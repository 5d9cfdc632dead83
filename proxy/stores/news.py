"""News for other processes, told through Redis: best effort, since each finds out by itself a little later, or can do without."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from proxy.stores.link import Link, pack

SNAPSHOT = b"snapshot"
ANSWER_SECONDS = 0.25
UP_SECONDS = 0.5
PING_SECONDS = 10.0  # a connection on which nothing comes may be dead
SILENT_SECONDS = 5.0  # after a failure: whoever changes many rows must not wait for each


class News:
    """For processes without an event loop; see `link.py` for those with one."""

    def __init__(self, url: str, channel: str) -> None:
        # Here, because most commands and a gateway without Redis have nothing to tell: to load it is a tenth of their start.
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._failures = (redis.RedisError, OSError)
        self._redis = redis.Redis.from_url(
            url, socket_timeout=ANSWER_SECONDS, socket_connect_timeout=ANSWER_SECONDS, retry=Retry(NoBackoff(), 1)
        )
        self._channel = channel
        self._silent_until = 0.0

    def tell(self, what: bytes) -> None:
        if time.monotonic() < self._silent_until:
            return
        try:
            self._redis.publish(self._channel, what)
        except self._failures:
            self._silent_until = time.monotonic() + SILENT_SECONDS


class Subscription:
    """What is published on a channel, for as long as anybody listens. On an event loop."""

    def __init__(self, url: str, channel: str, heard: Callable[[bytes], None]) -> None:
        self._url, self._channel, self._heard = url, channel, heard
        self._listeners = 0
        self._link: Link | None = None
        self._pinging: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """One more listens. The first waits a moment for Redis; when it is away, news come as soon as it is back."""
        self._listeners += 1
        if self._listeners > 1:
            return
        up = asyncio.Event()
        self._link = link = Link(
            self._url, channel=self._channel, scripts=(), on_up=up.set, on_news=self._heard, on_failed=lambda told: None
        )
        link.open()
        self._pinging = asyncio.create_task(self._ping(link))
        with suppress(TimeoutError):
            await asyncio.wait_for(up.wait(), UP_SECONDS)

    def leave(self) -> None:
        """One less. The last hangs up."""
        self._listeners -= 1
        if self._listeners or self._link is None or self._pinging is None:
            return
        self._pinging.cancel()
        self._link.hang_up()
        self._link = self._pinging = None

    async def _ping(self, link: Link) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            if link.is_up:
                link.tell(pack((b"PING",)), None)


def channel_of(name: str = "sluice") -> str:
    return f"{{{name}}}:news"


def usage_channel_of(name: str = "sluice") -> str:
    """Where workers say whose usage they have stored: for pages that are open."""
    return f"{{{name}}}:usage"


@lru_cache(maxsize=4)
def of(url: str) -> News:
    return News(url, channel_of())
