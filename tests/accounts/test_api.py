"""The management API: who may do what (an explicit table of every route), and what the answers say."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils.timezone import now
from ninja.utils import normalize_path

from accounts import actions
from accounts.models import ApiKey, AuditEntry, Limit, Role, Team, User
from accounts.policy import Allowance
from accounts.principal import is_plausible
from project.api import api
from providers.actions import add_credential
from providers.models import Credential
from proxy.models import Route
from proxy.routes import Leads, create_route
from tests.accounts.conftest import People

# The credential and the alias of a route are Acme's own in an organization's paths, and shared in the others.
ROLES = ("anonymous", "suspended", "stranger", "viewer", "colleague", "holder", "admin", "owner", "operator")

SECRET = "sk-live-0123456789abcdef0123456789"

# Route -> what each role gets. The key of the route is Bob's: he is the holder, and his colleague is a member as he is.
TABLE: dict[tuple[str, str], tuple[int, ...]] = {
    ("GET", "/organizations"): (401, 401, 200, 200, 200, 200, 200, 200, 200),
    ("GET", "/organizations/{slug}/keys"): (401, 401, 404, 200, 200, 200, 200, 200, 200),
    ("POST", "/organizations/{slug}/keys"): (401, 401, 404, 403, 201, 201, 201, 201, 400),
    ("GET", "/organizations/{slug}/keys/{key_id}"): (401, 401, 404, 200, 404, 200, 200, 200, 200),
    ("PATCH", "/organizations/{slug}/keys/{key_id}"): (401, 401, 404, 403, 404, 200, 200, 200, 200),
    ("POST", "/organizations/{slug}/keys/{key_id}/revoke"): (401, 401, 404, 403, 404, 200, 200, 200, 200),
    ("POST", "/organizations/{slug}/keys/{key_id}/rotate"): (401, 401, 404, 403, 404, 201, 201, 201, 201),
    ("POST", "/organizations/{slug}/keys/{key_id}/freeze"): (401, 401, 404, 403, 404, 200, 200, 200, 200),
    ("POST", "/organizations/{slug}/keys/{key_id}/thaw"): (401, 401, 404, 403, 404, 200, 200, 200, 200),
    ("POST", "/organizations/{slug}/freeze"): (401, 401, 404, 403, 403, 403, 200, 200, 200),
    ("POST", "/organizations/{slug}/thaw"): (401, 401, 404, 403, 403, 403, 200, 200, 200),
    ("POST", "/credentials/freeze"): (401, 401, 403, 403, 403, 403, 403, 403, 200),
    ("POST", "/credentials/thaw"): (401, 401, 403, 403, 403, 403, 403, 403, 200),
    ("POST", "/models/freeze"): (401, 401, 403, 403, 403, 403, 403, 403, 200),
    ("POST", "/models/thaw"): (401, 401, 403, 403, 403, 403, 403, 403, 200),
    ("GET", "/organizations/{slug}/usage"): (401, 401, 404, 200, 200, 200, 200, 200, 200),
    ("GET", "/organizations/{slug}/keys/{key_id}/usage"): (401, 401, 404, 200, 404, 200, 200, 200, 200),
    ("GET", "/organizations/{slug}/keys/{key_id}/requests"): (401, 401, 404, 200, 404, 200, 200, 200, 200),
    ("GET", "/"): (401, 401, 200, 200, 200, 200, 200, 200, 200),
    ("GET", "/kinds"): (401, 401, 200, 200, 200, 200, 200, 200, 200),
    ("GET", "/credentials"): (401, 401, 403, 403, 403, 403, 403, 403, 200),
    ("POST", "/credentials"): (401, 401, 403, 403, 403, 403, 403, 403, 201),
    ("GET", "/credentials/{credential_id}"): (401, 401, 403, 403, 403, 403, 403, 403, 200),
    ("PATCH", "/credentials/{credential_id}"): (401, 401, 403, 403, 403, 403, 403, 403, 200),
    ("GET", "/organizations/{slug}/credentials"): (401, 401, 404, 403, 403, 403, 200, 200, 200),
    ("POST", "/organizations/{slug}/credentials"): (401, 401, 404, 403, 403, 403, 201, 201, 201),
    ("GET", "/organizations/{slug}/credentials/{credential_id}"): (401, 401, 404, 403, 403, 403, 200, 200, 200),
    ("PATCH", "/organizations/{slug}/credentials/{credential_id}"): (401, 401, 404, 403, 403, 403, 200, 200, 200),
    ("GET", "/routes"): (401, 401, 403, 403, 403, 403, 403, 403, 200),
    ("POST", "/routes"): (401, 401, 403, 403, 403, 403, 403, 403, 201),
    ("PATCH", "/routes/{route_id}"): (401, 401, 403, 403, 403, 403, 403, 403, 200),
    ("DELETE", "/routes/{route_id}"): (401, 401, 403, 403, 403, 403, 403, 403, 204),
    ("GET", "/organizations/{slug}/routes"): (401, 401, 404, 200, 200, 200, 200, 200, 200),
    ("POST", "/organizations/{slug}/routes"): (401, 401, 404, 403, 403, 403, 201, 201, 201),
    ("PATCH", "/organizations/{slug}/routes/{route_id}"): (401, 401, 404, 403, 403, 403, 200, 200, 200),
    ("DELETE", "/organizations/{slug}/routes/{route_id}"): (401, 401, 404, 403, 403, 403, 204, 204, 204),
    ("GET", "/explain"): (401, 401, 404, 200, 404, 200, 200, 200, 200),
}
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    # An operator who is no member holds no key: 400 says so. Everybody else makes one for themselves.
    ("POST", "/organizations/{slug}/keys"): {"name": "new"},
    ("PATCH", "/organizations/{slug}/keys/{key_id}"): {"name": "renamed"},
    ("POST", "/organizations/{slug}/keys/{key_id}/rotate"): {},
    ("POST", "/credentials"): {"kind": "demo", "label": "new"},
    ("PATCH", "/credentials/{credential_id}"): {"label": "renamed"},
    ("POST", "/organizations/{slug}/credentials"): {"kind": "demo", "label": "new", "prefix": "acme-demo"},
    ("PATCH", "/organizations/{slug}/credentials/{credential_id}"): {"label": "renamed"},
    ("POST", "/routes"): {"name": "new", "targets": [{"model": "demo/echo"}]},
    ("PATCH", "/routes/{route_id}"): {"name": "renamed"},
    ("POST", "/organizations/{slug}/routes"): {"name": "new", "targets": [{"model": "demo/echo"}]},
    ("PATCH", "/organizations/{slug}/routes/{route_id}"): {"name": "renamed"},
    ("POST", "/organizations/{slug}/keys/{key_id}/freeze"): {"minutes": 5},
    ("POST", "/organizations/{slug}/freeze"): {"minutes": 5},
    ("POST", "/organizations/{slug}/thaw"): {},
    ("POST", "/credentials/freeze"): {"minutes": 5},
    ("POST", "/credentials/thaw"): {},
    ("POST", "/models/freeze"): {"model": "a/*", "minutes": 5},
    ("POST", "/models/thaw"): {"model": "a/*"},
}
# Things that a change would show in.
WRITTEN = (ApiKey, Credential, Route)


def things_of(people: People) -> dict[str, dict[str, int]]:
    """Numbers for the paths: of Acme's own things, and of the shared ones."""
    key = people.key(people.bob).pk
    found = {}
    for name, organization in (("own", people.acme), ("shared", None)):
        credential = add_credential("demo", name, "", prefix=name, organization=organization)
        route = create_route(organization=organization, name="fast", targets=[Leads("demo/echo", 0)])
        found[name] = {"key_id": key, "credential_id": credential.pk, "route_id": route.pk}
    return found


