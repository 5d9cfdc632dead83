"""The whole way of somebody who comes from one of the small proxies: their file is imported beside a running server, and their
own curl lines go on working, unchanged."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import CommandFailed, Sluice, eventually
from tests.upstreams.openai import MODELS, OpenAIUpstream

VALID_API_KEY = "my-old-proxy-key-7"
HELLO = [{"role": "user", "content": "Hello there"}]
# A stand-in for the kind, where this checkout has none: an import is told of its name and settings alone.
AGENTS = """
from providers.adapter import OpenAICompatible
from providers.wire import encode_json


class CodeGPT(OpenAICompatible):
    name = "codegpt"
    base_url = "https://api.codegpt.example/v1"
    settings = frozenset({"agent_id", "org_id"})
    endpoints = frozenset({"chat/completions"})

    def models_request(self, target):
        return None

    def request(self, ask, target):
        headers = {**self.headers(target), "X-Agent": target.settings["agent_id"], "X-Request-ID": ask.request_id}
        return target.post("/chat/completions", headers, encode_json({**ask.body, "model": "agents"}))
"""


@pytest.fixture(scope="module")
def openai() -> Iterator[OpenAIUpstream]:
    with OpenAIUpstream(models=MODELS) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def agents() -> Iterator[OpenAIUpstream]:
    with OpenAIUpstream(models=("agents",)) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def moved(
    serve: Callable[..., Sluice], openai: OpenAIUpstream, agents: OpenAIUpstream, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sluice, Path, list[str]]:
    """A server that ran when the file was imported; the file, and what was said."""
    site = tmp_path_factory.mktemp("site")
    (site / "sluice_agents.py").write_text(AGENTS)
    record = site / "sluice_agents-1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: sluice-agents\nVersion: 1\n")
    (record / "entry_points.txt").write_text("[sluice.adapters]\ncodegpt = sluice_agents:CodeGPT\n")
    sluice = serve(PYTHONPATH=str(site))
    file = site / ".env"
    file.write_text(
        f"CODEGPT_API_KEY=sk-sim-ok~agents\nCODEGPT_AGENT_ID=agent-1\nCODEGPT_ORG_ID=org-1\nCODEGPT_API_URL={agents.base_url}/chat/completions\n"
        f"VALID_API_KEY={VALID_API_KEY}\nOPENAI_API_KEY=sk-sim-ok~house\nOPENAI_BASE_URL={openai.base_url}\n"
    )
    said = sluice.manage("import_config", str(file)).splitlines()
    sluice.wait_for("codegpt", "openai")
    return sluice, file, said


def curl(url: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The line as it stands in a README."""
    if shutil.which("curl") is None:
        headers = dict(header.split(": ", 1) for flag, header in pairwise(arguments) if flag == "-H")
        answer = httpx.post(url, headers=headers, content=arguments[-1], timeout=20)
        return answer.status_code, answer.json()
    done = subprocess.run(["curl", "-sS", "-w", "\n%{http_code}", url, *arguments], capture_output=True, text=True, timeout=30, check=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


def test_what_was_made_is_said_and_no_secret_is(moved: tuple[Sluice, Path, list[str]]) -> None:
    sluice, _, said = moved

    assert [line.split(":")[0] for line in said] == ["made", "made", "made", "made"]
    assert not any(secret in "\n".join(said) for secret in (VALID_API_KEY, "sk-sim-ok"))
    assert VALID_API_KEY not in sluice.log()


def test_the_agents_own_curl_line(moved: tuple[Sluice, Path, list[str]], agents: OpenAIUpstream) -> None:
    sluice, _, _ = moved
    body = {"model": "claude-4-sonnet-thinking-max", "messages": HELLO, "stream": False}
    status, answer = curl(
        f"{sluice.url}/v1/chat/completions", "-X", "POST", "-H", "Content-Type: application/json", "-H",
        f"Authorization: Bearer {VALID_API_KEY}", "-d", json.dumps(body),
    )  # fmt: skip

    assert status == 200, answer
    assert "Hello there" in answer["choices"][0]["message"]["content"]
    assert agents.last.headers["x-agent"] == "agent-1"
    assert agents.last.headers["authorization"] == "Bearer sk-sim-ok~agents"
    rows = eventually(sluice.usage, "no usage row")
    assert (rows[-1]["model"], rows[-1]["provider"], rows[-1]["key"]) == ("claude-4-sonnet-thinking-max", "codegpt", "VALID_API_KEY")


def test_the_workers_own_curl_line(moved: tuple[Sluice, Path, list[str]], openai: OpenAIUpstream) -> None:
    sluice, _, _ = moved
    # Its list is asked for soon; until then the name belongs to nobody, and the catch-all would take it.
    sluice.manage("refresh_models")
    eventually(lambda: _serves_gpt(sluice), "gpt-3.5-turbo is not known", seconds=10)
    status, answer = curl(
        f"{sluice.url}/", "-X", "POST", "-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {VALID_API_KEY}", "-d",
        json.dumps({"model": "gpt-3.5-turbo", "messages": HELLO}),
    )  # fmt: skip

    assert status == 200, answer
    assert openai.last.json["model"] == "gpt-3.5-turbo"
    assert openai.last.json["max_tokens"] == 1000


def _serves_gpt(sluice: Sluice) -> bool:
    listed = httpx.get(f"{sluice.url}/v1/models", headers={"authorization": f"Bearer {VALID_API_KEY}"}).json()["data"]
    return "openai/gpt-3.5-turbo" in {one["id"] for one in listed}


def test_the_workers_header_brings_a_key_of_ones_own_to_openai_alone(
    moved: tuple[Sluice, Path, list[str]], openai: OpenAIUpstream, agents: OpenAIUpstream
) -> None:
    sluice, _, _ = moved
    agents.reset()
    status, answer = curl(
        f"{sluice.url}/", "-X", "POST", "-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {VALID_API_KEY}", "-H",
        "x-openai-key: sk-sim-ok~mine", "-d", json.dumps({"model": "sim-ok-unlisted", "messages": HELLO}),
    )  # fmt: skip

    assert openai.last.headers["authorization"] == "Bearer sk-sim-ok~mine"
    assert openai.last.json["model"] == "sim-ok-unlisted"
    assert agents.posts == []
    assert status == 200, answer


def test_other_keys_do_not_open_it(moved: tuple[Sluice, Path, list[str]]) -> None:
    sluice, _, _ = moved
    for key in (VALID_API_KEY[:-1], VALID_API_KEY.upper(), f"{VALID_API_KEY}7", "x"):
        answer = httpx.get(f"{sluice.url}/v1/models", headers={"authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_key_of_a_few_characters_works_too(moved: tuple[Sluice, Path, list[str]]) -> None:
    sluice, file, _ = moved
    short = file.with_name("short.env")
    short.write_text("VALID_API_KEY=abc\n")
    assert "THIS KEY IS WEAK" in sluice.manage("import_config", str(short))

    headers = {"authorization": "Bearer abc"}
    eventually(lambda: httpx.get(f"{sluice.url}/v1/models", headers=headers).status_code == 200, "the key does not work", seconds=10)


def test_a_second_run_changes_nothing(moved: tuple[Sluice, Path, list[str]]) -> None:
    sluice, file, _ = moved
    said = sluice.manage("import_config", str(file)).splitlines()

    assert [line.split(":")[0] for line in said] == ["unchanged"] * 4


def test_a_file_that_is_refused_makes_the_command_fail(moved: tuple[Sluice, Path, list[str]]) -> None:
    sluice, file, _ = moved
    config = file.with_name("config.json")
    config.write_text(json.dumps({"codegeex": [{"token": ""}]}))
    with pytest.raises(CommandFailed, match="1 were refused"):
        sluice.manage("import_config", str(config))


def test_the_running_server_explains_with_what_is_in_its_memory(moved: tuple[Sluice, Path, list[str]]) -> None:
    """Through the API of the server, signed in; and by the command, which knows the database alone."""
    sluice, _, _ = moved
    key = int(sluice.python("from accounts.models import ApiKey; print(ApiKey.objects.get(name='VALID_API_KEY', last_four='ey-7').pk)"))
    said = sluice.manage("explain", "--key", str(key), "--model", "anything-at-all")
    assert "=> 200: credential" in said
    assert "(codegpt) is asked for codegpt/default" in said

    sluice.python("from accounts.models import User; User.objects.create_superuser('olga@example.org', 'a-long-password-8')")
    with httpx.Client(base_url=sluice.url, follow_redirects=True) as browser:
        browser.get("/accounts/login/")
        signed_in = browser.post(
            "/accounts/login/",
            data={"login": "olga@example.org", "password": "a-long-password-8", "csrfmiddlewaretoken": browser.cookies["csrftoken"]},
            headers={"referer": f"{sluice.url}/accounts/login/"},
        )
        assert signed_in.status_code == 200
        answer = browser.get("/api/explain", params={"key": key, "model": "anything-at-all"}).json()
    assert (answer["live"], answer["status"], answer["serves"]["model"]) == (True, 200, "codegpt/default")
    assert all(rule["passes"] for rule in answer["rules"])
