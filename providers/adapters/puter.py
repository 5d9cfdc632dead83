"""Puter: every chat model of many vendors behind `POST /drivers/call`, answered in one envelope or in lines of JSON.

Protocol reference 3. Which vendor answers decides the shape of messages, the names in `usage` and what is heeded of a
request; the answer says it only when it is whole. So what goes out is what every route takes, and what comes back is
read by what is in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any, TypeGuard

import msgspec
from msgspec.structs import replace

from providers import wire
from providers.adapter import USER_AGENT, Adapter, Ask, Reader, Target, Whole
from providers.chat import BadFrame, ChatReader
from providers.exchange import Outgoing
from providers.failures import (
    ContentFiltered,
    CredentialRefused,
    InvalidAtUpstream,
    OutOfCredit,
    UpstreamFailed,
    UpstreamFailure,
    UpstreamProtocol,
)
from providers.price import Rates, Tokens
from providers.said import Said, clean, failure_of_said, said_in, wait_seconds_in
from providers.wire import MOST_TOKENS, Json


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


PROVIDERS = _names(
    "claude azure-openai azure-openai-responses openai-completion openai-responses gemini meta groq deepseek mistral xai moonshotai "
    "minimax zai alibaba ollama infron openrouter together-ai byteplus neuralwatt fake-chat"
)
RESELLERS = frozenset({"openrouter", "infron", "together-ai"})
HIDDEN_MODELS = frozenset({"fake", "costly", "abuse"})
# These answer in place of a model that a prompt was kept from (reference 3.8).
STAND_INS = {"fake-chat": "fake", "fake": "fake", "abuse": "abuse"}
MODES = frozenset({"raw", "standard", "full"})
FILLER = "Continue."
OPENER = "(conversation continues)"
NO_RESULT = "(no result)"
MOST_CENTS = 1e12  # what a call may say it costs
XAI_MOST_TOKENS = 1000  # what this route asks for, whatever was wanted
_FLAGS = frozenset({"message_mode_header", "standard_strict_seed", "full_keep_tools", "require_usage_line"})
_ON, _OFF = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


class Puter(Adapter):
    name = "puter"
    title = "Puter"
    base_url = "https://api.puter.com"
    policy = "allowed"
    policy_source = "https://github.com/HeyPuter/puter"
    policy_note = (
        "Free and paid accounts may call this route. Its model is that each person pays with an account of their own: let callers bring "
        "their token (pass_through), or hold only accounts that are yours."
    )
    settings = frozenset({"message_mode", "provider", "standard_filler"}) | _FLAGS
    reads = frozenset({"x-message-mode"})

    def setting_from(self, name: str, given: str) -> str:
        if name == "message_mode" and given.lower() not in MODES:
            raise ValueError(f"'message_mode' is one of {', '.join(sorted(MODES))}.")
        if name == "provider" and given not in PROVIDERS:
            raise ValueError(f"Puter has no provider '{given}'. Known: {', '.join(sorted(PROVIDERS))}.")
        if name in _FLAGS and given.lower() not in _ON | _OFF:
            raise ValueError(f"'{name}' is a switch: 1 or 0.")
        return given if name == "standard_filler" else given.lower()

    def request(self, ask: Ask, target: Target) -> Outgoing:
        if not target.secret:
            raise CredentialRefused("This account has no token of its own: bring one in X-Upstream-Key.")
        headers = {
            "Authorization": f"Bearer {target.secret.reveal()}",
            "User-Agent": USER_AGENT,
            "Content-Type": "application/json",
            "Accept": "application/x-ndjson, application/json" if ask.stream else "application/json",
            "Accept-Encoding": "identity" if ask.stream else "gzip",
            "X-Request-ID": ask.request_id,
        }
        call = {"interface": "puter-chat-completion", "method": "complete", "args": _arguments(ask, target)}
        return target.post("/drivers/call", headers, wire.encode_json(call))

    def reader(self, ask: Ask, target: Target) -> Reader:
        return Lines(ask, target)

    def answer(self, ask: Ask, target: Target, body: bytes, content_type: str) -> Whole:
        return Lines(ask, target).whole(body)

    def failure(self, target: Target, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        return _failure(target, status, said_in(body), wait_seconds_in(headers), _error_in(body))

    def models_request(self, target: Target) -> Outgoing | None:
        """The list is public: no token goes with it."""
        return target.get("/puterai/chat/models/details", {"User-Agent": USER_AGENT, "Accept": "application/json"})

    def models(self, body: bytes) -> dict[str, Json]:
        """By `puterId`, else `id`, as Puter's own list of names has them. Where several routes have one, the vendor's own counts."""
        found: dict[str, Json] = {}
        for one in _listed(body):
            detail = {"id": one} if isinstance(one, str) else one
            name = (detail.get("puterId") or detail.get("id")) if isinstance(detail, dict) else None
            if not isinstance(name, str) or not name or name in HIDDEN_MODELS:
                continue
            if name not in found or (found[name].get("provider") in RESELLERS and detail.get("provider") not in RESELLERS):
                found[name] = detail
        return found

    def price_of(self, detail: Json) -> Rates | None:
        """`costs` are US cents per `costs.tokens` tokens. None for what a price by the token cannot say."""
        costs = detail.get("costs")
        if not isinstance(costs, dict) or detail.get("costs_currency") != "usd-cents" or _amount(costs.get("request")):
            return None
        unit = _amount(costs.get("tokens"))
        fresh, output = (_amount(costs.get(str(detail.get(key)))) for key in ("input_cost_key", "output_cost_key"))
        if not unit or fresh is None or output is None:
            return None
        cache_read = _first_amount(costs, ("cache_read_input_tokens", "input_cache_read", "cached_tokens"))
        cache_write = _first_amount(costs, ("ephemeral_5m_input_tokens", "input_cache_write", "ephemeral_1h_input_tokens"))
        return Rates(
            input=_micro(fresh, unit),
            output=_micro(max(output, _amount(costs.get("thinking_tokens")) or output), unit),
            cache_read=None if cache_read is None else _micro(cache_read, unit),
            cache_write=None if cache_write is None else _micro(cache_write, unit),
        )

    def quota_request(self, target: Target) -> Outgoing | None:
        if not target.secret:
            return None
        headers = {"Authorization": f"Bearer {target.secret.reveal()}", "User-Agent": USER_AGENT, "Accept": "application/json"}
        return target.get("/metering/usage", headers)

    def quota(self, body: bytes) -> dict[str, Json]:
        """The month's allowance, which is told in micro-cents (inferred, reference 3.9)."""
        try:
            allowance = wire.decode_json(body)["allowanceInfo"]
            limit, remaining = allowance["monthUsageAllowance"], allowance["remaining"]
            return {"month": {"used": _dollars(limit - remaining), "limit": _dollars(limit), "unit": "USD"}}
        except (msgspec.DecodeError, RecursionError, KeyError, TypeError):
            raise UpstreamProtocol("The account's allowance could not be read.") from None


