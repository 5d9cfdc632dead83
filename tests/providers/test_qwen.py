"""Qwen, from bytes: what a request must look like, what is mended in answers, what its errors mean, and its sign-in's data.

Numbers in names and comments are sections of the protocol reference gemini-qwen-codegeex.md."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from typing import Any

import pytest

from providers import failures, registry, wire
from providers.adapter import USER_AGENT, Ask, Target
from providers.adapters import qwen
from providers.failures import UpstreamBroke, UpstreamFailure, UpstreamProtocol
from providers.price import Tokens
from providers.secrets import SecretText

QWEN = registry.adapter("qwen")
HELLO: Any = [{"role": "user", "content": "Hello"}]
OAUTH = {"auth": "oauth"}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "coder-model"}
USAGE = {"prompt_tokens": 12, "completion_tokens": 30, "total_tokens": 42}


def target(model: str = "qwen3-coder-plus", *, base_url: str = "https://d.example/compatible-mode/v1", **settings: str) -> Target:
    return Target("qwen", 1, "mine", base_url, SecretText("sk-its-key-0123456789"), model, f"qwen/{model}", settings)


def ask(*, stream: bool = False, wants_usage: bool = True, **body: Any) -> Ask:
    body = {"model": "qwen/x", "messages": HELLO, "stream": stream} | body
    return Ask("chat/completions", body, stream=stream, request_id="0199-abc", client_wants_usage=wants_usage)


def sent(model: str = "qwen3-coder-plus", *, stream: bool = False, settings: dict[str, str] | None = None, **body: Any) -> Any:
    return json.loads(QWEN.request(ask(stream=stream, wants_usage=False, **body), target(model, **(settings or {}))).body)


# 3.2 Where it goes and with which headers


@pytest.mark.parametrize(
    ("base_url", "url"),
    [
        ("https://dashscope.aliyuncs.com/compatible-mode/v1", "https://dashscope.aliyuncs.com/compatible-mode/v1/chat/completions"),
        ("https://coding.dashscope.aliyuncs.com/v1", "https://coding.dashscope.aliyuncs.com/v1/chat/completions"),
        ("http://127.0.0.1:9001", "http://127.0.0.1:9001/compatible-mode/v1/chat/completions"),
        ("http://127.0.0.1:9001/compatible-mode/", "http://127.0.0.1:9001/compatible-mode/v1/chat/completions"),
    ],
)
def test_with_a_key_the_base_url_chooses(base_url: str, url: str):
    assert QWEN.request(ask(), target(base_url=base_url)).url == url


@pytest.mark.parametrize(
    ("resource_url", "url"),
    [
        ("portal.qwen.ai", "https://portal.qwen.ai/v1/chat/completions"),
        (" portal.qwen.ai/ ", "https://portal.qwen.ai/v1/chat/completions"),
        ("https://portal.qwen.ai/v1", "https://portal.qwen.ai/v1/chat/completions"),
        ("https://portal.qwen.ai/v1/", "https://portal.qwen.ai/v1/chat/completions"),
        ("portal.qwen.ai:8443/api", "https://portal.qwen.ai:8443/api/v1/chat/completions"),
        ("http://127.0.0.1:9001", "http://127.0.0.1:9001/v1/chat/completions"),
        ("http://127.0.0.1:9001/v1/", "http://127.0.0.1:9001/v1/chat/completions"),
    ],
)
def test_with_a_sign_in_the_token_reply_chooses(resource_url: str, url: str):
    """Q15. Plain http only to the operator's own origin."""
    account = target(base_url="http://127.0.0.1:9001", **OAUTH, resource_url=resource_url)
    assert QWEN.request(ask(), account).url == url


@pytest.mark.parametrize(
    "resource_url",
    [
        "http://portal.qwen.ai",
        "http://127.0.0.1:9002",
        "https://127.0.0.1:9001",
        "127.0.0.1",
        "[::1]:9001",
        "localhost",
        "https://localhost/v1",
        "ftp://portal.qwen.ai",
        "https://portal.qwen.ai@evil.example",
        "https://portal.qwen.ai?x=",
        "https://portal.qwen.ai#",
        "https://portal qwen.ai",
        "https://",
        "2130706433",
        "https://0x7f000001.1",
        "portal.qwen.ai:99999",
    ],
)
def test_a_token_goes_to_no_other_place_than_https_or_the_operators_own(resource_url: str):
    account = target(base_url="http://127.0.0.1:9001", **OAUTH, resource_url=resource_url)
    with pytest.raises(failures.UpstreamUnreachable):
        QWEN.request(ask(), account)


def test_without_a_place_in_the_token_reply_it_is_the_portal_or_the_operators_own():
    assert QWEN.request(ask(), target(base_url=QWEN.base_url, **OAUTH)).url == "https://portal.qwen.ai/v1/chat/completions"
    assert QWEN.request(ask(), target(base_url="http://127.0.0.1:9001", **OAUTH)).url == "http://127.0.0.1:9001/v1/chat/completions"


def test_a_place_from_a_sign_in_that_was_left_does_not_count_for_a_key():
    assert QWEN.request(ask(), target(auth="api_key", resource_url="portal.qwen.ai")).place.origin[1] == "d.example"


def test_headers():
    stream = QWEN.request(ask(stream=True), target(**OAUTH)).headers
    assert stream["Authorization"] == "Bearer sk-its-key-0123456789"
    assert (stream["Accept"], stream["Content-Type"]) == ("text/event-stream", "application/json")
    assert stream["X-DashScope-CacheControl"] == "enable"
    assert stream["X-DashScope-AuthType"] == "qwen-oauth"
    assert stream["User-Agent"] == stream["X-DashScope-UserAgent"] == USER_AGENT
    whole = QWEN.request(ask(), target(user_agent="Acme/1")).headers
    assert whole["User-Agent"] == whole["X-DashScope-UserAgent"] == "Acme/1"
    assert whole["Accept"] == "application/json"
    assert "X-DashScope-AuthType" not in whole


