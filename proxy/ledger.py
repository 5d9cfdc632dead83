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
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
from django.db import connection, transaction

from accounts.models import ApiKey
from proxy import journal, totals
from proxy.call import milliseconds_of
from proxy.journal import Admitted, Journal, Record, Settled
from proxy.models import RefusedCalls, UsageEvent, UsageSource
from proxy.refusals import Refusal, Refusals
from proxy.stores.limits import Budget, Hold, window_start
from proxy.totals import QUARTER_MS, SUMS, stored_moment

log = logging.getLogger(__name__)

BATCH = 500
SHIP_EVERY_SECONDS = 0.5
ADOPT_EVERY_SECONDS = 15.0
TRY_AGAIN_SECONDS = 1.0
FLUSH_REFUSALS_EVERY_SECONDS = 2.0
CHECKPOINT_EVERY_SECONDS = 10.0
INTERRUPTED = "interrupted"
MOST_COST = 2**63 - 1  # what a row can hold


class Row(NamedTuple):
    """A usage row as the database has it, in the order of its columns. Ids and times are in the database's own form."""

    request_id: Any
    at: Any
    organization_id: int
    team_id: int | None
    user_id: int
    key_id: int
    credential_id: int | None
    endpoint: str
    model: str
    served_model: str
    provider: str
    status: int
    error: str
    stream: bool
    attempts: int
    fresh_input: int
    cache_read: int
    cache_write: int
    output: int
    reasoning: int
    cost: int | None
    price_id: int | None
    upstream_cost: int | None
    usage_source: str
    first_byte_ms: int | None
    duration_ms: int
    corrects: Any
    tried: str | None  # JSON
    milliseconds: int  # not a column: `at` as a number


# SQL is put together once, from the names of our own columns; values are always parameters.
_COLUMNS = Row._fields[:-1]
_NAMES = ", ".join(f'"{name}"' for name in _COLUMNS)
_TABLE = UsageEvent._meta.db_table
# A batch may wait longer than a page: said together with the first statement, it costs no way of its own.
_STAGE = "SET LOCAL statement_timeout = '30s'; " + (
    f'CREATE TEMPORARY TABLE IF NOT EXISTS usage_staging (LIKE "{_TABLE}") ON COMMIT DELETE ROWS'
)
_COPY = f"COPY usage_staging ({_NAMES}) FROM STDIN"
_INTO = f'INSERT INTO "{_TABLE}" ({_NAMES})'
# For SQLite, which is spoken to without Django's own rewriting of placeholders. Many rows in one statement: the interpreter's lock
# is given up and fought for once a statement, and the event loop wants it, too.
_ROWS_AT_ONCE = 50
_VALUES = f"({', '.join(['?'] * len(_COLUMNS))})"
_INSERT = {count: f"{_INTO} VALUES {', '.join([_VALUES] * count)} ON CONFLICT DO NOTHING" for count in (1, _ROWS_AT_ONCE)}
_FROM_STAGE = f"{_INTO} SELECT {_NAMES} FROM usage_staging ORDER BY at, request_id ON CONFLICT DO NOTHING RETURNING request_id"  # noqa: S608
_ADD_REFUSAL = totals.upsert(RefusedCalls._meta.db_table, ["hour", "key_id", "status", "code"], ["count"])


def store(rows: Sequence[Row]) -> int:
    """Insert what is not there yet and add it to the totals, in one transaction. How many were new. Raises DatabaseError."""
    return len(store_new(rows))


def store_new(rows: Sequence[Row]) -> list[Row]:
    """`store`, and those that were new."""
    stored: list[Row] = []
    for start in range(0, len(rows), BATCH):
        ordered = sorted({row.request_id: row for row in rows[start : start + BATCH]}.values(), key=_in_time)
        with transaction.atomic():
            fresh, known = _insert(ordered)
            if known:
                fresh += _insert(_corrections(known))[0]
            _add_to_totals(fresh)
        stored += fresh
    return stored


