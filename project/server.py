"""How the application is served: uvicorn by default, Daphne where websockets and pages are all that is wanted."""

from __future__ import annotations

import signal
from types import FrameType

import uvicorn


class Server(uvicorn.Server):
    """Drains on the first signal and then ends by itself, with exit status 0: a drain is no failure."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True  # asked twice by hand: at once, then
        self.should_exit = True


def run_uvicorn(host: str, port: int, *, drain_seconds: float) -> int:
    """Serve until a signal. The exit status: 0 after a drain, 1 when the start failed."""
    config = uvicorn.Config(
        "project.asgi:application",
        host=host,
        port=port,
        loop="auto",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=round(drain_seconds),
    )
    server = Server(config)
    server.run()
    return 0 if server.started else 1


def run_daphne(host: str, port: int) -> int:
    from daphne.cli import CommandLineInterface

    CommandLineInterface().run(["-b", host, "-p", str(port), "project.asgi:application"])
    return 0
