"""Short forms of the long loops in tests/loops: exact accounts whatever falls."""

import pytest

from tests.loops import admission_race, kill9, redelivery, redis_loss


@pytest.mark.slow
def test_a02_killing_the_server_loses_nothing_and_doubles_nothing():
    counts = kill9.run(3)
    assert counts["executed"] > 20
    assert {name: counts[name] for name in ("lost", "doubled", "wrong", "totals")} == {
        "lost": 0,
        "doubled": 0,
        "wrong": 0,
        "totals": "equal",
    }


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.redis
@pytest.mark.timeout(240)
def test_a04_losing_redis_loses_nothing_doubles_nothing_and_overspends_nothing():
    counts = redis_loss.run(5, seed=4, quiet_seconds=1)
    assert (counts["refused"], counts["odd"]) == ({}, {})
    assert counts["added_p99_ms"] <= redis_loss.ADDED_P99_MS
    assert counts["executed"] > 50
    assert counts["spent"] <= counts["budget"]
    assert counts["slowest_s"] <= 5 + 2  # a busy machine
    assert {name: counts[name] for name in ("lost", "doubled", "wrong", "off", "held", "totals", "stop")} == {
        "lost": 0,
        "doubled": 0,
        "wrong": 0,
        "off": 0,
        "held": 0,
        "totals": "equal",
        "stop": 0,
    }


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.redis
@pytest.mark.timeout(240)
def test_a01_calls_at_once_over_four_processes_with_room_for_a_few_in_four_budgets():
    counts = admission_race.run(200, 10)
    assert counts["reached"] == 10
    assert counts["refused"] == {"insufficient_quota": 190}


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.redis
@pytest.mark.timeout(240)
def test_a13_a_roll_up_whose_worker_is_killed_and_that_comes_again_leaves_the_same_sums():
    counts = redelivery.run(2)
    assert counts["deliveries"] >= 4  # each was given to somebody else
    assert {name: counts[name] for name in ("rows", "lost", "doubled", "different", "totals")} == {
        "rows": redelivery.ROWS,
        "lost": 0,
        "doubled": 0,
        "different": [],
        "totals": "equal",
    }
