"""What an upstream asked for is known to all workers, survives restarts, and ends when its row is deleted."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.utils import timezone

from project.rests import Rests
from providers.failures import OutOfCredit, RateLimited
from providers.models import Credential
from proxy.errors import OverBudget, OverLimit
from proxy.models import Rest
from proxy.stores.health import Health
from tests.proxy.test_health import target, upstream

pytestmark = pytest.mark.django_db


@pytest.fixture
def credential() -> Credential:
    return Credential.objects.create(pk=1, kind="openai", label="one", prefix="one")


class Worker:
    def __init__(self) -> None:
        self.told: list[bytes] = []
        self.health = Health()
        self.rests = Rests(self.health, self.told.append)

    def turn(self) -> None:
        self.rests.turn(lambda work, *given: work(*given))

    def serves(self) -> bool:
        try:
            return bool(self.health.order([[(upstream(1), "m")]]))
        except (OverBudget, OverLimit):
            return False


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
