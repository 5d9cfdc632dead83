"""The adapter for Gemini Code Assist, from bytes: each row of its mapping tables, and what others got wrong (protocol reference 2)."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers import failures
from providers.adapter import Ask, FirstCalls, Heard, Pause, Target
from providers.adapters.gemini_cli import MOST_REMEMBERED, POLL_SECONDS, GeminiCli, Names, remember, thinking_of
from providers.exchange import Outgoing
from providers.failures import ForbiddenAtUpstream, InvalidAtUpstream, UpstreamBroke, UpstreamFailure, UpstreamProtocol, UpstreamServer
from providers.price import Tokens
from providers.secrets import SecretText
from tests.upstreams.gemini import ACCOUNTS, BYPASS, FREE, SPENT, VALIDATION, envelope, frame, info, quota_failure, refusal, retry_info

HI: Any = [{"role": "user", "content": "hi"}]
EMPTY: dict[str, Any] = {"type": "object", "properties": {}}


def target(model: str = "gemini-2.5-pro", **settings: str) -> Target:
    settings = {"project_id": "my-project-123", **settings}
    return Target("gemini_cli", 1, "l", GeminiCli.base_url, SecretText("ya29.sim-secret"), model, f"gemini_cli/{model}", settings)


CALLERS = Target("gemini_cli", 1, "l", GeminiCli.base_url, SecretText("ya29.callers"), "m", "gemini_cli/m", {}, callers_key=True)


def ask(stream: bool = True, learned: dict[str, str] | None = None, **body: Any) -> Ask:
    return Ask(
        "chat/completions",
        {"messages": HI, **body},
        stream=stream,
        request_id="0198e2-aa",
        client_wants_usage=True,
        learned={} if learned is None else learned,
    )


def envelope_sent(model: str = "gemini-2.5-pro", learned: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
    sent: dict[str, Any] = json.loads(GeminiCli().request(ask(learned=learned, **body), target(model)).body)
    return sent


def sent(model: str = "gemini-2.5-pro", learned: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
    inner: dict[str, Any] = envelope_sent(model, learned, **body)["request"]
    return inner


def contents(*messages: Any, model: str = "gemini-2.5-pro", learned: dict[str, str] | None = None) -> list[Any]:
    found: list[Any] = sent(model, learned, messages=list(messages))["contents"]
    return found


def config(model: str = "gemini-2.5-pro", **body: Any) -> dict[str, Any]:
    found: dict[str, Any] = sent(model, **body).get("generationConfig", {})
    return {name: value for name, value in found.items() if name != "thinkingConfig"}


def refused(**body: Any) -> InvalidAtUpstream:
    with pytest.raises(InvalidAtUpstream) as caught:
        sent(**body)
    return caught.value


def called(call_id: str, name: str, arguments: Any = "{}", **extra: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}, **extra}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


# The envelope (2.2, 2.4)


def test_the_call_and_its_envelope() -> None:
    streamed = GeminiCli().request(ask(), target())
    whole = GeminiCli().request(ask(stream=False), target(user_agent="mine/1", api_version="v2x"))

    assert streamed.url == "https://cloudcode-pa.googleapis.com/v1internal:streamGenerateContent?alt=sse"
    assert whole.url == "https://cloudcode-pa.googleapis.com/v2x:generateContent"
    assert (streamed.headers["Authorization"], streamed.headers["Accept"]) == ("Bearer ya29.sim-secret", "text/event-stream")
    assert (whole.headers["User-Agent"], whole.headers["Accept"]) == ("mine/1", "application/json")
    assert json.loads(streamed.body) == {
        "model": "gemini-2.5-pro",
        "project": "my-project-123",
        "request": {
            "contents": [{"role": "user", "parts": [{"text": "hi"}]}],
            "generationConfig": {"thinkingConfig": {"includeThoughts": True}},
        },
    }


def test_a_model_may_have_another_name_there() -> None:
    assert envelope_sent("gemini-3.5-flash")["model"] == "gemini-3-flash"
    assert envelope_sent("gemini-99-unheard-of")["model"] == "gemini-99-unheard-of"


def test_a_projects_number_is_no_id() -> None:
    with pytest.raises(ForbiddenAtUpstream, match="number"):
        GeminiCli().request(ask(), target(project_id="123456"))


def test_safety_settings_only_where_the_operator_wants_them() -> None:
    assert "safetySettings" not in sent()
    body = json.loads(GeminiCli().request(ask(), target(safety_threshold="OFF")).body)
    assert body["request"]["safetySettings"][0]["category"] == "HARM_CATEGORY_HARASSMENT"
    assert {one["threshold"] for one in body["request"]["safetySettings"]} == {"OFF"}


# Messages (2.8)


def test_all_system_and_developer_messages_are_the_instruction_in_their_order() -> None:
    request = sent(
        messages=[
            {"role": "system", "content": "one"},
            {"role": "user", "content": "hi"},
            {"role": "developer", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "three"}]},
        ]
    )

    assert request["systemInstruction"] == {"role": "user", "parts": [{"text": "one"}, {"text": "two"}, {"text": "three"}]}
    assert request["contents"] == [{"role": "user", "parts": [{"text": "hi"}]}]


def test_a_conversation_of_system_messages_alone_is_one_user_turn() -> None:
    request = sent(messages=[{"role": "system", "content": "one"}, {"role": "system", "content": "two"}])

    assert request["contents"] == [{"role": "user", "parts": [{"text": "one"}, {"text": "two"}]}]
    assert "systemInstruction" not in request


def test_equal_roles_in_a_row_are_one_turn_and_empty_texts_none() -> None:
    assert contents(
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": ""}]},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "d"}]},
    ) == [{"role": "user", "parts": [{"text": "a"}, {"text": "b"}]}, {"role": "model", "parts": [{"text": "c"}, {"text": "d"}]}]


def test_thoughts_are_not_sent_back() -> None:
    assert "secret" not in json.dumps(contents(*HI, {"role": "assistant", "content": "c", "reasoning_content": "secret thoughts"}))


def test_the_results_of_tools_are_one_turn_in_the_order_of_the_calls() -> None:
    turns = contents(
        *HI,
        {"role": "assistant", "content": "I look.", "tool_calls": [called("a", "one", '{"q": 1}'), called("b", "two", "")]},
        {"role": "tool", "tool_call_id": "b", "content": '{"found": true}'},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "plain"}, {"type": "text", "text": " words"}]},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": None, "tool_calls": [called("a", "three")]},  # ids come again in some clients
        {"role": "tool", "tool_call_id": "a", "content": "{}"},
    )

    assert turns[1]["parts"] == [
        {"text": "I look."},
        {"functionCall": {"name": "one", "args": {"q": 1}}},
        {"functionCall": {"name": "two", "args": {}}},
    ]
    assert turns[2] == {
        "role": "user",
        "parts": [
            {"functionResponse": {"name": "one", "response": {"result": "plain words"}}},
            {"functionResponse": {"name": "two", "response": {"found": True}}},
            {"text": "and?"},
        ],
    }
    assert turns[4]["parts"] == [{"functionResponse": {"name": "three", "response": {}}}]


@pytest.mark.parametrize(("content", "response"), [("[1]", {"result": "[1]"}), ("", {"result": ""}), ("{broken", {"result": "{broken"})])
def test_a_result_that_is_no_object_becomes_one(content: str, response: dict[str, Any]) -> None:
    calls = {"role": "assistant", "tool_calls": [called("a", "one")]}
    assert contents(*HI, calls, {"role": "tool", "tool_call_id": "a", "content": content})[2]["parts"] == [
        {"functionResponse": {"name": "one", "response": response}}
    ]


def test_a_result_without_its_call_goes_by_its_own_name() -> None:
    result = {"role": "tool", "tool_call_id": "gone", "content": "x"}
    assert contents(*HI, {**result, "name": "one"})[0]["parts"][1] == {"functionResponse": {"name": "one", "response": {"result": "x"}}}
    assert refused(messages=[*HI, result]).param == "messages[1]"


@pytest.mark.parametrize(
    ("part", "inline"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD", "detail": "low"}}, ("image/png", "QUJD")),
        ({"type": "image_url", "image_url": "data:image/svg+xml;charset=utf-8;base64,QUJD"}, ("image/svg+xml", "QUJD")),
        ({"type": "image_url", "image_url": {"url": "data:text/plain,A%20b"}}, ("text/plain", base64.b64encode(b"A b").decode())),
        ({"type": "input_audio", "input_audio": {"data": "QUJD", "format": "mp3"}}, ("audio/mp3", "QUJD")),
        ({"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,QUJD"}}, ("application/pdf", "QUJD")),
        ({"type": "file", "file": {"filename": "Notes.TXT", "file_data": "QUJD"}}, ("text/plain", "QUJD")),
    ],
)
def test_images_sounds_and_files_are_inline_data(part: dict[str, Any], inline: tuple[str, str]) -> None:
    [content] = contents(user({"type": "text", "text": "what"}, part))
    assert content["parts"] == [{"text": "what"}, {"inlineData": {"mimeType": inline[0], "data": inline[1]}}]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": ""}],
        [{"role": "robot", "content": "x"}],
        [{"content": "x"}],
        [{"role": "function", "name": "f", "content": "x"}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": ["x"]}],
        [user({"type": "image_url", "image_url": None})],
        [user({"image_url": {"url": "https://example.org/a.png"}})],
        [user({"type": "text"})],
        [user({"type": "file", "file": {"file_id": "file-1"}})],
        [user({"type": "file", "file": {"filename": "a.unheard", "file_data": "QUJD"}})],
        [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}]}],
        [*HI, {"role": "assistant", "tool_calls": [called("a", "f", "[1]")]}],
        [*HI, {"role": "assistant", "tool_calls": [called("a", "f", "{broken")]}],
        [*HI, {"role": "assistant", "tool_calls": [{"id": "a"}]}],
        [*HI, {"role": "assistant", "tool_calls": 7}],
    ],
)
def test_messages_that_cannot_be_said_are_refused_with_their_place(messages: Any) -> None:
    problem = refused(messages=messages)
    assert (problem.status, problem.code) == (400, "invalid_value")
    assert str(problem.param).startswith("messages")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "image_url", "image_url": "https://example.org/a.png"},
        {"type": "video_url", "video_url": {"url": "x"}},
        {"type": "input_video", "input_video": {"data": "QUJD"}},
    ],
)
def test_what_it_cannot_look_at_is_refused_in_words(part: Any) -> None:
    problem = refused(messages=[user(part)])
    assert (problem.status, problem.code, problem.param) == (400, "unsupported_content", "messages[0]")


# Signatures (2.6)


def signed(call_id: str, signature: str) -> dict[str, Any]:
    return called(call_id, "f", extra_content={"google": {"thought_signature": signature}})


def signatures(model: str, *calls: Any, learned: dict[str, str] | None = None) -> list[Any]:
    results = [{"role": "tool", "tool_call_id": one["id"], "content": "x"} for one in calls]
    parts = contents(*HI, {"role": "assistant", "tool_calls": list(calls)}, *results, model=model, learned=learned)[1]["parts"]
    return [part.get("thoughtSignature") for part in parts]


@pytest.mark.parametrize("model", ["gemini-2.5-pro", "gemini-3-pro-preview"])
def test_a_signature_that_comes_back_is_sent(model: str) -> None:
    assert signatures(model, signed("a", "QUJD"), called("b", "f")) == ["QUJD", None]


def test_a_signature_that_the_client_dropped_is_remembered() -> None:
    learned: dict[str, str] = {}
    remember(learned, "a", "QUJD")
    assert signatures("gemini-3-pro-preview", called("a", "f"), called("b", "f"), learned=learned) == ["QUJD", None]


def test_a_signature_that_is_lost_is_bypassed_where_it_is_demanded() -> None:
    assert signatures("gemini-3-pro-preview", called("a", "f"), called("b", "f")) == [BYPASS, None]
    assert signatures("gemini-2.5-pro", called("a", "f"), called("b", "f")) == [None, None]
    assert signatures("gemini-3-pro-preview", {**called("a", "f"), "extra_content": {"google": {"thought_signature": 7}}}) == [BYPASS]
    assert signatures("gemini-3-pro-preview", {**called("a", "f"), "extra_content": "odd"}) == [BYPASS]


def test_no_more_is_remembered_than_has_room() -> None:
    learned = {"project": "p"}
    for number in range(MOST_REMEMBERED + 50):
        remember(learned, f"call_{number}", "QUJD")
    remember(learned, "long", "Q" * 100_000)

    assert len(learned) == MOST_REMEMBERED
    assert learned["project"] == "p"
    assert "signature call_0" not in learned
    assert f"signature call_{MOST_REMEMBERED + 49}" in learned
    assert "signature long" not in learned


# Parameters (2.8)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"temperature": 0, "top_p": 0.5, "top_k": 3}, {"temperature": 0, "topP": 0.5, "topK": 3}),
        ({"temperature": None, "stop": None, "n": 1}, {}),
        ({"max_tokens": 5}, {"maxOutputTokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 9}, {"maxOutputTokens": 9}),
        ({"max_tokens": 1_000_000}, {"maxOutputTokens": 65_536}),
        ({"stop": "END"}, {"stopSequences": ["END"]}),
        ({"stop": ["a", "b"]}, {"stopSequences": ["a", "b"]}),
        ({"seed": -5, "presence_penalty": 1, "frequency_penalty": 0.5}, {"seed": -5, "presencePenalty": 1, "frequencyPenalty": 0.5}),
        ({"presence_penalty": 0, "frequency_penalty": 0.0}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"responseMimeType": "application/json"}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": {"$ref": "#/x", "x": EMPTY}},
                }
            },
            {"responseMimeType": "application/json", "responseJsonSchema": {"$ref": "#/x", "x": EMPTY}},
        ),
        ({"modalities": ["text"]}, {}),
        ({"modalities": ["text", "image"]}, {"responseModalities": ["TEXT", "IMAGE"]}),
        # dropped, as the reference says
        ({"logprobs": True, "top_logprobs": 3, "user": "u", "metadata": {"a": "b"}, "store": True, "field_of_tomorrow": 1}, {}),
    ],
)
def test_each_parameter(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert config(**body) == expected


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"function_call": "auto"}, "function_call", "unsupported_parameter"),
        ({"audio": {"voice": "v"}}, "audio", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"modalities": 5}, "modalities", "invalid_value"),
        ({"web_search_options": {"user_location": None}}, "web_search_options", "unsupported_parameter"),
        ({"seed": 2**31}, "seed", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"reasoning_effort": "much"}, "reasoning_effort", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "unsupported_parameter"),
        ({"tools": [tool()], "tool_choice": "sometimes"}, "tool_choice", "unsupported_parameter"),
    ],
)
def test_what_would_be_answered_wrongly_is_refused(body: dict[str, Any], param: str, code: str) -> None:
    problem = refused(**body)
    assert (problem.status, problem.param, problem.code) == (400, param, code)


PRO, FLASH, LITE = "gemini-2.5-pro", "gemini-2.5-flash", "gemini-2.5-flash-lite"
THINKING = [
    (
        PRO,
        {None: None, "none": 128, "minimal": 512, "low": 1024, "medium": 8192, "high": 24576, "xhigh": 32768, "max": 32768, "auto": None},
    ),
    (FLASH, {None: None, "none": 0, "minimal": 512, "low": 1024, "medium": 8192, "high": 24576, "xhigh": 24576, "max": 24576}),
    (LITE, {None: None, "none": 0, "minimal": 512, "high": 24576}),
    ("gemini-3-pro-preview", {None: None, "none": "LOW", "minimal": "LOW", "low": "LOW", "medium": "LOW", "high": "HIGH", "max": "HIGH"}),
    ("gemini-3.1-pro-preview", {"none": "LOW", "minimal": "LOW", "low": "LOW", "medium": "MEDIUM", "high": "HIGH", "xhigh": "HIGH"}),
    ("gemini-3-flash-preview", {"none": "MINIMAL", "minimal": "MINIMAL", "low": "LOW", "medium": "MEDIUM", "high": "HIGH", "auto": None}),
    ("gemini-3.1-flash-lite", {"none": "MINIMAL", "medium": "MEDIUM"}),
    ("gemini-3.5-flash", {"none": "MINIMAL", "max": "HIGH"}),
]


@pytest.mark.parametrize(("model", "effort", "amount"), [(model, *one) for model, efforts in THINKING for one in efforts.items()])
def test_an_effort_is_a_budget_or_a_level_by_model_and_never_both(model: str, effort: str | None, amount: object) -> None:
    expected: dict[str, Any] = {"includeThoughts": effort != "none"}
    if amount is not None:
        expected["thinkingLevel" if isinstance(amount, str) else "thinkingBudget"] = amount
    assert thinking_of(model, effort) == expected


@pytest.mark.parametrize("model", ["gemma-4-31b-it", "gemini-2.0-flash", "gemini-2.5-flash-image"])
def test_a_model_that_does_not_think_is_not_told_to(model: str) -> None:
    assert thinking_of(model, None) == thinking_of(model, "none") == {}
    with pytest.raises(InvalidAtUpstream, match="does not reason"):
        thinking_of(model, "high")


# Tools (2.9)


def test_functions_are_declared_in_one_tool_with_plain_schemas() -> None:
    request = sent(tools=[tool(description="d", strict=True, parameters={"$schema": "x", **EMPTY}), tool(name="g")])

    assert request["tools"] == [
        {
            "functionDeclarations": [
                {"name": "f", "description": "d", "parametersJsonSchema": EMPTY},
                {"name": "g", "parametersJsonSchema": EMPTY},
            ]
        }
    ]
    assert "toolConfig" not in request
    assert "tools" not in sent(tools=[])


@pytest.mark.parametrize(
    ("choice", "mode"),
    [
        ("none", {"mode": "NONE"}),
        ("auto", {"mode": "AUTO"}),
        ("required", {"mode": "ANY"}),
        ({"type": "function", "function": {"name": "a b"}}, {"mode": "ANY", "allowedFunctionNames": ["a_b"]}),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "a b"}}]}},
            {"mode": "VALIDATED", "allowedFunctionNames": ["a_b"]},
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "function", "name": "f"}]}},
            {"mode": "ANY", "allowedFunctionNames": ["f"]},
        ),
    ],
)
def test_each_choice_of_tools(choice: Any, mode: dict[str, Any]) -> None:
    assert sent(tools=[tool(), tool(name="a b")], tool_choice=choice)["toolConfig"] == {"functionCallingConfig": mode}


def test_names_are_made_fit_kept_apart_and_given_back() -> None:
    given = ["a b", "a_b", "1st", "größe", "x" * 80, "x" * 70, "fine.name:v-1", ""]
    names = Names(given)
    sent_names = [names.sent(name) for name in given]

    assert sent_names == ["a_b_2", "a_b", "_1st", "gr__e", "x" * 64, "x" * 58 + "_2", "fine.name:v-1", "_"]
    assert [names.given(name) for name in sent_names] == given
    assert names.given("never_declared") == "never_declared"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "function", "name", "url", "image_url", "schema", "json_schema", "mode"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries(
                    {"role": st.sampled_from(["user", "assistant", "tool", "system"])},
                    optional=dict.fromkeys(("content", "tool_calls", "tool_call_id", "name"), JSON),
                ),
                max_size=3,
            )
        },
        optional={
            **dict.fromkeys(("tool_choice", "modalities", "reasoning_effort", "logit_bias", "seed", "presence_penalty", "audio"), JSON),
            "tools": st.lists(st.dictionaries(st.sampled_from(["type", "function"]), JSON), max_size=2),
            "response_format": st.dictionaries(st.sampled_from(["type", "json_schema"]), JSON),
        },
    )
)
def test_whatever_a_client_sends_is_a_request_or_its_own_mistake(body: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidAtUpstream, OverflowError, UnicodeEncodeError):
        GeminiCli().request(ask(**body), target())


# Answers (2.5, 2.10)


def read(*frames: bytes, target_: Target | None = None, **body: Any) -> tuple[list[dict[str, Any]], Any]:
    """The events of a stream, and its reader."""
    reader = GeminiCli().reader(ask(**body), target_ or target())
    said = b"".join(reader.feed(one) for one in frames) + reader.end()
    assert said.endswith(b"data: [DONE]\n\n")
    return [json.loads(one[6:]) for one in said.split(b"\n\n")[:-2]], reader


def whole(*parts: Any, body: dict[str, Any] | None = None, **about: Any) -> dict[str, Any]:
    """The choice of a whole answer."""
    raw = json.dumps(envelope("r", parts, finish=about.pop("finish", "STOP"), usage=about.pop("usage", None)), indent=2).encode()
    answer = GeminiCli().answer(ask(stream=False, **(body or {})), target(), raw, "application/json")
    choice: dict[str, Any] = json.loads(answer.body)["choices"][0]
    return choice


def part(*parts: Any, finish: str | None = None, usage: Any = None) -> bytes:
    return frame(envelope("r", parts, finish=finish, usage=usage))


def deltas(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [choice["delta"] for event in events for choice in event["choices"]]


def reasons(events: Sequence[dict[str, Any]]) -> list[str]:
    return [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]


STOP = part({"text": ""}, finish="STOP")


def test_several_parts_of_one_frame_are_all_said_in_order() -> None:
    events, _ = read(part({"thought": True, "text": "hm"}, {"text": "a"}, {"text": "b"}, {"text": "c"}), STOP)

    assert deltas(events) == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"content": "a"},
        {"content": "b"},
        {"content": "c"},
        {},
    ]


def test_a_finish_reason_comes_once_at_the_end_even_where_each_frame_has_one() -> None:
    """Some models say STOP in every frame: what follows the first belongs to the answer, too."""
    events, _ = read(part({"text": "a"}, finish="STOP"), part({"text": "b"}, finish="STOP"), part({"text": "c"}, finish="MAX_TOKENS"))

    assert "".join(delta.get("content", "") for delta in deltas(events)) == "abc"
    assert reasons(events) == ["length"]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("stop_later", [False, True])
def test_parallel_calls_have_indexes_and_ids_of_their_own(apart: bool, stop_later: bool) -> None:
    """STOP may come in a later, empty frame; the arguments may be missing; the upstream's own ids are not relied upon."""
    calls = [
        {"functionCall": {"name": "f", "args": {"q": 1}, "id": "x"}, "thoughtSignature": "QUJD"},
        {"functionCall": {"name": "g", "id": "x"}},
    ]
    frames = [part(one) for one in calls] if apart else [part(*calls)]
    if stop_later:
        frames.append(STOP)
    else:
        frames[-1] = part(*(calls[1:] if apart else calls), finish="STOP")
    learned: dict[str, str] = {}
    events, _ = read(*frames, learned=learned)
    said = [one for delta in deltas(events) for one in delta.get("tool_calls", ())]

    assert [(one["index"], one["type"], one["function"]) for one in said] == [
        (0, "function", {"name": "f", "arguments": '{"q":1}'}),
        (1, "function", {"name": "g", "arguments": "{}"}),
    ]
    assert len({one["id"] for one in said}) == 2
    assert all(one["id"].startswith("call_") and len(one["id"]) <= 40 for one in said)
    assert [one.get("extra_content") for one in said] == [{"google": {"thought_signature": "QUJD"}}, None]
    assert reasons(events) == ["tool_calls"]
    assert list(learned.values()) == ["QUJD"]
    choice = whole(*calls)
    assert [one["function"]["name"] for one in choice["message"]["tool_calls"]] == ["f", "g"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)


