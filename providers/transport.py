"""The seam to the network: an `httpx.AsyncBaseTransport` behind the egress check, and the ladder of timeouts.

httpx's own transport serves here for now; tests put `httpx.MockTransport` in its place.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import httpcore
import httpx

from providers.egress import Egress


@dataclass(frozen=True, slots=True)
class Timeouts:
    """All in seconds. The first four rise strictly, so that each can fire before the one around it."""

    pool_wait_seconds: float = 2
    connect_seconds: float = 5
    first_byte_seconds: float = 600
    total_seconds: float = 1800
    idle_seconds: float = 300
    heartbeat_seconds: float = 15
    drain_seconds: float = 120

    def __post_init__(self) -> None:
        ladder = [field.name for field in fields(self)][:4]
        for inner, outer in pairwise(ladder):
            if not getattr(self, inner) < getattr(self, outer):
                raise ValueError(f"{inner} must be less than {outer}.")
        if not self.heartbeat_seconds < self.idle_seconds < self.total_seconds:
            raise ValueError("heartbeat_seconds, idle_seconds and total_seconds must rise in this order.")

    def for_httpx(self) -> dict[str, float]:
        # Reading is watched by the trip itself, which knows first byte from idle.
        return {"pool": self.pool_wait_seconds, "connect": self.connect_seconds, "write": self.idle_seconds}


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects only to addresses that the egress check has passed, and to those exactly."""

    def __init__(self, egress: Egress) -> None:
        self._egress = egress
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 the library's own signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await self._egress.addresses(host, port)
        except OSError as problem:
            raise httpcore.ConnectError(str(problem)) from problem
        for last, address in enumerate(addresses, start=1 - len(addresses)):
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if last == 0:
                    raise
        raise httpcore.ConnectError(f"{host} has no address.")

    async def sleep(self, seconds: float) -> None:
        await self._network.sleep(seconds)


class StockTransport(httpx.AsyncHTTPTransport):
    """httpx's own transport over the checked door."""

    def __init__(self, egress: Egress, **options: Any) -> None:
        super().__init__(trust_env=False, **options)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            # No cap: httpcore 1.0 can lose a slot of its pool when a call is cancelled while it waits for one.
            max_connections=None,
            max_keepalive_connections=100,
            keepalive_expiry=30,
            network_backend=CheckedBackend(egress),
        )
