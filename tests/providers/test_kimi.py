"""Kimi for Coding, from bytes: what goes out, what comes back, what its errors mean (protocol reference section 2)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from providers import adapter as adapters
from providers import failures, wire
from providers.adapter import Ask, Target
from providers.adapters import kimi
from providers.adapters.kimi import Kimi, Schema
from providers.failures import InvalidAtUpstream, UpstreamBroke, UpstreamFailure, UpstreamProtocol
from providers.price import Tokens
from providers.secrets import SecretText
from tests.upstreams.kimi import LISTED, USAGES

KIMI = Kimi()
TARGET = Target("kimi", 1, "l", "https://api.kimi.com/coding/v1", SecretText("sk-kimi-x"), "kimi-for-coding", "kimi/kimi-for-coding")
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
CALL = {"id": "ls:0", "type": "function", "function": {"name": "ls", "arguments": "{}"}}
MODELS = KIMI.models(wire.encode_json({"data": LISTED}))


def ask(*, stream: bool = False, wants_usage: bool = False, learned: dict[str, str] | None = None, **body: Any) -> Ask:
    body = {"model": "kimi/kimi-for-coding", "messages": HELLO, **body, **({"stream": True} if stream else {})}
    return Ask("chat/completions", body, stream, "0123456789abcdef", wants_usage, learned={} if learned is None else learned)


def target(model: str, **fields: Any) -> Target:
    """With what the list says of it."""
    return replace(TARGET, model=model, public_model=f"kimi/{model}", **{"detail": MODELS.get(model, {})} | fields)


def sent(asked: Ask | None = None, at: Target = TARGET, **body: Any) -> dict[str, Any]:
    return json.loads(KIMI.request(asked or ask(**body), at).body)


def refusal(at: Target = TARGET, **body: Any) -> InvalidAtUpstream:
    with pytest.raises(InvalidAtUpstream) as refused:
        sent(at=at, **body)
    assert refused.value.status == 400
    assert refused.value.code
    return refused.value


# Where it goes, and who says that it asks


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://api.kimi.ai", "https://api.kimi.ai/coding/v1"),
        ("https://api.kimi.ai/coding/", "https://api.kimi.ai/coding/v1"),
        ("https://api.kimi.ai/coding/v1", "https://api.kimi.ai/coding/v1"),
        ("https://house.example.org/kimi", "https://house.example.org/kimi/coding/v1"),
        ("https://api.moonshot.ai/v1", "https://api.moonshot.ai/v1"),
    ],
)
def test_a_base_url_is_an_origin_or_the_api_itself(given: str, kept: str):
    assert KIMI.base_url_from(given) == kept


def test_it_says_who_it_is_and_what_the_operator_wants_said():
    ours, theirs = KIMI.request(ask(), TARGET), KIMI.request(ask(), replace(TARGET, settings={"user_agent": "acme/2"}))

    assert ours.headers["User-Agent"] == adapters.USER_AGENT
    assert theirs.headers["User-Agent"] == "acme/2"
    assert ours.headers["Authorization"] == "Bearer sk-kimi-x"
    assert not [name for name in ours.headers if name.lower().startswith("x-msh")], "these say that one is another program"
    assert ours.url == "https://api.kimi.com/coding/v1/chat/completions"


def test_its_policy_wants_to_be_known_and_its_models_cost_nothing_more():
    assert (KIMI.policy, KIMI.free, KIMI.endpoints) == ("restricted", True, {"chat/completions"})
    assert KIMI.policy_source.startswith("https://")
    assert KIMI.policy_note


# Thinking


def test_the_seeds_alias_sends_an_object():
    body = sent(
        at=target("kimi-for-coding-thinking", detail={}),
        messages=HELLO,
        max_tokens=500,
        temperature=0.2,
        user="u1",
    )

    assert body == {
        "model": "kimi-for-coding",
        "messages": HELLO,
        "max_completion_tokens": 500,
        "thinking": {"type": "enabled"},
    }


@pytest.mark.parametrize(
    ("model", "effort", "thinking"),
    [
        ("k3", "minimal", {"type": "enabled", "effort": "low"}),
        ("k3", "low", {"type": "enabled", "effort": "low"}),
        ("k3", "medium", {"type": "enabled", "effort": "high"}),
        ("k3", "high", {"type": "enabled", "effort": "high"}),
        ("k3", "xhigh", {"type": "enabled", "effort": "max"}),
        ("k3-thinking", "max", {"type": "enabled", "effort": "max"}),
        ("k3-thinking", None, {"type": "enabled"}),
        ("k3", None, None),
        ("kimi-for-coding", "high", {"type": "enabled"}),
        ("kimi-k2.6", "none", {"type": "disabled"}),
        ("kimi-k2.6-nothink", None, {"type": "disabled"}),
        ("kimi-k2.6-nothink", "none", {"type": "disabled"}),
        ("kimi-k2-0905", "none", None),
        ("never-listed", "high", {"type": "enabled"}),
        ("never-listed-nothink", None, {"type": "disabled"}),
    ],
)
def test_an_effort_becomes_what_the_model_takes(model: str, effort: str | None, thinking: object):
    body = sent(at=target(model), reasoning_effort=effort)

    assert body.get("thinking") == thinking
    assert body["model"] == model.removesuffix("-thinking").removesuffix("-nothink")
    assert "reasoning_effort" not in body


@pytest.mark.parametrize(
    ("valid", "effort", "chosen"),
    [("low,max", "high", "low"), ("high,max", "low", "max"), ("high", "max", "high"), ("", "low", None)],
)
def test_of_the_efforts_the_next_lower_one_is_taken_else_the_models_own(valid: str, effort: str, chosen: str | None):
    detail = {"supports_thinking_type": "only", "valid_efforts": valid, "default_effort": "max" if valid else ""}

    assert sent(at=target("k9", detail=detail), reasoning_effort=effort)["thinking"].get("effort") == chosen


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        ("k3", {"reasoning_effort": "none"}, "reasoning_effort"),
        ("kimi-k2-0905", {"reasoning_effort": "low"}, "reasoning_effort"),
        ("k3", {"reasoning_effort": "very"}, "reasoning_effort"),
        ("k3", {"reasoning_effort": ["low"]}, "reasoning_effort"),
        ("k3", {"thinking": "yes"}, "thinking"),
        ("k3-thinking", {"thinking": False}, "thinking"),
        ("kimi-k2.6-nothink", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("kimi-k2.6-thinking", {"reasoning_effort": "none"}, "reasoning_effort"),
    ],
)
def test_what_a_model_cannot_think_is_refused(model: str, body: dict[str, Any], param: str):
    assert refusal(target(model), **body).param == param


@pytest.mark.parametrize(
    ("given", "sent_on"),
    [
        ({"type": "enabled", "keep": "all"}, {"type": "enabled", "keep": "all"}),
        ({"type": "disabled"}, {"type": "disabled"}),
        (True, {"type": "enabled"}),
        (False, {"type": "disabled"}),
    ],
)
def test_a_clients_own_object_is_passed_and_a_boolean_becomes_one(given: object, sent_on: object):
    assert sent(thinking=given, reasoning_effort="low")["thinking"] == sent_on


def test_a_model_that_is_really_called_so_keeps_its_name():
    listed = {"id": "kimi-k2-thinking", "supports_thinking_type": "only"}

    assert sent(at=target("kimi-k2-thinking", detail=listed))["model"] == "kimi-k2-thinking"


# The list


def test_the_list_has_the_names_that_switch_the_thoughts():
    assert sorted(MODELS) == [
        "k3",
        "k3-thinking",
        "kimi-for-coding",
        "kimi-for-coding-thinking",
        "kimi-k2-0905",
        "kimi-k2.6",
        "kimi-k2.6-nothink",
        "kimi-k2.6-thinking",
    ]
    assert MODELS["k3-thinking"]["virtual_of"] == "k3"
    assert (MODELS["k3"]["valid_efforts"], MODELS["k3"]["default_effort"]) == ("low,high,max", "max")


def test_older_servers_say_only_whether_a_model_thinks():
    old = {"data": [{"id": "a", "supports_reasoning": True}, {"id": "b", "supports_reasoning": False}, {"id": "c"}]}

    assert set(KIMI.models(wire.encode_json(old))) == {"a", "a-thinking", "a-nothink", "b", "c"}


def test_a_listed_model_is_not_hidden_by_a_name_of_ours():
    real = {"data": [{"id": "a", "supports_thinking_type": "both"}, {"id": "a-thinking", "supports_thinking_type": "only", "real": True}]}
    found = KIMI.models(wire.encode_json(real))

    assert set(found) == {"a", "a-thinking", "a-nothink"}
    assert found["a-thinking"]["real"] is True


# Parameters


def test_what_kimi_does_not_heed_is_dropped():
    body = sent(
        temperature=0.2,
        top_p=0.5,
        n=1,
        presence_penalty=1,
        frequency_penalty=1,
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        safety_identifier="s",
        parallel_tool_calls=True,
        logprobs=False,
        logit_bias={},
        modalities=["text"],
        stop=None,
    )

    assert set(body) == {"model", "messages"}


def test_what_is_not_known_passes():
    kept = {"stop": ["x"], "prompt_cache_key": "k", "tool_choice": "required", "response_format": {"type": "json_object"}, "tomorrow": [1]}

    assert sent(**kept).items() >= kept.items()


def test_an_operator_may_have_sampling_sent():
    body = sent(at=target("kimi-k2-0905", settings={"pass_sampling": "1"}), temperature=0, top_p=0.5)

    assert (body["temperature"], body["top_p"]) == (0, 0.5)


def test_the_newer_of_two_limits_is_kept():
    body = sent(max_tokens=5, max_completion_tokens=7)

    assert (body["max_completion_tokens"], "max_tokens" in body) == (7, False)
    assert sent(max_tokens=0)["max_completion_tokens"] == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2}, "n"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"modalities": 7}, "modalities"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"logprobs": True}, "logprobs"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ],
)
def test_what_would_be_answered_wrongly_is_refused(body: dict[str, Any], param: str):
    assert refusal(**body).param == param


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "input_audio", "input_audio": {}},
        {"type": "image_url", "image_url": {"url": "https://x/y"}},
        {"type": "image_url", "image_url": "http://x/y"},
        {"type": "image_url"},
        {"type": "video_url", "video_url": {"url": "https://x/y"}},
    ],
)
def test_a_part_that_kimi_cannot_take_is_refused(part: dict[str, Any]):
    assert refusal(messages=[*HELLO, {"role": "user", "content": [part]}]).param == "messages[1].content"


# Messages


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "ms://file-1"])
def test_images_that_are_in_the_request_or_uploaded_pass(url: str):
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}, {"type": "video_url", "video_url": url}]

    assert sent(messages=[{"role": "user", "content": parts}])["messages"][0]["content"] == parts


def test_a_developer_is_a_system_there():
    assert sent(messages=[{"role": "developer", "content": "x"}])["messages"] == [{"role": "system", "content": "x"}]


@pytest.mark.parametrize("content", ["", None, [], [{"type": "text", "text": ""}]])
def test_an_empty_text_beside_calls_is_left_out_and_a_thought_put_in(content: object):
    message = {"role": "assistant", "content": content, "tool_calls": [CALL]}

    assert sent(messages=[*HELLO, message])["messages"][1] == {"role": "assistant", "tool_calls": [CALL], "reasoning_content": ""}


def test_text_and_thoughts_beside_calls_stay():
    parts = [{"type": "text", "text": "I look"}, {"type": "text", "text": ""}]
    message = {"role": "assistant", "content": parts, "reasoning_content": "hm", "tool_calls": [{**CALL, "extras": {"a": 1}}]}

    assert sent(messages=[message])["messages"][0] == {**message, "content": parts[:1]}


@pytest.mark.parametrize("thought", ["", "hm"])
def test_thoughts_without_calls_are_the_clients_own(thought: str):
    message = {"role": "assistant", "content": "x", "reasoning_content": thought}

    assert sent(messages=[message])["messages"] == [message]


@pytest.mark.parametrize("at", [target("kimi-k2-0905"), target("kimi-k2.6-nothink")])
def test_where_nothing_is_thought_no_thought_is_put_in(at: Target):
    assert "reasoning_content" not in sent(at=at, messages=[{"role": "assistant", "tool_calls": [CALL]}])["messages"][0]


# Tools


def parameters(schema: dict[str, Any]) -> Any:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    function = sent(tools=[tool])["tools"][0]["function"]
    assert "strict" not in function
    return function["parameters"]


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({}, {"type": "object"}),
        ({"properties": {"a": {}}}, {"type": "object", "properties": {"a": {"type": "string"}}}),
        ({"properties": {"a": {"enum": [1, 2]}}}, {"type": "object", "properties": {"a": {"enum": [1, 2], "type": "integer"}}}),
        ({"properties": {"a": {"enum": ["x", 2]}}}, {"type": "object", "properties": {"a": {"enum": ["x", 2], "type": "string"}}}),
        ({"properties": {"a": {"const": True}}}, {"type": "object", "properties": {"a": {"const": True, "type": "boolean"}}}),
        (
            {"properties": {"a": {"properties": {"b": {"description": "x"}}}}},
            {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"description": "x", "type": "string"}}}}},
        ),
        (
            {"properties": {"a": {"items": {"enum": ["x"]}}}},
            {"type": "object", "properties": {"a": {"type": "array", "items": {"enum": ["x"], "type": "string"}}}},
        ),
        (
            {"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}},
            {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}},
        ),
        (
            {"properties": {"a": {"$ref": "#/$defs/A", "description": "mine"}}, "$defs": {"A": {"type": "integer", "description": "its"}}},
            {"type": "object", "properties": {"a": {"type": "integer", "description": "mine"}}},
        ),
        (
            {"properties": {"a": {"$ref": "#/definitions/A"}}, "definitions": {"A": {"$ref": "#/definitions/B"}, "B": {"const": 1}}},
            {"type": "object", "properties": {"a": {"const": 1, "type": "integer"}}},
        ),
    ],
)
def test_a_schema_has_no_references_and_a_type_everywhere(given: dict[str, Any], plain: dict[str, Any]):
    assert parameters(given) == plain


def test_a_schema_that_holds_itself_ends():
    tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/T"}, "value": {}}}

    once = parameters({"$defs": {"T": tree}, "properties": {"root": {"$ref": "#/$defs/T"}}})

    assert once["properties"]["root"]["properties"] == {"left": {"type": "object"}, "value": {"type": "string"}}


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"$ref": "#/$defs/gone"}}},
        {
            "properties": {"a": {"$ref": "#/$defs/d0"}},
            "$defs": {f"d{n}": {"properties": {name: {"$ref": f"#/$defs/d{n + 1}"} for name in "abcd"}} for n in range(12)} | {"d12": {}},
        },
    ],
)
def test_a_schema_that_cannot_be_inlined_is_refused(schema: dict[str, Any]):
    refused = refusal(tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}])

    assert refused.param == "tools[0].function.parameters"


SCHEMA_WORDS = ["properties", "items", "enum", "const", "$ref", "anyOf", "type", "$defs", "additionalProperties"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(SCHEMA_WORDS) | st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(SCHEMA_WORDS), json_values, max_size=4))
def test_whatever_is_called_a_schema_is_made_plain_or_refused(schema: dict[str, Any]):
    try:
        plain = Schema(schema, "p").plain()
    except InvalidAtUpstream:
        return
    assert "$defs" not in plain


def test_built_in_functions_are_recognized_by_their_dollar():
    tools = [{"type": "function", "function": {"name": "$web_search"}}, {"type": "builtin_function", "function": {"name": "$web_search"}}]
    builtin = {"type": "builtin_function", "function": {"name": "$web_search"}}

    assert sent(tools=tools)["tools"] == [builtin, builtin]


# What comes back


def chunk(delta: dict[str, Any] | None = None, reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta or {}, "finish_reason": reason, **more}
    return wire.event(
        {"id": "chatcmpl-k1", "object": "chat.completion.chunk", "created": 1, "model": "kimi-for-coding", "choices": [choice]}
    )


USAGE = {"prompt_tokens": 120, "completion_tokens": 31, "total_tokens": 151, "cached_tokens": 64}
TOKENS = Tokens(fresh_input=56, cache_read=64, output=31)
WORDS = [chunk({"role": "assistant", "content": ""}), chunk({"reasoning_content": "hm"}), chunk({"content": "Hi"})]


def heard(parts: list[bytes], asked: Ask | None = None) -> tuple[list[dict[str, Any]], adapters.Reader, bytes]:
    reader = KIMI.reader(asked or ask(stream=True), TARGET)
    out = b"".join(reader.feed(part) for part in parts) + reader.end()
    assert out.endswith(wire.DONE)
    return [json.loads(wire.data_of(one)) for one in wire.split_events(out) if b"[DONE]" not in one], reader, out


def calls_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As a client puts them together."""
    calls: list[dict[str, Any]] = []
    for event in events:
        for choice in event["choices"]:
            for part in choice["delta"].get("tool_calls") or ():
                if part["index"] == len(calls):
                    calls.append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
                calls[part["index"]]["arguments"] += part["function"].get("arguments") or ""
    return calls


