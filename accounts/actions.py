"""Writes: people, organizations, memberships, issued keys and limits.

Each writes its AuditEntry in the same transaction; `actor` None means a command. Wrong input raises ValidationError
with the field it is about; a thing that is no longer in the state it would have to be in raises Conflict.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.contrib.auth.hashers import make_password
from django.core.exceptions import PermissionDenied, ValidationError
from django.core.validators import validate_email, validate_slug
from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from accounts import policy
from accounts.models import ApiKey, AuditEntry, Limit, Membership, Organization, Role, Team, User, changed
from accounts.policy import Allowance
from accounts.principal import LONGEST_KEY, STRONG_LENGTH, digest, mint

DEFAULT_ORGANIZATION = "default"
DEFAULT_EMAIL = "admin@example.com"  # of the operator, where nobody named one
OVERLAP = timedelta(hours=24)
LONGEST_OVERLAP = timedelta(days=30)
LENT = "sluice-check"  # the tag of a key that the deployment lends itself

# What the outside calls a field, where the column has another name.
_COLUMNS = {"models": "allowed_models", "networks": "allowed_networks"}


class Conflict(Exception):
    """The thing is no longer in the state that this needs: somebody else was faster."""


def record(actor: User | None, organization: Organization | None, action: str, subject: str, /, **detail: Any) -> None:
    """Say who did what, in the caller's transaction. `detail` is JSON and never holds a secret."""
    AuditEntry.objects.create(actor=actor, organization=organization, action=action, subject=subject[:200], detail=detail)


# People and their places


def clean_email(email: str) -> str:
    """In lower case. Raises ValidationError."""
    email = email.strip().lower()
    try:
        validate_email(email)
    except ValidationError:
        raise ValidationError({"email": f"'{email}' is not an e-mail address."}) from None
    if len(email) > 254:
        raise ValidationError({"email": "This e-mail address is too long."})
    return email


@transaction.atomic
def create_user(email: str, *, password: str | None = None, name: str = "", actor: User | None = None) -> User:
    """A new person; without a password they cannot sign in yet. Raises ValidationError."""
    email = clean_email(email)
    if User.objects.filter(email=email).exists():
        raise ValidationError({"email": f"There is already a user {email}."})
    user = User.objects.create_user(email, password, name=name)
    record(actor, None, "user.created", str(user))
    return user


@transaction.atomic
def ensure_user(email: str, *, actor: User | None = None) -> User:
    """The person with this e-mail, made without a usable password when absent. Raises ValidationError."""
    user, made = User.objects.get_or_create(email=clean_email(email), defaults={"password": make_password(None)})
    if made:
        record(actor, None, "user.created", str(user))
    return user


@transaction.atomic
def ensure_organization(slug: str = DEFAULT_ORGANIZATION, *, actor: User | None = None) -> Organization:
    """The organization with this slug, made when absent. Raises ValidationError."""
    try:
        validate_slug(slug)
    except ValidationError:
        raise ValidationError({"organization": f"'{slug}' is not a short name of letters, digits, dashes and underscores."}) from None
    if len(slug) > 50:
        raise ValidationError({"organization": "An organization's short name has at most 50 characters."})
    organization, made = Organization.objects.get_or_create(slug=slug, defaults={"name": slug.replace("-", " ").capitalize()})
    if made:
        record(actor, organization, "organization.created", str(organization), slug=slug)
    return organization


@transaction.atomic
def ensure_membership(user: User, organization: Organization, *, role: str = Role.MEMBER, actor: User | None = None) -> Membership:
    """The user's place in the organization; `role` counts only when it is made now."""
    membership, made = Membership.objects.get_or_create(user=user, organization=organization, defaults={"role": _role(role)})
    if made:
        record(actor, organization, "member.added", str(user), role=membership.role)
    return membership


