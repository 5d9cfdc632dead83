"""Aliases, and what is kept of each request.

The log is append-only and stands by itself: it refers to people and keys without a constraint, so that nothing is
ever deleted or rewritten through it.
"""

from __future__ import annotations

from typing import Any

from django.db import models
from django.db.models import F

from accounts.models import ApiKey, Organization, Team, User
from providers.models import Credential


class Route(models.Model):
    """An alias: a name of our own for models in the order in which to try them. `*` catches every unknown name."""

    organization = models.ForeignKey(
        Organization, on_delete=models.CASCADE, null=True, blank=True, related_name="+", help_text="Empty = for everybody."
    )
    name = models.CharField(max_length=200)

    class Meta:
        verbose_name = "alias"
        verbose_name_plural = "aliases"
        constraints = [
            models.UniqueConstraint(fields=["organization", "name"], name="alias_is_unique_in_its_organization"),
            models.UniqueConstraint(fields=["name"], condition=models.Q(organization=None), name="shared_alias_is_unique"),
        ]

    def __str__(self) -> str:
        return self.name


class RouteTarget(models.Model):
    route = models.ForeignKey(Route, on_delete=models.CASCADE, related_name="targets")
    position = models.PositiveSmallIntegerField(default=0)
    model = models.CharField(max_length=240, help_text="prefix/model, or a model that some upstream lists.")

    class Meta:
        ordering = ["position", "id"]

    def __str__(self) -> str:
        return self.model


class SnapshotVersion(models.Model):
    """One row. Bumped by every transaction that changes what the hot path reads; workers look at it every 2 s."""

    version = models.BigIntegerField(default=0)


def _refers(to: type[models.Model] | str, **options: Any) -> Any:
    return models.ForeignKey(to, on_delete=models.DO_NOTHING, db_constraint=False, related_name="+", db_index=False, **options)


class UsageSource(models.TextChoices):
    REPORTED = "reported"
    ESTIMATED = "estimated"
    MISSING = "missing"


class UsageEvent(models.Model):
    """One admitted request, or a correction of one. Never edited.

    `request_id` is a UUIDv7 whose milliseconds are `at`, and (`at`, `request_id`) is the table's key on Postgres, so
    that it can be partitioned by month without doubling a row. Tokens are disjoint parts."""

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
    usage_source = models.CharField(max_length=9, choices=UsageSource)
    first_byte_ms = models.IntegerField(null=True)
    duration_ms = models.IntegerField(default=0)
    corrects = models.UUIDField(null=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["at", "request_id"], name="usage_at_request_id")]
        indexes = [
            models.Index(fields=["key", "-at"], name="usage_by_key"),
            models.Index(fields=["organization", "-at"], name="usage_by_organization"),
        ]

    def __str__(self) -> str:
        return str(self.request_id)

    @property
    def input_tokens(self) -> int:
        return self.fresh_input + self.cache_read + self.cache_write

    @property
    def output_tokens(self) -> int:
        return self.output + self.reasoning


class UsageTotal(models.Model):
    """Sums of usage rows by quarter of an hour (zones of :30 and :45 exist). 0 stands for "none" in a reference."""

    slot = models.DateTimeField()
    organization_id = models.BigIntegerField()
    team_id = models.BigIntegerField(default=0)
    user_id = models.BigIntegerField()
    key_id = models.BigIntegerField()
    credential_id = models.BigIntegerField(default=0)
    provider = models.CharField(max_length=40)
    model = models.CharField(max_length=240)
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
