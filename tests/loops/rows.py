"""Millions of usage rows on Postgres, and how long the queries of pages, API, admin and command take over them.

    python -m tests.loops.rows --rows 10000000      about five minutes, and 6 GB while it runs; the database is dropped afterwards

Half of the traffic is one organization's; 500 keys of very different size, eight models, 90 days up to now.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

ADDRESS = "postgres://postgres@127.0.0.1:5432"
DAYS = 90
KEYS = 500
LOG = "proxy_usageevent"
TIMES = 7

FILL = f"""
INSERT INTO {LOG} (request_id, at, organization_id, team_id, user_id, key_id, credential_id, endpoint, model, served_model, provider,
    status, error, stream, attempts, fresh_input, cache_read, cache_write, output, reasoning, cost, price_id, usage_source,
    first_byte_ms, duration_ms, corrects)
SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || substr(md5(number::text), 1, 20))::uuid, at,
    CASE WHEN key %% 2 = 0 THEN 1 ELSE 2 + key %% 19 END, CASE WHEN key %% 3 = 0 THEN 1 + key %% 5 END, 1 + key %% 50, 1 + key,
    1 + model %% 4, 'chat/completions', 'model-' || model, 'pool-' || model %% 4 || '/model-' || model, 'openai',
    CASE WHEN luck < 0.02 THEN 429 ELSE 200 END, CASE WHEN luck < 0.02 THEN 'rate_limit_exceeded' ELSE '' END, luck > 0.5, 1,
    200 + number %% 700, number %% 90, 0, 50 + number %% 300, number %% 20,
    CASE WHEN luck > 0.995 THEN NULL ELSE 1000 + number %% 9000 END, 1,
    CASE WHEN luck BETWEEN 0.1 AND 0.13 THEN 'estimated' ELSE 'reported' END, 80, 900, NULL
