"""Database rows -> what the hot path reads; published on commit.

Whoever changes a row of WATCHED bumps the version in the same transaction; workers look at it every 2 s and read
everything again when it moved, and every 60 s in any case.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from django.conf import settings
from django.db import connection, models
from django.db.models import F, Q
from django.db.models.signals import m2m_changed, post_delete, post_save
from django.utils import timezone

from accounts import models as accounts
from accounts.principal import Limit, Principal
from providers import models as providers
from providers import registry
from providers.price import PriceBook
from providers.secrets import SealBroken, SecretText, open_sealed, redact
from proxy.catalog import Alias, Catalog, Current, Upstream
from proxy.models import Route, RouteTarget, SnapshotVersion

log = logging.getLogger(__name__)

LOOK_EVERY_SECONDS = 2.0
RELOAD_EVERY_SECONDS = 60.0
MOST_READS = 5

WATCHED: tuple[type[models.Model], ...] = (
    accounts.User,
    accounts.Organization,
    accounts.Team,
    accounts.Membership,
    accounts.ApiKey,
    accounts.Limit,
    providers.Credential,
    providers.UpstreamModel,
    providers.Price,
    Route,
    RouteTarget,
)


def listen() -> None:
    """Bump the version whenever a watched row is saved or deleted, or an app announces a change made in bulk."""
    for model in WATCHED:
        post_save.connect(_saved, sender=model, dispatch_uid=f"snapshot-save-{model.__name__}")
        post_delete.connect(_saved, sender=model, dispatch_uid=f"snapshot-delete-{model.__name__}")
    m2m_changed.connect(_saved, sender=accounts.Membership.teams.through, dispatch_uid="snapshot-teams")
    accounts.changed.connect(_saved, dispatch_uid="snapshot-accounts")
    providers.changed.connect(_saved, dispatch_uid="snapshot-providers")


def _saved(sender: object, update_fields: Iterable[str] | None = None, **_: Any) -> None:
    # A sign-in writes `last_login` alone: nothing that the hot path reads.
    if update_fields is not None and set(update_fields) <= {"last_login", "last_used_at"}:
        return
    publish()


def publish() -> None:
    """Bump the version inside the caller's transaction: it moves exactly when the change becomes visible."""
    if not SnapshotVersion.objects.filter(pk=1).update(version=F("version") + 1):
        SnapshotVersion.objects.get_or_create(pk=1, defaults={"version": 1})


def version() -> int:
    return SnapshotVersion.objects.filter(pk=1).values_list("version", flat=True).first() or 0


def load() -> Catalog:
    """Everything the hot path reads, as of one moment. Raises DatabaseError.

    Without a transaction, which on SQLite would keep writers out: when something changed meanwhile it is read again."""
    for _ in range(MOST_READS):
        catalog = _read()
        if version() == catalog.version:
            break
    redact.learn(upstream.secret.reveal() for upstream in catalog.upstreams)
    return catalog


def _read() -> Catalog:
    return Catalog(
        version=version(),  # first: rows newer than it only cause another reading
        peppers=tuple(settings.KEYRING.keys("pepper").values()),
        principals=_principals(_live_keys()),
        upstreams=tuple(_upstreams()),
        aliases=tuple(
            Alias(route.name, tuple(target.model for target in route.targets.all()), route.organization_id)
            for route in Route.objects.prefetch_related("targets").order_by("pk")
        ),
        prices=price_book(),
    )


def load_key(digests: Sequence[bytes]) -> Principal | None:
    """One key that memory does not know: one indexed look-up. Raises DatabaseError."""
    found = _principals(_live_keys().filter(digest__in=list(digests)))
    return next(iter(found.values()), None)


def price_book() -> PriceBook:
    return PriceBook(row.in_memory() for row in providers.Price.objects.all())


def _live_keys() -> models.QuerySet[accounts.ApiKey]:
    """Keys that work: neither they nor anything above them is revoked, expired or switched off, as of now."""
    return accounts.ApiKey.objects.filter(
        Q(expires_at=None) | Q(expires_at__gt=timezone.now()),
        revoked_at=None,
        user__is_active=True,
        organization__is_active=True,
        user__memberships__organization=F("organization"),
        user__memberships__role__in=[accounts.Role.OWNER, accounts.Role.ADMIN, accounts.Role.MEMBER],  # a viewer reads, and calls nothing
    ).select_related("organization")


