"""Whatever a client sends, it gets a clear answer in OpenAI's shape; nothing is called, and no row is made."""

from __future__ import annotations

import contextlib
import json
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.wire import MOST_LEVELS
from tests.project.raw_http import cpu_of, memory_of
from tests.serving import Sluice, eventually
from tests.upstreams.openai import OpenAIUpstream

HELLO = [{"role": "user", "content": "Hello there"}]
LIMIT_BYTES = 32 << 20


@pytest.fixture
def key(sluice: Sluice, sim: str, upstream: OpenAIUpstream) -> str:
    return sluice.issue_key()


@pytest.fixture
def client(sluice: Sluice, key: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=sluice.url, headers={"authorization": f"Bearer {key}"}, timeout=30) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_is_called(request: pytest.FixtureRequest, upstream: OpenAIUpstream) -> Iterator[None]:
    yield
    if "goes_through" not in request.node.name:
        assert upstream.posts == []


def refused(sluice: Sluice, answer: httpx.Response, status: int, code: str | None, param: str | None = None) -> str:
    """The error's message, when all about it is as it should be."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert uuid.UUID(answer.headers["x-request-id"]).version == 7
    assert answer.json().keys() == {"error"}
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == ("permission_error" if status == 403 else "invalid_request_error")
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "Traceback" not in answer.text
    assert sluice.rows(answer.headers["x-request-id"]) == []
    return error["message"]


def post(
    client: httpx.Client, raw: bytes, content_type: str | None = "application/json", path: str = "/v1/chat/completions"
) -> httpx.Response:
    return client.post(path, content=raw, headers={"content-type": content_type} if content_type else {})


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "sim/gpt-4o", "messages": HELLO, **fields}


# Not JSON


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"not json",
        b'{"model": "sim/gpt-4o", "messages": []',
        b'{"model": "sim/gpt-4o", "messages": [],}',
        b'{"model": "sim/gpt-4o"} {"messages": []}',
        b"{'model': 'sim/gpt-4o'}",
        b"[1]",
        b"null",
        b'"text"',
        b"model=sim/gpt-4o",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
        b'{"model": "sim/gpt-4o", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"model": "sim/gpt-4o", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"model": "sim/gpt-4o", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "sim/gpt-4o", "messages": [], "temperature": NaN}',
        b'{"model": "sim/gpt-4o", "messages": [], "x": Infinity}',
        b'{"model": "sim/gpt-4o", "messages": [], "x": -Infinity}',
        b'{"model": "sim/gpt-4o", "messages": [], "x": 1e999}',
        b'{"model": "sim/gpt-4o", "messages": [], "x": 01}',
        b'{"model": "sim/gpt-4o", "messages": [{"role": "user", "content": "a\nb"}]}',
    ],
)
def test_B10_what_is_not_json(client: httpx.Client, sluice: Sluice, raw: bytes) -> None:
    refused(sluice, post(client, raw), 400, "invalid_json")


def nested(depth: int, opening: str, closing: str) -> bytes:
    inner = "1" if closing == "}" else ""
    return f'{{"model":"sim/gpt-4o","messages":[{{"role":"user","content":"x"}}],"x":{opening * depth}{inner}{closing * depth}}}'.encode()


@pytest.mark.parametrize("depth", [MOST_LEVELS, 2_000, 10_000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_B10_what_is_nested_too_deeply(client: httpx.Client, sluice: Sluice, depth: int, opening: str, closing: str) -> None:
    raw = nested(depth, opening, closing)
    refused(sluice, post(client, raw), 400, "invalid_json" if depth < 100_000 else "body_too_complex")
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_B10_what_is_nested_as_deeply_as_may_be_goes_through(
    client: httpx.Client, upstream: OpenAIUpstream, opening: str, closing: str
) -> None:
    raw = nested(MOST_LEVELS - 1, opening, closing)
    assert post(client, raw).status_code == 200
    assert upstream.last.json["x"] == json.loads(raw)["x"]


@pytest.mark.parametrize("number", ["18446744073709551615", "18446744073709551616", "-9223372036854775809", "1" * 400, "0.1", "1e300"])
def test_B10_a_number_of_any_size_goes_through_exactly(client: httpx.Client, upstream: OpenAIUpstream, number: str) -> None:
    raw = f'{{"model":"sim/gpt-4o","messages":[{{"role":"user","content":"x"}}],"x":{number}}}'.encode()

    assert post(client, raw).status_code == 200
    assert json.loads(upstream.last.body)["x"] == json.loads(number)


def test_B10_a_number_longer_than_any_honest_one(client: httpx.Client, sluice: Sluice) -> None:
    refused(sluice, post(client, b'{"model":"sim/gpt-4o","messages":[],"x":' + b"1" * 1_000_000 + b"}"), 400, "invalid_json")


def peak_of(pid: int, do: Callable[[], object]) -> int:
    """Bytes by which the memory of a process grew at most meanwhile."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # forget the peak so far
    before = memory_of(pid)
    do()
    peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024 - before


