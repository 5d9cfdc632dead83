"""Where can this call go? Alias, then prefix/model, then a bare model that some pool lists, then the catch-all `*`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

from accounts.principal import Principal
from providers.adapter import Target
from providers.failures import CredentialRefused
from providers.secrets import SecretText
from providers.wire import Json
from proxy.catalog import Alias, Catalog
from proxy.errors import Frozen, InvalidRequest, ModelNotAllowed, ModelNotFound
from proxy.stores.health import Health
from proxy.stores.stickiness import Candidate, bound_by, home

NEVER = math.inf
NOTHING: Json = {}
MOST_REMEMBERED = 10_000  # clients make up names of models


@dataclass(frozen=True, slots=True)
class Way:
    """Where a name leads: one group of candidates for each model of an alias, by its place there; else one group in all.

    `by_name`: the name itself leads there; what the catch-all serves goes by another name than the client's."""

    groups: Mapping[int, Sequence[Candidate]]
    by_name: bool
    alias: Alias | None = None


class Routed(NamedTuple):
    """Targets in the order in which to try them, the alias that led there, if one did, and the account that the call is bound to."""

    targets: list[Target]
    alias: Alias | None = None
    home: int | None = None


def route(principal: Principal, model: str, callers_key: str, catalog: Catalog, health: Health, body: Json = NOTHING) -> Routed:
    """Where this call goes. Of its body only what sticky pools go by is looked at.

    Raises ModelNotFound, ModelNotAllowed, Frozen, InvalidRequest, CredentialRefused when only accounts are left that have to be
    signed in again, and OverLimit or OverBudget when every upstream asked to wait."""
    if catalog.thaws_at != NEVER and (now := time.time()) >= catalog.thaws_at:
        catalog.thaw(now)
    # The same caller asks for the same model again and again. It is kept with the answer, so that its identity is nobody else's.
    known = catalog.routes.get((id(principal), model))
    if known is None or known[0] is not principal:
        way = resolve(principal, model, catalog)
        groups = allowed(principal, model, way, catalog)
        upstreams = [upstream for group in groups.values() for upstream, _ in group]
        known = principal, way, groups, not any(one.callers_key_only for one in upstreams), any(one.sticky for one in upstreams)
        if len(catalog.routes) >= MOST_REMEMBERED:
            catalog.routes.clear()
        catalog.routes[(id(principal), model)] = known
    _, way, groups, have_secrets, is_sticky = known
    if callers_key or not have_secrets:
        groups = with_secret(groups, callers_key)
    ordered = _in_turns(groups, way.alias, health) if way.alias is not None and way.alias.takes_turns else list(groups.values())
    bound = partial(bound_by, principal=principal, body=body) if is_sticky else None
    candidates = health.order(ordered, own_key=bool(callers_key), bound=bound)
    at_home = None if bound is None else home(ordered[0], bound)
    return Routed([_target(candidate, callers_key, catalog) for candidate in candidates], way.alias, at_home)


def resolve(principal: Principal, model: str, catalog: Catalog) -> Way:
    """Every credential that could serve this name."""
    alias = catalog.alias(model, principal)
    by_name = True
    if alias is None:
        found = _of_model(principal, model, catalog)
        if found:
            return Way({0: found}, by_name)
        alias, by_name = catalog.alias("*", principal), False
    groups: dict[int, Sequence[Candidate]] = {}
    for place, target in enumerate(alias.targets if alias is not None else ()):
        if found := _of_model(principal, _name_at(target, model), catalog):
            groups[place] = found
    return Way(groups, by_name, alias)


def allowed(principal: Principal, model: str, way: Way, catalog: Catalog) -> Mapping[int, Sequence[Candidate]]:
    """The groups without what the key's list of models does not name, and without what somebody has frozen.

    Raises ModelNotAllowed, ModelNotFound, Frozen, CredentialRefused when only accounts are left that have to be signed in again."""
    groups = way.groups
    if not (way.by_name and principal.may_use(model)):
        groups = _only(groups, lambda candidate: principal.may_use(public_id(candidate)))
        if not groups and not principal.may_use(model):
            raise ModelNotAllowed(f"This key may not use the model '{model}'.", param="model")
    if not groups and _is_signed_out(principal, model, way, catalog):
        raise CredentialRefused("The upstream account of this model has to be signed in again by an operator.")
    if not groups:
        raise ModelNotFound(f"The model '{model}' does not exist or you do not have access to it.", param="model")
    return not_frozen(groups, principal, model, catalog) if catalog.thaws_at != NEVER else groups


