"""Each kind that signs in, end to end: its own simulator's sign-in and token endpoint, and a gateway that runs.

Rows G3-G7 and Q3-Q6, Q15 of the simulators' recipes (reference gemini-qwen-codegeex.md, 6.2 and 6.3), and Kimi's 2.10.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from urllib.parse import parse_qs
from uuid import uuid4

import httpx
import pytest

from tests.conftest import postgres_database
from tests.serving import REPOSITORY, CommandFailed, Sluice, eventually
from tests.upstreams.gemini import GeminiUpstream
from tests.upstreams.kimi import KimiUpstream
from tests.upstreams.kit import Seen, Step
from tests.upstreams.qwen import QwenUpstream

HOUR = 3600.0
TROUBLE = {"qwen": "http_500", "kimi": "http_503", "gemini_cli": "http_503"}  # what `token_endpoint_fails` makes of it


class Vendor:
    """What the tests do to a vendor, whichever it is."""

    kind: ClassVar[str]
    model: ClassVar[str]
    refused: ClassVar[str]  # the scenario of a call whose token is not taken

    def __init__(self, upstream: Any) -> None:
        self.upstream = upstream

    @property
    def base_url(self) -> str:
        return str(self.upstream.origin)

    def settings(self) -> dict[str, str]:
        raise NotImplementedError

    def file(self, ends_in: float) -> str:
        """The credential file that the vendor's own tool would have kept, of a new sign-in."""
        raise NotImplementedError

    def end_tokens(self) -> None:
        """No access token is taken any more; the refresh tokens work on."""
        raise NotImplementedError

    def end_sign_ins(self) -> None:
        """And neither do the refresh tokens."""
        raise NotImplementedError

    def token_endpoint_fails(self, times: int) -> None:
        raise NotImplementedError

    def person(self, link: str) -> str:
        """What somebody does who opens the link; what that person pastes."""
        raise NotImplementedError

    @property
    def calls(self) -> list[Seen]:
        return [seen for seen in self.upstream.posts if "ompletions" in seen.path or "enerateContent" in seen.path]

    @property
    def refreshes(self) -> list[Seen]:
        return [seen for seen in self.upstream.posts if b"grant_type=refresh_token" in seen.body]


class Qwen(Vendor):
    kind, model, refused = "qwen", "coder-model", "401"
    upstream: QwenUpstream

    @property
    def base_url(self) -> str:
        return f"{self.upstream.origin}/nowhere"  # never called: the token says where

    def settings(self) -> dict[str, str]:
        return self.upstream.oauth_settings

    def file(self, ends_in: float) -> str:
        return json.dumps(json.loads(self.upstream.credential_file()) | {"expiry_date": int((time.time() + ends_in) * 1000)})

    def end_tokens(self) -> None:
        for pair in self.upstream.pairs:
            self.upstream.revoke(pair.access)

    def end_sign_ins(self) -> None:
        self.upstream.dead_families |= {pair.family for pair in self.upstream.pairs}

    def token_endpoint_fails(self, times: int) -> None:
        self.upstream.script_tokens(*["500"] * times)

    def person(self, link: str) -> str:
        assert httpx.get(link).status_code == 200
        return ""


class Kimi(Vendor):
    kind, model, refused = "kimi", "kimi-for-coding", "bad_key"
    upstream: KimiUpstream

    def settings(self) -> dict[str, str]:
        return {"client_id": "sim-client", "auth_url": self.upstream.origin}

    def file(self, ends_in: float) -> str:
        return json.dumps(self.upstream._tokens() | {"expires_at": time.time() + ends_in})

    def end_tokens(self) -> None:
        self.upstream.access_tokens.clear()

    def end_sign_ins(self) -> None:
        self.end_tokens()
        self.upstream.refresh_tokens.clear()

    def token_endpoint_fails(self, times: int) -> None:
        self.upstream.refresh_is_down = times > 0

    def person(self, link: str) -> str:
        return ""  # it asks a few times, and then somebody has approved


