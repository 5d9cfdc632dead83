"""An upstream that speaks OpenAI's API: it validates requests as OpenAI does, echoes, and counts words as tokens.

A scenario goes by script, by credential (`sk-sim-429-rpm`) or by model (`sim-429-rpm`, `sim-429-rpm~2`: what follows
the tilde only makes the name another one). Fields that the API does not know are recorded, not refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import struct
import time
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from typing import Any, ClassVar

from tests.upstreams import CAPABILITIES, Offer
from tests.upstreams.kit import CREATED, Bill, Call, Simulator, Step, compact, replace, words

Json = dict[str, Any]
KEYS = re.compile(r"sk-sim-[a-z0-9_-]+(?:~[\w-]+)?")
REASONING = re.compile(r"o[1-9]|gpt-5")
MODELS = (
    "gpt-4o",
    "gpt-4o-mini",
    "gpt-3.5-turbo",
    "gpt-5-mini",
    "o3",
    "gpt-3.5-turbo-instruct",
    "text-embedding-3-small",
    "omni-moderation-latest",
    "gpt-image-1",
    "gpt-4o-mini-tts",
    "rerank-1",
    "vendor/model-with-slash",
)

# What each endpoint knows; everything else in a request is recorded as unknown.
_COMMON = "model user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention moderation"


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FIELDS: dict[str, frozenset[str]] = {
    "chat/completions": names(
        f"{_COMMON} messages audio frequency_penalty presence_penalty function_call functions logit_bias logprobs top_logprobs "
        "max_completion_tokens max_tokens modalities n parallel_tool_calls prediction reasoning_effort response_format seed stop "
        "stream stream_options temperature top_p tools tool_choice verbosity web_search_options"
    ),
    "completions": names(
        f"{_COMMON} prompt best_of echo frequency_penalty presence_penalty logit_bias logprobs max_tokens n seed stop stream "
        "stream_options suffix temperature top_p"
    ),
    "embeddings": names("input model encoding_format dimensions user"),
    "moderations": names("input model"),
    "rerank": names("model query documents top_n return_documents"),
    "images/generations": names(
        "prompt model n size quality response_format output_format output_compression background moderation style stream "
        "partial_images user"
    ),
    "audio/speech": names("model input voice instructions response_format speed stream_format"),
    "responses": names(
        f"{_COMMON} input instructions background context_management conversation include max_output_tokens max_tool_calls "
        "parallel_tool_calls previous_response_id prompt reasoning stream stream_options temperature text tool_choice tools "
        "top_logprobs top_p truncation"
    ),
}
NOT_NULLABLE = frozenset({"messages", "model", "tools", "tool_choice", "response_format", "user", "input", "prompt"})


class Refused(Exception):
    """The request is not what OpenAI takes, or a scenario says so."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = list((headers or {}).items())


