"""A client that speaks HTTP byte by byte, and a server of one's own behind our guard: what libraries would not send or show."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import uvicorn

from project.guard import Guard, Limits
from project.server import Server
from project.websocket import MOST_MESSAGE_BYTES, GuardedWebSocket
from tests.serving import Sluice, eventually, free_port


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    informational: list[int] = field(default_factory=list)
    is_whole: bool = True  # False: the connection ended before the answer did

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


class Peer:
    """One connection. Reading raises TimeoutError after `timeout` seconds, and ConnectionError when it ends too early."""

    def __init__(self, port: int, *, timeout: float = 10, receive_buffer: int | None = None, send_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if send_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.socket.settimeout(timeout)
        self.socket.connect(("127.0.0.1", port))
        self.unread = b""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> Peer:
        self.socket.sendall(data)
        return self

    def _more(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError(f"closed after {self.unread[-200:]!r}")
        self.unread += data

    def _until(self, end: bytes) -> bytes:
        while end not in self.unread:
            self._more()
        found, _, self.unread = self.unread.partition(end)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self.unread) < size:
            self._more()
        found, self.unread = self.unread[:size], self.unread[size:]
        return found

    def answer(self, *, may_be_cut: bool = False) -> Answer:
        informational, is_whole = [], True
        while True:
            first, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
            status = int(first.split()[1])
            if status >= 200:
                break
            informational.append(status)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "content-length" in headers:
            body = self._exactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            body = b""
            try:
                while size := int(self._until(b"\r\n"), 16):
                    body += self._exactly(size + 2)[:-2]
                self._exactly(2)
            except ConnectionError:
                if not may_be_cut:
                    raise
                is_whole = False
        else:
            body = self.rest()
        return Answer(status, headers, body, informational, is_whole)

    def rest(self) -> bytes:
        """All until the other side closes. A reset counts as closed."""
        with contextlib.suppress(ConnectionError):
            while True:
                self._more()
        found, self.unread = self.unread, b""
        return found

    def is_closed(self) -> bool:
        """Has the other side closed, with nothing more to read?"""
        self.socket.setblocking(False)
        try:
            return self.socket.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        finally:
            self.socket.setblocking(True)
            self.socket.settimeout(10)


def request(
    path: str = "/v1/chat/completions", *, key: str = "", body: object = None, method: str = "POST", more: str = "", version: str = "1.1"
) -> bytes:
    """A plain request; `more` are header lines, each ended by CRLF."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/{version}\r\nHost: 127.0.0.1\r\n"
    if key:
        head += f"Authorization: Bearer {key}\r\n"
    if data:
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return f"{head}{more}\r\n".encode() + data


def chat(key: str, model: str, content: str = "hello", **more: object) -> bytes:
    return request(key=key, body={"model": model, "messages": [{"role": "user", "content": content}], **more})


def is_alive(sluice: Sluice) -> bool:
    with Peer(sluice.port) as peer:
        return peer.send(request("/readyz", method="GET")).answer().status == 200


def memory_of(pid: int) -> int:
    """Bytes of a process that are in memory."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def cpu_of(pid: int) -> float:
    """Seconds of a processor that a process has used."""
    with open(f"/proc/{pid}/stat") as stat:
        user, system = stat.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Small:
    """A server with our guard around an application of the test's own, in a thread."""

    def __init__(
        self,
        app: Any,
        limits: Limits,
        *,
        stall_seconds: float = 5,
        drain_delay: float = 0,
        drain_seconds: float = 0.2,
        limits_bodies: bool = True,
        websockets: bool = False,
    ) -> None:
        self.port = free_port()
        self.unready: set[str] = set()
        config = uvicorn.Config(
            app,
            host="127.0.0.1",
            port=self.port,
            ws="none",
            ws_max_size=MOST_MESSAGE_BYTES,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            http=self._protocol,
        )
        self.refused: Counter[tuple[int, str]] = Counter()  # by the guard, by status and code
        self.guard = Guard(
            limits,
            limits_bodies=lambda scope: limits_bodies,
            websocket=GuardedWebSocket if websockets else None,
            count_refused=lambda *what: self.refused.update([what]),
        )
        env = SimpleNamespace(drain_delay=drain_delay, drain_seconds=drain_seconds, stall_seconds=stall_seconds)
        self.server = Server(config, self.guard, env, self.unready)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self.server.run)

    def _protocol(self, **options: Any) -> asyncio.Protocol:
        return self.guard.protocol(**options)

    def start(self) -> Small:
        self._thread.start()
        eventually(lambda: self.server.started, "the small server did not start")
        return self

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def small(app: Any, limits: Limits | None = None, **options: Any) -> Iterator[Small]:
    server = Small(app, limits or Limits(), **options).start()
    try:
        yield server
    finally:
        server.stop()


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers with what it was asked: method, path and body, after reading all of it. `/silent` never answers."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message.get("body", b""), message.get("more_body", False)
    if scope["path"] == "/silent":
        await asyncio.sleep(60)
    if scope["path"] == "/slow":
        await asyncio.sleep(0.1)
    seen = {
        "method": scope["method"],
        "path": scope["path"],
        "headers": {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]},
        "body": body.decode("latin-1"),
    }
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(seen).encode()})


def took(since: float) -> float:
    return time.monotonic() - since
