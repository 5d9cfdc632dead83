"""The pages in Chromium, on a Sluice that runs: the way of a newcomer, themes, phones, and a console without complaints."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, WebSocketRoute, sync_playwright
from playwright.sync_api import Error as PlaywrightError

from accounts.principal import is_plausible
from tests.serving import Sluice, eventually

pytestmark = [pytest.mark.chromium, pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium on the PATH")]

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"width": 390, "height": 844}
TABLET = {"width": 800, "height": 1100}
LONG = "x" * 60 + " <script>alert(1)</script> " + "y" * 60

# Every breach of the content policy is kept where a test can read it.
VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""

SET_UP = """
from accounts import actions
from accounts.models import Membership, Organization, Role, User
from accounts.policy import Allowance
from providers.actions import add_credential
from providers.models import Credential
organization = Organization.objects.create(slug={slug!r}, name="Acme " + {slug!r}, time_zone="Europe/Berlin")
owner = User.objects.create_user({email!r}, {password!r})
operator = User.objects.create_superuser("op-" + {email!r}, {password!r})
Membership.objects.create(user=owner, organization=organization, role=Role.OWNER)
if not Credential.objects.filter(prefix="demo").exists():
    add_credential("demo", "demo", "")
actions.set_limit(organization, Allowance("money", 25_000_000, "month"))
"""


class Person:
    """Somebody with an organization of their own, at a browser."""

    def __init__(self, sluice: Sluice, chromium: Browser) -> None:
        self.sluice, self._chromium = sluice, chromium
        self.slug = f"acme-{uuid.uuid4().hex[:8]}"
        self.email, self.password = f"{self.slug}@example.org", "correct horse battery"
        self.complaints: list[str] = []
        self._contexts: list[BrowserContext] = []
        self._cookies: dict[bool, Any] = {}
        sluice.python(SET_UP.format(slug=self.slug, email=self.email, password=self.password))

    def opens(self, path: str = "/", **options: Any) -> Page:
        """A new browser, not signed in."""
        context = self._chromium.new_context(base_url=self.sluice.url, **{"locale": "en-GB", **options})
        self._contexts.append(context)
        context.set_default_timeout(10_000)
        context.add_init_script(VIOLATIONS)
        page = context.new_page()
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("response", lambda answer: self.complaints.append(f"{answer.status} {answer.url}") if answer.status >= 500 else None)
        page.goto(path)
        return page

    def signs_in(self, path: str = "/keys/", *, as_operator: bool = False, **options: Any) -> Page:
        """A further browser takes the cookies of the first: hashing a password is slow on purpose."""
        if as_operator in self._cookies:
            return self.opens(path, storage_state={"cookies": self._cookies[as_operator], "origins": []}, **options)
        page = self.opens("/", **options)
        page.get_by_label("Email").fill(("op-" if as_operator else "") + self.email)
        page.get_by_label("Password").fill(self.password)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url("**/keys/")
        self._cookies[as_operator] = page.context.storage_state()["cookies"]
        if path != "/keys/":
            page.goto(path)
        return page

    def makes_key(self, page: Page, name: str = "notebook") -> str:
        """Create a key on the list. Its clear text."""
        page.goto("/keys/")
        page.get_by_label("Name of the new key").fill(name)
        page.get_by_role("button", name="Create key").click()
        return page.locator("#new-key").inner_text()

    def calls(self, key: str, times: int = 1) -> None:
        for _ in range(times):
            request = urllib.request.Request(
                f"{self.sluice.url}/v1/chat/completions",
                data=json.dumps({"model": "demo/echo", "messages": [{"role": "user", "content": "Hello"}]}).encode(),
                headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert answer.status == 200

    def uses(self, page: Page, name: str = "notebook") -> str:
        """Make a key and call with it until its page shows it. The page's path; the page stays there."""
        key = self.makes_key(page, name)
        page.get_by_role("link", name="show its page").click()
        self.calls(key, times=3)
        eventually(lambda: self._shows_use(page), "the page does not show the calls", seconds=15)
        return re.sub(r"^https?://[^/]+", "", page.url)

    @staticmethod
    def _shows_use(page: Page) -> bool:
        page.reload()
        # The figures are read before the list: while rows come in, a page may show these and not yet those.
        figures = page.locator("section[aria-labelledby=usage] dl")
        return figures.count() > 0 and re.search(r"Requests\s+3\b", figures.inner_text()) is not None

    def checks(self, page: Page) -> None:
        """Nothing was refused, failed or complained of on this page."""
        assert page.evaluate("window.violations") == []
        assert self.complaints == []

    def _heard(self, message: Any) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)

    def leaves(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def person(sluice: Sluice, chromium: Browser) -> Iterator[Person]:
    somebody = Person(sluice, chromium)
    # The server learns of a first demo credential within seconds.
    sluice.wait_for("demo")
    yield somebody
    somebody.leaves()


def test_from_signing_in_to_ones_own_usage(person: Person):
    page = person.signs_in(permissions=["clipboard-read", "clipboard-write"])
    assert page.get_by_text("No keys yet").is_visible()

    key = person.makes_key(page)
    assert is_plausible(key)
    page.get_by_role("button", name="Copy key").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == key
    page.get_by_role("button", name="Copy the curl example").click()
    assert f'Authorization: Bearer {key}"' in page.evaluate("navigator.clipboard.readText()")
    for title, said in (
        ("Python", "from openai import OpenAI"),
        ("Node", 'import OpenAI from "openai"'),
        ("Environment", "OPENAI_BASE_URL"),
    ):
        page.get_by_role("radio", name=title).check()
        assert page.get_by_text(said).is_visible()

    page.get_by_role("link", name="show its page").click()
    assert page.get_by_text("No requests in the last 24 hours").is_visible()
    assert key not in page.content()
    person.calls(key, times=3)
    eventually(lambda: person._shows_use(page), "the page does not show the calls", seconds=15)

    figures = page.locator("section[aria-labelledby=usage] dl").inner_text()
    assert re.search(r"Requests\s+3\b", figures)
    assert "demo/echo" in page.locator("section[aria-labelledby=requests]").inner_text()
    person.checks(page)


def test_ones_requests_are_taken_away_as_csv(person: Person):
    page = person.signs_in()
    person.uses(page)

    with page.expect_download() as download:
        page.get_by_role("link", name="All of them as CSV").click()
    head, *rows = download.value.path().read_text().splitlines()

    assert download.value.suggested_filename.endswith("-24h.csv")
    assert head.startswith("request_id,at,")
    assert len(rows) == 3
    assert all(",demo/echo," in row for row in rows)
    person.checks(page)


def test_an_operator_who_names_no_owner_is_told_so(person: Person):
    page = person.signs_in(f"/keys/?organization={person.slug}", as_operator=True)
    assert page.get_by_label("Owner").is_visible()
    assert not page.get_by_label("Requests per minute").is_visible()
    page.get_by_label("Name of the new key").fill("theirs")
    page.get_by_role("button", name="Create key").click()
    page.get_by_text("This field is required").wait_for()

    page.get_by_label("Owner").fill(person.email)
    page.get_by_role("button", name="Create key").click()
    page.locator("#new-key").wait_for()
    person.complaints = [one for one in person.complaints if "422" not in one]
    person.checks(page)


def test_a_key_does_not_come_back_by_reload_or_by_the_back_button(person: Person):
    page = person.signs_in()
    key = person.makes_key(page)

    page.get_by_role("link", name="show its page").click()
    with contextlib.suppress(PlaywrightError):  # Chromium may refuse to show it at all: it was told to store nothing
        page.go_back()
    page.wait_for_load_state()
    assert key not in page.locator("body").inner_text()

    key = person.makes_key(page, "second")
    page.reload()
    assert key not in page.content()
    page.goto("/keys/")
    assert page.get_by_role("link", name="second").count() == 1


def test_the_chart_draws_each_of_its_views_in_each_theme(person: Person):
    page = person.signs_in(color_scheme="light")
    person.uses(page)
    canvas = page.locator("canvas#chart")
    painted = """canvas => {
        const blank = document.createElement("canvas");
        [blank.width, blank.height] = [canvas.width, canvas.height];
        return canvas.toDataURL() !== blank.toDataURL();
    }"""

    for view, legend in (("Cost", "cost"), ("Failures", "failed"), ("Tokens", "output"), ("Requests", "answered")):
        button = page.get_by_role("button", name=view, exact=True)
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert canvas.evaluate(painted)
        assert legend in page.locator("#legend").inner_text()

    canvas.hover(position={"x": canvas.bounding_box()["width"] - 12, "y": 100})  # type: ignore[index]
    hovered = "canvas => Chart.getChart(canvas).getActiveElements().map((one) => one.element.options.backgroundColor)"
    assert canvas.evaluate(hovered)[0] == page.evaluate(
        "getComputedStyle(document.documentElement).getPropertyValue('--chart-fresh').trim()"
    )

    light = canvas.evaluate("canvas => canvas.toDataURL()")
    page.get_by_role("radio", name="Dark theme").first.check(force=True)
    assert canvas.evaluate("canvas => canvas.toDataURL()") != light
    for span in ("7 days", "30 days"):
        page.get_by_role("link", name=span).click()
        assert page.locator("canvas#chart[data-drawn=requests]").evaluate(painted)
    person.checks(page)


def test_a_theme_is_in_force_from_the_first_paint_on_and_is_remembered(person: Person):
    page = person.signs_in(color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)

    page.get_by_role("radio", name="Dark theme").first.check(force=True)
    dark = page.evaluate(background)
    assert dark != light

    page.add_init_script(
        """const theme = () => document.documentElement.dataset.theme;
        addEventListener("DOMContentLoaded", () => { window.early = theme(); });
        new PerformanceObserver(() => { window.painted ??= theme(); }).observe({type: "paint", buffered: true});"""
    )
    page.goto("/keys/")
    assert page.evaluate("window.early") == "dark"
    # Not `wait_for_function`, which evaluates text inside the page: its policy forbids that.
    assert eventually(lambda: page.evaluate("window.painted"), "nothing was painted") == "dark"
    assert page.evaluate(background) == dark

    page.get_by_role("radio", name="Theme of the system").first.check(force=True)
    assert page.evaluate(background) == light
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) == dark
    page.reload()
    assert page.get_by_role("radio", name="Theme of the system").first.is_checked()
    person.checks(page)


