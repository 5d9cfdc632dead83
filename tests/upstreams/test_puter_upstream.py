"""The simulated Puter refuses and spoils what the real one does: else what the adapter avoids would prove nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.upstreams.puter import PuterUpstream, Refused, complaint_of, vendor_request

HELLO = [{"role": "user", "content": "Hi there"}]
CALLS = [{"id": one, "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}} for one in ("a", "b")]
RESULTS = [{"role": "tool", "tool_call_id": one, "content": "R"} for one in ("a", "b")]


@pytest.fixture(scope="module")
def puter_server() -> Iterator[PuterUpstream]:
    with PuterUpstream() as puter:
        yield puter


@pytest.fixture
def puter(puter_server: PuterUpstream) -> PuterUpstream:
    puter_server.reset()
    return puter_server


def ask(puter: PuterUpstream, token: str = "puter-sim-ok", **changes: Any) -> httpx.Response:
    args = {"model": "gpt-4o-mini", "messages": HELLO, **changes.pop("args", {})}
    body = {"interface": "puter-chat-completion", "method": "complete", "args": args, **changes}
    return httpx.post(f"{puter.base_url}/drivers/call", json=body, headers={"authorization": f"Bearer {token}"} if token else {})


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({}, 200, None),
        ({"driver": "ai-chat"}, 200, None),
        ({"token": ""}, 401, "token_missing"),
        ({"token": "someone"}, 401, "token_auth_failed"),
        ({"driver": "openrouter"}, 404, "not_found"),
        ({"interface": 1}, 400, "bad_request"),
        ({"method": "list-all"}, 404, "not_found"),
        ({"args": {"messages": "Hi"}}, 400, "bad_request"),
        ({"args": {"messages": [{"role": "user", "content": ""}]}}, 400, "bad_request"),
        ({"args": {"model": "nobody"}}, 400, "bad_request"),
        ({"args": {"model": "openrouter/auto"}}, 400, "field_invalid"),
    ],
)
def test_what_it_takes(puter: PuterUpstream, changes: dict[str, Any], status: int, code: str | None):
    answer = ask(puter, **changes)
    assert (answer.status_code, answer.json().get("code")) == (status, code)


def test_the_drivers_of_2025_are_a_switch(puter: PuterUpstream):
    puter.legacy_drivers = True
    assert ask(puter, driver="openrouter").status_code == 200


def test_what_the_server_makes_of_calls_as_openai_writes_them():
    """Rule 3: encoded twice, the wrong way round; and the vendor refuses it."""
    sent = vendor_request(
        {"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": CALLS}, *RESULTS]}, "openai-completion"
    )
    calls = sent["messages"][1]["tool_calls"]

    assert [one["id"] for one in calls] == ["b", "a"]
    assert calls[0]["function"]["arguments"] == '"{\\"n\\": 1}"'
    assert complaint_of(sent) == "Invalid arguments: they were encoded twice."


def test_of_several_calls_in_blocks_the_responses_route_keeps_one():
    """Rule 5."""
    blocks = [{"type": "text", "text": "lost"}, *({"type": "tool_use", "id": one, "name": "f", "input": {"n": 1}} for one in ("a", "b"))]
    messages = [*HELLO, {"role": "assistant", "content": blocks}, *RESULTS]

    assert [
        len(vendor_request({"messages": messages}, route)["messages"][1]["tool_calls"]) for route in ("openai-responses", "deepseek")
    ] == [1, 2]
    assert vendor_request({"messages": messages}, "deepseek")["messages"][1]["content"] is None
    assert complaint_of(vendor_request({"messages": messages}, "openai-responses")) is not None


def test_claude_reads_the_first_system_message_alone():
    """Rules 7 and 8: neighbours are merged before."""
    messages = [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, *HELLO, {"role": "system", "content": "c"}]
    sent = vendor_request({"messages": messages}, "claude")

    assert sent["system"] == [{"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert complaint_of(sent) is None


@pytest.mark.parametrize(
    ("messages", "route", "refused"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}], "claude", True),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}], "openrouter", False),
        ([{"role": "user", "content": [{"type": "image", "source": {}}]}], "openrouter", True),
        ([{"role": "user", "content": " "}], "claude", True),
        ([{"role": "assistant", "content": "x"}], "claude", True),
        ([{"role": "assistant", "content": "x"}], "openrouter", False),
        ([*HELLO, RESULTS[0]], "openrouter", True),
        ([*HELLO, RESULTS[0]], "claude", True),
    ],
)
def test_what_the_vendors_refuse(messages: list[Any], route: str, refused: bool):
    assert (complaint_of(vendor_request({"messages": messages}, route)) is not None) is refused


@pytest.mark.parametrize("content", [None, ""])
def test_an_empty_message_is_refused_and_an_empty_list_vanishes(content: Any):
    with pytest.raises(Refused):
        vendor_request({"messages": [{"role": "user", "content": content}]}, "claude")
    assert vendor_request({"messages": [{"role": "user", "content": []}]}, "claude")["messages"] == []


@pytest.mark.parametrize(
    ("args", "route"),
    [
        ({"model": "openrouter:anthropic/claude-haiku-4.5"}, "claude"),
        ({"model": "Claude-Haiku-4-5 "}, "claude"),
        ({"model": "claude-haiku-4-5", "provider": "openrouter"}, "openrouter"),
        ({"model": "claude-haiku-4-5", "provider": "xai"}, "claude"),
    ],
)
def test_a_vendor_goes_before_a_reseller_unless_it_is_pinned(puter: PuterUpstream, args: dict[str, Any], route: str):
    assert ask(puter, args=args).json()["metadata"]["service_used"] == route


@pytest.mark.parametrize(("errors", "status"), [("gen3", 402), ("gen2", 200), ("gen2_string", 200), ("gen1", 200)])
def test_credit_runs_out(puter: PuterUpstream, errors: str, status: int):
    puter.errors, puter.credit = errors, {"puter-sim-ok": 5}

    assert ask(puter).json()["success"] is True
    assert puter.credit["puter-sim-ok"] == 5 - 2 - 3
    answer = ask(puter)
    assert answer.status_code == status
    assert "echo" not in answer.text


def test_a_stream_is_lines_and_ends_with_its_usage(puter: PuterUpstream):
    answer = ask(puter, args={"stream": True})

    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [one.split('"')[3] for one in answer.text.splitlines()] == ["text", "text", "text", "usage"]
