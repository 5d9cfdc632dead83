"""L09: half of the load that this machine can carry, for a long time, with one client in twenty leaving early. What is held
must not grow: memory by less than 5 MB an hour, and of files, tasks and holds nothing is left when it is quiet again.

`python -m tests.loops.soak --minutes 20` prints a line a minute and ends with 1 where it grew. A short run says little of
memory: caches fill up first, which the slope leaves out by its first third, but not if they take longer than that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvloop

from tests.loops.load import say
from tests.serving import REPOSITORY, Sluice

CLIENTS = 64
KEYS = 4
SHARE_OF_ABORTS = 0.05
MODELS = (("whole", 0.5), ("burst", 0.3), ("paced", 0.2))
MEASURE_SECONDS = 5.0
SAMPLE_SECONDS = 5.0
QUIET_SECONDS = 20.0
MOST_MB_PER_HOUR = 5.0
MORE_FILES = 5


@dataclass
class Counts:
    requests: int = 0
    aborts: int = 0
    errors: int = 0
    wrong: list[str] = field(default_factory=list)  # what went wrong, the first few times


@dataclass(frozen=True)
class Sample:
    """Of the serving process, `at` so many seconds into the run. Memory in MB: `own` is what it has written itself, and does not
    change when other processes load or leave the libraries that it shares with them."""

    at: float
    rss: float
    pss: float
    own: float
    fds: int
    threads: int
    tasks: int
    holds: int
    open_calls: int


class Clients:
    """They ask again and again: as fast as answers come, or so many times a second together."""

    def __init__(self, port: int, keys: list[str], seed: int) -> None:
        self.port, self.keys = port, keys
        self.counts = Counts()
        self._chance = random.Random(seed)
        self._pause = 0.0  # between requests, all clients together
        self._next = 0.0
        self._ending = False

    async def run(self, seconds: float, rate: float = 0.0) -> float:
        """Answers and aborts per second."""
        self._pause, self._next, self._ending = 1 / rate if rate else 0.0, time.monotonic(), False
        before, began = self.counts.requests, time.monotonic()
        clients = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
        await asyncio.sleep(seconds)
        took = time.monotonic() - began
        done = self.counts.requests - before
        self._ending = True
        await asyncio.gather(*clients)
        return done / took

    async def _client(self, number: int) -> None:
        connection = None
        key = self.keys[number % len(self.keys)]
        while not self._ending:
            if self._pause:
                now = time.monotonic()
                at = self._next = max(self._next + self._pause, now - 1)
                await asyncio.sleep(max(0.0, at - now))
            try:
                connection = connection or await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
                if not await self._ask(*connection, key):
                    connection[1].close()
                    connection = None
            except (OSError, EOFError, ValueError) as problem:
                self._failed(repr(problem))
                connection = None
            self.counts.requests += 1
        if connection is not None:
            connection[1].close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> bool:
        """False when the connection cannot be used again."""
        chance = self._chance
        model = chance.choices([name for name, _ in MODELS], [share for _, share in MODELS])[0]
        body = json.dumps({"model": f"mock/{model}", "stream": model != "whole", "messages": [{"role": "user", "content": "hello " * 20}]})
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write((head + body).encode())
        if chance.random() < SHARE_OF_ABORTS:
            self.counts.aborts += 1
            await asyncio.sleep(chance.uniform(0, 0.3))
            writer.transport.abort() if chance.random() < 0.5 else writer.close()
            return False
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200 "):
            self._failed(answer[:60].decode("latin-1") + (await reader.read(500)).decode("latin-1"))
            return False
        if b"transfer-encoding: chunked" in answer.lower():
            rest = await reader.readuntil(b"\r\n0\r\n\r\n")
            if b"data: [DONE]" not in rest[-60:]:
                self._failed(rest[-300:].decode("latin-1"))
        else:
            at = answer.lower().index(b"content-length:") + 15
            await reader.readexactly(int(answer[at : answer.index(b"\r", at)]))
        return True

    def _failed(self, what: str) -> None:
        self.counts.errors += 1
        if len(self.counts.wrong) < 5:
            self.counts.wrong.append(what)


def run(minutes: float, *, seed: int = 1, progress: Callable[[str], None] | None = None, **settings: str) -> dict[str, Any]:
    """`slope` is of its own memory, in MB an hour; `left` what is more than before when it is quiet again."""
    with TemporaryDirectory(prefix="sluice-soak-") as folder, mock_upstream() as port:
        watch_file = Path(folder) / "watched.json"
        sluice = Sluice(Path(folder) / "data", WATCH_FILE=str(watch_file), **settings)
        sluice.command = ["-m", "tests.loops.watched", "serve"]
        try:
            sluice.start(forked=False)
            sluice.set_price("mock/*", input=1, output=2)
            sluice.manage(
                "add_credential", "openai", "--label", "mock", "--prefix", "mock", "--base-url", f"http://127.0.0.1:{port}/v1",
                "--secret-stdin", stdin="sk-mock",
            )  # fmt: skip
            keys = [sluice.issue_key(rpm=10**6, concurrency=10**4, budget=10**6, window="total") for _ in range(KEYS)]
            sluice.wait_for("mock")
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(_run(sluice, watch_file, keys, minutes * 60, seed, progress))
        finally:
            sluice.close()


async def _run(
    sluice: Sluice, watch_file: Path, keys: list[str], seconds: float, seed: int, progress: Callable[[str], None] | None
) -> dict[str, Any]:
    clients = Clients(sluice.port, keys, seed)
    most = await clients.run(min(MEASURE_SECONDS, seconds / 6))
    began = time.monotonic()

    def sample() -> Sample:
        return _sample(sluice.pid, watch_file, time.monotonic() - began)

    before = await _quiet(sample)
    clients.counts = Counts()
    rate = most / 2
    say(progress, f"{most:.0f} requests/s are possible here, so {rate:.0f} are sent for {seconds / 60:g} min, of which 5 % are left early")
    say(progress, HEADINGS)

    began = time.monotonic()
    load = asyncio.create_task(clients.run(seconds, rate))
    samples: list[Sample] = []
    minute, counted = 1, Counts()
    while not load.done():
        await asyncio.wait([load], timeout=min(SAMPLE_SECONDS, seconds / 6))
        samples.append(sample())
        if samples[-1].at >= minute * 60 or (load.done() and samples[-1].at > (minute - 1) * 60 + SAMPLE_SECONDS):
            say(progress, _line(minute, samples[-1], clients.counts, counted))
            minute, counted = minute + 1, Counts(**{**asdict(clients.counts), "wrong": []})
    held = await load
    after = await _quiet(sample, before)
    say(progress, _line("end", after, clients.counts, clients.counts))
    left = {
        "fds": after.fds - before.fds if after.fds > before.fds + MORE_FILES else 0,
        "tasks": max(0, after.tasks - before.tasks),
        "holds": after.holds,
        "open_calls": after.open_calls,
    }
    return {
        "possible_per_second": round(most, 1),
        "sent_per_second": round(held, 1),
        "requests": clients.counts.requests,
        "aborts": clients.counts.aborts,
        "errors": clients.counts.errors,
        "wrong": clients.counts.wrong,
        "slope": round(slope([one for one in samples if one.at >= seconds / 3]), 2),
        "samples": [asdict(one) for one in samples],
        "before": asdict(before),
        "after": asdict(after),
        "left": left,
    }


def slope(samples: list[Sample]) -> float:
    """MB an hour, by least squares over the process's own memory."""
    n = len(samples)
    mean_at, mean_own = sum(one.at for one in samples) / n, sum(one.own for one in samples) / n
    spread = sum((one.at - mean_at) ** 2 for one in samples)
    return 3600 * sum((one.at - mean_at) * (one.own - mean_own) for one in samples) / spread if spread else 0.0


