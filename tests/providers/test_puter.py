"""Puter's dialect from bytes alone: what goes out in each message mode, and every shape that comes back. Protocol reference 3."""

from __future__ import annotations

import json
from typing import Any

import pytest

from providers import failures
from providers.adapter import Ask, Target
from providers.adapters.puter import FILLER, OPENER, Lines, Puter, Until, full, prepared, standard, tokens_of
from providers.failures import InvalidAtUpstream, UpstreamBroke, UpstreamFailure, UpstreamProtocol
from providers.price import Rates, Tokens
from providers.secrets import SecretText

PUTER = Puter()
TOKEN = "puter-token-0123456789"
MODEL = "openrouter:deepseek/deepseek-chat"
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def target(model: str = MODEL, *, callers_key: bool = False, secret: str = TOKEN, **settings: str) -> Target:
    return Target("puter", 1, "p", "https://api.puter.com", SecretText(secret), model, f"puter/{model}", settings, callers_key)


def ask(*, stream: bool = False, usage: bool = True, **body: Any) -> Ask:
    body = {"model": f"puter/{MODEL}", "messages": [{"role": "user", "content": "Hi"}], "stream": stream, **body}
    return Ask("chat/completions", body, stream=stream, request_id="0123-4567", client_wants_usage=usage)


def sent(where: Target | None = None, **body: Any) -> dict[str, Any]:
    """The `args` that go out for this body."""
    call = json.loads(PUTER.request(ask(**body), where or target()).body)
    assert {name: call[name] for name in call if name != "args"} == {"interface": "puter-chat-completion", "method": "complete"}
    return call["args"]


def s(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


def u(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def a(text: Any, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}


def call(call_id: str, name: str = "get_weather", arguments: str = '{"city":"Oslo"}') -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(call_id: str, text: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def use(call_id: str, name: str = "get_weather", **given: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "tool_use", "id": call_id, "name": name, "input": given}]}


# The request (3.2, 3.3, 3.13)


def test_the_call_goes_to_the_driver_with_the_token_in_a_header_alone():
    request = PUTER.request(ask(stream=True), target())

    assert (request.method, request.url) == ("POST", "https://api.puter.com/drivers/call")
    assert request.headers["Authorization"] == f"Bearer {TOKEN}"
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["Accept-Encoding"] == "identity"
    assert request.headers["User-Agent"].startswith("sluice/")
    assert TOKEN.encode() not in request.body
    assert "driver" not in json.loads(request.body), "the names of drivers of 2025 are 404 today"


def test_without_a_token_nobody_is_called():
    with pytest.raises(failures.CredentialRefused):
        PUTER.request(ask(), target(secret=""))


@pytest.mark.parametrize(
    "model", [MODEL, "anthropic:anthropic/claude-haiku-4-5", "vendor/model:free", "gpt-5-nano", "openrouter/vendor/model"]
)
def test_ids_of_models_go_out_as_they_are(model: str):
    assert sent(target(model))["model"] == model


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": None, "top_p": None, "max_tokens": None, "tools": None, "stop": None, "n": None}, {}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"top_p": 0.5, "verbosity": "low"}, {"top_p": 0.5, "verbosity": "low"}),
        ({"reasoning_effort": "minimal"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "xhigh"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "none"}, {}),
        ({"reasoning": {"effort": "medium"}}, {"reasoning_effort": "medium"}),
        ({"image_config": {"size": 1}, "service_tier": "flex"}, {"image_config": {"size": 1}, "service_tier": "flex"}),
        ({"response_format": {"type": "text"}, "n": 1, "modalities": ["text"]}, {}),
        # Ignored everywhere (3.3): not sent.
        ({"frequency_penalty": 1, "presence_penalty": 1, "seed": 1, "logprobs": True, "logit_bias": {"1": 1}}, {}),
        ({"stop": "END", "user": "u", "metadata": {"a": "b"}, "store": True, "stream_options": {}}, {}),
        ({"parallel_tool_calls": False, "tool_choice": "auto"}, {}),
    ],
)
def test_parameters(body: dict[str, Any], expected: dict[str, Any]):
    assert sent(**body) == {"messages": [u("Hi")], "model": MODEL, "stream": False, **expected}


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("n", 2),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {"x": 1}),
        ("tools", [{"type": "web_search"}]),
        ("tools", [{"type": "custom", "custom": {"name": "x"}}]),
    ],
)
def test_what_no_route_heeds_and_would_be_missed_is_refused(param: str, value: Any):
    with pytest.raises(InvalidAtUpstream) as refused:
        sent(**{param: value})
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, param, "unsupported_parameter")


def test_an_effort_that_nobody_knows_is_refused():
    with pytest.raises(InvalidAtUpstream):
        sent(reasoning_effort="extreme")


def test_a_provider_is_pinned_by_setting():
    assert sent(target(provider="openrouter"))["provider"] == "openrouter"
    assert "provider" not in sent()


WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("choice", "tools", "system"),
    [
        (None, [WEATHER, TIME], ""),
        ("auto", [WEATHER, TIME], ""),
        ("none", None, ""),
        ("required", [WEATHER, TIME], "Answer with a call of one of the functions."),
        ({"type": "function", "function": {"name": "get_time"}}, [TIME], "Answer with a call of the function 'get_time'."),
    ],
)
def test_tool_choice(choice: Any, tools: Any, system: str):
    args = sent(tools=[WEATHER, TIME], tool_choice=choice, parallel_tool_calls=False)

    assert args.get("tools") == tools
    assert args.get("tool_choice") == (choice if tools else None)
    assert args.get("parallel_tool_calls") == (False if tools else None)
    assert args["messages"] == ([s(system)] if system else []) + [u("Hi")]


def test_what_a_tool_choice_forces_is_said_in_the_first_system_message():
    messages = [u("Hi"), s("Be terse."), s("Really.")]
    args = sent(messages=messages, tools=[WEATHER], tool_choice="required")

    assert args["messages"] == [u("Hi"), s("Be terse.\n\nAnswer with a call of one of the functions."), s("Really.")]


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "other"}}, {"type": "allowed_tools"}, "sometimes"])
def test_a_tool_choice_that_leads_nowhere_is_refused(choice: Any):
    with pytest.raises(InvalidAtUpstream) as refused:
        sent(tools=[WEATHER], tool_choice=choice)
    assert refused.value.param == "tool_choice"


# Messages (3.4, 3.11)

CONVERSATION = [
    s("Be terse."), u("Hi"), u("Are you there?"), a("Yes."), {"role": "System", "content": "Answer in French."}, a("Still here."), u("Bye"),
]  # fmt: skip


def test_worked_example_a_raw():
    assert sent(messages=CONVERSATION)["messages"] == [{**message, "role": message["role"].lower()} for message in CONVERSATION]


def test_worked_example_a_standard():
    expected = [
        s("Be terse.\n\nAnswer in French."), u("Hi\n\nAre you there?"), a("Yes.\n\nStill here."), u("Bye"),
    ]  # fmt: skip
    assert sent(target(message_mode="standard"), messages=CONVERSATION)["messages"] == expected


def test_worked_example_a_standard_as_the_seed():
    expected = [s("Be terse.\n\nAnswer in French."), u("Hi"), a("Yes."), u("Bye")]
    where = target(message_mode="standard", standard_strict_seed="1")
    assert sent(where, messages=CONVERSATION)["messages"] == expected


