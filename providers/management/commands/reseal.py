"""Seals every upstream secret again with the newest key of the keyring: the last step of a rotation."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from providers.actions import Resealed, reseal_all


class Command(BaseCommand):
    help = (
        "Seals every upstream secret again with the newest entry of the keyring. First put the new entry above the old ones and restart "
        "what serves, so that it can read both; then run this; then the old entry may go. May be stopped and run again."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        progress = Resealed()
        for progress in reseal_all():
            if not (progress.done + progress.broken) % 50:
                self.stdout.write(f"{progress.done} sealed again, {progress.left} left")
                self.stdout.flush()
        self.stdout.write(f"{progress.done} sealed again, {progress.left} left, {progress.broken} that no key of this keyring opens")
