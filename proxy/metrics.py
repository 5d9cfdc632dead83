"""What the requests of one worker amounted to: plain numbers, added up where they are known, and read only when somebody asks.

Every label comes from a closed set: endpoints, kinds of upstreams, our own failures and codes. No key, no person and no model is
one, so that neither a client nor an upstream can make more of them.
"""

from __future__ import annotations

import time
from bisect import bisect_left

from msgspec import Struct, field

from providers.price import Tokens
from proxy.call import Admission, Outcome

# Upper bounds in seconds. The last bucket of each has what is above.
WAITING = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
OUR_OWN = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
# Our own codes are some dozens. Past this they are counted together, whatever somebody made of them.
MOST_CODES = 200
OTHER = "other"
# What a status alone does not say. All other codes of an admitted call may be an upstream's words.
OWN_ERRORS = frozenset({"client_closed", "shutdown", "internal_error"})


class Spread(Struct):
    """A histogram: how many lie in each bucket, and their sum in seconds."""

    buckets: list[int]
    sum: float = 0.0

    @classmethod
    def over(cls, bounds: tuple[float, ...]) -> Spread:
        return cls([0] * (len(bounds) + 1))


class Tally(Struct):
    """All settled calls of one endpoint through one kind of upstream, streams and others apart."""

    statuses: dict[tuple[int, str], int] = field(default_factory=dict)  # (status, one of OWN_ERRORS or "")
    sources: dict[str, int] = field(default_factory=dict)  # reported, estimated, missing
    attempts: int = 0
    fresh_input: int = 0
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0
    cost: int = 0  # micro-dollars
    unpriced: int = 0
    duration: Spread = field(default_factory=lambda: Spread.over(WAITING))
    upstream: Spread = field(default_factory=lambda: Spread.over(WAITING))
    first_byte: Spread = field(default_factory=lambda: Spread.over(WAITING))
    added: Spread = field(default_factory=lambda: Spread.over(OUR_OWN))


Place = tuple[str, str, bool]  # endpoint, kind, whether it was a stream


class Metrics(Struct):
    """Belongs to the event loop, where it is also read."""

    tallies: dict[Place, Tally] = field(default_factory=dict)
    refused: dict[tuple[int, str], int] = field(default_factory=dict)  # before admission, by status and code
    failures: dict[tuple[str, str], int] = field(default_factory=dict)  # of upstreams, by kind and the class of failure
    open: int = 0  # admitted and not settled
    open_streams: int = 0
    at_home: int = 0  # calls of sticky pools that ended at the account that they are bound to
    elsewhere: int = 0  # and those that another one had to serve
    draining: int = 0  # of the open ones, those that go on for their bill alone: their clients have left

    def refuse(self, status: int, code: str) -> None:
        refused = self.refused
        if (status, code) not in refused and len(refused) >= MOST_CODES:
            code = OTHER
        refused[status, code] = refused.get((status, code), 0) + 1

    def upstream_failed(self, kind: str, failure: str) -> None:
        self.failures[kind, failure] = self.failures.get((kind, failure), 0) + 1

    def was_bound(self, *, at_home: bool) -> None:
        """A call of a sticky pool has ended."""
        self.at_home += at_home
        self.elsewhere += not at_home

    def begin(self, *, stream: bool) -> None:
        self.open += 1
        self.open_streams += stream

    def settle(self, admission: Admission, outcome: Outcome, tokens: Tokens, cost: int | None, source: str) -> None:
        """Exactly once for each `begin`."""
        now = time.monotonic()
        self.open -= 1
        self.open_streams -= admission.stream
        place = admission.endpoint, outcome.target.kind if outcome.target is not None else "", admission.stream
        tally = self.tallies.get(place)
        if tally is None:
            tally = self.tallies[place] = Tally()
        status = outcome.status, outcome.error if outcome.error in OWN_ERRORS else ""
        tally.statuses[status] = tally.statuses.get(status, 0) + 1
        tally.sources[source] = tally.sources.get(source, 0) + 1
        tally.attempts += outcome.attempts
        if cost is None:
            tally.unpriced += 1
        else:
            tally.cost += cost
        tally.fresh_input += tokens.fresh_input
        tally.output += tokens.output
        if tokens.cache_read or tokens.cache_write or tokens.reasoning:
            tally.cache_read += tokens.cache_read
            tally.cache_write += tokens.cache_write
            tally.reasoning += tokens.reasoning
        waited = outcome.waited_until(now)
        duration = now - outcome.read_at
        put(tally.duration, WAITING, duration)
        put(tally.upstream, WAITING, waited)
        put(tally.added, OUR_OWN, duration - waited)
        if outcome.first_byte is not None:
            put(tally.first_byte, WAITING, outcome.first_byte - outcome.read_at)


def put(spread: Spread, bounds: tuple[float, ...], seconds: float) -> None:
    spread.buckets[bisect_left(bounds, seconds)] += 1
    spread.sum += seconds
