"""How the application is served: uvicorn with our guard at the socket and a drain that leaves nothing unsettled."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import uvicorn

from project import supervisor
from project.acceptor import Acceptor
from project.env import Env
from project.guard import Guard, GuardedProtocol, Limits
from project.watchdog import Watchdog
from project.websocket import MOST_MESSAGE_BYTES, GuardedWebSocket

log = logging.getLogger(__name__)

DRAINING = "draining"
# Past the drain: for the answers' last events, and then for what is cut off.
SETTLE_SECONDS = 5.0
# A client may just be sending its next request on a kept connection: it is answered, and told that the connection ends.
LAST_CALL_SECONDS = 0.5
CUT_SECONDS = 1.0
STORE_SECONDS = 20.0  # a worker may take so long to store what is left in its journal
# A third of the files is for connections, one for theirs to upstreams, one to tell those that there is no room. Beside them
# there are the database, the journal and the log.
OTHER_FILES = 64
MOST_FILES = 65_536
TICK_SECONDS = 0.1
MOST_UNSENT_BYTES = 128 << 10
# New objects beyond those that have gone again, before the garbage collector looks for circles among them.
GARBAGE_AFTER = 50_000
# While another thread computes (a page, the ledger) the event loop may wait so long for the interpreter, at every turn.
SWITCH_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Above:
    """What a worker has from its supervisor: the socket, a pipe to say on that it takes requests, and one that ends with it."""

    listener: int
    ready: int
    life: int


class Server(uvicorn.Server):
    """Drains on the first signal and then ends by itself, with exit status 0: a drain is no failure.

    `unready` are the reasons for which this process should get no new requests just now; the readiness probe says them."""

    def __init__(self, config: uvicorn.Config, guard: Guard, env: Env, unready: set[str], above: Above | None = None) -> None:
        super().__init__(config)
        self.guard = guard
        self.above = above
        self.unready = unready
        self.drain_delay, self.drain_seconds = env.drain_delay, env.drain_seconds
        self.watchdog = Watchdog(unready, env.stall_seconds)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True  # asked twice by hand: at once, then
        self.should_exit = self.guard.draining = True
        self.unready.add(DRAINING)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._tick()
        await super().startup(sockets)
        self._tick()
        listeners = [listener for server in self.servers for listener in server.sockets]
        self.acceptor = Acceptor([listener.fileno() for listener in listeners], self._protocol, self._room)
        self.guard.was_taken = self.acceptor.was_taken
        for listener in listeners:
            # Connections inherit it. Else the kernel would take some megabytes for a client that does not read.
            with contextlib.suppress(AttributeError, OSError):  # not on every system
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MOST_UNSENT_BYTES)
        self.watchdog.start()
        settle_memory()
        sys.setswitchinterval(SWITCH_SECONDS)
        if self.above is not None and self.started:
            asyncio.get_running_loop().add_reader(self.above.life, self._orphaned)
            os.write(self.above.ready, b"1")

    def _protocol(self) -> asyncio.Protocol:
        """What serves one connection, made as uvicorn makes its own."""
        made = cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class)
        return made(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def _room(self) -> int:
        return 2 * self.guard.limits.connections - len(self.server_state.connections)

    def _orphaned(self) -> None:
        asyncio.get_running_loop().remove_reader(cast(Above, self.above).life)
        log.error("The supervisor is gone: this worker drains")
        self.handle_exit(signal.SIGTERM, None)

    async def on_tick(self, counter: int) -> bool:
        self._tick()
        return await super().on_tick(counter)

    def _tick(self) -> None:
        self.watchdog.beat()
        self.guard.look_after(self.server_state.connections, asyncio.get_running_loop().time())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.guard.draining = True
        self.unready.add(DRAINING)
        if self.drain_delay:
            log.info("Draining: accepting for %g s more", self.drain_delay)
            await self._pass(self.drain_delay, lambda: False)
        self.acceptor.close()
        for server in self.servers:
            server.close()
        connections, tasks = self.server_state.connections, self.server_state.tasks
        for connection in list(connections):
            if not isinstance(connection, GuardedProtocol) or connection.running is not None:
                connection.shutdown()
        await self._pass(LAST_CALL_SECONDS, lambda: not connections)
        for connection in list(connections):
            connection.shutdown()
        log.info("Draining: %d requests are open and may take %g s more", len(tasks), self.drain_seconds)
        await self._pass(self.drain_seconds, lambda: not connections and not tasks)
        if not self.force_exit:
            await self._cut()
            await self.lifespan.shutdown()
        self.watchdog.end()

    async def _cut(self) -> None:
        """End what is still open. Each request says so to its client and settles; lifespan ends only after that."""
        connections, tasks = self.server_state.connections, self.server_state.tasks
        if tasks:
            log.warning("Draining: %d requests are cut", len(tasks))
        for task in list(tasks):
            task.cancel()
        await self._pass(SETTLE_SECONDS, lambda: not connections and not tasks)
        for connection in list(connections):
            cast(GuardedProtocol, connection).transport.abort()
        await self._pass(CUT_SECONDS, lambda: not tasks)

    async def _pass(self, seconds: float, done: Callable[[], bool]) -> None:
        """Wait until it is done, at most so long; deadlines of connections go on."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not done() and not self.force_exit and loop.time() < end:
            await asyncio.sleep(min(TICK_SECONDS, seconds))
            self._tick()


