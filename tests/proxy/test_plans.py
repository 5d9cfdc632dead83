"""How Postgres goes about what pages, API, admin and command ask: by an index, and never through the log from end to end.

The long form, with ten million rows and times, is tests/loops/rows.py; its table is in docs/performance.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import SERVICES


@pytest.mark.postgres
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_nothing_that_is_asked_reads_the_log_or_the_sums_from_end_to_end():
    if not SERVICES["postgres"]():
        pytest.skip("PostgreSQL does not answer on 127.0.0.1:5432")
    command = [sys.executable, "-m", "tests.loops.rows", "--rows", "100000", "--plans"]
    environment = {name: value for name, value in os.environ.items() if name not in {"DATABASE_URL", "DJANGO_SETTINGS_MODULE"}}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout)
    assert said["scans"] == {}
    assert said["asked"] > 30
