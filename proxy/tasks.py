"""What is done again and again beside the requests, about usage. `serve` calls these from a thread, a scheduler from a worker."""

from __future__ import annotations

import logging
import time

from django.conf import settings
from django.db import DatabaseError
from django.utils import timezone

from proxy import budget_mails, months
from proxy.patience import patient

log = logging.getLogger(__name__)

MONTHS_EVERY_SECONDS = 3600.0
AFTER_TROUBLE_SECONDS = 60.0


def mail_budgets() -> int:
    """Tell people of budgets that are nearly or wholly spent. How many mails went out. Raises DatabaseError."""
    with patient():
        return budget_mails.send_due(timezone.now())


def keep_months() -> None:
    """Make the log's months ahead, and delete what is older than is kept. Raises DatabaseError."""
    now = timezone.now()
    with patient():
        months.make_ahead(now)
        keep_days = settings.ENV.usage_retention_days
        if keep_days is not None:
            months.forget(keep_days, now)


class Upkeep:
    """Both, each in its own time: called once a minute."""

    def __init__(self) -> None:
        self._months_at = 0.0

    def __call__(self) -> None:
        if time.monotonic() >= self._months_at:
            self._months_at = time.monotonic() + MONTHS_EVERY_SECONDS
            try:
                keep_months()
            except DatabaseError as problem:
                self._months_at = time.monotonic() + AFTER_TROUBLE_SECONDS
                log.warning("The months of the usage log could not be kept; it is tried again: %s", problem)
        mail_budgets()
