"""A key that was issued elsewhere: it works as it is, and every page says what it is."""

from __future__ import annotations

import json

import pytest
from django.core.exceptions import ValidationError
from django.test import Client

from accounts import actions
from accounts.models import ApiKey, AuditEntry, User
from accounts.principal import digest, is_plausible
from proxy import snapshot
from tests.accounts.conftest import People

CLEAR = "an-imported-key-0123"


def imported(people: People, clear: str = CLEAR) -> tuple[ApiKey, bool]:
    return actions.import_key(organization=people.acme, user=people.bob, name="old", clear=clear, actor=people.olga)


def browser(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def test_it_is_kept_as_a_digest_alone_and_found_by_it(people: People):
    key, is_new = imported(people)
    catalog = snapshot.load()

    assert is_new
    assert (key.handle, key.is_imported, key.last_four, key.expires_at, key.state) == (None, True, "0123", None, "active")
    assert catalog.principals[digest(catalog.peppers[0], CLEAR)].key_id == key.pk
    assert CLEAR not in str(ApiKey.objects.values().get())
    entry = AuditEntry.objects.get(action="key.imported")
    assert (entry.actor, entry.detail) == (people.olga, {"user": "bob@example.org", "weak": False})


def test_a_key_that_is_known_is_left_as_it_is_whoever_has_it(people: People):
    key, _ = imported(people)
    again, is_new = actions.import_key(organization=people.rival, user=people.charlie, name="mine", clear=CLEAR)
    assert (again, is_new) == (key, False)
    assert ApiKey.objects.count() == 1

    issued, clear = actions.issue_key(organization=people.acme, user=people.bob, name="ours")
    assert imported(people, clear) == (issued, False)


def test_many_imported_keys_stand_beside_each_other(people: People):
    for number in range(3):
        assert imported(people, f"{CLEAR}{number}")[1]


@pytest.mark.parametrize("clear", ["", " padded", "padded ", "a\nb", "ü", "x" * 513])
def test_what_no_header_carries_is_refused(people: People, clear: str):
    with pytest.raises(ValidationError):
        imported(people, clear)
    assert not ApiKey.objects.exists()


def test_nobody_gets_one_who_could_not_use_it(people: People):
    with pytest.raises(ValidationError):
        actions.import_key(organization=people.acme, user=people.vera, name="old", clear=CLEAR)
    with pytest.raises(ValidationError):
        actions.import_key(organization=people.acme, user=people.charlie, name="old", clear=CLEAR)


def test_it_is_revoked_and_rotated_as_any_other(people: People):
    key, _ = imported(people)
    sibling, clear = actions.rotate_key(key)
    assert is_plausible(clear)
    assert not sibling.is_imported
    actions.revoke_key(key)
    assert snapshot.load_principal(key.pk) is None


def test_every_page_says_that_it_was_imported(people: People):
    key, _ = imported(people)
    issued = people.key(people.bob)
    bob, olga = browser(people.bob), browser(people.olga)

    page = bob.get(f"/keys/{key.pk}/").content.decode()
    assert ">imported</span>" in page
    assert "imported …0123" in page
    assert ">imported</span>" not in bob.get(f"/keys/{issued.pk}/").content.decode()
    assert "imported …0123" in bob.get("/keys/").content.decode()
    assert "imported …0123" in olga.get("/admin/accounts/apikey/").content.decode()
    assert "imported …0123" in olga.get(f"/admin/accounts/apikey/{key.pk}/change/").content.decode()
    listed = json.loads(bob.get("/api/organizations/acme/keys").content)["data"]
    assert {one["id"]: (one["imported"], one["hint"]) for one in listed}[key.pk] == (True, "imported …0123")
    assert not {one["id"]: one["imported"] for one in listed}[issued.pk]


def test_of_a_short_one_nothing_is_shown(people: People):
    key, _ = imported(people, "hunter2")
    assert (key.last_four, key.hint) == ("", "imported")
    assert "ter2" not in browser(people.bob).get(f"/keys/{key.pk}/").content.decode()