# 3.2 The body


def test_unknown_fields_and_dashscopes_own_go_out_as_they_came():
    own = {"top_k": 3, "repetition_penalty": 1.1, "preserve_thinking": True, "enable_thinking": True, "thinking_budget": 7}
    body = sent(temperature=0, parallel_tool_calls=False, field_of_tomorrow={"deep": [1, "ü"]}, **own)
    assert body == {
        "model": "qwen3-coder-plus",
        "messages": HELLO,
        "stream": False,
        "temperature": 0,
        "parallel_tool_calls": False,
        "field_of_tomorrow": {"deep": [1, "ü"]},
        **own,
    }


def test_what_means_nothing_there_is_dropped():
    """3.6: all of OpenAI's own but `parallel_tool_calls`. Nulls are as good as nothing."""
    body = sent(store=True, service_tier="flex", user="u", logit_bias={"1": 2}, n=1, stop=None, stream_options=None)
    assert body.keys() == {"model", "messages", "stream"}


def test_more_than_one_choice_is_refused():
    with pytest.raises(failures.InvalidAtUpstream) as raised:
        sent(n=2)
    assert (raised.value.param, raised.value.code, raised.value.status) == ("n", "unsupported_parameter", 400)


def test_usage_is_always_asked_for_in_streams_and_nowhere_else():
    assert sent(stream=True)["stream_options"] == {"include_usage": True}
    assert sent(stream=True, stream_options={"include_usage": False})["stream_options"] == {"include_usage": True}
    assert "stream_options" not in sent(stream_options={"include_usage": True})
    assert (sent(stream=True)["stream"], sent()["stream"]) == (True, False)


def test_the_portal_gets_one_system_message_and_it_is_first():
    """Q18."""
    parts = [{"type": "text", "text": "And polite."}]
    messages = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "developer", "content": parts},
        {"role": "system", "content": ""},
    ]
    empty = {"type": "text", "text": "", "cache_control": {"type": "ephemeral"}}
    [system, user] = sent("coder-model", settings=OAUTH, messages=messages)["messages"]
    assert system == {"role": "system", "content": [empty, {"type": "text", "text": "Be brief."}, *parts]}
    assert user == HELLO[0]
    assert sent("coder-model", settings=OAUTH)["messages"] == [{"role": "system", "content": [empty]}, *HELLO]


def test_with_a_key_system_messages_are_merged_only_where_there_is_need():
    assert sent()["messages"] == HELLO
    one = [{"role": "system", "content": "Be brief.", "name": "boss"}, *HELLO]
    assert sent(messages=one)["messages"] == one
    assert sent(messages=[{"role": "developer", "content": "x"}, *HELLO])["messages"][0] == {"role": "system", "content": "x"}
    several = [*HELLO, {"role": "system", "content": "a"}, {"role": "developer", "content": "b"}]
    assert sent(messages=several)["messages"] == [{"role": "system", "content": "a\n\nb"}, *HELLO]
    mixed = [
        {"role": "system", "content": "a"},
        {"role": "system", "content": [{"type": "text", "text": "b", "cache_control": {}}]},
        *HELLO,
    ]
    assert sent(messages=mixed)["messages"][0]["content"] == [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b", "cache_control": {}},
    ]


def test_tools_go_out_and_are_left_out_when_there_are_none():
    assert sent(tools=[TOOL], tool_choice="auto")["tools"] == [TOOL]
    assert sent(tools=[], tool_choice="auto").keys() == {"model", "messages", "stream"}


@pytest.mark.parametrize(
    ("model", "given", "most"),
    [
        ("coder-model", {"max_completion_tokens": 100}, 100),
        ("coder-model", {"max_tokens": 100_000}, 65_536),
        ("coder-model", {"max_completion_tokens": 100_000, "max_tokens": 5}, 65_536),
        ("some-other", {"max_completion_tokens": 100_000}, 100_000),
        ("qwen3-plus", {"max_tokens": 100_000}, 100_000),
        ("coder-model", {}, None),
    ],
)
def test_the_limit_of_output_goes_by_its_older_name_and_no_higher_than_the_model(model: str, given: Any, most: int | None):
    body = sent(model, **given)
    assert body.get("max_tokens") == most
    assert "max_completion_tokens" not in body


@pytest.mark.parametrize(
    ("effort", "switches"),
    [
        (None, {}),
        ("none", {"enable_thinking": False}),
        ("minimal", {"enable_thinking": True, "thinking_budget": 1024}),
        ("low", {"enable_thinking": True, "thinking_budget": 1024}),
        ("medium", {"enable_thinking": True, "thinking_budget": 8192}),
        ("high", {"enable_thinking": True, "thinking_budget": 24_576}),
        ("xhigh", {"enable_thinking": True, "thinking_budget": 32_768}),
    ],
)
def test_effort_becomes_dashscopes_switches(effort: str | None, switches: Any):
    assert thinking(sent(reasoning_effort=effort)) == switches


def thinking(body: Any) -> Any:
    return {name: body[name] for name in ("enable_thinking", "thinking_budget", "reasoning_effort") if name in body}


def test_dashscopes_own_switches_go_before_effort_and_an_unknown_effort_is_refused():
    assert thinking(sent(reasoning_effort="high", enable_thinking=False)) == {"enable_thinking": False}
    assert thinking(sent(reasoning_effort="high", thinking_budget=5)) == {"thinking_budget": 5}
    with pytest.raises(failures.InvalidAtUpstream) as raised:
        sent(reasoning_effort="heroic")
    assert raised.value.param == "reasoning_effort"


