"""CodeGeeX: a token and the identity that belongs to it, turns instead of messages, a last event that says all again (section 4)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from openai import OpenAI

from providers import registry
from providers.adapter import Ask, Target
from providers.exchange import Outgoing
from providers.failures import (
    CredentialRefused,
    ForbiddenAtUpstream,
    UpstreamBroke,
    UpstreamFailed,
    UpstreamFailure,
    UpstreamProtocol,
    UpstreamRefused,
)
from providers.secrets import SecretText
from tests.serving import CommandFailed, Sluice, eventually
from tests.upstreams.codegeex import MODELS, CodeGeeXUpstream, Step

ADAPTER = registry.adapter("codegeex")
SETTINGS = {
    "user_id": "u-1", "user_role": "0", "ide": "VSCode", "ide_version": "1.102.0", "plugin_version": "2.24.0", "machine_id": "m-1",
    "talk_id": "t-1", "locale": "zh",
}  # fmt: skip
BARE = Target("codegeex", 1, "l", "https://codegeex.cn", SecretText("token-0123456789"), "codegeex-chat-pro", "codegeex/codegeex-chat-pro")
TARGET = replace(BARE, settings=SETTINGS)
HELLO: Any = [{"role": "user", "content": "Hello my dear friend"}]
DONE = b"data: [DONE]\n\n"


def ask(*, stream: bool = True, usage: bool = False, request_id: str = "0123456789abcdef", **body: Any) -> Ask:
    body = {"model": "codegeex/codegeex-chat-pro", "messages": HELLO, **body}
    return Ask("chat/completions", body, stream=stream, request_id=request_id, client_wants_usage=usage)


def sent(target: Target = TARGET, **body: Any) -> tuple[Outgoing, dict[str, Any]]:
    request = ADAPTER.request(ask(**body), target)
    return request, json.loads(request.body)


def says(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


def talk(*messages: tuple[str, Any] | dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The prompt and the history that these messages become."""
    given = [one if isinstance(one, dict) else {"role": one[0], "content": one[1]} for one in messages]
    body = sent(messages=given)[1]
    return body["prompt"], [(turn["query"], turn["answer"]) for turn in body["history"]]


# What goes out (4.3, 4.7)


def test_a_request_says_all_that_is_set_of_the_account() -> None:
    request, body = sent(temperature=0.2, max_tokens=5, stop="x", user="someone", n=1, tools=[], logprobs=False, reasoning_effort="low")

    assert request.url == "https://codegeex.cn/prod/code/chatCodeSseV3/chat"
    assert request.headers == {
        "code-token": "token-0123456789",
        "Content-Type": "application/json",
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",
        "User-Agent": "sluice/0.1",
    }
    assert body == {
        "user_id": "u-1",
        "user_role": 0,
        "ide": "VSCode",
        "ide_version": "1.102.0",
        "plugin_version": "2.24.0",
        "machineId": "m-1",
        "talkId": "t-1",
        "locale": "zh",
        "model": "codegeex-chat-pro",
        "agent": None,
        "candidates": {"candidate_msg_id": "", "candidate_type": "", "selected_candidate": ""},
        "prompt": "Hello my dear friend",
        "history": [],
    }


def test_what_is_not_set_is_left_out_or_made_for_this_account_and_request() -> None:
    _, body = sent(BARE)
    other_account = json.loads(ADAPTER.request(ask(), replace(BARE, credential_id=2, secret=SecretText("token-other"))).body)
    next_request = json.loads(ADAPTER.request(ask(request_id="fedcba"), BARE).body)

    assert body.keys() == {"machineId", "talkId", "locale", "model", "agent", "candidates", "prompt", "history"}
    assert body["locale"] == "en"
    assert body["machineId"] == next_request["machineId"] != other_account["machineId"]
    assert len({body["talkId"], next_request["talkId"], other_account["talkId"]}) == 3
    assert sent(BARE)[1] == body, "a resend is the same request"


def test_a_role_that_is_no_number_stays_as_it_is() -> None:
    body = sent(replace(BARE, settings={"user_role": "admin", "user_id": "7"}))[1]

    assert (body["user_role"], body["user_id"]) == ("admin", "7")


