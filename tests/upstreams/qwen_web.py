"""The web chat of chat.qwen.ai: chats that must be made first, answers in phases, errors with status 200.

A scenario goes by script, by token (`sk-sim-limit`) or by model (`sim-limit`) and concerns the answer; by a token `sk-sim-new-limit` it
concerns the making of the chat. Source: protocol reference gemini-qwen-codegeex.md, section 3.7.
"""

from __future__ import annotations

import re
from typing import Any

from tests.upstreams import Offer
from tests.upstreams.kit import Call, Simulator, Step, compact, words
from tests.upstreams.openai import KEYS, pieces, sse

Json = dict[str, Any]

MODELS = {"qwen3-max": "Qwen3-Max", "qwen3-coder-plus": "Qwen3-Coder"}
NEW_CHAT = {"title", "models", "chat_mode", "chat_type", "timestamp"}
ASKED = {"stream", "incremental_output", "chat_id", "chat_mode", "model", "parent_id", "timestamp", "messages"}
MESSAGE = {
    "fid", "parentId", "childrenIds", "role", "content", "user_action", "files", "timestamp", "models", "chat_type", "feature_config",
    "sub_chat_type",
}  # fmt: skip
THINKING = {"thinking_enabled", "output_schema", "thinking_budget"}

# Scenario -> code and details, with status 200.
TOLD = {
    "unauthorized": ("Unauthorized", "Your token has expired."),
    "limit": ("RateLimited", "Too many requests, please wait."),
    "quota": ("RateLimited", "You have reached the upper limit for today's usage."),
    "filter": ("data_inspection_failed", "The content may be inappropriate."),
    "bad_request": ("Bad_Request", "messages are invalid"),
    "no_model": ("Not_Found", "Model not found."),
    "forbidden": ("Forbidden", "You have no permission for this model."),
    "broken": ("internal_error", "Something went wrong."),
}
TOLD |= {
    kit: TOLD[ours]
    for kit, ours in {"bad_key": "unauthorized", "no_credit": "quota", "rate_limit": "limit", "server_error": "broken"}.items()
}


class Told(Exception):
    """`{"success": false, …}`, by default with status 200."""

    def __init__(self, code: str, details: str, status: int = 200) -> None:
        super().__init__(details)
        self.status = status
        self.body = {"success": False, "request_id": "req-sim", "data": {"code": code, "details": details}}


class QwenWebUpstream(Simulator):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.chats: dict[str, str] = {}  # id -> the token that made it

    def error_frame(self) -> bytes:
        return sse(Told(*TOLD["broken"]).body)

    def big_frame(self) -> bytes:
        return sse(_said("x" * (1 << 20), "answer", "typing"))

    async def answer(self, call: Call) -> None:
        try:
            await self._route(call)
        except Told as told:
            await call.json(told.status, told.body)

    async def _route(self, call: Call) -> None:
        scheme, _, token = call.seen.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or not KEYS.fullmatch(token) or call.seen.headers.get("cookie") != f"token={token}":
            raise Told("Unauthorized", "Unauthorized", status=401)
        if call.seen.headers.get("source") != "web":
            raise Told("Bad_Request", "no source", status=400)
        match (call.seen.method, call.seen.path):
            case ("GET", "/api/models"):
                listed = [
                    {"id": one, "name": name, "object": "model", "owned_by": "qwen", "info": {"meta": {}}} for one, name in MODELS.items()
                ]
                return await call.json(200, {"data": listed})
            case ("POST", "/api/v2/chats/new"):
                return await self._new_chat(call, token)
            case ("POST", "/api/v2/chat/completions"):
                return await self._completion(call, token)
        raise Told("Not_Found", "no such route", status=404)

    async def _new_chat(self, call: Call, token: str) -> None:
        body = call.seen.json
        _check_keys(body, NEW_CHAT)
        scenario = call.chosen_scenario()
        if scenario.startswith("new-"):
            call.seen.scenario = scenario.removeprefix("new-")
            return await self._instead(call, Step(scenario=call.seen.scenario))
        chat_id = self.next_id("chat")
        self.chats[chat_id] = token
        return await call.json(200, {"success": True, "request_id": "req-sim", "data": {"id": chat_id}})

    async def _instead(self, call: Call, step: Step) -> None:
        """An answer that is none, as the scenario has it."""
        if step.scenario == "overloaded":  # what stands in front of the page says so
            return await call.whole(503, b"<html><h1>503 Service Temporarily Unavailable</h1></html>", "text/html")
        if step.scenario in TOLD:
            raise Told(*TOLD[step.scenario])
        if step.scenario == "captcha":
            return await call.json(200, {"ret": ["FAIL_SYS_USER_VALIDATE", "RGV587_ERROR"], "data": {"url": "https://captcha.example"}})
        if step.scenario == "odd_id":
            return await call.json(200, {"success": True, "data": {"id": "../../etc?x="}})
        return await call.whole_with(step, compact({"success": True, "data": {}}), ())

    async def _completion(self, call: Call, token: str) -> None:
        body = call.seen.json
        _check_keys(body, ASKED)
        chat_id = call.seen.query.get("chat_id", "")
        if self.chats.get(chat_id) != token or body["chat_id"] != chat_id:
            raise Told("Not_Found", "The chat does not exist.")
        asked = _checked_message(body)
        step = self.step_of(call)
        call.seen.scenario = step.scenario
        if step.scenario in TOLD or step.scenario in ("captcha", "overloaded"):
            return await self._instead(call, step)
        text = step.text if step.text is not None else f"echo: {_last_of_the_user(asked['content'])}"
        thinks = asked["feature_config"]["thinking_enabled"] and (step.text is None or step.scenario == "reasoning")
        thoughts = step.reasoning if step.reasoning is not None else "I think about it" if thinks else ""
        frames = list(step.frames) if step.frames is not None else _frames(words(asked["content"]), text, thoughts)
        bill = self.charge(call.seen, input_tokens=words(asked["content"]))
        async for number in call.stream_with(step, frames, "text/event-stream", ()):
            bill.output_tokens += number < len(frames) and b'"status":"typing"' in frames[number]
        bill.output_tokens = words(text) + words(thoughts)


