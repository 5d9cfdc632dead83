"""Limits in memory: all at once or none, settled once, and money to the micro-dollar."""

import asyncio
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounts.principal import Limit
from proxy.call import Granted
from proxy.errors import OverBudget, OverLimit, UnpricedModel
from proxy.stores.limits import Hold, window_start
from proxy.stores.memory import MemoryLimits

NOON = datetime(2026, 3, 11, 12, tzinfo=ZoneInfo("UTC")).timestamp()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def hold(name: str, *limits: Limit, tokens: int = 10, money: int | None = 0, at: float = NOON) -> Hold:
    return Hold(request_id=name, at=at, scopes=tuple({limit.scope for limit in limits}), limits=limits, tokens=tokens, money=money)


def reserve(store: MemoryLimits, one: Hold) -> Granted:
    return asyncio.run(store.reserve(one))


def test_so_many_requests_a_minute_and_then_a_wait_that_is_true():
    clock = Clock()
    store = MemoryLimits(clock)
    limit = Limit("key:1", "rpm", 3)
    for number in range(3):
        reserve(store, hold(f"r{number}", limit))
    with pytest.raises(OverLimit) as refused:
        reserve(store, hold("r3", limit))

    assert refused.value.retry_after_seconds == pytest.approx(20)
    clock.now += refused.value.retry_after_seconds
    reserve(store, hold("r3", limit))


@pytest.mark.parametrize(
    ("amount", "window", "said"),
    [
        (25_000_000, "month", "25 USD per month."),
        (12_500_000, "day", "12.5 USD per day."),
        (1_234_567_890_000, "month", "1234567.89 USD per month."),
        (20, "week", "0.00002 USD per week."),
        (1_000_000, "total", "1 USD in total."),
    ],
)
def test_a_budget_is_named_exactly_as_it_was_given(amount: int, window: str, said: str):
    with pytest.raises(OverBudget) as refused:
        reserve(MemoryLimits(Clock()), hold("r", Limit("key:1", "money", amount, window), money=amount + 1))

    assert refused.value.message == f"This request could exceed the budget of {said}"


def test_tokens_count_as_they_were_really_used():
    clock = Clock()
    store = MemoryLimits(clock)
    limit = Limit("key:1", "tpm", 100)
    reserve(store, hold("a", limit, tokens=90))
    with pytest.raises(OverLimit):
        reserve(store, hold("b", limit, tokens=20))
    store.settle("a", tokens=10, money=0)
    reserve(store, hold("b", limit, tokens=20))
    store.settle("b", tokens=150, money=0)
    with pytest.raises(OverLimit) as refused:
        reserve(store, hold("c", limit, tokens=1))
    assert refused.value.retry_after_seconds == pytest.approx(60 * 61 / 100)


def test_a_place_is_free_again_after_settling_and_settling_twice_frees_one_place():
    store = MemoryLimits()
    limit = Limit("key:1", "concurrency", 2)
    reserve(store, hold("a", limit))
    reserve(store, hold("b", limit))
    with pytest.raises(OverLimit):
        reserve(store, hold("c", limit))
    store.settle("a", 0, 0)
    store.settle("a", 0, 0)
    reserve(store, hold("c", limit))
    with pytest.raises(OverLimit):
        reserve(store, hold("d", limit))


def test_a_refusal_takes_nothing_of_the_other_limits():
    store = MemoryLimits()
    wide, narrow = Limit("organization:1", "concurrency", 5), Limit("key:1", "concurrency", 0)
    with pytest.raises(OverLimit):
        reserve(store, hold("a", wide, narrow))
    assert store.open_holds() == 0
    for number in range(5):
        reserve(store, hold(f"r{number}", wide))


def test_money_is_held_at_its_worst_and_settled_at_the_truth():
    store = MemoryLimits()
    limit = Limit("key:1", "money", 100, window="day")
    store.track(store.untracked([limit]))
    reserve(store, hold("a", limit, money=60))
    with pytest.raises(OverBudget):
        reserve(store, hold("b", limit, money=41))
    store.settle("a", 0, 10)
    assert store.spent(limit, NOON) == 10
    reserve(store, hold("b", limit, money=90))
    with pytest.raises(OverBudget) as refused:
        reserve(store, hold("c", limit, money=1))
    assert refused.value.should_retry is False


