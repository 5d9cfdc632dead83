"""Upstream accounts over HTTP, for signed-in people: the kinds there are, and the accounts, without their secrets.

Shared accounts are the operators'; an organization's own are its owners' and admins'. A secret goes in and never comes
out. A foreign id and a missing one get the same answer.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import HttpRequest
from django.shortcuts import get_object_or_404
from ninja import Field, Router, Schema
from ninja.errors import AuthorizationError
from ninja.responses import Status
from pydantic import ConfigDict

from accounts import queries as accounts
from accounts.models import Organization, User
from providers import actions, given, registry
from providers import queries as credentials
from providers.adapter import Adapter
from providers.models import Credential

router = Router(tags=["credentials"])

Settings = dict[str, str | int | float | bool | None]
Secret = Annotated[str, Field(max_length=1 << 20)]


class KindOut(Schema):
    """`policy` is allowed, restricted or ended, by the vendor's terms at `policy_source`; all but the first need `accept_policy`.

    `signs_in`: with some settings it has no plain secret but signs in (OAuth)."""

    name: str
    title: str
    policy: str
    policy_source: str
    policy_note: str
    free: bool
    needs_secret: bool
    signs_in: bool
    base_url: str
    settings: list[str]
    endpoints: list[str]


class KindsOut(Schema):
    kinds: list[KindOut]


class NewCredential(Schema):
    """`secret` is plain, or the JSON of the vendor's own tool. `prefix`: default the kind."""

    model_config = ConfigDict(extra="forbid")

    kind: Annotated[str, Field(max_length=40)]
    label: Annotated[str, Field(max_length=100)]
    secret: Secret = ""
    prefix: Annotated[str, Field(max_length=40)] | None = None
    base_url: Annotated[str, Field(max_length=500)] = ""
    settings: Settings = {}
    weight: int = 1
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] = 0
    accept_policy: bool = False


class CredentialChanges(Schema):
    """What is left out stays as it is. `settings` are merged by name; null takes one out."""

    model_config = ConfigDict(extra="forbid")

    label: Annotated[str, Field(max_length=100)] = ""
    secret: Secret = ""
    prefix: Annotated[str, Field(max_length=40)] = ""
    base_url: Annotated[str, Field(max_length=500)] = ""
    settings: Settings = {}
    weight: int = 1
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] = 0
    state: Literal["active", "disabled"] = "active"
    accept_policy: bool = False


class CredentialOut(Schema):
    """`models` is how many its upstream listed; settings that are secrets themselves are not shown.

    `state` expiring: it works, and will not for long unless somebody acts. `last_error` is in words. `signed_in`: its secret is the
    tokens of a sign-in; then `sign_in_error` is the code of the last renewal that failed (`invalid_grant`, `timeout`), `expires_at` the
    end of the token in use, and `next_refresh_at` when it is renewed by itself."""

    id: int
    kind: str
    label: str
    prefix: str
    base_url: str
    organization: str | None
    user: str | None
    settings: dict[str, str | bool]
    weight: int
    priority: int
    state: Literal["active", "expiring", "needs_reauth", "disabled"]
    has_secret: bool
    signed_in: bool
    sign_in_error: str
    expires_at: datetime | None
    refreshed_at: datetime | None
    next_refresh_at: datetime | None
    policy: str
    policy_accepted_at: datetime | None
    policy_accepted_by: str | None
    models: int
    models_refreshed_at: datetime | None
    last_error: str
    created_at: datetime


class ChangedCredential(CredentialOut):
    """`notes` tell what else had to change with it."""

    notes: list[str]


# The kinds


@router.get("/", response=KindsOut, summary="What this deployment can speak to")
def overview(request: HttpRequest) -> dict[str, Any]:
    return {"kinds": [_kind(registry.adapter(name)) for name in registry.names()]}


@router.get("/kinds", response=list[KindOut], summary="The kinds of upstream accounts, with what their vendors' terms say")
def list_kinds(request: HttpRequest) -> list[dict[str, Any]]:
    return [_kind(registry.adapter(name)) for name in registry.names()]


def _kind(adapter: Adapter) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "title": adapter.title or adapter.name,
        "policy": adapter.policy,
        "policy_source": adapter.policy_source,
        "policy_note": adapter.policy_note,
        "free": adapter.free,
        "needs_secret": adapter.needs_secret,
        "signs_in": _signs_in(adapter),
        "base_url": adapter.base_url,
        "settings": sorted(given.EVERY_KIND | adapter.settings),
        "endpoints": sorted(adapter.endpoints),
    }


def _signs_in(adapter: Adapter) -> bool:
    for settings in ({}, {"auth": "oauth"}):
        try:
            if adapter.sign_in(settings) is not None:
                return True
        except ValueError:  # it would, once some settings are given
            return True
    return False


# Shared accounts


@router.get("/credentials", response=list[CredentialOut], summary="The shared accounts")
def list_shared(request: HttpRequest) -> list[dict[str, Any]]:
    _operator(request)
    return [_shown(credential) for credential in _of(None)]


@router.post("/credentials", response={201: CredentialOut}, summary="Add a shared account")
def add_shared(request: HttpRequest, body: NewCredential) -> Status[dict[str, Any]]:
    return Status(201, _added(body, None, _operator(request)))


@router.get("/credentials/{int:credential_id}", response=CredentialOut, summary="One shared account")
def get_shared(request: HttpRequest, credential_id: int) -> dict[str, Any]:
    _operator(request)
    return _shown(_one(None, credential_id))


@router.patch("/credentials/{int:credential_id}", response=ChangedCredential, summary="Change a shared account")
def change_shared(request: HttpRequest, credential_id: int, body: CredentialChanges) -> dict[str, Any]:
    return _changed(_one(None, credential_id), body, _operator(request))


