"""Clients that keep calling, whatever happens to the server."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable

import httpx

from tests.upstreams.kit import Step

TEXT = "one two three four five six seven eight nine ten eleven twelve"
SLOW = Step(text=TEXT, delay_first_ms=3, delay_frame_ms=4)


class Load:
    """Calls in a thread of its own until it is stopped. `answered`: the request ids that clients saw whole answers of."""

    def __init__(self, url: str, key: str, model: str, *, clients: int = 8, **body: object) -> None:
        self.url, self.key, self.model, self.clients, self.body = url, key, model, clients, body
        self.answered: set[str] = set()
        self.statuses: Counter[int] = Counter()
        self.begun = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(30)

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self.clients):
                group.create_task(self._client(random.Random(number)))

    async def _client(self, chance: random.Random) -> None:
        headers = {"authorization": f"Bearer {self.key}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=20) as client:
            while not self._ending.is_set():
                stream = chance.random() < 0.6
                body = {"model": self.model, "stream": stream, "messages": [{"role": "user", "content": "count for me"}], **self.body}
                self.begun += 1
                try:
                    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                        whole = await response.aread()
                    self.statuses[response.status_code] += 1
                    if response.status_code in (429, 503):
                        await asyncio.sleep(0.05)
                    if response.status_code == 200 and (not stream or whole.endswith(b"data: [DONE]\n\n")):
                        self.answered.add(response.headers["x-request-id"])
                except httpx.TransportError:
                    await asyncio.sleep(0.05)


def say(progress: Callable[[str], None] | None, text: str) -> None:
    if progress is not None:
        progress(text)