BOMBS = {
    "a million keys": b'{"model":"sim/gpt-4o","messages":[],%b}' % b",".join(b'"%x":1' % number for number in range(1_000_000)),
    "a million times the same key": b'{"model":"sim/gpt-4o","messages":[]%b}' % (b',"a":1' * 1_000_000),
    "a million strings": b'{"model":"sim/gpt-4o","messages":[],"x":["a"%b]}' % (b',"a"' * 1_000_000),
    "a million lists": b'{"model":"sim/gpt-4o","messages":[],"x":[[]%b]}' % (b",[]" * 1_000_000),
    "lists in lists in lists": b'{"model":"sim/gpt-4o","messages":[],"x":[%b]}' % b",".join([b"[[[[[[[[[[]]]]]]]]]]"] * 50_000),
    "millions of numbers": b'{"model":"sim/gpt-4o","messages":[],"x":[0%b]}' % (b",0" * 3_000_000),
    "a million messages": b'{"model":"sim/gpt-4o","messages":[{}%b]}' % (b",{}" * 1_000_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_B10_what_would_be_millions_of_values_is_refused_before_it_is(client: httpx.Client, sluice: Sluice, name: str) -> None:
    def ask() -> None:
        refused(sluice, post(client, BOMBS[name]), 400, "body_too_complex")

    ask()  # what the first one costs, it costs once
    cpu = cpu_of(sluice.pid)
    # The body itself is in memory, and once more while it is put together from its parts.
    assert peak_of(sluice.pid, ask) < 2 * len(BOMBS[name]) + (16 << 20)
    assert cpu_of(sluice.pid) - cpu < 1  # 0.1 s on a machine that has nothing else to do


HONEST = {
    "much text with commas and brackets": chat(messages=[{"role": "user", "content": 'a, [b], {c}, \\ "d", ' * 100_000}]),
    "JSON in text": chat(messages=[{"role": "user", "content": json.dumps([{"a": ["b", "\\"]}] * 120_000)}]),
    "many messages": chat(messages=[{"role": "user", "content": "one, two"}] * 20_000),
}


@pytest.mark.parametrize("name", HONEST)
def test_B10_a_large_honest_body_goes_through(client: httpx.Client, upstream: OpenAIUpstream, name: str) -> None:
    assert client.post("/v1/chat/completions", json=HONEST[name]).status_code == 200
    assert upstream.last.json["messages"] == HONEST[name]["messages"]


def test_B10_a_long_list_of_tokens_goes_through(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    tokens = [[100_000 + number for number in range(150)] for _ in range(2000)]
    assert client.post("/v1/embeddings", json={"model": "sim/text-embedding-3-small", "input": tokens}).status_code == 200
    assert upstream.last.json["input"] == tokens


def test_B10_of_the_same_key_the_last_counts_and_it_goes_through_once(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    raw = b'{"model":"nowhere/x","messages":[],"messages":[{"role":"user","content":"x"}],"model":"sim/gpt-4o","user":"a","user":"b"}'
    assert post(client, raw).status_code == 200
    assert json.loads(upstream.last.body, object_pairs_hook=list) == [
        ("model", "gpt-4o"),
        ("messages", [[("role", "user"), ("content", "x")]]),
        ("user", "b"),
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=30,
)


@settings(max_examples=300)
@given(JSON, st.integers(0, 400), st.binary(max_size=3))
def test_B10_whatever_is_sent_is_answered_in_our_shape_and_some_goes_through(fuzzed: httpx.Client, value: Any, at: int, put: bytes) -> None:
    """Any JSON in any place, and then a few bytes of it spoilt."""
    for body in (value, {"model": "sim/gpt-4o", "messages": value}, {**chat(), "x": value, "stream_options": value}):
        whole = json.dumps(body).encode()
        for raw in (whole, whole[:at] + put + whole[at + len(put) :]):
            answer = post(fuzzed, raw)
            assert answer.status_code in (200, 400, 404)
            if answer.status_code != 200:
                assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def fuzzed(sluice: Sluice, sim: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=sluice.url, headers={"authorization": f"Bearer {sluice.issue_key()}"}, timeout=30) as client:
        yield client


# The content type


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonl", "x"]
)
def test_another_content_type(client: httpx.Client, sluice: Sluice, content_type: str) -> None:
    message = refused(sluice, post(client, json.dumps(chat()).encode(), content_type), 400, "unsupported_content_type")
    assert "application/json" in message


@pytest.mark.parametrize("content_type", [None, "application/json; charset=utf-8", "Application/JSON"])
def test_json_by_any_of_its_names_goes_through(client: httpx.Client, content_type: str | None) -> None:
    assert post(client, json.dumps(chat()).encode(), content_type).status_code == 200


# Parameters

WRONG_TYPES = [
    ("model", 5, "model"),
    ("model", ["a"], "model"),
    ("messages", "hi", "messages"),
    ("messages", {"role": "user"}, "messages"),
    ("messages", ["hi"], "messages[0]"),
    ("stream", "yes", "stream"),
    ("stream", 1, "stream"),
    ("max_tokens", "5", "max_tokens"),
    ("max_tokens", 1.5, "max_tokens"),
    ("max_tokens", True, "max_tokens"),
    ("max_completion_tokens", [], "max_completion_tokens"),
    ("n", "two", "n"),
    ("temperature", "hot", "temperature"),
    ("top_p", {}, "top_p"),
    ("stop", 5, "stop"),
    ("stop", [5], "stop[0]"),
    ("tools", {}, "tools"),
    ("tools", ["x"], "tools[0]"),
    ("stream_options", [], "stream_options"),
    ("stream_options", {"include_usage": "yes"}, "stream_options.include_usage"),
    ("response_format", "json", "response_format"),
]


@pytest.mark.parametrize(("name", "value", "param"), WRONG_TYPES, ids=[f"{name}={value!r}" for name, value, _ in WRONG_TYPES])
def test_a_parameter_of_the_wrong_type_is_named(client: httpx.Client, sluice: Sluice, name: str, value: Any, param: str) -> None:
    message = refused(sluice, client.post("/v1/chat/completions", json=chat(**{name: value})), 400, "invalid_type", param)
    assert f"'{param}'" in message
    assert "expected" in message


REQUIRED = {
    "chat/completions": ({"messages": HELLO}, "messages"),
    "completions": ({"prompt": "x"}, "prompt"),
    "embeddings": ({"input": "x"}, "input"),
    "moderations": ({"input": "x"}, "input"),
    "rerank": ({"query": "x", "documents": ["y"]}, "query"),
    "images/generations": ({"prompt": "x"}, "prompt"),
    "audio/speech": ({"input": "x", "voice": "y"}, "input"),
}


@pytest.mark.parametrize("sent", [{}, {"NAME": None}], ids=["absent", "null"])
@pytest.mark.parametrize("endpoint", REQUIRED)
def test_a_required_parameter_that_is_missing_is_named(client: httpx.Client, sluice: Sluice, endpoint: str, sent: dict[str, None]) -> None:
    full, name = REQUIRED[endpoint]
    body = {"model": "sim/gpt-4o", **full}
    del body[name]
    answer = client.post(f"/v1/{endpoint}", json=body | ({name: None} if sent else {}))

    assert name in refused(sluice, answer, 400, "missing_required_parameter", name)


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}], ids=["absent", "null", "empty"])
@pytest.mark.parametrize("endpoint", ["chat/completions", "completions", "embeddings", "responses", "rerank", "audio/speech"])
def test_a_missing_model(client: httpx.Client, sluice: Sluice, endpoint: str, model: dict[str, Any]) -> None:
    body = {**REQUIRED.get(endpoint, ({"input": "x"}, ""))[0], **model}

    refused(sluice, client.post(f"/v1/{endpoint}", json=body), 400, "missing_required_parameter", "model")


