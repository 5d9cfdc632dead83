"""Redis for tests: names of one's own on the shared server, and servers of one's own for those that are to fall."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.serving import eventually, free_port

SHARED = "redis://127.0.0.1:6379/5"


class Server:
    """A Redis that may be stopped, killed, paused and emptied."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis.Redis(port=self.port, socket_timeout=5)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        self._process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "3600 1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually(self.answers, "redis-server does not answer", seconds=10)
        return self

    def answers(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(self.client.ping())
        return False

    def stop(self) -> None:
        """At once, and without a word to its clients."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def restart(self, away_seconds: float = 0.0) -> None:
        self.stop()
        time.sleep(away_seconds)
        self.start()


@contextlib.contextmanager
def server() -> Iterator[Server]:
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server here")
    folder = Path(tempfile.mkdtemp(prefix="sluice-redis-"))
    one = Server(folder)
    try:
        yield one.start()
    finally:
        one.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def name_on_the_shared_server() -> Iterator[str]:
    """A name for keys that nobody else uses; they are removed afterwards."""
    name = f"test-{secrets.token_hex(6)}"
    client = redis.Redis.from_url(SHARED, socket_timeout=5)
    try:
        client.ping()
    except redis.RedisError:
        pytest.skip("Redis does not answer on 127.0.0.1:6379")
    yield name
    for key in client.scan_iter(f"{{{name}}}:*", count=1000):
        client.delete(key)
    client.close()
