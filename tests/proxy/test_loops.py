"""Short forms of the long loops in tests/loops."""

import pytest

from tests.loops import aborted_streams, aborts, hold_leak, rotation, soak

NOTHING_LEFT = {"open_after_1_s": 0, "without_one_row": 0, "wrong": []}


def test_f01_a_client_that_leaves_closes_the_upstream_and_has_one_row(sluice, upstream, sim):
    counts = aborts.leave(sluice, upstream, sim, 60, ways=["close"])
    assert counts["reached_the_upstream"] > 20  # the others left while they were still connecting
    assert {name: counts[name] for name in NOTHING_LEFT} == NOTHING_LEFT


@pytest.mark.parametrize("way", ["reset", "half"])
def test_f02_so_does_one_that_resets_its_connection_or_half_closes_it(sluice, upstream, sim, way):
    counts = aborts.leave(sluice, upstream, sim, 60, ways=[way], seed=2)
    assert counts["reached_the_upstream"] > 20
    assert {name: counts[name] for name in NOTHING_LEFT} == NOTHING_LEFT
    assert counts["slowest_end_of_a_half_closed_seconds"] < 1


def test_a06_calls_that_end_in_every_way_leave_nothing_held(sluice, upstream, sim):
    counts = hold_leak.leak(sluice, upstream, sim, 250)
    assert len(counts["ends"]) > 5
    assert {name: counts[name] for name in ("calls", "holds", "held", "places_lost")} == {
        "calls": 250,
        "holds": 0,
        "held": 0,
        "places_lost": 0,
    }


def test_a07_streams_left_at_a_random_byte_have_one_row_each_as_their_policy_says(sluice, upstream, sim):
    found = aborted_streams.abort(sluice, upstream, sim, 20)
    assert {policy: (total["rows"], total["without_one_row"], total["wrong"]) for policy, total in found.items()} == {
        "cancel": (20, 0, []),
        "drain": (20, 0, []),
    }
    assert found["drain"]["reported"] == 20
    assert found["cancel"]["rows_499"] > 10 < found["drain"]["rows_499"]


@pytest.mark.slow
def test_l09_some_seconds_of_load_leave_nothing_behind():
    """Of memory so short a run says nothing: only that there are figures of it."""
    lines = []
    found = soak.run(0.12, progress=lines.append)

    assert (found["errors"], found["wrong"]) == (0, [])
    assert found["left"] == {"fds": 0, "tasks": 0, "holds": 0, "open_calls": 0}
    assert found["aborts"] > found["requests"] / 50
    assert max(sample["holds"] for sample in found["samples"]) > 0  # it does count them
    assert len(found["samples"]) >= 5
    assert isinstance(found["slope"], float)
    assert lines[1] == soak.HEADINGS
    assert all(len(line.split()) == len(soak.HEADINGS.split()) - 3 for line in lines[2:])


def test_the_slope_is_by_the_hour():
    def rising(mb_an_hour):
        return [soak.Sample(at, 0, 0, 100 + at * mb_an_hour / 3600, 0, 0, 0, 0, 0) for at in range(0, 600, 5)]

    assert soak.slope(rising(7)) == pytest.approx(7)
    assert soak.slope(rising(-3)) == pytest.approx(-3)
    assert soak.slope(rising(0)) == pytest.approx(0)


@pytest.mark.slow
def test_s07_rotating_seal_and_pepper_under_load_fails_no_request():
    counts = rotation.run(2)
    assert counts["failed"] == {}
    assert counts["sealed"]
    assert counts["answered"] == counts["rows"] > 40
