"""Mails at 80 % and 100 % of a budget: each once for a window, to those whom it concerns."""

from __future__ import annotations

import smtplib
from datetime import UTC, datetime, timedelta

import pytest
from django.core import mail
from django.core.mail.backends.locmem import EmailBackend
from django.utils import timezone

from accounts import actions
from accounts.models import ApiKey, Limit, Membership, Notice, Role
from accounts.policy import Allowance
from proxy import budget_mails, tasks
from tests.accounts.conftest import People
from tests.proxy.used import used

NOW = datetime(2026, 6, 17, 13, 37, tzinfo=UTC)


@pytest.fixture
def people(db: None) -> People:
    return People()


@pytest.fixture
def key(people: People) -> ApiKey:
    return people.key(people.bob)


def managers(people: People) -> set[str]:
    roles = [Role.OWNER, Role.ADMIN]
    return set(Membership.objects.filter(organization=people.acme, role__in=roles).values_list("user__email", flat=True))


def subjects() -> list[str]:
    return [one.subject.removeprefix("[Sluice] ") for one in mail.outbox]


def test_a_budget_is_mailed_at_80_and_at_100_percent_and_each_once(people: People, key: ApiKey):
    actions.set_limit(people.acme, Allowance("money", 1_000_000, "month"), key=key)
    used(key, NOW, cost=799_999)
    assert budget_mails.send_due(NOW) == 0

    used(key, NOW, cost=1)
    assert [budget_mails.send_due(NOW) for _ in range(3)] == [1, 0, 0]
    used(key, NOW, cost=150_000)
    assert budget_mails.send_due(NOW) == 0
    used(key, NOW, cost=50_000)
    assert [budget_mails.send_due(NOW) for _ in range(3)] == [1, 0, 0]

    assert subjects() == ["Key laptop: 80 % of the budget are spent", "Key laptop: the budget is spent"]
    assert mail.outbox[0].body.startswith("Key laptop in Acme: $0.80 of $1.00 are spent in the month since 2026-06-01 (UTC).\n")
    assert "$1.00 of $1.00 are spent" in mail.outbox[1].body
    assert "Calls under it are refused until the month is over." in mail.outbox[1].body


def test_it_goes_to_owners_admins_and_the_keys_owner_and_to_nobody_else(people: People, key: ApiKey):
    actions.set_limit(people.acme, Allowance("money", 100, "day"), key=key)
    used(key, NOW, cost=90)

    budget_mails.send_due(NOW)

    [one] = mail.outbox
    assert set(one.recipients()) == managers(people) | {"bob@example.org"}
    assert one.to == ["bob@example.org"]  # the others are not shown to each other
    assert managers(people)


@pytest.mark.parametrize("scope", ["organization", "team", "user", "key"])
def test_each_scope_counts_its_own(people: People, scope: str):
    team = people.acme.teams.create(name="research")
    Membership.objects.get(user=people.bob, organization=people.acme).teams.add(team)
    mine, other = people.key(people.bob, team=team), people.key(people.alice, name="other")
    whose = {"organization": {}, "team": {"team": team}, "user": {"user": people.bob}, "key": {"key": mine}}[scope]
    actions.set_limit(people.acme, Allowance("money", 100, "day"), **whose)
    used(other, NOW, cost=79)
    assert budget_mails.send_due(NOW) == 0
    used(mine, NOW, cost=79)
    used(people.key(people.alice, name="far"), NOW - timedelta(days=1), cost=1000)

    assert budget_mails.send_due(NOW) == (1 if scope == "organization" else 0)  # 158 of 100, and 79

    used(mine, NOW, cost=1)
    assert budget_mails.send_due(NOW) == (0 if scope == "organization" else 1)


def test_who_jumps_over_both_marks_gets_one_mail(people: People, key: ApiKey):
    actions.set_limit(people.acme, Allowance("money", 100, "day"), key=key)
    used(key, NOW, cost=500)

    assert [budget_mails.send_due(NOW), budget_mails.send_due(NOW)] == [1, 0]
    assert subjects() == ["Key laptop: the budget is spent"]


def test_a_new_window_is_a_new_budget_and_begins_in_the_organizations_zone(people: People, key: ApiKey):
    people.acme.time_zone = "America/New_York"
    people.acme.save()
    actions.set_limit(people.acme, Allowance("money", 100, "day"), key=key)
    midnight = datetime(2026, 6, 17, 4, 0, tzinfo=UTC)  # in New York
    used(key, midnight - timedelta(minutes=1), cost=90)
    assert budget_mails.send_due(midnight - timedelta(seconds=1)) == 1
    assert budget_mails.send_due(midnight) == 0
    used(key, midnight + timedelta(minutes=20), cost=85)  # before the first midnight in UTC
    assert budget_mails.send_due(midnight + timedelta(minutes=21)) == 1
    assert "since 2026-06-17 (America/New_York)" in mail.outbox[1].body


