"""OpenAI's shapes: what we read of a request, how an answer's usage and errors look, and how a stream is cut.

Read with a Struct (the few fields we act on), pass on as a dict, write with a Struct.
Source: protocol reference sections 0.4, 0.5, 4.4 to 4.7.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from providers.price import Tokens

Json = dict[str, Any]

# Bigger than any honest event; a stream that exceeds it is broken off (design, section 7).
MOST_EVENT_BYTES = 16 << 20
MOST_ANSWER_BYTES = 64 << 20
# What an upstream claims beyond this is nonsense, and must still fit into a row.
MOST_TOKENS = 10**12


class ApiError(Exception):
    """Something the client is told in OpenAI's error object. Subclasses say status, type and code."""

    status = 500
    type = "server_error"
    code: str | None = None
    should_retry: bool | None = None  # None: the client's own rule by status is right

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after_seconds = retry_after_seconds

    def body(self) -> Json:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


# What we read of requests. `null` means "not sent" everywhere, so every field may be None.

Number = int | float


class Head(msgspec.Struct):
    """The fields of any request that the gateway itself reads."""

    model: str | None = None
    stream: bool | None = None

    def ceiling(self) -> int | None:
        """The most output tokens that the client allows, or None."""
        return None

    def streams(self) -> bool:
        return bool(self.stream)

    def wants_usage(self) -> bool:
        """Whether the stream is to end with an event that says how many tokens it took."""
        return False

    def missing(self) -> str | None:
        """The name of a required parameter that was not sent."""
        return None

    def choices(self) -> int:
        return 1


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatHead(Head):
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    stop: str | list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None

    def ceiling(self) -> int | None:
        # An upstream may heed either.
        one, other = self.max_tokens, self.max_completion_tokens
        if one is None or other is None:
            return other if one is None else one
        return max(one, other)

    def missing(self) -> str | None:
        return "messages" if self.messages is None else None

    def choices(self) -> int:
        return max(1, self.n or 1)

    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionHead(Head):
    prompt: str | list[Any] | None = None
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    temperature: Number | None = None
    stream_options: StreamOptions | None = None

    def ceiling(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else 16  # the API's own default

    def missing(self) -> str | None:
        return "prompt" if self.prompt is None else None

    def choices(self) -> int:
        return max(1, self.n or 1, self.best_of or 1)

    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class EmbeddingsHead(Head):
    input: str | list[Any] | None = None

    def ceiling(self) -> int | None:
        return 0

    def missing(self) -> str | None:
        return "input" if self.input is None else None


class ModerationsHead(Head):
    input: str | list[Any] | None = None

    def ceiling(self) -> int | None:
        return 0

    def missing(self) -> str | None:
        return "input" if self.input is None else None


class ResponsesHead(Head):
    input: str | list[Any] | None = None
    max_output_tokens: int | None = None

    def ceiling(self) -> int | None:
        return self.max_output_tokens


class RerankHead(Head):
    query: str | None = None
    documents: list[Any] | None = None

    def ceiling(self) -> int | None:
        return 0

    def missing(self) -> str | None:
        return "query" if self.query is None else "documents" if self.documents is None else None


class ImagesHead(Head):
    prompt: str | None = None
    n: int | None = None

    def missing(self) -> str | None:
        return "prompt" if self.prompt is None else None


class SpeechHead(Head):
    input: str | None = None
    voice: str | dict[str, Any] | None = None
    stream_format: str | None = None

    def streams(self) -> bool:
        return bool(self.stream) or self.stream_format == "sse"

    def missing(self) -> str | None:
        return "input" if self.input is None else "voice" if self.voice is None else None


# What we read of answers


class Details(msgspec.Struct, frozen=True):
    cached_tokens: Number | None = None
    cache_write_tokens: Number | None = None
    reasoning_tokens: Number | None = None


_NO_DETAILS = Details()


class Usage(msgspec.Struct):
    """Both spellings: `prompt_tokens` of chat and `input_tokens` of Responses."""

    prompt_tokens: Number | None = None
    completion_tokens: Number | None = None
    input_tokens: Number | None = None
    output_tokens: Number | None = None
    prompt_tokens_details: Details | None = None
    completion_tokens_details: Details | None = None
    input_tokens_details: Details | None = None
    output_tokens_details: Details | None = None
    prompt_cache_hit_tokens: Number | None = None  # DeepSeek's place for what the cache gave
    cached_tokens: Number | None = None  # and Moonshot's
    total_tokens: Number | None = None

    def has_no_details(self) -> bool:
        return (
            self.prompt_tokens_details is None
            and self.completion_tokens_details is None
            and self.input_tokens_details is None
            and self.output_tokens_details is None
            and self.prompt_cache_hit_tokens is None
            and self.cached_tokens is None
        )

    def tokens(self) -> Tokens | None:
        """Disjoint parts, or None when the object counts nothing."""
        prompt = self.prompt_tokens if self.prompt_tokens is not None else self.input_tokens
        completion = self.completion_tokens if self.completion_tokens is not None else self.output_tokens
        if prompt is None and completion is None:
            if self.total_tokens is None:
                return None
            prompt = self.total_tokens
        prompt, completion = _within(prompt, MOST_TOKENS), _within(completion, MOST_TOKENS)
        if self.has_no_details():
            return Tokens(prompt, 0, 0, completion, 0)
        before = self.prompt_tokens_details or self.input_tokens_details or _NO_DETAILS
        after = self.completion_tokens_details or self.output_tokens_details or _NO_DETAILS
        said_cached = before.cached_tokens
        if said_cached is None:
            said_cached = self.cached_tokens if self.prompt_cache_hit_tokens is None else self.prompt_cache_hit_tokens
        cached = _within(said_cached, prompt) if said_cached else 0
        written = _within(before.cache_write_tokens, prompt - cached) if before.cache_write_tokens else 0
        reasoning = _within(after.reasoning_tokens, completion) if after.reasoning_tokens else 0
        return Tokens(
            fresh_input=prompt - cached - written,
            cache_read=cached,
            cache_write=written,
            output=completion - reasoning,
            reasoning=reasoning,
        )


def _within(part: Number | None, whole: int) -> int:
    count = int(part or 0)
    return whole if count > whole else count if count > 0 else 0


class Delta(msgspec.Struct):
    content: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    reasoning_details: Any = None
    audio: Any = None


class Choice(msgspec.Struct):
    index: Number | str | None = None
    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None


class InnerResponse(msgspec.Struct):
    usage: Usage | None = None


class Event(msgspec.Struct):
    """What we look at in one event of a stream, or in a whole answer, whichever endpoint it belongs to."""

    type: str | None = None
    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    response: InnerResponse | None = None


_decode_event = msgspec.json.Decoder(Event).decode
decode_json = msgspec.json.Decoder().decode
encode_json = msgspec.json.Encoder().encode
# How deep lists and objects may lie in each other. What a decoder itself takes is another depth for each version of Python.
MOST_LEVELS = 500
_OUTER = (dict, list)


def is_too_deep(value: object) -> bool:
    """More than MOST_LEVELS levels of lists and objects, in what was JSON."""
    level = [value] if isinstance(value, _OUTER) else []
    for _ in range(MOST_LEVELS):
        level = [inner for outer in level for inner in (outer.values() if type(outer) is dict else outer) if isinstance(inner, _OUTER)]
        if not level:
            return False
    return True


_NOT_UTF8 = "A text in it is not UTF-8."


def decode_answer(data: bytes) -> Any:
    """What an upstream sent as JSON. Raises msgspec.DecodeError or RecursionError when it is none."""
    try:
        return decode_json(data)
    except UnicodeDecodeError:  # which a decoder lets through
        raise msgspec.DecodeError(_NOT_UTF8) from None


def decode_event(data: bytes) -> Event:
    """One event or one whole answer. A field of unknown shape degrades to "some content": only an object is insisted on.

    Raises msgspec.DecodeError or RecursionError when it is not a JSON object."""
    try:
        return _decode_event(data)
    except UnicodeDecodeError:
        raise msgspec.DecodeError(_NOT_UTF8) from None
    except msgspec.ValidationError:
        value = decode_answer(data)
        if not isinstance(value, dict):
            raise
        return Event(error=value.get("error"), choices=[Choice(text="?")])


DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(value) + b"\n\n"


def whole_events(buffer: bytes) -> int:
    """How many bytes of `buffer` are whole events: up to and with the last blank line (LF, CRLF or CR)."""
    lf = buffer.rfind(b"\n\n")
    if b"\r" not in buffer:
        return lf + 2 if lf >= 0 else 0
    crlf = buffer.rfind(b"\n\r\n")
    cr = buffer.rfind(b"\r\r")
    return max(lf + 2 if lf >= 0 else 0, crlf + 3 if crlf >= 0 else 0, cr + 2 if cr >= 0 else 0)


_MOST_EVENTS_BYTES = 512
# Atomic groups: a lone CRLF must not pass for two line ends.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)+")


def first_event(events: bytes, at: int) -> bytes:
    """The event that begins at `at`, with the blank line that ends it."""
    # Not further than most events reach: where lines end otherwise there is none, and each event would look through all that follow.
    end = events.find(b"\n\n", at, at + _MOST_EVENTS_BYTES) + 2
    if end < 2 and events.find(b"\r", at, at + _MOST_EVENTS_BYTES) < 0:
        end = events.find(b"\n\n", at) + 2
    if end > 1 and events.find(b"\r", at, end + 1) < 0 and events[end : end + 1] != b"\n":
        return events[at:end]  # as nearly all end
    found = _BLANK_LINE.search(events, at)
    return events[at : found.end()] if found is not None else events[at:]


def split_events(events: bytes) -> list[bytes]:
    """Cut whole events apart, each with the blank line that ends it: joined again they are the input."""
    ends = [found.end() for found in _BLANK_LINE.finditer(events)]
    if not ends or ends[-1] != len(events):
        ends.append(len(events))
    return [events[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def data_of(event_bytes: bytes) -> bytes:
    """The data of one event: its `data:` lines (with or without the space) joined with LF; empty for a comment."""
    if event_bytes.startswith(b"data: ") and event_bytes.find(b"\n") == len(event_bytes) - 2 and b"\r" not in event_bytes:
        return event_bytes[6:-2]  # one line of data, as nearly all have
    lines = event_bytes.splitlines()
    data = [line[6:] if line.startswith(b"data: ") else line[5:] for line in lines if line.startswith(b"data:")]
    return data[0] if len(data) == 1 else b"\n".join(data)
