"""A02: kill the server again and again under load. No row may be lost, none doubled, against the upstream's own record."""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.loops.load import SLOW, TEXT, Load, say
from tests.serving import CommandFailed, Sluice, eventually, running
from tests.upstreams.openai import OpenAIUpstream

STORED_SECONDS = 5  # a row follows its answer by a moment
TOTALS = """
from django.db.models import Count, Q, Sum
from proxy.models import UsageEvent, UsageTotal
parts = ["fresh_input", "cache_read", "cache_write", "output", "reasoning", "cost"]
rows = UsageEvent.objects.aggregate(requests=Count("pk", filter=Q(corrects=None)), **{part: Sum(part) for part in parts})
totals = UsageTotal.objects.aggregate(requests=Sum("requests"), **{part: Sum(part) for part in parts})
print("equal" if rows == totals else f"{rows} {totals}")
"""


def run(times: int, *, seed: int = 1, progress: Callable[[str], None] | None = None, **settings: str) -> dict[str, Any]:
    """Kill it so many times. The counts; `lost`, `doubled` and `wrong` must be 0 and `totals` "equal"."""
    chance = random.Random(seed)
    with OpenAIUpstream() as upstream, running(**settings) as sluice:
        sluice.set_price("sim/*", input=3, output=15)
        sluice.add_openai(upstream, prefix="sim")
        key = sluice.issue_key()
        sluice.wait_for("sim")
        upstream.reset()
        upstream.script(*[SLOW] * 500_000)
        with Load(sluice.url, key, "sim/gpt-4o-mini") as load:
            for number in range(times):
                time.sleep(chance.uniform(0.1, 0.9))
                sluice.kill9()
                sluice.start_again()
                say(progress, f"killed {number + 1} of {times}, {load.begun} requests begun")
            answered = len(load.answered)
            eventually(lambda: len(load.answered) > answered, "nobody is served after the last start", seconds=30)
        deadline = time.monotonic() + STORED_SECONDS
        while (counts := account(sluice, upstream, load))["lost"] and time.monotonic() < deadline:
            time.sleep(0.1)
        return counts | {"kills": times}


def account(sluice: Sluice, upstream: OpenAIUpstream, load: Load) -> dict[str, Any]:
    """Hold the rows against what the upstream executed and what clients were answered."""
    rows = [row for row in sluice.usage() if row["provider"] != "demo"]  # which asks no upstream
    times_seen = Counter(row["request_id"] for row in rows)
    executed = {seen.request_id for seen in upstream.log if seen.method == "POST"}
    whole = [row for row in rows if row["status"] == 200]
    wrong = 0
    for row in whole:
        bill = upstream.bill(row["request_id"])
        if row["usage_source"] != "reported" or (row["input_tokens"], row["output_tokens"]) != (bill.input_tokens, len(TEXT.split())):
            wrong += 1
    return {
        "requests": load.begun,
        "executed": len(executed),
        "answered": len(load.answered),
        "rows": len(rows),
        "interrupted": sum(row["error"] == "interrupted" for row in rows),
        "lost": len(executed - times_seen.keys()) + len(load.answered - times_seen.keys()),
        "doubled": sum(count - 1 for count in times_seen.values()),
        "wrong": wrong,
        "totals": proved(sluice),
    }


def proved(sluice: Sluice) -> str:
    """A11: "equal" when the sums are those of the rows, in all and line by line; else what is different."""
    return sluice.python(TOTALS).strip() + different_lines(sluice)


def different_lines(sluice: Sluice) -> str:
    """What `recompute_totals --check` says against the sums; empty when there is nothing. Also right under load."""
    try:
        sluice.manage("recompute_totals", "--check")
    except CommandFailed as different:
        return f" {different}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    counts = run(options.times, seed=options.seed, progress=print)
    print(counts)
    if counts["lost"] or counts["doubled"] or counts["wrong"] or counts["totals"] != "equal":
        raise SystemExit(1)


if __name__ == "__main__":
    main()
