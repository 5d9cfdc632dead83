"""Operators are told once for as long as something lasts, and again when it comes again."""

from __future__ import annotations

import smtplib
from datetime import timedelta
from typing import Any

import pytest
from django.core import mail
from django.core.mail.backends.locmem import EmailBackend
from django.utils import timezone

from accounts.models import Notice, User
from accounts.notices import OVER_AFTER, RETRY_AFTER, tell

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def operator() -> User:
    User.objects.create_user("member@example.org", "x")
    return User.objects.create_superuser("op@example.org", "x")


def say(**options: Any) -> bool:
    return tell("credential.needs_reauth", "credential 7", "It has to sign in again", "Do so.", **options)


def later(by: timedelta) -> None:
    for name in ("seen_at", "tried_at"):
        Notice.objects.update(**{name: timezone.now() - by})


def test_what_is_said_again_and_again_is_mailed_once_to_the_operators_alone():
    assert [say(), say(), say()] == [True, False, False]
    [one] = mail.outbox
    assert one.recipients() == ["op@example.org"]
    assert one.subject == "[Sluice] It has to sign in again"
    assert one.body == "Do so."


def test_what_has_been_over_for_a_while_is_news_when_it_comes_again():
    say()
    later(OVER_AFTER / 2)
    assert not say()
    later(OVER_AFTER + timedelta(seconds=1))
    assert say()
    assert len(mail.outbox) == 2


def test_what_is_told_once_for_ever_is_never_told_again():
    assert say(once=True)
    later(OVER_AFTER * 10)
    assert not say(once=True)


def test_another_subject_is_another_matter():
    say()
    assert tell("credential.needs_reauth", "credential 8", "t", "x")
    assert tell("pool.exhausted", "credential 7", "t", "x")


def test_a_mail_that_cannot_be_sent_is_tried_again_and_stops_nobody(monkeypatch: pytest.MonkeyPatch):
    def fails(self: object, messages: object) -> int:
        raise smtplib.SMTPServerDisconnected("away")

    with monkeypatch.context() as patched:
        patched.setattr(EmailBackend, "send_messages", fails)
        assert not say()
        later(RETRY_AFTER / 2)
        assert not say()
    assert not say()
    later(RETRY_AFTER + timedelta(seconds=1))
    assert say()
    assert len(mail.outbox) == 1


def test_several_operators_do_not_see_each_others_addresses():
    User.objects.create_superuser("second@example.org", "x")
    say()
    [one] = mail.outbox
    assert (one.to, one.bcc) == (["op@example.org"], ["second@example.org"])


def test_others_than_operators_can_be_told():
    assert say(to=["owner@example.org"])
    assert mail.outbox[0].to == ["owner@example.org"]