def test_a_stream_passes_as_it_came():
    stream = [*WORDS, chunk({}, "stop"), wire.DONE]

    _, reader, out = heard(stream)

    assert out == b"".join(stream)
    assert reader.finished


def test_calls_with_all_they_need_pass_as_they_came():
    begin = {"index": 0, "id": "ls:0", "type": "function", "function": {"name": "ls", "arguments": ""}}
    more = [{"index": 0, "function": {"arguments": part}} for part in ('{"path":', '"."}')]
    stream = [chunk({"tool_calls": [one]}) for one in (begin, *more)] + [chunk({}, "tool_calls"), wire.DONE]

    events, _, out = heard(stream)

    assert out == b"".join(stream)
    assert calls_of(events) == [{"id": "ls:0", "name": "ls", "arguments": '{"path":"."}'}]


@pytest.mark.parametrize("wanted", [True, False])
def test_usage_in_a_choice_is_counted_and_said_where_clients_look_if_they_asked(wanted: bool):
    events, reader, _ = heard([*WORDS, chunk({}, "stop", usage=USAGE), wire.DONE], ask(stream=True, wants_usage=wanted))

    assert reader.tokens == TOKENS
    said = [event["usage"] for event in events if not event["choices"]]
    assert said == ([{**USAGE, "prompt_tokens_details": {"cached_tokens": 64}}] if wanted else [])


