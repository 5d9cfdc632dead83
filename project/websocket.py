"""A websocket after its handshake was taken by the guard: uvicorn's protocol, with our limits and our end.

`GuardedProtocol` reads the head of the request, refuses what it should not serve, and hands the rest of the connection
over to a `GuardedWebSocket`. The application sees the head as the guard has read it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import Frame
from websockets.http11 import Request

from project.exchange import ServerFailed, error_answer
from project.guard import LINGER_SECONDS, Guard, in_kernel
from providers.wire import ApiError
from proxy.call import Message, Scope
from proxy.errors import Unavailable

log = logging.getLogger(__name__)

# What a page has to say to us is short.
MOST_MESSAGE_BYTES = 64 << 10
MOST_FRAGMENTS = 64

NOT_LIKE_THIS, FAILED, GOING_AWAY = 1008, 1011, 1012  # RFC 6455: against our rules, a failure here, a restart

# All that the handshake needs. The rest of the head could be longer than its reader takes.
OF_THE_HANDSHAKE = frozenset(
    {
        b"host",
        b"connection",
        b"upgrade",
        b"sec-websocket-key",
        b"sec-websocket-version",
        b"sec-websocket-protocol",
    }
)


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """One connection from its handshake on. In `guard.websockets` as long as it lives."""

    def __init__(self, guard: Guard, scope: Scope, config: Config, server_state: ServerState, app_state: dict[str, Any]) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state)
        self.guard = guard
        self.head = scope
        self.since = guard.now
        self.unsent_bytes = 0  # when we looked last, since the client has made us wait
        self.progress_at = 0.0
        # It writes a line for every connection at the level of those that begin and end servers.
        self.logger = self.conn.logger = logging.getLogger("uvicorn.websocket")

    def take_over(self, transport: asyncio.Transport, rest: bytes) -> None:
        """Go on where the guard has stopped reading. `rest` is what had come behind the head."""
        self.connection_made(transport)
        self.guard.websockets.add(self)
        transport.set_protocol(self)
        lines = [b"GET / HTTP/1.1"]
        lines += [name + b": " + value for name, value in self.head["headers"] if name in OF_THE_HANDSHAKE]
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    # In

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.response.status_code == 101:
            self.scope.update({name: self.head[name] for name in ("path", "raw_path", "query_string", "headers")})  # type: ignore[typeddict-item]

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) < MOST_FRAGMENTS:
            return super().handle_cont(event)
        self.conn.fail(NOT_LIKE_THIS, "Too many fragments")
        self.handle_parser_exception()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.writable.is_set():
            # Or the answers to its pings would pile up.
            self.transport.pause_reading()

    # Out

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unsent_bytes = 0

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()

    # The application

    async def run_asgi(self) -> None:
        try:
            await self.app(self.scope, self.receive, self.send)
            if not self.handshake_complete:
                log.error("The application ended without an answer to the websocket at %s", self.head["path"])
                self.refuse(ServerFailed("The server failed."))
        except ClientDisconnected:
            pass
        except asyncio.CancelledError:
            self.refuse(_stopping())
        except Exception:
            log.exception("The application failed at the websocket %s", self.head["path"])
            self.refuse(ServerFailed("The server failed."))
            self._say_goodbye(FAILED, "The server failed")
        finally:
            if self.close_timer is None:
                self.transport.close()

    async def send(self, message: Message) -> None:  # type: ignore[override]  # ASGI's messages are plain dicts to us
        await super().send(message)  # type: ignore[arg-type]

    def refuse(self, problem: ApiError) -> None:
        """Answer the handshake with an error, if it has not been answered."""
        if self.handshake_complete or self.initial_response is not None or self.transport.is_closing():
            return
        self.handshake_complete = self.close_sent = self.disconnected = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})
        self.transport.write(error_answer(problem))
        self.transport.close()

    # The connection

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.websockets.discard(self)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Say that this process ends, and give the client a moment to have heard it."""
        self.refuse(_stopping())
        self._say_goodbye(GOING_AWAY, "The server is being stopped")

    def _say_goodbye(self, code: int, reason: str) -> None:
        if self.close_sent or self.transport.is_closing():
            return
        self.stop_keepalive()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code})
        self.conn.send_close(code, reason)
        self.close_sent = True
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.resume_reading()  # its own goodbye
        self.close_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def look(self, now: float) -> None:
        """Is a deadline past?"""
        if not self.handshake_complete and now - self.since >= self.guard.limits.head_seconds:
            log.warning("A websocket at %s was not answered for %g s", self.head["path"], self.guard.limits.head_seconds)
            self.refuse(Unavailable("The server took too long. Try again.", retry_after_seconds=1))
        elif self._reader_stalls(now):
            log.info("Cut a websocket whose client took nothing for %s s", self.guard.limits.reader_seconds)
            self.transport.abort()

    def _reader_stalls(self, now: float) -> bool:
        if self.writable.is_set() and not self.transport.is_closing():
            return False
        unsent = self.transport.get_write_buffer_size() + in_kernel(self.transport)
        if not self.unsent_bytes or unsent < self.unsent_bytes:
            self.unsent_bytes, self.progress_at = unsent, now
        return now - self.progress_at >= self.guard.limits.reader_seconds


def _stopping() -> ApiError:
    return Unavailable("The server is being stopped. Try again.", code="shutdown", retry_after_seconds=1)
