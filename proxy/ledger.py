"""Journal -> usage rows -> totals. Adopts the journals of dead workers.

Inserting is idempotent by (at, request_id): whatever is shipped twice counts once, and totals grow only by what was
really inserted, in the same transaction.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from django.db import connection, transaction
from django.db.models import Sum

from accounts.models import ApiKey
from proxy import journal
from proxy.journal import Admitted, Journal, Record, Settled
from proxy.models import RefusedCalls, UsageEvent, UsageSource, UsageTotal
from proxy.refusals import Refusal, Refusals
from proxy.stores.limits import Budget, window_start

log = logging.getLogger(__name__)

BATCH = 500
SHIP_EVERY_SECONDS = 0.5
ADOPT_EVERY_SECONDS = 15.0
FLUSH_REFUSALS_EVERY_SECONDS = 2.0
CHECKPOINT_EVERY_SECONDS = 10.0
INTERRUPTED = "interrupted"
MOST_COST = 2**63 - 1  # what a row can hold
QUARTER = timedelta(minutes=15)

Row = dict[str, Any]

# SQL is put together once, from the names of our own columns; values are always parameters.
_COLUMNS = [str(field.column) for field in UsageEvent._meta.concrete_fields]
_NAMES = ", ".join(f'"{name}"' for name in _COLUMNS)
_TABLE = UsageEvent._meta.db_table
_STAGE = f'CREATE TEMPORARY TABLE IF NOT EXISTS usage_staging (LIKE "{_TABLE}") ON COMMIT DELETE ROWS'
_COPY = f"COPY usage_staging ({_NAMES}) FROM STDIN"
_INTO = f'INSERT INTO "{_TABLE}" ({_NAMES})'
_INSERT = f"{_INTO} VALUES ({', '.join(['%s'] * len(_COLUMNS))})"
_FROM_STAGE = f"{_INTO} SELECT {_NAMES} FROM usage_staging ORDER BY at, request_id ON CONFLICT DO NOTHING RETURNING request_id"  # noqa: S608
_DIMENSIONS = ["slot", "organization_id", "team_id", "user_id", "key_id", "credential_id", "provider", "model"]
_SUMS = ["requests", "errors", "unpriced", "estimated", "fresh_input", "cache_read", "cache_write", "output", "reasoning", "cost"]


def _upsert(table: str, dimensions: Sequence[str], sums: Sequence[str]) -> str:
    names = [*dimensions, *sums]
    added = ", ".join(f'{name} = "{table}".{name} + excluded.{name}' for name in sums)
    insert = f'INSERT INTO "{table}" ({", ".join(names)}) VALUES ({", ".join(["%s"] * len(names))})'  # noqa: S608
    return f"{insert} ON CONFLICT ({', '.join(dimensions)}) DO UPDATE SET {added}"


_ADD_TO_TOTAL = _upsert(UsageTotal._meta.db_table, _DIMENSIONS, _SUMS)
_ADD_REFUSAL = _upsert(RefusedCalls._meta.db_table, ["hour", "key_id", "status", "code"], ["count"])


def store(rows: Sequence[Row]) -> int:
    """Insert what is not there yet and add it to the totals, in one transaction. How many were new. Raises DatabaseError."""
    stored = 0
    for start in range(0, len(rows), BATCH):
        batch = {row["request_id"]: row for row in rows[start : start + BATCH]}
        ordered = sorted(batch.values(), key=lambda row: (row["at"], row["request_id"]))
        with transaction.atomic():
            new = _insert(ordered)
            known = [row for row in ordered if row["request_id"] not in new]
            fresh = [row for row in ordered if row["request_id"] in new]
            if known:
                corrections = _corrections(known)
                inserted = _insert(corrections) if corrections else set()
                fresh += [row for row in corrections if row["request_id"] in inserted]
            _add_to_totals(fresh)
        stored += len(fresh)
    return stored


def ship(folder: Path) -> int:
    """Store every settled record that can be read in a journal, alive or dead, and delete nothing. How many were new."""
    stored = 0
    for segment in journal.segments(folder):
        try:
            stored += store([row_of(record) for record, _ in journal.read(segment) if isinstance(record, Settled)])
        except FileNotFoundError:
            continue  # its worker has shipped and deleted it meanwhile
    return stored


def adopt(folder: Path) -> int | None:
    """Store all of a dead worker's journal, what was interrupted included, and delete it. None when its worker lives."""
    descriptor = journal.lock(folder)
    if descriptor is None:
        return None
    try:
        records, damaged = _all_of(folder)
        settled = [record for record in records if isinstance(record, Settled)]
        waiting = {record.request_id: record for record in records if isinstance(record, Admitted)}
        for record in settled:
            waiting.pop(record.request_id, None)
        stored = store([row_of(record) for record in settled] + [_interrupted(record) for record in waiting.values()])
    except BaseException:
        os.close(descriptor)  # not stored: the next round, or another worker, tries again
        raise
    if waiting:
        log.warning("Adopted the journal of a worker that died: %s requests were interrupted", len(waiting))
    if damaged:
        log.error(
            "A journal was damaged in the middle. What could be read is stored; the rest is kept in %s",
            journal.set_aside(folder, descriptor),
        )
    else:
        journal.remove(folder, descriptor)
    return stored


