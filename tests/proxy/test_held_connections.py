"""F12: streams that are open hold no connection of the database, however many they are."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator

import httpx
import psycopg
import pytest

from tests.conftest import POSTGRES_URL
from tests.serving import Sluice, eventually, running
from tests.upstreams.openai import DONE, OpenAIUpstream, Step

pytestmark = pytest.mark.postgres
STREAMS = 300
MOST_CONNECTIONS = 16  # the pages' pool, the three threads beside it, and the commands of this test


@pytest.fixture
def house(postgres_url: str, upstream: OpenAIUpstream) -> Iterator[tuple[Sluice, str]]:
    with running(DATABASE_URL=postgres_url, SECRET_KEY=secrets.token_hex(32), KEYRING=secrets.token_hex(32)) as sluice:
        sluice.add_openai(upstream, prefix="sim")
        sluice.wait_for("sim")
        yield sluice, postgres_url.rpartition("/")[2]


def connections(database: str) -> int:
    with psycopg.connect(f"{POSTGRES_URL}/postgres") as own:
        found = own.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = %s", [database]).fetchone()
    assert found is not None
    return int(found[0])


async def test_F12_three_hundred_streams_hold_no_connection(house: tuple[Sluice, str], upstream: OpenAIUpstream) -> None:
    sluice, database = house
    keys = [await asyncio.to_thread(sluice.issue_key) for _ in range(4)]
    upstream.reset()
    upstream.script(*[Step(text="one two three four five six", delay_first_ms=1500, delay_frame_ms=700)] * STREAMS)
    body = {"model": "sim/gpt-4o", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    seen: list[int] = []

    async with httpx.AsyncClient(base_url=sluice.url, timeout=60, limits=limits) as client:

        async def stream(number: int) -> bytes:
            key = keys[number % len(keys)]
            answer = await client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
            return answer.content

        async def visit() -> int:
            """A page that asks the database, and a key that memory does not know."""
            page = await client.get("/accounts/login/", headers={"cookie": f"sessionid={'a' * 32}"})
            stranger = await client.get("/v1/models", headers={"authorization": f"Bearer sk-imported-{secrets.token_hex(20)}"})
            return page.status_code + stranger.status_code

        streams = asyncio.gather(*(stream(number) for number in range(STREAMS)))
        while sum(one.frames_sent > 0 for one in upstream.posts) < STREAMS and not streams.done():
            await asyncio.sleep(0.05)

        async def visit_on() -> None:
            while not streams.done():
                assert await visit() == 200 + 401

        visitors = [asyncio.create_task(visit_on()) for _ in range(30)]
        while not streams.done():
            seen.append(await asyncio.to_thread(connections, database))
        answers = await streams
        await asyncio.gather(*visitors)

    assert all(answer.endswith(DONE) for answer in answers)
    assert len(seen) > 10
    assert 2 <= max(seen) <= MOST_CONNECTIONS
    eventually(lambda: sum(row["status"] == 200 for row in sluice.usage()) == STREAMS, "not all are stored", seconds=10)
    assert "PoolTimeout" not in sluice.log()
    assert "Traceback" not in sluice.log()
