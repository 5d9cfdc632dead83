"""Streams cut into frames: the same ones however the bytes arrive, and nothing that has no end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers import frames, wire
from providers.failures import UpstreamProtocol
from providers.frames import Frame, Frames

MIB = 1 << 20

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.lists(st.dictionaries(texts, values, max_size=3) | st.lists(values, max_size=3), min_size=1, max_size=5)
bom = st.sampled_from([b"", b"\xef\xbb\xbf"])


def cut(data: bytes, *at: int) -> list[bytes]:
    edges = [0, *sorted({place for place in at if 0 < place < len(data)}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def read(pieces: list[bytes], *, plain_text: bool = False, most_bytes: int = wire.MOST_EVENT_BYTES) -> list[Frame]:
    """All frames of a stream that arrives in these pieces. Raises what feeding raised."""
    found: list[Frame] = []
    reader = Frames(plain_text=plain_text, most_bytes=most_bytes)
    for piece in pieces:
        found += reader.feed(piece)
    return found + reader.end()


def text_in(found: list[Frame]) -> bytes:
    return b"".join(one.data for one in found)


def told(pieces: list[bytes], *, plain_text: bool) -> tuple[list[Frame] | bytes, str]:
    """What a reader makes of a stream: frames (of text, only what they say together) and the failure that ends it."""
    found: list[Frame] = []
    reader = Frames(plain_text=plain_text)
    failed = ""
    try:
        for piece in pieces:
            found += reader.feed(piece)
        found += reader.end()
        found += reader.end()  # a failure that waited behind the last frames
    except UpstreamProtocol as problem:
        failed = problem.message
    return (text_in(found) if reader.form == "text" else found), failed


def every_cut(data: bytes) -> Iterator[list[bytes]]:
    yield cut(data, *range(len(data)))
    for place in range(1, len(data)):
        yield cut(data, place)


SSE = 'data: {"a":"é𝄞"}\n\ndata:{"b":2}\n\nevent: add\nid: 7\ndata: {"c":\ndata: 3}\n\n: ping\n\nretry: 5\n\ndata: [DONE]\n\n'.encode()
SSE_FRAMES = [Frame('{"a":"é𝄞"}'.encode()), Frame(b'{"b":2}'), Frame(b'{"c":\n3}', "add"), Frame(b"[DONE]")]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_events_are_the_same_wherever_they_are_cut(line_end: bytes) -> None:
    data = SSE.replace(b"\n", line_end)

    assert read([data]) == SSE_FRAMES
    for pieces in every_cut(data):
        assert read(pieces) == SSE_FRAMES


@given(payloads=objects, start=bom, line_end=st.sampled_from(["\n", "\r\n", "\r"]), space=st.sampled_from(["", " "]), data=st.data())
def test_any_events_are_the_same_however_they_are_cut(payloads: Any, start: bytes, line_end: str, space: str, data: Any) -> None:
    lines = [json.dumps(one, ensure_ascii=data.draw(st.booleans())) for one in payloads]
    stream = start + "".join(f"event: e{n}{line_end}data:{space}{line}{line_end * 2}" for n, line in enumerate(lines)).encode()

    expected = [Frame(line.encode(), f"e{n}") for n, line in enumerate(lines)]
    assert read([stream]) == expected
    assert read(cut(stream, *range(len(stream)))) == expected
    assert read(cut(stream, *data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))) == expected


@given(payloads=objects, start=bom, between=st.sampled_from([b"", b"\n", b"\r\n", b" \n\n"]), last=st.booleans(), data=st.data())
def test_any_objects_are_the_same_however_they_are_cut(payloads: Any, start: bytes, between: bytes, last: bool, data: Any) -> None:
    """Concatenated, one a line, with escapes, brackets in strings, and with or without the last line's end."""
    indent = data.draw(st.sampled_from([None, 1]))
    written = [json.dumps(one, indent=indent, ensure_ascii=data.draw(st.booleans())).encode() for one in payloads]
    stream = start + between.join(written) + (between if last else b"")

    expected = [Frame(one) for one in written]
    assert read([stream]) == expected
    assert read(cut(stream, *range(len(stream)))) == expected
    assert read(cut(stream, *data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))) == expected


