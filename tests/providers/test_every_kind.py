"""The official `openai` package against every kind, each through its simulator and a running server.

What a kind can, its case shows; what it cannot must be refused in words before anything goes out. Which kinds there are and what they
can is said by the simulators themselves (`tests/upstreams/__init__.py`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from uuid import uuid4

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from project.env import REPOSITORY
from providers import registry
from tests.serving import Sluice
from tests.upstreams import CAPABILITIES, Offer, offers
from tests.upstreams.kit import Simulator, Step

WAYS = ("whole", "stream", "whole async", "stream async")
HELLO: Any = [{"role": "user", "content": "Hello my dear friend"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "How warm it is",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Weather(BaseModel):
    city: str
    degrees: int


SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {"name": "Weather", "strict": True, "schema": {**Weather.model_json_schema(), "additionalProperties": False}},
}


@dataclass
class Said:
    """What the package made of one answer, whole or streamed."""

    request_id: str
    text: str = ""
    reasoning: str = ""
    calls: list[Any] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    usage: Any = None
    failure: openai.APIError | None = None  # in the middle of a stream

    def message(self) -> Any:
        """As a client sends it back in the next turn."""
        return {"role": "assistant", "content": self.text or None, "tool_calls": self.calls}


class Clients:
    """The package's two clients, made once: to read the list of authorities takes longer than most cases."""

    def __init__(self, sluice: Sluice) -> None:
        connection: Any = {"api_key": sluice.issue_key(), "base_url": f"{sluice.url}/v1", "max_retries": 0}
        self.plain, self.in_loop, self.loop = OpenAI(**connection), AsyncOpenAI(**connection), asyncio.Runner()

    def close(self) -> None:
        self.plain.close()
        self.loop.run(self.in_loop.close())
        self.loop.close()


@dataclass
class Kind:
    """One kind: its simulator, and a server that has accounts there."""

    offer: Offer
    simulator: Simulator
    sluice: Sluice
    clients: Clients

    @cached_property
    def prefix(self) -> str:
        return self.account()

    @cached_property
    def accounts_for_failures(self) -> dict[tuple[str, str], str]:
        """An account for each, so that the rest that one failure gives is in nobody's way."""
        return {(scenario, way): self.account() for scenario in FAILURES for way in FAILURE_WAYS}

    def prefixes(self) -> list[str]:
        return [self.prefix, *self.accounts_for_failures.values()]

    def account(self) -> str:
        prefix, origin = f"{self.offer.kind}-{uuid4().hex[:8]}", self.simulator.origin
        settings = {name: text.replace("{origin}", origin) for name, text in self.offer.settings.items()}
        secret = self.offer.secret.replace("{origin}", origin)
        self.sluice.add_credential(self.offer.kind, self.simulator.base_url, secret=secret, prefix=prefix, **settings)
        return prefix

    def ask(self, way: str, *, prefix: str = "", **arguments: Any) -> Said:
        """One call of the package. Raises what it raises before the first event."""
        arguments = {"model": f"{prefix or self.prefix}/{self.offer.model}", "messages": HELLO, **arguments}
        clients = self.clients
        match way:
            case "whole":
                return whole(clients.plain.chat.completions.create(**arguments))
            case "stream":
                with clients.plain.chat.completions.create(stream=True, **arguments) as stream:
                    return told(stream, *read(stream))
            case "whole async":
                return clients.loop.run(ask_whole(clients.in_loop, arguments))
        return clients.loop.run(ask_stream(clients.in_loop, arguments))

    def row(self, said: Said, **expected: Any) -> dict[str, Any]:
        """The usage row of an answer: it says what the client was told, and the upstream got nothing that it does not know."""
        row = self.sluice.row(said.request_id)
        source = "reported" if "usage" in self.offer.can else "estimated"
        wanted = {"status": 200, "error": "", "attempts": 1, "provider": self.offer.kind, "usage_source": source, **expected}
        assert {name: row[name] for name in wanted} == wanted
        assert row["input_tokens"] > 0
        assert row["output_tokens"] > 0
        assert self.simulator.last.unknown_fields == {}
        return row


async def ask_whole(client: AsyncOpenAI, arguments: Any) -> Said:
    return whole(await client.chat.completions.create(**arguments))


