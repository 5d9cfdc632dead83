"""What people give for an alias, checked, and the writes of aliases. The admin's form asks the same rules.

Every rule raises ValidationError keyed by the field; every write leaves an AuditEntry in its transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from django.core.exceptions import ValidationError
from django.db import transaction

from accounts.actions import record
from accounts.models import Organization, User
from providers import wire
from proxy.catalog import LONGEST_DRAIN_SECONDS
from proxy.models import OnAbort, Route, RouteTarget
from proxy.pipeline.translate import FORBIDDEN

MOST_TARGETS = 50
MOST_POSITION, MOST_WEIGHT = 999, 1000
MOST_PARAMETERS, MOST_PARAMETERS_BYTES = 50, 16 << 10

# What a request is about, where it goes and how it is answered: that is the client's alone.
NOT_PARAMETERS = frozenset(
    {*FORBIDDEN, "model", "stream", "stream_format", "messages", "prompt", "input", "query", "documents", "previous_response_id"}
)
_HEADS: tuple[type[wire.Head], ...] = (
    wire.ChatHead,
    wire.CompletionHead,
    wire.EmbeddingsHead,
    wire.ResponsesHead,
    wire.RerankHead,
    wire.ImagesHead,
    wire.SpeechHead,
)


@dataclass(frozen=True, slots=True)
class Leads:
    """One target of an alias. Those of one position take turns by weight."""

    model: str
    position: int
    weight: int = 1


def clean_name(name: str) -> str:
    name = name.strip()
    if not name or len(name) > 200 or not name.isprintable() or " " in name:
        raise ValidationError({"name": "The name of an alias has 1 to 200 characters and no spaces."})
    if "*" in name and name != "*":
        raise ValidationError({"name": "An alias is one name; * alone catches every name that nobody knows."})
    return name


def clean_targets(name: str, targets: Sequence[Leads]) -> list[Leads]:
    """In the order in which they are tried."""
    if not targets:
        raise ValidationError({"targets": "An alias leads to at least one model."})
    if len(targets) > MOST_TARGETS:
        raise ValidationError({"targets": f"An alias leads to at most {MOST_TARGETS} models."})
    for target in targets:
        _check_target(name, target)
    if len({(target.model, target.position) for target in targets}) < len(targets):
        raise ValidationError({"targets": "The same model stands twice at one position: give it more weight instead."})
    return sorted(targets, key=lambda target: target.position)


def _check_target(name: str, target: Leads) -> None:
    model = target.model
    if not model or len(model) > 240 or not model.isprintable() or model != model.strip():
        raise ValidationError({"targets": "A target is a model such as openai/gpt-4o, in at most 240 characters."})
    if model == name:
        raise ValidationError({"targets": "An alias cannot lead to itself."})
    if "*" in model and not (name == "*" and model.endswith("/*") and model.count("*") == 1):
        raise ValidationError(
            {"targets": "Under the alias * a target may be prefix/*, the name that was asked for; nowhere else is there a *."}
        )
    if not 0 <= target.position <= MOST_POSITION:
        raise ValidationError({"targets": f"A position lies between 0 and {MOST_POSITION}."})
    if not 1 <= target.weight <= MOST_WEIGHT:
        raise ValidationError({"targets": f"A weight is a whole number from 1 to {MOST_WEIGHT}."})


def clean_values(field: str, values: object) -> dict[str, Any]:
    """Defaults or overrides: parameters with their values, of types that the API takes."""
    if not isinstance(values, Mapping):
        raise ValidationError({field: 'Write an object of parameters, such as {"temperature": 0.2}.'})
    if len(values) > MOST_PARAMETERS:
        raise ValidationError({field: f"At most {MOST_PARAMETERS} parameters."})
    try:
        if len(wire.encode_json(values)) > MOST_PARAMETERS_BYTES:
            raise ValidationError({field: f"At most {MOST_PARAMETERS_BYTES >> 10} KiB."})
        if wire.is_too_deep(dict(values)):
            raise RecursionError
    except (OverflowError, RecursionError, UnicodeEncodeError):
        raise ValidationError({field: "A value is one that JSON cannot carry."}) from None
    for name, value in values.items():
        _check_name(field, name)
        heads = [head for head in _HEADS if name in head.__struct_fields__]
        if heads and not any(_fits(head, name, value) for head in heads):
            raise ValidationError({field: f"'{name}' is of another type than the API takes."})
    return dict(values)


def clean_drops(names: object) -> list[str]:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValidationError({"drops": 'Write a list of parameters, such as ["logit_bias"].'})
    if len(names) > MOST_PARAMETERS:
        raise ValidationError({"drops": f"At most {MOST_PARAMETERS} parameters."})
    for name in names:
        _check_name("drops", name)
    return list(dict.fromkeys(names))


def _check_name(field: str, name: object) -> None:
    if not isinstance(name, str) or not name or len(name) > 100 or not name.isprintable():
        raise ValidationError({field: "A parameter's name has 1 to 100 characters."})
    if name in NOT_PARAMETERS:
        raise ValidationError({field: f"'{name}' is not an alias's to set or to take away."})


def _fits(head: type[wire.Head], name: str, value: object) -> bool:
    try:
        msgspec.convert({name: value}, type=head)
    except msgspec.ValidationError:
        return False
    return True


def clean_abort(on_abort: str, drain_seconds: int | None) -> tuple[str, int]:
    """What becomes of a call whose client left: cancelled, or read on for so many seconds."""
    if on_abort not in OnAbort.values:
        raise ValidationError({"on_abort": f"There is no policy '{on_abort}': it is one of {', '.join(OnAbort.values)}."})
    if on_abort == OnAbort.CANCEL:
        return on_abort, 0
    seconds = drain_seconds or LONGEST_DRAIN_SECONDS
    if not 1 <= seconds <= LONGEST_DRAIN_SECONDS:
        raise ValidationError({"drain_seconds": f"Reading on lasts from 1 to {LONGEST_DRAIN_SECONDS} seconds."})
    return on_abort, seconds


def check_free(name: str, organization: Organization | None, route: Route | None = None) -> None:
    same = Route.objects.filter(name=name, organization=organization).first()
    if same is not None and (route is None or same.pk != route.pk):
        raise ValidationError({"name": "There is already an alias of this name."})


@transaction.atomic
def create_route(
    *,
    organization: Organization | None,
    name: str,
    targets: Sequence[Leads],
    defaults: object = None,
    overrides: object = None,
    drops: object = (),
    on_abort: str = OnAbort.CANCEL,
    drain_seconds: int | None = None,
    actor: User | None = None,
) -> Route:
    """A new alias; without an organization it is everybody's. Raises ValidationError."""
    name = clean_name(name)
    check_free(name, organization)
    leads = clean_targets(name, targets)
    on_abort, drain_seconds = clean_abort(on_abort, drain_seconds)
    route = Route.objects.create(
        organization=organization,
        name=name,
        defaults=clean_values("defaults", defaults or {}),
        overrides=clean_values("overrides", overrides or {}),
        drops=clean_drops(drops),
        on_abort=on_abort,
        drain_seconds=drain_seconds,
    )
    _put_targets(route, leads)
    record(actor, organization, "alias.created", route.name, targets=[lead.model for lead in leads])
    return route


