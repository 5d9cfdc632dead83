"""Aliases over HTTP, and why a call would be served or refused.

Shared aliases are the operators'; an organization's own are changed by its owners and admins, and seen by all of it. A
foreign id and a missing one get the same answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Query, Router, Schema
from ninja.errors import AuthorizationError
from ninja.responses import Status
from pydantic import ConfigDict

from accounts import queries as accounts
from accounts.models import ApiKey, Membership, Organization, User
from providers.adapter import Target
from proxy import queries, routes
from proxy.catalog import LONGEST_DRAIN_SECONDS
from proxy.explain import HEADS, Namer, Question, explain_key, in_full
from proxy.models import Route
from proxy.routes import Leads

router = Router(tags=["aliases"])

Values = dict[str, Any]
Names = Annotated[list[Annotated[str, Field(max_length=100)]], Field(max_length=routes.MOST_PARAMETERS)]


class TargetBody(Schema):
    """Lower positions go first; those of one position take turns by weight. Without a position it stands where it is listed."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=240)]
    position: Annotated[int, Field(ge=0, le=routes.MOST_POSITION)] | None = None
    weight: Annotated[int, Field(ge=1, le=routes.MOST_WEIGHT)] = 1


Targets = Annotated[list[TargetBody], Field(max_length=routes.MOST_TARGETS)]


class NewRoute(Schema):
    """`on_abort`: what becomes of a call whose client left; `drain` reads on for `drain_seconds`, to know what it cost."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=200)]
    targets: Targets
    defaults: Values = {}
    overrides: Values = {}
    drops: Names = []
    on_abort: Literal["cancel", "drain"] = "cancel"
    drain_seconds: Annotated[int, Field(ge=0, le=LONGEST_DRAIN_SECONDS)] = 0


class RouteChanges(Schema):
    """What is left out stays as it is. `targets`, `defaults`, `overrides` and `drops` replace what is there."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=200)] = ""
    targets: Targets = []
    defaults: Values = {}
    overrides: Values = {}
    drops: Names = []
    on_abort: Literal["cancel", "drain"] = "cancel"
    drain_seconds: Annotated[int, Field(ge=0, le=LONGEST_DRAIN_SECONDS)] = 0


class TargetOut(Schema):
    model: str
    position: int
    weight: int


class RouteOut(Schema):
    id: int
    name: str
    organization: str | None
    targets: list[TargetOut]
    defaults: Values
    overrides: Values
    drops: list[str]
    on_abort: str
    drain_seconds: int


class RuleOut(Schema):
    """`passes` is null where it could not be looked at: `why` says so."""

    name: str
    passes: bool | None
    why: str


class ServesOut(Schema):
    """`credential` and `label` are null where they are none of the reader's business."""

    credential: int | None
    label: str | None
    kind: str
    model: str


class ExplanationOut(Schema):
    """`status` and `code`: what the client would get before any upstream answers. `live`: a running server was asked, with what is
    in its memory; else the database alone, which knows of no rests, requests of the last minute or open requests."""

    key: int
    model: str
    status: int
    code: str
    live: bool
    rules: list[RuleOut]
    serves: ServesOut | None
    targets: list[ServesOut]


# Shared aliases


@router.get("/routes", response=list[RouteOut], summary="The shared aliases")
def list_shared(request: HttpRequest) -> list[dict[str, Any]]:
    _operator(request)
    return [_shown(route) for route in _of(None)]


@router.post("/routes", response={201: RouteOut}, summary="Make a shared alias")
def create_shared(request: HttpRequest, body: NewRoute) -> Status[dict[str, Any]]:
    return Status(201, _created(body, None, _operator(request)))


@router.patch("/routes/{int:route_id}", response=RouteOut, summary="Change a shared alias")
def change_shared(request: HttpRequest, route_id: int, body: RouteChanges) -> dict[str, Any]:
    user = _operator(request)
    return _changed(_one(None, route_id), body, user)


@router.delete("/routes/{int:route_id}", response={204: None}, summary="Delete a shared alias")
def delete_shared(request: HttpRequest, route_id: int) -> Status[None]:
    user = _operator(request)
    routes.delete_route(_one(None, route_id), actor=user)
    return Status(204, None)


# An organization's own


@router.get("/organizations/{slug:slug}/routes", response=list[RouteOut], summary="An organization's own aliases")
def list_own(request: HttpRequest, slug: str) -> list[dict[str, Any]]:
    return [_shown(route) for route in _of(_place(request, slug).organization)]


@router.post("/organizations/{slug:slug}/routes", response={201: RouteOut}, summary="Make an alias for an organization alone")
def create_own(request: HttpRequest, slug: str, body: NewRoute) -> Status[dict[str, Any]]:
    place = _managing(request, slug)
    return Status(201, _created(body, place.organization, place.user))


