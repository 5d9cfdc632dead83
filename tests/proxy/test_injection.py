"""B06: what a client or an upstream says begins no header, and no line of the log, whatever control characters it holds."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from project.logs import RedactingFormatter
from tests.proxy.test_gateway import House, sse
from tests.serving import Sluice
from tests.upstreams.openai import OpenAIUpstream, Step

INJECTED = "x\r\nset-cookie: evil=1\r\n\r\nHTTP/1.1 200 OK\r\n2026-01-01 00:00:00,000 ERROR   root: evil\0\x1b[2J\u2028\x85"
HOSTILE = st.one_of(
    st.text(st.sampled_from("\r\n\0\x0b\x1b\x7f\x85\u2028 :;,\"'ab/%"), max_size=40), st.text(max_size=60), st.just(INJECTED)
)
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ +[\w.]+: ")
FORBIDDEN = re.compile(r"[\r\n\0]")


@contextmanager
def logged() -> Iterator[io.StringIO]:
    """All that is logged meanwhile, as `serve` would write it."""
    stream, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RedactingFormatter())
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def is_a_log(text: str) -> bool:
    """Every line is a record of ours, or stands in the margin of one; nothing else moves a cursor or ends a line."""
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", text)
    for line in text.split("\n"):
        assert not line or line.startswith("    ") or RECORD.match(line), line
    return True


def answers(hostile: str, kind: str) -> httpx.Response:
    if kind == "bytes":
        return httpx.Response(200, content=b"sound", headers=[(b"content-type", hostile.encode("utf-8", "replace"))])
    if kind == "whole":
        body = {"id": hostile, "model": hostile, "choices": [{"message": {"role": hostile, "content": hostile}}], hostile: 1}
        return httpx.Response(200, json=body, headers={"x-request-id": "up"})
    if kind == "stream":
        chunk = {"id": hostile, "model": hostile, "choices": [{"index": 0, "delta": {"content": hostile}, "finish_reason": hostile}]}
        return httpx.Response(200, content=b"".join(sse(chunk)), headers={"content-type": "text/event-stream"})
    said = {"message": hostile, "type": hostile, "code": hostile, "param": hostile}
    headers = [(b"retry-after", hostile.encode("utf-8", "replace")), (b"x-request-id", hostile.encode("utf-8", "replace"))]
    return httpx.Response(int(kind), json={"error": said}, headers=headers)


@settings(max_examples=400)
@given(HOSTILE, HOSTILE, st.sampled_from(["whole", "stream", "bytes", "400", "401", "402", "404", "429", "500"]))
@example(INJECTED, INJECTED, "whole")
@example(INJECTED, INJECTED, "stream")
@example(INJECTED, INJECTED, "bytes")
@example(INJECTED, INJECTED, "429")
@example(INJECTED, INJECTED, "500")
def test_B06_nothing_said_begins_a_header_or_a_line_of_the_log(client: str, upstream: str, kind: str) -> None:
    body = {
        "model": f"a/{client}",
        "messages": [{"role": "user", "content": client, "name": client}],
        "metadata": {client: client},
        "user": client,
        "stream": kind == "stream",
        client: client,
    }

    async def ask(house: House) -> list[str]:
        heads = []
        for named in ({}, {"x_upstream_key": client}, {"origin": client}, {"x_error_format": client}, {"user_agent": client}):
            heads += (await house.call(body, **named)).headers.items()
        heads += (await house.call({"model": "a/tts", "input": client, "voice": client}, path="/v1/audio/speech")).headers.items()
        return [part for head in heads for part in head]

    with tempfile.TemporaryDirectory() as folder, logged() as log:
        house = House(Path(folder), lambda request: answers(upstream, kind))
        said = asyncio.run(ask(house))
    for request in house.sent:
        said += [part.decode("latin-1") for field in request.headers.raw for part in field]
    assert [part for part in said if FORBIDDEN.search(part)] == []
    assert is_a_log(log.getvalue())


def test_B06_a_line_of_the_log_is_told_from_what_it_quotes() -> None:
    with logged() as log:
        logging.getLogger("some.where").warning("It said %s", INJECTED)
        try:
            raise ValueError(INJECTED)
        except ValueError:
            logging.getLogger("some.where").exception("It broke\nin two lines")
    text = log.getvalue()
    assert is_a_log(text)
    assert len([line for line in text.split("\n") if RECORD.match(line)]) == 2
    assert "Traceback (most recent call last):" in text


EXPECTED = {"content-type", "content-length", "transfer-encoding", "x-request-id", "access-control-allow-origin"}
EXPECTED |= {"access-control-expose-headers", "cache-control", "x-accel-buffering", "retry-after", "x-should-retry"}
SENT = {"host", "authorization", "content-type", "content-length", "accept", "accept-encoding", "user-agent", "x-request-id", "connection"}


@settings(max_examples=60)
@given(HOSTILE, HOSTILE, st.booleans(), st.sampled_from([200, 400, 429, 500]))
@example(INJECTED, INJECTED, True, 200)
@example(INJECTED, INJECTED, False, 500)
def test_B06_on_the_wire_there_are_our_headers_alone(
    wire: tuple[httpx.Client, Sluice, OpenAIUpstream], client: str, upstream: str, stream: bool, status: int
) -> None:
    http, sluice, simulator = wire
    log_start = sluice.log_size()
    simulator.reset()
    if status == 200:
        simulator.script(Step(text=upstream, finish_reason=upstream or None))
    else:
        error = {"error": {"message": upstream, "type": upstream, "code": upstream}}
        simulator.script(Step(status=status, body=json.dumps(error).encode()))
    body = {"model": f"sim/{client}", "messages": [{"role": "user", "content": client}], "user": client, "metadata": {client: client}}
    answer = http.post("/v1/chat/completions", json={**body, "stream": stream})
    assert {name.lower() for name, _ in answer.headers.multi_items()} <= EXPECTED
    assert "set-cookie" not in answer.headers
    for seen in simulator.posts:
        assert set(seen.headers) <= SENT
    assert is_a_log(sluice.log(log_start))


@pytest.fixture(scope="module")
def wire(sluice: Sluice, sim: str, upstream_server: OpenAIUpstream) -> Iterator[tuple[httpx.Client, Sluice, Any]]:
    with httpx.Client(base_url=sluice.url, headers={"authorization": f"Bearer {sluice.issue_key()}"}, timeout=20) as client:
        yield client, sluice, upstream_server
