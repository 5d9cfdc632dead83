"""A model's name becomes targets: alias, prefix, bare name, catch-all, else 404."""

import pytest

from accounts.principal import Principal
from providers.failures import RateLimited
from providers.secrets import SecretText
from proxy.catalog import Alias, Catalog, Upstream
from proxy.errors import InvalidRequest, ModelNotAllowed, ModelNotFound
from proxy.pipeline.route import route, visible_models
from proxy.stores.health import Health

ALICE = Principal(key_id=1, organization_id=1, user_id=1)
CHARLIE = Principal(key_id=2, organization_id=2, user_id=2)


def upstream(number: int, prefix: str, *models: str, **fields) -> Upstream:
    return Upstream(number, "openai", str(number), prefix, "https://x/v1", SecretText(f"s{number}"), models=frozenset(models), **fields)


def names(principal: Principal, model: str, catalog: Catalog, callers_key: str = "") -> list[str]:
    return sorted(
        f"{target.credential_id}:{target.public_model}" for target in route(principal, model, callers_key, catalog, Health()).targets
    )


def test_a_prefixed_name_goes_to_its_pool():
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt"), upstream(2, "a", "gpt"), upstream(3, "b", "gpt")))
    assert names(ALICE, "a/gpt", catalog) == ["1:a/gpt", "2:a/gpt"]


def test_a_bare_name_takes_every_pool_that_lists_it():
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt"), upstream(2, "b", "gpt"), upstream(3, "c", "other")))
    assert names(ALICE, "gpt", catalog) == ["1:a/gpt", "2:b/gpt"]


def test_an_upstreams_name_may_have_slashes_of_its_own():
    catalog = Catalog(upstreams=(upstream(1, "router", "openai/gpt"), upstream(2, "openai", "gpt")))
    assert names(ALICE, "router/openai/gpt", catalog) == ["1:router/openai/gpt"]
    assert names(ALICE, "openai/gpt", catalog) == ["2:openai/gpt"]
    assert names(ALICE, "openai/gpt", Catalog(upstreams=(upstream(1, "router", "openai/gpt"),))) == ["1:router/openai/gpt"]


def test_lists_go_stale_so_an_unlisted_name_is_passed_on_unless_forbidden():
    stale = Catalog(upstreams=(upstream(1, "a", "old"),))
    assert names(ALICE, "a/new", stale) == ["1:a/new"]
    with pytest.raises(ModelNotFound):
        names(ALICE, "a/new", Catalog(upstreams=(upstream(1, "a", "old", listed_only=True),)))


def test_of_a_pool_those_go_first_that_list_the_model():
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt"), upstream(2, "a", "other")))
    assert names(ALICE, "a/gpt", catalog) == ["1:a/gpt"]


def test_an_account_whose_list_is_not_known_stands_beside_those_that_list_the_model():
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt"), upstream(2, "a"), upstream(3, "a", "other")))
    assert sorted(names(ALICE, "a/gpt", catalog)) == ["1:a/gpt", "2:a/gpt"]


def test_an_alias_goes_before_everything_and_keeps_its_order():
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt"), upstream(2, "b", "big")), aliases=(Alias("gpt", ("b/big", "a/gpt")),))
    health = Health()
    for _ in range(3):
        assert [target.public_model for target in route(ALICE, "gpt", "", catalog, health).targets] == ["b/big", "a/gpt"]


def test_an_organizations_own_alias_is_its_own():
    catalog = Catalog(
        upstreams=(upstream(1, "a", "x", "y"),), aliases=(Alias("fast", ("a/x",)), Alias("fast", ("a/y",), organization_id=1))
    )
    assert names(ALICE, "fast", catalog) == ["1:a/y"]
    assert names(CHARLIE, "fast", catalog) == ["1:a/x"]


def test_the_catch_all_takes_what_nobody_knows():
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt"),), aliases=(Alias("*", ("a/gpt",)),))
    assert names(ALICE, "claude-4-sonnet-thinking-max", catalog) == ["1:a/gpt"]
    assert "*" not in dict(visible_models(ALICE, catalog))


def test_unknown_is_404_with_the_parameter_named():
    with pytest.raises(ModelNotFound) as refused:
        names(ALICE, "nope", Catalog())
    assert (refused.value.status, refused.value.code, refused.value.param) == (404, "model_not_found", "model")


def test_another_organizations_credential_does_not_exist_for_a_stranger():
    own, personal = upstream(1, "a", "gpt", organization_id=1), upstream(2, "p", "gpt", organization_id=1, user_id=7)
    catalog = Catalog(upstreams=(own, personal))
    assert names(ALICE, "a/gpt", catalog) == ["1:a/gpt"]
    for model in ("a/gpt", "gpt", "p/gpt"):
        with pytest.raises(ModelNotFound):
            names(CHARLIE, model, catalog)
    with pytest.raises(ModelNotFound):
        names(ALICE, "p/gpt", catalog)
    assert visible_models(CHARLIE, catalog) == []


def test_a_model_list_of_a_key_holds_for_aliases_bare_names_and_prefixes_alike():
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt"), upstream(2, "b", "gpt")), aliases=(Alias("fast", ("b/gpt",)),))
    only_a = Principal(1, 1, 1, models=("a/*",))
    assert names(only_a, "gpt", catalog) == ["1:a/gpt"]
    for model in ("b/gpt", "fast"):
        with pytest.raises(ModelNotAllowed):
            names(only_a, model, catalog)
    with pytest.raises(ModelNotAllowed):  # existing or not looks the same
        names(only_a, "nope", catalog)
    assert names(Principal(1, 1, 1, models=("fast",)), "fast", catalog) == ["2:b/gpt"]
    assert visible_models(only_a, catalog) == [("a/gpt", "a")]