def not_frozen(
    groups: Mapping[int, Sequence[Candidate]], principal: Principal, model: str, catalog: Catalog
) -> Mapping[int, Sequence[Candidate]]:
    """Those that nobody has frozen by hand. Raises Frozen when none is left."""
    now = time.time()
    ends: list[float] = []

    def serves(candidate: Candidate) -> bool:
        until = max(candidate[0].frozen_until, *(catalog.frozen_until(name, principal, now) for name in (public_id(candidate), model)))
        if until > now:
            ends.append(until)
        return until <= now

    kept = _only(groups, serves)
    if not kept:
        raise Frozen(f"The model '{model}' is frozen for now.", param="model", retry_after_seconds=min(ends) - now)
    return kept


def with_secret(groups: Mapping[int, Sequence[Candidate]], callers_key: str) -> Mapping[int, Sequence[Candidate]]:
    """The groups without what there is no secret for, the caller's or ours. Raises InvalidRequest."""
    if callers_key:
        groups = _only(groups, lambda candidate: candidate[0].pass_through)
        if not groups:
            raise InvalidRequest("No upstream of this model accepts a key of the caller's own.", code="upstream_key_not_allowed")
    else:
        groups = _only(groups, lambda candidate: not candidate[0].callers_key_only)
        if not groups:
            raise InvalidRequest(
                "The upstream of this model is called with a key of your own: send it in X-Upstream-Key.", code="upstream_key_required"
            )
    return groups


def _is_signed_out(principal: Principal, model: str, way: Way, catalog: Catalog) -> bool:
    names = [] if way.by_name and way.alias is not None else [model]
    names += [_name_at(target, model) for target in (way.alias.targets if way.alias is not None else ())]
    return any(catalog.is_signed_out(name, principal) for name in names)


def _name_at(target: str, model: str) -> str:
    """The name that a target of an alias stands for, when the client asked for `model`."""
    return target[:-1] + model if target.endswith("/*") else target


def _only(groups: Mapping[int, Sequence[Candidate]], wanted: Callable[[Candidate], bool]) -> dict[int, Sequence[Candidate]]:
    return {place: kept for place, group in groups.items() if (kept := list(filter(wanted, group)))}


def _in_turns(groups: Mapping[int, Sequence[Candidate]], alias: Alias, health: Health) -> list[Sequence[Candidate]]:
    """The groups by rank, and within a rank by weight in turns."""
    ordered: list[Sequence[Candidate]] = []
    for _, places in groupby(groups, key=alias.ranks.__getitem__):
        tied = list(places)
        if len(tied) > 1:
            weights = [((alias.organization_id, alias.name, alias.targets[place]), alias.weights[place]) for place in tied]
            tied = [tied[number] for number in health.take_turns(weights)]
        ordered += [groups[place] for place in tied]
    return ordered


def public_id(candidate: Candidate) -> str:
    return f"{candidate[0].prefix}/{candidate[1]}"


def visible_models(principal: Principal, catalog: Catalog) -> list[tuple[str, str]]:
    """(name, owner) of every model this caller may name, aliases first."""
    names: dict[str, str] = {}
    for alias in catalog.aliases:
        if alias.name != "*" and alias.organization_id in (None, principal.organization_id):
            names.setdefault(alias.name, "sluice")
    for upstream in catalog.upstreams:
        if upstream.serves(principal):
            for model in sorted(upstream.models):
                names.setdefault(f"{upstream.prefix}/{model}", upstream.prefix)
    return [(name, owner) for name, owner in names.items() if principal.may_use(name)]


def _of_model(principal: Principal, model: str, catalog: Catalog) -> list[Candidate]:
    prefix, slash, upstream_id = model.partition("/")
    if slash and upstream_id:
        # Lists go stale: an id that the pool does not list is passed on, unless the credential forbids it.
        pool = [one for one in catalog.pool(prefix, principal) if upstream_id in one.models or not one.listed_only]
        if any(upstream_id in one.models for one in pool):
            # Those that list other models stand back; one whose list is not known may have this one.
            pool = [one for one in pool if upstream_id in one.models or not one.models]
        if pool:
            return [(upstream, upstream_id) for upstream in pool]
    return [
        (upstream, model)
        for prefix in catalog.prefixes_listing(model)
        for upstream in catalog.pool(prefix, principal)
        if model in upstream.models
    ]


def _target(candidate: Candidate, callers_key: str, catalog: Catalog) -> Target:
    upstream, model = candidate
    known: Target | None = catalog.targets.get((upstream.id, model))
    if known is not None and not callers_key:
        return known
    target = Target(
        kind=upstream.kind,
        credential_id=upstream.id,
        label=upstream.label,
        base_url=upstream.base_url,
        secret=SecretText(callers_key) if callers_key else upstream.secret,
        model=model,
        public_model=public_id(candidate),
        settings=upstream.settings,
        callers_key=bool(callers_key),
        lease=None if callers_key else upstream.lease,
        detail=upstream.details.get(model, {}),
    )
    if not callers_key:
        if len(catalog.targets) >= MOST_REMEMBERED:
            catalog.targets.clear()
        catalog.targets[(upstream.id, model)] = target
    return target
