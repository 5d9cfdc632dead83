"""F07: each timer goes off at its own value, and to move a deadline costs no timer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import uvloop

from providers.clock import Clock, Overseer, Timeouts
from tests.proxies.calls import QUICK, call, transport
from tests.proxies.scripted import Peer, Script, origin

OK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SHORT = replace(
    QUICK, pool_wait_seconds=0.05, connect_seconds=0.1, first_byte_seconds=0.3, idle_seconds=0.2, heartbeat_seconds=0.05, total_seconds=0.8
)
LONG = replace(SHORT, first_byte_seconds=30, idle_seconds=30, total_seconds=40)
FIRST_BYTE, IDLE = replace(LONG, first_byte_seconds=0.3), replace(LONG, idle_seconds=0.2)
TOTAL = replace(SHORT, first_byte_seconds=0.79, idle_seconds=0.79)
LOOPS: list[Callable[[], Any]] = [asyncio.new_event_loop, uvloop.new_event_loop]


async def silent(peer: Peer) -> None:
    await peer.request()
    await peer.gone()


def drips(piece: bytes, *, first: bytes = OK) -> Script:
    """A piece every 50 ms, for ever."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(first)
        while True:
            await peer.say(piece)
            await asyncio.sleep(0.05)

    return script


async def seconds_until_late(script: Script, timeouts: Timeouts = SHORT) -> tuple[float, bytes]:
    """How long an attempt at this origin takes until it is called late, and what had come by then."""
    came = b""
    async with origin(script) as there, transport(timeouts=timeouts) as via:
        began = time.monotonic()
        with pytest.raises(TimeoutError), Clock(Overseer(timeouts), time.monotonic() + timeouts.total_seconds) as clock:
            answer = await via.send(call(there.url), clock)
            try:
                async for chunk in answer.chunks():
                    came += chunk
            finally:
                await answer.close()
        took = time.monotonic() - began
        for _ in range(20):  # the origin notices with its next byte but one
            await asyncio.sleep(0.05 * there.open)
        assert there.open == 0, "the upstream goes on"
    return took, came


@pytest.mark.parametrize("new_loop", LOOPS)
@pytest.mark.parametrize(
    ("script", "timeouts", "expected"),
    [
        pytest.param(silent, FIRST_BYTE, 0.3, id="nothing at all"),
        pytest.param(drips(b"X-A: 1\r\n", first=b"HTTP/1.1 200 OK\r\n"), FIRST_BYTE, 0.3, id="a head without an end"),
        pytest.param(drips(b"HTTP/1.1 100 Continue\r\n\r\n", first=b""), FIRST_BYTE, 0.3, id="patience asked for again and again"),
        pytest.param(drips(b"1\r\nx\r\n"), TOTAL, 0.8, id="a body without an end"),
        pytest.param(drips(b"0", first=OK + b"1;"), IDLE, 0.2, id="bytes that bring nothing"),
    ],
)
def test_f07_each_timer_goes_off_at_its_own_value(new_loop: Callable[[], Any], script: Script, timeouts: Timeouts, expected: float):
    with asyncio.Runner(loop_factory=new_loop) as runner:
        took, _ = runner.run(seconds_until_late(script, timeouts))
    assert expected * 0.9 <= took < expected + 1


async def test_f07_silence_is_counted_from_the_last_byte():
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK)
        for _ in range(3):
            await asyncio.sleep(0.4)
            await peer.say(b"1\r\nx\r\n")
        await peer.gone()

    took, came = await seconds_until_late(script, replace(LONG, idle_seconds=1.0))
    assert came == b"xxx"
    assert took >= 2.1


async def test_our_own_slowness_is_not_the_upstreams():
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK, b"1\r\nx\r\n", b"1\r\ny\r\n", b"0\r\n\r\n")

    async with origin(script) as there, transport(timeouts=SHORT) as via:
        with Clock(Overseer(SHORT), time.monotonic() + 5) as clock:
            answer = await via.send(call(there.url), clock)
            clock.busy()
            came = b""
            async for chunk in answer.chunks():
                came += chunk
                await asyncio.sleep(0.35)  # longer than first byte and idle
            await answer.close()
    assert came == b"xy"


async def test_many_clocks_and_deadlines_that_move_cost_one_timer(monkeypatch: pytest.MonkeyPatch):
    loop = asyncio.get_running_loop()
    set_timers: list[float] = []
    call_later = loop.call_later
    monkeypatch.setattr(loop, "call_later", lambda delay, *rest: (set_timers.append(delay), call_later(delay, *rest))[1])
    overseer = Overseer(Timeouts())
    for _ in range(1000):
        with Clock(overseer, loop.time() + 1800) as clock:
            clock.waiting()
            clock.busy()
    assert len(set_timers) == 1
    assert not overseer.clocks


async def test_without_a_clock_nothing_ticks():
    overseer = Overseer(SHORT)
    with Clock(overseer, time.monotonic() + 5):
        pass
    await asyncio.sleep(0.1)
    assert overseer._timer is None


async def test_the_clock_goes_by_the_deadline_as_it_stands_when_the_alarm_rings():
    timeouts = replace(SHORT, first_byte_seconds=0.2, idle_seconds=0.3)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(TimeoutError), Clock(Overseer(timeouts), began + 5) as clock:
        await asyncio.sleep(0.15)
        clock.waiting()
        await asyncio.sleep(5)
    assert 0.4 <= loop.time() - began < 4


async def test_a_cancelled_attempt_is_cancelled_and_not_late():
    async def attempt() -> None:
        with Clock(Overseer(SHORT), time.monotonic() + 5):
            await asyncio.sleep(5)

    task = asyncio.create_task(attempt())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
