"""Listens on this machine for the browser that comes back from a sign-in (RFC 8252, 7.3)."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

PAGE = b"<!doctype html><title>Sluice</title><p>Thank you. The terminal goes on from here; this window may be closed.</p>"


def leads_here(redirect_uri: str) -> bool:
    parts = urlsplit(redirect_uri)
    if parts.scheme != "http" or parts.hostname is None:
        return False
    try:
        return ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        return parts.hostname == "localhost"


class Loopback:
    """`with Loopback(redirect_uri, came)`: `came` is called, in a thread, with each address that a browser ends at.

    `redirect_uri` is then the whole one, with a free port where none was named. Raises OSError when the port is taken."""

    def __init__(self, redirect_uri: str, came: Callable[[str], None]) -> None:
        parts = urlsplit(redirect_uri)
        path = parts.path or "/"

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = urlsplit(self.path)
                found = asked.path == path and bool(asked.query)
                self.send_response(200 if found else 404)
                self.send_header("content-type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write(PAGE if found else b"")
                if found:
                    came(f"{redirect_uri}?{asked.query}")

            def log_message(self, *_: object) -> None:
                """The query holds the code."""

        host = parts.hostname if parts.hostname not in (None, "localhost", "::1") else "127.0.0.1"
        self._server = ThreadingHTTPServer((host or "127.0.0.1", parts.port or 0), Handler)
        if parts.port is None:
            redirect_uri = f"http://{parts.netloc}:{self._server.server_port}{parts.path}"
        self.redirect_uri = redirect_uri

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="sluice-loopback", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
