"""F08, in short: `python -m tests.loops.cancels` cancels ten thousand calls in each of these ways."""

from __future__ import annotations

import pytest

from tests.loops import cancels


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("on_uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_f08_cancelled_calls_leave_nothing_behind(on_uvloop: bool, tls: bool):
    counts = cancels.run(100, tls=tls, on_uvloop=on_uvloop)

    assert counts["outcomes"]["cancelled"] >= 100
    assert counts["outcomes"]["answered"] > 0  # how many are quick enough is up to the machine
    left = {name: counts[name] for name in ("taken", "open_connections", "tasks", "descriptors", "next_call")}
    assert left == {"taken": 0, "open_connections": 0, "tasks": 0, "descriptors": 0, "next_call": (200, b"hello")}


def test_f08_requests_whose_clients_leave_or_whose_server_ends_leave_no_hold_behind():
    counts = cancels.run_requests(300)

    assert min(counts["outcomes"]["left"], counts["outcomes"]["cut"]) > 50  # three in ten are cut, by the seed
    assert {name: counts[name] for name in cancels.LEFT} == dict.fromkeys(cancels.LEFT, 0)
    assert counts["next_call"] == "answered"
