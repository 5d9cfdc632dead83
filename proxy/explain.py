"""Why a call would be served, or refused, and by whom: the trip's own steps, asked without making a call.

Nothing is copied from them: `route`, `health.order`, `translate` and the limits say here what they would say to the call itself,
over copies of what they would change. What lives in the memory of a running server (rests, requests of the last minute,
open requests) is known there alone; elsewhere it is left out, and the explanation says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from django.utils import timezone

from accounts.models import ApiKey
from accounts.principal import Limit, Principal
from providers import wire
from providers.adapter import Target
from providers.wire import ApiError
from proxy import ledger, queries, snapshot
from proxy.call import Asked, new_request_id
from proxy.catalog import Catalog
from proxy.dash.state import roles_in, state_of
from proxy.gateway import ENDPOINTS
from proxy.pipeline import translate
from proxy.pipeline.admit import dearest, hold_of
from proxy.pipeline.authenticate import check_not_frozen, let_in
from proxy.pipeline.route import Way, allowed, resolve, route, with_secret
from proxy.stores.health import Health
from proxy.stores.memory import MemoryLimits

HEADS = {one.name: one.head for one in ENDPOINTS.values() if one.head is not None}
# A small request to each, as a client might send it.
_SAMPLES: Mapping[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "rerank": {"query": "Hello", "documents": ["Hello"]},
    "audio/speech": {"input": "Hello", "voice": "alloy"},
    "completions": {"prompt": "Hello"},
    "images/generations": {"prompt": "Hello"},
}


@dataclass(frozen=True, slots=True)
class Question:
    """The call that is asked about. `address` None: it is not looked at. `body` None: a small one."""

    model: str
    endpoint: str = "chat/completions"
    address: str | None = None
    callers_key: bool = False  # the client would send an upstream key of its own
    body: Mapping[str, Any] | None = None

    def asked(self) -> Asked:
        """Raises InvalidRequest."""
        body = dict(self.body) if self.body is not None else _SAMPLES.get(self.endpoint, {"input": "Hello"})
        raw = wire.encode_json({**body, "model": self.model})
        return translate.read(self.endpoint, HEADS[self.endpoint], raw, content_type=b"")


@dataclass(frozen=True, slots=True)
class Rule:
    """What one rule says: it passes, it blocks, or it could not be looked at (None)."""

    name: str
    passes: bool | None
    why: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """`status` and `code` are what the client would get before any upstream answers: 200, or the first refusal."""

    rules: tuple[Rule, ...]
    status: int = 200
    code: str = ""
    targets: tuple[Target, ...] = ()
    live: bool = False

    @property
    def serves(self) -> Target | None:
        """Which credential is asked first."""
        return self.targets[0] if self.targets else None


Namer = Callable[[int, str, str], str]  # id, label and kind of a credential -> what it is called for this reader


def in_full(number: int, label: str, kind: str) -> str:
    return f"{label} ({number})"


@dataclass(frozen=True, slots=True)
class Here:
    """What the trip's steps are handed. `live`: they are those of a running server."""

    catalog: Catalog
    health: Health = field(default_factory=Health)
    limits: MemoryLimits = field(default_factory=MemoryLimits)
    live: bool = False
    counted: bool = True  # the limits know what was used in the last minute, and what is open
    name: Namer = in_full


Asking = Callable[[Here], Explanation]


class Serving:
    """The server that runs in this process. It says so when it is ready: `ask` answers with what is in its memory."""

    ask: Callable[[Asking], Explanation] | None = None


serving = Serving()


def explain_key(key: ApiKey, question: Question, name: Namer | None = None) -> Explanation:
    """The same for a key of the database, with the memory of the server that runs in this process, if one does."""
    state = state_of(key, roles_in(key.organization, {key.user_id}))
    words = f"{state.reason} {state.at:%Y-%m-%d %H:%M} UTC" if state.at is not None else state.reason
    principal = snapshot.load_principal(key.pk)
    stored = _stored(principal)
    ask = serving.ask or (lambda asking: asking(Here(snapshot.load(), health=_stored_rests(), counted=False)))

    def asking(here: Here) -> Explanation:
        return explain(
            principal, words or state.name, question, replace(here, name=name or here.name, limits=here.limits if here.counted else stored)
        )

    return ask(asking)


def _stored(principal: Principal | None) -> MemoryLimits:
    """What the database alone knows of limits: nothing open, and of money what has been stored."""
    limits = MemoryLimits()
    budgets = limits.untracked(limit for limit in (principal.limits if principal is not None else ()) if limit.metric == "money")
    limits.track(budgets)
    limits.add_spent(ledger.spent_in(budgets, time.time()))
    return limits


def _stored_rests() -> Health:
    """What the database alone knows of accounts that rest: the short ones are missing."""
    health = Health()
    for rest in queries.resting():
        seconds = (rest.until - timezone.now()).total_seconds()
        health.rest(rest.credential_id, rest.model, seconds, named=rest.named, reason=rest.reason, times=rest.times)
    return health


class _Blocked(Exception):
    def __init__(self, rule: str, problem: ApiError) -> None:
        super().__init__(rule)
        self.rule, self.problem = rule, problem


