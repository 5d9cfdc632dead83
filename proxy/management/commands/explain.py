"""Says why a call would be served or refused, rule by rule."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db.models import Q

from accounts.models import ApiKey
from proxy.explain import HEADS, Question, Rule, explain_key

WORDS = {True: "passes", False: "BLOCKS", None: "?"}


class Command(BaseCommand):
    help = (
        "Says which rule would let a call of this key pass or block it, and which credential would serve. Makes no call. What lives in "
        "the memory of a running server (rests, requests of the last minute, open requests) it does not see: GET /api/explain there does."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--key", required=True, metavar="ID", help="the key's number, or the id inside the key")
        parser.add_argument("--model", required=True, metavar="M", help="as the client names it")
        parser.add_argument("--endpoint", default="chat/completions", choices=list(HEADS))
        parser.add_argument("--address", metavar="IP", help="the client's; left out, it is not looked at")
        parser.add_argument("--upstream-key", action="store_true", help="the client sends an upstream key of its own")

    def handle(self, *args: Any, key: str, model: str, **options: Any) -> None:
        said = explain_key(_key(key), Question(model, options["endpoint"], options["address"], options["upstream_key"]))
        width = max(len(rule.name) for rule in said.rules)
        for rule in said.rules:
            self.stdout.write(_line(rule, width))
        if said.serves is not None:
            serves = said.serves
            self.stdout.write(
                f"=> {said.status}: credential {serves.credential_id} '{serves.label}' ({serves.kind}) is asked for {serves.public_model}"
            )
        else:
            self.stdout.write(f"=> {said.status} {said.code}")
        if not said.live:
            self.stdout.write("From the database alone: rests, requests of the last minute and open requests only a running server knows.")


def _line(rule: Rule, width: int) -> str:
    return f"{rule.name:<{width}}  {WORDS[rule.passes]:<6}  {rule.why}"


def _key(text: str) -> ApiKey:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0
    found = ApiKey.objects.select_related("organization", "user").filter(Q(pk=number) | Q(handle=text)).order_by("pk").first()
    if found is None:
        raise CommandError(f"There is no key '{text[:20]}': give its number, or the ten characters behind sk-sluice-.")
    return found