class Gemini(Vendor):
    kind, model, refused = "gemini_cli", "gemini-2.5-pro", "401"
    upstream: GeminiUpstream

    def settings(self) -> dict[str, str]:
        own = {"token_url": self.upstream.token_url, "authorize_url": self.upstream.authorize_url}
        return {"client_id": "sim-client", "client_secret": "sim-shh", **own}

    def file(self, ends_in: float) -> str:
        made = f"ya29.sim-ok~file-{uuid4().hex[:6]}"
        self.upstream.issued[made] = time.time() + HOUR
        refresh = self.upstream._new_refresh_token()["refresh_token"]
        return json.dumps({"access_token": made, "refresh_token": refresh, "expiry_date": int((time.time() + ends_in) * 1000)})

    def end_tokens(self) -> None:
        self.upstream.expired |= set(self.upstream.issued)

    def end_sign_ins(self) -> None:
        self.end_tokens()
        self.upstream.dead |= self.upstream.refresh_tokens

    def token_endpoint_fails(self, times: int) -> None:
        self.upstream.token_errors = [(503, {"error": "backend_error"})] * times

    def person(self, link: str) -> str:
        answer = httpx.get(link)
        assert answer.status_code == 302, answer.text
        return answer.headers["location"]


KINDS: dict[str, tuple[type[Vendor], Callable[[], Any]]] = {
    "qwen": (Qwen, QwenUpstream),
    "kimi": (Kimi, KimiUpstream),
    "gemini_cli": (Gemini, GeminiUpstream),
}


@pytest.fixture(scope="module")
def house(serve: Callable[..., Sluice]) -> Sluice:
    """One of its own: it is killed on the way."""
    return serve(hurried=True)


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def house_on(request: pytest.FixtureRequest, serve: Callable[..., Sluice]) -> Iterator[Sluice]:
    if request.param == "sqlite":
        yield request.getfixturevalue("house")
        return
    with postgres_database() as url:
        yield serve(hurried=True, DATABASE_URL=url, SECRET_KEY=secrets.token_hex(32), KEYRING=secrets.token_hex(32))


@pytest.fixture(scope="module")
def key(house: Sluice) -> str:
    return house.issue_key()


@pytest.fixture(scope="module")
def key_on(house_on: Sluice) -> str:
    return house_on.issue_key()


@pytest.fixture(params=KINDS)
def vendor(request: pytest.FixtureRequest) -> Iterator[Vendor]:
    yield from vendor_of(request.param)


@pytest.fixture
def other(vendor: Vendor) -> Iterator[Vendor]:
    """The same vendor at another address, so that it can be told whose account served."""
    yield from vendor_of(vendor.kind)


@pytest.fixture
def qwen() -> Iterator[Vendor]:
    yield from vendor_of("qwen")


@pytest.fixture
def gemini() -> Iterator[Vendor]:
    yield from vendor_of("gemini_cli")


def vendor_of(kind: str) -> Iterator[Vendor]:
    made, upstream = KINDS[kind]
    with upstream() as running:
        yield made(running)


@pytest.fixture
def prefix() -> str:
    return f"p-{uuid4().hex[:6]}"


def add(house: Sluice, vendor: Vendor, prefix: str, *, ends_in: float = HOUR, label: str = "", **options: Any) -> int:
    """An account out of the file of the vendor's own tool."""
    made = house.add_credential(
        vendor.kind, vendor.base_url, secret=vendor.file(ends_in), prefix=prefix, label=label, **vendor.settings(), **options
    )
    house.wait_for(prefix)
    return made


def chat(house: Sluice, key: str, prefix: str, vendor: Vendor) -> httpx.Response:
    body = {"model": f"{prefix}/{vendor.model}", "messages": [{"role": "user", "content": "hello"}]}
    return httpx.post(f"{house.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=30)


def token_of(house: Sluice, credential: int) -> dict[str, Any]:
    """How the account's sign-in stands, as the database has it."""
    found: dict[str, Any] = json.loads(
        house.python(
            "import json; from providers.models import OAuthToken; "
            f"t = OAuthToken.objects.select_related('credential').get(pk={credential}); "
            "print(json.dumps({'generation': t.generation, 'error': t.last_error, 'state': t.credential.state}))"
        )
    )
    return found


def sign_in(house: Sluice, vendor: Vendor, *options: str) -> int:
    """`manage.py login` in a terminal of its own, and the person in front of it. The account's id."""
    command = [sys.executable, "manage.py", "login", vendor.kind, *options]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, env=house.env, text=True, **pipes) as login:
        assert login.stdin is not None
        assert login.stdout is not None
        assert login.stderr is not None
        link = next((line.strip() for line in login.stdout if line.startswith("  http")), "")
        assert link, login.stderr.read()
        login.stdin.write(vendor.person(link) + "\n")
        login.stdin.flush()
        said = login.stdout.read()
        assert (login.wait(20), login.stderr.read()) == (0, "")
    return int(said.split()[-1])


