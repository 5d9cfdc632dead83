"""Prices that an upstream's own list tells: dated rows, added when a figure changed, and never before a row by hand."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import httpx
import pytest
from django.utils import timezone

from providers import listing
from providers.actions import add_credential, change_credential, refresh_models, set_price
from providers.models import Credential, Price, PriceSource, changed
from providers.over_httpx import OverHttpx
from providers.price import PriceBook

pytestmark = pytest.mark.django_db


def detail(name: str, fresh: float = 28, output: float = 88, **costs: object) -> dict[str, Any]:
    return {
        "id": name,
        "provider": "openrouter",
        "costs_currency": "usd-cents",
        "input_cost_key": "prompt",
        "output_cost_key": "completion",
        "costs": {"tokens": 1_000_000, "prompt": fresh, "completion": output, "request": 0, **costs},
    }


class World:
    """The upstream's list, as it is now."""

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] = [detail("openrouter:deepseek/deepseek-chat"), detail("openrouter:free/model:free", 0, 0)]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"models": self.models})


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(listing, "transport_over", lambda egress: OverHttpx(httpx.MockTransport(world)))
    return world


@pytest.fixture
def puter(world: World) -> Credential:
    return add_credential("puter", "Puter", "some-token")


def rows(pattern: str = "puter/openrouter:deepseek/deepseek-chat") -> list[tuple[int, int]]:
    found = Price.objects.filter(pattern=pattern, source=PriceSource.UPSTREAM).order_by("starts_at", "pk")
    return list(found.values_list("input", "output"))


def in_force(model: str) -> int | None:
    price = PriceBook(row.in_memory() for row in Price.objects.all()).find(model, timezone.now().timestamp())
    return None if price is None else price.input


def test_what_the_list_tells_becomes_a_price_from_now_on(puter: Credential):
    before = timezone.now()
    assert refresh_models(puter) == ""

    assert rows() == [(280_000, 880_000)]
    assert rows("puter/openrouter:free/model:free") == [(0, 0)], "0 is a price"
    assert Price.objects.filter(starts_at__gte=before).count() == 2


def test_the_same_list_again_adds_nothing_and_is_no_news(puter: Credential):
    refresh_models(puter)
    heard: list[type] = []

    def hear(sender: type, **_: object) -> None:
        heard.append(sender)

    changed.connect(hear)
    refresh_models(puter)
    changed.disconnect(hear)

    assert Price.objects.count() == 2
    assert heard == []


def test_a_changed_figure_is_a_new_row_and_is_announced(world: World, puter: Credential):
    refresh_models(puter)
    world.models[0] = detail("openrouter:deepseek/deepseek-chat", 30, 88)
    heard: list[type] = []

    def hear(sender: type, **_: object) -> None:
        heard.append(sender)

    changed.connect(hear)
    refresh_models(puter)
    changed.disconnect(hear)

    assert rows() == [(280_000, 880_000), (300_000, 880_000)]
    assert rows("puter/openrouter:free/model:free") == [(0, 0)]
    assert in_force("puter/openrouter:deepseek/deepseek-chat") == 300_000
    assert heard == [Price]


@pytest.mark.parametrize("pattern", ["puter/openrouter:deepseek/deepseek-chat", "puter/openrouter:deepseek/*", "puter/*"])
def test_a_row_by_hand_that_is_in_force_is_enough(puter: Credential, pattern: str):
    set_price(pattern, 1, 2)
    refresh_models(puter)

    assert rows() == []
    assert in_force("puter/openrouter:deepseek/deepseek-chat") == 1_000_000


def test_a_row_by_hand_to_come_leaves_the_time_until_then_to_the_list(puter: Credential):
    set_price("puter/*", 1, 2, starts_at=timezone.now() + timedelta(days=1))
    refresh_models(puter)

    assert in_force("puter/openrouter:deepseek/deepseek-chat") == 280_000


def test_what_cannot_be_a_price_leaves_the_model_unpriced_and_the_list_kept(world: World, puter: Credential):
    world.models = [
        detail("by-request", request=1),
        detail("negative", -1),
        detail("absurd", 10**11),
        detail("no-number", "many"),  # type: ignore[arg-type]
        {**detail("euros"), "costs_currency": "eur-cents"},
        {**detail("no-key"), "input_cost_key": ["prompt"]},
        {"id": "no-costs"},
        {**detail("odd"), "costs": [1]},
        detail("good"),
    ]
    assert refresh_models(puter) == ""

    assert list(Price.objects.values_list("pattern", flat=True)) == ["puter/good"]
    assert puter.models.count() == 9


def test_another_prefix_gets_prices_of_its_own_soon(puter: Credential):
    refresh_models(puter)
    change_credential(puter, prefix="other")
    puter.refresh_from_db()
    assert puter.models_due_at is None

    refresh_models(puter)
    assert rows("other/openrouter:deepseek/deepseek-chat") == [(280_000, 880_000)]


def test_the_price_package_does_not_go_before_what_the_upstream_says_itself(world: World):
    address = "https://openrouter.ai/api/v1"
    puter = add_credential("puter", "Puter", "some-token", base_url=address)
    priced = Price.objects.filter(pattern__startswith="puter/", pattern__contains="gpt-4o", source=PriceSource.PACKAGE).first()
    assert priced is not None, "the package knows this address"
    name = priced.pattern.removeprefix("puter/")
    world.models = [detail(name, 1, 2)]
    refresh_models(puter)
    Price.objects.filter(source=PriceSource.PACKAGE, pattern=priced.pattern).delete()  # as if the package had another figure now
    refresh_models(puter)

    assert in_force(priced.pattern) == 10_000
    assert not Price.objects.filter(source=PriceSource.PACKAGE, pattern=priced.pattern).exists()


def test_other_kinds_list_no_prices(world: World):
    world.models = [detail("some-model")]
    other = add_credential("openai", "Other", "some-secret", base_url="http://llm.example.org/v1")
    refresh_models(other)

    assert not Price.objects.filter(source=PriceSource.UPSTREAM).exists()


# An account to which callers bring their own secret


def test_an_account_to_which_callers_bring_their_token_needs_none(world: World):
    puter = add_credential("puter", "Everybody's own", "", settings={"pass_through": "1"})

    assert puter.secret is None
    assert change_credential(puter, base_url="https://puter.example.org") == []
    puter.refresh_from_db()
    assert puter.state == "active"
