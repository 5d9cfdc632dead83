"""What it costs to translate one event of a stream, for each kind that speaks another language than our clients.

In-process, and of our own work alone: the recorded stream of the kind (`tests/providers/fixtures/`), lengthened to `EVENTS` events, is
fed to its reader one frame at a time. Kinds whose events go on as they came are not here: `plan.py` measures those on the way through
the server.
"""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass
from itertools import cycle, islice

from bench.subjects import REPOSITORY
from providers import registry
from providers.adapter import Adapter, Ask, Reader, SameShape, Target
from providers.secrets import SecretText

EVENTS = 1000
ROUNDS = 9
MOST_US = 15.0  # the bar: CPU microseconds an event
RECORDINGS = REPOSITORY / "tests" / "providers" / "fixtures"

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A kind, and what its upstream sent."""

    adapter: Adapter
    frames: list[bytes]

    def reader(self) -> Reader:
        name = self.adapter.name
        body = {"model": f"{name}/their-model", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
        target = Target(name, 1, "bench", self.adapter.base_url, SecretText("sk-bench"), "their-model", f"{name}/their-model")
        return self.adapter.reader(
            Ask("chat/completions", body, stream=True, request_id="0123456789abcdef", client_wants_usage=True), target
        )


def recorded(name: str) -> Recorded:
    stream = (RECORDINGS / name / "hello.stream").read_bytes()
    end = rb"\n\r?\n" if re.search(rb"\n\r?\n", stream) else rb"\n"  # events, or lines
    return Recorded(registry.adapter(name), re.findall(rb".+?(?:%b|\Z)" % end, stream, re.DOTALL))


def kinds() -> list[str]:
    """Those with a recording whose reader does more than hand on."""
    names = [name for name in registry.names() if (RECORDINGS / name / "hello.stream").exists()]
    return [name for name in names if type(recorded(name).reader()) is not SameShape]


def lengthened(one: Recorded, events: int = EVENTS) -> list[bytes]:
    """Its frames, with those in the middle that carry content again and again: as many as there shall be events.

    The last that carries something is not among those: it may say the reason of the end, too."""
    reader = one.reader()
    carrying = []
    for number, frame in enumerate(one.frames):
        before = reader.events
        reader.feed(frame)
        if reader.events > before:
            carrying.append(number)
    again = carrying[:-1] or carrying
    head, tail = one.frames[: again[0]], one.frames[again[-1] + 1 :]
    between = one.frames[again[0] : again[-1] + 1]
    more = islice(cycle([one.frames[number] for number in again]), max(0, events - len(carrying)))
    return [*head, *between, *more, *tail]


def cost_of(name: str, rounds: int = ROUNDS) -> Figures:
    """CPU microseconds an event: the median of some rounds, and how far they lie apart."""
    one = recorded(name)
    frames = lengthened(one)
    _read(one.reader(), frames)  # what is set up once shall not count
    costs, events, sent = [], 0, 0
    for _ in range(rounds):
        reader = one.reader()
        began = time.process_time_ns()
        sent = _read(reader, frames)
        took = time.process_time_ns() - began
        events = reader.events
        costs.append(took / 1000 / events)
    median = statistics.median(costs)
    return {
        "cpu_us": median,
        "spread": (max(costs) - min(costs)) / median,
        "events": events,
        "bytes_per_event": sent / events,
        "most_us": MOST_US,
    }


def _read(reader: Reader, frames: list[bytes]) -> int:
    sent = 0
    for frame in frames:
        sent += len(reader.feed(frame))
    return sent + len(reader.end())
