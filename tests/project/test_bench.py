"""The parts of the benchmark work: what it starts answers, what it counts is right. How fast anything is, no test says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

if not hasattr(os, "sched_setaffinity"):
    pytest.skip("the benchmark needs Linux", allow_module_level=True)

from bench import machine, plan, report, services, translation
from bench.load import Again, Order, Window
from bench.subjects import Gateway, Mock, Subject, find_nginx, mock_upstream, nginx, request
from bench.upstream import BURST, EVENTS, LAST, STREAM_HEAD, WHOLE, stamped_event
from providers import registry

CORE = min(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def mock(folder: Path) -> Iterator[Mock]:
    with mock_upstream(folder, CORE) as found:
        yield found


def direct(mock: Mock) -> Subject:
    return Subject("direct", mock.pid, mock.ports[0], mock.ports[0], mock.tls_port)


def bench() -> plan.Bench:
    return plan.Bench(plan.QUICK, CORE, CORE, lambda text: None, {})


def shortly(kind: str, subject: Subject, *, tls: bool = False) -> Order:
    seconds = 1.5 if kind == "paced" else 0.4
    return plan.order_for(plan.Scenario(kind, kind, kind, connections=2, tls=tls), subject, seconds)


class Wire:
    """A socket that only notes what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.sent.append(data)


def caller(*, stream: bool) -> Again:
    window = Window(Order([], [], stream=stream))
    window.open = True
    made = Again(window, b"GET / HTTP/1.1\r\n\r\n")
    made.connection_made(Wire())  # type: ignore[arg-type]
    made.send()
    return made


PACED = STREAM_HEAD + stamped_event() * 3 + LAST


@pytest.mark.parametrize(("answer", "stream", "stamps"), [(WHOLE, False, 0), (BURST, True, 0), (PACED, True, 3)])
@pytest.mark.parametrize("size", [1, 7, 24, 25, 26, 1000, 1 << 20])
def test_an_answer_counts_once_however_it_is_cut(answer: bytes, stream: bool, stamps: int, size: int) -> None:
    one = caller(stream=stream)
    for _ in range(2):
        for start in range(0, len(answer), size):
            one.data_received(answer[start : start + size])
    result = one.window.result
    assert (result.finished, result.failed, len(result.delays)) == (2, 0, 2 * stamps)
    assert len(one.transport.sent) == 3  # the first, and one after each answer


