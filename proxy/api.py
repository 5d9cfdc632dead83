"""Usage over HTTP, for signed-in people: sums of an organization and of one key, and a key's log by cursor.

A member sees what own keys used; owners, admins and viewers see everybody's. A foreign id and a missing one get the same
answer. Costs are micro-dollars (1 USD = 1000000); a request without a price has no cost, which is not a cost of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from django.core.exceptions import ValidationError
from django.db import transaction
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from django.utils import timezone
from ninja import Field, Query, Router, Schema
from ninja.errors import AuthorizationError
from pydantic import ConfigDict

from accounts import queries as accounts
from accounts.actions import record
from accounts.models import Membership, Organization, Role, User
from providers import actions as upstreams
from providers.models import Credential
from proxy import queries
from proxy.models import FrozenModel, UsageEvent
from proxy.queries import SUMS, Cursor, Refused, Sums

router = Router(tags=["usage"])

LONGEST = timedelta(days=366)
MOST_ROWS = 200

Since = Annotated[datetime | None, Query(description="From this moment on; without a zone it is UTC. Default: 30 days before `until`.")]
Until = Annotated[datetime | None, Query(description="Before this moment. Default: now. At most 366 days after `since`.")]
KeyNumber = Annotated[int, Field(ge=1, lt=1 << 63)]


class SumsOut(Schema):
    """The parts of tokens do not overlap. `cost` is micro-dollars of the priced requests; `unpriced` requests are not in it."""

    requests: int
    errors: int
    unpriced: int
    estimated: int
    fresh_input: int
    cache_read: int
    cache_write: int
    output: int
    reasoning: int
    cost: int | None


class GroupOut(SumsOut):
    """`name` is a model, a key's number, or a day in the organization's time zone."""

    name: str
    provider: str | None


class UsageOut(Schema):
    """`truncated`: there are more groups than are listed; `total` has them all."""

    since: datetime
    until: datetime
    time_zone: str
    by: str
    total: SumsOut
    data: list[GroupOut]
    truncated: bool


class RefusedOut(Schema):
    """`shadow`: a limit that only counts; the calls went through."""

    status: int
    code: str
    count: int
    last_hour: datetime
    shadow: bool


class KeyUsageOut(UsageOut):
    refused: list[RefusedOut]


class TriedOut(Schema):
    """An attempt before the last. `account`: its label, or only its provider to who may not know it.

    `then`: why another was made: the `next` account, a `renewed` sign-in, or `without` an option."""

    account: str
    error: str
    status: int
    duration_ms: int
    then: str


class RequestOut(Schema):
    """Tokens: `input` is the whole prompt with what came from a cache; `output` includes reasoning."""

    request_id: str
    at: datetime
    model: str
    served_model: str
    provider: str
    status: int
    error: str
    stream: bool
    attempts: int
    tried: list[TriedOut]
    input_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost: int | None
    usage_source: str
    first_byte_ms: int | None
    duration_ms: int
    corrects: str | None


class RequestsOut(Schema):
    """The newest first. `next` is the `before` of the following page; null on the last one."""

    data: list[RequestOut]
    next: str | None


@router.get("/organizations/{slug:slug}/usage", response=UsageOut, summary="What an organization used")
def organization_usage(
    request: HttpRequest, slug: str, by: Literal["model", "key", "day"] = "day", since: Since = None, until: Until = None
) -> dict[str, Any]:
    place = _place(request, slug)
    # The one person whose keys a member may look at; None = everybody's.
    whose = place.user.pk if place.role == Role.MEMBER else None
    return _usage(place, by, since, until, user_id=whose)


@router.get("/organizations/{slug:slug}/keys/{int:key_id}/usage", response=KeyUsageOut, summary="What one key used, and why it was refused")
def key_usage(
    request: HttpRequest, slug: str, key_id: int, by: Literal["model", "day"] = "day", since: Since = None, until: Until = None
) -> dict[str, Any]:
    place = _place(request, slug)
    key = accounts.key_of(place, key_id)
    usage = _usage(place, by, since, until, key_ids=[key.pk])
    refused = queries.refused_calls(place.organization, key.pk, since=usage["since"], until=usage["until"])
    return {**usage, "refused": [_refused(one) for one in refused]}


@router.get("/organizations/{slug:slug}/keys/{int:key_id}/requests", response=RequestsOut, summary="A key's requests, the newest first")
def key_requests(
    request: HttpRequest,
    slug: str,
    key_id: int,
    since: Since = None,
    until: Until = None,
    before: Annotated[str | None, Query(max_length=100, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_ROWS)] = 50,
) -> dict[str, Any]:
    place = _place(request, slug)
    key = accounts.key_of(place, key_id)
    start, end = _window(since, until)
    page = queries.recent_requests(place.organization, key.pk, since=start, until=end, before=_cursor(before), rows=limit)
    labels = queries.labels_shown_to(place, page.rows)
    return {"data": [_shown(event, labels) for event in page.rows], "next": str(page.older) if page.older else None}


class FreezeBody(Schema):
    model_config = ConfigDict(extra="forbid")

    minutes: Annotated[float, Field(gt=0, le=365 * 24 * 60, allow_inf_nan=False)]
    reason: Annotated[str, Field(max_length=200)] = ""


class FreezeCredential(FreezeBody):
    credential: KeyNumber


class FreezeModel(FreezeBody):
    """`model` is a public id or an alias; * stands for anything. Without `organization` it is for everybody."""

    model: Annotated[str, Field(min_length=1, max_length=240)]
    organization: Annotated[str, Field(max_length=50)] | None = None


class ThawCredential(Schema):
    model_config = ConfigDict(extra="forbid")

    credential: KeyNumber


class ThawModel(Schema):
    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=240)]
    organization: Annotated[str, Field(max_length=50)] | None = None


class FrozenOut(Schema):
    frozen_until: datetime | None


@router.post("/credentials/freeze", response=FrozenOut, summary="Leave an upstream account out for a time (operators)")
def freeze_credential(request: HttpRequest, body: FreezeCredential) -> dict[str, Any]:
    operator = _operator(request)
    credential = get_object_or_404(Credential, pk=body.credential)
    length = timedelta(minutes=body.minutes)
    return {"frozen_until": upstreams.freeze(credential, length=length, reason=body.reason, actor=operator)}


@router.post("/credentials/thaw", response=FrozenOut, summary="Let it serve again (operators)")
def thaw_credential(request: HttpRequest, body: ThawCredential) -> dict[str, Any]:
    operator = _operator(request)
    upstreams.thaw(get_object_or_404(Credential, pk=body.credential), actor=operator)
    return {"frozen_until": None}


@router.post("/models/freeze", response=FrozenOut, summary="Let nobody call a model for a time (operators)")
def freeze_model(request: HttpRequest, body: FreezeModel) -> dict[str, Any]:
    operator, organization = _operator(request), _named_organization(body.organization)
    until = timezone.now() + timedelta(minutes=body.minutes)
    with transaction.atomic():
        FrozenModel.objects.update_or_create(
            pattern=body.model, organization=organization, defaults={"until": until, "reason": body.reason.strip()}
        )
        record(operator, organization, "model.frozen", body.model, until=until.isoformat(), reason=body.reason.strip())
    return {"frozen_until": until}


@router.post("/models/thaw", response=FrozenOut, summary="Let it be called again (operators)")
def thaw_model(request: HttpRequest, body: ThawModel) -> dict[str, Any]:
    operator, organization = _operator(request), _named_organization(body.organization)
    with transaction.atomic():
        for frozen in FrozenModel.objects.filter(pattern=body.model, organization=organization):
            frozen.delete()
            record(operator, organization, "model.thawed", body.model)
    return {"frozen_until": None}


def _operator(request: HttpRequest) -> User:
    user = request.user
    if not (isinstance(user, User) and user.is_superuser):
        raise AuthorizationError(message="Shared accounts and models are frozen by operators alone.")
    return user


def _named_organization(slug: str | None) -> Organization | None:
    return get_object_or_404(Organization, slug=slug) if slug is not None else None


def _usage(place: Membership, by: str, since: datetime | None, until: datetime | None, **whose: Any) -> dict[str, Any]:
    start, end = _window(since, until)
    whose["until"] = end if until else None  # up to now is to the end: nothing has been used later
    groups = queries.totals_by(place.organization, by, since=start, **whose)
    return {
        "since": start,
        "until": end,
        "time_zone": queries.zone_of(place.organization).key,
        "by": by,
        "total": _sums(queries.totals(place.organization, since=start, **whose)),
        "data": [{"name": group.name, "provider": group.provider or None, **_sums(group.sums)} for group in groups],
        "truncated": len(groups) == queries.MOST_GROUPS,
    }


def _window(since: datetime | None, until: datetime | None) -> tuple[datetime, datetime]:
    """Whole quarters of an hour, as usage is summed. Raises ValidationError."""
    try:
        end = _in_utc(until) if until else timezone.now()
        start = _in_utc(since) if since else end - queries.MONTH
    except OverflowError:
        raise ValidationError({"since": "This moment is out of range."}) from None
    if start >= end:
        raise ValidationError({"since": "`since` must lie before `until`."})
    if end - start > LONGEST:
        raise ValidationError({"since": f"At most {LONGEST.days} days lie between `since` and `until`."})
    return queries.quarter(start), end


def _in_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)


def _cursor(text: str | None) -> Cursor | None:
    if text is None:
        return None
    try:
        return Cursor.parse(text)
    except ValueError as problem:
        raise ValidationError({"before": str(problem)}) from None


def _sums(sums: Sums) -> dict[str, int | None]:
    shown: dict[str, int | None] = {name: getattr(sums, name) for name in SUMS}
    if sums.is_unpriced:
        shown["cost"] = None
    return shown


def _refused(one: Refused) -> dict[str, Any]:
    return {"status": one.status, "code": one.code, "count": one.count, "last_hour": one.last_hour, "shadow": one.shadow}


def _shown(event: UsageEvent, labels: Mapping[int, str]) -> dict[str, Any]:
    return {
        "request_id": str(event.request_id),
        "at": event.at,
        "model": event.model,
        "served_model": event.served_model,
        "provider": event.provider,
        "status": event.status,
        "error": event.error,
        "stream": event.stream,
        "attempts": event.attempts,
        "tried": [
            {
                "account": labels.get(one["credential"], one["provider"]),
                "error": one["error"],
                "status": one.get("status", 0),
                "duration_ms": one.get("duration_ms", 0),
                "then": one["then"],
            }
            for one in event.tried or ()
        ],
        "input_tokens": event.input_tokens,
        "cached_tokens": event.cache_read,
        "cache_write_tokens": event.cache_write,
        "output_tokens": event.output_tokens,
        "reasoning_tokens": event.reasoning,
        "cost": event.cost,
        "usage_source": event.usage_source,
        "first_byte_ms": event.first_byte_ms,
        "duration_ms": event.duration_ms,
        "corrects": str(event.corrects) if event.corrects else None,
    }


def _place(request: HttpRequest, slug: str) -> Membership:
    assert isinstance(request.user, User), "the API lets nobody in who is not signed in"
    return accounts.standing(request.user, slug)
