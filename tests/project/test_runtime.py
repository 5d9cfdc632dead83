"""Budgets come into force with what was spent before them: exactly once, whatever happens meanwhile."""

import asyncio
import threading
import time

import pytest
from django.core import mail
from django.db import OperationalError, connection

from accounts.models import User
from accounts.principal import Limit, Principal
from project.runtime import Runtime
from providers.adapter import Target
from providers.failures import CredentialRefused, OutOfCredit
from providers.secrets import SecretText
from proxy import ledger, snapshot
from proxy.catalog import Catalog, Upstream
from proxy.errors import Unavailable
from proxy.journal import Journal
from proxy.ledger import Ledger
from proxy.stores.limits import Hold
from tests.proxy.test_ledger import settled

pytestmark = pytest.mark.django_db(transaction=True)

LIMIT = Limit("key:1", "money", 1000, "total")
CATALOG = Catalog(version=1, principals={b"x": Principal(1, 1, 1, limits=(LIMIT,))})


@pytest.fixture
def runtime(tmp_path):
    """A runtime whose loop runs in a thread, and whose other threads do not."""
    one = Runtime()
    one.root = tmp_path
    one._journal = Journal(tmp_path)
    one._ledger = Ledger(one._journal, tmp_path, one.refusals)
    one._loop = asyncio.new_event_loop()
    thread = threading.Thread(target=one._loop.run_forever)
    thread.start()
    yield one
    one._loop.call_soon_threadsafe(one._loop.stop)
    thread.join()
    one._loop.close()


def spent(runtime) -> int:
    async def look() -> int:
        return runtime.limits.spent(LIMIT, time.time())

    return asyncio.run_coroutine_threadsafe(look(), runtime._loop).result(5)


def test_what_was_spent_before_is_known_when_the_budget_comes_into_force(runtime):
    ledger.store([ledger.row_of(settled(cost=900))])
    runtime._install(CATALOG)
    assert spent(runtime) == 900


def test_a_database_that_hiccups_does_not_forget_it(runtime, monkeypatch):
    ledger.store([ledger.row_of(settled(cost=900))])

    def away(*_):
        raise OperationalError("database is locked")

    with monkeypatch.context() as patch, pytest.raises(OperationalError):
        patch.setattr(ledger, "spent_in", away)
        runtime._install(CATALOG)
    runtime._install(CATALOG)
    assert spent(runtime) == 900


def test_what_settles_and_is_shipped_meanwhile_counts_once(runtime, monkeypatch):
    record = settled(cost=400)
    really = ledger.spent_in

    async def use() -> None:
        await runtime.limits.reserve(Hold(record.request_id, time.time(), ("key:1",), (LIMIT,), 0, 400))
        runtime._journal.settled(record)
        runtime.limits.settle(record.request_id, 15, 400)

    def busy(*given):
        asyncio.run_coroutine_threadsafe(use(), runtime._loop).result(5)
        shipper.start()
        shipper.join(0.3)  # it must wait until the budget is counted
        assert shipper.is_alive()
        return really(*given)

    def ship() -> None:
        runtime._ledger.ship()
        connection.close()

    shipper = threading.Thread(target=ship)
    monkeypatch.setattr(ledger, "spent_in", busy)
    runtime._install(CATALOG)
    shipper.join(10)
    assert spent(runtime) == 400


def test_a_pool_that_rests_in_memory_is_mailed_to_operators(runtime):
    User.objects.create_superuser("op@example.org", "x")
    upstream = Upstream(1, "openai", "one", "house", "https://up/v1", SecretText("s"))
    runtime.current.catalog = Catalog(version=1, upstreams=(upstream,))
    target = Target("openai", 1, "one", "https://up/v1", SecretText("s"), "m", "house/m")
    runtime.gateway.health.failed(target, OutOfCredit("Nothing is left.", retry_after_seconds=3600), [1])
    runtime._look()
    assert [one.subject for one in mail.outbox] == []  # one model that nobody lists
    runtime.gateway.health.failed(target, CredentialRefused("No."), [1])
    runtime._look()
    runtime._look()
    assert [one.subject for one in mail.outbox] == ["[Sluice] All accounts of house rest"]


def test_unknown_keys_hold_up_no_names_while_the_database_is_away(runtime, monkeypatch):
    """Whoever has no key can ask for as many as he likes; a look-up of a name is what a known key's call may need to get out."""
    let_go, asked = threading.Event(), []

    def hangs(digests):
        asked.append(digests)
        let_go.wait(10)
        raise OperationalError("the connection attempt timed out")

    monkeypatch.setattr(snapshot, "load_key", hangs)

    async def ask() -> list[BaseException | Principal | None]:
        strangers = asyncio.gather(*(runtime._load_key([b"%d" % number]) for number in range(100)), return_exceptions=True)
        await asyncio.sleep(0.1)
        async with asyncio.timeout(2):
            await asyncio.get_running_loop().getaddrinfo("localhost", 80)
        let_go.set()
        return await strangers

    answers = asyncio.run_coroutine_threadsafe(ask(), runtime._loop).result(20)
    assert all(isinstance(one, Unavailable) for one in answers)
    assert len(asked) <= 8  # the others heard at once that it is away


def test_what_is_missing_is_named(runtime):
    runtime.missing = "database"
    assert runtime.missing_parts() == ["database"]
    runtime.ready = True
    assert runtime.missing_parts() == []
    runtime._journal._max_bytes = 0
    assert runtime.missing_parts() == ["journal"]