def test_calls_bear_the_names_that_the_client_gave() -> None:
    choice = whole({"functionCall": {"name": "a_b"}}, body={"tools": [tool(name="a b")]})
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "a b"


def test_only_the_first_call_where_the_client_wants_one_at_a_time() -> None:
    calls = [{"functionCall": {"name": "f"}}, {"functionCall": {"name": "g"}}]
    assert len(whole(*calls, body={"parallel_tool_calls": False})["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        *(
            (one, "content_filter")
            for one in ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "MODEL_ARMOR")
        ),
        *((one, "content_filter") for one in ("IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION")),
        *((one, "stop") for one in ("OTHER", "FINISH_REASON_UNSPECIFIED", "NO_IMAGE", "REASON_OF_TOMORROW", "MALFORMED_FUNCTION_CALL")),
    ],
)
def test_each_finish_reason(finish: str, reason: str) -> None:
    assert reasons(read(part({"text": "a"}, finish=finish))[0]) == [reason]
    assert whole({"text": "a"}, finish=finish)["finish_reason"] == reason


@pytest.mark.parametrize(("finish", "reason"), [("MAX_TOKENS", "length"), ("SAFETY", "content_filter")])
def test_an_answer_may_end_before_it_said_anything(finish: str, reason: str) -> None:
    """Thoughts may use up all tokens; a candidate that was refused has no content."""
    refused_candidate = frame({"response": {"candidates": [{"finishReason": finish, "safetyRatings": []}]}})
    assert reasons(read(refused_candidate)[0]) == [reason]
    assert reasons(read(part({"thought": True, "text": "hm"}, finish=finish))[0]) == [reason]
    assert whole({"thought": True, "text": "hm"}, finish=finish)["message"]["content"] == ""


