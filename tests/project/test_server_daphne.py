"""`serve --server daphne`: it serves the same, it drains, and it does not fill up for a client that does not read."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.project.raw_http import Peer, chat, memory_of, request, took
from tests.serving import REPOSITORY, Sluice, eventually, free_port
from tests.upstreams.openai import DONE, OpenAIUpstream, Step

MIB = 1 << 20
DRAIN_SECONDS = 1.0
READER_SECONDS = 1.5
FRAME = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 30_000 + b'"}}]}\n\n'


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, upstream_server: OpenAIUpstream) -> Iterator[tuple[Sluice, str]]:
    times = {"DRAIN_SECONDS": str(DRAIN_SECONDS), "READER_SECONDS": str(READER_SECONDS)}
    house = Sluice(tmp_path_factory.mktemp("daphne") / "data", CUT_REVOKED_CALLS="1", **times)
    house.command = ["-m", "tests.hurried", "serve"]
    house.migrate()
    house.add_openai(upstream_server, prefix="sim")
    yield house, house.issue_key()
    house.close()


@pytest.fixture
def house(prepared: tuple[Sluice, str], upstream: OpenAIUpstream) -> Iterator[Sluice]:
    house, _ = prepared
    yield house.start_again("--server", "daphne")
    house.kill9()


@pytest.fixture
def key(prepared: tuple[Sluice, str]) -> str:
    return prepared[1]


def end(house: Sluice, sign: int = signal.SIGTERM) -> int:
    server, house._server = house._server, None
    server.send_signal(sign)
    return server.wait(DRAIN_SECONDS + 10)


def rows_of(house: Sluice, upstream: OpenAIUpstream) -> list[tuple[int, str]]:
    ids = {seen.request_id for seen in upstream.posts}
    return sorted((row["status"], row["error"]) for row in house.usage() if row["request_id"] in ids)


def test_it_answers_calls_streams_and_pages(house: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    with Peer(house.port) as peer:
        for _ in range(2):
            assert peer.send(chat(key, "sim/gpt-4o")).answer().status == 200
            assert peer.send(chat(key, "sim/gpt-4o", stream=True)).answer().body.endswith(DONE)
    page = httpx.get(house.url, headers={"accept": "text/html"})
    assert (page.status_code, 'type="password"' in page.text) == (200, True)
    with httpx.Client(base_url=f"{house.url}/v1", headers={"authorization": "Bearer sk-sluice-wrong"}) as stranger:
        assert stranger.get("/models").status_code == 401
    assert end(house) == 0
    eventually(lambda: rows_of(house, upstream) == [(200, "")] * 4, "not settled")
    assert list((house.data_dir / "journal").iterdir()) == []


def test_a_drain_lets_short_streams_finish_and_tells_long_ones(house: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    words = " ".join(str(number) for number in range(10))
    upstream.script(Step(text=words, delay_frame_ms=50), Step(text=words, delay_frame_ms=600))
    peers = [Peer(house.port) for _ in range(2)]
    for number, peer in enumerate(peers, 1):
        peer.send(chat(key, "sim/gpt-4o", stream=True))
        eventually(lambda number=number: len(upstream.posts) == number, "not begun")
    eventually(lambda: all(seen.frames_sent for seen in upstream.posts), "not begun")
    house._server.send_signal(signal.SIGTERM)
    short, long = (peer.answer(may_be_cut=True) for peer in peers)

    assert (short.body.endswith(DONE), short.is_whole, long.is_whole) == (True, True, False)
    last = json.loads(long.body.rstrip().rpartition(b"\n\n")[2].removeprefix(b"data: "))
    assert (last["error"]["code"], b"[DONE]" in long.body) == ("shutdown", False)
    server, house._server = house._server, None
    assert server.wait(10) == 0
    assert rows_of(house, upstream) == [(200, ""), (503, "shutdown")]


def test_a_drain_takes_no_new_connections(house: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    upstream.script(Step(text="one two three", delay_frame_ms=80))
    with Peer(house.port) as peer:
        peer.send(chat(key, "sim/gpt-4o", stream=True))
        eventually(lambda: upstream.posts and upstream.posts[0].frames_sent, "not begun")
        house._server.send_signal(signal.SIGTERM)
        eventually(lambda: not is_listening(house), "still listening", seconds=1)
        assert peer.answer().body.endswith(DONE)


def is_listening(house: Sluice) -> bool:
    try:
        Peer(house.port).socket.close()
    except ConnectionError:
        return False
    return True


def test_a_client_that_does_not_read_holds_little_and_is_cut(house: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    with Peer(house.port) as peer:  # what the first such answer costs, it costs once
        upstream.script(Step(frames=[*[FRAME] * 400, DONE]))
        assert len(peer.send(chat(key, "sim/gpt-4o", stream=True)).answer().body) > 400 * 30_000
    upstream.reset()
    upstream.script(*[Step(frames=[*[FRAME] * 1500, DONE])] * 4)  # 45 MB each
    before = memory_of(house.pid)
    peers = [Peer(house.port, receive_buffer=4096).send(chat(key, "sim/gpt-4o", stream=True)) for _ in range(4)]
    began = time.monotonic()
    most = before
    while not (len(upstream.posts) == 4 and all(seen.peer_left_at for seen in upstream.posts)):
        most = max(most, memory_of(house.pid))
        assert took(began) < READER_SECONDS + 10, "some are not cut"
        time.sleep(0.05)
    assert most - before < 16 * MIB
    assert all(seen.frames_sent < 1000 for seen in upstream.posts)
    for peer in peers:
        peer.socket.close()
    eventually(lambda: rows_of(house, upstream) == [(499, "client_closed")] * 4, "not settled")


def test_a_client_that_leaves_is_noticed(house: Sluice, key: str, upstream: OpenAIUpstream) -> None:
    upstream.script(Step(text="one two three", delay_frame_ms=5000))
    with Peer(house.port) as peer:
        peer.send(chat(key, "sim/gpt-4o", stream=True))
        eventually(lambda: upstream.posts and upstream.posts[0].frames_sent, "not begun")
    eventually(lambda: upstream.posts[0].peer_left_at, "the upstream goes on", seconds=2)
    with Peer(house.port) as peer:
        assert peer.send(request("/readyz", method="GET")).answer().status == 200


def test_a_stream_that_ends_with_its_key_is_told_and_has_an_end(house: Sluice, upstream: OpenAIUpstream) -> None:
    upstream.script(Step(text="one two three", delay_frame_ms=5000))
    key = house.issue_key(name="revoked")
    with Peer(house.port) as peer:
        peer.send(chat(key, "sim/gpt-4o", stream=True))
        eventually(lambda: upstream.posts and upstream.posts[0].frames_sent, "not begun")
        house.python("from accounts import actions, models; actions.revoke_key(models.ApiKey.objects.get(name='revoked'))")
        answer = peer.answer()
    assert (b'"key_revoked"' in answer.body, answer.is_whole) == (True, True)
    eventually(lambda: upstream.posts[0].peer_left_at, "the upstream goes on", seconds=2)
    eventually(lambda: rows_of(house, upstream) == [(401, "key_revoked")], "not settled")


def test_a_second_server_on_the_same_folder_ends_with_a_status(house: Sluice) -> None:
    with house.log_path.open("ab") as log:
        other = subprocess.run(
            [sys.executable, "manage.py", "serve", "--server", "daphne", "--port", str(free_port())],
            cwd=REPOSITORY,
            env=house.env,
            stdout=log,
            stderr=log,
            timeout=20,
            check=False,
        )
    assert other.returncode == 1
    assert "Another process already serves" in house.log()