def test_a_callers_own_key_goes_only_where_the_credential_lets_it():
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt", pass_through=True), upstream(2, "b", "gpt")))
    [target] = route(ALICE, "gpt", "sk-mine", catalog, Health()).targets
    assert (target.credential_id, target.secret.reveal(), target.callers_key) == (1, "sk-mine", True)
    with pytest.raises(InvalidRequest):
        names(ALICE, "b/gpt", catalog, "sk-mine")


def test_the_catch_all_is_no_way_round_a_list_of_models():
    catalog = Catalog(upstreams=(upstream(1, "d", "echo", listed_only=True), upstream(2, "o", "big")), aliases=(Alias("*", ("o/big",)),))
    with pytest.raises(ModelNotFound):
        names(Principal(1, 1, 1, models=("d/*",)), "d/anything", catalog)
    assert names(Principal(1, 1, 1, models=("o/*",)), "anything", catalog) == ["2:o/big"]


def test_an_adapter_is_told_what_the_list_says_of_the_model():
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt", details={"gpt": {"context_length": 8}}),))
    [listed], [unlisted] = (route(ALICE, name, "", catalog, Health()).targets for name in ("a/gpt", "a/new"))
    assert (listed.detail, unlisted.detail) == ({"context_length": 8}, {})


# Weights


def turns(catalog: Catalog, model: str, times: int, health: Health | None = None) -> list[list[str]]:
    health = health or Health()
    return [[target.public_model for target in route(ALICE, model, "", catalog, health).targets] for _ in range(times)]


def shared(*weights: int, ranks: tuple[int, ...] = (0, 0, 1), **fields) -> Catalog:
    alias = Alias("fast", ("a/x", "b/y", "c/z")[: len(weights)], ranks=ranks[: len(weights)], weights=weights, **fields)
    return Catalog(upstreams=(upstream(1, "a", "x"), upstream(2, "b", "y"), upstream(3, "c", "z")), aliases=(alias,))


def test_targets_of_one_rank_take_turns_by_weight_and_the_next_rank_stands_behind():
    orders = turns(shared(3, 1, 9), "fast", 40)

    assert [order[0] for order in orders].count("a/x") == 30
    assert [order[0] for order in orders].count("b/y") == 10
    assert {order[2] for order in orders} == {"c/z"}
    assert all(len(order) == 3 for order in orders)  # who has no turn now is the first to stand in


def test_turns_come_evenly_and_not_in_blocks():
    assert [order[0] for order in turns(shared(2, 1, ranks=(0, 0)), "fast", 6)] == ["a/x", "b/y", "a/x"] * 2


def test_each_alias_takes_turns_of_its_own():
    catalog = Catalog(
        upstreams=(upstream(1, "a", "x"), upstream(2, "b", "y")),
        aliases=tuple(
            Alias(name, ("a/x", "b/y"), organization_id=number, ranks=(0, 0), weights=(1, 1))
            for name, number in (("one", None), ("two", 1))
        ),
    )
    health = Health()
    assert [turns(catalog, name, 1, health)[0][0] for name in ("one", "two", "one", "two")] == ["a/x", "a/x", "b/y", "b/y"]


def test_a_target_that_nobody_serves_takes_no_turn():
    catalog = shared(1, 1, 1)
    without = Catalog(upstreams=catalog.upstreams[1:], aliases=catalog.aliases)
    assert turns(without, "fast", 3) == [["b/y", "c/z"]] * 3


def test_a_target_that_rests_goes_last_whatever_its_weight():
    catalog, health = shared(9, 1, 1), Health()
    [target] = route(ALICE, "a/x", "", catalog, health).targets
    health.failed(target, RateLimited("Slow down."), [1])
    assert {order[-1] for order in turns(catalog, "fast", 5, health)} == {"a/x"}


def test_the_catch_all_can_pass_the_name_on():
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt"),), aliases=(Alias("*", ("a/*",)),))
    assert names(ALICE, "claude-4-sonnet-thinking-max", catalog) == ["1:a/claude-4-sonnet-thinking-max"]
    assert names(ALICE, "vendor/model", catalog) == ["1:a/vendor/model"]
    with pytest.raises(ModelNotAllowed):
        names(Principal(1, 1, 1, models=("b/*",)), "anything", catalog)
    with pytest.raises(ModelNotFound):
        names(ALICE, "anything", Catalog(upstreams=(upstream(1, "a", "gpt", listed_only=True),), aliases=catalog.aliases))


def test_what_led_there_is_told():
    catalog = shared(1, drain_seconds=30.0)
    alias = route(ALICE, "fast", "", catalog, Health()).alias
    assert alias is not None
    assert (alias.name, alias.drain_seconds) == ("fast", 30.0)
    assert route(ALICE, "a/x", "", catalog, Health()).alias is None


# Accounts without a secret of their own


def test_an_account_without_a_secret_serves_only_who_brings_one():
    catalog = Catalog(upstreams=(upstream(1, "a", "gpt", pass_through=True, callers_key_only=True), upstream(2, "b", "gpt")))
    assert names(ALICE, "gpt", catalog) == ["2:b/gpt"]
    assert names(ALICE, "a/gpt", catalog, "sk-mine") == ["1:a/gpt"]
    with pytest.raises(InvalidRequest) as refused:
        names(ALICE, "a/gpt", catalog)
    assert refused.value.code == "upstream_key_required"
