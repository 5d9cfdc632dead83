"""Websockets through the guard: what the application hears of them, and that they cost no more than other requests may."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from project.guard import Limits
from project.websocket import MOST_MESSAGE_BYTES
from tests.project.raw_http import Answer, Peer, Small, request, small, took
from tests.serving import eventually

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ASKS = f"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n"


class App:
    """An application that does what the path says. `heard` are the messages of its websockets, `scopes` how they began."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.scopes: list[dict[str, Any]] = []
        self.told: list[str] = []

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "http":
            await asyncio.sleep(0.2 if scope["path"] == "/slow" else 0)
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
            return await send({"type": "http.response.body", "body": b"plain"})
        self.scopes.append(scope)

        async def hear() -> dict[str, Any]:
            message = await receive()
            self.heard.append(message)
            return message

        assert (await hear())["type"] == "websocket.connect"
        match scope["path"]:
            case "/fails":
                raise RuntimeError("on purpose")
            case "/silent":
                return None
            case "/dawdles":
                await hear()
                return None
            case "/refuses":
                return await send({"type": "websocket.close"})
        await send({"type": "websocket.accept", "subprotocol": next(iter(scope["subprotocols"]), None)})
        if scope["path"] == "/fountain":
            return await self.pour(send)
        while (message := await hear())["type"] == "websocket.receive":
            if message.get("text") == "fail":
                raise RuntimeError("on purpose")
            if message.get("text") == "leave":
                return await send({"type": "websocket.close", "code": 4321, "reason": "as you wish"})
            await send({"type": "websocket.send", **{kind: message[kind] for kind in ("text", "bytes") if message.get(kind) is not None}})
        return None

    async def pour(self, send: Callable) -> None:
        try:
            while True:
                await send({"type": "websocket.send", "bytes": b"x" * 10_000})
                await asyncio.sleep(0)
        finally:
            self.told.append("the fountain stopped")


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def door(app: App) -> Iterator[Small]:
    with small(app, Limits(head_seconds=0.6, reader_seconds=0.6, open_requests=8), websockets=True) as server:
        yield server


def opens(server: Small, path: str = "/echo", **options: Any) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{server.port}{path}", compression=None, **options)


def asks(path: str = "/echo", more: str = "") -> bytes:
    return request(path, method="GET", more=ASKS + more)


