"""`python deploy/backup_sqlite.py FROM TO`: a copy of a SQLite database, whole and consistent, while it is in use.

Copying the file with `cp` would lose what still lies in its log, or copy half of a change. TO must not exist.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from pathlib import Path

PAGES_AT_ONCE = 1000  # between two steps others may write


def main(source: Path, target: Path) -> str:
    """What is wrong, or an empty string."""
    if not source.is_file():
        return f"{source} is not there."
    if target.exists():
        return f"{target} exists already: choose another name."
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        old = sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=30)
        new = sqlite3.connect(draft)
        with contextlib.closing(old), contextlib.closing(new):
            old.backup(new, pages=PAGES_AT_ONCE)
            new.execute("PRAGMA journal_mode=DELETE")  # one file, and nothing beside it
            [(said,)] = new.execute("PRAGMA integrity_check")
        if said != "ok":
            return f"The copy is damaged, and so is what was copied: {said}"
        draft.rename(target)
    finally:
        draft.unlink(missing_ok=True)
    return ""


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: backup_sqlite.py FROM TO")
    wrong = main(Path(sys.argv[1]), Path(sys.argv[2]))
    if wrong:
        sys.exit(wrong)
