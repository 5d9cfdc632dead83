"""An upstream that plays Puter: the driver call, its normalisation of messages, its vendors and its errors of three generations.

A scenario goes by script or by token (`puter-sim-402`, `puter-sim-402~2`: what follows the tilde only makes the token another
one). It judges as the server and the vendor behind it would (protocol reference 3.4): what a vendor would get is kept in
`vendor`, with what the server spoils on the way. Each token has a credit in words, where `credit` names it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from tests.upstreams import Offer
from tests.upstreams.kit import Bill, Call, Simulator, Step, compact, words

Json = dict[str, Any]
TOKENS = re.compile(r"puter-sim-[a-z0-9_-]+(?:~[\w-]+)?")
CANNED = "You have reached your AI usage limit for this account."
NO_CREDIT = "No usage left for request."
RESELLERS = ("openrouter", "together-ai", "infron")
CHAT_ROUTES = ("openai-completion", "openrouter", "deepseek", "gemini", "mistral", "xai")
KNOWN_ARGS = frozenset(
    "messages model provider stream max_tokens temperature tools reasoning_effort reasoning verbosity text response compaction "  # noqa: SIM905
    "context_management image_config vision tool_choice top_p parallel_tool_calls instructions previous_response_id metadata store "
    "include service_tier custom".split()
)


def model(name: str, provider: str, *aliases: str, puter_id: str = "", keys: str = "prompt completion", **costs: float) -> Json:
    """One entry of the list; costs in cents for a million tokens."""
    fresh, output = keys.split()
    detail: Json = {"id": name, "provider": provider, "name": name.title(), "aliases": list(aliases), "context": 128000, "max_tokens": 8192}
    if puter_id:
        detail["puterId"] = puter_id
    detail |= {"costs_currency": "usd-cents", "input_cost_key": fresh, "output_cost_key": output}
    detail["costs"] = {"tokens": 1_000_000, fresh: 28, output: 88, **costs}
    return detail


OPENAI_KEYS, CLAUDE_KEYS = "prompt_tokens completion_tokens", "input_tokens output_tokens"
MODELS: tuple[Json, ...] = (
    model(
        "gpt-4o-mini", "openai-completion", puter_id="openai:openai/gpt-4o-mini", keys=OPENAI_KEYS, prompt_tokens=15, completion_tokens=60
    ),
    model("gpt-5", "openai-responses", puter_id="openai:openai/gpt-5", keys=OPENAI_KEYS),
    model(
        "claude-haiku-4-5-20251001",
        "claude",
        "claude-haiku-4-5",
        puter_id="anthropic:anthropic/claude-haiku-4-5",
        keys=CLAUDE_KEYS,
        input_tokens=100,
        output_tokens=500,
        cache_read_input_tokens=10,
        ephemeral_5m_input_tokens=125,
    ),
    model("openrouter:anthropic/claude-haiku-4.5", "openrouter", "claude-haiku-4-5"),
    model("gemini-2.5-flash", "gemini", puter_id="google:google/gemini-2.5-flash", keys=OPENAI_KEYS, thinking_tokens=88),
    model("deepseek-chat", "deepseek", puter_id="deepseek:deepseek/deepseek-chat", keys=OPENAI_KEYS),
    model("openrouter:deepseek/deepseek-chat", "openrouter", "deepseek/deepseek-chat", "openrouter/deepseek/deepseek-chat", request=0),
    model("mistral-small", "mistral", keys=OPENAI_KEYS),
    model("fake", "fake-chat", keys=CLAUDE_KEYS, input_tokens=0, output_tokens=0),
    *(model(f"openrouter:vendor-{n % 40}/model-{n}:free", "openrouter", prompt=0, completion=0) for n in range(320)),
)


class Refused(Exception):
    """What the server answers instead."""

    def __init__(self, status: int, body: Json, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(str(body))
        self.status, self.body, self.headers = status, body, list(headers)


def gen3(status: int, code: str, message: str, headers: Sequence[tuple[str, str]] = (), **more: Any) -> Refused:
    return Refused(status, {"error": message, "message": message, "code": code, **more}, headers)


def gen2(code: str, message: str, status: int) -> Refused:
    error = {"$": "heyputer:api/APIError", "code": code, "message": message, "status": status}
    return Refused(200, {"success": False, "error": error})


def no_credit(generation: str, *, stream: bool) -> Refused | None:
    """None: the first generation, which answers a stream with its canned text."""
    match generation:
        case "gen3":
            return gen3(402, "insufficient_funds", NO_CREDIT, [("x-needs-upgrade", "true")])
        case "gen2":
            return gen2("insufficient_funds", "Available funding is insufficient for this request.", 402)
        case "gen2_string":
            return Refused(200, {"success": False, "error": "Insufficient funds on this account."})
        case "gen1" if not stream:
            message = {"role": "assistant", "content": [{"type": "text", "text": CANNED}], "stop_reason": "end_turn"}
            result = {"message": message, "usage": {"input_tokens": 0, "output_tokens": 1}, "finish_reason": "stop"}
            metadata = {"usage_limited": True}
            return Refused(200, {"success": True, "result": result, "service": {"name": "usage-limited-chat"}, "metadata": metadata})
    return None


def refusal(scenario: str) -> Refused | None:
    """The error that a scenario stands for; None when it stands for an answer."""
    attempts = [{"provider": "azure-openai", "error": "internal detail"}]
    match scenario:
        case "401" | "bad_key":
            return gen3(401, "token_auth_failed", "Authentication failed.")
        case "expired":
            return gen3(401, "token_expired", "Token expired.")
        case "403" | "forbidden":
            return gen3(403, "permission_denied", "This model is for subscribers.")
        case "suspended":
            return gen3(403, "account_suspended", "Account suspended.")
        case "subscription":
            return gen3(402, "subscription_required", "A paid plan is required.", [("x-needs-upgrade", "true")])
        case "moderation":
            return gen3(400, "bad_request", "The prompt was flagged.", errorCode="moderation_flagged")
        case "context":
            return gen3(400, "upstream_bad_request", "This model's maximum context length is 8 tokens.", attempts=attempts)
        case "unavailable":
            return gen3(400, "upstream_provider_unavailable", "The provider is not available.", attempts=attempts)
        case "mixed":
            return gen3(400, "upstream_failed", "Every route failed.", attempts=attempts)
        case "empty_vendor":
            return gen3(400, "bad_response", "The provider returned an empty response.")
        case "no_driver":
            return gen3(404, "not_found", "Driver not found: puter-chat-completion:openrouter")
        case "too_large":
            return gen3(413, "payload_too_large", "Request entity too large.", [("x-needs-upgrade", "true")])
        case "429" | "rate_limit_no_header":
            return gen3(429, "too_many_requests", "Too many requests.")
        case "rate_limit":
            return gen3(429, "too_many_requests", "Too many requests.", [("retry-after", "2")])
        case "concurrent":
            return gen3(429, "too_many_requests", "Too many concurrent requests.")
        case "vendor_limit":
            return gen3(429, "upstream_rate_limited", "The provider is limiting requests.", attempts=attempts)
        case "500" | "server_error":
            return gen3(500, "internal_error", "Internal error.")
        case "vendor_key":
            return gen3(500, "upstream_auth_failed", "The provider refused our key.")
        case "503" | "overloaded":
            return gen3(503, "db_unavailable", "The database is not available.", [("retry-after", "5")])
        case "gen2_model":
            return gen2("field_invalid", "Field `model` is invalid.", 400)
        case "gen2_driver":
            return Refused(
                502, {"$": "heyputer:api/APIError", "code": "no_implementation_available", "message": "No implementation available."}
            )
        case "gen2_auth":
            return Refused(401, {"message": "Authentication failed.", "code": "token_auth_failed"})
        case "no_fallback":
            return Refused(200, {"success": False, "error": "no fallback model available"})
    return None


class PuterUpstream(Simulator):
    """Its `base_url` is the origin."""

    def __init__(self, *, models: Sequence[Json] = MODELS, **options: Any) -> None:
        super().__init__(**options)
        self.models = list(models)
        self.vendor: list[Json] = []  # what the vendors were sent, oldest first
        self.credit: dict[str, int] = {}
        self.shown: int | None = None  # how many models the list shows; none = all
        self._forget()

    def _forget(self) -> None:
        self.errors = "gen3"  # how an account without credit is told: gen3, gen2, gen2_string, gen1
        self.legacy_drivers = False
        self.concurrency = 3
        self.fallback_model = ""
        self._running: Counter[str] = Counter()
        self.vendor.clear()
        self.credit.clear()

    def reset(self) -> None:
        super().reset()
        self._forget()

    def bad_frame(self) -> bytes:
        return b'{"type":"text","te\n'

    def error_frame(self) -> bytes:
        return line("error", message="The vendor failed in the middle.")

    def big_frame(self) -> bytes:
        return line("text", text="x" * (1 << 20))

    async def answer(self, call: Call) -> None:
        try:
            await self._answer(call)
        except Refused as refused:
            await call.json(refused.status, refused.body, refused.headers)

    async def _answer(self, call: Call) -> None:
        path = call.seen.path
        if path == "/puterai/chat/models":
            return await call.json(200, {"models": [one.get("puterId") or one["id"] for one in self._shown()]})
        if path == "/puterai/chat/models/details":
            return await call.json(200, {"models": self._shown()})
        token = _token(call)
        if path == "/metering/usage":
            left = self.credit.get(token, 100)
            return await call.json(
                200, {"usage": {}, "appTotals": {}, "allowanceInfo": {"remaining": left, "monthUsageAllowance": 100, "addons": {}}}
            )
        if path.startswith(("/puterai/openai/v1/", "/puterai/anthropic/v1/")):
            raise gen3(402, "subscription_required", "A paid plan is required.")
        if path != "/drivers/call" or call.seen.method != "POST":
            raise gen3(404, "not_found", f"Cannot {call.seen.method} {path}")
        self._running[token] += 1
        try:
            if self._running[token] > self.concurrency:
                raise gen3(429, "too_many_requests", "Too many concurrent requests.")
            await self._driver(call, token)
        finally:
            self._running[token] -= 1

    def _shown(self) -> list[Json]:
        return [one for one in self.models if one["id"] not in ("fake", "costly", "abuse")][: self.shown]

    async def _driver(self, call: Call, token: str) -> None:
        args = self._checked(call)
        call.seen.unknown_fields = {name: value for name, value in args.items() if name not in KNOWN_ARGS}
        detail = self._route(args)
        step = self.step_of(call)
        call.seen.scenario = step.scenario
        if (problem := refusal(step.scenario)) is not None:
            raise problem
        stream = args.get("stream") is True
        sent = vendor_request(args, detail["provider"])
        self.vendor.append(sent)
        if (complaint := complaint_of(sent)) is not None:
            raise gen3(400, "upstream_bad_request", complaint, attempts=[{"provider": detail["provider"]}])
        generation = step.scenario.removeprefix("402-") if step.scenario.startswith("402-") else self.errors
        if step.scenario in ("402", "no_credit") or step.scenario.startswith("402-") or self.credit.get(token, 1) <= 0:
            if (problem := no_credit(generation, stream=stream)) is not None:
                raise problem
            return await self._lines(call, Step(), [line("text", text=CANNED)], Bill(), 0)
        said = Said(args, sent, step, detail)
        bill = self.charge(call.seen, input_tokens=said.prompt)
        if token in self.credit:
            self.credit[token] -= said.prompt + said.output
        if stream:
            if step.scenario == "bad_json_200":
                return await call.whole(200, b'{"success":true,"resu')
            return await self._lines(call, step, said.lines() if step.frames is None else list(step.frames), bill, said.output)
        bill.output_tokens += said.output
        return await call.whole_with(
            step, step.body if step.body is not None else compact(said.envelope(self.fallback_model)), step.headers
        )

    async def _lines(self, call: Call, step: Step, frames: list[bytes], bill: Bill, output_tokens: int) -> None:
        """Sends the lines; the bill grows with each that carries a token."""
        carrying = {number for number, frame in enumerate(frames) if re.match(rb'\{"type":"(?:text|reasoning|tool_use)"', frame)}
        last, counted = max(carrying, default=None), 0
        async for number in call.stream_with(step, frames, "application/x-ndjson", step.headers):
            if number in carrying:
                more = output_tokens - counted if number == last else 1
                bill.output_tokens += more
                counted += more

    def step_of(self, call: Call) -> Step:
        with self._lock:
            if self._script:
                return self._script.popleft()
        scenario = _token(call).removeprefix("puter-sim-").partition("~")[0]
        return Step(scenario=scenario or "ok")

    # What is checked

    def _checked(self, call: Call) -> Json:
        if not call.seen.headers.get("content-type", "").startswith(("application/json", "text/plain;actually=json")):
            raise gen3(400, "bad_request", "Missing interface")
        body = call.seen.json
        if not isinstance(body, dict):
            raise gen3(400, "client_bad_json", "Invalid JSON.")
        for name in ("interface", "method"):
            if not isinstance(body.get(name), str):
                raise gen3(400, "bad_request", f"'{name}' must be a string")
        driver = body.get("driver")
        known = driver in (None, "ai-chat") or (self.legacy_drivers and driver == "openrouter")
        if body["interface"] != "puter-chat-completion" or not known:
            raise gen3(404, "not_found", f"Driver not found: {body['interface']}:{driver}")
        if body["method"] != "complete":
            raise gen3(404, "not_found", f"Method not found: {body['method']}")
        args = body.get("args")
        if not isinstance(args, dict) or not isinstance(args.get("messages"), list):
            raise gen3(400, "bad_request", "'messages' must be an array")
        if not isinstance(args.get("stream", False), bool) or not isinstance(args.get("temperature", 0), int | float):
            raise gen3(400, "bad_request", "Wrong type")
        return args

    def _route(self, args: Json) -> Json:
        """The entry that answers: a pinned provider where it has the model, else the vendor's own before a reseller."""
        wanted = str(args.get("model") or "gpt-4o-mini").strip().lower()
        if wanted == "openrouter/auto":
            raise gen3(400, "field_invalid", "Field `model` is invalid.")
        bucket = [one for one in self.models if wanted in {name.lower() for name in _names_of(one)}]
        others = {name.lower() for one in bucket for name in _names_of(one)}
        bucket = [one for one in self.models if others & {name.lower() for name in _names_of(one)}]
        if not bucket:
            raise gen3(400, "bad_request", f"Model not found: {args.get('model')}")
        pinned = [one for one in bucket if one["provider"] == args.get("provider")]
        return sorted(pinned or bucket, key=lambda one: one["provider"] in RESELLERS)[0]


