"""Whether a key works, and if it does not, why: in words for the person who looks at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from accounts.models import ApiKey, Membership, Organization, Role


@dataclass(frozen=True, slots=True)
class State:
    """`tone` is success, warning or neutral; `at` is the moment that the reason speaks of."""

    name: str
    tone: str
    reason: str = ""
    at: datetime | None = None

    @property
    def works(self) -> bool:
        return self.tone != "neutral"


def roles_in(organization: Organization, user_ids: set[int]) -> dict[int, str]:
    """The roles of these people in the organization; who is not a member is absent."""
    return dict(Membership.objects.filter(organization=organization, user__in=user_ids).values_list("user_id", "role"))


def state_of(key: ApiKey, roles: Mapping[int, str]) -> State:
    """`roles` are those of the key's organization, by user."""
    if key.revoked_at is not None:
        return State("revoked", "neutral", "Revoked", key.revoked_at)
    if key.state == "expired":
        replaced = " after it was replaced" if key.replaced_by_id else ""
        return State("expired", "neutral", f"Expired{replaced}", key.expires_at)
    if not key.organization.is_active:
        return State("blocked", "neutral", "The organization is switched off")
    if not key.user.is_active:
        return State("blocked", "neutral", "Its owner’s account is switched off")
    for thing, whose in ((key, ""), (key.team, "The team is f"), (key.organization, "The organization is f")):
        if thing is not None and thing.is_frozen:
            reason = f" ({thing.frozen_reason})" if thing.frozen_reason else ""
            return State("frozen", "warning", f"{whose or 'F'}rozen{reason} until", thing.frozen_until)
    role = roles.get(key.user_id)
    if role is None:
        return State("blocked", "neutral", "Its owner is no longer a member of the organization")
    if role == Role.VIEWER:
        return State("blocked", "neutral", "Its owner is a viewer, and viewers’ keys do not call models")
    if key.replaced_by_id:
        return State("retiring", "warning", "Replaced by a newer key, works until", key.expires_at)
    return State("active", "success")