@transaction.atomic
def change_route(route: Route, *, actor: User | None = None, **changes: Any) -> None:
    """Change what is given of name, targets (all of them), defaults, overrides, drops, on_abort and drain_seconds.

    Raises ValidationError."""
    route = Route.objects.select_for_update().get(pk=route.pk)
    if "name" in changes:
        route.name = clean_name(changes["name"])
        check_free(route.name, route.organization, route)
    for field in ("defaults", "overrides"):
        if field in changes:
            setattr(route, field, clean_values(field, changes[field]))
    if "drops" in changes:
        route.drops = clean_drops(changes["drops"])
    if {"on_abort", "drain_seconds"} & changes.keys():
        route.on_abort, route.drain_seconds = clean_abort(
            changes.get("on_abort", route.on_abort), changes.get("drain_seconds", route.drain_seconds)
        )
    leads = changes.get("targets") or [] if "targets" in changes else leads_of(route)
    leads = clean_targets(route.name, leads)
    route.save()
    if "targets" in changes:
        _put_targets(route, leads)
    record(actor, route.organization, "alias.changed", route.name, fields=sorted(changes))


@transaction.atomic
def delete_route(route: Route, *, actor: User | None = None) -> None:
    record(actor, route.organization, "alias.deleted", route.name)
    route.delete()


def leads_of(route: Route) -> list[Leads]:
    return [Leads(target.model, target.position, target.weight) for target in route.targets.all()]


def _put_targets(route: Route, leads: Sequence[Leads]) -> None:
    route.targets.all().delete()
    for lead in leads:  # one by one: a save is what the hot path is told of
        RouteTarget.objects.create(route=route, model=lead.model, position=lead.position, weight=lead.weight)
