"""`/metrics`: what `proxy/metrics.py` has counted and how this process fares, in Prometheus' text format 0.0.4."""

from __future__ import annotations

import os
import resource
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from hmac import compare_digest
from itertools import accumulate
from pathlib import Path

import msgspec
from django.conf import settings
from django.db import DatabaseError, InterfaceError, close_old_connections
from django.db.models import Count, Q

from project import alarms
from project.env import LOOPBACK
from providers.models import Credential, OAuthToken, State
from proxy import journal
from proxy.call import Scope
from proxy.catalog import Catalog
from proxy.http import header_dict
from proxy.journal import Admitted, Journal
from proxy.metrics import OUR_OWN, WAITING, Metrics, Spread, Tally
from proxy.stores.health import ALL_MODELS

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
OF_PROXIES = (b"x-forwarded-for", b"x-real-ip", b"forwarded", b"via")
SHARED = "metrics"  # the file in a worker's journal folder, for the others to read
SHARED_SECONDS = 30.0  # an older one is of a worker that hangs

Labels = Mapping[str, str]
Sample = tuple[Labels, float]


def may_read(scope: Scope) -> bool:
    """With METRICS_TOKEN whoever has it. Without it a caller on this very machine, and not by way of a proxy on it."""
    headers = header_dict(scope["headers"])
    token = settings.ENV.metrics_token
    if token is not None:
        return compare_digest(headers.get(b"authorization", b""), f"Bearer {token}".encode())
    client = scope.get("client")
    host = headers.get(b"host", b"").decode("latin-1").rpartition(":")[0].strip("[]") or headers.get(b"host", b"").decode("latin-1")
    return client is not None and client[0] in LOOPBACK and host in LOOPBACK and not any(name in headers for name in OF_PROXIES)


