"""Between the client's dialect and the upstream's. Pure: bytes and values in, values out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

import msgspec

from providers import registry, wire
from providers.adapter import Ask, FirstCalls, Reader, Target, Whole
from providers.exchange import Outgoing
from providers.failures import UpstreamFailure
from providers.wire import Head, Json
from proxy.call import Asked, Incoming
from proxy.catalog import Parameters
from proxy.errors import InvalidRequest, Unavailable

# Fields that name where to connect or with what secret: that is never the client's to say.
FORBIDDEN = frozenset({"api_base", "base_url", "api_key", "headers", "extra_headers", "extra_query", "extra_body", "proxy"})

STREAMS = frozenset({"chat/completions", "completions", "responses", "images/generations", "audio/speech"})

# Longer than any alias, or prefix and id, that the database can hold.
MOST_NAME_LENGTH = 512

# What encoding raises for a value that JSON, or UTF-8, cannot carry.
UNSENDABLE = (OverflowError, RecursionError, UnicodeEncodeError)
# A body of honest size can hold millions of values, of which each costs the process a hundred bytes or more, and all of them a
# second in which it does nothing else. The largest honest request is a list of 300 000 tokens to embed.
MOST_VALUES = 400_000
MOST_PARTS = 100_000  # lists and objects; of strings twice as many

# The OpenAI-workers seed filled these in where the client sent nothing (protocol reference 4.1).
SEED_DEFAULTS: Json = {"model": "gpt-3.5-turbo", "temperature": 0.7, "max_tokens": 1000, "stream": False}
_REASONING_MODEL = re.compile(r"(?:^|/)(?:o[1-9]|gpt-5)")


def read(
    endpoint: str, head: type[Head], raw: bytes, *, content_type: bytes, default_model: str | None = None, seed: bool = False
) -> Asked:
    """The request's body, checked. Raises InvalidRequest with the parameter that is wrong."""
    if content_type and content_type != b"application/json" and not _is_json(content_type):
        said = content_type[:100].decode("latin-1")
        raise InvalidRequest(f"Unsupported content type: '{said}'. This API accepts 'application/json'.", code="unsupported_content_type")
    if len(raw) > MOST_PARTS:
        _check_values(raw)
    body = _decoded(raw)
    if seed:
        body = with_seed_defaults(body)
        raw = wire.encode_json(body)
    try:
        fields = _decoder(head).decode(raw)
    except msgspec.ValidationError as problem:
        raise _wrong_type(problem) from None
    if not FORBIDDEN.isdisjoint(body):
        for name in sorted(FORBIDDEN.intersection(body)):
            raise InvalidRequest(f"'{name}' may not be set by the client.", param=name, code="unsupported_parameter")
    model = fields.model or default_model
    if not model:
        raise InvalidRequest("You must provide a model parameter.", param="model", code="missing_required_parameter")
    if len(model) > MOST_NAME_LENGTH:
        raise InvalidRequest("This is longer than any model's name.", param="model", code="invalid_model")
    if missing := fields.missing():
        raise InvalidRequest(f"Missing required parameter: '{missing}'.", param=missing, code="missing_required_parameter")
    stream = fields.streams()
    if stream and endpoint not in STREAMS:
        raise InvalidRequest("This endpoint has no streams.", param="stream", code="unsupported_parameter")
    return Asked(endpoint=endpoint, head=fields, body=body, size=len(raw), model=model, stream=stream)


@cache
def _decoder(head: type[Head]) -> msgspec.json.Decoder[Head]:
    return msgspec.json.Decoder(head)


def _is_json(content_type: bytes) -> bool:
    return content_type.partition(b";")[0].strip().lower() in (b"application/json", b"text/json")


def with_seed_defaults(body: Json) -> Json:
    """The seed's four defaults, only where the client sent nothing; `null` counts as nothing."""
    defaults = dict(SEED_DEFAULTS)
    if body.get("max_completion_tokens") is not None:
        del defaults["max_tokens"]
    if _REASONING_MODEL.search(str(body.get("model") or "")):
        defaults.pop("max_tokens", None)
        del defaults["temperature"]
    return defaults | {name: value for name, value in body.items() if value is not None or name not in SEED_DEFAULTS}


def with_parameters(asked: Asked, parameters: Parameters) -> Asked:
    """What is asked, as the alias wants it: first the drops, then the defaults where nothing is left, then the overrides.

    Raises Unavailable where this API does not take that: the alias is ours to mend."""
    if not parameters:
        return asked
    body = {name: value for name, value in asked.body.items() if name not in parameters.drops}
    for name, value in parameters.defaults.items():
        if all(body.get(other) is None for other in _alike(name)):  # `null` counts as nothing
            body[name] = value
    for name, value in parameters.overrides.items():
        for other in _alike(name):
            body.pop(other, None)
        body[name] = value
    raw = wire.encode_json(body)
    try:
        head = msgspec.json.decode(raw, type=type(asked.head))
    except msgspec.ValidationError:
        raise Unavailable("The alias of this model sets a parameter to what this API does not take.", code="alias_misconfigured") from None
    return msgspec.structs.replace(asked, head=head, body=body, size=len(raw))