def test_a_refused_prompt_is_a_filtered_answer() -> None:
    blocked = {"response": {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT", "safetyRatings": []}}}
    assert reasons(read(frame(blocked))[0]) == ["content_filter"]
    answer = GeminiCli().answer(ask(stream=False), target(), json.dumps(blocked).encode(), "application/json")
    [choice] = json.loads(answer.body)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("content_filter", "")


@pytest.mark.parametrize("finish", ["MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS"])
def test_a_broken_tool_call_is_tried_elsewhere_while_nothing_was_said(finish: str) -> None:
    with pytest.raises(UpstreamServer):
        read(part({"text": ""}, finish=finish))
    with pytest.raises(UpstreamServer):
        whole({"thought": True, "text": "hm"}, finish=finish)
    assert reasons(read(part({"thought": True, "text": "hm"}, finish=finish))[0]) == ["stop"]


def test_an_empty_answer_is_none_except_right_after_a_tool() -> None:
    with pytest.raises(UpstreamProtocol, match="empty"):
        read(STOP)
    calls = {"role": "assistant", "tool_calls": [called("a", "f")]}
    after_tool = [*HI, calls, {"role": "tool", "tool_call_id": "a", "content": "x"}]
    assert reasons(read(STOP, messages=after_tool)[0]) == ["stop"]


@pytest.mark.parametrize(
    ("counted", "tokens"),
    [
        ({"trafficType": "ON_DEMAND"}, None),
        ({"promptTokenCount": 10, "candidatesTokenCount": 17, "totalTokenCount": 51, "thoughtsTokenCount": 24}, Tokens(10, 0, 0, 17, 24)),
        ({"promptTokenCount": 10, "cachedContentTokenCount": 4, "candidatesTokenCount": 1}, Tokens(6, 4, 0, 1, 0)),
        ({"promptTokenCount": 10, "toolUsePromptTokenCount": 5, "candidatesTokenCount": 1}, Tokens(15, 0, 0, 1, 0)),
        ({"promptTokenCount": 10, "totalTokenCount": 18, "thoughtsTokenCount": 3}, Tokens(10, 0, 0, 5, 3)),
        ({"promptTokenCount": 10, "cachedContentTokenCount": 40}, Tokens(0, 10, 0, 0, 0)),
        ({"promptTokenCount": "many", "candidatesTokenCount": -5, "thoughtsTokenCount": 10**30}, Tokens(0, 0, 0, 0, 10**12)),
    ],
)
def test_tokens_are_disjoint_parts(counted: dict[str, Any], tokens: Tokens | None) -> None:
    events, reader = read(part({"text": "a"}, usage=counted), STOP)
    assert reader.tokens == tokens
    said = events[-1]["usage"]["total_tokens"]
    assert said == tokens.total if tokens else said > 0  # what nobody counted is an estimate


def test_the_last_count_is_kept_and_usage_comes_once() -> None:
    events, reader = read(
        part({"text": "a"}, usage={"promptTokenCount": 10, "candidatesTokenCount": 1}),
        part({"text": "b"}, usage={"promptTokenCount": 10, "candidatesTokenCount": 2}),
        part(finish="STOP", usage={"trafficType": "ON_DEMAND"}),
    )
    assert reader.tokens == Tokens(10, 0, 0, 2, 0)
    assert [event["usage"]["completion_tokens"] for event in events if event["usage"]] == [2]


def test_other_parts_are_shown_or_passed_over() -> None:
    image = {"inlineData": {"mimeType": "image/png", "data": "QUJD"}}
    code = {"executableCode": {"language": "PYTHON", "code": "print(1)"}}
    result = {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "1"}}
    unknown = [{"partOfTomorrow": {"a": 1}}, {"text": "", "thoughtSignature": "QUJD"}, {"fileData": {"fileUri": "x"}}]
    choice = whole({"text": "see"}, code, result, image, *unknown)
    events, _ = read(part({"text": "see"}, image, *unknown), part(image, finish="STOP"))
    shown = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}

    assert choice["message"]["content"] == "see\n```python\nprint(1)\n```\n\n```\n1\n```\n"
    assert choice["message"]["images"] == [shown]
    assert [delta["images"] for delta in deltas(events) if "images" in delta] == [[shown], [shown]]


