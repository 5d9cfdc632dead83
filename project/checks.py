"""Django system checks of what the operator said, each with an id and a hint.

`sluice.E…` keeps every command from starting; `sluice.W…` is a line to read. Those registered with `deploy=True` speak
in `manage.py check --deploy` alone.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from django.apps import AppConfig
from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connection
from django.http.request import validate_host

from project.env import LOOPBACK, Env
from project.runtime import timeouts_of

Apps = Sequence[AppConfig] | None

MOUNTS = Path("/proc/self/mountinfo")
NETWORK_FILESYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs"})
FILESYSTEMS_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
# Older ones have a race that can corrupt the write-ahead log when two connections write and checkpoint at once.
SQLITE_WITHOUT_RACE = (3, 51, 3)
SECRET_KEY_LENGTH, SECRET_KEY_VARIETY = 50, 5  # Django's own measure
CONNECTIONS_SHARE = 0.8  # of what Postgres takes: the rest is for people, backups and whatever else asks it


@checks.register
def timeouts_rise(app_configs: Apps, **_: Any) -> list[checks.CheckMessage]:
    try:
        timeouts_of(_env())
    except ImproperlyConfigured as problem:
        return [
            checks.Error(
                # The ladder names its fields; the operator knows the variables.
                re.sub(r"\b[a-z_]+_seconds\b", lambda found: found[0].upper(), str(problem)),
                hint="Each must be able to fire before the one around it; docs/configuration.md has the whole ladder.",
                id="sluice.E002",
            )
        ]
    return []


@checks.register
def data_dir_is_on_a_local_disk(app_configs: Apps, **_: Any) -> list[checks.CheckMessage]:
    try:
        mounts = MOUNTS.read_text()
    except OSError:
        return []  # not Linux: nothing tells us
    kind = filesystem_of(settings.DATA_DIR.resolve(), mounts)
    if kind in NETWORK_FILESYSTEMS:
        return [
            checks.Error(
                f"DATA_DIR is on a network filesystem ({kind}).",
                hint="The journal needs file locks and appends that only a local disk keeps: set DATA_DIR to a folder on one.",
                id="sluice.E003",
            )
        ]
    if kind in FILESYSTEMS_IN_MEMORY:
        return [
            checks.Warning(
                f"DATA_DIR is in memory ({kind}).",
                hint="A restart of the machine loses keys, usage and the keyring: set DATA_DIR to a folder on a disk.",
                id="sluice.W004",
            )
        ]
    return []


@checks.register
def public_host_is_allowed(app_configs: Apps, **_: Any) -> list[checks.CheckMessage]:
    host = _public_host()
    written = f"[{host}]" if ":" in host else host
    if validate_host(written, settings.ALLOWED_HOSTS):
        return []
    return [
        checks.Warning(
            f"PUBLIC_URL names the host {host}, which ALLOWED_HOSTS does not have.",
            hint=f"Calls to that name are answered with 400. ALLOWED_HOSTS={','.join([*settings.ALLOWED_HOSTS, written])}",
            id="sluice.W005",
        )
    ]


@checks.register
def tls_ends_at_a_trusted_proxy(app_configs: Apps, **_: Any) -> list[checks.CheckMessage]:
    env = _env()
    if not env.public_url.startswith("https:") or env.trusted_proxies:
        return []
    return [
        checks.Warning(
            "PUBLIC_URL is https, and TRUSTED_PROXIES is empty.",
            hint="`serve` speaks plain HTTP, so a proxy ends TLS: name its network, or every caller has the proxy's address "
            "and sign-in forms may be refused. For one on this machine: TRUSTED_PROXIES=127.0.0.1/32",
            id="sluice.W006",
        )
    ]


@checks.register
def debug_stays_at_home(app_configs: Apps, **_: Any) -> list[checks.CheckMessage]:
    env = _env()
    if not env.debug or (_public_host() in LOOPBACK and env.host in LOOPBACK):
        return []
    return [
        checks.Warning(
            "DEBUG is on, and others can reach this server.",
            hint="Error pages then show settings and source to anybody: unset DEBUG, or serve on 127.0.0.1 alone.",
            id="sluice.W007",
        )
    ]


@checks.register(checks.Tags.database, deploy=True)
def sqlite_is_sound(app_configs: Apps, **_: Any) -> list[checks.CheckMessage]:
    if connection.vendor != "sqlite" or sqlite3.sqlite_version_info >= SQLITE_WITHOUT_RACE:
        return []
    return [
        checks.Warning(
            f"SQLite {sqlite3.sqlite_version} is older than {'.'.join(map(str, SQLITE_WITHOUT_RACE))}.",
            hint="Older ones can damage a write-ahead log that is reset while another process writes. Keep commands beside a "
            "running `serve` rare and backups fresh, or use Postgres.",
            id="sluice.W008",
        )
    ]


@checks.register(checks.Tags.security)
def secrets_differ(app_configs: Apps, **_: Any) -> list[checks.CheckMessage]:
    # In it, and not only equal to it: one file given for both may have more lines than one.
    if not any(entry in settings.SECRET_KEY for entry in settings.KEYRING.entries()):
        return []
    return [
        checks.Error(
            "SECRET_KEY is also an entry of KEYRING.",
            hint="Who learns what signs sessions could then open every upstream secret. Give SECRET_KEY a value of its own: "
            "everybody signs in again, and nothing else is lost. The keyring stays as it is.",
            id="sluice.E009",
        )
    ]


@checks.register(checks.Tags.security, deploy=True)
def secret_key_is_long(app_configs: Apps, **_: Any) -> list[checks.CheckMessage]:
    length, variety = len(settings.SECRET_KEY), len(set(settings.SECRET_KEY))
    if length >= SECRET_KEY_LENGTH and variety >= SECRET_KEY_VARIETY:
        return []
    return [
        checks.Warning(
            f"SECRET_KEY has {length} characters, {variety} of them different.",
            hint=f"With fewer than {SECRET_KEY_LENGTH}, or {SECRET_KEY_VARIETY} different ones, sessions could be forged by guessing. "
            "A good one: python3 -c 'import secrets; print(secrets.token_urlsafe(48))'",
            id="sluice.W010",
        )
    ]


def connections() -> tuple[int, int]:
    """How many clients this Postgres takes, superusers' reserve left out, and how many it has. Raises DatabaseError."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int, "
            "count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        )
        allowed, used = cursor.fetchone()
        return int(allowed), int(used)