def test_usage_at_the_top_is_said_once():
    top = wire.event({"id": "chatcmpl-k1", "object": "chat.completion.chunk", "choices": [], "usage": USAGE})
    events, reader, _ = heard([*WORDS, chunk({}, "stop", usage=USAGE), top, wire.DONE], ask(stream=True, wants_usage=True))

    assert reader.tokens == TOKENS
    [usage] = [event["usage"] for event in events if "usage" in event]
    assert usage == {**USAGE, "prompt_tokens_details": {"cached_tokens": 64}}


def test_usage_that_we_asked_for_ourselves_is_taken_out():
    top = wire.event({"id": "chatcmpl-k1", "object": "chat.completion.chunk", "choices": [], "usage": USAGE})
    _, reader, out = heard([*WORDS, chunk({}, "stop"), top, wire.DONE])

    assert reader.tokens == TOKENS
    assert b"usage" not in out


def test_a_stream_without_usage_is_estimated():
    _, reader, _ = heard([*WORDS, chunk({}, "stop"), wire.DONE], ask(stream=True, wants_usage=True))

    assert reader.tokens is None
    assert reader.estimated_output() > 0


FIRST = {"id": "a:0", "type": "function", "function": {"name": "a", "arguments": ""}}
SECOND = {"id": "b:1", "type": "function", "function": {"name": "b", "arguments": ""}}
ONE, TWO = {"function": {"arguments": "1"}}, {"function": {"arguments": "2"}}


