"""The only step that waits for the world: one call to one target, its failures in one vocabulary."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType

from providers import registry
from providers.adapter import FirstCalls, Heard, Pause, Target
from providers.clock import Clock, Overseer
from providers.exchange import FAILURES, Answer, Outgoing, Transport, failure_of
from providers.failures import UpstreamProtocol
from providers.wire import MOST_ANSWER_BYTES

MOST_ERROR_BYTES = 64 << 10
FAREWELL_SECONDS = 1.0


class answer:  # noqa: N801 it is used as a verb: `async with answer(…) as response`
    """Send the request; its answer, closed on the way out whatever happens. Raises UpstreamFailure, also for what is read inside.

    Not a generator with a decorator: each request passes here."""

    __slots__ = ("_clock", "_found", "_request", "_transport")

    def __init__(self, transport: Transport, request: Outgoing, target: Target, clock: Clock) -> None:
        self._transport = registry.adapter(target.kind).transport or transport
        self._request, self._clock = request, clock
        self._found: Answer | None = None

    async def __aenter__(self) -> Answer:
        self._clock.__enter__()
        try:
            self._found = found = await self._transport.send(self._request, self._clock)
        except BaseException as problem:
            self._leave(problem)
            raise
        self._clock.busy()
        return found

    async def __aexit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._leave(problem)
        finally:
            assert self._found is not None
            await self._found.close()

    def _leave(self, problem: BaseException | None) -> None:
        try:
            self._clock.__exit__(type(problem) if problem is not None else None, problem, None)
        except TimeoutError as late:
            raise failure_of(late) from None
        if isinstance(problem, FAILURES):
            raise failure_of(problem) from None


async def after_first_calls(transport: Transport, calls: FirstCalls, target: Target, overseer: Overseer, deadline: float) -> Outgoing:
    """Make the calls that come before the call, one after the other, and give the call. Raises UpstreamFailure."""
    try:
        asked = next(calls)
        while True:
            if isinstance(asked, Pause):
                await _pause(asked.seconds, Clock(overseer, deadline))
                asked = next(calls)
                continue
            async with answer(transport, asked, target, Clock(overseer, deadline)) as found:
                heard = Heard(found.status, found.headers, await whole_body(found))
            asked = calls.send(heard)
    except StopIteration as end:
        call: Outgoing = end.value
        return call
    finally:
        calls.close()


async def _pause(seconds: float, clock: Clock) -> None:
    """Raises UpstreamTimeout when the whole call may not take so long any more."""
    try:
        with clock:
            clock.busy()
            await asyncio.sleep(seconds)
    except TimeoutError as problem:
        raise failure_of(problem) from None


async def farewell(found: Answer, chunks: AsyncIterator[bytes]) -> None:
    """Read on behind the last event, so that the connection can be kept. Nobody waits for it, so it is not waited for long."""
    if found.is_over:
        return
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
