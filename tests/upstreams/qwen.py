"""Qwen's three hosts in one: DashScope (`/compatible-mode/v1`, API keys), the portal and the Coding Plan (`/v1`), and the sign-in.

It refuses what they refuse, in their words and shapes, and has every oddity of their streams as a scenario: by script, by API key
(`sk-sim-429`) or by model (`sim-cumulative`). The token endpoint has a script of its own (`script_tokens`).
Source: protocol reference gemini-qwen-codegeex.md, sections 3 and 6.3.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, ClassVar
from urllib.parse import parse_qs

from tests.upstreams import CAPABILITIES, Offer
from tests.upstreams.kit import CREATED, Bill, Call, Step, compact
from tests.upstreams.openai import DONE, KEYS, OpenAIUpstream, _usage, names, pieces, sse, what_to_say

Json = dict[str, Any]

MODELS = {"coder-model": 65_536, "vision-model": 32_768, "qwen3-coder-plus": 65_536, "qwen3-max": 65_536, "qwen3.8-max": 65_536}
ALWAYS_THINKS = "thinking"  # in the name of a model that cannot be told not to
THINKS_BY_ITSELF = ("coder-model", "qwen3.8-max")
FIELDS = names(
    "model messages stream stream_options max_tokens temperature top_p top_k presence_penalty repetition_penalty seed stop tools "
    "tool_choice parallel_tool_calls response_format enable_thinking thinking_budget preserve_thinking reasoning_effort "
    "vl_high_resolution_images metadata n logprobs top_logprobs frequency_penalty"
)
LONG = (
    "The water comes from the mill pond above the house and runs for half a mile beside the road. "
    "Then it falls over the weir and is gone. Nobody has ever measured how much of it there is in a dry summer. "
    "The miller says that it is enough."
)
SCOPE = "openid profile email model.completion"


class Refused(Exception):
    """What the upstream answers instead. `native`: in DashScope's own shape."""

    def __init__(
        self, status: int, code: str, message: str, *, kind: str = "", native: bool = False, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = list((headers or {}).items())
        error = {"message": message, "type": kind or code, "param": None, "code": code}
        self.body: Json = {"code": code, "message": message} if native else {"error": error}
        self.body["request_id"] = "req-sim"


def invalid(message: str) -> Refused:
    return Refused(400, "invalid_parameter_error", message, kind="invalid_request_error")


THROTTLED = "Requests throttling triggered."


def refusal(scenario: str) -> Refused | None:
    """The error that a scenario stands for (3.5); None when it stands for an answer."""
    match scenario:
        case "401" | "bad_key":
            return Refused(401, "invalid_api_key", "invalid access token or token expired", kind="invalid_request_error")
        case "400-session":
            return invalid("Your session has expired. Please sign in again.")
        case "403-quota" | "no_credit":
            return Refused(403, "insufficient_quota", "Free allocated quota exceeded.")
        case "429-quota":
            return Refused(429, "quota_exceeded", "Free allocated quota exceeded.")
        case "403-model" | "forbidden":
            return Refused(403, "Model.AccessDenied", "Model access denied.", kind="access_denied")
        case "403-native":
            return Refused(403, "AccessDenied.Unpurchased", "Access to model denied.", native=True)
        case "429" | "rate_limit":
            return Refused(429, "limit_requests", THROTTLED, headers={"retry-after": "2"})
        case "429-date":
            return Refused(429, "limit_requests", THROTTLED, headers={"retry-after": formatdate(time.time() + 3, usegmt=True)})
        case "429-bare":
            return Refused(429, "Throttling.RateQuota", THROTTLED)
        case "429-native":
            return Refused(429, "Throttling.AllocationQuota", "Allocated quota exceeded, please increase your quota limit.", native=True)
        case "400-filter":
            message = "Input data may contain inappropriate content."
            return Refused(400, "data_inspection_failed", message, kind="data_inspection_failed")
        case "400-filter-native":
            return Refused(400, "DataInspectionFailed", "Output data may contain inappropriate content.", native=True)
        case "400-arrears":
            return Refused(400, "Arrearage", "Access denied, please make sure your account is in good standing.")
        case "400-length":
            return invalid("Range of input length should be [1, 129024]")
        case "400":
            return invalid("Value error, temperature must be lower than 2")
        case "404":
            return Refused(404, "model_not_found", "The model `sim-404` does not exist.", kind="invalid_request_error")
        case "500" | "server_error":
            return Refused(500, "internal_error", "An internal error has occured, please try again later.", kind="internal_error")
        case "500-native":
            return Refused(500, "InternalError.Algo", "inference error", native=True)
        case "503" | "overloaded":
            return Refused(503, "ModelServingError", "Too many requests. Your requests are being throttled due to system capacity limits.")
        case "leak":
            return Refused(
                500, "internal_error", "Bad gateway\nfor key sk-sim-leak and Bearer qat-secret-0123456789abcdef\x07 " + "x" * 2000
            )
    return None


@dataclass
class Login:
    """A device that waits for a person."""

    client_id: str
    user_code: str
    challenge: str
    expires_at: float
    polls_left: int
    approved: bool = False
    used: bool = False


@dataclass
class Pair:
    """An access token and the refresh token that came with it. A family begins with one sign-in."""

    access: str
    refresh: str
    family: int
    expires_at: float
    spent: bool = False


class QwenUpstream(OpenAIUpstream):
    """`base_url` is DashScope's; `portal` what a token reply names as `resource_url`."""

    base_path: ClassVar[str] = "/compatible-mode/v1"

    def __init__(self, **options: Any) -> None:
        super().__init__(models=tuple(MODELS), **options)
        self.polls_before_approval = 0
        self.interval_seconds: int | None = None  # None: not said, as the vendor did
        self.rotate = True
        self.token_seconds = 21_600
        self.clock_offset_seconds = 0.0
        self.resource_url: str | None = None  # None: this server's own origin
        self.region = "/region"  # the portal is served below it, too
        self.logins: dict[str, Login] = {}
        self.pairs: list[Pair] = []
        self.dead_families: set[int] = set()
        self.refreshes = 0
        self.without_auth_type = 0  # calls with a token of the sign-in that did not say so: recorded, not refused
        self._token_steps: deque[str] = deque()

    # For tests

    @property
    def portal(self) -> str:
        return self.origin

    @property
    def oauth_settings(self) -> dict[str, str]:
        """What an operator would configure."""
        urls = {"token_url": f"{self.origin}/api/v1/oauth2/token", "device_code_url": f"{self.origin}/api/v1/oauth2/device/code"}
        return {"auth": "oauth", "client_id": "sim-client", **urls}

    def script_tokens(self, *steps: str) -> None:
        """The next answers of the token endpoint: see `_scripted_token`. `ok`: as it would without a script."""
        self._token_steps.extend(steps)

    def issue(self) -> Json:
        """Tokens of a sign-in that went well, as the token endpoint gives them."""
        return self._token_reply(self._new_pair(family=len(self.pairs) + 1))

    def credential_file(self) -> str:
        """`oauth_creds.json` of Qwen's own tool, for a new sign-in."""
        reply = self.issue()
        kept = {name: reply[name] for name in ("access_token", "refresh_token", "token_type", "resource_url")}
        return json.dumps({**kept, "expiry_date": int((time.time() + reply["expires_in"]) * 1000)})

    def approve(self, user_code: str) -> None:
        for login in self.logins.values():
            login.approved |= login.user_code == user_code

    def revoke(self, access: str) -> None:
        """The chat endpoint no longer takes it; its refresh token works on."""
        for pair in self.pairs:
            if pair.access == access:
                pair.expires_at = 0

    def reset(self) -> None:
        super().reset()
        self._token_steps.clear()
        self.refreshes = self.without_auth_type = 0

    # The server

    async def answer(self, call: Call) -> None:
        try:
            await self._route(call)
        except Refused as refused:
            await call.json(refused.status, refused.body, [("x-request-id", "req-sim"), *refused.headers])

    async def _route(self, call: Call) -> None:
        match (call.seen.method, call.seen.path.removeprefix(self.region)):
            case ("POST", "/api/v1/oauth2/device/code"):
                return await self._device_code(call)
            case ("POST", "/api/v1/oauth2/token"):
                return await self._token(call)
            case ("GET", "/authorize"):
                self.approve(call.seen.query.get("user_code", ""))
                return await call.whole(200, b"<p>You may close this page.</p>", "text/html")
            case ("POST", "/v1/chat/completions" | "/compatible-mode/v1/chat/completions"):
                self._authenticate(call)
                return await self._completion_of_chat(call)
            case ("GET", "/compatible-mode/v1/models"):
                self._authenticate(call)
                return await call.json(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]})
        raise Refused(404, "not_found", f"No route for {call.seen.method} {call.seen.path}", kind="invalid_request_error")

    def _authenticate(self, call: Call) -> None:
        scheme, _, token = call.seen.headers.get("authorization", "").partition(" ")
        on_portal = call.seen.path.removeprefix(self.region).startswith("/v1/")
        pair = next((one for one in self.pairs if one.access == token), None)
        if scheme == "Bearer" and on_portal and pair is not None:
            if self._now() >= pair.expires_at or pair.family in self.dead_families:
                raise _expired()
            self.without_auth_type += call.seen.headers.get("x-dashscope-authtype") != "qwen-oauth"
            return
        if scheme != "Bearer" or not KEYS.fullmatch(token):
            if on_portal:
                raise _expired()
            raise Refused(401, "invalid_api_key", "Incorrect API key provided. ", kind="invalid_request_error")

    # Signing in

    def _now(self) -> float:
        return time.monotonic() + self.clock_offset_seconds

    async def _device_code(self, call: Call) -> None:
        form = _form(call)
        if form.get("code_challenge_method") != "S256" or len(form.get("code_challenge", "")) != 43 or not form.get("client_id"):
            return await _oauth_error(call, 400, "invalid_request", "client_id and a code challenge are required")
        if form.get("scope") != SCOPE:
            return await _oauth_error(call, 400, "invalid_scope", "unknown scope")
        number = len(self.logins) + 1
        code = f"ABCD-{number:04}"
        self.logins[f"dev-sim-{number}"] = Login(
            form["client_id"], code, form["code_challenge"], self._now() + 900, self.polls_before_approval
        )
        page = f"{self.origin}/authorize"
        reply = {"device_code": f"dev-sim-{number}", "user_code": code, "verification_uri": page, "expires_in": 900}
        reply |= {"interval": self.interval_seconds} if self.interval_seconds is not None else {}
        return await call.json(200, {**reply, "verification_uri_complete": f"{page}?user_code={code}&client=sim"})

    async def _token(self, call: Call) -> None:
        form = _form(call)
        step = self._token_steps.popleft() if self._token_steps else "ok"
        if step not in ("ok", "no_resource_url", "no_refresh_token"):
            return await _scripted_token(call, step)
        match form.get("grant_type"):
            case "urn:ietf:params:oauth:grant-type:device_code":
                found: Pair | tuple[int, str] = self._redeem(form)
            case "refresh_token":
                found = self._refresh(form)
            case _:
                found = (400, "unsupported_grant_type")
        if isinstance(found, tuple):
            return await _oauth_error(call, *found)
        reply = self._token_reply(found)
        if step == "no_resource_url":
            del reply["resource_url"]
        if step == "no_refresh_token" or (not self.rotate and form["grant_type"] == "refresh_token"):
            del reply["refresh_token"]
        return await call.json(200, reply)

    def _redeem(self, form: Mapping[str, str]) -> Pair | tuple[int, str]:
        login = self.logins.get(form.get("device_code", ""))
        if login is None or login.used or login.client_id != form.get("client_id"):
            return (401, "invalid_grant")
        if self._now() >= login.expires_at:
            return (400, "expired_token")
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != login.challenge:
            return (400, "invalid_grant")
        if not login.approved:
            if login.polls_left <= 0:
                return (400, "authorization_pending")
            login.polls_left -= 1
            login.approved = login.polls_left == 0
            return (400, "authorization_pending")
        login.used = True
        return self._new_pair(family=len(self.pairs) + 1)

    def _refresh(self, form: Mapping[str, str]) -> Pair | tuple[int, str]:
        pair = next((one for one in self.pairs if one.refresh == form.get("refresh_token")), None)
        if not form.get("client_id"):
            return (400, "invalid_request")
        if pair is None or pair.family in self.dead_families:
            return (400, "invalid_grant")
        if pair.spent and self.rotate:
            self.dead_families.add(pair.family)  # somebody has a copy: none of its tokens is good any more
            return (400, "invalid_grant")
        pair.spent = True
        self.refreshes += 1
        return self._new_pair(family=pair.family, refresh="" if self.rotate else pair.refresh)

    def _new_pair(self, *, family: int, refresh: str = "") -> Pair:
        number = len(self.pairs) + 1
        pair = Pair(f"qat-sim-{number}", refresh or f"qrt-sim-{number}", family, self._now() + self.token_seconds)
        self.pairs.append(pair)
        return pair

    def _token_reply(self, pair: Pair) -> Json:
        reply = {"access_token": pair.access, "refresh_token": pair.refresh, "token_type": "Bearer", "expires_in": self.token_seconds}
        return {**reply, "scope": SCOPE, "resource_url": self.resource_url or self.origin, "status": "success"}

    # Chat

    async def _completion_of_chat(self, call: Call) -> None:
        body = call.seen.json
        if call.seen.headers.get("content-type") != "application/json" or not isinstance(body, dict):
            raise invalid("The request body is not valid JSON.")
        call.seen.unknown_fields = {name: value for name, value in body.items() if name not in FIELDS}
        step = self.step_of(call)
        call.seen.scenario = step.scenario
        if (problem := refusal(step.scenario)) is not None:
            raise problem
        _check(body)
        text, reasoning, calls = _said_by(body, step)
        usage = dict(step.usage or _usage(_asked(body), text, reasoning, calls, cached=step.scenario in ("cached", "cached_top")))
        if step.scenario == "cached_top":
            usage["cached_tokens"] = usage.pop("prompt_tokens_details")["cached_tokens"]
        bill = self.charge(call.seen, input_tokens=usage.get("prompt_tokens", 0))
        finish = step.finish_reason or ("tool_calls" if calls else "length" if step.scenario == "length" else "stop")
        answer = {"id": self.next_id("chatcmpl"), "created": CREATED, "model": body["model"]}
        if body.get("stream"):
            frames = [bytes(frame) for frame in step.frames] if step.frames is not None else None
            if frames is None:
                chunks = Chunks(answer, step.scenario, finish).all(text, reasoning, calls)
                wants_usage = (body.get("stream_options") or {}).get("include_usage")
                frames = [*map(sse, chunks), *([sse({**Chunks(answer).head, "choices": [], "usage": usage})] if wants_usage else []), DONE]
            return await self._stream(call, step, frames, bill, usage.get("completion_tokens", 0))
        if step.scenario == "error_200":
            return await call.json(200, Refused(200, "Throttling", THROTTLED).body)
        message: Json = {"role": "assistant", "content": text or ("" if calls else None)}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        message |= {"tool_calls": [{"index": n, **one} for n, one in enumerate(calls)]} if calls else {}
        choices = [{"index": 0, "message": message, "finish_reason": finish}]
        return await self._whole(
            call, step, {**answer, "object": "chat.completion", "choices": choices, "usage": usage}, bill, usage["completion_tokens"]
        )

    def error_frame(self) -> bytes:
        return sse(Refused(500, "internal_error", "It failed in the middle.").body)

    def big_frame(self) -> bytes:
        return sse(Chunks({"id": "chatcmpl-big", "created": CREATED, "model": "big"}).of({"content": "x" * (1 << 20)}))

    async def _whole(self, call: Call, step: Step, answer: Json, bill: Bill, output_tokens: int) -> None:
        bill.output_tokens += output_tokens
        await call.whole_with(step, step.body if step.body is not None else compact(answer), step.headers)


