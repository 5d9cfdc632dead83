"""Usage that the pages show, stored as the ledger stores it: rows and their sums together."""

from __future__ import annotations

import random
import uuid
from datetime import datetime, timedelta
from typing import Any

from django.utils import timezone

from accounts.models import ApiKey
from proxy import ledger
from proxy.journal import Settled

_RANDOM = random.Random(3)


def used(key: ApiKey, at: datetime | None = None, **fields: Any) -> uuid.UUID:
    """One request of this key, a minute ago unless given. Its id."""
    at = at or timezone.now() - timedelta(minutes=1)
    at = at.replace(microsecond=at.microsecond // 1000 * 1000)
    milliseconds = round(at.timestamp() * 1000)
    request_id = uuid.UUID(int=milliseconds << 80 | 0x7 << 76 | 0x2 << 62 | _RANDOM.getrandbits(61))
    record = {
        "organization_id": key.organization_id,
        "team_id": key.team_id,
        "user_id": key.user_id,
        "key_id": key.pk,
        "credential_id": None,
        "endpoint": "chat/completions",
        "model": "fast",
        "served_model": "openai/gpt-x",
        "provider": "openai",
        "status": 200,
        "error": "",
        "stream": True,
        "attempts": 1,
        "fresh_input": 100,
        "cache_read": 20,
        "cache_write": 3,
        "output": 40,
        "reasoning": 7,
        "cost": 1500,
        "price_id": None,
        "usage_source": "reported",
        "first_byte_ms": 80,
        "duration_ms": 900,
    }
    record |= fields
    row = ledger.row_of(Settled(str(request_id), milliseconds, key.organization_id, key.user_id, key.pk, "", "", 200))
    assert ledger.store([row._replace(**record)]) == 1
    return request_id