def test_a_model_without_a_price_is_refused_under_a_budget_and_only_there():
    store = MemoryLimits()
    with pytest.raises(UnpricedModel):
        reserve(store, hold("a", Limit("key:1", "money", 100, window="day"), money=None))
    reserve(store, hold("b", Limit("key:1", "rpm", 100), money=None))


@pytest.mark.parametrize("swapped", [False, True])
def test_a_looser_limit_beside_another_of_its_kind_loosens_nothing(swapped):
    limits = [Limit("key:1", "rpm", 5), Limit("key:1", "rpm", 500, enforce=False)]
    if swapped:
        limits.reverse()
    store = MemoryLimits(Clock())
    for number in range(5):
        reserve(store, hold(f"r{number}", *limits))
    with pytest.raises(OverLimit):
        reserve(store, hold("r5", *limits))


def test_a_shadow_limit_says_what_it_would_have_done_and_lets_pass():
    store = MemoryLimits()
    limit = Limit("key:1", "concurrency", 0, enforce=False)
    assert reserve(store, hold("a", limit)).shadowed == ("shadow:concurrency_limit_exceeded",)
    assert store.open_holds() == 1


@pytest.mark.parametrize("metric", ["rpm", "tpm", "concurrency"])
def test_a_shadow_limit_counts_what_it_would_have_refused(metric):
    """Ten minutes of twice as much as is allowed, and then of half as much."""
    amount = {"rpm": 60, "tpm": 600, "concurrency": 4}[metric]
    refused: dict[bool, list[int]] = {}
    for enforce in (True, False):
        clock, limit = Clock(), Limit("key:1", metric, amount, enforce=enforce)
        store, refused[enforce] = MemoryLimits(clock), []
        for number in range(1500):
            clock.now += 0.5 if number < 1200 else 2.0
            try:
                said = reserve(store, hold(str(number), limit, tokens=12)).shadowed
            except OverLimit as problem:
                said = (f"shadow:{problem.code}",)
            if said:
                refused[enforce].append(number)
            store.settle(str(number - (8 if number < 1200 else 2)), 10, 0)
    assert refused[True]
    assert refused[True][-1] < 1210
    assert refused[False] == refused[True]


def test_what_was_spent_before_a_budget_existed_counts_exactly_once():
    store = MemoryLimits()
    limit = Limit("key:1", "money", 100, window="month")
    reserve(store, Hold("old", NOON, ("key:1",), (), 1, None))  # admitted before there was a budget
    budgets = store.untracked([limit])
    store.track(budgets)
    store.settle("old", 0, 30)  # and settled after: it is not in the totals that are added now
    [budget] = budgets
    store.add_spent({(budget, window_start("month", "UTC", NOON)): 50})
    assert store.spent(limit, NOON) == 80
    assert store.untracked([limit]) == set()


def test_a_request_counts_in_the_window_in_which_it_was_admitted():
    store = MemoryLimits()
    limit = Limit("key:1", "money", 100, window="day")
    store.track(store.untracked([limit]))
    reserve(store, hold("late", limit, money=50, at=NOON))
    store.settle("late", 0, 40)
    tomorrow = NOON + 86_400
    assert (store.spent(limit, NOON), store.spent(limit, tomorrow)) == (40, 0)
    reserve(store, hold("new", limit, money=100, at=tomorrow))
    store.forget_past_windows(tomorrow + 2 * 86_400)
    assert store.spent(limit, NOON) == 0


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60))
def test_settled_and_held_money_never_exceed_the_budget(steps):
    """A01 in small: each step asks for room and settles for no more than it held."""
    store = MemoryLimits()
    limit = Limit("key:1", "money", 100, window="total")
    store.track(store.untracked([limit]))
    for number, (worst, truth) in enumerate(steps):
        try:
            reserve(store, hold(str(number), limit, money=worst))
        except OverBudget:
            continue
        if number % 3:
            store.settle(str(number), 0, min(worst, truth))
        held = sum(one.money or 0 for one, _ in store._holds.values())
        assert store.spent(limit, NOON) + held <= 100


