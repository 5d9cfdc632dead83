"""A01: a thousand calls at once over four processes, with room for fifty in four budgets. Exactly fifty may reach the upstream."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from typing import Any

import httpx

from tests.conftest import postgres_database
from tests.loops.redis_loss import SECRETS, everywhere
from tests.redises import server
from tests.serving import Sluice, eventually, running
from tests.upstreams.kit import Step
from tests.upstreams.openai import OpenAIUpstream

HOLD = 1000  # micro-dollars that each call may cost at most
LIMITS = f"""
from accounts import actions, models
from accounts.policy import Allowance
key = models.ApiKey.objects.get(name="race")
team = models.Team.objects.create(organization=key.organization, name="race")
key.user.memberships.get().teams.add(team)
actions.change_key(key, team=team)
for window, scope in (("total", dict(key=key)), ("day", dict(user=key.user)), ("week", dict(team=team)), ("month", dict())):
    actions.set_limit(key.organization, Allowance("money", {HOLD} * ROOM, window), **scope)
"""


def run(calls: int, room: int, *, workers: int = 4) -> dict[str, Any]:
    with (
        OpenAIUpstream() as upstream,
        server() as redis,
        postgres_database() as url,
        running(workers=workers, DATABASE_URL=url, REDIS_URL=redis.url, **SECRETS) as sluice,
    ):
        sluice.set_price("sim/*", input=0, output=1)
        sluice.add_openai(upstream, prefix="sim")
        key = sluice.issue_key(name="race")
        sluice.python(LIMITS.replace("ROOM", str(room)))
        everywhere(sluice, "sim")
        ready(sluice, key)
        upstream.reset()
        upstream.script(*[Step(text="one", delay_first_ms=60_000)] * (2 * calls))
        seen, reached = asyncio.run(race(sluice, upstream, key, calls, calls - room))
        return {"calls": calls, "room": room, "refused": dict(seen), "reached": reached}


def ready(sluice: Sluice, key: str) -> None:
    """Until the budgets of the key are counted on every worker: a call for a model that is nowhere is 404 by then."""

    def served() -> bool:
        body = {"model": "sim/gpt-4o-mini", "messages": [], "max_tokens": 10**9}  # more than any budget has
        headers = {"authorization": f"Bearer {key}"}
        answers = [httpx.post(f"{sluice.url}/v1/chat/completions", json=body, headers=headers, timeout=20) for _ in range(8)]
        return {answer.json()["error"]["code"] for answer in answers} == {"insufficient_quota"}

    eventually(served, "the budgets are not counted", seconds=20)


async def race(sluice: Sluice, upstream: OpenAIUpstream, key: str, calls: int, to_refuse: int) -> tuple[Counter[str], int]:
    """What those were told that were refused, and how many calls had reached the upstream when the last of them was."""
    body = {"model": "sim/gpt-4o-mini", "messages": [{"role": "user", "content": "one"}], "max_tokens": HOLD}
    seen: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}, timeout=120, limits=limits) as client:

        async def call() -> None:
            answer = await client.post(f"{sluice.url}/v1/chat/completions", json=body)
            seen[str(answer.status_code) if answer.status_code == 200 else answer.json()["error"]["code"]] += 1

        tasks = [asyncio.create_task(call()) for _ in range(calls)]
        began = time.monotonic()
        while sum(seen.values()) < to_refuse and time.monotonic() - began < 60:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        told, reached = Counter(seen), len(upstream.posts)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return told, reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--room", type=int, default=50)
    options = parser.parse_args()
    counts = run(options.calls, options.room)
    print(counts)
    if counts["reached"] != options.room or counts["refused"].get("insufficient_quota") != options.calls - options.room:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