def as_options(vendor: Vendor, prefix: str) -> list[str]:
    sets = [word for name, value in vendor.settings().items() for word in ("--set", f"{name}={value}")]
    return ["--label", prefix, "--prefix", prefix, "--base-url", vendor.base_url, "--accept-policy", *sets]


def sign_in_again(house: Sluice, vendor: Vendor, credential: int) -> None:
    """As the page and the command do when they have the tokens."""
    house.python(
        "from providers import actions, registry; from providers.models import Credential; "
        f"actions.sign_in(Credential.objects.get(pk={credential}), registry.adapter({vendor.kind!r}).tokens_from({vendor.file(HOUR)!r}))"
    )


def refresh_token_in(seen: Seen) -> str:
    return parse_qs(seen.body.decode())["refresh_token"][0]


# Signing in


def test_an_account_signs_in_from_a_terminal_and_serves(house: Sluice, key: str, vendor: Vendor, prefix: str):
    if isinstance(vendor, Qwen):
        vendor.upstream.interval_seconds = 1
    if isinstance(vendor, Kimi):
        vendor.upstream.waits = ("authorization_pending",)
    made = sign_in(house, vendor, *as_options(vendor, prefix))

    house.wait_for(prefix)
    answer = chat(house, key, prefix, vendor)
    assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "echo: hello")
    assert token_of(house, made) == {"generation": 1, "error": "", "state": "active"}
    assert vendor.refreshes == []


def test_a_sign_in_needs_its_settings_and_where_it_has_no_sign_in_a_file_is_refused(house: Sluice, qwen: Vendor, prefix: str):
    with pytest.raises(CommandFailed, match="client_id"):
        house.manage("login", "qwen", "--label", prefix, "--set", "auth=oauth", "--accept-policy")
    with pytest.raises(CommandFailed, match="does not sign in"):
        house.manage("add_credential", "qwen", "--label", prefix, "--secret-stdin", stdin=qwen.file(HOUR))


# Renewing


def test_the_tools_own_file_is_taken_and_renewed_ahead_of_its_end(house: Sluice, key: str, vendor: Vendor, prefix: str):
    made = add(house, vendor, prefix, ends_in=2)
    eventually(lambda: token_of(house, made)["generation"] == 2, "it is not renewed by itself", seconds=15)

    eventually(lambda: chat(house, key, prefix, vendor).status_code == 200, "it does not serve")
    assert len(vendor.refreshes) == 1
    assert len(vendor.calls) == 1, "no call was made with a token that had ended"


@pytest.mark.parametrize("ends_in", [-10, HOUR], ids=["ended", "refused"])
def test_a_token_is_renewed_once_for_twenty_requests_within_them(house: Sluice, key: str, vendor: Vendor, prefix: str, ends_in: float):
    """G3, G4, Q3, Q6."""
    made = add(house, vendor, prefix, ends_in=ends_in)
    if ends_in > 0:
        vendor.end_tokens()

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: chat(house, key, prefix, vendor), range(20)))

    assert [answer.status_code for answer in answers] == [200] * 20
    assert len(vendor.refreshes) == 1
    assert token_of(house, made) == {"generation": 2, "error": "", "state": "active"}


def test_renewed_tokens_of_every_kind_survive_a_crash(house_on: Sluice, key_on: str, prefix: str):
    """G7, Q3: where refresh tokens are replaced, the one before would not be taken again."""
    with ExitStack() as stack:
        vendors = [stack.enter_context(contextmanager(vendor_of)(kind)) for kind in KINDS]
        made = [add(house_on, vendor, f"{prefix}-{vendor.kind}") for vendor in vendors]

        def answers(vendor: Vendor) -> bool:
            return chat(house_on, key_on, f"{prefix}-{vendor.kind}", vendor).status_code == 200

        for vendor in vendors:
            if isinstance(vendor, Gemini):
                vendor.upstream.rotates = True
            vendor.end_tokens()
            assert answers(vendor)
            if isinstance(vendor, Gemini):  # the others do so by themselves
                vendor.upstream.dead.add(refresh_token_in(vendor.refreshes[0]))

        house_on.kill9()
        house_on.start_again()

        for vendor, credential in zip(vendors, made, strict=True):
            assert answers(vendor)
            assert len(vendor.refreshes) == 1, "the token that was renewed is in use"
            vendor.end_tokens()
            assert answers(vendor)
            used = [refresh_token_in(seen) for seen in vendor.refreshes]
            assert len(set(used)) == 2, "each refresh token was shown once"
            assert token_of(house_on, credential)["generation"] == 3


