"""How long one statement may take on Postgres. A page asks briefly; what runs beside the requests may wait.

SQLite has no such limit: there nothing happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from django.db import connection

WEB_SECONDS = 3
BESIDE_SECONDS = 60


def be_brief() -> None:
    """In a process that serves: no statement longer than 3 s, unless it is said otherwise. Call it before requests come."""
    if connection.vendor != "postgresql":
        return
    options = connection.settings_dict["OPTIONS"]
    # What is asked reads few rows: to compile it, or to start further processes for it, takes longer than to answer it.
    limit = f"-c statement_timeout={WEB_SECONDS * 1000} -c jit=off -c max_parallel_workers_per_gather=0"
    said = str(options.get("options", ""))
    if limit in said:
        return
    options["options"] = f"{said} {limit}".strip()
    options["application_name"] = f"{options.get('application_name', 'sluice')} serve"
    if connection.connection is not None:
        connection.close()
    connection.close_pool()  # type: ignore[attr-defined]  # the connections that are open know nothing of it


@contextmanager
def patient(seconds: int = BESIDE_SECONDS) -> Iterator[None]:
    """Statements of this thread may take longer, for as long as this goes on; inside a transaction until it ends."""
    if connection.vendor != "postgresql":
        yield
        return
    within = connection.in_atomic_block
    with connection.cursor() as cursor:
        cursor.execute(f"SET {'LOCAL' if within else 'SESSION'} statement_timeout = {seconds * 1000:d}")
    try:
        yield
    finally:
        if not within:
            _restore()


def _restore() -> None:
    raw = connection.connection
    if raw is None or raw.closed:
        return
    try:
        raw.execute("RESET statement_timeout")
    except psycopg.Error:
        raw.close()  # the pool throws it away: no page gets what we changed
