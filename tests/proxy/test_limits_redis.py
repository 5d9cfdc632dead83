"""Limits that several workers share through a real Redis: the same promises as in memory, and those about losing it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from accounts.principal import Limit, Principal
from providers.adapter import Target
from providers.price import Price, PriceBook
from providers.secrets import SecretText
from providers.wire import ChatHead
from proxy.call import Granted
from proxy.catalog import Catalog
from proxy.errors import OverBudget, OverLimit, Unavailable, UnpricedModel
from proxy.pipeline import translate
from proxy.pipeline.admit import hold_of
from proxy.stores import link
from proxy.stores import redis as store
from proxy.stores.limits import Budget, Hold, budget_of, window_start
from proxy.stores.redis import RedisLimits
from tests.redises import SHARED, name_on_the_shared_server, server

pytestmark = pytest.mark.redis

BUDGET = Limit("key:1", "money", 100, window="total")
ALL = (
    Limit("organization:1", "money", 100, window="month"),
    Limit("team:1", "money", 100, window="week"),
    Limit("user:1@1", "money", 100, window="day"),
    BUDGET,
)


def hold(name: str, *limits: Limit, tokens: int = 10, money: int | None = 0, most: int | None = None, at: float | None = None) -> Hold:
    scopes = tuple({limit.scope for limit in limits}) or ("key:1",)
    return Hold(name, time.time() if at is None else at, scopes, tuple(limits), tokens, money, most)


class Workers:
    """Several workers in one process, and the totals of a database that is a dict."""

    def __init__(self, url: str, name: str, count: int) -> None:
        self.url, self.name = url, name
        self.totals: dict[Budget, int] = {}
        self.all = [RedisLimits(url, name=name) for _ in range(count)]

    def __getitem__(self, number: int) -> RedisLimits:
        return self.all[number]

    async def start(self) -> None:
        for number, one in enumerate(self.all):
            one.open(f"w{number}")
            assert await one.is_connected(5)
            await one.beat()

    async def agree(self, *limits: Limit, anew: bool = True) -> None:
        """A round, as `Rounds` makes it: all enter, all acknowledge, one loads."""
        for one in self.all:
            await one.beat()
        await self[0].begin([budget_of(limit) for limit in limits], anew=anew)
        for one in self.all:
            await one.beat()
            entered = await one.enter(one.last.number, one.last.epoch, lambda: (1, 0))
            assert entered is not None
        for one in self.all:
            await one.acknowledge(one.last.number, one.last.epoch, shipped=True)
        for one in self.all:
            _, loads = await one.acknowledge(one.last.number, one.last.epoch, shipped=True)
            if loads:
                await one.loaded(one.last.number, one.last.epoch, self.spent(entered[1]))
        for one in self.all:
            await one.beat()
            assert not one.last.is_open

    def spent(self, budgets: list[Budget]) -> Mapping[tuple[Budget, float], int]:
        now = time.time()
        return {(one, window_start(one[1], one[2], now)): self.totals.get(one, 0) for one in budgets}

    async def close(self) -> None:
        for one in self.all:
            await one.close()


@pytest.fixture(autouse=True)
def without_gathering_and_with_patience(monkeypatch):
    """A thousand calls at once keep a busy machine's Redis for longer than a request may wait: what is asked here is what they come to."""
    monkeypatch.setattr(store, "GATHER_SECONDS", 0)
    monkeypatch.setattr(link, "ANSWER_SECONDS", 10)


@asynccontextmanager
async def workers(count: int = 1, *limits: Limit, url: str = SHARED, name: str = "") -> AsyncIterator[Workers]:
    if not name:
        with name_on_the_shared_server() as own:
            async with workers(count, *limits, url=url, name=own) as found:
                yield found
        return
    some = Workers(url, name, count)
    await some.start()
    await some.agree(*limits)
    try:
        yield some
    finally:
        await some.close()


async def admitted(one: RedisLimits, *holds: Hold) -> int:
    answers = await asyncio.gather(*(one.reserve(each) for each in holds), return_exceptions=True)
    assert all(isinstance(answer, Granted | OverLimit | OverBudget) for answer in answers), answers
    return sum(isinstance(answer, Granted) for answer in answers)


