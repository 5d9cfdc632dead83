"""The connections to one origin: how many there may be, which are free, and who waits for one. Nothing here does I/O."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict

import httpx

from providers.exchange import Place
from providers.http1 import Connection

MOST_IDLE = 64  # for each place


class Pool:
    """Room for `most` connections. Each is free, in use, or only just being made; the last two are somebody's.

    Nobody waits while there is room or a free connection, so whatever comes back goes to the first who waits. No more than
    `most_waiting` do: who waits for an upstream that hangs is in the way of calls to others.
    """

    def __init__(self, most: int, most_waiting: int) -> None:
        self.taken = 0  # of the room
        self._most, self._most_waiting = most, most_waiting
        self._held: set[Connection] = set()  # those that take room; one on its way out no longer does
        self._free: dict[Place, list[Connection]] = {}  # the one used last stands last
        self._queue: OrderedDict[asyncio.Future[Connection | None], Place | None] = OrderedDict()
        self._closed = False

    @property
    def calls(self) -> int:
        """How many have a connection, are making one, or wait for one."""
        return self.taken - sum(map(len, self._free.values())) + len(self._queue)

    def take(self, place: Place) -> Connection | None:
        """The free connection of this place that was used last."""
        free = self._free.get(place)
        while free:
            connection = free.pop()
            if connection.usable:
                return connection
        return None

    async def room(self, place: Place | None, wait_seconds: float) -> Connection | None:
        """Reserve room for a new connection: None. Where there is none in time, a connection of this place that came back.

        Raises httpx.PoolTimeout. Room that is reserved ends in `hold` or `leave`."""
        if self.taken < self._most or self._make_room():
            self.taken += 1
            return None
        if len(self._queue) >= self._most_waiting:
            raise httpx.PoolTimeout("All connections to the upstream are in use, and enough calls wait for one.")
        given: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._queue[given] = place
        try:
            async with asyncio.timeout(wait_seconds):
                return await given
        except BaseException as problem:
            self._queue.pop(given, None)
            if given.done() and not given.cancelled():  # it was our turn, and we are on our way out
                connection = given.result()
                if connection is None:
                    self.leave()
                elif connection in self._held:
                    self.welcome(connection)
            if isinstance(problem, TimeoutError):
                raise httpx.PoolTimeout("All connections to the upstream are in use.") from None
            raise

    def hold(self, connection: Connection) -> None:
        """The connection that room was reserved for."""
        if connection.lost:
            self.leave()
        else:
            self._held.add(connection)

    def leave(self) -> None:
        """Give up room: to the first who waits."""
        given, _ = self._first_in_line()
        if given is None:
            self.taken -= 1
        else:
            self._queue.pop(given)
            given.set_result(None)

    # What connections say

    def welcome(self, connection: Connection) -> None:
        """It is free for another exchange."""
        given, place = self._first_in_line()
        if given is not None:
            if place != connection.place:
                return self._end(connection)  # its room is of use, it is not
            self._queue.pop(given)
            return given.set_result(connection)
        free = self._free.setdefault(connection.place, [])
        connection.free_since = time.monotonic()
        free.append(connection)
        if len(free) > MOST_IDLE or self._closed:
            self._end(free.pop(0))

    def forget(self, connection: Connection) -> None:
        """It is gone."""
        free = self._free.get(connection.place, [])
        if connection in free:
            free.remove(connection)
        if connection in self._held:
            self._held.remove(connection)
            self.leave()

    # In the course of time

    def end_idle(self, before: float) -> None:
        """End what has been free since `before`, monotonic seconds."""
        for place, free in list(self._free.items()):
            while free and free[0].free_since <= before:
                self._end(free.pop(0))
            if not free:
                del self._free[place]

    def close(self) -> None:
        """End what is free; what is in use ends when it comes back."""
        self._closed = True
        self.end_idle(float("inf"))

    def _end(self, connection: Connection) -> None:
        self._held.discard(connection)
        connection.close()
        self.leave()

    def _make_room(self) -> bool:
        """End the connection that has been free for longest, whosever it is."""
        oldest = min((free for free in self._free.values() if free), key=lambda free: free[0].free_since, default=None)
        if oldest is None:
            return False
        self._end(oldest.pop(0))
        return True

    def _first_in_line(self) -> tuple[asyncio.Future[Connection | None] | None, Place | None]:
        while self._queue:
            given, place = next(iter(self._queue.items()))
            if not given.done():
                return given, place
            self._queue.pop(given)  # cancelled, and has not noticed yet
        return None, None
