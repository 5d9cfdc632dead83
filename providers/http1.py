"""HTTP/1.1 as a client speaks it, on one connection: a request's bytes, and the answer as it arrives.

    Connection   the socket's side: writes a request, feeds what comes to the parser, holds the peer back
    Http1Answer  the reader's side: waits for the head, then for the body

A connection carries one exchange at a time. When the last byte of an answer has come and nothing speaks against it, it
goes back to its home at once, while the reader may still be busy with what has been buffered.
"""

from __future__ import annotations

import asyncio
import re
from functools import lru_cache
from typing import Protocol, cast

import httptools
import httpx

from providers.decoding import Body, decoder_for
from providers.exchange import Outgoing, Place, Watch

MOST_HEAD_BYTES = 64 << 10
MOST_FIELDS = 200
# A client that does not read keeps what one read brought, up to here twice, and as much again that is on its way to it.
READ_BYTES = 32 << 10
# What one answer may hold before its peer is held back; it is let go on when the reader has taken all of it and wants more.
PAUSE_ABOVE_BYTES = 32 << 10
# A body this small goes out in one piece with its head.
_SMALL_BYTES = 64 << 10

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_LENGTH = b"Content-Length: "
_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
_PATH = re.compile(r"/[\x21-\x22\x24-\x7e]*")
_FIELDS = re.compile(r"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t\x20-\x7e\x80-\xff]*\r\n)*")
# How a message is framed, and for whom it is, is ours to say.
_OURS = frozenset({"host", "content-length", "transfer-encoding", "connection", "te", "trailer", "upgrade", "expect"})


def request_head(call: Outgoing) -> bytes:
    """The request line and headers. Raises httpx.LocalProtocolError for what could be read as more than they say."""
    head = _checked_head(call.method, call.path, call.place.host_header, tuple(call.headers.items()), call.id)
    return b"%b%d\r\n\r\n" % (head, len(call.body)) if call.body or call.method in _WITH_BODY else head[: -len(_LENGTH)] + b"\r\n"


def _checked_head(method: str, path: str, host: str, headers: tuple[tuple[str, str], ...], call_id: str) -> bytes:
    """All of it but what differs from one call to the next is checked and put together once."""
    head, end = _constant_head(method, path, host, headers)
    if not call_id:
        return head + end
    if not _ID.fullmatch(call_id):
        raise httpx.LocalProtocolError("A header has a letter that no header can carry.")
    return b"%bX-Request-ID: %b\r\n%b" % (head, call_id.encode("ascii"), end)


@lru_cache(maxsize=512)
def _constant_head(method: str, path: str, host: str, headers: tuple[tuple[str, str], ...]) -> tuple[bytes, bytes]:
    if method not in _METHODS or not _PATH.fullmatch(path):
        raise httpx.LocalProtocolError("The request line would not be one: its method or path cannot be sent.")
    fields = "".join([f"{name}: {value}\r\n" for name, value in headers])
    if not _FIELDS.fullmatch(fields) or fields.count("\n") != len(headers):
        raise httpx.LocalProtocolError("A header has a letter that no header can carry.")
    if not _OURS.isdisjoint(name.lower() for name, _ in headers):
        raise httpx.LocalProtocolError("A header was given that is the transport's own to say.")
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{fields}".encode("latin-1"), _LENGTH


class Home(Protocol):
    """Where a connection belongs."""

    def welcome(self, connection: Connection) -> None:
        """It is free for another exchange."""

    def forget(self, connection: Connection) -> None:
        """It is gone."""


class NotHttp(Exception):
    """Raised inside the parser's callbacks, to stop it."""