def test_worked_example_a_full():
    text = (
        "[system] Be terse.\n\n[user] Hi\n\n[user] Are you there?\n\n[assistant] Yes.\n\n[system] Answer in French.\n\n"
        "[assistant] Still here.\n\n[user] Bye"
    )
    assert sent(target(message_mode="full"), messages=CONVERSATION)["messages"] == [u(text)]


IMAGE = {"type": "image_url", "image_url": {"url": PIXEL}}
# The reference's table: input; raw, standard, standard as the seed dropped, full. None: nothing is left, so it is refused.
CASES: dict[str, tuple[list[Any], Any, Any, Any, Any]] = {
    "B": ([a("W"), u("Q")], [a("W"), u("Q")], [u(OPENER), a("W"), u("Q")], [u("Q")], "[assistant] W\n\n[user] Q"),
    "C": (
        [s("S"), a("W"), u("Q")], [s("S"), a("W"), u("Q")], [s("S"), u(OPENER), a("W"), u("Q")], [s("S"), u("Q")],
        "[system] S\n\n[assistant] W\n\n[user] Q",
    ),
    "D": ([u("Q"), a("A")], [u("Q"), a("A")], [u("Q"), a("A"), u(FILLER)], [u("Q"), a("A"), u(FILLER)], "[user] Q\n\n[assistant] A"),
    "E": ([s("S")], [s("S")], [s("S"), u(FILLER)], [s("S"), u(FILLER)], "[system] S"),
    "F": ([a("A")], [a("A")], [u(OPENER), a("A"), u(FILLER)], None, "[assistant] A"),
    "G": ([], None, None, None, None),
    "H": (
        [u([{"type": "text", "text": "x"}, IMAGE])], *[[u([{"type": "text", "text": "x"}, IMAGE])]] * 3,
        [{"type": "text", "text": "[user] x\n[image 1]"}, IMAGE],
    ),
    "I": (
        [u("Q"), a(None, call("c")), result("c", "R")], *[[u("Q"), use("c", city="Oslo"), result("c", "R")]] * 3,
        '[user] Q\n\n[assistant] (called get_weather with {"city":"Oslo"})\n\n[tool] R',
    ),
    "J": ([{"role": "developer", "content": "D"}, u("Q")], *[[s("D"), u("Q")]] * 3, "[system] D\n\n[user] Q"),
    "K": ([s(""), u("Q")], *[[u("Q")]] * 3, "[user] Q"),
}  # fmt: skip
MODE_SETTINGS = [
    {"message_mode": "raw"},
    {"message_mode": "standard"},
    {"message_mode": "standard", "standard_strict_seed": "1"},
    {"message_mode": "full"},
]


@pytest.mark.parametrize("settings", MODE_SETTINGS, ids=["raw", "standard", "strict", "full"])
@pytest.mark.parametrize("case", CASES)
def test_the_table_of_modes(case: str, settings: dict[str, str]):
    given, *expected = CASES[case]
    wanted = expected[MODE_SETTINGS.index(settings)]
    if wanted is None:
        with pytest.raises(InvalidAtUpstream) as refused:
            sent(target(**settings), messages=given)
        assert refused.value.param == "messages"
        return
    wanted = [u(wanted)] if settings["message_mode"] == "full" else wanted
    assert sent(target(**settings), messages=given)["messages"] == wanted


def test_raw_is_the_mode_when_none_is_set():
    assert sent(messages=[u("a"), u("b"), a("c")])["messages"] == [u("a"), u("b"), a("c")]


def test_the_filler_is_a_setting():
    where = target(message_mode="standard", standard_filler="Weiter!")
    assert sent(where, messages=[u("Q"), a("A")])["messages"][-1] == u("Weiter!")


@pytest.mark.parametrize("mode", ["raw", "standard", "full"])
def test_nothing_empty_goes_out(mode: str):
    empty = [u(""), u("  \n"), a(""), a(None), s([]), u([{"type": "text", "text": " "}]), {"role": "user"}]
    messages = sent(target(message_mode=mode), messages=[*empty, u("Q"), *empty])["messages"]

    assert messages == [u("[user] Q" if mode == "full" else "Q")]
    with pytest.raises(InvalidAtUpstream):
        sent(target(message_mode=mode), messages=empty)


def test_a_refusal_of_before_is_what_the_assistant_said():
    assert prepared([{"role": "assistant", "content": None, "refusal": "No."}]) == [a("No.")]


def test_texts_in_parts_are_one_text():
    assert prepared([u([{"type": "text", "text": "a"}, "b", {"type": "text", "text": ""}])]) == [u("a\n\nb")]


def test_a_mark_for_the_cache_keeps_its_place():
    part = {"type": "text", "text": "long", "cache_control": {"type": "ephemeral"}}

    assert prepared([s([part]), {**u("Q"), "cache_control": {"type": "ephemeral"}}]) == [
        s([part]),
        {**u("Q"), "cache_control": {"type": "ephemeral"}},
    ]
    assert standard(prepared([s("first"), s([part]), u("Q")]))[0] == s([{"type": "text", "text": "first"}, part])


@pytest.mark.parametrize("role", ["critic", 7, ["user"]])
def test_a_role_that_nobody_knows_is_refused(role: Any):
    with pytest.raises(InvalidAtUpstream):
        prepared([{"role": role, "content": "x"}])


# Tools in the history


def test_calls_go_one_by_one_each_with_its_result():
    """The reference's safest form (3.4): of several calls in one message the server loses or turns round some."""
    history = [
        u("Weather in Oslo and Rome?"),
        a("Let me look.", call("a"), call("b", arguments='{"city":"Rome"}')),
        result("b", "15 C"),
        result("a", "4 C"),
    ]
    assert prepared(history) == [
        u("Weather in Oslo and Rome?"),
        a("Let me look."),
        use("a", city="Oslo"),
        result("a", "4 C"),
        use("b", city="Rome"),
        result("b", "15 C"),
    ]


def test_a_result_that_is_missing_is_said_to_be():
    assert prepared([a("", call("a"), call("b")), result("a", ""), u("Q")]) == [
        use("a", city="Oslo"),
        result("a", ""),
        use("b", city="Oslo"),
        result("b", "(no result)"),
        u("Q"),
    ]


def test_a_result_of_no_call_stays_for_the_upstream_to_judge():
    assert prepared([result("x", "R"), a(None, call("a")), result("y", "S"), result("a", "T")]) == [
        result("x", "R"),
        use("a", city="Oslo"),
        result("a", "T"),
        result("y", "S"),
    ]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ("", {}), ("{}", {}), ('{"a":[1,null]}', {"a": [1, None]}), ("{not json", {"_raw": "{not json"}), ("[1]", {"_raw": "[1]"}),
        ('"text"', {"_raw": '"text"'}), ({"a": 1}, {"a": 1}), (None, {}), ("[" * 50_000, {"_raw": "[" * 50_000}),
    ],
)  # fmt: skip
def test_arguments_become_an_object(arguments: Any, given: dict[str, Any]):
    assert prepared([a(None, call("c", arguments=arguments))])[0] == {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "c", "name": "get_weather", "input": given}],
    }


def test_the_older_form_of_calls_in_a_history():
    old = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "R"},
    ]
    made, answered = prepared(old)

    assert made["content"][0]["name"] == "f"
    assert answered == result(made["content"][0]["id"], "R")