def _names_of(detail: Json) -> list[str]:
    return [detail["id"], *detail["aliases"], *([detail["puterId"]] if "puterId" in detail else [])]


def _token(call: Call) -> str:
    seen = call.seen
    body = seen.json if isinstance(seen.json, dict) else {}
    bearer = seen.headers.get("authorization", "").removeprefix("Bearer ")
    token = body.get("auth_token") or bearer or seen.headers.get("x-api-key") or seen.query.get("auth_token") or ""
    if not token:
        raise gen3(401, "token_missing", "Missing authentication token.")
    if not TOKENS.fullmatch(str(token)):
        raise gen3(401, "token_auth_failed", "Authentication failed.")
    return str(token)


# What the server makes of the messages (reference 3.4)


def vendor_request(args: Json, route: str) -> Json:
    """What the vendor gets. Raises Refused for a message that the server does not take (rule 2)."""
    merged = _merged([one for message in args["messages"] for one in _split(message)])
    if route == "claude":
        system = [one for one in merged if one["role"] == "system"]
        messages = [_for_claude(one) for one in merged if one["role"] != "system"]
        return {"route": route, "model": args.get("model"), "system": system[:1], "messages": messages, "args": args}
    messages = [spoken for one in merged for spoken in _for_openai(one, route)]
    return {"route": route, "model": args.get("model"), "messages": messages, "args": args}


