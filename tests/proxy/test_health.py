"""Health orders candidates and never empties the list."""

from collections import Counter

import pytest

from providers.adapter import Target
from providers.failures import CredentialRefused, ForbiddenAtUpstream, ModelGone, ModelNotHere, OutOfCredit, RateLimited, UpstreamServer
from providers.secrets import SecretText
from proxy.catalog import Upstream
from proxy.errors import OverBudget, OverLimit
from proxy.stores.health import Health


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def upstream(number: int, **fields) -> Upstream:
    return Upstream(id=number, kind="openai", label=str(number), prefix="p", base_url="", secret=SecretText("s"), **fields)


def target(number: int, model: str = "m", *, callers_key: bool = False) -> Target:
    return Target("openai", number, str(number), "", SecretText("s"), model, f"p/{model}", callers_key=callers_key)


def ids(ordered) -> list[int]:
    return [one.id for one, _ in ordered]


def test_turns_follow_the_weights():
    health = Health()
    pool = [(upstream(1, weight=3), "m"), (upstream(2), "m")]
    first = Counter(ids(health.order([pool]))[0] for _ in range(40))
    assert first == {1: 30, 2: 10}


def test_a_lower_priority_serves_only_when_the_higher_rests():
    health = Health()
    pool = [(upstream(1, priority=1), "m"), (upstream(2), "m")]
    assert {tuple(ids(health.order([pool]))) for _ in range(4)} == {(1, 2)}
    health.failed(target(1), RateLimited("slow down"), [1, 2])
    assert ids(health.order([pool])) == [2, 1]


@pytest.mark.parametrize(
    "problem", [ForbiddenAtUpstream("no"), ModelGone("no"), ModelNotHere("no"), RateLimited("no"), OutOfCredit("no", status=402)]
)
def test_a_failure_about_one_model_leaves_the_others_in_place(problem):
    health = Health()
    health.failed(target(1, "bad"), problem, [1, 2])
    assert ids(health.order([[(upstream(1), "bad"), (upstream(2), "bad")]])) == [2, 1]
    first = {ids(health.order([[(upstream(1), "good"), (upstream(2), "good")]]))[0] for _ in range(4)}
    assert first == {1, 2}


def test_a_refused_credential_rests_with_all_its_models_while_another_can_serve():
    health = Health()
    health.failed(target(1, "a"), CredentialRefused("no"), [1, 2])
    assert ids(health.order([[(upstream(1), "b"), (upstream(2), "b")]])) == [2, 1]


@pytest.mark.parametrize("problem", [CredentialRefused("no"), ForbiddenAtUpstream("no"), RateLimited("no"), OutOfCredit("no")])
def test_the_last_candidate_is_tried_whatever_it_did(problem):
    health = Health()
    health.failed(target(1), problem, [1])
    assert ids(health.order([[(upstream(1), "m")]])) == [1]


def test_a_long_rest_that_the_upstream_named_is_kept_to():
    clock = Clock()
    health = Health(clock)
    health.failed(target(1), RateLimited("no", retry_after_seconds=40), [1])
    with pytest.raises(OverLimit) as refused:
        health.order([[(upstream(1), "m")]])
    assert refused.value.retry_after_seconds == pytest.approx(40)
    assert ids(health.order([[(upstream(1), "other")]])) == [1]
    clock.now += 36  # four seconds are left: too short to refuse a call
    assert ids(health.order([[(upstream(1), "m")]])) == [1]


def test_a_named_rest_for_want_of_quota_says_so():
    health = Health()
    health.failed(target(1), OutOfCredit("no", retry_after_seconds=3600), [1])
    with pytest.raises(OverBudget) as refused:
        health.order([[(upstream(1), "m")]])
    assert (refused.value.status, refused.value.should_retry) == (429, False)


