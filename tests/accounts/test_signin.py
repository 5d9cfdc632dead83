"""Signing in, as Django's test client sees it: whom the limits on it count, behind proxies and without."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.cache import cache
from django.test import Client
from django.urls import reverse

from accounts.models import User

FRONT = "172.30.53.7"
FAILURES = 10  # from one address in a minute
ADA = "ada@example.org"


@pytest.fixture(autouse=True)
def nobody_has_failed(db: None) -> Iterator[None]:
    cache.clear()
    User.objects.create_user(ADA, ADA)
    yield
    cache.clear()


@pytest.fixture
def behind_the_front(settings: Any) -> None:
    settings.TRUSTED_PROXIES = [ipaddress.ip_network("172.30.53.0/24")]


def signs_in(socket: str, forwarded: str = "", email: str = ADA, password: str = ADA) -> bool:
    client = Client(REMOTE_ADDR=socket, **({"HTTP_X_FORWARDED_FOR": forwarded} if forwarded else {}))
    client.post(reverse("account_login"), {"login": email, "password": password})
    return "_auth_user_id" in client.session


def fail(socket: str, *forwarded: str) -> None:
    """As somebody who tries one name after the other, until the address has no trial left."""
    for number in range(FAILURES):
        said = forwarded[number % len(forwarded)] if forwarded else ""
        assert not signs_in(socket, said, email=f"{number}@example.org", password="wrong")


def test_whoever_fails_too_often_is_held_up_and_nobody_else(behind_the_front: None):
    fail(FRONT, "203.0.113.5")

    assert not signs_in(FRONT, "203.0.113.5")
    assert signs_in(FRONT, "203.0.113.6")


def test_what_a_client_says_itself_gives_it_no_further_trials(behind_the_front: None):
    """A proxy adds what it saw on the right."""
    fail(FRONT, *[f"198.51.100.{number}, 203.0.113.5" for number in range(FAILURES)])

    assert not signs_in(FRONT, "198.51.100.99, 203.0.113.5")


def test_whoever_is_no_trusted_proxy_is_not_believed(behind_the_front: None):
    fail("203.0.113.5", *[f"198.51.100.{number}" for number in range(FAILURES)])

    assert not signs_in("203.0.113.5", "198.51.100.99")
    assert signs_in(FRONT, "198.51.100.1")


def test_without_trusted_proxies_the_sockets_address_counts(settings: Any):
    settings.TRUSTED_PROXIES = []
    fail("203.0.113.5", "198.51.100.1")

    assert not signs_in("203.0.113.5", "198.51.100.2")
    assert signs_in("203.0.113.6", "198.51.100.1")


def test_addresses_of_ipv4_at_an_ipv6_socket_are_told_apart():
    fail("::ffff:203.0.113.5")

    assert not signs_in("::ffff:203.0.113.5")
    assert signs_in("::ffff:203.0.113.6")