def _split(message: Any) -> list[Json]:
    """Rules 1 to 7: one message for each block."""
    if isinstance(message, str):
        message = {"content": message}
    role, content = message.get("role") or "user", message.get("content")
    calls = message.get("tool_calls")
    if content in (None, "") and not calls and role != "tool":
        raise gen3(400, "bad_request", "each message must have a 'content' property")
    if role == "tool":
        text = content if isinstance(content, str) else json.dumps(content)
        call_id = message.get("tool_call_id") or message.get("tool_use_id") or message.get("id")
        return [{"role": "tool", "content": [{"type": "tool_result", "tool_use_id": call_id, "content": text}]}]
    if content in (None, ""):
        blocks = [
            {"type": "tool_use", "id": one["id"], "name": one["function"]["name"], "input": one["function"]["arguments"]} for one in calls
        ]
        return [{"role": role, "content": blocks}]
    if calls:
        return [message]  # both are kept
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{"role": role, "content": list(blocks)}] if blocks else []


def _merged(messages: list[Json]) -> list[Json]:
    merged: list[Json] = []
    for one in messages:
        mergeable = merged and merged[-1]["role"] == one["role"] and not (_has_tools(merged[-1]) or _has_tools(one))
        if mergeable:
            merged[-1] = {**merged[-1], "content": merged[-1]["content"] + one["content"]}
        else:
            merged.append(one)
    return merged


