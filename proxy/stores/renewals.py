"""Keeps the accounts that sign in usable for the requests of one process. The renewing itself is handed in.

An ended token is renewed before it is used, once for all who wait for it. A refused one is renewed and the same account tried
once more; when one that was renewed for this very request is refused, the account waits for a person, and the request goes on
to the next of its pool.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec.structs import replace

from providers.adapter import Target
from providers.failures import CredentialRefused, NotRenewed
from providers.oauth import Access, origin_of

WAIT_SECONDS = 5.0
MOST_TOKENS = 3  # for one call to one account: the catalog's, one that another process has renewed since, and one of our own
SIGNED_OUT = "The upstream account of this model has to be signed in again by an operator."

Renew = Callable[[int, int], Awaitable[Access]]  # credential, and the generation that will not do any more
Refuse = Callable[[int, int], Awaitable[None]]
_Work = tuple[Callable[[int, int], Awaitable[Any]], int, int]


class Renewals:
    def __init__(self, renew: Renew | None = None, refuse: Refuse | None = None, *, wait_seconds: float = WAIT_SECONDS) -> None:
        """`renew` raises CredentialRefused when the account has to be signed in again, else NotRenewed."""
        self._renew, self._refuse, self._wait_seconds = renew, refuse, wait_seconds
        self._newest: dict[int, Access] = {}  # until the catalog has it
        self._dead: dict[int, int] = {}  # credential -> the generation that nobody takes any more
        self._running: dict[_Work, asyncio.Future[Any]] = {}

    async def call(
        self,
        send: Callable[..., Awaitable[None]],
        too_late: Callable[[], bool],
        forget: Callable[[], None],
        target: Target,
        *rest: Any,
    ) -> None:
        """`send(target, *rest)` with a token that works; not again once it is `too_late`. Raises UpstreamFailure, as `send` does.

        `forget` is called when the token turns out to be of another sign-in than the catalog's: perhaps it is another account."""
        began, before, target = time.monotonic(), target, await self._usable(target)
        for turn in range(MOST_TOKENS):
            if not _same_sign_in(before, target):
                forget()
            try:
                return await send(target, *rest)
            except CredentialRefused:
                if too_late():
                    raise
                assert target.lease is not None
                # What somebody else renewed earlier may have ended together with the token before it: that proves nothing yet.
                if target.lease.renewed_at >= began or turn == MOST_TOKENS - 1:
                    await self._refused_again(target)
                    raise
            before, target = target, await self._renewed(target)

    async def _usable(self, target: Target) -> Target:
        assert target.lease is not None
        newest = self._newest.get(target.credential_id)
        if newest is not None and newest.lease.generation <= target.lease.generation:
            del self._newest[target.credential_id]
        elif newest is not None:
            target = _with(target, newest)
        assert target.lease is not None
        if self._dead.get(target.credential_id) == target.lease.generation:
            raise CredentialRefused(SIGNED_OUT)
        return await self._renewed(target) if target.lease.has_ended() else target

    async def _renewed(self, target: Target) -> Target:
        """With a token of a later generation. Raises CredentialRefused, or NotRenewed when that takes too long."""
        assert target.lease is not None
        newest, seen = self._newest.get(target.credential_id), target.lease.generation
        if newest is None or newest.lease.generation <= seen:
            newest = await self._together(self._renew_now, target.credential_id, seen)
        return _with(target, newest)

    async def _renew_now(self, credential_id: int, generation: int) -> Access:
        if self._renew is None:
            raise CredentialRefused(SIGNED_OUT)
        try:
            access = await self._renew(credential_id, generation)
        except CredentialRefused:
            self._dead[credential_id] = generation
            raise
        self._newest[credential_id] = access
        return access

    async def _refused_again(self, target: Target) -> None:
        assert target.lease is not None
        self._dead[target.credential_id] = target.lease.generation
        if self._refuse is not None:
            await self._together(self._refuse, target.credential_id, target.lease.generation)

    async def _together(self, work: Callable[[int, int], Awaitable[Any]], credential_id: int, generation: int) -> Any:
        """One run of this work for all who want it at the same time; it goes on when they stop waiting."""
        key = (work, credential_id, generation)
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.ensure_future(work(credential_id, generation))
            task.add_done_callback(lambda done: self._done(key, done))
        try:
            async with asyncio.timeout(self._wait_seconds):
                return await asyncio.shield(task)
        except TimeoutError:
            raise NotRenewed("The upstream account is being signed in again. Try again in a moment.", retry_after_seconds=1) from None

    def _done(self, key: _Work, task: asyncio.Future[Any]) -> None:
        self._running.pop(key, None)
        if not task.cancelled():
            task.exception()  # whoever waited has it; nobody else is to hear of it


def _same_sign_in(one: Target, other: Target) -> bool:
    return one is other or (one.lease is not None and other.lease is not None and one.lease.sign_in == other.lease.sign_in)


def _with(target: Target, access: Access) -> Target:
    """Raises NotRenewed where the account was moved since the request, or the catalog, began: its new token is not for this address."""
    if access.origin and access.origin != origin_of(target.base_url):
        raise NotRenewed("The upstream account has just been moved. Try again in a moment.", retry_after_seconds=1)
    return replace(target, secret=access.secret, settings=access.settings, lease=access.lease)
