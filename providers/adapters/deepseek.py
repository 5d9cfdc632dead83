"""DeepSeek: speaks OpenAI's API, thinks aloud (`reasoning_content`), and tells what its cache gave (`prompt_cache_hit_tokens`)."""

from __future__ import annotations

from providers.adapter import Ask, OpenAICompatible, Target
from providers.exchange import Outgoing
from providers.failures import InvalidAtUpstream


class DeepSeek(OpenAICompatible):
    name = "deepseek"
    title = "DeepSeek"
    base_url = "https://api.deepseek.com/v1"
    endpoints = frozenset({"chat/completions"})

    def request(self, ask: Ask, target: Target) -> Outgoing:
        if (ask.body.get("response_format") or {}).get("type") == "json_schema":
            message = "DeepSeek keeps to no schema: ask for 'json_object', and describe the shape in the prompt."
            raise InvalidAtUpstream(message, param="response_format", code="unsupported_parameter")
        for index, message in enumerate(ask.body["messages"]):
            parts = message.get("content")
            if isinstance(parts, list) and any(isinstance(part, dict) and part.get("type") != "text" for part in parts):
                raise InvalidAtUpstream("DeepSeek reads text alone.", param=f"messages[{index}].content", code="unsupported_value")
        return super().request(ask, target)
