"""A TCP proxy that stands before an upstream and lets the answer through in its own way: late, slowly, in part, or spoilt.

It knows nothing of HTTP. It runs in a thread with a loop of its own, as the simulated upstreams do.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
from dataclasses import dataclass
from typing import Literal, Self

End = Literal["close", "reset", "half_close", "black_hole"]


@dataclass(frozen=True)
class Fault:
    """What happens to the answer on each new connection. Times are in seconds."""

    refuse: End | None = None  # at once, before anything has been read
    delay: float = 0  # before the first byte
    drip: float = 0  # between single bytes
    drip_after: int = 0  # bytes that pass at full speed before that
    cut_after: int | None = None  # bytes of the answer, then `end`
    end: End = "close"
    corrupt_at: int | None = None  # this byte of the answer is turned into another
    instead: bytes | None = None  # said in place of the answer, which nobody was asked for
    kept: Literal["", "unread", "executed"] = ""  # a second request on the same connection meets RST, before or after it was passed on


class FaultProxy:
    """Start with `with`; then `play` a fault."""

    def __init__(self, upstream_port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._fault = Fault()
        self.connections = 0
        self.open = 0
        self.port = 0
        self._upstream_port = upstream_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="FaultProxy", daemon=True)
        self._listening = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def play(self, fault: Fault) -> None:
        """From now on, for new connections; those that are there are ended."""

        async def end() -> None:
            self._fault, self.connections = fault, 0
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.sleep(0.02)  # so that the other side has seen it

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(10), "the proxy does not listen"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def base_url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/v1"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0, ssl=self._tls))
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        self._loop.run_forever()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        try:
            await _Line(self._fault, reader, writer).carry(self._upstream_port)
        except (ConnectionError, ssl.SSLError, asyncio.CancelledError):
            pass  # one of the two has left, or the test is over
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()


class _Line:
    """One connection through the proxy."""

    def __init__(self, fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._fault, self._reader, self._writer = fault, reader, writer
        self._passed = 0  # bytes of the answer
        self._muted = False
        self._reading = False
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def carry(self, port: int) -> None:
        fault = self._fault
        if fault.refuse:
            return await self._end(fault.refuse)
        if fault.instead is not None:
            await self._reader.read(65536)
            await self._say(fault.instead)
            return None
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        there = asyncio.create_task(self._requests(writer))
        back = asyncio.create_task(self._answers(reader))
        try:
            await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (there, back):
                task.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
            writer.close()

    async def _requests(self, upstream: asyncio.StreamWriter) -> None:
        self._reading = True
        while data := await self._reader.read(65536):
            if self._fault.kept and self._passed:
                self._muted = True
                if self._fault.kept == "executed":
                    upstream.write(data)
                    await asyncio.sleep(0.1)
                return await self._end("reset")
            upstream.write(data)
            await upstream.drain()

    async def _answers(self, upstream: asyncio.StreamReader) -> None:
        fault = self._fault
        while data := await upstream.read(65536):
            if self._muted:
                continue
            if not self._passed:
                await asyncio.sleep(fault.delay)
            if fault.corrupt_at is not None and self._passed <= fault.corrupt_at < self._passed + len(data):
                at = fault.corrupt_at - self._passed
                data = data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :]
            if fault.cut_after is not None and self._passed + len(data) >= fault.cut_after:
                await self._say(data[: fault.cut_after - self._passed])
                return await self._end(fault.end)
            await self._say(data)

    async def _say(self, data: bytes) -> None:
        fault = self._fault
        swift = len(data) if not fault.drip else max(0, min(len(data), fault.drip_after - self._passed))
        self._passed += len(data)
        self._writer.write(data[:swift])
        await self._writer.drain()
        for byte in data[swift:]:
            if self._writer.transport.is_closing():
                raise ConnectionResetError
            self._writer.write(bytes([byte]))
            await asyncio.sleep(fault.drip)

    async def _end(self, how: End) -> None:
        match how:
            case "close":
                await asyncio.sleep(0.02)  # let what was said arrive
            case "reset":
                await asyncio.sleep(0.02)
                linger = struct.pack("ii", 1, 0)
                self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self._writer.transport.abort()
            case "half_close":
                self._writer.write_eof()
                await self._gone()
            case "black_hole":
                await self._gone()

    async def _gone(self) -> None:
        """Until the client has closed. Where requests are still read, that is noticed there, and ends this."""
        while self._reading or await self._reader.read(65536):
            await asyncio.sleep(0.01)
