"""The simulated OpenAI refuses what OpenAI refuses: one that accepts anything would prove nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving import eventually
from tests.upstreams.kit import Bill, Step
from tests.upstreams.openai import OpenAIUpstream

HI: list[dict[str, Any]] = [{"role": "user", "content": "hi there"}]
CALLS = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.fixture
def client(upstream: OpenAIUpstream) -> Iterator[httpx.Client]:
    headers = {"authorization": "Bearer sk-sim-ok", "x-request-id": "test"}
    with httpx.Client(base_url=upstream.base_url, headers=headers, timeout=5) as client:
        yield client


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": HI, **fields}


REFUSED: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    (chat(model="gpt-unknown"), 404, "model_not_found", "model"),
    (chat(model="o3", max_tokens=5), 400, "unsupported_parameter", "max_tokens"),
    (chat(model="o3", temperature=0.7), 400, "unsupported_value", "temperature"),
    (chat(max_tokens=5, max_completion_tokens=5), 400, None, "max_tokens"),
    (chat(n=200), 400, "integer_out_of_range", "n"),
    (chat(temperature=3), 400, "decimal_above_max_value", "temperature"),
    (chat(stream_options={"include_usage": True}), 400, None, "stream_options"),
    (chat(messages=[]), 400, "empty_array", "messages"),
    (chat(messages=[{"role": "robot", "content": "x"}]), 400, "invalid_value", "messages[0].role"),
    (chat(messages=[*HI, {"role": "tool", "tool_call_id": "call_1", "content": "x"}]), 400, None, "messages.[1].role"),
    (chat(messages=[*HI, {"role": "assistant", "tool_calls": CALLS}]), 400, None, "messages"),
    (chat(messages=[*HI, {"role": "assistant", "tool_calls": CALLS}, *HI]), 400, None, "messages.[2].role"),
    (chat(tools=None), 400, "invalid_type", "tools"),
    (chat(stream="yes"), 400, "invalid_type", "stream"),
    ({"messages": HI}, 400, None, None),
    ({"model": "gpt-4o"}, 400, "missing_required_parameter", "messages"),
]


@pytest.mark.parametrize(("body", "status", "code", "param"), REFUSED, ids=[str(case[2] or case[3]) for case in REFUSED])
def test_a_bad_request_is_refused(
    client: httpx.Client, upstream: OpenAIUpstream, body: dict[str, Any], status: int, code: str | None, param: str | None
) -> None:
    answer = client.post("chat/completions", json=body)

    assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) == (status, code, param)
    assert upstream.bill("test") == Bill()


def test_keys_paths_methods_and_types_are_checked(client: httpx.Client) -> None:
    assert client.post("chat/completions", json=chat(), headers={"authorization": "Bearer sk-other"}).status_code == 401
    assert client.post("chat/completions", json=chat(), headers={"authorization": "sk-sim-ok"}).status_code == 401
    assert client.post("chat/completion", json=chat()).status_code == 404
    assert client.get("chat/completions").status_code == 405
    assert client.post("chat/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 400
    assert client.post("chat/completions", content=b"{", headers={"content-type": "application/json"}).status_code == 400


def test_the_bill_counts_words_once_per_executed_post(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    client.post("chat/completions", json=chat())
    client.post("chat/completions", json=chat(stream=True))
    client.post("chat/completions", json=chat(model="sim-429"))

    assert upstream.bill("test") == Bill(posts=2, input_tokens=4, output_tokens=6)
    assert [seen.scenario for seen in upstream.calls("test")] == ["ok", "ok", "429"]


def test_a_stream_that_is_left_is_billed_as_far_as_it_went(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    upstream.script(Step(text="word " * 50, delay_frame_ms=20))
    with client.stream("POST", "chat/completions", json=chat(stream=True)) as answer:
        for count, _ in enumerate(answer.iter_raw()):
            if count == 4:
                break

    eventually(lambda: upstream.last.peer_left_at is not None, "it did not notice")
    assert 3 <= upstream.bill("test").output_tokens <= 8


def test_the_control_plane(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    client.post(f"{upstream.origin}/__sim/script", json={"steps": [{"text": "scripted"}, {"scenario": "503"}]}).raise_for_status()
    assert client.post("chat/completions", json=chat(odd=1)).json()["choices"][0]["message"]["content"] == "scripted"
    assert client.post("chat/completions", json=chat()).status_code == 503

    state = client.get(f"{upstream.origin}/__sim/state").json()
    log = client.get(f"{upstream.origin}/__sim/log").json()
    assert (state["posts"], state["input_tokens"], state["output_tokens"]) == (1, 2, 1)
    assert [(seen["scenario"], seen["unknown_fields"]) for seen in log] == [("ok", {"odd": 1}), ("503", {})]

    client.post(f"{upstream.origin}/__sim/reset").raise_for_status()
    assert client.get(f"{upstream.origin}/__sim/state").json()["posts"] == 0
    assert client.get(f"{upstream.origin}/__sim/log").json() == []