def test_grounding_and_other_companions_of_an_answer_do_not_disturb_it() -> None:
    said = envelope("r", [{"text": "a"}], finish="STOP")
    said["response"]["candidates"][0]["groundingMetadata"] = {"webSearchQueries": ["x"], "groundingChunks": [{"web": {"uri": "https://x"}}]}
    said["remainingCredits"] = [{"creditType": "GOOGLE_ONE_AI", "creditAmount": "990"}]
    assert reasons(read(frame({"traceId": "t"}), frame({"traceId": "t"}), frame({"traceId": "t"}), frame(said))[0]) == ["stop"]


STREAM = part({"thought": True, "text": "hm"}) + part({"text": "grüße 👋"}) + part({"text": "b"}, finish="STOP")


@pytest.mark.parametrize(
    "stream",
    [
        STREAM,
        STREAM.replace(b"\r\n", b"\n"),
        STREAM.replace(b"data: ", b"data:"),
        STREAM.replace(b"data: ", b": comment\r\ndata: "),
        STREAM.rstrip(),
        STREAM.replace(b',"', b',\r\ndata: "'),  # a pretty-printed object over several lines
        STREAM.replace(b"\r\n\r\n", b"\r\n\r\ndata: {broken\r\n\r\n", 1),
        b"[" + STREAM.replace(b"data: ", b"").strip().replace(b"\r\n\r\n", b",\r\n") + b"]",  # what comes without `alt=sse`
    ],
    ids=["crlf", "lf", "no space", "comments", "no end", "many lines", "bad frame", "array"],
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_reads_the_same_in_every_form_and_however_it_is_cut(stream: bytes, size: int) -> None:
    events, _ = read(*(stream[at : at + size] for at in range(0, len(stream), size)))

    assert [delta for delta in deltas(events) if delta][1:] == [{"reasoning_content": "hm"}, {"content": "grüße 👋"}, {"content": "b"}]
    assert reasons(events) == ["stop"]


def test_a_stream_without_a_reason_was_cut_off() -> None:
    with pytest.raises(UpstreamBroke):
        read(part({"text": "a"}))
    with pytest.raises(UpstreamProtocol):
        read(frame({"response": {}}))


@pytest.mark.parametrize("in_array", [False, True])
def test_an_error_inside_a_stream_is_one(in_array: bool) -> None:
    error = {"error": {"code": 429, "message": "slow down", "status": "RESOURCE_EXHAUSTED", "details": [retry_info("9s")]}}
    first = frame([error] if in_array else error)
    with pytest.raises(failures.RateLimited) as caught:
        read(first)
    assert (caught.value.upstream_status, caught.value.retry_after_seconds) == (429, 9)
    with pytest.raises(UpstreamBroke, match="slow down"):
        read(part({"text": "a"}), first)


# Errors (2.11)


def failed(scenario: str) -> UpstreamFailure:
    problem = refusal(scenario)
    assert problem is not None
    return GeminiCli().failure(target(), problem.code, {}, json.dumps(problem.body).encode())


def said(status: int, *details: Any, message: str = "words", google: str = "RESOURCE_EXHAUSTED", **headers: str) -> UpstreamFailure:
    body = {"error": {"code": status, "message": message, "status": google, "details": list(details)}}
    return GeminiCli().failure(
        target(), status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode()
    )


@pytest.mark.parametrize(
    ("scenario", "kind", "seconds"),
    [
        ("401", "CredentialRefused", None),
        ("403", "ForbiddenAtUpstream", None),
        ("404", "ModelNotHere", None),
        ("429-delay", "RateLimited", 0.847655010),
        ("429-12s", "RateLimited", 12),
        ("429-daily", "OutOfCredit", 31447.2),
        ("429-metadata", "OutOfCredit", 31447.2),
        ("429-timestamp", "OutOfCredit", 7200),
        ("429-text", "OutOfCredit", 31447),
        ("429-per-day", "OutOfCredit", None),
        ("429-per-minute", "RateLimited", 60),
        ("429-credits", "OutOfCredit", None),
        ("429-limit0", "OutOfCredit", None),
        ("429-bare", "RateLimited", None),
        ("429-array", "RateLimited", 7),
        ("429-nested", "RateLimited", 7),
        ("429-capacity", "Overloaded", 3),
        ("503-capacity", "Overloaded", 3),
        ("400", "InvalidAtUpstream", None),
        ("400-context", "ContextLength", None),
        ("400-location", "ForbiddenAtUpstream", None),
        ("499", "UpstreamServer", None),
        ("500", "UpstreamServer", None),
        ("503", "Overloaded", None),
    ],
)
def test_each_signal_means_one_thing(scenario: str, kind: str, seconds: float | None) -> None:
    problem = failed(scenario)

    assert type(problem) is getattr(failures, kind)
    assert problem.retry_after_seconds == (None if seconds is None else pytest.approx(seconds, abs=2 if "timestamp" in scenario else 0.001))
    assert problem.upstream_status == int(scenario[:3])
    assert problem.message
    assert "{" not in problem.message


def test_a_limit_rests_a_model_and_a_closed_account_all_of_them() -> None:
    about_one_model = ["403", "404", "429-delay", "429-daily", "429-per-day", "429-credits", "503"]
    about_the_account = ["401", "403-disabled", "403-validate", "403-licence", "400-location"]
    assert {getattr(failed(one), "whole_account", False) for one in about_one_model} == {False}
    assert {getattr(failed(one), "whole_account", False) for one in about_the_account} == {True}


@pytest.mark.parametrize(
    ("details", "message", "headers", "seconds"),
    [
        ([retry_info("373.801628ms")], "", {}, 0.373801628),
        ([retry_info("1h16m0.6s")], "", {}, 4560.6),
        ([retry_info("2s"), info("RATE_LIMIT_EXCEEDED", quotaResetDelay="9s")], "Please retry in 7s.", {"retry_after": "5"}, 2),
        ([info("RATE_LIMIT_EXCEEDED", quotaResetDelay="9s")], "Please retry in 7s.", {"retry_after": "5"}, 9),
        ([], "Please retry in 12.3s.", {"retry_after": "5"}, 12.3),
        ([], "Please retry in 900ms", {}, 0.9),
        ([], "Your quota will reset after 44m7s.", {}, 2647),
        ([], "", {"retry_after": "5"}, 5),
        ([retry_info("soon"), retry_info("1s")], "", {}, None),
        ([retry_info("99999999999h")], "", {}, None),
        ([info("RATE_LIMIT_EXCEEDED", quotaResetTimeStamp="tomorrow")], "", {}, None),
        ([info("RATE_LIMIT_EXCEEDED", quotaResetTimeStamp="2020-01-01T00:00:00Z")], "", {}, 0),
    ],
)
def test_a_wait_is_read_from_the_most_trustworthy_place(details: Any, message: str, headers: Any, seconds: float | None) -> None:
    assert said(429, *details, message=message, **headers).retry_after_seconds == (None if seconds is None else pytest.approx(seconds))


def test_what_is_spent_for_the_day_does_not_come_back_in_a_second() -> None:
    spent = said(429, info("QUOTA_EXHAUSTED"), retry_info("0.5s"))
    daily = said(429, quota_failure("RequestsPerDay"), retry_info("2s"), info("RATE_LIMIT_EXCEEDED", quotaResetDelay="5h"))
    limit = said(429, info("RATE_LIMIT_EXCEEDED", quota_limit="RequestsPerMinutePerUser"))

    assert (spent.code, spent.retry_after_seconds) == ("insufficient_quota", None)
    assert (daily.code, daily.retry_after_seconds) == ("insufficient_quota", 18000)
    assert (limit.code, limit.retry_after_seconds) == ("rate_limit_exceeded", 60)


def test_a_wait_of_hours_is_a_spent_quota_unless_google_calls_it_a_rate() -> None:
    assert said(429, message=SPENT).code == "insufficient_quota"
    assert said(429, info("RATE_LIMIT_EXCEEDED"), retry_info("400s")).code == "rate_limit_exceeded"


def test_an_account_that_must_be_mended_says_how() -> None:
    assert "https://console.developers.google.com/" in failed("403-disabled").message
    assert VALIDATION in failed("403-validate").message
    link = said(403, info("VALIDATION_REQUIRED", validation_link="https://accounts.google.com/x"))
    assert "https://accounts.google.com/x" in link.message
    assert "javascript" not in said(403, info("VALIDATION_REQUIRED", validation_link="javascript:alert(1)")).message
    assert said(403, info("UNSUPPORTED_CLIENT")).code == "unsupported_client"
    assert said(403, info("SECURITY_POLICY_VIOLATED")).code == "security_policy"


def test_a_project_that_is_wrong_is_unlearned() -> None:
    assert said(403, info("CONSUMER_INVALID")).unlearn
    assert said(403, message="Permission denied on resource project default.").unlearn
    assert not said(403).unlearn
    assert not failed("429-daily").unlearn


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>no</html>",
        b"[]",
        b"[[]]",
        b"7",
        b'{"error":"words"}',
        b'{"error":{"details":7,"message":7,"status":"<b>"}}',
        b'{"error":{"details":[{"@type":"x.google.rpc.QuotaFailure","violations":7},{"@type":"x.google.rpc.Help","links":[7]}]}}',
        b'{"error":{"details":[{"@type":"x.google.rpc.ErrorInfo","reason":7,"metadata":7},7]}}',
        b'{"error":{"message":"{\\"error\\":"}}',
        b'{"error":{"message":"[[[["}}',
        b"[" * 50_000,
    ],
)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 503])
def test_rubbish_in_an_error_is_told_by_its_status(body: bytes, status: int) -> None:
    problem = GeminiCli().failure(target(), status, {}, body)
    assert problem.upstream_status == status
    assert problem.message
    assert not any(letter in problem.message for letter in "<{[")


