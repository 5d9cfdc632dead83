"""CSV that people open with a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

# What a cell begins with that spreadsheets take for a formula, wide forms and what they skip before it included.
_FORMULA = tuple("=+-@＝＋－＠")


def csv_line(values: Iterable[Any]) -> str:
    """Without its end. None is an empty cell. No text in it is run as a formula: clients choose what a model is called."""
    line = io.StringIO()
    # A cell is quoted for a sign of this end in it: with another one, a name with a line break would be a row of its own.
    csv.writer(line, lineterminator="\r\n").writerow([_harmless(value) for value in values])
    return line.getvalue().removesuffix("\r\n")


def _harmless(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return f"'{value}" if value.lstrip().startswith(_FORMULA) or value[:1] in ("\t", "\r", "\n") else value