FROM (
    SELECT number, date_trunc('milliseconds', now() - interval '{DAYS} days' * (1 - number / %(rows)s::float)) AS at,
        floor({KEYS} * power(random(), 2))::int AS key, floor(8 * random())::int AS model, random() AS luck
    FROM generate_series(%(first)s::bigint, %(last)s::bigint) number
) one
"""


@dataclass
class Asked:
    """One question of a page: how long its slowest statement took, in milliseconds, each time."""

    slowest: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)
    statements: dict[str, Any] = field(default_factory=dict)
    seen: float = 0.0
    sum: float = 0.0

    def watch(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        began = time.perf_counter()
        try:
            return execute(sql, params, many, context)
        finally:
            took = (time.perf_counter() - began) * 1000
            self.seen, self.sum = max(self.seen, took), self.sum + took
            if sql.startswith(("SELECT", "(SELECT")):
                self.statements[sql] = params

    def again(self) -> None:
        self.slowest.append(self.seen)
        self.together.append(self.sum)
        self.seen = self.sum = 0.0


@contextmanager
def filled(rows: int, progress: Callable[[str], None]) -> Iterator[None]:
    """A database of its own with so many rows, and Django set up on it."""
    import psycopg

    name = f"sluice_rows_{os.getpid()}_{secrets.token_hex(3)}"
    with psycopg.connect(f"{ADDRESS}/postgres", autocommit=True) as server, tempfile.TemporaryDirectory() as folder:
        server.execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type]
        try:
            for unwanted in ("REDIS_URL", "PUBLIC_URL", "ALLOWED_HOSTS"):
                os.environ.pop(unwanted, None)
            os.environ |= {
                "DATABASE_URL": f"{ADDRESS}/{name}",
                "DATA_DIR": folder,
                "SECRET_KEY": secrets.token_hex(32),
                "KEYRING": secrets.token_hex(32),
                "DJANGO_SETTINGS_MODULE": "project.settings",
                "ALLOWED_HOSTS": "testserver",
                "LOG_LEVEL": "ERROR",
            }
            import django
            from django.core.management import call_command

            django.setup()
            from proxy.patience import be_brief

            call_command("migrate", verbosity=0)
            _people()
            _rows(rows, progress)
            be_brief()  # as a server asks
            yield
        finally:
            from django.db import connection

            connection.close()
            connection.close_pool()
            server.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')  # type: ignore[arg-type]


def _people() -> None:
    from accounts.models import ApiKey, Limit, Membership, Organization, Role, Team, User

    organizations = Organization.objects.bulk_create(
        Organization(slug=f"org-{number}", name=f"Organization {number}", time_zone="Asia/Kathmandu" if number == 1 else "UTC")
        for number in range(1, 21)
    )
    users = User.objects.bulk_create(User(email=f"user{number}@example.org") for number in range(1, 51))
    owner = User.objects.create_superuser(OWNER, "x")
    Team.objects.bulk_create(Team(organization=organizations[0], name=f"team {number}") for number in range(1, 6))
    Membership.objects.bulk_create(Membership(user=user, organization=organizations[0], role=Role.MEMBER) for user in users)
    Membership.objects.create(user=owner, organization=organizations[0], role=Role.OWNER)
    ApiKey.objects.bulk_create(
        ApiKey(
            organization=organizations[0 if key % 2 == 0 else 1 + key % 19],
            user=users[key % 50],
            name=f"key {key}",
            digest=key.to_bytes(32, "big"),
            pepper_id="x",
            last_four="xxxx",
        )
        for key in range(KEYS)
    )
    for window in ("day", "week", "month", "total"):
        Limit.objects.create(organization=organizations[0], metric="money", amount=10**12, window=window)
        Limit.objects.create(organization=organizations[0], key_id=1, metric="money", amount=10**12, window=window)
        Limit.objects.create(organization=organizations[0], user=users[0], metric="money", amount=10**12, window=window)


def _rows(rows: int, progress: Callable[[str], None]) -> None:
    from datetime import timedelta

    from django.db import connection
    from django.utils import timezone

    from proxy import months, totals

    for day in range(0, DAYS + 32, 28):
        months.make_ahead(timezone.now() - timedelta(days=day))
    step = max(1, min(rows, 1_000_000))
    with connection.cursor() as cursor:
        tables = [LOG, *(table.name for table in totals.TABLES)]
        # Those that no constraint needs are made when the rows are there.
        cursor.execute(
            "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = ANY(%s) "
            "AND NOT EXISTS (SELECT 1 FROM pg_constraint WHERE conname = indexname)",
            [tables],
        )
        indexes = cursor.fetchall()
        for name, _ in indexes:
            cursor.execute(f"DROP INDEX {name}")
        for first in range(1, rows + 1, step):
            cursor.execute(FILL, {"rows": rows, "first": first, "last": min(rows, first + step - 1)})
            progress(f"{min(rows, first + step - 1):,} rows")
        for table in totals.TABLES:
            names = ", ".join([*table.dimensions, *totals.SUMS])
            cursor.execute(f"INSERT INTO {table.name} ({names}) {totals.sums_of_rows(table, 'postgresql')}")
        progress("sums")
        for _, definition in indexes:
            # As dumped, an index of a partitioned table is made ONLY on the table itself.
            cursor.execute(definition.replace(" ON ONLY ", " ON "))
        progress("indexes")
        cursor.execute("SELECT count(*) FROM proxy_usageevent_rest")
        assert cursor.fetchone()[0] == 0
        cursor.execute("VACUUM ANALYZE")


OWNER, MEMBER = "owner@example.org", "user1@example.org"


def paths() -> dict[str, tuple[str, str]]:
    """All pages and answers of the API that show usage, of the largest organization and the busiest key: the path, and who asks."""
    from datetime import timedelta
    from urllib.parse import quote

    from django.utils import timezone

    from proxy.models import UsageEvent
    from proxy.queries import Cursor

    now = timezone.now()
    year = (now - timedelta(days=360)).strftime("%Y-%m-%dT%H:%M:%SZ")
    quarter = (now - timedelta(days=89, hours=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    yesterday = (now - timedelta(hours=20)).strftime("%Y-%m-%dT%H:%M:%SZ")
    deep = UsageEvent.objects.filter(key_id=1, at__lt=now - timedelta(days=20)).order_by("-at")[0]
    place, api = f"{Cursor(deep.at, deep.request_id)}", "/api/organizations/org-1"
    log = "/admin/proxy/usageevent/"
    owners = {
        "keys: the list": "/keys/?organization=org-1",
        **{f"key: its page, {span}": f"/keys/1/?range={span}" for span in ("24h", "7d", "30d")},
        "key: a page deep in its log": f"/keys/1/?range=30d&before={place}",
        **{f"api: usage by {by}, 30 d": f"{api}/usage?by={by}" for by in ("day", "model", "key")},
        **{f"api: usage by {by}, 360 d": f"{api}/usage?by={by}&since={year}" for by in ("day", "model", "key")},
        "api: usage by key, 89 d until yesterday": f"{api}/usage?by=key&since={quarter}&until={yesterday}",
        **{f"api: a key's usage by {by}, 360 d": f"{api}/keys/1/usage?by={by}&since={year}" for by in ("day", "model")},
        "api: a key's requests": f"{api}/keys/1/requests?limit=200&since={year}",
        "api: a key's requests, deep": f"{api}/keys/1/requests?limit=200&since={year}&before={place}",
        "admin: the log, 24 h": log,
        "admin: the log, 90 d": f"{log}?window=90d",
        "admin: the log, 90 d, deep in it": f"{log}?window=90d&before={quote(f'{deep.at.isoformat()}~{deep.request_id}')}",
        **{f"admin: the log, {one}, 90 d": f"{log}?window=90d&outcome={one}" for one in ("good", "failed", "unpriced")},
        "admin: the log, missing usage, 90 d": f"{log}?window=90d&usage_source__exact=missing",
        "admin: the log of one key, 90 d": f"{log}?window=90d&key__id__exact=1",
        "admin: the log of an idle key, failed, 90 d": f"{log}?window=90d&key__id__exact=500&outcome=failed",
        "admin: the log of one organization, unpriced, 90 d": f"{log}?window=90d&organization__id__exact=20&outcome=unpriced",
        "admin: one request by its id": f"{log}?q={deep.request_id}",
        "admin: one request": f"{log}{deep.request_id}/change/",
        "admin: sums, 90 d": "/admin/proxy/usagetotal/?window=90d",
        "admin: sums of one key, 90 d": "/admin/proxy/usagetotal/?window=90d&key_id=1",
        "admin: sums of an idle key, 90 d": "/admin/proxy/usagetotal/?window=90d&key_id=500",
    }
    members = {
        "keys: the list of a member": "/keys/?organization=org-1",
        **{f"api: a member's usage by {by}, 360 d": f"{api}/usage?by={by}&since={year}" for by in ("day", "model", "key")},
    }
    return {name: (path, OWNER) for name, path in owners.items()} | {name: (path, MEMBER) for name, path in members.items()}


def questions() -> dict[str, Callable[[], Any]]:
    """All of that, and what the command and budgets ask of usage."""
    from datetime import timedelta

    from django.test import Client
    from django.utils import timezone

    from accounts.models import User
    from proxy import budget_mails, totals
    from proxy.queries import usage_rows

    clients = {email: Client() for email in (OWNER, MEMBER)}
    for email, client in clients.items():
        client.force_login(User.objects.get(email=email))
    now = timezone.now()

    def get(path: str, who: str) -> Callable[[], Any]:
        def ask() -> None:
            answer = clients[who].get(path, headers={"accept": "text/html,application/json"})
            assert answer.status_code == 200, (path, answer.status_code, answer.content[:300])

        return ask

    asked: dict[str, Callable[[], Any]] = {
        **{name: get(path, who) for name, (path, who) in paths().items()},
        "command: 3000 rows since": lambda: [row for row, _ in zip(usage_rows(since=now - timedelta(days=30)), range(3000), strict=False)],
        "command: 3000 rows of a key": lambda: [
            row for row, _ in zip(usage_rows(since=now - timedelta(days=90), key="500"), range(3000), strict=False)
        ],
        "budgets: mails": lambda: budget_mails.send_due(now),
        "budgets: at the start, all": lambda: [
            totals.spent_of(("organization:1", "key:1", "user:1@1", "team:1"), start)
            for start in (
                now.replace(hour=18, minute=15, second=0, microsecond=0) - timedelta(days=30),
                totals.first_whole_day(now - timedelta(days=21)),
            )
        ],
    }
    return asked


def measure(times: int = TIMES) -> dict[str, Asked]:
    from django.db import connection

    found: dict[str, Asked] = {}
    for name, ask in questions().items():
        one = found[name] = Asked()
        for _ in range(times):
            with connection.execute_wrapper(one.watch):
                ask()
            one.again()
    return found


def scans(found: dict[str, Asked]) -> dict[str, list[str]]:
    """Tables that a plan reads from end to end although they grow with use, by question."""
    from django.db import connection

    grown: dict[str, list[str]] = {}
    for name, one in found.items():
        for sql, params in one.statements.items():
            with connection.cursor() as cursor:
                cursor.execute(f"EXPLAIN {sql}", params)
                plan = "\n".join(line for (line,) in cursor.fetchall())
            # A month without rows is read as quickly in one way as in another.
            read = [table for table in set(re.findall(rf"Seq Scan on ({LOG}\w*|proxy_usagetotal)", plan)) if _has_rows(table)]
            if read:
                grown.setdefault(name, []).extend(sorted(read))
    return grown


def _has_rows(table: str) -> bool:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(f"SELECT EXISTS (SELECT 1 FROM {table})")
        return bool(cursor.fetchone()[0])


def table(found: dict[str, Asked]) -> str:
    lines = ["| what is asked | slowest statement, ms: best | p50 | max | all statements, p50 |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, one in found.items():
        figures = (min(one.slowest), statistics.median(one.slowest), max(one.slowest), statistics.median(one.together))
        lines.append(f"| {name} | {' | '.join(f'{figure:.1f}' for figure in figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--times", type=int, default=TIMES)
    parser.add_argument("--plans", action="store_true", help="print as JSON which tables are read from end to end, and no times")
    options = parser.parse_args()
    began = time.monotonic()

    def progress(text: str) -> None:
        if not options.plans:
            print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    with filled(options.rows, progress):
        found = measure(1 if options.plans else options.times)
        if options.plans:
            print(json.dumps({"scans": scans(found), "asked": len(found)}))
        else:
            print(table(found))
            print("read from end to end:", scans(found) or "nothing that grows")


if __name__ == "__main__":
    main()