def test_a_tools_result_in_parts_is_its_text_and_anything_else_is_refused():
    assert prepared([result("a", [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}])]) == [result("a", "x\n\ny")]
    with pytest.raises(InvalidAtUpstream):
        prepared([result("a", [IMAGE])])


@pytest.mark.parametrize("broken", [{"id": "a"}, {"function": {"arguments": "{}"}}, "call"])
def test_a_call_without_a_function_is_refused(broken: Any):
    with pytest.raises(InvalidAtUpstream):
        prepared([a(None, broken)])


def test_a_tools_turn_is_never_merged_or_dropped_by_standard():
    history = prepared([a("First.", call("a")), result("a", "R"), a("Then."), a("More."), a("", call("b")), result("b", "S")])
    turn = [use("a", city="Oslo"), result("a", "R")]

    assert standard(history) == [u(OPENER), a("First."), *turn, a("Then.\n\nMore."), use("b", city="Oslo"), result("b", "S")]
    assert standard(history, strict=True) == [u(OPENER), *turn, a("Then."), use("b", city="Oslo"), result("b", "S")]
    assert standard([*turn, a("Then.")]) == [u(OPENER), *turn, a("Then."), u(FILLER)]


def test_full_sends_tools_only_when_it_shall():
    assert "tools" not in sent(target(message_mode="full"), tools=[WEATHER], tool_choice="required")
    assert sent(target(message_mode="full", full_keep_tools="1"), tools=[WEATHER])["tools"] == [WEATHER]


def test_full_counts_images_over_all_messages():
    [message] = full(
        prepared([u([IMAGE, {"type": "text", "text": "and"}, IMAGE]), a("Two."), u([{"type": "text", "text": "third"}, IMAGE])])
    )

    assert message["content"][0]["text"] == "[user] [image 1]\nand\n[image 2]\n\n[assistant] Two.\n\n[user] third\n[image 3]"
    assert message["content"][1:] == [IMAGE] * 3


# Images


@pytest.mark.parametrize(
    ("model", "provider", "url", "part"),
    [
        (MODEL, "", PIXEL, IMAGE),
        (MODEL, "", "https://example.org/a.png", {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}),
        ("claude-haiku-4-5", "openrouter", PIXEL, IMAGE),
        ("claude-haiku-4-5", "", PIXEL, {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}),
        (
            "openrouter:anthropic/claude-haiku-4.5",
            "",
            "https://example.org/a.png",
            {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
        ),
        ("some-model", "claude", PIXEL, {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}),
        ("gpt-5", "openai-responses", PIXEL, {"type": "input_image", "image_url": PIXEL}),
    ],
)
def test_an_image_goes_out_as_its_route_takes_it(model: str, provider: str, url: str, part: dict[str, Any]):
    where = target(model, **({"provider": provider} if provider else {}))
    parts = [{"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": url}}]

    assert sent(where, messages=[u(parts)])["messages"] == [u([{"type": "text", "text": "what"}, part])]


def test_an_image_keeps_how_closely_to_look():
    part = {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}
    assert prepared([u([part, {"image_url": PIXEL}])]) == [u([part, IMAGE])]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "puter_path": "~/secret.txt"},
        {"puter_path": "~/secret.txt"},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "input_audio", "input_audio": {"data": "x"}},
        {"type": "image_url", "image_url": {"url": "~/secret.png"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url"},
        {"type": "document", "source": {}},
        7,
    ],
)
def test_a_part_that_would_be_ignored_or_reach_into_the_account_is_refused(part: Any):
    with pytest.raises(InvalidAtUpstream) as refused:
        prepared([u([{"type": "text", "text": "x"}, part])])
    assert refused.value.param == "messages"


def test_only_known_fields_of_parts_and_messages_go_out():
    smuggled = {"puter_path": "~/secret.txt"}
    parts = [
        {"type": "text", "text": "x", **smuggled},
        {**IMAGE, **smuggled},
        {"type": "video_url", "video_url": {"url": "https://e.org/v", **smuggled}, **smuggled},
    ]

    assert "puter_path" not in json.dumps(sent(messages=[{**u(parts), **smuggled, "name": "n"}]))


def test_an_image_for_claude_that_is_not_base64_is_refused():
    with pytest.raises(InvalidAtUpstream):
        prepared([u([{"type": "image_url", "image_url": {"url": "data:image/svg+xml,<svg/>"}}])], "claude")


# Whole answers (3.5)


def whole(answer: Any, where: Target | None = None, **body: Any) -> dict[str, Any]:
    raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return json.loads(PUTER.answer(ask(**body), where or target(), raw, "application/json").body)


def envelope(result: Any, route: str = "openai-completion", model: str = "gpt-4o-mini", **more: Any) -> dict[str, Any]:
    metadata = {"service_used": route, "providerUsed": model}
    return {"success": True, "result": result, "service": {"name": "ai-chat"}, "metadata": metadata, **more}