def test_null_means_not_sent_and_goes_through(client: httpx.Client) -> None:
    nothing = dict.fromkeys(["stream", "max_tokens", "max_completion_tokens", "n", "temperature", "top_p", "stop", "stream_options"])
    assert client.post("/v1/chat/completions", json=chat(**nothing)).status_code == 200


@pytest.mark.parametrize(
    "model", ["gpt-9", "nowhere/gpt-4o", "sim", "sim/", "/gpt-4o", "*", "a\r\nset-cookie: x=y", "\x00", "𝄞" * 300, "../sim/gpt-4o"]
)
def test_an_unknown_model(client: httpx.Client, sluice: Sluice, model: str) -> None:
    answer = client.post("/v1/chat/completions", json=chat(model=model))

    refused(sluice, answer, 404, "model_not_found", "model")
    assert "set-cookie" not in answer.headers


# Paths and methods


@pytest.mark.parametrize(
    "path",
    [
        "/v1", "/v1/", "/v1/chat", "/v1/chat/completions/", "/v1//chat/completions", "//v1/chat/completions", "/v1/chat/completions/x",
        "/v1/Chat/Completions", "/v1/chat%2Fcompletions/", "/v1/files", "/v1/engines/x/completions", "/v1/models/",
        "/v1/chat/completions;x=1", "/compat", "/compat/openai-worker/", "/v1/chat/completions%C3%A9",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_an_unknown_path(client: httpx.Client, sluice: Sluice, method: str, path: str) -> None:
    answer = raw_path(client, sluice, method, path)

    refused(sluice, answer, 404, None)


def raw_path(client: httpx.Client, sluice: Sluice, method: str, path: str) -> httpx.Response:
    """httpx would tidy the path first."""
    request = client.build_request(method, sluice.url, json=chat() if method == "POST" else None)
    request.url = request.url.copy_with(raw_path=path.encode())
    return client.send(request)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/chat/completions", "POST, OPTIONS"),
        ("PUT", "/v1/chat/completions", "POST, OPTIONS"),
        ("DELETE", "/v1/chat/completions", "POST, OPTIONS"),
        ("GET", "/v1/embeddings", "POST, OPTIONS"),
        ("PATCH", "/v1/responses", "POST, OPTIONS"),
        ("POST", "/v1/models", "GET, OPTIONS"),
        ("DELETE", "/v1/models/sim/gpt-4o", "GET, OPTIONS"),
        ("PUT", "/", "POST, OPTIONS"),
    ],
)
def test_a_wrong_method(client: httpx.Client, sluice: Sluice, method: str, path: str, allow: str) -> None:
    answer = client.request(method, path)

    refused(sluice, answer, 405, "method_not_supported")
    assert answer.headers["allow"] == allow


