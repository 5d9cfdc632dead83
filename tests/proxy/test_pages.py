"""The pages through Django's test client: who sees which keys, what is shown once, and that nothing is shown as something else.

Alice owns Acme, Bob is a member, Vera a viewer, Charlie a stranger, Olga the operator.
"""

from __future__ import annotations

import html
import json
import re
from datetime import timedelta
from zoneinfo import ZoneInfo

import pytest
from django.core import mail
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from accounts import actions
from accounts.models import ApiKey, AuditEntry, Limit, Membership, Role, Team, User
from accounts.policy import Allowance
from accounts.principal import KEY_LENGTH, is_plausible
from providers.actions import add_credential, disable, freeze
from providers.models import Credential, UpstreamModel
from proxy import snapshot
from proxy.catalog import Current
from proxy.dash.snippets import DEMO_MODEL, PLACEHOLDER, example_model
from proxy.models import FrozenModel, RefusedCalls
from proxy.routes import Leads, create_route
from tests.accounts.conftest import People
from tests.proxy.used import used

KEY = re.compile(r"sk-sluice-[0-9A-Za-z]{59}")
STRICT = {"default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'self'"}


@pytest.fixture
def people(db: None) -> People:
    return People()


def browser(user: User | None = None) -> Client:
    client = Client()
    if user is not None:
        client.force_login(user)
    return client


