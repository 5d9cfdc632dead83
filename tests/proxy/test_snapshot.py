"""Rows -> what the hot path reads: who counts, who does not, and that every change is announced with its commit."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from django.conf import settings
from django.db import transaction
from django.utils import timezone

from accounts import models as accounts
from accounts.principal import digest, mint
from providers import models as providers
from providers.secrets import redact, seal
from proxy import snapshot
from proxy.catalog import Catalog, Current
from proxy.models import Route, RouteTarget

pytestmark = pytest.mark.django_db


@pytest.fixture
def alice() -> accounts.Membership:
    user = accounts.User.objects.create_user("alice@example.org", "x")
    organization = accounts.Organization.objects.create(slug="a", name="A", time_zone="Europe/Berlin")
    return accounts.Membership.objects.create(user=user, organization=organization, role="member")


def key_of(membership: accounts.Membership, **fields) -> tuple[accounts.ApiKey, bytes]:
    key, handle = mint()
    pepper_id, pepper = next(iter(settings.KEYRING.keys("pepper").items()))
    row = accounts.ApiKey.objects.create(
        organization=membership.organization,
        user=membership.user,
        name="k",
        handle=handle,
        digest=digest(pepper, key),
        pepper_id=pepper_id,
        last_four=key[-4:],
        **fields,
    )
    return row, bytes(row.digest)


def is_live(key: bytes) -> bool:
    in_catalog = key in snapshot.load().principals
    assert (snapshot.load_key([key]) is not None) == in_catalog  # the loader and the catalog agree
    return in_catalog


def test_a_key_lives_only_while_all_above_it_does(alice):
    row, key = key_of(alice)
    assert is_live(key)
    for thing, change in [
        (alice.user, {"is_active": False}),
        (alice.organization, {"is_active": False}),
        (alice, {"role": "viewer"}),
        (row, {"revoked_at": timezone.now()}),
        (row, {"expires_at": timezone.now() - timedelta(seconds=1)}),
    ]:
        before = {name: getattr(thing, name) for name in change}
        type(thing).objects.filter(pk=thing.pk).update(**change)
        assert not is_live(key), change
        type(thing).objects.filter(pk=thing.pk).update(**before)
        assert is_live(key)
    alice.delete()
    assert not is_live(key)


def test_a_role_elsewhere_does_not_keep_a_key_alive(alice):
    _, key = key_of(alice)
    other = accounts.Organization.objects.create(slug="b", name="B")
    accounts.Membership.objects.create(user=alice.user, organization=other, role="owner")
    accounts.Membership.objects.filter(pk=alice.pk).update(role="viewer")
    assert not is_live(key)


def test_a_principal_carries_every_limit_above_it_in_its_organizations_time(alice):
    team = accounts.Team.objects.create(organization=alice.organization, name="t")
    row, key = key_of(alice, team=team, allowed_models=["a/*"], allowed_networks=["10.0.0.1/8"])
    other_row, _ = key_of(alice)
    for scope in ({}, {"team": team}, {"user": alice.user}, {"key": row}, {"key": other_row}):
        accounts.Limit.objects.create(
            organization=alice.organization, metric="rpm", amount=5, mode="shadow" if scope == {} else "enforce", **scope
        )
    accounts.Limit.objects.create(organization=alice.organization, key=row, metric="money", window="day", amount=9)

    principal = snapshot.load().principals[key]
    scopes = {f"organization:{alice.organization.pk}", f"team:{team.pk}", f"user:{alice.user.pk}@{alice.organization.pk}", f"key:{row.pk}"}
    assert {limit.scope for limit in principal.limits} == scopes
    assert {limit.time_zone for limit in principal.limits} == {"Europe/Berlin"}
    assert [limit.scope for limit in principal.limits if not limit.enforce] == [f"organization:{alice.organization.pk}"]
    assert (principal.models, str(principal.networks[0])) == (("a/*",), "10.0.0.0/8")
    assert {limit.metric for limit in snapshot.load().money_limits()} == {"money"}


def test_upstreams_come_with_their_secrets_open_and_a_broken_seal_leaves_one_out():
    keys = settings.KEYRING.keys("seal")
    good, broken = (providers.Credential.objects.create(label=name, kind="openai", prefix=name) for name in ("good", "broken"))
    providers.Credential.objects.filter(pk=good.pk).update(secret=seal("s-good", good.place(), keys))
    providers.Credential.objects.filter(pk=broken.pk).update(secret=seal("s-good", good.place(), keys))  # copied from the other row
    providers.UpstreamModel.objects.create(credential=good, upstream_id="gpt", detail={"context_length": 8})
    providers.Credential.objects.create(label="off", kind="openai", prefix="off", state="disabled")

    [upstream] = snapshot.load().upstreams
    assert (upstream.prefix, upstream.secret.reveal(), upstream.models) == ("good", "s-good", {"gpt"})
    assert upstream.details == {"gpt": {"context_length": 8}}
    assert "s-good" not in repr(upstream)


@pytest.mark.parametrize("state", ["active", "needs_reauth"])
def test_settings_that_are_secrets_are_taken_out_of_texts(state: str):
    kept = {"client_id": "an-open-client-id", "client_secret": f"a client's word, {state}"}
    providers.Credential.objects.create(label="g", kind="gemini_cli", prefix="g", state=state, settings=kept)
    snapshot.load()
    assert redact(f"an-open-client-id, (a client's word, {state})") == "an-open-client-id, ([redacted])"


def test_an_alias_keeps_the_order_of_its_targets():
    route = Route.objects.create(name="fast")
    for position, model in ((2, "c/z"), (1, "a/x")):
        RouteTarget.objects.create(route=route, position=position, model=model)
    [alias] = snapshot.load().aliases
    assert alias.targets == ("a/x", "c/z")


def test_every_watched_change_moves_the_version_and_a_sign_in_does_not(alice):
    seen = snapshot.version()

    def moved() -> bool:
        nonlocal seen
        before, seen = seen, snapshot.version()
        return seen > before

    row, _ = key_of(alice)
    assert moved()
    row.name = "other"
    row.save(update_fields=["name"])
    assert moved()
    accounts.changed.send(sender=accounts.ApiKey)
    assert moved()
    providers.Price.objects.create(pattern="a", input=1, output=1)
    assert moved()
    alice.teams.add(accounts.Team.objects.create(organization=alice.organization, name="t"))
    assert moved()
    alice.user.last_login = timezone.now()
    alice.user.save(update_fields=["last_login"])
    assert not moved()
    alice.delete()
    assert moved()


@pytest.mark.django_db(transaction=True)
def test_a_change_that_is_rolled_back_moves_nothing():
    seen = snapshot.version()
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        accounts.Organization.objects.create(slug="x", name="x")
        assert snapshot.version() > seen
        raise ZeroDivisionError
    assert snapshot.version() == seen


def test_pages_ask_the_catalog_of_the_server_that_runs_beside_them(monkeypatch: pytest.MonkeyPatch):
    kept = Catalog(version=-1)
    refresher = snapshot.Refresher(Current(kept), lambda catalog: None)
    seen = []

    def is_over() -> bool:
        seen.append(snapshot.in_force())
        return True

    monkeypatch.setattr(refresher, "_is_over", is_over)
    monkeypatch.setattr(snapshot, "connection", SimpleNamespace(close=lambda: None))
    refresher.run()

    assert seen == [kept]
    assert snapshot.in_force().version == snapshot.version()  # it runs no more