def refusal(scenario: str) -> Refused | None:
    """The error that a scenario stands for; None when it stands for an answer."""
    wait = "Rate limit reached for requests. Please try again later."
    match scenario:
        case "401" | "bad_key":
            return Refused(401, "Incorrect API key provided: sk-sim-****.", code="invalid_api_key")
        case "402" | "no_credit":
            return Refused(402, "Insufficient balance.", kind="insufficient_quota", code="insufficient_quota")
        case "403-country" | "403" | "forbidden":
            code = "unsupported_country_region_territory"
            return Refused(403, "Country, region, or territory not supported.", kind="request_forbidden", code=code)
        case "404":
            return Refused(
                404, "The model `sim-404` does not exist or you do not have access to it.", code="model_not_found", param="model"
            )
        case "400":
            return Refused(400, "Invalid value for 'top_k'.", code="invalid_value", param="top_k")
        case "400-context":
            message = "This model's maximum context length is 8 tokens."
            return Refused(400, message, code="context_length_exceeded", param="messages")
        case "400-policy":
            return Refused(400, "Your request was rejected by our content policy.", code="content_policy_violation")
        case "422":
            return Refused(422, "Unprocessable: 'seed' must be an integer.", param="seed")
        case "408":
            return Refused(408, "Request timeout.", kind="server_error")
        case "409":
            return Refused(409, "The object is being changed by another request.")
        case "429-rpm" | "429" | "rate_limit":
            seconds = "2" if scenario == "rate_limit" else "1"
            headers = {"retry-after": seconds, "x-ratelimit-remaining-requests": "0"}
            return Refused(429, wait, kind="requests", code="rate_limit_exceeded", headers=headers)
        case "rate_limit_date":
            headers = {"retry-after": formatdate(time.time() + 3, usegmt=True)}
            return Refused(429, wait, kind="requests", code="rate_limit_exceeded", headers=headers)
        case "rate_limit_no_header":
            return Refused(429, wait, kind="requests", code="rate_limit_exceeded")
        case "429-ms":
            return Refused(429, wait, kind="requests", code="rate_limit_exceeded", headers={"retry-after-ms": "250"})
        case "429-long":
            return Refused(429, wait, kind="requests", code="rate_limit_exceeded", headers={"retry-after": "3600"})
        case "429-quota":
            message = "You exceeded your current quota, please check your plan and billing details."
            return Refused(429, message, kind="insufficient_quota", code="insufficient_quota")
        case "500" | "server_error":
            return Refused(500, "The server had an error while processing your request.", kind="server_error")
        case "noretry":
            message = "The server had an error while processing your request."
            return Refused(500, message, kind="server_error", headers={"x-should-retry": "false"})
        case "503" | "overloaded":
            return Refused(503, "The server is overloaded.", kind="service_unavailable_error", code="server_is_overloaded")
        case "leak":
            message = "Bad gateway\nfor key sk-proj-abcdefghijklmnop0123456789\x07 " + "x" * 2000
            return Refused(500, message, kind="server_error")
    return None