def text(response) -> str:
    """What a person reads."""
    body = re.sub(r"<script.*?</script>|<[^>]+>", " ", response.content.decode(), flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", body))


def page(key: ApiKey, deed: str = "") -> str:
    return f"/keys/{key.pk}/{deed}"


def once(response) -> str:
    [found] = re.findall(r'name="once" value="([^"]+)"', response.content.decode())
    return found


def new_key(client: Client, **fields) -> tuple:
    """Fill in the form on the list and send it. The answer, and what was sent."""
    said = {"name": "ci", "window": "month", "once": once(client.get("/keys/")), **fields}
    return client.post("/keys/", said), said


# The front


def test_programs_get_a_word_and_people_the_sign_in_page(people: People):
    word = browser().get("/")
    assert (word.content, word["content-type"]) == (b'{"status":"running"}', "application/json")
    assert "Accept" in word["vary"]

    form = browser().get("/", headers={"accept": "text/html,*/*;q=0.8"})
    assert form.status_code == 200
    assert b'name="password"' in form.content
    assert f'action="{reverse("account_login")}"'.encode() in form.content
    assert b"signup" not in form.content

    signed_in = browser(people.bob).get("/", headers={"accept": "text/html"})
    assert (signed_in.status_code, signed_in["location"]) == (302, "/keys/")


def test_signing_in_leads_to_the_keys(people: People):
    client = browser()

    wrong = client.post(reverse("account_login"), {"login": "bob@example.org", "password": "wrong"})
    assert (wrong.status_code, "not correct" in text(wrong)) == (200, True)

    right = client.post(reverse("account_login"), {"login": "bob@example.org", "password": "bob@example.org"}, follow=True)
    assert right.redirect_chain[-1][0] == "/"
    assert client.get("/keys/").status_code == 200


def test_the_way_to_a_new_password_looks_like_one(people: People):
    link = f'class="link" href="{reverse("account_reset_password")}"'

    assert link in browser().get(reverse("account_login")).content.decode()
    assert link in browser(people.bob).get(reverse("account_change_password")).content.decode()
    assert link in browser().get("/accounts/password/reset/key/1-abc/", follow=True).content.decode()


def test_a_new_password_is_set_by_the_link_of_a_mail(people: People):
    client = browser()
    client.post(reverse("account_reset_password"), {"email": "bob@example.org"})
    [path] = re.findall(r"https?://[^/\s]+(/accounts/password/reset/key/\S+)", mail.outbox[0].body)

    form = client.get(path, follow=True)
    assert 'name="password1"' in form.content.decode()
    client.post(form.redirect_chain[-1][0], {"password1": "a new and long one", "password2": "a new and long one"})

    assert User.objects.get(pk=people.bob.pk).check_password("a new and long one")
    assert "This link no longer works" in text(browser().get(path, follow=True))


DEEDS = ("rotate/", "revoke/", "rename/", "freeze/", "thaw/")


@pytest.mark.parametrize("path", ["/keys/", "/keys/1/", "/keys/1/requests.csv", *(f"/keys/1/{deed}" for deed in DEEDS)])
def test_nobody_gets_in_without_signing_in(db: None, path: str):
    assert browser().get(path)["location"].startswith(reverse("account_login"))
    assert browser().post(path)["location"].startswith(reverse("account_login"))


def test_nobody_signs_up_and_nobody_changes_the_address_that_keys_are_issued_to(people: People):
    assert "closed" in text(browser().get("/accounts/signup/"))
    assert (
        browser().post("/accounts/signup/", {"email": "new@example.org", "password1": "a" * 20, "password2": "a" * 20}).status_code == 200
    )
    assert not User.objects.filter(email="new@example.org").exists()
    assert browser(people.bob).post("/accounts/email/", {"email": "boss@example.org", "action_add": ""}).status_code == 404


# Who sees what


def test_a_member_sees_own_keys_and_the_others_see_all(people: People):
    for holder, name in ((people.bob, "bobs laptop"), (people.alice, "alices laptop")):
        people.key(holder, name=name)
    people.key(people.charlie, name="charlies laptop")

    seen = {
        user: {
            name
            for name in ("bobs laptop", "alices laptop", "charlies laptop")
            if name in text(browser(user).get("/keys/?organization=acme"))
        }
        for user in (people.alice, people.amy, people.bob, people.vera, people.olga)
    }

    both = {"bobs laptop", "alices laptop"}
    assert seen == {people.alice: both, people.amy: both, people.bob: {"bobs laptop"}, people.vera: both, people.olga: both}
    assert browser(people.charlie).get("/keys/?organization=acme").status_code == 404
    assert browser(people.charlie).get("/keys/?organization=nowhere").status_code == 404


def test_a_foreign_key_is_answered_like_a_missing_one(people: People):
    bobs, alices = people.key(people.bob), people.key(people.alice)
    bea = people.joins("bea", people.acme, Role.MEMBER)

    assert [browser(user).get(page(bobs)).status_code for user in (people.alice, people.bob, people.vera, people.olga)] == [200] * 4
    for user, path in (
        (people.charlie, page(bobs)),
        (people.bob, page(alices)),
        (bea, page(bobs)),
        (people.alice, "/keys/987654/"),
        (people.alice, f"/keys/{10**30}/"),
    ):
        answer = browser(user).get(path)
        assert (answer.status_code, "There is nothing here" in text(answer)) == (404, True), (user, path)
        for deed in DEEDS:
            assert browser(user).post(path + deed, {"hours": 1, "name": "x", "once": "x", "minutes": 1}).status_code == 404
    assert not ApiKey.objects.exclude(revoked_at=None).exists()


def test_who_leaves_the_organization_sees_nothing_of_it_any_more(people: People):
    key, client = people.key(people.bob), browser(people.bob)
    assert client.get(page(key)).status_code == 200

    Membership.objects.filter(user=people.bob).delete()

    assert client.get(page(key)).status_code == 404
    assert "not in an organization yet" in text(client.get("/keys/"))


def test_a_member_sees_own_sums_alone(people: People):
    used(people.key(people.bob), cost=1_000_000)
    used(people.key(people.alice), cost=50_000_000)

    assert "$1.00" in text(browser(people.bob).get("/keys/"))
    assert "$51.00" not in text(browser(people.bob).get("/keys/"))
    assert "$51.00" in text(browser(people.alice).get("/keys/"))


def test_a_member_sees_that_an_organization_has_a_budget_but_not_what_others_spent(people: People):
    key = people.key(people.bob)
    used(people.key(people.alice), cost=7_770_000)
    actions.set_limit(people.acme, Allowance("money", 10_000_000, "month"))

    assert "$7.77 spent" in text(browser(people.alice).get(page(key)))
    assert "$10.00 a month" in text(browser(people.bob).get(page(key)))
    assert "$7.77" not in text(browser(people.bob).get(page(key)))


def test_whoever_is_in_several_organizations_switches_between_them(people: People):
    Membership.objects.create(user=people.alice, organization=people.rival, role=Role.MEMBER)
    people.key(people.bob, name="acme's")
    client = browser(people.alice)

    assert "acme's" in text(client.get("/keys/?organization=acme"))
    assert b'href="/keys/?organization=rival"' in client.get("/keys/").content
    assert "You have no keys yet" in text(client.get("/keys/?organization=rival"))
    assert "You have no keys yet" in text(client.get("/keys/"))  # it is remembered
    assert "acme's" in text(client.get("/keys/?organization=acme"))


# What a viewer may do


def test_a_viewer_is_offered_nothing_and_may_do_nothing(people: People):
    key, client = people.key(people.bob), browser(people.vera)

    assert b"Create key" not in client.get("/keys/").content
    assert not re.search(r"rotate/|revoke/|rename/|freeze/|thaw/", client.get(page(key)).content.decode())
    assert client.post("/keys/", {"name": "mine", "once": "x"}).status_code == 403
    for deed in DEEDS:
        assert client.get(page(key, deed)).status_code == 403
        assert client.post(page(key, deed), {"hours": 1, "name": "x", "once": "x", "minutes": 1}).status_code == 403
    assert list(ApiKey.objects.values_list("name", "revoked_at", "replaced_by")) == [("laptop", None, None)]


def test_who_may_not_is_told_who_may(people: People):
    key = people.key(people.bob)

    assert "change none. An owner or administrator" in text(browser(people.vera).get(page(key, "revoke/")))
    admin = browser(people.alice).get("/admin/", follow=True)  # she owns the organization, and is no operator
    assert admin.status_code == 403
    assert "for the operators of this server" in text(admin)
    assert "administrator of the organization" not in text(admin)


# A new key


def test_a_new_key_is_shown_once_and_kept_nowhere(people: People):
    client = browser(people.bob)

    answer, sent = new_key(client, name="ci")

    [clear] = set(KEY.findall(answer.content.decode()))
    assert is_plausible(clear)
    assert len(clear) == KEY_LENGTH
    assert answer["cache-control"] == "no-store"
    key = ApiKey.objects.get(name="ci")
    assert (key.user, key.organization) == (people.bob, people.acme)
    assert f'Authorization: Bearer {clear}"' in html.unescape(answer.content.decode())  # it can be pasted
    again = client.post("/keys/", sent, follow=True)
    assert "had been sent before" in text(again)
    assert ApiKey.objects.count() == 1
    for path in ("/keys/", page(key), page(key, "rotate/")):
        assert clear not in client.get(path).content.decode()
    assert clear not in json.dumps([str(row) for row in AuditEntry.objects.values()])
    assert clear not in json.dumps(dict(client.session))


def test_limits_and_the_rest_come_from_the_form(people: People):
    team = Team.objects.create(organization=people.acme, name="Search")
    people.bob.memberships.get().teams.add(team)
    people.acme.time_zone = "Europe/Berlin"
    people.acme.save()
    last_day = (timezone.now() + timedelta(days=20)).date()

    answer, _ = new_key(
        browser(people.alice),
        email="bob@example.org",
        team=team.pk,
        models="demo/*, gpt-4o",
        expires_on=last_day.isoformat(),
        rpm="5",
        tpm="7000",
        concurrency="2",
        budget="12.50",
        window="week",
    )

    assert answer.status_code == 200, text(answer)
    key = ApiKey.objects.get()
    assert (key.user, key.team, key.allowed_models) == (people.bob, team, ["demo/*", "gpt-4o"])
    midnight = key.expires_at.astimezone(ZoneInfo("Europe/Berlin"))
    assert (midnight.date(), midnight.hour) == (last_day + timedelta(days=1), 0)
    assert {(limit.metric, limit.amount, limit.window) for limit in key.limits.all()} == {
        ("rpm", 5, ""),
        ("tpm", 7000, ""),
        ("concurrency", 2, ""),
        ("money", 12_500_000, "week"),
    }


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("name", "", "This field is required"),
        ("name", "\u202e" + "x", "printable"),
        ("budget", "abc", "is not an amount of US dollars"),
        ("budget", "-1", "0 or more"),
        ("rpm", "-1", "greater than or equal to 0"),
        ("rpm", "9" * 30, "less than or equal to"),
        ("models", "[a]", "is the only sign that stands for others"),
        ("expires_on", "2001-01-01", "must lie in the future"),
        ("expires_on", "9999-12-31", "too far away"),
        ("email", "charlie@example.org", "Nobody with this e-mail"),
        ("email", "vera@example.org", "is a viewer"),
        ("team", "12345", "valid choice"),
    ],
)
def test_wrong_input_is_said_beside_its_field_and_makes_nothing(people: People, field: str, value: str, complaint: str):
    said = {"email": "alice@example.org", field: value}

    answer, _ = new_key(browser(people.alice), **said)

    assert answer.status_code == 422
    assert complaint in text(answer)
    assert re.search(rf'id="id_{field}_error"', answer.content.decode())
    assert not ApiKey.objects.exists()


