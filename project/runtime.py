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
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, InterfaceError, close_old_connections, connection
from django.utils import timezone

from accounts.principal import Limit, Principal
from project import alarms, exposition
from project.rests import EVERY_SECONDS, NEWS, Rests
from project.rounds import Rounds
from providers import tokens
from providers.actions import check_canary
from providers.clock import Timeouts
from providers.egress import Egress
from providers.failures import CredentialRefused, NotRenewed
from providers.oauth import Access, GrantDead, OAuthFailed, TryAgainLater
from providers.secrets import SealBroken
from providers.sweeps import RENEWALS_AT_ONCE, refresh_due, renew_due
from providers.transport import PooledTransport
from proxy import explain, ledger, months, snapshot
from proxy.catalog import Catalog, Current
from proxy.cutting import cut_refused
from proxy.dash import live
from proxy.errors import Unavailable
from proxy.gateway import Gateway
from proxy.http import Site
from proxy.journal import Journal, Settled
from proxy.leaving import Leaving
from proxy.ledger import Ledger
from proxy.lookups import Lookups
from proxy.patience import be_brief, patient
from proxy.refusals import Refusals
from proxy.stores.health import IGNORED_REST_SECONDS, Health
from proxy.stores.limits import Budget, budget_of
from proxy.stores.link import Away
from proxy.stores.memory import MemoryLimits
from proxy.stores.news import SNAPSHOT, usage_channel_of
from proxy.stores.redis import RedisLimits
from proxy.stores.renewals import SIGNED_OUT, Renewals
from proxy.tasks import Upkeep

log = logging.getLogger(__name__)

T = TypeVar("T")

SHARE_EVERY_SECONDS = 5.0
UPKEEP_EVERY_SECONDS = 60.0
LISTS_EVERY_SECONDS = 5.0  # how soon a new upstream is asked for its models; each is asked again hourly
TOKENS_EVERY_SECONDS = 5.0
CUT_EVERY_SECONDS = 5.0  # with the age of the catalog less than half of the 30 s that are promised
LOOK_UPS_AT_ONCE = 4
AWAY_SECONDS = 1.0  # after a look-up that failed, others do not try: each would wait for seconds
REDIS_SECONDS = 2.0  # a start waits so long for it
JOIN_SECONDS = 20.0  # and so long for the others
NEW_BUDGET_SECONDS = 2.0  # the first call of a new key waits so long until its budget is counted
WAITING_SHARE = 5  # of the calls to one upstream every fifth may be one that waits for a connection
USAGE_CHANNEL = usage_channel_of()


