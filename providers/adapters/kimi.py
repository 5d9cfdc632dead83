"""Kimi for Coding (Moonshot): OpenAI's API, with thoughts, and with rules of its own for what a request may hold.

Streams pass as they came; an event is written anew only where it would mislead a client: calls without an index or id, cached tokens
in another place. Source: protocol reference section 2; what is mapped, refused and dropped is told in docs/providers/kimi.md.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from providers import wire
from providers.adapter import USER_AGENT, Ask, OpenAICompatible, Reader, SameShape, Target, Whole
from providers.exchange import Outgoing
from providers.failures import ForbiddenAtUpstream, InvalidAtUpstream, OptionRefused, OutOfCredit, UpstreamFailure, UpstreamProtocol
from providers.oauth import SignIn, TokenSet
from providers.said import Said, failure_of_said, said_in, wait_seconds_in
from providers.wire import Json

# What stands behind a model's name, and what it means. A list can also hold models that are really called so.
SUFFIXES = {"-thinking": "enabled", "-nothink": "disabled"}
EFFORTS = {"none": "", "minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "max", "max": "max"}
LADDER = ("low", "high", "max")

# Fixed by the model: other values than its own are a 400 there (2.5). The setting `pass_sampling` sends them all the same.
SAMPLING = frozenset({"temperature", "top_p", "presence_penalty", "frequency_penalty"})
DROPPED = frozenset({"seed", "user", "metadata", "store", "service_tier", "safety_identifier", "reasoning_effort", "n"})
REFUSED = ("web_search_options", "audio", "prediction", "logit_bias", "logprobs", "top_logprobs", "functions", "function_call")

MOST_SCHEMA_NODES = 20_000  # once its references are inlined


class Kimi(OpenAICompatible):
    name = "kimi"
    title = "Kimi for Coding"
    base_url = "https://api.kimi.com/coding/v1"
    policy = "restricted"
    policy_source = "https://www.kimi.com/code/docs/"
    policy_note = "The plan is meant for one person's use inside the coding tools that Moonshot names. Other use may be restricted."
    free = True  # a flat-rate plan: a call costs nothing more
    settings = frozenset({"user_agent", "pass_sampling", "client_id", "auth_url"})
    endpoints = frozenset({"chat/completions"})

    def base_url_from(self, given: str) -> str:
        """An origin, with a path before the API's own or without. What ends in /v1 is the API itself: Moonshot's Open Platform, say."""
        base_url = super().base_url_from(given)
        path = urlsplit(base_url).path
        if path.endswith("/v1"):
            return base_url
        return f"{base_url}/v1" if path.endswith("/coding") else f"{base_url}/coding/v1"

    def headers(self, target: Target) -> dict[str, str]:
        return {**super().headers(target), "User-Agent": target.settings.get("user_agent") or USER_AGENT}

    def request(self, ask: Ask, target: Target) -> Outgoing:
        model, wanted = _model(target)
        body = {name: value for name, value in ask.body.items() if value is not None}
        _refuse(body)
        if (thinking := _thinking(body, target.detail, wanted)) is not None:
            body["thinking"] = thinking
        if "max_tokens" in body:
            body.setdefault("max_completion_tokens", body.pop("max_tokens"))
            body.pop("max_tokens", None)
        dropped = DROPPED if _is_on(target.settings.get("pass_sampling")) else DROPPED | SAMPLING
        body = {name: value for name, value in body.items() if name not in dropped}
        thinks = (thinking or {}).get("type") != "disabled" and _can_think(target.detail) != "no"
        body["messages"] = _messages(ask, thinks=thinks)
        if "tool_choice" in ask.left_out and _forces(body.get("tool_choice")):
            body["tool_choice"] = "auto"
        if "tools" in body:
            body["tools"] = [_tool(tool, index) for index, tool in enumerate(body["tools"])]
        return super().request(replace(ask, body=body), replace(target, model=model))

    def reader(self, ask: Ask, target: Target) -> Reader:
        return KimiStream(ask, target, drop_usage_event=self._adds_usage(ask))

    def answer(self, ask: Ask, target: Target, body: bytes, content_type: str) -> Whole:
        whole = super().answer(ask, target, body, content_type)
        said = wire.decode_json(whole.body)
        return replace(whole, body=wire.encode_json(said)) if _mend_whole(said, ask) else whole

    def failure(self, target: Target, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        return _failure(target, status, said_in(body), wait_seconds_in(headers))

    def models(self, body: bytes) -> dict[str, Json]:
        """What it lists, without what is served to Anthropic's clients alone, and with the names that switch the thoughts."""
        found = {name: _flat(detail) for name, detail in super().models(body).items() if detail.get("protocol") != "anthropic"}
        for name, detail in list(found.items()):
            can = _can_think(detail)
            for suffix, kind in SUFFIXES.items():
                if (can == "both" or (can == "only" and kind == "enabled")) and not name.endswith(suffix):
                    found.setdefault(name + suffix, {"virtual_of": name, **detail, "id": name + suffix})
        return found

    def quota_request(self, target: Target) -> Outgoing | None:
        return target.get("/usages", self.headers(target))

    def quota(self, body: bytes) -> dict[str, Json]:
        try:
            said = wire.decode_json(body)
        except (msgspec.DecodeError, RecursionError):
            raise UpstreamProtocol("What is left of the plan could not be read.") from None
        if not isinstance(said, dict):
            raise UpstreamProtocol("What is left of the plan has an unknown shape.")
        return dict(_windows(said, time.time()))

    def sign_in(self, settings: Mapping[str, str]) -> SignIn | None:
        """The device flow, for an operator whose client id Moonshot knows; without one the account has a plain key (2.10)."""
        client_id = settings.get("client_id", "")
        if not client_id:
            return None
        origin = settings.get("auth_url", "https://auth.kimi.com").rstrip("/")
        return SignIn(
            flow="device",
            client_id=client_id,
            token_url=f"{origin}/api/oauth/token",
            device_url=f"{origin}/api/oauth/device_authorization",
            pkce=False,
            refresh_statuses_dead=frozenset({400, 401, 403}),
        )

    def tokens_from(self, given: str) -> TokenSet | None:
        if not given.lstrip().startswith("{"):
            return None
        try:
            said = wire.decode_json(given)
        except (msgspec.DecodeError, RecursionError):
            raise ValueError("This is neither a key nor the credential file of Kimi's own tool: it is not valid JSON.") from None
        access, refresh = said.get("access_token"), said.get("refresh_token")
        if not (isinstance(access, str) and access and isinstance(refresh, str) and refresh):
            raise ValueError("This credential file holds no 'access_token' and 'refresh_token'.")
        expires_at = _number(said.get("expires_at"))
        return TokenSet(access, refresh, float(expires_at) if expires_at is not None else None)


