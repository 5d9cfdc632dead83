"""Looks at everything a deployment rests on, and says what is wrong and what to do about it."""

from __future__ import annotations

import json as jsons
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser

from project.doctor import CHECKS, NOTE, OK, PROBLEM, WARNING, Asked, Finding
from providers.secrets import redact

SIGNS = {OK: "ok", NOTE: "note", WARNING: "warning", PROBLEM: "PROBLEM"}


class Command(BaseCommand):
    help = "Looks at everything a deployment rests on. Exit status 1 when there is a problem."
    requires_system_checks: list[str] = []  # what they say is among the findings

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--url", default=settings.PUBLIC_URL, help="where to reach the server. Default: PUBLIC_URL")
        parser.add_argument("--skip", action="append", default=[], choices=list(CHECKS), metavar="CHECK", help=f"of: {', '.join(CHECKS)}")
        parser.add_argument("--json", action="store_true", help="for programs")

    def handle(self, *args: Any, url: str, skip: list[str], json: bool, **options: Any) -> None:
        asked = Asked(url.rstrip("/"))
        found: list[tuple[str, Finding]] = []
        for name, check in CHECKS.items():
            if name in skip:
                continue
            for finding in check(asked):
                found.append((name, finding))
                if not json:
                    self._say(name, finding)
        problems, warnings = (sum(one.level == level for _, one in found) for level in (PROBLEM, WARNING))
        if json:
            self._as_json(found)
        else:
            self.stdout.write(f"\n{_number(problems, 'problem')}, {_number(warnings, 'warning')}.")
        if problems:
            raise SystemExit(1)

    def _say(self, name: str, finding: Finding) -> None:
        style = {PROBLEM: self.style.ERROR, WARNING: self.style.WARNING}.get(finding.level, str)
        self.stdout.write(style(f"{SIGNS[finding.level]:8} {name}: {redact(finding.says)}"))
        if finding.hint:
            self.stdout.write(f"{'':8}   {redact(finding.hint)}")
        self.stdout.flush()

    def _as_json(self, found: list[tuple[str, Finding]]) -> None:
        rows = [{"check": name, "level": one.level, "says": redact(one.says), "hint": redact(one.hint)} for name, one in found]
        self.stdout.write(jsons.dumps(rows, ensure_ascii=False, indent=1))


def _number(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"
