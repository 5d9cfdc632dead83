"""A04, F14: take Redis away again and again under load. No row may be lost or doubled, no budget overspent by a micro-dollar.

Meanwhile a client without a budget is served on. What it waits longer is measured, from each loss until budgets count again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import httpx

from tests.conftest import postgres_database
from tests.loops.kill9 import account
from tests.loops.load import SLOW, Load, say
from tests.redises import Server, server
from tests.serving import Sluice, running
from tests.upstreams.openai import OpenAIUpstream

SECRETS = {"SECRET_KEY": "s" * 50, "KEYRING": "k" * 50}
BUDGET_USD = 0.02

# What Redis counts in each budget beside what the database has, in micro-dollars.
COUNTERS = """
import json, time, redis
from django.conf import settings
from accounts.models import Limit
from proxy import ledger
from proxy.stores.limits import window_start
client = redis.Redis.from_url(settings.ENV.redis_url, decode_responses=True)
epoch = client.hget("{sluice}:epoch", "id")
found = {}
budgets = {(limit.scope, limit.window, "UTC") for limit in Limit.objects.filter(metric="money")}
for (budget, start), spent in ledger.spent_in(budgets, time.time()).items():
    fields = client.hgetall(f"{{sluice}}:{epoch}:money:" + "|".join(budget))
    held = sum(int(value) for name, value in fields.items() if name[0] == "h")
    found["|".join(budget)] = [int(fields.get(f"s{start:.0f}", 0)), spent, held, "t" in fields]
holds = sum(client.hlen(key) for key in client.scan_iter(f"{{sluice}}:{epoch}:holds:*"))
print(json.dumps([found, holds]))
"""
AMOUNTS = """
from accounts.models import ApiKey, Limit
from django.db.models import Sum
from proxy.models import UsageEvent
for limit in Limit.objects.filter(metric="money", key__name="tight"):
    print(UsageEvent.objects.filter(key=limit.key).aggregate(spent=Sum("cost"))["spent"] or 0, limit.amount)
