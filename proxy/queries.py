"""Reads of usage. An organization always comes first; `usage_rows`, for the operator's command, is the one exception.

Figures come from the tables of sums: of a whole organization from the one without keys, of long windows of keys from whole
days, with their ends cut from quarters of an hour. The log itself is read by keyset, a page at a time, within a window of
time, and is never counted.
"""

from __future__ import annotations

import uuid
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from django.db.models import Exists, Max, Model, Q, QuerySet, Sum, Value
from django.db.models.functions import TruncDay
from django.utils import timezone

from accounts.models import ApiKey, Limit, Membership, Metric, Organization, User
from accounts.principal import ID_LENGTH
from providers.models import Credential
from proxy.models import KeyDay, KeyTotal, ModelTotal, RefusedCalls, Rest, UsageEvent, UsageTotal
from proxy.stores.health import EJECT_AFTER
from proxy.stores.limits import window_start
from proxy.totals import any_of, first_whole_day, midnight_of

QUARTER = timedelta(minutes=15)
MONTH = timedelta(days=30)
PAGE_ROWS = 50
MOST_GROUPS = 1000
SHADOW = "shadow:"
TOKEN_PARTS = ("fresh_input", "cache_read", "cache_write", "output", "reasoning")  # disjoint
_CHUNK_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Sums:
    """Requests, disjoint parts of tokens, and micro-dollars of the priced ones. `unpriced` requests are in no `cost`."""

    requests: int = 0
    errors: int = 0
    unpriced: int = 0
    estimated: int = 0
    fresh_input: int = 0
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0
    cost: int = 0

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    @property
    def input_tokens(self) -> int:
        return self.fresh_input + self.cache_read + self.cache_write

    @property
    def output_tokens(self) -> int:
        return self.output + self.reasoning

    @property
    def is_unpriced(self) -> bool:
        """Nothing of what was used had a price: its cost is unknown, and not 0."""
        return self.unpriced > 0 and self.cost == 0

    @property
    def estimated_share(self) -> float:
        """Between 0 and 1."""
        return min(1.0, max(0.0, self.estimated / self.requests)) if self.requests > 0 else 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in SUMS))


SUMS = tuple(field.name for field in fields(Sums))


@dataclass(frozen=True, slots=True)
class KeyTotals:
    """What one key used in the last 24 hours and the last 30 days."""

    day: Sums = Sums()
    month: Sums = Sums()


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time up to now, and into what steps a chart cuts it."""

    name: str
    title: str
    steps: int
    step_hours: int


SPANS = {
    span.name: span
    for span in (
        Span("24h", "24 hours", steps=24, step_hours=1),
        Span("7d", "7 days", steps=28, step_hours=6),
        Span("30d", "30 days", steps=30, step_hours=24),
    )
}


@dataclass(frozen=True, slots=True)
class Bucket:
    """One step of a chart. Both ends are in the organization's time zone."""

    starts_at: datetime
    ends_at: datetime
    sums: Sums

    @property
    def label(self) -> str:
        """Mon 16 Nov, 06:00; without the time where a step is a day."""
        whole_day = self.ends_at.date() > self.starts_at.date() and self.starts_at.time() == self.ends_at.time()
        return self.starts_at.strftime("%a %-d %b" if whole_day else "%a %-d %b, %H:%M")


@dataclass(frozen=True, slots=True)
class Group:
    """A line of a breakdown: the sums of one model, one key or one day."""

    name: str
    sums: Sums
    provider: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """How often calls were refused with one code. `shadow` ones went through: the limit only counts."""

    status: int
    code: str
    count: int
    last_hour: datetime
    shadow: bool


@dataclass(frozen=True, slots=True)
class Budget:
    """A money limit with what was spent in its current window, in micro-dollars. `ends_at` is None for `total`."""

    limit: Limit
    spent: int
    starts_at: datetime | None
    ends_at: datetime | None

    @property
    def share(self) -> float:
        """0 = nothing spent, 1 = all of it, more = over."""
        return self.spent / self.limit.amount if self.limit.amount else 1.0


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the log: rows older than it come next."""

    at: datetime
    request_id: uuid.UUID

    def __str__(self) -> str:
        return f"{_microseconds(self.at)}-{self.request_id.hex}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Raises ValueError."""
        moment, _, request_id = text.partition("-")
        try:
            return cls(datetime.fromtimestamp(0, UTC) + timedelta(microseconds=int(moment)), uuid.UUID(request_id))
        except (ValueError, OverflowError):
            raise ValueError(f"'{text[:100]}' is not a cursor that a page of the log gave.") from None