def test_all_that_is_wrong_is_said_at_once(people: People):
    wrong = {"name": "\u202ex", "email": "nobody@example.org", "models": "[a]", "expires_on": "2001-01-01", "budget": "abc"}

    answer, _ = new_key(browser(people.alice), **wrong)

    for field in wrong:
        assert re.search(rf'id="id_{field}_error"', answer.content.decode()), field


def test_a_member_makes_own_keys_only_whatever_the_form_says(people: People):
    answer, _ = new_key(browser(people.bob), email="alice@example.org")

    assert answer.status_code == 200
    assert ApiKey.objects.get().user == people.bob


def test_a_form_from_elsewhere_is_refused(people: People):
    client = Client(enforce_csrf_checks=True)
    client.force_login(people.bob)

    answer = client.post("/keys/", {"name": "ci", "once": "x"})

    assert (answer.status_code, "This form was not accepted" in text(answer)) == (403, True)
    assert not ApiKey.objects.exists()


# Rotate, revoke, rename


def test_rotating_shows_the_new_key_once_and_the_old_one_retires(people: People):
    key, client = people.key(people.bob), browser(people.bob)
    sent = {"hours": 1, "once": once(client.get(page(key, "rotate/")))}

    answer = client.post(page(key, "rotate/"), sent)

    [clear] = set(KEY.findall(answer.content.decode()))
    assert answer["cache-control"] == "no-store"
    key.refresh_from_db()
    assert key.replaced_by.last_four == clear[-4:]
    assert timedelta(minutes=59) < key.expires_at - timezone.now() <= timedelta(hours=1)
    assert "retiring" in text(client.get(page(key)))
    assert client.post(page(key, "rotate/"), sent)["location"] == page(key)
    assert "already been rotated" in text(client.post(page(key, "rotate/"), {"hours": 1, "once": "another"}))
    assert ApiKey.objects.count() == 2


