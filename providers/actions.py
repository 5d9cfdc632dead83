"""Writes: credentials and their seals, prices, lists of models."""

from __future__ import annotations

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from providers.models import KeyringCanary
from providers.secrets import Place, SealBroken, open_sealed, seal

CANARY = Place(table="providers_keyringcanary", row="1", column="sealed", purpose="canary")


def check_canary() -> None:
    """Refuse to go on with a keyring that does not open what the database holds. Raises ImproperlyConfigured."""
    keys = settings.KEYRING.keys("seal")
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
