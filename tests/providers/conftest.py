"""A kind that signs in, its vendor, and accounts of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest
from django.conf import settings

from providers.actions import add_credential
from providers.adapter import Adapter
from providers.models import Credential
from tests.upstreams.oauth_server import OAuthUpstream
from tests.upstreams.passport import Passport, file_of


@pytest.fixture
def passport(speak: Callable[[str, Adapter], None]) -> Passport:
    """The kind is known while the test runs."""
    adapter = Passport()
    speak("passport", adapter)
    return adapter


@pytest.fixture
def vendor(passport: Passport, monkeypatch: pytest.MonkeyPatch) -> Iterator[OAuthUpstream]:
    """The vendor, whom calls may reach."""
    monkeypatch.setattr(settings, "ENV", replace(settings.ENV, egress_allow=[ip_network("127.0.0.0/8")]))
    with OAuthUpstream() as upstream:
        yield upstream


@pytest.fixture
def account(vendor: OAuthUpstream) -> Callable[..., Credential]:
    """Make an account that is signed in: its token ended `ended_seconds` ago (negative: is good for so long)."""

    def make(label: str = "Mine", *, ended_seconds: float = 1, flow: str = "device", **more: Any) -> Credential:
        return add_credential(
            "passport",
            label,
            file_of(vendor.log_in(), time.time() - ended_seconds),
            base_url=vendor.base_url,
            settings=vendor.settings(flow),
            **more,
        )

    return make
