"""CodeGPT: agents instead of models, answers in many forms, errors told by their words. Reference section 1, appendices A.1 and B."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from uuid import uuid4

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from openai import OpenAI

from providers import registry, wire
from providers.adapter import Ask, Heard, Target
from providers.exchange import Outgoing
from providers.failures import ModelGone, OutOfCredit, UpstreamFailure, UpstreamProtocol, UpstreamRefused
from providers.price import Tokens
from providers.secrets import SecretText
from tests.serving import Sluice, eventually
from tests.upstreams.codegpt import AGENTS, CODE, DOCS, FRAMINGS, ORG, OTHER_TWIN, SHAPES, TWIN, CodeGPTUpstream, Step

ADAPTER = registry.adapter("codegpt")
TARGET = Target("codegpt", 1, "l", "https://api.codegpt.co", SecretText("sk-agents-0123456789"), DOCS, "codegpt/docs", {"org_id": ORG})
HELLO: Any = [{"role": "user", "content": "Hello my dear friend"}]
DONE = b"data: [DONE]\n\n"


def ask(*, stream: bool = True, usage: bool = False, **body: Any) -> Ask:
    body = {"model": "codegpt/docs", "messages": HELLO, **body}
    return Ask("chat/completions", body, stream=stream, request_id="0123456789abcdef", client_wants_usage=usage)


def sent(target: Target = TARGET, **body: Any) -> tuple[Outgoing, dict[str, Any]]:
    request = ADAPTER.request(ask(**body), target)
    return request, json.loads(request.body)


def streamed(data: bytes, *, usage: bool = False) -> list[dict[str, Any]]:
    """The events of a stream that is whole. Raises what the reader raises."""
    reader = ADAPTER.reader(ask(usage=usage), TARGET)
    said = reader.feed(data)
    if reader.failure is not None:
        raise reader.failure
    said += reader.end()
    assert said.endswith(DONE)
    return [json.loads(one.removeprefix(b"data: ")) for one in said.removesuffix(DONE).split(b"\n\n") if one]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def whole(body: bytes | Any) -> tuple[dict[str, Any], Tokens | None]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = ADAPTER.answer(ask(stream=False), TARGET, raw, "application/json")
    [choice] = json.loads(answer.body)["choices"]
    return choice, answer.tokens


def sse(*values: object) -> bytes:
    return b"".join(map(wire.event, values)) + DONE


def choice(delta: Any = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, **({} if delta is None else {"delta": delta}), **more}]}


# What goes out (1.3, 1.9)


def test_a_request_names_the_agent_and_nothing_else() -> None:
    dropped = {
        "temperature": 0,
        "top_p": 0.5,
        "stop": ["x"],
        "max_tokens": 5,
        "seed": 1,
        "logprobs": True,
        "presence_penalty": 1,
        "user": "u",
    }
    empty = {"n": 1, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"], "audio": None}
    parameters: Any = {**dropped, **empty, "reasoning_effort": "low", "stream_options": {"include_usage": True}}
    request, body = sent(**parameters)

    assert request.url == "https://api.codegpt.co/api/v1/chat/completions"
    assert body == {"agentId": DOCS, "messages": HELLO, "stream": True, "format": "json"}
    assert request.headers["Authorization"] == "Bearer sk-agents-0123456789"
    assert request.headers["CodeGPT-Org-Id"] == ORG
    assert request.headers["Accept-Encoding"] == "identity"
    assert sent(stream=False)[1]["stream"] is False


def test_an_organization_is_named_only_where_it_is_the_keys_own() -> None:
    assert "CodeGPT-Org-Id" not in sent(replace(TARGET, settings={}))[0].headers
    assert "CodeGPT-Org-Id" not in sent(replace(TARGET, callers_key=True))[0].headers


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://api.codegpt.co", "https://api.codegpt.co"),
        ("https://api-beta.codegpt.co/api/v1/", "https://api-beta.codegpt.co"),
        ("https://api.codegpt.co/api/v1/chat/completions", "https://api.codegpt.co"),
        ("http://127.0.0.1:9/behind/proxy/", "http://127.0.0.1:9/behind/proxy"),
    ],
)
def test_the_address_may_be_given_as_the_vendors_pages_write_it(given: str, kept: str) -> None:
    assert ADAPTER.base_url_from(given) == kept


def test_roles_and_parts_of_text() -> None:
    _, body = sent(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": "Hé"},
        ]
    )

    assert [(one["role"], one["content"]) for one in body["messages"]] == [
        ("system", "Be brief."), ("system", "a\nb"), ("assistant", ""), ("assistant", "No."), ("user", "Hé"),
    ]  # fmt: skip


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"n": 2}, "n"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy"}}, "audio"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"messages": []}, "messages"),
    ({"messages": [*HELLO, {"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [7]}]}, "messages[0].content"),
    ({"messages": [*HELLO, {"role": "tool", "tool_call_id": "c", "content": "x"}]}, "messages[1].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}]}, "messages[0].tool_calls"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[f"{number}-{case[1]}" for number, case in enumerate(REFUSED)])
def test_what_it_cannot_honour_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(UpstreamRefused) as caught:
        sent(**body)
    assert (caught.value.status, caught.value.type, caught.value.param) == (400, "invalid_request_error", param)
    assert caught.value.code


# Which agent (1.7 to 1.9)


def named(model: str, *, listed: bool = False, default: str = "") -> Target:
    detail = {"id": CODE} if listed else {}
    return replace(TARGET, model=model, detail=detail, settings={"agent_id": default} if default else {})


@pytest.mark.parametrize(
    ("target", "agent"),
    [
        (named(CODE), CODE),
        (named(f"agent:{CODE}"), CODE),
        (named(CODE, default=DOCS), CODE),
        (named("Docs helper", listed=True), CODE),
        (named("gpt-4o", listed=True, default=DOCS), CODE),  # an agent may be called so
        (named("gpt-4o", default=DOCS), DOCS),
        (named("o3-mini", default=DOCS), DOCS),
        (named("claude-4-sonnet-thinking-bedrock", default=DOCS), DOCS),
        (named("gemini-2.5-pro-vertex", default=DOCS), DOCS),
        (named("llama-3.3-70b-cerebras", default=DOCS), DOCS),
        (named("command-r-plus", default=DOCS), DOCS),
        (named("default", default=DOCS), DOCS),
    ],
)
def test_the_agent_is_known_without_a_call(target: Target, agent: str) -> None:
    assert ADAPTER.first_calls(ask(), target) is None
    assert sent(target)[1]["agentId"] == agent


def found(model: str, *answers: Heard, **settings: str) -> tuple[list[str], Outgoing]:
    """The paths that were asked, and the call that followed. Raises what the look-up raises."""
    calls = ADAPTER.first_calls(ask(), replace(TARGET, model=model, settings=settings))
    assert calls is not None
    asked, request, waiting = [], next(calls), list(answers)
    while True:
        assert (request.method, request.body) == ("GET", b"")
        asked.append(request.path)
        try:
            request = calls.send(waiting.pop(0))
        except StopIteration as end:
            call: Outgoing = end.value
            return asked, call


LISTED = Heard(200, {}, json.dumps(AGENTS).encode())


def test_an_agent_younger_than_the_stored_list_is_asked_for_by_name() -> None:
    asked, call = found("coder", LISTED)
    assert (asked, json.loads(call.body)["agentId"]) == (["/api/v1/agent"], CODE)
    asked, call = found("coder", Heard(404, {}, b'{"detail":"Not Found"}'), LISTED)
    assert (asked, json.loads(call.body)["agentId"]) == (["/api/v1/agent", "/api/v1/agents"], CODE)


@pytest.mark.parametrize("model", ["nobody", "twin", "gpt-4o", "default"])
def test_an_unknown_name_is_never_silently_the_default_agent(model: str) -> None:
    settings = {"agent_id": DOCS} if model in ("nobody", "twin") else {}
    with pytest.raises(ModelGone) as caught:
        found(model, LISTED, **settings)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    with pytest.raises(ModelGone):
        found(model, *[Heard(404, {}, b"")] * 2, **settings)


def test_a_list_that_is_refused_says_why() -> None:
    with pytest.raises(OutOfCredit):
        found("coder", Heard(402, {}, b'{"detail":"No credits"}'))
    with pytest.raises(UpstreamProtocol):
        found("coder", Heard(200, {}, b"<html>"))


def test_what_cannot_be_sent_is_refused_before_anybody_is_asked() -> None:
    calls = ADAPTER.first_calls(ask(n=2), replace(TARGET, model="coder"))
    assert calls is not None
    with pytest.raises(UpstreamRefused):
        next(calls)


@pytest.mark.parametrize("listed", [AGENTS, {"data": AGENTS}, {"agents": AGENTS}])
def test_agents_are_listed_by_id_and_by_a_name_that_is_theirs_alone(listed: Any) -> None:
    models = ADAPTER.models(json.dumps(listed).encode())

    assert models.keys() == {DOCS, CODE, TWIN, OTHER_TWIN, "Docs helper", "coder"}
    assert models["Docs helper"] == models[DOCS]
    assert models["coder"]["id"] == CODE
    assert "prompt" not in models["Docs helper"]


@pytest.mark.parametrize("listed", [b"<html>", b"3", b'{"data": 1}', b"{}", b'["\xff"]', b"[" * 100_000])
def test_what_is_no_list_of_agents_is_refused(listed: bytes) -> None:
    with pytest.raises(UpstreamProtocol):
        ADAPTER.models(listed)
    assert ADAPTER.models(b'[3, {}, {"id": 4}, {"id": ""}, {"name": "x"}]') == {}


# What comes back: streams (1.5)


def test_the_worked_conversion_of_the_reference() -> None:
    """Appendix A.1: five chunks, and the reason in one of its own."""
    upstream = (
        'data: {"choices":[{"delta":{"contents":[{"type":"text","content":"Hé"},{"type":"image","content":"ignored"}]},'
        '"finish_reason":null}]}\n\ndata:{"choices":[{"delta":{"contents":[{"type":"text","content":"llo"}]}}]}\n\n'
        'data: {"choices":[{"delta":{"content":"!"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    )
    events = streamed(upstream.encode())

    assert [(event["choices"][0]["delta"], event["choices"][0]["finish_reason"]) for event in events] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Hé"}, None),
        ({"content": "llo"}, None),
        ({"content": "!"}, None),
        ({}, "stop"),
    ]
    assert {event["model"] for event in events} == {"codegpt/docs"}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}  # which the seed left out
    assert len({event["id"] for event in events}) == 1


FORMS = {
    "contents with text": choice({"contents": [{"type": "text", "text": "Hello"}]}),
    "contents": choice({"contents": [{"type": "text", "content": "Hel"}, {"content": "lo"}]}),
    "string": choice({"content": "Hello"}),
    "empty contents": choice({"contents": [], "content": "Hello"}),
    "parts": choice({"content": [{"type": "text", "text": "Hello"}]}),
    "a string as a frame": "Hello",
    "snapshot alone": choice(message={"role": "assistant", "content": "Hello"}),
    "snapshot beside an empty delta": choice({}, message={"content": "Hello"}),
}


@pytest.mark.parametrize("frame", FORMS.values(), ids=FORMS)
def test_text_is_found_in_every_form(frame: Any) -> None:
    assert text_of(streamed(sse(frame))) == "Hello"


def test_a_snapshot_behind_deltas_says_nothing_twice() -> None:
    events = streamed(
        sse(choice({"content": "Hel"}), choice({"content": "lo"}), choice(message={"content": "Hello"}, finish_reason="stop"))
    )

    assert text_of(events) == "Hello"


@pytest.mark.parametrize("between", [b"", b"\n", b"\r\n"])
def test_bare_objects_end_with_the_connection(between: bytes) -> None:
    objects = between.join([b'{"choices":[{"delta":{"content":"Three "}}]}', b'{"choices":[{"delta":{"content":"steps."}}]}'])
    events = streamed(objects)

    assert text_of(events) == "Three steps."
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_bare_objects_that_are_cut_off_never_look_whole() -> None:
    objects = b'{"choices":[{"delta":{"content":"Three "}}]}{"choices":[{"delta":{"content":"steps."}}]}'
    for end in range(len(objects)):
        if objects[:end].endswith(b"}]}") and objects[:end].count(b"{") == objects[:end].count(b"}"):
            continue  # between two objects nothing tells that there should be another
        with pytest.raises(UpstreamFailure):
            streamed(objects[:end])


def test_text_is_an_answer() -> None:
    events = streamed("Three steps:\n\n1. grüßen 🚀".encode())

    assert text_of(events) == "Three steps:\n\n1. grüßen 🚀"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_frames_of_metadata_say_nothing_and_reasoning_is_told_apart() -> None:
    events = streamed(
        sse(
            {"model": "gpt-4o", "usedModel": "m", "agentName": "a", "metadata": {}},
            choice({"reasoning_content": "h"}),
            choice({"reasoning": "m"}),
            choice({"content": "Hello"}),
            choice({"role": "assistant"}, finish_reason="stop"),
        )
    )
    thought = [event["choices"][0]["delta"].get("reasoning_content") for event in events]

    assert "".join(filter(None, thought)) == "hm"
    assert text_of(events) == "Hello"


def test_parallel_calls_whose_index_repeats_are_told_apart_by_id() -> None:
    def call(call_id: str | None, name: str | None, arguments: Any) -> Any:
        entry = {"index": 0, "id": call_id, "function": {"name": name, "arguments": arguments}}
        return choice({"tool_calls": [entry]})

    events = streamed(
        sse(
            call("a", "f", '{"x"'),
            call(None, None, ":1}"),
            call("b", "g", {"y": 2}),
            call("a", None, " "),
            choice({}, finish_reason="tool_use"),
        )
    )
    deltas = [delta for event in events for delta in event["choices"][0]["delta"].get("tool_calls", [])]

    assert [(delta["index"], delta.get("id"), delta["function"].get("name"), delta["function"]["arguments"]) for delta in deltas] == [
        (0, "a", "f", '{"x"'), (0, None, None, ":1}"), (1, "b", "g", '{"y":2}'), (0, None, None, " "),
    ]  # fmt: skip
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


REASONS = [
    ("stop", "stop"), ("end_turn", "stop"), ("STOP", "stop"), ("length", "length"), ("max_tokens", "length"), ("MAX_TOKENS", "length"),
    ("content_filter", "content_filter"), ("SAFETY", "content_filter"), ("of tomorrow", "stop"), (None, "stop"), ("", "stop"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "heard"), REASONS)
def test_each_reason_has_its_word_and_comes_once(said: str | None, heard: str) -> None:
    events = streamed(sse(choice({"content": "x"}, finish_reason=said), choice({}, finish_reason=said)))

    assert [one["finish_reason"] for event in events for one in event["choices"] if one["finish_reason"]] == [heard]
    assert whole(choice(message={"content": "x"}, finish_reason=said))[0]["finish_reason"] == heard


USAGE = {"prompt_tokens": 21, "completion_tokens": 9, "total_tokens": 30}


@pytest.mark.parametrize("place", [choice({}, finish_reason="stop") | {"usage": USAGE}, {"choices": [], "usage": USAGE}, {"usage": USAGE}])
def test_usage_is_found_wherever_it_comes(place: Any) -> None:
    last = streamed(sse(choice({"content": "x"}), place), usage=True)[-1]

    assert (last["choices"], last["usage"]) == ([], USAGE)


def test_usage_that_never_comes_or_makes_no_sense_is_estimated() -> None:
    odd_ones: list[dict[str, Any]] = [{}, {"usage": None}, {"usage": "many"}, {"usage": {"prompt_tokens": "9"}}, {"usage": {}}]
    for odd in odd_ones:
        reader = ADAPTER.reader(ask(usage=True), TARGET)
        reader.feed(sse(choice({"content": "Hello there"}) | odd))
        assert (reader.tokens, reader.estimated_output()) == (None, 1)


IN_A_200: list[tuple[Any, int, str, str]] = [
    ({"error": {"message": "no"}}, 502, "upstream_error", "no"),
    ({"error": "it broke"}, 502, "upstream_error", "it broke"),
    ({"errorMessage": "it broke", "errorName": "E"}, 502, "upstream_error", "it broke"),
    ({"detail": "it broke"}, 502, "upstream_error", "it broke"),
    ({"status": 401}, 502, "upstream_auth_failed", "The upstream refused the gateway's credential."),
    ({"status": 429, "message": "slow"}, 429, "rate_limit_exceeded", "slow"),
    ({"status": 404, "message": "gone"}, 404, "model_not_found", "gone"),
    ({"status": 999, "message": "odd"}, 502, "upstream_error", "odd"),
    ({"error": "You have no credits left. Upgrade your plan."}, 429, "insufficient_quota", "You have no credits left. Upgrade your plan."),
]


@pytest.mark.parametrize(("frame", "status", "code", "message"), IN_A_200)
def test_an_error_inside_a_200_is_an_error(frame: Any, status: int, code: str, message: str) -> None:
    for read in (lambda: streamed(sse(frame)), lambda: streamed(json.dumps(frame).encode()), lambda: whole(frame)):
        with pytest.raises(UpstreamFailure) as caught:
            read()
        assert (caught.value.status, caught.value.code, caught.value.message) == (status, code, message)


def test_a_stream_that_ends_without_a_terminator_broke() -> None:
    """Which the seed took for whole, without a finish reason."""
    with pytest.raises(UpstreamFailure, match="before it was complete"):
        streamed(wire.event(choice({"content": "Hello"})))
    assert streamed(wire.event(choice({"content": "Hello"}, finish_reason="stop")))  # a reason is an end, too


# Whole answers (1.4)

SHAPED: list[Any] = [
    choice(message={"content": "Three steps"}),
    choice(message={"completion": "Three steps"}),
    choice(message={"contents": [{"type": "text", "content": "Three "}, {"type": "text", "content": "steps"}]}),
    choice(message={"content": [{"type": "text", "text": "Three steps"}]}),
    {"result": "Three steps"},
    {"data": "Three steps"},
    "Three steps",
    b"Three steps",
    json.dumps(sse(choice({"content": "Three "}), choice({"content": "steps"})).decode()).encode(),
    sse(choice({"content": "Three steps"})),
]


@pytest.mark.parametrize("body", SHAPED, ids=range(len(SHAPED)))
def test_a_whole_answer_in_each_of_its_shapes(body: Any) -> None:
    said, tokens = whole(body)

    assert said["message"] == {"role": "assistant", "content": "Three steps"}
    assert (said["finish_reason"], tokens) == ("stop", None)


def test_usage_of_a_whole_answer() -> None:
    assert whole(choice(message={"content": "x"}) | {"usage": USAGE})[1] == Tokens(fresh_input=21, output=9)


@pytest.mark.parametrize("body", [{}, choice(message={}), {"choices": []}, {"result": 7}, "", b'"', {"message": "no"}, [], b"\n"])
def test_an_answer_without_words_is_no_answer(body: Any) -> None:
    """The seed made an error sentence of it and called it the assistant's."""
    if body == b'"':
        assert whole(body)[0]["message"]["content"] == '"', "that is a text, if a short one"
        return
    with pytest.raises(UpstreamProtocol):
        whole(body)