def test_an_errors_text_is_cleaned_and_the_callers_key_taken_out() -> None:
    long = said(500, message="a\nb ya29.abcdefghijklmnop " + "x" * 2000, google="INTERNAL")
    assert "ya29.a" not in long.message
    assert len(long.message) <= 500
    body = json.dumps({"error": {"message": "bad token ya29.callers!", "status": "X"}}).encode()
    for status in (403, 404, 429, 500):
        assert "ya29.callers" not in GeminiCli().failure(CALLERS, status, {}, body).message
    assert GeminiCli().failure(CALLERS, 401, {}, body).status == 401


# Onboarding (2.3)


def onboard(*answers: Any, ask_: Ask | None = None, to: Target | None = None) -> tuple[Outgoing, list[Outgoing | Pause]]:
    """Play a first call's answers; the call itself, and what was yielded before it."""
    calls = GeminiCli().first_calls(ask_ or ask(), to or target(project_id=""))
    assert calls is not None
    return play(calls, *answers)


def play(calls: FirstCalls, *answers: Any) -> tuple[Outgoing, list[Outgoing | Pause]]:
    yielded: list[Outgoing | Pause] = [next(calls)]
    left = list(answers)
    try:
        while True:
            if isinstance(yielded[-1], Pause):
                yielded.append(next(calls))
                continue
            status, body = left.pop(0) if isinstance(left[0], tuple) else (200, left.pop(0))
            yielded.append(calls.send(Heard(status, {}, body if isinstance(body, bytes) else json.dumps(body).encode())))
    except StopIteration as end:
        assert left == []
        return end.value, yielded


