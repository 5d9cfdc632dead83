"""Gemini Code Assist, the service behind the Gemini CLI: an envelope around Gemini's own API, and a project found before the first call.

Source: protocol reference for Gemini, section 2 (2.1 sign-in, 2.3 onboarding, 2.4 and 2.8 requests, 2.5 and 2.10 answers, 2.11 errors).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import time
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import msgspec

from providers import wire
from providers.adapter import USER_AGENT, Adapter, Ask, FirstCalls, Heard, Pause, Reader, Target, Whole
from providers.chat import ChatReader
from providers.exchange import Outgoing
from providers.failures import (
    ContextLength,
    ForbiddenAtUpstream,
    InvalidAtUpstream,
    ModelNotHere,
    OutOfCredit,
    Overloaded,
    RateLimited,
    UpstreamFailure,
    UpstreamProtocol,
    UpstreamRefused,
    UpstreamServer,
    UpstreamTimeout,
)
from providers.oauth import SignIn, TokenSet
from providers.plain_schema import plain_schema
from providers.price import Tokens
from providers.said import LONGEST_WAIT_SECONDS, Said, clean, failure_of_said, wait_seconds_in, without_callers_key
from providers.wire import Json

AUTHORIZE_URL = "https://accounts.google.com/o/oauth2/v2/auth"
PASTE_PAGE = "https://codeassist.google.com/authcode"  # shows the code, to be copied
SCOPES = tuple(f"https://www.googleapis.com/auth/{name}" for name in ("cloud-platform", "userinfo.email", "userinfo.profile"))

# Context and longest answer in tokens; None where nobody says (2.7).
MODELS: dict[str, tuple[int, int | None]] = {
    "gemini-2.5-pro": (1_048_576, 65_536),
    "gemini-2.5-flash": (1_048_576, 65_536),
    "gemini-2.5-flash-lite": (1_048_576, 65_536),
    "gemini-3-pro-preview": (1_048_576, 65_536),
    "gemini-3.1-pro-preview": (1_048_576, 65_536),
    "gemini-3.1-pro-preview-customtools": (1_048_576, 65_536),
    "gemini-3-flash-preview": (1_048_576, 65_536),
    "gemini-3.1-flash-lite": (1_048_576, 65_536),
    "gemini-3.1-flash-lite-preview": (1_048_576, 65_536),
    "gemini-3.5-flash": (1_048_576, None),
    "gemma-4-31b-it": (256_000, None),
    "gemma-4-26b-a4b-it": (256_000, None),
}
SENT_AS = {"gemini-3.5-flash": "gemini-3-flash"}
MOST_OUTPUT_TOKENS = 65_536

PROJECT = "project"  # in `Ask.learned`
# Setting up an account is asked after at these distances, about a minute in all.
POLL_SECONDS = (0.5, 1.0, 2.0, 3.0, *[5.0] * 10)
METADATA = {"ideType": "IDE_UNSPECIFIED", "platform": "PLATFORM_UNSPECIFIED", "pluginType": "GEMINI"}

UNSUPPORTED_CLIENT = (
    "Google does not serve Gemini Code Assist to this account any more (UNSUPPORTED_CLIENT): accounts of individuals ended on 2026-06-18. "
    "Sign in with an account that has a Code Assist Standard or Enterprise licence."
)


class GeminiCli(Adapter):
    name = "gemini_cli"
    title = "Gemini Code Assist"
    base_url = "https://cloudcode-pa.googleapis.com"
    policy = "restricted"
    policy_source = "https://github.com/google-gemini/gemini-cli/blob/main/docs/resources/tos-privacy.md"
    policy_note = (
        "Google states that using the Gemini CLI's sign-in from other software violates its terms and can suspend the account. "
        "For individuals the service ended on 2026-06-18: a Code Assist Standard or Enterprise licence is needed."
    )
    settings = frozenset(
        {
            "project_id",
            "client_id",
            "client_secret",
            "token_url",
            "authorize_url",
            "redirect_uri",
            "user_agent",
            "api_version",
            "safety_threshold",
        }
    )

    # The call

    def request(self, ask: Ask, target: Target) -> Outgoing:
        return self._generate(ask, target, project_known(ask, target))

    def _generate(self, ask: Ask, target: Target, project: str) -> Outgoing:
        if project.isdigit():
            raise ForbiddenAtUpstream("The account's project_id is a number: give the project's id, which has letters.")
        body: Json = {"model": SENT_AS.get(target.model, target.model), "project": project, "request": request_of(ask, target)}
        if not project:
            del body["project"]
        headers = self._headers(target)
        headers["Accept"] = "text/event-stream" if ask.stream else "application/json"
        headers["Accept-Encoding"] = "identity" if ask.stream else "gzip"
        headers["X-Request-ID"] = ask.request_id
        method = "streamGenerateContent?alt=sse" if ask.stream else "generateContent"
        return target.post(f"/{_version(target)}:{method}", headers, wire.encode_json(body))

    def _headers(self, target: Target) -> dict[str, str]:
        headers = {"User-Agent": target.settings.get("user_agent") or USER_AGENT, "Content-Type": "application/json"}
        if target.secret:
            headers["Authorization"] = f"Bearer {target.secret.reveal()}"
        return headers

    def reader(self, ask: Ask, target: Target) -> Reader:
        return Answers(ask, target)

    def answer(self, ask: Ask, target: Target, body: bytes, content_type: str) -> Whole:
        return Answers(ask, target).whole(body)

    def failure(self, target: Target, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        return failure_in(target, status, headers, body)

    def listed(self) -> dict[str, Json]:
        return {
            name: {"owned_by": "google", "context_length": context} | ({"max_output_tokens": most} if most else {})
            for name, (context, most) in MODELS.items()
        }

    # The account's project (2.3)

    def first_calls(self, ask: Ask, target: Target) -> FirstCalls | None:
        return None if project_known(ask, target) else self._with_project(ask, target)

    def _with_project(self, ask: Ask, target: Target) -> FirstCalls:
        project = yield from self._find_project(target)
        if not target.callers_key:  # a caller's own account is not the one that is learned about
            ask.learned[PROJECT] = project
        return self._generate(ask, target, project)

    def _find_project(self, target: Target) -> Generator[Outgoing | Pause, Heard, str]:
        account = _said(target, (yield self._rpc(target, "loadCodeAssist", {"metadata": METADATA})))
        if account.get("currentTier"):
            return _project_in(account, account)
        tier = _tier_for(account)
        operation = _said(target, (yield self._rpc(target, "onboardUser", {"tierId": tier, "metadata": METADATA})))
        for seconds in POLL_SECONDS:
            if operation.get("done"):
                break
            name = operation.get("name")
            if not isinstance(name, str) or not re.fullmatch(r"[\w.~-]+(?:/[\w.~-]+)*", name, re.ASCII):
                raise UpstreamProtocol("The upstream does not say how the set-up of the account goes on.")
            yield Pause(seconds)
            operation = _said(target, (yield target.get(f"/{_version(target)}/{name}", self._headers(target))))
        if not operation.get("done"):
            raise UpstreamTimeout("The account is still being set up. Try again in a minute.")
        if operation.get("error"):
            raise _about_set_up(failure_in(target, 500, {}, wire.encode_json({"error": operation["error"]})))
        return _project_in(operation.get("response"), account)

    def _rpc(self, target: Target, method: str, body: Json) -> Outgoing:
        return target.post(f"/{_version(target)}:{method}", self._headers(target), wire.encode_json(body))

    # What is left (2.4)

    def quota_request(self, target: Target) -> Outgoing | None:
        project = target.settings.get("project_id")
        return self._rpc(target, "retrieveUserQuota", {"project": project}) if project else None

    def quota(self, body: bytes) -> dict[str, Json]:
        try:
            buckets = wire.decode_json(body).get("buckets") or ()
            return {bucket["modelId"]: _window(bucket) for bucket in buckets if isinstance(bucket.get("modelId"), str)}
        except (msgspec.DecodeError, RecursionError, AttributeError, TypeError, ValueError, OverflowError):
            raise UpstreamProtocol("What is left of the quota could not be read.") from None

    # Signing in (2.1)

    def sign_in(self, settings: Mapping[str, str]) -> SignIn | None:
        missing = [name for name in ("client_id", "client_secret", "token_url") if not settings.get(name)]
        if missing:
            raise ValueError(
                f"To sign in, these settings are needed: {', '.join(missing)}. They are those of your own OAuth client at Google."
            )
        return SignIn(
            flow="code",
            token_url=settings["token_url"],
            client_id=settings["client_id"],
            client_secret=settings["client_secret"],
            authorize_url=settings.get("authorize_url") or AUTHORIZE_URL,
            scopes=SCOPES,
            redirect_uri=settings.get("redirect_uri") or PASTE_PAGE,
            # Without `prompt` Google gives a refresh token at the first consent alone.
            more={"access_type": "offline", "prompt": "consent"},
            # 401 says that the client id or its secret is wrong: no new sign-in would mend that.
            refresh_statuses_dead=frozenset({400}),
        )

    def tokens_from(self, given: str) -> TokenSet | None:
        """Reads the CLI's own `oauth_creds.json`, and the forms that other gateways keep: flat, or with the tokens under `token`."""
        try:
            file = wire.decode_json(given)
        except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
            if given.lstrip()[:1] == "{":
                raise ValueError("This looks like a credential file, but is not valid JSON.") from None
            return None
        if not isinstance(file, dict):
            return None
        tokens = file["token"] if isinstance(file.get("token"), dict) else file
        access, refresh = (_text(tokens, *names) for names in (("access_token", "token"), ("refresh_token",)))
        if not access and not refresh:
            raise ValueError("This file has neither an access_token nor a refresh_token: it is no credential file of the Gemini CLI.")
        facts = {"project_id": _text(file, "project_id").split(",")[0].strip(), "email": _text(file, "email")}
        expires_at = _expiry(tokens) or _expiry(file)
        return TokenSet(access, refresh, expires_at if access else 0.0, {name: value for name, value in facts.items() if value})

    def facts_from(self, reply: Json) -> dict[str, str]:
        """The account's address, out of the identity token. It is shown to operators and decides nothing, so it is not verified."""
        try:
            payload = str(reply.get("id_token") or "").split(".")[1]
            email = wire.decode_json(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))).get("email")
        except (IndexError, ValueError, RecursionError, AttributeError):
            return {}
        return {"email": email} if isinstance(email, str) and email.isprintable() else {}