# What goes out


def _model(target: Target) -> tuple[str, str]:
    """The upstream's own id, and what the name says of the thoughts: "enabled", "disabled" or nothing."""
    suffix = next((suffix for suffix in SUFFIXES if target.model.endswith(suffix)), "")
    if not suffix:
        return target.model, ""
    if target.detail and "virtual_of" not in target.detail:
        return target.model, ""  # listed as it is: a model that is called so
    return target.detail.get("virtual_of") or target.model.removesuffix(suffix), SUFFIXES[suffix]


def _refuse(body: Json) -> None:
    """Raises InvalidAtUpstream for what silence would answer wrongly. Empty and false ask for nothing."""
    for name in REFUSED:
        if body.get(name):
            raise _unsupported(f"Kimi has no '{name}'.", name)
        body.pop(name, None)
    if (body.get("n") or 1) > 1:
        raise _unsupported("Kimi gives one choice: 'n' can only be 1.", "n")
    if body.pop("modalities", ["text"]) not in (["text"], []):
        raise _unsupported("Kimi answers in text alone.", "modalities")
    if body.pop("parallel_tool_calls", True) is False and body.get("tools"):  # it does not know the word, and passes over it
        raise _unsupported("Kimi may call several tools at once: 'parallel_tool_calls' cannot be false.", "parallel_tool_calls")


def _unsupported(message: str, param: str, code: str = "unsupported_parameter") -> InvalidAtUpstream:
    return InvalidAtUpstream(message, param=param, code=code)