def ship(folder: Path) -> int:
    """Store every settled record that can be read in a journal, alive or dead, and delete nothing. How many were new."""
    stored = 0
    for segment in journal.segments(folder):
        try:
            stored += store(rows_of(journal.settlements(segment)[0]))
        except FileNotFoundError:
            continue  # its worker has shipped and deleted it meanwhile
    return stored


class Again(Protocol):
    """Settles once more, for limits that outlive a worker. When it raises, the journal stays for another try."""

    def first(self, worker: str) -> None:
        """Before anything of this dead worker's journal is stored."""

    def settle(self, worker: str, settled: Sequence[Settled], new: Collection[Any]) -> None:
        """What its journal holds; `new` are the ids (as stored) that were not in the totals before."""


def adopt(folder: Path, again: Again | None = None) -> int | None:
    """Store all of a dead worker's journal, what was interrupted included, and delete it. None when its worker lives."""
    descriptor = journal.lock(folder)
    if descriptor is None:
        return None
    try:
        if again is not None:
            again.first(folder.name)
        records, damaged = _all_of(folder)
        settled = [record for record in records if isinstance(record, Settled)]
        waiting = {record.request_id: record for record in records if isinstance(record, Admitted)}
        for record in settled:
            waiting.pop(record.request_id, None)
        settled += [_interrupted(record) for record in waiting.values()]
        stored = store_new(rows_of(settled))
        if again is not None:
            again.settle(folder.name, settled, {row.request_id for row in stored})
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
    return len(stored)


def adopt_all(root: Path, again: Again | None = None) -> int:
    """Adopt whatever dead workers left. A journal that cannot be read stays where it is, and keeps none of the others waiting."""
    adopted = 0
    for folder in journal.folders(root):
        try:
            adopted += adopt(folder, again) or 0
        except (OSError, msgspec.MsgspecError) as problem:  # it is another's file, or of a version that writes otherwise
            log.error("The journal %s cannot be adopted: %s", folder, problem)
    return adopted


# One settlement for the limits: the hold it ends, tokens, micro-dollars, and whether the totals did not have it before.
ToSettle = tuple[Hold, int, int | None, bool]


def to_settle(records: Iterable[Settled], new: Container[Any]) -> list[ToSettle]:
    vendor = connection.vendor
    return [
        (_hold(record), _tokens(record), 0 if record.cost is None else record.cost, _stored_id(record.request_id, vendor) in new)
        for record in records
    ]


def to_release(requests: Sequence[str]) -> list[ToSettle]:
    """Holds that no journal knows of: what their rows cost, and nothing for those that have none."""
    moments = [_moment(milliseconds_of(one)) for one in requests]  # or every month of the log would be searched
    costs = dict(UsageEvent.objects.filter(at__in=moments, pk__in=requests).values_list("pk", "cost"))
    held = [(Hold(one, milliseconds_of(one) / 1000, (), (), 0, None), costs.get(uuid.UUID(one), 0)) for one in requests]
    return [(hold, 0, cost, False) for hold, cost in held]


def _hold(record: Settled) -> Hold:
    scopes = [f"organization:{record.organization}", f"user:{record.user}@{record.organization}", f"key:{record.key}"]
    if record.team is not None:
        scopes.append(f"team:{record.team}")
    return Hold(record.request_id, record.at / 1000, tuple(scopes), (), 0, None)


def _tokens(record: Settled) -> int:
    return record.fresh_input + record.cache_read + record.cache_write + record.output + record.reasoning


def rows_of(records: Iterable[Settled]) -> list[Row]:
    """Usage rows as the database has them. Times are cut to the millisecond that the request id carries."""
    vendor = connection.vendor
    return [_row(record, vendor) for record in records]


def row_of(record: Settled) -> Row:
    return _row(record, connection.vendor)