def explain(principal: Principal | None, key_state: str, question: Question, here: Here) -> Explanation:
    """What would become of this call. `principal` is None for a key that does not work; `key_state` says why, in words."""
    rules: list[Rule] = []
    targets: tuple[Target, ...] = ()
    try:
        for said in _trip(principal, key_state, question, here):
            if isinstance(said, Rule):
                rules.append(said)
            else:
                targets = tuple(said)
    except _Blocked as blocked:
        problem = blocked.problem
        wait = f" Wait {problem.retry_after_seconds:.0f} s." if problem.retry_after_seconds else ""
        rules.append(Rule(blocked.rule, False, f"{problem.message}{wait}"))
        return Explanation(tuple(rules), problem.status, problem.code or problem.type, live=here.live)
    return Explanation(tuple(rules), targets=targets, live=here.live)


def _trip(principal: Principal | None, key_state: str, question: Question, here: Here) -> Iterator[Rule | Sequence[Target]]:
    """The rules in the order of the trip, then the targets. Raises _Blocked at the first that blocks."""
    catalog, health = here.catalog, here.health.copy()  # turns are taken, and must not count
    principal = _ask("key", lambda: let_in(principal, None), instead=key_state if principal is None else "")
    yield Rule("key", True, key_state)
    yield _address(principal, question.address)
    _ask("freeze", lambda: check_not_frozen(principal))
    asked = _ask("request", question.asked)
    way = resolve(principal, question.model, catalog)
    groups = _ask("model", lambda: allowed(principal, question.model, way, catalog))
    yield Rule("model", True, _in_words(question.model, way))
    yield Rule("allow-list", True, f"the key allows {', '.join(principal.models)}" if principal.models else "the key allows every model")
    callers_key = "x" if question.callers_key else ""
    with_key = _ask("upstream key", lambda: with_secret(groups, callers_key))
    pool = {one.id: here.name(one.id, one.label, one.kind) for group in with_key.values() for one, _ in group}
    yield Rule("pool", True, ", ".join(pool.values()))
    routed = _ask("health", lambda: route(principal, question.model, callers_key, catalog, health, asked.body))
    if routed.alias is not None:
        parameters = routed.alias.parameters
        asked = _ask("parameters", lambda: translate.with_parameters(asked, parameters))
        if parameters:
            yield Rule("parameters", True, "the alias changes parameters of the request")
    yield _health_in_words(with_key, routed.targets, here)
    targets = _ask("endpoint", lambda: translate.that_have(routed.targets, asked.endpoint))
    yield Rule("endpoint", True, f"{targets[0].kind} has {asked.endpoint}")
    at = time.time()
    hold = hold_of(new_request_id(), at, principal, asked, targets, catalog)
    yield _price(targets, catalog, at)
    yield from _limits(here, hold.limits, here.limits.look(hold))
    yield targets


def _ask(rule: str, step: Callable[[], Any], *, instead: str = "") -> Any:
    try:
        return step()
    except ApiError as problem:
        if instead:
            problem.message = instead
        raise _Blocked(rule, problem) from None


def _address(principal: Principal, address: str | None) -> Rule:
    if not principal.networks:
        return Rule("address", True, "the key may be used from anywhere")
    networks = ", ".join(map(str, principal.networks))
    if address is None:
        return Rule("address", None, f"not looked at: the key may be used from {networks} alone")
    _ask("address", lambda: let_in(principal, address))
    return Rule("address", True, f"{address} lies in {networks}")


def _in_words(model: str, way: Way) -> str:
    names = dict.fromkeys(f"{upstream.prefix}/{name}" for group in way.groups.values() for upstream, name in group)
    if way.alias is not None:
        what = "nobody knows it, so the alias * takes it" if way.alias.name == "*" and model != "*" else "an alias"
    else:
        what = "a model of a pool" if model in names else "a bare name that pools list"
    return f"{what}: {', '.join(names)}"


def _health_in_words(groups: Mapping[int, Sequence[Any]], targets: Sequence[Target], here: Here) -> Rule:
    everybody = {(upstream.id, name) for group in groups.values() for upstream, name in group}
    left_out = len(everybody) - len({(target.credential_id, target.model) for target in targets})
    order = ", ".join(here.name(target.credential_id, target.label, target.kind) for target in targets)
    said = f"in order: {order}" + (f"; {left_out} rest for as long as their upstream asked" if left_out else "")
    if not here.live:
        return Rule("health", None, f"{said}. Of rests shorter than 20 s only the running server knows")
    return Rule("health", True, said)


def _price(targets: Sequence[Target], catalog: Catalog, at: float) -> Rule:
    """A price is no rule by itself: only limits of money need one, and say so."""
    if dearest(targets, catalog, at, 0, 0) is None:
        unpriced = dict.fromkeys(target.public_model for target in targets if catalog.prices.find(target.public_model, at) is None)
        return Rule("price", True, f"unpriced: {', '.join(unpriced)}. Under a limit of money that is refused")
    return Rule("price", True, "every model that it may lead to has a price")


def _limits(here: Here, limits: Sequence[Limit], said: Sequence[tuple[Limit, ApiError | None]]) -> Iterator[Rule]:
    if not limits:
        yield Rule("limits", True, "none")
    for limit, problem in said:
        name = f"limit {limit.scope}"
        what = f"{limit.amount} {limit.metric} {limit.window}".rstrip()
        if problem is not None and limit.enforce:
            raise _Blocked(name, problem)
        if problem is not None:
            yield Rule(name, True, f"{what}: only counted, it would refuse ({problem.code})")
        elif limit.metric != "money" and not here.counted:
            yield Rule(name, None, f"{what}: not looked at, only the running servers know what was used of it")
        else:
            yield Rule(name, True, what)
