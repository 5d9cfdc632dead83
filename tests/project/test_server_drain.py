"""SIGTERM: what is running may finish, what cannot is told so and settled, and the process ends with exit status 0."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.project.raw_http import Peer, chat, request, took
from tests.serving import Sluice, eventually
from tests.upstreams.openai import DONE, OpenAIUpstream, Step

DRAIN_SECONDS = 2.0
STREAMS = 100


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, upstream_server: OpenAIUpstream) -> Iterator[tuple[Sluice, str]]:
    """A Sluice that does not run, and a key of it: each test starts it and ends it."""
    house = Sluice(tmp_path_factory.mktemp("drain") / "data")
    house.migrate()
    house.add_openai(upstream_server, prefix="sim")
    yield house, house.issue_key()
    house.close()


@pytest.fixture
def house(prepared: tuple[Sluice, str], upstream: OpenAIUpstream, request: pytest.FixtureRequest) -> Iterator[Sluice]:
    house, _ = prepared
    house.env.update({"DRAIN_SECONDS": str(DRAIN_SECONDS), "DRAIN_DELAY": "0", **getattr(request, "param", {})})
    yield house.start_again(forked=False)
    house.kill9()


@pytest.fixture
def key(prepared: tuple[Sluice, str]) -> str:
    return prepared[1]


def rows_of(house: Sluice, upstream: OpenAIUpstream) -> dict[str, dict[str, Any]]:
    """The usage rows of this test, by request id."""
    ids = {seen.request_id for seen in upstream.posts}
    return {row["request_id"]: row for row in house.usage() if row["request_id"] in ids}


def words(number: int) -> str:
    return " ".join(str(one) for one in range(number))


def begin_drain(house: Sluice) -> float:
    house._server.send_signal(signal.SIGTERM)
    return time.monotonic()


def end(house: Sluice, began: float) -> float:
    """Wait for its end, which is a good one. How long it took since SIGTERM."""
    server, house._server = house._server, None
    assert server.wait(DRAIN_SECONDS + 10) == 0, house.log()
    return took(began)


def is_listening(house: Sluice) -> bool:
    try:
        Peer(house.port).socket.close()
    except ConnectionError:
        return False
    return True


def test_F15_short_streams_finish_and_long_ones_are_told_and_settled(house: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    short, long = Step(text=words(20), delay_frame_ms=40), Step(text=words(20), delay_frame_ms=500)
    upstream.script(*[short, long] * (STREAMS // 2))
    peers = [Peer(house.port).send(chat(key, "sim/gpt-4o", stream=True)) for _ in range(STREAMS)]
    eventually(lambda: len(upstream.posts) == STREAMS and all(seen.frames_sent for seen in upstream.posts), "not all began", seconds=15)
    began = begin_drain(house)

    answers = [peer.answer(may_be_cut=True) for peer in peers]
    duration = end(house, began)
    assert DRAIN_SECONDS < duration < DRAIN_SECONDS + 10

    cut = [answer for answer in answers if not answer.body.endswith(DONE)]
    assert len(cut) == STREAMS // 2
    for answer in answers:
        # Without its end, an answer cannot be taken for a whole one, not even by who does not know our last event.
        assert answer.is_whole is (answer not in cut)
    for answer in cut:
        last = json.loads(answer.body.rstrip().rpartition(b"\n\n")[2].removeprefix(b"data: "))
        assert (last["error"]["code"], b"[DONE]" in answer.body) == ("shutdown", False)
    rows = rows_of(house, upstream)
    assert len(rows) == STREAMS
    for answer in answers:
        row = rows[answer.headers["x-request-id"]]
        assert (row["status"], row["error"]) == ((503, "shutdown") if answer in cut else (200, ""))
        assert row["output_tokens"] > 0
    eventually(lambda: all(seen.peer_left_at or seen.finished_at for seen in upstream.posts), "an upstream goes on")
    assert list((house.data_dir / "journal").iterdir()) == []


@pytest.mark.parametrize("house", [{"DRAIN_SECONDS": "0.3"}], indirect=True)
def test_F16_whatever_a_request_is_doing_at_the_deadline_is_settled(house: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    log_start = house.log_size()
    upstream.script(*[Step(text=words(50), delay_frame_ms=200)] * 2, *[Step(delay_first_ms=20_000)] * 2)
    reading, not_reading = (Peer(house.port).send(chat(key, "sim/gpt-4o", stream=True)) for _ in range(2))
    waiting, whole = Peer(house.port).send(chat(key, "sim/gpt-4o", stream=True)), Peer(house.port).send(chat(key, "sim/gpt-4o"))
    sending = Peer(house.port).send(chat(key, "sim/gpt-4o")[:-5])
    eventually(lambda: len(upstream.posts) == 4, "not all began")
    began = begin_drain(house)

    begun = reading.answer(may_be_cut=True)
    assert (b'"shutdown"' in begun.body, begun.is_whole, reading.is_closed()) == (True, False, True)
    not_begun = waiting.answer()
    assert (not_begun.status, not_begun.error["code"]) == (503, "shutdown")
    refused = whole.answer()
    assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "shutdown", "1")
    assert sending.answer().status == 503  # it had not been admitted: there is nothing to settle
    assert end(house, began) < 0.3 + 10
    not_reading.socket.close()
    assert [(row["status"], row["error"]) for row in rows_of(house, upstream).values()] == [(503, "shutdown")] * 4
    assert "Traceback" not in house.log(log_start)


@pytest.mark.parametrize("house", [{"DRAIN_SECONDS": "0.3", "READER_SECONDS": "60"}], indirect=True)
def test_F16_a_client_that_does_not_read_does_not_keep_the_process(house: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    frame = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 30_000 + b'"}}]}\n\n'
    upstream.script(Step(frames=[*[frame] * 400, DONE]))
    with Peer(house.port, receive_buffer=4096) as peer:
        peer.send(chat(key, "sim/gpt-4o", stream=True))
        eventually(lambda: upstream.posts and upstream.posts[0].frames_sent, "not begun")
        time.sleep(0.5)
        assert end(house, begin_drain(house)) < 0.3 + 10
    [row] = rows_of(house, upstream).values()
    assert row["error"] in ("shutdown", "client_closed")


@pytest.mark.parametrize("house", [{"DRAIN_DELAY": "1.5"}], indirect=True)
def test_F15_with_a_delay_it_is_unready_at_once_and_still_serves(house: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    resting = Peer(house.port)
    assert resting.send(chat(key, "sim/gpt-4o")).answer().status == 200
    began = begin_drain(house)

    def is_draining() -> bool:
        with Peer(house.port) as peer:
            answer = peer.send(request("/readyz", method="GET")).answer()
            return (answer.status, answer.body) == (503, b'{"status":"draining"}')

    eventually(is_draining, "still ready", seconds=1)
    with Peer(house.port) as peer:
        assert peer.send(request("/healthz", method="GET")).answer().status == 200
    answer = resting.send(chat(key, "sim/gpt-4o")).answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    with Peer(house.port) as peer:
        answer = peer.send(chat(key, "sim/gpt-4o")).answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert took(began) < 1.5, "too slow to show anything"
    assert 1.4 < end(house, began) < 6


def test_F15_connections_that_rest_are_closed_at_once_and_no_new_ones_taken(house: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    upstream.script(Step(text=words(20), delay_frame_ms=50))
    with Peer(house.port) as resting, Peer(house.port) as silent, Peer(house.port) as busy:
        assert resting.send(request("/healthz", method="GET")).answer().status == 200
        busy.send(chat(key, "sim/gpt-4o", stream=True))
        eventually(lambda: upstream.posts and upstream.posts[0].frames_sent, "not begun")
        began = begin_drain(house)
        eventually(lambda: resting.is_closed() and silent.is_closed(), "kept", seconds=1)
        assert not is_listening(house)
        assert busy.answer().body.endswith(DONE)
        assert busy.rest() == b""
    end(house, began)


def test_a_request_that_was_begun_before_the_drain_is_served(house: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    sent = chat(key, "sim/gpt-4o")
    with Peer(house.port) as peer:
        peer.send(sent[:30])
        time.sleep(0.1)
        began = begin_drain(house)
        time.sleep(0.3)
        answer = peer.send(sent[30:]).answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
    end(house, began)


def test_who_asks_twice_by_hand_need_not_wait(house: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    upstream.script(Step(text=words(50), delay_frame_ms=500))
    with Peer(house.port) as peer:
        peer.send(chat(key, "sim/gpt-4o", stream=True))
        eventually(lambda: upstream.posts and upstream.posts[0].frames_sent, "not begun")
        began = time.monotonic()
        for _ in range(2):
            house._server.send_signal(signal.SIGINT)
            time.sleep(0.2)
        house._server.wait(5)
        assert took(began) < DRAIN_SECONDS
