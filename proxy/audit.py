"""Writes what upstream accounts and prices announce into the record of who changed what.

`providers` and `accounts` do not know each other; this is where the one's news meets the other's book.
"""

from __future__ import annotations

from typing import Any

from accounts.models import AuditEntry, User
from providers.models import audited


def listen() -> None:
    audited.connect(_record, dispatch_uid="audit-providers")


def _record(*, actor: User | None, organization_id: int | None, action: str, subject: str, detail: dict[str, object], **_: Any) -> None:
    AuditEntry.objects.create(actor=actor, organization_id=organization_id, action=action, subject=subject[:200], detail=detail)
