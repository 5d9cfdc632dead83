"""How it is served: ready when it listens, alone on its folder, gone without a trace, and the same under Daphne."""

import signal
import subprocess
import sys
import time

import httpx
import pytest

from tests.serving import REPOSITORY, NotStarted, Sluice, eventually, free_port, running

ECHO = {"model": "demo/echo", "messages": [{"role": "user", "content": "hello"}]}

REVOKE = """
from accounts import actions
from accounts.models import ApiKey
actions.revoke_key(ApiKey.objects.get(name="revoke me"), actor=None)
"""


def ask(url: str, key: str, **body: object) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=ECHO | body, headers={"authorization": f"Bearer {key}"}, timeout=10)


def test_a_key_issued_beside_a_running_server_works_at_once_and_stops_within_five_seconds_when_revoked(tmp_path):
    with running(tmp_path) as house:
        house.manage("add_credential", "demo", "--label", "serve", "--prefix", "serve", "--secret-stdin")
        house.wait_for("serve")
        key = house.issue_key(name="revoke me")
        assert ask(house.url, key, model="serve/echo").status_code == 200
        house.python(REVOKE)
        began = time.monotonic()
        eventually(lambda: ask(house.url, key, model="serve/echo").status_code == 401, "a revoked key still works", seconds=5)
        assert time.monotonic() - began < 5


def test_a_second_server_on_the_same_folder_is_refused_in_words(sluice):
    other = Sluice(sluice.data_dir)
    with pytest.raises(NotStarted, match="Another process already serves"):
        other.start_again()
    other.close()


def test_a_wrong_keyring_is_refused_at_the_start(tmp_path):
    with running(tmp_path) as house:
        assert house.stop() == 0
        (house.data_dir / "keyring").write_text("another-keyring-of-forty-characters-or-more\n")
        with pytest.raises(NotStarted, match="KEYRING is not the one"):
            house.start_again()


def test_a_database_that_is_not_migrated_is_refused_in_words(tmp_path):
    house = Sluice(tmp_path / "data")
    with pytest.raises(NotStarted, match=r"manage\.py migrate"):
        house.start_again()
    house.close()


def test_a_clean_stop_exits_0_stores_all_and_leaves_no_journal(tmp_path):
    with running(tmp_path) as house:
        house.manage("bootstrap")
        house.wait_for("demo")
        key = house.issue_key()
        ids = [ask(house.url, key).headers["x-request-id"] for _ in range(5)]
        assert house.stop() == 0
        assert list((house.data_dir / "journal").iterdir()) == []
        assert [row["request_id"] for row in house.usage()] == ids


def test_a_running_stream_finishes_before_the_server_does(tmp_path):
    with running(tmp_path) as house:
        house.manage("bootstrap")
        house.wait_for("demo")
        key = house.issue_key()
        words = " ".join(str(number) for number in range(60))
        body = ECHO | {"stream": True, "messages": [{"role": "user", "content": words}]}
        with httpx.stream(
            "POST", f"{house.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=20
        ) as answer:
            events = answer.iter_bytes()
            next(events)
            house._server.send_signal(signal.SIGTERM)
            rest = b"".join(events)
        assert rest.endswith(b"data: [DONE]\n\n")
        assert house.stop() == 0
        assert [row["status"] for row in house.usage()] == [200]


def test_probes_answer_any_host_and_tell_alive_from_ready(sluice):
    for path in ("/healthz", "/readyz"):
        answer = httpx.get(f"{sluice.url}{path}", headers={"host": "somewhere.example"})
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_programs_and_people_get_different_front_doors(sluice):
    assert httpx.get(sluice.url).json() == {"status": "running"}
    page = httpx.get(sluice.url, headers={"accept": "text/html"})
    assert page.status_code == 200
    assert 'type="password"' in page.text


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "daphne", "-b", "127.0.0.1", "-p", "{port}", "project.asgi:application"],
        ["manage.py", "serve", "--server", "daphne", "--port", "{port}"],
        ["manage.py", "runserver", "--noreload", "{port}"],
    ],
)
def test_daphne_serves_the_same_application(tmp_path, command):
    house = Sluice(tmp_path / "data")
    house.migrate()
    house.manage("bootstrap")
    key = house.issue_key()
    port = free_port()
    with house.log_path.open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, *[word.format(port=port) for word in command]], cwd=REPOSITORY, env=house.env, stdout=log, stderr=log
        )
    try:
        url = f"http://127.0.0.1:{port}"

        def is_ready() -> bool:
            try:
                return httpx.get(f"{url}/readyz").status_code == 200
            except httpx.TransportError:
                return False

        eventually(is_ready, "Daphne did not become ready", seconds=20)
        assert ask(url, key).status_code == 200
        assert ask(url, key, stream=True).text.endswith("data: [DONE]\n\n")
        assert httpx.get(f"{url}/", headers={"accept": "text/html"}).status_code == 200
        eventually(lambda: len(house.usage()) == 2, "the rows are missing")
    finally:
        server.terminate()
        server.wait(10)
        house.close()


@pytest.mark.parametrize(("only", "v1", "pages"), [("gateway", 200, 404), ("web", 404, 200)])
def test_one_half_can_be_served_alone(tmp_path, only, v1, pages):
    house = Sluice(tmp_path / "data")
    house.migrate()
    key = house.issue_key()
    with house.log_path.open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "manage.py", "serve", "--port", str(house.port), "--only", only],
            cwd=REPOSITORY,
            env=house.env,
            stdout=log,
            stderr=log,
        )
    try:
        eventually(house.is_ready, "not ready", seconds=20)
        assert httpx.get(f"{house.url}/v1/models", headers={"x-api-key": key}).status_code == v1
        assert httpx.get(f"{house.url}/accounts/login/").status_code == pages
    finally:
        server.terminate()
        server.wait(10)
        house.close()
