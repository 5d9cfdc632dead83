"""F08: calls that are cancelled at random points, over a pool with room for 10. Nothing may be left of them.

First the way out alone, in four ways; then whole requests through the gateway, whose clients leave or whose server ends:
of those no hold may be left either, and each has one settlement in the journal.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvloop

from accounts.principal import Limit
from providers.transport import PooledTransport
from proxy.catalog import Current
from proxy.journal import Admitted, Settled
from tests.loops.load import say
from tests.proxies.calls import QUICK, call, fetch, settle, transport
from tests.proxies.certificates import Authority
from tests.proxies.scripted import HELLO, Origin, Peer, origin
from tests.proxy.test_gateway import CHAT, KEY, USAGE, House, says, sse

ROOM = 10
AT_ONCE = 40
MOST_TRIES = 100  # for each that is cancelled: most find no room in time, or end before
IMPATIENT = replace(QUICK, pool_wait_seconds=0.02)
LONGEST_SECONDS = {False: 0.03, True: 0.06}  # without and with TLS, which here costs both sides their time


def run(
    times: int, *, seed: int = 1, tls: bool = False, on_uvloop: bool = False, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Cancel so many calls; others end before. `taken`, `open_connections`, `tasks` and `descriptors` count what is left, and must be 0."""
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
            longest_seconds = max(LONGEST_SECONDS[tls], 2 * await _usual_seconds(via, url, pem))
            before, descriptors = asyncio.all_tasks(), await _descriptors(via, there)
            outcomes: Counter[str] = Counter()
            moody.set()
            while outcomes["cancelled"] < times:
                outcomes.update(await asyncio.gather(*(_one(via, url, pem, chance, longest_seconds) for _ in range(AT_ONCE))))
                _tell(progress, outcomes.total(), outcomes["cancelled"], times)
            moody.clear()
            after = await _descriptors(via, there)
            left = asyncio.all_tasks() - before
            # A cancelled call of the origin's side may still be on its way out.
            tasks = [task for task in left if "serve" not in repr(task)]
            answer = await fetch(via, call(url, ca_pem=pem))
            return {
                "calls": outcomes.total(),
                "outcomes": dict(outcomes),
                "taken": next(iter(via._pools.values())).taken - 1,
                "open_connections": there.open - 1,
                "tasks": len(tasks),
                "descriptors": after - descriptors,
                "next_call": answer,
            }


def _tell(progress: Callable[[str], None] | None, begun: int, cancelled: int, wanted: int) -> None:
    assert begun < MOST_TRIES * wanted, f"of {begun} calls only {cancelled} could be cancelled"
    if begun % 1000 < AT_ONCE:
        say(progress, f"cancelled {cancelled} of {wanted}")


async def _usual_seconds(via: PooledTransport, url: str, pem: str) -> float:
    """What calls take on this machine, as many at once as there is room for, each on a connection of its own."""
    await _end_idle(via)
    began = time.monotonic()
    await asyncio.gather(*(fetch(via, call(url, ca_pem=pem)) for _ in range(ROOM)))
    return time.monotonic() - began


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


async def _end_idle(via: PooledTransport) -> None:
    for pool in via._pools.values():
        pool.end_idle(float("inf"))
    await settle()


async def _descriptors(via: PooledTransport, there: Origin) -> int:
    """Open files of this process once all free connections have been ended."""
    await _end_idle(via)
    for _ in range(200):
        await settle()
        if there.open == 0:
            break
    gc.collect()
    return len(os.listdir("/dev/fd"))