def settle_memory() -> None:
    """What the start has made stays for good: the garbage collector need not look at it again, nor at each request's values.

    A request's own values form no circles, so they go as soon as it ends; what does form one can wait for a rarer look."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_AFTER, 20, 100)


def run_uvicorn(host: str, port: int, env: Env, above: Above | None = None) -> int:
    """Serve until a signal. The exit status: 0 after a drain, 1 when the start failed."""
    from project.asgi import is_gateways, runtime

    guard = Guard(
        limits_of(env, allow_files()),
        limits_bodies=is_gateways,
        websocket=GuardedWebSocket,
        upgrades=lambda scope: not is_gateways(scope),
        count_refused=runtime.gateway.metrics.refuse,
    )
    config = uvicorn.Config(
        "project.asgi:application",
        host=host,
        port=port,
        backlog=supervisor.BACKLOG,
        loop="auto",
        http=cast(Any, guard.protocol),
        interface="asgi3",
        ws="none",  # the guard takes the handshake, and knows what comes after it
        ws_max_size=MOST_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
    )
    server = Server(config, guard, env, runtime.unready, above)
    server.run(None if above is None else [socket.socket(fileno=above.listener)])
    return 0 if server.started else 1


def limits_of(env: Env, files: int) -> Limits:
    return Limits(
        head_seconds=env.head_seconds,
        body_idle_seconds=env.body_idle_seconds,
        body_slow_seconds=env.body_slow_seconds,
        keep_alive_seconds=env.keep_alive_seconds,
        reader_seconds=env.reader_seconds,
        open_requests=env.open_requests,
        connections=max(1, (files - OTHER_FILES) // 3),
    )


def allow_files() -> int:
    """Let this process open as many files as the system lets it. The number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MOST_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def run_workers(host: str, port: int, env: Env, count: int, only: str) -> int:
    """So many of the above on one socket. The exit status."""
    listener = supervisor.bind(host, port)
    seconds = env.drain_delay + env.drain_seconds + LAST_CALL_SECONDS + SETTLE_SECONDS + CUT_SECONDS + STORE_SECONDS
    return supervisor.Supervisor(listener, count, supervisor.command_of(only), seconds).run()


def run_daphne(host: str, port: int, env: Env) -> int:
    """The same under Daphne, as far as it goes."""
    from project.under_daphne import run  # importing it installs Twisted's reactor

    return run(host, port, env)
