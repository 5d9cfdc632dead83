"""The sweeps as Celery runs them: see project/celery.py. Where there is no Redis, `serve` calls `sweeps.py` itself."""

from __future__ import annotations

from celery import shared_task

from providers import sweeps


@shared_task
def refresh_tokens() -> int:
    """Renew every sign-in that is due. How many were asked for."""
    return sweeps.renew_due()


@shared_task
def refresh_models() -> int:
    """Ask every upstream whose list of models is due. How many were asked."""
    return sweeps.refresh_due()