@transaction.atomic
def change_role(membership: Membership, role: str, *, actor: User | None = None) -> None:
    """Raises ValidationError for an unknown role, and when the organization would be left without an owner."""
    _role(role)
    # Two owners who demote each other at once wait for one another here.
    organization = Organization.objects.select_for_update().get(pk=membership.organization_id)
    check_an_owner_stays(membership, role)
    before = Membership.objects.values_list("role", flat=True).get(pk=membership.pk)
    if before == role:
        return
    Membership.objects.filter(pk=membership.pk).update(role=role)
    membership.role = role
    changed.send(Membership)
    record(actor, organization, "member.role_changed", str(membership.user), before=before, after=role)


def check_an_owner_stays(membership: Membership, role: str | None) -> None:
    """Raises ValidationError when the membership is its organization's last owner's and would become `role` (None: removed)."""
    if role == Role.OWNER or not Membership.objects.filter(pk=membership.pk, role=Role.OWNER).exists():
        return
    others = Membership.objects.filter(organization=membership.organization_id, role=Role.OWNER, user__is_active=True).exclude(
        pk=membership.pk
    )
    if not others.exists():
        raise ValidationError({"role": f"{membership.user} is the last owner of {membership.organization}: make another one first."})


def _role(role: str) -> str:
    if role not in Role.values:
        raise ValidationError({"role": f"There is no role '{role}': it is one of {', '.join(Role.values)}."})
    return role


# Keys


@transaction.atomic
def issue_key(
    *,
    organization: Organization,
    user: User,
    name: str,
    models: Iterable[str] = (),
    networks: Iterable[str] = (),
    tags: Iterable[str] = (),
    expires_at: datetime | None = None,
    team: Team | None = None,
    limits: Iterable[Allowance] = (),
    actor: User | None = None,
) -> tuple[ApiKey, str]:
    """Make a key for a member. Returns it with its clear text: the one moment when that exists. Raises ValidationError."""
    cleaned = policy.clean(name=name, models=models, networks=networks, tags=tags, expires_at=expires_at, limits=limits)
    check_holder(organization, user, team)
    key, clear = _create_key(
        organization=organization,
        user=user,
        team=team,
        name=cleaned["name"],
        allowed_models=cleaned["models"],
        allowed_networks=cleaned["networks"],
        tags=cleaned["tags"],
        expires_at=cleaned["expires_at"],
    )
    _add_limits(key, cleaned["limits"])
    asked = {field: value for field, value in _as_json(cleaned).items() if value}
    record(actor, organization, "key.issued", subject_of(key), user=user.email, **asked)
    return key, clear


@transaction.atomic
def import_key(*, organization: Organization, user: User, name: str, clear: str, actor: User | None = None) -> tuple[ApiKey, bool]:
    """Let a key that was issued elsewhere go on working as it is, and whether that is new: a key that is known already,
    in whatever state and whoever's, stays as it is. Raises ValidationError."""
    if not (0 < len(clear) <= LONGEST_KEY and clear.isascii() and clear.isprintable() and clear == clear.strip()):
        raise ValidationError({"key": f"A key is one line of 1 to {LONGEST_KEY} plain characters: no header can carry this one."})
    peppers = settings.KEYRING.keys("pepper")
    known = ApiKey.objects.filter(digest__in=[digest(pepper, clear) for pepper in peppers.values()]).first()
    if known is not None:
        return known, False
    check_holder(organization, user)
    pepper_id, pepper = next(iter(peppers.items()))
    key = ApiKey.objects.create(
        organization=organization,
        user=user,
        name=policy.clean_name(name),
        digest=digest(pepper, clear),
        pepper_id=pepper_id,
        last_four=clear[-4:] if len(clear) >= STRONG_LENGTH else "",  # of a short one that would be a good part
    )
    record(actor, organization, "key.imported", subject_of(key), user=user.email, weak=len(clear) < STRONG_LENGTH)
    return key, True