def test_the_callers_own_token_goes_with_nothing_of_our_account() -> None:
    _, body = sent(replace(TARGET, callers_key=True, secret=SecretText("token-of-the-caller")))

    assert not {"user_id", "user_role", "ide", "ide_version", "plugin_version"} & body.keys()
    assert body["machineId"] != "m-1"
    assert body["talkId"] != "t-1"


def test_whole_answers_are_asked_for_as_a_stream() -> None:
    assert ADAPTER.request(ask(stream=False), TARGET).path == ADAPTER.request(ask(), TARGET).path


def test_the_last_question_is_the_prompt_and_earlier_turns_are_history() -> None:
    assert talk(("user", "hello"), ("assistant", "Hi!"), ("user", "Write a sort.")) == ("Write a sort.", [("hello", "Hi!")])


def test_messages_in_a_row_of_one_side_are_one_turn() -> None:
    messages = [("user", "a"), ("user", "b"), ("assistant", "1"), ("assistant", None), ("assistant", "2"), ("user", "c"), ("user", "d")]
    assert talk(*messages) == ("c\n\nd", [("a\n\nb", "1\n\n2")])


def test_a_greeting_before_any_question_answers_an_empty_one() -> None:
    assert talk(("assistant", "Welcome."), ("user", "hello")) == ("hello", [("", "Welcome.")])


def test_system_messages_stand_before_the_first_question() -> None:
    first = "[System]\nBe brief.\n\nIn verse.\n\n[User]\nhello"
    assert talk(("system", "Be brief."), ("user", "hello"), ("developer", "In verse.")) == (first, [])
    assert talk(("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("system", "In verse.")) == (
        "c",
        [("[System]\nBe brief.\n\nIn verse.\n\n[User]\na", "b")],
    )
    assert talk(("system", "Be brief.")) == ("[System]\nBe brief.", [])


def test_tools_in_the_history_are_told_in_words() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"q":1}'}}
    prompt, history = talk(
        ("user", "Look."),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "42"}]},
    )

    assert history == [("Look.", '[Call of the tool look]\n{"q":1}')]
    assert prompt == "[Result of the tool call_1]\n42"


def test_each_turn_of_the_history_has_an_id_of_its_own() -> None:
    history = sent(messages=says(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")))[1]["history"]

    assert len({turn["id"] for turn in history}) == 2


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"messages": []}, "messages"),
    ({"messages": says(("user", "a"), ("assistant", "b"))}, "messages"),
    ({"messages": says(("user", [IMAGE]))}, "messages[0].content"),
    ({"messages": says(("user", "a"), ("robot", "b"))}, "messages[1].role"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[f"{number}-{case[1]}" for number, case in enumerate(REFUSED)])
def test_what_it_cannot_honour_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(UpstreamRefused) as caught:
        sent(**body)
    assert (caught.value.status, caught.value.type, caught.value.param) == (400, "invalid_request_error", param)


# Models (4.5)


def test_the_list_of_models_is_asked_for_without_a_token() -> None:
    request = ADAPTER.models_request(TARGET)
    assert request is not None
    assert request.url == "https://codegeex.cn/prod/v3/chat/model"
    assert "token-0123456789" not in str(request.headers)


def test_the_list_of_models() -> None:
    pro = {"id": "codegeex-chat-pro", "name": "CodeGeeX Pro", "description": {"zh": "z"}, "host": ""}
    listed = {"options": [pro, {"id": "claude"}, {"id": 3}, 4], "default": "codegeex-chat-pro", "ip": "203.0.113.7"}
    assert ADAPTER.models(json.dumps(listed).encode()) == {
        "codegeex-chat-pro": {"id": "codegeex-chat-pro", "name": "CodeGeeX Pro"},
        "claude": {"id": "claude"},
    }
    for wrong in (b"<html>", b"[]", b"{}", b'{"options":{}}', b'{"options":"\xff"}', b"[" * 100_000, b'{"code":401,"msg":"no"}'):
        with pytest.raises(UpstreamProtocol):
            ADAPTER.models(wrong)


# What comes back (4.4)


def event(name: str, text: Any = "", reason: str = "", *, space: str = "", **more: Any) -> bytes:
    data = {"id": "m-1", "text": text, "finish_reason": reason, "model": "codegeex-chat-pro", **more}
    return f"id:1\nevent:{space}{name}\ndata:{space}{json.dumps(data)}\n\n".encode()


