"""First set-up: an organization, an operator, a credential that needs no network, and a key to try it with.

Run again, it changes nothing and shows no secret: it says how to get another key or a new password.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, transaction
from django.urls import reverse

from accounts import actions
from accounts.models import ApiKey, AuditEntry, Membership, Organization, Role, User
from providers.actions import add_credential, check_canary
from providers.models import Credential

SET_UP = "deployment.set_up"
# Without the signs that are easily taken for one another; 20 of them are 115 bits.
PASSWORD_SIGNS = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
PASSWORD_LENGTH = 20


class Command(BaseCommand):
    help = "First set-up; may be run again. Prints the operator's password and a first key, once."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--email", help=f"The operator's e-mail. Default: the operator there is, or {actions.DEFAULT_EMAIL}.")
        parser.add_argument("--reset-password", action="store_true", help="Give the operator a new password, and print it.")

    def handle(self, *args: Any, email: str | None, reset_password: bool, **options: Any) -> None:
        try:
            # In one transaction: nothing is half made when printing what was made never happens.
            with transaction.atomic():
                check_canary()
                operator, password = self._operator(email, reset=reset_password)
                key = None if _is_set_up() else _set_up(operator)
        except ValidationError as problem:
            raise CommandError(" ".join(problem.messages)) from None
        except ImproperlyConfigured as problem:
            raise CommandError(str(problem)) from None
        except DatabaseError as problem:
            raise CommandError(f"The database refused: {str(problem).splitlines()[0]}. Has `manage.py migrate` run?") from None
        self._say(operator, password, key)

    def _operator(self, email: str | None, *, reset: bool) -> tuple[User, str | None]:
        """The operator, and a password when a new one was set."""
        if email is None:
            known = User.objects.filter(is_superuser=True, is_active=True).order_by("pk").first()
            operator = known or actions.ensure_user(actions.DEFAULT_EMAIL)
        else:
            operator = actions.ensure_user(email)
        if not (operator.is_superuser and operator.is_staff and operator.is_active):
            operator.is_superuser = operator.is_staff = operator.is_active = True
            operator.save(update_fields=["is_superuser", "is_staff", "is_active"])
            actions.record(None, None, "operator.made", str(operator))
        if operator.has_usable_password() and not reset:
            return operator, None
        password = "".join(secrets.choice(PASSWORD_SIGNS) for _ in range(PASSWORD_LENGTH))
        operator.set_password(password)
        operator.save(update_fields=["password"])
        actions.record(None, None, "user.password_changed", str(operator))
        return operator, password

    def _say(self, operator: User, password: str | None, key: str | None) -> None:
        lines = ["", f"Sluice is set up. Sign in at {settings.PUBLIC_URL}{reverse('account_login')}", f"  e-mail    {operator.email}"]
        if password:
            lines += [f"  password  {password}", "            (shown only now)"]
        else:
            lines += [f"  password  as you know it; a new one: {how_to_run()} bootstrap --reset-password"]
        if key:
            lines += [
                "",
                "Your first key (shown only now):",
                "",
                f"  {key}",
                "",
                "Try it, once the server runs:",
                "",
                f"  {curl_line(key)}",
            ]
        else:
            lines += ["", f"Another key: {how_to_run()} issue_key --email {operator.email} --name 'my laptop'"]
        if kept := settings.KEYRING.own_file:
            lines += [
                "",
                f"The keyring is in {kept}: keep a copy elsewhere.",
                "Losing it loses every upstream secret and every issued key.",
            ]
        self.stdout.write("\n".join([*lines, ""]))


def how_to_run() -> str:
    """A command, as this one was started: a checkout has a `.venv`, a container does not."""
    here = Path(sys.prefix).resolve() == (settings.BASE_DIR / ".venv").resolve()
    return f"{'.venv/bin/' if here else ''}python manage.py"


def curl_line(key: str) -> str:
    body = {"model": "demo/echo", "stream": True, "messages": [{"role": "user", "content": "Hello from my first key"}]}
    return (
        f"curl -N {settings.PUBLIC_URL}/v1/chat/completions -H 'Authorization: Bearer {key}' "
        f"-H 'Content-Type: application/json' -d '{json.dumps(body, separators=(',', ':'))}'"
    )


def _is_set_up() -> bool:
    return AuditEntry.objects.filter(action=SET_UP).exists()


def _set_up(operator: User) -> str | None:
    """What is made once. A key, unless the operator has one."""
    organization = actions.ensure_organization()
    _own(operator, organization)
    if not Credential.objects.filter(kind="demo").exists():
        add_credential("demo", "demo", "")
    actions.record(None, organization, SET_UP, str(organization))
    if ApiKey.objects.filter(organization=organization, user=operator).exists():
        return None
    return actions.issue_key(organization=organization, user=operator, name="first key")[1]


def _own(operator: User, organization: Organization) -> None:
    place: Membership = actions.ensure_membership(operator, organization, role=Role.OWNER)
    actions.change_role(place, Role.OWNER)
