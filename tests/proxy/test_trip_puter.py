"""Puter through a running server: the official `openai` package in front, and behind it a Puter that judges what it gets."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.serving import Sluice, eventually
from tests.upstreams.puter import CANNED, PuterUpstream, Step, line

DONE = b"data: [DONE]\n\n"
HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello my dear friend"}]
PIXEL = "data:image/png;base64,iVBORw0KGgo="
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}, "strict": True},
}
# A model of each route, and the figures of the list for it in US dollars per million tokens: input, output, cached input.
ROUTES = {
    "openai-completion": ("openai:openai/gpt-4o-mini", 0.15, 0.60, 0.15),
    "openai-responses": ("openai:openai/gpt-5", 0.28, 0.88, 0.28),
    "claude": ("anthropic:anthropic/claude-haiku-4-5", 1.00, 5.00, 0.10),
    "gemini": ("google:google/gemini-2.5-flash", 0.28, 0.88, 0.28),
    "openrouter": ("openrouter:deepseek/deepseek-chat", 0.28, 0.88, 0.28),
    "mistral": ("mistral-small", 0.28, 0.88, 0.28),
}


@pytest.fixture(scope="module")
def puter_server() -> Iterator[PuterUpstream]:
    with PuterUpstream() as puter:
        yield puter


@pytest.fixture
def puter(puter_server: PuterUpstream) -> PuterUpstream:
    puter_server.reset()
    return puter_server


def add(sluice: Sluice, upstream: PuterUpstream, prefix: str, token: str = "puter-sim-ok", *, priority: int = 0, **settings: object) -> int:
    arguments = ["--label", f"{prefix}-{priority}", "--prefix", prefix, "--base-url", upstream.base_url, "--priority", str(priority)]
    for name, value in settings.items():
        arguments += ["--set", f"{name}={value}"]
    return int(sluice.manage("add_credential", "puter", *arguments, "--secret-stdin", stdin=token).split()[-1])


def wait_for_all(sluice: Sluice, upstream: PuterUpstream) -> None:
    """Until the server knows every account that was added so far: of a pool it might know only the first."""
    last = f"puter-{uuid.uuid4().hex[:8]}"
    add(sluice, upstream, last)
    sluice.wait_for(last)


@pytest.fixture(scope="module")
def accounts(sluice: Sluice, puter_server: PuterUpstream) -> str:
    """An account whose models and prices are listed, and others with settings of their own."""
    listed = add(sluice, puter_server, "puter")
    sluice.manage("refresh_models", "--credential", str(listed))
    puter_server.shown = 0  # a hundred accounts with the whole list each would only keep the database busy
    add(sluice, puter_server, "puter-own", "", pass_through=1)
    for mode in ("raw", "standard", "full"):
        add(sluice, puter_server, f"puter-{mode}", message_mode=mode)
    add(sluice, puter_server, "puter-strict", message_mode="standard", standard_strict_seed=1)
    add(sluice, puter_server, "puter-chosen", message_mode="standard", message_mode_header=1)
    add(sluice, puter_server, "puter-pinned", provider="openrouter")
    wait_for_all(sluice, puter_server)
    return "puter"


@pytest.fixture(scope="module")
def key(sluice: Sluice) -> str:
    return sluice.issue_key()


@pytest.fixture
def client(sluice: Sluice, key: str, accounts: str, puter: PuterUpstream) -> Iterator[OpenAI]:
    with OpenAI(api_key=key, base_url=f"{sluice.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def raw(sluice: Sluice, key: str, accounts: str, puter: PuterUpstream) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{sluice.url}/v1", headers={"authorization": f"Bearer {key}"}, timeout=20) as client:
        yield client


@dataclass
class Answer:
    """One answer of the SDK, whole or put together from its stream."""

    text: str
    reason: str | None
    calls: list[Any]
    usage: Any
    request_id: str
    message: dict[str, Any]


def ask(client: OpenAI, model: str, messages: Any = HELLO, *, stream: bool, **more: Any) -> Answer:
    if not stream:
        whole = client.chat.completions.create(model=model, messages=messages, **more)
        [choice] = whole.choices
        calls = [(one.id, one.function.name, one.function.arguments) for one in choice.message.tool_calls or ()]
        assert whole._request_id is not None
        message = choice.message.model_dump(exclude_none=True)
        return Answer(choice.message.content or "", choice.finish_reason, calls, whole.usage, whole._request_id, message)
    events = client.chat.completions.create(model=model, messages=messages, stream=True, stream_options={"include_usage": True}, **more)
    *chunks, last = list(events)
    assert last.choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason]
    assert len(reasons) == 1
    found = [one for delta in deltas for one in delta.tool_calls or ()]
    assert [one.index for one in found] == list(range(len(found)))
    calls = [(one.id, one.function.name, one.function.arguments) for one in found if one.function]
    text = "".join(delta.content or "" for delta in deltas)
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    if calls:
        message["tool_calls"] = [{"id": i, "type": "function", "function": {"name": n, "arguments": g}} for i, n, g in calls]
    return Answer(text, reasons[0], calls, last.usage, str(events.response.headers["x-request-id"]), message)


def row_as_billed(sluice: Sluice, puter: PuterUpstream, request_id: str) -> dict[str, Any]:
    row, bill = sluice.row(request_id), puter.bill(request_id)
    assert (row["input_tokens"], row["output_tokens"], row["usage_source"]) == (bill.input_tokens, bill.output_tokens, "reported")
    return row


# Answers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_an_answer_of_each_route_is_metered_by_the_price_in_the_list(
    client: OpenAI, sluice: Sluice, puter: PuterUpstream, route: str, stream: bool
) -> None:
    model, fresh, output, cached = ROUTES[route]
    puter.script(Step(scenario="cached"))
    answer = ask(client, f"puter/{model}", stream=stream, temperature=0, max_tokens=50, stop="never said")

    assert (answer.text, answer.reason) == ("echo: Hello my dear friend", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 5, 11)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    row = row_as_billed(sluice, puter, answer.request_id)
    assert (row["provider"], row["cached_tokens"], row["status"]) == ("puter", 3, 200)
    assert row["upstream_cost_usd"] == 0.0001  # it said a hundredth of a cent
    assert row["cost_usd"] * 1e6 == pytest.approx(3 * fresh + 3 * cached + 5 * output, abs=0.5)
    assert puter.vendor[-1]["route"] == route


def test_what_goes_out_is_what_the_server_knows(client: OpenAI, puter: PuterUpstream) -> None:
    ask(
        client, "puter/gpt-4o-mini", stream=True, temperature=0, top_p=0.5, max_completion_tokens=9, tools=[WEATHER], tool_choice="auto",
        parallel_tool_calls=False, reasoning_effort="high", seed=1, user="me", logit_bias={"1": 2}, frequency_penalty=1,
    )  # fmt: skip

    seen = puter.last
    assert seen.unknown_fields == {}
    args = seen.json["args"]
    assert args["temperature"] == 0, "zero is a temperature"
    assert (args["max_tokens"], args["model"], args["stream"]) == (9, "gpt-4o-mini", True)
    assert set(seen.json) == {"interface", "method", "args"}
    assert seen.headers["accept-encoding"] == "identity"
    assert not {"origin", "referer", "cookie"} & seen.headers.keys()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["claude", "gemini", "openrouter"])
def test_reasoning(client: OpenAI, sluice: Sluice, puter: PuterUpstream, route: str, stream: bool) -> None:
    puter.script(Step(scenario="reasoning"))
    answer = ask(client, f"puter/{ROUTES[route][0]}", stream=stream)

    assert answer.text == "echo: Hello my dear friend"
    row = row_as_billed(sluice, puter, answer.request_id)
    assert row["reasoning_tokens"] == (0 if route == "openrouter" else 4)
    assert answer.usage.completion_tokens == 9


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["claude", "openai-completion", "mistral"])
def test_a_length(client: OpenAI, puter: PuterUpstream, route: str, stream: bool) -> None:
    puter.script(Step(scenario="length"))
    answer = ask(client, f"puter/{ROUTES[route][0]}", stream=stream, max_tokens=2)

    assert (answer.text, answer.reason) == ("echo: Hello", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_is_kept_to(client: OpenAI, sluice: Sluice, puter: PuterUpstream, stream: bool) -> None:
    answer = ask(client, "puter/gpt-4o-mini", stream=stream, stop=["my dear"])

    assert (answer.text, answer.reason) == ("echo: Hello ", "stop")
    row_as_billed(sluice, puter, answer.request_id)


@pytest.mark.parametrize(
    "scenario",
    [
        "split_utf8",
        "gzip",
        "gzip_trunc",
        "coalesced",
        "chunk_splits_frame",
        "crlf",
        "no_trailing_newline",
        "bad_frame",
        "big_frame",
        "hex_noise",
        "http10",
    ],
)
def test_a_stream_arrives_whole_however_it_is_cut(client: OpenAI, sluice: Sluice, puter: PuterUpstream, scenario: str) -> None:
    puter.script(Step(scenario=scenario))
    answer = ask(client, "puter/gpt-4o-mini", [{"role": "user", "content": "grüße 𝄞"}], stream=True)

    assert answer.text.replace("x" * (1 << 20), "").startswith("echo: grüße 𝄞")
    row_as_billed(sluice, puter, answer.request_id)


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_not_counted_is_estimated(client: OpenAI, sluice: Sluice, puter: PuterUpstream, stream: bool) -> None:
    puter.script(Step(scenario="usage_undefined"))
    if stream:
        events = client.chat.completions.create(model="puter/gpt-4o-mini", messages=HELLO, stream=True)
        assert len(list(events)) == 7
        request_id = str(events.response.headers["x-request-id"])
    else:
        whole = client.chat.completions.create(model="puter/gpt-4o-mini", messages=HELLO)
        assert whole.usage is not None
        assert whole.usage.completion_tokens > 0
        request_id = str(whole._request_id)
    row = sluice.row(request_id)
    assert row["usage_source"] == "estimated"
    assert row["output_tokens"] > 0


def test_who_answered_instead_is_told(client: OpenAI, puter: PuterUpstream) -> None:
    puter.fallback_model = "some-other-model"
    answer = client.chat.completions.create(model="puter/gpt-4o-mini", messages=HELLO)

    assert answer.system_fingerprint == "openai-completion/some-other-model"
    assert answer.model == "puter/gpt-4o-mini"


# Models


def test_more_than_three_hundred_models_with_slashes_and_colons(client: OpenAI) -> None:
    names = {one.id for one in client.models.list()}

    assert len([name for name in names if name.startswith("puter/openrouter:vendor-")]) == 320
    assert "puter/fake" not in names
    name = "puter/openrouter:vendor-7/model-47:free"
    assert client.models.retrieve(name).id == name
    assert ask(client, name, stream=True).text == "echo: Hello my dear friend"


def test_a_free_model_has_the_price_of_nothing(client: OpenAI, sluice: Sluice) -> None:
    answer = ask(client, "puter/openrouter:vendor-7/model-47:free", stream=False)
    assert sluice.row(answer.request_id)["cost_usd"] == 0


def test_a_model_that_nobody_has_is_404(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, "puter/vendor/nobody", stream=False)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


# Tools


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("scenario", ["tool_call", "tool_calls_parallel"])
@pytest.mark.parametrize("route", ["openai-completion", "claude", "openrouter", "openai-responses", "mistral"])
def test_tools_over_two_turns(client: OpenAI, puter: PuterUpstream, route: str, scenario: str, stream: bool) -> None:
    model = f"puter/{ROUTES[route][0]}"
    cities = ["Oslo"] if scenario == "tool_call" else ["Oslo", "Bergen"]
    puter.script(Step(scenario=scenario), Step(scenario=scenario))
    first = ask(client, model, stream=stream, tools=[WEATHER])
    assert first.reason == "tool_calls"
    assert [json.loads(arguments) for _, _, arguments in first.calls] == [{"city": city} for city in cities]

    results = [
        {"role": "tool", "tool_call_id": call_id, "content": json.loads(arguments)["city"] + " 4C"} for call_id, _, arguments in first.calls
    ]
    second = ask(client, model, [*HELLO, first.message, *results], stream=stream, tools=[WEATHER])

    assert second.text == f"results: {' '.join(f'{city} 4C' for city in cities)}"
    assert second.reason == "stop"
    spoken = json.dumps(puter.vendor[-1]["messages"])
    assert '\\\\"city' not in spoken, "arguments were encoded twice"
    assert [spoken.index(f'"{call_id}"') for call_id, _, _ in first.calls] == sorted(spoken.index(f'"{i}"') for i, _, _ in first.calls)


def test_a_call_that_the_server_lost_leaves_a_whole_answer(client: OpenAI, puter: PuterUpstream) -> None:
    puter.script(Step(scenario="parallel_lost"))
    answer = ask(client, "puter/gpt-4o-mini", stream=True, tools=[WEATHER])

    assert (len(answer.calls), answer.reason) == (1, "tool_calls")


def test_a_forced_function_goes_out_alone_and_is_said_in_words(client: OpenAI, puter: PuterUpstream) -> None:
    other: Any = {"type": "function", "function": {"name": "other"}}
    puter.script(Step(scenario="tool_call"))
    answer = ask(
        client,
        "puter/gpt-4o-mini",
        stream=False,
        tools=[other, WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    )

    assert [name for _, name, _ in answer.calls] == ["get_weather"]
    args = puter.last.json["args"]
    assert [tool["function"]["name"] for tool in args["tools"]] == ["get_weather"]
    assert args["messages"][0]["content"] == "Be brief.\n\nAnswer with a call of the function 'get_weather'."


# Images


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("puter/openrouter:deepseek/deepseek-chat", "image_url"),
        ("puter/claude-haiku-4-5", "image"),
        ("puter-pinned/claude-haiku-4-5", "image_url"),
    ],
)
def test_images_arrive_in_the_form_of_the_vendor(client: OpenAI, puter: PuterUpstream, model: str, kind: str) -> None:
    parts = [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    answer = ask(client, model, [{"role": "user", "content": parts}], stream=True)

    assert answer.text == "echo: what is this"
    assert [block["type"] for block in puter.vendor[-1]["messages"][0]["content"]] == ["text", kind]


def test_a_file_of_the_account_is_out_of_reach(client: OpenAI, puter: PuterUpstream) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(client, "puter/gpt-4o-mini", [{"role": "user", "content": [{"type": "file", "puter_path": "~/private.txt"}]}], stream=False)
    assert puter.posts == []


def test_what_would_be_ignored_is_refused_before_anybody_is_called(client: OpenAI, puter: PuterUpstream) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "puter/gpt-4o-mini", stream=False, response_format={"type": "json_object"})
    assert (refused.value.param, refused.value.code) == ("response_format", "unsupported_parameter")
    assert puter.posts == []


# Message modes, as the server and its vendor take them

CONVERSATION: Any = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": ""},
    {"role": "user", "content": "Hi"},
    {"role": "user", "content": "Are you there?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "assistant", "content": None},
    {"role": "developer", "content": "Answer in French."},
    {"role": "assistant", "content": "Still here."},
    {"role": "user", "content": "Bye"},
]
MODES = {
    "raw": [
        ("system", "Be terse."),
        ("user", "Hi"),
        ("user", "Are you there?"),
        ("assistant", "Yes."),
        ("system", "Answer in French."),
        ("assistant", "Still here."),
        ("user", "Bye"),
    ],
    "standard": [
        ("system", "Be terse.\n\nAnswer in French."),
        ("user", "Hi\n\nAre you there?"),
        ("assistant", "Yes.\n\nStill here."),
        ("user", "Bye"),
    ],
    "strict": [("system", "Be terse.\n\nAnswer in French."), ("user", "Hi"), ("assistant", "Yes."), ("user", "Bye")],
    "full": [
        (
            "user",
            "[system] Be terse.\n\n[user] Hi\n\n[user] Are you there?\n\n[assistant] Yes.\n\n[system] Answer in French.\n\n"
            "[assistant] Still here.\n\n[user] Bye",
        ),
    ],
}


@pytest.mark.parametrize("mode", MODES)
def test_message_modes(client: OpenAI, puter: PuterUpstream, mode: str) -> None:
    answer = ask(client, f"puter-{mode}/openrouter:deepseek/deepseek-chat", CONVERSATION, stream=True)

    assert answer.text.endswith("Bye")
    sent = puter.last.json["args"]["messages"]
    assert [(one["role"], one["content"]) for one in sent] == MODES[mode]
    assert all(set(one) == {"role", "content"} for one in sent)


@pytest.mark.parametrize(
    ("account", "header", "mode"),
    [
        ("puter-chosen", None, "standard"),
        ("puter-chosen", "", "standard"),
        ("puter-chosen", "Full", "full"),
        ("puter-chosen", "raw", "raw"),
        ("puter-standard", "full", "standard"),  # its operator did not leave it to callers
        ("puter-standard", "cooked", "standard"),
        ("puter", "full", "raw"),
    ],
)
def test_a_request_says_its_message_mode_where_the_account_lets_it(
    raw: httpx.Client, puter: PuterUpstream, account: str, header: str | None, mode: str
) -> None:
    body = {"model": f"{account}/openrouter:deepseek/deepseek-chat", "messages": CONVERSATION}
    answer = raw.post("chat/completions", json=body, headers={} if header is None else {"X-Message-Mode": header})

    assert answer.status_code == 200
    assert [(one["role"], one["content"]) for one in puter.last.json["args"]["messages"]] == MODES[mode]
    assert "x-message-mode" not in puter.last.headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_mode_that_there_is_not_is_refused_where_it_counts(
    raw: httpx.Client, sluice: Sluice, puter: PuterUpstream, stream: bool
) -> None:
    body = {"model": "puter-chosen/openrouter:deepseek/deepseek-chat", "messages": CONVERSATION, "stream": stream}
    answer = raw.post("chat/completions", json=body, headers={"X-Message-Mode": "cooked"})

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", "X-Message-Mode")
    assert "full, raw, standard" in error["message"]
    assert puter.posts == []
    row = sluice.row(answer.headers["x-request-id"])
    assert (row["status"], row["error"], row["cost_usd"]) == (400, "invalid_value", 0)


@pytest.mark.parametrize(("mode", "systems"), [("raw", "Be terse."), ("standard", "Be terse.\n\nAnswer in French.")])
def test_claude_hears_every_system_message_where_they_are_gathered(client: OpenAI, puter: PuterUpstream, mode: str, systems: str) -> None:
    ask(client, f"puter-{mode}/claude-haiku-4-5", CONVERSATION, stream=False)
    assert [block["text"] for block in puter.vendor[-1]["system"][0]["content"]] == [systems]


@pytest.mark.parametrize("mode", ["standard", "strict"])
def test_an_assistant_at_either_end_is_no_reason_to_refuse(client: OpenAI, puter: PuterUpstream, mode: str) -> None:
    """The seed sent an empty message there, which today's server refuses."""
    messages = [{"role": "assistant", "content": "Welcome."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    answer = ask(client, f"puter-{mode}/claude-haiku-4-5", messages, stream=False)

    assert answer.text == "echo: Continue."
    assert all(block["text"].strip() for one in puter.vendor[-1]["messages"] for block in one["content"])


def test_a_conversation_with_tools_in_full(client: OpenAI, puter: PuterUpstream) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather here?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4C"},
    ]
    ask(client, "puter-full/gpt-4o-mini", messages, stream=False, tools=[WEATHER])

    [sent] = puter.last.json["args"]["messages"]
    assert (
        sent["content"][0]["text"]
        == '[user] Weather here?\n[image 1]\n\n[assistant] (called get_weather with {"city":"Oslo"})\n\n[tool] 4C'
    )
    assert sent["content"][1] == {"type": "image_url", "image_url": {"url": PIXEL}}
    assert "tools" not in puter.last.json["args"]


def test_messages_with_nothing_in_them_are_refused_here(client: OpenAI, puter: PuterUpstream) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "puter/gpt-4o-mini", [{"role": "user", "content": " "}], stream=False)
    assert refused.value.param == "messages"
    assert puter.posts == []


