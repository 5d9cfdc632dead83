"""Formats log records and takes secrets out of them: the message, its arguments and the traceback alike."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from providers.secrets import redact


class RedactingFormatter(logging.Formatter):
    def __init__(self, style_name: str = "text") -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        self._json = style_name == "json"

    def format(self, record: logging.LogRecord) -> str:
        if not self._json:
            return redact(super().format(record))
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if record.exc_info:
            line["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)
