"""What `manage.py doctor` looks at. Each check is a function that gives findings: all is well, something to know, or a problem."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import httpx
from django.conf import settings
from django.core import checks as system_checks
from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.db import DatabaseError, InterfaceError, connection
from django.db.migrations.executor import MigrationExecutor
from django.utils import timezone

from accounts.actions import ensure_membership, ensure_organization, lend_key
from accounts.models import User
from accounts.notices import operators
from project.checks import (
    CONNECTIONS_SHARE,
    FILESYSTEMS_IN_MEMORY,
    MOUNTS,
    NETWORK_FILESYSTEMS,
    SQLITE_WITHOUT_RACE,
    connections,
    filesystem_of,
)
from project.models import Heartbeat
from providers.actions import check_canary, secret_of
from providers.models import Credential, State
from providers.queries import standing_of
from providers.secrets import SealBroken
from proxy import journal
from proxy.queries import resting, why_it_rests

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"

SKEW_WARNING_SECONDS, SKEW_PROBLEM_SECONDS = 2.0, 60.0
BEAT_WARNING_SECONDS, BEAT_PROBLEM_SECONDS = 90.0, 600.0
DISK_WARNING_BYTES, DISK_PROBLEM_BYTES = 1 << 30, 100 << 20
JOURNAL_WARNING_SHARE = 0.5
FEW_FILES = 4096
REACH_SECONDS = 10.0
# The stream: so many words, so far apart. Through a proxy that collects them they come at once, at the end.
WORDS, PAUSE_SECONDS = 6, 0.25
PROBE_MINUTES = 5
MOST_RESTS = 20  # are named one by one
KNOWN_SECONDS = 5.0  # until then every worker knows a new key


@dataclass(frozen=True, slots=True)
class Finding:
    level: str
    says: str
    hint: str = ""


@dataclass(slots=True)
class Asked:
    """How to look. `url`: where to reach the server, without a slash at the end."""

    url: str
    database: bool = field(default=False)  # it answered


Findings = Iterator[Finding]


def settings_are_sound(asked: Asked) -> Findings:
    """What `manage.py check --deploy` says of our own settings."""
    elsewhere = {"sluice.E003", "sluice.W004", "sluice.W008"}  # checks below say more
    found = [one for one in system_checks.run_checks(include_deployment_checks=True) if (one.id or "").startswith("sluice.")]
    said = [one for one in found if one.id not in elsewhere]
    for one in said:
        level = PROBLEM if one.level >= system_checks.ERROR else WARNING
        yield Finding(level, f"{one.msg} ({one.id})", one.hint or "")
    if not said:
        yield Finding(OK, "nothing to say of them")


def database(asked: Asked) -> Findings:
    began = time.monotonic()
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except (DatabaseError, InterfaceError) as problem:
        yield Finding(PROBLEM, f"It does not answer: {_first_line(problem)}", "See DATABASE_URL, and whether the server runs.")
        return
    took_ms = (time.monotonic() - began) * 1000
    asked.database = True
    yield Finding(OK, f"{connection.vendor} {_version()} answers in {took_ms:.0f} ms")
    if connection.vendor == "postgresql":
        allowed, used = connections()
        says = f"{used} of {allowed} connections are in use"
        hint = f"A serving process opens up to {settings.POSTGRES_CONNECTIONS}: raise max_connections there, or run fewer of them."
        yield Finding(OK, says) if used <= CONNECTIONS_SHARE * allowed else Finding(WARNING, says, hint)
    executor = MigrationExecutor(connection)
    waiting = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if waiting:
        asked.database = False
        yield Finding(PROBLEM, f"{len(waiting)} migrations have not run", "Run `manage.py migrate`; `serve` does not start before.")


def _version() -> str:
    if connection.vendor == "sqlite":
        return sqlite3.sqlite_version
    with connection.cursor() as cursor:
        cursor.execute("SHOW server_version")
        return str(cursor.fetchone()[0]).split(" ")[0]


def sqlite(asked: Asked) -> Findings:
    if connection.vendor != "sqlite":
        return
    if sqlite3.sqlite_version_info >= SQLITE_WITHOUT_RACE:
        yield Finding(OK, f"{sqlite3.sqlite_version} has no known race in its log")
        return
    yield Finding(
        WARNING,
        f"{sqlite3.sqlite_version} is older than {'.'.join(map(str, SQLITE_WITHOUT_RACE))}: writing from two processes can damage its log",
        "Keep commands beside a running `serve` rare and backups fresh, or use Postgres.",
    )


def clock(asked: Asked) -> Findings:
    if not asked.database or connection.vendor != "postgresql":
        yield Finding(OK, "the database is on this machine")
        return
    with connection.cursor() as cursor:
        before = timezone.now()
        cursor.execute("SELECT clock_timestamp()")
        theirs: datetime = cursor.fetchone()[0]
        middle = before + (timezone.now() - before) / 2
    skew = (theirs - middle).total_seconds()
    says = f"the database's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} ours"
    hint = "Let both machines follow the same time (NTP): windows of budgets and the order of usage rows rest on it."
    if abs(skew) >= SKEW_WARNING_SECONDS:
        yield Finding(PROBLEM if abs(skew) >= SKEW_PROBLEM_SECONDS else WARNING, says, hint)
    else:
        yield Finding(OK, says)


def keyring(asked: Asked) -> Findings:
    path = settings.DATA_DIR / "keyring"
    if settings.ENV.keyring is None and path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield Finding(WARNING, f"{path} can be read by others", f"chmod 600 {path}")
    if not asked.database:
        return
    try:
        check_canary()
    except ImproperlyConfigured as problem:
        yield Finding(PROBLEM, str(problem), "The keyring and the database belong together: see docs/operations.md on restoring.")
        return
    broken = 0
    for credential in Credential.objects.exclude(secret=None).order_by("pk"):
        try:
            secret_of(credential)
        except SealBroken:
            broken += 1
            yield Finding(PROBLEM, f"the secret of credential {credential.pk} ({credential.label}) does not open", "Give it a new secret.")
    if not broken:
        yield Finding(OK, "it opens what the database holds")


def accounts(asked: Asked) -> Findings:
    if not asked.database:
        return
    for credential in Credential.objects.filter(state=State.NEEDS_REAUTH).order_by("pk"):
        yield Finding(WARNING, f"credential {credential.pk} ({credential.label}) has to sign in again", "Sign in, or give it a new secret.")
    for credential in Credential.objects.filter(state=State.ACTIVE).select_related("token").order_by("pk"):
        if problem := standing_of(credential).problem:
            yield Finding(WARNING, f"credential {credential.pk} ({credential.label}), when it was last asked: {problem}")
    rests = list(resting())
    for rest in rests[:MOST_RESTS]:
        who = f"credential {rest.credential_id} ({rest.credential.label})"
        says = f"{who} rests, {rest.model or 'all models'}, until {rest.until:%Y-%m-%d %H:%M:%S} UTC: {why_it_rests(rest)}"
        yield Finding(NOTE, says, "Delete its row in the admin, under Rests, and it is tried again within seconds.")
    if len(rests) > MOST_RESTS:
        yield Finding(NOTE, f"{len(rests) - MOST_RESTS} more models of accounts rest", "The admin has all of them, under Rests.")
    serving = Credential.objects.filter(state=State.ACTIVE).count()
    if not serving:
        yield Finding(WARNING, "no upstream account is in service", "Add one: `manage.py add_credential KIND --label … --secret-stdin`.")
    else:
        yield Finding(OK, f"{serving} in service")


def mail(asked: Asked) -> Findings:
    if asked.database and not operators():
        yield Finding(PROBLEM, "there is no operator to write to", "Run `manage.py bootstrap --email you@example.org`.")
    if settings.ENV.email_url.startswith(("consolemail", "dummymail", "memorymail")):
        yield Finding(WARNING, "mails go to the log alone", "Set EMAIL_URL, and operators hear of accounts that have to sign in again.")
    else:
        yield Finding(OK, f"mails go out as {settings.DEFAULT_FROM_EMAIL}")


def redis(asked: Asked) -> Findings:
    url = settings.ENV.redis_url
    if url is None:
        return
    from redis import Redis, RedisError

    try:
        with Redis.from_url(url, socket_connect_timeout=3, socket_timeout=3) as client:
            began = time.monotonic()
            client.ping()
            took_ms = (time.monotonic() - began) * 1000
            about = client.info("server")
            policy = client.config_get("maxmemory-policy").get("maxmemory-policy", "noeviction")
    except RedisError as problem:
        yield Finding(PROBLEM, f"it does not answer: {_first_line(problem)}", "See REDIS_URL. Without it limits are kept in part only.")
        return
    yield Finding(OK, f"Redis {about['redis_version']} answers in {took_ms:.0f} ms")
    if policy != "noeviction":
        yield Finding(
            WARNING, f"it may throw away what limits hold (maxmemory-policy {policy})", "redis-cli config set maxmemory-policy noeviction"
        )


def celery(asked: Asked) -> Findings:
    if settings.ENV.redis_url is None or not asked.database:
        return
    last = Heartbeat.objects.filter(name="celery").first()
    hint = "Both must run: `celery -A project worker` and `celery -A project beat`. Without them no sign-in is renewed."
    if last is None:
        yield Finding(PROBLEM, "no worker has done anything yet", hint)
        return
    age = (timezone.now() - last.at).total_seconds()
    says = f"a worker did the last scheduled task {age:.0f} s ago"
    if age > BEAT_WARNING_SECONDS:
        yield Finding(PROBLEM if age > BEAT_PROBLEM_SECONDS else WARNING, says, hint)
    else:
        yield Finding(OK, says)


def journals(asked: Asked) -> Findings:
    root = settings.DATA_DIR / "journal"
    alive, dead, waiting = 0, 0, 0
    for folder in journal.folders(root):
        waiting = max(waiting, sum(_size(segment) for segment in journal.segments(folder)))
        descriptor = journal.lock(folder)
        if descriptor is None:
            alive += 1
        else:
            os.close(descriptor)
            dead += 1
    cap = settings.ENV.journal_max_bytes
    says = f"{alive} in use, the largest {waiting / (1 << 20):.1f} MiB of {cap / (1 << 20):.0f}"
    if waiting > JOURNAL_WARNING_SHARE * cap:
        yield Finding(WARNING, says, "The database takes less than comes. When a journal is full new calls are refused with 503.")
    else:
        yield Finding(OK, says)
    if dead:
        yield Finding(WARNING, f"{dead} of dead workers are not stored yet", "`serve` does that within 15 s; or `manage.py ship_usage`.")
    damaged = sorted(path.name for path in root.glob(".damaged-*"))
    if damaged:
        yield Finding(PROBLEM, f"damaged ones were set aside: {', '.join(damaged)}", f"Look at {root}: the disk may be failing.")


def disk(asked: Asked) -> Findings:
    where = settings.DATA_DIR.resolve()
    kind = filesystem_of(where, MOUNTS.read_text()) if MOUNTS.exists() else ""
    if kind in NETWORK_FILESYSTEMS:
        yield Finding(PROBLEM, f"the journal is on a network filesystem ({kind})", "Set DATA_DIR to a folder on a local disk.")
    elif kind in FILESYSTEMS_IN_MEMORY:
        yield Finding(WARNING, f"the journal is in memory ({kind}): a restart loses it", "Set DATA_DIR to a folder on a disk.")
    free = shutil.disk_usage(where).free
    says = f"{where}{f' ({kind})' if kind else ''} has {free / (1 << 30):.1f} GiB left"
    if free < DISK_WARNING_BYTES:
        yield Finding(PROBLEM if free < DISK_PROBLEM_BYTES else WARNING, says, "Without room for the journal new calls get 503.")
    else:
        yield Finding(OK, says)


def files(asked: Asked) -> Findings:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FEW_FILES:
        yield Finding(WARNING, f"a process may open {hard} files, a third of that for clients", "Raise it: `ulimit -n`, LimitNOFILE.")
    else:
        yield Finding(OK, f"a process may open {'any number of' if hard == resource.RLIM_INFINITY else hard} files")


def reached(asked: Asked) -> Findings:
    """The server itself, where people reach it."""
    try:
        answer = httpx.get(f"{asked.url}/readyz", timeout=REACH_SECONDS)
        said = answer.json() if answer.headers.get("content-type", "").startswith("application/json") else {}
    except (httpx.HTTPError, ValueError) as problem:
        yield Finding(PROBLEM, f"{asked.url} does not answer: {_first_line(problem)}", "Does `serve` run? Is PUBLIC_URL right?")
        return
    if answer.status_code == 200 and said.get("status") == "ok":
        yield Finding(OK, f"{asked.url} is ready")
    elif "status" in said:
        missing = f" (it lacks: {', '.join(said['missing'])})" if said.get("missing") else ""
        yield Finding(PROBLEM, f"{asked.url} is not ready: {said['status']}{missing}", "Its log says why.")
    else:
        yield Finding(PROBLEM, f"{asked.url} is somebody else: HTTP {answer.status_code}", "PUBLIC_URL must lead to Sluice.")
    metrics = httpx.get(f"{asked.url}/metrics", timeout=REACH_SECONDS)
    if metrics.status_code == 200 and httpx.URL(asked.url).host not in ("127.0.0.1", "localhost", "::1"):
        yield Finding(PROBLEM, "/metrics can be read by anybody", "Set METRICS_TOKEN, and let the proxy in front refuse the path.")


def streams(asked: Asked) -> Findings:
    """A real stream through everything that stands in front: its words should come one by one."""
    if not asked.database:
        return
    demo = Credential.objects.filter(kind="demo", state=State.ACTIVE, organization=None, user=None).order_by("pk").first()
    operator = User.objects.filter(is_superuser=True, is_active=True).order_by("pk").first()
    if demo is None or operator is None:
        yield Finding(NOTE, "not tried: that takes an operator and an account of kind demo", "manage.py add_credential demo --label demo")
        return
    model = f"{demo.prefix}/echo-{PAUSE_SECONDS:g}"
    organization = ensure_organization()
    ensure_membership(operator, organization, role="owner")
    try:
        key = lend_key(organization, operator, "doctor", models=[model], lasts=timedelta(minutes=PROBE_MINUTES))
    except ValidationError as problem:
        yield Finding(NOTE, f"not tried: {' '.join(problem.messages)}")
        return
    try:
        moments = list(_moments(asked.url, key, model))
    except httpx.HTTPError as problem:
        yield Finding(PROBLEM, f"the stream failed: {_first_line(problem)}", "The server's log has the request.")
        return
    spread = moments[-1] - moments[0] if moments else 0.0
    wanted = (WORDS - 1) * PAUSE_SECONDS
    if spread > wanted / 2:
        yield Finding(OK, f"the words of a stream come one by one ({len(moments)} pieces over {spread:.1f} s)")
    else:
        yield Finding(
            PROBLEM,
            f"the words of a stream come all at once ({len(moments)} pieces within {spread:.1f} s instead of {wanted:.1f})",
            "Something in front collects answers. nginx: `proxy_buffering off; proxy_cache off;` and no gzip of text/event-stream.",
        )


def _moments(url: str, key: str, model: str) -> Iterator[float]:
    """When each piece of the answer came, in seconds. Raises HTTPError, also for an answer that is no stream."""
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": " ".join(["word"] * WORDS)}]}
    headers = {"authorization": f"Bearer {key}"}
    until = time.monotonic() + KNOWN_SECONDS
    while True:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30) as answer:
            if answer.status_code == 401 and time.monotonic() < until:
                time.sleep(0.5)  # a worker that had looked for this key before knows of it in a moment
                continue
            if answer.status_code != 200:
                code = answer.read()[:200].decode("utf-8", "replace")
                raise httpx.HTTPError(f"HTTP {answer.status_code} {code}")
            for _ in answer.iter_raw():
                yield time.monotonic()
            return


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _first_line(problem: Exception) -> str:
    return (str(problem) or type(problem).__name__).splitlines()[0]


Check = Callable[[Asked], Findings]

# In this order: later ones use what earlier ones found.
CHECKS: dict[str, Check] = {
    "settings": settings_are_sound,
    "database": database,
    "SQLite": sqlite,
    "clock": clock,
    "keyring": keyring,
    "upstream accounts": accounts,
    "mail": mail,
    "Redis": redis,
    "Celery": celery,
    "journal": journals,
    "disk": disk,
    "open files": files,
    "public address": reached,
    "streams": streams,
}