async def quiet(some: Workers) -> None:
    """Until Redis has done all that it was told."""
    for one in some.all:
        await one.beat()


async def test_so_many_requests_a_minute_over_all_workers_and_then_a_wait_that_is_true():
    limit = Limit("key:1", "rpm", 60)
    async with workers(2) as two:
        for number in range(60):
            await two[number % 2].reserve(hold(f"r{number}", limit))
        with pytest.raises(OverLimit) as refused:
            await two[0].reserve(hold("more", limit))
        wait = refused.value.retry_after_seconds
        assert wait is not None
        assert 0.5 < wait <= 1
        assert refused.value.granted.requests.remaining == 0
        await asyncio.sleep(wait)
        granted = await two[1].reserve(hold("later", limit))
        assert (granted.requests.limit, granted.requests.remaining) == (60, 0)
        assert 58 < granted.requests.reset_seconds <= 60


async def test_tokens_count_as_they_were_really_used():
    limit = Limit("key:1", "tpm", 100)
    async with workers(2) as two:
        await two[0].reserve(hold("a", limit, tokens=90))
        with pytest.raises(OverLimit):
            await two[1].reserve(hold("b", limit, tokens=20))
        two[0].settle("a", tokens=10, money=0)
        await quiet(two)
        granted = await two[1].reserve(hold("b", limit, tokens=20))
        assert granted.tokens.remaining in (70, 71)
        two[1].settle("b", tokens=150, money=0)
        await quiet(two)
        with pytest.raises(OverLimit) as refused:
            await two[0].reserve(hold("c", limit, tokens=1))
        assert refused.value.retry_after_seconds == pytest.approx(60 * 61 / 100, abs=1)


async def test_a_clock_that_was_set_back_keeps_nobody_out():
    limit = Limit("key:1", "rpm", 60)
    async with workers(1) as one:
        key = f"{{{one.name}}}:rate:key:1:rpm"
        import redis

        with redis.Redis.from_url(SHARED) as client:
            later = (time.time() + 3600) * 1e6
            client.set(key, f"{later + 30e6:.0f} {later:.0f}")  # half a minute's worth, written an hour from now
        granted = await one[0].reserve(hold("a", limit))
        assert granted.requests.remaining in (28, 29)


async def test_a_place_is_free_again_after_settling_and_a_refusal_takes_nothing():
    wide, narrow = Limit("organization:1", "concurrency", 3), Limit("key:1", "concurrency", 2)
    async with workers(2) as two:
        await two[0].reserve(hold("a", wide, narrow))
        await two[1].reserve(hold("b", wide, narrow))
        with pytest.raises(OverLimit) as refused:
            await two[0].reserve(hold("c", wide, narrow))
        assert refused.value.code == "concurrency_limit_exceeded"
        await two[0].reserve(hold("d", wide))
        for _ in range(3):
            two[0].settle("a", 0, 0)
        await quiet(two)
        assert await admitted(two[1], hold("e", wide, narrow), hold("f", wide, narrow)) == 1


async def test_the_places_of_a_worker_that_is_not_heard_of_are_free_and_its_own_again_when_it_is(monkeypatch):
    limit = Limit("key:1", "concurrency", 1)
    async with workers(2) as two:
        await two[0].reserve(hold("a", limit))
        monkeypatch.setattr(store, "LEASE_SECONDS", 0.01)
        await two[0].beat()
        await asyncio.sleep(0.05)
        assert await admitted(two[1], hold("b", limit)) == 1
        two[1].settle("b", 0, 0)
        monkeypatch.setattr(store, "LEASE_SECONDS", 15)
        await two[0].beat()
        await quiet(two)
        assert await admitted(two[1], hold("c", limit)) == 0  # `a` still runs
        two[0].settle("a", 0, 0)
        await quiet(two)
        assert await admitted(two[1], hold("c", limit)) == 1


async def test_what_is_taken_again_costs_no_second_time(monkeypatch):
    """A call may allow itself more tokens than a minute has: it is let in for all of the minute, and no more than that is its due."""
    limit = Limit("key:1", "tpm", 100)
    async with workers(1) as one:
        await one[0].reserve(hold("a", limit, tokens=100_000))
        monkeypatch.setattr(store, "LEASE_SECONDS", 0.01)
        await one[0].beat()
        await asyncio.sleep(0.05)
        monkeypatch.setattr(store, "LEASE_SECONDS", 15)
        await one[0].beat()
        await quiet(one)
        with pytest.raises(OverLimit) as refused:
            await one[0].reserve(hold("b", limit, tokens=100))
        assert 59 < refused.value.retry_after_seconds <= 60