def test_revoking_asks_first_and_then_is_for_ever(people: People):
    key, client = people.key(people.bob), browser(people.bob)

    assert "cannot be undone" in text(client.get(page(key, "revoke/")))
    key.refresh_from_db()
    assert key.state == "active"

    gone = client.post(page(key, "revoke/"), follow=True)
    assert "is revoked" in text(gone)
    key.refresh_from_db()
    assert key.state == "revoked"
    assert not re.search(r"rotate/|revoke/|rename/", client.get(page(key)).content.decode())
    assert "has been revoked" in text(client.post(page(key, "rename/"), {"name": "x"}))


def test_freezing_for_some_minutes_says_until_when_why_and_by_whom(people: People):
    key, client = people.key(people.bob), browser(people.bob)
    assert "Then it works again by itself" in text(client.get(page(key, "freeze/")))

    frozen = client.post(page(key, "freeze/"), {"minutes": 90, "reason": " on holiday "}, follow=True)

    key.refresh_from_db()
    assert timedelta(minutes=89) < key.frozen_until - timezone.now() <= timedelta(minutes=90)
    assert (key.state, key.frozen_reason, key.frozen_by) == ("frozen", "on holiday", people.bob)
    assert re.search(r"Frozen \(on holiday\) until [^.]+UTC , by bob@example.org\.", text(frozen))
    assert f'href="{page(key, "thaw/")}"' in frozen.content.decode()
    assert f'href="{page(key, "freeze/")}"' not in frozen.content.decode()

    assert "on holiday" in text(client.get(page(key, "thaw/")))
    assert "may call models again" in text(client.post(page(key, "thaw/"), follow=True))
    key.refresh_from_db()
    assert (key.state, key.frozen_until, key.frozen_reason, key.frozen_by) == ("active", None, "", None)
    assert client.get(page(key, "thaw/"))["location"] == page(key)
    assert list(AuditEntry.objects.order_by("pk").values_list("action", "actor__email"))[-2:] == [
        ("key.frozen", "bob@example.org"),
        ("key.thawed", "bob@example.org"),
    ]


