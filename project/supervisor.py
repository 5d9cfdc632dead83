"""`serve --workers N`: binds once, and keeps N workers alive on the one socket that all inherit.

A worker that dies is replaced, after a pause that grows while it keeps dying. SIGHUP replaces them all, one after the other: each
new one is ready before an old one begins to drain, and the socket is open all the while, so nobody is refused. SIGTERM and SIGINT
drain them all, and the socket ends when the last of them takes no more. Workers are new processes, not forks of this one: they run
the code that is on the disk now.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType

log = logging.getLogger(__name__)

SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
STEADY_SECONDS = 60.0  # a worker that lived for so long was a good one
LOOK_SECONDS = 0.2
START_SECONDS = 60.0
BACKLOG = 65_535  # connections that wait to be taken: as many as the kernel lets wait (net.core.somaxconn). The next ones are lost.


@dataclass(slots=True, eq=False)
class Worker:
    process: subprocess.Popen[bytes]
    says_ready: int  # a pipe
    began: float
    is_ready: bool = False

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def tell(self, sign: int) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(sign)


@dataclass(slots=True, eq=False)
class Place:
    """One of the N."""

    worker: Worker | None = None
    successor: Worker | None = None  # it starts, and then takes this place
    pause_seconds: float = SHORTEST_PAUSE_SECONDS
    start_at: float = 0.0


@dataclass(slots=True)
class Supervisor:
    """`command` starts one worker; `drain_seconds` is how long one may take to end after SIGTERM."""

    listener: socket.socket
    count: int
    command: Sequence[str]
    drain_seconds: float
    places: list[Place] = field(default_factory=list)
    leaving: list[Worker] = field(default_factory=list)
    _to_replace: list[Place] = field(default_factory=list)
    _signals: list[int] = field(default_factory=list)
    _has_started: bool = False
    _life: int = -1
    _keeps_alive: int = -1
    _wakes: int = -1

    def run(self) -> int:
        """Until a signal. The exit status: 0 when all ended well, 1 when the start failed or one had to be killed."""
        self.places = [Place() for _ in range(self.count)]
        self._life, self._keeps_alive = os.pipe()  # workers see its end when this process dies
        self._hear_signals()
        while True:
            for sign in self._taken_signals():
                if sign != signal.SIGHUP:
                    return self._end(0)
                log.info("Rolling restart: %d workers are replaced one after the other", self.count)
                self._to_replace = [*self._to_replace[:1], *self.places] if self._to_replace else list(self.places)
            if not self._look_after_all():
                log.error("A worker did not start: see above")
                return self._end(1)
            self._wait()

    # Workers

    def _spawn(self) -> Worker | None:
        """None when the system gives no process now, or the program is just being replaced: the others must not end for that."""
        try:
            reads, writes = os.pipe()
        except OSError as problem:
            log.error("No worker can be started: %s", problem)
            return None
        fds = {"--fd": self.listener.fileno(), "--ready-fd": writes, "--life-fd": self._life}
        words = [word for name, number in fds.items() for word in (name, str(number))]
        try:
            # In a group of its own: an interrupt from the terminal comes to this process alone, which hands it on.
            process = subprocess.Popen([*self.command, *words], pass_fds=tuple(fds.values()), process_group=0)  # noqa: S603 ourselves
        except OSError as problem:
            log.error("No worker can be started: %s", problem)
            os.close(reads)
            return None
        finally:
            os.close(writes)
        return Worker(process, reads, time.monotonic())

    def _look_after_all(self) -> bool:
        """False when the first start fails."""
        now = time.monotonic()
        for place in self.places:
            if place.worker is None and now >= place.start_at:
                place.worker = self._spawn()
                if place.worker is None and not self._has_started:
                    return False
                if place.worker is None:
                    self._put_off(place, now)
            elif place.worker is not None and place.worker.has_ended():
                if not self._has_started and not place.worker.is_ready:
                    return False
                self._bury(place, place.worker, now)
        self.leaving = [worker for worker in self.leaving if not self._is_gone(worker, now)]
        self._replace_next(now)
        self._has_started = self._has_started or all(place.worker is not None and place.worker.is_ready for place in self.places)
        return True

    def _bury(self, place: Place, worker: Worker, now: float) -> None:
        os.close(worker.says_ready)
        if now - worker.began >= STEADY_SECONDS:
            place.pause_seconds = SHORTEST_PAUSE_SECONDS
        log.error(
            "Worker %d ended with status %s; another starts in %g s", worker.process.pid, worker.process.returncode, place.pause_seconds
        )
        place.worker = None
        self._put_off(place, now)

    def _put_off(self, place: Place, now: float) -> None:
        place.start_at = now + place.pause_seconds
        place.pause_seconds = min(2 * place.pause_seconds, LONGEST_PAUSE_SECONDS)

    def _is_gone(self, worker: Worker, now: float) -> bool:
        if worker.has_ended():
            os.close(worker.says_ready)
            return True
        if now - worker.began >= self.drain_seconds:  # `began` to leave
            log.error("Worker %d does not end: it is killed", worker.process.pid)
            worker.tell(signal.SIGKILL)
        return False

    def _replace_next(self, now: float) -> None:
        """One at a time, and the old one goes only when the new one takes requests."""
        if not self._to_replace:
            return
        place = self._to_replace[0]
        new = place.successor
        if new is None:
            place.successor = self._spawn()
            if place.successor is None:
                log.error("The new worker did not start: the old ones stay")
                self._to_replace.clear()
        elif new.is_ready:
            if place.worker is not None:
                place.worker.tell(signal.SIGTERM)
                place.worker.began = now
                self.leaving.append(place.worker)
            place.worker, place.successor = new, None
            self._to_replace.pop(0)
        elif new.has_ended() or now - new.began > START_SECONDS:
            log.error("The new worker did not start: the old ones stay")
            new.tell(signal.SIGKILL)
            new.process.wait()
            os.close(new.says_ready)
            place.successor = None
            self._to_replace.clear()

    def _all(self) -> list[Worker]:
        found = [worker for place in self.places for worker in (place.worker, place.successor) if worker is not None]
        return found + self.leaving

    # Waiting

    def _wait(self) -> None:
        waiting = {worker.says_ready: worker for worker in self._all() if not worker.is_ready}
        readable, _, _ = select.select([*waiting, self._wakes], [], [], LOOK_SECONDS)
        for descriptor in readable:
            if descriptor == self._wakes:
                os.read(descriptor, 4096)
            elif os.read(descriptor, 1):
                waiting[descriptor].is_ready = True
            else:
                time.sleep(0.01)  # it has ended, which is noticed in a moment

    def _hear_signals(self) -> None:
        self._wakes, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        note: Callable[[int, FrameType | None], None] = lambda sign, _: self._signals.append(sign)  # noqa: E731
        for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(sign, note)

    def _taken_signals(self) -> list[int]:
        taken, self._signals[:] = list(self._signals), []
        return taken

    def _end(self, status: int) -> int:
        # The workers' own copies hold it open for as long as they take connections. With this one the kernel would go on queueing
        # clients whom nobody takes, when they would be refused and go elsewhere.
        self.listener.close()
        for worker in self._all():
            worker.tell(signal.SIGTERM)
        deadline = time.monotonic() + self.drain_seconds
        while any(not worker.has_ended() for worker in self._all()):
            if signal.SIGINT in self._taken_signals():  # asked twice by hand
                for worker in self._all():
                    worker.tell(signal.SIGINT)
            if time.monotonic() >= deadline:
                log.error("Some workers do not end: they are killed")
                for worker in self._all():
                    worker.tell(signal.SIGKILL)
            time.sleep(0.05)
        good = all(worker.process.returncode == 0 for worker in self._all())
        return status if good else 1


def bind(host: str, port: int) -> socket.socket:
    """The socket that all workers inherit. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except BaseException:
        listener.close()
        raise
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


def command_of(only: str) -> list[str]:
    words = [sys.executable, sys.argv[0], "serve"]
    return [*words, "--only", only] if only else words
