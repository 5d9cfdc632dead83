"""The family of errors is what its drawings say, and each member speaks OpenAI's shape."""

from __future__ import annotations

import inspect
import json
import re
from types import ModuleType

import pytest

from providers import failures, wire
from providers.wire import ApiError
from proxy import errors


def members(module: ModuleType) -> list[type[ApiError]]:
    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, ApiError) and value.__module__ == module.__name__
    ]


def drawn(module: ModuleType) -> dict[str, str]:
    """Name -> the rest of its line in the module's drawing."""
    assert module.__doc__ is not None
    lines = re.findall(r"^[│├└─ ]*([A-Z]\w+)\b(.*)$", module.__doc__.split("\n\n", 1)[1], re.MULTILINE)
    return dict(lines)


@pytest.mark.parametrize("module", [errors, failures], ids=lambda module: module.__name__)
def test_the_drawing_names_every_error_with_its_status(module: ModuleType) -> None:
    lines = drawn(module)

    for member in members(module):
        assert member.__name__ in lines, f"{member.__name__} is not drawn"
        said = lines[member.__name__]
        if statuses := re.findall(r"\b[45]\d\d\b", said):
            assert str(made(member).status) in statuses, f"{member.__name__} is {made(member).status}, drawn: {said}"
    assert set(lines) - {"ApiError"} <= {name for name in dir(errors) + dir(failures) if name[0].isupper()}


def made(member: type[ApiError]) -> ApiError:
    return member("It is so.", allow="GET") if member is errors.WrongMethod else member("It is so.")  # type: ignore[call-arg]


@pytest.mark.parametrize("member", members(errors) + members(failures), ids=lambda member: member.__name__)
def test_each_speaks_openais_shape(member: type[ApiError]) -> None:
    body = json.loads(wire.encode_json(made(member).body()))

    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] == "It is so."
    assert re.fullmatch(r"[a-z_]+", body["error"]["type"])
    assert body["error"]["param"] is None


def test_what_waiting_does_not_mend_says_so() -> None:
    for member in members(errors) + members(failures):
        problem = made(member)
        assert problem.should_retry == (False if problem.code == "insufficient_quota" else None), member
