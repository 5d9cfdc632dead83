"""Takes the connections that wait behind the one that was just taken.

libuv, since its version 1.47, takes one connection at each turn of the event loop, whatever waits. Where a turn takes ten
milliseconds, the last of a hundred clients that come together would wait for a second, while those before it are served.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterable

# In one turn. A quick turn takes few, so that workers that share a socket share its connections, too; one that kept them
# waiting takes as many as could have come meanwhile.
LEAST_AT_ONCE = 8
MOST_PER_SECOND = 3_000


class Acceptor:
    """Lives in the event loop that serves `listeners`, which it copies. `protocol` makes what serves one connection, `room` tells
    for how many more there are files."""

    def __init__(self, listeners: Iterable[int], protocol: Callable[[], asyncio.BaseProtocol], room: Callable[[], int]) -> None:
        self._listeners = [socket.socket(fileno=os.dup(fileno)) for fileno in listeners]
        self._protocol, self._room = protocol, room
        self._tasks: set[asyncio.Task[object]] = set()
        self._taken_at = 0.0  # monotonic; 0 = since the last look none was taken

    def was_taken(self) -> None:
        """The server has taken a connection: there may be more."""
        if not self._taken_at:
            self._taken_at = time.monotonic()
            asyncio.get_running_loop().call_soon(self._take_more)

    def close(self) -> None:
        """Take no more."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def _take_more(self) -> None:
        waited, self._taken_at = time.monotonic() - self._taken_at, 0.0
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            for _ in range(min(LEAST_AT_ONCE + int(waited * MOST_PER_SECOND), self._room() - len(self._tasks))):
                try:
                    connection, _ = listener.accept()
                except OSError:
                    break  # none is left; or no file is, and then the server's own look says so
                task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
