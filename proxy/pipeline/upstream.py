"""The only step that waits for the world: one call to one target, its failures in one vocabulary."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from providers import registry
from providers.adapter import Target
from providers.egress import EgressRefused
from providers.failures import UpstreamProtocol, UpstreamServer, UpstreamTimeout, UpstreamUnreachable
from providers.transport import Timeouts
from providers.wire import MOST_ANSWER_BYTES

MOST_ERROR_BYTES = 64 << 10


class Clock:
    """Watches one attempt: first byte, then silence between reads, and the total of the whole call."""

    def __init__(self, timeouts: Timeouts, deadline: float) -> None:
        self._timeouts = timeouts
        self._deadline = deadline
        loop = asyncio.get_running_loop()
        self._time = loop.time
        self.timer = asyncio.timeout_at(min(deadline, loop.time() + timeouts.connect_seconds + timeouts.first_byte_seconds))

    def waiting(self) -> None:
        """The upstream's turn: it may be silent for so long."""
        self.timer.reschedule(min(self._deadline, self._time() + self._timeouts.idle_seconds))

    def busy(self) -> None:
        """Our turn, or the client's: only the total counts."""
        self.timer.reschedule(self._deadline)


@asynccontextmanager
async def answer(
    transport: httpx.AsyncBaseTransport, request: httpx.Request, target: Target, clock: Clock, timeouts: Timeouts
) -> AsyncIterator[httpx.Response]:
    """Send the request; its response, closed on the way out whatever happens. Raises UpstreamFailed."""
    own = registry.adapter(target.kind).transport
    request.extensions["timeout"] = timeouts.for_httpx()
    response: httpx.Response | None = None
    try:
        async with clock.timer:
            response = await (own or transport).handle_async_request(request)
            response.request = request
            clock.busy()
            yield response
    except TimeoutError:
        raise UpstreamTimeout("The upstream did not answer in time.") from None
    except EgressRefused as problem:
        raise UpstreamUnreachable(str(problem)) from None
    except (httpx.ConnectTimeout, httpx.PoolTimeout):
        raise UpstreamUnreachable("The upstream could not be reached in time.") from None
    except (httpx.ConnectError, httpx.UnsupportedProtocol):
        raise UpstreamUnreachable("The upstream could not be reached.") from None
    except (httpx.RemoteProtocolError, httpx.LocalProtocolError, httpx.DecodingError):
        raise UpstreamProtocol("The upstream's answer was cut off or not HTTP.") from None
    except httpx.TransportError:
        raise UpstreamServer("The connection to the upstream was lost.") from None
    finally:
        if response is not None:
            await asyncio.shield(response.aclose())


async def chunks(response: httpx.Response, clock: Clock) -> AsyncIterator[bytes]:
    """The body as it arrives, decompressed. The clock counts only while we wait for the upstream."""
    clock.waiting()
    async for chunk in response.aiter_bytes():
        clock.busy()
        yield chunk
        clock.waiting()
    clock.busy()


async def whole_body(response: httpx.Response, clock: Clock, most: int = MOST_ANSWER_BYTES) -> bytes:
    """Raises UpstreamProtocol when it is larger than `most` bytes."""
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks(response, clock):
        size += len(chunk)
        if size > most:
            raise UpstreamProtocol("The upstream's answer is too large.")
        parts.append(chunk)
    return b"".join(parts)


async def error_body(response: httpx.Response, clock: Clock) -> bytes:
    """As much of an error's body as is worth reading."""
    body = b""
    async for chunk in chunks(response, clock):
        body += chunk
        if len(body) >= MOST_ERROR_BYTES:
            break
    return body