@pytest.mark.parametrize(
    ("parts", "ids"),
    [
        ([FIRST, ONE, SECOND, TWO], ["a:0", "b:1"]),
        ([FIRST, {**ONE, "id": "a:0"}, SECOND, {**TWO, "id": "b:1"}], ["a:0", "b:1"]),
        ([{**FIRST, "index": 0}, {**ONE, "index": 0}, {**SECOND, "index": 0}, {**TWO, "index": 0}], ["a:0", "b:1"]),
        ([{**FIRST, "index": 1}, {**ONE, "index": 1}, {**SECOND, "index": 2}, {**TWO, "index": 2}], ["a:0", "b:1"]),
        ([{**FIRST, "index": 0}, {**SECOND, "index": 1}, {**ONE, "index": 0}, {**TWO, "index": 1}], ["a:0", "b:1"]),
        ([FIRST | {"id": None}, ONE, SECOND | {"id": None}, TWO], ["call_456789abcdef_0", "call_456789abcdef_1"]),
        ([FIRST | {"index": 0, "id": ""}, ONE, SECOND | {"index": 1, "id": ""}, TWO], ["call_456789abcdef_0", "call_456789abcdef_1"]),
    ],
    ids=["no index", "ids again", "one index twice", "from one on", "mixed", "no id, no index", "no id"],
)
def test_each_call_has_an_index_and_an_id_of_its_own(parts: list[dict[str, Any]], ids: list[str]):
    events, _, _ = heard([*(chunk({"tool_calls": [part]}) for part in parts), chunk({}, "tool_calls"), wire.DONE])

    assert calls_of(events) == [{"id": ids[0], "name": "a", "arguments": "1"}, {"id": ids[1], "name": "b", "arguments": "2"}]


