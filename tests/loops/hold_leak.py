"""A06: ten thousand calls that end in every way there is. When it is quiet again nothing is held: no call, no money, no place.

With `--redis` the limits are in Redis, of two kinds: what the present epoch holds, and what budgets hold of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.loops.load import TEXT, say
from tests.loops.redis_loss import COUNTERS
from tests.redises import server
from tests.serving import Sluice, eventually, running
from tests.upstreams.kit import Step
from tests.upstreams.openai import OpenAIUpstream

SECRETS = {"SECRET_KEY": "s" * 50, "KEYRING": "k" * 50}
CLIENTS, PLACES = 24, 16
LEASE_SECONDS = 15
# What the upstream does, the usual more often. None: our own refusal, before any upstream is asked.
ENDS = ("ok",) * 8 + (
    "html_502",
    "html_200",
    "empty_200",
    "reset",
    "close",
    "abort_first",
    "abort_mid",
    "eof_mid",
    "stall",
    "error_first",
    "error_frame",
    "bad_frames_only",
    "bad_json_200",
    "garbage",
    "no_done",
    None,
)


def run(times: int, *, seed: int = 1, progress: Callable[[str], None] | None = None, **settings: str) -> dict[str, Any]:
    """So many calls. `holds`, `held` and `places_lost` must be 0."""
    # An upstream that stalls ends by its clock, when its client has not left before.
    ladder = {"IDLE_SECONDS": "2", "HEARTBEAT_SECONDS": "1", "FIRST_BYTE_SECONDS": "6", "TOTAL_SECONDS": "12"}
    with OpenAIUpstream() as upstream, running(**ladder, **settings) as sluice:
        sluice.set_price("sim/*", input=3, output=15)
        sluice.add_openai(upstream, prefix="sim")
        sluice.wait_for("sim")
        return leak(sluice, upstream, "sim", times, seed=seed, waits=True, progress=progress)


def leak(
    sluice: Sluice,
    upstream: OpenAIUpstream,
    prefix: str,
    times: int,
    *,
    seed: int = 1,
    waits: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """`waits`: a few clients wait until an upstream that stalls is given up."""
    key = sluice.issue_key(rpm=10**6, tpm=10**9, concurrency=PLACES, budget=1000, window="day")
    asyncio.run(_until_budgets_count(sluice.port, key, prefix))
    seen: Counter[str] = Counter()
    asyncio.run(_all(sluice.port, key, prefix, times, random.Random(seed), 0.05 if waits else 0.0, seen, progress))
    began = time.monotonic()
    with contextlib.suppress(AssertionError):
        eventually(lambda: not any(_held(sluice)), "something is held", seconds=LEASE_SECONDS)
    holds, held = _held(sluice)
    quiet = time.monotonic() - began
    upstream.reset()
    upstream.script(*[Step(text=TEXT, delay_first_ms=800)] * PLACES)
    at_once = asyncio.run(_at_once(sluice.port, key, prefix))
    return {
        "calls": sum(seen.values()),
        "ends": dict(sorted(seen.items())),
        "holds": holds,
        "held": held,
        "quiet_s": round(quiet, 1),
        "places_lost": PLACES - at_once,
    }


def _held(sluice: Sluice) -> tuple[int, int]:
    """Calls that limits hold something for, and the micro-dollars that budgets hold in Redis."""
    with urllib.request.urlopen(f"{sluice.url}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = re.search(r"^sluice_holds (\d+)", text, re.MULTILINE)
    assert found is not None, text
    holds, held = int(found[1]), 0
    if "REDIS_URL" in sluice.env:
        counters, in_redis = json.loads(sluice.python(COUNTERS))
        holds, held = holds + in_redis, sum(held for _, _, held, _ in counters.values())
    return holds, held


async def _all(
    port: int,
    key: str,
    prefix: str,
    times: int,
    chance: random.Random,
    patient: float,
    seen: Counter[str],
    progress: Callable[[str], None] | None,
) -> None:
    calls = iter(range(times))

    async def client() -> None:
        for number in calls:
            seen[await _one(port, key, prefix, chance, patient)] += 1
            if (number + 1) % 1000 == 0:
                say(progress, f"{number + 1} of {times} calls")

    await asyncio.gather(*[client() for _ in range(CLIENTS)])


async def _one(port: int, key: str, prefix: str, chance: random.Random, patient: float) -> str:
    """How it ended, as the client saw it."""
    end = chance.choice(ENDS)
    model = f"{prefix}/sim-{end}" if end is not None else chance.choice(["no-such-model", f"{prefix}/sim-ok"])
    body = _body(model, stream=chance.random() < 0.6)
    if end is None and model != "no-such-model":
        body = body[:-9]  # no JSON
    leaves, waits = chance.random() < 0.25, chance.random() < patient
    patience = chance.uniform(0, 0.05) if leaves else 0.3 if end == "stall" and not waits else 20
    try:
        async with asyncio.timeout(patience):
            status, data = await _answer(port, key, body)
    except TimeoutError:
        return "the client left"
    except OSError:
        return "reset"
    return f"{status} broken" if status == 200 and b'"error"' in data else str(status)


def _body(model: str, *, stream: bool) -> bytes:
    return json.dumps({"model": model, "stream": stream, "messages": [{"role": "user", "content": "count for me"}]}).encode()


async def _answer(port: int, key: str, body: bytes) -> tuple[int, bytes]:
    """On a connection of its own. Raises OSError; cancelling it is to leave."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        data = await reader.read()
    finally:
        writer.close()
    if not data:
        raise ConnectionResetError
    return int(data[9:12]), data


async def _until_budgets_count(port: int, key: str, prefix: str) -> None:
    async with asyncio.timeout(20):
        while (await _answer(port, key, _body(f"{prefix}/gpt-4o-mini", stream=False)))[0] != 200:
            await asyncio.sleep(0.05)


async def _at_once(port: int, key: str, prefix: str) -> int:
    """How many of as many calls as there are places are answered, all being open at the same time."""
    body = _body(f"{prefix}/gpt-4o-mini", stream=True)
    answers = await asyncio.gather(*[_answer(port, key, body) for _ in range(PLACES)])
    return sum(status == 200 for status, _ in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--redis", action="store_true")
    options = parser.parse_args()
    with server() if options.redis else contextlib.nullcontext() as redis:
        settings = {"REDIS_URL": redis.url, **SECRETS} if redis is not None else {}
        counts = run(options.times, seed=options.seed, progress=print, **settings)
    print(counts)
    if counts["holds"] or counts["held"] or counts["places_lost"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