def test_a_model_that_understands_effort_gets_it_alone():
    given = {"reasoning_effort": "high", "enable_thinking": True, "thinking_budget": 5}
    assert thinking(sent("qwen3.8-max-preview", **given)) == {"reasoning_effort": "high"}
    assert thinking(sent("qwen3.8-max", enable_thinking=True)) == {"enable_thinking": True}


@pytest.mark.parametrize(
    "form",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "look_up"}}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    ],
)
@pytest.mark.parametrize("model", ["coder-model", "qwen3.8-max"])
def test_where_the_form_of_the_answer_is_forced_nothing_is_thought(form: Any, model: str):
    body = sent(model, tools=[TOOL], reasoning_effort="high", thinking_budget=5, **form)
    assert thinking(body) == {"enable_thinking": False}
    assert form.items() <= body.items()


@pytest.mark.parametrize("free", [{"tool_choice": "auto"}, {"tool_choice": "none"}, {"response_format": {"type": "text"}}])
def test_where_it_is_not_thinking_stays_as_it_was_asked(free: Any):
    assert thinking(sent(tools=[TOOL], **free)) == {}
    assert thinking(sent(tools=[TOOL], enable_thinking=True, **free)) == {"enable_thinking": True}


def test_a_model_that_always_thinks_is_asked_again_without_the_switch():
    said = {"error": {"message": "The value of the enable_thinking parameter is restricted to True.", "code": "invalid_parameter_error"}}
    problem = QWEN.failure(target(), 400, {}, wire.encode_json(said))
    assert isinstance(problem, failures.OptionRefused)
    again = ask(reasoning_effort="none")
    again.left_out.add(problem.option)
    assert thinking(json.loads(QWEN.request(again, target()).body)) == {}


@pytest.mark.parametrize("url", ["https://example.org/a.png", "data:image/png;base64,aGk="])
@pytest.mark.parametrize(
    ("model", "in_full"),
    [("coder-model", True), ("qwen-vl-max", True), ("qwen3.6-plus", True), ("qwen3-max", False), ("vision-model", False)],
)
def test_pictures_pass_and_are_looked_at_in_full_by_those_that_can(url: str, model: str, in_full: bool):
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    body = sent(model, messages=[{"role": "user", "content": content}])
    assert body["messages"][-1]["content"] == content
    assert body.get("vl_high_resolution_images", False) is in_full
    assert "vl_high_resolution_images" not in sent(model)
    assert sent(model, messages=body["messages"], vl_high_resolution_images=False)["vl_high_resolution_images"] is False


# 3.4 Streams


def chunk(delta: Any = None, reason: str | None = None, **more: Any) -> bytes:
    return wire.event({**HEAD, "choices": [{"index": 0, "delta": delta or {}, "finish_reason": reason}], "usage": None, **more})


ROLE = chunk({"role": "assistant", "content": ""})
END = chunk({"content": ""}, "stop")
COUNTED = wire.event({**HEAD, "choices": [], "usage": USAGE})


def read(*parts: bytes, wants_usage: bool = True, reader: Any = None) -> Any:
    """What the client gets, event by event; the last is "[DONE]" where it is said."""
    reader = reader or QWEN.reader(ask(stream=True, wants_usage=wants_usage), target())
    said = b"".join(reader.feed(part) for part in parts) + reader.end()
    events = [event.removeprefix(b"data: ") for event in said.split(b"\n\n") if event.startswith(b"data:")]
    return [json.loads(event) if event[:1] == b"{" else event.decode() for event in events]


def deltas(events: Any) -> Any:
    return [choice["delta"] for event in events if isinstance(event, dict) for choice in event["choices"] if choice["delta"]]


def said(events: Any, field: str = "content") -> str:
    return "".join(delta.get(field) or "" for delta in deltas(events))


def reasons(events: Any) -> list[str]:
    return [one["finish_reason"] for event in events if isinstance(event, dict) for one in event["choices"] if one["finish_reason"]]


def calls(events: Any) -> Any:
    """(index, id, name, arguments) of each call, as an SDK puts them together."""
    found: dict[int, list[Any]] = {}
    for delta in deltas(events):
        for piece in delta.get("tool_calls", ()):
            if piece["index"] not in found:
                found[piece["index"]] = [piece["index"], piece["id"], piece["function"]["name"], ""]
                assert piece["type"] == "function"
            else:
                assert piece.keys() == {"index", "function"}
                assert piece["function"].keys() == {"arguments"}
            found[piece["index"]][3] += piece["function"]["arguments"]
    return [tuple(one) for one in found.values()]


def fails(*parts: bytes) -> tuple[UpstreamFailure, bytes, Any]:
    """What it raises, what had gone out before, and the reader."""
    reader = QWEN.reader(ask(stream=True), target())
    out = b""
    with pytest.raises(UpstreamFailure) as raised:
        for part in parts:
            out += reader.feed(part)
            if reader.failure is not None:
                raise reader.failure
        out += reader.end()
    return raised.value, out, reader


def test_a_stream_of_thoughts_text_finish_and_usage():
    """Q9. The finish comes once, after it the usage, then [DONE]; unknown fields stay; the model has its public name."""
    events = read(
        chunk({"role": "assistant", "content": None, "reasoning_content": "Think"}, system_fingerprint="fp"),
        chunk({"content": "Hel"}),
        chunk({"content": "lo", "role": None}),
        END,
        COUNTED,
        wire.DONE,
    )
    assert deltas(events) == [
        {"role": "assistant", "content": "", "reasoning_content": "Think"},
        {"content": "Hel"},
        {"content": "lo"},
    ]
    assert reasons(events) == ["stop"]
    assert events[-3]["choices"][0]["finish_reason"] == "stop"
    assert (events[-2]["choices"], events[-2]["usage"]) == ([], USAGE)
    assert events[-1] == "[DONE]"
    assert {event["model"] for event in events[:-1]} == {"qwen/qwen3-coder-plus"}
    assert {event["id"] for event in events[:-1]} == {"chatcmpl-1"}
    assert events[0]["system_fingerprint"] == "fp"
    assert all(event["usage"] is None for event in events[:-2])


