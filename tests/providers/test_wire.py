"""How a stream is cut into events, and how usage is read in its spellings."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers import wire
from providers.price import Tokens

lines = st.sampled_from([b"data: 1", b"data:2", b": comment", b"event: x", b"id: 3", b"data: \xc3\xa4", b"retry: 5"])
ends = st.sampled_from([b"\n", b"\r\n", b"\r"])


@st.composite
def events(draw: st.DrawFn) -> list[bytes]:
    """Events as servers write them: one kind of line end within one event."""
    written = []
    for _ in range(draw(st.integers(1, 6))):
        end = draw(ends)
        written.append(b"".join(line + end for line in draw(st.lists(lines, min_size=1, max_size=3))) + end)
    return written


@given(events())
def test_events_cut_apart_and_joined_again_are_the_input(written: list[bytes]):
    assert b"".join(wire.split_events(b"".join(written))) == b"".join(written)


@given(st.lists(st.sampled_from([b"data: 1", b"\n", b"\r", b"\r\n", b": c", b"x"])).map(b"".join))
def test_whatever_comes_nothing_is_lost_or_added(stream: bytes):
    assert b"".join(wire.split_events(stream)) == stream
    assert 0 <= wire.whole_events(stream) <= len(stream)


@given(events(), ends)
def test_each_event_is_one_piece(written: list[bytes], end: bytes):
    same = [event.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", end) for event in written]

    assert wire.split_events(b"".join(same)) == same


@given(st.lists(st.sampled_from([b"data: 1", b"data: " + b"x" * 5000, b"\n", b"\r", b"\r\n", b"\n\n", b": c"])).map(b"".join))
def test_one_event_after_the_other_is_what_all_at_once_are(stream: bytes):
    found, at = [], 0
    while at < len(stream):
        found.append(wire.first_event(stream, at))
        at += len(found[-1])
    assert found == [one for one in wire.split_events(stream) if one]


@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
def test_lines_that_end_otherwise_cost_about_the_same(end: bytes):
    """A read holds thousands of small events: none may look through all that follow."""

    def seconds(stream: bytes) -> float:
        best = 1e9
        for _ in range(3):
            began, at = time.perf_counter(), 0
            while at < len(stream):
                at += len(wire.first_event(stream, at))
            best = min(best, time.perf_counter() - began)
        return best

    assert seconds((b":" + end * 2) * 40_000) < 20 * seconds(b":\n\n" * 40_000)


@given(events(), st.data())
def test_cut_anywhere_the_whole_events_are_the_ones_that_ended(written: list[bytes], data: st.DataObject):
    """As a reader does: what is whole is taken, the rest waits for more."""
    stream = b"".join(written)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    taken, rest = [], b""
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        rest += stream[start:stop]
        whole = wire.whole_events(rest)
        taken += wire.split_events(rest[:whole])
        rest = rest[whole:]

    assert b"".join(taken) + rest == stream
    assert [found for event in taken if (found := wire.data_of(event))] == [found for event in written if (found := wire.data_of(event))]


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\r\n\r\n", b"{}"),
        (b"data:  {}\n\n", b" {}"),
        (b"event: x\ndata: 1\ndata: 2\nid: 9\n\n", b"1\n2"),
        (b"data: 1\rdata:2\r\r", b"1\n2"),
        (b": keep-alive\n\n", b""),
        (b"retry: 10\n\n", b""),
        (b"data\n\n", b""),
    ],
)
def test_the_data_of_an_event(event: bytes, data: bytes):
    assert wire.data_of(event) == data


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 5}, Tokens(10, 0, 0, 5, 0)),
        ({"input_tokens": 10, "output_tokens": 5}, Tokens(10, 0, 0, 5, 0)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}, Tokens(6, 4, 0, 5, 0)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 3}}, Tokens(10, 0, 0, 2, 3)),
        (
            {"input_tokens": 10, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 3}},
            Tokens(3, 4, 3, 5, 0),
        ),
        ({"prompt_tokens": 10, "completion_tokens": 5, "prompt_cache_hit_tokens": 8}, Tokens(2, 8, 0, 5, 0)),
        ({"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 99}}, Tokens(0, 10, 0, 0, 0)),
        ({"prompt_tokens": -1, "completion_tokens": -1}, Tokens()),
        ({"total_tokens": 7}, Tokens(7)),
        ({"prompt_tokens": None, "completion_tokens": None}, None),
        ({}, None),
    ],
)
def test_usage_becomes_disjoint_parts(usage: dict[str, object], tokens: Tokens | None):
    seen = wire.decode_event(wire.encode_json({"usage": usage})).usage

    assert seen is not None
    assert seen.tokens() == tokens


@given(*[st.none() | st.integers(-5, 50)] * 6)
def test_the_parts_never_exceed_the_whole(prompt: int | None, done: int | None, total: int | None, cached: int, written: int, thought: int):
    usage = wire.Usage(
        prompt_tokens=prompt,
        completion_tokens=done,
        total_tokens=total,
        prompt_tokens_details=wire.Details(cached_tokens=cached, cache_write_tokens=written),
        completion_tokens_details=wire.Details(reasoning_tokens=thought),
    )
    if (tokens := usage.tokens()) is not None:
        assert all(part >= 0 for part in (tokens.fresh_input, tokens.cache_read, tokens.cache_write, tokens.output, tokens.reasoning))
        if prompt is not None:
            assert tokens.input == max(0, prompt)
        if done is not None:
            assert tokens.all_output == max(0, done)


@pytest.mark.parametrize("spelling", ["prompt_cache_hit_tokens", "cached_tokens"])
def test_cached_tokens_stand_elsewhere_with_some_vendors(spelling: str):
    usage = wire.decode_event(wire.encode_json({"usage": {"prompt_tokens": 10, "completion_tokens": 2, spelling: 4}})).usage

    assert usage is not None
    assert usage.tokens() == Tokens(fresh_input=6, cache_read=4, output=2)
