"""A small OpenAI-compatible server inside the process: models to try a client with, without any network.

    echo            gives back the last message, word by word
    tools           calls the tools it is offered (two at once when there are two), then tells what they said
    reasoning       thinks aloud before it answers
    slow            lets wait: five seconds for the first word, then one a second
    long            a thousand words
    json            an instance of the schema in `response_format`
    embeddings      the same unit vector for the same text, always
    moderation      flags what holds the word "flag"
    error-429 ...   refuses as a real upstream does, by status
    error-stream    reports an error in the middle of a stream
    cut             breaks off in the middle of a stream

`<model>-<seconds>` sets the pause between words, and five times that before the first of `slow`: `slow-0.2`, `echo-0`.
Tokens are words. No field of a request is trusted to have the right type, and unknown ones are ignored.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import re
import struct
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from providers import wire
from providers.demo_schema import instance_of
from providers.wire import Json

# Seconds between words, by model.
PAUSES = {"echo": 0.02, "tools": 0.02, "reasoning": 0.02, "slow": 1.0, "long": 0.0, "json": 0.02, "cut": 0.02, "error-stream": 0.02}
SLOW_START = 5  # pauses before the first word of `slow`
LONGEST_PAUSE_SECONDS = 60.0
LONG_WORDS = 1000
MOST_CHOICES = 8
EMBEDDING_DIMENSIONS, MOST_DIMENSIONS = 256, 4096
MOST_INPUTS = 2048

# status -> message, type, param, code, headers
ERRORS: dict[int, tuple[str, str, str | None, str | None, dict[str, str]]] = {
    400: ("This model takes no 'temperature' of that size.", "invalid_request_error", "temperature", "unsupported_value", {}),
    401: ("The API key that was sent is not a valid one.", "invalid_request_error", None, "invalid_api_key", {}),
    402: ("The balance of this account is used up. Add credit to go on.", "insufficient_quota", None, "insufficient_quota", {}),
    403: ("This service is not offered in your region.", "request_forbidden", None, "unsupported_country_region_territory", {}),
    404: ("There is no such model, or this account has no access to it.", "invalid_request_error", "model", "model_not_found", {}),
    408: ("The request took too long to arrive.", "timeout", None, "request_timeout", {}),
    409: ("Another request changes the same thing just now.", "invalid_request_error", None, "conflict", {}),
    413: ("The request body is larger than this service takes.", "invalid_request_error", None, "request_too_large", {}),
    422: ("The request is well formed and still makes no sense.", "invalid_request_error", "messages", "unprocessable", {}),
    429: ("Too many requests in this minute for this account.", "rate_limit_error", None, "rate_limit_exceeded", {"retry-after": "1"}),
    500: ("Something went wrong on our side while this was worked on.", "server_error", None, None, {}),
    503: ("The service is overloaded just now.", "service_unavailable_error", None, "server_is_overloaded", {"retry-after": "1"}),
    529: ("The service is overloaded for everybody just now.", "overloaded_error", None, "overloaded", {}),
}

MODELS = [*PAUSES, "embeddings", "moderation", *(f"error-{status}" for status in ERRORS)]


class Refused(Exception):
    """What is wrong with a request, as OpenAI's error object says it."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",  # noqa: A002 the wire's own name
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body: Json = {"error": {"message": message, "type": type, "param": param, "code": code}}


@dataclass(slots=True)
class Turn:
    """What a model says, whichever API is asked: thoughts, words, tool calls, and why it ends."""

    words: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish: str = "stop"
    pause: float = 0.0  # seconds between words
    wait: float = 0.0  # seconds before the first
    prompt_tokens: int = 1
    choices: int = 1
    ending: str = "whole"  # or "cut", or "error": what happens in the middle of it

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def output_tokens(self) -> int:
        each = len(self.words) + len(self.thoughts) + sum(len(_words(call.arguments)) + 1 for call in self.calls)
        return self.choices * max(1, each)

    @property
    def whole_seconds(self) -> float:
        return self.wait + self.pause * len(self.words) if self.wait else 0.0


@dataclass(frozen=True, slots=True)
class Call:
    id: str
    name: str
    arguments: str  # JSON


