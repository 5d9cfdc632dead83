"""Where can this call go? Alias, then prefix/model, then a bare model that some pool lists, then the catch-all `*`."""

from __future__ import annotations

from collections.abc import Sequence

from accounts.principal import Principal
from providers.adapter import Target
from providers.secrets import SecretText
from proxy.catalog import Catalog, Upstream
from proxy.errors import InvalidRequest, ModelNotAllowed, ModelNotFound
from proxy.stores.health import Health

Candidate = tuple[Upstream, str]  # a credential, and the model's name there


def route(principal: Principal, model: str, callers_key: str, catalog: Catalog, health: Health) -> list[Target]:
    """Targets in the order in which to try them.

    Raises ModelNotFound, ModelNotAllowed, InvalidRequest, and OverLimit or OverBudget when every upstream asked to wait."""
    found = resolve(principal, model, catalog)
    if not principal.may_use(model):
        found = [candidate for candidate in found if principal.may_use(public_id(candidate))]
        if not found:
            raise ModelNotAllowed(f"This key may not use the model '{model}'.", param="model")
    if not found:
        raise ModelNotFound(f"The model '{model}' does not exist or you do not have access to it.", param="model")
    if callers_key:
        found = [candidate for candidate in found if candidate[0].pass_through]
        if not found:
            raise InvalidRequest("No upstream of this model accepts a key of the caller's own.", code="upstream_key_not_allowed")
    return [_target(candidate, callers_key) for candidate in health.order(found)]


def resolve(principal: Principal, model: str, catalog: Catalog) -> list[Candidate]:
    """Every credential that could serve this name, in no particular order within one model."""
    alias = catalog.alias(model, principal)
    if alias is not None:
        return _of_models(principal, alias.targets, catalog)
    found = _of_models(principal, [model], catalog)
    if found:
        return found
    catch_all = catalog.alias("*", principal)
    return _of_models(principal, catch_all.targets, catalog) if catch_all is not None else []


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


def _of_models(principal: Principal, models: Sequence[str], catalog: Catalog) -> list[Candidate]:
    found: list[Candidate] = []
    for model in models:
        prefix, slash, upstream_id = model.partition("/")
        by_prefix: list[Candidate] = []
        if slash and upstream_id:
            # Lists go stale: an id that the pool does not list is passed on, unless the credential forbids it.
            by_prefix = [
                (upstream, upstream_id)
                for upstream in catalog.pool(prefix, principal)
                if upstream_id in upstream.models or not upstream.listed_only
            ]
            listing = [candidate for candidate in by_prefix if upstream_id in candidate[0].models]
            by_prefix = listing or by_prefix
        found += by_prefix or [
            (upstream, model)
            for prefix in catalog.prefixes_listing(model)
            for upstream in catalog.pool(prefix, principal)
            if model in upstream.models
        ]
    return found


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
