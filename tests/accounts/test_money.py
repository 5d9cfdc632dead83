from __future__ import annotations

import pytest
from django.core.exceptions import ValidationError
from hypothesis import given
from hypothesis import strategies as st

from accounts.money import in_usd, parse_usd


@pytest.mark.parametrize(
    ("text", "micro"),
    [
        ("12.50", 12_500_000),
        ("0", 0),
        ("0.000001", 1),
        ("$5", 5_000_000),
        (" 7 ", 7_000_000),
        ("1e2", 100_000_000),
        ("8.41", 8_410_000),  # 8.41 * 1e6 is 8409999.999999999 in floats
        ("999999999.999999", 999_999_999_999_999),
    ],
)
def test_dollars_are_read_exactly(text: str, micro: int):
    assert parse_usd(text) == micro


@pytest.mark.parametrize(
    "text", ["", "ten", "-1", "nan", "inf", "-inf", "0.0000001", "1.0000001", "1e20", "1e999999999", "1e-999999999", "1,5"]
)
def test_what_is_no_amount_is_refused_in_words(text: str):
    with pytest.raises(ValidationError) as problem:
        parse_usd(text)

    assert "US dollar" in problem.value.messages[0]


@pytest.mark.parametrize(
    ("micro", "text"), [(12_500_000, "12.50"), (0, "0.00"), (1, "0.000001"), (-1_500_000, "-1.50"), (1_234_567, "1.234567")]
)
def test_an_amount_is_shown_without_rounding(micro: int, text: str):
    assert in_usd(micro) == text


@given(st.integers(0, 999_999_999_999_999))
def test_what_is_shown_can_be_typed_in_again(micro: int):
    assert parse_usd(in_usd(micro)) == micro