@pytest.mark.parametrize("path", ["/v1/models/sim/vendor/model-with-slash", "/v1/models/sim%2Fvendor%2Fmodel-with-slash"])
def test_a_models_id_may_hold_slashes(client: httpx.Client, sluice: Sluice, path: str) -> None:
    assert raw_path(client, sluice, "GET", path).json()["id"] == "sim/vendor/model-with-slash"


# Keys


def test_B09_no_key(sluice: Sluice, sim: str) -> None:
    for headers in ({}, {"authorization": ""}, {"authorization": "Bearer"}, {"x-api-key": ""}):
        answer = httpx.post(f"{sluice.url}/v1/chat/completions", json=chat(), headers=headers)
        refused(sluice, answer, 401, "invalid_api_key")
        assert answer.headers["www-authenticate"].startswith("Bearer")


def test_B09_a_key_in_the_wrong_place_is_no_key(sluice: Sluice, key: str) -> None:
    url = f"{sluice.url}/v1/chat/completions"
    for place in (
        {"params": {"key": key}},
        {"params": {"api_key": key}},
        {"headers": {"cookie": f"authorization=Bearer {key}; key={key}; x-api-key={key}"}},
        {"headers": {"authorization": f"Basic {key}"}},
        {"headers": {"authorization": key}},
        {"headers": {"x_api_key": key}},
        {"headers": {"openai-api-key": key}},
    ):
        refused(sluice, httpx.post(url, json=chat(), **place), 401, "invalid_api_key")  # type: ignore[arg-type]


