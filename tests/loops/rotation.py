"""S07: seal and pepper are rotated again and again under load. No request may fail, with old keys or with new ones."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.loops.load import SLOW, say
from tests.serving import Sluice, eventually, running
from tests.upstreams.openai import OpenAIUpstream

SEALED_WITH = """
from django.conf import settings
from providers.models import Credential
from providers.secrets import sealed_with
newest = next(iter(settings.KEYRING.keys("seal")))
print(all(sealed_with(bytes(row.secret)) == newest for row in Credential.objects.exclude(secret=None)))
"""


class Callers:
    """Programs that call without a pause, each with a key of its own, and count whatever is not a whole answer."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model
        self.seen: Counter[str] = Counter()
        self.keys: list[str] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), daemon=True)

    def __enter__(self) -> Callers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(30)

    async def _all(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=20) as client:
            begun: list[asyncio.Task[None]] = []
            while not self._ending.is_set():
                begun += [asyncio.create_task(self._one(client, key, len(begun))) for key in self.keys[len(begun) :]]
                await asyncio.sleep(0.05)
            await asyncio.gather(*begun)

    async def _one(self, client: httpx.AsyncClient, key: str, number: int) -> None:
        turn = number
        while not self._ending.is_set():
            stream = turn % 2 == 0
            turn += 1
            body = {"model": self.model, "stream": stream, "messages": [{"role": "user", "content": "count for me"}]}
            try:
                answer = await client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
            except httpx.TransportError as problem:
                self.seen[type(problem).__name__] += 1
                continue
            whole = answer.status_code == 200 and (not stream or answer.text.endswith("data: [DONE]\n\n"))
            self.seen["answered" if whole else f"{answer.status_code} {answer.text[:120]}"] += 1


def run(times: int, *, progress: Callable[[str], None] | None = None, **settings: str) -> dict[str, Any]:
    """Rotate so many times. `failed` must be empty, and `sealed` true: everything is sealed with the newest entry."""
    with OpenAIUpstream() as upstream, running(**settings) as sluice:
        sluice.set_price("sim/*", input=3, output=15)
        sluice.add_openai(upstream, prefix="sim")
        sluice.wait_for("sim")
        upstream.reset()
        upstream.script(*[SLOW] * 500_000)
        with Callers(sluice.url, "sim/gpt-4o-mini") as callers:
            callers.keys.append(sluice.issue_key(name="before"))
            for number in range(times):
                rotate(sluice)
                callers.keys.append(sluice.issue_key(name=f"after-{number}"))
                answered = callers.seen["answered"]
                eventually(lambda answered=answered: callers.seen["answered"] > answered + 20, "nobody is answered", seconds=20)
                say(progress, f"rotated {number + 1} of {times}: {dict(callers.seen)}")
        counts = dict(callers.seen)

        def rows_of() -> int | None:
            """The last call is settled only after its client has been answered."""
            found = sum(row["status"] == 200 for row in sluice.usage())
            return found if found >= counts["answered"] else None

        rows = eventually(rows_of, "a call that was answered has no row", seconds=5)
        return {
            "rotations": times,
            "keys": len(callers.keys),
            "answered": counts.pop("answered", 0),
            "rows": rows,
            "failed": counts,
            "sealed": sluice.python(SEALED_WITH).strip() == "True",
        }


def rotate(sluice: Sluice) -> None:
    """As docs/operations.md says: new entries on top; seal again; then the old seal goes, and the old peppers stay."""
    path = sluice.data_dir / "keyring"
    old = path.read_text().split()
    peppers = [entry if entry.startswith("pepper:") else f"pepper:{entry}" for entry in old if not entry.startswith("seal:")]
    new = [f"seal:{secrets.token_urlsafe(48)}", f"pepper:{secrets.token_urlsafe(48)}"]
    put(path, [*new, *old])
    sluice.manage("reseal")
    put(path, [*new, *peppers])
    time.sleep(2.5)  # a running server looks every 2 s


def put(path: Path, entries: list[str]) -> None:
    """In one step: nobody reads half a keyring."""
    draft = path.with_name("keyring.new")
    draft.touch(mode=0o600)
    draft.write_text("\n".join(entries) + "\n")
    os.replace(draft, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    options = parser.parse_args()
    counts = run(options.times, progress=print)
    print(counts)
    if counts["failed"] or not counts["sealed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