def _thinking(body: Json, detail: Mapping[str, Any], wanted: str) -> Json | None:
    """The object that Kimi takes; None: as the model does by itself. A client's own goes before the effort (2.14)."""
    given, effort = body.get("thinking"), body.get("reasoning_effort")
    if isinstance(given, bool):
        given = {"type": "enabled" if given else "disabled"}
    if given is not None:
        if not isinstance(given, dict):
            raise InvalidAtUpstream('\'thinking\' is an object such as {"type": "enabled"}.', param="thinking", code="invalid_type")
        return _agreed({"type": wanted, **given} if wanted else given, wanted, "thinking")
    if effort is None:
        return {"type": wanted} if wanted else None
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise InvalidAtUpstream(f"'reasoning_effort' is one of {', '.join(EFFORTS)}.", param="reasoning_effort", code="invalid_value")
    return _agreed(_of_effort(effort, detail), wanted, "reasoning_effort")


def _agreed(thinking: Json | None, wanted: str, param: str) -> Json | None:
    if wanted and (thinking or {}).get("type") != wanted:
        raise _unsupported(f"The model's name says that thinking is {wanted}, and '{param}' says otherwise.", param, "unsupported_value")
    return thinking


def _of_effort(effort: str, detail: Mapping[str, Any]) -> Json | None:
    can = _can_think(detail)
    if effort == "none":
        if can == "only":
            raise _unsupported("This model always thinks: 'reasoning_effort' cannot be 'none'.", "reasoning_effort", "unsupported_value")
        return None if can == "no" else {"type": "disabled"}
    if can == "no":
        raise _unsupported("This model does not think: leave out 'reasoning_effort'.", "reasoning_effort")
    chosen = _nearest(EFFORTS[effort], detail)
    return {"type": "enabled", "effort": chosen} if chosen else {"type": "enabled"}


def _nearest(effort: str, detail: Mapping[str, Any]) -> str:
    """The effort itself or the next lower one that the model takes, else the model's own; nothing where none is known."""
    valid = str(detail.get("valid_efforts") or "").split(",")
    lower = [one for one in LADDER[: LADDER.index(effort) + 1] if one in valid]
    return lower[-1] if lower else str(detail.get("default_effort") or "")


def _can_think(detail: Mapping[str, Any]) -> str:
    """ "only", "both" or "no", as the list says; nothing where it does not say."""
    said = detail.get("supports_thinking_type")
    if said in ("only", "both", "no"):
        return str(said)
    if "supports_reasoning" not in detail:
        return ""
    return "both" if detail["supports_reasoning"] else "no"


def _flat(detail: Json) -> Json:
    """With the efforts as plain facts: of what a list says only those are kept."""
    efforts = detail.get("think_efforts")
    if not isinstance(efforts, dict) or not efforts.get("support"):
        return detail
    valid = ",".join(one for one in efforts.get("valid_efforts") or () if isinstance(one, str))
    return {"valid_efforts": valid, "default_effort": efforts.get("default_effort"), **detail}


def _messages(ask: Ask, *, thinks: bool) -> list[Json]:
    """By the rules that cause 400s there (2.6)."""
    given = ask.body["messages"]
    trail = Trail() if thinks and Thoughts(ask.learned) else None
    messages: list[Json] = []
    for index, message in enumerate(given):
        calls = message.get("tool_calls")
        thought = None
        if calls and trail is not None:
            thought = Thoughts(ask.learned).recall(trail.key(calls))
        messages.append(_message(message, index, thought=thought or "" if thinks else None))
        if trail is not None:
            trail.add(message)
    return messages


def _message(message: Json, index: int, *, thought: str | None) -> Json:
    kept = dict(message)
    if kept.get("role") == "developer":
        kept["role"] = "system"
    if isinstance(kept.get("content"), list):
        for part in kept["content"]:
            _check_part(part, index)
    if kept.get("role") != "assistant" or not kept.get("tool_calls"):
        return kept
    if isinstance(kept.get("content"), list):
        kept["content"] = [part for part in kept["content"] if not _is_empty_text(part)]
    if not kept.get("content"):
        kept.pop("content", None)
    if kept.get("reasoning_content") is None:
        kept.pop("reasoning_content", None)
        if thought is not None:
            kept["reasoning_content"] = thought
    return kept


