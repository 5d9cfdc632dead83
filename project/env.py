"""Reads every variable that Sluice knows, with its type, and refuses loudly.

One `Env` is read at start; nothing else looks at the process environment. Each secret may be given as `NAME` or as
the path of a file in `NAME_FILE`.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured
from environ.fileaware_mapping import FileAwareMapping

REPOSITORY = Path(__file__).resolve().parent.parent

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

T = TypeVar("T")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Env:
    """What the operator said. Times are in seconds, sizes in bytes."""

    data_dir: Path
    database_url: str
    redis_url: str | None
    secret_key: str | None
    keyring: str | None
    host: str
    port: int
    allowed_hosts: list[str]
    cors_allow_origins: list[str]
    trusted_proxies: list[Network]
    email_url: str
    mail_from: str | None
    public_url: str
    egress_allow: list[Network]
    debug: bool
    log_level: str
    log_format: str
    journal_fsync: bool
    journal_max_bytes: int
    journal_segment_bytes: int
    usage_retention_days: int | None
    body_limit_bytes: int
    pool_wait_seconds: float
    connect_seconds: float
    first_byte_seconds: float
    idle_seconds: float
    total_seconds: float
    heartbeat_seconds: float
    drain_seconds: float
    drain_delay: float
    head_seconds: float
    body_idle_seconds: float
    body_slow_seconds: float
    keep_alive_seconds: float
    reader_seconds: float
    stall_seconds: float
    open_requests: int
    upstream_requests: int
    ejection_seconds: float
    cut_revoked_calls: bool
    metrics_token: str | None

    @property
    def one_process(self) -> bool:
        """SQLite and no Redis: limits live in memory, and secrets may be made on the spot."""
        return self.redis_url is None and self.database_url.startswith("sqlite:")

    def secrets(self) -> list[str]:
        """What must stay out of every text, passwords in addresses included. Of the keyring the entries matter, which it knows itself."""
        given = [self.secret_key, self.metrics_token]
        addresses = [self.database_url, self.redis_url, self.email_url]
        return [*filter(None, given), *(password for address in filter(None, addresses) for password in _passwords(address))]


def read(environment: Mapping[str, str] = os.environ) -> Env:
    """The operator's settings. Raises ImproperlyConfigured with the variable's name and what it should look like."""
    say = _Reader(environment)
    data_dir = Path(say.text("DATA_DIR", str(REPOSITORY / "var"))).expanduser()
    if not data_dir.is_absolute():
        data_dir = Path.cwd() / data_dir
    port = say.number("PORT", 8000, least=1, most=65535)
    open_requests = say.number("OPEN_REQUESTS", 2500, least=1)
    return Env(
        data_dir=data_dir,
        database_url=say.text("DATABASE_URL", f"sqlite:///{data_dir / 'sluice.sqlite3'}"),
        redis_url=say.optional("REDIS_URL"),
        secret_key=say.secret("SECRET_KEY"),
        keyring=say.secret("KEYRING"),
        host=say.text("HOST", "127.0.0.1"),
        port=port,
        allowed_hosts=say.words("ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]"),
        cors_allow_origins=say.words("CORS_ALLOW_ORIGINS", "*"),
        trusted_proxies=say.networks("TRUSTED_PROXIES"),
        email_url=say.text("EMAIL_URL", "consolemail://"),
        mail_from=say.optional("MAIL_FROM"),
        public_url=say.url("PUBLIC_URL", f"http://127.0.0.1:{port}"),
        egress_allow=say.networks("EGRESS_ALLOW"),
        debug=say.flag("DEBUG", default=False),
        log_level=say.choice("LOG_LEVEL", "INFO", ["DEBUG", "INFO", "WARNING", "ERROR"]),
        log_format=say.choice("LOG_FORMAT", "text", ["text", "json"]),
        journal_fsync=say.flag("JOURNAL_FSYNC", default=False),
        journal_max_bytes=say.number("JOURNAL_MAX_BYTES", 1 << 30, least=1 << 16),
        journal_segment_bytes=say.number("JOURNAL_SEGMENT_BYTES", 8 << 20, least=1 << 12),
        usage_retention_days=say.optional_number("USAGE_RETENTION_DAYS", least=1, most=36500),
        body_limit_bytes=say.number("BODY_LIMIT_BYTES", 32 << 20, least=1 << 10),
        pool_wait_seconds=say.seconds("POOL_WAIT_SECONDS", 2),
        connect_seconds=say.seconds("CONNECT_SECONDS", 5),
        first_byte_seconds=say.seconds("FIRST_BYTE_SECONDS", 600),
        idle_seconds=say.seconds("IDLE_SECONDS", 300),
        total_seconds=say.seconds("TOTAL_SECONDS", 1800),
        heartbeat_seconds=say.seconds("HEARTBEAT_SECONDS", 15),
        drain_seconds=say.seconds("DRAIN_SECONDS", 120),
        drain_delay=say.seconds("DRAIN_DELAY", 0, may_be_none=True),
        head_seconds=say.seconds("HEAD_SECONDS", 10),
        body_idle_seconds=say.seconds("BODY_IDLE_SECONDS", 15),
        body_slow_seconds=say.seconds("BODY_SLOW_SECONDS", 60),
        keep_alive_seconds=say.seconds("KEEP_ALIVE_SECONDS", 75),
        reader_seconds=say.seconds("READER_SECONDS", 60),
        stall_seconds=say.seconds("STALL_SECONDS", 1),
        open_requests=open_requests,
        upstream_requests=say.number("UPSTREAM_REQUESTS", max(1, open_requests // 2), least=1),
        ejection_seconds=say.seconds("EJECTION_SECONDS", 30),
        cut_revoked_calls=say.flag("CUT_REVOKED_CALLS", default=False),
        metrics_token=say.secret("METRICS_TOKEN"),
    )


def keyring_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where the keyring was read from, if the operator gave a file."""
    path = environment.get("KEYRING_FILE", "").strip()
    return Path(path) if path else None


