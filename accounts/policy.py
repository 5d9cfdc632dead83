"""What a key may do, as people write it: checked in words and brought into one form before anything is stored."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any

from django.core.exceptions import ValidationError
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from accounts.models import ApiKey, Limit, Metric, Mode, Window
from accounts.money import MOST

MOST_ENTRIES = 100
MOST_TAGS = 20
MOST_TAG_LENGTH = 50
MOST_PATTERN_LENGTH = 200
LONGEST_LIFE = timedelta(days=365 * 100)

# Persian is not written without the one, nor a family of emoji without the other.
_JOINERS = {ord(sign): None for sign in "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"}
_IPV4_IN_IPV6 = ipaddress.IPv6Network("::ffff:0:0/96")


@dataclass(frozen=True, slots=True)
class Allowance:
    """A limit without its scope. `amount`: requests or tokens per minute, open requests, or micro-dollars per window."""

    metric: str
    amount: int
    window: str = ""
    mode: str = Mode.ENFORCE

    @classmethod
    def of(cls, limit: Limit) -> Allowance:
        return cls(limit.metric, limit.amount, limit.window, limit.mode)

    def __str__(self) -> str:
        return f"{self.metric} {self.amount} {self.window}".rstrip() + (" (shadow)" if self.mode == Mode.SHADOW else "")


def clean(**values: Any) -> dict[str, Any]:
    """Every value by its own rule. Raises one ValidationError with the complaints of all fields."""
    cleaned: dict[str, Any] = {}
    problems: dict[str, ValidationError] = {}
    for field, value in values.items():
        try:
            cleaned[field] = _RULES[field](value)
        except ValidationError as problem:
            problems[field] = problem
    if problems:
        raise ValidationError(problems)
    return cleaned


def clean_name(name: str) -> str:
    name = name.strip()
    seen = name.translate(_JOINERS)
    if not seen:
        raise ValidationError("Give it a name.")
    if len(name) > 150 or not seen.isprintable():
        raise ValidationError("A name has at most 150 printable characters.")
    return name


def clean_models(patterns: Iterable[str]) -> list[str]:
    """Patterns of model names, in which * alone stands for anything."""
    patterns = _distinct(patterns)
    _at_most(MOST_ENTRIES, patterns)
    for pattern in patterns:
        if len(pattern) > MOST_PATTERN_LENGTH or not pattern.isprintable() or " " in pattern:
            raise ValidationError(f"'{pattern[:60]}' is not a model's name or a pattern such as demo/*.")
        if set("?[]") & set(pattern):
            raise ValidationError(f"'{pattern}': * is the only sign that stands for others; ? and [] do not.")
    return patterns


def clean_networks(networks: Iterable[str]) -> list[str]:
    """CIDRs in their canonical form: a single address gets its prefix, and bits beyond the prefix are cleared."""
    networks = _distinct(networks)
    _at_most(MOST_ENTRIES, networks)
    found = []
    for text in networks:
        try:
            network = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise ValidationError(f"'{text[:60]}' is not a network such as 10.0.0.0/8 or 2001:db8::/32.") from None
        if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_IPV4_IN_IPV6):
            # Callers are compared by their IPv4 address, so the mapped form would never match.
            mapped = ipaddress.IPv4Address(int(network.network_address) & 0xFFFFFFFF)
            network = ipaddress.ip_network((mapped, network.prefixlen - 96))
        found.append(str(network))
    return _distinct(found)


def clean_tags(tags: Iterable[str]) -> list[str]:
    tags = _distinct(tags)
    _at_most(MOST_TAGS, tags)
    for tag in tags:
        if len(tag) > MOST_TAG_LENGTH or not tag.isprintable():
            raise ValidationError(f"A tag has at most {MOST_TAG_LENGTH} printable characters.")
    return tags


def clean_expiry(moment: datetime | None) -> datetime | None:
    """A moment to come, in UTC; without a zone it is taken as UTC. None = never."""
    if moment is None:
        return None
    try:
        moment = moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    except OverflowError:
        raise ValidationError("This moment is out of range.") from None
    now = timezone.now()
    if moment <= now:
        raise ValidationError("The expiry must lie in the future.")
    if moment > now + LONGEST_LIFE:
        raise ValidationError("The expiry lies more than a hundred years ahead: leave it out for a key that never expires.")
    return moment


def parse_moment(text: str) -> datetime:
    """ISO 8601, such as 2030-01-31 or 2030-01-31T12:00:00+02:00. Raises ValidationError."""
    try:
        moment = parse_datetime(text.strip())
    except ValueError:
        moment = None
    if moment is None:
        raise ValidationError(f"'{text}' is not a moment such as 2030-01-31T12:00:00Z.")
    return moment


def clean_allowance(allowance: Allowance) -> Allowance:
    if allowance.metric not in Metric.values:
        raise ValidationError(f"There is no metric '{allowance.metric}': it is one of {', '.join(Metric.values)}.")
    if not 0 <= allowance.amount <= MOST:
        raise ValidationError(f"A limit lies between 0 and {MOST}.")
    if allowance.mode not in Mode.values:
        raise ValidationError(f"There is no mode '{allowance.mode}': it is one of {', '.join(Mode.values)}.")
    windows = [window for window in Window.values if window]
    if allowance.metric == Metric.MONEY and allowance.window not in windows:
        raise ValidationError(f"A limit of money needs a window: one of {', '.join(windows)}.")
    if allowance.metric != Metric.MONEY and allowance.window:
        raise ValidationError("Only a limit of money has a window.")
    return allowance


def clean_allowances(allowances: Iterable[Allowance]) -> list[Allowance]:
    cleaned = [clean_allowance(one) for one in allowances]
    if len({(one.metric, one.window) for one in cleaned}) < len(cleaned):
        raise ValidationError("Two limits have the same metric and window.")
    return cleaned


LONGEST_FREEZE = timedelta(days=365)


def clean_freeze(length: timedelta, reason: str) -> None:
    if not timedelta(0) < length <= LONGEST_FREEZE:
        raise ValidationError({"minutes": f"A freeze lasts for more than nothing and for at most {LONGEST_FREEZE.days} days."})
    if len(reason.strip()) > 200 or not reason.isprintable():
        raise ValidationError({"reason": "A reason has at most 200 printable characters."})


def widened(key: ApiKey, limits: Iterable[Allowance], changes: Mapping[str, Any]) -> list[str]:
    """The fields in which these (cleaned) changes would let the key do more than it may now."""
    wider = []
    if "models" in changes and not _narrower(changes["models"], key.allowed_models, fnmatchcase):
        wider.append("models")
    if "networks" in changes and not _narrower(changes["networks"], key.allowed_networks, _inside):
        wider.append("networks")
    if "expires_at" in changes and key.expires_at is not None:
        until = changes["expires_at"]
        if until is None or until > key.expires_at:
            wider.append("expires_at")
    if "limits" in changes:
        after = {(one.metric, one.window): one for one in changes["limits"]}
        if not all(_keeps(before, after.get((before.metric, before.window))) for before in limits):
            wider.append("limits")
    return wider


def _narrower(after: list[str], before: list[str], lies_in: Callable[[str, str], bool]) -> bool:
    # An empty list allows everything. A pattern without ? and [] lies in another when that other matches its text.
    return not before or (bool(after) and all(any(lies_in(new, old) for old in before) for new in after))


def _inside(inner: str, outer: str) -> bool:
    one, other = ipaddress.ip_network(inner), ipaddress.ip_network(outer, strict=False)
    if isinstance(one, ipaddress.IPv4Network):
        return isinstance(other, ipaddress.IPv4Network) and one.subnet_of(other)
    return isinstance(other, ipaddress.IPv6Network) and one.subnet_of(other)


def _keeps(before: Allowance, after: Allowance | None) -> bool:
    if after is None:
        return False
    return after.amount <= before.amount and (before.mode == Mode.SHADOW or after.mode == Mode.ENFORCE)


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in words if word.strip()))


def _at_most(most: int, words: list[str]) -> None:
    if len(words) > most:
        raise ValidationError(f"At most {most} entries.")


_RULES: dict[str, Callable[[Any], Any]] = {
    "name": clean_name,
    "models": clean_models,
    "networks": clean_networks,
    "tags": clean_tags,
    "expires_at": clean_expiry,
    "limits": clean_allowances,
}