def streamed(data: bytes, *, usage: bool = False) -> list[dict[str, Any]]:
    """The events of a stream that is whole. Raises what the reader raises."""
    reader = ADAPTER.reader(ask(usage=usage), TARGET)
    said = reader.feed(data)
    if reader.failure is not None:
        raise reader.failure
    said += reader.end()
    assert said.endswith(DONE)
    return [json.loads(one.removeprefix(b"data: ")) for one in said.removesuffix(DONE).split(b"\n\n") if one]


def text_of(data: bytes) -> str:
    said = "".join(one["delta"].get("content") or "" for chunk in streamed(data) for one in chunk["choices"])
    assert whole(data)["message"]["content"] == said, "a whole answer says the same"
    return said


def whole(data: bytes) -> dict[str, Any]:
    answer = ADAPTER.answer(ask(stream=False), TARGET, data, "text/event-stream")
    assert answer.tokens is None
    [choice] = json.loads(answer.body)["choices"]
    return dict(choice)


HEL, LO = event("add", "Hel"), event("add", "lo.")
SAID = {
    "adds, then all again": HEL + LO + event("finish", "Hello.", "stop"),
    "with spaces": event("add", "Hel", space=" ") + event("add", "lo.", space=" ") + event("finish", "Hello.", "stop", space=" "),
    "finish alone": event("finish", "Hello.", "stop"),
    "a finish that is longer": HEL + event("finish", "Hello.", "stop"),
    "a finish that differs": HEL + LO + event("finish", "Good day.", "stop"),
    "an empty finish": HEL + LO + event("finish", "", ""),
    "a search on the way": event("processing", data=["x"]) + HEL + event("processing", type="crawl") + LO + event("finish", "Hello."),
    "blocks without data": b"id:1\nevent:add\n\n" + HEL + b"event:finish\n\n" + LO + event("finish", "Hello."),
    "blocks of tomorrow": event("tomorrow", "no") + b'data:{"text":"no"}\n\n' + HEL + LO + event("finish", "Hello."),
    "two bad blocks": b"event:add\ndata:{\n\n" + HEL + b"event:add\ndata:7\n\n" + LO + event("finish", "Hello."),
    "more behind it": HEL + LO + event("finish", "Hello.") + event("add", "more") + event("error", code=500) + b"<html>",
    "done behind it": HEL + LO + event("finish", "Hello.") + DONE,
    "done without it": HEL + LO + DONE,
    "CRLF": (HEL + LO + event("finish", "Hello.")).replace(b"\n", b"\r\n"),
    "no last line end": (HEL + LO + event("finish", "Hello."))[:-2],
    "one object": b'{"code":200,"msg":"ok","data":{"text":"Hello.","finish_reason":"stop"}}',
    "text that is no text": event("add", 5) + HEL + event("add", None) + LO + event("finish", ["x"]),
}  # fmt: skip


@pytest.mark.parametrize("data", SAID.values(), ids=SAID)
def test_the_answer_is_said_once(data: bytes) -> None:
    """The reference's product passed the last event on, so that every answer came twice."""
    assert text_of(data) == "Hello."


@pytest.mark.parametrize(("said", "heard"), [("", "stop"), ("stop", "stop"), ("length", "length"), ("of tomorrow", "stop"), (None, "stop")])
def test_each_reason_has_its_word(said: Any, heard: str) -> None:
    data = HEL + event("finish", "Hel", said)

    assert [one["finish_reason"] for chunk in streamed(data) for one in chunk["choices"] if one["finish_reason"]] == [heard]
    assert whole(data)["finish_reason"] == heard


def test_one_id_the_clients_model_and_an_estimate() -> None:
    *chunks, last = streamed(HEL + LO + event("finish", "Hello.", id="m-2", model="theirs"), usage=True)

    assert {(chunk["id"], chunk["model"]) for chunk in chunks} == {("chatcmpl-0123456789abcdef", "codegeex/codegeex-chat-pro")}
    assert last["usage"]["completion_tokens"] == 2
    assert last["usage"]["prompt_tokens"] > 0


def test_a_stream_that_stops_without_a_finish_broke() -> None:
    with pytest.raises(UpstreamBroke, match="before it was complete"):
        streamed(HEL + LO)
    with pytest.raises(UpstreamFailed, match="before it was complete"):
        whole(HEL + LO)
    with pytest.raises(UpstreamProtocol):
        streamed(event("processing"))