# An organization's own


@router.get("/organizations/{slug:slug}/credentials", response=list[CredentialOut], summary="An organization's own accounts")
def list_own(request: HttpRequest, slug: str) -> list[dict[str, Any]]:
    organization, _ = _managing(request, slug)
    return [_shown(credential) for credential in _of(organization)]


@router.post("/organizations/{slug:slug}/credentials", response={201: CredentialOut}, summary="Add an account for an organization alone")
def add_own(request: HttpRequest, slug: str, body: NewCredential) -> Status[dict[str, Any]]:
    organization, user = _managing(request, slug)
    _check_prefix(body.kind if body.prefix is None else body.prefix, organization, user)
    return Status(201, _added(body, organization, user))


@router.get("/organizations/{slug:slug}/credentials/{int:credential_id}", response=CredentialOut, summary="One account of an organization")
def get_own(request: HttpRequest, slug: str, credential_id: int) -> dict[str, Any]:
    organization, _ = _managing(request, slug)
    return _shown(_one(organization, credential_id))


@router.patch(
    "/organizations/{slug:slug}/credentials/{int:credential_id}", response=ChangedCredential, summary="Change an account of an organization"
)
def change_own(request: HttpRequest, slug: str, credential_id: int, body: CredentialChanges) -> dict[str, Any]:
    organization, user = _managing(request, slug)
    credential = _one(organization, credential_id)
    if "prefix" in body.model_fields_set and body.prefix != credential.prefix:
        _check_prefix(body.prefix, organization, user)
    return _changed(credential, body, user)


def _caller(request: HttpRequest) -> User:
    assert isinstance(request.user, User), "the API lets nobody in who is not signed in"
    return request.user


def _operator(request: HttpRequest) -> User:
    user = _caller(request)
    if not user.is_superuser:
        raise AuthorizationError(message="Shared accounts are the operators' alone.")
    return user


def _managing(request: HttpRequest, slug: str) -> tuple[Organization, User]:
    place = accounts.standing(_caller(request), slug)
    if not place.manages:
        raise AuthorizationError(message="Only an owner or admin handles the organization's accounts.")
    return place.organization, place.user


def _check_prefix(prefix: str, organization: Organization, user: User) -> None:
    """Prices belong to prefixes: who is no operator must not price, or join, the pool of somebody else."""
    if user.is_superuser:
        return
    if Credential.objects.filter(prefix=prefix).exclude(organization=organization).exists():
        raise ValidationError({"prefix": f"The prefix '{prefix}' is taken: choose one such as {organization.slug[:20]}-{prefix[:19]}."})


def _of(organization: Organization | None) -> QuerySet[Credential]:
    return credentials.accounts().filter(organization=organization).order_by("prefix", "pk")


def _one(organization: Organization | None, credential_id: int) -> Credential:
    return get_object_or_404(_of(organization), pk=credential_id)


def _added(body: NewCredential, organization: Organization | None, user: User) -> dict[str, Any]:
    made = actions.add_credential(organization=organization, actor=user, **body.dict())
    return _shown(_one(organization, made.pk))


def _changed(credential: Credential, body: CredentialChanges, user: User) -> dict[str, Any]:
    changes = body.dict(exclude_unset=True)
    if "settings" in changes:
        changes["settings"] = {**credential.settings, **given.unmasked(changes["settings"], credential.settings)}
        if not user.is_superuser:
            _check_way(credential, changes["settings"], is_new=bool(body.secret.strip()))
    notes = actions.change_credential(credential, actor=user, **changes)
    return {**_shown(_one(credential.organization, credential.pk)), "notes": notes}


def _check_way(credential: Credential, settings: dict[str, Any], *, is_new: bool) -> None:
    """A secret that an operator gave must not leave by another way than the one it was given for, or it could be read there.

    `is_new`: the account gets another one now. A setting that is a secret itself (`client_secret`) is one, too."""
    names = {name for name in {*settings, *credential.settings} if name == "ca_pem" or name.endswith("_url")}
    changed = " or ".join(name for name in sorted(names) if settings.get(name) != credential.settings.get(name))
    if changed and not is_new and (credential.secret or credentials.token_of(credential)):
        raise ValidationError({"settings": f"Give the secret again along with another {changed}."})
    for name, value in credential.settings.items():
        if changed and given.is_secret(name) and settings.get(name) == value:
            raise ValidationError({"settings": f"Give '{name}' again along with another {changed}."})


def _shown(credential: Credential) -> dict[str, Any]:
    adapter = registry.adapter(credential.kind) if credential.kind in registry.names() else None
    accepted_by, standing = credential.policy_accepted_by, credentials.standing_of(credential)
    return {
        "id": credential.pk,
        "kind": credential.kind,
        "label": credential.label,
        "prefix": credential.prefix,
        "base_url": credential.effective_base_url if adapter is not None else credential.base_url,
        "organization": credential.organization.slug if credential.organization else None,
        "user": credential.user.email if credential.user else None,
        "settings": given.masked(credential.settings),
        "weight": credential.weight,
        "priority": credential.priority,
        "state": standing.state,
        "has_secret": bool(credential.secret) or standing.signed_in,
        "signed_in": standing.signed_in,
        "sign_in_error": standing.error,
        "expires_at": standing.expires_at,
        "refreshed_at": standing.refreshed_at,
        "next_refresh_at": standing.next_refresh_at,
        "policy": adapter.policy_for(credential.settings) if adapter is not None else "unknown",
        "policy_accepted_at": credential.policy_accepted_at,
        "policy_accepted_by": accepted_by.email if accepted_by is not None else None,
        "models": getattr(credential, "models_listed", 0),
        "models_refreshed_at": credential.models_refreshed_at,
        "last_error": standing.problem,
        "created_at": credential.created_at,
    }
