"""One call to a vendor beside the requests, from a thread where no event loop runs: through the egress check, under one time limit."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from providers.adapter import Heard
from providers.clock import Timeouts
from providers.egress import Egress
from providers.exchange import FAILURES, Outgoing, Transport, Unwatched, failure_of
from providers.failures import UpstreamProtocol
from providers.transport import PooledTransport

CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 15.0  # of which an answer has 10
MOST_BYTES = 1 << 20


def transport_over(egress: Egress) -> Transport:
    """The seam that tests replace."""
    return PooledTransport(egress, Timeouts(connect_seconds=CONNECT_SECONDS))


def ask(request: Outgoing, egress: Egress) -> Heard:
    """The whole answer, whatever its status. Raises UpstreamFailure."""
    return asyncio.run(_ask(request, egress))


async def _ask(request: Outgoing, egress: Egress) -> Heard:
    async with aclosing(transport_over(egress)) as transport:
        try:
            async with asyncio.timeout(TOTAL_SECONDS):
                found = await transport.send(request, Unwatched())
                try:
                    body = await found.read(MOST_BYTES + 1)
                finally:
                    await found.close()
        except FAILURES as problem:
            raise failure_of(problem) from None
    if len(body) > MOST_BYTES:
        raise UpstreamProtocol("The answer is too large.")
    return Heard(found.status, found.headers, body)