def _is_empty_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and not part.get("text")


def _check_part(part: Any, index: int) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    param = f"messages[{index}].content"
    if kind in ("file", "input_audio"):
        raise _unsupported(f"Kimi takes no '{kind}'.", param)
    if kind not in ("image_url", "video_url"):
        return
    given = part.get(kind)
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str) or not url.startswith(("data:", "ms://")):
        raise _unsupported("Kimi fetches no addresses: give the image or video itself as a data URL.", param, "unsupported_value")


def _forces(choice: Any) -> bool:
    """Whether a call is wanted in any case. A word that nobody knows is left for Kimi to refuse."""
    return choice == "required" or (isinstance(choice, dict) and choice.get("type") == "function")


def _tool(tool: Json, index: int) -> Json:
    kind, function = tool.get("type"), tool.get("function")
    if kind == "custom":
        raise _unsupported("Kimi knows no custom tools: only functions.", f"tools[{index}].type")
    if kind != "function" or not isinstance(function, dict):
        return tool
    if str(function.get("name")).startswith("$"):
        return {"type": "builtin_function", "function": {"name": function["name"]}}
    function = {name: value for name, value in function.items() if name != "strict"}
    if isinstance(function.get("parameters"), dict):
        function["parameters"] = Schema(function["parameters"], f"tools[{index}].function.parameters").plain()
    return {**tool, "function": function}


class Schema:
    """A JSON schema as Kimi takes it: references inlined, and a type at every property (2.6)."""

    def __init__(self, root: Json, param: str) -> None:
        self._root, self._param = root, param
        self._nodes = 0

    def plain(self) -> Json:
        plain: Json = self._node(self._root, ())
        plain.setdefault("type", "object")
        return {name: value for name, value in plain.items() if name not in ("$defs", "definitions")}

    def _node(self, node: Any, within: tuple[str, ...], *, typed: bool = False) -> Any:
        self._nodes += 1
        if self._nodes > MOST_SCHEMA_NODES or len(within) > 64:
            raise InvalidAtUpstream("This schema is too large once its references are inlined.", param=self._param, code="invalid_value")
        if not isinstance(node, dict):
            return node
        reference = node.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            beside = {name: value for name, value in node.items() if name != "$ref"}
            if reference in within:
                return {"type": "object", **beside}  # it holds itself: there is no end to inlining
            return self._node({**self._found(reference), **beside}, (*within, reference), typed=typed)
        plain = {name: self._part(name, value, within) for name, value in node.items() if name not in ("$defs", "definitions")}
        return {"type": _type_of(plain), **plain} if typed and not plain.keys() & _SAYS_ITS_TYPE else plain

    def _part(self, name: str, value: Any, within: tuple[str, ...]) -> Any:
        if name in _OF_SCHEMAS and isinstance(value, dict):
            return {key: self._node(inner, within, typed=True) for key, inner in value.items()}
        if name in ("items", "additionalProperties") and isinstance(value, dict):
            return self._node(value, within, typed=bool(value))
        if name in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            return [self._node(inner, within, typed=name != "allOf") for inner in value]
        return value

    def _found(self, reference: str) -> Json:
        found: Any = self._root
        for name in filter(None, reference.removeprefix("#").split("/")):
            found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            raise InvalidAtUpstream(f"This schema has no '{reference[:100]}'.", param=self._param, code="invalid_value")
        return found


_OF_SCHEMAS = frozenset({"properties", "patternProperties"})
_SAYS_ITS_TYPE = frozenset({"type", "anyOf", "oneOf", "allOf", "$ref"})
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


def _type_of(node: Json) -> str:
    if "properties" in node or "additionalProperties" in node:
        return "object"
    if "items" in node:
        return "array"
    values = node["enum"] if isinstance(node.get("enum"), list) else [node["const"]] if "const" in node else []
    kinds = {_TYPES.get(type(value), "string") for value in values}
    return kinds.pop() if len(kinds) == 1 else "string"


# Thoughts that belong to calls: Kimi wants them back with the next turn, and most clients do not keep them (2.6)


