"""Postgres goes away and comes back: nothing is lost, known keys are served, and no worker is started again.

The long form is tests/loops/databases.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.loops import databases
from tests.loops.databases import WELL, Cluster
from tests.serving import Sluice, eventually
from tests.upstreams.openai import OpenAIUpstream

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(databases.why_not()), reason=databases.why_not() or "there is one"),
    pytest.mark.timeout(240),
]
BODY: dict[str, Any] = {"model": "pg/gpt-4o", "messages": [{"role": "user", "content": "Hello there"}]}


@pytest.fixture(scope="module")
def database() -> Iterator[Cluster]:
    with databases.cluster() as made:
        yield made


@pytest.fixture(scope="module")
def restarted(database: Cluster) -> dict[str, Any]:
    """What came of a fast restart, an immediate one, and a `kill -9` of a backend, under load."""
    return databases.restart_the_database(database, 3)


def test_a03_restarts_of_the_database_lose_nothing_and_double_nothing(restarted: dict[str, Any]) -> None:
    assert restarted["executed"] > 50
    assert {name: restarted[name] for name in WELL} == WELL
    assert restarted["interrupted"] == 0


def test_f13_known_keys_are_served_meanwhile_and_all_is_well_soon_after(restarted: dict[str, Any]) -> None:
    assert restarted["refused"] == {}
    assert restarted["the_same_worker"]
    assert restarted["slowest_recovery"] <= databases.RECOVERY_SECONDS


def test_a02_killing_the_server_over_a_postgres_of_its_own() -> None:
    with databases.cluster() as own:
        counts = databases.kill_the_server(own, 2, seed=3)
    assert {name: counts[name] for name in WELL} == WELL


def test_a11_sums_are_worked_out_anew_while_rows_come_in() -> None:
    with databases.cluster() as own:
        counts = databases.recompute_under_load(own, 4)
    assert counts["executed"] > 50
    assert (counts["mended"], counts["left"]) == (16, 0)
    assert {name: counts[name] for name in WELL} == WELL


def test_f13_while_the_database_is_away(serve: Callable[..., Sluice], upstream: OpenAIUpstream) -> None:
    def call(key: str) -> httpx.Response:
        return httpx.post(f"{sluice.url}/v1/chat/completions", headers={"authorization": f"Bearer {key}"}, json=BODY, timeout=20)

    with databases.cluster() as database:
        sluice = serve(DATABASE_URL=database.url, **databases.SETTINGS)
        sluice.set_price("pg/*", input=3, output=15)
        sluice.add_openai(upstream, prefix="pg")
        known, budgeted = sluice.issue_key(), sluice.issue_key(budget="5", window="month")
        sluice.wait_for("pg")
        assert [call(key).status_code for key in (known, budgeted)] == [200, 200]
        fresh = sluice.issue_key()
        database.stop("immediate")

        away = [call(key) for key in (known, budgeted, fresh)]
        time.sleep(0.9)  # the ledger has tried, and failed
        away.append(call(known))
        assert [answer.status_code for answer in away] == [200, 200, 503, 200]
        assert away[2].json()["error"]["code"] == "database_unavailable"
        assert "retry-after" in away[2].headers

        worker = sluice.pid
        database.start()
        eventually(lambda: call(fresh).status_code == 200, "an unknown key is not served again", seconds=databases.RECOVERY_SECONDS)
        for answer in (away[0], away[1], away[3]):
            assert sluice.row(answer.headers["x-request-id"])["status"] == 200
        assert (sluice.pid, sluice.is_ready()) == (worker, True)

        sluice.close()