def project_known(ask: Ask, target: Target) -> str:
    """The project as the operator gave it, or as it was found; empty: it must be found. A caller's own key has its own project."""
    if target.callers_key:
        return ""
    return target.settings.get("project_id") or ask.learned.get(PROJECT, "")


def _version(target: Target) -> str:
    return quote(target.settings.get("api_version") or "v1internal", safe="")


def _text(file: Json, *names: str) -> str:
    return next((value for name in names if isinstance(value := file.get(name), str) and value), "")


def _expiry(tokens: Json) -> float | None:
    """Seconds since the epoch. `expires_in` says nothing in a file: nobody knows since when."""
    milliseconds = tokens.get("expiry_date")
    if isinstance(milliseconds, int | float) and not isinstance(milliseconds, bool):
        return milliseconds / 1000
    return _moment(_text(tokens, "expiry", "expired"))


def _moment(text: object) -> float | None:
    """RFC 3339 -> seconds since the epoch; without a zone it is UTC."""
    try:
        moment = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() if moment else None


def _window(bucket: Json) -> Json:
    """`used` and `limit` follow from what remains and which share of all that is."""
    window: Json = {"resets_at": bucket.get("resetTime")}
    remaining, share = bucket.get("remainingAmount"), bucket.get("remainingFraction")
    if remaining is not None and share:
        window["limit"] = round(int(remaining) / share)
        window["used"] = window["limit"] - int(remaining)
    return window


