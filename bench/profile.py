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
Row = tuple[float, float, int, str]  # own microseconds, microseconds with what it calls, calls, name


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
    """What is called for every request, the dearest first; and the sums by module."""
    sluice, stats = gateway.sluice, folder / "stats"
    command = [sys.executable, "-m", "cProfile", "-o", str(stats), "manage.py", "serve", "--host", "127.0.0.1", "--port", str(sluice.port)]
    with on_core(core):
        server = subprocess.Popen(command, cwd=REPOSITORY, env=sluice.env, stdout=subprocess.DEVNULL)
    while not sluice.is_ready():
        time.sleep(0.1)
    order.warm_seconds = 0.0
    requests = load.in_a_process(order).finished
    server.terminate()
    server.wait(60)
    rows = per_request(stats, requests)
    whole = sum(row[0] for row in rows)
    lines = [f"By function under cProfile, {requests} requests, {whole:.0f} microseconds each (the profiler's own cost in it)"]
    lines += [
        "   own  with its calls  calls/request",
        *[f"{own:6.1f}  {with_calls:14.1f}  {calls / requests:13.1f}  {name}" for own, with_calls, calls, name in rows[:LINES]],
    ]
    modules: dict[str, float] = {}
    for own, _, _, name in rows:
        module = name.partition(":")[0]
        modules[module] = modules.get(module, 0.0) + own
    lines += ["", "By module, share of it"]
    lines += [f"{own / whole:6.1%}  {module}" for module, own in sorted(modules.items(), key=lambda one: -one[1]) if own / whole > 0.005]
    return "\n".join(lines)


def per_request(stats: Path, requests: int) -> list[Row]:
    """The functions that were called about once or more for every request: what ran at the start alone is left out."""
    rows: list[Row] = []
    for (file, line, name), (_, calls, own, with_calls, _) in pstats.Stats(str(stats)).stats.items():  # type: ignore[attr-defined]
        if calls >= requests / 2:
            rows.append((1e6 * own / requests, 1e6 * with_calls / requests, calls, named(file, line, name)))
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
