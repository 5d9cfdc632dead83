"""What is done again and again beside the requests. `serve` calls these from a thread, a scheduler from a worker."""

from __future__ import annotations

import logging

from django.db.models import Q
from django.utils import timezone

from providers.actions import RETRY_AFTER, refresh_all
from providers.models import Credential, State

log = logging.getLogger(__name__)

# As many as one sweep asks at most: what is left is due at the next one.
MOST_AT_ONCE = 100


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