class Runtime:
    def __init__(self) -> None:
        env = settings.ENV
        be_brief()
        self.root = settings.DATA_DIR / "journal"
        self.current = Current()
        self.limits: MemoryLimits | RedisLimits = MemoryLimits() if env.redis_url is None else RedisLimits(env.redis_url, news=self._heard)
        self.refusals = Refusals()
        self.ready = False
        self.unready: set[str] = set()  # why no new requests should come, although it is ready: the server fills it
        self.missing = ""  # what the last start lacked
        self._stopped = False
        self._journal: Journal | None = None
        self._ledger: Ledger | None = None
        self._refresher: snapshot.Refresher | None = None
        self._sweeps: list[Sweep] = []
        # Renewals have threads of their own: a vendor that does not answer must not hold up look-ups of names.
        self._renewing = ThreadPoolExecutor(RENEWALS_AT_ONCE, "sluice-renewals")
        # And look-ups of keys have theirs: strangers can ask for any number, and while the database is away each waits for seconds.
        self._looking_up = ThreadPoolExecutor(LOOK_UPS_AT_ONCE, "sluice-keys")
        self._away_until = 0.0
        self._rounds: Rounds | None = None
        self._asked_for: set[Budget] = set()  # budgets of keys that are newer than the catalog
        self._budgets: tuple[Catalog, set[Budget]] = (self.current.catalog, set())
        self._rests: Rests | None = None
        self._starting = asyncio.Lock()
        self._lookups = Lookups(self._load_key)
        self._lock: int | None = None
        timeouts = timeouts_of(env)
        waiting = env.upstream_requests // WAITING_SHARE
        self.transport = PooledTransport(
            Egress(tuple(env.egress_allow)), timeouts, most_connections=env.upstream_requests - waiting, most_waiting=waiting
        )
        self.gateway = Gateway(
            current=self.current,
            load=self._lookups,
            limits=self.limits,
            health=Health(ejection_seconds=env.ejection_seconds),
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
            renewals=Renewals(partial(self._in_renewing, renew), partial(self._in_renewing, refuse)),
            under_way=set() if env.cut_revoked_calls else None,
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
                await self._prepared(self._journal)
            except BaseException:
                if self._rounds is not None:
                    await sync_to_async(self._rounds.stop, thread_sensitive=False)()
                if isinstance(self.limits, RedisLimits):
                    await self.limits.close()
                self._let_go()
                raise
            assert self._ledger is not None
            self._refresher = snapshot.Refresher(self.current, self._install)
            self._sweeps = [
                Sweep("sluice-alarms", alarms.LOOK_EVERY_SECONDS, self._look),
                Sweep("sluice-rests", EVERY_SECONDS, lambda: cast(Rests, self._rests).turn(self._on_loop)),
            ]
            if self.gateway.under_way is not None:
                self._sweeps.append(Sweep("sluice-cuts", CUT_EVERY_SECONDS, partial(self._cut, self.gateway.under_way)))
            if settings.ENV.redis_url is None:  # else a scheduler does this: see project/celery.py
                self._sweeps.append(Sweep("sluice-models", LISTS_EVERY_SECONDS, refresh_due))
                self._sweeps.append(Sweep("sluice-tokens", TOKENS_EVERY_SECONDS, renew_due))
                self._sweeps.append(Sweep("sluice-upkeep", UPKEEP_EVERY_SECONDS, Upkeep()))
            for thread in (self._refresher, self._ledger, *self._sweeps):
                thread.start()
            if settings.ENV.redis_url is not None:  # there may be several workers, and a scrape reaches one of them
                self._loop.call_later(SHARE_EVERY_SECONDS, self._share)
            self.ready, self.missing = True, ""
            explain.serving.ask = self._explain

    async def _prepared(self, journal: Journal) -> None:
        """All that has to be known before the first request."""
        limits = self.limits
        self._rests = Rests(self.gateway.health, limits.publish if isinstance(limits, RedisLimits) else _to_nobody)
        await sync_to_async(self._rests.turn, thread_sensitive=False)(self._on_loop)
        if isinstance(limits, MemoryLimits):
            await sync_to_async(self._prepare, thread_sensitive=False)(limits)
            self._ledger = Ledger(journal, self.root, self.refusals, self._tell)
            return
        self._heir = Heir(limits, self._do)
        self._ledger = books = Ledger(journal, self.root, self.refusals, self._tell, self._heir)
        await sync_to_async(self._read, thread_sensitive=False)()
        limits.open(journal.folder.name)
        self._rounds = Rounds(limits, books, self._do, lambda: self.journal().position(), self._known_budgets)
        if not await limits.is_connected(REDIS_SECONDS):
            log.error("Redis is away: limits per minute are shared out among the workers, and keys with a budget wait until it is back")
        await sync_to_async(self._join, thread_sensitive=False)(limits)

    async def stop(self) -> None:
        """Ship what is left. What is still open stays in the journal, for the next start to adopt."""
        if not self.ready:
            return
        self.ready, self._stopped = False, True
        explain.serving.ask = None
        assert self._refresher is not None
        assert self._ledger is not None
        for sweep in self._sweeps:
            sweep.end()
        await sync_to_async(self._refresher.stop, thread_sensitive=False)()
        if self._rounds is not None:
            await sync_to_async(self._rounds.stop, thread_sensitive=False)()
        try:
            await sync_to_async(self._ledger.stop, thread_sensitive=False)()
            await sync_to_async(self._keep_rests, thread_sensitive=False)()
        except (DatabaseError, InterfaceError):
            log.warning("The database is away: the usage of this process stays in its journal, for the next start to store")
        await self.transport.aclose()
        if isinstance(self.limits, RedisLimits):
            await self.limits.close()
        self._let_go()

    def missing_parts(self) -> list[str]:
        """What this process lacks to take requests, in one word each: configuration, database, journal."""
        if not self.ready:
            return [self.missing] if self.missing else []
        return ["journal"] if self._journal is not None and not self._journal.takes_more() else []

    def expose(self, page: exposition.Page) -> None:
        """On the loop: what only this process knows."""
        own, metrics = self._journal, self.gateway.metrics
        shared = settings.ENV.redis_url is not None and own is not None
        workers = {own.folder.name: metrics, **exposition.others(self.root, own.folder)} if shared and own is not None else {"": metrics}
        exposition.requests(page, workers)
        exposition.pools(page, self.current.catalog, self.gateway.health.resting())
        exposition.holdings(page, own, self.limits.open_holds(), self.transport.most_calls(), self.ready and not self.unready)

    def _look(self) -> None:
        """In a thread of its own."""
        alarms.look(self._on_loop(lambda: alarms.exhausted(self.current.catalog, self.gateway.health.resting())))

    def _keep_rests(self) -> None:
        """Those of the last two seconds. Raises DatabaseError."""
        assert self._rests is not None
        try:
            self._rests.turn(self._on_loop)
        finally:
            close_old_connections()

    def _cut(self, under_way: set[Leaving]) -> None:
        """In a thread of its own."""
        self._do(cut_refused(under_way, self.current, self._lookups))

    def _share(self) -> None:
        if self._journal is not None:
            exposition.share(self._journal, self.gateway.metrics)
            self._loop.call_later(SHARE_EVERY_SECONDS, self._share)

    def _let_go(self) -> None:
        if self._journal is not None:
            self._journal.close(remove_folder=self._journal.is_shipped())
            self._journal = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read(self) -> None:
        check_canary()
        self.current.catalog = snapshot.load()
        close_old_connections()

    def _prepare(self, limits: MemoryLimits) -> None:
        months.make_ahead_or_say(timezone.now())
        adopted = ledger.adopt_all(self.root)
        if adopted:
            log.info("Adopted %s usage rows of earlier workers", adopted)
        self._read()
        budgets = limits.untracked(self.current.catalog.money_limits())
        with patient():
            spent = ledger.spent_in(budgets, time.time())
        limits.track(budgets)
        limits.add_spent(spent)
        close_old_connections()

    # With Redis

    def _join(self, limits: RedisLimits) -> None:
        """Take a place among the workers. In a thread; without Redis it comes later by itself."""
        assert self._rounds is not None
        months.make_ahead_or_say(timezone.now())
        self._adopt()  # dead workers need not be waited for
        self._rounds.start()
        if limits.link.is_up and not self._rounds.wait_for(self._known_budgets(), JOIN_SECONDS):
            log.error("The budgets could not be counted yet: keys that have one wait for it")
        self._adopt()
        close_old_connections()

    def _adopt(self) -> None:
        assert self._ledger is not None
        try:
            with self._ledger.shipping:
                adopted = ledger.adopt_all(self.root, self._heir)
        except Away:
            return  # the ledger tries again
        if adopted:
            log.info("Adopted %s usage rows of earlier workers", adopted)

    def _known_budgets(self) -> set[Budget]:
        catalog = self.current.catalog
        if self._budgets[0] is not catalog:
            self._budgets = catalog, {budget_of(limit) for limit in catalog.money_limits()}
        return self._budgets[1] | self._asked_for

    def _heard(self, news: bytes) -> None:
        if news == SNAPSHOT and self._refresher is not None:
            self._refresher.look_now()
        elif news.startswith(NEWS) and self._rests is not None:
            self._rests.heard(news)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run this on the loop and wait for it. Not to be called from there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    def _install(self, catalog: Catalog) -> None:
        """In the refresher's thread: budgets that are new are counted exactly before they come into force.

        The loop begins to count them at one point of the journal; all that was settled before it is shipped, and then
        read from the totals."""
        if isinstance(self.limits, MemoryLimits):
            self._count(catalog.money_limits())
        self._loop.call_soon_threadsafe(self.limits.forget_past_windows, time.time())
        self._loop.call_soon_threadsafe(self._swap, catalog)
        if self._rounds is not None:  # here a budget is refused until it is counted, and a revoked key need not wait for that
            self._rounds.look_now()

    def _swap(self, catalog: Catalog) -> None:
        before = {upstream.id: upstream for upstream in self.current.catalog.upstreams}
        for upstream in catalog.upstreams:
            known = before.get(upstream.id)
            if known is None or not upstream.is_as_it_was(known):  # what was found out about it was perhaps found out about another
                self.gateway.health.clear(upstream.id)
                self.gateway.learned.pop(upstream.id, None)
                if self._rests is not None:
                    self._rests.forget(upstream.id)
        self.current.catalog = catalog

    def _tell(self, used: Collection[live.Used]) -> None:
        """In the ledger's thread: pages that are open and show this usage hear of it, by way of Redis wherever they are served."""
        if isinstance(self.limits, RedisLimits):
            self._loop.call_soon_threadsafe(self._announce, self.limits, used)
        elif live.watched:
            asyncio.run_coroutine_threadsafe(live.tell(used), self._loop)

    def _announce(self, limits: RedisLimits, used: Collection[live.Used]) -> None:
        news = live.packed(used)
        if not limits.publish(news, USAGE_CHANNEL):
            live.heard(news)

    def _count(self, limits: Iterable[Limit]) -> None:
        """Begin to count the budgets among these that are not counted yet. Not on the loop. Raises DatabaseError."""
        assert self._ledger is not None
        assert isinstance(self.limits, MemoryLimits)
        with self._ledger.shipping:  # or what is settled after the position would be counted twice
            budgets = self.limits.untracked(limits)
            if not budgets:
                return
            try:
                position = self._on_loop(self._begin_tracking, budgets)
                self._ledger.ship(until=position)
                with patient():
                    spent = ledger.spent_in(budgets, time.time())
            except BaseException:
                self._on_loop(self.limits.untrack, budgets)
                raise
            self._on_loop(self.limits.add_spent, spent)

    def _on_loop(self, work: Callable[..., T], *given: Any) -> T:
        """Do this on the loop, as one step between its others, and wait for it. Not to be called from there."""

        async def do() -> T:
            return work(*given)

        return self._do(do())

    def _explain(self, asking: explain.Asking) -> explain.Explanation:
        """Asked by a page or the API, in a thread of its own; answered on the loop, between two steps of requests."""
        here = explain.Here(self.current.catalog, self.gateway.health, live=True, counted=False)  # what others used, Redis alone knows
        if isinstance(self.limits, MemoryLimits):
            here = replace(here, limits=self.limits, counted=True)
        return self._on_loop(asking, here)

    def _load_and_count(self, digests: Sequence[bytes]) -> Principal | None:
        """In a thread. Raises DatabaseError or InterfaceError, at once where another has just done so."""
        if time.monotonic() < self._away_until:
            raise DatabaseError("The database was away a moment ago.")
        try:
            principal = snapshot.load_key(digests)
            if principal is not None:
                money = [limit for limit in principal.limits if limit.metric == "money"]
                if self._rounds is None:
                    self._count(money)
                elif money and self.limits.untracked(money):
                    self._asked_for |= {budget_of(limit) for limit in money}
                    self._rounds.wait_for(self._asked_for, NEW_BUDGET_SECONDS)
            return principal
        except (DatabaseError, InterfaceError):
            self._away_until = time.monotonic() + AWAY_SECONDS
            log.warning("A key could not be looked up: the database is away")
            raise
        finally:
            close_old_connections()

    def _begin_tracking(self, budgets: set[Budget]) -> tuple[int, int]:
        self.limits.track(budgets)
        return self.journal().position()

    async def _in_renewing(self, work: Callable[[int, int], T], credential_id: int, generation: int) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._renewing, work, credential_id, generation)

    async def _load_key(self, digests: Sequence[bytes]) -> Principal | None:
        try:
            return await sync_to_async(self._load_and_count, thread_sensitive=False, executor=self._looking_up)(digests)
        except (DatabaseError, InterfaceError):
            raise Unavailable("The gateway cannot check this key just now.", code="database_unavailable", retry_after_seconds=2) from None