def _passwords(address: str) -> set[str]:
    """As it is written in this address, and as it is said. One that the address has in another part, too (postgres://sluice:sluice@db),
    hides nothing: to take it out would only make holes in ordinary words."""
    try:
        parts = urlsplit(address)
        written = {parts.password or ""}
        written |= {value for name, value in parse_qsl(parts.query) if name.endswith("password")}
        open_parts = {parts.scheme, parts.username, parts.hostname, *parts.path.split("/")}
    except ValueError:  # not an address: whoever uses it complains
        return set()
    return {way for password in written - open_parts for way in (password, unquote(password)) if way}


class _Reader:
    """Reads one variable at a time and complains in words. An empty value counts as not set."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.values = {name: value for name, value in environment.items() if value.strip()}
        self.files = environ.FileAwareEnv()
        # The library reads its own `ENVIRON`; handing ours in keeps this testable.
        self.files.ENVIRON = FileAwareMapping(env=self.values)

    def optional(self, name: str) -> str | None:
        value = self.values.get(name)
        return value.strip() if value else None

    def text(self, name: str, default: str) -> str:
        return self.optional(name) or default

    def secret(self, name: str) -> str | None:
        if name in self.values and f"{name}_FILE" in self.values:
            raise ImproperlyConfigured(f"{name} and {name}_FILE are both set: give one of them.")
        try:
            value = self.files.str(name, default="")
        except OSError as problem:
            raise ImproperlyConfigured(f"{name}_FILE cannot be read: {problem.strerror}.") from None
        secret = str(value).strip()
        if not secret and f"{name}_FILE" in self.values:
            raise ImproperlyConfigured(f"{name}_FILE: the file is empty.")
        return secret or None

    def _parsed(self, name: str, default: T, parse: Callable[[str], T], wanted: str) -> T:
        value = self.optional(name)
        if value is None:
            return default
        try:
            return parse(value)
        except ValueError:
            raise ImproperlyConfigured(f"{name}: {value!r} is not {wanted}.") from None

    def number(self, name: str, default: int, *, least: int, most: int = 1 << 62) -> int:
        value = self._parsed(name, default, int, "a whole number")
        if not least <= value <= most:
            raise ImproperlyConfigured(f"{name}: {value} is not between {least} and {most}.")
        return value

    def optional_number(self, name: str, *, least: int, most: int) -> int | None:
        return None if self.optional(name) is None else self.number(name, least, least=least, most=most)

    def seconds(self, name: str, default: float, *, may_be_none: bool = False) -> float:
        value = self._parsed(name, default, float, "a number of seconds")
        if not (0 < value < 1e9 or (may_be_none and value == 0)):
            raise ImproperlyConfigured(f"{name}: {value} is not a number of seconds {'from' if may_be_none else 'above'} 0.")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        meanings = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

        def parse(value: str) -> bool:
            if value.lower() not in meanings:
                raise ValueError
            return meanings[value.lower()]

        return self._parsed(name, default, parse, "1 or 0")

    def choice(self, name: str, default: str, choices: list[str]) -> str:
        value = self.text(name, default)
        if value not in choices:
            raise ImproperlyConfigured(f"{name}: {value!r} is none of {', '.join(choices)}.")
        return value

    def words(self, name: str, default: str = "") -> list[str]:
        return [word.strip() for word in self.text(name, default).split(",") if word.strip()]

    def networks(self, name: str) -> list[Network]:
        try:
            return [ipaddress.ip_network(word) for word in self.words(name)]
        except ValueError as problem:
            raise ImproperlyConfigured(f"{name}: {problem}. Give networks such as 10.0.0.0/8, separated by commas.") from None

    def url(self, name: str, default: str) -> str:
        value = self.text(name, default).rstrip("/")
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ImproperlyConfigured(f"{name}: {value!r} is not an address such as https://sluice.example.org.")
        return value


def own(data_dir: Path) -> None:
    """Make DATA_DIR (0700) if it is absent. Raises ImproperlyConfigured when another user owns it."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = data_dir.stat().st_uid
    except OSError as problem:
        raise ImproperlyConfigured(f"DATA_DIR: {data_dir} cannot be used: {problem.strerror}.") from None
    if owner != os.geteuid():
        raise ImproperlyConfigured(
            f"DATA_DIR: {data_dir} belongs to user {owner}, and this command runs as {os.geteuid()}. "
            "Files it made would be unreadable for the server: run it as that user."
        )
