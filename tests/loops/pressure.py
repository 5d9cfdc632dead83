"""More calls than a server can serve: so many a second whatever becomes of them, from several callers at once.

`press(callers, seconds)` runs them in a process of its own (`python -m tests.loops.pressure`), so that what is measured is the server's
time and not the test's. A caller with a rate begins a call at each beat, on a connection that is free or on a new one; one
without sends the next as soon as it has its answer.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import uvloop

TICK_SECONDS = 0.002
AT_ONCE = 5_000  # connections of one caller; beats that find none left are counted as `unsent`
RETRY_AFTER_WANTED = (429, 503)


@dataclass(slots=True)
class Caller:
    name: str
    port: int
    request: str  # as it goes over the wire
    rate: float = 0.0  # calls a second; 0 = on `connections`, as fast as answers come
    connections: int = 32


@dataclass(slots=True)
class Seen:
    """What became of one caller's calls. `latencies` by status, in seconds; `broken`: connections that ended without an answer."""

    statuses: dict[int, int] = field(default_factory=dict)
    latencies: dict[int, list[float]] = field(default_factory=dict)
    without_retry_after: int = 0
    broken: int = 0
    open: int = 0  # calls that had no answer at the end
    unsent: int = 0
    seconds: float = 0.0

    @property
    def goodput(self) -> float:
        return self.statuses.get(200, 0) / self.seconds

    def percentile(self, share: float, *statuses: int) -> float:
        """Seconds; of these statuses together."""
        ordered = sorted(one for status in statuses for one in self.latencies.get(status, ()))
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def together(some: Iterable[Seen]) -> Seen:
    """As if one caller had seen it all, at the same time."""
    whole = Seen()
    for one in some:
        for status, count in one.statuses.items():
            whole.statuses[status] = whole.statuses.get(status, 0) + count
            whole.latencies.setdefault(status, []).extend(one.latencies[status])
        whole.without_retry_after += one.without_retry_after
        whole.broken, whole.open, whole.unsent = whole.broken + one.broken, whole.open + one.open, whole.unsent + one.unsent
        whole.seconds = one.seconds
    return whole


class _Running:
    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.request = caller.request.encode()
        self.statuses: Counter[int] = Counter()
        self.latencies: dict[int, list[float]] = defaultdict(list)
        self.without_retry_after = self.broken = self.unsent = 0
        self.free: list[_Connection] = []
        self.all: set[_Connection] = set()
        self.connecting = 0
        self.counts = True
        self.ending = False
        self.tasks: set[asyncio.Task[None]] = set()

    def call(self) -> None:
        while self.free:
            connection = self.free.pop()
            if not connection.transport.is_closing():
                return connection.send(time.monotonic())
        if len(self.all) + self.connecting >= AT_ONCE:
            self.unsent += 1
            return None
        task = asyncio.create_task(self._on_a_new_one(time.monotonic()))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return None

    async def _on_a_new_one(self, since: float) -> None:
        self.connecting += 1
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self.caller.port)
            connection.send(since)
        except OSError:
            self.broken += self.counts
        finally:
            self.connecting -= 1


class _Connection(asyncio.Protocol):
    def __init__(self, running: _Running) -> None:
        self.running = running
        self.data = b""
        self.since = 0.0
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.running.all.add(self)
        # What the server closes is reset from here, or its ports would run out within seconds of refusals.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def send(self, since: float) -> None:
        self.data, self.since, self.waiting = b"", since, True
        self.transport.write(self.running.request)

    def data_received(self, data: bytes) -> None:
        data = self.data = self.data + data if self.data else data
        end = data.find(b"\r\n\r\n")
        if end < 0 or not self.waiting:
            return
        head = data[:end].lower()
        at = head.find(b"content-length:")
        rest = int(head[at + 15 :].split(b"\r", 1)[0]) if at >= 0 else 0
        if len(data) >= end + 4 + rest if at >= 0 else data.endswith(b"0\r\n\r\n"):
            self._ended(int(data[9:12]), head)

    def _ended(self, status: int, head: bytes) -> None:
        running = self.running
        self.waiting = False
        if running.counts:
            running.statuses[status] += 1
            running.latencies[status].append(time.monotonic() - self.since)
            running.without_retry_after += status in RETRY_AFTER_WANTED and b"\r\nretry-after:" not in head
        if b"connection: close" in head:
            self.transport.abort()
        else:
            running.free.append(self)
        if not running.caller.rate and not running.ending:
            running.call()

    def connection_lost(self, exc: Exception | None) -> None:
        self.running.all.discard(self)
        if self.waiting and not self.running.ending:
            self.running.broken += 1
            if not self.running.caller.rate:
                self.running.call()


async def _run(callers: list[Caller], seconds: float) -> list[Seen]:
    loop = asyncio.get_running_loop()
    everyone = [_Running(caller) for caller in callers]
    for running in everyone:
        for _ in range(0 if running.caller.rate else running.caller.connections):
            running.call()
    began, done = loop.time(), [0] * len(everyone)
    while (passed := loop.time() - began) < seconds:
        for number, running in enumerate(everyone):
            while done[number] < running.caller.rate * passed:
                done[number] += 1
                running.call()
        await asyncio.sleep(TICK_SECONDS)
    found = []
    for running in everyone:
        running.counts, running.ending = False, True
        waiting = sum(connection.waiting for connection in running.all)
        counted = (running.without_retry_after, running.broken, waiting, running.unsent)
        found.append(Seen(dict(running.statuses), dict(running.latencies), *counted, loop.time() - began))
    for running in everyone:
        for connection in list(running.all):
            connection.transport.abort()
    return found


def press(callers: list[Caller], seconds: float) -> dict[str, Seen]:
    """What each of them saw, by its name. The process has the priority that this one has, and its core."""
    order = json.dumps([[asdict(caller) for caller in callers], seconds])
    done = subprocess.run([sys.executable, "-m", "tests.loops.pressure"], input=order, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    for one in found:  # JSON has words alone for names
        one["statuses"] = {int(status): count for status, count in one["statuses"].items()}
        one["latencies"] = {int(status): times for status, times in one["latencies"].items()}
    return {caller.name: Seen(**one) for caller, one in zip(callers, found, strict=True)}


def main() -> None:
    callers, seconds = json.load(sys.stdin)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        json.dump([asdict(one) for one in runner.run(_run([Caller(**caller) for caller in callers], seconds))], sys.stdout)


if __name__ == "__main__":
    main()
