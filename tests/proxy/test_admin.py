"""The operators' admin of the log and of aliases: nothing counts the log, sorts it, or looks at all of it."""

from __future__ import annotations

import html
import re
import uuid
from datetime import timedelta

import pytest
from django.contrib import admin
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from accounts.models import ApiKey, AuditEntry
from providers.actions import add_credential
from proxy.admin import ReadOnly
from proxy.models import RefusedCalls, Rest, Route, RouteTarget, SnapshotVersion, UsageEvent, UsageTotal
from tests.accounts.conftest import People
from tests.proxy.used import used

EVENTS, TOTALS, REFUSED, ALIASES = (f"/admin/proxy/{name}/" for name in ("usageevent", "usagetotal", "refusedcalls", "route"))
LOG = (EVENTS, TOTALS, REFUSED)


@pytest.fixture
def people(db: None) -> People:
    return People()


@pytest.fixture
def key(people: People) -> ApiKey:
    return people.key(people.bob)


@pytest.fixture
def operator(people: People) -> Client:
    client = Client()
    client.force_login(people.olga)
    return client


def rows(client: Client, path: str) -> int:
    """How many rows a list shows."""
    answer = client.get(path, follow=True)
    assert answer.status_code == 200, path
    return len(re.findall(r'class="data-row', answer.content.decode()))


def log_queries(client: Client, path: str) -> list[str]:
    """The statements that read the log or its sums."""
    with CaptureQueriesContext(connection) as seen:
        assert client.get(path, follow=True).status_code == 200
    return [query["sql"] for query in seen if re.search(r'FROM "proxy_(usage|refused)', query["sql"])]


def refused(key: ApiKey) -> None:
    hour = timezone.now().replace(minute=0, second=0, microsecond=0)
    RefusedCalls.objects.create(hour=hour, key_id=key.pk, status=404, code="model_not_found", count=1)


# The log


@pytest.mark.parametrize("path", LOG)
def test_a_list_reads_once_newest_first_within_a_window_and_never_counts(operator: Client, key: ApiKey, path: str):
    used(key)
    refused(key)

    for asked in ("", "?o=5.1", "?window=all", "?window=90d", "?all=", "?_facets=True", "?p=2"):
        [sql] = log_queries(operator, path + asked)
        assert "COUNT(" not in sql.upper()
        assert "LIMIT 51" in sql
        assert "OFFSET" not in sql
        column = {EVENTS: "at", TOTALS: "slot", REFUSED: "hour"}[path]
        assert re.search(rf'WHERE .*"{column}" >= ', sql)
        assert re.search(r'ORDER BY ("proxy_\w+"\.)?"?\w+"? DESC, ("proxy_\w+"\.)?"?\w+"? DESC LIMIT', sql), sql[-200:]


@pytest.mark.parametrize("path", LOG)
def test_a_list_takes_as_many_queries_for_40_rows_as_for_1(operator: Client, people: People, key: ApiKey, path: str):
    used(key)
    refused(key)
    with CaptureQueriesContext(connection) as few:
        operator.get(path)
    for number in range(39):
        other = people.key(people.joins(f"member{number}", people.acme, "member"), name=f"key {number}")
        used(other)
        refused(other)

    with CaptureQueriesContext(connection) as many:
        assert rows(operator, path) == 40

    assert len(many) == len(few)


def test_the_window_is_24_hours_unless_chosen(operator: Client, key: ApiKey):
    used(key)
    used(key, timezone.now() - timedelta(days=3))
    used(key, timezone.now() - timedelta(days=60))

    assert [rows(operator, EVENTS + asked) for asked in ("", "?window=7d", "?window=90d", "?window=forever")] == [1, 2, 3, 1]
    assert [rows(operator, TOTALS + asked) for asked in ("", "?window=7d", "?window=90d", "?window=forever")] == [1, 2, 3, 1]


