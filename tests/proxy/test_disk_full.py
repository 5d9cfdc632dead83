"""A12: the disk is full. New calls are refused before any upstream is called, what runs is recorded, and afterwards all is well.

Once on a filesystem of 24 MiB that is filled up, and once by the limit on the size of files that `ulimit -f` sets.
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.project.raw_http import Peer, chat, request
from tests.serving import Sluice, eventually
from tests.upstreams.openai import DONE, OpenAIUpstream, Step

SIZE = 24 << 20
STREAMS = 20


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A filesystem of its own. Skips the test where none can be mounted, and says why."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small filesystem")
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small filesystem cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write until nothing more goes in."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1 << 8, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


def refused(house: Sluice, key: str) -> bool:
    with Peer(house.port) as peer:
        answer = peer.send(chat(key, "sim/gpt-4o")).answer()
    if answer.status == 200:
        return False
    assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "journal_full", "5")
    return True


def goes_through(house: Sluice, key: str, upstream: OpenAIUpstream, fill_up: Callable[[], None], make_room: Callable[[], None]) -> None:
    """Streams run, the disk fills up, they end, there is room again: and every row is there in the end."""
    upstream.script(*[Step(text="one two three four five six", delay_frame_ms=400)] * STREAMS)
    peers = [Peer(house.port).send(chat(key, "sim/gpt-4o", stream=True)) for _ in range(STREAMS)]
    eventually(lambda: len(upstream.posts) == STREAMS and all(seen.frames_sent for seen in upstream.posts), "not all began")
    fill_up()

    called = len(upstream.posts)
    eventually(lambda: refused(house, key), "still accepted", seconds=3)
    called = len(upstream.posts)  # one may have found the last bytes
    for _ in range(5):
        assert refused(house, key)
    assert len(upstream.posts) == called
    with Peer(house.port) as peer:
        assert peer.send(request("/healthz", method="GET")).answer().status == 200
    for peer in peers:
        with peer:
            assert peer.answer().body.endswith(DONE)
    assert refused(house, key)
    assert len(upstream.posts) == called

    make_room()
    eventually(lambda: not refused(house, key), "still refused", seconds=5)
    ids = {seen.request_id for seen in upstream.posts}

    def all_there() -> bool:
        rows = [row for row in house.usage() if row["request_id"] in ids]
        return len(rows) == len(ids) and all((row["status"], row["output_tokens"] > 0) == (200, True) for row in rows)

    eventually(all_there, "some calls have no row", seconds=15)
    assert house.stop() == 0
    assert list((house.data_dir / "journal").iterdir()) == []


@pytest.fixture
def house_in(upstream: OpenAIUpstream) -> Iterator[Callable[[Path], tuple[Sluice, str]]]:
    houses = []

    def start(folder: Path) -> tuple[Sluice, str]:
        house = Sluice(folder / "data")
        house.log_path = folder.parent / "house.log"  # on another disk, as a supervisor would have it
        houses.append(house)
        house.start()
        house.add_openai(upstream, prefix="sim")
        house.wait_for("sim")
        upstream.reset()
        return house, house.issue_key()

    yield start
    for house in houses:
        house.close()


def test_A12_a_full_disk(tmp_path: Path, house_in: Callable[[Path], tuple[Sluice, str]], upstream: OpenAIUpstream) -> None:
    with small_disk(tmp_path / "disk") as folder:
        house, key = house_in(folder)
        goes_through(house, key, upstream, lambda: fill(folder) and None, lambda: (folder / "ballast").unlink())
        house.close()


def test_A12_a_full_disk_and_a_killed_server(
    tmp_path: Path, house_in: Callable[[Path], tuple[Sluice, str]], upstream: OpenAIUpstream
) -> None:
    """What was recorded on the reserve outlives the process, and what ran is written off as interrupted: nothing is missing."""
    with small_disk(tmp_path / "disk") as folder:
        house, key = house_in(folder)
        ends, runs = Step(text="one two three", delay_frame_ms=400), Step(text="word " * 50, delay_frame_ms=300)
        upstream.script(*[ends] * STREAMS, runs)
        peers = [Peer(house.port).send(chat(key, "sim/gpt-4o", stream=True)) for _ in range(STREAMS)]
        eventually(lambda: len(upstream.posts) == STREAMS, "not begun")
        peers.append(Peer(house.port).send(chat(key, "sim/gpt-4o", stream=True)))
        eventually(lambda: len(upstream.posts) > STREAMS and all(seen.frames_sent for seen in upstream.posts), "not begun")
        fill(folder)
        for peer in peers[:STREAMS]:
            assert peer.answer().body.endswith(DONE)
        time.sleep(0.1)  # a row follows the last byte
        house.kill9()
        for peer in peers:
            peer.socket.close()
        (folder / "ballast").unlink()
        house.start_again()
        rows = {row["request_id"]: (row["status"], row["error"]) for row in house.usage()}
        assert [rows[seen.request_id] for seen in upstream.posts] == [(200, "")] * STREAMS + [(500, "interrupted")]
        house.close()


def test_A12_a_limit_on_the_size_of_files(tmp_path: Path, house_in: Callable[[Path], tuple[Sluice, str]], upstream: OpenAIUpstream) -> None:
    house, key = house_in(tmp_path)

    def limit() -> None:
        [segment] = (house.data_dir / "journal").glob("*/*.seg")
        resource.prlimit(house.pid, resource.RLIMIT_FSIZE, (segment.stat().st_size + 100, resource.RLIM_INFINITY))

    def lift() -> None:
        resource.prlimit(house.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    goes_through(house, key, upstream, limit, lift)
