"""Limits in the memory of the one serving process. Nothing here waits, so each call is one atomic step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from msgspec import structs

from accounts.principal import Limit
from providers.wire import ApiError
from proxy.call import FREE, Granted, Room
from proxy.errors import OverLimit
from proxy.stores.limits import Budget, Hold, budget_of, no_price, over_budget, over_open, over_rate, window_start

MINUTE = 60.0
Counters = dict[tuple[Budget, float], int]  # micro-dollars by budget and the beginning of its window


class MemoryLimits:
    """Requests and tokens per minute as GCRA (a theoretical arrival time each), open requests, money by window.

    A caller's limits become gates once, when it first calls: a request then only asks each gate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._holds: dict[str, tuple[Hold, list[Gate]]] = {}
        self._arrivals: dict[tuple[str, str], Arrival] = {}
        self._open: dict[str, int] = {}
        self._tracked: dict[str, set[Budget]] = {}
        self._spent: Counters = {}
        self._held: Counters = {}
        self._gates: dict[int, tuple[tuple[Limit, ...], list[Gate]]] = {}  # by the identity of the limits, which are kept with it

    async def reserve(self, hold: Hold) -> Granted:
        return self.take(hold)

    def take(self, hold: Hold) -> Granted:
        """`reserve`, for those who cannot wait."""
        gates = self._gates_of(hold.limits)
        if not gates:
            self._holds[hold.request_id] = hold, gates
            return FREE
        if hold.most is not None:
            hold = _beside_others(hold, gates)
        now = self._clock()
        shadowed: list[str] = []
        taken = gates
        for gate in gates:
            problem = gate.refusal(hold, now)
            if problem is None:
                continue
            if gate.enforce:
                if isinstance(problem, OverLimit):
                    problem.granted = _left(gates, now)
                raise problem
            shadowed.append(f"shadow:{problem.code}")
            # What is refused takes nothing, or the next would seem to be refused for it. But money is spent all the same.
            if not isinstance(gate, MoneyGate):
                taken = [one for one in taken if one is not gate]
        for gate in taken:
            gate.take(hold)
        self._holds[hold.request_id] = hold, taken
        return _left(gates, now, tuple(shadowed))

    def look(self, hold: Hold) -> list[tuple[Limit, ApiError | None]]:
        """What each limit would say to this hold now. Nothing is taken."""
        now, gates = self._clock(), self._gates_of(hold.limits)
        hold = _beside_others(hold, gates)
        return [(gate.limit, gate.refusal(hold, now)) for gate in gates]

    def settle(self, request_id: str, tokens: int | None, money: int | None) -> None:
        """As the port has it; `tokens` None = what was held, which here may be less than the hold says."""
        hold, gates = self._holds.pop(request_id, (None, ()))
        if hold is None:
            return
        if money is None:
            money = hold.money or 0
        now = self._clock()
        for gate in gates:
            gate.settle(hold, tokens, now)
        for scope in hold.scopes:
            for budget in self._tracked.get(scope, ()):
                counter = (budget, window_start(budget[1], budget[2], hold.at))
                self._spent[counter] = self._spent.get(counter, 0) + money

    def open_holds(self) -> int:
        return len(self._holds)

    def untracked(self, limits: Iterable[Limit]) -> set[Budget]:
        """The budgets among these whose past spending is not known here yet."""
        budgets = {budget_of(limit) for limit in limits}
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
        for counter in [counter for counter in self._spent if counter[0] in gone]:
            del self._spent[counter]

    def add_spent(self, spent: Mapping[tuple[Budget, float], int]) -> None:
        for counter, money in spent.items():
            self._spent[counter] = self._spent.get(counter, 0) + money

    def spent(self, limit: Limit, at: float) -> int:
        """Micro-dollars settled in the window that `at` lies in."""
        return self._spent.get((budget_of(limit), window_start(limit.window, limit.time_zone, at)), 0)

    def forget_past_windows(self, now: float) -> None:
        """Drop the counters of windows that are over, arrival times that no longer matter, and the gates of past callers."""
        for counter in [(budget, start) for budget, start in self._spent if start < window_start(budget[1], budget[2], now) - 86_400]:
            del self._spent[counter]
        moment = self._clock()
        self._gates.clear()  # before the arrivals: a gate holds on to its own
        held = {id(gate.arrival) for _, gates in self._holds.values() for gate in gates if isinstance(gate, RateGate)}
        self._arrivals = {key: one for key, one in self._arrivals.items() if one.at > moment or id(one) in held}

    def _gates_of(self, limits: tuple[Limit, ...]) -> list[Gate]:
        known = self._gates.get(id(limits))
        if known is None or known[0] is not limits:
            known = self._gates[id(limits)] = limits, [self._gate(limit) for limit in limits]
        return known[1]

    def _gate(self, limit: Limit) -> Gate:
        if limit.metric in ("rpm", "tpm"):
            return RateGate(limit, self._arrivals.setdefault((limit.scope, limit.metric), Arrival()))
        return OpenGate(limit, self._open) if limit.metric == "concurrency" else MoneyGate(limit, self._spent, self._held)


