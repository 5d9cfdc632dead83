"""The simulated Kimi refuses what Kimi refuses: one that accepts anything would prove nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.upstreams.kimi import REFUSALS, KimiUpstream
from tests.upstreams.kit import Bill, Step

HI: list[dict[str, Any]] = [{"role": "user", "content": "hi there"}]
CALLS = [{"id": "ls:0", "type": "function", "function": {"name": "ls", "arguments": "{}"}}]
RESULT = {"role": "tool", "tool_call_id": "ls:0", "content": "a"}


@pytest.fixture(scope="module")
def server() -> Iterator[KimiUpstream]:
    with KimiUpstream() as server:
        yield server


@pytest.fixture
def kimi(server: KimiUpstream) -> KimiUpstream:
    server.reset()
    return server


@pytest.fixture
def client(kimi: KimiUpstream) -> Iterator[httpx.Client]:
    headers = {"authorization": "Bearer sk-kimi-sim-ok", "x-request-id": "test", "user-agent": "sluice/0"}
    with httpx.Client(base_url=kimi.base_url, headers=headers, timeout=5) as client:
        yield client


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "kimi-for-coding", "messages": HI, **fields}


def turn(**message: Any) -> dict[str, Any]:
    return chat(messages=[*HI, {"role": "assistant", "tool_calls": CALLS, "reasoning_content": "", **message}, RESULT])


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **fields}}]


def image(url: str) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


REFUSED: list[tuple[dict[str, Any], str]] = [
    (chat(temperature=0.2), "only 1 is allowed"),
    (chat(thinking={"type": "disabled"}), "does not support disabled"),
    (chat(thinking={"type": "perhaps"}), "enabled or disabled"),
    (chat(thinking={"type": "enabled", "effort": "low"}), "invalid thinking effort"),
    (turn(reasoning_content=None), "reasoning_content is missing in assistant tool call message at index 1"),
    (turn(content=""), "text content is empty"),
    (turn(content=[{"type": "text", "text": ""}]), "text content is empty"),
    (chat(messages=[*HI, {"role": "assistant", "tool_calls": CALLS, "reasoning_content": ""}]), "must be followed"),
    (chat(messages=[*HI, RESULT]), "tool_call_id ls:0 not found"),
    (chat(messages=[{"role": "developer", "content": "x"}]), "invalid role"),
    (chat(messages=[]), "must not be empty"),
    (chat(messages=[{"role": "user", "content": "x" * (2 << 20)}]), "total message size"),
    (chat(messages=[{"role": "user", "content": [{"type": "file"}]}]), "unsupported content type"),
    (image("https://images.example.org/a.png"), "unsupported image url"),
    (chat(tools=function(parameters={"properties": {"a": {"description": "no type"}}})), "has no type"),
    (chat(tools=function(parameters={"properties": {"a": {"items": {}}}})), "has no type"),
    (chat(tools=function(parameters={"properties": {"a": {"$ref": "#/$defs/A"}}})), "$ref"),
    (chat(tools=function(strict=True)), "strict"),
    (chat(tools=function() * 2), "is duplicated"),
    (chat(tools=[{"type": "custom", "custom": {"name": "x"}}]), "invalid tool type"),
]


@pytest.mark.parametrize(("body", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_bad_request_is_refused(client: httpx.Client, kimi: KimiUpstream, body: dict[str, Any], words: str) -> None:
    answer = client.post("chat/completions", json=body)

    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert kimi.bill("test") == Bill()


@pytest.mark.parametrize(
    "body",
    [
        chat(temperature=1),
        chat(thinking={"type": "enabled", "keep": "all"}),
        chat(model="k3", thinking={"type": "enabled", "effort": "high"}),
        chat(model="kimi-k2.6", thinking={"type": "disabled"}),
        {**turn(reasoning_content=None), "model": "kimi-k2.6", "thinking": {"type": "disabled"}},
        turn(),
        image("ms://file"),
        image("data:image/png;base64,AA"),
        chat(tools=[{"type": "builtin_function", "function": {"name": "$web_search"}}]),
    ],
)
def test_what_keeps_to_the_rules_is_answered(client: httpx.Client, kimi: KimiUpstream, body: dict[str, Any]) -> None:
    answer = client.post("chat/completions", json=body)

    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "kimi-for-coding"
    assert kimi.last.unknown_fields == {}


def test_what_it_does_not_know_is_recorded_and_ignored(client: httpx.Client, kimi: KimiUpstream) -> None:
    assert client.post("chat/completions", json=chat(thinking=True, user="u")).status_code == 200

    assert kimi.last.unknown_fields == {"thinking": True, "user": "u"}


def test_keys_models_and_paths_are_checked(client: httpx.Client) -> None:
    assert client.post("chat/completions", json=chat(), headers={"authorization": "Bearer sk-other"}).status_code == 401
    for name in ("kimi-for-coding-thinking", "kimi-claude", "gpt-4o"):
        assert client.post("chat/completions", json=chat(model=name)).json()["error"]["type"] == "resource_not_found_error"
    for path in ("embeddings", "/v1/chat/completions"):
        assert client.post(path, json=chat()).json()["error"]["message"] == "method not found"


def test_the_gate_lets_in_those_that_it_knows(client: httpx.Client, kimi: KimiUpstream) -> None:
    kimi.gate = ["Friend/"]

    assert client.post("chat/completions", json=chat()).json()["error"]["type"] == "access_terminated_error"
    assert client.post("chat/completions", json=chat(), headers={"user-agent": "Friend/1"}).status_code == 200


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_each_refusal_can_be_had_by_a_key(client: httpx.Client, name: str) -> None:
    status, kind, message, headers = REFUSALS[name]
    answer = client.post("chat/completions", json=chat(), headers={"authorization": f"Bearer sk-kimi-sim-{name}~1"})

    assert (answer.status_code, answer.json()["error"].get("type", ""), answer.json()["error"]["message"]) == (status, kind, message)
    assert answer.headers.get("retry-after") == headers.get("retry-after")


def test_an_overload_passes(client: httpx.Client) -> None:
    key = {"authorization": "Bearer sk-kimi-sim-overload"}

    assert [client.post("chat/completions", json=chat(), headers=key).status_code for _ in range(3)] == [429, 200, 200]


def test_a_sign_in_takes_four_polls_and_a_refresh_token_serves_once(client: httpx.Client, kimi: KimiUpstream) -> None:
    def post(path: str, **form: str) -> httpx.Response:
        return client.post(f"{kimi.origin}/api/oauth/{path}", data={"client_id": "mine", **form})

    begun = post("device_authorization").json()
    grant = "urn:ietf:params:oauth:grant-type:device_code"
    polls = [post("token", grant_type=grant, device_code=begun["device_code"]) for _ in range(4)]
    assert [poll.json().get("error") for poll in polls] == ["authorization_pending", "authorization_pending", "slow_down", None]

    tokens = polls[-1].json()
    renewed = post("token", grant_type="refresh_token", refresh_token=tokens["refresh_token"])
    assert renewed.status_code == 200
    assert post("token", grant_type="refresh_token", refresh_token=tokens["refresh_token"]).json() == {"error": "invalid_grant"}
    token = {"authorization": f"Bearer {renewed.json()['access_token']}"}
    assert client.post("chat/completions", json=chat(), headers=token).status_code == 200

    kimi.refresh_is_down = True
    assert post("token", grant_type="refresh_token", refresh_token=renewed.json()["refresh_token"]).status_code == 503
    assert client.post(f"{kimi.origin}/api/oauth/token", data={}).status_code == 400


def test_where_usage_stands_can_be_chosen(client: httpx.Client, kimi: KimiUpstream) -> None:
    for place, whole, streamed in (("top", (True, False), 1), ("choice", (False, True), 1), ("none", (False, False), 0)):
        kimi.usage_place = place
        answer = client.post("chat/completions", json=chat()).json()
        assert ("usage" in answer, "usage" in answer["choices"][0]) == whole
        stream = client.post("chat/completions", json=chat(stream=True, stream_options={"include_usage": True})).text
        assert stream.count('"usage"') == streamed


def test_the_script_goes_before_the_key(client: httpx.Client, kimi: KimiUpstream) -> None:
    kimi.script(Step(text="first"))
    key = {"authorization": "Bearer sk-kimi-sim-quota"}

    assert client.post("chat/completions", json=chat(), headers=key).json()["choices"][0]["message"]["content"] == "first"
    assert client.post("chat/completions", json=chat(), headers=key).status_code == 429
