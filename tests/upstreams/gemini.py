"""Gemini Code Assist, and the parts of Google's OAuth that lead to it: it judges requests as strictly as proto-JSON does, echoes, and
counts words as tokens.

A scenario goes by script, by access token (`ya29.sim-429-daily`) or by model (`sim-429-daily`); what follows a `~` only makes the
name another one. The last user text may ask for something, too: `#sim:think`, `#sim:tool=lookup,other`, `#sim:finish=MAX_TOKENS`.
How an account is set up goes by its token alone: see `ACCOUNTS`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode

from tests.upstreams import Offer
from tests.upstreams.kit import Bill, Call, Seen, Simulator, Step, compact, replace, words
from tests.upstreams.openai import _example, pieces

Json = dict[str, Any]
VERSION = "v1internal"
BYPASS = "skip_thought_signature_validator"
TYPE = "type.googleapis.com/google.rpc."
DOMAIN = "cloudcode-pa.googleapis.com"
CREATE_TIME = "2026-01-10T01:55:29.168589Z"

MODELS = (
    "gemini-2.5-pro",
    "gemini-2.5-flash",
    "gemini-2.5-flash-lite",
    "gemini-3-pro-preview",
    "gemini-3.1-pro-preview",
    "gemini-3-flash-preview",
    "gemini-3-flash",
    "gemini-3.1-flash-lite",
    "gemma-4-31b-it",
)
PREVIEW = frozenset({"gemini-3-pro-preview", "gemini-3.1-pro-preview", "gemini-3-flash-preview"})


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The fields of each message of the protocol; a name that is not here is a 400 (reference 2.4, 2.9).
FIELDS = {
    "": _names("model project user_prompt_id userPromptId request enabledCreditTypes"),
    "request": _names("contents systemInstruction cachedContent tools toolConfig labels safetySettings generationConfig sessionId"),
    "generation_config": _names(
        "temperature topP topK candidateCount maxOutputTokens stopSequences responseLogprobs logprobs presencePenalty frequencyPenalty "
        "seed responseMimeType responseJsonSchema responseSchema routingConfig modelSelectionConfig responseModalities mediaResolution "
        "speechConfig audioTimestamp thinkingConfig imageConfig"
    ),
    "thinking_config": _names("includeThoughts thinkingBudget thinkingLevel"),
    "content": _names("role parts"),
    "part": _names(
        "text thought thoughtSignature inlineData fileData functionCall functionResponse executableCode codeExecutionResult videoMetadata"
    ),
    "tool": _names("functionDeclarations googleSearch urlContext codeExecution"),
    "declaration": _names("name description parameters parametersJsonSchema response behavior"),
    "schema": _names(
        "type format title description nullable enum items maxItems minItems properties required minProperties maxProperties minLength "
        "maxLength pattern example anyOf propertyOrdering default minimum maximum"
    ),
}
PART_KINDS = FIELDS["part"] - {"thought", "thoughtSignature", "videoMetadata"}
BUDGETS = {"gemini-2.5-pro": (128, 32768, False), "gemini-2.5-flash": (0, 24576, True), "gemini-2.5-flash-lite": (512, 24576, True)}
LEVELS = {
    "gemini-3-pro-preview": {"LOW", "HIGH"},
    "gemini-3.1-pro-preview": {"LOW", "MEDIUM", "HIGH"},
    "gemini-3-flash-preview": {"MINIMAL", "LOW", "MEDIUM", "HIGH"},
    "gemini-3-flash": {"MINIMAL", "LOW", "MEDIUM", "HIGH"},
    "gemini-3.1-flash-lite": {"MINIMAL", "LOW", "MEDIUM", "HIGH"},
}
# What the first function is called with.
CITIES = {"tool_call": ("Oslo",), "tool_calls_parallel": ("Oslo", "Bergen")}
FUNCTION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]{0,63}")


class Refused(Exception):
    """Google's error object."""

    def __init__(self, code: int, status: str, message: str, *details: Json, whole: Any = None) -> None:
        super().__init__(message)
        self.code = code
        error: Json = {"code": code, "message": message, "status": status}
        if details:
            error["details"] = list(details)
        self.body = whole if whole is not None else {"error": error}


def info(reason: str, **metadata: str) -> Json:
    return {"@type": f"{TYPE}ErrorInfo", "reason": reason, "domain": DOMAIN, "metadata": metadata}


def retry_info(delay: str) -> Json:
    return {"@type": f"{TYPE}RetryInfo", "retryDelay": delay}


def quota_failure(quota_id: str) -> Json:
    return {"@type": f"{TYPE}QuotaFailure", "violations": [{"quotaMetric": "requests", "quotaId": quota_id}]}


def invalid(message: str, *details: Json) -> Refused:
    return Refused(400, "INVALID_ARGUMENT", message, *details)


def unknown_name(name: str, where: str) -> Refused:
    said = f"Invalid JSON payload received. Unknown name \"{name}\" at '{where}': Cannot find field."
    return invalid(said, {"@type": f"{TYPE}BadRequest", "fieldViolations": [{"field": where, "description": said}]})


def unauthenticated() -> Refused:
    message = "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other valid credential."
    return Refused(401, "UNAUTHENTICATED", message, info("ACCESS_TOKEN_EXPIRED"))


