"""The trip as stories: bytes in; bytes, the ledger and the holds out. The world is replaced at one seam, the transport."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from msgspec import structs

from accounts.principal import Limit, Principal, digest, mint
from providers.adapter import Target
from providers.adapters.openai import OpenAI
from providers.clock import Timeouts
from providers.failures import OptionRefused, UpstreamServer
from providers.over_httpx import OverHttpx
from providers.price import Price, PriceBook
from providers.secrets import SecretText
from proxy import journal as journals
from proxy.catalog import Catalog, Current, Upstream
from proxy.gateway import ENDPOINTS, Gateway
from proxy.http import Site
from proxy.journal import Admitted, Journal, JournalFull, Settled
from proxy.refusals import Refusals
from proxy.stores.health import Health
from proxy.stores.memory import MemoryLimits

KEY = mint()[0]
PEPPER = b"p" * 32
CHAT = {"model": "a/gpt", "messages": [{"role": "user", "content": "hello"}]}
USAGE = {"prompt_tokens": 20, "completion_tokens": 6, "total_tokens": 26, "prompt_tokens_details": {"cached_tokens": 4}}
ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}}],
    "usage": USAGE,
}


def sse(*chunks: Any, done: bool = True) -> list[bytes]:
    return [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks] + ([b"data: [DONE]\n\n"] if done else [])


def says(text: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": "x",
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    } | fields


class Chunks(httpx.AsyncByteStream):
    def __init__(self, chunks: list[bytes], *, then: Callable[[], Any] | None = None) -> None:
        self.chunks, self.then, self.closed = chunks, then, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk
            await asyncio.sleep(0)
        if self.then is not None:
            await self.then()

    async def aclose(self) -> None:
        self.closed = True


class House:
    """A gateway with its parts in plain sight."""

    def __init__(
        self,
        tmp_path,
        handler,
        *,
        pool: int = 1,
        limits: tuple[Limit, ...] = (),
        timeouts: Timeouts | None = None,
        first_address: str = "https://up/v1",
        sticky: str = "",
        **principal: Any,
    ):
        self.journal = Journal(tmp_path)
        self.limits = MemoryLimits()
        self.sent: list[httpx.Request] = []
        self.refusals = Refusals()

        async def answer(request: httpx.Request) -> httpx.Response:
            self.sent.append(request)
            found = handler(request)
            return await found if asyncio.iscoroutine(found) else found

        caller = Principal(key_id=1, organization_id=1, user_id=1, limits=limits, **principal)
        self.catalog = Catalog(
            peppers=(PEPPER,),
            principals={digest(PEPPER, KEY): caller},
            upstreams=tuple(
                Upstream(number, "openai", f"u{number - 1}", "a", address, SecretText(f"secret-{number - 1}"), sticky=sticky)
                for number, address in enumerate((first_address, *["https://up/v1"] * (pool - 1)), 1)
            ),
            prices=PriceBook([Price(1, "a/gpt", 0, input=1_000_000, output=2_000_000, cache_read=500_000)]),
        )

        async def load(digests):
            return None

        self.gateway = Gateway(
            current=Current(self.catalog),
            load=load,
            limits=self.limits,
            health=Health(),
            journal=lambda: self.journal,
            transport=OverHttpx(httpx.MockTransport(answer)),
            site=Site(),
            timeouts=timeouts or Timeouts(),
            refusals=self.refusals,
        )

    async def call(
        self,
        body: Any = None,
        *,
        path: str = "/v1/chat/completions",
        method: str = "POST",
        key: str | None = KEY,
        leave_after: int | None = None,
        **headers: str,
    ) -> Reply:
        raw = body if isinstance(body, bytes) else json.dumps(CHAT if body is None else body).encode()
        reply = self.reply = Reply(leave_after)
        head = [(b"content-type", b"application/json")] + ([(b"authorization", f"Bearer {key}".encode())] if key else [])
        head += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": head, "client": ("127.0.0.1", 1)}
        messages = [{"type": "http.request", "body": raw, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop(0)
            await reply.left.wait()
            return {"type": "http.disconnect"}

        await self.gateway(scope, receive, reply.send)
        return reply

    def records(self) -> list[Admitted | Settled]:
        return [record for segment in journals.segments(self.journal.folder) for record, _ in journals.read(segment)]

    def settled(self) -> Settled:
        """The one settlement; every admission must have exactly one, and no hold may be left."""
        admitted = [record.request_id for record in self.records() if isinstance(record, Admitted)]
        settled = [record for record in self.records() if isinstance(record, Settled)]
        assert admitted == [record.request_id for record in settled]
        assert self.limits.open_holds() == 0
        return settled[-1]


class Reply:
    def __init__(self, leave_after: int | None) -> None:
        self.status, self.headers, self.body, self.finished, self.left = 0, {}, b"", False, asyncio.Event()
        self._leave_after, self._parts = leave_after, 0

    async def send(self, message: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], {name.decode(): value.decode() for name, value in message["headers"]}
            return
        self.body += message.get("body", b"")
        self.finished = not message.get("more_body", False)
        self._parts += 1
        if self._parts == self._leave_after:
            self.left.set()
            await asyncio.sleep(0.05)

    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


def whole(value: Any = ANSWER, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, headers={"content-type": "application/json"} | headers, content=json.dumps(value).encode())


def stream(*chunks: bytes, then: Callable[[], Any] | None = None) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Chunks(list(chunks), then=then))


def fails(status: int, code: str = "oops", **headers: str) -> httpx.Response:
    return whole({"error": {"message": "It went wrong.", "code": code}}, status, **headers)


async def test_an_answer_goes_back_as_it_came_and_is_metered_once(tmp_path):
    house = House(tmp_path, lambda request: whole())
    reply = await house.call(CHAT | {"temperature": 0, "a_field_of_tomorrow": {"x": 1}})

    assert (reply.status, json.loads(reply.body)) == (200, ANSWER)
    assert json.loads(house.sent[0].content) == CHAT | {"model": "gpt", "temperature": 0, "a_field_of_tomorrow": {"x": 1}}
    assert house.sent[0].headers["authorization"] == "Bearer secret-0"
    row = house.settled()
    assert (row.fresh_input, row.cache_read, row.output, row.usage_source) == (16, 4, 6, "reported")
    assert row.cost == 16 * 1 + 4 // 2 + 6 * 2
    assert row.request_id == reply.headers["x-request-id"] == house.sent[0].headers["x-request-id"]


async def test_a_stream_goes_back_untouched_but_for_the_usage_that_only_we_asked_for(tmp_path):
    events = sse(says("a", odd={"kept": True}), says("b"), {"choices": [], "usage": USAGE})
    house = House(tmp_path, lambda request: stream(*events))
    reply = await house.call(CHAT | {"stream": True})

    assert json.loads(house.sent[0].content)["stream_options"] == {"include_usage": True}
    assert reply.body == events[0] + events[1] + events[3]
    assert house.settled().output == 6


async def test_a_client_that_asks_for_usage_gets_it(tmp_path):
    events = sse(says("a"), {"choices": [], "usage": USAGE})
    house = House(tmp_path, lambda request: stream(*events))
    reply = await house.call(CHAT | {"stream": True, "stream_options": {"include_usage": True}})
    assert reply.body == b"".join(events)


async def test_an_upstream_that_refuses_the_usage_option_is_remembered_and_metered_by_estimate(tmp_path):
    def handler(request):
        if "stream_options" in json.loads(request.content):
            return whole({"error": {"message": "Unknown field stream_options."}}, 400)
        return stream(*sse(says("one"), says("two")))

    house = House(tmp_path, handler)
    assert (await house.call(CHAT | {"stream": True})).status == 200
    assert (house.settled().usage_source, house.settled().output) == ("estimated", 2)
    assert (await house.call(CHAT | {"stream": True})).status == 200
    assert len(house.sent) == 3  # the second call knows


async def test_a_client_that_leaves_is_still_metered_once_and_the_upstream_is_closed(tmp_path):
    body = Chunks(sse(says("one"), says("two"), says("three"), done=False), then=asyncio.Event().wait)
    house = House(tmp_path, lambda request: httpx.Response(200, stream=body))
    await house.call(CHAT | {"stream": True}, leave_after=2)

    row = house.settled()
    assert (row.status, row.error, row.usage_source) == (499, "client_closed", "estimated")
    assert 1 <= row.output <= 3
    assert row.fresh_input > 0
    assert body.closed


async def test_a_client_that_leaves_before_the_answer_is_metered_too(tmp_path):
    async def never(request):
        house.reply.left.set()
        await asyncio.Event().wait()

    house = House(tmp_path, lambda request: never(request))
    await house.call()
    assert (house.settled().status, house.settled().usage_source, house.reply.status) == (499, "estimated", 0)


async def test_a_call_that_the_server_cuts_at_its_own_end_is_metered(tmp_path):
    async def never(request):
        await asyncio.Event().wait()

    house = House(tmp_path, lambda request: never(request))
    task = asyncio.create_task(house.call())
    while not house.sent:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (house.settled().status, house.settled().error) == (503, "shutdown")


@pytest.mark.parametrize("status", [401, 402, 403, 408, 429, 500, 502, 503, 529])
async def test_another_credential_is_tried_when_the_first_cannot_serve(tmp_path, status):
    house = House(tmp_path, lambda request: fails(status) if "secret-0" in request.headers["authorization"] else whole(), pool=2)
    for _ in range(2):
        assert (await house.call()).status == 200
    row = house.settled()
    assert (row.credential, row.cost) == (2, 30)


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
async def test_a_clients_own_mistake_is_tried_nowhere_else(tmp_path, status):
    house = House(tmp_path, lambda request: fails(status), pool=2)
    reply = await house.call()
    assert (reply.status, len(house.sent)) == (400 if status == 422 else status, 1)
    assert (house.settled().cost, house.settled().status) == (0, reply.status)


async def test_a_refused_credential_of_ours_is_502_and_its_name_is_not_told(tmp_path):
    house = House(tmp_path, lambda request: whole({"error": {"message": "Incorrect API key provided: secret-0."}}, 401))
    reply = await house.call()
    assert (reply.status, reply.error()["code"]) == (502, "upstream_auth_failed")
    assert "secret-0" not in reply.body.decode()


async def test_the_callers_own_key_refused_is_401(tmp_path):
    house = House(tmp_path, lambda request: fails(401))
    house.gateway.current.catalog = replace(
        house.catalog, upstreams=(Upstream(1, "openai", "u", "a", "https://up/v1", SecretText(""), pass_through=True),)
    )
    reply = await house.call(x_upstream_key="sk-mine-mine-mine")
    assert reply.status == 401
    assert house.sent[0].headers["authorization"] == "Bearer sk-mine-mine-mine"


async def test_an_error_before_content_goes_to_another_credential_and_nobody_notices(tmp_path):
    broken = sse({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, {"error": {"message": "boom"}}, done=False)
    good = sse(says("fine"))
    house = House(tmp_path, lambda request: stream(*(broken if "secret-0" in request.headers["authorization"] else good)), pool=2)
    for _ in range(2):
        reply = await house.call(CHAT | {"stream": True})
        assert reply.body == b"".join(good)


async def test_after_content_a_break_is_an_error_event_without_done(tmp_path):
    house = House(tmp_path, lambda request: stream(*sse(says("partial"), done=False)), pool=2)
    reply = await house.call(CHAT | {"stream": True})
    first, second, end = reply.body.split(b"\n\n")
    assert (b"partial" in first, json.loads(second[6:])["error"]["code"], end) == (True, "upstream_broke", b"")
    assert len(house.sent) == 1
    assert (house.settled().status, house.settled().error, house.settled().usage_source) == (502, "upstream_broke", "estimated")


async def test_silence_is_bridged_by_comments_and_ended_by_the_clock(tmp_path):
    quick = Timeouts(0.01, 0.02, 0.2, 2, 0.3, 0.05)
    house = House(tmp_path, lambda request: stream(*sse(says("one"), done=False), then=asyncio.Event().wait), timeouts=quick)
    reply = await house.call(CHAT | {"stream": True})
    assert reply.body.count(b": keep-alive") >= 3
    assert json.loads(reply.body.split(b"data: ")[-1])["error"]["code"] == "upstream_timeout"
    assert house.settled().status == 502


async def test_a_stream_that_is_whole_is_no_failure_when_its_upstream_does_not_end_in_time(tmp_path):
    quick = Timeouts(0.01, 0.02, 0.1, 0.4, 0.3, 0.05)  # all of it in less than what is waited for the upstream's own end
    house = House(tmp_path, lambda request: stream(*sse(says("all of it")), then=asyncio.Event().wait), timeouts=quick)
    reply = await house.call(CHAT | {"stream": True})
    assert reply.body.endswith(b"data: [DONE]\n\n")
    assert (house.settled().status, house.settled().error) == (200, "")


async def test_an_upstream_that_never_answers_is_504(tmp_path):
    async def never(request):
        await asyncio.Event().wait()

    house = House(tmp_path, lambda request: never(request), timeouts=Timeouts(0.01, 0.02, 0.1, 2, 0.3, 0.05))
    reply = await house.call()
    assert (reply.status, reply.error()["code"]) == (504, "upstream_timeout")
    assert house.settled().usage_source == "estimated"  # it had the request, and may bill it


@pytest.mark.parametrize("body", [b"<html>gateway</html>", b"", b"5", b"[]", b'"text"', b'{"choices": [', b"[" * 5000])
async def test_rubbish_with_status_200_is_502_and_is_not_shown(tmp_path, body):
    house = House(tmp_path, lambda request: httpx.Response(200, content=body))
    reply = await house.call()
    assert (reply.status, reply.error()["code"]) == (502, "upstream_bad_response")
    assert b"html" not in reply.body


async def test_usage_in_a_shape_nobody_knows_does_not_cost_the_client_its_answer(tmp_path):
    odd = ANSWER | {"usage": {"prompt_tokens": "many"}}
    house = House(tmp_path, lambda request: whole(odd))
    reply = await house.call()
    assert (reply.status, json.loads(reply.body)) == (200, odd)
    assert house.settled().usage_source == "estimated"


async def test_an_absurd_count_still_fits_into_a_row(tmp_path):
    house = House(tmp_path, lambda request: whole(ANSWER | {"usage": {"prompt_tokens": 10**40, "completion_tokens": -5}}))
    await house.call()
    assert 0 <= house.settled().fresh_input < 2**60


async def test_what_is_refused_before_admission_leaves_no_row_and_no_hold(tmp_path):
    house = House(tmp_path, lambda request: whole(), limits=(Limit("key:1", "rpm", 1),))
    assert (await house.call(key=None)).status == 401
    assert (await house.call({"model": "a/gpt"})).status == 400
    assert (await house.call(CHAT | {"model": "nope"})).status == 404
    assert house.records() == []
    assert (await house.call()).status == 200
    refused = await house.call()
    assert (refused.status, int(refused.headers["retry-after"])) == (429, 60)
    assert len(house.sent) == 1
    assert {(key, code): count for (_, key, _, code), count in house.refusals.take().items()} == {
        (0, "invalid_api_key"): 1,
        (1, "model_not_found"): 1,
        (1, "rate_limit_exceeded"): 1,
    }


async def test_a_refused_call_does_not_use_up_the_trial_of_an_ejected_account(tmp_path):
    """Else those who are over their limits keep it out: each refusal would cost it half a minute."""
    house = House(tmp_path, lambda request: whole(), pool=2, limits=(Limit("key:1", "concurrency", 1),))
    health = Health(ejection_seconds=0)
    house.gateway = replace(house.gateway, health=health)
    for _ in range(5):
        health.failed(Target("openai", 1, "u0", "https://up/v1", SecretText("s"), "gpt", "a/gpt"), UpstreamServer("It fell over."), [1, 2])
    house.limits._open["key:1"] = 1
    assert [(await house.call()).status for _ in range(3)] == [429, 429, 429]
    del house.limits._open["key:1"]
    assert (await house.call()).status == 200
    assert [request.headers["authorization"] for request in house.sent] == ["Bearer secret-0"]


async def test_no_record_no_call(tmp_path, monkeypatch):
    house = House(tmp_path, lambda request: whole(), limits=(Limit("key:1", "concurrency", 1),))

    def full(record):
        raise JournalFull("full")

    monkeypatch.setattr(house.journal, "admitted", full)
    reply = await house.call()
    assert (reply.status, reply.error()["code"], house.sent, house.limits.open_holds()) == (503, "journal_full", [], 0)


async def test_a_bug_of_ours_is_a_500_in_the_clients_dialect_and_is_metered(tmp_path, caplog):
    def bug(request):
        raise ZeroDivisionError

    house = House(tmp_path, bug)
    reply = await house.call()
    assert (reply.status, reply.error()["code"]) == (500, "internal_error")
    assert house.settled().error == "internal_error"
    assert "ZeroDivisionError" in caplog.text


async def test_a09_a_model_without_a_price_is_refused_under_a_hard_budget_and_counted_under_a_soft_one(tmp_path):
    for number, enforce in enumerate((True, False)):
        limit = Limit("key:1", "money", 10**9, window="total", enforce=enforce)
        house = House(tmp_path / str(number), lambda request: whole(), limits=(limit,))
        house.limits.track(house.limits.untracked([limit]))
        reply = await house.call(CHAT | {"model": "a/free-of-a-price"})
        house.gateway.current.catalog = replace(house.catalog, prices=PriceBook([]))
        unpriced = await house.call()
        assert (reply.status, unpriced.status) == ((403, 403) if enforce else (200, 200))
        if enforce:
            assert (unpriced.error()["code"], house.sent, house.records()) == ("model_unpriced", [], [])
        else:
            assert (house.settled().cost, house.settled().usage_source) == (None, "reported")  # unpriced, never 0


async def test_a09_without_a_ceiling_one_request_exceeds_its_budget_and_no_second(tmp_path):
    answer = ANSWER | {"usage": USAGE | {"completion_tokens": 50_000, "total_tokens": 50_020}}
    limit = Limit("key:1", "money", 10_000, window="total")
    house = House(tmp_path, lambda request: whole(answer), limits=(limit,))
    house.limits.track(house.limits.untracked([limit]))
    seen = [(await house.call()).status for _ in range(3)]
    assert seen == [200, 429, 429]
    assert house.settled().cost == 16 + 2 + 100_000
    assert len(house.sent) == 1


async def test_a09_of_many_at_once_without_a_ceiling_one_alone_exceeds_the_budget(tmp_path):
    """Each may come to 262 000 micro-dollars more than what one of them holds: those beside another hold that, too."""
    answer = ANSWER | {"usage": USAGE | {"completion_tokens": 130_000, "total_tokens": 130_020}}
    together = asyncio.Event()

    async def slowly():
        await together.wait()
        return whole(answer)

    limit = Limit("key:1", "money", 600_000, window="total")
    house = House(tmp_path, lambda request: slowly(), limits=(limit,))
    house.limits.track(house.limits.untracked([limit]))
    calls = [asyncio.create_task(house.call()) for _ in range(40)]
    while len(house.sent) + sum(call.done() for call in calls) < 40:
        await asyncio.sleep(0)
    together.set()
    replies = await asyncio.gather(*calls)

    assert Counter(reply.status for reply in replies) == {200: 3, 429: 37}
    refused = next(reply for reply in replies if reply.status == 429)
    assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("1", "true")
    assert "Set max_tokens" in refused.error()["message"]
    one = house.settled().cost
    assert one is not None
    assert house.limits.spent(limit, 0) == 3 * one <= limit.amount + one
    with_ceiling = await house.call(CHAT | {"max_tokens": 10})
    assert with_ceiling.status == 429
    assert with_ceiling.headers["x-should-retry"] == "false", "what is left will not do for it, whoever else is under way"


async def test_money_is_held_at_the_dearest_and_settled_at_the_truth(tmp_path):
    limit = Limit("key:1", "money", 2000, window="total")
    house = House(tmp_path, lambda request: whole(), limits=(limit,))
    house.limits.track(house.limits.untracked([limit]))
    refused = await house.call(CHAT | {"max_tokens": 5000})
    assert (refused.status, refused.error()["code"], refused.headers["x-should-retry"]) == (429, "insufficient_quota", "false")
    assert (await house.call(CHAT | {"max_tokens": 10})).status == 200
    assert house.limits.spent(limit, 0) == house.settled().cost == 30


@pytest.mark.parametrize("path", [path for path, endpoint in ENDPOINTS.items() if endpoint.head is not None])
async def test_every_line_of_the_table_that_calls_an_upstream_is_metered(tmp_path, path):
    """A route that could spend without a row would show here: the table is closed, and this walks all of it."""
    bodies = {"messages": [], "prompt": "p", "input": "i", "query": "q", "documents": [], "voice": "v", "model": "a/gpt"}
    house = House(tmp_path, lambda request: whole({"usage": USAGE}))
    reply = await house.call(bodies, path=path)
    assert reply.status == 200
    assert len(house.sent) == 1
    assert house.settled().endpoint == ENDPOINTS[path].name
    assert house.settled().fresh_input == 16


async def test_no_other_path_reaches_an_upstream(tmp_path):
    house = House(tmp_path, lambda request: whole())
    for path in (
        "/v1/files",
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "/v1/chat/completions/x",
        "/v1/",
        "/v1",
        "/v1/../v1/embeddings",
    ):
        assert (await house.call(path=path)).status == 404
    reply = await house.call(method="PUT")
    assert (reply.status, reply.headers["allow"]) == (405, "POST, OPTIONS")
    assert house.sent == []


async def test_what_an_upstream_does_after_its_last_event_keeps_no_client_waiting(tmp_path):
    events = sse(says("all"))
    house = House(tmp_path, lambda request: stream(*events, then=asyncio.Event().wait))
    call = asyncio.create_task(house.call(CHAT | {"stream": True}))
    while not getattr(house, "reply", None) or not house.reply.finished:
        await asyncio.sleep(0.01)
    assert house.reply.body == b"".join(events)
    await call
    assert (house.settled().status, house.settled().error) == (200, "")


async def test_a_name_longer_than_any_model_is_refused_before_it_is_written_down(tmp_path):
    house = House(tmp_path, lambda request: whole())
    reply = await house.call(CHAT | {"model": "a/" + "x" * 600_000})
    assert (reply.status, reply.error()["param"], house.records()) == (400, "model", [])


async def test_a_refusal_that_only_quotes_the_client_costs_nobody_the_usage_option(tmp_path):
    """An error that names the option is no proof: it may quote the client. Only a second try that works is."""
    quoting = {"error": {"message": "Invalid role 'include_usage'."}}
    bad = CHAT | {"stream": True, "messages": [{"role": "include_usage", "content": ""}]}
    house = House(
        tmp_path,
        lambda request: (
            whole(quoting, 400)
            if b'"role":"include_usage"' in request.content
            else stream(*sse(says("a"), {"choices": [], "usage": USAGE}))
        ),
    )
    assert (await house.call(bad)).status == 400
    assert (await house.call(CHAT | {"stream": True})).status == 200
    assert house.settled().usage_source == "reported"


@pytest.mark.parametrize(
    ("without", "status", "sent"), [({"thinks": "yes"}, 200, 2), ({"thinks": "yes", "stubborn": 1}, 400, 2), ({}, 200, 1)]
)
async def test_an_option_that_may_be_left_out_is_left_out_once_where_it_is_refused(tmp_path, speak, without, status, sent):
    class Picky(OpenAI):
        def request(self, ask, target):
            body = {name: value for name, value in ask.body.items() if name not in ask.left_out}
            return super().request(structs.replace(ask, body=body), target)

        def failure(self, target, status, headers, body):
            return OptionRefused("This model always thinks.", option="thinks")

    speak("openai", Picky())
    refused = {"thinks", "stubborn"}
    house = House(tmp_path, lambda request: whole({}, 400) if refused & json.loads(request.content).keys() else whole(ANSWER))

    answer = await house.call(CHAT | without)

    assert (answer.status, len(house.sent)) == (status, sent)
    assert house.settled().attempts == sent
    assert "thinks" not in json.loads(house.sent[-1].content)


async def test_each_attempt_is_kept_with_its_account_its_outcome_and_why_the_next_was_made(tmp_path):
    def answer(request):
        account = request.headers["authorization"][-1]
        if account == "0":
            return fails(503)
        if account == "1":
            return whole(
                {"error": {"message": "Unknown field stream_options."}}, 400 if "stream_options" in json.loads(request.content) else 429
            )
        return stream(*sse(says("a"), {"choices": [], "usage": USAGE}))

    house = House(tmp_path, answer, pool=3)
    reply = await house.call(CHAT | {"stream": True})

    assert reply.status == 200
    row = house.settled()
    assert (row.status, row.attempts, row.credential) == (200, 4, 3)
    assert [(one.credential, one.provider, one.error, one.status, one.then) for one in row.tried] == [
        (1, "openai", "overloaded", 503, "next"),
        (2, "openai", "invalid_request_error", 400, "without stream_options"),
        (2, "openai", "rate_limit_exceeded", 429, "next"),
    ]


async def test_calls_of_a_sticky_pool_are_counted_by_whether_their_account_served_them(tmp_path):
    house = House(tmp_path, lambda request: whole(), pool=2, sticky="user")
    served = {(await house.call(CHAT | {"user": "ann"})).status for _ in range(3)}
    assert served == {200}
    home = {request.headers["authorization"] for request in house.sent}
    assert len(home) == 1
    house.gateway.health.rest(house.settled().credential, "", 60, named=False, reason="tired")
    assert (await house.call(CHAT | {"user": "ann"})).status == 200
    assert {request.headers["authorization"] for request in house.sent} > home
    metrics = house.gateway.metrics
    assert (metrics.at_home, metrics.elsewhere) == (3, 1)
    await house.call()
    assert (metrics.at_home, metrics.elsewhere) == (3, 1), "a call that says nothing is bound to none"


async def test_an_attempt_whose_request_cannot_be_made_is_kept_as_well(tmp_path):
    house = House(tmp_path, lambda request: whole(), pool=2, first_address="https://up:0/v1")
    reply = await house.call()
    row = house.settled()
    assert (reply.status, row.attempts, row.credential) == (200, 2, 2)
    assert [(one.credential, one.error, one.status, one.then, one.duration_ms) for one in row.tried] == [
        (1, "upstream_unreachable", 0, "next", 0)
    ]
    assert row.duration_ms < 60_000


async def test_a_call_that_was_made_once_has_no_attempts_before_it(tmp_path):
    house = House(tmp_path, lambda request: fails(400))
    await house.call()
    assert (house.settled().attempts, house.settled().tried) == (1, ())


async def test_what_cannot_be_priced_uses_up_a_hard_budget_by_its_hold(tmp_path):
    limit = Limit("key:1", "money", 20_000, window="total")
    house = House(tmp_path, lambda request: whole({"created": 1, "data": [{"b64_json": "aGk="}]}), limits=(limit,))
    house.limits.track(house.limits.untracked([limit]))
    statuses = [(await house.call({"model": "a/gpt", "prompt": "a boat"}, path="/v1/images/generations")).status for _ in range(4)]
    assert statuses == [200, 200, 429, 429]
    assert (house.settled().cost, house.settled().usage_source) == (None, "missing")


async def test_speech_is_not_counted_by_the_bytes_of_its_sound(tmp_path):
    house = House(tmp_path, lambda request: httpx.Response(200, headers={"content-type": "audio/mpeg"}, content=b"\xff" * 100_000))
    reply = await house.call({"model": "a/gpt", "input": "hello", "voice": "x"}, path="/v1/audio/speech")
    assert (reply.status, reply.headers["content-type"], len(reply.body)) == (200, "audio/mpeg", 100_000)
    assert (house.settled().output, house.settled().cost) == (0, None)


async def test_every_image_of_a_stream_comes_through_and_is_counted(tmp_path):
    images = [
        {"type": "image_generation.completed", "b64_json": text, "usage": {"input_tokens": 5, "output_tokens": 7}} for text in ("aa", "bb")
    ]
    house = House(tmp_path, lambda request: stream(*sse(*images, done=False)))
    reply = await house.call({"model": "a/gpt", "prompt": "p", "n": 2, "stream": True}, path="/v1/images/generations")
    assert reply.body == b"".join(sse(*images, done=False))
    assert (house.settled().fresh_input, house.settled().output, house.settled().status) == (10, 14, 200)


async def test_the_larger_of_two_ceilings_is_held(tmp_path):
    limit = Limit("key:1", "money", 2000, window="total")
    house = House(tmp_path, lambda request: whole(), limits=(limit,))
    assert (await house.call(CHAT | {"max_completion_tokens": 1, "max_tokens": 100_000})).status == 429


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.example/b"}}]}]},
        ),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://a.example/b"}]}]}),
    ],
)
async def test_a_picture_of_few_bytes_is_held_for_as_the_dearest_there_is(tmp_path, path, body):
    for budget, status in ((48_000, 429), (49_000, 200)):  # micro-dollars; its tokens come to 48 169
        limit = Limit("key:1", "money", budget, window="total")
        house = House(tmp_path / str(budget), lambda request: whole(), limits=(limit,))
        house.limits.track(house.limits.untracked([limit]))
        ceiling = {"max_output_tokens" if path == "responses" else "max_tokens": 1}
        assert (await house.call({"model": "a/gpt", **ceiling, **body}, path=f"/v1/{path}")).status == status


async def test_a_stream_is_not_asked_of_what_has_none(tmp_path):
    house = House(tmp_path, lambda request: whole(), pool=2)
    reply = await house.call({"model": "a/gpt", "input": "x", "stream": True}, path="/v1/embeddings")
    assert (reply.status, reply.error()["param"], house.sent) == (400, "stream", [])


async def test_the_callers_own_key_is_quoted_back_to_nobody(tmp_path, caplog):
    mine = "my own upstream key 0001".replace(" ", "-")
    house = House(tmp_path, lambda request: whole({"error": {"message": f"No access for {mine}."}}, 403))
    upstream = Upstream(1, "openai", "u", "a", "https://up/v1", SecretText(""), pass_through=True)
    house.gateway.current.catalog = replace(house.catalog, upstreams=(upstream,))
    reply = await house.call(x_upstream_key=mine)
    assert reply.status == 403
    assert mine not in reply.body.decode() + caplog.text


async def test_usage_in_floats_is_usage(tmp_path):
    house = House(tmp_path, lambda request: whole(ANSWER | {"usage": {"prompt_tokens": 20.0, "completion_tokens": 6.0}}))
    await house.call()
    assert (house.settled().fresh_input, house.settled().usage_source) == (20, "reported")


@pytest.mark.parametrize("date", ["Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 01 Jan 2030 00:00:00 +99999999999999", "soon"])
async def test_an_absurd_retry_after_is_no_news(tmp_path, date):
    house = House(tmp_path, lambda request: fails(429, **{"retry-after": date}))
    assert (await house.call()).status == 429
    assert (await house.call()).status == 429
    assert len(house.sent) == 2


async def test_every_answer_to_a_limited_key_says_what_is_left(tmp_path):
    house = House(tmp_path, lambda request: whole(), limits=(Limit("key:1", "rpm", 2), Limit("key:1", "tpm", 10_000)))
    left = []
    for _ in range(3):
        reply = await house.call(CHAT | {"max_tokens": 10})
        left.append((reply.status, reply.headers.get("x-ratelimit-limit-requests"), reply.headers.get("x-ratelimit-remaining-requests")))
        assert reply.headers.get("x-ratelimit-limit-tokens") == "10000"
    assert left == [(200, "2", "1"), (200, "2", "0"), (429, "2", "0")]
    assert reply.headers.get("x-ratelimit-reset-requests") in ("1m0s", "1m", "59.9s", "60s")
    assert int(reply.headers.get("retry-after")) <= 30


async def test_an_unlimited_key_is_told_nothing_of_limits(tmp_path):
    reply = await House(tmp_path, lambda request: whole()).call()
    assert reply.status == 200
    assert reply.headers.get("x-ratelimit-limit-requests") is None


async def test_a_frozen_key_is_refused_before_anything_else_is_looked_at(tmp_path):
    house = House(tmp_path, lambda request: whole(), frozen_until=time.time() + 90, frozen_reason="audit")
    reply = await house.call()
    assert (reply.status, reply.error()["code"], reply.headers.get("retry-after")) == (403, "frozen", "90")
    assert "audit" in reply.error()["message"]
    assert house.sent == []
    assert next(iter(house.refusals.take()))[1:] == (1, 403, "frozen")