NAMES = [
    *("choices", "delta", "message", "contents", "content", "text", "type", "completion", "result", "reasoning", "finish_reason"),
    *("usage", "prompt_tokens", "tool_calls", "id", "index", "function", "arguments", "status", "error", "detail", "errorMessage"),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 999) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=25,
)


@given(frames=st.lists(json_values, max_size=4))
def test_whatever_it_says_the_reader_ends_in_our_own_words(frames: list[Any]) -> None:
    for read in (
        lambda: streamed(sse(*frames)),
        lambda: [whole(frame) for frame in frames],
        lambda: ADAPTER.models(json.dumps(frames).encode()),
    ):
        with suppress(UpstreamFailure):
            read()


# Errors (1.6)

SAID: list[tuple[int, Any, int, str | None, str]] = [
    (400, {"detail": "The model refused this."}, 400, None, "The model refused this."),
    (401, {"detail": "Invalid API key"}, 502, "upstream_auth_failed", "The upstream refused the gateway's credential."),
    (402, {"detail": "No credits left. Upgrade your plan."}, 402, "insufficient_quota", "No credits left. Upgrade your plan."),
    (403, {"detail": "Organization not found"}, 403, None, "Organization not found"),
    (404, {"detail": "Agent not found"}, 404, "model_not_found", "Agent not found"),
    (422, {"detail": [{"loc": ["body", "agentId"], "msg": "field required", "type": "t"}]}, 400, None, "field required"),
    (422, {"detail": "bad agent"}, 400, None, "bad agent"),
    (429, {"detail": "Daily interactions limit reached"}, 429, "insufficient_quota", "Daily interactions limit reached"),
    (429, {"message": "Rate limit"}, 429, "rate_limit_exceeded", "Rate limit"),
    (429, {"detail": "Too many requests"}, 429, "rate_limit_exceeded", "Too many requests"),
    (400, {"error": "Upgrade to continue"}, 429, "insufficient_quota", "Upgrade to continue"),
    (403, {"errorMessage": "Monthly quota exceeded"}, 429, "insufficient_quota", "Monthly quota exceeded"),
    (403, {"error": {"message": "Limit of requests reached"}}, 429, "rate_limit_exceeded", "Limit of requests reached"),
    (400, {"detail": "over the limit of maximum context"}, 400, "context_length_exceeded", "over the limit of maximum context"),
    (500, {"detail": "over the limit"}, 502, "upstream_error", "over the limit"),
    (500, b"Something\nbroke", 502, "upstream_error", "Something broke"),
    (502, b"<html>Bad Gateway</html>", 502, "upstream_error", "The upstream answered 502."),
    (503, b"", 503, "overloaded", "The upstream is overloaded."),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "client_status", "code", "message"), SAID)
