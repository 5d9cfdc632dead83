"""How upstreams asked to be left alone, kept in the database and told to the other workers.

A rest that an upstream named for long survives restarts, and ends when somebody deletes its row. Short ones are only told, where
there is Redis: whoever does not hear of one finds out by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
from django.db import transaction
from django.utils import timezone

from providers.models import Credential
from proxy.models import Rest
from proxy.stores.health import Health

log = logging.getLogger(__name__)

EVERY_SECONDS = 2.0
KEPT_SECONDS = 20.0  # shorter ones are over before anybody could read them
LONGEST = timedelta(days=60)
NEWS = b"rest "

Key = tuple[int, str]


class Rests:
    """`note`, `heard` and `forget` are called on the loop, `turn` in a thread."""

    def __init__(self, health: Health, tell: Callable[[bytes], object]) -> None:
        self._health, self._tell = health, tell
        self._new: dict[Key, tuple[float, str]] = {}  # when it was noted is near enough to when it is stored
        self._known: dict[Key, Any] = {}  # rows as they were seen last: until when
        self._over: set[int] = set()
        health.told = self.note

    def note(self, credential_id: int, model: str, seconds: float, named: bool, reason: str) -> None:
        if named and seconds >= KEPT_SECONDS:
            self._new[(credential_id, model)] = (seconds, reason)
        self._tell(NEWS + msgspec.json.encode([credential_id, model, seconds, named, reason]))

    def heard(self, news: bytes) -> None:
        try:
            credential_id, model, seconds, named, reason = msgspec.json.decode(news[len(NEWS) :], type=tuple[int, str, float, bool, str])
        except msgspec.DecodeError:
            return log.warning("News of a rest that cannot be read")
        self._health.rest(credential_id, model, seconds, named=named, reason=reason)

    def forget(self, credential_id: int) -> None:
        """It may be another account now: what was asked of it before is over."""
        self._new = {key: one for key, one in self._new.items() if key[0] != credential_id}
        self._over.add(credential_id)

    def turn(self, on_loop: Callable[..., Any]) -> None:
        """Store what is new, and see what others stored or took away. Raises DatabaseError, and then it is tried again."""
        new, over = on_loop(self._take)
        try:
            self._store(new, over)
        except Exception:
            on_loop(self._give_back, new, over)
            raise
        now = timezone.now()
        rows = {(row.credential_id, row.model): row for row in Rest.objects.filter(until__gt=now)}
        cleared = [key for key, until in self._known.items() if until > now and key not in rows]
        others = [row for key, row in rows.items() if self._known.get(key) != row.until and key not in new]
        self._known = {key: row.until for key, row in rows.items()}
        if cleared or others:
            on_loop(self._apply, cleared, [(row, (row.until - now).total_seconds()) for row in others])

    def _take(self) -> tuple[dict[Key, tuple[float, str]], set[int]]:
        taken = self._new, self._over
        self._new, self._over = {}, set()
        return taken

    def _give_back(self, new: dict[Key, tuple[float, str]], over: set[int]) -> None:
        self._new = {**{key: one for key, one in new.items() if key[0] not in self._over}, **self._new}
        self._over |= over

    @transaction.atomic
    def _store(self, new: dict[Key, tuple[float, str]], over: set[int]) -> None:
        if over:
            Rest.objects.filter(credential_id__in=over).delete()
        if not new:
            return
        now = timezone.now()
        known = set(Credential.objects.filter(pk__in={key[0] for key in new}).values_list("pk", flat=True))
        rows = [
            Rest(credential_id=key[0], model=key[1][:240], until=now + min(timedelta(seconds=seconds), LONGEST), reason=reason[:100])
            for key, (seconds, reason) in sorted(new.items())
            if key[0] in known
        ]
        Rest.objects.bulk_create(rows, update_conflicts=True, unique_fields=["credential", "model"], update_fields=["until", "reason"])
        Rest.objects.filter(until__lte=now).delete()

    def _apply(self, cleared: list[Key], others: list[tuple[Rest, float]]) -> None:
        for credential_id, model in cleared:
            self._health.wake(credential_id, model)
        for row, seconds in others:
            self._health.rest(row.credential_id, row.model, seconds, named=True, reason=row.reason)