def path_to(path: str, things: dict[str, dict[str, int]], slug: str = "acme") -> str:
    numbers = things["own" if "{slug}" in path else "shared"]
    return path.format(slug=slug, **numbers) + (f"?key={numbers['key_id']}&model=demo/echo" if path == "/explain" else "")


def body_of(method: str, path: str, things: dict[str, dict[str, int]]) -> dict[str, Any] | None:
    body = BODIES.get((method, path))
    if path in ("/credentials/freeze", "/credentials/thaw"):
        return {"credential": things["shared"]["credential_id"], **(body or {})}
    return body


def routes() -> set[tuple[str, str]]:
    """Every route that the API serves, whether its page shows it or not."""
    found = set()
    for prefix, router in api._routers:
        for path, view in router.path_operations.items():
            for operation in view.operations:
                plain = re.sub(r"\{\w+:(\w+)\}", r"{\1}", normalize_path(f"/{prefix}/{path}").rstrip("/")) or "/"
                found |= {(method, plain) for method in operation.methods}
    return found


@dataclass
class Caller:
    """Somebody's browser."""

    client: Client

    def call(self, method: str, path: str, body: object = None) -> Any:
        return self.client.generic(method, f"/api{path}", b"" if body is None else json.dumps(body), content_type="application/json")


