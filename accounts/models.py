"""People, organizations, issued keys, limits, and the record of who changed what.

`changed` is sent, inside the transaction, by whoever changes rows that the hot path reads without calling `save()`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib.auth.base_user import AbstractBaseUser, BaseUserManager
from django.contrib.auth.models import PermissionsMixin
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q, Value
from django.db.models.functions import Coalesce, Lower
from django.dispatch import Signal
from django.utils import timezone

from accounts.principal import ID_LENGTH, PREFIX

changed = Signal()


class UserManager(BaseUserManager["User"]):
    def create_user(self, email: str, password: str | None = None, **fields: Any) -> User:
        user = self.model(email=self.normalize_email(email).lower(), **fields)
        user.set_password(password)
        user.save(using=self._db)
        return user

    def create_superuser(self, email: str, password: str | None = None, **fields: Any) -> User:
        return self.create_user(email, password, is_staff=True, is_superuser=True, **fields)

    def get_by_natural_key(self, email: str | None) -> User:
        return self.get(email=(email or "").lower())


class User(AbstractBaseUser, PermissionsMixin):
    """A person, known by e-mail. `is_superuser` is the operator of the deployment."""

    email = models.EmailField(unique=True)
    name = models.CharField(max_length=150, blank=True)
    is_active = models.BooleanField(default=True)
    is_staff = models.BooleanField(default=False, help_text="May open the operators' admin.")
    date_joined = models.DateTimeField(default=timezone.now)

    objects: ClassVar[UserManager] = UserManager()

    USERNAME_FIELD = "email"
    REQUIRED_FIELDS: ClassVar[list[str]] = []

    class Meta:
        constraints = [
            models.UniqueConstraint(
                Lower("email"), name="user_email_is_unique_in_any_case", violation_error_message="There is already a user with this e-mail."
            )
        ]

    def __str__(self) -> str:
        return self.email

    def clean(self) -> None:
        super().clean()
        self.email = self.email.lower()


class Freezable(models.Model):
    """May be frozen by hand: until that moment nobody below it calls a model, and then it thaws by itself."""

    frozen_until = models.DateTimeField(null=True, blank=True, editable=False)
    frozen_reason = models.CharField(max_length=200, blank=True, editable=False)

    class Meta:
        abstract = True

    @property
    def is_frozen(self) -> bool:
        return self.frozen_until is not None and self.frozen_until > timezone.now()


class Organization(Freezable):
    slug = models.SlugField(unique=True)
    name = models.CharField(max_length=150)
    time_zone = models.CharField(max_length=64, default="UTC", help_text="In which days, weeks and months of money begin.")
    is_active = models.BooleanField(default=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        from zoneinfo import ZoneInfo

        try:
            ZoneInfo(self.time_zone)
        except (KeyError, ValueError, OSError):
            raise ValidationError({"time_zone": f"There is no time zone named '{self.time_zone}'."}) from None


class Team(Freezable):
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="teams")
    name = models.CharField(max_length=150)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["organization", "name"], name="team_name_is_unique_in_its_organization")]

    def __str__(self) -> str:
        return self.name


class Role(models.TextChoices):
    OWNER = "owner"
    ADMIN = "admin"
    MEMBER = "member"
    VIEWER = "viewer"


class Membership(models.Model):
    """A user's place in an organization. Its keys work only while it stands."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="memberships")
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=16, choices=Role, default=Role.MEMBER)
    teams = models.ManyToManyField(Team, blank=True, related_name="members")

    class Meta:
        constraints = [models.UniqueConstraint(fields=["user", "organization"], name="one_membership_per_user_and_organization")]

    def __str__(self) -> str:
        return f"{self.user} in {self.organization}"

    @property
    def manages(self) -> bool:
        """May see and change everybody's things in the organization."""
        return self.role in {Role.OWNER, Role.ADMIN}


