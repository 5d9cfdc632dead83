"""May this call go ahead? One atomic step takes the limits' holds; then the journal is told, before any upstream is."""

from __future__ import annotations

import time
from collections.abc import Sequence

from accounts.principal import Principal
from providers.adapter import Target
from providers.secrets import redact
from providers.wire import MOST_TOKENS, Json
from proxy.call import Admission, Asked, Incoming, Outcome
from proxy.catalog import Catalog
from proxy.errors import Unavailable
from proxy.journal import Admitted, Journal, JournalFull
from proxy.stores.limits import Hold, LimitStore

# What is held for a model's output when the client sets no ceiling; and the most that a model writes, by what vendors document,
# which is held where another call is under way under the same hard budget: what is spent beyond it is one request's excess at most.
OUTPUT_WHEN_UNSAID, OUTPUT_AT_MOST = 4_096, 131_072
# A picture's tokens do not follow from its bytes. This is the most that a vendor documents for one: OpenAI's gpt-4o-mini counts
# 2 833 and 5 667 for each tile, of which there are eight at most.
PICTURE_TOKENS = 2_833 + 8 * 5_667


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
    estimate = estimated_input(asked.size)
    request_id, model = incoming.id, redact.name(asked.model)  # a client may have put its key there
    outcome.granted = await limits.reserve(hold_of(request_id, incoming.at, principal, asked, targets, catalog))
    try:
        write_down(incoming, principal, asked, model, targets[0], estimate, catalog, journal)
    except BaseException:
        limits.settle(request_id, 0, 0)
        raise
    return Admission(
        request_id=incoming.id,
        at_ms=incoming.at_ms,
        principal=principal,
        endpoint=asked.endpoint,
        model=model,
        stream=asked.stream,
        input_estimate=estimate,
        started=time.monotonic(),
    )


def hold_of(request_id: str, at: float, principal: Principal, asked: Asked, targets: Sequence[Target], catalog: Catalog) -> Hold:
    """The most that the call may use, of everything that may be limited."""
    ceiling = asked.head.ceiling()
    # A client may allow more than any upstream can say it has used; what is held for it must still fit into Redis's integers.
    choices = asked.head.choices()
    output = min((OUTPUT_WHEN_UNSAID if ceiling is None else max(0, ceiling)) * choices, MOST_TOKENS)
    size = asked.size + pictures_in(asked.body) * PICTURE_TOKENS
    money = dearest(targets, catalog, at, size, output) if principal.limits else 0
    most = None
    if ceiling is None and any(limit.metric == "money" for limit in principal.limits):
        most = dearest(targets, catalog, at, size, min(OUTPUT_AT_MOST * choices, MOST_TOKENS))
    return Hold(
        request_id=request_id,
        at=at,
        scopes=principal.scopes,
        limits=principal.limits,
        tokens=estimated_input(asked.size) + (output if ceiling is not None else 0),
        money=money,
        most=most if most != money else None,
    )


def write_down(
    incoming: Incoming, principal: Principal, asked: Asked, model: str, first: Target, estimate: int, catalog: Catalog, journal: Journal
) -> None:
    """No record, no call. Raises Unavailable when the journal takes no more."""
    price = catalog.prices.find(first.public_model, incoming.at)
    try:
        journal.admitted(
            Admitted(
                request_id=incoming.id,
                at=incoming.at_ms,
                organization=principal.organization_id,
                team=principal.team_id,
                user=principal.user_id,
                key=principal.key_id,
                model=model,
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


def pictures_in(body: Json) -> int:
    """How many pictures a chat or a response is asked about."""
    messages = body.get("messages") or body.get("input")
    pictures = 0
    for message in messages if isinstance(messages, list) else ():
        parts = message.get("content") if isinstance(message, dict) else None
        if isinstance(parts, list):
            pictures += sum(isinstance(part, dict) and part.get("type") in ("image_url", "input_image") for part in parts)
    return pictures


def dearest(targets: Sequence[Target], catalog: Catalog, at: float, size: int, output: int) -> int | None:
    """The most that any of the targets could charge, in micro-dollars; None when one has no price.

    `size`: the most tokens of its input. A token has at least one byte, so the size of the body bounds those of text."""
    most = 0
    for target in targets:
        price = catalog.prices.find(target.public_model, at)
        if price is None:
            return None
        most = max(most, price.most(size, output))
    return most