async def test_what_was_let_in_without_redis_costs_no_second_time_when_it_is_back():
    limit = Limit("key:1", "tpm", 100)
    with server() as own:
        async with workers(1, url=own.url, name="sluice") as one:
            await asyncio.to_thread(own.stop)
            await asyncio.sleep(0.1)
            await one[0].reserve(hold("a", limit, tokens=100_000))
            await asyncio.to_thread(own.restart)
            assert await one[0].is_connected(5)
            await one[0].beat()
            await one.agree()
            await asyncio.to_thread(own.stop)
            await asyncio.sleep(0.1)
            with pytest.raises(OverLimit) as refused:
                await one[0].reserve(hold("b", limit, tokens=100))
            assert refused.value.retry_after_seconds <= 60


async def test_a01_a_thousand_at_once_with_room_for_fifty():
    limits = tuple(Limit(one.scope, "money", 50 * 7, window=one.window) for one in ALL)
    async with workers(4, *limits) as four:
        counts = await asyncio.gather(
            *(admitted(four[number], *(hold(f"{number}-{each}", *limits, money=7) for each in range(250))) for number in range(4))
        )
        assert sum(counts) == 50
        for one in four.all:
            for name in list(one._taken):
                one.settle(name, 0, 7)
        await quiet(four)
        assert sum([await admitted(one, hold("more", *limits, money=1)) for one in four.all]) == 0


async def test_money_is_held_at_its_worst_and_settled_at_the_truth_once():
    async with workers(2, BUDGET) as two:
        await two[0].reserve(hold("a", BUDGET, money=60))
        assert await admitted(two[1], hold("b", BUDGET, money=41)) == 0
        for _ in range(10):
            two[0].settle("a", 0, 10)
        await quiet(two)
        assert await admitted(two[1], hold("b", BUDGET, money=91), hold("c", BUDGET, money=90)) == 1


async def test_of_calls_without_a_ceiling_on_any_worker_one_alone_holds_less_than_it_may_come_to():
    async with workers(2, *ALL) as all_of_them:
        first, second = all_of_them[0], all_of_them[1]
        await first.reserve(hold("a", *ALL, money=5, most=45))
        await second.reserve(hold("b", *ALL, money=5, most=45))  # holds 45
        with pytest.raises(OverBudget) as refused:
            await first.reserve(hold("c", *ALL, money=5, most=51))
        assert (refused.value.retry_after_seconds, refused.value.should_retry) == (1, True)
        await second.reserve(hold("d", *ALL, money=50))  # with a ceiling: what it says
        with pytest.raises(OverBudget) as refused:
            await first.reserve(hold("e", *ALL, money=1))
        assert (refused.value.retry_after_seconds, refused.value.should_retry) == (None, False)
        first.settle("a", 1, 1)
        second.settle("b", 1, 1)
        second.settle("d", 1, 1)
        await quiet(all_of_them)
        await first.reserve(hold("f", *ALL, money=97, most=1000))  # alone again
        first.settle("f", 1, None)
        await quiet(all_of_them)
        with pytest.raises(OverBudget):
            await second.reserve(hold("g", *ALL, money=1))
        assert first.open_holds() == second.open_holds() == 0


async def test_under_a_shadow_budget_alone_nothing_more_is_held():
    soft = Limit("key:1", "money", 100, window="total", enforce=False)
    async with workers(1, soft) as [one]:
        for name in "abcd":
            assert not (await one.reserve(hold(name, soft, money=5, most=90))).shadowed


async def test_the_same_request_asked_for_twice_holds_once():
    async with workers(1, BUDGET) as one:
        await one[0].reserve(hold("a", BUDGET, money=60))
        await one[0].reserve(hold("a", BUDGET, money=60))
        assert await admitted(one[0], hold("b", BUDGET, money=40)) == 1


