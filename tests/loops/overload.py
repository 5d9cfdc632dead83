"""L05, L06 and L07: more calls than can be served, a tenant far over its limit, and an upstream that hangs.

    python -m tests.loops.overload [--only shed noisy hung] [--seconds 60]

The gateway has one core, load and upstream the other; the upstream is the benchmark's. For L05 it streams for a third of a second, so
that places are what runs out; `--only shed --model m0/whole` makes the processor run out instead (see `project/pace.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from bench.machine import on_core, raise_file_limit
from bench.subjects import Subject, mock_upstream, request
from tests import migrated
from tests.loops.load import say
from tests.loops.pressure import Caller, Seen, press, together
from tests.serving import Sluice

Progress = Callable[[str], None] | None
LOOK_EVERY_SECONDS = 0.05


class Place:
    """A gateway, and the benchmark's upstream behind the prefixes `m0` to `m5`; behind `hung`, one that takes calls and never answers."""

    def __init__(self, sluice: Sluice) -> None:
        self.sluice = sluice

    def caller(self, name: str, key: str, model: str = "m0/whole", **how: Any) -> Caller:
        prefix, _, kind = model.partition("/")
        port = self.sluice.port
        return Caller(name, port, request(Subject(name, 0, port, port, port, key), kind, prefix), **how)


@contextlib.contextmanager
def place(**settings: str) -> Iterator[Place]:
    cores = sorted(os.sched_getaffinity(0))
    raise_file_limit()
    with tempfile.TemporaryDirectory(prefix="sluice-overload-") as name, black_hole() as port, mock_upstream(Path(name), cores[0]) as mock:
        sluice = Sluice(Path(name) / "data", **settings)
        try:
            sluice.data_dir.mkdir(mode=0o700)
            migrated.copy_sqlite(sluice.data_dir)
            for number, one in enumerate(mock.ports):
                sluice.add_openai(SimpleNamespace(base_url=f"http://127.0.0.1:{one}/v1"), prefix=f"m{number}")
            sluice.add_openai(SimpleNamespace(base_url=f"http://127.0.0.1:{port}/v1"), prefix="hung")
            sluice.set_price("*", input=2.5, output=10)
            with on_core(cores[-1]):
                sluice.start_again(forked=False)
            with on_core(cores[0]):
                yield Place(sluice)
        finally:
            sluice.close()


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port that takes connections and what is sent there, as far as the kernel does by itself."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(4096)
        yield listener.getsockname()[1]


# L05


