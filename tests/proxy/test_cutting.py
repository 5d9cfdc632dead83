"""S10: calls under way end with their keys where the operator wants it (`CUT_REVOKED_CALLS`), and go on where not."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_network
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from accounts.principal import Principal
from proxy.call import Outcome
from proxy.catalog import Alias
from proxy.cutting import cut_refused
from proxy.errors import Unauthenticated, Unavailable
from proxy.leaving import Leaving
from tests.proxy.test_gateway import CHAT, USAGE, Chunks, House, says, sse
from tests.serving import Sluice, eventually
from tests.upstreams.openai import DONE, OpenAIUpstream, Step

LONG = " ".join(str(number) for number in range(300))
STREAM = CHAT | {"stream": True}
REVOKED = {"type": "invalid_request_error", "param": None, "code": "key_revoked"}


# The trip, with a key that is taken out of the catalog


class Watched(House):
    """Looks at its calls when it is told to; `without_the_key` is the catalog after the revocation."""

    def __init__(self, tmp_path, handler, **parts: Any) -> None:
        super().__init__(tmp_path, handler, **parts)
        object.__setattr__(self.gateway, "under_way", set())
        self.without_the_key = replace(self.catalog, principals={})

    async def begin(self, body: Any = CHAT, **options: Any) -> asyncio.Task[Any]:
        """A call whose upstream has it."""
        task = asyncio.create_task(self.call(body, **options))
        await until(lambda: self.sent)
        return task

    async def look(self) -> None:
        assert self.gateway.under_way is not None
        await cut_refused(self.gateway.under_way, self.gateway.current, self.gateway.load)

    async def revoke(self) -> None:
        self.gateway.current.catalog = self.without_the_key
        await self.look()

    def knows(self, **changes: Any) -> None:
        """The caller, changed, as the catalog has it from now on."""
        [(key, caller)] = self.catalog.principals.items()
        self.gateway.current.catalog = replace(self.catalog, principals={key: replace(caller, **changes)})


def endless(*chunks: bytes) -> Chunks:
    return Chunks(list(chunks), then=asyncio.Event().wait)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.002)


async def test_a_stream_ends_in_an_error_event_its_upstream_is_closed_and_it_is_settled_once(tmp_path):
    body = endless(*sse(says("one"), says("two"), done=False))
    house = Watched(tmp_path, lambda request: httpx.Response(200, stream=body))
    task = await house.begin(STREAM)
    await until(lambda: house.reply.body.count(b"data: ") == 2)
    await house.look()
    await asyncio.sleep(0)
    assert not body.closed  # the key works: nothing happens
    await house.revoke()
    reply = await task

    error = json.loads(reply.body.split(b"data: ")[-1])["error"]
    assert {name: error[name] for name in REVOKED} == REVOKED
    assert reply.finished
    assert body.closed
    row = house.settled()
    assert (row.status, row.error, row.usage_source, row.output) == (401, "key_revoked", "estimated", 2)
    assert house.gateway.under_way == set()
    assert not task.cancelled()


@pytest.mark.parametrize("stream", [False, True])
async def test_before_its_first_word_a_call_is_refused_with_401(tmp_path, stream: bool):
    async def never(request):
        await asyncio.Event().wait()

    house = Watched(tmp_path, lambda request: never(request))
    task = await house.begin(CHAT | {"stream": stream})
    await house.revoke()
    reply = await task
    assert (reply.status, reply.error()["code"]) == (401, "key_revoked")
    assert (house.settled().status, house.settled().error, house.settled().output) == (401, "key_revoked", 0)


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"expires_at": 1.0}, 401, "key_revoked"),
        ({"frozen_until": time.time() + 3600, "frozen_reason": "audit"}, 403, "frozen"),
        ({"networks": (ip_network("203.0.113.0/24"),)}, 401, "ip_not_authorized"),
    ],
)
async def test_a_key_that_expired_or_is_frozen_or_meant_for_elsewhere_ends_its_calls_too(tmp_path, changes, status: int, code: str):
    house = Watched(tmp_path, lambda request: httpx.Response(200, stream=endless(*sse(says("one"), done=False))))
    task = await house.begin(STREAM)
    await until(lambda: house.reply.body)
    house.knows(**changes)
    await house.look()
    reply = await task
    assert json.loads(reply.body.split(b"data: ")[-1])["error"]["code"] == code
    assert (house.settled().status, house.settled().error) == (status, code)


async def test_a_key_that_only_the_database_knows_yet_and_one_that_cannot_be_asked_about_go_on(tmp_path):
    body = endless(*sse(says("one"), done=False))
    house = Watched(tmp_path, lambda request: httpx.Response(200, stream=body))
    task = await house.begin(STREAM)
    await until(lambda: house.reply.body)
    [caller] = house.catalog.principals.values()

    async def knows_it(digests: Sequence[bytes]) -> Principal | None:
        return caller

    async def is_away(digests: Sequence[bytes]) -> Principal | None:
        raise Unavailable("The database is away.")

    for load in (knows_it, is_away):
        object.__setattr__(house.gateway, "load", load)
        await house.revoke()
        await asyncio.sleep(0.01)
        assert (body.closed, task.done()) == (False, False)

    async def knows_nobody(digests: Sequence[bytes]) -> Principal | None:
        return None

    object.__setattr__(house.gateway, "load", knows_nobody)
    await house.look()
    assert json.loads((await task).body.split(b"data: ")[-1])["error"]["code"] == "key_revoked"


async def test_an_answer_that_is_there_is_handed_over(tmp_path):
    """Its last event has passed, and the upstream alone is still about to close."""
    body = endless(*sse(says("one"), {"choices": [], "usage": USAGE}))
    house = Watched(tmp_path, lambda request: httpx.Response(200, stream=body))
    task = await house.begin(STREAM)
    await until(lambda: house.reply.finished)
    await house.revoke()
    assert (await task).body.endswith(DONE)
    assert (house.settled().status, house.settled().usage_source) == (200, "reported")


async def test_so_is_one_whose_client_takes_its_time():
    incoming = SimpleNamespace(task=None, line=SimpleNamespace(when_client_leaves=lambda do: None))
    leaving = Leaving(incoming, Outcome(heard=1.0), lambda: True)
    leaving.refuse(Unauthenticated("Revoked."))
    await asyncio.sleep(0)  # here it would be cancelled
    assert leaving.refused is None


async def test_a_call_that_is_read_on_for_its_bill_alone_is_read_on(tmp_path):
    goes_on = asyncio.Event()
    body = Chunks(sse(says("one"), {"choices": [], "usage": USAGE}), then=goes_on.wait)
    house = Watched(tmp_path, lambda request: httpx.Response(200, stream=body))
    house.catalog = replace(house.catalog, aliases=(Alias("fast", ("a/gpt",), ranks=(0,), weights=(1,), drain_seconds=30.0),))
    house.gateway.current.catalog = house.catalog
    task = await house.begin(CHAT | {"model": "fast", "stream": True}, leave_after=1)
    await until(lambda: house.gateway.metrics.draining == 1)
    await house.revoke()
    goes_on.set()
    await task
    assert (house.settled().status, house.settled().usage_source) == (499, "reported")


# A server


TAKE_AWAY = {
    "key": "actions.revoke_key(key)",
    "user": "key.user.is_active = False; key.user.save()",
    "organization": "key.organization.is_active = False; key.organization.save()",
    "freeze": "actions.freeze(key.organization, length=timedelta(hours=1), reason='audit')",
}
THE_KEY = """
from datetime import timedelta
from accounts import actions
from accounts.models import ApiKey
key = ApiKey.objects.get(handle={handle!r})
"""


def take_away(sluice: Sluice, key: str, what: str) -> None:
    sluice.python(THE_KEY.format(handle=key[10:20]) + TAKE_AWAY[what])


@pytest.fixture(scope="module")
def cutting(serve: Callable[..., Sluice], upstream_server: OpenAIUpstream) -> Sluice:
    sluice = serve(hurried=True, CUT_REVOKED_CALLS="1")
    sluice.add_openai(upstream_server, prefix="sim")
    sluice.set_price("sim/*", input=3, output=15)
    sluice.wait_for("sim")
    return sluice


@contextmanager
def streaming(sluice: Sluice, key: str, upstream: OpenAIUpstream, **step: Any) -> Iterator[tuple[httpx.Response, Iterator[bytes]]]:
    upstream.script(Step(delay_frame_ms=50, **step))
    body = {"model": "sim/gpt-4o", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    with httpx.stream(
        "POST", f"{sluice.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=20
    ) as answer:
        events = answer.iter_bytes()
        next(events)
        yield answer, events


@pytest.mark.parametrize(
    ("what", "status", "code"),
    [("key", 401, "key_revoked"), ("user", 401, "key_revoked"), ("organization", 401, "key_revoked"), ("freeze", 403, "frozen")],
)
def test_s10_an_open_stream_is_cut_and_everybody_elses_goes_on(
    cutting: Sluice, upstream: OpenAIUpstream, what: str, status: int, code: str
) -> None:
    mine = cutting.issue_key(email=f"{what}@example.org", organization=f"cut-{what}", concurrency=1)
    theirs = cutting.issue_key()
    with streaming(cutting, theirs, upstream, text=LONG) as (_, other), streaming(cutting, mine, upstream, text=LONG) as (answer, events):
        take_away(cutting, mine, what)
        said = b"".join(events)  # to the end of the body, which has one
        assert b'"content"' in next(other)

    last = json.loads(said.rstrip().rpartition(b"\n\n")[2].removeprefix(b"data: "))
    assert (last["error"]["code"], DONE in said) == (code, False)
    seen = upstream.calls(answer.headers["x-request-id"])[0]
    assert eventually(lambda: seen.peer_left_at, "the upstream goes on")
    row = cutting.row(answer.headers["x-request-id"])
    assert (row["status"], row["error"], row["usage_source"]) == (status, code, "estimated")
    assert row["output_tokens"] > 0
    eventually(lambda: "sluice_holds 0" in httpx.get(f"{cutting.url}/metrics").text, "something is still held")


def test_s10_without_the_setting_a_stream_runs_to_its_end(sluice: Sluice, sim: str, upstream: OpenAIUpstream) -> None:
    key = sluice.issue_key()
    with streaming(sluice, key, upstream, text=LONG[:150]) as (answer, events):
        take_away(sluice, key, "key")
        models = f"{sluice.url}/v1/models"
        eventually(lambda: httpx.get(models, headers={"authorization": f"Bearer {key}"}).status_code == 401, "the key works on")
        assert upstream.calls(answer.headers["x-request-id"])[0].finished_at is None  # it was open when its key was refused
        assert b"".join(events).endswith(DONE)
    assert sluice.row(answer.headers["x-request-id"])["status"] == 200
