"""docker-compose.yml and the Dockerfile: read here, and their very commands run here, since there is no Docker where tests run."""

from __future__ import annotations

import contextlib
import http.server
import re
import shutil
import socket
import stat
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest

from project import env
from proxy.errors import Unavailable
from tests import compose
from tests.compose import Deployment
from tests.conftest import postgres_database
from tests.serving import REPOSITORY, eventually, free_port

FILE = compose.read()
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
OURS = {name for name, service in SERVICES.items() if service["image"] == "sluice:local"}
STAYS = set(SERVICES) - {"secrets", "init"}
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


# What is said


def test_whatever_is_ours_may_change_nothing_but_its_data_and_gains_no_rights():
    assert {"secrets", "init", "gateway", "web", "worker", "beat"} == OURS
    for name in OURS:
        service = SERVICES[name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_what_stays_has_a_health_check_and_waits_for_what_it_needs():
    for name in STAYS:
        assert SERVICES[name]["healthcheck"]["test"][0] == "CMD", name
        assert SERVICES[name]["restart"] == "unless-stopped", name
    for name in ("gateway", "web", "worker", "beat"):
        assert SERVICES[name]["depends_on"]["init"]["condition"] == "service_completed_successfully"
    for name, service in SERVICES.items():
        for needed, how in (service.get("depends_on") or {}).items():
            assert how["condition"] == ("service_healthy" if needed in STAYS else "service_completed_successfully"), (name, needed)


def test_every_variable_is_one_that_the_settings_know():
    known = {field.name.upper() for field in fields(env.Env)}
    for name in OURS:
        for variable in SERVICES[name].get("environment") or {}:
            assert variable.removesuffix("_FILE") in known | {"PGPASSFILE"}, (name, variable)


def test_no_secret_stands_in_the_file():
    for name, service in SERVICES.items():
        for variable, value in (service.get("environment") or {}).items():
            if re.search("SECRET|PASS|KEYRING|TOKEN", variable):
                assert str(value).startswith("/secrets/"), (name, variable)
    assert not re.search(r"://[^/\s]*:[^/\s@]+@", compose.FILE.read_text())


def test_a_drain_ends_before_docker_kills():
    defaults = env.read({})
    for name in ("gateway", "web"):
        delay = float(SERVICES[name]["environment"]["DRAIN_DELAY"])
        assert seconds(SERVICES[name]["stop_grace_period"]) > delay + defaults.drain_seconds + 10
    assert seconds(SERVICES["front"]["stop_grace_period"]) >= seconds(SERVICES["gateway"]["stop_grace_period"])


def test_only_the_front_is_reached_from_outside_and_it_meets_us_where_it_is_trusted():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["front"]
    assert FILE["networks"]["inside"]["internal"] is True
    [network] = FILE["networks"]["inside"]["ipam"]["config"]
    for name in ("gateway", "web"):
        assert set(SERVICES[name]["networks"]) & set(SERVICES["front"]["networks"]) == {"inside"}
        assert SERVICES[name]["environment"]["TRUSTED_PROXIES"] == network["subnet"]
    for name in ("postgres", "redis"):
        assert SERVICES[name]["networks"] == ["inside"]


def test_the_front_waits_longer_than_the_gateway_and_takes_as_large_a_body():
    text = (REPOSITORY / "deploy/nginx.conf").read_text()
    defaults = env.read({})
    assert int(re.findall(r"proxy_read_timeout (\d+)s", text)[0]) > defaults.total_seconds
    assert int(re.findall(r"client_max_body_size (\d+)m", text)[0]) << 20 > defaults.body_limit_bytes
    assert "proxy_buffering off;" in text
    assert "proxy_request_buffering off;" in text


def test_the_image_runs_as_nobody_and_has_what_its_commands_name():
    text = (REPOSITORY / "Dockerfile").read_text()
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["sluice"]
    assert text.count("\nFROM ") == 2
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--)(\S+) ", text, re.MULTILINE)
    for path in copied:
        assert (REPOSITORY / path).exists()
        assert f"!{path}" in ignored
    scripts = {word for service in SERVICES.values() for word in service.get("command") or [] if word.startswith("deploy/")}
    scripts |= set(re.findall(r'"(deploy/[^"]+)"', text))
    assert scripts
    assert all((REPOSITORY / script).is_file() for script in scripts)


