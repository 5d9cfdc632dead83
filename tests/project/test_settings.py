"""What Django is told, where its own default would not do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.signing import BadSignature, get_cookie_signer
from django.http import HttpResponse
from django.test import RequestFactory

from tests.serving import REPOSITORY

GOOD = {
    "PUBLIC_URL": "https://sluice.example",
    "ALLOWED_HOSTS": "sluice.example",
    "TRUSTED_PROXIES": "127.0.0.1/32",
    "SECRET_KEY": "0123456789" * 5,
}
# Which SQLite there is does not matter here.
BEGIN = "import sqlite3, sys; sqlite3.sqlite_version_info = (3, 51, 3); "
CHECK = (
    BEGIN + "from django.core.management import execute_from_command_line as run; run(['', 'check', '--deploy', '--fail-level', 'WARNING'])"
)
HSTS = BEGIN + (
    "import django; django.setup(); from django.test import Client; client = Client(headers={'host': 'sluice.example'})\n"
    "for secure in (True, False): print(client.get('/robots.txt', secure=secure).headers.get('strict-transport-security'))"
)


def python(code: str, data_dir: Path, **said: str) -> subprocess.CompletedProcess[str]:
    """Run it as an operator's process, who said this."""
    env = {"PATH": os.environ["PATH"], "DJANGO_SETTINGS_MODULE": "project.settings", "DATA_DIR": str(data_dir), **said}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_nothing_is_said_of_a_deployment_that_is_as_it_should_be(tmp_path: Path) -> None:
    checked = python(CHECK, tmp_path, **GOOD)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "no issues" in checked.stdout


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"PUBLIC_URL": "http://sluice.example"}, {"security.W004", "security.W012", "security.W016"}),
        ({"DEBUG": "1"}, {"security.W018", "sluice.W007"}),
        ({"SECRET_KEY": "short"}, {"sluice.W010"}),
        ({"KEYRING": GOOD["SECRET_KEY"]}, {"sluice.E009"}),
    ],
)
def test_of_one_that_is_not_each_fault_is_named(tmp_path: Path, bad: dict[str, str], said: set[str]) -> None:
    checked = python(CHECK, tmp_path, **(GOOD | bad))
    assert checked.returncode == 1
    assert set(re.findall(r"(?:security|sluice)\.[WE]\d+", checked.stderr)) == said


def test_browsers_are_told_to_keep_to_https_for_a_year_and_for_this_name_alone(tmp_path: Path) -> None:
    assert python(HSTS, tmp_path, **GOOD).stdout.split("\n")[:2] == ["max-age=31536000", "None"]
    assert python(HSTS, tmp_path, **(GOOD | {"PUBLIC_URL": "http://sluice.example"})).stdout.split("\n")[:2] == ["None", "None"]


def test_a_cookie_signed_the_old_way_is_not_believed() -> None:
    """Django's releases of 2026 sign name and salt apart, and take the old way for a while unless told otherwise."""
    request = RequestFactory().get("/")
    response = HttpResponse()
    response.set_signed_cookie("place", "here", salt="one")
    request.COOKIES["place"] = response.cookies["place"].value
    assert request.get_signed_cookie("place", salt="one") == "here"

    request.COOKIES["place"] = get_cookie_signer(salt="place" + "one").sign("here")
    with pytest.raises(BadSignature):
        request.get_signed_cookie("place", salt="one")
