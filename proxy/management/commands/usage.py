"""Prints usage rows: what every admitted request used and cost."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone
from django.utils.dateparse import parse_datetime
from rich.console import Console
from rich.table import Table

from proxy import journal, ledger
from proxy.queries import USAGE_COLUMNS, usage_rows
from proxy.sheets import csv_line

# In a table the columns that fit a terminal; the other formats have all of them.
IN_TABLE = ["at", "key", "served_model", "status", "error", "input_tokens", "output_tokens", "cost_usd", "usage_source", "duration_ms"]


class Command(BaseCommand):
    help = "Ships the journals, then prints usage rows, the oldest first."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--format", choices=["table", "jsonl", "csv"], default="table")
        parser.add_argument("--since", metavar="ISO8601", help="rows from this moment on (default: all)")
        parser.add_argument("--key", metavar="ID", help="rows of this key alone: its number, or the id inside the key")

    def handle(self, *args: Any, since: str | None, key: str | None, **options: Any) -> None:
        for folder in journal.folders(settings.DATA_DIR / "journal"):
            ledger.ship(folder)
        rows = usage_rows(since=moment(since), key=key)
        for line in {"table": _table, "jsonl": _jsonl, "csv": _csv}[options["format"]](rows):
            self.stdout.write(line)


def moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = parse_datetime(text) or datetime.fromisoformat(text)
    except ValueError:
        raise CommandError(f"--since: '{text}' is not a date and time such as 2026-05-01T00:00:00Z.") from None
    return moment if moment.tzinfo else timezone.make_aware(moment)


def _jsonl(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield json.dumps(row, default=str, ensure_ascii=False)


def _csv(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    yield csv_line(USAGE_COLUMNS)
    for row in rows:
        yield csv_line(row[name] for name in USAGE_COLUMNS)


def _table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    table = Table(*IN_TABLE, box=None, header_style="bold")
    for row in rows:
        table.add_row(*("unpriced" if name == "cost_usd" and row[name] is None else str(row[name]) for name in IN_TABLE))
    console = Console(file=io.StringIO(), width=160, highlight=False, markup=False)
    console.print(table)
    yield console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]