def test_a_given_project_needs_no_call_and_a_found_one_is_kept() -> None:
    assert GeminiCli().first_calls(ask(), target()) is None
    asked = ask()
    call, [load] = onboard(ACCOUNTS["paid"].load, ask_=asked)

    assert isinstance(load, Outgoing)
    assert load.path == "/v1internal:loadCodeAssist"
    assert json.loads(load.body) == {"metadata": {"ideType": "IDE_UNSPECIFIED", "platform": "PLATFORM_UNSPECIFIED", "pluginType": "GEMINI"}}
    assert json.loads(call.body)["project"] == "sim-project-1"
    assert asked.learned == {"project": "sim-project-1"}
    assert GeminiCli().first_calls(asked, target(project_id="")) is None
    assert json.loads(GeminiCli().request(asked, target(project_id="")).body)["project"] == "sim-project-1"


def test_a_callers_own_key_has_a_project_of_its_own() -> None:
    asked = ask(learned={"project": "ours"})
    call, _ = onboard(ACCOUNTS["paid"].load, ask_=asked, to=CALLERS)

    assert json.loads(call.body)["project"] == "sim-project-1"
    assert asked.learned == {"project": "ours"}


def test_a_new_account_is_set_up_and_asked_after() -> None:
    pending = {"name": "operations/acf.p2-1-sim", "done": False}
    done = {"name": "operations/acf.p2-1-sim", "done": True, "response": {"cloudaicompanionProject": {"id": "mine"}}}
    call, [_load, begin, *rest] = onboard({"allowedTiers": [{"id": "standard-tier"}, FREE]}, pending, pending, done)

    assert isinstance(begin, Outgoing)
    assert json.loads(begin.body)["tierId"] == "free-tier"
    assert "cloudaicompanionProject" not in json.loads(begin.body)
    assert [one.seconds for one in rest if isinstance(one, Pause)] == list(POLL_SECONDS[:2])
    assert [(one.method, one.path) for one in rest if isinstance(one, Outgoing)] == [("GET", "/v1internal/operations/acf.p2-1-sim")] * 2
    assert json.loads(call.body)["project"] == "mine"