def test_five_gateway_errors_in_a_row_eject_but_never_more_than_half_a_pool():
    clock = Clock()
    health = Health(clock)
    pool = [(upstream(number), "m") for number in (1, 2, 3)]
    for number in (1, 2):
        for _ in range(5):
            health.failed(target(number), UpstreamServer("500"), [1, 2, 3])
    assert {ids(health.order([pool]))[-1] for _ in range(6)} == {1}
    clock.now += 31
    assert {ids(health.order([pool]))[0] for _ in range(6)} == {1, 2, 3}


def test_a_success_between_starts_the_count_again():
    health = Health()
    for _ in range(3):
        for _ in range(4):
            health.failed(target(1), UpstreamServer("500"), [1, 2])
        health.succeeded(target(1))
    assert {ids(health.order([[(upstream(1), "m"), (upstream(2), "m")]]))[0] for _ in range(4)} == {1, 2}


def test_the_callers_own_account_says_nothing_about_ours():
    health = Health()
    health.failed(target(1, callers_key=True), RateLimited("no", retry_after_seconds=99), [1])
    assert ids(health.order([[(upstream(1), "m")]])) == [1]


def test_and_ours_says_nothing_about_the_callers():
    health, ours = Health(), [[(upstream(1), "m")]]
    health.failed(target(1), RateLimited("no", retry_after_seconds=99), [1])
    assert ids(health.order(ours, own_key=True)) == [1]
    health.succeeded(target(1, callers_key=True))
    with pytest.raises(OverLimit):
        health.order(ours)


def test_that_an_upstream_is_well_again_may_be_seen_with_anybodys_key():
    clock = Clock()
    health, pool = Health(clock), [(upstream(number), "m") for number in (1, 2)]
    for _ in range(5):
        health.failed(target(1), UpstreamServer("500"), [1, 2])
    assert {ids(health.order([pool], own_key=True))[0] for _ in range(4)} == {2}
    health.succeeded(target(1, callers_key=True))
    assert {ids(health.order([pool]))[0] for _ in range(4)} == {1, 2}


def test_a_rest_can_be_cleared_by_hand():
    health = Health()
    health.failed(target(1), RateLimited("no", retry_after_seconds=99), [1])
    health.clear(1)
    assert ids(health.order([[(upstream(1), "m")]])) == [1]


def test_f11_after_an_ejection_one_call_finds_out_and_the_others_wait_for_it():
    clock = Clock()
    health = Health(clock)
    pool = [(upstream(number), "m") for number in (1, 2)]
    for _ in range(5):
        health.failed(target(1), UpstreamServer("500"), [1, 2])
    assert {ids(health.order([pool]))[0] for _ in range(4)} == {2}
    clock.now += 31
    assert [ids(health.order([pool]))[0] for _ in range(4)] == [1, 2, 2, 2]
    health.failed(target(1), UpstreamServer("500"), [1, 2])  # not yet: it waits for longer now
    clock.now += 31
    assert {ids(health.order([pool]))[0] for _ in range(4)} == {2}
    clock.now += 31
    assert ids(health.order([pool]))[0] == 1
    health.succeeded(target(1))
    assert {ids(health.order([pool]))[0] for _ in range(4)} == {1, 2}


def test_a_trial_call_whose_outcome_never_comes_is_made_again():
    clock = Clock()
    health = Health(clock)
    pool = [(upstream(number), "m") for number in (1, 2)]
    for _ in range(5):
        health.failed(target(1), UpstreamServer("500"), [1, 2])
    clock.now += 31
    assert ids(health.order([pool]))[0] == 1
    clock.now += 31
    assert ids(health.order([pool]))[0] == 1


def test_f10_extra_attempts_are_a_fifth_of_the_calls_and_at_least_three_a_second():
    clock = Clock()
    health = Health(clock)
    one = target(1)
    extra = 0
    for _ in range(2000):  # ten seconds of 200 a second
        clock.now += 1 / 200
        health.begins(one)
        extra += health.may_try_again(one) + health.may_try_again(one)
    assert 300 <= extra <= 400 + 3
    clock.now += 10
    health.begins(one)
    assert [health.may_try_again(one) for _ in range(4)] == [True, True, True, False]


