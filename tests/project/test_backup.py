"""Backing up and restoring as docs/operations.md says, with a server that is in use: keys work, secrets open, usage is all there."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import postgres_database
from tests.loops.load import SLOW, Load
from tests.serving import REPOSITORY, CommandFailed, NotStarted, Sluice, eventually, running
from tests.upstreams.openai import OpenAIUpstream

BODY = {"model": "sim/gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as one:
        yield one


def sh(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def call(sluice: Sluice, key: str) -> int:
    answer = httpx.post(f"{sluice.url}/v1/chat/completions", json=BODY, headers={"authorization": f"Bearer {key}"}, timeout=20)
    return answer.status_code


def in_use(sluice: Sluice, upstream: OpenAIUpstream, backup: Callable[[], None]) -> tuple[str, list[dict[str, Any]]]:
    """A key that works, and what had been used before the backup was made under load."""
    sluice.set_price("sim/*", input=3, output=15)
    sluice.add_openai(upstream, prefix="sim", secret="sk-sim-ok")
    key = sluice.issue_key(name="kept")
    sluice.wait_for("sim")
    upstream.reset()
    assert call(sluice, key) == 200
    before = eventually(sluice.usage, "no usage row")
    upstream.script(*[SLOW] * 10_000)
    with Load(sluice.url, key, BODY["model"]) as load:
        eventually(lambda: len(load.answered) > 5, "nobody is answered")
        backup()
    upstream.reset()
    return key, before


def is_whole(sluice: Sluice, key: str, before: list[dict[str, Any]]) -> None:
    assert call(sluice, key) == 200
    after = {row["request_id"]: row for row in sluice.usage()}
    assert all(after[row["request_id"]] == row for row in before)
    command = [sys.executable, "manage.py", "doctor", "--json", "--skip", "streams", "--skip", "mail"]
    done = subprocess.run(command, cwd=REPOSITORY, env=sluice.env, capture_output=True, text=True, check=False)
    assert [row for row in json.loads(done.stdout) if row["level"] == "problem"] == []


def test_sqlite_is_backed_up_in_use_and_restored(tmp_path: Path, stack: ExitStack, upstream: OpenAIUpstream):
    first = stack.enter_context(running(tmp_path / "first"))
    copy, safe = tmp_path / "backup.sqlite3", tmp_path / "safe"
    safe.mkdir()

    def backup() -> None:
        sh(sys.executable, "deploy/backup_sqlite.py", first.data_dir / "sluice.sqlite3", copy)
        for name in ("keyring", "secret_key"):
            shutil.copy2(first.data_dir / name, safe / name)

    key, before = in_use(first, upstream, backup)
    first.stop()

    second = Sluice(tmp_path / "second" / "data")
    stack.callback(second.close)
    second.data_dir.mkdir(parents=True, mode=0o700)
    shutil.copy2(copy, second.data_dir / "sluice.sqlite3")
    for name in ("keyring", "secret_key"):
        shutil.copy2(safe / name, second.data_dir / name)
    second.start()
    is_whole(second, key, before)


def test_a_copy_never_takes_the_place_of_another(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "deploy/backup_sqlite.py", __file__, __file__], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "exists already" in done.stderr


def test_without_its_keyring_a_restored_database_does_not_start_and_says_why(tmp_path: Path, stack: ExitStack):
    first = stack.enter_context(running(tmp_path / "first"))
    first.manage("bootstrap")
    sh(sys.executable, "deploy/backup_sqlite.py", first.data_dir / "sluice.sqlite3", tmp_path / "copy")
    second = Sluice(tmp_path / "second" / "data")
    stack.callback(second.close)
    second.data_dir.mkdir(parents=True, mode=0o700)
    shutil.copy2(tmp_path / "copy", second.data_dir / "sluice.sqlite3")
    with pytest.raises((NotStarted, CommandFailed), match="KEYRING is not the one"):
        second.start()


@pytest.mark.postgres
@pytest.mark.skipif(shutil.which("pg_dump") is None, reason="there is no pg_dump")
def test_postgres_is_dumped_in_use_and_restored(tmp_path: Path, stack: ExitStack, upstream: OpenAIUpstream):
    given = {"SECRET_KEY": secrets.token_hex(32), "KEYRING": secrets.token_hex(32)}
    old, new = stack.enter_context(postgres_database()), stack.enter_context(postgres_database(empty=True))
    first = stack.enter_context(running(tmp_path / "first", DATABASE_URL=old, **given))
    dump = tmp_path / "sluice.dump"

    key, before = in_use(first, upstream, lambda: sh("pg_dump", "--format=custom", "--no-owner", "--file", dump, old))
    first.stop()

    sh("pg_restore", "--no-owner", "--exit-on-error", "--dbname", new, dump)
    second = stack.enter_context(running(tmp_path / "second", DATABASE_URL=new, **given))
    is_whole(second, key, before)
