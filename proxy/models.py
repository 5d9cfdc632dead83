"""Aliases, and what is kept of each request.

The log is append-only and stands by itself: it refers to people and keys without a constraint, so that nothing is
ever deleted or rewritten through it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, ClassVar

from django.db import models
from django.db.models import F

from accounts.models import ApiKey, Organization, Team, User
from providers.models import Credential


class OnAbort(models.TextChoices):
    CANCEL = "cancel", "cancel the upstream"
    DRAIN = "drain", "read on for a while, for the bill"


class Route(models.Model):
    """An alias: a name of our own for models in the order in which to try them. `*` catches every unknown name."""

    organization = models.ForeignKey(
        Organization, on_delete=models.CASCADE, null=True, blank=True, related_name="+", help_text="Empty = for everybody."
    )
    name = models.CharField(max_length=200)
    defaults = models.JSONField(default=dict, blank=True, help_text='Where the client sent nothing, such as {"temperature": 0.2}.')
    overrides = models.JSONField(default=dict, blank=True, help_text='Whatever the client sent, such as {"max_tokens": 1000}.')
    drops = models.JSONField(default=list, blank=True, help_text='Parameters that are not passed on, such as ["logit_bias"].')
    on_abort = models.CharField("when the client leaves", max_length=6, choices=OnAbort, default=OnAbort.CANCEL)
    drain_seconds = models.PositiveSmallIntegerField(default=0, blank=True, help_text="For how long to read on: at most 30.")

    class Meta:
        verbose_name = "alias"
        verbose_name_plural = "aliases"
        constraints = [
            models.UniqueConstraint(fields=["organization", "name"], name="alias_is_unique_in_its_organization"),
            models.UniqueConstraint(fields=["name"], condition=models.Q(organization=None), name="shared_alias_is_unique"),
            models.CheckConstraint(
                condition=models.Q(on_abort="cancel", drain_seconds=0) | models.Q(on_abort="drain", drain_seconds__gte=1),
                name="alias_drains_for_a_time_or_cancels",
            ),
        ]

    def __str__(self) -> str:
        return self.name


class RouteTarget(models.Model):
    route = models.ForeignKey(Route, on_delete=models.CASCADE, related_name="targets")
    position = models.PositiveSmallIntegerField(default=0, help_text="Lower goes first; the same = in turns, by weight.")
    model = models.CharField(
        max_length=240, help_text="prefix/model, or a model that some upstream lists; prefix/* under * is the name that was asked for."
    )
    weight = models.PositiveSmallIntegerField(default=1)

    class Meta:
        ordering = ["position", "id"]
        constraints = [
            models.CheckConstraint(
                condition=models.Q(weight__gte=1),
                name="alias_target_weight_is_positive",
                violation_error_message="A weight is a whole number from 1 to 1000.",
            )
        ]

    def __str__(self) -> str:
        return self.model


class FrozenModel(models.Model):
    """A model that nobody calls until a moment, by its public id or the name of an alias; * stands for anything."""

    organization = models.ForeignKey(
        Organization, on_delete=models.CASCADE, null=True, blank=True, related_name="+", help_text="Empty = for everybody."
    )
    pattern = models.CharField(max_length=240)
    until = models.DateTimeField(db_index=True)
    reason = models.CharField(max_length=200, blank=True)

    class Meta:
        verbose_name = "frozen model"

    def __str__(self) -> str:
        return f"{self.pattern} until {self.until:%Y-%m-%d %H:%M} UTC"


class Rest(models.Model):
    """How long a model of a credential ("" = all of them) is left alone: `named` where its upstream said so, else we chose it.

    Kept, so that a restart knows. `times` is how many ejections in a row it is, and 0 where it is none."""

    credential = models.ForeignKey(Credential, on_delete=models.CASCADE, related_name="rests")
    model = models.CharField(max_length=240, blank=True)
    until = models.DateTimeField(db_index=True)
    reason = models.CharField(max_length=100, blank=True)
    # Workers of the version before write rows without these two.
    named = models.BooleanField(default=True, db_default=True)
    times = models.PositiveIntegerField(default=0, db_default=0)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["credential", "model"], name="one_rest_per_credential_and_model")]

    def __str__(self) -> str:
        return f"{self.model or 'all models'} until {self.until:%Y-%m-%d %H:%M} UTC"


class SnapshotVersion(models.Model):
    """One row. Bumped by every transaction that changes what the hot path reads; workers look at it every 2 s."""

    version = models.BigIntegerField(default=0)


def _refers(to: type[models.Model] | str, **options: Any) -> Any:
    return models.ForeignKey(to, on_delete=models.DO_NOTHING, db_constraint=False, related_name="+", db_index=False, **options)


class UsageSource(models.TextChoices):
    REPORTED = "reported"
    ESTIMATED = "estimated"
    MISSING = "missing"


class UsageEvents(models.Manager["UsageEvent"]):
    def of_requests(self, request_ids: Iterable[uuid.UUID]) -> models.QuerySet[UsageEvent]:
        """Rows by their ids. The moment is inside each id, and without it every month would be searched."""
        ids = list(request_ids)
        return self.filter(at__in={moment_of(one) for one in ids}, pk__in=ids)


def moment_of(request_id: uuid.UUID) -> datetime:
    """When it arrived, to the millisecond. An id that is no UUIDv7 gives a moment at which no row can be."""
    milliseconds = request_id.int >> 80
    try:
        return datetime.fromtimestamp(milliseconds // 1000, UTC).replace(microsecond=milliseconds % 1000 * 1000)
    except (OverflowError, ValueError, OSError):
        return datetime.max.replace(tzinfo=UTC)


class UsageEvent(models.Model):
    """One admitted request, or a correction of one. Never edited.

    `request_id` is a UUIDv7 whose milliseconds are `at`, and (`at`, `request_id`) is the table's key on Postgres, where it
    is partitioned by month: whoever looks for a row by its id says its moment, too (`of_requests`). Tokens are disjoint parts."""

    request_id = models.UUIDField(primary_key=True)
    at = models.DateTimeField()
    organization = _refers(Organization)
    team = _refers(Team, null=True)
    user = _refers(User)
    key = _refers(ApiKey)
    credential = _refers(Credential, null=True)
    endpoint = models.CharField(max_length=40)
    model = models.CharField(max_length=240)  # as the client named it
    served_model = models.CharField(max_length=240, blank=True)
    provider = models.CharField(max_length=40, blank=True)
    status = models.SmallIntegerField()
    error = models.CharField(max_length=100, blank=True)
    stream = models.BooleanField(default=False)
    attempts = models.SmallIntegerField(default=0)
    fresh_input = models.BigIntegerField(default=0)
    cache_read = models.BigIntegerField(default=0)
    cache_write = models.BigIntegerField(default=0)
    output = models.BigIntegerField(default=0)
    reasoning = models.BigIntegerField(default=0)
    cost = models.BigIntegerField(null=True)  # micro-dollars; NULL = unpriced
    price_id = models.BigIntegerField(null=True)
    upstream_cost = models.BigIntegerField(null=True)  # micro-dollars, as the upstream says; nothing is charged by it
    usage_source = models.CharField(max_length=9, choices=UsageSource)
    first_byte_ms = models.IntegerField(null=True)
    duration_ms = models.IntegerField(default=0)
    corrects = models.UUIDField(null=True)
    # The attempts before the last: see `Tried` in call.py. NULL where the first was the last.
    tried = models.JSONField(null=True)

    objects: ClassVar[UsageEvents] = UsageEvents()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["at", "request_id"], name="usage_at_request_id")]
        indexes = [
            models.Index(fields=["key", "-at"], name="usage_by_key"),
            models.Index(fields=["organization", "-at"], name="usage_by_organization"),
            # Of what is rare: a list of it would look through everything else to find none.
            models.Index(fields=["at", "request_id"], name="usage_failed", condition=models.Q(status__gte=400)),
            models.Index(fields=["at", "request_id"], name="usage_unpriced", condition=models.Q(cost=None)),
            models.Index(
                fields=["usage_source", "at", "request_id"],
                name="usage_not_reported",
                condition=models.Q(usage_source__in=["estimated", "missing"]),
            ),
        ]

    def __str__(self) -> str:
        return str(self.request_id)

    @property
    def input_tokens(self) -> int:
        return self.fresh_input + self.cache_read + self.cache_write

    @property
    def output_tokens(self) -> int:
        return self.output + self.reasoning


class Total(models.Model):
    """What usage rows amount to. Its tables differ in whose and when: see totals.py."""

    requests = models.BigIntegerField(default=0)
    errors = models.BigIntegerField(default=0)
    unpriced = models.BigIntegerField(default=0)
    estimated = models.BigIntegerField(default=0)
    fresh_input = models.BigIntegerField(default=0)
    cache_read = models.BigIntegerField(default=0)
    cache_write = models.BigIntegerField(default=0)
    output = models.BigIntegerField(default=0)
    reasoning = models.BigIntegerField(default=0)
    cost = models.BigIntegerField(default=0)  # micro-dollars, of the priced ones

    class Meta:
        abstract = True


class UsageTotal(Total):
    """Sums of usage rows by quarter of an hour (zones of :30 and :45 exist). 0 stands for "none" in a reference."""

    slot = models.DateTimeField()
    organization_id = models.BigIntegerField()
    team_id = models.BigIntegerField(default=0)
    user_id = models.BigIntegerField()
    key_id = models.BigIntegerField()
    credential_id = models.BigIntegerField(default=0)
    provider = models.CharField(max_length=40)
    model = models.CharField(max_length=240)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["slot", "organization_id", "team_id", "user_id", "key_id", "credential_id", "provider", "model"],
                name="usage_total_by_slot_and_dimensions",
            )
        ]
        indexes = [
            models.Index(fields=["key_id", "slot"], name="usage_total_by_key"),
            models.Index(fields=["organization_id", "slot"], name="usage_total_by_organization"),
        ]

    def __str__(self) -> str:
        return f"{self.slot:%Y-%m-%d %H:%M} key {self.key_id} {self.model}"


class ModelTotal(Total):
    """The same sums without who called: what an organization used as a whole, in few rows however many keys it has."""

    pk = models.CompositePrimaryKey("organization_id", "slot", "provider", "model")
    organization_id = models.BigIntegerField()
    slot = models.DateTimeField()
    provider = models.CharField(max_length=40)
    model = models.CharField(max_length=240)

    def __str__(self) -> str:
        return f"{self.slot:%Y-%m-%d %H:%M} organization {self.organization_id} {self.model}"


class KeyTotal(Total):
    """The same sums without what was called: charts of keys, and the ends of long windows."""

    pk = models.CompositePrimaryKey("key_id", "slot", "organization_id", "team_id", "user_id")
    key_id = models.BigIntegerField()
    slot = models.DateTimeField()
    organization_id = models.BigIntegerField()
    team_id = models.BigIntegerField(default=0)
    user_id = models.BigIntegerField()

    class Meta:
        indexes = [
            models.Index(fields=["organization_id", "slot"], name="key_total_by_organization"),
            models.Index(fields=["team_id", "slot"], name="key_total_by_team", condition=models.Q(team_id__gt=0)),
        ]

    def __str__(self) -> str:
        return f"{self.slot:%Y-%m-%d %H:%M} key {self.key_id}"


class KeyDay(Total):
    """The same sums by whole days in UTC: long windows of keys and people. Their ends are cut from quarters of an hour."""

    pk = models.CompositePrimaryKey("key_id", "day", "organization_id", "team_id", "user_id", "provider", "model")
    key_id = models.BigIntegerField()
    day = models.DateField()
    organization_id = models.BigIntegerField()
    team_id = models.BigIntegerField(default=0)
    user_id = models.BigIntegerField()
    provider = models.CharField(max_length=40)
    model = models.CharField(max_length=240)

    class Meta:
        indexes = [
            models.Index(fields=["organization_id", "day"], name="key_day_by_organization"),
            models.Index(fields=["team_id", "day"], name="key_day_by_team", condition=models.Q(team_id__gt=0)),
        ]

    def __str__(self) -> str:
        return f"{self.day} key {self.key_id} {self.model}"


class LogStart(models.Model):
    """One row once anything was deleted from the log: rows before `at` are gone, while their sums stay."""

    at = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.at:%Y-%m-%d}"


class RefusedCalls(models.Model):
    """How often a key was refused, by hour and code. Key 0: a key that is nobody's."""

    hour = models.DateTimeField()
    key_id = models.BigIntegerField(default=0)
    status = models.SmallIntegerField()
    code = models.CharField(max_length=100)
    count = models.BigIntegerField(default=0)

    class Meta:
        verbose_name_plural = "refused calls"
        constraints = [models.UniqueConstraint(fields=["hour", "key_id", "status", "code"], name="refused_by_hour_key_and_code")]
        indexes = [models.Index(F("key_id"), F("hour").desc(), name="refused_by_key")]

    def __str__(self) -> str:
        return f"{self.count} × {self.code}"