def renew(credential_id: int, generation: int) -> Access:
    """As the trip of a request wants it said: raises CredentialRefused or NotRenewed. In a thread of its own."""
    try:
        return tokens.renew(credential_id, generation)
    except GrantDead:
        raise CredentialRefused(SIGNED_OUT) from None
    except SealBroken as problem:
        log.error("The tokens of credential %s cannot be opened: %s", credential_id, problem)
        raise CredentialRefused(SIGNED_OUT) from None
    except OAuthFailed as problem:
        # Not for longer than a rest that is no reason to refuse a call.
        wait = min(problem.retry_after_seconds or 1.0, IGNORED_REST_SECONDS) if isinstance(problem, TryAgainLater) else IGNORED_REST_SECONDS
        raise NotRenewed("The upstream account cannot be signed in just now.", retry_after_seconds=wait) from None
    except (DatabaseError, InterfaceError):
        log.warning("The sign-in of credential %s cannot be renewed: the database is away", credential_id)
        raise NotRenewed("The upstream account cannot be signed in just now.", retry_after_seconds=2) from None
    finally:
        close_old_connections()


def refuse(credential_id: int, generation: int) -> None:
    """The upstream did not take a token that had just been renewed. In a thread of its own; what goes wrong is only logged."""
    try:
        tokens.refuse(credential_id, generation)
    except (OAuthFailed, DatabaseError, InterfaceError) as problem:
        log.warning("That credential %s has to be signed in again could not be noted: %s", credential_id, problem)
    finally:
        close_old_connections()


