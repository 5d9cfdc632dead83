"""S07: a sealed secret opens in its own place with its own key, and nowhere else. And: secrets stay out of texts."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.secrets import Place, Redactor, SealBroken, SecretText, open_sealed, seal, sealed_with

KEYS = {"0000000a": os.urandom(32)}
HERE = Place(table="providers_credential", row="7", column="secret", purpose="upstream", origin="https://api.example.org:443")

places = st.builds(Place, *[st.text(max_size=12)] * 5)


@given(st.text(), places)
def test_what_was_sealed_opens_in_its_place(text: str, place: Place):
    assert open_sealed(seal(text, place, KEYS), place, KEYS).reveal() == text


@given(places, places)
def test_it_opens_in_no_other_place(place: Place, other: Place):
    blob = seal("hush", place, KEYS)
    if place != other:
        with pytest.raises(SealBroken):
            open_sealed(blob, other, KEYS)


@pytest.mark.parametrize(
    "change",
    [
        {"row": "8"},
        {"column": "token"},
        {"table": "providers_oauthtoken"},
        {"purpose": "canary"},
        {"origin": "https://evil.example.org:443"},
        {"origin": "http://api.example.org:443"},
        # Parts that would be one and the same, were they only strung together.
        {"row": "7s", "column": "ecret"},
        {"purpose": "upstreamhttps", "origin": "://api.example.org:443"},
    ],
)
def test_it_is_bound_to_each_part_of_its_place(change: dict[str, str]):
    blob = seal("hush", HERE, KEYS)

    with pytest.raises(SealBroken):
        open_sealed(blob, replace(HERE, **change), KEYS)


def test_cut_at_any_length_it_does_not_open():
    blob = seal("hush", HERE, KEYS)

    for length in range(len(blob)):
        with pytest.raises(SealBroken):
            open_sealed(blob[:length], HERE, KEYS)
    with pytest.raises(SealBroken):
        open_sealed(blob + b"\0", HERE, KEYS)


def test_no_single_bit_may_change():
    blob = seal("hush", HERE, KEYS)

    for at in range(8 * len(blob)):
        flipped = bytearray(blob)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(SealBroken):
            open_sealed(bytes(flipped), HERE, KEYS)


def test_another_key_of_the_same_name_does_not_open_it():
    with pytest.raises(SealBroken):
        open_sealed(seal("hush", HERE, KEYS), HERE, {"0000000a": os.urandom(32)})


def test_after_a_rotation_the_old_key_still_opens_and_the_new_one_seals():
    old = seal("hush", HERE, KEYS)
    rotated = {"0000000b": os.urandom(32), **KEYS}
    new = seal("hush", HERE, rotated)

    assert open_sealed(old, HERE, rotated).reveal() == open_sealed(new, HERE, rotated).reveal() == "hush"
    assert (sealed_with(old), sealed_with(new)) == ("0000000a", "0000000b")


def test_the_same_text_is_never_sealed_the_same_way_twice():
    assert seal("hush", HERE, KEYS) != seal("hush", HERE, KEYS)
    assert b"hush" not in seal("hush", HERE, KEYS)


def test_a_secret_in_memory_shows_itself_to_nobody():
    secret = SecretText("sk-very-secret")

    assert "very-secret" not in f"{secret} {secret!r} {[secret]} { ({'a': secret}) }"
    assert bool(secret)
    assert not SecretText("")


def test_a_secret_is_taken_out_by_its_value():
    redact = Redactor()
    redact.learn(["hunter2hunter2", "hunter2", "short"])

    assert redact("say hunter2hunter2 and hunter2 and short") == "say [redacted] and [redacted] and short"


def test_learning_more_forgets_nothing_and_learning_replaces():
    redact = Redactor()
    redact.learn(["first-secret"])
    redact.learn_more(["second-secret"])
    assert redact("first-secret second-secret") == "[redacted] [redacted]"

    redact.learn(["second-secret"])
    assert redact("first-secret second-secret") == "first-secret [redacted]"


def test_what_was_given_or_is_our_own_outlives_each_reading():
    redact = Redactor()
    redact.learn_own(["own-secret"])
    redact.learn_more(["given-secret"])
    for read in (["read-secret"], ["given-secret"], []):
        redact.learn(read)
        assert redact("own-secret given-secret") == "[redacted] [redacted]"
    assert redact("read-secret") == "read-secret"


def test_of_what_is_given_the_latest_is_kept_and_of_our_own_all():
    redact = Redactor()
    redact.learn_own(["own-secret"])
    redact.learn_more(["first-secret", "second-secret"])
    redact.learn_more(f"more-secret-{number}" for number in range(redact.MOST_GIVEN - 2))
    redact.learn_more(["first-secret"])  # again: it is the latest now
    redact.learn_more(["last-secret"])
    assert redact("own-secret first-secret second-secret last-secret") == "[redacted] [redacted] second-secret [redacted]"


def test_a_secret_that_another_begins_with_leaves_no_tail_whoever_told_of_it():
    redact = Redactor()
    redact.learn(["hunter2"])
    redact.learn_more(["hunter2hunter2"])
    redact.learn_own(["hunter2hunter2-and-more"])
    assert redact("(hunter2hunter2-and-more)") == "([redacted])"


def test_a_name_that_was_looked_up_before_is_taken_out_once_it_is_known_for_a_secret():
    redact = Redactor()
    for name, learn in (("one-model", redact.learn), ("two-models", redact.learn_more), ("three-models", redact.learn_own)):
        assert redact.name(name) == name
        learn([name])
        assert redact.name(name) == "[redacted]"


def test_a_name_that_is_looked_up_while_a_secret_is_learned_is_not_remembered_as_it_was():
    class Slow(Redactor):
        def __call__(self, text: str) -> str:
            said = super().__call__(text)
            self.learn([text])
            return said

    redact = Slow()
    assert redact.name("a-model-or-so") == "a-model-or-so"
    assert redact.name("a-model-or-so") == "[redacted]"


@pytest.mark.parametrize(
    "text",
    [
        "sk-sluice-abcdefghij0123456789",
        "Authorization: Bearer opaque.value+with/odd=chars",
        "sk-proj-abcdefghijklmnop",
        "AIzaSyA1234567890abcdefghij",
        "ya29.a0AfH6SMBx",
        "ghp_abcdefghijklmnopqrst",
        "xoxb-1234567890-abc",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.signature",
    ],
)
def test_what_has_the_shape_of_a_secret_is_taken_out_unseen(text: str):
    said = Redactor()(f"the upstream said {text}!")

    assert "[redacted]" in said
    assert text.rpartition(" ")[2] not in said


@given(st.text(alphabet=st.characters(exclude_characters="[]redact"), min_size=6), st.text(), st.text())
def test_whatever_surrounds_a_known_secret_it_is_gone(secret: str, before: str, after: str):
    redact = Redactor()
    redact.learn([secret])

    assert secret not in redact(before + secret + after).replace("[redacted]", "\0")