@dataclass(frozen=True, slots=True)
class Page:
    """Rows of the log, newest first. `older` is None on the last page."""

    rows: Sequence[UsageEvent]
    older: Cursor | None


def zone_of(organization: Organization) -> ZoneInfo:
    """A name that has meanwhile left the time zone database counts as UTC."""
    try:
        return ZoneInfo(organization.time_zone)
    except (KeyError, ValueError, OSError):  # unknown, malformed, or a folder of zones
        return ZoneInfo("UTC")


def totals_by_key(organization: Organization, key_ids: Collection[int], now: datetime) -> dict[int, KeyTotals]:
    """One query for all keys, over the same windows as on one key's page. A key that was not used is absent."""
    whose = _whose(organization, None, key_ids)
    spans = (("day", SPANS["24h"]), ("month", SPANS["30d"]))
    parts = [_cut(KeyTotal, whose, since=since_of(span, organization, now), part=part) for part, span in spans]
    found: dict[int, dict[str, Sums]] = {}
    for row in _summed([*parts[0], *parts[1]], "key_id", "part"):
        totals_of = found.setdefault(row["key_id"], {"day": Sums(), "month": Sums()})
        totals_of[row["part"]] += _sums(row, "all_")
    return {key_id: KeyTotals(**totals_of) for key_id, totals_of in found.items()}


def totals(
    organization: Organization,
    *,
    since: datetime,
    until: datetime | None = None,
    user_id: int | None = None,
    key_ids: Collection[int] | None = None,
) -> Sums:
    """Everything in the window, or what one person's keys or some keys had of it."""
    if user_id is None and key_ids is None:
        found = _quarters(ModelTotal, {"organization_id": organization.pk}, since, until)
        return _sums(found.aggregate(**{f"all_{name}": Sum(name) for name in SUMS}), "all_")
    parts = _cut(KeyTotal, _whose(organization, user_id, key_ids), since=since, until=until)
    return sum((_sums(row, "all_") for row in _summed(parts, "part")), Sums())


def totals_by(
    organization: Organization,
    group: str,
    *,
    since: datetime,
    until: datetime | None = None,
    user_id: int | None = None,
    key_ids: Collection[int] | None = None,
) -> list[Group]:
    """By "model", "key" (its number) or "day" (in the organization's time zone); at most MOST_GROUPS.

    Days come in their order, the others by what they cost."""
    whole = user_id is None and key_ids is None
    whose = _whose(organization, user_id, key_ids)
    if group == "day":
        # Of quarters of an hour, since a day of the organization is no day in UTC.
        quarters = _quarters(ModelTotal if whole else KeyTotal, whose, since, until)
        days = _summed([quarters.annotate(day=TruncDay("slot", tzinfo=zone_of(organization)))], "day")
        ordered = sorted(days, key=lambda row: row["day"])[:MOST_GROUPS]
        return [Group(name=row["day"].date().isoformat(), sums=_sums(row, "all_")) for row in ordered]
    if group == "key":
        return _by_cost(_cut(KeyTotal, whose, since=since, until=until), "key_id")
    if whole:
        return _by_cost([_quarters(ModelTotal, whose, since, until)], "model", "provider")
    return _by_cost(_cut(UsageTotal, whose, since=since, until=until), "model", "provider")


def _by_cost(parts: Sequence[QuerySet[Any]], *columns: str) -> list[Group]:
    found: dict[tuple[Any, ...], Sums] = {}
    for row in _summed(parts, *columns):
        name = tuple(row[column] for column in columns)
        found[name] = found.get(name, Sums()) + _sums(row, "all_")
    ordered = sorted(found.items(), key=lambda one: (-one[1].cost, -one[1].requests, one[0]))
    return [Group(str(name[0]), sums, *name[1:]) for name, sums in ordered[:MOST_GROUPS]]


