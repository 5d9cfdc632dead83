"""Prices from the offline package genai-prices: what a vendor asks for its models, found by the address that is called.

Never by a model's name alone: a server of one's own that calls a model `gpt-4o` costs what its owner says. The package
comes with its data and is never asked to fetch newer.

What our prices cannot say is left unpriced, which is shown, rather than guessed low: fees by the request, and models
whose output has kinds of tokens that cost more than text. Left out without a word are fees of hosted tools, and input
of other kinds than text counts as text. A price by the hour of the day is taken at its dearest. Of several steps for
long requests the first threshold and the dearest rates are taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, time
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from providers.price import Rates

if TYPE_CHECKING:
    from genai_prices.types import ConditionalPrice, MatchLogic, ModelInfo, ModelPrice, Provider, TieredPrices

MICRO = 1_000_000


@dataclass(frozen=True, slots=True)
class Listed:
    """What a vendor asks for one model from a moment on; `starts_at` None = as far back as the package knows."""

    starts_at: datetime | None
    rates: Rates
    long_above: int | None = None
    long: Rates | None = None


@cache
def _providers() -> list[Provider]:
    # Here and not above: the data costs a third of a second and 20 MB, and only some processes ever ask.
    from genai_prices.data_snapshot import get_snapshot

    return get_snapshot().providers


def vendor_of(base_url: str) -> Provider | None:
    """The vendor whose API this address is, or None for anything else, such as a server of one's own."""
    return next((provider for provider in _providers() if _is_api_of(provider.api_pattern, base_url)), None)


def _is_api_of(pattern: str, base_url: str) -> bool:
    parts = urlsplit(base_url.lower())
    found = re.match(pattern, base_url.lower())
    # The package's patterns are meant for addresses that are known to be a vendor's. Ours are typed in by anybody:
    # what would fit with any host, or goes on after the vendor's (api.vendor.com.example.org), is not the vendor's.
    if found is None or re.match(pattern, f"{parts.scheme}://invalid{parts.path}"):
        return False
    rest_of_host = f"{parts.scheme}://{parts.netloc}"[found.end() :].partition(":")[0]
    return not rest_of_host or (found[0].endswith(".") and "." not in rest_of_host)


def prices(base_url: str, also: Iterable[str] = (), *, now: datetime | None = None) -> dict[str, list[Listed]]:
    """Upstream model id -> its prices in order of time: the one in force first, then those to come.

    Holds every model that the package knows of the vendor, and of `also` those that its rules recognize (such as
    a dated variant). Empty when the address is no vendor's that the package knows."""
    vendor = vendor_of(base_url)
    if vendor is None:
        return {}
    found: dict[str, list[Listed]] = {}
    for name in [*_known_names(vendor), *also]:
        model = vendor.find_model(name, all_providers=_providers())
        if model is not None and (schedule := _schedule(model, now or datetime.now(UTC))):
            found[name] = schedule
    return found


def _known_names(vendor: Provider) -> Iterator[str]:
    for model in vendor.models:
        yield model.id
        yield from _spelled_out(model.match)


def _spelled_out(match: MatchLogic) -> Iterator[str]:
    """The names that a rule gives in full: a model's other names."""
    if exact := getattr(match, "equals", None):
        yield exact
    for clause in getattr(match, "or_", ()):
        yield from _spelled_out(clause)


def _schedule(model: ModelInfo, now: datetime) -> list[Listed]:
    from genai_prices.types import ModelPrice

    conditions = [] if isinstance(model.prices, ModelPrice) else model.prices
    if not conditions:
        price = model.prices if isinstance(model.prices, ModelPrice) else None
        listed = _listed(price, None) if price is not None else None
        return [listed] if listed is not None else []
    starts = sorted(start for start in map(_start_of, conditions) if start is not None)
    past = [start for start in starts if start <= now]
    moments = [(past[-1] if past else None, now), *((start, start) for start in starts if start > now)]
    schedule = [_listed(_dearest_at(conditions, moment), start) for start, moment in moments]
    return [listed for listed in schedule if listed is not None]


def _start_of(condition: ConditionalPrice) -> datetime | None:
    day = getattr(condition.constraint, "start_date", None)
    return datetime.combine(day, time(), UTC) if day is not None else None


def _dearest_at(conditions: list[ConditionalPrice], moment: datetime) -> ModelPrice:
    """The price of this day; where it depends on the hour, the dearest of them."""
    by_the_hour = [condition.prices for condition in conditions if hasattr(condition.constraint, "start_time")]
    of_the_day = [
        condition.prices
        for condition in conditions
        if not hasattr(condition.constraint, "start_time") and (condition.constraint is None or condition.constraint.active(moment))
    ]
    return max([*(of_the_day[-1:] or [conditions[0].prices]), *by_the_hour], key=lambda price: _base(price.input_mtok))


def _listed(price: ModelPrice, starts_at: datetime | None) -> Listed | None:
    if price.input_mtok is None or price.requests_kcount is not None:
        return None
    if any(_base(value) > _base(price.output_mtok) for name, value in vars(price).items() if re.match(r"output_\w+_mtok", name)):
        return None
    amounts = (price.input_mtok, price.output_mtok, price.cache_read_mtok, price.cache_write_mtok)
    thresholds = [amount.tiers[0].start for amount in amounts if not (amount is None or isinstance(amount, Decimal))]
    if not thresholds:
        return Listed(starts_at, _rates(*map(_base_or_none, amounts)))
    return Listed(starts_at, _rates(*map(_base_or_none, amounts)), min(thresholds), _rates(*map(_dearest, amounts)))


def _rates(fresh: Decimal | None, output: Decimal | None, cache_read: Decimal | None, cache_write: Decimal | None) -> Rates:
    # A model without an output price, such as one for embeddings, makes no output tokens.
    return Rates(_micro(fresh) or 0, _micro(output) or 0, _micro(cache_read), _micro(cache_write))


def _micro(usd: Decimal | None) -> int | None:
    return None if usd is None else int((usd * MICRO).to_integral_value(ROUND_HALF_UP))


def _base_or_none(amount: Decimal | TieredPrices | None) -> Decimal | None:
    return amount if amount is None or isinstance(amount, Decimal) else amount.base


def _base(amount: Decimal | TieredPrices | None) -> Decimal:
    return _base_or_none(amount) or Decimal(0)


def _dearest(amount: Decimal | TieredPrices | None) -> Decimal | None:
    return amount if amount is None or isinstance(amount, Decimal) else max(amount.base, *(tier.price for tier in amount.tiers))
