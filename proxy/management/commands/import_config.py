"""Takes over what a forerunner's configuration file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError

from proxy import import_config
from proxy.take_over import carry_out


class Command(BaseCommand):
    help = (
        "Imports OpenAICompatible's config.json, or an env file with the variables of the small proxies: credentials, keys that go on "
        "working as they are, and for an env file an alias * that takes every unknown model. Says line by line what became of it. "
        "May be run again: what is there stays as it is. Calls nobody."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", metavar="FILE", type=Path)
        parser.add_argument("--accept-policy", action="store_true", help="I know what the vendors' terms say of the kinds in it")
        parser.add_argument("--organization", metavar="SLUG", help="for this organization alone; default: accounts are shared by all")
        parser.add_argument("--email", metavar="E", help="whose the imported keys are; default: the operator's")

    def handle(self, *args: Any, file: Path, accept_policy: bool, organization: str | None, email: str | None, **options: Any) -> None:
        text, written_at = _read(file)
        refused = 0
        try:
            plan = import_config.read(text, written_at=written_at)
            for remark in carry_out(plan, organization=organization, email=email, accept_policy=accept_policy):
                refused += remark.said == "refused"
                self.stdout.write(self.style.WARNING(str(remark)) if remark.said == "WARNING" else str(remark))
        except ValidationError as problem:
            raise CommandError(" ".join(problem.messages)) from None
        except (ImproperlyConfigured, ValueError) as problem:
            raise CommandError(str(problem)) from None
        except DatabaseError as problem:
            raise CommandError(f"The database refused: {str(problem).splitlines()[0]}. Has `manage.py migrate` run?") from None
        if refused:
            raise CommandError(f"{refused} were refused: see above. The rest is done; run it again once that is mended.")


def _read(file: Path) -> tuple[str, float]:
    try:
        if file.stat().st_size > import_config.MOST_BYTES:
            raise CommandError(f"{file} is larger than any such file.")
        return file.read_text(encoding="utf-8"), file.stat().st_mtime
    except OSError as problem:
        raise CommandError(f"{file}: {problem.strerror or 'cannot be read'}") from None
    except UnicodeDecodeError:
        raise CommandError(f"{file} is no text in UTF-8.") from None
