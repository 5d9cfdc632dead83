"""Which upstream accounts are left alone, and until when: kept in the database and told to the other workers.

A rest of some length survives restarts, whoever chose it, and so does every ejection; it ends when somebody deletes its row, or
when a call goes well. Short ones are only told, where there is Redis: whoever does not hear of one finds out by itself. The row of
an ejection outlives its pause: a process that starts after it, and before anybody tried, lets one call find out first, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import msgspec
from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from providers.models import Credential
from providers.secrets import redact
from proxy.models import Rest
from proxy.stores.health import ALL_MODELS, Health

log = logging.getLogger(__name__)

EVERY_SECONDS = 2.0
KEPT_SECONDS = 20.0  # shorter ones are over before anybody could read them
MOST_KEPT = 1000  # clients make up names of models: above it what we chose for one model is only told
LONGEST = timedelta(days=60)
TRIAL_WITHIN = timedelta(hours=1)  # so long after its pause an account that was ejected is still to be tried first
NEAR = timedelta(seconds=1)  # what is heard of is known as precisely as this
APART = timedelta(minutes=1)  # another machine's clock may be behind: it has yet to see that a row is past
MODEL_LENGTH = 240
NEWS = b"rest "

Key = tuple[int, str]


class Noted(NamedTuple):
    until: datetime
    named: bool
    reason: str
    times: int


class News(msgspec.Struct, array_like=True):
    """What workers tell each other. The version before tells no `times`, and does not read what has it."""

    credential_id: int
    model: str
    seconds: float
    named: bool
    reason: str
    times: int = 0


class Rests:
    """`note`, `over`, `heard` and `forget` are called on the loop, `turn` in a thread."""

    def __init__(self, health: Health, tell: Callable[[bytes], object]) -> None:
        self._health, self._tell = health, tell
        self._new: dict[Key, Noted] = {}
        self._ended: dict[Key, datetime] = {}  # by a call that went well; until when they would have been
        self._known: dict[Key, Rest] = {}  # rows as they were seen last
        self._over: set[int] = set()
        health.told, health.ended = self.note, self.over

    def note(self, credential_id: int, model: str, seconds: float, named: bool, reason: str, times: int) -> None:
        if self._is_kept(credential_id, model, seconds, named, times):
            self._new[(credential_id, model)] = Noted(_in(seconds), named, reason.replace("\0", "")[:100], times)
        self._tell(NEWS + msgspec.json.encode([credential_id, model, seconds, named, reason, *([times] if times else [])]))

    def _is_kept(self, credential_id: int, model: str, seconds: float, named: bool, times: int) -> bool:
        if times:
            return True
        if seconds < KEPT_SECONDS or not _fits(model):
            return False
        return named or model == ALL_MODELS or len(self._known) + len(self._new) < MOST_KEPT or (credential_id, model) in self._known

    def over(self, credential_id: int, model: str, seconds: float) -> None:
        """A call went well. The row goes, or others would wait for it to end, and we would read it back."""
        self._new.pop((credential_id, model), None)
        if _fits(model):
            self._ended[(credential_id, model)] = _in(seconds)

    def heard(self, news: bytes) -> None:
        try:
            one = msgspec.json.decode(news[len(NEWS) :], type=News)
        except msgspec.DecodeError:
            return log.warning("News of a rest that cannot be read")
        self._health.rest(one.credential_id, one.model, one.seconds, named=one.named, reason=one.reason, times=one.times)

    def forget(self, credential_id: int) -> None:
        """It may be another account now: what was asked of it before is over."""
        self._new = {key: one for key, one in self._new.items() if key[0] != credential_id}
        self._over.add(credential_id)

    def turn(self, on_loop: Callable[..., Any]) -> None:
        """Store what is new, and see what others stored or took away. Raises DatabaseError, and then it is tried again."""
        new, ended, over = on_loop(self._take)
        try:
            self._store(new, ended, over)
        except Exception:
            on_loop(self._give_back, new, ended, over)
            raise
        now = timezone.now()
        rows = {(row.credential_id, row.model): row for row in Rest.objects.all()}
        past = [row.pk for row in rows.values() if _ends(row) + APART <= now]
        if past:
            Rest.objects.filter(pk__in=past, until__lte=now).delete()
        rows = {key: row for key, row in rows.items() if _ends(row) > now}
        before = {key: row.until for key, row in self._known.items()} | {key: one.until for key, one in new.items()}
        cleared = [key for key, row in self._known.items() if _ends(row) > now and key not in rows and key not in ended]
        others = [row for key, row in rows.items() if before.get(key) != row.until]
        self._known = rows
        if cleared or others:
            on_loop(self._apply, cleared, [(row, (row.until - now).total_seconds()) for row in others])

    def _take(self) -> tuple[dict[Key, Noted], dict[Key, datetime], set[int]]:
        taken = self._new, self._ended, self._over
        self._new, self._ended, self._over = {}, {}, set()
        return taken

    def _give_back(self, new: Mapping[Key, Noted], ended: Mapping[Key, datetime], over: Collection[int]) -> None:
        """What came meanwhile is later, and counts."""
        kept = {key: one for key, one in new.items() if key[0] not in self._over and key not in self._ended}
        self._new = {**kept, **self._new}
        self._ended = {**ended, **self._ended}
        self._over |= set(over)

    @transaction.atomic
    def _store(self, new: Mapping[Key, Noted], ended: Mapping[Key, datetime], over: Collection[int]) -> None:
        if over:
            Rest.objects.filter(credential_id__in=over).delete()
        for key, until in ended.items():
            same = Q(until__range=(until - NEAR, until + NEAR))
            if key in self._known:
                same |= Q(until=self._known[key].until)
            Rest.objects.filter(same, credential_id=key[0], model=key[1]).delete()  # a later one is another's, and stays
        if not new:
            return
        known = set(Credential.objects.filter(pk__in={key[0] for key in new}).values_list("pk", flat=True))
        rows = [Rest(credential_id=key[0], model=key[1], **one._asdict()) for key, one in sorted(new.items()) if key[0] in known]
        Rest.objects.bulk_create(rows, update_conflicts=True, unique_fields=["credential", "model"], update_fields=list(Noted._fields))

    def _apply(self, cleared: list[Key], others: list[tuple[Rest, float]]) -> None:
        """What was found out here meanwhile is later than what was read."""
        for key in cleared:
            if key not in self._new:
                self._health.wake(*key)
        for row, seconds in others:
            if (key := (row.credential_id, row.model)) not in self._new and key not in self._ended:
                self._health.rest(*key, seconds, named=row.named, reason=row.reason, times=row.times)


def _in(seconds: float) -> datetime:
    return timezone.now() + timedelta(seconds=min(seconds, LONGEST.total_seconds()))


def _fits(model: str) -> bool:
    """Clients make up names: some are longer than the column, and a secret that was put there is kept nowhere."""
    return len(model) <= MODEL_LENGTH and "\0" not in model and redact.name(model) == model


def _ends(row: Rest) -> datetime:
    """How long it counts: an ejection until it had the time for its trial."""
    return row.until + TRIAL_WITHIN if row.times else row.until