# Errors of every generation

# token's scenario -> status, code, Retry-After, x-should-retry
FAILURES: dict[str, tuple[int, str, str | None, str | None]] = {
    "401": (502, "upstream_auth_failed", None, None),
    "expired": (502, "upstream_auth_failed", None, None),
    "gen2_auth": (502, "upstream_auth_failed", None, None),
    "402": (402, "insufficient_quota", None, "false"),
    "402-gen2": (402, "insufficient_quota", None, "false"),
    "402-gen2_string": (429, "insufficient_quota", None, "false"),
    "402-gen1": (429, "insufficient_quota", None, "false"),
    "subscription": (403, "subscription_required", None, None),
    "403": (403, "permission_denied", None, None),
    "suspended": (403, "account_suspended", None, None),
    "moderation": (400, "content_policy_violation", None, None),
    "context": (400, "context_length_exceeded", None, None),
    "unavailable": (502, "upstream_error", None, None),
    "mixed": (502, "upstream_error", None, None),
    "empty_vendor": (502, "upstream_error", None, None),
    "no_driver": (502, "upstream_bad_response", None, None),
    "gen2_driver": (502, "upstream_bad_response", None, None),
    "gen2_model": (404, "model_not_found", None, None),
    "no_fallback": (502, "upstream_error", None, None),
    "too_large": (413, "payload_too_large", None, None),
    "429": (429, "rate_limit_exceeded", "10", None),
    "rate_limit": (429, "rate_limit_exceeded", "2", None),
    "concurrent": (429, "rate_limit_exceeded", "2", None),
    "vendor_limit": (429, "rate_limit_exceeded", None, None),
    "500": (502, "upstream_error", None, None),
    "vendor_key": (502, "upstream_error", None, None),
    "503": (503, "overloaded", "5", None),
    "html_502": (502, "upstream_error", None, None),
    "html_200": (502, "upstream_bad_response", None, None),
    "empty_200": (502, "upstream_bad_response", None, None),
    "bad_json_200": (502, "upstream_bad_response", None, None),
    "redirect": (502, "upstream_error", None, None),
}
KINDS = ("whole", "stream")
OUT_OF_CREDIT = [name for name in FAILURES if name.startswith("402")]
BREAKS = ["abort_mid", "eof_mid", "error_frame", "no_usage_line"]
BREAKS_FIRST = ["abort_first", "eof_first", "error_first", "bad_frames_only", "no_content"]
RETRIED = [
    "401",
    "403",
    "429",
    "vendor_limit",
    "500",
    "503",
    "unavailable",
    "no_driver",
    "no_fallback",
    "html_200",
    "bad_json_200",
    *OUT_OF_CREDIT,
]


