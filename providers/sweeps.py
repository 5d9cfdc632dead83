"""What is done again and again beside the requests. `serve` calls these from a thread, a scheduler from a worker."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

from django.db import connection
from django.db.models import Q
from django.utils import timezone

from providers import tokens
from providers.actions import RETRY_AFTER, refresh_all
from providers.models import Credential, State
from providers.oauth import OAuthFailed, TryAgainLater
from providers.secrets import SealBroken

log = logging.getLogger(__name__)

# As many as one sweep asks at most: what is left is due at the next one.
MOST_AT_ONCE = 100
# Renewals under way at the same time. On Postgres each keeps a connection while its vendor is asked.
RENEWALS_AT_ONCE = 2


def refresh_due() -> int:
    """Ask every upstream whose list of models is due. How many were asked; failures are kept on the credential.

    Raises DatabaseError. Holds no transaction and no row while it waits for an upstream."""
    claimed = _claim()
    for credential, problem in refresh_all(claimed):
        if problem:
            log.warning("The models of credential %s (%s) could not be listed: %s", credential.pk, credential.label, problem)
    return len(claimed)


def _claim() -> list[Credential]:
    """Those that are due, put off at once: another process does not ask the same one, and a failure is not asked again soon."""
    now = timezone.now()
    due = Credential.objects.filter(Q(models_due_at=None) | Q(models_due_at__lte=now), state=State.ACTIVE)
    return [
        credential
        for credential in due.order_by("pk")[:MOST_AT_ONCE]
        if due.filter(pk=credential.pk).update(models_due_at=now + RETRY_AFTER)
    ]


def renew_due() -> int:
    """Renew every sign-in whose time has come, ahead of its use. How many were asked for; failures are kept with the tokens.

    One that another process is renewing is left to it. Raises DatabaseError."""
    waiting = tokens.due()[:MOST_AT_ONCE]
    if len(waiting) < 2:
        return sum(_renew(*one) for one in waiting)
    with ThreadPoolExecutor(RENEWALS_AT_ONCE, "sluice-tokens") as pool:
        return sum(pool.map(_renew_in_thread, waiting))


def _renew_in_thread(one: tuple[int, int]) -> bool:
    try:
        return _renew(*one)
    finally:
        connection.close()


def _renew(credential_id: int, generation: int) -> bool:
    try:
        tokens.renew(credential_id, generation, wait=False)
    except TryAgainLater as problem:
        return problem.code != "busy"
    except OAuthFailed:
        return True  # kept with the tokens, and said in the log
    except SealBroken as problem:
        log.error("The tokens of credential %s cannot be opened: %s", credential_id, problem)
    return True
