"""Runs Sluice: the gateway, the pages and what works beside them."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connection
from django.db.migrations.executor import MigrationExecutor


class Command(BaseCommand):
    help = "Serves the gateway and the pages. It listens when it is ready."
    requires_system_checks = "__all__"

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default=settings.ENV.host)
        parser.add_argument("--port", type=int, default=settings.ENV.port)
        parser.add_argument("--workers", type=int, default=1)
        parser.add_argument("--only", choices=["gateway", "web"], default="", help="serve /v1 alone, or all but /v1")
        parser.add_argument("--server", choices=["uvicorn", "daphne"], default="uvicorn")

    def handle(self, *args: Any, host: str, port: int, workers: int, only: str, server: str, **options: Any) -> None:
        from project.server import run_daphne, run_uvicorn

        if workers != 1:
            raise CommandError("--workers: limits live in the memory of one process; sharing them through Redis is not built yet.")
        executor = MigrationExecutor(connection)
        if executor.migration_plan(executor.loader.graph.leaf_nodes()):
            raise CommandError("The database is not up to date: run `manage.py migrate` first.")
        connection.close()
        settings.SERVE_ONLY = only
        self.stdout.write(f"Sluice starts on http://{host}:{port}")
        self.stdout.flush()
        run = run_daphne if server == "daphne" else run_uvicorn
        status = run(host, port, settings.ENV)
        if status:
            raise SystemExit(status)