def test_a_client_that_did_not_ask_for_usage_sees_none_and_it_is_counted():
    reader = QWEN.reader(ask(stream=True, wants_usage=False), target())
    events = read(ROLE, chunk({"content": "a"}), END, COUNTED, wire.DONE, reader=reader)
    assert all(event["choices"] and "usage" not in event for event in events[:-1])
    assert reader.tokens == Tokens(fresh_input=12, output=30)


def test_log_probabilities_of_a_choice_stay():
    [first, *_] = read(
        wire.event({**HEAD, "choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [1]}, "finish_reason": None}]}),
        END,
        wire.DONE,
    )
    assert first["choices"][0]["logprobs"] == {"content": [1]}


def test_roles_and_empty_texts_are_said_once():
    events = read(ROLE, chunk({"role": "", "content": ""}), chunk({"role": "assistant", "content": "a"}), chunk({}), END, wire.DONE)
    assert deltas(events) == [{"role": "assistant", "content": ""}, {"content": "a"}]


def test_nothing_has_started_before_there_is_content():
    reader = QWEN.reader(ask(stream=True), target())
    reader.feed(ROLE)
    assert not reader.started
    reader.feed(chunk({"reasoning_content": "a"}))
    assert reader.started


def test_a_second_finish_is_not_said_and_its_usage_counts():
    """Q10."""
    events = read(ROLE, chunk({"content": "a"}), chunk({}, "tool_calls"), chunk({}, "stop", usage=USAGE), wire.DONE)
    assert reasons(events) == ["tool_calls"]
    assert events[-2]["usage"] == USAGE


def test_content_after_the_finish_is_said_before_it():
    """Q10."""
    events = read(ROLE, chunk({"content": "a"}), END, chunk({"content": "b"}), wire.DONE)
    assert said(events) == "ab"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


def test_a_stream_without_done_is_complete_with_its_finish_and_usage():
    """Q10, and half a frame at the end."""
    events = read(ROLE, chunk({"content": "a"}), END, COUNTED, b'data: {"id":"chat')
    assert reasons(events) == ["stop"]
    assert events[-2:] == [{**HEAD, "model": "qwen/qwen3-coder-plus", "choices": [], "usage": USAGE}, "[DONE]"]


def test_done_without_a_finish_is_a_finish():
    assert reasons(read(ROLE, chunk({"content": "a"}), wire.DONE)) == ["stop"]


def test_an_unknown_reason_is_read_as_stop():
    assert reasons(read(chunk({"content": "a"}), chunk({}, "eos"), wire.DONE)) == ["stop"]
    assert reasons(read(chunk({"content": "a"}), chunk({}, "content_filter"), wire.DONE)) == ["content_filter"]
    assert reasons(read(chunk({"content": "a"}), chunk({}, "length"), wire.DONE)) == ["length"]


LONG = "The water comes from the mill pond above the house and runs for half a mile beside the road."


@pytest.mark.parametrize("field", ["content", "reasoning_content"])
def test_a_text_that_is_sent_whole_again_and_again_is_said_once(field: str):
    """Q10: each delta repeats all so far; the last repeats it exactly."""
    texts = [LONG[:80], LONG, LONG + " And on.", LONG + " And on."]
    events = read(*(chunk({field: text}) for text in texts), END, wire.DONE)
    assert said(events, field) == LONG + " And on."
    assert len(deltas(events)) == 3


@pytest.mark.parametrize(
    "texts",
    [
        ["ha", "haha", "hahaha"],
        ["na ", "na ", "na na na"],
        ["-", "-" * 70],
        ["\n", "\n" + LONG],
        ["    ", "    " + LONG],
        [LONG, LONG[:70]],
        ["x" + LONG, LONG],
        ["Yes", "No " + LONG],
    ],
)
def test_a_text_that_repeats_itself_by_right_is_left_alone(texts: list[str]):
    assert said(read(*(chunk({"content": text}) for text in texts), END, wire.DONE)) == "".join(texts)


def test_thoughts_and_text_are_repeated_each_on_their_own():
    events = read(chunk({"reasoning_content": LONG}), chunk({"content": LONG}), chunk({"content": LONG + "!"}), END, wire.DONE)
    assert (said(events, "reasoning_content"), said(events)) == (LONG, LONG + "!")


THROTTLED = "Requests throttling triggered."


def test_an_error_as_finish_before_any_output_is_a_limit_and_never_text():
    """Q11: another account may be tried."""
    problem, out, _ = fails(chunk({"role": "assistant", "content": THROTTLED}, "error_finish"))
    assert isinstance(problem, failures.RateLimited)
    assert THROTTLED.encode() not in out
    problem, *_ = fails(ROLE, chunk({"content": "Free allocated quota exceeded."}, "error_finish"))
    assert isinstance(problem, failures.OutOfCredit)


def test_an_error_as_finish_after_text_breaks_the_stream():
    """Q11."""
    problem, out, _ = fails(ROLE, chunk({"content": "Hel"}) + chunk({"content": THROTTLED}, "error_finish"))
    assert isinstance(problem, UpstreamBroke)
    assert b"Hel" in out
    assert THROTTLED.encode() not in out
    assert b"stop" not in out
    assert THROTTLED in problem.message


@pytest.mark.parametrize(
    "error",
    [
        b'data: {"error":{"message":"x","type":"limit_requests","code":"limit_requests"},"request_id":"r"}\n\n',
        b'id:1\nevent:error\n:HTTP_STATUS/429\ndata:{"code":"Throttling.RateQuota","message":"x","request_id":"r"}\n\n',
        b'{"error":{"message":"x","code":"Throttling"},"request_id":"r"}',
        b'{"code":"Throttling","message":"x","request_id":"r"}',
    ],
)
def test_an_error_inside_a_200_is_what_its_code_says(error: bytes):
    problem, *_ = fails(error)
    assert isinstance(problem, failures.RateLimited)
    if error.startswith(b"data"):
        problem, *_ = fails(chunk({"content": "a"}), error)
        assert isinstance(problem, UpstreamBroke)


def piece(index: int | None = 0, call_id: str | None = "", name: str | None = None, arguments: str | None = None) -> bytes:
    one: Any = {"id": call_id, "function": {"name": name, "arguments": arguments}}
    if index is not None:
        one["index"] = index
    return chunk({"content": "", "tool_calls": [one]})


CALLED = chunk({}, "tool_calls")


def called(*pieces: bytes) -> Any:
    return calls(read(ROLE, *pieces, CALLED, wire.DONE))


def test_a_tool_call_in_five_pieces_is_one():
    """Q12."""
    first = piece(0, "call_x", "look_up", "")
    assert called(first, *(piece(arguments=part) for part in ('{"q"', ":", '"ü', '"}'))) == [(0, "call_x", "look_up", '{"q":"ü"}')]


@pytest.mark.parametrize(
    "pieces",
    [
        # without any index
        [(None, "a", "f", ""), (None, "", None, '{"n":'), (None, "", None, "1}"), (None, "b", "g", ""), (None, "", "", '{"n":2}')],
        # a second call under the index of the first
        [(0, "a", "f", '{"n":'), (0, "", None, "1}"), (0, "b", "g", '{"n":'), (0, "", None, "2}")],
        # in turns
        [(0, "a", "f", ""), (1, "b", "g", ""), (0, "", None, '{"n":1}'), (1, "", None, '{"n":2}')],
        # the index only at first
        [(0, "a", "f", ""), (None, "", None, '{"n":1}'), (1, "b", "g", ""), (None, "", None, '{"n":2}')],
        # id and name in every piece
        [(0, "a", "f", '{"n":'), (0, "a", "f", "1}"), (1, "b", "g", '{"n":2'), (1, "b", "g", "}")],
        # another id in every piece, and no name with it
        [(0, "a", "f", '{"n":'), (0, "a2", None, "1}"), (1, "b", "g", ""), (1, "b2", "", '{"n":2}')],
        # the name later than the id
        [(0, "a", None, ""), (0, "", "f", '{"n":1}'), (1, "b", "g", '{"n":2}')],
        # a nameless empty one between
        [(0, "a", "f", '{"n":1}'), (5, "x", "", ""), (1, "b", "g", '{"n":2}')],
        [(0, "x", None, ""), (0, "a", "f", '{"n":1}'), (1, "b", "g", '{"n":2}')],
    ],
)
def test_pieces_are_put_together_whatever_their_indexes(pieces: Any):
    """Q12."""
    assert called(*(piece(*one) for one in pieces)) == [(0, "a", "f", '{"n":1}'), (1, "b", "g", '{"n":2}')]


def test_calls_without_an_id_get_one():
    found = called(piece(None, None, "f", ""), piece(None, None, None, '{"n":1}'), piece(None, None, "f", '{"n":2}'))
    assert [(name, arguments) for _, _, name, arguments in found] == [("f", '{"n":1}'), ("f", '{"n":2}')]
    ids = [call_id for _, call_id, _, _ in found]
    assert len(set(ids)) == 2
    assert all(call_id.startswith("call_") for call_id in ids)


def test_a_name_that_is_said_again_under_its_index_begins_nothing():
    assert len(called(piece(0, "", "f", '{"n":'), piece(0, "", "f", "1}"), piece(0, "", "f", ""))) == 1
    assert len(called(piece(None, "", "f", ""), piece(None, "", "f", '{"n":'), piece(None, "", "f", "1}"))) == 1


def test_another_name_under_the_same_index_is_another_call():
    found = called(piece(0, "", "f", '{"n":1}'), piece(0, "", "g", '{"n":2}'))
    assert [(index, name, arguments) for index, _, name, arguments in found] == [(0, "f", '{"n":1}'), (1, "g", '{"n":2}')]


def test_arguments_given_as_an_object_become_text():
    pieces = chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": {"n": 1}}}]})
    assert called(pieces) == [(0, "a", "f", '{"n":1}')]


@pytest.mark.parametrize("reason", ["tool_calls", "stop"])
def test_arguments_that_were_cut_off_end_with_length(reason: str):
    """Q12."""
    assert reasons(read(piece(0, "a", "f", '{"n":'), chunk({}, reason), wire.DONE)) == ["length"]
    assert reasons(read(piece(0, "a", "f", ""), chunk({}, reason), wire.DONE)) == [reason]
    assert reasons(read(piece(0, "a", "f", '{"n":1}'), chunk({}, reason), wire.DONE)) == [reason]


def test_two_streams_at_the_same_time_share_nothing():
    """qwen-code issue 3516: one parser for all streams mixed their arguments."""
    one, two = (QWEN.reader(ask(stream=True), target()) for _ in range(2))
    out: dict[Any, bytes] = {one: b"", two: b""}
    for part in ((0, "a", "f", '{"n":'), (0, "", None, "1}")):
        for reader in (one, two):
            out[reader] += reader.feed(piece(*part))
    assert out[one] == out[two]


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_a_text_that_begins_with_thoughts_is_split(cut: int):
    text = "\n<think>Is 1 </ 2?</think>Yes, and <think> is a tag."
    parts = [chunk({"content": text[at : at + cut]}) for at in range(0, len(text), cut)]
    events = read(*parts, END, wire.DONE)
    assert (said(events, "reasoning_content"), said(events)) == ("Is 1 </ 2?", "Yes, and <think> is a tag.")


@pytest.mark.parametrize("text", ["Use <think>x</think> for it", "<thin", "< think>", "  <", "<thinking>no</thinking>"])
def test_a_text_that_speaks_of_the_tag_is_left_alone(text: str):
    events = read(*(chunk({"content": letter}) for letter in text), END, wire.DONE)
    assert (said(events), said(events, "reasoning_content")) == (text, "")


def test_thoughts_that_never_end_are_thoughts_and_beside_thoughts_there_are_no_tags():
    assert said(read(chunk({"content": "<think>hm</th"}), END, wire.DONE), "reasoning_content") == "hm</th"
    events = read(chunk({"reasoning_content": "hm"}), chunk({"content": "<think>a"}), END, wire.DONE)
    assert said(events) == "<think>a"


def test_thoughts_by_another_name():
    events = read(chunk({"reasoning": "hm"}), chunk({"content": "a"}), END, wire.DONE)
    assert (said(events, "reasoning_content"), said(events, "reasoning")) == ("hm", "")


def test_cached_tokens_stand_where_openai_has_them():
    """Q17."""
    reader = QWEN.reader(ask(stream=True), target())
    events = read(
        chunk({"content": "a"}), END, wire.event({**HEAD, "choices": [], "usage": {**USAGE, "cached_tokens": 8}}), wire.DONE, reader=reader
    )
    assert events[-2]["usage"] == {**USAGE, "prompt_tokens_details": {"cached_tokens": 8}}
    assert reader.tokens == Tokens(fresh_input=4, cache_read=8, output=30)


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>sign in</html>\n\n", b"", b"\n\n", b"Bad gateway", wire.DONE])
def test_a_page_or_nothing_at_all_is_no_answer(page: bytes):
    """Q13: the credential is not to blame."""
    problem, out, _ = fails(page)
    assert isinstance(problem, UpstreamProtocol)
    assert (problem.status, out.strip()) == (502, b"")


def test_a_malformed_frame_is_skipped_and_three_are_too_many():
    """Q14."""
    bad = b'data: {"id":\n\n'
    assert said(read(ROLE, chunk({"content": "a"}), bad, b": comment\n\n", chunk({"content": "b"}), bad, END, wire.DONE)) == "ab"
    problem, *_ = fails(ROLE, chunk({"content": "a"}), bad, bad, bad)
    assert isinstance(problem, UpstreamBroke)


def test_a_stream_that_is_cut_off_is_broken_or_may_be_tried_elsewhere():
    """Q14."""
    assert isinstance(fails(ROLE)[0], UpstreamProtocol)
    problem, out, reader = fails(ROLE, chunk({"content": "Hel"}))
    assert isinstance(problem, UpstreamBroke)
    assert b"Hel" in out
    assert (reader.started, reader.finished) == (True, False)


def test_what_has_passed_can_be_estimated():
    reader = QWEN.reader(ask(stream=True), target())
    for part in (ROLE, chunk({"content": "abc"}), piece(0, "a", "f", '{"n":1}')):
        reader.feed(part)
    assert (reader.events, reader.content_bytes) == (2, 10)


# 3.4 Whole answers


def whole(message: Any, reason: str | None = "stop", **more: Any) -> Any:
    body = {"id": "x", "object": "chat.completion", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": reason}]}
    found = QWEN.answer(ask(), target(), wire.encode_json({**body, "usage": USAGE, "unknown": 1, **more}), "application/json")
    return found, json.loads(found.body)


def test_a_whole_answer_keeps_what_it_says_under_the_public_name():
    found, body = whole({"role": "assistant", "content": "Hi", "reasoning_content": "hm", "annotations": []})
    assert body == {
        "id": "x",
        "object": "chat.completion",
        "model": "qwen/qwen3-coder-plus",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi", "reasoning_content": "hm", "annotations": []},
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
        "unknown": 1,
    }
    assert found.tokens == Tokens(fresh_input=12, output=30)


def test_a_whole_answer_is_mended_as_a_stream_is():
    _, body = whole({"role": "", "content": "<think>hm</think>Hi"})
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hi", "reasoning_content": "hm"}
    _, body = whole({"role": "assistant", "content": "Hi", "reasoning": "hm"})
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hi", "reasoning_content": "hm"}
    found, body = whole({"content": "Hi"}, usage={**USAGE, "cached_tokens": 8})
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}
    assert found.tokens == Tokens(fresh_input=4, cache_read=8, output=30)


def test_whole_tool_calls_get_ids_and_lose_indexes_and_the_nameless():
    made = [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": '{"n":1}'}},
        {"index": 0, "id": "", "function": {"name": "f", "arguments": {"n": 2}}},
        {"index": 0, "id": "", "function": {"name": "", "arguments": ""}},
    ]
    _, body = whole({"role": "assistant", "content": "", "tool_calls": made}, "tool_calls")
    first, second = body["choices"][0]["message"]["tool_calls"]
    assert first == {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"n":1}'}}
    assert second["id"].startswith("call_")
    assert second["function"] == {"name": "f", "arguments": '{"n":2}'}
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    _, body = whole({"content": None, "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": '{"n":'}}]}, "tool_calls")
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", UpstreamProtocol),
        (b"<html></html>", UpstreamProtocol),
        (b'{"choices":[]}', UpstreamProtocol),
        (b'{"choices":["x"]}', UpstreamProtocol),
        (b"[]", UpstreamProtocol),
        (b'{"error":{"message":"x","code":"invalid_api_key"}}', failures.CredentialRefused),
        (b'{"error":{"message":"x","code":"model_not_found"}}', failures.ModelGone),
        (b'{"code":"Throttling.RateQuota","message":"x"}', failures.RateLimited),
        (b'{"code":"DataInspectionFailed","message":"x"}', failures.ContentFiltered),
        (b'{"code":"InternalError.Algo","message":"x"}', failures.UpstreamServer),
        (b'{"code":"AccessDenied","message":"x"}', failures.ForbiddenAtUpstream),
        (b'{"code":"Arrearage","message":"x"}', failures.OutOfCredit),
        (
            b'{"choices":[{"message":{"content":"Requests throttling triggered."},"finish_reason":"error_finish"}]}',
            failures.RateLimited,
        ),
    ],
)
def test_an_error_in_a_200_and_rubbish_are_failures(body: bytes, kind: type[UpstreamFailure]):
    with pytest.raises(kind):
        QWEN.answer(ask(), target(), body, "application/json")