def _alike(name: str) -> tuple[str, ...]:
    """The parameters that mean the same: an upstream that is sent both refuses the call."""
    return _ONE_CEILING if name in _ONE_CEILING else (name,)


_ONE_CEILING = ("max_tokens", "max_completion_tokens")


def that_have(targets: Sequence[Target], endpoint: str) -> list[Target]:
    """Those targets whose upstream has this endpoint. Raises InvalidRequest when none has."""
    having = [target for target in targets if endpoint in registry.adapter(target.kind).endpoints]
    if not having:
        raise InvalidRequest(
            f"The upstream of '{targets[0].public_model}' has no '{endpoint}'.", param="model", code="unsupported_endpoint"
        )
    return having


def ask_of(asked: Asked, incoming: Incoming, target: Target, learned: dict[str, str], *, add_usage_option: bool) -> Ask:
    ask = Ask(
        endpoint=asked.endpoint,
        body=asked.body,
        stream=asked.stream,
        request_id=incoming.id,
        client_wants_usage=asked.head.wants_usage(),
        add_usage_option=add_usage_option,
        learned=learned,
    )
    if reads := registry.adapter(target.kind).reads:
        sent = {name: incoming.headers.get(name.encode(), b"") for name in reads}
        ask.headers = {name: value.decode("latin-1").strip() for name, value in sent.items() if value}
    return ask


def outgoing(ask: Ask, target: Target) -> Outgoing:
    """Raises InvalidRequest for a value that cannot be sent."""
    try:
        return registry.adapter(target.kind).request(ask, target)
    except UNSENDABLE:
        raise _unsendable() from None


def _unsendable() -> InvalidRequest:
    return InvalidRequest("The request holds a value that JSON cannot carry.", code="invalid_json")


def first_calls(ask: Ask, target: Target) -> FirstCalls | None:
    """What has to be asked before the call itself. None for most kinds. Raises InvalidRequest as `outgoing` does."""
    calls = registry.adapter(target.kind).first_calls(ask, target)
    return None if calls is None else _that_can_be_sent(calls)


def _that_can_be_sent(calls: FirstCalls) -> FirstCalls:
    try:
        return (yield from calls)
    except UNSENDABLE:
        raise _unsendable() from None


def reader(ask: Ask, target: Target) -> Reader:
    return registry.adapter(target.kind).reader(ask, target)


def whole(ask: Ask, target: Target, body: bytes, content_type: str) -> Whole:
    """Raises UpstreamFailure."""
    return registry.adapter(target.kind).answer(ask, target, body, content_type)


def failure(target: Target, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
    return registry.adapter(target.kind).failure(target, status, headers, body)


def _check_values(raw: bytes) -> None:
    """Refuse what would become too many values, before it does. Text may hold as many commas and brackets as it likes."""
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") <= MOST_PARTS:
        return
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') <= 4 * MOST_PARTS:
        outside = b"".join(unescaped.split(b'"')[::2])
        if outside.count(b"[") + outside.count(b"{") <= MOST_PARTS and outside.count(b",") <= MOST_VALUES:
            return
    raise InvalidRequest("The body holds more values than any honest request.", code="body_too_complex")


def _decoded(raw: bytes) -> Json:
    try:
        body = wire.decode_json(raw)
        if len(raw) > 2 * wire.MOST_LEVELS and raw.count(b"[") + raw.count(b"{") > wire.MOST_LEVELS and wire.is_too_deep(body):
            raise RecursionError
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
        raise InvalidRequest("We could not parse the JSON body of your request: it is not valid JSON.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    return body


_EXPECTED = re.compile(r"Expected `(?P<expected>[^`]+)`, got `(?P<got>[^`]+)`(?: - at `\$\.?(?P<path>[^`]*)`)?")
_WORDS = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


def _wrong_type(problem: msgspec.ValidationError) -> InvalidRequest:
    found = _EXPECTED.search(str(problem))
    if found is None:
        return InvalidRequest("A parameter has the wrong type.", code="invalid_type")
    wanted = [_WORDS.get(word.strip(), word.strip()) for word in found["expected"].split("|") if word.strip() != "null"]
    param = re.sub(r"\[\.\.\.\]", "[]", found["path"] or "")
    return InvalidRequest(
        f"Invalid type for '{param}': expected {' or '.join(wanted)}, but got {_WORDS.get(found['got'], found['got'])} instead.",
        param=param or None,
        code="invalid_type",
    )
