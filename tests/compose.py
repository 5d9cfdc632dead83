"""docker-compose.yml as data, and its services as processes on this machine: the same commands, with other hosts, ports and folders.

There is no YAML reader among our requirements; this one knows the little that the file uses, and refuses what it does not know.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.serving import REPOSITORY, free_port

FILE = REPOSITORY / "docker-compose.yml"


class NotUnderstood(AssertionError):
    """The file uses more of YAML than this reader knows."""


def read(path: Path = FILE) -> dict[str, Any]:
    lines = [
        (len(line) - len(line.lstrip()), line.strip()) for line in path.read_text().splitlines() if line.strip() and line.lstrip()[0] != "#"
    ]
    value, rest = _block(lines, {})
    assert not rest
    return value


def _block(lines: list[tuple[int, str]], anchors: dict[str, Any]) -> tuple[Any, list[tuple[int, str]]]:
    """What stands at the indentation of the first line, and the lines behind it."""
    depth = lines[0][0]
    if lines[0][1].startswith("- "):
        items = []
        while lines and lines[0][0] == depth and lines[0][1].startswith("- "):
            text = lines[0][1][2:]
            if re.match(r"^[A-Za-z_]+: ", text):
                value, lines = _block([(depth + 2, text), *lines[1:]], anchors)
            else:
                value, lines = _scalar(text), lines[1:]
            items.append(value)
        return items, lines
    found: dict[str, Any] = {}
    while lines and lines[0][0] == depth:
        key, colon, text = lines[0][1].partition(":")
        if not colon or (text and not text.startswith(" ")):
            raise NotUnderstood(lines[0][1])
        text, anchor = text.strip(), ""
        if text.startswith("&"):
            anchor, _, text = text[1:].partition(" ")
        rest = lines[1:]
        if key == "<<":
            found = {**anchors[text.removeprefix("*")], **found}
            lines = rest
            continue
        if text:
            value = _scalar(text)
        elif rest and rest[0][0] > depth:
            value, rest = _block(rest, anchors)
        else:
            value = None
        found[key.strip()] = value
        if anchor:
            anchors[anchor] = value
        lines = rest
    if lines and lines[0][0] > depth:
        raise NotUnderstood(lines[0][1])
    return found, lines


def _scalar(text: str) -> Any:
    if text[0] in '["{':
        return json.loads(text)
    if text[0] in "&*|>!'@`%":
        raise NotUnderstood(text)
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdigit() else text


def expanded(text: str, environment: Mapping[str, str]) -> str:
    """`${NAME:-default}`, as Compose fills it in."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: environment.get(found[1]) or found[2], text)


@dataclass
class Deployment:
    """The services of the file as processes here."""

    root: Path
    database_url: str
    redis_url: str
    file: dict[str, Any] = field(default_factory=read)
    ports: dict[str, int] = field(default_factory=lambda: {name: free_port() for name in ("gateway", "web", "front")})
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['front']}"

    def here(self, service: str, text: str) -> str:
        """The same on this machine."""
        swaps = {
            "postgres://sluice@postgres:5432/sluice": self.database_url,
            "redis://redis:6379/0": self.redis_url,
            "/secrets": str(self.root / "secrets"),
            "/tmp": str(self.root / "tmp"),
            "172.30.53.0/24": "127.0.0.0/8",
            "0.0.0.0": "127.0.0.1",
        }
        # In one pass: what is put in may hold what is looked for.
        text = re.sub("|".join(map(re.escape, swaps)), lambda found: swaps[found[0]], text)
        text = str(self.root / "data") if text == "/data" else text
        return str(self.ports[service]) if text == "8000" else text.replace(":8000", f":{self.ports.get(service, 0)}")

    def environment(self, service: str) -> dict[str, str]:
        said = self.file["services"][service].get("environment") or {}
        given = {"PUBLIC_URL": self.url}
        there = {name: expanded(str(value), given) for name, value in said.items()}
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return {**kept, "PYTHONUNBUFFERED": "1", **{name: self.here(service, value) for name, value in there.items()}, "DRAIN_DELAY": "0"}

    def command(self, service: str, words: list[str] | None = None) -> list[str]:
        words = [self.here(service, word) for word in words or self.file["services"][service]["command"]]
        program = {"python": sys.executable, "celery": str(Path(sys.executable).with_name("celery"))}.get(words[0], words[0])
        return [program, *words[1:]]

    def run(self, service: str, *more: str) -> subprocess.CompletedProcess[str]:
        """A service that ends by itself, or with `more` another command in its place."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            self.command(service, list(more) or None),
            cwd=REPOSITORY,
            env={**self.environment(service), "PATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def start(self, service: str) -> None:
        words = self.command(service)
        with self.log(service).open("ab") as log:
            self.running[service] = subprocess.Popen(
                words, cwd=REPOSITORY, env=self.environment(service), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def start_front(self, nginx: str) -> None:
        """The front proxy, by the configuration that the file mounts."""
        folder = self.root / "nginx"
        folder.mkdir()
        text = (REPOSITORY / "deploy/nginx.conf").read_text()
        for service in ("gateway", "web"):
            assert f"server {service}:8000 max_fails=0 resolve;" in text
            text = text.replace(f"server {service}:8000 max_fails=0 resolve;", f"server 127.0.0.1:{self.ports[service]} max_fails=0;")
        text = text.replace("listen 8080;", f"listen 127.0.0.1:{self.ports['front']};").replace("/tmp/", f"{folder}/")
        (folder / "nginx.conf").write_text(text)
        shutil.copy("/etc/nginx/mime.types", folder)
        with self.log("front").open("ab") as log:
            self.running["front"] = subprocess.Popen(
                [nginx, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log"), "-g", "daemon off;"],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def healthy(self, service: str) -> bool:
        """What the file's own health check says."""
        kind, *words = self.file["services"][service]["healthcheck"]["test"]
        assert kind == "CMD"
        return self.run(service, *words).returncode == 0

    def log(self, service: str) -> Path:
        return self.root / f"{service}.log"

    def said(self, service: str) -> str:
        return self.log(service).read_text()[-4000:]

    def stop(self, service: str) -> int:
        process = self.running.pop(service)
        process.terminate()
        return process.wait(30)

    def close(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait(10)
        self.running.clear()
