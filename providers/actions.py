"""Writes: credentials and their seals, prices, lists of models."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from fnmatch import fnmatchcase

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.db import models, transaction
from django.utils import timezone

from providers import given
from providers.adapter import Target
from providers.models import Credential, KeyringCanary, Price, PriceSource, UpstreamModel, audited, changed
from providers.secrets import Place, SealBroken, SecretText, open_sealed, redact, seal
from providers.wire import Json

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
        if adapter.free:
            _price_at_nothing(credential)
        if adapter.models_request(target_of(credential)) is None:
            _store_models(credential, adapter.listed())
        _audit(actor, credential, "credential.added")
    return credential


def _seal(credential: Credential, secret: str) -> None:
    redact.learn_more([secret])
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
        audited.send(
            sender=Price,
            actor=actor,
            organization_id=None,
            action="price.set",
            subject=price.pattern,
            detail={name: getattr(price, name) for name in ("input", "output", "cache_read", "cache_write")},
        )
    return price


def _audit(actor: models.Model | None, credential: Credential, action: str, **detail: object) -> None:
    audited.send(
        sender=Credential,
        actor=actor,
        organization_id=credential.organization_id,
        action=action,
        subject=f"credential {credential.pk} ({credential.label})",
        detail=detail,
    )