ACTIVATION = "https://console.developers.google.com/apis/api/cloudaicompanion.googleapis.com/overview?project=sim-project-1"
VALIDATION = "https://accounts.google.com/signin/continue?sarp=1"
SPENT = "You have exhausted your capacity on this model. Your quota will reset after 8h44m7s."
TOO_FAST = "You have exceeded the request limit for this model."


def refusal(scenario: str) -> Refused | None:
    """The error that a scenario stands for; None when it stands for an answer (recipe 6.2, G8 to G14)."""
    limited = "RESOURCE_EXHAUSTED"
    match scenario:
        case "401" | "bad_key":
            return unauthenticated()
        case "403" | "forbidden":
            return Refused(403, "PERMISSION_DENIED", "The caller does not have permission")
        case "403-disabled":
            message = "Cloud Code Private API has not been used in project sim-project-1 before or it is disabled."
            return Refused(403, "PERMISSION_DENIED", message, info("SERVICE_DISABLED", activationUrl=ACTIVATION, service=DOMAIN))
        case "403-validate":
            help_link = {"@type": f"{TYPE}Help", "links": [{"description": "Verify", "url": VALIDATION}]}
            return Refused(403, "PERMISSION_DENIED", "Verify your account to continue.", info("VALIDATION_REQUIRED"), help_link)
        case "403-licence":
            message = "Permission denied: the user is not a named user with a Gemini Code Assist license of the organization."
            return Refused(403, "PERMISSION_DENIED", message)
        case "404":
            return Refused(404, "NOT_FOUND", "Requested entity was not found.")
        case "429-delay" | "429" | "rate_limit":
            return Refused(429, limited, TOO_FAST, info("RATE_LIMIT_EXCEEDED"), retry_info("0.847655010s"))
        case "429-12s":
            return Refused(429, limited, TOO_FAST, info("RATE_LIMIT_EXCEEDED"), retry_info("12s"))
        case "429-daily" | "no_credit":
            facts = info("QUOTA_EXHAUSTED", model="gemini-2.5-pro", quotaResetDelay="8h44m7.2s", uiMessage="true")
            return Refused(429, limited, SPENT, facts, retry_info("31447.2s"))
        case "429-metadata":
            return Refused(429, limited, "Quota exhausted.", info("QUOTA_EXHAUSTED", quotaResetDelay="8h44m7.2s"))
        case "429-timestamp":
            later = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 7200))
            return Refused(429, limited, "Quota exhausted.", info("QUOTA_EXHAUSTED", quotaResetTimeStamp=later), retry_info("0.5s"))
        case "429-text":
            return Refused(429, limited, SPENT)
        case "429-per-day":
            return Refused(429, limited, "Quota exceeded.", quota_failure("GenerateRequestsPerDayPerProject"), retry_info("4s"))
        case "429-per-minute":
            return Refused(429, limited, "Quota exceeded.", quota_failure("GenerateRequestsPerMinutePerProject"))
        case "429-credits":
            return Refused(429, limited, "Not enough credits.", info("INSUFFICIENT_G1_CREDITS_BALANCE"))
        case "429-limit0":
            return Refused(429, limited, "Quota exceeded for metric: requests, limit: 0, model: gemini-2.5-pro")
        case "429-bare":
            return Refused(429, limited, "Resource has been exhausted (e.g. check quota).")
        case "429-array":
            inner = Refused(429, limited, TOO_FAST, info("RATE_LIMIT_EXCEEDED"), retry_info("7s"))
            return Refused(429, limited, TOO_FAST, whole=[inner.body])
        case "429-nested":
            inner = Refused(429, limited, TOO_FAST, info("RATE_LIMIT_EXCEEDED"), retry_info("7s"))
            return Refused(429, limited, json.dumps(inner.body, indent=2))
        case "429-capacity" | "503-capacity":
            message = "No capacity available for model gemini-2.5-pro on the server"
            return Refused(int(scenario[:3]), "UNAVAILABLE", message, info("MODEL_CAPACITY_EXHAUSTED"), retry_info("3s"))
        case "400":
            return invalid("Request contains an invalid argument.")
        case "400-context":
            return invalid("The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).")
        case "400-location":
            return Refused(400, "FAILED_PRECONDITION", "User location is not supported for the API use.")
        case "499":
            return Refused(499, "CANCELLED", "The operation was cancelled.")
        case "500" | "server_error":
            return Refused(500, "INTERNAL", "Internal error encountered.")
        case "503" | "overloaded":
            return Refused(503, "UNAVAILABLE", "The model is overloaded. Please try again later.")
    return None


# Accounts


@dataclass(frozen=True)
class Account:
    """What Google knows of the owner of a token. `polls`: how often setting it up is asked after before it is done; None = for ever."""

    load: Json = field(default_factory=dict)
    polls: int | None = 0
    project: str | None = "sim-project-1"
    fails: bool = False


