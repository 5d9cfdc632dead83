"""What all tests share: async tests, a Sluice that runs, simulated upstreams, and the services that may be absent."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import httpx2
import pytest
from asgiref.sync import async_to_sync
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from providers import registry
from providers.adapter import Adapter
from tests import migrated
from tests.migrated import POSTGRES_URL
from tests.serving import Sluice, running
from tests.upstreams.openai import OpenAIUpstream

# To read the system's authorities costs a client of httpx's thirty milliseconds; the clients of all tests share one reading, and so
# do those of OpenAI's SDK, which come from httpx2.
for library in (httpx, httpx2):
    library._transports.default.create_ssl_context = functools.cache(library.create_ssl_context)

# Nothing is asserted about speed: a busy machine is no reason for a property to fail.
hypothesis_settings.register_profile("sluice", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("sluice")

POSTGRES_ADDRESS = ("127.0.0.1", 5432)

# Prices of the shared upstream's models, in US dollars per million tokens: input, output, cached input.
SIM_PRICE = {"input": 3, "output": 15, "cached": 0.3}


def pytest_configure(config: pytest.Config) -> None:
    for name, needs in {"redis": "Redis", "nginx": "nginx"}.items():
        config.addinivalue_line("markers", f"{name}: needs {needs}")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """While tests are found, more and more is kept and nothing thrown away: to look for garbage meanwhile takes as long as to find
    them, and to look through all of them again and again afterwards a tenth of what tests take."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first: the last to be begun decides when several processes are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    async_to_sync(pyfuncitem.obj)(**arguments)
    return True


# Services that may be absent


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


SERVICES: dict[str, Callable[[], bool]] = {
    "postgres": lambda: _answers(*POSTGRES_ADDRESS),
    "redis": lambda: shutil.which("redis-server") is not None,
    "chromium": lambda: shutil.which("chromium") is not None,
    "nginx": lambda: shutil.which("nginx") is not None,
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        _add_server_log(item, report)
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("REQUIRE_SERVICES") == "1":
        present = [name for name, is_present in SERVICES.items() if item.get_closest_marker(name) and is_present()]
        if present:
            report.outcome = "failed"
            report.longrepr = f"Skipped, although this is present: {', '.join(present)}. The reason given: {report.longrepr}"
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_LOG_STARTS] = {sluice: sluice.log_size() for sluice in _RUNNING}


_LOG_STARTS: pytest.StashKey[dict[Sluice, int]] = pytest.StashKey()
_RUNNING: list[Sluice] = []


def _add_server_log(item: pytest.Item, report: pytest.TestReport) -> None:
    for sluice in {value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Sluice)}:
        text = sluice.log(item.stash.get(_LOG_STARTS, {}).get(sluice, 0))
        report.sections.append((f"log of the server on {sluice.url}", text[-20_000:]))


# A Sluice that runs


@contextmanager
def _serving() -> Iterator[Callable[..., Sluice]]:
    with ExitStack() as stack:

        def start(*, hurried: bool = False, **settings: str) -> Sluice:
            sluice = stack.enter_context(running(hurried=hurried, **settings))
            _RUNNING.append(sluice)
            stack.callback(_RUNNING.remove, sluice)
            return sluice

        yield start


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Sluice]]:
    """Start a further Sluice with settings of its own: `serve(HEARTBEAT_SECONDS="0.1")`. Stopped after the file's last test."""
    with _serving() as start:
        yield start


@pytest.fixture(scope="session")
def sluice() -> Iterator[Sluice]:
    """The Sluice that tests share, on SQLite, in a hurry. Each test makes keys and prefixes of its own."""
    with _serving() as start:
        yield start(hurried=True)


