"""An upstream that needs no network: models to try a client with."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

from providers import wire
from providers.adapter import OpenAICompatible, Target
from providers.wire import Json


class _Stream(httpx.AsyncByteStream):
    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk


class DemoTransport(httpx.AsyncBaseTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = wire.decode_json(request.content)
        text = str(body["messages"][-1].get("content", ""))
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        base = {"id": "demo-1", "created": 1786000000, "model": body["model"]}
        if not body.get("stream"):
            answer = {
                **base,
                "object": "chat.completion",
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": usage,
            }
            return httpx.Response(200, headers={"content-type": "application/json"}, stream=_Stream([wire.encode_json(answer)]))
        chunk = {**base, "object": "chat.completion.chunk"}
        chunks = [
            wire.event({**chunk, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}),
            wire.event({**chunk, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}),
            wire.event({**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
            wire.event({**chunk, "choices": [], "usage": usage}),
            wire.DONE,
        ]
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=_Stream(chunks))


class Demo(OpenAICompatible):
    name = "demo"
    title = "Demo (no network)"
    base_url = "http://demo.invalid/v1"
    free = True
    needs_secret = False
    transport = DemoTransport()

    def models_request(self, target: Target) -> httpx.Request | None:
        return None

    def listed(self) -> dict[str, Json]:
        return {"echo": {}}
