"""Lists of models: asked for beside the requests, kept when they differ, and never at the cost of a secret."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

import httpx
import pytest
from django.db import connections
from django.utils import timezone

from providers import actions, listing, sweeps
from providers.actions import add_credential, refresh_all, refresh_models
from providers.egress import EgressRefused
from providers.models import Credential, Price, State, UpstreamModel, changed
from providers.over_httpx import OverHttpx
from proxy import snapshot
from tests.upstreams.kimi import USAGES

pytestmark = pytest.mark.django_db

SECRET = "opaque-upstream-secret"
Answers = Callable[[httpx.Request], httpx.Response]


class World:
    """The upstreams' side: what was asked, and how it answers."""

    def __init__(self) -> None:
        self.asked: list[httpx.Request] = []
        self.answer: Callable[[httpx.Request], httpx.Response] = lambda request: listing_of("a", "b")
        # Looked at from inside a loop, `connection` would be another one.
        self._database = connections["default"]
        self._depth = len(self._database.savepoint_ids)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        assert len(self._database.savepoint_ids) == self._depth, "a transaction is open during the call"
        self.asked.append(request)
        return self.answer(request)


def listing_of(*names: str) -> httpx.Response:
    return httpx.Response(200, json={"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(listing, "transport_over", lambda egress: OverHttpx(httpx.MockTransport(world)))
    return world


@pytest.fixture
def news() -> Iterator[list[type]]:
    heard: list[type] = []

    def hear(sender: type, **_: object) -> None:
        heard.append(sender)

    changed.connect(hear)
    yield heard
    changed.disconnect(hear)


@pytest.fixture
def mine() -> Credential:
    return add_credential("openai", "Mine", SECRET, prefix="mine", base_url="http://llm.example.org/v1")


def names(credential: Credential) -> set[str]:
    return set(credential.models.values_list("upstream_id", flat=True))


def test_it_asks_with_the_accounts_own_secret(world: World, mine: Credential):
    assert refresh_models(mine) == ""

    [request] = world.asked
    assert (request.method, str(request.url)) == ("GET", "http://llm.example.org/v1/models")
    assert request.headers["authorization"] == f"Bearer {SECRET}"
    assert names(mine) == {"a", "b"}


def test_what_is_new_comes_and_what_vanished_goes(world: World, mine: Credential, news: list[type]):
    refresh_models(mine)
    kept = mine.models.get(upstream_id="b").pk
    world.answer = lambda request: listing_of("b", "c")
    refresh_models(mine)

    assert names(mine) == {"b", "c"}
    assert mine.models.get(upstream_id="b").pk == kept
    assert news == [UpstreamModel, UpstreamModel]
    assert snapshot.load().upstreams[0].models == {"b", "c"}


def test_the_same_list_again_is_no_news(world: World, mine: Credential, news: list[type]):
    refresh_models(mine)
    news.clear()
    before = snapshot.version()
    refresh_models(mine)

    assert news == []
    assert snapshot.version() == before


def test_other_facts_of_the_same_models_are_news(world: World, mine: Credential, news: list[type]):
    refresh_models(mine)
    news.clear()
    world.answer = lambda request: httpx.Response(200, json={"data": [{"id": "a", "context_length": 8}, {"id": "b"}]})
    refresh_models(mine)

    assert news == [UpstreamModel]
    assert snapshot.load().upstreams[0].details["a"]["context_length"] == 8


def test_only_the_small_facts_of_a_model_are_kept(world: World, mine: Credential):
    detail = {
        "id": "a",
        "owned_by": "me",
        "context_length": 8,
        "long": "x" * 500,
        "nested": {"price": 1},
        **{f"f{i}": i for i in range(50)},
    }
    world.answer = lambda request: httpx.Response(200, json={"data": [detail, {"id": "x" * 300}, {"id": "new\nline"}]})
    refresh_models(mine)

    [model] = mine.models.all()
    assert model.detail["owned_by"] == "me"
    assert model.detail["context_length"] == 8
    assert "long" not in model.detail
    assert "nested" not in model.detail
    assert len(model.detail) <= 20

    detail["owned_by"] = "you"
    refresh_models(mine)
    assert mine.models.get().detail["owned_by"] == "you"


def test_a_vendors_listed_variants_are_priced(world: World):
    vendor = add_credential("openai", "Vendor", SECRET)
    world.answer = lambda request: listing_of("gpt-4o", "gpt-4o-2024-05-13", "gpt-9-unheard-of", "o3-mini-2099-12-31")
    refresh_models(vendor)
    priced = set(Price.objects.values_list("pattern", flat=True))

    assert "openai/gpt-4o-2024-05-13" in priced
    assert "openai/gpt-9-unheard-of" not in priced


def refuses(status: int, body: object = b"", **headers: str) -> Answers:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda request: httpx.Response(status, content=content, headers=headers)


def raises(problem: Exception) -> Answers:
    def answer(request: httpx.Request) -> httpx.Response:
        raise problem

    return answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refuses(401, {"error": {"message": f"bad key {SECRET}"}}), "refused the gateway's credential"),
        (refuses(400, {"error": {"message": f"bad key {SECRET} here"}}), "bad key [redacted] here"),
        (refuses(400, {"error": {"message": "x" * 495 + SECRET}}), "xxx"),
        (refuses(500, b"<html>stack trace</html>"), "answered 500"),
        (refuses(302, b"", location="http://169.254.169.254/"), "answered 302"),
        (refuses(200, b"<html>log in</html>"), "could not be read"),
        (refuses(200, {"data": {}}), "unknown shape"),
        (refuses(200, b"x" * (9 << 20)), "too large"),
        (refuses(200, gzip.compress(b" " * (9 << 20)), **{"content-encoding": "gzip"}), "too large"),
        (refuses(200, b"not gzip", **{"content-encoding": "gzip"}), "cut off"),
        (raises(httpx.ConnectError(f"no route for {SECRET}")), "could not be reached. no route for [redacted]"),
        (raises(httpx.ConnectTimeout("slow")), "in time"),
        (raises(httpx.ReadTimeout("slow")), "in time"),
        (raises(httpx.RemoteProtocolError("cut")), "cut off"),
        (raises(EgressRefused("not public: EGRESS_ALLOW=10.0.0.1/32")), "EGRESS_ALLOW=10.0.0.1/32"),
    ],
)
def test_what_went_wrong_is_kept_in_words_and_the_old_list_stays(world: World, mine: Credential, answer: Answers, words: str):
    refresh_models(mine)
    world.answer = answer

    problem = refresh_models(mine)

    assert words in problem
    assert SECRET[:6] not in problem
    assert Credential.objects.get().last_error == problem
    assert names(mine) == {"a", "b"}
    assert len(world.asked) == 2

    world.answer = lambda request: listing_of("a")
    assert refresh_models(mine) == ""
    assert Credential.objects.get().last_error == ""