def _row(record: Settled, vendor: str) -> Row:
    return Row(
        _stored_id(record.request_id, vendor),
        stored_moment(record.at, vendor),
        record.organization,
        record.team,
        record.user,
        record.key,
        record.credential,
        record.endpoint[:40],
        _text(record.model),
        _text(record.served_model),
        record.provider[:40],
        record.status,
        record.error[:100],
        record.stream,
        record.attempts,
        record.fresh_input,
        record.cache_read,
        record.cache_write,
        record.output,
        record.reasoning,
        None if record.cost is None else min(record.cost, MOST_COST),
        record.price,
        None if record.upstream_cost is None else min(record.upstream_cost, MOST_COST),
        record.usage_source,
        record.first_byte_ms,
        record.duration_ms,
        None,
        msgspec.json.encode(record.tried).decode() if record.tried else None,
        record.at,
    )


def spent_in(budgets: Iterable[Budget], now: float) -> dict[tuple[Budget, float], int]:
    """Micro-dollars that the totals hold for the current window of each budget."""
    by_start: dict[float, list[Budget]] = {}
    for budget in budgets:
        by_start.setdefault(window_start(budget[1], budget[2], now), []).append(budget)
    spent: dict[tuple[Budget, float], int] = {}
    for start, some in by_start.items():
        found = totals.spent_of((scope for scope, _, _ in some), datetime.fromtimestamp(start, UTC))
        spent |= {(budget, start): found[budget[0]] for budget in some}
    return spent


def store_refusals(counts: dict[Refusal, int]) -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.executemany(
            _ADD_REFUSAL,
            [
                (stored_moment(hour * 1000, connection.vendor), key, status, code[:100], count)
                for (hour, key, status, code), count in sorted(counts.items())
            ],
        )


Tell = Callable[[Collection[tuple[int, int, int]]], None]  # organization, key, its user


class Ledger(threading.Thread):
    """Ships the journal of this process, in a thread with a connection of its own.

    On SQLite it is the one that checkpoints the write-ahead log."""

    def __init__(self, own: Journal, root: Path, refusals: Refusals, tell: Tell = lambda used: None, again: Again | None = None) -> None:
        """`tell` hears, in the thread that ships, of what is stored now."""
        super().__init__(name="sluice-ledger", daemon=True)
        self._own, self._root, self._refusals, self._tell, self._again = own, root, refusals, tell, again
        self.shipping = threading.RLock()  # held: nothing of this process reaches the totals
        self._ending = threading.Event()
        self._used: dict[int, int] = {}  # milliseconds by key

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
                    with self.shipping:
                        adopt_all(self._root, self._again)
                    adopted = now
                if now - checkpointed >= CHECKPOINT_EVERY_SECONDS:
                    checkpoint()
                    checkpointed = now
            except Exception:
                # Nothing is lost: the journal keeps it, and the cursor has not moved.
                log.exception("Usage could not be stored; it stays in the journal")
                connection.close()
                self._ending.wait(TRY_AGAIN_SECONDS)
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
        settled, end = journal.settlements(self._own.segment(number), start, until)
        rows = rows_of(settled)
        stored = store(rows)
        self._own.shipped = (number, end)
        for row in rows:
            self._used[row.key_id] = max(row.milliseconds, self._used.get(row.key_id, 0))
        if rows:
            self._tell({(row.organization_id, row.key_id, row.user_id) for row in rows})
        return stored

    def _flush(self) -> None:
        used, self._used = self._used, {}
        for key_id, milliseconds in used.items():
            at = _moment(milliseconds)
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


