"""Several workers on one socket: who may have them, one restart after the other, and what they know of each other."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
import redis

from project.supervisor import Place, Supervisor, bind
from proxy.stores.news import usage_channel_of
from tests.conftest import postgres_database
from tests.loops import hold_leak
from tests.loops.redis_loss import COUNTERS, SECRETS, everywhere, workers_of
from tests.proxy.test_live import House, hears, hears_nothing
from tests.redises import Server, server
from tests.serving import NotStarted, Sluice, eventually, running
from tests.upstreams.kit import Step
from tests.upstreams.openai import OpenAIUpstream

pytestmark = [pytest.mark.postgres, pytest.mark.redis, pytest.mark.timeout(240)]

TRUST = ssl.create_default_context()  # made anew for each call it would take longer than the call
ECHO = {"model": "demo/echo", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def own_redis() -> Iterator[Server]:
    with server() as one:
        yield one


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres_database() as url:
        yield url


@pytest.fixture(scope="module")
def two(own_redis: Server, database: str, upstream_server: OpenAIUpstream) -> Iterator[Sluice]:
    """Two workers."""
    with running(workers=2, DATABASE_URL=database, REDIS_URL=own_redis.url, DRAIN_SECONDS="10", CUT_REVOKED_CALLS="1", **SECRETS) as sluice:
        sluice.manage("add_credential", "demo", "--label", "demo", "--secret-stdin")
        sluice.add_openai(upstream_server, prefix="sim")
        sluice.set_price("sim/*", input=3, output=15)
        everywhere(sluice, "sim")
        everywhere(sluice, "demo")
        yield sluice


@pytest.fixture
def pages(own_redis: Server, database: str, two: Sluice, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sluice]:
    """What serves pages and nothing else."""
    house = Sluice(tmp_path_factory.mktemp("pages") / "data", DATABASE_URL=database, REDIS_URL=own_redis.url, **SECRETS)
    house.data_dir.mkdir(mode=0o700)
    try:
        yield house.start_again("--only", "web", "--server", "daphne")
    finally:
        house.close()


@pytest.fixture
def away(own_redis: Server) -> Iterator[Server]:
    own_redis.stop()
    yield own_redis
    own_redis.start()


def ask(sluice: Sluice, key: str, **body: object) -> httpx.Response:
    """On a connection of its own, which any worker may take."""
    return httpx.post(
        f"{sluice.url}/v1/chat/completions", json=ECHO | body, headers={"authorization": f"Bearer {key}"}, timeout=30, verify=TRUST
    )


def statuses(sluice: Sluice, key: str, count: int = 8) -> Counter[int]:
    return Counter(ask(sluice, key).status_code for _ in range(count))


def budgets_count(sluice: Sluice) -> None:
    key = sluice.issue_key(budget=100, window="month")
    eventually(lambda: statuses(sluice, key, 4) == {200: 4}, "budgets do not count", seconds=20)


# Who may have them


@pytest.mark.parametrize(
    ("settings", "said"),
    [({}, "set REDIS_URL"), ({"REDIS_URL": "redis://127.0.0.1:1", **SECRETS}, "SQLite is for one serving process")],
)
def test_several_workers_need_postgres_and_redis(tmp_path, settings, said):
    house = Sluice(tmp_path / "data", **settings)
    house.migrate()
    house.workers = 2
    with pytest.raises(NotStarted, match=said):
        house.start_again()
    house.close()


def test_a_start_that_cannot_succeed_ends_with_status_1(tmp_path, own_redis, database, two):
    house = Sluice(tmp_path / "data", DATABASE_URL=database, REDIS_URL=own_redis.url, **SECRETS)
    house.env["KEYRING"] = "x" * 50
    house.workers = 2
    with pytest.raises(NotStarted, match="KEYRING is not the one"):
        house.start_again()
    house.close()


# One restart after the other


def test_f17_a_rolling_restart_refuses_no_connection_and_breaks_no_request(two):
    key = two.issue_key()
    before = set(workers_of(two))
    seen: Counter[str] = Counter()

    async def client(ending: asyncio.Event) -> None:
        while not ending.is_set():  # half of the time on a new connection
            async with httpx.AsyncClient(base_url=two.url, headers={"authorization": f"Bearer {key}"}, timeout=20, verify=TRUST) as kept:
                for _ in range(20):
                    try:
                        answer = await kept.post("/v1/chat/completions", json=ECHO)
                        seen[str(answer.status_code)] += 1
                    except httpx.TransportError as problem:
                        seen[repr(problem)] += 1

    async def restart() -> None:
        ending = asyncio.Event()
        clients = [asyncio.create_task(client(ending)) for _ in range(8)]
        await asyncio.sleep(0.5)
        os.kill(two.pid, signal.SIGHUP)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            now = set(workers_of(two))
            if len(now) == 2 and not now & before:
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError("the workers were not replaced")
        await asyncio.sleep(0.5)
        ending.set()
        await asyncio.gather(*clients)

    asyncio.run(restart())
    assert set(seen) == {"200"}, seen
    assert seen["200"] > 50


def test_a_stream_that_runs_outlives_the_restart_of_its_worker(two, upstream):
    key = two.issue_key()
    upstream.script(Step(text="one two three four five six seven eight", delay_frame_ms=300))
    before = set(workers_of(two))
    body = ECHO | {"model": "sim/gpt-4o-mini", "stream": True}
    with httpx.stream(
        "POST", f"{two.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=30
    ) as answer:
        events = answer.iter_bytes()
        next(events)
        os.kill(two.pid, signal.SIGHUP)
        assert b"".join(events).endswith(b"data: [DONE]\n\n")
    eventually(lambda: not set(workers_of(two)) & before, "the workers were not replaced", seconds=60)


def test_a_worker_that_dies_is_replaced_and_what_it_held_is_free_again(two, upstream):
    key = two.issue_key(concurrency=1, budget=1, window="day")
    eventually(lambda: ask(two, key).status_code == 200, "budgets do not count", seconds=20)
    upstream.script(Step(text="never", delay_first_ms=60_000))
    before = set(workers_of(two))

    async def die() -> None:
        async with httpx.AsyncClient(timeout=30) as client:
            body = ECHO | {"model": "sim/gpt-4o-mini"}
            running = asyncio.create_task(
                client.post(f"{two.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
            )
            await asyncio.sleep(0.5)
            assert (await asyncio.to_thread(ask, two, key)).json()["error"]["code"] == "concurrency_limit_exceeded"
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                await running

    asyncio.run(die())
    eventually(lambda: len(set(workers_of(two)) - before) == 2, "the workers were not replaced", seconds=30)
    eventually(two.is_ready, "not ready", seconds=30)
    eventually(lambda: ask(two, key).status_code == 200, "the place is not free", seconds=30)
    eventually(lambda: any(row["error"] == "interrupted" for row in two.usage()), "what was interrupted has no row", seconds=30)


def test_a_system_that_gives_no_process_ends_none_of_the_others(monkeypatch):
    """It may be short of memory, which is why a worker died, or its program is just being replaced."""
    listener = bind("127.0.0.1", 0)
    one = Supervisor(listener, 2, [sys.executable, "-c", "import time; time.sleep(60)"], 5)
    one.places = [Place(), Place()]
    one._life, keeps_alive = os.pipe()
    try:
        assert one._look_after_all()
        one._has_started = True
        first, second = (place.worker for place in one.places)
        first.process.kill()
        first.process.wait()
        open_files = len(os.listdir("/proc/self/fd"))

        def no_process(*given: object, **options: object) -> None:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", no_process)
            assert one._look_after_all()
            one.places[0].start_at = 0.0
            assert one._look_after_all()
            one._to_replace = [one.places[1]]
            assert one._look_after_all()
        assert (one.places[0].worker, one.places[1].worker, one._to_replace) == (None, second, [])
        assert len(os.listdir("/proc/self/fd")) == open_files - 1
        one.places[0].start_at = 0.0
        assert one._look_after_all()
        assert one.places[0].worker is not None
    finally:
        for worker in one._all():
            worker.process.kill()
            worker.process.wait()
        for descriptor in (one._life, keeps_alive, *(worker.says_ready for worker in one._all())):
            os.close(descriptor)
        listener.close()


# The end


def test_a_drain_refuses_whoever_comes_too_late_at_once_and_lets_its_streams_run_to_their_end(tmp_path, own_redis, database, two):
    """Else they would wait in the queue of a socket from which nobody takes them, and never try the next gateway."""
    key = two.issue_key()
    times = {"DRAIN_DELAY": "1", "DRAIN_SECONDS": "60"}
    house = Sluice(tmp_path / "data", DATABASE_URL=database, REDIS_URL=own_redis.url, **times, **SECRETS)
    house.workers = 2
    house.start_again()
    words = " ".join(str(number) for number in range(40))
    body = {"model": "demo/echo-0.2", "messages": [{"role": "user", "content": words}], "stream": True}
    try:
        with httpx.stream(
            "POST", f"{house.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=30, verify=TRUST
        ) as answer:
            events = answer.iter_bytes()
            next(events)
            os.kill(house.pid, signal.SIGTERM)
            eventually(lambda: httpx.get(f"{house.url}/readyz", verify=TRUST).json()["status"] == "draining", "it does not drain")
            assert ask(house, key).status_code == 200
            eventually(lambda: connects(house) == errno.ECONNREFUSED, "a connection that nobody takes is queued")
            assert b"".join(events).endswith(b"data: [DONE]\n\n")
        assert house.stop() == 0, house.log()
    finally:
        house.close()


def connects(sluice: Sluice) -> int:
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(("127.0.0.1", sluice.port))


# What they know of each other


def test_two_gateways_on_two_ports_share_every_limit(two, own_redis, database, tmp_path):
    with running(tmp_path, DATABASE_URL=database, REDIS_URL=own_redis.url, **SECRETS) as other:
        limits = {"rpm": 10, "budget": 50, "window": "day"}
        key = two.issue_key(**limits)
        eventually(lambda: ask(other, key).status_code != 401, "the key is not known")
        seen: Counter[int] = Counter()
        for _ in range(10):
            seen += Counter([ask(two, key).status_code, ask(other, key).status_code])
        assert seen[200] == 10 or (seen[200] == 9 and seen[429] >= 10)  # the first may have waited for its budget
        assert other.stop() == 0


def test_a_page_that_a_process_for_pages_serves_hears_of_every_workers_calls(two, pages, own_redis):
    house = House(pages, "daphne")
    owner, stranger = house.person(), house.person()
    key, number = house.key(owner)
    client = own_redis.client

    def listeners() -> int:
        return int(client.pubsub_numsub(usage_channel_of())[0][1])

    assert listeners() == 0  # for pages that nobody has opened
    with house.opens(owner) as page, house.opens(stranger) as foreign:
        assert listeners() == 1
        for worker in workers_of(two):
            with the_others_stopped(two, worker):
                assert ask(two, key).status_code == 200
            assert hears(page) == {"keys": [number]}
        client.client_kill_filter(_type="pubsub", skipme=False)  # the workers' own connections go, too
        eventually(lambda: listeners() == 1, "it does not listen again")
        eventually(lambda: ask(two, key).status_code == 200, "not served")
        assert hears(page) == {"keys": [number]}
        assert hears_nothing(foreign, 0.1)
    eventually(lambda: listeners() == 0, "it listens on")


@contextlib.contextmanager
def the_others_stopped(sluice: Sluice, worker: int) -> Iterator[None]:
    others = [one for one in workers_of(sluice) if one != worker]
    for one in others:
        os.kill(one, signal.SIGSTOP)
    try:
        yield
    finally:
        for one in others:
            os.kill(one, signal.SIGCONT)


TAKE_AWAY = """
from django.contrib.sessions.models import Session
from accounts import actions, models
actions.revoke_key(models.ApiKey.objects.get(name={key!r}))
for one in (models.User.objects.get(email={user!r}), models.Organization.objects.get(slug={organization!r})):
    one.is_active = False
    one.save()
