"""Asks upstreams for their lists of models, now."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from providers.actions import refresh_all
from providers.models import Credential, State


class Command(BaseCommand):
    help = "Asks every active upstream account for its models. Succeeds when all were asked, whatever one of them said."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--credential", type=int, metavar="ID", help="ask this one alone, active or not")

    def handle(self, *args: Any, credential: int | None, **options: Any) -> None:
        chosen = Credential.objects.filter(pk=credential) if credential is not None else Credential.objects.filter(state=State.ACTIVE)
        rows = list(chosen.order_by("pk"))
        if credential is not None and not rows:
            raise CommandError(f"There is no credential {credential}.")
        for done, (row, problem) in enumerate(refresh_all(rows), start=1):
            self.stdout.write(f"[{done}/{len(rows)}] {row.pk} {row}: {problem or f'{row.models.count()} models'}")
            self.stdout.flush()
