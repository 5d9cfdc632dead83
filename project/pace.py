"""How many requests one turn of the event loop may begin, while more come than the processor can serve.

A turn serves all that has come since the last one. Where that is too much, each turn is longer than the one before, until all
places are taken and everybody waits. From then on a turn begins only as many requests as it has time for and tells the others
at once that there is no room, which costs a small part of an answer. It is over when for half of a while nothing had come: the
loop has caught up.
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
WHILE_SECONDS = 0.05


class Pace:
    """Of one event loop. `begun` requests since the last turn, of `most`; `refused`: those that found no room."""

    __slots__ = ("_idle_seconds", "_looks", "_since", "begun", "most", "refused")

    def __init__(self) -> None:
        self.begun = self.refused = 0
        self.most = UNLIMITED
        self._looks = False
        self._since = self._idle_seconds = 0.0  # of this while

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """A request begins."""
        self.begun += 1
        if not self._looks:
            self._looks = True
            loop.call_soon(self._turn, loop)

    def refuse(self) -> None:
        """A request has been told that there is no room."""
        self.refused += 1

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """What has begun gets its turn now."""
        begun, self.begun, self.refused = self.begun, 0, 0
        if begun >= LEAST or self.most < UNLIMITED:
            loop.call_soon(self._look, loop, begun, time.monotonic())
        else:
            self._looks = False

    def _look(self, loop: asyncio.AbstractEventLoop, begun: int, at: float) -> None:
        """It has had its turn, and what came meanwhile has been read."""
        now = time.monotonic()
        took = max(now - at, 1e-6)
        if self.most == UNLIMITED:
            if took >= LONG_SECONDS and self.refused:
                self._in_force(begun, took)
                self._since, self._idle_seconds = now, 0.0
        else:
            if begun >= LEAST:  # fewer tell little of what one costs
                self._in_force(begun, took)
            if not (self.begun or self.refused):
                self._idle_seconds += took
            if now - self._since >= WHILE_SECONDS:
                if self._idle_seconds >= (now - self._since) / 2:
                    self.most = UNLIMITED
                self._since, self._idle_seconds = now, 0.0
        # While it is in force each turn is looked at: the loop does not wait, so that a turn in which nothing comes can be told.
        if self.begun or self.most < UNLIMITED:
            self._turn(loop)
        else:
            self._looks = False

    def _in_force(self, begun: int, took: float) -> None:
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
