"""The keys that seal what the database holds. They live outside the database.

A keyring is text: one entry a line (or separated by commas), the newest first. An entry is any secret of at least 32
characters and serves every purpose; `seal:<secret>` serves sealing alone and `pepper:<secret>` the digests of issued
keys alone, so that either can be rotated without the other. Old entries stay below for reading.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import secrets
from functools import lru_cache
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from django.core.exceptions import ImproperlyConfigured

from providers.secrets import redact

log = logging.getLogger(__name__)

PURPOSES = ("seal", "pepper")
MINIMUM_LENGTH = 32


class Keyring:
    """Reads its text at the first use, so that commands which need no key leave no file behind.

    A keyring that is a file is read again when it has changed: it can be rotated while everything runs."""

    def __init__(self, text: str | None, path: Path | None, *, given: Path | None = None) -> None:
        """`text` is what the operator gave, and `given` the file it came from, if it did; otherwise `path` is read, and made (0600)
        when it is absent. None of them means that a keyring must be given: `keys` then raises ImproperlyConfigured."""
        self._text = text
        self._path = path
        self._watched = given if given is not None else path if text is None else None
        self._seen: tuple[int, int, int] | None = None  # what the file was like when it was read
        self._entries: list[tuple[str | None, str]] | None = None

    def keys(self, purpose: str) -> dict[str, bytes]:
        """Key id (8 hex digits) -> 32 bytes for this purpose, the newest first. Raises ImproperlyConfigured."""
        if self._entries is None:
            self._entries = _parse(self._read())
            self._seen = self._looks()
            redact.learn_own(self.entries())
        elif (looks := self._looks()) is not None and looks != self._seen:
            self._read_again(looks)
        keys = {_fingerprint(secret): _derive(secret, purpose) for only, secret in self._entries if only in (None, purpose)}
        if not keys:
            raise ImproperlyConfigured(f"KEYRING has no entry for '{purpose}': add a line with a secret of 32 characters or more.")
        return keys

    @property
    def own_file(self) -> Path | None:
        """Where it is kept when nobody gave one."""
        return self._path if self._text is None else None

    def entries(self) -> list[str]:
        """The secrets themselves, as far as there are any to read: none is made, and nothing is complained of."""
        if self._entries is not None:
            return [secret for _, secret in self._entries]
        try:
            text = self._text if self._text is not None else self._path.read_text() if self._path is not None else ""
            return [secret for _, secret in _parse(text)]
        except (OSError, ImproperlyConfigured):
            return []

    def _looks(self) -> tuple[int, int, int] | None:
        if self._watched is None:
            return None
        try:
            found = self._watched.stat()
        except OSError:
            return None  # gone for a moment, or for good: what was read stays in force
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read_again(self, looks: tuple[int, int, int]) -> None:
        assert self._watched is not None
        self._seen = looks  # whatever comes of it: a bad file is complained of once
        try:
            self._entries = _parse(self._watched.read_text()) or self._entries
        except (OSError, ImproperlyConfigured) as problem:
            log.error("%s has changed and cannot be used; what was read before stays in force. %s", self._watched, problem)
        else:
            redact.learn_own(self.entries())
            log.info("The keyring has changed, and was read again from %s", self._watched)

    def _read(self) -> str:
        if self._text is not None:
            return self._text
        if self._path is None:
            raise ImproperlyConfigured(
                "KEYRING is not set. With Postgres or Redis several processes must share it: "
                "set KEYRING (or KEYRING_FILE) to a secret of 32 characters or more, and keep a copy beside your backups."
            )
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return _make(self._path)


def secret_file(path: Path) -> str:
    """The secret in this file, made (0600) at the first use."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return _make(path).strip()


def _make(path: Path) -> str:
    text = base64.urlsafe_b64encode(secrets.token_bytes(48)).decode() + "\n"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Two commands may start at once: the whole file appears under its name in one step, and the first one wins.
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        os.link(draft, path)
    except FileExistsError:
        return path.read_text()
    finally:
        draft.unlink()
    return text


def _parse(text: str) -> list[tuple[str | None, str]]:
    entries: list[tuple[str | None, str]] = []
    for word in text.replace(",", "\n").split():
        only, colon, secret = word.partition(":")
        if not colon or only not in PURPOSES:
            only, secret = "", word
        if len(secret) < MINIMUM_LENGTH:
            raise ImproperlyConfigured(f"KEYRING: each entry needs at least {MINIMUM_LENGTH} characters; one has {len(secret)}.")
        entries.append((only or None, secret))
    return entries


def _fingerprint(secret: str) -> str:
    return hashlib.sha256(b"sluice keyring entry\0" + secret.encode()).hexdigest()[:8]


@lru_cache(maxsize=32)  # asked for at each sealed thing that is opened
def _derive(secret: str, purpose: str) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=f"sluice:{purpose}:v1".encode()).derive(secret.encode())
