"""Limits that several processes share through Redis: the twin of `memory.py`, behind the same port.

Redis is only a fast copy. The journal and the database are the truth, and after a flush, a restart or a fail-over the workers
build the copy anew, in a round that all of them take part in (see `Rounds` in project/rounds.py):

1. somebody begins a new epoch; every worker enters it in one step of its loop: it posts what it holds at that moment, and
   remembers the position of its journal;
2. each ships its journal up to that position, ships nothing beyond it, and says so;
3. when all have, one of them reads the totals from the database into Redis, and all go on.

So each settlement is counted once: before the position it is in the totals, after it in Redis. A budget that is new passes
through the same steps, for itself alone. Until it is loaded, whoever is bound to it gets 503.

Without an answer from Redis, limits per minute and on open requests fall back to this worker's share of them, and whoever has a
hard budget gets 503.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from msgspec import Struct, structs

from accounts.principal import Limit
from providers.wire import ApiError
from proxy.call import FREE, Granted, Room
from proxy.errors import Unavailable
from proxy.stores import lua
from proxy.stores.limits import Budget, Hold, budget_of, no_price, over_budget, over_open, over_rate, window_start
from proxy.stores.link import Away, Link, pack
from proxy.stores.memory import MemoryLimits

log = logging.getLogger(__name__)

LEASE_SECONDS = 15.0  # open requests of a worker that has not been heard of for so long count no more
BEAT_SECONDS = 1.0
GATHER_SECONDS = 2.0  # after a flush nobody knows who lives: so long everybody has to make itself known
MOST_ROUND_SECONDS = 16.0  # longer than a lease, so that only a dead worker is left behind
LOADER_SECONDS = 5.0  # the one that reads the totals has not been heard of for so long: another does
MOST_LOAD_SECONDS = 30.0
LOADING_SECONDS = 0.15
ADOPTED_AT_ONCE = 500
MOST_QUEUED = 50_000  # half a kilobyte each
QUARTER = 900
NAMES = {"rpm": b"r", "tpm": b"t", "concurrency": b"c", "money": b"m"}
ROUND = b"round"


class Round(Struct, frozen=True):
    """What the last heartbeat told."""

    epoch: bytes = b""
    run_id: bytes = b""
    number: int = 0
    is_open: bool = False
    lapsed: bool = False


class Plan(Struct):
    """What a caller's limits come to, worked out once a quarter of an hour."""

    limits: tuple[Limit, ...]  # kept, so that their identity is nobody else's
    quarter: int
    words: tuple[bytes, ...]  # of each gate: kind, key, amount, enforce, start
    hard_money: bool
    money: bool
    share: tuple[Limit, ...]  # this worker's part of them, without the money


class Taken(Struct):
    """One admission of this worker. `epoch`: in which Redis has its hold; empty = only this process knows of it."""

    hold: Hold
    plan: Plan | None
    epoch: bytes


Told = tuple[bytes, bytes]  # the epoch it is for, and the command


