"""F01: clients that leave at random points. The upstream is closed within 1 s, and each call has one row within 5 s."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import httpx

from tests.loops.load import TEXT, say
from tests.serving import Sluice, eventually, running
from tests.upstreams.kit import Step
from tests.upstreams.openai import OpenAIUpstream

SLOW = Step(text=TEXT * 4, delay_first_ms=60, delay_frame_ms=30)
AT_ONCE = 10


def run(times: int, *, seed: int = 1, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Leave so many times. `open_after_1_s`, `without_one_row` and `wrong` must be 0."""
    with OpenAIUpstream() as upstream, running() as sluice:
        sluice.set_price("sim/*", input=3, output=15)
        sluice.add_openai(upstream, prefix="sim")
        sluice.wait_for("sim")
        return leave(sluice, upstream, "sim", times, seed=seed, progress=progress)


def leave(
    sluice: Sluice, upstream: OpenAIUpstream, prefix: str, times: int, *, seed: int = 1, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    upstream.reset()
    upstream.script(*[SLOW] * (times + AT_ONCE))
    key = sluice.issue_key()
    left = asyncio.run(_all(sluice.url, key, f"{prefix}/gpt-4o-mini", times, random.Random(seed), progress))
    time.sleep(1)
    reached = {seen.request_id: seen for seen in upstream.log if seen.method == "POST"}
    cut = [seen for seen in reached.values() if seen.finished_at is None]
    late = [seen.peer_left_at - left[seen.json["user"]] for seen in cut if seen.peer_left_at is not None]
    open_still = len(cut) - len(late)

    def rows_of() -> list[dict[str, Any]] | None:
        rows = [row for row in sluice.usage() if row["request_id"] in reached]
        return rows if len(rows) >= len(reached) else None

    rows = eventually(rows_of, "a call has no row 5 s after it was left", seconds=4)
    by_id = {row["request_id"]: row for row in rows}
    wrong = 0
    for request_id, row in by_id.items():
        bill = upstream.bill(request_id)
        if row["status"] == 499 and abs(row["output_tokens"] - bill.output_tokens) > 2:
            wrong += 1
    return {
        "aborts": times,
        "reached_the_upstream": len(reached),
        "still_open_upstream": open_still,
        "slowest_close_seconds": round(max(late, default=0.0), 3),
        "open_after_1_s": sum(one > 1 for one in late) + open_still,
        "rows": len(rows),
        "rows_499": sum(row["status"] == 499 for row in rows),
        "without_one_row": len(reached) - len(by_id) + len(rows) - len(by_id),
        "wrong": wrong,
    }


async def _all(
    url: str, key: str, model: str, times: int, chance: random.Random, progress: Callable[[str], None] | None
) -> dict[str, float]:
    gate = asyncio.Semaphore(AT_ONCE)
    left: dict[str, float] = {}

    async def one(number: int, patience_seconds: float) -> None:
        async with gate:
            left[str(number)] = await _leave_after(patience_seconds, url, key, model, str(number))
            if (number + 1) % 50 == 0:
                say(progress, f"left {number + 1} of {times}")

    await asyncio.gather(*[one(number, chance.uniform(0.02, 1.3)) for number in range(times)])
    return left


async def _leave_after(patience_seconds: float, url: str, key: str, model: str, user: str) -> float:
    """Open a stream, read for a while, go. The moment of going."""
    body = {"model": model, "stream": True, "user": user, "messages": [{"role": "user", "content": "count for me"}]}

    async def read() -> None:
        async with (
            httpx.AsyncClient(timeout=20, verify=False) as client,  # reading certificates would stop the loop for all others
            client.stream("POST", f"{url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}) as response,
        ):
            async for _ in response.aiter_raw():
                pass

    task = asyncio.create_task(read())
    await asyncio.sleep(patience_seconds)
    at = time.monotonic()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    counts = run(options.times, seed=options.seed, progress=print)
    print(counts)
    if counts["open_after_1_s"] or counts["without_one_row"] or counts["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
