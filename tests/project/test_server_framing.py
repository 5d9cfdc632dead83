"""Where one request ends and the next begins: what is refused, what is served, and that nobody can hide one in another."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project.raw_http import Peer, Small, chat, echo, request, small
from tests.serving import Sluice, eventually, free_port
from tests.upstreams.openai import OpenAIUpstream

HIDDEN = b"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(scope="module")
def door() -> Iterator[Small]:
    with small(echo) as server:
        yield server


def head(*lines: str, first: str = "POST /one HTTP/1.1", host: str = "Host: 127.0.0.1") -> bytes:
    return "\r\n".join([first, *([host] if host else []), *lines, "", ""]).encode("latin-1")


SMUGGLED = {
    "two lengths": head("Content-Length: 3", "Content-Length: 4") + b"abcd",
    "the same length twice": head("Content-Length: 3", "Content-Length: 3") + b"abc",
    "a list of lengths": head("Content-Length: 3, 3") + b"abc",
    "length with a sign": head("Content-Length: +3") + b"abc",
    "length below zero": head("Content-Length: -3") + b"abc",
    "length in hex": head("Content-Length: 0x3") + b"abc",
    "length without a number": head("Content-Length: ") + b"abc",
    "length, then coding": head("Content-Length: 6", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "coding, then length": head("Transfer-Encoding: chunked", "Content-Length: 6") + b"0\r\n\r\n",
    "unknown coding": head("Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "coding before chunked": head("Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    "coding after chunked": head("Transfer-Encoding: chunked, identity") + b"0\r\n\r\n",
    "chunked twice": head("Transfer-Encoding: chunked", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "chunked and identity": head("Transfer-Encoding: chunked", "Transfer-Encoding: identity") + b"0\r\n\r\n",
    "coding behind a control": head("Transfer-Encoding: \x0bchunked") + b"0\r\n\r\n",
    "space before the colon": head("Transfer-Encoding : chunked") + b"0\r\n\r\n",
    "HTTP/1.0 with a coding": head("Transfer-Encoding: chunked", first="POST /one HTTP/1.0") + b"0\r\n\r\n",
    "folded line": head("X-One: a", " Content-Length: 3") + b"abc",
    "folded first line": head(" X-One: a"),
    "bare LF after the first line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "bare LF after a field": b"GET / HTTP/1.1\r\nHost: a\nX-One: b\r\n\r\n",
    "bare LF at the end": b"GET / HTTP/1.1\r\nHost: a\r\n\n",
    "bare CR in a field": b"GET / HTTP/1.1\r\nHost: a\rX-One: b\r\n\r\n",
    "NUL in a field": head("X-One: a\0b"),
    "field without a name": head(": a"),
    "field without a colon": head("X-One"),
    "bare LF after a chunk's size": head("Transfer-Encoding: chunked") + b"3\nabc\r\n0\r\n\r\n",
    "chunk longer than it says": head("Transfer-Encoding: chunked") + b"3\r\nabcXX0\r\n\r\n",
    "chunk size with 0x": head("Transfer-Encoding: chunked") + b"0x3\r\nabc\r\n0\r\n\r\n",
    "chunk size below zero": head("Transfer-Encoding: chunked") + b"-3\r\nabc\r\n0\r\n\r\n",
    "chunk size beyond all": head("Transfer-Encoding: chunked") + b"fffffffffffffffff\r\nabc\r\n",
    "unknown method": head(first="FOO / HTTP/1.1"),
    "a tunnel with a body, which the parser leaves out": head(f"Content-Length: {len(HIDDEN)}", first="CONNECT /one HTTP/1.1") + HIDDEN,
    "a tunnel by a whole URL": head(f"Content-Length: {len(HIDDEN)}", first="CONNECT http://127.0.0.1/one HTTP/1.1") + HIDDEN,
    "a tunnel with chunks": head("Transfer-Encoding: chunked", first="CONNECT /one HTTP/1.1") + b"0\r\n\r\n",
    "method in small letters": head(first="post / HTTP/1.1"),
    "two hosts": head("Host: other"),
    "no host": head(host=""),
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_B04_what_can_be_read_in_two_ways_is_refused_and_the_connection_closed(door: Small, name: str) -> None:
    with Peer(door.port) as peer:
        answer = peer.send(SMUGGLED[name] + HIDDEN).answer()
        assert answer.status == 400
        assert answer.error["type"] == "invalid_request_error"
        assert answer.error["code"] == "invalid_http"
        assert len(answer.headers["x-request-id"]) == 36
        assert answer.headers["connection"] == "close"
        assert peer.rest() == b""


@pytest.mark.parametrize("version", ["0.9", "2.0"])
def test_B04_other_versions_of_http_are_refused(door: Small, version: str) -> None:
    with Peer(door.port) as peer:
        assert peer.send(head(first=f"GET / HTTP/{version}")).answer().status == 505
        assert peer.rest() == b""


def test_B04_the_preface_of_http_2_is_refused(door: Small) -> None:
    with Peer(door.port) as peer:
        assert peer.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").answer().status == 400


def test_B04_a_body_with_an_offer_to_upgrade_is_a_body(sluice: Sluice, sim: str, upstream: OpenAIUpstream) -> None:
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    body = {"model": f"{sim}/gpt-4o", "messages": [{"role": "user", "content": "who am I"}]}
    key = sluice.issue_key()
    with Peer(sluice.port) as peer:
        for _ in range(2):
            answer = peer.send(request(key=key, body=body, more=offer)).answer()
            assert answer.status == 200
            assert "upgrade" not in answer.headers
    assert [seen.json["messages"] for seen in upstream.posts] == [body["messages"]] * 2


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_B04_an_offer_to_upgrade_does_not_hide_what_follows(door: Small, upgrade: str, method: str) -> None:
    more = f"Connection: Upgrade\r\nUpgrade: {upgrade}\r\n"
    first = request("/first", method=method, more=more, body=b"one" if method == "POST" else None)
    chunked = head("Connection: Upgrade", f"Upgrade: {upgrade}", "Transfer-Encoding: chunked") + b"3\r\ntwo\r\n0\r\n\r\n"
    with Peer(door.port) as peer:
        peer.send(first + chunked + request("/third", method="GET"))
        answers = [json.loads(peer.answer().body) for _ in range(3)]
    assert [(seen["path"], seen["body"]) for seen in answers] == [
        ("/first", "one" if method == "POST" else ""),
        ("/one", "two"),
        ("/third", ""),
    ]


def test_requests_that_are_sent_ahead_are_answered_in_order(door: Small) -> None:
    with Peer(door.port) as peer:
        peer.send(b"".join(request(path, body=path.encode()) for path in ("/slow", "/b", "/slow", "/d")))
        assert [json.loads(peer.answer().body)["path"] for _ in range(4)] == ["/slow", "/b", "/slow", "/d"]
        assert json.loads(peer.send(request("/later")).answer().body)["path"] == "/later"


def test_a_bad_request_sent_ahead_is_refused_after_the_answers_before_it(door: Small) -> None:
    with Peer(door.port) as peer:
        peer.send(request("/slow") + request("/b") + SMUGGLED["two lengths"])
        assert [peer.answer().status for _ in range(3)] == [200, 200, 400]
        assert peer.rest() == b""


def test_a_bad_body_sent_ahead_is_refused_after_the_answers_before_it(door: Small) -> None:
    with Peer(door.port) as peer:
        peer.send(request("/slow") + head("Transfer-Encoding: chunked") + b"zz\r\n")
        assert [peer.answer().status for _ in range(2)] == [200, 400]
        assert peer.rest() == b""


def test_a_few_requests_may_be_sent_ahead_and_not_thousands(door: Small) -> None:
    with Peer(door.port) as peer:
        peer.send(request("/slow") + request("/b", method="GET") * 2000)
        statuses = []
        while not statuses or statuses[-1] == 200:
            statuses.append(peer.answer().status)
        assert statuses == [200] * 17 + [503]


def test_who_leaves_while_another_request_waits_behind_is_noticed() -> None:
    seen: list[str] = []

    async def watched(scope: dict, receive: object, send: object) -> None:
        while (await receive())["type"] != "http.disconnect":  # type: ignore[operator]
            pass
        seen.append(scope["path"])

    with small(watched) as server:
        with Peer(server.port) as peer:
            peer.send(request("/first", method="GET") + request("/second", method="GET"))
            time.sleep(0.1)
        eventually(lambda: seen == ["/first"], "the request that was being answered did not hear of it")


def test_a_trailer_changes_nothing(door: Small) -> None:
    with Peer(door.port) as peer:
        peer.send(head("Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\nAuthorization: Bearer other\r\nX-Late: 1\r\n\r\n")
        seen = json.loads(peer.answer().body)
    assert seen["body"] == "abc"
    assert set(seen["headers"]) == {"host", "transfer-encoding"}


@pytest.mark.parametrize("junk", [b"0\r\nX-Late: " + b"a" * (1 << 20), b"3;" + b"a" * (1 << 20), b"0\r\n" + b"X-Late: a\r\n" * 100_000])
def test_endless_extensions_and_trailers_are_refused(door: Small, junk: bytes) -> None:
    with Peer(door.port) as peer:
        peer.send(head("Transfer-Encoding: chunked") + b"3\r\nabc\r\n")
        time.sleep(0.05)
        try:
            peer.send(junk)
        except ConnectionError:
            return
        assert peer.answer().status == 400


def test_http_1_0_gets_an_answer_that_ends_with_the_connection(sluice: Sluice, sim: str, upstream: OpenAIUpstream) -> None:
    body = {"model": f"{sim}/gpt-4o", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    with Peer(sluice.port) as peer:
        answer = peer.send(request(key=sluice.issue_key(), body=body, version="1.0")).answer()
    assert answer.status == 200
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["connection"] == "close"
    assert answer.body.startswith(b"data: {")
    assert answer.body.endswith(b"data: [DONE]\n\n")


def test_http_1_0_needs_no_host_and_may_ask_for_the_head_alone(door: Small) -> None:
    with Peer(door.port) as peer:
        answer = peer.send(b"GET /old HTTP/1.0\r\n\r\n").answer()
        assert json.loads(answer.body)["path"] == "/old"
    with Peer(door.port) as peer:
        assert peer.send(b"HEAD /old HTTP/1.0\r\n\r\n").rest().endswith(b"\r\n\r\n")


def test_a_client_that_asks_first_is_told_to_send_its_body(sluice: Sluice, sim: str, upstream: OpenAIUpstream) -> None:
    wanted = chat(sluice.issue_key(), f"{sim}/gpt-4o").replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n", 1)
    at = wanted.index(b"\r\n\r\n") + 4
    with Peer(sluice.port) as peer:
        peer.send(wanted[:at])
        assert peer._until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue"
        assert peer.send(wanted[at:]).answer().status == 200
        assert peer.send(wanted).answer().informational == [100]


def test_a_client_that_asks_first_and_is_refused_is_not_kept(sluice: Sluice) -> None:
    wanted = chat("sk-sluice-wrong", "sim/gpt-4o").replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n", 1)
    with Peer(sluice.port) as peer:
        answer = peer.send(wanted[: wanted.index(b"\r\n\r\n") + 4]).answer()
        assert (answer.status, answer.informational, answer.headers["connection"]) == (401, [], "close")
        assert peer.rest() == b""


def test_another_expectation_is_refused(door: Small) -> None:
    with Peer(door.port) as peer:
        assert peer.send(request(body=b"abc", more="Expect: a-miracle\r\n")).answer().status == 417


def test_B05_fields_with_underscores_and_hop_by_hop_fields_stay_here(sluice: Sluice, sim: str, upstream: OpenAIUpstream) -> None:
    more = "X_Forwarded_For: 10.0.0.1\r\nAuthorization_: x\r\nTE: trailers\r\nX-Own: 1\r\n"
    more += "Connection: authorization, x-request-id, close\r\n"
    body = {"model": f"{sim}/gpt-4o", "messages": [{"role": "user", "content": "hello"}]}
    with Peer(sluice.port) as peer:
        answer = peer.send(request(key=sluice.issue_key(), body=body, more=more)).answer()
    assert answer.status == 200
    [seen] = upstream.posts
    assert seen.headers["authorization"] == "Bearer sk-sim-ok"
    assert seen.headers["x-request-id"] == answer.headers["x-request-id"]
    assert not {"x_forwarded_for", "authorization_", "te", "x-own"} & set(seen.headers)
    assert "authorization" not in seen.headers.get("connection", "")


def test_B05_the_application_sees_no_underscored_field(door: Small) -> None:
    with Peer(door.port) as peer:
        seen = json.loads(peer.send(request(more="Content_Length: 5\r\nX_Real_IP: 1\r\nX-Real-IP: 2\r\n")).answer().body)
    assert set(seen["headers"]) == {"host", "x-real-ip"}


KNOWN = {"/v1/models": 401, "/%76%31/models": 401, "/v1%2Fmodels": 401, "http://127.0.0.1/v1/models": 401, "/v1/models?x=/readyz": 401}
UNKNOWN = {"//v1/models": 404, "/v1//models": 404, "/v1/../readyz": 404, "/readyz/../v1/models": 404, "/v1/models/..": 401, "/v1": 404}


@pytest.mark.parametrize("path", KNOWN | UNKNOWN)
def test_B08_however_a_path_is_written_the_key_is_asked_for_or_nothing_is_there(sluice: Sluice, path: str) -> None:
    with Peer(sluice.port) as peer:
        assert peer.send(request(path, method="GET")).answer().status == (KNOWN | UNKNOWN)[path]


CONFUSING = [
    "a/b",
    "a?b",
    "a#b",
    "a@127.0.0.1",
    "127.0.0.1 ",
    "a b",
    "127.0.0.1:80:90",
    "127.0.0.1:x",
    "[::1",
    "::1",
    "",
    "a,b",
    "a\\b",
    "a%00",
]


@pytest.mark.parametrize("host", CONFUSING)
def test_B08_a_host_with_more_than_a_name_and_a_port_is_refused(sluice: Sluice, host: str) -> None:
    with Peer(sluice.port) as peer:
        sent = request("/v1/models", method="GET").replace(b"Host: 127.0.0.1", f"Host: {host}".encode())
        assert peer.send(sent).answer().status == 400


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]", "[::1]:443"])
def test_B08_a_plain_host_is_served(sluice: Sluice, host: str) -> None:
    with Peer(sluice.port) as peer:
        sent = request("/v1/models", method="GET").replace(b"Host: 127.0.0.1", f"Host: {host}".encode())
        assert peer.send(sent).answer().status == 401


@pytest.mark.parametrize(
    "target", ["http://elsewhere/v1/models", "http://127.0.0.1:99/readyz", "/v1/models#x", "*", "ftp://127.0.0.1/", "http://a@127.0.0.1/"]
)
def test_B08_a_target_that_names_another_host_or_a_fragment_is_refused(sluice: Sluice, target: str) -> None:
    with Peer(sluice.port) as peer:
        assert peer.send(request(target, method="GET")).answer().status == 400


def test_B08_a_connection_to_elsewhere_is_refused(sluice: Sluice) -> None:
    with Peer(sluice.port) as peer:
        assert peer.send(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n").answer().status == 400


# Behind nginx

NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr warn;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream sluice {{ server 127.0.0.1:{behind}; keepalive 8; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://sluice; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
      proxy_request_buffering off; proxy_buffering off;
    }}
  }}
}}
"""