def _check_keys(body: Any, known: set[str]) -> None:
    if not isinstance(body, dict) or body.keys() != known:
        raise Told("Bad_Request", f"expected {sorted(known)}")


def _checked_message(body: Json) -> Json:
    if body["stream"] is not True or body["incremental_output"] is not True or body["parent_id"] is not None:
        raise Told("Bad_Request", "stream and incremental_output must be true")
    if body["model"] not in MODELS and not body["model"].startswith("sim-"):
        raise Told(*TOLD["no_model"])
    [message] = body["messages"]
    _check_keys(message, MESSAGE)
    if message["role"] != "user" or not isinstance(message["content"], str) or message["models"] != [body["model"]]:
        raise Told("Bad_Request", "one message of a user")
    if message["feature_config"].keys() - THINKING or message["feature_config"].get("output_schema") != "phase":
        raise Told("Bad_Request", "unknown feature")
    return dict(message)


def _last_of_the_user(content: str) -> str:
    """Of a conversation told as one text; else the text."""
    return re.split(r"(?:^|\n\n)User: ", content)[-1]


def _said(content: str, phase: str, status: str, usage: Json | None = None) -> Json:
    delta = {"role": "assistant", "content": content, "phase": phase, "status": status, "extra": {}}
    return {"choices": [{"delta": delta}], **({"usage": usage} if usage else {})}


def _frames(asked: int, text: str, thoughts: str) -> list[bytes]:
    """Usage grows from event to event; each phase says that it is finished."""
    frames = [sse({"response.created": {"chat_id": "c", "parent_id": "p", "response_id": "r"}})]
    told = reasoned = 0
    for phase, said in (("think", thoughts), ("web_search", "a page" if thoughts else ""), ("answer", text)):
        if not said:
            continue
        for piece in pieces(said) if phase != "web_search" else [said]:
            told += phase != "web_search"
            reasoned += phase == "think"
            frames.append(sse(_said(piece, phase, "typing" if phase != "web_search" else "searching", _usage(asked, told, reasoned))))
        frames.append(sse(_said("", phase, "finished", _usage(asked, told, reasoned))))
    return frames


def _usage(asked: int, told: int, reasoned: int) -> Json:
    return {
        "input_tokens": asked,
        "output_tokens": told,
        "total_tokens": asked + told,
        "output_tokens_details": {"reasoning_tokens": reasoned},
    }


OFFER = Offer(
    kind="qwen_web",
    simulator=QwenWebUpstream,
    model="qwen3-max",
    can=frozenset({"system", "reasoning", "usage"}),
    drops=frozenset({"temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "max_tokens", "max_completion_tokens"}),
)

__all__ = ["OFFER", "QwenWebUpstream", "Step"]
