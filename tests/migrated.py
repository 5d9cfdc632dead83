"""A migrated database to start from, made once in a run of the tests: to migrate costs two seconds of each server, a copy none.

All processes of one run share it: who makes it holds a lock meanwhile, and the process that began the run removes it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SQLITE_NAME = "sluice.sqlite3"
POSTGRES_URL = "postgres://postgres@127.0.0.1:5432"

# The first process of a run names it for all that it starts.
_IS_FIRST = "SLUICE_TEST_RUN" not in os.environ
_RUN = os.environ.setdefault("SLUICE_TEST_RUN", str(os.getpid()))
_FOLDER = Path(tempfile.gettempdir()) / f"sluice-migrated-{_RUN}"


def copy_sqlite(data_dir: Path) -> None:
    """Put a migrated SQLite database into an empty DATA_DIR."""
    with _locked():
        made = _FOLDER / SQLITE_NAME
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
                _migrate({"DATA_DIR": folder})
                (Path(folder) / SQLITE_NAME).rename(made)
    shutil.copyfile(made, data_dir / SQLITE_NAME)
    (data_dir / SQLITE_NAME).chmod(0o600)


def postgres_template() -> str:
    """The name of a migrated PostgreSQL database, for `CREATE DATABASE ... TEMPLATE`."""
    import psycopg

    with _locked():
        noted = _FOLDER / "postgres"
        if noted.exists():
            return noted.read_text()
        name = f"sluice_migrated_{_RUN}"
        with psycopg.connect(f"{POSTGRES_URL}/postgres", autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
            _migrate({"DATA_DIR": folder, "DATABASE_URL": f"{POSTGRES_URL}/{name}", "SECRET_KEY": "s" * 50, "KEYRING": "k" * 50})
        noted.write_text(name)
        return name


def is_migrated(database_url: str | None, data_dir: Path) -> bool:
    """Whether somebody has: how far, the server checks itself when it starts."""
    if database_url is None:
        if not (data_dir / SQLITE_NAME).exists():
            return False
        with contextlib.closing(sqlite3.connect(data_dir / SQLITE_NAME)) as file:
            return bool(file.execute("SELECT count(*) FROM sqlite_master WHERE name = 'django_migrations'").fetchone()[0])
    import psycopg

    with psycopg.connect(database_url) as connection:
        return bool(connection.execute("SELECT to_regclass('django_migrations') IS NOT NULL").fetchone()[0])  # type: ignore[index]


def _forget() -> None:
    noted = _FOLDER / "postgres"
    if noted.exists():
        import psycopg

        with contextlib.suppress(psycopg.Error), psycopg.connect(f"{POSTGRES_URL}/postgres", autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{noted.read_text()}" WITH (FORCE)')  # type: ignore[arg-type]
    shutil.rmtree(_FOLDER, ignore_errors=True)


if _IS_FIRST:
    atexit.register(_forget)


def _migrate(settings: Mapping[str, str]) -> None:
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    environment |= {"DJANGO_SETTINGS_MODULE": "project.settings", **settings}
    subprocess.run([sys.executable, "manage.py", "migrate", "--no-input", "-v", "0"], cwd=REPOSITORY, env=environment, check=True)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    _FOLDER.mkdir(mode=0o700, exist_ok=True)
    with (_FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
