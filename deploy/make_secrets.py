"""`python deploy/make_secrets.py FOLDER`: what a deployment needs and nobody should choose, each made once (0600) and then left alone.

    secret_key          signs sessions and forms
    keyring             seals what the database holds: LOSING IT LOSES EVERY UPSTREAM SECRET AND EVERY ISSUED KEY
    metrics_token       lets Prometheus read /metrics
    postgres_password   of the database's only user; `pgpass` is the same in libpq's form

Standard library alone: it runs before anything else does.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

MINIMUM_LENGTH = 32


def main(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("secret_key", "keyring", "metrics_token"):
        make(folder / name, secrets.token_urlsafe(48) + "\n")
    password = make(folder / "postgres_password", secrets.token_urlsafe(32)).strip()
    make(folder / "pgpass", f"*:*:*:*:{password}\n")


def make(path: Path, text: str) -> str:
    """The text in this file, which is made whole or not at all."""
    if path.exists():
        return path.read_text()
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)
    except FileExistsError:
        return path.read_text()
    finally:
        draft.unlink()
    print(f"made {path}")  # noqa: T201
    return text


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_secrets.py FOLDER")
    main(Path(sys.argv[1]))
