"""Gemini Code Assist behind a running server: the `openai` package on one side, the simulated Google on the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.conftest import SIM_PRICE, Accounts
from tests.serving import CommandFailed, Sluice, eventually
from tests.upstreams.gemini import ACCOUNTS, ACTIVATION, BYPASS, VALIDATION, GeminiUpstream, Step, envelope, frame
from tests.upstreams.openai import DONE

HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello my dear friend"}]
PIXEL = "data:image/png;base64,iVBORw0KGgo="
LOOKUP: Any = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks it up.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"], "additionalProperties": False},
    },
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get weather", "parameters": {"$schema": "x", "type": "object", "properties": {"city": {"type": "string"}}}},
}
FAULTS = ["401", "403", "404", "429-daily", "429-delay", "500", "503", "html_502", "html_200", "empty_200", "reset", "unsupported"]


class Fact(BaseModel):
    name: str
    count: int


class Facts(BaseModel):
    facts: list[Fact]
    title: str


def add(sluice: Sluice, gemini: GeminiUpstream, prefix: str, token: str, *, label: str = "", **settings: str) -> int:
    options = ["--label", label or prefix, "--prefix", prefix, "--base-url", gemini.base_url, "--accept-policy"]
    if priority := settings.pop("priority", ""):
        options += ["--priority", priority]
    for name, value in settings.items():
        options += ["--set", f"{name}={value}"]
    return int(sluice.manage("add_credential", "gemini_cli", *options, "--secret-stdin", stdin=token).split()[-1])


@pytest.fixture(scope="module")
def google() -> Iterator[GeminiUpstream]:
    with GeminiUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def pools(sluice: Sluice, google: GeminiUpstream) -> None:
    sluice.set_price("gem/*", **SIM_PRICE)
    add(sluice, google, "gem", "ya29.sim-ok", project_id="my-project-123")
    add(sluice, google, "found", "ya29.sim-ok~found")
    add(sluice, google, "deep", "ya29.sim-ok~deep")
    add(sluice, google, "lent", "ya29.sim-ok~lent", project_id="my-project-123", pass_through="1")
    for name in ACCOUNTS:
        add(sluice, google, f"acc-{name}", f"ya29.sim-{name}")
    for kind in ("whole", "stream"):
        for fault in FAULTS:
            prefix = f"gempool-{fault}-{kind}"
            project = {} if fault in ACCOUNTS else {"project_id": "my-project-123"}
            add(sluice, google, prefix, f"ya29.sim-{fault}", label=f"bad-{prefix}", priority="10", **project)
            add(sluice, google, prefix, "ya29.sim-ok", label=f"good-{prefix}", project_id="my-project-123")
    sluice.wait_for(prefix)


@pytest.fixture
def gemini(google: GeminiUpstream, pools: None) -> GeminiUpstream:
    google.reset()
    return google


@pytest.fixture
def client(sluice: Sluice, gemini: GeminiUpstream) -> Iterator[OpenAI]:
    with OpenAI(api_key=sluice.issue_key(), base_url=f"{sluice.url}/v1", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def accounts(sluice: Sluice, gemini: GeminiUpstream) -> Accounts:
    return Accounts(sluice, gemini)  # type: ignore[arg-type]


def id_of(stream: Any) -> str:
    return str(stream.response.headers["x-request-id"])


def text_of(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def sent(gemini: GeminiUpstream) -> dict[str, Any]:
    body: dict[str, Any] = gemini.generated[-1].json
    return body


# Answers


def test_a_plain_answer(client: OpenAI, accounts: Accounts, gemini: GeminiUpstream) -> None:
    answer = client.chat.completions.create(model="gem/gemini-2.5-pro", messages=HELLO)

    assert answer.choices[0].message.content == "echo: Hello my dear friend"
    assert (answer.choices[0].finish_reason, answer.model) == ("stop", "gem/gemini-2.5-pro")
    assert answer._request_id is not None
    accounts.of(answer._request_id, stream=False, provider="gemini_cli", input_tokens=4, output_tokens=5)
    seen = gemini.generated[-1]
    assert seen.path == "/v1internal:generateContent"
    assert (seen.json["project"], seen.json["model"]) == ("my-project-123", "gemini-2.5-pro")
    assert seen.json["request"]["systemInstruction"]["parts"] == [{"text": "Be brief."}]
    assert seen.headers["user-agent"].startswith("sluice/")


@pytest.mark.parametrize("wants_usage", [False, True])
def test_a_stream(client: OpenAI, accounts: Accounts, gemini: GeminiUpstream, wants_usage: bool) -> None:
    options: Any = {"include_usage": True} if wants_usage else openai.omit
    stream = client.chat.completions.create(model="gem/gemini-2.5-flash", messages=HELLO, stream=True, stream_options=options)
    chunks = list(stream)

    assert text_of(chunks) == "echo: Hello my dear friend"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason] == ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert [(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) for usage in usages] == [(4, 5, 9)] * wants_usage
    accounts.of(id_of(stream), stream=True)
    assert (gemini.generated[-1].path, gemini.generated[-1].query) == ("/v1internal:streamGenerateContent", {"alt": "sse"})


def test_thoughts_are_reasoning_and_counted_as_such(client: OpenAI, accounts: Accounts, gemini: GeminiUpstream) -> None:
    messages: Any = [{"role": "user", "content": "Hello #sim:think"}]
    stream = client.chat.completions.create(
        model="gem/gemini-2.5-pro", messages=messages, stream=True, reasoning_effort="high", stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    whole = client.chat.completions.create(model="gem/gemini-2.5-pro", messages=messages)

    thoughts = [chunk.choices[0].delta.model_extra.get("reasoning_content") for chunk in chunks]
    assert "".join(filter(None, thoughts)) == whole.choices[0].message.model_extra["reasoning_content"] == "I think about it"
    assert text_of(chunks) == whole.choices[0].message.content == "echo: Hello"
    for usage in (last.usage, whole.usage):
        assert (usage.completion_tokens, usage.completion_tokens_details.reasoning_tokens, usage.total_tokens) == (6, 4, 8)
    accounts.of(id_of(stream), reasoning_tokens=4)
    assert whole._request_id is not None
    accounts.of(whole._request_id, reasoning_tokens=4)
    assert gemini.generated[0].json["request"]["generationConfig"]["thinkingConfig"] == {"includeThoughts": True, "thinkingBudget": 24576}


def test_no_effort_means_no_thoughts(client: OpenAI, gemini: GeminiUpstream) -> None:
    messages: Any = [{"role": "user", "content": "Hello #sim:think"}]
    for model in ("gemini-2.5-pro", "gemini-2.5-flash", "gemini-3-flash-preview", "gemini-3.1-pro-preview"):
        answer = client.chat.completions.create(model=f"gem/{model}", messages=messages, reasoning_effort="none")
        assert "reasoning_content" not in (answer.choices[0].message.model_extra or {})


def test_cached_tokens_cost_what_cached_tokens_cost(client: OpenAI, accounts: Accounts, gemini: GeminiUpstream) -> None:
    answer = client.chat.completions.create(model="gem/sim-cached", messages=HELLO)

    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer._request_id is not None
    accounts.of(answer._request_id, input_tokens=4, cached_tokens=2)


@pytest.mark.parametrize(
    "scenario",
    [
        "split_utf8",
        "gzip",
        "coalesced",
        "chunk_splits_frame",
        "comments",
        "no_trailing_newline",
        "bad_frame",
        "big_frame",
        "http10",
        "late_end",
    ],
)
def test_a_stream_arrives_whole_however_it_is_cut(client: OpenAI, accounts: Accounts, scenario: str) -> None:
    stream = client.chat.completions.create(
        model=f"gem/sim-{scenario}", messages=[{"role": "user", "content": "grüße 𝄞"}], stream=True, stream_options={"include_usage": True}
    )
    text = text_of(list(stream))

    assert text.replace("x" * (1 << 20), "").startswith("echo: grüße 𝄞")
    accounts.of(id_of(stream))


@pytest.mark.parametrize("scenario", ["split_utf8", "gzip", "http10"])
def test_a_whole_answer_arrives_whole_however_it_is_cut(client: OpenAI, accounts: Accounts, scenario: str) -> None:
    answer = client.chat.completions.create(model=f"gem/sim-{scenario}", messages=[{"role": "user", "content": "grüße 𝄞"}])

    assert str(answer.choices[0].message.content).startswith("echo: grüße 𝄞")
    assert answer._request_id is not None
    accounts.of(answer._request_id)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("finish", "reason"),
    [("STOP", "stop"), ("MAX_TOKENS", "length"), ("SAFETY", "content_filter"), ("RECITATION", "content_filter"), ("OTHER", "stop")],
)
def test_why_it_ended(client: OpenAI, gemini: GeminiUpstream, finish: str, reason: str, streamed: bool) -> None:
    arguments: Any = {"model": "gem/gemini-2.5-pro", "messages": [{"role": "user", "content": f"Hello #sim:finish={finish}"}]}
    if streamed:
        chunks = list(client.chat.completions.create(stream=True, **arguments))
        reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    else:
        reasons = [client.chat.completions.create(**arguments).choices[0].finish_reason]

    assert reasons == [reason]


def test_a_refused_prompt_is_an_empty_answer_that_was_filtered(client: OpenAI, gemini: GeminiUpstream) -> None:
    blocked = {"response": {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {"promptTokenCount": 4}}}
    gemini.script(Step(body=json.dumps(blocked).encode()), Step(frames=[frame(blocked)]))
    whole = client.chat.completions.create(model="gem/gemini-2.5-pro", messages=HELLO)
    chunks = list(client.chat.completions.create(model="gem/gemini-2.5-pro", messages=HELLO, stream=True))

    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("", "content_filter")
    assert chunks[-1].choices[0].finish_reason == "content_filter"


def test_sampling_parameters_arrive(client: OpenAI, gemini: GeminiUpstream) -> None:
    client.chat.completions.create(
        model="gem/gemini-2.5-flash",
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["END", "###"],
        max_completion_tokens=100_000,
        presence_penalty=0.5,
        frequency_penalty=0,
        user="someone",
        metadata={"a": "b"},
        logprobs=True,
        extra_body={"top_k": 40, "field_of_tomorrow": 1},
    )

    assert sent(gemini)["request"]["generationConfig"] == {
        "temperature": 0.5,
        "topP": 0.9,
        "topK": 40,
        "seed": 7,
        "presencePenalty": 0.5,
        "maxOutputTokens": 65_536,
        "stopSequences": ["END", "###"],
        "thinkingConfig": {"includeThoughts": True},
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"seed": 2**40}, "seed"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
    ],
)
def test_what_cannot_be_honoured_is_refused_and_costs_nothing(
    client: OpenAI, sluice: Sluice, gemini: GeminiUpstream, fields: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="gem/gemini-2.5-pro", messages=HELLO, **fields)

    assert caught.value.param == param
    assert gemini.generated == []
    row = sluice.row(caught.value.response.headers["x-request-id"])
    assert (row["status"], row["cost_usd"]) == (400, 0)


# Tools


def asked_back(calls: Any, *, keep: tuple[str, ...] = ("id", "type", "function", "extra_content")) -> Any:
    dumped = [one.model_dump(exclude={"function": {"parsed_arguments"}, "index": True}) for one in calls]
    return {"role": "assistant", "content": None, "tool_calls": [{name: one[name] for name in keep if name in one} for one in dumped]}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("carried", ["sent back", "dropped by the client", "lost"])
def test_tools_over_two_turns_keep_their_signatures(
    client: OpenAI, accounts: Accounts, gemini: GeminiUpstream, carried: str, streamed: bool
) -> None:
    question: Any = [{"role": "user", "content": "What is a cat? #sim:tool=lookup"}]
    arguments: Any = {"model": "gem/gemini-3-flash-preview", "tools": [LOOKUP]}
    if streamed:
        with client.chat.completions.stream(messages=question, **arguments) as stream:
            first: Any = stream.get_final_completion()
    else:
        first = client.chat.completions.create(messages=question, **arguments)
    [call] = first.choices[0].message.tool_calls
    signature = call.model_extra["extra_content"]["google"]["thought_signature"]
    assert first.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("lookup", {"q": "text"})
    assert signature in gemini.signatures

    message = asked_back([call]) if carried == "sent back" else asked_back([call], keep=("id", "type", "function"))
    call_id = call.id
    if carried == "lost":
        call_id = message["tool_calls"][0]["id"] = "call_9"
    messages = [*question, message, {"role": "tool", "tool_call_id": call_id, "content": "an animal"}]
    second = client.chat.completions.create(messages=messages, **arguments)

    assert second.choices[0].message.content == "results: an animal"
    [_, called, answered] = sent(gemini)["request"]["contents"]
    expected = BYPASS if carried == "lost" else signature
    assert called["parts"] == [{"functionCall": {"name": "lookup", "args": {"q": "text"}}, "thoughtSignature": expected}]
    assert answered["parts"] == [{"functionResponse": {"name": "lookup", "response": {"result": "an animal"}}}]
    assert second._request_id is not None
    accounts.of(second._request_id)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("model", ["sim-calls_split", "gemini-2.5-pro", "gemini-3.1-pro-preview"])
def test_parallel_tool_calls(client: OpenAI, accounts: Accounts, gemini: GeminiUpstream, streamed: bool, model: str) -> None:
    question: Any = [{"role": "user", "content": "Which is warmer? #sim:tool=lookup,get_weather"}]
    arguments: Any = {"model": f"gem/{model}", "tools": [LOOKUP, WEATHER]}
    if streamed:
        with client.chat.completions.stream(messages=question, **arguments) as stream:
            first: Any = stream.get_final_completion()
    else:
        first = client.chat.completions.create(messages=question, **arguments)
    calls = first.choices[0].message.tool_calls

    assert [(one.function.name, json.loads(one.function.arguments)) for one in calls] == [
        ("lookup", {"q": "text"}),
        ("get weather", {"city": "text"}),
    ]
    assert len({one.id for one in calls}) == 2
    assert first.choices[0].finish_reason == "tool_calls"
    # The results may come in any order: Gemini gets them in the order of its calls.
    results = [{"role": "tool", "tool_call_id": one.id, "content": one.function.name} for one in reversed(calls)]
    second = client.chat.completions.create(messages=[*question, asked_back(calls), *results], **arguments)

    assert second.choices[0].message.content == "results: lookup get weather"
    names = [part["functionResponse"]["name"] for part in sent(gemini)["request"]["contents"][-1]["parts"]]
    assert names == ["lookup", "get_weather"]
    assert second._request_id is not None
    accounts.of(second._request_id)


def test_one_call_at_a_time_where_the_client_wants_that(client: OpenAI, gemini: GeminiUpstream) -> None:
    question: Any = [{"role": "user", "content": "Which? #sim:tool=lookup,get_weather"}]
    answer = client.chat.completions.create(
        model="gem/gemini-2.5-pro", messages=question, tools=[LOOKUP, WEATHER], parallel_tool_calls=False
    )

    assert [one.function.name for one in answer.choices[0].message.tool_calls or ()] == ["lookup"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("choice", "called"),
    [("none", []), ("required", ["lookup"]), ({"type": "function", "function": {"name": "get weather"}}, ["get weather"])],
)
def test_the_choice_of_tools(client: OpenAI, gemini: GeminiUpstream, choice: Any, called: list[str]) -> None:
    answer = client.chat.completions.create(model="gem/gemini-2.5-pro", messages=HELLO, tools=[LOOKUP, WEATHER], tool_choice=choice)

    assert [one.function.name for one in answer.choices[0].message.tool_calls or ()] == called  # type: ignore[union-attr]


def test_structured_output(client: OpenAI, accounts: Accounts, gemini: GeminiUpstream) -> None:
    answer = client.chat.completions.parse(model="gem/gemini-2.5-pro", messages=HELLO, response_format=Facts)
    with client.chat.completions.stream(model="gem/gemini-2.5-pro", messages=HELLO, response_format=Facts) as stream:
        streamed = stream.get_final_completion()

    for one in (answer, streamed):
        assert one.choices[0].message.parsed == Facts(facts=[Fact(name="text", count=7)], title="text")
    assert answer._request_id is not None
    accounts.of(answer._request_id)


def test_json_mode(client: OpenAI, gemini: GeminiUpstream) -> None:
    answer = client.chat.completions.create(model="gem/gemini-2.5-pro", messages=HELLO, response_format={"type": "json_object"})

    assert json.loads(str(answer.choices[0].message.content)) == {"echo": "Hello my dear friend"}


def test_json_mode_with_functions_is_refused_as_the_model_refuses_it(client: OpenAI, gemini: GeminiUpstream) -> None:
    with pytest.raises(openai.BadRequestError, match="is unsupported"):
        client.chat.completions.create(model="gem/gemini-2.5-pro", messages=HELLO, response_format={"type": "json_object"}, tools=[LOOKUP])


def test_an_image_is_taken_as_a_data_url_and_refused_as_an_address(client: OpenAI, gemini: GeminiUpstream) -> None:
    def ask(url: str) -> Any:
        parts: Any = [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": url}}]
        return client.chat.completions.create(model="gem/gemini-2.5-pro", messages=[{"role": "user", "content": parts}])

    assert ask(PIXEL).choices[0].message.content == "echo: what is this"
    assert sent(gemini)["request"]["contents"][0]["parts"][1] == {"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}}
    with pytest.raises(openai.BadRequestError, match="data URL") as caught:
        ask("https://example.org/a.png")
    assert caught.value.param == "messages[0]"
    with pytest.raises(openai.BadRequestError, match="Base64"):
        ask("data:image/png;base64,%%%")


def test_the_models_are_listed_without_a_call(client: OpenAI, gemini: GeminiUpstream) -> None:
    listed = {model.id for model in client.models.list()}

    assert {"gem/gemini-2.5-pro", "gem/gemini-3.5-flash", "gem/gemma-4-31b-it"} <= listed
    assert client.chat.completions.create(model="gem/gemini-3.5-flash", messages=HELLO).model == "gem/gemini-3.5-flash"
    assert sent(gemini)["model"] == "gemini-3-flash"


# Onboarding


def test_an_account_that_is_set_up_is_asked_for_its_project_once(client: OpenAI, gemini: GeminiUpstream, sluice: Sluice) -> None:
    for _ in range(3):
        answer = client.chat.completions.create(model="acc-paid/gemini-2.5-pro", messages=HELLO)

    assert sent(gemini)["project"] == "sim-project-1"
    assert len(gemini.asked("loadCodeAssist")) == 1
    assert gemini.asked("onboardUser") == []
    assert answer._request_id is not None
    assert sluice.row(answer._request_id)["attempts"] == 1


@pytest.mark.parametrize(
    ("account", "project", "polls"),
    [
        ("new", "sim-project-1", 2),
        ("new-at-once", "sim-project-1", 0),
        ("new-other-project", "sim-project-2", 1),
        ("legacy", "sim-project-1", 0),
        ("project-as-object", "sim-project-1", None),
    ],
)
def test_a_new_account_is_set_up_before_its_first_call(
    client: OpenAI, gemini: GeminiUpstream, account: str, project: str, polls: int | None
) -> None:
    stream = client.chat.completions.create(model=f"acc-{account}/gemini-2.5-pro", messages=HELLO, stream=True)

    assert text_of(list(stream)) == "echo: Hello my dear friend"
    assert sent(gemini)["project"] == project
    assert len(gemini.asked("onboardUser")) == (polls is not None)
    assert len(gemini.asked("operations")) == (polls or 0)
    if polls is not None:
        assert "cloudaicompanionProject" not in gemini.asked("onboardUser")[0].json


@pytest.mark.parametrize(
    ("account", "code", "words"),
    [
        ("unsupported", "unsupported_client", "UNSUPPORTED_CLIENT"),
        ("validate", "validation_required", VALIDATION),
        ("too-young", "account_ineligible", "18 or older"),
        ("tier-without-project", "project_required", "project_id"),
        ("new-standard", "project_required", "project_id"),
        ("new-without-project", "project_required", "project_id"),
    ],
)
def test_an_account_that_cannot_serve_says_why(client: OpenAI, gemini: GeminiUpstream, account: str, code: str, words: str) -> None:
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.chat.completions.create(model=f"acc-{account}/gemini-2.5-pro", messages=HELLO)

    assert caught.value.code == code
    assert words in caught.value.message
    assert gemini.generated == []


def test_an_account_whose_set_up_fails_is_the_upstreams_fault(client: OpenAI, gemini: GeminiUpstream, sluice: Sluice) -> None:
    with pytest.raises(openai.InternalServerError, match="could not be made") as caught:
        client.chat.completions.create(model="acc-new-fails/gemini-2.5-pro", messages=HELLO)

    assert (caught.value.status_code, caught.value.code) == (502, "upstream_error")
    assert sluice.row(caught.value.response.headers["x-request-id"])["cost_usd"] in (0, None)


def test_a_client_that_leaves_while_an_account_is_set_up_ends_that(client: OpenAI, gemini: GeminiUpstream, sluice: Sluice) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="acc-new-never/gemini-2.5-pro", messages=HELLO, timeout=0.9)

    polls = len(gemini.asked("operations"))
    assert polls >= 1
    eventually(lambda: sluice.usage()[-1]["status"] == 499, "the call goes on")
    assert len(gemini.asked("operations")) == polls


def test_a_project_that_is_not_valid_any_more_is_found_again(client: OpenAI, gemini: GeminiUpstream) -> None:
    def ask() -> str:
        client.chat.completions.create(model="found/gemini-2.5-pro", messages=HELLO)
        return str(sent(gemini)["project"])

    assert ask() == "sim-project-1"
    gemini.projects.discard("sim-project-1")
    gemini.project = "sim-project-2"
    with pytest.raises(openai.PermissionDeniedError) as caught:
        ask()
    assert caught.value.code == "project_invalid"
    assert ask() == "sim-project-2"


def test_a_request_that_cannot_be_sent_is_the_clients_mistake_also_before_the_project_is_known(
    client: OpenAI, gemini: GeminiUpstream
) -> None:
    parts: dict[str, Any] = {f"p{number}": {"type": "array", "items": {"$ref": f"#/$defs/p{number + 1}"}} for number in range(1500)}
    schema: Any = {"$ref": "#/$defs/p0", "$defs": parts | {"p1500": {"type": "string"}}}  # too deep once its references are followed
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    for _ in range(2):  # once through the first calls, once without
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="deep/gemini-2.5-pro", messages=HELLO, tools=tools)
        assert caught.value.code == "invalid_json"
    assert len(gemini.asked("loadCodeAssist")) == 1
    assert gemini.generated == []


def test_a_callers_own_token_is_used_with_its_own_project(client: OpenAI, gemini: GeminiUpstream) -> None:
    headers = {"X-Upstream-Key": "ya29.sim-ok~callers"}
    for _ in range(2):
        client.chat.completions.create(model="lent/gemini-2.5-pro", messages=HELLO, extra_headers=headers)
        assert sent(gemini)["project"] == "sim-project-1"
        assert gemini.generated[-1].headers["authorization"] == "Bearer ya29.sim-ok~callers"
    client.chat.completions.create(model="lent/gemini-2.5-pro", messages=HELLO)
    assert sent(gemini)["project"] == "my-project-123"
    assert len(gemini.asked("loadCodeAssist")) == 2, "what belongs to a caller is not remembered"


def test_the_policy_must_be_accepted(sluice: Sluice) -> None:
    with pytest.raises(CommandFailed, match="restricted"):
        sluice.manage("add_credential", "gemini_cli", "--label", "x", "--secret-stdin", stdin="ya29.sim-ok")


# Errors


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("scenario", "status", "code", "words"),
    [
        ("401", 502, "upstream_auth_failed", "credential"),
        ("403", 403, "PERMISSION_DENIED", "permission"),
        ("403-disabled", 403, "api_disabled", ACTIVATION),
        ("403-validate", 403, "validation_required", VALIDATION),
        ("403-licence", 403, "no_licence", "license"),
        ("404", 404, "model_not_found", "not found"),
        ("429-credits", 429, "insufficient_quota", "credits"),
        ("429-limit0", 429, "insufficient_quota", "limit: 0"),
        ("429-bare", 429, "rate_limit_exceeded", "exhausted"),
        ("429-capacity", 503, "overloaded", "capacity"),
        ("400", 400, "INVALID_ARGUMENT", "invalid argument"),
        ("400-context", 400, "context_length_exceeded", "token count"),
        ("400-location", 403, None, "location"),
        ("499", 502, "upstream_error", "cancelled"),
        ("500", 502, "upstream_error", "Internal error"),
        ("503", 503, "overloaded", "overloaded"),
        ("html_502", 502, "upstream_error", "502"),
        ("html_200", 502, "upstream_bad_response", "page"),
        ("empty_200", 502, "upstream_bad_response", ""),
        ("redirect", 502, "upstream_error", "307"),
    ],
)
def test_each_refusal_is_told_in_one_vocabulary(
    client: OpenAI, sluice: Sluice, scenario: str, status: int, code: str | None, words: str, streamed: bool
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model=f"gem/sim-{scenario}~{streamed}", messages=HELLO, stream=streamed)

    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert words in caught.value.message
    assert "<" not in caught.value.message
    row = sluice.row(caught.value.response.headers["x-request-id"])
    assert (row["status"], row["attempts"]) == (status, 1)


@pytest.mark.parametrize(
    ("scenario", "code", "seconds"),
    [
        ("429-delay", "rate_limit_exceeded", 1),
        ("429-12s", "rate_limit_exceeded", 12),
        ("429-array", "rate_limit_exceeded", 7),
        ("429-nested", "rate_limit_exceeded", 7),
        ("429-per-minute", "rate_limit_exceeded", 60),
        ("429-daily", "insufficient_quota", 31448),
        ("429-metadata", "insufficient_quota", 31448),
        ("429-timestamp", "insufficient_quota", 7200),
        ("429-text", "insufficient_quota", 31447),
    ],
)
def test_the_wait_that_google_names_is_passed_on_and_rests_that_model_alone(
    client: OpenAI, gemini: GeminiUpstream, scenario: str, code: str, seconds: int
) -> None:
    def ask(model: str) -> Any:
        return client.chat.completions.create(model=f"gem/{model}", messages=HELLO)

    with pytest.raises(openai.RateLimitError) as caught:
        ask(f"sim-{scenario}")
    assert caught.value.code == code
    assert seconds - 2 <= int(caught.value.response.headers["retry-after"]) <= seconds
    assert (caught.value.response.headers.get("x-should-retry") == "false") == (code == "insufficient_quota")
    calls = len(gemini.generated)
    if seconds > 5:
        with pytest.raises(openai.RateLimitError):
            ask(f"sim-{scenario}")
        assert len(gemini.generated) == calls, "the upstream has said when to come again"
    assert ask("gemini-2.5-pro").choices[0].finish_reason == "stop"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("said", "status"), [({"code": 429, "status": "RESOURCE_EXHAUSTED"}, 429), ({"code": 503}, 503), ({}, 502)])
def test_an_error_in_a_200_is_one(client: OpenAI, gemini: GeminiUpstream, said: Any, status: int, streamed: bool) -> None:
    error = {"error": {"message": "It went wrong.", **said}}
    gemini.script(Step(frames=[frame(error)]) if streamed else Step(body=json.dumps(error).encode()))
    with pytest.raises(openai.APIStatusError, match=r"It went wrong\.") as caught:
        client.chat.completions.create(model=f"gem/sim-error200~{status}{streamed}", messages=HELLO, stream=streamed)

    assert caught.value.status_code == status


@pytest.mark.parametrize(
    "body", [b"{}", b'{"response":{}}', b'{"response":{"candidates":[]}}', b'{"response":{"candi', b"[]", b"null", b"7"]
)
def test_an_empty_answer_is_none(client: OpenAI, gemini: GeminiUpstream, body: bytes) -> None:
    gemini.script(Step(body=body), Step(frames=[b"data: " + body + b"\r\n\r\n"]))
    for streamed in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="gem/gemini-2.5-pro", messages=HELLO, stream=streamed)
        assert (caught.value.status_code, caught.value.code) == (502, "upstream_bad_response")


@pytest.mark.parametrize("kind", ["whole", "stream"])
@pytest.mark.parametrize("fault", FAULTS)
def test_another_account_serves_when_the_first_cannot(
    client: OpenAI, sluice: Sluice, gemini: GeminiUpstream, fault: str, kind: str
) -> None:
    prefix = f"gempool-{fault}-{kind}"
    answer = client.chat.completions.with_raw_response.create(model=f"{prefix}/gemini-2.5-pro", messages=HELLO, stream=kind == "stream")

    assert answer.status_code == 200
    if kind == "stream":
        assert answer.http_response.read().endswith(DONE)
    row = sluice.row(answer.headers["x-request-id"])
    assert (row["status"], row["attempts"], row["credential"], row["error"]) == (200, 2, f"good-{prefix}", "")


def test_a_preview_model_that_one_account_lacks_is_found_at_another(client: OpenAI, gemini: GeminiUpstream, sluice: Sluice) -> None:
    add(sluice, gemini, "preview", "ya29.sim-ok~without", label="without", project_id="my-project-123", priority="10")
    add(sluice, gemini, "preview", "ya29.sim-ok~with", label="with", project_id="my-project-123")
    sluice.wait_for("preview")
    gemini.without_preview.add("ya29.sim-ok~without")
    attempts = []
    for _ in range(2):
        answer = client.chat.completions.create(model="preview/gemini-3-pro-preview", messages=HELLO)
        assert answer._request_id is not None
        attempts.append(sluice.row(answer._request_id)["attempts"])

    assert attempts == [2, 1], "which account lacks it is remembered"
    answer = client.chat.completions.create(model="preview/gemini-2.5-pro", messages=HELLO)
    assert answer._request_id is not None
    assert sluice.row(answer._request_id)["credential"] == "without", "its other models serve on"


@pytest.mark.parametrize("fault", ["abort_mid", "eof_mid", "error_frame", "no_reason", "half_frame"])
def test_a_stream_that_is_cut_off_never_looks_whole(sluice: Sluice, client: OpenAI, gemini: GeminiUpstream, fault: str) -> None:
    part = frame(envelope("r", [{"text": "Hel"}]))
    frames = {"no_reason": [part], "half_frame": [part, frame(envelope("r", [{"text": "lo"}], finish="STOP"))[:60]]}.get(fault)
    gemini.script(Step(frames=frames) if frames else Step(scenario=fault))
    headers = {"authorization": f"Bearer {client.api_key}"}
    answer = httpx.post(
        f"{sluice.url}/v1/chat/completions", headers=headers, json={"model": "gem/gemini-2.5-pro", "messages": HELLO, "stream": True}
    )

    assert answer.status_code == 200
    assert b'"content":"' in answer.content
    assert answer.content.strip().split(b"\n\n")[-1].startswith(b'data: {"error":{')
    assert b"[DONE]" not in answer.content
    assert b'"finish_reason":"' not in answer.content
    row = sluice.row(answer.headers["x-request-id"])
    assert (row["attempts"], row["status"], row["usage_source"]) == (1, 502, "estimated")


def test_leaving_a_stream_stops_the_upstream(client: OpenAI, sluice: Sluice, gemini: GeminiUpstream) -> None:
    pieces = [frame(envelope("r", [{"text": f"word{number} "}])) for number in range(200)]
    gemini.script(Step(frames=pieces, delay_frame_ms=20))
    stream = client.chat.completions.create(model="gem/gemini-2.5-pro", messages=HELLO, stream=True)
    for _ in range(4):
        next(stream)
    stream.close()

    [call] = gemini.calls(id_of(stream))
    eventually(lambda: call.peer_left_at is not None, "the upstream goes on", seconds=1)
    assert sluice.row(id_of(stream))["status"] == 499
