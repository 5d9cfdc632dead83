"""F01, F02: clients that leave at random points, in each way there is. The upstream is closed within 1 s, and each call has
one row within 5 s: never less than its client received, never more than the upstream billed, and short of that bill by no more
than the upstream wrote while its client was leaving.

A client leaves by closing its socket (`close`), by resetting it (`reset`), or by saying that it will send no more while it
still reads (`half`), which nobody can tell from leaving, and which counts as that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.loops.load import TEXT, say
from tests.serving import Sluice, eventually, running
from tests.upstreams.kit import Step
from tests.upstreams.openai import OpenAIUpstream

SLOW = Step(text=TEXT * 4, delay_first_ms=60, delay_frame_ms=30)
WORD = re.compile(rb'"content":"[^"]')  # one in each event of a stream that says something
AT_ONCE = 10
WAYS = ("close", "reset", "half")
Way = Literal["close", "reset", "half"]


@dataclass
class Leaver:
    """One client, in monotonic seconds: it `heard` something for the last time (or asked), it `left`, and one that is
    half closed saw its answer `ended`."""

    way: Way
    stream: bool
    patience_seconds: float
    received: bytes = b""
    heard: float = 0.0
    left: float = 0.0
    ended: float | None = None

    async def hear(self, reader: asyncio.StreamReader) -> None:
        """Up to the end of the answer."""
        while more := await reader.read(65536):
            self.received += more
            self.heard = time.monotonic()


def run(
    times: int, *, ways: Sequence[Way] = WAYS, seed: int = 1, progress: Callable[[str], None] | None = None, **settings: str
) -> dict[str, Any]:
    """Leave so many times. `open_after_1_s`, `without_one_row` must be 0, and nothing `wrong`."""
    with OpenAIUpstream() as upstream, running(**settings) as sluice:
        sluice.set_price("sim/*", input=3, output=15)
        sluice.add_openai(upstream, prefix="sim")
        sluice.wait_for("sim")
        return leave(sluice, upstream, "sim", times, ways=ways, seed=seed, progress=progress)


def leave(
    sluice: Sluice,
    upstream: OpenAIUpstream,
    prefix: str,
    times: int,
    *,
    ways: Sequence[Way] = WAYS,
    seed: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    chance = random.Random(seed)
    upstream.reset()
    upstream.script(*[SLOW] * (times + AT_ONCE))
    key = sluice.issue_key()
    leavers = [Leaver(chance.choice(ways), chance.random() < 0.75, _patience(chance)) for _ in range(times)]
    asyncio.run(_all(sluice.port, key, f"{prefix}/gpt-4o-mini", leavers, progress))
    time.sleep(1)
    reached = {seen.request_id: seen for seen in upstream.log if seen.method == "POST"}
    # A call that went on to its end after its client had left was not closed, either.
    ends = {one: seen.finished_at or seen.peer_left_at for one, seen in reached.items()}
    leaver_of = {one: leavers[int(seen.json["user"])] for one, seen in reached.items()}
    late = [end - leaver_of[one].left for one, end in ends.items() if end is not None]
    open_still = len(ends) - len(late)
    halves = [one.ended - one.left for one in leavers if one.way == "half" and one.ended is not None]

    def rows_of() -> list[dict[str, Any]] | None:
        rows = [row for row in sluice.usage() if row["request_id"] in reached]
        return rows if len(rows) >= len(reached) else None

    rows = eventually(rows_of, "a call has no row 5 s after it was left", seconds=4)
    by_id = {row["request_id"]: row for row in rows}
    return {
        "aborts": times,
        "reached_the_upstream": len(reached),
        "still_open_upstream": open_still,
        "slowest_close_seconds": round(max(late, default=0.0), 3),
        "open_after_1_s": sum(one > 1 for one in late) + open_still,
        "slowest_end_of_a_half_closed_seconds": round(max(halves, default=0.0), 3),
        "rows": len(rows),
        "rows_499": sum(row["status"] == 499 for row in rows),
        "without_one_row": len(reached) - len(by_id) + len(rows) - len(by_id),
        "wrong": [
            found
            for one, row in by_id.items()
            if (found := what_is_wrong(row, upstream.bill(one).output_tokens, leaver_of[one], ends[one] or time.monotonic()))
        ],
    }


def _patience(chance: random.Random) -> float:
    """Half of them leave before the first word, where connecting, asking and waiting are."""
    return chance.uniform(0, 0.15) if chance.random() < 0.5 else chance.uniform(0.1, 1.8)


def what_is_wrong(row: dict[str, Any], billed: int, leaver: Leaver, closed: float, frame_ms: float = SLOW.delay_frame_ms) -> str:
    """`billed`: output tokens, one a word in each frame; `closed`: when the upstream knew. A busy machine takes its time for every
    step from one end to the other, and the upstream goes on writing meanwhile: so many words may be on its bill that nobody has read."""
    tokens, received = row["output_tokens"], len(WORD.findall(leaver.received)) if leaver.stream else 0
    on_the_way = 1 + (closed - leaver.heard) * 1000 / frame_ms
    if row["status"] == 200:
        right = tokens == billed
    else:
        right = row["status"] == 499 and received <= tokens <= billed and (not leaver.stream or billed - tokens <= on_the_way)
    return "" if right else f"{row} after {received} words received, {billed} billed, {on_the_way:.1f} on the way"


async def _all(port: int, key: str, model: str, leavers: Sequence[Leaver], progress: Callable[[str], None] | None) -> None:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, leaver: Leaver) -> None:
        async with gate:
            await _leave(leaver, port, key, model, str(number))
            if (number + 1) % 50 == 0:
                say(progress, f"left {number + 1} of {len(leavers)}")

    await asyncio.gather(*[one(number, leaver) for number, leaver in enumerate(leavers)])


async def _leave(leaver: Leaver, port: int, key: str, model: str, user: str) -> None:
    """Ask, read for a while, go."""
    body = json.dumps(
        {"model": model, "stream": leaver.stream, "user": user, "messages": [{"role": "user", "content": "count for me"}]}
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    leaver.heard = time.monotonic()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(leaver.patience_seconds):
            await leaver.hear(reader)
    leaver.left = time.monotonic()
    if leaver.way == "half":
        writer.write_eof()
        try:
            async with asyncio.timeout(5):
                await leaver.hear(reader)
            leaver.ended = time.monotonic()
        except ConnectionError:
            leaver.ended = time.monotonic()
    elif leaver.way == "reset":
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=500)
    parser.add_argument("--way", choices=WAYS, action="append", help="only so; else each in turn with 500 points of its own")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for way in options.way or WAYS:
        counts = run(options.times, ways=[way], seed=options.seed, progress=print)
        print(way, counts)
        if counts["open_after_1_s"] or counts["without_one_row"] or counts["wrong"]:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