def test_a_refresh_token_that_is_not_replaced_goes_on(house: Sluice, key: str, gemini: Vendor, prefix: str):
    """G3: Google gives none with a renewal."""
    add(house, gemini, prefix)
    for _ in range(2):
        gemini.end_tokens()
        assert chat(house, key, prefix, gemini).status_code == 200
    assert len({refresh_token_in(seen) for seen in gemini.refreshes}) == 1


def test_a_renewal_that_fails_for_now_leaves_a_good_token_in_use(house: Sluice, key: str, vendor: Vendor, prefix: str):
    """G6, Q5: 503 twice; nothing is lost."""
    made = add(house, vendor, prefix, ends_in=120)
    vendor.token_endpoint_fails(2)
    for _ in range(2):
        house.manage("refresh_tokens", "--credential", str(made))
        assert chat(house, key, prefix, vendor).status_code == 200
    assert token_of(house, made) == {"generation": 1, "error": TROUBLE[vendor.kind], "state": "active"}

    vendor.token_endpoint_fails(0)
    house.manage("refresh_tokens", "--credential", str(made))
    assert token_of(house, made) == {"generation": 2, "error": "", "state": "active"}
    assert chat(house, key, prefix, vendor).status_code == 200


def test_no_nonsense_of_qwens_ends_a_sign_in(house: Sluice, key: str, qwen: Vendor, prefix: str):
    """Q5."""
    made = add(house, qwen, prefix, ends_in=120)
    for step, code in (("error_200", "server_error"), ("not_json", "unreadable"), ("html", "unreadable"), ("429", "rate_limited")):
        qwen.upstream.script_tokens(step)
        house.manage("refresh_tokens", "--credential", str(made))
        assert token_of(house, made) == {"generation": 1, "error": code, "state": "active"}
    assert chat(house, key, prefix, qwen).status_code == 200


def test_what_google_says_of_our_settings_ends_no_sign_in(house: Sluice, key: str, gemini: Vendor, prefix: str):
    """2.1: a wrong client id or form is for the operator to mend; no new sign-in would."""
    made = add(house, gemini, prefix, ends_in=120)
    for status, code in ((401, "invalid_client"), (400, "invalid_request")):
        gemini.upstream.token_errors = [(status, {"error": code})]
        house.manage("refresh_tokens", "--credential", str(made))
        assert token_of(house, made) == {"generation": 1, "error": code, "state": "active"}
    assert chat(house, key, prefix, gemini).status_code == 200


# The end of a sign-in


def test_a_sign_in_that_was_ended_gives_way_within_the_request(house_on: Sluice, key_on: str, vendor: Vendor, other: Vendor, prefix: str):
    """G5, Q5: and where no account is left, it is said who has to act."""
    second = add(house_on, other, prefix, label=f"{prefix}-second")
    first = add(house_on, vendor, prefix, label=f"{prefix}-first", priority=1)
    eventually(lambda: chat(house_on, key_on, prefix, vendor).status_code == 200 and vendor.calls, "the first account does not serve")
    vendor.end_sign_ins()
    served = len(other.calls)

    answer = chat(house_on, key_on, prefix, vendor)

    assert answer.status_code == 200
    assert len(other.calls) == served + 1
    assert house_on.row(answer.headers["x-request-id"])["credential"] == f"{prefix}-second"
    assert token_of(house_on, first) == {"generation": 1, "error": "invalid_grant", "state": "needs_reauth"}
    asked = len(vendor.upstream.posts)
    assert chat(house_on, key_on, prefix, vendor).status_code == 200
    assert len(vendor.upstream.posts) == asked, "it is not asked again"

    other.end_sign_ins()
    answer = chat(house_on, key_on, prefix, vendor)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_auth_failed")
    assert token_of(house_on, second)["state"] == "needs_reauth"

    vendor.upstream.reset()
    sign_in_again(house_on, vendor, first)
    answer = eventually(lambda: (found := chat(house_on, key_on, prefix, vendor)).status_code == 200 and found, "it does not come back")
    assert house_on.row(answer.headers["x-request-id"])["credential"] == f"{prefix}-first"


