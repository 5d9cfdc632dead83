"""A JSON schema in the words that Gemini reads: every rule of protocol reference 2.9."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from providers.plain_schema import HINTS, KEPT, plain_schema

STRING = {"type": "string"}
WORDS = {"type", "description", "enum", "properties", "required", "items", *KEPT}


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "plain"),
    [
        (of(a=STRING), of(a=STRING)),
        ({"properties": {"a": STRING}}, of(a=STRING)),
        ({"type": "object"}, of()),
        (True, {}),
        ({}, {}),
        # what is only said in words
        ({"type": "string", "minLength": 2, "format": "date"}, {"type": "string", "description": "(minLength: 2, format: date)"}),
        ({"type": "integer", "description": "How many.", "default": 3}, {"type": "integer", "description": "How many. (default: 3)"}),
        ({"type": "integer", "minimum": 1, "maximum": 9}, {"type": "integer", "minimum": 1, "maximum": 9}),
        ({"type": "string", "default": {"a": 1}, "examples": ["x"]}, STRING),
        ({**of(a=STRING), "additionalProperties": False}, {**of(a=STRING), "description": "(no other properties)"}),
        ({**of(a=STRING), "additionalProperties": {"type": "integer"}}, of(a=STRING)),
        # constants and choices
        ({"const": "on"}, {"type": "string", "enum": ["on"]}),
        ({"type": "integer", "enum": [1, 2]}, {"type": "string", "enum": ["1", "2"]}),
        ({"enum": ["a", None]}, {"type": "string", "description": "(nullable)", "enum": ["a"]}),
        ({"oneOf": [{"const": "a"}, {"const": "b"}, {"enum": ["c"]}]}, {"type": "string", "enum": ["a", "b", "c"]}),
        # alternatives
        ({"anyOf": [STRING, of(a=STRING), {"type": "array"}]}, {**of(a=STRING), "description": "(or string, or array)"}),
        ({"oneOf": [STRING, {"type": "array", "items": STRING}]}, {"type": "array", "items": STRING, "description": "(or string)"}),
        ({"anyOf": [{"anyOf": [of(a=STRING)]}, STRING], "description": "d"}, {**of(a=STRING), "description": "d (or string)"}),
        ({"anyOf": [{"anyOf": [of(a=STRING)]}]}, of(a=STRING)),
        ({"anyOf": [{"type": "null"}]}, {"description": "(nullable)"}),
        ({**of(a=STRING, b=STRING), "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, of(a=STRING, b=STRING)),
        ({"type": ["string", "integer", "null"]}, {"type": "string", "description": "(or integer, nullable)"}),
        # lists
        ({"type": "array"}, {"type": "array", "items": STRING}),
        ({"items": {"type": "integer"}}, {"type": "array", "items": {"type": "integer"}}),
        ({"type": "array", "prefixItems": [{"type": "integer"}, STRING]}, {"type": "array", "items": {"type": "integer"}}),
        # together
        (
            {"allOf": [{**of(a=STRING), "required": ["a"]}, {**of(b=STRING), "required": ["b"]}]},
            {**of(a=STRING, b=STRING), "required": ["a", "b"]},
        ),
        # what is required must be there, and must not be allowed to be null
        ({**of(a=STRING), "required": ["a", "gone"]}, {**of(a=STRING), "required": ["a"]}),
        ({**of(a=STRING), "required": ["gone"]}, of(a=STRING)),
        (
            {**of(a={"anyOf": [STRING, {"type": "null"}]}, b=STRING), "required": ["a", "b"]},
            {**of(a={"type": "string", "description": "(nullable)"}, b=STRING), "required": ["b"]},
        ),
        # a property may have the name of a keyword
        (
            of(format=STRING, title=STRING, default=STRING, **{"$ref": STRING}),
            of(format=STRING, title=STRING, default=STRING, **{"$ref": STRING}),
        ),
        # references
        ({"$ref": "#/$defs/A", "$defs": {"A": STRING}}, STRING),
        (
            {"$ref": "#/$defs/A~1b", "description": "mine", "$defs": {"A/b": {**STRING, "description": "its"}}},
            {**STRING, "description": "mine"},
        ),
        ({"$ref": "#/definitions/Gone"}, {"type": "object", "description": "See: Gone", "properties": {}}),
        ({"$ref": "https://example.org/schema.json"}, {"type": "object", "description": "See: schema.json", "properties": {}}),
    ],
)
def test_each_rule(schema: Any, plain: dict[str, Any]) -> None:
    assert plain_schema(schema) == plain


UNKNOWN = (
    "$schema $id $comment propertyNames patternProperties enumTitles prefill deprecated nullable title x-hint strict example readOnly "
    "writeOnly additionalItems contains dependencies if then else not contentEncoding contentMediaType defer_loading"
)


@pytest.mark.parametrize("name", UNKNOWN.split())
def test_what_google_does_not_know_goes(name: str) -> None:
    assert plain_schema({**STRING, name: {"type": "string"}}) == STRING


class Node(BaseModel):
    value: int
    next: Node | None = None
    children: list[Node] = []


def test_a_schema_that_contains_itself_comes_to_an_end() -> None:
    plain = plain_schema(Node.model_json_schema())

    again = {"type": "object", "properties": {}}
    assert plain["properties"]["value"] == {"type": "integer"}
    assert plain["properties"]["next"] == {**again, "description": "See: Node (nullable)"}
    assert plain["properties"]["children"]["items"] == {**again, "description": "See: Node"}
    assert plain["required"] == ["value"]


@pytest.mark.parametrize("how", ["anyOf", "allOf"])
def test_a_way_back_by_branches_is_seen(how: str) -> None:
    inner = {how: [{"$ref": "#/$defs/N"}]}
    again = {"type": "object", "description": "See: N", "properties": {}}

    assert plain_schema({**inner, "$defs": {"N": of(n=inner)}}) == of(n=again)


def test_many_references_to_many_alternatives_do_not_multiply() -> None:
    wide = {"anyOf": [{"type": "string", "maxLength": number} for number in range(3000)]}
    began = time.monotonic()
    plain_schema({**of(**{str(number): {"$ref": "#/$defs/W"} for number in range(4000)}), "$defs": {"W": wide}})

    assert time.monotonic() - began < 5


@pytest.mark.parametrize("how", ["properties", "anyOf", "allOf"])
def test_references_that_multiply_are_not_followed_for_ever(how: str) -> None:
    def level(number: int) -> dict[str, Any]:
        both = [{"$ref": f"#/$defs/{number + 1}"}, {"$ref": f"#/$defs/{number + 1}"}]
        return of(a=both[0], b=both[1]) if how == "properties" else {how: both}

    began = time.monotonic()
    plain_schema({"$ref": "#/$defs/0", "$defs": {str(number): level(number) for number in range(60)}})

    assert time.monotonic() - began < 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["object", "array", "string", "null", "#/$defs/a", "#", "a", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "properties", "items", "anyOf", "oneOf", "allOf", "$ref", "$defs", "enum", "const", "required", "a", *HINTS[:3]]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=25,
)


@given(JSON)
def test_whatever_is_given_the_words_are_those_that_google_knows(schema: Any) -> None:
    def check(plain: dict[str, Any]) -> None:
        assert plain.keys() <= WORDS
        assert isinstance(plain.get("type", ""), str)
        assert set(plain.get("required", [])) <= plain.get("properties", {}).keys()
        for inner in plain.get("properties", {}).values():
            check(inner)
        if "items" in plain:
            check(plain["items"])

    check(plain_schema(schema))
