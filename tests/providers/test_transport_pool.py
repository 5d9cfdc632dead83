"""Which connections are kept, for whom, and for how long; and who gets one when all are taken."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable

import httpx
import pytest

from providers.exchange import Answer, Unwatched
from providers.http1 import Connection
from providers.over_httpx import OverHttpx
from providers.pool import MOST_IDLE
from providers.transport import PooledTransport
from tests.proxies.calls import QUICK, call, fetch, send, settle, transport
from tests.proxies.scripted import HELLO, Origin, Peer, Script, answers, answers_once, origin

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def one_by_one(*scripts: Script) -> Script:
    """The first connection plays the first script, and so on; the last script is played by all that follow."""

    async def script(peer: Peer) -> None:
        await scripts[min(peer.number, len(scripts)) - 1](peer)

    return script


async def test_a_connection_that_has_ended_does_not_wait_for_the_garbage_collector():
    """One client in twenty that leaves early would otherwise be seen in the memory of a process that collects rarely."""
    ended: list[weakref.ref[Connection]] = []
    async with origin(answers(CHUNKED + b"5\r\nhello\r\n")) as there, transport() as via:  # and more to come
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                answer = await send(via, call(there.url))
                ended.append(weakref.ref(answer._connection))
                await answer.close()
                del answer
                await settle()
            assert [one() for one in ended] == [None] * 5
        finally:
            gc.enable()


# Kept


async def test_one_connection_serves_call_after_call():
    async with origin(answers(HELLO)) as there, transport() as via:
        for _ in range(5):
            assert await fetch(via, call(there.url)) == (200, b"hello")
        assert (there.connections, there.open) == (1, 1)


async def test_a_stream_gives_its_connection_back_at_its_end():
    async with origin(answers(CHUNKED, b"3\r\nabc\r\n", b"0\r\n\r\n")) as there, transport() as via:
        for _ in range(3):
            assert await fetch(via, call(there.url)) == (200, b"abc")
        assert there.connections == 1


async def test_a_connection_is_free_as_soon_as_all_has_come_even_if_nobody_has_read_it():
    async with origin(answers(HELLO)) as there, transport() as via:
        unread = await send(via, call(there.url))
        assert await fetch(via, call(there.url)) == (200, b"hello")
        assert await unread.read(10) == b"hello"
        await unread.close()
        assert there.connections == 1


async def test_the_connection_used_last_goes_out_first():
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            body = b"%d" % peer.number
            await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async with origin(script) as there, transport() as via:
        first = asyncio.create_task(fetch(via, call(there.url)))
        second = asyncio.create_task(fetch(via, call(there.url)))
        await asyncio.gather(first, second)
        used = [(await fetch(via, call(there.url)))[1] for _ in range(4)]
        assert len(set(used)) == 1
        assert there.connections == 2


@pytest.mark.parametrize("difference", [{"credential_id": 2}, {"ca_pem": "other"}, {"url": "localhost"}])
async def test_a_connection_is_lent_to_no_other_place(difference: dict[str, object]):
    async with origin(answers(HELLO)) as there, transport() as via:
        await fetch(via, call(there.url))
        url = there.url.replace("127.0.0.1", "localhost") if difference.pop("url", "") else there.url
        await fetch(via, call(url, **difference))
        await fetch(via, call(there.url))
        assert there.connections == 2


# Not kept


async def a_whole_answer(answer: Answer) -> None:
    async for _ in answer.chunks():
        pass


async def nothing_of_it(answer: Answer) -> None:
    pass


@pytest.mark.parametrize(
    ("wire", "read"),
    [
        pytest.param([HELLO.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")], a_whole_answer, id="it says close"),
        pytest.param([HELLO.replace(b"HTTP/1.1", b"HTTP/1.0")], a_whole_answer, id="it is of 1.0"),
        pytest.param([HELLO + b"surplus"], a_whole_answer, id="bytes after the answer"),
        pytest.param([HELLO + HELLO], a_whole_answer, id="a second answer that nobody asked for"),
        pytest.param([HELLO[:-2]], nothing_of_it, id="left in the middle"),
        pytest.param([CHUNKED + b"3\r\nabc\r\n"], nothing_of_it, id="left in the middle of a stream"),
    ],
)
async def test_a_connection_that_may_be_out_of_step_is_not_used_again(wire: list[bytes], read: Callable[[Answer], Awaitable[None]]):
    async with origin(answers(*wire)) as there, transport() as via:
        for _ in range(2):
            answer = await send(via, call(there.url))
            await read(answer)
            await answer.close()
            await settle()
        assert (there.connections, there.open) == (2, 0)


async def test_a_connection_whose_call_was_cancelled_is_not_used_again():
    asked, left = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await left.wait()
        await peer.say(HELLO)
        await peer.gone()

    async with origin(one_by_one(script, answers(HELLO))) as there, transport() as via:
        task = asyncio.create_task(fetch(via, call(there.url)))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left.set()
        assert await fetch(via, call(there.url)) == (200, b"hello")
        async with asyncio.timeout(5):
            while there.open > 1:
                await asyncio.sleep(0.01)
        assert there.connections == 2


@pytest.mark.parametrize("what", [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"x", b""])
async def test_a_free_connection_that_speaks_or_hangs_up_is_ended(what: bytes):
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(HELLO)
        await asyncio.sleep(0.02)
        if what:
            await peer.say(what)
            await peer.gone()

    async with origin(script) as there, transport() as via:
        for _ in range(2):
            assert await fetch(via, call(there.url)) == (200, b"hello")
            await asyncio.sleep(0.1)
            assert there.open == 0
        assert there.connections == 2


async def test_free_connections_end_after_a_while():
    async with origin(answers(HELLO)) as there, transport(idle_seconds=0.2) as via:
        await fetch(via, call(there.url))
        await asyncio.sleep(0.1)
        assert there.open == 1
        await asyncio.sleep(0.3)
        assert there.open == 0
        assert via._pools == {}
        assert via._sweep_timer is None
        await fetch(via, call(there.url))
        assert there.connections == 2


async def test_no_more_than_so_many_are_kept_free():
    async with origin(answers(HELLO)) as there, transport() as via:
        await asyncio.gather(*(fetch(via, call(there.url)) for _ in range(MOST_IDLE + 10)))
        await settle()
        assert there.connections == MOST_IDLE + 10
        assert there.open == MOST_IDLE


async def test_closing_ends_what_is_free_and_what_is_in_use_when_it_comes_back():
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await asyncio.sleep(0.05 * peer.number)
            await peer.say(HELLO)

    async with origin(script) as there, transport() as via:
        first, second = (asyncio.create_task(fetch(via, call(there.url))) for _ in range(2))
        await first
        await via.aclose()
        assert await second == (200, b"hello")
        await settle()
        assert there.open == 0


# Sent again, once


async def test_f09_a_kept_connection_that_died_is_replaced_once():
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(HELLO)
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.reset()

    async with origin(one_by_one(script, answers(HELLO))) as there, transport() as via:
        assert await fetch(via, call(there.url)) == (200, b"hello")
        assert await fetch(via, call(there.url)) == (200, b"hello")
        assert there.connections == 2


async def test_f09_the_second_attempt_has_a_connection_of_its_own():
    """All that were kept may have died with the same server: one dead one is enough to know."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await asyncio.sleep(0.05)
        await peer.say(HELLO)
        await peer.request()
        peer.reset()

    fresh = answers(HELLO)
    async with origin(one_by_one(script, script, script, fresh)) as there, transport() as via:
        await asyncio.gather(*(fetch(via, call(there.url)) for _ in range(3)))
        assert await fetch(via, call(there.url)) == (200, b"hello")
        assert there.connections == 4


