"""What the hot path reads of the database: callers, pools of upstreams, aliases and prices, in memory and immutable.

`snapshot.py` builds it from rows and publishes a new one; a request keeps the one it began with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from accounts.principal import Limit, Principal
from providers.oauth import Lease
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
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # and what it said of each
    listed_only: bool = False
    pass_through: bool = False  # callers may bring their own secret
    callers_key_only: bool = False  # and have to: it has none of its own
    sticky: str = ""  # by what calls stay with one account of its pool: see stores/stickiness.py; empty: accounts take turns
    settings: Mapping[str, str] = field(default_factory=dict)
    lease: Lease | None = None  # the secret is an access token
    frozen_until: float = 0.0  # seconds since the epoch

    def is_as_it_was(self, before: Upstream) -> bool:
        """False when it may be another account now: given another secret, signed in again, or moved. A renewal changes nothing."""
        if self.base_url != before.base_url:
            return False
        if self.lease is None or before.lease is None:
            return self.lease is before.lease and self.secret == before.secret
        return self.lease.sign_in == before.lease.sign_in

    def serves(self, principal: Principal) -> bool:
        return (self.organization_id is None or self.organization_id == principal.organization_id) and (
            self.user_id is None or self.user_id == principal.user_id
        )


@dataclass(frozen=True, slots=True)
class Parameters:
    """What an alias does to the parameters of a request."""

    defaults: Mapping[str, Any] = field(default_factory=dict)  # where the client sent nothing
    overrides: Mapping[str, Any] = field(default_factory=dict)  # whatever the client sent
    drops: frozenset[str] = frozenset()  # not passed on

    def __bool__(self) -> bool:
        return bool(self.defaults or self.overrides or self.drops)


LONGEST_DRAIN_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Alias:
    """A name of our own for models in the order in which to try them.

    Those of one rank take turns by weight; without ranks each has its own. `prefix/*` is the pool's model of the name
    that the client sent."""

    name: str
    targets: tuple[str, ...]
    organization_id: int | None = None
    ranks: tuple[int, ...] = ()  # of each target, rising
    weights: tuple[int, ...] = ()  # of each target
    parameters: Parameters = field(default_factory=Parameters)
    drain_seconds: float = 0.0  # how long to read on when a client has left, for the bill; 0 = the upstream is cancelled at once

    @property
    def takes_turns(self) -> bool:
        return len(set(self.ranks)) < len(self.ranks)


@dataclass(frozen=True, slots=True)
class FrozenModel:
    """Nobody calls what this names, a public id or an alias, until then: seconds since the epoch."""

    pattern: str
    until: float
    organization_id: int | None = None


@dataclass(frozen=True)
class Catalog:
    version: int = 0
    peppers: tuple[bytes, ...] = ()
    principals: Mapping[bytes, Principal] = field(default_factory=dict)  # by digest of the key
    upstreams: tuple[Upstream, ...] = ()
    signed_out: tuple[Upstream, ...] = ()  # they serve nothing until a person signs them in again
    aliases: tuple[Alias, ...] = ()
    prices: PriceBook = field(default_factory=PriceBook)
    frozen: tuple[FrozenModel, ...] = ()
    # What `route` has worked out of all this, for as long as this is in force. It alone reads and fills them.
    routes: dict[tuple[int, str], Any] = field(init=False, compare=False, repr=False)
    targets: dict[tuple[int, str], Any] = field(init=False, compare=False, repr=False)
    thaws_at: float = field(init=False, compare=False, repr=False)  # when what was worked out of it is no longer true

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
        object.__setattr__(self, "routes", {})
        object.__setattr__(self, "thaws_at", 0.0)
        self.thaw(time.time())
        object.__setattr__(self, "targets", {})

    def thaw(self, now: float) -> None:
        """Forget what was worked out while something was frozen that is not any more."""
        moments = [upstream.frozen_until for upstream in self.upstreams] + [one.until for one in self.frozen]
        object.__setattr__(self, "thaws_at", min((moment for moment in moments if moment > now), default=math.inf))
        self.routes.clear()

    def frozen_until(self, name: str, principal: Principal, now: float) -> float:
        """Until when nobody may call this; 0 = it is not frozen."""
        return max(
            (
                one.until
                for one in self.frozen
                if one.until > now and one.organization_id in (None, principal.organization_id) and fnmatchcase(name, one.pattern)
            ),
            default=0.0,
        )

    def pool(self, prefix: str, principal: Principal) -> list[Upstream]:
        """The credentials with this prefix that may serve this caller."""
        pools: dict[str, list[Upstream]] = self._pools  # type: ignore[attr-defined]
        return [upstream for upstream in pools.get(prefix, ()) if upstream.serves(principal)]

    def is_signed_out(self, model: str, principal: Principal) -> bool:
        """Whether an account that has to be signed in again would serve this name, given as prefix/model or as a bare model."""
        prefix, slash, _ = model.partition("/")
        return any(one.serves(principal) and ((slash and one.prefix == prefix) or model in one.models) for one in self.signed_out)

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
