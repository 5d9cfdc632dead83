"""What a row of the log tells of one request, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.models import UsageEvent, UsageSource
from proxy.templatetags.show import milliseconds

_FAILED = {
    "alias_misconfigured": "The alias leads to something that cannot answer this",
    "client_closed": "The client left before it had the whole answer",
    "content_policy_violation": "The upstream’s filter refused the content",
    "context_length_exceeded": "The request is longer than the model takes",
    "frozen": "The key was frozen while the answer came",
    "insufficient_quota": "The upstream account is out of credit",
    "internal_error": "Sluice itself failed; the server’s log has more under this request’s id",
    "interrupted": "The server ended while this request was open",
    "invalid_api_key": "The upstream refused the key that the client brought for it",
    "ip_not_authorized": "The key may no longer be used from the client’s network",
    "key_revoked": "The key was revoked, or expired, while the answer came",
    "model_not_found": "The upstream does not have this model",
    "overloaded": "The upstream is overloaded",
    "rate_limit_exceeded": "The upstream had too many requests or tokens a minute",
    "shutdown": "The server was being stopped",
    "upstream_auth_failed": "The upstream refused the account’s secret",
    "upstream_auth_pending": "The upstream account’s sign-in had ended and was not renewed yet",
    "upstream_bad_response": "The upstream’s answer could not be read",
    "upstream_broke": "The upstream broke off in the middle of its answer",
    "upstream_error": "The upstream failed",
    "upstream_timeout": "The upstream did not answer in time",
    "upstream_unreachable": "The upstream could not be reached",
}


@dataclass(frozen=True, slots=True)
class Attempt:
    number: int
    account: str
    outcome: str
    failed: bool


def outcome_of(event: UsageEvent) -> str:
    """What became of it, without a full stop."""
    if event.status < 400:
        return "Answered"
    if event.error in _FAILED:
        return _FAILED[event.error]
    word = "Failed" if event.status >= 500 else "Refused"
    return f"{word}: {event.error.replace('_', ' ')}" if event.error else word


def known_how(event: UsageEvent) -> str:
    """Where its figures come from."""
    if event.usage_source == UsageSource.REPORTED:
        return "As the upstream counted."
    if event.usage_source == UsageSource.ESTIMATED:
        return "By Sluice, from the length of what was sent and answered: the upstream reported nothing."
    if event.status < 400:
        return "Not known: the upstream reported nothing, and what it counts does not follow from the text."
    return "Nothing was used: no upstream took the request on."


def why_no_cost(event: UsageEvent) -> str:
    """Empty where there is one."""
    if event.cost is not None:
        return ""
    if event.usage_source == UsageSource.MISSING:
        return "What it cost is not known, since what it used is not."
    return "No price was in force for its model, so it is in no sum of costs."


def attempts_of(event: UsageEvent, account: str, labels: Mapping[int, str]) -> list[Attempt]:
    """In their order. `account` is the last one's; `labels` has those of the others that the viewer may know."""
    if not event.attempts:
        return []
    tried = event.tried or []
    attempts = [
        Attempt(number, labels.get(one["credential"], one["provider"]), came_to(one), failed=True) for number, one in enumerate(tried, 1)
    ]
    return [*attempts, Attempt(event.attempts, account, outcome_of(event), failed=event.status >= 400)]


def came_to(one: Mapping[str, Any]) -> str:
    """What came of an attempt that was not the last, and why another was made."""
    what = _FAILED.get(one["error"], f"Failed: {one['error'].replace('_', ' ')}")
    said = f" ({one['status']})" if one.get("status") else ""
    then = one["then"]
    if then == "next":
        why = "so the next account was asked"
    elif then == "renewed":
        why = "so its sign-in was renewed, and it was asked again"
    else:
        why = f"so it was asked again {then.replace('_', ' ')}"
    return f"{what}{said} after {milliseconds(one.get('duration_ms', 0))}, {why}"
