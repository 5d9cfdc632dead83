"""Short forms of the long loops in tests/loops."""

import pytest

from tests.loops import aborts, kill9


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
def test_a02_the_same_over_postgres(postgres_url):
    counts = kill9.run(2, seed=2, DATABASE_URL=postgres_url, SECRET_KEY="s" * 50, KEYRING="k" * 50)
    assert {name: counts[name] for name in ("lost", "doubled", "wrong", "totals")} == {
        "lost": 0,
        "doubled": 0,
        "wrong": 0,
        "totals": "equal",
    }


def test_f01_a_client_that_leaves_closes_the_upstream_and_has_one_row(sluice, upstream, sim):
    counts = aborts.leave(sluice, upstream, sim, 40)
    assert counts["reached_the_upstream"] > 5  # the others left while they were still connecting
    assert {name: counts[name] for name in ("open_after_1_s", "without_one_row", "wrong")} == {
        "open_after_1_s": 0,
        "without_one_row": 0,
        "wrong": 0,
    }