def test_each_refusal_has_its_meaning(status: int, body: Any, client_status: int, code: str | None, message: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    problem = ADAPTER.failure(TARGET, status, {"content-type": "application/json"}, raw)

    assert (problem.status, problem.code, problem.message, problem.upstream_status) == (client_status, code, message, status)
    if isinstance(problem, OutOfCredit):
        assert problem.whole_account


def test_an_errors_words_are_short_and_hold_no_page_and_no_secret() -> None:
    for body in (b"  <html>secret</html>", b"x" * 5000, b"key sk-proj-abcdefghijklmnop0123456789"):
        message = ADAPTER.failure(TARGET, 500, {"content-type": "text/plain"}, body).message
        assert len(message) <= 200
        assert "html" not in message
        assert "abcdefghij" not in message
    assert ADAPTER.failure(TARGET, 500, {"content-type": "text/html"}, b"words").message == "The upstream answered 500."
    callers = replace(TARGET, callers_key=True, secret=SecretText("plainwords"))
    assert ADAPTER.failure(callers, 429, {}, b'{"detail":"plan limit of plainwords"}').message == "plan limit of [redacted]"


def test_retry_after_is_kept() -> None:
    for body in (b"{}", b'{"detail":"Daily limit"}'):
        assert ADAPTER.failure(TARGET, 429, {"retry-after": "7"}, body).retry_after_seconds == 7


# Through the simulator and a running gateway


@pytest.fixture(scope="module")
def simulator() -> Iterator[CodeGPTUpstream]:
    with CodeGPTUpstream() as simulator:
        yield simulator


@pytest.fixture
def agents(simulator: CodeGPTUpstream) -> CodeGPTUpstream:
    simulator.reset()
    simulator.agents, simulator.old_list = list(AGENTS), False
    return simulator


def account(sluice: Sluice, simulator: CodeGPTUpstream, prefix: str, secret: str = "sk-sim-ok", **settings: Any) -> int:
    return sluice.add_credential("codegpt", simulator.base_url, prefix=prefix, secret=secret, org_id=ORG, **settings)


@pytest.fixture(scope="module")
def prefix(sluice: Sluice, simulator: CodeGPTUpstream) -> str:
    """An account whose agents have been listed, with a default."""
    credential = account(sluice, simulator, "agents", agent_id=DOCS)
    sluice.set_price("agents/*", input=1, output=2)
    sluice.manage("refresh_models", "--credential", str(credential))
    sluice.wait_for("agents")
    return "agents"


@pytest.fixture
def client(sluice: Sluice, prefix: str, agents: CodeGPTUpstream) -> Iterator[OpenAI]:
    with OpenAI(api_key=sluice.issue_key(), base_url=f"{sluice.url}/v1", max_retries=0) as client:
        yield client


def heard(stream: Any) -> str:
    return "".join(one.delta.content or "" for chunk in stream for one in chunk.choices)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_stream_in_each_form(client: OpenAI, sluice: Sluice, agents: CodeGPTUpstream, framing: str) -> None:
    agents.script(Step(scenario=framing, text="grüße an alle 𝄞 🚀"))
    stream = client.chat.completions.create(model="agents/Docs helper", messages=HELLO, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)

    assert heard(chunks) == "grüße an alle 𝄞 🚀"
    assert [one.finish_reason for chunk in chunks for one in chunk.choices if one.finish_reason] == ["stop"]
    assert last.choices == []
    row = sluice.row(stream.response.headers["x-request-id"])
    assert (row["status"], row["provider"], row["usage_source"]) == (200, "codegpt", "estimated" if framing == "text" else "reported")
    assert last.usage is not None
    assert last.usage.completion_tokens == row["output_tokens"] > 0
    if row["usage_source"] == "reported":
        assert (last.usage.prompt_tokens, row["input_tokens"], row["output_tokens"]) == (4, 4, 5)
        assert row["cost_usd"] == pytest.approx((4 * 1 + 5 * 2) / 1e6)
    assert agents.last.json["agentId"] == DOCS
    assert agents.last.unknown_fields == {}


@pytest.mark.parametrize("shape", [*SHAPES, "no_usage", "ok", "split_utf8", "gzip"])
def test_a_whole_answer_in_each_shape(client: OpenAI, sluice: Sluice, agents: CodeGPTUpstream, shape: str) -> None:
    agents.script(Step(scenario=shape, text="grüße an alle 𝄞 🚀"))
    answer = client.chat.completions.create(model=f"agents/{CODE}", messages=HELLO, temperature=0.5)

    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "grüße an alle 𝄞 🚀"
    assert answer.usage is not None
    row = sluice.row(str(answer._request_id))
    assert row["usage_source"] == ("reported" if shape in ("shape_1", "shape_5_events", "ok", "split_utf8", "gzip") else "estimated")
    assert answer.usage.completion_tokens == row["output_tokens"]
    assert (agents.last.json["agentId"], agents.last.unknown_fields) == (CODE, {})


CUT = ["split_utf8", "coalesced", "crlf", "comments", "chunk_splits_frame", "no_trailing_newline", "bad_frame", "big_frame", "gzip"]


@pytest.mark.parametrize("scenario", CUT)
def test_a_stream_arrives_whole_however_it_is_cut(client: OpenAI, agents: CodeGPTUpstream, scenario: str) -> None:
    agents.script(Step(scenario=scenario, text="one two grüße 𝄞"))
    stream = client.chat.completions.create(model="agents/gpt-4o", messages=HELLO, stream=True)

    assert heard(stream).replace("x" * (1 << 20), "") == "one two grüße 𝄞"
    assert agents.last.json["agentId"] == DOCS


def test_agents_are_listed_and_a_new_one_is_found_before_the_list_is(client: OpenAI, agents: CodeGPTUpstream) -> None:
    listed = {model.id for model in client.models.list() if model.id.startswith("agents/")}
    assert listed == {f"agents/{name}" for name in ("Docs helper", "coder", DOCS, CODE, TWIN, OTHER_TWIN)}

    young = "9a2b3c4d-6f0f-4a0c-9f0b-3a6f0a1b2c3d"
    agents.agents.append({"id": young, "name": "young"})
    for agents.old_list in (False, True):
        answer = client.chat.completions.create(model="agents/young", messages=HELLO)
        assert answer.choices[0].message.content == "echo: Hello my dear friend"
        assert agents.last.json["agentId"] == young

    posts = len(agents.posts)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="agents/nobody", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert len(agents.posts) == posts


REFUSALS = [
    # scenario, status, code, Retry-After, x-should-retry
    ("bad_key", 502, "upstream_auth_failed", None, None),
    ("no_credit", 402, "insufficient_quota", None, "false"),
    ("forbidden", 403, None, None, None),
    ("404", 404, "model_not_found", None, None),
    ("400", 400, None, None, None),
    ("422", 400, None, None, None),
    ("400-plan", 429, "insufficient_quota", None, "false"),
    ("daily", 429, "insufficient_quota", None, "false"),
    ("rate_limit", 429, "rate_limit_exceeded", "2", None),
    ("rate_limit_no_header", 429, "rate_limit_exceeded", None, None),
    ("server_error", 502, "upstream_error", None, None),
    ("overloaded", 503, "overloaded", None, None),
    ("html_502", 502, "upstream_error", None, None),
    ("html_200", 502, "upstream_bad_response", None, None),
    ("empty_200", 502, "upstream_bad_response", None, None),
    ("bad_json_200", 502, "upstream_bad_response", None, None),
    ("redirect", 502, "upstream_error", None, None),
]


@pytest.fixture(scope="module")
def pools(sluice: Sluice, simulator: CodeGPTUpstream, prefix: str) -> str:
    """For each refusal a pool whose only account has it, and one whose second account is well."""
    for scenario, *_ in REFUSALS:
        account(sluice, simulator, f"alone-{scenario}", f"sk-sim-{scenario}")
        for stream in (False, True):
            account(sluice, simulator, f"pool-{scenario}-{stream}", f"sk-sim-{scenario}", priority=10)
            account(sluice, simulator, f"pool-{scenario}-{stream}", "sk-sim-ok", label=f"well-{scenario}")
    sluice.wait_for(f"pool-{REFUSALS[-1][0]}-True")
    return "pool"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("scenario", "status", "code", "retry_after", "should_retry"), REFUSALS, ids=[case[0] for case in REFUSALS])
