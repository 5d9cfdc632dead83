"""Stops the trip as soon as its client leaves: the upstream stops at once, and so does its bill. Where the alias says so, the trip
goes on for a while instead, to hear what the upstream counted. A call whose key works no more is stopped the same way: see cutting.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from providers.wire import ApiError
from proxy.call import Incoming, Outcome, Receive


class Leaving:
    """From now until `stop`, a client that leaves cancels the task that made this; `left` says so then. So does `refuse`, and `refused`
    says why."""

    __slots__ = ("_awaited", "_drain", "_outcome", "_task", "_timer", "_under_way", "_watcher", "incoming", "left", "refused")

    def __init__(
        self,
        incoming: Incoming,
        outcome: Outcome,
        awaited: Callable[[], bool],
        drain: Callable[[], float] | None = None,
        under_way: set[Leaving] | None = None,
    ) -> None:
        """`awaited`: whether there is still something to be said to the client. `drain` is asked when it leaves: in how many seconds
        to cancel the task, 0 = at once. In `under_way` this is found until `stop`."""
        self.incoming, self.left = incoming, False
        self.refused: ApiError | None = None
        self._outcome, self._awaited, self._drain, self._under_way = outcome, awaited, drain, under_way
        self._timer: asyncio.TimerHandle | None = None
        task = incoming.task or asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher: asyncio.Task[None] | None = None
        if incoming.line is not None:
            incoming.line.when_client_leaves(self._leave)
        else:
            self._watcher = asyncio.create_task(self._watch(incoming.receive))
        if under_way is not None:
            under_way.add(self)

    def refuse(self, problem: ApiError) -> None:
        """End the trip, unless its upstream is done already: what is left then is to hand the answer over."""
        if self.left or self.refused is not None or self._outcome.heard or not self._awaited():
            return
        self.refused = problem
        self._task.cancel()

    def forgive(self) -> None:
        """The trip has come to its end in order: it is not a cancelled task to whoever looks."""
        self._task.uncancel()

    def stop(self) -> None:
        self._awaited = _nothing_more
        if self._under_way is not None:
            self._under_way.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        if self.left or not self._awaited():
            return
        self.left = True
        seconds = self._drain() if self._drain is not None else 0.0
        if seconds > 0:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._task.cancel)
        else:
            self._task.cancel()


def _nothing_more() -> bool:
    return False
