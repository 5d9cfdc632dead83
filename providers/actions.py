"""Writes: credentials and their seals, prices, lists of models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any, cast

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.db import models, transaction
from django.utils import timezone
from msgspec import structs

from providers import given, listing, package_prices, registry
from providers import tokens as token_rows
from providers.adapter import Adapter, Target
from providers.egress import Egress
from providers.failures import UpstreamFailure
from providers.models import Credential, KeyringCanary, OAuthToken, Price, PriceSource, State, UpstreamModel, audited, changed
from providers.oauth import OAuthFailed, TokenSet, TryAgainLater
from providers.price import Rates
from providers.said import clean
from providers.secrets import Place, SealBroken, SecretText, open_sealed, redact, seal, sealed_with
from providers.wire import Json

REFRESH_EVERY = timedelta(hours=1)
RETRY_AFTER = timedelta(minutes=5)
ASKED_AT_ONCE = 8
MOST_WINDOWS = 20

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
    tokens: TokenSet | None = None,
    sign_in_later: bool = False,
    imported_as: bytes | None = None,
    actor: models.Model | None = None,
) -> Credential:
    """A new upstream account, its secret sealed. Without an organization it is shared. Calls nobody.

    `secret` may also be the credential file of the vendor's own tool; `tokens` are what a sign-in gave. With `sign_in_later`
    neither is needed where the kind signs in. Raises ValidationError, keyed by the argument that is wrong."""
    adapter = given.kind(kind)
    kept = given.settings(adapter, settings or {})
    given.policy(adapter, kept, accepted=accept_policy)
    if tokens is not None or (sign_in_later and not secret.strip() and given.signs_in(adapter, kept)):
        secret = ""
    else:
        secret, tokens = given.secret_or_tokens(adapter, secret, kept)
    credential = drafted(
        kind,
        label,
        prefix=prefix,
        base_url=base_url,
        settings=settings,
        weight=weight,
        priority=priority,
        organization=organization,
        accept_policy=accept_policy,
    )
    credential.user_id = user.pk if user is not None else None
    credential.policy_accepted_by_id = actor.pk if accept_policy and actor is not None else None
    credential.imported_as = imported_as
    if given.wants_secret(adapter, kept) and not secret and tokens is None:
        credential.state = State.NEEDS_REAUTH
    with transaction.atomic():
        credential.save()
        if tokens is not None:
            token_rows.put(credential, tokens)
        if secret:  # the seal is bound to the row, which has its number only now
            _seal(credential, secret)
        if adapter.models_request(target_of(credential)) is None:
            _store_models(credential, adapter.listed())
        _add_known_prices(credential)
        _audit(actor, credential, "credential.added")
        if accept_policy and adapter.policy_for(kept) != "allowed":
            _audit_policy(actor, credential, adapter)
    return credential


def drafted(
    kind: str,
    label: str,
    *,
    prefix: str | None = None,
    base_url: str = "",
    settings: Mapping[str, object] | None = None,
    weight: int = 1,
    priority: int = 0,
    organization: models.Model | None = None,
    accept_policy: bool = False,
) -> Credential:
    """The account that `add_credential` would store, checked and not stored. Raises ValidationError, keyed by the argument."""
    adapter = given.kind(kind)
    kept = given.settings(adapter, settings or {})
    given.policy(adapter, kept, accepted=accept_policy)
    return Credential(
        kind=kind,
        label=given.label(label),
        prefix=given.prefix(kind if prefix is None else prefix),
        base_url=given.base_url(adapter, base_url),
        settings=kept,
        weight=given.weight(weight),
        priority=priority,
        organization_id=organization.pk if organization is not None else None,
        policy_accepted_at=timezone.now() if accept_policy else None,
    )


def change_credential(
    credential: Credential,
    *,
    secret: str = "",
    tokens: TokenSet | None = None,
    accept_policy: bool = False,
    actor: models.Model | None = None,
    **changes: object,
) -> list[str]:
    """Change an account: label, prefix, base_url, settings, weight, priority, state, organization_id, user_id, and its secret;
    or accept its policy, where that has not been done.

    `secret` and `tokens` as for `add_credential`. Sentences that tell what else had to change with it: a secret never follows its
    account to another origin. Raises ValidationError, keyed by the argument that is wrong."""
    adapter = given.kind(credential.kind)
    notes: list[str] = []
    if secret.strip() and tokens is None:
        by_then = cast(Mapping[str, object], changes.get("settings", credential.settings))
        secret, tokens = given.secret_or_tokens(adapter, secret, by_then)
    is_new = bool(secret.strip() or tokens)
    with _alone(credential) if is_new else nullcontext(), transaction.atomic():
        row = Credential.objects.select_for_update().get(pk=credential.pk)
        origin, before = row.origin, {name: getattr(row, name) for name in {*changes, "state"}}
        settings = row.settings
        for name, value in changes.items():
            setattr(row, name, _CHANGES[name](adapter, value))
        given.policy_after_change(adapter, settings, row.settings, accepted=accept_policy)
        moved = row.origin != origin
        if is_new:
            _take(row, secret, tokens)
        elif moved:
            notes += _leave_behind(row, origin)
        if row.state == State.ACTIVE and not is_new and (lacking := what_it_lacks(row, row.settings, before=before["state"], moved=moved)):
            if changes.get("state") == State.ACTIVE and not moved:
                raise ValidationError({"state": lacking})
            row.state = State.NEEDS_REAUTH
        if is_new or moved or "prefix" in changes:  # prices that it lists are kept by prefix
            row.models_due_at = None
            row.quota = {}
        other_policy = adapter.policy_for(row.settings) != adapter.policy_for(settings)
        newly_accepted = accept_policy and (row.policy_accepted_at is None or other_policy)
        if newly_accepted:
            row.policy_accepted_at, row.policy_accepted_by_id = timezone.now(), actor.pk if actor is not None else None
        row.save()
        if moved and Price.objects.filter(pattern__startswith=f"{row.prefix}/").exclude(source=PriceSource.HAND).exists():
            notes.append(f"The prices of {row.prefix}/* stay as they are: set others if the new address asks others.")
        if moved or "prefix" in changes:
            _add_known_prices(row)
        different = sorted(name for name in changes if getattr(row, name) != before[name])
        if newly_accepted:
            _audit_policy(actor, row, adapter)
        if different or is_new or not newly_accepted:
            _audit(actor, row, "credential.changed", fields=[*different, *(["secret"] if is_new else [])])
    credential.refresh_from_db()
    return notes


def sign_in(credential: Credential, tokens: TokenSet, *, actor: models.Model | None = None) -> None:
    """Keep what a sign-in gave: from now on the account's calls carry it. Raises ValidationError."""
    change_credential(credential, tokens=tokens, actor=actor)


