"""What a client says reaches each upstream whole or is refused, and what an upstream counted reaches the ledger and the client.

Random conversations go through the adapter of every kind to its simulator, which judges them, and its answer comes back through the
reader. Which kinds there are and what they can is said by the simulators (`tests/upstreams/__init__.py`).
"""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers import registry
from providers.adapter import Ask, Heard, Pause, Target
from providers.exchange import Outgoing
from providers.failures import InvalidAtUpstream
from providers.price import Tokens
from providers.secrets import SecretText
from tests.upstreams import Offer, offers
from tests.upstreams.kit import Simulator, Step

Json = dict[str, Any]
EXAMPLES = 50
# No two of these can have the same value, so that each is known again under whatever name it goes on.
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.integers(1, 99).map(lambda n: n / 100),
    "top_p": st.integers(501, 999).map(lambda n: n / 1000),
    "presence_penalty": st.integers(1001, 1999).map(lambda n: n / 1000),
    "frequency_penalty": st.integers(-1999, -1001).map(lambda n: n / 1000),
    "max_tokens": st.integers(1000, 4000),
    "max_completion_tokens": st.integers(5000, 8000),
    "seed": st.integers(10_000, 2**31 - 1),
    "stop": st.lists(st.from_regex(r"<end-[a-z]{4}>", fullmatch=True), min_size=1, max_size=4, unique=True),
}
NAME = st.from_regex(r"[a-z]{3}_[A-Za-z0-9_]{1,20}", fullmatch=True)
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30)
PLAIN = st.none() | st.booleans() | st.integers(-(2**31), 2**31) | ANY_TEXT
ARGUMENTS = st.dictionaries(NAME, PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(NAME, PLAIN, max_size=2), max_size=3)
WORDS = st.lists(st.from_regex(r"[a-zé]{1,8}", fullmatch=True), min_size=1, max_size=9).map(" ".join)


# What is said


@dataclass
class Talk:
    """A client's request, and all that must be found again in what goes out."""

    body: Json = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    objects: list[Json] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    uses: set[str] = field(default_factory=set)  # the capabilities that it takes

    def text(self, said: str) -> str:
        """Told from all others by its number, and never a JSON object or blank."""
        self.texts.append(f"#{len(self.texts)}: {said} ;")
        return self.texts[-1]


@st.composite
def talks(draw: st.DrawFn) -> Talk:
    talk = Talk()
    messages: list[Json] = []
    tools = draw(st.lists(tool(), max_size=2, unique_by=lambda one: one["function"]["name"]))
    if draw(st.booleans()):
        talk.uses.add("system")
        messages.append({"role": draw(st.sampled_from(["system", "developer"])), "content": talk.text(draw(ANY_TEXT))})
    for turn in range(draw(st.integers(0, 2))):
        messages.append(draw(question(talk)))
        if tools and draw(st.booleans()):
            messages += draw(called(talk, tools, turn))
            if draw(st.booleans()):
                continue
        messages.append({"role": "assistant", "content": talk.text(draw(ANY_TEXT))})
    messages.append(draw(question(talk)))
    if tools:
        talk.uses.add("tools")
        talk.body["tools"] = tools
        for one in tools:
            talk.names += [one["function"]["name"], *one["function"]["parameters"]["properties"]]
            talk.texts.append(one["function"]["description"])
    elif draw(st.booleans()):
        talk.uses.add("structured")
        schema = draw(object_schema())
        talk.names += schema["properties"]
        talk.body["response_format"] = {"type": "json_schema", "json_schema": {"name": "shape", "strict": True, "schema": schema}}
    for name in draw(st.lists(st.sampled_from(sorted(SAMPLING)), max_size=3, unique_by=lambda name: "max_" in name or name)):
        talk.body[name] = draw(SAMPLING[name])
    talk.body["messages"] = messages
    return talk


