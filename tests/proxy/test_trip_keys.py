"""A caller's own upstream key, where the account allows it, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving import Sluice
from tests.upstreams.openai import OpenAIUpstream

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello there"}]}


@pytest.fixture(scope="module")
def own(sluice: Sluice, upstream_server: OpenAIUpstream) -> str:
    sluice.add_openai(upstream_server, label="own", prefix="own", secret="sk-sim-ok", pass_through=True)
    sluice.wait_for("own")
    return "own"


@pytest.fixture
def client(sluice: Sluice, sim: str, own: str, upstream: OpenAIUpstream) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{sluice.url}/v1", headers={"authorization": f"Bearer {sluice.issue_key()}"}, timeout=20) as client:
        yield client


@pytest.mark.parametrize("header", ["X-Upstream-Key", "x-openai-key"])
def test_the_callers_key_is_used_and_the_gateways_is_not(client: httpx.Client, upstream: OpenAIUpstream, header: str) -> None:
    answer = client.post("chat/completions", json={**BODY, "model": "own/gpt-4o"}, headers={header: "sk-sim-ok~callers"})

    assert answer.status_code == 200
    assert upstream.last.headers["authorization"] == "Bearer sk-sim-ok~callers"
    assert header.lower() not in upstream.last.headers


def test_without_it_the_gateways_own_is_used(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    assert client.post("chat/completions", json={**BODY, "model": "own/gpt-4o"}).status_code == 200
    assert upstream.last.headers["authorization"] == "Bearer sk-sim-ok"


def test_a_refused_callers_key_is_the_callers_to_mend(client: httpx.Client, sluice: Sluice) -> None:
    answer = client.post("chat/completions", json={**BODY, "model": "own/gpt-4o"}, headers={"X-Upstream-Key": "sk-sim-401~callers"})

    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "X-Upstream-Key" in answer.json()["error"]["message"]
    assert sluice.row(answer.headers["x-request-id"])["status"] == 401
    # It says nothing of the gateway's own account, which serves on.
    assert client.post("chat/completions", json={**BODY, "model": "own/gpt-4o"}).status_code == 200


def test_where_the_account_does_not_allow_it_nobody_is_called(client: httpx.Client, sluice: Sluice, upstream: OpenAIUpstream) -> None:
    answer = client.post("chat/completions", json={**BODY, "model": "sim/gpt-4o"}, headers={"X-Upstream-Key": "sk-sim-ok~callers"})

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "upstream_key_not_allowed"
    assert upstream.posts == []
    assert sluice.rows(answer.headers["x-request-id"]) == []


def test_it_is_no_way_around_an_issued_key(sluice: Sluice, own: str, upstream: OpenAIUpstream) -> None:
    answer = httpx.post(
        f"{sluice.url}/v1/chat/completions", json={**BODY, "model": "own/gpt-4o"}, headers={"X-Upstream-Key": "sk-sim-ok~callers"}
    )

    assert answer.status_code == 401
    assert upstream.posts == []
