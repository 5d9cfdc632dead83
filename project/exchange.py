"""One request and its answer on a client's connection: ASGI's `receive` and `send` in one object, and the `Line` of our own.

The head of an answer waits for the first piece of its body, so that both leave in one write.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from providers.wire import ApiError, encode_json
from proxy.call import LINE, Headers, Message, Scope, new_request_id
from proxy.errors import GatewayError, Unavailable

if TYPE_CHECKING:
    from project.guard import GuardedProtocol

log = logging.getLogger(__name__)

_FRAMING = frozenset({b"content-length", b"transfer-encoding", b"connection"})
_WITHOUT_BODY = frozenset({204, 304})
DISCONNECT: Message = {"type": "http.disconnect"}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ServerFailed(GatewayError):
    status = 500
    type = "server_error"
    code = "internal_error"


class Exchange:
    """What the connection tells it (`body`, `more_body`, `disconnected`), and what it tells the connection (`on_response`)."""

    __slots__ = (
        "_chunked",
        "_head",
        "_left_bytes",
        "_news",
        "_waiter",
        "_when_client_leaves",
        "body",
        "disconnected",
        "fields",
        "flow",
        "keep_alive",
        "more_body",
        "on_response",
        "response_complete",
        "response_started",
        "scope",
        "task",
        "tasks",
        "transport",
        "waiting_for_100_continue",
    )

    def __init__(
        self, connection: GuardedProtocol, scope: Scope, fields: dict[bytes, bytes], *, keep_alive: bool, expects_continue: bool
    ) -> None:
        self.scope = scope
        self.fields = fields
        self.transport: asyncio.Transport = connection.transport
        self.flow: FlowControl = connection.flow
        self.tasks = connection.tasks
        self.on_response: Callable[[], None] = connection.on_response_complete
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = expects_continue
        self.disconnected = False
        self.body = b""
        self.more_body = True
        self.response_started = self.response_complete = False
        self._head: bytes | None = None  # of the answer, while it waits for its body
        self._chunked = False
        self._left_bytes = 0  # of the body, as its length was announced
        self._waiter: asyncio.Future[None] | None = None
        self._news = False
        self._when_client_leaves: Callable[[], None] | None = None
        scope["extensions"] = {LINE: self}

    # For the connection

    def run(self, app: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.task = loop.create_task(self._run(app))
        self.tasks.add(self.task)

    def wake(self) -> None:
        """Something has changed that `receive` may wait for."""
        self._news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def leave(self) -> None:
        """The client has gone."""
        self.disconnected = True
        self.wake()
        if self._when_client_leaves is not None:
            self._when_client_leaves()

    # For the application

    def when_client_leaves(self, do: Callable[[], None]) -> None:
        """Call this once when the client goes away before it has had its answer; at once if it has gone already."""
        self._when_client_leaves = do
        if self.disconnected:
            do()

    def whole_body(self) -> bytes | None:
        if self.more_body or self.disconnected or self.response_complete or self.waiting_for_100_continue:
            return None
        self.flow.resume_reading()
        self._news = False
        body, self.body = self.body, b""
        return body

    async def receive(self) -> Message:
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(CONTINUE)
            self.waiting_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            while not self._news:
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            self._news = False
        if self.disconnected or self.response_complete:
            return DISCONNECT
        body, self.body = self.body, b""
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if not self.response_started:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"The application sent {message['type']} before its answer began.")
            self._begin(message["status"], message.get("headers", ()))
        elif self.response_complete or message["type"] != "http.response.body":
            raise RuntimeError(f"The application sent {message['type']} out of turn.")
        else:
            self._go_on(message.get("body", b""), more=message.get("more_body", False))

    def say(self, status: int, headers: Headers, body: bytes) -> bool:
        if self.disconnected:
            return True
        if self.flow.write_paused or self.response_started or self.scope["method"] == "HEAD":
            return False
        self.transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (self._fields(status, headers), len(body), body))
        self._end()
        return True

    def begin(self, status: int, headers: Headers) -> bool:
        if self.disconnected:
            return True
        if self.flow.write_paused or self.response_started or self.scope["method"] == "HEAD":
            return False
        self._head = self._fields(status, headers) + b"transfer-encoding: chunked\r\n\r\n"
        self._chunked = True
        return True

    def _fields(self, status: int, headers: Headers) -> bytes:
        """The lines of a head that say nothing of its framing, which begins the answer."""
        fields = b"".join([b"%b: %b\r\n" % field for field in headers])
        _check_lines(fields, len(headers))
        self.response_started = True
        return b"%b%b%b" % (STATUS_LINE[status], fields, b"" if self.keep_alive else b"connection: close\r\n")

    def go_on(self, body: bytes, *, more: bool) -> bool:
        if self.disconnected:
            return True
        if self.flow.write_paused or self.response_complete or not self.response_started:
            return False
        self._go_on(body, more=more)
        return True

    def _begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.waiting_for_100_continue = False
        has_length = closes = False
        lines = [STATUS_LINE[status]]
        for field in headers:
            if what := _framing(field[0]):
                value = field[1]
                if what == b"content-length":
                    self._left_bytes, has_length = int(value), True
                elif what == b"transfer-encoding":
                    continue  # how it is framed is ours to say
                elif b"close" in value.lower():
                    self.keep_alive, closes = False, True
            lines.append(b"%b: %b\r\n" % field)
        if not self.keep_alive and not closes:
            lines.append(b"connection: close\r\n")
        if not has_length and status not in _WITHOUT_BODY and self.scope["method"] != "HEAD":
            self._chunked = True
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        _check_lines(head, len(lines))
        self.response_started = True
        self._head = head + b"\r\n"

    def _go_on(self, body: bytes, *, more: bool) -> None:
        data, self._head = self._head or b"", None
        if self.scope["method"] == "HEAD":
            self._left_bytes = 0
        elif self._chunked:
            if body:
                data = b"%b%x\r\n%b\r\n" % (data, len(body), body)
            if not more:
                data += b"0\r\n\r\n"
        else:
            self._left_bytes -= len(body)
            if self._left_bytes < 0:
                raise RuntimeError("The answer is longer than it was announced.")
            data += body
        if data:
            self.transport.write(data)
        if more:
            return
        if self._left_bytes:
            raise RuntimeError("The answer is shorter than it was announced.")
        self._end()

    def _end(self) -> None:
        self.response_complete = True
        self.wake()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    async def _run(self, app: Any) -> None:
        try:
            await app(self.scope, self.receive, self.send)
            if not self.response_complete and not self.disconnected:
                log.error("The application ended without a whole answer to %s %s", self.scope["method"], self.scope["path"])
                self.fail(ServerFailed("The server failed."))
        except asyncio.CancelledError:
            self.fail(Unavailable("The server is being stopped. Try again.", code="shutdown", retry_after_seconds=1))
        except Exception:
            log.exception("The application failed at %s %s", self.scope["method"], self.scope["path"])
            self.fail(ServerFailed("The server failed."))
        finally:
            # No circle is left behind: what belongs to a request goes with it, and the next one finds its memory warm.
            self.on_response = _nothing
            self._when_client_leaves = None
            self.scope.pop("extensions", None)
            self.tasks.discard(self.task)

    def fail(self, problem: ApiError) -> None:
        """Say so if nothing has been said yet; otherwise the missing end of the answer says it."""
        self.keep_alive = False
        if (not self.response_started or self._head is not None) and not self.disconnected:
            self.response_started = self.response_complete = True
            self.transport.write(error_answer(problem))
            self.wake()
        self.transport.close()


class UnusualExchange(Exchange):
    """With a client that speaks HTTP/1.0, or asks before it sends its body. Apart, because others need not pay for it."""

    __slots__ = ("_ends_with_connection",)

    def __init__(
        self, connection: GuardedProtocol, scope: Scope, fields: dict[bytes, bytes], *, keep_alive: bool, expects_continue: bool
    ) -> None:
        super().__init__(connection, scope, fields, keep_alive=keep_alive, expects_continue=expects_continue)
        self._ends_with_connection = False

    def _begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        headers = list(headers)
        if self.waiting_for_100_continue:
            # It was not told to send its body, and may send it or not: nobody could tell where the next request begins.
            self.keep_alive = False
        if self.scope["http_version"] == "1.0" and not any(_framing(name) == b"content-length" for name, _ in headers):
            # It knows no chunks: the end of the connection is the end of the answer.
            self._ends_with_connection, self.keep_alive = True, False
        super()._begin(status, headers)
        if self._ends_with_connection and self._chunked and self._head is not None:
            self._chunked = False
            self._head = self._head.replace(b"transfer-encoding: chunked\r\n", b"", 1)

    def _go_on(self, body: bytes, *, more: bool) -> None:
        if self._ends_with_connection:
            self._left_bytes = len(body)
        super()._go_on(body, more=more)

    def say(self, status: int, headers: Headers, body: bytes) -> bool:
        return False

    def begin(self, status: int, headers: Headers) -> bool:
        return False


class Answered(Exchange):
    """Stands for any request that has had its whole answer when no more than its head was read: its body is read and forgotten."""

    __slots__ = ()

    def __init__(self) -> None:
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False

    def leave(self) -> None:
        pass


def error_answer(problem: ApiError) -> bytes:
    """An error as a whole HTTP answer, after which the connection closes."""
    return _error_answer(problem, new_request_id(), "connection: close\r\n")


class KeptRefusal:
    """An error that is told again and again, on connections that go on: all of the answer but its id is made before."""

    def __init__(self, problem: ApiError) -> None:
        self._before_id, _, self._after_id = _error_answer(problem, "*", "").partition(b"*")

    def answer(self) -> bytes:
        return b"%b%b%b" % (self._before_id, new_request_id().encode(), self._after_id)


def _error_answer(problem: ApiError, request_id: str, more: str) -> bytes:
    body = encode_json(problem.body())
    head = f"x-request-id: {request_id}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    # It tells a page of any origin no more than what that page itself sent wrongly.
    head += "access-control-allow-origin: *\r\n"
    if problem.retry_after_seconds is not None:
        head += f"retry-after: {problem.retry_after_seconds:g}\r\n"
    return STATUS_LINE[problem.status] + f"{head}{more}\r\n".encode() + body


def _check_lines(head: bytes, count: int) -> None:
    """Raises RuntimeError where a header line holds another one."""
    if head.count(b"\n") != count or head.count(b"\r") != count or b"\0" in head:
        raise RuntimeError("A header of the answer has a line break in it.")


@lru_cache(maxsize=256)
def _framing(name: bytes) -> bytes:
    """The lower-case name of a header that says how an answer is framed; of any other nothing."""
    return name.lower() if name.lower() in _FRAMING else b""


def _nothing() -> None:
    pass
