"""Work beside the requests where there is Redis: `celery -A project worker --beat` does what `serve` does by itself without it.

One worker with `--beat`, or one beat and any number of workers. What is due is said by the database, and who takes it by a lock there,
so that a tick too many does no harm.
"""

from __future__ import annotations

import os

from celery import Celery
from celery.signals import beat_embedded_init, beat_init
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

TOKENS_EVERY_SECONDS = 15.0
MODELS_EVERY_SECONDS = 30.0
LOOK_EVERY_SECONDS = 30.0
BUDGETS_EVERY_SECONDS = 60.0
MONTHS_EVERY_SECONDS = 1800.0

if settings.ENV.redis_url is None:
    raise ImproperlyConfigured("REDIS_URL is not set: without Redis `serve` does this work by itself, and no Celery worker is needed.")

app = Celery("sluice")
app.conf.update(
    broker_url=settings.ENV.redis_url,
    broker_connection_retry_on_startup=True,
    # What became of a sweep stands on the accounts themselves.
    task_ignore_result=True,
    task_default_queue="sluice",
    # A sweep that is cut off is made up for by the next one: acknowledged at once, and never taken up twice.
    task_acks_late=False,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,  # the log stays redacted
    enable_utc=True,
    timezone="UTC",
    beat_schedule={
        # A tick that nobody took before the next one came is dropped: they must not pile up while the workers are away.
        "refresh tokens": {
            "task": "providers.tasks.refresh_tokens",
            "schedule": TOKENS_EVERY_SECONDS,
            "options": {"expires": TOKENS_EVERY_SECONDS},
        },
        "refresh models": {
            "task": "providers.tasks.refresh_models",
            "schedule": MODELS_EVERY_SECONDS,
            "options": {"expires": MODELS_EVERY_SECONDS},
        },
        "look after": {
            "task": "project.tasks.look_after",
            "schedule": LOOK_EVERY_SECONDS,
            "options": {"expires": LOOK_EVERY_SECONDS},
        },
        "mail budgets": {
            "task": "project.tasks.tell_of_budgets",
            "schedule": BUDGETS_EVERY_SECONDS,
            "options": {"expires": BUDGETS_EVERY_SECONDS},
        },
        "keep the log": {
            "task": "project.tasks.keep_log",
            "schedule": MONTHS_EVERY_SECONDS,
            "options": {"expires": MONTHS_EVERY_SECONDS},
        },
    },
)
app.autodiscover_tasks(["providers", "project"])


@beat_init.connect
@beat_embedded_init.connect
def look_after_at_once(**_: object) -> None:
    """Not only after the first half minute: a health check wants to know whether beat, broker and worker work together."""
    app.send_task("project.tasks.look_after", expires=LOOK_EVERY_SECONDS)
