"""Short ways to call an origin through the transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from providers.clock import Timeouts
from providers.egress import Egress, networks
from providers.exchange import Answer, Outgoing, Transport, Unwatched, place_of
from providers.transport import PooledTransport

LOOPBACK = Egress(networks(["127.0.0.0/8", "::1/128"]))
# Short enough for a test, long enough for a machine that is busy with others.
QUICK = Timeouts(pool_wait_seconds=0.2, connect_seconds=1, first_byte_seconds=5, total_seconds=20, idle_seconds=5, heartbeat_seconds=1)


@asynccontextmanager
async def transport(*, egress: Egress = LOOPBACK, timeouts: Timeouts = QUICK, **options: Any) -> AsyncIterator[PooledTransport]:
    one = PooledTransport(egress, timeouts, **options)
    try:
        yield one
    finally:
        await one.aclose()


def call(
    url: str,
    path: str = "/v1/chat",
    *,
    method: str = "POST",
    body: bytes = b"{}",
    headers: dict[str, str] | None = None,
    credential_id: int = 1,
    ca_pem: str = "",
    proxy_url: str = "",
    http2: bool = False,
) -> Outgoing:
    place, prefix = place_of(url, credential_id, ca_pem, proxy_url, http2=http2)
    return Outgoing(method, place, prefix + path, headers or {}, body)


async def send(via: Transport, outgoing: Outgoing) -> Answer:
    return await via.send(outgoing, Unwatched())


async def fetch(via: Transport, outgoing: Outgoing) -> tuple[int, bytes]:
    """Status and whole body."""
    answer = await send(via, outgoing)
    try:
        return answer.status, b"".join([chunk async for chunk in answer.chunks()])
    finally:
        await answer.close()


async def settle() -> None:
    """Let the loop see what has happened on its sockets."""
    for _ in range(5):
        await asyncio.sleep(0.005)