"""


def p99(took_ms: Iterable[float]) -> float:
    ordered = sorted(took_ms)
    return round(ordered[int(0.99 * (len(ordered) - 1))], 1)


def flushed(redis: Server, chance: random.Random) -> None:
    redis.client.flushall()


def restarted(redis: Server, chance: random.Random) -> None:
    redis.restart(chance.uniform(0, 0.5))


def restarted_with_an_older_day(redis: Server, chance: random.Random) -> None:
    redis.client.save()
    time.sleep(chance.uniform(0.1, 0.5))
    redis.restart()


def paused(redis: Server, chance: random.Random) -> None:
    redis.client.execute_command("CLIENT", "PAUSE", 700, "ALL")


def full(redis: Server, chance: random.Random) -> None:
    """It answers, and takes nothing more: there is less memory than it uses, and nothing may be evicted."""
    redis.client.config_set("maxmemory-policy", "noeviction")
    redis.client.config_set("maxmemory", "1kb")
    time.sleep(chance.uniform(0.5, 1.0))
    redis.client.config_set("maxmemory", "0")


LOSSES = (flushed, restarted, restarted_with_an_older_day, paused, full)
QUIET_SECONDS = 4.0
ADDED_P99_MS = 250.0


class Timed:
    """A client with limits on its rate alone: how long it waits for each answer, and what it is answered."""

    def __init__(self, url: str, key: str, model: str) -> None:
        self.statuses: Counter[int] = Counter()
        self.took_ms: list[float] = []
        self._call = {"url": f"{url}/v1/chat/completions", "headers": {"authorization": f"Bearer {key}"}}
        self._body = {"model": model, "messages": [{"role": "user", "content": "how long?"}]}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Timed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(30)

    def _run(self) -> None:
        with httpx.Client(timeout=20) as client:
            while not self._ending.is_set():
                began = time.monotonic()
                answer = client.post(**self._call, json=self._body)  # type: ignore[arg-type]
                self.took_ms.append((time.monotonic() - began) * 1000)
                self.statuses[answer.status_code] += 1
                time.sleep(0.005)


def run(
    times: int,
    *,
    seed: int = 1,
    workers: int = 2,
    kill_workers: bool = False,
    quiet_seconds: float = QUIET_SECONDS,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Take it away so many times. The counts; `lost`, `doubled`, `wrong`, `off` and `held` must be 0, `spent` at most `budget`.
    `refused`: what the client without a budget was answered beside 200, which must be nothing. `odd`: answers under a budget that
    are neither good nor 429 nor 503."""
    chance = random.Random(seed)
    with (
        OpenAIUpstream() as upstream,
        server() as redis,
        postgres_database() as url,
        running(workers=workers, DATABASE_URL=url, REDIS_URL=redis.url, **SECRETS) as sluice,
    ):
        sluice.set_price("sim/*", input=3, output=15)
        sluice.add_openai(upstream, prefix="sim")
        wide = sluice.issue_key(name="wide", budget=1000, window="month", concurrency=50)
        tight = sluice.issue_key(name="tight", budget=BUDGET_USD, window="total")
        rated = sluice.issue_key(name="rated", rpm=10**6, tpm=10**9, concurrency=50)
        sluice.manage("add_credential", "demo", "--label", "demo", "--secret-stdin", stdin="")
        everywhere(sluice, "sim")
        everywhere(sluice, "demo")
        upstream.reset()
        upstream.script(*[SLOW] * 500_000)
        back: list[float] = []
        model = "sim/gpt-4o-mini"
        with (
            Load(sluice.url, wide, model, clients=6) as load,
            Load(sluice.url, tight, model, clients=2, max_tokens=12) as rest,
            Timed(sluice.url, rated, "demo/echo") as timed,
        ):
            time.sleep(quiet_seconds)
            quiet, away = list(timed.took_ms), []
            for number, loss in zip(range(times), itertools.cycle(LOSSES), strict=False):
                time.sleep(chance.uniform(0.2, 0.8))
                if kill_workers and number % 5 == 4:
                    kill_one(sluice, chance)
                before = len(timed.took_ms)
                loss(redis, chance)
                back.append(counts_again(sluice, wide, model))
                away += timed.took_ms[before:]
                say(progress, f"{loss.__name__}: {number + 1} of {times}, back after {back[-1]:.1f} s, {load.begun + rest.begun} begun")
            time.sleep(0.5)
        load.begun += rest.begun
        load.answered |= rest.answered
        time.sleep(18 if kill_workers else 2)
        spent, budget = (int(word) for word in sluice.python(AMOUNTS).split())
        counters, holds = json.loads(sluice.python(COUNTERS))
        off = sum(counted != stored for counted, stored, _, _ in counters.values())
        return account(sluice, upstream, load) | {
            "times": times,
            "off": off,
            "held": holds + sum(held for _, _, held, _ in counters.values()),
            "counters": counters,
            "spent": spent,
            "budget": budget,
            "slowest_s": round(max(back), 1),
            "refused": {status: count for status, count in timed.statuses.items() if status != 200},
            "odd": {status: count for status, count in (load.statuses + rest.statuses).items() if status not in (200, 429, 503)},
            "timed": len(away),
            "quiet_p99_ms": p99(quiet),
            "added_p99_ms": round(p99(away) - p99(quiet), 1),
            "slowest_ms": round(max(away)),
            "stop": sluice.stop(60),
        }


def everywhere(sluice: Sluice, prefix: str) -> None:
    """Until every worker knows the prefix."""
    for _ in range(10):
        sluice.wait_for(prefix)


def kill_one(sluice: Sluice, chance: random.Random) -> None:
    import os

    os.kill(chance.choice(workers_of(sluice)), signal.SIGKILL)


def workers_of(sluice: Sluice) -> list[int]:
    """The numbers of the worker processes."""
    with open(f"/proc/{sluice.pid}/task/{sluice.pid}/children") as file:
        return [int(word) for word in file.read().split()]


def counts_again(sluice: Sluice, key: str, model: str) -> float:
    """Seconds until a key with a budget is served again."""
    began = time.monotonic()
    body = {"model": model, "messages": [{"role": "user", "content": "again?"}]}
    good = 0
    while time.monotonic() - began < 40:
        try:
            answer = httpx.post(f"{sluice.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=20)
        except httpx.TransportError:
            continue
        good = good + 1 if answer.status_code == 200 else 0
        if good == 3:
            return time.monotonic() - began
        time.sleep(0.05)
    raise AssertionError(f"budgets are not counted again: {answer.status_code} {answer.text}\n{sluice.log()[-5000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill-workers", action="store_true")
    options = parser.parse_args()
    counts = run(options.times, seed=options.seed, workers=options.workers, kill_workers=options.kill_workers, progress=print)
    print(counts)
    bad = counts["lost"] or counts["doubled"] or counts["wrong"] or counts["off"] or counts["held"] or counts["totals"] != "equal"
    if not options.kill_workers:  # who loses a worker loses a connection, too
        bad = bad or counts["refused"] or counts["odd"] or counts["added_p99_ms"] > ADDED_P99_MS
    if bad or counts["spent"] > counts["budget"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
