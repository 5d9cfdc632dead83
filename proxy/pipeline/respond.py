"""All that is said to the client, errors included, even when the status line is already out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable

from providers.adapter import Reader
from providers.secrets import redact
from providers.wire import ApiError, Json, encode_json, event
from proxy.call import Granted, Headers, Line, Message, Room, Send
from proxy.errors import WrongMethod

HEARTBEAT = b": keep-alive\n\n"
# Handshake events are held until content comes, so that another target can still be tried; no more than this.
MOST_HELD_BYTES = 256 << 10

_OF_REQUESTS = (b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests")
_OF_TOKENS = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")
_OF_STREAMS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
Wait = Callable[[], Awaitable[None]]


class Reply:
    """One answer. Knows what has been said already, so that whatever happens is said in the right form."""

    def __init__(self, send: Send, request_id: str, cors: Headers, *, line: Line | None = None, seed_errors: bool = False) -> None:
        self._send = send
        self._line = line
        self._headers: Headers = [(b"x-request-id", request_id.encode()), *cors]
        self._seed_errors = seed_errors
        self.started = False
        self.content_sent = False
        self.finished = False
        self.mute = False
        self._sending = False
        self._heartbeat: asyncio.TimerHandle | None = None
        self._beat_task: asyncio.Task[None] | None = None

    def is_awaited(self) -> bool:
        """Whether there is still something to be said."""
        return not self.finished

    def silence(self) -> None:
        """Nobody listens any more: whatever is said from now on is dropped, and nothing waits for it to be taken."""
        self.quiet()
        self.mute, self._send, self._line = True, _drop, None

    def rates(self, granted: Granted) -> None:
        """From now on every answer says what is left of the caller's limits per minute."""
        if granted.requests is not None:
            self._headers += _said_of(_OF_REQUESTS, granted.requests)
        if granted.tokens is not None:
            self._headers += _said_of(_OF_TOKENS, granted.tokens)

    async def whole(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Headers | None = None,
        *,
        before_closing: Wait | None = None,
    ) -> None:
        """A whole answer. With `before_closing` the connection is closed after it, once that has been awaited."""
        self.quiet()
        if not content_type.isprintable():
            content_type = "application/octet-stream"  # an upstream's word, which must not begin a header of its own
        head = [(b"content-type", content_type.encode("latin-1", "replace")), *self._headers]
        if headers:
            head += headers
        self.started = self.content_sent = True
        if self._line is None or before_closing is not None or not self._line.say(status, head, body):
            head.append((b"content-length", b"%d" % len(body)))
            if before_closing is not None:
                head.append((b"connection", b"close"))
            await self._send({"type": "http.response.start", "status": status, "headers": head})
            await self._send({"type": "http.response.body", "body": body, "more_body": before_closing is not None})
            if before_closing is not None:
                await before_closing()
                await self._send({"type": "http.response.body", "body": b""})
        self.finished = True

    async def json(self, value: object, *, before_closing: Wait | None = None) -> None:
        await self.whole(200, encode_json(value), before_closing=before_closing)

    async def error(self, problem: ApiError, *, before_closing: Wait | None = None, cut: bool = False) -> None:
        """An error object; inside a stream that has begun it is the last event, and no [DONE] follows. With `cut` the answer
        gets no end: who raises next has the connection closed."""
        self.quiet()
        if self.finished:
            return
        if self.started:
            await self._body(event(_said(problem)), more=cut)
            self.finished = True
            return
        body = _said(problem)
        if self._seed_errors:
            body = {"error": problem.code or problem.type, "message": body["error"]["message"]}
        await self.whole(problem.status, encode_json(body), headers=_error_headers(problem), before_closing=before_closing)

    async def events(self, data: bytes) -> None:
        """Whole events of a stream; the status line goes out with the first."""
        self.content_sent = True
        if not self.started:
            await self._begin()
        await self._body(data, more=True)

    async def end(self, data: bytes) -> None:
        """The last events of a stream, where any are left, and its end."""
        self.content_sent = self.content_sent or bool(data)
        self.quiet()
        await self._begin()
        await self._body(data, more=False)
        self.finished = True

    def keep_alive(self, interval_seconds: float) -> None:
        """From now on send a comment whenever the stream has been silent for so long."""
        loop = asyncio.get_running_loop()
        self._last = loop.time()
        self._interval = interval_seconds
        self._heartbeat = loop.call_later(interval_seconds, self._beat)

    def quiet(self) -> None:
        """No more heartbeats."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            self._heartbeat = None

    def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        silence = loop.time() - self._last
        if silence >= self._interval and not self._sending:
            self._beat_task = loop.create_task(self._comment())
            silence = 0.0
        self._heartbeat = loop.call_later(max(self._interval - silence, 0.001), self._beat)

    async def _comment(self) -> None:
        if self._heartbeat is None:
            return  # the last event came before this task had its turn
        await self._begin()
        await self._body(HEARTBEAT, more=True)

    async def _begin(self) -> None:
        if self.started:
            return
        self.started = True
        head = [*_OF_STREAMS, *self._headers]
        if self._line is None or not self._line.begin(200, head):
            await self._send({"type": "http.response.start", "status": 200, "headers": head})

    async def _body(self, data: bytes, *, more: bool) -> None:
        if self._heartbeat is not None:
            self._last = asyncio.get_running_loop().time()
        if self._line is not None and self._line.go_on(data, more=more):
            return
        self._sending = True
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
        finally:
            self._sending = False


async def stream(reply: Reply, chunks: AsyncIterator[bytes], reader: Reader) -> None:
    """Hand a stream on, event by event, up to its last event: what the upstream does after that concerns no client.

    Raises UpstreamFailure, before or after content has been sent."""
    held = b""
    async for chunk in chunks:
        events = reader.feed(chunk)
        if reader.finished and reader.failure is None:
            held += events
            break
        if events and (reader.started or len(held) + len(events) > MOST_HELD_BYTES):
            await reply.events(held + events if held else events)
            held = b""
        else:
            held += events
        if reader.failure is not None:
            raise reader.failure
    await reply.end(held + reader.end())


async def _drop(message: Message) -> None:
    pass


def _said(problem: ApiError) -> Json:
    """The error object. What a client or an upstream said may be quoted in it, and a secret with it: that stays out."""
    body = problem.body()
    body["error"]["message"] = redact(body["error"]["message"])
    return body


def _said_of(names: tuple[bytes, bytes, bytes], room: Room) -> Headers:
    limit, remaining, reset = names
    return [(limit, b"%d" % room.limit), (remaining, b"%d" % room.remaining), (reset, _duration(room.reset_seconds))]


def _duration(seconds: float) -> bytes:
    """As OpenAI writes it: 350ms, 12.5s, 1m0s."""
    if seconds < 1:
        return b"%dms" % math.ceil(seconds * 1000)
    minutes, rest = divmod(math.ceil(seconds * 10) / 10, 60)
    return (f"{minutes:g}m" if minutes else "").encode() + f"{rest:g}s".encode()


def _error_headers(problem: ApiError) -> Headers:
    headers: Headers = []
    if problem.retry_after_seconds is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(problem.retry_after_seconds))).encode()))
    if problem.should_retry is not None:
        headers.append((b"x-should-retry", b"true" if problem.should_retry else b"false"))
    if isinstance(problem, WrongMethod):
        headers.append((b"allow", problem.allow.encode()))
    if problem.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="sluice"'))
    return headers