def test_without_scripts_everything_but_the_chart_works(person: Person):
    scripted = person.signs_in()
    path = person.uses(scripted)

    page = person.signs_in(path, java_script_enabled=False, color_scheme="dark")

    assert not page.locator("canvas").is_visible()
    assert page.get_by_role("button", name="Copy").count() == 0
    page.get_by_text("The same as a table").click()
    rows = page.get_by_role("region", name="Usage as a table").locator("tbody tr")
    assert rows.count() == 24
    assert page.get_by_text("UTC").first.is_visible()
    page.get_by_role("radio", name="Python").check()
    assert page.get_by_text("from openai import OpenAI").is_visible()
    assert page.evaluate("getComputedStyle(document.body).colorScheme || getComputedStyle(document.documentElement).colorScheme") == "dark"
    page.get_by_role("link", name="Rename").click()
    page.get_by_label("Name").fill("desk")
    page.get_by_role("button", name="Rename").click()
    assert page.get_by_role("heading", name="desk").is_visible()


def pages_of(person: Person, page: Page) -> list[str]:
    """One key's page with usage, and all the others."""
    path = person.uses(page, LONG)
    return [
        "/keys/",
        path,
        f"{path}?range=30d",
        page.locator("section[aria-labelledby=requests] tbody a").first.get_attribute("href") or "",
        f"{path}rotate/",
        f"{path}revoke/",
        f"{path}rename/",
        f"{path}freeze/",
        "/accounts/password/change/",
        "/nothing/",
    ]