def starts_of(span: Span, zone: ZoneInfo, now: datetime) -> list[datetime]:
    """The moments at which the steps of a chart begin, oldest first; the last one holds `now`."""
    local = now.astimezone(zone)
    if span.step_hours == 1:
        # Counted in real hours, so that the hour that a clock repeats or skips is right.
        last = now - timedelta(minutes=local.minute, seconds=local.second, microseconds=local.microsecond)
        return [(last - timedelta(hours=back)).astimezone(zone) for back in reversed(range(span.steps))]
    # Counted on the wall: a day begins at midnight also when it has 23 or 25 hours.
    hour = local.hour // span.step_hours * span.step_hours
    last = datetime.combine(local.date(), time(hour))
    walls = [last - timedelta(hours=back * span.step_hours) for back in reversed(range(span.steps))]
    return [wall.replace(tzinfo=zone).astimezone(UTC).astimezone(zone) for wall in walls]


def series(organization: Organization, key_id: int, span: Span, now: datetime) -> list[Bucket]:
    """A key's usage in equal steps up to now, empty ones included."""
    zone = zone_of(organization)
    starts = starts_of(span, zone, now)
    filled = [Sums() for _ in starts]
    rows = (
        _quarters(KeyTotal, _whose(organization, None, [key_id]), starts[0], None)
        .values("slot")
        .annotate(**{f"all_{name}": Sum(name) for name in SUMS})
        .order_by("slot")
    )
    for row in rows:
        index = bisect_right(starts, row["slot"]) - 1
        filled[index] += _sums(row, "all_")
    ends = [*starts[1:], _end_of_step(starts[-1], span, zone)]
    return [Bucket(start, end, sums) for start, end, sums in zip(starts, ends, filled, strict=True)]


def since_of(span: Span, organization: Organization, now: datetime) -> datetime:
    """When a span begins: the same moment for the list of keys, and for the chart, the breakdown and the log of one."""
    return starts_of(span, zone_of(organization), now)[0]


def recent_requests(
    organization: Organization,
    key_id: int,
    *,
    since: datetime,
    until: datetime | None = None,
    before: Cursor | None = None,
    rows: int = PAGE_ROWS,
) -> Page:
    """A key's requests in a window, newest first, by keyset: each page costs the same, however long the log is."""
    found = UsageEvent.objects.filter(_of_key(organization, key_id), at__gte=since)
    if until is not None:
        found = found.filter(at__lt=until)
    if before is not None:
        found = found.filter(Q(at__lt=before.at) | Q(at=before.at, request_id__lt=before.request_id), at__lte=before.at)
    page = list(found.order_by("-at", "-request_id")[: rows + 1])
    last = page[rows - 1] if len(page) > rows else None
    return Page(page[:rows], Cursor(last.at, last.request_id) if last else None)


def request_of(organization: Organization, key_id: int, request_id: uuid.UUID) -> UsageEvent | None:
    """One row of a key's log."""
    return UsageEvent.objects.of_requests([request_id]).filter(_of_key(organization, key_id)).first()


def corrections_of(organization: Organization, event: UsageEvent) -> list[UsageEvent]:
    """What was learned of a request after its row was written, as differences. They are of the same moment."""
    mine = UsageEvent.objects.filter(_of_key(organization, event.key_id), at=event.at, corrects=event.request_id)
    return list(mine.order_by("request_id"))


def accounts_shown_to(place: Membership) -> QuerySet[Credential]:
    """Upstream accounts that the viewer may know by name: an operator all, an owner or admin the organization's own, nobody else any.

    Of the others the log says no more than their provider."""
    if place.user.is_superuser:
        return Credential.objects.all()
    return Credential.objects.filter(organization=place.organization) if place.manages else Credential.objects.none()


def labels_shown_to(place: Membership, events: Sequence[UsageEvent]) -> dict[int, str]:
    """Of the accounts that these requests went to, those that the viewer may know by name, by their number."""
    numbers = {event.credential_id for event in events if event.credential_id is not None}
    numbers |= {one["credential"] for event in events for one in event.tried or ()}
    return dict(accounts_shown_to(place).filter(pk__in=numbers).values_list("pk", "label"))


def refused_calls(organization: Organization, key_id: int, *, since: datetime, until: datetime | None = None) -> list[Refused]:
    """Why a key's calls were refused, the most frequent first. Counted by the hour in which `since` lies."""
    hour = since.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    rows = (
        RefusedCalls.objects.filter(Q() if until is None else Q(hour__lt=until), key_id__in=_own(organization, [key_id]), hour__gte=hour)
        .values("status", "code")
        .annotate(total=Sum("count"), last_hour=Max("hour"))
        .order_by("-total", "code")
    )
    return [
        Refused(row["status"], row["code"].removeprefix(SHADOW), row["total"], row["last_hour"], shadow=row["code"].startswith(SHADOW))
        for row in rows
    ]


