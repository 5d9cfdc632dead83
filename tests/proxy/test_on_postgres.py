"""What depends on the database, once more over PostgreSQL."""

import os
import subprocess
import sys

import pytest

from tests.conftest import SERVICES
from tests.migrated import POSTGRES_URL

FILES = [
    "tests/accounts/test_actions.py",
    "tests/accounts/test_imported_keys.py",
    "tests/accounts/test_queries.py",
    "tests/proxy/test_ledger.py",
    "tests/proxy/test_snapshot.py",
    "tests/proxy/test_queries.py",
    "tests/proxy/test_months.py",
    "tests/proxy/test_request_page.py",
    "tests/proxy/test_requests_csv.py",
    "tests/proxy/test_totals.py",
    "tests/proxy/test_budget_mails.py",
    "tests/providers/test_tokens.py",
    "tests/providers/test_login.py",
]


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.timeout(400)
def test_the_same_tests_pass_over_postgres():
    """In one process: making the tests' database costs as much as most of these files."""
    if not SERVICES["postgres"]():
        pytest.skip("PostgreSQL does not answer on 127.0.0.1:5432")
    environment = os.environ | {"TEST_DATABASE_URL": f"{POSTGRES_URL}/postgres"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *FILES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
