"""Calls that belong together stay with one account of a sticky pool, softly."""

from collections import Counter
from typing import Any

import pytest
from django.core.exceptions import ValidationError

from accounts.principal import Principal
from providers import given, registry
from providers.adapter import Target
from providers.failures import RateLimited
from providers.secrets import SecretText
from proxy.catalog import Catalog, Upstream
from proxy.pipeline.route import route
from proxy.stores.health import Health

ALICE = Principal(key_id=1, organization_id=1, user_id=1)


def pool(*numbers: int, sticky: str = "user", **fields: Any) -> Catalog:
    return Catalog(
        upstreams=tuple(
            Upstream(number, "openai", str(number), "p", "https://x/v1", SecretText("s"), sticky=sticky, **fields) for number in numbers
        )
    )


def asked(catalog: Catalog, health: Health, *, principal: Principal = ALICE, model: str = "p/m", **body: Any) -> int:
    """Which account the call goes to first."""
    return route(principal, model, "", catalog, health, body).targets[0].credential_id


def of_users(catalog: Catalog, health: Health, count: int = 300) -> list[int]:
    return [asked(catalog, health, user=f"u{number}") for number in range(count)]


def target(number: int) -> Target:
    return Target("openai", number, str(number), "", SecretText("s"), "m", "p/m")


@pytest.mark.parametrize("how", ["user", "prompt_cache_key"])
def test_calls_with_the_same_field_stay_with_one_account_and_without_it_take_turns(how: str):
    catalog, health = pool(1, 2, 3, sticky=how), Health()
    for value in ("ann", "bob", 7):
        assert len({asked(catalog, health, **{how: value}) for _ in range(6)}) == 1
    assert {asked(catalog, health) for _ in range(3)} == {asked(catalog, health, **{how: ""}) for _ in range(3)} == {1, 2, 3}
    assert {asked(catalog, health, **{how: ["no", "name"]}) for _ in range(3)} == {1, 2, 3}


def test_calls_of_one_key_stay_with_one_account():
    catalog, health = pool(1, 2, 3, sticky="key"), Health()
    keys = [Principal(key_id=number, organization_id=1, user_id=1) for number in range(1, 40)]
    homes = [{asked(catalog, health, principal=key, user=str(number)) for number in range(4)} for key in keys]
    assert {len(home) for home in homes} == {1}
    assert set.union(*homes) == {1, 2, 3}


def test_all_processes_agree_for_good():
    """What is drawn must not change with a restart or a release: everybody's caches would be lost."""
    assert of_users(pool(1, 2, 3), Health(), 16) == [3, 3, 1, 1, 3, 3, 2, 3, 1, 2, 1, 1, 1, 3, 3, 3]


def test_shares_follow_the_weights():
    upstreams = (*pool(1, weight=3).upstreams, *pool(2).upstreams)
    counts = Counter(of_users(Catalog(upstreams=upstreams), Health(), 2000))
    assert counts[1] / counts[2] == pytest.approx(3, rel=0.15)


def test_an_account_that_comes_or_goes_moves_no_others_calls():
    two, three = of_users(pool(1, 2), Health()), of_users(pool(1, 2, 3), Health())
    assert [now for before, now in zip(two, three, strict=True) if now != before] == [3] * three.count(3)
    assert 60 < three.count(3) < 140


def test_one_that_rests_is_passed_over_and_has_its_calls_back_when_it_is_well():
    catalog, health = pool(1, 2, 3), Health()
    before = of_users(catalog, health)
    health.failed(target(2), RateLimited("slow down"), [1, 2, 3])
    meanwhile = of_users(catalog, health)
    health.succeeded(target(2))

    assert of_users(catalog, health) == before
    assert [there for home, there in zip(before, meanwhile, strict=True) if home != 2] == [home for home in before if home != 2]
    assert {there for home, there in zip(before, meanwhile, strict=True) if home == 2} == {1, 3}


def test_a_better_priority_goes_before_any_home():
    catalog, health = Catalog(upstreams=(*pool(1, 2).upstreams, *pool(3, priority=1).upstreams)), Health()
    assert set(of_users(catalog, health)) == {3}


def test_organizations_and_models_are_told_apart():
    catalog, health = pool(1, 2, 3), Health()
    other = Principal(key_id=2, organization_id=2, user_id=2)
    users = [f"u{number}" for number in range(60)]
    mine = [asked(catalog, health, user=user) for user in users]
    assert mine != [asked(catalog, health, principal=other, user=user) for user in users]
    assert mine != [asked(catalog, health, model="p/n", user=user) for user in users]


def test_the_account_that_a_call_is_bound_to_is_named_also_while_it_rests():
    catalog, health = pool(1, 2), Health()
    home = asked(catalog, health, user="ann")
    health.failed(target(home), RateLimited("slow down"), [1, 2])
    routed = route(ALICE, "p/m", "", catalog, health, {"user": "ann"})
    assert (routed.home, routed.targets[0].credential_id) == (home, 3 - home)
    assert route(ALICE, "p/m", "", catalog, health, {}).home is None
    assert route(ALICE, "p/m", "", pool(1), health, {"user": "ann"}).home is None
    assert route(ALICE, "p/m", "", pool(1, 2, sticky=""), Health(), {"user": "ann"}).home is None


def test_the_setting_is_one_of_three_words():
    adapter = registry.adapter("openai")
    for word in ("key", "user", "prompt_cache_key"):
        assert given.settings(adapter, {"sticky": word}) == {"sticky": word}
    with pytest.raises(ValidationError, match="one of key, user, prompt_cache_key"):
        given.settings(adapter, {"sticky": "always"})
