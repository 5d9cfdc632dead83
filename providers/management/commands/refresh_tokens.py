"""Renews the sign-ins of upstream accounts, now."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from providers import tokens
from providers.models import OAuthToken, State
from providers.oauth import OAuthFailed
from providers.secrets import SealBroken


class Command(BaseCommand):
    help = (
        "Renews the sign-in of every active upstream account whose time has come, ahead of its end. Succeeds when all were asked, whatever "
        "one of them said."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--credential", type=int, metavar="ID", help="renew this one alone: due or not, active or not")

    def handle(self, *args: Any, credential: int | None, **options: Any) -> None:
        rows = list(tokens.in_use())
        if credential is None:
            rows = [row for row in rows if row.credential.state == State.ACTIVE]
        elif not (rows := [row for row in rows if row.pk == credential]):
            raise CommandError(f"There is no credential {credential} that is signed in.")
        due = {pk for pk, _ in tokens.due()}
        for done, row in enumerate(rows, start=1):
            now = credential is not None or row.pk in due
            said = _renewed(row, by_hand=credential is not None) if now else f"not due before {_moment(row.next_refresh_at)}"
            self.stdout.write(f"[{done}/{len(rows)}] {row.pk} {row.credential}: {said}")
            self.stdout.flush()


def _renewed(row: OAuthToken, *, by_hand: bool) -> str:
    try:
        tokens.renew(row.pk, row.generation, by_hand=by_hand)
    except (OAuthFailed, SealBroken) as problem:
        return str(problem)
    after = OAuthToken.objects.filter(pk=row.pk).first()
    return f"renewed, good until {_moment(after.expires_at)}" if after and after.expires_at else "renewed"


def _moment(moment: datetime | None) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if moment else "it is refused"
