"""Python processes that begin with the libraries imported: to import them anew costs each half a second.

They are forked from one process (`python -m tests.forks`) that has imported what the product stands on, and of the product
what asks for no settings: those are read from the environment when they are imported, after the fork. Each process begins
there as Python does with a main module.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent

# What takes time to import and asks for no settings.
LIBRARIES = (
    "accounts.principal",
    "allauth",
    "brotli",
    "channels.routing",
    "cryptography.x509",
    "django.contrib.admin.helpers",
    "django.contrib.admin.templatetags.admin_list",
    "django.contrib.staticfiles.storage",
    "django.core.mail.backends.smtp",
    "django.core.management.commands.migrate",
    "django.db.backends.postgresql.base",
    "django.db.backends.sqlite3.base",
    "environ",
    "h2.connection",
    "httpcore",
    "httpx",
    "project.server",
    "pydantic.fields",
    "pydantic.types",
    "proxy.gateway",
    "uvicorn.protocols.http.httptools_impl",
    "websockets.server",
    "whitenoise.middleware",
)


class Forked:
    """A process that another one than this has forked: the part of Popen that is needed here. Its parent writes down how it ended."""

    def __init__(self, pid: int, ended: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = ended

    def poll(self) -> int | None:
        if self.returncode is None and self._ended.exists():
            self.returncode = int(self._ended.read_text())
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("the forked process", timeout)
            time.sleep(0.005)
        return status

    def send_signal(self, sign: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sign)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Parent:
    """Of those who fork: has their children's ends written down."""

    def __init__(self) -> None:
        self._ends: dict[int, Path] = {}
        signal.signal(signal.SIGCHLD, lambda *_: self._write_down_ends())

    def fork(self, ended: Path) -> int:
        """As os.fork: 0 in the child. Its exit status goes into the file `ended`."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # it may end before we know its number
        try:
            pid = os.fork()
            if pid:
                self._ends[pid] = ended
            else:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        return pid

    def _write_down_ends(self) -> None:
        for pid, ended in list(self._ends.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._ends[pid]
                unfinished = ended.with_suffix(".part")
                unfinished.write_text(str(os.waitstatus_to_exitcode(status)))
                unfinished.rename(ended)


def become(words: list[str], files: tuple[int, int, int]) -> None:
    """In a forked process: as if Python had been started with these words and these standard files. Returns when it is done."""
    for there, file in enumerate(files):
        os.dup2(file, there)
    os.closerange(3, 256)  # what the parent has open, its ends of pipes among them
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w", buffering=1)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")


class Libraries:
    """The process that has the libraries imported. It starts when it is first asked, and ends with this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._link: socket.socket | None = None

    def fork(self, words: list[str], env: Mapping[str, str], ended: Path, files: tuple[int, int, int]) -> Forked:
        """As Popen of Python with these words, of which `-m`, a module and what it is given, or a file of the repository and so on.
        How it ended goes into the file `ended`, which is not there yet."""
        with self._lock:
            link = self._started()
            order = json.dumps({"words": words, "env": dict(env), "ended": str(ended)}).encode() + b"\n"
            sent = socket.send_fds(link, [order], files)
            link.sendall(order[sent:])
            return Forked(int(_line(link)), ended)

    def _started(self) -> socket.socket:
        if self._link is None:
            self._link, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
                    cwd=REPOSITORY,
                    env={name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ},
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            atexit.register(_end, self._link, process)
        return self._link


libraries = Libraries()


def _end(link: socket.socket, process: subprocess.Popen[bytes]) -> None:
    link.close()
    process.wait(60)


def _line(link: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        more = link.recv(1 << 16)
        if not more:
            raise EOFError("the other end is gone")
        line += more
    return line


def _orders(link: socket.socket) -> Iterator[tuple[dict[str, Any], tuple[int, int, int]]]:
    while True:
        line, files, _, _ = socket.recv_fds(link, 1 << 16, 3)
        if not line:
            return
        if not line.endswith(b"\n"):
            line += _line(link)
        yield json.loads(line), tuple(files)


def _fork_for_orders(link: socket.socket) -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    assert "project.settings" not in sys.modules
    assert threading.active_count() == 1, "no thread survives a fork"
    gc.collect()
    gc.freeze()  # else each child would go through all of it again
    parent = Parent()
    for order, files in _orders(link):
        pid = parent.fork(Path(order["ended"]))
        if not pid:
            link.detach()
            os.environ.clear()
            os.environ.update(order["env"])
            sys.path[1:1] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
            return become(order["words"], files)
        for file in files:
            os.close(file)
        link.sendall(b"%d\n" % pid)
    os._exit(0)  # to take down what it has imported would cost more than half of what it cost to import


if __name__ == "__main__":
    _fork_for_orders(socket.socket(fileno=int(sys.argv[1])))
