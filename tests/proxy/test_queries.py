"""Reads of usage: sums in the right steps, the log a page at a time, and nobody else's figures."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from accounts import actions
from accounts.models import ApiKey, Membership, Organization, Role
from accounts.policy import Allowance
from providers.models import Credential
from proxy import queries
from proxy.models import RefusedCalls, UsageEvent
from proxy.queries import SPANS, USAGE_COLUMNS, Cursor, Sums, usage_rows
from tests.accounts.conftest import People
from tests.proxy.used import used

NOW = datetime(2026, 6, 17, 13, 37, 12, tzinfo=UTC)


@pytest.fixture
def people(db: None) -> People:
    return People()


@pytest.fixture
def key(people: People) -> ApiKey:
    return people.key(people.bob)


def plan_of(sql: str) -> str:
    """How SQLite would go about it."""
    if connection.vendor != "sqlite":
        pytest.skip("Another database tells its plan in another way.")
    with connection.cursor() as cursor:
        cursor.execute("EXPLAIN QUERY PLAN " + sql)
        return " ".join(str(row[-1]) for row in cursor.fetchall())


# Sums


def test_totals_of_many_keys_take_one_query(people: People, django_assert_num_queries):
    keys = [people.key(people.bob, name=f"key {number}") for number in range(7)]
    for key in keys[:5]:
        used(key, NOW - timedelta(hours=3))
        used(key, NOW - timedelta(days=20), cost=None)

    with django_assert_num_queries(1):
        found = queries.totals_by_key(people.acme, [key.pk for key in keys], NOW)

    assert found.keys() == {key.pk for key in keys[:5]}
    assert found[keys[0].pk].day == Sums(requests=1, fresh_input=100, cache_read=20, cache_write=3, output=40, reasoning=7, cost=1500)
    assert (found[keys[0].pk].month.requests, found[keys[0].pk].month.unpriced, found[keys[0].pk].month.cost) == (2, 1, 1500)


def test_totals_end_where_their_window_does(people: People, key: ApiKey):
    used(key, NOW - timedelta(days=30, minutes=20))
    used(key, NOW - timedelta(days=1, minutes=20))

    [found] = queries.totals_by_key(people.acme, [key.pk], NOW).values()

    assert (found.day.requests, found.month.requests) == (0, 1)


def test_the_list_of_keys_and_one_keys_page_count_the_same_requests(people: People, key: ApiKey):
    for back in (timedelta(minutes=5), timedelta(hours=23, minutes=50), timedelta(days=29, hours=23)):
        used(key, NOW - back)

    [listed] = queries.totals_by_key(people.acme, [key.pk], NOW).values()

    for span, totals in (("24h", listed.day), ("30d", listed.month)):
        shown = queries.series(people.acme, key.pk, queries.SPANS[span], NOW)
        assert totals == sum((bucket.sums for bucket in shown), Sums()), span


def test_another_organization_sees_none_of_it(people: People, key: ApiKey):
    used(key)
    since = timezone.now() - timedelta(hours=1)

    assert queries.totals_by_key(people.rival, [key.pk], timezone.now()) == {}
    assert queries.totals(people.rival, since=since, key_ids=[key.pk]) == Sums()
    assert queries.totals_by(people.rival, "model", since=since) == []
    assert queries.recent_requests(people.rival, key.pk, since=since).rows == []
    assert all(bucket.sums == Sums() for bucket in queries.series(people.rival, key.pk, SPANS["24h"], timezone.now()))


def test_groups_by_model_cost_first_and_by_day_in_order(people: People, key: ApiKey):
    other = people.key(people.alice)
    used(key, NOW - timedelta(days=2), served_model="p/cheap", cost=1)
    used(key, NOW - timedelta(days=1), served_model="p/dear", cost=900)
    used(other, NOW - timedelta(days=1), served_model="p/dear", cost=5)
    since = NOW - timedelta(days=5)

    assert [(group.name, group.sums.cost) for group in queries.totals_by(people.acme, "model", since=since)] == [
        ("p/dear", 905),
        ("p/cheap", 1),
    ]
    assert [(group.name, group.sums.requests) for group in queries.totals_by(people.acme, "day", since=since)] == [
        ("2026-06-15", 1),
        ("2026-06-16", 2),
    ]
    assert [group.name for group in queries.totals_by(people.acme, "key", since=since)] == [str(key.pk), str(other.pk)]
    [own] = queries.totals_by(people.acme, "model", since=since, user_id=people.alice.pk)
    assert own.sums.requests == 1


def test_a_day_is_a_day_in_the_organizations_zone(people: People, key: ApiKey):
    people.acme.time_zone = "Asia/Tokyo"
    used(key, datetime(2026, 6, 16, 16, 0, tzinfo=UTC))  # one in the morning of the 17th

    assert [group.name for group in queries.totals_by(people.acme, "day", since=NOW - timedelta(days=5))] == ["2026-06-17"]


WINDOWS = [
    (timedelta(hours=start), None if length is None else timedelta(hours=length))
    for start in (0, 0.25, 13.5, 24, 47.75, 60)
    for length in (0.25, 9, 24, 30.25, 47.75, 72, 200, None)
]


@pytest.mark.parametrize(("start", "length"), WINDOWS)
def test_any_window_has_what_its_rows_have_whole_days_or_not(people: People, key: ApiKey, start: timedelta, length: timedelta | None):
    midnight = datetime(2026, 6, 14, tzinfo=UTC)
    other, foreign = people.key(people.bob, name="other"), people.key(people.alice, name="hers")
    stored: list[tuple[datetime, ApiKey, int]] = []
    for number, hours in enumerate((0, 0.2, 5, 13.49, 13.5, 23.99, 24, 30, 47.74, 48, 60, 71.99, 72, 80, 96.1, 120)):
        whose = (key, other, foreign)[number % 3]
        stored.append((midnight + timedelta(hours=hours), whose, 2**number))
        used(whose, stored[-1][0], cost=2**number, served_model=f"m{number % 2}")
    since, until = midnight + start, None if length is None else midnight + start + length
    window = {"since": since, "until": until}
    inside = [(whose, cost) for at, whose, cost in stored if since <= at and (until is None or at < until)]

    def spent(*keys: ApiKey) -> int:
        return sum(cost for whose, cost in inside if whose in keys)

    assert queries.totals(people.acme, **window).cost == spent(key, other, foreign)
    assert queries.totals(people.acme, **window, user_id=people.bob.pk).cost == spent(key, other)
    assert queries.totals(people.acme, **window, key_ids=[key.pk, foreign.pk]).cost == spent(key, foreign)
    for group in ("key", "model", "day"):
        for whose, keys in (({}, (key, other, foreign)), ({"user_id": people.bob.pk}, (key, other)), ({"key_ids": [key.pk]}, (key,))):
            assert sum(found.sums.cost for found in queries.totals_by(people.acme, group, **window, **whose)) == spent(*keys)
    by_key = {found.name: found.sums.cost for found in queries.totals_by(people.acme, "key", **window)}
    assert by_key == {str(one.pk): spent(one) for one in (key, other, foreign) if spent(one)}


def test_what_had_no_price_is_not_free():
    assert Sums(requests=2, unpriced=2).is_unpriced
    assert not Sums(requests=2, unpriced=1, cost=5).is_unpriced
    assert not Sums(requests=2, cost=0).is_unpriced


# Series


@pytest.mark.parametrize("span", SPANS.values(), ids=lambda span: span.name)
@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"])
def test_a_series_has_every_step_and_loses_nothing(people: People, key: ApiKey, span, zone: str):
    people.acme.time_zone = zone
    used(key, NOW)
    used(key, NOW - timedelta(hours=20))
    used(key, NOW - timedelta(days=6), cost=None)
    used(key, NOW - timedelta(days=28))

    buckets = queries.series(people.acme, key.pk, span, NOW)

    assert len(buckets) == span.steps
    assert all(one.ends_at == following.starts_at for one, following in pairwise(buckets))
    assert buckets[-1].starts_at <= NOW < buckets[-1].ends_at
    assert buckets[-1].sums.requests == 1
    assert sum((bucket.sums for bucket in buckets), Sums()) == queries.totals(people.acme, since=buckets[0].starts_at)
    assert sum(bucket.sums.requests for bucket in buckets) == {"24h": 2, "7d": 3, "30d": 4}[span.name]


def test_hours_and_days_begin_on_the_organizations_clock():
    kathmandu = ZoneInfo("Asia/Kathmandu")  # UTC+5:45

    hours = queries.starts_of(SPANS["24h"], kathmandu, NOW)
    assert hours[-1].astimezone(UTC) == datetime(2026, 6, 17, 13, 15, tzinfo=UTC)
    assert {start.minute for start in hours} == {0}
    assert {(start.hour, start.minute) for start in queries.starts_of(SPANS["30d"], kathmandu, NOW)} == {(0, 0)}
    assert {start.hour for start in queries.starts_of(SPANS["7d"], kathmandu, NOW)} == {0, 6, 12, 18}


def test_a_quarter_is_one_of_utc_also_where_the_clock_is_off_by_45_minutes():
    at = datetime(2026, 6, 17, 18, 50, tzinfo=ZoneInfo("Asia/Kathmandu"))

    assert queries.quarter(at) == datetime(2026, 6, 17, 13, 0, tzinfo=UTC)


def test_a_day_with_a_changed_clock_is_still_one_step():
    berlin = ZoneInfo("Europe/Berlin")
    spring = queries.starts_of(SPANS["30d"], berlin, datetime(2026, 4, 2, 12, tzinfo=UTC))
    lengths = {(after - before.astimezone(UTC)).total_seconds() / 3600 for before, after in pairwise(spring)}
    assert lengths == {23, 24}

    night = queries.starts_of(SPANS["24h"], berlin, datetime(2026, 10, 25, 12, 30, tzinfo=UTC))  # the hour from 2 to 3 came twice
    assert [start.hour for start in night].count(2) == 2
    assert len({start.astimezone(UTC) for start in night}) == 24


# The log


def test_pages_of_the_log_have_every_row_once_also_in_the_same_millisecond(people: People, key: ApiKey):
    at = timezone.now() - timedelta(minutes=10)
    stored = [used(key, at + timedelta(milliseconds=number // 4)) for number in range(23)]
    since = at - timedelta(hours=1)

    seen, before, pages = [], None, 0
    while True:
        page = queries.recent_requests(people.acme, key.pk, since=since, before=before, rows=5)
        seen += [event.request_id for event in page.rows]
        pages += 1
        if page.older is None:
            break
        before = Cursor.parse(str(page.older))
        used(key)  # what arrives meanwhile moves no page

    assert pages == 5
    assert len(seen) == len(set(seen)) == 23
    assert set(seen) == set(stored)


def test_the_log_is_read_by_its_index_and_never_counted(people: People, key: ApiKey):
    for _ in range(3):
        used(key)
    since = timezone.now() - timedelta(hours=1)
    first = queries.recent_requests(people.acme, key.pk, since=since, rows=1)

    with CaptureQueriesContext(connection) as seen:
        queries.recent_requests(people.acme, key.pk, since=since, before=first.older, rows=1)

    [sql] = [query["sql"] for query in seen]
    assert "COUNT(" not in sql.upper()
    assert "LIMIT 2" in sql
    assert_in_order_of_the_index(sql)


def test_the_log_of_a_key_is_taken_away_by_its_index(people: People, key: ApiKey, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queries, "_CHUNK_ROWS", 2)
    for _ in range(5):
        used(key)
    place = Membership(user=people.alice, organization=people.acme, role=Role.OWNER)

    with CaptureQueriesContext(connection) as seen:
        list(queries.key_rows(place, key.pk, since=timezone.now() - timedelta(hours=1), until=timezone.now()))

    read = [query["sql"] for query in seen if "proxy_usageevent" in query["sql"]]
    assert len(read) == 3
    for sql in read:
        assert_in_order_of_the_index(sql)


def assert_in_order_of_the_index(sql: str) -> None:
    """Else a page would cost what its whole window does. Sorted are at most the rows of one moment."""
    plan = plan_of(sql)
    assert "INDEX usage_by_key (key_id=? AND at>" in plan
    assert "TEMP B-TREE FOR ORDER BY" not in plan


def test_the_sums_of_one_key_are_found_by_their_index(people: People, key: ApiKey):
    with CaptureQueriesContext(connection) as seen:
        queries.series(people.acme, key.pk, SPANS["30d"], NOW)

    [sql] = [query["sql"] for query in seen]
    assert "sqlite_autoindex_proxy_keytotal_1 (key_id=? AND slot>" in plan_of(sql)


def test_the_log_ends_where_its_window_does(people: People, key: ApiKey):
    used(key, timezone.now() - timedelta(hours=3))

    assert queries.recent_requests(people.acme, key.pk, since=timezone.now() - timedelta(hours=2)).rows == []


@pytest.mark.parametrize("text", ["", "1", "x-y", "1-zz", f"{10**40}-{uuid.UUID(int=1).hex}", "-", "1-" + "0" * 31])
def test_what_is_no_cursor_is_refused(text: str):
    with pytest.raises(ValueError, match="is not a cursor"):
        Cursor.parse(text)


# Refusals and budgets


def test_refusals_are_summed_by_code_and_shadow_ones_are_told_apart(people: People, key: ApiKey):
    hour = timezone.now().replace(minute=0, second=0, microsecond=0)
    for back, code, count in ((0, "model_not_found", 2), (1, "model_not_found", 3), (0, "shadow:rate_limit_exceeded", 9), (40, "old", 1)):
        RefusedCalls.objects.create(hour=hour - timedelta(hours=back), key_id=key.pk, status=404, code=code, count=count)

    found = queries.refused_calls(people.acme, key.pk, since=timezone.now() - timedelta(hours=24))

    assert [(one.code, one.count, one.shadow) for one in found] == [("rate_limit_exceeded", 9, True), ("model_not_found", 5, False)]
    assert queries.refused_calls(people.rival, key.pk, since=timezone.now() - timedelta(hours=24)) == []


def test_a_budget_counts_its_own_scope_and_window(people: People, key: ApiKey, django_assert_num_queries):
    people.acme.time_zone = "America/New_York"
    people.acme.save()
    other = people.key(people.bob, name="other")
    for limited, window in ((key, "day"), (key, "month"), (key, "total")):
        actions.set_limit(people.acme, Allowance("money", 10_000, window), key=limited)
    actions.set_limit(people.acme, Allowance("money", 10_000, "week"), user=people.bob)
    actions.set_limit(people.acme, Allowance("money", 10_000, "day"))
    actions.set_limit(people.acme, Allowance("rpm", 5), key=key)
    midnight = datetime(2026, 6, 17, 4, 0, tzinfo=UTC)  # in New York
    used(key, midnight + timedelta(minutes=20), cost=1)
    used(key, midnight - timedelta(minutes=20), cost=10)
    used(key, midnight - timedelta(days=40), cost=100)
    used(other, midnight + timedelta(hours=1), cost=1000)
    used(people.key(people.alice), midnight + timedelta(hours=1), cost=10_000)

    limits = queries.limits_on(people.acme, key)
    with django_assert_num_queries(2):
        found = queries.budgets(people.acme, limits, NOW)

    assert {(budget.limit.scope.split(":")[0], budget.limit.window): budget.spent for budget in found} == {
        ("key", "day"): 1,
        ("key", "month"): 11,
        ("key", "total"): 111,
        ("user", "week"): 1011,
        ("organization", "day"): 11_001,
    }
    ends = {budget.limit.window: budget.ends_at for budget in found}
    assert ends["day"] == midnight + timedelta(days=1)
    assert ends["week"] == datetime(2026, 6, 22, 4, 0, tzinfo=UTC)
    assert ends["month"] == datetime(2026, 7, 1, 4, 0, tzinfo=UTC)
    assert ends["total"] is None


def test_only_limits_that_a_call_meets_are_on_a_key(people: People, key: ApiKey):
    own = actions.set_limit(people.acme, Allowance("rpm", 5), key=key)
    whole = actions.set_limit(people.acme, Allowance("rpm", 6))
    actions.set_limit(people.acme, Allowance("rpm", 7), user=people.alice)
    actions.set_limit(people.acme, Allowance("rpm", 8), key=people.key(people.alice))
    actions.set_limit(people.rival, Allowance("rpm", 9))

    assert queries.limits_on(people.acme, key) == [own, whole]


# Rows for the operator's command


def test_usage_rows_have_the_columns_of_the_contract(people: People, key: ApiKey):
    credential = Credential.objects.create(label="main account", kind="openai", prefix="openai")
    request_id = used(
        key, NOW, credential_id=credential.pk, status=499, error="client_closed", usage_source="estimated", upstream_cost=1234
    )

    [row] = usage_rows()

    assert list(row) == USAGE_COLUMNS
    assert row == {
        "request_id": str(request_id),
        "at": "2026-06-17T13:37:12.000Z",
        "organization": "acme",
        "user": "bob@example.org",
        "key": "laptop",
        "model": "fast",
        "served_model": "openai/gpt-x",
        "provider": "openai",
        "credential": "main account",
        "status": 499,
        "error": "client_closed",
        "stream": True,
        "attempts": 1,
        "input_tokens": 123,
        "cached_tokens": 20,
        "cache_write_tokens": 3,
        "output_tokens": 47,
        "reasoning_tokens": 7,
        "cost_usd": 0.0015,
        "usage_source": "estimated",
        "first_byte_ms": 80,
        "duration_ms": 900,
        "upstream_cost_usd": 0.001234,
    }


def test_usage_rows_come_in_order_in_chunks_with_as_many_queries_for_any_number_of_names(people: People, key: ApiKey, monkeypatch):
    monkeypatch.setattr(queries, "_CHUNK_ROWS", 4)
    keys = [key, people.key(people.alice, name="other"), people.key(people.amy, name="third")]
    stored = [used(keys[number % 3], NOW + timedelta(milliseconds=number // 2)) for number in range(11)]

    with CaptureQueriesContext(connection) as seen:
        rows = list(usage_rows())

    assert {row["request_id"] for row in rows} == {str(one) for one in stored}
    assert [(row["at"], row["request_id"]) for row in rows] == sorted((row["at"], row["request_id"]) for row in rows)
    assert len(seen) == 3 + 3  # three chunks; organizations, users and keys are each looked up once


def test_usage_rows_of_one_key_by_its_number_or_the_id_inside_it(people: People, key: ApiKey):
    used(people.key(people.alice, name="other"), NOW)
    used(key, NOW)

    assert [row["key"] for row in usage_rows(key=str(key.pk))] == ["laptop"]
    assert [row["key"] for row in usage_rows(key=key.handle)] == ["laptop"]
    assert list(usage_rows(key="nothing")) == []
    assert list(usage_rows(since=NOW + timedelta(seconds=1))) == []


def test_usage_rows_show_no_price_as_none_and_a_price_of_nothing_as_0(people: People, key: ApiKey):
    used(key, NOW, cost=None)
    used(key, NOW + timedelta(seconds=1), cost=0)

    assert [row["cost_usd"] for row in usage_rows()] == [None, 0.0]


def test_usage_rows_keep_a_row_whose_names_are_gone(people: People, key: ApiKey):
    used(key, NOW)
    UsageEvent.objects.update(organization=991, user=992, key=993, credential=994)

    [row] = usage_rows()

    assert (row["organization"], row["user"], row["key"], row["credential"]) == ("991", "992", "993", "994")


@pytest.mark.parametrize("name", ["Mars/Olympus", "../etc", "Europe"])
def test_a_zone_that_the_system_does_not_know_counts_as_utc(name: str):
    assert queries.zone_of(Organization(time_zone=name)).key == "UTC"