class Trail:
    """A conversation as far as it has been read, as a digest: only who knows all of it finds what was thought at its end."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, message: object) -> None:
        self._digest.update(wire.encode_json(message))

    def key(self, calls: Any) -> str:
        first = calls[0] if isinstance(calls, list) and calls else None
        end = self._digest.copy()
        end.update(str(first.get("id") if isinstance(first, dict) else "").encode())
        return end.hexdigest()


class Thoughts:
    """A few thoughts of the last hour, in what is learned of the account: in memory alone, the oldest go first."""

    MARK = "thought:"
    MOST = 200
    MOST_LETTERS = 64 << 10
    SECONDS = 3600.0

    def __init__(self, learned: dict[str, str]) -> None:
        self._learned = learned

    def __bool__(self) -> bool:
        return any(name.startswith(self.MARK) for name in self._learned)

    def recall(self, key: str) -> str:
        at, _, thought = self._learned.get(self.MARK + key, "").partition(" ")
        return thought if at and time.time() - float(at) < self.SECONDS else ""

    def keep(self, key: str, thought: str) -> None:
        if not thought or len(thought) > self.MOST_LETTERS:
            return
        self._learned.pop(self.MARK + key, None)
        self._learned[self.MARK + key] = f"{time.time():.0f} {thought}"
        kept = [name for name in self._learned if name.startswith(self.MARK)]
        for name in kept[: -self.MOST]:
            del self._learned[name]


def _keep_thought(ask: Ask, calls: Any, thought: str) -> None:
    if not calls or not thought:
        return
    trail = Trail()
    for message in ask.body["messages"]:
        trail.add(message)
    Thoughts(ask.learned).keep(trail.key(calls), thought)


# What comes back


class KimiStream(SameShape):
    """Events go back as they came, but for those that would mislead: see `_mend`."""

    def __init__(self, ask: Ask, target: Target, *, drop_usage_event: bool) -> None:
        super().__init__(drop_usage_event=drop_usage_event, says_done=True, target=target)
        self._ask = ask
        self._calls = Calls(ask.request_id)
        self._thought: list[str] = []
        self._usage_of_choice: Json | None = None
        self._usage_said = False
        marks = (b'"tool_calls"', b'"usage"', b"[DONE]")
        self._marks = (*marks, b'"reasoning_content"') if ask.body.get("tools") else marks

    def feed(self, data: bytes) -> bytes:
        return self._mended(super().feed(data))

    def end(self) -> bytes:
        return self._mended(super().end())

    def _mended(self, events: bytes) -> bytes:
        if not any(mark in events for mark in self._marks):
            return events
        return b"".join(self._mend(one) for one in wire.split_events(events))

    def _mend(self, one: bytes) -> bytes:
        """A call without its index or id gets one, cached tokens stand where OpenAI has them, and usage is said once if it was wanted."""
        data = wire.data_of(one)
        if data.startswith(b"[DONE]"):
            _keep_thought(self._ask, self._calls.begun, "".join(self._thought))
            return self._usage_event() + one
        try:
            event = wire.decode_json(data)
        except (msgspec.DecodeError, RecursionError):
            return one
        if not isinstance(event, dict):
            return one
        mended = _mend_usage(event)
        self._usage_said = self._usage_said or isinstance(event.get("usage"), dict)
        for choice in _objects(event.get("choices")):
            if isinstance(choice.get("usage"), dict):
                self._usage_of_choice = {**event, "choices": [], "usage": _with_cached_tokens(choice["usage"])}
            delta = choice.get("delta")
            if isinstance(delta, dict):
                for call in _objects(delta.get("tool_calls")):
                    mended |= self._calls.place(call)
                if isinstance(delta.get("reasoning_content"), str) and delta["reasoning_content"]:
                    self._thought.append(delta["reasoning_content"])
        return wire.event(event) if mended else one

    def _usage_event(self) -> bytes:
        """What stood inside a choice is where no client looks for it."""
        if not self._ask.client_wants_usage or self._usage_said or self._usage_of_choice is None:
            return b""
        self._usage_said = True
        return wire.event(self._usage_of_choice)

    def _said_error(self, data: bytes) -> UpstreamFailure:
        if self.started or self._target is None:
            return super()._said_error(data)
        return _failure(self._target, 500, said_in(data), None)


class Calls:
    """The calls of one answer: each has an index of its own and an id, whatever the upstream leaves out or says twice (2.7)."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self.begun: list[Json] = []
        self._by_id: dict[str, int] = {}
        self._by_their_index: dict[int, int] = {}
        self._last = 0

    def place(self, call: Json) -> bool:
        """Give this part of a call its place. True when something had to be written."""
        their, function = call.get("index"), call.get("function")
        call_id = call["id"] if isinstance(call.get("id"), str) else ""
        name = function.get("name") if isinstance(function, dict) else None
        known = self._by_id.get(call_id) if call_id else self._by_their_index.get(their) if isinstance(their, int) else None
        if known is None and (call_id or name or not self.begun):
            known = len(self.begun)
            self.begun.append({"id": call_id or f"call_{self._request_id[-12:]}_{known}"})
            self._by_id[self.begun[known]["id"]] = known
            call["id"] = self.begun[known]["id"]
        known = self._last if known is None else known
        if isinstance(their, int):
            self._by_their_index[their] = known
        self._last = known
        call["index"] = known
        return their != known or (call.get("id") or "") != call_id