def test_nothing_is_wider_than_a_phone(person: Person):
    page = person.signs_in(viewport=PHONE)
    sizes = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wide = []

    def look(where: str) -> None:
        scroll, client = page.evaluate(sizes)
        if scroll > client:
            wide.append(f"{where}: {scroll} > {client}")

    for path in pages_of(person, page):
        page.goto(path)
        for details in page.locator("main details > summary").all():
            details.click()
        look(path)
    person.makes_key(page, LONG)
    look("the key, shown once")
    front = person.opens("/", viewport=PHONE)
    scroll, client = front.evaluate(sizes)

    assert wide == []
    assert scroll <= client == PHONE["width"]


def test_on_a_tablet_no_column_is_out_of_reach(person: Person):
    page = person.signs_in(viewport=TABLET)
    out_of_reach = """() => [...document.querySelectorAll("main *")]
        .filter((one) => one.scrollWidth > one.clientWidth && getComputedStyle(one).overflowX === "hidden")
        .filter((one) => one.querySelector("table"))
        .map((one) => one.outerHTML.slice(0, 120))"""

    for path in pages_of(person, page):
        page.goto(path)
        assert page.evaluate(out_of_reach) == [], path


def test_on_a_phone_a_long_name_ends_before_the_state_of_its_key(person: Person):
    page = person.signs_in(viewport=PHONE)
    person.makes_key(page, LONG)
    page.goto("/keys/")

    row = page.locator(".key-row").first
    name, state = row.get_by_role("link").bounding_box(), row.locator(".badge").first.bounding_box()
    assert name is not None
    assert state is not None
    assert name["x"] + name["width"] <= state["x"]
    assert row.get_by_role("link").get_attribute("title") == LONG


