"""An upstream that plays DeepSeek: OpenAI's API, text alone, no schemas, and usage with its own words for the cache."""

from __future__ import annotations

from typing import Any

from tests.upstreams import CAPABILITIES, Offer
from tests.upstreams.kit import Call, Step, replace, words
from tests.upstreams.openai import Json, OpenAIUpstream, Refused, what_to_say


class DeepSeekUpstream(OpenAIUpstream):
    def __init__(self, **options: Any) -> None:
        super().__init__(models=("deepseek-chat", "deepseek-reasoner"), **options)

    async def _chat(self, call: Call, body: Json, step: Step) -> None:
        if (body.get("response_format") or {}).get("type") == "json_schema":
            raise Refused(400, "This response_format type is unavailable now")
        contents = [message.get("content") for message in body["messages"]]
        if any(part.get("type") != "text" for content in contents if isinstance(content, list) for part in content):
            raise Refused(400, "Failed to deserialize the JSON body into the target type: unknown variant `image_url`, expected `text`")
        text, reasoning, calls = what_to_say(body, step)
        prompt = sum(words(content if isinstance(content, str) else str(content or "")) for content in contents)
        output = words(text) + words(reasoning) + sum(words(one["function"]["arguments"]) for one in calls)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_cache_hit_tokens": prompt // 2,
            "prompt_cache_miss_tokens": prompt - prompt // 2,
            "completion_tokens_details": {"reasoning_tokens": words(reasoning)},
        }
        await super()._chat(call, body, replace(step, usage=step.usage or usage))


OFFER = Offer(
    kind="deepseek",
    simulator=DeepSeekUpstream,
    model="deepseek-reasoner",
    can=frozenset(CAPABILITIES) - {"structured", "images", "image_urls"},
)
