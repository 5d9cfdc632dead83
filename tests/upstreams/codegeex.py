"""An upstream that plays CodeGeeX: events with a duplicated finish, a token header, identities that belong to tokens (reference 6.4).

A scenario goes by script or by token (`sim-429`; what follows a `~` only makes it another account). A token's identity is what `accounts`
says, else what it first came with; whoever comes with another, or with one of another token, is refused and stands in `mismatches`.
"""

from __future__ import annotations

import re
import time
from email.utils import formatdate
from typing import Any

from tests.upstreams import Offer
from tests.upstreams.kit import Bill, Call, Seen, Simulator, Step, compact, replace, words

Json = dict[str, Any]
TOKENS = re.compile(r"sim-[a-z0-9_-]+(?:~[\w-]+)?")
REQUIRED = ("prompt", "model", "machineId", "talkId")
IDENTITY = ("user_id", "machineId")
PLACES = ("user_id", "user_role", "ide", "ide_version", "plugin_version", "machineId", "talkId", "locale")
FIELDS = frozenset({*PLACES, "prompt", "model", "agent", "candidates", "history", "command", "files"})
MODELS = ("codegeex-chat-pro", "codegeex-chat-lite", "claude-3-7-sonnet")


class Refused(Exception):
    """The request is not what CodeGeeX takes, or a scenario says so."""

    def __init__(self, status: int, msg: str, headers: list[tuple[str, str]] | None = None, *, http: int | None = None) -> None:
        super().__init__(msg)
        self.status = status if http is None else http
        self.body, self.headers = {"code": status, "msg": msg, "data": None}, headers or []


def refusal(scenario: str) -> Refused | None:
    """The error that a scenario stands for; None when it stands for an answer. `200-…`: said in an answer that calls itself well."""
    busy = "too many requests"
    match scenario:
        case "401" | "bad_key":
            return Refused(401, "token invalid")
        case "402" | "no_credit":
            return Refused(402, "no credit left")
        case "403" | "forbidden":
            return Refused(403, "token invalid")
        case "429" | "rate_limit":
            return Refused(429, busy, [("retry-after", "2")])
        case "rate_limit_date":
            return Refused(429, busy, [("retry-after", formatdate(time.time() + 3, usegmt=True))])
        case "rate_limit_no_header":
            return Refused(429, busy)
        case "500" | "server_error":
            return Refused(500, "internal error")
        case "503" | "overloaded":
            return Refused(503, "busy")
        case "200-401" | "200-429" | "200-500" | "200-1001":
            return Refused(int(scenario[4:]), "not this time", http=200)
    return None