def test_every_page_is_without_complaint_and_says_what_it_is(person: Person):
    page = person.signs_in()
    unnamed = """() => [...document.querySelectorAll("input:not([type=hidden]), select, textarea, button, a[href], summary, canvas")]
        .filter((one) => one.checkVisibility())
        .filter((one) => !(one.labels?.length || one.ariaLabel || one.title || one.innerText?.trim()))
        .map((one) => one.outerHTML.slice(0, 120))"""

    for path in pages_of(person, page):
        page.goto(path)
        assert page.evaluate(unnamed) == [], path
        assert page.locator("h1").count() == 1, path
        assert page.title().endswith("Sluice"), path
        person.complaints = [one for one in person.complaints if not (path == "/nothing/" and "404" in one)]
        person.checks(page)


def test_the_keyboard_reaches_what_matters(person: Person):
    page = person.signs_in()
    page.goto("/keys/")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.get_by_label("Account").focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("link", name="Change password").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_role("link", name="Change password").is_visible()
    page.get_by_label("Name of the new key").focus()
    page.keyboard.type("typed")
    page.keyboard.press("Enter")
    page.locator("#new-key").wait_for()


def test_times_are_the_viewers_own(person: Person):
    page = person.signs_in(timezone_id="Asia/Tokyo")
    path = person.uses(page)

    def shown(zone: str) -> str:
        return person.signs_in(path, timezone_id=zone).locator("section[aria-labelledby=requests] time").first.inner_text()

    at = page.locator("section[aria-labelledby=requests] time").first.get_attribute("datetime")
    assert at is not None
    assert at.endswith("Z")
    assert shown("Asia/Tokyo") != shown("America/New_York")


def requests_shown(page: Page) -> int:
    found = re.search(r"Requests\s+([\d,]+)\b", page.locator("section[aria-labelledby=usage] dl").inner_text())
    return int(found[1].replace(",", "")) if found else 0