def test_no_container_of_ours_makes_a_volume_without_a_name():
    """As Docker does for a volume of the image where nothing is mounted."""
    [volume] = re.findall(r"^VOLUME (\S+)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    for name in OURS:
        mounted = [one["target"] if isinstance(one, dict) else one.split(":")[1] for one in SERVICES[name]["volumes"]]
        assert volume in mounted, name


def test_the_reader_refuses_what_it_does_not_know(tmp_path: Path):
    for text in ("a: |\n  b\n", "a: 'b'\n", "a\n", "a:\n  b: 1\n   c: 2\n"):
        (tmp_path / "x.yml").write_text(text)
        with pytest.raises((compose.NotUnderstood, AssertionError)):
            compose.read(tmp_path / "x.yml")


# What is done


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """nginx's workers are another user, who must get in."""
    made = Path(tempfile.mkdtemp(prefix="sluice-compose-"))
    made.chmod(0o755)
    (made / "tmp").mkdir()
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with open_folder() as made:
        yield made


@pytest.fixture(scope="module")
def redis_url(folder: Path) -> Iterator[str]:
    import subprocess

    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server")
    port = free_port()
    words = [*SERVICES["redis"]["command"], "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    yield f"redis://127.0.0.1:{port}/0"
    server.terminate()
    server.wait(10)


@pytest.fixture(scope="module")
def deployment(folder: Path, redis_url: str) -> Iterator[Deployment]:
    if NGINX is None:
        pytest.skip("there is no nginx")
    with postgres_database(empty=True) as database_url:
        one = Deployment(folder, database_url, redis_url)
        try:
            for service in ("secrets", "init"):
                done = one.run(service)
                assert done.returncode == 0, done.stderr
                (folder / f"{service}.out").write_text(done.stdout)
            for service in ("gateway", "web", "worker", "beat"):
                one.start(service)
            one.start_front(NGINX)
            for service in ("gateway", "web"):
                eventually(lambda service=service: one.healthy(service), f"{service} is not healthy", seconds=60)
            yield one
        except AssertionError as problem:
            logs = "\n".join(f"--- {name}\n{one.said(name)}" for name in one.running)
            raise AssertionError(f"{problem}\n{logs}") from None
        finally:
            one.close()


@pytest.fixture(scope="module")
def key(deployment: Deployment) -> str:
    found = re.search(r"sk-sluice-\w+", (deployment.root / "init.out").read_text())
    assert found is not None, "the first start prints a key"
    return found[0]


@pytest.mark.postgres
@pytest.mark.nginx
@pytest.mark.redis
def test_secrets_are_made_once_and_only_their_owner_may_read_them(deployment: Deployment):
    folder = deployment.root / "secrets"
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(made) == {"secret_key", "keyring", "metrics_token", "postgres_password", "pgpass"}
    assert len(set(made.values())) == 5
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
    assert made["pgpass"].strip().endswith(made["postgres_password"].strip())
    assert deployment.run("secrets").returncode == 0
    assert {path.name: path.read_text() for path in folder.iterdir()} == made
    again = deployment.run("init")
    assert again.returncode == 0
    assert "sk-sluice-" not in again.stdout


@pytest.mark.postgres
@pytest.mark.nginx
@pytest.mark.redis
def test_worker_and_beat_do_the_scheduled_work_from_the_start(deployment: Deployment):
    for service in ("worker", "beat"):
        eventually(lambda service=service: deployment.healthy(service), f"{service}: {deployment.said(service)}", seconds=25)


@pytest.mark.postgres
@pytest.mark.nginx
@pytest.mark.redis
def test_the_doctor_finds_no_problem_and_streams_come_through_the_front_word_by_word(deployment: Deployment):
    done = deployment.run("gateway", "python", "manage.py", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the words of a stream come one by one" in done.stdout
    assert f"{deployment.url} is ready" in done.stdout
    assert re.search(r"ok +Celery", done.stdout)
    assert re.search(r"\d+ of \d+ connections are in use", done.stdout)


@pytest.mark.postgres
@pytest.mark.nginx
@pytest.mark.redis
def test_from_inside_calls_reach_the_front_by_its_name_and_pages_do_not(deployment: Deployment, key: str):
    """The doctor looks from inside, where the front is `front`; a page would put that name into the links of its mails."""
    inside = {"host": "front:8080"}
    models = httpx.get(f"{deployment.url}/v1/models", headers=inside | {"authorization": f"Bearer {key}"})
    assert models.status_code == 200
    assert httpx.get(f"{deployment.url}/accounts/password/reset/", headers=inside).status_code == 400
    given = compose.expanded(SERVICES["gateway"]["environment"]["ALLOWED_HOSTS"], {"ALLOWED_HOSTS": "sluice.example.org,127.0.0.1"})
    assert given == "sluice.example.org,127.0.0.1,front"


@pytest.mark.postgres
@pytest.mark.nginx
@pytest.mark.redis
def test_pages_come_from_the_web_process_and_calls_go_to_the_gateway(deployment: Deployment, key: str):
    page = httpx.get(deployment.url, headers={"accept": "text/html"})
    assert page.status_code == 200
    assert "Sign in" in page.text
    style = re.search(r'href="(/static/sluice/sluice[^"]*\.css)"', page.text)
    assert style is not None
    assert httpx.get(deployment.url + style[1]).status_code == 200
    assert httpx.get(deployment.url).json() == {"status": "running"}
    assert httpx.post(deployment.url, json={}).json()["error"]["code"] == "invalid_api_key"
    models = httpx.get(f"{deployment.url}/v1/models", headers={"authorization": f"Bearer {key}"})
    assert "demo/echo" in {model["id"] for model in models.json()["data"]}
    for service, path in (("web", "/v1/models"), ("gateway", "/keys/")):
        assert httpx.get(f"http://127.0.0.1:{deployment.ports[service]}{path}").status_code == 404


@pytest.mark.postgres
@pytest.mark.nginx
@pytest.mark.redis
def test_events_come_through_the_front_as_they_are_made(deployment: Deployment, key: str):
    body = {"model": "demo/echo-0.2", "stream": True, "messages": [{"role": "user", "content": "one two three four five six"}]}
    headers = {"authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{deployment.url}/v1/chat/completions", json=body, headers=headers, timeout=30) as answer:
        assert answer.status_code == 200
        moments = [time.monotonic() for _ in answer.iter_raw()]
    assert len(moments) >= 6
    assert moments[-1] - moments[0] > 0.6


@pytest.mark.postgres
@pytest.mark.nginx
@pytest.mark.redis
def test_the_front_shows_no_metrics_and_lets_nobody_say_where_they_are(deployment: Deployment):
    assert httpx.get(f"{deployment.url}/metrics").status_code == 404
    token = (deployment.root / "secrets/metrics_token").read_text().strip()
    request = urllib.request.Request(f"http://127.0.0.1:{deployment.ports['gateway']}/metrics")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=5)
    request.add_header("authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=5) as page:
        assert b"sluice_ready 1" in page.read()
    code = (
        "from accounts import actions; from accounts.models import User; u=User.objects.get(is_superuser=True); "
        "print(actions.issue_key(organization=actions.ensure_organization(), user=u, name='far', networks=['203.0.113.0/24'])[1])"
    )
    far = deployment.run("gateway", "python", "manage.py", "shell", "--no-imports", "-c", code).stdout.strip()
    said = httpx.get(f"{deployment.url}/v1/models", headers={"authorization": f"Bearer {far}", "x-forwarded-for": "203.0.113.9"})
    assert said.json()["error"]["code"] == "ip_not_authorized"


class Ailing(http.server.BaseHTTPRequestHandler):
    """A gateway that answers, if only that it cannot."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(503)
        self.send_header("retry-after", "7")
        self.end_headers()
        self.wfile.write(b"my own word")

    def log_message(self, *said: object) -> None:
        pass


@pytest.mark.nginx
def test_a_program_is_told_in_its_own_language_that_no_gateway_answers():
    if NGINX is None:
        pytest.skip("there is no nginx")
    with open_folder() as alone:
        one = Deployment(alone, "", "")
        gateway = http.server.ThreadingHTTPServer(("127.0.0.1", one.ports["gateway"]), Ailing)
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        try:
            one.start_front(NGINX)
            eventually(lambda: is_heard(one.ports["front"]), "the front does not listen")
            answers = httpx.post(f"{one.url}/v1/chat/completions", json={"model": "x" * 100_000})
            assert (answers.status_code, answers.headers["retry-after"], answers.text) == (503, "7", "my own word")
            gateway.shutdown()
            gateway.server_close()
            for path in ("/v1/chat/completions", "/v1/models", "/compat/v1/models"):
                away = httpx.post(f"{one.url}{path}", json={"model": "x" * 100_000})
                assert (away.status_code, away.headers["content-type"], away.headers["retry-after"]) == (502, "application/json", "1")
                ours = Unavailable("No gateway answers. Try again in a moment.").body()
                assert away.json() == ours
            assert "html" in httpx.get(f"{one.url}/keys/").headers["content-type"]
        finally:
            gateway.server_close()
            one.close()


def is_heard(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.postgres
@pytest.mark.nginx
@pytest.mark.redis
def test_zz_what_serves_ends_in_order(deployment: Deployment):
    for service in ("gateway", "web", "beat", "worker"):
        assert deployment.stop(service) == 0, deployment.said(service)
