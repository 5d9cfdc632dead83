"""What a call costs, and which row says so."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.price import Price, PriceBook, Rates, Tokens

amounts = st.integers(0, 10**9)
counts = st.integers(0, 10**7)
tokens = st.builds(Tokens, counts, counts, counts, counts, counts)


def price(pattern: str, starts_at: float = 0, *, id: int = 1, input: int = 1, by_hand: bool = True) -> Price:  # noqa: A002
    return Price(id=id, pattern=pattern, starts_at=starts_at, input=input, output=0, by_hand=by_hand)


@given(tokens, amounts, amounts, amounts, amounts)
def test_cost_is_the_exact_sum_of_its_parts_rounded_half_up(tokens: Tokens, fresh: int, output: int, read: int, write: int):
    exact = Decimal(
        tokens.fresh_input * fresh + tokens.cache_read * read + tokens.cache_write * write + (tokens.output + tokens.reasoning) * output
    )

    assert Rates(fresh, output, read, write).cost(tokens) == int((exact / 10**6).quantize(Decimal(1), ROUND_HALF_UP))


@pytest.mark.parametrize(("fresh", "cost"), [(0, 0), (499_999, 0), (500_000, 1), (1_499_999, 1), (1_500_000, 2)])
def test_half_a_micro_dollar_is_rounded_up(fresh: int, cost: int):
    assert Rates(1, 0).cost(Tokens(fresh_input=fresh)) == cost


@given(tokens, amounts, amounts)
def test_a_cache_rate_that_is_not_given_is_the_plain_one(tokens: Tokens, fresh: int, output: int):
    assert Rates(fresh, output).cost(tokens) == Rates(fresh, output, fresh, fresh).cost(tokens)


@given(tokens)
def test_the_parts_are_disjoint(tokens: Tokens):
    assert tokens.input + tokens.all_output == tokens.total
    assert Rates(10**6, 0).cost(tokens) + Rates(0, 10**6).cost(tokens) == tokens.total


@given(tokens, amounts, amounts, st.none() | amounts, st.none() | amounts)
def test_what_is_held_is_never_less_than_what_it_comes_to(tokens: Tokens, fresh: int, output: int, read: int | None, write: int | None):
    rates = Rates(fresh, output, read, write)

    assert rates.most(tokens.input, tokens.all_output) >= rates.cost(tokens)


def test_a_long_request_costs_the_long_rates_for_all_of_it():
    row = Price(id=1, pattern="a/b", starts_at=0, input=1_000_000, output=2_000_000, long_above=100, long=Rates(3_000_000, 4_000_000))

    assert row.cost(Tokens(fresh_input=60, cache_read=40, output=10)) == 120
    assert row.cost(Tokens(fresh_input=60, cache_read=41, output=10)) == 343
    assert row.most(100, 10) == 120
    assert row.most(101, 10) == 343


def test_a_long_request_that_may_turn_out_shorter_is_held_at_the_dearer_rates():
    row = Price(id=1, pattern="a/b", starts_at=0, input=3_000_000, output=4_000_000, long_above=100, long=Rates(1_000_000, 2_000_000))

    assert row.most(101, 10) == row.cost(Tokens(fresh_input=100, output=10)) == 340
    assert row.most(1000, 10) == row.cost(Tokens(fresh_input=1000, output=10)) == 1020


def test_the_closest_pattern_by_hand_goes_first():
    book = PriceBook([price("*", id=1), price("openai/*", id=2), price("openai/gpt-4*", id=3), price("openai/gpt-4o", id=4)])

    found = {model: book.find(model, 1) for model in ("openai/gpt-4o", "openai/gpt-4", "openai/o1", "local/llama")}
    assert {model: row and row.id for model, row in found.items()} == {
        "openai/gpt-4o": 4,
        "openai/gpt-4": 3,
        "openai/o1": 2,
        "local/llama": 1,
    }


def test_a_row_by_hand_beats_the_package_even_when_the_package_is_closer():
    package = price("openai/gpt-4o", id=1, by_hand=False)

    assert PriceBook([package, price("openai/*", id=2)]).find("openai/gpt-4o", 1).id == 2
    assert PriceBook([package, price("openai/gpt-4o", id=3, starts_at=-5)]).find("openai/gpt-4o", 1).id == 3
    assert PriceBook([package, price("local/*", id=4)]).find("openai/gpt-4o", 1).id == 1


def test_what_the_package_knows_exactly_goes_before_its_pattern():
    book = PriceBook([price("demo/*", id=1, by_hand=False), price("demo/echo", id=2, by_hand=False)])

    assert book.find("demo/echo", 1).id == 2
    assert book.find("demo/slow", 1).id == 1


@pytest.mark.parametrize(("at", "row"), [(9, None), (10, 1), (19, 1), (20, 2), (100, 2)])
def test_a_row_holds_from_its_start_until_the_next(at: float, row: int | None):
    book = PriceBook([price("a/b", 20, id=2), price("a/b", 10, id=1)])

    found = book.find("a/b", at)
    assert (found and found.id) == row


def test_before_its_start_a_row_leaves_the_word_to_the_next_best():
    book = PriceBook([price("a/*", 0, id=1), price("a/b", 50, id=2), price("a/b", 0, id=3, by_hand=False)])

    assert book.find("a/b", 10).id == 1
    assert book.find("a/b", 50).id == 2


def test_of_two_rows_with_the_same_start_the_later_corrects_the_earlier():
    rows = [price("a/b", 10, id=1), price("a/b", 10, id=2)]

    assert PriceBook(rows).find("a/b", 10).id == PriceBook(rows[::-1]).find("a/b", 10).id == 2


def test_a_model_that_nobody_priced_has_no_price():
    assert PriceBook([price("openai/*")]).find("local/x", 1) is None
    assert PriceBook().find("local/x", 1) is None
