"""Where there is Redis, Celery runs the sweeps: the schedule names real tasks, and a worker with a beat renews and lists."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from project.env import REPOSITORY
from tests.loops.oauth_race import House
from tests.serving import eventually, free_port
from tests.upstreams.oauth_server import OAuthUpstream

# The schedule as it is, only faster.
WORKER = """
from project.celery import app
app.loader.import_default_modules()
for entry in app.conf.beat_schedule.values():
    assert entry["task"] in app.tasks, entry
    entry["schedule"] = 0.5
app.worker_main(["worker", "--beat", "--pool", "solo", "--loglevel", "INFO", "--schedule", "{schedule}"])
"""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(tmp_path)]
    server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    yield f"redis://127.0.0.1:{port}/0"
    server.terminate()
    server.wait(10)


@pytest.mark.redis
def test_a_worker_with_a_beat_renews_sign_ins_and_lists_models(redis: str, tmp_path: Path):
    with OAuthUpstream() as vendor:
        house = House(tmp_path, REDIS_URL=redis, SECRET_KEY="s" * 50, KEYRING="k" * 50)
        house.add(vendor, until=1)
        log = tmp_path / "worker.log"
        with log.open("wb") as out:
            code = WORKER.format(schedule=tmp_path / "beat")
            worker = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=house.env, stdout=out, stderr=subprocess.STDOUT)
        try:

            def done() -> bool:
                return vendor.counts.refreshes > 0 and any(seen.path == "/v1/models" for seen in vendor.log)

            eventually(done, "the worker does nothing", seconds=40)
        except AssertionError:
            raise AssertionError(log.read_text()[-4000:]) from None
        finally:
            worker.terminate()
            worker.wait(20)
            house.close()
    assert vendor.counts.refreshes == 1
    assert vendor.counts.reused == 0
    assert "refresh-sim" not in log.read_text()


def test_without_redis_there_is_no_worker():
    done = subprocess.run([sys.executable, "-c", "import project.celery"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "REDIS_URL is not set" in done.stderr