OPENAI = {
    "index": 0,
    "message": {"role": "assistant", "content": "Hello.", "refusal": None},
    "logprobs": None,
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "cached_tokens": 0, "usd_cents": 0.0012},
    "via_ai_chat_service": True,
}
CLAUDE = {
    "message": {
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-4-5-20251001",
        "content": [
            {"type": "text", "text": "Let me check."},
            {"type": "tool_use", "id": "toolu_01", "name": "get_weather", "input": {"city": "Oslo"}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {"input_tokens": 310, "output_tokens": 40},
    },
    "usage": {
        "input_tokens": 310,
        "ephemeral_5m_input_tokens": 0,
        "ephemeral_1h_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 40,
        "thinking_tokens": 0,
        "usd_cents": 0.051,
    },
    "finish_reason": "stop",
    "via_ai_chat_service": True,
}


def test_openais_shape():
    answer = whole(envelope(OPENAI))

    assert answer["choices"] == [{"index": 0, "message": a("Hello."), "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    assert (answer["object"], answer["model"]) == ("chat.completion", f"puter/{MODEL}")


def test_the_worked_example_of_claudes_shape():
    """Appendix A.3."""
    answer = whole(envelope(CLAUDE, "claude", "claude-haiku-4-5-20251001"))

    assert answer["choices"] == [
        {"index": 0, "message": a("Let me check.", call("toolu_01")), "logprobs": None, "finish_reason": "tool_calls"}
    ]
    assert answer["usage"] == {"prompt_tokens": 310, "completion_tokens": 40, "total_tokens": 350}


def test_the_answer_names_who_gave_it():
    """A silent fallback to another model shows nowhere else (3.14)."""
    assert whole(envelope(CLAUDE, "claude", "claude-other"))["system_fingerprint"] == "claude/claude-other"


def test_what_an_answer_says_of_itself_is_an_answers_whole_content():
    """The seed read whole answers as lines, and gave none of their words (3.12)."""
    assert whole(envelope(OPENAI))["choices"][0]["message"]["content"] == "Hello."
    pretty = json.dumps(envelope(OPENAI), indent=2).encode()
    assert whole(pretty)["choices"][0]["message"]["content"] == "Hello."


@pytest.mark.parametrize(
    "result",
    [
        "Hello.",
        {"text": "Hello."},
        {"message": "Hello."},
        {"message": {"content": "Hello."}},
        {
            "message": {"role": "assistant", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]},
            "normalized": True,
        },
        {"choices": [{"message": {"content": "Hello."}, "finish_reason": "stop"}]},
        {
            "message": {"type": "message", "content": [{"type": "text", "text": "Hello."}], "stop_reason": "end_turn"},
            "finish_reason": "stop",
        },
    ],
)
def test_older_shapes(result: Any):
    choice = whole(envelope(result))["choices"][0]

    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello.", "stop")


def test_mistrals_camel_case():
    result = {
        "message": {"content": "", "toolCalls": [{"id": "c", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}]},
        "finishReason": "tool_calls",
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 1},
    }
    choice = whole(envelope(result, "mistral"))["choices"][0]

    assert choice["message"] == a(None, call("c"))
    assert choice["finish_reason"] == "tool_calls"
    cut = {"message": {"content": "x"}, "finishReason": "length"}
    assert whole(envelope(cut, "mistral"))["choices"][0]["finish_reason"] == "length"


def test_openais_calls_even_when_the_reason_says_stop():
    """The Responses routes always say stop."""
    result = {"message": {"content": None, "tool_calls": [{**call("c"), "canonical_id": "fc_1"}]}, "finish_reason": "stop"}
    choice = whole(envelope(result, "openai-responses"))["choices"][0]

    assert (choice["message"], choice["finish_reason"]) == (a(None, call("c")), "tool_calls")


@pytest.mark.parametrize(
    ("message", "thought"),
    [
        ({"content": "x", "reasoning": "hm"}, "hm"),
        ({"content": "x", "reasoning_content": "hm"}, "hm"),
        ({"content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "x"}]}, "hm"),
        ({"content": [{"type": "redacted_thinking", "data": "?"}, {"type": "text", "text": "x"}]}, None),
    ],
)
def test_reasoning(message: dict[str, Any], thought: str | None):
    assert whole(envelope({"message": message}))["choices"][0]["message"].get("reasoning_content") == thought


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason", "expected"),
    [
        ("end_turn", "stop", "stop"),
        ("stop_sequence", "stop", "stop"),
        ("max_tokens", "stop", "length"),
        ("refusal", "stop", "content_filter"),
        ("pause_turn", "stop", "stop"),
        (None, "length", "length"),
        (None, "STOP", "stop"),
        (None, "MAX_TOKENS", "length"),
        (None, "SAFETY", "content_filter"),
        (None, "content_filter", "content_filter"),
        (None, "a reason of tomorrow", "stop"),
        (None, None, "stop"),
    ],
)
def test_finish_reasons(stop_reason: str | None, finish_reason: str | None, expected: str):
    result = {"message": {"content": "x", "stop_reason": stop_reason}, "finish_reason": finish_reason}

    assert whole(envelope(result))["choices"][0]["finish_reason"] == expected


def test_calls_without_an_id_or_an_input_get_them():
    blocks = [
        {"type": "tool_use", "name": "f", "input": {}},
        {"type": "tool_use", "name": "g"},
        {"type": "tool_use", "id": "x", "name": "h", "input": '{"a":1}'},
    ]
    calls = whole(envelope({"message": {"content": blocks}}))["choices"][0]["message"]["tool_calls"]

    assert [one["function"]["arguments"] for one in calls] == ["{}", "{}", '{"a":1}']
    assert len({one["id"] for one in calls}) == 3
    assert all(one["id"] for one in calls)


def test_calls_that_are_said_in_both_forms_are_one():
    message = {
        "content": [{"type": "tool_use", "id": "c", "name": "get_weather", "input": {"city": "Oslo"}}],
        "tool_calls": [call("c"), call("d")],
    }
    assert whole(envelope({"message": message}))["choices"][0]["message"]["tool_calls"] == [call("c"), call("d")]


def test_images_that_were_made():
    picture = {"type": "image_url", "image_url": {"url": PIXEL}}
    message = whole(envelope({"message": {"content": "See.", "images": [picture, picture]}}))["choices"][0]["message"]

    assert message["images"] == [picture, picture]


def test_a_refusal_is_handed_on():
    assert whole(envelope({"message": {"content": None, "refusal": "No."}}))["choices"][0]["message"]["refusal"] == "No."


def test_arguments_are_compact_and_keep_their_letters():
    block = {"type": "tool_use", "id": "c", "name": "f", "input": {"città": "Århus", "n": [1, 2]}}
    message = whole(envelope({"message": {"content": [block]}}))["choices"][0]["message"]

    assert message["tool_calls"][0]["function"]["arguments"] == '{"città":"Århus","n":[1,2]}'


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"<html>x</html>", b'{"success":true}', b'{"success":true,"result":null}', b'{"success":true,"result":{}}', b"[]", b"1f"],
)
def test_an_answer_without_an_answer_is_the_upstreams_failure(body: bytes):
    with pytest.raises(UpstreamProtocol):
        whole(body)


def test_whole_mode_reads_lines_too():
    lines = b'{"type":"text","text":"Hel"}\n{"type":"text","text":"lo."}\n{"type":"usage","usage":{"prompt":1,"completion":1}}'
    assert whole(lines)["choices"][0]["message"]["content"] == "Hello."


def test_of_a_whole_answer_nothing_has_gone_out_when_it_fails():
    """So another account may still be tried."""
    with pytest.raises(failures.OutOfCredit):
        whole(b'{"type":"text","text":"Hel"}\n{"type":"error","message":"No usage left for request."}\n')
    with pytest.raises(UpstreamProtocol):
        whole(b'{"type":"text","text":"Hel"}\n')


@pytest.mark.parametrize("route", ["fake-chat", "abuse"])
def test_a_stand_in_for_a_blocked_prompt_is_no_answer(route: str):
    with pytest.raises(failures.ContentFiltered):
        whole(envelope({"message": {"content": [{"type": "text", "text": "Lorem ipsum"}]}}, route))


def test_the_model_fake_may_be_asked_for():
    answer = whole(
        envelope({"message": {"content": "Lorem ipsum"}, "usage": {"input_tokens": 1, "output_tokens": 2}}, "fake-chat", "fake"),
        target("fake"),
    )
    assert answer["choices"][0]["message"]["content"] == "Lorem ipsum"


# Usage (3.6)


@pytest.mark.parametrize(
    ("usage", "apart", "tokens"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 3, "cached_tokens": 4, "usd_cents": 0.1}, True, Tokens(9, 4, 0, 3)),
        ({"prompt_tokens": 9, "completion_tokens": 3, "cached_tokens": 4}, False, Tokens(5, 4, 0, 3)),
        ({"prompt_tokens": 3, "completion_tokens": 3, "cached_tokens": 4}, False, Tokens(3, 4, 0, 3)),
        (
            {
                "input_tokens": 10,
                "ephemeral_5m_input_tokens": 2,
                "ephemeral_1h_input_tokens": 3,
                "cache_read_input_tokens": 4,
                "output_tokens": 9,
                "thinking_tokens": 5,
            },
            False,
            Tokens(10, 4, 5, 4, 5),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 3, "cached_tokens": 4, "thinking_tokens": 6, "grounding_requests": 1},
            False,
            Tokens(9, 4, 0, 3, 6),
        ),
        ({"prompt": 9, "completion": 3, "input_cache_read": 4, "request": 1, "billedUsage": 1}, False, Tokens(9, 4, 0, 3)),
        ({"prompt": 9, "completion": 3}, True, Tokens(9, 0, 0, 3)),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 3,
                "cached_tokens": 4,
                "energy_kwh": 0.1,
                "accounting_method": "measured",
                "billedUsage": 1,
            },
            False,
            Tokens(5, 4, 0, 3),
        ),
        ({"input_tokens": 2, "output_tokens": 3}, False, Tokens(2, 0, 0, 3)),
        ({"usd_cents": None}, False, None),
        ({}, False, None),
        ({"prompt_tokens": "9", "completion_tokens": None}, False, None),
        ({"prompt_tokens": True}, False, None),
        ({"prompt_tokens": -5, "completion_tokens": 3.0}, False, Tokens(0, 0, 0, 3)),
        ({"prompt_tokens": 10**30, "completion_tokens": float("inf")}, False, Tokens(10**12, 0, 0, 0)),
    ],
)
def test_usage_keys_of_each_route(usage: dict[str, Any], apart: bool, tokens: Tokens | None):
    assert tokens_of(usage, cached_apart=apart) == tokens


