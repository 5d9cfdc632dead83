"""Qwen through a running gateway: the `openai` package unchanged in front, the simulated upstream with its oddities behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.conftest import SIM_PRICE, Accounts
from tests.serving import CommandFailed, Sluice
from tests.upstreams.kit import Step
from tests.upstreams.qwen import LONG, QwenUpstream

HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello my dear friend"}]
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
# The first account of a pool has this fault; the second is well.
FAULTS = [
    "401", "400-session", "403-quota", "403-model", "403-native", "429", "429-date", "429-bare", "429-quota", "429-native", "400-arrears",
    "500", "500-native", "503", "reset", "html_502", "html_200", "empty_200",
]  # fmt: skip
ONLY_STREAMS = ["error_finish", "error_first", "abort_first"]


# An account that is alone has this one; the client is told so.
ALONE = {
    "401": (502, "upstream_auth_failed"),
    "400-session": (502, "upstream_auth_failed"),
    "429-bare": (429, "rate_limit_exceeded"),
    "403-quota": (429, "insufficient_quota"),
    "429-quota": (429, "insufficient_quota"),
    "403-model": (403, "Model.AccessDenied"),
    "400-filter": (400, "content_policy_violation"),
    "400-filter-native": (400, "content_policy_violation"),
    "400-arrears": (429, "insufficient_quota"),
    "400-length": (400, "context_length_exceeded"),
    "400": (400, "invalid_parameter_error"),
    "404": (404, "model_not_found"),
    "500": (502, "upstream_error"),
    "503": (503, "overloaded"),
    "html_502": (502, "upstream_error"),
    "html_200": (502, "upstream_bad_response"),
    "empty_200": (502, "upstream_bad_response"),
    "error_200": (429, "rate_limit_exceeded"),
    "leak": (502, "upstream_error"),
}


class Weather(BaseModel):
    city: str
    degrees: int


class GetWeather(BaseModel):
    city: str


@pytest.fixture(scope="module")
def qwen_server() -> Iterator[QwenUpstream]:
    with QwenUpstream() as server:
        yield server


@pytest.fixture
def qwen(qwen_server: QwenUpstream) -> QwenUpstream:
    qwen_server.reset()
    return qwen_server


def add(sluice: Sluice, *arguments: str, secret: str, prefix: str, base_url: str, priority: int = 0) -> None:
    given = ["--label", f"{prefix}-{priority}", "--prefix", prefix, "--base-url", base_url, "--priority", str(priority)]
    sluice.manage("add_credential", "qwen", *given, *arguments, "--secret-stdin", stdin=secret)


@pytest.fixture(scope="module")
def pools(sluice: Sluice, qwen_server: QwenUpstream) -> None:
    sluice.set_price("qw*", **SIM_PRICE)
    add(sluice, prefix="qw", secret="sk-sim-ok", base_url=qwen_server.base_url)
    sign_in = ["--set", "auth=oauth", "--accept-policy"]
    add(sluice, *sign_in, prefix="qw-portal", secret=qwen_server.issue()["access_token"], base_url=qwen_server.portal)
    for fault in [*FAULTS, *ONLY_STREAMS]:
        add(sluice, prefix=f"qw-{fault}", secret=f"sk-sim-{fault}", base_url=qwen_server.base_url, priority=10)
        add(sluice, prefix=f"qw-{fault}", secret="sk-sim-ok", base_url=qwen_server.base_url)
    for scenario in ALONE:
        add(sluice, prefix=f"qw-alone-{scenario}", secret=f"sk-sim-{scenario}", base_url=qwen_server.base_url)
    sluice.wait_for(f"qw-alone-{scenario}")


@pytest.fixture
def client(sluice: Sluice, pools: None, qwen: QwenUpstream) -> Iterator[OpenAI]:
    with OpenAI(api_key=sluice.issue_key(), base_url=f"{sluice.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def billed(sluice: Sluice, qwen: QwenUpstream) -> Accounts:
    return Accounts(sluice, qwen)  # type: ignore[arg-type]


def request_id(stream: Any) -> str:
    return str(stream.response.headers["x-request-id"])


def text_of(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def thoughts_of(chunks: list[Any]) -> str:
    return "".join((choice.delta.model_extra or {}).get("reasoning_content") or "" for chunk in chunks for choice in chunk.choices)


def reasons_of(chunks: list[Any]) -> list[str]:
    return [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]


# Answers


def test_a_whole_answer(client: OpenAI, billed: Accounts, qwen: QwenUpstream) -> None:
    answer = client.chat.completions.create(model="qw/qwen3-coder-plus", messages=HELLO)

    assert answer.choices[0].message.content == "echo: Hello my dear friend"
    assert answer.model == "qw/qwen3-coder-plus"
    assert qwen.last.path == "/compatible-mode/v1/chat/completions"
    assert qwen.last.unknown_fields == {}
    billed.of(str(answer._request_id), provider="qwen")


@pytest.mark.parametrize("wants_usage", [True, False])
def test_a_stream(client: OpenAI, billed: Accounts, wants_usage: bool) -> None:
    stream = client.chat.completions.create(
        model="qw/qwen3-coder-plus", messages=HELLO, stream=True, stream_options={"include_usage": wants_usage}
    )
    chunks = list(stream)

    assert text_of(chunks) == "echo: Hello my dear friend"
    assert reasons_of(chunks) == ["stop"]
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == ([5] if wants_usage else [])
    assert {chunk.model for chunk in chunks} == {"qw/qwen3-coder-plus"}
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices and chunk.choices[0].delta.role] == ["assistant"]
    billed.of(request_id(stream), stream=True)


def test_the_portal_is_called_as_its_own_tool_would(client: OpenAI, billed: Accounts, qwen: QwenUpstream) -> None:
    messages: Any = [*HELLO, {"role": "developer", "content": "And polite."}]
    stream = client.chat.completions.create(model="qw-portal/coder-model", messages=messages, stream=True)

    assert text_of(list(stream)) == "echo: Hello my dear friend"
    assert qwen.last.path == "/v1/chat/completions"
    assert qwen.last.headers["x-dashscope-authtype"] == "qwen-oauth"
    [system, user] = qwen.last.json["messages"]
    assert [part["text"] for part in system["content"]] == ["", "Be brief.", "And polite."]
    assert user["role"] == "user"
    assert qwen.without_auth_type == 0
    billed.of(request_id(stream))


@pytest.mark.parametrize(
    "scenario", ["split_utf8", "gzip", "coalesced", "chunk_splits_frame", "crlf", "comments", "no_trailing_newline", "bad_frame", "no_done"]
)
def test_a_stream_arrives_whole_however_it_is_cut(client: OpenAI, billed: Accounts, scenario: str) -> None:
    """Q10, Q14."""
    messages: Any = [{"role": "user", "content": "grüße 𝄞"}]
    stream = client.chat.completions.create(model=f"qw/sim-{scenario}", messages=messages, stream=True)
    with_done = httpx.post(
        f"{client.base_url}chat/completions",
        headers={"authorization": f"Bearer {client.api_key}"},
        json={"model": f"qw/sim-{scenario}", "messages": messages, "stream": True},
    )

    assert text_of(list(stream)).startswith("echo: grüße 𝄞")
    assert with_done.content.endswith(b"data: [DONE]\n\n")
    billed.of(request_id(stream))


@pytest.mark.parametrize("scenario", ["cumulative", "double_finish", "after_finish", "think_tags", "reasoning_field", "cached_top"])
def test_its_oddities_reach_no_client(client: OpenAI, billed: Accounts, scenario: str) -> None:
    """Q10, Q17, and the rest of 3.4."""
    stream = client.chat.completions.create(model=f"qw/sim-{scenario}", messages=HELLO, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)

    assert text_of(chunks) == (LONG if scenario == "cumulative" else "echo: Hello my dear friend")
    assert reasons_of(chunks) == ["stop"]
    assert thoughts_of(chunks) == {"think_tags": "I wonder.", "reasoning_field": "I think about it"}.get(scenario, "")
    assert chunks[-1].usage is not None
    if scenario == "cached_top":
        assert chunks[-1].usage.prompt_tokens_details is not None
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 3
    billed.of(request_id(stream), cached_tokens=3 if scenario == "cached_top" else 0)


@pytest.mark.parametrize("streamed", [True, False])
def test_reasoning(client: OpenAI, billed: Accounts, qwen: QwenUpstream, streamed: bool) -> None:
    arguments: Any = {"model": "qw/qwen3-coder-plus", "messages": HELLO, "reasoning_effort": "low"}
    if streamed:
        stream = client.chat.completions.create(stream=True, **arguments)
        thoughts, made_id = thoughts_of(list(stream)), request_id(stream)
    else:
        answer = client.chat.completions.create(**arguments)
        thoughts, made_id = (answer.choices[0].message.model_extra or {})["reasoning_content"], str(answer._request_id)

    assert thoughts == "I think about it"
    assert (qwen.last.json["enable_thinking"], qwen.last.json["thinking_budget"]) == (True, 1024)
    billed.of(made_id, reasoning_tokens=4)


def test_a_model_that_always_thinks_answers_one_who_wants_no_thoughts(client: OpenAI, billed: Accounts, qwen: QwenUpstream) -> None:
    answer = client.chat.completions.create(model="qw/qwen-thinking", messages=HELLO, reasoning_effort="none")

    assert answer.choices[0].message.content == "echo: Hello my dear friend"
    assert ["enable_thinking" in call.json for call in qwen.calls(str(answer._request_id))] == [True, False]
    billed.of(str(answer._request_id), attempts=2)


def test_pictures_go_out_as_they_came(client: OpenAI, billed: Accounts, qwen: QwenUpstream) -> None:
    parts: Any = [
        {"type": "text", "text": "what is this"},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
    ]
    answer = client.chat.completions.create(model="qw/coder-model", messages=[{"role": "user", "content": parts}])

    assert qwen.last.json["messages"] == [{"role": "user", "content": parts}]
    assert qwen.last.json["vl_high_resolution_images"] is True
    billed.of(str(answer._request_id))


# Tools and structured output


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("scenario", ["tool_calls_parallel", "tool_no_index", "tool_same_index", "tool_no_id"])
def test_parallel_tool_calls_over_two_turns(client: OpenAI, billed: Accounts, streamed: bool, scenario: str) -> None:
    """Q12."""
    question: Any = [{"role": "user", "content": "Which is warmer?"}]
    arguments: Any = {"model": f"qw/sim-{scenario}", "tools": [WEATHER], "parallel_tool_calls": True}

    if streamed:
        with client.chat.completions.stream(messages=question, **arguments) as stream:
            first: Any = stream.get_final_completion()
        first_id = str(stream._response.headers["x-request-id"])
    else:
        first = client.chat.completions.create(messages=question, **arguments)
        first_id = first._request_id
    calls = first.choices[0].message.tool_calls

    assert first.choices[0].finish_reason == "tool_calls"
    assert [one.function.arguments for one in calls] == ['{"city": "Oslo"}', '{"city": "Bergen"}']
    assert len({one.id for one in calls if one.id}) == 2
    results = [{"role": "tool", "tool_call_id": one.id, "content": f"{number} degrees"} for number, one in enumerate(calls)]
    asked_back = {
        "role": "assistant",
        "tool_calls": [one.model_dump(exclude={"function": {"parsed_arguments"}, "index": True}) for one in calls],
    }
    second = client.chat.completions.create(messages=[*question, asked_back, *results], **arguments)

    assert second.choices[0].message.content == "results: 0 degrees 1 degrees"
    billed.of(first_id)
    billed.of(str(second._request_id))


def test_the_streamed_tools_helper(client: OpenAI, billed: Accounts) -> None:
    tools: Any = [openai.pydantic_function_tool(GetWeather)]
    with client.chat.completions.stream(model="qw/sim-tool_nameless", messages=HELLO, tools=tools) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]

    assert [(event.name, event.parsed_arguments) for event in done] == [("GetWeather", GetWeather(city="Oslo"))]
    billed.of(str(stream._response.headers["x-request-id"]))


def test_arguments_that_were_cut_off_end_with_length(client: OpenAI) -> None:
    """Q12."""
    stream = client.chat.completions.create(model="qw/sim-tool_truncated", messages=HELLO, tools=[WEATHER], stream=True)
    assert reasons_of(list(stream)) == ["length"]


def test_a_forced_tool_turns_thinking_off(client: OpenAI, qwen: QwenUpstream) -> None:
    answer = client.chat.completions.create(model="qw/coder-model", messages=HELLO, tools=[WEATHER], tool_choice="required")
    assert answer.choices[0].finish_reason == "stop"
    assert qwen.last.json["enable_thinking"] is False


@pytest.mark.parametrize("streamed", [False, True])
def test_structured_output_is_parsed(client: OpenAI, billed: Accounts, qwen: QwenUpstream, streamed: bool) -> None:
    if streamed:
        with client.chat.completions.stream(model="qw/coder-model", messages=HELLO, response_format=Weather) as stream:
            answer: Any = stream.get_final_completion()
        made_id = str(stream._response.headers["x-request-id"])
    else:
        answer = client.chat.completions.parse(model="qw/coder-model", messages=HELLO, response_format=Weather)
        made_id = str(answer._request_id)

    assert answer.choices[0].message.parsed == Weather(city="text", degrees=7)
    assert qwen.last.json["response_format"]["json_schema"]["strict"] is True
    billed.of(made_id)


# Failures


@pytest.mark.parametrize("scenario", ALONE)
def test_its_errors_as_a_client_sees_them(client: OpenAI, sluice: Sluice, scenario: str) -> None:
    """Q7, Q13, Q16."""
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model=f"qw-alone-{scenario}/qwen3-coder-plus", messages=HELLO)

    status, code = ALONE[scenario]
    problem: Any = raised.value
    assert (problem.status_code, problem.code) == (status, code)
    assert not any(part in problem.response.text for part in ("<html", "qat-secret", "sk-sim", "req-sim", "\\u0007"))
    assert len(problem.response.text) < 900
    assert sluice.row(problem.response.headers["x-request-id"])["status"] == status
    if scenario.endswith("-quota"):
        assert 0 < int(problem.response.headers["retry-after"]) <= 86_400
        assert problem.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("fault", "kind"), [(fault, kind) for kind in ("whole", "stream") for fault in FAULTS] + [(f, "stream") for f in ONLY_STREAMS]
)
def test_the_next_account_gives_one_clean_answer(client: OpenAI, sluice: Sluice, fault: str, kind: str) -> None:
    """Q11 and 5.2."""
    model = f"qw-{fault}/qwen3-coder-plus" if kind == "whole" else f"qw-{fault}/qwen3-max"  # a rest is of one model
    if kind == "whole":
        answer = client.chat.completions.create(model=model, messages=HELLO)
        text, made_id = answer.choices[0].message.content, str(answer._request_id)
    else:
        stream = client.chat.completions.create(model=model, messages=HELLO, stream=True)
        text, made_id = text_of(list(stream)), request_id(stream)

    assert text == "echo: Hello my dear friend"
    row = sluice.row(made_id)
    rests_whole = kind == "stream" and fault in ("401", "400-session", "400-arrears")  # the first call has shown that already
    assert (row["status"], row["attempts"], row["credential"]) == (200, 1 if rests_whole else 2, f"qw-{fault}-0")


@pytest.mark.parametrize("scenario", ["abort_mid", "eof_mid", "error_frame", "error_finish_mid"])
def test_a_stream_that_breaks_in_the_middle_ends_in_an_error(client: OpenAI, sluice: Sluice, qwen: QwenUpstream, scenario: str) -> None:
    """Q11, Q14: nobody else is tried, and nothing looks whole."""
    answer = httpx.post(
        f"{client.base_url}chat/completions",
        headers={"authorization": f"Bearer {client.api_key}"},
        json={"model": f"qw/sim-{scenario}", "messages": HELLO, "stream": True},
    )

    assert b"echo:" in answer.content
    assert answer.content.strip().split(b"\n\n")[-1].startswith(b'data: {"error":{')
    assert b"[DONE]" not in answer.content
    assert b'"finish_reason":"' not in answer.content
    row = sluice.row(answer.headers["x-request-id"])
    assert (row["attempts"], row["status"], row["usage_source"]) == (1, 502, "estimated")


def test_what_cannot_be_honoured_is_refused_before_anybody_is_called(client: OpenAI, qwen: QwenUpstream) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="qw/qwen3-coder-plus", messages=HELLO, n=2)
    assert (raised.value.param, raised.value.code) == ("n", "unsupported_parameter")
    assert qwen.posts == []


def test_a_scripted_delay_and_gzip_of_a_whole_answer(client: OpenAI, billed: Accounts, qwen: QwenUpstream) -> None:
    qwen.script(Step(scenario="gzip", text="packed", delay_first_ms=50))
    answer = client.chat.completions.create(model="qw/qwen3-max", messages=HELLO)
    assert answer.choices[0].message.content == "packed"
    billed.of(str(answer._request_id))


# Adding an account


def test_a_sign_in_needs_its_policy_accepted_and_a_key_does_not(sluice: Sluice, qwen: QwenUpstream) -> None:
    with pytest.raises(CommandFailed, match="is ended"):
        add(sluice, "--set", "auth=oauth", prefix="qw-ended", secret="qat", base_url=qwen.portal)
    with pytest.raises(CommandFailed, match="api_key or oauth"):
        add(sluice, "--set", "auth=browser", prefix="qw-ended", secret="qat", base_url=qwen.portal)


def test_its_models_are_listed(client: OpenAI) -> None:
    listed = {model.id for model in client.models.list()}
    assert {"qw/coder-model", "qw/qwen3-coder-plus", "qw/qwen3-max"} <= listed
