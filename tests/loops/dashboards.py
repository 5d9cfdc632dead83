"""L08: people look at usage, over a million rows on Postgres, while 300 streams of 20 events a second run (L03).

    python -m tests.loops.dashboards [--rows 1000000] [--seconds 60]

The rows are those of `tests.loops.rows`. One process serves streams and pages, on one core; upstream, load, browsers and Postgres have the
other, unless Postgres was started elsewhere.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from bench import load
from bench.machine import on_core, raise_file_limit
from bench.plan import percentile
from bench.subjects import Subject, mock_upstream, request
from tests.loops.rows import filled, paths
from tests.serving import Sluice

STREAMS = 300
PAUSE_SECONDS = 0.5  # a person looks at a page


def run(rows: int, seconds: float, *, people: int = 2) -> dict[str, Any]:
    """Times in milliseconds: `page` by share, the slowest pages, and how streams fare with and without them."""
    cores = sorted(os.sched_getaffinity(0))
    raise_file_limit()
    os.sched_setaffinity(0, {cores[0]})
    with filled(rows, print), tempfile.TemporaryDirectory() as name, mock_upstream(Path(name), cores[0]) as mock:
        given = {setting: os.environ[setting] for setting in ("DATABASE_URL", "SECRET_KEY", "KEYRING")}
        sluice = Sluice(Path(name) / "data", **given)
        try:
            sluice.data_dir.mkdir(mode=0o700)
            sluice.add_openai(SimpleNamespace(base_url=f"http://127.0.0.1:{mock.ports[0]}/v1"), prefix="m0")
            key = sluice.issue_key(concurrency=10_000)
            with on_core(cores[-1]):
                sluice.start_again(forked=False)
            calm = streams(sluice, key, seconds / 4)
            pages, ended = [], threading.Event()
            looking = [threading.Thread(target=look, args=(sluice, ended, pages, number)) for number in range(people)]
            for one in looking:
                one.start()
            try:
                busy = streams(sluice, key, seconds)
            finally:
                ended.set()
                for one in looking:
                    one.join()
        finally:
            sluice.close()
    times = [took for _, took in pages]
    return {
        "pages": len(pages),
        "page": {share: round(1000 * percentile(times, share), 1) for share in (0.5, 0.95, 0.99)},
        "slowest": sorted(((round(1000 * took), page) for page, took in pages), reverse=True)[:5],
        "streams": {"without pages": calm, "with pages": busy},
    }


def streams(sluice: Sluice, key: str, seconds: float) -> dict[str, Any]:
    port = sluice.port
    text = request(Subject("", sluice.pid, port, port, port, key), "steady")
    order = load.Order([("127.0.0.1", port)], [text], stream=True, open_streams=STREAMS, seconds=seconds, warm_seconds=1)
    order.watched = [sluice.pid]
    # Beside those that stay open some begin, and are short.
    short = request(Subject("", sluice.pid, port, port, port, key), "paced")
    beginning = load.Order([("127.0.0.1", port)], [short], stream=True, rate=5, seconds=seconds, warm_seconds=1)
    with ThreadPoolExecutor(1) as beside:
        begun = beside.submit(load.in_a_process, beginning)
        found = load.in_a_process(order)
        first_bytes = begun.result().first_bytes
    return {
        "broken": found.failed + begun.result().failed,
        "events_per_second": round(len(found.delays) / found.seconds),
        "event_delay": {share: round(1000 * percentile(found.delays, share), 1) for share in (0.5, 0.99)},
        "first_byte_p99": round(1000 * percentile(first_bytes, 0.99), 1),
        "core": round(found.cpu[str(sluice.pid)] / found.seconds, 2),
    }


def look(sluice: Sluice, ended: threading.Event, pages: list[tuple[str, float]], number: int) -> None:
    """A person who opens one page after the other."""
    from django.conf import settings
    from django.test import Client

    from accounts.models import User

    asked = paths()
    cookies = {}
    for email in {who for _, who in asked.values()}:
        client = Client()
        client.force_login(User.objects.get(email=email))
        cookies[email] = {"sessionid": client.cookies[settings.SESSION_COOKIE_NAME].value}
    order = itertools.cycle(list(asked.items())[number::2] + list(asked.items())[:number:2])
    with httpx.Client(base_url=sluice.url, timeout=60) as browser:
        while not ended.wait(PAUSE_SECONDS):
            page, (path, who) = next(order)
            began = time.monotonic()
            answer = browser.get(path, cookies=cookies[who], headers={"accept": "text/html,application/json"})
            assert answer.status_code == 200, (path, answer.status_code)
            pages.append((page, time.monotonic() - began))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    for name, figure in run(options.rows, options.seconds).items():
        print(f"{name}: {figure}")


if __name__ == "__main__":
    main()