class OpenAIUpstream(Simulator):
    """Its `base_url` ends in /v1, as OpenAI's SDKs take it."""

    base_path: ClassVar[str] = "/v1"

    def __init__(self, *, models: Sequence[str] = MODELS, **options: Any) -> None:
        super().__init__(**options)
        self.models = models

    def error_frame(self) -> bytes:
        return sse({"error": {"message": "The server had an error in the middle.", "type": "server_error", "param": None, "code": None}})

    def big_frame(self) -> bytes:
        return sse(_chunk("chatcmpl-big", "big", {"content": "x" * (1 << 20)}))

    async def answer(self, call: Call) -> None:
        try:
            await self._answer(call)
        except Refused as refused:
            await call.json(refused.status, refused.body, [*self._headers(call), *refused.headers])

    async def _answer(self, call: Call) -> None:
        seen = call.seen
        endpoint = seen.path.removeprefix(f"{self.base_path}/") if seen.path.startswith(f"{self.base_path}/") else ""
        scheme, _, key = seen.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or not KEYS.fullmatch(key):
            raise Refused(401, f"Incorrect API key provided: {key[:7]}****.", code="invalid_api_key")
        if endpoint == "models" or endpoint.startswith("models/"):
            return await self._models(call, endpoint.removeprefix("models").removeprefix("/"))
        if endpoint not in FIELDS:
            raise Refused(404, f"Invalid URL ({seen.method} {seen.path})")
        if seen.method != "POST":
            raise Refused(405, f"Not allowed to {seen.method} on {seen.path}.", code="method_not_supported")
        body = _checked(endpoint, call, self.models)
        seen.unknown_fields = {name: value for name, value in body.items() if name not in FIELDS[endpoint]}
        step = self.step_of(call)
        seen.scenario = step.scenario
        if (problem := refusal(step.scenario)) is not None:
            raise problem
        speak = {
            "chat/completions": self._chat,
            "completions": self._completion,
            "embeddings": self._embeddings,
            "moderations": self._moderation,
            "rerank": self._rerank,
            "responses": self._response,
            "images/generations": self._image,
            "audio/speech": self._speech,
        }[endpoint]
        await speak(call, body, step)
        return None

    def _headers(self, call: Call) -> list[tuple[str, str]]:
        count = len(self.log)
        return [
            ("x-request-id", f"req_sim_{count}"),
            ("openai-processing-ms", "4"),
            ("openai-version", "2020-10-01"),
            ("openai-organization", "sim-org"),
            ("x-ratelimit-limit-requests", "5000"),
            ("x-ratelimit-remaining-requests", str(max(0, 5000 - count))),
            ("x-ratelimit-reset-requests", "12ms"),
            ("set-cookie", "__cf_bm=sim; path=/"),
        ]

    async def _models(self, call: Call, wanted: str) -> None:
        listed = [{"id": name, "object": "model", "created": CREATED, "owned_by": "sim"} for name in self.models]
        if not wanted:
            return await call.json(200, {"object": "list", "data": listed}, self._headers(call))
        found = next((model for model in listed if model["id"] == wanted), None)
        if found is None:
            raise Refused(404, f"The model '{wanted}' does not exist", code="model_not_found", param="model")
        return await call.json(200, found, self._headers(call))

    # Chat

    async def _chat(self, call: Call, body: Json, step: Step) -> None:
        text, reasoning, tool_calls = what_to_say(body, step)
        usage = dict(step.usage or _usage(_chat_input(body), text, reasoning, tool_calls, cached=step.scenario == "cached"))
        bill = self.charge(call.seen, input_tokens=usage.get("prompt_tokens", 0))
        finish = step.finish_reason or ("tool_calls" if tool_calls else "length" if step.scenario == "length" else "stop")
        made_id = self.next_id("chatcmpl")
        if body.get("stream"):
            wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            frames = [bytes(frame) for frame in step.frames] if step.frames is not None else None
            if frames is None:
                frames = _chat_frames(made_id, body, text, reasoning, tool_calls, finish, usage if wants_usage else None)
            return await self._stream(call, step, frames, bill, usage.get("completion_tokens", 0))
        message: Json = {"role": "assistant", "content": text or None, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if tool_calls:
            message["tool_calls"] = tool_calls
        choices = [{"index": index, "message": message, "logprobs": None, "finish_reason": finish} for index in range(body.get("n") or 1)]
        answer = {
            "id": made_id,
            "object": "chat.completion",
            "created": CREATED,
            "model": body["model"],
            "choices": choices,
            "usage": usage,
            "service_tier": "default",
            "system_fingerprint": "fp_sim",
        }
        return await self._whole(call, step, answer, bill, usage.get("completion_tokens", 0))

    async def _stream(self, call: Call, step: Step, frames: list[bytes], bill: Bill, output_tokens: int) -> None:
        """Sends the frames; the bill grows with each that carries a token."""
        carrying = {number for number, frame in enumerate(frames) if _carries_text(frame)}
        last, counted = max(carrying, default=None), 0
        async for number in call.stream_with(step, frames, "text/event-stream; charset=utf-8", self._headers(call)):
            if number in carrying:
                more = output_tokens - counted if number == last else 1
                bill.output_tokens += more
                counted += more

    async def _whole(self, call: Call, step: Step, answer: Json, bill: Bill, output_tokens: int) -> None:
        bill.output_tokens += output_tokens
        await call.whole_with(step, step.body if step.body is not None else compact(answer), [*self._headers(call), *step.headers])

    # The older completions

    async def _completion(self, call: Call, body: Json, step: Step) -> None:
        prompt = body["prompt"] if isinstance(body["prompt"], str) else " ".join(map(str, body["prompt"]))
        text = step.text if step.text is not None else f"echo: {prompt}"
        usage = {"prompt_tokens": words(prompt), "completion_tokens": words(text), "total_tokens": words(prompt) + words(text)}
        bill = self.charge(call.seen, input_tokens=usage["prompt_tokens"])
        base = {"id": self.next_id("cmpl"), "object": "text_completion", "created": CREATED, "model": body["model"]}

        def choice(piece: str, reason: str | None) -> list[Json]:
            return [{"text": piece, "index": 0, "logprobs": None, "finish_reason": reason}]

        if not body.get("stream"):
            return await self._whole(
                call, step, {**base, "choices": choice(text, "stop"), "usage": usage}, bill, usage["completion_tokens"]
            )
        frames = [sse({**base, "choices": choice(piece, None)}) for piece in pieces(text)]
        frames.append(sse({**base, "choices": choice("", "stop")}))
        if (body.get("stream_options") or {}).get("include_usage"):
            frames.append(sse({**base, "choices": [], "usage": usage}))
        return await self._stream(call, step, [*frames, DONE], bill, usage["completion_tokens"])

    # Responses

    async def _response(self, call: Call, body: Json, step: Step) -> None:
        asked = _response_input(body)
        text = step.text if step.text is not None else f"echo: {asked}"
        usage = {
            "input_tokens": words(asked),
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": words(text),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": words(asked) + words(text),
        }
        bill = self.charge(call.seen, input_tokens=words(asked))
        made_id = self.next_id("resp")
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        item = {"type": "message", "id": f"msg_{made_id}", "status": "completed", "role": "assistant", "content": [part]}
        done = {**_response_object(made_id, body), "status": "completed", "output": [item], "usage": usage}
        if not body.get("stream"):
            return await self._whole(call, step, done, bill, words(text))
        begun = {**_response_object(made_id, body), "status": "in_progress", "output": [], "usage": None}
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        events: list[Json] = [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
            {"type": "response.output_item.added", "output_index": 0, "item": {**item, "status": "in_progress", "content": []}},
            {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
            *({"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []} for piece in pieces(text)),
            {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
            {"type": "response.content_part.done", **place, "part": part},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": done},
        ]
        if step.scenario == "failed":
            error = {"code": "server_error", "message": "It failed with key sk-proj-abcdefghijklmnop0123456789."}
            events = [*events[:6], {"type": "response.failed", "response": {**begun, "status": "failed", "error": error, "usage": usage}}]
        frames = [
            b"event: %b\ndata: %b\n\n" % (event["type"].encode(), compact({**event, "sequence_number": n}))
            for n, event in enumerate(events)
        ]
        return await self._stream(call, step, frames, bill, words(text))

    # The rest

    async def _embeddings(self, call: Call, body: Json, step: Step) -> None:
        given = body["input"]
        inputs = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        counted = sum(words(one) if isinstance(one, str) else len(one) for one in inputs)
        bill = self.charge(call.seen, input_tokens=counted)
        size = body.get("dimensions") or 8
        data = []
        for index, one in enumerate(inputs):
            vector = unit_vector(str(one), size)
            packed = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": packed if body.get("encoding_format") == "base64" else vector})
        usage = {"prompt_tokens": counted, "total_tokens": counted}
        await self._whole(call, step, {"object": "list", "data": data, "model": body["model"], "usage": usage}, bill, 0)

    async def _moderation(self, call: Call, body: Json, step: Step) -> None:
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        bill = self.charge(call.seen, input_tokens=0)
        results = []
        for one in inputs:
            flagged = "kill" in str(one)
            categories = {"violence": flagged, "hate": False}
            scores = {"violence": 0.9 if flagged else 0.01, "hate": 0.01}
            applied = {"violence": ["text"], "hate": ["text"]}
            results.append(
                {"flagged": flagged, "categories": categories, "category_scores": scores, "category_applied_input_types": applied}
            )
        await self._whole(call, step, {"id": self.next_id("modr"), "model": body["model"], "results": results}, bill, 0)

    async def _rerank(self, call: Call, body: Json, step: Step) -> None:
        wanted = set(body["query"].split())
        scored = [{"index": n, "relevance_score": len(wanted & set(str(one).split()))} for n, one in enumerate(body["documents"])]
        scored.sort(key=lambda result: -result["relevance_score"])
        tokens = words(body["query"]) + sum(words(str(one)) for one in body["documents"])
        bill = self.charge(call.seen, input_tokens=tokens)
        answer = {"id": self.next_id("rerank"), "model": body["model"], "results": scored, "usage": {"total_tokens": tokens}}
        await self._whole(call, step, answer, bill, 0)

    async def _image(self, call: Call, body: Json, step: Step) -> None:
        tokens = words(body["prompt"])
        bill = self.charge(call.seen, input_tokens=tokens)
        pixel = base64.b64encode(b"\x89PNG sim " + body["prompt"].encode()).decode()
        usage = {"input_tokens": tokens, "output_tokens": 100, "total_tokens": tokens + 100}
        await self._whole(call, step, {"created": CREATED, "data": [{"b64_json": pixel}] * (body.get("n") or 1), "usage": usage}, bill, 100)

    async def _speech(self, call: Call, body: Json, step: Step) -> None:
        bill = self.charge(call.seen, input_tokens=words(body["input"]))
        sound = b"ID3 sim " + body["input"].encode()
        if body.get("stream_format") == "sse":
            usage = {"input_tokens": words(body["input"]), "output_tokens": 5, "total_tokens": words(body["input"]) + 5}
            frames = [
                sse({"type": "speech.audio.delta", "audio": base64.b64encode(sound).decode()}),
                sse({"type": "speech.audio.done", "usage": usage}),
            ]
            return await self._stream(call, step, frames, bill, 5)
        return await call.whole_with(replace(step, content_type="audio/mpeg"), sound, self._headers(call))


DONE = b"data: [DONE]\n\n"


def sse(value: object) -> bytes:
    return b"data: " + compact(value) + b"\n\n"


def pieces(text: str) -> list[str]:
    """One a word, so that as many frames as tokens carry text: joined again they are the text."""
    return re.findall(r"\s*\S+", text)


def unit_vector(seed: str, size: int) -> list[float]:
    """The same for the same text; as float32, so that both encodings give the same numbers."""
    digest = b"".join(hashlib.sha256(f"{n}{seed}".encode()).digest() for n in range(-(-size // 16)))
    raw = [int.from_bytes(digest[2 * n : 2 * n + 2], "big") - 32768 for n in range(size)]
    length = math.sqrt(sum(value * value for value in raw)) or 1.0
    return list(struct.unpack(f"<{size}f", struct.pack(f"<{size}f", *(value / length for value in raw))))


# What is checked


def _checked(endpoint: str, call: Call, models: Sequence[str]) -> Json:
    kind = call.seen.headers.get("content-type", "").partition(";")[0]
    if kind != "application/json":
        raise Refused(400, f"Unsupported content type: '{kind}'.", code="unsupported_content_type")
    try:
        body = json.loads(call.seen.body)
    except ValueError:
        raise Refused(400, "We could not parse the JSON body of your request.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(400, "The body must be an object.", code="invalid_json")
    for name in NOT_NULLABLE & body.keys():
        if body[name] is None:
            raise Refused(400, f"Invalid type for '{name}': got null.", code="invalid_type", param=name)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise Refused(400, "you must provide a model parameter")
    if model not in models and not model.startswith("sim-"):
        raise Refused(404, f"The model `{model}` does not exist or you do not have access to it.", code="model_not_found", param="model")
    required = {
        "chat/completions": ("messages",),
        "completions": ("prompt",),
        "rerank": ("query", "documents"),
        "images/generations": ("prompt",),
        "audio/speech": ("input", "voice"),
    }
    for name in required.get(endpoint, ("input",)):
        if name not in body:
            raise Refused(400, f"Missing required parameter: '{name}'.", code="missing_required_parameter", param=name)
    if body.get("stream_options") is not None and not body.get("stream"):
        raise Refused(400, "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options")
    if model.startswith("sim-no_usage_option") and (body.get("stream_options") or {}).get("include_usage"):
        raise Refused(400, "Unrecognized request argument supplied: stream_options", param="stream_options")
    if endpoint == "chat/completions":
        _check_chat(body, is_reasoning=REASONING.match(model) is not None)
    return body


def _check_chat(body: Json, *, is_reasoning: bool) -> None:
    if body.get("stream") not in (None, True, False):
        raise Refused(400, "Invalid type for 'stream': expected a boolean.", code="invalid_type", param="stream")
    if not isinstance(body["messages"], list) or not body["messages"]:
        raise Refused(400, "Invalid 'messages': empty array.", code="empty_array", param="messages")
    if not 1 <= (body.get("n") or 1) <= 128:
        raise Refused(400, "Invalid 'n': integer out of range.", code="integer_out_of_range", param="n")
    if not 0 <= (body.get("temperature") or 0) <= 2:
        raise Refused(400, "Invalid 'temperature': out of range.", code="decimal_above_max_value", param="temperature")
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        raise Refused(400, "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.", param="max_tokens")
    if is_reasoning and body.get("max_tokens") is not None:
        message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        raise Refused(400, message, code="unsupported_parameter", param="max_tokens")
    if is_reasoning and body.get("temperature") not in (None, 1):
        message = "Unsupported value: 'temperature' does not support this value with this model."
        raise Refused(400, message, code="unsupported_value", param="temperature")
    waiting: set[str] = set()
    for index, message in enumerate(body["messages"]):
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant", "tool", "function"):
            raise Refused(400, f"Invalid value: '{role}'.", code="invalid_value", param=f"messages[{index}].role")
        if role == "tool":
            if message.get("tool_call_id") not in waiting:
                said = "messages with role 'tool' must be a response to a preceeding message with 'tool_calls'."
                raise Refused(400, said, param=f"messages.[{index}].role")
            waiting.discard(message["tool_call_id"])
        elif waiting:
            said = f"An assistant message with 'tool_calls' must be followed by tool messages. Missing: {', '.join(sorted(waiting))}"
            raise Refused(400, said, param=f"messages.[{index}].role")
        if role == "assistant":
            waiting = {one["id"] for one in message.get("tool_calls") or ()}
    if waiting:
        said = f"An assistant message with 'tool_calls' must be followed by tool messages. Missing: {', '.join(sorted(waiting))}"
        raise Refused(400, said, param="messages")


# What is said


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content or () if isinstance(part, dict))


def _chat_input(body: Json) -> str:
    return " ".join(_text_of(message.get("content")) for message in body["messages"])


def what_to_say(body: Json, step: Step) -> tuple[str, str, list[Json]]:
    """(text, reasoning, tool calls)"""
    asked = next((_text_of(message.get("content")) for message in reversed(body["messages"]) if message.get("role") == "user"), "")
    calls = [dict(one) for one in step.tool_calls]
    answered = any(message.get("role") == "tool" for message in body["messages"])
    if step.scenario in ("tool_call", "tool_calls_parallel") and not calls and not answered:
        names = [tool["function"]["name"] for tool in body.get("tools") or ()] or ["get_weather"]
        cities = ["Oslo", "Bergen"] if step.scenario == "tool_calls_parallel" else ["Oslo"]
        calls = [
            {
                "id": f"call_{n}",
                "type": "function",
                "function": {"name": names[n % len(names)], "arguments": f'{{"city": "{city}"}}'},
            }
            for n, city in enumerate(cities)
        ]
    if step.text is not None:
        text = step.text
    elif calls:
        text = ""
    elif answered:
        results = [_text_of(message.get("content")) for message in body["messages"] if message.get("role") == "tool"]
        text = f"results: {' '.join(results)}"
    elif (body.get("response_format") or {}).get("type") == "json_schema":
        text = json.dumps(_example(body["response_format"]["json_schema"]["schema"], body["response_format"]["json_schema"]["schema"]))
    elif step.scenario == "split_utf8":
        text = f"echo: {asked} 𝄞🚀 naïve"
    else:
        text = f"echo: {asked}"
    reasoning = step.reasoning or ("I think about it" if step.scenario == "reasoning" else "")
    return text, reasoning, calls


def _example(schema: Json, root: Json) -> Any:
    """A value that fits a JSON schema of the kind that structured output sends."""
    if "$ref" in schema:
        found: Any = root
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return _example(found, root)
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return _example(schema["anyOf"][0], root)
    match schema.get("type"):
        case "object":
            return {name: _example(inner, root) for name, inner in schema.get("properties", {}).items()}
        case "array":
            return [_example(schema.get("items", {}), root)]
        case "integer":
            return 7
        case "number":
            return 1.5
        case "boolean":
            return True
    return "text"


def _usage(asked: str, text: str, reasoning: str, tool_calls: list[Json], *, cached: bool) -> Json:
    prompt, thought = words(asked), words(reasoning)
    output = words(text) + thought + sum(words(one["function"]["arguments"]) for one in tool_calls)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": prompt // 2 if cached else 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": thought,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _chunk(made_id: str, model: str, delta: Json, reason: str | None = None, index: int = 0) -> Json:
    return {
        "id": made_id,
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": model,
        "service_tier": "default",
        "system_fingerprint": "fp_sim",
        "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}],
    }


def _chat_frames(
    made_id: str, body: Json, text: str, reasoning: str, tool_calls: list[Json], finish: str, usage: Json | None
) -> list[bytes]:
    model = body["model"]
    deltas: list[Json] = [{"role": "assistant", "content": "", "refusal": None}]
    deltas += [{"reasoning_content": piece} for piece in pieces(reasoning)]
    deltas += [{"content": piece} for piece in pieces(text)]
    for index, one in enumerate(tool_calls):
        first = {"index": index, "id": one["id"], "type": "function", "function": {"name": one["function"]["name"], "arguments": ""}}
        deltas.append({"tool_calls": [first]})
        deltas += [{"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in pieces(one["function"]["arguments"])]
    chunks = [_chunk(made_id, model, delta) for delta in deltas] + [_chunk(made_id, model, {}, finish)]
    if usage is None:
        return [*map(sse, chunks), DONE]
    last = {**_chunk(made_id, model, {}), "choices": [], "usage": usage}
    return [*(sse({**chunk, "usage": None}) for chunk in chunks), sse(last), DONE]


_TOKEN = re.compile(rb'"(?:content|reasoning_content|arguments|text|delta|audio)":"[^"]')


def _carries_text(frame: bytes) -> bool:
    # Of Responses' events only the deltas: others say the same text again.
    return _TOKEN.search(frame) is not None and (b'"type":"response.' not in frame or b'.delta"' in frame)


def _response_input(body: Json) -> str:
    given = body["input"]
    if isinstance(given, str):
        return given
    return " ".join(_text_of(item.get("content")) for item in given if isinstance(item, dict))


def _response_object(made_id: str, body: Json) -> Json:
    return {
        "id": made_id,
        "object": "response",
        "created_at": CREATED,
        "model": body["model"],
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
    }


OFFER = Offer(kind="openai", simulator=OpenAIUpstream, model="gpt-4o", can=frozenset(CAPABILITIES))

__all__ = ["DONE", "OFFER", "OpenAIUpstream", "Refused", "Step", "names", "pieces", "sse", "what_to_say"]
