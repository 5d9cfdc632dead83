"""L05, L06 and L07 in short: who is refused is told when to come back, and others notice nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.loops import overload
from tests.loops.overload import Place

FEW, MANY = 40, 200  # a machine that stops for half a second gets all calls of it at once, and they have to find room


@pytest.fixture(scope="module")
def there() -> Iterator[Place]:
    with place_with_room_for(FEW) as one:
        yield one


def place_with_room_for(slots: int) -> contextlib.AbstractContextManager[Place]:
    return overload.place(OPEN_REQUESTS=str(slots), POOL_WAIT_SECONDS="0.3", CONNECT_SECONDS="1", FIRST_BYTE_SECONDS="2.5")


def test_l05_of_three_times_the_load_the_rest_is_refused_in_order(there: Place) -> None:
    found = overload.shed(there, 1.5, models=("m0/paced", "m1/paced", "m2/paced"), connections=36)
    assert set(found["statuses"]) == {200, 503}
    assert (found["without_retry_after"], found["broken"]) == (0, 0)
    assert found["goodput"] > 0.4


def test_l06_a_tenant_at_twenty_times_its_limit_takes_nothing_from_another(there: Place) -> None:
    found = overload.noisy(there, 1.0, rpm=6, rate=20, times=400)
    assert found["quiet_errors"] == 0
    assert found["quiet"][200] > 10
    assert set(found["loud"]) == {200, 429}
    assert found["loud"][200] <= found["loud_allowed"] + 1
    assert found["loud_without_retry_after"] == 0


def test_l07_an_upstream_that_hangs_holds_no_more_than_half_of_the_room() -> None:
    with place_with_room_for(MANY) as there:
        found = overload.hung(there, 1.5, slots=MANY, rate=20, hung_rate=150)
    assert {name: set(seen) for name, seen in found["others"].items()} == {"m1": {200}, "m2": {200}}
    assert all(seen[200] > 10 for seen in found["others"].values())
    assert found["others_broken"] == 0
    assert set(found["hung"]) == {503}
    assert found["hung_without_retry_after"] == 0
    assert 0 < found["held_share"] <= 0.5
