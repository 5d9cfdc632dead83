"""Runs Sluice: the gateway, the pages and what works beside them."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connection
from django.db.migrations.executor import MigrationExecutor

from project import checks


class Command(BaseCommand):
    help = "Serves the gateway and the pages. It listens when it is ready."
    requires_system_checks = "__all__"

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default=settings.ENV.host)
        parser.add_argument("--port", type=int, default=settings.ENV.port)
        parser.add_argument("--workers", type=int, default=1, help="processes on the one socket; more than one need PostgreSQL and Redis")
        parser.add_argument("--only", choices=["gateway", "web"], default="", help="serve /v1 alone, or all but /v1")
        parser.add_argument("--server", choices=["uvicorn", "daphne"], default="uvicorn")
        for name in ("--fd", "--ready-fd", "--life-fd"):  # for the supervisor's workers
            parser.add_argument(name, type=int, help=SUPPRESS)

    def handle(self, *args: Any, host: str, port: int, workers: int, only: str, server: str, **options: Any) -> None:
        from project.server import Above, run_daphne, run_uvicorn, run_workers

        self._check(workers, server)
        executor = MigrationExecutor(connection)
        if executor.migration_plan(executor.loader.graph.leaf_nodes()):
            raise CommandError("The database is not up to date: run `manage.py migrate` first.")
        connection.close()
        settings.SERVE_ONLY = only
        if options["fd"] is not None:
            status = run_uvicorn(host, port, settings.ENV, Above(options["fd"], options["ready_fd"], options["life_fd"]))
        else:
            self.stdout.write(f"Sluice starts on http://{host}:{port}" + (f" with {workers} workers" if workers > 1 else ""))
            self.stdout.flush()
            status = self._run(host, port, workers, only, run_workers, run_daphne if server == "daphne" else run_uvicorn)
        if status:
            raise SystemExit(status)

    def _check(self, workers: int, server: str) -> None:
        if workers < 1:
            raise CommandError("--workers: at least one.")
        if workers == 1:
            return
        if settings.ENV.redis_url is None:
            raise CommandError("--workers: several processes share their limits through Redis: set REDIS_URL.")
        if connection.vendor == "sqlite":
            raise CommandError("--workers: SQLite is for one serving process. Set DATABASE_URL to a PostgreSQL database.")
        if server == "daphne":
            raise CommandError("--workers: Daphne serves in one process; start several on ports of their own, or use uvicorn.")
        if lacking := checks.lacks_connections(workers, checks.connections()[0]):
            self.stderr.write(self.style.WARNING(f"--workers: {lacking}"))

    def _run(self, host: str, port: int, workers: int, only: str, several: Callable[..., int], one: Callable[..., int]) -> int:
        if workers == 1:
            return one(host, port, settings.ENV)
        try:
            return several(host, port, settings.ENV, workers, only)
        except OSError as problem:
            raise CommandError(f"{host}:{port} cannot be listened on: {problem.strerror}.") from None
