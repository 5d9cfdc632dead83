"""Sets what models cost from a moment on."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser

from providers.actions import set_price


class Command(BaseCommand):
    help = "Sets the price of the models that PATTERN names, in USD per million tokens: a new dated row; earlier rows stay."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("pattern", help="public model ids, * stands for anything: openai/gpt-4o, 'local/*'")
        parser.add_argument("--input", required=True, metavar="USD")
        parser.add_argument("--output", required=True, metavar="USD")
        parser.add_argument("--cached", metavar="USD", help="input read from the upstream's cache; default: as --input")
        parser.add_argument("--cache-write", metavar="USD", help="input written to the cache; default: as --input")
        parser.add_argument("--from", dest="starts_at", metavar="ISO8601", help="default: now; without an offset it is UTC")

    def handle(self, *args: Any, pattern: str, **options: Any) -> None:
        try:
            price = set_price(
                pattern, options["input"], options["output"], options["cached"], options["cache_write"], _moment(options["starts_at"])
            )
        except ValidationError as problem:
            raise CommandError(" ".join(problem.messages)) from None
        self.stdout.write(f"{price.pattern} from {price.starts_at.astimezone(UTC).isoformat(timespec='seconds')}")


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise CommandError(f"--from: '{text}' is not a time such as 2026-07-01 or 2026-07-01T12:00:00+02:00.") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
