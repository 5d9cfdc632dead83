"""A whole Sluice for tests: a real `manage.py serve` over a folder and a port of its own, and its commands.

Commands run in one helper process that stays (`python -m tests.serving`), because starting Django costs a second.
It runs them through `call_command`, with the server's environment and against the same database. For the same reason a
server on SQLite is forked from its helper when it starts for the first time, and the helper and all other servers from
a process that has imported the libraries (tests/forks.py). Where that makes a difference, say `forked=False`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from tests import migrated
from tests.forks import Forked, Parent, become, libraries

REPOSITORY = Path(__file__).resolve().parent.parent
START_SECONDS = 60
T = TypeVar("T")


class CommandFailed(AssertionError):
    """A management command refused or broke. The message is what it said."""


class NotStarted(AssertionError):
    """The server did not become ready. The message ends with its log."""


class Sluice:
    """A server that runs, and the commands of its folder. `env` is all of its environment."""

    def __init__(self, data_dir: Path, **settings: str) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ},
            "DJANGO_SETTINGS_MODULE": "project.settings",
            "PYTHONUNBUFFERED": "1",
            "DATA_DIR": str(data_dir),
            "EGRESS_ALLOW": "127.0.0.0/8",
            "PUBLIC_URL": self.url,
            **settings,
        }
        self.command = ["manage.py", "serve"]  # what Python runs to serve
        self.log_path = data_dir.parent / f"{data_dir.name}.log"
        self.workers = 1
        self._server: subprocess.Popen[bytes] | Forked | None = None
        self._commands = Commands(self.env)
        self._probe_key = ""
        self._prefixes: dict[str, str] = {}  # of credentials -> the test file that took it
        self._accounts: Counter[str] = Counter()  # by prefix, those that nobody has waited for

    def migrate(self) -> None:
        """Make its folder and its tables, unless they are there."""
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if "DATABASE_URL" not in self.env and not any(self.data_dir.iterdir()):
            migrated.copy_sqlite(self.data_dir)
        elif not migrated.is_migrated(self.env.get("DATABASE_URL"), self.data_dir):
            self.manage("migrate", "--no-input", "-v", "0")

    # The server

    def start(self, *, forked: bool = True) -> Sluice:
        """Serve on a migrated database; returns when `/readyz` is 200. Raises NotStarted. Not `forked` where memory is measured: it
        would share some with its helper."""
        self.migrate()
        if not forked or "DATABASE_URL" in self.env or "REDIS_URL" in self.env:
            return self.start_again(forked=forked)  # threads of the helper keep connections there, and no thread survives a fork
        self._server = self._commands.fork(self._words(), self.log_path)
        return self._started(self._server)

    def start_again(self, *options: str, forked: bool = True) -> Sluice:
        """Serve on the same folder and port as before. Options are those of `serve`. Not `forked` where the test is about how a
        process begins and ends: then it is Python anew, as it is with several workers."""
        assert self._server is None, "it runs already"
        words = [*self._words(), *options]
        with self.log_path.open("ab") as log, open(os.devnull, "rb") as nothing:
            if forked and self.workers == 1:
                ended = self.log_path.with_suffix(f".ended-{uuid.uuid4().hex[:8]}")
                self._server = libraries.fork(words, self.env, ended, (nothing.fileno(), log.fileno(), log.fileno()))
            else:
                files = {"stdin": nothing, "stdout": log, "stderr": log}
                self._server = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY, env=self.env, **files)
        return self._started(self._server)

    def _words(self) -> list[str]:
        workers = ["--workers", str(self.workers)] if self.workers > 1 else []
        return [*self.command, "--host", "127.0.0.1", "--port", str(self.port), *workers]

    def _started(self, server: subprocess.Popen[bytes] | Forked) -> Sluice:
        deadline = time.monotonic() + START_SECONDS
        while not self.is_ready():
            if server.poll() is not None or time.monotonic() > deadline:
                self.kill9()
                raise NotStarted(f"The server did not become ready. Its log:\n{self.log()}")
            time.sleep(0.05)
        return self

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    @property
    def pid(self) -> int:
        assert self._server is not None, "it does not run"
        return self._server.pid

    def stop(self, timeout_seconds: float = 30) -> int:
        """SIGTERM, and wait. The exit status."""
        return self._end(signal.SIGTERM, timeout_seconds)

    def kill9(self) -> None:
        if self._server is not None:
            self._end(signal.SIGKILL, 10)

    def _end(self, sign: int, timeout_seconds: float) -> int:
        server, self._server = self._server, None
        if server is None:
            return 0
        server.send_signal(sign)
        try:
            return server.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)
            raise AssertionError(f"The server did not end within {timeout_seconds} s of SIGTERM. Its log:\n{self.log()}") from None

    def close(self) -> None:
        """Stop everything. The folder stays; whoever made it removes it."""
        self.kill9()
        self._commands.close()

    def log(self, start: int = 0) -> str:
        """What the server has written since `start` bytes."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(start)
            return log.read().decode("utf-8", "replace")

    def log_size(self) -> int:
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    # Its commands

    def manage(self, *args: str, stdin: str | None = None) -> str:
        """Run a management command in the server's environment; what it printed. Raises CommandFailed."""
        if "--prefix" in args:
            self._take(str(args[args.index("--prefix") + 1]))
        return self._commands.run([str(arg) for arg in args], stdin)

    def _take(self, prefix: str) -> None:
        """A prefix belongs to one file of tests: a second one on the same server would find the first one's accounts in its pool."""
        file = os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[0]
        owner = self._prefixes.setdefault(prefix, file)
        assert owner == file, f"{owner} has accounts of the prefix {prefix}; another file needs another name"

    def python(self, code: str) -> str:
        """Run a piece of Python with Django set up, on the server's database; what it printed."""
        return self.manage("shell", "--no-imports", "-c", code)

    def issue_key(self, **options: object) -> str:
        """A new key, of a user and name of its own unless given. Options as the command's: `rpm=5`, `models="a,b/*"`."""
        options = {"email": "tester@example.org", "name": f"test-{uuid.uuid4().hex[:8]}", **options}
        return self.manage("issue_key", *_as_arguments(options)).strip()

    def add_openai(self, upstream: Any, *, label: str = "", prefix: str = "", secret: str = "sk-sim-ok", **settings: object) -> int:
        """A credential for a simulator (anything with `.base_url`). Settings of the command go by their own names
        (`weight`, `priority`, `organization`), all others as `--set name=value`. The server sees it within 2 s:
        see `wait_for`."""
        return self.add_credential("openai", upstream.base_url, label=label, prefix=prefix, secret=secret, **settings)

    def add_credential(self, kind: str, base_url: str, *, secret: str, label: str = "", prefix: str = "", **settings: object) -> int:
        """A credential of any kind; the rest as for `add_openai`."""
        options: dict[str, object] = {"label": label or f"sim-{uuid.uuid4().hex[:8]}", "base_url": base_url, "accept_policy": True}
        if prefix:
            options["prefix"] = prefix
        for name in ("weight", "priority", "organization"):
            if name in settings:
                options[name] = settings.pop(name)
        arguments = _as_arguments(options)
        for name, value in settings.items():
            arguments += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
        self._accounts[prefix] += 1
        return int(self.manage("add_credential", kind, *arguments, "--secret-stdin", stdin=secret).split()[-1])

    def set_price(self, pattern: str, *, input: float, output: float, **options: object) -> None:  # noqa: A002
        """US dollars per million tokens."""
        self.manage("set_price", pattern, *_as_arguments({"input": input, "output": output, **options}))

    def usage(self, since: datetime | None = None) -> list[dict[str, Any]]:
        """The usage rows, oldest first."""
        arguments = ["--since", since.isoformat()] if since is not None else []
        return [json.loads(line) for line in self.manage("usage", "--format", "jsonl", *arguments).split("\n") if line.strip()]

    def row(self, request_id: str) -> dict[str, Any]:
        """The one usage row of this request, as soon as it is there: a row follows its answer by a moment."""
        return eventually(lambda: _only(self.rows(request_id)), f"no usage row for {request_id}")

    def rows(self, request_id: str) -> list[dict[str, Any]]:
        began = datetime.fromtimestamp(((uuid.UUID(request_id).int >> 80) - 1000) / 1000, UTC)
        return [row for row in self.usage(since=began) if row["request_id"] == request_id]

    def wait_for(self, *prefixes: str) -> None:
        """Until the server knows all credentials of each prefix. A call over the probe's budget makes no usage row."""
        if not self._probe_key:
            self._probe_key = self.issue_key(name="probe", email="probe@example.org", rpm=0)
        for prefix in prefixes:
            if self._accounts.pop(prefix, 0) > 1:
                # The first of them is seen as soon as it is there: what is added last tells that all are.
                last = f"last-{uuid.uuid4().hex[:8]}"
                self.manage("add_credential", "demo", "--label", last, "--prefix", last, "--secret-stdin", stdin="")
                eventually(lambda last=last: self._knows(last), f"the server does not know all of {prefix}", seconds=30)
            eventually(lambda prefix=prefix: self._knows(prefix), f"the server does not know the prefix {prefix}", seconds=30)

    def _knows(self, prefix: str) -> bool:
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            data=json.dumps({"model": f"{prefix}/probe", "messages": []}).encode(),
            headers={"authorization": f"Bearer {self._probe_key}", "content-type": "application/json"},
        )
        try:
            urllib.request.urlopen(request, timeout=5).close()
        except urllib.error.HTTPError as refused:
            refused.close()
            if refused.code in (404, 429):
                return refused.code == 429
            raise AssertionError(f"the probe was answered {refused.code}") from None
        raise AssertionError("the probe was let through")


