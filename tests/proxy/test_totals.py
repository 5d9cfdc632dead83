"""Sums and rows: written together, and worked out anew to the same figures."""

from __future__ import annotations

import io
from datetime import UTC, date, datetime, timedelta

import pytest
from django.core.management import CommandError, call_command
from django.db.models import F

from proxy import ledger, totals
from proxy.journal import Journal
from proxy.models import KeyDay, KeyTotal, LogStart, ModelTotal, UsageEvent, UsageTotal
from tests.proxy.test_ledger import admitted, at_id, settled, store

pytestmark = pytest.mark.django_db

NOON = datetime(2026, 3, 11, 12, 7, tzinfo=UTC)
TABLES = [UsageTotal, ModelTotal, KeyTotal, KeyDay]


def every_sum() -> list[list[tuple]]:
    """All tables, without numbers that a line was given."""
    return [sorted(table.model.objects.values_list(*table.dimensions, *totals.SUMS)) for table in totals.TABLES]


@pytest.fixture
def mixed(tmp_path) -> list[list[tuple]]:
    """Rows of all kinds over three days: failed, unpriced, interrupted, corrected, at the edges of days and quarters."""
    dead = Journal(tmp_path)
    late = [at_id(NOON), at_id(NOON + timedelta(hours=13))]
    for request_id in late:
        dead.admitted(admitted(request_id))
    dead.admitted(admitted(at_id(NOON), key=4, cost_estimate=None))
    dead.close()
    ledger.adopt_all(tmp_path)
    store(settled(late[0], output=50, cost=40), settled(late[1], status=502, usage_source="estimated", served_model="p/other"))
    for minutes in (0, 7, 8, 23, 700, 712, 713, 1440, 2000):
        store(
            settled(at_id(NOON + timedelta(minutes=minutes)), cost=minutes),
            settled(at_id(NOON + timedelta(minutes=minutes, milliseconds=1)), key=2, team=9, cost=None, served_model=""),
            settled(at_id(NOON + timedelta(minutes=minutes)), organization=2, user=3, key=3, status=429, credential=None, reasoning=3),
        )
    return every_sum()


def recomputed(*options: str) -> str:
    out = io.StringIO()
    call_command("recompute_totals", *options, stdout=out, stderr=io.StringIO())
    return out.getvalue()


def test_the_sums_of_all_tables_are_the_same_sums(mixed):
    for name in totals.SUMS:
        sums = {model: sum(model.objects.values_list(name, flat=True)) for model in TABLES}
        assert len(set(sums.values())) == 1, sums


def test_a11_worked_out_anew_they_are_the_same_to_the_micro_dollar(mixed):
    assert recomputed("--check").splitlines()[-1] == "2 days: all sums are those of the rows"
    for model in TABLES:
        model.objects.all().delete()
    recomputed()

    assert every_sum() == mixed
    recomputed("--check")


@pytest.mark.parametrize("model", TABLES)
def test_a_sum_that_is_wrong_is_told_and_mended(mixed, model):
    wrong = model.objects.filter(cost__gt=0).first()
    model.objects.filter(pk=wrong.pk).update(cost=F("cost") + 1, requests=F("requests") + 2)

    with pytest.raises(CommandError, match="1 of the sums"):
        recomputed("--check")
    assert every_sum() != mixed
    told = recomputed()

    assert f"{model.__name__} " in told
    assert f"requests={wrong.requests + 2} cost={wrong.cost + 1}, the rows say requests={wrong.requests} cost={wrong.cost}" in told
    assert every_sum() == mixed


@pytest.mark.parametrize("model", TABLES)
def test_a_sum_of_nothing_goes_and_a_missing_one_comes(mixed, model):
    first = model.objects.order_by(*(["slot"] if model is not KeyDay else ["day"])).first()
    model.objects.filter(pk=first.pk).delete()
    if model is KeyDay:
        model.objects.create(key_id=77, day=date(2026, 3, 20), organization_id=1, user_id=1, cost=5)
    else:
        model.objects.create(
            slot=datetime(2026, 3, 20, 10, tzinfo=UTC),
            organization_id=77,
            cost=5,
            **({"user_id": 1, "key_id": 1} if model is not ModelTotal else {}),
            **({"provider": "x", "model": "y"} if model is not KeyTotal else {}),
        )

    recomputed()

    assert every_sum() == mixed


def test_with_since_earlier_days_are_left_alone(mixed):
    KeyDay.objects.all().delete()

    recomputed("--since", "2026-03-12T09:00:00Z")

    assert set(KeyDay.objects.values_list("day", flat=True)) == {date(2026, 3, 12)}  # the day that `since` lies in, and later ones


def test_sums_of_rows_that_are_gone_stay(mixed):
    UsageEvent.objects.filter(at__lt=datetime(2026, 3, 12, tzinfo=UTC)).delete()
    LogStart.objects.create(at=datetime(2026, 3, 12, tzinfo=UTC))

    recomputed()

    assert every_sum() == mixed


def test_a13_a_shipper_that_dies_between_rows_and_sums_leaves_neither(mixed, monkeypatch):
    rows = [ledger.row_of(settled(at_id(NOON + timedelta(minutes=number)), cost=number)) for number in range(30)]
    before = UsageEvent.objects.count()
    add = totals.add

    class Killed(BaseException):
        pass

    def add_a_part_and_die(groups):
        add(dict(list(groups.items())[:1]))
        raise Killed

    monkeypatch.setattr(totals, "add", add_a_part_and_die)
    with pytest.raises(Killed):
        ledger.store(rows)
    monkeypatch.undo()
    assert (UsageEvent.objects.count(), every_sum()) == (before, mixed)

    assert ledger.store(rows) == 30
    assert ledger.store(rows) == 0
    recomputed("--check")


def test_what_was_spent_is_the_same_whether_a_window_begins_at_midnight_or_not(mixed):
    for minutes in range(0, 3000, 15):
        start = datetime(2026, 3, 11, tzinfo=UTC) + timedelta(minutes=minutes)
        scopes = {
            "key:1": {"key_id": 1},
            "key:2": {"key_id": 2},
            "organization:1": {"organization_id": 1},
            "team:9": {"team_id": 9},
            "user:1@1": {"user_id": 1, "organization_id": 1},
        }
        assert totals.spent_of(scopes, start) == {
            name: sum(UsageTotal.objects.filter(slot__gte=start, **scope).values_list("cost", flat=True)) for name, scope in scopes.items()
        }


def test_what_is_added_costs_four_statements_however_many_rows(django_assert_max_num_queries):
    """The tables of sums must not make a batch dear: one statement for each, run for as many lines as it has."""
    rows = [ledger.row_of(settled(at_id(NOON))) for _ in range(300)]
    with django_assert_max_num_queries(4 + 8):  # and the savepoints and inserts of the rows themselves
        ledger.store(rows)
