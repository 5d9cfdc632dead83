"""The figures of a run as a table: in the terminal, or as Markdown into docs/performance.md.

python -m bench.report                        the last run's table
python -m bench.report docs/performance.md    put it, and that of the last run with services, between the page's marks
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.subjects import REPOSITORY, find_nginx

LATEST = REPOSITORY / "bench" / "results" / "latest.json"
TRANSLATION = LATEST.with_name("translation.json")
SERVICES = LATEST.with_name("services.json")
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"
PLACES = {"figures": LATEST, "services": SERVICES}  # in the page, and whose figures stand there

Run = dict[str, Any]
Table = tuple[str, list[str], list[list[str]]]  # a title, the columns, the rows


def about(folder: Path, *, quick: bool) -> dict[str, Any]:
    """What the figures are of: the commit, and the machine in general terms."""
    program = find_nginx()
    version = _said(program, "-v").rpartition("/")[2] if program else ""
    changed = [line for line in _said("git", "status", "--porcelain", "--untracked-files=no").splitlines() if line[3:].endswith(".py")]
    return {
        "commit": _said("git", "rev-parse", "--short=10", "HEAD") + ("+" if changed else ""),
        "quick": quick,
        "python": platform.python_version(),
        "nginx": version,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "file_system": _said("stat", "-f", "-c", "%T", str(folder)),
    }


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def save(path: Path, run: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for found in run["results"].values():
        if "gateway" in found and "nginx" in found:
            found["ratio"] = round(found["gateway"]["cpu_us"] / found["nginx"]["cpu_us"], 2) if found["nginx"]["cpu_us"] else None
    path.write_text(json.dumps(_rounded(run), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def load(path: Path) -> Run:
    run: Run = json.loads(path.read_text())
    return run


def tables(run: Run) -> list[Table]:
    results = run["results"]
    found = [_costs(results), _latencies(results), _opened(results)]
    for name, title in (("steps", "The price of the steps (one JSON answer)"), ("journal", "Where the journal lies (one JSON answer)")):
        if name in results:
            found.append(_steps(results[name], title))
    if "metrics" in results:
        rows = [["counted for /metrics", f"{results['metrics']['count_us']:.2f}"]]
        found.append(("What it costs to count a call", ["in a process of its own", "CPU µs"], rows))
    if "parts" in results:
        found.append(_steps(results["parts"], "One service more each time (one JSON answer)"))
    found += [_translation(results), _check(results), _services(results), _services_check(results)]
    return [table for table in found if table[2]]


def _costs(results: Run) -> Table:
    rows = []
    for name in ("whole", "whole_tls", "burst", "paced"):
        found = results.get(name)
        if found is None or "gateway" not in found:
            continue
        gateway, nginx = found["gateway"], found.get("nginx")
        rows.append(
            [
                found["title"],
                f"{nginx['cpu_us']:.1f}" if nginx else "-",
                f"{gateway['cpu_us']:.1f}",
                f"{found['ratio']:.1f}" if nginx else "-",
                f"{gateway['cpu_us'] - gateway['main_thread_us']:.1f}",
                f"{nginx['per_second']:,.0f}" if nginx else "-",
                f"{gateway['per_second']:,.0f}",
                f"{nginx['load_core']:.0%} / {gateway['load_core']:.0%}" if nginx else f"{gateway['load_core']:.0%}",
                f"{max(gateway['spread'], nginx['spread'] if nginx else 0):.0%}",
            ]
        )
    columns = ["CPU per answer, µs", "nginx", "gateway", "ratio", "of it threads", "nginx /s", "gateway /s", "load core", "spread"]
    return "What an answer costs", columns, rows


def _latencies(results: Run) -> Table:
    rows = []
    for name in ("whole_50", "burst_50", "paced_50"):
        found = results.get(name)
        for who in ("nginx", "gateway"):
            if found is None or who not in found:
                continue
            figures = found[who]
            pairs = [
                f"{figures[f'added_{what}_p50_ms']:.2f} / {figures[f'added_{what}_p99_ms']:.2f}"
                if f"added_{what}_p50_ms" in figures
                else "-"
                for what in ("latency", "first_byte", "event_delay")
            ]
            if name == "paced_50":
                pairs[0] = "-"  # how long it takes is the upstream's timer's to say
            rows.append([found["title"], who, *pairs, f"{figures['cpu_us']:.0f}", f"{figures['load_core']:.0%}"])
    columns = ["added at 50 a second, p50 / p99 ms", "", "whole answer", "first byte", "each event", "CPU µs", "load core"]
    return "What is added to the time of an answer", columns, rows


def _translation(results: Run) -> Table:
    rows = [
        [
            kind,
            f"{one['cpu_us']:.1f}",
            "yes" if one["cpu_us"] <= one["most_us"] else "no",
            f"{one['spread']:.0%}",
            f"{one['bytes_per_event']:.0f}",
        ]
        for kind, one in results.get("translation", {}).items()
    ]
    return (
        "What translating one event of a stream costs",
        ["kind", "CPU µs per event", "at most 15", "spread", "bytes sent per event"],
        rows,
    )


def _opened(results: Run) -> Table:
    rows = []
    for name, found in results.items():
        for who in ("nginx", "gateway"):
            if not name.startswith("open_") or who not in found:
                continue
            figures = found[who]
            rows.append(
                [
                    found["title"],
                    who,
                    f"{figures['memory_kib'] / 1024:.0f}",
                    f"{figures['kib_per_stream']:.1f}",
                    f"{figures['event_delay_p50_ms']:.2f} / {figures['event_delay_p99_ms']:.2f}",
                    f"{figures['cpu_us']:.0f}",
                    f"{figures['load_core']:.0%}",
                ]
            )
    columns = ["open streams", "", "memory MiB", "KiB per stream", "event delay p50 / p99 ms", "CPU µs per event", "load core"]
    return "Streams that stay open", columns, rows


def _services(results: Run) -> Table:
    rows = []
    for name in ("whole", "burst"):
        found = results.get(name, {})
        if "services" in found:
            own, more = found["embedded"], found["services"]
            rows.append(
                [
                    found["title"],
                    f"{own['cpu_us']:.1f}",
                    f"{more['cpu_us']:.1f}",
                    f"{_ratio_of_rounds(found):.2f}",
                    f"{own['cpu_us'] - own['main_thread_us']:.1f} / {more['cpu_us'] - more['main_thread_us']:.1f}",
                    f"{own['per_second']:,.0f}",
                    f"{more['per_second']:,.0f}",
                    f"{more['redis_us']:.1f}",
                    f"{more['postgres_us']:.1f}",
                    f"{max(own['spread'], more['spread']):.0%}",
                ]
            )
    columns = [
        "CPU per answer, µs",
        "embedded",
        "services",
        "ratio (at most 1.5)",
        "of it threads",
        "embedded /s",
        "services /s (at least 5,000)",
        "Redis' own",
        "Postgres' own",
        "spread",
    ]
    return "With Postgres and Redis", columns, rows


def _ratio_of_rounds(found: Run) -> float:
    """The median of the rounds' own ratios: the two of a round come right after each other, and what disturbs one disturbs both."""
    runs = found["runs"]
    return statistics.median(
        more["cpu_us"] / own["cpu_us"] for own, more in zip(runs["embedded"], runs["services"], strict=True) if own["cpu_us"]
    )


