"""What the hot path reads of the database: callers, pools of upstreams, aliases and prices, in memory and immutable.

`snapshot.py` builds it from rows and publishes a new one; a request keeps the one it began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from accounts.principal import Limit, Principal
from providers.price import PriceBook
from providers.secrets import SecretText


@dataclass(frozen=True, slots=True)
class Upstream:
    """One credential as the hot path knows it."""

    id: int
    kind: str
    label: str
    prefix: str
    base_url: str
    secret: SecretText
    organization_id: int | None = None  # None = shared by everybody
    user_id: int | None = None
    weight: int = 1
    priority: int = 0  # higher goes first
    models: frozenset[str] = frozenset()  # what it listed
    listed_only: bool = False
    pass_through: bool = False  # callers may bring their own secret
    settings: Mapping[str, str] = field(default_factory=dict)

    def serves(self, principal: Principal) -> bool:
        return (self.organization_id is None or self.organization_id == principal.organization_id) and (
            self.user_id is None or self.user_id == principal.user_id
        )


@dataclass(frozen=True, slots=True)
class Alias:
    """A name of our own for an ordered list of models."""

    name: str
    targets: tuple[str, ...]
    organization_id: int | None = None


@dataclass(frozen=True)
class Catalog:
    version: int = 0
    peppers: tuple[bytes, ...] = ()
    principals: Mapping[bytes, Principal] = field(default_factory=dict)  # by digest of the key
    upstreams: tuple[Upstream, ...] = ()
    aliases: tuple[Alias, ...] = ()
    prices: PriceBook = field(default_factory=PriceBook)

    def __post_init__(self) -> None:
        pools: dict[str, list[Upstream]] = {}
        prefixes_by_model: dict[str, list[str]] = {}
        for upstream in self.upstreams:
            pools.setdefault(upstream.prefix, []).append(upstream)
            for model in upstream.models:
                prefixes = prefixes_by_model.setdefault(model, [])
                if upstream.prefix not in prefixes:
                    prefixes.append(upstream.prefix)
        object.__setattr__(self, "_pools", pools)
        object.__setattr__(self, "_prefixes_by_model", prefixes_by_model)
        object.__setattr__(self, "_aliases", {(alias.organization_id, alias.name): alias for alias in self.aliases})

    def pool(self, prefix: str, principal: Principal) -> list[Upstream]:
        """The credentials with this prefix that may serve this caller."""
        pools: dict[str, list[Upstream]] = self._pools  # type: ignore[attr-defined]
        return [upstream for upstream in pools.get(prefix, ()) if upstream.serves(principal)]

    def prefixes_listing(self, model: str) -> list[str]:
        prefixes: dict[str, list[str]] = self._prefixes_by_model  # type: ignore[attr-defined]
        return prefixes.get(model, [])

    def alias(self, name: str, principal: Principal) -> Alias | None:
        """An organization's own alias goes before a shared one of the same name."""
        aliases: dict[tuple[int | None, str], Alias] = self._aliases  # type: ignore[attr-defined]
        return aliases.get((principal.organization_id, name)) or aliases.get((None, name))

    def money_limits(self) -> set[Limit]:
        return {limit for principal in self.principals.values() for limit in principal.limits if limit.metric == "money"}


class Current:
    """Holds the catalog in force. Swapped whole by the refresher, read once by each request."""

    def __init__(self, catalog: Catalog | None = None) -> None:
        self.catalog = catalog or Catalog()
