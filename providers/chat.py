"""Writes OpenAI's chat answers for upstreams that speak another language: one reader for streams and for whole answers.

    class Lines(ChatReader):
        def frame(self, data: bytes, event: str) -> None:
            ...
            self.text("Hello"); self.reasoning("hm"); self.tool_call("call_1", "look_up", '{"q":1}')
            self.reason("stop"); self.count(Tokens(fresh_input=9, output=12)); self.complete()

What is emitted follows protocol reference 0.5: a first chunk with the role, one id for all, exactly one finish reason, a usage
event if and only if the client asked for one, then [DONE]. A stream that was cut off never looks whole.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from providers import wire
from providers.adapter import Ask, Reader, Target, Whole
from providers.failures import UpstreamBroke, UpstreamFailure, UpstreamProtocol
from providers.frames import Form, Frame, Frames
from providers.price import Tokens
from providers.wire import Json

MOST_BAD_FRAMES = 3
_UNREADABLE = "The upstream's stream could not be read."
REASONS = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})


class BadFrame(Exception):
    """Raised by `frame` for one that cannot be read: it is skipped; three, or nothing else, are not a stream (0.4, rule 6)."""


# What a decoder raises for bytes that are not the JSON that was expected.
_CANNOT_BE_READ = (BadFrame, msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class ChatReader(Reader):
    """Reads one answer of an upstream, a stream or whole, and says it again as OpenAI would. Subclasses say what a frame means."""

    plain_text = False  # whether text that is neither events nor JSON is an answer, too
    lines = False  # whether a stream is lines of JSON: see `Frames`
    # A finish reason is taken for the end of a stream that just stops after it (OpenAI's own form: [DONE] is often left out).
    reason_is_enough = True

    def __init__(self, ask: Ask, target: Target) -> None:
        self._ask, self._target = ask, target
        self._whole = not ask.stream
        self._wants_usage = ask.client_wants_usage
        self._id = f"chatcmpl-{ask.request_id}"
        self._created = int(time.time())
        self._model = target.public_model
        head: Json = {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._model}
        if self._wants_usage:
            head["usage"] = None
        # What all chunks share is encoded once.
        self._chunk_head = b"data: " + wire.encode_json(head)[:-1] + b',"choices":[{"index":0,"delta":'
        most_bytes = wire.MOST_ANSWER_BYTES if self._whole else wire.MOST_EVENT_BYTES
        self._frames = Frames(plain_text=self.plain_text, lines=self.lines and not self._whole, most_bytes=most_bytes)
        self._out: list[bytes] = []
        self._bad_frames = self._good_frames = 0
        self._last_was_bad = False
        self._role_said = False
        self._reason: str | None = None
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._extra: Json = {}
        self._calls: list[Json] = []
        self._arguments: list[list[str]] = []  # of each call of a whole answer: they come in many small pieces
        self.usage_details: Json = {}  # what the upstream's usage says beyond our parts, for the client
        self.about: Json = {}  # fields of a whole answer beside its choices

    # To be written by subclasses

    def frame(self, data: bytes, event: str) -> None:
        """One frame: say what it means with the methods below. Raises BadFrame, or UpstreamFailure for an error inside a 200."""
        raise NotImplementedError

    def closed(self) -> None:
        """The upstream closed without `complete()`: the last chance to make sense of it."""

    # What a frame can mean

    def text(self, text: str) -> None:
        if text:
            self._delta({"content": text}, _bytes_in(text))
            if self._whole:
                self._text.append(text)

    def reasoning(self, text: str) -> None:
        if text:
            self._delta({"reasoning_content": text}, _bytes_in(text))
            if self._whole:
                self._reasoning.append(text)

    def tool_call(self, call_id: str, name: str, arguments: str = "", **extra: Any) -> int:
        """A call that begins, often whole at once; its index. `extra`: fields beside OpenAI's own, for the next turn."""
        index = len(self._calls)
        function = {"name": name, "arguments": arguments}
        self._calls.append({"id": call_id, "type": "function", "function": dict(function), **extra})
        self._arguments.append([arguments])
        self._delta(
            {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function, **extra}]}, _bytes_in(arguments)
        )
        return index

    def more_arguments(self, index: int, arguments: str) -> None:
        if arguments:
            if self._whole:
                self._arguments[index].append(arguments)
            self._delta({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}, _bytes_in(arguments))

    def extra(self, name: str, value: object) -> None:
        """A field of the message beside OpenAI's own."""
        self._delta({name: value}, 0)
        self._extra[name] = value

    def reason(self, reason: str) -> None:
        """Why it ends, in OpenAI's words; another word counts as "stop", and only the first counts."""
        if self._reason is None:
            self._reason = reason if reason in REASONS else "stop"

    def count(self, tokens: Tokens) -> None:
        """What the upstream counted so far, whole: it replaces what was counted before."""
        self.tokens = tokens

    def complete(self) -> None:
        """The upstream said that this is all. Raises UpstreamFailure when nothing of what it said could be read."""
        if self.finished:
            return
        if self._bad_frames and not self._good_frames:
            raise self._in_place(UpstreamProtocol(_UNREADABLE))
        self.finished = True
        if self._whole:
            return
        self._say_role()
        reason = self._reason or ("tool_calls" if self._calls else "stop")
        self._out.append(self._chunk_head + b'{},"finish_reason":"' + reason.encode() + b'"}]}\n\n')
        if self._wants_usage:
            usage = usage_json(self.tokens or self._estimated(), self.usage_details)
            head = {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._model}
            self._out.append(wire.event({**head, "choices": [], "usage": usage}))
        self._out.append(wire.DONE)

    @property
    def has_calls(self) -> bool:
        return bool(self._calls)

    @property
    def form(self) -> Form:
        """What the bytes so far have shown the answer to be."""
        return self._frames.form

    @property
    def ended_between_frames(self) -> bool:
        """For `closed`: all that came could be read to its end. Where a form has no end of its own, that is one."""
        return self._good_frames > 0 and not self._last_was_bad

    # The reader's side

    def feed(self, data: bytes) -> bytes:
        if self.finished:
            return b""
        try:
            self._read_all(self._frames.feed(data))
        except UpstreamFailure as problem:
            self._fail(problem)
        return self._taken()

    def end(self) -> bytes:
        if self.failure is not None:
            raise self.failure
        if self.finished:
            return b""
        try:
            self._read_all(self._frames.end())
        except UpstreamFailure as problem:
            raise self._in_place(problem) from None
        if not self.finished:
            self.closed()
        if not self.finished and self._reason is not None and self.reason_is_enough:
            self.complete()
        if not self.finished:
            raise self._cut_off()
        return self._taken()

    def whole(self, body: bytes) -> Whole:
        """A whole answer in the upstream's stream form, as one. Raises UpstreamFailure."""
        self.feed(body)
        self.end()
        return self.answer()

    def answer(self) -> Whole:
        """What has been said so far, as OpenAI's whole answer. An answer without a word is not one: raises UpstreamProtocol."""
        text = "".join(self._text)
        if not (text or self._reasoning or self._calls or self._extra or self._reason or self.finished):
            raise UpstreamProtocol("The upstream's answer is empty.")
        message: Json = {"role": "assistant", "content": text if text or not self._calls else None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            for call, arguments in zip(self._calls, self._arguments, strict=True):
                call["function"]["arguments"] = "".join(arguments)
            message["tool_calls"] = self._calls
        message.update(self._extra)
        reason = self._reason or ("tool_calls" if self._calls else "stop")
        said: Json = {"id": self._id, "object": "chat.completion", "created": self._created, "model": self._model}
        said["choices"] = [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}]
        said["usage"] = usage_json(self.tokens or self._estimated(), self.usage_details)
        said.update(self.about)
        return Whole(wire.encode_json(said), self.tokens, output_estimate=self.estimated_output())

    def _estimated(self) -> Tokens:
        """For the client of an upstream that counts nothing: four bytes a token, as the usage row has it."""
        return Tokens(fresh_input=-(-len(wire.encode_json(self._ask.body)) // 4), output=self.estimated_output())

    def _read_all(self, frames: list[Frame]) -> None:
        for one in frames:
            self._read(one.data, one.event)
            if self.finished:
                return
        if self._frames.problem is not None:
            raise self._frames.problem

    def _read(self, data: bytes, event: str) -> None:
        if self._frames.form == "text":
            return self._plain(data)
        if data.strip() == b"[DONE]":
            return self.complete()
        try:
            self.frame(data, event)
        except _CANNOT_BE_READ:
            lines = [line for line in data.splitlines() if line.strip()]
            if len(lines) > 1 and all(line.lstrip()[:1] in (b"{", b"[") for line in lines):
                return self._lines(lines, event)
            self._bad_frames += 1
            self._last_was_bad = True
            if self._bad_frames >= MOST_BAD_FRAMES:
                raise self._in_place(UpstreamProtocol(_UNREADABLE)) from None
        else:
            self._good_frames += 1
            self._last_was_bad = False
        return None

    def _lines(self, lines: list[bytes], event: str) -> None:
        """Some upstreams leave out the blank line between events, so that several look like one (0.4, rule 2)."""
        for line in lines:
            if not self.finished:
                self._read(line, event)

    def _plain(self, data: bytes) -> None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise self._in_place(UpstreamProtocol("The upstream answered with bytes that are no text."))
        self._good_frames += 1
        self.text(text)

    def _delta(self, delta: Json, letters: int) -> None:
        self.started = True
        self.events += 1
        self.content_bytes += letters
        if not self._whole:
            self._say_role()
            self._out.append(self._chunk_head + wire.encode_json(delta) + b',"finish_reason":null}]}\n\n')

    def _say_role(self) -> None:
        if not self._role_said:
            self._role_said = True
            self._out.append(self._chunk_head + b'{"role":"assistant","content":""},"finish_reason":null}]}\n\n')

    def _taken(self) -> bytes:
        out = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        return out

    def _fail(self, problem: UpstreamFailure) -> None:
        """What came before it in the same read is sent first: how a stream was cut into reads must not decide what is heard."""
        problem = self._in_place(problem)
        if self.started and self._out:
            self.failure = problem
        else:
            raise problem

    def _in_place(self, problem: UpstreamFailure) -> UpstreamFailure:
        """Once content has gone out no other target may be tried: the same failure is then a broken stream. What it says of the
        account still holds.

        Nothing of a whole answer has gone out before all of it was read."""
        if self._whole or not self.started or isinstance(problem, UpstreamBroke):
            return problem
        broke = UpstreamBroke(problem.message, code=problem.code)
        broke.type, broke.upstream_status, broke.cause = problem.type, problem.upstream_status, problem
        return broke

    def _cut_off(self) -> UpstreamFailure:
        return self._in_place(UpstreamProtocol("The upstream's stream ended before it was complete."))


def _bytes_in(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def usage_json(tokens: Tokens, more: Json | None = None) -> Json:
    """OpenAI's usage object."""
    usage: Json = {"prompt_tokens": tokens.input, "completion_tokens": tokens.all_output, "total_tokens": tokens.total}
    if tokens.cache_read or tokens.cache_write:
        usage["prompt_tokens_details"] = {"cached_tokens": tokens.cache_read}
        if tokens.cache_write:
            usage["prompt_tokens_details"]["cache_write_tokens"] = tokens.cache_write
    if tokens.reasoning:
        usage["completion_tokens_details"] = {"reasoning_tokens": tokens.reasoning}
    return {**usage, **(more or {})}
