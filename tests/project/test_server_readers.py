"""Clients that do not take their answers, a loop that stands still, and a process that runs out of files."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from project.guard import Limits
from project.watchdog import STALLED
from tests.project.raw_http import Peer, chat, memory_of, request, small, took
from tests.serving import REPOSITORY, Sluice, eventually
from tests.upstreams.openai import DONE, OpenAIUpstream, Step, sse

MIB = 1 << 20
READER_SECONDS = 1.5
CLIENTS = 200
FRAME = sse({"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "x" * (32 << 10)}}]})
FRAMES = 160


class Fountain:
    """An upstream that streams 5 MB to whoever asks, and notes how far each got. Its `base_url` is what an operator gives."""

    def __init__(self) -> None:
        self.sent: dict[str, int] = {}  # bytes, by request id
        self.left: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        # Else the kernel takes some megabytes on this side, and nothing of what happens behind it could be seen.
        self._server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        if not head.startswith("post "):  # for the list of models
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            return writer.close()
        name = head.partition("x-request-id: ")[2].partition("\r\n")[0]
        self.sent[name] = 0
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        try:
            for frame in [FRAME] * FRAMES + [DONE]:
                writer.write(frame)
                await writer.drain()
                self.sent[name] += len(frame)
        except ConnectionError:
            self.left.add(name)
        writer.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture(scope="module")
def fountain() -> Iterator[Fountain]:
    fountain = Fountain()
    yield fountain
    fountain.stop()


@pytest.fixture(scope="module")
def impatient(serve: Callable[..., Sluice], fountain: Fountain) -> Sluice:
    sluice = serve(READER_SECONDS=str(READER_SECONDS), OPEN_REQUESTS="300", UPSTREAM_REQUESTS="300")
    sluice.add_openai(fountain, prefix="fountain")
    sluice.wait_for("fountain")
    return sluice


@pytest.fixture(scope="module")
def wish(impatient: Sluice) -> bytes:
    return chat(impatient.issue_key(), "fountain/any", stream=True)


def test_F03_two_hundred_clients_that_never_read_cost_little_and_are_cut(impatient: Sluice, fountain: Fountain, wish: bytes) -> None:
    with Peer(impatient.port) as peer:  # what the first such answer costs, it costs once
        assert peer.send(wish).answer().body.endswith(DONE)
    fountain.sent.clear()
    before = most = memory_of(impatient.pid)
    peers = [Peer(impatient.port, receive_buffer=4096).send(wish) for _ in range(CLIENTS)]
    began = time.monotonic()
    while len(fountain.left) < CLIENTS:
        most = max(most, memory_of(impatient.pid))
        assert took(began) < READER_SECONDS + 10, "some are not cut"
        time.sleep(0.05)
    assert most - before < 64 * MIB
    # In between lie the buffers of the sockets and ours; the promise is that it ends with them.
    assert max(fountain.sent.values()) < len(FRAME) * FRAMES / 2
    for peer in peers:
        peer.socket.close()
    for request_id in list(fountain.sent)[:: CLIENTS // 5]:
        row = impatient.row(request_id)
        assert (row["status"], row["error"]) == (499, "client_closed")
        assert row["duration_ms"] > READER_SECONDS * 900


def test_F03_a_client_that_reads_slowly_is_not_cut(impatient: Sluice, wish: bytes) -> None:
    with Peer(impatient.port, receive_buffer=64 << 10) as peer:
        peer.send(wish)
        began = time.monotonic()
        while took(began) < READER_SECONDS * 2.5:
            peer.unread += peer.socket.recv(20_000)
            time.sleep(0.2)
        assert len(peer.unread) < MIB, "it has read too fast to show anything"
        assert peer.answer().body.endswith(DONE)


def test_F03_a_slow_client_that_asks_again_and_again_is_not_cut() -> None:
    async def growing(scope: dict, receive: Callable, send: Callable) -> None:
        size = int(scope["path"][1:])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": b"x" * size})

    with small(growing, Limits(reader_seconds=0.6)) as server, Peer(server.port, receive_buffer=4096) as peer:
        for number in range(8):  # at each look more is unsent than at any before: another answer, and not a lack of progress
            # A little more than the kernel takes for it, and less than what makes an application wait.
            peer.send(request(f"/{140_000 + number * 2_000}", method="GET"))
            time.sleep(0.25)
            assert peer.answer().status == 200


async def whole_answer(scope: dict, receive: object, send: object) -> None:
    """5 MB in one piece, and the application has done its part."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5242880")]})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"x" * (5 << 20)})  # type: ignore[operator]


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_F03_who_does_not_take_a_whole_answer_is_cut_too(version: str) -> None:
    with small(whole_answer, Limits(reader_seconds=0.6)) as server, Peer(server.port, receive_buffer=4096) as peer:
        peer.send(request(version=version))
        connections = server.server.server_state.connections
        eventually(lambda: len(connections) == 1, "not there yet")
        eventually(lambda: not connections, "not cut", seconds=4)
        assert len(peer.rest()) < 5 << 20


