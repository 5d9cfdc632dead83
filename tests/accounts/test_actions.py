"""Keys, limits and roles: what is stored, what is refused, and what is written of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta

import pytest
from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.utils.timezone import now

from accounts import actions
from accounts.models import ApiKey, AuditEntry, Limit, Membership, Organization, Role, Team, User
from accounts.policy import Allowance
from accounts.principal import digest, is_plausible
from proxy import snapshot
from tests.accounts.conftest import People


def refused(field: str) -> AbstractContextManager[pytest.ExceptionInfo[ValidationError]]:
    return pytest.raises(ValidationError, match=field)


def last_entry() -> AuditEntry:
    return AuditEntry.objects.order_by("-pk")[0]


# Issuing


def test_of_a_key_only_its_digest_its_id_and_four_characters_stay(people: People):
    key, clear = actions.issue_key(organization=people.acme, user=people.bob, name="ci", actor=people.alice)
    pepper_id, pepper = next(iter(settings.KEYRING.keys("pepper").items()))
    key.refresh_from_db()

    assert is_plausible(clear)
    assert bytes(key.digest) == digest(pepper, clear)
    assert key.pepper_id == pepper_id
    assert clear.startswith(f"sk-sluice-{key.handle}")
    assert clear.endswith(key.last_four)
    secret = clear.removeprefix(f"sk-sluice-{key.handle}")
    assert not any(secret[:-6] in str(value) for value in ApiKey.objects.values_list().get(pk=key.pk))


def test_an_issued_key_is_in_the_record_without_its_secret(people: People):
    key, clear = actions.issue_key(
        organization=people.acme, user=people.bob, name="ci", models=["demo/*"], limits=[Allowance("rpm", 5)], actor=people.alice
    )

    entry = last_entry()
    assert (entry.actor, entry.organization, entry.action, entry.subject) == (people.alice, people.acme, "key.issued", f"key {key.pk} (ci)")
    assert entry.detail == {"user": "bob@example.org", "name": "ci", "models": ["demo/*"], "limits": ["rpm 5"]}
    assert clear[-49:] not in json.dumps(list(AuditEntry.objects.values()), default=str)


def test_the_hot_path_knows_a_new_key_with_its_whole_policy(people: People):
    expires_at = now() + timedelta(days=3)
    _, clear = actions.issue_key(
        organization=people.acme,
        user=people.bob,
        name="ci",
        models=["demo/*"],
        networks=["10.9.9.9/8"],
        tags=["ci"],
        expires_at=expires_at,
        limits=[Allowance("money", 5_000_000, "month")],
    )

    principal = snapshot.load().principals[digest(next(iter(settings.KEYRING.keys("pepper").values())), clear)]
    assert principal.models == ("demo/*",)
    assert [str(network) for network in principal.networks] == ["10.0.0.0/8"]
    assert principal.expires_at == pytest.approx(expires_at.timestamp())
    assert [(limit.metric, limit.amount, limit.window) for limit in principal.limits] == [("money", 5_000_000, "month")]


def test_a_key_is_for_a_member_who_may_call(people: People):
    for user in (people.charlie, people.vera, people.olga):
        with refused("email"):
            actions.issue_key(organization=people.acme, user=user, name="x")
    people.bob.is_active = False
    with refused("email"):
        actions.issue_key(organization=people.acme, user=people.bob, name="x")
    people.acme.is_active = False
    with refused("organization"):
        actions.issue_key(organization=people.acme, user=people.alice, name="x")

    assert not ApiKey.objects.exists()
    assert not AuditEntry.objects.filter(action="key.issued").exists()


def test_a_key_is_for_a_team_that_its_holder_is_on(people: People):
    team, foreign = Team.objects.create(organization=people.acme, name="ml"), Team.objects.create(organization=people.rival, name="ml")
    for wrong in (team, foreign):
        with refused("team"):
            actions.issue_key(organization=people.acme, user=people.bob, name="x", team=wrong)
    people.bob.memberships.get().teams.add(team)

    key, _ = actions.issue_key(organization=people.acme, user=people.bob, name="x", team=team)
    assert key.team == team


def test_wrong_input_leaves_nothing_behind(people: People):
    with pytest.raises(ValidationError) as problem:
        actions.issue_key(organization=people.acme, user=people.bob, name=" ", networks=["nowhere"], limits=[Allowance("rpm", -1)])

    assert problem.value.message_dict.keys() == {"name", "networks", "limits"}
    assert not ApiKey.objects.exists()


# Revoking and changing


def test_a_revoked_key_is_out_of_the_snapshot_and_stays_revoked(people: People):
    key = people.key(people.bob)
    assert len(snapshot.load().principals) == 1

    assert actions.revoke_key(key, actor=people.alice)
    revoked_at = ApiKey.objects.get(pk=key.pk).revoked_at
    assert not actions.revoke_key(ApiKey.objects.get(pk=key.pk), actor=people.alice)

    assert key.state == "revoked"
    assert snapshot.load().principals == {}
    assert ApiKey.objects.get(pk=key.pk).revoked_at == revoked_at
    assert AuditEntry.objects.filter(action="key.revoked", actor=people.alice).count() == 1


def test_only_what_was_given_is_changed(people: People):
    key = people.key(people.bob, models=["demo/*"], tags=["a"], limits=[Allowance("rpm", 5), Allowance("tpm", 100)])
    # Another worker writes while we hold an older copy of the row.
    used_at = now()
    ApiKey.objects.filter(pk=key.pk).update(last_used_at=used_at)

    actions.change_key(key, actor=people.alice, tags=["b"], limits=[Allowance("rpm", 7), Allowance("concurrency", 2)])

    stored = ApiKey.objects.get(pk=key.pk)
    assert (stored.allowed_models, stored.tags, stored.last_used_at) == (["demo/*"], ["b"], used_at)
    assert set(stored.limits.values_list("metric", "amount")) == {("rpm", 7), ("concurrency", 2)}
    assert last_entry().detail == {"tags": ["b"], "limits": ["rpm 7", "concurrency 2"]}


def test_taking_a_restriction_away_is_in_the_record_too(people: People):
    key = people.key(people.bob, models=["demo/*"])
    actions.change_key(key, models=[])

    assert last_entry().detail == {"models": []}


@pytest.mark.parametrize("changes", [{"name": "x"}, {"limits": [Allowance("rpm", 5)]}])
def test_a_revoked_key_is_not_changed(people: People, changes: dict[str, object]):
    key = people.key(people.bob)
    actions.revoke_key(ApiKey.objects.get(pk=key.pk))

    with pytest.raises(actions.Conflict):
        actions.change_key(key, **changes)
    assert not Limit.objects.exists()


# Rotating


def test_a_rotated_key_has_a_sibling_with_its_policy_and_limits_of_its_own(people: People):
    key = people.key(people.bob, models=["demo/*"], networks=["10.0.0.0/8"], tags=["a"], limits=[Allowance("rpm", 5, mode="shadow")])
    sibling, clear = actions.rotate_key(key, actor=people.alice)

    for field in ("organization", "user", "team", "name", "allowed_models", "allowed_networks", "tags", "expires_at"):
        assert getattr(sibling, field) == getattr(ApiKey.objects.get(pk=sibling.pk), field)
    assert (sibling.allowed_models, sibling.allowed_networks, sibling.tags, sibling.expires_at) == (["demo/*"], ["10.0.0.0/8"], ["a"], None)
    assert [Allowance.of(limit) for limit in sibling.limits.all()] == [Allowance("rpm", 5, mode="shadow")]
    assert key.limits.count() == 1
    assert sibling.digest != key.digest
    assert is_plausible(clear)
    entry = last_entry()
    assert (entry.action, entry.actor, entry.detail["new_key"]) == ("key.rotated", people.alice, sibling.pk)
    assert clear[-49:] not in json.dumps(entry.detail)


def test_the_old_key_works_on_for_a_day(people: People):
    key = people.key(people.bob)
    sibling, _ = actions.rotate_key(key)

    old = ApiKey.objects.get(pk=key.pk)
    assert old.replaced_by == sibling
    assert old.state == "retiring"
    assert old.expires_at == pytest.approx(now() + timedelta(hours=24), abs=timedelta(minutes=1))
    assert len(snapshot.load().principals) == 2


def test_without_an_overlap_the_old_key_stops_at_once(people: People):
    key = people.key(people.bob)
    sibling, _ = actions.rotate_key(key, overlap=timedelta(0))

    assert ApiKey.objects.get(pk=key.pk).state == "expired"
    assert [principal.key_id for principal in snapshot.load().principals.values()] == [sibling.pk]


def test_a_rotation_never_lengthens_the_old_keys_life(people: People):
    soon = now() + timedelta(hours=1)
    key = people.key(people.bob, expires_at=soon)
    sibling, _ = actions.rotate_key(key, overlap=timedelta(days=30))

    assert ApiKey.objects.get(pk=key.pk).expires_at == soon
    assert sibling.expires_at == soon


@pytest.mark.parametrize("overlap", [timedelta(seconds=-1), timedelta(days=30, seconds=1)])
def test_an_overlap_lies_between_nothing_and_thirty_days(people: People, overlap: timedelta):
    key = people.key(people.bob)
    with refused("30 days"):
        actions.rotate_key(key, overlap=overlap)
    assert ApiKey.objects.count() == 1


def _revoke(key: ApiKey) -> None:
    actions.revoke_key(key)


def _let_expire(key: ApiKey) -> None:
    ApiKey.objects.filter(pk=key.pk).update(expires_at=now())


def _rotate(key: ApiKey) -> None:
    actions.rotate_key(key, overlap=timedelta(days=1))


@pytest.mark.parametrize("ended_by", [_revoke, _let_expire, _rotate])
def test_a_key_that_has_ended_meanwhile_has_no_sibling_made(people: People, ended_by: Callable[[ApiKey], None]):
    key = people.key(people.bob)
    ended_by(ApiKey.objects.get(pk=key.pk))
    keys, entries = ApiKey.objects.count(), AuditEntry.objects.count()

    with pytest.raises(actions.Conflict):
        actions.rotate_key(key)
    assert (ApiKey.objects.count(), AuditEntry.objects.count()) == (keys, entries)


def test_a_key_whose_holder_has_left_is_not_rotated(people: People):
    key = people.key(people.bob)
    people.bob.memberships.all().delete()

    with refused("not a member"):
        actions.rotate_key(key)


# Limits


def test_a_limit_is_put_and_replaced_and_removed(people: People):
    actions.set_limit(people.acme, Allowance("rpm", 5), actor=people.alice)
    limit = actions.set_limit(people.acme, Allowance("rpm", 9, mode="shadow"), actor=people.amy)

    assert Limit.objects.get() == limit
    assert (limit.amount, limit.mode) == (9, "shadow")
    actions.remove_limit(limit, actor=people.alice)

    assert not Limit.objects.exists()
    assert list(AuditEntry.objects.order_by("pk").values_list("action", "actor__email", "detail")) == [
        ("limit.set", "alice@example.org", {"limit": "rpm 5"}),
        ("limit.set", "amy@example.org", {"limit": "rpm 9 (shadow)"}),
        ("limit.removed", "alice@example.org", {"limit": "rpm 9 (shadow)"}),
    ]


def test_each_scope_metric_and_window_has_a_limit_of_its_own(people: People):
    key, team = people.key(people.bob), Team.objects.create(organization=people.acme, name="ml")
    for scope in ({}, {"team": team}, {"user": people.bob}, {"key": key}):
        for allowance in (Allowance("rpm", 1), Allowance("money", 1, "day"), Allowance("money", 1, "month")):
            actions.set_limit(people.acme, allowance, **scope)

    assert Limit.objects.count() == 12


def test_a_limit_stays_inside_its_organization(people: People):
    strangers_key, strangers_team = people.key(people.charlie), Team.objects.create(organization=people.rival, name="ml")
    for scope in (
        {"key": strangers_key},
        {"team": strangers_team},
        {"user": people.charlie},
        {"user": people.bob, "key": people.key(people.bob)},
    ):
        with pytest.raises(ValidationError):
            actions.set_limit(people.acme, Allowance("rpm", 1), **scope)

    assert not Limit.objects.exists()


def test_the_database_itself_refuses_a_limit_without_sense(people: People):
    for wrong in (
        {"metric": "money"},
        {"metric": "rpm", "window": "day"},
        {"metric": "rpm", "user": people.bob, "key": people.key(people.bob)},
    ):
        with pytest.raises(IntegrityError), transaction.atomic():
            Limit.objects.create(organization=people.acme, amount=1, **wrong)


# People and roles


def test_people_are_known_by_their_e_mail_in_any_case(people: People):
    assert actions.ensure_user(" BOB@Example.org ") == people.bob
    with refused("already"):
        actions.create_user("Bob@example.org")


def test_somebody_made_for_a_key_cannot_sign_in(db: None):
    user = actions.ensure_user("new@example.org")

    assert not user.has_usable_password()
    assert last_entry().action == "user.created"


@pytest.mark.parametrize("email", ["", "nobody", "a b@example.org", f"{'x' * 250}@example.org"])
def test_what_is_no_e_mail_makes_nobody(db: None, email: str):
    with refused("e-mail"):
        actions.ensure_user(email)
    assert not User.objects.exists()


def test_an_organization_is_made_once(db: None):
    assert actions.ensure_organization() == actions.ensure_organization("default")
    assert Organization.objects.get().name == "Default"
    with refused("organization"):
        actions.ensure_organization("no spaces")


def test_a_membership_that_is_there_keeps_its_role(people: People):
    assert actions.ensure_membership(people.alice, people.acme).role == Role.OWNER
    assert actions.ensure_membership(people.charlie, people.acme, role=Role.VIEWER).role == Role.VIEWER


def test_a_role_changes_and_is_recorded(people: People):
    actions.change_role(people.bob.memberships.get(), Role.ADMIN, actor=people.alice)

    assert people.bob.memberships.get().role == Role.ADMIN
    assert last_entry().detail == {"before": "member", "after": "admin"}


def test_an_organization_keeps_an_owner(people: People):
    alices = people.alice.memberships.get()
    with refused("last owner"):
        actions.change_role(alices, Role.MEMBER)
    with refused("role"):
        actions.change_role(alices, "emperor")

    actions.change_role(people.amy.memberships.get(), Role.OWNER)
    actions.change_role(alices, Role.MEMBER)
    assert Membership.objects.get(organization=people.acme, role=Role.OWNER).user == people.amy


# What every worker must hear of


def _change_key(people: People, key: ApiKey) -> None:
    actions.change_key(key, tags=["x"])


def _change_limits(people: People, key: ApiKey) -> None:
    actions.change_key(key, limits=[])


def _revoke_key(people: People, key: ApiKey) -> None:
    actions.revoke_key(key)


def _rotate_key(people: People, key: ApiKey) -> None:
    actions.rotate_key(key)


def _issue_key(people: People, key: ApiKey) -> None:
    people.key(people.alice)


def _set_limit(people: People, key: ApiKey) -> None:
    actions.set_limit(people.acme, Allowance("rpm", 1))


def _remove_limit(people: People, key: ApiKey) -> None:
    actions.remove_limit(key.limits.get())


def _demote(people: People, key: ApiKey) -> None:
    actions.change_role(people.bob.memberships.get(), Role.VIEWER)


def _throw_out(people: People, key: ApiKey) -> None:
    people.bob.memberships.get().delete()


def _deactivate_user(people: People, key: ApiKey) -> None:
    people.bob.is_active = False
    people.bob.save()


def _deactivate_organization(people: People, key: ApiKey) -> None:
    people.acme.is_active = False
    people.acme.save()


BUMPS = [
    _change_key,
    _change_limits,
    _revoke_key,
    _rotate_key,
    _issue_key,
    _set_limit,
    _remove_limit,
    _demote,
    _throw_out,
    _deactivate_user,
    _deactivate_organization,
]


@pytest.mark.parametrize("change", BUMPS)
def test_a_change_that_matters_to_the_hot_path_bumps_the_version(people: People, change: Callable[[People, ApiKey], None]):
    key = people.key(people.bob, limits=[Allowance("rpm", 5)])
    before = snapshot.version()

    change(people, key)

    assert snapshot.version() > before


@pytest.mark.parametrize("change", [_revoke_key, _demote, _throw_out, _deactivate_user, _deactivate_organization])
def test_a_key_never_has_more_rights_than_its_holder_has_now(people: People, change: Callable[[People, ApiKey], None]):
    key = people.key(people.bob)
    change(people, key)

    assert key.pk not in {principal.key_id for principal in snapshot.load().principals.values()}


def test_a_change_that_is_undone_leaves_no_entry_and_no_new_version(people: People):
    key, before = people.key(people.bob), snapshot.version()
    entries = AuditEntry.objects.count()

    with pytest.raises(RuntimeError), transaction.atomic():
        actions.revoke_key(key)
        raise RuntimeError

    assert (AuditEntry.objects.count(), snapshot.version()) == (entries, before)
