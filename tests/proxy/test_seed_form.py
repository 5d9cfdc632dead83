"""The form of the OpenAI-workers proxy: `POST /` and `POST /compat/openai-worker`, its defaults, its errors, and CORS.

That proxy let anyone in and spent the server's key; here an issued key is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import Accounts
from tests.serving import Sluice
from tests.upstreams.openai import DONE, OpenAIUpstream

HI: list[dict[str, str]] = [{"role": "user", "content": "hi"}]
DEFAULTS = {"model": "gpt-3.5-turbo", "temperature": 0.7, "max_tokens": 1000, "stream": False}
PATHS = ["/", "/compat/openai-worker"]


@pytest.fixture(scope="module")
def seed(serve: Any, upstream_server: OpenAIUpstream) -> Sluice:
    """A server whose only upstream lists the seed's default model, so that the bare name finds it."""
    sluice: Sluice = serve()
    sluice.set_price("*", input=3, output=15, cached=0.3)
    credential = sluice.add_openai(upstream_server, prefix="openai", pass_through=True)
    sluice.manage("refresh_models", "--credential", str(credential))
    sluice.wait_for("openai")
    return sluice


@pytest.fixture
def client(seed: Sluice, upstream: OpenAIUpstream) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=seed.url, headers={"authorization": f"Bearer {seed.issue_key()}"}, timeout=20) as client:
        yield client


FORWARDED = [
    ({}, DEFAULTS),
    ({"temperature": 0, "max_tokens": None}, {**DEFAULTS, "temperature": 0}),
    ({"temperature": None, "model": None, "stream": None}, DEFAULTS),
    ({"max_completion_tokens": 50}, {"model": "gpt-3.5-turbo", "temperature": 0.7, "stream": False, "max_completion_tokens": 50}),
    ({"max_completion_tokens": None}, {**DEFAULTS, "max_completion_tokens": None}),
    ({"model": "o3"}, {"model": "o3", "stream": False}),
    ({"model": "gpt-5-mini"}, {"model": "gpt-5-mini", "stream": False}),
    ({"model": "openai/gpt-5-mini", "temperature": 1}, {"model": "gpt-5-mini", "stream": False, "temperature": 1}),
    ({"model": "gpt-4o", "max_tokens": 5, "temperature": 2}, {"model": "gpt-4o", "max_tokens": 5, "temperature": 2, "stream": False}),
    ({"top_p": 0.5, "from_tomorrow": [1]}, {**DEFAULTS, "top_p": 0.5, "from_tomorrow": [1]}),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("sent", "forwarded"), FORWARDED, ids=[str(sent) for sent, _ in FORWARDED])
def test_defaults_are_filled_in_where_the_client_sent_nothing(
    client: httpx.Client, seed: Sluice, upstream: OpenAIUpstream, path: str, sent: dict[str, Any], forwarded: dict[str, Any]
) -> None:
    answer = client.post(path, json={"messages": HI, **sent})

    assert answer.status_code == 200
    assert upstream.last.json == {"messages": HI, **forwarded}
    row = Accounts(seed, upstream).of(answer.headers["x-request-id"])
    assert row["served_model"] == f"openai/{forwarded['model']}"


