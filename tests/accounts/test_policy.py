"""What people write of a key: one canonical form, or a refusal in words."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone

import pytest
from django.core.exceptions import ValidationError
from django.utils.timezone import now

from accounts import policy
from accounts.models import ApiKey
from accounts.policy import Allowance, widened


def complaint(check: Callable[[], object]) -> str:
    with pytest.raises(ValidationError) as problem:
        check()
    return " ".join(problem.value.messages)


def test_words_lose_spaces_doubles_and_empty_entries():
    assert policy.clean_models([" demo/* ", "", "gpt-4o", "demo/*"]) == ["demo/*", "gpt-4o"]
    assert policy.clean_tags(["ci", "ci ", " "]) == ["ci"]


@pytest.mark.parametrize("pattern", ["gpt-4?", "[a-z]", "two words", "bell\a", "x" * 201])
def test_only_the_star_is_a_wildcard(pattern: str):
    assert pattern[:20] in complaint(lambda: policy.clean_models([pattern]))


def test_at_most_a_hundred_patterns():
    assert "100" in complaint(lambda: policy.clean_models(str(number) for number in range(101)))


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("10.1.2.3/8", "10.0.0.0/8"),
        ("192.168.1.7", "192.168.1.7/32"),
        ("2001:DB8::1/32", "2001:db8::/32"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),  # callers are compared by their IPv4 address
    ],
)
def test_a_network_gets_its_canonical_form(written: str, kept: str):
    assert policy.clean_networks([written]) == [kept]


@pytest.mark.parametrize("written", ["10.0.0.0/33", "example.org", "1.2.3", "10.0.0.0/-1"])
def test_what_is_no_network_is_named(written: str):
    assert written in complaint(lambda: policy.clean_networks([written]))


def test_an_expiry_lies_ahead_and_is_kept_in_utc():
    tomorrow = now() + timedelta(days=1)

    assert policy.clean_expiry(None) is None
    assert policy.clean_expiry(tomorrow) == tomorrow
    assert policy.clean_expiry(datetime(2090, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))) == datetime(2090, 1, 1, 10, tzinfo=UTC)
    assert policy.clean_expiry(datetime(2090, 1, 1, 12)) == datetime(2090, 1, 1, 12, tzinfo=UTC)  # noqa: DTZ001 that is the case
    assert "future" in complaint(lambda: policy.clean_expiry(now()))
    assert "hundred years" in complaint(lambda: policy.clean_expiry(datetime.max.replace(tzinfo=UTC)))
    assert "range" in complaint(lambda: policy.clean_expiry(datetime.max.replace(tzinfo=timezone(timedelta(hours=-5)))))


@pytest.mark.parametrize("text", ["tomorrow", "", "2030-13-01", "12:00"])
def test_a_moment_is_written_as_iso_8601(text: str):
    assert "2030-01-31" in complaint(lambda: policy.parse_moment(text))


@pytest.mark.parametrize(
    ("allowance", "word"),
    [
        (Allowance("rps", 1), "rps"),
        (Allowance("rpm", -1), "between 0"),
        (Allowance("rpm", 10**16), "between 0"),
        (Allowance("money", 1), "window"),
        (Allowance("money", 1, "hour"), "window"),
        (Allowance("rpm", 1, "day"), "window"),
        (Allowance("rpm", 1, mode="maybe"), "maybe"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_in_words(allowance: Allowance, word: str):
    assert word in complaint(lambda: policy.clean_allowance(allowance))


def test_two_limits_of_one_metric_and_window_are_refused():
    assert "same metric" in complaint(lambda: policy.clean_allowances([Allowance("rpm", 1), Allowance("rpm", 2)]))
    assert len(policy.clean_allowances([Allowance("money", 1, "day"), Allowance("money", 2, "month")])) == 2


def test_all_complaints_come_at_once():
    with pytest.raises(ValidationError) as problem:
        policy.clean(name="", models=["[x]"], networks=["nowhere"], tags=["ok"])

    assert problem.value.message_dict.keys() == {"name", "models", "networks"}


SOON, LATER = now() + timedelta(days=1), now() + timedelta(days=2)
KEY = ApiKey(allowed_models=["gpt-*", "demo/echo"], allowed_networks=["10.0.0.0/8", "2001:db8::/32"], expires_at=SOON)
LIMITS = [Allowance("rpm", 10), Allowance("money", 100, "day", "shadow")]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other", "tags": ["x"]},
        {"models": ["gpt-4*", "demo/echo"]},
        {"models": ["gpt-*-mini"]},
        {"networks": ["10.1.0.0/16", "2001:db8:1::/48"]},
        {"expires_at": SOON},
        {"limits": [Allowance("rpm", 9), Allowance("money", 100, "day"), Allowance("tpm", 5)]},
    ],
)
def test_what_narrows_a_key_widens_nothing(changes: dict[str, object]):
    assert widened(KEY, LIMITS, changes) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"models": []},
        {"models": ["*"]},
        {"models": ["gpt-4o", "o3"]},
        {"models": ["demo/*"]},
        {"networks": []},
        {"networks": ["0.0.0.0/0"]},
        {"networks": ["11.0.0.0/8"]},
        {"networks": ["2001::/16"]},
        {"expires_at": None},
        {"expires_at": LATER},
        {"limits": []},
        {"limits": [Allowance("rpm", 11), Allowance("money", 100, "day", "shadow")]},
        {"limits": [Allowance("rpm", 10, mode="shadow"), Allowance("money", 100, "day", "shadow")]},
        {"limits": [Allowance("rpm", 10), Allowance("money", 100, "month", "shadow")]},
    ],
)
def test_what_widens_a_key_is_named(changes: dict[str, object]):
    assert widened(KEY, LIMITS, changes) == list(changes)


def test_a_key_without_restrictions_cannot_be_widened():
    assert widened(ApiKey(), [], {"models": ["*"], "networks": ["::/0"], "expires_at": LATER, "limits": []}) == []
