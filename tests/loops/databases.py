"""A02, A03 and F13 on Postgres: kill the server, restart the database, kill one of its processes, under load.

    python -m tests.loops.databases --kills 200 --restarts 50

The database is a cluster of its own in a temporary folder, so that it can be restarted at will. It runs as the user `postgres`
where we are root, since Postgres refuses root.
"""

from __future__ import annotations

import argparse
import os
import pwd
import random
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psycopg

from tests.loops import kill9
from tests.loops.load import SLOW, Load, say
from tests.serving import Sluice, free_port, running
from tests.upstreams.openai import OpenAIUpstream

SETTINGS = {"SECRET_KEY": "s" * 50, "KEYRING": "k" * 50}
WELL = {"lost": 0, "doubled": 0, "wrong": 0, "totals": "equal"}
RECOVERY_SECONDS = 5.0


def why_not() -> str:
    """Why no cluster can be made here; empty when one can."""
    if _binaries() is None:
        return "no Postgres server is installed (initdb and pg_ctl are not there)"
    if os.geteuid() == 0 and not _has_postgres_user():
        return "Postgres refuses to run as root, and there is no user postgres"
    return ""


def _binaries() -> Path | None:
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)


def _has_postgres_user() -> bool:
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        return False
    return shutil.which("su") is not None


class Cluster:
    """A Postgres of our own on a free port. Made by `cluster()`."""

    def __init__(self, folder: Path) -> None:
        binaries = _binaries()
        assert binaries is not None, why_not()
        self._binaries, self._folder, self.port = binaries, folder, free_port()
        self.url = self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgres://postgres@127.0.0.1:{self.port}/{database}"

    @property
    def pid(self) -> int:
        """Of the process whose children all others are."""
        return int((self._folder / "data" / "postmaster.pid").read_text().split()[0])

    def make(self, shared_buffers: str) -> None:
        if os.geteuid() == 0:
            shutil.chown(self._folder, "postgres")
        data = self._folder / "data"
        self._run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-instructions", "--no-sync")
        with (data / "postgresql.conf").open("a") as settings:
            settings.write(f"port = {self.port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{self._folder}'\n")
            settings.write(f"max_connections = 60\nshared_buffers = {shared_buffers}\n")
        self.start()

    def create_database(self, name: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type]

    def start(self) -> None:
        self._run("pg_ctl", "-D", self._folder / "data", "-l", self._folder / "log", "-w", "-t", 30, "start")

    def stop(self, how: str) -> None:
        """`fast` ends connections in order; `immediate` is a crash: what was committed comes back from the log."""
        self._run("pg_ctl", "-D", self._folder / "data", "-w", "-t", 30, "-m", how, "stop")

    def restart(self, how: str, *, away_seconds: float = 0.0) -> None:
        self.stop(how)
        time.sleep(away_seconds)
        self.start()

    def kill_backend(self) -> bool:
        """`kill -9` of one process that serves Sluice: Postgres then ends all others and recovers. Whether there was one."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            found = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'sluice%' ORDER BY random()"
            ).fetchone()
        if found is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(found[0], 9)
        return True

    def answers(self) -> bool:
        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def wait(self) -> None:
        while not self.answers():
            time.sleep(0.02)

    def log(self) -> str:
        return (self._folder / "log").read_text()

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._binaries / program), *(str(one) for one in arguments)]
        if os.geteuid() == 0:
            command = ["su", "postgres", "-s", "/bin/sh", "-c", shlex.join(command)]
        # Its output goes nowhere: the server that pg_ctl leaves behind would hold a pipe open.
        done = subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        if done.returncode:
            log = self._folder / "log"
            raise AssertionError(f"{program} ended with {done.returncode}. {log.read_text()[-2000:] if log.exists() else ''}")


@contextmanager
def cluster(shared_buffers: str = "32MB") -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="sluice-pg-", dir="/tmp"))
    made = Cluster(folder)
    try:
        made.make(shared_buffers)
        yield made
    finally:
        with suppress(AssertionError):
            made.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)


def kill_the_server(database: Cluster, times: int, *, seed: int = 1, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """A02 over Postgres."""
    return kill9.run(times, seed=seed, progress=progress, DATABASE_URL=database.url, **SETTINGS)


def restart_the_database(database: Cluster, times: int, *, seed: int = 1, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """A03, with a `kill -9` of a backend now and then (F13): restarts fast and immediate, under load, in turns.

    The counts as of A02; `refused`: calls with a known key that were not answered, which must be 0; `slowest_recovery`: seconds from
    the database's first answer until usage is stored and an unknown key works again."""
    chance = random.Random(seed)
    with OpenAIUpstream() as upstream, running(DATABASE_URL=database.url, **SETTINGS) as sluice:
        sluice.set_price("sim/*", input=3, output=15)
        sluice.add_openai(upstream, prefix="sim")
        key = sluice.issue_key()
        sluice.wait_for("sim")
        upstream.reset()
        upstream.script(*[SLOW] * 500_000)
        worker, slowest = sluice.pid, 0.0
        with Load(sluice.url, key, "sim/gpt-4o-mini") as load:
            time.sleep(1)  # its key is known from now on
            for number in range(times):
                fresh = sluice.issue_key()
                time.sleep(chance.uniform(0.1, 0.6))
                how = ("fast", "immediate", "backend")[number % 3]
                if how == "backend":
                    database.kill_backend()
                else:
                    # Now and then for longer than a pool likes to wait.
                    database.restart(how, away_seconds=chance.uniform(6, 12) if number % 9 == 4 else chance.uniform(0, 1.5))
                database.wait()
                recovery = _recovery(database, sluice, fresh)
                slowest = max(slowest, recovery)
                say(progress, f"{how} {number + 1} of {times}, back after {recovery:.1f} s, {load.begun} requests begun")
            time.sleep(0.5)
        assert sluice.pid == worker
        alive = sluice.is_ready()
        time.sleep(1.5)
        counts = kill9.account(sluice, upstream, load)
    refused = {status: count for status, count in load.statuses.items() if status != 200}
    return counts | {"restarts": times, "slowest_recovery": round(slowest, 2), "refused": refused, "the_same_worker": alive}


