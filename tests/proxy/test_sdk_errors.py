"""Errors as the official `openai` package sees them: the class it raises, what the error says, and when it tries again."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.conftest import Accounts
from tests.serving import Sluice
from tests.upstreams.openai import OpenAIUpstream, Step

HELLO: Any = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
def key(sluice: Sluice, sim: str, upstream: OpenAIUpstream) -> str:
    return sluice.issue_key()


@pytest.fixture
def client(sluice: Sluice, key: str) -> Iterator[OpenAI]:
    with OpenAI(api_key=key, base_url=f"{sluice.url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def retrying(sluice: Sluice, key: str) -> Iterator[OpenAI]:
    """A client with the package's own two retries."""
    with OpenAI(api_key=key, base_url=f"{sluice.url}/v1") as client:
        yield client


def model(scenario: str) -> str:
    """A name of its own each time, so that no rest of an earlier test is in the way."""
    return f"sim/sim-{scenario}~{uuid.uuid4().hex[:6]}"


def failure(client: OpenAI, model_name: str, **arguments: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model=model_name, messages=HELLO, **arguments)
    error = caught.value
    assert isinstance(error.body, dict)
    assert set(error.body) == {"message", "type", "param", "code"}
    assert error.request_id
    assert error.response.headers["access-control-allow-origin"] == "*"
    return error


