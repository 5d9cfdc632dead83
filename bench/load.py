"""The load generator: sends one request again and again, and parses of the answers only what it must to count them.

A run is an `Order`, given as JSON on standard input to `python -m bench.load`, and a `Result`, as JSON on standard output.
There are three ways to send: as fast as answers come on so many connections (`connections`), so many a second whatever
becomes of them (`rate`), or so many streams held open at once (`open_streams`). The processes named in the order are
measured by their CPU clocks exactly over the counted requests.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field

import uvloop

from bench import machine
from bench.upstream import SENT, SENT_DIGITS

RAMP_PER_SECOND = 500
OPENING_SECONDS = 60.0
LEFTOVER_SECONDS = 5.0
GOOD = b"HTTP/1.1 200"
STAMP_BYTES = len(SENT) + SENT_DIGITS


@dataclass(slots=True)
class Order:
    """One run. `addresses` are taken in turn by connections, each with the request of the same place in `requests`."""

    addresses: list[tuple[str, int]]
    requests: list[str]
    stream: bool = False
    connections: int = 0
    rate: float = 0.0
    open_streams: int = 0
    seconds: float = 2.0
    warm_seconds: float = 0.5  # before anything counts; with `open_streams` after all have had their first event
    watched: list[int] = field(default_factory=list)  # processes whose CPU time is wanted
    families: list[int] = field(default_factory=list)  # the same, with all that they started
    cores: list[int] = field(default_factory=list)  # cores whose busy time is wanted


@dataclass(slots=True)
class Result:
    """Times in seconds. `cpu` and `main_thread` by process id, `busy` by core, all over the `seconds` that were counted."""

    finished: int = 0
    failed: int = 0
    wrong: str = ""  # how an answer began that was none
    seconds: float = 0.0
    own_cpu: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    main_thread: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)  # from the request to the last byte of its answer
    first_bytes: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)  # of events that say when they were sent
    memory_before_kib: dict[str, int] = field(default_factory=dict)
    memory_kib: dict[str, int] = field(default_factory=dict)


class Window:
    """What is counted, and when."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.result = Result()
        self.open = False
        self.ended = False

    def begin(self) -> None:
        gc.collect()
        gc.disable()
        self.open = True
        self._marks = self._clocks()

    def end(self) -> None:
        began, ended = self._marks, self._clocks()
        gc.enable()
        self.open, self.ended = False, True
        result = self.result
        result.seconds, result.own_cpu = ended[0] - began[0], ended[1] - began[1]
        for pid in [*self.order.watched, *self.order.families]:
            result.cpu[str(pid)] = ended[2][pid] - began[2][pid]
        for pid in self.order.watched:
            result.main_thread[str(pid)] = ended[3][pid] - began[3][pid]
        for core in self.order.cores:
            result.busy[str(core)] = ended[4][core] - began[4][core]

    def _clocks(self) -> tuple[float, float, dict[int, float], dict[int, float], dict[int, float]]:
        watched, cores = self.order.watched, self.order.cores
        return (
            time.monotonic(),
            time.process_time(),
            {pid: machine.cpu_seconds(pid) for pid in watched} | {pid: machine.family_seconds(pid) for pid in self.order.families},
            {pid: machine.main_thread_seconds(pid) for pid in watched},
            {core: machine.busy_seconds(core) for core in cores},
        )

    def memory(self) -> dict[str, int]:
        return {str(pid): machine.memory_kib(pid) for pid in self.order.watched}


class Caller(asyncio.Protocol):
    """One connection, one request under way. What to do when an answer is whole is the kind of run's to say."""

    def __init__(self, window: Window, request: bytes) -> None:
        self.window = window
        self.request = request
        self.stream = window.order.stream
        self.rest = b""
        self.began = 0.0
        self.counts = False
        self.waiting = False
        self.answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiting and not self.window.ended:
            self.window.result.failed += 1

    def send(self) -> None:
        self.began = time.monotonic()
        self.counts = self.window.open
        self.waiting, self.answered = True, False
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if not self.answered:
            self.answered = True
            if self.counts:
                self.window.result.first_bytes.append(time.monotonic() - self.began)
            if not GOOD.startswith(data[: len(GOOD)]):
                self.window.result.failed += 1
                self.window.result.wrong = data[:300].decode("latin-1")
        if self.stream:
            self.streamed(data)
        else:
            self.whole(data)

    def whole(self, data: bytes) -> None:
        data = self.rest + data if self.rest else data
        head_end = data.find(b"\r\n\r\n") + 4
        if b"content-length:" in (head := data[:head_end].lower()):
            ended = len(data) >= head_end + int(head[head.find(b"content-length:") + 15 :].split(b"\r", 1)[0])
        else:
            ended = head_end > 3 and data.endswith(b"0\r\n\r\n")
        self.rest = b"" if ended else data
        if ended:
            self.finish()

    def streamed(self, data: bytes) -> None:
        data = self.rest + data if self.rest else data
        seen = self.read_stamps(data)
        self.rest = data[max(seen, len(data) - STAMP_BYTES + 1) :]  # a stamp, or the end, may have come in part
        if data.endswith(b"0\r\n\r\n"):
            self.rest = b""
            self.finish()

    def read_stamps(self, data: bytes) -> int:
        """Note how long each event was under way that says when it was sent. How far they have been read."""
        result, now, seen = self.window.result, time.monotonic_ns(), 0
        at = data.find(SENT)
        while 0 <= at <= len(data) - STAMP_BYTES:
            seen = at + STAMP_BYTES
            if self.window.open:
                result.delays.append((now - int(data[at + len(SENT) : seen])) / 1e9)
            at = data.find(SENT, seen)
        return seen

    def finish(self) -> None:
        self.waiting = False
        if self.counts:
            self.window.result.latencies.append(time.monotonic() - self.began)
        if self.window.open:
            self.window.result.finished += 1
        self.finished()

    def finished(self) -> None:
        """The answer is whole."""