def test_one_request_is_found_by_its_whole_id_whenever_it_was(operator: Client, key: ApiKey):
    request_id = used(key, timezone.now() - timedelta(days=200))
    used(key)

    assert rows(operator, f"{EVENTS}?q={request_id}") == 1
    assert rows(operator, f"{EVENTS}?q={uuid.uuid4()}") == 0
    answer = operator.get(f"{EVENTS}?q=bob")
    assert "Search for the whole id" in answer.content.decode()
    assert not [sql for sql in log_queries(operator, f"{EVENTS}?q=bob") if "LIKE" in sql]


@pytest.mark.parametrize("asked", ["model__icontains=x", "error__regex=.*", "at__gte=2000-01-01", "user__password__startswith=a", "cost=1"])
def test_the_address_cannot_ask_for_more(operator: Client, key: ApiKey, asked: str):
    used(key)

    assert operator.get(f"{EVENTS}?{asked}").status_code in {302, 400}


def test_filters_narrow_the_log(operator: Client, people: People, key: ApiKey):
    used(key, status=502, error="upstream_error", cost=0)
    used(key, cost=None)
    used(people.key(people.alice), usage_source="estimated")

    assert rows(operator, f"{EVENTS}?outcome=failed") == 1
    assert rows(operator, f"{EVENTS}?outcome=unpriced") == 1
    assert rows(operator, f"{EVENTS}?usage_source__exact=estimated") == 1
    assert rows(operator, f"{EVENTS}?key__id__exact={key.pk}") == 2
    assert rows(operator, f"{EVENTS}?organization__id__exact={people.rival.pk}") == 0