def _principals(found: Iterable[accounts.ApiKey]) -> dict[bytes, Principal]:
    keys = list(found)
    if not keys:
        return {}
    # After the keys: a limit that was made together with its key cannot be missed.
    limits: dict[str, list[accounts.Limit]] = {}
    for limit in accounts.Limit.objects.filter(organization__in={key.organization_id for key in keys}):
        limits.setdefault(limit.scope, []).append(limit)
    principals: dict[bytes, Principal] = {}
    for key in keys:
        try:
            principals[bytes(key.digest)] = _principal(key, limits)
        except (ValueError, TypeError) as problem:  # written past our forms: this key fails closed, the others go on
            log.error("Key %s cannot be read and is left out: %s", key.pk, problem)
    return principals


def _principal(key: accounts.ApiKey, limits: dict[str, list[accounts.Limit]]) -> Principal:
    scopes = [f"organization:{key.organization_id}", f"user:{key.user_id}@{key.organization_id}", f"key:{key.pk}"]
    if key.team_id:
        scopes.append(f"team:{key.team_id}")
    return Principal(
        key_id=key.pk,
        organization_id=key.organization_id,
        user_id=key.user_id,
        team_id=key.team_id,
        models=tuple(key.allowed_models),
        networks=tuple(ipaddress.ip_network(network, strict=False) for network in key.allowed_networks),
        expires_at=key.expires_at.timestamp() if key.expires_at else None,
        limits=tuple(
            Limit(
                scope=scope,
                metric=limit.metric,
                amount=limit.amount,
                window=limit.window,
                time_zone=key.organization.time_zone,
                enforce=limit.mode == accounts.Mode.ENFORCE,
            )
            for scope in scopes
            for limit in limits.get(scope, ())
        ),
        tags=tuple(key.tags),
    )


def _upstreams() -> Iterable[Upstream]:
    keys = settings.KEYRING.keys("seal")
    for row in providers.Credential.objects.filter(state=providers.State.ACTIVE).prefetch_related("models").order_by("pk"):
        if row.kind not in registry.names():
            log.error("Credential %s is of kind '%s', which no adapter speaks: it is left out.", row.pk, row.kind)
            continue
        try:
            secret = open_sealed(bytes(row.secret), row.place(), keys) if row.secret else SecretText("")
        except SealBroken as problem:
            log.error("Credential %s cannot be opened and is left out: %s", row.pk, problem)
            continue
        yield Upstream(
            id=row.pk,
            kind=row.kind,
            label=row.label,
            prefix=row.prefix,
            base_url=row.effective_base_url,
            secret=secret,
            organization_id=row.organization_id,
            user_id=row.user_id,
            weight=row.weight,
            priority=row.priority,
            models=frozenset(model.upstream_id for model in row.models.all()),
            listed_only=_is_on(row.settings.get("listed_only")),
            pass_through=_is_on(row.settings.get("pass_through")),
            settings=row.settings,
        )


def _is_on(value: object) -> bool:
    return value is True or str(value).lower() in {"1", "true", "yes", "on"}


class Refresher(threading.Thread):
    """Keeps the catalog in force young. `install` swaps it in (and may first prepare what depends on it)."""

    def __init__(self, current: Current, install: Callable[[Catalog], None]) -> None:
        super().__init__(name="sluice-snapshot", daemon=True)
        self._current, self._install = current, install
        self._ending = threading.Event()

    def run(self) -> None:
        age = 0.0
        while not self._ending.wait(LOOK_EVERY_SECONDS):
            age += LOOK_EVERY_SECONDS
            try:
                if age >= RELOAD_EVERY_SECONDS or version() != self._current.catalog.version:
                    self._install(load())
                    age = 0.0
            except Exception:
                # The catalog in force goes on: calls with known keys do not need the database.
                log.exception("The settings could not be read again")
                connection.close()
        connection.close()

    def stop(self) -> None:
        self._ending.set()
        self.join(timeout=10)