def _mend_whole(said: Json, ask: Ask) -> bool:
    """As `KimiStream._mend` does. True when something had to be written."""
    mended = _mend_usage(said)
    for choice in _objects(said.get("choices")):
        if isinstance(choice.get("usage"), dict) and not isinstance(said.get("usage"), dict):
            said["usage"] = _with_cached_tokens(choice["usage"])
            mended = True
        message = choice.get("message")
        if isinstance(message, dict):
            calls = list(_objects(message.get("tool_calls")))
            for number, call in enumerate(calls):
                if not call.get("id"):
                    call["id"] = f"call_{ask.request_id[-12:]}_{number}"
                    mended = True
            thought = message.get("reasoning_content")
            _keep_thought(ask, calls, thought if isinstance(thought, str) else "")
    return mended


def _objects(value: Any) -> Iterator[Json]:
    return (one for one in (value if isinstance(value, list) else ()) if isinstance(one, dict))


def _mend_usage(said: Json) -> bool:
    usage = said.get("usage")
    if not isinstance(usage, dict) or (full := _with_cached_tokens(usage)) is usage:
        return False
    said["usage"] = full
    return True


def _with_cached_tokens(usage: Json) -> Json:
    cached = usage.get("cached_tokens")
    if not isinstance(cached, int) or usage.get("prompt_tokens_details"):
        return usage
    return {**usage, "prompt_tokens_details": {"cached_tokens": cached}}


# What goes wrong (2.12)

# For an error inside a 200, which has no status of its own.
_STATUS = {
    "invalid_request_error": 400,
    "content_filter": 400,
    "invalid_authentication_error": 401,
    "incorrect_api_key_error": 401,
    "access_terminated_error": 403,
    "permission_denied_error": 403,
    "resource_not_found_error": 404,
    "engine_overloaded_error": 429,
    "rate_limit_reached_error": 429,
    "exceeded_current_quota_error": 429,
    "server_unavailable": 503,
}
_USED_UP = re.compile(
    r"usage limit|monthly|weekly|billing cycle|current (?:token )?quota|account balance|insufficient balance|recharge|in arrears"
)
_HIGHER_TIER = re.compile(r"membership|tier|upgrade")


def _failure(target: Target, status: int, said: Said, wait_seconds: float | None) -> UpstreamFailure:
    kinds, text = {said.type, said.code}, said.message.lower()
    if status >= 500 or status < 400:
        status = next((_STATUS[kind] for kind in kinds if kind in _STATUS), status)
    meant, said = _in_openais_words(status, said, kinds, text)
    problem = failure_of_said(target, meant, said, wait_seconds)
    if type(problem) is InvalidAtUpstream and "tool_choice" in f"{said.param} {text}":
        problem = OptionRefused(problem.message, option="tool_choice", code=problem.code)
    problem.upstream_status = status
    if isinstance(problem, OutOfCredit):
        problem.whole_account = True
    elif isinstance(problem, ForbiddenAtUpstream) and "access_terminated_error" in kinds:
        problem.whole_account = True
        problem.detail = "Kimi for Coding serves only the clients that it knows: see docs/providers/kimi.md, and the setting user_agent."
    return problem


