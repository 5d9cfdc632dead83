"""The page of one request: who sees it, whose accounts are named to whom, and what it says of a request's trip."""

from __future__ import annotations

import json
import uuid

import pytest
from django.urls import reverse

from accounts.models import ApiKey, User
from providers.actions import add_credential
from providers.models import Credential
from proxy import ledger
from proxy.journal import Settled
from proxy.models import UsageEvent
from tests.accounts.conftest import People
from tests.proxy.test_pages import browser, text
from tests.proxy.used import used

SHARED, OWN = "shared account in Frankfurt", "own account of Acme"


@pytest.fixture
def people(db: None) -> People:
    return People()


def path(key: ApiKey, request_id: uuid.UUID) -> str:
    return f"/keys/{key.pk}/requests/{request_id}/"


def seen(user: User, key: ApiKey, request_id: uuid.UUID) -> str:
    answer = browser(user).get(path(key, request_id))
    assert answer.status_code == 200
    return text(answer)


def account(label: str, **options: object) -> Credential:
    return add_credential("openai", label, "sk-of-this-account", prefix=label.split()[0], **options)


# Who sees it


def test_it_is_seen_by_whoever_may_see_its_key(people: People):
    key = people.key(people.bob)
    request_id = used(key)

    for user in (people.alice, people.amy, people.bob, people.vera, people.olga):
        assert str(request_id) in seen(user, key, request_id)
        assert path(key, request_id) in browser(user).get(f"/keys/{key.pk}/").content.decode()


def test_it_leads_back_to_the_window_that_one_came_from(people: People):
    key = people.key(people.bob)
    request_id = used(key)
    client = browser(people.bob)

    assert f'href="{path(key, request_id)}?range=7d"' in client.get(f"/keys/{key.pk}/?range=7d").content.decode()
    assert f'href="/keys/{key.pk}/?range=7d#log"' in client.get(path(key, request_id) + "?range=7d").content.decode()
    assert f'href="/keys/{key.pk}/?range=24h#log"' in client.get(path(key, request_id) + "?range=x").content.decode()


def test_a_foreign_request_is_answered_like_a_missing_one(people: People):
    bobs, alices, charlies = people.key(people.bob), people.key(people.alice), people.key(people.charlie)
    of_bob, of_alice, of_charlie = used(bobs), used(alices), used(charlies)

    for user, key, request_id in (
        (people.charlie, bobs, of_bob),
        (people.charlie, charlies, of_bob),
        (people.bob, alices, of_alice),
        (people.bob, bobs, of_alice),
        (people.alice, bobs, of_alice),  # hers, and of another key
        (people.alice, bobs, of_charlie),
        (people.olga, bobs, of_charlie),
        (people.alice, bobs, uuid.UUID(int=0)),
        (people.alice, bobs, uuid.UUID(int=(1 << 128) - 1)),
    ):
        answer = browser(user).get(path(key, request_id))
        assert (answer.status_code, "There is nothing here" in text(answer)) == (404, True), (user, key, request_id)
    assert browser().get(path(bobs, of_bob))["location"].startswith(reverse("account_login"))


def test_an_account_is_named_to_those_alone_whom_the_api_names_it_to(people: People):
    key = people.key(people.bob)
    shared, own, theirs = account(SHARED), account(OWN, organization=people.acme), account("theirs", organization=people.rival)
    ids = [used(key, credential_id=one.pk) for one in (shared, own, theirs)]

    def named(user: User) -> set[str]:
        pages = [text(browser(user).get(f"/keys/{key.pk}/")), " ".join(seen(user, key, one) for one in ids)]
        found = [{label for label in (SHARED, OWN, "theirs") if label in page} for page in pages]
        assert all("openai" in page for page in pages)
        assert found[0] == found[1]
        return found[0]

    assert named(people.olga) == {SHARED, OWN, "theirs"}
    assert named(people.alice) == named(people.amy) == {OWN}
    assert named(people.bob) == named(people.vera) == set()


# What it says