def test_B09_what_stands_elsewhere_changes_nothing_beside_a_key_and_goes_through(
    sluice: Sluice, key: str, upstream: OpenAIUpstream
) -> None:
    """A query or a cookie is no place for a key: neither a good one there nor a bad one has a say."""
    url, headers = f"{sluice.url}/v1/chat/completions", {"authorization": f"Bearer {key}"}
    for place in (
        {"params": {"key": "sk-sluice-wrong", "api_key": "sk-sluice-wrong"}},
        {"headers": {"cookie": "x-api-key=sk-sluice-wrong; sessionid=" + "a" * 32}},
    ):
        given_headers = headers | place.pop("headers", {})  # type: ignore[operator]
        assert httpx.post(url, json=chat(), headers=given_headers, **place).status_code == 200  # type: ignore[arg-type]
    for value in (f"Basic {key}", "Bearer sk-sluice-wrong"):
        refusal = httpx.post(url, json=chat(), headers={"authorization": value, "x-api-key": key})
        assert refusal.status_code in (400, 401)
        assert refusal.json()["error"]["code"] in ("conflicting_credentials", "invalid_api_key")
    assert len(upstream.posts) == 2


@pytest.mark.parametrize("name", ["x-upstream-key", "x-openai-key"])
def test_an_empty_key_for_the_upstream_is_none_and_goes_through(client: httpx.Client, name: str) -> None:
    assert client.post("/v1/chat/completions", json=chat(), headers={name: ""}).status_code == 200


@pytest.mark.parametrize("other", ["x-api-key", "x-goog-api-key"])
def test_B09_two_keys_that_differ(sluice: Sluice, key: str, other: str) -> None:
    headers = {"authorization": f"Bearer {key}", other: sluice.issue_key()}
    refused(sluice, httpx.post(f"{sluice.url}/v1/chat/completions", json=chat(), headers=headers), 400, "conflicting_credentials")

    twice = [("authorization", f"Bearer {key}"), ("authorization", f"Bearer {sluice.issue_key()}")]
    answer = httpx.post(f"{sluice.url}/v1/chat/completions", json=chat(), headers=twice)
    assert answer.status_code in (400, 401)


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "x-goog-api-key"])
def test_B09_each_of_the_three_headers_goes_through(sluice: Sluice, key: str, name: str) -> None:
    value = f"bearer {key}" if name == "authorization" else key
    assert httpx.post(f"{sluice.url}/v1/chat/completions", json=chat(), headers={name: value}).status_code == 200


