"""Where can this call go? Alias, then prefix/model, then a bare model that some pool lists, then the catch-all `*`."""

from __future__ import annotations

from collections.abc import Callable

from accounts.principal import Principal
from providers.adapter import Target
from providers.secrets import SecretText
from proxy.catalog import Catalog
from proxy.errors import InvalidRequest, ModelNotAllowed, ModelNotFound
from proxy.stores.health import Candidate, Health


def route(principal: Principal, model: str, callers_key: str, catalog: Catalog, health: Health) -> list[Target]:
    """Targets in the order in which to try them.

    Raises ModelNotFound, ModelNotAllowed, InvalidRequest, and OverLimit or OverBudget when every upstream asked to wait."""
    groups, by_name = resolve(principal, model, catalog)
    if not (by_name and principal.may_use(model)):
        groups = _only(groups, lambda candidate: principal.may_use(public_id(candidate)))
        if not groups and not principal.may_use(model):
            raise ModelNotAllowed(f"This key may not use the model '{model}'.", param="model")
    if not groups:
        raise ModelNotFound(f"The model '{model}' does not exist or you do not have access to it.", param="model")
    if callers_key:
        groups = _only(groups, lambda candidate: candidate[0].pass_through)
        if not groups:
            raise InvalidRequest("No upstream of this model accepts a key of the caller's own.", code="upstream_key_not_allowed")
    return [_target(candidate, callers_key) for candidate in health.order(groups)]


def resolve(principal: Principal, model: str, catalog: Catalog) -> tuple[list[list[Candidate]], bool]:
    """Every credential that could serve this name: one group for each model of an alias, else one group in all.

    Then whether the name itself leads there: what the catch-all serves goes by another name than the client's."""
    alias = catalog.alias(model, principal)
    by_name = True
    if alias is None:
        found = _of_model(principal, model, catalog)
        if found:
            return [found], True
        alias, by_name = catalog.alias("*", principal), False
    targets = alias.targets if alias is not None else ()
    return [found for target in targets if (found := _of_model(principal, target, catalog))], by_name


def _only(groups: list[list[Candidate]], wanted: Callable[[Candidate], bool]) -> list[list[Candidate]]:
    return [kept for group in groups if (kept := list(filter(wanted, group)))]


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


def _target(candidate: Candidate, callers_key: str) -> Target:
    upstream, model = candidate
    return Target(
        kind=upstream.kind,
        credential_id=upstream.id,
        label=upstream.label,
        base_url=upstream.base_url,
        secret=SecretText(callers_key) if callers_key else upstream.secret,
        model=model,
        public_model=public_id(candidate),
        settings=upstream.settings,
        callers_key=bool(callers_key),
    )
