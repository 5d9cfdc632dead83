"""Accounts that sign in, through a server that runs, on each database: renewed ahead and on demand, kept over a crash."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.conftest import postgres_database
from tests.serving import REPOSITORY, Sluice, eventually, free_port
from tests.upstreams.oauth_server import OAuthUpstream
from tests.upstreams.passport import file_of, installed_in


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def house(request: pytest.FixtureRequest, serve: Callable[..., Sluice], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sluice]:
    site = {"PYTHONPATH": installed_in(tmp_path_factory.mktemp("site"))}
    if request.param == "sqlite":
        yield serve(**site)
        return
    with postgres_database() as url:
        yield serve(DATABASE_URL=url, SECRET_KEY=secrets.token_hex(32), KEYRING=secrets.token_hex(32), **site)


@pytest.fixture
def vendor() -> Iterator[OAuthUpstream]:
    with OAuthUpstream() as upstream:
        yield upstream


def add(house: Sluice, vendor: OAuthUpstream, prefix: str, *, ended_seconds: float = -3600, priority: int = 0) -> int:
    """An account that is signed in, whose token ends so many seconds ago."""
    sets = [word for name, value in vendor.settings().items() for word in ("--set", f"{name}={value}")]
    options = ["--label", f"{prefix}-{priority}", "--prefix", prefix, "--base-url", vendor.base_url, "--priority", str(priority)]
    given = file_of(vendor.log_in(), time.time() - ended_seconds)
    made = int(house.manage("add_credential", "passport", *options, *sets, "--secret-stdin", stdin=given))
    house.wait_for(prefix)
    return made


def chat(house: Sluice, key: str, prefix: str) -> httpx.Response:
    body = {"model": f"{prefix}/gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
    return httpx.post(f"{house.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=30)


def row(house: Sluice, credential: int) -> dict[str, Any]:
    return json.loads(
        house.python(
            "import json; from providers.models import OAuthToken; "
            f"t = OAuthToken.objects.select_related('credential').get(pk={credential}); "
            "print(json.dumps({'generation': t.generation, 'error': t.last_error, 'state': t.credential.state}))"
        )
    )


def test_a_refused_token_is_renewed_once_for_twenty_requests_and_survives_kill_9(house: Sluice, vendor: OAuthUpstream):
    made, key = add(house, vendor, "trip"), house.issue_key()
    assert chat(house, key, "trip").status_code == 200
    assert vendor.posts[-1].headers["x-region"] == "eu"
    vendor.expire_access()

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: chat(house, key, "trip"), range(20)))
    assert [answer.status_code for answer in answers] == [200] * 20
    assert (vendor.counts.refreshes, vendor.counts.reused, row(house, made)["generation"]) == (1, 0, 2)

    house.kill9()
    house.start_again()
    assert chat(house, key, "trip").status_code == 200
    assert (vendor.counts.refreshes, vendor.counts.logins) == (1, 1)
    vendor.expire_access()
    assert chat(house, key, "trip").status_code == 200
    assert (vendor.counts.refreshes, vendor.counts.reused) == (2, 0)


def test_serve_renews_ahead_without_any_traffic(house: Sluice, vendor: OAuthUpstream):
    vendor.life_seconds = 3
    made = add(house, vendor, "sweep", ended_seconds=1)
    eventually(lambda: row(house, made)["generation"] >= 3, "the sweep does not renew", seconds=25)
    assert vendor.counts.reused == 0


def test_a_sign_in_that_was_ended_gives_way_to_the_next_account_and_comes_back_by_another(house: Sluice, vendor: OAuthUpstream):
    with OAuthUpstream() as other:
        second, key = add(house, other, "pool"), house.issue_key()
        first = add(house, vendor, "pool", priority=1)
        eventually(lambda: chat(house, key, "pool").status_code == 200 and vendor.posts, "the first account does not serve")
        vendor.revoke()
        served = len(other.posts)
        answer = chat(house, key, "pool")
        assert answer.status_code == 200
        assert len(other.posts) == served + 1
        assert house.row(answer.headers["x-request-id"])["credential"] == "pool-0"
        assert row(house, first) == {"generation": 1, "error": "invalid_grant", "state": "needs_reauth"}
        assert f"/admin/providers/credential/{first}/sign-in" in house.log()

        house.manage("refresh_tokens", "--credential", str(second))
        other.revoke()
        answer = chat(house, key, "pool")
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_auth_failed")

        def answers_by_snapshot() -> bool:
            answer = chat(house, key, "pool")
            assert answer.status_code == 502, answer.text
            return "signed in again" in answer.text

        eventually(answers_by_snapshot, "it is not said what is to be done")
        given = json.dumps(file_of(vendor.log_in()))
        house.python(
            "from providers import actions, registry; from providers.models import Credential; "
            f"actions.sign_in(Credential.objects.get(pk={first}), registry.adapter('passport').tokens_from({given}))"
        )
        answer = eventually(lambda: (found := chat(house, key, "pool")).status_code == 200 and found, "it does not come back")
        assert house.row(answer.headers["x-request-id"])["credential"] == "pool-1"


def test_login_in_a_terminal_takes_the_browser_that_comes_back_and_ends_cleanly(house: Sluice, vendor: OAuthUpstream):
    options = vendor.settings("code", redirect_uri=f"http://127.0.0.1:{free_port()}/back")
    sets = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "manage.py", "login", "passport", "--label", "login", "--prefix", "login", "--base-url", vendor.base_url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, *sets], cwd=REPOSITORY, env=house.env, text=True, **pipes) as login:
        link = next(line.strip() for line in login.stdout if line.startswith("  http"))
        assert httpx.get(vendor.browse(link)).status_code == 200
        said = login.stdout.read()
        assert (login.wait(20), login.stderr.read()) == (0, "")
    assert row(house, int(said.split()[-1]))["state"] == "active"
    house.wait_for("login")
    assert chat(house, house.issue_key(), "login").status_code == 200


def test_no_token_is_in_the_log(house: Sluice):
    assert "refresh-sim" not in house.log()
    assert "sk-sim-ok~access" not in house.log()
