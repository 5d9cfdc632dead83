"""Calls that were refused make no usage row, but are counted by key, code and hour: a page can say why a client fails."""

from __future__ import annotations

import time
from collections.abc import Iterable

from accounts.principal import Principal

COUNTED = frozenset({401, 402, 403, 404, 429})
HOUR = 3600

# (hour as seconds since the epoch, key id or 0 for none, status, code)
Refusal = tuple[int, int, int, str]


class Refusals:
    """Counters of one worker, taken by the ledger every few seconds."""

    def __init__(self) -> None:
        self._counts: dict[Refusal, int] = {}

    def count(self, principal: Principal | None, status: int, code: str) -> None:
        if status in COUNTED:
            key = (int(time.time()) // HOUR * HOUR, principal.key_id if principal else 0, status, code)
            counts = self._counts  # one look: the ledger's thread may put a new one in its place
            counts[key] = counts.get(key, 0) + 1

    def count_shadowed(self, principal: Principal, codes: Iterable[str]) -> None:
        for code in codes:
            self.count(principal, 429, code)

    def take(self) -> dict[Refusal, int]:
        counts, self._counts = self._counts, {}
        return counts

    def give_back(self, counts: dict[Refusal, int]) -> None:
        """They could not be stored: keep them for the next time."""
        for key, count in counts.items():
            self._counts[key] = self._counts.get(key, 0) + count
