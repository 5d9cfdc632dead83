"""One door to an organization's keys: Alice may, Bob may see his own, Charlie gets the answer that nobody's key gets."""

from __future__ import annotations

import pytest
from django.http import Http404

from accounts import actions, queries
from accounts.models import ApiKey, Organization, Role, User
from tests.accounts.conftest import People


def seen_by(user: User, organization: Organization) -> set[str]:
    place = queries.membership(user, organization)
    return {key.name for key in queries.keys_visible_to(place)} if place else set()


@pytest.fixture
def keys(people: People) -> dict[str, ApiKey]:
    return {name: people.key(user, name) for name, user in (("alices", people.alice), ("bobs", people.bob), ("charlies", people.charlie))}


def test_who_sees_which_keys(people: People, keys: dict[str, ApiKey]):
    everything = {"alices", "bobs"}

    assert seen_by(people.alice, people.acme) == everything
    assert seen_by(people.amy, people.acme) == everything
    assert seen_by(people.vera, people.acme) == everything
    assert seen_by(people.bob, people.acme) == {"bobs"}
    assert seen_by(people.charlie, people.acme) == set()
    assert seen_by(people.olga, people.acme) == everything


def test_a_foreign_key_and_a_missing_one_are_the_same(people: People, keys: dict[str, ApiKey]):
    alice, bob, charlie = (
        queries.standing(user, slug) for user, slug in ((people.alice, "acme"), (people.bob, "acme"), (people.charlie, "rival"))
    )

    assert queries.key_of(alice, keys["bobs"].pk) == keys["bobs"]
    assert queries.key_of(bob, keys["bobs"].pk) == keys["bobs"]
    for place, key_id in ((charlie, keys["bobs"].pk), (bob, keys["alices"].pk), (alice, keys["charlies"].pk), (alice, 10**30)):
        with pytest.raises(Http404):
            queries.key_of(place, key_id)


def test_a_foreign_organization_and_a_missing_one_are_the_same(people: People):
    assert queries.standing(people.bob, "acme").role == Role.MEMBER
    for slug in ("rival", "nowhere"):
        with pytest.raises(Http404):
            queries.standing(people.bob, slug)


def test_an_operator_stands_everywhere_as_an_owner(people: People):
    actions.ensure_membership(people.olga, people.acme, role=Role.VIEWER)

    assert set(queries.organizations_of(people.olga)) == {people.acme, people.rival}
    assert queries.standing(people.olga, "acme").role == queries.standing(people.olga, "rival").role == Role.OWNER
    assert people.olga.memberships.get().role == Role.VIEWER


def test_an_organization_that_is_switched_off_is_seen_by_operators_alone(people: People):
    people.acme.is_active = False
    people.acme.save()

    assert list(queries.organizations_of(people.alice)) == []
    with pytest.raises(Http404):
        queries.standing(people.alice, "acme")
    assert queries.standing(people.olga, "acme").manages
    assert people.acme in queries.organizations_of(people.olga)


def test_a_list_of_keys_takes_the_same_number_of_queries_however_long_it_is(
    people: People, keys: dict[str, ApiKey], django_assert_num_queries: object
):
    place = queries.standing(people.alice, "acme")
    for _ in range(3):
        people.key(people.amy)
        with django_assert_num_queries(2):  # type: ignore[operator]
            assert all((key.user.email, key.organization.slug, list(key.limits.all())) for key in queries.keys_visible_to(place))


def test_a_member_is_found_only_in_their_organization(people: People):
    assert queries.member_of(people.acme, " Bob@example.org ") == people.bob
    assert queries.member_of(people.acme, "charlie@example.org") is None
    assert queries.member_of(people.acme, "nobody@example.org") is None


def test_a_key_is_found_by_its_name_its_owner_or_as_it_begins(people: People, keys: dict[str, ApiKey]):
    visible = queries.keys_visible_to(queries.standing(people.alice, "acme"))
    handle = keys["bobs"].handle or ""
    beginnings = (f"sk-sluice-{handle[:6]}", f"sk-sluice-{handle}", f"sk-sluice-{handle}and-all-the-rest", keys["bobs"].hint)
    for words in ("BOBS", "bob@", *beginnings):
        assert [key.name for key in queries.named_like(visible, words)] == ["bobs"], words
    assert not queries.named_like(visible, "charlie")
    assert not queries.named_like(visible, f"sk-sluice-{keys['charlies'].handle}")
