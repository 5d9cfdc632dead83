"""The operators' admin of accounts, models and prices: everything works, and no secret is in any page."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission
from django.db import connection
from django.http import HttpResponse
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from accounts.models import AuditEntry, Organization, User
from providers import listing, registry
from providers.actions import add_credential, secret_of, set_price
from providers.models import Credential, KeyringCanary, Price, State, UpstreamModel
from providers.over_httpx import OverHttpx

pytestmark = pytest.mark.django_db

SECRET = "sk-upstream-0123456789"
OTHER = "sk-another-9876543210"


class Operator:
    """Olga in her browser. Whatever page she sees is searched for the secrets."""

    def __init__(self) -> None:
        self.user = User.objects.create_superuser("olga@example.org", "x")
        self._client = Client()
        self._client.force_login(self.user)

    def get(self, path: str, status: int = 200) -> str:
        return self._seen(self._client.get(f"/admin/providers/{path}", follow=True), status)

    def post(self, path: str, status: int = 200, **fields: Any) -> str:
        return self._seen(self._client.post(f"/admin/providers/{path}", fields, follow=True), status)

    def _seen(self, response: HttpResponse, status: int) -> str:
        page = response.content.decode()
        assert response.status_code == status, page[:2000]
        assert SECRET not in page
        assert OTHER not in page
        return page


@pytest.fixture
def olga() -> Operator:
    return Operator()


@pytest.fixture
def mine() -> Credential:
    return add_credential("openai", "Mine", SECRET, base_url="https://llm.example.org/v1")


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    answer = httpx.Response(200, json={"data": [{"id": "a"}, {"id": "b"}]})
    monkeypatch.setattr(listing, "transport_over", lambda egress: OverHttpx(httpx.MockTransport(lambda request: answer)))
    return iter(())


def fields(**changes: Any) -> dict[str, Any]:
    usual = {"kind": "openai", "label": "Mine", "prefix": "openai", "base_url": "https://llm.example.org/v1", "settings": "{}"}
    return usual | {"weight": "1", "priority": "0", "organization": "", "user": "", "new_secret": "", "state": "active"} | changes


def test_an_account_is_added_with_its_secret_sealed(olga: Operator):
    acme = Organization.objects.create(slug="acme", name="Acme")
    assert 'type="password"' in olga.get("credential/add/")

    olga.post("credential/add/", **fields(new_secret=SECRET, prefix="", organization=acme.pk, settings='{"pass_through": true}'))

    credential = Credential.objects.get()
    assert secret_of(credential).reveal() == SECRET
    assert (credential.prefix, credential.organization, credential.settings) == ("openai", acme, {"pass_through": True})
    assert AuditEntry.objects.filter(action="credential.added", actor=olga.user).count() == 1


def test_the_list_says_which_accounts_rest_and_asks_once_for_all(olga: Operator, mine: Credential):
    def queries() -> int:
        with CaptureQueriesContext(connection) as seen:
            olga.get("credential/")
        return len(seen)

    before = queries()
    until = timezone.now() + timedelta(hours=1)
    for number in range(5):
        one = add_credential("openai", f"No {number}", SECRET, base_url="https://llm.example.org/v1")
        one.rests.create(model="" if number else "gpt", until=until)
    past = timezone.now() - timedelta(minutes=1)
    mine.rests.create(model="", until=past)
    page = olga.get("credential/")
    assert page.count(f"until {until:%Y-%m-%d %H:%M} UTC") == 4
    assert len(re.findall(r">\s*1 model\s*<", page)) == 1
    assert f"{past:%Y-%m-%d %H:%M} UTC" not in page
    assert queries() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"new_secret": ""}, "needs a secret"),
        ({"base_url": "ftp://x"}, "not an address"),
        ({"base_url": "https://user:pw@llm.example.org"}, "no user name or password"),
        ({"prefix": "a/b"}, "without a slash"),
        ({"settings": '{"api_base": "x"}'}, "no setting"),
        ({"settings": "{"}, "valid JSON"),
        ({"weight": "0"}, "from 1 to 1000"),
        ({"kind": "nonesuch"}, "not one of the available choices"),
        ({"label": ""}, "required"),
    ],
)
def test_what_is_wrong_is_said_on_the_form_without_the_secret(olga: Operator, change: dict[str, str], words: str):
    page = olga.post("credential/add/", **fields(**{"new_secret": SECRET} | change))

    assert words in page
    assert not Credential.objects.exists()


def test_no_kind_is_chosen_and_the_settings_of_each_are_named(olga: Operator, mine: Credential):
    page = olga.get("credential/add/")

    [options] = re.findall(r'<select name="kind".*?</select>', page, re.DOTALL)
    assert re.findall(r"<option value=\"(\w*)\"([^>]*)>", options)[0] == ("", " selected")
    assert options.count("selected") == 1
    for name in registry.names():
        adapter = registry.adapter(name)
        words = f"<strong>{adapter.title or name}</strong> {', '.join(sorted(adapter.settings)) or 'none of its own'}"
        assert words in page
    assert "required" in olga.post("credential/add/", **fields(kind="", new_secret=SECRET))
    assert Credential.objects.get() == mine

    of_one = olga.get(f"credential/{mine.pk}/change/")
    assert "ca_pem, http2, listed_only, pass_through, proxy_url, sticky" in of_one
    assert "safety_threshold" not in of_one


@pytest.mark.parametrize("sent", ["[1]", '"x"', "7"])
def test_settings_that_are_no_object_are_refused(olga: Operator, sent: str):
    assert "Settings are a JSON object" in html.unescape(olga.post("credential/add/", **fields(new_secret=SECRET, settings=sent)))
    assert not Credential.objects.exists()


def test_a_setting_that_is_a_secret_is_shown_as_set_and_kept_by_a_form_that_leaves_it_so(olga: Operator):
    own = {"client_id": "id", "client_secret": OTHER, "token_url": "https://example.org/token"}
    made = add_credential("gemini_cli", "G", SECRET, settings=own, accept_policy=True)
    path = f"credential/{made.pk}/change/"

    def shown() -> dict[str, Any]:
        [text] = re.findall(r'<textarea name="settings"[^>]*>(.*?)</textarea>', olga.get(path), re.DOTALL)
        return json.loads(html.unescape(text))

    def saved(settings: dict[str, Any], **changes: str) -> dict[str, Any]:
        sent = fields(label="G", prefix="gemini_cli", base_url="", settings=json.dumps(settings), accept_policy="on")
        olga.post(path, **sent | changes)
        made.refresh_from_db()
        return made.settings

    assert shown() == {**own, "client_secret": "(set)"}
    assert saved(shown(), label="H") == own
    assert (made.label, AuditEntry.objects.filter(action="credential.changed").latest("pk").detail["fields"]) == ("H", ["label"])
    assert saved({**shown(), "project_id": "p"}) == {**own, "project_id": "p"}
    assert saved({**shown(), "client_secret": "another"})["client_secret"] == "another"
    assert "client_secret" not in saved({name: value for name, value in shown().items() if name != "client_secret"})
    assert "client_secret" not in saved({**shown(), "client_secret": "(set)"})  # there is none to keep


def test_a_policy_must_be_accepted_on_the_form(olga: Operator, monkeypatch: pytest.MonkeyPatch):
    from providers import registry

    monkeypatch.setattr(type(registry.adapter("openai")), "policy", "restricted")
    assert "restricted" in olga.post("credential/add/", **fields(new_secret=SECRET))
    assert not Credential.objects.exists()

    olga.post("credential/add/", **fields(new_secret=SECRET, accept_policy="on"))
    assert Credential.objects.get().policy_accepted_at is not None


def test_settings_that_bring_another_policy_must_be_accepted_on_the_form(olga: Operator, mine: Credential, monkeypatch: pytest.MonkeyPatch):
    from providers import registry

    kind = type(registry.adapter("openai"))
    monkeypatch.setattr(kind, "policy_for", lambda self, settings: "ended" if settings.get("listed_only") else "allowed")
    change = fields(label=mine.label, settings='{"listed_only": true}')
    assert "is ended" in olga.post(f"credential/{mine.pk}/change/", **change)
    assert Credential.objects.get().settings == {}

    olga.post(f"credential/{mine.pk}/change/", **change, accept_policy="on")
    assert Credential.objects.get().settings == {"listed_only": True}
    assert Credential.objects.get().policy_accepted_at is not None


def test_an_empty_secret_keeps_the_one_in_place(olga: Operator, mine: Credential):
    page = olga.get(f"credential/{mine.pk}/change/")
    assert "sealed" in page
    assert bytes(mine.secret).hex() not in page

    olga.post(f"credential/{mine.pk}/change/", **fields(label="Renamed", weight="5", base_url="https://llm.example.org/v2"))

    mine.refresh_from_db()
    assert (mine.label, mine.weight, mine.base_url) == ("Renamed", 5, "https://llm.example.org/v2")
    assert secret_of(mine).reveal() == SECRET


def test_a_new_secret_takes_its_place(olga: Operator, mine: Credential):
    olga.post(f"credential/{mine.pk}/change/", **fields(new_secret=OTHER))

    mine.refresh_from_db()
    assert secret_of(mine).reveal() == OTHER
    assert AuditEntry.objects.filter(action="credential.changed").get().detail == {"fields": ["secret"]}


def test_another_origin_blanks_the_secret_and_says_so(olga: Operator, mine: Credential):
    page = olga.post(f"credential/{mine.pk}/change/", **fields(base_url="https://evil.example.org/v1"))

    mine.refresh_from_db()
    assert "has been forgotten" in page
    assert mine.secret is None
    assert mine.state == State.NEEDS_REAUTH
    assert "no secret" in olga.post(f"credential/{mine.pk}/change/", **fields(base_url="https://evil.example.org/v1"))


def test_the_kind_of_an_account_never_changes(olga: Operator, mine: Credential):
    olga.post(f"credential/{mine.pk}/change/", **fields(kind="demo"))

    mine.refresh_from_db()
    assert mine.kind == "openai"


def test_models_are_asked_for_from_the_list_and_from_the_page(olga: Operator, mine: Credential, upstream: None):
    assert "2 models listed" in olga.post("credential/", action="refresh_chosen", _selected_action=[mine.pk])
    mine.models.all().delete()
    assert "2 models listed" in olga.get(f"credential/{mine.pk}/refresh-models")

    page = olga.get("upstreammodel/")
    assert "openai/a" in page
    assert "Add" not in page.split("<main")[-1]
    olga.get(f"upstreammodel/{mine.models.first().pk}/change/")
    olga.get("upstreammodel/add/", status=403)


def test_what_is_left_of_an_account_is_shown_where_it_is_looked_after(olga: Operator, mine: Credential):
    assert "not told" in olga.get(f"credential/{mine.pk}/change/")

    windows = {
        "week": {"used": 1040, "limit": 2000, "resets_at": "2026-08-29T05:20:51Z"},
        "booster": {"used": 2.5, "limit": 10.0, "unit": "USD"},
        "<b>odd": {"used": 3},
        "empty": {},
    }
    Credential.objects.filter(pk=mine.pk).update(quota={"read_at": "2026-08-22T10:05:00+00:00", "windows": windows})
    page = olga.get(f"credential/{mine.pk}/change/")

    assert "week: 1,040 of 2,000 used, until 2026-08-29 05:20" in page
    assert "booster: 2.50 USD of 10.00 USD used<br>" in page
    assert "&lt;b&gt;odd: 3 used<br>" in page
    assert "empty: no figures<br>" in page
    assert "read 2026-08-22 10:05" in page


def test_an_upstreams_refusal_is_shown_without_the_secret(olga: Operator, mine: Credential, monkeypatch: pytest.MonkeyPatch):
    answer = httpx.Response(400, json={"error": {"message": f"No: <b>no</b> {SECRET}"}})
    monkeypatch.setattr(listing, "transport_over", lambda egress: OverHttpx(httpx.MockTransport(lambda request: answer)))

    page = olga.post("credential/", action="refresh_chosen", _selected_action=[mine.pk])

    assert "&lt;b&gt;no&lt;/b&gt; [redacted]" in page
    assert "[redacted]" in olga.get(f"credential/{mine.pk}/change/")


def test_accounts_are_disabled_and_enabled_from_the_list(olga: Operator, mine: Credential):
    assert "disabled now" in olga.post("credential/", action="disable_chosen", _selected_action=[mine.pk])
    assert Credential.objects.get().state == State.DISABLED
    assert "active now" in olga.post("credential/", action="enable_chosen", _selected_action=[mine.pk])
    assert Credential.objects.get().state == State.ACTIVE

    Credential.objects.update(secret=None)
    assert "no secret" in olga.post("credential/", action="enable_chosen", _selected_action=[mine.pk])


def test_an_account_is_deleted_after_a_confirmation_that_is_short(olga: Operator, mine: Credential):
    demo = add_credential("demo", "Demo", "")
    page = olga.get(f"credential/{demo.pk}/delete/")
    assert "Demo" in page
    assert "error-429" not in page
    assert Credential.objects.count() == 2

    olga.post(f"credential/{demo.pk}/delete/", post="yes")
    assert "Are you sure" in olga.post("credential/", action="delete_selected", _selected_action=[mine.pk])
    olga.post("credential/", action="delete_selected", _selected_action=[mine.pk], post="yes")

    assert not Credential.objects.exists()
    assert not UpstreamModel.objects.exists()
    assert AuditEntry.objects.filter(action="credential.deleted", actor=olga.user).count() == 2


def test_the_lists_can_be_searched_and_filtered(olga: Operator, mine: Credential):
    add_credential("demo", "Plaything", "")

    assert "Plaything" in olga.get("credential/")
    assert "Plaything" not in olga.get("credential/?q=Mine")
    olga.get("credential/?state__exact=active&kind__exact=demo")
    assert "demo/echo" in olga.get("upstreammodel/?q=echo")


def test_a_price_is_entered_in_dollars_and_only_ever_added(olga: Operator):
    now = timezone.now()
    entered = {"pattern": "openai/*", "input_usd": "2.5", "output_usd": "10", "cached_usd": "0.000001", "cache_write_usd": ""}
    olga.post("price/add/", **entered, starts_at_0=now.date().isoformat(), starts_at_1="00:00:00")

    price = Price.objects.get()
    assert (price.input, price.output, price.cache_read, price.cache_write) == (2_500_000, 10_000_000, 1, None)
    page = olga.get(f"price/{price.pk}/change/")
    assert "0.000001" in page
    olga.post(f"price/{price.pk}/change/", status=403, **entered | {"input_usd": "9"})
    olga.post(f"price/{price.pk}/delete/", status=403, post="yes")
    olga.post("price/", action="delete_selected", _selected_action=[price.pk], post="yes")
    assert Price.objects.get().input == 2_500_000
    assert "2.50" in olga.get("price/")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pattern": "gpt-4o"}, "would match no model"),
        ({"input_usd": "-1"}, "greater than or equal to 0"),
        ({"output_usd": "0.0000001"}, "no more than 6 decimal places"),
        ({"output_usd": ""}, "required"),
    ],
)
def test_a_wrong_price_is_refused_on_the_form(olga: Operator, change: dict[str, str], words: str):
    entered = {"pattern": "a/b", "input_usd": "1", "output_usd": "1", "starts_at_0": "2026-01-01", "starts_at_1": "00:00:00"}

    assert words in olga.post("price/add/", **entered | change)
    assert not Price.objects.exists()


def test_the_list_says_of_each_price_whether_it_is_in_force_now(olga: Operator):
    now = timezone.now()

    def price(pattern: str, days: int, source: str = "hand") -> int:
        row = {"pattern": pattern, "starts_at": now + timedelta(days=days), "input": 1, "output": 1, "source": source}
        return Price.objects.create(**row).pk

    expected = {
        price("a/x", -9): "replaced",
        price("a/x", -2): "in force",
        price("a/x", 2): "not yet",
        price("a/x", -1, "package"): "overruled",  # later, and not by hand
        price("a/*", -9): "in force",
        price("a/y", -1, "package"): "overruled",
        price("b/*", -1, "package"): "in force",
        price("b/y", -1, "package"): "in force",
        price("b/y", -1, "upstream"): "",
    }
    twin = max(expected)
    expected |= {twin - 1: "replaced", twin: "in force"}  # of two with one start the later corrects the earlier

    page = olga.get("price/")

    rows = {int(number): row for row in page.split("<tr")[1:] for number in re.findall(r"/admin/providers/price/(\d+)/change/", row)}
    shown = {number: re.findall(r"in force|not yet|replaced|overruled", row) for number, row in rows.items()}
    assert {number: words[0] for number, words in shown.items()} == expected
    assert all(len(words) == 1 for words in shown.values())
    overruled = next(number for number, word in expected.items() if word == "overruled" and "a/y" in rows[number])
    assert "a/*, by hand: 0.000001 in, 0.000001 out" in olga.get(f"price/{overruled}/change/")
    assert "this one" in olga.get(f"price/{twin}/change/")


def test_a_price_that_has_not_begun_may_be_taken_back(olga: Operator):
    price = set_price("a/b", "1", "1", starts_at=timezone.now() + timedelta(days=1))

    olga.post(f"price/{price.pk}/delete/", post="yes")

    assert not Price.objects.exists()
    assert AuditEntry.objects.filter(action="price.taken_back", actor=olga.user).exists()


def test_no_right_but_an_operators_opens_any_of_it(mine: Credential):
    staff = User.objects.create_user("staff@example.org", "x", is_staff=True)
    staff.user_permissions.set(Permission.objects.filter(content_type__app_label="providers"))
    client = Client()
    client.force_login(staff)

    for path in ("credential/", f"credential/{mine.pk}/change/", "credential/add/", "upstreammodel/", "price/", "price/add/"):
        assert client.get(f"/admin/providers/{path}").status_code in (302, 403)
    for path in (f"credential/{mine.pk}/delete/", f"credential/{mine.pk}/refresh-models", f"credential/{mine.pk}/change/"):
        assert client.post(f"/admin/providers/{path}", {"post": "yes"}).status_code in (302, 403)
    assert Credential.objects.get().models_refreshed_at is None


def test_the_canary_is_nobodys_business_and_nothing_is_edited_in_lists():
    assert not admin.site.is_registered(KeyringCanary)
    for model in (Credential, UpstreamModel, Price):
        assert not admin.site.get_model_admin(model).list_editable
