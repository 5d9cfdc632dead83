"""Reads of upstream accounts: how they stand."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from django.db.models import Count, QuerySet

from providers.models import Credential, OAuthToken, Price, State
from providers.price import PriceBook
from providers.tokens import problem_of


@dataclass(frozen=True, slots=True)
class Standing:
    """How an account stands. `state`: active, expiring, needs_reauth or disabled; `problem` is a sentence, or empty.

    Expiring means that it still works, and will not for long unless somebody does something. The times are those of its sign-in,
    None where it has a plain secret."""

    state: str
    problem: str
    error: str  # the code of the last failure to renew its sign-in
    signed_in: bool
    expires_at: datetime | None = None
    refreshed_at: datetime | None = None
    next_refresh_at: datetime | None = None


def accounts() -> QuerySet[Credential]:
    """Every account with its tokens and the number of its models (`models_listed`)."""
    related = ("organization", "user", "policy_accepted_by", "token")
    return Credential.objects.select_related(*related).annotate(models_listed=Count("models"))


def standing_of(credential: Credential) -> Standing:
    token = token_of(credential)
    if token is None:
        return Standing(credential.state, credential.last_error, "", signed_in=False)
    expiring = credential.state == State.ACTIVE and bool(token.failures or (token.expires_at and not token.refresh))
    return Standing(
        state="expiring" if expiring else credential.state,
        problem=problem_of(token.last_error) or credential.last_error,
        error=token.last_error,
        signed_in=True,
        expires_at=token.expires_at,
        refreshed_at=token.refreshed_at,
        next_refresh_at=token.next_refresh_at,
    )


def price_book() -> PriceBook:
    return PriceBook(row.in_memory() for row in Price.objects.all())


def token_of(credential: Credential) -> OAuthToken | None:
    """The tokens that it is called with; None where it has a plain secret, or none yet."""
    return None if credential.secret else getattr(credential, "token", None)