class Gate:
    """One limit of one caller, with the counters it looks at."""

    __slots__ = ("enforce", "limit")

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.enforce = limit.enforce

    def refusal(self, hold: Hold, now: float) -> ApiError | None:
        raise NotImplementedError

    def take(self, hold: Hold) -> None:
        """Right after it was asked and did not refuse, or need not be heeded: what it has just worked out is still true."""
        raise NotImplementedError

    def settle(self, hold: Hold, tokens: int | None, now: float) -> None:
        """The request is over: `tokens` is what it used, None = what was taken for it."""
        raise NotImplementedError


class Arrival:
    """When the next request would arrive if all came evenly: monotonic seconds."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = 0.0


class RateGate(Gate):
    __slots__ = ("_then", "amount", "arrival", "by_tokens", "each_seconds")

    def __init__(self, limit: Limit, arrival: Arrival) -> None:
        super().__init__(limit)
        self.arrival = arrival
        self.amount = limit.amount
        self.by_tokens = limit.metric == "tpm"
        self.each_seconds = MINUTE / limit.amount if limit.amount else 0.0
        self._then = 0.0  # when the next request would arrive if the one that asked is let in

    def refusal(self, hold: Hold, now: float) -> ApiError | None:
        if not self.amount:
            return over_rate(self.limit, MINUTE)
        at = self.arrival.at
        self._then = (at if at > now else now) + (self._cost(hold) if self.by_tokens else 1) * self.each_seconds
        wait = self._then - now - MINUTE
        return over_rate(self.limit, wait) if wait > 1e-6 else None

    def take(self, hold: Hold) -> None:
        self.arrival.at = max(self.arrival.at, self._then)

    def room(self, now: float) -> Room:
        ahead = self.arrival.at - now
        if ahead <= 0.0:
            return Room(self.amount, self.amount, 0.0)
        left = int((MINUTE - ahead) / self.each_seconds + 1e-6) if self.amount else 0
        return Room(self.amount, left if left > 0 else 0, ahead)

    def settle(self, hold: Hold, tokens: int | None, now: float) -> None:
        if self.by_tokens and tokens is not None:
            self.arrival.at += (tokens - self._cost(hold)) * self.each_seconds

    def _cost(self, hold: Hold) -> int:
        """In tokens."""
        # A request larger than a whole minute's allowance may still pass when nothing else does.
        return hold.tokens if hold.tokens < self.amount else self.amount


class OpenGate(Gate):
    __slots__ = ("open",)

    def __init__(self, limit: Limit, counts: dict[str, int]) -> None:
        super().__init__(limit)
        self.open = counts

    def refusal(self, hold: Hold, now: float) -> ApiError | None:
        if self.open.get(self.limit.scope, 0) < self.limit.amount:
            return None
        return over_open(self.limit)

    def take(self, hold: Hold) -> None:
        self.open[self.limit.scope] = self.open.get(self.limit.scope, 0) + 1

    def settle(self, hold: Hold, tokens: int | None, now: float) -> None:
        left = self.open.get(self.limit.scope, 0) - 1
        if left > 0:
            self.open[self.limit.scope] = left
        else:
            self.open.pop(self.limit.scope, None)


class MoneyGate(Gate):
    __slots__ = ("_counter", "budget", "held", "spent")

    def __init__(self, limit: Limit, spent: Counters, held: Counters) -> None:
        super().__init__(limit)
        self.spent, self.held = spent, held
        self.budget = budget_of(limit)
        self._counter = self.budget, 0.0

    def refusal(self, hold: Hold, now: float) -> ApiError | None:
        self._counter = counter = self.budget, window_start(self.budget[1], self.budget[2], hold.at)
        if hold.money is None:
            return no_price()
        limit = self.limit
        if self.spent.get(counter, 0) + self.held.get(counter, 0) + hold.money <= limit.amount:
            return None
        return over_budget(limit, beside_others=hold.money == hold.most)

    def is_free(self, hold: Hold) -> bool:
        """No call under way holds any of this budget."""
        return not self.held.get((self.budget, window_start(self.budget[1], self.budget[2], hold.at)))

    def take(self, hold: Hold) -> None:
        if hold.money:
            self.held[self._counter] = self.held.get(self._counter, 0) + hold.money

    def settle(self, hold: Hold, tokens: int | None, now: float) -> None:
        if not hold.money:
            return
        counter = self.budget, window_start(self.budget[1], self.budget[2], hold.at)
        left = self.held[counter] - hold.money
        if left:
            self.held[counter] = left
        else:
            del self.held[counter]


def _beside_others(hold: Hold, gates: Iterable[Gate]) -> Hold:
    """With what it has to hold where it is not alone: see `Hold.most`."""
    if hold.most is None or all(gate.is_free(hold) for gate in gates if isinstance(gate, MoneyGate) and gate.enforce):
        return hold
    return structs.replace(hold, money=hold.most)


def _left(gates: Iterable[Gate], now: float, shadowed: tuple[str, ...] = ()) -> Granted:
    """The tightest of what is left, as those see it who are held to it."""
    requests: Room | None = None
    tokens: Room | None = None
    for gate in gates:
        if type(gate) is not RateGate or not gate.enforce:
            continue
        room = gate.room(now)
        if gate.by_tokens:
            tokens = room if tokens is None or room.remaining < tokens.remaining else tokens
        else:
            requests = room if requests is None or room.remaining < requests.remaining else requests
    return Granted(shadowed, requests, tokens) if requests or tokens or shadowed else FREE