@pytest.mark.parametrize(
    "text",
    ['{"a":"\\\\"}{"b":"\\""}', '{"a":"}{"}{"b":"[\\\\\\"{"}', '{"\\u007b":"\\\\\\\\"}{"b":"\\n"}'],
    ids=["back", "brackets", "many"],
)
def test_an_escape_may_be_cut_in_two(text: str) -> None:
    whole = read([text.encode()])

    assert len(whole) == 2
    assert all(json.loads(one.data) for one in whole)
    for pieces in every_cut(text.encode()):
        assert read(pieces) == whole


def test_a_line_that_was_cut_off_in_a_string_does_not_swallow_those_behind_it() -> None:
    lines = b'{"n":1}\n{"text":"Hel\n{"n":2}\n\n{"n":3}'

    assert [one.data for one in read([lines])] == [b'{"n":1}', b'{"text":"Hel', b'{"n":2}', b'{"n":3}']
    for pieces in every_cut(lines):
        assert read(pieces) == read([lines])


@given(text=texts.filter(lambda text: text.strip() != ""), data=st.data())
def test_plain_text_is_handed_on_without_a_letter_cut_in_two(text: str, data: Any) -> None:
    stream = ("Ä " + text).encode()
    pieces = cut(stream, *data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))

    for one in (cut(stream, *range(len(stream))), pieces):
        found = read(one, plain_text=True)
        assert "".join(frame.data.decode() for frame in found) == "Ä " + text
    assert Frames(plain_text=True).feed(stream) == [Frame(stream)], "what is whole does not wait"


@pytest.mark.parametrize("text", ["d", "da", "event", "i", "retry", "\n\n  d", "  Hello", "idle: no", "datum"])
def test_a_text_that_begins_as_an_event_might_is_text(text: str) -> None:
    for pieces in every_cut(text.encode()):
        assert text_in(read(pieces, plain_text=True)) == text.encode()


def test_a_byte_order_mark_is_no_part_of_a_text() -> None:
    for pieces in every_cut(b"\xef\xbb\xbfHello"):
        assert text_in(read(pieces, plain_text=True)) == b"Hello"


MARKS = [b"data:", b"event:", b"{", b"}", b'"', b"\\", b"\n", b"\r\n", b"\r", b"<", b":", b"\xf0\x9d", b"x", b" "]


@given(stream=st.binary(max_size=60) | st.lists(st.sampled_from(MARKS)).map(b"".join), plain_text=st.booleans())
def test_rubbish_reads_the_same_however_it_is_cut(stream: bytes, plain_text: bool) -> None:
    whole = told([stream], plain_text=plain_text)

    assert told(cut(stream, *range(len(stream))), plain_text=plain_text) == whole


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>", b" \r\n<html>", b"\xef\xbb\xbf<html>", b": ping\n\n<html>\n\n"])
@pytest.mark.parametrize("plain_text", [False, True])
def test_a_page_is_no_answer(page: bytes, plain_text: bool) -> None:
    for pieces in every_cut(page):
        with pytest.raises(UpstreamProtocol, match="page"):
            read(pieces, plain_text=plain_text)


@pytest.mark.parametrize("text", [b"upstream error", b"\xff\xfe\x00", b"d", b"datum"])
def test_text_is_refused_where_none_is_expected(text: bytes) -> None:
    with pytest.raises(UpstreamProtocol):
        read([text])


def test_an_error_that_is_said_bare_behind_comments_is_a_frame() -> None:
    stream = b': ping\n\n{"error":{"message":"no"}}\n\n'

    for pieces in every_cut(stream):
        assert read(pieces) == [Frame(b'{"error":{"message":"no"}}')]


def test_frames_before_a_failure_are_given_first() -> None:
    """How a stream was cut into reads must not decide what is heard of it."""
    reader = Frames()
    assert reader.feed(b'data: {"n":1}\n\n<html>\n\n') == [Frame(b'{"n":1}')]
    assert reader.problem is not None
    for call in (reader.end, lambda: reader.feed(b"data: 2\n\n")):
        with pytest.raises(UpstreamProtocol, match="page"):
            call()


def test_nothing_is_nothing() -> None:
    for pieces in ([], [b""], [b"\n \r\n"], [b"\xef\xbb\xbf"], [b": ping\n\n"]):
        for plain_text in (False, True):
            assert read(pieces, plain_text=plain_text) == []


# What has no end


