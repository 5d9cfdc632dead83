"""What operators are mailed about: accounts that have to sign in again, and pools in which nobody can serve.

`serve` looks every 30 s, and so does a Celery worker where there is one; `accounts/notices.py` keeps them from saying it twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta

from django.conf import settings
from django.db.models import QuerySet
from django.urls import reverse
from django.utils import timezone

from accounts.notices import tell
from providers.models import Credential, State
from providers.queries import standing_of
from proxy.catalog import Catalog, Upstream
from proxy.stores.health import ALL_MODELS

LOOK_EVERY_SECONDS = 30.0
LONG_REST_SECONDS = 60.0  # a shorter rest is everyday life

Rests = Mapping[tuple[int, str], float]  # (credential, model or ALL_MODELS) -> seconds


def look(exhausted: Mapping[str, float]) -> None:
    """`exhausted`: pools in whose memory everybody rests, and for how many seconds still. Raises DatabaseError."""
    for credential in _locked_out().order_by("pk"):
        _needs_reauth(credential)
    for pool in sorted(_without_anybody()):
        tell(
            "pool.exhausted",
            f"pool {pool}",
            f"No account can serve {pool}/*",
            f"Every account of the pool {pool} is out of service, and at least one has to sign in again. "
            f"Calls for {pool}/* are refused.\n\n"
            f"{_link('admin:providers_credential_changelist')}\n",
        )
    for pool, seconds in sorted(exhausted.items()):
        until = timezone.now() + timedelta(seconds=seconds)
        tell(
            "pool.exhausted",
            f"pool {pool}",
            f"All accounts of {pool} rest",
            f"Every account for {pool} is out of quota, limited or failing. The first one is tried again at "
            f"{until:%Y-%m-%d %H:%M} UTC. Until then calls for it are refused or fail.\n\n"
            f"{_link('admin:providers_credential_changelist')}\n",
        )


def _locked_out() -> QuerySet[Credential]:
    """Accounts that served and no longer do. Who adds one and has yet to sign it in knows that it serves nothing."""
    return Credential.objects.filter(state=State.NEEDS_REAUTH).exclude(secret=None, token=None)


def _needs_reauth(credential: Credential) -> None:
    problem = standing_of(credential).problem
    tell(
        "credential.needs_reauth",
        f"credential {credential.pk}",
        f"{credential.label} has to sign in again",
        f"The upstream account {credential.label} ({credential.kind}, serves {credential.prefix}/*) is no longer accepted, and serves "
        f"nothing until it has signed in again or was given a new secret."
        f"{' ' + problem if problem else ''}\n\n"
        f"{_link('admin:providers_credential_change', credential.pk)}\n",
    )


def _without_anybody() -> set[str]:
    """Pools that an account has left which has to sign in, and in which nobody is left. Switched off by hand is as meant."""
    waiting = set(_locked_out().values_list("prefix", flat=True))
    return waiting - set(Credential.objects.filter(state=State.ACTIVE, prefix__in=waiting).values_list("prefix", flat=True))


def exhausted(catalog: Catalog, rests: Rests) -> dict[str, float]:
    """Pools, or single models of them, whose accounts all rest for longer than a minute; the seconds until the first is back."""
    found: dict[str, float] = {}
    if not rests:
        return found
    pools: dict[str, list[Upstream]] = {}
    for upstream in catalog.upstreams:
        pools.setdefault(upstream.prefix, []).append(upstream)
    for prefix, members in pools.items():
        whole = _shortest(members, ALL_MODELS, rests)
        if whole > LONG_REST_SECONDS:
            found[prefix] = whole
            continue
        ids = {upstream.id for upstream in members}
        for model in sorted({model for number, model in rests if number in ids and model != ALL_MODELS}):
            # Clients make up names of models: only what somebody lists is worth a mail.
            serving = [upstream for upstream in members if model in upstream.models]
            if serving and (seconds := _shortest(serving, model, rests)) > LONG_REST_SECONDS:
                found[f"{prefix}/{model}"] = seconds
    return found


def _shortest(upstreams: Iterable[Upstream], model: str, rests: Rests) -> float:
    return min(max(rests.get((upstream.id, ALL_MODELS), 0.0), rests.get((upstream.id, model), 0.0)) for upstream in upstreams)


def _link(view: str, *arguments: object) -> str:
    return f"{settings.PUBLIC_URL}{reverse(view, args=arguments)}"
