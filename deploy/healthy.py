"""For the health checks of containers: `healthy.py http://127.0.0.1:8000/readyz`, or `healthy.py celery`. Exit status 0 or 1.

Celery is well when beat, broker, worker and database together did the last scheduled task within two minutes.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

LATE_SECONDS = 120


def answers(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=4) as answer:  # noqa: S310 said by whoever wrote the compose file
            return "" if answer.status == 200 else f"HTTP {answer.status}"
    except urllib.error.HTTPError as problem:
        return f"HTTP {problem.code} {problem.read(200).decode('utf-8', 'replace')}"
    except OSError as problem:
        return str(problem)


def celery_works() -> str:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    import django

    django.setup()
    from django.utils import timezone

    from project.models import Heartbeat

    last = Heartbeat.objects.filter(name="celery").first()
    if last is None:
        return "no scheduled task has run yet"
    age = (timezone.now() - last.at).total_seconds()
    return "" if age < LATE_SECONDS else f"the last scheduled task ran {age:.0f} s ago"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: healthy.py URL | celery")
    wrong = celery_works() if sys.argv[1] == "celery" else answers(sys.argv[1])
    if wrong:
        sys.exit(wrong)
