"""When the first account of a pool fails, the next one serves; and when it must not be tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import Accounts
from tests.serving import Sluice, free_port
from tests.upstreams.openai import DONE, OpenAIUpstream

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello there"}]}
UPSTREAMS_FAULT = [
    "401", "402", "403", "408", "429-rpm", "429-long", "429-quota", "500", "503", "reset", "close", "garbage", "html_502", "html_200",
    "empty_200", "bad_json_200", "redirect", "huge_header", "unreachable",
]  # fmt: skip
ONLY_STREAMS = ["abort_first", "eof_first", "eof_handshake", "error_first", "bad_frames_only"]
CLIENTS_FAULT = ["400", "400-context", "400-policy", "404", "409", "422"]
AFTER_CONTENT = ["abort_mid", "eof_mid", "error_frame"]
# These the upstream has executed before they went wrong: it will bill them.
EXECUTED = {"reset", "close", "garbage", "html_200", "empty_200", "bad_json_200", "huge_header", *ONLY_STREAMS}


class Closed:
    """Nobody listens there."""

    base_url = f"http://127.0.0.1:{free_port()}/v1"


@pytest.fixture(scope="module")
def pools(sluice: Sluice, upstream_server: OpenAIUpstream) -> str:
    """For each fault a pool of its own, whose first account has that fault and whose second is well."""
    sluice.set_price("pool-*", input=3, output=15)
    prefixes = []
    for kind in ("whole", "stream"):
        for fault in [*UPSTREAMS_FAULT, *ONLY_STREAMS, *CLIENTS_FAULT, *AFTER_CONTENT]:
            prefix = f"pool-{fault}-{kind}"
            first = Closed if fault == "unreachable" else upstream_server
            sluice.add_openai(first, label=f"bad-{prefix}", prefix=prefix, secret=f"sk-sim-{fault}", priority=10)
            sluice.add_openai(upstream_server, label=f"good-{prefix}", prefix=prefix, secret="sk-sim-ok")
            prefixes.append(prefix)
    sluice.wait_for(prefixes[-1])
    return "pool"


@pytest.fixture
def client(sluice: Sluice, pools: str, upstream: OpenAIUpstream) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{sluice.url}/v1", headers={"authorization": f"Bearer {sluice.issue_key()}"}, timeout=20) as client:
        yield client


def ask(client: httpx.Client, fault: str, kind: str) -> httpx.Response:
    return client.post("chat/completions", json={**BODY, "model": f"pool-{fault}-{kind}/gpt-4o", "stream": kind == "stream"})


@pytest.mark.parametrize(
    ("fault", "kind"), [(fault, kind) for kind in ("whole", "stream") for fault in UPSTREAMS_FAULT] + [(f, "stream") for f in ONLY_STREAMS]
)
def test_the_second_account_gives_one_clean_answer(
    client: httpx.Client, sluice: Sluice, upstream: OpenAIUpstream, fault: str, kind: str
) -> None:
    answer = ask(client, fault, kind)

    assert answer.status_code == 200
    assert "error" not in answer.text
    if kind == "stream":
        assert answer.content.endswith(DONE)
        assert answer.content.count(b'"role":"assistant"') == 1
    else:
        assert answer.json()["choices"][0]["message"]["content"] == "echo: Hello there"
    request_id = answer.headers["x-request-id"]
    row = sluice.row(request_id)
    assert (row["status"], row["attempts"], row["credential"], row["error"]) == (200, 2, f"good-pool-{fault}-{kind}", "")
    assert (row["input_tokens"], row["output_tokens"], row["usage_source"]) == (2, 3, "reported")
    assert len(upstream.calls(request_id)) == (1 if fault == "unreachable" else 2)
    assert upstream.bill(request_id).posts == (2 if fault in EXECUTED else 1)


@pytest.mark.parametrize("kind", ["whole", "stream"])
@pytest.mark.parametrize("fault", CLIENTS_FAULT)
def test_a_clients_own_mistake_is_tried_nowhere_else(
    client: httpx.Client, sluice: Sluice, upstream: OpenAIUpstream, fault: str, kind: str
) -> None:
    answer = ask(client, fault, kind)

    assert 400 <= answer.status_code < 500
    assert len(upstream.calls(answer.headers["x-request-id"])) == 1
    row = sluice.row(answer.headers["x-request-id"])
    assert (row["attempts"], row["credential"], row["status"]) == (1, f"bad-pool-{fault}-{kind}", answer.status_code)


@pytest.mark.parametrize("fault", AFTER_CONTENT)
def test_after_content_no_other_account_is_tried(client: httpx.Client, sluice: Sluice, upstream: OpenAIUpstream, fault: str) -> None:
    answer = ask(client, fault, "stream")

    assert answer.status_code == 200
    assert b"echo:" in answer.content
    last = answer.content.strip().split(b"\n\n")[-1]
    assert last.startswith(b'data: {"error":{')
    assert b"[DONE]" not in answer.content
    assert b'"finish_reason":"stop"' not in answer.content
    assert len(upstream.calls(answer.headers["x-request-id"])) == 1
    row = sluice.row(answer.headers["x-request-id"])
    assert (row["attempts"], row["status"], row["usage_source"]) == (1, 502, "estimated")


def test_the_last_failure_is_told_when_all_fail(sluice: Sluice, upstream: OpenAIUpstream, accounts: Accounts) -> None:
    for number, secret in enumerate(["sk-sim-500", "sk-sim-401", "sk-sim-503", "sk-sim-ok"]):
        sluice.add_openai(upstream, prefix="allfail", secret=secret, priority=10 - number)
    sluice.wait_for("allfail")
    headers = {"authorization": f"Bearer {sluice.issue_key()}"}
    answer = httpx.post(f"{sluice.url}/v1/chat/completions", headers=headers, json={**BODY, "model": "allfail/gpt-4o"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert sluice.row(answer.headers["x-request-id"])["attempts"] == 3


def test_a_user_of_a_sticky_pool_stays_with_one_account_and_moves_on_while_it_fails(sluice: Sluice, upstream: OpenAIUpstream) -> None:
    # One of them fails every call, so that half of the users meet it first: they are served by the other, and the rest keep theirs.
    sluice.add_openai(upstream, prefix="sticky", secret="sk-sim-ok", sticky="user")
    sluice.add_openai(upstream, prefix="sticky", secret="sk-sim-429-long", sticky="user")
    sluice.wait_for("sticky")
    with httpx.Client(base_url=f"{sluice.url}/v1", headers={"authorization": f"Bearer {sluice.issue_key()}"}, timeout=20) as client:
        answers = [
            client.post("chat/completions", json={**BODY, "model": "sticky/gpt-4o", "user": f"u{number}"})
            for number in range(12)
            for _ in range(2)
        ]
        page = client.get(f"{sluice.url}/metrics").text
    assert {answer.status_code for answer in answers} == {200}
    own, another = (
        int(line.split()[-1])
        for account in ("own", "another")
        for line in page.splitlines()
        if f'sticky_calls_total{{account="{account}"' in line
    )
    assert own + another == 24
    assert own % 2 == another % 2 == 0
    assert min(own, another) > 0
