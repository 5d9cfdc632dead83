"""The guard at the socket: uvicorn's protocol, with the deadlines, limits and framing rules that it leaves to others.

One `Guard` holds the limits of a process and looks after all its connections, about once a second: a request needs no
timer of its own, only a note of when it began. Each connection is a `GuardedProtocol`, which refuses what it should not
serve in OpenAI's shape, before the application hears of it.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import logging
import re
import struct
import termios
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from project.exchange import Answered, Exchange, KeptRefusal, ServerFailed, UnusualExchange, error_answer
from project.pace import Pace, WholeCalls
from providers.wire import ApiError
from proxy.call import Scope
from proxy.errors import GatewayError, InvalidRequest, TooLarge, Unavailable
from proxy.http import header_dict

log = logging.getLogger(__name__)

MOST_HEAD_BYTES = 32 << 10
MOST_FIELDS = 100
MOST_URL_BYTES = 8 << 10
UNLIMITED = 1 << 62
LEAST_BODY_BYTES_PER_SECOND = 64 << 10
# A client may send its next requests before it has its answer. So many wait; more are not worth the memory.
MOST_PIPELINED = 16

# More than this on its way to a client makes the application wait.
MOST_WAITING_BYTES = 32 << 10

# After a refusal the client may still be sending. Closing at once would reset the connection, and the answer might be lost.
LINGER_SECONDS = 1.0
MOST_DISCARDED_BYTES = 1 << 20

# Who watches must see that it is full.
WATCHED = frozenset({b"/healthz", b"/readyz", b"/metrics"})
# Header fields that say how to read the request: each may come once.
DECISIVE = frozenset({b"host", b"expect", b"transfer-encoding", b"content-length"})
CONTINUE = b"100-continue"
HOST = re.compile(rb"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")

# What a connection is doing on its way in.
OPENED, IDLE, HEAD, BODY, READ, REFUSED = range(6)


class BadFraming(InvalidRequest):
    code = "invalid_http"


class TooSlow(GatewayError):
    status = 408
    code = "request_timeout"


class UrlTooLong(GatewayError):
    status = 414
    code = "url_too_long"


class UnknownExpectation(GatewayError):
    status = 417
    code = "unknown_expectation"


class HeadTooLarge(GatewayError):
    status = 431
    code = "headers_too_large"


class Busy(Unavailable):
    code = "too_many_requests_open"


class UnknownVersion(GatewayError):
    status = 505
    code = "unknown_http_version"


class _Nowhere(list[tuple[bytes, bytes]]):
    """Takes header fields and keeps none."""

    def append(self, field: tuple[bytes, bytes]) -> None:
        pass


NOWHERE = _Nowhere()
FULL = Busy("The gateway has too many requests open. Try again shortly.", retry_after_seconds=1)
TOLD_FULL = KeptRefusal(FULL)
ANSWERED = Answered()


class Refused(Exception):
    """Thrown through the parser, which stops reading there."""

    def __init__(self, problem: ApiError) -> None:
        super().__init__(problem.message)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds, sizes in bytes."""

    head_seconds: float = 10
    body_idle_seconds: float = 15
    body_slow_seconds: float = 60
    keep_alive_seconds: float = 75
    reader_seconds: float = 60
    body_bytes: int = 2_621_440  # where the application sets no limit of its own
    open_requests: int = 1000
    connections: int = 10_000

    @property
    def websockets(self) -> int:
        """They are requests that stay open for as long as a page is looked at: most of the room is for others."""
        return max(1, self.open_requests // 4)

    @property
    def look_every_seconds(self) -> float:
        shortest = min(self.head_seconds, self.body_idle_seconds, self.body_slow_seconds, self.keep_alive_seconds, self.reader_seconds)
        return max(0.05, min(1.0, shortest / 10))


class Guard:
    """What the connections of one process share. `limits_bodies` tells for which requests the application itself does so, and
    `count_refused` is told the status and code of what the application never hears of.

    `websocket` makes the protocol that goes on after a handshake; `upgrades` tells which requests may be one. Without it, and
    for all other requests, an offer to upgrade is ignored."""

    def __init__(
        self,
        limits: Limits,
        *,
        limits_bodies: Callable[[Scope], bool],
        websocket: Callable[..., Any] | None = None,
        upgrades: Callable[[Scope], bool] = lambda scope: True,
        count_refused: Callable[[int, str], None] = lambda status, code: None,
    ) -> None:
        self.limits = limits
        self.limits_bodies = limits_bodies
        self.websocket = websocket
        self.upgrades = upgrades
        self.count_refused = count_refused
        self.websockets: set[Any] = set()  # those that are open
        self.draining = False
        self.pace, self.calls = Pace(), WholeCalls()
        self.was_taken: Callable[[], None] = _nothing  # told of each new connection
        # The loop's clock, as of the last look: a request that asks for the time often would pay for it.
        self.now = 0.0
        self._look_at = 0.0

    def protocol(self, config: Config, server_state: ServerState, app_state: dict[str, Any], **options: Any) -> GuardedProtocol:
        """A connection's protocol, called as uvicorn calls its own."""
        return GuardedProtocol(self, config, server_state, app_state, **options)

    def look_after(self, connections: Iterable[Any], now: float) -> None:
        """To be called a few times a second with the loop's time. Connections are looked at about once a second."""
        self.now = now
        if now < self._look_at:
            return
        self._look_at = now + self.limits.look_every_seconds
        for connection in list(connections):
            connection.look(now)


class GuardedProtocol(HttpToolsProtocol):
    def __init__(self, guard: Guard, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.guard = guard
        self.phase = OPENED
        self.reading: Exchange  # the request that came last
        self.since = self.guard.now  # of this phase; of the last bytes, while a body is read
        self.running: Exchange | None = None  # the request being answered
        self.waiting: deque[Exchange] = deque()  # those behind it
        self.surplus = False  # a connection too many: it is told so
        self.refusal: ApiError | None = None  # waits for the answers before it
        self.read_bytes = 0  # by the last read
        self.head_bytes = 0  # by reads before the last one
        self.framing_bytes = 0  # read since the last piece of a body
        self.body_of_offer = b""  # how the body of a request is framed that offers to upgrade
        self.websocket: Any = None  # takes over behind this head
        self.body_since = 0.0
        self.body_bytes = 0
        self.most_body_bytes = UNLIMITED
        self.unsent_bytes = 0  # when we looked last, since a reader has made us wait
        self.progress_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.transport.set_write_buffer_limits(high=MOST_WAITING_BYTES)
        most = self.guard.limits.connections
        self.surplus = len(self.connections) > most
        if len(self.connections) > 2 * most:
            self.transport.close()  # and not even that can be afforded
        self.guard.was_taken()

    # Bytes in

    def data_received(self, data: bytes) -> None:
        if self.phase == REFUSED:
            return self._discard(len(data))
        pace = self.guard.pace
        if pace.begun >= pace.most and self._is_told_full(data):
            return None
        while True:
            self.read_bytes = len(data)
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
                if self.websocket is not None:
                    return self._hand_over(data)
                # Nobody has to upgrade, and we do not: what follows is the body that belongs to the offer, or the next request.
                if self.body_of_offer:
                    self._read_body_of_offer()
                if data:
                    continue
            except httptools.HttpParserError as problem:
                return self._refuse(_why(problem))
            break
        if self.phase == HEAD:
            self.head_bytes += self.read_bytes
            if self.head_bytes > MOST_HEAD_BYTES:
                self._refuse(_too_large(self.url))
        elif self.phase == BODY:
            self.since = self.guard.now
            self.framing_bytes += self.read_bytes
            if self.framing_bytes > MOST_HEAD_BYTES:
                self._refuse(BadFraming("The body has chunk extensions or trailers without end."))

    def on_message_begin(self) -> None:
        if self.phase != OPENED:
            self.since = self.guard.now
        # Behind another request in the same read: how much of that read is ours is not known, so it counts for nothing.
        self.head_bytes = 0 if self.phase <= IDLE else -self.read_bytes
        self.phase = HEAD
        self.url = b""
        self.headers = []
        self.body_bytes, self.most_body_bytes = 0, UNLIMITED

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        headers, parser, guard = self.headers, self.parser, self.guard
        if len(headers) > MOST_FIELDS or self.head_bytes + self.read_bytes > MOST_HEAD_BYTES or len(self.url) > MOST_URL_BYTES:
            self._check_size()
        fields = dict(headers)
        if len(fields) != len(headers):
            self._check_repeated()
        if b"_" in b"".join(fields):
            # Programs behind us may read an underscore as a hyphen, and so take a made-up field for one of ours.
            headers = [field for field in headers if b"_" not in field[0]]
        version = parser.get_http_version()
        target, host = self.url, fields.get(b"host", b"")
        if target[:1] != b"/" or b"#" in target:
            target = _without_origin(target, host)
        usual = version == "1.1" and b"expect" not in fields and _is_host(host)
        if not usual:
            _check_unusual(version, fields)
        if b"transfer-encoding" in fields:
            _check_coding(version, fields)
        method = parser.get_method().decode("ascii")
        if method == "CONNECT":
            # The parser takes all that follows for the tunnel's, and so would take a body for the next request.
            raise Refused(BadFraming("No tunnel begins here."))
        raw_path, _, query = target.partition(b"?")
        pace = guard.pace
        crowded = pace.begun >= pace.most or len(self.tasks) >= guard.limits.open_requests or self.surplus or self.waiting
        if crowded and self._turns_away(raw_path, fields, usual=usual):
            return
        pace.begin(self.loop)
        path = raw_path.decode("ascii")
        scope: Any = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "method": method,
            "root_path": "",
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": headers,
            "state": self.app_state.copy() if self.app_state else {},
        }
        if (b"content-length" in fields or b"transfer-encoding" in fields) and not guard.limits_bodies(scope):
            self._check_body_size(fields.get(b"content-length", b"0"))
        offers = b"upgrade" in fields and parser.should_upgrade()
        if offers and guard.websocket is not None and _is_handshake(scope, fields) and guard.upgrades(scope) and self.running is None:
            self._check_room_for_websocket()
            self.websocket = guard.websocket(guard, scope, self.config, self.server_state, self.app_state)
            return
        make = Exchange if usual else UnusualExchange
        exchange = make(
            self,
            scope,
            fields if headers is self.headers and len(fields) == len(headers) else header_dict(headers),
            keep_alive=version == "1.1" and not guard.draining and parser.should_keep_alive(),
            expects_continue=b"expect" in fields and version == "1.1",
        )
        self.body_of_offer = _framing(fields) if offers else b""
        self._read_body_of(exchange)
        if self.running is None:
            self._start(exchange)
        else:
            self.flow.pause_reading()
            self.waiting.append(exchange)

    def _read_body_of(self, exchange: Exchange) -> None:
        self.reading = exchange
        # What follows a body (a trailer) must not change what was said before it.
        self.headers = NOWHERE
        self.body_since, self.framing_bytes = self.since, -self.read_bytes
        self.phase = BODY

    def on_body(self, body: bytes) -> None:
        exchange = self.reading
        self.body_bytes += len(body)
        self.framing_bytes = -self.read_bytes
        if self.body_bytes > self.most_body_bytes:
            raise Refused(TooLarge(f"The body is larger than {self.most_body_bytes} bytes."))
        if exchange.response_complete:
            return
        exchange.body = exchange.body + body if exchange.body else body
        if len(exchange.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        exchange.wake()

    def on_message_complete(self) -> None:
        if self.body_of_offer or self.websocket is not None:
            return  # says the parser, which leaves that body out
        exchange = self.reading
        if exchange.response_complete:
            self.phase, self.since = IDLE, self.guard.now
            self.read_bytes = 0  # what stands behind it in this read counts for nothing
            return
        self.phase = READ
        exchange.more_body = False
        exchange.wake()

    def _read_body_of_offer(self) -> None:
        """The parser takes what follows an offer to upgrade for another protocol. A fresh one, told only how the body is framed,
        reads it, and all that comes after."""
        self.parser = httptools.HttpRequestParser(_Onward(self))
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + self.body_of_offer + b"\r\n\r\n")
        self.body_of_offer = b""

    def _hand_over(self, rest: bytes) -> None:
        self.connections.discard(self)
        self.websocket.take_over(self.transport, rest)

    # What is checked before the application hears of a request; each raises Refused

    def _check_size(self) -> None:
        if len(self.headers) > MOST_FIELDS:
            raise Refused(HeadTooLarge(f"The request has more than {MOST_FIELDS} header fields."))
        # The last read may hold some of the body too, so only what is kept of it is counted.
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MOST_HEAD_BYTES or len(self.url) > MOST_URL_BYTES:
            raise Refused(_too_large(self.url))

    def _check_repeated(self) -> None:
        decisive = [name for name, _ in self.headers if name in DECISIVE]
        for name in decisive:
            if decisive.count(name) > 1:
                raise Refused(BadFraming(f"The header field {name.decode()} came twice."))

    def _check_body_size(self, announced: bytes) -> None:
        self.most_body_bytes = self.guard.limits.body_bytes
        if int(announced) > self.most_body_bytes:
            raise Refused(TooLarge(f"The body is larger than {self.most_body_bytes} bytes."))

    def _turns_away(self, path: bytes, fields: dict[bytes, bytes], *, usual: bool) -> bool:
        """Whether there is no room for it and it has been told so, for a tenth of what an answer costs. Others are refused as any mistake
        is, by closing the connection, which costs four times as much, and as much again when the client comes with the next one."""
        if len(self.waiting) >= MOST_PIPELINED:
            raise Refused(Busy("Too many requests wait on this connection: send the next after an answer.", retry_after_seconds=1))
        pace = self.guard.pace
        full = pace.begun >= pace.most or len(self.tasks) >= self.guard.limits.open_requests or self.surplus
        if not full or path in WATCHED:
            return False
        pace.refuse()
        idle = self.running is None and not self.surplus and not self.flow.write_paused and not self.guard.draining
        small = b"transfer-encoding" not in fields and int(fields.get(b"content-length", b"0")) <= HIGH_WATER_LIMIT
        is_call = usual and self.parser.get_method() == b"POST" and b"upgrade" not in fields
        if not (idle and small and is_call and self.parser.should_keep_alive()):
            raise Refused(FULL)
        self._tell_full()
        self._read_body_of(ANSWERED)
        return True

    def _is_told_full(self, data: bytes) -> bool:
        """Whether it was one whole call, which has been told that there is no room: before anything else is known of it."""
        idle = self.phase <= IDLE and not self.surplus and not self.flow.write_paused and not self.guard.draining
        if not (idle and self.guard.calls.is_one(data)):
            return False
        self.phase, self.since = IDLE, self.guard.now
        self.guard.pace.refuse()
        self._tell_full()
        return True

    def _tell_full(self) -> None:
        self.guard.count_refused(FULL.status, FULL.code or FULL.type)
        self.transport.write(TOLD_FULL.answer())

    def _check_room_for_websocket(self) -> None:
        if self.guard.draining:
            raise Refused(Unavailable("The server is being stopped. Try again.", code="shutdown", retry_after_seconds=1))
        if len(self.guard.websockets) >= self.guard.limits.websockets:
            raise Refused(Busy("The server has too many websockets open. Try again shortly.", retry_after_seconds=5))

    # One answer after the other

    def _start(self, exchange: Exchange) -> None:
        self.running = exchange
        exchange.run(self.app, self.loop)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self.running = None
        self.unsent_bytes = 0
        if self.transport.is_closing():
            return None
        if self.waiting:
            return self._start(self.waiting.popleft())
        self.flow.resume_reading()
        if self.refusal is not None:
            self._say(self.refusal)
        elif self.phase == READ:
            self.phase, self.since = IDLE, self.guard.now
        elif self.phase == HEAD:
            self.since = self.guard.now  # the next request had to wait for this answer

    def _refuse(self, problem: ApiError) -> None:
        """Read no further, answer the request that is being read with an error, and close."""
        self.guard.count_refused(problem.status, problem.code or problem.type)
        was, self.phase, self.since = self.phase, REFUSED, self.guard.now
        if was == BODY:
            exchange = self.reading
            if exchange is not self.running and not exchange.response_complete:
                self.waiting.pop()  # its turn had not come
            else:
                self.running = None
                exchange.leave()
                if exchange.response_started:
                    return self.transport.close()  # in the middle of an answer nothing can be said
        if self.running is None:
            self._say(problem)
        else:
            self.refusal = problem
            self.flow.pause_reading()

    def _say(self, problem: ApiError) -> None:
        self.since, self.read_bytes = self.guard.now, 0
        self.flow.resume_reading()
        if not self.transport.is_closing():
            self.transport.write(error_answer(problem))
            self.transport.write_eof()

    def _discard(self, size: int) -> None:
        self.read_bytes += size
        if self.read_bytes > MOST_DISCARDED_BYTES:
            self.transport.close()

    # The connection

    def connection_lost(self, exc: Exception | None) -> None:
        running = self.running
        if running is not None and not running.response_complete:
            # Not always the request that came last, of which uvicorn thinks.
            running.leave()
        self.waiting.clear()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self.unsent_bytes = 0
        super().pause_writing()

    def shutdown(self) -> None:
        """Close as soon as nothing is lost by it: at once between requests, else after the answers that were begun."""
        if self.running is not None:
            self.reading.keep_alive = False
        elif self.phase not in (HEAD, REFUSED):
            self.transport.close()

    def look(self, now: float) -> None:
        """Is a deadline past?"""
        limits = self.guard.limits
        if self.flow.write_paused or self.running is None:
            if self._reader_stalls(now):
                log.info("Cut a connection whose client took nothing for %s s", limits.reader_seconds)
                return self.transport.abort()
            if self.transport.is_closing():
                return None
        waited = now - self.since
        if self.phase == BODY:
            self._look_at_body(now)
        elif self.running is not None:
            return None
        elif self.phase == HEAD and waited >= limits.head_seconds:
            self._refuse(TooSlow(f"The request's head took longer than {limits.head_seconds:g} s."))
        elif waited >= self._patience():
            self.transport.close()

    def _patience(self) -> float:
        """How long a connection may stay as it is, in seconds."""
        limits = self.guard.limits
        if self.phase == IDLE:
            return limits.keep_alive_seconds
        return LINGER_SECONDS if self.phase == REFUSED else limits.head_seconds

    def _look_at_body(self, now: float) -> None:
        limits = self.guard.limits
        if self.flow.read_paused or self.reading.waiting_for_100_continue:
            # It is us who keep the client waiting.
            self.since = now
            self.body_since += limits.look_every_seconds
        elif now - self.since >= limits.body_idle_seconds:
            self._refuse(TooSlow(f"Nothing of the body came for {limits.body_idle_seconds:g} s."))
        elif (took := now - self.body_since) >= limits.body_slow_seconds and self.body_bytes < took * LEAST_BODY_BYTES_PER_SECOND:
            self._refuse(TooSlow(f"The body came more slowly than {LEAST_BODY_BYTES_PER_SECOND} bytes/s."))

    def _reader_stalls(self, now: float) -> bool:
        """Called only while nobody writes, so that what is unsent can only become less."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            self.unsent_bytes = 0
            return False
        unsent += in_kernel(self.transport)
        if not self.unsent_bytes or unsent < self.unsent_bytes:
            self.unsent_bytes, self.progress_at = unsent, now
        return now - self.progress_at >= self.guard.limits.reader_seconds


class _Onward:
    """Hands a parser's calls on to a connection, but for those about the first head."""

    def __init__(self, connection: GuardedProtocol) -> None:
        self._connection = connection
        self._first = True
        self.on_body = connection.on_body
        self.on_message_complete = connection.on_message_complete

    def on_message_begin(self) -> None:
        if not self._first:
            self._connection.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._first:
            self._connection.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._first:
            self._connection.on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._first:
            self._connection.on_headers_complete()
        self._first = False


def _nothing() -> None:
    pass


def _too_large(url: bytes) -> ApiError:
    if len(url) > MOST_URL_BYTES:
        return UrlTooLong(f"The URL is longer than {MOST_URL_BYTES} bytes.")
    return HeadTooLarge(f"The request's head is larger than {MOST_HEAD_BYTES} bytes.")


def _without_origin(target: bytes, host: bytes) -> bytes:
    """Of an absolute URL, as sent to proxies, the part behind the host: only if that is the one in `Host`."""
    if b"#" in target:
        raise Refused(BadFraming("A request's target has no '#'."))
    scheme, found, rest = target.partition(b"://")
    authority = re.split(rb"[/?]", rest, maxsplit=1)[0]
    if not found or scheme.lower() not in (b"http", b"https") or authority.lower() != host.lower():
        raise Refused(BadFraming("A request's target is a path, or a URL with the host of the Host field."))
    tail = rest[len(authority) :]
    return tail if tail[:1] == b"/" else b"/" + tail


def _check_unusual(version: str, fields: dict[bytes, bytes]) -> None:
    if version not in ("1.0", "1.1"):
        raise Refused(UnknownVersion("Speak HTTP/1.1 here."))
    if not _is_host(fields.get(b"host", b"" if version == "1.1" else b"none")):
        raise Refused(BadFraming("The Host field is missing, or not a host name with an optional port."))
    if version == "1.1" and fields.get(b"expect", CONTINUE).strip().lower() != CONTINUE:
        raise Refused(UnknownExpectation("The only expectation that is met here is '100-continue'."))


def _check_coding(version: str, fields: dict[bytes, bytes]) -> None:
    if version != "1.1" or fields[b"transfer-encoding"].strip().lower() != b"chunked":
        raise Refused(BadFraming("The only transfer encoding here is 'chunked', in HTTP/1.1."))


def _framing(fields: dict[bytes, bytes]) -> bytes:
    """The header line that says how a body is framed; empty when there is none."""
    if b"transfer-encoding" in fields:
        return b"Transfer-Encoding: chunked"
    length = fields.get(b"content-length", b"0")
    return b"Content-Length: " + length if int(length) else b""


def _is_handshake(scope: Scope, fields: dict[bytes, bytes]) -> bool:
    """Of a websocket, by RFC 6455: any other offer to upgrade is ignored."""
    asks = scope["method"] == "GET" and scope["http_version"] == "1.1" and fields[b"upgrade"].strip().lower() == b"websocket"
    return asks and not _framing(fields)


def _why(problem: httptools.HttpParserError) -> ApiError:
    cause = problem.__context__
    if isinstance(cause, Refused):
        return cause.problem
    if isinstance(problem, httptools.HttpParserCallbackError):
        log.error("A request could not be read", exc_info=problem)
        return ServerFailed("The server failed.")
    return BadFraming(f"The request is not valid HTTP: {problem}.")


@functools.lru_cache(maxsize=256)
def _is_host(value: bytes) -> bool:
    return HOST.fullmatch(value) is not None


def in_kernel(transport: asyncio.Transport) -> int:
    """Bytes that the socket holds and the peer has not acknowledged; 0 where the system does not tell."""
    try:
        found = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):
        return 0
    return int(struct.unpack("i", found)[0])
