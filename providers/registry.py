"""Finds the adapters: every module in `providers/adapters/`, and outside packages by the entry point `sluice.adapters`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from providers import adapters
from providers.adapter import Adapter


@cache
def _all() -> dict[str, Adapter]:
    modules = [importlib.import_module(f"{adapters.__name__}.{found.name}") for found in pkgutil.iter_modules(adapters.__path__)]
    classes = [
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Adapter) and value.__module__ == module.__name__ and "name" in vars(value)
    ]
    classes += [entry.load() for entry in entry_points(group="sluice.adapters")]
    return {cls.name: cls() for cls in sorted(classes, key=lambda cls: cls.name)}


@cache
def adapter(name: str) -> Adapter:
    """Raises KeyError for a kind that no adapter speaks."""
    return _all()[name]


def names() -> list[str]:
    return list(_all())


def choices() -> list[tuple[str, str]]:
    return [(name, one.title or name) for name, one in _all().items()]
