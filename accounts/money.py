"""US dollars as people write them, and the integer micro-dollars that are stored. No floats in between."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from django.core.exceptions import ValidationError

MICRO = 1_000_000
MOST = 10**15  # micro-dollars: a thousand million dollars, well inside the column


def parse_usd(text: str) -> int:
    """'12.50' -> 12500000 micro-dollars, exactly. Raises ValidationError for what is no amount, negative or finer than that."""
    try:
        amount = Decimal(text.strip().removeprefix("$"))
    except InvalidOperation:
        raise ValidationError(f"'{text}' is not an amount of US dollars such as 12.50.") from None
    if not amount.is_finite() or amount < 0:
        raise ValidationError("An amount of US dollars is 0 or more, such as 12.50.")
    if amount.adjusted() > 9 or (amount and amount.adjusted() < -6):
        raise ValidationError("An amount of US dollars lies between 0.000001 and 1000000000.")
    micro = amount * MICRO
    if micro != micro.to_integral_value():
        raise ValidationError("The smallest part of a US dollar that is counted is 0.000001.")
    return int(micro)


def in_usd(micro_dollars: int) -> str:
    """12500000 -> '12.50': at least two decimals, and never a rounded figure."""
    whole, part = divmod(abs(micro_dollars), MICRO)
    decimals = f"{part:06d}".rstrip("0").ljust(2, "0")
    return f"{'-' if micro_dollars < 0 else ''}{whole}.{decimals}"