def refused(server: Small, path: str = "/echo", **options: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    with pytest.raises(InvalidStatus) as refusal:
        opens(server, path, **options)
    answer = refusal.value.response
    return answer.status_code, json.loads(answer.body or b"{}"), {name.lower(): value for name, value in answer.headers.raw_items()}


def open_now(server: Small) -> int:
    return len(server.guard.websockets)


def frame(opcode: int, payload: bytes, *, last: bool = True) -> bytes:
    """As a client sends it: masked, here with zeros."""
    first = (0x80 if last else 0) | opcode
    size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + struct.pack("!H", len(payload))
    return bytes([first]) + size + b"\0\0\0\0" + payload


def test_what_is_said_comes_back(door: Small, app: App) -> None:
    with opens(door, "/echo%20me?a=b", subprotocols=["one"], additional_headers={"X-Own": "1", "X_Own": "2"}) as page:
        for said in ("text", b"bytes", "", "\u00fc" * 20_000, b"x" * MOST_MESSAGE_BYTES):
            page.send(said)
            assert page.recv(timeout=5) == said
        page.send(iter(["in ", "three ", "parts"]))
        assert page.recv(timeout=5) == "in three parts"
        assert page.ping().wait(5)
        assert page.subprotocol == "one"
    [scope] = app.scopes
    assert (scope["type"], scope["path"], scope["raw_path"], scope["query_string"]) == ("websocket", "/echo me", b"/echo%20me", b"a=b")
    assert scope["subprotocols"] == ["one"]
    assert dict(scope["headers"])[b"x-own"] == b"1"
    assert b"x_own" not in dict(scope["headers"])
    eventually(lambda: app.heard[-1]["type"] == "websocket.disconnect", "the application does not know that it ended")
    eventually(lambda: open_now(door) == 0 and not door.server.server_state.tasks, "something is left")


def test_the_application_may_end_it_in_its_own_words(door: Small) -> None:
    with opens(door) as page:
        page.send("leave")
        with pytest.raises(ConnectionClosed) as end:
            page.recv(timeout=5)
    assert end.value.rcvd is not None
    assert (end.value.rcvd.code, end.value.rcvd.reason) == (4321, "as you wish")
    eventually(lambda: open_now(door) == 0, "it is still there")


def test_what_comes_right_behind_the_handshake_is_heard(door: Small) -> None:
    with Peer(door.port) as peer:
        peer.send(asks() + frame(1, b"early"))
        assert peer._until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        assert peer._exactly(7) == b"\x81\x05early"


def test_a_connection_that_was_used_before_may_become_one(door: Small) -> None:
    with Peer(door.port) as peer:
        assert peer.send(request("/plain", method="GET")).answer().body == b"plain"
        assert peer.send(asks())._until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")


def test_an_offer_behind_an_answer_that_is_not_there_yet_is_ignored(door: Small) -> None:
    with Peer(door.port) as peer:
        peer.send(request("/slow", method="GET") + asks() + request("/third", method="GET"))
        assert [peer.answer().body for _ in range(3)] == [b"plain"] * 3


@pytest.mark.parametrize(
    "sent", [asks(more="Content-Length: 3\r\n") + b"abc", asks().replace(b"GET", b"POST"), asks().replace(b"websocket", b"h2c")]
)
def test_what_is_no_handshake_is_a_plain_request(door: Small, sent: bytes) -> None:
    with Peer(door.port) as peer:
        assert peer.send(sent).answer().body == b"plain"
        assert peer.send(request("/next", method="GET")).answer().body == b"plain"


def test_requests_that_may_not_become_one_are_served_as_ever(app: App) -> None:
    with small(app, websockets=True) as server, Peer(server.port) as peer:
        server.guard.upgrades = lambda scope: not scope["path"].startswith("/v1")
        assert peer.send(asks("/v1/models")).answer().body == b"plain"
        assert peer.send(asks("/%76%31/models")).answer().body == b"plain"
        assert peer.send(asks("/echo"))._until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")


# What the guard refuses


def test_the_limits_of_heads_hold_for_handshakes(door: Small, app: App) -> None:
    heads = {
        "large": (asks(more="X-Large: " + "a" * (33 << 10) + "\r\n"), 431),
        "many": (asks(more="".join(f"X-{number}: 1\r\n" for number in range(100))), 431),
        "url": (asks("/" + "a" * (9 << 10)), 414),
        "two hosts": (asks(more="Host: other\r\n"), 400),
        "old": (asks().replace(b"HTTP/1.1", b"HTTP/0.9"), 505),
    }
    for sent, status in heads.values():
        with Peer(door.port) as peer:
            answer = peer.send(sent).answer()
            assert (answer.status, answer.headers["connection"]) == (status, "close")
            assert peer.rest() == b""
    assert app.scopes == []


def test_a_long_cookie_and_a_long_path_are_no_hindrance(door: Small, app: App) -> None:
    path = "/" + "a" * ((8 << 10) - 1)
    with Peer(door.port) as peer:
        assert peer.send(asks(path, more="Cookie: a=" + "b" * (16 << 10) + "\r\n"))._until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
    assert app.scopes[0]["path"] == path
    assert len(dict(app.scopes[0]["headers"])[b"cookie"]) == (16 << 10) + 2


@pytest.mark.parametrize(
    ("was", "becomes", "status"),
    [
        (f"Sec-WebSocket-Key: {KEY}\r\n", "", 400),
        (KEY, "short", 400),
        ("Version: 13", "Version: 12", 400),
        ("Sec-WebSocket-Version: 13\r\n", "", 400),
    ],
)
def test_a_handshake_that_is_none_is_refused_and_closed(door: Small, app: App, was: str, becomes: str, status: int) -> None:
    with Peer(door.port) as peer:
        answer = peer.send(asks().replace(was.encode(), becomes.encode())).answer()
        assert answer.status == status
        assert peer.rest() == b""
    assert app.scopes == []
    eventually(lambda: open_now(door) == 0, "it is still there")


def test_a_handshake_that_drips_is_refused(door: Small) -> None:
    with Peer(door.port) as peer:
        began = time.monotonic()
        assert peer.send(asks()[:40]).answer().status == 408
        assert took(began) < 3


def test_an_application_that_does_not_answer_is_answered_for(door: Small, app: App) -> None:
    status, body, headers = refused(door, "/dawdles")
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "unavailable", "1")
    eventually(lambda: app.heard[-1]["type"] == "websocket.disconnect", "the application still waits")