@pytest.mark.parametrize(
    ("window", "zone", "start"),
    [
        ("day", "UTC", "2026-03-11T00:00:00+00:00"),
        ("day", "Asia/Kathmandu", "2026-03-11T00:00:00+05:45"),
        ("week", "UTC", "2026-03-09T00:00:00+00:00"),
        ("month", "Europe/Berlin", "2026-03-01T00:00:00+01:00"),
        ("total", "UTC", "1970-01-01T00:00:00+00:00"),
    ],
)
def test_windows_begin_where_the_organization_lives(window, zone, start):
    assert window_start(window, zone, NOON) == datetime.fromisoformat(start).timestamp()


def test_the_day_on_which_the_clocks_change_begins_at_its_own_midnight():
    berlin = ZoneInfo("Europe/Berlin")
    evening = datetime(2026, 3, 29, 20, tzinfo=berlin)
    assert window_start("day", "Europe/Berlin", evening.timestamp()) == datetime(2026, 3, 29, tzinfo=berlin).timestamp()


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"])
def test_a10_over_a_year_each_window_is_reset_once_at_its_own_midnight(zone):
    """Through both changes of the clocks, quarter hour by quarter hour."""
    place = ZoneInfo(zone)
    first, starts = datetime(2027, 1, 1, tzinfo=place).timestamp(), []
    for quarter in range(365 * 96):
        at = first + 900 * quarter + 1
        start = window_start("day", zone, at)
        assert start <= at
        if not starts or start != starts[-1]:
            starts.append(start)
    moments = [datetime.fromtimestamp(start, place) for start in starts]
    assert starts == sorted(set(starts))
    assert {(moment.hour, moment.minute) for moment in moments} == {(0, 0)}
    assert len({moment.date() for moment in moments}) == len(moments) in (365, 366)


@pytest.mark.parametrize(("zone", "day"), [("Atlantic/Azores", (2024, 10, 27)), ("America/Havana", (2024, 11, 3))])
@pytest.mark.parametrize("window", ["day", "month"])
def test_a10_a_midnight_that_comes_twice_begins_one_window(window, zone, day):
    """There the clocks go back from one o'clock: what is spent in the second of the two hours belongs to the same day."""
    midnight = datetime(*day, tzinfo=ZoneInfo(zone)).timestamp()
    assert len({window_start(window, zone, midnight + 900 * quarter) for quarter in range(25 * 4)}) == 1


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York"])
def test_a10_a_leap_day_is_a_day_of_its_own_and_lengthens_its_month(zone):
    place = ZoneInfo(zone)
    noons = [datetime(2028, month, day, 12, tzinfo=place).timestamp() for month, day in ((2, 28), (2, 29), (3, 1))]
    days, months = ([window_start(window, zone, noon) for noon in noons] for window in ("day", "month"))
    assert days == [noon - 43_200 for noon in noons]
    assert months == [datetime(2028, month, 1, tzinfo=place).timestamp() for month in (2, 2, 3)]


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a10_a_clock_that_jumps_resets_no_window_twice_and_gives_no_rate_back(jump):
    clock = Clock()  # the one that never jumps
    store = MemoryLimits(clock)
    rate, money = Limit("key:1", "rpm", 2), Limit("key:1", "money", 100, window="day")
    store.track(store.untracked([money]))
    reserve(store, hold("a", rate, money, money=60))
    store.settle("a", 0, 60)
    reserve(store, hold("b", rate, money, money=40, at=NOON + jump))
    with pytest.raises(OverLimit):
        reserve(store, hold("c", rate, money, money=0, at=NOON + 2 * jump))
    store.settle("b", 0, 40)
    assert store.spent(money, NOON) == 100


def test_what_is_left_is_that_of_the_tightest_limit_on_requests_and_on_tokens():
    clock = Clock()
    store = MemoryLimits(clock)
    limits = (Limit("key:1", "rpm", 10), Limit("team:1", "rpm", 4), Limit("key:1", "tpm", 100), Limit("user:1@1", "rpm", 1, enforce=False))
    granted = reserve(store, hold("a", *limits, tokens=30))
    assert (granted.requests.limit, granted.requests.remaining, granted.requests.reset_seconds) == (4, 3, pytest.approx(15))
    assert (granted.tokens.limit, granted.tokens.remaining, granted.tokens.reset_seconds) == (100, 70, pytest.approx(18))
    assert reserve(store, hold("b", Limit("key:2", "money", 10, window="day"))).requests is None
