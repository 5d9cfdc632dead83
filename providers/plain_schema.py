"""A JSON schema in few and plain words, for upstreams that refuse or misread the rest: `$ref`, `allOf`, `anyOf`, limits and the like.

References are followed, alternatives decided for the richest, limits told in the description (protocol reference for Gemini, 2.9).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from providers import wire
from providers.wire import Json

KEPT = ("minimum", "maximum", "minProperties", "maxProperties")
HINTS = (
    "minLength",
    "maxLength",
    "pattern",
    "minItems",
    "maxItems",
    "uniqueItems",
    "format",
    "default",
    "examples",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
)
SCALAR = str | int | float | bool
ALTERNATIVES = ("anyOf", "oneOf")
MOST_NODES = 5_000  # references that multiply each other are not followed further


def plain_schema(schema: object) -> Json:
    """Raises RecursionError for one that is nested too deeply."""
    return _Plainer(schema).plain(schema, ()).said


@dataclass(slots=True)
class _Plain:
    said: Json
    nullable: bool = False


@dataclass(slots=True)
class _Settled:
    """A schema without references and alternatives. `within`: the references that were followed to get here."""

    schema: Json
    within: tuple[str, ...]
    nullable: bool = False
    notes: list[str] = field(default_factory=list)


class _Plainer:
    def __init__(self, root: object) -> None:
        self._root = root
        self._nodes = 0

    def plain(self, given: object, within: tuple[str, ...]) -> _Plain:
        self._nodes += 1
        if not isinstance(given, dict):
            return _Plain({})  # `true`: anything
        settled = self._settled(given, within)
        schema, notes = settled.schema, settled.notes
        said: Json = {name: schema[name] for name in KEPT if name in schema}
        kind = self._kind(settled)
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            settled.nullable = settled.nullable or None in values
            said["enum"] = [_as_text(value) for value in values if value is not None]
            kind = "string"
        elif kind == "object":
            self._object(schema, said, settled.within)
        elif kind == "array":
            items = schema.get("items") or schema.get("prefixItems")
            said["items"] = self.plain(items[0] if isinstance(items, list) else items, settled.within).said or {"type": "string"}
        notes += [f"{name}: {_as_text(schema[name])}" for name in HINTS if isinstance(schema.get(name), SCALAR)]
        if schema.get("additionalProperties") is False:
            notes.append("no other properties")
        if settled.nullable:
            notes.append("nullable")
        description = schema["description"] if isinstance(schema.get("description"), str) else ""
        if notes:
            description = f"{description} ({', '.join(notes)})".lstrip()
        told: Json = {"type": kind} if kind else {}
        return _Plain({**told, **({"description": description} if description else {}), **said}, settled.nullable)

    def _kind(self, settled: _Settled) -> str:
        """The one type; empty where the schema allows anything."""
        schema, kind = settled.schema, settled.schema.get("type")
        if isinstance(kind, list):
            kinds = [one for one in kind if isinstance(one, str) and one != "null"]
            settled.nullable = settled.nullable or "null" in kind
            settled.notes += [f"or {one}" for one in kinds[1:]]
            kind = kinds[0] if kinds else "string"
        if isinstance(kind, str):
            return kind
        return "object" if isinstance(schema.get("properties"), dict) else "array" if "items" in schema else ""

    def _object(self, schema: Json, said: Json, within: tuple[str, ...]) -> None:
        properties = schema["properties"] if isinstance(schema.get("properties"), dict) else {}
        plain = {name: self.plain(inner, within) for name, inner in properties.items()}
        said["properties"] = {name: inner.said for name, inner in plain.items()}
        required = [name for name in _names(schema.get("required")) if name in plain and not plain[name].nullable]
        if required:
            said["required"] = required

    def _settled(self, schema: Json, within: tuple[str, ...]) -> _Settled:
        settled = _Settled(schema, within)
        while True:
            self._follow(settled)
            self._merge(settled)
            if not any(isinstance(settled.schema.get(name), list) for name in ALTERNATIVES):
                return settled
            self._decide(settled)

    def _follow(self, settled: _Settled) -> None:
        """To where a reference leads, with what stands beside it. One that leads back, or nowhere, becomes any object."""
        while isinstance(reference := settled.schema.get("$ref"), str):
            self._nodes += 1
            beside = {name: value for name, value in settled.schema.items() if name != "$ref"}
            found = self._at(reference)
            if reference in settled.within or self._nodes > MOST_NODES or not isinstance(found, dict):
                settled.schema = {"type": "object", "description": f"See: {reference.rpartition('/')[2]}", **beside}
            else:
                settled.schema, settled.within = {**found, **beside}, (*settled.within, reference)

    def _at(self, reference: str) -> object:
        if not reference.startswith("#"):
            return None
        found = self._root
        for name in reference.split("/")[1:]:
            found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        return found

    def _merge(self, settled: _Settled) -> None:
        """The branches of `allOf` into the schema."""
        branches = settled.schema.get("allOf")
        if not isinstance(branches, list):
            return
        merged = {name: value for name, value in settled.schema.items() if name != "allOf"}
        for branch in branches:
            self._nodes += 1
            if not isinstance(branch, dict):
                continue
            inner = _Settled(branch, settled.within)
            self._follow(inner)
            self._merge(inner)
            settled.within = inner.within
            both = {**inner.schema, **merged}
            if isinstance(merged.get("properties"), dict) and isinstance(inner.schema.get("properties"), dict):
                both["properties"] = {**inner.schema["properties"], **merged["properties"]}
            if required := [*_names(merged.get("required")), *_names(inner.schema.get("required"))]:
                both["required"] = required
            merged = both
        settled.schema = merged

    def _decide(self, settled: _Settled) -> None:
        """One branch of `anyOf` or `oneOf` into the schema: the richest."""
        given = next(settled.schema[name] for name in ALTERNATIVES if isinstance(settled.schema.get(name), list))
        rest = {name: value for name, value in settled.schema.items() if name not in ALTERNATIVES}
        self._nodes += len(given)
        branches = [_Settled(one, settled.within) for one in given if isinstance(one, dict)]
        for branch in branches:
            self._follow(branch)
            self._merge(branch)
        real = [branch for branch in branches if branch.schema.get("type") != "null"]
        settled.nullable = settled.nullable or len(real) < len(branches)
        if not real or ("properties" in rest and not any("properties" in branch.schema for branch in real)):
            settled.schema = rest  # alternatives of what is required, or the like
        elif all("const" in branch.schema or isinstance(branch.schema.get("enum"), list) for branch in real):
            values = [[one.schema["const"]] if "const" in one.schema else one.schema["enum"] for one in real]
            settled.schema = {**rest, "enum": [value for some in values for value in some]}
        else:
            best = max(real, key=_richness)
            settled.notes += [f"or {branch.schema.get('type') or 'other'}" for branch in real if branch is not best]
            settled.schema, settled.within = {**best.schema, **rest}, best.within


def _richness(branch: _Settled) -> int:
    schema = branch.schema
    if schema.get("type") == "object" or "properties" in schema:
        return 3
    return 2 if schema.get("type") == "array" or "items" in schema else 1


def _names(value: object) -> list[str]:
    return list(dict.fromkeys(one for one in value if isinstance(one, str))) if isinstance(value, list) else []


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else wire.encode_json(value).decode()
