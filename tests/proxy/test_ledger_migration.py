"""The migration to months and four tables of sums keeps every row that is there, and goes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import postgres_database
from tests.serving import Sluice

# Rows of three months as the release before had them, and their sums by quarter of an hour.
FILL = """
from datetime import UTC, datetime, timedelta
from django.db import connection
from django.db.migrations.loader import MigrationLoader
from proxy import totals
release = MigrationLoader(connection).project_state([("proxy", "0003_alias_weights_parameters_and_abort")]).apps
UsageEvent = release.get_model("proxy", "UsageEvent")  # with the columns that it had then
events = []
for number in range(300):
    at = datetime(2026, 8, 30, 23, 50, tzinfo=UTC) + timedelta(hours=7 * number)
    events.append(UsageEvent(
        request_id=f"{int(at.timestamp() * 1000):012x}70008000{number:012x}", at=at, organization_id=1 + number % 2, user_id=1,
        key_id=1 + number % 3, model="m", served_model=f"p/{number % 2}", provider="openai", status=200 + 229 * (number % 5 == 0),
        endpoint="chat/completions", cost=number, usage_source="reported", fresh_input=number, output=2))
UsageEvent.objects.bulk_create(events)
table = totals.TABLES[0]
with connection.cursor() as cursor:
    names = ", ".join([*table.dimensions, *totals.SUMS])
    cursor.execute(f"INSERT INTO {table.name} ({names}) " + totals.sums_of_rows(table, connection.vendor).replace("%%", "%"))
"""
SEEN = """
from django.db import connection
from django.db.models import Sum
from proxy.models import UsageEvent
print(UsageEvent.objects.count(), *UsageEvent.objects.aggregate(Sum("cost"), Sum("fresh_input")).values())
"""
PARTITIONS = """
from django.db import connection
with connection.cursor() as cursor:
    cursor.execute("SELECT relkind FROM pg_class WHERE relname = 'proxy_usageevent'")
    print(*cursor.fetchone(), end=" ")
    for name in ("y2026m08", "y2026m09", "y2026m10", "y2026m11", "rest"):
        cursor.execute("SELECT to_regclass(%s)", [f"proxy_usageevent_{name}"])
        if cursor.fetchone()[0]:
            cursor.execute(f"SELECT count(*) FROM proxy_usageevent_{name}")
            print(name, *cursor.fetchone(), end=" ")
"""
WHOLE = f"300 {sum(range(300))} {sum(range(300))}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def before(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sluice]:
    def made(**settings: str) -> Iterator[Sluice]:
        sluice = Sluice(tmp_path / "data", **settings)
        sluice.migrate()
        sluice.manage("migrate", "-v", "0", "proxy", "0003")
        yield sluice
        sluice.close()

    if request.param == "sqlite":
        yield from made()
    else:
        with postgres_database() as url:
            yield from made(DATABASE_URL=url, SECRET_KEY="s" * 50, KEYRING="k" * 50)


def test_rows_and_sums_are_kept_on_the_way_there_and_back(before: Sluice) -> None:
    on_postgres = before.env.get("DATABASE_URL", "").startswith("postgres")

    def seen(code: str) -> Any:
        return before.python(code).strip()

    before.python(FILL)
    assert seen(SEEN) == WHOLE

    for _ in range(2):  # there, back, and there again
        before.manage("migrate", "-v", "0")
        assert seen(SEEN) == WHOLE
        assert before.manage("recompute_totals", "--check").strip().endswith("all sums are those of the rows")
        if on_postgres:
            assert seen(PARTITIONS) == "p y2026m08 4 y2026m09 103 y2026m10 106 y2026m11 87 rest 0"
        before.manage("migrate", "-v", "0", "proxy", "0003")
        assert seen(SEEN) == WHOLE
        if on_postgres:
            assert seen(PARTITIONS) == "r"