def _services_check(results: Run) -> Table:
    rows = []
    for name in ("whole", "burst"):
        found = results.get(name, {})
        for who in ("embedded", "services"):
            if who in found:
                one, direct = found[who], found["direct"]
                beside = one["redis_core"] + one["postgres_core"]
                rows.append(
                    [
                        f"{found['title']}, {who}",
                        f"{one['subject_core']:.0%}",
                        f"{one['load_core']:.0%}",
                        f"{one['redis_core']:.0%}",
                        f"{one['postgres_core']:.0%}",
                        f"{one['load_core'] + beside:.0%}",
                        f"{direct['per_second'] / one['per_second']:.1f}",
                        f"{one['others_subject_core']:.0%} / {one['others_load_core']:.0%}",
                    ]
                )
    columns = [
        "Is the other core the bottleneck?",
        "gateway's core",
        "load and upstream",
        "Redis",
        "Postgres",
        "all of the other core",
        "direct /s to gateway /s",
        "others on the two cores",
    ]
    return "The check", columns, rows


def _steps(steps: Run, title: str) -> Table:
    rows = []
    before = None
    for name, figures in steps.items():
        step = "" if before is None else f"{figures['cpu_us'] - before:+.1f}"
        rows.append(
            [name, f"{figures['cpu_us']:.1f}", step, f"{figures['cpu_us'] - figures['main_thread_us']:.1f}", f"{figures['spread']:.0%}"]
        )
        before = figures["cpu_us"]
    return title, ["CPU per answer, µs", "all", "to the line above", "of it threads", "spread"], rows