def test_a_budget_that_only_counts_says_so_and_a_total_one_ends_never(people: People, key: ApiKey):
    actions.set_limit(people.acme, Allowance("money", 100, "total", "shadow"), key=key)
    actions.set_limit(people.acme, Allowance("money", 100, "total"))
    used(key, NOW - timedelta(days=400), cost=120)

    assert budget_mails.send_due(NOW) == 2
    assert "It counts" not in mail.outbox[0].body
    assert "This budget only counts: calls go on." in mail.outbox[0].body
    assert mail.outbox[1].body.split("\n")[0].endswith("are spent in all. Calls under it are refused.")


def test_revoked_keys_idle_organizations_and_limits_that_are_no_money_are_silent(people: People, key: ApiKey):
    gone = people.key(people.bob, name="gone")
    for one in (key, gone):
        used(one, NOW, cost=1000)
    actions.set_limit(people.acme, Allowance("money", 100, "day"), key=gone)
    actions.set_limit(people.acme, Allowance("rpm", 1), key=key)
    actions.revoke_key(gone, actor=people.alice)
    assert budget_mails.send_due(NOW) == 0

    actions.set_limit(people.acme, Allowance("money", 100, "day"))
    people.acme.is_active = False
    people.acme.save()
    assert budget_mails.send_due(NOW) == 0


def test_a_mail_that_could_not_be_sent_is_sent_later(people: People, key: ApiKey, monkeypatch):
    actions.set_limit(people.acme, Allowance("money", 100, "day"), key=key)
    used(key, NOW, cost=90)

    def refuse(self, messages):
        raise smtplib.SMTPServerDisconnected("gone")

    with monkeypatch.context() as patch:
        patch.setattr(EmailBackend, "send_messages", refuse)
        assert budget_mails.send_due(NOW) == 0
    assert budget_mails.send_due(NOW) == 0  # not again at once
    Notice.objects.update(tried_at=timezone.now() - timedelta(minutes=6))
    assert [budget_mails.send_due(NOW), budget_mails.send_due(NOW)] == [1, 0]


def test_many_budgets_take_few_queries(people: People, key: ApiKey, django_assert_max_num_queries):
    for number in range(30):
        one = people.key(people.bob, name=f"key {number}")
        actions.set_limit(people.acme, Allowance("money", 100, "month"), key=one)
        used(one, NOW, cost=10)
    with django_assert_max_num_queries(10):
        assert budget_mails.send_due(NOW) == 0


def test_nobody_looked_for_a_day_and_it_is_still_no_news(people: People, key: ApiKey):
    actions.set_limit(people.acme, Allowance("money", 100, "month"), key=key)
    used(key, NOW, cost=90)
    assert budget_mails.send_due(NOW) == 1
    Notice.objects.update(seen_at=timezone.now() - timedelta(days=1))
    assert budget_mails.send_due(NOW) == 0


def test_old_notices_go(people: People, key: ApiKey):
    actions.set_limit(people.acme, Allowance("money", 100, "day"), key=key)
    used(key, timezone.now(), cost=90)
    assert tasks.mail_budgets() == 1
    Notice.objects.update(seen_at=timezone.now() - timedelta(days=101))
    Limit.objects.all().delete()
    Notice.objects.create(event="other", subject="x", seen_at=NOW - timedelta(days=900), tried_at=NOW)

    tasks.mail_budgets()

    assert list(Notice.objects.values_list("event", flat=True)) == ["other"]


def test_the_sweep_keeps_months_hourly_and_budgets_each_time_whatever_fails(people: People, monkeypatch):
    done: list[str] = []

    def fail() -> None:
        done.append("months")
        raise tasks.DatabaseError("away")

    monkeypatch.setattr(tasks, "keep_months", fail)
    monkeypatch.setattr(tasks, "mail_budgets", lambda: done.append("mails"))
    sweep = tasks.Upkeep()
    sweep()
    sweep()
    assert done == ["months", "mails", "mails"]


def test_retention_comes_from_its_setting(people: People, key: ApiKey, monkeypatch, settings):
    kept: list[int] = []
    monkeypatch.setattr(tasks.months, "forget", lambda days, now: kept.append(days))
    tasks.keep_months()
    assert kept == []
    settings.ENV = type("Env", (), {"usage_retention_days": 40})
    tasks.keep_months()
    assert kept == [40]