def limits_on(organization: Organization, key: ApiKey) -> list[Limit]:
    """Every limit that a call with this key meets: its own, its owner's, its team's and the organization's, in this order."""
    whole = Q(key=None, user=None, team=None)
    scope = whole | Q(key=key) | Q(user=key.user_id)
    if key.team_id:
        scope |= Q(team=key.team_id)
    found = Limit.objects.filter(scope, organization=organization).select_related("user", "team")
    order = [Metric.MONEY, Metric.REQUESTS, Metric.TOKENS, Metric.CONCURRENCY]
    return sorted(
        found, key=lambda limit: (not limit.key_id, not limit.user_id, not limit.team_id, order.index(Metric(limit.metric)), limit.pk)
    )


def budgets(organization: Organization, limits: Iterable[Limit], now: datetime) -> list[Budget]:
    """The money limits among these with what their scope spent in the current window. Two queries for all of them."""
    money = [limit for limit in limits if limit.metric == Metric.MONEY and limit.organization_id == organization.pk]
    if not money:
        return []
    zone = zone_of(organization)
    starts = [datetime.fromtimestamp(window_start(limit.window, zone.key, now.timestamp()), UTC) for limit in money]
    days = [first_whole_day(start) for start in starts]
    # Days of the windows, and what lies before the first whole one of them, in one table each.
    whole = {
        f"spent_{number}": Sum("cost", filter=Q(day__gte=day.date()) & _scope(limit))
        for number, (limit, day) in enumerate(zip(money, days, strict=True))
    }
    ends = {
        f"spent_{number}": Sum("cost", filter=Q(slot__gte=start, slot__lt=day) & _scope(limit))
        for number, (limit, start, day) in enumerate(zip(money, starts, days, strict=True))
    }
    cut = any_of(Q(slot__gte=start, slot__lt=day) for start, day in set(zip(starts, days, strict=True)) if start < day)
    of_days = KeyDay.objects.filter(organization_id=organization.pk, day__gte=min(days).date()).aggregate(**whole)
    of_ends = KeyTotal.objects.filter(cut, organization_id=organization.pk).aggregate(**ends)
    spent = {name: (of_days[name] or 0) + (of_ends[name] or 0) for name in whole}
    return [
        Budget(
            limit=limit,
            spent=spent[f"spent_{number}"],
            starts_at=None if limit.window == "total" else start,
            ends_at=_end_of_window(limit.window, start, zone),
        )
        for number, (limit, start) in enumerate(zip(money, starts, strict=True))
    ]


USAGE_COLUMNS = [
    "request_id",
    "at",
    "organization",
    "user",
    "key",
    "model",
    "served_model",
    "provider",
    "credential",
    "status",
    "error",
    "stream",
    "attempts",
    "input_tokens",
    "cached_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
    "cost_usd",
    "usage_source",
    "first_byte_ms",
    "duration_ms",
    "upstream_cost_usd",
]


def usage_rows(since: datetime | None = None, key: str | None = None) -> Iterator[dict[str, Any]]:
    """The log of every organization, the oldest row first, as flat rows of USAGE_COLUMNS. For the operator alone.

    `key` is a key's number or the id inside the key. `at` is ISO 8601 in UTC, `organization` a slug, `user` an e-mail,
    `key` and `credential` their names; `cost_usd` is None where there was no price,
    `upstream_cost_usd` where the upstream did not say. It reads in chunks, so that neither
    memory nor a transaction grows with the log."""
    found = UsageEvent.objects.order_by("at", "request_id")
    if since is not None:
        found = found.filter(at__gte=since)
    if key is not None:
        found = found.filter(key__in=_keys_named(key))
    names = _Names()
    for chunk in _in_chunks(found):
        names.learn(chunk)
        for event in chunk:
            yield _flat(event, names)


def columns_shown_to(place: Membership) -> list[str]:
    """Those of USAGE_COLUMNS that are this viewer's business: what a shared account is charged is the operators'."""
    return [name for name in USAGE_COLUMNS if name != "upstream_cost_usd" or place.user.is_superuser]


