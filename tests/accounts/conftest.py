"""Alice owns Acme, Amy administers it, Bob and Vera are on it, Charlie is a stranger, and Olga operates the deployment."""

from __future__ import annotations

import pytest

from accounts import actions
from accounts.models import ApiKey, Membership, Organization, Role, User


class People:
    """Everybody, each with the key that they hold. Passwords are the e-mail addresses."""

    def __init__(self) -> None:
        self.acme = Organization.objects.create(slug="acme", name="Acme")
        self.rival = Organization.objects.create(slug="rival", name="Rival")
        self.alice = self.joins("alice", self.acme, Role.OWNER)
        self.amy = self.joins("amy", self.acme, Role.ADMIN)
        self.bob = self.joins("bob", self.acme, Role.MEMBER)
        self.vera = self.joins("vera", self.acme, Role.VIEWER)
        self.charlie = self.joins("charlie", self.rival, Role.OWNER)
        self.olga = User.objects.create_superuser("olga@example.org", "olga@example.org")

    def joins(self, name: str, organization: Organization, role: Role) -> User:
        email = f"{name}@example.org"
        user = User.objects.create_user(email, email)
        Membership.objects.create(user=user, organization=organization, role=role)
        return user

    def key(self, user: User, name: str = "laptop", **policy: object) -> ApiKey:
        organization = user.memberships.get().organization
        return actions.issue_key(organization=organization, user=user, name=name, **policy)[0]


@pytest.fixture
def people(db: None) -> People:
    return People()