@pytest.fixture(scope="session", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def sluice_on(request: pytest.FixtureRequest) -> Iterator[Sluice]:
    """A Sluice on each database."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sluice")
        return
    with postgres_database() as url, _serving() as start:
        yield start(hurried=True, DATABASE_URL=url, SECRET_KEY=secrets.token_hex(32), KEYRING=secrets.token_hex(32))


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """The address of a migrated PostgreSQL database that is made for this test and dropped after it."""
    with postgres_database() as url:
        yield url


@contextmanager
def postgres_database(*, empty: bool = False) -> Iterator[str]:
    """A database of its own, migrated or empty, dropped on the way out."""
    import psycopg

    if not SERVICES["postgres"]():
        pytest.skip("PostgreSQL does not answer on 127.0.0.1:5432")
    name = f"sluice_test_{os.getpid()}_{secrets.token_hex(3)}"
    with psycopg.connect(f"{POSTGRES_URL}/postgres", autocommit=True) as connection:
        template = "template1" if empty else migrated.postgres_template()
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')  # type: ignore[arg-type]
        yield f"{POSTGRES_URL}/{name}"
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')  # type: ignore[arg-type]


# Simulated upstreams


@pytest.fixture
def know(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Adapter]], None]]:
    """Have these kinds be all that there are: `know({})`."""

    def put(kinds: dict[str, Adapter]) -> None:
        monkeypatch.setattr(registry, "_all", lambda: kinds)
        registry.adapter.cache_clear()

    yield put
    registry.adapter.cache_clear()


@pytest.fixture
def speak(know: Callable[[dict[str, Adapter]], None]) -> Callable[[str, Adapter], None]:
    """Have an adapter of the test's own speak for a kind: `speak("openai", Picky())`."""

    def put(name: str, adapter: Adapter) -> None:
        know({**registry._all(), name: adapter})

    return put


@pytest.fixture(scope="session")
def upstream_server() -> Iterator[OpenAIUpstream]:
    with OpenAIUpstream() as upstream:
        yield upstream


@pytest.fixture
def upstream(upstream_server: OpenAIUpstream) -> OpenAIUpstream:
    """The simulated OpenAI that tests share, with an empty script and log."""
    upstream_server.reset()
    return upstream_server


@pytest.fixture(scope="session")
def sim(sluice: Sluice, upstream_server: OpenAIUpstream) -> str:
    """The prefix of a credential on the shared upstream whose models have the price SIM_PRICE."""
    sluice.set_price("sim/*", **SIM_PRICE)
    credential = sluice.add_openai(upstream_server, label="sim", prefix="sim", secret="sk-sim-ok")
    sluice.manage("refresh_models", "--credential", str(credential))
    sluice.wait_for("sim")
    return "sim"


class Accounts:
    """Compares the usage row of a request with what the upstream billed for it."""

    def __init__(self, sluice: Sluice, upstream: OpenAIUpstream) -> None:
        self._sluice, self._upstream = sluice, upstream

    def of(self, request_id: str, *, posts: int = 1, **expected: Any) -> dict[str, Any]:
        """The one row of this request: tokens as billed, costed by SIM_PRICE, and `expected` as given."""
        row, bill = self._sluice.row(request_id), self._upstream.bill(request_id)
        fresh = row["input_tokens"] - row["cached_tokens"]
        dollars = fresh * SIM_PRICE["input"] + row["cached_tokens"] * SIM_PRICE["cached"] + row["output_tokens"] * SIM_PRICE["output"]
        seen = {
            "input_tokens": row["input_tokens"],
            "output_tokens": row["output_tokens"],
            "micro_dollars": row["cost_usd"] * 1e6,
            "posts": bill.posts,
            **{name: row[name] for name in expected},
        }
        wanted = {"status": 200, "error": "", "attempts": 1, "usage_source": "reported", **expected}
        assert seen | {name: row[name] for name in wanted} == {
            "input_tokens": bill.input_tokens,
            "output_tokens": bill.output_tokens,
            "micro_dollars": pytest.approx(int(dollars + 0.5)),
            "posts": posts,
            **wanted,
        }
        return row


@pytest.fixture
def accounts(sluice: Sluice, upstream: OpenAIUpstream) -> Accounts:
    return Accounts(sluice, upstream)


def pytest_make_parametrize_id(config: pytest.Config, val: Any, argname: str) -> str | None:
    """Bytes and long values would make unreadable test ids."""
    return f"{argname}-{len(val)}-bytes" if isinstance(val, bytes) and len(val) > 30 else None
