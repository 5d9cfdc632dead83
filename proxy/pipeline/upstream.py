"""The only step that waits for the world: one call to one target, its failures in one vocabulary."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from providers import registry
from providers.adapter import Target
from providers.clock import Clock
from providers.exchange import FAILURES, Answer, Outgoing, Transport, failure_of
from providers.failures import UpstreamProtocol
from providers.wire import MOST_ANSWER_BYTES

MOST_ERROR_BYTES = 64 << 10
FAREWELL_SECONDS = 1.0


@asynccontextmanager
async def answer(transport: Transport, request: Outgoing, target: Target, clock: Clock) -> AsyncIterator[Answer]:
    """Send the request; its answer, closed on the way out whatever happens. Raises UpstreamFailure, also for what is read inside."""
    own = registry.adapter(target.kind).transport
    found: Answer | None = None
    try:
        async with clock:
            found = await (own or transport).send(request, clock)
            clock.busy()
            yield found
    except FAILURES as problem:
        raise failure_of(problem) from None
    finally:
        if found is not None:
            await found.close()


async def farewell(chunks: AsyncIterator[bytes]) -> None:
    """Read on behind the last event, so that the connection can be kept. Nobody waits for it, so it is not waited for long."""
    with suppress(*FAILURES):
        async with asyncio.timeout(FAREWELL_SECONDS):
            async for _ in chunks:
                pass


async def whole_body(found: Answer, most: int = MOST_ANSWER_BYTES) -> bytes:
    """Raises UpstreamProtocol when it is larger than `most` bytes."""
    body = await found.read(most + 1)
    if len(body) > most:
        raise UpstreamProtocol("The upstream's answer is too large.")
    return body


async def error_body(found: Answer) -> bytes:
    """As much of an error's body as is worth reading."""
    return await found.read(MOST_ERROR_BYTES)
