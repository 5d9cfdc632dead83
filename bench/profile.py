"""Where the microseconds of a request go.

First by layer, with `perf` where it is installed, on the gateway as it is: kernel, interpreter, libraries. Then by function,
with cProfile around the same `manage.py serve`. cProfile makes every call dearer, so only shares and counts mean anything
there, and functions written in C, which it times as a whole, look cheaper than they are beside Python's.
"""

from __future__ import annotations

import argparse
import os
import pstats
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench import load
from bench.load import Order
from bench.machine import on_core, raise_file_limit
from bench.plan import CONNECTIONS, own_folder
from bench.subjects import REPOSITORY, Gateway, mock_upstream, request

SECONDS = 6.0
LINES = 40
Row = tuple[float, float, float, str]  # per request: own microseconds, microseconds with what it calls, calls; and its name
Found = dict[tuple[str, int, str], tuple[int, int, float, float, dict[object, object]]]  # as pstats keeps it


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", nargs="?", default="whole", choices=["whole", "burst"], help="one JSON answer, or a stream of 64 events")
    kind = parser.parse_args().kind
    cores = sorted(os.sched_getaffinity(0))
    gateway_core, load_core = cores[-1], cores[0]
    os.sched_setaffinity(0, {load_core})
    raise_file_limit()
    with own_folder(None) as folder, mock_upstream(folder, load_core) as mock, Gateway(folder, gateway_core, mock) as gateway:
        subject = gateway.subject()
        order = Order([subject.address()], [request(subject, kind)], stream=kind != "whole", connections=CONNECTIONS, seconds=SECONDS)
        print(by_layer(gateway, order, folder))
        gateway.sluice.stop()
        print(by_function(gateway, order, folder, gateway_core))
    return 0


def by_layer(gateway: Gateway, order: Order, folder: Path) -> str:
    """Shares of CPU time by library, and the functions on top."""
    if shutil.which("perf") is None:
        return "perf is not installed: no shares by layer."
    data = folder / "perf.data"
    recording = ["perf", "record", "-q", "-F", "1999", "-p", str(gateway.sluice.pid), "-o", str(data), "--", "sleep", str(SECONDS)]
    recorder = subprocess.Popen(recording, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    load.in_a_process(order)
    if recorder.wait(30):
        assert recorder.stderr is not None
        return f"perf could not record: {recorder.stderr.read().strip()}"
    lines = []
    for title, sort, least in (("By library", "dso", "0.5"), ("By function of C", "dso,symbol", "1")):
        report = ["perf", "report", "-i", str(data), "--stdio", "-q", "--no-children", "--sort", sort, "--percent-limit", least]
        done = subprocess.run(report, capture_output=True, text=True, check=True)
        lines += [f"{title}, share of CPU time", *[line.rstrip() for line in done.stdout.splitlines() if line.strip()], ""]
    return "\n".join(lines)


def by_function(gateway: Gateway, order: Order, folder: Path, core: int) -> str:
    """What is called for the requests, the dearest first; and the sums by module."""
    order.warm_seconds = 0.0
    idle, _ = profiled(gateway, None, folder / "idle", core)
    busy, requests = profiled(gateway, order, folder / "busy", core)
    rows = per_request(busy, idle, requests)
    whole = sum(row[0] for row in rows)
    lines = [f"By function under cProfile, {requests} requests, {whole:.0f} microseconds each (the profiler's own cost in it)"]
    lines += ["   own  with its calls  calls/request"]
    lines += [f"{own:6.1f}  {with_calls:14.1f}  {calls:13.1f}  {name}" for own, with_calls, calls, name in rows[:LINES]]
    modules: dict[str, float] = {}
    for own, _, _, name in rows:
        module = name.partition(":")[0]
        modules[module] = modules.get(module, 0.0) + own
    lines += ["", "By module, share of it"]
    lines += [f"{own / whole:6.1%}  {module}" for module, own in sorted(modules.items(), key=lambda one: -one[1]) if own / whole > 0.005]
    return "\n".join(lines)


def profiled(gateway: Gateway, order: Order | None, stats: Path, core: int) -> tuple[Found, int]:
    """Serve under cProfile: what it found, and how many requests there were. Without an order only the start and the stop."""
    sluice = gateway.sluice
    command = [sys.executable, "-m", "cProfile", "-o", str(stats), "manage.py", "serve", "--host", "127.0.0.1", "--port", str(sluice.port)]
    with on_core(core):
        server = subprocess.Popen(command, cwd=REPOSITORY, env=sluice.env, stdout=subprocess.DEVNULL)
    try:
        while not sluice.is_ready():
            time.sleep(0.1)
        requests = load.in_a_process(order).finished if order is not None else 0
    finally:
        server.terminate()
        server.wait(60)
    return pstats.Stats(str(stats)).stats, requests  # type: ignore[attr-defined]


def per_request(busy: Found, idle: Found, requests: int) -> list[Row]:
    """What the requests added to each function, for those that were called once or more for each of them."""
    rows: list[Row] = []
    for function, (_, calls, own, with_calls, _) in busy.items():
        _, idle_calls, idle_own, idle_with_calls, _ = idle.get(function, (0, 0, 0.0, 0.0, {}))
        if calls - idle_calls >= requests * 0.9:
            times = (1e6 * (own - idle_own) / requests, 1e6 * (with_calls - idle_with_calls) / requests)
            rows.append((*times, (calls - idle_calls) / requests, named(*function)))
    return sorted(rows, reverse=True)


def named(file: str, line: int, name: str) -> str:
    if file == "~":
        return f"C: {name.strip('<>')}"
    path = Path(file)
    for base in (
        REPOSITORY / ".venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages",
        REPOSITORY,
        Path(os.__file__).parent,
    ):
        if path.is_relative_to(base):
            return f"{path.relative_to(base)}:{line} {name}"
    return f"{path.name}:{line} {name}"


if __name__ == "__main__":
    sys.exit(main())
