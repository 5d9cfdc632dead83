"""Settle the hold and write down what the call used: exactly once, whatever happened. Nothing here waits."""

from __future__ import annotations

import time

from providers.price import Tokens
from providers.secrets import redact
from proxy.call import Admission, Outcome
from proxy.journal import Journal, Settled
from proxy.metrics import Metrics
from proxy.stores.limits import LimitStore

# Calls whose price does not follow from tokens that we could estimate.
_NOT_BY_TEXT = frozenset({"images/generations", "audio/speech"})


def meter(admission: Admission, outcome: Outcome, limits: LimitStore, journal: Journal, metrics: Metrics) -> None:
    tokens, source = counted(admission, outcome)
    unknown = source == "missing" and outcome.status < 400
    cost = outcome.price.cost(tokens) if outcome.price is not None and not unknown else None
    if cost is None and not tokens.total and not unknown:
        cost = 0  # nothing was used: that costs nothing at any price
    now, principal, target = time.monotonic(), admission.principal, outcome.target
    journal.settled(
        Settled(
            request_id=admission.request_id,
            at=admission.at_ms,
            organization=principal.organization_id,
            team=principal.team_id,
            user=principal.user_id,
            key=principal.key_id,
            model=admission.model,
            endpoint=admission.endpoint,
            stream=admission.stream,
            status=outcome.status,
            error=outcome.error,
            attempts=outcome.attempts,
            served_model=redact.name(target.public_model) if target else "",
            provider=target.kind if target else "",
            credential=target.credential_id if target else None,
            fresh_input=tokens.fresh_input,
            cache_read=tokens.cache_read,
            cache_write=tokens.cache_write,
            output=tokens.output,
            reasoning=tokens.reasoning,
            cost=cost,
            price=outcome.price.id if outcome.price is not None and cost is not None else None,
            upstream_cost=tokens.upstream_cost,
            usage_source=source,
            first_byte_ms=_milliseconds(admission.started, outcome.first_byte) if outcome.first_byte is not None else None,
            duration_ms=_milliseconds(admission.started, now),
            tried=outcome.tried,
        )
    )
    # What could not be priced keeps what was held for it, or a hard budget would never end.
    limits.settle(admission.request_id, tokens.total, cost)
    metrics.settle(admission, outcome, tokens, cost, source)


def counted(admission: Admission, outcome: Outcome) -> tuple[Tokens, str]:
    """The tokens of a call, and how they are known: reported, estimated or missing."""
    if outcome.tokens is not None:
        return outcome.tokens, "reported"
    if not outcome.reached or (admission.endpoint in _NOT_BY_TEXT and outcome.status < 400):
        return Tokens(), "missing"
    return Tokens(fresh_input=admission.input_estimate, output=outcome.output_estimate), "estimated"


def _milliseconds(start: float, end: float) -> int:
    return max(0, round((end - start) * 1000))
