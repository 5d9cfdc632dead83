"""An upstream that plays Kimi for Coding: OpenAI's shapes, with the rules, the errors and the oddities of protocol reference 2.

A scenario goes by script or by credential (`sk-kimi-sim-quota`; what follows a `~` only makes it another key). `gate` is the list of
clients it serves (None: everybody), `usage_place` where a stream says what was counted. A boolean `thinking` is ignored, as Moonshot
does, and recorded among the unknown fields.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar
from urllib.parse import parse_qsl

from tests.upstreams import Offer
from tests.upstreams.kit import CREATED, Bill, Call, Step, compact, words
from tests.upstreams.openai import DONE, Json, OpenAIUpstream, Refused, names, pieces, sse, what_to_say

KEYS = re.compile(r"sk-kimi-[A-Za-z0-9_-]+(?:~[\w-]+)?")
MOST_MESSAGE_BYTES = 2 << 20
LISTED: list[Json] = [
    {"id": "kimi-for-coding", "display_name": "Kimi for Coding", "supports_reasoning": True, "supports_thinking_type": "only"},
    {
        "id": "k3",
        "display_name": "K3",
        "supports_reasoning": True,
        "supports_thinking_type": "only",
        "think_efforts": {"support": True, "valid_efforts": ["low", "high", "max"], "default_effort": "max"},
    },
    {"id": "kimi-k2.6", "display_name": "K2.6", "supports_reasoning": True, "supports_thinking_type": "both"},
    {"id": "kimi-k2-0905", "display_name": "K2", "supports_reasoning": False, "supports_thinking_type": "no"},
    {"id": "kimi-claude", "display_name": "For Anthropic's clients", "supports_reasoning": False, "protocol": "anthropic"},
]
FIELDS = names(
    "model messages tools tool_choice stream stream_options max_completion_tokens temperature top_p n presence_penalty frequency_penalty "
    "stop prompt_cache_key thinking response_format"
)
USAGES: Json = {
    "usage": {"limit": "1000", "used": "40", "resetTime": "2026-08-29T05:20:51.443553353Z"},
    "limits": [
        {
            "window": {"duration": 300, "timeUnit": "TIME_UNIT_MINUTE"},
            "detail": {"limit": "100", "remaining": "99", "resetTime": "2026-08-22T11:00:00Z"},
        }
    ],
    "boosterWallet": {
        "balance": {"type": "BOOSTER", "amount": "1000000000", "amountLeft": "750000000"},
        "monthlyChargeLimit": {"priceInCents": "5000", "currency": "USD"},
        "monthlyChargeLimitEnabled": True,
        "monthlyUsed": {"priceInCents": "250", "currency": "USD"},
    },
}
# What stands for one of the kit's own words, or is called otherwise in a key.
REFUSALS: dict[str, tuple[int, str, str, dict[str, str]]] = {
    "bad_key": (401, "invalid_authentication_error", "Invalid Authentication", {}),
    "tier": (401, "invalid_authentication_error", "This model needs a higher membership tier.", {}),
    "no_credit": (402, "", "We are unable to verify your membership benefits at this time.", {}),
    "forbidden": (
        403,
        "access_terminated_error",
        "Kimi For Coding is currently only available for Coding Agents such as Kimi CLI, Claude Code, Roo Code.",
        {},
    ),
    "cycle": (403, "access_terminated_error", "You have reached your usage limit for this billing cycle.", {}),
    "ip": (403, "permission_denied_error", "Your IP is not allowed.", {}),
    "rate_limit": (429, "rate_limit_reached_error", "Your account reached the max RPM: 3, please try again later.", {"retry-after": "2"}),
    "week": (429, "rate_limit_reached_error", "You have reached your weekly usage limit.", {}),
    "quota": (429, "exceeded_current_quota_error", "Your account balance is insufficient, please recharge.", {}),
    "overloaded": (429, "engine_overloaded_error", "The engine is currently overloaded, please try again later.", {"retry-after": "1"}),
    "server_error": (500, "server_error", "failed to connect", {}),
    "unexpected": (500, "unexpected_output", "bot id mismatch", {}),
    "unavailable": (503, "server_unavailable", "The server is unavailable.", {}),
    "529": (529, "overloaded_error", "Overloaded", {}),
    "filtered": (400, "content_filter", "The request was rejected because it was considered high risk", {}),
    "too_long": (400, "invalid_request_error", "Your request exceeded model token limit: 262144", {}),
    "closed": (499, "client_closed_request", "client closed request", {}),
}
BY_KEY = {"expired": "bad_key", "nomember": "no_credit", "blocked": "forbidden", "rpm": "rate_limit", "overload": "overloaded"}


def refused(status: int, message: str, kind: str = "invalid_request_error", headers: dict[str, str] | None = None) -> Refused:
    """Kimi's error body: a message and a type."""
    problem = Refused(status, message, headers=headers)
    problem.body = {"error": {"message": message, "type": kind} if kind else {"message": message}}
    return problem