@pytest.mark.parametrize("end", ["reset", "close"])
async def test_f09_a_new_connection_that_dies_is_not_replaced(end: str):
    async def script(peer: Peer) -> None:
        there.requests.append(await peer.request())
        getattr(peer, end)()

    async with origin(script) as there, transport() as via:
        with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
            await fetch(via, call(there.url))
        assert len(there.requests) == there.connections == 1


async def test_f09_two_connections_are_the_most_that_one_call_gets():
    async def dies_second(peer: Peer) -> None:
        await peer.request()
        await peer.say(HELLO)
        there.requests.append(await peer.request())
        peer.reset()

    async def dies_first(peer: Peer) -> None:
        there.requests.append(await peer.request())
        peer.reset()

    async with origin(one_by_one(dies_second, dies_first)) as there, transport() as via:
        await fetch(via, call(there.url))
        with pytest.raises(httpx.TransportError):
            await fetch(via, call(there.url))
        assert len(there.requests) == 2


@pytest.mark.parametrize("first", [b"H", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", CHUNKED, b"garbage\r\n\r\n"])
async def test_f09_after_any_byte_of_an_answer_nothing_is_sent_again(first: bytes):
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(HELLO)
        there.requests.append(await peer.request())
        await peer.say(first)
        peer.close()

    async with origin(script) as there, transport() as via:
        await fetch(via, call(there.url))
        with pytest.raises(httpx.TransportError):
            await fetch(via, call(there.url))
        assert len(there.requests) == there.connections == 1


# When all are taken


class Slow:
    """An origin whose answers come when they are let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, peer: Peer) -> None:
        while True:
            await peer.request()
            await self.go.wait()
            await peer.say(HELLO)


async def taken(via: PooledTransport, there: Origin, count: int, **place: int) -> list[asyncio.Task[tuple[int, bytes]]]:
    tasks = [asyncio.create_task(fetch(via, call(there.url, **place))) for _ in range(count)]
    while there.connections < count:
        await asyncio.sleep(0.005)
    return tasks


async def test_a_call_waits_for_a_connection_and_then_gives_up():
    slow = Slow()
    async with origin(slow) as there, transport(most_connections=2) as via:
        tasks = await taken(via, there, 2)
        with pytest.raises(httpx.PoolTimeout):
            await fetch(via, call(there.url))
        slow.go.set()
        assert await asyncio.gather(*tasks) == [(200, b"hello")] * 2
        assert await fetch(via, call(there.url)) == (200, b"hello")
        assert there.connections == 2


async def test_only_so_many_wait_and_who_would_be_one_too_many_is_told_at_once():
    slow = Slow()
    async with origin(slow) as there, transport(most_connections=2, most_waiting=1) as via:
        tasks = await taken(via, there, 2)
        waiting = asyncio.create_task(fetch(via, call(there.url)))
        await asyncio.sleep(0)
        with pytest.raises(httpx.PoolTimeout, match="enough calls wait"):
            await fetch(via, call(there.url))
        slow.go.set()
        assert await asyncio.gather(*tasks, waiting) == [(200, b"hello")] * 3


async def test_the_busiest_origin_is_the_one_with_the_most_calls_those_that_wait_included():
    slow = Slow()
    async with origin(slow) as there, origin(Slow()) as other, transport(most_connections=2, most_waiting=1) as via:
        assert via.most_calls() == 0
        tasks = [*await taken(via, there, 2), *await taken(via, other, 1), asyncio.create_task(fetch(via, call(there.url)))]
        await asyncio.sleep(0)
        assert via.most_calls() == 3
        slow.go.set()
        await asyncio.gather(tasks[0], tasks[1], tasks[3])
        assert via.most_calls() == 1  # what is kept free serves nobody
        tasks[2].cancel()


async def test_calls_that_httpx_takes_are_counted_until_they_are_closed_or_fail():
    answered = httpx.MockTransport(lambda request: httpx.Response(200, text="hello"))
    broken = httpx.MockTransport(lambda request: httpx.Response(200, headers={"content-encoding": "zstd"}, stream=httpx.ByteStream(b"?")))
    asked = call("http://somewhere.example")
    one = OverHttpx(answered)
    first, second = await one.send(asked, Unwatched()), await one.send(asked, Unwatched())
    assert one.calls == 2
    for _ in range(2):
        await first.close()
    assert one.calls == 1
    await second.close()
    assert one.calls == 0
    one = OverHttpx(broken)
    with pytest.raises(httpx.DecodingError):
        await one.send(asked, Unwatched())
    assert one.calls == 0


async def test_so_they_are_bounded_by_origin_whoever_makes_them():
    slow = Slow()
    async with origin(slow) as proxy, transport(most_connections=2) as via:
        hung = [call("http://93.184.216.34", proxy_url=proxy.url, credential_id=number) for number in range(3)]
        tasks = [asyncio.create_task(fetch(via, one)) for one in hung[:2]]
        while proxy.connections < 2:
            await asyncio.sleep(0.001)
        assert via.most_calls() == 2
        with pytest.raises(httpx.PoolTimeout):
            await fetch(via, hung[2])
        other = asyncio.create_task(fetch(via, call("http://93.184.216.35", proxy_url=proxy.url)))
        slow.go.set()
        assert await asyncio.gather(*tasks, other) == [(200, b"hello")] * 3
        assert via.most_calls() == 0


async def test_whoever_waits_first_is_served_first_and_by_the_same_connections():
    slow = Slow()
    order: list[int] = []

    async def one(number: int) -> None:
        await fetch(via, call(there.url))
        order.append(number)

    async with origin(slow) as there, transport(most_connections=2) as via:
        tasks = await taken(via, there, 2)
        waiting = []
        for number in range(6):
            waiting.append(asyncio.create_task(one(number)))
            await asyncio.sleep(0)
        slow.go.set()
        await asyncio.gather(*tasks, *waiting)
        assert order == sorted(order)
        assert there.connections == 2


async def test_the_cap_is_the_origins_and_another_origin_has_its_own():
    slow = Slow()
    async with origin(slow) as there, origin(answers(HELLO)) as elsewhere, transport(most_connections=2) as via:
        tasks = await taken(via, there, 2)
        assert await fetch(via, call(elsewhere.url)) == (200, b"hello")
        with pytest.raises(httpx.PoolTimeout):
            await fetch(via, call(there.url, credential_id=9))
        slow.go.set()
        await asyncio.gather(*tasks)


async def test_what_another_credential_keeps_free_makes_room():
    async with origin(answers(HELLO)) as there, transport(most_connections=2) as via:
        for credential_id in range(5):
            assert await fetch(via, call(there.url, credential_id=credential_id)) == (200, b"hello")
        await settle()
        assert (there.connections, there.open) == (5, 2)


async def test_what_another_credential_gives_back_makes_room_for_who_waits():
    slow = Slow()
    async with origin(slow) as there, transport(most_connections=2) as via:
        tasks = await taken(via, there, 2, credential_id=1)
        waiting = asyncio.create_task(fetch(via, call(there.url, credential_id=2)))
        await asyncio.sleep(0.01)
        slow.go.set()
        assert await waiting == (200, b"hello")
        await asyncio.gather(*tasks)
        assert there.connections == 3


async def test_who_leaves_the_line_takes_no_room_along():
    slow = Slow()
    async with origin(slow) as there, transport(most_connections=1) as via:
        [task] = await taken(via, there, 1)
        waiting = [asyncio.create_task(fetch(via, call(there.url, credential_id=number % 2))) for number in range(20)]
        await asyncio.sleep(0.01)
        slow.go.set()
        for one in waiting[::2]:
            one.cancel()
        await asyncio.sleep(0)
        for one in waiting[1::4]:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await task
        assert [one.result() for one in waiting if not one.cancelled()] == [(200, b"hello")] * 5
        [pool] = via._pools.values()
        assert pool.taken <= 1
        assert await fetch(via, call(there.url)) == (200, b"hello")


async def test_room_comes_back_from_connections_that_could_not_be_made():
    async with origin(answers_once(HELLO)) as there:
        url = there.url
    async with transport(most_connections=2) as via:  # nobody listens there any more
        for _ in range(5):
            with pytest.raises(httpx.ConnectError):
                await fetch(via, call(url))
        [pool] = via._pools.values()
        assert pool.taken == 0


async def test_a_connection_handed_over_that_dies_on_the_way_is_replaced():
    """It comes back, is given to the first who waits, and ends before that one has had its turn."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await asyncio.sleep(0.05)
        peer.writer.write(HELLO)
        peer.writer.close()

    async with origin(one_by_one(script, answers(HELLO))) as there, transport(most_connections=1, timeouts=QUICK) as via:
        first = asyncio.create_task(fetch(via, call(there.url)))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(fetch(via, call(there.url)))
        assert await asyncio.gather(first, second) == [(200, b"hello")] * 2
        assert there.connections == 2