def test_what_it_refuses(
    client: OpenAI,
    sluice: Sluice,
    pools: str,
    scenario: str,
    status: int,
    code: str | None,
    retry_after: str | None,
    should_retry: str | None,
    stream: bool,
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model=f"alone-{scenario}/{DOCS}", messages=HELLO, stream=stream)

    headers = caught.value.response.headers
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert headers.get("retry-after") == retry_after
    assert headers.get("x-should-retry") == should_retry
    assert "<" not in caught.value.message
    assert sluice.row(str(caught.value.request_id))["status"] == status


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("scenario", [case[0] for case in REFUSALS])
def test_the_next_account_gives_one_clean_answer_where_the_fault_is_not_the_clients(
    client: OpenAI, sluice: Sluice, pools: str, scenario: str, stream: bool
) -> None:
    arguments: Any = {"model": f"pool-{scenario}-{stream}/{DOCS}", "messages": HELLO}
    if scenario in ("400", "404", "422"):
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(stream=stream, **arguments)
        return
    if stream:
        events = client.chat.completions.create(stream=True, **arguments)
        text, request_id = heard(events), events.response.headers["x-request-id"]
    else:
        answer = client.chat.completions.create(**arguments)
        text, request_id = answer.choices[0].message.content, str(answer._request_id)

    assert text == "echo: Hello my dear friend"
    row = sluice.row(request_id)
    assert (row["status"], row["attempts"], row["credential"]) == (200, 2, f"well-{scenario}")