@transaction.atomic
def change_key(key: ApiKey, *, actor: User | None = None, **changes: Any) -> None:
    """Change what is given of name, models, networks, tags, expires_at, limits (all of the key's own limits) and team.

    Raises ValidationError, and Conflict for a revoked key."""
    team_given, team = "team" in changes, changes.pop("team", None)
    cleaned = policy.clean(**changes)
    columns = {_COLUMNS.get(field, field): value for field, value in cleaned.items() if field != "limits"}
    if team_given:
        check_holder(key.organization, key.user, team)
        columns["team"] = team
    # Only these columns are written: a whole save would put back whatever another worker wrote in the meantime.
    live = ApiKey.objects.filter(pk=key.pk, revoked_at=None)
    if not (live.update(**columns) if columns else live.select_for_update().exists()):
        raise Conflict("This key has been revoked.")
    if "limits" in cleaned:
        kept = {(one.metric, one.window) for one in cleaned["limits"]}
        for limit in key.limits.all():
            if (limit.metric, limit.window) not in kept:
                limit.delete()
        for one in cleaned["limits"]:
            _put_limit(one, organization=key.organization, team=None, user=None, key=key)
    changed.send(ApiKey)
    key.refresh_from_db()
    detail = {**_as_json(cleaned), **({"team": str(team or "")} if team_given else {})}
    record(actor, key.organization, "key.changed", subject_of(key), **detail)


@transaction.atomic
def revoke_key(key: ApiKey, *, actor: User | None = None) -> bool:
    """The key stops within seconds, for ever. False when it had been revoked before."""
    now = timezone.now()
    if not ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=now):
        return False
    changed.send(ApiKey)
    key.revoked_at = now
    record(actor, key.organization, "key.revoked", subject_of(key))
    return True


@transaction.atomic
def rotate_key(key: ApiKey, *, overlap: timedelta = OVERLAP, actor: User | None = None) -> tuple[ApiKey, str]:
    """Make a sibling with the same policy and limits of its own; the old key works on for `overlap`, but never longer than before.

    Returns the sibling and its clear text. Raises ValidationError, and Conflict when the key no longer works or has been rotated."""
    if not timedelta(0) <= overlap <= LONGEST_OVERLAP:
        raise ValidationError({"overlap": f"The overlap lies between 0 and {LONGEST_OVERLAP.days} days."})
    now = timezone.now()
    old = ApiKey.objects.select_for_update().get(pk=key.pk)
    check_holder(old.organization, old.user, old.team)
    sibling, clear = _create_key(
        organization=old.organization,
        user=old.user,
        team=old.team,
        name=old.name,
        allowed_models=old.allowed_models,
        allowed_networks=old.allowed_networks,
        tags=old.tags,
        expires_at=old.expires_at,
        frozen_until=old.frozen_until,
        frozen_reason=old.frozen_reason,
        frozen_by=old.frozen_by,
    )
    ends = min(now + overlap, old.expires_at or now + overlap)
    claimed = ApiKey.objects.filter(Q(expires_at=None) | Q(expires_at__gt=now), pk=old.pk, replaced_by=None, revoked_at=None).update(
        replaced_by=sibling, expires_at=ends
    )
    if not claimed:
        raise Conflict("This key has been revoked, has expired or has already been rotated.")
    _add_limits(sibling, [Allowance.of(limit) for limit in old.limits.all()])
    changed.send(ApiKey)
    key.replaced_by, key.expires_at = sibling, ends
    record(actor, old.organization, "key.rotated", subject_of(old), new_key=sibling.pk, old_key_ends=ends.isoformat())
    return sibling, clear


