"""F08: calls that are cancelled at random points, over a pool with room for 10. Nothing may be left of them."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import uvloop

from providers.transport import PooledTransport
from tests.loops.load import say
from tests.proxies.calls import QUICK, call, fetch, settle, transport
from tests.proxies.certificates import Authority
from tests.proxies.scripted import HELLO, Origin, Peer, origin

ROOM = 10
AT_ONCE = 40
IMPATIENT = replace(QUICK, pool_wait_seconds=0.02)
LONGEST_SECONDS = {False: 0.03, True: 0.06}  # without and with TLS, which here costs both sides their time


def run(
    times: int, *, seed: int = 1, tls: bool = False, on_uvloop: bool = False, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Cancel so many calls. `taken`, `open_connections`, `tasks` and `descriptors` count what is left, and must be 0."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if on_uvloop else None) as runner:
        return runner.run(_run(times, random.Random(seed), tls, progress))


async def _run(times: int, chance: random.Random, tls: bool, progress: Callable[[str], None] | None) -> dict[str, Any]:
    moody = asyncio.Event()

    async def dawdles(peer: Peer) -> None:
        while True:
            await peer.request()
            await asyncio.sleep(chance.uniform(0, 0.006))
            if moody.is_set() and chance.random() < 0.05:
                return peer.reset()
            for part in (HELLO[:-5], b"he", b"l", b"lo"):
                await peer.say(part, pause=chance.uniform(0, 0.002))

    authority = Authority()
    async with origin(dawdles, tls=authority.server("127.0.0.1") if tls else None) as there:
        url = there.url.replace("http:", "https:") if tls else there.url
        pem = authority.pem if tls else ""
        async with transport(most_connections=ROOM, timeouts=IMPATIENT) as via:
            await fetch(via, call(url, ca_pem=pem))
            before, descriptors = asyncio.all_tasks(), await _descriptors(via, there)
            outcomes: Counter[str] = Counter()
            moody.set()
            for begun in range(0, times, AT_ONCE):
                outcomes.update(await asyncio.gather(*(_one(via, url, pem, chance, LONGEST_SECONDS[tls]) for _ in range(AT_ONCE))))
                if begun % 1000 == 0:
                    say(progress, f"cancelled {begun + AT_ONCE} of {times}")
            moody.clear()
            after = await _descriptors(via, there)
            left = asyncio.all_tasks() - before
            # A cancelled call of the origin's side may still be on its way out.
            tasks = [task for task in left if "serve" not in repr(task)]
            answer = await fetch(via, call(url, ca_pem=pem))
            return {
                "calls": times,
                "outcomes": dict(outcomes),
                "taken": next(iter(via._pools.values())).taken - 1,
                "open_connections": there.open - 1,
                "tasks": len(tasks),
                "descriptors": after - descriptors,
                "next_call": answer,
            }


async def _one(via: PooledTransport, url: str, pem: str, chance: random.Random, longest_seconds: float) -> str:
    task = asyncio.create_task(fetch(via, call(url, ca_pem=pem, credential_id=chance.randrange(3))))
    done, _ = await asyncio.wait([task], timeout=chance.uniform(0, longest_seconds))
    if not done:
        task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return "cancelled"
    except httpx.TransportError as problem:
        return type(problem).__name__
    return "answered"


async def _descriptors(via: PooledTransport, there: Origin) -> int:
    """Open files of this process once all free connections have been ended."""
    for pool in via._pools.values():
        pool.end_idle(float("inf"))
    for _ in range(200):
        await settle()
        if there.open == 0:
            break
    gc.collect()
    return len(os.listdir("/dev/fd"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for tls in (False, True):
        for on_uvloop in (False, True):
            counts = run(options.times, seed=options.seed, tls=tls, on_uvloop=on_uvloop, progress=print)
            print({"tls": tls, "uvloop": on_uvloop, **counts})
            if counts["taken"] or counts["open_connections"] or counts["tasks"] or counts["descriptors"]:
                raise SystemExit(1)


if __name__ == "__main__":
    main()