@st.composite
def question(draw: st.DrawFn, talk: Talk) -> Json:
    if not draw(st.booleans()):
        return {"role": "user", "content": talk.text(draw(ANY_TEXT))}
    parts: list[Json] = [{"type": "text", "text": talk.text(draw(ANY_TEXT))} for _ in range(draw(st.integers(1, 2)))]
    if draw(st.booleans()):
        talk.uses.add("images")
        talk.images.append(base64.b64encode(draw(st.binary(min_size=12, max_size=40))).decode())
        parts.insert(draw(st.integers(0, 1)), {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{talk.images[-1]}"}})
    return {"role": "user", "content": parts}


@st.composite
def called(draw: st.DrawFn, talk: Talk, tools: list[Json], turn: int) -> list[Json]:
    """An assistant that calls functions, with or without words, and what they gave, in whichever order."""
    given_names = draw(st.lists(st.sampled_from([one["function"]["name"] for one in tools]), min_size=1, max_size=3))
    if len(given_names) > 1:
        talk.uses.add("parallel_tools")
    calls, results = [], []
    for number, name in enumerate(given_names):
        arguments = draw(ARGUMENTS)
        talk.objects.append(arguments)
        call_id = f"call_{turn}_{number}"
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}})
        results.append({"role": "tool", "tool_call_id": call_id, "content": draw(result(talk))})
    words = {"content": talk.text(draw(ANY_TEXT))} if draw(st.booleans()) else {"content": None}
    return [{"role": "assistant", **words, "tool_calls": calls}, *draw(st.permutations(results))]


@st.composite
def result(draw: st.DrawFn, talk: Talk) -> str:
    if draw(st.booleans()):
        return talk.text(draw(ANY_TEXT))
    talk.objects.append(draw(ARGUMENTS))
    return json.dumps(talk.objects[-1])


