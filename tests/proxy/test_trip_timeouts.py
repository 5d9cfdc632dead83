"""Upstreams that are slow, silent or endless, against a server whose timeouts are fractions of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.serving import Sluice, eventually
from tests.upstreams.openai import DONE, OpenAIUpstream, Step

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello there"}]}
BEAT = b": keep-alive\n\n"


@pytest.fixture(scope="module")
def quick(serve: Callable[..., Sluice], upstream_server: OpenAIUpstream) -> Sluice:
    sluice = serve(
        POOL_WAIT_SECONDS="0.1",
        CONNECT_SECONDS="0.2",
        FIRST_BYTE_SECONDS="0.6",
        HEARTBEAT_SECONDS="0.1",
        IDLE_SECONDS="0.5",
        TOTAL_SECONDS="4",
    )
    sluice.add_openai(upstream_server, prefix="sim", secret="sk-sim-ok")
    sluice.add_openai(upstream_server, prefix="pool", label="slow", secret="sk-sim-slow_headers", priority=10)
    sluice.add_openai(upstream_server, prefix="pool", label="well", secret="sk-sim-ok")
    sluice.wait_for("pool")
    return sluice


@pytest.fixture
def client(quick: Sluice, upstream: OpenAIUpstream) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{quick.url}/v1", headers={"authorization": f"Bearer {quick.issue_key()}"}, timeout=20) as client:
        yield client


def ask(client: httpx.Client, model: str, *, stream: bool) -> httpx.Response:
    return client.post("chat/completions", json={**BODY, "model": model, "stream": stream})


def by_its_own_timer(quick: Sluice, answer: httpx.Response) -> None:
    """Long before the total of 4 s, which would say the same."""
    assert quick.row(answer.headers["x-request-id"])["duration_ms"] < 3000


def left(upstream: OpenAIUpstream) -> bool:
    return bool(eventually(lambda: upstream.posts[0].peer_left_at is not None, "the upstream goes on", seconds=1))


def test_comments_fill_the_silence_before_the_first_word(client: httpx.Client, quick: Sluice, upstream: OpenAIUpstream) -> None:
    upstream.script(Step(text="at last", delay_first_ms=350))
    answer = ask(client, "sim/gpt-4o", stream=True)

    assert answer.content.startswith(BEAT)
    assert 2 <= answer.content.count(BEAT) <= 4
    assert answer.content.endswith(DONE)
    assert b"error" not in answer.content
    row = quick.row(answer.headers["x-request-id"])
    assert (row["status"], row["usage_source"]) == (200, "reported")
    assert row["first_byte_ms"] < 350  # the upstream's head came at once


def test_comments_fill_the_silence_between_words(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    upstream.script(Step(text="one two", delay_frame_ms=250))
    events = ask(client, "sim/gpt-4o", stream=True).content.split(b"\n\n")

    beats = [place for place, event in enumerate(events) if event == b": keep-alive"]
    first_word = next(place for place, event in enumerate(events) if b'"one"' in event)
    assert any(place > first_word for place in beats)
    assert all(event.startswith((b"data: ", b": keep-alive")) for event in events if event)


def test_the_sdk_reads_past_comments(quick: Sluice, upstream: OpenAIUpstream) -> None:
    upstream.script(Step(text="at last", delay_first_ms=350))
    client = OpenAI(api_key=quick.issue_key(), base_url=f"{quick.url}/v1", max_retries=0)
    stream = client.chat.completions.create(model="sim/gpt-4o", messages=BODY["messages"], stream=True)

    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "at last"


def test_a_whole_answer_has_no_comments(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    upstream.script(Step(text="at last", delay_first_ms=350))
    answer = ask(client, "sim/gpt-4o", stream=False)

    assert answer.json()["choices"][0]["message"]["content"] == "at last"


def test_no_first_byte_in_time(client: httpx.Client, quick: Sluice, upstream: OpenAIUpstream) -> None:
    answer = ask(client, "sim/sim-slow_headers", stream=False)

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")
    assert left(upstream)
    by_its_own_timer(quick, answer)
    row = quick.row(answer.headers["x-request-id"])
    assert (row["status"], row["error"], row["usage_source"], row["attempts"]) == (504, "upstream_timeout", "estimated", 1)


def test_no_first_byte_in_time_for_a_stream_that_has_had_comments(client: httpx.Client, quick: Sluice) -> None:
    answer = ask(client, "sim/sim-slow_headers", stream=True)

    assert answer.status_code == 200
    *beats, last = answer.content.strip().split(b"\n\n")
    assert beats
    assert set(beats) == {b": keep-alive"}
    assert b'"code":"upstream_timeout"' in last
    assert quick.row(answer.headers["x-request-id"])["status"] == 504
    by_its_own_timer(quick, answer)


@pytest.mark.parametrize("scenario", ["stall", "slow_first"])
def test_silence_in_a_stream(client: httpx.Client, quick: Sluice, upstream: OpenAIUpstream, scenario: str) -> None:
    answer = ask(client, f"sim/sim-{scenario}", stream=True)

    last = answer.content.strip().split(b"\n\n")[-1]
    assert last.startswith(b'data: {"error":{')
    assert b'"code":"upstream_timeout"' in last
    assert b"[DONE]" not in answer.content
    assert left(upstream)
    by_its_own_timer(quick, answer)
    row = quick.row(answer.headers["x-request-id"])
    assert (row["error"], row["usage_source"]) == ("upstream_timeout", "estimated")


def test_silence_in_a_whole_answer(client: httpx.Client, quick: Sluice, upstream: OpenAIUpstream) -> None:
    answer = ask(client, "sim/sim-stall", stream=False)

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")
    assert left(upstream)
    by_its_own_timer(quick, answer)


def test_an_answer_that_never_ends(client: httpx.Client, quick: Sluice, upstream: OpenAIUpstream) -> None:
    """Each pause is short enough; all of them together are not."""
    upstream.script(Step(text="word " * 100, delay_frame_ms=200))
    answer = ask(client, "sim/gpt-4o", stream=True)

    assert answer.content.count(b'"word"') + answer.content.count(b'" word"') >= 5
    assert b'"code":"upstream_timeout"' in answer.content.strip().split(b"\n\n")[-1]
    assert left(upstream)
    assert quick.row(answer.headers["x-request-id"])["duration_ms"] >= 3900


def test_an_upstream_that_never_finishes_its_head(client: httpx.Client, quick: Sluice) -> None:
    answer = ask(client, "sim/sim-dribble_headers", stream=False)

    by_its_own_timer(quick, answer)

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")


def test_after_comments_alone_another_account_still_serves(client: httpx.Client, quick: Sluice, upstream: OpenAIUpstream) -> None:
    """A comment is not content: the client sees one clean stream."""
    answer = ask(client, "pool/gpt-4o", stream=True)

    assert answer.content.startswith(BEAT)
    assert answer.content.endswith(DONE)
    assert b"error" not in answer.content
    row = quick.row(answer.headers["x-request-id"])
    assert (row["status"], row["attempts"], row["credential"]) == (200, 2, "well")
    assert left(upstream)


def test_no_comment_follows_the_last_event(client: httpx.Client) -> None:
    """The upstream takes its time to close: three beats long."""
    assert ask(client, "sim/sim-late_end", stream=True).content.endswith(DONE)


def test_a_client_that_leaves_during_the_silence(quick: Sluice, upstream: OpenAIUpstream) -> None:
    headers = {"authorization": f"Bearer {quick.issue_key()}"}
    body = {**BODY, "model": "sim/sim-slow_headers", "stream": True}
    with httpx.stream("POST", f"{quick.url}/v1/chat/completions", headers=headers, json=body) as answer:
        assert next(answer.iter_raw()) == BEAT

    assert left(upstream)
    row = quick.row(answer.headers["x-request-id"])
    assert (row["status"], row["error"], row["attempts"]) == (499, "client_closed", 1)