def test_an_application_that_refuses_fails_or_says_nothing(door: Small, caplog: pytest.LogCaptureFixture) -> None:
    assert refused(door, "/refuses")[0] == 403
    for path in ("/fails", "/silent"):
        status, body, _ = refused(door, path)
        assert (status, body["error"]["code"]) == (500, "internal_error")
    with opens(door) as page:
        page.send("fail")
        with pytest.raises(ConnectionClosed) as end:
            page.recv(timeout=5)
    assert end.value.rcvd is not None
    assert end.value.rcvd.code == 1011
    assert [record.levelname for record in caplog.records if record.name == "project.websocket"] == ["ERROR"] * 3
    eventually(lambda: open_now(door) == 0 and not door.server.server_state.connections, "something is left")


def test_more_than_there_is_room_for_are_refused_and_others_served(door: Small) -> None:
    with opens(door), opens(door) as second:  # a quarter of OPEN_REQUESTS
        status, body, headers = refused(door)
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "too_many_requests_open", "5")
        with Peer(door.port) as peer:
            assert peer.send(request("/plain", method="GET")).answer().status == 200
        second.close()
        eventually(lambda: open_now(door) == 1, "it is still there")
        with opens(door) as third:
            third.send("hello")
            assert third.recv(timeout=5) == "hello"


# What a client says


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (frame(1, b"x" * 60_000, last=False) + frame(0, b"x" * 60_000), 1009),
        (frame(1, b"a", last=False) + frame(0, b"", last=False) * 1000, 1008),
        (frame(1, b"\xff\xfe"), 1007),
        (frame(3, b""), 1002),
        (b"\x81\x05hello", 1002),  # not masked
    ],
    ids=["large", "fragments", "no text", "no opcode", "no mask"],
)
def test_what_breaks_the_rules_ends_it(door: Small, said: bytes, code: int) -> None:
    with Peer(door.port) as peer:
        peer.send(asks())._until(b"\r\n\r\n")
        peer.send(said)
        assert struct.unpack("!H", peer._exactly(4)[2:])[0] == code
        peer.rest()
    eventually(lambda: open_now(door) == 0, "it is still there")


def test_more_than_the_application_takes_waits_outside(app: App) -> None:
    async def takes_none(scope: dict, receive: Callable, send: Callable) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await asyncio.sleep(1)

    with small(takes_none, websockets=True) as server, Peer(server.port, send_buffer=4096) as peer:
        peer.send(asks())._until(b"\r\n\r\n")
        [connection] = server.guard.websockets
        peer.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            for _ in range(10_000):
                peer.send(frame(2, b"x" * 60_000))
        assert sum(len(message.get("bytes", b"")) for message in connection.queue._queue) < 1 << 20


# A client that does not read


def waiting_bytes(server: Small) -> int:
    return sum(connection.transport.get_write_buffer_size() for connection in server.guard.websockets)


def test_who_does_not_read_makes_the_application_wait_and_is_cut(door: Small, app: App) -> None:
    with Peer(door.port, receive_buffer=4096) as peer:
        began = time.monotonic()
        peer.send(asks("/fountain"))
        eventually(lambda: open_now(door) == 1, "not open")
        most = 0
        while not app.told:
            most = max(most, waiting_bytes(door))
            assert took(began) < 5, "not cut"
            time.sleep(0.02)
        assert 0 < most < 256 << 10
        assert took(began) > 0.5
    eventually(lambda: open_now(door) == 0 and not door.server.server_state.tasks, "something is left")