def test_two_calls_in_one_event_are_both_placed():
    events, _, _ = heard([chunk({"tool_calls": [FIRST, SECOND]}), chunk({}, "tool_calls"), wire.DONE])

    assert [part["index"] for part in events[0]["choices"][0]["delta"]["tool_calls"]] == [0, 1]


def test_whatever_stands_where_calls_should_nothing_breaks():
    odd = [[None, 1], {"a": 1}, [{"index": "x", "id": 7, "function": []}], "x"]
    heard([*(chunk({"tool_calls": one}) for one in odd), wire.event({"choices": "x", "usage": 7}), chunk({}, "stop"), wire.DONE])


def test_an_empty_thought_and_an_answer_without_words_are_kept():
    events, _, out = heard([chunk({"reasoning_content": ""}), chunk({"reasoning_content": "long"}), chunk({}, "length"), wire.DONE])

    assert b'"reasoning_content":""' in out
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def whole(message: dict[str, Any], asked: Ask | None = None, **more: Any) -> tuple[dict[str, Any], adapters.Whole]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop", **more.pop("choice", {})}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "kimi-for-coding", "choices": [choice], **more}
    answer = KIMI.answer(asked or ask(), TARGET, wire.encode_json(body), "application/json")
    return json.loads(answer.body), answer