class Heir:
    """Settles for Redis what a dead worker left behind: its holds are freed, and whatever it had no time to say is counted."""

    def __init__(self, limits: RedisLimits, do: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._limits, self._do = limits, do
        self._stored: dict[str, tuple[bytes, set[Any]]] = {}  # by worker: what was stored for it in vain, and in which epoch

    def first(self, worker: str) -> None:
        """Nobody waits for it any more. Raises Away before this worker has a place of its own: what it stored then, others who
        load the totals might just miss."""
        self._do(self._limits.bury(worker))

    def settle(self, worker: str, settled: Sequence[Settled], new: Collection[Any]) -> None:
        epoch = self._limits.epoch
        before = self._stored.pop(worker, (b"", set()))
        fresh = {*new, *(before[1] if before[0] == epoch else ())}
        self._stored[worker] = epoch, fresh
        left = self._do(self._limits.adopt(worker, ledger.to_settle(settled, fresh)))
        if left:  # settled, and stored, while Redis was away; or never admitted
            self._do(self._limits.adopt(worker, ledger.to_release(left)))
        del self._stored[worker]


def _to_nobody(news: bytes) -> None:
    pass


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
            connection.close()  # the pool is small, and the next sweep is far away

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
    """Without Redis one process alone may serve, and on SQLite in any case. The descriptor that holds the lock; raises
    ImproperlyConfigured."""
    if settings.ENV.redis_url is not None and not settings.ENV.database_url.startswith("sqlite:"):
        return None
    descriptor = os.open(settings.DATA_DIR / "serve.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ImproperlyConfigured(
            f"Another process already serves from {settings.DATA_DIR}, and without Redis and PostgreSQL one alone may: stop it first."
        ) from None
    return descriptor
