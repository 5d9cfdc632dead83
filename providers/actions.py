"""Writes: credentials and their seals, prices, lists of models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.db import models, transaction
from django.utils import timezone

from providers import given, listing, package_prices, registry
from providers.adapter import Adapter, Target, clean
from providers.egress import Egress
from providers.failures import UpstreamFailure
from providers.models import Credential, KeyringCanary, Price, PriceSource, State, UpstreamModel, audited, changed
from providers.secrets import Place, SealBroken, SecretText, open_sealed, redact, seal, sealed_with
from providers.wire import Json

REFRESH_EVERY = timedelta(hours=1)
RETRY_AFTER = timedelta(minutes=5)
ASKED_AT_ONCE = 8

CANARY = Place(table="providers_keyringcanary", row="1", column="sealed", purpose="canary")


def check_canary() -> None:
    """Refuse to go on with a keyring that does not open what the database holds. Raises ImproperlyConfigured."""
    keys = django_settings.KEYRING.keys("seal")
    row = KeyringCanary.objects.filter(pk=1).first()
    if row is None:
        KeyringCanary.objects.get_or_create(pk=1, defaults={"sealed": seal("canary", CANARY, keys)})
        return
    try:
        open_sealed(bytes(row.sealed), CANARY, keys)
    except SealBroken:
        raise ImproperlyConfigured(
            "KEYRING is not the one that this database was sealed with. Restore the right keyring from your backup."
        ) from None


def add_credential(
    kind: str,
    label: str,
    secret: str,
    *,
    prefix: str | None = None,
    base_url: str = "",
    settings: Mapping[str, object] | None = None,
    weight: int = 1,
    priority: int = 0,
    organization: models.Model | None = None,
    user: models.Model | None = None,
    accept_policy: bool = False,
    actor: models.Model | None = None,
) -> Credential:
    """A new upstream account, its secret sealed. Without an organization it is shared. Calls nobody.

    Raises ValidationError, keyed by the argument that is wrong."""
    adapter = given.kind(kind)
    given.policy(adapter, accepted=accept_policy)
    secret = given.secret(adapter, secret)
    credential = Credential(
        kind=kind,
        label=given.label(label),
        prefix=given.prefix(kind if prefix is None else prefix),
        base_url=given.base_url(adapter, base_url),
        settings=given.settings(adapter, settings or {}),
        weight=given.weight(weight),
        priority=priority,
        organization_id=organization.pk if organization is not None else None,
        user_id=user.pk if user is not None else None,
        policy_accepted_at=timezone.now() if accept_policy else None,
    )
    with transaction.atomic():
        credential.save()
        if secret:  # the seal is bound to the row, which has its number only now
            _seal(credential, secret)
        if adapter.models_request(target_of(credential)) is None:
            _store_models(credential, adapter.listed())
        _add_known_prices(credential)
        _audit(actor, credential, "credential.added")
    return credential


def change_credential(credential: Credential, *, secret: str = "", actor: models.Model | None = None, **changes: object) -> list[str]:
    """Change an account: label, prefix, base_url, settings, weight, priority, state, organization_id, user_id, and its secret.

    Sentences that tell what else had to change with it. A secret never follows its account to another origin: without
    a new one it is forgotten. Raises ValidationError, keyed by the argument that is wrong."""
    adapter = given.kind(credential.kind)
    notes: list[str] = []
    with transaction.atomic():
        row = Credential.objects.select_for_update().get(pk=credential.pk)
        origin, before = row.origin, {name: getattr(row, name) for name in changes}
        for name, value in changes.items():
            setattr(row, name, _CHANGES[name](adapter, value))
        if secret := given.secret(adapter, secret) if secret.strip() else "":
            redact.learn_more([secret])
            row.secret = seal(secret, row.place(), django_settings.KEYRING.keys("seal"))
            if row.state == State.NEEDS_REAUTH:
                row.state = State.ACTIVE
        elif row.origin != origin and row.secret:
            row.secret = None
            notes.append(f"The secret was for {origin} and has been forgotten: give the one for {row.origin}.")
        if adapter.needs_secret and not row.secret and row.state == State.ACTIVE:
            if changes.get("state") == State.ACTIVE and row.origin == origin:
                raise ValidationError({"state": "It has no secret: give one first."})
            row.state = State.NEEDS_REAUTH
        if secret or row.origin != origin:
            row.models_due_at = None
        row.save()
        if row.origin != origin and Price.objects.filter(source=PriceSource.PACKAGE, pattern__startswith=f"{row.prefix}/").exists():
            notes.append(f"The prices of {row.prefix}/* stay as they are: set others if the new address asks others.")
        if row.origin != origin or "prefix" in changes:
            _add_known_prices(row)
        different = sorted(name for name in before if getattr(row, name) != before[name])
        _audit(actor, row, "credential.changed", fields=[*different, *(["secret"] if secret else [])])
    credential.refresh_from_db()
    return notes


_CHANGES: dict[str, Callable[[Adapter, Any], object]] = {
    "label": lambda _, value: given.label(value),
    "prefix": lambda _, value: given.prefix(value),
    "base_url": given.base_url,
    "settings": given.settings,
    "weight": lambda _, value: given.weight(value),
    "priority": lambda _, value: value,
    "state": lambda _, value: State(value),
    "organization_id": lambda _, value: value,
    "user_id": lambda _, value: value,
}


def replace_secret(credential: Credential, secret: str, *, actor: models.Model | None = None) -> None:
    """Raises ValidationError."""
    if not secret.strip():
        raise ValidationError({"secret": "The new secret is empty."})
    change_credential(credential, secret=secret, actor=actor)


def disable(credential: Credential, *, actor: models.Model | None = None) -> None:
    """Take it out of its pool until it is enabled again. Calls that run go on."""
    change_credential(credential, state=State.DISABLED, actor=actor)


def enable(credential: Credential, *, actor: models.Model | None = None) -> None:
    """Raises ValidationError when it has no secret to call with."""
    change_credential(credential, state=State.ACTIVE, actor=actor)


def delete_credential(credential: Credential, *, actor: models.Model | None = None) -> None:
    """The account and its list of models go; what was used through it stays in the records."""
    with transaction.atomic():
        _audit(actor, credential, "credential.deleted")
        credential.delete()


@dataclass(slots=True)
class Resealed:
    done: int = 0
    left: int = 0  # still to do
    broken: int = 0  # no key of the keyring opens them


def reseal_all() -> Iterator[Resealed]:
    """Seal every secret again with the newest key of the keyring. Yields how far it is after each.

    Each stands in a transaction of its own: stopped and started again, it goes on with what is left."""
    keys = django_settings.KEYRING.keys("seal")
    newest = next(iter(keys))
    old = [row for row in Credential.objects.exclude(secret=None).order_by("pk") if sealed_with(bytes(row.secret or b"")) != newest]
    progress = Resealed(left=len(old))
    for row in old:
        try:
            secret = open_sealed(bytes(row.secret or b""), row.place(), keys)
        except SealBroken:
            progress.broken += 1
        else:
            # Only what was read is replaced: a secret given meanwhile is sealed with the newest key already.
            Credential.objects.filter(pk=row.pk, secret=row.secret).update(secret=seal(secret.reveal(), row.place(), keys))
            progress.done += 1
        progress.left -= 1
        yield progress
    check_canary()
    KeyringCanary.objects.filter(pk=1).update(sealed=seal("canary", CANARY, keys))


def _seal(credential: Credential, secret: str) -> None:
    credential.secret = seal(secret, credential.place(), django_settings.KEYRING.keys("seal"))
    credential.save(update_fields=["secret"])


def secret_of(credential: Credential) -> SecretText:
    """The secret in memory; from now on it is taken out of every log line. Raises SealBroken."""
    if not credential.secret:
        return SecretText("")
    secret = open_sealed(bytes(credential.secret), credential.place(), django_settings.KEYRING.keys("seal"))
    redact.learn_more([secret.reveal()])
    return secret


def target_of(credential: Credential) -> Target:
    """The account as an adapter sees it, without a model. Raises SealBroken."""
    return Target(
        kind=credential.kind,
        credential_id=credential.pk,
        label=credential.label,
        base_url=credential.effective_base_url,
        secret=secret_of(credential),
        model="",
        public_model="",
        settings=credential.settings,
    )


def _add_known_prices(credential: Credential) -> None:
    if registry.adapter(credential.kind).free:
        _price_at_nothing(credential)
    else:
        fill_package_prices(credential)


def _price_at_nothing(credential: Credential) -> None:
    """0 is a price: without one, a free model would be unpriced and refused under a hard budget.

    It ranks as the price package's, not as a person's: whatever is known more exactly of a model goes before it."""
    pattern = f"{credential.prefix}/*"
    if any(fnmatchcase(pattern, known) for known in Price.objects.filter(pattern__contains="*").values_list("pattern", flat=True)):
        return
    Price.objects.create(pattern=pattern, input=0, output=0, source=PriceSource.PACKAGE)


def _store_models(credential: Credential, listed: Mapping[str, Json]) -> bool:
    """Make the rows say what was listed. True if the set of ids differs from before."""
    known = dict(UpstreamModel.objects.filter(credential=credential).values_list("upstream_id", "detail"))
    details = {name: _small(detail) for name, detail in listed.items() if _is_id(name)}
    now = timezone.now()
    UpstreamModel.objects.filter(credential=credential, upstream_id__in=known.keys() - details.keys()).delete()
    UpstreamModel.objects.bulk_create(
        [
            UpstreamModel(credential=credential, upstream_id=name, detail=details[name], seen_at=now)
            for name in details.keys() - known.keys()
        ]
    )
    for name in details.keys() & known.keys():
        if details[name] != known[name]:
            UpstreamModel.objects.filter(credential=credential, upstream_id=name).update(detail=details[name], seen_at=now)
    differs = details.keys() != known.keys()
    if differs:
        changed.send(sender=UpstreamModel)
    return differs


def refresh_models(credential: Credential) -> str:
    """Ask one upstream for its models, now. What went wrong, in words, or an empty string."""
    [(_, problem)] = refresh_all([credential])
    return problem


def refresh_all(credentials: Sequence[Credential]) -> Iterator[tuple[Credential, str]]:
    """Ask these upstreams for their models; each with what went wrong, or an empty string. Never holds a transaction
    while it waits. Call it where no event loop runs."""
    egress = Egress(tuple(django_settings.ENV.egress_allow))
    for start in range(0, len(credentials), ASKED_AT_ONCE):
        batch = credentials[start : start + ASKED_AT_ONCE]
        targets: list[Target] = []
        for credential in batch:
            try:
                targets.append(target_of(credential))
            except SealBroken:
                yield credential, _note_failure(credential, "The keyring does not open its secret.")
            except KeyError:
                yield credential, _note_failure(credential, f"No adapter speaks '{credential.kind}'.")
        asked = {target.credential_id: answer for target, answer in zip(targets, asyncio.run(listing.ask(targets, egress)), strict=True)}
        for credential in batch:
            answer = asked.get(credential.pk)
            if isinstance(answer, UpstreamFailure):
                yield credential, _note_failure(credential, answer.message)
            elif answer is not None:
                _note_models(credential, answer)
                yield credential, ""


def _note_failure(credential: Credential, message: str) -> str:
    problem = clean(message)
    Credential.objects.filter(pk=credential.pk).update(last_error=problem, models_due_at=timezone.now() + RETRY_AFTER)
    credential.last_error = problem
    return problem


def _note_models(credential: Credential, listed: Mapping[str, Json]) -> None:
    with transaction.atomic():
        now = timezone.now()
        # Changed or deleted while we waited: what was listed is no longer of this account.
        still = Credential.objects.filter(pk=credential.pk, base_url=credential.base_url)
        if still.update(last_error="", models_refreshed_at=now, models_due_at=now + REFRESH_EVERY):
            _store_models(credential, listed)
            if not registry.adapter(credential.kind).free:
                fill_package_prices(credential, listed)


def fill_package_prices(credential: Credential, listed: Iterable[str] = ()) -> int:
    """Add the price package's rows for the vendor that this account calls. How many were new.

    A row is added only where it differs from the package's latest. Rows by hand go before them in any case."""
    now = timezone.now()
    schedules = package_prices.prices(credential.effective_base_url, filter(_is_id, listed), now=now)
    if not schedules:
        return 0
    known: dict[str, list[Price]] = {}
    package_rows = Price.objects.filter(source=PriceSource.PACKAGE, pattern__startswith=f"{credential.prefix}/")
    for row in package_rows.order_by("starts_at", "pk"):
        known.setdefault(row.pattern, []).append(row)
    new: list[Price] = []
    for name, schedule in schedules.items():
        pattern = f"{credential.prefix}/{name}"
        rows = known.get(pattern, [])
        for asked in schedule:
            # A change that the package dates back begins now: what was charged so far stands.
            begins = asked.starts_at if asked.starts_at is not None and (asked.starts_at > now or not rows) else now
            before = [row for row in rows if row.starts_at <= begins]
            if before and _says_the_same(before[-1], asked):
                continue
            row = _package_row(pattern, asked, begins)
            new.append(row)
            rows = [*rows, row]
    if new:
        Price.objects.bulk_create(new)
        changed.send(sender=Price)
    return len(new)