def test_who_was_frozen_by_somebody_else_cannot_end_it(people: People):
    key, client = people.key(people.bob), browser(people.bob)
    actions.freeze_key(Membership.objects.get(user=people.amy), key, length=timedelta(hours=1), reason="audit")

    assert f'href="{page(key, "thaw/")}"' not in client.get(page(key)).content.decode()
    assert "by amy@example.org" in text(client.get(page(key)))
    for deed in ("thaw/", "freeze/"):
        refused = client.post(page(key, deed), {"minutes": 1})
        assert (refused.status_code, "only an owner or administrator" in text(refused)) == (403, True), deed
    key.refresh_from_db()
    assert key.frozen_reason == "audit"
    sibling, _ = actions.rotate_key(key, actor=people.bob)
    assert client.post(page(sibling, "thaw/")).status_code == 403

    for manager in (people.alice, people.olga):
        browser(manager).post(page(key, "freeze/"), {"minutes": 5, "reason": manager.email})
        key.refresh_from_db()
        assert key.frozen_reason == manager.email
    assert "by an operator" in text(client.get(page(key)))
    browser(people.alice).post(page(key, "thaw/"))
    key.refresh_from_db()
    assert key.state == "retiring"


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"minutes": ""}, "This field is required"),
        ({"minutes": "0"}, "greater than or equal to 1"),
        ({"minutes": "525601"}, "less than or equal to 525600"),
        ({"minutes": "x"}, "Enter a whole number"),
        ({"minutes": "5", "reason": "x\u202ey"}, "printable"),
        ({"minutes": "5", "reason": "x" * 201}, "at most 200"),
    ],
)
def test_what_is_no_freeze_freezes_nothing(people: People, said: dict[str, str], complaint: str):
    key = people.key(people.bob)

    answer = browser(people.bob).post(page(key, "freeze/"), said)

    assert (answer.status_code, complaint in text(answer)) == (422, True), text(answer)
    key.refresh_from_db()
    assert key.frozen_until is None


def test_a_revoked_key_is_neither_frozen_nor_thawed(people: People):
    key, client = people.key(people.bob), browser(people.bob)
    actions.freeze(key, length=timedelta(hours=1), actor=people.bob)
    actions.revoke_key(key)

    assert "has been revoked" in text(client.post(page(key, "freeze/"), {"minutes": 5}))
    assert "has been revoked" in text(client.post(page(key, "thaw/"), follow=True))
    assert not re.search(r"freeze/|thaw/", client.get(page(key)).content.decode())


def test_renaming(people: People):
    key, client = people.key(people.bob), browser(people.bob)

    assert client.post(page(key, "rename/"), {"name": "  desk "})["location"] == page(key)
    assert client.post(page(key, "rename/"), {"name": " "}).status_code == 422
    key.refresh_from_db()
    assert key.name == "desk"


@pytest.mark.parametrize("name", ["می‌خواهم", "👨‍💻 at home", "مفتاح 🦊"])
def test_names_of_every_script_are_taken_as_they_are(people: People, name: str):
    answer, _ = new_key(browser(people.bob), name=name)

    assert answer.status_code == 200
    assert ApiKey.objects.get().name == name
    assert name in text(browser(people.bob).get("/keys/"))


@pytest.mark.parametrize("name", ["\u200d", "x\u200b", "\u202egnp.exe"])
def test_a_name_that_hides_something_is_refused(people: People, name: str):
    answer, _ = new_key(browser(people.bob), name=name)

    assert answer.status_code == 422
    assert not ApiKey.objects.exists()


# What a page says


def test_what_had_no_price_is_unpriced_and_never_0(people: People):
    key = people.key(people.bob)
    used(key, cost=None)
    client = browser(people.bob)

    for shown in (text(client.get("/keys/")), text(client.get(page(key)))):
        assert "unpriced" in shown
        assert not re.search(r"\$0(?![.\d]*[1-9])", shown)

    used(key, cost=2_500_000)
    assert "1 request had no price and is not in the cost" in text(client.get(page(key)))
    assert "and 1 unpriced" in text(client.get("/keys/"))


