"""Accounts that sign in, as a request meets them: an ended token is renewed, a refused one once, and a dead account gives way."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from msgspec import structs

from providers.adapters.openai import OpenAI
from providers.failures import CredentialRefused, NotRenewed, OptionRefused
from providers.oauth import Access, Lease
from providers.secrets import SecretText
from proxy.catalog import Alias, Upstream
from proxy.stores.renewals import Renewals
from tests.proxy.test_gateway import CHAT, House, fails, says, sse, stream, whole


class Vendor:
    """Its upstream takes `good` tokens alone; renewals give `token-<account>-<generation>`, which is good unless `spoiled`."""

    def __init__(self) -> None:
        self.good: set[str] = set()
        self.spoiled = False
        self.renewals: list[tuple[int, int]] = []
        self.refusals: list[tuple[int, int]] = []
        self.problem: Exception | None = None
        self.release: asyncio.Event | None = None
        self.life: float | None = 3600
        self.renewed_by_us = True  # else it was somebody else, an hour ago
        self.sign_in = 1  # another one: somebody has signed the account in meanwhile
        self.origin = ""  # that the token is for; "": not said

    async def renew(self, credential_id: int, generation: int) -> Access:
        self.renewals.append((credential_id, generation))
        if self.release is not None:
            await self.release.wait()
        if self.problem is not None:
            raise self.problem
        token = f"token-{credential_id}-{generation + 1}"
        if not self.spoiled:
            self.good = {token}
        expires = time.monotonic() + self.life if self.life else None
        renewed_at = time.monotonic() - (0 if self.renewed_by_us else 3600)
        return Access(SecretText(token), Lease(generation + 1, expires, self.sign_in, renewed_at), {"region": "eu"}, self.origin)

    async def refuse(self, credential_id: int, generation: int) -> None:
        self.refusals.append((credential_id, generation))

    def answer(self, request: httpx.Request) -> httpx.Response:
        token = request.headers["authorization"].removeprefix("Bearer ")
        if token not in self.good and not token.startswith("secret-"):
            return fails(401)
        if json.loads(request.content).get("stream"):
            return stream(*sse(says("hello"), {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}))
        return whole()


@pytest.fixture
def vendor() -> Vendor:
    return Vendor()


@pytest.fixture
def house(tmp_path, vendor: Vendor) -> Callable[..., House]:
    """A gateway over a pool: the first account signs in, with a token of generation 1 that ends in `left` seconds."""

    def make(*, pool: int = 1, left: float | None = 3600, wait_seconds: float = 5, **more: Any) -> House:
        house = House(tmp_path, lambda request: vendor.answer(request), pool=pool, **more)
        expires = None if left is None else time.monotonic() + left
        first, *others = house.catalog.upstreams
        first = replace(first, secret=SecretText("token-1-1"), lease=Lease(1, expires, 1), priority=1)
        house.catalog = house.gateway.current.catalog = replace(house.catalog, upstreams=(first, *others))
        renewals = Renewals(vendor.renew, vendor.refuse, wait_seconds=wait_seconds)
        house.gateway = replace(house.gateway, renewals=renewals)
        return house

    return make


def tokens_of(house: House) -> list[str]:
    return [request.headers["authorization"].removeprefix("Bearer ") for request in house.sent]


async def test_a_token_that_is_good_is_used_as_it_is(house, vendor):
    vendor.good = {"token-1-1"}
    one = house()
    assert (await one.call()).status == 200
    assert (vendor.renewals, tokens_of(one)) == ([], ["token-1-1"])


async def test_a_token_that_has_ended_is_renewed_before_it_is_used(house, vendor):
    one = house(left=-1)
    assert (await one.call()).status == 200
    assert (vendor.renewals, tokens_of(one)) == ([(1, 1)], ["token-1-2"])
    assert (await one.call()).status == 200
    assert (len(vendor.renewals), tokens_of(one)[-1]) == (1, "token-1-2"), "until the catalog has the new one, memory does"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_refused_token_is_renewed_once_and_the_same_account_serves(house, vendor, streamed):
    one = house(pool=2)
    reply = await one.call(CHAT | {"stream": streamed})
    assert reply.status == 200
    assert (vendor.renewals, tokens_of(one)) == ([(1, 1)], ["token-1-1", "token-1-2"])
    row = one.settled()
    assert (row.status, row.credential, row.attempts) == (200, 1, 2)
    assert vendor.refusals == []


async def test_refused_again_the_account_waits_for_a_person_and_the_next_one_serves_this_very_request(house, vendor):
    vendor.spoiled = True
    one = house(pool=2)
    reply = await one.call()
    assert reply.status == 200
    assert tokens_of(one) == ["token-1-1", "token-1-2", "secret-1"]
    assert vendor.refusals == [(1, 2)]
    assert one.settled().credential == 2

    assert (await one.call()).status == 200
    assert tokens_of(one)[3:] == ["secret-1"], "it is not called, nor renewed, again"
    assert len(vendor.renewals) == 1


async def test_a_refused_token_that_somebody_else_renewed_earlier_proves_nothing(house, vendor):
    """All tokens of an account may be ended at once: only one that was renewed since then shows that no renewal helps."""
    vendor.spoiled, vendor.renewed_by_us = True, False
    one = house(pool=2)
    vendor.good = {"token-1-3"}
    assert (await one.call()).status == 200
    assert tokens_of(one) == ["token-1-1", "token-1-2", "token-1-3"]
    assert vendor.refusals == []

    vendor.good = set()
    one = house(pool=2)
    assert (await one.call()).status == 200
    assert tokens_of(one) == ["token-1-1", "token-1-2", "token-1-3", "secret-1"], "nor is that done for ever"
    assert vendor.refusals == [(1, 3)]


async def test_a_token_that_was_renewed_for_this_request_and_is_refused_is_not_renewed_again(house, vendor):
    vendor.spoiled = True
    one = house(pool=2, left=-1)
    assert (await one.call()).status == 200
    assert (tokens_of(one), vendor.renewals) == (["token-1-2", "secret-1"], [(1, 1)])
    assert vendor.refusals == [(1, 2)]


async def test_a_dead_sign_in_gives_way_within_the_request_and_alone_is_502(house, vendor):
    vendor.problem = CredentialRefused("It has to be signed in again.")
    one = house(pool=2, left=-1)
    assert (await one.call()).status == 200
    assert tokens_of(one) == ["secret-1"]

    one.catalog = one.gateway.current.catalog = replace(one.catalog, upstreams=one.catalog.upstreams[:1])
    for _ in range(3):
        reply = await one.call()
        assert (reply.status, reply.error()["code"]) == (502, "upstream_auth_failed")
    assert len(vendor.renewals) == 1, "a dead sign-in is asked about once"
    assert one.settled().output == 0


async def test_a_renewal_that_fails_for_now_gives_way_and_alone_is_503(house, vendor):
    vendor.problem = NotRenewed("Not just now.", retry_after_seconds=3)
    one = house(pool=2, left=-1)
    assert (await one.call()).status == 200
    assert tokens_of(one) == ["secret-1"]

    one.catalog = one.gateway.current.catalog = replace(one.catalog, upstreams=one.catalog.upstreams[:1])
    reply = await one.call()
    assert (reply.status, reply.error()["code"], reply.headers["retry-after"]) == (503, "upstream_auth_pending", "3")


async def test_a_renewal_is_waited_for_only_so_long_and_then_the_next_one_serves(house, vendor):
    vendor.release = asyncio.Event()
    one = house(pool=2, left=-1, wait_seconds=0.05)
    assert (await one.call()).status == 200
    assert tokens_of(one) == ["secret-1"]

    vendor.release.set()
    await asyncio.sleep(0.01)
    assert (await one.call()).status == 200
    assert tokens_of(one)[-1] == "secret-1", "it rests for a moment"
    one.gateway.health.clear(1)
    assert (await one.call()).status == 200
    assert (tokens_of(one)[-1], len(vendor.renewals)) == ("token-1-2", 1)


async def test_alone_a_renewal_that_takes_too_long_is_503(house, vendor):
    vendor.release = asyncio.Event()
    one = house(left=-1, wait_seconds=0.05)
    reply = await one.call()
    assert (reply.status, reply.error()["code"]) == (503, "upstream_auth_pending")
    assert "retry-after" in reply.headers
    vendor.release.set()


@pytest.mark.parametrize("left", [-1, 3600])
async def test_twenty_requests_at_once_cause_one_renewal(house, vendor, left):
    vendor.release = asyncio.Event()
    one = house(left=left)
    calls = [asyncio.create_task(one.call()) for _ in range(20)]
    await asyncio.sleep(0.05)
    vendor.release.set()
    replies = await asyncio.gather(*calls)
    assert [reply.status for reply in replies] == [200] * 20
    assert vendor.renewals == [(1, 1)]


async def test_a_client_that_leaves_does_not_end_the_renewal_for_the_others(house, vendor):
    vendor.release = asyncio.Event()
    one = house(left=-1)
    first = asyncio.create_task(one.call())
    second = asyncio.create_task(one.call())
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    vendor.release.set()
    assert (await second).status == 200
    assert len(vendor.renewals) == 1


@pytest.mark.parametrize("left", [-1, 3600])
async def test_what_was_learned_of_an_account_is_forgotten_when_its_new_token_is_of_another_sign_in(house, vendor, left):
    one = house(left=left)
    one.gateway.learned[1] = {"project": "theirs"}
    await one.call()
    assert one.gateway.learned[1] == {"project": "theirs"}, "a renewal is of the same account"

    vendor.good, vendor.sign_in = set(), 2
    one = house(left=left)
    one.gateway.learned[1] = {"project": "theirs"}
    assert (await one.call()).status == 200
    assert one.gateway.learned[1] == {}


def test_an_account_may_be_another_after_a_sign_in_a_new_secret_or_a_move_and_not_after_a_renewal():
    key = Upstream(id=1, kind="openai", label="a", prefix="a", base_url="https://a.example", secret=SecretText("one"))
    leased = replace(key, lease=Lease(1, None, 1))
    assert leased.is_as_it_was(leased)
    assert replace(leased, secret=SecretText("two"), lease=Lease(2, 5.0, 1)).is_as_it_was(leased)
    assert replace(key, label="b", weight=3).is_as_it_was(key)
    assert not replace(leased, lease=Lease(3, None, 3)).is_as_it_was(leased)
    assert not replace(key, secret=SecretText("two")).is_as_it_was(key)
    assert not replace(key, base_url="https://b.example").is_as_it_was(key)
    assert not key.is_as_it_was(leased)
    assert not leased.is_as_it_was(key)


async def test_a_newer_token_of_the_catalog_goes_before_what_was_remembered(house, vendor):
    one = house(left=-1)
    await one.call()
    newer = replace(one.catalog.upstreams[0], secret=SecretText("token-1-9"), lease=Lease(9, time.monotonic() + 60))
    one.gateway.current.catalog = replace(one.catalog, upstreams=(newer,))
    vendor.good = {"token-1-9"}
    assert (await one.call()).status == 200
    assert tokens_of(one)[-1] == "token-1-9"


async def test_once_content_has_gone_out_nothing_is_sent_again(house, vendor, monkeypatch):
    vendor.good = {"token-1-1"}
    reader = OpenAI.reader

    def refuses_later(self, ask, target):
        found = reader(self, ask, target)
        found.end = lambda: (_ for _ in ()).throw(CredentialRefused("in the middle"))
        return found

    monkeypatch.setattr(OpenAI, "reader", refuses_later)
    one = house()
    vendor.answer = lambda request: stream(*sse(says("hello"), done=False))
    reply = await one.call(CHAT | {"stream": True})
    assert b"hello" in reply.body
    assert (len(one.sent), vendor.renewals) == (1, [])


async def test_a_plain_secret_that_is_refused_is_never_renewed(house, vendor):
    one = house()
    plain = replace(one.catalog.upstreams[0], lease=None)
    one.gateway.current.catalog = replace(one.catalog, upstreams=(plain,))
    assert (await one.call()).status == 502
    assert (vendor.renewals, vendor.refusals) == ([], [])


async def test_a_callers_own_key_is_not_renewed(house, vendor):
    one = house(left=-1)
    one.gateway.current.catalog = replace(one.catalog, upstreams=(replace(one.catalog.upstreams[0], pass_through=True),))
    reply = await one.call(x_upstream_key="their-own-key")
    assert reply.status == 401
    assert (vendor.renewals, tokens_of(one)) == ([], ["their-own-key"])


async def test_an_option_that_is_left_out_goes_out_again_with_the_renewed_token(house, vendor, speak):
    class Picky(OpenAI):
        def request(self, ask, target):
            body = {name: value for name, value in ask.body.items() if name not in ask.left_out}
            return super().request(structs.replace(ask, body=body), target)

        def failure(self, target, status, headers, body):
            return OptionRefused("Not this.", option="thinks") if status == 400 else super().failure(target, status, headers, body)

    speak("openai", Picky())
    answer = vendor.answer
    vendor.answer = lambda request: fails(400) if "thinks" in json.loads(request.content) else answer(request)
    one = house(left=-1)
    assert (await one.call(CHAT | {"thinks": "yes"})).status == 200
    assert (tokens_of(one), len(vendor.renewals)) == (["token-1-2"] * 2, 1)


async def test_the_renewed_settings_reach_the_adapter(house, vendor, monkeypatch):
    seen = []
    headers = OpenAI.headers
    monkeypatch.setattr(OpenAI, "headers", lambda self, target: seen.append(dict(target.settings)) or headers(self, target))
    await house(left=-1).call()
    assert seen[-1] == {"region": "eu"}


async def test_where_only_accounts_are_left_that_wait_for_a_person_the_answer_says_so(house, vendor):
    one = house()
    waiting = replace(one.catalog.upstreams[0], models=frozenset({"bare"}))
    catalog = replace(one.catalog, upstreams=(), signed_out=(waiting,), aliases=(Alias("fast", ("a/gpt",)),))
    one.gateway.current.catalog = catalog
    for model in ("a/gpt", "bare", "fast"):
        reply = await one.call(CHAT | {"model": model})
        assert (reply.status, reply.error()["code"]) == (502, "upstream_auth_failed"), model
    assert (await one.call(CHAT | {"model": "b/gpt"})).status == 404
    one.gateway.current.catalog = replace(catalog, signed_out=(replace(waiting, organization_id=99),))
    assert (await one.call()).status == 404, "another organization's account is nobody's business"


async def test_an_alias_goes_on_to_the_next_model_when_the_first_waits_for_a_person(house, vendor):
    one = house()
    waiting = one.catalog.upstreams[0]
    other = replace(waiting, id=2, prefix="b", secret=SecretText("secret-b"), lease=None)
    one.gateway.current.catalog = replace(
        one.catalog, upstreams=(other,), signed_out=(waiting,), aliases=(Alias("fast", ("a/gpt", "b/gpt")),)
    )
    assert (await one.call(CHAT | {"model": "fast"})).status == 200
    assert tokens_of(one) == ["secret-b"]


@pytest.mark.parametrize("left", [3600, -1])
async def test_the_token_of_an_account_that_was_moved_meanwhile_does_not_go_to_its_old_address(house, vendor, left: int):
    one = house(left=left)
    vendor.origin, vendor.sign_in = "https://moved.example:443", 2
    for _ in range(2):
        assert (await one.call()).status == 503
    assert "token-1-2" not in tokens_of(one)