def caller(user: User | None = None) -> Caller:
    client = Client()
    if user is not None:
        client.force_login(user)
    return Caller(client)


def in_role(role: str, people: People) -> Caller:
    if role == "colleague":
        return caller(people.joins("bea", people.acme, Role.MEMBER))
    if role == "suspended":
        suspended = caller(people.alice)
        people.alice.is_active = False
        people.alice.save()
        return suspended
    users = {
        "anonymous": None,
        "stranger": people.charlie,
        "viewer": people.vera,
        "holder": people.bob,
        "admin": people.amy,
        "owner": people.alice,
        "operator": people.olga,
    }
    return caller(users[role])


# Who may do what


def test_every_route_is_in_the_table():
    assert routes() == TABLE.keys()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("method", "path"), TABLE, ids=lambda value: value)
def test_a_role_gets_what_the_table_says(people: People, method: str, path: str, role: str):
    things = things_of(people)
    before = [list(model.objects.values()) for model in WRITTEN]

    answer = in_role(role, people).call(method, path_to(path, things), body_of(method, path, things))

    expected = TABLE[method, path][ROLES.index(role)]
    assert answer.status_code == expected, answer.content
    if method == "GET" or expected >= 400:
        assert [list(model.objects.values()) for model in WRITTEN] == before


@pytest.mark.parametrize(("method", "path"), [route for route in TABLE if "{slug}" in route[1]], ids=lambda value: value)
def test_a_foreign_thing_is_answered_like_a_missing_one(people: People, method: str, path: str):
    things, body = things_of(people), BODIES.get((method, path))
    nothing = {"own": dict.fromkeys(things["own"], 10**9)}
    charlie, bea = caller(people.charlie), caller(people.joins("bea", people.acme, Role.MEMBER))
    missing = charlie.call(method, path_to(path, nothing, "nowhere"), body)

    assert missing.status_code == 404
    answers = [charlie.call(method, path_to(path, things), body)]
    if "_id}" in path:
        answers += [
            charlie.call(method, path_to(path, things, "rival"), body),
            caller(people.alice).call(method, path_to(path, {"own": dict.fromkeys(things["own"], 10**30)}), body),
            # What is shared is not the organization's own.
            caller(people.alice).call(method, path_to(path, {"own": {**things["shared"], "key_id": 10**9}}), body),
        ]
    if "{key_id}" in path:
        answers.append(bea.call(method, path_to(path, things), body))
    for answer in answers:
        assert (answer.status_code, answer.content, dict(answer.headers)) == (404, missing.content, dict(missing.headers))


def test_an_issued_key_opens_nothing_here(people: People):
    answer = Client().get("/api/organizations", headers={"authorization": "Bearer sk-sluice-whatever"})

    assert answer.status_code == 401


def test_a_change_needs_the_csrf_token(people: People):
    key = people.key(people.bob)
    client = Client(enforce_csrf_checks=True)
    client.force_login(people.bob)
    path = f"/api/organizations/acme/keys/{key.pk}/revoke"

    refused = client.post(path)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert ApiKey.objects.get().revoked_at is None

    client.get("/accounts/password/change/")
    token = client.cookies["csrftoken"].value
    assert client.post(path, headers={"x-csrftoken": token}).status_code == 200