def test_who_asks_for_signs_of_life_and_does_not_read_them_is_cut(door: Small) -> None:
    with Peer(door.port, receive_buffer=4096, send_buffer=4096) as peer:
        peer.send(asks())
        eventually(lambda: open_now(door) == 1, "not open")
        peer.socket.settimeout(0.2)
        most, began = 0, time.monotonic()
        while open_now(door):
            try:
                peer.send(frame(9, b"p" * 125) * 100)
            except TimeoutError:
                pass
            except ConnectionError:
                break
            most = max(most, waiting_bytes(door))
            assert took(began) < 10, "not cut"
        assert most < 1 << 20
    eventually(lambda: open_now(door) == 0, "it is still there")


def test_who_reads_slowly_is_not_cut(door: Small) -> None:
    with Peer(door.port, receive_buffer=64 << 10) as peer:
        peer.send(asks("/fountain"))
        began = time.monotonic()
        while took(began) < 1.8:
            assert peer.socket.recv(20_000)
            time.sleep(0.1)
        assert open_now(door) == 1


def test_a_dead_client_is_noticed_by_its_silence(app: App) -> None:
    with small(app, websockets=True) as server:
        server.server.config.ws_ping_interval = server.server.config.ws_ping_timeout = 0.2
        with Peer(server.port) as peer:
            peer.send(asks())._until(b"\r\n\r\n")
            eventually(lambda: open_now(server) == 0, "it is still there", seconds=4)
            assert b"\x89\x04" in peer.rest()
    assert app.heard[-1]["type"] == "websocket.disconnect"


# The end


def test_a_drain_ends_them_at_once_in_words(app: App, caplog: pytest.LogCaptureFixture) -> None:
    server = Small(app, Limits(), drain_seconds=20, websockets=True).start()
    try:
        with opens(server) as page, Peer(server.port) as asking:
            asking.send(asks("/dawdles"))
            eventually(lambda: open_now(server) == 2, "not open")
            began = time.monotonic()
            server.server.should_exit = True
            with pytest.raises(ConnectionClosed) as end:
                page.recv(timeout=5)
            assert end.value.rcvd is not None
            assert end.value.rcvd.code == 1012
            answer: Answer = asking.answer()
            assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "shutdown", "1")
    finally:
        server.stop()
    assert took(began) < 5  # it waited for nobody
    assert [message["type"] for message in app.heard].count("websocket.disconnect") == 2
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_who_does_not_hear_it_does_not_keep_the_process(app: App) -> None:
    server = Small(app, Limits(), drain_seconds=20, websockets=True).start()
    with Peer(server.port) as deaf, Peer(server.port, receive_buffer=4096) as stuck:
        deaf.send(asks())._until(b"\r\n\r\n")
        stuck.send(asks("/fountain"))
        eventually(lambda: open_now(server) == 2, "not open")
        time.sleep(0.3)
        began = time.monotonic()
        server.server.drain_seconds = 1.5
        server.stop()
        assert took(began) < 10
    assert app.told == ["the fountain stopped"]


def test_while_it_drains_no_new_ones_are_taken(app: App) -> None:
    with small(app, websockets=True, drain_delay=1) as server:
        server.server.should_exit = True
        eventually(lambda: server.guard.draining, "not draining")
        status, body, _ = refused(server)
        assert (status, body["error"]["code"]) == (503, "shutdown")


def test_a_reset_is_heard_as_an_end(door: Small, app: App) -> None:
    with Peer(door.port) as peer:
        peer.send(asks())._until(b"\r\n\r\n")
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(lambda: app.heard[-1]["type"] == "websocket.disconnect", "the application does not know")
    eventually(lambda: open_now(door) == 0, "it is still there")
