"""Asks upstreams which models they have, and what is left of an account. No database here: what becomes of the answers is for
`actions` to say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from providers import registry
from providers.adapter import Adapter, Target
from providers.egress import Egress
from providers.exchange import FAILURES, Outgoing, Transport, Unwatched, failure_of
from providers.failures import UpstreamFailure, UpstreamProtocol, UpstreamUnreachable
from providers.transport import PooledTransport
from providers.wire import Json

log = logging.getLogger(__name__)

MOST_BYTES = 8 << 20
TOTAL_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What one upstream said: its models, or why it did not say; and what is left of the account, where it tells."""

    models: dict[str, Json] | UpstreamFailure
    quota: dict[str, Json] | None = None


def transport_over(egress: Egress) -> Transport:
    """The seam that tests replace."""
    return PooledTransport(egress)


async def ask(targets: Sequence[Target], egress: Egress) -> list[Answer]:
    """One answer for each target, in order, all asked at the same time."""
    async with aclosing(transport_over(egress)) as transport:
        return list(await asyncio.gather(*(_ask_one(target, transport) for target in targets)))


async def _ask_one(target: Target, transport: Transport) -> Answer:
    models, quota = await asyncio.gather(_models(target, transport), _quota(target, transport))
    return Answer(models, quota)


async def _models(target: Target, transport: Transport) -> dict[str, Json] | UpstreamFailure:
    adapter = registry.adapter(target.kind)
    try:
        request = adapter.models_request(target)
        if request is None:
            return adapter.listed()
        return adapter.models(await _body_of(request, adapter, target, transport))
    except UpstreamFailure as problem:
        return problem


async def _quota(target: Target, transport: Transport) -> dict[str, Json] | None:
    """Good to know, and no more: where it cannot be read the list of models is as good as ever."""
    adapter = registry.adapter(target.kind)
    try:
        request = adapter.quota_request(target)
        return None if request is None else adapter.quota(await _body_of(request, adapter, target, transport))
    except UpstreamFailure as problem:
        log.info("The allowance of credential %s (%s) could not be read: %s", target.credential_id, target.label, problem.message)
        return None


async def _body_of(request: Outgoing, adapter: Adapter, target: Target, transport: Transport) -> bytes:
    """Raises UpstreamFailure for whatever is not a success of a bearable size."""
    try:
        async with asyncio.timeout(TOTAL_SECONDS):
            found = await (adapter.transport or transport).send(request, Unwatched())
            try:
                body = await found.read(MOST_BYTES + 1)
            finally:
                await found.close()
    except FAILURES as problem:
        failure = failure_of(problem)
        if isinstance(failure, UpstreamUnreachable):
            failure.message = f"{failure.message} {failure.detail}".rstrip()
        raise failure from None
    if len(body) > MOST_BYTES:
        raise UpstreamProtocol("The upstream's answer is too large.")
    if not 200 <= found.status < 300:
        raise adapter.failure(target, found.status, found.headers, body)
    return body
