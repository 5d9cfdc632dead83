"""The options that say what a new upstream account is: shared by the commands that add one."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db.models import Model

from providers.models import Credential


def add(parser: CommandParser, *, label_needed: bool = True) -> None:
    parser.add_argument("--label", required=label_needed, help="its name in lists, such as 'Team account'")
    parser.add_argument("--prefix", help="public model ids are PREFIX/model; default: the kind")
    parser.add_argument("--base-url", default="", help="default: the vendor's own")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; may be repeated")
    parser.add_argument("--weight", type=int, default=1, help="its share of the requests in its pool")
    parser.add_argument("--priority", type=int, default=0, help="higher goes first")
    parser.add_argument("--organization", metavar="SLUG", help="for this organization alone; default: shared by all")
    parser.add_argument("--accept-policy", action="store_true", help="I know what the vendor's terms say of this kind")


def read(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `actions.add_credential` that these options give. Raises CommandError."""
    names = ("prefix", "base_url", "weight", "priority", "accept_policy")
    return {
        **{name: options[name] for name in names},
        "settings": _settings(options["set"]),
        "organization": _organization(options["organization"]),
    }


def _settings(pairs: list[str]) -> dict[str, object]:
    settings: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise CommandError(f"--set {pair}: write it as name=value.")
        settings[name.strip()] = value
    return settings


def _organization(slug: str | None) -> Model | None:
    if slug is None:
        return None
    model = Credential._meta.get_field("organization").related_model
    assert isinstance(model, type)
    found = model._default_manager.filter(slug=slug).first()
    if found is None:
        raise CommandError(f"There is no organization '{slug}'.")
    return found