class Again(Caller):
    """Sends the next request as soon as the answer is whole."""

    def finished(self) -> None:
        if not self.window.ended:
            self.send()


class Lent(Caller):
    """Goes back among the free ones."""

    def __init__(self, window: Window, request: bytes, free: list[Lent]) -> None:
        super().__init__(window, request)
        self.free = free

    def finished(self) -> None:
        self.free.append(self)


async def run(order: Order) -> Result:
    """Do it. A run in which anything failed says so in `failed`; whether that is bad is the reader's to decide."""
    window = Window(order)
    if order.open_streams:
        await hold_open(window)
    elif order.rate:
        await at_rate(window)
    else:
        await as_fast_as_possible(window)
    return window.result


async def connect(window: Window, number: int, made: type[Caller], *more: object) -> Caller:
    order = window.order
    host, port = order.addresses[number % len(order.addresses)]
    request = order.requests[number % len(order.requests)].encode()
    _, caller = await asyncio.get_running_loop().create_connection(lambda: made(window, request, *more), host, port)
    return caller


async def as_fast_as_possible(window: Window) -> None:
    order = window.order
    callers = [await connect(window, number, Again) for number in range(order.connections)]
    for caller in callers:
        caller.send()
    await asyncio.sleep(order.warm_seconds)
    window.begin()
    await asyncio.sleep(order.seconds)
    window.end()
    for caller in callers:
        caller.transport.abort()


async def at_rate(window: Window) -> None:
    """A request at each beat. One that finds no free connection opens one, and its wait for that is not counted."""
    order, loop = window.order, asyncio.get_running_loop()
    free: list[Lent] = []
    everyone: list[Caller] = [await connect(window, number, Lent, free) for number in range(32 if order.stream else 8)]
    free.extend(everyone)
    beats, start = 0, loop.time()
    while beats < order.rate * (order.warm_seconds + order.seconds):
        if beats == int(order.rate * order.warm_seconds):
            window.begin()
        await asyncio.sleep(start + beats / order.rate - loop.time())
        beats += 1
        while free and free[-1].transport.is_closing():
            everyone.remove(free.pop())  # it had nothing to say for too long
        if not free:
            everyone.append(await connect(window, beats, Lent, free))
            free.append(everyone[-1])
        free.pop().send()
    deadline = loop.time() + LEFTOVER_SECONDS
    while len(free) < len(everyone) and loop.time() < deadline:  # noqa: ASYNC110 nothing is signalled on the counted path
        await asyncio.sleep(0.02)
    window.end()
    for caller in everyone:
        caller.transport.abort()


async def hold_open(window: Window) -> None:
    order, loop = window.order, asyncio.get_running_loop()
    window.result.memory_before_kib = window.memory()
    callers: list[Caller] = []
    start = loop.time()
    for number in range(order.open_streams):
        await asyncio.sleep(max(0.0, start + number / RAMP_PER_SECOND - loop.time()))
        callers.append(await connect(window, number, Caller))
        callers[-1].send()
    deadline = loop.time() + OPENING_SECONDS
    while not all(caller.answered for caller in callers) and loop.time() < deadline:  # noqa: ASYNC110 the same
        await asyncio.sleep(0.1)
    window.result.failed += sum(not caller.answered for caller in callers)
    await asyncio.sleep(order.warm_seconds)
    window.begin()
    await asyncio.sleep(order.seconds)
    window.end()
    window.result.memory_kib = window.memory()
    for caller in callers:
        caller.transport.abort()
    await asyncio.sleep(0.1)


def in_a_process(order: Order) -> Result:
    """Run it in a process of its own, which inherits the core of this one."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.load"],
        input=json.dumps(asdict(order)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"The load generator broke:\n{done.stderr}")
    return Result(**json.loads(done.stdout))


def main() -> None:
    machine.raise_file_limit()
    order = Order(**json.load(sys.stdin))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        json.dump(asdict(runner.run(run(order))), sys.stdout)


if __name__ == "__main__":
    main()
