"""The demo upstream, as OpenAI's own SDK sees it."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import APIError, APIStatusError, AsyncOpenAI
from pydantic import BaseModel

from providers.adapters.demo import Demo
from providers.demo_schema import instance_of
from providers.demo_server import ERRORS, DemoTransport, unit_vector

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 2}}},
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}}}},
}


def client() -> AsyncOpenAI:
    return AsyncOpenAI(
        api_key="any", base_url="http://demo.invalid/v1", max_retries=0, http_client=httpx.AsyncClient(transport=DemoTransport())
    )


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]


async def post(endpoint: str, body: object) -> httpx.Response:
    async with httpx.AsyncClient(transport=DemoTransport(), base_url="http://demo.invalid/v1/") as http:
        return await http.post(endpoint, content=body if isinstance(body, bytes) else json.dumps(body))


async def test_echo_gives_back_the_last_message_and_counts_words():
    answer = await client().chat.completions.create(model="echo", messages=says("one two  three"))

    assert answer.choices[0].message.content == "one two  three"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 3, 8)


async def test_echo_streams_word_by_word_and_says_usage_only_when_asked():
    chunks = [chunk async for chunk in await client().chat.completions.create(model="echo-0", messages=says("one two three"), stream=True)]

    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "one", " two", " three", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1

    asked = await client().chat.completions.create(
        model="echo-0", messages=says("one"), stream=True, stream_options={"include_usage": True}
    )
    *_, last = [chunk async for chunk in asked]
    assert last.choices == []
    assert last.usage.completion_tokens == 1


async def test_a_ceiling_and_a_stop_word_end_an_answer_early():
    short = await client().chat.completions.create(model="echo", messages=says("a b c d"), max_tokens=2)
    stopped = await client().chat.completions.create(model="echo", messages=says("a b STOP c"), stop=["STOP", "never"])

    assert (short.choices[0].message.content, short.choices[0].finish_reason, short.usage.completion_tokens) == ("a b", "length", 2)
    assert stopped.choices[0].message.content == "a b "
    assert stopped.choices[0].finish_reason == "stop"


async def test_several_choices_are_several_answers():
    answer = await client().chat.completions.create(model="echo", messages=says("a b"), n=3)
    chunks = [chunk async for chunk in await client().chat.completions.create(model="echo-0", messages=says("a"), n=2, stream=True)]

    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 6
    assert {chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason} == {0, 1}


async def test_two_tools_are_called_at_once_and_then_their_results_told():
    messages: list[Any] = says("What is the weather, and what time is it?")
    first = await client().chat.completions.create(model="tools", messages=messages, tools=[WEATHER, CLOCK])
    calls = first.choices[0].message.tool_calls

    assert first.choices[0].finish_reason == "tool_calls"
    assert [call.function.name for call in calls] == ["weather", "clock"]
    assert json.loads(calls[0].function.arguments) == {"city": "Paris", "days": 2}
    assert json.loads(calls[1].function.arguments) == {"zone": "UTC"}
    assert len({call.id for call in calls}) == 2

    messages += [first.choices[0].message, *({"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls)]
    second = await client().chat.completions.create(model="tools", messages=messages, tools=[WEATHER, CLOCK])
    assert second.choices[0].message.content == "The tools said: sunny; sunny"
    assert second.choices[0].finish_reason == "stop"


async def test_streamed_tool_calls_add_up_to_the_same_calls():
    async with client().chat.completions.stream(model="tools-0", messages=says("hi"), tools=[WEATHER, CLOCK]) as stream:
        answer = await stream.get_final_completion()

    calls = answer.choices[0].message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Paris", "days": 2}, {"zone": "UTC"}]


@pytest.mark.parametrize(
    ("wish", "called"),
    [
        ({"tool_choice": "none"}, []),
        ({"parallel_tool_calls": False}, ["weather"]),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, ["clock"]),
    ],
)
async def test_the_callers_wish_about_tools_is_kept(wish: dict[str, Any], called: list[str]):
    answer = await client().chat.completions.create(model="tools", messages=says("hi"), tools=[WEATHER, CLOCK], **wish)

    assert [call.function.name for call in answer.choices[0].message.tool_calls or []] == called


async def test_reasoning_thinks_before_it_speaks_and_counts_its_thoughts():
    stream = await client().chat.completions.create(
        model="reasoning-0", messages=says("hello"), stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    order = ["thought" if getattr(c.choices[0].delta, "reasoning_content", None) else "word" for c in chunks[1:-2]]

    assert order == sorted(order)
    assert order.count("word") == 1
    usage = chunks[-1].usage
    assert usage.completion_tokens_details.reasoning_tokens == order.count("thought") == usage.completion_tokens - 1


async def test_slow_waits_before_the_first_word():
    slept: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("providers.demo_server.asyncio.sleep", _recording(slept))
        stream = await client().chat.completions.create(model="slow", messages=says("a b"), stream=True)
        words = [chunk.choices[0].delta.content async for chunk in stream]

    assert slept == [5.0, 1.0, 1.0]
    assert words == ["", "a", " b", None]


def _recording(slept: list[float]) -> Any:
    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    return sleep


async def test_long_is_a_thousand_words():
    stream = await client().chat.completions.create(model="long", messages=says("go"), stream=True)

    assert sum(1 for chunk in [chunk async for chunk in stream] if chunk.choices[0].delta.content) == 1000


async def test_json_fills_in_the_schema_that_the_sdk_makes_of_a_class():
    class Leaf(BaseModel):
        name: str
        next: Leaf | None = None

    class Form(BaseModel):
        title: str
        count: int
        done: bool
        tags: list[str]
        leaf: Leaf

    answer = await client().chat.completions.parse(model="json", messages=says("fill it in"), response_format=Form)

    assert isinstance(answer.choices[0].message.parsed, Form)
    assert answer.choices[0].message.parsed.leaf.name == "Ada"


async def test_embeddings_are_unit_vectors_and_the_same_in_both_encodings():
    packed = await client().embeddings.create(model="embeddings", input=["cat", "dog", "cat"])  # the SDK asks for base64
    plain = await client().embeddings.create(model="embeddings", input="cat", encoding_format="float", dimensions=8)
    tokens = await client().embeddings.create(model="embeddings", input=[[1, 2], [3]], dimensions=8)

    cat, dog, again = (one.embedding for one in packed.data)
    assert cat == again != dog
    assert cat == pytest.approx(unit_vector("cat", 256), abs=1e-6)
    assert math.sqrt(sum(x * x for x in cat)) == pytest.approx(1, abs=1e-5)
    assert plain.data[0].embedding == unit_vector("cat", 8)
    assert packed.usage.prompt_tokens == 3
    assert len(tokens.data) == 2


async def test_moderation_flags_the_word():
    answer = await client().moderations.create(model="moderation", input=["all is well", "please FLAG this"])

    assert [result.flagged for result in answer.results] == [False, True]
    assert answer.results[1].categories.harassment


@pytest.mark.parametrize("status", ERRORS)
async def test_each_error_is_raised_as_the_sdk_knows_it(status: int):
    with pytest.raises(APIStatusError) as raised:
        await client().chat.completions.create(model=f"error-{status}", messages=says("hi"))

    assert raised.value.status_code == status
    assert raised.value.code == ERRORS[status][3]
    assert ("retry-after" in raised.value.response.headers) == (status in (429, 503))


async def test_an_error_in_the_middle_of_a_stream_comes_after_words():
    words: list[str | None] = []
    with pytest.raises(APIError, match="went wrong"):
        stream = await client().chat.completions.create(model="error-stream-0", messages=says("a b c d"), stream=True)
        async for chunk in stream:
            words += [chunk.choices[0].delta.content]

    assert words == ["", "a", " b"]


async def test_cut_ends_without_a_finish_reason_or_done():
    response = await post("chat/completions", {"model": "cut-0", "messages": says("a b c d"), "stream": True})

    assert '"content":"a"' in response.text
    assert '"content":" c"' not in response.text
    assert "[DONE]" not in response.text
    assert '"finish_reason":"stop"' not in response.text


async def test_the_older_completions_echo_too_and_stop_at_sixteen_tokens():
    answer = await client().completions.create(model="echo", prompt=" ".join("abcdefghijklmnopqrstuvwxyz"))
    stream = await client().completions.create(model="echo-0", prompt="a b", stream=True)

    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "a b"


async def test_responses_stream_to_the_same_response():
    async with client().responses.stream(model="reasoning-0", input="hello there") as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    whole = await client().responses.create(model="echo", instructions="Be kind.", input=[{"role": "user", "content": "hi"}])

    assert final.output_text == "hello there"
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert final.usage.output_tokens_details.reasoning_tokens > 0
    assert whole.output_text == "hi"
    assert whole.usage.input_tokens == 3


async def test_responses_call_tools_and_tell_their_results():
    tool = {"type": "function", "name": "weather", "parameters": WEATHER["function"]["parameters"], "strict": False}
    async with client().responses.stream(model="tools-0", input="hi", tools=[tool]) as stream:
        first = await stream.get_final_response()
    [call] = first.output
    second = await client().responses.create(
        model="tools",
        tools=[tool],
        input=[{"role": "user", "content": "hi"}, call, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}],
    )

    assert json.loads(call.arguments) == {"city": "Paris", "days": 2}
    assert second.output_text == "The tools said: sunny"


async def test_rerank_puts_the_closest_first():
    response = await post(
        "rerank", {"model": "echo", "query": "red cat", "documents": ["a dog", "a red cat", {"text": "a cat"}], "top_n": 2}
    )

    assert [result["index"] for result in response.json()["results"]] == [1, 2]


@pytest.mark.parametrize(
    ("endpoint", "body", "status", "param"),
    [
        ("chat/completions", b"{", 400, None),
        ("chat/completions", b"[]", 400, None),
        ("chat/completions", b"\xff", 400, None),
        ("chat/completions", {"messages": says("hi")}, 400, "model"),
        ("chat/completions", {"model": 3, "messages": says("hi")}, 400, "model"),
        ("chat/completions", {"model": "gpt-9", "messages": says("hi")}, 404, "model"),
        ("chat/completions", {"model": "embeddings", "messages": says("hi")}, 404, "model"),
        ("chat/completions", {"model": "echo"}, 400, "messages"),
        ("chat/completions", {"model": "echo", "messages": "hi"}, 400, "messages"),
        ("chat/completions", {"model": "echo", "messages": ["hi"]}, 400, "messages[0]"),
        ("chat/completions", {"model": "echo", "messages": [{"role": "user", "content": 7}]}, 400, "messages[0].content"),
        ("chat/completions", {"model": "echo", "messages": says("hi"), "max_tokens": "many"}, 400, "max_tokens"),
        ("chat/completions", {"model": "echo", "messages": says("hi"), "max_tokens": 0}, 400, "max_tokens"),
        ("chat/completions", {"model": "echo", "messages": says("hi"), "n": 99}, 400, "n"),
        ("chat/completions", {"model": "echo", "messages": says("hi"), "stream": "yes"}, 400, "stream"),
        ("chat/completions", {"model": "echo", "messages": says("hi"), "stop": [1]}, 400, "stop"),
        ("chat/completions", {"model": "echo", "messages": says("hi"), "stream_options": {}}, 400, "stream_options"),
        ("chat/completions", {"model": "tools", "messages": says("hi"), "tools": [{}]}, 400, "tools[0].function.name"),
        ("chat/completions", {"model": "json", "messages": says("hi"), "response_format": 3}, 400, "response_format"),
        ("completions", {"model": "echo"}, 400, "prompt"),
        ("embeddings", {"model": "embeddings", "input": []}, 400, "input"),
        ("embeddings", {"model": "embeddings", "input": "a", "dimensions": 0}, 400, "dimensions"),
        ("embeddings", {"model": "embeddings", "input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
        ("embeddings", {"model": "echo", "input": "a"}, 404, "model"),
        ("moderations", {"model": "moderation"}, 400, "input"),
        ("rerank", {"model": "echo", "documents": ["a"]}, 400, "query"),
        ("audio/speech", {"model": "echo"}, 404, None),
    ],
)
async def test_bad_input_is_refused_in_openais_shape(endpoint: str, body: object, status: int, param: str | None):
    response = await post(endpoint, body)

    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.json()["error"]["param"] == param


CHAT_FIELDS = ["messages", "tools", "tool_choice", "response_format", "max_tokens", "n", "stop", "stream", "stream_options"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from(["chat/completions", "completions", "responses", "embeddings", "moderations", "rerank"]),
    st.sampled_from(["echo-0", "tools-0", "json-0", "reasoning-0", "embeddings", "moderation"]),
    st.dictionaries(
        st.sampled_from(
            [*CHAT_FIELDS, "input", "prompt", "text", "dimensions", "query", "documents"],
        ),
        json_values,
    ),
)
def test_no_body_makes_it_stumble(endpoint: str, model: str, body: dict[str, object]):
    from asgiref.sync import async_to_sync

    response = async_to_sync(post)(endpoint, {**body, "model": model})

    assert response.status_code in (200, 400, 404)


def test_a_schema_of_itself_comes_to_an_end():
    node = {"type": "object", "properties": {name: {"$ref": "#/$defs/node"} for name in "abcdefghij"}}

    made = instance_of({"$ref": "#/$defs/node", "$defs": {"node": node}})

    assert made["a"]["a"]["a"].keys() == set("abcdefghij")
    assert len(json.dumps(made)) < 100_000


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "integer", "minimum": 3, "multipleOf": 5}, 5),
        ({"type": "integer", "maximum": 0}, 0),
        ({"type": "number", "exclusiveMinimum": 2.5}, 3),
        ({"type": "integer", "maximum": 10**40, "minimum": 10**30}, 1),
        ({"type": ["null", "string"], "format": "date"}, "2026-01-31"),
        ({"type": "string", "minLength": 9}, "examplexx"),
        ({"anyOf": [{"type": "null"}, {"const": 4}]}, 4),
        ({"type": "array", "minItems": 2, "items": {"type": "boolean"}}, [True, True]),
        ({"properties": {"city": {}}}, {"city": "Paris"}),
        ("rubbish", None),
    ],
)
def test_a_value_fits_its_schema(schema: object, value: object):
    assert instance_of(schema) == value


def test_its_models_are_known_without_a_call():
    listed = Demo().listed()

    assert {"echo", "tools", "reasoning", "slow", "long", "json", "embeddings", "moderation", "error-429", "error-stream", "cut"} <= set(
        listed
    )