def test_B09_the_same_key_twice_goes_through(sluice: Sluice, key: str) -> None:
    headers = {"authorization": f"Bearer {key}", "x-api-key": key}
    assert httpx.post(f"{sluice.url}/v1/chat/completions", json=chat(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    "wrong",
    [
        b"' OR 1=1 --", b"sk-sluice-", b"sk-sluice-" + b"A" * 59, b"\xc3\xa9" * 30, b"x" * 4000, b"%00", b"null", b"undefined", b"..%2f..",
        b"sk-sluice-\xff\xfe", b"Bearer sk-sluice-x",
    ],
)  # fmt: skip
def test_B07_what_looks_like_no_key_of_ours(sluice: Sluice, sim: str, wrong: bytes) -> None:
    answer = httpx.post(f"{sluice.url}/v1/chat/completions", json=chat(), headers={b"authorization": b"Bearer " + wrong})

    refused(sluice, answer, 401, "invalid_api_key")
    if len(wrong) >= 10:
        assert wrong.decode("latin-1") not in answer.text
        assert wrong.decode("latin-1") not in sluice.log()


# Bodies that are too large


def send_slowly(sluice: Sluice, head: str, body_bytes: int, *, chunked: bool = False) -> tuple[bytes, int]:
    """Send a body as far as the server takes it; (what it answered, how many bytes of the body it took)."""
    sent = 0
    with socket.create_connection(("127.0.0.1", sluice.port), timeout=20) as connection:
        connection.sendall(head.encode())
        connection.settimeout(0.5)
        piece = b"x" * 65536
        framed = b"10000\r\n" + piece + b"\r\n" if chunked else piece
        try:
            while sent < body_bytes:
                connection.sendall(framed)
                sent += len(piece)
        except OSError:
            pass  # it reads no further, or has closed
        connection.settimeout(20)
        answer = read_answer(connection)
    return answer, sent


def read_answer(connection: socket.socket) -> bytes:
    """A whole error, or what came of it before the connection was closed."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while not answer.endswith(b"}}") and (came := connection.recv(65536)):
            answer += came
    return answer


def head(sluice: Sluice, key: str, *lines: str) -> str:
    return "\r\n".join(
        [
            "POST /v1/chat/completions HTTP/1.1",
            f"Host: 127.0.0.1:{sluice.port}",
            f"Authorization: Bearer {key}",
            "Content-Type: application/json",
            *lines,
            "",
            "",
        ]
    )


def test_a_body_announced_too_large_is_refused_before_it_is_sent(sluice: Sluice, key: str) -> None:
    with socket.create_connection(("127.0.0.1", sluice.port), timeout=20) as connection:
        connection.sendall(head(sluice, key, f"Content-Length: {LIMIT_BYTES + 1}").encode())
        answer = read_answer(connection)

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"request_too_large"' in answer
    assert b"access-control-allow-origin: *" in answer


def test_a_body_that_grows_too_large_is_refused_at_the_limit(sluice: Sluice, key: str) -> None:
    answer, sent = send_slowly(sluice, head(sluice, key, "Transfer-Encoding: chunked"), 2 * LIMIT_BYTES, chunked=True)

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert sent <= LIMIT_BYTES + (8 << 20)


def test_a_strangers_upload_is_not_read(sluice: Sluice, sim: str) -> None:
    answer, sent = send_slowly(sluice, head(sluice, "sk-sluice-wrong", "Content-Length: 31457280"), 30 << 20)

    assert answer.startswith(b"HTTP/1.1 401 ")
    assert sent <= 8 << 20


def test_a_large_body_within_the_limit_goes_through(client: httpx.Client, upstream: OpenAIUpstream) -> None:
    text = "word " * 1_000_000
    answer = client.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": text}]))

    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == 1_000_000


# Hosts


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:80"])
def test_a_host_that_is_not_served(client: httpx.Client, sluice: Sluice, host: str) -> None:
    answer = client.post("/v1/chat/completions", json=chat(), headers={"host": host})

    refused(sluice, answer, 400, "invalid_host")


@pytest.mark.parametrize("host", ["", "127.0.0.1@evil.example"])
def test_a_host_that_is_none(client: httpx.Client, sluice: Sluice, host: str) -> None:
    answer = client.post("/v1/chat/completions", json=chat(), headers={"host": host})

    refused(sluice, answer, 400, "invalid_http")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]", "[::1]:8000"])
def test_a_host_of_this_machine_goes_through(client: httpx.Client, host: str) -> None:
    assert client.post("/v1/chat/completions", json=chat(), headers={"host": host}).status_code == 200


# What is kept of it


def refusals(sluice: Sluice, key: str) -> dict[str, int]:
    """Code -> count, of one key."""
    code = (
        "from accounts.models import ApiKey; from proxy.models import RefusedCalls; import json;"
        f"key = ApiKey.objects.get(handle={key[10:20]!r});"
        "print(json.dumps({f'{row.status} {row.code}': row.count for row in RefusedCalls.objects.filter(key_id=key.pk)}))"
    )
    return dict(json.loads(sluice.python(code)))


def test_refused_calls_are_counted_by_key_and_code(sluice: Sluice, sim: str) -> None:
    key = sluice.issue_key(models="sim/gpt-4o", rpm=0)
    with httpx.Client(base_url=sluice.url, headers={"authorization": f"Bearer {key}"}) as client:
        for model in ("sim/o3", "sim/o3", "nowhere/x"):
            assert client.post("/v1/chat/completions", json=chat(model=model)).status_code == 403
        assert client.get("/v1/models/sim/o3").status_code == 404
        for _ in range(2):
            assert client.post("/v1/chat/completions", json=chat()).status_code == 429

    def counted() -> bool:
        return refusals(sluice, key) == {"403 model_not_allowed": 3, "404 model_not_found": 1, "429 rate_limit_exceeded": 2}

    eventually(counted, "the refusals are not counted", seconds=10)


def test_strangers_are_counted_together(sluice: Sluice, sim: str) -> None:
    look = (
        "from proxy.models import RefusedCalls; from django.db.models import Sum;"
        "print(RefusedCalls.objects.filter(key_id=0, status=401).aggregate(n=Sum('count'))['n'] or 0)"
    )
    before = int(sluice.python(look))
    for _ in range(3):
        httpx.post(f"{sluice.url}/v1/chat/completions", json=chat(), headers={"authorization": "Bearer sk-sluice-none"})

    eventually(lambda: int(sluice.python(look)) >= before + 3, "the strangers are not counted", seconds=10)
