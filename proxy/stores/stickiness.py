"""Which account of a sticky pool a call is bound to: its upstream then finds in its cache what the calls before brought there.

Nothing is remembered. Each account draws a number from its id and from what is to stay together, and the highest goes first (weighted
rendezvous hashing). So all processes agree, restarts change nothing, and an account that comes or goes moves only those
calls that are, or were, bound to it. It is soft: one that rests is passed over, and has its calls back when it is well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b

from accounts.principal import Principal
from providers.wire import Json
from proxy.catalog import Upstream

Candidate = tuple[Upstream, str]  # a credential, and the model's name there
Bound = Callable[[str], str]  # how a pool is sticky -> what this call stays together by; empty: by nothing

KEY = "key"  # else `how` is a field of the request


def bound_by(how: str, principal: Principal, body: Json) -> str:
    """What is to stay together, within one organization; empty where the call does not say."""
    value = principal.key_id if how == KEY else body.get(how)
    return f"{principal.organization_id} {how} {value}" if isinstance(value, str | int) and value != "" else ""


def together(pool: Sequence[Candidate], bound: Bound) -> str:
    """What this call stays together by in this pool, whose first account that says how speaks for all."""
    how = next((upstream.sticky for upstream, _ in pool if upstream.sticky), "")
    return bound(how) if how else ""


def in_order(pool: Sequence[Candidate], name: str) -> list[Candidate]:
    """The account that the calls of this name are bound to first, then the one they would be bound to without it, and so on."""
    return sorted(pool, key=lambda candidate: _drawn(candidate, name), reverse=True)


def home(pool: Sequence[Candidate], bound: Bound) -> int | None:
    """The account that this call is bound to, well or not; None where it is bound to none."""
    best = max(upstream.priority for upstream, _ in pool)
    pool = [one for one in pool if one[0].priority == best]
    name = together(pool, bound) if len(pool) > 1 else ""
    return in_order(pool, name)[0][0].id if name else None


def _drawn(candidate: Candidate, name: str) -> float:
    upstream, model = candidate
    drawn = int.from_bytes(blake2b(f"{upstream.id} {model} {name}".encode(errors="replace"), digest_size=6).digest())
    return upstream.weight / -math.log((drawn + 1) / ((1 << 48) + 1))