class ApiKey(Freezable):
    """An issued key. The key itself is shown once; what stays is its digest, its id and its last four characters."""

    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="keys")
    user = models.ForeignKey(User, on_delete=models.PROTECT, related_name="keys")
    team = models.ForeignKey(Team, on_delete=models.PROTECT, null=True, blank=True, related_name="keys")
    name = models.CharField(max_length=150)
    handle = models.CharField(max_length=ID_LENGTH, null=True, unique=True, editable=False)  # noqa: DJ001 an imported key has none
    digest = models.BinaryField(max_length=32, unique=True, editable=False)
    pepper_id = models.CharField(max_length=8, editable=False)
    last_four = models.CharField(max_length=4, editable=False)
    allowed_models = models.JSONField(default=list, blank=True, help_text="Patterns of model names such as gpt-4o or demo/*; empty = all.")
    allowed_networks = models.JSONField(
        default=list, blank=True, help_text="Networks it may call from, such as 10.0.0.0/8; empty = anywhere."
    )
    tags = models.JSONField(default=list, blank=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True, editable=False)
    replaced_by = models.OneToOneField("self", on_delete=models.PROTECT, null=True, blank=True, editable=False, related_name="replaces")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    last_used_at = models.DateTimeField(null=True, blank=True, editable=False)
    # Whoever did may end it. Empty although it is frozen: on the command line, or before this was kept.
    frozen_by = models.ForeignKey(User, on_delete=models.SET_NULL, null=True, blank=True, editable=False, related_name="+")

    class Meta:
        verbose_name = "API key"
        indexes = [models.Index(fields=["organization", "user"])]

    def __str__(self) -> str:
        return f"{self.name} ({self.hint})"

    @property
    def is_imported(self) -> bool:
        """It was issued elsewhere and works as it was given: it has no id, and is found by its digest alone."""
        return self.handle is None

    @property
    def hint(self) -> str:
        """Enough to recognize the key by: its prefix and last four characters."""
        if self.handle:
            return f"{PREFIX}{self.handle}…{self.last_four}"
        return f"imported …{self.last_four}" if self.last_four else "imported"

    @property
    def state(self) -> str:
        """active, revoked, expired, frozen, or `retiring` while a rotated key's overlap runs."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= timezone.now():
            return "expired"
        if self.is_frozen:
            return "frozen"
        return "retiring" if self.replaced_by_id else "active"


class Metric(models.TextChoices):
    REQUESTS = "rpm", "requests per minute"
    TOKENS = "tpm", "tokens per minute"
    CONCURRENCY = "concurrency", "open requests"
    MONEY = "money", "money (micro-dollars per window)"


class Window(models.TextChoices):
    NONE = "", "-"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    TOTAL = "total"


class Mode(models.TextChoices):
    ENFORCE = "enforce"
    SHADOW = "shadow", "shadow (count, never refuse)"


class Limit(models.Model):
    """At most one of team, user and key narrows it; with none of them it is the whole organization's."""

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="limits")
    team = models.ForeignKey(Team, on_delete=models.CASCADE, null=True, blank=True, related_name="limits")
    user = models.ForeignKey(User, on_delete=models.CASCADE, null=True, blank=True, related_name="limits")
    key = models.ForeignKey(ApiKey, on_delete=models.CASCADE, null=True, blank=True, related_name="limits")
    metric = models.CharField(max_length=16, choices=Metric)
    amount = models.PositiveBigIntegerField(help_text="Requests or tokens per minute, open requests, or micro-dollars (1 USD = 1000000).")
    window = models.CharField(max_length=8, choices=Window, blank=True, default=Window.NONE)
    mode = models.CharField(max_length=8, choices=Mode, default=Mode.ENFORCE)

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=(Q(team=None) & Q(user=None)) | (Q(team=None) & Q(key=None)) | (Q(user=None) & Q(key=None)),
                name="limit_has_one_scope",
                violation_error_message="A limit is for one team, one user or one key: choose at most one of them.",
            ),
            models.CheckConstraint(
                condition=(Q(metric="money") & ~Q(window="")) | (~Q(metric="money") & Q(window="")),
                name="limit_has_a_window_exactly_when_it_is_money",
                violation_error_message="A limit of money needs a window, and no other limit has one.",
            ),
            models.UniqueConstraint(
                "organization",
                Coalesce("team", Value(0)),
                Coalesce("user", Value(0)),
                Coalesce("key", Value(0)),
                "metric",
                "window",
                name="one_limit_per_scope_metric_and_window",
                violation_error_message="There is such a limit already: change that one.",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.scope}: {self.amount} {self.metric} {self.window}".rstrip()

    @property
    def scope(self) -> str:
        if self.key_id:
            return f"key:{self.key_id}"
        if self.user_id:
            return f"user:{self.user_id}@{self.organization_id}"
        return f"team:{self.team_id}" if self.team_id else f"organization:{self.organization_id}"


class AuditEntry(models.Model):
    """Who changed what, when. Written by actions, never edited."""

    at = models.DateTimeField(default=timezone.now, db_index=True)
    actor = models.ForeignKey(User, on_delete=models.SET_NULL, null=True, related_name="+")
    organization = models.ForeignKey(Organization, on_delete=models.SET_NULL, null=True, related_name="audit")
    action = models.CharField(max_length=64)  # "key.issued", "limit.changed"
    subject = models.CharField(max_length=200)  # "key 12 (ci)"
    detail = models.JSONField(default=dict, blank=True)

    class Meta:
        verbose_name_plural = "audit entries"
        indexes = [models.Index(fields=["organization", "at"])]

    def __str__(self) -> str:
        return f"{self.action} {self.subject}"


class Notice(models.Model):
    """Something that operators are told of by mail: once for as long as it lasts. See accounts/notices.py."""

    event = models.CharField(max_length=40)  # "credential.needs_reauth"
    subject = models.CharField(max_length=200)  # which one: "credential 7"
    seen_at = models.DateTimeField()  # it was so then
    tried_at = models.DateTimeField()  # a process took it on to send the mail
    mailed_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["event", "subject"], name="one_notice_per_event_and_subject")]

    def __str__(self) -> str:
        return f"{self.event} {self.subject}"
