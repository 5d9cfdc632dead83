"""The freeze switch: whose calls are refused, what is left out, and that all of it thaws by itself."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from accounts import actions as accounts
from accounts.models import AuditEntry, Limit, Team
from accounts.principal import Principal
from providers import actions as providers
from providers.models import Credential
from proxy import catalog as catalogs
from proxy import snapshot
from proxy.catalog import Alias, Catalog
from proxy.errors import Frozen
from proxy.models import FrozenModel
from proxy.pipeline import route as routing
from proxy.pipeline.authenticate import check_not_frozen
from proxy.pipeline.route import route
from proxy.stores.health import Health
from tests.accounts.conftest import People
from tests.proxy.test_route import ALICE, CHARLIE, upstream

NOW = 1_800_000_000.0


class Time:
    def __init__(self) -> None:
        self.now = NOW

    def time(self) -> float:
        return self.now


@pytest.fixture
def people(db: None) -> People:
    return People()


@pytest.fixture
def clock(monkeypatch) -> Time:
    one = Time()
    for module in (routing, catalogs):
        monkeypatch.setattr(module, "time", one)
    return one


def ids(principal: Principal, model: str, catalog: Catalog) -> set[int]:
    return {target.credential_id for target in route(principal, model, "", catalog, Health()).targets}


def test_a_frozen_account_is_left_out_and_comes_back_by_itself(clock):
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt", frozen_until=NOW + 60), upstream(2, "a", "gpt")))
    assert ids(ALICE, "a/gpt", catalog) == {2}
    clock.now += 61
    assert ids(ALICE, "a/gpt", catalog) == {1, 2}


def test_with_all_accounts_frozen_it_is_said_for_how_long(clock):
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt", frozen_until=NOW + 60), upstream(2, "a", "gpt", frozen_until=NOW + 30)))
    with pytest.raises(Frozen) as refused:
        ids(ALICE, "a/gpt", catalog)
    assert (refused.value.status, refused.value.code, refused.value.retry_after_seconds) == (403, "frozen", 30)
    clock.now += 31
    assert ids(ALICE, "a/gpt", catalog) == {2}
    clock.now += 30
    assert ids(ALICE, "a/gpt", catalog) == {1, 2}


@pytest.mark.parametrize(("pattern", "left"), [("a/gpt", {2}), ("a/*", {2}), ("b/*", {1}), ("other", {1, 2})])
def test_a_frozen_model_is_left_out_of_an_alias(clock, pattern, left):
    catalog = Catalog(
        upstreams=(upstream(1, "a", "gpt"), upstream(2, "b", "gpt")),
        aliases=(Alias("fast", ("a/gpt", "b/gpt")),),
        frozen=(catalogs.FrozenModel(pattern, NOW + 60),),
    )
    assert ids(ALICE, "fast", catalog) == left


def test_a_frozen_alias_and_a_freeze_for_one_organization(clock):
    catalog = Catalog(
        upstreams=(upstream(1, "a", "gpt"),),
        aliases=(Alias("fast", ("a/gpt",)),),
        frozen=(catalogs.FrozenModel("fast", NOW + 60, organization_id=1),),
    )
    with pytest.raises(Frozen):
        ids(ALICE, "fast", catalog)
    assert ids(ALICE, "a/gpt", catalog) == {1}
    assert ids(CHARLIE, "fast", catalog) == {1}


@pytest.mark.django_db
@pytest.mark.parametrize("what", ["key", "team", "organization"])
def test_a_freeze_above_a_key_reaches_its_calls_and_is_in_the_record(people: People, what: str):
    team = Team.objects.create(organization=people.acme, name="t")
    people.bob.memberships.get(organization=people.acme).teams.add(team)
    key = people.key(people.bob)
    accounts.change_key(key, team=team)
    key.refresh_from_db()
    thing = {"key": key, "team": team, "organization": people.acme}[what]
    before = snapshot.version()
    accounts.freeze(thing, length=timedelta(minutes=5), reason="audit", actor=people.amy)
    assert snapshot.version() > before
    principal = snapshot.load().principals[bytes(key.digest)]
    with pytest.raises(Frozen, match="audit") as refused:
        check_not_frozen(principal)
    assert 290 < refused.value.retry_after_seconds <= 300
    assert accounts.thaw(thing, actor=people.amy)
    assert not accounts.thaw(thing)
    check_not_frozen(snapshot.load().principals[bytes(key.digest)])
    assert [entry.action for entry in AuditEntry.objects.order_by("pk")][-2:] == [f"{what}.frozen", f"{what}.thawed"]


@pytest.mark.django_db
def test_a_freeze_that_is_over_freezes_nobody(people: People):
    key = people.key(people.bob)
    type(key).objects.filter(pk=key.pk).update(frozen_until=timezone.now() - timedelta(seconds=1))
    assert snapshot.load().principals[bytes(key.digest)].frozen_until is None
    key.refresh_from_db()
    assert key.state == "active"


@pytest.mark.django_db
def test_rotating_a_frozen_key_does_not_thaw_it(people: People):
    key = people.key(people.bob)
    accounts.freeze(key, length=timedelta(minutes=5), actor=people.bob)
    sibling, _ = accounts.rotate_key(key)
    assert (sibling.state, sibling.frozen_by) == ("frozen", people.bob)


@pytest.mark.django_db
def test_frozen_accounts_and_models_reach_the_catalog():
    credential = Credential.objects.create(kind="demo", label="one", prefix="one")
    until = providers.freeze(credential, length=timedelta(minutes=5), reason="spend")
    FrozenModel.objects.create(pattern="one/*", until=timezone.now() + timedelta(minutes=1))
    FrozenModel.objects.create(pattern="two/*", until=timezone.now() - timedelta(minutes=1))
    found = snapshot.load()
    assert found.upstreams[0].frozen_until == until.timestamp()
    assert [one.pattern for one in found.frozen] == ["one/*"]
    assert providers.thaw(credential)
    assert not providers.thaw(credential)
    assert AuditEntry.objects.filter(action__in=["credential.frozen", "credential.thawed"]).count() == 2


@pytest.mark.django_db
def test_the_admins_lists_freeze_and_thaw(people: People):
    client = Client()
    client.force_login(people.olga)
    key = people.key(people.bob)
    credential = Credential.objects.create(kind="demo", label="one", prefix="one")
    places = [("accounts_apikey", key, "freeze_for_hour"), ("accounts_organization", people.acme, "freeze_for_day")]
    places += [("providers_credential", credential, "freeze_for_an_hour")]
    for model, thing, freeze in places:
        address = f"/admin/{model.replace('_', '/')}/"
        client.post(address, {"action": freeze, "_selected_action": [thing.pk]})
        thing.refresh_from_db()
        assert thing.is_frozen, model
        client.post(address, {"action": "thaw_chosen", "_selected_action": [thing.pk]})
        thing.refresh_from_db()
        assert not thing.is_frozen, model
    assert Limit.objects.count() == 0