# Onboarding


def _said(target: Target, heard: Heard) -> Json:
    """A first call's answer. Raises UpstreamFailure: what goes wrong here is never the client's mistake."""
    if not 200 <= heard.status < 300:
        raise _about_set_up(failure_in(target, heard.status, heard.headers, heard.body))
    try:
        said = wire.decode_json(heard.body)
    except (msgspec.DecodeError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise UpstreamProtocol("What the upstream says of the account could not be read.")
    return said


def _dicts(value: object) -> list[Json]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _about_set_up(problem: UpstreamFailure) -> UpstreamFailure:
    if not isinstance(problem, UpstreamRefused | ModelNotHere):
        return problem
    return _unusable(f"The account could not be set up: {problem.message}")


def _tier_for(account: Json) -> str:
    """The tier to begin with. Raises ForbiddenAtUpstream for an account that may not begin, with Google's reason."""
    tiers, refused = _dicts(account.get("allowedTiers")), _dicts(account.get("ineligibleTiers"))
    to_confirm = [tier for tier in refused if tier.get("reasonCode") == "VALIDATION_REQUIRED"]
    if to_confirm or (refused and not tiers):
        raise _ineligible((to_confirm or refused)[0])
    default = next((tier for tier in tiers if tier.get("isDefault")), {"id": "legacy-tier"})
    if default.get("userDefinedCloudaicompanionProject"):
        raise _no_project(account)
    return str(default.get("id") or "legacy-tier")


def _ineligible(tier: Json) -> UpstreamFailure:
    code, words = str(tier.get("reasonCode") or "UNKNOWN"), clean(str(tier.get("reasonMessage") or ""))
    if code == "UNSUPPORTED_CLIENT":
        return _unusable(UNSUPPORTED_CLIENT, code="unsupported_client")
    if code == "VALIDATION_REQUIRED":
        return _unusable(_to_confirm(tier.get("validationUrl")), code="validation_required")
    return _unusable(f"Gemini Code Assist does not take this account ({clean(code)}). {words}".rstrip(), code="account_ineligible")


def _project_in(said: object, account: Json) -> str:
    project = said.get("cloudaicompanionProject") if isinstance(said, dict) else None
    if isinstance(project, dict):
        project = project.get("id")
    if not isinstance(project, str) or not project:
        raise _no_project(account)
    return project


def _no_project(account: Json) -> UpstreamFailure:
    refused = _dicts(account.get("ineligibleTiers"))
    why = clean(str(refused[0].get("reasonMessage") or "")) if refused else ""
    return _unusable(f"This account needs a Google Cloud project of its own: set project_id. {why}".rstrip(), code="project_required")


# Errors (2.11)

_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|h|m|s)){1,4}")
_PIECE = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_IN_WORDS = re.compile(rf"\b(?:after|in) ({_DURATION.pattern})", re.IGNORECASE)
_DAILY = re.compile("PerDay|Daily", re.IGNORECASE)
_PER_MINUTE = re.compile("PerMinute", re.IGNORECASE)
_SPENT = frozenset({"QUOTA_EXHAUSTED", "INSUFFICIENT_G1_CREDITS_BALANCE"})
_NONE_GRANTED = re.compile(r"\blimit: 0\b(?!\.)")
TERMINAL_WAIT_SECONDS = 300.0  # whoever is told to wait longer is out of quota, not too fast
MINUTE_SECONDS = 60.0
MOST_NESTING = 10


@dataclass(frozen=True, slots=True)
class Problem:
    """A Google error, as far as it decides something. `message` is cleaned."""

    message: str = ""
    status: str = ""  # such as RESOURCE_EXHAUSTED
    reason: str = ""  # of the ErrorInfo
    metadata: Json = field(default_factory=dict)
    retry_delay: object = None
    quota_ids: str = ""
    link: object = None

    @property
    def is_spent(self) -> bool:
        """A quota of the day, a paid balance, or a model that the plan has not got."""
        return self.reason in _SPENT or _DAILY.search(self.quota_ids) is not None or _NONE_GRANTED.search(self.message) is not None

    @property
    def lacks_capacity(self) -> bool:
        return "CAPACITY_E" in self.reason or "no capacity" in self.message.lower()

    def waits(self) -> list[float]:
        """How long to wait, in seconds, by each that says so: the most trustworthy first."""
        reset, words = _moment(self.metadata.get("quotaResetTimeStamp")), _IN_WORDS.search(self.message)
        found = [
            _seconds(self.retry_delay),
            _seconds(self.metadata.get("quotaResetDelay")),
            None if reset is None else max(0.0, reset - time()),
            _seconds(words[1]) if words else None,
        ]
        return [wait for wait in found if wait is not None and wait < LONGEST_WAIT_SECONDS]


def _seconds(duration: object) -> float | None:
    if not isinstance(duration, str) or not _DURATION.fullmatch(duration):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in _PIECE.findall(duration))