class CodeGeeXUpstream(Simulator):
    """Its `base_url` is the origin."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.accounts: dict[str, Json] = {}  # token -> user_id, machineId
        self.mismatches: list[tuple[str, Json]] = []
        self.models: tuple[str, ...] = MODELS
        self.models_fail = False
        self._seen_with: dict[str, Json] = {}

    def reset(self) -> None:
        super().reset()
        self.mismatches, self._seen_with = [], {}
        self.models, self.models_fail = MODELS, False

    def bad_frame(self) -> bytes:
        return b'id:9\nevent:add\ndata:{"id":"m","te\n\n'

    def error_frame(self) -> bytes:
        return _event(9, "error", {"code": 500, "msg": "The model failed in the middle."})

    def big_frame(self) -> bytes:
        return _event(9, "add", {"id": "m", "text": "x" * (1 << 20), "finish_reason": ""})

    def step_of(self, call: Call) -> Step:
        step = super().step_of(call)
        by_token = call.seen.headers.get("code-token", "").partition("~")[0].removeprefix("sim-")
        return replace(step, scenario=by_token) if step == Step() and by_token != "ok" else step

    async def answer(self, call: Call) -> None:
        try:
            await self._answer(call)
        except Refused as refused:
            await call.json(refused.status, refused.body, refused.headers)

    async def _answer(self, call: Call) -> None:
        seen = call.seen
        match seen.method, seen.path:
            case "GET", "/prod/v3/chat/model":
                return await self._models(call)
            case "POST", "/prod/code/chatCodeSseV3/chat":
                return await self._chat(call)
            case "GET", "/prod/code/oauth/getUserInfo" | "/prod/code/oauth/logout":
                self._token(seen)
                return await call.json(200, {"code": 200, "msg": "ok", "data": {"userId": "u-1", "name": "Sim"}})
        raise Refused(404, "not found")

    def _token(self, seen: Seen) -> str:
        token = seen.headers.get("code-token", "")
        if not TOKENS.fullmatch(token):
            raise Refused(401, "token invalid")
        return token

    async def _models(self, call: Call) -> None:
        if self.models_fail:
            raise Refused(500, "internal error")
        options = [{"id": name, "name": name.title(), "description": {"zh": "…", "en": "A model."}, "host": ""} for name in self.models]
        promote = {"key": "k", "text": {"zh": "…", "en": "…"}}
        await call.json(200, {"options": options, "default": self.models[0], "promote": promote, "ip": "203.0.113.7"})

    async def _chat(self, call: Call) -> None:
        token, body = self._token(call.seen), call.seen.json
        if call.seen.headers.get("content-type") != "application/json" or not isinstance(body, dict):
            raise Refused(400, "body")
        call.seen.unknown_fields = {name: value for name, value in body.items() if name not in FIELDS}
        history = body.get("history")
        if any(not isinstance(body.get(name), str) or not body[name] for name in REQUIRED):
            raise Refused(400, "missing field")
        if history is not None and not (isinstance(history, list) and all(map(_is_turn, history))):
            raise Refused(400, "history")
        self._check_identity(token, {name: body.get(name) for name in IDENTITY})
        step = self.step_of(call)
        call.seen.scenario = step.scenario
        if (problem := refusal(step.scenario)) is not None:
            raise problem
        question = body["prompt"].rpartition("[User]\n")[2]
        text = step.text if step.text is not None else f"echo: {question}"
        asked = words(body["prompt"]) + sum(words(turn["query"]) + words(turn["answer"]) for turn in history or ())
        bill = self.charge(call.seen, input_tokens=asked)
        if step.scenario == "json":
            bill.output_tokens += words(text)
            return await call.json(200, {"code": 200, "msg": "ok", "data": {"text": text}})
        return await self._stream(call, step, text, body["model"], bill)

    def _check_identity(self, token: str, identity: Json) -> None:
        known = self.accounts.get(token) or self._seen_with.setdefault(token, identity)
        others = [theirs for other, theirs in {**self._seen_with, **self.accounts}.items() if other != token]
        mixed = any(value and value == theirs.get(name) for theirs in others for name, value in identity.items())
        if identity != known or mixed:
            self.mismatches.append((token, identity))
            raise Refused(403, "token does not match")

    async def _stream(self, call: Call, step: Step, text: str, model: str, bill: Bill) -> None:
        frames = (
            list(step.frames) if step.frames is not None else _frames(step.scenario, self.next_id("m"), model, text, step.finish_reason)
        )
        async for number in call.stream_with(step, frames, "text/event-stream; charset=utf-8", []):
            bill.output_tokens += number < len(frames) and b"event:add" in frames[number]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("query"), str) and isinstance(turn.get("answer"), str)


def _event(number: int, name: str, data: object, space: str = "") -> bytes:
    return f"id:{number}\nevent:{space}{name}\ndata:{space}".encode() + compact(data) + b"\n\n"


def _frames(scenario: str, made_id: str, model: str, text: str, reason: str | None) -> list[bytes]:
    """An increment for each word, then the whole text again."""
    space = " " if scenario == "space" else ""

    def event(number: int, name: str, said: str, why: str = "") -> bytes:
        return _event(number, name, {"id": made_id, "text": said, "finish_reason": why, "model": model}, space)

    pieces = re.findall(r"\s*\S+", text)
    adds = [event(number, "add", piece) for number, piece in enumerate(pieces, 1)]
    finish = event(len(pieces) + 1, "finish", text, reason or ("length" if scenario == "length" else "stop"))
    search = _event(0, "processing", {"type": "keyword", "data": ["sluice"]})
    match scenario:
        case "finish_only":
            return [finish]
        case "no_finish":
            return adds
        case "finish_longer":
            return [*adds, event(99, "finish", f"{text} and more", "stop")]
        case "finish_differs":
            return [*adds, event(99, "finish", "quite another text", "stop")]
        case "processing":
            return [search, *adds[:1], _event(0, "processing", {"type": "crawl", "data": {"1": {"status": "ok"}}}), *adds[1:], finish]
        case "odd_blocks":
            odd = [
                b"id:7\nevent:add\n\n",
                b"event:of-tomorrow\ndata:{}\n\n",
                b'data:{"text":"nameless"}\n\n',
                b": ping\n\n",
                b"event:add\ndata:{\n\n",
            ]
            return [*odd, *adds, finish, b"data: [DONE]\n\n"]
    return [*adds, finish]


OFFER = Offer(
    kind="codegeex",
    simulator=CodeGeeXUpstream,
    model="codegeex-chat-pro",
    can=frozenset({"system"}),
    secret="sim-ok",
    drops=frozenset(
        {
            *("temperature", "top_p", "stop", "max_tokens", "max_completion_tokens", "seed"),
            *("presence_penalty", "frequency_penalty", "user", "reasoning_effort"),
        }
    ),
)

__all__ = ["MODELS", "OFFER", "CodeGeeXUpstream", "Step"]