@pytest.fixture(scope="module")
def nginx(sluice: Sluice, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    binary = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if binary is None:
        pytest.skip("nginx is not installed")
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    config = Path(folder / "nginx.conf")
    config.write_text(NGINX.format(folder=folder, port=port, behind=sluice.port))
    process = subprocess.Popen([binary, "-c", str(config), "-p", str(folder)], stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: _listens(port), "nginx did not start")
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    try:
        Peer(port).socket.close()
    except OSError:
        return False
    return True


def hides(*lines: str, body: bytes, first: str = "POST /readyz HTTP/1.1") -> bytes:
    return head(*lines, first=first) + body


def carriers(hidden: bytes) -> dict[str, bytes]:
    """Requests that carry another in their body, for whoever reads the other of two framings."""
    size, behind = len(hidden), b"0\r\n\r\n" + hidden
    chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (size, hidden)
    length = f"Content-Length: {len(behind)}"
    return {
        "length, then coding": hides(length, "Transfer-Encoding: chunked", body=behind),
        "coding, then length": hides("Transfer-Encoding: chunked", length, body=behind),
        "a short length and a chunk": hides("Content-Length: 4", "Transfer-Encoding: chunked", body=chunk),
        "length and an unknown coding": hides(length, "Transfer-Encoding: xchunked", body=behind),
        "length and a coding behind a control": hides(length, "Transfer-Encoding: \x0bchunked", body=behind),
        "length and a coding before a space": hides(length, "Transfer-Encoding : chunked", body=behind),
        "length and a folded coding": hides(length, "Transfer-Encoding:", " chunked", body=behind),
        "length and a coding with an underscore": hides(length, "Transfer_Encoding: chunked", body=behind),
        "length and a coding behind a bare LF": hides(length, "X-One: a\nTransfer-Encoding: chunked", body=behind),
        "no length, then a long one": hides("Content-Length: 0", f"Content-Length: {size}", body=hidden),
        "a long length, then none": hides(f"Content-Length: {size}", "Content-Length: 0", body=hidden),
        "HTTP/1.0 with a coding": hides("Transfer-Encoding: chunked", "Connection: keep-alive", body=behind, first="POST /readyz HTTP/1.0"),
        "an offer to upgrade": hides("Connection: Upgrade", "Upgrade: h2c", f"Content-Length: {size}", body=hidden),
        "an offer to upgrade to websockets": hides("Connection: Upgrade", "Upgrade: websocket", f"Content-Length: {size}", body=hidden),
        "GET with a body": hides(f"Content-Length: {size}", body=hidden, first="GET /readyz HTTP/1.1"),
        "chunk with a bare LF": hides("Transfer-Encoding: chunked", body=b"%x\n%b\r\n0\r\n\r\n" % (size, hidden)),
        "chunk extension with a bare LF": hides("Transfer-Encoding: chunked", body=b"3;\n\r\nabc\r\n" + behind),
    }


@pytest.fixture(params=["alone", pytest.param("behind nginx", marks=pytest.mark.nginx)])
def entrance(request: pytest.FixtureRequest, sluice: Sluice) -> int:
    port: int = sluice.port if request.param == "alone" else request.getfixturevalue("nginx")
    return port


@pytest.mark.parametrize("name", carriers(b""))
def test_B04_a_request_inside_a_request_is_never_served(
    entrance: int, sluice: Sluice, sim: str, upstream: OpenAIUpstream, name: str
) -> None:
    hidden = chat(sluice.issue_key(), f"{sim}/gpt-4o")
    with Peer(entrance) as peer:
        assert peer.send(carriers(hidden)[name]).answer().status in (200, 400, 405, 501)
        peer.socket.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            assert b"HTTP/1.1 200" not in peer.rest()
    assert upstream.posts == []


@pytest.mark.nginx
def test_B04_behind_nginx_a_connection_that_is_used_again_answers_each_client_its_own(
    nginx: int, sluice: Sluice, sim: str, upstream: OpenAIUpstream
) -> None:
    key = sluice.issue_key()
    for number in range(6):
        with Peer(nginx) as peer:
            bad = SMUGGLED["coding, then length" if number % 2 else "two lengths"]
            peer.send(bad)
            peer.answer()
        with Peer(nginx) as peer:
            answer = peer.send(chat(key, f"{sim}/gpt-4o", content=f"number {number}")).answer()
            assert answer.status == 200
            assert f"number {number}" in json.dumps(upstream.posts[-1].json)
            assert upstream.posts[-1].request_id == answer.headers["x-request-id"]
    assert len(upstream.posts) == 6