def test_an_open_page_shows_new_usage_by_itself(person: Person):
    page = person.signs_in(timezone_id="Asia/Tokyo")
    key = person.makes_key(page)
    page.get_by_role("link", name="show its page").click()
    page.locator("[data-live=on]").wait_for()
    person.calls(key, times=2)
    page.locator("canvas#chart[data-drawn=requests]").wait_for(timeout=30_000)  # it had none: the chart comes with the page
    page.locator("[data-live=on]").wait_for()

    page.evaluate("window.same = true")
    page.get_by_text("The same as a table").click()
    page.get_by_role("button", name="Tokens", exact=True).click()
    chart = "document.getElementById('chart').toDataURL()"
    before, drawn = requests_shown(page), page.evaluate(chart)
    person.calls(key, times=3)
    eventually(lambda: requests_shown(page) == 5, "the figures stay as they were", seconds=15)

    assert 0 < before < 5
    assert page.evaluate("window.same")  # it was not loaded again
    assert page.evaluate(chart) != drawn
    assert page.get_by_role("region", name="Usage as a table").is_visible()
    log = page.locator("section[aria-labelledby=requests] tbody tr")
    assert log.count() == 5
    assert "UTC" not in log.first.inner_text()  # in the viewer's own zone
    person.checks(page)


def test_nothing_is_taken_from_under_somebodys_hands(person: Person):
    page = person.signs_in()
    key = person.makes_key(page)
    page.get_by_role("link", name="show its page").click()
    person.calls(key)
    page.locator("canvas#chart[data-drawn=requests]").wait_for(timeout=30_000)
    page.locator("[data-live=on]").wait_for()
    log = page.get_by_role("region", name="Recent requests", exact=True)
    log.focus()

    person.calls(key)
    eventually(lambda: requests_shown(page) == 2, "the figures stay as they were", seconds=15)

    assert log.locator("tbody tr").count() == 1
    assert log.evaluate("region => region === document.activeElement")
    person.checks(page)


def test_a_page_that_lost_its_connection_tries_again_and_catches_up(person: Person):
    page = person.signs_in()
    path = person.uses(page)
    key = person.makes_key(page, "other")
    attempts = []

    def connects(socket: WebSocketRoute) -> None:
        attempts.append(socket)
        if len(attempts) == 1:
            person.calls(key)
            socket.close(code=1012)
        else:
            socket.connect_to_server()

    page.route_web_socket(re.compile("/ws/usage"), connects)
    page.goto("/keys/")
    page.get_by_role("link", name="other").first.click()
    eventually(lambda: requests_shown(page) == 1, "it does not catch up", seconds=15)
    assert len(attempts) >= 2
    page.goto(path)
    person.checks(page)


SIGNS_IN = """
from providers.actions import add_credential
settings = {{name: "https://example.org/" + "x" * 60 for name in ("client_id", "client_secret", "token_url")}}
print(add_credential("gemini_cli", {label!r}, "", prefix={label!r}, settings=settings, accept_policy=True, sign_in_later=True).pk)
"""


def test_the_admin_breaks_links_and_keys_that_are_wider_than_a_phone(person: Person):
    number = person.sluice.python(SIGNS_IN.format(label=person.slug)).split()[-1]
    page = person.signs_in(as_operator=True, viewport=PHONE)
    width = "document.documentElement.scrollWidth"

    page.goto(f"/admin/providers/credential/{number}/sign-in/")
    page.get_by_role("button", name="Begin").click()
    page.locator("#sign-in-link").wait_for()
    assert page.evaluate(width) == PHONE["width"]

    person.makes_key(person.signs_in())
    key = person.sluice.python("from accounts.models import ApiKey\nprint(ApiKey.objects.latest('pk').pk)").split()[-1]
    page.goto(f"/admin/accounts/apikey/{key}/rotate/")
    page.get_by_role("button", name="Rotate").click()
    page.locator("#issued-key").wait_for()
    assert page.evaluate(width) == PHONE["width"]


def test_the_admin_and_the_api_page_run_under_their_policy(person: Person):
    page = person.signs_in(as_operator=True)

    for path in ("/admin/", "/admin/proxy/usageevent/", "/admin/proxy/route/add/", "/admin/accounts/apikey/"):
        page.goto(path)
        assert page.locator("#main").is_visible(), path
        person.checks(page)
    page.goto("/api/docs")
    page.get_by_text("/api/organizations").first.wait_for()
    person.checks(page)
