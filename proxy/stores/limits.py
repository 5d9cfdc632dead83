"""The port of the limit stores: what `admit` asks for and `meter` gives back."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Protocol
from zoneinfo import ZoneInfo

from msgspec import Struct

from accounts.principal import Limit
from proxy.call import Granted
from proxy.errors import OverBudget, OverLimit, UnpricedModel


class Hold(Struct, frozen=True):
    """What one request may come to use. Amounts are the worst case; `settle` puts the truth in their place."""

    request_id: str
    at: float  # seconds since the epoch: the windows of money it counts in
    scopes: tuple[str, ...]  # every scope the caller belongs to, limited or not
    limits: tuple[Limit, ...]
    tokens: int
    money: int | None  # micro-dollars; None = the model has no price
    # Of a call that says no ceiling: what it may come to at most. Held in place of `money` where it is not alone under a hard
    # budget, so that of all calls without a ceiling one alone can exceed what it holds. None = `money` is that.
    most: int | None = None


# One counter of money: scope, window, time zone.
Budget = tuple[str, str, str]


class LimitStore(Protocol):
    async def reserve(self, hold: Hold) -> Granted:
        """All limits at once or none. Raises OverLimit, OverBudget or UnpricedModel, and Unavailable when a budget cannot be asked."""

    def settle(self, request_id: str, tokens: int, money: int | None) -> None:
        """Put what was really used in place of what was held; None = not known, then the hold is what was spent.

        A second time it does nothing."""


def budget_of(limit: Limit) -> Budget:
    return (limit.scope, limit.window, limit.time_zone)


def no_price() -> UnpricedModel:
    return UnpricedModel("This model has no price, and a money limit applies to this key: ask your administrator to price it.")


def over_rate(limit: Limit, retry_after_seconds: float) -> OverLimit:
    what = "tokens" if limit.metric == "tpm" else "requests"
    said = f"Too many {what}: the limit is {limit.amount} per minute." if limit.amount else f"No {what} are allowed."
    return OverLimit(said, retry_after_seconds=retry_after_seconds)


def over_open(limit: Limit) -> OverLimit:
    said = f"Too many open requests: the limit is {limit.amount}."
    return OverLimit(said, code="concurrency_limit_exceeded", retry_after_seconds=1)


def over_budget(limit: Limit, *, beside_others: bool = False) -> OverBudget:
    """`beside_others`: one without a ceiling, for which there is no room beside the calls under way."""
    dollars = format(Decimal(limit.amount) / 1_000_000, "f")
    said = f"This request could exceed the budget of {dollars} USD {'in total' if limit.window == 'total' else f'per {limit.window}'}."
    if beside_others:
        problem = OverBudget(f"{said} Set max_tokens, or send it when no other is under way.", retry_after_seconds=1)
        problem.should_retry = True
        return problem
    return OverBudget(said)


@lru_cache(maxsize=4096)
def _window(window: str, time_zone: str, quarter: int) -> float:
    local = datetime.fromtimestamp(quarter * 900, ZoneInfo(time_zone))
    # Where the clocks go back to midnight it comes twice: the day begins with the first.
    local = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    if window == "week":
        local -= timedelta(days=local.weekday())
    elif window == "month":
        local = local.replace(day=1)
    return local.timestamp()


def window_start(window: str, time_zone: str, at: float) -> float:
    """When the window that `at` lies in began, in the organization's time zone: seconds since the epoch, 0 for `total`.

    Zones differ by quarter hours, so that the answer is the same within each quarter of an hour."""
    return 0.0 if window == "total" else _window(window, time_zone, int(at // 900))
