"""Database rows -> what the hot path reads; published on commit.

Whoever changes a row of WATCHED bumps the version in the same transaction; workers look at it every 2 s and read
everything again when it moved, and every 60 s in any case. Where there is Redis, they are also told on commit.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from django.conf import settings
from django.db import connection, models, transaction
from django.db.models import F, Q
from django.db.models.signals import m2m_changed, post_delete, post_save
from django.utils import timezone

from accounts import models as accounts
from accounts.principal import Limit, Principal
from providers import given, registry, tokens
from providers import models as providers
from providers.oauth import Lease
from providers.queries import price_book
from providers.secrets import SealBroken, SecretText, open_sealed, redact
from proxy import catalog
from proxy.catalog import LONGEST_DRAIN_SECONDS, Alias, Catalog, Current, Parameters, Upstream
from proxy.models import FrozenModel, Route, RouteTarget, SnapshotVersion
from proxy.patience import patient
from proxy.stores import news

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
    FrozenModel,
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
    if settings.ENV.redis_url is not None and not any(waiting[1] is _announce for waiting in connection.run_on_commit):
        transaction.on_commit(_announce)


def _announce() -> None:
    news.of(settings.ENV.redis_url).tell(news.SNAPSHOT)


def version() -> int:
    return SnapshotVersion.objects.filter(pk=1).values_list("version", flat=True).first() or 0


class Running:
    """The server that runs in this process, if one does."""

    current: Current | None = None


running = Running()


def in_force() -> Catalog:
    """What the server of this process works by, at most some seconds old; without one, as of now. Raises DatabaseError."""
    return running.current.catalog if running.current is not None else load()


def load() -> Catalog:
    """Everything the hot path reads, as of one moment. Raises DatabaseError.

    Without a transaction, which on SQLite would keep writers out: when something changed meanwhile it is read again."""
    with patient():
        for _ in range(MOST_READS):
            found = _read()
            if version() == found.version:
                break
    redact.learn(_secrets_of(found))
    return found


def _secrets_of(found: Catalog) -> Iterator[str]:
    """Of all accounts, those included that have to be signed in again."""
    for upstream in (*found.upstreams, *found.signed_out):
        yield upstream.secret.reveal()
        yield from given.secrets_in(upstream.settings)


def _read() -> Catalog:
    first = version()  # first: rows newer than it only cause another reading
    upstreams, signed_out = _upstreams()
    return Catalog(
        version=first,
        peppers=tuple(settings.KEYRING.keys("pepper").values()),
        principals=_principals(_live_keys()),
        upstreams=upstreams,
        signed_out=signed_out,
        aliases=tuple(_aliases(Route.objects.prefetch_related("targets").order_by("pk"))),
        prices=price_book(),
        frozen=tuple(
            catalog.FrozenModel(one.pattern, one.until.timestamp(), one.organization_id)
            for one in FrozenModel.objects.filter(until__gt=timezone.now())
        ),
    )


def load_key(digests: Sequence[bytes]) -> Principal | None:
    """One key that memory does not know: one indexed look-up. Raises DatabaseError."""
    found = _principals(_live_keys().filter(digest__in=list(digests)))
    return next(iter(found.values()), None)


def load_principal(key_id: int) -> Principal | None:
    """The caller behind a key, if it works now."""
    found = _principals(_live_keys().filter(pk=key_id))
    return next(iter(found.values()), None)


def _live_keys() -> models.QuerySet[accounts.ApiKey]:
    """Keys that work: neither they nor anything above them is revoked, expired or switched off, as of now."""
    return accounts.ApiKey.objects.filter(
        Q(expires_at=None) | Q(expires_at__gt=timezone.now()),
        revoked_at=None,
        user__is_active=True,
        organization__is_active=True,
        user__memberships__organization=F("organization"),
        user__memberships__role__in=[accounts.Role.OWNER, accounts.Role.ADMIN, accounts.Role.MEMBER],  # a viewer reads, and calls nothing
    ).select_related("organization", "team")


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


def _frozen(key: accounts.ApiKey) -> tuple[float | None, str]:
    """Until when nobody may call with it, and why."""
    above = [thing for thing in (key, key.team, key.organization) if thing is not None and thing.is_frozen]
    if not above:
        return None, ""
    last = max(above, key=lambda thing: thing.frozen_until or timezone.now())
    return (last.frozen_until or timezone.now()).timestamp(), last.frozen_reason


def _principal(key: accounts.ApiKey, limits: dict[str, list[accounts.Limit]]) -> Principal:
    scopes = [f"organization:{key.organization_id}", f"user:{key.user_id}@{key.organization_id}", f"key:{key.pk}"]
    if key.team_id:
        scopes.append(f"team:{key.team_id}")
    frozen_until, frozen_reason = _frozen(key)
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
        frozen_until=frozen_until,
        frozen_reason=frozen_reason,
    )


def _upstreams() -> tuple[tuple[Upstream, ...], tuple[Upstream, ...]]:
    """Those that serve, and those that have to be signed in again."""
    states = (providers.State.ACTIVE, providers.State.NEEDS_REAUTH)
    serving: list[Upstream] = []
    signed_out: list[Upstream] = []
    for row in providers.Credential.objects.filter(state__in=states).select_related("token").prefetch_related("models").order_by("pk"):
        if row.kind not in registry.names():
            log.error("Credential %s is of kind '%s', which no adapter speaks: it is left out.", row.pk, row.kind)
        elif row.state == providers.State.NEEDS_REAUTH:
            signed_out.append(_upstream(row, SecretText(""), row.settings, None))
        else:
            try:
                serving.append(_open_upstream(row))
            except SealBroken as problem:
                log.error("Credential %s cannot be opened and is left out: %s", row.pk, problem)
    return tuple(serving), tuple(signed_out)


def _open_upstream(row: providers.Credential) -> Upstream:
    """Raises SealBroken."""
    if row.secret:
        return _upstream(row, open_sealed(bytes(row.secret), row.place(), settings.KEYRING.keys("seal")), row.settings, None)
    if hasattr(row, "token"):
        access = tokens.access_in(row.token)
        return _upstream(row, access.secret, access.settings, access.lease)
    return _upstream(row, SecretText(""), row.settings, None)


def _upstream(row: providers.Credential, secret: SecretText, options: Mapping[str, str], lease: Lease | None) -> Upstream:
    pass_through = _is_on(row.settings.get("pass_through"))
    listed = row.models.all()
    return Upstream(
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
        models=frozenset(model.upstream_id for model in listed),
        details={model.upstream_id: model.detail for model in listed if model.detail},
        listed_only=_is_on(row.settings.get("listed_only")),
        sticky=str(row.settings.get("sticky", "")),
        pass_through=pass_through,
        callers_key_only=pass_through and not (secret or lease) and registry.adapter(row.kind).needs_secret,
        settings=options,
        lease=lease,
        frozen_until=row.frozen_until.timestamp() if row.frozen_until else 0.0,
    )


def _aliases(routes: Iterable[Route]) -> Iterable[Alias]:
    for route in routes:
        targets = list(route.targets.all())
        if not (isinstance(route.defaults, dict) and isinstance(route.overrides, dict) and isinstance(route.drops, list)):
            log.error("Alias %s cannot be read and is left out.", route.pk)  # written past our forms
            continue
        yield Alias(
            name=route.name,
            targets=tuple(target.model for target in targets),
            organization_id=route.organization_id,
            ranks=tuple(target.position for target in targets),
            weights=tuple(target.weight for target in targets),
            parameters=Parameters(route.defaults, route.overrides, frozenset(map(str, route.drops))),
            drain_seconds=float(min(route.drain_seconds, LONGEST_DRAIN_SECONDS)),
        )


def _is_on(value: object) -> bool:
    return value is True or str(value).lower() in {"1", "true", "yes", "on"}


class Refresher(threading.Thread):
    """Keeps the catalog in force young. `install` swaps it in (and may first prepare what depends on it)."""

    def __init__(self, current: Current, install: Callable[[Catalog], None]) -> None:
        super().__init__(name="sluice-snapshot", daemon=True)
        self._current, self._install = current, install
        self._stir = threading.Event()
        self._ending = False

    def run(self) -> None:
        loaded = time.monotonic()
        running.current = self._current
        while not self._is_over():
            try:
                old = time.monotonic() - loaded >= RELOAD_EVERY_SECONDS
                if old or version() != self._current.catalog.version or self._has_other_peppers():
                    self._install(load())
                    loaded = time.monotonic()
            except Exception:
                # The catalog in force goes on: calls with known keys do not need the database.
                log.exception("The settings could not be read again")
                connection.close()
        running.current = None
        connection.close()

    def _has_other_peppers(self) -> bool:
        """The keyring has been rotated while we run: keys that are issued now are known by another digest."""
        return tuple(settings.KEYRING.keys("pepper").values()) != self._current.catalog.peppers

    def _is_over(self) -> bool:
        """Wait until it is time to look, or somebody says that something has changed."""
        self._stir.wait(LOOK_EVERY_SECONDS)
        self._stir.clear()
        return self._ending

    def look_now(self) -> None:
        self._stir.set()

    def stop(self) -> None:
        self._ending = True
        self._stir.set()
        self.join(timeout=10)
