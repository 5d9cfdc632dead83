"""`manage.py demo_data`: the same whenever it runs, added up as everything else, and gone without a trace."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from django.core.management import call_command
from django.db.models import Count, Sum

from accounts.models import ApiKey, AuditEntry, Organization, User
from project import demonstration
from providers.models import Credential, Price
from proxy.models import RefusedCalls, UsageEvent, UsageTotal

pytestmark = pytest.mark.django_db
NOW = datetime(2026, 11, 26, 15, 0, tzinfo=UTC)
SUMS = ["fresh_input", "cache_read", "output", "reasoning", "cost"]


def figures() -> dict[str, int]:
    return UsageEvent.objects.aggregate(rows=Count("pk"), **{name: Sum(name) for name in SUMS})


def test_it_makes_a_month_of_usage_that_adds_up_and_a_second_run_adds_nothing():
    _, stored = demonstration.make(NOW)
    assert stored > 3000
    before = figures()
    totals = UsageTotal.objects.aggregate(rows=Sum("requests"), **{name: Sum(name) for name in SUMS})
    assert totals == before
    refused = RefusedCalls.objects.aggregate(total=Sum("count"))["total"]
    assert refused
    assert demonstration.make(NOW) == (2, 0)
    assert figures() == before
    assert RefusedCalls.objects.aggregate(total=Sum("count"))["total"] == refused
    at = UsageEvent.objects.order_by("at").values_list("at", flat=True)
    assert NOW - timedelta(days=32) < at[0]
    assert at.last() <= NOW
    assert UsageEvent.objects.filter(cost=None).exists()
    assert UsageEvent.objects.filter(cost__gt=0).count() > stored * 0.9
    assert {"active", "revoked", "expired", "retiring"} <= {key.state for key in ApiKey.objects.all()}


def test_an_hour_later_it_adds_that_hour_alone_and_another_machine_would_have_made_the_same():
    demonstration.make(NOW)
    before = set(UsageEvent.objects.values_list("pk", flat=True))
    _, stored = demonstration.make(NOW + timedelta(hours=5))
    new = UsageEvent.objects.exclude(pk__in=before)
    assert new.count() == stored > 0
    assert all(NOW <= row.at <= NOW + timedelta(hours=5) for row in new)
    after = figures()
    demonstration.remove()
    demonstration.make(NOW + timedelta(hours=5))
    assert figures() == after


def test_nothing_stays_when_it_is_removed_and_nothing_else_goes():
    call_command("bootstrap", verbosity=0)
    others = [model.objects.count() for model in (User, Organization, ApiKey, Credential, Price, AuditEntry)]
    demonstration.make(NOW)
    assert demonstration.remove() > 3000
    assert [model.objects.count() for model in (User, Organization, ApiKey, Credential, Price, AuditEntry)] == others
    assert not UsageEvent.objects.exists()
    assert not UsageTotal.objects.exists()
    assert not RefusedCalls.objects.exists()
    assert demonstration.remove() == 0


def test_nobody_can_sign_in_as_one_of_its_people():
    demonstration.make(NOW)
    people = User.objects.filter(email__endswith=f".{demonstration.DOMAIN}")
    assert people.count() == 7
    assert not any(person.has_usable_password() or person.is_superuser for person in people)