@transaction.atomic
def lend_key(organization: Organization, user: User, name: str, *, models: Iterable[str], lasts: timedelta) -> str:
    """A key for a check of the deployment itself: one row, whose key is minted anew each time and soon expires. The clear text.

    Raises ValidationError."""
    cleaned = policy.clean(name=name, models=models, expires_at=timezone.now() + lasts)
    check_holder(organization, user)
    clear, handle = mint()
    pepper_id, pepper = next(iter(settings.KEYRING.keys("pepper").items()))
    ApiKey.objects.update_or_create(
        organization=organization,
        user=user,
        name=cleaned["name"],
        tags=[LENT],
        defaults={
            "handle": handle,
            "digest": digest(pepper, clear),
            "pepper_id": pepper_id,
            "last_four": clear[-4:],
            "allowed_models": cleaned["models"],
            "expires_at": cleaned["expires_at"],
        },
    )
    record(None, organization, "key.lent", name, user=user.email, expires_at=cleaned["expires_at"].isoformat())
    return clear


def check_holder(organization: Organization, user: User, team: Team | None = None) -> None:
    """A key works only while all of this holds, so none is issued without. Raises ValidationError."""
    if not organization.is_active:
        raise ValidationError({"organization": f"{organization} is switched off, so its keys would not work."})
    if not user.is_active:
        raise ValidationError({"email": f"{user} is switched off, so the key would not work."})
    membership = Membership.objects.filter(user=user, organization=organization).first()
    if membership is None:
        raise ValidationError({"email": f"{user} is not a member of {organization}."})
    if membership.role == Role.VIEWER:
        raise ValidationError({"email": f"{user} is a viewer in {organization}, and a viewer's keys do not work: change the role first."})
    if team is not None and (team.organization_id != organization.pk or not membership.teams.filter(pk=team.pk).exists()):
        raise ValidationError({"team": f"{user} is not on this team."})


def _create_key(**fields: Any) -> tuple[ApiKey, str]:
    clear, handle = mint()
    pepper_id, pepper = next(iter(settings.KEYRING.keys("pepper").items()))
    return ApiKey.objects.create(handle=handle, digest=digest(pepper, clear), pepper_id=pepper_id, last_four=clear[-4:], **fields), clear


def _add_limits(key: ApiKey, allowances: Iterable[Allowance]) -> None:
    for one in allowances:
        _put_limit(one, organization=key.organization, team=None, user=None, key=key)


def subject_of(key: ApiKey) -> str:
    return f"key {key.pk} ({key.name})"


def _as_json(cleaned: dict[str, Any]) -> dict[str, Any]:
    """Fit for an audit entry."""
    said = dict(cleaned)
    if said.get("expires_at"):
        said["expires_at"] = said["expires_at"].isoformat()
    if "limits" in said:
        said["limits"] = [str(one) for one in said["limits"]]
    return said


# Freezing


@transaction.atomic
def freeze(thing: Organization | Team | ApiKey, *, length: timedelta, reason: str = "", actor: User | None = None) -> datetime:
    """Nobody below it calls a model for so long; calls that run go on, unless `CUT_REVOKED_CALLS` is set. When that ends.

    Raises ValidationError."""
    policy.clean_freeze(length, reason)
    until = timezone.now() + length
    _set_frozen(thing, until, reason.strip(), actor)
    record(actor, _organization_of(thing), f"{_kind_of(thing)}.frozen", _named(thing), until=until.isoformat(), reason=reason.strip())
    return until


@transaction.atomic
def thaw(thing: Organization | Team | ApiKey, *, actor: User | None = None) -> bool:
    """False when it was not frozen."""
    if not thing.is_frozen:
        return False
    _set_frozen(thing, None, "", None)
    record(actor, _organization_of(thing), f"{_kind_of(thing)}.thawed", _named(thing))
    return True


@transaction.atomic
def freeze_key(place: Membership, key: ApiKey, *, length: timedelta, reason: str = "") -> datetime:
    """`freeze` for whoever may revoke the key. Raises PermissionDenied and Conflict as well."""
    _check_may_thaw(place, key)
    return freeze(key, length=length, reason=reason, actor=place.user)