def problem_in(body: bytes) -> Problem:
    """Reads an error object, one in an array, and one that is written out inside the message of another."""
    error = _innermost(body)
    message, status = error.get("message"), error.get("status")
    details = _dicts(error.get("details"))

    def of(kind: str) -> list[Json]:
        return [one for one in details if str(one.get("@type", "")).endswith(f"google.rpc.{kind}")]

    info = next((one for one in of("ErrorInfo") if one.get("reason")), {})
    metadata = info["metadata"] if isinstance(info.get("metadata"), dict) else {}
    violations = [one for failure in of("QuotaFailure") for one in _dicts(failure.get("violations"))]
    links = [one.get("url") for help_ in of("Help") for one in _dicts(help_.get("links"))]
    return Problem(
        message=clean(message) if isinstance(message, str) and message.lstrip()[:1] not in ("{", "[") else "",
        status=status if isinstance(status, str) and re.fullmatch(r"[A-Z_]{1,50}", status) else "",
        reason=str(info.get("reason") or ""),
        metadata=metadata,
        retry_delay=next((one.get("retryDelay") for one in of("RetryInfo")), None),
        quota_ids=" ".join([*(str(one.get("quotaId") or "") for one in violations), str(metadata.get("quota_limit") or "")]),
        link=next((url for url in (metadata.get("activationUrl"), metadata.get("validation_link"), *links) if url), None),
    )


def _innermost(body: bytes | str) -> Json:
    found: Json = {}
    for _ in range(MOST_NESTING):
        try:
            value = wire.decode_json(body)
        except (msgspec.DecodeError, RecursionError):
            break
        if isinstance(value, list):
            value = value[0] if value else None
        error = value.get("error") if isinstance(value, dict) else None
        if not isinstance(error, dict):
            break
        found = {**found, **error}
        body = error["message"] if isinstance(error.get("message"), str) else ""
    return found


def failure_in(target: Target, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
    """What an error means, whether it came with its status or inside a 200."""
    problem, header_wait = problem_in(body), wait_seconds_in(headers)
    waits = [*problem.waits(), *([] if header_wait is None else [header_wait])]
    failure = _particular(status, problem, waits)
    if failure is None:
        return failure_of_said(target, status, Said(problem.message, problem.status or None), next(iter(waits), None))
    failure.upstream_status = status
    failure.message = without_callers_key(target, failure.message)
    return failure


def _particular(status: int, problem: Problem, waits: list[float]) -> UpstreamFailure | None:
    """What Google says in a way of its own. None: the status tells enough."""
    message = problem.message
    if status == 429:
        return _limited(problem, waits)
    if status == 403:
        return _forbidden(problem)
    if status == 404:
        return ModelNotHere(message or "The upstream account does not have this model.", param="model")
    if status == 499:
        return UpstreamServer(message or "The upstream cancelled the call.", retry_after_seconds=next(iter(waits), None))
    if status == 400 and "exceeds the maximum number of tokens" in message:
        return ContextLength(message, param="messages")
    if status == 400 and problem.status == "FAILED_PRECONDITION" and "location" in message.lower():
        return _unusable(message)
    return None


def _limited(problem: Problem, waits: list[float]) -> UpstreamFailure:
    """A rest of one model, not of the account: each model has a quota of its own."""
    if problem.lacks_capacity:
        return Overloaded(problem.message or "The upstream has no capacity for this model.", retry_after_seconds=next(iter(waits), None))
    too_fast = problem.reason == "RATE_LIMIT_EXCEEDED"
    if problem.is_spent or (not too_fast and waits and waits[0] > TERMINAL_WAIT_SECONDS):
        # What is spent for the day does not come back in a second, though a RetryInfo may say so.
        longest = max(waits, default=0.0)
        wait = longest if longest >= MINUTE_SECONDS else None
        return OutOfCredit(problem.message or "No quota left on the upstream account.", retry_after_seconds=wait)
    if not waits and _PER_MINUTE.search(problem.quota_ids):
        waits = [MINUTE_SECONDS]
    return RateLimited(problem.message or "The upstream is limiting requests.", retry_after_seconds=next(iter(waits), None))


def _forbidden(problem: Problem) -> UpstreamFailure:
    message, lower = problem.message or "The upstream does not allow this.", problem.message.lower()
    match problem.reason:
        case "UNSUPPORTED_CLIENT":
            return _unusable(UNSUPPORTED_CLIENT, code="unsupported_client")
        case "VALIDATION_REQUIRED":
            return _unusable(_to_confirm(problem.link), code="validation_required")
        case "CONSUMER_INVALID" | "USER_PROJECT_DENIED":
            failure = _unusable(f"The account's project is not accepted: {message}", code="project_invalid")
            failure.unlearn = True
            return failure
        case "SECURITY_POLICY_VIOLATED":
            return _unusable(f"A policy of the account's organization forbids the call: {message}", code="security_policy")
    if problem.reason == "SERVICE_DISABLED" or "has not been used in project" in lower:
        return _unusable(
            f"The API is switched off in the account's project. Switch it on: {_link(problem.link)}".rstrip(": "), code="api_disabled"
        )
    if "licen" in lower or "named user" in lower:
        return _unusable(message, code="no_licence")
    failure = ForbiddenAtUpstream(message, code=problem.status or None)
    failure.unlearn = "on resource project" in lower
    return failure


def _unusable(message: str, *, code: str | None = None) -> ForbiddenAtUpstream:
    """A failure of the whole account, until somebody does something about it."""
    failure = ForbiddenAtUpstream(message, code=code)
    failure.whole_account = True
    return failure


def _to_confirm(url: object) -> str:
    return f"Google wants the account's owner to confirm the account. {_link(url)}".rstrip()


def _link(url: object) -> str:
    return clean(url) if isinstance(url, str) and re.match(r"https://[\w.-]+/", url) else ""


# Requests (2.4, 2.8)

_PLAIN = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "seed": "seed",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}
_SAFETY = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")


