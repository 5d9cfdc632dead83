"""Limits in the memory of the one serving process. Nothing here waits, so each call is one atomic step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from accounts.principal import Limit
from providers.wire import ApiError
from proxy.errors import OverBudget, OverLimit, UnpricedModel
from proxy.stores.limits import Budget, Hold, window_start

MINUTE = 60.0


class MemoryLimits:
    """Requests and tokens per minute as GCRA (a theoretical arrival time each), open requests, money by window."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._holds: dict[str, Hold] = {}
        self._arrival: dict[tuple[str, str], float] = {}
        self._open: dict[str, int] = {}
        self._tracked: dict[str, set[Budget]] = {}
        self._spent: dict[tuple[Budget, float], int] = {}
        self._held: dict[tuple[Budget, float], int] = {}

    async def reserve(self, hold: Hold) -> tuple[str, ...]:
        now = self._clock()
        shadowed: list[str] = []
        for limit in hold.limits:
            problem = self._refusal(limit, hold, now)
            if problem is None:
                continue
            if limit.enforce:
                raise problem
            shadowed.append(f"shadow:{problem.code}")
        self._take(hold, now)
        return tuple(shadowed)

    def settle(self, request_id: str, tokens: int, money: int | None) -> None:
        hold = self._holds.pop(request_id, None)
        if hold is None:
            return
        if money is None:
            money = hold.money or 0
        for limit in hold.limits:
            if limit.metric == "concurrency":
                self._leave(limit.scope)
            elif limit.metric == "tpm" and limit.amount:
                key = (limit.scope, "tpm")
                self._arrival[key] = self._arrival.get(key, self._clock()) + (tokens - _token_cost(limit, hold)) * MINUTE / limit.amount
            elif limit.metric == "money":
                self._add(self._held, limit, hold, -(hold.money or 0))
        for scope in hold.scopes:
            for budget in self._tracked.get(scope, ()):
                counter = (budget, window_start(budget[1], budget[2], hold.at))
                self._spent[counter] = self._spent.get(counter, 0) + money

    def open_holds(self) -> int:
        return len(self._holds)

    def untracked(self, limits: Iterable[Limit]) -> set[Budget]:
        """The budgets among these whose past spending is not known here yet."""
        budgets = {_budget(limit) for limit in limits}
        return {budget for budget in budgets if budget not in self._tracked.get(budget[0], ())}

    def track(self, budgets: Iterable[Budget]) -> None:
        """Count these from now on. What was settled before must be added with `add_spent`."""
        for budget in budgets:
            self._tracked.setdefault(budget[0], set()).add(budget)

    def untrack(self, budgets: Iterable[Budget]) -> None:
        """Their past spending could not be read: they are as unknown as before."""
        gone = set(budgets)
        for budget in gone:
            self._tracked.get(budget[0], set()).discard(budget)
        self._spent = {counter: money for counter, money in self._spent.items() if counter[0] not in gone}

    def add_spent(self, spent: Mapping[tuple[Budget, float], int]) -> None:
        for counter, money in spent.items():
            self._spent[counter] = self._spent.get(counter, 0) + money

    def spent(self, limit: Limit, at: float) -> int:
        """Micro-dollars settled in the window that `at` lies in."""
        return self._spent.get((_budget(limit), window_start(limit.window, limit.time_zone, at)), 0)

    def forget_past_windows(self, now: float) -> None:
        """Drop the counters of windows that are over and arrival times that no longer matter."""
        self._spent = {
            (budget, start): money
            for (budget, start), money in self._spent.items()
            if start >= window_start(budget[1], budget[2], now) - 86_400
        }
        moment = self._clock()
        self._arrival = {key: arrival for key, arrival in self._arrival.items() if arrival > moment}

    def _refusal(self, limit: Limit, hold: Hold, now: float) -> ApiError | None:
        if limit.metric == "rpm":
            return self._too_fast(limit, "rpm", 1, now, "requests")
        if limit.metric == "tpm":
            return self._too_fast(limit, "tpm", _token_cost(limit, hold), now, "tokens")
        if limit.metric == "concurrency":
            if self._open.get(limit.scope, 0) < limit.amount:
                return None
            return OverLimit(
                f"Too many open requests: the limit is {limit.amount}.", code="concurrency_limit_exceeded", retry_after_seconds=1
            )
        if hold.money is None:
            return UnpricedModel("This model has no price, and a money limit applies to this key: ask your administrator to price it.")
        counter = (_budget(limit), window_start(limit.window, limit.time_zone, hold.at))
        if self._spent.get(counter, 0) + self._held.get(counter, 0) + hold.money <= limit.amount:
            return None
        return OverBudget(f"This request could exceed the budget of {limit.amount / 1e6:g} USD per {limit.window}.")

    def _too_fast(self, limit: Limit, metric: str, cost: int, now: float, what: str) -> OverLimit | None:
        if not limit.amount:
            return OverLimit(f"No {what} are allowed.", retry_after_seconds=MINUTE)
        wait = max(self._arrival.get((limit.scope, metric), 0.0), now) + cost * MINUTE / limit.amount - now - MINUTE
        if wait <= 1e-6:
            return None
        return OverLimit(f"Too many {what}: the limit is {limit.amount} per minute.", retry_after_seconds=wait)

    def _take(self, hold: Hold, now: float) -> None:
        self._holds[hold.request_id] = hold
        for limit in hold.limits:
            if limit.metric in ("rpm", "tpm"):
                if limit.amount:
                    cost = 1 if limit.metric == "rpm" else _token_cost(limit, hold)
                    key = (limit.scope, limit.metric)
                    self._arrival[key] = max(self._arrival.get(key, 0.0), now) + cost * MINUTE / limit.amount
            elif limit.metric == "concurrency":
                self._open[limit.scope] = self._open.get(limit.scope, 0) + 1
            else:
                self._add(self._held, limit, hold, hold.money or 0)

    def _leave(self, scope: str) -> None:
        left = self._open.get(scope, 0) - 1
        if left > 0:
            self._open[scope] = left
        else:
            self._open.pop(scope, None)

    @staticmethod
    def _add(counters: dict[tuple[Budget, float], int], limit: Limit, hold: Hold, money: int) -> None:
        counter = (_budget(limit), window_start(limit.window, limit.time_zone, hold.at))
        total = counters.get(counter, 0) + money
        if total:
            counters[counter] = total
        else:
            counters.pop(counter, None)


def _token_cost(limit: Limit, hold: Hold) -> int:
    # A request larger than a whole minute's allowance may still pass when nothing else does.
    return min(hold.tokens, limit.amount)


def _budget(limit: Limit) -> Budget:
    return (limit.scope, limit.window, limit.time_zone)