@pytest.mark.parametrize("data", [b"", b"<html>", event("finish", ""), b'{"code":200}', b"words", b'{"code":200,"data":{"text":""}}'])
def test_nothing_said_is_no_answer(data: bytes) -> None:
    for read in (streamed, whole):
        with pytest.raises(UpstreamProtocol):
            read(data)


IN_A_200 = [
    (401, 502, "upstream_auth_failed"), (403, 403, None), (402, 402, "insufficient_quota"), (404, 404, "model_not_found"),
    (429, 429, "rate_limit_exceeded"), (500, 502, "upstream_error"), (503, 503, "overloaded"), (1001, 502, "upstream_error"),
    (-1, 502, "upstream_error"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "status", "said"), IN_A_200)
def test_an_error_inside_a_200_is_an_error(code: int, status: int, said: str | None) -> None:
    body = json.dumps({"code": code, "msg": "not this time", "data": None}).encode()
    for data in (body, b"event:error\ndata:" + body + b"\n\n", b"data: " + body + b"\n\n"):
        for read in (streamed, whole):
            with pytest.raises(UpstreamFailure) as caught:
                read(data)
            assert (caught.value.status, caught.value.code) == (status, said)
            assert code in (401, 404) or caught.value.message == "not this time"


def test_a_refused_token_is_the_whole_accounts_trouble() -> None:
    for status, kind in ((401, CredentialRefused), (403, ForbiddenAtUpstream)):
        problem = ADAPTER.failure(TARGET, status, {}, b'{"code":1,"msg":"token invalid"}')
        assert isinstance(problem, kind)
        assert isinstance(problem, UpstreamFailed)
        assert (problem.whole_account, problem.upstream_status) == (True, status)


def test_words_and_waits_of_a_refusal_are_kept() -> None:
    problem = ADAPTER.failure(TARGET, 429, {"retry-after": "7"}, b'{"code":429,"msg":"slow\\ndown"}')
    assert (problem.message, problem.retry_after_seconds) == ("slow down", 7)
    assert ADAPTER.failure(TARGET, 429, {}, b'{"message":"slow"}').message == "slow"
    for body in (b"<html>", b"\xff", b"[1]", b'{"msg":"\xff"}', b'{"msg":7}'):
        assert ADAPTER.failure(TARGET, 500, {}, body).message == "The upstream answered 500."


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 999) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "code", "msg", "data", "finish_reason"]), inner),
    max_leaves=12,
)


@given(frames=st.lists(st.tuples(st.sampled_from(["add", "finish", "processing", "", "new"]), json_values), max_size=4))
def test_whatever_it_says_the_reader_ends_in_our_own_words(frames: list[tuple[str, Any]]) -> None:
    data = b"".join(f"event:{name}\ndata:{json.dumps(value)}\n\n".encode() for name, value in frames)
    for read in (lambda: streamed(data), lambda: whole(data), lambda: [whole(json.dumps(value).encode()) for _, value in frames]):
        with suppress(UpstreamFailure):
            read()


# Through the simulator and a running gateway


@pytest.fixture(scope="module")
def simulator() -> Iterator[CodeGeeXUpstream]:
    with CodeGeeXUpstream() as simulator:
        yield simulator


@pytest.fixture
def geex(simulator: CodeGeeXUpstream) -> CodeGeeXUpstream:
    simulator.reset()
    return simulator


def account(sluice: Sluice, simulator: CodeGeeXUpstream, prefix: str, secret: str, **settings: Any) -> int:
    return sluice.add_credential("codegeex", simulator.base_url, prefix=prefix, secret=secret, **settings)


REFUSALS = [
    # scenario, status, code, Retry-After, x-should-retry
    ("401", 502, "upstream_auth_failed", None, None),
    ("200-401", 502, "upstream_auth_failed", None, None),
    ("403", 403, None, None, None),
    ("402", 402, "insufficient_quota", None, "false"),
    ("rate_limit", 429, "rate_limit_exceeded", "2", None),
    ("rate_limit_no_header", 429, "rate_limit_exceeded", None, None),
    ("200-429", 429, "rate_limit_exceeded", None, None),
    ("500", 502, "upstream_error", None, None),
    ("200-1001", 502, "upstream_error", None, None),
    ("overloaded", 503, "overloaded", None, None),
    ("html_502", 502, "upstream_error", None, None),
    ("html_200", 502, "upstream_bad_response", None, None),
    ("empty_200", 502, "upstream_bad_response", None, None),
]


