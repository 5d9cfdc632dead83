"""CodeGPT: a hosted agent answers, and the request names the agent, not a model (protocol reference, section 1)."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from providers import wire
from providers.adapter import USER_AGENT, Adapter, Ask, FirstCalls, Heard, Reader, Target, Whole
from providers.chat import BadFrame, ChatReader
from providers.exchange import Outgoing
from providers.failures import (
    ContentFiltered,
    ContextLength,
    InvalidAtUpstream,
    ModelGone,
    OutOfCredit,
    RateLimited,
    UpstreamFailure,
    UpstreamProtocol,
)
from providers.plain import messages_of, refuse_what_text_cannot_be, text_of, unsupported_role
from providers.price import Tokens
from providers.said import Said, clean, failure_of_said, said_in, status_of, wait_seconds_in
from providers.wire import Json

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
REASONS = {
    "end_turn": "stop",
    "STOP": "stop",
    "max_tokens": "length",
    "MAX_TOKENS": "length",
    "tool_use": "tool_calls",
    "SAFETY": "content_filter",
}
# Names of models, which clients send that know nothing of agents: the account's default agent answers them. All other names are agents'.
MODELS = re.compile(
    r"default|o\d[\w.:-]*|(?:gpt|chatgpt|claude|gemini|gemma|deepseek|llama|command|mistral|mixtral|codestral|grok|qwen|nova|phi|kimi|glm)"
    r"[\d.:-][\w.:-]*"
)
UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# What of an agent is kept and shown; its prompt is nobody's business here.
SHOWN = ("id", "name", "agent_type", "model", "is_public", "created_at", "description")
# Older servers know only the second.
LISTS = ("/api/v1/agent", "/api/v1/agents")
NOT_THERE = frozenset({404, 405, 422})


class CodeGPT(Adapter):
    name = "codegpt"
    title = "CodeGPT"
    base_url = "https://api.codegpt.co"
    policy = "allowed"
    policy_source = "https://developers.codegpt.co/reference/completion-beta"
    policy_note = "The vendor's published API, called with an API key of the account's own. Its agents choose model and prompt."
    settings = frozenset({"agent_id", "org_id"})

    def base_url_from(self, given: str) -> str:
        """The origin, also where the API's base or its one endpoint was given: that is how the vendor's pages write it."""
        return re.sub(r"/api/v1(/chat/completions)?$", "", given.rstrip("/"))

    def first_calls(self, ask: Ask, target: Target) -> FirstCalls | None:
        return self._find_agent(ask, target) if _agent_of(target) is None else None

    def request(self, ask: Ask, target: Target) -> Outgoing:
        refuse_what_text_cannot_be(ask.body)
        body = {
            "agentId": _agent_of(target) or target.model,
            "messages": [_message(one, at) for at, one in enumerate(messages_of(ask.body))],
            "stream": ask.stream,
            "format": "json",  # how the answer travels; it has nothing to do with `response_format`
        }
        headers = {**self._headers(target), "Content-Type": "application/json", "X-Request-ID": ask.request_id}
        if ask.stream:
            headers["Accept-Encoding"] = "identity"
        return target.post("/api/v1/chat/completions", headers, wire.encode_json(body))

    def reader(self, ask: Ask, target: Target) -> Reader:
        return Agent(ask, target)

    def answer(self, ask: Ask, target: Target, body: bytes, content_type: str) -> Whole:
        said = Agent(ask, target)
        text = _one_string(body)
        if text is None:
            return said.whole(body)
        if text.lstrip().startswith("data:"):  # the first generation's: a stream, wrapped into a string
            return said.whole(text.encode())
        said.text(text)
        return said.answer()

    def failure(self, target: Target, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        said = said_in(body)
        if not said.message and "html" not in headers.get("content-type", ""):
            said = replace(said, message=_other_words(body))
        return _failure(target, status, said, wait_seconds_in(headers))

    def models_request(self, target: Target) -> Outgoing:
        return target.get(LISTS[0], self._headers(target))

    def models(self, body: bytes) -> dict[str, Json]:
        """Each agent by its id, and by its name where no other has it. The detail of both holds the id."""
        found: dict[str, Json] = {}
        names: dict[str, list[Json]] = {}
        for agent in _agents_in(body):
            detail = {name: agent[name] for name in SHOWN if name in agent}
            found[agent["id"]] = detail
            if isinstance(agent.get("name"), str) and agent["name"].strip():
                names.setdefault(agent["name"].strip(), []).append(detail)
        return {**{name: details[0] for name, details in names.items() if len(details) == 1}, **found}

    def _find_agent(self, ask: Ask, target: Target) -> Generator[Outgoing, Heard, Outgoing]:
        """The agent of a name that the stored list does not have: it may be younger than the list. Raises UpstreamFailure."""
        self.request(ask, target)  # what cannot be sent is refused before anything goes out
        for path in LISTS:
            heard = yield target.get(path, self._headers(target))
            if heard.status in NOT_THERE:
                continue
            if not 200 <= heard.status < 300:
                raise self.failure(target, heard.status, heard.headers, heard.body)
            if agent := self.models(heard.body).get(target.model):
                return self.request(ask, replace(target, detail=agent))
            break
        raise ModelGone("This account has no agent of that name.", param="model")

    def _headers(self, target: Target) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {target.secret.reveal()}", "Accept": "application/json", "User-Agent": USER_AGENT}
        # The caller's own key is of an organization that we do not know.
        if org := "" if target.callers_key else target.settings.get("org_id", ""):
            headers["CodeGPT-Org-Id"] = org
        return headers


def _agent_of(target: Target) -> str | None:
    """The id of the agent that is meant: given as such, listed under this name, or the default where a model is named."""
    given = target.model.removeprefix("agent:")
    if UUID.fullmatch(given):
        return given
    listed = target.detail.get("id")
    if isinstance(listed, str) and listed:
        return listed
    return (target.settings.get("agent_id") or None) if MODELS.fullmatch(target.model) else None


def _message(message: Json, at: int) -> Json:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise unsupported_role(message, at)
    if message.get("tool_calls") or message.get("function_call"):
        raise InvalidAtUpstream("This upstream takes no calls of tools.", param=f"messages[{at}].tool_calls", code="unsupported_parameter")
    return {"role": ROLES[role], "content": text_of(message, at)}


def _agents_in(body: bytes) -> list[Json]:
    """A bare list, or one in `data` or `agents`. Raises UpstreamProtocol."""
    try:
        listed = wire.decode_answer(body)
    except (msgspec.DecodeError, RecursionError):
        raise UpstreamProtocol("The list of agents could not be read.") from None
    if isinstance(listed, dict):
        listed = listed.get("data") if isinstance(listed.get("data"), list) else listed.get("agents")
    if not isinstance(listed, list):
        raise UpstreamProtocol("The list of agents has an unknown shape.")
    return [one for one in listed if isinstance(one, dict) and isinstance(one.get("id"), str) and one["id"]]


def _one_string(body: bytes) -> str | None:
    """The answer when it is a bare JSON string."""
    if body.lstrip()[:1] != b'"':
        return None
    try:
        return msgspec.json.decode(body, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class Agent(ChatReader):
    """Events, bare objects with nothing between them, or text; whole answers in five shapes (reference 1.4 and 1.5)."""

    plain_text = True

    def __init__(self, ask: Ask, target: Target) -> None:
        super().__init__(ask, target)
        self._delta_seen = False
        self._calls_by_id: dict[str, int] = {}
        self._last_call: dict[Any, int] = {}  # by the upstream's own index, which may name several

    def frame(self, data: bytes, event: str) -> None:
        value = wire.decode_json(data)
        if isinstance(value, str):
            return self.text(value)
        if not isinstance(value, dict):
            raise BadFrame
        self._raise_error_in(value)
        if tokens := _tokens_in(value.get("usage")):
            self.count(tokens)
        choices = value.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if isinstance(choice, dict):
            return self._choice(choice)
        for name in ("result", "data"):
            if isinstance(value.get(name), str) and not self.started:
                self.text(value[name])
        return None

    def closed(self) -> None:
        # Bare objects and text announce no end: theirs is the end of the connection, which the transport has found in order.
        if self.form in ("objects", "text") and self.started and self.ended_between_frames:
            self.complete()

    def _choice(self, choice: Json) -> None:
        delta, message = choice.get("delta"), choice.get("message")
        if isinstance(delta, dict):
            self._delta_seen = self._words(delta) or self._delta_seen
        if isinstance(message, dict) and not self._delta_seen:  # behind deltas it is the same text again
            self._delta_seen = self._words(message)
        if isinstance(reason := choice.get("finish_reason"), str) and reason:
            self.reason(REASONS.get(reason, reason))

    def _words(self, part: Json) -> bool:
        """Say what a delta or a message holds. True when that was something."""
        thought = part.get("reasoning_content") or part.get("reasoning")
        if isinstance(thought, str):
            self.reasoning(thought)
        text = _text_in(part)
        self.text(text)
        calls = part.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict):
                self._call(call)
        return bool(text or calls)

    def _call(self, call: Json) -> None:
        """An id that is new begins a call, even where the upstream's index repeats."""
        call_id, own_index = call.get("id"), str(call.get("index"))
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        arguments = function.get("arguments") or ""
        arguments = arguments if isinstance(arguments, str) else wire.encode_json(arguments).decode()
        if isinstance(call_id, str) and call_id and call_id not in self._calls_by_id:
            index = self.tool_call(call_id, str(function.get("name") or ""), arguments)
            self._calls_by_id[call_id] = self._last_call[own_index] = index
            return
        index = self._calls_by_id.get(str(call_id), self._last_call.get(own_index, -1))
        if index >= 0:
            self.more_arguments(index, arguments)

    def _raise_error_in(self, value: Json) -> None:
        """Raises the failure that an object inside a 200 tells of (reference 1.5, step 2)."""
        status = value.get("status")
        status = status if isinstance(status, int) and status >= 400 else None
        if not (status or value.get("error") or value.get("errorMessage") or value.get("detail")):
            return
        body = wire.encode_json(value)
        said = said_in(body)
        if not said.message:
            said = replace(said, message=_other_words(body))
        told = status or status_of(value.get("error") or value)
        raise _failure(self._target, told, said, None, told_in_200=status is None)


