"""The append-only usage journal of one worker: what was admitted, and what became of it. No database here.

Each worker has a folder `journal/<random id>/` with numbered segments and a `lock` that it holds for life. A record is
length + CRC-32 + JSON. Anyone may read; only the holder of the lock deletes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from proxy.call import Tried

HEAD = struct.Struct("<II")
RESERVE_BYTES = 1 << 20
MOST_RECORD_BYTES = 1 << 20


class JournalFull(Exception):
    """Nothing more can be admitted: the disk is full, or the journal has reached its cap."""


class Admitted(msgspec.Struct, tag="admitted", tag_field="t", omit_defaults=True, frozen=True, gc=False):
    """Written before the upstream is called. `at` and every time is in milliseconds since the epoch."""

    request_id: str
    at: int
    organization: int
    user: int
    key: int
    model: str
    endpoint: str
    team: int | None = None
    stream: bool = False
    input_estimate: int = 0
    served_model: str = ""
    provider: str = ""
    credential: int | None = None
    price: int | None = None
    cost_estimate: int | None = None  # of the estimated input alone, in micro-dollars


class Settled(msgspec.Struct, tag="settled", tag_field="t", omit_defaults=True, frozen=True, gc=False):
    """All that is kept of a finished request; needs no other record to be understood."""

    request_id: str
    at: int
    organization: int
    user: int
    key: int
    model: str
    endpoint: str
    status: int
    team: int | None = None
    stream: bool = False
    served_model: str = ""
    provider: str = ""
    credential: int | None = None
    error: str = ""
    attempts: int = 0
    fresh_input: int = 0
    cache_read: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0
    cost: int | None = None  # micro-dollars; None = unpriced
    price: int | None = None
    upstream_cost: int | None = None  # micro-dollars, as the upstream says
    usage_source: str = "missing"
    first_byte_ms: int | None = None
    duration_ms: int = 0
    tried: tuple[Tried, ...] = ()  # the attempts before the last


Record = Admitted | Settled
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Record).decode
_ADMITTED = b'{"t":"admitted"'  # how those begin


def frame(record: Record) -> bytes:
    payload = _encode(record)
    if len(payload) > MOST_RECORD_BYTES:
        raise ValueError("A record larger than its reader takes would hide all that follow.")
    return HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def settlements(segment: Path, offset: int = 0, until: int | None = None) -> tuple[list[Settled], int]:
    """The settled records alone, from `offset` on, and the offset behind the last record that is whole. Raises as `read` does."""
    found: list[Settled] = []
    for payload, end in _payloads(segment, offset, until):
        offset = end
        if not payload.startswith(_ADMITTED):
            record = _decode(payload)
            if isinstance(record, Settled):
                found.append(record)
    return found, offset


def read(segment: Path, offset: int = 0, until: int | None = None) -> Iterator[tuple[Record, int]]:
    """Records from `offset` on, each with the offset behind it. Stops at the first one that is not whole.

    Raises FileNotFoundError when the segment has been shipped and deleted meanwhile."""
    for payload, end in _payloads(segment, offset, until):
        yield _decode(payload), end


def _payloads(segment: Path, offset: int, until: int | None) -> Iterator[tuple[bytes, int]]:
    """The encoded records, checked.

    Raises FileNotFoundError when the segment has been shipped and deleted meanwhile."""
    with segment.open("rb") as file:
        file.seek(offset)
        data = file.read(-1 if until is None else max(0, until - offset))
    position = 0
    while position + HEAD.size <= len(data):
        length, check = HEAD.unpack_from(data, position)
        payload = data[position + HEAD.size : position + HEAD.size + length]
        if length > MOST_RECORD_BYTES or len(payload) < length or zlib.crc32(payload) != check:
            return
        position += HEAD.size + length
        yield payload, offset + position


def is_torn(segment: Path, offset: int) -> bool:
    """Whether what follows the last whole record is no more than the beginning of one: a writer died while it wrote.

    Anything else is damage, and may hide records behind it."""
    with segment.open("rb") as file:
        file.seek(offset)
        rest = file.read(MOST_RECORD_BYTES + HEAD.size + 1)
    if len(rest) < HEAD.size:
        return True
    length, _ = HEAD.unpack_from(rest)
    return bool(length <= MOST_RECORD_BYTES and len(rest) < HEAD.size + length)


def set_aside(folder: Path, descriptor: int) -> Path:
    """Keep a damaged journal, out of the way of those that look for journals, and give its lock up. Where it is now."""
    kept = folder.with_name(f".damaged-{folder.name}")
    folder.rename(kept)
    os.close(descriptor)
    return kept


def segments(folder: Path) -> list[Path]:
    """The segments of one journal, the oldest first; empty when the folder is gone."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".seg"))
    except FileNotFoundError:
        return []
    return [folder / name for name in names]


def folders(root: Path) -> list[Path]:
    """The journals of all workers, alive or dead."""
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except FileNotFoundError:
        return []


