"""What is run, and in which order: nothing in between, nginx, the gateway, and again; of several rounds the median counts.

The gateway and nginx share one core, and one of them works at a time. The load generator and the mock upstream share the
other one. How busy it was stands beside each figure: where it is full, requests per second say nothing of the subject.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import load, machine
from bench.counting import counting
from bench.load import Order, Result
from bench.subjects import BUDGET, LIMITS, ORIGINS, Gateway, Mock, Subject, get, mock_upstream, nginx, request

Figures = dict[str, float]
Say = Callable[[str], None]

CONNECTIONS = 32
PACED_CONNECTIONS = 4
RATE = 50.0
SETTLE_SECONDS = 2.0  # when all streams are open, before memory and delays are looked at
PARTS = ("costs", "latency", "open", "steps", "journal", "metrics")
TMPFS = Path("/dev/shm")


class Failed(Exception):
    """A subject did not answer as it should, so its figures would mean nothing."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a run takes, in seconds, and how often each is done."""

    rounds: int
    full: float
    paced: float
    rate: float
    slow_rounds: int  # of what is paced or at a rate
    steps: float
    step_rounds: int
    opened: tuple[int, ...]
    open_seconds: float
    more: bool  # also what takes long or is rarely asked for


QUICK = Effort(rounds=2, full=1.5, paced=2, rate=2, slow_rounds=1, steps=1.0, step_rounds=2, opened=(1000,), open_seconds=3, more=False)
FULL = Effort(rounds=5, full=4, paced=6, rate=8, slow_rounds=3, steps=3, step_rounds=5, opened=(1000, 5000), open_seconds=10, more=True)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One line of the table. `per` is what the CPU time is divided by."""

    name: str
    title: str
    kind: str
    per: str = "request"
    connections: int = 0
    rate: float = 0.0
    tls: bool = False


THROUGHPUT = (
    Scenario("whole", "one JSON answer", "whole", connections=CONNECTIONS),
    Scenario("burst", "64 events back to back", "burst", "stream", connections=CONNECTIONS),
)
PACED = (Scenario("paced", "64 events 5 ms apart", "paced", "stream", connections=PACED_CONNECTIONS),)
TLS = (Scenario("whole_tls", "one JSON answer, TLS to the upstream", "whole", connections=CONNECTIONS, tls=True),)
RATES = (
    Scenario("whole_50", "one JSON answer", "whole", rate=RATE),
    Scenario("burst_50", "64 events back to back", "burst", "stream", rate=RATE),
    Scenario("paced_50", "64 events 5 ms apart", "paced", "stream", rate=RATE),
)


@dataclass(slots=True)
class Bench:
    """One run of all of it. `results` fills as it goes."""

    effort: Effort
    gateway_core: int
    load_core: int
    say: Say
    results: dict[str, object]
    parts: Sequence[str] = PARTS

    def run(self, folder: Path) -> None:
        with mock_upstream(folder, self.load_core) as mock, nginx(folder, self.gateway_core, mock) as proxy:
            direct = Subject("direct", mock.pid, mock.ports[0], mock.ports[0], mock.tls_port)
            if proxy is None:
                self.say("There is no nginx here: no ratios.")
            with Gateway(folder, self.gateway_core, mock) as gateway:
                subjects = [direct, *([proxy] if proxy else []), gateway.subject()]
                if "costs" in self.parts:
                    self.results["at_rest"] = {"cpu_ms_per_second": self.at_rest(gateway.subject())}
                    self.costs(subjects, mock)
                if "latency" in self.parts:
                    self.compare(RATES, subjects, mock, self.effort.rate, self.effort.slow_rounds)
                if "open" in self.parts:
                    self.open_streams([one for one in subjects if one is not direct], mock)
                if "steps" in self.parts:
                    self.results["steps"] = self.steps(gateway, mock)
            if "journal" in self.parts and self.effort.more:
                self.results["journal"] = self.journals(folder, mock)
            if "metrics" in self.parts:
                self.results["metrics"] = counting()

    def at_rest(self, subject: Subject) -> float:
        """What the threads beside the requests take while there are none."""
        began, before = time.monotonic(), machine.cpu_seconds(subject.pid)
        time.sleep(self.effort.paced)
        return 1000 * (machine.cpu_seconds(subject.pid) - before) / (time.monotonic() - began)

    def costs(self, subjects: Sequence[Subject], mock: Mock) -> None:
        effort = self.effort
        self.compare(THROUGHPUT, subjects, mock, effort.full, effort.rounds)
        if effort.more:
            self.compare(TLS, subjects[1:], mock, effort.full, effort.rounds)
        self.compare(PACED, subjects, mock, effort.paced, effort.slow_rounds)

    def compare(self, scenarios: Sequence[Scenario], subjects: Sequence[Subject], mock: Mock, seconds: float, rounds: int) -> None:
        for scenario in scenarios:
            runs: dict[str, list[Figures]] = {subject.name: [] for subject in subjects}
            for _ in range(rounds):
                for subject in subjects:
                    figures = self.measure(subject, mock, order_for(scenario, subject, seconds))
                    self.say(f"{scenario.title}, {scenario.rate or scenario.connections:g}, {subject.name}: {in_words(figures)}")
                    runs[subject.name].append(figures)
            medians = {name: median_of(found) for name, found in runs.items()}
            add_latency(medians)
            self.results[scenario.name] = {"title": scenario.title, "per": scenario.per, **medians, "runs": runs}

    def measure(self, subject: Subject, mock: Mock, order: Order) -> Figures:
        order.watched = list(dict.fromkeys([subject.pid, mock.pid]))
        order.cores = [self.gateway_core, self.load_core]
        result = load.in_a_process(order)
        if result.failed or not (result.finished or order.open_streams):
            raise Failed(f"{subject.name}: {result.finished} answers, and {result.failed} that were none. {result.wrong}")
        return figures_of(result, subject, mock, self.gateway_core, self.load_core)

    def open_streams(self, subjects: Sequence[Subject], mock: Mock) -> None:
        for number in self.effort.opened:
            runs: dict[str, Figures] = {}
            for subject in subjects:
                requests = [request(subject, "idle", f"m{origin}") for origin in range(ORIGINS)]
                order = Order([subject.address(stream=True)], requests, stream=True, open_streams=number)
                order.seconds, order.warm_seconds = self.effort.open_seconds, SETTLE_SECONDS
                runs[subject.name] = figures = self.measure(subject, mock, order)
                figures["kib_per_stream"] = (figures["memory_kib"] - figures["memory_before_kib"]) / number
                self.say(f"{number} open streams, {subject.name}: {in_words(figures)}")
            self.results[f"open_{number}"] = {"title": f"{number} open streams, one event per second each", "per": "event", **runs}

    def steps(self, gateway: Gateway, mock: Mock) -> dict[str, Figures]:
        """The trip with one limit more each time. The median of the rounds, each of which goes through all of them."""
        given = {**LIMITS, "budget": BUDGET}
        subjects = {"no limits": gateway.subject(gateway.issue_key())}
        if self.effort.more:
            for number in range(1, len(LIMITS) + 1):
                names = list(LIMITS)[:number]
                subjects[" + ".join(names)] = gateway.subject(gateway.issue_key(**{name: given[name] for name in names}))
        subjects["rpm + tpm + concurrency + budget (money is held)"] = gateway.subject()
        orders = {name: (subject, request(subject, "whole")) for name, subject in subjects.items()}
        orders = {"the server alone (GET /healthz)": (gateway.subject(), get(gateway.subject(), "/healthz")), **orders}
        return self.in_turn(orders, mock)

    def journals(self, folder: Path, mock: Mock) -> dict[str, Figures]:
        """The same trip with the journal on different ground. Each is a gateway of its own; all run, one of them works."""
        with contextlib.ExitStack() as stack:
            places: dict[str, Gateway] = {"on disk": stack.enter_context(Gateway(folder, self.gateway_core, mock, "on-disk"))}
            if TMPFS.is_dir():
                memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sluice-bench-", dir=TMPFS)))
                places["in memory (tmpfs)"] = stack.enter_context(Gateway(folder, self.gateway_core, mock, "in-memory", journal=memory))
            places["on disk, JOURNAL_FSYNC=1"] = stack.enter_context(Gateway(folder, self.gateway_core, mock, "synced", JOURNAL_FSYNC="1"))
            orders = {name: (gateway.subject(), request(gateway.subject(), "whole")) for name, gateway in places.items()}
            return self.in_turn(orders, mock)

    def in_turn(self, orders: Mapping[str, tuple[Subject, str]], mock: Mock) -> dict[str, Figures]:
        runs: dict[str, list[Figures]] = {name: [] for name in orders}
        for _ in range(self.effort.step_rounds):
            for name, (subject, text) in orders.items():
                order = Order([subject.address()], [text], connections=CONNECTIONS, seconds=self.effort.steps)
                runs[name].append(self.measure(subject, mock, order))
                self.say(f"{name}: {in_words(runs[name][-1])}")
        return {name: median_of(found) for name, found in runs.items()}


def order_for(scenario: Scenario, subject: Subject, seconds: float) -> Order:
    stream = scenario.kind != "whole"
    return Order(
        [subject.address(stream=stream, tls=scenario.tls)],
        [request(subject, scenario.kind, "secure" if scenario.tls else "m0")],
        stream=stream,
        connections=scenario.connections,
        rate=scenario.rate,
        seconds=seconds,
    )


def figures_of(result: Result, subject: Subject, mock: Mock, gateway_core: int, load_core: int) -> Figures:
    """Microseconds, milliseconds, and shares of a core (0 to 1). `others_*`: what anyone else did on that core meanwhile."""
    count = result.finished or len(result.delays) or 1
    cpu, seconds = result.cpu[str(subject.pid)], result.seconds
    loading = result.own_cpu + result.cpu[str(mock.pid)]
    figures = {
        "per_second": count / seconds,
        "cpu_us": cpu / count * 1e6,
        "main_thread_us": result.main_thread[str(subject.pid)] / count * 1e6,
        "subject_core": cpu / seconds,
        "load_core": loading / seconds,
        "others_subject_core": result.busy[str(gateway_core)] / seconds - (cpu / seconds if subject.pid != mock.pid else 0.0),
        "others_load_core": (result.busy[str(load_core)] - loading) / seconds,
    }
    for name, values in (("latency", result.latencies), ("first_byte", result.first_bytes), ("event_delay", result.delays)):
        if len(values) > 1:
            figures[f"{name}_p50_ms"], figures[f"{name}_p99_ms"] = (1000 * percentile(values, share) for share in (0.5, 0.99))
    if result.memory_kib:
        figures["memory_before_kib"] = result.memory_before_kib[str(subject.pid)]
        figures["memory_kib"] = result.memory_kib[str(subject.pid)]
    return figures


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median_of(runs: Sequence[Figures]) -> Figures:
    """The median of each figure, and how far the CPU figures of the rounds lie apart (0.1 = ten percent of the median)."""
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    costs = [run["cpu_us"] for run in runs]
    medians["spread"] = (max(costs) - min(costs)) / medians["cpu_us"] if medians["cpu_us"] else 0.0
    return medians


def add_latency(medians: dict[str, Figures]) -> None:
    """Put beside each latency how much it is above that of the upstream itself."""
    direct = medians.get("direct")
    if direct is None:
        return
    for name, figures in medians.items():
        if name != "direct":
            added = {f"added_{what}": value - direct[what] for what, value in figures.items() if what.endswith("_ms") and what in direct}
            figures.update(added)


def in_words(figures: Figures) -> str:
    words = [f"{figures['cpu_us']:.1f} us", f"{figures['per_second']:.0f}/s", f"load core {figures['load_core']:.0%}"]
    for name, label in (("latency", "latency"), ("event_delay", "event delay")):
        if f"{name}_p50_ms" in figures:
            words.append(f"{label} {figures[f'{name}_p50_ms']:.2f}/{figures[f'{name}_p99_ms']:.2f} ms")
    if "kib_per_stream" in figures:
        words.append(f"{figures['kib_per_stream']:.1f} KiB each")
    return ", ".join(words)


@contextlib.contextmanager
def own_folder(parent: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sluice-bench-", dir=parent) as name:
        yield Path(name)
