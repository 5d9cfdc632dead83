"""Reads: one door to an organization's things. Absent and someone else's look the same from outside."""

from __future__ import annotations

from django.db.models import Q, QuerySet
from django.http import Http404
from django.shortcuts import get_object_or_404

from accounts.models import ApiKey, Membership, Organization, Role, User
from accounts.principal import ID_LENGTH, PREFIX


def organizations_of(user: User) -> QuerySet[Organization]:
    """Those that the user may look at; all of them for an operator."""
    organizations = Organization.objects.order_by("name", "pk")
    if user.is_superuser:
        return organizations
    return organizations.filter(is_active=True, memberships__user=user)


def membership(user: User, organization: Organization) -> Membership | None:
    """The user's place in the organization. An operator stands everywhere as an owner, if need be without a row."""
    found = Membership.objects.filter(user=user, organization=organization).first()
    if user.is_superuser and (found is None or not found.manages):
        return Membership(user=user, organization=organization, role=Role.OWNER)
    if found is None or not (organization.is_active or user.is_superuser):
        return None
    found.user, found.organization = user, organization
    return found


def standing(user: User, slug: str) -> Membership:
    """The user's place in the organization with this slug. Raises Http404 for a foreign and a missing one alike."""
    organization = get_object_or_404(Organization, slug=slug)
    found = membership(user, organization)
    if found is None:
        raise Http404("There is no such organization.")
    return found


def keys_visible_to(place: Membership) -> QuerySet[ApiKey]:
    """Newest first: all keys of the organization, but for a member only their own."""
    keys = (
        ApiKey.objects.filter(organization=place.organization)
        .select_related("organization", "user", "team")
        .prefetch_related("limits")
        .order_by("-pk")
    )
    return keys.filter(user=place.user) if place.role == Role.MEMBER else keys


def named_like(keys: QuerySet[ApiKey], words: str) -> QuerySet[ApiKey]:
    """Those with this in their name, of somebody with this in his e-mail, or that begin as a key that was found somewhere begins."""
    found = Q(name__icontains=words) | Q(user__email__icontains=words)
    if words.startswith(PREFIX):
        found |= Q(handle__startswith=words[len(PREFIX) :].partition("…")[0][:ID_LENGTH])
    return keys.filter(found)


def key_of(place: Membership, key_id: int) -> ApiKey:
    """The only way a page gets at a key. Raises Http404 for a foreign and a missing one alike."""
    return get_object_or_404(keys_visible_to(place), pk=key_id)


def member_of(organization: Organization, email: str) -> User | None:
    """The member with this e-mail; None for a stranger and for nobody alike."""
    return User.objects.filter(email=email.strip().lower(), memberships__organization=organization).first()
