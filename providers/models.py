"""Upstream accounts, the models they list, and what those cost.

`changed` is sent, inside the transaction, by whoever changes rows that the hot path reads without calling `save()`.
`audited` is sent, inside the transaction, by every action a person may have to answer for: whoever keeps the record of
such things listens. It carries actor, organization_id, action, subject and detail.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import RegexValidator
from django.db import models
from django.db.models import Q
from django.dispatch import Signal
from django.utils import timezone

from providers import price, registry
from providers.secrets import Place

changed = Signal()
audited = Signal()


class State(models.TextChoices):
    ACTIVE = "active"
    DISABLED = "disabled"
    NEEDS_REAUTH = "needs_reauth", "needs sign-in"


class Credential(models.Model):
    """One upstream account. Those of one kind and prefix are a pool; the secret is sealed and never shown again."""

    label = models.CharField(max_length=100)
    kind = models.CharField(max_length=40, choices=registry.choices)
    organization = models.ForeignKey(
        "accounts.Organization", on_delete=models.CASCADE, null=True, blank=True, related_name="+", help_text="Empty = shared by everybody."
    )
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="+",
        help_text="Only for this person's keys.",
    )
    prefix = models.CharField(
        max_length=40,
        validators=[RegexValidator(r"^[A-Za-z0-9][A-Za-z0-9._-]*$", "Letters, digits, dot, dash and underscore, without a slash.")],
        help_text="Public model ids are prefix/model.",
    )
    # Not a URLField: its validator knows no host names without a dot, and the neighbour's server is often called just "ollama".
    base_url = models.CharField("base URL", max_length=500, blank=True, help_text="Empty = the vendor's own.")
    settings = models.JSONField(default=dict, blank=True)
    secret = models.BinaryField(null=True, editable=False)
    weight = models.PositiveIntegerField(default=1)
    priority = models.IntegerField(default=0, help_text="Higher goes first.")
    state = models.CharField(max_length=16, choices=State, default=State.ACTIVE)
    policy_accepted_at = models.DateTimeField(null=True, blank=True, editable=False)
    # Empty although it was accepted: on the command line, by whoever may run commands.
    policy_accepted_by = models.ForeignKey(
        "accounts.User", on_delete=models.SET_NULL, null=True, blank=True, editable=False, related_name="+"
    )
    imported_as = models.BinaryField(max_length=32, null=True, editable=False, help_text="By what a file that is imported again finds it.")
    models_refreshed_at = models.DateTimeField(null=True, blank=True, editable=False)
    models_due_at = models.DateTimeField(null=True, blank=True, editable=False, help_text="When to ask for its models again; empty = now.")
    last_error = models.CharField(max_length=500, blank=True, editable=False)
    # `{"read_at": ISO 8601, "windows": {name: {"used", "limit", "resets_at", "unit"}}}`, or empty where the upstream tells nothing.
    quota = models.JSONField(default=dict, blank=True, editable=False)
    frozen_until = models.DateTimeField(null=True, blank=True, editable=False, help_text="Until then it gets no calls.")
    frozen_reason = models.CharField(max_length=200, blank=True, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints = [models.CheckConstraint(condition=Q(weight__gte=1), name="credential_weight_is_positive")]
        indexes = [models.Index(fields=["prefix"])]

    def __str__(self) -> str:
        return f"{self.label} ({self.kind})"

    def clean(self) -> None:
        if self.kind not in registry.names():
            raise ValidationError({"kind": f"There is no adapter named '{self.kind}'."})

    @property
    def effective_base_url(self) -> str:
        return (self.base_url or registry.adapter(self.kind).base_url).rstrip("/")

    @property
    def origin(self) -> str:
        """scheme://host:port of the only place that its secret may be sent to."""
        parts = urlsplit(self.effective_base_url)
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
        return f"{parts.scheme}://{(parts.hostname or '').lower()}:{port}"

    @property
    def is_frozen(self) -> bool:
        return self.frozen_until is not None and self.frozen_until > timezone.now()

    def place(self) -> Place:
        """What the sealed secret is bound to."""
        return Place(table="providers_credential", row=str(self.pk), column="secret", purpose="upstream", origin=self.origin)


