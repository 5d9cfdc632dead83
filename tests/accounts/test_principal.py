"""The key's format and what a principal may use."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounts.principal import ALPHABET, KEY_LENGTH, PREFIX, Principal, checksum, digest, is_plausible, mint


def may_use(model: str, *patterns: str) -> bool:
    return Principal(key_id=1, organization_id=1, user_id=1, models=patterns).may_use(model)


def test_a_new_key_has_the_published_form():
    key, handle = mint()

    assert key.startswith(PREFIX + handle)
    assert len(handle) == 10
    assert len(key) == KEY_LENGTH == len("sk-sluice-") + 10 + 43 + 6
    assert set(key.removeprefix(PREFIX)) <= set(string.digits + string.ascii_letters)
    assert is_plausible(key)


def test_no_two_keys_are_alike():
    assert len({mint()[0] for _ in range(1000)}) == 1000


@given(position=st.integers(0, KEY_LENGTH - len(PREFIX) - 1), sign=st.sampled_from(ALPHABET))
def test_one_wrong_character_is_seen_without_a_look_up(position: int, sign: str):
    key, _ = mint()
    at = len(PREFIX) + position
    typo = key[:at] + sign + key[at + 1 :]

    assert is_plausible(typo) == (typo == key)


def test_two_characters_in_the_wrong_order_are_seen():
    body = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQ"
    key = PREFIX + body + checksum(body)
    swapped = PREFIX + "ba" + key[len(PREFIX) + 2 :]

    assert is_plausible(key)
    assert not is_plausible(swapped)


@pytest.mark.parametrize("cut", [-1, -6, -20])
def test_a_key_that_was_cut_off_is_no_key(cut: int):
    assert not is_plausible(mint()[0][:cut])


def test_a_key_of_another_length_is_no_key_even_with_its_checksum():
    assert not is_plausible(PREFIX + "short" + checksum("short"))


def test_a_key_with_something_behind_it_is_no_key():
    assert not is_plausible(mint()[0] + "x")


@pytest.mark.parametrize("key", ["", "short", "sk-sluice-", "schlüssel-mit-umlaut", "line\nbreak-in-it", "x" * 513])
def test_rubbish_is_no_key(key: str):
    assert not is_plausible(key)


def test_an_imported_key_has_no_checksum_and_may_be_asked_for():
    assert is_plausible("my-old-shared-secret")


def test_a_checksum_has_six_signs_even_for_a_small_number():
    assert all(len(checksum(str(number))) == 6 for number in range(1000))


def test_what_is_stored_depends_on_the_pepper_and_on_every_character():
    key = mint()[0]

    assert len(digest(b"p" * 32, key)) == 32
    assert digest(b"p" * 32, key) == digest(b"p" * 32, key)
    assert digest(b"p" * 32, key) != digest(b"q" * 32, key)
    assert digest(b"p" * 32, key) != digest(b"p" * 32, key[:-1])


def test_no_patterns_means_every_model():
    assert may_use("anything/at-all")


@pytest.mark.parametrize("model", ["demo/echo", "demo/", "demo/a/b", "gpt-4o"])
def test_a_pattern_lets_its_models_through(model: str):
    assert may_use(model, "demo/*", "gpt-4o")


@pytest.mark.parametrize("model", ["demo", "gpt-4o-mini", "GPT-4o", "xgpt-4o", "Demo/echo", ""])
def test_a_pattern_lets_nothing_else_through(model: str):
    assert not may_use(model, "demo/*", "gpt-4o")