@pytest.fixture(scope="module")
def prefix(sluice: Sluice, simulator: CodeGeeXUpstream) -> str:
    """An account that is well, and for each refusal pools that have it alone or first."""
    credential = account(sluice, simulator, "geex", "sim-ok", user_id="u-ok", machine_id="m-ok")
    sluice.set_price("geex/*", input=1, output=2)
    for scenario, *_ in REFUSALS:
        account(sluice, simulator, f"geex-alone-{scenario}", f"sim-{scenario}~alone")
        for stream in (False, True):
            pool = f"geex-pool-{scenario}-{stream}"
            account(sluice, simulator, pool, f"sim-{scenario}~{stream}", priority=10)
            account(sluice, simulator, pool, f"sim-ok~{scenario}-{stream}", label=f"geex-well-{scenario}")
    sluice.manage("refresh_models", "--credential", str(credential))
    sluice.wait_for("geex", f"geex-pool-{REFUSALS[-1][0]}-True")
    return "geex"


@pytest.fixture
def client(sluice: Sluice, prefix: str, geex: CodeGeeXUpstream) -> Iterator[OpenAI]:
    with OpenAI(api_key=sluice.issue_key(), base_url=f"{sluice.url}/v1", max_retries=0) as client:
        yield client


def heard(stream: Any) -> str:
    return "".join(one.delta.content or "" for chunk in stream for one in chunk.choices)


def test_it_is_restricted_until_that_is_accepted(sluice: Sluice, geex: CodeGeeXUpstream) -> None:
    with pytest.raises(CommandFailed, match="--accept-policy"):
        sluice.manage("add_credential", "codegeex", "--label", "x", "--base-url", geex.base_url, "--secret-stdin", stdin="sim-ok")


@pytest.mark.parametrize(
    ("scenario", "text"),
    [(one, "grüße an alle 𝄞 🚀") for one in (
        "ok", "space", "finish_only", "finish_differs", "processing", "odd_blocks", "json", "split_utf8", "coalesced", "crlf", "comments",
        "chunk_splits_frame", "no_trailing_newline", "bad_frame", "gzip", "http10", "big_frame",
    )] + [("finish_longer", "grüße an alle 𝄞 🚀 and more")],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_arrives_once_however_it_is_said(
    client: OpenAI, sluice: Sluice, geex: CodeGeeXUpstream, scenario: str, text: str, stream: bool
) -> None:
    geex.script(Step(scenario=scenario, text="grüße an alle 𝄞 🚀"))
    arguments: Any = {"model": "geex/codegeex-chat-pro", "messages": HELLO, "temperature": 0}
    if stream:
        events = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **arguments)
        *chunks, last = list(events)
        said, usage, request_id = heard(chunks), last.usage, events.response.headers["x-request-id"]
    else:
        answer = client.chat.completions.create(**arguments)
        said, usage, request_id = str(answer.choices[0].message.content), answer.usage, str(answer._request_id)

    assert said.replace("x" * (1 << 20), "") == text
    row = sluice.row(request_id)
    assert (row["status"], row["provider"], row["usage_source"], row["attempts"]) == (200, "codegeex", "estimated", 1)
    assert usage is not None
    assert usage.completion_tokens == row["output_tokens"] > 0
    assert abs(usage.prompt_tokens - row["input_tokens"]) < 10
    assert geex.last.unknown_fields == {}
    assert geex.mismatches == []


def test_turns_reach_it_in_its_own_form(client: OpenAI, geex: CodeGeeXUpstream) -> None:
    messages: Any = says(("system", "Be brief."), ("user", "one"), ("assistant", "two"), ("user", [{"type": "text", "text": "three"}]))
    answer = client.chat.completions.create(model="geex/codegeex4", messages=messages)

    assert answer.choices[0].message.content == "echo: three"
    body = geex.last.json
    assert (body["prompt"], body["model"]) == ("three", "codegeex4")
    assert [(turn["query"], turn["answer"]) for turn in body["history"]] == [("[System]\nBe brief.\n\n[User]\none", "two")]