def test_it_says_what_was_asked_what_served_and_what_it_used(people: People):
    key = people.key(people.bob)
    parts = {"fresh_input": 1111, "cache_read": 222, "cache_write": 33, "output": 444, "reasoning": 55}
    request_id = used(key, model="fast", served_model="openai/gpt-x", cost=1234, **parts)

    said = seen(people.bob, key, request_id)

    for words in ("Model asked for fast", "Model that served openai/gpt-x", "Account openai", "/v1/chat/completions", "as a stream"):
        assert words in said
    for words in ("after 80 ms", "Time taken 900 ms", "Answered.", "$0.001234", "Reported. As the upstream counted"):
        assert words in said
    for words in ("Fresh input 1,111", "Cache read 222", "Cache write 33", "Output 444", "Reasoning 55", "Attempts · 1"):
        assert words in said


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"status": 499, "error": "client_closed", "usage_source": "estimated"}, "The client left before it had the whole answer."),
        ({"status": 499, "error": "client_closed", "usage_source": "estimated"}, "Estimated. By Sluice"),
        ({"status": 502, "error": "upstream_broke"}, "The upstream broke off in the middle of its answer."),
        ({"status": 400, "error": "unsupported_parameter"}, "Refused: unsupported parameter."),
        ({"status": 529, "error": ""}, "Failed."),
        ({"status": 502, "error": "upstream_unreachable", "usage_source": "missing", "cost": 0}, "Missing. Nothing was used"),
        ({"usage_source": "missing", "cost": None}, "What it cost is not known"),
        ({"cost": None}, "No price was in force"),
        ({"first_byte_ms": None}, "First byte none came"),
        ({"stream": False}, "Answer whole"),
        ({"attempts": 0, "served_model": "", "provider": ""}, "No upstream account was asked."),
    ],
)
def test_it_says_in_words_what_became_of_it_and_how_its_figures_are_known(people: People, fields: dict[str, object], words: str):
    key = people.key(people.bob)

    assert words in seen(people.bob, key, used(key, **fields))


def test_each_attempt_stands_there_with_what_came_of_it_and_why_another_was_made(people: People):
    key, own, shared = people.key(people.bob), account(OWN, organization=people.acme), account(SHARED)
    tried = [
        {"credential": shared.pk, "provider": "openai", "error": "rate_limit_exceeded", "status": 429, "duration_ms": 31, "then": "next"},
        {"credential": own.pk, "provider": "openai", "error": "upstream_auth_failed", "status": 401, "then": "renewed"},
        {"credential": own.pk, "provider": "openai", "error": "invalid_request", "status": 400, "then": "without stream_options"},
    ]
    request_id = used(key, credential_id=own.pk, attempts=4, tried=json.dumps(tried))

    said = seen(people.alice, key, request_id)

    assert "1 openai The upstream had too many requests or tokens a minute (429) after 31 ms, so the next account was asked." in said
    assert f"2 {OWN} The upstream refused the account’s secret (401) after 0 ms, so its sign-in was renewed" in said
    assert f"3 {OWN} Failed: invalid request (400) after 0 ms, so it was asked again without stream options." in said
    assert f"4 {OWN} Answered." in said
    assert SHARED not in said
    assert "4 attempts" in text(browser(people.alice).get(f"/keys/{key.pk}/"))
    listed = browser(people.alice).get(f"/api/organizations/{people.acme.slug}/keys/{key.pk}/requests").json()["data"]
    first, *_ = listed[0]["tried"]
    assert first == {"account": "openai", "error": "rate_limit_exceeded", "status": 429, "duration_ms": 31, "then": "next"}
    assert [one["account"] for one in listed[0]["tried"]] == ["openai", OWN, OWN]


def test_what_was_learned_later_stands_beside_the_figures_that_it_corrects(people: People):
    key = people.key(people.bob)
    request_id = used(key, status=500, error="interrupted", usage_source="estimated", fresh_input=900, output=0, reasoning=0, cost=2000)
    milliseconds = request_id.int >> 80
    row = ledger.row_of(Settled(str(request_id), milliseconds, key.organization_id, key.user_id, key.pk, "fast", "chat/completions", 200))
    ledger.store([row._replace(fresh_input=850, cache_read=20, cache_write=3, output=412, cost=5011, usage_source="reported")])
    correction = UsageEvent.objects.get(corrects=request_id)

    said = seen(people.bob, key, request_id)

    assert "Fresh input 900 −50 850" in said
    assert "Output 0 412 412" in said
    assert "$0.002 $0.003011 $0.005011" in said
    assert "Correction: reported." in said
    assert "Time taken not known" in said
    assert path(key, request_id) in browser(people.bob).get(path(key, correction.pk)).content.decode()
    assert "Its own are differences" in seen(people.bob, key, correction.pk)


def test_an_operator_alone_is_led_to_the_price_that_is_missing(people: People):
    key = people.key(people.bob)
    unpriced, priced = used(key, cost=None, served_model="openai/a b"), used(key)
    link = 'href="/admin/providers/price/add/?pattern=openai/a%20b"'

    assert link in browser(people.olga).get(path(key, unpriced)).content.decode()
    assert "price/add" not in browser(people.alice).get(path(key, unpriced)).content.decode()
    assert "price/add" not in browser(people.olga).get(path(key, priced)).content.decode()
