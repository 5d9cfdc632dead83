"""What Celery does for the deployment as a whole, beside the accounts' own sweeps: see project/celery.py."""

from __future__ import annotations

from celery import shared_task

from project import alarms
from project.models import beat
from proxy.tasks import keep_months, mail_budgets


@shared_task
def look_after() -> None:
    """Mail operators what they should know. That this ran shows `doctor` that beat, broker, worker and database work together."""
    beat("celery")
    alarms.look({})


@shared_task
def tell_of_budgets() -> int:
    """Mail people whose budget is nearly or wholly spent. How many mails went out."""
    return mail_budgets()


@shared_task
def keep_log() -> None:
    """Make the months of the usage log ahead, and delete what is older than is kept."""
    keep_months()