def test_what_is_no_200_is_told() -> None:
    one = caller(stream=False)
    one.data_received(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\nno")
    assert (one.window.result.failed, one.window.result.wrong[:12]) == (1, "HTTP/1.1 429")


def test_the_streams_have_the_events_they_promise() -> None:
    assert BURST.count(b"data: ") == EVENTS + 2
    assert BURST.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("kind", ["whole", "burst", "paced"])
def test_the_mock_upstream_answers_each_kind(mock: Mock, kind: str) -> None:
    figures = bench().measure(direct(mock), mock, shortly(kind, direct(mock)))
    assert figures["cpu_us"] > 0
    assert figures["latency_p50_ms"] <= figures["latency_p99_ms"]
    assert ("event_delay_p50_ms" in figures) == (kind == "paced")


def test_streams_are_held_open(mock: Mock) -> None:
    subject = direct(mock)
    order = Order([subject.address()], [request(subject, "idle")], stream=True, open_streams=3, seconds=1.5)
    figures = bench().measure(subject, mock, order)
    assert 1 <= figures["per_second"] <= 6
    assert figures["memory_kib"] > 0


def test_nginx_hands_everything_on(folder: Path, mock: Mock) -> None:
    if find_nginx() is None:
        pytest.skip("nginx is not installed")
    with nginx(folder, CORE, mock) as proxy:
        assert proxy is not None
        for kind, tls in (("whole", False), ("burst", False), ("whole", True)):
            assert bench().measure(proxy, mock, shortly(kind, proxy, tls=tls))["per_second"] > 0


def test_the_gateway_hands_everything_on(folder: Path, mock: Mock) -> None:
    with Gateway(folder, CORE, mock) as gateway:
        subject = gateway.subject()
        assert os.sched_getaffinity(subject.pid) == {CORE}
        for kind, tls in (("whole", False), ("burst", False), ("whole", True)):
            figures = bench().measure(subject, mock, shortly(kind, subject, tls=tls))
            assert 0 < figures["main_thread_us"] <= figures["cpu_us"] * 1.05  # the two clocks are read one after the other
        [row, *_] = gateway.sluice.usage()
        assert (row["status"], row["input_tokens"], row["output_tokens"], row["usage_source"]) == (200, 120, EVENTS, "reported")
        assert row["cost_usd"] > 0


def test_the_clock_of_a_process_agrees_with_what_the_kernel_tells_of_it() -> None:
    code = "import sys, time\nwhile time.process_time() < 0.2: pass\nprint(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as busy:
        assert busy.stdout is not None
        busy.stdout.readline()
        fields = Path(f"/proc/{busy.pid}/stat").read_text().rpartition(")")[2].split()
        told = (int(fields[11]) + int(fields[12])) / machine.TICKS
        assert machine.cpu_seconds(busy.pid) == pytest.approx(told, abs=3 / machine.TICKS)
        busy.stdin.close()  # type: ignore[union-attr]


def test_the_clock_of_a_family_has_what_its_members_took_also_when_they_have_ended() -> None:
    own = machine.family_seconds(os.getpid())
    busy = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"]
    subprocess.run(busy, check=True)
    assert 0.15 <= machine.family_seconds(os.getpid()) - own < 5  # of the ended only whole ticks of 10 ms are known


@pytest.mark.postgres
@pytest.mark.redis
def test_the_services_are_measured_beside_what_they_serve(folder: Path, mock: Mock) -> None:
    if services.why_not():
        pytest.skip(services.why_not())
    with services.services(folder, CORE) as beside:
        found = services.Services(bench()).measure(direct(mock), mock, shortly("whole", direct(mock)), beside)
        with psycopg.connect(beside.database_url) as connection:
            connection.execute("SELECT sum(number) FROM generate_series(1, 2000000) number")
            assert machine.family_seconds(beside.postgres) - machine.cpu_seconds(beside.postgres) > 0.05
    assert found["redis_core"] < 0.2
    assert found["postgres_core"] < 0.2


def test_the_report_compares_the_gateway_with_and_without_services(tmp_path: Path) -> None:
    beside = {"redis_core": 0.2, "postgres_core": 0.05, "redis_us": 40.0, "postgres_us": 10.0}
    found = {"direct": figures(5), "embedded": figures(100, **beside), "services": figures(140, **beside)}
    # A round that was slow for both says as much as any other.
    found["runs"] = {"embedded": [figures(100), figures(200), figures(100)], "services": [figures(140), figures(240), figures(150)]}
    kept = tmp_path / "services.json"
    report.save(kept, {"about": report.about(tmp_path, quick=True), "results": {"whole": {"title": "one", **found}}})
    tables = {title: rows for title, _, rows in report.tables(report.load(kept))}
    assert tables["With Postgres and Redis"][0][:4] == ["one", "100.0", "140.0", "1.40"]
    assert tables["The check"][1][4:7] == ["5%", "75%", "28.0"]


def figures(cpu_us: float, **more: float) -> plan.Figures:
    known = {"main_thread_us": cpu_us / 2, "per_second": 1e6 / cpu_us, "load_core": 0.5, "subject_core": 1.0, "spread": 0.1}
    return {"cpu_us": cpu_us, "others_subject_core": 0.0, "others_load_core": 0.0, **known, **more}


@pytest.fixture
def run(tmp_path: Path) -> report.Run:
    """A run's figures, kept and read again."""
    slow = {"direct": figures(5, latency_p50_ms=1.0), "nginx": figures(20, latency_p50_ms=1.25), "gateway": figures(90, latency_p50_ms=2.5)}
    slow = {name: found | {"latency_p99_ms": found["latency_p50_ms"]} for name, found in slow.items()}
    plan.add_latency(slow)
    results = {
        "whole": {"title": "one", "per": "request", "direct": figures(5), "nginx": figures(20), "gateway": figures(90)},
        "whole_50": {"title": "slow", "per": "request", **slow},
        "steps": {"none": figures(80), "all": figures(90)},
        "at_rest": {"cpu_ms_per_second": 3.0},
    }
    kept = tmp_path / "results" / "latest.json"
    report.save(kept, {"about": report.about(tmp_path, quick=True), "results": results})
    return report.load(kept)


def test_the_report_compares(run: report.Run) -> None:
    assert run["results"]["whole"]["ratio"] == 4.5
    tables = {title: rows for title, _, rows in report.tables(run)}
    assert tables["What an answer costs"][0][:5] == ["one", "20.0", "90.0", "4.5", "45.0"]
    assert [row[2] for row in tables["What is added to the time of an answer"]] == ["0.25 / 0.25", "1.50 / 1.50"]
    assert [row[2] for row in tables["The price of the steps (one JSON answer)"]] == ["", "+10.0"]
    assert tables["The check"][0][3] == "18.0"


def test_the_report_fills_its_place_in_a_page(run: report.Run, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n\n{report.BEGIN.format('figures')}\nold figures\n{report.END.format('figures')}\n\nAfter.\n")
    report.put_into(page, run)
    text = page.read_text()
    assert "old figures" not in text
    assert "| one | 20.0 | 90.0 | 4.5 |" in text
    assert text.startswith("Before.")
    assert text.endswith("After.\n")


@pytest.mark.parametrize("kind", translation.kinds())
def test_a_recorded_stream_is_made_longer_and_still_is_a_whole_answer(kind: str) -> None:
    one = translation.recorded(kind)
    assert b"".join(one.frames) == (translation.RECORDINGS / kind / "hello.stream").read_bytes()
    reader = one.reader()
    said = [reader.feed(frame) for frame in translation.lengthened(one)] + [reader.end()]
    assert reader.events == translation.EVENTS
    assert sum(map(len, said)) > 100 * translation.EVENTS
    assert b"".join(said).count(b'"finish_reason":"stop"') == 1
    assert said[-1].endswith(b"data: [DONE]\n\n") or said[-2].endswith(b"data: [DONE]\n\n")


def test_the_cost_of_a_translation_is_measured_and_told(tmp_path: Path) -> None:
    kind = translation.kinds()[0]
    found = translation.cost_of(kind, rounds=2)
    assert found["cpu_us"] > 0
    assert found["events"] == translation.EVENTS
    about = report.about(tmp_path, quick=True)
    report.save(
        tmp_path / "latest.json",
        {"about": about, "results": {"translation": {kind: {**found, "cpu_us": 15.1}, "quick": {**found, "cpu_us": 2.0}}}},
    )
    [(title, _, rows)] = report.tables(report.load(tmp_path / "latest.json"))
    assert title == "What translating one event of a stream costs"
    assert [row[:3] for row in rows] == [[kind, "15.1", "no"], ["quick", "2.0", "yes"]]


def test_what_passes_as_it_came_is_no_translation() -> None:
    assert set(registry.names()) > set(translation.kinds()) != set()


def test_the_median_is_of_each_figure_and_the_spread_of_the_rounds() -> None:
    found = plan.median_of([{"cpu_us": cost, "per_second": 1 / cost} for cost in (10.0, 14.0, 11.0)])
    assert found == pytest.approx({"cpu_us": 11.0, "per_second": 1 / 11, "spread": 4 / 11})
