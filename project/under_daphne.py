"""Daphne with a drain, and with an application that waits for a client that does not read.

It is right for pages: what it cannot promise for `/v1` is in docs/decisions/0009-daphne-drains-and-waits.md.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

from daphne.endpoints import build_endpoint_description_strings
from daphne.server import Server, twisted_loop
from twisted.internet import defer
from twisted.internet.interfaces import IPushProducer
from zope.interface.declarations import implementer

from project.asgi import application, runtime, started
from project.env import Env
from project.server import DRAINING, SETTLE_SECONDS
from proxy.call import Message

log = logging.getLogger(__name__)


@implementer(IPushProducer)
class Flow:
    """Twisted's word on whether a client takes what is written for it."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()

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


class DrainingServer(Server):
    def __init__(self, host: str, port: int, env: Env) -> None:
        super().__init__(
            application,
            endpoints=build_endpoint_description_strings(host=host, port=port),
            signal_handlers=False,
            ready_callable=self._begin,
            server_name="",
        )
        self.status = 0  # of the process, when it ends
        self._env = env
        self._flows: dict[Any, Flow] = {}
        self._drain: asyncio.Task[None] | None = None

    def _begin(self) -> None:
        for sign in (signal.SIGTERM, signal.SIGINT):
            twisted_loop.add_signal_handler(sign, self.drain)
        self._starting = twisted_loop.create_task(self._start())

    async def _start(self) -> None:
        if not await started():
            self.status = 1
            self.stop()

    # One answer

    async def handle_reply(self, protocol: Any, message: Message) -> None:
        kind, flow = message["type"], self._flows.get(protocol)
        if kind == "http.response.body" and flow is not None:
            try:
                await flow.wait(self._env.reader_seconds)
            except TimeoutError:
                return protocol.transport.abortConnection()
            if not message.get("more_body", False):
                self._let_go(protocol)
        await super().handle_reply(protocol, message)
        if kind == "http.response.start" and protocol.channel is not None:
            self._flows[protocol] = flow = Flow()
            protocol.registerProducer(flow, True)

    def protocol_disconnected(self, protocol: Any) -> None:
        self._let_go(protocol)
        super().protocol_disconnected(protocol)

    def _let_go(self, protocol: Any) -> None:
        if self._flows.pop(protocol, None) is not None and protocol.channel is not None:
            protocol.unregisterProducer()

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
        await self._answered(self._env.drain_seconds)
        cut = self._open_calls()
        if cut:
            log.warning("Draining: %d requests are cut", len(cut))
        for call in cut:
            call.cancel()
        await self._answered(SETTLE_SECONDS)
        await runtime.stop()
        self.stop()

    async def _answered(self, seconds: float) -> None:
        calls = self._open_calls()
        if calls:
            await asyncio.wait(calls, timeout=seconds)

    def _open_calls(self) -> list[asyncio.Future[None]]:
        calls = [details.get("application_instance") for details in self.connections.values()]
        return [call for call in calls if call is not None and not call.done()]

    def kill_all_applications(self) -> defer.Deferred[None]:
        """Nothing is left to kill: the drain has waited for all."""
        return defer.succeed(None)


def run(host: str, port: int, env: Env) -> int:
    server = DrainingServer(host, port, env)
    server.run()
    return server.status
