"""An origin that does exactly what a test says, byte by byte, on each connection. It lives in the test's own loop."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class Peer:
    """One connection as the origin sees it."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number  # from 1, in the order of arrival
        self.reader, self.writer = reader, writer

    async def request(self) -> bytes:
        """The bytes of one request with a Content-Length or no body. Raises IncompleteReadError when the client is gone."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
        return head + await self.reader.readexactly(length)

    async def say(self, *parts: bytes, pause: float = 0.002) -> None:
        """Each part arrives by itself. Raises ConnectionError when the client is gone."""
        for part in parts:
            if self.writer.transport.is_closing():
                raise ConnectionResetError
            self.writer.write(part)
            await self.writer.drain()
            await asyncio.sleep(pause)

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """End with RST instead of FIN."""
        if (ours := self.writer.get_extra_info("socket")) is not None:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def gone(self) -> None:
        """Wait until the client has closed."""
        with suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


Script = Callable[[Peer], Awaitable[None]]


class Origin:
    """What has come to it so far. `port` is where it listens."""

    def __init__(self, script: Script) -> None:
        self.port = 0
        self.requests: list[bytes] = []  # for scripts that note them
        self.connections = 0
        self.open = 0
        self._script = script
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        try:
            await self._script(Peer(self.connections, reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
            pass  # the client left, or the test is over
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def origin(script: Script, *, tls: ssl.SSLContext | None = None, backlog: int = 100) -> AsyncIterator[Origin]:
    """`script` is run for each connection; the connection is closed when it returns."""
    one = Origin(script)
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0, ssl=tls, backlog=backlog, limit=1 << 20)
    one.port = server.sockets[0].getsockname()[1]
    try:
        yield one
    finally:
        server.close()
        await one.stop()


def answers(*parts: bytes) -> Script:
    """Answer every request of a connection with these bytes."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(*parts)

    return script


def answers_once(*parts: bytes) -> Script:
    """Answer one request, then close."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(*parts)

    return script
