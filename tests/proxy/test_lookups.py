"""A key that the catalog does not have costs one look-up, however many calls come with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from accounts.principal import Principal
from proxy import lookups
from proxy.errors import Unavailable
from proxy.lookups import Lookups

ANN = Principal(1, 1, 1)
KEY = (b"new pepper's", b"old pepper's")


class Database:
    """Answers when it is let; `known` is what it has, `asked` what it was asked."""

    def __init__(self, known: dict[bytes, Principal] | None = None) -> None:
        self.known = known or {}
        self.asked: list[Sequence[bytes]] = []
        self.away = False
        self.lets = asyncio.Event()
        self.lets.set()

    async def ask(self, digests: Sequence[bytes]) -> Principal | None:
        self.asked.append(digests)
        await self.lets.wait()
        if self.away:
            raise Unavailable("away")
        return next((self.known[one] for one in digests if one in self.known), None)


@pytest.mark.parametrize("known", [{KEY[1]: ANN}, {}], ids=["a new key", "nobody's"])
async def test_calls_at_once_and_soon_after_share_an_answer(known: dict[bytes, Principal]) -> None:
    database = Database(known)
    database.lets.clear()
    load = Lookups(database.ask)
    waiting = [asyncio.create_task(load(KEY)) for _ in range(50)]
    await asyncio.sleep(0)
    database.lets.set()

    wanted = known.get(KEY[1])
    assert await asyncio.gather(*waiting) == [wanted] * 50
    assert await load(KEY) is wanted
    assert database.asked == [KEY]


async def test_other_keys_are_asked_for_themselves() -> None:
    database = Database({b"ann": ANN})
    load = Lookups(database.ask)
    assert (await load([b"ann"]), await load([b"bob"]), await load([])) == (ANN, None, None)
    assert database.asked == [[b"ann"], [b"bob"]]


async def test_an_answer_grows_no_older_than_the_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "KEPT_SECONDS", 0.05)
    database = Database({KEY[0]: ANN})
    load = Lookups(database.ask)
    assert await load(KEY) is ANN
    database.known.clear()  # revoked
    await asyncio.sleep(0.06)
    assert await load(KEY) is None


async def test_a_slow_database_is_not_asked_again_by_those_who_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "KEPT_SECONDS", 0)
    database = Database({KEY[0]: ANN})
    database.lets.clear()
    load = Lookups(database.ask)
    first = asyncio.create_task(load(KEY))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(load(KEY))
    await asyncio.sleep(0.01)
    database.lets.set()
    assert await asyncio.gather(first, second) == [ANN, ANN]
    assert len(database.asked) == 1


async def test_a_failure_is_told_to_all_who_wait_and_not_kept() -> None:
    database = Database({KEY[0]: ANN})
    database.away = True
    load = Lookups(database.ask)
    told = await asyncio.gather(load(KEY), load(KEY), return_exceptions=True)
    assert [type(one) for one in told] == [Unavailable, Unavailable]
    database.away = False
    assert await load(KEY) is ANN
    assert len(database.asked) == 2


async def test_who_leaves_does_not_take_the_answer_from_the_others() -> None:
    database = Database({KEY[0]: ANN})
    database.lets.clear()
    load = Lookups(database.ask)
    leaves, stays = asyncio.create_task(load(KEY)), asyncio.create_task(load(KEY))
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.sleep(0)
    database.lets.set()
    assert await stays is ANN
    assert leaves.cancelled()
    assert len(database.asked) == 1


async def test_a_million_keys_of_nobody_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "MOST_KEPT", 100)
    load = Lookups(Database().ask)
    for number in range(1000):
        await load([b"%d" % number])
    assert len(load._kept) <= 100
