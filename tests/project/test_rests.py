"""Who rests, and who was ejected, is known to all workers, survives restarts, and ends when its row is deleted or a call goes well."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.utils import timezone

from project import rests
from project.rests import Rests
from providers.failures import CredentialRefused, ModelNotHere, OutOfCredit, RateLimited, UpstreamServer
from providers.models import Credential
from proxy.errors import OverBudget, OverLimit
from proxy.models import Rest
from proxy.stores.health import Health
from tests.proxy.test_health import Clock, ejected, ids, target, upstream

pytestmark = pytest.mark.django_db


@pytest.fixture
def credential() -> Credential:
    return Credential.objects.create(pk=1, kind="openai", label="one", prefix="one")


class Worker:
    def __init__(self) -> None:
        self.told: list[bytes] = []
        self.clock = Clock()
        self.health = Health(self.clock)
        self.rests = Rests(self.health, self.told.append)

    def turn(self) -> None:
        self.rests.turn(lambda work, *given: work(*given))

    def serves(self) -> bool:
        try:
            return bool(self.health.order([[(upstream(1), "m")]]))
        except (OverBudget, OverLimit):
            return False

    def first(self) -> int:
        """Which of two accounts is asked first."""
        return ids(self.health.order([[(upstream(1, priority=1), "m"), (upstream(2), "m")]]))[0]


def time_goes_by(seconds: float, *workers: Worker) -> None:
    """For what is stored, and for these."""
    for row in Rest.objects.all():
        Rest.objects.filter(pk=row.pk).update(until=row.until - timedelta(seconds=seconds))
    for worker in workers:
        worker.clock.now += seconds


def test_a_quota_rest_is_known_after_a_restart_and_to_other_workers(credential):
    one, other = Worker(), Worker()
    one.health.failed(target(1), OutOfCredit("no", retry_after_seconds=3600), [1])
    one.turn()
    other.turn()
    assert (one.serves(), other.serves(), Worker().serves()) == (False, False, True)
    fresh = Worker()
    fresh.turn()
    assert not fresh.serves()
    [row] = Rest.objects.all()
    assert timedelta(minutes=59) < row.until - timezone.now() <= timedelta(hours=1)


def test_taking_the_row_away_lets_every_worker_try_again(credential):
    one, other = Worker(), Worker()
    one.health.failed(target(1), OutOfCredit("no", retry_after_seconds=3600), [1])
    one.turn()
    other.turn()
    Rest.objects.all().delete()
    one.turn()
    other.turn()
    assert (one.serves(), other.serves()) == (True, True)
    one.turn()
    assert one.serves()


def test_an_account_that_was_signed_in_again_is_tried_and_no_restart_brings_its_rest_back(credential):
    one, other = Worker(), Worker()
    one.health.failed(target(1), OutOfCredit("no", retry_after_seconds=3600), [1])
    one.turn()
    other.turn()
    one.health.failed(target(1), OutOfCredit("no", retry_after_seconds=1800), [1])  # not stored yet
    one.health.clear(1)
    one.rests.forget(1)
    one.turn()
    other.turn()
    assert not Rest.objects.exists()
    assert (one.serves(), other.serves()) == (True, True)
    one.health.failed(target(1), OutOfCredit("no", retry_after_seconds=60), [1])  # the other account has its own
    one.turn()
    one.turn()
    assert Rest.objects.count() == 1
    assert not one.serves()


def test_a_short_rest_is_only_told(credential):
    one, other = Worker(), Worker()
    one.health.failed(target(1), RateLimited("no", retry_after_seconds=10), [1])
    one.turn()
    assert not Rest.objects.exists()
    [news] = one.told
    other.rests.heard(news)
    assert not other.serves()
    other.rests.heard(b"rest nonsense")


def test_a_longer_rest_takes_the_place_of_a_shorter_one_and_a_credential_that_is_gone_is_left_out(credential):
    one = Worker()
    for seconds in (60, 600):
        one.health.failed(target(1), OutOfCredit("no", retry_after_seconds=seconds), [1])
        one.turn()
    [row] = Rest.objects.all()
    assert row.until - timezone.now() > timedelta(minutes=9)
    one.health.failed(target(7), OutOfCredit("no", retry_after_seconds=60), [7])
    one.turn()
    assert Rest.objects.count() == 1


def test_a_rest_that_we_chose_is_kept_and_remains_a_preference(credential):
    one, fresh = Worker(), Worker()
    one.health.failed(target(1), CredentialRefused("no"), [1, 2])
    one.turn()
    fresh.turn()
    assert (fresh.first(), fresh.serves()) == (2, True)
    [row] = Rest.objects.all()
    assert (row.model, row.reason, row.named, row.times) == ("", CredentialRefused.code, False, 0)


def test_an_ejected_account_is_out_after_a_restart_then_tried_and_out_for_longer(credential):
    one = Worker()
    ejected(one.health)
    one.turn()
    fresh = Worker()
    fresh.turn()
    assert fresh.first() == 2
    time_goes_by(31, fresh)
    assert [fresh.first() for _ in range(3)] == [1, 2, 2]
    fresh.health.failed(target(1), UpstreamServer("500"), [1, 2])
    fresh.turn()
    [row] = Rest.objects.all()
    assert (row.reason, row.named, row.times) == ("ejected", False, 2)
    assert 55 < (row.until - timezone.now()).total_seconds() <= 60


def test_a_start_between_the_end_of_a_pause_and_its_trial_begins_with_the_trial(credential):
    one = Worker()
    ejected(one.health)
    one.turn()
    time_goes_by(600)
    fresh = Worker()
    fresh.turn()
    assert [fresh.first() for _ in range(3)] == [1, 2, 2]
    fresh.health.succeeded(target(1))
    fresh.turn()
    assert not Rest.objects.exists()
    assert fresh.first() == 1


def test_a_row_that_is_past_goes(credential):
    one = Worker()
    ejected(one.health)
    one.health.failed(target(1), OutOfCredit("no", retry_after_seconds=3600), [1])
    one.turn()
    time_goes_by(3 * 3600)
    fresh = Worker()
    fresh.turn()
    assert not Rest.objects.exists()
    assert fresh.first() == 1


def test_an_ejection_that_is_cleared_by_hand_is_over_everywhere_with_what_was_counted(credential):
    one, other = Worker(), Worker()
    ejected(one.health)
    one.turn()
    other.turn()
    assert (one.first(), other.first()) == (2, 2)
    Rest.objects.all().delete()
    for worker in (one, other):
        worker.turn()
        assert worker.first() == 1
        for _ in range(4):
            worker.health.failed(target(1), UpstreamServer("500"), [1, 2])
        worker.turn()
        assert worker.first() == 1
    assert not Rest.objects.exists()


def test_what_was_found_out_after_a_row_was_cleared_stays(credential):
    one = Worker()
    one.health.failed(target(1), OutOfCredit("no", retry_after_seconds=3600), [1])
    one.turn()
    Rest.objects.all().delete()

    def meanwhile(work, *given):
        if work == one.rests._apply:
            one.health.failed(target(1), OutOfCredit("no", retry_after_seconds=60), [1])
        return work(*given)

    one.rests.turn(meanwhile)
    one.turn()
    assert Rest.objects.count() == 1
    assert not one.serves()


def test_a_call_that_goes_well_ends_a_rest_everywhere_and_nothing_brings_it_back(credential):
    one, other = Worker(), Worker()
    ejected(one.health)
    one.turn()
    other.turn()
    other.health.succeeded(target(1))  # it was under way
    other.turn()
    assert not Rest.objects.exists()
    for worker in (one, other, Worker()):
        worker.turn()
        assert worker.first() == 1


def test_nor_one_that_was_heard_of_and_not_read_yet(credential):
    one, other = Worker(), Worker()
    ejected(one.health)
    one.turn()
    other.rests.heard(one.told[-1])
    assert other.first() == 2
    other.health.succeeded(target(1))
    other.turn()
    assert not Rest.objects.exists()
    assert other.first() == 1


def test_nor_one_that_was_just_being_read(credential):
    one, other = Worker(), Worker()
    ejected(one.health)
    one.turn()
    other.rests.heard(one.told[-1])

    def meanwhile(work, *given):
        if work == other.rests._apply:
            other.health.succeeded(target(1))
        return work(*given)

    other.rests.turn(meanwhile)
    assert other.first() == 1
    other.turn()
    assert not Rest.objects.exists()
    assert other.first() == 1


def test_nor_one_that_was_not_stored_yet(credential):
    one = Worker()
    ejected(one.health)
    one.health.succeeded(target(1))
    one.turn()
    assert not Rest.objects.exists()


def test_errors_that_follow_a_call_that_went_well_are_counted_on(credential):
    one = Worker()
    ejected(one.health)
    one.turn()
    one.health.succeeded(target(1))
    for _ in range(4):
        one.health.failed(target(1), UpstreamServer("500"), [1, 2])
    one.turn()
    one.health.failed(target(1), UpstreamServer("500"), [1, 2])
    assert one.first() == 2


def test_a_short_ejection_is_kept_too_and_who_stored_it_reads_nothing_new(credential):
    one, asked = Worker(), []
    one.health = Health(ejection_seconds=1.5)
    one.rests = Rests(one.health, one.told.append)
    ejected(one.health)
    one.rests.turn(lambda work, *given: asked.append(work) or work(*given))
    assert Rest.objects.get().times == 1
    assert asked == [one.rests._take]


def test_nor_one_that_was_being_stored(credential):
    one = Worker()
    ejected(one.health)

    def meanwhile(work, *given):
        done = work(*given)
        if work == one.rests._take:
            one.health.succeeded(target(1))
        return done

    one.rests.turn(meanwhile)
    one.turn()
    one.turn()
    assert not Rest.objects.exists()
    assert one.first() == 1


def test_nor_one_that_could_not_be_stored(credential, monkeypatch):
    one = Worker()
    ejected(one.health)
    with monkeypatch.context() as broken, pytest.raises(OSError, match="away"):

        def store(*given):
            one.health.succeeded(target(1))
            raise OSError("away")

        broken.setattr(one.rests, "_store", store)
        one.turn()
    one.turn()
    assert not Rest.objects.exists()


def test_a_later_rest_of_another_worker_stays(credential):
    one, other = Worker(), Worker()
    one.health.failed(target(1), OutOfCredit("no", retry_after_seconds=600), [1])
    one.turn()
    other.turn()
    one.health.failed(target(1), OutOfCredit("no", retry_after_seconds=3600), [1])
    one.turn()
    other.health.succeeded(target(1))  # it knows of the earlier one alone
    other.turn()
    assert Rest.objects.count() == 1
    assert (one.serves(), other.serves()) == (False, False)


def test_news_of_an_ejection_say_how_many_and_those_of_the_version_before_are_read(credential):
    one, other = Worker(), Worker()
    ejected(one.health)
    assert one.told == [b'rest [1,"",30.0,false,"ejected",1]']
    other.rests.heard(one.told[0])
    assert other.first() == 2
    other.clock.now += 31
    assert other.first() == 1
    other.health.failed(target(1), UpstreamServer("500"), [1, 2])
    assert other.told == [b'rest [1,"",60.0,false,"ejected",2]']
    other.rests.heard(b'rest [1,"m",40.0,true,"rate_limit_exceeded"]')
    assert not other.serves()


def test_names_that_clients_make_up_do_not_fill_the_table(credential, monkeypatch):
    monkeypatch.setattr(rests, "MOST_KEPT", 3)
    one = Worker()
    for name in ["x" * 241, "nul\0", "sk-sluice-akeyputthere1", *map(str, range(9))]:
        one.health.failed(target(1, name), ModelNotHere("no"), [1])
    one.health.failed(target(1, "named"), RateLimited("no", retry_after_seconds=1e300), [1])
    one.turn()
    assert set(Rest.objects.values_list("model", flat=True)) == {"0", "1", "2", "named"}
    time_goes_by(30)
    one.turn()
    one.health.failed(target(1, "2"), ModelNotHere("no"), [1])  # one that is kept is kept anew
    one.health.failed(target(1, "9"), ModelNotHere("no"), [1])
    ejected(one.health)
    one.turn()
    assert set(Rest.objects.values_list("model", flat=True)) == {"", "0", "1", "2", "named"}
    assert Rest.objects.get(model="2").until - Rest.objects.get(model="1").until > timedelta(seconds=25)