def _dollars(micro_cents: float) -> float:
    return round(micro_cents / 10**8, 6)


def _listed(body: bytes) -> list[Any]:
    """The models in `{"models": […]}`, in the driver's envelope, or in a bare list."""
    try:
        seen = wire.decode_json(body)
    except (msgspec.DecodeError, RecursionError):
        raise UpstreamProtocol("The list of models could not be read.") from None
    for name in ("result", "models"):
        if isinstance(seen, dict) and name in seen:
            seen = seen[name]
    if not isinstance(seen, list):
        raise UpstreamProtocol("The list of models has an unknown shape.")
    return seen


def _amount(value: object) -> Decimal | None:
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        return None
    return amount if amount.is_finite() and 0 <= amount <= 10**12 else None


def _first_amount(costs: Json, names: Iterable[str]) -> Decimal | None:
    return next((amount for name in names if (amount := _amount(costs.get(name))) is not None), None)


def _micro(cents: Decimal, tokens: Decimal) -> int:
    """A million tokens in micro-dollars, where so many tokens cost so many cents."""
    return int((cents * 10**10 / tokens).to_integral_value(ROUND_HALF_UP))


# What goes out (reference 3.3, 3.13)

_PASSED = ("temperature", "top_p", "verbosity", "service_tier", "compaction", "context_management", "image_config", "vision")
_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}


def _arguments(ask: Ask, target: Target) -> Json:
    body, settings = ask.body, target.settings
    _refuse_what_would_be_ignored(body)
    tools, choice, hint = _tools(body)
    mode = _mode(ask, settings)
    if mode == "full" and not _is_on(settings.get("full_keep_tools")):
        tools, choice, hint = [], None, ""
    messages = prepared(_with_hint(body["messages"], hint), _shape(target))
    if mode == "standard":
        strict = _is_on(settings.get("standard_strict_seed"))
        messages = standard(messages, strict=strict, filler=settings.get("standard_filler") or FILLER)
    elif mode == "full":
        messages = full(messages)
    if not messages:
        raise InvalidAtUpstream("There is no message with anything in it.", param="messages")
    args: Json = {"messages": messages, "model": target.model, "stream": ask.stream}
    if settings.get("provider"):
        args["provider"] = settings["provider"]
    if (most := _most_tokens(body)) is not None:
        args["max_tokens"] = most
    args.update((name, body[name]) for name in _PASSED if body.get(name) is not None)
    if effort := _effort(body):
        args["reasoning_effort"] = effort
    if tools:
        args["tools"] = tools
        if choice is not None:
            args["tool_choice"] = choice
        if body.get("parallel_tool_calls") is not None:
            args["parallel_tool_calls"] = body["parallel_tool_calls"]
    return args