def test_a_price_of_nothing_is_0_and_not_unpriced(people: People):
    key = people.key(people.bob)
    used(key, cost=0)

    shown = text(browser(people.bob).get(page(key)))
    assert "$0" in shown
    assert "unpriced" not in shown


def test_a_request_says_what_was_asked_what_answered_and_how_it_is_known(people: People):
    key = people.key(people.bob)
    used(key, model="fast", served_model="openai/gpt-x", usage_source="estimated", status=499, error="client_closed", duration_ms=61_500)

    shown = text(browser(people.bob).get(page(key)))

    for said in ("fast", "→ openai/gpt-x", "499", "client_closed", "123", "47", "$0.0015", "estimated", "1 min 1 s"):
        assert said in shown, said


@pytest.mark.parametrize("span", ["24h", "7d", "30d"])
def test_the_chart_and_its_table_have_the_same_figures(people: People, span: str):
    key = people.key(people.bob)
    for hours in (1, 30, 24 * 20):
        used(key, timezone.now() - timedelta(hours=hours), cost=None if hours == 1 else 1500)

    answer = browser(people.bob).get(page(key) + f"?range={span}")

    [chart] = re.findall(r'<script id="chart-data" type="application/json">(.*?)</script>', answer.content.decode(), re.DOTALL)
    data = json.loads(chart)
    expected = {"24h": 1, "7d": 2, "30d": 3}[span]
    assert sum(data["requests"]) == expected
    assert sum(data["fresh_input"]) == expected * 100
    assert sum(data["unpriced"]) == 1
    assert {len(values) for values in data.values()} == {{"24h": 24, "7d": 28, "30d": 30}[span]}
    table = answer.content.decode().split("The same as a table")[1].split("</table>")[0]
    assert table.count("<tr>") == len(data["labels"]) + 1


def test_older_requests_are_a_page_further(people: People):
    key = people.key(people.bob)
    for number in range(52):
        used(key, model=f"model-{number:02}")
    client = browser(people.bob)

    first = client.get(page(key)).content.decode()
    [older] = re.findall(r'rel="next" href="([^"]+)"', first)
    second = client.get(page(key) + html.unescape(older).split("#")[0]).content.decode()

    log = [set(re.findall(r'title="(model-\d\d)"', part)) for part in (first, second)]
    assert [len(part) for part in log] == [50, 2]
    assert not log[0] & log[1]
    assert 'rel="next"' not in second
    assert client.get(page(key) + "?before=nonsense").status_code == 404


def test_refused_calls_say_why(people: People):
    key = people.key(people.bob)
    hour = timezone.now().replace(minute=0, second=0, microsecond=0)
    for code, count in (("model_not_found", 3), ("shadow:rate_limit_exceeded", 5), ("some_new_code", 1)):
        RefusedCalls.objects.create(hour=hour, key_id=key.pk, status=429, code=code, count=count)

    shown = text(browser(people.bob).get(page(key)))

    for said in ("A model that does not exist here", "let through (shadow)", "Some new code"):
        assert said in shown


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("expired", "Expired"),
        ("revoked", "Revoked"),
        ("owner off", "owner’s account is switched off"),
        ("owner left", "no longer a member"),
        ("owner views", "Its owner is a viewer"),
    ],
)
def test_a_key_that_does_not_work_says_why(people: People, what: str, said: str):
    key = people.key(people.bob)
    match what:
        case "expired":
            ApiKey.objects.update(expires_at=timezone.now() - timedelta(hours=1))
        case "revoked":
            ApiKey.objects.update(revoked_at=timezone.now())
        case "owner off":
            User.objects.filter(pk=people.bob.pk).update(is_active=False)
        case "owner left":
            Membership.objects.filter(user=people.bob).delete()
        case "owner views":
            Membership.objects.filter(user=people.bob).update(role=Role.VIEWER)

    answer = browser(people.alice).get(page(key))

    assert said in text(answer)
    assert "Use this key" not in text(answer)


