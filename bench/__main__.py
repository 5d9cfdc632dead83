"""`python -m bench`: run the benchmark, print its table, and keep its figures in bench/results/latest.json."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from bench import report, translation
from bench.machine import raise_file_limit
from bench.plan import FULL, PARTS, QUICK, Bench, Failed, own_folder
from bench.services import Services
from bench.subjects import Missing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, in under two minutes")
    parser.add_argument("--folder", type=Path, help="where the gateway keeps its data; default: the system's temporary folder")
    parser.add_argument(
        "--json",
        type=Path,
        help=f"where the figures go; default: {report.LATEST}, or {report.SERVICES.name} or {report.TRANSLATION.name} beside it",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"not everything: {', '.join(PARTS)}")
    parser.add_argument("--services", action="store_true", help="instead: the gateway with Postgres and Redis beside the one without")
    parser.add_argument("--provider", choices=[*translation.kinds(), "all"], help="only what translating an event of this kind costs")
    options = parser.parse_args()
    if not hasattr(os, "sched_setaffinity"):
        return refuse("This needs Linux: it keeps processes on cores and reads their CPU clocks.")
    cores = sorted(os.sched_getaffinity(0))
    if options.provider:
        return translate(options.provider, options.json or report.TRANSLATION)
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
            bench = Bench(QUICK if options.quick else FULL, gateway_core, load_core, say, results, options.only)
            (Services(bench) if options.services else bench).run(folder)
        except (Failed, Missing) as problem:
            return refuse(str(problem))
        except KeyboardInterrupt:
            return refuse("stopped; nothing was kept.")
    about["took_seconds"] = round(time.monotonic() - began)
    if options.services:
        about["nginx"] = ""
    return keep(options.json or (report.SERVICES if options.services else report.LATEST), {"about": about, "results": results})


def translate(provider: str, path: Path) -> int:
    """Needs neither a server nor a second core."""
    kinds = translation.kinds() if provider == "all" else [provider]
    results = {"translation": {kind: translation.cost_of(kind) for kind in kinds}}
    about = report.about(path.parent, quick=False) | {"nginx": "", "file_system": ""}
    return keep(path, {"about": about, "results": results})


def keep(path: Path, run: report.Run) -> int:
    report.save(path, run)
    print(report.text(report.load(path)))
    print(f"\n{path} has all figures of all rounds.")
    return 0


def refuse(why: str) -> int:
    print(f"bench: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