def adopt_all(root: Path) -> int:
    """Adopt whatever dead workers left."""
    return sum(adopt(folder) or 0 for folder in journal.folders(root))


def row_of(record: Settled) -> Row:
    """A usage row as the database has it. Times are cut to the millisecond that the request id carries."""
    return {
        "request_id": uuid.UUID(record.request_id),
        "at": _moment(record.at),
        "organization_id": record.organization,
        "team_id": record.team,
        "user_id": record.user,
        "key_id": record.key,
        "credential_id": record.credential,
        "endpoint": record.endpoint[:40],
        "model": _text(record.model),
        "served_model": _text(record.served_model),
        "provider": record.provider[:40],
        "status": record.status,
        "error": record.error[:100],
        "stream": record.stream,
        "attempts": record.attempts,
        "fresh_input": record.fresh_input,
        "cache_read": record.cache_read,
        "cache_write": record.cache_write,
        "output": record.output,
        "reasoning": record.reasoning,
        "cost": None if record.cost is None else min(record.cost, MOST_COST),
        "price_id": record.price,
        "usage_source": record.usage_source,
        "first_byte_ms": record.first_byte_ms,
        "duration_ms": record.duration_ms,
        "corrects": None,
    }


def spent_in(budgets: Iterable[Budget], now: float) -> dict[tuple[Budget, float], int]:
    """Micro-dollars that the totals hold for the current window of each budget."""
    spent: dict[tuple[Budget, float], int] = {}
    for budget in budgets:
        scope, window, time_zone = budget
        start = window_start(window, time_zone, now)
        of_scope = UsageTotal.objects.filter(slot__gte=datetime.fromtimestamp(start, UTC), **_scope_filter(scope))
        spent[(budget, start)] = of_scope.aggregate(total=Sum("cost"))["total"] or 0
    return spent


def store_refusals(counts: dict[Refusal, int]) -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.executemany(
            _ADD_REFUSAL,
            [
                (_as_stored(datetime.fromtimestamp(hour, UTC)), key, status, code[:100], count)
                for (hour, key, status, code), count in sorted(counts.items())
            ],
        )


class Ledger(threading.Thread):
    """Ships the journal of this process, in a thread with a connection of its own.

    On SQLite it is the one that checkpoints the write-ahead log."""

    def __init__(self, own: Journal, root: Path, refusals: Refusals) -> None:
        super().__init__(name="sluice-ledger", daemon=True)
        self._own, self._root, self._refusals = own, root, refusals
        self.shipping = threading.RLock()  # held: nothing of this process reaches the totals
        self._ending = threading.Event()
        self._used: dict[int, datetime] = {}

    def run(self) -> None:
        adopted = flushed = checkpointed = time.monotonic()
        while not self._ending.wait(SHIP_EVERY_SECONDS):
            now = time.monotonic()
            try:
                self.ship()
                if now - flushed >= FLUSH_REFUSALS_EVERY_SECONDS:
                    self._flush()
                    flushed = now
                if now - adopted >= ADOPT_EVERY_SECONDS:
                    adopt_all(self._root)
                    adopted = now
                if now - checkpointed >= CHECKPOINT_EVERY_SECONDS:
                    checkpoint()
                    checkpointed = now
            except Exception:
                # Nothing is lost: the journal keeps it, and the cursor has not moved.
                log.exception("Usage could not be stored; it stays in the journal")
                connection.close()
                self._ending.wait(2.0)
        connection.close()

    def stop(self) -> None:
        """Ship what is left and end."""
        self._ending.set()
        self.join(timeout=10)
        self.ship()
        self._flush()
        checkpoint()

    def ship(self, until: tuple[int, int] | None = None) -> int:
        """Store what our journal holds, up to a position if one is given. How many rows were new. Raises DatabaseError."""
        with self.shipping:
            last, offset = until or self._own.position()
            stored = 0
            while self._own.shipped < (last, offset):
                number, start = self._own.shipped
                stored += self._ship_segment(number, start, offset if number == last else None)
                if number == last:
                    break
                self._own.drop(number)
                self._own.shipped = (number + 1, 0)
            return stored

    def _ship_segment(self, number: int, start: int, until: int | None) -> int:
        read = list(journal.read(self._own.segment(number), start, until))
        rows = [row_of(record) for record, _ in read if isinstance(record, Settled)]
        stored = store(rows)
        if read:
            self._own.shipped = (number, read[-1][1])
        for row in rows:
            self._used[row["key_id"]] = max(row["at"], self._used.get(row["key_id"], row["at"]))
        return stored

    def _flush(self) -> None:
        used, self._used = self._used, {}
        for key_id, at in used.items():
            ApiKey.objects.filter(pk=key_id).exclude(last_used_at__gte=at).update(last_used_at=at)
        counts = self._refusals.take()
        try:
            if counts:
                store_refusals(counts)
        except Exception:
            self._refusals.give_back(counts)
            raise


