"""`manage.py` with an eye inside: once a second the serving process writes to the file in WATCH_FILE what cannot be seen
from outside: its asyncio tasks, its open holds, and the calls that its journal knows no end of."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

EVERY_SECONDS = 1.0


def look(runtime: Any, file: Path) -> None:
    """On the loop, so that nothing changes meanwhile."""
    seen = {
        "at": time.time(),
        "tasks": len(asyncio.all_tasks()),
        "holds": runtime.limits.open_holds(),
        "open_calls": len(runtime.journal()._open),
    }
    file.with_suffix(".new").write_text(json.dumps(seen))
    file.with_suffix(".new").replace(file)


def watch(file: Path) -> None:
    while True:
        time.sleep(EVERY_SECONDS)
        asgi = sys.modules.get("project.asgi")
        runtime = getattr(asgi, "runtime", None)
        if runtime is not None and runtime.ready:
            runtime._loop.call_soon_threadsafe(look, runtime, file)


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    from django.core.management import execute_from_command_line

    threading.Thread(target=watch, args=[Path(os.environ["WATCH_FILE"])], daemon=True).start()
    execute_from_command_line(["manage.py", *sys.argv[1:]])


if __name__ == "__main__":
    main()
