"""O02: kill -9 at each step of a renewal. A committed token is never lost; what the vendor gave to a dead process is given up openly.

The points are between the steps of `tokens.renew`. Each process that dies is forked for it from one that has loaded Django and never opened
a connection, so that it is a process of its own, on SQLite or PostgreSQL, without the second that a start takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from itertools import product
from pathlib import Path
from typing import Any

from tests.conftest import postgres_database
from tests.loops.load import say
from tests.loops.oauth_race import House
from tests.upstreams.oauth_server import OAuthUpstream

# Where it dies, and whether the vendor has then replaced the token.
POINTS = {
    "before the mark": False,
    "after the mark": False,
    "before the call": False,
    "after the answer": True,
    "before the commit": True,
    "after the commit": False,  # the new one is kept: it is as good as the one before
}


class Workers:
    """Forks a process for each order. Close it."""

    def __init__(self, house: House, folder: Path) -> None:
        self._log = folder / "workers.log"
        with self._log.open("wb") as log:
            self._forge = house.worker("tests.loops.oauth_kill9", "--forge", stderr=log.fileno())

    def run(self, credentials: list[int], die: str = "") -> tuple[int, list[dict[str, Any]], str]:
        """How it ended (minus the signal, where it was one), what it said of each account, and what it wrote into its log."""
        assert self._forge.stdin is not None
        assert self._forge.stdout is not None
        start = self._log.stat().st_size
        self._forge.stdin.write(json.dumps([credentials, die]) + "\n")
        self._forge.stdin.flush()
        said: list[dict[str, Any]] = []
        for line in self._forge.stdout:
            said.append(json.loads(line))
            if "ended" in said[-1]:
                return said.pop()["ended"], said, self._log.read_bytes()[start:].decode()
        raise AssertionError(f"the forge ended: {self._log.read_text()}")

    def close(self) -> None:
        self._forge.kill()
        self._forge.communicate()


def run(
    rounds: int = 1, *, folder: Path | None = None, progress: Callable[[str], None] | None = None, **settings: str
) -> list[dict[str, dict[str, Any]]]:
    """For each round and point, what was found after a restart: `generation`, `state`, `error`, whether the vendor takes what is kept, and
    whether an operator was told."""
    made = folder or Path(tempfile.mkdtemp(prefix="sluice-kill9-"))
    try:
        with OAuthUpstream() as vendor, closing(House(made, **settings)) as house, closing(Workers(house, made)) as workers:
            return [_round(vendor, house, workers, progress) for _ in range(rounds)]
    finally:
        if folder is None:
            shutil.rmtree(made, ignore_errors=True)


def _round(vendor: OAuthUpstream, house: House, workers: Workers, progress: Callable[[str], None] | None) -> dict[str, dict[str, Any]]:
    accounts = {point: house.add(vendor) for point in POINTS}
    for point, credential in accounts.items():
        ended, said, log = workers.run([credential], point)
        assert ended == -signal.SIGKILL, f"{point}: it did not die: {said} {log}"
    say(progress, f"killed {len(accounts)}")
    ended, said, log = workers.run(list(accounts.values()))
    assert ended == 0, log
    after = {line.pop("credential"): line for line in said}
    return {
        point: {
            **after[credential],
            "takes_what_is_kept": vendor.is_current(after[credential].pop("refresh")),
            "told": f"/credential/{credential}/sign-in" in log,
        }
        for point, credential in accounts.items()
    }


def problems(rounds: list[dict[str, dict[str, Any]]]) -> list[str]:
    """What is not as it must be, in words."""
    wrong = []
    for found, (point, replaced) in product(rounds, POINTS.items()):
        one = found[point]
        if replaced:  # nobody has the token that the vendor gave: a person has to sign in, and is told so
            good = (one["state"], one["error"], one["told"]) == ("needs_reauth", "lost_reply", True)
        else:
            good = (one["state"], one["error"], one["takes_what_is_kept"]) == ("active", "", True)
        if not good:
            wrong.append(f"{point}: {one}")
    return wrong


def forge() -> None:
    """Load Django once, and fork a worker for each line that comes."""
    import django

    django.setup()
    from providers import tokens  # noqa: F401  the workers want it

    for line in sys.stdin:
        worker = multiprocessing.get_context("fork").Process(target=work, args=json.loads(line))
        worker.start()
        worker.join()
        print(json.dumps({"ended": worker.exitcode}), flush=True)


def work(credentials: list[int], die: str) -> None:
    """Renew each, or die on the way; then say what is kept."""
    from providers import asking, tokens
    from providers.models import OAuthToken
    from providers.oauth import OAuthFailed

    def dead(*_: object, **__: object) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    looks: list[int] = []
    ask, store, no_use = asking.ask, tokens._store, tokens._no_use

    def look(*given: Any, **more: Any) -> Any:
        looks.append(1)
        if len(looks) == {"before the mark": 1, "after the mark": 2}[die]:
            dead()
        return no_use(*given, **more)

    if die in ("before the mark", "after the mark"):
        tokens._no_use = look
    elif die == "before the call":
        asking.ask = dead
    elif die == "after the answer":
        asking.ask = lambda *given: dead(ask(*given))
    elif die == "before the commit":
        # On SQLite inside the short transaction that stores it, on Postgres inside the one that holds the lock.
        from django.db import transaction

        def stored(*given: Any) -> bool:
            with transaction.atomic():
                store(*given)
                dead()
            return True

        tokens._store = stored
    for credential_id in credentials:
        generation = OAuthToken.objects.values_list("generation", flat=True).get(pk=credential_id)
        with suppress(OAuthFailed):
            tokens.renew(credential_id, generation)
        if die == "after the commit":
            dead()
        row = OAuthToken.objects.select_related("credential").get(pk=credential_id)
        kept = {"credential": row.pk, "generation": row.generation, "state": row.credential.state, "error": row.last_error}
        print(json.dumps(kept | {"refresh": tokens._opened(row, "refresh", tokens._origin(row, "refresh")).reveal()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--postgres", action="store_true", help="on the PostgreSQL of this machine instead of SQLite")
    parser.add_argument("--forge", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.forge:
        forge()
        return
    with ExitStack() as stack:
        settings = {}
        if options.postgres:
            url = stack.enter_context(postgres_database())
            settings = {"DATABASE_URL": url, "SECRET_KEY": secrets.token_hex(32), "KEYRING": secrets.token_hex(32)}
        found = run(options.rounds, progress=print, **settings)
    wrong = problems(found)
    print(wrong or f"{len(found)} rounds of {len(POINTS)} kills: nothing was lost")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
