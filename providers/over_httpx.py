"""The native call over any transport of httpx's: an adapter's own, a test's, and httpx's network stack for outgoing proxies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, cast

import httpcore
import httpx

from providers.clock import Timeouts
from providers.decoding import Body, decoder_for
from providers.egress import Egress, fresh_trust
from providers.exchange import Outgoing, Place, Watch
from providers.http1 import request_head


class OverHttpx:
    """See `exchange.Transport`."""

    def __init__(self, transport: httpx.AsyncBaseTransport, timeouts: Timeouts | None = None) -> None:
        timeouts = timeouts or Timeouts()
        self._transport = transport
        self.calls = 0  # under way
        # Reading is watched by whoever waits for it.
        self._limits = {"pool": timeouts.pool_wait_seconds, "connect": timeouts.connect_seconds, "write": timeouts.idle_seconds}

    async def send(self, call: Outgoing, watch: Watch) -> HttpxAnswer:
        request_head(call)  # what must not be sent is refused in the same words, whoever would send it
        request = call.as_httpx()
        request.extensions["timeout"] = self._limits
        self.calls += 1
        try:
            response = await self._transport.handle_async_request(request)
            try:
                return HttpxAnswer(response, watch, self._ended)
            except httpx.DecodingError:
                await asyncio.shield(response.aclose())
                raise
        except BaseException:
            self._ended()
            raise

    def _ended(self) -> None:
        self.calls -= 1

    async def aclose(self) -> None:
        await self._transport.aclose()


class HttpxAnswer(Body):
    """See `exchange.Answer`."""

    def __init__(self, response: httpx.Response, watch: Watch, ended: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._ended: Callable[[], None] | None = ended
        self.status = response.status_code
        self._response = response
        self._watch = watch
        self._parts = _parts_of(response)
        if not response.is_stream_consumed:  # else httpx has decoded it
            self._decoder = decoder_for(response.headers.get("content-encoding", ""))

    @property
    def headers(self) -> Mapping[str, str]:
        return dict(self._response.headers)

    @property
    def content_type(self) -> str:
        return str(self._response.headers.get("content-type", ""))

    async def arrived(self) -> bytes:
        self._watch.waiting()
        data = await anext(self._parts, b"")
        self._watch.busy()
        return data

    async def close(self) -> None:
        if self._ended is not None:
            self._ended()
            self._ended = None
        await asyncio.shield(self._end())

    async def _end(self) -> None:
        await self._parts.aclose()
        await self._response.aclose()


async def _parts_of(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    if response.is_stream_consumed:
        yield response.content
        return
    async with aclosing(cast(AsyncGenerator[bytes, None], response.aiter_raw())) as parts:
        async for part in parts:
            if part:
                yield part


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


class HttpxTransport(httpx.AsyncHTTPTransport):
    """httpx's own transport for one place: through its proxy, where it has one, and with HTTP/2, where it wants that.

    Whatever it connects to is reached through the checked door."""

    def __init__(self, egress: Egress, place: Place) -> None:
        # A context of its own: httpcore writes into it which protocols it offers.
        context = fresh_trust(place.ca_pem)
        super().__init__(trust_env=False, verify=context)
        options: dict[str, Any] = {
            "ssl_context": context,
            # No cap: httpcore 1.0 can lose a slot of its pool when a call is cancelled while it waits for one.
            "max_connections": None,
            "max_keepalive_connections": 100,
            "keepalive_expiry": 30,
            "http2": place.http2,
            "network_backend": CheckedBackend(egress),
        }
        self._pool = (
            httpcore.AsyncHTTPProxy(proxy_url=place.proxy_url, **options) if place.proxy_url else httpcore.AsyncConnectionPool(**options)
        )