def test_a_whole_answer_has_its_usage_where_clients_look():
    said, answer = whole({"content": "Hi", "reasoning_content": "hm"}, choice={"usage": USAGE})

    assert said["usage"] == {**USAGE, "prompt_tokens_details": {"cached_tokens": 64}}
    assert answer.tokens == TOKENS
    assert said["choices"][0]["message"]["reasoning_content"] == "hm"


def test_a_whole_answer_with_nothing_odd_keeps_its_bytes():
    body = b'{ "id":"c", "object":"chat.completion","choices":[{"message":{"role":"assistant","content":""},"finish_reason":"stop"}]}'

    assert KIMI.answer(ask(), TARGET, body, "application/json").body == body


def test_a_whole_answers_calls_have_ids():
    said, _ = whole({"content": None, "tool_calls": [{"type": "function", "function": {"name": "a", "arguments": "{}"}}, FIRST]})

    assert [call["id"] for call in said["choices"][0]["message"]["tool_calls"]] == ["call_456789abcdef_0", "a:0"]


# Thoughts that go back with the calls


def turn(learned: dict[str, str], *, stream: bool = True, messages: list[dict[str, Any]] | None = None) -> None:
    asked = ask(stream=stream, learned=learned, tools=[{"type": "function", "function": {"name": "ls"}}], messages=messages or HELLO)
    if stream:
        thoughts = [chunk({"reasoning_content": part}) for part in ("I should ", "look")]
        heard([*thoughts, chunk({"tool_calls": [{"index": 0, **CALL}]}), chunk({}, "tool_calls"), wire.DONE], asked)
    else:
        whole({"content": "", "reasoning_content": "I should look", "tool_calls": [CALL]}, asked)


