"""The web chat of Qwen, from bytes: a chat, one message in it, phases that become thoughts and text, errors with status 200."""

from __future__ import annotations

import json
from typing import Any

import pytest

from providers import failures, registry, wire
from providers.adapter import Ask, Heard, Target
from providers.failures import UpstreamBroke, UpstreamFailure, UpstreamProtocol
from providers.price import Tokens
from providers.secrets import SecretText

WEB = registry.adapter("qwen_web")
TARGET = Target("qwen_web", 1, "mine", "https://chat.example", SecretText("its-token"), "qwen3-max", "qwen_web/qwen3-max")
MADE = b'{"success":true,"request_id":"r","data":{"id":"0199-chat_1"}}'


def ask(*messages: Any, stream: bool = True, **body: Any) -> Ask:
    said = list(messages) or [{"role": "user", "content": "Hello"}]
    body = {"model": "qwen_web/qwen3-max", "messages": said, "stream": stream} | body
    return Ask("chat/completions", body, stream=stream, request_id="0199", client_wants_usage=True)


def trip(question: Ask, heard: bytes = MADE, status: int = 200) -> tuple[Any, Any]:
    """The two calls, in order."""
    calls = WEB.first_calls(question, TARGET)
    assert calls is not None
    first = next(calls)
    with pytest.raises(StopIteration) as end:
        calls.send(Heard(status, {}, heard))
    return first, end.value.value


def message(*messages: Any, **body: Any) -> Any:
    _, call = trip(ask(*messages, **body))
    return json.loads(call.body)["messages"][0]


# Requests


def test_a_chat_is_made_first_and_then_spoken_in():
    first, call = trip(ask())
    made = json.loads(first.body)
    assert (first.method, first.url) == ("POST", "https://chat.example/api/v2/chats/new")
    assert made.keys() == {"title", "models", "chat_mode", "chat_type", "timestamp"}
    assert (made["models"], made["chat_mode"]) == (["qwen3-max"], "normal")
    assert call.url == "https://chat.example/api/v2/chat/completions?chat_id=0199-chat_1"
    said = json.loads(call.body)
    assert (said["chat_id"], said["model"], said["stream"], said["incremental_output"]) == ("0199-chat_1", "qwen3-max", True, True)
    assert [one["content"] for one in said["messages"]] == ["Hello"]
    for one in (first, call):
        assert (one.headers["Authorization"], one.headers["Cookie"]) == ("Bearer its-token", "token=its-token")
        assert (one.headers["source"], one.headers["X-Request-ID"]) == ("web", "0199")
        assert b"its-token" not in one.body


def test_a_whole_answer_is_asked_for_as_a_stream():
    assert message(stream=False)["role"] == "user"
    _, call = trip(ask(stream=False))
    assert json.loads(call.body)["stream"] is True


def test_a_conversation_is_said_as_one_text():
    parts = [{"type": "text", "text": "And"}, {"type": "text", "text": "now?"}]
    said = message(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": parts},
    )
    assert said["content"] == "System: Be brief.\n\nUser: Hello\n\nAssistant: Hi\n\nUser: And\nnow?"


@pytest.mark.parametrize(
    ("given", "config"),
    [
        ({}, {"thinking_enabled": True, "thinking_budget": 38_912}),
        ({"reasoning_effort": "none"}, {"thinking_enabled": False}),
        ({"reasoning_effort": "low"}, {"thinking_enabled": True, "thinking_budget": 1024}),
        ({"reasoning_effort": "high"}, {"thinking_enabled": True, "thinking_budget": 24_576}),
        ({"enable_thinking": False, "reasoning_effort": "high"}, {"thinking_enabled": False}),
        ({"thinking_budget": 7}, {"thinking_enabled": True, "thinking_budget": 7}),
    ],
)
def test_thinking(given: Any, config: Any):
    assert message(**given)["feature_config"] == {**config, "output_schema": "phase"}


