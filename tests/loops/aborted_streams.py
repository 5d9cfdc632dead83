"""A07: streams that are left at a random byte, under both policies. Each has one row within 5 s. Under `cancel` its tokens are
within a chunk of the upstream's bill, under `drain` they are the bill.

What a busy machine lets the upstream write while its client is leaving is no fault of the row: see `aborts.what_is_wrong`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import struct
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.loops.aborts import Leaver, what_is_wrong
from tests.loops.load import TEXT, say
from tests.serving import Sluice, eventually, running
from tests.upstreams.kit import Step
from tests.upstreams.openai import OpenAIUpstream

POLICIES = ("cancel", "drain")
WORDS = Step(text=TEXT * 3, delay_first_ms=20, delay_frame_ms=20)
AT_ONCE = 10
BATCH = 100  # rows are looked for after so many streams
ROW_SECONDS = 5


@dataclass
class Aborter(Leaver):
    """One client: it goes when it has read so many bytes of the answer, head included."""

    bytes: int = 0


def run(
    times: int, *, policies: Sequence[str] = POLICIES, seed: int = 1, progress: Callable[[str], None] | None = None, **settings: str
) -> dict[str, dict[str, Any]]:
    """So many streams under each policy. `without_one_row` must be 0, and nothing `wrong`."""
    with OpenAIUpstream() as upstream, running(**settings) as sluice:
        sluice.set_price("sim/*", input=3, output=15)
        sluice.add_openai(upstream, prefix="sim")
        sluice.wait_for("sim")
        return abort(sluice, upstream, "sim", times, policies=policies, seed=seed, progress=progress)


def abort(
    sluice: Sluice,
    upstream: OpenAIUpstream,
    prefix: str,
    times: int,
    *,
    policies: Sequence[str] = POLICIES,
    seed: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    key = sluice.issue_key()
    found = {}
    aliases = {policy: _alias(sluice, f"{prefix}/gpt-4o-mini", policy) for policy in policies}
    eventually(lambda: set(aliases.values()) <= _models(sluice, key), "the server does not know the aliases", seconds=10)
    for policy, model in aliases.items():
        size = len(asyncio.run(_whole(sluice.port, key, model, upstream)))
        chance = random.Random(seed)
        total: dict[str, Any] = {"aborts": 0, "rows": 0, "rows_499": 0, "reported": 0, "without_one_row": 0, "furthest_from_bill": 0}
        total["wrong"] = []
        for begun in range(0, times, BATCH):
            aborters = [
                Aborter(chance.choice(["close", "reset"]), True, 0, bytes=chance.randint(1, size - 1))
                for _ in range(min(BATCH, times - begun))
            ]
            _batch(sluice, upstream, key, model, policy, aborters, total)
            say(progress, f"{policy}: {total['aborts']} streams left, {total['rows']} rows, {len(total['wrong'])} wrong")
        found[policy] = total
    return found


def _alias(sluice: Sluice, model: str, policy: str) -> str:
    name = f"{model.replace('/', '-')}-{policy}"
    sluice.python(
        "from proxy.models import Route; from proxy.routes import Leads, create_route\n"
        f"Route.objects.filter(name={name!r}).exists() or create_route("
        f"organization=None, name={name!r}, targets=[Leads({model!r}, 0)], on_abort={policy!r})"
    )
    return name


def _models(sluice: Sluice, key: str) -> set[str]:
    request = urllib.request.Request(f"{sluice.url}/v1/models", headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return {model["id"] for model in json.load(answer)["data"]}


def _batch(
    sluice: Sluice, upstream: OpenAIUpstream, key: str, model: str, policy: str, aborters: Sequence[Aborter], total: dict[str, Any]
) -> None:
    upstream.reset()
    upstream.script(*[WORDS] * len(aborters))
    asyncio.run(_all(sluice.port, key, model, aborters))
    left = time.monotonic()
    reached = {seen.request_id: seen for seen in upstream.posts}

    def rows_of() -> list[dict[str, Any]] | None:
        rows = [row for row in sluice.usage() if row["request_id"] in reached]
        return rows if len(rows) >= len(reached) else None

    rows = eventually(rows_of, "a stream has no row 5 s after it was left", seconds=ROW_SECONDS - (time.monotonic() - left))
    by_id = {row["request_id"]: row for row in rows}
    total["aborts"] += len(aborters)
    total["rows"] += len(rows)
    total["without_one_row"] += len(aborters) - len(by_id) + len(rows) - len(by_id)
    for one, row in by_id.items():
        bill, seen = upstream.bill(one), reached[one]
        total["rows_499"] += row["status"] == 499
        total["reported"] += row["usage_source"] == "reported"
        total["furthest_from_bill"] = max(total["furthest_from_bill"], abs(row["output_tokens"] - bill.output_tokens))
        if policy == "drain":
            billed = {"output_tokens": bill.output_tokens, "input_tokens": bill.input_tokens, "usage_source": "reported"}
            wrong = "" if billed.items() <= row.items() and row["status"] in (200, 499) else f"{row}, billed {bill}"
        else:
            closed = seen.finished_at or seen.peer_left_at or time.monotonic()
            wrong = what_is_wrong(row, bill.output_tokens, aborters[int(seen.json["user"])], closed, WORDS.delay_frame_ms)
        if wrong:
            total["wrong"].append(wrong)


async def _whole(port: int, key: str, model: str, upstream: OpenAIUpstream) -> bytes:
    upstream.reset()
    upstream.script(WORDS)
    reader, writer = await _ask(port, key, model, "0")
    data = b""
    while not data.endswith(b"0\r\n\r\n") and (more := await reader.read(65536)):
        data += more
    writer.close()
    return data


async def _all(port: int, key: str, model: str, aborters: Sequence[Aborter]) -> None:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, aborter: Aborter) -> None:
        async with gate:
            await _abort(aborter, port, key, model, str(number))

    await asyncio.gather(*[one(number, aborter) for number, aborter in enumerate(aborters)])


async def _ask(port: int, key: str, model: str, user: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    body = json.dumps({"model": model, "stream": True, "user": user, "messages": [{"role": "user", "content": "count for me"}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    return reader, writer


async def _abort(aborter: Aborter, port: int, key: str, model: str, user: str) -> None:
    reader, writer = await _ask(port, key, model, user)
    while len(aborter.received) < aborter.bytes and (more := await reader.read(aborter.bytes - len(aborter.received))):
        aborter.received += more
        aborter.heard = time.monotonic()
    aborter.left = time.monotonic()
    if aborter.way == "reset":
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1000, help="under each policy")
    parser.add_argument("--policy", choices=POLICIES, action="append")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = run(options.times, policies=options.policy or POLICIES, seed=options.seed, progress=print)
    print(json.dumps(found, indent=2))
    if any(total["without_one_row"] or total["wrong"] for total in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
