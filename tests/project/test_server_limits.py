"""Clients that send too much, too slowly or too many: each gets its answer in words, and costs nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import re
import select
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from project.guard import Limits
from tests.project.raw_http import Answer, Peer, Small, chat, echo, memory_of, request, small, took
from tests.serving import Sluice, eventually
from tests.upstreams.openai import OpenAIUpstream, Step

LIMIT = 1 << 20
MIB = 1 << 20
HEAD_SECONDS = 0.8
PAUSE = 0.6


@pytest.fixture(scope="module")
def strict(serve: Callable[..., Sluice], upstream_server: OpenAIUpstream) -> Sluice:
    """With the times of `Limits`, scaled down."""
    sluice = serve(
        HEAD_SECONDS=str(HEAD_SECONDS),
        BODY_IDLE_SECONDS=str(PAUSE),
        BODY_SLOW_SECONDS="1.5",
        KEEP_ALIVE_SECONDS="1.2",
        BODY_LIMIT_BYTES=str(LIMIT),
        OPEN_REQUESTS="4",
        UPSTREAM_REQUESTS="4",
    )
    sluice.add_openai(upstream_server, prefix="sim")
    sluice.wait_for("sim")
    return sluice


@pytest.fixture(scope="module")
def key(strict: Sluice) -> str:
    return strict.issue_key()


@pytest.fixture(scope="module")
def door() -> Iterator[Small]:
    with small(echo) as server:
        yield server


def is_an_error(answer: Answer, status: int, code: str, *, kept: bool = False) -> bool:
    """In OpenAI's shape, with the id by which it may be asked about, and the connection is not kept unless told so."""
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.error.keys() == {"message", "type", "param", "code"}
    assert len(answer.headers["x-request-id"]) == 36
    assert answer.headers.get("connection") == (None if kept else "close")
    return True


# Heads


def test_F04_a_connection_that_says_nothing_is_closed(strict: Sluice) -> None:
    with Peer(strict.port) as peer:
        began = time.monotonic()
        assert peer.rest() == b""
        assert HEAD_SECONDS * 0.8 < took(began) < HEAD_SECONDS + 1.5