def _take(row: Credential, secret: str, tokens: TokenSet | None) -> None:
    """A new secret, or tokens in its place."""
    if tokens is not None:
        row.secret = None
        token_rows.put(row, tokens)
    else:
        redact.learn_more([secret])
        row.secret = seal(secret, row.place(), django_settings.KEYRING.keys("seal"))
    if row.state == State.NEEDS_REAUTH:
        row.state = State.ACTIVE


def _leave_behind(row: Credential, origin: str) -> list[str]:
    """The account has moved to another origin: its secret does not follow."""
    if row.secret:
        row.secret = None
        return [f"The secret was for {origin} and has been forgotten: give the one for {row.origin}."]
    if token_rows.is_signed_in(row):
        return [f"It is signed in for {origin}: sign it in again for {row.origin}."]
    return []


def what_it_lacks(row: Credential, settings: Mapping[str, object], *, before: object, moved: bool = False) -> str:
    """Why an account cannot call, in words; empty when it can. `before`: its state until now.

    A sign-in that has ended does not come back by being switched on."""
    if row.secret:
        return ""
    if token_rows.is_signed_in(row):
        return "It has to be signed in again first." if moved or before == State.NEEDS_REAUTH else ""
    return "It has no secret: give one first." if given.wants_secret(given.kind(row.kind), settings) else ""


def check_it_may_call(row: Credential, settings: Mapping[str, object], *, before: object) -> None:
    """Raises ValidationError where it cannot, with these settings."""
    if lacking := what_it_lacks(row, settings, before=before):
        raise ValidationError({"state": lacking})


@contextmanager
def _alone(credential: Credential) -> Iterator[None]:
    try:
        with token_rows.alone(credential.pk):
            yield
    except TryAgainLater as problem:
        raise ValidationError({"secret": f"{problem.message} Try again in a moment."}) from None


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


def imported_before(kind: str, prefix: str, marks: Sequence[bytes], secret: str, organization: models.Model | None) -> Credential | None:
    """The account that came from an earlier import (found by any of its marks), or that stands there with this very secret."""
    of_kind = Credential.objects.filter(kind=kind).order_by("pk")
    found = of_kind.filter(imported_as__in=list(marks)).first()
    if found is not None or not secret:
        return found
    for credential in of_kind.filter(prefix=prefix).exclude(secret=None):
        with suppress(SealBroken):
            same_owner = credential.organization_id == (organization.pk if organization is not None else None)
            if same_owner and secret_of(credential).reveal() == secret:
                return credential
    return None


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


