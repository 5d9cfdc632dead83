"""Upstream secrets: in memory, sealed at rest, and kept out of every text that leaves. No Django here.

A sealed value is `version | key id | wrapped data key | nonce | ciphertext`: AES-256-GCM under a fresh data key, which
is itself wrapped by a key of the keyring. Both layers are bound to where the value stands (table, row, column,
purpose, origin), so a ciphertext moved elsewhere, cut or read with another key is refused, never guessed at.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

VERSION = b"\x01"
_ID, _NONCE, _WRAPPED = 8, 12, 12 + 32 + 16


class SealBroken(Exception):
    """The value does not open here: another key, another place, or a changed ciphertext."""


@dataclass(frozen=True, slots=True)
class SecretText:
    """A credential in memory. Printing it, logging it or formatting it shows nothing."""

    _text: str

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "SecretText(…)"

    __str__ = __repr__

    def __bool__(self) -> bool:
        return bool(self._text)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sealed value stands. `origin` is the upstream (scheme://host:port) that the secret may be sent to."""

    table: str
    row: str
    column: str
    purpose: str
    origin: str = ""

    def bound(self) -> bytes:
        parts = (self.table, self.row, self.column, self.purpose, self.origin)
        return b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)


def seal(text: str, place: Place, keys: Mapping[str, bytes]) -> bytes:
    """Seal with the first of `keys` (key id -> 32 bytes)."""
    key_id, key = next(iter(keys.items()))
    data_key, bound = AESGCM.generate_key(256), place.bound()
    head = VERSION + key_id.encode()
    outer, inner = os.urandom(_NONCE), os.urandom(_NONCE)
    wrapped = outer + AESGCM(key).encrypt(outer, data_key, head + b"key" + bound)
    return head + wrapped + inner + AESGCM(data_key).encrypt(inner, text.encode(), head + b"text" + bound)


def open_sealed(blob: bytes, place: Place, keys: Mapping[str, bytes]) -> SecretText:
    """Raises SealBroken."""
    head, rest = blob[: 1 + _ID], blob[1 + _ID :]
    key = keys.get(head[1:].decode("latin-1"))
    if head[:1] != VERSION or key is None or len(rest) < _WRAPPED + _NONCE + 16:
        raise SealBroken("No key of this keyring opens the value.")
    wrapped, inner = rest[:_WRAPPED], rest[_WRAPPED:]
    bound = place.bound()
    try:
        data_key = AESGCM(key).decrypt(wrapped[:_NONCE], wrapped[_NONCE:], head + b"key" + bound)
        return SecretText(AESGCM(data_key).decrypt(inner[:_NONCE], inner[_NONCE:], head + b"text" + bound).decode())
    except InvalidTag:
        raise SealBroken("The value was sealed for another place, or changed since.") from None


def sealed_with(blob: bytes) -> str:
    """The id of the key that sealed this value, so that a rotation can find what is left to do."""
    return blob[1 : 1 + _ID].decode("latin-1")


class Redactor:
    """Takes secrets out of text: those it was told of, by value, and whatever has the shape of one."""

    _SHAPES = re.compile(
        r"sk-sluice-[0-9A-Za-z]{6,}"
        r"|(?i:bearer\s+)[^\s\"',;]{6,}"
        r"|\b(?:sk|pk|rk)-[A-Za-z0-9_-]{12,}"
        r"|\bAIza[0-9A-Za-z_-]{20,}"
        r"|\bya29\.[0-9A-Za-z_-]{10,}"
        r"|\bgh[pousr]_[0-9A-Za-z]{20,}"
        r"|\bxox[abprs]-[0-9A-Za-z-]{10,}"
        r"|\beyJ[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]*"
    )
    SHORTEST = 6  # shorter values would redact ordinary words
    MOST_NAMES = 4096
    MOST_OWN, MOST_GIVEN = 64, 256  # of those that no reading replaces; the oldest go first

    def __init__(self) -> None:
        self._known: re.Pattern[str] | None = None
        self._values: frozenset[str] = frozenset()
        self._read: frozenset[str] = frozenset()
        self._given: dict[str, None] = {}
        self._own: dict[str, None] = {}
        self._names: dict[str, str] = {}
        self._alone = threading.Lock()  # the accounts are read in a thread, and secrets given in others

    def learn(self, values: Iterable[str]) -> None:
        """What all the accounts have now, in place of what they had."""
        read = frozenset(self._long(values))
        with self._alone:
            self._read = read
            self._compile()

    def learn_more(self, values: Iterable[str]) -> None:
        """A secret that has just been given or opened. It stays known: a reading may have begun before it, and a log line come after
        it was replaced."""
        self._keep(self._given, values, self.MOST_GIVEN)

    def learn_own(self, values: Iterable[str]) -> None:
        """Secrets of this process itself, which stay known as long as it lives."""
        self._keep(self._own, values, self.MOST_OWN)

    def _keep(self, kept: dict[str, None], values: Iterable[str], most: int) -> None:
        values = self._long(values)
        with self._alone:
            for value in values:
                kept.pop(value, None)
                kept[value] = None  # the latest last
            while len(kept) > most:
                del kept[next(iter(kept))]
            self._compile()

    def _long(self, values: Iterable[str]) -> list[str]:
        return [value for value in values if len(value) >= self.SHORTEST]

    def _compile(self) -> None:
        values = self._read.union(self._given, self._own)
        if values == self._values:
            return
        self._values = values
        # Longer ones first: one may begin with another.
        self._known = re.compile("|".join(re.escape(value) for value in sorted(values, key=len, reverse=True))) if values else None
        self._names = {}  # a new one: what is being looked up meanwhile goes into the old

    def __call__(self, text: str) -> str:
        if self._known is not None:
            text = self._known.sub("[redacted]", text)
        return self._SHAPES.sub("[redacted]", text)

    def name(self, text: str) -> str:
        """The same for names that come again and again, such as a model's: remembered, because each request has two."""
        names = self._names
        known = names.get(text)
        if known is None:
            if len(names) >= self.MOST_NAMES:
                names.clear()
            known = names[text] = self(text)
        return known


redact = Redactor()