async def ask_stream(client: AsyncOpenAI, arguments: Any) -> Said:
    async with await client.chat.completions.create(stream=True, **arguments) as stream:
        chunks, failure = [], None
        try:
            async for chunk in stream:
                chunks.append(chunk)  # noqa: PERF401 what came before a failure counts
        except openai.APIError as problem:
            failure = problem
        return told(stream, chunks, failure)


def read(stream: Any) -> tuple[list[Any], openai.APIError | None]:
    chunks = []
    try:
        for chunk in stream:
            chunks.append(chunk)  # noqa: PERF402 what came before a failure counts
    except openai.APIError as problem:
        return chunks, problem
    return chunks, None


def whole(answer: Any) -> Said:
    [choice] = answer.choices
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant"
    return Said(
        request_id=answer._request_id,
        text=choice.message.content or "",
        reasoning=getattr(choice.message, "reasoning_content", None) or "",
        calls=[call.model_dump(exclude_none=True) for call in choice.message.tool_calls or ()],
        reasons=[choice.finish_reason],
        usage=answer.usage,
    )


def told(stream: Any, chunks: list[Any], failure: openai.APIError | None) -> Said:
    """A stream put together as clients do it. What must hold for each event is checked on the way."""
    said = Said(str(stream.response.headers["x-request-id"]), failure=failure)
    assert {chunk.object for chunk in chunks} <= {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.model) for chunk in chunks}) <= 1
    for number, chunk in enumerate(chunks):
        if not chunk.choices:
            assert number == len(chunks) - 1
            said.usage = chunk.usage
            continue
        [choice] = chunk.choices
        said.text += choice.delta.content or ""
        said.reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or ():
            add_to(said.calls, call)
        said.reasons += [choice.finish_reason] if choice.finish_reason else []
    return said


def add_to(calls: list[Any], part: Any) -> None:
    if part.index == len(calls):
        calls.append({"id": part.id, "type": "function", "function": {"name": part.function.name, "arguments": ""}})
    calls[part.index]["function"]["arguments"] += part.function.arguments or ""


@pytest.fixture(scope="session")
def running_kinds(request: pytest.FixtureRequest, sluice: Sluice) -> Iterator[dict[str, Kind]]:
    """All that this run is about, with all their accounts: until the server knows new ones, there is only one wait."""
    about = {
        item.callspec.params.get("kind")
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    }
    clients = Clients(sluice)
    with ExitStack() as stack:
        stack.callback(clients.close)
        kinds = {
            name: Kind(offer, stack.enter_context(offer.simulator()), sluice, clients) for name, offer in offers().items() if name in about
        }
        sluice.wait_for(*[prefix for kind in kinds.values() for prefix in kind.prefixes()])
        yield kinds


@pytest.fixture(params=sorted(offers()))
def kind(request: pytest.FixtureRequest, running_kinds: dict[str, Kind]) -> Kind:
    """With an empty script and log."""
    found = running_kinds[request.param]
    found.simulator.reset()
    return found


def of_each_kind(capability: str) -> Callable[[Any], Any]:
    """A case that a kind without the capability must refuse: the body is run until the refusal, which then is judged."""
    assert capability in CAPABILITIES

    def marked(case: Callable[[Kind, str], None]) -> Callable[[Kind, str], None]:
        @pytest.mark.parametrize("way", WAYS)
        def test(kind: Kind, way: str) -> None:
            if capability in kind.offer.can:
                return case(kind, way)
            with pytest.raises(openai.BadRequestError) as refused:
                case(kind, way)
            return is_clear(kind, refused.value)

        test.__name__ = test.__qualname__ = case.__name__
        test.__doc__ = case.__doc__
        return test

    return marked


def is_clear(kind: Kind, refused: openai.BadRequestError) -> None:
    assert (refused.type, str(refused.code)[:12]) == ("invalid_request_error", "unsupported_")
    assert refused.param
    assert len(refused.message.split()) > 3
    assert kind.simulator.posts == [], "it was refused only after something had gone out"


# Words