def next_turn(learned: dict[str, str], *, first: list[dict[str, Any]] | None = None, **message: Any) -> Any:
    messages = [*(first or HELLO), {"role": "assistant", "content": None, "tool_calls": [CALL], **message}]
    return sent(ask(learned=learned, messages=messages))["messages"][-1]["reasoning_content"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_thought_goes_back_with_its_call_though_the_client_dropped_it(stream: bool):
    learned: dict[str, str] = {"project": "x"}
    turn(learned, stream=stream)

    assert next_turn(learned) == "I should look"
    assert next_turn(learned, reasoning_content="mine") == "mine"
    assert learned["project"] == "x"


def test_a_thought_is_found_by_the_same_conversation_alone():
    learned: dict[str, str] = {}
    turn(learned)

    assert next_turn(learned, first=[{"role": "user", "content": "Hello!"}]) == ""
    assert next_turn(learned, tool_calls=[{**CALL, "id": "ls:1"}]) == ""
    assert next_turn({}) == ""
    assert "Hello" not in str(learned), "what was asked is not kept, only a digest of it"


def test_thoughts_are_few_and_of_the_last_hour(monkeypatch: pytest.MonkeyPatch):
    learned: dict[str, str] = {"project": "x"}
    for number in range(kimi.Thoughts.MOST + 5):
        turn(learned, messages=[{"role": "user", "content": str(number)}])

    assert len(learned) == kimi.Thoughts.MOST + 1
    assert next_turn(learned, first=[{"role": "user", "content": "4"}]) == ""
    last = [{"role": "user", "content": "204"}]
    assert next_turn(learned, first=last) == "I should look"
    monkeypatch.setattr(kimi.Thoughts, "SECONDS", -1.0)
    assert next_turn(learned, first=last) == ""


def test_a_stream_that_was_cut_off_leaves_no_thought():
    learned: dict[str, str] = {}
    reader = KIMI.reader(ask(stream=True, learned=learned, tools=[{}]), TARGET)
    reader.feed(chunk({"reasoning_content": "half"}) + chunk({"tool_calls": [{"index": 0, **CALL}]}))
    with pytest.raises(UpstreamBroke):
        reader.end()

    assert learned == {}


# Errors


def failure(status: int, kind: str = "", message: str = "words", code: str | None = None, **headers: str) -> UpstreamFailure:
    error = {"message": message, **({"type": kind} if kind else {}), **({"code": code} if code else {})}
    return KIMI.failure(
        TARGET, status, {name.replace("_", "-"): text for name, text in headers.items()}, wire.encode_json({"error": error})
    )


@pytest.mark.parametrize(
    ("status", "kind", "message", "meant", "client_status", "whole_account"),
    [
        (400, "invalid_request_error", "invalid schema", "InvalidAtUpstream", 400, None),
        (400, "invalid_request_error", "Your request exceeded model token limit: 262144", "ContextLength", 400, None),
        (400, "invalid_request_error", "total message size 3 exceeds limit 2", "ContextLength", 400, None),
        (400, "invalid_request_error", "Input token length too long", "ContextLength", 400, None),
        (400, "content_filter", "considered high risk", "ContentFiltered", 400, None),
        (401, "invalid_authentication_error", "Invalid Authentication", "CredentialRefused", 502, True),
        (401, "incorrect_api_key_error", "expired", "CredentialRefused", 502, True),
        (401, "invalid_authentication_error", "needs a higher membership tier", "ForbiddenAtUpstream", 403, False),
        (402, "", "unable to verify your membership benefits", "OutOfCredit", 402, True),
        (403, "access_terminated_error", "only available for Coding Agents", "ForbiddenAtUpstream", 403, True),
        (403, "access_terminated_error", "reached your usage limit for this billing cycle", "OutOfCredit", 429, True),
        (403, "permission_denied_error", "IP not allowed", "ForbiddenAtUpstream", 403, False),
        (404, "resource_not_found_error", "Not found the model x or Permission denied", "ModelGone", 404, None),
        (429, "engine_overloaded_error", "overloaded", "Overloaded", 503, False),
        (429, "rate_limit_reached_error", "max RPM: 3", "RateLimited", 429, False),
        (429, "rate_limit_reached_error", "max organization concurrency: 30", "RateLimited", 429, False),
        (429, "rate_limit_reached_error", "You have reached your weekly usage limit", "OutOfCredit", 429, True),
        (429, "rate_limit_reached_error", "monthly limit", "OutOfCredit", 429, True),
        (429, "exceeded_current_quota_error", "in arrears", "OutOfCredit", 429, True),
        (429, "", "You exceeded your current token quota", "OutOfCredit", 429, True),
        (499, "client_closed_request", "closed", "UpstreamServer", 502, False),
        (500, "server_error", "failed to connect", "UpstreamServer", 502, False),
        (500, "unexpected_output", "bot id mismatch", "UpstreamServer", 502, False),
        (503, "server_unavailable", "no", "Overloaded", 503, False),
        (529, "overloaded_error", "no", "Overloaded", 503, False),
    ],
)
def test_each_error_means_one_thing(status: int, kind: str, message: str, meant: str, client_status: int, whole_account: bool | None):
    problem = failure(status, kind, message)

    assert type(problem) is getattr(failures, meant)
    assert (problem.status, problem.upstream_status) == (client_status, status)
    assert getattr(problem, "whole_account", None) == whole_account


def test_a_missing_model_is_the_parameters_fault_and_a_missing_path_is_not():
    assert failure(404, "resource_not_found_error", "Not found the model x").param == "model"
    assert failure(404, "resource_not_found_error", "method not found").param is None


def test_how_long_to_wait_is_kept():
    assert failure(429, "engine_overloaded_error", retry_after="2").retry_after_seconds == 2
    assert failure(429, "rate_limit_reached_error", retry_after="3").retry_after_seconds == 3


def test_a_quota_may_be_named_in_the_code():
    assert type(failure(429, "x", code="exceeded_current_quota_error")) is failures.OutOfCredit


def test_a_client_that_is_not_served_is_told_so_and_the_operator_where_to_look():
    problem = failure(403, "access_terminated_error", "Kimi For Coding is currently only available for Coding Agents.")

    assert problem.message == "Kimi For Coding is currently only available for Coding Agents."
    assert isinstance(problem, UpstreamFailure)
    assert "user_agent" in problem.detail


@pytest.mark.parametrize(
    ("kind", "meant"),
    [
        ("engine_overloaded_error", "Overloaded"),
        ("exceeded_current_quota_error", "OutOfCredit"),
        ("incorrect_api_key_error", "CredentialRefused"),
        ("what_is_this", "UpstreamServer"),
    ],
)
def test_an_error_inside_a_success_is_told_by_its_type(kind: str, meant: str):
    body = {"error": {"message": "words", "type": kind}}
    with pytest.raises(UpstreamFailure) as streamed:
        KIMI.reader(ask(stream=True), TARGET).feed(wire.event(body))
    with pytest.raises(UpstreamFailure) as at_once:
        KIMI.answer(ask(), TARGET, wire.encode_json(body), "application/json")

    assert type(streamed.value) is type(at_once.value) is getattr(failures, meant)


def test_an_error_after_words_is_a_broken_stream():
    reader = KIMI.reader(ask(stream=True), TARGET)
    reader.feed(b"".join(WORDS))
    with pytest.raises(UpstreamBroke):
        reader.feed(wire.event({"error": {"message": "words", "type": "engine_overloaded_error"}}))


def test_the_callers_own_key_is_not_in_an_error():
    secret = "sk-kimi-callers-own-0123456789"
    own = replace(TARGET, secret=SecretText(secret), callers_key=True)
    body = wire.encode_json({"error": {"message": f"{secret} has reached its usage limit", "type": "access_terminated_error"}})

    assert secret not in KIMI.failure(own, 403, {}, body).message
    assert KIMI.failure(own, 401, {}, b"{}").code == "invalid_api_key"


# What is left of the plan


def quota(value: object) -> dict[str, Any]:
    return KIMI.quota(wire.encode_json(value))


def test_the_allowance_is_read_whatever_form_its_numbers_have():
    assert quota(USAGES) == {
        "week": {"used": 40, "limit": 1000, "resets_at": "2026-08-29T05:20:51Z"},
        "5 hours": {"used": 1, "limit": 100, "resets_at": "2026-08-22T11:00:00Z"},
        "booster": {"used": 2.5, "limit": 10.0, "unit": "USD"},
        "booster this month": {"used": 2.5, "limit": 50.0, "unit": "USD"},
    }


@pytest.mark.parametrize(
    ("detail", "window"),
    [
        ({"limit": 10, "used": 3, "reset_at": "2026-08-22T13:00:00+02:00"}, {"limit": 10, "used": 3, "resets_at": "2026-08-22T11:00:00Z"}),
        ({"limit": "1.5", "resetAt": "2026-08-22T11:00:00"}, {"limit": 1.5, "resets_at": "2026-08-22T11:00:00Z"}),
        ({"used": "x", "limit": True, "reset_time": "soon"}, {}),
        ({"used": "nan", "limit": "inf"}, {}),
        ({"used": "4", "reset_in": "x"}, {"used": 4}),
        ({"used": "4", "ttl": 10**12}, {"used": 4}),
    ],
)
def test_a_window_says_what_can_be_read_of_it(detail: dict[str, Any], window: dict[str, Any]):
    assert quota({"usage": detail}) == {"week": window}


@pytest.mark.parametrize("name", ["reset_in", "ttl"])
def test_a_reset_may_be_told_as_a_time_from_now(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kimi.time, "time", lambda: 1786000000.0)

    assert quota({"usage": {"used": 1, name: "60"}})["week"]["resets_at"] == "2026-08-06T07:07:40Z"


@pytest.mark.parametrize(
    ("duration", "unit", "name"),
    [(1, "DAY", "1 day"), (24, "TIME_UNIT_HOUR", "1 day"), ("90", "MINUTE", "90 minutes"), (7, "day", "7 days"), (3, "EPOCH", "window")],
)
def test_a_window_is_named_by_its_length(duration: object, unit: str, name: str):
    assert list(quota({"limits": [{"window": {"duration": duration, "timeUnit": unit}, "detail": {"used": 1}}]})) == [name]


@pytest.mark.parametrize("value", [{}, {"usage": [], "limits": {}, "boosterWallet": {"balance": "x"}}, {"limits": [None]}])
def test_where_nothing_is_said_nothing_is_known(value: object):
    assert quota(value) == {}


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"[" * 50_000, b""])
def test_rubbish_is_no_allowance(body: bytes):
    with pytest.raises(UpstreamProtocol):
        KIMI.quota(body)


