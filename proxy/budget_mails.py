"""Mails about budgets: at 80 % and at 100 % of the money of a window, each once.

They go to the owners and admins of the organization, and to the person whose key or whose own budget it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from django.conf import settings
from django.db.models import Sum

from accounts.models import Limit, Membership, Metric, Mode, Notice, Organization, Role
from accounts.money import in_usd
from accounts.notices import tell
from proxy import queries
from proxy.models import KeyDay, KeyTotal
from proxy.stores.limits import window_start
from proxy.totals import first_whole_day

log = logging.getLogger(__name__)

MARKS = (100, 80)  # percent, the highest first: only that one is said
# Longer than any window but `total`, whose notices are seen again at each look.
FORGOTTEN_AFTER = timedelta(days=100)
_EVENT = "budget."

Spent = dict[str, int]  # by scope, as `Limit.scope` names it, in micro-dollars


def send_due(now: datetime) -> int:
    """Look at every budget once. How many mails went out. Raises DatabaseError; a mail that cannot be sent is tried again later."""
    sent = 0
    for organization in Organization.objects.filter(is_active=True, limits__metric=Metric.MONEY).distinct().order_by("pk"):
        for limit, spent, start in _budgets(organization, now):
            reached = next((mark for mark in MARKS if spent * 100 >= limit.amount * mark), None)
            if reached is not None:
                sent += _tell(organization, limit, reached, spent, start)
    Notice.objects.filter(event__startswith=_EVENT, seen_at__lt=now - FORGOTTEN_AFTER).delete()
    return sent


def _budgets(organization: Organization, now: datetime) -> Iterable[tuple[Limit, int, datetime]]:
    """Each live budget with what was spent in its window, and since when. As many queries as there are kinds of windows."""
    found = Limit.objects.filter(organization=organization, metric=Metric.MONEY, amount__gt=0, key__revoked_at=None)
    zone = queries.zone_of(organization).key
    by_window: dict[str, tuple[datetime, Spent]] = {}
    for limit in found.select_related("key__user", "user", "team").order_by("pk"):
        if limit.window not in by_window:
            start = datetime.fromtimestamp(window_start(limit.window, zone, now.timestamp()), UTC)
            by_window[limit.window] = start, _spent(organization, start)
        start, spent = by_window[limit.window]
        yield limit, spent.get(limit.scope, 0), start


def _spent(organization: Organization, start: datetime) -> Spent:
    first = first_whole_day(start)
    spent: Spent = {}
    days = KeyDay.objects.filter(organization_id=organization.pk, day__gte=first.date())
    ends = KeyTotal.objects.filter(organization_id=organization.pk, slot__gte=start, slot__lt=first)
    for table in (days, ends) if start < first else (days,):
        for key, user, team, cost in table.values_list("key_id", "user_id", "team_id").annotate(sum=Sum("cost")).order_by():
            for scope in (f"key:{key}", f"user:{user}@{organization.pk}", f"team:{team}", f"organization:{organization.pk}"):
                spent[scope] = spent.get(scope, 0) + cost
    return spent


def _tell(organization: Organization, limit: Limit, mark: int, spent: int, start: datetime) -> bool:
    whose = _whose(organization, limit)
    return tell(
        f"{_EVENT}{mark}",
        f"limit {limit.pk} since {start:%Y-%m-%dT%H:%MZ}",
        f"{whose}: {'the budget is spent' if mark == 100 else f'{mark} % of the budget are spent'}",
        f"{whose} in {organization.name}: ${in_usd(spent)} of ${in_usd(limit.amount)} are spent {_window(limit, start, organization)}."
        f"{_what_follows(limit) if mark == 100 else ''}\n\n{settings.PUBLIC_URL}/\n",
        to=_receivers(organization, limit),
        once=True,
    )


def _what_follows(limit: Limit) -> str:
    if limit.mode == Mode.SHADOW:
        return " This budget only counts: calls go on."
    return " Calls under it are refused." if limit.window == "total" else f" Calls under it are refused until the {limit.window} is over."


def _whose(organization: Organization, limit: Limit) -> str:
    if limit.key:
        return f"Key {limit.key.name}"
    if limit.user:
        return f"All keys of {limit.user.email}"
    return f"Team {limit.team.name}" if limit.team else f"All of {organization.name}"


def _window(limit: Limit, start: datetime, organization: Organization) -> str:
    if limit.window == "total":
        return "in all"
    local = start.astimezone(queries.zone_of(organization))
    return f"in the {limit.window} since {local:%Y-%m-%d} ({queries.zone_of(organization).key})"


def _receivers(organization: Organization, limit: Limit) -> list[str]:
    managing = Membership.objects.filter(organization=organization, role__in=[Role.OWNER, Role.ADMIN], user__is_active=True)
    receivers = list(managing.order_by("pk").values_list("user__email", flat=True))
    person = limit.key.user if limit.key else limit.user
    if person is not None and person.is_active and person.email not in receivers:
        receivers.insert(0, person.email)
    return receivers