class RedisLimits:
    """`worker` is the name of the journal of this process, by which an adopter finds what it held."""

    def __init__(self, url: str, worker: str = "", *, name: str = "sluice", news: Callable[[bytes], None] | None = None) -> None:
        base = f"{{{name}}}:".encode()
        self._key = base + b"epoch"
        self.channel = (base + b"news").decode()
        self._sha = {script: lua.sha(script) for script in (lua.RESERVE, lua.SETTLE)}
        self._rename(worker)
        self.epoch = b""  # the one that this worker has entered
        self.round = 0  # the last in which it took part, or after which it came
        self.is_new = True  # it has not admitted anything yet that Redis should know of
        self.workers = 1
        self._is_closed = False
        self.last = Round()
        self.stir: Callable[[], None] = _nothing  # something is to be done about a round
        self._news = news or _ignore
        self._taken: dict[str, Taken] = {}
        self._plans: dict[int, Plan] = {}
        self._tracked: dict[str, set[Budget]] = {}
        self.unloaded: set[Budget] = set()  # Redis asked for them
        self._queue: deque[Told] = deque()  # settlements that wait for Redis
        self._memory = MemoryLimits()
        self._beating: asyncio.Task[None] | None = None
        self.link = Link(url, channel=self.channel, scripts=lua.ALL, on_up=self._up, on_news=self._heard, on_failed=self._not_told)

    def _rename(self, worker: str) -> None:
        self.worker = worker or secrets.token_hex(8)
        self._generation = 0
        self._name_lease()

    def _name_lease(self) -> None:
        self._generation += 1
        self.lease = f"{self.worker}.{self._generation}".encode()
        self._worker = self.worker.encode()

    # The port

    async def reserve(self, hold: Hold) -> Granted:
        if not hold.limits:
            self._taken[hold.request_id] = Taken(hold, None, b"")
            return FREE
        plan = self._plan(hold.limits, hold.at)
        if plan.money and hold.money is None and plan.hard_money:
            raise no_price()
        epoch = self.epoch
        if not epoch or not self.link.is_up:
            return self._alone(hold, plan)
        answer = await self._asked(epoch, hold, plan)
        if answer is not None and answer[0] == 3:
            # A new budget is loaded within a moment, and then the first call of a new key need not be refused.
            self._unknown(plan, answer)
            await asyncio.sleep(LOADING_SECONDS)
            epoch = self.epoch
            answer = await self._asked(epoch, hold, plan) if epoch and self.link.is_up else None
        if answer is None:
            return self._alone(hold, plan)
        code = answer[0]
        if code == 1:
            taken = self._taken[hold.request_id] = Taken(hold, plan, epoch)
            if epoch != self.epoch:  # another one has begun meanwhile, and this hold was not known when it was entered
                self._post(taken)
            return self._granted(answer, plan, hold)
        if code == 0:
            raise self._refusal(plan.limits[answer[1]], int(answer[2]) / 1e6)
        self._unknown(plan, answer)
        return self._alone(hold, plan)

    async def _asked(self, epoch: bytes, hold: Hold, plan: Plan) -> Sequence[Any] | None:
        """What Redis says, or None when it is away."""
        try:
            answer: Sequence[Any] = await self.link.ask(self._command(lua.RESERVE, epoch, hold, plan, b"1"))
            return answer
        except Away:
            self._undo(epoch, hold.request_id)
            return None
        except BaseException:
            self._undo(epoch, hold.request_id)
            raise

    def settle(self, request_id: str, tokens: int, money: int | None) -> None:
        taken = self._taken.pop(request_id, None)
        if taken is None:
            return
        hold = taken.hold
        if money is None:
            money = hold.money or 0
        if taken.plan is not None and not taken.epoch:
            self._memory.settle(request_id, tokens, 0)
        counters = self._counters(hold, self._tracked)
        if not taken.epoch and not (counters and money):
            return
        once = b"0" if taken.epoch else b"1"
        command = self._settlement(self.epoch, self._worker, request_id, tokens, b"%d" % money, once, counters)
        self._tell(self.epoch, command)

    def open_holds(self) -> int:
        return len(self._taken)

    # Asking Redis

    def _command(self, script: str, epoch: bytes, hold: Hold, plan: Plan, mode: bytes) -> bytes:
        money = b"-" if hold.money is None else b"%d" % hold.money
        return pack(
            (
                b"EVALSHA",
                self._sha[script],
                b"1",
                self._key,
                epoch,
                self.lease,
                self._worker,
                hold.request_id,
                hold.tokens,
                money,
                b"-" if hold.most is None else b"%d" % hold.most,
                mode,
                *plan.words,
            )
        )

    def _settlement(
        self, epoch: bytes, worker: bytes, request_id: str, tokens: int | str, money: bytes, once: bytes, counters: Sequence[bytes]
    ) -> bytes:
        return pack((b"EVALSHA", self._sha[lua.SETTLE], b"1", self._key, epoch, worker, request_id, tokens, money, once, *counters))

    def _call(self, script: str, *words: object) -> asyncio.Future[Any]:
        return self.link.ask(pack((b"EVALSHA", lua.sha(script), b"1", self._key, *words)))

    def _tell(self, epoch: bytes, command: bytes) -> None:
        """In order behind what waits already."""
        if not epoch:
            return  # it has no place in Redis now: what it settles is in the journal, and the next epoch begins with that
        if not self._queue and self.link.is_up:
            self.link.tell(command, (epoch, command))
        elif len(self._queue) < MOST_QUEUED:
            self._queue.append((epoch, command))
        else:  # Redis has been away for long: counting anew costs less than to remember more
            self._queue.clear()
            self.epoch = b""

    def _not_told(self, what: list[Told]) -> None:
        self._queue.extendleft(told for told in reversed(what) if told[0] == self.epoch)

    def _undo(self, epoch: bytes, request_id: str) -> None:
        """Whether Redis has taken it is not known: it is to be given back if so."""
        self._tell(epoch, self._settlement(epoch, self._worker, request_id, 0, b"0", b"0", ()))

    def _post(self, taken: Taken) -> None:
        assert taken.plan is not None
        if not taken.epoch:
            self._memory.settle(taken.hold.request_id, None, 0)
        taken.epoch = self.epoch
        self._tell(self.epoch, self._command(lua.RESERVE, self.epoch, taken.hold, taken.plan, b"2"))

    def publish(self, news: bytes, channel: str = "") -> bool:
        """To all workers, or to who listens on that channel. False when Redis is away."""
        if not self.link.is_up:
            return False
        self.link.tell(pack((b"PUBLISH", channel or self.channel, news)), None)
        return True

    def _counters(self, hold: Hold, tracked: Mapping[str, set[Budget]]) -> list[bytes]:
        found: list[bytes] = []
        if tracked:
            for scope in hold.scopes:
                for budget in tracked.get(scope, ()):
                    found += (key_of(budget), b"%d" % window_start(budget[1], budget[2], hold.at))
        return found

    def _plan(self, limits: tuple[Limit, ...], at: float) -> Plan:
        plan = self._plans.get(id(limits))
        if plan is None or plan.limits is not limits or plan.quarter != int(at // QUARTER):
            plan = self._plans[id(limits)] = self._make_plan(limits, at)
        return plan

    def _make_plan(self, limits: tuple[Limit, ...], at: float) -> Plan:
        words: list[bytes] = []
        for limit in limits:
            is_money = limit.metric == "money"
            key = key_of(budget_of(limit)) if is_money else limit.scope.encode()
            if limit.metric in ("rpm", "tpm"):
                key += b":" + limit.metric.encode()
            start = b"%d" % window_start(limit.window, limit.time_zone, at) if is_money else b""
            words += (NAMES[limit.metric], key, b"%d" % limit.amount, b"1" if limit.enforce else b"0", start)
        money = [limit for limit in limits if limit.metric == "money"]
        return Plan(limits, int(at // QUARTER), tuple(words), any(limit.enforce for limit in money), bool(money), self._share_of(limits))

    # What Redis answers

    def _granted(self, answer: Sequence[Any], plan: Plan, hold: Hold) -> Granted:
        shadowed: tuple[str, ...] = ()
        if answer[1]:
            gates = [plan.limits[int(number)] for number in bytes(answer[1]).split()]
            shadowed = tuple(f"shadow:{self._refusal(limit, 0).code}" for limit in gates)
        if plan.money and hold.money is None:
            shadowed += (f"shadow:{no_price().code}",)
        requests, tokens = _room(answer, 2), _room(answer, 5)
        return Granted(shadowed, requests, tokens) if requests or tokens or shadowed else FREE

    def _refusal(self, limit: Limit, wait: float) -> ApiError:
        if limit.metric == "money":
            return over_budget(limit, beside_others=wait > 0)
        if limit.metric == "concurrency":
            return over_open(limit)
        problem = over_rate(limit, wait)
        room = Room(limit.amount, 0, max(wait, 60.0 if limit.metric == "tpm" else wait))
        problem.granted = Granted((), None, room) if limit.metric == "tpm" else Granted((), room, None)
        return problem

    def _unknown(self, plan: Plan, answer: Sequence[Any]) -> None:
        """A new epoch that we have not entered yet, or a budget that nobody has loaded."""
        if answer[0] == 3:
            self.unloaded.add(budget_of(plan.limits[int(answer[1])]))
        self.stir()

    # Without Redis

    def _alone(self, hold: Hold, plan: Plan) -> Granted:
        if plan.hard_money:
            raise Unavailable("The budget of this key cannot be checked just now.", code="budget_unavailable", retry_after_seconds=1)
        granted = self._memory.take(structs.replace(hold, limits=plan.share))
        self._taken[hold.request_id] = Taken(hold, plan, b"")
        return granted

    def _share_of(self, limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        """At least one of each, or nothing at all would pass where there are more workers than requests allowed."""
        parts = max(1, self.workers)
        return tuple(
            Limit(limit.scope, limit.metric, max(min(limit.amount, 1), limit.amount // parts), enforce=limit.enforce)
            for limit in limits
            if limit.metric != "money"
        )

    # The life of the connection

    def open(self, worker: str) -> None:
        """Connect, and keep trying. `worker`: the name of this process's journal."""
        self._rename(worker)
        self._is_closed, self.is_new, self.epoch, self.round = False, True, b"", 0
        self.link.open()
        self._beating = asyncio.get_running_loop().create_task(self._beat_on())

    async def is_connected(self, seconds: float) -> bool:
        """Whether Redis can be asked: now, or within so long."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not self.link.is_up and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 once in a life
            await asyncio.sleep(0.01)
        return self.link.is_up

    async def close(self) -> None:
        """Nobody needs to wait for this worker any more."""
        self._is_closed = True
        if self._beating is not None:
            self._beating.cancel()
        with suppress(Away):
            await self._call(lua.BURY, self.epoch, self.worker)
        await self.link.close()

    def _up(self) -> None:
        """Redis can be asked (again). What waited goes first."""
        queue, self._queue = self._queue, deque()
        if self.last.run_id != self.link.run_id:
            self.epoch = b""  # it has been started anew, and may remember an older day
        else:
            for told in queue:
                if told[0] == self.epoch:
                    self.link.tell(told[1], told)
            for taken in self._taken.values():
                if taken.plan is not None and not taken.epoch and self.epoch:
                    self._post(taken)
        self._beat_now()

    def _heard(self, news: bytes) -> None:
        if news == ROUND:
            self._beat_now()
        self._news(news)

    def _beat_now(self) -> None:
        self._loop_task = asyncio.get_running_loop().create_task(self.beat())

    async def _beat_on(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            await self.beat()

    async def beat(self) -> None:
        if self._is_closed:
            return
        try:
            lapsed, workers, epoch, run_id, number, state = await self._call(lua.BEAT, self.lease, LEASE_SECONDS, b"")
        except Away:
            return
        self.last = Round(epoch, run_id, number, state == b"open", bool(lapsed))
        if workers != self.workers:
            self.workers = workers
            self._plans.clear()
        if lapsed and self.epoch and self.epoch == epoch and self._taken and self.link.is_up:
            self._take_again()
        if self._is_behind():
            self.stir()

    def _is_behind(self) -> bool:
        last = self.last
        return last.epoch != self.epoch or last.run_id != self.link.run_id or last.number != self.round

    def _take_again(self) -> None:
        """The lease had ended, and others count our open requests no more: under a new one they do."""
        old = self.lease
        self._name_lease()
        self._tell(self.epoch, pack((b"EVALSHA", lua.sha(lua.BEAT), b"1", self._key, self.lease, LEASE_SECONDS, old)))
        for taken in self._taken.values():
            if taken.plan is not None and taken.epoch:
                given_back = self._settlement(self.epoch, self._worker, taken.hold.request_id, "-", b"0", b"0", ())
                self._tell(self.epoch, given_back)
                self._post(taken)

    # Rounds; called on the loop

    async def begin(self, budgets: Iterable[Budget], *, anew: bool) -> None:
        """Call a round: for these budgets, or for a whole new epoch. Nothing happens if another is faster. Raises Away."""
        epoch = secrets.token_hex(8).encode() if anew else b""
        await self._call(lua.OPEN, epoch, self.last.epoch, self.link.run_id, *map(key_of, budgets))
        await self.beat()

    async def enter(
        self, number: int, epoch: bytes, position: Callable[[], tuple[int, int]], known: Iterable[Budget] = ()
    ) -> tuple[tuple[int, int], list[Budget]] | None:
        """Take part in a round: from this moment on this worker counts its budgets, and its holds are Redis's.

        One that is new may join outside a round, and count those of the budgets known to it that are loaded. The journal's position
        at that moment, and the round's budgets; None when the round is another by now. Raises Away."""
        told = await self._call(lua.JOIN, epoch, number, self.worker, *map(key_of, known))
        if told is None:
            return None
        loaded, keys = told
        budgets = [budget_from(key) for key in bytes(keys).split(b"\n") if key]
        # One step from here on: nothing is admitted or settled between.
        self.track([*budgets, *map(budget_from, loaded)])
        if self.epoch != epoch:
            self.epoch = epoch
            self._queue.clear()  # what was settled before is in the journal, and will be in the totals
            for taken in self._taken.values():
                if taken.plan is not None:
                    self._post(taken)
        self.round, self.is_new = number, False
        self.unloaded.difference_update(budgets)
        return position(), budgets

    async def acknowledge(self, number: int, epoch: bytes, *, shipped: bool) -> tuple[bool, bool]:
        """Whether the round goes on, and whether it is this worker that shall load the totals. Raises Away."""
        patience = GATHER_SECONDS, MOST_ROUND_SECONDS, LEASE_SECONDS, LOADER_SECONDS, MOST_LOAD_SECONDS
        goes_on, loads = await self._call(lua.ACK, epoch, number, self.lease, 1 if shipped else 0, *patience)
        return bool(goes_on), bool(loads)

    async def loaded(self, number: int, epoch: bytes, spent: Mapping[tuple[Budget, float], int]) -> None:
        words: list[object] = []
        for (budget, start), money in spent.items():
            words += (key_of(budget), b"%d" % start, money)
        await self._call(lua.LOAD, epoch, number, self.lease, *words)

    def untracked(self, limits: Iterable[Limit]) -> set[Budget]:
        """The budgets among these that this worker does not count yet."""
        budgets = {budget_of(limit) for limit in limits}
        return {budget for budget in budgets if budget not in self._tracked.get(budget[0], ())}

    def track(self, budgets: Iterable[Budget]) -> None:
        for budget in budgets:
            self._tracked.setdefault(budget[0], set()).add(budget)

    def tracked(self) -> set[Budget]:
        return set().union(*self._tracked.values()) if self._tracked else set()

    def forget_past_windows(self, now: float) -> None:
        """Plans of callers that are gone."""
        self._plans.clear()
        self._memory.forget_past_windows(now)

    # The journals of dead workers

    async def bury(self, worker: str) -> None:
        """Nobody needs to wait for this dead worker. Raises Away, also while this one has no place in the epoch itself."""
        await self._call(lua.BURY, self.epoch, worker)
        if not self.epoch:
            raise Away("This worker has no place in Redis yet.")

    async def adopt(self, worker: str, settled: Iterable[tuple[Hold, int, int | None, bool]]) -> list[str]:
        """Settle again what a dead worker's journal holds: hold, tokens, micro-dollars, and whether it is new in the totals.

        Gives the requests that Redis still holds for it. Raises Away: then it has to be tried again."""
        epoch, name = self.epoch, worker.encode()
        commands = (
            self._settlement(
                epoch,
                name,
                hold.request_id,
                tokens,
                b"-" if money is None else b"%d" % money,
                b"2" if is_new else b"0",
                self._counters(hold, self._tracked),
            )
            for hold, tokens, money, is_new in settled
        )
        # There may be tens of thousands: all at once they would keep everybody waiting, and then be given up as unanswered.
        while some := list(islice(commands, ADOPTED_AT_ONCE)):
            await asyncio.gather(*map(self.link.ask, some))
        left = await self._call(lua.BURY, epoch, name)
        return [request.decode() for request in left]


def key_of(budget: Budget) -> bytes:
    return "|".join(budget).encode()


def budget_from(key: bytes) -> Budget:
    scope, window, time_zone = key.decode().split("|")
    return scope, window, time_zone


def _room(answer: Sequence[Any], first: int) -> Room | None:
    limit, remaining, reset = (int(word) for word in answer[first : first + 3])
    return None if limit < 0 else Room(limit, remaining, reset / 1e6)


def _nothing() -> None:
    pass


def _ignore(news: bytes) -> None:
    pass