class OAuthToken(models.Model):
    """The tokens of a credential that signs in. Written by `tokens.py` alone, so that no other news can undo a renewal.

    Each renewal makes a new generation, and what is sealed is bound to it."""

    credential = models.OneToOneField(Credential, on_delete=models.CASCADE, primary_key=True, related_name="token")
    generation = models.PositiveBigIntegerField(default=0)
    sign_in = models.PositiveBigIntegerField(default=0)  # the generation that a person's sign-in gave; those after it renew it
    access = models.BinaryField()
    refresh = models.BinaryField(null=True)
    previous_refresh = models.BinaryField(null=True)  # kept until the one that followed it has worked once
    expires_at = models.DateTimeField(null=True)  # None = the vendor did not say
    refreshed_at = models.DateTimeField(default=timezone.now)
    next_refresh_at = models.DateTimeField(null=True)  # None = never by itself
    attempted_at = models.DateTimeField(null=True)  # a renewal was begun, and what became of it is not known
    failures = models.PositiveIntegerField(default=0)  # in a row
    last_error = models.CharField(max_length=40, blank=True)  # a code such as `invalid_grant`, never a vendor's text
    facts = models.JSONField(default=dict)

    class Meta:
        indexes = [models.Index(fields=["next_refresh_at"])]

    def __str__(self) -> str:
        return f"tokens of credential {self.credential_id}, generation {self.generation}"

    def place(self, column: str, origin: str) -> Place:
        """What a sealed token is bound to; `origin` is the only place that it may be sent to."""
        row = f"{self.credential_id}/{self.generation}"
        return Place(table="providers_oauthtoken", row=row, column=column, purpose="oauth", origin=origin)


class UpstreamModel(models.Model):
    """A model that a credential's upstream listed when it was last asked."""

    credential = models.ForeignKey(Credential, on_delete=models.CASCADE, related_name="models")
    upstream_id = models.CharField(max_length=200)
    detail = models.JSONField(default=dict, blank=True)
    seen_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["credential", "upstream_id"], name="one_row_per_credential_and_model")]

    def __str__(self) -> str:
        return self.upstream_id


class PriceSource(models.TextChoices):
    HAND = "hand", "by hand"
    PACKAGE = "package", "price package"
    UPSTREAM = "upstream", "the upstream's list"


class Price(models.Model):
    """A dated row that never changes: a new price is a new row. Amounts are micro-dollars per million tokens."""

    pattern = models.CharField(max_length=240, help_text="Public model ids; * stands for anything.")
    starts_at = models.DateTimeField(default=timezone.now)
    input = models.PositiveBigIntegerField()
    output = models.PositiveBigIntegerField()
    cache_read = models.PositiveBigIntegerField(null=True, blank=True, help_text="Empty = as plain input.")
    cache_write = models.PositiveBigIntegerField(null=True, blank=True, help_text="Empty = as plain input.")
    long_above = models.PositiveBigIntegerField(
        null=True, blank=True, help_text="The input tokens above which the long rates hold for the whole request; empty = never."
    )
    long_input = models.PositiveBigIntegerField(null=True, blank=True)
    long_output = models.PositiveBigIntegerField(null=True, blank=True)
    long_cache_read = models.PositiveBigIntegerField(null=True, blank=True)
    long_cache_write = models.PositiveBigIntegerField(null=True, blank=True)
    source = models.CharField(max_length=8, choices=PriceSource, default=PriceSource.HAND, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(long_above=None, long_input=None, long_output=None)
                | Q(long_above__isnull=False, long_input__isnull=False, long_output__isnull=False),
                name="price_has_all_long_rates_or_none",
            )
        ]
        indexes = [models.Index(fields=["pattern", "starts_at"])]

    def __str__(self) -> str:
        return f"{self.pattern} from {self.starts_at:%Y-%m-%d}"

    def save(self, *args: object, **kwargs: object) -> None:
        if not self._state.adding:
            raise ValidationError("A price never changes: add a new row with its own start.")
        super().save(*args, **kwargs)  # type: ignore[arg-type]

    def in_memory(self) -> price.Price:
        """The row as the arithmetic knows it."""
        long = None
        if self.long_input is not None and self.long_output is not None:
            long = price.Rates(self.long_input, self.long_output, self.long_cache_read, self.long_cache_write)
        return price.Price(
            id=self.pk,
            pattern=self.pattern,
            starts_at=self.starts_at.timestamp(),
            input=self.input,
            output=self.output,
            cache_read=self.cache_read,
            cache_write=self.cache_write,
            by_hand=self.source == PriceSource.HAND,
            long_above=self.long_above,
            long=long,
        )


class KeyringCanary(models.Model):
    """One sealed word: a start with the wrong keyring is refused at once instead of failing call by call."""

    sealed = models.BinaryField()