@pytest.mark.parametrize("page", ["/api/docs", "/api/openapi.json"])
def test_the_description_of_the_api_is_for_people_who_are_signed_in(people: People, page: str):
    assert Client().get(page).headers["location"] == f"/accounts/login/?next={page}"
    client = Client()
    client.force_login(people.vera)
    assert client.get(page).status_code == 200


def test_the_one_shape_of_errors_is_described_for_every_operation(people: People):
    client = Client()
    client.force_login(people.vera)
    described = client.get("/api/openapi.json").json()
    operations = [operation for path in described["paths"].values() for operation in path.values()]

    assert len(operations) >= len(TABLE)
    assert all(operation["responses"]["4XX"] == {"$ref": "#/components/responses/Error"} for operation in operations)
    shape = described["components"]["responses"]["Error"]["content"]["application/json"]["schema"]["properties"]["error"]
    refused = caller(people.alice).call("GET", "/organizations/acme/keys?limit=0").json()["error"]
    assert set(refused) == set(shape["properties"])


# Making keys


def test_a_key_is_issued_and_shown_in_this_answer_alone(people: People):
    expires_at = (now() + timedelta(days=9)).replace(microsecond=0)
    alice = caller(people.alice)
    answer = alice.call(
        "POST",
        "/organizations/acme/keys",
        {
            "name": "ci",
            "email": "bob@example.org",
            "models": ["demo/*"],
            "networks": ["10.1.1.1/8"],
            "tags": ["a"],
            "expires_at": expires_at.isoformat(),
            "limits": [{"metric": "money", "amount": 5_000_000, "window": "month"}, {"metric": "rpm", "amount": 5, "mode": "shadow"}],
        },
    )

    made = answer.json()
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    assert is_plausible(made["key"])
    assert (made["user"], made["models"], made["networks"], made["tags"]) == ("bob@example.org", ["demo/*"], ["10.0.0.0/8"], ["a"])
    assert made["limits"] == [
        {"metric": "money", "amount": 5_000_000, "window": "month", "mode": "enforce"},
        {"metric": "rpm", "amount": 5, "window": "", "mode": "shadow"},
    ]
    assert AuditEntry.objects.get(action="key.issued").actor == people.alice

    for later in (alice.call("GET", "/organizations/acme/keys"), alice.call("GET", f"/organizations/acme/keys/{made['id']}")):
        assert later.status_code == 200
        assert made["key"][-49:] not in later.content.decode()
    shown = alice.call("GET", f"/organizations/acme/keys/{made['id']}").json()
    del made["key"]
    assert shown == made


def test_a_member_makes_keys_for_nobody_else(people: People):
    bob = caller(people.bob)
    assert bob.call("POST", "/organizations/acme/keys", {"name": "x", "email": "BOB@example.org"}).status_code == 201
    for email in ("alice@example.org", "charlie@example.org", "nobody@example.org"):
        assert bob.call("POST", "/organizations/acme/keys", {"name": "x", "email": email}).status_code == 403
    assert set(ApiKey.objects.values_list("user__email", flat=True)) == {"bob@example.org"}


def test_an_owner_makes_keys_for_members_alone_and_learns_nothing_of_others(people: People):
    alice = caller(people.alice)
    answers = [
        alice.call("POST", "/organizations/acme/keys", {"name": "x", "email": email})
        for email in ("charlie@example.org", "nobody@example.org")
    ]

    assert [answer.status_code for answer in answers] == [400, 400]
    assert answers[0].content == answers[1].content
    assert "email" in answers[0].json()["error"]["fields"]


def test_a_key_may_belong_to_a_team_of_its_holder(people: People):
    team = Team.objects.create(organization=people.acme, name="ml")
    people.bob.memberships.get().teams.add(team)
    Team.objects.create(organization=people.rival, name="theirs")
    alice = caller(people.alice)

    made = alice.call("POST", "/organizations/acme/keys", {"name": "x", "email": "bob@example.org", "team": "ml"})
    assert made.json()["team"] == "ml"
    answers = [alice.call("POST", "/organizations/acme/keys", {"name": "x", "team": team}) for team in ("ml", "theirs", "nobodys")]
    assert [(answer.status_code, list(answer.json()["error"]["fields"])) for answer in answers] == [(400, ["team"])] * 3
    assert answers[1].content == answers[2].content


