"""What an operator gives for a credential or a price, checked, with words for what is wrong. No database here.

Every function raises ValidationError keyed by the field, so that a form, a command and the API can say it in place.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any
from urllib.parse import urlsplit

from django.core.exceptions import ValidationError

from providers import registry
from providers.adapter import Adapter
from providers.exchange import place_of
from providers.failures import UpstreamUnreachable
from providers.oauth import SignIn, TokenSet
from providers.secrets import redact

FLAGS = frozenset({"pass_through", "listed_only", "http2"})
STICKY = ("key", "user", "prompt_cache_key")
EVERY_KIND = FLAGS | {"proxy_url", "ca_pem", "sticky"}
MASK = "(set)"  # what is shown in place of a setting that is a secret itself
WORDS_FOR_FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
MICRO = 1_000_000
DEAREST_USD = 1_000_000  # per million tokens: more is a slip of the keyboard

_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


def kind(name: str) -> Adapter:
    """The adapter that speaks this kind."""
    if name not in registry.names():
        raise ValidationError({"kind": f"There is no kind '{name}'. Known: {', '.join(registry.names())}."})
    return registry.adapter(name)


def label(text: str) -> str:
    text = text.strip()
    if not text or len(text) > 100 or not text.isprintable():
        raise ValidationError({"label": "A label has 1 to 100 characters, in one line."})
    return text


def prefix(text: str) -> str:
    if not _PREFIX.fullmatch(text):
        raise ValidationError(
            {"prefix": f"'{text}' cannot be a prefix: 1 to 40 letters, digits, dots, dashes and underscores, without a slash."}
        )
    return text


def base_url(adapter: Adapter, text: str) -> str:
    """As it is kept; empty stays empty and means the vendor's own."""
    text = text.strip()
    return adapter.base_url_from(_http_address("base_url", text, "https://llm.example.org/v1")) if text else ""


def _http_address(field: str, text: str, example: str) -> str:
    """An address with nothing in it that could hide where the call really goes."""
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 reading it checks it
    except ValueError:
        raise ValidationError({field: f"'{text}' is not an address such as {example}."}) from None
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise ValidationError({field: "An address carries no user name or password: give the secret as the secret."})
    if parts.scheme not in {"http", "https"} or not parts.hostname or not text.isascii() or re.search(r"[\s\\]", text):
        raise ValidationError({field: f"'{text}' is not an address such as {example}."})
    if "?" in text or "#" in text:
        raise ValidationError({field: "An address here ends with its path: no '?' and no '#'."})
    try:
        place_of(text)  # what is taken here must be what is called later: one reader for both
    except UpstreamUnreachable:
        raise ValidationError({field: f"'{text}' is not an address such as {example}."}) from None
    if len(text) > 480:
        raise ValidationError({field: "An address has at most 480 characters."})
    return text


def settings(adapter: Adapter, given: Mapping[str, object]) -> dict[str, object]:
    """By name, without those that are empty. Flags become booleans, everything else stays text."""
    allowed = EVERY_KIND | adapter.settings
    kept: dict[str, object] = {}
    for name, value in given.items():
        if name not in allowed:
            raise ValidationError({"settings": f"'{adapter.name}' has no setting '{name}'. Known: {', '.join(sorted(allowed))}."})
        if isinstance(value, dict | list):
            raise ValidationError({"settings": f"'{name}' takes one value."})
        text = "" if value is None else str(value).strip()
        if text:
            kept[name] = _setting(adapter, name, text)
    redact.learn_more(secrets_in(kept))
    return kept


def masked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they may be shown."""
    return {name: MASK if is_secret(name) else value for name, value in settings.items()}


def unmasked(settings: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """What somebody sent who was shown the kept ones masked: a secret that was left as it was shown stays as it is."""
    hidden = {name for name, value in settings.items() if is_secret(name) and value == MASK}
    return {**{name: kept[name] for name in hidden & kept.keys()}, **{name: settings[name] for name in settings if name not in hidden}}


def is_secret(setting: str) -> bool:
    return setting.endswith("secret")


def secrets_in(settings: Mapping[str, Any]) -> list[str]:
    """The values of those that are secrets: what the redactor is to know."""
    return [str(value) for name, value in settings.items() if is_secret(name)]


def _setting(adapter: Adapter, name: str, text: str) -> object:
    if name in FLAGS:
        if text.lower() not in WORDS_FOR_FLAGS:
            raise ValidationError({"settings": f"'{name}' is a switch: 1 or 0."})
        return WORDS_FOR_FLAGS[text.lower()]
    if name == "sticky":
        if text not in STICKY:
            raise ValidationError({"settings": f"'sticky' is one of {', '.join(STICKY)}: what keeps calls with one account of a pool."})
        return text
    if name == "proxy_url":
        return _http_address("settings", text, "http://proxy.example.org:3128")
    if name == "ca_pem":
        return _authorities(text)
    try:
        return adapter.setting_from(name, text)
    except ValueError as problem:
        raise ValidationError({"settings": str(problem)}) from None


def _authorities(text: str) -> str:
    """Certificates as PEM. A path would mean another file on every machine, or one that is none of the giver's business."""
    try:
        ssl.create_default_context(cadata=text)
    except (ssl.SSLError, ValueError, TypeError):
        raise ValidationError(
            {"settings": "'ca_pem' is the text of one or more certificates, which begins with -----BEGIN CERTIFICATE-----."}
        ) from None
    return text