def shed(
    there: Place,
    seconds: float,
    *,
    times: float = 3.0,
    models: Sequence[str] = ("m0/whole",),
    connections: int = 32,
    progress: Progress = None,
) -> dict[str, Any]:
    """Offer so many times what it can serve. Rates are in calls a second, times in seconds."""
    key = there.sluice.issue_key(rpm=900_000_000, tpm=900_000_000_000, concurrency=100_000, budget=1_000_000, window="month")

    def offer(seconds: float, **how: Any) -> Seen:
        return together(press([there.caller(model, key, model, **how) for model in models], seconds).values())

    alone = offer(max(1.5, seconds / 5), connections=connections // len(models))
    each = alone.goodput / len(models)
    say(progress, f"as much as it can: {told(alone)}")
    seen = offer(seconds, rate=times * each)
    ended = time.monotonic()
    say(progress, f"{times:g} times as much: {told(seen)}")
    usual = alone.percentile(0.99, 200) + 0.2
    while (again := offer(0.5, rate=0.2 * each)).percentile(0.99, 200) > usual or set(again.statuses) != {200}:
        assert time.monotonic() - ended < 30, told(again)
    return {
        "capacity": alone.goodput,
        "goodput": seen.goodput / alone.goodput,
        "statuses": seen.statuses,
        "without_retry_after": seen.without_retry_after,
        "broken": seen.broken,
        "unanswered": seen.open + seen.unsent,
        "refused_p50": seen.percentile(0.5, 429, 503),
        "refused_p99": seen.percentile(0.99, 429, 503),
        "served_p50": seen.percentile(0.5, 200),
        "served_p99": seen.percentile(0.99, 200),
        "recovered_after": time.monotonic() - ended - 0.5,
    }


# L06


def noisy(
    there: Place, seconds: float, *, rpm: int = 600, rate: float = 50, times: float = 20, progress: Progress = None
) -> dict[str, Any]:
    """One organization calls so many times as often as it may, another as it always does."""
    loud = there.sluice.issue_key(email="loud@example.org", organization="loud", rpm=rpm)
    quiet = there.sluice.issue_key(email="quiet@example.org", organization="quiet", rpm=900_000, concurrency=1000)
    calm = there.caller("quiet", quiet, "m1/whole", rate=rate)
    alone = press([calm], seconds)["quiet"]
    say(progress, f"alone: {told(alone)}")
    both = press([calm, there.caller("loud", loud, rate=times * rpm / 60)], seconds)
    say(progress, f"beside the loud one: {told(both['quiet'])}\nthe loud one: {told(both['loud'])}")
    return {
        "alone_p99": alone.percentile(0.99, 200),
        "quiet_p99": both["quiet"].percentile(0.99, 200),
        "quiet": both["quiet"].statuses,
        "quiet_errors": both["quiet"].broken + sum(count for status, count in both["quiet"].statuses.items() if status != 200),
        "loud": both["loud"].statuses,
        "loud_without_retry_after": both["loud"].without_retry_after,
        "loud_allowed": rpm * (1 + seconds / 60),  # a burst of a minute's, and what comes after it
    }


# L07


def hung(
    there: Place, seconds: float, *, slots: int, rate: float = 50, hung_rate: float = 200, progress: Progress = None
) -> dict[str, Any]:
    """One of three upstreams does not answer. `slots`: what OPEN_REQUESTS is."""
    key = there.sluice.issue_key(concurrency=100_000, budget=1_000_000, window="month")
    well = [there.caller(name, key, f"{name}/whole", rate=rate) for name in ("m1", "m2")]
    before = press([*well, there.caller("m0", key, rate=rate)], seconds)
    say(progress, "\n".join(f"{name}, before: {told(seen)}" for name, seen in before.items()))
    with busiest(there.sluice) as held:
        after = press([*well, there.caller("hung", key, "hung/whole", rate=hung_rate)], seconds)
    say(progress, "\n".join(f"{name}, beside: {told(seen)}" for name, seen in after.items()))
    return {
        "before_p99": {name: before[name].percentile(0.99, 200) for name in ("m1", "m2")},
        "beside_p99": {name: after[name].percentile(0.99, 200) for name in ("m1", "m2")},
        "others": {name: after[name].statuses for name in ("m1", "m2")},
        "others_broken": sum(after[name].broken for name in ("m1", "m2")),
        "hung": after["hung"].statuses,
        "hung_without_retry_after": after["hung"].without_retry_after,
        "hung_refused_p99": after["hung"].percentile(0.99, 503),
        "held_share": max(held) / slots,
    }


@contextlib.contextmanager
def busiest(sluice: Sluice) -> Iterator[list[int]]:
    """How many calls the upstream with the most of them has, again and again, as the gateway counts them."""
    counts: list[int] = []
    ended = threading.Event()

    def look() -> None:
        with httpx.Client(base_url=sluice.url) as watcher:
            while not ended.is_set():
                found = re.search(r"^sluice_busiest_upstream_calls (\d+)$", watcher.get("/metrics").text, re.MULTILINE)
                assert found is not None
                counts.append(int(found[1]))
                ended.wait(LOOK_EVERY_SECONDS)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield counts
    finally:
        ended.set()
        looking.join()


def told(seen: Seen) -> str:
    parts = [
        f"{status}: {count} (p50 {1000 * seen.percentile(0.5, status):.1f}, p99 {1000 * seen.percentile(0.99, status):.1f} ms)"
        for status, count in sorted(seen.statuses.items())
    ]
    return f"{', '.join(parts)}; broken {seen.broken}, open {seen.open}, not sent {seen.unsent}, no Retry-After {seen.without_retry_after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["shed", "noisy", "hung"], default=["shed", "noisy", "hung"])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--model", action="append", help="what is asked for in L05, in place of streams that use up the room")
    options = parser.parse_args()
    slots = {"shed": 40, "hung": 400}
    for what in options.only:
        settings = {"OPEN_REQUESTS": str(slots[what])} if what in slots and not options.model else {}
        with place(FIRST_BYTE_SECONDS="10", **settings) as there:
            if what == "shed" and options.model:
                print(shed(there, options.seconds, models=options.model, progress=print))
            elif what == "shed":
                print(shed(there, options.seconds, models=[f"m{number}/paced" for number in range(3)], connections=36, progress=print))
            elif what == "noisy":
                print(noisy(there, options.seconds, progress=print))
            else:
                print(hung(there, options.seconds, slots=slots["hung"], progress=print))


if __name__ == "__main__":
    main()
