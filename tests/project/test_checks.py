"""The system checks: what each says, and that it is silent where all is well."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import CheckMessage, run_checks
from pytest_django import Settings

from project import checks, env
from project.keyring import Keyring
from project.server import CUT_SECONDS, SETTLE_SECONDS
from providers.clock import Timeouts
from tests.serving import REPOSITORY

Say = Callable[..., list[CheckMessage]]

MOUNTS = """\
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:40 / /srv/on\\040nfs rw - nfs4 files:/srv rw
31 22 0:41 / /run rw - tmpfs tmpfs rw
32 31 8:2 / /run/kept rw - xfs /dev/sda2 rw
a line of a kernel to come
"""


@pytest.fixture
def say(settings: Settings) -> Say:
    """Our own messages for a deployment whose operator said this."""

    def with_settings(*, deploy: bool = False, **said: Any) -> list[CheckMessage]:
        settings.ENV = replace(env.read({}), **said)
        settings.PUBLIC_URL = settings.ENV.public_url
        settings.ALLOWED_HOSTS = settings.ENV.allowed_hosts
        found = run_checks(include_deployment_checks=deploy)
        return [message for message in found if str(message.id).startswith("sluice.")]

    return with_settings


def ids(messages: list[CheckMessage]) -> list[str]:
    return [str(message.id) for message in messages]


def test_the_defaults_are_quiet(say: Say) -> None:
    assert say() == []


def test_a_public_host_that_is_not_allowed_is_named_with_the_line_that_allows_it(say: Say) -> None:
    [found] = say(public_url="http://sluice.example:8000")
    assert found.id == "sluice.W005"
    assert "ALLOWED_HOSTS=localhost,127.0.0.1,[::1],sluice.example" in str(found.hint)
    assert say(public_url="http://sluice.example:8000", allowed_hosts=[".example"]) == []
    assert say(public_url="http://[::1]:8000") == []


def test_https_wants_a_trusted_proxy(say: Say) -> None:
    behind = {"public_url": "https://sluice.example", "allowed_hosts": ["sluice.example"]}
    assert ids(say(**behind)) == ["sluice.W006"]
    assert say(**behind, trusted_proxies=env.read({"TRUSTED_PROXIES": "127.0.0.1"}).trusted_proxies) == []


@pytest.mark.parametrize(("where", "warned"), [({}, False), ({"host": "0.0.0.0"}, True), ({"public_url": "http://10.0.0.1"}, True)])
def test_debug_is_for_the_own_machine(say: Say, where: dict[str, str], warned: bool) -> None:
    assert ("sluice.W007" in ids(say(debug=True, **where))) is warned
    assert "sluice.W007" not in ids(say(debug=False, **where))


def test_an_old_sqlite_is_said_to_the_operator_alone(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 40, 1))
    assert say() == []
    assert ids(say(deploy=True)) == ["sluice.W008"]
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 3))
    assert say(deploy=True) == []


SECRET, OTHER = "one-secret-of-an-operator-who-likes-short-commands-1", "another-secret-of-at-least-thirty-two-characters-2"


@pytest.mark.parametrize("keyring", [SECRET, f"{OTHER}\n{SECRET}", f"{OTHER},pepper:{SECRET}"])
def test_what_signs_sessions_is_no_entry_of_the_keyring(say: Say, settings: Settings, keyring: str) -> None:
    settings.SECRET_KEY, settings.KEYRING = SECRET, Keyring(keyring, None)
    [found] = say()
    assert (found.id, found.is_serious()) == ("sluice.E009", True)
    assert "SECRET_KEY a value of its own" in str(found.hint)
    assert SECRET not in f"{found.msg} {found.hint}"
    settings.SECRET_KEY = OTHER[::-1]
    assert say() == []


def test_one_file_for_both_secrets_is_found_out_before_and_after_it_is_read(say: Say, settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{OTHER}\n{SECRET}\n")
    settings.SECRET_KEY = file.read_text().strip()
    settings.KEYRING = Keyring(None, file)
    assert ids(say()) == ["sluice.E009"]
    settings.KEYRING.keys("seal")
    assert ids(say()) == ["sluice.E009"]


def test_looking_at_the_keyring_makes_none_and_leaves_complaints_to_who_uses_it(say: Say, settings: Settings, tmp_path: Path) -> None:
    for keyring in (Keyring(None, tmp_path / "keyring"), Keyring(None, None), Keyring("short", None)):
        settings.KEYRING = keyring
        assert say() == []
    assert list(tmp_path.iterdir()) == []


def test_a_secret_key_that_could_be_guessed_is_said_with_deploy(say: Say, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 3))
    for weak, said in (("0123456789" * 4 + "012345678", "has 49 characters"), ("abcd" * 20, "4 of them different")):
        settings.SECRET_KEY = weak
        assert say() == []
        [found] = say(deploy=True)
        assert found.id == "sluice.W010"
        assert said in found.msg
        assert "token_urlsafe(48)" in str(found.hint)
    settings.SECRET_KEY = "0123456789" * 5
    assert say(deploy=True) == []


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/home/sluice", "ext4"), ("/srv/on nfs/data", "nfs4"), ("/srv/on", "ext4"), ("/run/x", "tmpfs"), ("/run/kept/x", "xfs")],
)
def test_the_filesystem_of_a_folder_is_that_of_the_nearest_mount(folder: str, kind: str) -> None:
    assert checks.filesystem_of(Path(folder), MOUNTS) == kind


@pytest.mark.parametrize(("kind", "id_"), [("nfs4", "sluice.E003"), ("cifs", "sluice.E003"), ("tmpfs", "sluice.W004")])
def test_a_data_dir_that_is_not_on_a_disk(say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, id_: str) -> None:
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(checks, "MOUNTS", mounts)
    mounts.write_text(f"22 1 0:40 / / rw - {kind} somewhere rw\n")
    assert ids(say()) == [id_]
    mounts.write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    assert say() == []
    mounts.unlink()  # macOS
    assert say() == []


def test_F20_timeout_order(say: Say) -> None:
    ladder = ["pool_wait_seconds", "connect_seconds", "first_byte_seconds", "total_seconds"]
    silence = ["heartbeat_seconds", "idle_seconds", "total_seconds"]
    defaults = env.read({})
    assert [getattr(defaults, name) for name in ladder] == [2, 5, 600, 1800]
    assert [getattr(defaults, name) for name in silence] == [15, 300, 1800]
    assert defaults.drain_seconds == 120
    for name in Timeouts.__dataclass_fields__:
        assert getattr(Timeouts(), name) == getattr(defaults, name)

    for inner, outer in [*pairwise(ladder), *pairwise(silence)]:
        [found] = say(**{inner: getattr(defaults, outer)})
        assert found.id == "sluice.E002"
        assert inner.upper() in found.msg
        assert outer.upper() in found.msg


def test_F20_a_process_ends_before_its_supervisor_kills_it() -> None:
    """140 s is what the documentation asks of supervisors; the ledger's thread is waited for 10 s."""
    defaults = env.read({})
    assert "140 s" in (REPOSITORY / "docs/configuration.md").read_text()
    assert defaults.drain_seconds + SETTLE_SECONDS + 2 * CUT_SECONDS + 10 < 140
    assert defaults.heartbeat_seconds < defaults.reader_seconds < defaults.drain_seconds
    assert defaults.head_seconds < defaults.body_idle_seconds < defaults.body_slow_seconds