@router.patch("/organizations/{slug:slug}/routes/{int:route_id}", response=RouteOut, summary="Change an alias of an organization")
def change_own(request: HttpRequest, slug: str, route_id: int, body: RouteChanges) -> dict[str, Any]:
    place = _managing(request, slug)
    return _changed(_one(place.organization, route_id), body, place.user)


@router.delete("/organizations/{slug:slug}/routes/{int:route_id}", response={204: None}, summary="Delete an alias of an organization")
def delete_own(request: HttpRequest, slug: str, route_id: int) -> Status[None]:
    place = _managing(request, slug)
    routes.delete_route(_one(place.organization, route_id), actor=place.user)
    return Status(204, None)


# Why


@router.get("/explain", response=ExplanationOut, summary="Why a call would be served or refused, and by whom")
def explain(
    request: HttpRequest,
    key: Annotated[int, Query(ge=1, lt=1 << 63, description="The key's number.")],
    model: Annotated[str, Query(min_length=1, max_length=512)],
    endpoint: Annotated[str, Query(description="Such as chat/completions.")] = "chat/completions",
    address: Annotated[str | None, Query(max_length=100, description="The client's; left out, it is not looked at.")] = None,
    upstream_key: Annotated[bool, Query(description="The client sends an upstream key of its own.")] = False,
) -> dict[str, Any]:
    if endpoint not in HEADS:
        raise ValidationError({"endpoint": f"It is one of {', '.join(HEADS)}."})
    user = _caller(request)
    row = get_object_or_404(ApiKey.objects.select_related("organization", "user"), pk=key)
    place = accounts.standing(user, row.organization.slug)
    row = accounts.key_of(place, key)
    shown = _seen_by(place)
    name: Namer = lambda number, label, kind: in_full(number, label, kind) if shown(number) else f"an account of kind {kind}"  # noqa: E731
    said = explain_key(row, Question(model, endpoint, address, upstream_key), name)
    return {
        "key": row.pk,
        "model": model,
        "status": said.status,
        "code": said.code,
        "live": said.live,
        "rules": [{"name": rule.name, "passes": rule.passes, "why": rule.why} for rule in said.rules],
        "serves": _serves(said.serves, shown) if said.serves is not None else None,
        "targets": [_serves(target, shown) for target in said.targets],
    }


def _seen_by(place: Membership) -> Any:
    """Whether a credential is this reader's business."""
    return set(queries.accounts_shown_to(place).values_list("pk", flat=True)).__contains__


def _serves(target: Target, shown: Any) -> dict[str, Any]:
    known = shown(target.credential_id)
    return {
        "credential": target.credential_id if known else None,
        "label": target.label if known else None,
        "kind": target.kind,
        "model": target.public_model,
    }


def _caller(request: HttpRequest) -> User:
    assert isinstance(request.user, User), "the API lets nobody in who is not signed in"
    return request.user


def _operator(request: HttpRequest) -> User:
    user = _caller(request)
    if not user.is_superuser:
        raise AuthorizationError(message="Shared aliases are the operators' alone.")
    return user


def _place(request: HttpRequest, slug: str) -> Membership:
    return accounts.standing(_caller(request), slug)


def _managing(request: HttpRequest, slug: str) -> Membership:
    place = _place(request, slug)
    if not place.manages:
        raise AuthorizationError(message="Only an owner or admin changes the organization's aliases.")
    return place


def _of(organization: Organization | None) -> QuerySet[Route]:
    return Route.objects.filter(organization=organization).select_related("organization").prefetch_related("targets").order_by("name", "pk")


def _one(organization: Organization | None, route_id: int) -> Route:
    return get_object_or_404(_of(organization), pk=route_id)


def _leads(targets: list[TargetBody]) -> list[Leads]:
    return [Leads(one.model, place if one.position is None else one.position, one.weight) for place, one in enumerate(targets)]


def _created(body: NewRoute, organization: Organization | None, user: User) -> dict[str, Any]:
    made = routes.create_route(organization=organization, actor=user, targets=_leads(body.targets), **body.dict(exclude={"targets"}))
    return _shown(_one(organization, made.pk))


def _changed(route: Route, body: RouteChanges, user: User) -> dict[str, Any]:
    changes = body.dict(exclude_unset=True)
    if "targets" in changes:
        changes["targets"] = _leads(body.targets)
    routes.change_route(route, actor=user, **changes)
    return _shown(_one(route.organization, route.pk))


def _shown(route: Route) -> dict[str, Any]:
    return {
        "id": route.pk,
        "name": route.name,
        "organization": route.organization.slug if route.organization else None,
        "targets": [{"model": target.model, "position": target.position, "weight": target.weight} for target in route.targets.all()],
        "defaults": route.defaults,
        "overrides": route.overrides,
        "drops": route.drops,
        "on_abort": route.on_abort,
        "drain_seconds": route.drain_seconds,
    }
