"""What every translating adapter says to the client: one role, one id, one reason, usage if asked for, [DONE] only when it is whole."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers import wire
from providers.adapter import Ask, Target
from providers.chat import BadFrame, ChatReader, usage_json
from providers.failures import UpstreamBroke, UpstreamFailed, UpstreamFailure, UpstreamProtocol, UpstreamServer
from providers.price import Tokens
from providers.secrets import SecretText

TARGET = Target("toy", 1, "toy", "https://toy.example", SecretText("sk-toy-0123456789"), "theirs", "toy/ours")
DONE = b"data: [DONE]\n\n"
BROKEN = "The upstream's stream ended before it was complete."


class Toy(ChatReader):
    """`{"say", "think", "call", "more", "note", "why", "used", "end", "fail"}`: what each method is for."""

    plain_text = True

    def frame(self, data: bytes, event: str) -> None:
        value = wire.decode_json(data)
        if not isinstance(value, dict):
            raise BadFrame
        if value.get("fail"):
            raise UpstreamServer(value["fail"])
        self.text(value.get("say") or "")
        self.reasoning(value.get("think") or "")
        if call := value.get("call"):
            self.tool_call(*call, **value.get("with", {}))
        if more := value.get("more"):
            self.more_arguments(*more)
        if "note" in value:
            self.extra("note", value["note"])
        if "why" in value:
            self.reason(value["why"])
        if "used" in value:
            self.count(Tokens(*value["used"]))
        if value.get("end"):
            self.complete()

    def closed(self) -> None:
        if self.form == "text" and self.ended_between_frames:
            self.complete()


def ask(*, stream: bool = True, usage: bool = False) -> Ask:
    body = {"model": "toy/ours", "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
    return Ask("chat/completions", body, stream=stream, request_id="0123456789abcdef", client_wants_usage=usage)


def toy(*, stream: bool = True, usage: bool = False) -> Toy:
    return Toy(ask(stream=stream, usage=usage), TARGET)


def sse(*values: object, last: bytes = b"") -> bytes:
    return b"".join(wire.event(value) for value in values) + last


def streamed(data: bytes, *, usage: bool = False) -> list[dict[str, Any]]:
    """The events of a stream that is whole."""
    reader = toy(usage=usage)
    said = reader.feed(data) + reader.end()
    assert said.endswith(DONE)
    assert said.count(b"[DONE]") == 1
    return [json.loads(one.removeprefix(b"data: ")) for one in said.removesuffix(DONE).split(b"\n\n") if one]


def whole(data: bytes) -> dict[str, Any]:
    answer = toy(stream=False).whole(data)
    return dict(json.loads(answer.body))


def deltas(events: list[dict[str, Any]]) -> list[Any]:
    return [choice["delta"] for event in events for choice in event["choices"]]


HELLO = sse({"say": "Hel"}, {"say": "lo"}, {"why": "stop"}, {"used": [9, 0, 0, 2, 0]}, {"end": True})


def test_a_stream_has_one_role_one_id_and_one_reason() -> None:
    events = streamed(HELLO)

    assert deltas(events) == [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {}]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "stop"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert {(event["id"], event["model"], event["created"]) for event in events} == {
        ("chatcmpl-0123456789abcdef", "toy/ours", events[0]["created"])
    }
    assert all("usage" not in event and event["choices"] for event in events), "many clients fail on a chunk without choices"


def test_usage_is_told_to_whoever_asked_for_it() -> None:
    *events, last = streamed(HELLO, usage=True)

    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    assert all(event["usage"] is None for event in events)


def test_an_upstream_that_counts_nothing_is_estimated_for_the_client_and_for_the_row() -> None:
    silent = sse({"say": "Hello there, my dear friend"}, {"why": "stop"})
    last = streamed(silent, usage=True)[-1]
    answer = toy(stream=False).whole(silent)

    assert last["usage"]["prompt_tokens"] == -(-len(wire.encode_json(ask().body)) // 4)
    assert last["usage"]["completion_tokens"] == len("Hello there, my dear friend") // 4
    assert answer.tokens is None
    assert answer.estimated_output() == json.loads(answer.body)["usage"]["completion_tokens"] == last["usage"]["completion_tokens"]


def test_the_estimate_counts_bytes_not_letters() -> None:
    reader = toy()
    reader.feed(sse({"say": "的" * 40}))

    assert (reader.content_bytes, reader.estimated_output()) == (120, 30)


def test_all_that_a_frame_can_mean_is_in_the_stream_and_in_the_whole_answer() -> None:
    data = sse(
        {"think": "hm"}, {"say": "Let me look."}, {"call": ["call_1", "look", '{"q":']}, {"more": [0, "1}"]},
        {"call": ["call_2", "rest"], "with": {"extra_content": {"a": 1}}}, {"note": [1]}, {"used": [5, 3, 1, 2, 4]}, {"end": True},
    )  # fmt: skip
    events, answer = streamed(data, usage=True), whole(data)

    calls = [delta["tool_calls"][0] for delta in deltas(events) if "tool_calls" in delta]
    assert calls == [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"q":'}},
        {"index": 0, "function": {"arguments": "1}"}},
        {"index": 1, "id": "call_2", "type": "function", "function": {"name": "rest", "arguments": ""}, "extra_content": {"a": 1}},
    ]
    assert deltas(events)[1] == {"reasoning_content": "hm"}
    assert {"note": [1]} in deltas(events)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Let me look.",
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"q":1}'}},
            {"id": "call_2", "type": "function", "function": {"name": "rest", "arguments": ""}, "extra_content": {"a": 1}},
        ],
        "note": [1],
    }
    assert answer["usage"] == events[-1]["usage"]
    assert answer["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 6,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }
    assert usage_json(Tokens(output=1), {"cost": 2})["cost"] == 2


def test_only_calls_leave_the_content_null() -> None:
    message = whole(sse({"call": ["call_1", "look", "{}"]}, {"end": True}))["choices"][0]["message"]

    assert message["content"] is None


@pytest.mark.parametrize(("said", "heard"), [("length", "length"), ("content_filter", "content_filter"), ("of tomorrow", "stop")])
def test_the_first_reason_counts_and_an_unknown_one_ends_nothing(said: str, heard: str) -> None:
    data = sse({"say": "x"}, {"why": said}, {"why": "tool_calls"}, {"end": True})

    assert streamed(data)[-1]["choices"][0]["finish_reason"] == heard
    assert whole(data)["choices"][0]["finish_reason"] == heard


def test_an_answer_may_be_empty_where_the_upstream_says_why() -> None:
    data = sse({"why": "content_filter"}, {"end": True})

    assert deltas(streamed(data)) == [{"role": "assistant", "content": ""}, {}]
    assert whole(data)["choices"][0]["message"]["content"] == ""


# How it ends


@pytest.mark.parametrize("data", [HELLO, sse({"say": "Hello"}, last=DONE), sse({"say": "Hello"}, {"why": "stop"}), b"Hello there"])
def test_a_stream_that_is_whole_says_so_once(data: bytes) -> None:
    assert streamed(data)
    assert whole(data)["choices"][0]["message"]["content"].startswith("Hello")


@pytest.mark.parametrize("behind", [b"<html>\n\n", sse({"say": "more"}), sse({"fail": "no"}), b"\xff" * 10])
def test_what_comes_behind_the_end_is_not_read(behind: bytes) -> None:
    assert deltas(streamed(HELLO + behind)) == deltas(streamed(HELLO))
    reader = toy()
    reader.feed(HELLO)
    assert reader.feed(behind) + reader.end() == b""


@pytest.mark.parametrize("data", [b"", sse({"say": ""}), b": ping\n\n", b'data: {"say":', b"\n\n"])
def test_nothing_said_and_cut_off_may_be_tried_elsewhere(data: bytes) -> None:
    with pytest.raises(UpstreamProtocol, match=BROKEN):
        streamed(data)
    with pytest.raises(UpstreamProtocol, match=BROKEN):
        whole(data)


def test_cut_off_after_content_is_a_broken_stream_but_not_a_broken_whole_answer() -> None:
    data = sse({"say": "Hel"})
    with pytest.raises(UpstreamBroke, match=BROKEN):
        streamed(data)
    with pytest.raises(UpstreamProtocol, match=BROKEN) as caught:
        whole(data)
    assert isinstance(caught.value, UpstreamFailed), "nothing has gone to the client: another account may be tried"


def test_an_error_in_the_stream_is_a_failure_of_its_own_kind_until_content_has_gone() -> None:
    with pytest.raises(UpstreamServer, match="on fire"):
        streamed(sse({"fail": "on fire"}))
    with pytest.raises(UpstreamServer, match="on fire"):
        whole(sse({"say": "Hel"}, {"fail": "on fire"}))
    reader = toy()
    assert b"Hel" in reader.feed(sse({"say": "Hel"}))
    with pytest.raises(UpstreamBroke, match="on fire") as caught:
        reader.feed(sse({"fail": "on fire"}))
    assert caught.value.code == "upstream_error"


@pytest.mark.parametrize("end", [sse({"fail": "on fire"}), b"<html>\n\n", sse(1, 2, 3)])
def test_what_came_in_the_same_read_before_a_failure_is_heard(end: bytes) -> None:
    reader = toy()
    said = reader.feed(sse({"say": "Hello"}) + end)

    assert b"Hello" in said
    assert b"[DONE]" not in said
    assert isinstance(reader.failure, UpstreamBroke)
    with pytest.raises(UpstreamBroke):
        reader.end()


# What cannot be read


@pytest.mark.parametrize("bad", [b"{", b"1", b'{"say":"\xff"}', b"[" * 20_000, b'"\\ud800"'])
def test_two_bad_frames_among_good_ones_are_skipped_and_three_are_not(bad: bytes) -> None:
    frame = b"data: " + bad + b"\n\n"
    assert {"content": "Hello"} in deltas(streamed(frame + sse({"say": "Hello"}) + frame + DONE))

    for read in (streamed, whole):
        with pytest.raises(UpstreamFailure, match=r"could not be read"):
            read(sse({"say": "Hello"}) + frame * 3 + DONE)


@pytest.mark.parametrize("end", [DONE, b""])
def test_nothing_but_a_bad_frame_is_no_answer(end: bytes) -> None:
    for read in (streamed, whole):
        with pytest.raises(UpstreamProtocol):
            read(b"data: {\n\n" + end)


def test_events_without_a_blank_line_between_them_are_told_apart() -> None:
    data = b'data: {"say":"Hel"}\ndata: {"say":"lo"}\ndata: {"why":"stop"}\ndata: [DONE]\n\n'

    assert deltas(streamed(data))[1:] == [{"content": "Hel"}, {"content": "lo"}, {}]


def test_one_object_over_several_lines_of_data_is_one_frame() -> None:
    assert deltas(streamed(b'data: {"say":\ndata: "Hello"}\n\n' + DONE))[1] == {"content": "Hello"}


@pytest.mark.parametrize("page", [b"<html>Bad gateway</html>", b"\r\n<!doctype html>\n\n"])
def test_a_page_is_no_answer(page: bytes) -> None:
    for read in (streamed, whole):
        with pytest.raises(UpstreamProtocol, match="page"):
            read(page)


# Text


def test_plain_text_is_content() -> None:
    assert deltas(streamed("Hé 𝄞 42".encode()))[1:] == [{"content": "Hé 𝄞 42"}, {}]
    assert whole(b'Say "hi"\n\nand go.')["choices"][0]["message"]["content"] == 'Say "hi"\n\nand go.'


@pytest.mark.parametrize("rubbish", [b"\xff\xfe\x00", b"PNG\x00\x00", b"caf\xe9", b"\xf0\x9d"])
def test_bytes_that_are_no_text_are_no_answer(rubbish: bytes) -> None:
    for read in (streamed, whole):
        with pytest.raises(UpstreamFailure, match="no text"):
            read(rubbish)


# However it is cut


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)
meanings = st.one_of(
    st.builds(lambda text: {"say": text}, words),
    st.builds(lambda text: {"think": text}, words),
    st.builds(lambda text: {"call": ["call", text, "{}"]}, words),
    st.builds(lambda text: {"why": text}, st.sampled_from(["stop", "length", "odd"])),
    st.builds(lambda number: {"used": [number, 0, 0, number, 0]}, st.integers(0, 9)),
    st.sampled_from([{"end": True}, {"fail": "on fire"}, 7, {}]),
)


def outcome(pieces: list[bytes]) -> tuple[bytes, str, str]:
    """All that a client hears, and the failure that ends it."""
    reader, said = toy(usage=True), b""
    reader._chunk_head = b"data: {"  # without the time
    reader._created = 0
    try:
        for piece in pieces:
            said += reader.feed(piece)
            if reader.failure is not None:
                raise reader.failure
        return said + reader.end(), "", ""
    except UpstreamFailure as problem:
        return said, type(problem).__name__, problem.message


@given(
    values=st.lists(meanings, max_size=6), end=st.sampled_from([DONE, b"", b"<html>\n\n", b"data: {"]), lines=st.booleans(), data=st.data()
)
def test_how_a_stream_is_cut_decides_nothing(values: list[Any], end: bytes, lines: bool, data: Any) -> None:
    # One object a line, without any sign of events; or events.
    objects = b"".join(json.dumps(value).encode() + b"\n" for value in values if isinstance(value, dict))
    stream = objects if lines else sse(*values) + end
    at = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[start:stop] for start, stop in zip([0, *at], [*at, len(stream)], strict=True)]

    assert outcome(pieces) == outcome([stream])
    assert outcome([stream[at : at + 1] for at in range(len(stream))]) == outcome([stream])


def test_long_arguments_in_small_pieces_cost_what_they_are_long():
    """A model that writes a file does so: each piece must not cost what all before it are long."""

    def seconds(pieces: int) -> float:
        reader = toy()
        reader.tool_call("c", "write")
        began = time.perf_counter()
        for _ in range(pieces):
            reader.more_arguments(0, "0123456789")
            reader._out.clear()
        return time.perf_counter() - began

    assert min(seconds(80_000) for _ in range(2)) < 30 * max(seconds(8_000) for _ in range(2))