@pytest.mark.parametrize("way", WAYS)
def test_it_answers(kind: Kind, way: str) -> None:
    said = kind.ask(way)

    assert said.text == "echo: Hello my dear friend"
    assert (said.reasons, said.calls, said.failure) == (["stop"], [], None)
    assert (said.usage is None) == way.startswith("stream"), "a usage event that nobody asked for breaks clients"
    row = kind.row(said, stream=way.startswith("stream"), model=f"{kind.prefix}/{kind.offer.model}")
    if said.usage is not None and row["usage_source"] == "reported":
        assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (row["input_tokens"], row["output_tokens"])


@pytest.mark.parametrize("way", ["stream", "stream async"])
def test_a_stream_ends_with_its_usage_when_it_was_asked_for(kind: Kind, way: str) -> None:
    said = kind.ask(way, stream_options={"include_usage": True})

    assert said.text == "echo: Hello my dear friend"
    row = kind.row(said)
    assert said.usage is not None
    if row["usage_source"] == "reported":
        assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (row["input_tokens"], row["output_tokens"])


@pytest.mark.parametrize("way", WAYS)
def test_an_earlier_turn_and_parts_of_text_reach_it(kind: Kind, way: str) -> None:
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    said = kind.ask(way, messages=[*turns, {"role": "user", "content": [{"type": "text", "text": "three four"}]}])

    assert said.text == "echo: three four"
    assert b"two" in kind.simulator.last.body
    kind.row(said)


@pytest.mark.parametrize("scenario", ["split_utf8", "coalesced"])
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_arrives_whole_however_it_is_cut(kind: Kind, way: str, scenario: str) -> None:
    kind.simulator.script(Step(scenario=scenario, text="grüße 𝄞🚀 naïve"))

    assert kind.ask(way).text == "grüße 𝄞🚀 naïve"


@of_each_kind("system")
def test_a_system_message_reaches_it(kind: Kind, way: str) -> None:
    said = kind.ask(way, messages=[{"role": "system", "content": "Answer in verse."}, *HELLO])

    assert b"Answer in verse." in kind.simulator.last.body
    assert said.text == "echo: Hello my dear friend"
    kind.row(said)


@of_each_kind("images")
def test_an_image_reaches_it(kind: Kind, way: str) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    said = kind.ask(way, messages=[{"role": "user", "content": [{"type": "text", "text": "What is it"}, image]}])

    assert said.text.strip() == "echo: What is it"
    assert PIXEL.encode() in kind.simulator.last.body
    kind.row(said)


@of_each_kind("image_urls")
def test_the_address_of_an_image_reaches_it(kind: Kind, way: str) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://images.example.org/sluice.png"}}
    said = kind.ask(way, messages=[{"role": "user", "content": [{"type": "text", "text": "What is it"}, image]}])

    assert b"https://images.example.org/sluice.png" in kind.simulator.last.body
    kind.row(said)


@pytest.mark.parametrize("way", WAYS)
def test_it_thinks(kind: Kind, way: str) -> None:
    """A kind that tells no thoughts either refuses the effort, or drops it and says so in its page."""
    kind.simulator.script(Step(scenario="reasoning") if "reasoning" in kind.offer.can else Step())
    if "reasoning" not in kind.offer.can and "reasoning_effort" not in kind.offer.drops:
        with pytest.raises(openai.BadRequestError) as refused:
            kind.ask(way, reasoning_effort="high")
        return is_clear(kind, refused.value)
    said = kind.ask(way, reasoning_effort="high")

    assert bool(said.reasoning) == ("reasoning" in kind.offer.can)
    assert said.text == "echo: Hello my dear friend"
    kind.row(said)


def test_what_it_drops_is_documented(kind: Kind) -> None:
    page = REPOSITORY / "docs" / "providers" / f"{kind.offer.kind}.md"

    assert [name for name in kind.offer.drops | kind.offer.done_here if f"`{name}`" not in page.read_text()] == []


# Tools and structure


@of_each_kind("tools")
def test_a_tool_is_called_and_its_result_is_heard(kind: Kind, way: str) -> None:
    kind.simulator.script(Step(scenario="tool_call"), Step(text="It is warm."))
    question = [{"role": "user", "content": "How warm is it?"}]
    first = kind.ask(way, messages=question, tools=[WEATHER])

    [call] = first.calls
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "Oslo"})
    assert call["id"]
    assert first.reasons == ["tool_calls"]
    kind.row(first)

    result = {"role": "tool", "tool_call_id": call["id"], "content": "21 degrees in the shade"}
    second = kind.ask(way, messages=[*question, first.message(), result], tools=[WEATHER])

    assert second.text == "It is warm."
    assert b"21 degrees in the shade" in kind.simulator.last.body
    kind.row(second)