# Field x role: what nobody may write


@pytest.mark.parametrize(
    "field",
    [
        "user",
        "user_id",
        "organization",
        "digest",
        "handle",
        "pepper_id",
        "revoked_at",
        "replaced_by",
        "created_at",
        "last_used_at",
        "state",
        "role",
    ],
)
def test_a_field_that_is_not_for_writing_is_refused(people: People, field: str):
    key = people.key(people.bob)
    for user in (people.bob, people.alice, people.olga):
        for method, path, body in (
            ("POST", "/organizations/acme/keys", {"name": "x"}),
            ("PATCH", f"/organizations/acme/keys/{key.pk}", {}),
        ):
            answer = caller(user).call(method, path, {**body, field: 1})
            assert answer.status_code == 400
            assert field in answer.json()["error"]["fields"]
    assert ApiKey.objects.count() == 1


# Changing keys


def test_what_is_left_out_stays(people: People):
    key = people.key(people.bob, models=["demo/*"], tags=["a"], limits=[Allowance("rpm", 5)])
    answer = caller(people.alice).call("PATCH", f"/organizations/acme/keys/{key.pk}", {"name": "renamed", "expires_at": None})

    assert answer.json()["name"] == "renamed"
    assert (answer.json()["models"], answer.json()["tags"], answer.json()["limits"][0]["amount"]) == (["demo/*"], ["a"], 5)


def test_an_admin_may_widen_and_a_member_only_narrow(people: People):
    key = people.key(people.bob, models=["demo/*"], limits=[Allowance("rpm", 5)])
    path = f"/organizations/acme/keys/{key.pk}"
    wider = {"models": [], "limits": []}

    refused = caller(people.bob).call("PATCH", path, {"name": "mine", **wider})
    assert refused.status_code == 403
    assert "models, limits" in refused.json()["error"]["message"]
    assert (ApiKey.objects.get().name, Limit.objects.count()) == ("laptop", 1)

    narrower = {"models": ["demo/echo"], "limits": [{"metric": "rpm", "amount": 1}], "networks": ["10.0.0.0/8"]}
    assert caller(people.bob).call("PATCH", path, narrower).status_code == 200
    assert caller(people.amy).call("PATCH", path, wider).json()["models"] == []


def test_a_revoked_key_is_a_conflict(people: People):
    key, alice = people.key(people.bob), caller(people.alice)
    path = f"/organizations/acme/keys/{key.pk}"

    assert alice.call("POST", f"{path}/revoke").json()["state"] == "revoked"
    assert alice.call("POST", f"{path}/revoke").status_code == 200
    for method, where, body in (("PATCH", path, {"name": "x"}), ("POST", f"{path}/rotate", {})):
        answer = alice.call(method, where, body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")


def test_a_rotation_shows_the_new_key_once(people: People):
    key, bob = people.key(people.bob), caller(people.bob)
    answer = bob.call("POST", f"/organizations/acme/keys/{key.pk}/rotate", {"overlap_hours": 0})

    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    assert is_plausible(answer.json()["key"])
    old = bob.call("GET", f"/organizations/acme/keys/{key.pk}").json()
    assert (old["state"], old["replaced_by"]) == ("expired", answer.json()["id"])


# Wrong requests


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": 5}, "name"),
        ({"name": "nul\0"}, "name"),
        ({"name": "\ud800"}, "name"),
        ({"name": "x", "models": "demo/*"}, "models"),
        ({"name": "x", "models": ["[x]"]}, "models"),
        ({"name": "x", "networks": ["nowhere"]}, "networks"),
        ({"name": "x", "tags": ["t"] * 101}, "tags"),
        ({"name": "x", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"name": "x", "expires_at": "9999-12-31T23:59:59-23:59"}, "expires_at"),
        ({"name": "x", "limits": [{"metric": "rps", "amount": 1}]}, "limits.0.metric"),
        ({"name": "x", "limits": [{"metric": "rpm", "amount": -1}]}, "limits.0.amount"),
        ({"name": "x", "limits": [{"metric": "rpm", "amount": 10**30}]}, "limits"),
        ({"name": "x", "limits": [{"metric": "rpm", "amount": 1.5}]}, "limits.0.amount"),
        ({"name": "x", "limits": [{"metric": "money", "amount": 1}]}, "limits"),
    ],
)
def test_a_wrong_body_is_explained_field_by_field(people: People, body: dict[str, Any], field: str):
    answer = caller(people.alice).call("POST", "/organizations/acme/keys", body)

    assert answer.status_code == 400, answer.content
    error = answer.json()["error"]
    assert error["code"] == "invalid"
    assert error["message"]
    assert list(error["fields"]) == [field]
    assert not ApiKey.objects.exists()


