"""Brings what the journals hold into the database, and adopts those of dead workers."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from proxy import journal, ledger


class Command(BaseCommand):
    help = "Ships the journals of all workers into the database. Those of dead workers are adopted and deleted."

    def handle(self, *args: Any, **options: Any) -> None:
        folders = journal.folders(settings.DATA_DIR / "journal")
        stored = 0
        for number, folder in enumerate(folders, start=1):
            adopted = ledger.adopt(folder)
            stored += ledger.ship(folder) if adopted is None else adopted
            self.stderr.write(f"journal {number} of {len(folders)}: {'its worker lives' if adopted is None else 'adopted'}")
        self.stdout.write(f"{stored} new usage rows")
