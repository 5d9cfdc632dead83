"""Takes part in the rounds in which all workers bring Redis's counters of money up to the database's.

The steps stand in proxy/stores/redis.py. This is the thread that waits for the database in them; while a round goes on it holds
the ledger's `shipping`, so that nothing reaches the totals that is not to be in them yet.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from django.db import close_old_connections, connection

from proxy import ledger
from proxy.ledger import Ledger
from proxy.patience import patient
from proxy.stores.limits import Budget
from proxy.stores.link import Away
from proxy.stores.redis import MOST_LOAD_SECONDS, MOST_ROUND_SECONDS, RedisLimits

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_EVERY_SECONDS = 1.0
LOOK_IN_A_ROUND_SECONDS = 0.02


class Rounds(threading.Thread):
    """`do` runs a coroutine on the worker's loop and waits for it; `position` is the journal's, asked there."""

    def __init__(
        self,
        limits: RedisLimits,
        books: Ledger,
        do: Callable[[Coroutine[Any, Any, Any]], Any],
        position: Callable[[], tuple[int, int]],
        budgets: Callable[[], set[Budget]],
    ) -> None:
        super().__init__(name="sluice-rounds", daemon=True)
        self._limits, self._books, self._do, self._position, self._budgets = limits, books, do, position, budgets
        self._stir = threading.Event()
        self._ending = False
        self._turn_over = threading.Condition()
        limits.stir = self._stir.set

    def run(self) -> None:
        while not self._ending:
            self._stir.wait(LOOK_EVERY_SECONDS)
            self._stir.clear()
            if self._ending:
                break
            try:
                while self._turn():
                    pass
            except Away:
                pass  # the next heartbeat that is answered stirs again
            except Exception:
                log.exception("A round with the other workers failed; it is tried again")
                connection.close()
                time.sleep(LOOK_EVERY_SECONDS)
            with self._turn_over:
                self._turn_over.notify_all()
        connection.close()

    def look_now(self) -> None:
        self._stir.set()

    def stop(self) -> None:
        self._ending = True
        self._stir.set()
        if self.is_alive():
            self.join(timeout=MOST_ROUND_SECONDS)

    def wait_for(self, budgets: Iterable[Budget], seconds: float) -> bool:
        """Until these budgets are loaded, or so long. Not on the loop, and not in this thread."""
        wanted = set(budgets)
        deadline = time.monotonic() + seconds
        with self._turn_over:
            while not (self._is_in() and wanted <= self._limits.tracked()):
                self._stir.set()
                left = deadline - time.monotonic()
                if left <= 0 or self._ending:
                    return False
                self._turn_over.wait(min(left, 0.1))
        return True

    def _is_in(self) -> bool:
        limits = self._limits
        return bool(limits.epoch) and limits.epoch == limits.last.epoch and not limits.last.is_open

    def _turn(self) -> bool:
        """One step towards being up to date. Whether there may be a further one. Raises Away."""
        limits = self._limits
        last = limits.last
        if not limits.link.run_id:
            return False
        if not last.epoch or last.run_id != limits.link.run_id or self._has_missed_one():
            self._do(limits.begin(limits.tracked() | self._budgets(), anew=True))
            return bool(limits.last.epoch)
        if last.is_open and (limits.epoch, limits.round) == (last.epoch, last.number):
            # It was left in the middle, and the ledger has gone on since: what it shipped might count twice.
            self._do(limits.begin(limits.tracked() | self._budgets(), anew=True))
            return True
        if last.is_open:
            self._take_part(last.number, last.epoch)
            return True
        if limits.epoch != last.epoch:  # new among workers that are up to date
            self._do(limits.enter(last.number, last.epoch, self._position, self._budgets()))
            self._do(limits.beat())
            return True
        wanted = (self._budgets() - limits.tracked()) | limits.unloaded
        if wanted:
            self._do(limits.begin(wanted, anew=False))
            return True
        return False

    def _has_missed_one(self) -> bool:
        """Others have gone on without us: what we settled meanwhile is in nobody's account."""
        limits, last = self._limits, self._limits.last
        if last.is_open:
            return False
        if limits.epoch == last.epoch:
            return last.number != limits.round
        return not limits.is_new

    def _take_part(self, number: int, epoch: bytes) -> None:
        limits = self._limits
        with self._books.shipping:
            entered = self._do(limits.enter(number, epoch, self._position))
            if entered is not None:
                position, budgets = entered
                self._books.ship(until=position)
                self._see_it_through(number, epoch, budgets)
        self._do(limits.beat())
        close_old_connections()

    def _see_it_through(self, number: int, epoch: bytes, budgets: list[Budget]) -> None:
        limits = self._limits
        deadline = time.monotonic() + MOST_ROUND_SECONDS + 2 * MOST_LOAD_SECONDS
        is_first = True
        while time.monotonic() < deadline and not self._ending:
            goes_on, loads = self._do(limits.acknowledge(number, epoch, shipped=True))
            if is_first and not goes_on:
                limits.round = 0  # too late: what was shipped only now was not in the totals that they loaded
            is_first = False
            if loads:
                with patient():
                    spent = ledger.spent_in(budgets, time.time())
                self._do(limits.loaded(number, epoch, spent))
            elif not goes_on:
                return
            else:
                time.sleep(LOOK_IN_A_ROUND_SECONDS)
