"""The log by months: on Postgres makes them ahead, and on both databases lets go of what is older than is kept.

Sums stay. What was deleted is remembered in `LogStart`, so that nobody works sums out anew from rows that are gone.
"""

from __future__ import annotations

import logging
import re
import time as clock
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from django.db import DatabaseError, connection, transaction

from proxy.models import LogStart, UsageEvent
from proxy.totals import midnight_of

log = logging.getLogger(__name__)

MONTHS_AHEAD = 3
ROWS_AT_ONCE = 2000
PAUSE_SECONDS = 0.05  # between two deletions, so that the ledger gets its turn
# A change of the table waits for those who read it, and everybody else waits behind it: not for long.
LOCK_TIMEOUT = "2s"
_TABLE = UsageEvent._meta.db_table
_REST = f"{_TABLE}_rest"  # rows whose month nobody made
_AT_ONCE = 60  # months found among those rows
_LOCK = 0x736C7569  # one process at a time


@dataclass(frozen=True, slots=True, order=True)
class Month:
    """A month in UTC."""

    year: int
    month: int

    @classmethod
    def of(cls, moment: datetime) -> Self:
        utc = moment.astimezone(UTC)
        return cls(utc.year, utc.month)

    @classmethod
    def named(cls, partition: str) -> Self | None:
        found = re.fullmatch(rf"{_TABLE}_y(\d{{4}})m(\d\d)", partition)
        return cls(int(found[1]), int(found[2])) if found else None

    def after(self, months: int) -> Self:
        years, month = divmod(self.month - 1 + months, 12)
        return type(self)(self.year + years, month + 1)

    @property
    def start(self) -> datetime:
        return datetime(self.year, self.month, 1, tzinfo=UTC)

    @property
    def end(self) -> datetime:
        return self.after(1).start

    @property
    def partition(self) -> str:
        return f"{_TABLE}_y{self.year:04}m{self.month:02}"


def made() -> list[Month]:
    """The months that have a partition, the oldest first."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT child.relname FROM pg_inherits JOIN pg_class child ON child.oid = inhrelid WHERE inhparent = %s::regclass", [_TABLE]
        )
        return sorted(month for (name,) in cursor.fetchall() if (month := Month.named(name)))


def make_ahead(now: datetime) -> list[Month]:
    """Make what is missing of this month, the next three, and months that rows came for all the same. Those that were made.

    Raises DatabaseError. On SQLite there is nothing to do."""
    if connection.vendor != "postgresql":
        return []
    this = Month.of(now)
    wanted = {this.after(number) for number in range(MONTHS_AHEAD + 1)} | set(_strays())
    missing = sorted(wanted - set(made()))
    return [month for month in missing if _make(month)]


def _strays() -> Iterable[Month]:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT DISTINCT date_trunc('month', at AT TIME ZONE 'UTC') FROM {_REST} LIMIT {_AT_ONCE}")  # noqa: S608
        return [Month(row[0].year, row[0].month) for row in cursor.fetchall()]


def _make(month: Month) -> bool:
    with transaction.atomic(), connection.cursor() as cursor:
        _patiently(cursor)
        if month in made():
            return False  # another process was faster
        between = [month.start, month.end]
        cursor.execute(f"CREATE TABLE {month.partition} (LIKE {_TABLE} INCLUDING DEFAULTS)")
        # Its rows may have come before it: they move, or it could not be attached.
        cursor.execute(
            f"WITH moved AS (DELETE FROM {_REST} WHERE at >= %s AND at < %s RETURNING *) "  # noqa: S608
            f"INSERT INTO {month.partition} SELECT * FROM moved",
            between,
        )
        # Attached, not created in its place: that keeps nobody from reading and writing the others.
        cursor.execute(f"ALTER TABLE {_TABLE} ATTACH PARTITION {month.partition} FOR VALUES FROM (%s) TO (%s)", between)
    return True


def _patiently(cursor: Any) -> None:
    cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
    cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
    cursor.execute("SET LOCAL statement_timeout = '60s'")


def forget(keep_days: int, now: datetime) -> int:
    """Delete what is older than so many days: whole months on Postgres, whole days on SQLite. How many months or rows.

    Raises DatabaseError; what is left is deleted the next time."""
    before = midnight_of(now - timedelta(days=keep_days))
    if connection.vendor != "postgresql":
        return _forget_rows(before)
    make_ahead(now)  # rows outside of their months would stay
    old = [month for month in made() if month.end <= before]
    for month in old:
        with transaction.atomic(), connection.cursor() as cursor:
            _patiently(cursor)
            _remember(month.end)
            cursor.execute(f"DROP TABLE IF EXISTS {month.partition}")
        log.info("The usage rows of %s-%02d are deleted; their sums stay", month.year, month.month)
    return len(old)


def _forget_rows(before: datetime) -> int:
    _remember(before)
    deleted = 0
    while True:
        ids = UsageEvent.objects.filter(at__lt=before).order_by("at").values_list("pk", flat=True)[:ROWS_AT_ONCE]
        count, _ = UsageEvent.objects.filter(pk__in=list(ids)).delete()
        deleted += count
        if count < ROWS_AT_ONCE:
            return deleted
        clock.sleep(PAUSE_SECONDS)


def _remember(moment: datetime) -> None:
    """Before anything is deleted."""
    if not LogStart.objects.exists():
        LogStart.objects.get_or_create(pk=1, defaults={"at": moment})
    LogStart.objects.filter(at__lt=moment).update(at=moment)


def make_ahead_or_say(now: datetime) -> None:
    """For the start: a month that cannot be made keeps nobody from serving, since its rows find a place."""
    try:
        make_ahead(now)
    except DatabaseError as problem:
        log.error("A month of the usage log could not be made ahead; it is tried again: %s", problem)
