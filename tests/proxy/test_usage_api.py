"""Usage over HTTP: the same figures as the pages, for the same people, within bounds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from accounts.models import ApiKey, User
from proxy import queries
from proxy.models import RefusedCalls
from tests.accounts.conftest import People
from tests.proxy.used import used

USAGE = "/api/organizations/acme/usage"


@pytest.fixture
def people(db: None) -> People:
    return People()


@pytest.fixture
def key(people: People) -> ApiKey:
    return people.key(people.bob)


def get(user: User, path: str, **asked: object):
    client = Client()
    client.force_login(user)
    return client.get(path, asked)


def of(key: ApiKey, what: str) -> str:
    return f"/api/organizations/acme/keys/{key.pk}/{what}"


def test_a_member_gets_own_usage_and_the_others_everybodys(people: People, key: ApiKey):
    used(key, cost=1)
    used(people.key(people.alice), cost=10)

    costs = {user: get(user, USAGE).json()["total"]["cost"] for user in (people.alice, people.amy, people.bob, people.vera, people.olga)}

    assert costs == {people.alice: 11, people.amy: 11, people.bob: 1, people.vera: 11, people.olga: 11}
    assert [group["name"] for group in get(people.bob, USAGE, by="key").json()["data"]] == [str(key.pk)]


def test_usage_by_model_key_and_day_adds_up(people: People, key: ApiKey):
    now = timezone.now()
    used(key, now - timedelta(days=2), served_model="p/a", cost=5)
    used(key, now - timedelta(days=1), served_model="p/b", cost=None)

    for by, groups in (("model", 2), ("day", 2), ("key", 1)):
        answer = get(people.alice, USAGE, by=by).json()
        assert len(answer["data"]) == groups
        assert answer["truncated"] is False
        assert sum(group["requests"] for group in answer["data"]) == answer["total"]["requests"] == 2
    models = {group["name"]: group["cost"] for group in get(people.alice, USAGE, by="model").json()["data"]}
    assert models == {"p/a": 5, "p/b": None}  # no price is no cost, and not a cost of 0


def test_bounds_hold(people: People, key: ApiKey):
    noon = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
    used(key, noon - timedelta(minutes=1))
    used(key, noon)
    used(key, noon + timedelta(hours=1))

    found = get(people.alice, USAGE, since="2026-03-01T12:00:00Z", until="2026-03-01T13:00:00").json()

    assert (found["total"]["requests"], found["since"], found["time_zone"]) == (1, "2026-03-01T12:00:00Z", "UTC")


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"since": "2026-03-02T00:00:00Z", "until": "2026-03-01T00:00:00Z"}, "must lie before"),
        ({"since": "2020-01-01T00:00:00Z", "until": "2026-03-01T00:00:00Z"}, "At most 366 days"),
        ({"until": "0001-01-02T00:00:00Z"}, "out of range"),
        ({"since": "yesterday"}, "since"),
        ({"by": "password"}, "by"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(people: People, asked: dict, complaint: str):
    answer = get(people.alice, USAGE, **asked)

    assert answer.status_code == 400
    assert complaint in answer.json()["error"]["message"]


def test_truncated_says_so(people: People, key: ApiKey, monkeypatch):
    monkeypatch.setattr(queries, "MOST_GROUPS", 3)
    for number in range(5):
        used(key, served_model=f"p/{number}")

    answer = get(people.alice, USAGE, by="model").json()

    assert (len(answer["data"]), answer["truncated"], answer["total"]["requests"]) == (3, True, 5)


def test_a_key_says_why_it_was_refused(people: People, key: ApiKey):
    hour = timezone.now().replace(minute=0, second=0, microsecond=0)
    RefusedCalls.objects.create(hour=hour, key_id=key.pk, status=429, code="shadow:rate_limit_exceeded", count=4)
    RefusedCalls.objects.create(hour=hour - timedelta(days=40), key_id=key.pk, status=404, code="old", count=1)

    [refused] = get(people.bob, of(key, "usage")).json()["refused"]

    assert (refused["code"], refused["count"], refused["shadow"]) == ("rate_limit_exceeded", 4, True)


def test_the_log_goes_on_from_its_cursor(people: People, key: ApiKey):
    stored = {str(used(key, timezone.now() - timedelta(minutes=number))) for number in range(5)}
    used(people.key(people.alice))

    first = get(people.bob, of(key, "requests"), limit=3).json()
    second = get(people.bob, of(key, "requests"), limit=3, before=first["next"]).json()

    assert [len(page["data"]) for page in (first, second)] == [3, 2]
    assert {row["request_id"] for page in (first, second) for row in page["data"]} == stored
    assert second["next"] is None
    assert first["data"][0]["input_tokens"] == 123
    assert get(people.bob, of(key, "requests"), before="x").status_code == 400
    assert get(people.bob, of(key, "requests"), limit=10_000).status_code == 400


def test_the_log_shows_no_credential_and_costs_the_same_for_any_number_of_rows(people: People, key: ApiKey):
    used(key)
    client = Client()
    client.force_login(people.bob)

    def cost() -> int:
        with CaptureQueriesContext(connection) as seen:
            answer = client.get(of(key, "requests"), {"limit": 200})
        assert "credential" not in answer.content.decode()
        assert not [query for query in seen if "COUNT(" in query["sql"].upper()]
        return len(seen)

    few = cost()
    for _ in range(60):
        used(key)
    assert cost() == few