TAMPER = """
from django.db.models import F
from proxy.models import KeyDay, KeyTotal, ModelTotal, UsageTotal
for model in (KeyDay, KeyTotal, ModelTotal, UsageTotal):
    one = model.objects.order_by("?").first()
    model.objects.filter(pk=one.pk).update(cost=F("cost") + 1)
"""


def recompute_under_load(database: Cluster, times: int) -> dict[str, Any]:
    """A11: spoil a line of each table and have it mended, while the ledger writes to the same lines. The counts as of A02;
    `mended` must be four a time, and `left`, what was different after that, 0."""
    mended = left = 0
    with OpenAIUpstream() as upstream, running(DATABASE_URL=database.url, **SETTINGS) as sluice:
        sluice.set_price("sim/*", input=3, output=15)
        sluice.add_openai(upstream, prefix="sim")
        key = sluice.issue_key()
        sluice.wait_for("sim")
        upstream.reset()
        upstream.script(*[SLOW] * 500_000)
        with Load(sluice.url, key, "sim/gpt-4o-mini") as load:
            time.sleep(1.5)
            for _ in range(times):
                sluice.python(TAMPER)
                mended += sluice.manage("recompute_totals").count("the rows say")
                left += bool(kill9.different_lines(sluice))
        time.sleep(1)
        return kill9.account(sluice, upstream, load) | {"mended": mended, "left": left}


def _recovery(database: Cluster, sluice: Sluice, fresh: str) -> float:
    """Until a key that the server never saw is served, and usage of now is in the database."""
    began, moment = time.monotonic(), time.time()
    body = {"model": "sim/gpt-4o-mini", "messages": [{"role": "user", "content": "count for me"}]}
    served = stored = False
    while not (served and stored):
        if time.monotonic() - began > 60:
            raise AssertionError(f"No recovery within a minute. served={served} stored={stored}\n{sluice.log()[-6000:]}")
        if not served:
            answer = httpx.post(f"{sluice.url}/v1/chat/completions", headers={"authorization": f"Bearer {fresh}"}, json=body, timeout=20)
            served = answer.status_code == 200
        if not stored:
            with suppress(psycopg.OperationalError), psycopg.connect(database.url, connect_timeout=2) as connection:
                sql = "SELECT EXISTS (SELECT 1 FROM proxy_usageevent WHERE at >= to_timestamp(%s))"
                stored = bool(connection.execute(sql, [moment]).fetchone()[0])  # type: ignore[index]
        time.sleep(0.05)
    return time.monotonic() - began


def is_well(counts: dict[str, Any]) -> bool:
    well = all(counts[name] == value for name, value in WELL.items())
    return well and not counts.get("refused") and counts.get("slowest_recovery", 0) <= RECOVERY_SECONDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if why_not():
        raise SystemExit(why_not())
    well = True
    for loop, times in ((kill_the_server, options.kills), (restart_the_database, options.restarts)):
        if times:
            with cluster() as database:
                counts = loop(database, times, seed=options.seed, progress=print)
            print(loop.__name__, counts)
            well = well and is_well(counts)
    if not well:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