def request_of(ask: Ask, target: Target) -> Json:
    """The inner request. Raises InvalidAtUpstream for what this upstream cannot do."""
    body = ask.body
    _refuse_what_is_missing_there(body)
    names = Names(tool_names(body))
    talk = Conversation(names, ask.learned)
    for number, message in enumerate(body["messages"]):
        talk.add(message, f"messages[{number}]")
    request = talk.finished(needs_signatures=target.model.startswith("gemini-3"))
    request.update(_tools(body, names))
    if config := _generation_config(body, target.model):
        request["generationConfig"] = config
    if threshold := target.settings.get("safety_threshold"):
        request["safetySettings"] = [{"category": f"HARM_CATEGORY_{name}", "threshold": threshold} for name in _SAFETY]
    return request


def _refuse_what_is_missing_there(body: Json) -> None:
    if (body.get("n") or 1) > 1:
        raise _unsupported("n", "This upstream gives one answer a call: 'n' can only be 1.")
    for name in ("functions", "function_call", "logit_bias", "audio", "web_search_options"):
        if body.get(name):
            raise _unsupported(name, f"This upstream has no '{name}'." + (" Use 'tools'." if "function" in name else ""))
    if "audio" in _list(body, "modalities", "modalities"):
        raise _unsupported("modalities", "This upstream does not answer with audio.")


def _unsupported(param: str, message: str) -> InvalidAtUpstream:
    return InvalidAtUpstream(message, param=param, code="unsupported_parameter")


def _invalid(param: str, message: str) -> InvalidAtUpstream:
    return InvalidAtUpstream(message, param=param, code="invalid_value")


def _generation_config(body: Json, model: str) -> Json:
    config: Json = {sent: body[name] for name, sent in _PLAIN.items() if body.get(name) is not None}
    for name in ("presencePenalty", "frequencyPenalty"):
        if config.get(name) == 0:  # no penalty; some models refuse the very word
            del config[name]
    if not -(2**31) <= _number(config.get("seed")) < 2**31:
        raise _invalid("seed", "This upstream takes a seed of 32 bits.")
    ceiling = body.get("max_completion_tokens")
    ceiling = body.get("max_tokens") if ceiling is None else ceiling
    if ceiling is not None:
        config["maxOutputTokens"] = min(ceiling, MOST_OUTPUT_TOKENS)
    if stop := body.get("stop"):
        config["stopSequences"] = [stop] if isinstance(stop, str) else stop
    modalities = [str(one).upper() for one in _list(body, "modalities", "modalities")]
    if modalities not in ([], ["TEXT"]):
        config["responseModalities"] = modalities
    config.update(_response_format(body.get("response_format")))
    if thinking := thinking_of(model, body.get("reasoning_effort")):
        config["thinkingConfig"] = thinking
    return config


def _number(value: object) -> float:
    return value if isinstance(value, int | float) else 0


def _response_format(wanted: Json | None) -> Json:
    match (wanted or {}).get("type", "text"):
        case "text":
            return {}
        case "json_object":
            return {"responseMimeType": "application/json"}
        case "json_schema":
            given = (wanted or {}).get("json_schema")
            schema = given.get("schema") if isinstance(given, dict) else None
            if not isinstance(schema, dict):
                raise _invalid("response_format", "'response_format.json_schema.schema' must be an object.")
            return {"responseMimeType": "application/json", "responseJsonSchema": schema}
    raise _invalid("response_format", "'response_format.type' is one of text, json_object and json_schema.")


_BUDGETS = {"minimal": 512, "low": 1024, "medium": 8192, "high": 24576}
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "auto")


def thinking_of(model: str, effort: object) -> Json:
    """`thinkingConfig` for a reasoning effort: a budget for models 2.5, a level for models 3, never both (2.8). Empty: it does not think.

    Raises InvalidAtUpstream for an effort that is none, or that the model has not got."""
    if effort is not None and effort not in _EFFORTS:
        raise _invalid("reasoning_effort", f"'reasoning_effort' is one of {', '.join(_EFFORTS)}.")
    generation = re.match(r"gemini-(2\.5|3)", model)
    if generation is None or "image" in model or "tts" in model:
        if effort in (None, "none", "auto"):
            return {}
        raise _unsupported("reasoning_effort", "This model does not reason.")
    if effort in (None, "auto"):
        return {"includeThoughts": True}
    pro = "-pro" in model
    amount: Json
    if generation[1] == "3":
        amount = {"thinkingLevel": _level(model, str(effort), pro=pro)}
    elif effort == "none":
        amount = {"thinkingBudget": 128 if pro else 0}
    else:
        amount = {"thinkingBudget": _BUDGETS.get(str(effort), 32768 if pro else 24576)}
    return {"includeThoughts": effort != "none", **amount}


def _level(model: str, effort: str, *, pro: bool) -> str:
    """The nearest level that the model has: 3-pro knows low and high, other pro models no minimal."""
    if effort in ("none", "minimal"):
        return "LOW" if pro else "MINIMAL"
    if effort == "medium" and model.startswith("gemini-3-pro"):
        return "LOW"
    return effort.upper() if effort in ("low", "medium") else "HIGH"


# Messages

_BYPASS = "skip_thought_signature_validator"  # what the backend takes where a signature got lost (2.6)
_REMEMBERED = "signature "  # in `Ask.learned`, before the id of a tool call
MOST_REMEMBERED = 500
LONGEST_REMEMBERED = 16 << 10


def remember(learned: dict[str, str], call_id: str, signature: str) -> None:
    """Keep a signature for a client that does not send it back. The oldest go first."""
    if len(signature) > LONGEST_REMEMBERED:
        return
    learned[_REMEMBERED + call_id] = signature
    if len(learned) > MOST_REMEMBERED:
        del learned[next(name for name in learned if name.startswith(_REMEMBERED))]