AMBIGUOUS = {"prompt_tokens": 9, "completion_tokens": 3, "cached_tokens": 4}


@pytest.mark.parametrize(
    ("route", "model", "prompt"),
    [
        ("openai-completion", MODEL, 13),
        ("azure-openai", "gpt-5", 13),
        ("gemini", MODEL, 13),
        ("meta", MODEL, 13),
        ("openai-responses", "gpt-5", 13),
        ("deepseek", "gpt-5", 9),
        ("mistral", MODEL, 9),
        ("azure-openai", "grok-4", 9),
        ("xai", "grok-4", 9),
    ],
)
def test_whether_cached_tokens_stand_apart_goes_by_the_route_that_answered(route: str, model: str, prompt: int):
    answer = whole(envelope({"message": {"content": "x"}, "usage": AMBIGUOUS}, route), target(model))

    assert answer["usage"]["prompt_tokens"] == prompt
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


@pytest.mark.parametrize(
    ("model", "provider", "fresh"),
    [
        ("gpt-5-nano", "", 9), ("openai:openai/gpt-4o", "", 9), ("o3", "", 9), ("google/gemini-2.5-pro", "", 9), ("vendor/o1:free", "", 9),
        ("deepseek-chat", "", 5), ("vendor/not-gpt-5", "", 5), ("whatever", "azure-openai", 9), ("gpt-oss-120b", "groq", 5),
    ],
)  # fmt: skip
def test_in_a_stream_it_goes_by_the_pinned_provider_or_the_models_name(model: str, provider: str, fresh: int):
    reader = Lines(ask(stream=True), target(model, **({"provider": provider} if provider else {})))
    reader.feed(line("usage", usage=AMBIGUOUS))

    assert reader.tokens == Tokens(fresh, 4, 0, 3)


# Streams (3.7)


def line(kind: str, **fields: Any) -> bytes:
    return json.dumps({"type": kind, **fields}, ensure_ascii=False).encode() + b"\n"


def text(words: str) -> bytes:
    return line("text", text=words)


USAGE = line("usage", usage={"prompt": 9, "completion": 3})


def reader_of(where: Target | None = None, **body: Any) -> Lines:
    return Lines(ask(stream=True, **body), where or target())