def _in_openais_words(status: int, said: Said, kinds: set[str | None], text: str) -> tuple[int, Said]:
    """The same, by a status and a code that mean with every vendor what this one means."""
    if "engine_overloaded_error" in kinds:
        return 503, said
    if status in (403, 429) and ("exceeded_current_quota_error" in kinds or _USED_UP.search(text)):
        return 429, replace(said, code="insufficient_quota")
    if status == 401 and _HIGHER_TIER.search(text):
        return 403, said  # the key is good, but not for this model
    if status == 404 and "method" not in text:
        return 404, replace(said, param="model")
    if status == 499:
        return 502, said
    return status, said


# What is left of the plan (2.9)

_UNITS = {"MINUTE": 1, "HOUR": 60, "DAY": 24 * 60}
_UNITS_PER_CENT = 1_000_000


def _windows(said: Json, now: float) -> Iterator[tuple[str, Json]]:
    if isinstance(said.get("usage"), dict):
        yield "week", _window(said["usage"], now)
    for one in list(_objects(said.get("limits")))[:10]:
        detail = one.get("detail")
        yield _length(one.get("window")), _window(detail if isinstance(detail, dict) else one, now)
    wallet = said.get("boosterWallet")
    if isinstance(wallet, dict):
        yield from _wallet(wallet)


def _window(detail: Json, now: float) -> Json:
    limit, used, left = (_number(detail.get(name)) for name in ("limit", "used", "remaining"))
    if used is None and limit is not None and left is not None:
        used = limit - left
    return {name: value for name, value in (("used", used), ("limit", limit), ("resets_at", _resets_at(detail, now))) if value is not None}


def _length(window: Any) -> str:
    """ "5 hours" """
    duration = _number(window.get("duration")) if isinstance(window, dict) else None
    unit = str(window.get("timeUnit")).upper() if isinstance(window, dict) else ""
    minutes = next((duration * size for name, size in _UNITS.items() if duration and name in unit), 0)
    for name, size in (("day", 24 * 60), ("hour", 60), ("minute", 1)):
        if minutes and minutes % size == 0:
            count = int(minutes // size)
            return f"{count} {name}{'s' if count != 1 else ''}"
    return "window"


def _wallet(wallet: Json) -> Iterator[tuple[str, Json]]:
    parts = (wallet.get(name) for name in ("balance", "monthlyChargeLimit", "monthlyUsed"))
    balance, limit, used = (part if isinstance(part, dict) else {} for part in parts)
    currency = limit.get("currency") or used.get("currency")
    unit = {"unit": currency if isinstance(currency, str) and re.fullmatch(r"[A-Z]{3}", currency) else "USD"}
    amount, left = _number(balance.get("amount")), _number(balance.get("amountLeft"))
    if amount is not None and left is not None:
        whole = _UNITS_PER_CENT * 100
        yield "booster", {"used": (amount - left) / whole, "limit": amount / whole, **unit}
    cents, most = _number(used.get("priceInCents")), _number(limit.get("priceInCents"))
    if cents is not None:
        capped = {"limit": most / 100} if most is not None and wallet.get("monthlyChargeLimitEnabled") else {}
        yield "booster this month", {"used": cents / 100, **capped, **unit}


def _number(value: Any) -> int | float | None:
    """Numbers come as decimal strings."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number) or abs(number) > 1e15:
        return None
    return int(number) if number == int(number) else number


def _resets_at(detail: Json, now: float) -> str | None:
    """As ISO 8601, in UTC, to the second."""
    said = next((detail[name] for name in ("resetTime", "resetAt", "reset_time", "reset_at") if detail.get(name)), None)
    if isinstance(said, str):
        try:
            at = datetime.fromisoformat(said)
        except ValueError:
            return None
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    else:
        seconds = next((number for name in ("reset_in", "ttl") if (number := _number(detail.get(name))) is not None), None)
        if seconds is None or abs(seconds) > 10**9:
            return None
        at = datetime.fromtimestamp(now, UTC) + timedelta(seconds=seconds)
    try:
        return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except OverflowError:
        return None


def _is_on(value: object) -> bool:
    return value is True or str(value).lower() in {"1", "true", "yes", "on"}