def checkpoint() -> None:
    """Move SQLite's write-ahead log into the database file. One thread alone does this."""
    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA wal_checkpoint(PASSIVE)")


def _all_of(folder: Path) -> tuple[list[Record], bool]:
    """Every record that can be read, and whether more than a torn tail could not."""
    records: list[Record] = []
    damaged = False
    for segment in journal.segments(folder):
        end = 0
        for record, end in journal.read(segment):  # noqa: B007 the last offset is used below
            records.append(record)
        damaged = damaged or not journal.is_torn(segment, end)
    return records, damaged


def _interrupted(record: Admitted) -> Row:
    """The worker died with this request open: its input is estimated, and it is never free of charge."""
    return row_of(
        Settled(
            request_id=record.request_id,
            at=record.at,
            organization=record.organization,
            team=record.team,
            user=record.user,
            key=record.key,
            model=record.model,
            endpoint=record.endpoint,
            stream=record.stream,
            status=500,
            error=INTERRUPTED,
            attempts=1,
            served_model=record.served_model,
            provider=record.provider,
            credential=record.credential,
            fresh_input=record.input_estimate,
            cost=record.cost_estimate,
            price=record.price,
            usage_source=UsageSource.ESTIMATED,
        )
    )


def _insert(rows: Sequence[Row]) -> set[uuid.UUID]:
    """The ids of those that were not there yet."""
    if not rows:
        return set()
    values = [[row[name] for name in _COLUMNS] for row in rows]
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(_STAGE)
            with cursor.copy(_COPY) as copy:
                for value in values:
                    copy.write_row(value)
            cursor.execute(_FROM_STAGE)
            new = {found[0] for found in cursor.fetchall()}
            cursor.execute("TRUNCATE usage_staging")
            return new
    # Elsewhere there is one writer at a time: what is not there now cannot appear before we commit.
    ids = [row["request_id"] for row in rows]
    known = set(UsageEvent.objects.filter(pk__in=ids).values_list("pk", flat=True))
    fields = UsageEvent._meta.concrete_fields
    adapted = [
        [field.get_db_prep_save(row[str(field.column)], connection) for field in fields] for row in rows if row["request_id"] not in known
    ]
    if adapted:
        with connection.cursor() as cursor:
            cursor.executemany(_INSERT, adapted)
    return set(ids) - known


_PARTS = ("fresh_input", "cache_read", "cache_write", "output", "reasoning")


def _corrections(known: Sequence[Row]) -> list[Row]:
    """A settlement that turns up after its request was written off as interrupted: the difference, as a row of its own."""
    settled = {row["request_id"]: row for row in known if row["error"] != INTERRUPTED}
    written_off = UsageEvent.objects.filter(at__in=[row["at"] for row in known], pk__in=list(settled), error=INTERRUPTED, corrects=None)
    corrections = []
    for before in written_off:
        row = dict(settled[before.request_id])
        row["corrects"] = before.request_id
        # Derived from the request's own id, so that the same correction cannot be made twice.
        row["request_id"] = uuid.UUID(int=before.request_id.int ^ (1 << 61))
        for part in _PARTS:
            row[part] -= getattr(before, part)
        row["cost"] = None if row["cost"] is None else row["cost"] - (before.cost or 0)
        corrections.append(row)
    return corrections


def _add_to_totals(rows: Iterable[Row]) -> None:
    sums: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        slot = row["at"].replace(minute=row["at"].minute // 15 * 15, second=0, microsecond=0)
        model = row["served_model"] or row["model"]
        who = (row["organization_id"], row["team_id"] or 0, row["user_id"], row["key_id"], row["credential_id"] or 0)
        into = sums.setdefault((_as_stored(slot), *who, row["provider"], model), [0] * len(_SUMS))
        corrects = row["corrects"] is not None
        amounts = [
            0 if corrects else 1,
            (-1 if row["status"] < 400 else 0) if corrects else int(row["status"] >= 400),
            0 if corrects else int(row["cost"] is None),
            (-1 if row["usage_source"] != UsageSource.ESTIMATED else 0) if corrects else int(row["usage_source"] == UsageSource.ESTIMATED),
            *(row[part] for part in _PARTS),
            row["cost"] or 0,
        ]
        for index, amount in enumerate(amounts):
            into[index] += amount
    if sums:
        with connection.cursor() as cursor:
            cursor.executemany(_ADD_TO_TOTAL, [(*dimensions, *amounts) for dimensions, amounts in sorted(sums.items())])


def _scope_filter(scope: str) -> dict[str, int]:
    kind, _, number = scope.partition(":")
    if kind == "user":
        user, _, organization = number.partition("@")
        return {"user_id": int(user), "organization_id": int(organization)}
    return {f"{kind}_id": int(number)}


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds // 1000, UTC).replace(microsecond=milliseconds % 1000 * 1000)


def _as_stored(moment: datetime) -> Any:
    return connection.ops.adapt_datetimefield_value(moment)


def _text(value: str) -> str:
    """Postgres takes no NUL, and a name may be longer than its column."""
    return value.replace("\0", "")[:240]