@pytest.mark.parametrize(
    "given",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"functions": [{}]},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema"}},
        {"n": 2},
        {"stop": "x"},
        {"logprobs": True},
        {"logit_bias": {"1": 1}},
        {"reasoning_effort": "heroic"},
        {"thinking_budget": 10**30},
    ],
)
def test_what_it_cannot_do_is_refused_before_anybody_is_called(given: Any):
    calls = WEB.first_calls(ask(**given), TARGET)
    assert calls is not None
    with pytest.raises(failures.InvalidAtUpstream) as raised:
        next(calls)
    assert raised.value.param in given


@pytest.mark.parametrize(
    "said",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        {"role": "user", "content": {"text": "x"}},
        {"role": "tool", "tool_call_id": "a", "content": "x"},
        {"role": "assistant", "tool_calls": [{"id": "a"}]},
    ],
)
def test_messages_that_are_no_text_are_refused(said: Any):
    with pytest.raises(failures.InvalidAtUpstream) as raised:
        trip(ask(said))
    assert raised.value.param == "messages"


def test_hints_are_dropped():
    given = {
        "temperature": 0.1,
        "top_p": 1,
        "max_tokens": 5,
        "max_completion_tokens": 5,
        "seed": 1,
        "user": "u",
        "tools": [],
        "tool_choice": "auto",
    }
    _, call = trip(ask(**given, stop=None))
    assert not given.keys() & json.loads(call.body).keys()


# The chat that is made first


@pytest.mark.parametrize(
    ("status", "heard", "kind"),
    [
        (200, b'{"success":false,"data":{"code":"Unauthorized","details":"x"}}', failures.CredentialRefused),
        (401, b'{"success":false,"data":{"code":"Unauthorized","details":"x"}}', failures.CredentialRefused),
        (401, b"", failures.CredentialRefused),
        (429, b"", failures.RateLimited),
        (502, b"<html></html>", failures.UpstreamServer),
        (200, b'{"ret":["FAIL_SYS_USER_VALIDATE"]}', failures.ForbiddenAtUpstream),
        (200, b"<html></html>", UpstreamProtocol),
        (200, b"", UpstreamProtocol),
        (200, b'{"success":true,"data":{}}', UpstreamProtocol),
        (200, b'{"success":true,"data":{"id":"../x?y="}}', UpstreamProtocol),
        (200, b'{"success":true,"data":{"id":"\xc3\xa4"}}', UpstreamProtocol),
    ],
)
def test_a_chat_that_is_not_made(status: int, heard: bytes, kind: type[UpstreamFailure]):
    calls = WEB.first_calls(ask(), TARGET)
    assert calls is not None
    next(calls)
    with pytest.raises(kind):
        calls.send(Heard(status, {}, heard))


# Answers


def said(content: str, phase: str | None = "answer", status: str = "typing", **more: Any) -> bytes:
    return wire.event({"choices": [{"delta": {"role": "assistant", "content": content, "phase": phase, "status": status}}], **more})


def read(*parts: bytes) -> Any:
    reader = WEB.reader(ask(), TARGET)
    out = b"".join(reader.feed(part) for part in parts) + reader.end()
    events = [json.loads(event.removeprefix(b"data: ")) for event in out.split(b"\n\n") if event.startswith(b"data: {")]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    text, thoughts = ("".join(delta.get(name, "") for delta in deltas) for name in ("content", "reasoning_content"))
    return text, thoughts, reader


CREATED = wire.event({"response.created": {"chat_id": "c", "parent_id": "p", "response_id": "r"}})
END = said("", status="finished")


def test_phases_become_thoughts_and_text():
    text, thoughts, _ = read(
        CREATED, said("I", "think"), said("", "think", "finished"), said(" see", "thinking_summary"), said("a page", "web_search"),
        said("Hel"), said("lo", None), END,
    )  # fmt: skip
    assert (text, thoughts) == ("Hello", "I see")


