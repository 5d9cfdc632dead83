"""How figures, money, times and form fields are written on the pages."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

from django import forms, template
from django.forms import BoundField
from django.utils.html import format_html
from django.utils.safestring import SafeString

from accounts.money import in_usd
from proxy.models import UsageEvent
from proxy.queries import Refused, Sums

register = template.Library()

UNPRICED = "unpriced"
_MICRO = 1_000_000
_STEPS = ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k"))


_WHY = {
    "ip_not_authorized": "Called from a network that this key does not allow",
    "model_not_allowed": "A model that this key may not use",
    "model_not_found": "A model that does not exist here",
    "model_unpriced": "A model without a price, under a money limit",
    "rate_limit_exceeded": "Too many requests or tokens a minute",
    "concurrency_limit_exceeded": "Too many requests open at a time",
    "insufficient_quota": "A budget is used up",
    "invalid_api_key": "The key was revoked, had expired or was mistyped",
}


@register.filter
def why(refused: Refused) -> str:
    """A code in words."""
    return _WHY.get(refused.code) or refused.code.replace("_", " ").capitalize()


@register.filter
def usd(micro_dollars: int | None) -> str:
    """$1,234.50; below a cent as many decimals as it takes. None is no price, which is not the same as 0."""
    if micro_dollars is None:
        return UNPRICED
    sign, amount = ("−" if micro_dollars < 0 else ""), Decimal(abs(micro_dollars)) / _MICRO
    if amount == 0 or amount >= Decimal("0.01"):
        return f"{sign}${amount:,.2f}"
    return f"{sign}${amount:.6f}".rstrip("0")


@register.filter
def exact_usd(micro_dollars: int | None) -> str:
    """One request costs less than a cent, or little more: to the micro-dollar. None is no price."""
    if micro_dollars is None:
        return UNPRICED
    return f"{'−' if micro_dollars < 0 else ''}${in_usd(abs(micro_dollars))}"


@register.filter
def fine_usd(micro_dollars: int) -> str:
    """The cost of one request, in a column of such: four decimals, six where four would show nothing."""
    sign, amount = ("−" if micro_dollars < 0 else ""), Decimal(abs(micro_dollars)) / _MICRO
    if not amount:
        return "$0"
    return f"{sign}${amount:.6f}" if 0 < amount < Decimal("0.0001") else f"{sign}${amount:,.4f}"


@register.filter
def cost(sums: Sums) -> str:
    """What the priced requests cost; `unpriced` when none of what was used had a price."""
    return UNPRICED if sums.is_unpriced else usd(sums.cost)


@register.filter
def count(number: int) -> str:
    """12,345"""
    return f"{number:,}".replace("-", "−")


@register.filter
def short(number: int) -> str:
    """3 significant figures: 12.3k, 4.56M."""
    for size, letter in _STEPS:
        if abs(number) >= size:
            shown = f"{number / size:.3g}" if abs(number) < size * 1000 else f"{number / size:,.0f}"
            # 999,999 is 1e+03 k.
            return f"{shown}{letter}" if "e" not in shown else f"{number / size:,.0f}{letter}"
    return str(number)


@register.filter
def percent(share: float) -> str:
    """0.0731 -> 7.3 %"""
    hundredths = share * 100
    if 0 < hundredths < 0.1:
        return "< 0.1 %"
    return f"{hundredths:.1f}".removesuffix(".0") + " %"


@register.filter
def milliseconds(duration: int | None) -> str:
    """340 ms, 1.2 s, 3 min 20 s"""
    if duration is None:
        return "–"
    if duration < 1000:
        return f"{duration} ms"
    if duration < 60_000:
        return f"{duration / 1000:.1f} s"
    minutes, seconds = divmod(duration // 1000, 60)
    return f"{minutes} min {seconds} s"


@register.filter
def served(event: UsageEvent) -> str:
    """The model that answered, when it is not simply the one that was asked for."""
    return event.served_model if event.served_model and event.served_model != event.model else ""


@register.simple_tag
def moment(at: datetime | None, show: str = "moment") -> str | SafeString:
    """A time: written in UTC, and shown in the viewer's zone where scripts run."""
    if at is None:
        return ""
    utc = at.astimezone(UTC)
    written = utc.strftime({"day": "%-d %b %Y", "exact": "%-d %b %Y, %H:%M:%S UTC"}.get(show, "%-d %b %Y, %H:%M UTC"))
    return format_html(
        '<time datetime="{}" data-show="{}">{}</time>', utc.isoformat(timespec="seconds").replace("+00:00", "Z"), show, written
    )


@register.filter
def control(field: BoundField) -> SafeString:
    """A form field's widget in our dress."""
    widget = field.field.widget
    if isinstance(widget, forms.CheckboxInput):
        dress = "checkbox checkbox-sm"
    elif isinstance(widget, forms.Select):
        dress = "select w-full"
    elif isinstance(widget, forms.Textarea):
        dress = "textarea w-full"
    else:
        dress = "input w-full"
    if field.errors:
        dress += f" {dress.split()[0]}-error"
    return field.as_widget(attrs={"class": dress})


@register.filter
def is_checkbox(field: BoundField) -> bool:
    return isinstance(field.field.widget, forms.CheckboxInput)