def _package_row(pattern: str, listed: package_prices.Listed, starts_at: datetime) -> Price:
    row = Price(pattern=pattern, starts_at=starts_at, source=PriceSource.PACKAGE, long_above=listed.long_above)
    row.input, row.output, row.cache_read, row.cache_write = astuple(listed.rates)
    if listed.long is not None:
        row.long_input, row.long_output, row.long_cache_read, row.long_cache_write = astuple(listed.long)
    return row


def _says_the_same(row: Price, listed: package_prices.Listed) -> bool:
    known = row.in_memory()
    return (known.rates(0), known.long_above, known.long) == (listed.rates, listed.long_above, listed.long)


def _is_id(name: str) -> bool:
    return 0 < len(name) <= 200 and name.isprintable()


def _small(detail: Json) -> Json:
    """The plain facts of what an upstream says of a model: enough to show, never a document."""
    plain = {name: value for name, value in detail.items() if isinstance(value, str | int | float | bool) and len(str(value)) <= 200}
    return dict(list(plain.items())[:20])


def set_price(
    pattern: str,
    input_usd: str | Decimal,
    output_usd: str | Decimal,
    cached_usd: str | Decimal | None = None,
    cache_write_usd: str | Decimal | None = None,
    starts_at: datetime | None = None,
    *,
    actor: models.Model | None = None,
) -> Price:
    """A new dated row, in USD per million tokens; what is not given costs as plain input. Raises ValidationError."""
    price = Price(
        pattern=given.pattern(pattern),
        input=given.micro_dollars("input", input_usd),
        output=given.micro_dollars("output", output_usd),
        cache_read=None if cached_usd is None else given.micro_dollars("cache_read", cached_usd),
        cache_write=None if cache_write_usd is None else given.micro_dollars("cache_write", cache_write_usd),
        starts_at=starts_at or timezone.now(),
        source=PriceSource.HAND,
    )
    with transaction.atomic():
        price.save()
        _audit_price(actor, price, "price.set")
    return price


def take_back_price(price: Price, *, actor: models.Model | None = None) -> None:
    """Delete a row that has not begun. Raises ValidationError for one that has: costs refer to it."""
    with transaction.atomic():
        deleted, _ = Price.objects.filter(pk=price.pk, starts_at__gt=timezone.now()).delete()
        if not deleted:
            raise ValidationError("This price is in force or has been: add a new row instead.")
        _audit_price(actor, price, "price.taken_back")


def _audit_price(actor: models.Model | None, price: Price, action: str) -> None:
    detail: dict[str, object] = {name: getattr(price, name) for name in ("input", "output", "cache_read", "cache_write")}
    detail["starts_at"] = price.starts_at.isoformat()
    audited.send(sender=Price, actor=actor, organization_id=None, action=action, subject=price.pattern, detail=detail)


def _audit(actor: models.Model | None, credential: Credential, action: str, **detail: object) -> None:
    audited.send(
        sender=Credential,
        actor=actor,
        organization_id=credential.organization_id,
        action=action,
        subject=f"credential {credential.pk} ({credential.label})",
        detail=detail,
    )