def test_an_end_of_thinking_is_not_the_end():
    with pytest.raises(UpstreamBroke):
        read(CREATED, said("I", "think"), said("", "think", "finished"))


def test_usage_is_the_last_that_was_said():
    usage = {"input_tokens": 9, "output_tokens": 4, "total_tokens": 13, "output_tokens_details": {"reasoning_tokens": 3}}
    odd = {"input_tokens": "many"}
    *_, reader = read(
        said("a", usage={"input_tokens": 9, "output_tokens": 1}), said("b", usage=usage), said("", status="finished", usage=odd)
    )
    assert reader.tokens == Tokens(fresh_input=9, output=1, reasoning=3)


@pytest.mark.parametrize(
    ("code", "details", "kind", "status"),
    [
        ("Unauthorized", "x", failures.CredentialRefused, 502),
        ("Forbidden", "x", failures.ForbiddenAtUpstream, 403),
        ("RateLimited", "x", failures.RateLimited, 429),
        ("RateLimited", "You have reached the upper limit for today's usage.", failures.OutOfCredit, 429),
        ("data_inspection_failed", "x", failures.ContentFiltered, 400),
        ("Bad_Request", "x", failures.InvalidAtUpstream, 400),
        ("Not_Found", "Model not found", failures.ModelGone, 404),
        ("internal_error", "x", failures.UpstreamServer, 502),
        ("never heard of", "x", failures.UpstreamServer, 502),
        (None, None, failures.UpstreamServer, 502),
    ],
)
def test_an_error_with_status_200_is_what_it_says(code: str | None, details: str | None, kind: type[UpstreamFailure], status: int):
    body = wire.encode_json({"success": False, "request_id": "r", "data": {"code": code, "details": details}})
    for form in (body, b"data: " + body + b"\n\n"):
        with pytest.raises(kind) as raised:
            read(form)
        assert raised.value.status == status
        with pytest.raises(kind):
            WEB.answer(ask(stream=False), TARGET, form, "application/json")
    with pytest.raises(UpstreamBroke):
        read(said("a"), b"data: " + body + b"\n\n")
    problem = WEB.failure(TARGET, 400, {}, body)
    assert (type(problem), problem.upstream_status) == (kind, 400)


def test_a_captcha_is_told_as_one():
    with pytest.raises(failures.ForbiddenAtUpstream, match="captcha"):
        read(b'{"ret":["FAIL_SYS_USER_VALIDATE"],"data":{"url":"https://x"}}')


def test_an_error_in_openais_form_is_one_too():
    with pytest.raises(failures.UpstreamServer):
        read(b'data: {"error":{"message":"x"}}\n\n')


def test_frames_that_say_nothing_known_are_skipped_and_three_that_cannot_be_read_are_too_many():
    assert read(said("a"), *[b'data: {"odd":1}\n\n'] * 5, b"data: [1]\n\n", END)[0] == "a"
    with pytest.raises(UpstreamBroke):
        read(said("a"), *[b"data: {\n\n"] * 3)


def test_a_whole_answer_is_put_together():
    whole = WEB.answer(ask(stream=False), TARGET, CREATED + said("hm", "think") + said("Hi") + END, "text/event-stream")
    [choice] = json.loads(whole.body)["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hi", "reasoning_content": "hm"}
    assert choice["finish_reason"] == "stop"


# Models and policy


def test_its_models_are_asked_for():
    request = WEB.models_request(TARGET)
    assert request is not None
    assert request.url == "https://chat.example/api/models"
    assert WEB.models(b'{"data":[{"id":"qwen3-max","name":"Qwen3-Max","info":{"meta":{}}}]}').keys() == {"qwen3-max"}
    with pytest.raises(failures.CredentialRefused):
        WEB.models(b'{"success":false,"data":{"code":"Unauthorized"}}')
    with pytest.raises(UpstreamProtocol):
        WEB.models(b"<html>")


def test_its_policy_is_restricted():
    assert WEB.policy_for({}) == "restricted"
