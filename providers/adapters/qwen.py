"""Qwen: DashScope and the Coding Plan with an API key, or the portal of Qwen's own tools with a sign-in.

Both speak OpenAI's API with additions and oddities: reference gemini-qwen-codegeex.md, section 3. What a request must look like is in
`_Request`, what has to be mended in answers in `Mended`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime

import msgspec
from msgspec.structs import replace

from providers import wire
from providers.adapter import USER_AGENT, Ask, OpenAICompatible, Reader, SameShape, Target, Whole
from providers.chat import REASONS
from providers.exchange import Outgoing, place_of
from providers.failures import (
    ContentFiltered,
    ContextLength,
    InvalidAtUpstream,
    OptionRefused,
    OutOfCredit,
    UpstreamBroke,
    UpstreamFailure,
    UpstreamProtocol,
    UpstreamUnreachable,
)
from providers.oauth import SignIn, TokenSet
from providers.price import Tokens
from providers.said import Said, failure_of_said, said_in, wait_seconds_in, without_callers_key
from providers.wire import Json

PORTAL = "https://portal.qwen.ai/v1"
SCOPES = ("openid", "profile", "email", "model.completion")

# Context, most output tokens (3.3). None: not known, and nothing is clamped.
MODELS: dict[str, tuple[int | None, int | None]] = {
    "coder-model": (1_000_000, 65_536),
    "vision-model": (131_072, 32_768),
    "qwen3-coder-plus": (1_000_000, 65_536),
    "qwen3-coder-flash": (1_000_000, 65_536),
    "qwen3-max": (262_144, 65_536),
    "qwen3-coder-turbo": (None, None),
    "qwen3-plus": (None, None),
    "qwen3-turbo": (None, None),
}
# Those that look at pictures in full resolution when asked to (3.2).
SEES_IN_FULL = re.compile(r"coder-model$|qwen-vl|qwen3\.[567]-plus")
UNDERSTANDS_EFFORT = re.compile(r"qwen3\.8-max")
# `reasoning_effort` -> tokens of thought (3.2; the numbers are ours).
THOUGHT_TOKENS = {"minimal": 1024, "low": 1024, "medium": 8192, "high": 24_576, "xhigh": 32_768}
# OpenAI's fields that mean nothing there (3.6).
DROPPED = frozenset({"store", "service_tier", "user", "logit_bias", "n", "max_completion_tokens"})


class Qwen(OpenAICompatible):
    name = "qwen"
    title = "Qwen (DashScope, Coding Plan, or sign-in)"
    base_url = "https://dashscope-intl.aliyuncs.com/compatible-mode/v1"
    policy_source = "https://github.com/QwenLM/qwen-code/issues/3203"
    policy_note = "API keys are meant for programs. The sign-in of Qwen's own tools was ended by its vendor in April 2026."
    settings = frozenset({"auth", "client_id", "token_url", "device_code_url", "user_agent"})
    endpoints = frozenset({"chat/completions"})

    # The account

    def policy_for(self, settings: Mapping[str, object]) -> str:
        return "ended" if _signs_in(settings) else "allowed"

    def setting_from(self, name: str, given: str) -> str:
        if name == "auth" and given.lower() not in ("api_key", "oauth"):
            raise ValueError("'auth' is api_key or oauth.")
        if name in ("token_url", "device_code_url"):
            _check_address(name, given)
        if name == "user_agent" and not (given.isascii() and given.isprintable()):
            raise ValueError("'user_agent' is one line of plain characters.")
        return given.lower() if name == "auth" else given

    def sign_in(self, settings: Mapping[str, str]) -> SignIn | None:
        if not _signs_in(settings):
            return None
        needed = {name: str(settings.get(name) or "") for name in ("client_id", "token_url", "device_code_url")}
        missing = [name for name, value in needed.items() if not value]
        if missing:
            raise ValueError(f"To sign in, these settings are needed: {', '.join(missing)}.")
        for name in ("token_url", "device_code_url"):
            _check_address(name, needed[name])
        return SignIn(
            flow="device",
            client_id=needed["client_id"],
            token_url=needed["token_url"],
            device_url=needed["device_code_url"],
            scopes=SCOPES,
            pkce=True,
        )

    def tokens_from(self, given: str) -> TokenSet | None:
        """Reads `oauth_creds.json` of Qwen's own tool, and what others make of it (3.1): flat, or inside `token`."""
        try:
            held = wire.decode_json(given.encode())
        except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
            return None
        if not isinstance(held, dict):
            return None
        tokens = held["token"] if isinstance(held.get("token"), dict) else held
        access, refresh = tokens.get("access_token"), tokens.get("refresh_token")
        if not isinstance(access, str) or not access:
            raise ValueError("This file has no 'access_token': it is not one of a Qwen sign-in.")
        if not (access.isascii() and access.isprintable()):
            raise ValueError("The 'access_token' in this file has a letter that no header can carry.")
        return TokenSet(
            access=access,
            refresh=refresh if isinstance(refresh, str) else "",
            expires_at=_expiry_in(tokens),
            facts=self.facts_from(tokens),
        )

    def facts_from(self, reply: Json) -> dict[str, str]:
        """`resource_url`, once called `endpoint`. A reply without it says nothing: what was known before stays (3.1)."""
        place = reply.get("resource_url") or reply.get("endpoint")
        return {"resource_url": place} if isinstance(place, str) and len(place) <= 480 and place.isprintable() else {}

    # The call

    def headers(self, target: Target) -> dict[str, str]:
        headers = super().headers(target)
        headers["User-Agent"] = headers["X-DashScope-UserAgent"] = target.settings.get("user_agent") or USER_AGENT
        headers["X-DashScope-CacheControl"] = "enable"
        if _signs_in(target.settings):
            headers["X-DashScope-AuthType"] = "qwen-oauth"
        return headers

    def request(self, ask: Ask, target: Target) -> Outgoing:
        headers = self.headers(target)
        headers["Accept"] = "text/event-stream" if ask.stream else "application/json"
        headers["Accept-Encoding"] = "identity" if ask.stream else "gzip"
        headers["X-Request-ID"] = ask.request_id
        body = _Request(ask, target).body()
        if self._adds_usage(ask):
            body["stream_options"] = {**(ask.body.get("stream_options") or {}), "include_usage": True}
        return replace(target, base_url=base_of(target)).post("/chat/completions", headers, wire.encode_json(body))

    def reader(self, ask: Ask, target: Target) -> Reader:
        return MendedStream(ask, target, self.failure_of)

    def answer(self, ask: Ask, target: Target, body: bytes, content_type: str) -> Whole:
        try:
            said = wire.decode_json(body)
        except (msgspec.DecodeError, RecursionError):
            raise UpstreamProtocol("The upstream's answer could not be read.") from None
        if is_error(said):
            raise self.failure_of(target, said_in(body))
        if not isinstance(said, dict) or not isinstance(said.get("choices"), list) or not said["choices"]:
            raise UpstreamProtocol("The upstream's answer is empty.")
        mended, tokens = mended_answer(said, target, self.failure_of)
        return Whole(wire.encode_json(mended), tokens)

    # What goes wrong

    def failure(self, target: Target, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        return failure_in(target, status, said_in(body), wait_seconds_in(headers))

    def failure_of(self, target: Target, said: Said, status: int | None = None) -> UpstreamFailure:
        """An error that came with a 200: its code says which status it should have had."""
        return failure_in(target, status or said.status or _status_of(said), said, None)

    # Its models

    def models_request(self, target: Target) -> Outgoing | None:
        return None  # the portal has no list, and the Coding Plan none that is known

    def listed(self) -> dict[str, Json]:
        return {
            name: {"owned_by": "qwen"} | ({"context_length": context, "max_output_tokens": most} if context else {})
            for name, (context, most) in MODELS.items()
        }


def _signs_in(settings: Mapping[str, object]) -> bool:
    return str(settings.get("auth") or "api_key").lower() == "oauth"


def _check_address(name: str, given: str) -> None:
    try:
        place_of(given)
    except UpstreamUnreachable:
        raise ValueError(f"'{name}' is not an address such as https://login.example.org/token.") from None


def _expiry_in(tokens: Json) -> float | None:
    """`expiry_date` in milliseconds, or `expiry` / `expired` as RFC 3339: seconds since the epoch."""
    moment = tokens.get("expiry_date")
    if isinstance(moment, int | float) and not isinstance(moment, bool) and 0 < moment < 1e15:
        return moment / 1000
    written = tokens.get("expiry") or tokens.get("expired")
    try:
        return datetime.fromisoformat(written).timestamp() if isinstance(written, str) else None
    except (ValueError, OverflowError):
        return None


# Where it goes


def base_of(target: Target) -> str:
    """The base of this account's calls (3.2). Raises UpstreamUnreachable for a `resource_url` that no secret may be sent to."""
    configured = target.base_url.rstrip("/")
    if not _signs_in(target.settings):
        return _with_version(configured, "/compatible-mode/v1")
    if resource := target.settings.get("resource_url", "").strip():
        return _checked(resource, configured)
    return PORTAL if configured == Qwen.base_url else _with_version(configured, "/v1")


def _with_version(base: str, path: str) -> str:
    if re.search(r"/v\d+$", base):
        return base
    return base.removesuffix("/compatible-mode") + path


_HOST = re.compile(r"[a-z0-9-]+(?:\.[a-z0-9-]+)*\.[a-z][a-z0-9-]*[a-z0-9]", re.IGNORECASE)


def _checked(resource: str, configured: str) -> str:
    """The account's token goes there, and the token endpoint alone said so: https to a named host, or the operator's own origin."""
    url = resource if "://" in resource else f"https://{resource}"
    url = url.rstrip("/")
    url = url if url.endswith("/v1") else f"{url}/v1"
    place, _ = place_of(url)
    scheme, host, _ = place.origin
    if place.origin != place_of(configured)[0].origin and not (scheme == "https" and _HOST.fullmatch(host)):
        raise UpstreamUnreachable("The sign-in named an address that this account's token may not be sent to (resource_url).")
    return url


# Requests


class _Request:
    """One client's request as Qwen takes it (3.2, 3.6). What it does not know of passes on. Raises InvalidAtUpstream."""

    def __init__(self, ask: Ask, target: Target) -> None:
        self._ask, self._target = ask, target
        self._given = {name: value for name, value in ask.body.items() if value is not None}

    def body(self) -> Json:
        given, model = self._given, self._target.model
        if (given.get("n") or 1) != 1:
            raise InvalidAtUpstream("Qwen gives one choice: 'n' must be 1.", param="n", code="unsupported_parameter")
        body = {name: value for name, value in given.items() if name not in DROPPED}
        body["model"], body["stream"] = model, self._ask.stream
        body["messages"] = self._messages()
        if not self._ask.stream:
            body.pop("stream_options", None)
        if not body.get("tools"):
            body.pop("tools", None)
            body.pop("tool_choice", None)
        self._limit_output(body)
        self._think(body)
        if SEES_IN_FULL.match(model) and _shows_a_picture(body["messages"]):
            body.setdefault("vl_high_resolution_images", True)
        return {name: value for name, value in body.items() if name not in self._ask.left_out}

    def _messages(self) -> list[Json]:
        """One system message, and it comes first: the others are merged into it. The portal wants one in any case."""
        messages = self._given["messages"]
        told = [one for one in messages if one.get("role") in ("system", "developer")]
        rest = [one for one in messages if one.get("role") not in ("system", "developer")]
        if _signs_in(self._target.settings):
            head = {"type": "text", "text": "", "cache_control": {"type": "ephemeral"}}
            return [{"role": "system", "content": [head, *_parts_of(told)]}, *rest]
        if not told:
            return rest
        if len(told) == 1:
            return [{**told[0], "role": "system"}, *rest]
        texts = [one.get("content") for one in told]
        plain = all(isinstance(text, str) for text in texts)
        return [{"role": "system", "content": "\n\n".join(map(str, texts)) if plain else _parts_of(told)}, *rest]

    def _limit_output(self, body: Json) -> None:
        wanted = self._given.get("max_completion_tokens")
        wanted = self._given.get("max_tokens") if wanted is None else wanted
        if wanted is None:
            return
        _, most = MODELS.get(self._target.model, (None, None))
        body["max_tokens"] = min(wanted, most) if most else wanted

    def _think(self, body: Json) -> None:
        """Thinking by DashScope's own switches, which go before `reasoning_effort`; off where the answer's form is forced."""
        effort = body.pop("reasoning_effort", None)
        if effort is not None and effort != "none" and effort not in THOUGHT_TOKENS:
            known = ", ".join(["none", *THOUGHT_TOKENS])
            raise InvalidAtUpstream(f"'reasoning_effort' is one of {known}.", param="reasoning_effort", code="invalid_value")
        if _forces_a_form(body):
            # While it thinks it refuses a forced tool and mixes thoughts into JSON.
            body.pop("thinking_budget", None)
            body["enable_thinking"] = False
        elif effort is not None and UNDERSTANDS_EFFORT.match(self._target.model):
            body.pop("enable_thinking", None)  # must not be combined
            body.pop("thinking_budget", None)
            body["reasoning_effort"] = effort
        elif effort is not None and "enable_thinking" not in body and "thinking_budget" not in body:
            body["enable_thinking"] = effort != "none"
            if effort != "none":
                body["thinking_budget"] = THOUGHT_TOKENS[effort]


def _forces_a_form(body: Json) -> bool:
    wanted = body.get("response_format")
    is_json = isinstance(wanted, dict) and wanted.get("type") in ("json_object", "json_schema")
    choice = body.get("tool_choice")
    return is_json or choice == "required" or isinstance(choice, dict)


def _parts_of(messages: list[Json]) -> list[Json]:
    parts: list[Json] = []
    for one in messages:
        content = one.get("content")
        if isinstance(content, list):
            parts += content
        elif content:
            parts.append({"type": "text", "text": str(content)})
    return parts


def _shows_a_picture(messages: list[Json]) -> bool:
    contents = (one.get("content") for one in messages)
    return any(
        isinstance(part, dict) and part.get("type") == "image_url" for content in contents if isinstance(content, list) for part in content
    )


# Errors

_QUOTA = ("insufficient_quota", "quota_exceeded", "free allocated quota exceeded")
_FILTERED = ("data_inspection_failed", "datainspectionfailed")
_TOO_LONG = ("range of input length", "input length")
_DAY_SECONDS = 86_400
_BEIJING_SECONDS = 8 * 3600  # ahead of UTC


def failure_in(target: Target, status: int, said: Said, wait_seconds: float | None) -> UpstreamFailure:
    """Section 3.5. What it says of a quota goes before what 403 usually means."""
    text = _text_of(said)
    problem: UpstreamFailure
    if status in (403, 429) and any(mark in text for mark in _QUOTA):
        wait = wait_seconds if wait_seconds is not None else _until_midnight_in_beijing(time.time())
        problem = OutOfCredit(said.message or "No quota left on the upstream account.", retry_after_seconds=wait)
    elif status == 400 and "Arrearage" in (said.code, said.type):
        problem = OutOfCredit(said.message or "The upstream account is in arrears.")
        problem.whole_account = True
    elif status == 400 and "session has expired" in text:
        return failure_of_said(target, 401, said)
    elif status == 400 and "enable_thinking" in text and "restricted to true" in text:
        problem = OptionRefused(said.message, option="enable_thinking", code=said.code)
    elif status == 400 and any(mark in text for mark in _FILTERED):
        problem = ContentFiltered(said.message or "The upstream's content policy refused this.", param=said.param)
    elif status == 400 and any(mark in text for mark in _TOO_LONG):
        problem = ContextLength(said.message or "The request is longer than the model's context.", param=said.param or "messages")
    else:
        return failure_of_said(target, status, said, wait_seconds)
    problem.upstream_status = status
    problem.message = without_callers_key(target, problem.message)
    return problem


def _text_of(said: Said) -> str:
    return f"{said.code or ''} {said.type or ''} {said.message}".lower()


def _until_midnight_in_beijing(now: float) -> float:
    """Seconds until the daily quota begins anew."""
    return _DAY_SECONDS - (now + _BEIJING_SECONDS) % _DAY_SECONDS


_STATUS_BY_MARK = (
    (429, (*_QUOTA, "throttling", "limit_requests", "rate limit", "rate_limit", "too many requests")),
    (401, ("invalid_api_key", "invalidapikey", "invalid access token", "token expired", "incorrect api key")),
    (403, ("access_denied", "accessdenied")),
    (404, ("model_not_found", "modelnotfound")),
    (400, (*_FILTERED, "invalid_parameter", "invalidparameter", "arrearage", "invalid_request_error")),
)


def _status_of(said: Said) -> int:
    text = _text_of(said)
    return next((status for status, marks in _STATUS_BY_MARK if any(mark in text for mark in marks)), 500)


def is_error(said: object) -> bool:
    """`{"error": …}`, or DashScope's own `{"code", "message", "request_id"}`."""
    if not isinstance(said, dict):
        return False
    return bool(said.get("error")) or ("choices" not in said and isinstance(said.get("code"), str) and bool(said["code"]))


# Answers

FailureOf = Callable[[Target, Said, int | None], UpstreamFailure]

_CUMULATIVE_FROM = 64  # letters: shorter texts repeat themselves by right
_OPEN, _CLOSE = "<think>", "</think>"


class Text:
    """One field of a stream of deltas. Some deployments send the whole text so far again and again (3.4)."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0

    @property
    def is_empty(self) -> bool:
        return not self._length

    def new_in(self, delta: str) -> str:
        """What this delta adds."""
        if len(delta) >= max(_CUMULATIVE_FROM, self._length) and self._length > 1:
            so_far = "".join(self._parts)
            self._parts = [so_far]
            # A rule, an indent or a blank line may well be followed by more of the same.
            if delta.startswith(so_far) and any(letter.isalnum() for letter in so_far):
                delta = delta[self._length :]
        self._parts.append(delta)
        self._length += len(delta)
        return delta


class Thoughts:
    """Takes thoughts out of a text that begins with `<think>`. One that has the tag further on speaks of it."""

    def __init__(self) -> None:
        self._held = ""
        self._inside: bool | None = None  # None: the text has not begun

    def split(self, text: str) -> tuple[str, str]:
        """(thoughts, text) that are certain by now."""
        if self._inside is False:
            return "", text
        self._held += text
        if self._inside is None:
            begun = self._held.lstrip()
            if _OPEN.startswith(begun[: len(_OPEN)]) and len(begun) < len(_OPEN):
                return "", ""
            self._inside = begun.startswith(_OPEN)
            if not self._inside:
                return "", self._all()
            self._held = begun.removeprefix(_OPEN)
        thoughts, closed, after = self._held.partition(_CLOSE)
        if closed:
            self._inside, self._held = False, ""
            return thoughts, after
        certain = len(self._held) - _begun_at_end(self._held, _CLOSE)
        thoughts, self._held = self._held[:certain], self._held[certain:]
        return thoughts, ""

    def rest(self) -> tuple[str, str]:
        """What was still held when the text ended."""
        held = self._all()
        return (held, "") if self._inside else ("", held)

    def _all(self) -> str:
        held, self._held = self._held, ""
        return held


def _begun_at_end(text: str, mark: str) -> int:
    """How many letters at the end of `text` may be the beginning of `mark`."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


class Call:
    """One tool call as it is put together."""

    def __init__(self) -> None:
        self.index = 0  # as the client knows it
        self.id = ""
        self.name = ""
        self.said = False  # the client knows of it
        self._arguments: list[str] = []  # they come in many small pieces

    def add(self, arguments: str) -> None:
        self._arguments.append(arguments)

    @property
    def arguments(self) -> str:
        self._arguments[:] = ["".join(self._arguments)]
        return self._arguments[0]

    @property
    def is_cut_off(self) -> bool:
        if not self.arguments.strip():
            return False
        try:
            wire.decode_json(self.arguments.encode("utf-8", "surrogatepass"))
        except (msgspec.DecodeError, RecursionError):
            return True
        return False


class Calls:
    """The tool calls of one answer: their pieces come without index, without id, or under an index that is taken (3.4)."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._calls: list[Call] = []
        self._by_place: dict[int, Call] = {}  # the latest under each of the upstream's indexes
        self._said = 0

    def mended(self, pieces: object) -> list[Json]:
        return [piece for one in (pieces if isinstance(pieces, list) else []) if isinstance(one, dict) for piece in self._piece(one)]

    def reason(self, said: str) -> str:
        """Why the answer ended. Arguments that do not parse were cut off, whatever the upstream says (3.4)."""
        if said in ("", "tool_calls", "stop") and any(call.is_cut_off for call in self._calls if call.said):
            return "length"
        if not said:
            return "tool_calls" if self._said else "stop"
        return said if said in REASONS else "stop"

    def _piece(self, piece: Json) -> Iterator[Json]:
        function = piece["function"] if isinstance(piece.get("function"), dict) else {}
        name, arguments = _text(function.get("name")), function.get("arguments")
        if arguments is not None and not isinstance(arguments, str):
            arguments = wire.encode_json(arguments).decode()  # some give the object itself
        call = self._call_of(piece.get("index"), _text(piece.get("id")), name)
        call.add(arguments or "")
        more = {key: value for key, value in piece.items() if key not in ("index", "id", "type", "function")}
        if call.said:
            if arguments:
                yield {"index": call.index, "function": {"arguments": arguments}, **more}
            return
        call.name = call.name or name
        if not call.name:
            return  # nothing can be called that has no name: it is said when one comes
        call.said, call.index = True, self._said
        self._said += 1
        call.id = call.id or f"call_{self._request_id.replace('-', '')}_{call.index}"
        yield {
            "index": call.index,
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
            **more,
        }

    def _call_of(self, place: object, call_id: str, name: str) -> Call:
        if call_id:
            for known in self._calls:
                if known.id == call_id:
                    return known
        last = self._calls[-1] if self._calls else None
        found = self._by_place.get(place) if isinstance(place, int) else last
        if found is None or (name and self._is_another(found, place, call_id, name)):
            found = Call()
            self._calls.append(found)
        if isinstance(place, int):
            self._by_place[place] = found
        found.id = found.id or call_id
        return found

    @staticmethod
    def _is_another(found: Call, place: object, call_id: str, name: str) -> bool:
        """Whether a piece with a name begins a call, under the index of one that is there already, or under none."""
        if call_id:
            return bool(found.name or found.id)
        if not found.name or name != found.name:
            return bool(found.name)
        # It says its name again; or, where nothing but the name tells them apart, it is called once more.
        return not isinstance(place, int) and bool(found.arguments.strip()) and not found.is_cut_off


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def mended_usage(usage: Json) -> tuple[Json, Tokens | None]:
    """Usage as OpenAI writes it: cached tokens stand among the details of the prompt."""
    cached = usage.get("cached_tokens")
    details = usage.get("prompt_tokens_details")
    if isinstance(cached, int) and not (isinstance(details, dict) and details.get("cached_tokens") is not None):
        usage = {name: value for name, value in usage.items() if name != "cached_tokens"}
        usage["prompt_tokens_details"] = {**(details if isinstance(details, dict) else {}), "cached_tokens": cached}
    try:
        return usage, msgspec.convert(usage, wire.Usage).tokens()
    except msgspec.ValidationError:
        return usage, None


def mended_answer(said: Json, target: Target, failure_of: FailureOf) -> tuple[Json, Tokens | None]:
    """A whole answer, without what section 3.4 tells of."""
    tokens: Tokens | None = None
    answer = {**said, "model": target.public_model}
    if isinstance(said.get("usage"), dict):
        answer["usage"], tokens = mended_usage(said["usage"])
    choices: list[Json] = []
    for choice in said["choices"]:
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise UpstreamProtocol("The upstream's answer could not be read.")
        if choice.get("finish_reason") == "error_finish":
            raise failure_of(target, _said_as_content(message.get("content")), 429)
        choices.append(_mended_choice(choice, dict(message), str(answer.get("id") or "0")))
    answer["choices"] = choices
    return answer, tokens


def _mended_choice(choice: Json, message: Json, request_id: str) -> Json:
    message["role"] = "assistant"
    _name_thoughts(message)
    if isinstance(message.get("content"), str) and not message.get("reasoning_content"):
        split = Thoughts()
        thoughts, text = (one + rest for one, rest in zip(split.split(message["content"]), split.rest(), strict=True))
        if thoughts:
            message["content"], message["reasoning_content"] = text, thoughts
    calls = Calls(request_id)
    if "tool_calls" in message:
        # Each is whole: an index that is taken would only confuse.
        pieces = [{**one, "index": index} for index, one in enumerate(message.pop("tool_calls") or ()) if isinstance(one, dict)]
        if whole := [{key: value for key, value in one.items() if key != "index"} for one in calls.mended(pieces)]:
            message["tool_calls"] = whole
    return {**choice, "message": message, "finish_reason": calls.reason(_text(choice.get("finish_reason")))}


def _name_thoughts(message: Json) -> None:
    """Some call them `reasoning`."""
    if isinstance(message.get("reasoning"), str):
        thoughts = message.pop("reasoning")
        message["reasoning_content"] = message.get("reasoning_content") or thoughts


def _said_as_content(content: object) -> Said:
    return said_in(wire.encode_json({"message": _text(content)}))


class MendedStream(SameShape):
    """OpenAI's events, each looked at and written again: without repetitions, with one finish and one usage, at the end.

    Unknown fields of an event and of its choice stay as they are."""

    passes_unread = False  # any delta may repeat what was said

    def __init__(self, ask: Ask, target: Target, failure_of: FailureOf) -> None:
        super().__init__(drop_usage_event=False, says_done=True, target=target)
        self._account, self._failure_of = target, failure_of
        self._wants_usage = ask.client_wants_usage
        self._head: Json = {"object": "chat.completion.chunk"}
        self._text, self._reasoning = Text(), Text()
        self._thoughts = Thoughts()
        self._calls = Calls(ask.request_id)
        self._reason = ""
        self._usage: Json | None = None
        self._role_said = False

    def _look(self, one: bytes) -> bytes | None:
        data = wire.data_of(one)
        if data.startswith(b"[DONE]"):
            if not (self.started or self._reason):
                raise UpstreamProtocol("The upstream's answer is empty.")
            return super()._look(wire.DONE)
        try:
            chunk = wire.decode_json(data) if data.lstrip()[:1] == b"{" else None
        except (msgspec.DecodeError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            return super()._look(one)
        if is_error(chunk):
            raise self._said_error(data)
        return self._chunk(chunk)

    def _not_data(self, one: bytes) -> bytes | None:
        stripped = one.lstrip()
        if not self.started and stripped[:1] == b"{":
            said = said_in(stripped)
            if said.message or said.code:
                raise self._failure_of(self._account, said, None)
        return super()._not_data(one)

    def _said_error(self, data: bytes) -> UpstreamFailure:
        return self._in_place(self._failure_of(self._account, said_in(data), None))

    def _in_place(self, problem: UpstreamFailure) -> UpstreamFailure:
        """Once content has gone out no other account may be tried."""
        if not self.started:
            return problem
        return UpstreamBroke(problem.message or "The upstream reported an error in the middle of the stream.", code=problem.code)

    def _chunk(self, chunk: Json) -> bytes:
        self._head = {name: value for name, value in chunk.items() if name not in ("choices", "usage")} | {
            "object": "chat.completion.chunk",
            "model": self._account.public_model,
        }
        if isinstance(chunk.get("usage"), dict):
            self._usage, self.tokens = mended_usage(chunk["usage"])
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None  # we ask for one
        if not isinstance(choice, dict):
            return b""
        delta = choice["delta"] if isinstance(choice.get("delta"), dict) else {}
        reason = _text(choice.get("finish_reason"))
        if reason == "error_finish":
            raise self._in_place(self._failure_of(self._account, _said_as_content(delta.get("content")), 429))
        out = self._delta(self._mended(delta), {name: value for name, value in choice.items() if name not in ("delta", "finish_reason")})
        if reason and not self._reason:
            self._reason, self._saw_reason = reason, True
        return out

    def _mended(self, delta: Json) -> Json:
        mended = {name: value for name, value in delta.items() if name != "role" and value not in (None, "", [])}
        _name_thoughts(mended)
        if isinstance(mended.get("reasoning_content"), str):
            mended["reasoning_content"] = self._reasoning.new_in(mended["reasoning_content"])
        if isinstance(mended.get("content"), str):
            mended["content"] = self._text.new_in(mended["content"])
            if self._reasoning.is_empty:
                thoughts, mended["content"] = self._thoughts.split(mended["content"])
                if thoughts:
                    mended["reasoning_content"] = thoughts
        if "tool_calls" in mended:
            mended["tool_calls"] = self._calls.mended(mended["tool_calls"])
        return {name: value for name, value in mended.items() if value not in ("", [])}

    def _delta(self, delta: Json, choice: Json) -> bytes:
        """An event, where there is something to say. Once, at the beginning, that is the role."""
        if not delta and self._role_said:
            return b""
        if delta:
            self.started = True
            self.events += 1
            self.content_bytes += _letters_in(delta)
        if not self._role_said:
            self._role_said = True
            delta = {"role": "assistant", "content": "", **delta}
        return self._event([{"index": 0, **choice, "delta": delta, "finish_reason": None}], None)

    def _event(self, choices: list[Json], usage: Json | None) -> bytes:
        event = {**self._head, "choices": choices}
        return wire.event({**event, "usage": usage} if self._wants_usage else event)

    def _unsaid(self) -> bytes:
        thoughts, text = self._thoughts.rest()
        last = {name: value for name, value in (("reasoning_content", thoughts), ("content", text)) if value}
        out = self._delta(last, {}) if last or not self._role_said else b""
        out += self._event([{"index": 0, "delta": {}, "finish_reason": self._calls.reason(self._reason)}], None)
        if self._wants_usage and self._usage is not None:
            out += self._event([], self._usage)
        return out


def _letters_in(delta: Json) -> int:
    letters = sum(len(value) for value in delta.values() if isinstance(value, str))
    return letters + sum(len(one["function"].get("arguments") or "") for one in delta.get("tool_calls", ()))
