"""Sums of usage rows: the tables of them, how new rows are added, what was spent, and how they are worked out anew.

    UsageTotal   quarter of an hour, every dimension     what no other table can say
    ModelTotal   quarter of an hour, organization, model  what an organization used as a whole
    KeyTotal     quarter of an hour, key                  charts of keys, days in any time zone, ends of long windows
    KeyDay       day in UTC, key, model                   long windows of keys and people, and budgets

A key comes with its organization, person and team.

Rows and sums are written in one transaction, so that whoever dies in between leaves neither.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import Any

from django.db import connection, models, transaction
from django.db.models import Q, Sum

from proxy.models import KeyDay, KeyTotal, LogStart, ModelTotal, UsageEvent, UsageTotal

QUARTER_MS = 15 * 60 * 1000
DAY = timedelta(days=1)
SUMS = ("requests", "errors", "unpriced", "estimated", "fresh_input", "cache_read", "cache_write", "output", "reasoning", "cost")

# Quarter, organization, team, user, key, credential, provider, model -> what is added, in the order of SUMS.
Groups = Mapping[tuple[Any, ...], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Table:
    """One table of sums. `time` is the first of its dimensions in time: "slot" or "day"."""

    model: type[models.Model]
    dimensions: tuple[str, ...]
    time: str

    @property
    def name(self) -> str:
        return self.model._meta.db_table


TABLES = (
    Table(UsageTotal, ("slot", "organization_id", "team_id", "user_id", "key_id", "credential_id", "provider", "model"), "slot"),
    Table(ModelTotal, ("organization_id", "slot", "provider", "model"), "slot"),
    Table(KeyTotal, ("key_id", "slot", "organization_id", "team_id", "user_id"), "slot"),
    Table(KeyDay, ("key_id", "day", "organization_id", "team_id", "user_id", "provider", "model"), "day"),
)


def upsert(table: str, dimensions: Sequence[str], sums: Sequence[str]) -> str:
    names = [*dimensions, *sums]
    added = ", ".join(f'{name} = "{table}".{name} + excluded.{name}' for name in sums)
    insert = f'INSERT INTO "{table}" ({", ".join(names)}) VALUES ({", ".join(["%s"] * len(names))})'  # noqa: S608
    return f"{insert} ON CONFLICT ({', '.join(dimensions)}) DO UPDATE SET {added}"


_ADD = tuple(upsert(table.name, table.dimensions, SUMS) for table in TABLES)


def add(groups: Groups) -> None:
    """Add to all tables, inside the caller's transaction. Each in the order of its key, so that no two writers wait for each other."""
    if not groups:
        return
    by_model: dict[tuple[Any, ...], list[int]] = {}
    by_key: dict[tuple[Any, ...], list[int]] = {}
    by_day: dict[tuple[Any, ...], list[int]] = {}
    for (quarter, organization, team, user, key, _, provider, model), amounts in groups.items():
        _into(by_model, (organization, quarter, provider, model), amounts)
        _into(by_key, (key, quarter, organization, team, user), amounts)
        _into(by_day, (key, quarter // 96, organization, team, user, provider, model), amounts)
    vendor = connection.vendor
    values = (
        [(stored_moment(quarter * QUARTER_MS, vendor), *rest, *amounts) for (quarter, *rest), amounts in sorted(groups.items())],
        [(first, stored_moment(quarter * QUARTER_MS, vendor), *rest, *sums) for (first, quarter, *rest), sums in sorted(by_model.items())],
        [(first, stored_moment(quarter * QUARTER_MS, vendor), *rest, *sums) for (first, quarter, *rest), sums in sorted(by_key.items())],
        [(first, _stored_day(day), *rest, *sums) for (first, day, *rest), sums in sorted(by_day.items())],
    )
    with connection.cursor() as cursor:
        for sql, rows in zip(_ADD, values, strict=True):
            cursor.executemany(sql, rows)


def _into(sums: dict[tuple[Any, ...], list[int]], dimensions: tuple[Any, ...], amounts: Sequence[int]) -> None:
    before = sums.get(dimensions)
    sums[dimensions] = list(amounts) if before is None else [one + more for one, more in zip(before, amounts, strict=True)]


# What was spent


def first_whole_day(start: datetime) -> datetime:
    """The first midnight in UTC at or after a moment."""
    midnight = midnight_of(start)
    return midnight if midnight == start else midnight + DAY


def midnight_of(moment: datetime) -> datetime:
    """The start of its day, in UTC."""
    return datetime.combine(moment.astimezone(UTC).date(), time(), UTC)


_COLUMNS = {"organization": ("organization_id",), "team": ("team_id",), "user": ("user_id", "organization_id"), "key": ("key_id",)}
_AT_ONCE = 1000  # scopes in one statement


def spent_of(scopes: Iterable[str], start: datetime) -> dict[str, int]:
    """Micro-dollars of each of these, such as `key:4` or `user:3@1`, since the start of a quarter of an hour: whole days, and the end
    before the first of them. There may be thousands, and while they are counted nobody who has a budget is served.

    A row that is stored meanwhile is in both readings or in neither: each row lies in one of the two parts."""
    spent = dict.fromkeys(scopes, 0)
    for kind, columns in _COLUMNS.items():
        named = {_ids_in(scope): scope for scope in spent if scope.startswith(f"{kind}:")}
        ids = list(named)
        for some in (ids[at : at + _AT_ONCE] for at in range(0, len(ids), _AT_ONCE)):
            for of, cost in _spent_by(columns, set(some), start):
                spent[named[of]] += cost
    return spent


def _ids_in(scope: str) -> tuple[int, ...]:
    return tuple(map(int, scope.partition(":")[2].split("@")))


def _spent_by(columns: tuple[str, ...], ids: Collection[tuple[int, ...]], start: datetime) -> Iterator[tuple[tuple[int, ...], int]]:
    first = first_whole_day(start)
    wanted = {f"{column}__in": sorted({one[place] for one in ids}) for place, column in enumerate(columns)}
    if "team_id" in columns:
        wanted["team_id__gt"] = 0  # type: ignore[assignment]  # or Postgres does not see that its index has them all
    parts: list[models.QuerySet[Any]] = [KeyDay.objects.filter(day__gte=first.date(), **wanted)]
    if start < first:
        parts.append(KeyTotal.objects.filter(slot__gte=start, slot__lt=first, **wanted))
    for rows in parts:
        for *of, cost in rows.order_by().values_list(*columns).annotate(sum=Sum("cost")):
            if tuple(of) in ids:
                yield tuple(of), cost or 0


# Worked out anew

# What a row adds, in the order of SUMS: the same as `ledger` says in Python, in words of SQL, so that the one proves the other.
_FROM_ROWS = (
    "SUM(CASE WHEN corrects IS NULL THEN 1 ELSE 0 END)",
    "SUM(CASE WHEN corrects IS NULL AND status >= 400 THEN 1 WHEN corrects IS NOT NULL AND status < 400 THEN -1 ELSE 0 END)",
    "SUM(CASE WHEN corrects IS NULL AND cost IS NULL THEN 1 ELSE 0 END)",
    "SUM(CASE WHEN corrects IS NULL AND usage_source = 'estimated' THEN 1 "
    "WHEN corrects IS NOT NULL AND usage_source <> 'estimated' THEN -1 ELSE 0 END)",
    *(f"SUM({name})" for name in ("fresh_input", "cache_read", "cache_write", "output", "reasoning")),
    "SUM(COALESCE(cost, 0))",
)
_DIMENSION = {
    "team_id": "COALESCE(team_id, 0)",
    "credential_id": "COALESCE(credential_id, 0)",
    "model": "CASE WHEN served_model = '' THEN model ELSE served_model END",
}
_TIME = {
    ("postgresql", "slot"): "date_bin('15 minutes', at, '1970-01-01 00:00:00+00')",
    ("postgresql", "day"): "(at AT TIME ZONE 'UTC')::date",
    # Text, as Django writes it: 2026-03-01 10:14:59.999000
    ("sqlite", "slot"): "substr(at, 1, 14) || printf('%%02d', substr(at, 15, 2) / 15 * 15) || ':00'",
    ("sqlite", "day"): "substr(at, 1, 10)",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """Sums of one table that differ from those of the rows. None: there is no such line."""

    table: Table
    dimensions: tuple[Any, ...]
    stored: tuple[int, ...] | None
    wanted: tuple[int, ...] | None

    def __str__(self) -> str:
        where = ", ".join(f"{name}={value}" for name, value in zip(self.table.dimensions, self.dimensions, strict=True))
        return f"{self.table.model.__name__} {where}: {self._said(self.stored)}, the rows say {self._said(self.wanted)}"

    def _said(self, sums: tuple[int, ...] | None) -> str:
        if sums is None:
            return "nothing"
        other = (self.wanted if sums is self.stored else self.stored) or ()
        named = [(name, value) for name, value in zip(SUMS, sums, strict=True)]
        told = [(name, value) for number, (name, value) in enumerate(named) if not other or other[number] != value]
        return " ".join(f"{name}={value}" for name, value in told)


def days_of(since: datetime | None = None) -> list[date]:
    """The days in UTC of which there are rows or sums, without those whose rows are no longer all there."""
    start = midnight_of(since) if since else datetime(1, 1, 1, tzinfo=UTC)
    for kept in LogStart.objects.all():
        start = max(start, first_whole_day(kept.at))
    days = set(KeyDay.objects.filter(day__gte=start.date()).values_list("day", flat=True).distinct().order_by())
    for table in (ModelTotal, KeyTotal):
        days |= {slot.date() for slot in table._default_manager.filter(slot__gte=start).datetimes("slot", "day", tzinfo=UTC)}
    days |= set(_days_by_index(UsageEvent.objects.order_by("at"), "at", start))
    days |= set(_days_by_index(UsageTotal.objects.order_by("slot"), "slot", start))
    return sorted(days)


def _days_by_index(rows: models.QuerySet[Any], column: str, start: datetime) -> Iterator[date]:
    """One look at an index for each day that has something."""
    while (found := rows.filter(**{f"{column}__gte": start}).values_list(column, flat=True).first()) is not None:
        yield found.astimezone(UTC).date()
        start = midnight_of(found) + DAY


def differences(day: date) -> list[Difference]:
    """What the tables say otherwise than the rows of one day, each table at one moment: also right while rows come in."""
    return [difference for table in TABLES for difference in _differences(table, day)]


def recompute(day: date) -> list[Difference]:
    """The same, and it is mended. Writers wait meanwhile, and only where something was different."""
    if not differences(day):
        return []
    with transaction.atomic():
        if connection.vendor == "postgresql":
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL statement_timeout = 0")
                # The ledger writes to them in this order. Who has written rows and not yet their sums waits, and adds to what we leave.
                cursor.execute(f"LOCK TABLE {', '.join(table.name for table in TABLES)} IN SHARE ROW EXCLUSIVE MODE")
        found = differences(day)
        for difference in found:
            _mend(difference)
    return found


def _differences(table: Table, day: date) -> list[Difference]:
    start = datetime.combine(day, time(), UTC)
    between = (_as_stored(start), _as_stored(start + DAY))
    with connection.cursor() as cursor:
        cursor.execute(
            _compare(table, connection.vendor),
            [*between, *((day.isoformat(), (day + DAY).isoformat()) if table.time == "day" else between)],
        )
        found = cursor.fetchall()
    said: dict[tuple[Any, ...], dict[bool, tuple[int, ...]]] = {}
    for of_rows, *line in found:
        dimensions = tuple(line[: len(table.dimensions)])
        said.setdefault(dimensions, {})[bool(of_rows)] = tuple(int(value) for value in line[len(table.dimensions) :])
    return [Difference(table, dimensions, sums.get(False), sums.get(True)) for dimensions, sums in sorted(said.items(), key=str)]


@lru_cache
def _compare(table: Table, vendor: str) -> str:
    """One statement, hence one moment: sums of the rows (1) and of the table (0) that the other side does not have."""
    names = ", ".join([*table.dimensions, *SUMS])
    return (
        f"WITH wanted ({names}) AS ({sums_of_rows(table, vendor, 'WHERE at >= %s AND at < %s')}), "  # noqa: S608
        f"stored AS (SELECT {names} FROM {table.name} WHERE {table.time} >= %s AND {table.time} < %s) "
        f"SELECT 1, missing.* FROM (SELECT * FROM wanted EXCEPT SELECT * FROM stored) missing "
        f"UNION ALL SELECT 0, extra.* FROM (SELECT * FROM stored EXCEPT SELECT * FROM wanted) extra"
    )


def sums_of_rows(table: Table, vendor: str, where: str = "") -> str:
    """A SELECT of what a table should hold: its dimensions, and SUMS."""
    groups = [_TIME[vendor, name] if name == table.time else _DIMENSION.get(name, name) for name in table.dimensions]
    whole = "bigint" if vendor == "postgresql" else "integer"
    sums = ", ".join(f"CAST({sql} AS {whole})" for sql in _FROM_ROWS)
    numbers = ", ".join(str(number + 1) for number in range(len(groups)))
    return f"SELECT {', '.join(groups)}, {sums} FROM {UsageEvent._meta.db_table} {where} GROUP BY {numbers}"  # noqa: S608


def _mend(difference: Difference) -> None:
    table, at = difference.table, difference.dimensions
    where = " AND ".join(f"{name} = %s" for name in table.dimensions)
    names = [*table.dimensions, *SUMS]
    with connection.cursor() as cursor:
        cursor.execute(f"DELETE FROM {table.name} WHERE {where}", at)  # noqa: S608
        if difference.wanted is not None:
            values = ", ".join(["%s"] * len(names))
            cursor.execute(f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({values})", [*at, *difference.wanted])  # noqa: S608


# As the database has it


def _as_stored(moment: datetime) -> Any:
    return connection.ops.adapt_datetimefield_value(moment)


# Requests come by the thousand in one second, so what is the same for all of them is worked out once.
@lru_cache(maxsize=1024)
def _stored_second(second: int, vendor: str) -> str:
    moment = str(_as_stored(datetime.fromtimestamp(second, UTC)))
    return moment if vendor == "sqlite" else moment.removesuffix("+00:00")


def stored_moment(milliseconds: int, vendor: str) -> str:
    """As text, which both databases take; exactly as Django writes it, since SQLite compares letters."""
    second, rest = divmod(milliseconds, 1000)
    fraction = f".{rest:03}000" if rest else ""
    return f"{_stored_second(second, vendor)}{fraction}" + ("" if vendor == "sqlite" else "+00:00")


@lru_cache(maxsize=64)
def _stored_day(number: int) -> str:
    return (date(1970, 1, 1) + timedelta(days=number)).isoformat()


def any_of(conditions: Iterable[Q]) -> Q:
    """None of them: nothing is found."""
    found = Q(pk__in=[])
    for condition in conditions:
        found |= condition
    return found
