"""Every variable that an operator may set: its default, a good value, and what is said of a bad one."""

from __future__ import annotations

import os
from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from project import env
from project.env import Env, read

NOTHING_IS_BAD = None

# name -> default, a good value, what it is read as, a bad value
VARIABLES: dict[str, tuple[Any, str, Any, str | None]] = {
    "DATA_DIR": (env.REPOSITORY / "var", "/srv/sluice", Path("/srv/sluice"), NOTHING_IS_BAD),
    "DATABASE_URL": (f"sqlite:///{env.REPOSITORY}/var/sluice.sqlite3", "postgres://db/sluice", "postgres://db/sluice", NOTHING_IS_BAD),
    "REDIS_URL": (None, "redis://cache:6379/0", "redis://cache:6379/0", NOTHING_IS_BAD),
    "SECRET_KEY": (None, "s" * 50, "s" * 50, NOTHING_IS_BAD),
    "KEYRING": (None, "k" * 50, "k" * 50, NOTHING_IS_BAD),
    "HOST": ("127.0.0.1", "0.0.0.0", "0.0.0.0", NOTHING_IS_BAD),
    "PORT": (8000, "9000", 9000, "70000"),
    "ALLOWED_HOSTS": (["localhost", "127.0.0.1", "[::1]"], "a.example, b.example", ["a.example", "b.example"], NOTHING_IS_BAD),
    "CORS_ALLOW_ORIGINS": (["*"], "https://a.example", ["https://a.example"], NOTHING_IS_BAD),
    "TRUSTED_PROXIES": ([], "10.0.0.0/8, ::1", [ip_network("10.0.0.0/8"), ip_network("::1/128")], "10.0.0.0/64"),
    "EMAIL_URL": ("consolemail://", "smtp://mail:25", "smtp://mail:25", NOTHING_IS_BAD),
    "MAIL_FROM": (None, "gate@example.org", "gate@example.org", NOTHING_IS_BAD),
    "METRICS_TOKEN": (None, "let-me-in", "let-me-in", NOTHING_IS_BAD),
    "PUBLIC_URL": ("http://127.0.0.1:8000", "https://sluice.example/", "https://sluice.example", "sluice.example"),
    "EGRESS_ALLOW": ([], "192.168.0.0/16", [ip_network("192.168.0.0/16")], "everywhere"),
    "DEBUG": (False, "yes", True, "perhaps"),
    "LOG_LEVEL": ("INFO", "DEBUG", "DEBUG", "loud"),
    "LOG_FORMAT": ("text", "json", "json", "xml"),
    "JOURNAL_FSYNC": (False, "1", True, "2"),
    "JOURNAL_MAX_BYTES": (1 << 30, "70000", 70000, "10"),
    "JOURNAL_SEGMENT_BYTES": (8 << 20, "5000", 5000, "many"),
    "USAGE_RETENTION_DAYS": (None, "400", 400, "0"),
    "BODY_LIMIT_BYTES": (32 << 20, "2048", 2048, "1"),
    "POOL_WAIT_SECONDS": (2, "1.5", 1.5, "-1"),
    "CONNECT_SECONDS": (5, "4", 4.0, "0"),
    "FIRST_BYTE_SECONDS": (600, "60", 60.0, "soon"),
    "IDLE_SECONDS": (300, "30", 30.0, "nan"),
    "TOTAL_SECONDS": (1800, "900", 900.0, "inf"),
    "HEARTBEAT_SECONDS": (15, "0.2", 0.2, "0"),
    "DRAIN_SECONDS": (120, "10", 10.0, """ 5 s """),
    "DRAIN_DELAY": (0, "0", 0.0, "-1"),
    "HEAD_SECONDS": (10, "5", 5.0, "0"),
    "BODY_IDLE_SECONDS": (15, "5", 5.0, "0"),
    "BODY_SLOW_SECONDS": (60, "30", 30.0, "0"),
    "KEEP_ALIVE_SECONDS": (75, "5", 5.0, "0"),
    "READER_SECONDS": (60, "30", 30.0, "0"),
    "STALL_SECONDS": (1, "2", 2.0, "0"),
    "OPEN_REQUESTS": (2500, "5000", 5000, "0"),
    "UPSTREAM_REQUESTS": (1250, "100", 100, "0"),
    "EJECTION_SECONDS": (30, "5", 5.0, "0"),
    "CUT_REVOKED_CALLS": (False, "1", True, "streams"),
}


