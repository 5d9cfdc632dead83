"""B15: answers cut at every byte, mixed line ends, and bytes at random. Nothing hangs, nothing crashes, and what is read
does not depend on how it arrived."""

from __future__ import annotations

import asyncio
import gzip
import itertools
from typing import Any, cast

import httpx
import pytest
from asgiref.sync import async_to_sync
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.exchange import Unwatched, place_of
from providers.http1 import PAUSE_ABOVE_BYTES, READ_BYTES, Connection

OK = b"HTTP/1.1 200 OK\r\n"
PLACE = place_of("http://a")[0]


class Wire:
    """A socket's transport without a socket."""

    def __init__(self) -> None:
        self.closing = False
        self.paused = False

    def write(self, data: bytes) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False


class Home:
    def __init__(self) -> None:
        self.welcomed = 0

    def welcome(self, connection: Connection) -> None:
        self.welcomed += 1

    def forget(self, connection: Connection) -> None: ...


async def outcome(parts: list[bytes], *, then: str = "eof") -> tuple[Any, ...]:
    """What a caller sees when an answer arrives in these parts and then the peer closes: status, headers, body or problem."""
    home, wire = Home(), Wire()
    connection = Connection(PLACE, home, memoryview(bytearray(READ_BYTES)))
    connection.connection_made(cast(asyncio.BaseTransport, wire))

    async def read() -> tuple[Any, ...]:
        try:
            answer = await connection.ask(b"", b"", Unwatched())
        except (httpx.TransportError, httpx.DecodingError) as problem:
            return (type(problem),)
        body = b""
        try:
            async for chunk in answer.chunks():
                assert chunk
                body += chunk
        except (httpx.TransportError, httpx.DecodingError) as problem:
            return answer.status, answer.headers, type(problem)
        finally:
            await answer.close()
        return answer.status, answer.headers, body

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    for part in parts:
        if wire.closing:
            break
        assert not wire.paused or len(part) > PAUSE_ABOVE_BYTES
        connection.data_received(part)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    if not wire.closing:
        connection.eof_received()
    connection.connection_lost(None)
    seen = await asyncio.wait_for(reader, 2)
    return (*seen, home.welcomed)


see = async_to_sync(outcome)


def in_parts(wire: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(wire)}), len(wire)]
    return [wire[start:end] for start, end in itertools.pairwise(edges)]


PACKED = gzip.compress(b"data: [DONE]\n\n" * 3)
WHOLE = {
    "length": OK + b"Content-Type: text/plain\r\nContent-Length: 12\r\n\r\nhello, world",
    "chunked": OK + b"Transfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\nA\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\n",
    "until it closes": OK + b"X-A: 1\r\nX-A: 2\r\n\r\ndata: [DONE]\r\n\r\n",
    "interim": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nok",
    "gzip": OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(PACKED) + PACKED,
    "no body": b"HTTP/1.1 204 No Content\r\n\r\n",
    "1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
}


@pytest.mark.parametrize("name", WHOLE)
def test_b15_cut_at_any_byte_an_answer_reads_the_same(name: str):
    wire = WHOLE[name]
    whole = see([wire])
    assert whole[0] in (200, 204)
    assert isinstance(whole[2], bytes)
    for cut in range(1, len(wire)):
        assert see(in_parts(wire, [cut])) == whole
    assert see([wire[at : at + 1] for at in range(len(wire))]) == whole


@pytest.mark.parametrize("name", [name for name in WHOLE if name not in ("until it closes", "no body")])
def test_b15_cut_off_at_any_byte_an_answer_never_looks_whole(name: str):
    wire = WHOLE[name]
    for end in range(len(wire)):
        seen = see([wire[:end]])
        problem = seen[-2]
        assert isinstance(problem, type), (end, seen)
        assert issubclass(problem, httpx.TransportError | httpx.DecodingError)
        assert seen[-1] == 0, "a broken connection went home"


LINE_ENDS = st.sampled_from([b"\r\n", b"\n", b"\r", b"\r\r\n", b"\n\r", b""])
LINES = st.sampled_from(
    [
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 100 Continue",
        b"Content-Length: 3",
        b"Transfer-Encoding: chunked",
        b"X: y",
        b"",
        b"3",
        b"abc",
        b"0",
        b" fold",
    ]
)


@st.composite
def mixtures(draw: st.DrawFn) -> bytes:
    """Right lines in any order, with any ends."""
    parts = draw(st.lists(st.tuples(LINES, LINE_ENDS), max_size=12))
    return draw(st.sampled_from([b"", OK, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"])) + b"".join(map(b"".join, parts))


@settings(max_examples=300, deadline=None)
@given(wire=mixtures() | st.binary(max_size=200), cuts=st.lists(st.integers(1, 200), max_size=6))
def test_b15_whatever_comes_is_an_answer_or_a_failure_and_the_same_however_it_is_cut(wire: bytes, cuts: list[int]):
    whole = see([wire] if wire else [])

    def kind(seen: tuple[Any, ...]) -> tuple[Any, ...]:
        # How much of the body had come when it went wrong may differ, and whether a cut or a mistake was seen first.
        return tuple(part for part in seen if not isinstance(part, type))

    assert kind(see(in_parts(wire, cuts) if wire else [])) == kind(whole)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A right answer in which a few bytes have been changed, doubled or lost."""
    wire = bytearray(WHOLE[draw(st.sampled_from(sorted(WHOLE)))])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(wire) - 1)))
        match draw(st.sampled_from("cdl")):
            case "c":
                wire[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "d":
                wire[at:at] = wire[at : at + draw(st.integers(1, 20))]
            case "l":
                del wire[at : at + draw(st.integers(1, 20))]
    return bytes(wire)


@settings(max_examples=300, deadline=None)
@given(wire=damaged(), cuts=st.lists(st.integers(1, 150), max_size=4))
def test_b15_a_damaged_answer_never_hangs_or_crashes(wire: bytes, cuts: list[int]):
    see(in_parts(wire, cuts))


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=3000), max_size=20),
    cuts=st.lists(st.integers(1, 40_000), max_size=20),
    coding=st.sampled_from(["", "gzip"]),
)
def test_b15_a_body_is_what_was_sent_whatever_its_chunks_and_however_they_are_cut(pieces: list[bytes], cuts: list[int], coding: str):
    body = b"".join(pieces)
    if coding:
        packed = gzip.compress(body)
        pieces = [packed[at : at + 50] for at in range(0, len(packed), 50)]
    head = OK + (b"Content-Encoding: gzip\r\n" if coding else b"") + b"Transfer-Encoding: chunked\r\n\r\n"
    wire = head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"

    seen = see(in_parts(wire, cuts))

    assert (seen[0], seen[2], seen[3]) == (200, body, 1)
