"""Notices that the event loop stands still: whoever blocks it keeps every client waiting, and must be named in the log."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback

log = logging.getLogger(__name__)

STALLED = "stalled"


class Watchdog(threading.Thread):
    """Waits for `beat()` from the loop. Without one for `stall_seconds` it writes the loop's stack to the log, once, and
    keeps the reason `stalled` in `unready` until the loop has beaten for as long again."""

    def __init__(self, unready: set[str], stall_seconds: float) -> None:
        super().__init__(name="sluice-watchdog", daemon=True)
        self._unready = unready
        self._stall_seconds = stall_seconds
        self._watched: int | None = None
        self._beat_at = 0.0
        self._ending = threading.Event()

    def start(self) -> None:
        """To be called in the loop's thread."""
        self._watched = threading.get_ident()
        self.beat()
        super().start()

    def beat(self) -> None:
        self._beat_at = time.monotonic()

    def run(self) -> None:
        look_every_seconds = self._stall_seconds / 4
        stalled_at = 0.0
        while not self._ending.wait(look_every_seconds):
            now = time.monotonic()
            if now - self._beat_at >= self._stall_seconds:
                if STALLED not in self._unready:
                    self._unready.add(STALLED)
                    self._name_the_culprit()
                stalled_at = now
            elif now - stalled_at >= self._stall_seconds:
                self._unready.discard(STALLED)

    def _name_the_culprit(self) -> None:
        frame = sys._current_frames().get(self._watched or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        log.error("The event loop has stood still for %g s. It is here:\n%s", self._stall_seconds, stack)

    def end(self) -> None:
        self._ending.set()
