"""Qwen's web chat through a running gateway: the `openai` package in front, two calls to the simulated page behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.conftest import SIM_PRICE, Accounts
from tests.serving import CommandFailed, Sluice
from tests.upstreams.qwen_web import QwenWebUpstream, Step

HELLO: Any = [{"role": "user", "content": "Hello my dear friend"}]
# An account that is alone has this fault. `new-`: already when the chat is made.
ALONE = {
    "unauthorized": (502, "upstream_auth_failed"),
    "limit": (429, "rate_limit_exceeded"),
    "quota": (429, "insufficient_quota"),
    "filter": (400, "content_policy_violation"),
    "bad_request": (400, "Bad_Request"),
    "no_model": (404, "model_not_found"),
    "broken": (502, "upstream_error"),
    "captcha": (403, "captcha"),
    "html_200": (502, "upstream_bad_response"),
    "html_502": (502, "upstream_error"),
    "empty_200": (502, "upstream_bad_response"),
    "new-unauthorized": (502, "upstream_auth_failed"),
    "new-limit": (429, "rate_limit_exceeded"),
    "new-captcha": (403, "captcha"),
    "new-html_200": (502, "upstream_bad_response"),
    "new-odd_id": (502, "upstream_bad_response"),
    "new-reset": (502, "upstream_error"),
}
# The first account of a pool has this fault; the second is well.
FAULTS = ["unauthorized", "limit", "quota", "captcha", "broken", "html_200", "reset", "new-unauthorized", "new-limit", "new-reset"]


@pytest.fixture(scope="module")
def web_server() -> Iterator[QwenWebUpstream]:
    with QwenWebUpstream() as server:
        yield server


@pytest.fixture
def web(web_server: QwenWebUpstream) -> QwenWebUpstream:
    web_server.reset()
    return web_server


def add(sluice: Sluice, prefix: str, base_url: str, secret: str, *arguments: str, priority: int = 0) -> str:
    given = ["--label", f"{prefix}-{priority}", "--prefix", prefix, "--base-url", base_url, "--priority", str(priority)]
    return sluice.manage("add_credential", "qwen_web", *given, *arguments, "--secret-stdin", stdin=secret).strip()


@pytest.fixture(scope="module")
def pools(sluice: Sluice, web_server: QwenWebUpstream) -> None:
    sluice.set_price("web*", **SIM_PRICE)
    url = web_server.base_url
    sluice.manage("refresh_models", "--credential", add(sluice, "web", url, "sk-sim-ok", "--accept-policy"))
    for fault in ALONE:
        add(sluice, f"web-alone-{fault}", url, f"sk-sim-{fault}", "--accept-policy")
    for fault in FAULTS:
        add(sluice, f"web-{fault}", url, f"sk-sim-{fault}", "--accept-policy", priority=10)
        add(sluice, f"web-{fault}", url, "sk-sim-ok", "--accept-policy")
    sluice.wait_for(f"web-{FAULTS[-1]}")


@pytest.fixture
def client(sluice: Sluice, pools: None, web: QwenWebUpstream) -> Iterator[OpenAI]:
    with OpenAI(api_key=sluice.issue_key(), base_url=f"{sluice.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def billed(sluice: Sluice, web: QwenWebUpstream) -> Accounts:
    return Accounts(sluice, web)  # type: ignore[arg-type]


def parts_of(chunks: list[Any]) -> tuple[str, str]:
    """(text, thoughts)"""
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    thoughts = "".join((delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas)
    return "".join(delta.content or "" for delta in deltas), thoughts


def test_a_stream_of_thoughts_and_text(client: OpenAI, billed: Accounts, web: QwenWebUpstream) -> None:
    stream = client.chat.completions.create(model="web/qwen3-max", messages=HELLO, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)

    assert parts_of(chunks) == ("echo: Hello my dear friend", "I think about it")
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    made_id = stream.response.headers["x-request-id"]
    assert [call.path for call in web.calls(made_id)] == ["/api/v2/chats/new", "/api/v2/chat/completions"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 13
    billed.of(made_id, stream=True, reasoning_tokens=4, provider="qwen_web")


def test_a_whole_answer_is_put_together(client: OpenAI, billed: Accounts) -> None:
    answer = client.chat.completions.create(model="web/qwen3-max", messages=HELLO, reasoning_effort="none", temperature=0.2)

    assert answer.choices[0].message.content == "echo: Hello my dear friend"
    assert answer.model == "web/qwen3-max"
    billed.of(str(answer._request_id), reasoning_tokens=0)


def test_each_call_has_a_chat_of_its_own(client: OpenAI, web: QwenWebUpstream) -> None:
    for _ in range(2):
        client.chat.completions.create(model="web/qwen3-max", messages=HELLO)
    assert len({call.query["chat_id"] for call in web.posts if "chat_id" in call.query}) == 2


@pytest.mark.parametrize("scenario", ["split_utf8", "gzip", "coalesced", "chunk_splits_frame", "crlf", "bad_frame", "no_trailing_newline"])
def test_a_stream_arrives_whole_however_it_is_cut(client: OpenAI, billed: Accounts, web: QwenWebUpstream, scenario: str) -> None:
    web.script(Step(scenario=scenario, text="grüße 𝄞", reasoning=""))
    stream = client.chat.completions.create(model="web/qwen3-max", messages=HELLO, stream=True)

    assert parts_of(list(stream)) == ("grüße 𝄞", "")
    billed.of(stream.response.headers["x-request-id"])


@pytest.mark.parametrize("scenario", ALONE)
def test_its_errors_as_a_client_sees_them(client: OpenAI, sluice: Sluice, scenario: str) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model=f"web-alone-{scenario}/qwen3-max", messages=HELLO)

    problem: Any = raised.value
    assert (problem.status_code, problem.code) == ALONE[scenario]
    assert not any(part in problem.response.text for part in ("<html", "sk-sim", "req-sim", "captcha.example"))
    assert sluice.row(problem.response.headers["x-request-id"])["status"] == problem.status_code


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_account_gives_one_clean_answer(client: OpenAI, sluice: Sluice, fault: str, streamed: bool) -> None:
    model = f"web-{fault}/qwen3-coder-plus" if streamed else f"web-{fault}/qwen3-max"  # a rest is of one model
    if streamed:
        stream = client.chat.completions.create(model=model, messages=HELLO, stream=True)
        text, made_id = parts_of(list(stream))[0], stream.response.headers["x-request-id"]
    else:
        answer = client.chat.completions.create(model=model, messages=HELLO)
        text, made_id = answer.choices[0].message.content or "", str(answer._request_id)

    assert text == "echo: Hello my dear friend"
    row = sluice.row(made_id)
    rests_whole = streamed and fault.endswith("unauthorized")  # the first call has shown that already
    assert (row["status"], row["attempts"], row["credential"]) == (200, 1 if rests_whole else 2, f"web-{fault}-0")


@pytest.mark.parametrize("scenario", ["abort_mid", "eof_mid", "error_frame"])
def test_a_stream_that_breaks_in_the_middle_ends_in_an_error(client: OpenAI, sluice: Sluice, scenario: str) -> None:
    answer = httpx.post(
        f"{client.base_url}chat/completions",
        headers={"authorization": f"Bearer {client.api_key}"},
        json={"model": f"web/sim-{scenario}", "messages": HELLO, "stream": True},
    )

    assert b'"reasoning_content":"I"' in answer.content
    assert answer.content.strip().split(b"\n\n")[-1].startswith(b'data: {"error":{')
    assert b"[DONE]" not in answer.content
    assert b'"finish_reason":"' not in answer.content
    row = sluice.row(answer.headers["x-request-id"])
    assert (row["attempts"], row["status"]) == (1, 502)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]}]},
            "messages",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_before_anybody_is_called(client: OpenAI, web: QwenWebUpstream, given: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**{"model": "web/qwen3-max", "messages": HELLO} | given)
    assert raised.value.param == param
    assert web.posts == []


def test_its_policy_must_be_accepted(sluice: Sluice, web: QwenWebUpstream) -> None:
    with pytest.raises(CommandFailed, match="is restricted"):
        add(sluice, "web-not-accepted", web.base_url, "sk-sim-ok")


def test_its_models_are_listed(client: OpenAI) -> None:
    assert {"web/qwen3-max", "web/qwen3-coder-plus"} <= {model.id for model in client.models.list()}