async def test_a_request_counts_in_the_window_in_which_it_was_admitted():
    limit = Limit("key:1", "money", 100, window="day")
    async with workers(1, limit) as one:
        yesterday = time.time() - 86_400
        await one[0].reserve(hold("late", limit, money=50, at=yesterday))
        one[0].settle("late", 0, 40)
        await quiet(one)
        assert await admitted(one[0], hold("new", limit, money=100)) == 1
        assert await admitted(one[0], hold("old", limit, money=61, at=yesterday), hold("older", limit, money=60, at=yesterday)) == 1


async def test_shadow_limits_and_models_without_a_price():
    shadow = Limit("key:1", "concurrency", 0, enforce=False)
    async with workers(1, BUDGET) as one:
        assert (await one[0].reserve(hold("a", shadow))).shadowed == ("shadow:concurrency_limit_exceeded",)
        with pytest.raises(UnpricedModel):
            await one[0].reserve(hold("b", BUDGET, money=None))
        await one[0].reserve(hold("c", money=None))  # without limits nobody is asked


@pytest.mark.parametrize("most", [10**15, 10**25, 10**400], ids=["15 digits", "25 digits", "400 digits"])
async def test_a_client_that_allows_any_number_of_tokens_takes_no_place_for_good(most):
    """What is held for it is no number of Redis's: a script that fails there has taken what stood before it already."""
    places, rate = Limit("organization:1", "concurrency", 2), Limit("key:1", "tpm", 1000)
    counted = Limit("key:1", "money", 100, window="total", enforce=False)
    asked = translate.read("chat/completions", ChatHead, b'{"model": "m", "messages": [], "max_tokens": %d}' % most, content_type=b"")
    caller = Principal(1, 1, 1, limits=(places, rate, counted))
    target = Target("openai", 1, "one", "https://one.example", SecretText(""), "m", "one/m")
    catalog = Catalog(prices=PriceBook([Price(1, "one/m", 0, 10_000_000, 80_000_000)]))
    async with workers(1, counted) as one:
        for number in range(5):
            await one[0].reserve(hold_of(f"r{number}", time.time(), caller, asked, [target], catalog))
            one[0].settle(f"r{number}", 0, None if number == 4 else 0)
            await quiet(one)
            assert one[0].link.is_up


@pytest.mark.parametrize("metric", ["rpm", "tpm", "concurrency"])
async def test_a_shadow_limit_counts_what_it_would_have_refused(metric):
    """After three times as much as is allowed the next is let in as soon as there would have been room for it."""
    wide, counted = Limit("organization:1", metric, 1000), Limit("key:1", metric, 20, enforce=False)
    async with workers(1) as one:
        shadowed = [bool((await one[0].reserve(hold(f"a{number}", counted, wide, tokens=1))).shadowed) for number in range(60)]
        assert shadowed == [number >= 20 for number in range(60)]
        for number in range(59 if metric == "tpm" else 1):
            one[0].settle(f"a{number}", 1, 0)
        await asyncio.sleep(3.1 if metric != "concurrency" else 0)
        shadowed = [bool((await one[0].reserve(hold(f"b{number}", counted, wide, tokens=1))).shadowed) for number in range(2)]
        assert shadowed == [False, True]
        for name in list(one[0]._taken):
            one[0].settle(name, 1, 0)
        await quiet(one)
        if metric == "concurrency":  # each place is given back once
            assert await admitted(one[0], *(hold(f"c{number}", Limit("key:1", metric, 20)) for number in range(30))) == 20


async def test_what_was_spent_before_a_budget_existed_counts_exactly_once():
    async with workers(2) as two:
        await two[0].reserve(hold("old", money=0))
        with pytest.raises(Unavailable):
            await two[0].reserve(hold("early", BUDGET, money=1))
        two.totals[budget_of(BUDGET)] = 50
        await two.agree(BUDGET, anew=False)
        two[0].settle("old", 0, 30)  # after the round, so it is not in the totals that were read
        two[0].settle("old", 0, 30)
        await quiet(two)
        assert await admitted(two[1], hold("a", BUDGET, money=21), hold("b", BUDGET, money=20)) == 1