def _mode(ask: Ask, settings: Mapping[str, str]) -> str:
    """The account's, or the caller's where the account leaves that to callers."""
    mode = settings.get("message_mode") or "raw"
    wanted = ask.headers.get("x-message-mode", "").lower()
    if not wanted or not _is_on(settings.get("message_mode_header")):
        return mode
    if wanted not in MODES:
        raise InvalidAtUpstream(f"'X-Message-Mode' is one of {', '.join(sorted(MODES))}.", param="X-Message-Mode", code="invalid_value")
    return wanted


def _most_tokens(body: Json) -> int | None:
    most = body.get("max_completion_tokens")
    return most if most is not None else body.get("max_tokens")


def _unsupported(param: str, message: str) -> InvalidAtUpstream:
    return InvalidAtUpstream(message, param=param, code="unsupported_parameter")


def _refuse_what_would_be_ignored(body: Json) -> None:
    """What no route heeds, and what would be missed in the answer."""
    if (body.get("n") or 1) != 1:
        raise _unsupported("n", "Puter gives one answer to a request: 'n' must be 1.")
    if (body.get("response_format") or {}).get("type", "text") != "text":
        raise _unsupported("response_format", "Puter does not hold models to a format: ask for it in a message, and check the answer.")
    for name in ("functions", "audio", "web_search_options"):
        if body.get(name):
            raise _unsupported(name, f"Puter does not know '{name}'." + (" Send 'tools'." if name == "functions" else ""))
    if set(body.get("modalities") or ()) - {"text"}:
        raise _unsupported("modalities", "Through Puter models answer with text.")


def _effort(body: Json) -> str | None:
    reasoning = body.get("reasoning")
    effort = body.get("reasoning_effort") or (reasoning.get("effort") if isinstance(reasoning, dict) else None)
    if effort is None or effort == "none":
        return None
    if effort not in _EFFORTS:
        raise InvalidAtUpstream("'reasoning_effort' is low, medium or high.", param="reasoning_effort", code="invalid_value")
    return _EFFORTS[effort]


def _tools(body: Json) -> tuple[list[Json], Any, str]:
    """(tools, tool_choice, a sentence for the model). Most routes ignore `tool_choice`: what it forces is said in words, too."""
    tools: list[Json] = list(body.get("tools") or ())
    for tool in tools:
        if tool.get("type", "function") != "function":
            raise _unsupported("tools", "Puter takes tools of type 'function' alone.")
    choice = body.get("tool_choice")
    if not tools or choice == "none":
        return [], None, ""
    if choice is None or choice == "auto":
        return tools, choice, ""
    if choice == "required":
        return tools, choice, "Answer with a call of one of the functions."
    name = (choice.get("function") or {}).get("name") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if name is None:
        raise _unsupported("tool_choice", "Puter knows 'none', 'auto', 'required' and one function as 'tool_choice'.")
    tools = [tool for tool in tools if (tool.get("function") or tool).get("name") == name]
    if not tools:
        raise InvalidAtUpstream(f"'tool_choice' names no function of 'tools': '{clean(str(name))}'.", param="tool_choice")
    return tools, choice, f"Answer with a call of the function '{name}'."


def _with_hint(messages: Sequence[Json], hint: str) -> list[Json]:
    """The hint stands at the end of the first system message, for some routes read that one alone."""
    if not hint:
        return list(messages)
    for at, message in enumerate(messages):
        if _role(message) == "system":
            content = _joined(_content(message, "system", ""), hint)
            return [*messages[:at], {**message, "content": content}, *messages[at + 1 :]]
    return [{"role": "system", "content": hint}, *messages]


def _is_on(value: object) -> bool:
    return str(value).lower() in _ON


def _shape(target: Target) -> str:
    """Whose form of an image the route takes, as far as it is known beforehand: an unpinned Claude goes to Anthropic itself."""
    provider = target.settings.get("provider") or ("claude" if "claude" in target.model.lower() else "")
    return {"claude": "claude", "openai-responses": "responses", "azure-openai-responses": "responses"}.get(provider, "")


# Messages (reference 3.4, 3.11)

_ROLES = {"developer": "system", "function": "tool"}
_KNOWN_ROLES = frozenset({"system", "user", "assistant", "tool"})
Content = str | list[Json]


