"""The official `openai` package against a running server, unchanged: every answer it can make sense of, and what each cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.conftest import Accounts
from tests.serving import Sluice, eventually
from tests.upstreams.openai import OpenAIUpstream, Step, unit_vector

HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello my dear friend"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Step1(BaseModel):
    explanation: str
    count: int


class Answer(BaseModel):
    steps: list[Step1]
    final: str


class GetWeather(BaseModel):
    city: str


@pytest.fixture
def client(sluice: Sluice, sim: str, upstream: OpenAIUpstream) -> Iterator[OpenAI]:
    with OpenAI(api_key=sluice.issue_key(), base_url=f"{sluice.url}/v1", max_retries=0) as client:
        yield client


def async_client(sluice: Sluice) -> AsyncOpenAI:
    return AsyncOpenAI(api_key=sluice.issue_key(), base_url=f"{sluice.url}/v1", max_retries=0)


def id_of(stream: Any) -> str:
    return str(stream.response.headers["x-request-id"])


def text_of(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


# Chat


def test_a_plain_answer(client: OpenAI, accounts: Accounts) -> None:
    answer = client.chat.completions.create(model="sim/gpt-4o", messages=HELLO)

    assert answer.choices[0].message.content == "echo: Hello my dear friend"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 5)
    assert answer._request_id is not None
    row = accounts.of(answer._request_id, stream=False, model="sim/gpt-4o", served_model="sim/gpt-4o", provider="openai", credential="sim")
    assert row["cost_usd"] == pytest.approx((6 * 3 + 5 * 15) / 1e6)


async def test_a_plain_answer_async(sluice: Sluice, sim: str, accounts: Accounts) -> None:
    async with async_client(sluice) as client:
        answer = await client.chat.completions.create(model="sim/gpt-4o", messages=HELLO)

    assert answer.choices[0].message.content == "echo: Hello my dear friend"
    assert answer._request_id is not None
    accounts.of(answer._request_id)


def test_a_stream_without_usage_shows_none_and_is_billed(client: OpenAI, accounts: Accounts, upstream: OpenAIUpstream) -> None:
    stream = client.chat.completions.create(model="sim/gpt-4o", messages=HELLO, stream=True)
    chunks = list(stream)

    assert text_of(chunks) == "echo: Hello my dear friend"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    accounts.of(id_of(stream), stream=True)
    assert upstream.last.json["stream_options"] == {"include_usage": True}


def test_a_stream_with_usage_ends_with_it(client: OpenAI, accounts: Accounts) -> None:
    stream = client.chat.completions.create(model="sim/gpt-4o", messages=HELLO, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)

    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, 5)
    assert text_of(chunks) == "echo: Hello my dear friend"
    accounts.of(id_of(stream), stream=True)


async def test_a_stream_async(sluice: Sluice, sim: str, accounts: Accounts) -> None:
    async with async_client(sluice) as client:
        stream = await client.chat.completions.create(model="sim/gpt-4o", messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]

    assert text_of(chunks) == "echo: Hello my dear friend"
    accounts.of(id_of(stream), stream=True)


@pytest.mark.parametrize(
    "scenario",
    [
        "split_utf8",
        "gzip",
        "gzip_trunc",
        "coalesced",
        "chunk_splits_frame",
        "crlf",
        "comments",
        "no_trailing_newline",
        "bad_frame",
        "big_frame",
        "no_done",
        "http10",
    ],
)
def test_a_stream_arrives_whole_however_it_is_cut(client: OpenAI, accounts: Accounts, scenario: str) -> None:
    stream = client.chat.completions.create(
        model=f"sim/sim-{scenario}", messages=[{"role": "user", "content": "grüße 𝄞"}], stream=True, stream_options={"include_usage": True}
    )
    text = text_of(list(stream))

    assert text.replace("x" * (1 << 20), "").startswith("echo: grüße 𝄞")
    accounts.of(id_of(stream))


@pytest.mark.parametrize("scenario", ["late_end", "reset_after"])
def test_what_comes_after_the_last_event_does_not_matter(client: OpenAI, accounts: Accounts, scenario: str) -> None:
    """The SDK closes as soon as it has read [DONE]."""
    stream = client.chat.completions.create(model=f"sim/sim-{scenario}", messages=HELLO, stream=True)

    assert text_of(list(stream)) == "echo: Hello my dear friend"
    accounts.of(id_of(stream))


def test_reasoning_tokens_are_part_of_the_output(client: OpenAI, accounts: Accounts) -> None:
    stream = client.chat.completions.create(model="sim/sim-reasoning", messages=HELLO, stream=True)
    thoughts = [chunk.choices[0].delta.model_extra.get("reasoning_content") for chunk in stream]

    assert "".join(filter(None, thoughts)) == "I think about it"
    accounts.of(id_of(stream), reasoning_tokens=4, output_tokens=9)


def test_cached_tokens_cost_what_cached_tokens_cost(client: OpenAI, accounts: Accounts) -> None:
    answer = client.chat.completions.create(model="sim/sim-cached", messages=HELLO)

    assert answer._request_id is not None
    row = accounts.of(answer._request_id, input_tokens=6, cached_tokens=3)
    assert row["cost_usd"] == pytest.approx(round(3 * 3 + 3 * 0.3 + 5 * 15) / 1e6)


def test_several_choices_and_a_length_stop(client: OpenAI, accounts: Accounts) -> None:
    answer = client.chat.completions.create(model="sim/sim-length", messages=HELLO, n=3)

    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer._request_id is not None
    accounts.of(answer._request_id)


def test_content_parts_and_fields_of_tomorrow_reach_the_upstream(client: OpenAI, upstream: OpenAIUpstream) -> None:
    parts: Any = [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
    client.chat.completions.create(
        model="sim/gpt-4o",
        messages=[{"role": "user", "content": parts}],
        temperature=0,
        reasoning_effort="low",
        extra_body={"field_of_tomorrow": {"deep": [1, None, "ü"]}},
    )

    assert upstream.last.unknown_fields == {"field_of_tomorrow": {"deep": [1, None, "ü"]}}
    assert upstream.last.json["temperature"] == 0
    assert upstream.last.json["messages"][0]["content"] == parts


# Structured output and tools


def test_structured_output_is_parsed(client: OpenAI, accounts: Accounts, upstream: OpenAIUpstream) -> None:
    answer = client.chat.completions.parse(model="sim/gpt-4o", messages=HELLO, response_format=Answer)

    assert answer.choices[0].message.parsed == Answer(steps=[Step1(explanation="text", count=7)], final="text")
    assert upstream.last.json["response_format"]["json_schema"]["strict"] is True
    assert answer._request_id is not None
    accounts.of(answer._request_id)


async def test_structured_output_is_parsed_from_a_stream(sluice: Sluice, sim: str, accounts: Accounts) -> None:
    async with (
        async_client(sluice) as client,
        client.chat.completions.stream(model="sim/gpt-4o", messages=HELLO, response_format=Answer) as stream,
    ):
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()

    assert "content.delta" in kinds
    assert "content.done" in kinds
    assert final.choices[0].message.parsed == Answer(steps=[Step1(explanation="text", count=7)], final="text")
    accounts.of(str(stream._response.headers["x-request-id"]))


def test_the_streamed_tools_helper(client: OpenAI, accounts: Accounts) -> None:
    tools: Any = [openai.pydantic_function_tool(GetWeather)]
    with client.chat.completions.stream(model="sim/sim-tool_call", messages=HELLO, tools=tools) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()

    assert [event.parsed_arguments for event in done] == [GetWeather(city="Oslo")]
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.choices[0].message.tool_calls is not None
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(city="Oslo")
    accounts.of(str(stream._response.headers["x-request-id"]))


@pytest.mark.parametrize("streamed", [False, True])
def test_parallel_tool_calls_over_two_turns(client: OpenAI, accounts: Accounts, streamed: bool) -> None:
    question: Any = [{"role": "user", "content": "Which is warmer?"}]
    arguments: Any = {"model": "sim/sim-tool_calls_parallel", "tools": [WEATHER], "parallel_tool_calls": True}

    if streamed:
        with client.chat.completions.stream(messages=question, **arguments) as stream:
            first: Any = stream.get_final_completion()
        first_id = str(stream._response.headers["x-request-id"])
    else:
        first = client.chat.completions.create(messages=question, **arguments)
        first_id = first._request_id
    calls = first.choices[0].message.tool_calls

    assert [(one.id, one.function.name, one.function.arguments) for one in calls] == [
        ("call_0", "get_weather", '{"city": "Oslo"}'),
        ("call_1", "get_weather", '{"city": "Bergen"}'),
    ]
    results = [{"role": "tool", "tool_call_id": one.id, "content": f"{number} degrees"} for number, one in enumerate(calls)]
    asked_back = {
        "role": "assistant",
        "tool_calls": [one.model_dump(exclude={"function": {"parsed_arguments"}, "index": True}) for one in calls],
    }
    second = client.chat.completions.create(messages=[*question, asked_back, *results], **arguments)

    assert second.choices[0].message.content == "results: 0 degrees 1 degrees"
    accounts.of(first_id)
    assert second._request_id is not None
    accounts.of(second._request_id)


# The other endpoints


@pytest.mark.parametrize("encoding", [openai.omit, "float", "base64"])
def test_embeddings(client: OpenAI, accounts: Accounts, upstream: OpenAIUpstream, encoding: Any) -> None:
    answer = client.embeddings.create(model="sim/text-embedding-3-small", input=["one", "two words"], encoding_format=encoding)

    assert upstream.last.json["encoding_format"] == ("base64" if encoding is openai.omit else encoding)
    if encoding != "base64":
        assert answer.data[1].embedding == pytest.approx(unit_vector("two words", 8))
        assert math.hypot(*answer.data[0].embedding) == pytest.approx(1)
    else:
        assert isinstance(answer.data[0].embedding, str)
    assert answer._request_id is not None
    accounts.of(answer._request_id, input_tokens=3, output_tokens=0)


def test_the_older_completions(client: OpenAI, accounts: Accounts) -> None:
    answer = client.completions.create(model="sim/gpt-3.5-turbo-instruct", prompt="Say this")
    stream = client.completions.create(model="sim/gpt-3.5-turbo-instruct", prompt="Say this", stream=True)
    text = "".join(chunk.choices[0].text for chunk in stream)

    assert answer.choices[0].text == text == "echo: Say this"
    assert answer._request_id is not None
    accounts.of(answer._request_id)
    accounts.of(id_of(stream), stream=True)


def test_moderations(client: OpenAI, sluice: Sluice, upstream: OpenAIUpstream) -> None:
    answer = client.moderations.create(model="sim/omni-moderation-latest", input=["kill it", "hello"])

    assert [result.flagged for result in answer.results] == [True, False]
    assert answer._request_id is not None
    row = sluice.row(answer._request_id)
    assert (row["status"], row["attempts"], upstream.bill(answer._request_id).posts) == (200, 1, 1)


def test_responses(client: OpenAI, accounts: Accounts) -> None:
    answer = client.responses.create(model="sim/gpt-5-mini", input="Hello there")

    assert answer.output_text == "echo: Hello there"
    assert answer._request_id is not None
    accounts.of(answer._request_id)


def test_responses_as_a_stream(client: OpenAI, accounts: Accounts) -> None:
    stream = client.responses.create(model="sim/gpt-5-mini", input="Hello there", stream=True)
    events = list(stream)

    assert events[0].type == "response.created"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "echo: Hello there"
    assert events[-1].type == "response.completed"
    accounts.of(id_of(stream), stream=True)


async def test_the_responses_stream_helper(sluice: Sluice, sim: str, accounts: Accounts) -> None:
    async with async_client(sluice) as client, client.responses.stream(model="sim/gpt-5-mini", input="Hello there") as stream:
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()

    assert "".join(deltas) == final.output_text == "echo: Hello there"
    accounts.of(str(stream._response.headers["x-request-id"]), stream=True)


def test_speech_comes_back_as_the_bytes_it_is(client: OpenAI, sluice: Sluice) -> None:
    answer = client.audio.speech.with_raw_response.create(model="sim/gpt-4o-mini-tts", voice="alloy", input="say it")

    assert answer.headers["content-type"] == "audio/mpeg"
    assert answer.content == b"ID3 sim say it"
    assert sluice.row(answer.headers["x-request-id"])["status"] == 200


def test_images(client: OpenAI, accounts: Accounts) -> None:
    answer = client.images.generate(model="sim/gpt-image-1", prompt="a sluice")

    assert answer.data is not None
    assert answer.data[0].b64_json
    assert answer._request_id is not None
    accounts.of(answer._request_id, output_tokens=100)


def test_models_are_listed_and_found_by_an_id_with_slashes(client: OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}

    assert listed["sim/gpt-4o"].owned_by == "sim"
    assert listed["sim/gpt-4o"].object == "model"
    assert client.models.retrieve("sim/vendor/model-with-slash").id == "sim/vendor/model-with-slash"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("sim/no-such/model")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_model_that_some_pool_lists_needs_no_prefix(client: OpenAI, sluice: Sluice) -> None:
    with OpenAIUpstream(models=["only-here", "gpt-4o"]) as other:
        credential = sluice.add_openai(other, prefix="other")
        sluice.manage("refresh_models", "--credential", str(credential))
        eventually(lambda: "other/only-here" in {model.id for model in client.models.list()}, "its models are not known", seconds=30)
        answer = client.chat.completions.create(model="only-here", messages=HELLO)

    assert answer._request_id is not None
    row = sluice.row(answer._request_id)
    assert (row["model"], row["served_model"], row["status"]) == ("only-here", "other/only-here", 200)


# Around an answer


def test_raw_headers(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="sim/gpt-4o", messages=HELLO)

    assert raw.headers["x-request-id"] == raw.parse()._request_id
    assert raw.headers["content-type"] == "application/json"
    assert "set-cookie" not in raw.headers
    assert "openai-organization" not in raw.headers


def test_a_streaming_response_read_by_hand(client: OpenAI, accounts: Accounts) -> None:
    with client.chat.completions.with_streaming_response.create(model="sim/gpt-4o", messages=HELLO, stream=True) as answer:
        lines = list(answer.iter_lines())

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [line for line in lines if line][-1] == "data: [DONE]"
    accounts.of(answer.headers["x-request-id"])


def test_leaving_a_stream_stops_the_upstream_and_is_metered_once(client: OpenAI, sluice: Sluice, upstream: OpenAIUpstream) -> None:
    upstream.script(Step(text="word " * 200, delay_frame_ms=20))
    stream = client.chat.completions.create(model="sim/gpt-4o", messages=HELLO, stream=True)
    for _ in range(4):
        next(stream)
    stream.close()

    [call] = upstream.calls(id_of(stream))
    eventually(lambda: call.peer_left_at is not None, "the upstream goes on", seconds=1)
    row = sluice.row(id_of(stream))
    assert (row["status"], row["error"], row["usage_source"], row["attempts"]) == (499, "client_closed", "estimated", 1)
    assert 3 <= row["output_tokens"] <= upstream.bill(id_of(stream)).output_tokens + 1
    assert row["cost_usd"] > 0


async def test_a_client_that_gives_up_waiting_is_metered_once(sluice: Sluice, sim: str, upstream: OpenAIUpstream) -> None:
    async with async_client(sluice) as client:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model="sim/sim-slow_headers", messages=HELLO, timeout=0.3)

    call = upstream.last
    eventually(lambda: call.peer_left_at is not None, "the upstream goes on", seconds=1)
    row = sluice.row(call.request_id)
    assert (row["status"], row["attempts"], upstream.bill(call.request_id).posts) == (499, 1, 1)