@of_each_kind("parallel_tools")
def test_two_calls_in_one_answer(kind: Kind, way: str) -> None:
    kind.simulator.script(Step(scenario="tool_calls_parallel"), Step(text="Oslo is warmer."))
    question = [{"role": "user", "content": "Which is warmer?"}]
    arguments: Any = {"tools": [WEATHER], "parallel_tool_calls": True}
    first = kind.ask(way, messages=question, **arguments)

    assert [json.loads(call["function"]["arguments"])["city"] for call in first.calls] == ["Oslo", "Bergen"]
    assert len({call["id"] for call in first.calls}) == 2
    assert first.reasons == ["tool_calls"]

    results = [{"role": "tool", "tool_call_id": call["id"], "content": f"{n} degrees there"} for n, call in enumerate(first.calls)]
    second = kind.ask(way, messages=[*question, first.message(), *results], **arguments)

    assert second.text == "Oslo is warmer."
    assert b"0 degrees there" in kind.simulator.last.body
    assert b"1 degrees there" in kind.simulator.last.body
    kind.row(second)


@of_each_kind("structured")
def test_an_answer_of_a_given_shape(kind: Kind, way: str) -> None:
    kind.simulator.script(Step(text='{"city": "Oslo", "degrees": 21}'))
    said = kind.ask(way, response_format=SCHEMA)

    assert Weather.model_validate_json(said.text) == Weather(city="Oslo", degrees=21)
    assert b"degrees" in kind.simulator.last.body
    kind.row(said)


# Failures

FAILURE_WAYS = ("whole", "stream async")
# scenario -> the statuses and the code that the client may see
FAILURES: dict[str, tuple[set[int], str | None]] = {
    "bad_key": ({502}, "upstream_auth_failed"),
    "forbidden": ({403}, None),
    "no_credit": ({402, 429}, "insufficient_quota"),
    "rate_limit": ({429}, "rate_limit_exceeded"),
    "overloaded": ({503}, "overloaded"),
    "server_error": ({502}, "upstream_error"),
    "html_502": ({502}, "upstream_error"),
    "html_200": ({502}, "upstream_bad_response"),
}


@pytest.mark.parametrize("way", FAILURE_WAYS)
@pytest.mark.parametrize("scenario", FAILURES)
def test_what_it_refuses_is_said_in_one_vocabulary(kind: Kind, way: str, scenario: str) -> None:
    statuses, code = FAILURES[scenario]
    kind.simulator.script(*[Step(scenario=scenario)] * 2)  # an account that can sign in again tries twice
    with pytest.raises(openai.APIStatusError) as caught:
        kind.ask(way, prefix=kind.accounts_for_failures[scenario, way])

    error = caught.value
    assert error.status_code in statuses
    assert code is None or error.code == code
    assert "<" not in error.message
    assert error.response.headers.get("x-should-retry") == ("false" if code == "insufficient_quota" else None)
    assert kind.sluice.row(str(error.request_id))["status"] == error.status_code


@pytest.mark.parametrize("way", ["stream", "stream async"])
@pytest.mark.parametrize("scenario", ["eof_mid", "error_frame"])
def test_a_stream_that_breaks_never_looks_whole(kind: Kind, way: str, scenario: str) -> None:
    kind.simulator.script(Step(scenario=scenario, text="one two three four five six"))
    said = kind.ask(way)

    assert said.failure is not None
    assert said.text
    assert "one two three four five six".startswith(said.text.strip())
    assert said.reasons == []
    assert kind.sluice.row(said.request_id)["status"] == 502


# The list itself


def test_every_adapter_has_an_offer() -> None:
    """But those that answer by themselves: they need no upstream."""
    ours = {name for name in registry.names() if type(registry.adapter(name)).__module__.startswith("providers.adapters.")}
    need_one = {name for name in ours if registry.adapter(name).transport is None}

    assert set(offers()) == need_one, "see tests/upstreams/__init__.py: what a simulator must offer"
