"""Simulated upstreams. A file here that plays the upstream of one kind joins `tests/providers/test_every_kind.py` with

    OFFER = Offer(kind="acme", simulator=AcmeUpstream, model="acme-large", secret="sk-sim-ok", can=frozenset({"tools", "usage"}))

at its end, and nothing else: files are found as the registry finds adapters, and the suite fails for an adapter
that has no offer. What the suite relies on, beyond the kit (`kit.py`):

- `simulator()` makes it, not yet started, a subclass of `kit.Simulator`; `base_url` is what an operator gives as `--base-url`;
  `reset()` forgets everything that an earlier test left behind.
- A step given by `script(Step(…))` is consumed by the one call that answers the client, never by what goes before it (lists of
  models, a sign-in, a chat id, an onboarding). Without a script that call is answered by `ok`.
- `Step(scenario="ok")` says `echo: ` and the words of the last user message; `Step(text=…)` says that instead.
- `tool_call` calls the first tool that was offered with `{"city": "Oslo"}`; `tool_calls_parallel` calls it twice in one answer, for
  Oslo and for Bergen; `reasoning` thinks before it speaks.
- `bad_key`, `forbidden`, `no_credit`, `rate_limit` (with `Retry-After: 2` where this upstream has that header), `overloaded` and
  `server_error` are answered in this upstream's own words; `html_502`, `html_200`, `eof_mid`, `error_frame`, `split_utf8` and
  `coalesced` come with the kit.
- `log` holds every request as it was received; `posts` those that were sent for a client. What the upstream would refuse is refused,
  and fields that it does not know stand in `Seen.unknown_fields`: the suite wants that empty.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.upstreams.kit import Simulator

# What an upstream can do. Whatever is not among an offer's words must be a clear 400 at the gateway.
CAPABILITIES = {
    "system": "messages of the role `system` reach the model, in whatever form",
    "tools": "calls of the client's functions, over several turns",
    "parallel_tools": "several calls in one answer",
    "structured": "`response_format` with a JSON schema",
    "images": "images as data URLs",
    "image_urls": "images as addresses, which the upstream fetches",
    "reasoning": "thoughts, as `reasoning_content`; without it `reasoning_effort` is refused (or stands in `drops`)",
    "usage": "counts tokens; without it the row is an estimate",
}


@dataclass(frozen=True)
class Offer:
    """How the upstream of one kind is reached in tests, and what it can."""

    kind: str
    simulator: Callable[[], Simulator]
    model: str
    can: frozenset[str]
    # What `add_credential` gets on stdin, and as `--set`. In both `{origin}` stands for the simulator's scheme, host and port.
    secret: str = "sk-sim-ok"
    settings: Mapping[str, str] = field(default_factory=dict)
    # Parameters that the adapter drops as its reference says, instead of refusing them. docs/providers/<kind>.md must name them.
    drops: frozenset[str] = frozenset()
    # Parameters that the adapter heeds by itself, since the upstream does not. The page must name them, too.
    done_here: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        unknown = self.can - CAPABILITIES.keys()
        assert not unknown, f"{self.kind}: these are no capabilities: {sorted(unknown)}"


@cache
def offers() -> dict[str, Offer]:
    """Kind -> its offer, from every file here that has one."""
    names = [found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("test_")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    found = [module.OFFER for module in modules if hasattr(module, "OFFER")]
    kinds = [offer.kind for offer in found]
    assert len(set(kinds)) == len(kinds), f"a kind has two offers: {sorted(kinds)}"
    return {offer.kind: offer for offer in found}