def _has_tools(message: Json) -> bool:
    return "tool_calls" in message or any(block.get("type") in ("tool_use", "tool_result") for block in message["content"])


def _for_openai(message: Json, route: str) -> list[Json]:
    if "tool_calls" in message:
        return [message]
    blocks = message["content"]
    uses = [block for block in blocks if block.get("type") == "tool_use"]
    if uses:
        # Text in the same message is lost, several calls come out the wrong way round, and a string is encoded twice.
        calls = [
            {"id": one["id"], "type": "function", "function": {"name": one["name"], "arguments": json.dumps(one["input"])}} for one in uses
        ]
        return [{"role": message["role"], "content": None, "tool_calls": calls[:1] if route.endswith("responses") else calls[::-1]}]
    if message["role"] == "tool":
        return [{"role": "tool", "tool_call_id": block["tool_use_id"], "content": block["content"]} for block in blocks]
    return [message]


def _for_claude(message: Json) -> Json:
    if message["role"] == "tool":
        return {**message, "role": "user"}
    blocks = [
        {**block, "input": json.loads(block["input"])} if block.get("type") == "tool_use" and isinstance(block["input"], str) else block
        for block in message["content"]
    ]
    return {"role": message["role"], "content": blocks}


def complaint_of(sent: Json) -> str | None:
    """What the vendor has against it."""
    return _claudes_complaint(sent["messages"]) if sent["route"] == "claude" else _openais_complaint(sent["messages"])


