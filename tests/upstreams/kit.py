"""A raw HTTP/1.1 server that plays an upstream: scripted faults down to the socket, a log of what it was asked, and a
ledger of what it billed.

It runs in a thread with a loop of its own, so that tests of any kind can use it. A subclass speaks one provider's
language; what happens to the bytes on their way out (delays, compression, cuts) is the same for all and lives here.
No value is random: ids count up, and the same request gets the same answer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self
from urllib.parse import parse_qsl, unquote, urlsplit

CREATED = 1786000000
MOST_HEAD_BYTES = 64 << 10
PAGE = b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1><hr>nginx/1.24.0</body></html>"
# Something in front of the upstream answers: the upstream itself never sees the request.
NOT_EXECUTED = frozenset({"html_502", "redirect", "bad_status"})
Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Step:
    """How one call is answered. The control plane gives it as JSON with the same names; `frames`, `body` and `headers`
    (sent as they are) can be given from Python alone. Delays are milliseconds before scaling."""

    scenario: str = "ok"
    text: str | None = None
    reasoning: str | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    usage: Mapping[str, Any] | None = None
    finish_reason: str | None = None
    delay_first_ms: float = 0
    delay_frame_ms: float = 0
    gzip: bool = False
    frames: Sequence[bytes] | None = None  # the body of a stream, one write each, sent as they are
    body: bytes | None = None  # a whole body, sent as it is
    status: int = 200
    headers: Headers = ()
    content_type: str | None = None

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Step:
        known = {one.name for one in fields(cls)} - {"frames", "body", "headers"}
        return cls(**{name: value for name, value in given.items() if name in known and value is not None})


@dataclass
class Seen:
    """One request as it was received, and what became of its answer. Times are monotonic seconds."""

    method: str
    path: str
    query: dict[str, str]
    raw_headers: list[tuple[str, str]]
    body: bytes
    at: float
    connection: int
    json: Any = None
    scenario: str = ""
    unknown_fields: dict[str, Any] = field(default_factory=dict)
    frames_sent: int = 0
    bytes_sent: int = 0
    sent_at: float | None = None  # the last byte so far
    peer_left_at: float | None = None  # the caller closed before the answer was whole
    finished_at: float | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.raw_headers}

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id", "")


@dataclass
class Bill:
    """What this upstream charged for one request id: every POST it executed, with the tokens of what it sent."""

    posts: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class PeerLeft(Exception):
    """The caller closed the connection before its answer was whole."""


class Simulator:
    """Start with `with`, or `start()` and `stop()`. `base_url` is what an operator would configure."""

    base_path: ClassVar[str] = ""

    def __init__(self, *, time_scale: float = 1.0, keep_alive: bool = True) -> None:
        self.time_scale = time_scale
        self.keep_alive = keep_alive
        self.log: list[Seen] = []
        self.bills: dict[str, Bill] = {}
        self.open_connections = 0
        self.connections = 0
        self.answers = 0
        self._script: deque[Step] = deque()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._listening = threading.Event()
        self._handlers: set[asyncio.Task[None]] = set()
        self.port = 0

    # For tests

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        self._thread.start()
        assert self._listening.wait(10), "the simulator does not listen"
        return self

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return self.origin + self.base_path

    def script(self, *steps: Step) -> None:
        """The next calls are answered by these, in order; after them scenarios go by credential and model again."""
        with self._lock:
            self._script.extend(steps)

    def reset(self) -> None:
        """Forget script, log and bills. Connections stay."""
        with self._lock:
            self._script.clear()
            self.log, self.bills = [], {}

    def calls(self, request_id: str) -> list[Seen]:
        """The requests that came with this `x-request-id`, in order of arrival."""
        return [seen for seen in list(self.log) if seen.request_id == request_id]

    def bill(self, request_id: str) -> Bill:
        return self.bills.get(request_id, Bill())

    @property
    def posts(self) -> list[Seen]:
        """The requests without those for lists of models, which a server makes by itself."""
        return [seen for seen in list(self.log) if seen.method == "POST"]

    @property
    def last(self) -> Seen:
        return self.posts[-1]

    def state(self) -> dict[str, Any]:
        bills = list(self.bills.values())
        return {
            "open_connections": self.open_connections,
            "connections": self.connections,
            "posts": sum(bill.posts for bill in bills),
            "input_tokens": sum(bill.input_tokens for bill in bills),
            "output_tokens": sum(bill.output_tokens for bill in bills),
        }

    # For a subclass

    async def answer(self, call: Call) -> None:
        """Answer one request in the provider's language."""
        raise NotImplementedError

    def bad_frame(self) -> bytes:
        """A frame that cannot be read."""
        return b'data: {"id": "sim", "choices": [{"del\n\n'

    def error_frame(self) -> bytes:
        """What the provider sends when it fails in the middle of a stream."""
        raise NotImplementedError

    def big_frame(self) -> bytes:
        """One text frame of a MiB."""
        raise NotImplementedError

    def next_id(self, prefix: str) -> str:
        self.answers += 1
        return f"{prefix}-sim-{self.answers}"

    def step_of(self, call: Call) -> Step:
        """What the script says, else what the credential or the model asks for, else `ok`."""
        with self._lock:
            if self._script:
                return self._script.popleft()
        return Step(scenario=call.chosen_scenario() or "ok")

    def charge(self, seen: Seen, *, input_tokens: int) -> Bill:
        """A POST is executed: it is on the bill, whatever becomes of the answer."""
        if seen.scenario in NOT_EXECUTED:
            return Bill()
        with self._lock:
            bill = self.bills.setdefault(seen.request_id, Bill())
            bill.posts += 1
            bill.input_tokens += input_tokens
            return bill

    # The server

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0, limit=MOST_HEAD_BYTES))
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        self._loop.run_forever()
        server.close()
        for handler in list(self._handlers):
            handler.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._handlers, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        self.connections += 1
        self.open_connections += 1
        number = self.connections
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while await self._one_request(reader, writer, number) and self.keep_alive:
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, PeerLeft):
            pass
        finally:
            self.open_connections -= 1
            self._handlers.discard(task)
            writer.close()

    async def _one_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        """True when the connection may carry another."""
        seen = await _read_request(reader, number)
        if seen is None:
            return False
        call = Call(self, seen, reader, writer)
        if seen.path.startswith("/__sim/"):
            await self._control(call)
            return call.reusable
        self.log.append(seen)
        watcher = asyncio.create_task(call.watch())
        try:
            await self.answer(call)
            seen.finished_at = time.monotonic()
        except ConnectionError:
            if not call._cut:  # a write has noticed it before the watcher did
                seen.peer_left_at = seen.peer_left_at or time.monotonic()
            raise
        finally:
            watcher.cancel()
        return call.reusable

    async def _control(self, call: Call) -> None:
        what = call.seen.path.removeprefix("/__sim/")
        if what == "script":
            self.script(*(Step.from_json(step) for step in call.seen.json["steps"]))
            await call.json(200, {"steps": len(self._script)})
        elif what == "log":
            await call.json(200, [_as_json(seen) for seen in self.log])
        elif what == "reset":
            self.reset()
            await call.json(200, {})
        elif what == "state":
            await call.json(200, self.state())
        else:
            await call.json(404, {"error": f"no control route {what}"})