async def test_what_settles_while_a_budget_is_being_loaded_counts_once():
    counted = Limit("key:1", "money", 100, window="total", enforce=False)
    async with workers(2) as two:
        await two[0].begin([budget_of(BUDGET)], anew=False)
        await two[1].reserve(hold("a", counted, money=40))
        two[1].settle("a", 0, 30)  # before it takes part, so that it ships this before the totals are read
        await quiet(two)
        two.totals[budget_of(BUDGET)] = 30
        for one in two.all:
            assert await one.enter(one.last.number, one.last.epoch, lambda: (1, 0)) is not None
        await two[1].acknowledge(two[1].last.number, two[1].last.epoch, shipped=True)
        assert await two[0].acknowledge(two[0].last.number, two[0].last.epoch, shipped=True) == (True, True)
        await two[0].loaded(two[0].last.number, two[0].last.epoch, two.spent([budget_of(BUDGET)]))
        await quiet(two)
        assert await admitted(two[1], hold("b", BUDGET, money=71), hold("c", BUDGET, money=70)) == 1


async def test_who_reads_the_totals_for_long_is_let_read_and_who_is_gone_is_not_waited_for(monkeypatch):
    """Else no reading that takes longer than that would ever come to its end: the next who begins makes the one before worthless."""
    monkeypatch.setattr(store, "LOADER_SECONDS", 0.2)
    async with workers(2) as two:
        await two[0].begin([budget_of(BUDGET)], anew=False)
        for one in two.all:
            await one.beat()
            assert await one.enter(one.last.number, one.last.epoch, lambda: (1, 0)) is not None
        number, epoch = two[0].last.number, two[0].last.epoch
        assert await two[1].acknowledge(number, epoch, shipped=True) == (True, False)
        assert await two[0].acknowledge(number, epoch, shipped=True) == (True, True)
        for _ in range(8):
            await asyncio.sleep(0.05)
            await two[0].beat()
            assert await two[1].acknowledge(number, epoch, shipped=True) == (True, False)
        two[0]._is_closed = True  # it is not heard of any more
        await asyncio.sleep(0.25)
        assert await two[1].acknowledge(number, epoch, shipped=True) == (True, True)


async def test_after_a_flush_nothing_old_is_believed_and_live_holds_come_back():
    with server() as own:
        async with workers(2, BUDGET, url=own.url, name="sluice") as two:
            await two[0].reserve(hold("a", BUDGET, money=60))
            await two[1].reserve(hold("b", BUDGET, money=30))
            two[1].settle("b", 0, 30)
            await quiet(two)
            own.client.flushall()
            with pytest.raises(Unavailable):
                await two[0].reserve(hold("c", BUDGET, money=1))
            two.totals[budget_of(BUDGET)] = 30
            await two.agree(BUDGET)
            assert await admitted(two[1], hold("d", BUDGET, money=11), hold("e", BUDGET, money=10)) == 1
            two[0].settle("a", 0, 5)
            await quiet(two)
            assert await admitted(two[1], hold("f", BUDGET, money=56), hold("g", BUDGET, money=55)) == 1


async def test_a_redis_that_remembers_an_older_day_is_not_believed():
    with server() as own:
        async with workers(1, BUDGET, url=own.url, name="sluice") as one:
            own.client.save()
            await one[0].reserve(hold("a", BUDGET, money=100))
            one[0].settle("a", 0, 100)
            await quiet(one)
            await asyncio.to_thread(own.restart)
            assert await one[0].is_connected(5)
            with pytest.raises(Unavailable):
                await one[0].reserve(hold("b", BUDGET, money=1))
            one.totals[budget_of(BUDGET)] = 100
            await one[0].beat()
            await one.agree(BUDGET)
            assert await admitted(one[0], hold("b", BUDGET, money=1)) == 0


async def test_without_redis_limits_are_shared_out_and_budgets_refused():
    rate = Limit("key:1", "rpm", 10)
    with server() as own:
        async with workers(2, BUDGET, url=own.url, name="sluice") as two:
            await quiet(two)
            await asyncio.to_thread(own.stop)
            await asyncio.sleep(0.1)
            assert await admitted(two[0], *(hold(f"r{number}", rate) for number in range(10))) == 5
            with pytest.raises(Unavailable) as refused:
                await two[0].reserve(hold("b", BUDGET, money=1))
            assert (refused.value.status, refused.value.retry_after_seconds) == (503, 1)


