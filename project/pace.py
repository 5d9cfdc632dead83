"""How many requests one turn of the event loop may begin, while more come than the processor can serve.

A turn serves all that has come since the last one. Where that is too much, each turn is longer than the one before, until all
places are taken and everybody waits. From then on a turn begins only as many requests as it has time for and tells the others
at once that there is no room, which costs a small part of an answer, until nobody has to be told so any more.
"""

from __future__ import annotations

import asyncio
import time

import httptools

UNLIMITED = 1 << 62
# Where places run out and turns are shorter, they are held by calls that wait for upstreams: then places are all that is short.
LONG_SECONDS = 0.1
# How long a turn is to be meanwhile. Few requests at a time are served faster than many: they share the processor's caches.
WANTED_SECONDS = 0.01
LEAST = 8
OVER_SECONDS = 0.5


class Pace:
    __slots__ = ("_refused_at", "_turns", "begun", "most")

    def __init__(self) -> None:
        self.begun = 0  # requests, in this turn
        self.most = UNLIMITED
        self._refused_at = 0.0  # monotonic
        self._turns = False

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """A request begins."""
        self.begun += 1
        if not self._turns:
            self._turns = True
            loop.call_soon(self._turn, loop)

    def is_full(self) -> bool:
        """Whether this turn begins no more. Cheap to ask only where `begun` has reached `most`."""
        if self.begun < self.most:
            return False
        if time.monotonic() - self._refused_at <= OVER_SECONDS:
            return True
        self.most = UNLIMITED
        return False

    def refuse(self) -> None:
        """A request has been told that there is no room."""
        self._refused_at = time.monotonic()

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """What has begun gets its turn now."""
        begun, self.begun, self._turns = self.begun, 0, False
        if begun >= LEAST:
            loop.call_soon(self._look, begun, time.monotonic())

    def _look(self, begun: int, at: float) -> None:
        """It has had its turn, and what came meanwhile has been read."""
        took = max(time.monotonic() - at, 1e-6)
        if self.most < UNLIMITED or took >= LONG_SECONDS:
            self.most = max(LEAST, int(begun * WANTED_SECONDS / took))


class WholeCalls:
    """Tells of what was read whether it is one call from its first byte to its last, which may be answered unread."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._begun = self._whole = 0

    def is_one(self, data: bytes) -> bool:
        self._begun = self._whole = 0
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._begun = 0
        if self._begun == self._whole == 1:
            return True
        self._parser = httptools.HttpRequestParser(self)  # this one is in the middle of something
        return False

    def on_message_begin(self) -> None:
        self._begun += 1

    def on_message_complete(self) -> None:
        parser = self._parser
        self._whole += parser.get_method() == b"POST" and parser.get_http_version() == "1.1" and parser.should_keep_alive()