class Conversation:
    """Turns OpenAI's messages into `contents`: equal roles in a row are one turn, tool results stand in the order of their calls."""

    def __init__(self, names: Names, learned: Mapping[str, str]) -> None:
        self._names, self._learned = names, learned
        self._contents: list[Json] = []
        self._system: list[Json] = []
        self._called: dict[str, tuple[int, str]] = {}  # id of a call -> its number, and its function's name as sent
        self._calls = 0
        self._results: list[tuple[int, Json]] = []

    def add(self, message: Json, where: str) -> None:
        role, content = message.get("role"), message.get("content")
        if role == "tool":
            return self._result(message, where)
        self._give_results()
        match role:
            case "system" | "developer":
                self._system += [{"text": text} for text in _texts(content, where)]
            case "user":
                self._turn("user", _parts(content, where))
            case "assistant":
                self._turn("model", [*_parts(content, where), *(self._call(one, where) for one in _list(message, "tool_calls", where))])
            case _:
                raise _invalid(where, f"{where} has a role that this upstream does not know: system, developer, user, assistant or tool.")

    def finished(self, *, needs_signatures: bool) -> Json:
        self._give_results()
        if needs_signatures:
            self._sign()
        if not self._contents and self._system:
            return {"contents": [{"role": "user", "parts": self._system}]}
        if not self._contents:
            raise _invalid("messages", "'messages' holds nothing to answer.")
        request: Json = {"contents": self._contents}
        if self._system:
            request["systemInstruction"] = {"role": "user", "parts": self._system}
        return request

    def _turn(self, role: str, parts: list[Json]) -> None:
        if self._contents and self._contents[-1]["role"] == role:
            self._contents[-1]["parts"] += parts
        elif parts:
            self._contents.append({"role": role, "parts": parts})

    def _call(self, call: object, where: str) -> Json:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _invalid(where, f"{where} has a tool call without a function.")
        name = self._names.sent(function["name"])
        call_id = call.get("id")
        self._called[call_id if isinstance(call_id, str) else ""] = (self._calls, name)
        self._calls += 1
        part: Json = {"functionCall": {"name": name, "args": _arguments(function.get("arguments"), where)}}
        if signature := _signature(call) or self._learned.get(f"{_REMEMBERED}{call_id}"):
            part["thoughtSignature"] = signature
        return part

    def _result(self, message: Json, where: str) -> None:
        call_id = message.get("tool_call_id")
        number, name = self._called.get(call_id if isinstance(call_id, str) else "", (self._calls, ""))
        if not name and isinstance(message.get("name"), str):
            name = self._names.sent(message["name"])
        if not name:
            raise _invalid(where, f"{where} answers a tool call that no message before it has made.")
        text = "".join(_texts(message.get("content"), where))
        said = _object(text)
        response = {"result": text} if said is None else said
        self._results.append((number, {"functionResponse": {"name": name, "response": response}}))

    def _give_results(self) -> None:
        """All results of a turn are one content, in the order of the calls: Gemini wants as many as there were calls."""
        if self._results:
            results, self._results = self._results, []
            self._turn("user", [part for _, part in sorted(results, key=lambda result: result[0])])

    def _sign(self) -> None:
        for content in self._contents:
            first = next((part for part in content["parts"] if "functionCall" in part), None)
            if first is not None:
                first.setdefault("thoughtSignature", _BYPASS)


def _signature(call: Json) -> str:
    """As Google's own OpenAI-compatible endpoint carries it: `extra_content.google.thought_signature`."""
    extra = call.get("extra_content")
    google = extra.get("google") if isinstance(extra, dict) else None
    signature = google.get("thought_signature") if isinstance(google, dict) else None
    return signature if isinstance(signature, str) else ""


def _list(holder: Json, name: str, where: str) -> list[Any]:
    value = holder.get(name)
    if value is not None and not isinstance(value, list):
        raise _invalid(where, f"'{name}' must be a list.")
    return value or []


def _arguments(text: object, where: str) -> Json:
    if text in (None, ""):
        return {}
    arguments = _object(text)
    if arguments is None:
        raise _invalid(where, f"The arguments of a tool call in {where} are not a JSON object.")
    return arguments


def _object(text: object) -> Json | None:
    """The JSON object that a text is; None when it is something else."""
    if isinstance(text, dict):
        return text
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        return None
    try:
        value = wire.decode_json(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return None
    return value if isinstance(value, dict) else None


def _texts(content: object, where: str) -> list[str]:
    parts = _parts(content, where)
    if any("text" not in part for part in parts):
        raise _invalid(where, f"{where} can hold text alone.")
    return [part["text"] for part in parts]


def _parts(content: object, where: str) -> list[Json]:
    if content is None or isinstance(content, str):
        return [{"text": content}] if content else []
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise _invalid(where, f"The content of {where} is neither a text nor a list of parts.")
    parts = [_part(one, where) for one in content]
    return [part for part in parts if part.get("text") != ""]


def _part(part: Json, where: str) -> Json:
    kind = part.get("type")
    inner = part.get(str(kind))
    match kind:
        case "text" | "refusal" if isinstance(inner, str):
            return {"text": inner}
        case "image_url":
            url = inner.get("url") if isinstance(inner, dict) else inner
            if isinstance(url, str) and not url.startswith("data:"):
                raise _unsupported_content(where, "takes an image as a data URL (data:image/png;base64,...) alone, not as an address")
            if (inline := _inline(url, where)) is not None:
                return inline
        case "input_audio" if isinstance(inner, dict) and isinstance(inner.get("data"), str):
            return {"inlineData": {"mimeType": f"audio/{inner.get('format') or 'wav'}", "data": inner["data"]}}
        case "file" if isinstance(inner, dict) and isinstance(inner.get("file_data"), str):
            return _inline(inner["file_data"], where) or _file(inner, where)
    if isinstance(kind, str) and kind not in _KNOWN_PARTS:
        raise _unsupported_content(where, f"takes no part of the type {kind[:50]!r}")
    raise _invalid(where, f"{where} has a part of the type {str(kind)[:50]!r} in a form that this upstream does not take.")


_KNOWN_PARTS = frozenset({"text", "refusal", "image_url", "input_audio", "file"})


def _unsupported_content(where: str, what: str) -> InvalidAtUpstream:
    return InvalidAtUpstream(f"{where}: this upstream {what}.", param=where, code="unsupported_content")


_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[^;,]{1,100}){0,5}),", re.ASCII | re.IGNORECASE)


