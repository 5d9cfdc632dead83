"""One connection to Redis for one event loop: what is asked in one tick of the loop leaves in one write.

Written for few calls, since every request passes here twice. It speaks RESP3, so that news of other processes come on the
same connection. It never waits by itself: who asks gets a future, and whoever only tells gets nothing.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import hiredis

log = logging.getLogger(__name__)

ANSWER_SECONDS = 0.25  # a request waits no longer than this
SETUP_SECONDS = 2.0
DEAD_SECONDS = 20.0  # nothing for so long: the connection is given up
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 0.5
LOOK_SECONDS = 0.05
SILENT_SECONDS = 5.0
STEADY_SECONDS = 2.0  # a connection that lived for so long was a good one

pack: Callable[[tuple[Any, ...]], bytes] = hiredis.pack_command
Waiting = tuple[float, asyncio.Future[Any] | None, Any]  # since when; who waits for it; or what was told


class Away(Exception):
    """Redis cannot be reached, answers too late, or says that it cannot do its work now."""


class Link(asyncio.Protocol):
    """Connects, and connects again, until it is closed.

    `on_up` is called with each new connection, before anybody else may use it; `on_news` with what was published; `on_failed` with
    what was told and is not known to have been done, in its order: it comes before all that is told later."""

    def __init__(
        self,
        url: str,
        *,
        channel: str,
        scripts: tuple[bytes, ...],
        on_up: Callable[[], None],
        on_news: Callable[[bytes], None],
        on_failed: Callable[[list[Any]], None],
    ) -> None:
        self.run_id = b""  # of the server: another one after a restart
        self._url, self._channel, self._scripts = url, channel, scripts
        self._on_up, self._on_news, self._on_failed = on_up, on_news, on_failed
        self._transport: asyncio.Transport | None = None
        self._usable = False
        self._late = False
        self._silent_until = 0.0
        self._out: list[bytes] = []
        self._now = 0.0
        self._waiting: deque[Waiting] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._lost = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """May be asked now. False while an answer is overdue: who would ask then would only wait, too."""
        return self._usable and not self._late

    def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._keeper = self._loop.create_task(self._keep())

    async def close(self) -> None:
        """Waits a moment for what has been told to arrive."""
        if self._keeper is None:
            return  # it was never opened
        deadline = self._loop.time() + ANSWER_SECONDS
        while self._waiting and self.is_up and self._loop.time() < deadline:  # noqa: ASYNC110 once in a life
            await asyncio.sleep(0.005)
        keeper = self._keeper
        self.hang_up()
        with suppress(asyncio.CancelledError):
            await keeper

    def hang_up(self) -> None:
        """At once, whatever is under way."""
        if self._keeper is not None:
            self._keeper.cancel()
            self._keeper = None
            self._drop()

    # Asking

    def ask(self, command: bytes) -> asyncio.Future[Any]:
        """The answer, as soon as it is there. Raises Away, now or when it does not come in time."""
        if not self.is_up:
            raise Away("Redis is away.")
        future: asyncio.Future[Any] = self._loop.create_future()
        self._write(command, future, None)
        return future

    def tell(self, command: bytes, what: Any) -> None:
        """Nobody waits for the answer. To be called while it is up; `what` comes back to `on_failed` unless it is known to be done."""
        self._write(command, None, what)

    def _write(self, command: bytes, future: asyncio.Future[Any] | None, what: Any) -> None:
        if not self._out:
            self._now = self._loop.time()
            self._loop.call_soon(self._flush)
            if self._timer is None:
                self._timer = self._loop.call_later(LOOK_SECONDS, self._look)
        self._out.append(command)
        self._waiting.append((self._now, future, what))

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None and out:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))

    # Answers

    def data_received(self, data: bytes) -> None:
        reader, waiting = self._reader, self._waiting
        reader.feed(data)
        while self._transport is not None and (answer := reader.gets()) is not False:
            if type(answer) is hiredis.PushNotification:
                if answer[0] == b"message":
                    self._on_news(answer[2])
                continue
            if not waiting:
                continue
            _, future, what = waiting.popleft()
            if isinstance(answer, hiredis.ReplyError):
                self._refused(answer, future, what)
            elif future is not None and not future.done():
                future.set_result(answer)
        if self._late and (not waiting or self._loop.time() - waiting[0][0] < ANSWER_SECONDS):
            self._late = False
            self._up_again()

    def _up_again(self) -> None:
        if self._usable:
            log.info("Redis answers again")
            self._on_up()

    def _refused(self, answer: hiredis.ReplyError, future: asyncio.Future[Any] | None, what: Any) -> None:
        """It runs and does not work: it loads, is a replica, has no memory left, has forgotten our scripts."""
        if self._loop.time() >= self._silent_until:  # each request may hear of it
            self._silent_until = self._loop.time() + SILENT_SECONDS
            log.warning("Redis refuses: %s", str(answer)[:200])
        if future is not None and not future.done():
            future.set_exception(Away(str(answer)[:200]))
        if what is not None:
            # All that was told after it comes back, too, so that it is done in its order.
            self._waiting.appendleft((0.0, None, what))
        if what is not None or str(answer).startswith(("NOSCRIPT", "READONLY", "LOADING", "MASTERDOWN", "NOAUTH")):
            self._drop()

    def _look(self) -> None:
        """Whoever waits for too long need not wait on."""
        self._timer = None
        if not self._waiting:
            return None
        now = self._loop.time()
        oldest = now - self._waiting[0][0]
        if oldest >= DEAD_SECONDS:
            return self._drop()
        if oldest >= ANSWER_SECONDS:
            if self._usable and not self._late:
                log.warning("Redis has not answered for %g s: going on without it until it does", ANSWER_SECONDS)
            self._late = True
            for since, future, _ in self._waiting:
                if now - since < ANSWER_SECONDS:
                    break
                if future is not None and not future.done():
                    future.set_exception(Away("Redis does not answer."))
        self._timer = self._loop.call_later(LOOK_SECONDS, self._look)

    # The connection

    async def _keep(self) -> None:
        pause = SHORTEST_PAUSE_SECONDS
        was_up = True  # so that the first failure is said
        while True:
            try:
                await asyncio.wait_for(self._connect(), SETUP_SECONDS)
                began, was_up = self._loop.time(), True
                self._on_up()
                await self._lost.wait()
                log.warning("The connection to Redis is lost")
                if self._loop.time() - began > STEADY_SECONDS:
                    pause = SHORTEST_PAUSE_SECONDS
            except (OSError, TimeoutError, Away, hiredis.ProtocolError) as problem:
                self._drop()
                if was_up:
                    log.warning("Redis is away: %s", problem or type(problem).__name__)
                was_up = False
            except Exception:
                # Whatever it is, without this task nobody would ever try again.
                log.exception("The connection to Redis failed")
                self._drop()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _connect(self) -> None:
        from redis.connection import SSLConnection, UnixDomainSocketConnection, parse_url  # see news.py

        given: dict[str, Any] = parse_url(self._url)  # type: ignore[no-untyped-call]
        kind = given.get("connection_class")
        self._reader = hiredis.Reader()
        self._lost.clear()
        if kind is UnixDomainSocketConnection:
            await self._loop.create_unix_connection(lambda: self, given["path"])
        else:
            context = _tls(given) if kind is SSLConnection else None
            await self._loop.create_connection(lambda: self, given.get("host", "localhost"), given.get("port", 6379), ssl=context)
        hello: tuple[Any, ...] = ("HELLO", 3)
        if given.get("password"):
            hello += ("AUTH", given.get("username") or "default", given["password"])
        await self._first(*hello)
        if given.get("db"):
            await self._first("SELECT", given["db"])
        for script in self._scripts:
            await self._first("SCRIPT", "LOAD", script)
        about = await self._first("INFO", "server")
        self.run_id = next((line[7:].strip() for line in bytes(about).splitlines() if line.startswith(b"run_id:")), b"")
        self._transport.write(pack(("SUBSCRIBE", self._channel)))  # type: ignore[union-attr]
        await self._first("PING")
        self._usable, self._late = True, False

    async def _first(self, *words: Any) -> Any:
        future: asyncio.Future[Any] = self._loop.create_future()
        self._write(pack(words), future, None)
        return await future

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop()

    def _drop(self) -> None:
        """The connection is of no use any more. What waits for an answer will get none."""
        self._usable = self._late = False
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        self._out.clear()
        waiting, self._waiting = self._waiting, deque()
        told = [what for _, _, what in waiting if what is not None]
        if told:
            self._on_failed(told)
        for _, future, _ in waiting:
            if future is not None and not future.done():
                future.set_exception(Away("The connection to Redis is lost."))
        self._lost.set()


def _tls(given: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=given.get("ssl_ca_certs"))
    if given.get("ssl_cert_reqs") in ("none", ssl.CERT_NONE):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
