"""What an alias does to a request's parameters, and that limits and upstreams see what it made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from accounts.principal import Limit
from providers import wire
from proxy.call import Asked
from proxy.catalog import Alias, Parameters
from proxy.errors import Unavailable
from proxy.pipeline import translate
from tests.proxy.test_gateway import CHAT, House, fails, says, sse, stream, whole


def asked(**body: Any) -> Asked:
    raw = wire.encode_json({"model": "fast", "messages": [], **body})
    return translate.read("chat/completions", wire.ChatHead, raw, content_type="")


def changed(body: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    made = translate.with_parameters(asked(**body), Parameters(**parameters))
    assert made.size == len(wire.encode_json(made.body))
    return {name: value for name, value in made.body.items() if name not in ("model", "messages")}


@pytest.mark.parametrize(
    ("sent", "parameters", "forwarded"),
    [
        ({}, {"defaults": {"temperature": 0.2}}, {"temperature": 0.2}),
        ({"temperature": 0}, {"defaults": {"temperature": 0.2}}, {"temperature": 0}),
        ({"temperature": None}, {"defaults": {"temperature": 0.2}}, {"temperature": 0.2}),
        ({"temperature": 1}, {"overrides": {"temperature": 0.2}}, {"temperature": 0.2}),
        ({}, {"overrides": {"seed": None}}, {"seed": None}),
        ({"logit_bias": {"1": 2}, "top_p": 1}, {"drops": frozenset({"logit_bias"})}, {"top_p": 1}),
        ({"temperature": 1}, {"drops": frozenset({"temperature"}), "defaults": {"temperature": 0}}, {"temperature": 0}),
        ({"temperature": 1}, {"defaults": {"temperature": 0}, "overrides": {"temperature": 2}}, {"temperature": 2}),
        # One ceiling under two names: an upstream that is sent both refuses.
        ({"max_completion_tokens": 5}, {"defaults": {"max_tokens": 100}}, {"max_completion_tokens": 5}),
        ({"max_tokens": 5}, {"defaults": {"max_completion_tokens": 100}}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"overrides": {"max_tokens": 100}}, {"max_tokens": 100}),
        ({"max_tokens": 5}, {"drops": frozenset({"max_tokens"}), "defaults": {"max_completion_tokens": 9}}, {"max_completion_tokens": 9}),
        ({"from_tomorrow": [1]}, {"defaults": {"also_from_tomorrow": {"x": 1}}}, {"from_tomorrow": [1], "also_from_tomorrow": {"x": 1}}),
    ],
)
def test_drops_then_defaults_then_overrides(sent: dict[str, Any], parameters: dict[str, Any], forwarded: dict[str, Any]):
    assert changed(sent, **parameters) == forwarded


def test_the_fields_that_we_act_on_are_read_again():
    made = translate.with_parameters(asked(max_tokens=5, n=3), Parameters(overrides={"max_tokens": 100}, drops=frozenset({"n"})))
    assert (made.head.ceiling(), made.head.choices()) == (100, 1)


def test_what_was_asked_stays_as_it_was():
    before = asked(temperature=1)
    body = dict(before.body)
    translate.with_parameters(before, Parameters(overrides={"temperature": 0}))
    assert before.body == body
    assert translate.with_parameters(before, Parameters()) is before


def test_an_alias_that_this_api_does_not_take_is_ours_to_mend():
    with pytest.raises(Unavailable) as refused:
        translate.with_parameters(asked(), Parameters(defaults={"max_tokens": "many"}))
    assert refused.value.code == "alias_misconfigured"


# Through the gateway


def house(tmp_path: Any, handler: Any, parameters: Parameters, **options: Any) -> House:
    made = House(tmp_path, handler, **options)
    alias = Alias("fast", ("a/gpt",), parameters=parameters)
    made.gateway.current.catalog = replace(made.catalog, aliases=(alias,))
    return made


async def test_the_upstream_gets_what_the_alias_made_of_it(tmp_path):
    made = house(tmp_path, lambda request: whole(), Parameters({"top_p": 0.5}, {"temperature": 0}, frozenset({"user"})))
    reply = await made.call(CHAT | {"model": "fast", "temperature": 2, "user": "me"})

    assert reply.status == 200
    assert json.loads(made.sent[0].content) == CHAT | {"model": "gpt", "top_p": 0.5, "temperature": 0}
    assert (made.settled().model, made.settled().served_model) == ("fast", "a/gpt")

    await made.call(CHAT | {"temperature": 2, "user": "me"})  # by its own name nothing is changed
    assert json.loads(made.sent[1].content) == CHAT | {"model": "gpt", "temperature": 2, "user": "me"}


async def test_every_target_gets_the_same(tmp_path):
    def handler(request):
        return fails(500) if "secret-0" in request.headers["authorization"] else whole()

    made = house(tmp_path, handler, Parameters({}, {"temperature": 0}), pool=2)
    for _ in range(2):
        assert (await made.call(CHAT | {"model": "fast"})).status == 200
    assert {json.loads(request.content)["temperature"] for request in made.sent} == {0}
    assert len(made.sent) > 2


async def test_money_is_held_for_what_is_really_asked(tmp_path):
    limits = (Limit("key:1", "money", 5_000, "total"),)
    made = house(tmp_path, lambda request: whole(), Parameters({}, {"max_tokens": 10}), limits=limits)
    big = CHAT | {"max_tokens": 1_000_000}

    assert (await made.call(big | {"model": "fast"})).status == 200
    assert (await made.call(big)).status == 429


async def test_an_option_that_the_alias_takes_away_is_metered_all_the_same(tmp_path):
    events = sse(says("a"), {"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 6}})
    made = house(tmp_path, lambda request: stream(*events), Parameters(drops=frozenset({"stream_options"})))
    reply = await made.call(CHAT | {"model": "fast", "stream": True, "stream_options": {"include_usage": True}})

    assert b"usage" not in reply.body
    assert (made.settled().output, made.settled().usage_source) == (6, "reported")
