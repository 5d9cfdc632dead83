"""What passes through untouched, in both directions, and what never passes at all."""

from __future__ import annotations

import json
import uuid
from typing import Any

import httpx
import pytest

from tests.conftest import Accounts
from tests.serving import Sluice
from tests.upstreams.openai import DONE, OpenAIUpstream, Step

HELLO = [{"role": "user", "content": "Hello there"}]
USAGE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


@pytest.fixture
def client(sluice: Sluice, sim: str, upstream: OpenAIUpstream) -> httpx.Client:
    return httpx.Client(base_url=f"{sluice.url}/v1", headers={"authorization": f"Bearer {sluice.issue_key()}"}, timeout=20)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "sim/gpt-4o", "messages": HELLO, **fields}


def raw_stream(client: httpx.Client, body: dict[str, Any], path: str = "chat/completions") -> tuple[httpx.Response, bytes]:
    with client.stream("POST", path, json=body) as answer:
        return answer, b"".join(answer.iter_raw())


# Requests


def test_every_field_of_a_request_goes_on_as_it_was(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    body = chat(
        temperature=0,
        top_p=1.0,
        seed=9223372036854775807,
        user='ü \u2028 \U0001d11e " \\ /',
        metadata={"a": None, "b": [], "c": {}},
        from_tomorrow={"deep": [{"deeper": [1, -0.0, 1e300, True, None, "x"]}]},
        max_tokens=None,
        n=None,
    )
    client.post("chat/completions", json=body).raise_for_status()

    assert upstream.last.json == {**body, "model": "gpt-4o"}
    assert list(upstream.last.json) == list(body)
    assert upstream.last.unknown_fields == {"from_tomorrow": body["from_tomorrow"]}


def test_of_a_key_given_twice_the_last_wins(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    raw = b'{"model":"sim/nothing","messages":[],"model":"sim/gpt-4o","messages":[{"role":"user","content":"x"}]}'
    client.post("chat/completions", content=raw, headers={"content-type": "application/json"}).raise_for_status()

    assert upstream.last.json == {"model": "gpt-4o", "messages": [{"role": "user", "content": "x"}]}


def test_only_our_own_headers_reach_the_upstream(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    theirs = {
        "cookie": "session=secret",
        "x-forwarded-for": "10.0.0.1",
        "x-stainless-lang": "python",
        "openai-organization": "someone-elses",
        "idempotency-key": "abc",
        "x-request-id": "chosen-by-the-client",
        "connection": "keep-alive, authorization",
    }
    answer = client.post("chat/completions", json=chat(), headers=theirs)

    assert answer.status_code == 200
    [seen] = upstream.calls(answer.headers["x-request-id"])
    assert set(seen.headers) == {
        "host",
        "user-agent",
        "content-type",
        "authorization",
        "accept",
        "accept-encoding",
        "x-request-id",
        "content-length",
    }
    assert seen.headers["authorization"] == "Bearer sk-sim-ok"
    assert seen.headers["user-agent"].startswith("sluice/")


def test_the_request_id_is_ours_and_new_each_time(client: httpx.Client) -> None:
    ids = {client.post("chat/completions", json=chat()).headers["x-request-id"] for _ in range(3)}

    assert len(ids) == 3
    assert {uuid.UUID(one).version for one in ids} == {7}


def test_connections_to_the_upstream_are_kept(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    for stream in (False, True, False, True):
        assert client.post("chat/completions", json=chat(stream=stream)).status_code == 200

    assert len({seen.connection for seen in upstream.posts}) == 1


# Whole answers


def test_a_whole_answer_comes_back_byte_for_byte(client: httpx.Client, upstream: OpenAIUpstream, accounts: Accounts) -> None:
    body = (
        b'{ "id" : "x",\n\t"choices":[ {"index":0,"message":{"role":"assistant","content":"a \\u00fc \xc3\xbc b"},'
        b'"finish_reason":"from_tomorrow" } ], "usage":{"prompt_tokens":2,"completion_tokens":3,"new_tokens":7}, "new":[1.0,1e2,{}]}\n'
    )
    upstream.script(Step(body=body, usage=USAGE))
    answer = client.post("chat/completions", json=chat())

    assert answer.content == body
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(body)
    accounts.of(answer.headers["x-request-id"])


def test_no_header_of_the_upstream_reaches_the_client(client: httpx.Client) -> None:
    for stream in (False, True):
        answer, _ = raw_stream(client, chat(stream=stream))
        assert {name for name in answer.headers if name not in ("connection", "transfer-encoding", "content-length")} == {
            "content-type",
            "x-request-id",
            "access-control-allow-origin",
            "access-control-expose-headers",
        } | ({"cache-control", "x-accel-buffering"} if stream else set())


# Streams

ODD = [
    b": OPENROUTER PROCESSING\n\n",
    b'data: {"id":"1", "choices":[{"index":0,"delta":{"role":"assistant","content":""}}],  "new": {"a":1.0}}\n\n',
    b'data:{"id":"1","choices":[{"index":0,"delta":{"content":"one "}}]}\n\n\n',
    b'event: chunk\nid: 7\nretry: 10\ndata:   {"id" : "1" ,"choices":[{"index":0,"delta":{"content":"tw\xc3\xb6 \\u00fc"}}],"p":1}  \n\n',
    b'data: {"id":"1","choices":[{"index":0,"delta":{},"finish_reason":""}]}\r\n\r\n',
    b'data: {"id":"1",\ndata: "choices":[{"index":0,"delta":{"content":" three"},"logprobs":null,"from_tomorrow":[]}]}\n\n',
    b": comment in the middle\n\n",
    b'data: {"id":"1","choices":[{"index":0,"delta":{},"finish_reason":"stop","matched_stop":107}],"usage":null}\n\n',
]  # fmt: skip
USAGE_EVENT = b'data: {"id":"1","choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3,"total_tokens":5},"new":1}\n\n'


@pytest.mark.parametrize("scenario", ["ok", "coalesced", "chunk_splits_frame", "split_utf8"])
@pytest.mark.parametrize("wants_usage", [False, True])
def test_a_stream_comes_back_byte_for_byte(
    client: httpx.Client, upstream: OpenAIUpstream, accounts: Accounts, scenario: str, wants_usage: bool
) -> None:
    """All but the usage event that we asked for and the client did not."""
    upstream.script(Step(scenario=scenario, frames=[*ODD, USAGE_EVENT, DONE], usage=USAGE))
    options = {"stream_options": {"include_usage": True}} if wants_usage else {}
    answer, came = raw_stream(client, chat(stream=True, **options))

    assert came == b"".join([*ODD, USAGE_EVENT, DONE] if wants_usage else [*ODD, DONE])
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    accounts.of(answer.headers["x-request-id"])


def test_usage_inside_the_last_chunk_is_read_and_left_there(client: httpx.Client, upstream: OpenAIUpstream, accounts: Accounts) -> None:
    frames = [
        b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}],"usage":{"prompt_tokens":2,"completion_tokens":1}}\n\n',
        b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop","usage":{"prompt_tokens":2,"completion_tokens":3}}]}\n\n',
        DONE,
    ]
    upstream.script(Step(frames=frames, usage=USAGE))
    answer, came = raw_stream(client, chat(stream=True))

    assert came == b"".join(frames)
    accounts.of(answer.headers["x-request-id"])


def test_the_clients_own_stream_options_are_kept(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    raw_stream(client, chat(stream=True, stream_options={"include_obfuscation": False}))
    assert upstream.last.json["stream_options"] == {"include_obfuscation": False, "include_usage": True}

    _, came = raw_stream(client, chat(stream=True, stream_options={"include_usage": False}))
    assert upstream.last.json["stream_options"] == {"include_usage": True}
    assert b'"choices":[]' not in came


def test_an_upstream_that_refuses_the_usage_option_is_asked_without_it(
    client: httpx.Client, sluice: Sluice, upstream: OpenAIUpstream
) -> None:
    body = chat(model="sim/sim-no_usage_option", stream=True)
    first, came = raw_stream(client, body)
    second, _ = raw_stream(client, body)

    assert came.endswith(DONE)
    assert [("stream_options" in seen.json) for seen in upstream.posts] == [True, False, False]
    for answer in (first, second):
        row = sluice.row(answer.headers["x-request-id"])
        assert (row["status"], row["usage_source"]) == (200, "estimated")
        assert 3 <= row["output_tokens"] <= 4  # one an event that says something, the last of which is the finish reason
        assert row["cost_usd"] > 0
        assert upstream.bill(row["request_id"]).posts == 1


def test_a_client_that_asks_for_usage_is_told_when_the_upstream_refuses_it(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    answer = client.post(
        "chat/completions", json=chat(model="sim/sim-no_usage_option~2", stream=True, stream_options={"include_usage": True})
    )

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "stream_options"
    assert len(upstream.posts) == 1


def test_a_stream_lost_after_its_last_event_ends_clean(client: httpx.Client, accounts: Accounts) -> None:
    answer, came = raw_stream(client, chat(model="sim/sim-reset_after", stream=True))

    assert came.endswith(DONE)
    assert b'"error"' not in came
    accounts.of(answer.headers["x-request-id"])


@pytest.mark.parametrize("together", [False, True])
def test_what_came_before_an_error_is_not_lost_with_it(
    client: httpx.Client, sluice: Sluice, upstream: OpenAIUpstream, together: bool
) -> None:
    """However the network cut them into reads; and at once, though the upstream keeps the connection open."""
    frames = [ODD[1], ODD[2], upstream.error_frame(), b": and then silence\n\n"]
    upstream.script(Step(scenario="stall", frames=[b"".join(frames), b"", b"", b""] if together else frames))
    answer, came = raw_stream(client, chat(stream=True))

    assert came.startswith(ODD[1] + ODD[2])
    [error] = came.removeprefix(ODD[1] + ODD[2]).strip().split(b"\n\n")
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "The server had an error in the middle."
    row = sluice.row(answer.headers["x-request-id"])
    assert (row["status"], row["attempts"], row["usage_source"]) == (502, 1, "estimated")


def test_a_failed_response_says_so_without_the_upstreams_secrets(client: httpx.Client) -> None:
    _, came = raw_stream(client, {"model": "sim/sim-failed", "input": "Hello", "stream": True}, "responses")

    last = came.strip().split(b"\n\n")[-1]
    assert last.startswith(b"event: response.failed\n")
    assert json.loads(last.split(b"data: ", 1)[1])["response"]["error"]["code"] == "server_error"
    assert b"sk-proj" not in came


# What never passes


@pytest.mark.parametrize("name", ["api_base", "base_url", "api_key", "headers", "extra_headers", "extra_query", "extra_body", "proxy"])
def test_where_to_connect_and_with_what_secret_is_not_the_clients_to_say(
    client: httpx.Client, sluice: Sluice, upstream: OpenAIUpstream, name: str
) -> None:
    answer = client.post("chat/completions", json=chat(**{name: "http://127.0.0.1:1"}))

    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": f"'{name}' may not be set by the client.",
        "type": "invalid_request_error",
        "param": name,
        "code": "unsupported_parameter",
    }
    assert upstream.posts == []
    assert sluice.rows(answer.headers["x-request-id"]) == []


def test_a_redirect_is_not_followed(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    answer = client.post("chat/completions", json=chat(model="sim/sim-redirect"))

    assert answer.status_code == 502
    assert [seen.path for seen in upstream.posts] == ["/v1/chat/completions"]
    assert "location" not in answer.headers