@pytest.mark.parametrize(("mode", "is_said"), [("enforce", True), ("shadow", False)])
def test_a_key_whose_budget_is_used_up_says_so_and_until_when(people: People, mode: str, is_said: bool):
    key = people.key(people.bob)
    actions.set_limit(people.acme, Allowance("money", 1_500_000, "month", mode), key=key)
    used(key, cost=1_499_999)
    assert "used up" not in text(browser(people.bob).get(page(key)))

    used(key, cost=1)

    shown = text(browser(people.bob).get(page(key)))
    assert ("This key: the budget of $1.50 a month is used up. Calls that cost money are refused until" in shown) == is_said
    assert "100 %" in shown


def test_a_budget_of_nothing_is_a_full_bar(people: People):
    key = people.key(people.bob)
    actions.set_limit(people.acme, Allowance("money", 0, "total"), key=key)

    answer = browser(people.bob).get(page(key))

    assert "the budget of $0.00 in all is used up. Calls that cost money are refused." in text(answer)
    assert 'value="1" max="1"' in answer.content.decode()


def test_an_organization_that_is_switched_off_shows_its_operator_why_no_key_works(people: People):
    key = people.key(people.bob)
    people.acme.is_active = False
    people.acme.save()

    assert "organization is switched off" in text(browser(people.olga).get(page(key)))
    assert browser(people.alice).get(page(key)).status_code == 404


def test_an_empty_list_says_the_next_step(people: People):
    assert "Name the first one below" in text(browser(people.bob).get("/keys/"))
    assert "No requests in the last 24 hours" in text(browser(people.bob).get(page(people.key(people.bob))))


def test_names_and_models_are_shown_as_text_and_never_run(people: People):
    hostile = "</script><script>alert(1)</script>{{ 7*7 }}"
    key = people.key(people.bob, name=hostile)
    used(key, model=hostile, served_model=f"p/{hostile}", error="<b>x</b>", status=502)
    client = browser(people.bob)

    for path in ("/keys/", page(key), page(key, "rotate/"), page(key, "revoke/"), page(key, "rename/"), "/keys/?q=%3Cscript%3E"):
        body = client.get(path).content.decode()
        assert "<script>alert" not in body
        assert "<b>x</b>" not in body
    assert hostile in html.unescape(client.get(page(key)).content.decode())


def shown_model(response) -> str:
    """What the lines to copy call."""
    [name] = re.findall(r'"model": "([^"]+)", "stream"', html.unescape(response.content.decode()))
    return name


def lists(credential: Credential, *models: str) -> Credential:
    UpstreamModel.objects.bulk_create([UpstreamModel(credential=credential, upstream_id=model) for model in models])
    return credential


@pytest.mark.parametrize("name", ['a"; rm -rf ~; "', "$(id)", "a b", "`id`", "", "x" * 200, "a'b"])
def test_a_models_name_goes_into_a_snippet_only_when_it_needs_no_quoting(people: People, name: str):
    lists(add_credential("openai", "one", "sk-of-this-account"), name, "gpt-4o")
    principal = snapshot.load_principal(people.key(people.bob).pk)
    assert principal is not None

    assert example_model(principal, snapshot.load(), [f"openai/{name}"]) == "openai/gpt-4o"


@pytest.mark.parametrize(
    ("models", "shown"),
    [
        ("", DEMO_MODEL),
        ("demo/*", DEMO_MODEL),
        ("openai/*, openai/o9", "openai/o9"),  # it is not listed, and passed on
        ("openai/*", "openai/gpt-4o"),
        ("openai/text-embedding-3, openai/g*", "openai/gpt-4o"),
        ("fast", "fast"),
        ("other/*", PLACEHOLDER),
    ],
)
def test_the_lines_to_copy_name_a_model_that_the_key_can_call(people: People, models: str, shown: str):
    add_credential("demo", "demo", "")
    lists(add_credential("openai", "one", "sk-of-this-account"), "text-embedding-3", "gpt-4o")
    create_route(organization=None, name="fast", targets=[Leads("openai/gpt-4o", 0)])

    answer, _ = new_key(browser(people.bob), models=models)

    assert shown_model(answer) == shown
    assert ("no model yet that this key can call" in text(answer)) == (shown == PLACEHOLDER)