Session.objects.get(session_key={session!r}).delete()
"""


@pytest.mark.parametrize("with_redis", [True, False])
def test_s10_what_is_taken_away_is_gone_on_every_worker_within_five_seconds_and_cut_within_thirty(two, request, with_redis):
    """A key; a person, with the person's keys and sessions; an organization with its keys; a session. Each key has an open stream
    on each worker."""
    if not with_redis:
        request.getfixturevalue("away")
    house, name = House(two, "uvicorn"), f"revoke-{with_redis}"
    gone, stays = house.person(), house.person()
    keys = {
        "key": two.issue_key(name=name),
        "user": two.issue_key(email=gone.email, organization=gone.slug),
        "organization": two.issue_key(organization=f"gone-{with_redis}"),
    }
    sessions = {"user": gone.session, "session": stays.session}
    kept = two.issue_key()

    def all_are(key: int, page: int) -> bool:
        return all(statuses(two, one) == {key: 8} for one in keys.values()) and all(
            pages_of(two, one) == {page: 8} for one in sessions.values()
        )

    eventually(lambda: all_are(200, 200), "they are not known")
    with contextlib.ExitStack() as streams:
        to_be_cut, to_go_on = [], []
        for worker in workers_of(two):
            with the_others_stopped(two, worker):
                to_be_cut += [streams.enter_context(slow_stream(two, key)) for key in keys.values()]
                to_go_on.append(streams.enter_context(slow_stream(two, kept)))
        two.python(TAKE_AWAY.format(key=name, user=gone.email, organization=f"gone-{with_redis}", session=stays.session))
        began = time.monotonic()
        eventually(lambda: all_are(401, 302), "something works on", seconds=6)
        assert time.monotonic() - began < 5
        for events in to_be_cut:
            assert b'"code":"key_revoked"' in b"".join(events)
        assert time.monotonic() - began < 30
        for events in to_go_on:
            assert b'"content"' in next(events)


@contextlib.contextmanager
def slow_stream(sluice: Sluice, key: str) -> Iterator[Iterator[bytes]]:
    """A stream that has begun and would go on for a minute."""
    words = " ".join(str(number) for number in range(300))
    body = {"model": "demo/echo-0.2", "messages": [{"role": "user", "content": words}], "stream": True}
    headers = {"authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{sluice.url}/v1/chat/completions", json=body, headers=headers, timeout=30, verify=TRUST) as answer:
        events = answer.iter_bytes()
        next(events)
        yield events


def pages_of(sluice: Sluice, session: str, count: int = 8) -> Counter[int]:
    """What somebody with this session gets; each time on a connection of its own."""
    cookie = {"sessionid": session}
    return Counter(httpx.get(f"{sluice.url}/keys/", cookies=cookie, timeout=30, verify=TRUST).status_code for _ in range(count))


def test_a_changed_limit_and_a_disabled_credential_are_in_force_within_five_seconds(two):
    key = two.issue_key(name="changed")
    eventually(lambda: statuses(two, key) == {200: 8}, "the key is not known")
    two.python(
        "from accounts import actions, models, policy; key = models.ApiKey.objects.get(name='changed');"
        "actions.set_limit(key.organization, policy.Allowance('rpm', 0), key=key)"
    )
    eventually(lambda: statuses(two, key) == {429: 8}, "the limit is not in force", seconds=5)
    other = two.issue_key(name="other")
    two.python("from providers import actions, models; actions.disable(models.Credential.objects.get(label='demo'))")
    eventually(lambda: statuses(two, other) == {404: 8}, "the credential serves on", seconds=5)
    two.python("from providers import actions, models; actions.enable(models.Credential.objects.get(label='demo'))")
    eventually(lambda: statuses(two, other) == {200: 8}, "the credential does not serve again", seconds=5)


def test_a_frozen_key_is_refused_until_it_thaws_by_itself(two):
    key = two.issue_key(name="frozen")
    eventually(lambda: statuses(two, key) == {200: 8}, "the key is not known")
    two.python(
        "from datetime import timedelta; from accounts import actions, models;"
        "actions.freeze(models.ApiKey.objects.get(name='frozen'), length=timedelta(seconds=6), reason='audit')"
    )
    eventually(lambda: statuses(two, key) == {403: 8}, "the key works on", seconds=5)
    refused = ask(two, key)
    assert refused.status_code == 200 or (refused.json()["error"]["code"], int(refused.headers["retry-after"]) <= 6) == ("frozen", True)
    eventually(lambda: statuses(two, key) == {200: 8}, "it does not thaw", seconds=10)


def test_f14_without_redis_limits_are_shared_out_and_budgets_wait(two, own_redis):
    limited, rich = two.issue_key(rpm=20), two.issue_key(budget=100, window="month")
    eventually(lambda: statuses(two, rich, 4) == {200: 4}, "budgets do not count", seconds=20)
    ask(two, limited)
    own_redis.stop()
    try:
        eventually(lambda: statuses(two, rich, 4) == {503: 4}, "a hard budget passes without Redis")
        began = time.monotonic()
        seen = statuses(two, limited, 40)
        assert time.monotonic() - began < 5
        assert 10 <= seen[200] <= 20, seen  # each worker has its half
    finally:
        own_redis.start()
    budgets_count(two)


def test_f14_a_redis_that_hangs_costs_a_quarter_of_a_second(two, own_redis):
    key = two.issue_key(rpm=1000)
    eventually(lambda: statuses(two, key) == {200: 8}, "the key is not known")
    plain = sorted(_took(two, key) for _ in range(20))[10]
    own_redis.client.execute_command("CLIENT", "PAUSE", 3000, "ALL")
    slow = [_took(two, key) for _ in range(20)]
    assert max(slow) < plain + 0.25 + 1
    assert sorted(slow)[10] < plain + 0.2
    eventually(own_redis.answers, "Redis hangs", seconds=10)
    budgets_count(two)


def test_f14_a_redis_that_has_no_memory_left_is_away_and_loses_nothing(two, own_redis):
    limited, rich = two.issue_key(rpm=1000), two.issue_key(budget=100, window="month")
    eventually(lambda: statuses(two, rich, 4) == {200: 4}, "budgets do not count", seconds=20)
    own_redis.client.config_set("maxmemory-policy", "noeviction")
    own_redis.client.config_set("maxmemory", "1kb")
    try:
        assert {ask(two, rich, model="sim/gpt-4o-mini").status_code for _ in range(4)} == {503}  # its money could not be held
        assert statuses(two, limited) == {200: 8}
    finally:
        own_redis.client.config_set("maxmemory", "0")
    budgets_count(two)
    eventually(lambda: ask(two, rich, model="sim/gpt-4o-mini").status_code == 200, "it is not served again")


def _took(sluice: Sluice, key: str) -> float:
    began = time.monotonic()
    assert ask(sluice, key).status_code == 200
    return time.monotonic() - began


def test_a06_calls_that_end_in_every_way_leave_nothing_held_in_redis(two, upstream):
    counts = hold_leak.leak(two, upstream, "sim", 250)
    assert len(counts["ends"]) > 5
    assert {name: counts[name] for name in ("holds", "held", "places_lost")} == {"holds": 0, "held": 0, "places_lost": 0}


def test_a05_saving_old_forms_during_traffic_changes_no_counter(two, own_redis):
    key = two.issue_key(name="stale", budget=100, window="month")
    eventually(lambda: statuses(two, key, 4) == {200: 4}, "budgets do not count", seconds=20)
    code = (
        "import threading; from accounts.models import ApiKey, Limit, Organization; from django.db import connection\n"
        "key = ApiKey.objects.get(name='stale'); limit = key.limits.get(); organization = key.organization\n"
        "for _ in range(20): key.save(); limit.save(); organization.save()\n"
    )
    body = {"model": "sim/gpt-4o-mini"}
    before = len(two.usage())
    for _ in range(3):
        two.python(code)
        assert {ask(two, key, **body).status_code for _ in range(10)} == {200}

    def counted() -> bool:
        counters, holds = json.loads(two.python(COUNTERS))
        return holds == 0 and all(one == stored and held == 0 for one, stored, held, loaded in counters.values() if loaded)

    eventually(lambda: len(two.usage()) >= before + 30, "rows are missing")
    eventually(counted, "Redis and the totals differ")


def test_a_supervisor_that_is_killed_leaves_no_worker_behind(tmp_path, own_redis, database, two):
    house = Sluice(tmp_path / "data", DATABASE_URL=database, REDIS_URL=own_redis.url, DRAIN_SECONDS="2", **SECRETS)
    house.workers = 2
    house.start_again()
    pids = workers_of(house)
    assert len(pids) == 2
    house.kill9()
    eventually(
        lambda: not any(os.path.exists(f"/proc/{pid}/task/{pid}/children") and _runs(pid) for pid in pids), "a worker runs on", seconds=20
    )
    house.close()


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return open(f"/proc/{pid}/stat").read().split(")")[1].split()[0] != "Z"
    return False


def test_a_clean_stop_exits_0_and_leaves_nothing_in_redis_that_lives(own_redis, two):
    client = redis.Redis.from_url(own_redis.url)
    names = {path.name.encode() for path in (two.data_dir / "journal").iterdir() if not path.name.startswith(".")}
    assert len(names) == 2
    assert two.stop(60) == 0
    leases = client.zrangebyscore("{sluice}:workers", time.time(), "+inf")
    assert not {lease.partition(b".")[0] for lease in leases} & names
    two.start_again()