def read(*parts: bytes, reader: Lines | None = None, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream that ends well."""
    reader = reader or reader_of(**body)
    said = b"".join(reader.feed(part) for part in parts) + reader.end()
    assert said.endswith(b"data: [DONE]\n\n")
    return [json.loads(event.removeprefix(b"data: ")) for event in said.split(b"\n\n") if event.startswith(b"data: {")]


def deltas(events: list[dict[str, Any]]) -> list[Any]:
    """Each delta, and the finish reason as a word."""
    return [choice["finish_reason"] or choice["delta"] for event in events for choice in event["choices"]]


def words_of(events: list[dict[str, Any]]) -> str:
    return "".join(one.get("content", "") for one in deltas(events) if isinstance(one, dict))


ROLE = {"role": "assistant", "content": ""}


def test_the_worked_example_of_a_stream():
    """Appendix A.4."""
    events = read(
        line("reasoning", reasoning="Need weather."),
        text("Checking"),
        line("tool_use", id="a", name="get_weather", input={"city": "Oslo"}, text=""),
        line("usage", usage={"prompt": 40, "completion": 12, "input_cache_read": 8, "request": 1, "usd_cents": 0.01}),
    )
    assert deltas(events) == [
        ROLE,
        {"reasoning_content": "Need weather."},
        {"content": "Checking"},
        {"tool_calls": [{"index": 0, **call("a")}]},
        "tool_calls",
    ]
    assert events[-1]["usage"] == {
        "prompt_tokens": 48,
        "completion_tokens": 12,
        "total_tokens": 60,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    assert len({event["id"] for event in events}) == 1, "the seed made a new id for each"


def test_usage_is_told_only_when_asked_for():
    events = read(text("Hi"), USAGE, usage=False)
    assert all(event["choices"] and "usage" not in event for event in events)


def test_several_calls_have_an_index_each():
    events = read(line("tool_use", id="a", name="f", input={}), line("tool_use", name="g", input={"x": 1}), USAGE)
    calls = [one["tool_calls"][0] for one in deltas(events) if isinstance(one, dict) and "tool_calls" in one]

    assert [one["index"] for one in calls] == [0, 1]
    assert [one["function"] for one in calls] == [{"name": "f", "arguments": "{}"}, {"name": "g", "arguments": '{"x":1}'}]
    assert calls[1]["id"].startswith("call_")


def test_images_in_a_stream_come_one_by_one():
    picture = {"type": "image_url", "image_url": {"url": PIXEL}}
    assert deltas(read(line("image", image=picture), line("image", image=picture), USAGE)) == [
        ROLE,
        {"images": [picture]},
        {"images": [picture]},
        "stop",
    ]


@pytest.mark.parametrize(
    "noise",
    [
        b"1f\n",
        b"0\r\n",
        b"\n\n",
        b"  \n",
        line("extra_content", extra_content={"a": 1}),
        line("compaction", id="c", encrypted_content="x"),
        line("something of tomorrow", text="?"),
        line("text", text=None),
        line("text", text="", extra_content={}),
        line("reasoning"),
        b'{"type":"text","te\n',
        b"not json\n",
        b'{"unknown":1}\n',
        b"[1]\n",
    ],
)
def test_what_is_no_content_is_passed_over(noise: bytes):
    assert words_of(read(text("Hel"), noise, text("lo."), USAGE)) == "Hello."


def test_a_leftover_of_chunked_encoding_may_come_first_and_any_number_of_times():
    assert words_of(read(b"1f\n", text("Hel"), b"2\n", text("lo"), b"a0\n", b"ff\n", USAGE, b"0\n")) == "Hello"


def test_three_lines_that_cannot_be_read_are_no_stream():
    reader = reader_of()
    with pytest.raises(UpstreamFailure):
        read(b"x y\n", b"{\n", b"}{\n", text("Hi"), USAGE, reader=reader)


def test_objects_with_nothing_between_them():
    assert words_of(read(text("Hel").strip() + text("lo").strip() + text(".").strip() + b" " + USAGE)) == "Hello."


def test_the_last_line_needs_no_end():
    """The seed lost it (3.12)."""
    assert deltas(read(text("Hi"), USAGE.strip()))[-1] == "stop"


def test_letters_may_be_cut_in_two():
    stream = text("naïve 𝄞🚀") + USAGE
    assert words_of(read(*(stream[at : at + 1] for at in range(len(stream))))) == "naïve 𝄞🚀"


def test_a_stream_without_its_usage_line_was_cut_off():
    with pytest.raises(UpstreamBroke):
        read(text("Hel"))
    with pytest.raises(UpstreamProtocol):
        read(b"")
    with pytest.raises(UpstreamProtocol):
        read(b"\n")


def test_a_deployment_without_usage_lines_may_be_set_so():
    reader = reader_of(target(require_usage_line="0"))
    assert words_of(read(text("Hello"), reader=reader)) == "Hello"
    with pytest.raises(UpstreamProtocol):
        read(b"\n", reader=reader_of(target(require_usage_line="0")))


@pytest.mark.parametrize(
    "last", [b'{"type":"usage"}\n', line("usage", usage={"usd_cents": None}), b'{"usage":{"usd_cents":null}}\n', line("usage", usage=None)]
)
def test_a_usage_line_that_counts_nothing_ends_the_stream_and_leaves_an_estimate(last: bytes):
    reader = reader_of()
    assert deltas(read(text("Hello"), last, reader=reader))[-1] == "stop"
    assert reader.tokens is None
    assert reader.estimated_output() == 1


def test_the_stand_in_for_a_length_is_the_count():
    """No line says why it ended (3.7)."""
    full_usage = line("usage", usage={"prompt": 9, "completion": 5})
    assert deltas(read(text("x"), full_usage, max_tokens=5))[-1] == "length"
    assert deltas(read(text("x"), full_usage, max_completion_tokens=6))[-1] == "stop"
    assert deltas(read(text("x"), full_usage))[-1] == "stop"
    assert deltas(read(line("tool_use", id="a", name="f", input={}), full_usage, max_tokens=5))[-1] == "tool_calls"


def test_what_was_stopped_here_was_not_cut_off_there():
    assert deltas(read(text("one END two"), line("usage", usage={"prompt": 9, "completion": 5}), max_tokens=5, stop="END"))[-1] == "stop"


def test_a_line_is_read_as_soon_as_it_ends():
    reader = reader_of()
    assert reader.feed(text("Hi").strip()) == b""
    assert b'"content":"Hi"' in reader.feed(b"\n")


def test_grok_is_cut_at_a_thousand_whatever_was_asked_for():
    cut = line("usage", usage={"prompt_tokens": 9, "completion_tokens": 1000})
    assert deltas(read(text("x"), cut, reader=reader_of(target("grok-4", provider="xai"))))[-1] == "length"
    assert deltas(read(text("x"), cut, reader=reader_of(target("grok-4", provider="xai"), max_tokens=9000)))[-1] == "length"


def test_a_whole_answer_where_a_stream_was_wanted_is_read_as_well():
    events = read(json.dumps(envelope(OPENAI)).encode())
    assert (words_of(events), deltas(events)[-1]) == ("Hello.", "stop")


# Stop sequences, which no route heeds


@pytest.mark.parametrize(
    ("stop", "parts", "expected"),
    [
        ("END", ["one END two"], "one "),
        ("END", ["one E", "N", "D two"], "one "),
        ("END", ["one E", "N", "OUGH"], "one ENOUGH"),
        ("END", ["one EN"], "one EN"),
        (["\n\n", "X"], ["a\n", "b\n", "\nc"], "a\nb"),
        (["b", "ab"], ["xab"], "x"),
        ("aab", ["aa", "aab", "c"], "aa"),
        ("", ["a"], "a"),
        ([None, ""], ["a"], "a"),
        (None, ["a"], "a"),
    ],
)
def test_stop_sequences_are_kept_to_here(stop: Any, parts: list[str], expected: str):
    events = read(*(text(part) for part in parts), USAGE, stop=stop)

    assert words_of(events) == expected
    assert deltas(events)[-1] == "stop"
    assert (
        whole(envelope({"message": {"content": "".join(parts)}, "finish_reason": "length"}), stop=stop)["choices"][0]["message"]["content"]
        == expected
    )


def test_behind_a_stop_nothing_is_said_but_what_it_cost():
    reader = reader_of(stop="END")
    stream = [text("one END two"), line("reasoning", reasoning="hm"), line("tool_use", id="a", name="f", input={}), text("three"), USAGE]
    assert deltas(read(*stream, reader=reader)) == [ROLE, {"content": "one "}, "stop"]
    assert reader.tokens == Tokens(9, 0, 0, 3)


@pytest.mark.parametrize("after", [line("error", message="It failed."), b""])
def test_behind_a_stop_nothing_can_fail(after: bytes):
    assert words_of(read(text("one END two"), after, stop="END")) == "one "


def test_a_text_that_was_held_back_comes_before_the_call_behind_it():
    events = read(text("one EN"), line("tool_use", id="a", name="f", input={}), USAGE, stop="END")
    assert [next(iter(one)) for one in deltas(events)[1:-1]] == ["content", "content", "tool_calls"]
    assert words_of(events) == "one EN"


def test_nothing_is_held_back_for_nothing():
    until = Until(["\nObservation:"])
    assert [until.feed("Thought"), until.feed("\nOb"), until.feed("ject"), until.rest()] == ["Thought", "", "\nObject", ""]


# Errors of three generations (3.9)


def gen3(message: str, code: str, **more: Any) -> dict[str, Any]:
    return {"error": message, "message": message, "code": code, **more}


def gen2(message: str, code: str, **more: Any) -> dict[str, Any]:
    return {"success": False, "error": {"$": "heyputer:api/APIError", "code": code, "message": message, **more}}


def failed(status: int, body: Any, headers: dict[str, str] | None = None, where: Target | None = None) -> UpstreamFailure:
    return PUTER.failure(where or target(), status, headers or {}, body if isinstance(body, bytes) else json.dumps(body).encode())


GENERATION_3 = [
    (400, "bad_request", "Model not found: x", "ModelGone", 404, "model_not_found"),
    (400, "bad_request", "each message must have a 'content' property", "InvalidAtUpstream", 400, "bad_request"),
    (400, "upstream_bad_request", "This model's maximum context length is 8 tokens.", "ContextLength", 400, "context_length_exceeded"),
    (400, "upstream_bad_request", "Invalid schema.", "InvalidAtUpstream", 400, "upstream_bad_request"),
    (400, "upstream_provider_unavailable", "The vendor is away.", "UpstreamServer", 502, "upstream_error"),
    (400, "upstream_failed", "All attempts failed.", "UpstreamServer", 502, "upstream_error"),
    (400, "client_bad_json", "Bad JSON.", "InvalidAtUpstream", 400, "client_bad_json"),
    (400, "client_aborted", "Aborted.", "InvalidAtUpstream", 400, "client_aborted"),
    (400, "client_bad_request", "Bad.", "InvalidAtUpstream", 400, "client_bad_request"),
    (400, "bad_response", "The vendor said nothing.", "UpstreamServer", 502, "upstream_error"),
    (401, "token_missing", "Missing token.", "CredentialRefused", 502, "upstream_auth_failed"),
    (401, "token_auth_failed", "Bad token.", "CredentialRefused", 502, "upstream_auth_failed"),
    (401, "token_expired", "Expired.", "CredentialRefused", 502, "upstream_auth_failed"),
    (401, "reauth_required", "Again.", "CredentialRefused", 502, "upstream_auth_failed"),
    (402, "insufficient_funds", "No usage left for request.", "OutOfCredit", 402, "insufficient_quota"),
    (402, "subscription_required", "Paid plans only.", "ForbiddenAtUpstream", 403, "subscription_required"),
    (403, "permission_denied", "Subscribers only.", "ForbiddenAtUpstream", 403, "permission_denied"),
    (403, "account_suspended", "Suspended.", "ForbiddenAtUpstream", 403, "account_suspended"),
    (403, "email_confirmation_required", "Confirm.", "ForbiddenAtUpstream", 403, "email_confirmation_required"),
    (404, "not_found", "Driver not found: puter-chat-completion:openrouter", "UpstreamProtocol", 502, "upstream_bad_response"),
    (429, "too_many_requests", "Too many requests.", "RateLimited", 429, "rate_limit_exceeded"),
    (429, "upstream_rate_limited", "The vendor limits.", "RateLimited", 429, "rate_limit_exceeded"),
    (500, "upstream_auth_failed", "Our key is bad.", "UpstreamServer", 502, "upstream_error"),
    (500, "internal_error", "Bug.", "UpstreamServer", 502, "upstream_error"),
    (503, "db_unavailable", "No database.", "Overloaded", 503, "overloaded"),
]


@pytest.mark.parametrize(("status", "code", "message", "kind", "seen_status", "seen_code"), GENERATION_3)
def test_the_third_generation(status: int, code: str, message: str, kind: str, seen_status: int, seen_code: str):
    problem = failed(status, gen3(message, code, attempts=[{"provider": "secret-route"}]))

    assert (type(problem).__name__, problem.status, problem.code) == (kind, seen_status, seen_code)
    assert problem.upstream_status == status
    assert "secret-route" not in problem.message


def test_moderation_is_the_contents_fault():
    problem = failed(400, gen3("Flagged.", "bad_request", errorCode="moderation_flagged"))
    assert (type(problem), problem.code) == (failures.ContentFiltered, "content_policy_violation")


def test_a_body_that_is_too_large_stays_413():
    assert failed(413, {"error": "Too large", "message": "Too large"}).status == 413


@pytest.mark.parametrize(
    ("status", "code", "message", "headers", "seconds"),
    [
        (429, "too_many_requests", "Too many requests.", {}, 10),
        (429, "too_many_requests", "Too many concurrent requests.", {}, 2),
        (429, "too_many_requests", "Too many requests.", {"retry-after": "7"}, 7),
        (429, "upstream_rate_limited", "The vendor limits.", {}, None),
        (503, "db_unavailable", "No database.", {"retry-after": "5"}, 5),
        (402, "insufficient_funds", "No usage left.", {}, None),
    ],
)
def test_how_long_to_wait(status: int, code: str, message: str, headers: dict[str, str], seconds: float | None):
    assert failed(status, gen3(message, code), headers).retry_after_seconds == seconds


@pytest.mark.parametrize(
    ("status", "code", "account"),
    [
        (402, "insufficient_funds", True),
        (429, "too_many_requests", True),
        (429, "upstream_rate_limited", False),
        (403, "account_suspended", True),
        (403, "permission_denied", False),
        (402, "subscription_required", False),
        (401, "token_expired", True),
        (400, "upstream_failed", False),
    ],
)
def test_what_is_about_the_account_and_what_about_the_model(status: int, code: str, account: bool):
    problem = failed(status, gen3("x", code))
    assert isinstance(problem, failures.UpstreamFailed)
    assert problem.whole_account is account


GENERATION_2 = [
    (gen2("Available funding is insufficient.", "insufficient_funds", status=402), "OutOfCredit", 402, "insufficient_quota"),
    (gen2("Available funding is insufficient.", "insufficient_funds"), "OutOfCredit", 402, "insufficient_quota"),
    (gen2("Field `model` is invalid.", "field_invalid", status=400), "ModelGone", 404, "model_not_found"),
    (gen2("Field `messages` is invalid.", "field_invalid", status=400), "InvalidAtUpstream", 400, "field_invalid"),
    (gen2("No implementation available.", "no_implementation_available", status=502), "UpstreamProtocol", 502, "upstream_bad_response"),
    (gen2("The vendor is away.", "upstream_provider_unavailable", status=400), "UpstreamServer", 502, "upstream_error"),
    (gen2("Too many.", "too_many_requests", status=429), "RateLimited", 429, "rate_limit_exceeded"),
    (gen2("Something of 2025.", "unheard_of"), "UpstreamServer", 502, "upstream_error"),
    (gen2("Something of 2025.", "unheard_of", status=403), "ForbiddenAtUpstream", 403, "unheard_of"),
    ({"success": False, "error": "no fallback model available"}, "UpstreamServer", 502, "upstream_error"),
    ({"success": False, "error": "Insufficient credit on this account."}, "OutOfCredit", 429, "insufficient_quota"),
    ({"success": False, "error": "Rate limit exceeded"}, "RateLimited", 429, "rate_limit_exceeded"),
    ({"success": False}, "UpstreamServer", 502, "upstream_error"),
    # How the first generation refused before the canned answers.
    (
        gen2(
            "Error 400 from delegate `usage-limited-chat`: Permission denied.",
            "error_400_from_delegate",
            status=400,
            delegate="usage-limited-chat",
        ),
        "OutOfCredit",
        429,
        "insufficient_quota",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "kind", "status", "code"), GENERATION_2)
def test_the_second_generation_fails_inside_a_200(body: dict[str, Any], kind: str, status: int, code: str, stream: bool):
    """Also where lines were expected."""
    with pytest.raises(UpstreamFailure) as refused:
        read(json.dumps(body).encode()) if stream else whole(body)

    problem = refused.value
    assert (type(problem).__name__, problem.status, problem.code) == (kind, status, code)


@pytest.mark.parametrize(
    "answer",
    [
        {**envelope({"message": {"content": [{"type": "text", "text": "You are out."}]}}), "metadata": {"usage_limited": True}},
        {**envelope({"message": {"content": "You are out."}}), "service": {"name": "usage-limited-chat"}},
        envelope({"message": {"content": "You are out."}}, "usage-limited-chat"),
        envelope({"message": {"content": [{"type": "text", "text": "You have reached your AI usage limit for this account."}]}}),
    ],
)
def test_the_first_generation_fails_inside_a_success(answer: dict[str, Any]):
    with pytest.raises(failures.OutOfCredit) as refused:
        whole(answer)

    problem = refused.value
    assert (problem.status, problem.type, problem.code, problem.should_retry) == (429, "insufficient_quota", "insufficient_quota", False)
    assert problem.whole_account
    assert "out" not in problem.message.split(), "the canned text is no answer"


def test_the_canned_text_in_a_stream_is_no_answer_either():
    with pytest.raises(failures.OutOfCredit):
        read(text("You have reached your AI usage limit for this account."), USAGE)
    quoted = [text("They say: "), text("You have reached your AI usage limit for this account."), USAGE]
    assert words_of(read(*quoted)).startswith("They say: You have")


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("No usage left for request.", "OutOfCredit"),
        ("Insufficient funds.", "OutOfCredit"),
        ("rate-limit reached", "RateLimited"),
        ("Error 429 from the vendor", "RateLimited"),
        ("The vendor failed.", "UpstreamServer"),
        ("", "UpstreamServer"),
    ],
)
def test_an_error_line_before_any_content_lets_another_account_be_tried(message: str, kind: str):
    reader = reader_of()
    with pytest.raises(UpstreamFailure) as refused:
        reader.feed(line("error", message=message))

    assert type(refused.value).__name__ == kind
    assert not reader.started


def test_an_error_line_after_content_breaks_the_stream_and_says_why():
    """Appendix A.4, with an error in place of the last line."""
    reader = reader_of()
    said = reader.feed(text("Hel") + line("error", message="No usage left for request."))

    assert b'"content":"Hel"' in said
    assert reader.failure is not None
    assert reader.failure.body() == {
        "error": {"message": "No usage left for request.", "type": "insufficient_quota", "param": None, "code": "insufficient_quota"}
    }
    assert isinstance(reader.failure.cause, failures.OutOfCredit), "the account is to rest"
    with pytest.raises(UpstreamBroke):
        reader.end()


def test_an_error_key_in_a_line_is_an_error_whatever_its_type():
    with pytest.raises(failures.OutOfCredit):
        reader_of().feed(line("text", text="x", error={"code": "insufficient_funds", "message": "No."}))


@pytest.mark.parametrize(
    ("status", "code"), [(401, "upstream_auth_failed"), (402, "insufficient_quota"), (404, "model_not_found"), (429, "rate_limit_exceeded")]
)
def test_a_page_is_told_by_its_status(status: int, code: str):
    assert failed(status, b"<html>no</html>").code == code


def test_a_404_that_says_something_is_about_the_driver():
    assert failed(404, {"error": "Not Found"}).code == "upstream_bad_response"


def test_the_callers_own_token_is_the_callers_to_mend_and_is_not_repeated():
    mine = target(callers_key=True)
    assert failed(401, gen3("Expired.", "token_expired"), where=mine).status == 401
    assert TOKEN not in failed(400, gen3(f"Bad token {TOKEN}.", "bad_request"), where=mine).message


def test_markup_in_an_error_is_not_shown():
    assert failed(500, {"error": "<script>x</script>", "code": "internal_error"}).message == "The upstream answered 500."


# Models and prices (3.8)

DEEPSEEK = {
    "id": "openrouter:deepseek/deepseek-chat",
    "provider": "openrouter",
    "name": "DeepSeek Chat (OpenRouter)",
    "aliases": ["deepseek/deepseek-chat", "openrouter/deepseek/deepseek-chat", "deepseek-chat"],
    "costs_currency": "usd-cents",
    "input_cost_key": "prompt",
    "output_cost_key": "completion",
    "costs": {"tokens": 1000000, "prompt": 28, "completion": 88, "request": 0},
}
HAIKU = {
    "id": "claude-haiku-4-5-20251001",
    "puterId": "anthropic:anthropic/claude-haiku-4-5",
    "provider": "claude",
    "costs_currency": "usd-cents",
    "input_cost_key": "input_tokens",
    "output_cost_key": "output_tokens",
    "costs": {
        "tokens": 1000000,
        "input_tokens": 100,
        "output_tokens": 500,
        "cache_read_input_tokens": 10,
        "ephemeral_5m_input_tokens": 125,
        "ephemeral_1h_input_tokens": 200,
    },
}


def listed(models: Any) -> dict[str, Any]:
    return PUTER.models(json.dumps(models).encode())


def test_the_list_is_asked_for_without_the_token():
    request = PUTER.models_request(target())
    assert request is not None
    assert (request.method, request.url) == ("GET", "https://api.puter.com/puterai/chat/models/details")
    assert TOKEN not in str(request.headers)


def test_models_go_by_the_name_that_puter_gives_them():
    assert listed({"models": [DEEPSEEK, HAIKU]}) == {DEEPSEEK["id"]: DEEPSEEK, HAIKU["puterId"]: HAIKU}


@pytest.mark.parametrize(
    "shape",
    [
        ["a/b", "c"],
        {"models": ["a/b", "c"]},
        {"success": True, "result": ["a/b", "c"]},
        {"success": True, "result": {"models": ["a/b", "c"]}},
    ],
)
def test_shapes_of_the_list(shape: Any):
    assert set(listed(shape)) == {"a/b", "c"}


def test_three_hundred_models_and_more():
    many = [{**DEEPSEEK, "id": f"openrouter:vendor-{n % 40}/model-{n}:free"} for n in range(350)]
    assert len(listed({"models": [*many, {"id": "fake"}, {"id": "costly"}, {"id": "abuse"}, {"name": "no id"}, 7, None]})) == 350


def test_of_several_routes_to_a_model_the_vendors_own_counts():
    resold = {**HAIKU, "provider": "openrouter"}
    assert listed({"models": [resold, HAIKU, resold]})[HAIKU["puterId"]]["provider"] == "claude"


@pytest.mark.parametrize("rubbish", [b"", b"<html>", b'{"models":{}}', b"7", b"[" * 50_000])
def test_a_list_that_is_none(rubbish: bytes):
    with pytest.raises(UpstreamProtocol):
        PUTER.models(rubbish)


def test_costs_become_prices():
    assert PUTER.price_of(DEEPSEEK) == Rates(280_000, 880_000)
    assert PUTER.price_of(HAIKU) == Rates(1_000_000, 5_000_000, 100_000, 1_250_000)


@pytest.mark.parametrize(
    ("costs", "rates"),
    [
        ({"tokens": 1000, "prompt": 0.028, "completion": 0.088}, Rates(280_000, 880_000)),
        ({"tokens": 1000000, "prompt": 0, "completion": 0}, Rates(0, 0)),
        ({"tokens": 1000000, "prompt": 30, "completion": 250, "thinking_tokens": 350}, Rates(300_000, 3_500_000)),
        ({"tokens": 1000000, "prompt": 28, "completion": 88, "input_cache_read": 2.8}, Rates(280_000, 880_000, 28_000)),
        ({"tokens": 1000000, "prompt": 28, "completion": 88, "request": 1}, None),
        ({"tokens": 0, "prompt": 28, "completion": 88}, None),
        ({"prompt": 28, "completion": 88}, None),
        ({"tokens": 1000000, "prompt": -1, "completion": 88}, None),
        ({"tokens": 1000000, "prompt": 28}, None),
        ({"tokens": 1000000, "prompt": "1e999999", "completion": 1}, None),
        ({"tokens": 1000000, "prompt": "NaN", "completion": 1}, None),
        (None, None),
    ],
)
def test_what_a_price_by_the_token_can_say(costs: Any, rates: Rates | None):
    assert PUTER.price_of({**DEEPSEEK, "costs": costs}) == rates


def test_the_allowance():
    request = PUTER.quota_request(target())
    assert request is not None
    assert request.url == "https://api.puter.com/metering/usage"
    said = {"usage": {}, "allowanceInfo": {"remaining": 15_000_000, "monthUsageAllowance": 25_000_000, "addons": {}}}
    assert PUTER.quota(json.dumps(said).encode()) == {"month": {"used": 0.1, "limit": 0.25, "unit": "USD"}}
    assert PUTER.quota_request(target(secret="")) is None
    with pytest.raises(UpstreamProtocol):
        PUTER.quota(b'{"allowanceInfo":null}')


# Settings


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("message_mode", "Full", "full"),
        ("provider", "openrouter", "openrouter"),
        ("full_keep_tools", "Yes", "yes"),
        ("standard_filler", "Go ON", "Go ON"),
    ],
)
def test_settings_that_are_known(name: str, given: str, kept: str):
    assert PUTER.setting_from(name, given) == kept


@pytest.mark.parametrize(("name", "given"), [("message_mode", "cooked"), ("provider", "openrouters"), ("require_usage_line", "perhaps")])
def test_settings_that_are_not(name: str, given: str):
    with pytest.raises(ValueError):
        PUTER.setting_from(name, given)
