"""What `/metrics` says is what happened: counted where it is known, under labels that nobody outside can add to."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable

import httpx
import pytest

from project import exposition
from proxy.journal import Journal
from proxy.metrics import MOST_CODES, OTHER, OUR_OWN, WAITING, Metrics, Spread, put
from tests.proxy.test_gateway import CHAT, Chunks, House, fails, says, sse, whole
from tests.serving import Sluice, eventually
from tests.upstreams.kit import Step
from tests.upstreams.openai import OpenAIUpstream


async def test_a_call_is_counted_once_with_its_tokens_its_cost_and_the_upstreams_part(tmp_path):
    house = House(tmp_path, lambda request: whole())
    await house.call()
    metrics = house.gateway.metrics
    [(place, tally)] = metrics.tallies.items()
    assert place == ("chat/completions", "openai", False)
    assert tally.statuses == {(200, ""): 1}
    assert tally.sources == {"reported": 1}
    assert (tally.fresh_input, tally.cache_read, tally.output, tally.attempts) == (16, 4, 6, 1)
    assert tally.cost == 30
    assert tally.duration.sum >= tally.upstream.sum > 0
    assert tally.added.sum == pytest.approx(tally.duration.sum - tally.upstream.sum)
    assert (metrics.open, metrics.open_streams) == (0, 0)


async def test_what_the_first_upstream_took_before_it_failed_is_not_ours(tmp_path):
    async def fails_late() -> httpx.Response:
        await asyncio.sleep(0.1)
        return fails(503)

    house = House(tmp_path, lambda request: fails_late() if len(house.sent) == 1 else whole(), pool=2)
    await house.call()
    [tally] = house.gateway.metrics.tallies.values()
    assert tally.attempts == 2
    assert house.gateway.metrics.failures == {("openai", "Overloaded"): 1}
    assert tally.upstream.sum >= 0.1
    assert tally.added.sum == pytest.approx(tally.duration.sum - tally.upstream.sum)


async def test_a_stream_that_is_left_is_no_longer_open_and_counts_as_left(tmp_path):
    body = Chunks(sse(says("one"), says("two"), done=False), then=asyncio.Event().wait)
    house = House(tmp_path, lambda request: httpx.Response(200, stream=body))
    await house.call(CHAT | {"stream": True}, leave_after=1)
    metrics = house.gateway.metrics
    [tally] = metrics.tallies.values()
    assert tally.statuses == {(499, "client_closed"): 1}
    assert (metrics.open, metrics.open_streams) == (0, 0)


async def test_an_upstreams_own_word_for_an_error_is_no_label(tmp_path):
    house = House(tmp_path, lambda request: fails(400, "made-up-by-the-upstream"))
    await house.call()
    [tally] = house.gateway.metrics.tallies.values()
    assert tally.statuses == {(400, ""): 1}
    assert all("made-up" not in failure for _, failure in house.gateway.metrics.failures)


async def test_what_was_refused_is_counted_by_its_code(tmp_path):
    house = House(tmp_path, lambda request: whole())
    await house.call(key=None)
    await house.call(path="/v1/nowhere")
    assert house.gateway.metrics.refused == {(401, "invalid_api_key"): 1, (404, "invalid_request_error"): 1}


def test_codes_do_not_grow_without_end():
    metrics = Metrics()
    for number in range(MOST_CODES + 50):
        metrics.refuse(400, f"code-{number}")
    assert len(metrics.refused) == MOST_CODES + 1
    assert metrics.refused[400, OTHER] == 50


@pytest.mark.parametrize("bounds", [WAITING, OUR_OWN])
def test_a_value_on_a_bound_lies_below_it(bounds: tuple[float, ...]):
    spread = Spread.over(bounds)
    put(spread, bounds, bounds[0])
    put(spread, bounds, bounds[-1] * 2)
    assert spread.buckets == [1, *[0] * (len(bounds) - 1), 1]


async def test_one_worker_tells_what_another_has_counted(tmp_path):
    house = House(tmp_path, lambda request: whole())
    await house.call()
    exposition.share(house.journal, house.gateway.metrics)
    asked = Journal(tmp_path)
    assert exposition.others(tmp_path, asked.folder) == {house.journal.folder.name: house.gateway.metrics}
    assert exposition.others(tmp_path, house.journal.folder) == {}


# Through a server


def scrape(sluice: Sluice, **headers: str) -> str:
    request = urllib.request.Request(f"{sluice.url}/metrics", headers={name.replace("_", "-"): value for name, value in headers.items()})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


def values(page: str) -> dict[str, float]:
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in page.splitlines() if line and not line.startswith("#")}


def refused(sluice: Sluice, **headers: str) -> int:
    with pytest.raises(urllib.error.HTTPError) as answer:
        scrape(sluice, **headers)
    return answer.value.code


def test_the_page_has_each_metric_once_and_every_sample_under_its_own(sluice: Sluice, upstream: OpenAIUpstream, sim: str):
    key = sluice.issue_key()
    upstream.script(Step(text="one two"), Step("400"))
    for _ in range(2):
        httpx.post(
            f"{sluice.url}/v1/chat/completions", json=CHAT | {"model": f"{sim}/gpt-4o-mini"}, headers={"authorization": f"Bearer {key}"}
        )
    page = scrape(sluice)
    names = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    for line in page.splitlines():
        if line and not line.startswith("#"):
            name = line.partition("{")[0].partition(" ")[0]
            assert any(name == one or name.removeprefix(one) in ("_bucket", "_sum", "_count") for one in names), line
    seen = values(page)
    at = 'endpoint="chat/completions",kind="openai",stream="false"'
    assert seen[f'sluice_requests_total{{{at},status="2xx",outcome="ok"}}'] >= 1
    assert seen[f'sluice_requests_total{{{at},status="4xx",outcome="refused"}}'] >= 1
    assert seen[f'sluice_added_seconds_bucket{{{at},le="+Inf"}}'] == seen[f"sluice_added_seconds_count{{{at}}}"]
    assert seen["sluice_ready"] == 1
    assert seen["sluice_database_up"] == 1
    assert seen['sluice_credentials{kind="openai",state="active"}'] >= 1
    assert key not in page
    assert "gpt-4o" not in page


def test_the_journal_lags_while_the_ledger_has_not_stored_it(sluice: Sluice, sim: str):
    eventually(lambda: values(scrape(sluice))["sluice_journal_behind_bytes"] == 0, "the ledger does not catch up")
    assert values(scrape(sluice))["sluice_journal_lag_seconds"] == 0


@pytest.mark.parametrize("header", [{"x_forwarded_for": "203.0.113.9"}, {"host": "sluice.example.org"}, {"via": "1.1 front"}])
def test_without_a_token_a_proxy_on_this_machine_does_not_show_it_to_the_world(sluice: Sluice, header: dict[str, str]):
    assert refused(sluice, **header) == 403


def test_with_a_token_only_who_has_it_may_read(serve: Callable[..., Sluice]):
    guarded = serve(METRICS_TOKEN="let-prometheus-in")
    assert refused(guarded) == 403
    assert refused(guarded, authorization="Bearer something-else") == 403
    assert "sluice_ready 1" in scrape(guarded, authorization="Bearer let-prometheus-in", x_forwarded_for="203.0.113.9")


def test_a_line_of_the_log_as_json_names_the_request_it_is_about(serve: Callable[..., Sluice], upstream: OpenAIUpstream):
    sluice = serve(LOG_FORMAT="json")
    sluice.add_openai(upstream, prefix="logged")
    sluice.wait_for("logged")
    upstream.script(Step(status=503))
    body = {"model": "logged/gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}
    answer = httpx.post(f"{sluice.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {sluice.issue_key()}"})
    lines = [json.loads(line) for line in sluice.log().splitlines() if line.startswith("{")]
    assert any(line.get("request_id") == answer.headers["x-request-id"] and "credential" in line["message"] for line in lines)
