"""The transport against servers that others wrote: nginx and uvicorn."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from providers.egress import Egress, EgressRefused
from tests.proxies.calls import call, fetch, send, transport
from tests.proxies.certificates import Authority
from tests.serving import eventually, free_port

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
AUTHORITY = Authority()
BIG = b"".join(b"line %d\n" % number for number in range(200_000))

CONFIG = """
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; default_type text/plain;
    gzip on; gzip_types text/plain; gzip_min_length 100; keepalive_requests 20; keepalive_timeout 1s; client_max_body_size 1k;
    server {{
        listen 127.0.0.1:{port}; listen 127.0.0.1:{tls_port} ssl http2;
        ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.pem;
        location /hello {{
            add_header X-Requests $connection_requests; add_header X-Connection $connection; add_header X-Protocol $server_protocol;
            return 200 "hello";
        }}
        location /big {{ alias {folder}/big.txt; error_page 405 =200 /big; }}
        location /gone {{ return 444; }}
        location /moved {{ return 302 http://127.0.0.1:{port}/hello; }}
        location /forbidden {{ return 403; }}
    }}
}}
"""


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    if NGINX is None:
        pytest.skip("nginx is not installed")
    folder: Path = tmp_path_factory.mktemp("nginx")
    folder.chmod(0o755)
    (folder / "big.txt").write_bytes(BIG)
    (folder / "server.pem").write_bytes(AUTHORITY.server_pem("127.0.0.1"))
    port, tls_port = free_port(), free_port()
    (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, port=port, tls_port=tls_port))
    process = subprocess.Popen([NGINX, "-c", str(folder / "nginx.conf"), "-p", str(folder)], stderr=subprocess.PIPE)
    try:
        eventually(lambda: process.poll() is not None or listens(port), "nginx does not listen")
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        yield {"http": f"http://127.0.0.1:{port}", "https": f"https://127.0.0.1:{tls_port}"}
    finally:
        process.terminate()
        process.wait(10)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def get(url: str, path: str, *, http2: bool = False, **headers: str) -> Any:
    return call(url, path, method="GET", body=b"", headers=headers, ca_pem=AUTHORITY.pem, http2=http2)


@pytest.mark.nginx
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_nginx_serves_many_calls_on_few_connections_and_ends_them_when_it_likes(nginx: dict[str, Any], scheme: str):
    """It closes each connection after 20 requests."""
    seen: set[str] = set()
    async with transport() as via:
        for _ in range(100):
            answer = await send(via, get(nginx[scheme], "/hello"))
            assert (answer.status, await answer.read(100)) == (200, b"hello")
            seen.add(answer.headers["x-connection"])
            await answer.close()
    assert len(seen) == 5


@pytest.mark.nginx
async def test_nginx_is_spoken_to_in_http2_where_the_account_says_so(nginx: dict[str, Any]):
    """And nobody else's connections change with it, although both begin at the same authorities."""
    async with transport() as via:
        for http2, protocol in ((True, "HTTP/2.0"), (False, "HTTP/1.1"), (True, "HTTP/2.0")):
            answer = await send(via, get(nginx["https"], "/hello", http2=http2))
            assert (answer.status, await answer.read(100), answer.headers["x-protocol"]) == (200, b"hello", protocol)
            await answer.close()
        answer = await send(via, get(nginx["http"], "/hello", http2=True))  # nothing to agree on without TLS
        assert (await answer.read(100), answer.headers["x-protocol"]) == (b"hello", "HTTP/1.1")
        await answer.close()


@pytest.mark.nginx
async def test_http2_is_spoken_only_to_addresses_that_may_be_reached(nginx: dict[str, Any]):
    async with transport(egress=Egress()) as via:
        with pytest.raises(EgressRefused):
            await send(via, get(nginx["https"], "/hello", http2=True))