def test_a_new_token_that_is_refused_too_ends_the_sign_in_without_a_loop(house: Sluice, key: str, vendor: Vendor, prefix: str):
    """Q6: 401 for ever."""
    made = add(house, vendor, prefix)
    refused = [Step(scenario=vendor.refused)] * 2
    vendor.upstream.script(*refused)

    answer = chat(house, key, prefix, vendor)

    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_auth_failed")
    assert (len(vendor.refreshes), len(vendor.calls)) == (1, 2)
    assert token_of(house, made) == {"generation": 2, "error": "refused_upstream", "state": "needs_reauth"}
    assert chat(house, key, prefix, vendor).status_code == 502
    assert (len(vendor.refreshes), len(vendor.calls)) == (1, 2)


def test_a_session_that_qwen_calls_expired_is_renewed(house: Sluice, key: str, qwen: Vendor, prefix: str):
    """3.5: a 400 that says so is a 401."""
    add(house, qwen, prefix)
    qwen.upstream.script(Step(scenario="400-session"))
    assert chat(house, key, prefix, qwen).status_code == 200
    assert (len(qwen.refreshes), len(qwen.calls)) == (1, 2)


# Where the calls go, and whose they are


@pytest.mark.parametrize("written", ["{origin}", " {origin}/v1/ "])
def test_the_token_says_where_qwens_calls_go(house: Sluice, key: str, qwen: Vendor, prefix: str, written: str):
    """Q15, Q4: `resource_url` decides and not the base URL; a renewal that names none changes nothing, and another place holds at once."""
    qwen.upstream.resource_url = written.format(origin=qwen.upstream.origin)
    made = add(house, qwen, prefix)
    assert chat(house, key, prefix, qwen).status_code == 200
    qwen.upstream.script_tokens("no_resource_url")
    house.manage("refresh_tokens", "--credential", str(made))
    qwen.upstream.rotate = False  # from now on it gives no refresh token with a renewal
    house.manage("refresh_tokens", "--credential", str(made))
    assert chat(house, key, prefix, qwen).status_code == 200
    qwen.end_tokens()
    qwen.upstream.resource_url = f"{qwen.upstream.origin}/region"
    assert chat(house, key, prefix, qwen).status_code == 200

    # How many were refused depends on whether the server had heard of the renewals made beside it.
    *earlier, last = [seen.path for seen in qwen.calls]
    assert (set(earlier), last) == ({"/v1/chat/completions"}, "/region/v1/chat/completions")
    assert token_of(house, made) == {"generation": 4, "error": "", "state": "active"}


def test_no_token_of_qwens_goes_where_no_operator_would_send_it(house: Sluice, key: str, qwen: Vendor, prefix: str):
    with QwenUpstream() as elsewhere:
        qwen.upstream.resource_url = elsewhere.origin
        add(house, qwen, prefix)
        answer = chat(house, key, prefix, qwen)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreachable")
        assert elsewhere.log == []


def test_another_account_that_signs_in_is_met_without_what_was_learned_of_the_first(house: Sluice, key: str, gemini: Vendor, prefix: str):
    """Its project is found out anew: both would be taken, so nothing but forgetting brings the second one."""
    made = add(house, gemini, prefix)
    for _ in range(2):
        assert chat(house, key, prefix, gemini).status_code == 200
    assert [seen.json["project"] for seen in gemini.calls] == ["sim-project-1"] * 2
    assert len(gemini.upstream.asked("loadCodeAssist")) == 1

    gemini.upstream.project = "sim-project-2"
    sign_in_again(house, gemini, made)

    def project() -> str:
        assert chat(house, key, prefix, gemini).status_code == 200
        return str(gemini.calls[-1].json["project"])

    eventually(lambda: project() == "sim-project-2", "the first account's project is still in use")
    gemini.end_tokens()
    asked = len(gemini.upstream.asked("loadCodeAssist"))
    assert project() == "sim-project-2"
    assert len(gemini.upstream.asked("loadCodeAssist")) == asked, "a renewal is of the same account"


def test_no_token_is_in_the_log(house: Sluice):
    for token in ("qat-sim", "qrt-sim", "ya29.sim", "1//sim-refresh"):
        assert token not in house.log(), token