def _openais_complaint(messages: list[Json]) -> str | None:
    waiting: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                return "messages with role 'tool' must be a response to a preceeding message with 'tool_calls'."
            waiting.discard(message["tool_call_id"])
            continue
        if waiting:
            return "An assistant message with 'tool_calls' must be followed by tool messages."
        for one in message.get("tool_calls") or ():
            if not isinstance(json.loads(one["function"]["arguments"]), dict):
                return "Invalid arguments: they were encoded twice."
            waiting.add(one["id"])
        for block in message["content"] if isinstance(message["content"], list) else ():
            if block.get("type", "image_url") not in ("text", "image_url", "video_url"):
                return f"Invalid value: '{block.get('type')}'."
    return "Tool messages are missing." if waiting else None


def _claudes_complaint(messages: list[Json]) -> str | None:
    if not messages or messages[0]["role"] != "user":
        return "messages: the first message must use the user role"
    waiting: list[str] = []
    for message in messages:
        answered = [block["tool_use_id"] for block in message["content"] if block.get("type") == "tool_result"]
        if answered != waiting:
            return "tool_use ids were found without tool_result blocks immediately after, or the other way round"
        waiting = [block["id"] for block in message["content"] if block.get("type") == "tool_use"]
        for block in message["content"]:
            if block.get("type") not in ("text", "image", "tool_use", "tool_result"):
                return f"messages: unexpected block '{block.get('type')}'"
            if block["type"] == "text" and not block["text"].strip():
                return "messages: text content blocks must contain non-whitespace text"
    return "tool_use ids were found without tool_result blocks" if waiting else None


