"""One request and its answer: what leaves, in how many writes, and what stays behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from project.exchange import Exchange
from proxy.call import LINE


class Wire:
    """A transport that keeps what was written."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


class Connection:
    def __init__(self) -> None:
        self.transport = Wire()
        self.flow = FlowControl(self.transport)  # type: ignore[arg-type]
        self.tasks: set[asyncio.Task[None]] = set()
        self.answered = 0

    def on_response_complete(self) -> None:
        self.answered += 1


def exchange(connection: Connection, method: str = "POST") -> Exchange:
    scope = {"type": "http", "method": method, "path": "/", "http_version": "1.1"}
    return Exchange(connection, scope, {}, keep_alive=True, expects_continue=False)  # type: ignore[arg-type]


async def served(app: Any, method: str = "POST") -> Connection:
    connection = Connection()
    one = exchange(connection, method)
    one.more_body = False
    one.wake()
    one.run(app, asyncio.get_running_loop())
    await asyncio.gather(*connection.tasks)
    return connection


def whole(*messages: dict[str, Any]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        for message in messages:
            await send(message)

    return app


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}


async def test_a_whole_answer_leaves_in_one_write():
    connection = await served(whole(START, {"type": "http.response.body", "body": b"ok"}))
    assert connection.transport.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"]
    assert (connection.answered, connection.transport.closed) == (1, False)


async def test_the_first_event_takes_the_head_with_it():
    start = {"type": "http.response.start", "status": 200, "headers": []}
    parts = [{"type": "http.response.body", "body": b"a", "more_body": True}, {"type": "http.response.body", "body": b"b"}]
    connection = await served(whole(start, *parts))
    assert connection.transport.writes == [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n", b"1\r\nb\r\n0\r\n\r\n"]


async def test_an_answer_to_head_has_no_body():
    connection = await served(whole(START, {"type": "http.response.body", "body": b"ok"}), method="HEAD")
    assert connection.transport.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"]


@pytest.mark.parametrize("body", [b"too long", b"x"])
async def test_an_answer_of_another_length_than_announced_is_not_taken_for_one(body: bytes):
    connection = await served(whole(START, {"type": "http.response.body", "body": body}))
    assert connection.transport.closed
    assert connection.answered == 0


@pytest.mark.parametrize("header", [(b"x", b"a\r\nb: c"), (b"x\r\ny", b"a"), (b"x", b"a\0")])
async def test_a_line_break_in_a_header_ends_the_answer(header: tuple[bytes, bytes]):
    start = {"type": "http.response.start", "status": 200, "headers": [header]}
    connection = await served(whole(start, {"type": "http.response.body", "body": b""}))
    assert b"".join(connection.transport.writes).startswith(b"HTTP/1.1 500 ")
    assert b"b: c" not in b"".join(connection.transport.writes)


async def test_an_application_that_fails_before_its_first_byte_is_answered_for():
    connection = await served(whole(START))
    assert b"".join(connection.transport.writes).startswith(b"HTTP/1.1 500 ")


async def test_nothing_of_a_request_is_left_to_the_garbage_collector():
    """A circle would keep each request's memory until a collection, and that stops everybody."""
    kept: list[weakref.ref[Any]] = []

    class Mark:
        pass

    async def app(scope: Any, receive: Any, send: Any) -> None:
        mark = Mark()
        kept.append(weakref.ref(mark))
        scope["mark"] = mark
        await whole(START, {"type": "http.response.body", "body": b"ok"})(scope, receive, send)

    gc.collect()
    gc.disable()
    try:
        await served(app)
        await asyncio.sleep(0)
        assert kept[0]() is None
    finally:
        gc.enable()


# What our own gateway says without messages


async def test_what_is_said_directly_is_what_messages_say():
    fields = [(b"x-request-id", b"7")]
    framed = [*fields, (b"content-length", b"2")]
    by_messages = await served(
        whole({"type": "http.response.start", "status": 429, "headers": framed}, {"type": "http.response.body", "body": b"no"})
    )

    async def directly(scope: Any, receive: Any, send: Any) -> None:
        line = scope["extensions"][LINE]
        assert line.whole_body() == b""
        assert line.say(429, fields, b"no")

    connection = await served(directly)
    assert connection.transport.writes == by_messages.transport.writes
    assert connection.answered == by_messages.answered == 1


async def test_a_stream_may_go_on_directly():
    async def directly(scope: Any, receive: Any, send: Any) -> None:
        line = scope["extensions"][LINE]
        assert not line.go_on(b"too early", more=True)
        assert line.begin(200, [(b"x-request-id", b"7")])
        assert not line.begin(200, [])
        assert line.go_on(b"a", more=True)
        assert line.go_on(b"", more=False)
        assert not line.go_on(b"too late", more=False)

    connection = await served(directly)
    head = b"HTTP/1.1 200 OK\r\nx-request-id: 7\r\ntransfer-encoding: chunked\r\n\r\n"
    assert connection.transport.writes == [head + b"1\r\na\r\n", b"0\r\n\r\n"]


@pytest.mark.parametrize("value", [b"a\r\nset-cookie: b", b"a\nb", b"a\0b"])
async def test_what_is_said_directly_cannot_hold_another_header_either(value: bytes):
    one = exchange(Connection())
    for say in (lambda: one.say(200, [(b"x", value)], b""), lambda: one.begin(200, [(b"x", value)])):
        with pytest.raises(RuntimeError):
            say()
    assert not one.response_started


async def test_a_client_that_does_not_keep_up_is_waited_for():
    connection = Connection()
    one = exchange(connection)
    connection.flow.pause_writing()
    assert not one.say(200, [], b"ok")
    assert not connection.transport.writes
    connection.flow.resume_writing()
    assert one.say(200, [], b"ok")
    assert connection.transport.writes


async def test_what_is_said_to_a_client_that_has_gone_goes_nowhere():
    connection = Connection()
    one = exchange(connection)
    one.leave()
    assert one.say(200, [], b"ok")
    assert one.go_on(b"x", more=True)
    assert not connection.transport.writes


async def test_a_body_that_is_not_whole_yet_has_to_be_received():
    connection = Connection()
    one = exchange(connection)
    one.body = b"half"
    assert one.whole_body() is None
    one.more_body = False
    assert one.whole_body() == b"half"
    one.leave()
    assert one.whole_body() is None