def _check(results: Run) -> Table:
    rows = []
    for name in ("whole", "burst"):
        found = results.get(name, {})
        if "gateway" in found:
            direct, gateway = found["direct"], found["gateway"]
            rows.append(
                [
                    found["title"],
                    f"{direct['per_second']:,.0f}",
                    f"{gateway['per_second']:,.0f}",
                    f"{direct['per_second'] / gateway['per_second']:.1f}",
                    f"{gateway['subject_core']:.0%}",
                    f"{gateway['others_subject_core']:.0%} / {gateway['others_load_core']:.0%}",
                ]
            )
    columns = [
        "Is load or upstream the bottleneck?",
        "direct /s",
        "gateway /s",
        "ratio (wanted: 3)",
        "gateway's core",
        "others on the two cores",
    ]
    return "The check", columns, rows


def text(run: Run) -> str:
    lines = [_of(run["about"])]
    for title, columns, rows in tables(run):
        widths = [max(len(row[number]) for row in [columns, *rows]) for number in range(len(columns))]
        lines += ["", title, "=" * len(title)]
        for row in [columns, *rows]:
            cells = [
                cell.ljust(width) if number == 0 else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, "", *_at_rest(run)])


def markdown(run: Run) -> str:
    lines = [_of(run["about"])]
    for title, columns, rows in tables(run):
        lines += ["", f"**{title}**", "", f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *_at_rest(run)])


def _at_rest(run: Run) -> list[str]:
    found = run["results"].get("at_rest")
    return [f"Without any request the gateway takes {found['cpu_ms_per_second']:.1f} ms of CPU a second."] if found else []


def _of(about: Run) -> str:
    mode = "a quick run" if about["quick"] else "a full run"
    nginx = f"nginx {about['nginx']}, " if about["nginx"] else ""
    where = f", data on {about['file_system']}" if about["file_system"] else ""
    return f"Commit {about['commit']}, {mode}; {nginx}Python {about['python']}, {about['processor']}{where}."


def put_into(page: Path, run: Run, place: str = "figures") -> None:
    """Replace what stands between two marks of the page."""
    first, last = BEGIN.format(place), END.format(place)
    before, begin, rest = page.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise SystemExit(f"{page} has no place for the figures: {first} ... {last}")
    page.write_text(f"{before}{first}\n{markdown(run)}\n{last}{after}")


def main() -> None:
    found = {place: load(path) for place, path in PLACES.items() if path.exists()}
    if not found:
        raise SystemExit("There are no figures yet: run `make bench` first.")
    for place, run in found.items():
        if sys.argv[1:]:
            put_into(Path(sys.argv[1]), run, place)
        else:
            print(text(run), end="\n\n")


if __name__ == "__main__":
    main()
