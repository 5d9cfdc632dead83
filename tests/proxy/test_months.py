"""The log by months on Postgres, and what is deleted of it on both databases."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from django.db import IntegrityError, connection
from django.utils import timezone

from proxy import ledger, months, totals
from proxy.models import LogStart, UsageEvent, moment_of
from proxy.months import Month
from tests.proxy.test_ledger import at_id, settled, store
from tests.proxy.test_totals import every_sum

pytestmark = pytest.mark.django_db
NOW = datetime(2026, 11, 26, 9, 30, tzinfo=UTC)
on_postgres = pytest.mark.skipif("connection.vendor != 'postgresql'", reason="SQLite keeps a plain table")


def count(table: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(f'SELECT count(*) FROM "{table}"')
        return cursor.fetchone()[0]


def test_months_follow_each_other_over_the_turn_of_the_year():
    december = Month(2026, 12)
    assert (december.after(1), december.after(-12), december.after(25)) == (Month(2027, 1), Month(2025, 12), Month(2029, 1))
    assert (december.start, december.end) == (datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC))
    assert Month.named(december.partition) == december
    assert Month.named("proxy_usageevent_rest") is None


def test_the_moment_inside_an_id_finds_its_row():
    request_id = at_id(NOW)
    store(settled(request_id))
    assert moment_of(request_id) == UsageEvent.objects.get().at
    assert list(UsageEvent.objects.of_requests([request_id, uuid.uuid4(), uuid.UUID(int=2**128 - 1)])) == list(UsageEvent.objects.all())


@on_postgres
def test_rows_go_into_the_months_that_were_made_ahead_and_none_into_the_rest():
    months.make_ahead(NOW)
    assert months.make_ahead(NOW) == []
    assert set(months.made()) >= {Month(2026, 11), Month(2026, 12), Month(2027, 1), Month(2027, 2)}

    for at in (NOW, datetime(2026, 12, 1, tzinfo=UTC), datetime(2026, 11, 30, 23, 59, 59, 999000, tzinfo=UTC), NOW + timedelta(days=90)):
        store(settled(at_id(at)))

    assert [count(Month(*month).partition) for month in [(2026, 11), (2026, 12), (2027, 2)]] == [2, 1, 1]
    assert count("proxy_usageevent_rest") == 0


@on_postgres
def test_rows_of_a_month_that_nobody_made_find_a_place_and_get_a_month_later():
    records = [settled(at_id(datetime(2019, 5, 31, 23, 59, second, tzinfo=UTC))) for second in range(5)]
    assert store(*records, settled(at_id(datetime(2019, 6, 1, tzinfo=UTC)))) == 6
    assert count("proxy_usageevent_rest") == 6

    assert {Month(2019, 5), Month(2019, 6)} <= set(months.make_ahead(NOW))

    assert count("proxy_usageevent_rest") == 0
    assert count(Month(2019, 5).partition) == 5
    assert store(*records) == 0  # they are known where they are now


@on_postgres
def test_a_month_made_later_has_the_keys_and_indexes_of_the_others():
    months.make_ahead(datetime(2031, 1, 1, tzinfo=UTC))
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_indexes WHERE tablename = ANY(%s)", [[Month(2031, 2).partition]])
        [made_later] = cursor.fetchone()
        cursor.execute("SELECT count(*) FROM pg_indexes WHERE tablename = 'proxy_usageevent'")
        assert cursor.fetchone()[0] == made_later == 6
    row = UsageEvent(request_id=at_id(), at=datetime(2031, 2, 1, tzinfo=UTC), organization_id=1, user_id=1, key_id=1, status=200)
    row.save(force_insert=True)
    with pytest.raises(IntegrityError):
        row.save(force_insert=True)


def test_what_is_older_than_is_kept_goes_and_its_sums_stay(monkeypatch):
    monkeypatch.setattr(months, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(months, "PAUSE_SECONDS", 0)
    for days in (200, 130, 120, 119, 95, 88, 40, 1):
        store(settled(at_id(NOW - timedelta(days=days))), settled(at_id(NOW - timedelta(days=days, hours=1))))
    sums = every_sum()

    months.forget(90, NOW)

    kept = UsageEvent.objects.order_by("at").values_list("at", flat=True)
    # Postgres lets go of whole months: 95 days ago was in August, which is not over for 90 days.
    oldest = {"sqlite": NOW - timedelta(days=88, hours=1), "postgresql": NOW - timedelta(days=95, hours=1)}[connection.vendor]
    assert kept[0] == oldest
    assert kept.count() == {"sqlite": 6, "postgresql": 8}[connection.vendor]
    assert every_sum() == sums
    assert totals.days_of()[0] == oldest.date()
    assert all(totals.differences(day) == [] for day in totals.days_of())


def test_forgetting_goes_forward_only():
    months.forget(30, NOW)
    store(settled(at_id(NOW - timedelta(days=400))))
    months.forget(30, NOW)
    before = LogStart.objects.get().at
    months.forget(300, NOW)
    assert LogStart.objects.get().at == before
    assert not UsageEvent.objects.exists()


def test_a_row_that_comes_after_its_month_went_is_in_the_sums_and_goes_too():
    late = settled(at_id(NOW - timedelta(days=200)), cost=9)
    store(late)
    months.forget(30, NOW)
    assert not UsageEvent.objects.exists()
    store(settled(at_id(NOW - timedelta(days=200)), cost=1))  # a journal that was found in a drawer
    assert totals.spent_of(["key:1"], datetime(1970, 1, 1, tzinfo=UTC)) == {"key:1": 10}

    months.forget(30, NOW)

    assert not UsageEvent.objects.exists()
    assert totals.days_of(None) == []


def test_a_settlement_of_this_minute_is_made_whatever_the_start_could_do(monkeypatch):
    monkeypatch.setattr(months, "make_ahead", lambda now: (_ for _ in ()).throw(months.DatabaseError("no rights")))
    months.make_ahead_or_say(timezone.now())
    assert ledger.store([ledger.row_of(settled())]) == 1