class KimiUpstream(OpenAIUpstream):
    """Its `base_url` ends in /coding/v1."""

    base_path: ClassVar[str] = "/coding/v1"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._start_over()

    def _start_over(self) -> None:
        self.gate: Sequence[str] | None = None
        self.usage_place = "choice"
        self.forces_tools = True  # False: as some of its back ends, it refuses a tool_choice that wants a call
        self.usages: Json | None = USAGES
        self.overloads: Counter[str] = Counter()
        self.polls: Counter[str] = Counter()
        self.waits: tuple[str, ...] = ("authorization_pending", "authorization_pending", "slow_down")
        self.refresh_tokens: set[str] = set()
        self.access_tokens: set[str] = set()
        self.expires_in = 900
        self.refresh_is_down = False

    def reset(self) -> None:
        super().reset()
        self._start_over()

    def error_frame(self) -> bytes:
        return sse({"error": {"message": "The engine broke in the middle.", "type": "server_error"}})

    async def _answer(self, call: Call) -> None:
        seen = call.seen
        if seen.path.startswith("/api/oauth/"):
            return await self._sign_in(call)
        self._check_client(call)
        if not seen.path.startswith(f"{self.base_path}/"):
            raise refused(404, "method not found", "resource_not_found_error")
        endpoint = seen.path.removeprefix(f"{self.base_path}/")
        match seen.method, endpoint:
            case "GET", "models":
                return await call.json(200, {"data": [{"object": "model", "context_length": 262144, **one} for one in LISTED]})
            case "GET", "usages" if self.usages is not None:
                return await call.json(200, self.usages)
            case "GET", "me":
                return await call.json(200, {"id": "u_sim", "name": "sim"})
            case "POST", "chat/completions":
                return await self._chat_completion(call)
        raise refused(404, "method not found", "resource_not_found_error")

    def _check_client(self, call: Call) -> None:
        scheme, _, key = call.seen.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or not (KEYS.fullmatch(key) or key in self.access_tokens):
            raise refused(401, "The API Key appears to be invalid or may have expired.", "incorrect_api_key_error")
        agent = call.seen.headers.get("user-agent", "")
        if self.gate is not None and not agent.startswith(tuple(self.gate)):
            status, kind, message, _ = REFUSALS["forbidden"]
            raise refused(status, message, kind)

    def step_of(self, call: Call) -> Step:
        with self._lock:
            if self._script:
                return self._script.popleft()
        key = call.seen.headers.get("authorization", "").removeprefix("Bearer ")
        named = key.partition("~")[0].removeprefix("sk-kimi-sim-") if key.startswith("sk-kimi-sim-") else "ok"
        if named == "overload":
            self.overloads[key] += 1
            named = "overload" if self.overloads[key] == 1 else "ok"
        return Step(scenario=BY_KEY.get(named, named))

    async def _chat_completion(self, call: Call) -> None:
        seen = call.seen
        body = _checked(call)
        if not self.forces_tools and body.get("tool_choice", "auto") not in ("auto", "none"):
            raise refused(400, "invalid request: tool_choice 'required' is not supported by this model")
        seen.unknown_fields = {name: value for name, value in body.items() if name not in FIELDS}
        if isinstance(body.get("thinking"), bool):
            seen.unknown_fields["thinking"] = body["thinking"]
        step = self.step_of(call)
        seen.scenario = step.scenario
        if step.scenario in REFUSALS:
            status, kind, message, headers = REFUSALS[step.scenario]
            raise refused(status, message, kind, headers)
        text, reasoning, calls = what_to_say(body, step)
        if step.scenario == "reasoning_then_tools":
            text, reasoning = "", reasoning or "I need the tool"
            calls = [{"id": "ls:0", "type": "function", "function": {"name": "ls", "arguments": '{"path": "."}'}}]
        if step.scenario == "length_empty_content":
            text, reasoning = "", "I think until all is used up"
        usage = dict(step.usage or _usage(body, text, reasoning, calls))
        bill = self.charge(seen, input_tokens=usage["prompt_tokens"])
        reason = "tool_calls" if calls else "length" if step.scenario.startswith("length") else "stop"
        head = {"id": self.next_id("chatcmpl"), "created": CREATED, "model": "kimi-for-coding"}
        if body.get("stream"):
            asked = bool((body.get("stream_options") or {}).get("include_usage"))
            frames = self._frames(head, step, text, reasoning, calls, reason, usage, asked=asked)
            return await self._stream(call, step, list(step.frames or frames), bill, usage["completion_tokens"])
        message: Json = {"role": "assistant", "content": text}
        if reasoning or step.scenario == "empty_reasoning":
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = (
                calls if step.scenario != "no_id" else [{"type": "function", "function": one["function"]} for one in calls]
            )
        choice: Json = {"index": 0, "message": message, "finish_reason": reason}
        answer = {**head, "object": "chat.completion", "choices": [choice]}
        if self.usage_place == "top":
            answer["usage"] = usage
        elif self.usage_place == "choice":
            choice["usage"] = usage
        return await self._whole(call, step, answer, bill, usage["completion_tokens"])

    async def _whole(self, call: Call, step: Step, answer: Json, bill: Bill, output_tokens: int) -> None:
        bill.output_tokens += output_tokens
        await call.whole_with(step, step.body if step.body is not None else compact(answer), self._headers(call))

    def _headers(self, call: Call) -> list[tuple[str, str]]:
        return [("x-request-id", f"req_sim_{len(self.log)}"), ("x-trace-id", "trace_sim")]

    def _frames(
        self, head: Json, step: Step, text: str, reasoning: str, calls: list[Json], reason: str, usage: Json, *, asked: bool
    ) -> list[bytes]:
        deltas: list[Json] = [{"role": "assistant", "content": ""}]
        deltas += [{"reasoning_content": piece} for piece in pieces(reasoning)]
        if step.scenario == "empty_reasoning":
            deltas.append({"reasoning_content": ""})
        deltas += [{"content": piece} for piece in pieces(text)]
        for index, one in enumerate(calls):
            place: Json = {} if step.scenario == "no_index" else {"index": 0 if step.scenario == "same_index" else index}
            begin = {**place, "id": one["id"], "type": "function", "function": {"name": one["function"]["name"], "arguments": ""}}
            if step.scenario == "no_id":
                del begin["id"]
            deltas.append({"tool_calls": [begin]})
            deltas += [{"tool_calls": [{**place, "function": {"arguments": piece}}]} for piece in pieces(one["function"]["arguments"])]
        chunks = [self._chunk(head, {"index": 0, "delta": delta, "finish_reason": None}) for delta in deltas]
        last: Json = {"index": 0, "delta": {}, "finish_reason": reason}
        if self.usage_place == "choice":
            last["usage"] = usage
        chunks.append(self._chunk(head, last))
        if self.usage_place == "top" and asked:
            chunks.append({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        return [*map(sse, chunks), DONE]

    def _chunk(self, head: Json, choice: Json) -> Json:
        return {**head, "object": "chat.completion.chunk", "choices": [choice]}

    # Signing in (2.10)

    async def _sign_in(self, call: Call) -> None:
        form = dict(parse_qsl(call.seen.body.decode()))
        if call.seen.method != "POST" or not form.get("client_id"):
            return await call.json(400, {"error": "invalid_request"})
        if call.seen.path == "/api/oauth/device_authorization":
            page = f"{self.origin}/device"
            return await call.json(
                200,
                {
                    "user_code": "SIM-CODE",
                    "device_code": self.next_id("device"),
                    "verification_uri": page,
                    "verification_uri_complete": f"{page}?user_code=SIM-CODE",
                    "expires_in": 600,
                    "interval": 1,
                },
            )
        if call.seen.path != "/api/oauth/token":
            return await call.json(404, {"error": "not_found"})
        if form.get("grant_type") == "refresh_token":
            return await self._refresh(call, form.get("refresh_token", ""))
        return await self._poll(call, form.get("device_code", ""))

    async def _poll(self, call: Call, device_code: str) -> None:
        self.polls[device_code] += 1
        if self.polls[device_code] <= len(self.waits):
            return await call.json(400, {"error": self.waits[self.polls[device_code] - 1]})
        return await call.json(200, self._tokens())

    async def _refresh(self, call: Call, token: str) -> None:
        if self.refresh_is_down:
            return await call.json(503, {"error": "temporarily_unavailable"})
        if token not in self.refresh_tokens:
            return await call.json(400, {"error": "invalid_grant"})
        self.refresh_tokens.discard(token)  # it rotates: a second use is refused
        return await call.json(200, self._tokens())

    def _tokens(self) -> Json:
        access, refresh = self.next_id("access"), self.next_id("refresh")
        self.access_tokens.add(access)
        self.refresh_tokens.add(refresh)
        return {
            "access_token": access,
            "refresh_token": refresh,
            "expires_in": self.expires_in,
            "scope": "kimi-code",
            "token_type": "Bearer",
        }


# What is checked (2.5, 2.6)


def _checked(call: Call) -> Json:
    if call.seen.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise refused(400, "Content-Type must be application/json")
    try:
        body = json.loads(call.seen.body)
    except ValueError:
        raise refused(400, "Invalid request: the body is not JSON") from None
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise refused(400, "Invalid request: messages must not be empty")
    model = next((one for one in LISTED if one["id"] == body.get("model")), None)
    if model is None or model.get("protocol") == "anthropic":
        raise refused(404, f"Not found the model {body.get('model')} or Permission denied", "resource_not_found_error")
    if body.get("temperature", 1) != 1:
        raise refused(400, "invalid temperature: only 1 is allowed for this model")
    size = len(compact(body["messages"]))
    if size > MOST_MESSAGE_BYTES:
        raise refused(400, f"total message size {size} exceeds limit {MOST_MESSAGE_BYTES}")
    _check_messages(body["messages"], thinks=_thinks(body.get("thinking"), model))
    _check_tools(body.get("tools") or [])
    return body


def _thinks(thinking: Any, model: Json) -> bool:
    can = model.get("supports_thinking_type", "no")
    if thinking is None or isinstance(thinking, bool):
        return bool(can != "no")
    if not isinstance(thinking, dict) or thinking.get("type") not in ("enabled", "disabled"):
        raise refused(400, "invalid thinking: type must be enabled or disabled")
    if thinking["type"] == "disabled" and can == "only":
        raise refused(400, "invalid thinking: this model does not support disabled")
    efforts = (model.get("think_efforts") or {}).get("valid_efforts") or []
    if thinking.get("effort") is not None and thinking["effort"] not in efforts:
        raise refused(400, f"invalid thinking effort: {thinking['effort']}")
    return bool(can != "no" and thinking["type"] == "enabled")


def _check_messages(messages: list[Json], *, thinks: bool) -> None:
    waiting: list[str] = []
    for index, message in enumerate(messages):
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if role not in ("system", "user", "assistant", "tool"):
            raise refused(400, f"invalid role: {role}")
        if role == "tool":
            if message.get("tool_call_id") not in waiting:
                raise refused(400, f"tool_call_id {message.get('tool_call_id')} not found")
            waiting.remove(message["tool_call_id"])
        elif waiting:
            raise refused(400, f"an assistant message with 'tool_calls' must be followed by tool messages: {waiting}")
        for part in content if isinstance(content, list) else ():
            _check_part(part)
        if calls:
            waiting = [one["id"] for one in calls]
            texts = [part.get("text") for part in content if part.get("type") == "text"] if isinstance(content, list) else [content]
            if "content" in message and not all(texts):
                raise refused(400, "text content is empty")
            if thinks and not isinstance(message.get("reasoning_content"), str):
                said = "thinking is enabled but reasoning_content is missing in assistant tool call message at index"
                raise refused(400, f"{said} {index}")
    if waiting:
        raise refused(400, f"an assistant message with 'tool_calls' must be followed by tool messages: {waiting}")


def _check_part(part: Json) -> None:
    kind = part.get("type")
    if kind not in ("text", "image_url", "video_url"):
        raise refused(400, f"unsupported content type: {kind}")
    if kind != "text":
        given = part[kind]
        url = given["url"] if isinstance(given, dict) else given
        if not url.startswith(("data:", "ms://")):
            raise refused(400, "unsupported image url")


def _check_tools(tools: list[Json]) -> None:
    names = [tool["function"]["name"] for tool in tools if isinstance(tool.get("function"), dict)]
    for name, count in Counter(names).items():
        if count > 1:
            raise refused(400, f"function name {name} is duplicated")
    for tool in tools:
        if tool.get("type") == "builtin_function" and tool["function"]["name"].startswith("$"):
            continue
        if tool.get("type") != "function":
            raise refused(400, f"invalid tool type: {tool.get('type')}")
        if "strict" in tool["function"]:
            raise refused(400, "invalid schema: strict is not supported")
        _check_schema(tool["function"].get("parameters") or {}, is_property=False)


def _check_schema(node: Any, *, is_property: bool) -> None:
    if not isinstance(node, dict):
        return
    if "$ref" in node:
        raise refused(400, "invalid schema: $ref is not supported")
    if is_property and not node.keys() & {"type", "anyOf", "oneOf", "allOf"}:
        raise refused(400, "invalid schema: a property has no type")
    for inner in (node.get("properties") or {}).values():
        _check_schema(inner, is_property=True)
    _check_schema(node.get("items"), is_property=True)
    for inner in node.get("anyOf") or ():
        _check_schema(inner, is_property=True)


def _usage(body: Json, text: str, reasoning: str, calls: list[Json]) -> Json:
    asked = " ".join(_text_of(message) for message in body["messages"])
    prompt = words(asked)
    output = words(text) + words(reasoning) + sum(words(one["function"]["arguments"]) for one in calls)
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output, "cached_tokens": prompt // 2}


def _text_of(message: Json) -> str:
    content = message.get("content") or ""
    parts = [str(part.get("text", "")) for part in content] if isinstance(content, list) else [content]
    return " ".join([*parts, message.get("reasoning_content") or ""])


OFFER = Offer(
    kind="kimi",
    simulator=KimiUpstream,
    model="kimi-for-coding",
    secret="sk-kimi-sim-ok",
    can=frozenset({"system", "tools", "parallel_tools", "structured", "images", "reasoning", "usage"}),
    drops=frozenset({"temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "user", "metadata", "store", "service_tier"}),
)