def run_requests(times: int, *, seed: int = 1, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Cancel so many requests to a whole gateway. Beside what `run` counts, `holds`, `unsettled` and `twice` must be 0."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, tempfile.TemporaryDirectory() as folder:
        return runner.run(_run_requests(times, random.Random(seed), Path(folder), progress))


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def _run_requests(times: int, chance: random.Random, folder: Path, progress: Callable[[str], None] | None) -> dict[str, Any]:
    async def dawdles(peer: Peer) -> None:
        while True:
            await peer.request()
            await asyncio.sleep(chance.uniform(0, 0.01))
            await peer.say(STREAM_HEAD, pause=chance.uniform(0, 0.003))
            for event in sse(says("one "), says("two "), says("three "), says("", usage=USAGE)):
                await peer.say(b"%x\r\n%b\r\n" % (len(event), event), pause=chance.uniform(0, 0.004))
            await peer.say(b"0\r\n\r\n")

    async with origin(dawdles) as there, transport(most_connections=ROOM) as via:
        limits = (
            Limit("key:1", "concurrency", 1000, "minute"),
            Limit("key:1", "money", 10**12, "total"),
            Limit("key:1", "rpm", 10**9, "minute"),
        )
        house = House(folder, lambda request: httpx.Response(500), limits=limits)
        house.catalog = replace(house.catalog, upstreams=tuple(replace(one, base_url=f"{there.url}/v1") for one in house.catalog.upstreams))
        house.gateway = replace(house.gateway, current=Current(house.catalog), transport=via)
        await _request(house, chance, longest_seconds=30)
        before, descriptors = asyncio.all_tasks(), await _descriptors(via, there)
        outcomes: Counter[str] = Counter()
        while outcomes["left"] + outcomes["cut"] < times:
            outcomes.update(await asyncio.gather(*(_request(house, chance, longest_seconds=0.07) for _ in range(AT_ONCE))))
            _tell(progress, outcomes.total(), outcomes["left"] + outcomes["cut"], times)
        after = await _descriptors(via, there)
        tasks = [task for task in asyncio.all_tasks() - before if "serve" not in repr(task)]
        records = house.records()
        admitted = {record.request_id for record in records if isinstance(record, Admitted)}
        settled = Counter(record.request_id for record in records if isinstance(record, Settled))
        return {
            "requests": outcomes.total(),
            "outcomes": dict(outcomes),
            "statuses": dict(Counter(record.status for record in records if isinstance(record, Settled))),
            "taken": next(iter(via._pools.values())).taken,
            "open_connections": there.open,
            "tasks": len(tasks),
            "descriptors": after - descriptors,
            "holds": house.limits.open_holds(),
            "unsettled": len(admitted - settled.keys()) + len(house.journal._open),
            "twice": sum(count - 1 for count in settled.values()),
            "next_call": await _request(house, chance, longest_seconds=30),
        }


async def _request(house: House, chance: random.Random, *, longest_seconds: float) -> str:
    """A stream whose client leaves, or whose task the server cuts, after a while."""
    left, said = asyncio.Event(), []
    messages = [{"type": "http.request", "body": json.dumps({**CHAT, "stream": True}).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        said.append(message)
        await asyncio.sleep(0)

    head = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {KEY}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": head, "client": ("127.0.0.1", 1)}
    task = asyncio.create_task(house.gateway(scope, receive, send))
    done, _ = await asyncio.wait([task], timeout=chance.uniform(0, longest_seconds))
    if not done:
        task.cancel() if chance.random() < 0.3 else left.set()
    try:
        await task
    except asyncio.CancelledError:
        return "cut"
    if left.is_set():
        return "left"
    return "answered" if said[0]["status"] == 200 else f"refused with {said[0]['status']}"


LEFT = ("taken", "open_connections", "tasks", "descriptors", "holds", "unsettled", "twice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for tls in (False, True):
        for on_uvloop in (False, True):
            counts = run(options.times, seed=options.seed, tls=tls, on_uvloop=on_uvloop, progress=print)
            print({"tls": tls, "uvloop": on_uvloop, **counts})
            if any(counts.get(name) for name in LEFT):
                raise SystemExit(1)
    logging.disable(logging.WARNING)  # each of them is noted there
    counts = run_requests(options.times, seed=options.seed, progress=print)
    print(counts)
    if any(counts.get(name) for name in LEFT) or counts["next_call"] != "answered":
        raise SystemExit(1)


if __name__ == "__main__":
    main()
