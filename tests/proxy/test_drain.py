"""A client leaves, and its alias says that its call is read on for the bill: the policy `drain`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx

from accounts.principal import Limit
from providers.clock import Timeouts
from proxy.catalog import Alias
from proxy.gateway import MOST_DRAINS
from tests.proxy.test_gateway import CHAT, USAGE, Chunks, House, fails, says, sse, whole

FAST = CHAT | {"model": "fast"}
STREAM = FAST | {"stream": True}
OPENS = Limit("key:1", "concurrency", 1)


def house(tmp_path, handler: Callable[[httpx.Request], Any], *, seconds: float = 30.0, **parts: Any) -> House:
    made = House(tmp_path, handler, **parts)
    made.gateway.current.catalog = replace(
        made.catalog, aliases=(Alias("fast", ("a/gpt",), ranks=(0,), weights=(1,), drain_seconds=seconds),)
    )
    return made


def leaves_first(made: list[House], answer: Callable[[], Any]) -> Callable[[httpx.Request], Any]:
    """Answers once the client has gone, and its going has been noticed."""

    async def late(request: httpx.Request) -> httpx.Response:
        made[0].reply.left.set()
        await until(lambda: made[0].gateway.metrics.draining == 1)
        return answer()

    return late


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.002)


async def test_a_stream_is_read_to_its_end_and_settled_with_what_the_upstream_counted(tmp_path):
    events = sse(says("one"), says("two"), says("three"), {"choices": [], "usage": USAGE})
    body = Chunks(events)
    one = house(tmp_path, lambda request: httpx.Response(200, stream=body))
    reply = await one.call(STREAM, leave_after=1)

    row = one.settled()
    assert (row.status, row.error, row.usage_source) == (499, "client_closed", "reported")
    assert (row.fresh_input, row.cache_read, row.output, row.cost) == (16, 4, 6, 16 + 2 + 12)
    assert reply.body == events[0]  # nothing more was said to nobody
    assert one.gateway.metrics.draining == 0
    assert body.closed


async def test_so_is_a_whole_answer(tmp_path):
    made: list[House] = []
    made.append(house(tmp_path, leaves_first(made, whole)))
    reply = await made[0].call(FAST)

    row = made[0].settled()
    assert (row.status, row.usage_source, row.output, reply.status) == (499, "reported", 6, 0)


async def test_it_is_read_for_no_longer_than_the_alias_says(tmp_path):
    body = Chunks(sse(says("one"), says("two"), done=False), then=asyncio.Event().wait)
    one = house(tmp_path, lambda request: httpx.Response(200, stream=body), seconds=0.1)
    began = time.monotonic()
    await one.call(STREAM, leave_after=1)

    row = one.settled()
    assert 0.1 <= time.monotonic() - began < 5
    assert (row.status, row.usage_source, row.output) == (499, "estimated", 2)
    assert body.closed


async def test_nor_beyond_the_silence_that_an_upstream_may_keep(tmp_path):
    body = Chunks(sse(says("one"), done=False), then=asyncio.Event().wait)
    one = house(tmp_path, lambda request: httpx.Response(200, stream=body), timeouts=Timeouts(idle_seconds=0.1, heartbeat_seconds=0.05))
    async with asyncio.timeout(5):
        await one.call(STREAM, leave_after=1)

    assert (one.settled().status, one.settled().error, one.settled().output) == (499, "client_closed", 1)
    assert body.closed


async def test_no_other_account_is_asked_for_a_client_that_has_left(tmp_path):
    made: list[House] = []
    made.append(house(tmp_path, leaves_first(made, lambda: fails(500)), pool=3))
    await made[0].call(FAST)

    row = made[0].settled()
    assert (row.status, row.error, row.attempts, len(made[0].sent)) == (499, "client_closed", 1, 1)
    assert (row.usage_source, row.cost) == ("missing", 0)  # a refusal is not billed


async def test_at_the_servers_own_end_it_is_settled_as_it_stands(tmp_path):
    body = Chunks(sse(says("one"), done=False), then=asyncio.Event().wait)
    one = house(tmp_path, lambda request: httpx.Response(200, stream=body))
    task = asyncio.create_task(one.call(STREAM, leave_after=1))
    await until(lambda: one.gateway.metrics.draining == 1)
    task.cancel()
    await task

    assert (one.settled().status, one.settled().usage_source, one.settled().output) == (499, "estimated", 1)
    assert one.gateway.metrics.draining == 0
    assert body.closed


async def test_the_call_keeps_its_place_until_its_upstream_is_done(tmp_path):
    """It is still open there, and its owner pays for it: leaving makes no room for one more."""
    goes_on = asyncio.Event()
    body = Chunks(sse(says("one"), {"choices": [], "usage": USAGE}), then=goes_on.wait)
    one = house(tmp_path, lambda request: httpx.Response(200, stream=body), limits=(OPENS,))
    task = asyncio.create_task(one.call(CHAT | {"model": "fast", "stream": True}, leave_after=1))
    await until(lambda: one.gateway.metrics.draining == 1)
    assert (await one.call(FAST)).status == 429
    goes_on.set()
    await task
    assert one.settled().usage_source == "reported"


async def test_past_so_many_at_once_the_next_is_cancelled(tmp_path):
    body = Chunks(sse(says("one"), says("two"), done=False), then=asyncio.Event().wait)
    one = house(tmp_path, lambda request: httpx.Response(200, stream=body))
    one.gateway.metrics.draining = MOST_DRAINS
    async with asyncio.timeout(5):
        await one.call(STREAM, leave_after=1)

    assert (one.settled().status, one.settled().usage_source) == (499, "estimated")
    assert one.gateway.metrics.draining == MOST_DRAINS


async def test_without_the_policy_the_upstream_is_cancelled_at_once(tmp_path):
    body = Chunks(sse(says("one"), says("two"), done=False), then=asyncio.Event().wait)
    one = house(tmp_path, lambda request: httpx.Response(200, stream=body), seconds=0.0)
    async with asyncio.timeout(5):
        await one.call(STREAM, leave_after=1)
    assert (one.settled().status, one.settled().usage_source) == (499, "estimated")
