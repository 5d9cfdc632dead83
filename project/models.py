"""What the deployment knows of its own parts."""

from __future__ import annotations

from django.db import models
from django.utils import timezone


class Heartbeat(models.Model):
    """When a part last did its work, written by itself: `doctor` reads it."""

    name = models.CharField(max_length=40, primary_key=True)  # "celery"
    at = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.name} {self.at:%H:%M:%S}"


def beat(name: str) -> None:
    Heartbeat.objects.update_or_create(name=name, defaults={"at": timezone.now()})