def lock(folder: Path) -> int | None:
    """A descriptor that holds the lock of this journal, or None when its worker lives (or the folder is gone).

    The inode is compared again under the lock: another adopter may have been here first."""
    path = folder / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def remove(folder: Path, descriptor: int) -> None:
    """Delete a journal whose lock is held, and give the lock up."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)


class Journal:
    """Written by one worker's event loop; make it after any fork."""

    def __init__(self, root: Path, *, segment_bytes: int = 8 << 20, max_bytes: int = 1 << 30, fsync: bool = False) -> None:
        self._segment_bytes, self._max_bytes, self._fsync = segment_bytes, max_bytes, fsync
        self._open: dict[str, bytes] = {}
        self._unsaved: list[bytes] = []
        self._reserved = False
        name = secrets.token_hex(8)
        draft = root / f".{name}"
        draft.mkdir(mode=0o700, parents=True)
        self._lock = os.open(draft / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.folder = root / name
        draft.rename(self.folder)
        self._number = 1
        self._descriptor = self._create(self._number)
        self._size = 0
        self._sealed: dict[int, int] = {}  # bytes by segment, which two threads change: so no sum of it is kept
        self.shipped = (1, 0)  # how far the ledger has stored it
        self._reserve()

    def admitted(self, record: Admitted) -> None:
        """Raises JournalFull, and then the upstream must not be called."""
        data = frame(record)
        if self.size + len(data) > self._max_bytes:
            raise JournalFull("The journal has reached its size cap.")
        if (self._unsaved or not self._reserved) and not (self._save_rest() and self._reserve()):
            raise JournalFull("The disk is full.")
        try:
            self._append(data)
        except OSError as problem:
            raise JournalFull(f"The journal cannot be written: {problem.strerror}.") from problem
        self._open[record.request_id] = data
        if self._size > self._segment_bytes:
            self._rotate()

    def settled(self, record: Settled) -> None:
        """Never raises: on a full disk the reserve makes room, and what still does not fit is kept to be written later."""
        self._open.pop(record.request_id, None)
        data = frame(record)
        try:
            self._append(data)
        except OSError:
            try:
                self._release()
                self._append(data)
            except OSError:
                self._unsaved.append(data)

    def takes_more(self) -> bool:
        """Whether a request could be admitted, as far as that can be known without one. Makes the reserve again where it is gone."""
        if self.size >= self._max_bytes:
            return False
        return (self._reserved and not self._unsaved) or (self._save_rest() and self._reserve())

    def position(self) -> tuple[int, int]:
        """(segment number, offset) behind the last record."""
        return self._number, self._size

    def segment(self, number: int) -> Path:
        return self.folder / f"{number:08}.seg"

    def drop(self, number: int) -> None:
        """A sealed segment has been shipped whole: delete it."""
        self.segment(number).unlink(missing_ok=True)
        self._sealed.pop(number, None)  # the ledger's thread: the loop only adds

    @property
    def size(self) -> int:
        return sum(tuple(self._sealed.values())) + self._size

    @property
    def behind(self) -> int:
        """Bytes that the ledger has not stored yet."""
        return max(0, self.size - self.shipped[1])

    def is_shipped(self) -> bool:
        """Nothing is open and nothing is left to store: the journal may go."""
        return self.shipped == self.position() and not self._open and not self._unsaved

    def close(self, *, remove_folder: bool = False) -> None:
        """Give the journal up. What is left in it will be adopted by the next worker that looks."""
        os.close(self._descriptor)
        if remove_folder:
            remove(self.folder, self._lock)
        else:
            os.close(self._lock)

    def _append(self, data: bytes) -> None:
        try:
            written = os.write(self._descriptor, data)
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        if written != len(data):
            os.ftruncate(self._descriptor, self._size)
            raise OSError(errno.ENOSPC, "No space left on device")
        self._size += written
        if self._fsync:
            os.fdatasync(self._descriptor) if hasattr(os, "fdatasync") else os.fsync(self._descriptor)

    def _rotate(self) -> None:
        """Begin a new segment and carry the open admissions over, so that a long stream pins nothing."""
        carried = b"".join(self._open.values())
        if len(carried) > self._segment_bytes // 2:
            return  # mostly open admissions: a new segment would be full at once
        descriptor = -1
        try:
            descriptor = self._create(self._number + 1)
            if os.write(descriptor, carried) != len(carried):
                raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if descriptor >= 0:
                os.close(descriptor)
                self.segment(self._number + 1).unlink(missing_ok=True)
            return  # no room: the old segment goes on
        os.close(self._descriptor)
        self._sealed[self._number] = self._size
        self._number, self._descriptor, self._size = self._number + 1, descriptor, len(carried)

    def _create(self, number: int) -> int:
        return os.open(self.segment(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    def _reserve(self) -> bool:
        """Keep some room aside for requests that run when the disk fills up."""
        try:
            with (self.folder / "reserve").open("wb") as file:
                file.write(b"\0" * RESERVE_BYTES)
        except OSError:
            with suppress(OSError):
                self._release()
            return False
        self._reserved = True
        return True

    def _release(self) -> None:
        (self.folder / "reserve").unlink(missing_ok=True)
        self._reserved = False

    def _save_rest(self) -> bool:
        while self._unsaved:
            try:
                self._append(self._unsaved[0])
            except OSError:
                return False
            self._unsaved.pop(0)
        return True