def test_without_an_account_the_lines_name_no_demo_and_say_so(people: People):
    key, client = people.key(people.bob), browser(people.bob)
    assert shown_model(client.get(page(key))) == PLACEHOLDER

    for not_bobs in (
        add_credential("demo", "theirs", "", organization=people.rival),
        add_credential("demo", "hers", "", user=people.alice),
        add_credential("demo", "off", ""),
        add_credential("demo", "cold", ""),
    ):
        if not_bobs.label == "off":
            disable(not_bobs)
        if not_bobs.label == "cold":
            freeze(not_bobs, length=timedelta(minutes=5))
    lists(add_credential("openai", "keyless", "", settings={"pass_through": True}), "gpt-4o")
    assert shown_model(client.get(page(key))) == PLACEHOLDER

    add_credential("demo", "mine", "", organization=people.acme)
    assert shown_model(client.get(page(key))) == DEMO_MODEL
    FrozenModel.objects.create(pattern="demo/*", until=timezone.now() + timedelta(minutes=5))
    assert shown_model(client.get(page(key))) == PLACEHOLDER


def test_the_lines_name_what_was_used_last_while_it_can_be_called(people: People):
    key, client = people.key(people.bob), browser(people.bob)
    add_credential("demo", "demo", "")
    used(key, served_model="openai/gpt-x")
    assert shown_model(client.get(page(key))) == DEMO_MODEL  # its account is gone

    add_credential("openai", "one", "sk-of-this-account")
    assert shown_model(client.get(page(key))) == "openai/gpt-x"


# What a page costs


def queries_of(client: Client, path: str) -> list[str]:
    with CaptureQueriesContext(connection) as seen:
        assert client.get(path).status_code == 200
    return [query["sql"] for query in seen]


def test_the_list_takes_as_many_queries_for_30_keys_as_for_1(people: People):
    client = browser(people.alice)
    used(people.key(people.bob))
    queries_of(client, "/keys/?organization=acme")  # the choice is stored
    few = queries_of(client, "/keys/?organization=acme")
    for number in range(29):
        member = people.joins(f"member{number}", people.acme, Role.MEMBER)
        used(people.key(member, name=f"key {number}"))

    many = queries_of(client, "/keys/?organization=acme")

    assert len(many) == len(few) <= 14


def test_a_key_page_takes_as_many_queries_for_many_rows_and_limits_as_for_few_and_counts_nothing(
    people: People, monkeypatch: pytest.MonkeyPatch
):
    key, client = people.key(people.bob, limits=[Allowance("money", 10_000_000, "day")]), browser(people.alice)
    monkeypatch.setattr(snapshot.running, "current", Current(snapshot.load()))  # as in a process that serves
    used(key)
    few = queries_of(client, page(key))
    for number in range(60):
        used(key, timezone.now() - timedelta(minutes=15 * number), model=f"m{number}", served_model=f"p/m{number}")
    for window in ("week", "month", "total"):
        actions.set_limit(people.acme, Allowance("money", 10_000_000, window))

    many = queries_of(client, page(key))

    assert len(many) == len(few) <= 14
    assert not [sql for sql in many if "usageevent" in sql and "COUNT(" in sql.upper()]
    assert Limit.objects.count() == 4


# What a page may load


def test_pages_run_under_the_strict_policy_and_have_nothing_inline(people: People):
    key = people.key(people.bob)
    used(key)
    client = browser(people.bob)
    pages = [client.get(path) for path in ("/keys/", page(key), page(key, "rotate/"), "/accounts/password/change/", "/keys/999999/")]
    pages += [browser().get("/", headers={"accept": "text/html"}), new_key(client)[0]]

    for answer in pages:
        policy = {part.strip() for part in answer["content-security-policy"].split(";")}
        assert policy >= STRICT
        body = answer.content.decode()
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", body)
        for script in re.findall(r"<script([^>]*)>", body):
            assert 'src="/static/' in script or 'type="application/json"' in script


@pytest.mark.parametrize(("path", "script"), [("/admin/", "script-src 'self' 'unsafe-eval'"), ("/api/docs", "script-src 'self'")])
def test_where_the_policy_is_relaxed_it_still_holds(people: People, path: str, script: str):
    policy = {part.strip() for part in browser(people.olga).get(path)["content-security-policy"].split(";")}

    assert script in policy
    assert policy >= STRICT - {"script-src 'self'", "style-src 'self'"}