@pytest.fixture(scope="module")
def failing(sluice: Sluice, accounts: str, puter_server: PuterUpstream) -> str:
    """For each failure and kind of answer an account that has it, and a pool whose second account is well."""
    for kind in KINDS:
        for name in FAILURES:
            add(sluice, puter_server, f"puter-bad-{name}-{kind}", f"puter-sim-{name}~{kind}")
        for name in RETRIED:
            add(sluice, puter_server, f"puter-pool-{name}-{kind}", f"puter-sim-{name}~pool{kind}", priority=10)
            add(sluice, puter_server, f"puter-pool-{name}-{kind}")
    for name in [*BREAKS, *BREAKS_FIRST]:
        add(sluice, puter_server, f"puter-pool-{name}", priority=10)
        add(sluice, puter_server, f"puter-pool-{name}", "puter-sim-ok~second")
    wait_for_all(sluice, puter_server)
    return "bad"


def post(raw: httpx.Client, model: str, kind: str) -> httpx.Response:
    return raw.post("chat/completions", json={"model": model, "messages": HELLO, "stream": kind == "stream"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_has_its_class_and_headers(
    raw: httpx.Client, sluice: Sluice, puter: PuterUpstream, failing: str, name: str, kind: str
) -> None:
    answer = post(raw, f"puter-bad-{name}-{kind}/gpt-4o-mini", kind)

    status, code, retry_after, should_retry = FAILURES[name]
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert (answer.headers.get("retry-after"), answer.headers.get("x-should-retry")) == (retry_after, should_retry)
    for secret in ("puter-sim", "internal detail", "<html", CANNED, "attempts", "127.0.0.1"):
        assert secret not in answer.text
    assert len(puter.posts) == 1
    assert sluice.row(answer.headers["x-request-id"])["status"] == status


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RETRIED)
def test_the_next_account_gives_one_clean_answer(
    raw: httpx.Client, sluice: Sluice, puter: PuterUpstream, failing: str, name: str, kind: str
) -> None:
    answer = post(raw, f"puter-pool-{name}-{kind}/gpt-4o-mini", kind)

    assert answer.status_code == 200
    assert "error" not in answer.text
    assert CANNED not in answer.text
    row = sluice.row(answer.headers["x-request-id"])
    assert (row["attempts"], row["credential"], row["output_tokens"]) == (2, f"puter-pool-{name}-{kind}-0", 5)
    assert len(puter.posts) == 2


def test_an_account_that_ran_out_rests_for_all_its_models(raw: httpx.Client, sluice: Sluice, puter: PuterUpstream) -> None:
    add(sluice, puter, "puter-pool-rests", "puter-sim-ok~rests", priority=10)
    add(sluice, puter, "puter-pool-rests")
    wait_for_all(sluice, puter)
    puter.credit["puter-sim-ok~rests"] = 0
    assert post(raw, "puter-pool-rests/gpt-4o-mini", "whole").status_code == 200
    assert len(puter.posts) == 2
    assert post(raw, "puter-pool-rests/mistral-small", "whole").status_code == 200
    assert len(puter.posts) == 3, "the first account was asked again"


@pytest.mark.parametrize("scenario", BREAKS)
def test_a_stream_that_breaks_ends_in_an_error_and_goes_nowhere_else(
    raw: httpx.Client, sluice: Sluice, puter: PuterUpstream, failing: str, scenario: str
) -> None:
    puter.script(Step(scenario=scenario))
    answer = post(raw, f"puter-pool-{scenario}/gpt-4o-mini", "stream")

    assert answer.status_code == 200
    assert b"echo:" in answer.content
    assert answer.content.strip().split(b"\n\n")[-1].startswith(b'data: {"error":{')
    assert DONE not in answer.content
    assert b'"finish_reason":"' not in answer.content
    row = sluice.row(answer.headers["x-request-id"])
    assert (row["attempts"], row["status"], row["usage_source"]) == (1, 502, "estimated")
    assert len(puter.posts) == 1


@pytest.mark.parametrize("scenario", BREAKS_FIRST)
def test_a_stream_that_breaks_before_it_began_goes_to_the_next_account(
    raw: httpx.Client, puter: PuterUpstream, failing: str, scenario: str
) -> None:
    puter.script(Step(scenario=scenario, frames=[b"1f\n"] if scenario == "no_content" else None), Step())
    answer = post(raw, f"puter-pool-{scenario}/gpt-4o-mini", "stream")

    assert answer.content.endswith(DONE)
    assert answer.content.count(b'"role":"assistant"') == 1
    assert b'"error":' not in answer.content


def test_credit_that_runs_out_within_a_stream_is_said_and_rests_the_account(
    raw: httpx.Client, sluice: Sluice, puter: PuterUpstream
) -> None:
    """Appendix A.4."""
    add(sluice, puter, "puter-pool-within", "puter-sim-ok~within", priority=10)
    add(sluice, puter, "puter-pool-within")
    wait_for_all(sluice, puter)
    call = line("tool_use", id="a", name="get_weather", input={"city": "Oslo"}, text="")
    puter.script(Step(frames=[line("text", text="Checking"), call, line("error", message="No usage left for request.")]))
    answer = post(raw, "puter-pool-within/gpt-4o-mini", "stream")

    *before, last = answer.content.strip().split(b"\n\n")
    error = {"message": "No usage left for request.", "type": "insufficient_quota", "param": None, "code": "insufficient_quota"}
    assert json.loads(last.removeprefix(b"data: ")) == {"error": error}
    assert b'"arguments":"{\\"city\\":\\"Oslo\\"}"' in before[-1]
    assert post(raw, "puter-pool-within/gpt-4o-mini", "stream").content.endswith(DONE)
    assert puter.last.headers["authorization"] == "Bearer puter-sim-ok", "the other account serves now"


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_was_kept_from_the_model_is_no_answer(raw: httpx.Client, puter: PuterUpstream, kind: str) -> None:
    puter.script(Step(scenario="blocked"))
    answer = post(raw, "puter/gpt-4o-mini", kind)
    if kind == "whole":
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_policy_violation")
    else:
        assert answer.content.endswith(DONE), "a stream does not tell who answers"


def test_a_client_that_leaves_ends_the_call_at_puter(raw: httpx.Client, sluice: Sluice, puter: PuterUpstream) -> None:
    puter.script(Step(text="word " * 200, delay_frame_ms=20))
    with raw.stream("POST", "chat/completions", json={"model": "puter/gpt-4o-mini", "messages": HELLO, "stream": True}) as answer:
        next(answer.iter_bytes())
        request_id = answer.headers["x-request-id"]
    eventually(lambda: puter.last.peer_left_at is not None, "the upstream was not left")

    row = sluice.row(request_id)
    assert (row["status"], row["usage_source"]) == (499, "estimated")


# The caller's own token


def test_an_account_without_a_token_serves_those_who_bring_theirs(raw: httpx.Client, sluice: Sluice, puter: PuterUpstream) -> None:
    body = {"model": "puter-own/gpt-4o-mini", "messages": HELLO}
    answer = raw.post("chat/completions", json=body, headers={"x-upstream-key": "puter-sim-ok~mine"})
    assert answer.json()["choices"][0]["message"]["content"] == "echo: Hello my dear friend"
    assert puter.last.headers["authorization"] == "Bearer puter-sim-ok~mine"
    assert b"puter-sim" not in puter.last.body

    answer = raw.post("chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "upstream_key_required")
    assert len(puter.posts) == 1
    assert "puter-sim-ok~mine" not in sluice.log()


def test_a_token_of_the_callers_that_is_refused_is_the_callers_to_mend(raw: httpx.Client, puter: PuterUpstream) -> None:
    body = {"model": "puter-own/gpt-4o-mini", "messages": HELLO}
    answer = raw.post("chat/completions", json=body, headers={"x-upstream-key": "puter-sim-expired~mine"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")

    answer = raw.post("chat/completions", json=body, headers={"x-upstream-key": "puter-sim-402~mine"})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (402, "false")


def test_an_account_of_ours_does_not_take_a_token_of_the_callers(raw: httpx.Client, puter: PuterUpstream) -> None:
    body = {"model": "puter/gpt-4o-mini", "messages": HELLO}
    answer = raw.post("chat/completions", json=body, headers={"x-upstream-key": "puter-sim-ok~mine"})
    assert answer.status_code == 400
    assert puter.posts == []


# Settings


@pytest.mark.parametrize("setting", ["message_mode=cooked", "provider=nobody", "unheard_of=1"])
def test_a_setting_that_puter_does_not_know_is_refused(sluice: Sluice, accounts: str, puter: PuterUpstream, setting: str) -> None:
    arguments = ["--label", "x", "--base-url", puter.base_url, "--set", setting, "--secret-stdin"]
    with pytest.raises(
        AssertionError, match=setting.partition("=")[0] if "unheard" in setting else setting.partition("=")[2] + "|message_mode"
    ):
        sluice.manage("add_credential", "puter", *arguments, stdin="puter-sim-ok")
