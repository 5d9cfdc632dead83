"""Six threads rotate one key at the same moment, on each database: one wins, and one sibling exists."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from project.env import REPOSITORY

RACE = """
import json, threading
import django
django.setup()
from django.core.management import call_command
from django.db import connection
from accounts import actions
from accounts.models import ApiKey, AuditEntry

call_command("migrate", verbosity=0)
organization, user = actions.ensure_organization(), actions.ensure_user("bob@example.org")
actions.ensure_membership(user, organization)
key, _ = actions.issue_key(organization=organization, user=user, name="ci")
outcomes, ready = [], threading.Barrier(6, timeout=20)

def rotate():
    mine = ApiKey.objects.get(pk=key.pk)
    ready.wait()
    try:
        actions.rotate_key(mine)
        outcomes.append("won")
    except actions.Conflict:
        outcomes.append("refused")
    finally:
        connection.close()

connection.close()
threads = [threading.Thread(target=rotate) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([sorted(outcomes), ApiKey.objects.count(), AuditEntry.objects.filter(action="key.rotated").count()]))
"""


def race(folder: Path, **settings: str) -> list[object]:
    environment = {"PATH": os.environ["PATH"], "DATA_DIR": str(folder / "data"), "DJANGO_SETTINGS_MODULE": "project.settings", **settings}
    done = subprocess.run(
        [sys.executable, "-c", RACE], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    result: list[object] = json.loads(done.stdout)
    return result


def test_one_rotation_wins_on_sqlite(tmp_path: Path):
    assert race(tmp_path) == [["refused"] * 5 + ["won"], 2, 1]


@pytest.mark.postgres
def test_one_rotation_wins_on_postgres(tmp_path: Path, postgres_url: str):
    settings = {"DATABASE_URL": postgres_url, "SECRET_KEY": secrets.token_hex(32), "KEYRING": secrets.token_hex(32)}
    assert race(tmp_path, **settings) == [["refused"] * 5 + ["won"], 2, 1]
