"""A13: kill a Celery worker in the middle of a roll-up, with a visibility timeout that is shorter than the task, so that it is given
to others meanwhile and again afterwards. Each row is there once, and the sums are those worked out anew.

Two tasks touch rows and sums, in turns: one brings in the journal of a dead worker, the other mends sums that were spoilt. The schedule's
own tasks are acknowledged before they begin and never come twice; here all are acknowledged late, which is the worse case.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import redis

from proxy.call import milliseconds_of, new_request_id
from proxy.journal import Journal, Settled
from tests.conftest import postgres_database
from tests.loops.databases import TAMPER
from tests.loops.kill9 import different_lines, proved
from tests.loops.load import say
from tests.redises import server
from tests.serving import REPOSITORY, Sluice, eventually

SECRETS = {"SECRET_KEY": "s" * 50, "KEYRING": "k" * 50}
ROWS, WORKERS = 120, 2

# Argument: a file of marks. Between one statement and the next it waits, so that there is a middle in which to die.
WORKER = """
import os, sys, time
import django
django.setup()
from project.celery import app
from django.core.management import call_command
from proxy import totals

marks = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
mark = lambda what: os.write(marks, f"{what} {os.getpid()}\\n".encode())

def slowly(do):
    def done_slowly(*given):
        mark("middle")
        time.sleep(0.2)
        done = do(*given)
        mark("middle")
        time.sleep(0.2)
        return done
    return done_slowly

totals.add, totals._mend = slowly(totals.add), slowly(totals._mend)

@app.task(name="bring in", acks_late=True)
def bring_in():
    mark("begun")
    call_command("ship_usage", verbosity=0)
    mark("done")

@app.task(name="mend", acks_late=True)
def mend():
    mark("begun")
    call_command("recompute_totals", verbosity=0)
    mark("done")

app.loader.import_default_modules()
for task in app.tasks.values():
    task.acks_late = True
app.conf.broker_transport_options = {"visibility_timeout": 1, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
app.worker_main(["worker", "--pool", "solo", "--loglevel", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat"])
"""
SEND = """
from project.celery import app
app.send_task({task!r})
app.send_task("project.tasks.keep_log")
"""


class Workers:
    """Celery workers of one deployment, and what they have marked."""

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        self._env, self._marks, self._log = env, folder / "marks", folder / "workers.log"
        self._marks.touch()
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, "-c", WORKER, str(self._marks)]
            one = subprocess.Popen(command, cwd=REPOSITORY, env=self._env, stdout=log, stderr=subprocess.STDOUT)
        self._running[one.pid] = one

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self._running.pop(pid).wait(10)

    def marks(self) -> list[tuple[str, int]]:
        words = [line.split() for line in self._marks.read_text().splitlines()]
        return [(what, int(pid)) for what, pid in words]

    def log(self) -> str:
        return self._log.read_text()[-4000:]

    def stop(self) -> None:
        for one in self._running.values():
            one.kill()
            one.wait(10)


@contextmanager
def deployment() -> Iterator[tuple[Sluice, Workers, redis.Redis]]:
    """A database, Redis, and workers; nothing serves."""
    with tempfile.TemporaryDirectory(prefix="sluice-celery-") as name, server() as broker, postgres_database() as url:
        folder = Path(name)
        sluice = Sluice(folder / "data", DATABASE_URL=url, REDIS_URL=broker.url, **SECRETS)
        workers = Workers(sluice.env, folder)
        try:
            sluice.migrate()
            for _ in range(WORKERS):
                workers.start()
            yield sluice, workers, broker.client
        except AssertionError as problem:
            raise AssertionError(f"{problem}\n{workers.log()}") from problem
        finally:
            workers.stop()
            sluice.close()


def run(times: int, *, seed: int = 1, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Kill a worker so many times. `lost` and `doubled` must be 0, nothing `different` after any of them, and `deliveries` more
    than kills: each of them is given to somebody once more."""
    chance = random.Random(seed)
    written: set[str] = set()
    with deployment() as (sluice, workers, broker):
        different = []
        for number in range(times):
            before = len(workers.marks())
            task = ("bring in", "mend")[number % 2]
            if task == "mend":
                sluice.python(TAMPER)
            else:
                written |= leave_journal(sluice.data_dir / "journal", chance)
            sluice.python(SEND.format(task=task))
            at = chance.randint(1, 8 if task == "mend" else 2)  # two for each of four spoilt sums, two for all that are added
            workers.kill(
                eventually(lambda before=before, at=at: _middle(workers.marks()[before:], at), "nobody comes to the middle", seconds=60)
            )
            workers.start()
            eventually(lambda before=before: _is_done(workers.marks()[before:], broker), "the task is never done", seconds=60)
            if wrong := different_lines(sluice):
                different.append(f"{task}: {wrong}")
            say(progress, f"killed {number + 1} of {times}")
        begun = sum(what == "begun" for what, _ in workers.marks())
        rows = Counter(row["request_id"] for row in sluice.usage())
        return {
            "kills": times,
            "deliveries": begun,
            "rows": len(rows),
            "lost": len(written - rows.keys()),
            "doubled": sum(count - 1 for count in rows.values()),
            "different": different,
            "totals": proved(sluice),
        }


def leave_journal(root: Path, chance: random.Random) -> set[str]:
    """What a worker leaves that died before it had shipped anything. The ids of its requests."""
    root.mkdir(mode=0o700, exist_ok=True)
    journal = Journal(root)
    ids = [new_request_id() for _ in range(ROWS)]
    for one in ids:
        journal.settled(
            Settled(
                request_id=one,
                at=milliseconds_of(one),
                organization=1,
                user=1,
                key=chance.randint(1, 3),
                model="m",
                served_model=f"p/m{chance.randint(1, 2)}",
                provider="openai",
                endpoint="chat/completions",
                status=200,
                attempts=1,
                fresh_input=chance.randint(1, 99),
                output=chance.randint(1, 99),
                cost=chance.randint(1, 9999),
                usage_source="reported",
            )
        )
    journal.close()
    return set(ids)


def _middle(marks: list[tuple[str, int]], at: int) -> int | None:
    """Who was at so many-th place of the work, of those that have not ended it."""
    middles = [pid for what, pid in marks if what == "middle"]
    return middles[at - 1] if len(middles) >= at else None


def _is_done(marks: list[tuple[str, int]], broker: redis.Redis) -> bool:
    """Somebody has ended it, and no message waits or is in anybody's hands. Between the two there is a moment in which it is neither."""
    if not any(what == "done" for what, _ in marks):
        return False
    with suppress(redis.RedisError):
        return not broker.llen("sluice") and not broker.hlen("unacked")
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    counts = run(options.times, seed=options.seed, progress=print)
    print(counts)
    if (
        counts["lost"]
        or counts["doubled"]
        or counts["different"]
        or counts["totals"] != "equal"
        or counts["deliveries"] < 2 * counts["kills"]
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
