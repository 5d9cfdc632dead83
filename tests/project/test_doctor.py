"""`manage.py doctor`: each check seen well and seen ill, and the stream through a proxy that collects."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.db import connection
from django.utils import timezone

from accounts.models import ApiKey, User
from project import checks, doctor
from project.doctor import NOTE, OK, PROBLEM, WARNING, Asked, Finding
from project.keyring import Keyring
from project.models import Heartbeat, beat
from providers.actions import add_credential
from providers.models import Credential, State
from proxy.journal import Journal
from proxy.models import Rest
from tests.serving import REPOSITORY, Sluice, free_port

NOWHERE = "http://127.0.0.1:9"


def levels(findings: Iterator[Finding]) -> list[str]:
    return [one.level for one in findings]


def asked(**given: Any) -> Asked:
    return Asked(NOWHERE, **{"database": True, **given})


@pytest.fixture
def env(settings: Any) -> Callable[..., None]:
    def change(**values: Any) -> None:
        settings.ENV = replace(settings.ENV, **values)

    return change


@pytest.mark.django_db
def test_a_database_that_answers_and_is_migrated_is_well():
    look = asked(database=False)
    assert levels(doctor.database(look)) == [OK]
    assert look.database


@pytest.mark.parametrize(
    ("workers", "allowed", "enough"), [(9, 97, ""), (10, 97, "max_connections to 100 "), (24, 97, "max_connections to 240 ")]
)
def test_workers_that_may_want_more_connections_than_postgres_has_for_them_are_told_so(workers: int, allowed: int, enough: str):
    said = checks.lacks_connections(workers, allowed)
    assert enough in said
    assert bool(said) == bool(enough)


@pytest.mark.django_db
@pytest.mark.parametrize(("used", "level"), [(77, OK), (78, WARNING)])
def test_a_postgres_that_is_nearly_full_of_connections_is_warned_of(monkeypatch: pytest.MonkeyPatch, used: int, level: str):
    monkeypatch.setattr(connection, "vendor", "postgresql")
    monkeypatch.setattr(doctor, "_version", lambda: "15.18")
    monkeypatch.setattr(doctor, "connections", lambda: (97, used))
    [_, found] = list(doctor.database(asked()))
    assert (found.level, found.says) == (level, f"{used} of 97 connections are in use")


@pytest.mark.django_db
def test_a_database_that_lacks_a_migration_is_a_problem():
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM django_migrations WHERE app = 'project'")
    look = asked(database=False)
    assert levels(doctor.database(look)) == [OK, PROBLEM]
    assert not look.database


@pytest.mark.parametrize(("version", "level"), [((3, 40, 1), WARNING), ((3, 51, 3), OK)])
def test_an_old_sqlite_is_warned_of(monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], level: str):
    monkeypatch.setattr(doctor.sqlite3, "sqlite_version_info", version)
    if connection.vendor == "sqlite":
        assert levels(doctor.sqlite(asked())) == [level]


class OtherClock:
    vendor = "postgresql"

    def __init__(self, ahead_seconds: float) -> None:
        self.ahead = timedelta(seconds=ahead_seconds)

    @contextlib.contextmanager
    def cursor(self) -> Iterator[OtherClock]:
        yield self

    def execute(self, sql: str) -> None:
        assert "clock_timestamp" in sql

    def fetchone(self) -> tuple[Any]:
        return (timezone.now() + self.ahead,)


@pytest.mark.parametrize(("ahead", "level", "words"), [(0.5, OK, "0.5"), (5, WARNING, "ahead of"), (-90, PROBLEM, "behind")])
def test_a_database_with_another_time_is_named(monkeypatch: pytest.MonkeyPatch, ahead: float, level: str, words: str):
    monkeypatch.setattr(doctor, "connection", OtherClock(ahead))
    [finding] = doctor.clock(asked())
    assert finding.level == level
    assert words in finding.says


@pytest.mark.django_db
def test_another_keyring_is_a_problem_and_says_what_to_restore(settings: Any):
    add_credential("openai", "house", "sk-secret")
    assert levels(doctor.keyring(asked())) == [OK]
    settings.KEYRING = Keyring("another-keyring-" * 4, None)
    [finding] = doctor.keyring(asked())
    assert finding.level == PROBLEM
    assert "KEYRING is not the one" in finding.says


@pytest.mark.django_db
def test_a_secret_that_does_not_open_is_named():
    credential = add_credential("openai", "house", "sk-secret")
    Credential.objects.filter(pk=credential.pk).update(base_url="https://elsewhere.example/v1")
    [finding] = doctor.keyring(asked())
    assert finding.level == PROBLEM
    assert f"credential {credential.pk} (house)" in finding.says


@pytest.mark.django_db
def test_accounts_that_cannot_serve_are_named():
    assert levels(doctor.accounts(asked())) == [WARNING]
    credential = add_credential("demo", "demo", "")
    assert levels(doctor.accounts(asked())) == [OK]
    Credential.objects.filter(pk=credential.pk).update(state=State.NEEDS_REAUTH)
    assert levels(doctor.accounts(asked())) == [WARNING, WARNING]


@pytest.mark.django_db
def test_accounts_that_rest_are_named_with_the_reason_and_the_end():
    credential = add_credential("demo", "mine", "")
    now = timezone.now()
    for model, seconds, more in [
        ("", 300, {"reason": "ejected", "named": False, "times": 3}),
        ("gpt", 3600, {"reason": "insufficient_quota"}),
        ("llama", 60, {"reason": "model_not_found", "named": False}),
        ("past", -1, {}),
    ]:
        Rest.objects.create(credential=credential, model=model, until=now + timedelta(seconds=seconds), **more)
    *rests, last = doctor.accounts(asked())
    assert last.level == OK
    until = [f"{now + timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S} UTC" for seconds in (300, 3600, 60)]
    who = f"credential {credential.pk} (mine) rests"
    assert [(one.level, one.says) for one in rests] == [
        (NOTE, f"{who}, all models, until {until[0]}: 5 errors in a row, and 2 trials failed"),
        (NOTE, f"{who}, gpt, until {until[1]}: as the upstream asked: insufficient_quota"),
        (NOTE, f"{who}, llama, until {until[2]}: our choice: model_not_found"),
    ]
    Rest.objects.bulk_create(Rest(credential=credential, model=f"made-up-{n}", until=now + timedelta(hours=1)) for n in range(30))
    assert [one.says for one in doctor.accounts(asked())][20:] == ["13 more models of accounts rest", "1 in service"]


@pytest.mark.django_db
def test_mails_that_reach_nobody_are_said(env: Callable[..., None]):
    assert levels(doctor.mail(asked())) == [PROBLEM, WARNING]
    User.objects.create_superuser("op@example.org", "x")
    env(email_url="smtp://mail:25")
    assert levels(doctor.mail(asked())) == [OK]


@pytest.mark.django_db
@pytest.mark.parametrize(("age", "level"), [(None, PROBLEM), (10, OK), (200, WARNING), (3600, PROBLEM)])
def test_a_celery_that_does_nothing_is_seen_by_its_heartbeat(env: Callable[..., None], age: float | None, level: str):
    assert levels(doctor.celery(asked())) == []  # there is none without Redis
    env(redis_url="redis://127.0.0.1:9/0")
    if age is not None:
        beat("celery")
        Heartbeat.objects.update(at=timezone.now() - timedelta(seconds=age))
    assert levels(doctor.celery(asked())) == [level]


def test_a_redis_that_is_away_is_a_problem(env: Callable[..., None]):
    assert levels(doctor.redis(asked())) == []
    env(redis_url=f"redis://127.0.0.1:{free_port()}/0")
    assert levels(doctor.redis(asked())) == [PROBLEM]


@pytest.mark.redis
def test_a_redis_that_may_forget_is_warned_of(env: Callable[..., None], tmp_path: Path):
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server")
    port = free_port()
    server = subprocess.Popen(["redis-server", "--port", str(port), "--save", "", "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        env(redis_url=f"redis://127.0.0.1:{port}/0")
        deadline = time.monotonic() + 10
        while (found := levels(doctor.redis(asked()))) == [PROBLEM] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found == [OK]
        subprocess.run(["redis-cli", "-p", str(port), "config", "set", "maxmemory-policy", "allkeys-lru"], check=True, capture_output=True)
        assert levels(doctor.redis(asked())) == [OK, WARNING]
    finally:
        server.terminate()
        server.wait(10)


def test_journals_of_the_dead_and_damaged_ones_are_told_apart_from_the_living(settings: Any, tmp_path: Path):
    settings.DATA_DIR = tmp_path
    assert levels(doctor.journals(asked())) == [OK]
    living = Journal(tmp_path / "journal")
    dead = Journal(tmp_path / "journal")
    assert levels(doctor.journals(asked())) == [OK]
    dead.close()
    (tmp_path / "journal" / ".damaged-x").mkdir()
    found = list(doctor.journals(asked()))
    assert [one.level for one in found] == [OK, WARNING, PROBLEM]
    assert found[0].says.startswith("1 in use")
    living.close()


@pytest.mark.parametrize(("kind", "level"), [("nfs4", PROBLEM), ("tmpfs", WARNING), ("ext4", OK)])
def test_the_kind_of_filesystem_under_the_journal_is_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, level: str):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"1 0 0:1 / / rw - {kind} none rw\n")
    monkeypatch.setattr(doctor, "MOUNTS", mounts)
    monkeypatch.setattr(checks, "MOUNTS", mounts)
    found = list(doctor.disk(asked()))
    assert found[0].level == level
    if level != OK:
        assert kind in found[0].says


@pytest.mark.parametrize(("free", "level"), [(50 << 20, PROBLEM), (500 << 20, WARNING), (5 << 30, OK)])
def test_a_disk_without_room_is_seen(monkeypatch: pytest.MonkeyPatch, free: int, level: str):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 << 30, 0, free))
    assert levels(doctor.disk(asked()))[-1] == level


def test_a_server_that_is_not_there_is_a_problem():
    assert levels(doctor.reached(Asked(f"http://127.0.0.1:{free_port()}"))) == [PROBLEM]


# With a server


class Collector:
    """A proxy that hands an answer on only when it has all of it, as nginx does unless it is told not to."""

    def __init__(self, to: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                answer = httpx.post(to + self.path, content=body, headers={"authorization": self.headers["authorization"]}, timeout=30)
                self.answer(answer)

            def do_GET(self) -> None:
                self.answer(httpx.get(to + self.path, timeout=30))

            def answer(self, answer: httpx.Response) -> None:
                self.send_response(answer.status_code)
                self.send_header("content-type", answer.headers["content-type"])
                self.send_header("content-length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def set_up(sluice: Sluice) -> Sluice:
    sluice.manage("bootstrap", "--email", "operator@example.org")
    return sluice


def examine(sluice: Sluice, *args: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    done = subprocess.run(
        [sys.executable, "manage.py", "doctor", "--json", *args],
        cwd=REPOSITORY,
        env=sluice.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    found: dict[str, list[dict[str, str]]] = {}
    for row in json.loads(done.stdout):
        found.setdefault(row["check"], []).append(row)
    return done.returncode, found


def test_a_server_that_is_well_has_no_problem_and_its_streams_arrive_word_by_word(set_up: Sluice):
    set_up.wait_for("demo")
    status, found = examine(set_up)
    assert [row["says"] for rows in found.values() for row in rows if row["level"] == "problem"] == []
    assert status == 0
    assert found["streams"][0]["level"] == "ok"
    assert found["public address"][0]["level"] == "ok"
    examine(set_up)
    assert set_up.python("from accounts.models import ApiKey; print(ApiKey.objects.filter(name='doctor').count())").strip() == "1"


def test_a_proxy_that_collects_answers_is_found_out(set_up: Sluice):
    set_up.wait_for("demo")
    collector = Collector(set_up.url)
    try:
        status, found = examine(set_up, "--url", collector.url)
    finally:
        collector.server.shutdown()
    assert status == 1
    [finding] = found["streams"]
    assert finding["level"] == "problem"
    assert "all at once" in finding["says"]
    assert "proxy_buffering off" in finding["hint"]


def test_without_a_server_it_still_tells_all_the_rest_in_words(tmp_path: Path):
    sluice = Sluice(tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "manage.py", "doctor"], cwd=REPOSITORY, env=sluice.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "PROBLEM  database:" in done.stdout
    assert "manage.py migrate" in done.stdout
    assert "PROBLEM  public address:" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.django_db
def test_the_key_that_it_lends_itself_is_one_row_and_does_not_last():
    from accounts import actions

    user = User.objects.create_superuser("op@example.org", "x")
    organization = actions.ensure_organization()
    actions.ensure_membership(user, organization, role="owner")
    first = actions.lend_key(organization, user, "doctor", models=["demo/echo"], lasts=timedelta(minutes=5))
    second = actions.lend_key(organization, user, "doctor", models=["demo/echo"], lasts=timedelta(minutes=5))
    key = ApiKey.objects.get()
    assert first != second
    assert second.startswith(f"sk-sluice-{key.handle}")
    assert key.expires_at is not None
    assert key.expires_at < timezone.now() + timedelta(minutes=6)
