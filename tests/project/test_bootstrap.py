"""`manage.py bootstrap`: the first run makes everything and shows it once, later runs make and show nothing."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from accounts.models import ApiKey, AuditEntry, Membership, Organization, Role, User
from accounts.principal import is_plausible
from project.env import REPOSITORY
from project.keyring import Keyring
from providers.models import Credential, KeyringCanary, Price
from proxy import snapshot

KEY = re.compile(r"sk-sluice-\w+")
PASSWORD = re.compile(r"^  password  (\w{20})$", re.MULTILINE)


def bootstrap(*arguments: str) -> str:
    out = StringIO()
    call_command("bootstrap", *arguments, stdout=out)
    return out.getvalue()


def everything() -> list[Any]:
    models = (User, Organization, Membership, ApiKey, Credential, Price, KeyringCanary, AuditEntry)
    return [list(model.objects.order_by("pk").values()) for model in models]


def signs_in(email: str, password: str) -> bool:
    client = Client()
    client.post("/accounts/login/", {"login": email, "password": password})
    return "_auth_user_id" in client.session


def test_the_first_run_makes_an_operator_who_can_sign_in(db: None):
    printed = bootstrap()

    operator = User.objects.get()
    assert operator.email == "admin@example.com"
    assert operator.is_superuser
    assert operator.is_staff
    assert Membership.objects.get(user=operator).role == Role.OWNER
    assert Membership.objects.get(user=operator).organization.slug == "default"
    [password] = PASSWORD.findall(printed)
    assert signs_in(operator.email, password)
    assert "/accounts/login/" in printed


def test_the_first_run_gives_a_key_and_a_line_that_uses_it(db: None, settings: Any):
    settings.PUBLIC_URL = "https://sluice.example.org"
    printed = bootstrap()

    [key] = set(KEY.findall(printed))
    assert is_plausible(key)
    assert ApiKey.objects.get().last_four == key[-4:]
    [line] = [line for line in printed.splitlines() if line.startswith("  curl")]
    words = shlex.split(line)
    assert words[:3] == ["curl", "-N", "https://sluice.example.org/v1/chat/completions"]
    assert f"Authorization: Bearer {key}" in words
    assert '"model":"demo/echo","stream":true' in words[-1]


def test_demo_models_work_and_cost_nothing(db: None):
    bootstrap()
    catalog = snapshot.load()

    assert [upstream.prefix for upstream in catalog.upstreams] == ["demo"]
    price = catalog.prices.find("demo/echo", 1_800_000_000.0)
    assert price is not None
    assert (price.input, price.output) == (0, 0)


def test_the_second_run_changes_nothing_and_shows_no_secret(db: None):
    first = bootstrap()
    before = everything()
    second = bootstrap()

    assert everything() == before
    assert not KEY.search(second)
    assert PASSWORD.findall(first)[0] not in second
    assert not PASSWORD.search(second)
    for hint in ("python manage.py issue_key --email admin@example.com", "bootstrap --reset-password", "/accounts/login/"):
        assert hint in second


@pytest.mark.parametrize(("prefix", "python"), [(REPOSITORY / ".venv", ".venv/bin/python"), (Path("/opt/venv"), "python")])
def test_what_it_says_can_be_run_as_it_stands(db: None, monkeypatch: pytest.MonkeyPatch, prefix: Path, python: str):
    """In the container there is no `.venv`."""
    monkeypatch.setattr(sys, "prefix", str(prefix))
    bootstrap()

    commands = re.findall(r"(\S*python) manage\.py (\w+)", bootstrap())
    assert commands == [(python, "bootstrap"), (python, "issue_key")]


def test_each_run_says_where_the_keyring_is_that_nobody_gave(db: None, settings: Any, tmp_path: Path):
    settings.KEYRING = Keyring(None, tmp_path / "keyring")
    for _ in range(2):
        printed = bootstrap()
        assert f"The keyring is in {tmp_path / 'keyring'}: keep a copy elsewhere." in printed
        assert "Losing it loses every upstream secret" in printed
        assert (tmp_path / "keyring").read_text().strip() not in printed

    settings.KEYRING = Keyring((tmp_path / "keyring").read_text(), None)
    assert "The keyring" not in bootstrap()


def test_what_it_shows_is_nowhere_in_the_database(db: None):
    printed = bootstrap()
    stored = repr(everything())

    assert PASSWORD.findall(printed)[0] not in stored
    assert KEY.findall(printed)[0].removeprefix("sk-sluice-")[10:] not in stored


def test_a_new_password_ends_the_old_one(db: None):
    [old] = PASSWORD.findall(bootstrap())
    printed = bootstrap("--reset-password")

    [new] = PASSWORD.findall(printed)
    assert not KEY.search(printed)
    assert signs_in("admin@example.com", new)
    assert not signs_in("admin@example.com", old)
    assert AuditEntry.objects.filter(action="user.password_changed").count() == 2


def test_the_operator_may_have_another_e_mail(db: None):
    printed = bootstrap("--email", "Ops@Example.org")

    assert User.objects.get().email == "ops@example.org"
    assert "ops@example.org" in printed
    assert "ops@example.org" in bootstrap()
    assert User.objects.count() == 1


def test_somebody_who_holds_a_key_already_may_become_the_operator(db: None):
    call_command("issue_key", "--email", "me@example.org", "--name", "n", stdout=StringIO())
    printed = bootstrap("--email", "me@example.org")

    assert PASSWORD.search(printed)
    assert not KEY.search(printed)
    assert User.objects.get().is_superuser
    assert Membership.objects.get().role == Role.OWNER


def test_what_the_operator_removed_does_not_come_back(db: None):
    bootstrap()
    Credential.objects.all().delete()
    ApiKey.objects.all().delete()
    bootstrap()

    assert not Credential.objects.exists()
    assert not ApiKey.objects.exists()


def test_a_wrong_e_mail_makes_nothing(db: None):
    with pytest.raises(CommandError, match="not an e-mail"):
        bootstrap("--email", "nobody")
    assert everything() == [[], [], [], [], [], [], [], []]


def test_another_keyring_is_refused_before_anything_is_made(db: None, settings: Any, keyring: Callable[[str], object]):
    bootstrap()
    settings.KEYRING = keyring("another secret of at least thirty-two characters")
    before = everything()

    with pytest.raises(CommandError, match="KEYRING"):
        bootstrap("--reset-password")
    assert everything() == before


@pytest.fixture
def keyring() -> Callable[[str], object]:
    from project.keyring import Keyring

    return lambda text: Keyring(text.replace(" ", "-"), None)