def test_a_rest_that_this_process_finds_out_is_told_and_one_that_was_heard_of_is_kept_to():
    told = []
    health = Health(told=lambda *news: told.append(news))
    health.failed(target(1), RateLimited("no", retry_after_seconds=40), [1])
    assert told == [(1, "m", 40, True, RateLimited.code, 0)]
    other = Health()
    other.rest(1, "m", 40, named=True, reason=RateLimited.code)
    with pytest.raises(OverLimit):
        other.order([[(upstream(1), "m")]])
    other.wake(1, "m")
    assert ids(other.order([[(upstream(1), "m")]])) == [1]


def ejected(health: Health, number: int = 1) -> None:
    for _ in range(5):
        health.failed(target(number), UpstreamServer("500"), [1, 2])


def test_an_ejection_is_told_with_how_many_it_is_and_so_is_a_delay_that_a_gateway_error_named():
    clock, told = Clock(), []
    health = Health(clock, told=lambda *news: told.append(news))
    ejected(health)
    clock.now += 31
    health.order([[(upstream(1), "m"), (upstream(2), "m")]])
    health.failed(target(1), UpstreamServer("500"), [1, 2])
    health.failed(target(2), UpstreamServer("503", retry_after_seconds=40), [1, 2])
    assert told == [(1, "", 30, False, "ejected", 1), (1, "", 60, False, "ejected", 2), (2, "m", 40, False, UpstreamServer.code, 0)]


def test_an_ejection_that_was_heard_of_ends_with_a_trial_and_the_next_one_is_longer():
    clock = Clock()
    health = Health(clock)
    pool = [[(upstream(1), "m"), (upstream(2), "m")]]
    health.rest(1, "", 30, named=False, reason="ejected", times=3)
    assert {ids(health.order(pool))[0] for _ in range(4)} == {2}
    clock.now += 31
    assert [ids(health.order(pool))[0] for _ in range(3)] == [1, 2, 2]
    health.failed(target(1), UpstreamServer("500"), [1, 2])
    clock.now += 4 * 30 - 1
    assert ids(health.order(pool))[0] == 2
    clock.now += 2
    assert ids(health.order(pool))[0] == 1


def test_one_that_was_heard_of_counts_to_the_half_that_may_be_out():
    health = Health()
    health.rest(2, "", 30, named=False, reason="ejected", times=1)
    ejected(health)
    assert health.resting().keys() == {(2, "")}


def test_with_a_rest_that_is_cleared_goes_what_was_counted():
    clock, told = Clock(), []
    health = Health(clock, told=lambda *news: told.append(news))
    health.rest(1, "", 30, named=False, reason="ejected", times=7)
    health.wake(1, "")
    for _ in range(4):
        health.failed(target(1), UpstreamServer("500"), [1, 2])
    assert (health.resting(), told) == ({}, [])
    health.failed(target(1), UpstreamServer("500"), [1, 2])
    assert told == [(1, "", 30, False, "ejected", 1)]


def test_a_call_that_goes_well_tells_which_rests_it_ended():
    clock, ended = Clock(), []
    health = Health(clock)
    health.ended = lambda *news: ended.append(news)
    health.succeeded(target(1))
    health.failed(target(1), RateLimited("no", retry_after_seconds=40), [1, 2])
    health.failed(target(1, "other"), RateLimited("no", retry_after_seconds=40), [1, 2])
    ejected(health)
    clock.now += 10
    health.succeeded(target(1))
    assert ended == [(1, "", 20), (1, "m", 30)]


def test_calls_that_fail_while_an_account_is_out_do_not_keep_it_out_for_longer():
    clock, told = Clock(), []
    health = Health(clock, told=lambda *news: told.append(news))
    ejected(health)
    for _ in range(20):  # they were under way
        health.failed(target(1), UpstreamServer("500"), [1, 2])
    assert len(told) == 1
    clock.now += 31
    assert ids(health.order([[(upstream(1), "m"), (upstream(2), "m")]]))[0] == 1