def key_rows(place: Membership, key_id: int, *, since: datetime, until: datetime) -> Iterator[list[dict[str, Any]]]:
    """One key's log within a window as `usage_rows` has it, a chunk at a time. An account that the viewer may not know by name
    has none."""
    found = UsageEvent.objects.filter(_of_key(place.organization, key_id), at__gte=since, at__lt=until)
    names = _Names()
    for chunk in _in_chunks(found.order_by("at", "request_id")):
        names.learn(chunk)
        labels = labels_shown_to(place, chunk)
        yield [{**_flat(event, names), "credential": labels.get(event.credential_id or 0, "")} for event in chunk]


def _in_chunks(found: QuerySet[UsageEvent]) -> Iterator[list[UsageEvent]]:
    """Rows in the order of (`at`, `request_id`), by keyset."""
    last: UsageEvent | None = None
    while True:
        rest = found
        if last is not None:
            rest = found.filter(Q(at__gt=last.at) | Q(at=last.at, request_id__gt=last.request_id), at__gte=last.at)
        chunk = list(rest[:_CHUNK_ROWS])
        if chunk:
            yield chunk
        if len(chunk) < _CHUNK_ROWS:
            return
        last = chunk[-1]


class _Names:
    """What the log's references are called. Each is looked up once; what is gone is shown by its number."""

    def __init__(self) -> None:
        self.organizations: dict[int, str] = {}
        self.users: dict[int, str] = {}
        self.keys: dict[int, str] = {}
        self.credentials: dict[int, str] = {}

    def learn(self, events: Sequence[UsageEvent]) -> None:
        self._learn(self.organizations, {event.organization_id for event in events}, Organization.objects.values_list("pk", "slug"))
        self._learn(self.users, {event.user_id for event in events}, User.objects.values_list("pk", "email"))
        self._learn(self.keys, {event.key_id for event in events}, ApiKey.objects.values_list("pk", "name"))
        credentials = {event.credential_id for event in events if event.credential_id is not None}
        self._learn(self.credentials, credentials, Credential.objects.values_list("pk", "label"))

    @staticmethod
    def _learn(known: dict[int, str], ids: set[int], names: QuerySet[Any, tuple[int, str]]) -> None:
        missing = ids - known.keys()
        if missing:
            known.update({number: str(number) for number in missing})
            known.update(names.filter(pk__in=missing))


def _flat(event: UsageEvent, names: _Names) -> dict[str, Any]:
    return {
        "request_id": str(event.request_id),
        "at": event.at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "organization": names.organizations[event.organization_id],
        "user": names.users[event.user_id],
        "key": names.keys[event.key_id],
        "model": event.model,
        "served_model": event.served_model,
        "provider": event.provider,
        "credential": names.credentials[event.credential_id] if event.credential_id is not None else "",
        "status": event.status,
        "error": event.error,
        "stream": event.stream,
        "attempts": event.attempts,
        "input_tokens": event.input_tokens,
        "cached_tokens": event.cache_read,
        "cache_write_tokens": event.cache_write,
        "output_tokens": event.output_tokens,
        "reasoning_tokens": event.reasoning,
        "cost_usd": None if event.cost is None else event.cost / 1_000_000,
        "usage_source": event.usage_source,
        "first_byte_ms": event.first_byte_ms,
        "duration_ms": event.duration_ms,
        "upstream_cost_usd": None if event.upstream_cost is None else event.upstream_cost / 1_000_000,
    }


def _keys_named(name: str) -> list[int]:
    if name.isascii() and name.isdigit() and len(name) < ID_LENGTH:
        return [int(name)]
    return list(ApiKey.objects.filter(handle=name).values_list("pk", flat=True))


def _whose(organization: Organization, user_id: int | None, key_ids: Collection[int] | None) -> dict[str, Any]:
    """The rows of a whole organization, of some of its keys, or of all keys of a person. Keys are how the tables are indexed."""
    if key_ids is not None:
        return {"key_id__in": _own(organization, key_ids)}
    if user_id is not None:
        return {"key_id__in": ApiKey.objects.filter(organization=organization, user=user_id).values("pk")}
    return {"organization_id": organization.pk}


def _quarters(table: type[Model], whose: Mapping[str, Any], since: datetime, until: datetime | None) -> QuerySet[Any]:
    found = table._default_manager.filter(slot__gte=quarter(since), **whose)
    return found if until is None else found.filter(slot__lt=until)


