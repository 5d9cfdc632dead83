"""DeepSeek differs from OpenAI in what it takes, and in where it tells what its cache gave."""

from __future__ import annotations

from typing import Any

import pytest

from providers.adapter import Ask, Target
from providers.adapters.deepseek import DeepSeek
from providers.failures import InvalidAtUpstream
from providers.price import Tokens
from providers.secrets import SecretText
from tests.providers.test_every_adapter import FIXTURES

TARGET = Target("deepseek", 1, "l", "https://api.deepseek.com/v1", SecretText("sk-x"), "deepseek-reasoner", "deepseek/deepseek-reasoner")


def ask(**body: Any) -> Ask:
    return Ask("chat/completions", {"messages": [{"role": "user", "content": "hi"}], **body}, stream=False, request_id="r")


def test_what_its_cache_gave_is_counted_apart():
    answer = DeepSeek().answer(ask(), TARGET, (FIXTURES / "deepseek" / "hello.whole").read_bytes(), "application/json")

    assert answer.tokens == Tokens(fresh_input=4, cache_read=8, output=6, reasoning=5)
    assert b"reasoning_content" in answer.body


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, "messages[0].content"),
    ],
)
def test_what_it_cannot_take_is_refused(body: dict[str, Any], param: str):
    with pytest.raises(InvalidAtUpstream) as refused:
        DeepSeek().request(ask(**body), TARGET)

    assert refused.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    ],
)
def test_everything_else_passes(body: dict[str, Any]):
    sent = DeepSeek().request(ask(**body), TARGET)

    assert sent.url == "https://api.deepseek.com/v1/chat/completions"