def prepared(messages: Sequence[Json], shape: str = "") -> list[Json]:
    """What all modes begin with: known roles, nothing empty, images as the route takes them, calls one by one with their results.

    `shape` is "claude", "responses" or "". Raises InvalidAtUpstream."""
    ready: list[Json] = []
    at = 0
    while at < len(messages):
        message, role = messages[at], _role(messages[at])
        at += 1
        if role == "tool":  # of a call that nobody made: the upstream is to judge
            ready.append(_result(message, _name_of_call(message)))
            continue
        if content := _content(message, role, shape):
            ready.append({"role": role, "content": content, **_cache_control(message)})
        if role == "assistant" and (calls := _calls(message, len(ready))):
            results: list[Json] = []
            while at < len(messages) and _role(messages[at]) == "tool":
                results.append(messages[at])
                at += 1
            ready += _one_by_one(calls, results)
    return ready


def _role(message: Json) -> str:
    role = message.get("role") or "user"
    lowered = role.lower() if isinstance(role, str) else ""
    lowered = _ROLES.get(lowered, lowered)
    if lowered not in _KNOWN_ROLES:
        raise InvalidAtUpstream("A message's role is system, developer, user, assistant or tool.", param="messages", code="invalid_value")
    return lowered


def _content(message: Json, role: str, shape: str) -> Content:
    """A text, or parts where there is more than text; empty where nothing is said."""
    given = message.get("content")
    if given is None:
        given = message.get("refusal") or ""
    if isinstance(given, str):
        return given if given.strip() else ""
    if isinstance(given, dict):
        given = [given]
    if not isinstance(given, list):
        raise InvalidAtUpstream("A message's content is a string or a list of parts.", param="messages", code="invalid_type")
    parts = [part for one in given if (part := _part(one, role, shape)) is not None]
    if any(part["type"] != "text" or "cache_control" in part for part in parts):
        return parts
    return "\n\n".join(part["text"] for part in parts)


def _part(part: object, role: str, shape: str) -> Json | None:
    """One part in its known fields alone: others could name files of the account (`puter_path`). None for an empty text."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise InvalidAtUpstream("A part of a message is an object.", param="messages", code="invalid_type")
    kind = part.get("type") or next((name for name in ("text", "image_url", "video_url") if name in part), "")
    if kind in ("text", "input_text", "output_text", "refusal"):
        text = part.get("text") or part.get("refusal") or ""
        return {"type": "text", "text": text, **_cache_control(part)} if isinstance(text, str) and text.strip() else None
    if role != "system":
        if kind in ("image_url", "input_image"):
            return {**_image(part.get("image_url"), shape), **_cache_control(part)}
        if kind == "image" and isinstance(part.get("source"), dict):
            source = {name: part["source"][name] for name in ("type", "media_type", "data", "url") if name in part["source"]}
            return {"type": "image", "source": source, **_cache_control(part)}
        if kind == "video_url":
            return {"type": "video_url", "video_url": {"url": _url_in(part.get("video_url"))}}
    raise _unsupported("messages", f"Puter does not take a part of type '{clean(str(kind))}' in a message of role '{role}'.")


_DATA_URL = re.compile(r"data:(image/[\w.+-]+);base64,(.+)", re.DOTALL)


def _image(given: object, shape: str) -> Json:
    url = _url_in(given)
    if shape == "responses":
        return {"type": "input_image", "image_url": url}
    if shape != "claude":
        return {"type": "image_url", "image_url": {"url": url, **_detail(given)}}
    if not url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    found = _DATA_URL.fullmatch(url)
    if found is None:
        raise InvalidAtUpstream("An image in a data URL is base64, such as data:image/png;base64,…", param="messages", code="invalid_value")
    return {"type": "image", "source": {"type": "base64", "media_type": found[1], "data": found[2]}}


def _url_in(given: object) -> str:
    """Nothing but the web and data: a path would be one of the account's own files."""
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str) or not url.startswith(("https://", "http://", "data:")):
        raise InvalidAtUpstream("An image is given as an https:// or a data: URL.", param="messages", code="invalid_value")
    return url


def _detail(given: object) -> Json:
    return {"detail": given["detail"]} if isinstance(given, dict) and given.get("detail") else {}


def _cache_control(given: Json) -> Json:
    return {"cache_control": given["cache_control"]} if given.get("cache_control") else {}


