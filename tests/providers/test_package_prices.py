"""Vendors' prices from the offline package: the same figures, and only for the vendor's own address."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
from genai_prices import Usage, calc_price
from genai_prices.types import ClauseEquals, ConditionalPrice, ModelInfo, ModelPrice, StartDateConstraint, Tier, TieredPrices
from genai_prices.types import TimeOfDateConstraint as ByTheHour
from hypothesis import given
from hypothesis import strategies as st

from providers import package_prices
from providers.package_prices import Listed, prices, vendor_of
from providers.price import Price, Rates, Tokens

OPENAI = "https://api.openai.com/v1"
NOW = datetime(2026, 11, 1, tzinfo=UTC)


def in_force(base_url: str, model: str) -> Price:
    listed = prices(base_url)[model][0]
    return Price(1, model, 0, *_amounts(listed.rates), long_above=listed.long_above, long=listed.long)


def _amounts(rates: Rates) -> tuple[int, int, int | None, int | None]:
    return rates.input, rates.output, rates.cache_read, rates.cache_write


@given(
    st.sampled_from(["gpt-4o", "gpt-4o-mini", "gpt-5", "gpt-5.4", "gpt-5.6-sol", "gpt-6-luna", "o1", "gpt-4o-2024-08-06"]),
    st.integers(0, 400_000),
    st.integers(0, 400_000),
    st.integers(0, 50_000),
)
def test_a_call_costs_what_the_package_says(model: str, fresh: int, cached: int, output: int):
    ours = in_force(OPENAI, model).cost(Tokens(fresh_input=fresh, cache_read=cached, output=output))
    usage = Usage(input_tokens=fresh + cached, cache_read_tokens=cached, output_tokens=output)
    theirs = calc_price(usage, model, provider_id="openai").total_price

    assert abs(ours - theirs * 10**6) <= Decimal("0.5")


def test_cache_writes_cost_what_the_package_says():
    tokens = Tokens(fresh_input=1000, cache_read=500, cache_write=300, output=200, reasoning=50)
    usage = Usage(input_tokens=1800, cache_read_tokens=500, cache_write_tokens=300, output_tokens=250)

    for model in ("claude-sonnet-4-5", "claude-opus-4-6"):
        theirs = calc_price(usage, model, provider_id="anthropic").total_price
        assert in_force("https://api.anthropic.com/v1", model).cost(tokens) == pytest.approx(float(theirs * 10**6), abs=0.51)


@pytest.mark.parametrize(
    ("base_url", "vendor"),
    [
        (OPENAI, "openai"),
        ("https://API.OPENAI.COM:443/v1", "openai"),
        ("https://openrouter.ai/api/v1", "openrouter"),
        ("https://api.moonshot.ai/v1", "moonshotai"),
        ("https://generativelanguage.googleapis.com/v1beta/openai", "google"),
        ("https://api.groq.com/openai/v1", "groq"),
    ],
)
def test_a_vendor_is_known_by_its_address(base_url: str, vendor: str):
    found = vendor_of(base_url)

    assert found is not None
    assert found.id == vendor


@pytest.mark.parametrize(
    "base_url",
    [
        "http://localhost:11434/v1",
        "http://127.0.0.1:8000/v1",
        "http://ollama:11434/v1",
        "https://llm.example.org/v1",
        "https://api.openai.com.example.org/v1",
        "https://api.moonshot.example.org/v1",
        "https://example.org/https://api.openai.com/v1",
        "https://example.org/x.googleapis.com",
        "http://demo.invalid/v1",
    ],
)
def test_a_server_of_ones_own_gets_no_vendors_prices(base_url: str):
    assert vendor_of(base_url) is None
    assert prices(base_url, ["gpt-4o"]) == {}


def test_a_listed_variant_gets_the_price_of_the_model_whose_rules_it_fits():
    found = prices(OPENAI, ["o1-2024-12-17-eu", "gpt-4o-2024-08-06", "my-own-model"])

    assert "my-own-model" not in found
    assert found["gpt-4o-2024-08-06"] == found["gpt-4o"]


def test_a_model_for_embeddings_makes_no_output():
    assert prices(OPENAI)["text-embedding-3-small"] == [Listed(None, Rates(20_000, 0))]


@pytest.mark.parametrize("model", ["tts-1", "whisper-1", "gpt-audio", "gpt-realtime", "moderation"])
def test_what_our_prices_cannot_say_is_left_unpriced(model: str):
    assert model not in prices(OPENAI)


def test_a_fee_by_the_request_is_left_unpriced():
    sonar = next(model for model in vendor_of("https://api.perplexity.ai").models if model.id == "sonar")

    assert sonar.prices.requests_kcount is not None
    assert "sonar" not in prices("https://api.perplexity.ai")


def model_of(*conditions: ConditionalPrice) -> ModelInfo:
    return ModelInfo(id="m", match=ClauseEquals("m"), prices=list(conditions))


def usd(amount: str, **more: Decimal | TieredPrices) -> ModelPrice:
    return ModelPrice(input_mtok=Decimal(amount), output_mtok=Decimal(amount), **more)


def test_dated_prices_begin_on_their_day():
    model = model_of(
        ConditionalPrice(prices=usd("1")),
        ConditionalPrice(StartDateConstraint(date(2026, 10, 1)), prices=usd("2")),
        ConditionalPrice(StartDateConstraint(date(2026, 12, 1)), prices=usd("3")),
    )

    assert package_prices._schedule(model, NOW) == [
        Listed(datetime(2026, 10, 1, tzinfo=UTC), Rates(2_000_000, 2_000_000)),
        Listed(datetime(2026, 12, 1, tzinfo=UTC), Rates(3_000_000, 3_000_000)),
    ]
    assert package_prices._schedule(model, datetime(2026, 1, 1, tzinfo=UTC))[0] == Listed(None, Rates(1_000_000, 1_000_000))


def test_a_price_by_the_hour_is_taken_at_its_dearest():
    from datetime import time

    model = model_of(ConditionalPrice(prices=usd("1")), ConditionalPrice(ByTheHour(time(8), time(20)), prices=usd("4")))

    assert package_prices._schedule(model, NOW) == [Listed(None, Rates(4_000_000, 4_000_000))]


def test_of_several_steps_the_first_threshold_has_the_dearest_rates():
    steps = TieredPrices(Decimal(1), [Tier(200, Decimal(3)), Tier(100, Decimal(2))])

    listed = package_prices._listed(ModelPrice(input_mtok=steps, output_mtok=Decimal(5)), None)

    assert listed == Listed(None, Rates(1_000_000, 5_000_000), 100, Rates(3_000_000, 5_000_000))


def test_the_package_is_never_asked_to_fetch(monkeypatch: pytest.MonkeyPatch):
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was reached for")

    package_prices._providers.cache_clear()
    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr("socket.getaddrinfo", refused)

    assert prices(OPENAI)["gpt-4o"]