def _cut(
    table: type[Model], whose: Mapping[str, Any], *, since: datetime, until: datetime | None = None, part: str = ""
) -> list[QuerySet[Any]]:
    """A window in parts that do not overlap: its whole days in UTC, and before and behind them quarters of an hour, which the
    table has. `part` goes along as a column."""
    start = quarter(since)
    first, last = first_whole_day(start), None if until is None else midnight_of(until)
    found: list[QuerySet[Any]] = []
    if last is not None and last <= first:
        found.append(_quarters(table, whose, start, until))
    else:
        if start < first:
            found.append(_quarters(table, whose, start, first))
        if last is not None and until is not None and last < until:
            found.append(_quarters(table, whose, last, until))
        days = KeyDay.objects.filter(day__gte=first.date(), **whose)
        found.append(days if last is None else days.filter(day__lt=last.date()))
    return [rows.annotate(part=Value(part)) for rows in found]


def _summed(parts: Sequence[QuerySet[Any]], *columns: str) -> Iterable[dict[str, Any]]:
    """One query for all parts; a group may come once of each."""
    sums = {f"all_{name}": Sum(name) for name in SUMS}
    first, *others = [rows.values(*columns).annotate(**sums).order_by() for rows in parts]
    together: Iterable[dict[str, Any]] = first.union(*others, all=True) if others else first
    return together


def _own(organization: Organization, key_ids: Collection[int]) -> QuerySet[ApiKey, Any]:
    """Those of the keys that are the organization's. Asked of the keys, not of the rows: with the organization as one more
    condition on them, SQLite walks through all that the organization used to find what one key did."""
    return ApiKey.objects.filter(organization=organization, pk__in=list(key_ids)).values("pk")


def _of_key(organization: Organization, key_id: int) -> Q:
    """Rows of one key, where it is the organization's. The key stands there as a number, and is asked for apart: so SQLite takes the
    rows in the order of their index, where it would sort all of a list's, and Postgres knows how rare they are."""
    return Q(Exists(_own(organization, [key_id])), key=key_id)


def _scope(limit: Limit) -> Q:
    if limit.key_id:
        return Q(key_id=limit.key_id)
    if limit.user_id:
        return Q(user_id=limit.user_id)
    return Q(team_id=limit.team_id) if limit.team_id else Q(organization_id=limit.organization_id)


def _end_of_step(start: datetime, span: Span, zone: ZoneInfo) -> datetime:
    if span.step_hours == 1:
        return (start.astimezone(UTC) + timedelta(hours=1)).astimezone(zone)
    return (start.replace(tzinfo=None) + timedelta(hours=span.step_hours)).replace(tzinfo=zone).astimezone(UTC).astimezone(zone)


def _end_of_window(window: str, start: datetime, zone: ZoneInfo) -> datetime | None:
    if window == "total":
        return None
    first = start.astimezone(zone).replace(tzinfo=None)
    if window == "month":
        end = (first.replace(day=1) + timedelta(days=32)).replace(day=1)
    else:
        end = first + timedelta(days=7 if window == "week" else 1)
    return end.replace(tzinfo=zone).astimezone(UTC)


def _sums(row: Mapping[str, Any], prefix: str) -> Sums:
    return Sums(*(row[prefix + name] or 0 for name in SUMS))


# For operators: which accounts rest


def resting() -> QuerySet[Rest]:
    """Those of whole accounts come first. Without those that are over, and wait for a trial."""
    return Rest.objects.filter(until__gt=timezone.now()).select_related("credential").order_by("model", "credential_id")


def why_it_rests(rest: Rest) -> str:
    """Who chose it, and for what, in words."""
    if not rest.times:
        return f"{'as the upstream asked' if rest.named else 'our choice'}{f': {rest.reason}' if rest.reason else ''}"
    failed = f", and {rest.times - 1} trial{'s' if rest.times > 2 else ''} failed" if rest.times > 1 else ""
    return f"{EJECT_AFTER} errors in a row{failed}{'' if rest.until > timezone.now() else '; the next call finds out'}"


def quarter(moment: datetime) -> datetime:
    """The start of its quarter of an hour, in UTC."""
    utc = moment.astimezone(UTC)
    return utc.replace(minute=utc.minute // 15 * 15, second=0, microsecond=0)


def _microseconds(moment: datetime) -> int:
    return (moment - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)