async def test_a_redis_that_hangs_costs_a_quarter_of_a_second_once(monkeypatch):
    monkeypatch.setattr(link, "ANSWER_SECONDS", 0.25)
    rate = Limit("key:1", "rpm", 100)
    with server() as own:
        async with workers(1, BUDGET, url=own.url, name="sluice") as one:
            await one[0].reserve(hold("a", BUDGET, rate, money=60))
            own.client.execute_command("CLIENT", "PAUSE", 2500, "ALL")
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await one[0].reserve(hold("b", BUDGET, rate, money=30))
            assert time.monotonic() - began < 2  # not the whole pause
            began = time.monotonic()
            for number in range(20):
                await one[0].reserve(hold(f"r{number}", rate))
            assert time.monotonic() - began < 20 * 0.25 / 2
            one[0].settle("a", 0, 10)
            assert await one[0].is_connected(5)
            await quiet(one)
            # What Redis took while nobody listened any more has been given back, and what waited has been told.
            assert await admitted(one[0], hold("c", BUDGET, money=91), hold("d", BUDGET, money=90)) == 1


async def test_a_redis_that_is_away_for_long_is_not_waited_for_with_everything_that_was_settled(monkeypatch):
    monkeypatch.setattr(link, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(store, "MOST_QUEUED", 5)
    rate = Limit("key:1", "rpm", 1000)
    with server() as own:
        async with workers(1, BUDGET, url=own.url, name="sluice") as one:
            await one[0].reserve(hold("a", BUDGET, rate, money=60))
            own.client.execute_command("CLIENT", "PAUSE", 1000, "ALL")
            for number in range(20):
                await one[0].reserve(hold(f"r{number}", rate))
                one[0].settle(f"r{number}", 0, 1)
                assert len(one[0]._queue) <= 5
            assert await one[0].is_connected(5)
            await one[0].beat()
            assert one[0]._is_behind()  # a new epoch is to be begun, with all that the journals hold
            one.totals[budget_of(BUDGET)] = 20
            await one.agree(BUDGET)
            assert await admitted(one[0], hold("c", BUDGET, money=21), hold("d", BUDGET, money=20)) == 1


async def test_settlements_wait_for_redis_and_keep_their_order():
    with server() as own:
        async with workers(1, BUDGET, url=own.url, name="sluice") as one:
            for number in range(10):
                await one[0].reserve(hold(f"r{number}", BUDGET, money=10))
            # The connections alone are lost: it is the same server, with all that it knows.
            own.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            for number in range(10):
                one[0].settle(f"r{number}", 0, 2)
            await asyncio.sleep(0.01)
            assert await one[0].is_connected(5)
            await quiet(one)
            assert await admitted(one[0], hold("c", BUDGET, money=81), hold("d", BUDGET, money=80)) == 1


@pytest.mark.parametrize("why", ["a new epoch", "a lapsed lease"])
async def test_what_was_taken_back_and_settled_counts_once_although_it_is_said_again(why):
    """Redis does both, and the connection is lost before it can say so: whatever was told goes out once more."""
    async with workers(1, BUDGET) as one:
        mine, heard = one[0], one[0].link.data_received
        await mine.reserve(hold("a", BUDGET, money=40))
        if why == "a new epoch":
            post, mine._post = mine._post, lambda taken: None
            await one.agree(BUDGET)
            mine._post = post
        for turn in range(2):  # a second time what was taken back is taken back again
            mine.link.data_received = lambda data: None
            if why == "a new epoch":
                mine._post(mine._taken["a"])
            else:
                mine._take_again()
                mine._take_again()
            if turn:
                mine.settle("a", 0, 30)
            await asyncio.sleep(0.1)
            mine.link.data_received = heard
            mine.link._drop()
            await asyncio.sleep(0.01)
            assert await mine.is_connected(5)
            await quiet(one)
        assert await admitted(mine, hold("b", BUDGET, money=71), hold("c", BUDGET, money=70)) == 1


async def test_a_long_journal_is_adopted_without_keeping_others_waiting():
    settled = [(hold(f"r{number}", money=0), 1, 1, True) for number in range(10_000)]
    async with workers(1, BUDGET) as one:
        adopting = asyncio.create_task(one[0].adopt("dead", settled))
        asked = most = 0
        while not adopting.done():
            most = max(most, len(one[0].link._waiting))
            asked += await admitted(one[0], hold(f"a{asked}", Limit("key:2", "rpm", 1_000_000)))
        assert await adopting == []
        assert asked > 10
        assert most < 1000
        with pytest.raises(OverBudget):
            await one[0].reserve(hold("b", BUDGET, money=1))


async def test_what_a_dead_worker_held_is_settled_by_its_adopter():
    async with workers(2, BUDGET) as two:
        for name, money in (("a", 40), ("b", 30), ("c", 20)):
            await two[0].reserve(hold(name, BUDGET, money=money))
        left = await two[1].adopt("w0", [(hold("a"), 0, 5, True), (hold("b"), 0, None, True)])
        assert left == ["c"]
        assert await two[1].adopt("w0", [(hold("c"), 0, 0, False)]) == []
        assert await two[1].adopt("w0", [(hold("a"), 0, 5, True)]) == []  # once more changes nothing
        assert await admitted(two[1], hold("d", BUDGET, money=66), hold("e", BUDGET, money=65)) == 1


# One worker's day: what is asked for, and what is said of it again and again, in any order, by itself and by an adopter.
DEEDS = st.lists(
    st.tuples(st.sampled_from(["reserve", "settle", "adopt", "flush"]), st.integers(0, 5), st.integers(0, 30)), min_size=5, max_size=40
)


@given(DEEDS)
@hypothesis_settings(max_examples=25)
def test_a08_a_settlement_has_one_effect_however_often_and_in_whatever_order_it_is_said(deeds):
    asyncio.run(_one_effect(deeds))


async def _one_effect(deeds: list[tuple[str, int, int]]) -> None:
    held: dict[int, int] = {}
    settled: dict[int, int] = {}
    stored: set[int] = set()
    async with workers(2, BUDGET) as two:
        for deed, number, money in deeds:
            name = f"r{number}"
            if deed == "reserve" and number not in held:
                if await admitted(two[0], hold(name, BUDGET, money=money)):
                    held[number] = money
                else:
                    assert sum({**held, **settled}.values()) + money > BUDGET.amount
            elif deed == "settle":
                two[0].settle(name, 0, min(money, held.get(number, 0)))
                if number in held:
                    settled.setdefault(number, min(money, held[number]))
                await quiet(two)
            elif deed == "adopt" and number in settled:  # after the fact: it was counted long ago
                await two[1].adopt("w0", [(hold(name, BUDGET), 0, settled[number], number not in stored)])
                stored.add(number)
            elif deed == "flush":
                await quiet(two)
                two.totals[budget_of(BUDGET)] = sum(settled.values())
                await two.agree(BUDGET)
        await quiet(two)
        used = sum({**held, **settled}.values())
        assert await admitted(two[1], hold("more", BUDGET, money=BUDGET.amount - used + 1)) == 0
        assert await admitted(two[1], hold("rest", BUDGET, money=BUDGET.amount - used)) == 1


async def test_a06_two_thousand_ends_of_all_kinds_leave_no_hold():
    limits = (*ALL, Limit("key:1", "concurrency", 50), Limit("key:1", "tpm", 10**9))
    with name_on_the_shared_server() as name:
        async with workers(2, *limits, name=name) as two:
            for start in range(0, 2000, 100):
                one = two[start // 100 % 2]
                holds = [hold(f"{start + number}", *limits, money=number % 3) for number in range(100)]
                answers = await asyncio.gather(*(one.reserve(each) for each in holds), return_exceptions=True)
                for number, (each, answer) in enumerate(zip(holds, answers, strict=True)):
                    if isinstance(answer, Granted):
                        one.settle(each.request_id, number, None if number % 7 == 0 else 0)
                    if number % 5 == 0:
                        one.settle(each.request_id, 1, 1)
            await quiet(two)
            import redis

            with redis.Redis.from_url(SHARED, decode_responses=True) as client:
                epoch = two[0].epoch.decode()
                keys = [key for key in client.scan_iter(f"{{{name}}}:{epoch}:*") if ":holds:" in key or ":open:" in key]
                held = [field for key in client.scan_iter(f"{{{name}}}:{epoch}:money:*") for field in client.hkeys(key) if field[0] == "h"]
            assert (keys, held) == ([], [])
            assert [one.open_holds() for one in two.all] == [0, 0]