# 3.5 Errors


def failure(
    status: int, code: str = "", message: str = "", *, native: bool = False, headers: Any = None, kind: str = ""
) -> UpstreamFailure:
    error = {"message": message, "code": code}
    body = error if native else {"error": {**error, "type": kind or code, "param": None}, "request_id": "r"}
    return QWEN.failure(target(), status, headers or {}, wire.encode_json(body))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    ("status", "code", "message", "kind", "to_client"),
    [
        (401, "invalid_api_key", "invalid access token or token expired", failures.CredentialRefused, 502),
        (400, "invalid_parameter_error", "Your session has expired, sign in", failures.CredentialRefused, 502),
        (403, "insufficient_quota", "x", failures.OutOfCredit, 429),
        (403, "AccessDenied", "Free allocated quota exceeded.", failures.OutOfCredit, 429),
        (429, "quota_exceeded", "x", failures.OutOfCredit, 429),
        (429, "x", "Free allocated quota exceeded.", failures.OutOfCredit, 429),
        (403, "access_denied", "x", failures.ForbiddenAtUpstream, 403),
        (403, "Model.AccessDenied", "x", failures.ForbiddenAtUpstream, 403),
        (403, "AccessDenied.Unpurchased", "x", failures.ForbiddenAtUpstream, 403),
        (429, "Throttling", "x", failures.RateLimited, 429),
        (429, "Throttling.RateQuota", "x", failures.RateLimited, 429),
        (429, "Throttling.AllocationQuota", "Allocated quota exceeded", failures.RateLimited, 429),
        (429, "limit_requests", "Requests throttling triggered", failures.RateLimited, 429),
        (400, "data_inspection_failed", "x", failures.ContentFiltered, 400),
        (400, "DataInspectionFailed", "x", failures.ContentFiltered, 400),
        (400, "invalid_parameter_error", "Range of input length should be [1, 100]", failures.ContextLength, 400),
        (400, "InvalidParameter", "This model's maximum context length is 5", failures.ContextLength, 400),
        (400, "InvalidParameter", "temperature", failures.InvalidAtUpstream, 400),
        (400, "InvalidParameter", "about your insufficient_quota", failures.InvalidAtUpstream, 400),
        (400, "Arrearage", "x", failures.OutOfCredit, 429),
        (404, "model_not_found", "x", failures.ModelGone, 404),
        (500, "internal_error", "x", failures.UpstreamServer, 502),
        (500, "InternalError.Algo", "x", failures.UpstreamServer, 502),
        (502, "", "", failures.UpstreamServer, 502),
        (503, "ModelServingError", "x", failures.Overloaded, 503),
        (504, "", "", failures.UpstreamServer, 502),
    ],
)
def test_what_its_errors_mean(status: int, code: str, message: str, kind: type[UpstreamFailure], to_client: int, native: bool):
    problem = failure(status, code, message, native=native)
    assert type(problem) is kind
    assert problem.status == to_client