def freeze(credential: Credential, *, length: timedelta, reason: str = "", actor: models.Model | None = None) -> datetime:
    """Leave it out for so long; then it serves again by itself. When that is. Raises ValidationError."""
    if not timedelta(0) < length <= timedelta(days=365):
        raise ValidationError({"minutes": "A freeze lasts for more than nothing and for at most 365 days."})
    until = timezone.now() + length
    _set_frozen(credential, until, reason.strip()[:200], "credential.frozen", actor)
    return until


def thaw(credential: Credential, *, actor: models.Model | None = None) -> bool:
    """False when it was not frozen."""
    if not credential.is_frozen:
        return False
    _set_frozen(credential, None, "", "credential.thawed", actor)
    return True


@transaction.atomic
def _set_frozen(credential: Credential, until: datetime | None, reason: str, action: str, actor: models.Model | None) -> None:
    credential.frozen_until, credential.frozen_reason = until, reason
    credential.save(update_fields=["frozen_until", "frozen_reason"])
    _audit(actor, credential, action, **({"until": until.isoformat(), "reason": reason} if until else {}))


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
    old_tokens = [row for row in OAuthToken.objects.order_by("pk") if not token_rows.is_sealed_with(row, newest)]
    progress = Resealed(left=len(old) + len(old_tokens))
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
    for token in old_tokens:
        try:
            token_rows.reseal(token, newest)
            progress.done += 1
        except SealBroken:
            progress.broken += 1
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
    access = token_rows.access_of(credential)
    redact.learn_more(given.secrets_in(credential.settings))
    return Target(
        kind=credential.kind,
        credential_id=credential.pk,
        label=credential.label,
        base_url=credential.effective_base_url,
        secret=secret_of(credential) if access is None else access.secret,
        model="",
        public_model="",
        settings=credential.settings if access is None else access.settings,
        lease=None if access is None else access.lease,
    )


def _ready_target_of(credential: Credential) -> Target:
    """The same with a token that has not ended. Raises SealBroken, OAuthFailed."""
    target = target_of(credential)
    if target.lease is not None and target.lease.has_ended():
        access = token_rows.renew(credential.pk, target.lease.generation)
        target = structs.replace(target, secret=access.secret, settings=access.settings, lease=access.lease)
    return target


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
    said_anew = [name for name in details.keys() & known.keys() if details[name] != known[name]]
    for name in said_anew:
        UpstreamModel.objects.filter(credential=credential, upstream_id=name).update(detail=details[name], seen_at=now)
    differs = details.keys() != known.keys()
    if differs or said_anew:
        changed.send(sender=UpstreamModel)
    return differs


def refresh_models(credential: Credential) -> str:
    """Ask one upstream for its models, now. What went wrong, in words, or an empty string."""
    [(_, problem)] = refresh_all([credential])
    return problem


def refresh_all(credentials: Sequence[Credential]) -> Iterator[tuple[Credential, str]]:
    """Ask these upstreams for their models, and what is left of the accounts; each with what went wrong with the former,
    or an empty string. Never holds a transaction while it waits. Call it where no event loop runs."""
    egress = Egress(tuple(django_settings.ENV.egress_allow))
    for start in range(0, len(credentials), ASKED_AT_ONCE):
        batch = credentials[start : start + ASKED_AT_ONCE]
        targets: list[Target] = []
        for credential in batch:
            try:
                targets.append(_ready_target_of(credential))
            except SealBroken:
                yield credential, _note_failure(credential, "The keyring does not open its secret.")
            except OAuthFailed as problem:
                yield credential, _note_failure(credential, problem.message)
            except KeyError:
                yield credential, _note_failure(credential, f"No adapter speaks '{credential.kind}'.")
        asked = {target.credential_id: answer for target, answer in zip(targets, asyncio.run(listing.ask(targets, egress)), strict=True)}
        for credential in batch:
            answer = asked.get(credential.pk)
            if answer is None:
                continue
            if answer.quota is not None:
                _note_quota(credential, answer.quota)
            if isinstance(answer.models, UpstreamFailure):
                yield credential, _note_failure(credential, answer.models.message)
            else:
                _note_models(credential, answer.models)
                yield credential, ""


def _note_failure(credential: Credential, message: str) -> str:
    problem = clean(message)
    Credential.objects.filter(pk=credential.pk).update(last_error=problem, models_due_at=timezone.now() + RETRY_AFTER)
    credential.last_error = problem
    return problem


def _note_quota(credential: Credential, told: Mapping[str, Json]) -> None:
    """What is left of an account, with the time at which it said so. Nothing that the hot path reads."""
    windows = {clean(name)[:60]: _small(window) for name, window in list(told.items())[:MOST_WINDOWS]}
    quota = {"read_at": timezone.now().isoformat(timespec="seconds"), "windows": windows} if windows else {}
    # As with the models: what comes after the account has moved is not of this account.
    Credential.objects.filter(pk=credential.pk, base_url=credential.base_url).update(quota=quota)


