"""All that the hot path knows of a tenant: who calls, and what they may spend. No Django here.

An issued key reads `sk-sluice-` + 10 base62 id + 43 base62 secret + 6 base62 checksum. Only its HMAC is kept.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import string
import zlib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache

ALPHABET = string.digits + string.ascii_letters
PREFIX = "sk-sluice-"
ID_LENGTH, SECRET_LENGTH, CHECKSUM_LENGTH = 10, 43, 6
KEY_LENGTH = len(PREFIX) + ID_LENGTH + SECRET_LENGTH + CHECKSUM_LENGTH
LONGEST_KEY = 512  # of an imported one
STRONG_LENGTH = 16  # an imported key that is shorter can be guessed

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
    frozen_until: float | None = None  # seconds since the epoch: by hand, on the key or on what is above it
    frozen_reason: str = ""
    scopes: tuple[str, ...] = field(init=False, repr=False, compare=False)  # all that limits of its organization may stand on

    def __post_init__(self) -> None:
        scopes = [f"organization:{self.organization_id}", f"user:{self.user_id}@{self.organization_id}", f"key:{self.key_id}"]
        if self.team_id is not None:
            scopes.append(f"team:{self.team_id}")
        object.__setattr__(self, "scopes", tuple(scopes))

    def may_use(self, model: str) -> bool:
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)


_THREE_DIGITS = [a + b + c for a in ALPHABET for b in ALPHABET for c in ALPHABET]


def mint() -> tuple[str, str]:
    """A new key and its public id. The key is shown once and never stored."""
    handle = "".join(secrets.choice(ALPHABET) for _ in range(ID_LENGTH))
    body = handle + "".join(secrets.choice(ALPHABET) for _ in range(SECRET_LENGTH))
    return PREFIX + body + checksum(body), handle


def checksum(body: str) -> str:
    """The CRC-32 in base 62: two halves of three digits each are looked up, since every request asks for it."""
    high, low = divmod(zlib.crc32(body.encode()), 62**3)
    return _THREE_DIGITS[high] + _THREE_DIGITS[low]


def is_plausible(key: str) -> bool:
    """False for what cannot be a key of ours: a typo or a random probe is refused without any look-up.

    A key without our prefix may be an imported one, which has no checksum."""
    if not key.startswith(PREFIX):
        return 8 <= len(key) <= LONGEST_KEY and key.isascii() and key.isprintable()
    body = key[len(PREFIX) : -CHECKSUM_LENGTH]
    return len(key) == KEY_LENGTH and key.isascii() and body.isalnum() and key.endswith(checksum(body))


def digest(pepper: bytes, key: str) -> bytes:
    """What is stored of a key: 32 bytes. `pepper` comes from the keyring, outside the database."""
    # Not hmac.digest(): that gives the interpreter's lock away for a microsecond's work, and may wait for it to come back.
    keyed = _keyed(pepper).copy()
    keyed.update(key.encode())
    return keyed.digest()


@lru_cache(maxsize=8)
def _keyed(pepper: bytes) -> hmac.HMAC:
    return hmac.new(pepper, digestmod="sha256")
