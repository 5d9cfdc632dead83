"""Adds an upstream account from a terminal or a script."""

from __future__ import annotations

import argparse
import getpass
import sys
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser, DjangoHelpFormatter

from providers import given, registry
from providers.actions import add_credential
from providers.management import options as account_options

LONGEST_SECRET = 1 << 20


class Help(DjangoHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the list of kinds."""


class Command(BaseCommand):
    help = (
        "Adds an upstream account and prints its id. Calls nobody. The secret, or the credential file of the vendor's own tool, comes on "
        "standard input, never as an argument."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = Help
        parser.epilog = kinds_in_words()
        parser.add_argument("kind", choices=registry.names())
        account_options.add(parser)
        parser.add_argument("--secret-stdin", action="store_true", help="read the secret from standard input")

    def handle(self, *args: Any, kind: str, **options: Any) -> None:
        try:
            secret = _secret(kind) if options["secret_stdin"] else ""
            credential = add_credential(kind, options["label"], secret, **account_options.read(options))
        except ValidationError as problem:
            words = " ".join(problem.messages)
            if "secret" in problem.message_dict and not options["secret_stdin"]:
                words += " Give it on standard input, with --secret-stdin."
            if "accept_policy" in problem.message_dict:
                words += " (--accept-policy)"
            raise CommandError(words) from None
        self.stdout.write(str(credential.pk))


def kinds_in_words() -> str:
    """The end of the help: every kind, its settings, and what its vendor's terms say."""
    lines = ["kinds:"]
    for name in registry.names():
        adapter = registry.adapter(name)
        known = f"; settings: {', '.join(sorted(adapter.settings))}" if adapter.settings else ""
        lines.append(f"  {name:<14} {adapter.title or name}{known}")
        if terms := given.policy_in_words(adapter, {}):
            needs = " Needs --accept-policy." if adapter.policy_for({}) != "allowed" else ""
            lines.append(f"  {'':<14} {terms}{needs}")
    return "\n".join([*lines, "", f"settings of every kind: {', '.join(sorted(given.EVERY_KIND))}"])


def _secret(kind: str) -> str:
    if sys.stdin.isatty():
        return getpass.getpass(f"Secret of the {kind} account: ")
    return sys.stdin.read(LONGEST_SECRET)
