"""Asks upstreams which models they have. No database here: what becomes of the answers is for `actions` to say."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from providers import registry
from providers.adapter import Target
from providers.egress import Egress
from providers.exchange import FAILURES, Transport, Unwatched, failure_of
from providers.failures import UpstreamFailure, UpstreamProtocol, UpstreamUnreachable
from providers.transport import PooledTransport
from providers.wire import Json

MOST_BYTES = 8 << 20
TOTAL_SECONDS = 30.0

Answer = dict[str, Json] | UpstreamFailure


def transport_over(egress: Egress) -> Transport:
    """The seam that tests replace."""
    return PooledTransport(egress)


async def ask(targets: Sequence[Target], egress: Egress) -> list[Answer]:
    """One answer for each target, in order, all asked at the same time: what it lists, or why it did not say."""
    async with aclosing(transport_over(egress)) as transport:
        return list(await asyncio.gather(*(_ask_one(target, transport) for target in targets)))


async def _ask_one(target: Target, transport: Transport) -> Answer:
    adapter = registry.adapter(target.kind)
    try:
        request = adapter.models_request(target)
        if request is None:
            return adapter.listed()
        async with asyncio.timeout(TOTAL_SECONDS):
            found = await (adapter.transport or transport).send(request, Unwatched())
            try:
                body = await found.read(MOST_BYTES + 1)
            finally:
                await found.close()
        if len(body) > MOST_BYTES:
            raise UpstreamProtocol("The list of models is too large.")
        if not 200 <= found.status < 300:
            return adapter.failure(target, found.status, found.headers, body)
        return adapter.models(body)
    except UpstreamFailure as problem:
        return problem
    except FAILURES as problem:
        failure = failure_of(problem)
        if isinstance(failure, UpstreamUnreachable):
            failure.message = f"{failure.message} {failure.detail}".rstrip()
        return failure
