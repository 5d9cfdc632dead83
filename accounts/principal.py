"""All that the hot path knows of a tenant: who calls, and what they may spend. No Django here.

An issued key reads `sk-sluice-` + 10 base62 id + 43 base62 secret + 6 base62 checksum. Only its HMAC is kept.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import string
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase

ALPHABET = string.digits + string.ascii_letters
PREFIX = "sk-sluice-"
ID_LENGTH, SECRET_LENGTH, CHECKSUM_LENGTH = 10, 43, 6
KEY_LENGTH = len(PREFIX) + ID_LENGTH + SECRET_LENGTH + CHECKSUM_LENGTH

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

METRICS = ("rpm", "tpm", "concurrency", "money")
WINDOWS = ("day", "week", "month", "total")


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit on one scope. `amount` is requests or tokens per minute, open requests, or micro-dollars per window."""

    scope: str  # "organization:1", "team:2", "user:3@1", "key:4"
    metric: str
    amount: int
    window: str = ""  # money only
    time_zone: str = "UTC"  # in which the windows of money begin
    enforce: bool = True  # False: shadow, that is counted and never refused


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller behind one issued key, with every limit that applies to it."""

    key_id: int
    organization_id: int
    user_id: int
    team_id: int | None = None
    models: tuple[str, ...] = ()  # patterns of model names; empty = all
    networks: tuple[Network, ...] = ()  # where it may call from; empty = anywhere
    expires_at: float | None = None  # seconds since the epoch
    limits: tuple[Limit, ...] = ()
    tags: tuple[str, ...] = ()

    def may_use(self, model: str) -> bool:
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)


def mint() -> tuple[str, str]:
    """A new key and its public id. The key is shown once and never stored."""
    handle = "".join(secrets.choice(ALPHABET) for _ in range(ID_LENGTH))
    body = handle + "".join(secrets.choice(ALPHABET) for _ in range(SECRET_LENGTH))
    return PREFIX + body + checksum(body), handle


def checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    digits = ""
    for _ in range(CHECKSUM_LENGTH):
        number, rest = divmod(number, 62)
        digits = ALPHABET[rest] + digits
    return digits


def is_plausible(key: str) -> bool:
    """False for what cannot be a key of ours: a typo or a random probe is refused without any look-up.

    A key without our prefix may be an imported one, which has no checksum."""
    if not key.startswith(PREFIX):
        return 8 <= len(key) <= 512 and key.isascii() and key.isprintable()
    body = key[len(PREFIX) : -CHECKSUM_LENGTH]
    return len(key) == KEY_LENGTH and key.isascii() and body.isalnum() and key.endswith(checksum(body))


def digest(pepper: bytes, key: str) -> bytes:
    """What is stored of a key: 32 bytes. `pepper` comes from the keyring, outside the database."""
    return hmac.digest(pepper, key.encode(), "sha256")