class Connection(asyncio.BufferedProtocol):
    """One connection to a place. Whoever has taken it has it alone.

    `room` is where a read puts its bytes; they are copied out of it before the next one. All connections of one event loop
    may share it, those of two never: a sweep in a thread of its own would write into what a client's stream has just read."""

    def __init__(self, place: Place, home: Home, room: memoryview) -> None:
        self.place = place
        self._room = room
        self.free_since = 0.0  # monotonic
        self.touched = False  # a byte of the present answer has come
        self._home = home
        self._transport: asyncio.Transport | None = None
        # Parts of a body by the last read. The parser puts them there itself: it calls `on_body` for every chunk.
        self._received: list[bytes] = []
        self.on_body = self._received.append
        self._parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self._answer: Http1Answer | None = None
        self._paused = False
        self._begin()

    @property
    def lost(self) -> bool:
        return self._transport is None

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, head: bytes, body: bytes, watch: Watch) -> Http1Answer:
        """Send a request and wait for the head of its answer. Raises httpx.TransportError; then the connection is gone."""
        self._begin()
        if self._transport is None or self._transport.is_closing():
            raise httpx.ReadError("The connection was lost.")
        self._answer = answer = Http1Answer(self, watch, self._loop)
        if len(body) <= _SMALL_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        try:
            await answer.head()
        except BaseException:
            await answer.close()
            raise
        return answer

    def abort(self) -> None:
        """End it at once, with whatever is under way."""
        self._answer = None
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """End it in good order: for one that is free."""
        if self._transport is not None:
            self._transport.close()

    # The socket's events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, size: int) -> None:
        self.data_received(self._room[:size])

    def data_received(self, data: bytes | memoryview) -> None:
        answer = self._answer
        if answer is None:
            return self.abort()  # nobody asked: it is out of step, and what it says next could be taken for an answer
        self.touched = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._out_of_step = True
        if self._received:
            if answer.take(self._received) > PAUSE_ABOVE_BYTES and not self._paused:
                assert self._transport is not None
                self._paused = True
                self._transport.pause_reading()
            self._received.clear()
            self._head_bytes = 0
        else:
            self._head_bytes += len(data)  # a line without an end, in a head or behind a body, never reaches `on_header`
            self._out_of_step = self._out_of_step or self._head_bytes > MOST_HEAD_BYTES
        if self._complete:
            return self._finish(answer)
        if self._out_of_step:
            answer.fail(httpx.RemoteProtocolError("The answer is not HTTP, or its head is too large."))
            return self.abort()
        answer.wake()

    def eof_received(self) -> None:
        answer = self._answer
        if answer is not None and answer.status and self._until_close:
            self._finish(answer)

    def connection_lost(self, problem: Exception | None) -> None:
        self._transport = None
        del self._parser  # it holds our methods: the two would wait for the garbage collector
        self._home.forget(self)
        answer, self._answer = self._answer, None
        if answer is None:
            return
        if problem is not None:
            answer.fail(httpx.ReadError("The connection was lost."))
        else:
            answer.fail(httpx.RemoteProtocolError("The connection was closed before the answer was complete."))

    # The parser's events

    def on_message_begin(self) -> None:
        if self._complete:
            raise NotHttp  # bytes after the answer

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields_seen += 1
        if self._fields_seen > MOST_FIELDS:
            raise NotHttp
        answer = self._answer
        if answer is None or answer.status:
            return  # a trailer
        name, fields = name.lower(), answer.fields
        fields[name] = fields[name] + b", " + value if name in fields else value

    def on_headers_complete(self) -> None:
        answer = self._answer
        assert answer is not None
        status = self._parser.get_status_code()
        if status < 200:
            self._fields_seen += 1  # so that their number has an end, too
            if status == 101 or self._fields_seen > MOST_FIELDS:  # nobody asked for another protocol
                raise NotHttp
            self._interim = True
            answer.fields.clear()
            return
        fields = answer.fields
        if self._head_bytes > MOST_HEAD_BYTES - READ_BYTES and sum(map(len, fields)) + sum(map(len, fields.values())) > MOST_HEAD_BYTES:
            raise NotHttp  # its last read brought some of the body, too, and so was not counted
        coding = fields.get(b"transfer-encoding")
        if coding is not None and coding.strip().lower() != b"chunked":
            raise NotHttp
        self._keep_alive = self._parser.should_keep_alive()
        self._until_close = coding is None and b"content-length" not in fields
        answer.status = status

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        else:
            self._complete = True

    # Between the two

    def resume(self) -> None:
        """The reader has made room."""
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def _begin(self) -> None:
        self._head_bytes = self._fields_seen = 0
        self.touched = self._interim = self._complete = self._out_of_step = self._until_close = self._keep_alive = False

    def _finish(self, answer: Http1Answer) -> None:
        """The answer is whole. The connection lives on if both sides are exactly at the end of a message."""
        self._answer = None
        answer.end()
        transport = self._transport
        assert transport is not None
        # A request that was answered before all of it was sent leaves the peer in the middle of it.
        if not self._keep_alive or self._out_of_step or transport.is_closing() or transport.get_write_buffer_size():
            return self.abort()
        self.resume()
        self._home.welcome(self)


class Http1Answer(Body):
    """One answer, from its first byte to its last. See `exchange.Answer`."""

    __slots__ = ("_connection", "_ended", "_loop", "_parts", "_problem", "_size", "_waiter", "_watch", "fields", "status")

    def __init__(self, connection: Connection, watch: Watch, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.status = 0  # until the head is complete
        self.fields: dict[bytes, bytes] = {}
        self._connection: Connection | None = connection  # while it is this answer's
        self._watch = watch
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = False
        self._problem: httpx.TransportError | None = None
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None

    # For the connection

    def take(self, parts: list[bytes]) -> int:
        """Parts of the body. The bytes that wait to be read."""
        self._parts += parts
        self._size += sum(map(len, parts))
        return self._size

    def end(self) -> None:
        self._ended, self._connection = True, None
        self.wake()

    def fail(self, problem: httpx.TransportError) -> None:
        """What came before still counts; after it this is raised."""
        self._problem = problem
        self.end()

    def wake(self) -> None:
        """Something has come that a reader may wait for."""
        waiter = self._waiter
        if waiter is not None and (self._parts or self._ended or self.status) and not waiter.done():
            waiter.set_result(None)

    # For the reader

    async def head(self) -> None:
        """Wait for it. Raises httpx.TransportError."""
        while not (self.status or self._ended):
            await self._news()
        if not self.status:
            raise self._problem or httpx.RemoteProtocolError("The answer has no head.")
        self._decoder = decoder_for(self.fields[b"content-encoding"].decode("latin-1")) if b"content-encoding" in self.fields else None

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode("latin-1"): value.decode("latin-1").strip() for name, value in self.fields.items()}

    @property
    def content_type(self) -> str:
        return self.fields.get(b"content-type", b"").decode("latin-1")

    @property
    def is_over(self) -> bool:
        return self._ended

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        self._parts.clear()
        if connection is not None:
            connection.abort()

    async def read(self, limit: int) -> bytes:
        if self._ended and self._decoder is None and self._problem is None and self._size <= limit:
            return await self.arrived()  # all of it is here: the usual case of a small answer
        return await super().read(limit)

    async def arrived(self) -> bytes:
        """Raises httpx.TransportError."""
        if not self._parts and not self._ended:
            if self._connection is not None:
                self._connection.resume()
            self._watch.waiting()
            while not self._parts and not self._ended:  # news without a byte of the body buys the peer no time
                await self._news()
            self._watch.busy()
        if not self._parts:
            if self._problem is not None:
                raise self._problem
            return b""
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        return data

    async def _news(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
