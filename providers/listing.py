"""Asks upstreams which models they have. No database here: what becomes of the answers is for `actions` to say."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx

from providers import registry
from providers.adapter import Target
from providers.egress import Egress, EgressRefused
from providers.failures import UpstreamFailure, UpstreamProtocol, UpstreamTimeout, UpstreamUnreachable
from providers.transport import StockTransport
from providers.wire import Json

MOST_BYTES = 8 << 20
TIMEOUT = httpx.Timeout(15, connect=5)
TOTAL_SECONDS = 30.0

Answer = dict[str, Json] | UpstreamFailure


def transport_over(egress: Egress) -> httpx.AsyncBaseTransport:
    """The seam that tests replace."""
    return StockTransport(egress)


async def ask(targets: Sequence[Target], egress: Egress) -> list[Answer]:
    """One answer for each target, in order, all asked at the same time: what it lists, or why it did not say."""
    async with transport_over(egress) as transport:
        return list(await asyncio.gather(*(_ask_one(target, transport) for target in targets)))


async def _ask_one(target: Target, transport: httpx.AsyncBaseTransport) -> Answer:
    adapter = registry.adapter(target.kind)
    request = adapter.models_request(target)
    if request is None:
        return adapter.listed()
    request.extensions["timeout"] = TIMEOUT.as_dict()
    try:
        async with asyncio.timeout(TOTAL_SECONDS):
            # Straight to the transport: no redirect is followed, and no environment variable has a say.
            response = await (adapter.transport or transport).handle_async_request(request)
            response.request = request
            try:
                body = await _body(response)
            finally:
                await response.aclose()
        if not response.is_success:
            return adapter.failure(target, response.status_code, response.headers, body)
        return adapter.models(body)
    except UpstreamFailure as problem:
        return problem
    except EgressRefused as problem:
        return UpstreamUnreachable(str(problem))
    except (TimeoutError, httpx.TimeoutException):
        return UpstreamTimeout("The upstream did not answer in time.")
    except (httpx.RemoteProtocolError, httpx.DecodingError):
        return UpstreamProtocol("The upstream's answer was cut off or not HTTP.")
    except httpx.TransportError as problem:
        return UpstreamUnreachable(f"The upstream could not be reached. {problem}".rstrip())


async def _body(response: httpx.Response) -> bytes:
    body = b""
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MOST_BYTES:
            raise UpstreamProtocol("The list of models is too large.")
    return body
