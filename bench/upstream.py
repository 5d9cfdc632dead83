"""The mock upstream: a canned answer for each request, as cheap as Python can give it.

The last part of the model's name in the body says which: `whole` (one JSON object), `burst` (a stream of 64 events in one
piece), `paced` (64 events, 5 ms apart), `idle` and `steady` (one event per second, or twenty, until the reader leaves). Events of the
last three hold the moment at which they were sent, so that a reader knows how long they were under way.

`python -m bench.upstream ORIGINS [CERTIFICATE KEY]` listens on free ports and says them as one line of JSON:
`{"plain": [...], "tls": ...}`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import ssl
import sys
import time

import uvloop

from bench.machine import raise_file_limit

EVENTS = 64
PACE_SECONDS = 0.005
IDLE_SECONDS, STEADY_SECONDS = 1.0, 0.05
SENT = b"sent="  # before the 20 digits of the monotonic clock, in nanoseconds
SENT_DIGITS = 20

USAGE = b'{"prompt_tokens":120,"completion_tokens":64,"total_tokens":184,"prompt_tokens_details":{"cached_tokens":0}}'
_OF_ONE = b'"id":"chatcmpl-0123456789abcdef","created":1750000000,"model":"mock-model"'
_TEXT = b"A gate lets the right amount of water through and measures what has passed it. " * 8


def _head(content_type: bytes, framing: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: " + content_type + b"\r\n" + framing + b"\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(delta: bytes) -> bytes:
    choice = b'{"index":0,"delta":{"role":"assistant","content":"' + delta + b'"},"logprobs":null,"finish_reason":null}'
    return b"data: {" + _OF_ONE + b',"object":"chat.completion.chunk","system_fingerprint":"fp_0123456789","choices":[' + choice + b"]}\n\n"


def stamped_event() -> bytes:
    return _chunk(_event(SENT + b"%020d" % time.monotonic_ns()))


_ANSWER = (
    b"{" + _OF_ONE + b',"object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"' + _TEXT
    + b'"},"logprobs":null,"finish_reason":"stop"}],"usage":' + USAGE + b"}"
)  # fmt: skip
_MODELS = (
    b'{"object":"list","data":['
    + b",".join(b'{"id":"%b","object":"model"}' % name for name in (b"whole", b"burst", b"paced", b"idle", b"steady"))
    + b"]}"
)


def _json(body: bytes) -> bytes:
    return _head(b"application/json", b"content-length: %d" % len(body)) + body


WHOLE = _json(_ANSWER)
MODELS = _json(_MODELS)
STREAM_HEAD = _head(b"text/event-stream; charset=utf-8", b"transfer-encoding: chunked")
LAST = (
    _chunk(b"data: {" + _OF_ONE + b',"object":"chat.completion.chunk","choices":[],"usage":' + USAGE + b"}\n\n")
    + _chunk(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)
BURST = STREAM_HEAD + _chunk(_event(b" lets the right amount through")) * EVENTS + LAST


class Upstream(asyncio.Protocol):
    """One connection. Requests come one after the other; each is answered as soon as its body is there."""

    def __init__(self) -> None:
        self.rest = b""
        self.sent = 0
        self.timer: asyncio.TimerHandle | None = None
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        data = self.rest + data if self.rest else data
        head_end = data.find(b"\r\n\r\n") + 4
        end = head_end + content_length(data, head_end)
        if head_end == 3 or len(data) < end:
            self.rest = data
            return
        self.rest = data[end:]
        if data.startswith(b"GET "):
            self.transport.write(MODELS)
        elif data.find(b'whole"', head_end) >= 0:
            self.transport.write(WHOLE)
        elif data.find(b'burst"', head_end) >= 0:
            self.transport.write(BURST)
        elif data.find(b'paced"', head_end) >= 0:
            self.sent = 0
            self.transport.write(STREAM_HEAD)
            self.next_paced()
        else:
            self.transport.write(STREAM_HEAD)
            self.next_of_many(STEADY_SECONDS if data.find(b'steady"', head_end) >= 0 else IDLE_SECONDS)

    def next_paced(self) -> None:
        self.sent += 1
        if self.sent <= EVENTS:
            self.transport.write(stamped_event())
            self.timer = self.loop.call_later(PACE_SECONDS, self.next_paced)
        else:
            self.transport.write(LAST)

    def next_of_many(self, seconds: float) -> None:
        self.transport.write(stamped_event())
        self.timer = self.loop.call_later(seconds, self.next_of_many, seconds)


def content_length(data: bytes, head_end: int) -> int:
    at = data.lower().find(b"content-length:", 0, head_end)
    return int(data[at + 15 : data.find(b"\r", at)]) if at >= 0 else 0


async def serve(origins: int, certificate: str, key: str) -> None:
    loop = asyncio.get_running_loop()
    plain = [await loop.create_server(Upstream, "127.0.0.1", 0, backlog=8192) for _ in range(origins)]
    secure = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        secure = await loop.create_server(Upstream, "127.0.0.1", 0, ssl=context, backlog=8192)
    ports = [server.sockets[0].getsockname()[1] for server in plain]
    print(json.dumps({"plain": ports, "tls": secure.sockets[0].getsockname()[1] if secure else None}), flush=True)
    gc.freeze()
    await asyncio.Event().wait()


def main() -> None:
    origins, certificate, key = [*sys.argv[1:], "", ""][:3]
    raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(int(origins), certificate, key))


if __name__ == "__main__":
    main()
