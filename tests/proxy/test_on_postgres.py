"""What depends on the database, once more over PostgreSQL."""

import os
import socket
import subprocess
import sys

import pytest

FILES = ["tests/proxy/test_ledger.py", "tests/proxy/test_snapshot.py", "tests/proxy/test_queries.py", "tests/accounts"]


@pytest.mark.postgres
@pytest.mark.timeout(240)
def test_the_same_tests_pass_over_postgres():
    try:
        socket.create_connection(("127.0.0.1", 5432), timeout=1).close()
    except OSError:
        pytest.skip("PostgreSQL does not answer on 127.0.0.1:5432")
    environment = os.environ | {"TEST_DATABASE_URL": "postgres://postgres@127.0.0.1:5432/postgres"}
    present = [name for name in FILES if os.path.exists(name)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *present]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
