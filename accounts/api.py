"""The keys of an organization over HTTP, for signed-in people.

Owners and admins handle all keys, members their own, viewers look. Which of these a caller is, is read from the
membership at each call. A foreign id and a missing one get the same answer.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from django.core.exceptions import ValidationError
from django.db import transaction
from django.http import HttpRequest
from ninja import Field, Query, Router, Schema
from ninja.errors import AuthorizationError
from ninja.responses import Status
from pydantic import ConfigDict

from accounts import actions, policy, queries
from accounts.models import ApiKey, Membership, Organization, Role, Team, User
from accounts.policy import Allowance

router = Router(tags=["keys"])

MOST_LISTED = 200

Slug = Annotated[str, Field(max_length=50)]
Words = Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=policy.MOST_ENTRIES)]


class LimitBody(Schema):
    """`amount` is requests or tokens per minute, open requests, or micro-dollars per window (1 USD = 1000000)."""

    model_config = ConfigDict(extra="forbid")

    metric: Literal["rpm", "tpm", "concurrency", "money"]
    amount: Annotated[int, Field(ge=0)]
    window: Literal["", "day", "week", "month", "total"] = ""
    mode: Literal["enforce", "shadow"] = "enforce"

    def allowance(self) -> Allowance:
        return Allowance(self.metric, self.amount, self.window, self.mode)


class NewKey(Schema):
    """An empty list allows everything. `email` names another member; only owners and admins may."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=150)]
    email: Annotated[str, Field(max_length=254)] | None = None
    team: Annotated[str, Field(max_length=150)] | None = None
    models: Words = []
    networks: Words = []
    tags: Words = []
    expires_at: datetime | None = None
    limits: list[LimitBody] = []