async def _quiet(sample: Callable[[], Sample], than: Sample | None = None) -> Sample:
    """What is held when nothing happens: as soon as it is no more than before, else after a while."""
    end = time.monotonic() + QUIET_SECONDS
    while True:
        await asyncio.sleep(2.5)
        seen = sample()
        if than is None or time.monotonic() > end:
            return seen
        if seen.fds <= than.fds + MORE_FILES and seen.tasks <= than.tasks and not seen.holds and not seen.open_calls:
            return seen


def _sample(pid: int, watch_file: Path, at: float) -> Sample:
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line)
    memory = dict(line.split(":", 1) for line in (process / "smaps_rollup").read_text().splitlines()[1:])
    seen = json.loads(watch_file.read_text())
    return Sample(
        at=round(at, 1),
        rss=round(int(status["VmRSS"].split()[0]) / 1024, 2),
        pss=round(int(memory["Pss"].split()[0]) / 1024, 2),
        own=round(int(memory["Anonymous"].split()[0]) / 1024, 2),
        fds=len(list((process / "fd").iterdir())),
        threads=int(status["Threads"]),
        tasks=seen["tasks"],
        holds=seen["holds"],
        open_calls=seen["open_calls"],
    )


HEADINGS = "minute   RSS MB   PSS MB   own MB   fds  tasks  threads  holds  requests  aborts  errors"


def _line(minute: int | str, one: Sample, counts: Counts, before: Counts) -> str:
    figures = f"{one.rss:8.1f} {one.pss:8.1f} {one.own:8.1f} {one.fds:5} {one.tasks:6} {one.threads:8} {one.holds:6}"
    return (
        f"{minute:>6} {figures} {counts.requests - before.requests:9} {counts.aborts - before.aborts:7} {counts.errors - before.errors:7}"
    )


@contextmanager
def mock_upstream() -> Iterator[int]:
    """The benchmark's upstream, which remembers nothing, in a process of its own. Its port."""
    process = subprocess.Popen([sys.executable, "-m", "bench.upstream", "1"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(json.loads(process.stdout.readline())["plain"][0])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = run(options.minutes, seed=options.seed, progress=lambda text: print(text, flush=True))
    print({name: value for name, value in found.items() if name not in ("samples", "before", "after")})
    if found["slope"] > MOST_MB_PER_HOUR:
        print(f"Memory grew by {found['slope']} MB/h; {MOST_MB_PER_HOUR} are allowed.")
    if found["slope"] > MOST_MB_PER_HOUR or found["errors"] or any(found["left"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
