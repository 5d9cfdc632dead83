"""Kimi for Coding through a running server, against a simulator that keeps Kimi's rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import openai
import pytest
from openai import OpenAI

from tests.serving import Sluice, eventually
from tests.upstreams.kimi import KimiUpstream, Step

HELLO: Any = [{"role": "user", "content": "Hello there"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "ls",
        "parameters": {
            "type": "object",
            "properties": {"path": {"description": "Where"}, "sort": {"$ref": "#/$defs/Sort"}},
            "$defs": {"Sort": {"enum": ["name", "size"]}},
        },
        "strict": True,
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[KimiUpstream]:
    with KimiUpstream() as server:
        yield server


@pytest.fixture
def kimi(server: KimiUpstream) -> KimiUpstream:
    server.reset()
    return server


@pytest.fixture(scope="module")
def client(sluice: Sluice) -> Iterator[OpenAI]:
    with OpenAI(api_key=sluice.issue_key(), base_url=f"{sluice.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def prefix(sluice: Sluice, server: KimiUpstream, client: OpenAI) -> str:
    """An account whose models have been listed."""
    return account(sluice, server, client)


def account(sluice: Sluice, server: KimiUpstream, client: OpenAI, *, secret: str = "sk-kimi-sim-ok", **settings: str) -> str:
    prefix = f"kimi-{uuid4().hex[:6]}"
    made = sluice.add_credential("kimi", server.origin, secret=secret, prefix=prefix, **settings)
    sluice.manage("refresh_models", "--credential", str(made))
    eventually(lambda: any(model.id.startswith(f"{prefix}/") for model in client.models.list()), "its models are not listed", seconds=10)
    return prefix


def test_its_models_are_listed_with_the_names_that_switch_the_thoughts(client: OpenAI, prefix: str) -> None:
    listed = {model.id.removeprefix(f"{prefix}/") for model in client.models.list() if model.id.startswith(prefix)}

    assert {"kimi-for-coding", "kimi-for-coding-thinking", "k3", "kimi-k2.6-thinking", "kimi-k2.6-nothink", "kimi-k2-0905"} <= listed
    assert not {"kimi-claude", "kimi-for-coding-nothink", "kimi-k2-0905-thinking"} & listed


@pytest.mark.parametrize(
    ("model", "effort", "sent", "thinking"),
    [
        ("kimi-for-coding-thinking", openai.omit, "kimi-for-coding", {"type": "enabled"}),
        ("kimi-k2.6-nothink", openai.omit, "kimi-k2.6", {"type": "disabled"}),
        ("kimi-k2.6", "none", "kimi-k2.6", {"type": "disabled"}),
        ("k3", "medium", "k3", {"type": "enabled", "effort": "high"}),
        ("k3", openai.omit, "k3", None),
    ],
)
def test_thinking_is_asked_for_as_an_object(
    client: OpenAI, kimi: KimiUpstream, prefix: str, model: str, effort: Any, sent: str, thinking: object
) -> None:
    answer = client.chat.completions.create(model=f"{prefix}/{model}", messages=HELLO, reasoning_effort=effort, temperature=0.2, user="u1")

    assert answer.choices[0].message.content == "echo: Hello there"
    assert (kimi.last.json["model"], kimi.last.json.get("thinking")) == (sent, thinking)
    assert kimi.last.unknown_fields == {}


@pytest.mark.parametrize("model", ["kimi-for-coding-nothink", "k3-nothink"])
def test_a_model_that_always_thinks_cannot_be_kept_from_it(client: OpenAI, kimi: KimiUpstream, prefix: str, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support disabled"):
        client.chat.completions.create(model=f"{prefix}/{model}", messages=HELLO)


def test_a_flat_rate_call_costs_nothing_and_says_so(client: OpenAI, kimi: KimiUpstream, sluice: Sluice, prefix: str) -> None:
    answer = client.chat.completions.create(model=f"{prefix}/kimi-for-coding", messages=HELLO)

    row = sluice.row(str(answer._request_id))
    assert (row["cost_usd"], row["usage_source"], row["input_tokens"], row["cached_tokens"]) == (0, "reported", 2, 1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


@pytest.mark.parametrize("place", ["top", "choice", "none"])
@pytest.mark.parametrize("wanted", [True, False])
def test_usage_is_counted_wherever_it_stands(
    client: OpenAI, kimi: KimiUpstream, sluice: Sluice, prefix: str, place: str, wanted: bool
) -> None:
    kimi.usage_place = place
    stream = client.chat.completions.create(
        model=f"{prefix}/kimi-for-coding", messages=HELLO, stream=True, stream_options={"include_usage": wanted}
    )
    chunks = list(stream)

    said = [chunk.usage.prompt_tokens_details.cached_tokens for chunk in chunks if not chunk.choices]
    assert said == ([1] if wanted and place != "none" else [])
    row = sluice.row(stream.response.headers["x-request-id"])
    assert row["usage_source"] == ("estimated" if place == "none" else "reported")


@pytest.mark.parametrize("keeps_thoughts", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_thought_goes_back_with_the_result_even_when_the_client_dropped_it(
    client: OpenAI, kimi: KimiUpstream, prefix: str, keeps_thoughts: bool, stream: bool
) -> None:
    kimi.script(Step(scenario="reasoning_then_tools", reasoning="I should look"))
    question: Any = [{"role": "user", "content": f"List them {uuid4()}"}]
    arguments: Any = {"model": f"{prefix}/kimi-for-coding", "tools": [TOOL]}
    if stream:
        with client.chat.completions.stream(messages=question, **arguments) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(messages=question, **arguments).choices[0].message
    assert message.tool_calls is not None
    assert getattr(message, "reasoning_content", None) == "I should look"

    calls = [{"id": call.id, "type": "function", "function": json.loads(call.function.model_dump_json(exclude={"parsed_arguments"}))}
             for call in message.tool_calls]  # fmt: skip
    back: Any = {"role": "assistant", "content": "", "tool_calls": calls}
    if keeps_thoughts:
        back["reasoning_content"] = "as the client has it"
    result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "a.py"}
    answer = client.chat.completions.create(messages=[*question, back, result], **arguments)

    assert answer.choices[0].message.content == "results: a.py"
    sent = kimi.last.json["messages"][1]
    assert sent["reasoning_content"] == ("as the client has it" if keeps_thoughts else "I should look")
    assert "content" not in sent
    assert kimi.last.json["tools"][0]["function"]["parameters"]["properties"] == {
        "path": {"description": "Where", "type": "string"},
        "sort": {"enum": ["name", "size"], "type": "string"},
    }


@pytest.mark.parametrize("scenario", ["no_index", "no_id", "same_index"])
def test_calls_can_be_told_apart_whatever_is_missing(client: OpenAI, kimi: KimiUpstream, prefix: str, scenario: str) -> None:
    calls = [{"id": f"ls:{n}", "type": "function", "function": {"name": "ls", "arguments": f'{{"path": "{n}"}}'}} for n in range(2)]
    kimi.script(Step(scenario=scenario, tool_calls=calls))
    with client.chat.completions.stream(model=f"{prefix}/k3", messages=HELLO, tools=[TOOL]) as events:
        message = events.get_final_completion().choices[0].message

    assert message.tool_calls is not None
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == [{"path": "0"}, {"path": "1"}]
    assert len({call.id for call in message.tool_calls}) == 2


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "ls"}}])
def test_a_call_that_may_not_be_forced_is_left_to_the_model(client: OpenAI, kimi: KimiUpstream, prefix: str, choice: Any) -> None:
    """2.5: on a 400 that names it, once more with `auto`; whatever is refused then goes to the client."""

    def said(choice: Any) -> str | None:
        asked = {"model": f"{prefix}/kimi-for-coding", "messages": HELLO, "tools": [TOOL], "tool_choice": choice}
        return client.chat.completions.create(**asked).choices[0].finish_reason

    assert said(choice)
    assert [seen.json["tool_choice"] for seen in kimi.posts] == [choice]
    kimi.forces_tools = False
    assert said(choice)
    assert [seen.json["tool_choice"] for seen in kimi.posts[1:]] == [choice, "auto"]
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        said("sometimes")
    assert [seen.json["tool_choice"] for seen in kimi.posts[3:]] == ["sometimes"] * 2


def test_an_answer_used_up_by_thoughts_is_passed_as_it_is(client: OpenAI, kimi: KimiUpstream, prefix: str) -> None:
    kimi.script(Step(scenario="length_empty_content"), Step(scenario="empty_reasoning"))
    cut = client.chat.completions.create(model=f"{prefix}/k3", messages=HELLO, max_tokens=5)
    silent = client.chat.completions.create(model=f"{prefix}/k3", messages=HELLO)

    assert (cut.choices[0].finish_reason, cut.choices[0].message.content) == ("length", "")
    assert getattr(silent.choices[0].message, "reasoning_content", None) == ""
    assert kimi.posts[0].json["max_completion_tokens"] == 5


def test_a_client_that_kimi_does_not_serve_is_told_and_an_operator_may_say_who_it_is(
    client: OpenAI, kimi: KimiUpstream, sluice: Sluice, prefix: str
) -> None:
    friend = account(sluice, kimi, client, user_agent="Friend/1")
    stranger = account(sluice, kimi, client)
    kimi.gate = ["Friend/"]

    assert client.chat.completions.create(model=f"{friend}/k3", messages=HELLO).choices[0].message.content
    with pytest.raises(openai.PermissionDeniedError, match="only available for Coding Agents"):
        client.chat.completions.create(model=f"{stranger}/k3", messages=HELLO)
    assert kimi.last.headers["user-agent"].startswith("sluice/")


KEYS = [
    ("expired", 502, "upstream_auth_failed"),
    ("nomember", 402, "insufficient_quota"),
    ("cycle", 429, "insufficient_quota"),
    ("week", 429, "insufficient_quota"),
    ("quota", 429, "insufficient_quota"),
    ("rpm", 429, "rate_limit_exceeded"),
    ("529", 503, "overloaded"),
    ("filtered", 400, "content_policy_violation"),
    ("too_long", 400, "context_length_exceeded"),
]


@pytest.fixture(scope="module")
def by_key(sluice: Sluice, server: KimiUpstream, client: OpenAI) -> dict[str, str]:
    prefixes = {name: f"kimi-{name.replace('_', '-')}-{uuid4().hex[:6]}" for name in [*(key[0] for key in KEYS), "overload"]}
    for name, prefix in prefixes.items():
        sluice.add_credential("kimi", server.base_url, secret=f"sk-kimi-sim-{name}", prefix=prefix)
    sluice.wait_for(*prefixes.values())
    return prefixes


@pytest.mark.parametrize(("name", "status", "code"), KEYS)
def test_each_of_its_errors_is_told_in_one_vocabulary(
    client: OpenAI, kimi: KimiUpstream, by_key: dict[str, str], name: str, status: int, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model=f"{by_key[name]}/k3", messages=HELLO)

    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.response.headers.get("retry-after") == ("2" if name == "rpm" else None)


def test_an_overload_is_over_at_the_second_call(client: OpenAI, kimi: KimiUpstream, by_key: dict[str, str]) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=f"{by_key['overload']}/k3", messages=HELLO)
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")

    assert client.chat.completions.create(model=f"{by_key['overload']}/k3", messages=HELLO).choices[0].message.content


def test_what_is_left_of_the_plan_is_kept_with_the_account(sluice: Sluice, kimi: KimiUpstream, client: OpenAI, prefix: str) -> None:
    code = f"from providers.models import Credential; import json; print(json.dumps(Credential.objects.get(prefix='{prefix}').quota))"

    assert json.loads(sluice.python(code))["windows"]["5 hours"] == {"used": 1, "limit": 100, "resets_at": "2026-08-22T11:00:00Z"}
