"""Adds an upstream account from a terminal or a script."""

from __future__ import annotations

import getpass
import sys
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db.models import Model

from providers import registry
from providers.actions import add_credential
from providers.models import Credential

LONGEST_SECRET = 1 << 20


class Command(BaseCommand):
    help = "Adds an upstream account and prints its id. Calls nobody. The secret comes on standard input, never as an argument."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("kind", choices=registry.names())
        parser.add_argument("--label", required=True, help="its name in lists, such as 'Team account'")
        parser.add_argument("--prefix", help="public model ids are PREFIX/model; default: the kind")
        parser.add_argument("--base-url", default="", help="default: the vendor's own")
        parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; may be repeated")
        parser.add_argument("--weight", type=int, default=1, help="its share of the requests in its pool")
        parser.add_argument("--priority", type=int, default=0, help="higher goes first")
        parser.add_argument("--organization", metavar="SLUG", help="for this organization alone; default: shared by all")
        parser.add_argument("--accept-policy", action="store_true", help="I know what the vendor's terms say of this kind")
        parser.add_argument("--secret-stdin", action="store_true", help="read the secret from standard input")

    def handle(self, *args: Any, kind: str, **options: Any) -> None:
        try:
            credential = add_credential(
                kind,
                options["label"],
                _secret(kind) if options["secret_stdin"] else "",
                prefix=options["prefix"],
                base_url=options["base_url"],
                settings=_settings(options["set"]),
                weight=options["weight"],
                priority=options["priority"],
                organization=_organization(options["organization"]),
                accept_policy=options["accept_policy"],
            )
        except ValidationError as problem:
            words = " ".join(problem.messages)
            if "secret" in problem.message_dict and not options["secret_stdin"]:
                words += " Give it on standard input, with --secret-stdin."
            raise CommandError(words) from None
        self.stdout.write(str(credential.pk))


def _secret(kind: str) -> str:
    if sys.stdin.isatty():
        return getpass.getpass(f"Secret of the {kind} account: ")
    return sys.stdin.read(LONGEST_SECRET)


def _settings(pairs: list[str]) -> dict[str, object]:
    settings: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise CommandError(f"--set {pair}: write it as name=value.")
        settings[name.strip()] = value
    return settings


def _organization(slug: str | None) -> Model | None:
    if slug is None:
        return None
    model = Credential._meta.get_field("organization").related_model
    assert isinstance(model, type)
    found = model._default_manager.filter(slug=slug).first()
    if found is None:
        raise CommandError(f"There is no organization '{slug}'.")
    return found