def test_the_ordinary_path_fills_in_nothing(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    body = {"model": "gpt-4o", "messages": HI, "temperature": None}
    assert client.post("/v1/chat/completions", json=body).status_code == 200

    assert upstream.last.json == body


@pytest.mark.parametrize("path", PATHS)
def test_a_stream(client: httpx.Client, seed: Sluice, upstream: OpenAIUpstream, path: str) -> None:
    answer = client.post(path, json={"messages": HI, "stream": True})

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content.endswith(DONE)
    Accounts(seed, upstream).of(answer.headers["x-request-id"], stream=True)


def test_the_callers_own_key_in_the_seeds_header(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    assert client.post("/", json={"messages": HI}, headers={"x-openai-key": "sk-sim-ok~mine"}).status_code == 200

    assert upstream.last.headers["authorization"] == "Bearer sk-sim-ok~mine"


def test_a_key_of_the_gateway_is_needed(seed: Sluice, upstream: OpenAIUpstream) -> None:
    for headers in ({}, {"x-openai-key": "sk-sim-ok~mine"}):
        for path in PATHS:
            assert httpx.post(f"{seed.url}{path}", json={"messages": HI}, headers=headers).status_code == 401
    assert upstream.posts == []


# Errors, in both dialects

REFUSED: list[tuple[bytes, int, str, str | None]] = [
    (b'{"messages": "hi"}', 400, "invalid_type", "messages"),
    (b"{}", 400, "missing_required_parameter", "messages"),
    (b'{"messages": null}', 400, "missing_required_parameter", "messages"),
    (b"not json", 400, "invalid_json", None),
    (b'{"messages": [{"role": "user", "content": "hi"}], "model": "no-such"}', 404, "model_not_found", "model"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "stream": "yes"}', 400, "invalid_type", "stream"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("raw", "status", "code", "param"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_errors_are_openais_unless_the_seeds_are_asked_for(
    client: httpx.Client, path: str, raw: bytes, status: int, code: str, param: str | None
) -> None:
    json_type = {"content-type": "application/json"}
    usual = client.post(path, content=raw, headers=json_type)
    seeds = client.post(path, content=raw, headers={**json_type, "X-Error-Format": "seed"})

    assert usual.status_code == seeds.status_code == status
    assert (usual.json()["error"]["code"], usual.json()["error"]["param"]) == (code, param)
    assert seeds.json().keys() == {"error", "message"}
    assert isinstance(seeds.json()["error"], str)
    assert seeds.json()["message"] == usual.json()["error"]["message"]


def test_an_upstreams_error_in_the_seeds_dialect(client: httpx.Client) -> None:
    body = {"messages": HI, "model": "openai/sim-429-rpm~seed"}
    answer = client.post("/", json=body, headers={"X-Error-Format": "seed"})

    assert answer.status_code == 429
    assert answer.json().keys() == {"error", "message"}
    assert answer.headers["retry-after"] == "1"
    assert (
        client.post("/", json={**body, "model": "openai/sim-500~seed"}, headers={"x-error-format": "SEED"}).json()["error"]
        == "upstream_error"
    )


def test_the_paths_by_get(seed: Sluice) -> None:
    answer = httpx.get(f"{seed.url}/compat/openai-worker")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST, OPTIONS")

    # The site's own page, not the seed's 405.
    assert httpx.get(f"{seed.url}/", headers={"accept": "application/json"}).status_code == 200


# CORS


@pytest.mark.parametrize("path", [*PATHS, "/v1/chat/completions", "/v1/models", "/v1/no-such-path"])
def test_a_browser_that_asks_first_needs_no_key_and_gets_its_headers_back(seed: Sluice, path: str) -> None:
    wanted = "authorization, content-type, x-openai-key, x-stainless-lang, x-from-tomorrow"
    answer = httpx.options(
        f"{seed.url}{path}",
        headers={"origin": "https://app.example", "access-control-request-method": "POST", "access-control-request-headers": wanted},
    )

    assert answer.status_code == 204
    assert answer.content == b""
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["access-control-allow-headers"] == wanted
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-max-age"] == "86400"
    assert answer.headers["x-request-id"]
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/v1/chat/completions", 200), ("/v1/nothing", 404), ("/v1/chat/completions/", 404)]
)
def test_every_answer_lets_a_browser_read_it(client: httpx.Client, path: str, status: int) -> None:
    answer = client.post(path, json={"model": "gpt-4o", "messages": HI}, headers={"origin": "https://app.example"})

    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["access-control-expose-headers"] == "*"
    assert "access-control-allow-credentials" not in answer.headers


def test_only_the_origins_that_the_operator_named(serve: Any) -> None:
    sluice: Sluice = serve(CORS_ALLOW_ORIGINS="https://app.example,https://other.example")
    for origin, allowed in (("https://app.example", "https://app.example"), ("https://evil.example", None), ("null", None)):
        answer = httpx.post(f"{sluice.url}/v1/chat/completions", json={}, headers={"origin": origin})
        assert answer.status_code == 401
        assert answer.headers.get("access-control-allow-origin") == allowed
        assert answer.headers["vary"] == "Origin"


def test_a_cookie_is_never_a_key(seed: Sluice) -> None:
    key = seed.issue_key()
    answer = httpx.post(f"{seed.url}/", json={"messages": HI}, headers={"cookie": f"sessionid={key}; authorization=Bearer {key}"})

    assert answer.status_code == 401
