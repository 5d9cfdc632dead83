"""Two organizations to look at the pages with: people, keys, accounts of kind demo, and a month of usage. `--remove` takes them away."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError
from django.utils import timezone

from project import demonstration
from providers.actions import check_canary


class Command(BaseCommand):
    help = "Makes two organizations with a month of usage, to look at the pages with. May be run again; --remove takes them away."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--remove", action="store_true", help="take away what it made, usage included")

    def handle(self, *args: Any, remove: bool, **options: Any) -> None:
        try:
            check_canary()
            if remove:
                self.stdout.write(f"Removed, with {demonstration.remove()} usage rows.")
                return
            houses, stored = demonstration.make(timezone.now())
        except (ValidationError, ImproperlyConfigured) as problem:
            raise CommandError(" ".join(getattr(problem, "messages", [str(problem)]))) from None
        except DatabaseError as problem:
            raise CommandError(f"The database refused: {str(problem).splitlines()[0]}. Has `manage.py migrate` run?") from None
        names = ", ".join(house.name for house in demonstration.HOUSES)
        self.stdout.write(f"{houses} organizations: {names}. {stored} usage rows are new.")
        self.stdout.write("An operator sees them in the menu of organizations. `manage.py demo_data --remove` takes them away.")
