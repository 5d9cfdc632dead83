"""The calls that come before the call: made one after the other, with pauses where the adapter asks for them."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from providers.adapter import FirstCalls, Pause, Target
from providers.clock import Overseer, Timeouts
from providers.exchange import Outgoing
from providers.failures import UpstreamTimeout
from providers.over_httpx import OverHttpx
from providers.secrets import SecretText
from proxy.pipeline.upstream import after_first_calls

TARGET = Target("openai", 1, "u", "https://up.example", SecretText("s"), "m", "a/m")


async def made(calls: FirstCalls, *, seconds: float = 10) -> tuple[Outgoing, list[str], float]:
    """The call itself, the paths that were asked before it, and how long it took."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return httpx.Response(200, content=b"answer to " + request.url.path.encode())

    loop = asyncio.get_running_loop()
    began = loop.time()
    call = await after_first_calls(OverHttpx(httpx.MockTransport(answer)), calls, TARGET, Overseer(Timeouts()), began + seconds)
    return call, asked, loop.time() - began


async def test_each_answer_is_sent_back_and_the_call_is_what_is_returned():
    def calls() -> FirstCalls:
        first = yield TARGET.get("/one", {})
        second = yield TARGET.get("/two", {})
        return TARGET.post("/last", {}, first.body + b", " + second.body)

    call, asked, _ = await made(calls())

    assert asked == ["/one", "/two"]
    assert (call.path, call.body) == ("/last", b"answer to /one, answer to /two")


async def test_a_pause_is_waited_for_and_answered_with_nothing():
    sent: list[object] = []

    def calls() -> FirstCalls:
        sent.append((yield Pause(0.02)))
        sent.append((yield Pause(0.02)))
        heard = yield TARGET.get("/one", {})
        sent.append((yield Pause(0.02)))
        return TARGET.post("/last", {}, heard.body)

    call, asked, seconds = await made(calls())

    assert seconds >= 0.06
    assert sent == [None, None, None]
    assert (asked, call.body) == (["/one"], b"answer to /one")


async def test_a_pause_ends_with_the_whole_call_and_the_generator_is_closed():
    closed: list[bool] = []

    def calls() -> FirstCalls:
        try:
            yield Pause(60)
        finally:
            closed.append(True)
        return TARGET.get("/never", {})

    with pytest.raises(UpstreamTimeout):
        await made(calls(), seconds=0.05)
    assert closed == [True]


async def test_a_caller_who_leaves_ends_a_pause():
    def calls() -> FirstCalls:
        yield Pause(60)
        return TARGET.get("/never", {})

    task = asyncio.create_task(made(calls()))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