def _inline(url: object, where: str) -> Json | None:
    """`inlineData` of a data URL; None when it is none."""
    if not isinstance(url, str) or (found := _DATA_URL.match(url)) is None:
        return None
    data = url[found.end() :]
    if not found[2].lower().endswith(";base64"):
        data = base64.b64encode(unquote_to_bytes(data)).decode()
    return {"inlineData": {"mimeType": found[1] or "text/plain", "data": data}}


_TYPES = {
    "pdf": "application/pdf",
    "txt": "text/plain",
    "md": "text/markdown",
    "csv": "text/csv",
    "html": "text/html",
    "xml": "text/xml",
    "json": "application/json",
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "mp3": "audio/mp3",
    "wav": "audio/wav",
    "mp4": "video/mp4",
}


def _file(file: Json, where: str) -> Json:
    mime_type = _TYPES.get(str(file.get("filename") or "").lower().rpartition(".")[2])
    if mime_type is None:
        raise _invalid(where, f"{where} has a file of unknown type: give it as a data URL, or with a name that tells.")
    return {"inlineData": {"mimeType": mime_type, "data": file["file_data"]}}


# Tools (2.9)


class Names:
    """The names of functions as Gemini takes them, and back again."""

    _TAKEN_AS_IT_IS = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]{0,63}", re.ASCII)

    def __init__(self, given: Iterable[str]) -> None:
        self._sent: dict[str, str] = {}
        self._given: dict[str, str] = {}
        # Those that can stay as they are come first, so that no other takes their place.
        for name in sorted(given, key=lambda name: not self._TAKEN_AS_IT_IS.fullmatch(name)):
            self.sent(name)

    def sent(self, name: str) -> str:
        if name not in self._sent:
            plain = re.sub(r"[^A-Za-z0-9_.:-]", "_", name)
            plain = (plain if self._TAKEN_AS_IT_IS.match(plain) else f"_{plain}")[:64]
            unique, number = plain, 2
            while unique in self._given:
                unique, number = f"{plain[:58]}_{number}", number + 1
            self._sent[name], self._given[unique] = unique, name
        return self._sent[name]

    def given(self, sent: str) -> str:
        return self._given.get(sent, sent)


def tool_names(body: Json) -> list[str]:
    """Raises InvalidAtUpstream for a tool that is no function."""
    names = []
    for number, tool in enumerate(body.get("tools") or ()):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _unsupported(f"tools[{number}]", "This upstream takes tools of the type 'function', with a name, alone.")
        names.append(function["name"])
    return names


def _tools(body: Json, names: Names) -> Json:
    tools = body.get("tools")
    if not tools:
        return {}
    declared = [_declaration(tool["function"], names) for tool in tools]
    said: Json = {"tools": [{"functionDeclarations": declared}]}
    if mode := _tool_config(body.get("tool_choice"), names):
        said["toolConfig"] = {"functionCallingConfig": mode}
    return said


def _declaration(function: Json, names: Names) -> Json:
    declaration: Json = {"name": names.sent(function["name"])}
    if isinstance(function.get("description"), str):
        declaration["description"] = function["description"]
    parameters = function.get("parameters")
    declaration["parametersJsonSchema"] = plain_schema(parameters) if parameters else {"type": "object", "properties": {}}
    return declaration


def _tool_config(choice: object, names: Names) -> Json | None:
    match choice:
        case None:
            return None
        case "none" | "auto":
            return {"mode": choice.upper()}
        case "required":
            return {"mode": "ANY"}
        case {"type": "function", "function": {"name": str(name)}}:
            return {"mode": "ANY", "allowedFunctionNames": [names.sent(name)]}
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [*tools]}}:
            allowed = [names.sent(name) for tool in tools if (name := _name_of_allowed(tool))]
            # AUTO takes no names; VALIDATED is the same with names: a call of these, or words.
            return {"mode": "ANY" if mode == "required" else "VALIDATED", "allowedFunctionNames": allowed}
    raise _unsupported("tool_choice", "'tool_choice' is none, auto, required, a function, or a set of allowed functions.")


def _name_of_allowed(tool: object) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return name
    return ""


# Answers (2.5, 2.10)


class Call(msgspec.Struct):
    name: str = ""
    args: Any = None


class Inline(msgspec.Struct, rename="camel"):
    mime_type: str = ""
    data: str = ""


class Code(msgspec.Struct):
    language: str = ""
    code: str = ""


class CodeResult(msgspec.Struct):
    output: str = ""


class Part(msgspec.Struct, rename="camel"):
    text: str | None = None
    thought: bool | None = None
    thought_signature: str | None = None
    function_call: Call | None = None
    inline_data: Inline | None = None
    executable_code: Code | None = None
    code_execution_result: CodeResult | None = None


class Content(msgspec.Struct):
    parts: list[Part] | None = None


class Candidate(msgspec.Struct, rename="camel"):
    content: Content | None = None
    finish_reason: str | None = None


