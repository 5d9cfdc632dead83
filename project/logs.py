"""Formats log records and takes secrets out of them: the message, its arguments and the traceback alike.

Much of what is logged was said by strangers. Whatever it holds, a line that begins at the margin is a record of ours.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from providers.secrets import redact
from proxy.call import current_request

# Control characters, and what else may end a line. A newline and a tab stay, for tracebacks.
UNPRINTABLE = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if code not in (9, 10)} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


class RedactingFormatter(logging.Formatter):
    def __init__(self, style_name: str = "text") -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        self._json = style_name == "json"

    def format(self, record: logging.LogRecord) -> str:
        if not self._json:
            return redact(super().format(record)).translate(UNPRINTABLE).replace("\n", "\n    ")
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if request_id := current_request.get():
            line["request_id"] = request_id
        if record.exc_info:
            line["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)