@pytest.mark.parametrize("plain_text", [False, True])
@pytest.mark.parametrize("begin", [b"data: ", b'{"a":"', b": "])
def test_a_frame_without_an_end_is_broken_off(begin: bytes, plain_text: bool) -> None:
    reader = Frames(plain_text=plain_text, most_bytes=1000)
    reader.feed(begin + b"x" * 900)

    with pytest.raises(UpstreamProtocol, match="too large"):
        reader.feed(b"x" * 200)


@pytest.mark.parametrize("frame", [b'data: "%b"\n\n', b'{"a":"%b"}'])
def test_a_frame_that_comes_whole_may_be_no_larger(frame: bytes) -> None:
    """The limit does not depend on how it was cut, and what came before it is still heard."""
    stream = frame % b"x" + frame % (b"x" * 1100)
    for pieces in ([stream], cut(stream, 500, 1000), cut(stream, *range(len(stream)))):
        reader, found = Frames(most_bytes=1000), []
        with pytest.raises(UpstreamProtocol, match="too large"):
            for piece in pieces:
                found += reader.feed(piece)
            reader.end()
        assert [len(one.data) < 100 for one in found] == [True]


def test_blank_lines_without_an_end_keep_nothing() -> None:
    reader = Frames(most_bytes=1000)
    for _ in range(100):
        assert reader.feed(b"\n" * 100) == []
    assert reader.feed(b'{"a":1}') == [Frame(b'{"a":1}')]

    reader = Frames(plain_text=True, most_bytes=1000)
    with pytest.raises(UpstreamProtocol, match="too large"):
        for _ in range(100):
            reader.feed(b"\n" * 100)


class Work:
    """How many bytes were looked at for the end of a frame, or copied only to be kept: linear in the stream, or we pay for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        whole_events, brackets, first_byte = wire.whole_events, frames._BRACKETS, frames._FIRST_BYTE
        work = self

        def counted_events(buffer: bytes) -> int:
            work.bytes += len(buffer)
            return whole_events(buffer)

        class Counted:
            def __init__(self, pattern: Any) -> None:
                self.pattern = pattern

            def finditer(self, buffer: bytes, start: int = 0) -> Any:
                work.bytes += len(buffer) - start
                return self.pattern.finditer(buffer, start)

            def search(self, buffer: bytes, start: int = 0) -> Any:
                found = self.pattern.search(buffer, start)
                work.bytes += (found.end() if found else len(buffer)) - start
                return found

        monkeypatch.setattr(wire, "whole_events", counted_events)
        monkeypatch.setattr(frames, "_BRACKETS", Counted(brackets))
        monkeypatch.setattr(frames, "_FIRST_BYTE", Counted(first_byte))

    def piece(self, data: bytes) -> bytes:
        """A piece that notices when what was kept is copied to put it behind."""
        work = self

        class Piece(bytes):
            def __radd__(self, kept: object) -> Any:
                if isinstance(kept, bytes):
                    work.bytes += len(kept)
                return NotImplemented

        return Piece(data)


@pytest.mark.parametrize(
    ("begin", "fill", "end"),
    [
        (b"data: ", b"x", b"\n\n"),
        (b": ping\n\ndata: ", b"\n", b"data:x\n\n"),
        (b'{"a":"', b"\\", b'"}'),
        (b'{"a":[', b"[],", b"[]]}"),
        (b"", b"\n", b'{"a":1}'),
    ],
    ids=["event", "lines", "escapes", "brackets", "blank"],
)
def test_a_frame_in_small_pieces_costs_no_more_than_its_size(
    monkeypatch: pytest.MonkeyPatch, begin: bytes, fill: bytes, end: bytes
) -> None:
    fill = b"data: y" + fill if begin.startswith(b":") else fill
    stream = begin + fill * (MIB // len(fill) // 2 * 2) + end
    work = Work(monkeypatch)
    reader = Frames()
    found = [one for at in range(0, len(stream), 1024) for one in reader.feed(work.piece(stream[at : at + 1024]))]

    assert len(found) == 1
    assert work.bytes < 3 * len(stream)


def test_a_text_in_small_pieces_costs_no_more_than_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    reader = Frames(plain_text=True)
    stream = b"\n" * MIB + b"x" * MIB
    found = [one for at in range(0, len(stream), 1024) for one in reader.feed(work.piece(stream[at : at + 1024]))]

    assert text_in(found) == stream
    assert work.bytes < 3 * len(stream)