def secret_or_tokens(adapter: Adapter, text: str, settings: Mapping[str, object]) -> tuple[str, TokenSet | None]:
    """What was given as a secret: it, or the tokens in a credential file of the vendor's own tool."""
    try:
        tokens = adapter.tokens_from(text) if text.strip() else None
    except ValueError as problem:
        raise ValidationError({"secret": str(problem)}) from None
    if tokens is None:
        return secret(adapter, text, settings), None
    if not signs_in(adapter, settings):
        words = f"These are the tokens of a sign-in, and with these settings an account of kind '{adapter.name}' does not sign in."
        raise ValidationError({"secret": f"{words} Known settings: {', '.join(sorted(adapter.settings))}."})
    return "", tokens


def sign_in(adapter: Adapter, settings: Mapping[str, object]) -> SignIn:
    """How an account with these settings signs in."""
    try:
        found = adapter.sign_in({name: str(value) for name, value in settings.items()})
    except ValueError as problem:
        raise ValidationError({"settings": str(problem)}) from None
    if found is None:
        raise ValidationError({"kind": f"With these settings '{adapter.name}' does not sign in: it is given a secret."})
    redact.learn_more([found.client_secret])
    return found


def signs_in(adapter: Adapter, settings: Mapping[str, object]) -> bool:
    """True where an account with these settings has no secret of its own but signs in, even if a setting is still missing."""
    try:
        return adapter.sign_in({name: str(value) for name, value in settings.items()}) is not None
    except ValueError:
        return True


def secret(adapter: Adapter, text: str, settings: Mapping[str, object] | None = None) -> str:
    try:
        kept = adapter.secret_from(text)
    except ValueError as problem:
        raise ValidationError({"secret": str(problem)}) from None
    if not kept and wants_secret(adapter, settings or {}):
        raise ValidationError({"secret": f"A credential of kind '{adapter.name}' needs a secret."})
    return kept


def wants_secret(adapter: Adapter, settings: Mapping[str, object]) -> bool:
    """Whether an account is of no use without a secret of its own. Where callers may bring theirs, it is."""
    return adapter.needs_secret and settings.get("pass_through") is not True


def policy(adapter: Adapter, settings: Mapping[str, object], *, accepted: bool) -> None:
    if adapter.policy_for(settings) != "allowed" and not accepted:
        raise ValidationError({"accept_policy": f"{policy_in_words(adapter, settings)} To go on, accept that."})


def policy_in_words(adapter: Adapter, settings: Mapping[str, object]) -> str:
    """What the vendor's terms say of such a use, and where they say it. Empty where it is allowed and nothing is to be known."""
    said, name = adapter.policy_for(settings), adapter.title or adapter.name
    words = [f"By its vendor's terms, such a use of {name} is {said}."] if said != "allowed" else []
    words += [adapter.policy_note] if adapter.policy_note else []
    words += [f"See {adapter.policy_source}"] if adapter.policy_source and words else []
    return " ".join(words)


def policy_after_change(adapter: Adapter, before: Mapping[str, object], after: Mapping[str, object], *, accepted: bool) -> None:
    """An account that is under another policy by its new settings needs that accepted, as a new one does."""
    if adapter.policy_for(after) != adapter.policy_for(before):
        policy(adapter, after, accepted=accepted)


def weight(number: int) -> int:
    if not 1 <= number <= 1000:
        raise ValidationError({"weight": "A weight is a whole number from 1 to 1000."})
    return number


def pattern(text: str) -> str:
    """A pattern of public model ids."""
    text = text.strip()
    if not text or len(text) > 240 or re.search(r"\s", text) or ("*" in text and re.search(r"[?\[\]]", text)):
        raise ValidationError({"pattern": "A pattern is a public model id such as openai/gpt-4o, in which * stands for anything."})
    if "/" not in text and "*" not in text:
        raise ValidationError({"pattern": f"'{text}' would match no model: public ids are prefix/model, such as openai/{text}."})
    return text


def micro_dollars(field: str, usd: str | Decimal | int) -> int:
    """USD per million tokens -> micro-dollars per million tokens, exactly."""
    try:
        amount = Decimal(usd)
    except InvalidOperation:
        raise ValidationError({field: f"'{usd}' is not an amount in USD such as 2.50."}) from None
    if not amount.is_finite() or len(amount.as_tuple().digits) > 20 or not 0 <= amount <= DEAREST_USD:
        raise ValidationError({field: f"An amount is between 0 and {DEAREST_USD} USD per million tokens."})
    micro = amount * MICRO
    if micro != int(micro):
        raise ValidationError({field: f"{usd} USD has more than six decimals: the smallest amount is 0.000001."})
    return int(micro)
