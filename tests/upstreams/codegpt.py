"""An upstream that plays CodeGPT: agents of one organization, answers in each of the forms that have been seen (reference 1.10).

A scenario goes by script or by credential (`sk-sim-daily`). `framing` and `shape` say in which form streams and whole answers come;
a step names another with its scenario (`bare_json`, `shape_3`). Fields that the published API does not know are recorded.
"""

from __future__ import annotations

import re
import time
from email.utils import formatdate
from typing import Any

from tests.upstreams import Offer
from tests.upstreams.kit import CREATED, Bill, Call, Seen, Simulator, Step, compact, replace, words

Json = dict[str, Any]
ORG = "6b1c2d3e-0000-4000-8000-00000000000a"
DOCS = "0f8c2f0e-6f0f-4a0c-9f0b-3a6f0a1b2c3d"
CODE = "1a2b3c4d-6f0f-4a0c-9f0b-3a6f0a1b2c3d"
TWIN, OTHER_TWIN = "2a2b3c4d-6f0f-4a0c-9f0b-3a6f0a1b2c3d", "3a2b3c4d-6f0f-4a0c-9f0b-3a6f0a1b2c3d"
AGENTS: list[Json] = [
    {"id": DOCS, "name": "Docs helper", "agent_type": "custom", "model": "gpt-4o", "is_public": False,
     "created_at": "2026-01-05T10:00:00Z", "welcome": "Hi", "prompt": "You answer from the docs."},
    {"id": CODE, "status": True, "name": "coder", "documentId": [], "description": "Writes code", "prompt": "p", "topk": 3,
     "model": "claude-4-sonnet-bedrock", "welcome": "", "maxTokens": 500, "user_created": "u", "date_created": "2024"},
    {"id": TWIN, "name": "twin", "model": "gpt-4o"},
    {"id": OTHER_TWIN, "name": "twin", "model": "gpt-4o"},
]  # fmt: skip
FRAMINGS = ("contents", "delta_content", "bare_json", "text", "ext", "no_space")
SHAPES = ("shape_1", "shape_2", "shape_3", "shape_4", "shape_4_data", "shape_5", "shape_5_text", "shape_5_events")
FIELDS = frozenset({"agentId", "messages", "stream", "format"})
KEYS = re.compile(r"sk-sim-[a-z0-9_-]+(?:~[\w-]+)?")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DONE = b"data: [DONE]\n\n"


class Refused(Exception):
    """The request is not what CodeGPT takes, or a scenario says so."""

    def __init__(self, status: int, detail: object, headers: list[tuple[str, str]] | None = None) -> None:
        super().__init__(detail)
        self.status, self.body, self.headers = status, {"detail": detail}, headers or []


def refusal(scenario: str) -> Refused | None:
    """The error that a scenario stands for; None when it stands for an answer."""
    busy = "Too many requests"
    match scenario:
        case "401" | "bad_key" | "expired":
            return Refused(401, "Invalid API key")
        case "402" | "no_credit" | "nocredit":
            return Refused(402, "You have no credits left. Upgrade your plan.")
        case "403" | "forbidden":
            return Refused(403, "Organization not found")
        case "404":
            return Refused(404, "Agent not found")
        case "400":
            return Refused(400, "The model refused the conversation: its last turn is the model's.")
        case "400-plan":
            return Refused(400, "Monthly interactions used up, upgrade to go on")
        case "422":
            return Refused(422, [{"loc": ["body", "messages"], "msg": "field required", "type": "value_error.missing"}])
        case "429" | "rate_limit":
            return Refused(429, busy, [("retry-after", "2")])
        case "rate_limit_date":
            return Refused(429, busy, [("retry-after", formatdate(time.time() + 3, usegmt=True))])
        case "rate_limit_no_header":
            return Refused(429, busy)
        case "daily":
            return Refused(429, "Daily interactions limit reached")
        case "500" | "server_error":
            return Refused(500, "Internal Server Error")
        case "503" | "overloaded":
            return Refused(503, "Service Unavailable")
    return None


