"""The sign-in page in Chromium: it goes on by itself, keeps to the content policy, and says what is to be done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.proxy import test_pages_browser
from tests.proxy.test_pages_browser import Person
from tests.serving import Sluice
from tests.upstreams.oauth_server import OAuthUpstream
from tests.upstreams.passport import installed_in

pytestmark = test_pages_browser.pytestmark
chromium = test_pages_browser.chromium


@pytest.fixture
def vendor() -> Iterator[OAuthUpstream]:
    with OAuthUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def house(serve: Callable[..., Sluice], tmp_path_factory: pytest.TempPathFactory) -> Sluice:
    return serve(PYTHONPATH=installed_in(tmp_path_factory.mktemp("site")))


def waiting(house: Sluice, vendor: OAuthUpstream, flow: str) -> int:
    settings = json.dumps(vendor.settings(flow))
    code = (
        "from providers.actions import add_credential; "
        f"print(add_credential('passport', 'Mine', '', base_url={vendor.base_url!r}, settings={settings}, sign_in_later=True).pk)"
    )
    return int(house.python(code))


def test_a_device_sign_in_goes_on_when_the_person_has_approved(
    house: Sluice,
    chromium: Browser,
    vendor: OAuthUpstream,
    tmp_path: Path,
):
    made = waiting(house, vendor, "device")
    olga = Person(house, chromium)
    page = olga.signs_in(as_operator=True)
    page.goto(f"/admin/providers/credential/{made}/change/")
    page.get_by_role("link", name="Sign in").click()
    page.get_by_role("button", name="Begin").click()
    page.get_by_text("ABCD-").last.wait_for()
    page.screenshot(path=tmp_path / "waiting.png")
    link = page.locator("#sign-in-link")
    assert (link.get_attribute("target"), link.get_attribute("rel")) == ("_blank", "noopener noreferrer")
    vendor.approve()
    page.wait_for_url(f"**/credential/{made}/change/", timeout=20_000)
    assert page.get_by_text("is signed in").count() == 1
    assert page.evaluate("window.violations") == []
    assert olga.complaints == []
    olga.leaves()


def test_a_code_sign_in_takes_the_address_that_is_pasted(house: Sluice, chromium: Browser, vendor: OAuthUpstream):
    made = waiting(house, vendor, "code")
    olga = Person(house, chromium)
    page = olga.signs_in(f"/admin/providers/credential/{made}/sign-in/", as_operator=True)
    page.goto(f"/admin/providers/credential/{made}/sign-in/")
    page.get_by_role("button", name="Begin").click()
    address = vendor.browse(page.locator("#sign-in-link").get_attribute("href") or "")
    page.get_by_label("Address or code").fill(address)
    page.get_by_role("button", name="Sign in", exact=True).click()
    page.wait_for_url(f"**/credential/{made}/change/")
    assert page.get_by_text("Renewed next").count() == 1
    assert olga.complaints == []
    olga.leaves()