@st.composite
def object_schema(draw: st.DrawFn) -> Json:
    names = draw(st.lists(NAME, min_size=1, max_size=3, unique=True))
    properties = {name: {"type": draw(st.sampled_from(["string", "integer", "boolean"]))} for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


@st.composite
def tool(draw: st.DrawFn) -> Json:
    function = {"name": draw(NAME), "description": f"Does {draw(WORDS)}.", "parameters": draw(object_schema())}
    return {"type": "function", "function": function}


# What went out


class Found:
    """Everything that stands in a body, also where JSON is written out inside a string."""

    def __init__(self, body: bytes) -> None:
        self.texts: list[str] = []
        self.keys: set[str] = set()
        self.numbers: list[float] = []
        self.objects: list[Json] = []
        self._look(json.loads(body))

    def _look(self, value: Any) -> None:
        match value:
            case dict():
                self.objects.append(value)
                self.keys |= value.keys()
                for inner in value.values():
                    self._look(inner)
            case list():
                for inner in value:
                    self._look(inner)
            case str():
                self.texts.append(value)
                if value[:1] in ("{", "["):
                    try:
                        self._look(json.loads(value))
                    except ValueError:
                        return
            case bool() | None:
                return
            case _:
                self.numbers.append(value)

    def text(self, wanted: str) -> bool:
        return any(wanted in text for text in self.texts)

    def object(self, wanted: Json) -> bool:
        return wanted in self.objects or self.text(json.dumps(wanted))

    def sampling(self, wanted: Any) -> bool:
        return all(map(self.text, wanted)) if isinstance(wanted, list) else wanted in self.numbers

    def lost(self, talk: Talk, offer: Offer) -> Json:
        """What was said and is not here, without what this upstream is said not to know."""
        lost: Json = {
            "texts": [text for text in talk.texts if not self.text(text)],
            "names": [name for name in talk.names if name not in self.keys and not self.text(name)],
            "objects": [one for one in talk.objects if not self.object(one)],
            "images": [image for image in talk.images if not self.text(image)],
            "sampling": [
                name
                for name in SAMPLING
                if name in talk.body and name not in offer.drops | offer.done_here and not self.sampling(talk.body[name])
            ],
        }
        return {what: missing for what, missing in lost.items() if missing}


# The way there and back


class Trip:
    """One kind, from the request to the answer, with nothing of the gateway between."""

    def __init__(self, offer: Offer, simulator: Simulator) -> None:
        origin = simulator.origin
        self.offer, self.simulator, self.adapter = offer, simulator, registry.adapter(offer.kind)
        self._connection = http.client.HTTPConnection("127.0.0.1", simulator.port, timeout=10)
        self.target = Target(
            offer.kind,
            1,
            "trip",
            self.adapter.base_url_from(simulator.base_url),
            SecretText(offer.secret.replace("{origin}", origin)),
            offer.model,
            f"{offer.kind}/{offer.model}",
            {name: text.replace("{origin}", origin) for name, text in offer.settings.items()},
        )

    def close(self) -> None:
        self._connection.close()

    def ask(self, body: Json, *, stream: bool) -> Ask:
        body = {"model": self.target.public_model, **body, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        return Ask("chat/completions", body, stream=stream, request_id="0123456789abcdef", client_wants_usage=stream)

    def call_or_refusal(self, ask: Ask) -> Outgoing | InvalidAtUpstream:
        try:
            return self.call_for(ask)
        except InvalidAtUpstream as refused:
            return refused

    def call_for(self, ask: Ask) -> Outgoing:
        """What the client's request becomes, after the calls that come before it. Raises UpstreamFailure."""
        before, heard = self.adapter.first_calls(ask, self.target), None
        if before is None:
            return self.adapter.request(ask, self.target)
        while True:
            try:
                step = before.send(heard)  # type: ignore[arg-type]
            except StopIteration as done:
                call: Outgoing = done.value
                return call
            heard = None if isinstance(step, Pause) else self.send(step)

    def send(self, call: Outgoing) -> Heard:
        self._connection.request(call.method, call.path, call.body, dict(call.headers))
        answer = self._connection.getresponse()
        return Heard(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())

    def read(self, ask: Ask, heard: Heard) -> tuple[Tokens | None, Json]:
        """What is counted, and the usage that the client is told."""
        if heard.status != 200:
            raise self.adapter.failure(self.target, heard.status, heard.headers, heard.body)
        if not ask.stream:
            whole = self.adapter.answer(ask, self.target, heard.body, heard.headers["content-type"])
            return whole.tokens, json.loads(whole.body)["usage"]
        reader = self.adapter.reader(ask, self.target)
        said = reader.feed(heard.body) + reader.end()
        events = [json.loads(event.removeprefix(b"data: ")) for event in said.split(b"\n\n") if event.startswith(b"data: {")]
        return reader.tokens, events[-1]["usage"]


@pytest.fixture(scope="module", params=sorted(offers()))
def trip(request: pytest.FixtureRequest) -> Iterator[Trip]:
    offer = offers()[request.param]
    with offer.simulator() as simulator:
        trip = Trip(offer, simulator)
        yield trip
        trip.close()


@settings(max_examples=EXAMPLES)
@given(talk=talks(), stream=st.booleans())
def test_what_is_said_goes_out_whole_or_is_refused(trip: Trip, talk: Talk, stream: bool) -> None:
    """Refused is only what the kind lacks, or a parameter; and what goes out is nothing that the upstream would refuse."""
    trip.simulator.reset()
    call = trip.call_or_refusal(trip.ask(talk.body, stream=stream))

    if isinstance(call, InvalidAtUpstream):
        assert (call.status, str(call.code)[:12]) == (400, "unsupported_")
        assert call.param
        assert talk.uses - trip.offer.can or call.param in SAMPLING, call.message
        assert trip.simulator.posts == []
        return
    assert Found(call.body).lost(talk, trip.offer) == {}
    assert trip.send(call).status == 200, trip.simulator.log[-1]
    assert trip.simulator.last.unknown_fields == {}


@settings(max_examples=EXAMPLES)
@given(
    said=WORDS,
    thought=WORDS,
    asked=WORDS,
    scenario=st.sampled_from(["ok", "cached", "reasoning", "tool_call", "tool_calls_parallel"]),
    stream=st.booleans(),
)
def test_what_was_counted_is_counted_once(trip: Trip, said: str, thought: str, asked: str, scenario: str, stream: bool) -> None:
    can = trip.offer.can
    step, body = Step(scenario=scenario, text=said), {"messages": [{"role": "user", "content": asked}]}
    if scenario == "reasoning":
        step = Step(scenario=scenario, text=said, reasoning=thought) if "reasoning" in can else Step(text=said)
    if scenario.startswith("tool"):
        step = Step(scenario=scenario if "parallel_tools" in can else "tool_call") if "tools" in can else Step(text=said)
        body |= {"tools": [WEATHER]} if "tools" in can else {}
    trip.simulator.reset()
    trip.simulator.script(step)
    ask = trip.ask(body, stream=stream)
    tokens, told = trip.read(ask, trip.send(trip.call_for(ask)))

    bills = list(trip.simulator.bills.values())
    billed = (sum(bill.input_tokens for bill in bills), sum(bill.output_tokens for bill in bills))
    if "usage" not in can:
        assert tokens is None
        return
    assert tokens is not None
    assert (tokens.input, tokens.all_output) == billed
    assert min(tokens.fresh_input, tokens.cache_read, tokens.cache_write, tokens.output, tokens.reasoning) >= 0
    assert (told["prompt_tokens"], told["completion_tokens"], told["total_tokens"]) == (*billed, sum(billed))
    assert ((told.get("prompt_tokens_details") or {}).get("cached_tokens") or 0) <= tokens.input
    assert ((told.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0) == tokens.reasoning


WEATHER: Json = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
