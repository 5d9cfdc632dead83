"""What an upstream's refusal means, in the one vocabulary, and what of its words is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from providers import failures
from providers.adapter import Ask, Target
from providers.adapters.openai import OpenAI
from providers.failures import UpstreamFailure, UpstreamProtocol
from providers.said import clean
from providers.secrets import SecretText, redact

TARGET = Target("openai", 1, "l", "https://api.example.org/v1", SecretText("s"), "m", "openai/m")
CALLERS = Target("openai", 1, "l", "https://api.example.org/v1", SecretText("s"), "m", "openai/m", callers_key=True)


def said(status: int, body: object = None, headers: Mapping[str, str] | None = None, target: Target = TARGET) -> UpstreamFailure:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return OpenAI().failure(target, status, headers or {}, raw)


def error(message: str = "words", **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": None, "param": None, "code": None} | fields}


@pytest.mark.parametrize(
    ("status", "body", "kind", "client_status", "type_", "code"),
    [
        (400, error(), "InvalidAtUpstream", 400, "invalid_request_error", None),
        (400, error(code="unsupported_value"), "InvalidAtUpstream", 400, "invalid_request_error", "unsupported_value"),
        (422, error(), "InvalidAtUpstream", 400, "invalid_request_error", None),
        (409, error(), "InvalidAtUpstream", 409, "invalid_request_error", None),
        (413, error(), "InvalidAtUpstream", 413, "invalid_request_error", None),
        (405, error(), "InvalidAtUpstream", 400, "invalid_request_error", None),
        (400, error(code="context_length_exceeded"), "ContextLength", 400, "invalid_request_error", "context_length_exceeded"),
        (400, error("The prompt is too long: 9 tokens"), "ContextLength", 400, "invalid_request_error", "context_length_exceeded"),
        (
            400,
            error("exceeded model token limit: 262144"),
            "ContextLength",
            400,
            "invalid_request_error",
            "context_length_exceeded",
        ),
        (400, error("total message size 3 exceeds limit 2"), "ContextLength", 400, "invalid_request_error", "context_length_exceeded"),
        (400, error("Input token length too long"), "ContextLength", 400, "invalid_request_error", "context_length_exceeded"),
        (413, error("too many tokens"), "ContextLength", 400, "invalid_request_error", "context_length_exceeded"),
        (400, error(code="content_policy_violation"), "ContentFiltered", 400, "invalid_request_error", "content_policy_violation"),
        (400, error(code="content_filter"), "ContentFiltered", 400, "invalid_request_error", "content_policy_violation"),
        (404, error(code="model_not_found"), "ModelGone", 404, "invalid_request_error", "model_not_found"),
        (404, b"not here", "ModelGone", 404, "invalid_request_error", "model_not_found"),
        (401, error(code="invalid_api_key"), "CredentialRefused", 502, "server_error", "upstream_auth_failed"),
        (403, error(code="unsupported_country"), "ForbiddenAtUpstream", 403, "permission_error", "unsupported_country"),
        (402, error(), "OutOfCredit", 402, "insufficient_quota", "insufficient_quota"),
        (429, error(code="insufficient_quota"), "OutOfCredit", 429, "insufficient_quota", "insufficient_quota"),
        (429, error(code="credit_balance_exhausted"), "OutOfCredit", 429, "insufficient_quota", "insufficient_quota"),
        (429, error(type="insufficient_quota"), "OutOfCredit", 429, "insufficient_quota", "insufficient_quota"),
        (429, error("Insufficient balance"), "OutOfCredit", 429, "insufficient_quota", "insufficient_quota"),
        (429, error(code="rate_limit_exceeded"), "RateLimited", 429, "rate_limit_error", "rate_limit_exceeded"),
        (429, error(type="requests"), "RateLimited", 429, "rate_limit_error", "rate_limit_exceeded"),
        (429, error(code="slow_down"), "RateLimited", 429, "rate_limit_error", "rate_limit_exceeded"),
        (408, error(), "UpstreamTimeout", 504, "server_error", "upstream_timeout"),
        (500, error(), "UpstreamServer", 502, "server_error", "upstream_error"),
        (502, b"<html>bad gateway</html>", "UpstreamServer", 502, "server_error", "upstream_error"),
        (504, b"", "UpstreamServer", 502, "server_error", "upstream_error"),
        (302, b"", "UpstreamServer", 502, "server_error", "upstream_error"),
        (499, b"", "UpstreamServer", 502, "server_error", "upstream_error"),
        (499, error("The operation was cancelled."), "UpstreamServer", 502, "server_error", "upstream_error"),
        (503, error(code="server_is_overloaded"), "Overloaded", 503, "server_error", "overloaded"),
        (529, error(type="overloaded_error"), "Overloaded", 503, "server_error", "overloaded"),
    ],
)
def test_each_signal_means_one_thing(status: int, body: object, kind: str, client_status: int, type_: str, code: str | None):
    problem = said(status, body)

    assert type(problem) is getattr(failures, kind)
    assert (problem.status, problem.type, problem.code) == (client_status, type_, code)
    assert problem.upstream_status == status
    assert problem.body()["error"].keys() == {"message", "type", "param", "code"}
    assert problem.message


def test_a_refused_key_is_the_callers_when_the_caller_brought_it():
    problem = said(401, error(code="invalid_api_key"), target=CALLERS)

    assert (problem.status, problem.code, problem.type) == (401, "invalid_api_key", "invalid_request_error")


def test_out_of_credit_is_never_worth_a_retry():
    assert said(402).should_retry is False
    assert said(429, error(code="insufficient_quota")).should_retry is False
    assert said(429, error()).should_retry is None


def test_the_option_that_we_added_is_known_when_it_is_refused():
    assert type(said(400, error("Unknown field: stream_options"))) is failures.UsageOptionRefused


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (error("plain"), "plain"),
        ({"error": "a string"}, "a string"),
        ({"detail": "a detail"}, "a detail"),
        ({"detail": [{"loc": ["body"], "msg": "one"}, {"msg": "two"}]}, "one; two"),
        ({"message": "a message"}, "a message"),
        ({"error": {"detail": "inner"}}, "inner"),
        ({"error": {"type": "x"}, "message": "outer"}, "outer"),
        ([1, 2], "The upstream refused the request (400)."),
        (b"<html><body>secret stack</body></html>", "The upstream refused the request (400)."),
        (b"\xff\xfe", "The upstream refused the request (400)."),
        ({"error": {"message": {"nested": 1}}}, "The upstream refused the request (400)."),
    ],
)
def test_its_words_are_found_wherever_it_puts_them(body: object, message: str):
    assert said(400, body).message == message


def test_what_is_shown_is_one_short_line_without_secrets():
    redact.learn_more(["the-operators-secret"])

    assert clean("one\n\ttwo  three\x00\x1b[31m") == "one two three[31m"
    assert len(clean("x" * 10_000)) == 500
    assert clean("  <html>page</html>") == ""
    assert "the-operators-secret" not in clean("x" * 490 + "the-operators-secret")
    assert "the-op" not in clean("x" * 490 + "the-operators-secret")


@pytest.mark.parametrize("secret", ["the-operators-secret", "sk-0123456789abcdef"])
def test_a_secret_is_no_code_and_no_parameter(secret: str):
    redact.learn_more(["the-operators-secret"])
    problem = said(400, error(code=secret, param=f"key.{secret}"))
    assert secret not in f"{problem.body()}"


@pytest.mark.parametrize("param", ["messages[2].content", "tools", None])
def test_a_plain_parameter_is_passed_on(param: str | None):
    assert said(400, error(param=param)).param == param


def test_an_error_that_is_not_utf8_is_still_told_by_its_status():
    problem = said(500, b'{"error": {"message": "caf\xe9"}}')

    assert (type(problem), problem.message) == (failures.UpstreamServer, "The upstream answered 500.")


@pytest.mark.parametrize("odd", ["with space", "x" * 101, "<b>", 7, {"a": 1}])
def test_an_odd_parameter_or_code_is_not(odd: object):
    problem = said(400, error(param=odd, code=odd))

    assert (problem.param, problem.code) == (None, None)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "3600"}, 3600.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("status", [402, 429, 503])
def test_each_form_of_retry_after_is_understood(headers: dict[str, str], seconds: float | None, status: int):
    assert said(status, error(), headers).retry_after_seconds == seconds


def test_retry_after_may_be_a_date():
    ahead = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=60), usegmt=True)

    assert said(429, error(), {"retry-after": ahead}).retry_after_seconds == pytest.approx(60, abs=5)
    assert said(429, error(), {"retry-after": past}).retry_after_seconds == 0.0


def answer(body: bytes) -> Any:
    ask = Ask("chat/completions", {}, stream=False, request_id="r")
    return OpenAI().answer(ask, TARGET, body, "application/json")


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"message": "no", "code": "insufficient_quota"}, "OutOfCredit"),
        ({"message": "no", "code": "rate_limit_exceeded"}, "RateLimited"),
        ({"message": "no", "code": "invalid_api_key"}, "CredentialRefused"),
        ({"message": "no", "code": "model_not_found"}, "ModelGone"),
        ({"message": "no", "type": "invalid_request_error"}, "InvalidAtUpstream"),
        ({"message": "no", "code": 503}, "Overloaded"),
        ("no", "UpstreamServer"),
    ],
)
def test_an_error_inside_a_200_is_an_error(wrong: object, kind: str):
    with pytest.raises(UpstreamFailure) as raised:
        answer(json.dumps({"error": wrong}).encode())

    assert type(raised.value) is getattr(failures, kind)


@pytest.mark.parametrize("body", [b"", b"<html></html>", b"{", b"\xff", b'{"choices":[{"text":"\xff"}]}', b"[" * 100_000])
def test_rubbish_is_no_answer(body: bytes):
    with pytest.raises(UpstreamProtocol):
        answer(body)


def test_an_answer_goes_back_as_it_came():
    body = b'{ "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}, "their_own": 1 }'

    whole = answer(body)
    assert whole.body == body
    assert whole.tokens.total == 4


@pytest.mark.parametrize("listed", [{"data": [{"id": "a"}, {"id": "b"}]}, {"models": [{"name": "a"}, "b"]}, ["a", {"id": "b"}]])
def test_a_list_of_models_has_three_shapes(listed: object):
    assert OpenAI().models(json.dumps(listed).encode()).keys() == {"a", "b"}


@pytest.mark.parametrize("listed", [b"<html>", b"3", b'{"data": 1}', b'["\xff"]', b"{}", b"[" * 100_000])
def test_what_is_no_list_of_models_is_refused(listed: bytes):
    with pytest.raises(UpstreamProtocol):
        OpenAI().models(listed)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://llm.example.org", "https://llm.example.org/v1"),
        ("https://llm.example.org/", "https://llm.example.org/v1"),
        ("https://llm.example.org/v1/", "https://llm.example.org/v1"),
        ("https://llm.example.org/api/v3", "https://llm.example.org/api/v3"),
    ],
)
def test_the_v1_of_a_bare_host_may_be_left_out(given: str, kept: str):
    assert OpenAI().base_url_from(given) == kept