def test_F03_the_application_of_a_client_that_does_not_read_hears_that_it_left() -> None:
    heard: list[str] = []

    async def endless(scope: dict, receive: Callable, send: Callable) -> None:
        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            heard.append("left")

        listener = asyncio.create_task(listen())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not heard:
            await send({"type": "http.response.body", "body": b"x" * 10_000, "more_body": True})
            await asyncio.sleep(0)
        await listener

    with small(endless, Limits(reader_seconds=0.6)) as server, Peer(server.port, receive_buffer=4096) as peer:
        peer.send(request(method="GET"))
        time.sleep(0.4)
        [connection] = server.server.server_state.connections
        assert connection.transport.get_write_buffer_size() < 256 << 10
        eventually(lambda: heard == ["left"], "the application was not told", seconds=4)


# The loop


def test_F18_a_loop_that_stands_still_is_named_once_and_not_ready_until_it_goes_well(caplog: pytest.LogCaptureFixture) -> None:
    async def sometimes_blocks(scope: dict, receive: Callable, send: Callable) -> None:
        if scope["path"] == "/block":
            time.sleep(2)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with small(sometimes_blocks, stall_seconds=0.5) as server, Peer(server.port) as peer:
        assert peer.send(request("/well")).answer().status == 200
        assert server.unready == set()
        began = time.monotonic()
        peer.send(request("/block"))
        eventually(lambda: STALLED in server.unready, "not noticed")
        assert took(began) < 2  # while it stands still: 3 s is what is promised
        assert peer.answer().status == 200
        assert STALLED in server.unready, "it has not gone well for long enough"
        eventually(lambda: server.unready == set(), "not ready again")
    [record] = [record for record in caplog.records if record.name == "project.watchdog"]
    assert "sometimes_blocks" in record.getMessage()
    assert "time.sleep(2)" in record.getMessage()


# Files


def test_F22_a_process_with_few_files_refuses_in_words_and_recovers(tmp_path: Path, upstream: OpenAIUpstream) -> None:
    house = Sluice(tmp_path / "data")
    house.migrate()
    house.add_openai(upstream, prefix="sim")
    key = house.issue_key()
    with house.log_path.open("ab") as log:
        server = subprocess.Popen(
            ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", sys.executable, "manage.py", "serve", "--port", str(house.port)],
            cwd=REPOSITORY,
            env=house.env,
            stdout=log,
            stderr=log,
        )
    try:
        eventually(house.is_ready, "not ready", seconds=20)
        assert house.wait_for("sim") is None
        upstream.script(*[Step(text="one two", delay_first_ms=1500)] * 400)
        peers = [Peer(house.port) for _ in range(400)]
        for peer in peers:
            peer.send(chat(key, "sim/gpt-4o"))
        statuses = []
        for peer in peers:
            peer.socket.settimeout(20)
            statuses.append(_status(peer))
            peer.socket.close()
        # For the last there was not even a file to say it with: they were closed.
        assert set(statuses) <= {200, 503, 0}
        assert statuses.count(200) >= 60
        assert statuses.count(503) >= 30
        upstream.reset()
        with Peer(house.port) as peer:
            assert peer.send(chat(key, "sim/gpt-4o")).answer().status == 200
        assert server.poll() is None
        assert "Traceback" not in house.log()
    finally:
        server.terminate()
        assert server.wait(20) == 0
        house.close()


def _status(peer: Peer) -> int:
    try:
        return peer.answer().status
    except ConnectionError:
        return 0