def _text_in(part: Json) -> str:
    contents, content = part.get("contents"), part.get("content")
    for listed in (contents, content):
        if isinstance(listed, list) and (text := "".join(map(_text_of_part, listed))):
            return text
    completion = part.get("completion")
    return content if isinstance(content, str) else completion if isinstance(completion, str) else ""


def _text_of_part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        return ""
    text = part.get("content") or part.get("text")
    return text if isinstance(text, str) else ""


def _tokens_in(usage: Any) -> Tokens | None:
    try:
        return msgspec.convert(usage, wire.Usage).tokens() if isinstance(usage, dict) else None
    except msgspec.ValidationError:
        return None


# What errors say


def _other_words(body: bytes) -> str:
    """The message of an error that none of the usual fields has: `errorMessage`, or the beginning of a text."""
    try:
        value = wire.decode_answer(body)
    except (msgspec.DecodeError, RecursionError):
        return clean(body[:800].decode("utf-8", "replace")[:200])
    words = value.get("errorMessage") if isinstance(value, dict) else value
    return clean(words) if isinstance(words, str) else ""


_LIMIT = re.compile(r"limit|quota|credit|interactions|upgrade", re.IGNORECASE)
_CREDIT = re.compile(r"credit|quota|plan|upgrade|daily|monthly", re.IGNORECASE)


def _failure(target: Target, status: int, said: Said, wait_seconds: float | None, *, told_in_200: bool = False) -> UpstreamFailure:
    """Which failure it is. A plan that is used up is told by its words, with whatever status (reference 1.6)."""
    problem = failure_of_said(target, status, said, wait_seconds)
    by_words = status in (400, 403, 429) or told_in_200
    if by_words and _LIMIT.search(said.message) and not isinstance(problem, ContextLength | ContentFiltered):
        kind = OutOfCredit if _CREDIT.search(said.message) else RateLimited
        problem = kind(problem.message, retry_after_seconds=wait_seconds)
        problem.upstream_status = status
    if isinstance(problem, OutOfCredit):
        problem.whole_account = True  # a plan is an account's, whatever the agent
    return problem