@pytest.mark.parametrize("overlap", [-1, 721, "soon", float("nan"), float("inf")])
def test_a_wrong_overlap_is_refused(people: People, overlap: object):
    key = people.key(people.bob)
    answer = caller(people.bob).call("POST", f"/organizations/acme/keys/{key.pk}/rotate", {"overlap_hours": overlap})

    assert (answer.status_code, list(answer.json()["error"]["fields"])) == (400, ["overlap_hours"])


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"name": "x"} trailing'])
def test_a_body_that_is_no_json_object_is_a_clear_400(people: People, raw: bytes):
    answer = caller(people.alice).client.generic("POST", "/api/organizations/acme/keys", raw, content_type="application/json")

    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"name": "x", "email": f"{SECRET}@"},
        {"name": "x", SECRET: 1},
        {"name": {SECRET: SECRET}},
        {"name": "x", "networks": [SECRET]},
        {"name": "x", "limits": [{"metric": "money", "amount": SECRET, "window": SECRET}]},
    ],
)
def test_a_secret_in_the_wrong_field_is_not_said_back(people: People, body: dict[str, Any]):
    answer = caller(people.alice).call("POST", "/organizations/acme/keys", body)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid")
    assert answer.json()["error"]["fields"]
    assert SECRET not in answer.content.decode()


# Lists


def test_a_list_is_read_page_by_page_with_a_constant_number_of_queries(people: People, django_assert_num_queries: Any):
    ids = [people.key(user, limits=[Allowance("rpm", 5)]).pk for user in (people.alice, people.bob, people.amy) for _ in range(2)][::-1]
    alice = caller(people.alice)

    with django_assert_num_queries(6):  # session, user, organization, membership, keys, limits
        first = alice.call("GET", "/organizations/acme/keys?limit=4").json()
    second = alice.call("GET", f"/organizations/acme/keys?limit=4&before={first['next']}").json()

    assert [key["id"] for key in first["data"]] == ids[:4]
    assert [key["id"] for key in second["data"]] == ids[4:]
    assert second["next"] is None


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "before=0", f"before={10**30}"])
def test_a_wrong_page_is_refused(people: People, query: str):
    answer = caller(people.alice).call("GET", f"/organizations/acme/keys?{query}")

    assert (answer.status_code, list(answer.json()["error"]["fields"])) == (400, [query.partition("=")[0]])


def test_everybody_sees_their_own_organizations(people: People):
    assert caller(people.bob).call("GET", "/organizations").json() == [{"slug": "acme", "name": "Acme", "role": "member"}]
    actions.ensure_membership(people.olga, people.acme, role=Role.VIEWER)
    assert [one["role"] for one in caller(people.olga).call("GET", "/organizations").json()] == ["owner", "owner"]


def test_a_holder_freezes_an_own_key_and_ends_that_but_not_what_somebody_else_froze(people: People):
    key = people.key(people.bob)
    bob, amy, path = caller(people.bob), caller(people.amy), f"/organizations/acme/keys/{key.pk}"

    assert bob.call("POST", f"{path}/freeze", {"minutes": 5, "reason": "lost"}).json()["frozen_reason"] == "lost"
    assert bob.call("POST", f"{path}/thaw").json()["frozen_until"] is None
    amy.call("POST", f"{path}/freeze", {"minutes": 5})
    for deed, body in (("thaw", None), ("freeze", {"minutes": 0.01})):
        refused = bob.call("POST", f"{path}/{deed}", body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert amy.call("POST", f"{path}/thaw").json()["frozen_until"] is None