def test_the_allowance_is_asked_for_as_everything_else():
    request = KIMI.quota_request(TARGET)

    assert request is not None
    assert (request.method, request.url) == ("GET", "https://api.kimi.com/coding/v1/usages")
    assert request.headers["Authorization"] == "Bearer sk-kimi-x"


# Signing in


def test_without_a_client_id_of_the_operators_an_account_has_a_key():
    assert KIMI.sign_in({}) is None


def test_the_device_flow_goes_to_the_auth_host():
    sign_in = KIMI.sign_in({"client_id": "mine", "auth_url": "https://auth.kimi.ai/"})

    assert sign_in is not None
    assert (sign_in.flow, sign_in.client_id) == ("device", "mine")
    assert sign_in.device_url == "https://auth.kimi.ai/api/oauth/device_authorization"
    assert sign_in.token_url == "https://auth.kimi.ai/api/oauth/token"


def test_the_credential_file_of_its_own_tool_is_read():
    tokens = KIMI.tokens_from(
        '{"access_token": "a", "refresh_token": "r", "expires_at": 1786000000.5, "scope": "x", "token_type": "Bearer"}'
    )

    assert tokens is not None
    assert (tokens.access, tokens.refresh, tokens.expires_at) == ("a", "r", 1786000000.5)
    assert KIMI.tokens_from("sk-kimi-abc") is None
    for odd in ('{"access_token": "a"}', "{"):
        with pytest.raises(ValueError, match=r"credential file"):
            KIMI.tokens_from(odd)
