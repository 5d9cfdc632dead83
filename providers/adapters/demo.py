"""An upstream that needs no network: models to try a client with. They are told of in `demo_server.py`."""

from __future__ import annotations

from providers.adapter import OpenAICompatible, Target
from providers.demo_server import MODELS, DemoTransport
from providers.exchange import Outgoing
from providers.over_httpx import OverHttpx
from providers.wire import Json


class Demo(OpenAICompatible):
    name = "demo"
    title = "Demo (no network)"
    base_url = "http://demo.invalid/v1"
    free = True
    needs_secret = False
    endpoints = frozenset({"chat/completions", "completions", "responses", "embeddings", "moderations", "rerank"})
    transport = OverHttpx(DemoTransport())

    def models_request(self, target: Target) -> Outgoing | None:
        return None

    def listed(self) -> dict[str, Json]:
        return {model: {"owned_by": "demo"} for model in MODELS}
