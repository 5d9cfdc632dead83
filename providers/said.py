"""What an upstream's error says, in whichever shape it says it, and which failure of `failures.py` that is.

Sources: protocol references 0.3, 1.6, 4.3, 4.4 and 4.10.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from providers import wire
from providers.failures import (
    CallersKeyRefused,
    ContentFiltered,
    ContextLength,
    CredentialRefused,
    ForbiddenAtUpstream,
    InvalidAtUpstream,
    ModelGone,
    OutOfCredit,
    Overloaded,
    RateLimited,
    UpstreamFailure,
    UpstreamServer,
    UpstreamTimeout,
    UsageOptionRefused,
)
from providers.secrets import redact

if TYPE_CHECKING:
    from providers.adapter import Target

LONGEST_WAIT_SECONDS = 10**8  # an upstream that asks for more says nothing of use


class Said(Struct, frozen=True):
    """What an upstream's error body says, cleaned: one line, at most 500 characters, no secrets."""

    message: str = ""
    code: str | None = None
    type: str | None = None
    param: str | None = None
    status: int | None = None


def said_in(body: bytes) -> Said:
    """Reads `{"error": {…}}`, `{"error": "…"}`, `{"detail": …}` and `{"message": …}` (reference 1.6, 4.4, 4.10)."""
    try:
        value: Any = wire.decode_answer(body)
    except (msgspec.DecodeError, RecursionError):
        return Said()  # a page or a dump: nothing of it is shown
    if not isinstance(value, dict):
        return Said()
    error = value.get("error") or value
    if isinstance(error, str):
        return Said(message=clean(error), code=_word(value.get("code")), status=_number(value.get("status")))
    if not isinstance(error, dict):
        return Said()
    message = error.get("message") or error.get("detail") or value.get("message") or value.get("detail") or ""
    if isinstance(message, list):
        message = "; ".join(str(one.get("msg", "")) for one in message if isinstance(one, dict))
    return Said(
        message=clean(str(message)) if isinstance(message, str) else "",
        code=_word(error.get("code")),
        type=_word(error.get("type")),
        param=_word(error.get("param")),
        status=_number(error.get("status")) or _number(error.get("code")),
    )


def clean(text: str) -> str:
    """An upstream's words as they may be shown: one line, at most 500 characters, key-like parts masked."""
    if text.lstrip().startswith("<"):
        return ""
    line = " ".join(text.split())
    return redact("".join(letter for letter in line if letter.isprintable()))[:500]


def _word(value: object) -> str | None:
    """A code or a parameter's name: short, plain and no secret, or it is not passed on."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.\[\]-]{1,100}", value) and redact(value) == value else None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 400 <= value < 600 else None


def status_of(error: object) -> int:
    """The status that an error inside a 200 stands for."""
    said = said_in(wire.encode_json({"error": error}))
    by_code = {"invalid_api_key": 401, "insufficient_quota": 429, "rate_limit_exceeded": 429, "model_not_found": 404}
    return said.status or by_code.get(said.code or "", 400 if said.type == "invalid_request_error" else 500)


_TOO_LONG = (
    "context_length",
    "context length",
    "maximum context",
    "too many tokens",
    "context window",
    "prompt is too long",
    "token limit",
    "exceed max tokens",
    "exceeds max tokens",
    "input token",
    "total message size",
)
_FILTERED = ("content_policy", "content policy", "content_filter", "content management policy", "moderation")
_NO_MODEL = ("model_not_found", "model not found", "does not exist", "unknown model", "no such model")
_NO_CREDIT = (
    "insufficient_quota",
    "credit_balance_exhausted",
    "insufficient_funds",
    "billing_hard_limit_reached",
    "insufficient balance",
    "in arrears",
)


def failure_of_said(target: Target | None, status: int, said: Said, wait_seconds: float | None = None) -> UpstreamFailure:
    callers_key = target is not None and target.callers_key
    said = words_for(target, said)
    problem = _classify(status, said, wait_seconds, callers_key=callers_key)
    problem.upstream_status = status
    problem.message = without_callers_key(target, problem.message)
    return problem


def words_for(target: Target | None, said: Said) -> Said:
    """What was said, without the words that are or hold the secret that came with the request."""
    if target is None or not target.callers_key:
        return said
    secret = target.secret.reveal()
    hidden: dict[str, Any] = {name: None for name in ("code", "type", "param") if secret in (getattr(said, name) or "")}
    return msgspec.structs.replace(said, **hidden) if hidden else said


def without_callers_key(target: Target | None, text: str) -> str:
    """An upstream's cleaned words without the secret that came with the request: nobody else knows it, so no redactor does.

    Words that were too long may have been cut in the middle of it."""
    if target is None or not target.callers_key:
        return text
    secret = target.secret.reveal()
    text = text.replace(secret, "[redacted]")
    longest = min(len(secret) - 1, len(text))
    cut = next((size for size in range(longest, 3, -1) if text.endswith(secret[:size])), 0)
    return f"{text[:-cut]}[redacted]" if cut else text


def _classify(status: int, said: Said, wait_seconds: float | None, *, callers_key: bool) -> UpstreamFailure:
    text = f"{said.code or ''} {said.type or ''} {said.message}".lower()

    def mentions(words: tuple[str, ...]) -> bool:
        return any(word in text for word in words)

    if status == 401:
        if callers_key:
            return CallersKeyRefused("The upstream refused the key given in X-Upstream-Key.")
        return CredentialRefused("The upstream refused the gateway's credential.")
    if status == 402:
        return OutOfCredit(said.message or "No credit left on the upstream account.", status=402, retry_after_seconds=wait_seconds)
    if status == 403:
        return ForbiddenAtUpstream(said.message or "The upstream does not allow this.", code=said.code)
    if status == 404:
        return ModelGone(said.message or "The upstream does not know this model.", param="model" if mentions(_NO_MODEL) else said.param)
    if status == 408:
        return UpstreamTimeout(said.message or "The upstream timed out.")
    if status == 429:
        if mentions(_NO_CREDIT):
            return OutOfCredit(said.message or "No quota left on the upstream account.", retry_after_seconds=wait_seconds)
        return RateLimited(said.message or "The upstream is limiting requests.", retry_after_seconds=wait_seconds)
    if status in (503, 529):
        return Overloaded(said.message or "The upstream is overloaded.", retry_after_seconds=wait_seconds)
    if status >= 500 or status < 400 or status == 499:  # 499: somebody there gave the call up; the client did not
        return UpstreamServer(said.message or f"The upstream answered {status}.")
    if mentions(_TOO_LONG) or (status == 413 and "token" in text):
        return ContextLength(said.message or "The request is longer than the model's context.", param=said.param or "messages")
    if mentions(_FILTERED):
        return ContentFiltered(said.message or "The upstream's content policy refused this.", param=said.param)
    message = said.message or f"The upstream refused the request ({status})."
    if "stream_options" in text or "include_usage" in text:
        return UsageOptionRefused(message, param=said.param, code=said.code)
    return InvalidAtUpstream(message, status=status if status in (409, 413) else 400, param=said.param, code=said.code)


def wait_seconds_in(headers: Mapping[str, str]) -> float | None:
    """`retry-after-ms`, else `retry-after` as seconds or as a date (reference 4.3)."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        return seconds if 0 <= seconds < LONGEST_WAIT_SECONDS else None
    return _until(headers.get("retry-after", ""))


def _until(date: str) -> float | None:
    try:
        seconds = parsedate_to_datetime(date).timestamp() - time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds) if seconds < LONGEST_WAIT_SECONDS else None
