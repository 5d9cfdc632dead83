"""The operators' admin: who gets in, what is never shown, and that each change leaves an entry."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.sessions.models import Session
from django.core import mail
from django.test import Client
from django.urls import reverse
from django.utils.timezone import now

from accounts import actions
from accounts.models import ApiKey, AuditEntry, Limit, Membership, Organization, Role, Team, User
from accounts.policy import Allowance
from accounts.principal import is_plausible
from tests.accounts.conftest import People

KEY = re.compile(r"sk-sluice-[0-9A-Za-z]{59}")
MODELS = ("user", "organization", "team", "membership", "apikey", "limit", "auditentry")

DIGEST_PARTS = ("digest", "pepper")


def page_of(model: str, pk: object = None, page: str = "change") -> str:
    return reverse(f"admin:accounts_{model}_{page}", args=[] if pk is None else [pk])


@pytest.fixture
def olga(people: People, client: Client) -> Client:
    client.force_login(people.olga)
    return client


def last_entry() -> AuditEntry:
    return AuditEntry.objects.order_by("-pk")[0]


def errors_of(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response
    return dict(response.context["adminform"].form.errors)


# Who gets in


def test_nobody_but_an_operator_gets_in(people: People):
    for user in (people.alice, people.charlie):
        client = Client()
        client.force_login(user)
        assert client.get("/admin/accounts/apikey/", follow=True).status_code == 403
    staff = User.objects.create_user("staff@example.org", "staff@example.org", is_staff=True)
    client = Client()
    client.force_login(staff)
    assert client.get("/admin/", follow=True).status_code == 403


def test_a_stranger_signs_in_on_the_common_page(people: People):
    client = Client()

    assert client.get("/admin/accounts/user/").headers["location"] == "/admin/login/?next=/admin/accounts/user/"
    assert client.get("/admin/login/?next=/admin/accounts/user/").headers["location"] == "/accounts/login/?next=/admin/accounts/user/"
    assert client.get("/admin/login/?next=//evil.example/").headers["location"] == "/accounts/login/?next=/admin/"


def test_the_admin_itself_takes_no_password(people: People):
    client = Client()
    client.post("/admin/login/", {"username": "olga@example.org", "password": "olga@example.org"})

    assert "_auth_user_id" not in client.session
    client.post("/accounts/login/?next=/admin/", {"login": "olga@example.org", "password": "olga@example.org"})
    assert client.get("/admin/").status_code == 200


@pytest.mark.parametrize("model", MODELS)
def test_every_page_opens(people: People, olga: Client, model: str):
    key = people.key(people.bob, limits=[Allowance("money", 5_000_000, "day")])
    team = Team.objects.create(organization=people.acme, name="ml")
    rows = {
        "user": people.bob,
        "organization": people.acme,
        "team": team,
        "membership": people.bob.memberships.get(),
        "apikey": key,
        "limit": key.limits.get(),
        "auditentry": last_entry(),
    }
    pages = [page_of(model, page="changelist"), page_of(model, page="changelist") + "?q=bob", page_of(model, rows[model].pk)]
    if model != "auditentry":
        pages.append(page_of(model, page="add"))

    for page in pages:
        response = olga.get(page)
        assert response.status_code == 200, page
        assert bytes(key.digest).hex() not in response.content.decode()
        assert not any(f'name="{part}' in response.content.decode() for part in DIGEST_PARTS)


@pytest.mark.parametrize("model", MODELS)
def test_a_list_takes_the_same_number_of_queries_however_long_it_is(
    people: People, olga: Client, model: str, django_assert_max_num_queries: Callable[[int], AbstractContextManager[Any]]
):
    def fill(number: int) -> None:
        for index in range(number):
            user = people.joins(f"u{model}{User.objects.count()}x{index}", people.acme, Role.MEMBER)
            team = Team.objects.create(organization=people.acme, name=f"team {Team.objects.count()}")
            user.memberships.get().teams.add(team)
            people.key(user, limits=[Allowance("rpm", 5)])
            actions.set_limit(people.acme, Allowance("rpm", 5), team=team, actor=people.alice)

    page = page_of(model, page="changelist")
    fill(2)
    with django_assert_max_num_queries(100) as few:
        olga.get(page)
    fill(6)
    with django_assert_max_num_queries(100) as many:
        olga.get(page)

    assert len(many) == len(few), [query["sql"] for query in many.captured_queries]


# Keys


def new_key(people: People, **fields: object) -> dict[str, object]:
    return {
        "organization": people.acme.pk,
        "user": people.bob.pk,
        "team": "",
        "name": "ci",
        "models": "",
        "networks": "",
        "tags": "",
        "expires_at_0": "",
        "expires_at_1": "",
        **fields,
    }


def everything_stored() -> str:
    rows = [list(model.objects.values()) for model in (ApiKey, AuditEntry, LogEntry, Session, User, Limit)]
    return repr([rows, [session.get_decoded() for session in Session.objects.all()], mail.outbox])


def test_a_key_appears_exactly_once_and_never_again(people: People, olga: Client, caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG")
    fields = new_key(
        people, models="demo/*, gpt-4o", networks="10.1.1.1/8", tags="a\nb", expires_at_0="2090-01-31", expires_at_1="12:00:00"
    )
    answer = olga.post(page_of("apikey", page="add"), fields)

    assert answer.status_code == 200
    [clear] = KEY.findall(answer.content.decode())
    assert is_plausible(clear)
    assert "no-store" in answer.headers["cache-control"]
    key = ApiKey.objects.get()
    assert (key.user, key.organization, key.allowed_models, key.allowed_networks, key.tags) == (
        people.bob,
        people.acme,
        ["demo/*", "gpt-4o"],
        ["10.0.0.0/8"],
        ["a", "b"],
    )
    assert last_entry().actor == people.olga

    secret = clear.removeprefix(f"sk-sluice-{key.handle}")
    for page in (page_of("apikey", page="changelist"), page_of("apikey", key.pk), page_of("apikey", key.pk, "history"), "/admin/"):
        assert secret not in olga.get(page).content.decode()
    assert secret not in everything_stored()
    assert secret not in caplog.text
    assert not any(secret in str(cookie.value) for cookie in olga.cookies.values())


def test_a_key_cannot_be_typed_in(people: People, olga: Client):
    typed = new_key(
        people, digest="00" * 32, handle="AAAAAAAAAA", last_four="AAAA", key="sk-sluice-mine", pepper_id="x", revoked_at_0="2030-01-01"
    )
    olga.post(page_of("apikey", page="add"), typed)

    key = ApiKey.objects.get()
    assert bytes(key.digest) != bytes(32)
    assert key.handle != "AAAAAAAAAA"
    assert key.revoked_at is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": " "}, "name"),
        ({"models": "gpt-[4]"}, "models"),
        ({"networks": "nowhere"}, "networks"),
        ({"tags": "x" * 51}, "tags"),
        ({"expires_at_0": "2001-01-01", "expires_at_1": "00:00"}, "expires_at"),
    ],
)
def test_wrong_input_is_said_at_its_field(people: People, olga: Client, fields: dict[str, object], field: str):
    assert list(errors_of(olga.post(page_of("apikey", page="add"), new_key(people, **fields)))) == [field]
    assert not ApiKey.objects.exists()


def test_a_key_is_for_a_member_and_a_team_of_theirs(people: People, olga: Client):
    team = Team.objects.create(organization=people.acme, name="ml")
    for wrong, field in (({"user": people.charlie.pk}, "user"), ({"user": people.vera.pk}, "user"), ({"team": team.pk}, "team")):
        assert list(errors_of(olga.post(page_of("apikey", page="add"), new_key(people, **wrong)))) == [field]
    assert not ApiKey.objects.exists()


def test_a_changed_key_keeps_what_another_worker_wrote(people: People, olga: Client):
    key = people.key(people.bob, models=["demo/*"], limits=[Allowance("rpm", 5)])
    used_at = now()
    ApiKey.objects.filter(pk=key.pk).update(last_used_at=used_at)
    fields = new_key(people, name="renamed", models="demo/*\ngpt-4o", organization=people.rival.pk, user=people.charlie.pk)
    form = olga.get(page_of("apikey", key.pk)).context["adminform"].form
    assert set(form.fields) == {"name", "team", "models", "networks", "expires_at", "tags"}

    assert olga.post(page_of("apikey", key.pk), fields).status_code == 302
    stored = ApiKey.objects.get()
    assert (stored.name, stored.allowed_models, stored.last_used_at) == ("renamed", ["demo/*", "gpt-4o"], used_at)
    assert (stored.organization, stored.user) == (people.acme, people.bob)
    assert last_entry().detail == {"name": "renamed", "models": ["demo/*", "gpt-4o"]}
    assert last_entry().actor == people.olga


def test_a_revoked_key_can_be_looked_at_and_not_changed(people: People, olga: Client):
    key = people.key(people.bob)
    actions.revoke_key(key)

    assert "__all__" in errors_of(olga.post(page_of("apikey", key.pk), new_key(people, name="renamed")))
    assert ApiKey.objects.get().name == "laptop"


def test_revoking_asks_first(people: People, olga: Client):
    key = people.key(people.bob)
    page = page_of("apikey", key.pk, "revoke")

    asked = olga.get(page)
    assert asked.status_code == 200
    assert "cannot be brought back" in html.unescape(asked.content.decode())
    assert ApiKey.objects.get().revoked_at is None

    assert olga.post(page).headers["location"] == page_of("apikey", key.pk)
    assert ApiKey.objects.get().revoked_at is not None
    assert (last_entry().action, last_entry().actor) == ("key.revoked", people.olga)


def test_rotating_asks_first_and_shows_the_new_key_once(people: People, olga: Client):
    key = people.key(people.bob)
    page = page_of("apikey", key.pk, "rotate")

    assert olga.get(page).status_code == 200
    assert not KEY.search(olga.post(page, {"overlap_hours": "721"}).content.decode())
    assert ApiKey.objects.count() == 1

    answer = olga.post(page, {"overlap_hours": "0"})
    [clear] = KEY.findall(answer.content.decode())
    assert "no-store" in answer.headers["cache-control"]
    sibling = ApiKey.objects.get(replaces=key)
    assert clear.endswith(sibling.last_four)
    assert clear[-49:] not in everything_stored()
    assert ApiKey.objects.get(pk=key.pk).state == "expired"
    assert (last_entry().action, last_entry().actor) == ("key.rotated", people.olga)

    again = olga.post(page, {"overlap_hours": "0"}, follow=True)
    assert not KEY.search(again.content.decode())
    assert "already been rotated" in again.content.decode()
    assert ApiKey.objects.count() == 2


@pytest.mark.parametrize("deed", ["revoke", "rotate"])
def test_a_deed_on_no_key_is_404_and_for_nobody_else(people: People, olga: Client, deed: str):
    key = people.key(people.bob)
    assert olga.get(page_of("apikey", 10**9, deed)).status_code == 404
    owner = Client()
    owner.force_login(people.alice)

    assert owner.post(page_of("apikey", key.pk, deed), {"overlap_hours": "0"}, follow=True).status_code == 403
    assert [one.state for one in ApiKey.objects.all()] == ["active"]


@pytest.mark.parametrize("deed", ["revoke", "rotate"])
def test_a_deed_needs_the_csrf_token(people: People, deed: str):
    key = people.key(people.bob)
    client = Client(enforce_csrf_checks=True)
    client.force_login(people.olga)

    assert client.post(page_of("apikey", key.pk, deed), {"overlap_hours": "0"}).status_code == 403
    assert [one.state for one in ApiKey.objects.all()] == ["active"]


# What is never deleted


def test_what_the_log_refers_to_is_not_deleted(people: People, olga: Client):
    key = people.key(people.bob)
    for model, pk in (("apikey", key.pk), ("user", people.charlie.pk), ("auditentry", last_entry().pk)):
        assert olga.post(page_of(model, pk, "delete"), {"post": "yes"}).status_code == 403
        olga.post(page_of(model, page="changelist"), {"action": "delete_selected", "_selected_action": [pk], "post": "yes"})
    olga.post(page_of("organization", people.acme.pk, "delete"), {"post": "yes"})
    olga.post(
        page_of("organization", page="changelist"), {"action": "delete_selected", "_selected_action": [people.acme.pk], "post": "yes"}
    )

    assert ApiKey.objects.filter(pk=key.pk).exists()
    assert User.objects.filter(pk=people.charlie.pk).exists()
    assert Organization.objects.filter(pk=people.acme.pk).exists()


def test_an_organization_that_never_had_a_key_may_go(people: People, olga: Client):
    assert olga.post(page_of("organization", people.rival.pk, "delete"), {"post": "yes"}).status_code == 302

    assert not Organization.objects.filter(slug="rival").exists()
    assert (last_entry().action, last_entry().subject) == ("organization.deleted", "Rival")


def test_the_record_is_read_only(people: People, olga: Client):
    people.key(people.bob)
    entry = last_entry()

    assert olga.get(page_of("auditentry", page="add")).status_code == 403
    assert olga.post(page_of("auditentry", entry.pk), {"subject": "nothing happened"}).status_code == 403
    assert last_entry().subject == entry.subject


# People


def user_fields(user: User, **fields: object) -> dict[str, object]:
    shown = {
        "email": user.email,
        "name": user.name,
        "is_active": "on" if user.is_active else "",
        "is_superuser": "on" if user.is_superuser else "",
    }
    return {name: value for name, value in {**shown, **fields}.items() if value}


def test_a_person_is_made_with_a_password_that_nobody_sees(people: People, olga: Client):
    password = "a long and quiet sentence"
    fields = {"email": "New@Example.org", "name": "New", "usable_password": "true", "password1": password, "password2": password}

    assert olga.post(page_of("user", page="add"), fields).status_code == 302
    user = User.objects.get(email="new@example.org")
    assert user.check_password(password)
    assert not user.is_superuser
    assert (last_entry().action, last_entry().detail) == ("user.created", {"email": "new@example.org", "name": "New"})
    page = olga.get(page_of("user", user.pk)).content.decode()
    assert user.password not in page
    assert user.password.rpartition("$")[2][:6] not in page


def test_an_e_mail_is_one_persons_in_any_case(people: People, olga: Client):
    fields = {"email": "BOB@Example.org", "usable_password": "false"}
    assert "email" in errors_of(olga.post(page_of("user", page="add"), fields)) | errors_of(
        olga.post(page_of("user", people.vera.pk), user_fields(people.vera, email="Bob@example.org"))
    )
    assert User.objects.filter(email__iexact="bob@example.org").count() == 1


def test_a_person_is_switched_off_and_their_session_with_them(people: People, olga: Client):
    bobs = Client()
    bobs.force_login(people.bob)
    assert bobs.get("/api/organizations").status_code == 200

    assert olga.post(page_of("user", people.bob.pk), user_fields(people.bob, is_active="")).status_code == 302
    assert bobs.get("/api/organizations").status_code == 401
    assert (last_entry().action, last_entry().subject, last_entry().detail) == ("user.changed", "bob@example.org", {"is_active": False})


def test_an_operator_makes_another_and_keeps_their_own_rights(people: People, olga: Client):
    assert olga.post(page_of("user", people.alice.pk), user_fields(people.alice, is_superuser="on")).status_code == 302
    alices = Client()
    alices.force_login(people.alice)
    assert alices.get("/admin/").status_code == 200

    problems = errors_of(olga.post(page_of("user", people.olga.pk), user_fields(people.olga, is_superuser="", is_active="")))
    assert problems.keys() == {"is_superuser", "is_active"}
    assert User.objects.get(pk=people.olga.pk).is_superuser

    alices.post(page_of("user", people.olga.pk), user_fields(people.olga, is_superuser=""))
    assert olga.get("/admin/", follow=True).status_code == 403


def test_a_form_that_was_forged_sets_no_other_field(people: People, olga: Client):
    before = User.objects.filter(pk=people.bob.pk).values().get()
    olga.post(page_of("user", people.bob.pk), user_fields(people.bob, password="x", is_staff="on", groups="1", last_login_0="2030-01-01"))

    assert User.objects.filter(pk=people.bob.pk).values().get() == before


def test_a_new_password_is_recorded_and_ends_the_sessions(people: People, olga: Client):
    bobs = Client()
    bobs.force_login(people.bob)
    page = olga.get(page_of("user", people.bob.pk, "set_password")).headers["location"]
    password = "another long and quiet sentence"

    assert olga.get(page).status_code == 200
    assert olga.post(page, {"password1": password, "password2": "different"}).status_code == 200
    assert not AuditEntry.objects.filter(action="user.password_changed").exists()
    assert olga.post(page, {"usable_password": "true", "password1": password, "password2": password}).status_code == 302

    assert User.objects.get(pk=people.bob.pk).check_password(password)
    assert bobs.get("/api/organizations").status_code == 401
    assert (last_entry().action, last_entry().actor, last_entry().detail) == ("user.password_changed", people.olga, {})
    assert password not in everything_stored()


# Organizations, teams, memberships


def test_an_organizations_time_zone_exists(people: People, olga: Client):
    fields = {"name": "Acme", "slug": "acme", "time_zone": "Mars/Olympus", "is_active": "on"}
    assert "Mars/Olympus" in errors_of(olga.post(page_of("organization", people.acme.pk), fields))["time_zone"][0]

    assert olga.post(page_of("organization", people.acme.pk), {**fields, "time_zone": "Asia/Kolkata"}).status_code == 302
    assert (last_entry().organization, last_entry().detail) == (people.acme, {"time_zone": "Asia/Kolkata"})


def test_a_membership_has_teams_of_its_organization(people: People, olga: Client):
    ml, theirs = Team.objects.create(organization=people.acme, name="ml"), Team.objects.create(organization=people.rival, name="theirs")
    place = people.bob.memberships.get()

    assert "teams" in errors_of(olga.post(page_of("membership", place.pk), {"role": "member", "teams": [theirs.pk]}))
    assert olga.post(page_of("membership", place.pk), {"role": "admin", "teams": [ml.pk]}).status_code == 302
    place.refresh_from_db()
    assert (place.role, list(place.teams.all())) == ("admin", [ml])
    assert (last_entry().action, last_entry().detail) == ("member.changed", {"role": "admin", "teams": ["ml"]})


def test_the_last_owner_stays_one(people: People, olga: Client):
    place = people.alice.memberships.get()

    assert "last owner" in errors_of(olga.post(page_of("membership", place.pk), {"role": "member"}))["role"][0]
    assert Membership.objects.get(pk=place.pk).role == Role.OWNER


def test_a_membership_is_made_and_taken_away(people: People, olga: Client):
    fields = {"organization": people.acme.pk, "user": people.charlie.pk, "role": "viewer"}
    assert olga.post(page_of("membership", page="add"), fields).status_code == 302
    place = Membership.objects.get(user=people.charlie, organization=people.acme)
    assert last_entry().action == "member.created"
    assert last_entry().organization == people.acme

    olga.post(page_of("membership", page="changelist"), {"action": "delete_selected", "_selected_action": [place.pk], "post": "yes"})
    assert not Membership.objects.filter(pk=place.pk).exists()
    assert (last_entry().action, last_entry().subject) == ("member.deleted", "charlie@example.org in Acme")


# Limits


def new_limit(people: People, **fields: object) -> dict[str, object]:
    return {
        "organization": people.acme.pk,
        "team": "",
        "user": "",
        "key": "",
        "metric": "rpm",
        "amount": "60",
        "window": "",
        "mode": "enforce",
        **fields,
    }


def test_money_is_typed_and_shown_in_dollars(people: People, olga: Client):
    fields = new_limit(people, metric="money", amount="8.41", window="month")
    assert olga.post(page_of("limit", page="add"), fields).status_code == 302

    limit = Limit.objects.get()
    assert limit.amount == 8_410_000
    assert 'value="8.41"' in olga.get(page_of("limit", limit.pk)).content.decode()
    assert "8.41 USD per month" in olga.get(page_of("limit", page="changelist")).content.decode()
    assert (last_entry().action, last_entry().actor) == ("limit.set", people.olga)

    assert olga.post(page_of("limit", limit.pk), {"amount": "10", "mode": "shadow"}).status_code == 302
    limit.refresh_from_db()
    assert (limit.amount, limit.mode, limit.window) == (10_000_000, "shadow", "month")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"amount": "many"}, "amount"),
        ({"amount": "-1"}, "amount"),
        ({"amount": "1.5"}, "amount"),
        ({"amount": "9" * 30}, "window"),
        ({"metric": "money", "amount": "0.0000001", "window": "day"}, "amount"),
        ({"metric": "money", "amount": "5"}, "window"),
        ({"window": "day"}, "window"),
    ],
)
def test_a_limit_without_sense_is_explained(people: People, olga: Client, fields: dict[str, object], field: str):
    assert field in errors_of(olga.post(page_of("limit", page="add"), new_limit(people, **fields)))
    assert not Limit.objects.exists()


def test_a_limit_has_one_scope_in_its_organization_and_stands_once(people: People, olga: Client):
    key = people.key(people.bob)
    both = errors_of(olga.post(page_of("limit", page="add"), new_limit(people, user=people.bob.pk, key=key.pk)))
    assert "at most one" in str(both["__all__"])
    assert "user" in errors_of(olga.post(page_of("limit", page="add"), new_limit(people, user=people.charlie.pk)))

    assert olga.post(page_of("limit", page="add"), new_limit(people, key=key.pk)).status_code == 302
    twice = errors_of(olga.post(page_of("limit", page="add"), new_limit(people, key=key.pk, amount="70")))
    assert "already" in str(twice["__all__"])
    assert Limit.objects.get().amount == 60


def test_limits_are_taken_away_and_each_is_recorded(people: People, olga: Client):
    limits = [actions.set_limit(people.acme, Allowance("money", 5, window)) for window in ("day", "week", "month")]
    olga.post(page_of("limit", limits[0].pk, "delete"), {"post": "yes"})
    selected = [limit.pk for limit in limits[1:]]
    olga.post(page_of("limit", page="changelist"), {"action": "delete_selected", "_selected_action": selected, "post": "yes"})

    assert not Limit.objects.exists()
    assert AuditEntry.objects.filter(action="limit.removed", actor=people.olga).count() == 3


# Hostile text


def test_hostile_names_are_shown_as_text(people: People, olga: Client):
    hostile = "<script>alert(1)</script>"
    key = people.key(people.bob, name=hostile, tags=[hostile], expires_at=now() + timedelta(days=1))
    Organization.objects.filter(pk=people.acme.pk).update(name=hostile)

    for page in (
        page_of("apikey", page="changelist"),
        page_of("apikey", key.pk),
        page_of("apikey", key.pk, "revoke"),
        page_of("auditentry", page="changelist"),
        page_of("auditentry", last_entry().pk),
        page_of("membership", page="changelist"),
    ):
        content = olga.get(page).content.decode()
        assert hostile not in content
        assert html.escape(hostile) in content, page