@pytest.mark.nginx
async def test_nginx_ends_free_connections_and_nobody_notices(nginx: dict[str, Any]):
    """It closes what is free after a second: on each round all connections have just died, or are about to."""
    async with transport() as via:
        for pause in (0.98, 1.0, 1.02):
            results = await asyncio.gather(*(fetch(via, get(nginx["http"], "/hello")) for _ in range(10)))
            assert results == [(200, b"hello")] * 10
            await asyncio.sleep(pause)


@pytest.mark.nginx
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("coding", ["identity", "gzip"])
async def test_nginx_sends_a_large_file_plain_and_packed(nginx: dict[str, Any], scheme: str, coding: str):
    async with transport() as via:
        for _ in range(3):
            answer = await send(via, get(nginx[scheme], "/big", **{"Accept-Encoding": coding}))
            assert answer.headers.get("content-encoding", "identity") == coding
            assert b"".join([chunk async for chunk in answer.chunks()]) == BIG
            await answer.close()


@pytest.mark.nginx
async def test_nginx_refuses_a_large_body_before_it_has_read_it(nginx: dict[str, Any]):
    async with transport() as via:
        for size in (2000, 5_000_000):
            status, _ = await fetch(via, call(nginx["http"], "/hello", body=b"x" * size))
            assert status == 413


@pytest.mark.nginx
async def test_nginx_hangs_up_without_a_word(nginx: dict[str, Any]):
    async with transport() as via:
        assert await fetch(via, get(nginx["http"], "/hello")) == (200, b"hello")
        for _ in range(3):
            with pytest.raises(httpx.RemoteProtocolError):
                await fetch(via, get(nginx["http"], "/gone"))
        assert (await fetch(via, get(nginx["http"], "/moved")))[0] == 302
        assert (await fetch(via, get(nginx["http"], "/forbidden")))[0] == 403


# uvicorn


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Echoes a body; `/stream` sends it back in pieces of 100 bytes, `/packed` compressed."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = [(b"x-path", scope["path"].encode()), (b"x-client", str(scope["client"][1]).encode())]
    if scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for at in range(0, len(body), 100):
            await send({"type": "http.response.body", "body": body[at : at + 100], "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    if scope["path"] == "/packed":
        body = gzip.compress(body)
        headers.append((b"content-encoding", b"gzip"))
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 201, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module", params=["httptools", "h11"])
def uvicorn_url(request: pytest.FixtureRequest) -> Iterator[str]:
    port = free_port()
    config = uvicorn.Config(app, port=port, http=request.param, lifespan="off", log_level="error", timeout_keep_alive=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started, "uvicorn does not start")
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("path", ["/echo", "/stream", "/packed"])
@pytest.mark.parametrize("size", [0, 1, 5000, 3_000_000])
async def test_uvicorn_echoes_bodies_of_all_sizes(uvicorn_url: str, path: str, size: int):
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[: min(size, 200_000) if path == "/stream" else size]
    clients = set()
    async with transport() as via:
        for _ in range(3):
            answer = await send(via, call(uvicorn_url, path, body=body))
            assert b"".join([chunk async for chunk in answer.chunks()]) == body
            clients.add(answer.headers["x-client"])
            await answer.close()
    assert len(clients) == 1


async def test_uvicorn_serves_many_at_once(uvicorn_url: str):
    async with transport(most_connections=8) as via:

        async def one(number: int) -> None:
            body = b"%d " % number * 500
            assert await fetch(via, call(uvicorn_url, "/stream" if number % 2 else "/echo", body=body)) == (
                200 if number % 2 else 201,
                body,
            )

        for _ in range(5):
            await asyncio.gather(*map(one, range(60)))
        [pool] = via._pools.values()
        assert pool.taken <= 8


async def test_uvicorn_ends_free_connections_and_nobody_notices(uvicorn_url: str):
    async with transport() as via:
        for pause in (0.98, 1.0, 1.02):
            await asyncio.gather(*(fetch(via, call(uvicorn_url, "/echo")) for _ in range(10)))
            await asyncio.sleep(pause)
        await asyncio.sleep(0.2)
        [pool] = via._pools.values()
        assert pool.taken == 0