def test_a_session_that_has_expired_is_told_as_a_401():
    """So that a sign-in is refreshed once, as after any 401."""
    assert failure(400, "invalid_parameter_error", "session has expired").upstream_status == 401


def test_arrears_concern_the_whole_account_and_a_models_quota_does_not():
    arrears, quota = failure(400, "Arrearage"), failure(403, "insufficient_quota")
    assert isinstance(arrears, failures.UpstreamFailed)
    assert isinstance(quota, failures.UpstreamFailed)
    assert (arrears.whole_account, quota.whole_account) == (True, False)


@pytest.mark.parametrize(
    ("moment", "seconds"),
    [
        (1_767_196_800, 86_400),  # 2026-01-01 00:00 in Beijing
        (1_767_196_801, 86_399),
        (1_767_225_600, 57_600),  # 2026-01-01 00:00 UTC, 08:00 there
        (1_767_283_199, 1),
    ],
)
def test_a_daily_quota_rests_until_midnight_in_beijing(moment: int, seconds: int, monkeypatch: pytest.MonkeyPatch):
    """Q7."""
    monkeypatch.setattr(qwen.time, "time", lambda: float(moment))
    assert failure(403, "insufficient_quota").retry_after_seconds == seconds
    assert failure(429, "", "Free allocated quota exceeded.").retry_after_seconds == seconds
    assert failure(429, "", "Free allocated quota exceeded.", headers={"retry-after": "9"}).retry_after_seconds == 9