@transaction.atomic
def thaw_key(place: Membership, key: ApiKey) -> bool:
    """`thaw` for whoever may revoke the key. Raises PermissionDenied and Conflict."""
    _check_may_thaw(place, key)
    return thaw(key, actor=place.user)


def may_thaw(place: Membership, key: ApiKey) -> bool:
    """One who was frozen must not be able to end it: what somebody else froze is for owners and admins to thaw."""
    return place.manages or not key.is_frozen or key.frozen_by_id == place.user.pk


def _check_may_thaw(place: Membership, key: ApiKey) -> None:
    """As the key stands now, and until the caller's transaction ends."""
    current = ApiKey.objects.select_for_update().get(pk=key.pk)
    if current.revoked_at is not None:
        raise Conflict("This key has been revoked.")
    if not may_thaw(place, current):
        raise PermissionDenied("Somebody else froze this key: only an owner or administrator of the organization can change that.")
    key.frozen_until = current.frozen_until


def _set_frozen(thing: Organization | Team | ApiKey, until: datetime | None, reason: str, by: User | None) -> None:
    thing.frozen_until, thing.frozen_reason = until, reason
    written = ["frozen_until", "frozen_reason"]
    if isinstance(thing, ApiKey):
        thing.frozen_by = by
        written.append("frozen_by")
    thing.save(update_fields=written)


def _organization_of(thing: Organization | Team | ApiKey) -> Organization:
    return thing if isinstance(thing, Organization) else thing.organization


def _kind_of(thing: Organization | Team | ApiKey) -> str:
    return "key" if isinstance(thing, ApiKey) else type(thing).__name__.lower()


def _named(thing: Organization | Team | ApiKey) -> str:
    return subject_of(thing) if isinstance(thing, ApiKey) else str(thing)


# Limits


@transaction.atomic
def set_limit(
    organization: Organization,
    allowance: Allowance,
    *,
    team: Team | None = None,
    user: User | None = None,
    key: ApiKey | None = None,
    actor: User | None = None,
) -> Limit:
    """Put a limit on the organization, or on one team, member or key of it; one that stands there is replaced.

    Raises ValidationError."""
    try:
        policy.clean_allowance(allowance)
    except ValidationError as problem:
        raise ValidationError({"limits": problem}) from None
    check_scope(organization, team=team, user=user, key=key)
    limit = _put_limit(allowance, organization=organization, team=team, user=user, key=key)
    record(actor, organization, "limit.set", limit.scope, limit=str(allowance))
    return limit


@transaction.atomic
def remove_limit(limit: Limit, *, actor: User | None = None) -> None:
    scope, was, organization = limit.scope, str(Allowance.of(limit)), limit.organization
    limit.delete()
    record(actor, organization, "limit.removed", scope, limit=was)


def check_scope(organization: Organization, *, team: Team | None, user: User | None, key: ApiKey | None) -> None:
    """At most one of the three, and it belongs to the organization. Raises ValidationError."""
    if sum(one is not None for one in (team, user, key)) > 1:
        raise ValidationError("A limit is for one team, one user or one key: choose at most one of them.")
    if team is not None and team.organization_id != organization.pk:
        raise ValidationError({"team": "This team belongs to another organization."})
    if key is not None and key.organization_id != organization.pk:
        raise ValidationError({"key": "This key belongs to another organization."})
    if user is not None and not Membership.objects.filter(user=user, organization=organization).exists():
        raise ValidationError({"user": f"{user} is not a member of {organization}."})


def _put_limit(allowance: Allowance, *, organization: Organization, team: Team | None, user: User | None, key: ApiKey | None) -> Limit:
    limit, _ = Limit.objects.update_or_create(
        organization=organization,
        team=team,
        user=user,
        key=key,
        metric=allowance.metric,
        window=allowance.window,
        defaults={"amount": allowance.amount, "mode": allowance.mode},
    )
    return limit
