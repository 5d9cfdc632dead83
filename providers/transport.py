"""The way out to upstreams: HTTP/1.1 over connections that are kept, behind the egress check.

A connection is kept by its place (origin, authorities, credential); the one used last goes out first, and none is used
again after anything went wrong on it. A request is sent once, and once more only when a kept connection turns out to
have died before any byte of an answer. Outgoing proxies and HTTP/2 are left to httpx's own transport (`over_httpx.py`).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx

from providers.clock import Timeouts
from providers.egress import Egress, trust
from providers.exchange import Answer, Origin, Outgoing, Place, Unwatched, Watch, place_of
from providers.failures import UpstreamUnreachable
from providers.http1 import READ_BYTES, Connection, request_head
from providers.over_httpx import HttpxTransport, OverHttpx
from providers.pool import Pool

MOST_CONNECTIONS, MOST_WAITING = 1000, 250  # to one origin and for one, for all credentials together
IDLE_SECONDS = 30.0
PROXIED_CHECK_SECONDS = 60.0
# For a peer to say goodbye on a TLS connection.
GOODBYE_SECONDS = 2.0

# A call may wait ten minutes for its first byte. Without a sign of life a firewall on the way forgets the connection,
# and a peer that has vanished is waited for to the end.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class PooledTransport(httpx.AsyncBaseTransport):
    """`send` is the native call (see `exchange.Transport`); httpx's own is wrapped around it."""

    def __init__(
        self,
        egress: Egress,
        timeouts: Timeouts | None = None,
        *,
        most_connections: int = MOST_CONNECTIONS,
        most_waiting: int = MOST_WAITING,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._egress = egress
        self._timeouts = timeouts or Timeouts()
        self._most_connections, self._most_waiting = most_connections, most_waiting
        self._idle_seconds = idle_seconds
        self._room = memoryview(bytearray(READ_BYTES))  # a transport lives in one event loop
        self._pools: dict[Origin, Pool] = {}
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._by_others: dict[Place, OverHttpx] = {}
        self._proxied_until: dict[Origin, float] = {}

    async def send(self, call: Outgoing, watch: Watch) -> Answer:
        place = call.place
        if place.proxy_url or place.http2:
            by_httpx = await self._by_httpx(place)
            if self._calls_by_httpx()[place.origin] >= self._most_connections:
                raise httpx.PoolTimeout("Enough calls to the upstream are under way.")
            return await by_httpx.send(call, watch)
        head = request_head(call)
        pool = self._pool(place.origin)
        kept = pool.take(place) or await pool.room(place, self._timeouts.pool_wait_seconds)
        if kept is not None:
            try:
                return await kept.ask(head, call.body, watch)
            except httpx.TransportError:
                if kept.touched:
                    raise
            # It had died while it was kept, so nobody has read the request: this one time it is sent again.
            pool = self._pool(place.origin)
            await pool.room(None, self._timeouts.pool_wait_seconds)
        connection = await self._connect(place, pool)
        return await connection.ask(head, call.body, watch)

    async def aclose(self) -> None:
        """End all connections that are free; those in use end with their answers."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        for proxied in self._by_others.values():
            await proxied.aclose()
        self._by_others.clear()

    def most_calls(self) -> int:
        """At, or waiting for, the one origin that has the most of them."""
        calls = self._calls_by_httpx()
        for origin, pool in self._pools.items():
            calls[origin] += pool.calls
        return max(calls.values(), default=0)

    def _calls_by_httpx(self) -> Counter[Origin]:
        """Under way; of all credentials together, since what hangs is the origin."""
        calls: Counter[Origin] = Counter()
        for place, by_httpx in self._by_others.items():
            calls[place.origin] += by_httpx.calls
        return calls

    # Connections

    def _pool(self, origin: Origin) -> Pool:
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = Pool(self._most_connections, self._most_waiting)
            if self._sweep_timer is None:
                self._sweep_later()
        return pool

    async def _connect(self, place: Place, pool: Pool) -> Connection:
        """A new connection, in the room that is reserved for it. Raises httpx.ConnectError, ConnectTimeout, EgressRefused."""
        connection = None
        try:
            async with asyncio.timeout(self._timeouts.connect_seconds):
                connection = await self._reach(place, pool)
        except TimeoutError:
            raise httpx.ConnectTimeout("") from None
        except ssl.SSLCertVerificationError as problem:
            raise httpx.ConnectError(f"Its certificate was not accepted: {problem.verify_message}.") from None
        except OSError as problem:  # an ssl.SSLError is one
            raise httpx.ConnectError(f"{problem.strerror or problem}") from None
        finally:
            if connection is None:
                pool.leave()
        pool.hold(connection)
        return connection

    async def _reach(self, place: Place, pool: Pool) -> Connection:
        """To the first of its addresses that answers, each in its share of the time. All have been checked."""
        loop = asyncio.get_running_loop()
        scheme, host, port = place.origin
        until = loop.time() + self._timeouts.connect_seconds
        addresses = await self._egress.addresses(host, port)
        secure: dict[str, Any] = {}
        if scheme == "https":
            secure = {"ssl": trust(place.ca_pem), "server_hostname": host.rstrip("."), "ssl_shutdown_timeout": GOODBYE_SECONDS}
        made = partial(Connection, place, pool, self._room)
        problem: OSError = OSError("The name has no address.")
        for number, address in enumerate(addresses):
            now = loop.time()
            try:
                async with asyncio.timeout_at(now + (until - now) / (len(addresses) - number)):
                    transport, connection = await loop.create_connection(made, address, port, **secure)
            except OSError as said:  # a TimeoutError is one
                problem = said
                continue
            _keep_alive(transport.get_extra_info("socket"))
            return connection
        raise problem

    def _sweep(self) -> None:
        before = time.monotonic() - self._idle_seconds
        for origin, pool in list(self._pools.items()):
            pool.end_idle(before)
            if not pool.taken:
                del self._pools[origin]
        self._sweep_timer = None
        if self._pools:
            self._sweep_later()

    def _sweep_later(self) -> None:
        self._sweep_timer = asyncio.get_running_loop().call_later(self._idle_seconds / 6, self._sweep)

    async def _by_httpx(self, place: Place) -> OverHttpx:
        """A proxy looks the name up once more and may find another address; what we find ourselves must be allowed."""
        now = asyncio.get_running_loop().time()
        if place.proxy_url and self._proxied_until.get(place.origin, 0.0) < now:
            try:
                async with asyncio.timeout(self._timeouts.connect_seconds):
                    await self._egress.addresses(*place.origin[1:])
            except OSError:
                pass  # where all goes through proxies, often the proxy alone knows names
            self._proxied_until[place.origin] = now + PROXIED_CHECK_SECONDS
        if place not in self._by_others:
            if place.proxy_url:
                place_of(place.proxy_url)  # refuses what is no plain address
            self._by_others[place] = OverHttpx(HttpxTransport(self._egress, place), self._timeouts)
        return self._by_others[place]

    # For those who speak httpx

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The `read` timeout of its extension holds for the head and for each part of the body; other timeouts are our own."""
        call = await outgoing_of(request)
        read_seconds = request.extensions.get("timeout", {}).get("read")
        try:
            async with asyncio.timeout(read_seconds):
                answer = await self.send(call, Unwatched())
        except TimeoutError:
            raise httpx.ReadTimeout("The upstream did not answer in time.") from None
        # The body comes decompressed.
        headers = {name: value for name, value in answer.headers.items() if name not in ("content-encoding", "content-length")}
        return httpx.Response(answer.status, headers=headers, stream=_Stream(answer, read_seconds))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, answer: Answer, read_seconds: float | None) -> None:
        self._answer = answer
        self._read_seconds = read_seconds

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = self._answer.chunks()
        while True:
            try:
                async with asyncio.timeout(self._read_seconds):
                    chunk = await anext(chunks, b"")
            except TimeoutError:
                raise httpx.ReadTimeout("The upstream fell silent.") from None
            if not chunk:
                return
            yield chunk

    async def aclose(self) -> None:
        await self._answer.close()


async def outgoing_of(request: httpx.Request) -> Outgoing:
    """The same request as a value. Raises httpx.UnsupportedProtocol for an address that is not plain http or https."""
    url = request.url
    try:
        place, _ = place_of(f"{url.scheme}://{'@' if url.userinfo else ''}{url.netloc.decode('ascii')}")
    except UpstreamUnreachable as problem:
        raise httpx.UnsupportedProtocol(problem.message) from None
    ours = {b"host", b"content-length", b"transfer-encoding", b"connection"}
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.headers.raw if name.lower() not in ours}
    return Outgoing(request.method, place, url.raw_path.decode("ascii"), headers, await request.aread())


def _keep_alive(connection: socket.socket | None) -> None:
    if connection is None:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in _KEEPALIVE.items():
        if hasattr(socket, name):  # macOS names the first one otherwise, and its default will do
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