BREAKS = [("abort_mid", "upstream_error"), ("eof_mid", "upstream_bad_response"), ("error_frame", "upstream_error")]


@pytest.mark.parametrize(("scenario", "code"), BREAKS)
def test_a_stream_that_breaks_never_looks_whole(client: OpenAI, sluice: Sluice, agents: CodeGPTUpstream, scenario: str, code: str) -> None:
    agents.script(Step(scenario=scenario, text="one two three four five"))
    stream = client.chat.completions.create(model="agents/coder", messages=HELLO, stream=True)
    text = ""
    with pytest.raises(openai.APIError) as caught:
        for chunk in stream:
            assert chunk.choices[0].finish_reason is None
            text += chunk.choices[0].delta.content or ""

    assert text == "one two three"
    assert caught.value.code == code
    row = sluice.row(stream.response.headers["x-request-id"])
    assert (row["status"], row["attempts"], row["usage_source"], row["output_tokens"]) == (502, 1, "estimated", 3)


def test_a_client_that_leaves_stops_the_agent_and_is_metered_once(client: OpenAI, sluice: Sluice, agents: CodeGPTUpstream) -> None:
    agents.script(Step(text="word " * 200, delay_frame_ms=20))
    stream = client.chat.completions.create(model="agents/coder", messages=HELLO, stream=True)
    for _ in range(4):
        next(stream)
    stream.close()

    [call] = agents.calls(stream.response.headers["x-request-id"])
    eventually(lambda: call.peer_left_at is not None, "the upstream goes on", seconds=1)
    row = sluice.row(call.request_id)
    assert (row["status"], row["error"], row["usage_source"]) == (499, "client_closed", "estimated")
    assert 3 <= row["output_tokens"] <= agents.bill(call.request_id).output_tokens + 1