def test_setting_up_ends_after_a_minute() -> None:
    pending = {"name": "operations/x", "done": False}
    with pytest.raises(failures.UpstreamTimeout):
        onboard({"allowedTiers": [FREE]}, *[pending] * 50)
    assert 45 <= sum(POLL_SECONDS) <= 60


@pytest.mark.parametrize(
    ("answers", "kind", "words"),
    [
        ([ACCOUNTS["unsupported"].load], "ForbiddenAtUpstream", "UNSUPPORTED_CLIENT"),
        ([ACCOUNTS["validate"].load], "ForbiddenAtUpstream", VALIDATION),
        ([{**ACCOUNTS["validate"].load, "allowedTiers": [FREE]}], "ForbiddenAtUpstream", VALIDATION),
        ([ACCOUNTS["too-young"].load], "ForbiddenAtUpstream", "18 or older"),
        ([ACCOUNTS["new-standard"].load], "ForbiddenAtUpstream", "project_id"),
        ([{"currentTier": {"id": "x"}, "cloudaicompanionProject": 7}], "ForbiddenAtUpstream", "project_id"),
        ([{"allowedTiers": [FREE]}, {"done": True, "response": 7}], "ForbiddenAtUpstream", "project_id"),
        ([{"allowedTiers": [FREE]}, {"done": False}], "UpstreamProtocol", "set-up"),
        ([{"allowedTiers": [FREE]}, {"done": False, "name": "x HTTP/1.1\r\nHost: y"}], "UpstreamProtocol", "set-up"),
        ([{"allowedTiers": [FREE]}, {"done": False, "name": "../v1internal:x"}], "UpstreamProtocol", "set-up"),
        ([{"allowedTiers": [FREE]}, {"done": True, "error": {"code": 13, "message": "no room"}}], "UpstreamServer", "no room"),
        (
            [(400, {"error": {"message": "Precondition check failed.", "status": "FAILED_PRECONDITION"}})],
            "ForbiddenAtUpstream",
            "Precondition",
        ),
        ([(404, b"<html>")], "ForbiddenAtUpstream", "could not be set up"),
        ([(401, b"")], "CredentialRefused", "credential"),
        ([(403, {"error": {"message": "m", "details": [info("SECURITY_POLICY_VIOLATED")]}})], "ForbiddenAtUpstream", "policy"),
        ([(429, b"")], "RateLimited", ""),
        ([(503, b"")], "Overloaded", ""),
        ([b"<html>"], "UpstreamProtocol", "could not be read"),
        ([b"[]"], "UpstreamProtocol", "could not be read"),
    ],
)
def test_an_account_that_cannot_be_set_up_is_never_the_clients_mistake(answers: list[Any], kind: str, words: str) -> None:
    asked = ask()
    with pytest.raises(UpstreamFailure) as caught:
        onboard(*answers, ask_=asked)

    assert type(caught.value) is getattr(failures, kind)
    assert words in caught.value.message
    assert asked.learned == {}


