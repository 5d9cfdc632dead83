"""What runs beside the requests of one worker: the catalog's refresher, the ledger, and the parts of the gateway.

Started by the server's lifespan, or by the first request where the server has none.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, InterfaceError, close_old_connections, connection

from accounts.principal import Limit, Principal
from providers.actions import check_canary
from providers.clock import Timeouts
from providers.egress import Egress
from providers.tasks import refresh_due
from providers.transport import PooledTransport
from proxy import ledger, snapshot
from proxy.catalog import Catalog, Current
from proxy.errors import Unavailable
from proxy.gateway import Gateway
from proxy.http import Site
from proxy.journal import Journal
from proxy.ledger import Ledger
from proxy.refusals import Refusals
from proxy.stores.health import Health
from proxy.stores.memory import MemoryLimits

log = logging.getLogger(__name__)

T = TypeVar("T")

LISTS_EVERY_SECONDS = 5.0  # how soon a new upstream is asked for its models; each is asked again hourly
UNKNOWN_SECONDS = 2.0
MOST_UNKNOWN = 10_000


class Runtime:
    def __init__(self) -> None:
        env = settings.ENV
        self.root = settings.DATA_DIR / "journal"
        self.current = Current()
        self.limits = MemoryLimits()
        self.refusals = Refusals()
        self.ready = False
        self.unready: set[str] = set()  # why no new requests should come, although it is ready: the server fills it
        self._stopped = False
        self._journal: Journal | None = None
        self._ledger: Ledger | None = None
        self._refresher: snapshot.Refresher | None = None
        self._lists: Sweep | None = None
        self._starting = asyncio.Lock()
        self._unknown: dict[bytes, float] = {}
        self._lock: int | None = None
        timeouts = timeouts_of(env)
        self.transport = PooledTransport(Egress(tuple(env.egress_allow)), timeouts)
        self.gateway = Gateway(
            current=self.current,
            load=self._load_key,
            limits=self.limits,
            health=Health(),
            journal=self.journal,
            transport=self.transport,
            site=Site(
                allowed_hosts=tuple(host.lower() for host in env.allowed_hosts),
                cors_allow_origins=tuple(env.cors_allow_origins),
                trusted_proxies=tuple(env.trusted_proxies),
                body_limit_bytes=env.body_limit_bytes,
            ),
            timeouts=timeouts,
            refusals=self.refusals,
        )

    def journal(self) -> Journal:
        assert self._journal is not None, "a request came before the start"
        return self._journal

    async def start(self) -> None:
        """Adopt, count, load, and only then be ready. A second call waits for the first.

        Raises ImproperlyConfigured or DatabaseError, and then holds nothing: it can be tried again."""
        if self.ready:
            return
        async with self._starting:
            if self.ready or self._stopped:
                return
            self._loop = asyncio.get_running_loop()
            self._lock = own_data_dir()
            try:
                self._journal = open_journal(self.root)
                await sync_to_async(self._prepare, thread_sensitive=False)()
            except BaseException:
                self._let_go()
                raise
            self._ledger = Ledger(self._journal, self.root, self.refusals)
            self._refresher = snapshot.Refresher(self.current, self._install)
            self._lists = Sweep("sluice-models", LISTS_EVERY_SECONDS, refresh_due)
            for thread in (self._refresher, self._ledger, self._lists):
                thread.start()
            self.ready = True

    async def stop(self) -> None:
        """Ship what is left. What is still open stays in the journal, for the next start to adopt."""
        if not self.ready:
            return
        self.ready, self._stopped = False, True
        assert self._refresher is not None
        assert self._ledger is not None
        assert self._lists is not None
        self._lists.end()
        await sync_to_async(self._refresher.stop, thread_sensitive=False)()
        try:
            await sync_to_async(self._ledger.stop, thread_sensitive=False)()
        except (DatabaseError, InterfaceError):
            log.warning("The database is away: the usage of this process stays in its journal, for the next start to store")
        await self.transport.aclose()
        self._let_go()

    def _let_go(self) -> None:
        if self._journal is not None:
            self._journal.close(remove_folder=self._journal.is_shipped())
            self._journal = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _prepare(self) -> None:
        check_canary()
        adopted = ledger.adopt_all(self.root)
        if adopted:
            log.info("Adopted %s usage rows of earlier workers", adopted)
        catalog = snapshot.load()
        budgets = self.limits.untracked(catalog.money_limits())
        spent = ledger.spent_in(budgets, time.time())
        self.limits.track(budgets)
        self.limits.add_spent(spent)
        self.current.catalog = catalog
        close_old_connections()

    def _install(self, catalog: Catalog) -> None:
        """In the refresher's thread: budgets that are new are counted exactly before they come into force.

        The loop begins to count them at one point of the journal; all that was settled before it is shipped, and then
        read from the totals."""
        self._count(catalog.money_limits())
        self._loop.call_soon_threadsafe(self.limits.forget_past_windows, time.time())
        self._loop.call_soon_threadsafe(setattr, self.current, "catalog", catalog)

    def _count(self, limits: Iterable[Limit]) -> None:
        """Begin to count the budgets among these that are not counted yet. Not on the loop. Raises DatabaseError."""
        assert self._ledger is not None
        with self._ledger.shipping:  # or what is settled after the position would be counted twice
            budgets = self.limits.untracked(limits)
            if not budgets:
                return
            try:
                position = self._on_loop(self._begin_tracking, budgets)
                self._ledger.ship(until=position)
                spent = ledger.spent_in(budgets, time.time())
            except BaseException:
                self._on_loop(self.limits.untrack, budgets)
                raise
            self._on_loop(self.limits.add_spent, spent)

    def _on_loop(self, work: Callable[..., T], *given: Any) -> T:
        """Do this on the loop, as one step between its others, and wait for it. Not to be called from there."""

        async def do() -> T:
            return work(*given)

        return asyncio.run_coroutine_threadsafe(do(), self._loop).result(timeout=30)

    def _load_and_count(self, digests: Sequence[bytes]) -> Principal | None:
        try:
            principal = snapshot.load_key(digests)
            if principal is not None:
                self._count(limit for limit in principal.limits if limit.metric == "money")
            return principal
        finally:
            close_old_connections()

    def _begin_tracking(self, budgets: set[tuple[str, str, str]]) -> tuple[int, int]:
        self.limits.track(budgets)
        return self.journal().position()

    async def _load_key(self, digests: Sequence[bytes]) -> Principal | None:
        now = time.monotonic()
        if digests and self._unknown.get(digests[0], 0.0) > now:
            return None
        try:
            principal = await sync_to_async(self._load_and_count, thread_sensitive=False)(digests)
        except (DatabaseError, InterfaceError):
            log.warning("A key could not be looked up: the database is away")
            raise Unavailable("The gateway cannot check this key just now.", code="database_unavailable", retry_after_seconds=2) from None
        if principal is None:
            if len(self._unknown) >= MOST_UNKNOWN:
                self._unknown = {digest: until for digest, until in self._unknown.items() if until > now}
                if len(self._unknown) >= MOST_UNKNOWN:
                    self._unknown.clear()
            self._unknown.update(dict.fromkeys(digests, now + UNKNOWN_SECONDS))
        return principal


class Sweep(threading.Thread):
    """Work that is done again and again beside the requests, as a scheduler would."""

    def __init__(self, name: str, every_seconds: float, work: Callable[[], object]) -> None:
        super().__init__(name=name, daemon=True)
        self._every_seconds, self._work = every_seconds, work
        self._ending = threading.Event()

    def run(self) -> None:
        while not self._ending.wait(self._every_seconds):
            try:
                self._work()
            except Exception:
                # One bad sweep must not end all later ones.
                log.exception("%s: this sweep failed, the next one follows", self.name)
                connection.close()
        connection.close()

    def end(self) -> None:
        """No further sweep. One that waits for an upstream ends with the process."""
        self._ending.set()


def open_journal(root: Path) -> Journal:
    env = settings.ENV
    return Journal(root, segment_bytes=env.journal_segment_bytes, max_bytes=env.journal_max_bytes, fsync=env.journal_fsync)


def timeouts_of(env: object) -> Timeouts:
    """Raises ImproperlyConfigured when the ladder is out of order."""
    names = Timeouts.__dataclass_fields__
    try:
        return Timeouts(**{name: getattr(env, name) for name in names})
    except ValueError as problem:
        raise ImproperlyConfigured(f"Timeouts: {problem}") from None


def own_data_dir() -> int | None:
    """Without Redis one process alone may serve. The descriptor that holds the lock; raises ImproperlyConfigured."""
    if settings.ENV.redis_url is not None:
        return None
    descriptor = os.open(settings.DATA_DIR / "serve.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ImproperlyConfigured(
            f"Another process already serves from {settings.DATA_DIR}. Limits live in its memory: stop it first."
        ) from None
    return descriptor
