"""Daphne with a drain, and with an application that waits for a client that does not read.

It is right for pages: what it cannot promise for `/v1` is in docs/decisions/0009-daphne-drains-and-waits.md.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any
from urllib.parse import unquote

from autobahn.websocket.types import ConnectionDeny
from daphne.endpoints import build_endpoint_description_strings
from daphne.http_protocol import WebRequest
from daphne.server import Server, twisted_loop
from daphne.ws_protocol import WebSocketProtocol
from django.conf import settings
from twisted.internet import defer
from twisted.internet.interfaces import IPushProducer
from zope.interface.declarations import implementer

from project.asgi import application, is_gateways, runtime, started
from project.env import Env
from project.server import DRAINING, SETTLE_SECONDS
from project.websocket import GOING_AWAY, MOST_MESSAGE_BYTES
from proxy.call import Message

log = logging.getLogger(__name__)


@implementer(IPushProducer)
class Flow:
    """Twisted's word on whether a client takes what is written for it. `whose` is told by it, until it is ended."""

    def __init__(self, whose: Any) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._whose = whose
        whose.registerProducer(self, True)

    def end(self) -> None:
        self._whose.unregisterProducer()

    async def wait(self, seconds: float) -> None:
        """Until more may be written. Raises TimeoutError when the client takes nothing for so long."""
        async with asyncio.timeout(seconds):
            await self._open.wait()

    def pauseProducing(self) -> None:  # noqa: N802 the names of the interface
        self._open.clear()

    def resumeProducing(self) -> None:  # noqa: N802
        self._open.set()

    def stopProducing(self) -> None:  # noqa: N802
        self._open.set()


class WebsocketFlow(Flow):
    """Nothing is read either from who takes nothing, or the answers to its pings would pile up."""

    def pauseProducing(self) -> None:  # noqa: N802
        super().pauseProducing()
        self._whose.pauseProducing()

    def resumeProducing(self) -> None:  # noqa: N802
        super().resumeProducing()
        self._whose.resumeProducing()


class Request(WebRequest):
    """Where the gateway answers, an offer to upgrade is ignored: Daphne would take it for a websocket, whatever the method."""

    def process(self) -> Any:
        if is_gateways({"path": unquote(self.path.decode("latin-1")), "method": self.method.decode("latin-1")}):
            self.requestHeaders.removeHeader(b"upgrade")
        return super().process()


class DrainingServer(Server):
    def __init__(self, host: str, port: int, env: Env) -> None:
        super().__init__(
            application,
            endpoints=build_endpoint_description_strings(host=host, port=port),
            signal_handlers=False,
            ready_callable=self._begin,
            server_name="",
            websocket_max_message_size=MOST_MESSAGE_BYTES,
            websocket_max_frame_size=MOST_MESSAGE_BYTES,
        )
        self.status = 0  # of the process, when it ends
        self._env = env
        self._flows: dict[Any, Flow] = {}
        self._drain: asyncio.Task[None] | None = None

    def _begin(self) -> None:
        build = self.http_factory.buildProtocol

        def with_our_requests(address: Any) -> Any:
            protocol = build(address)
            protocol.requestFactory = Request
            return protocol

        self.http_factory.buildProtocol = with_our_requests  # type: ignore[method-assign]
        for sign in (signal.SIGTERM, signal.SIGINT):
            twisted_loop.add_signal_handler(sign, self.drain)
        self._starting = twisted_loop.create_task(self._start())

    async def _start(self) -> None:
        if settings.SERVE_ONLY != "web" and not await started():
            self.status = 1
            self.stop()

    # One answer

    async def handle_reply(self, protocol: Any, message: Message) -> None:
        kind, flow = message["type"], self._flows.get(protocol)
        if kind in ("http.response.body", "websocket.send") and flow is not None:
            try:
                await flow.wait(self._env.reader_seconds)
            except TimeoutError:
                return protocol.transport.abortConnection()
            if kind == "http.response.body" and not message.get("more_body", False):
                self._let_go(protocol)
        await super().handle_reply(protocol, message)
        if kind == "http.response.start" and protocol.channel is not None:
            self._flows[protocol] = Flow(protocol)
        elif kind == "websocket.accept" and protocol.transport is not None:
            protocol.transport.unregisterProducer()  # the HTTP that it was before
            self._flows[protocol] = WebsocketFlow(protocol.transport)

    def protocol_disconnected(self, protocol: Any) -> None:
        self._let_go(protocol)
        super().protocol_disconnected(protocol)

    def _let_go(self, protocol: Any) -> None:
        flow = self._flows.pop(protocol, None)
        if flow is not None and (isinstance(protocol, WebSocketProtocol) or protocol.channel is not None):
            flow.end()

    # The end

    def drain(self) -> None:
        """On the first signal: let answers finish, end the others with a word, and stop. On the second: stop."""
        runtime.unready.add(DRAINING)
        if self._drain is not None:
            return self.stop()
        self._drain = twisted_loop.create_task(self._finish())

    async def _finish(self) -> None:
        await asyncio.sleep(self._env.drain_delay)
        for listener in self.listeners:
            listener.addCallback(lambda port: port.stopListening())
        for protocol in self._open_calls():
            if isinstance(protocol, WebSocketProtocol):
                self._say_goodbye(protocol)
        await self._answered(self._env.drain_seconds)
        cut = self._open_calls()
        if cut:
            log.warning("Draining: %d requests are cut", len(cut))
        for call in cut.values():
            call.cancel()
        await self._answered(SETTLE_SECONDS)
        await runtime.stop()  # meanwhile their last words go out; that they have no end is seen when the process ends
        self.stop()

    async def _answered(self, seconds: float) -> None:
        calls = self._open_calls().values()
        if calls:
            await asyncio.wait(calls, timeout=seconds)

    def _open_calls(self) -> dict[Any, asyncio.Future[None]]:
        """What the application still does, by the request or websocket for which it does it."""
        calls = {protocol: details.get("application_instance") for protocol, details in self.connections.items()}
        return {protocol: call for protocol, call in calls.items() if call is not None and not call.done()}

    def _say_goodbye(self, protocol: WebSocketProtocol) -> None:
        """A page need not wait for the end of the drain: it can come back elsewhere at once."""
        if protocol.state == protocol.STATE_OPEN:
            protocol.sendCloseFrame(code=GOING_AWAY, reasonUtf8=b"The server is being stopped")
        elif hasattr(protocol, "handshake_deferred"):
            protocol.handshake_deferred.errback(ConnectionDeny(code=503, reason="The server is being stopped"))
            del protocol.handshake_deferred
            self.protocol_disconnected(protocol)

    def kill_all_applications(self) -> defer.Deferred[None]:
        """Nothing is left to kill: the drain has waited for all."""
        return defer.succeed(None)


def run(host: str, port: int, env: Env) -> int:
    server = DrainingServer(host, port, env)
    server.run()
    return server.status
