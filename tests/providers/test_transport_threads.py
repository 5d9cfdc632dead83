"""A sweep asks upstreams from a thread with an event loop of its own, while streams run in another: neither sees the other's bytes."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from tests.proxies.calls import call, fetch, transport
from tests.proxies.scripted import answers, origin

BODY_BYTES = 1 << 20
ROUNDS = 20


async def foreign_bytes(letter: bytes) -> int:
    """How many bytes of all answers were not this loop's own."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % BODY_BYTES
    foreign = 0
    async with origin(answers(head, letter * BODY_BYTES)) as there, transport() as via:
        for _ in range(ROUNDS):
            status, body = await fetch(via, call(there.url))
            assert status == 200
            foreign += len(body) - body.count(letter)
    return foreign


def test_loops_of_two_threads_share_nothing() -> None:
    letters = [b"a", b"b", b"c"]
    with ThreadPoolExecutor(len(letters)) as threads:
        found = list(threads.map(lambda letter: asyncio.run(foreign_bytes(letter)), letters))
    assert found == [0] * len(letters)