def test_an_upstream_that_dawdles_for_ever_is_left(world: World, mine: Credential, monkeypatch: pytest.MonkeyPatch):
    class Dawdler(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await asyncio.Event().wait()
            raise AssertionError

    monkeypatch.setattr(listing, "transport_over", lambda egress: OverHttpx(Dawdler()))
    monkeypatch.setattr(listing, "TOTAL_SECONDS", 0.05)

    assert "in time" in refresh_models(mine)


def test_a_secret_that_no_key_opens_is_said_and_nobody_called(world: World, mine: Credential):
    other = add_credential("openai", "Other", SECRET, prefix="mine", base_url="http://llm.example.org/v1")
    Credential.objects.filter(pk=mine.pk).update(secret=bytes(other.secret))

    results = dict(refresh_all(list(Credential.objects.order_by("pk"))))

    assert "keyring" in results[mine]
    assert results[other] == ""
    assert len(world.asked) == 1


def test_a_list_that_comes_after_the_address_changed_is_not_kept(world: World, mine: Credential):
    world.answer = lambda request: listing_of("old")
    stale = Credential.objects.get(pk=mine.pk)
    actions.change_credential(mine, base_url="http://other.example.org/v1", secret=SECRET)
    refresh_models(stale)

    assert names(mine) == set()
    assert Credential.objects.get().models_refreshed_at is None


def test_one_that_was_deleted_meanwhile_is_no_error(world: World, mine: Credential):
    Credential.objects.all().delete()

    assert refresh_models(mine) == ""
    assert not UpstreamModel.objects.exists()


# What is left of an account


def plan(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=USAGES) if request.url.path.endswith("/usages") else listing_of("k3")


@pytest.fixture
def planned(world: World) -> Credential:
    """An account of a kind that tells its allowance."""
    world.answer = plan
    return add_credential("kimi", "Plan", SECRET, accept_policy=True)


def test_what_is_left_of_an_account_is_read_with_its_models(world: World, planned: Credential):
    before = timezone.now().replace(microsecond=0)
    assert refresh_models(planned) == ""
    planned.refresh_from_db()

    assert sorted(request.url.path for request in world.asked) == ["/coding/v1/models", "/coding/v1/usages"]
    assert planned.quota["windows"]["week"] == {"used": 40, "limit": 1000, "resets_at": "2026-08-29T05:20:51Z"}
    assert before <= datetime.fromisoformat(planned.quota["read_at"]) <= timezone.now()
    assert names(planned) == {"k3"}


@pytest.mark.parametrize(
    "answer",
    [
        refuses(404, {"error": {"message": "method not found"}}),
        refuses(401),
        refuses(200, b"<html>"),
        refuses(200, b"x" * (9 << 20)),
        raises(httpx.ReadTimeout("slow")),
    ],
)
def test_an_allowance_that_cannot_be_read_is_no_failure_and_the_last_one_stays(world: World, planned: Credential, answer: Answers):
    refresh_models(planned)
    world.answer = lambda request: answer(request) if request.url.path.endswith("/usages") else listing_of("k4")

    assert refresh_models(planned) == ""

    planned.refresh_from_db()
    assert planned.quota["windows"]["week"]["used"] == 40
    assert planned.last_error == ""
    assert names(planned) == {"k4"}


def test_an_allowance_is_kept_though_the_list_fails(world: World, planned: Credential):
    world.answer = lambda request: plan(request) if request.url.path.endswith("/usages") else httpx.Response(500)

    assert "500" in refresh_models(planned)

    planned.refresh_from_db()
    assert planned.quota["windows"]


def test_reading_an_allowance_is_no_news_for_the_hot_path(world: World, planned: Credential):
    refresh_models(planned)
    before = snapshot.version()
    world.answer = lambda request: httpx.Response(200, json={"usage": {"used": 41}}) if "usages" in request.url.path else listing_of("k3")
    refresh_models(planned)

    assert snapshot.version() == before


def test_another_secret_is_another_allowance(world: World, planned: Credential):
    refresh_models(planned)
    actions.replace_secret(planned, "sk-kimi-another")

    planned.refresh_from_db()
    assert planned.quota == {}


def test_an_allowance_that_comes_after_the_address_changed_is_not_kept(world: World, planned: Credential):
    stale = Credential.objects.get(pk=planned.pk)
    actions.change_credential(planned, base_url="https://other.example.org", secret=SECRET)
    refresh_models(stale)

    assert Credential.objects.get().quota == {}


# The sweep


def due() -> list[int]:
    now = timezone.now()
    return [row.pk for row in Credential.objects.all() if row.models_due_at is None or row.models_due_at <= now]


def later(credential: Credential) -> timedelta:
    credential.refresh_from_db()
    return credential.models_due_at - timezone.now()


def test_the_sweep_asks_those_that_are_due_and_no_others(world: World, mine: Credential):
    off = add_credential("openai", "Off", SECRET, base_url="http://llm.example.org/v1")
    actions.disable(off)

    assert sweeps.refresh_due() == 1
    assert timedelta(minutes=59) < later(mine) <= timedelta(hours=1)
    assert sweeps.refresh_due() == 0
    assert len(world.asked) == 1

    Credential.objects.filter(pk=mine.pk).update(models_due_at=timezone.now() - timedelta(seconds=1))
    assert sweeps.refresh_due() == 1


def test_after_a_failure_the_sweep_asks_again_in_five_minutes(world: World, mine: Credential, caplog: pytest.LogCaptureFixture):
    world.answer = refuses(500, {"error": {"message": f"no {SECRET}"}})

    assert sweeps.refresh_due() == 1
    assert timedelta(minutes=4) < later(mine) <= timedelta(minutes=5)
    assert "Mine" in caplog.text
    assert SECRET not in caplog.text


def test_two_sweeps_at_once_ask_once(world: World, mine: Credential):
    first, second = sweeps._claim(), sweeps._claim()

    assert (len(first), len(second)) == (1, 0)


def test_a_new_secret_or_address_is_asked_soon(world: World, mine: Credential):
    sweeps.refresh_due()
    assert due() == []
    actions.replace_secret(mine, "another-secret")
    assert due() == [mine.pk]

    sweeps.refresh_due()
    actions.change_credential(mine, label="Only the label")
    assert due() == []


def test_many_are_asked_in_batches(world: World):
    for number in range(actions.ASKED_AT_ONCE * 2 + 1):
        add_credential("openai", f"No {number}", SECRET, base_url="http://llm.example.org/v1")

    assert sweeps.refresh_due() == len(world.asked) == actions.ASKED_AT_ONCE * 2 + 1
    assert not Credential.objects.filter(models_refreshed_at=None).exists()
    assert not Credential.objects.exclude(state=State.ACTIVE).exists()


def test_the_demo_needs_nobody(world: World):
    demo = add_credential("demo", "Demo", "")
    demo.models.filter(upstream_id="echo").delete()

    assert refresh_models(demo) == ""
    assert "echo" in names(demo)
    assert world.asked == []
