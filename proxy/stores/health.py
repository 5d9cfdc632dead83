"""How the upstreams fare, in the memory of one process: it orders candidates and never empties the list.

403, 404 and 429 rest one model of a credential; a refused credential or an ejection rests all of it. A rest that the
upstream itself named is kept to; one that we chose is only a preference. After an ejection one call is let
through first, and the others follow when it has gone well.

Each process finds out for itself, and is told what others found out. It ejects never more than half of a pool, counting those that it
heard of; what two find out at the same moment may be more. Nobody is lost by that: who rests is still tried last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from providers.adapter import Target
from providers.failures import (
    CredentialRefused,
    ForbiddenAtUpstream,
    ModelGone,
    ModelNotHere,
    NotRenewed,
    OutOfCredit,
    RateLimited,
    UpstreamFailed,
    UpstreamFailure,
    gateway_error,
)
from providers.wire import ApiError
from proxy.errors import OverBudget, OverLimit
from proxy.stores.stickiness import Bound, Candidate, in_order, together

IGNORED_REST_SECONDS = 5.0  # a rest this short is no reason to refuse a call
REST_SECONDS = {
    NotRenewed: IGNORED_REST_SECONDS,
    RateLimited: 10.0,
    ForbiddenAtUpstream: 60.0,
    ModelGone: 60.0,
    ModelNotHere: 60.0,
    OutOfCredit: 300.0,
    CredentialRefused: 300.0,
}
EJECT_AFTER = 5  # gateway errors in a row
EJECTION_SECONDS = 30.0
MOST_EJECTIONS = 10  # each in a row lasts longer by as much as the first did, up to so many
PROBE_SECONDS = 30.0  # the outcome of a trial call is waited for so long
EJECTED, PROBING = "ejected", "probing"
# Extra attempts after an upstream's own failures, in one second: a storm of them would keep it down.
EXTRA_SHARE, EXTRA_AT_LEAST = 0.2, 3
ALL_MODELS = ""
MOST_RESTS = 4096


@dataclass(frozen=True, slots=True)
class Rest:
    until: float  # monotonic
    named: bool  # the upstream said how long
    reason: str  # the failure's code


class Attempts:
    """How often one account was called in this second and the one before."""

    __slots__ = ("before", "extra", "first", "second")

    def __init__(self) -> None:
        self.second = self.first = self.before = self.extra = 0

    def at(self, second: int) -> Attempts:
        if second != self.second:
            self.before = self.first if second == self.second + 1 else 0
            self.second, self.first, self.extra = second, 0, 0
        return self

    def may_be_more(self) -> bool:
        return self.extra < max(EXTRA_AT_LEAST, int(EXTRA_SHARE * max(self.first, self.before)))


# Credential, model, seconds, named by the upstream, why, and how many ejections in a row it is (0: none).
Told = Callable[[int, str, float, bool, str, int], None]
Ended = Callable[[int, str, float], None]  # credential, model, and for how many seconds it would still have rested


class Health:
    """`told` is called with each rest that this process finds out, and `ended` with each that a call which went well has ended:
    others want to know."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, told: Told | None = None, *, ejection_seconds: float = EJECTION_SECONDS
    ) -> None:
        self._clock = clock
        self._ejection_seconds = ejection_seconds
        self.told = told
        self.ended: Ended | None = None
        self._attempts: dict[int, Attempts] = {}
        self._rests: dict[tuple[int, str], Rest] = {}
        self._errors: dict[int, int] = {}
        self._ejections: dict[int, int] = {}
        self._turns: dict[Hashable, float] = {}  # smooth weighted round robin, of credentials by id and of an alias's targets
        self._no_usage_option: set[tuple[int, str]] = set()

    def order(self, groups: Sequence[Sequence[Candidate]], *, own_key: bool = False, bound: Bound | None = None) -> list[Candidate]:
        """Candidates as they should be tried: group after group; within one by priority, taking turns; resting ones last.

        With the caller's own key only an ejection counts: the other rests are about our accounts. `bound` says what calls of a
        sticky pool stay together by; without it, or where it says nothing, its accounts take turns like others.

        Raises OverLimit or OverBudget when every one rests for longer than 5 s because its upstream said so."""
        if not self._rests:
            return [one for group in groups for one in self._by_turns(group, bound)]
        now = self._clock()
        healthy: list[Candidate] = []
        resting: list[tuple[float, Candidate]] = []
        refused: list[Rest] = []
        probe: list[Candidate] = []
        for group in groups:
            well: list[Candidate] = []
            for one in group:
                if not probe and self._is_due(one[0].id, now):
                    probe.append(one)
                    continue
                rest = self._rest_of(one[0].id, one[1], now)
                if rest is None or (own_key and rest.reason not in (EJECTED, PROBING)):
                    well.append(one)
                elif rest.named and rest.until - now > IGNORED_REST_SECONDS:
                    refused.append(rest)
                else:
                    resting.append((rest.until, one))
            healthy += self._by_turns(well, bound)
        if refused and not healthy and not resting and not probe:
            raise self._all_rest(refused, now)
        return probe + healthy + [one for _, one in sorted(resting, key=itemgetter(0))]

    def begins(self, target: Target) -> None:
        """The first attempt of a request. One with the caller's own key counts as any other: the same upstream bears it."""
        self._attempts_at(target).first += 1

    def was_not_called(self, target: Target) -> None:
        """The first of an order, after all. If that call was to find out how an ejected account fares, the next one is."""
        rest = self._rests.get((target.credential_id, ALL_MODELS))
        if rest is not None and rest.reason == PROBING:
            self._rests[(target.credential_id, ALL_MODELS)] = Rest(self._clock(), False, PROBING)

    def may_try_again(self, target: Target) -> bool:
        """Whether another attempt may go to this target after an upstream's own failure; then it is counted."""
        attempts = self._attempts_at(target)
        if not attempts.may_be_more():
            return False
        attempts.extra += 1
        return True

    def _attempts_at(self, target: Target) -> Attempts:
        attempts = self._attempts.get(target.credential_id)
        if attempts is None:
            attempts = self._attempts[target.credential_id] = Attempts()
        return attempts.at(int(self._clock()))

    def rest(self, credential_id: int, model: str, seconds: float, *, named: bool, reason: str, times: int = 0) -> None:
        """Somebody else found out that it rests, or this account was ejected before a restart: then one call more that fails ejects it
        again, for longer. Without seconds left a trial is due."""
        if len(self._rests) >= MOST_RESTS and model != ALL_MODELS and (credential_id, model) not in self._rests:
            return
        self._rests[(credential_id, model)] = Rest(self._clock() + seconds, named, reason)
        if times:
            self._ejections[credential_id] = times
            self._errors[credential_id] = max(self._errors.get(credential_id, 0), EJECT_AFTER - 1)

    def wake(self, credential_id: int, model: str) -> None:
        """This rest is over. With one of the whole account goes what was counted against it: it begins anew."""
        self._rests.pop((credential_id, model), None)
        if model == ALL_MODELS:
            self._errors.pop(credential_id, None)
            self._ejections.pop(credential_id, None)

    def succeeded(self, target: Target) -> None:
        self._errors.pop(target.credential_id, None)
        if self._rests:
            if target.callers_key and not self._is_out(target.credential_id):
                return  # the caller's own account says nothing about ours; but the upstream is well again
            self._ejections.pop(target.credential_id, None)
            self._end(target.credential_id, ALL_MODELS)
            self._end(target.credential_id, target.model)

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
            wait = problem.retry_after_seconds if problem.retry_after_seconds is not None else seconds
            self._set(account, model, wait, named, problem.code or "")
        elif gateway_error(problem):
            if problem.retry_after_seconds:
                self._set(account, target.model, problem.retry_after_seconds, False, problem.code or "")
            self._errors[account] = self._errors.get(account, 0) + 1
            if self._errors[account] >= EJECT_AFTER and not self._waits(account, now) and self._may_eject(account, pool, now):
                times = self._ejections[account] = self._ejections.get(account, 0) + 1
                self._set(account, ALL_MODELS, self._ejection_seconds * min(times, MOST_EJECTIONS), False, EJECTED, times)

    def take_turns(self, weights: Sequence[tuple[Hashable, int]]) -> list[int]:
        """These, each named by something that stays the same, by weight in turns: their places in the order for this call."""
        turns = self._turns
        for name, weight in weights:
            turns[name] = turns.get(name, 0.0) + weight
        order = sorted(range(len(weights)), key=lambda place: turns[weights[place][0]], reverse=True)
        turns[weights[order[0]][0]] -= sum(weight for _, weight in weights)
        return order

    def copy(self) -> Health:
        """The same state of things, to try something with that must not count."""
        twin = Health(self._clock)
        twin._rests, twin._errors, twin._ejections = dict(self._rests), dict(self._errors), dict(self._ejections)
        twin._turns, twin._no_usage_option = dict(self._turns), set(self._no_usage_option)
        return twin

    def resting(self) -> dict[tuple[int, str], float]:
        """Who rests, as (credential, model or ALL_MODELS), and for how many seconds still."""
        now = self._clock()
        return {key: rest.until - now for key, rest in self._rests.items() if rest.until > now}

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

    def _set(self, account: int, model: str, seconds: float, named: bool, reason: str, times: int = 0) -> None:
        self._rests[(account, model)] = Rest(self._clock() + seconds, named, reason)
        if self.told is not None:
            self.told(account, model, seconds, named, reason, times)

    def _end(self, account: int, model: str) -> None:
        rest = self._rests.pop((account, model), None)
        if rest is not None and self.ended is not None:
            self.ended(account, model, rest.until - self._clock())

    def _rest_of(self, credential_id: int, model: str, now: float) -> Rest | None:
        found: Rest | None = None
        for key in ((credential_id, ALL_MODELS), (credential_id, model)):
            rest = self._rests.get(key)
            if rest is not None and rest.until <= now and rest.reason not in (EJECTED, PROBING):
                del self._rests[key]
            elif rest is not None and (found is None or (rest.named, rest.until) > (found.named, found.until)):
                found = rest
        return found

    def _is_due(self, credential_id: int, now: float) -> bool:
        """Whether this call is the one that finds out how an ejected account fares; then the others wait for it."""
        rest = self._rests.get((credential_id, ALL_MODELS))
        if rest is None or rest.until > now or rest.reason not in (EJECTED, PROBING):
            return False
        self._rests[(credential_id, ALL_MODELS)] = Rest(now + PROBE_SECONDS, False, PROBING)
        return True

    def _all_rest(self, rests: Sequence[Rest], now: float) -> ApiError:
        first = min(rests, key=lambda rest: rest.until)
        wait = first.until - now
        if first.reason == OutOfCredit.code:
            return OverBudget("The upstream accounts for this model are out of quota.", retry_after_seconds=wait)
        return OverLimit("The upstream asked to wait before this model is called again.", retry_after_seconds=wait)

    def _may_eject(self, account: int, pool: Sequence[int], now: float) -> bool:
        out = sum(1 for other in pool if other != account and self._ejected(other, now))
        return 2 * (out + 1) <= len(pool)

    def _is_out(self, account: int) -> bool:
        rest = self._rests.get((account, ALL_MODELS))
        return rest is not None and rest.reason in (EJECTED, PROBING)

    def _ejected(self, account: int, now: float) -> bool:
        return self._is_out(account) and self._rests[(account, ALL_MODELS)].until > now

    def _waits(self, account: int, now: float) -> bool:
        """For its trial: a call that fails meanwhile was under way before, or had nobody else, and says nothing new."""
        rest = self._rests.get((account, ALL_MODELS))
        return rest is not None and rest.reason == EJECTED and rest.until > now

    def _by_turns(self, candidates: Sequence[Candidate], bound: Bound | None) -> list[Candidate]:
        if len(candidates) < 2:
            return list(candidates)
        best = max(upstream.priority for upstream, _ in candidates)
        first = [one for one in candidates if one[0].priority == best]
        rest = [one for one in candidates if one[0].priority < best]
        if len(first) > 1:
            if bound is not None and (name := together(first, bound)):
                first = in_order(first, name)
            else:
                places = self.take_turns([(upstream.id, upstream.weight) for upstream, _ in first])
                first = [first[place] for place in places]
        return first + (self._by_turns(rest, bound) if rest else [])