# What is said


def line(kind: str, **fields: Any) -> bytes:
    return compact({"type": kind, **fields}) + b"\n"


class Said:
    """One answer: the words of the vendor, in whichever shape its route gives them."""

    def __init__(self, args: Json, sent: Json, step: Step, detail: Json) -> None:
        self.step, self.route, self.model = step, detail["provider"], detail["id"]
        texts = _texts(sent)
        answered = [text for role, text in texts if role == "result"]
        asked = next((text for role, text in reversed(texts) if role == "user"), "")
        self.calls = [dict(one) for one in step.tool_calls]
        if step.scenario in ("tool_call", "tool_calls_parallel", "parallel_lost") and not self.calls and not answered:
            names = [(tool.get("function") or tool)["name"] for tool in args.get("tools") or ()] or ["get_weather"]
            cities = ["Oslo"] if step.scenario == "tool_call" else ["Oslo", "Bergen"]
            self.calls = [{"id": f"toolu_{n}", "name": names[n % len(names)], "input": {"city": city}} for n, city in enumerate(cities)]
        text = f"results: {' '.join(answered)}" if answered else f"echo: {asked}"
        if step.scenario == "split_utf8":
            text += " 𝄞🚀 naïve"
        self.text = step.text if step.text is not None else "" if self.calls else text
        self.cut = step.scenario == "length"
        if self.cut:
            self.text = " ".join(self.text.split()[: args.get("max_tokens") or 2])
        self.reasoning = step.reasoning or ("I think about it" if step.scenario == "reasoning" else "")
        self.prompt = sum(words(text) for _, text in texts)
        self.output = words(self.text) + words(self.reasoning) + sum(words(json.dumps(one["input"])) for one in self.calls)
        self.cached = self.prompt // 2 if step.scenario == "cached" else 0

    def usage(self) -> Json:
        if self.step.usage is not None:
            return dict(self.step.usage)
        thought, fresh = words(self.reasoning), self.prompt - self.cached
        match self.route:
            case "claude":
                usage: Json = {"input_tokens": fresh, "ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}
                usage |= {"cache_read_input_tokens": self.cached, "output_tokens": self.output, "thinking_tokens": thought}
            case "gemini":
                usage = {"prompt_tokens": fresh, "completion_tokens": self.output - thought, "cached_tokens": self.cached}
                usage |= {"thinking_tokens": thought, "grounding_requests": 0}
            case "openrouter":
                usage = {"prompt": fresh, "completion": self.output, "input_cache_read": self.cached, "request": 1, "billedUsage": 1}
            case "openai-completion" | "openai-responses":
                usage = {"prompt_tokens": fresh, "completion_tokens": self.output, "cached_tokens": self.cached}
            case "fake-chat":
                usage = {"input_tokens": self.prompt, "output_tokens": self.output}
            case _:
                usage = {"prompt_tokens": self.prompt, "completion_tokens": self.output, "cached_tokens": self.cached}
        return {**usage, "usd_cents": 0.01}

    def lines(self) -> list[bytes]:
        scenario = self.step.scenario
        lines: list[bytes] = []
        if self.route != "openai-responses":
            lines += [line("reasoning", reasoning=piece) for piece in pieces(self.reasoning)]
        lines += [line("text", text=piece) for piece in pieces(self.text)]
        calls = self.calls[-1:] if scenario == "parallel_lost" else self.calls
        lines += [line("tool_use", id=one["id"], name=one["name"], input=one["input"], text="") for one in calls]
        if scenario == "hex_noise":
            lines = [b"1f\n", *(noisy for one in lines for noisy in (one, b"2a\n"))]
        if scenario == "no_usage_line":
            return lines
        return [*lines, line("usage") if scenario == "usage_undefined" else line("usage", usage=self.usage())]

    def envelope(self, fallback_model: str) -> Json:
        route = "fake-chat" if self.step.scenario == "blocked" else self.route
        result = {**self._result(), "via_ai_chat_service": True}
        if self.step.scenario != "usage_undefined":
            result["usage"] = self.usage()
        metadata = {"service_used": route, "providerUsed": fallback_model or self.model}
        return {"success": True, "result": result, "service": {"name": "ai-chat"}, "metadata": metadata}

    def _result(self) -> Json:
        if self.route in ("claude", "fake-chat"):
            blocks: list[Json] = [{"type": "thinking", "thinking": self.reasoning, "signature": "sim"}] if self.reasoning else []
            blocks += [{"type": "text", "text": self.text}] if self.text else []
            blocks += [{"type": "tool_use", **one} for one in self.calls]
            reason = "tool_use" if self.calls else "max_tokens" if self.cut else "end_turn"
            message: Json = {"id": "msg_sim", "type": "message", "role": "assistant", "model": self.model, "content": blocks}
            return {"message": {**message, "stop_reason": reason, "stop_sequence": None}, "finish_reason": "stop"}
        message = {"role": "assistant", "content": self.text or None, "refusal": None}
        if self.reasoning:
            message["reasoning"] = self.reasoning
        calls = [
            {"id": one["id"], "type": "function", "function": {"name": one["name"], "arguments": json.dumps(one["input"])}}
            for one in self.calls
        ]
        if calls:
            message["toolCalls" if self.route == "mistral" else "tool_calls"] = calls
        reason = "tool_calls" if calls else "length" if self.cut else "stop"
        if self.route == "openai-responses":
            reason = "stop"
        if self.route == "gemini":
            reason = {"length": "MAX_TOKENS", "stop": "STOP"}.get(reason, reason)
        name = "finishReason" if self.route == "mistral" else "finish_reason"
        return {"index": 0, "message": message, "logprobs": None, name: reason}


def pieces(text: str) -> list[str]:
    """One a word, so that as many lines as tokens carry text: joined again they are the text."""
    return re.findall(r"\s*\S+", text)


def _texts(sent: Json) -> list[tuple[str, str]]:
    """(role, text) of all that the vendor reads; a tool's result has the role "result"."""
    found: list[tuple[str, str]] = []
    for message in [*sent.get("system", ()), *sent["messages"]]:
        content = message["content"]
        if message["role"] == "tool":
            found.append(("result", content))
        elif isinstance(content, str):
            found.append((message["role"], content))
        for block in content if isinstance(content, list) else ():
            if block.get("type") == "text":
                found.append((message["role"], block["text"]))
            elif block.get("type") == "tool_result":
                found.append(("result", block["content"]))
    return found


OFFER = Offer(
    kind="puter",
    simulator=partial(PuterUpstream, models=MODELS[:9]),
    model="gpt-4o-mini",
    secret="puter-sim-ok",
    can=frozenset({"system", "tools", "parallel_tools", "images", "image_urls", "reasoning", "usage"}),
    drops=frozenset(
        {"frequency_penalty", "presence_penalty", "seed", "logprobs", "top_logprobs", "logit_bias", "user", "metadata", "store"}
    ),
    done_here=frozenset({"stop"}),
)

__all__ = ["CANNED", "MODELS", "OFFER", "PuterUpstream", "Step", "complaint_of", "line", "vendor_request"]