class Chunks:
    """The events of one answer, with the oddity that a scenario names (3.4)."""

    def __init__(self, answer: Json, scenario: str = "", finish: str = "stop") -> None:
        self.head = {**answer, "object": "chat.completion.chunk"}
        self._scenario, self._finish = scenario, finish

    def of(self, delta: Json, reason: str | None = None, **more: Any) -> Json:
        return {**self.head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], "usage": None, **more}

    def all(self, text: str, reasoning: str, calls: list[Json]) -> list[Json]:
        thoughts, words = pieces(reasoning), pieces(text)
        if self._scenario == "cumulative":
            words = [text[:end] for end in range(80, len(text) + 40, 40)]
            words = [*words, words[-1]]
        named = "reasoning" if self._scenario == "reasoning_field" else "reasoning_content"
        deltas: list[Json] = [{"content": None, named: piece} for piece in thoughts]
        deltas += [{"content": piece, "role": None if n % 2 else ""} for n, piece in enumerate(words)]
        deltas += [{"content": "", "tool_calls": [piece]} for n, one in enumerate(calls) for piece in self._call_pieces(n, one)]
        deltas[:1] = [{**one, "role": "assistant"} for one in deltas[:1]] or [{"role": "assistant", "content": ""}]
        chunks = [self.of(delta) for delta in deltas]
        last = self.of({"content": ""}, self._finish)
        match self._scenario:
            case "error_finish":
                return [self.of({"role": "assistant", "content": THROTTLED}, "error_finish")]
            case "error_finish_mid":
                return [*chunks[:3], self.of({"content": THROTTLED}, "error_finish")]
            case "double_finish":
                return [*chunks, last, self.of({"content": ""}, "stop", usage={"prompt_tokens": 1, "completion_tokens": 1})]
            case "after_finish":
                return [*chunks[:-1], last, chunks[-1]]
        return [*chunks, last]

    def _call_pieces(self, number: int, one: Json) -> list[Json]:
        """Five pieces: the first has id and name, the others an empty id."""
        arguments, name = one["function"]["arguments"], one["function"]["name"]
        size = max(1, -(-len(arguments) // 4))
        cut = [arguments[at : at + size] for at in range(0, len(arguments), size)]
        if self._scenario == "tool_truncated":
            cut = cut[:-1]
        place = {"index": 0 if self._scenario == "tool_same_index" else number}
        if self._scenario == "tool_no_index":
            place = {}
        first = {**place, "id": one["id"], "type": "function", "function": {"name": name, "arguments": ""}}
        if self._scenario == "tool_no_id":
            first["id"] = ""
        later = [{**place, "id": "", "function": {"name": None, "arguments": piece}} for piece in cut]
        nameless = [{"index": 7, "id": "", "function": {"name": "", "arguments": ""}}] if self._scenario == "tool_nameless" else []
        return [first, *later, *nameless]


def _said_by(body: Json, step: Step) -> tuple[str, str, list[Json]]:
    asked_for = "tool_calls_parallel" if step.scenario in ("tool_same_index", "tool_no_index", "tool_no_id") else step.scenario
    asked_for = "tool_call" if asked_for in ("tool_truncated", "tool_nameless") else asked_for
    asked_for = "reasoning" if asked_for == "reasoning_field" else asked_for
    text, reasoning, calls = what_to_say(body, Step(**{**vars(step), "scenario": asked_for}))
    if step.text is None and step.scenario == "cumulative":
        text = LONG
    if step.text is None and step.scenario == "think_tags":
        text = f"<think>I wonder.</think>{text}"
    if step.text is None and (body.get("response_format") or {}).get("type") == "json_object":
        text = '{"answer": 7}'
    if body.get("enable_thinking") is True and not reasoning:
        reasoning = "I think about it"
    return text, reasoning, calls


def _asked(body: Json) -> str:
    parts = [one.get("content") for one in body["messages"]]
    texts = [part if isinstance(part, str) else " ".join(str(one.get("text", "")) for one in part or ()) for part in parts]
    return " ".join(texts)


def _check(body: Json) -> None:
    """What Qwen refuses (3.2, 6.3)."""
    model, messages = body.get("model"), body.get("messages")
    if not isinstance(model, str) or (model not in MODELS and ALWAYS_THINKS not in model and not model.startswith("sim-")):
        raise Refused(404, "model_not_found", f"The model `{model}` does not exist or you do not have access to it.")
    if not isinstance(messages, list) or not messages:
        raise invalid("[] is too short - 'messages'")
    roles = [one.get("role") for one in messages]
    if set(roles) - {"system", "user", "assistant", "tool"}:
        raise invalid(f"{roles} has a role that is not one of ['system', 'assistant', 'user', 'tool']")
    if "system" in roles[1:]:
        raise invalid("There must be one system message, at the beginning.")
    if "user" not in roles:
        raise invalid("There must be a user message.")
    _check_tools(messages)
    if body.get("tools") == [] or ("tool_choice" in body and not body.get("tools")):
        raise invalid("[] is too short - 'tools'")
    if body.get("stream_options") is not None and not body.get("stream"):
        raise invalid("The 'stream_options' parameter is only allowed when 'stream' is enabled.")
    if (body.get("n") or 1) != 1:
        raise invalid("'n' must be 1")
    if not 1 <= (body.get("max_tokens") or 1) <= MODELS.get(model, 65_536):
        raise invalid(f"Range of max_tokens should be [1, {MODELS.get(model, 65_536)}]")
    _check_thinking(model, body)


def _check_thinking(model: str, body: Json) -> None:
    thinks = body.get("enable_thinking")
    if thinks is False and ALWAYS_THINKS in model:
        raise invalid("The value of the enable_thinking parameter is restricted to True.")
    if model.startswith("qwen3.8-max") and "reasoning_effort" in body and {"enable_thinking", "thinking_budget"} & body.keys():
        raise invalid("reasoning_effort cannot be combined with enable_thinking or thinking_budget.")
    if not (thinks or (thinks is None and (model in THINKS_BY_ITSELF or ALWAYS_THINKS in model))):
        return
    if body.get("tool_choice") == "required" or isinstance(body.get("tool_choice"), dict):
        raise invalid("The tool_choice parameter does not support being set to required or object in thinking mode")
    if str((body.get("response_format") or {}).get("type")).startswith("json") and ALWAYS_THINKS not in model:
        raise invalid("Json mode response is not supported when enable_thinking is true")


def _check_tools(messages: list[Json]) -> None:
    waiting: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            if message.get("tool_call_id") not in waiting:
                raise invalid('messages with role "tool" must be a response to a preceeding message with "tool_calls".')
            waiting.discard(message["tool_call_id"])
        elif waiting:
            raise invalid('An assistant message with "tool_calls" must be followed by tool messages.')
        if message["role"] == "assistant":
            waiting = {one["id"] for one in message.get("tool_calls") or ()}


# The token endpoint's words


def _expired() -> Refused:
    return Refused(401, "invalid_api_key", "invalid access token or token expired", kind="invalid_request_error")


def _form(call: Call) -> dict[str, str]:
    if call.seen.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        return {}
    return {name: values[0] for name, values in parse_qs(call.seen.body.decode()).items()}


async def _oauth_error(call: Call, status: int, error: str, description: str = "") -> None:
    await call.json(status, {"error": error, "error_description": description or error})


async def _scripted_token(call: Call, step: str) -> None:
    """`401`, `429`, `500`, `error_200`, `not_json`, `html`, `slow_down` (429), or an OAuth error's name (400)."""
    match step:
        case "401":
            await _oauth_error(call, 401, "invalid_client")
        case "429":
            await _oauth_error(call, 429, "rate_limited")
        case "slow_down":
            await _oauth_error(call, 429, "slow_down")
        case "500":
            await call.json(500, {"error": "server_error"})
        case "error_200":
            await _oauth_error(call, 200, "server_error")
        case "not_json":
            await call.whole(200, b"access_token=", "text/plain")
        case "html":
            await call.whole(200, b"<html>sign in</html>", "text/html")
        case _:
            await _oauth_error(call, 400, step)


OFFER = Offer(
    kind="qwen",
    simulator=QwenUpstream,
    model="qwen3-coder-plus",
    can=frozenset(CAPABILITIES),
    drops=frozenset({"store", "service_tier", "user", "logit_bias"}),
)

__all__ = ["LONG", "OFFER", "QwenUpstream", "Refused", "Step"]