def test_tools_images_and_formats_are_refused_before_anything_goes_out(client: OpenAI, agents: CodeGPTUpstream) -> None:
    for body, param in REFUSED:
        if param.startswith("messages[0].role"):
            continue  # which the gateway's own reader has refused before
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": "agents/coder", "messages": HELLO, **body})
        assert caught.value.param == param
    assert agents.posts == []


def test_the_key_and_the_agents_prompt_are_nowhere_to_be_seen(sluice: Sluice, client: OpenAI, agents: CodeGPTUpstream) -> None:
    shown = httpx.get(f"{sluice.url}/v1/models", headers={"authorization": f"Bearer {client.api_key}"}).text

    assert "You answer from the docs." not in shown
    assert "sk-sim-ok" not in sluice.log()


def test_the_simulator_refuses_what_the_upstream_refuses(agents: CodeGPTUpstream) -> None:
    headers = {"authorization": "Bearer sk-sim-ok", "codegpt-org-id": ORG}
    good = {"agentId": DOCS, "messages": HELLO, "format": "json"}
    wrong: list[tuple[dict[str, str], Any, int]] = [
        ({"authorization": "sk-sim-ok"}, good, 401),
        ({"authorization": "Bearer sk-other"}, good, 401),
        ({"codegpt-org-id": str(uuid4())}, good, 403),
        ({}, [], 422),
        ({}, {**good, "agentId": "docs"}, 422),
        ({}, {**good, "agentId": str(uuid4())}, 404),
        ({}, {**good, "messages": []}, 422),
        ({}, {**good, "messages": [{"role": "tool", "content": "x"}]}, 422),
        ({}, {**good, "messages": [{"role": "user", "content": [{"type": "text"}]}]}, 422),
        ({}, {**good, "format": "xml"}, 422),
        ({}, good, 200),
    ]
    with httpx.Client(base_url=agents.base_url) as client:
        for extra, body, status in wrong:
            assert client.post("/api/v1/chat/completions", json=body, headers={**headers, **extra}).status_code == status
        assert client.post("/api/v1/chat/completion", json=good, headers=headers).status_code == 404
        assert client.get(f"/api/v1/agent/{DOCS}", headers=headers).json()["name"] == "Docs helper"
        client.post("/api/v1/chat/completions", json={**good, "model": "m", "temperature": 1}, headers=headers)
    assert agents.last.unknown_fields == {"model": "m", "temperature": 1}