REFUSED = [
    # scenario, class, status, type, code, param
    ("400", openai.BadRequestError, 400, "invalid_request_error", "invalid_value", "top_k"),
    ("400-context", openai.BadRequestError, 400, "invalid_request_error", "context_length_exceeded", "messages"),
    ("400-policy", openai.BadRequestError, 400, "invalid_request_error", "content_policy_violation", None),
    ("422", openai.BadRequestError, 400, "invalid_request_error", None, "seed"),
    ("401", openai.InternalServerError, 502, "server_error", "upstream_auth_failed", None),
    ("402", openai.APIStatusError, 402, "insufficient_quota", "insufficient_quota", None),
    ("403", openai.PermissionDeniedError, 403, "permission_error", "unsupported_country_region_territory", None),
    ("404", openai.NotFoundError, 404, "invalid_request_error", "model_not_found", "model"),
    ("408", openai.InternalServerError, 504, "server_error", "upstream_timeout", None),
    ("409", openai.ConflictError, 409, "invalid_request_error", None, None),
    ("429-rpm", openai.RateLimitError, 429, "rate_limit_error", "rate_limit_exceeded", None),
    ("429-quota", openai.RateLimitError, 429, "insufficient_quota", "insufficient_quota", None),
    ("500", openai.InternalServerError, 502, "server_error", "upstream_error", None),
    ("503", openai.InternalServerError, 503, "server_error", "overloaded", None),
    ("html_502", openai.InternalServerError, 502, "server_error", "upstream_error", None),
    ("redirect", openai.InternalServerError, 502, "server_error", "upstream_error", None),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("scenario", "kind", "status", "type_", "code", "param"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_an_upstream_refuses(
    client: OpenAI,
    sluice: Sluice,
    upstream: OpenAIUpstream,
    scenario: str,
    kind: type[openai.APIStatusError],
    status: int,
    type_: str,
    code: str | None,
    param: str | None,
    stream: bool,
) -> None:
    error = failure(client, model(scenario), stream=stream)

    assert type(error) is kind
    assert (error.status_code, error.type, error.code, error.param) == (status, type_, code, param)
    assert error.response.headers.get("x-should-retry") == ("false" if code == "insufficient_quota" else None)
    assert error.response.headers["content-type"] == "application/json"
    assert "<" not in error.message
    row = sluice.row(str(error.request_id))
    assert (row["status"], row["error"], row["attempts"], row["stream"]) == (status, code or type_, 1, stream)
    assert (row["input_tokens"], row["output_tokens"], row["cost_usd"]) == (0, 0, 0)
    assert upstream.bill(str(error.request_id)).posts == 0
    assert len(upstream.calls(str(error.request_id))) == 1


BROKEN = ["html_200", "empty_200", "bad_json_200", "reset", "close", "garbage", "bad_status", "huge_header", "abort_first", "eof_first"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("scenario", BROKEN)
def test_an_upstream_that_answers_rubbish(client: OpenAI, sluice: Sluice, upstream: OpenAIUpstream, scenario: str, stream: bool) -> None:
    if not stream and scenario.endswith("_first"):
        scenario = scenario.replace("first", "mid")
    error = failure(client, model(scenario), stream=stream)

    assert type(error) is openai.InternalServerError
    assert error.status_code == 502
    assert error.code in ("upstream_bad_response", "upstream_error")
    assert "<" not in error.message
    row = sluice.row(str(error.request_id))
    assert (row["status"], row["error"], row["attempts"]) == (502, error.code, 1)
    executed = upstream.bill(str(error.request_id)).posts
    if scenario == "bad_status":
        assert (executed, row["usage_source"]) == (0, "missing")
    else:  # a kept connection that dies without a byte of an answer is no refusal: there the request goes out once more
        assert (executed, row["usage_source"]) in [(1, "estimated"), (2 if scenario in ("reset", "close") else 1, "estimated")]


@pytest.mark.parametrize(
    ("scenario", "code"),
    [
        ("abort_mid", "upstream_error"),
        ("eof_mid", "upstream_bad_response"),
        ("half_close", "upstream_bad_response"),
        ("error_frame", "upstream_broke"),
    ],
)
def test_a_stream_that_breaks_after_content(client: OpenAI, sluice: Sluice, scenario: str, code: str) -> None:
    stream = client.chat.completions.create(model=model(scenario), messages=HELLO, stream=True)
    text = ""
    with pytest.raises(openai.APIError) as caught:
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""

    assert text.startswith("echo:")
    assert type(caught.value) is openai.APIError
    assert caught.value.code == code
    row = sluice.row(stream.response.headers["x-request-id"])
    assert (row["status"], row["error"], row["attempts"], row["usage_source"]) == (502, code, 1, "estimated")
    assert row["output_tokens"] >= 1
    assert row["cost_usd"] > 0


def test_an_error_event_before_content_is_an_error_not_a_stream(client: OpenAI, sluice: Sluice) -> None:
    error = failure(client, model("error_first"), stream=True)

    assert (error.status_code, error.code) == (502, "upstream_error")
    assert sluice.row(str(error.request_id))["status"] == 502


def test_an_upstreams_words_are_cleaned(client: OpenAI) -> None:
    error = failure(client, model("leak"))

    assert isinstance(error.body, dict)
    said = error.body["message"]
    assert "sk-proj" not in said
    assert said.startswith("Bad gateway for key [redacted]")
    assert len(said) <= 500
    assert said.isprintable()


# Refused by Sluice itself


def test_a_wrong_key(sluice: Sluice, sim: str) -> None:
    for wrong in ("sk-sluice-nonsense", sluice.issue_key()[:-1] + "!", "sk-proj-something-else"):
        error = failure(OpenAI(api_key=wrong, base_url=f"{sluice.url}/v1", max_retries=0), "sim/gpt-4o")
        assert type(error) is openai.AuthenticationError
        assert (error.code, error.type) == ("invalid_api_key", "invalid_request_error")
        assert wrong not in error.message
        assert sluice.rows(str(error.request_id)) == []


def test_a_model_that_the_key_may_not_use(sluice: Sluice, sim: str) -> None:
    client = OpenAI(api_key=sluice.issue_key(models="sim/gpt-4o,sim/gpt-4o-mini*"), base_url=f"{sluice.url}/v1", max_retries=0)

    assert client.chat.completions.create(model="sim/gpt-4o-mini", messages=HELLO).choices
    error = failure(client, "sim/o3")
    assert type(error) is openai.PermissionDeniedError
    assert (error.code, error.param) == ("model_not_allowed", "model")
    assert [one.id for one in client.models.list()] == ["sim/gpt-4o", "sim/gpt-4o-mini", "sim/gpt-4o-mini-tts"]


def test_a_model_that_does_not_exist(client: OpenAI, sluice: Sluice) -> None:
    error = failure(client, "nowhere/gpt-4o")

    assert type(error) is openai.NotFoundError
    assert (error.code, error.param) == ("model_not_found", "model")
    assert sluice.rows(str(error.request_id)) == []


def test_a_key_over_its_rate(sluice: Sluice, sim: str) -> None:
    client = OpenAI(api_key=sluice.issue_key(rpm=1), base_url=f"{sluice.url}/v1", max_retries=0)

    assert client.chat.completions.create(model="sim/gpt-4o", messages=HELLO).choices
    error = failure(client, "sim/gpt-4o")
    assert type(error) is openai.RateLimitError
    assert (error.type, error.code) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(error.response.headers["retry-after"]) <= 60
    assert sluice.rows(str(error.request_id)) == []


def test_a_key_without_money_left(sluice: Sluice, sim: str) -> None:
    client = OpenAI(api_key=sluice.issue_key(budget="0.000001", window="total"), base_url=f"{sluice.url}/v1")

    error = failure(client, "sim/gpt-4o")
    assert type(error) is openai.RateLimitError
    assert (error.type, error.code, error.response.headers["x-should-retry"]) == ("insufficient_quota", "insufficient_quota", "false")
    assert sluice.rows(str(error.request_id)) == []


# When the package tries again


def attempts(upstream: OpenAIUpstream) -> int:
    return len(upstream.posts)


def test_the_client_waits_as_long_as_it_is_told_and_succeeds(
    retrying: OpenAI, upstream: OpenAIUpstream, sluice: Sluice, accounts: Accounts
) -> None:
    upstream.script(Step(scenario="429-rpm"), Step(text="at last"))
    began = time.monotonic()
    answer = retrying.chat.completions.create(model=model("ok"), messages=HELLO)

    assert answer.choices[0].message.content == "at last"
    assert time.monotonic() - began >= 1  # the second that Retry-After names
    assert attempts(upstream) == 2
    assert answer._request_id is not None
    accounts.of(answer._request_id)
    [first, _] = upstream.posts
    assert sluice.row(first.request_id)["status"] == 429


def test_a_server_error_is_tried_again(retrying: OpenAI, upstream: OpenAIUpstream, accounts: Accounts) -> None:
    upstream.script(Step(scenario="500"))
    answer = retrying.chat.completions.create(model=model("ok"), messages=HELLO)

    assert attempts(upstream) == 2
    assert answer._request_id is not None
    accounts.of(answer._request_id)


@pytest.mark.parametrize("scenario", ["429-quota", "402", "400", "404"])
def test_what_will_not_get_better_is_not_tried_again(retrying: OpenAI, upstream: OpenAIUpstream, scenario: str) -> None:
    failure(retrying, model(scenario))

    assert attempts(upstream) == 1


def test_a_long_rest_is_passed_on_and_kept_to(retrying: OpenAI, upstream: OpenAIUpstream) -> None:
    """The client does not wait an hour; nor is the upstream asked again within it."""
    name = model("429-long")
    first, second = failure(retrying, name), failure(retrying, name)

    assert int(first.response.headers["retry-after"]) == 3600
    assert 3500 < int(second.response.headers["retry-after"]) <= 3600
    assert second.status_code == 429
    assert attempts(upstream) == 1
