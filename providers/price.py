"""What a call costs: pure arithmetic on integer micro-dollars. No Django here.

A price is in micro-dollars per million tokens, which is the same number as picodollars a token. Cost is rounded
half up once per request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from msgspec import Struct

MILLION = 1_000_000


class Tokens(Struct, frozen=True, gc=False):
    """Disjoint parts of one request's tokens: their sum is what the upstream counted. And what it says that they cost."""

    fresh_input: int = 0
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0  # without reasoning
    reasoning: int = 0
    upstream_cost: int | None = None  # micro-dollars; None = it does not say

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.fresh_input + other.fresh_input,
            self.cache_read + other.cache_read,
            self.cache_write + other.cache_write,
            self.output + other.output,
            self.reasoning + other.reasoning,
            self.upstream_cost if other.upstream_cost is None else (self.upstream_cost or 0) + other.upstream_cost,
        )

    @property
    def input(self) -> int:
        return self.fresh_input + self.cache_read + self.cache_write

    @property
    def all_output(self) -> int:
        return self.output + self.reasoning

    @property
    def total(self) -> int:
        return self.input + self.all_output


class Rates(Struct, frozen=True, gc=False):
    """Micro-dollars per million tokens; None = the same as plain input."""

    input: int
    output: int
    cache_read: int | None = None
    cache_write: int | None = None

    def cost(self, tokens: Tokens) -> int:
        """Micro-dollars, rounded half up."""
        cache_read = self.input if self.cache_read is None else self.cache_read
        cache_write = self.input if self.cache_write is None else self.cache_write
        pico = (
            tokens.fresh_input * self.input
            + tokens.cache_read * cache_read
            + tokens.cache_write * cache_write
            + tokens.all_output * self.output
        )
        return (2 * pico + MILLION) // (2 * MILLION)

    def most(self, input_tokens: int, output_tokens: int) -> int:
        dearest = max(self.input, self.cache_read or 0, self.cache_write or 0)
        return -(-(input_tokens * dearest + output_tokens * self.output) // MILLION)


@dataclass(frozen=True, slots=True)
class Price:
    """One dated row. Amounts are micro-dollars per million tokens; None = the same as plain input.

    Many vendors ask more for the whole of a request whose input is long: `long` holds above `long_above` input tokens."""

    id: int
    pattern: str
    starts_at: float  # seconds since the epoch
    input: int
    output: int
    cache_read: int | None = None
    cache_write: int | None = None
    by_hand: bool = True  # a row from an admin beats one from the price package
    long_above: int | None = None
    long: Rates | None = None
    usual: Rates = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "usual", Rates(self.input, self.output, self.cache_read, self.cache_write))

    def rates(self, input_tokens: int) -> Rates:
        if self.long is not None and self.long_above is not None and input_tokens > self.long_above:
            return self.long
        return self.usual

    def cost(self, tokens: Tokens) -> int:
        """Micro-dollars, rounded half up."""
        return self.rates(tokens.input).cost(tokens)

    def most(self, input_tokens: int, output_tokens: int) -> int:
        """The dearest this call can come to, in micro-dollars: what is held for it."""
        if self.long is None or self.long_above is None or input_tokens <= self.long_above:
            return self.usual.most(input_tokens, output_tokens)
        # It may turn out shorter than it could be, and the usual rates may be the dearer ones.
        return max(self.long.most(input_tokens, output_tokens), self.usual.most(self.long_above, output_tokens))


class PriceBook:
    """Finds the row for a public model id at a time: by hand before the package, the closest pattern, the latest start."""

    MOST_REMEMBERED = 10_000

    def __init__(self, prices: Iterable[Price] = ()) -> None:
        # Of two rows with the same start the later one corrects the earlier.
        self._ranked = sorted(prices, key=lambda price: (price.by_hand, _closeness(price.pattern), price.starts_at, price.id), reverse=True)
        self._matching: dict[str, list[Price]] = {}

    def find(self, model: str, at: float) -> Price | None:
        matching = self._matching.get(model)
        if matching is None:
            if len(self._matching) >= self.MOST_REMEMBERED:
                self._matching.clear()
            matching = self._matching[model] = [price for price in self._ranked if _matches(price.pattern, model)]
        for price in matching:
            if price.starts_at <= at:
                return price
        return None


def _matches(pattern: str, model: str) -> bool:
    return fnmatchcase(model, pattern) if "*" in pattern else model == pattern


def _closeness(pattern: str) -> tuple[bool, int]:
    return ("*" not in pattern, len(pattern.replace("*", "")))
