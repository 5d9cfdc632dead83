"""The chat of chat.qwen.ai, with the token of somebody's browser: private, fragile, and a chat without tools.

Each call makes a chat first, and then says all that the client's messages say as one message in it. The answer always comes as a stream of
phases. Reference gemini-qwen-codegeex.md, 3.7.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from uuid import uuid4

import msgspec

from providers import wire
from providers.adapter import USER_AGENT, Ask, FirstCalls, OpenAICompatible, Reader, Target, Whole
from providers.chat import BadFrame, ChatReader
from providers.exchange import Outgoing
from providers.failures import (
    ContentFiltered,
    ForbiddenAtUpstream,
    InvalidAtUpstream,
    OutOfCredit,
    UpstreamFailure,
    UpstreamProtocol,
)
from providers.said import Said, clean, failure_of_said, said_in, wait_seconds_in
from providers.wire import Json

_CHAT_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")  # it goes into an address
CHAT_TYPE = "search"  # the only one that was seen to work
THOUGHT_TOKENS = {"minimal": 1024, "low": 1024, "medium": 8192, "high": 24_576, "xhigh": 32_768}
MOST_THOUGHT_TOKENS = 1_000_000
USUAL_THOUGHT_TOKENS = 38_912  # what the page itself asks for
# Without these an answer would be wrong, and nothing there could heed them. What else is not known there is dropped.
REFUSED = frozenset({"tools", "functions", "function_call", "logprobs", "top_logprobs", "logit_bias", "stop", "audio", "prediction"})


class QwenWeb(OpenAICompatible):
    name = "qwen_web"
    title = "Qwen chat (browser token)"
    base_url = "https://chat.qwen.ai"
    policy = "restricted"
    policy_source = "https://chat.qwen.ai/legal-agreement/terms-of-service"
    policy_note = "A private interface of a web page, called with a person's own browser token; it may ask for a captcha at any time."
    endpoints = frozenset({"chat/completions"})

    def headers(self, target: Target) -> dict[str, str]:
        headers = {"User-Agent": USER_AGENT, "Content-Type": "application/json", "source": "web"}
        if target.secret:
            token = target.secret.reveal()
            headers |= {"Authorization": f"Bearer {token}", "Cookie": f"token={token}"}
        return headers

    def request(self, ask: Ask, target: Target) -> Outgoing:
        """Makes a chat. `first_calls` sends it and goes on with what it gives."""
        _check(ask.body)
        chat = {
            "title": "New Chat",
            "models": [target.model],
            "chat_mode": "normal",
            "chat_type": CHAT_TYPE,
            "timestamp": int(time.time()),
        }
        headers = {**self.headers(target), "Accept": "application/json", "X-Request-ID": ask.request_id}
        return target.post("/api/v2/chats/new", headers, wire.encode_json(chat))

    def first_calls(self, ask: Ask, target: Target) -> FirstCalls:
        heard = yield self.request(ask, target)
        if not 200 <= heard.status < 300:
            raise self.failure(target, heard.status, heard.headers, heard.body)
        return self._call(ask, target, _chat_id_in(heard.body, target))

    def _call(self, ask: Ask, target: Target, chat_id: str) -> Outgoing:
        now = int(time.time())
        message = {
            "fid": str(uuid4()),
            "parentId": None,
            "childrenIds": [],
            "role": "user",
            "content": said_by(ask.body["messages"]),
            "user_action": "chat",
            "files": [],
            "timestamp": now,
            "models": [target.model],
            "chat_type": CHAT_TYPE,
            "feature_config": _thinking(ask.body),
            "sub_chat_type": CHAT_TYPE,
        }
        body = {
            "stream": True,
            "incremental_output": True,
            "chat_id": chat_id,
            "chat_mode": "normal",
            "model": target.model,
            "parent_id": None,
            "timestamp": now,
            "messages": [message],
        }
        headers = {**self.headers(target), "Accept": "text/event-stream", "Accept-Encoding": "identity", "X-Request-ID": ask.request_id}
        return target.post(f"/api/v2/chat/completions?chat_id={chat_id}", headers, wire.encode_json(body))

    def reader(self, ask: Ask, target: Target) -> Reader:
        return Phases(ask, target)

    def answer(self, ask: Ask, target: Target, body: bytes, content_type: str) -> Whole:
        return Phases(ask, target).whole(body)

    def failure(self, target: Target, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        try:
            told = wire.decode_json(body)
        except (msgspec.DecodeError, RecursionError):
            told = None
        if (problem := failure_told(told, target)) is not None:
            problem.upstream_status = status
            return problem
        return failure_of_said(target, status, said_in(body), wait_seconds_in(headers))

    def models_request(self, target: Target) -> Outgoing | None:
        return target.get("/api/models", self.headers(target))

    def models(self, body: bytes) -> dict[str, Json]:
        try:
            told = wire.decode_json(body)
        except (msgspec.DecodeError, RecursionError):
            told = None
        if (problem := failure_told(told, None)) is not None:
            raise problem
        return super().models(body)


# Requests


def _check(body: Json) -> None:
    """Raises InvalidAtUpstream for what would be answered wrongly in silence."""

    def refuse(name: str) -> None:
        raise InvalidAtUpstream(f"Qwen's web chat has no '{name}'.", param=name, code="unsupported_parameter")

    for name in REFUSED & body.keys():
        if body[name]:
            refuse(name)
    if (body.get("n") or 1) != 1:
        refuse("n")
    if body.get("tool_choice") not in (None, "none", "auto"):
        refuse("tool_choice")
    wanted = body.get("response_format")
    if isinstance(wanted, dict) and wanted.get("type") != "text":
        refuse("response_format")
    effort = body.get("reasoning_effort")
    if effort not in (None, "none", *THOUGHT_TOKENS):
        known = ", ".join(["none", *THOUGHT_TOKENS])
        raise InvalidAtUpstream(f"'reasoning_effort' is one of {known}.", param="reasoning_effort", code="invalid_value")
    budget = body.get("thinking_budget")
    if budget is not None and not (isinstance(budget, int) and 0 <= budget <= MOST_THOUGHT_TOKENS):
        raise InvalidAtUpstream("'thinking_budget' is a number of tokens.", param="thinking_budget", code="invalid_value")
    for message in body["messages"]:
        if message.get("role") in ("tool", "function") or message.get("tool_calls"):
            refuse("messages")
        _text_of(message.get("content"))


def _thinking(body: Json) -> Json:
    """DashScope's own switches go before `reasoning_effort`; without either it is as the page has it."""
    effort = body.get("reasoning_effort")
    thinks = body.get("enable_thinking")
    thinks = effort != "none" if thinks is None else bool(thinks)
    budget = body.get("thinking_budget") or THOUGHT_TOKENS.get(str(effort), USUAL_THOUGHT_TOKENS)
    config: Json = {"thinking_enabled": thinks, "output_schema": "phase"}
    return {**config, "thinking_budget": budget} if thinks else config


NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


def said_by(messages: list[Json]) -> str:
    """A conversation as one text. One message alone is said as it is."""
    told = [(NAMES.get(str(one.get("role")), "User"), _text_of(one.get("content"))) for one in messages]
    told = [(name, text) for name, text in told if text]
    if len(told) == 1:
        return told[0][1]
    return "\n\n".join(f"{name}: {text}" for name, text in told)


def _text_of(content: object) -> str:
    """Raises InvalidAtUpstream for a part that is no text: pictures and files would have to be uploaded there first."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise InvalidAtUpstream("A message's content is text.", param="messages", code="invalid_value")
    texts: list[str] = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            raise InvalidAtUpstream(
                f"Qwen's web chat takes text alone, no {kind or 'such part'}.", param="messages", code="unsupported_content"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _chat_id_in(body: bytes, target: Target) -> str:
    try:
        told = wire.decode_json(body)
    except (msgspec.DecodeError, RecursionError):
        told = None
    if (problem := failure_told(told, target)) is not None:
        raise problem
    data = told.get("data") if isinstance(told, dict) else None
    chat_id = data.get("id") if isinstance(data, dict) else None
    if not isinstance(chat_id, str) or not _CHAT_ID.fullmatch(chat_id):
        raise UpstreamProtocol("The upstream made no chat.")
    return chat_id


# Failures


def failure_told(told: object, target: Target | None) -> UpstreamFailure | None:
    """What `{"success": false, "data": {"code", "details"}}` or a captcha means, whatever status it came with."""
    if not isinstance(told, dict):
        return None
    if isinstance(told.get("ret"), list):
        problem = ForbiddenAtUpstream("The upstream wants to see a person: a captcha is to be solved in the browser.", code="captcha")
        problem.upstream_status = problem.status
        return problem
    if told.get("success") is not False:
        return None
    data = told["data"] if isinstance(told.get("data"), dict) else told
    code, details = data.get("code"), data.get("details") or data.get("message")
    message = clean(details) if isinstance(details, str) else ""
    code = code if isinstance(code, str) and code.isascii() and code.replace("_", "").replace(".", "").isalnum() else None
    return _failure_by(Said(message=message, code=code), target)


_MEANING: tuple[tuple[int, tuple[str, ...]], ...] = (
    (401, ("unauthorized", "token_expired", "invalid_token", "not_login", "not logged in", "token has expired")),
    (403, ("forbidden", "permission")),
    (404, ("model_not_found", "model not found", "not_found")),
    (429, ("ratelimit", "rate_limit", "rate limit", "too many", "too_many")),
    (400, ("bad_request", "badrequest", "invalid")),
)


def _failure_by(said: Said, target: Target | None) -> UpstreamFailure:
    text = f"{said.code or ''} {said.message}".lower()
    problem: UpstreamFailure
    if "inspection" in text or "inappropriate" in text:
        problem = ContentFiltered(said.message or "The upstream's content policy refused this.")
    elif "quota" in text or "upper limit" in text or "usage limit" in text:
        problem = OutOfCredit(said.message or "No quota left on the upstream account.")
    else:
        status = next((status for status, words in _MEANING if any(word in text for word in words)), 500)
        return failure_of_said(target, status, said)
    problem.upstream_status = problem.status
    return problem


# Answers


class Phases(ChatReader):
    """Thoughts come in phases `think` and `thinking_summary`, text in `answer`; what it looks up is not shown."""

    def frame(self, data: bytes, event: str) -> None:
        told = wire.decode_json(data)
        if not isinstance(told, dict):
            raise BadFrame
        if (problem := failure_told(told, self._target)) is not None:
            raise problem
        if told.get("error"):
            raise failure_of_said(self._target, 500, said_in(data))
        if isinstance(usage := told.get("usage"), dict):
            self._count(usage)
        choices = told.get("choices")
        delta = choices[0].get("delta") if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        if isinstance(delta, dict):
            self._delta_of(delta)

    def _delta_of(self, delta: Json) -> None:
        phase, content = delta.get("phase"), delta.get("content")
        text = content if isinstance(content, str) else ""
        if phase in ("think", "thinking_summary"):
            self.reasoning(text)
        elif phase in ("answer", None):
            self.text(text)
        if phase in ("answer", None) and delta.get("status") == "finished":
            self.reason("stop")

    def _count(self, usage: Json) -> None:
        try:
            tokens = msgspec.convert(usage, wire.Usage).tokens()
        except msgspec.ValidationError:
            return
        if tokens is not None:
            self.count(tokens)