def _interrupted(record: Admitted) -> Settled:
    """The worker died with this request open: its input is estimated, and it is never free of charge."""
    return Settled(
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


def _in_time(row: Row) -> tuple[int, Any]:
    return row.milliseconds, row.request_id


def _insert(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Those that were not there yet and now are, and those that were."""
    if not rows:
        return [], []
    if connection.vendor == "postgresql":
        new = _copy(rows)
        return _parted(rows, lambda row: row.request_id in new)
    before = transaction.savepoint()
    if _put(rows) == len(rows):
        transaction.savepoint_commit(before)
        return list(rows), []
    # Rare: some had been shipped before. There is one writer at a time: what is not there now cannot appear before we commit.
    transaction.savepoint_rollback(before)
    ids = [row.request_id for row in rows]
    known = {_stored_id(str(found), "sqlite") for found in UsageEvent.objects.filter(pk__in=ids).values_list("pk", flat=True)}
    fresh, old = _parted(rows, lambda row: row.request_id not in known)
    _put(fresh)
    return fresh, old


def _parted(rows: Sequence[Row], good: Callable[[Row], bool]) -> tuple[list[Row], list[Row]]:
    return [row for row in rows if good(row)], [row for row in rows if not good(row)]


def _copy(rows: Sequence[Row]) -> set[str]:
    with connection.cursor() as cursor:
        cursor.execute(_STAGE)
        with cursor.copy(_COPY) as copy:
            for row in rows:
                copy.write_row(row[:-1])
        cursor.execute(_FROM_STAGE)
        new = {str(found[0]) for found in cursor.fetchall()}
        cursor.execute("TRUNCATE usage_staging")
        return new


def _put(rows: Sequence[Row]) -> int:
    """Insert on SQLite what is not there yet. How many that were."""
    execute = connection.connection.execute
    put = start = 0
    for count in (_ROWS_AT_ONCE, 1):
        while len(rows) - start >= count:
            put += execute(_INSERT[count], [value for row in rows[start : start + count] for value in row[:-1]]).rowcount
            start += count
    return put


_PARTS = ("fresh_input", "cache_read", "cache_write", "output", "reasoning")


def _corrections(known: Sequence[Row]) -> list[Row]:
    """A settlement that turns up after its request was written off as interrupted: the difference, as a row of its own."""
    settled = {uuid.UUID(row.request_id): row for row in known if row.error != INTERRUPTED}
    moments = [_moment(row.milliseconds) for row in known]
    vendor, corrections = connection.vendor, []
    for before in UsageEvent.objects.filter(at__in=moments, pk__in=list(settled), error=INTERRUPTED, corrects=None):
        row = settled[before.request_id]
        # Derived from the request's own id, so that the same correction cannot be made twice.
        own_id = uuid.UUID(int=before.request_id.int ^ (1 << 61))
        parts = {part: getattr(row, part) - getattr(before, part) for part in _PARTS}
        cost = None if row.cost is None else row.cost - (before.cost or 0)
        corrections.append(row._replace(request_id=_stored_id(str(own_id), vendor), corrects=row.request_id, cost=cost, **parts))
    return corrections


def _add_to_totals(rows: Iterable[Row]) -> None:
    sums: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        who = (row.organization_id, row.team_id or 0, row.user_id, row.key_id, row.credential_id or 0)
        dimensions = (row.milliseconds // QUARTER_MS, *who, row.provider, row.served_model or row.model)
        into = sums.get(dimensions)
        if into is None:
            into = sums[dimensions] = [0] * len(SUMS)
        if row.corrects is None:
            into[0] += 1
            into[1] += row.status >= 400
            into[2] += row.cost is None
            into[3] += row.usage_source == UsageSource.ESTIMATED
        else:
            into[1] -= row.status < 400
            into[3] -= row.usage_source != UsageSource.ESTIMATED
        into[4] += row.fresh_input
        into[5] += row.cache_read
        into[6] += row.cache_write
        into[7] += row.output
        into[8] += row.reasoning
        into[9] += row.cost or 0
    totals.add(sums)


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds // 1000, UTC).replace(microsecond=milliseconds % 1000 * 1000)


def _stored_id(request_id: str, vendor: str) -> str:
    """SQLite has no type for it: Django keeps the digits."""
    return request_id.replace("-", "") if vendor == "sqlite" else request_id


@lru_cache(maxsize=1024)
def _text(value: str) -> str:
    """Postgres takes no NUL, and a name may be longer than its column."""
    return value.replace("\0", "")[:240]
