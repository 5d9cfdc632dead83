"""A stream that already speaks OpenAI goes back as it came, however the network cuts it; only usage is read from it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers import wire
from providers.adapter import OpenAICompatible, SameShape, Shape, Target, shape_of
from providers.failures import (
    ContextLength,
    InvalidAtUpstream,
    Overloaded,
    RateLimited,
    UpstreamBroke,
    UpstreamFailure,
    UpstreamProtocol,
    UpstreamServer,
)
from providers.price import Tokens
from providers.secrets import SecretText, redact


def chunk(content: str | None = None, *, finish: str | None = None, **more: object) -> bytes:
    delta = {} if content is None else {"content": content}
    return wire.event({"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "unknown": {"kept": True}, **more})


USAGE = wire.event({"id": "c", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}})
STREAM = [chunk(""), chunk("Hello"), b": keep-alive\n\n", chunk(" world"), chunk(finish="stop"), USAGE, wire.DONE]


def read(parts: list[bytes], *, drop_usage_event: bool = False, says_done: bool = True) -> tuple[SameShape, bytes]:
    reader = SameShape(drop_usage_event=drop_usage_event, says_done=says_done)
    return reader, b"".join(reader.feed(part) for part in parts) + reader.end()


def fails(parts: list[bytes], **options: bool) -> tuple[UpstreamFailure, bytes]:
    """What it raises, and what had gone out before."""
    reader = SameShape(**({"drop_usage_event": False, "says_done": True} | options))
    out = b""
    with pytest.raises(UpstreamFailure) as raised:
        for part in parts:
            out += reader.feed(part)
        out += reader.end()
    return raised.value, out


@st.composite
def cut(draw: st.DrawFn, stream: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    return [stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


@given(cut(b"".join(STREAM)))
def test_cut_anywhere_the_bytes_go_back_untouched(parts: list[bytes]):
    reader, out = read(parts)

    assert out == b"".join(STREAM)
    assert reader.tokens == Tokens(fresh_input=9, output=2)
    assert reader.started
    assert reader.finished


@given(cut(b"".join(STREAM)))
def test_the_usage_event_that_we_asked_for_is_taken_out_again(parts: list[bytes]):
    reader, out = read(parts, drop_usage_event=True)

    assert out == b"".join(STREAM).replace(USAGE, b"")
    assert reader.tokens == Tokens(fresh_input=9, output=2)


@given(cut(b"".join(STREAM).replace(b"\n", b"\r\n")))
def test_windows_line_ends_stay_as_they_are(parts: list[bytes]):
    assert read(parts)[1] == b"".join(STREAM).replace(b"\n", b"\r\n")


def test_a_usage_event_with_choices_is_never_dropped():
    last = chunk(finish="stop", usage={"prompt_tokens": 1, "completion_tokens": 1})

    reader, out = read([chunk("a"), last, wire.DONE], drop_usage_event=True)

    assert last in out
    assert reader.tokens == Tokens(fresh_input=1, output=1)


def test_of_cumulative_usage_the_last_counts():
    events = [chunk("a", usage={"prompt_tokens": 3, "completion_tokens": count}) for count in (1, 2, 3)]

    assert read([*events, chunk(finish="stop"), wire.DONE])[0].tokens == Tokens(fresh_input=3, output=3)


def test_usage_inside_a_choice_is_found():
    event = wire.event({"choices": [{"delta": {}, "finish_reason": "stop", "usage": {"prompt_tokens": 4, "completion_tokens": 1}}]})

    assert read([chunk("a"), event, wire.DONE])[0].tokens == Tokens(fresh_input=4, output=1)


@pytest.mark.parametrize(
    "first",
    [
        wire.event({"choices": [], "prompt_filter_results": []}),
        wire.event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}),
        wire.event({"choices": [{"delta": {"content": None}, "finish_reason": ""}]}),
        wire.event({"choices": [{"index": 0}]}),
        b": OPENROUTER PROCESSING\n\n",
        b"retry: 3000\n\n",
    ],
)
def test_what_says_nothing_yet_is_no_content(first: bytes):
    reader = SameShape(drop_usage_event=False, says_done=True)

    assert reader.feed(first) == first
    assert not reader.started


@pytest.mark.parametrize(
    "delta",
    [{"content": "a"}, {"tool_calls": [{"index": 0}]}, {"reasoning_content": "hm"}, {"refusal": "no"}, {"reasoning": "hm"}, {"audio": {}}],
)
def test_any_kind_of_content_starts_the_stream(delta: dict[str, object]):
    reader = SameShape(drop_usage_event=False, says_done=True)
    reader.feed(wire.event({"choices": [{"index": 0, "delta": delta}]}))

    assert reader.started == bool(next(iter(delta.values())))


def test_without_done_a_finish_reason_is_enough():
    reader, out = read([chunk("a"), chunk(finish="length")])

    assert reader.finished
    assert out == chunk("a") + chunk(finish="length") + wire.DONE


def test_without_done_every_choice_needs_its_reason():
    def of(index: int, content: str | None, finish: str | None = None) -> bytes:
        return wire.event({"choices": [{"index": index, "delta": {"content": content} if content else {}, "finish_reason": finish}]})

    events = [of(0, "a"), of(1, "b"), of(0, None, "stop"), of(1, "c")]
    assert isinstance(fails(events)[0], UpstreamBroke)  # it was cut off: the other choice had not come to its end
    assert read([*events, of(1, None, "stop")])[1].endswith(wire.DONE)


@pytest.mark.parametrize("more", [USAGE, chunk("more"), wire.event({"error": {"message": "lost it"}}), b"data: {\n\n" * 3])
@given(data=st.data())
def test_what_follows_done_is_not_read_however_the_network_cuts_it(more: bytes, data: st.DataObject):
    stream = chunk("a") + chunk(finish="stop") + wire.DONE
    reader, out = SameShape(drop_usage_event=False, says_done=True), b""
    for part in data.draw(cut(stream + more)):
        out += reader.feed(part)
        if reader.finished:
            break

    assert out + reader.end() == stream
    assert reader.failure is None
    assert reader.tokens is None


def test_done_without_a_finish_reason_is_enough():
    assert read([chunk("a"), wire.DONE])[1] == chunk("a") + wire.DONE


def test_the_last_event_may_lack_its_blank_line():
    reader, out = read([chunk("a"), b"data: [DONE]"])

    assert reader.finished
    assert out.startswith(chunk("a") + b"data: [DONE]")


def test_a_stream_that_ends_in_the_middle_broke():
    problem, out = fails([chunk("a"), chunk("b")])

    assert isinstance(problem, UpstreamBroke)
    assert out == chunk("a") + chunk("b")


def test_a_stream_that_ends_before_any_content_may_be_tried_elsewhere():
    assert isinstance(fails([chunk("")])[0], UpstreamProtocol)
    assert isinstance(fails([])[0], UpstreamProtocol)
    assert isinstance(fails([b": hello\n\n"])[0], UpstreamProtocol)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "slow down", "code": 429}, RateLimited),
        ({"message": "busy", "status": 503}, Overloaded),
        ({"message": "oops"}, UpstreamServer),
        ("oops", UpstreamServer),
        ({"message": "this model's maximum context length is 8", "code": 400}, ContextLength),
    ],
)
def test_an_error_before_content_is_what_it_says(error: object, kind: type[UpstreamFailure]):
    for stream in (wire.event({"error": error}), wire.encode_json({"error": error})):
        problem, out = fails([stream])

        assert type(problem) is kind
        assert out == b""


def test_an_error_after_content_broke_the_stream():
    problem, out = fails([chunk("a"), wire.event({"error": {"message": "lost it", "code": "oops"}}), wire.DONE])

    assert isinstance(problem, UpstreamBroke)
    assert problem.message == "lost it"
    assert out == chunk("a")


def test_an_upstreams_error_never_carries_a_secret():
    redact.learn_more(["planted-secret-value"])

    problem, _ = fails([wire.event({"error": {"message": "key planted-secret-value and sk-abcdefghijklmnop is wrong\nsecond line"}})])

    assert problem.message == "key [redacted] and [redacted] is wrong second line"


@pytest.mark.parametrize("page", [b"<!doctype html><title>502</title>\n\n", b"<html>", b"service unavailable", b'{"ok": true}'])
def test_a_page_is_no_stream(page: bytes):
    problem, out = fails([page])

    assert isinstance(problem, UpstreamProtocol)
    assert "html" not in problem.message
    assert out == b""


@pytest.mark.parametrize("bad", [b"data: {nonsense\n\n", b'data: {"choices":[{"text":"\xff"}]}\n\n'])
def test_two_bad_events_are_skipped_and_three_are_not_a_stream(bad: bytes):

    _, out = read([bad, bad, chunk("a"), chunk(finish="stop"), wire.DONE])
    assert out == chunk("a") + chunk(finish="stop") + wire.DONE
    assert isinstance(fails([bad, bad, bad, chunk("a"), chunk(finish="stop"), wire.DONE])[0], UpstreamProtocol)
    assert isinstance(fails([chunk("a"), bad + wire.event({"usage": None}), bad + USAGE, bad + USAGE])[0], UpstreamBroke)


def test_a_byte_order_mark_does_not_hide_the_first_event():
    _, out = read([b"\xef\xbb\xbf" + chunk("a"), chunk(finish="stop"), wire.DONE])

    assert out == chunk("a") + chunk(finish="stop") + wire.DONE


def test_events_without_blank_lines_between_them_are_read_one_by_one():
    glued = b"".join(event.rstrip(b"\n") + b"\n" for event in (chunk("a"), chunk("b"), chunk(finish="stop")))

    reader, out = read([glued + b"\n", wire.DONE])

    assert out == chunk("a") + chunk("b") + chunk(finish="stop") + wire.DONE
    assert reader.events == 2


def test_an_event_beyond_all_measure_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wire, "MOST_EVENT_BYTES", 1000)

    assert isinstance(fails([chunk("a"), b"data: " + b"x" * 2000])[0], UpstreamBroke)


def test_responses_end_with_their_own_last_event():
    created = b"event: response.created\n" + wire.event({"type": "response.created", "response": {"id": "r"}})
    delta = b"event: response.output_text.delta\n" + wire.event({"type": "response.output_text.delta", "delta": "hi"})
    done = b"event: response.completed\n" + wire.event(
        {"type": "response.completed", "response": {"usage": {"input_tokens": 5, "output_tokens": 2}}}
    )

    reader = SameShape(drop_usage_event=False, says_done=False)
    assert reader.feed(created) == created
    assert not reader.started
    assert reader.feed(delta + done) == delta + done
    assert reader.end() == b""
    assert reader.started
    assert reader.tokens == Tokens(fresh_input=5, output=2)
    assert isinstance(fails([created, delta], says_done=False)[0], UpstreamBroke)


def test_a_failed_response_passes_without_its_secrets():
    redact.learn_more(["planted-secret-value"])
    failed = wire.event({"type": "response.failed", "response": {"error": {"message": "planted-secret-value refused"}}})

    _, out = read([failed], says_done=False)

    assert b"planted" not in out
    assert b"response.failed" in out


def test_output_is_estimated_by_events_or_by_bytes():
    reader, _ = read([chunk("hi"), chunk(" there"), chunk(finish="stop"), wire.DONE])
    long, _ = read([chunk("x" * 4000), chunk(finish="stop"), wire.DONE])

    assert reader.estimated_output() == 2  # to say why it ends is no token
    assert long.estimated_output() == 1000


def test_an_invalid_request_in_a_200_is_the_clients_to_mend():
    problem, _ = fails([wire.event({"error": {"message": "no", "code": 400, "param": "tools"}})])

    assert isinstance(problem, InvalidAtUpstream)
    assert problem.param == "tools"


def content(text: str) -> bytes:
    value = {"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def shape() -> Shape:
    found, _ = shape_of(content("x"), wire.decode_event(wire.data_of(content("x"))))
    assert found is not None
    return found


def test_events_of_one_shape_are_known_without_a_look():
    texts = ["one", "", 'a "quote"', "back\\slash", "ä\n\n"]
    whole = b"".join(map(content, texts))

    assert shape().run(whole) == (len(texts), len(whole))
    assert shape().run(whole[:-1]) == (len(texts) - 1, len(whole) - len(content(texts[-1])))
    assert len(whole) - len(texts) * shape().frame_bytes == sum(len(json.dumps(text)) - 2 for text in texts)


@pytest.mark.parametrize(
    "odd",
    [
        wire.DONE,
        b": a comment\n\n",
        wire.event({"error": {"message": "boom"}}),
        content("x").replace(b"null", b'"stop"'),
        content("x").replace(b'"id"', b'"usage": {"prompt_tokens": 1}, "id"'),
        content("x")[:-1],
        content("x").replace(b"\n", b"\r\n"),
        b"event: x\n" + content("x"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_event_of_another_shape_among_them_is_looked_at(odd: bytes, place: int):
    events = [content("a"), content("b")]
    events.insert(place, odd)
    assert shape().run(b"".join(events)) == (place, place * len(content("a")))


def test_usage_is_found_behind_many_events_of_one_shape_in_the_same_read():
    events = [content("a")] * 50 + [wire.event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 50}}), wire.DONE]
    reader = SameShape(drop_usage_event=True, says_done=True)
    assert reader.feed(events[0]) == events[0]
    assert reader.feed(b"".join(events[1:])) == b"".join([*events[1:50], wire.DONE])
    assert (reader.tokens, reader.finished) == (Tokens(7, 0, 0, 50, 0), True)


@pytest.mark.parametrize("sent_before", [[], [chunk("Hello")]])
def test_a_callers_own_key_is_in_no_error_of_a_stream(sent_before: list[bytes]):
    own = Target("openai", 1, "l", "https://api.example.org/v1", SecretText("Caller0wnW0rds"), "m", "openai/m", callers_key=True)
    reader = SameShape(drop_usage_event=False, says_done=True, target=own)
    with pytest.raises(UpstreamFailure) as raised:
        for part in [*sent_before, wire.event({"error": {"message": "the key Caller0wnW0rds has no quota", "code": "quota"}})]:
            reader.feed(part)
    assert raised.value.message == "the key [redacted] has no quota"
    reader = SameShape(drop_usage_event=False, says_done=True, target=own)
    with pytest.raises(UpstreamFailure) as raised:
        for part in [*sent_before, wire.event({"error": {"message": "no", "code": "key.Caller0wnW0rds", "param": "Caller0wnW0rds"}})]:
            reader.feed(part)
    assert "Caller0wnW0rds" not in f"{raised.value.body()}"


@pytest.mark.parametrize("length", [480, 490, 497])
def test_a_callers_own_key_is_not_cut_in_two_before_it_is_looked_for(length: int):
    own = Target("openai", 1, "l", "https://api.example.org/v1", SecretText("Caller0wnW0rds"), "m", "openai/m", callers_key=True)
    body = wire.encode_json({"error": {"message": "x" * length + " Caller0wnW0rds is wrong"}})
    problem = OpenAICompatible().failure(own, 400, {}, body)
    assert "Call" not in problem.message
