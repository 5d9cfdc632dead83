"""The same calls, rows and restarts on each database that Sluice runs on."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serving import Sluice, eventually
from tests.upstreams.openai import DONE, OpenAIUpstream, Step

BODY: dict[str, Any] = {"model": "db/gpt-4o", "messages": [{"role": "user", "content": "Hello there"}]}


@pytest.fixture
def server(sluice_on: Sluice, upstream: OpenAIUpstream) -> Sluice:
    if "True" not in sluice_on.python("from providers.models import Price; print(Price.objects.filter(pattern='db/*').exists())"):
        sluice_on.set_price("db/*", input=3, output=15)
        sluice_on.add_openai(upstream, prefix="db")
    sluice_on.wait_for("db")
    return sluice_on


def call(server: Sluice, key: str, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/chat/completions", headers=headers, json={**BODY, **fields}, timeout=20)


def test_calls_and_their_rows(server: Sluice) -> None:
    key = server.issue_key()
    whole, stream = call(server, key), call(server, key, stream=True)

    assert stream.content.endswith(DONE)
    for answer in (whole, stream):
        row = server.row(answer.headers["x-request-id"])
        assert (row["status"], row["input_tokens"], row["output_tokens"]) == (200, 2, 3)
        assert row["cost_usd"] == pytest.approx(51e-6)


def test_a_budget_outlives_a_restart(server: Sluice) -> None:
    key = server.issue_key(budget="0.0007", window="total")
    first = call(server, key, max_tokens=5)
    key_id = server.row(first.headers["x-request-id"])["key"]
    assert server.stop() == 0
    server.start_again()
    answers = [call(server, key, max_tokens=5).status_code for _ in range(15)]

    assert first.status_code == 200
    assert answers[0] == 200
    assert answers[-1] == 429
    spent = sum(row["cost_usd"] for row in server.usage() if row["key"] == key_id)
    assert spent <= 0.0007


def test_what_a_killed_server_was_doing_becomes_a_row(server: Sluice, upstream: OpenAIUpstream) -> None:
    upstream.script(Step(text="word " * 100, delay_frame_ms=50))
    headers = {"authorization": f"Bearer {server.issue_key()}"}
    with (
        pytest.raises(httpx.TransportError),
        httpx.stream("POST", f"{server.url}/v1/chat/completions", headers=headers, json={**BODY, "stream": True}) as answer,
    ):
        request_id = answer.headers["x-request-id"]
        for number, _ in enumerate(answer.iter_raw()):
            if number == 2:
                server.kill9()
    server.start_again()

    row = eventually(lambda: next(iter(server.rows(request_id)), None), "no row")
    assert (row["error"], row["usage_source"], row["attempts"]) == ("interrupted", "estimated", 1)
    assert row["cost_usd"] > 0
