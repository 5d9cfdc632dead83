"""O01: many processes see a token end at the same moment, again and again, before a server that takes each refresh token once.

Every process is a Django of its own on one database. `--naive` leaves the locks out, and shows that this loop can fail. O03 is that with
`--lenient`, before a server which refuses a used token and leaves it at that: all but one lose each race, and none may spoil what was won.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests import migrated
from tests.conftest import postgres_database
from tests.loops.load import say
from tests.serving import REPOSITORY, Commands
from tests.upstreams.oauth_server import OAuthUpstream
from tests.upstreams.passport import file_of, installed_in


class House:
    """A database whose accounts sign in, and processes that work on it. Close it."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.env = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ},
            "DJANGO_SETTINGS_MODULE": "project.settings",
            "DATA_DIR": str(folder / "data"),
            "EGRESS_ALLOW": "127.0.0.0/8",
            "LOG_LEVEL": "ERROR",
            "PYTHONPATH": installed_in(folder / "site"),
            **settings,
        }
        self._commands = Commands(self.env)
        if "DATABASE_URL" in settings:
            self._commands.run(["migrate", "--no-input", "-v", "0"], None)
        else:
            (folder / "data").mkdir(mode=0o700)
            migrated.copy_sqlite(folder / "data")

    def add(self, vendor: OAuthUpstream, until: float | None = None) -> int:
        """An account that is signed in. `until`: when its token ends, in seconds since the epoch; None = nobody knows."""
        sets = [word for name, value in vendor.settings().items() for word in ("--set", f"{name}={value}")]
        added = ["add_credential", "passport", "--label", "race", "--base-url", vendor.base_url, *sets, "--secret-stdin"]
        return int(self._commands.run(added, file_of(vendor.log_in(), until)))

    def worker(self, module: str, *arguments: str, stderr: int | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def close(self) -> None:
        self._commands.close()


def run(
    processes: int = 8,
    expiries: int = 50,
    *,
    naive: bool = False,
    lenient: bool = False,
    folder: Path | None = None,
    progress: Callable[[str], None] | None = None,
    **settings: str,
) -> dict[str, Any]:
    """The counts: `refreshes` must be `expiries`, `reused` and `failed` 0, and every process must end with the same token.

    `spoilt`: after how many races the token that is kept was not the vendor's last, or the account was out of use."""
    made = folder or Path(tempfile.mkdtemp(prefix="sluice-race-"))
    try:
        with OAuthUpstream(strict=not lenient) as vendor, closing(House(made, **settings)) as house:
            arguments = ["--forge", str(house.add(vendor)), "--processes", str(processes), *(["--naive"] if naive else [])]
            forge = house.worker("tests.loops.oauth_race", *arguments)
            try:
                failed = differing = spoilt = 0
                for number in range(expiries):
                    assert forge.stdin is not None
                    assert forge.stdout is not None
                    forge.stdin.write("race\n")
                    forge.stdin.flush()
                    line = forge.stdout.readline()
                    assert line, "a worker died"
                    answers, kept = json.loads(line)
                    failed += answers.count(None)
                    differing += len(set(answers)) > 1
                    spoilt += not vendor.is_current(kept.pop("refresh")) or kept != {"state": "active", "error": ""}
                    say(progress, f"{number + 1} of {expiries}: {vendor.counts.refreshes} refreshes, {vendor.counts.reused} reused")
            finally:
                forge.communicate(timeout=30)  # it ends with its orders, and its workers with it
            return {
                "processes": processes,
                "expiries": expiries,
                "refreshes": vendor.counts.refreshes,
                "reused": vendor.counts.reused,
                "failed": failed,
                "differing": differing,
                "spoilt": spoilt,
            }
    finally:
        if folder is None:
            shutil.rmtree(made, ignore_errors=True)


def forge(credential_id: int, processes: int, *, naive: bool) -> None:
    """Load Django once and fork the processes from it; then let them race at each line that comes, and say what came of it."""
    import django

    django.setup()
    from providers import tokens

    if naive:
        tokens._file_lock = tokens._row_lock = lambda *_, **__: nullcontext()  # type: ignore[assignment]
        tokens._no_use = lambda *_, **__: None  # type: ignore[assignment]
    context = multiprocessing.get_context("fork")
    workers = []
    for _ in range(processes):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(credential_id, theirs), daemon=True).start()
        theirs.close()  # so that the end of a worker is seen
        workers.append(ours)
    for _ in sys.stdin:
        for order in ("look", "go"):  # all have seen the same token before the first of them renews it
            for worker in workers:
                worker.send(order)
            answers = [worker.recv() for worker in workers]
        workers[0].send("kept")
        print(json.dumps([answers, workers[0].recv()]), flush=True)


def work(credential_id: int, orders: Connection) -> None:
    """One process: renews when it is told to, and says which generation it has then; None where it has none."""
    from django.db import connection

    from providers import tokens
    from providers.models import OAuthToken
    from providers.oauth import OAuthFailed

    seen = 0
    while True:
        match orders.recv():
            case "look":
                seen = OAuthToken.objects.values_list("generation", flat=True).get(pk=credential_id)
                orders.send(seen)
            case "go":
                try:
                    orders.send(tokens.renew(credential_id, seen).lease.generation)
                except OAuthFailed:
                    orders.send(None)
                connection.close()
            case "kept":
                row = OAuthToken.objects.select_related("credential").get(pk=credential_id)
                refresh = tokens._opened(row, "refresh", tokens._origin(row, "refresh")).reveal()
                orders.send({"refresh": refresh, "state": row.credential.state, "error": row.last_error})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--expiries", type=int, default=50)
    parser.add_argument("--postgres", action="store_true", help="on the PostgreSQL of this machine instead of SQLite")
    parser.add_argument("--naive", action="store_true", help="without any lock: must fail")
    parser.add_argument("--lenient", action="store_true", help="before a server that ends no sign-in when a token is shown twice")
    parser.add_argument("--forge", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.forge is not None:
        forge(options.forge, options.processes, naive=options.naive)
        return
    with ExitStack() as stack:
        settings = {}
        if options.postgres:
            url = stack.enter_context(postgres_database())
            settings = {"DATABASE_URL": url, "SECRET_KEY": secrets.token_hex(32), "KEYRING": secrets.token_hex(32)}
        counts = run(options.processes, options.expiries, naive=options.naive, lenient=options.lenient, progress=print, **settings)
    print(counts)
    if options.naive and options.lenient:  # the losers were refused; that is all that may come of it
        good = not counts["spoilt"] and counts["refreshes"] == counts["expiries"]
    else:
        good = counts["refreshes"] == counts["expiries"] and not any(counts[name] for name in ("reused", "failed", "differing", "spoilt"))
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