def _note_models(credential: Credential, listed: Mapping[str, Json]) -> None:
    with transaction.atomic():
        now = timezone.now()
        # Changed or deleted while we waited: what was listed is no longer of this account.
        still = Credential.objects.filter(pk=credential.pk, base_url=credential.base_url)
        if still.update(last_error="", models_refreshed_at=now, models_due_at=now + REFRESH_EVERY):
            _store_models(credential, listed)
            if not registry.adapter(credential.kind).free:
                fill_listed_prices(credential, listed)
                fill_package_prices(credential, listed)


def fill_listed_prices(credential: Credential, listed: Mapping[str, Json]) -> int:
    """Add a row from now on for each model whose price the upstream's own list tells. How many were new.

    None where a row by hand is in force for the model, or where the list says what it said before."""
    adapter, now = registry.adapter(credential.kind), timezone.now()
    told = {f"{credential.prefix}/{name}": rates for name, detail in listed.items() if _is_id(name) and (rates := adapter.price_of(detail))}
    told = {pattern: rates for pattern, rates in told.items() if len(pattern) <= 240 and _is_sane(rates)}
    if not told:
        return 0
    by_hand = Price.objects.filter(source=PriceSource.HAND, starts_at__lte=now).values_list("pattern", flat=True).distinct()
    exact = set(by_hand)
    wild = [pattern for pattern in exact if "*" in pattern]
    known: dict[str, tuple[int, int, int | None, int | None]] = {}
    for row in Price.objects.filter(source=PriceSource.UPSTREAM, pattern__startswith=f"{credential.prefix}/").order_by("starts_at", "pk"):
        known[row.pattern] = (row.input, row.output, row.cache_read, row.cache_write)
    new = [
        _upstream_row(pattern, rates, now)
        for pattern, rates in told.items()
        if known.get(pattern) != structs.astuple(rates) and pattern not in exact and not any(fnmatchcase(pattern, one) for one in wild)
    ]
    if new:
        Price.objects.bulk_create(new)
        changed.send(sender=Price)
    return len(new)


def _upstream_row(pattern: str, rates: Rates, starts_at: datetime) -> Price:
    row = Price(pattern=pattern, starts_at=starts_at, source=PriceSource.UPSTREAM)
    row.input, row.output, row.cache_read, row.cache_write = structs.astuple(rates)
    return row


def _is_sane(rates: Rates) -> bool:
    return all(0 <= amount <= given.DEAREST_USD * given.MICRO for amount in structs.astuple(rates) if amount is not None)


def fill_package_prices(credential: Credential, listed: Iterable[str] = ()) -> int:
    """Add the price package's rows for the vendor that this account calls. How many were new.

    A row is added only where it differs from the package's latest, and where the upstream's own list tells no price. Rows by
    hand go before them in any case."""
    now = timezone.now()
    schedules = package_prices.prices(credential.effective_base_url, filter(_is_id, listed), now=now)
    if not schedules:
        return 0
    known: dict[str, list[Price]] = {}
    rows_here = Price.objects.filter(pattern__startswith=f"{credential.prefix}/")
    for row in rows_here.filter(source=PriceSource.PACKAGE).order_by("starts_at", "pk"):
        known.setdefault(row.pattern, []).append(row)
    listed_by_upstream = set(rows_here.filter(source=PriceSource.UPSTREAM).values_list("pattern", flat=True))
    new: list[Price] = []
    for name, schedule in schedules.items():
        pattern = f"{credential.prefix}/{name}"
        if pattern in listed_by_upstream:  # what it says itself is known better, and a later row of ours would go before it
            continue
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
    row.input, row.output, row.cache_read, row.cache_write = structs.astuple(listed.rates)
    if listed.long is not None:
        row.long_input, row.long_output, row.long_cache_read, row.long_cache_write = structs.astuple(listed.long)
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


def _audit_policy(actor: models.Model | None, credential: Credential, adapter: Adapter) -> None:
    detail = {"kind": adapter.name, "policy": adapter.policy_for(credential.settings), "source": adapter.policy_source}
    _audit(actor, credential, "credential.policy_accepted", **detail)


def _audit(actor: models.Model | None, credential: Credential, action: str, **detail: object) -> None:
    audited.send(
        sender=Credential,
        actor=actor,
        organization_id=credential.organization_id,
        action=action,
        subject=f"credential {credential.pk} ({credential.label})",
        detail=detail,
    )
