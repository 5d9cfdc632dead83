"""Aliases as people write them: in the admin, over the API, and as the hot path reads them."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
from django.apps import apps
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.test import Client

from accounts.models import AuditEntry, User
from proxy import snapshot
from proxy.models import Route, RouteTarget
from proxy.routes import Leads, change_route, create_route, delete_route
from tests.accounts.conftest import People

pytestmark = pytest.mark.django_db
ADMIN = "/admin/proxy/route/"


@pytest.fixture
def people(db: None) -> People:
    return People()


def made(**options: Any) -> Route:
    return create_route(**{"organization": None, "name": "fast", "targets": [Leads("demo/echo", 0)]} | options)


def test_an_alias_reaches_the_hot_path_with_all_that_it_says():
    made(
        targets=[Leads("c/z", 1, 4), Leads("a/x", 0, 3), Leads("b/y", 0)],
        defaults={"temperature": 0.2}, overrides={"max_tokens": 5}, drops=["user", "user"], on_abort="drain",
    )  # fmt: skip
    [alias] = snapshot.load().aliases

    assert (alias.targets, alias.ranks, alias.weights) == (("a/x", "b/y", "c/z"), (0, 0, 1), (3, 1, 4))
    assert alias.takes_turns
    assert (alias.parameters.defaults, alias.parameters.overrides, alias.parameters.drops) == (
        {"temperature": 0.2},
        {"max_tokens": 5},
        {"user"},
    )
    assert alias.drain_seconds == 30


def test_an_alias_that_was_written_past_our_forms_is_left_out_alone():
    made(name="good")
    made(name="bad")
    Route.objects.filter(name="bad").update(defaults=["x"])
    assert [alias.name for alias in snapshot.load().aliases] == ["good"]


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"name": " "}, "name", "1 to 200"),
        ({"name": "two words"}, "name", "no spaces"),
        ({"name": "a*"}, "name", "one name"),
        ({"targets": []}, "targets", "at least one"),
        ({"targets": [Leads("fast", 0)]}, "targets", "cannot lead to itself"),
        ({"targets": [Leads("a/*", 0)]}, "targets", "nowhere else"),
        ({"name": "*", "targets": [Leads("a*/x*", 0)]}, "targets", "nowhere else"),
        ({"name": "*", "targets": [Leads("*/*", 0)]}, "targets", "nowhere else"),
        ({"targets": [Leads("a/x", 0), Leads("a/x", 0)]}, "targets", "twice"),
        ({"targets": [Leads("a/x", 0, 0)]}, "targets", "weight"),
        ({"targets": [Leads("a/x", -1)]}, "targets", "position"),
        ({"targets": [Leads("x" * 241, 0)]}, "targets", "240"),
        ({"targets": [Leads(f"a/{number}", 0) for number in range(51)]}, "targets", "at most 50"),
        ({"defaults": ["x"]}, "defaults", "object"),
        ({"defaults": {"model": "x"}}, "defaults", "not an alias's"),
        ({"overrides": {"stream": True}}, "overrides", "not an alias's"),
        ({"overrides": {"api_base": "http://evil"}}, "overrides", "not an alias's"),
        ({"overrides": {"messages": []}}, "overrides", "not an alias's"),
        ({"drops": ["messages"]}, "drops", "not an alias's"),
        ({"drops": "messages"}, "drops", "list"),
        ({"drops": [1]}, "drops", "list"),
        ({"defaults": {"max_tokens": "many"}}, "defaults", "another type"),
        ({"defaults": {"x": "y" * 20_000}}, "defaults", "16 KiB"),
        ({"defaults": {"x": "\ud800"}}, "defaults", "JSON cannot carry"),
        ({"defaults": json.loads('{"x":' * 501 + "1" + "}" * 501)}, "defaults", "JSON cannot carry"),
        ({"on_abort": "wait"}, "on_abort", "no policy"),
        ({"on_abort": "drain", "drain_seconds": 31}, "drain_seconds", "30"),
    ],
)
def test_an_alias_that_cannot_work_is_refused_in_words(options: dict[str, Any], field: str, words: str):
    with pytest.raises(ValidationError) as refused:
        made(**options)
    assert words in " ".join(refused.value.message_dict[field])
    assert not Route.objects.exists()


def test_a_name_is_taken_once_in_each_organization(people: People):
    made()
    made(organization=people.acme)
    for organization in (None, people.acme):
        with pytest.raises(ValidationError):
            made(organization=organization)


def test_changes_are_written_down_and_announced(people: People):
    route, before = made(), snapshot.version()
    change_route(route, name="quick", targets=[Leads("a/x", 0, 2), Leads("b/y", 0)], on_abort="drain", drain_seconds=5, actor=people.olga)

    route.refresh_from_db()
    assert (route.name, route.on_abort, route.drain_seconds) == ("quick", "drain", 5)
    assert [(target.model, target.weight) for target in route.targets.all()] == [("a/x", 2), ("b/y", 1)]
    assert snapshot.version() > before
    assert AuditEntry.objects.get(action="alias.changed").detail == {"fields": ["drain_seconds", "name", "on_abort", "targets"]}
    change_route(route, on_abort="cancel")
    route.refresh_from_db()
    assert route.drain_seconds == 0
    with pytest.raises(ValidationError):
        change_route(route, name="a/x")  # it would lead to itself
    delete_route(route, actor=people.olga)
    assert not Route.objects.exists()
    assert AuditEntry.objects.get(action="alias.deleted").actor == people.olga


def test_the_database_keeps_weights_positive_and_drains_timed():
    route = made()
    with pytest.raises(IntegrityError), transaction.atomic():
        RouteTarget.objects.create(route=route, model="a/x", weight=0)
    for wrong in ({"on_abort": "drain", "drain_seconds": 0}, {"on_abort": "cancel", "drain_seconds": 9}):
        with pytest.raises(IntegrityError), transaction.atomic():
            Route.objects.filter(pk=route.pk).update(**wrong)


def test_aliases_from_before_there_were_weights_keep_their_order():
    route = made()
    RouteTarget.objects.all().delete()
    for position, model in ((0, "a/x"), (0, "b/y"), (5, "c/z"), (2, "d/w")):
        RouteTarget.objects.create(route=route, model=model, position=position)

    importlib.import_module("proxy.migrations.0003_alias_weights_parameters_and_abort").number_targets(apps, None)

    assert [(target.model, target.position) for target in route.targets.all()] == [("a/x", 0), ("b/y", 1), ("d/w", 2), ("c/z", 3)]


# The admin


def form(*targets: tuple[object, str, object], **fields: object) -> dict[str, object]:
    said: dict[str, object] = {
        "name": "fast", "organization": "", "defaults": "{}", "overrides": "{}", "drops": "[]", "on_abort": "cancel", "drain_seconds": "",
        "targets-TOTAL_FORMS": len(targets), "targets-INITIAL_FORMS": 0, "targets-MIN_NUM_FORMS": 1, "targets-MAX_NUM_FORMS": 1000,
    }  # fmt: skip
    for number, (position, model, weight) in enumerate(targets):
        said |= {f"targets-{number}-position": position, f"targets-{number}-model": model, f"targets-{number}-weight": weight}
    return said | fields


@pytest.fixture
def operator(people: People) -> Client:
    client = Client()
    client.force_login(people.olga)
    return client


def test_the_admin_takes_weights_parameters_and_what_becomes_of_abandoned_calls(operator: Client):
    answer = operator.post(
        f"{ADMIN}add/",
        form(
            ("0", "a/x", "3"), ("0", "b/y", ""), ("", "c/z", ""),
            defaults='{"temperature": 0.2}', overrides='{"max_tokens": 5}', drops='["user"]', on_abort="drain", drain_seconds="20",
        ),
    )  # fmt: skip

    assert answer.status_code == 302, answer.content.decode()[:3000]
    route = Route.objects.get()
    assert [(target.model, target.position, target.weight) for target in route.targets.all()] == [
        ("a/x", 0, 3),
        ("b/y", 0, 1),
        ("c/z", 1, 1),
    ]
    assert (route.defaults, route.overrides, route.drops, route.drain_seconds) == ({"temperature": 0.2}, {"max_tokens": 5}, ["user"], 20)
    page = operator.get(ADMIN).content.decode()
    assert "a/x × 3 | b/y × 1 → c/z" in page
    assert "temperature, max_tokens!, no user" in page
    assert operator.get(f"{ADMIN}{route.pk}/change/").status_code == 200


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defaults": '{"messages": []}'}, "not an alias"),
        ({"defaults": "[1]"}, "object of parameters"),
        ({"overrides": '{"max_tokens": "x"}'}, "another type"),
        ({"drops": '["model"]'}, "not an alias"),
        ({"drops": '{"a": 1}'}, "list of parameters"),
        ({"on_abort": "drain", "drain_seconds": "9999"}, "30 seconds"),
        ({"name": "a b"}, "no spaces"),
        ({"targets-0-weight": "0"}, "from 1 to 1000"),
        ({"targets-0-model": "a/*"}, "nowhere else"),
    ],
)
def test_the_admin_refuses_in_words(operator: Client, changes: dict[str, object], words: str):
    answer = operator.post(f"{ADMIN}add/", form(("0", "a/x", "1"), **changes))

    assert answer.status_code == 200
    assert words in answer.content.decode()
    assert not Route.objects.exists()


# The API


def call(user: User, method: str, path: str, body: object = None) -> Any:
    client = Client()
    client.force_login(user)
    return client.generic(method, f"/api{path}", b"" if body is None else json.dumps(body), content_type="application/json")


def test_an_alias_over_the_api(people: People):
    body = {
        "name": "fast", "targets": [{"model": "a/x", "weight": 3, "position": 0}, {"model": "b/y", "position": 0}, {"model": "c/z"}],
        "defaults": {"temperature": 0.2}, "drops": ["user"], "on_abort": "drain", "drain_seconds": 9,
    }  # fmt: skip
    made = call(people.alice, "POST", "/organizations/acme/routes", body)

    assert made.status_code == 201, made.content
    assert made.json() == {
        "id": made.json()["id"], "name": "fast", "organization": "acme",
        "targets": [{"model": "a/x", "position": 0, "weight": 3}, {"model": "b/y", "position": 0, "weight": 1},
                    {"model": "c/z", "position": 2, "weight": 1}],
        "defaults": {"temperature": 0.2}, "overrides": {}, "drops": ["user"], "on_abort": "drain", "drain_seconds": 9,
    }  # fmt: skip
    path = f"/organizations/acme/routes/{made.json()['id']}"
    changed = call(people.amy, "PATCH", path, {"defaults": {}, "on_abort": "cancel"}).json()
    assert (changed["defaults"], changed["drops"], changed["drain_seconds"], len(changed["targets"])) == ({}, ["user"], 0, 3)
    assert call(people.bob, "GET", "/organizations/acme/routes").json() == [changed]
    assert call(people.olga, "GET", "/routes").json() == []
    assert call(people.alice, "DELETE", path).status_code == 204
    assert call(people.alice, "DELETE", path).status_code == 404
    actors = dict(AuditEntry.objects.filter(action__startswith="alias.").values_list("action", "actor__email"))
    assert actors == {
        "alias.created": "alice@example.org", "alias.changed": "amy@example.org", "alias.deleted": "alice@example.org",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"targets": []}, "targets"),
        ({"overrides": {"model": "x"}}, "overrides"),
        ({"name": "fast forward"}, "name"),
        ({"on_abort": "wait"}, "on_abort"),
        ({"colour": "red"}, "colour"),
        ({"targets": [{"model": "a/x", "weight": 0}]}, "targets.0.weight"),
    ],
)
def test_the_api_refuses_with_the_field(people: People, change: dict[str, Any], field: str):
    answer = call(people.olga, "POST", "/routes", {"name": "fast", "targets": [{"model": "a/x"}]} | change)

    assert answer.status_code == 400
    assert list(answer.json()["error"]["fields"]) == [field]
    assert not Route.objects.exists()