def _calls(message: Json, number: int) -> list[Json]:
    """The calls of an assistant's message as blocks, whose `input` is an object: a string would be encoded twice on some routes."""
    given = list(message.get("tool_calls") or ())
    if not given and isinstance(message.get("function_call"), dict):
        given = [{"function": message["function_call"]}]
    blocks = []
    for at, call in enumerate(given):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidAtUpstream("A tool call has a function with a name.", param="messages", code="invalid_value")
        call_id = call.get("id") or f"call_{number}_{at}"
        blocks.append({"type": "tool_use", "id": call_id, "name": function["name"], "input": _input(function.get("arguments"))})
    return blocks


def _input(arguments: object) -> Json:
    if isinstance(arguments, dict):
        return arguments
    text = arguments if isinstance(arguments, str) else ""
    try:
        value = wire.decode_json(text.encode()) if text.strip() else {}
    except (msgspec.DecodeError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"_raw": text}


def _one_by_one(calls: Sequence[Json], results: Sequence[Json]) -> list[Json]:
    """Each call directly before its result: of several in one message the server loses or turns round some (reference 3.4, rule 5)."""
    left = list(results)
    ready: list[Json] = []
    for call in calls:
        at = next((at for at, one in enumerate(left) if _name_of_call(one) in (call["id"], "") or one.get("name") == call["name"]), None)
        result = left.pop(at) if at is not None else {"content": NO_RESULT}
        ready += [{"role": "assistant", "content": [call]}, _result(result, call["id"])]
    return ready + [_result(one, _name_of_call(one)) for one in left]


def _name_of_call(result: Json) -> str:
    return str(result.get("tool_call_id") or result.get("tool_use_id") or "")


def _result(message: Json, call_id: str) -> Json:
    content = _content(message, "tool", "")
    if not isinstance(content, str):
        text = [part["text"] for part in content if part["type"] == "text"]
        if len(text) < len(content):
            raise _unsupported("messages", "Puter takes a tool's result as text alone.")
        content = "\n\n".join(text)
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _is_of_a_tool(message: Json) -> bool:
    """A call or its result: the two are one thing, never merged or dropped."""
    return message["role"] == "tool" or (isinstance(message["content"], list) and message["content"][0].get("type") == "tool_use")


def _joined(before: Content, after: Content) -> Content:
    if isinstance(before, str) and isinstance(after, str):
        return f"{before}\n\n{after}" if before and after else before or after
    return [*_as_parts(before), *_as_parts(after)]


def _as_parts(content: Content) -> list[Json]:
    return ([{"type": "text", "text": content}] if content else []) if isinstance(content, str) else content


def standard(messages: Sequence[Json], *, strict: bool = False, filler: str = FILLER) -> list[Json]:
    """One system message, then user and assistant by turns, the user last (reference 3.11).

    Neighbours of one role are merged; `strict` drops all but the first instead, and an assistant who speaks first."""
    ready: list[Json] = []
    for message in (one for one in messages if one["role"] == "system"):
        ready = [{**ready[0], **message, "content": _joined(ready[0]["content"], message["content"])}] if ready else [message]
    for message in (one for one in messages if one["role"] != "system"):
        last = ready[-1] if ready and ready[-1]["role"] != "system" else None
        neighbours = last is not None and last["role"] == message["role"] and not _is_of_a_tool(last) and not _is_of_a_tool(message)
        begins = last is None and message["role"] == "assistant"
        if strict and (neighbours or begins) and not _is_of_a_tool(message):
            continue
        if neighbours and last is not None:
            ready[-1] = {**last, **message, "content": _joined(last["content"], message["content"])}
            continue
        if begins:
            ready.append({"role": "user", "content": OPENER})
        ready.append(message)
    if ready and ready[-1]["role"] not in ("user", "tool"):
        ready.append({"role": "user", "content": filler})
    return ready


def full(messages: Sequence[Json]) -> list[Json]:
    """The whole conversation as one message of the user (reference 3.11)."""
    images: list[Json] = []
    lines = [f"[{message['role']}] {_as_text(message['content'], images)}" for message in messages]
    if not lines:
        return []
    text = "\n\n".join(lines)
    return [{"role": "user", "content": [{"type": "text", "text": text}, *images] if images else text}]


def _as_text(content: Content, images: list[Json]) -> str:
    if isinstance(content, str):
        return content
    said = []
    for part in content:
        if part["type"] == "text":
            said.append(part["text"])
        elif part["type"] == "tool_use":
            said.append(f"(called {part['name']} with {_compact(part['input'])})")
        else:
            images.append(part)
            said.append(f"[image {len(images)}]")
    return "\n".join(said)


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# What comes back (reference 3.5 to 3.7)

_NOISE = re.compile(rb"[0-9A-Fa-f]{1,8}")  # a leftover of chunked encoding that some servers in between let through
_REASONS = {
    "max_tokens": "length", "length": "length", "model_context_window_exceeded": "length", "refusal": "content_filter",
    "safety": "content_filter", "content_filter": "content_filter", "recitation": "content_filter", "blocklist": "content_filter",
    "prohibited_content": "content_filter",
}  # fmt: skip
CANNED = "You have reached your AI usage limit for this account."
_json_objects = json.JSONDecoder()