@pytest.mark.parametrize("path", LOG)
def test_a_list_goes_on_behind_its_last_row_and_passes_no_rows_by(operator: Client, key: ApiKey, monkeypatch, path: str):
    monkeypatch.setattr(ReadOnly, "list_per_page", 2)
    now = timezone.now()
    for number in range(7):
        used(key, now - timedelta(minutes=20 * (number // 2)), served_model=f"model-{number}")  # two in one moment
        RefusedCalls.objects.create(hour=now - timedelta(hours=number // 2), key_id=key.pk, status=404, code=f"code-{number}")

    seen, asked, pages = [], path, 0
    while asked:
        [sql] = log_queries(operator, asked)
        assert "OFFSET" not in sql
        answer = operator.get(asked)
        seen += [row.pk for row in answer.context["cl"].result_list]
        used(key, now + timedelta(seconds=1), served_model=f"later-{pages}")  # what arrives meanwhile moves no page
        following = re.search(r'href="([^"]+)" rel="next"', answer.content.decode())
        asked = path + html.unescape(following[1]) if following else ""
        pages += 1

    assert pages == 4
    assert len(seen) == len(set(seen)) == 7
    assert "Newest" in answer.content.decode()


@pytest.mark.parametrize("place", ["x", "~", "2026-01-01~x", "9999-12-31T23:59:59-12:00~1", "2026-01-01T00:00:00~" + "9" * 40])
def test_a_place_that_no_list_gave_is_no_error(operator: Client, key: ApiKey, place: str):
    used(key)
    for path in LOG:
        assert operator.get(path, {"before": place}).status_code == 200


def test_a_filter_that_is_chosen_begins_with_the_newest_rows_again(operator: Client, key: ApiKey, monkeypatch):
    monkeypatch.setattr(ReadOnly, "list_per_page", 2)
    for _ in range(5):
        used(key)
    following = re.search(r'href="([^"]+)" rel="next"', operator.get(EVENTS).content.decode())
    assert following
    content = operator.get(EVENTS + html.unescape(following[1])).content.decode()
    assert [link for link in re.findall(r'href="(\?[^"]*)"', content) if "before=" in link] == re.findall(
        r'href="([^"]+)" rel="next"', content
    )


@pytest.mark.parametrize("model", [UsageEvent, UsageTotal, RefusedCalls])
def test_nobody_writes_in_the_log(operator: Client, key: ApiKey, model):
    used(key)
    refused(key)
    row = model.objects.get()
    path = f"/admin/proxy/{model._meta.model_name}/"
    before = list(model.objects.values())

    assert operator.get(f"{path}{row.pk}/change/").status_code == 200
    assert operator.get(f"{path}add/").status_code == 403
    assert operator.post(f"{path}{row.pk}/change/", {"model": "x", "count": 9}).status_code == 403
    assert operator.post(f"{path}{row.pk}/delete/", {"post": "yes"}).status_code == 403
    operator.post(path, {"action": "delete_selected", "_selected_action": [row.pk], "post": "yes"})
    assert list(model.objects.values()) == before


def test_a_row_shows_unpriced_and_names_also_of_what_is_gone(operator: Client, key: ApiKey):
    request_id = used(key, cost=None)
    body = operator.get(EVENTS).content.decode()
    assert "acme · laptop" in body
    assert "unpriced" in body
    assert "$0" not in body

    UsageEvent.objects.update(organization=991, user=992, key=993, credential=994)

    assert "991 · 993" in operator.get(EVENTS).content.decode()
    one = operator.get(f"{EVENTS}{request_id}/change/").content.decode()
    assert "(gone) (number 993)" in one
    assert "994" in one


def test_what_one_request_cost_is_not_rounded(operator: Client, key: ApiKey):
    request_id = used(key, cost=29_793, upstream_cost=30_004)
    used(key, cost=-29_793)

    body = operator.get(EVENTS).content.decode()
    assert "$0.029793" in body
    assert "−$0.029793" in body
    assert "$0.030004" in operator.get(f"{EVENTS}{request_id}/change/").content.decode()


@pytest.mark.parametrize("path", LOG)
def test_a_page_of_the_log_is_not_called_all_of_it(operator: Client, key: ApiKey, path: str):
    used(key)
    refused(key)

    body = operator.get(path).content.decode()
    assert "result" not in re.search(r"<h1.*?</h1>", body, re.DOTALL)[0]


def test_what_clients_send_is_shown_as_text(operator: Client, people: People):
    key = people.key(people.bob, name="<script>alert(1)</script>")
    request_id = used(
        key, model="<script>alert(2)</script>", served_model="<script>alert(3)</script>", error="<script>alert(4)</script>", status=500
    )

    for path in (EVENTS, TOTALS, f"{EVENTS}{request_id}/change/"):
        assert "<script>alert" not in operator.get(path).content.decode()


@pytest.mark.parametrize("path", [*LOG, ALIASES])
def test_the_admin_is_for_operators_alone(people: People, path: str):
    for user in (people.alice, people.bob):
        client = Client()
        client.force_login(user)
        assert client.get(path).status_code in {302, 403}
        user.is_staff = True
        user.save()
        assert client.get(path).status_code in {302, 403}
    assert Client().get(path).status_code == 302


def test_the_version_of_the_settings_is_nobodys_to_edit():
    assert SnapshotVersion not in admin.site._registry


# Aliases


def alias(name: str, *models: str, organization: int | str = "") -> dict[str, str | int]:
    """A filled-in form."""
    form: dict[str, str | int] = {
        "name": name,
        "organization": organization,
        "targets-TOTAL_FORMS": len(models),
        "targets-INITIAL_FORMS": 0,
        "targets-MIN_NUM_FORMS": 1,
        "targets-MAX_NUM_FORMS": 1000,
    }
    for number, model in enumerate(models):
        form |= {f"targets-{number}-position": number, f"targets-{number}-model": model}
    return form


def version() -> int:
    return SnapshotVersion.objects.get_or_create(pk=1)[0].version


def test_an_alias_is_made_with_its_targets_in_order_and_takes_effect(operator: Client, people: People):
    before = version()

    answer = operator.post(f"{ALIASES}add/", alias("fast", "openai/gpt-x", "demo/echo"))

    assert answer.status_code == 302, answer.content
    route = Route.objects.get()
    assert (route.name, route.organization, [target.model for target in route.targets.all()]) == (
        "fast",
        None,
        ["openai/gpt-x", "demo/echo"],
    )
    assert version() > before  # the gateway reads it again
    entry = AuditEntry.objects.get(action="alias.created")
    assert (entry.actor, entry.subject) == (people.olga, "fast")
    assert "openai/gpt-x → demo/echo" in operator.get(ALIASES).content.decode()


@pytest.mark.parametrize(
    ("form", "complaint"),
    [
        (alias("fast"), "at least one model"),
        (alias("", "demo/echo"), "required"),
        (alias("loop", "demo/echo", "loop"), "cannot lead to itself"),
        (alias("taken", "demo/echo"), "already an alias"),
    ],
)
def test_an_alias_that_cannot_work_is_refused_in_words(operator: Client, form: dict, complaint: str):
    RouteTarget.objects.create(route=Route.objects.create(name="taken"), model="demo/echo")

    answer = operator.post(f"{ALIASES}add/", form)

    assert answer.status_code == 200
    assert complaint in answer.content.decode()
    assert Route.objects.count() == 1


def test_the_list_of_aliases_takes_as_many_queries_for_20_as_for_1(operator: Client):
    RouteTarget.objects.create(route=Route.objects.create(name="one"), model="demo/echo")
    with CaptureQueriesContext(connection) as few:
        operator.get(ALIASES)
    for number in range(19):
        RouteTarget.objects.create(route=Route.objects.create(name=f"n{number}"), model="demo/echo")

    with CaptureQueriesContext(connection) as many:
        assert rows(operator, ALIASES) == 20

    assert len(many) == len(few)


def test_the_side_of_the_admin_leads_to_every_list(operator: Client):
    body = operator.get("/admin/").content.decode()

    for model in admin.site._registry:
        assert f'href="/admin/{model._meta.app_label}/{model._meta.model_name}/"' in body


# Times


@pytest.mark.parametrize("path", ["accounts/apikey/add/", "providers/price/add/", "proxy/frozenmodel/add/"])
def test_a_time_that_is_typed_is_said_to_be_in_utc(operator: Client, path: str):
    assert "In UTC." in operator.get(f"/admin/{path}").content.decode()


def test_a_time_that_is_shown_has_its_zone_and_is_in_one_line(operator: Client, key: ApiKey):
    made = f"{key.created_at:%Y-%m-%d %H:%M} UTC".replace(" ", "\N{NO-BREAK SPACE}").replace("-", "\N{NON-BREAKING HYPHEN}")
    assert made in operator.get(f"/admin/accounts/apikey/{key.pk}/change/").content.decode()


# Rests


def test_rests_are_shown_in_words_and_cleared_by_hand(operator: Client, people: People):
    credential = add_credential("demo", "mine", "")
    later, before = timezone.now() + timedelta(hours=1), timezone.now() - timedelta(minutes=1)
    Rest.objects.create(credential=credential, model="quota", until=later, reason="insufficient_quota")
    Rest.objects.create(credential=credential, model="gone", until=later, reason="model_not_found", named=False)
    rest = Rest.objects.create(credential=credential, until=before, reason="ejected", named=False, times=2)
    page = operator.get("/admin/proxy/rest/").content.decode()
    for words in (
        "as the upstream asked: insufficient_quota",
        "our choice: model_not_found",
        "5 errors in a row, and 1 trial failed; the next call finds out",
    ):
        assert words in page
    assert operator.get(f"/admin/proxy/rest/{rest.pk}/change/").status_code == 200
    operator.post(f"/admin/proxy/rest/{rest.pk}/delete/", {"post": "yes"})
    assert set(Rest.objects.values_list("model", flat=True)) == {"quota", "gone"}
    assert AuditEntry.objects.get(action="rest.cleared").actor == people.olga