STANDARD = {"id": "standard-tier", "name": "Gemini Code Assist", "userDefinedCloudaicompanionProject": True}
FREE = {"id": "free-tier", "name": "Gemini Code Assist for individuals", "isDefault": True, "privacyNotice": {"showNotice": True}}
NEW: Json = {"allowedTiers": [FREE, STANDARD]}
ONBOARDED: Json = {"currentTier": STANDARD, "allowedTiers": [{**STANDARD, "isDefault": True}], "cloudaicompanionProject": "sim-project-1"}


def ineligible(reason: str, **more: str) -> Json:
    tier = {"reasonCode": reason, "tierId": "free-tier", "tierName": "Gemini Code Assist for individuals", **more}
    return {"allowedTiers": [], "ineligibleTiers": [tier]}


ACCOUNTS: dict[str, Account] = {
    "new": Account(NEW, polls=2),
    "new-at-once": Account(NEW, polls=0),
    "new-never": Account(NEW, polls=None),
    "new-without-project": Account(NEW, polls=1, project=None),
    "new-other-project": Account(NEW, polls=1, project="sim-project-2"),
    "new-fails": Account(NEW, polls=1, fails=True),
    "new-standard": Account({"allowedTiers": [{**STANDARD, "isDefault": True}]}),
    "legacy": Account({"allowedTiers": []}, polls=0),
    "paid": Account({**ONBOARDED, "paidTier": {"id": "g1-pro-tier", "availableCredits": [{"creditAmount": "1000"}]}}),
    "project-as-object": Account({**ONBOARDED, "cloudaicompanionProject": {"id": "sim-project-1", "name": "sim"}}),
    "tier-without-project": Account({"currentTier": STANDARD}),
    "unsupported": Account(ineligible("UNSUPPORTED_CLIENT", reasonMessage="This client is no longer supported for individuals.")),
    "validate": Account(ineligible("VALIDATION_REQUIRED", reasonMessage="Verify your account.", validationUrl=VALIDATION)),
    "too-young": Account(ineligible("RESTRICTED_AGE", reasonMessage="You must be 18 or older.")),
}