def test_the_table_has_every_variable() -> None:
    assert set(VARIABLES) == {field.name.upper() for field in fields(Env)}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_has_its_default_and_takes_a_good_value(name: str) -> None:
    default, good, meaning, _ = VARIABLES[name]
    assert getattr(read({}), name.lower()) == default
    assert getattr(read({name: good}), name.lower()) == meaning
    # As shells and compose files write "not set".
    assert getattr(read({name: "  "}), name.lower()) == default


@pytest.mark.parametrize("name", [name for name, row in VARIABLES.items() if row[3] is not NOTHING_IS_BAD])
def test_a_bad_value_is_refused_by_name(name: str) -> None:
    bad = VARIABLES[name][3]
    assert bad is not None
    with pytest.raises(ImproperlyConfigured, match=rf"^{name}: ") as refused:
        read({name: bad})
    assert bad.strip() in str(refused.value)


def test_the_public_address_follows_the_port() -> None:
    assert read({"PORT": "9000"}).public_url == "http://127.0.0.1:9000"


def test_a_relative_data_dir_is_where_the_command_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = read({"DATA_DIR": "kept"})
    assert found.data_dir == tmp_path / "kept"
    assert found.database_url == f"sqlite:///{tmp_path}/kept/sluice.sqlite3"


@pytest.mark.parametrize("name", ["SECRET_KEY", "KEYRING"])
def test_a_secret_may_lie_in_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("x" * 40 + "\n")
    assert getattr(read({f"{name}_FILE": str(file)}), name.lower()) == "x" * 40

    with pytest.raises(ImproperlyConfigured, match=f"{name} and {name}_FILE are both set"):
        read({f"{name}_FILE": str(file), name: "y" * 40})

    file.write_text("\n")
    with pytest.raises(ImproperlyConfigured, match=f"{name}_FILE: the file is empty"):
        read({f"{name}_FILE": str(file)})

    with pytest.raises(ImproperlyConfigured, match=f"{name}_FILE cannot be read: No such file"):
        read({f"{name}_FILE": str(tmp_path / "absent")})


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, []),
        ({"SECRET_KEY": "s" * 50, "METRICS_TOKEN": "let-me-in"}, ["s" * 50, "let-me-in"]),
        ({"DATABASE_URL": "postgres://sluice:a%2Fb-secret@db/sluice"}, ["a%2Fb-secret", "a/b-secret"]),
        ({"DATABASE_URL": "postgres://db/sluice?user=x&password=hush-hush&sslpassword=psst-psst"}, ["hush-hush", "psst-psst"]),
        ({"REDIS_URL": "rediss://:to-redis@cache:6379/0"}, ["to-redis"]),
        ({"EMAIL_URL": "smtp+tls://gate:to-mail@mail:587"}, ["to-mail"]),
        ({"DATABASE_URL": "postgres://sluice:sluice@db/other", "REDIS_URL": "redis://cache:6379"}, []),
        ({"DATABASE_URL": "postgres://u:postgres@db/other"}, []),
        ({"EMAIL_URL": "smtp://[mail"}, []),
    ],
)
def test_the_secrets_among_them_are_known_with_the_passwords_in_addresses(given: dict[str, str], found: list[str]) -> None:
    assert sorted(read(given).secrets()) == sorted(found)


@pytest.mark.parametrize(
    ("given", "alone"),
    [({}, True), ({"DATABASE_URL": "postgres://db/sluice"}, False), ({"REDIS_URL": "redis://cache"}, False)],
)
def test_secrets_are_made_on_the_spot_in_one_process_mode_alone(given: dict[str, str], alone: bool) -> None:
    assert read(given).one_process is alone


def test_a_new_data_dir_is_for_its_owner_alone(tmp_path: Path) -> None:
    env.own(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_a_data_dir_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ImproperlyConfigured, match=f"belongs to user {owner}, and this command runs as {owner + 1}"):
        env.own(tmp_path)


def test_a_data_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ImproperlyConfigured, match=r"DATA_DIR: .* cannot be used: File exists"):
        env.own(file)