async def test_F04_five_hundred_slow_heads_are_closed_while_others_are_served(strict: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    closed_after: list[float] = []
    done = asyncio.Event()

    async def dribble() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", strict.port)
        began = time.monotonic()
        left = asyncio.create_task(reader.read())
        with contextlib.suppress(ConnectionError):
            for byte in request(key=key, more="X-Long: " + "a" * 500):
                writer.write(bytes([byte]))
                if (await asyncio.wait([left], timeout=0.1))[0]:
                    break
        answer = await left
        closed_after.append(took(began))
        assert answer.startswith(b"HTTP/1.1 408 ")
        writer.close()

    async def others() -> int:
        served = 0
        async with httpx.AsyncClient(base_url=strict.url, headers={"authorization": f"Bearer {key}"}, timeout=10) as client:
            while not done.is_set():
                served += (await client.get("/v1/models")).status_code == 200
        return served

    normal = asyncio.create_task(others())
    await asyncio.gather(*(dribble() for _ in range(500)))
    done.set()
    assert await normal > 10
    assert len(closed_after) == 500
    # By its own deadline each: 10 s in all, whatever came meanwhile, and the same here in scale.
    assert max(closed_after) < HEAD_SECONDS + 3


def test_F04_a_slow_head_on_a_used_connection_is_refused_too(strict: Sluice) -> None:
    with Peer(strict.port) as peer:
        assert peer.send(request("/healthz", method="GET")).answer().status == 200
        peer.send(b"GET /healthz HTTP/1.1\r\nX-")
        assert is_an_error(peer.answer(), 408, "request_timeout")


def test_a_connection_may_rest_between_requests_for_a_while(strict: Sluice) -> None:
    with Peer(strict.port) as peer:
        for _ in range(2):
            time.sleep(0.5)
            assert peer.send(request("/healthz", method="GET")).answer().status == 200
        began = time.monotonic()
        assert peer.rest() == b""
        assert took(began) > 0.9


LARGE = {
    "one field": (request(more="X-Large: " + "a" * (33 << 10) + "\r\n"), 431, "headers_too_large"),
    "a field of 4 MB": (request(more="X-Large: " + "a" * (4 << 20) + "\r\n"), 431, "headers_too_large"),
    "a name of 40 KB": (request(more="a" * (40 << 10) + ": 1\r\n"), 431, "headers_too_large"),
    "a field without an end": (request()[:-2] + b"X-Large: " + b"a" * (400 << 10), 431, "headers_too_large"),
    "many fields": (request(more="".join(f"X-{number}: 1\r\n" for number in range(100))), 431, "headers_too_large"),
    "fields with underscores": (request(more="X_1: 1\r\n" * 101), 431, "headers_too_large"),
    "10 000 repeats": (request(more="X-Same: 1\r\n" * 10_000), 431, "headers_too_large"),
    "all of it": (request(more="".join(f"X-{number}: {'a' * 900}\r\n" for number in range(40))), 431, "headers_too_large"),
    "the URL": (request("/v1/models?" + "a" * (8 << 10), method="GET"), 414, "url_too_long"),
    "a URL of 100 KB": (request("/" + "a" * (100 << 10), method="GET"), 414, "url_too_long"),
    "a URL without an end": (b"GET /" + b"a" * (400 << 10), 414, "url_too_long"),
}


@pytest.mark.parametrize("name", LARGE)
def test_B03_a_head_that_is_too_large_is_refused(door: Small, name: str) -> None:
    sent, status, code = LARGE[name]
    with Peer(door.port) as peer:
        with contextlib.suppress(ConnectionError):
            peer.send(sent)
        assert is_an_error(peer.answer(), status, code)
        assert peer.rest() == b""


def test_B03_a_head_just_below_its_limits_is_served(door: Small) -> None:
    fields = "".join(f"X-{number}: {'a' * 200}\r\n" for number in range(98))
    with Peer(door.port) as peer:
        assert peer.send(request(more=fields)).answer().status == 200
        assert peer.send(request("/" + "a" * ((8 << 10) - 1))).answer().status == 200
        # A large body in the same read is not taken for a part of the head.
        assert peer.send(request(body=b"x" * (60 << 10)) + request("/next", method="GET")).answer().status == 200
        assert peer.answer().status == 200


def test_B03_large_heads_cost_little(strict: Sluice) -> None:
    before = memory_of(strict.pid)
    for name in ("a field of 4 MB", "10 000 repeats", "a URL without an end") * 5:
        with Peer(strict.port) as peer:
            with contextlib.suppress(ConnectionError):
                peer.send(LARGE[name][0])
            assert peer.answer().status in (414, 431)
    assert memory_of(strict.pid) - before < 8 * MIB


# Bodies


@pytest.mark.parametrize("framing", ["Content-Length: 50\r\n", "Transfer-Encoding: chunked\r\n"])
def test_F05_a_body_that_stops_is_refused(strict: Sluice, key: str, framing: str) -> None:
    with Peer(strict.port) as peer:
        began = time.monotonic()
        peer.send(request(key=key, more=framing)).send(b"5\r\nhello\r\n")
        assert is_an_error(peer.answer(), 408, "request_timeout")
        assert PAUSE * 0.8 < took(began) < PAUSE + 1.5


def test_F05_a_body_that_drips_is_refused_in_the_end(strict: Sluice, key: str) -> None:
    with Peer(strict.port) as peer:
        began = time.monotonic()
        peer.send(request(key=key, more="Content-Length: 50000\r\n"))
        with contextlib.suppress(ConnectionError):
            while not select.select([peer.socket], [], [], 0.05)[0]:
                peer.send(b"x")
                assert took(began) < 5, "nobody minds"
        assert is_an_error(peer.answer(), 408, "request_timeout")
        assert took(began) > 1.2


def test_F05_a_slow_body_that_keeps_the_pace_is_served(strict: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    body = chat(key, "sim/gpt-4o", content="word " * 60_000)
    with Peer(strict.port) as peer:
        for at in range(0, len(body), 15_000):  # 2 s in all, at twice the least pace
            peer.send(body[at : at + 15_000])
            time.sleep(0.1)
        assert peer.answer().status == 200


def test_F05_a_client_whose_body_we_do_not_read_is_not_blamed() -> None:
    """The application waits for something else first; by then the body has filled what we take unasked."""

    async def busy(scope: dict, receive: object, send: object) -> None:
        await asyncio.sleep(1.5)
        await echo(scope, receive, send)

    with small(busy, Limits(body_idle_seconds=0.4, body_slow_seconds=0.6)) as server, Peer(server.port, send_buffer=4096) as peer:
        sent = request(body=b"x" * (300 << 10))
        peer.send(sent)
        assert peer.answer().status == 200


def pour(peer: Peer, piece: bytes) -> int:
    """Send until the other side answers or closes; how much it took."""
    sent, rest = 0, b""
    peer.socket.setblocking(False)
    with contextlib.suppress(ConnectionError):
        while sent < 300 * MIB:
            readable, writable, _ = select.select([peer.socket], [peer.socket], [], 10)
            if readable:
                break
            assert writable, "neither read nor answered"
            rest = rest or piece
            taken = peer.socket.send(rest)
            sent, rest = sent + taken, rest[taken:]
    peer.socket.setblocking(True)
    peer.socket.settimeout(10)
    return sent


CHUNK = b"%x\r\n%b\r\n" % (1 << 16, b"x" * (1 << 16))
BODIES = {
    "a true length": ("Content-Length: 314572800\r\n", b"x" * (1 << 16)),
    "a length that is too large": ("Content-Length: 9000000000000000000\r\n", b"x" * (1 << 16)),
    "chunks": ("Transfer-Encoding: chunked\r\n", CHUNK),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/accounts/login/", "/readyz"])
def test_B01_a_body_that_is_too_large_is_refused_and_not_taken(strict: Sluice, key: str, path: str, name: str) -> None:
    framing, piece = BODIES[name]
    before = memory_of(strict.pid)
    with Peer(strict.port, send_buffer=64 << 10) as peer:
        peer.send(request(path, key=key, more=framing))
        sent = pour(peer, piece)
        answer = peer.answer()
        peer.rest()
    if path == "/readyz" and name == "chunks":
        assert answer.status == 200  # answered before the body came; the connection ends with it
    else:
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    limit = LIMIT if path.startswith("/v1") else Limits().body_bytes
    assert sent < (limit if name == "chunks" else 0) + 8 * MIB  # what the sockets on both sides hold is in it
    assert memory_of(strict.pid) - before < 8 * MIB


def test_B01_what_exceeds_a_false_length_is_another_request_and_a_bad_one(strict: Sluice, key: str) -> None:
    with Peer(strict.port) as peer:
        peer.send(request(key=key, more="Content-Length: 2\r\n") + b"{}" + b"x" * 1000)
        assert peer.answer().status == 400  # no model
        assert is_an_error(peer.answer(), 400, "invalid_http")


@pytest.mark.parametrize("name", ["a true length", "chunks"])
@pytest.mark.parametrize("method", ["OPTIONS", "GET"])
def test_B01_a_body_that_no_answer_needs_is_not_taken_without_end(strict: Sluice, key: str, method: str, name: str) -> None:
    framing, piece = BODIES[name]
    with Peer(strict.port, send_buffer=64 << 10) as peer:
        peer.send(request("/v1/models", key="" if method == "OPTIONS" else key, method=method, more=framing))
        sent = pour_on(peer, piece, 32 * MIB)
        answer = peer.answer()
        peer.rest()
    assert answer.status == (204 if method == "OPTIONS" else 200)
    assert answer.headers["connection"] == "close"
    assert sent < 8 * MIB


def pour_on(peer: Peer, piece: bytes, most: int) -> int:
    """Send whatever is answered, until the other side closes or `most` bytes are gone; how many it took."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < most:
            sent += peer.socket.send(piece)
    return sent


def test_B02_who_has_no_key_gets_no_body_read(strict: Sluice) -> None:
    before = memory_of(strict.pid)
    with Peer(strict.port, send_buffer=64 << 10) as peer:
        peer.send(request(key="sk-sluice-wrong", more="Content-Length: 314572800\r\n"))
        sent = pour(peer, b"x" * (1 << 16))
        answer = peer.answer()
        peer.rest()
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert sent < 4 * MIB
    assert memory_of(strict.pid) - before < 8 * MIB


# Too many


def test_more_requests_than_may_be_open_get_a_quick_refusal(strict: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    upstream.script(*[Step(text="one two", delay_first_ms=1500)] * 4)
    waiting = [Peer(strict.port).send(chat(key, "sim/gpt-4o")) for _ in range(4)]
    eventually(lambda: len(upstream.posts) == 4, "the four did not arrive")
    before = counted(strict)
    with Peer(strict.port) as peer:
        assert peer.send(request("/readyz", method="GET")).answer().status == 200
    refused = 0
    with Peer(strict.port) as late:
        while (answer := late.send(chat(key, "sim/gpt-4o")).answer()).status != 200:
            assert is_an_error(answer, 503, "too_many_requests_open", kept=True)
            assert answer.headers["retry-after"] == "1"
            refused += 1
            time.sleep(0.1)
    for peer in waiting:
        with peer:
            assert peer.answer().status == 200
    assert refused > 0
    assert counted(strict) == before + refused


def counted(sluice: Sluice) -> int:
    page = httpx.get(f"{sluice.url}/metrics").text
    found = re.search(r'^sluice_refused_total{status="503",code="too_many_requests_open"} (\d+)$', page, re.MULTILINE)
    return int(found[1]) if found else 0


@pytest.fixture
def full() -> Iterator[Small]:
    """A server with room for one request, and one that stays."""
    with small(echo, Limits(open_requests=1, reader_seconds=0.5)) as server, Peer(server.port) as staying:
        staying.send(request("/silent"))
        eventually(lambda: server.server.server_state.tasks, "it did not arrive")
        yield server


def test_a_body_behind_a_quick_refusal_is_no_request(full: Small) -> None:
    refused = request(more="Content-Length: 60\r\n")
    with Peer(full.port) as peer:
        for _ in range(2):
            assert is_an_error(peer.send(refused).answer(), 503, "too_many_requests_open", kept=True)
            peer.send(b"GET /healthz HTTP/1.1\r\n").send(b"Host: 127.0.0.1\r\n\r\n".ljust(37))
        assert peer.send(request("/healthz", method="GET")).answer().status == 200
        assert peer.unread == b""


def test_quick_refusals_of_one_read_do_not_count_for_the_head_that_comes_with_them(full: Small) -> None:
    half = request()[:20]
    with Peer(full.port) as peer:
        peer.send(request(body=b"x" * 1000) * 50 + half)
        for _ in range(50):
            assert is_an_error(peer.answer(), 503, "too_many_requests_open", kept=True)
        assert is_an_error(peer.send(request()[20:]).answer(), 503, "too_many_requests_open", kept=True)


UNUSUAL = {
    "a large body": request(more="Content-Length: 100000\r\n"),
    "chunks": request(more="Transfer-Encoding: chunked\r\n"),
    "an expectation": request(more="Content-Length: 5\r\nExpect: 100-continue\r\n"),
    "an offer": request(more="Connection: upgrade\r\nUpgrade: h2c\r\n"),
    "a goodbye": request(more="Connection: close\r\n"),
    "HTTP/1.0": request(version="1.0"),
    "a page": request("/keys/", method="GET"),
    "a head alone": request("/keys/", method="HEAD"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_where_the_next_request_might_not_be_found_a_refusal_closes(full: Small, name: str) -> None:
    with Peer(full.port) as peer:
        assert is_an_error(peer.send(UNUSUAL[name]).answer(), 503, "too_many_requests_open")
        assert peer.rest() == b""


def test_who_takes_no_refusals_gets_no_more_of_them(full: Small) -> None:
    asks = request() * 100
    with Peer(full.port, receive_buffer=4 << 10) as peer, pytest.raises(ConnectionError):
        for _ in range(64 * MIB // len(asks)):
            peer.send(asks)
    assert full.refused[503, "too_many_requests_open"] < 1000  # of the million that it asked for


def test_more_connections_than_there_is_room_for_are_refused_and_closed() -> None:
    with small(echo, Limits(connections=3)) as server:
        resting = [Peer(server.port) for _ in range(3)]
        for peer in resting:
            assert peer.send(request()).answer().status == 200
        with Peer(server.port) as late:
            assert is_an_error(late.send(request()).answer(), 503, "too_many_requests_open")
        with Peer(server.port) as late:
            assert late.send(request("/readyz")).answer().status == 200
        resting.pop().socket.close()
        eventually(lambda: _is_served(server), "no room again")
        for peer in resting:
            peer.socket.close()


def _is_served(server: Small) -> bool:
    with Peer(server.port) as peer:
        return peer.send(request()).answer().status == 200


def test_an_answer_is_not_lost_when_the_client_still_sends(door: Small) -> None:
    """A refusal goes out at once; had the socket been closed with it, a reset might overtake it."""
    for _ in range(50):
        with Peer(door.port) as peer:
            peer.send(b"NONSENSE\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                peer.send(b"x" * 200_000)
            assert peer.answer().status == 400


def test_who_was_refused_and_stays_is_closed(door: Small) -> None:
    with Peer(door.port) as peer:
        peer.send(b"NONSENSE\r\n\r\n").answer()
        assert peer.rest() == b""
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            while took(began) < 5:
                peer.send(b"x")
                time.sleep(0.05)
        assert took(began) < 4


def test_a_bad_body_is_answered_before_the_application_is_done_with_it() -> None:
    heard: list[str] = []

    async def reads(scope: dict, receive: object, send: object) -> None:
        while True:
            message = await receive()  # type: ignore[operator]
            heard.append(message["type"])
            if message["type"] == "http.disconnect":
                return

    with small(reads) as server, Peer(server.port) as peer:
        peer.send(request(more="Transfer-Encoding: chunked\r\n") + b"3\r\nabc\r\n")
        eventually(lambda: heard == ["http.request"], "the body did not arrive")
        assert is_an_error(peer.send(b"zz\r\n").answer(), 400, "invalid_http")
        eventually(lambda: heard[-1] == "http.disconnect", "the application still waits")


@pytest.mark.parametrize("sends_first", [True, False])
def test_an_application_that_fails_is_answered_for(sends_first: bool) -> None:
    async def broken(scope: dict, receive: object, send: object) -> None:
        if sends_first:
            await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
            await send({"type": "http.response.body", "body": b"half", "more_body": True})  # type: ignore[operator]
        raise ValueError("a bug")

    with small(broken) as server, Peer(server.port) as peer:
        peer.send(request())
        if sends_first:
            assert not peer.rest().endswith(b"0\r\n\r\n")
        else:
            assert is_an_error(peer.answer(), 500, "internal_error")


def test_keep_alive_survives_many_requests_and_pauses(door: Small) -> None:
    with Peer(door.port) as peer:
        peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(200):
            sent = request(f"/{number}", body=b"x" * (number * 100))
            for at in range(0, len(sent), 7000):
                peer.send(sent[at : at + 7000])
            assert f'"/{number}"'.encode() in peer.answer().body
