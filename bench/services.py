"""What an answer costs with Postgres and Redis, beside the same in one process of its own: SQLite, and limits in memory.

Both gateways run on the one core, and one of them works at a time. Redis, Postgres, the load generator and the mock upstream
share the other core: each has its column, so that one sees whether it was full. Redis and Postgres are started here, for
this run alone, and neither is tuned.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import load, machine
from bench.plan import THROUGHPUT, Bench, Failed, Figures, figures_of, in_words, median_of, order_for
from bench.subjects import Gateway, Missing, Mock, Subject, mock_upstream, wait_for_port
from tests.loops.databases import cluster, why_not
from tests.serving import free_port

CONNECTIONS = 64  # while some wait for Redis, others keep the gateway busy
ROUNDS = 5  # two things are compared that hardly differ
SECRETS = {"SECRET_KEY": secrets.token_hex(32), "KEYRING": secrets.token_hex(32)}


SCENARIOS = [replace(scenario, connections=CONNECTIONS) for scenario in THROUGHPUT]


@dataclass(frozen=True, slots=True)
class Beside:
    """The services, as they run: where they are, and whose CPU time is theirs."""

    database_url: str
    redis_url: str
    postgres: int  # its processes are this one's children
    redis: int


@dataclass(slots=True)
class Services:
    """One run of it, with the effort, the cores and the results of a benchmark."""

    bench: Bench

    def run(self, folder: Path) -> None:
        bench = self.bench
        core = bench.gateway_core
        with contextlib.ExitStack() as stack:
            beside = stack.enter_context(services(folder, bench.load_core))
            mock = stack.enter_context(mock_upstream(folder, bench.load_core))
            embedded = stack.enter_context(Gateway(folder, core, mock, "embedded"))
            both = {"DATABASE_URL": beside.database_url, "REDIS_URL": beside.redis_url, **SECRETS}
            served = stack.enter_context(Gateway(folder, core, mock, "services", **both))
            direct = Subject("direct", mock.pid, mock.ports[0], mock.ports[0], mock.tls_port)
            subjects = [direct, embedded.subject(), served.subject()]
            for scenario in SCENARIOS:
                runs: dict[str, list[Figures]] = {subject.name: [] for subject in subjects}
                for _ in range(ROUNDS):
                    for subject in subjects:
                        figures = self.measure(subject, mock, order_for(scenario, subject, bench.effort.full), beside)
                        bench.say(f"{scenario.title}, {subject.name}: {in_words(figures)}")
                        runs[subject.name].append(figures)
                medians = {name: median_of(found) for name, found in runs.items()}
                bench.results[scenario.name] = {"title": scenario.title, "per": scenario.per, **medians, "runs": runs}
            if bench.effort.more:
                one = stack.enter_context(Gateway(folder, core, mock, "postgres", DATABASE_URL=f"{beside.database_url}_alone", **SECRETS))
                bench.results["parts"] = self.parts([embedded.subject(), one.subject(), served.subject()], mock, beside)

    def parts(self, subjects: Sequence[Subject], mock: Mock, beside: Beside) -> dict[str, Figures]:
        """One service more each time."""
        names = ("SQLite, memory", "Postgres, memory", "Postgres, Redis")
        runs: dict[str, list[Figures]] = {name: [] for name in names}
        for _ in range(self.bench.effort.step_rounds):
            for name, subject in zip(names, subjects, strict=True):
                order = order_for(SCENARIOS[0], subject, self.bench.effort.steps)
                runs[name].append(self.measure(subject, mock, order, beside))
                self.bench.say(f"{name}: {in_words(runs[name][-1])}")
        return {name: median_of(found) for name, found in runs.items()}

    def measure(self, subject: Subject, mock: Mock, order: load.Order, beside: Beside) -> Figures:
        bench = self.bench
        order.watched = list(dict.fromkeys([subject.pid, mock.pid, beside.redis]))
        order.families = [beside.postgres]
        order.cores = [bench.gateway_core, bench.load_core]
        result = load.in_a_process(order)
        if result.failed or not result.finished:
            raise Failed(f"{subject.name}: {result.finished} answers, and {result.failed} that were none. {result.wrong}")
        figures = figures_of(result, subject, mock, bench.gateway_core, bench.load_core)
        for name, pid in (("redis", beside.redis), ("postgres", beside.postgres)):
            figures[f"{name}_core"] = result.cpu[str(pid)] / result.seconds
            figures[f"{name}_us"] = result.cpu[str(pid)] / result.finished * 1e6
            figures["others_load_core"] -= figures[f"{name}_core"]
        return figures


@contextlib.contextmanager
def services(folder: Path, core: int) -> Iterator[Beside]:
    """A Postgres and a Redis of our own on this core, empty, as they come. Raises Missing."""
    if why_not():
        raise Missing(f"--services starts a Postgres: {why_not()}.")
    program = shutil.which("redis-server")
    if program is None:
        raise Missing("--services starts a Redis, and there is no redis-server here.")
    port = free_port()
    words = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    with contextlib.ExitStack() as stack:
        with machine.on_core(core):
            postgres = stack.enter_context(cluster(shared_buffers="128MB"))
            redis = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        stack.callback(redis.wait, 10)
        stack.callback(redis.terminate)
        wait_for_port(port)
        postgres.create_database("bench")
        postgres.create_database("bench_alone")
        yield Beside(postgres.url_of("bench"), f"redis://127.0.0.1:{port}/0", postgres.pid, redis.pid)