class Counted(msgspec.Struct, rename="camel"):
    """Numbers, or whatever stands in their place: a strange count must not cost the words beside it."""

    prompt_token_count: Any = None
    tool_use_prompt_token_count: Any = None
    cached_content_token_count: Any = None
    candidates_token_count: Any = None
    thoughts_token_count: Any = None
    total_token_count: Any = None


class Feedback(msgspec.Struct, rename="camel"):
    block_reason: str | None = None


class Response(msgspec.Struct, rename="camel"):
    candidates: list[Candidate] | None = None
    usage_metadata: Counted | None = None
    prompt_feedback: Feedback | None = None


class Envelope(msgspec.Struct):
    response: Response | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Envelope).decode
_decode_all = msgspec.json.Decoder(list[Envelope]).decode

_FINISH = {
    "MAX_TOKENS": "length",
    **dict.fromkeys(
        (
            "SAFETY",
            "RECITATION",
            "BLOCKLIST",
            "PROHIBITED_CONTENT",
            "SPII",
            "IMAGE_SAFETY",
            "IMAGE_PROHIBITED_CONTENT",
            "IMAGE_RECITATION",
            "MODEL_ARMOR",
            "LANGUAGE",
        ),
        "content_filter",
    ),
}
_BAD_CALL = frozenset({"MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS"})


class Answers(ChatReader):
    """One answer, a stream or whole. Whether it is complete, only the end of the connection tells: nothing else marks the last frame."""

    def __init__(self, ask: Ask, target: Target) -> None:
        super().__init__(ask, target)
        self._learned = ask.learned
        self._names = Names(tool_names(ask.body))
        self._one_call = ask.body.get("parallel_tool_calls") is False
        self._after_tool = ask.body["messages"][-1].get("role") == "tool" if ask.body["messages"] else False
        self._call_ids = f"call_{ask.request_id.replace('-', '')}_"
        self._images: list[Json] = []
        self._finish: str | None = None
        self._blocked = False

    def frame(self, data: bytes, event: str) -> None:
        for envelope in _decode_all(data) if data[:1] == b"[" else (_decode(data),):
            if envelope.error is not None:
                raise self._said_error(envelope.error)
            if envelope.response is not None:
                self._response(envelope.response)

    def _said_error(self, error: object) -> UpstreamFailure:
        code = error.get("code") if isinstance(error, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
        return failure_in(self._target, status, {}, wire.encode_json({"error": error}))

    def _response(self, response: Response) -> None:
        if response.usage_metadata is not None and (tokens := _tokens(response.usage_metadata)) is not None:
            self.count(tokens)
        if response.prompt_feedback is not None and response.prompt_feedback.block_reason:
            self._blocked = True
        if not response.candidates:
            return
        candidate = response.candidates[0]
        if candidate.content is not None:
            for part in candidate.content.parts or ():
                self._part(part)
        if candidate.finish_reason:
            self._finish = candidate.finish_reason

    def _part(self, part: Part) -> None:
        if part.text:
            if part.thought:
                self.reasoning(part.text)
            else:
                self.text(part.text)
        elif part.function_call is not None:
            self._call(part.function_call, part.thought_signature)
        elif part.inline_data is not None and not part.thought:
            image = {"type": "image_url", "image_url": {"url": f"data:{part.inline_data.mime_type};base64,{part.inline_data.data}"}}
            self._images.append(image)
            self.extra("images", list(self._images) if self._whole else [image])  # noqa: S610 no Django here
        elif part.executable_code is not None:
            self.text(f"\n```{part.executable_code.language.lower()}\n{part.executable_code.code}\n```\n")
        elif part.code_execution_result is not None:
            self.text(f"\n```\n{part.code_execution_result.output}\n```\n")

    def _call(self, call: Call, signature: str | None) -> None:
        if self._one_call and self.has_calls:
            return  # the client wants one call at a time, which Gemini cannot be told
        call_id = f"{self._call_ids}{len(self._calls)}"
        arguments = wire.encode_json(call.args if call.args is not None else {}).decode()
        extra: Json = {}
        if signature:
            remember(self._learned, call_id, signature)
            extra["extra_content"] = {"google": {"thought_signature": signature}}
        self.tool_call(call_id, self._names.given(call.name), arguments, **extra)

    def closed(self) -> None:
        if self._finish is None and not self._blocked:
            return  # cut off
        nothing_said = not self.started if not self._whole else not (self._text or self._calls or self._extra)
        reason = "content_filter" if self._finish is None else _FINISH.get(self._finish, "stop")
        if nothing_said and self._finish in _BAD_CALL:
            raise UpstreamServer("The model made a tool call that cannot be read.")
        if not self.started and reason == "stop" and not self._after_tool:
            raise UpstreamProtocol("The upstream's answer is empty.")
        if not (reason == "stop" and self.has_calls):  # the reason for calls is STOP, too
            self.reason(reason)
        self.complete()


def _tokens(counted: Counted) -> Tokens | None:
    """Disjoint parts; None for frames that count nothing (2.5)."""
    if counted.prompt_token_count is None and counted.total_token_count is None:
        return None
    prompt = _count(counted.prompt_token_count) + _count(counted.tool_use_prompt_token_count)
    thoughts = _count(counted.thoughts_token_count)
    if counted.candidates_token_count is None:
        output = max(0, _count(counted.total_token_count) - prompt - thoughts)
    else:
        output = _count(counted.candidates_token_count)
    cached = min(_count(counted.cached_content_token_count), prompt)
    return Tokens(fresh_input=prompt - cached, cache_read=cached, output=output, reasoning=thoughts)


def _count(value: object) -> int:
    return max(0, min(value, wire.MOST_TOKENS)) if isinstance(value, int) and not isinstance(value, bool) else 0
