"""How the upstreams fare, in the memory of one process: it orders candidates and never empties the list.

403, 404 and 429 rest one model of a credential; a refused credential or an ejection rests all of it. A rest that the
upstream itself named is kept to; one that we chose is only a preference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from providers.adapter import Target
from providers.failures import (
    CredentialRefused,
    ForbiddenAtUpstream,
    ModelGone,
    OutOfCredit,
    RateLimited,
    UpstreamFailed,
    UpstreamFailure,
    gateway_error,
)
from providers.wire import ApiError
from proxy.catalog import Upstream
from proxy.errors import OverBudget, OverLimit

IGNORED_REST_SECONDS = 5.0  # a rest this short is no reason to refuse a call
REST_SECONDS = {RateLimited: 10.0, ForbiddenAtUpstream: 60.0, ModelGone: 60.0, OutOfCredit: 300.0, CredentialRefused: 300.0}
EJECT_AFTER = 5  # gateway errors in a row
EJECTION_SECONDS, LONGEST_EJECTION_SECONDS = 30.0, 300.0
ALL_MODELS = ""
MOST_RESTS = 4096

Candidate = tuple[Upstream, str]  # a credential, and the model's name there


@dataclass(frozen=True, slots=True)
class Rest:
    until: float  # monotonic
    named: bool  # the upstream said how long
    reason: str  # the failure's code


class Health:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rests: dict[tuple[int, str], Rest] = {}
        self._errors: dict[int, int] = {}
        self._ejections: dict[int, int] = {}
        self._turns: dict[int, float] = {}  # smooth weighted round robin
        self._no_usage_option: set[tuple[int, str]] = set()

    def order(self, groups: Sequence[Sequence[Candidate]]) -> list[Candidate]:
        """Candidates as they should be tried: group after group; within one by priority, taking turns; resting ones last.

        Raises OverLimit or OverBudget when every one rests for longer than 5 s because its upstream said so."""
        if not self._rests:
            return [one for group in groups for one in self._by_turns(group)]
        now = self._clock()
        healthy: list[Candidate] = []
        resting: list[tuple[float, Candidate]] = []
        refused: list[Rest] = []
        for group in groups:
            well: list[Candidate] = []
            for one in group:
                rest = self._rest_of(one[0].id, one[1], now)
                if rest is None:
                    well.append(one)
                elif rest.named and rest.until - now > IGNORED_REST_SECONDS:
                    refused.append(rest)
                else:
                    resting.append((rest.until, one))
            healthy += self._by_turns(well)
        if refused and not healthy and not resting:
            raise self._all_rest(refused, now)
        return healthy + [one for _, one in sorted(resting, key=itemgetter(0))]

    def succeeded(self, target: Target) -> None:
        self._errors.pop(target.credential_id, None)
        if self._rests:
            self._ejections.pop(target.credential_id, None)
            self._rests.pop((target.credential_id, ALL_MODELS), None)
            self._rests.pop((target.credential_id, target.model), None)

    def failed(self, target: Target, problem: UpstreamFailure, pool: Sequence[int]) -> None:
        """Take note of a failure. `pool`: the ids of all credentials that could have served this call."""
        if target.callers_key:
            return  # the caller's own account says nothing about ours
        now, account = self._clock(), target.credential_id
        if len(self._rests) >= MOST_RESTS:  # clients make up names of models; what matters most is kept
            self._rests = {key: rest for key, rest in self._rests.items() if rest.until > now and key[1] == ALL_MODELS}
        model = ALL_MODELS if isinstance(problem, UpstreamFailed) and problem.whole_account else target.model
        seconds = next((rest for kind, rest in REST_SECONDS.items() if isinstance(problem, kind)), None)
        if seconds is not None:
            named = problem.retry_after_seconds is not None
            until = now + (problem.retry_after_seconds if problem.retry_after_seconds is not None else seconds)
            self._rests[(account, model)] = Rest(until, named, problem.code or "")
        elif gateway_error(problem):
            if problem.retry_after_seconds:
                self._rests[(account, target.model)] = Rest(now + problem.retry_after_seconds, False, problem.code or "")
            self._errors[account] = self._errors.get(account, 0) + 1
            if self._errors[account] >= EJECT_AFTER and self._may_eject(account, pool, now):
                times = self._ejections[account] = self._ejections.get(account, 0) + 1
                self._rests[(account, ALL_MODELS)] = Rest(now + min(EJECTION_SECONDS * times, LONGEST_EJECTION_SECONDS), False, "ejected")

    def clear(self, credential_id: int) -> None:
        for key in [key for key in self._rests if key[0] == credential_id]:
            del self._rests[key]
        self._errors.pop(credential_id, None)
        self._ejections.pop(credential_id, None)

    def takes_usage_option(self, target: Target) -> bool:
        return (target.credential_id, target.model) not in self._no_usage_option

    def refuses_usage_option(self, target: Target) -> None:
        if len(self._no_usage_option) >= MOST_RESTS:
            self._no_usage_option.clear()
        self._no_usage_option.add((target.credential_id, target.model))

    def _rest_of(self, credential_id: int, model: str, now: float) -> Rest | None:
        found: Rest | None = None
        for key in ((credential_id, ALL_MODELS), (credential_id, model)):
            rest = self._rests.get(key)
            if rest is not None and rest.until <= now:
                del self._rests[key]
            elif rest is not None and (found is None or (rest.named, rest.until) > (found.named, found.until)):
                found = rest
        return found

    def _all_rest(self, rests: Sequence[Rest], now: float) -> ApiError:
        first = min(rests, key=lambda rest: rest.until)
        wait = first.until - now
        if first.reason == OutOfCredit.code:
            return OverBudget("The upstream accounts for this model are out of quota.", retry_after_seconds=wait)
        return OverLimit("The upstream asked to wait before this model is called again.", retry_after_seconds=wait)

    def _may_eject(self, account: int, pool: Sequence[int], now: float) -> bool:
        out = sum(1 for other in pool if other != account and self._ejected(other, now))
        return 2 * (out + 1) <= len(pool)

    def _ejected(self, account: int, now: float) -> bool:
        rest = self._rests.get((account, ALL_MODELS))
        return rest is not None and rest.reason == "ejected" and rest.until > now

    def _by_turns(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        if len(candidates) < 2:
            return list(candidates)
        best = max(upstream.priority for upstream, _ in candidates)
        first = [one for one in candidates if one[0].priority == best]
        rest = [one for one in candidates if one[0].priority < best]
        if len(first) > 1:
            total = sum(upstream.weight for upstream, _ in first)
            for upstream, _ in first:
                self._turns[upstream.id] = self._turns.get(upstream.id, 0.0) + upstream.weight
            first.sort(key=lambda one: self._turns[one[0].id], reverse=True)
            self._turns[first[0][0].id] -= total
        return first + (self._by_turns(rest) if rest else [])
