"""What is measured: nginx and the gateway, each in front of the same mock upstream; and the mock upstream itself."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bench import machine
from bench.upstream import EVENTS
from tests.serving import REPOSITORY, Sluice, free_port

# One origin takes 1000 connections of the gateway, so 5000 open streams need some more of them.
ORIGINS = 6
OPEN_REQUESTS = 6000
# High enough never to refuse: what counts is that each is looked at, held and settled.
LIMITS: dict[str, object] = {"rpm": 900_000_000, "tpm": 900_000_000_000, "concurrency": 100_000}
BUDGET: dict[str, object] = {"budget": 1_000_000, "window": "month"}
START_SECONDS = 10.0

NGINX_CONF = """\
worker_processes 1;
worker_rlimit_nofile {files};
error_log {folder}/error.log warn;
pid {folder}/nginx.pid;
daemon off;
{user}
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_ssl_trusted_certificate {certificate};
    proxy_ssl_verify on;
    upstream mock {{ {servers} keepalive 1024; keepalive_requests 1000000000; }}
    upstream mock_tls {{ server 127.0.0.1:{tls}; keepalive 1024; keepalive_requests 1000000000; }}
    server {{ listen 127.0.0.1:{whole} backlog=8192; location / {{ proxy_pass http://mock; }} }}
    server {{ listen 127.0.0.1:{stream} backlog=8192; location / {{ proxy_pass http://mock; proxy_buffering off; }} }}
    server {{ listen 127.0.0.1:{secure} backlog=8192; location / {{ proxy_pass https://mock_tls; proxy_ssl_name 127.0.0.1; }} }}
}}
"""


class Missing(Exception):
    """Something that the benchmark needs is not here. The message is for the reader."""


@dataclass(frozen=True, slots=True)
class Mock:
    """The mock upstream, as it runs."""

    pid: int
    ports: list[int]
    tls_port: int
    certificate: Path


@dataclass(frozen=True, slots=True)
class Subject:
    """A process under test, or the mock upstream itself, called without anything in between."""

    name: str
    pid: int
    port: int
    stream_port: int
    tls_port: int
    key: str = ""

    def address(self, *, stream: bool = False, tls: bool = False) -> tuple[str, int]:
        return "127.0.0.1", self.tls_port if tls else self.stream_port if stream else self.port


@contextlib.contextmanager
def mock_upstream(folder: Path, core: int) -> Iterator[Mock]:
    certificate, key = make_certificate(folder)
    arguments = [sys.executable, "-m", "bench.upstream", str(ORIGINS), str(certificate), str(key)]
    with machine.on_core(core):
        process = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise Missing("The mock upstream did not start.")
        ports = json.loads(line)
        yield Mock(process.pid, ports["plain"], ports["tls"], certificate)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def nginx(folder: Path, core: int, mock: Mock) -> Iterator[Subject | None]:
    """A plain reverse proxy: keep-alive on both sides, nothing logged, streams unbuffered. None where there is no nginx."""
    program = find_nginx()
    if program is None:
        yield None
        return
    home = folder / "nginx"
    home.mkdir()
    whole, stream, secure = free_port(), free_port(), free_port()
    files = machine.raise_file_limit()
    config = home / "nginx.conf"
    config.write_text(
        NGINX_CONF.format(
            files=files,
            connections=min(files, 16_384),
            folder=home,
            user="user root;" if os.geteuid() == 0 else "",
            certificate=mock.certificate,
            servers=" ".join(f"server 127.0.0.1:{port};" for port in mock.ports),
            tls=mock.tls_port,
            whole=whole,
            stream=stream,
            secure=secure,
        )
    )
    with machine.on_core(core):
        process = subprocess.Popen([program, "-p", str(home), "-c", str(config), "-e", str(home / "error.log")])
    try:
        wait_for_port(secure)
        while not (workers := machine.children(process.pid)) and process.poll() is None:  # it listens first, and makes its worker then
            time.sleep(0.01)
        [worker] = workers
        yield Subject("nginx", worker, whole, stream, secure)
    finally:
        process.terminate()
        process.wait(10)


class Gateway:
    """A real `manage.py serve` on its core, over a fresh DATA_DIR. Every step of the trip is on, as it always is."""

    def __init__(self, folder: Path, core: int, mock: Mock, name: str = "gateway", *, journal: Path | None = None, **settings: str) -> None:
        """`journal`: keep it in this folder, on another file system than the rest."""
        self.name = name
        self.journal = journal
        self.core = core
        self.mock = mock
        self.sluice = Sluice(folder / name, **{"OPEN_REQUESTS": str(OPEN_REQUESTS), "UPSTREAM_REQUESTS": str(OPEN_REQUESTS), **settings})
        self.key = ""

    def __enter__(self) -> Gateway:
        self.sluice.data_dir.mkdir(mode=0o700)
        if self.journal is not None:
            (self.sluice.data_dir / "journal").symlink_to(self.journal)
        self.sluice.manage("migrate", "--no-input", "-v", "0")
        for number, port in enumerate(self.mock.ports):
            self._add(f"m{number}", f"http://127.0.0.1:{port}/v1")
        self._add("secure", f"https://127.0.0.1:{self.mock.tls_port}/v1", "--set", f"ca_pem={self.mock.certificate.read_text()}")
        self.sluice.manage("set_price", "*", "--input", "2.5", "--output", "10", "--cached", "1.25")
        self.key = self.issue_key(**LIMITS, **BUDGET)
        try:
            with machine.on_core(self.core):
                self.sluice.start_again(forked=False)  # whom a helper forks is on the helper's cores, and shares its memory
        except BaseException:
            self.sluice.close()
            raise
        return self

    def _add(self, prefix: str, base_url: str, *more: str) -> None:
        options = ["--label", prefix, "--prefix", prefix, "--base-url", base_url, *more, "--secret-stdin"]
        self.sluice.manage("add_credential", "openai", *options, stdin="sk-mock-upstream")

    def issue_key(self, **limits: object) -> str:
        return self.sluice.issue_key(email="bench@example.org", **limits)

    def subject(self, key: str = "") -> Subject:
        port = self.sluice.port
        return Subject(self.name, self.sluice.pid, port, port, port, key or self.key)

    def __exit__(self, *_: object) -> None:
        try:
            self.sluice.stop(timeout_seconds=60)
        finally:
            self.sluice.close()


def request(subject: Subject, kind: str, prefix: str = "m0") -> str:
    """A chat call of ordinary size, as a client's library sends it. All subjects are sent the same but for the key."""
    body: dict[str, object] = {
        "model": f"{prefix}/{kind}",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant. Answer in as few words as the question allows. " * 2},
            {"role": "user", "content": "Why does a gate in a stream let only so much water through, and who counts it? " * 4},
        ],
        "temperature": 0.7,
        "max_tokens": EVENTS,
        "stream": kind != "whole",
    }
    if kind != "whole":
        body["stream_options"] = {"include_usage": True}
    text = json.dumps(body, separators=(",", ":"))
    key = subject.key or "sk-sluice-not-looked-at-but-as-long-as-the-one-that-the-gateway-wants"
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{subject.port}\r\naccept: application/json\r\n"
        f"authorization: Bearer {key}\r\ncontent-type: application/json\r\nuser-agent: bench\r\n"
        f"content-length: {len(text)}\r\n\r\n{text}"
    )


def get(subject: Subject, path: str) -> str:
    """A call without a body."""
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{subject.port}\r\nauthorization: Bearer {subject.key}\r\nuser-agent: bench\r\n\r\n"


def find_nginx() -> str | None:
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        if time.monotonic() > deadline:
            raise Missing(f"Nothing listens on port {port} after {START_SECONDS:g} s.")
        time.sleep(0.02)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of the mock's own for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "mock.crt", folder / "mock.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return paths
