"""`manage.py issue_key`: the key alone on standard output, or one line that says what is wrong and nothing made."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from accounts.models import ApiKey, AuditEntry, Limit, Membership, Organization, Role, User
from accounts.policy import Allowance
from accounts.principal import is_plausible
from project.env import REPOSITORY
from tests.accounts.conftest import People


def issue(*arguments: str, email: str = "bob@example.org", name: str = "ci") -> str:
    out = StringIO()
    call_command("issue_key", "--email", email, "--name", name, *arguments, stdout=out, stderr=StringIO())
    return out.getvalue()


def test_it_prints_the_key_alone_and_makes_what_is_missing(db: None):
    printed = issue(email="New@Example.org")

    assert is_plausible(printed.strip())
    assert printed == printed.strip() + "\n"
    key = ApiKey.objects.get()
    assert (key.organization.slug, key.user.email, key.name) == ("default", "new@example.org", "ci")
    assert Membership.objects.get().role == Role.MEMBER
    assert not key.user.has_usable_password()
    assert not Limit.objects.exists()
    assert (key.allowed_models, key.expires_at) == ([], None)


def test_a_second_key_makes_no_second_person(db: None):
    assert issue(email="new@example.org") != issue(email="NEW@example.org")
    assert (User.objects.count(), Membership.objects.count(), Organization.objects.count()) == (1, 1, 1)


def test_everything_that_can_be_said_is_kept(people: People):
    issue(
        *("--organization", "acme", "--models", "demo/*, gpt-4o", "--rpm", "60", "--tpm", "1000", "--concurrency", "3"),
        *("--budget", "8.41", "--window", "month", "--expires", "2090-01-31T12:00:00+02:00"),
    )

    key = ApiKey.objects.get()
    assert (key.organization, key.user) == (people.acme, people.bob)
    assert key.allowed_models == ["demo/*", "gpt-4o"]
    assert key.expires_at == datetime(2090, 1, 31, 10, tzinfo=UTC)
    assert {Allowance.of(limit) for limit in key.limits.all()} == {
        Allowance("rpm", 60),
        Allowance("tpm", 1000),
        Allowance("concurrency", 3),
        Allowance("money", 8_410_000, "month"),
    }


def test_an_organization_that_is_new_is_said_aside(db: None):
    out, err = StringIO(), StringIO()
    call_command("issue_key", "--email", "a@example.org", "--name", "n", "--organization", "acme", stdout=out, stderr=err)

    assert "'acme' is new" in err.getvalue()
    assert is_plausible(out.getvalue().strip())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--budget", "5"], "--window"),
        (["--window", "day"], "--budget"),
        (["--budget", "five", "--window", "day"], "'five'"),
        (["--budget", "-1", "--window", "day"], "0 or more"),
        (["--rpm", "-1"], "between 0"),
        (["--expires", "tomorrow"], "'tomorrow'"),
        (["--expires", "2001-01-01"], "future"),
        (["--models", "gpt-[4]"], "gpt-[4]"),
        (["--organization", "two words"], "'two words'"),
        (["--email", "nobody"], "'nobody'"),
        (["--name", " "], "name"),
        (["--window", "hour", "--budget", "5"], "hour"),
        (["--rpm", "many"], "many"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_made(db: None, arguments: list[str], word: str):
    with pytest.raises(CommandError) as problem:
        issue(*arguments)

    assert word in str(problem.value)
    assert "\n" not in str(problem.value)
    assert not any(model.objects.exists() for model in (ApiKey, User, Organization, Membership, AuditEntry))


def test_a_viewer_gets_no_key(people: People):
    with pytest.raises(CommandError, match="viewer"):
        issue("--organization", "acme", email="vera@example.org")
    assert not ApiKey.objects.exists()


def test_in_a_shell_the_key_is_all_of_the_output(tmp_path: Path):
    environment = {"PATH": os.environ["PATH"], "DATA_DIR": str(tmp_path / "data")}

    def manage(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(REPOSITORY / "manage.py"), *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    too_early = manage("issue_key", "--email", "a@example.org", "--name", "n")
    assert (too_early.returncode, too_early.stdout) == (1, "")
    assert len(too_early.stderr.splitlines()) == 1
    assert "migrate" in too_early.stderr

    assert manage("migrate", "--verbosity", "0").returncode == 0
    good = manage("issue_key", "--email", "a@example.org", "--name", "n")
    assert (good.returncode, good.stderr) == (0, "")
    assert is_plausible(good.stdout.removesuffix("\n"))

    bad = manage("issue_key", "--email", "a@example.org", "--name", "n", "--budget", "lots", "--window", "day")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert len(bad.stderr.splitlines()) == 1
