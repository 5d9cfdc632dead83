"""Journal -> rows -> totals: nothing lost, nothing doubled, and the totals are the rows' sums."""

import random
import uuid
import zlib
from datetime import UTC, datetime, timedelta

import pytest
from django.db import OperationalError
from django.db.models import Count, Q, Sum

from proxy import journal, ledger
from proxy.call import milliseconds_of, new_request_id
from proxy.journal import Admitted, Journal, Settled
from proxy.models import RefusedCalls, UsageEvent, UsageTotal
from proxy.refusals import Refusals
from proxy.stores.limits import window_start

pytestmark = pytest.mark.django_db

PARTS = ["fresh_input", "cache_read", "cache_write", "output", "reasoning"]


def at_id(at: datetime | None = None) -> uuid.UUID:
    one = uuid.UUID(new_request_id())
    return one if at is None else uuid.UUID(int=(int(at.timestamp() * 1000) << 80) | (one.int & ((1 << 80) - 1)))


def settled(request_id: uuid.UUID | None = None, **fields) -> Settled:
    request_id = request_id or at_id()
    known = {
        "request_id": str(request_id),
        "at": milliseconds_of(str(request_id)),
        "organization": 1,
        "user": 1,
        "key": 1,
        "model": "m",
        "served_model": "p/m",
        "provider": "openai",
        "credential": 1,
        "endpoint": "chat/completions",
        "status": 200,
        "attempts": 1,
        "fresh_input": 10,
        "output": 5,
        "cost": 7,
        "usage_source": "reported",
    }
    return Settled(**known | fields)


def admitted(request_id: uuid.UUID, **fields) -> Admitted:
    known = {
        "request_id": str(request_id),
        "at": milliseconds_of(str(request_id)),
        "organization": 1,
        "user": 1,
        "key": 1,
        "model": "m",
        "served_model": "p/m",
        "provider": "openai",
        "credential": 1,
        "endpoint": "chat/completions",
        "input_estimate": 12,
        "cost_estimate": 3,
    }
    return Admitted(**known | fields)


def store(*records: Settled) -> int:
    return ledger.store([ledger.row_of(record) for record in records])


def totals_are_the_sums_of_the_rows() -> None:
    """A11: the totals, recomputed from the rows, to the micro-dollar."""
    rows = UsageEvent.objects.aggregate(
        requests=Count("pk", filter=Q(corrects=None)), cost=Sum("cost"), **{part: Sum(part) for part in PARTS}
    )
    totals = UsageTotal.objects.aggregate(requests=Sum("requests"), cost=Sum("cost"), **{part: Sum(part) for part in PARTS})
    assert {name: value or 0 for name, value in rows.items()} == {name: value or 0 for name, value in totals.items()}


def test_a_settled_record_becomes_a_row_with_all_that_it_says():
    record = settled(cache_read=3, reasoning=2, first_byte_ms=40, duration_ms=90, team=4, stream=True)
    assert store(record) == 1

    row = UsageEvent.objects.get()
    assert str(row.request_id) == record.request_id
    assert int(row.at.timestamp() * 1000) == record.at == milliseconds_of(str(row.request_id))
    assert (row.input_tokens, row.output_tokens, row.cost, row.usage_source) == (13, 7, 7, "reported")
    assert (row.team_id, row.stream, row.first_byte_ms, row.duration_ms) == (4, True, 40, 90)


def test_what_is_shipped_twice_counts_once():
    records = [settled() for _ in range(20)]
    assert store(*records) == 20
    assert store(*records, settled()) == 1
    assert UsageEvent.objects.count() == 21
    totals_are_the_sums_of_the_rows()


def test_totals_fall_into_their_quarter_of_an_hour():
    for minute in (0, 14, 15, 29, 30, 59):
        store(settled(at_id(datetime(2026, 3, 1, 10, minute, 59, 999000, tzinfo=UTC))))
    slots = dict(UsageTotal.objects.values_list("slot__minute", "requests"))
    assert slots == {0: 2, 15: 2, 30: 1, 45: 1}


def test_an_unpriced_row_has_no_cost_and_is_counted_as_such():
    store(settled(cost=None), settled(cost=5))
    [total] = UsageTotal.objects.all()
    assert (total.requests, total.unpriced, total.cost) == (2, 1, 5)
    assert UsageEvent.objects.filter(cost=None).count() == 1


def test_a_batch_larger_than_one_insert_is_stored_whole():
    assert store(*[settled() for _ in range(ledger.BATCH + 7)]) == ledger.BATCH + 7
    totals_are_the_sums_of_the_rows()