def test_a_limits_own_delay_is_kept():
    """Q8."""
    assert failure(429, "limit_requests", headers={"retry-after": "2"}).retry_after_seconds == 2
    assert failure(429, "limit_requests").retry_after_seconds is None
    in_a_minute = formatdate(time.time() + 60, usegmt=True)
    seconds = failure(429, "limit_requests", headers={"retry-after": in_a_minute}).retry_after_seconds
    assert seconds is not None
    assert 0 < seconds <= 60


def test_pages_show_nothing_of_themselves_and_a_callers_key_stays_hidden():
    problem = QWEN.failure(target(), 502, {}, b"<html>nginx of the vendor</html>")
    assert "nginx" not in problem.message
    secret = "callers-own-key"
    own = Target("qwen", 1, "mine", "https://d.example/v1", SecretText(secret), "m", "qwen/m", callers_key=True)
    for status, code in ((403, "insufficient_quota"), (400, "data_inspection_failed"), (400, "x")):
        body = wire.encode_json({"error": {"code": code, "message": f"about {secret}"}})
        assert secret not in QWEN.failure(own, status, {}, body).message
    assert isinstance(QWEN.failure(own, 401, {}, b"{}"), failures.CallersKeyRefused)


# 3.1 The sign-in's data, settings and policy

