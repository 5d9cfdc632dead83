"""Signs an upstream account in from a terminal: shows the link, waits for the person, and keeps what the vendor gives."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, TextIO
from urllib.parse import urlsplit

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser

from providers import actions, given, registry, signin
from providers.adapter import Adapter
from providers.management import options as account_options
from providers.management.loopback import Loopback, leads_here
from providers.models import Credential
from providers.oauth import CodePending, DevicePending, OAuthFailed, SignInEnded, TokenSet

SAY_EVERY_SECONDS = 10.0
CODE_SECONDS = 900.0
MOST_TRIES = 5
LONGEST_PASTE = 1 << 16


class Command(BaseCommand):
    help = (
        "Signs an upstream account in: prints the link to open, waits until that is done, adds the account and prints its id. With "
        "--credential an account that is there already is signed in again."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("kind", choices=registry.names())
        account_options.add(parser, label_needed=False)
        parser.add_argument("--credential", type=int, metavar="ID", help="sign this account in again; other options are not taken then")

    def handle(self, *args: Any, kind: str, credential: int | None, **options: Any) -> None:
        adapter = registry.adapter(kind)
        try:
            if credential is not None:
                known = Credential.objects.filter(pk=credential, kind=kind).first()
                if known is None:
                    raise CommandError(f"There is no credential {credential} of kind '{kind}'.")
                actions.sign_in(known, self._sign_in(adapter, known.settings, known.pk))
                self.stdout.write(str(known.pk))
                return
            if not options["label"]:
                raise CommandError("Give the new account a --label, or name the --credential to sign in again.")
            said = account_options.read(options)
            draft = actions.drafted(kind, options["label"], **said)  # what is wrong is said before anybody signs in
            tokens = self._sign_in(adapter, draft.settings)
            self.stdout.write(str(actions.add_credential(kind, options["label"], "", tokens=tokens, **said).pk))
        except ValidationError as problem:
            raise CommandError(" ".join(problem.messages)) from None
        except OAuthFailed as problem:
            raise CommandError(problem.message) from None

    def _sign_in(self, adapter: Adapter, settings: dict[str, str], credential_id: int = 0) -> TokenSet:
        if given.sign_in(adapter, settings).flow == "code":
            return self._by_code(adapter, settings, credential_id)
        pending = signin.begin(adapter, settings, credential_id=credential_id)
        assert isinstance(pending, DevicePending)
        return self._by_device(adapter, settings, pending, credential_id)

    # Device

    def _by_device(self, adapter: Adapter, settings: dict[str, str], pending: DevicePending, credential_id: int) -> TokenSet:
        self._say(f"Open this link and sign in:\n\n  {pending.link}\n")
        if pending.user_code:
            self._say(f"The code is {pending.user_code}\n")
        said_at = time.monotonic()
        self._say(f"Waiting until you have done that (the code is good for {_minutes(pending.expires_at - time.time())}) ...")
        while True:
            time.sleep(pending.interval_seconds)
            found = signin.poll(adapter, settings, pending, credential_id=credential_id)
            if isinstance(found, TokenSet):
                self._say("Signed in.")
                return found
            pending = found
            if time.monotonic() - said_at >= SAY_EVERY_SECONDS:
                said_at = time.monotonic()
                self._say(f"Still waiting; {_minutes(pending.expires_at - time.time())} are left ...")

    # Code

    def _by_code(self, adapter: Adapter, settings: dict[str, str], credential_id: int) -> TokenSet:
        redirect_uri = given.sign_in(adapter, settings).redirect_uri
        came: queue.Queue[str | None] = queue.Queue()
        with ExitStack() as stack:
            listening = False
            if leads_here(redirect_uri):
                try:
                    redirect_uri = stack.enter_context(Loopback(redirect_uri, came.put)).redirect_uri
                    listening = True
                except OSError as problem:
                    self._say(f"Port {urlsplit(redirect_uri).port} cannot be listened on ({problem.strerror}): paste the address instead.")
            pending = signin.begin(adapter, settings, credential_id=credential_id, redirect_uri=redirect_uri)
            assert isinstance(pending, CodePending)
            self._say(f"Open this link and sign in:\n\n  {pending.link}\n")
            if listening:
                self._say("A browser on this machine comes back by itself. From another one, its last page will not load:")
            self._say("paste the whole address of that page here, or the code that it shows.")
            threading.Thread(target=_read_lines, args=[sys.stdin, came], daemon=True).start()
            return self._first_that_works(adapter, settings, pending, came, listening=listening, credential_id=credential_id)

    def _first_that_works(
        self,
        adapter: Adapter,
        settings: dict[str, str],
        pending: CodePending,
        came: queue.Queue[str | None],
        *,
        listening: bool,
        credential_id: int,
    ) -> TokenSet:
        until, tries = time.monotonic() + CODE_SECONDS, 0
        while True:
            try:
                pasted = came.get(timeout=SAY_EVERY_SECONDS)
            except queue.Empty:
                left = until - time.monotonic()
                if left <= 0:
                    raise CommandError("Nobody signed in. Begin again.") from None
                self._say(f"Still waiting; {_minutes(left)} are left ...")
                continue
            if pasted is None:  # nothing more can be pasted
                if not listening:
                    raise CommandError("No code was given.")
                continue
            try:
                tokens = signin.with_code(adapter, settings, pending, pasted, credential_id=credential_id)
            except SignInEnded as problem:
                tries += 1
                if tries >= MOST_TRIES or problem.code in ("code_refused", "access_denied"):
                    raise
                self._say(f"{problem.message} Try again.")
            else:
                self._say("Signed in.")
                return tokens

    def _say(self, text: str) -> None:
        self.stdout.write(text)
        self.stdout.flush()


def _read_lines(source: TextIO, came: queue.Queue[str | None]) -> None:
    for line in _lines_of(source):
        if line.strip():
            came.put(line)
    came.put(None)


def _lines_of(source: TextIO) -> Iterator[str]:
    try:
        descriptor = source.fileno()
    except OSError:
        yield from source
        return
    # Past Python's own buffer: a thread that still waits in it when the command ends would hold its lock.
    rest = b""
    while part := os.read(descriptor, LONGEST_PASTE):
        *lines, rest = (rest + part).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in lines)
        rest = rest[-LONGEST_PASTE:]
    yield rest.decode("utf-8", "replace")


def _minutes(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