class GeminiUpstream(Simulator):
    """One server for Google's sign-in, its token endpoint and Code Assist. `base_url` stands for each vendor host."""

    def __init__(self, *, client: tuple[str, str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.client = client  # the client id and secret that the token endpoint takes; None = any
        self.clear()

    def clear(self) -> None:
        self.projects = {"sim-project-1", "sim-project-2", "my-project-123"}
        self.project = "sim-project-1"  # of accounts that are set up
        self.without_preview: set[str] = set()  # tokens whose accounts have no preview models
        self.expired: set[str] = set()  # access tokens that do not work any more
        self.dead: set[str] = set()  # refresh tokens, likewise
        self.rotates = False  # whether a refresh gives a new refresh token
        self.token_seconds = 3599
        self.token_errors: list[tuple[int, Json]] = []  # what the next calls of the token endpoint are answered with
        self.clock_offset = 0.0
        self.codes: dict[str, dict[str, str]] = {}
        self.issued: dict[str, float] = {}  # access token -> when it expires
        self.refresh_tokens: set[str] = {"1//sim-refresh"}
        self.signatures: set[str] = set()
        self._operations: dict[str, tuple[Account, int]] = {}
        self._tokens_made = 0

    def reset(self) -> None:
        super().reset()
        self.clear()

    @property
    def token_url(self) -> str:
        return f"{self.origin}/token"

    @property
    def authorize_url(self) -> str:
        return f"{self.origin}/o/oauth2/v2/auth"

    @property
    def posts(self) -> list[Seen]:
        """Google asks what is left of a quota by POST, too: that is the server's own affair."""
        return [seen for seen in super().posts if not seen.path.endswith(":retrieveUserQuota")]

    @property
    def generated(self) -> list[Seen]:
        """The calls for an answer, without those that set an account up."""
        return [seen for seen in self.posts if "enerateContent" in seen.path]

    def asked(self, method: str) -> list[Seen]:
        """The calls of one method: loadCodeAssist, onboardUser, operations, token."""
        return [seen for seen in list(self.log) if method in seen.path]

    def bad_frame(self) -> bytes:
        return b'data: {"response": {"candidates": [{"con\r\n\r\n'

    def error_frame(self) -> bytes:
        return frame({"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}})

    def big_frame(self) -> bytes:
        return frame(envelope("big", [{"text": "x" * (1 << 20)}]))

    async def answer(self, call: Call) -> None:
        try:
            await self._answer(call)
        except Refused as refused:
            # A stream call is refused in an array (reference 2.5).
            body = [refused.body] if "stream" in call.seen.path and isinstance(refused.body, dict) else refused.body
            await call.whole(refused.code, pretty(body), "application/json; charset=UTF-8")

    async def _answer(self, call: Call) -> None:
        seen = call.seen
        match (seen.method, seen.path):
            case ("GET", "/o/oauth2/v2/auth"):
                return await self._authorize(call)
            case ("POST", "/token"):
                return await self._token(call)
            case ("GET", "/tokeninfo"):
                self._account(f"Bearer {seen.query.get('access_token', '')}")
                return await call.json(200, {"scope": "sim", "expires_in": str(self.token_seconds)})
            case ("GET", "/oauth2/v2/userinfo"):
                self._account(seen.headers.get("authorization", ""))
                return await call.json(200, {"id": "1", "email": "a@example.org", "verified_email": True, "name": "A"})
        name = self._account(seen.headers.get("authorization", ""))
        method = seen.path.removeprefix(f"/{VERSION}").removeprefix(":")
        if seen.method == "GET" and method.startswith("/operations/"):
            return await call.json(200, self._operation(method.removeprefix("/")))
        speak = {
            "loadCodeAssist": self._load,
            "onboardUser": self._onboard,
            "generateContent": self._generate,
            "streamGenerateContent": self._generate,
            "countTokens": self._count,
            "retrieveUserQuota": self._quota,
        }.get(method)
        if speak is None or seen.method != "POST" or not seen.path.startswith(f"/{VERSION}:"):
            return await call.whole(404, b"<!DOCTYPE html><title>Error 404 (Not Found)!!1</title>", "text/html; charset=UTF-8")
        if not isinstance(seen.json, dict):
            raise invalid("Invalid JSON payload received. Unexpected token.")
        return await speak(call, name)

    def _account(self, authorization: str) -> str:
        """The name of the token's owner. Raises Refused for a token that does not work."""
        token = authorization.removeprefix("Bearer ")
        expires_at = self.issued.get(token)
        expired = token in self.expired or (expires_at is not None and expires_at <= time.time() + self.clock_offset)
        if not authorization.startswith("Bearer ya29.sim-") or expired:
            raise unauthenticated()
        return token.removeprefix("ya29.sim-").partition("~")[0]

    # Signing in (2.1)

    async def _authorize(self, call: Call) -> None:
        query = call.seen.query
        if query.get("response_type") != "code" or not query.get("client_id") or not query.get("redirect_uri"):
            return await call.whole(400, b"<html>Error 400: invalid_request</html>", "text/html")
        back = {"state": query.get("state", "")}
        if query.get("error"):
            back |= {"error": query["error"], "error_description": "The user denied."}
        else:
            code = f"4/0A-sim-{len(self.codes) + 1}"
            self.codes[code] = query
            back["code"] = code
        await call.whole(302, b"", headers=[("location", f"{query['redirect_uri']}?{urlencode(back)}")])

    async def _token(self, call: Call) -> None:
        if self.token_errors:
            status, body = self.token_errors.pop(0)
            return await call.json(status, body)
        form = dict(parse_qsl(call.seen.body.decode()))
        if call.seen.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded" or not form.get("client_id"):
            return await call.json(400, {"error": "invalid_request", "error_description": "Missing form parameter."})
        if not form.get("client_secret") or (self.client and (form["client_id"], form["client_secret"]) != self.client):
            return await call.json(401, {"error": "invalid_client", "error_description": "The OAuth client was not found."})
        granted = self._granted(form)
        if granted is None:
            return await call.json(400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."})
        self._tokens_made += 1
        access = f"ya29.sim-ok~{self._tokens_made}"
        self.issued[access] = time.time() + self.clock_offset + self.token_seconds
        payload = base64.urlsafe_b64encode(compact({"email": "a@example.org"})).decode().rstrip("=")
        reply = {"access_token": access, "expires_in": self.token_seconds, "scope": "sim openid", "token_type": "Bearer"}
        return await call.json(200, {**reply, "id_token": f"eyJhbGciOiJub25lIn0.{payload}.sim", **granted})

    def _granted(self, form: dict[str, str]) -> Json | None:
        """What is given besides the access token. None: the grant is not valid."""
        if form.get("grant_type") == "refresh_token":
            given = form.get("refresh_token", "")
            if given in self.dead or given not in self.refresh_tokens:
                return None
            return self._new_refresh_token() if self.rotates else {}
        asked = self.codes.pop(form.get("code", ""), None)
        if form.get("grant_type") != "authorization_code" or asked is None or asked["redirect_uri"] != form.get("redirect_uri"):
            return None
        if challenge := asked.get("code_challenge"):
            digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
            if base64.urlsafe_b64encode(digest).decode().rstrip("=") != challenge:
                return None
        return self._new_refresh_token() if asked.get("access_type") == "offline" else {}

    def _new_refresh_token(self) -> Json:
        made = f"1//sim-refresh-{len(self.refresh_tokens)}"
        self.refresh_tokens.add(made)
        return {"refresh_token": made}

    # Setting an account up (2.3)

    async def _load(self, call: Call, name: str) -> None:
        _known(call.seen, call.seen.json, _names("cloudaicompanionProject metadata mode"), "")
        if name.startswith("load-") and (problem := refusal(name.removeprefix("load-"))) is not None:
            raise problem
        account = ACCOUNTS.get(name)
        await call.json(200, account.load if account is not None else {**ONBOARDED, "cloudaicompanionProject": self.project})

    async def _onboard(self, call: Call, name: str) -> None:
        body = call.seen.json
        _known(call.seen, body, _names("tierId cloudaicompanionProject metadata"), "")
        account = ACCOUNTS.get(name, Account())
        if body.get("tierId") == "free-tier" and "cloudaicompanionProject" in body:
            raise Refused(400, "FAILED_PRECONDITION", "Precondition check failed.")
        if body.get("tierId") not in {"legacy-tier", *(tier["id"] for tier in account.load.get("allowedTiers") or ())}:
            raise invalid("Invalid tier.")
        operation = f"operations/acf.p2-{len(self._operations) + 1}-sim"
        self._operations[operation] = (account, 0)
        await call.json(200, self._operation(operation, polled=0))

    def _operation(self, name: str, *, polled: int = 1) -> Json:
        if name not in self._operations:
            raise Refused(404, "NOT_FOUND", "Requested entity was not found.")
        account, polls = self._operations[name]
        polls += polled
        self._operations[name] = (account, polls)
        if account.polls is None or polls < account.polls:
            return {"name": name, "done": False}
        if account.fails:
            return {"name": name, "done": True, "error": {"code": 13, "message": "The project could not be made."}}
        kind = "type.googleapis.com/google.internal.cloud.code.v1internal.OnboardUserResponse"
        response: Json = {"@type": kind}
        if account.project is not None:
            response["cloudaicompanionProject"] = {"id": account.project, "name": account.project, "projectNumber": "123"}
        return {"name": name, "done": True, "response": response}

    # The rest

    async def _count(self, call: Call, name: str) -> None:
        _known(call.seen, call.seen.json, _names("request"), "")
        request = call.seen.json["request"]
        _known(call.seen, request, _names("model contents"), "request")
        if any(part.get("thought") for content in request["contents"] for part in content["parts"]):
            raise invalid("Thought parts are not allowed.")
        await call.json(200, {"totalTokens": words(_text(request["contents"]))})

    async def _quota(self, call: Call, name: str) -> None:
        _known(call.seen, call.seen.json, _names("project userAgent"), "")
        self._check_project(call.seen.json)
        bucket = {"remainingAmount": "812", "remainingFraction": 0.81, "resetTime": "2026-01-02T00:00:00Z", "tokenType": "REQUESTS"}
        await call.json(200, {"buckets": [{**bucket, "modelId": "gemini-2.5-pro"}]})

    def _check_project(self, body: Json) -> None:
        if body.get("project") not in self.projects:
            message = f"Permission denied on resource project {body.get('project')}."
            raise Refused(403, "PERMISSION_DENIED", message, info("CONSUMER_INVALID", service=DOMAIN))

    # Answers (2.4, 2.5)

    async def _generate(self, call: Call, name: str) -> None:
        seen, body = call.seen, call.seen.json
        _known(seen, body, FIELDS[""], "")
        self._check_project(body)
        model = body.get("model")
        token = seen.headers["authorization"].removeprefix("Bearer ")
        if not isinstance(model, str) or (model not in MODELS and not model.startswith("sim-")):
            raise Refused(404, "NOT_FOUND", "Requested entity was not found.")
        if model in PREVIEW and token in self.without_preview:
            raise Refused(404, "NOT_FOUND", "Requested entity was not found.")
        request = body.get("request")
        if not isinstance(request, dict):
            raise invalid("Request contains an invalid argument.")
        Judge(seen, model, self.signatures).request(request)
        step = self._step(call, name)
        seen.scenario = step.scenario
        if (problem := refusal(step.scenario)) is not None:
            raise problem
        await self._speak(call, request, model, step)

    def _step(self, call: Call, name: str) -> Step:
        step = self.step_of(call)
        return replace(step, scenario=name) if step == Step() and name not in ACCOUNTS and name != "ok" else step

    async def _speak(self, call: Call, request: Json, model: str, step: Step) -> None:
        said = self._what_to_say(request, model, step)
        usage = said.usage(words(_text(request["contents"])), cached=step.scenario == "cached") if step.usage is None else dict(step.usage)
        bill = self.charge(call.seen, input_tokens=usage.get("promptTokenCount", 0))
        output = usage.get("candidatesTokenCount", 0) + usage.get("thoughtsTokenCount", 0)
        made_id = self.next_id("resp")
        headers = [("x-cloudaicompanion-trace-id", "55650653afd3c738"), ("server", "ESF")]
        if "stream" not in call.seen.path:
            whole = envelope(made_id, said.parts(), finish=said.finish, usage=usage)
            bill.output_tokens += output
            body = step.body if step.body is not None else pretty(whole)
            return await call.whole_with(replace(step, content_type=step.content_type or "application/json; charset=UTF-8"), body, headers)
        objects = said.objects(made_id, usage, one_frame_each=step.scenario != "calls_split")
        frames = [frame(one) for one in objects] if step.frames is None else [bytes(one) for one in step.frames]
        content_type = "text/event-stream"
        if call.seen.query.get("alt") != "sse":
            content_type, frames = "application/json; charset=UTF-8", _as_array(objects)
        carrying = [number for number, one in enumerate(frames) if _carries_text(one)]
        async for number in call.stream_with(step, frames, content_type, headers):
            _bill(bill, number, carrying, output)

    def _what_to_say(self, request: Json, model: str, step: Step) -> Said:
        contents = request["contents"]
        asked = next((text for one in reversed(contents) if one["role"] == "user" and (text := _text([one]))), "")
        directives = dict(one.partition("=")[::2] for one in re.findall(r"#sim:(\S+)", asked))
        asked = re.sub(r"\s*#sim:\S+", "", asked)
        results = [part["functionResponse"]["response"] for part in contents[-1]["parts"] if "functionResponse" in part]
        wanted, cities = directives.get("tool", ""), CITIES.get(step.scenario, ())
        calls = [dict(one) for one in step.tool_calls] or self._calls(request, wanted, cities, answered=bool(results))
        config = request.get("generationConfig") or {}
        if step.text is not None:
            text = step.text
        elif calls:
            text = ""
        elif results:
            text = "results: " + " ".join(str(result.get("result", json.dumps(result))) for result in results)
        elif "responseJsonSchema" in config:
            text = json.dumps(_example(config["responseJsonSchema"], config["responseJsonSchema"]))
        elif config.get("responseMimeType") == "application/json":
            text = json.dumps({"echo": asked})
        else:
            text = f"echo: {asked}" + (" 𝄞🚀 naïve" if step.scenario == "split_utf8" else "")
        thinks = (config.get("thinkingConfig") or {}).get("includeThoughts")
        reasoning = step.reasoning or ("I think about it" if thinks and ("think" in directives or step.scenario == "reasoning") else "")
        signature = self._signature() if calls and model.startswith("gemini-3") else ""
        return Said(text, reasoning, calls, signature, step.finish_reason or directives.get("finish", "STOP"))

    def _calls(self, request: Json, wanted: str, cities: Sequence[str], *, answered: bool) -> list[Json]:
        declared = {one["name"]: one for tool in request.get("tools") or () for one in tool.get("functionDeclarations") or ()}
        choice = (request.get("toolConfig") or {}).get("functionCallingConfig") or {}
        names = [name for name in wanted.split(",") if name]
        if choice.get("mode") == "ANY" and not names:
            names = [(choice.get("allowedFunctionNames") or list(declared))[0]]
        if answered or choice.get("mode") == "NONE":
            return []
        if cities:
            return [{"name": next(iter(declared), "get_weather"), "args": {"city": city}} for city in cities]
        return [
            {"name": name, "args": _example(schema, schema)} for name in names if (schema := _schema_of(declared.get(name))) is not None
        ]

    def _signature(self) -> str:
        made = base64.b64encode(f"signature {len(self.signatures) + 1} of the simulator".encode()).decode()
        self.signatures.add(made)
        return made


@dataclass(frozen=True)
class Said:
    """What one answer says."""

    text: str
    reasoning: str
    calls: list[Json]
    signature: str
    finish: str

    def call_parts(self) -> list[Json]:
        """Of parallel calls only the first carries a signature."""
        signed = {"thoughtSignature": self.signature} if self.signature else {}
        return [{"functionCall": one, **(signed if number == 0 else {})} for number, one in enumerate(self.calls)]

    def parts(self) -> list[Json]:
        thoughts: list[Json] = [{"thought": True, "text": self.reasoning}] if self.reasoning else []
        return [*thoughts, *([{"text": self.text}] if self.text else []), *self.call_parts()]

    def objects(self, made_id: str, usage: Json, *, one_frame_each: bool) -> list[Json]:
        """The objects of a stream: three increments of text, calls together or apart, STOP in a frame of its own with the usage."""
        said: list[list[Json]] = [[{"thought": True, "text": one}] for one in pieces(self.reasoning)]
        said += [[{"text": one}] for one in _in_three(self.text)]
        if self.calls:
            said += [self.call_parts()] if one_frame_each else [[one] for one in self.call_parts()]
        last = envelope(made_id, [{"text": ""}], finish=self.finish, usage=usage)
        return [*(envelope(made_id, parts, usage={"trafficType": "ON_DEMAND"}) for parts in said), last]

    def usage(self, prompt: int, *, cached: bool) -> Json:
        output, thought = words(self.text) + sum(words(json.dumps(one["args"])) for one in self.calls), words(self.reasoning)
        counted: Json = {"promptTokenCount": prompt, "candidatesTokenCount": output, "totalTokenCount": prompt + output + thought}
        if thought:
            counted["thoughtsTokenCount"] = thought
        if cached:
            counted["cachedContentTokenCount"] = prompt // 2
        return {**counted, "trafficType": "ON_DEMAND", "promptTokensDetails": [{"modality": "TEXT", "tokenCount": prompt}]}


class Judge:
    """What Google refuses of a request, each with its own words (recipe 6.2)."""

    def __init__(self, seen: Seen, model: str, signatures: set[str]) -> None:
        self.seen, self.model, self.signatures = seen, model, signatures

    def request(self, request: Json) -> None:
        _known(self.seen, request, FIELDS["request"], "request")
        contents = request.get("contents")
        if not contents:
            raise invalid("* GenerateContentRequest.contents: contents is not specified")
        for number, content in enumerate(contents):
            self._content(content, f"request.contents[{number}]")
            if content.get("role") not in ("user", "model"):
                raise invalid("Please use a valid role: user, model.")
        if "systemInstruction" in request:
            self._content(request["systemInstruction"], "request.system_instruction")
        self._turns(contents)
        self._signed(contents)
        functions = self._tools(request.get("tools") or [])
        self._tool_config(request.get("toolConfig") or {}, functions)
        for setting in request.get("safetySettings") or ():
            _known(self.seen, setting, _names("category threshold method"), "request.safety_settings[0]")
            if setting["threshold"] not in ("OFF", "BLOCK_NONE", "BLOCK_ONLY_HIGH", "BLOCK_MEDIUM_AND_ABOVE", "BLOCK_LOW_AND_ABOVE"):
                raise invalid(f"Invalid value at 'request.safety_settings[0].threshold', \"{setting['threshold']}\"")
        self._config(request.get("generationConfig") or {}, has_functions=bool(functions))

    def _content(self, content: Json, where: str) -> None:
        _known(self.seen, content, FIELDS["content"], where)
        if not content.get("parts"):
            raise invalid(f"* {where}: parts must not be empty.")
        for number, part in enumerate(content["parts"]):
            place = f"{where}.parts[{number}]"
            _known(self.seen, part, FIELDS["part"], place)
            if len(PART_KINDS & part.keys()) != 1:
                raise invalid(f"* {place}.data: required oneof field 'data' must have one initialized field")
            if "inlineData" in part:
                _known(self.seen, part["inlineData"], _names("mimeType data"), f"{place}.inline_data")
                _check_base64(part["inlineData"]["data"], f"{place}.inline_data.data")
            for name in ("functionCall", "functionResponse"):
                if name in part:
                    _known(self.seen, part[name], _names("id name args response"), place)
                    _check_name(part[name].get("name"), place)
                    inner = part[name].get("args" if name == "functionCall" else "response")
                    if not isinstance(inner, dict):
                        raise invalid(f"Invalid value at '{place}': a Struct is expected")

    def _turns(self, contents: Sequence[Json]) -> None:
        """A turn of calls is answered at once by as many results."""
        for before, after in zip([{"role": "user", "parts": []}, *contents], [*contents, None], strict=True):
            calls = sum("functionCall" in part for part in before["parts"])
            results = sum("functionResponse" in part for part in (after or {"parts": []})["parts"])
            if calls != results:
                raise invalid(
                    "Please ensure that the number of function response parts is equal to the number of function call parts of the "
                    "function call turn."
                )

    def _signed(self, contents: Sequence[Json]) -> None:
        turn = max((n for n, one in enumerate(contents) if one["role"] == "user" and _text([one])), default=-1)
        for number, content in enumerate(contents):
            calls = [part for part in content["parts"] if "functionCall" in part]
            for part in calls:
                if (given := part.get("thoughtSignature")) is not None and given not in (self.signatures | {BYPASS}):
                    raise invalid("Corrupted thought signature.")
            if calls and number > turn and self.model.startswith("gemini-3") and "thoughtSignature" not in calls[0]:
                name = calls[0]["functionCall"]["name"]
                raise invalid(f"Function call is missing a thought_signature: function call `default_api:{name}`, position {number + 1}.")

    def _tools(self, tools: Sequence[Json]) -> list[str]:
        names: list[str] = []
        for number, tool in enumerate(tools):
            _known(self.seen, tool, FIELDS["tool"], f"request.tools[{number}]")
            for index, one in enumerate(tool.get("functionDeclarations") or ()):
                place = f"request.tools[{number}].function_declarations[{index}]"
                _known(self.seen, one, FIELDS["declaration"], place)
                _check_name(one.get("name"), place)
                names.append(one["name"])
                if "parameters" in one:
                    _check_schema(self.seen, one["parameters"], f"{place}.parameters")
        if len(set(names)) < len(names):
            raise invalid("Duplicate function declaration found.")
        return names

    def _tool_config(self, config: Json, functions: Sequence[str]) -> None:
        _known(self.seen, config, _names("functionCallingConfig"), "request.tool_config")
        calling = config.get("functionCallingConfig") or {}
        _known(self.seen, calling, _names("mode allowedFunctionNames"), "request.tool_config.function_calling_config")
        if calling.get("mode") not in (None, "AUTO", "ANY", "NONE", "VALIDATED"):
            raise invalid("Invalid value at 'request.tool_config.function_calling_config.mode'")
        allowed = calling.get("allowedFunctionNames")
        if allowed and calling.get("mode") not in ("ANY", "VALIDATED"):
            raise invalid("Allowed function names are only supported with the modes ANY and VALIDATED.")
        if allowed and not set(allowed) <= set(functions):
            raise invalid("The allowed function names must be declared.")

    def _config(self, config: Json, *, has_functions: bool) -> None:
        where = "request.generation_config"
        _known(self.seen, config, FIELDS["generation_config"], where)
        ranges = {
            "temperature": (0, 2),
            "topP": (0, 1),
            "maxOutputTokens": (1, 65536),
            "candidateCount": (1, 1),
            "seed": (-(2**31), 2**31 - 1),
        }
        for name, (least, most) in ranges.items():
            value = config.get(name, least)
            if not isinstance(value, int | float) or not least <= value <= most:
                raise invalid(
                    f"Unable to submit request because it has a {name} value of {value}: the supported range is {least} to {most}."
                )
        if not isinstance(config.get("topK", 1), int | float):
            raise invalid(f"Invalid value at '{where}.top_k' (TYPE_FLOAT)")
        if len(config.get("stopSequences") or ()) > 5:
            raise invalid("The number of stop sequences must be at most 5.")
        if self.model.startswith("gemini-3") and ("presencePenalty" in config or "frequencyPenalty" in config):
            raise invalid(f"Penalty is not enabled for models/{self.model}")
        if config.get("responseMimeType") == "application/json" and has_functions and self.model.startswith("gemini-2.5"):
            raise invalid("Function calling with a response mime type: 'application/json' is unsupported")
        if "responseSchema" in config:
            _check_schema(self.seen, config["responseSchema"], f"{where}.response_schema")
        self._thinking(config.get("thinkingConfig"))

    def _thinking(self, thinking: Json | None) -> None:
        if thinking is None:
            return
        _known(self.seen, thinking, FIELDS["thinking_config"], "request.generation_config.thinking_config")
        budget, level = thinking.get("thinkingBudget"), thinking.get("thinkingLevel")
        if budget is not None and level is not None:
            raise invalid("You can only set only one of thinking budget and thinking level.")
        if self.model in BUDGETS and level is None:
            least, most, may_be_off = BUDGETS[self.model]
            if budget is not None and budget != -1 and not least <= budget <= most and not (budget == 0 and may_be_off):
                raise invalid(f"The thinking budget {budget} is invalid. Please choose a value between {least} and {most}.")
        elif self.model in LEVELS and budget is None:
            if level is not None and level not in LEVELS[self.model]:
                raise invalid(f"Thinking level {level} is not supported for this model.")
        elif not self.model.startswith("sim-"):
            raise invalid("Thinking is not supported by this model.")


def _known(seen: Seen, value: Any, names: frozenset[str], where: str) -> None:
    if not isinstance(value, dict):
        raise invalid(f"Invalid value at '{where}': an object is expected")
    for name in value:
        # proto-JSON takes both spellings
        if name not in names and re.sub(r"_([a-z])", lambda found: found[1].upper(), name) not in names:
            seen.unknown_fields[f"{where}.{name}".lstrip(".")] = value[name]
            raise unknown_name(name, where)


def _check_schema(seen: Seen, schema: Json, where: str) -> None:
    _known(seen, schema, FIELDS["schema"], where)
    for name, inner in (schema.get("properties") or {}).items():
        _check_schema(seen, inner, f"{where}.properties[{name}]")
    if "items" in schema:
        _check_schema(seen, schema["items"], f"{where}.items")


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise invalid(f"* {where}.name: Invalid function name. Must start with a letter or an underscore. Must be a-z, A-Z, 0-9, _ . : -")


def _check_base64(data: Any, where: str) -> None:
    try:
        base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise invalid(f"Invalid value at '{where}' (TYPE_BYTES), Base64 decoding failed") from None


def _schema_of(declaration: Json | None) -> Json | None:
    if declaration is None:
        return None
    return declaration.get("parametersJsonSchema") or declaration.get("parameters") or {"type": "object"}


def _text(contents: Sequence[Json]) -> str:
    return " ".join(part["text"] for content in contents for part in content["parts"] if "text" in part)


def _in_three(text: str) -> list[str]:
    cut = pieces(text)
    size = -(-len(cut) // 3) or 1
    return ["".join(cut[at : at + size]) for at in range(0, len(cut), size)]


def envelope(made_id: str, parts: Sequence[Json], *, finish: str | None = None, usage: Json | None = None) -> Json:
    candidate: Json = {"content": {"role": "model", "parts": list(parts)}}
    if finish is not None:
        candidate["finishReason"] = finish
    response: Json = {"candidates": [candidate]}
    if usage is not None:
        response["usageMetadata"] = usage
    about = {"modelVersion": "gemini-sim", "createTime": CREATE_TIME, "responseId": made_id}
    return {"response": {**response, **about}, "traceId": "55650653afd3c738"}


def frame(value: object) -> bytes:
    return b"data: " + compact(value) + b"\r\n\r\n"


def pretty(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n"


def _as_array(objects: Sequence[Json]) -> list[bytes]:
    """What comes without `alt=sse`."""
    return [(b"[" if number == 0 else b",\r\n") + compact(one) for number, one in enumerate(objects)] + [b"]"]


def _carries_text(one: bytes) -> bool:
    return re.search(rb'"text":"[^"]', one) is not None or b'"functionCall"' in one


def _bill(bill: Bill, number: int, carrying: Sequence[int], output_tokens: int) -> None:
    """It grows by one with each frame that carries something; the last brings the rest."""
    if number in carrying:
        bill.output_tokens += output_tokens - (len(carrying) - 1) if number == carrying[-1] else 1


OFFER = Offer(
    kind="gemini_cli",
    simulator=GeminiUpstream,
    model="gemini-2.5-pro",
    secret="ya29.sim-ok",
    settings={"project_id": "sim-project-1"},
    can=frozenset({"system", "tools", "parallel_tools", "structured", "images", "reasoning", "usage"}),
    drops=frozenset({"logprobs", "top_logprobs", "user", "metadata", "store"}),
)

__all__ = ["ACCOUNTS", "BYPASS", "MODELS", "OFFER", "GeminiUpstream", "Step", "envelope", "frame", "info", "retry_info"]
