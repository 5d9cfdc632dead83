"""`explain` says what would become of a call, and then the call is made: both must agree."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgiref.sync import async_to_sync
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone

from accounts import actions as accounts
from accounts.models import ApiKey, Role, User
from accounts.policy import Allowance
from accounts.principal import Limit
from providers.actions import add_credential, freeze, set_price
from providers.adapter import Target
from providers.failures import OutOfCredit, RateLimited, UpstreamServer
from providers.models import Credential, UpstreamModel
from providers.over_httpx import OverHttpx
from providers.secrets import SecretText
from proxy import explain, ledger, snapshot
from proxy.catalog import Current
from proxy.explain import Here, Question, explain_key
from proxy.gateway import Gateway
from proxy.http import Site
from proxy.journal import Journal
from proxy.models import FrozenModel, Rest
from proxy.routes import Leads, create_route
from proxy.stores.health import Health
from proxy.stores.limits import Hold
from proxy.stores.memory import MemoryLimits
from tests.accounts.conftest import People
from tests.proxy.used import used

pytestmark = pytest.mark.django_db

ADDRESS = "127.0.0.1"
MESSAGES = [{"role": "user", "content": "Hello"}]


class World:
    """A deployment in the making: rows in the database, and what a server has in its memory."""

    def __init__(self, people: People, folder: Path) -> None:
        self.people, self.folder = people, folder
        self.health, self.limits = Health(), MemoryLimits()
        self.key, self.clear = accounts.issue_key(organization=people.acme, user=people.bob, name="k")
        self.calls: list[httpx.Request] = []
        self.callers_key, self.body = "", {"model": "a/gpt", "messages": MESSAGES}
        self.path = "/v1/chat/completions"

    # Rows

    def credential(self, label: str = "one", prefix: str = "a", models: tuple[str, ...] = ("gpt",), **options: Any) -> Credential:
        options = {"base_url": f"https://{label}.example/v1"} | options
        made = add_credential("openai", label, options.pop("secret", f"secret-of-{label}"), prefix=prefix, **options)
        UpstreamModel.objects.bulk_create([UpstreamModel(credential=made, upstream_id=model) for model in models])
        return made

    def priced(self, pattern: str = "a/*") -> None:
        set_price(pattern, "1", "2")

    def limit(self, metric: str, amount: int, window: str = "", mode: str = "enforce", **scope: Any) -> None:
        allowance = Allowance(metric, amount, window, mode)
        accounts.set_limit(self.people.acme, allowance, **(scope or {"key": self.key}))

    def asks(self, model: str, **more: Any) -> None:
        self.body = {"model": model, "messages": MESSAGES, **more}

    # Memory

    def failed(self, credential: Credential, problem: Any, model: str = "gpt", times: int = 1) -> None:
        target = Target("openai", credential.pk, "", "", SecretText("s"), model, f"a/{model}")
        for _ in range(times):
            self.health.failed(target, problem, [credential.pk, 0])

    def hold(self, times: int = 1) -> None:
        """So many requests of the key are open."""
        principal = snapshot.load_principal(self.key.pk)
        assert principal is not None
        for number in range(times):
            hold = Hold(f"r{number}", timezone.now().timestamp(), (f"key:{self.key.pk}",), principal.limits, 10, 0)
            async_to_sync(self.limits.reserve)(hold)

    # Both ways

    def here(self) -> Here:
        return Here(snapshot.load(), self.health, self.limits, live=True)

    def question(self) -> Question:
        endpoint = self.path.removeprefix("/v1/")
        body = {name: value for name, value in self.body.items() if name != "model"}
        return Question(self.body["model"], endpoint, ADDRESS, callers_key=bool(self.callers_key), body=body)

    def explained(self) -> explain.Explanation:
        return explain_key(ApiKey.objects.get(pk=self.key.pk), self.question())

    def called(self) -> tuple[int, str]:
        """Make the call; the status and the code that the client got."""
        current, journal = Current(snapshot.load()), Journal(self.folder)

        async def answer(request: httpx.Request) -> httpx.Response:
            self.calls.append(request)
            whole = {"object": "chat.completion", "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}}]}
            return httpx.Response(200, json={**whole, "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

        async def load(digests: Any) -> None:
            return None

        gateway = Gateway(
            current=current, load=load, limits=self.limits, health=self.health, journal=lambda: journal,
            transport=OverHttpx(httpx.MockTransport(answer)), site=Site(),
        )  # fmt: skip
        head = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {self.clear}".encode())]
        head += [(b"x-upstream-key", self.callers_key.encode())] if self.callers_key else []
        scope = {"type": "http", "method": "POST", "path": self.path, "headers": head, "client": (ADDRESS, 1)}
        status, said = async_to_sync(_through)(gateway, scope, json.dumps(self.body).encode())
        return status, json.loads(said)["error"]["code"] if status >= 400 else ""


async def _through(gateway: Gateway, scope: dict[str, Any], raw: bytes) -> tuple[int, bytes]:
    import asyncio

    sent: list[Any] = []
    body = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> Any:
        if body:
            return body.pop()
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await gateway(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


@pytest.fixture
def world(people: People, tmp_path: Path) -> Iterator[World]:
    made = World(people, tmp_path)
    explain.serving.ask = lambda asking: asking(made.here())
    yield made
    explain.serving.ask = None


@pytest.fixture
def people(db: None) -> People:
    return People()


# The situations. Each makes its world, and says which rule blocks ("" = the call is served).


@dataclass(frozen=True)
class Situation:
    rule: str
    make: Callable[[World], object]


def _served(world: World) -> None:
    world.credential()


def _revoked(world: World) -> None:
    world.credential()
    accounts.revoke_key(world.key)


def _expired(world: World) -> None:
    world.credential()
    ApiKey.objects.update(expires_at=timezone.now() - timedelta(hours=1))


def _viewer(world: World) -> None:
    world.credential()
    accounts.change_role(world.people.bob.memberships.get(), Role.VIEWER)


def _organization_off(world: World) -> None:
    world.credential()
    world.people.acme.is_active = False
    world.people.acme.save()


def _frozen_key(world: World) -> None:
    world.credential()
    accounts.freeze(world.key, length=timedelta(hours=1))


def _frozen_and_elsewhere(world: World) -> None:
    _frozen_key(world)
    accounts.change_key(world.key, networks=["10.0.0.0/8"])


def _frozen_model(world: World) -> None:
    world.credential()
    FrozenModel.objects.create(pattern="a/*", until=timezone.now() + timedelta(hours=1))


def _frozen_accounts(world: World) -> None:
    freeze(world.credential("one"), length=timedelta(hours=1))
    freeze(world.credential("two"), length=timedelta(hours=2))


def _one_frozen_account(world: World) -> None:
    freeze(world.credential("one", priority=1), length=timedelta(hours=1))
    world.credential("two")


def _frozen_in_an_alias(world: World) -> None:
    _by_turns(world)
    FrozenModel.objects.create(pattern="b/gpt", until=timezone.now() + timedelta(hours=1), organization=world.people.acme)


def _elsewhere(world: World) -> None:
    world.credential()
    accounts.change_key(world.key, networks=["10.0.0.0/8"])


def _not_allowed(world: World) -> None:
    world.credential()
    accounts.change_key(world.key, models=["b/*"])


def _unknown(world: World) -> None:
    world.credential()
    world.asks("nope")


def _of_somebody_else(world: World) -> None:
    world.credential(organization=world.people.rival)


def _disabled(world: World) -> None:
    world.credential(settings={"listed_only": True})
    Credential.objects.update(state="disabled")


def _alias(world: World) -> None:
    world.credential("one", "a")
    world.credential("two", "b")
    create_route(organization=None, name="fast", targets=[Leads("b/gpt", 0), Leads("a/gpt", 1)])
    world.asks("fast")


def _by_turns(world: World) -> None:
    world.credential("one", "a")
    world.credential("two", "b")
    create_route(organization=world.people.acme, name="fast", targets=[Leads("a/gpt", 0, 2), Leads("b/gpt", 0, 3)])
    world.asks("fast")


def _catch_all(world: World) -> None:
    world.credential()
    create_route(organization=None, name="*", targets=[Leads("a/*", 0)])
    world.asks("claude-4-sonnet-thinking-max")


def _bare_name(world: World) -> None:
    world.credential("one", "a")
    world.credential("two", "b", priority=1)
    world.asks("gpt")


def _callers_key_unwanted(world: World) -> None:
    world.credential()
    world.callers_key = "sk-mine-0123456789"


def _callers_key_needed(world: World) -> None:
    world.credential(secret="", settings={"pass_through": True})


def _callers_key_given(world: World) -> None:
    world.credential(secret="", settings={"pass_through": True})
    world.callers_key = "sk-mine-0123456789"


def _all_rest(world: World) -> None:
    one = world.credential()
    world.failed(one, RateLimited("Slow down.", retry_after_seconds=60))


def _out_of_credit(world: World) -> None:
    one = world.credential()
    world.failed(one, OutOfCredit("Empty.", retry_after_seconds=600))


def _one_rests(world: World) -> None:
    one = world.credential("one")
    world.credential("two")
    world.failed(one, RateLimited("Slow down.", retry_after_seconds=60))


def _sticky(world: World) -> None:
    for label in ("one", "two", "three", "four"):
        world.credential(label, settings={"sticky": "user"})
    world.asks("a/gpt", user="ann")


def _sticky_whose_account_rests(world: World) -> None:
    _sticky(world)
    routed = world.explained().serves
    assert routed is not None
    world.failed(Credential.objects.get(pk=routed.credential_id), RateLimited("Slow down.", retry_after_seconds=60))


def _ejected(world: World) -> None:
    one = world.credential("one")
    world.credential("two")
    world.failed(one, UpstreamServer("Broken."), times=5)


def _no_such_endpoint(world: World) -> None:
    add_credential("demo", "demo", "")
    world.path, world.body = "/v1/images/generations", {"model": "demo/echo", "prompt": "x"}


def _unpriced_under_budget(world: World) -> None:
    world.credential()
    world.limit("money", 1_000_000, "month")


def _over_budget(world: World) -> None:
    world.credential()
    world.priced()
    world.limit("money", 10, "month")


def _over_budget_by_max_tokens_alone(world: World) -> None:
    world.credential()
    world.priced()
    world.limit("money", 5_000, "day")
    world.asks("a/gpt", max_tokens=1_000_000)


def _within_budget(world: World) -> None:
    world.credential()
    world.priced()
    world.limit("money", 1_000_000, "day")


def _spent(world: World) -> None:
    _within_budget(world)
    used(world.key, cost=999_999)
    principal = snapshot.load_principal(world.key.pk)
    assert principal is not None
    budgets = world.limits.untracked(principal.limits)
    world.limits.track(budgets)
    world.limits.add_spent(ledger.spent_in(budgets, timezone.now().timestamp()))


def _no_requests_left(world: World) -> None:
    world.credential()
    world.limit("rpm", 2)
    world.hold(2)


def _tokens_of_the_team(world: World) -> None:
    world.credential()
    world.limit("tpm", 0, user=world.people.bob)


def _too_many_open(world: World) -> None:
    world.credential()
    world.limit("concurrency", 1)
    world.hold(1)


def _only_counted(world: World) -> None:
    world.credential()
    world.limit("rpm", 0, mode="shadow")


def _overridden_tokens(world: World) -> None:
    world.credential()
    world.priced()
    world.limit("money", 5_000, "day")
    create_route(organization=None, name="short", targets=[Leads("a/gpt", 0)], overrides={"max_tokens": 10})
    world.asks("short", max_tokens=1_000_000)


SITUATIONS = {
    "it is served": Situation("", _served),
    "the key was revoked": Situation("key", _revoked),
    "the key has expired": Situation("key", _expired),
    "its owner is a viewer": Situation("key", _viewer),
    "the organization is switched off": Situation("key", _organization_off),
    "it comes from elsewhere": Situation("address", _elsewhere),
    "the key is frozen": Situation("freeze", _frozen_key),
    "the key is frozen, and it comes from elsewhere": Situation("address", _frozen_and_elsewhere),
    "the model is frozen": Situation("model", _frozen_model),
    "every account is frozen": Situation("model", _frozen_accounts),
    "one account is frozen": Situation("", _one_frozen_account),
    "a target of an alias is frozen": Situation("", _frozen_in_an_alias),
    "the key allows other models": Situation("model", _not_allowed),
    "nobody knows the model": Situation("model", _unknown),
    "only another organization has it": Situation("model", _of_somebody_else),
    "its only account is disabled": Situation("model", _disabled),
    "an alias leads to another pool": Situation("", _alias),
    "an alias takes turns": Situation("", _by_turns),
    "the catch-all takes it": Situation("", _catch_all),
    "a bare name, by priority": Situation("", _bare_name),
    "a caller's key is not wanted": Situation("upstream key", _callers_key_unwanted),
    "a caller's key is needed": Situation("upstream key", _callers_key_needed),
    "a caller's key is given": Situation("", _callers_key_given),
    "every account rests": Situation("health", _all_rest),
    "every account is out of credit": Situation("health", _out_of_credit),
    "one account rests": Situation("", _one_rests),
    "one account was ejected": Situation("", _ejected),
    "a sticky pool": Situation("", _sticky),
    "a sticky pool whose account for this user rests": Situation("", _sticky_whose_account_rests),
    "the upstream has no such endpoint": Situation("endpoint", _no_such_endpoint),
    "no price under a budget": Situation("limit key", _unpriced_under_budget),
    "a budget that is too small": Situation("limit key", _over_budget),
    "a budget too small for max_tokens": Situation("limit key", _over_budget_by_max_tokens_alone),
    "a budget with room": Situation("", _within_budget),
    "a budget that was spent": Situation("limit key", _spent),
    "no requests left this minute": Situation("limit key", _no_requests_left),
    "no tokens for this person": Situation("limit user", _tokens_of_the_team),
    "too many open requests": Situation("limit key", _too_many_open),
    "a limit that only counts": Situation("", _only_counted),
    "an alias that sets max_tokens within the budget": Situation("", _overridden_tokens),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_explain_and_the_call_agree(world: World, name: str):
    situation = SITUATIONS[name]
    situation.make(world)

    said = world.explained()
    again = world.explained()  # asking counts for nothing: no turn, no request, no hold
    status, code = world.called()

    assert (said.status, said.code) == (status, code), said.rules
    assert [(rule.name, rule.passes) for rule in again.rules] == [(rule.name, rule.passes) for rule in said.rules]
    assert said.live
    blocks = [rule.name for rule in said.rules if rule.passes is False]
    if not situation.rule:
        assert blocks == []
        [request] = world.calls
        assert said.serves is not None
        assert request.url.host == httpx.URL(said.serves.base_url).host
        assert again.serves == said.serves
    else:
        assert said.rules[-1].name.startswith(situation.rule)
        assert len(blocks) == 1
        assert (world.calls, said.serves) == ([], None)


def test_there_are_situations_enough_of_both_kinds():
    assert len(SITUATIONS) >= 20
    assert {situation.rule.partition(" ")[0] for situation in SITUATIONS.values()} == {
        "", "key", "address", "freeze", "model", "upstream", "health", "endpoint", "limit",
    }  # fmt: skip


def test_a_key_that_does_not_work_is_explained_by_its_reason(world: World):
    _viewer(world)
    assert "viewer" in world.explained().rules[0].why


def test_what_only_a_running_server_knows_is_not_looked_at_elsewhere(world: World):
    explain.serving.ask = None
    _all_rest(world)
    world.limit("rpm", 5)
    world.limit("money", 10, "day")
    world.priced()

    said = world.explained()

    assert not said.live
    assert {rule.name: rule.passes for rule in said.rules if rule.passes is None} == {
        "health": None,
        f"limit key:{world.key.pk}": None,
    }
    assert (said.status, said.code) == (429, "insufficient_quota")  # money is in the database


def test_rests_that_are_stored_are_looked_at_elsewhere_too(world: World):
    explain.serving.ask = None
    one, two = world.credential("one"), world.credential("two")
    rest = Rest.objects.create(credential=one, model="gpt", until=timezone.now() + timedelta(hours=1), reason=RateLimited.code)
    said = world.explained()
    assert [target.credential_id for target in said.targets] == [two.pk]
    assert "1 rest for as long" in next(rule.why for rule in said.rules if rule.name == "health")
    Rest.objects.create(credential=two, model="gpt", until=rest.until, reason=RateLimited.code)
    assert (world.explained().status, world.explained().code) == (429, "rate_limit_exceeded")


def test_limits_that_several_servers_share_are_known_as_far_as_the_database_knows_them(world: World):
    explain.serving.ask = lambda asking: asking(Here(snapshot.load(), world.health, live=True, counted=False))
    one = world.credential("one")
    world.credential("two")
    world.failed(one, RateLimited("Slow down.", retry_after_seconds=60))
    world.priced()
    world.limit("rpm", 5)
    world.limit("money", 1_000_000, "day")

    said = world.explained()

    assert (said.status, said.live) == (200, True)
    assert ["not looked at" in rule.why for rule in said.rules if rule.passes is None] == [True]
    assert "1 rest" in next(rule.why for rule in said.rules if rule.name == "health")
    used(world.key, cost=999_999)
    assert world.explained().code == "insufficient_quota"


def test_money_that_was_spent_is_read_from_the_database(world: World):
    explain.serving.ask = None
    _within_budget(world)
    assert world.explained().status == 200
    used(world.key, cost=999_999)
    assert world.explained().code == "insufficient_quota"


# The command


def command(*arguments: str) -> str:
    out = io.StringIO()
    call_command("explain", *arguments, stdout=out)
    return out.getvalue()


def test_the_command_says_it_rule_by_rule(world: World):
    explain.serving.ask = None
    one = world.credential()
    said = command("--key", str(world.key.pk), "--model", "a/gpt")

    assert "model       passes  a model of a pool: a/gpt" in said
    assert f"=> 200: credential {one.pk} 'one' (openai) is asked for a/gpt" in said
    assert "a running server" in said
    assert command("--key", str(world.key.handle), "--model", "a/gpt") == said
    assert "secret-of-one" not in said

    blocked = command("--key", str(world.key.pk), "--model", "nope")
    assert "BLOCKS" in blocked
    assert "=> 404 model_not_found" in blocked
    assert "=> 200" not in command("--key", str(world.key.pk), "--model", "a/gpt", "--upstream-key")


def test_the_command_refuses_what_is_no_key(world: World):
    for nobody in ("999999", "nonesuch", "9" * 40):
        with pytest.raises(CommandError, match="There is no key"):
            command("--key", nobody, "--model", "x")


# The API


def over_http(user: User, **asked: Any) -> Any:
    client = Client()
    client.force_login(user)
    return client.get("/api/explain", asked)


def test_the_api_shows_credentials_to_whom_they_concern(world: World):
    shared = world.credential("shared-account", "a")
    own = world.credential("own-account", "b", organization=world.people.acme)
    create_route(organization=None, name="both", targets=[Leads("a/gpt", 0), Leads("b/gpt", 1)])
    seen = {}
    for user in (world.people.olga, world.people.alice, world.people.bob):
        answer = over_http(user, key=world.key.pk, model="both")
        assert answer.status_code == 200
        body = answer.json()
        seen[user.email] = [target["credential"] for target in body["targets"]]
        assert ("shared-account" in answer.content.decode()) == user.is_superuser
        assert body["live"]
    assert list(seen.values()) == [[shared.pk, own.pk], [None, own.pk], [None, None]]


def test_the_api_tells_strangers_nothing(world: World):
    missing = over_http(world.people.charlie, key=10**9, model="x")
    foreign = over_http(world.people.charlie, key=world.key.pk, model="x")

    assert (missing.status_code, missing.content) == (foreign.status_code, foreign.content)
    assert missing.status_code == 404


@pytest.mark.parametrize("asked", [{"model": ""}, {"key": "0"}, {"key": "x"}, {"endpoint": "nope"}])
def test_the_api_refuses_what_is_no_question(world: World, asked: dict[str, str]):
    assert over_http(world.people.olga, **{"key": world.key.pk, "model": "x"} | asked).status_code == 400


def test_a_model_that_no_request_could_name_is_a_rule_that_blocks(world: World):
    body = over_http(world.people.olga, key=world.key.pk, model="x", endpoint="embeddings", address="not an address").json()
    assert (body["status"], body["code"], body["serves"]) == (404, "model_not_found", None)


def test_a_limit_of_memory_alone_is_looked_at_without_being_taken():
    limits = MemoryLimits()
    limit = Limit("key:1", "rpm", 1)
    hold = Hold("a", 0.0, ("key:1",), (limit,), 1, 0)

    assert limits.look(hold) == limits.look(hold) == [(limit, None)]
    async_to_sync(limits.reserve)(hold)
    [(_, problem)] = limits.look(hold)
    assert problem is not None
    assert problem.code == "rate_limit_exceeded"
