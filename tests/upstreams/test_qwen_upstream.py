"""The simulated Qwen is strict where the real one is: signing in, tokens that rotate, and who may call."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.upstreams.qwen import SCOPE, QwenUpstream

VERIFIER = "v" * 43
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()
CHAT: Any = {"model": "coder-model", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[QwenUpstream]:
    with QwenUpstream() as server:
        yield server


@pytest.fixture
def qwen(server: QwenUpstream) -> QwenUpstream:
    server.reset()
    server.polls_before_approval, server.rotate, server.clock_offset_seconds, server.resource_url = 0, True, 0, None
    return server


def begin(qwen: QwenUpstream, **changes: str) -> httpx.Response:
    form = {"client_id": "sim-client", "scope": SCOPE, "code_challenge": CHALLENGE, "code_challenge_method": "S256"} | changes
    return httpx.post(qwen.oauth_settings["device_code_url"], data=form)


def poll(qwen: QwenUpstream, device_code: str, verifier: str = VERIFIER) -> tuple[int, Any]:
    form = {"grant_type": "urn:ietf:params:oauth:grant-type:device_code", "client_id": "sim-client"}
    return said(httpx.post(qwen.oauth_settings["token_url"], data={**form, "device_code": device_code, "code_verifier": verifier}))


def refresh(qwen: QwenUpstream, token: str) -> tuple[int, Any]:
    form = {"grant_type": "refresh_token", "refresh_token": token, "client_id": "sim-client"}
    return said(httpx.post(qwen.oauth_settings["token_url"], data=form))


def said(answer: httpx.Response) -> tuple[int, Any]:
    reply = answer.json()
    return answer.status_code, reply.get("error") or reply


def chat(qwen: QwenUpstream, token: str, path: str = "/v1", **body: Any) -> httpx.Response:
    return httpx.post(f"{qwen.origin}{path}/chat/completions", json=CHAT | body, headers={"authorization": f"Bearer {token}"})


def test_a_device_signs_in_once_somebody_approves(qwen: QwenUpstream):
    """Q1."""
    code = begin(qwen).json()
    assert poll(qwen, code["device_code"]) == (400, "authorization_pending")
    assert httpx.get(code["verification_uri_complete"]).status_code == 200
    status, reply = poll(qwen, code["device_code"])
    assert (status, reply["resource_url"], reply["expires_in"]) == (200, qwen.origin, 21_600)
    assert chat(qwen, reply["access_token"]).json()["choices"][0]["message"]["content"] == "echo: Hello"
    assert poll(qwen, code["device_code"]) == (401, "invalid_grant")


def test_a_device_waits_for_as_many_polls_as_it_is_told(qwen: QwenUpstream):
    """Q1."""
    qwen.polls_before_approval = 2
    qwen.script_tokens("ok", "slow_down")
    code = begin(qwen).json()["device_code"]
    statuses = [poll(qwen, code) for _ in range(4)]
    assert statuses[:3] == [(400, "authorization_pending"), (429, "slow_down"), (400, "authorization_pending")]
    assert statuses[3][0] == 200


def test_a_device_that_is_late_or_not_itself_gets_nothing(qwen: QwenUpstream):
    """Q2."""
    code = begin(qwen).json()["device_code"]
    assert poll(qwen, code, "another verifier") == (400, "invalid_grant")
    assert poll(qwen, "dev-sim-none") == (401, "invalid_grant")
    qwen.clock_offset_seconds = 901
    assert poll(qwen, code) == (400, "expired_token")
    qwen.script_tokens("access_denied", "401")
    assert [poll(qwen, code), poll(qwen, code)] == [(400, "access_denied"), (401, "invalid_client")]


@pytest.mark.parametrize("changes", [{"client_id": ""}, {"code_challenge": "x"}, {"code_challenge_method": "plain"}, {"scope": "all"}])
def test_a_device_code_wants_a_client_a_challenge_and_the_scope(qwen: QwenUpstream, changes: dict[str, str]):
    assert begin(qwen, **changes).status_code == 400


def test_a_refresh_token_works_once_and_a_second_time_ends_the_family(qwen: QwenUpstream):
    first = qwen.issue()
    _, second = refresh(qwen, first["refresh_token"])
    assert second["refresh_token"] != first["refresh_token"]
    assert chat(qwen, second["access_token"]).status_code == 200
    assert refresh(qwen, first["refresh_token"]) == (400, "invalid_grant")
    assert refresh(qwen, second["refresh_token"]) == (400, "invalid_grant")
    assert chat(qwen, second["access_token"]).status_code == 401
    assert qwen.refreshes == 1


def test_refreshes_that_keep_quiet_or_fail(qwen: QwenUpstream):
    """Q4, Q5."""
    qwen.script_tokens("no_resource_url", "no_refresh_token", "500", "error_200")
    token = qwen.issue()["refresh_token"]
    _, reply = refresh(qwen, token)
    assert "resource_url" not in reply
    assert "refresh_token" not in refresh(qwen, reply["refresh_token"])[1]
    assert [refresh(qwen, "x"), refresh(qwen, "x")] == [(500, "server_error"), (200, "server_error")]
    qwen.rotate = False
    token = qwen.issue()["refresh_token"]
    assert [refresh(qwen, token)[0], refresh(qwen, token)[0]] == [200, 200]


def test_who_may_call_what(qwen: QwenUpstream):
    token = qwen.issue()["access_token"]
    assert chat(qwen, token, "/compatible-mode/v1").status_code == 401
    assert chat(qwen, "sk-sim-ok", "/compatible-mode/v1").status_code == 200
    assert chat(qwen, "sk-sim-ok").status_code == 200  # the Coding Plan has the portal's path
    qwen.clock_offset_seconds = 21_601
    assert chat(qwen, token).json()["error"]["message"] == "invalid access token or token expired"


def test_its_credential_file_is_as_the_tool_writes_it(qwen: QwenUpstream):
    kept = json.loads(qwen.credential_file())
    assert kept.keys() == {"access_token", "refresh_token", "token_type", "resource_url", "expiry_date"}
    assert kept["expiry_date"] > 1e12


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, *CHAT["messages"]]},
        {"messages": [*CHAT["messages"], {"role": "system", "content": "a"}]},
        {"messages": [{"role": "developer", "content": "a"}, *CHAT["messages"]]},
        {"tools": []},
        {"n": 2},
        {"max_tokens": 70_000},
        {"stream_options": {"include_usage": True}},
        {"model": "qwen-thinking", "enable_thinking": False},
        {"tools": [{"type": "function"}], "tool_choice": "required"},
        {"response_format": {"type": "json_object"}, "enable_thinking": True},
        {"model": "qwen3.8-max", "reasoning_effort": "low", "enable_thinking": True},
    ],
)
def test_what_it_refuses(qwen: QwenUpstream, body: Any):
    answer = chat(qwen, "sk-sim-ok", **body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_parameter_error")


def test_usage_comes_only_where_it_was_asked_for(qwen: QwenUpstream):
    assert "prompt_tokens" not in chat(qwen, "sk-sim-ok", stream=True).text
    assert "prompt_tokens" in chat(qwen, "sk-sim-ok", stream=True, stream_options={"include_usage": True}).text
