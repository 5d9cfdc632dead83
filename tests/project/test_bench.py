"""The parts of the benchmark work: what it starts answers, what it counts is right. How fast anything is, no test says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if not hasattr(os, "sched_setaffinity"):
    pytest.skip("the benchmark needs Linux", allow_module_level=True)

from bench import machine, plan, report
from bench.load import Again, Order, Window
from bench.subjects import Gateway, Mock, Subject, find_nginx, mock_upstream, nginx, request
from bench.upstream import BURST, EVENTS, LAST, STREAM_HEAD, WHOLE, stamped_event

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
    page.write_text(f"Before.\n\n{report.BEGIN}\nold figures\n{report.END}\n\nAfter.\n")
    report.put_into(page, run)
    text = page.read_text()
    assert "old figures" not in text
    assert "| one | 20.0 | 90.0 | 4.5 |" in text
    assert text.startswith("Before.")
    assert text.endswith("After.\n")


def test_the_median_is_of_each_figure_and_the_spread_of_the_rounds() -> None:
    found = plan.median_of([{"cpu_us": cost, "per_second": 1 / cost} for cost in (10.0, 14.0, 11.0)])
    assert found == pytest.approx({"cpu_us": 11.0, "per_second": 1 / 11, "spread": 4 / 11})
