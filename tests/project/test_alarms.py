"""What operators are mailed about: accounts that have to sign in again, and pools in which nobody can serve."""

from __future__ import annotations

import pytest
from django.core import mail

from accounts.models import User
from project import alarms
from project.models import Heartbeat
from project.tasks import look_after
from providers.actions import add_credential
from providers.models import Credential, State
from providers.secrets import SecretText
from proxy.catalog import Catalog, Upstream

HOUR = 3600.0


def upstream(number: int, prefix: str = "house", models: tuple[str, ...] = ("m", "n")) -> Upstream:
    return Upstream(number, "openai", f"u{number}", prefix, "https://up/v1", SecretText("s"), models=frozenset(models))


def exhausted(rests: dict[tuple[int, str], float], *upstreams: Upstream) -> dict[str, float]:
    return alarms.exhausted(Catalog(upstreams=upstreams), rests)


def test_a_pool_is_exhausted_when_all_of_its_accounts_rest_for_long():
    two = upstream(1), upstream(2)
    assert exhausted({(1, ""): HOUR, (2, ""): 2 * HOUR}, *two) == {"house": HOUR}
    assert exhausted({(1, ""): HOUR}, *two) == {}
    assert exhausted({(1, ""): HOUR, (2, ""): 10}, *two) == {}
    assert exhausted({(1, ""): HOUR, (2, ""): HOUR}, *two, upstream(3, "other")) == {"house": HOUR}


def test_one_model_may_be_exhausted_alone_if_somebody_lists_it():
    two = upstream(1), upstream(2, models=("n",))
    assert exhausted({(1, "m"): HOUR}, *two) == {"house/m": HOUR}
    assert exhausted({(1, "n"): HOUR}, *two) == {}
    assert exhausted({(1, "n"): HOUR, (2, ""): HOUR}, *two) == {"house/n": HOUR}
    assert exhausted({(1, "made-up"): HOUR, (2, "made-up"): HOUR}, *two) == {}


@pytest.mark.django_db
def test_an_account_that_has_to_sign_in_is_mailed_once_with_a_link_and_so_is_its_empty_pool():
    User.objects.create_superuser("op@example.org", "x")
    one = add_credential("openai", "team account", "sk-x")
    Credential.objects.filter(pk=one.pk).update(state=State.NEEDS_REAUTH)
    for _ in range(3):
        alarms.look({})
    account, pool = mail.outbox
    assert account.subject == "[Sluice] team account has to sign in again"
    assert f"/admin/providers/credential/{one.pk}/change/" in account.body
    assert pool.subject == "[Sluice] No account can serve openai/*"


@pytest.mark.django_db
def test_an_account_that_has_never_signed_in_has_lost_nothing():
    User.objects.create_superuser("op@example.org", "x")
    added = add_credential("gemini_cli", "just added", "", accept_policy=True, sign_in_later=True)
    assert added.state == State.NEEDS_REAUTH

    alarms.look({})

    assert mail.outbox == []


@pytest.mark.django_db
def test_a_pool_in_which_another_account_serves_is_not_exhausted_nor_is_one_that_was_switched_off():
    User.objects.create_superuser("op@example.org", "x")
    add_credential("openai", "second", "sk-y")
    one = add_credential("openai", "first", "sk-x")
    Credential.objects.filter(pk=one.pk).update(state=State.NEEDS_REAUTH)
    off = add_credential("openai", "off", "sk-z", prefix="off")
    Credential.objects.filter(pk=off.pk).update(state=State.DISABLED)
    alarms.look({})
    assert [one.subject for one in mail.outbox] == ["[Sluice] first has to sign in again"]


@pytest.mark.django_db
def test_a_pool_that_rests_is_mailed_with_the_time_of_its_return():
    User.objects.create_superuser("op@example.org", "x")
    alarms.look({"house/m": HOUR})
    [one] = mail.outbox
    assert one.subject == "[Sluice] All accounts of house/m rest"
    assert "UTC" in one.body


@pytest.mark.django_db
def test_the_scheduled_task_looks_and_leaves_its_heartbeat():
    look_after()
    assert Heartbeat.objects.get().name == "celery"