class CodeGPTUpstream(Simulator):
    """Its `base_url` is the origin."""

    def __init__(self, *, org_required: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.org_required = org_required
        self.agents = list(AGENTS)
        self.old_list = False  # only the older path lists agents

    def bad_frame(self) -> bytes:
        return b'data: {"choices":[{"delta":{"contents":[{"type":"te\n\n'

    def error_frame(self) -> bytes:
        return _sse({"errorName": "ModelError", "errorMessage": "The model failed in the middle."})

    def big_frame(self) -> bytes:
        return _sse({"choices": [{"delta": {"content": "x" * (1 << 20)}}]})

    async def answer(self, call: Call) -> None:
        try:
            await self._answer(call)
        except Refused as refused:
            await call.json(refused.status, refused.body, refused.headers)

    async def _answer(self, call: Call) -> None:
        seen = call.seen
        scheme, _, key = seen.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or not KEYS.fullmatch(key):
            raise Refused(401, "Invalid API key")
        if seen.headers.get("codegpt-org-id", ORG if not self.org_required else "") != ORG:
            raise Refused(403, "Organization not found")
        if (seen.method, seen.path) == ("POST", "/api/v1/chat/completions"):
            return await self._chat(call)
        lists = "/api/v1/agents" if self.old_list else "/api/v1/agent"
        if seen.method == "GET" and seen.path == lists:
            return await call.json(200, {"agents": self.agents} if self.old_list else self.agents)
        one = next((agent for agent in self.agents if seen.path == f"/api/v1/agent/{agent['id']}"), None)
        if seen.method != "GET" or one is None:
            raise Refused(404, "Not Found")
        return await call.json(200, one)

    async def _chat(self, call: Call) -> None:
        body = self._checked(call.seen)
        step = self.step_of(call)
        call.seen.scenario = step.scenario
        if (problem := refusal(step.scenario)) is not None:
            raise problem
        if step.scenario == "slow":
            step = replace(step, delay_first_ms=300)
        question = next((one["content"] for one in reversed(body["messages"]) if one["role"] == "user"), "")
        text = step.text if step.text is not None else f"echo: {question}"
        counted = {"prompt_tokens": sum(words(one["content"]) for one in body["messages"]), "completion_tokens": words(text)}
        usage = dict(step.usage or {**counted, "total_tokens": sum(counted.values())})
        if step.scenario == "no_usage":
            usage = {}
        bill = self.charge(call.seen, input_tokens=counted["prompt_tokens"])
        if body.get("stream"):
            return await self._stream(call, step, text, usage, bill)
        bill.output_tokens += words(text)
        content_type, whole = _whole(step.scenario, self.next_id("chat"), text, usage, step.finish_reason or "stop")
        await call.whole_with(replace(step, content_type=step.content_type or content_type), step.body or whole, [])

    def _checked(self, seen: Seen) -> Json:
        body = seen.json
        if seen.headers.get("content-type") != "application/json" or not isinstance(body, dict):
            raise _invalid("body", "value is not a valid dict")
        seen.unknown_fields = {name: value for name, value in body.items() if name not in FIELDS}
        agent = body.get("agentId")
        if not isinstance(agent, str) or not UUID.fullmatch(agent):
            raise _invalid("agentId", "value is not a valid uuid")
        if all(one["id"] != agent for one in self.agents):
            raise Refused(404, "Agent not found")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise _invalid("messages", "field required")
        if body.get("format", "json") not in ("json", "text"):
            raise _invalid("format", "unexpected value")
        return body

    async def _stream(self, call: Call, step: Step, text: str, usage: Json, bill: Bill) -> None:
        if step.frames is not None:
            frames = [(bytes(frame), False) for frame in step.frames]
        else:
            framing = step.scenario if step.scenario in FRAMINGS else "contents"
            frames = _FRAMES[framing](self.next_id("c"), text, usage, step.finish_reason or "stop")
        kind = "text/plain; charset=utf-8" if step.scenario == "text" else "text/event-stream; charset=utf-8"
        send = replace(step, scenario="coalesced") if step.scenario == "bare_json" else step
        async for number in call.stream_with(send, [frame for frame, _ in frames], kind, []):
            bill.output_tokens += number < len(frames) and frames[number][1]


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and one.get("role") in ("user", "assistant", "system") and isinstance(one.get("content"), str)


def _invalid(field: str, msg: str) -> Refused:
    return Refused(422, [{"loc": ["body", field], "msg": msg, "type": "value_error"}])


def _sse(value: object) -> bytes:
    return b"data: " + compact(value) + b"\n\n"


# Each form of a stream: frames, and whether each carries a word


def _pieces(text: str) -> list[str]:
    return re.findall(r"\s*\S+", text)


Frames = list[tuple[bytes, bool]]


def _choice(made_id: str, delta: Json, reason: str | None = None) -> Json:
    return {"id": made_id, "created": CREATED, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def _contents(made_id: str, text: str, usage: Json, reason: str) -> Frames:
    deltas = [{"contents": [{"type": "text", "content": piece}]} for piece in _pieces(text)]
    return _as_events(made_id, deltas, usage, reason)


def _delta_content(made_id: str, text: str, usage: Json, reason: str) -> Frames:
    return _as_events(made_id, [{"content": piece} for piece in _pieces(text)], usage, reason)


def _as_events(made_id: str, deltas: list[Json], usage: Json, reason: str) -> Frames:
    last = _choice(made_id, {}, reason) | ({"usage": usage} if usage else {})
    return [*((_sse(_choice(made_id, delta)), True) for delta in deltas), (_sse(last), False), (DONE, False)]


def _no_space(made_id: str, text: str, usage: Json, reason: str) -> Frames:
    return [(frame.replace(b"data: ", b"data:"), carries) for frame, carries in _contents(made_id, text, usage, reason)]


def _bare_json(made_id: str, text: str, usage: Json, reason: str) -> Frames:
    """Nothing between the objects, no finish reason and no terminator."""
    frames = [(compact({"choices": [{"delta": {"content": piece}}]}), True) for piece in _pieces(text)]
    return [*frames, (compact({"choices": [], "usage": usage}), False)] if usage else frames


def _text(made_id: str, text: str, usage: Json, reason: str) -> Frames:
    return [(piece.encode(), True) for piece in _pieces(text)]


def _ext(made_id: str, text: str, usage: Json, reason: str) -> Frames:
    """As the vendor's extension gets it: metadata first, thoughts, a snapshot of all at the end."""
    events = [
        {"model": "gpt-4o", "usedModel": "gpt-4o-2024", "agentName": "Docs helper", "metadata": {"a": 1}},
        _choice(made_id, {"reasoning": "hm "}),
        *(_choice(made_id, {"content": piece}) for piece in _pieces(text)),
        {"id": made_id, "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}]},
        {"choices": [], "usage": usage},
    ]
    return [*((_sse(event), b'"delta"' in compact(event)) for event in events), (DONE, False)]


_FRAMES = {
    "contents": _contents,
    "delta_content": _delta_content,
    "bare_json": _bare_json,
    "text": _text,
    "ext": _ext,
    "no_space": _no_space,
}


def _whole(shape: str, made_id: str, text: str, usage: Json, reason: str) -> tuple[str, bytes]:
    """Content type and body in one of the five shapes (reference 1.4)."""
    match shape:
        case "shape_2":
            return "application/json", compact({"choices": [{"message": {"completion": text}}]})
        case "shape_3":
            return "application/json", compact({"choices": [{"message": {"contents": [{"type": "text", "content": text}]}}]})
        case "shape_4":
            return "application/json", compact({"result": text})
        case "shape_4_data":
            return "application/json", compact({"data": text})
        case "shape_5":
            return "application/json", compact(text)
        case "shape_5_text":
            return "text/plain; charset=utf-8", text.encode()
        case "shape_5_events":
            stream = b"".join(frame for frame, _ in _contents(made_id, text, usage, reason))
            return "application/json", compact(stream.decode())
    message = {"role": "assistant", "content": text}
    answer = {"id": made_id, "object": "chat.completion", "created": CREATED, "model": "gpt-4o"}
    answer["choices"] = [{"index": 0, "message": message, "finish_reason": reason}]
    return "application/json", compact({**answer, "usage": usage} if usage else answer)


OFFER = Offer(
    kind="codegpt",
    simulator=CodeGPTUpstream,
    model=DOCS,
    can=frozenset({"system", "usage"}),
    settings={"org_id": ORG},
    drops=frozenset(
        {
            *("temperature", "top_p", "stop", "max_tokens", "max_completion_tokens", "seed"),
            *("presence_penalty", "frequency_penalty", "user", "reasoning_effort"),
        }
    ),
)

__all__ = ["CODE", "DOCS", "FRAMINGS", "OFFER", "ORG", "OTHER_TWIN", "SHAPES", "TWIN", "CodeGPTUpstream", "Step"]
