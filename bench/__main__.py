"""`python -m bench`: run the benchmark, print its table, and keep its figures in bench/results/latest.json."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from bench import report
from bench.machine import raise_file_limit
from bench.plan import FULL, PARTS, QUICK, Bench, Failed, own_folder
from bench.subjects import Missing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, in under two minutes")
    parser.add_argument("--folder", type=Path, help="where the gateway keeps its data; default: the system's temporary folder")
    parser.add_argument("--json", type=Path, default=report.LATEST, help="where the figures go; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"not everything: {', '.join(PARTS)}")
    options = parser.parse_args()
    if not hasattr(os, "sched_setaffinity"):
        return refuse("This needs Linux: it keeps processes on cores and reads their CPU clocks.")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return refuse("This needs two cores: one for the gateway, one for load and upstream.")
    gateway_core, load_core = cores[-1], cores[0]
    os.sched_setaffinity(0, {load_core})
    raise_file_limit()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way, what was started is ended
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", file=sys.stderr, flush=True)

    results: dict[str, object] = {}
    with own_folder(options.folder) as folder:
        about = report.about(folder, quick=options.quick)
        try:
            Bench(QUICK if options.quick else FULL, gateway_core, load_core, say, results, options.only).run(folder)
        except (Failed, Missing) as problem:
            return refuse(str(problem))
        except KeyboardInterrupt:
            return refuse("stopped; nothing was kept.")
    about["took_seconds"] = round(time.monotonic() - began)
    report.save(options.json, {"about": about, "results": results})
    print(report.text(report.load(options.json)))
    print(f"\n{options.json} has all figures of all rounds.")
    return 0


def refuse(why: str) -> int:
    print(f"bench: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