class Call:
    """One request being answered: its bytes in, and every way to put bytes out."""

    def __init__(self, simulator: Simulator, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.simulator = simulator
        self.seen = seen
        self.reusable = seen.headers.get("connection", "").lower() != "close"
        self._reader, self._writer = reader, writer
        self._chunked = False
        self._cut = False
        self._left = asyncio.Event()

    def chosen_scenario(self) -> str:
        """From `sk-sim-<scenario>` as credential, else `sim-<scenario>` as model. What follows a `~` only makes it unique."""
        secret = self.seen.headers.get("authorization", "").removeprefix("Bearer ").partition("~")[0]
        if secret.startswith("sk-sim-") and secret != "sk-sim-ok":
            return secret.removeprefix("sk-sim-")
        model = self.seen.json.get("model") if isinstance(self.seen.json, dict) else None
        if isinstance(model, str) and model.startswith("sim-"):
            return model.removeprefix("sim-").partition("~")[0]
        return ""

    async def watch(self) -> None:
        """Note the moment at which the caller closes."""
        while not (self._reader.at_eof() or self._reader.exception() is not None or self._writer.transport.is_closing()):
            await asyncio.sleep(0.002)
        if self.seen.finished_at is None and not self._cut:
            self.seen.peer_left_at = time.monotonic()
        self._left.set()

    async def sleep(self, milliseconds: float) -> None:
        """Scaled. Raises PeerLeft as soon as the caller closes."""
        if milliseconds <= 0:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._left.wait(), milliseconds / 1000 * self.simulator.time_scale)
            raise PeerLeft

    async def head(self, status: int, headers: Headers = (), *, length: int | None = None, version: str = "HTTP/1.1") -> None:
        """Without a length the body is chunked (or, for HTTP/1.0, ends with the connection)."""
        lines = [f"{version} {status} Sim", *(f"{name}: {value}" for name, value in headers)]
        self._chunked = length is None and version == "HTTP/1.1"
        if length is not None:
            lines.append(f"content-length: {length}")
        elif self._chunked:
            lines.append("transfer-encoding: chunked")
        if not self.simulator.keep_alive:
            lines.append("connection: close")
        await self.raw("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")

    async def raw(self, data: bytes) -> None:
        if self._left.is_set():
            raise PeerLeft
        self._writer.write(data)
        await self._writer.drain()
        self.seen.bytes_sent += len(data)
        self.seen.sent_at = time.monotonic()

    async def body(self, data: bytes) -> None:
        if data:
            await self.raw(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    async def end(self) -> None:
        if self._chunked:
            await self.raw(b"0\r\n\r\n")

    async def whole(self, status: int, body: bytes, content_type: str = "application/json", headers: Headers = ()) -> None:
        await self.head(status, [("content-type", content_type), *headers], length=len(body))
        await self.raw(body)

    async def json(self, status: int, value: object, headers: Headers = ()) -> None:
        await self.whole(status, compact(value), headers=headers)

    def cut(self) -> None:
        """Close at once, with FIN."""
        self.reusable, self._cut = False, True
        self._writer.close()

    def reset(self) -> None:
        """Close at once, with RST."""
        self.reusable, self._cut = False, True
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def until_peer_leaves(self) -> None:
        await self._left.wait()
        raise PeerLeft

    # What may happen to any answer

    async def whole_with(self, step: Step, body: bytes, headers: Headers) -> None:
        """A whole JSON answer, as the step's scenario lets it out."""
        if await self._instead_of_answer(step, headers):
            return
        await self.sleep(step.delay_first_ms)
        typed = [("content-type", step.content_type or "application/json"), *headers]
        half = len(body) // 2
        match step.scenario:
            case "abort_mid" | "eof_mid" | "stall":
                await self.head(step.status, typed)
                await self.body(body[:half])
                await self._break(step.scenario)
            case "cl_mismatch":
                await self.head(step.status, typed, length=len(body) + 500)
                await self.raw(body)
                self.cut()
            case "bad_json_200":
                await self.whole(200, body[:half], headers=headers)
            case "slow_first":
                await self.head(step.status, typed)
                await self.sleep(60_000)
            case "split_utf8":
                await self.head(step.status, typed)
                await self._dribble(body)
                await self.end()
            case "gzip" | "gzip_trunc" | "gzip_lie":
                packed = zlib.compress(body, wbits=31) if step.scenario != "gzip_lie" else body
                packed = packed[:-8] if step.scenario == "gzip_trunc" else packed
                await self.whole(step.status, packed, headers=[("content-encoding", "gzip"), *headers])
            case "http10":
                await self.head(step.status, typed, version="HTTP/1.0")
                await self.body(body)
                self.cut()
            case _:
                await self.whole(step.status, body, step.content_type or "application/json", headers)

    async def stream_with(self, step: Step, frames: Sequence[bytes], content_type: str, headers: Headers) -> AsyncIterator[int]:
        """Send frames as the step's scenario lets them out; yields the number of each as it has gone."""
        if await self._instead_of_answer(step, headers):
            return
        scenario, frames = step.scenario, list(frames)
        if scenario == "bad_frame":
            frames.insert(2, self.simulator.bad_frame())
        elif scenario == "bad_frames_only":
            frames = [self.simulator.bad_frame()] * 4
        elif scenario == "error_frame":
            frames = [*frames[:3], self.simulator.error_frame()]
        elif scenario == "error_first":
            frames = [self.simulator.error_frame()]
        elif scenario == "big_frame":
            frames.insert(1, self.simulator.big_frame())
        elif scenario == "no_trailing_newline":
            frames[-1] = frames[-1].rstrip(b"\n")
        elif scenario == "crlf":
            frames = [frame.replace(b"\n", b"\r\n") for frame in frames]
        elif scenario == "comments":
            frames = [b": SIM PROCESSING\n\n", *frames]
        elif scenario == "no_done":
            frames = [frame for frame in frames if b"[DONE]" not in frame]

        packer = zlib.compressobj(wbits=31) if scenario in ("gzip", "gzip_trunc") or step.gzip else None
        typed = [("content-type", step.content_type or content_type), *headers]
        if packer or scenario == "gzip_lie":
            typed.append(("content-encoding", "gzip"))
        await self.head(step.status, typed, version="HTTP/1.0" if scenario == "http10" else "HTTP/1.1")
        await self.sleep(step.delay_first_ms or (60_000 if scenario == "slow_first" else 0))
        if scenario in ("coalesced", "chunk_splits_frame"):
            joined = b"".join(frames)
            pieces = [joined] if scenario == "coalesced" else [joined[at : at + 37] for at in range(0, len(joined), 37)]
            for piece in pieces:
                await self.body(piece)
            for number in range(len(frames)):
                yield self._sent(number)
        else:
            for number, frame in enumerate(frames):
                if number:
                    await self.sleep(step.delay_frame_ms)
                if number == 3 and scenario in ("abort_mid", "eof_mid", "stall", "half_close"):
                    await self._break(scenario)
                    return
                if number == 0 and scenario in ("abort_first", "eof_first"):
                    await self._break(scenario)
                    return
                if number == 1 and scenario == "eof_handshake":
                    await self._break(scenario)
                    return
                if scenario == "split_utf8":
                    await self._dribble(frame)
                else:
                    await self.body(packer.compress(frame) + packer.flush(zlib.Z_SYNC_FLUSH) if packer else frame)
                yield self._sent(number)
        if packer:
            await self.body(packer.flush()[: -8 if scenario == "gzip_trunc" else None])
        if scenario == "reset_after":
            await self._break("abort_mid")
            return
        if scenario == "late_end":
            await self.sleep(300)
        await self.end()
        if scenario == "http10":
            self.cut()

    def _sent(self, number: int) -> int:
        self.seen.frames_sent = number + 1
        return number

    async def _instead_of_answer(self, step: Step, headers: Headers) -> bool:
        """Scenarios in which no answer comes. True when it was one of them."""
        match step.scenario:
            case "html_502":
                await self.whole(502, PAGE, "text/html", headers)
            case "html_200":
                await self.whole(200, PAGE, "text/html", headers)
            case "empty_200":
                await self.whole(200, b"", headers=headers)
            case "redirect":
                await self.whole(307, b"", headers=[("location", f"{self.simulator.origin}/redirected"), *headers])
            case "slow_headers":
                await self.sleep(60_000)
                return False
            case "dribble_headers":
                for byte in b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" * 20:
                    await self.raw(bytes([byte]))
                    await self.sleep(100)
            case "reset":
                self.reset()
            case "close":
                self.cut()
            case "bad_status":
                await self.raw(b"HTTP/1.1 999 Weird\r\ncontent-length: 0\r\n\r\n")
            case "garbage":
                await self.raw(b"\x00\x01 this is not HTTP\r\n\r\n")
                self.cut()
            case "huge_header":
                await self.raw(b"HTTP/1.1 200 OK\r\nx-huge: " + b"a" * 300_000 + b"\r\ncontent-length: 0\r\n\r\n")
            case "bad_json_200" if isinstance(self.seen.json, dict) and self.seen.json.get("stream"):
                await self.whole(200, b'{"id": "sim", "choices": [{"ind', headers=headers)
            case _:
                return False
        return True

    async def _break(self, scenario: str) -> None:
        if scenario.startswith("abort"):
            await self.sleep(20)  # what was written shall arrive: a reset throws away what is under way
            self.reset()
        elif scenario == "stall":
            await self.until_peer_leaves()
        elif scenario == "half_close":
            self._writer.write_eof()
            await self.sleep(60_000)
        else:
            self.cut()

    async def _dribble(self, data: bytes) -> None:
        for at in range(0, len(data), 3):
            await self.body(data[at : at + 3])
            await asyncio.sleep(0)


async def _read_request(reader: asyncio.StreamReader, number: int) -> Seen | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, target, _ = first.split(" ", 2)
    headers = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    by_name = {name.lower(): value for name, value in headers}
    if by_name.get("transfer-encoding", "").lower() == "chunked":
        body = await _read_chunked(reader)
    else:
        body = await reader.readexactly(int(by_name.get("content-length") or 0))
    parts = urlsplit(target)
    seen = Seen(method, unquote(parts.path), dict(parse_qsl(parts.query)), headers, body, time.monotonic(), number)
    with contextlib.suppress(ValueError):
        seen.json = json.loads(body) if body else None
    return seen


async def _read_chunked(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    while (await reader.readline()).strip():
        pass
    return body


def _as_json(seen: Seen) -> dict[str, Any]:
    return {
        "method": seen.method,
        "path": seen.path,
        "query": seen.query,
        "headers": seen.headers,
        "body": base64.b64encode(seen.body).decode(),
        "json": seen.json,
        "scenario": seen.scenario,
        "unknown_fields": seen.unknown_fields,
        "peer_closed_early": seen.peer_left_at is not None,
    }


def compact(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def words(text: str) -> int:
    """The unit in which all simulators count tokens."""
    return len(text.split())


__all__ = ["CREATED", "Bill", "Call", "Headers", "PeerLeft", "Seen", "Simulator", "Step", "compact", "replace", "words"]