class Page:
    """Puts the lines together: each metric once, with all of its samples."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, kind: str, says: str, samples: Iterable[Sample]) -> None:
        self._head(name, kind, says)
        self._lines += [
            f"sluice_{name}{_written(labels)} {value:g}" if value % 1 else f"sluice_{name}{_written(labels)} {int(value)}"
            for labels, value in samples
        ]

    def spread(self, name: str, says: str, bounds: tuple[float, ...], spreads: Iterable[tuple[Labels, Spread]]) -> None:
        self._head(name, "histogram", says)
        for labels, spread in spreads:
            counts = list(accumulate(spread.buckets))
            for bound, count in zip([*map("{:g}".format, bounds), "+Inf"], counts, strict=True):
                self._lines.append(f"sluice_{name}_bucket{_written({**labels, 'le': bound})} {count}")
            self._lines.append(f"sluice_{name}_sum{_written(labels)} {spread.sum:.6f}")
            self._lines.append(f"sluice_{name}_count{_written(labels)} {counts[-1]}")

    def text(self) -> str:
        return "\n".join([*self._lines, ""])

    def _head(self, name: str, kind: str, says: str) -> None:
        self._lines += [f"# HELP sluice_{name} {says}", f"# TYPE sluice_{name} {kind}"]


def _written(labels: Labels) -> str:
    if not labels:
        return ""
    words = []
    for name, value in labels.items():
        escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        words.append(f'{name}="{escaped}"')
    return "{" + ",".join(words) + "}"


# What requests amounted to


def requests(page: Page, workers: Mapping[str, Metrics]) -> None:
    """`workers` by name; a single one without a name needs no label for it."""
    tallies = [(_of(worker, place), tally) for worker, metrics in workers.items() for place, tally in metrics.tallies.items()]
    page.add("requests_total", "counter", "Calls that were admitted and are settled.", _statuses(tallies))
    page.add(
        "refused_total",
        "counter",
        "Calls that were refused before they were admitted.",
        [
            ({**_named(worker), "status": str(status), "code": code}, count)
            for worker, metrics in workers.items()
            for (status, code), count in metrics.refused.items()
        ],
    )
    page.add(
        "upstream_failures_total",
        "counter",
        "Attempts at an upstream that failed, whether or not another one served the call.",
        [
            ({**_named(worker), "kind": kind, "failure": failure}, count)
            for worker, metrics in workers.items()
            for (kind, failure), count in metrics.failures.items()
        ],
    )
    page.add(
        "sticky_calls_total",
        "counter",
        "Calls of sticky pools: served by the account that they are bound to, or by another.",
        [
            ({**_named(worker), "account": account}, count)
            for worker, metrics in workers.items()
            for account, count in (("own", metrics.at_home), ("another", metrics.elsewhere))
        ],
    )
    page.add("attempts_total", "counter", "Attempts at upstreams.", [(labels, tally.attempts) for labels, tally in tallies])
    page.add("tokens_total", "counter", "Tokens, in parts that add up to the whole.", _tokens(tallies))
    page.add(
        "cost_usd_total", "counter", "Cost of the priced calls, in US dollars.", [(labels, tally.cost / 1e6) for labels, tally in tallies]
    )
    page.add("unpriced_total", "counter", "Calls without a price.", [(labels, tally.unpriced) for labels, tally in tallies])
    page.add(
        "usage_source_total",
        "counter",
        "How the tokens of the calls are known.",
        [({**labels, "source": source}, count) for labels, tally in tallies for source, count in tally.sources.items()],
    )
    page.spread(
        "duration_seconds", "From the whole request to the end of the answer.", WAITING, [(at, one.duration) for at, one in tallies]
    )
    page.spread("upstream_seconds", "The upstreams' part of it, all attempts.", WAITING, [(at, one.upstream) for at, one in tallies])
    page.spread(
        "first_byte_seconds", "From the whole request to the upstream's first byte.", WAITING, [(at, one.first_byte) for at, one in tallies]
    )
    page.spread(
        "added_seconds",
        "What the gateway added: the duration without the upstreams' part.",
        OUR_OWN,
        [(at, one.added) for at, one in tallies],
    )
    page.add("open_requests", "gauge", "Calls that are open.", [(_named(worker), metrics.open) for worker, metrics in workers.items()])
    page.add("open_streams", "gauge", "Of those, streams.", [(_named(worker), metrics.open_streams) for worker, metrics in workers.items()])
    page.add(
        "draining_requests",
        "gauge",
        "Of those, calls that read on after a client that left.",
        [(_named(worker), metrics.draining) for worker, metrics in workers.items()],
    )


def _named(worker: str) -> Labels:
    return {"worker": worker} if worker else {}


def _of(worker: str, place: tuple[str, str, bool]) -> Labels:
    endpoint, kind, stream = place
    return {**_named(worker), "endpoint": endpoint, "kind": kind, "stream": "true" if stream else "false"}


def _statuses(tallies: Iterable[tuple[Labels, Tally]]) -> Iterator[Sample]:
    for labels, tally in tallies:
        counts: Counter[tuple[str, str]] = Counter()
        for (status, error), count in tally.statuses.items():
            counts[f"{status // 100}xx", outcome_of(status, error)] += count
        for (status_class, outcome), count in counts.items():
            yield {**labels, "status": status_class, "outcome": outcome}, count


def outcome_of(status: int, error: str) -> str:
    """One of ok, client_closed, shutdown, internal_error, limited, refused (the client's mistake), upstream_failed."""
    if error:
        return error
    if status < 400:
        return "ok"
    if status >= 500:
        return "upstream_failed"
    return "limited" if status in (402, 429) else "refused"


def _tokens(tallies: Iterable[tuple[Labels, Tally]]) -> Iterator[Sample]:
    for labels, tally in tallies:
        for part in ("fresh_input", "cache_read", "cache_write", "output", "reasoning"):
            yield {**labels, "part": part}, getattr(tally, part)


# How the process fares


def pools(page: Page, catalog: Catalog, rests: alarms.Rests) -> None:
    resting = {number for (number, model), _ in rests.items() if model == ALL_MODELS}
    counts = Counter(upstream.kind for upstream in catalog.upstreams if upstream.id in resting)
    page.add("credentials_resting", "gauge", "Accounts that rest whole.", [({"kind": kind}, count) for kind, count in counts.items()])
    page.add("pools_exhausted", "gauge", "Pools whose accounts all rest for over a minute.", [({}, len(alarms.exhausted(catalog, rests)))])


def holdings(page: Page, own: Journal | None, holds: int, most_calls: int, ready: bool) -> None:
    page.add("ready", "gauge", "1 when /readyz says so.", [({}, ready)])
    page.add("busiest_upstream_calls", "gauge", "Calls at, or waiting for, the upstream that has the most of them.", [({}, most_calls)])
    page.add("holds", "gauge", "Calls for which limits hold something.", [({}, holds)])
    if own is not None:
        page.add("journal_bytes", "gauge", "The size of this worker's journal.", [({}, own.size)])
        page.add("journal_max_bytes", "gauge", "The size at which new calls are refused.", [({}, settings.ENV.journal_max_bytes)])
        page.add("journal_behind_bytes", "gauge", "Of that, what is not in the database yet.", [({}, own.behind)])
        page.add("journal_lag_seconds", "gauge", "The age of the oldest record that is not in the database yet.", [({}, lag_seconds(own))])


def lag_seconds(own: Journal) -> float:
    """How long ago the oldest record was written that the ledger has not stored; 0 when it has stored all."""
    number, offset = own.shipped
    with suppress(FileNotFoundError):
        for record, _ in journal.read(own.segment(number), offset, offset + journal.HEAD.size + journal.MOST_RECORD_BYTES):
            written_ms = record.at if isinstance(record, Admitted) else record.at + record.duration_ms
            return max(0.0, time.time() - written_ms / 1000)
    return 0.0


def accounts(page: Page) -> None:
    """What the database says of upstream accounts. Not on the loop."""
    try:
        rows = list(
            Credential.objects.values("kind", "state")
            .annotate(number=Count("pk"), failing=Count("pk", filter=~Q(last_error="")))
            .order_by()
        )
        renewals = Counter(OAuthToken.objects.filter(failures__gt=0).values_list("credential__kind", flat=True))
    except (DatabaseError, InterfaceError):
        page.add("database_up", "gauge", "1 when the database answers.", [({}, 0)])
        return
    finally:
        close_old_connections()
    page.add("database_up", "gauge", "1 when the database answers.", [({}, 1)])
    page.add("credentials", "gauge", "Upstream accounts.", [({"kind": row["kind"], "state": row["state"]}, row["number"]) for row in rows])
    page.add(
        "renewals_failing",
        "gauge",
        "Accounts whose sign-in could not be renewed when that was last tried.",
        [({"kind": kind}, count) for kind, count in renewals.items()],
    )
    page.add(
        "credentials_failing",
        "gauge",
        "Accounts in service whose models could not be listed when they were last asked.",
        [({"kind": row["kind"]}, row["failing"]) for row in rows if row["state"] == State.ACTIVE],
    )


def process(page: Page, began: float) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    page.add("process_start_time_seconds", "gauge", "When this process began.", [({}, began)])
    page.add("process_cpu_seconds_total", "counter", "CPU time of this process.", [({}, usage.ru_utime + usage.ru_stime)])
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        page.add("process_resident_memory_bytes", "gauge", "Memory.", [({}, pages * resource.getpagesize())])
        page.add("process_open_fds", "gauge", "Open files and sockets.", [({}, len(os.listdir("/proc/self/fd")))])


# Several workers: whichever is asked answers for all


def share(own: Journal, metrics: Metrics) -> None:
    """Leave them where other workers find them. One file, replaced whole."""
    draft = own.folder / f"{SHARED}.new"
    with suppress(OSError):  # a full disk: the journal will say so
        draft.write_bytes(msgspec.msgpack.encode(metrics))
        draft.replace(own.folder / SHARED)


def others(root: Path, own: Path) -> dict[str, Metrics]:
    """What the other workers on this machine left, by the names of their journals."""
    found: dict[str, Metrics] = {}
    for folder in journal.folders(root):
        path = folder / SHARED
        with suppress(OSError, msgspec.DecodeError):
            if folder != own and time.time() - path.stat().st_mtime < SHARED_SECONDS:
                found[folder.name] = msgspec.msgpack.decode(path.read_bytes(), type=Metrics)
    return found
