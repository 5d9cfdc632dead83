"""The tests' own machinery: a service test that is skipped although its service is present, and async tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import REPOSITORY

SKIPPED = """
import pytest

@pytest.mark.nginx
def test_needs_a_service():
    pytest.skip("it does not answer")
"""
ASYNC = """
import asyncio

async def test_waits():
    await asyncio.sleep(0)
    assert False, "it was awaited"
"""


def run(folder: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest over one file, with our conftest and nothing else."""
    (folder / "test_it.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rsf", "-p", "tests.conftest", "-p", "no:django", "-p", "no:cacheprovider"]
    environment = {"PATH": "", "HOME": str(folder), "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run([*command, "test_it.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def with_nginx(tmp_path: Path) -> str:
    """A PATH on which there is an nginx."""
    program = tmp_path / "bin" / "nginx"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return str(program.parent)


def test_a_skip_fails_when_the_service_is_present_and_required(tmp_path: Path, with_nginx: str) -> None:
    done = run(tmp_path, SKIPPED, PATH=with_nginx, REQUIRE_SERVICES="1")

    assert done.returncode == 1, done.stdout
    assert "although this is present: nginx" in done.stdout
    assert "it does not answer" in done.stdout


@pytest.mark.parametrize("required", ["0", "1"])
def test_a_skip_is_a_skip_when_the_service_is_absent_or_not_required(tmp_path: Path, with_nginx: str, required: str) -> None:
    done = run(tmp_path, SKIPPED, PATH="" if required == "1" else with_nginx, REQUIRE_SERVICES=required)

    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout
    assert "it does not answer" in done.stdout


def test_async_tests_are_awaited(tmp_path: Path) -> None:
    done = run(tmp_path, ASYNC)

    assert done.returncode == 1
    assert "it was awaited" in done.stdout


def test_no_setting_of_this_shell_reaches_a_server(sluice_env: dict[str, str]) -> None:
    assert "DATABASE_URL" not in sluice_env
    assert sluice_env["DJANGO_SETTINGS_MODULE"] == "project.settings"
    assert sluice_env["DATA_DIR"] != os.environ["DATA_DIR"]


@pytest.fixture
def sluice_env(sluice) -> dict[str, str]:  # type: ignore[no-untyped-def]
    return dict(sluice.env)