class Commands:
    """The helper process that runs management commands, one at a time."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = dict(env)
        self._process: Forked | None = None
        self._lock = threading.Lock()

    def run(self, args: list[str], stdin: str | None) -> str:
        answer = self._asked({"args": args, "stdin": stdin or ""})
        if answer["failed"]:
            raise CommandFailed(f"manage.py {args[0]}: {answer['failed']}\n{answer['out']}")
        return str(answer["out"])

    def fork(self, words: list[str], log: Path) -> Forked:
        """A server that begins where the helper is now: with Django set up. `words` are what Python would be given to run it."""
        ended = log.with_suffix(f".ended-{uuid.uuid4().hex[:8]}")
        return Forked(self._asked({"fork": words, "log": str(log), "ended": str(ended)})["pid"], ended)

    def _asked(self, order: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            process = self._started()
            self._orders.write(json.dumps(order) + "\n")
            self._orders.flush()
            line = self._answers.readline()
        if not line:
            raise CommandFailed(f"The helper process ended with {process.wait(10)}.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _started(self) -> Forked:
        if self._process is None or self._process.poll() is not None:
            (orders, ours), (our, answers) = os.pipe(), os.pipe()
            ended = Path(f"{self._env['DATA_DIR']}.helper-{uuid.uuid4().hex[:8]}")
            self._process = libraries.fork(["-m", "tests.serving"], self._env, ended, (orders, answers, 2))
            for theirs in (orders, answers):
                os.close(theirs)
            self._orders, self._answers = os.fdopen(ours, "w"), os.fdopen(our)
        return self._process

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._orders.close()
            self._process.wait(60)
            self._answers.close()


@contextlib.contextmanager
def running(folder: Path | None = None, *, workers: int = 1, hurried: bool = False, **settings: str) -> Iterator[Sluice]:
    """A Sluice that is started, and stopped on the way out. `hurried`: see tests/hurried.py. Settings are environment variables."""
    made = folder or Path(tempfile.mkdtemp(prefix="sluice-serve-"))
    if folder is None:
        atexit.register(shutil.rmtree, made, ignore_errors=True)
    sluice = Sluice(made / "data", **settings)
    sluice.workers = workers
    if hurried:
        sluice.command = ["-m", "tests.hurried", "serve"]
    try:
        yield sluice.start()
    finally:
        sluice.close()
        if folder is None:
            shutil.rmtree(made, ignore_errors=True)


def eventually(look: Callable[[], T | None], otherwise: str, *, seconds: float = 5.0) -> T:
    """The first true thing that `look` sees. Fails with `otherwise` when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _only(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    assert len(rows) < 2, f"more than one usage row: {rows}"
    return rows[0] if rows else None


def _as_arguments(options: Mapping[str, object]) -> list[str]:
    arguments: list[str] = []
    for name, value in options.items():
        if value is not None and value is not False:
            arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return arguments


def _serve_commands() -> None:
    """The helper process: a line of JSON in, the command, a line of JSON out."""
    import gc
    import io
    import traceback

    import django
    from django.core.management import CommandError, call_command
    from django.db import connections

    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    orders = sys.stdin
    parent = Parent()
    django.setup()
    _ship_what_is_new()
    gc.freeze()  # for the servers that are forked
    for line in orders:
        order = json.loads(line)
        if "fork" in order:
            pid = parent.fork(Path(order["ended"]))
            if not pid:
                nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                return become(order["fork"], (nothing, log, log))
            answers.write(json.dumps({"pid": pid}) + "\n")
            answers.flush()
            continue
        out, failed = io.StringIO(), ""
        sys.stdin = io.TextIOWrapper(io.BytesIO(order["stdin"].encode()))
        try:
            with contextlib.redirect_stdout(out):
                call_command(*order["args"], stdout=out)
        except CommandError as problem:
            failed = str(problem) or "refused"
        except SystemExit as problem:
            failed = f"exit status {problem.code}" if problem.code else ""
        except Exception:
            failed = traceback.format_exc()  # for the test that asked; this process goes on
        finally:
            connections.close_all()  # an idle reader would keep SQLite's log from being emptied
        answers.write(json.dumps({"out": out.getvalue(), "failed": failed}) + "\n")
        answers.flush()
    os._exit(0)  # to take down what it has imported costs as much as half a start


def _ship_what_is_new() -> None:
    """`usage` stores all of a journal again; here it goes on where it was, since tests ask for hundreds of rows."""
    from proxy import journal, ledger

    shipped: dict[Path, int] = {}

    def ship(folder: Path) -> int:
        stored = 0
        for segment in journal.segments(folder):
            with contextlib.suppress(FileNotFoundError):  # the server has shipped and deleted it meanwhile
                settled, end = journal.settlements(segment, shipped.get(segment, 0))
                stored += ledger.store(ledger.rows_of(settled))
                shipped[segment] = end
        return stored

    ledger.ship = ship


if __name__ == "__main__":
    _serve_commands()