class Lines(ChatReader):
    """One answer: an envelope, or lines that end with one of `usage` (reference 3.7)."""

    lines = True

    def __init__(self, ask: Ask, target: Target) -> None:
        super().__init__(ask, target)
        self._until = Until(ask.body.get("stop"))
        most, provider = _most_tokens(ask.body), target.settings.get("provider")
        self._most_tokens = min(most or XAI_MOST_TOKENS, XAI_MOST_TOKENS) if provider == "xai" else most
        self._needs_usage = str(target.settings.get("require_usage_line", "1")).lower() not in _OFF
        self._call_prefix = f"call_{ask.request_id.replace('-', '')}"
        self._images: list[object] = []

    def frame(self, data: bytes, event: str) -> None:
        if _NOISE.fullmatch(data):
            return
        for seen in _objects_in(data):
            if not self.finished:
                self._object(seen)

    def closed(self) -> None:
        if self.started and (self._until.reached or not self._needs_usage):
            self._end()

    def _object(self, seen: Json) -> None:
        kind = seen.get("type")
        if seen.get("success") is False or seen.get("error") or kind == "error":
            if self._until.reached:
                return self._end()  # what the client wanted was said
            raise _failure(self._target, 200, said_in(wire.encode_json(seen)), None, seen.get("error"))
        if "result" in seen:
            return self._envelope(seen)
        match kind:
            case "text":
                self._say(seen.get("text"))
            case "reasoning":
                self._think(seen.get("reasoning"))
            case "tool_use":
                self._call(seen.get("id"), seen.get("name"), seen.get("input"))
            case "image":
                self._show(seen.get("image"))
            case "usage":
                self._ends_with(seen.get("usage"))
            case None if "usage" in seen:
                self._ends_with(seen["usage"])

    def _say(self, text: object) -> None:
        if not isinstance(text, str):
            return
        if not self.started and text.lstrip().startswith(CANNED):
            raise _no_credit(self._target)
        self.text(self._until.feed(text))

    def _think(self, text: object) -> None:
        if isinstance(text, str) and not self._until.reached:
            self.reasoning(text)

    def _call(self, call_id: object, name: object, given: object) -> None:
        if not isinstance(name, str) or not name:
            raise BadFrame
        if self._until.reached:
            return
        self.text(self._until.rest())
        arguments = given if isinstance(given, str) and given.strip() else _compact(given or {})
        self.tool_call(call_id if isinstance(call_id, str) and call_id else f"{self._call_prefix}_{len(self._calls)}", name, arguments)

    def _show(self, image: object) -> None:
        if isinstance(image, dict) and not self._until.reached:
            self._images.append(image)
            self.extra("images", [image])  # noqa: S610
            self._extra["images"] = self._images

    def _ends_with(self, usage: object) -> None:
        self._count(usage, "")
        said = self.tokens.all_output if self.tokens is not None else 0
        if self._most_tokens and said >= self._most_tokens and not (self.has_calls or self._until.reached):
            self.reason("length")  # no line says so (reference 3.7)
        self._end()

    def _end(self) -> None:
        self.text(self._until.rest())
        self.complete()

    def _count(self, usage: object, route: str) -> None:
        tokens = tokens_of(usage, cached_apart=_counts_cached_apart(route, self._target)) if isinstance(usage, dict) else None
        if tokens is not None:
            self.count(replace(tokens, upstream_cost=_told_cost(_dict(usage).get("usd_cents"))))

    # The envelope of a whole answer

    def _envelope(self, seen: Json) -> None:
        metadata, service = _dict(seen.get("metadata")), _dict(seen.get("service"))
        route, model = str(metadata.get("service_used") or ""), str(metadata.get("providerUsed") or "")
        if metadata.get("usage_limited") or "usage-limited-chat" in (route, service.get("name")):
            raise _no_credit(self._target)
        if STAND_INS.get(route, self._target.model) != self._target.model:
            raise ContentFiltered("The upstream kept this prompt from the model.")
        if route or model:
            self.about["system_fingerprint"] = clean(f"{route}/{model}")  # another model than was asked for may have answered
        result = seen["result"]
        if isinstance(result, str):
            result = {"message": result}
        if not isinstance(result, dict):
            raise UpstreamProtocol("The upstream's answer is empty.")
        choices = result.get("choices")
        choice = _dict(choices[0]) if isinstance(choices, list) and choices else result
        message = choice.get("message")
        if message is None:
            message = choice.get("text")
        self._message({"content": message} if isinstance(message, str) else message)
        self._count(result.get("usage") or _dict(message).get("usage"), route)
        self._give_reason(_dict(message).get("stop_reason") or choice.get("finish_reason") or choice.get("finishReason"))
        self._end()

    def _message(self, message: object) -> None:
        if not isinstance(message, dict):
            raise UpstreamProtocol("The upstream's answer is empty.")
        self._think(message.get("reasoning") or message.get("reasoning_content"))
        content = message.get("content")
        if isinstance(content, list):
            for block in content:
                self._block(_dict(block))
        else:
            self._say(content)
        known = {call["id"] for call in self._calls}
        for call in map(_dict, message.get("tool_calls") or message.get("toolCalls") or ()):
            function = _dict(call.get("function"))
            if call.get("id") not in known:
                self._call(call.get("id"), function.get("name"), function.get("arguments"))
        for image in message.get("images") or ():
            self._show(image)
        if isinstance(message.get("refusal"), str) and message["refusal"]:
            self.extra("refusal", message["refusal"])  # noqa: S610

    def _block(self, block: Json) -> None:
        match block.get("type"):
            case "text":
                self._say(block.get("text"))
            case "thinking":
                self._think(block.get("thinking"))
            case "reasoning":
                self._think(block.get("reasoning") or block.get("text"))
            case "tool_use":
                self._call(block.get("id"), block.get("name"), block.get("input"))
            case "image_url":
                self._show(block)

    def _give_reason(self, reason: object) -> None:
        if not self.has_calls and not self._until.reached and isinstance(reason, str):
            self.reason(_REASONS.get(reason.lower(), "stop"))


