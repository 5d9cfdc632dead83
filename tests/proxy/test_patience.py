"""Statements of a process that serves are short on Postgres, and those beside the requests may take longer."""

from __future__ import annotations

import pytest
from django.db import connection

from tests.serving import Sluice

ASK = """
from django.db import connection, OperationalError
from proxy import patience
def limit():
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('statement_timeout'), current_setting('application_name')")
        return cursor.fetchone()
print(*limit())
patience.WEB_SECONDS = 1
patience.be_brief()
print(*limit())
with patience.patient():
    print(*limit())
print(*limit())
try:
    with patience.patient(2):
        connection.cursor().execute("SELECT pg_sleep(20)")
except OperationalError as problem:
    print(str(problem).strip())
connection.close()
print(*limit())
"""


def test_on_sqlite_nothing_is_limited(db: None) -> None:
    from proxy.patience import be_brief, patient

    if connection.vendor != "sqlite":
        pytest.skip("of SQLite")
    be_brief()
    with patient():
        assert connection.vendor == "sqlite"


@pytest.mark.postgres
def test_limits_go_with_what_a_connection_is_used_for(postgres_url: str, tmp_path) -> None:
    sluice = Sluice(tmp_path / "data", DATABASE_URL=f"{postgres_url}?options=-c%20lock_timeout%3D7s", SECRET_KEY="s" * 50, KEYRING="k" * 50)
    sluice.data_dir.mkdir(mode=0o700)
    try:
        assert sluice.python(ASK).splitlines() == [
            "0 sluice",
            "1s sluice serve",
            "1min sluice serve",
            "1s sluice serve",
            "canceling statement due to statement timeout",
            "1s sluice serve",
        ]
        assert "7s" in sluice.python(
            "from proxy.patience import be_brief; from django.db import connection; be_brief(); c = connection.cursor(); "
            "c.execute('SHOW lock_timeout'); print(c.fetchone())"
        )
    finally:
        sluice.close()


@pytest.mark.postgres
def test_a_server_is_known_by_its_name_among_the_connections(postgres_url: str, serve) -> None:
    sluice = serve(DATABASE_URL=postgres_url, SECRET_KEY="s" * 50, KEYRING="k" * 50)
    names = sluice.python(
        "from django.db import connection; c = connection.cursor(); c.execute('SELECT DISTINCT application_name FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()'); print(c.fetchall())"
    )
    assert "sluice serve" in names
