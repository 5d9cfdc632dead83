"""A plausible value for a JSON schema: what the demo's models fill forms and call tools with."""

from __future__ import annotations

import math
from typing import Any

from providers.wire import Json

# A schema may refer to itself, and then grows without end: so deep, and so many values in all.
DEEPEST, MOST_VALUES = 12, 1000
# From here on everything that may be left out is.
DEEP = 4
LONGEST_STRING = 1000

_BY_FORMAT = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00",
    "email": "ada@example.org",
    "uri": "https://example.org/",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "192.0.2.1",
}
_BY_NAME = {"city": "Paris", "location": "Paris", "country": "France", "name": "Ada", "query": "weather", "language": "en"}


def instance_of(schema: object) -> Any:
    """A value that fits the schema, always the same one. What it does not know of a schema it leaves out."""
    return _Making(schema).value(schema, "", 0)


class _Making:
    def __init__(self, root: object) -> None:
        self._root = root
        self._left = MOST_VALUES

    def value(self, schema: object, name: str, depth: int) -> Any:
        self._left -= 1
        if not isinstance(schema, dict) or depth > DEEPEST or self._left < 0:
            return None
        for word in ("const", "default"):
            if word in schema:
                return schema[word]
        for word in ("enum", "examples"):
            if isinstance(schema.get(word), list) and schema[word]:
                return schema[word][0]
        if isinstance(schema.get("$ref"), str):
            return self.value(self._referred(schema["$ref"]), name, depth + 1)
        for word in ("anyOf", "oneOf", "allOf"):
            if isinstance(schema.get(word), list) and schema[word]:
                return self.value(_chosen(schema[word], depth), name, depth + 1)
        match _type_of(schema, name):
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, name, depth)
            case "string":
                return _string(schema, name)
            case "integer":
                return math.floor(_number(schema))
            case "number":
                return _number(schema)
            case "boolean":
                return True
        return None

    def _referred(self, reference: str) -> object:
        found = self._root
        for step in reference.removeprefix("#").strip("/").split("/"):
            if step:
                found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        return found

    def _object(self, schema: Json, depth: int) -> Json:
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, dict):
            return {}
        if depth > DEEP and isinstance(required, list):
            properties = {name: inner for name, inner in properties.items() if name in required}
        return {name: self.value(inner, name, depth + 1) for name, inner in properties.items()}

    def _array(self, schema: Json, name: str, depth: int) -> list[Any]:
        least = _whole(schema.get("minItems")) or 0
        if (depth > DEEP and not least) or _whole(schema.get("maxItems")) == 0:
            return []
        count = min(max(1, least), max(1, self._left))
        return [self.value(schema.get("items"), name.removesuffix("s"), depth + 1) for _ in range(count)]


def _type_of(schema: Json, name: str) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")
    if isinstance(kind, str):
        return kind
    return "object" if "properties" in schema else "array" if "items" in schema else "string" if name else "object"


def _chosen(options: list[Any], depth: int) -> object:
    """The first that says something; deep down rather nothing, so that a schema of itself comes to an end."""
    empty = [option for option in options if isinstance(option, dict) and option.get("type") == "null"]
    if depth > DEEP and empty:
        return empty[0]
    return next((option for option in options if option not in empty), options[0])


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _bound(schema: Json, word: str) -> int | float | None:
    """A bound that arithmetic can trust; a schema may say anything."""
    value = schema.get(word)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 53 else None


def _number(schema: Json) -> int | float:
    value: int | float = 1
    if (above := _bound(schema, "exclusiveMinimum")) is not None:
        value = max(value, math.floor(above) + 1)
    if (least := _bound(schema, "minimum")) is not None:
        value = max(value, math.ceil(least))
    if (most := _bound(schema, "maximum")) is not None:
        value = min(value, most)
    if (below := _bound(schema, "exclusiveMaximum")) is not None and value >= below:
        value = math.ceil(below) - 1
    step = _bound(schema, "multipleOf")
    if step is not None and step > 1e-6 and value % step:
        value = math.ceil(value / step) * step
    return value


def _string(schema: Json, name: str) -> str:
    value = _BY_FORMAT.get(str(schema.get("format"))) or _BY_NAME.get(name.lower()) or "example"
    least, most = _whole(schema.get("minLength")) or 0, _whole(schema.get("maxLength"))
    value = value.ljust(min(least, LONGEST_STRING), "x")
    return value if most is None else value[: max(0, most)]
