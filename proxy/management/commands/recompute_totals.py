"""Works the sums of usage out anew from the rows, day by day, and says what was different."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from proxy import totals
from proxy.management.commands.usage import moment

MOST_TOLD = 50


class Command(BaseCommand):
    help = "Works the sums of usage out anew from the rows, and says what was different. May run beside a server."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--since", metavar="ISO8601", help="from the day in UTC of this moment on (default: all that the log has)")
        parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 when something is different")

    def handle(self, *args: Any, since: str | None, check: bool, **options: Any) -> None:
        days = totals.days_of(moment(since))
        different = 0
        for number, day in enumerate(days, start=1):
            found = totals.differences(day) if check else totals.recompute(day)
            for difference in found[: max(0, MOST_TOLD - different)]:
                self.stdout.write(str(difference))
            different += len(found)
            self.stderr.write(f"{day} ({number} of {len(days)}): {len(found) or 'nothing'} different")
        counted = f"{len(days)} {'day' if len(days) == 1 else 'days'}"
        if different and check:
            raise CommandError(f"{counted}: {different} of the sums are not those of the rows; without --check they are mended.")
        self.stdout.write(f"{counted}: {f'{different} sums are mended' if different else 'all sums are those of the rows'}")
