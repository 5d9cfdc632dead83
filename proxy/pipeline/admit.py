"""May this call go ahead? One atomic step takes the limits' holds; then the journal is told, before any upstream is."""

from __future__ import annotations

import time
from collections.abc import Sequence

from accounts.principal import Principal
from providers.adapter import Target
from providers.secrets import redact
from proxy.call import Admission, Asked, Incoming, Outcome, milliseconds_of
from proxy.catalog import Catalog
from proxy.errors import Unavailable
from proxy.journal import Admitted, Journal, JournalFull
from proxy.stores.limits import Hold, LimitStore

# What is held for a model's output when the client sets no ceiling: the excess of one request at most.
OUTPUT_WHEN_UNSAID = 4096


async def admit(
    incoming: Incoming,
    principal: Principal,
    asked: Asked,
    targets: Sequence[Target],
    catalog: Catalog,
    limits: LimitStore,
    journal: Journal,
    outcome: Outcome,
) -> Admission:
    """Hold what the call may use and write it down. Raises OverLimit, OverBudget, UnpricedModel, Unavailable."""
    ceiling = asked.head.ceiling()
    output = (OUTPUT_WHEN_UNSAID if ceiling is None else max(0, ceiling)) * asked.head.choices()
    estimate = estimated_input(asked.size)
    request_id = incoming.id
    outcome.shadowed = await limits.reserve(
        Hold(
            request_id=request_id,
            at=incoming.at,
            scopes=scopes_of(principal),
            limits=principal.limits,
            tokens=estimate + (output if ceiling is not None else 0),
            money=dearest(targets, catalog, incoming.at, asked.size, output) if principal.limits else 0,
        )
    )
    try:
        write_down(incoming, principal, asked, targets[0], estimate, catalog, journal)
    except BaseException:
        limits.settle(request_id, 0, 0)
        raise
    return Admission(
        request_id=incoming.id,
        principal=principal,
        endpoint=asked.endpoint,
        model=redact.name(asked.model),
        stream=asked.stream,
        input_estimate=estimate,
        started=time.monotonic(),
    )


def write_down(
    incoming: Incoming, principal: Principal, asked: Asked, first: Target, estimate: int, catalog: Catalog, journal: Journal
) -> None:
    """No record, no call. Raises Unavailable when the journal takes no more."""
    price = catalog.prices.find(first.public_model, incoming.at)
    try:
        journal.admitted(
            Admitted(
                request_id=incoming.id,
                at=milliseconds_of(incoming.id),
                organization=principal.organization_id,
                team=principal.team_id,
                user=principal.user_id,
                key=principal.key_id,
                model=redact.name(asked.model),  # a client may have put its key there
                endpoint=asked.endpoint,
                stream=asked.stream,
                input_estimate=estimate,
                served_model=redact.name(first.public_model),
                provider=first.kind,
                credential=first.credential_id,
                price=price.id if price else None,
                cost_estimate=price.most(estimate, 0) if price else None,
            )
        )
    except JournalFull:
        raise Unavailable(
            "The gateway cannot record usage just now and takes no new requests.", code="journal_full", retry_after_seconds=5
        ) from None


def estimated_input(size: int) -> int:
    """Tokens in a body of this many bytes, at four bytes a token. No tokenizer runs here."""
    return -(-size // 4)


def dearest(targets: Sequence[Target], catalog: Catalog, at: float, size: int, output: int) -> int | None:
    """The most that any of the targets could charge, in micro-dollars; None when one has no price.

    A token has at least one byte, so the size of the body bounds its tokens."""
    most = 0
    for target in targets:
        price = catalog.prices.find(target.public_model, at)
        if price is None:
            return None
        most = max(most, price.most(size, output))
    return most


def scopes_of(principal: Principal) -> tuple[str, ...]:
    scopes = (
        f"organization:{principal.organization_id}",
        f"user:{principal.user_id}@{principal.organization_id}",
        f"key:{principal.key_id}",
    )
    return (*scopes, f"team:{principal.team_id}") if principal.team_id is not None else scopes