def lacks_connections(workers: int, allowed: int) -> str:
    """What to say where so many workers may want more connections than a Postgres should give them; else nothing."""
    wanted = workers * int(settings.POSTGRES_CONNECTIONS)
    if wanted <= CONNECTIONS_SHARE * allowed:
        return ""
    enough = math.ceil(wanted / CONNECTIONS_SHARE)
    return (
        f"{workers} workers may open {wanted} connections to PostgreSQL, which takes {allowed} in all, those of Celery, pages and commands "
        f"included. Set max_connections to {enough} or more there, or start fewer workers."
    )


def filesystem_of(path: Path, mounts: str) -> str:
    """The kind of filesystem that holds `path` ("ext4", "nfs4"), read from the text of Linux's mountinfo."""
    kind, depth = "", -1
    for line in mounts.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = Path(_unescaped(fields[4]))
        # Of two mounts on one point the later one is on top.
        if path.is_relative_to(point) and len(point.parts) >= depth:
            kind, depth = after.split(" ")[0], len(point.parts)
    return kind


def _unescaped(text: str) -> str:
    r"""The kernel writes a space as \040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _env() -> Env:
    env: Env = settings.ENV
    return env


def _public_host() -> str:
    return (urlsplit(settings.PUBLIC_URL).hostname or "").lower()
