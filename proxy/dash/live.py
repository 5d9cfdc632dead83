"""`/ws/usage?organization=SLUG`: tells a page that usage was stored, so that it can show its figures anew.

What is told is no figure, only which keys were used, first of all those of the last minute: the page asks for the figures itself, with
all the checks of a page. With Redis the processes that store rows say so there, and one that has open pages listens while it has them;
without, there is one process alone.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Collection, Mapping
from datetime import timedelta
from importlib import import_module
from typing import Any
from urllib.parse import parse_qs

import msgspec
from channels.auth import get_user
from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.layers import get_channel_layer
from django.conf import settings
from django.http import Http404
from django.utils import timezone

from accounts import queries as accounts
from accounts.models import Membership, Role, User
from proxy.models import UsageEvent
from proxy.stores.news import Subscription, usage_channel_of

# A session that ended or a membership that was taken away is noticed this long after, before anything more is told.
CHECK_AGAIN_SECONDS = 30.0
# Of so many keys at once it is enough to know that they are many.
MOST_KEYS_TOLD = 100
# A page may have been made so long before it listens: what was used meanwhile it is told first.
JUST_NOW_SECONDS = 60.0

# Of this range, since other numbers are not everywhere allowed to be sent.
NOT_ASKED, NO_LONGER_ALLOWED = 4400, 4403

Used = tuple[int, int, int]  # an organization, a key of it, the key's user
_used = msgspec.json.Decoder(list[Used])

# Sockets by organization: nothing is done for an organization that nobody looks at.
watched: Counter[int] = Counter()
_telling: set[asyncio.Task[None]] = set()


def packed(used: Collection[Used]) -> bytes:
    """To be told to other processes."""
    return msgspec.json.encode(list(used))


def heard(news: bytes) -> None:
    """What a process has said, perhaps this one. On the loop."""
    if not watched:
        return
    try:
        used = _used.decode(news)
    except msgspec.DecodeError:
        return  # of another release
    task = asyncio.create_task(tell(used))
    _telling.add(task)
    task.add_done_callback(_telling.discard)


elsewhere = Subscription(settings.ENV.redis_url, usage_channel_of(), heard) if settings.ENV.redis_url else None


async def tell(used: Collection[Used]) -> None:
    """Usage of these keys was stored."""
    by_organization: dict[int, dict[int, int]] = {}
    for organization_id, key_id, user_id in used:
        if watched[organization_id] > 0:
            by_organization.setdefault(organization_id, {})[key_id] = user_id
    for organization_id, keys in by_organization.items():
        event = {"type": "usage.stored", "keys": keys if len(keys) <= MOST_KEYS_TOLD else None}
        await get_channel_layer().group_send(_group(organization_id), event)


class UsageConsumer(AsyncWebsocketConsumer):
    """Sends `{"keys": [1, 2]}`, or `{"keys": null}` for very many. A member hears of own keys alone. Takes no messages."""

    place: Membership | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._forget()

    async def connect(self) -> None:
        slugs = parse_qs(self.scope["query_string"].decode("latin-1")).get("organization", [""])
        self.place = await _place(self.scope["user"], slugs[0])
        if self.place is None:
            return await self.close()
        self.checked_at = time.monotonic()
        watched[self.place.organization_id] += 1
        if elsewhere is not None:
            await elsewhere.listen()
        await self.channel_layer.group_add(_group(self.place.organization_id), self.channel_name)
        just_used = await _just_used(self.place.organization_id)
        await self.accept()
        await self.usage_stored({"keys": just_used})

    async def _forget(self) -> None:
        if self.place is None:
            return
        organization_id, self.place = self.place.organization_id, None
        if elsewhere is not None:
            elsewhere.leave()
        watched[organization_id] -= 1
        if not watched[organization_id]:
            del watched[organization_id]
        await self.channel_layer.group_discard(_group(organization_id), self.channel_name)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        await self.close(code=NOT_ASKED)

    async def usage_stored(self, event: dict[str, Any]) -> None:
        if not await self._still_allowed():
            return await self.close(code=NO_LONGER_ALLOWED)
        keys = self._of_interest(event["keys"])
        if keys is None or keys:
            await self.send(text_data=json.dumps({"keys": keys}))
        return None

    def _of_interest(self, keys: Mapping[int, int] | None) -> list[int] | None:
        assert self.place is not None
        if keys is None or self.place.role != Role.MEMBER:
            return keys if keys is None else list(keys)
        return [key_id for key_id, user_id in keys.items() if user_id == self.place.user_id]

    async def _still_allowed(self) -> bool:
        """Is the session still that person's, and the person still there? Looked up anew now and then."""
        assert self.place is not None
        now = time.monotonic()
        if now - self.checked_at < CHECK_AGAIN_SECONDS:
            return True
        session = import_module(settings.SESSION_ENGINE).SessionStore(self.scope["session"].session_key)
        place = await _place(await get_user({"session": session}), self.place.organization.slug)
        if place is None or place.user_id != self.place.user_id:
            return False
        self.place, self.checked_at = place, now
        return True


@database_sync_to_async
def _place(user: Any, slug: str) -> Membership | None:
    """Where this person stands in the organization; None for strangers, and for who is not signed in."""
    if not isinstance(user, User):
        return None
    try:
        return accounts.standing(user, slug)
    except Http404:
        return None


@database_sync_to_async
def _just_used(organization_id: int) -> dict[int, int] | None:
    """Keys and their users; None where there were very many calls."""
    since = timezone.now() - timedelta(seconds=JUST_NOW_SECONDS)
    rows = UsageEvent.objects.filter(organization=organization_id, at__gte=since).order_by("-at").values_list("key", "user")
    found = list(rows[: MOST_KEYS_TOLD + 1])
    return dict(found) if len(found) <= MOST_KEYS_TOLD else None


def _group(organization_id: int) -> str:
    return f"usage.{organization_id}"