def test_models_are_listed_and_kept_when_the_list_fails(client: OpenAI, sluice: Sluice, geex: CodeGeeXUpstream) -> None:
    def listed() -> set[str]:
        return {model.id.removeprefix("geex/") for model in client.models.list() if model.id.startswith("geex/")}

    assert listed() == set(MODELS)
    geex.models_fail = True
    sluice.manage("refresh_models")
    assert listed() == set(MODELS)
    geex.models_fail, geex.models = False, ("codegeex-chat-pro", "new")
    sluice.manage("refresh_models")
    eventually(lambda: listed() == {"codegeex-chat-pro", "new"}, "the new list is not in force")
    assert all("code-token" not in seen.headers for seen in geex.log if seen.method == "GET")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("scenario", "status", "code", "retry_after", "should_retry"), REFUSALS, ids=[case[0] for case in REFUSALS])
def test_what_it_refuses(
    client: OpenAI,
    sluice: Sluice,
    scenario: str,
    status: int,
    code: str | None,
    retry_after: str | None,
    should_retry: str | None,
    stream: bool,
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model=f"geex-alone-{scenario}/m", messages=HELLO, stream=stream)

    headers = caught.value.response.headers
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert (headers.get("retry-after"), headers.get("x-should-retry")) == (retry_after, should_retry)
    assert "<" not in caught.value.message
    assert sluice.row(str(caught.value.request_id))["status"] == status


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("scenario", [case[0] for case in REFUSALS])
def test_the_next_account_gives_one_clean_answer(
    client: OpenAI, sluice: Sluice, geex: CodeGeeXUpstream, scenario: str, stream: bool
) -> None:
    arguments: Any = {"model": f"geex-pool-{scenario}-{stream}/m", "messages": HELLO}
    if stream:
        events = client.chat.completions.create(stream=True, **arguments)
        text, request_id = heard(events), events.response.headers["x-request-id"]
    else:
        answer = client.chat.completions.create(**arguments)
        text, request_id = answer.choices[0].message.content, str(answer._request_id)

    assert text == "echo: Hello my dear friend"
    row = sluice.row(request_id)
    assert (row["status"], row["attempts"], row["credential"]) == (200, 2, f"geex-well-{scenario}")
    first, second = geex.posts
    assert first.headers["code-token"] != second.headers["code-token"]
    assert first.json["machineId"] != second.json["machineId"]
    assert first.json["talkId"] != second.json["talkId"], "it would tell the vendor that the two accounts are one user's"
    assert geex.mismatches == []


@pytest.mark.parametrize("scenario", ["abort_mid", "eof_mid", "no_finish"])
def test_a_whole_answer_that_breaks_is_tried_at_the_next_account(
    client: OpenAI, sluice: Sluice, geex: CodeGeeXUpstream, scenario: str
) -> None:
    account(sluice, geex, f"geex-{scenario}", f"sim-ok~{scenario}-first", priority=10)
    account(sluice, geex, f"geex-{scenario}", f"sim-ok~{scenario}-second")
    sluice.wait_for(f"geex-{scenario}")
    geex.script(Step(scenario=scenario, text="one two three four five"))
    answer = client.chat.completions.create(model=f"geex-{scenario}/m", messages=HELLO)

    assert answer.choices[0].message.content == "echo: Hello my dear friend"
    assert sluice.row(str(answer._request_id))["attempts"] == 2


BAD, LOST = "upstream_bad_response", "upstream_error"


@pytest.mark.parametrize(("scenario", "code"), [("abort_mid", LOST), ("eof_mid", BAD), ("error_frame", LOST), ("no_finish", BAD)])
def test_a_stream_that_breaks_never_looks_whole(client: OpenAI, sluice: Sluice, geex: CodeGeeXUpstream, scenario: str, code: str) -> None:
    geex.script(Step(scenario=scenario, text="one two three four five" if scenario != "no_finish" else "one two three"))
    stream = client.chat.completions.create(model="geex/codegeex-chat-pro", messages=HELLO, stream=True)
    text = ""
    with pytest.raises(openai.APIError) as caught:
        for chunk in stream:
            assert chunk.choices[0].finish_reason is None
            text += chunk.choices[0].delta.content or ""

    assert (text, caught.value.code) == ("one two three", code)
    row = sluice.row(stream.response.headers["x-request-id"])
    assert (row["status"], row["attempts"], row["output_tokens"]) == (502, 1, 3)