def test_a_dead_workers_journal_is_adopted_and_its_open_requests_become_interrupted_rows(tmp_path):
    dead = Journal(tmp_path)
    whole, cut = at_id(), at_id()
    for request_id in (whole, cut):
        dead.admitted(admitted(request_id))
    dead.settled(settled(whole))
    dead.close()

    assert ledger.adopt_all(tmp_path) == 2
    row = UsageEvent.objects.get(pk=cut)
    assert (row.error, row.usage_source, row.input_tokens, row.cost) == ("interrupted", "estimated", 12, 3)
    assert UsageEvent.objects.get(pk=whole).error == ""
    assert journal.folders(tmp_path) == []
    assert ledger.adopt_all(tmp_path) == 0
    totals_are_the_sums_of_the_rows()


def test_a_living_workers_journal_is_read_but_neither_adopted_nor_deleted(tmp_path):
    living = Journal(tmp_path)
    request_id = at_id()
    living.admitted(admitted(request_id))
    living.settled(settled(request_id))
    living.admitted(admitted(at_id()))

    assert ledger.adopt(living.folder) is None
    assert ledger.ship(living.folder) == 1
    assert living.folder.exists()


def test_an_adoption_that_died_half_way_is_done_again_without_doubling(tmp_path, monkeypatch):
    dead = Journal(tmp_path)
    ids = [at_id() for _ in range(5)]
    for request_id in ids:
        dead.admitted(admitted(request_id))
    dead.settled(settled(ids[0]))
    dead.close()
    monkeypatch.setattr(journal, "remove", lambda folder, descriptor: __import__("os").close(descriptor))
    assert ledger.adopt_all(tmp_path) == 5
    monkeypatch.undo()
    assert ledger.adopt_all(tmp_path) == 0
    assert UsageEvent.objects.count() == 5
    totals_are_the_sums_of_the_rows()


def test_a_settlement_that_turns_up_later_becomes_a_correction_and_only_once(tmp_path):
    dead = Journal(tmp_path)
    request_id = at_id()
    dead.admitted(admitted(request_id))
    dead.close()
    ledger.adopt_all(tmp_path)

    late = settled(request_id, fresh_input=10, output=50, cost=40)
    assert store(late) == 1
    assert store(late, late) == 0

    first, correction = UsageEvent.objects.order_by("corrects")
    if first.corrects:
        first, correction = correction, first
    assert correction.corrects == first.request_id
    assert first.input_tokens + correction.input_tokens == 10
    assert (first.output_tokens + correction.output_tokens, first.cost + correction.cost) == (50, 40)
    [total] = UsageTotal.objects.values("requests", "cost", "output", "errors", "estimated").distinct()
    assert total == {"requests": 1, "cost": 40, "output": 50, "errors": 0, "estimated": 0}
    totals_are_the_sums_of_the_rows()


def test_settlements_in_any_order_and_number_have_one_effect(tmp_path):
    """A08 in small."""
    chooser = random.Random(7)
    ids = [at_id() for _ in range(12)]
    dead = Journal(tmp_path)
    for request_id in ids:
        dead.admitted(admitted(request_id))
    dead.close()
    truth = {request_id: settled(request_id, cost=chooser.randrange(100), output=chooser.randrange(50)) for request_id in ids}
    before = chooser.sample(ids, 5)
    store(*[truth[request_id] for request_id in before])
    ledger.adopt_all(tmp_path)
    for _ in range(10):
        some = chooser.choices(ids, k=6)
        store(*[truth[request_id] for request_id in some])
    store(*truth.values())

    assert UsageEvent.objects.aggregate(Sum("cost"))["cost__sum"] == sum(record.cost for record in truth.values())
    assert UsageEvent.objects.filter(corrects=None).count() == 12
    totals_are_the_sums_of_the_rows()


def test_hostile_text_and_nul_fit_into_a_row():
    store(settled(model="a\0b" + "x" * 300, error="e" * 300))
    row = UsageEvent.objects.get()
    assert row.model.startswith("ab")
    assert (len(row.model), len(row.error)) == (240, 100)


def test_our_own_journal_is_shipped_up_to_a_position_and_its_old_segments_go(tmp_path):
    mine = Journal(tmp_path, segment_bytes=4096)
    one = ledger.Ledger(mine, tmp_path, Refusals())
    for _ in range(30):
        request_id = at_id()
        mine.admitted(admitted(request_id))
        mine.settled(settled(request_id))
    position = mine.position()
    late = at_id()
    mine.admitted(admitted(late))
    mine.settled(settled(late))
    assert position[0] > 1

    assert one.ship(until=position) == 30
    assert not UsageEvent.objects.filter(pk=late).exists()
    assert one.ship() == 1
    assert [segment.name for segment in journal.segments(mine.folder)] == [mine.segment(mine.position()[0]).name]
    totals_are_the_sums_of_the_rows()


