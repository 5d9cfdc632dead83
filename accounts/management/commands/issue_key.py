"""Issues a key from the command line. The key, alone, is all that goes to standard output."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, transaction

from accounts import actions, policy
from accounts.models import Organization, Window
from accounts.money import parse_usd
from accounts.policy import Allowance


class Command(BaseCommand):
    help = "Issues a key and prints it, once. The user and the membership are made when absent; a limit not given means none."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--email", required=True, help="Whose key it is.")
        parser.add_argument("--name", required=True, help="What it is for, such as 'ci'.")
        parser.add_argument("--organization", metavar="SLUG", default=actions.DEFAULT_ORGANIZATION, help="Default: %(default)s.")
        parser.add_argument("--models", metavar="'a,b/*'", default="", help="Models that it may use; * stands for anything. Default: all.")
        parser.add_argument("--rpm", type=int, metavar="N", help="Requests per minute.")
        parser.add_argument("--tpm", type=int, metavar="N", help="Tokens per minute.")
        parser.add_argument("--concurrency", type=int, metavar="N", help="Open requests.")
        parser.add_argument("--budget", metavar="USD", help="US dollars per window, such as 12.50. Needs --window.")
        parser.add_argument("--window", choices=[window for window in Window.values if window], help="What the budget is for.")
        parser.add_argument("--expires", metavar="ISO8601", help="Such as 2030-01-31T12:00:00Z; UTC when no zone is given.")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            self.stdout.write(self._issue(**options))
        except ValidationError as problem:
            raise CommandError(in_one_line(problem)) from None
        except ImproperlyConfigured as problem:
            raise CommandError(str(problem)) from None
        except DatabaseError as problem:
            raise CommandError(f"The database refused: {str(problem).splitlines()[0]}. Has `manage.py migrate` run?") from None

    def _issue(self, *, email: str, name: str, organization: str, models: str, expires: str | None, **options: Any) -> str:
        limits = allowances(options)
        expires_at = policy.parse_moment(expires) if expires else None
        # All or nothing: wrong input leaves no half-made user or organization behind.
        with transaction.atomic():
            is_new = not Organization.objects.filter(slug=organization).exists()
            place = actions.ensure_organization(organization)
            user = actions.ensure_user(email)
            actions.ensure_membership(user, place)
            _, clear = actions.issue_key(
                organization=place, user=user, name=name, models=models.split(","), expires_at=expires_at, limits=limits
            )
        if is_new and organization != actions.DEFAULT_ORGANIZATION:
            self.stderr.write(f"The organization '{organization}' is new.")
        return clear


def allowances(options: dict[str, Any]) -> list[Allowance]:
    """The limits that the options name. Raises ValidationError."""
    found = [Allowance(metric, options[metric]) for metric in ("rpm", "tpm", "concurrency") if options[metric] is not None]
    if options["budget"] is not None:
        if not options["window"]:
            raise ValidationError("--budget needs --window: day, week, month or total.")
        found.append(Allowance("money", parse_usd(options["budget"]), options["window"]))
    elif options["window"]:
        raise ValidationError("--window needs --budget.")
    return found


def in_one_line(problem: ValidationError) -> str:
    return " ".join(message.replace("\n", " ") for message in problem.messages)