def test_a_client_that_leaves_stops_it_and_is_metered_once(client: OpenAI, sluice: Sluice, geex: CodeGeeXUpstream) -> None:
    geex.script(Step(text="word " * 200, delay_frame_ms=20))
    stream = client.chat.completions.create(model="geex/codegeex-chat-pro", messages=HELLO, stream=True)
    for _ in range(4):
        next(stream)
    stream.close()

    eventually(lambda: geex.last.peer_left_at is not None, "the upstream goes on", seconds=1)
    row = sluice.row(stream.response.headers["x-request-id"])
    assert (row["status"], row["error"], row["usage_source"]) == (499, "client_closed", "estimated")
    assert 3 <= row["output_tokens"] <= geex.last.frames_sent + 1


def test_tools_and_images_are_refused_before_anything_goes_out(client: OpenAI, geex: CodeGeeXUpstream) -> None:
    for body, param in REFUSED:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": "geex/codegeex-chat-pro", "messages": HELLO, **body})
        assert caught.value.param == param
    assert geex.posts == []


ACCOUNTS = {
    token: {
        "user_id": f"user-{name}", "user_role": role, "ide": f"ide-{name}", "ide_version": f"1.{role}", "plugin_version": f"2.{role}",
        "machine_id": f"machine-{name}", "talk_id": f"talk-{name}", "locale": locale,
    }
    for token, name, role, locale in (("sim-ok~left", "left", 1, "en"), ("sim-ok~right", "right", 2, "zh"))
}  # fmt: skip
SENT_AS = {"machine_id": "machineId", "talk_id": "talkId"}


def test_two_accounts_never_mix_their_identities(sluice: Sluice, client: OpenAI, geex: CodeGeeXUpstream) -> None:
    """The reference's product took the token of one account and the identity of another."""
    for token, settings in ACCOUNTS.items():
        account(sluice, geex, "geex-two", token, **settings)
    geex.accounts = {token: {"user_id": one["user_id"], "machineId": one["machine_id"]} for token, one in ACCOUNTS.items()}
    try:
        sluice.wait_for("geex-two")
        geex.script(*(Step(delay_frame_ms=3) for _ in range(24)))

        def call(number: int) -> str:
            text = f"question {number}"
            stream = number % 2 == 0
            answer: Any = client.chat.completions.create(model="geex-two/m", messages=[{"role": "user", "content": text}], stream=stream)
            return heard(answer) if stream else str(answer.choices[0].message.content)

        with ThreadPoolExecutor(6) as callers:
            assert list(callers.map(call, range(24))) == [f"echo: question {number}" for number in range(24)]

        came_with: defaultdict[str, set[tuple[tuple[str, Any], ...]]] = defaultdict(set)
        for seen in geex.posts:
            fields = {name: seen.json[SENT_AS.get(name, name)] for name in next(iter(ACCOUNTS.values()))}
            came_with[seen.headers["code-token"]].add(tuple(fields.items()))
        assert came_with == {token: {tuple(settings.items())} for token, settings in ACCOUNTS.items()}
        assert geex.mismatches == []
        assert len({seen.headers["code-token"] for seen in geex.posts[:4]}) == 2, "they take turns"
    finally:
        geex.accounts = {}


def test_the_simulator_refuses_what_the_upstream_refuses(geex: CodeGeeXUpstream) -> None:
    good = {"prompt": "hello", "model": "m", "machineId": "m", "talkId": "t", "history": None}
    wrong: list[tuple[str, Any, int]] = [
        ("", good, 401),
        ("other", good, 401),
        ("sim-ok", [], 400),
        ("sim-ok", {**good, "prompt": ""}, 400),
        ("sim-ok", {**good, "history": [{"query": "x"}]}, 400),
        ("sim-ok", good, 200),
        ("sim-ok", {**good, "machineId": "another"}, 403),
        ("sim-ok~2", good, 403),
    ]
    with httpx.Client(base_url=geex.base_url) as client:
        for token, body, status in wrong:
            answer = client.post("/prod/code/chatCodeSseV3/chat", json=body, headers={"Code-Token": token})
            assert answer.status_code == status, (token, body)
        assert [token for token, _ in geex.mismatches] == ["sim-ok", "sim-ok~2"]
        assert client.post("/prod/code/chat", json=good).status_code == 404
        assert client.get("/prod/code/oauth/getUserInfo", headers={"code-token": "sim-ok"}).json()["code"] == 200
        assert client.get("/prod/code/oauth/logout").status_code == 401
