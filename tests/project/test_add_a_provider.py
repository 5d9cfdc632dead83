"""docs/add-a-provider.md does what it says: its samples, as outside packages, serve calls of a running Sluice."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from project.env import REPOSITORY
from providers.adapter import Adapter
from tests.providers.test_every_adapter import CHECKS, FIXTURES, Recorded
from tests.serving import Sluice
from tests.upstreams.openai import OpenAIUpstream

PAGE = (REPOSITORY / "docs/add-a-provider.md").read_text()
SAMPLES = dict(re.findall(r"<!-- sample: (\S+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
ENTRY_POINT = re.search(r'^\[project\.entry-points\."(.+)"\]\nacme = "(.+)"$', PAGE, re.MULTILINE)


class ParrotCage(BaseHTTPRequestHandler):
    """The provider with a dialect of its own. The voice `coward` flies away in the middle of the second word."""

    asked: ClassVar[list[dict[str, Any]]] = []
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).asked.append({"path": self.path, "key": self.headers["authorization"], **asked})
        words = asked["text"].split()
        lines = [{"word": word} for word in words] + [{"heard": len(words) + 1, "said": len(words)}]
        said = "".join(json.dumps(line) + "\n" for line in lines).encode()
        if asked["voice"] == "coward":
            said = said[: said.index(b"\n") + 5]
        self.send_response(200)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def parrot() -> Iterator[str]:
    """The address of the parrot's server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), ParrotCage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def installed(serve: Callable[..., Sluice], tmp_path_factory: pytest.TempPathFactory) -> Sluice:
    """A Sluice beside which the samples are installed as packages, found by their entry points."""
    site = tmp_path_factory.mktemp("site")
    assert ENTRY_POINT is not None
    group, acme = ENTRY_POINT.groups()
    for file, text in SAMPLES.items():
        (site / file).write_text(text)
    record = site / "sluice_samples-1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: sluice-samples\nVersion: 1\n")
    (record / "entry_points.txt").write_text(f"[{group}]\nacme = {acme}\nparrot = sluice_parrot:Parrot\n")
    return serve(PYTHONPATH=str(site))


def chat(sluice: Sluice, key: str, model: str, text: str, **more: object) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    return httpx.post(f"{sluice.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=30)


def events_of(answer: httpx.Response) -> list[Any]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def sample(name: str, tmp_path: Path) -> Adapter:
    """The adapter of one sample, without a server around it."""
    file = tmp_path / f"sluice_{name}.py"
    file.write_text(SAMPLES[file.name])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    adapter = getattr(module, name.capitalize())()
    assert isinstance(adapter, Adapter)
    return adapter


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_samples_do_what_every_adapter_must(check: Callable[[Recorded], None], tmp_path: Path) -> None:
    acme = FIXTURES / "openai"
    check(Recorded(sample("acme", tmp_path), (acme / "hello.stream").read_bytes(), (acme / "hello.whole").read_bytes()))
    [words] = re.findall(r"<!-- recording -->\n```[a-z ]+\n(.*?)```", PAGE, re.DOTALL)
    check(Recorded(sample("parrot", tmp_path), words.encode(), words.encode()))


def test_the_page_has_both_samples() -> None:
    assert set(SAMPLES) == {"sluice_acme.py", "sluice_parrot.py"}


def test_a_vendor_that_speaks_openai_is_a_name_and_an_address(installed: Sluice, upstream: OpenAIUpstream) -> None:
    added = ["add_credential", "acme", "--label", "Acme", "--base-url", upstream.base_url, "--set", "region=us", "--secret-stdin"]
    installed.manage(*added, stdin="sk-sim-ok")
    installed.wait_for("acme")

    answer = chat(installed, installed.issue_key(), "acme/gpt-4o", "hello there")
    assert answer.status_code == 200, answer.text
    assert "hello there" in answer.json()["choices"][0]["message"]["content"]
    assert upstream.calls(answer.headers["x-request-id"])[-1].headers["x-acme-region"] == "us"
    row = installed.row(answer.headers["x-request-id"])
    assert (row["provider"], row["credential"], row["served_model"]) == ("acme", "Acme", "acme/gpt-4o")
    assert row["usage_source"] == "reported"


def test_a_vendor_with_a_dialect_of_its_own_answers_whole_and_in_a_stream(installed: Sluice, parrot: str) -> None:
    installed.manage("add_credential", "parrot", "--label", "Polly", "--base-url", parrot, "--secret-stdin", stdin="cracker")
    installed.wait_for("parrot")
    key = installed.issue_key()

    whole = chat(installed, key, "parrot/grey", "pretty bird")
    assert whole.status_code == 200, whole.text
    assert whole.json()["choices"][0]["message"]["content"] == "pretty bird"
    assert ParrotCage.asked[-1] == {"path": "/speak", "key": "Bearer cracker", "voice": "grey", "text": "pretty bird"}

    streamed = chat(installed, key, "parrot/grey", "pretty bird", stream=True)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events_of(streamed)) == "pretty bird"
    assert streamed.text.endswith("data: [DONE]\n\n")

    for answer in (whole, streamed):
        row = installed.row(answer.headers["x-request-id"])
        assert (row["input_tokens"], row["output_tokens"], row["usage_source"], row["status"]) == (3, 2, "reported", 200)

    cut_off = chat(installed, key, "parrot/coward", "pretty bird", stream=True)
    assert events_of(cut_off)[-1]["error"]["code"] == "upstream_bad_response"
    assert "[DONE]" not in cut_off.text