# Models and quota


def test_the_list_of_models_needs_no_call() -> None:
    assert GeminiCli().models_request(target()) is None
    listed = GeminiCli().listed()
    assert listed["gemini-2.5-pro"] == {"owned_by": "google", "context_length": 1_048_576, "max_output_tokens": 65_536}
    assert "max_output_tokens" not in listed["gemma-4-31b-it"]


def test_what_is_left_of_the_quota() -> None:
    call = GeminiCli().quota_request(target())
    assert call is not None
    assert (call.path, json.loads(call.body)) == ("/v1internal:retrieveUserQuota", {"project": "my-project-123"})
    assert GeminiCli().quota_request(target(project_id="")) is None
    bucket = {"remainingAmount": "812", "remainingFraction": 0.8120, "resetTime": "2026-01-02T00:00:00Z", "modelId": "m"}
    assert GeminiCli().quota(json.dumps({"buckets": [bucket, {"remainingFraction": 1}, {"modelId": "n"}]}).encode()) == {
        "m": {"resets_at": "2026-01-02T00:00:00Z", "limit": 1000, "used": 188},
        "n": {"resets_at": None},
    }
    assert GeminiCli().quota(b"{}") == {}
    for rubbish in (b"<html>", b"[]", b'{"buckets":[7]}', b'{"buckets":[{"modelId":"m","remainingAmount":"x","remainingFraction":1}]}'):
        with pytest.raises(UpstreamProtocol):
            GeminiCli().quota(rubbish)


# Signing in (2.1)

CLIENT = {"client_id": "id", "client_secret": "secret", "token_url": "https://example.org/token"}


def test_signing_in_goes_by_the_operators_own_client() -> None:
    sign_in = GeminiCli().sign_in(CLIENT)

    assert sign_in is not None
    assert (sign_in.flow, sign_in.client_id, sign_in.client_secret, sign_in.token_url) == ("code", *CLIENT.values())
    assert sign_in.authorize_url == "https://accounts.google.com/o/oauth2/v2/auth"
    assert sign_in.redirect_uri == "https://codeassist.google.com/authcode"
    assert sign_in.more == {"access_type": "offline", "prompt": "consent"}
    assert sign_in.refresh_statuses_dead == {400}
    assert len(sign_in.scopes) == 3
    loopback = GeminiCli().sign_in({**CLIENT, "redirect_uri": "http://127.0.0.1:8085/oauth2callback", "authorize_url": "http://x/auth"})
    assert loopback is not None
    assert (loopback.redirect_uri, loopback.authorize_url) == ("http://127.0.0.1:8085/oauth2callback", "http://x/auth")


@pytest.mark.parametrize("missing", CLIENT)
def test_a_setting_that_is_missing_is_named(missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        GeminiCli().sign_in({name: value for name, value in CLIENT.items() if name != missing})


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A time without a zone is UTC, wherever the server stands."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


TOKENS = {"access_token": "ya29.a", "refresh_token": "1//r", "token_type": "Bearer"}
NEW_YEAR = 1767225600.0


@pytest.mark.parametrize(
    ("file", "expires_at", "facts"),
    [
        ({**TOKENS, "scope": "s", "id_token": "x", "expiry_date": 1767225600000}, NEW_YEAR, {}),
        ({**TOKENS, "expiry": "2026-01-01T00:00:00Z"}, NEW_YEAR, {}),
        (
            {"prefix": "p", "project_id": "p-1", "token": {**TOKENS, "expiry": "2026-01-01T01:00:00+01:00", "expires_in": 3599}},
            NEW_YEAR,
            {"project_id": "p-1"},
        ),
        (
            {
                "token": {**TOKENS, "expiry": "2026-01-01T00:00:00.123456789Z"},
                "project_id": "p-1, p-2",
                "email": "a@example.org",
                "type": "gemini",
            },
            NEW_YEAR + 0.123456,
            {"project_id": "p-1", "email": "a@example.org"},
        ),
        ({"token": "ya29.a", "refresh_token": "1//r", "client_id": "c", "expiry": "2026-01-01T00:00:00"}, NEW_YEAR, {}),
        ({**TOKENS, "expires_in": 3599}, None, {}),
        ({**TOKENS, "expiry": "soon"}, None, {}),
    ],
)
def test_the_credential_files_of_the_cli_and_of_other_gateways_are_read(
    file: Any, expires_at: float | None, facts: dict[str, str], in_tokyo: None
) -> None:
    tokens = GeminiCli().tokens_from(json.dumps(file, indent=2))

    assert tokens is not None
    assert (tokens.access, tokens.refresh) == ("ya29.a", "1//r")
    assert tokens.expires_at == (None if expires_at is None else pytest.approx(expires_at))
    assert tokens.facts == facts


def test_a_file_with_a_refresh_token_alone_must_be_refreshed_first() -> None:
    tokens = GeminiCli().tokens_from('{"refresh_token": "1//r"}')
    assert tokens is not None
    assert (tokens.access, tokens.refresh, tokens.expires_at) == ("", "1//r", 0.0)


def test_what_is_no_credential_file() -> None:
    assert GeminiCli().tokens_from("ya29.plain-token") is None
    assert GeminiCli().tokens_from('"text"') is None
    with pytest.raises(ValueError, match="not valid JSON"):
        GeminiCli().tokens_from('{"access_token": ')
    with pytest.raises(ValueError, match="neither"):
        GeminiCli().tokens_from('{"type": "service_account"}')


def test_what_a_token_endpoint_says_of_the_account() -> None:
    def identity(claims: Any) -> str:
        return "h." + base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=") + ".s"

    assert GeminiCli().facts_from({"id_token": identity({"email": "a@example.org"})}) == {"email": "a@example.org"}
    for odd in ({}, {"id_token": "x"}, {"id_token": "a.%.b"}, {"id_token": identity([])}, {"id_token": identity({})}, {"id_token": 7}):
        assert GeminiCli().facts_from(odd) == {}