class DemoTransport(httpx.AsyncBaseTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        headers = {"x-request-id": f"req_{uuid.uuid4().hex}"}
        try:
            reply = await _reply(request.url.path.removeprefix("/v1/"), await request.aread())
        except Refused as refused:
            return httpx.Response(refused.status, headers=headers | refused.headers, json=refused.body)
        if isinstance(reply, bytes):
            return httpx.Response(200, headers=headers | {"content-type": "application/json"}, content=reply)
        return httpx.Response(200, headers=headers | {"content-type": "text/event-stream"}, stream=_Events(reply))


class _Events(httpx.AsyncByteStream):
    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self._events = events

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for event in self._events:
            yield event


async def _reply(endpoint: str, content: bytes) -> bytes | AsyncIterator[bytes]:
    """A whole answer, or the events of a stream. Raises Refused."""
    try:
        body = wire.decode_json(content)
    except (msgspec.DecodeError, RecursionError):
        raise Refused("The body of the request is not valid JSON.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Refused("The body of the request is not a JSON object.", code="invalid_json")
    model = _text(body, "model")
    if model is None:
        raise Refused("You must provide a model parameter.", param="model", code="missing_required_parameter")
    if (found := re.fullmatch(r"error-(\d{3})", model)) and int(found[1]) in ERRORS:
        message, kind, param, code, headers = ERRORS[int(found[1])]
        raise Refused(message, status=int(found[1]), type=kind, param=param, code=code, headers=headers)
    match endpoint:
        case "chat/completions":
            turn = _turn(model, body)
            return _chat_events(model, body, turn) if _streams(body) else await _whole(turn, _chat(model, turn))
        case "completions":
            turn = _completion_turn(model, body)
            return _completion_events(model, body, turn) if _streams(body) else await _whole(turn, _completion(model, turn))
        case "responses":
            turn = _turn(model, _chat_of_responses(body))
            return _response_events(model, turn) if _streams(body) else await _whole(turn, _response(model, turn))
        case "embeddings":
            return wire.encode_json(_embeddings(model, body))
        case "moderations":
            return wire.encode_json(_moderations(model, body))
        case "rerank":
            return wire.encode_json(_rerank(model, body))
    raise Refused(f"There is no '/v1/{endpoint}' here.", status=404)


async def _whole(turn: Turn, answer: Json) -> bytes:
    await asyncio.sleep(turn.whole_seconds)
    encoded = wire.encode_json(answer)
    if turn.ending == "error":
        message, kind, param, code, headers = ERRORS[500]
        raise Refused(message, status=500, type=kind, param=param, code=code, headers=headers)
    return encoded[: len(encoded) // 2] if turn.ending == "cut" else encoded


# What a request says


def _wrong(param: str, wanted: str) -> Refused:
    return Refused(f"Invalid type for '{param}': expected {wanted}.", param=param, code="invalid_type")


def _text(body: Json, name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise _wrong(name, "a string")
    return value


def _whole_number(body: Json, name: str, *, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(name, "an integer")
    if not least <= value <= most:
        raise Refused(f"Invalid '{name}': {value} is not between {least} and {most}.", param=name, code="integer_out_of_range")
    return value


def _list(body: Json, name: str) -> list[Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, list):
        raise _wrong(name, "an array")
    return value or []


def _object(body: Json, name: str) -> Json:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise _wrong(name, "an object")
    return value or {}


def _streams(body: Json) -> bool:
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise _wrong("stream", "a boolean")
    if body.get("stream_options") is not None and not stream:
        raise Refused("'stream_options' is only allowed when 'stream' is enabled.", param="stream_options")
    return bool(stream)


def _wants_usage(body: Json) -> bool:
    return _object(body, "stream_options").get("include_usage") is True


def _words(text: str) -> list[str]:
    """Cut before each word; joined again they are the text."""
    return re.findall(r"\s*\S+|\s+$", text)


def _content(message: object, at: str) -> str:
    """The text of one message; other parts are named."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _wrong(at, "a message with a role")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise _wrong(f"{at}.content", "a string or an array of parts")
    return " ".join(_part(part) for part in content)


def _part(part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return ""
    text = part.get("text")
    return text if isinstance(text, str) else f"[{part.get('type', 'part')}]"


# What the models say


def _turn(model: str, body: Json) -> Turn:
    """Raises Refused."""
    name, pause = _named(model)
    messages = _list(body, "messages")
    if not messages:
        raise Refused("Invalid 'messages': at least one message is needed.", param="messages", code="empty_array")
    texts = [_content(message, f"messages[{at}]") for at, message in enumerate(messages)]
    asked = next((text for text, message in zip(reversed(texts), reversed(messages), strict=True) if message["role"] == "user"), texts[-1])
    turn = Turn(pause=pause, prompt_tokens=max(1, sum(len(_words(text)) for text in texts)))
    turn.choices = _whole_number(body, "n", least=1, most=MOST_CHOICES) or 1
    _SPEAK[name](turn, asked, body)
    _end_early(turn, body)
    return turn


def _named(model: str) -> tuple[str, float]:
    name, dash, seconds = model.rpartition("-")
    if dash and name in PAUSES and re.fullmatch(r"\d{1,3}(\.\d{1,3})?", seconds):
        return name, min(float(seconds), LONGEST_PAUSE_SECONDS)
    if model in PAUSES:
        return model, PAUSES[model]
    raise _no_model(model)


def _no_model(model: str) -> Refused:
    return Refused(f"The model '{model[:100]}' does not exist, or cannot do this.", status=404, param="model", code="model_not_found")


def _echo(turn: Turn, asked: str, body: Json) -> None:
    turn.words = _words(asked) or _words("Send me a message and I will give it back, word by word.")


def _slow(turn: Turn, asked: str, body: Json) -> None:
    _echo(turn, asked, body)
    turn.wait = SLOW_START * turn.pause


def _long(turn: Turn, asked: str, body: Json) -> None:
    turn.words = [f"{number} " for number in range(1, LONG_WORDS + 1)]


def _cut(turn: Turn, asked: str, body: Json) -> None:
    _echo(turn, asked, body)
    turn.ending = "cut"


def _error_in_stream(turn: Turn, asked: str, body: Json) -> None:
    _echo(turn, asked, body)
    turn.ending = "error"


def _reasoning(turn: Turn, asked: str, body: Json) -> None:
    turn.thoughts = _words(f"The user wrote {len(_words(asked))} words. I could think about them for long, and will simply give them back.")
    _echo(turn, asked, body)


def _json(turn: Turn, asked: str, body: Json) -> None:
    wanted = _object(body, "response_format")
    if wanted.get("type") == "json_schema":
        schema = _object(_object(wanted, "json_schema"), "schema")
        turn.words = _words(wire.encode_json(instance_of(schema)).decode())
    elif wanted.get("type") == "json_object":
        turn.words = _words(wire.encode_json({"message": asked}).decode())
    else:
        turn.words = _words("Send a 'response_format' with a JSON schema, and I will fill it in.")


def _tools(turn: Turn, asked: str, body: Json) -> None:
    messages = _list(body, "messages")
    results = [_content(message, "messages") for message in messages[_last_user(messages) :] if message["role"] == "tool"]
    offered = [] if results or body.get("tool_choice") == "none" else list(_functions(body))
    if results:
        turn.words = _words("The tools said: " + "; ".join(results))
    elif not offered:
        turn.words = _words("Offer me a tool and I will call it.")
    else:
        most = 1 if body.get("parallel_tool_calls") is False else 2
        turn.calls = [
            Call(f"call_{uuid.uuid4().hex[:24]}", name, wire.encode_json(instance_of(parameters)).decode())
            for name, parameters in offered[:most]
        ]
        turn.finish = "tool_calls"


_SPEAK: dict[str, Callable[[Turn, str, Json], None]] = {
    "echo": _echo,
    "tools": _tools,
    "reasoning": _reasoning,
    "slow": _slow,
    "long": _long,
    "json": _json,
    "cut": _cut,
    "error-stream": _error_in_stream,
}


def _last_user(messages: Sequence[Any]) -> int:
    return max((at for at, message in enumerate(messages) if message["role"] == "user"), default=0)


def _functions(body: Json) -> Iterator[tuple[str, Json]]:
    """(name, schema of its parameters) of the tools offered, or only of the one that must be called."""
    choice = body.get("tool_choice")
    named = choice.get("function") if isinstance(choice, dict) else None
    only = named.get("name") if isinstance(named, dict) else None
    for at, tool in enumerate(_list(body, "tools")):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"Missing required parameter: 'tools[{at}].function.name'.", param=f"tools[{at}].function.name")
        if only is None or function["name"] == only:
            parameters = function.get("parameters")
            yield function["name"], parameters if isinstance(parameters, dict) else {}


def _end_early(turn: Turn, body: Json) -> None:
    """Honour `stop`, and the ceiling on tokens: thoughts count before words."""
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else _list(body, "stop")
    if any(not isinstance(word, str) for word in stops):
        raise _wrong("stop", "a string or an array of strings")
    ends = [turn.text.find(word) for word in stops if word and word in turn.text]
    if ends:
        turn.words = _words(turn.text[: min(ends)])
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    ceiling = _whole_number(body, name, least=1, most=1 << 31)
    if ceiling is not None and not turn.calls and len(turn.thoughts) + len(turn.words) > ceiling:
        turn.thoughts = turn.thoughts[:ceiling]
        turn.words = turn.words[: ceiling - len(turn.thoughts)]
        turn.finish = "length"


# Chat


def _usage(turn: Turn) -> Json:
    return {
        "prompt_tokens": turn.prompt_tokens,
        "completion_tokens": turn.output_tokens,
        "total_tokens": turn.prompt_tokens + turn.output_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": turn.choices * len(turn.thoughts)},
    }


def _call(call: Call) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _chat(model: str, turn: Turn) -> Json:
    message: Json = {"role": "assistant", "content": turn.text if turn.words or not turn.calls else None, "refusal": None}
    if turn.thoughts:
        message["reasoning_content"] = "".join(turn.thoughts)
    if turn.calls:
        message["tool_calls"] = [_call(call) for call in turn.calls]
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": index, "message": message, "logprobs": None, "finish_reason": turn.finish} for index in range(turn.choices)],
        "usage": _usage(turn),
    }


def _deltas(turn: Turn) -> Iterator[Json]:
    for thought in turn.thoughts:
        yield {"reasoning_content": thought}
    for word in turn.words:
        yield {"content": word}
    for index, call in enumerate(turn.calls):
        yield {"tool_calls": [{"index": index, **_call(Call(call.id, call.name, ""))}]}
        for start in range(0, len(call.arguments), 12):
            yield {"tool_calls": [{"index": index, "function": {"arguments": call.arguments[start : start + 12]}}]}


async def _chat_events(model: str, body: Json, turn: Turn) -> AsyncIterator[bytes]:
    chunk: Json = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    with_usage = _wants_usage(body)

    def event(delta: Json, finish: str | None = None) -> bytes:
        choices = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish} for index in range(turn.choices)]
        return b"".join(wire.event({**chunk, "choices": [one], **({"usage": None} if with_usage else {})}) for one in choices)

    await asyncio.sleep(turn.wait)
    yield event({"role": "assistant", "content": None if turn.calls else "", "refusal": None})
    async for part in _paced(turn, [event(delta) for delta in _deltas(turn)]):
        yield part
    if turn.ending != "whole":
        return
    yield event({}, turn.finish)
    if with_usage:
        yield wire.event({**chunk, "choices": [], "usage": _usage(turn)})
    yield wire.DONE


async def _paced(turn: Turn, events: Sequence[bytes]) -> AsyncIterator[bytes]:
    """One after the other; of a turn that breaks off only the first half."""
    stop = len(events) if turn.ending == "whole" else max(1, len(events) // 2)
    for event in events[:stop]:
        yield event
        await asyncio.sleep(turn.pause)
    if turn.ending == "error":
        message, kind, param, code, _ = ERRORS[500]
        yield wire.event({"error": {"message": message, "type": kind, "param": param, "code": code}})


# Completions of the older kind


def _completion_turn(model: str, body: Json) -> Turn:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(one, str) for one in prompt):
        prompt = prompt[0]
    elif isinstance(prompt, list):
        prompt = f"({len(prompt)} tokens)"
    if not isinstance(prompt, str):
        raise _wrong("prompt", "a string or an array")
    ceiling = 16 if body.get("max_tokens") is None else body["max_tokens"]
    chat = {"messages": [{"role": "user", "content": prompt}], "max_tokens": ceiling, "stop": body.get("stop"), "n": body.get("n")}
    return _turn(model, chat)


def _completion_choices(turn: Turn, text: str, finish: str | None) -> list[Json]:
    return [{"index": index, "text": text, "logprobs": None, "finish_reason": finish} for index in range(turn.choices)]


def _completion(model: str, turn: Turn) -> Json:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": _completion_choices(turn, turn.text, turn.finish),
        "usage": _usage(turn),
    }


async def _completion_events(model: str, body: Json, turn: Turn) -> AsyncIterator[bytes]:
    chunk: Json = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model}
    await asyncio.sleep(turn.wait)
    async for part in _paced(turn, [wire.event({**chunk, "choices": _completion_choices(turn, word, None)}) for word in turn.words]):
        yield part
    if turn.ending != "whole":
        return
    yield wire.event({**chunk, "choices": _completion_choices(turn, "", turn.finish)})
    if _wants_usage(body):
        yield wire.event({**chunk, "choices": [], "usage": _usage(turn)})
    yield wire.DONE


# Responses


def _chat_of_responses(body: Json) -> Json:
    """The same request in the words of chat."""
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else _list(body, "input")
    messages: list[Json] = [{"role": "system", "content": _text(body, "instructions")}] if body.get("instructions") else []
    for item in items:
        if isinstance(item, dict) and item.get("type") == "function_call_output":
            messages.append({"role": "tool", "content": str(item.get("output", ""))})
        elif isinstance(item, dict) and "role" in item:
            messages.append(item)
    wanted = _object(_object(body, "text"), "format")
    tools = [{"function": tool} for tool in _list(body, "tools") if isinstance(tool, dict) and tool.get("type") == "function"]
    choice = body.get("tool_choice")
    return {
        "messages": messages,
        "max_completion_tokens": body.get("max_output_tokens"),
        "tools": tools,
        "tool_choice": {"function": choice} if isinstance(choice, dict) else choice,
        "parallel_tool_calls": body.get("parallel_tool_calls"),
        "response_format": {"type": wanted["type"], "json_schema": wanted} if isinstance(wanted.get("type"), str) else None,
    }


def _items(turn: Turn) -> list[Json]:
    """The output items of a response, whole."""
    items: list[Json] = []
    if turn.thoughts:
        summary = [{"type": "summary_text", "text": "".join(turn.thoughts)}]
        items.append({"type": "reasoning", "id": f"rs_{uuid.uuid4().hex}", "summary": summary})
    if turn.words or not turn.calls:
        content = [{"type": "output_text", "text": turn.text, "annotations": [], "logprobs": []}]
        items.append({"type": "message", "id": f"msg_{uuid.uuid4().hex}", "status": "completed", "role": "assistant", "content": content})
    for call in turn.calls:
        named = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
        items.append({"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "status": "completed", **named})
    return items


def _response(model: str, turn: Turn, items: list[Json] | None = None) -> Json:
    cut_short = turn.finish == "length"
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if cut_short else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut_short else None,
        "instructions": None,
        "metadata": {},
        "model": model,
        "output": _items(turn) if items is None else items,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": {
            "input_tokens": turn.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": turn.output_tokens,
            "output_tokens_details": {"reasoning_tokens": len(turn.thoughts)},
            "total_tokens": turn.prompt_tokens + turn.output_tokens,
        },
    }


async def _response_events(model: str, turn: Turn) -> AsyncIterator[bytes]:
    items = _items(turn)
    whole = _response(model, turn, items)
    begun = {**whole, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    number = iter(range(1 << 30))

    def event(kind: str, **fields: Any) -> bytes:
        return f"event: {kind}\n".encode() + wire.event({"type": kind, "sequence_number": next(number), **fields})

    await asyncio.sleep(turn.wait)
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    for index, item in enumerate(items):
        yield event("response.output_item.added", output_index=index, item=_empty(item))
        async for part in _paced(turn, list(_item_events(event, item, index, turn))):
            yield part
        if turn.ending != "whole":
            return
        yield event("response.output_item.done", output_index=index, item=item)
    yield event(f"response.{whole['status']}", response=whole)


def _empty(item: Json) -> Json:
    """An item as it is announced, before anything of it has been said."""
    emptied = {"content": [], "arguments": "", "summary": [], "status": "in_progress"}
    return {name: emptied.get(name, value) for name, value in item.items()}


def _item_events(event: Callable[..., bytes], item: Json, index: int, turn: Turn) -> Iterator[bytes]:
    at = {"item_id": item["id"], "output_index": index}
    if item["type"] == "message":
        [part] = item["content"]
        yield event("response.content_part.added", **at, content_index=0, part={**part, "text": ""})
        for word in turn.words:
            yield event("response.output_text.delta", **at, content_index=0, delta=word, logprobs=[])
        yield event("response.output_text.done", **at, content_index=0, text=part["text"], logprobs=[])
        yield event("response.content_part.done", **at, content_index=0, part=part)
    elif item["type"] == "function_call":
        arguments = item["arguments"]
        for start in range(0, len(arguments), 12):
            yield event("response.function_call_arguments.delta", **at, delta=arguments[start : start + 12])
        yield event("response.function_call_arguments.done", **at, name=item["name"], arguments=arguments)
    else:
        [summary] = item["summary"]
        yield event("response.reasoning_summary_part.added", **at, summary_index=0, part={**summary, "text": ""})
        for thought in turn.thoughts:
            yield event("response.reasoning_summary_text.delta", **at, summary_index=0, delta=thought)
        yield event("response.reasoning_summary_text.done", **at, summary_index=0, text=summary["text"])
        yield event("response.reasoning_summary_part.done", **at, summary_index=0, part=summary)


# Embeddings, moderations, rerank


def _embeddings(model: str, body: Json) -> Json:
    if model != "embeddings":
        raise _no_model(model)
    texts = _inputs(body.get("input"))
    dimensions = _whole_number(body, "dimensions", least=1, most=MOST_DIMENSIONS) or EMBEDDING_DIMENSIONS
    form = _text(body, "encoding_format") or "float"
    if form not in ("float", "base64"):
        raise Refused(f"Invalid value: '{form[:50]}'. Supported: 'float' and 'base64'.", param="encoding_format", code="invalid_value")
    vectors = [unit_vector(text, dimensions) for text in texts]
    tokens = sum(max(1, len(_words(text))) for text in texts)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector if form == "float" else _packed(vector)}
            for index, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _inputs(given: object) -> list[str]:
    """Texts, from any of the four forms: a text, several, a list of token numbers, or several such."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and 0 < len(given) <= MOST_INPUTS:
        if all(isinstance(one, str) for one in given):
            return given
        if all(isinstance(one, int) for one in given):
            return [" ".join(map(str, given))]
        if all(isinstance(one, list) and one and all(isinstance(token, int) for token in one) for one in given):
            return [" ".join(map(str, one)) for one in given]
    raise Refused("Invalid 'input': a text, or a list of texts or token numbers, is needed.", param="input", code="invalid_type")


def unit_vector(text: str, dimensions: int) -> list[float]:
    """Length 1, and the same for the same text, on every machine."""
    numbers = struct.unpack(f"<{dimensions}h", hashlib.shake_256(text.encode("utf-8", "replace")).digest(2 * dimensions))
    length = math.sqrt(sum(number * number for number in numbers)) or 1.0
    return [number / length for number in numbers]


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _moderations(model: str, body: Json) -> Json:
    if model != "moderation":
        raise _no_model(model)
    given = body.get("input")
    texts = [given] if isinstance(given, str) else [_part(one) for one in _list(body, "input")]
    if not texts:
        raise Refused("Missing required parameter: 'input'.", param="input", code="missing_required_parameter")
    return {"id": f"modr-{uuid.uuid4().hex}", "model": model, "results": [_judged(text) for text in texts]}


_CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip


def _judged(text: str) -> Json:
    flagged = re.search(r"\bflag\b", text, re.IGNORECASE) is not None
    return {
        "flagged": flagged,
        "categories": {name: flagged and name == "harassment" for name in _CATEGORIES},
        "category_scores": {name: 0.99 if flagged and name == "harassment" else 0.0 for name in _CATEGORIES},
        "category_applied_input_types": {name: ["text"] if flagged and name == "harassment" else [] for name in _CATEGORIES},
    }


def _rerank(model: str, body: Json) -> Json:
    """By the share of the question's words that a document has."""
    _named(model)
    query = _text(body, "query")
    documents = [_part(one) for one in _list(body, "documents")]
    if query is None or not documents:
        raise Refused("A 'query' and 'documents' are needed.", param="query" if query is None else "documents")
    asked = set(query.lower().split())
    scores = [len(asked & set(document.lower().split())) / max(1, len(asked)) for document in documents]
    best = sorted(range(len(documents)), key=lambda index: (-scores[index], index))
    most = _whole_number(body, "top_n", least=1, most=len(documents) + MOST_INPUTS) or len(documents)
    tokens = sum(len(_words(text)) for text in (query, *documents))
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": model,
        "results": [{"index": index, "relevance_score": scores[index], "document": {"text": documents[index]}} for index in best[:most]],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
