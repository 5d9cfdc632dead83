"""More than the processor can serve: connections are taken as they come, and who finds no room hears so at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from project.acceptor import LEAST_AT_ONCE, Acceptor
from project.guard import Limits
from project.pace import LEAST, UNLIMITED, WholeCalls
from tests.project.raw_http import Peer, Small, request, small
from tests.serving import eventually

PLACES = 40
CALL = request(body={"model": "m"})


async def busy(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Each request takes the processor for some time, `/quick` none of it."""
    while (await receive()).get("more_body"):
        pass
    if scope["path"] != "/quick":
        time.sleep(0.004)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def server() -> Iterator[Small]:
    with small(busy, Limits(open_requests=PLACES)) as one:
        yield one


class Crowd:
    """Clients that ask again as soon as they are answered, whatever the answer."""

    def __init__(self, port: int, count: int, call: bytes = CALL) -> None:
        self.port, self.count, self.call = port, count, call
        self.statuses: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Crowd:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        await asyncio.gather(*(self._one() for _ in range(self.count)))

    async def _one(self) -> None:
        while not self._ended.is_set():
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._ask(reader, writer)
            writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Again and again, until the connection ends."""
        while not self._ended.is_set():
            writer.write(self.call)
            head = await reader.readuntil(b"\r\n\r\n")
            while head.startswith(b"HTTP/1.1 100 "):
                head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            await reader.readexactly(length)
            self.statuses.append(int(head[9:12]))
            if self.statuses[-1] == 503:
                assert b"\r\nretry-after: 1\r\n" in head


def together(port: int, count: int, path: str) -> list[int]:
    """The statuses of so many calls that come at the same time."""
    peers = [Peer(port) for _ in range(count)]
    for peer in peers:
        peer.send(request(path, body={"model": "m"}))
    statuses = [peer.answer().status for peer in peers]
    for peer in peers:
        peer.socket.close()
    return statuses


def test_L05_when_the_processor_runs_out_a_turn_begins_what_it_has_time_for(server: Small) -> None:
    pace = server.guard.pace
    with Crowd(server.port, 4 * PLACES) as crowd:
        eventually(lambda: pace.most < UNLIMITED, "nobody was told that there is no room")
        before = len(crowd.statuses)
        eventually(lambda: len(crowd.statuses) > before + 500, "no answers came")
        meanwhile = crowd.statuses[before:]
        with Peer(server.port) as watcher:
            assert watcher.send(request("/healthz", method="GET")).answer().status == 200
    assert set(meanwhile) == {200, 503}
    assert server.refused[503, "too_many_requests_open"] == crowd.statuses.count(503)
    eventually(lambda: pace.most == UNLIMITED, "it is not over")
    for _ in range(5):
        assert together(server.port, 4 * LEAST, "/quick") == [200] * 4 * LEAST


def test_it_is_over_with_the_rush_and_not_with_the_last_refusal(server: Small) -> None:
    for _ in range(10):
        server.guard.pace.most = LEAST
        first = together(server.port, PLACES, "/quick")
        assert set(first) <= {200, 503}
        eventually(lambda: server.guard.pace.most == UNLIMITED, "it is not over")
        assert together(server.port, PLACES, "/quick") == [200] * PLACES
    assert server.guard.pace.most == UNLIMITED


@pytest.mark.parametrize("more", ["Connection: close\r\n", "Expect: 100-continue\r\n"])
def test_L05_who_is_refused_by_closing_counts_as_well(server: Small, more: str) -> None:
    with Crowd(server.port, 4 * PLACES, request(body={"model": "m"}, more=more)):
        eventually(lambda: server.guard.pace.most < UNLIMITED, "it did not show")


def test_a_crowd_that_finds_places_is_served_however_long_it_takes(server: Small) -> None:
    with Crowd(server.port, PLACES) as crowd:
        eventually(lambda: len(crowd.statuses) > 6 * PLACES, "no answers came")
    assert set(crowd.statuses) == {200}


def test_where_calls_wait_for_others_places_alone_are_short() -> None:
    with small(waiting, Limits(open_requests=PLACES)) as server, Crowd(server.port, 4 * PLACES) as crowd:
        eventually(lambda: crowd.statuses.count(200) > 2 * PLACES, "no answers came")
        assert 503 in crowd.statuses
        assert server.guard.pace.most == UNLIMITED


async def waiting(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await asyncio.sleep(0.2)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    "data",
    [
        CALL[:-1],
        CALL + b"P",
        CALL + CALL,
        request(method="GET"),
        request(version="1.0", body={}),
        request(body={}, more="Connection: close\r\n"),
        request(body={}, more="Upgrade: h2c\r\nConnection: upgrade\r\n"),
        request(body={}, more="Transfer-Encoding: chunked\r\n"),
        CALL.replace(b"\r\n", b"\n"),
        b"nonsense\r\n\r\n",
    ],
    ids=["cut", "and more", "two", "GET", "HTTP/1.0", "closes", "upgrades", "two framings", "bare LF", "nonsense"],
)
def test_only_one_whole_call_is_answered_unread(data: bytes) -> None:
    calls = WholeCalls()
    assert calls.is_one(CALL)
    assert not calls.is_one(data)
    assert calls.is_one(CALL), "what came before must not be in its way"


def test_a_call_in_pieces_hears_that_there_is_no_room_too(server: Small) -> None:
    pace = server.guard.pace
    with Peer(server.port) as peer:
        pace.most = 0
        for data in (CALL, *(bytes([byte]) for byte in CALL), CALL):
            peer.send(data)
        for _ in range(3):
            answer = peer.answer()
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert json.loads(answer.body)["error"]["code"] == "too_many_requests_open"


class Door:
    """Takes connections on a loop of its own, whose turns are long; `taken` says in which turn each was."""

    def __init__(self, listener: socket.socket, count: int) -> None:
        self.listener, self.count = listener, count
        self.taken: list[int] = []
        self.no_delay: set[int] = set()
        self.turns = 0
        self.room = count
        self.acceptor: Acceptor

    async def serve(self) -> None:
        server = await asyncio.get_running_loop().create_server(lambda: Taken(self), sock=self.listener)
        self.acceptor = Acceptor([self.listener.fileno()], lambda: Taken(self), lambda: self.room)
        while len(self.taken) < self.count and self.turns < 10 * self.count:
            self.turns += 1
            time.sleep(0.002)
            await asyncio.sleep(0)
        self.acceptor.close()
        server.close()


class Taken(asyncio.Protocol):
    def __init__(self, door: Door) -> None:
        self.door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.door.taken.append(self.door.turns)
        self.door.no_delay.add(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        self.door.acceptor.was_taken()


def test_connections_that_wait_are_taken_many_at_a_turn() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        clients = [socket.create_connection(listener.getsockname()) for _ in range(100)]
        door = Door(listener, len(clients))
        runner.run(door.serve())
        for client in clients:
            client.close()
    assert len(door.taken) == len(clients)
    assert len(set(door.taken)) <= len(clients) / LEAST_AT_ONCE + 2  # alone, libuv takes one at each turn
    assert door.no_delay == {1}


def test_no_more_connections_are_taken_together_than_there_is_room_for() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        clients = [socket.create_connection(listener.getsockname()) for _ in range(20)]
        door = Door(listener, len(clients))
        door.room = 0
        runner.run(door.serve())
        for client in clients:
            client.close()
    assert sorted(set(door.taken)) == sorted(door.taken)  # one at each turn: the server's own