URLS = {"token_url": "https://login.example/token", "device_code_url": "https://login.example/device"}


def test_how_it_signs_in():
    found = QWEN.sign_in({**OAUTH, "client_id": "mine", **URLS})
    assert found is not None
    assert (found.flow, found.client_id, found.client_secret, found.pkce) == ("device", "mine", "", True)
    assert (found.token_url, found.device_url) == ("https://login.example/token", "https://login.example/device")
    assert found.scopes == ("openid", "profile", "email", "model.completion")
    assert found.refresh_statuses_dead == {400, 401}


@pytest.mark.parametrize("settings", [{}, {"auth": "api_key"}, {"auth": "api_key", "client_id": "mine", **URLS}])
def test_with_a_key_there_is_no_sign_in(settings: dict[str, str]):
    assert QWEN.sign_in(settings) is None


@pytest.mark.parametrize("missing", ["client_id", "token_url", "device_code_url"])
def test_a_sign_in_names_the_settings_it_lacks(missing: str):
    settings = {name: value for name, value in {**OAUTH, "client_id": "mine", **URLS}.items() if name != missing}
    with pytest.raises(ValueError, match=missing):
        QWEN.sign_in(settings)


def test_no_values_of_a_vendors_tool_are_in_this_repository():
    with pytest.raises(ValueError, match="client_id, token_url, device_code_url"):
        QWEN.sign_in(OAUTH)


@pytest.mark.parametrize(
    ("given", "expires_at"),
    [
        (
            '{"access_token":"qat","refresh_token":"qrt","token_type":"Bearer","resource_url":"p.example","expiry_date":1767225600000}',
            1767225600,
        ),
        ('{"token":{"access_token":"qat","refresh_token":"qrt","resource_url":"p.example","expiry":"2026-01-01T00:00:00Z"}}', 1767225600),
        (
            '{"access_token":"qat","refresh_token":"qrt","resource_url":"p.example","expired":"2026-01-01T08:00:00+08:00","type":"qwen"}',
            1767225600,
        ),
        ('{"access_token":"qat","refresh_token":"qrt","endpoint":"p.example"}', None),
        ('{"access_token":"qat","refresh_token":"qrt","resource_url":"p.example","expiry_date":"soon","expiry":"later"}', None),
    ],
)
def test_credential_files_of_the_tools(given: str, expires_at: float | None):
    found = QWEN.tokens_from(f"\n{given}\n")
    assert found is not None
    assert (found.access, found.refresh, found.expires_at) == ("qat", "qrt", expires_at)
    assert found.facts == {"resource_url": "p.example"}


@pytest.mark.parametrize("given", ["sk-plain", "", "[]", "7", '"qat"', "{", "\ud800"])
def test_what_is_no_credential_file(given: str):
    assert QWEN.tokens_from(given) is None


@pytest.mark.parametrize("given", ["{}", '{"refresh_token":"x"}', '{"access_token":7}', '{"access_token":"a\\nb"}'])
def test_a_file_without_an_access_token_is_refused_in_words(given: str):
    with pytest.raises(ValueError, match="access_token"):
        QWEN.tokens_from(given)


def test_facts_of_a_token_reply():
    """Q4: a reply without it says nothing, so that the old one stays."""
    assert QWEN.facts_from({"access_token": "a", "resource_url": "portal.qwen.ai"}) == {"resource_url": "portal.qwen.ai"}
    for silent in (
        {},
        {"resource_url": ""},
        {"resource_url": None},
        {"resource_url": 7},
        {"resource_url": "a\nb"},
        {"resource_url": "x" * 999},
    ):
        assert QWEN.facts_from(silent) == {}


def test_the_policy_depends_on_how_it_signs_in():
    assert QWEN.policy_for({}) == QWEN.policy_for({"auth": "api_key"}) == "allowed"
    assert QWEN.policy_for({"auth": "oauth"}) == QWEN.policy_for({"auth": "OAuth"}) == "ended"


def test_settings_are_checked():
    assert QWEN.setting_from("auth", "OAuth") == "oauth"
    for name, given in (("auth", "password"), ("token_url", "login.example"), ("device_code_url", "https://x@y"), ("user_agent", "a\nb")):
        with pytest.raises(ValueError, match=name):
            QWEN.setting_from(name, given)


# 3.3 Models


def test_its_models_are_known_without_a_call():
    assert QWEN.models_request(target()) is None
    assert {"coder-model", "qwen3-coder-plus", "qwen3-coder-flash", "qwen3-max", "qwen3-coder-turbo"} <= QWEN.listed().keys()
    assert QWEN.listed()["coder-model"]["max_output_tokens"] == 65_536


def test_long_arguments_in_small_pieces_cost_what_they_are_long():
    def seconds(pieces: int) -> float:
        calls = qwen.Calls("0123456789abcdef")
        calls.mended([{"index": 0, "id": "c", "function": {"name": "write", "arguments": ""}}])
        began = time.perf_counter()
        for _ in range(pieces):
            calls.mended([{"index": 0, "function": {"arguments": "0123456789"}}])
        return time.perf_counter() - began

    assert min(seconds(80_000) for _ in range(2)) < 30 * max(seconds(8_000) for _ in range(2))
