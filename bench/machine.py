"""What the kernel says of a process and of a core, and how a process is kept on one. Linux alone has all of it."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")


def raise_file_limit() -> int:
    """As many open files as the system lets this process have. The number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process, dead ones included: utime + stime of /proc/PID/stat, which counts in
    hundredths, read from the process's CPU clock, which counts in nanoseconds."""
    return time.clock_gettime((~pid << 3) | 2)


def family_seconds(pid: int) -> float:
    """The same of a process and all that it started, what has ended since included: a server with a process for each connection."""
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    found = cpu_seconds(pid) + (int(fields[13]) + int(fields[14])) / TICKS
    for child in children(pid):
        with contextlib.suppress(OSError):  # it has just ended
            found += cpu_seconds(child)
    return found


def main_thread_seconds(pid: int) -> float:
    """CPU time of the first thread alone: in the gateway, the event loop's."""
    return int((PROC / str(pid) / "task" / str(pid) / "schedstat").read_text().split()[0]) / 1e9


def busy_seconds(core: int) -> float:
    """What a core has spent on anything but idling, whoever asked for it."""
    for line in (PROC / "stat").read_text().splitlines():
        name, *fields = line.split()
        if name == f"cpu{core}":
            times = [int(field) for field in fields[:8]]
            return (sum(times) - times[3] - times[4]) / TICKS
    raise LookupError(f"there is no core {core}")


def memory_kib(pid: int) -> int:
    """Proportional set size: what the process holds in user space, shared pages by their share."""
    for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise LookupError(f"process {pid} says nothing of its memory")


def children(pid: int) -> list[int]:
    return [int(child) for child in (PROC / str(pid) / "task" / str(pid) / "children").read_text().split()]


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Processes started in here stay on this core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