def _dict(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _objects_in(data: bytes) -> Iterator[Json]:
    """The objects of one line, with or without anything between them (reference 0.4, rule 5). Raises BadFrame."""
    try:
        values = [wire.decode_json(data)]
    except msgspec.DecodeError:
        values = list(_one_after_another(data))
    for value in values:
        if not isinstance(value, dict):
            raise BadFrame
        yield value


def _one_after_another(data: bytes) -> Iterator[object]:
    text, at = data.decode("utf-8", "replace").strip(), 0
    while at < len(text):
        try:
            value, at = _json_objects.raw_decode(text, at)
        except ValueError:
            raise BadFrame from None
        while at < len(text) and text[at].isspace():
            at += 1
        yield value


class Until:
    """Ends a text at the first of some sequences, for no route heeds `stop`: what may become one is held back."""

    def __init__(self, stop: object) -> None:
        given = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
        self._sequences = [one for one in given if isinstance(one, str) and one]
        self._held = ""
        self.reached = False

    def feed(self, text: str) -> str:
        if not self._sequences:
            return text
        if self.reached:
            return ""
        text = self._held + text
        found = [at for one in self._sequences if (at := text.find(one)) >= 0]
        if found:
            self.reached, self._held = True, ""
            return text[: min(found)]
        kept = max((n for one in self._sequences for n in range(1, len(one)) if text.endswith(one[:n])), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was held back and turned out to be text."""
        rest, self._held = self._held, ""
        return rest


# Usage (reference 3.6)

# Their `prompt_tokens` are those that no cache held; of all others the cached ones are among them.
_CACHED_APART = frozenset({"openai-completion", "azure-openai", "openai-responses", "azure-openai-responses", "gemini", "meta"})
_CACHED_APART_MODEL = re.compile(r"(?:^|[/:])(?:gpt-|chatgpt|o[1-9]\b|gemini)", re.IGNORECASE)


def _counts_cached_apart(route: str, target: Target) -> bool:
    """By the route that answered, else by the one that is pinned, else by the model's vendor: a stream names no route."""
    if "grok" in target.model.lower():
        return False
    route = route or str(target.settings.get("provider") or "")
    return route in _CACHED_APART if route else _CACHED_APART_MODEL.search(target.model) is not None


def tokens_of(usage: Json, *, cached_apart: bool) -> Tokens | None:
    """Disjoint parts, whichever route's names they go by; None where nothing is counted."""

    def count(*names: str) -> int:
        return sum(min(int(usage[name]), MOST_TOKENS) for name in names if _is_count(usage.get(name)))

    if any(_is_count(usage.get(name)) for name in ("input_tokens", "output_tokens")):
        fresh, cached = count("input_tokens"), count("cache_read_input_tokens")
        written = count("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")
        output = count("output_tokens")
        thought = min(count("thinking_tokens"), output)
        return Tokens(fresh, cached, written, output - thought, thought)
    if any(_is_count(usage.get(name)) for name in ("prompt", "completion")):
        return Tokens(count("prompt"), count("input_cache_read"), 0, count("completion"))
    if any(_is_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")):
        prompt, cached = count("prompt_tokens"), count("cached_tokens")
        apart = cached_apart or cached > prompt or "thinking_tokens" in usage or "grounding_requests" in usage
        return Tokens(prompt if apart else prompt - cached, cached, 0, count("completion_tokens"), count("thinking_tokens"))
    return None


def _told_cost(cents: object) -> int | None:
    """Micro-dollars."""
    return int(min(float(cents), MOST_CENTS) * 10_000 + 0.5) if _is_count(cents) else None


def _is_count(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


# Errors (reference 3.9)

# What a code means, as the status that says the same elsewhere: some stand under another, and in a 200 there is none.
_STATUS_OF = {
    "bad_request": 400, "field_invalid": 400, "upstream_bad_request": 400, "moderation_flagged": 400,
    "client_bad_json": 400, "client_aborted": 400, "client_bad_request": 400,
    "upstream_provider_unavailable": 502, "upstream_failed": 502, "bad_response": 502, "upstream_auth_failed": 502, "internal_error": 500,
    "token_missing": 401, "token_auth_failed": 401, "token_expired": 401, "reauth_required": 401,
    "insufficient_funds": 402, "subscription_required": 403, "permission_denied": 403, "forbidden": 403, "app_blocked": 403,
    "email_confirmation_required": 403, "phone_verification_required": 403, "card_verification_required": 403,
    "app_or_api_token_required": 403, "account_suspended": 403,
    "too_many_requests": 429, "upstream_rate_limited": 429, "db_unavailable": 503,
}  # fmt: skip
# These are about the account, not about one model of it.
_OF_THE_ACCOUNT = _names(
    "insufficient_funds too_many_requests app_blocked email_confirmation_required phone_verification_required "
    "card_verification_required app_or_api_token_required account_suspended"
)
_NO_DRIVER = frozenset({"not_found", "no_implementation_available"})
_CREDIT_WORDS = re.compile(r"usage|fund|credit|insufficient", re.IGNORECASE)
_RATE_WORDS = re.compile(r"rate.?limit|429", re.IGNORECASE)
RATE_WAIT_SECONDS, CONCURRENT_WAIT_SECONDS = 10.0, 2.0  # Puter does not say: its window is 10 s (reference 3.2)


def _error_in(body: bytes) -> object:
    """The error object of an answer that is not a success: itself, or what stands under `error`."""
    try:
        seen = wire.decode_json(body)
    except (msgspec.DecodeError, RecursionError):
        return None
    return seen.get("error") if isinstance(_dict(seen).get("error"), dict) else seen


def _failure(target: Target, status: int, said: Said, wait_seconds: float | None, error: object) -> UpstreamFailure:
    """What an error of any generation means. `status` is that of the answer, and 200 for an error within one."""
    if _dict(error).get("errorCode") == "moderation_flagged":
        said = replace(said, code="moderation_flagged")
    if _dict(error).get("delegate") == "usage-limited-chat":
        return _no_credit(target)
    meant = _STATUS_OF.get(said.code or "") or said.status or status
    words = said.message.lower()
    if meant == 200:  # only words
        if _CREDIT_WORDS.search(words):
            return _no_credit(target, said.message)
        meant = 429 if _RATE_WORDS.search(words) else 502
    if meant == 400 and ("model not found" in words or (said.code == "field_invalid" and "model" in words)):
        meant, said = 404, replace(said, param="model")
    elif said.code in _NO_DRIVER or (meant == 404 and (said.message or said.code) and "model" not in words):
        problem: UpstreamFailure = UpstreamProtocol("Puter knows no such driver or method: its server is of another version, or elsewhere.")
        problem.upstream_status = status
        return problem
    if said.code == "too_many_requests" and wait_seconds is None:
        wait_seconds = CONCURRENT_WAIT_SECONDS if "concurrent" in words else RATE_WAIT_SECONDS
    problem = failure_of_said(target, meant, said, wait_seconds)
    problem.upstream_status = status if status != 200 else meant
    return _of_the_account(problem) if said.code in _OF_THE_ACCOUNT or isinstance(problem, OutOfCredit) else problem


def _no_credit(target: Target, message: str = "") -> UpstreamFailure:
    """Quota said otherwise than by a 402."""
    said = Said(message or "No credit left on the upstream account.", code="insufficient_funds")
    return _of_the_account(failure_of_said(target, 429, said))


def _of_the_account(problem: UpstreamFailure) -> UpstreamFailure:
    if isinstance(problem, UpstreamFailed):
        problem.whole_account = True
    return problem