def test_refused_calls_add_up_by_key_code_and_hour():
    counts = {(3600, 5, 429, "rate_limit_exceeded"): 2, (3600, 0, 401, "invalid_api_key"): 1}
    ledger.store_refusals(counts)
    ledger.store_refusals(counts)
    found = set(RefusedCalls.objects.values_list("hour", "key_id", "status", "code", "count"))
    hour = datetime(1970, 1, 1, 1, tzinfo=UTC)
    assert found == {(hour, 5, 429, "rate_limit_exceeded", 4), (hour, 0, 401, "invalid_api_key", 2)}


def test_what_was_spent_is_read_from_the_totals_by_scope_and_window():
    now = datetime(2026, 3, 11, 12, tzinfo=UTC)
    store(
        settled(at_id(now), key=1, cost=5),
        settled(at_id(now), key=2, team=9, cost=7),
        settled(at_id(now - timedelta(days=1)), key=1, cost=11),
    )
    budgets = [
        ("key:1", "day", "UTC"),
        ("key:1", "total", "UTC"),
        ("organization:1", "day", "UTC"),
        ("user:1@1", "month", "UTC"),
        ("team:9", "week", "UTC"),
    ]
    spent = ledger.spent_in(budgets, now.timestamp())
    assert [spent[budget, window_start(*budget[1:], now.timestamp())] for budget in budgets] == [5, 16, 12, 23, 7]


def test_what_thousands_have_spent_is_read_in_a_few_statements(django_assert_max_num_queries):
    now = datetime(2026, 3, 11, 12, tzinfo=UTC)
    store(
        *(settled(at_id(now), key=number, user=number, cost=number) for number in range(1, 30)),
        settled(at_id(now), key=31, organization=2, user=5),
    )
    scopes = [f"{kind}{number}{of}" for kind, of in (("key:", ""), ("user:", "@1")) for number in range(1, 1500)]
    with django_assert_max_num_queries(8):
        spent = ledger.spent_in([(scope, "day", "Asia/Kathmandu") for scope in scopes], now.timestamp())
    assert {budget[0]: cost for (budget, _), cost in spent.items() if cost} == {
        f"{kind}{number}{of}": number for kind, of in (("key:", ""), ("user:", "@1")) for number in range(1, 30)
    } | {"key:31": 7}
    assert len(spent) == len(scopes)


def test_a_journal_that_cannot_be_adopted_keeps_no_other_waiting(tmp_path, caplog):
    journals = [Journal(tmp_path) for _ in range(3)]
    first, second, third = sorted(journals, key=lambda one: one.folder)
    first._append(journal.HEAD.pack(13, zlib.crc32(b'{"t":"other"}')) + b'{"t":"other"}')  # of a later version
    second.folder.joinpath("lock").unlink()
    second.folder.joinpath("lock").mkdir()  # stands for one that belongs to somebody else
    third.settled(settled())
    for one in journals:
        one.close()

    assert ledger.adopt_all(tmp_path) == 1
    assert journal.folders(tmp_path) == [first.folder, second.folder]
    assert {str(first.folder), str(second.folder)} <= set(caplog.text.split())


def test_an_adoption_that_fails_is_tried_again_by_the_same_process(tmp_path, monkeypatch):
    dead = Journal(tmp_path)
    request_id = at_id()
    dead.admitted(admitted(request_id))
    dead.close()

    def away(rows):
        raise OperationalError("database is locked")

    with monkeypatch.context() as patch, pytest.raises(OperationalError):
        patch.setattr(ledger, "store_new", away)
        ledger.adopt(dead.folder)
    assert ledger.adopt(dead.folder) == 1


def test_a_journal_that_is_damaged_in_the_middle_is_kept(tmp_path, caplog):
    dead = Journal(tmp_path)
    ids = [at_id() for _ in range(3)]
    ends = []
    for request_id in ids:
        dead.settled(settled(request_id))
        ends.append(dead.position()[1])
    data = bytearray(dead.segment(1).read_bytes())
    data[ends[0] + 20] ^= 1
    dead.segment(1).write_bytes(data)
    dead.close()

    assert ledger.adopt_all(tmp_path) == 1
    assert journal.folders(tmp_path) == []
    assert (tmp_path / f".damaged-{dead.folder.name}" / dead.segment(1).name).read_bytes() == data
    assert "damaged" in caplog.text


def test_a_torn_last_record_is_no_damage(tmp_path):
    dead = Journal(tmp_path)
    dead.settled(settled())
    whole = dead.position()[1]
    dead.settled(settled())
    for cut in (whole + 1, whole + journal.HEAD.size, whole + journal.HEAD.size + 9):
        assert journal.is_torn(dead.segment(1), whole) is False
        torn = tmp_path / "torn"
        torn.write_bytes(dead.segment(1).read_bytes()[:cut])
        assert journal.is_torn(torn, whole) is True


def test_a_cost_beyond_any_column_still_ships():
    store(settled(cost=2**70))
    assert UsageEvent.objects.get().cost == 2**63 - 1