class KeyChanges(Schema):
    """What is left out stays as it is. `limits` replaces all of the key's own limits."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=150)] = ""
    models: Words = []
    networks: Words = []
    tags: Words = []
    expires_at: datetime | None = None
    limits: list[LimitBody] = []


class Rotation(Schema):
    """For how long the old key goes on working: at most 30 days, and 0 stops it at once."""

    model_config = ConfigDict(extra="forbid")

    overlap_hours: Annotated[float, Field(ge=0, le=actions.LONGEST_OVERLAP / timedelta(hours=1), allow_inf_nan=False)] = 24


class Freeze(Schema):
    model_config = ConfigDict(extra="forbid")

    minutes: Annotated[float, Field(gt=0, le=366 * 24 * 60, allow_inf_nan=False)]
    reason: Annotated[str, Field(max_length=200)] = ""


class FreezeOrganization(Freeze):
    """With `team`, the name of one of its teams, that team alone."""

    team: Annotated[str, Field(max_length=150)] | None = None


class ThawOrganization(Schema):
    model_config = ConfigDict(extra="forbid")

    team: Annotated[str, Field(max_length=150)] | None = None


class Frozen(Schema):
    frozen_until: datetime | None
    frozen_reason: str


class KeyOut(Schema):
    id: int
    name: str
    hint: str
    imported: bool
    state: str
    user: str
    team: str | None
    models: list[str]
    networks: list[str]
    tags: list[str]
    limits: list[LimitBody]
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    replaced_by: int | None
    frozen_until: datetime | None
    frozen_reason: str


class IssuedKey(KeyOut):
    """`key` is its clear text, and this answer is the only place where it is ever shown."""

    key: str


class Page(Schema):
    """`next` is the `before` of the following page; null on the last one."""

    data: list[KeyOut]
    next: int | None


class OrganizationOut(Schema):
    slug: str
    name: str
    role: str


@router.get("/organizations", response=list[OrganizationOut], summary="The organizations that you belong to")
def list_organizations(request: HttpRequest) -> list[dict[str, str]]:
    user = _caller(request)
    roles = {} if user.is_superuser else dict(user.memberships.values_list("organization", "role"))
    return [
        {"slug": organization.slug, "name": organization.name, "role": roles.get(organization.pk, Role.OWNER)}
        for organization in queries.organizations_of(user)
    ]


@router.get("/organizations/{slug:slug}/keys", response=Page, summary="Keys, the newest first")
def list_keys(
    request: HttpRequest,
    slug: str,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 50,
    before: Annotated[int | None, Query(ge=1, lt=1 << 63)] = None,
) -> dict[str, Any]:
    keys = queries.keys_visible_to(_place(request, slug))
    if before is not None:
        keys = keys.filter(pk__lt=before)
    found = list(keys[: limit + 1])
    return {"data": [_shown(key) for key in found[:limit]], "next": found[limit - 1].pk if len(found) > limit else None}


@router.post("/organizations/{slug:slug}/keys", response={201: IssuedKey}, summary="Issue a key")
def create_key(request: HttpRequest, slug: str, body: NewKey) -> Status[dict[str, Any]]:
    place = _changing(request, slug)
    holder = _holder(place, body.email)
    key, clear = actions.issue_key(
        organization=place.organization,
        user=holder,
        team=_team(place, body.team),
        actor=place.user,
        **_asked(body, leave_out={"email", "team"}),
    )
    return Status(201, {**_shown(key), "key": clear})


@router.get("/organizations/{slug:slug}/keys/{int:key_id}", response=KeyOut, summary="One key")
def get_key(request: HttpRequest, slug: str, key_id: int) -> dict[str, Any]:
    return _shown(queries.key_of(_place(request, slug), key_id))


@router.patch("/organizations/{slug:slug}/keys/{int:key_id}", response=KeyOut, summary="Change a key")
def change_key(request: HttpRequest, slug: str, key_id: int, body: KeyChanges) -> dict[str, Any]:
    place = _changing(request, slug)
    with transaction.atomic():
        key = queries.key_of(place, key_id)
        changes = _asked(body, only_given=True)
        if not place.manages:
            before = [Allowance.of(limit) for limit in key.limits.all()]
            if wider := policy.widened(key, before, policy.clean(**changes)):
                raise AuthorizationError(message=f"Only an owner or admin may widen what a key allows: {', '.join(wider)}.")
        actions.change_key(key, actor=place.user, **changes)
    return _shown(queries.key_of(place, key_id))


@router.post("/organizations/{slug:slug}/keys/{int:key_id}/revoke", response=KeyOut, summary="Revoke a key, for ever")
def revoke_key(request: HttpRequest, slug: str, key_id: int) -> dict[str, Any]:
    place = _changing(request, slug)
    key = queries.key_of(place, key_id)
    actions.revoke_key(key, actor=place.user)
    return _shown(queries.key_of(place, key_id))


@router.post("/organizations/{slug:slug}/keys/{int:key_id}/rotate", response={201: IssuedKey}, summary="Replace a key by a sibling")
def rotate_key(request: HttpRequest, slug: str, key_id: int, body: Rotation) -> Status[dict[str, Any]]:
    place = _changing(request, slug)
    key = queries.key_of(place, key_id)
    sibling, clear = actions.rotate_key(key, overlap=timedelta(hours=body.overlap_hours), actor=place.user)
    return Status(201, {**_shown(sibling), "key": clear})


@router.post("/organizations/{slug:slug}/keys/{int:key_id}/freeze", response=KeyOut, summary="Let a key rest for a time")
def freeze_key(request: HttpRequest, slug: str, key_id: int, body: Freeze) -> dict[str, Any]:
    place = _changing(request, slug)
    key = queries.key_of(place, key_id)
    actions.freeze_key(place, key, length=timedelta(minutes=body.minutes), reason=body.reason)
    return _shown(queries.key_of(place, key_id))


@router.post("/organizations/{slug:slug}/keys/{int:key_id}/thaw", response=KeyOut, summary="End a key's rest")
def thaw_key(request: HttpRequest, slug: str, key_id: int) -> dict[str, Any]:
    place = _changing(request, slug)
    actions.thaw_key(place, queries.key_of(place, key_id))
    return _shown(queries.key_of(place, key_id))


@router.post("/organizations/{slug:slug}/freeze", response=Frozen, summary="Let an organization, or one team of it, rest for a time")
def freeze_organization(request: HttpRequest, slug: str, body: FreezeOrganization) -> Organization | Team:
    place = _place(request, slug)
    actor = _manager(place)
    thing = _team(place, body.team) or place.organization
    actions.freeze(thing, length=timedelta(minutes=body.minutes), reason=body.reason, actor=actor)
    return thing


@router.post("/organizations/{slug:slug}/thaw", response=Frozen, summary="End its rest")
def thaw_organization(request: HttpRequest, slug: str, body: ThawOrganization) -> Organization | Team:
    place = _place(request, slug)
    actor = _manager(place)
    thing = _team(place, body.team) or place.organization
    actions.thaw(thing, actor=actor)
    return thing


def _manager(place: Membership) -> User:
    """Whoever may freeze more than a key: one who was frozen must not be able to end it."""
    if not place.manages:
        raise AuthorizationError(message="Only an owner or admin may freeze and thaw an organization or a team.")
    return place.user


def _caller(request: HttpRequest) -> User:
    assert isinstance(request.user, User), "the API lets nobody in who is not signed in"
    return request.user


def _place(request: HttpRequest, slug: str) -> Membership:
    return queries.standing(_caller(request), slug)


def _changing(request: HttpRequest, slug: str) -> Membership:
    place = _place(request, slug)
    if place.role == Role.VIEWER:
        raise AuthorizationError(message="A viewer may look at keys, and change none.")
    return place


def _holder(place: Membership, email: str | None) -> User:
    if email is None or email.strip().lower() == place.user.email:
        return place.user
    if not place.manages:
        raise AuthorizationError(message="Only an owner or admin may issue a key for somebody else.")
    holder = queries.member_of(place.organization, email)
    if holder is None:
        raise ValidationError({"email": "Nobody with this e-mail is a member of the organization."})
    return holder


def _team(place: Membership, name: str | None) -> Team | None:
    if name is None:
        return None
    team = Team.objects.filter(organization=place.organization, name=name).first()
    if team is None:
        raise ValidationError({"team": "The organization has no team of this name."})
    return team


def _asked(body: Schema, *, leave_out: set[str] | None = None, only_given: bool = False) -> dict[str, Any]:
    asked = body.dict(exclude=leave_out, exclude_unset=only_given)
    if "limits" in asked:
        asked["limits"] = [LimitBody(**one).allowance() for one in asked["limits"]]
    return asked


def _shown(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.pk,
        "name": key.name,
        "hint": key.hint,
        "imported": key.is_imported,
        "state": key.state,
        "user": key.user.email,
        "team": key.team.name if key.team else None,
        "models": key.allowed_models,
        "networks": key.allowed_networks,
        "tags": key.tags,
        "limits": [
            {"metric": limit.metric, "amount": limit.amount, "window": limit.window, "mode": limit.mode} for limit in key.limits.all()
        ],
        "created_at": key.created_at,
        "last_used_at": key.last_used_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "replaced_by": key.replaced_by_id,
        "frozen_until": key.frozen_until if key.is_frozen else None,
        "frozen_reason": key.frozen_reason if key.is_frozen else "",
    }
