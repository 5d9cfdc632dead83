"""F06: whatever an upstream does wrong, down to the socket, has its outcome in the table below: in its time, with one usage
row, and without a word to the client that is not ours. F07: the timers, through a running server. F09: what is sent twice.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.proxies.certificates import Authority
from tests.proxies.fault import Fault, FaultProxy
from tests.proxy.test_gateway import House
from tests.serving import Sluice, eventually, free_port
from tests.upstreams.openai import DONE, OpenAIUpstream, Step, sse

CONNECT, FIRST_BYTE, IDLE, TOTAL = 0.3, 0.6, 0.4, 1.5
AT_ONCE = 0.0
HELLO = [{"role": "user", "content": "Hello there"}]
AUTHORITY = Authority()


@dataclass(frozen=True)
class Outcome:
    """What the client is told, and after how many seconds. A stream that has begun ends with the same code in an event."""

    status: int
    code: str
    after: float = AT_ONCE


Told = dict[str, Outcome | None]  # request id -> what the client was told; None: whatever it was


def late(after: float) -> Outcome:
    return Outcome(504, "upstream_timeout", after)


OK = Outcome(200, "")
LOST = Outcome(502, "upstream_error")
BAD = Outcome(502, "upstream_bad_response")
BROKE = Outcome(502, "upstream_broke")
AWAY = Outcome(502, "upstream_unreachable")

# What the simulated upstream does -> the outcome of a whole answer and of a stream; None: it is the same as being well.
SCENARIOS: dict[str, tuple[Outcome | None, Outcome | None]] = {
    # Instead of an answer
    "html_502": (LOST, LOST),
    "html_200": (BAD, BAD),
    "empty_200": (BAD, BAD),
    "bad_json_200": (BAD, BAD),
    "redirect": (LOST, LOST),
    "bad_status": (LOST, LOST),
    "garbage": (BAD, BAD),
    "huge_header": (BAD, BAD),
    "reset": (LOST, LOST),
    "close": (BAD, BAD),
    "slow_headers": (late(FIRST_BYTE), late(FIRST_BYTE)),
    "dribble_headers": (late(FIRST_BYTE), late(FIRST_BYTE)),
    # In the middle of one
    "abort_mid": (LOST, LOST),
    "eof_mid": (BAD, BAD),
    "stall": (late(IDLE), late(IDLE)),
    "slow_first": (late(IDLE), late(IDLE)),
    "half_close": (None, BAD),
    "cl_mismatch": (BAD, None),
    "gzip_lie": (BAD, BAD),
    "gzip_trunc": (BAD, OK),  # the stream itself had ended before the cut
    "abort_first": (None, LOST),
    "eof_first": (None, BAD),
    "eof_handshake": (None, BAD),
    "bad_frames_only": (None, BAD),
    "error_first": (None, LOST),
    "error_frame": (None, BROKE),
    # Odd, and no fault
    "bad_frame": (None, OK),
    "big_frame": (None, OK),
    "no_trailing_newline": (None, OK),
    "no_done": (None, OK),
    "crlf": (None, OK),
    "comments": (None, OK),
    "coalesced": (None, OK),
    "chunk_splits_frame": (None, OK),
    "reset_after": (None, OK),
    "late_end": (None, OK),
    "split_utf8": (OK, OK),
    "gzip": (OK, OK),
    "http10": (OK, OK),
}

# The head of a simulated answer is about 400 bytes long, a whole answer 750, and the first words of a stream are there at 900.
IN_THE_HEAD, IN_THE_BODY, IN_THE_WORDS = 100, 600, 1300
FAULTS: dict[str, tuple[Fault, Outcome, Outcome]] = {
    "closes at once": (Fault(refuse="close"), BAD, BAD),
    "resets at once": (Fault(refuse="reset"), LOST, LOST),
    "never says a word": (Fault(refuse="black_hole"), late(FIRST_BYTE), late(FIRST_BYTE)),
    "says something that is not HTTP": (Fault(instead=b"\x16\x03\x01\x02\x00garbage\r\n\r\n"), BAD, BAD),
    "says a line without an end": (Fault(instead=b"HTTP/1.1 200 " + b"O" * (1 << 20)), BAD, BAD),
    "says a header without an end": (Fault(instead=b"HTTP/1.1 200 OK\r\nX: " + b"a" * (1 << 20)), BAD, BAD),
    "says ten thousand headers": (Fault(instead=b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000), BAD, BAD),
    "says a page": (Fault(instead=b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"), BAD, BAD),
    "is late, and in time": (Fault(delay=0.4), OK, OK),
    "drips its head": (Fault(drip=0.1), late(FIRST_BYTE), late(FIRST_BYTE)),
    "drips its body": (Fault(drip=0.2, drip_after=IN_THE_BODY), late(TOTAL), late(TOTAL)),
    "drips a byte a second": (Fault(drip=1.0, drip_after=IN_THE_BODY), late(IDLE), late(IDLE)),
    "is cut off in the head by FIN": (Fault(cut_after=IN_THE_HEAD), BAD, BAD),
    "is cut off in the head by RST": (Fault(cut_after=IN_THE_HEAD, end="reset"), LOST, LOST),
    "is half closed in the head": (Fault(cut_after=IN_THE_HEAD, end="half_close"), BAD, BAD),
    "falls silent in the head": (Fault(cut_after=IN_THE_HEAD, end="black_hole"), late(FIRST_BYTE), late(FIRST_BYTE)),
    "is cut off in the body by FIN": (Fault(cut_after=IN_THE_BODY), BAD, BAD),
    "is cut off in the body by RST": (Fault(cut_after=IN_THE_BODY, end="reset"), LOST, LOST),
    "is half closed in the body": (Fault(cut_after=IN_THE_BODY, end="half_close"), BAD, BAD),
    "falls silent in the body": (Fault(cut_after=IN_THE_BODY, end="black_hole"), late(IDLE), late(IDLE)),
    "is cut off among the words by FIN": (Fault(cut_after=IN_THE_WORDS), OK, BAD),
    "is cut off among the words by RST": (Fault(cut_after=IN_THE_WORDS, end="reset"), OK, LOST),
    "falls silent among the words": (Fault(cut_after=IN_THE_WORDS, end="black_hole"), OK, late(IDLE)),
    "spoils its first byte": (Fault(corrupt_at=0), BAD, BAD),
    "spoils its status": (Fault(corrupt_at=9), BAD, BAD),
    "spoils a header": (Fault(corrupt_at=16), BAD, BAD),
}


@dataclass(frozen=True)
class At:
    """An upstream by its address alone."""

    base_url: str


@pytest.fixture(scope="module")
def upstreams() -> Iterator[tuple[OpenAIUpstream, FaultProxy]]:
    with OpenAIUpstream() as upstream, FaultProxy(upstream.port) as proxy:
        yield upstream, proxy


@pytest.fixture(scope="module")
def elsewhere(upstreams: tuple[OpenAIUpstream, FaultProxy]) -> Iterator[dict[str, FaultProxy | At]]:
    """Prefix -> an upstream that is hard to get to."""
    with contextlib.ExitStack() as stack:
        secure = stack.enter_context(FaultProxy(upstreams[0].port, tls=AUTHORITY.server("127.0.0.1")))
        listener, *callers = (stack.enter_context(socket.socket()) for _ in range(5))
        listener.bind(("127.0.0.4", 0))
        listener.listen(0)
        for caller in callers:  # they fill its line, so that no other connection is ever made
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield {
            "nobody-listens": At(f"http://127.0.0.1:{free_port()}/v1"),
            "never-connects": At("http://{}:{}/v1".format(*listener.getsockname())),
            "no-such-name": At("http://no-such-host.invalid/v1"),
            "no-tls": At(f"https://127.0.0.1:{upstreams[0].port}/v1"),
            "unknown-authority": secure,
            "trusted": secure,
        }


@pytest.fixture(scope="module")
def quick(serve: Callable[..., Sluice], upstreams: tuple[OpenAIUpstream, FaultProxy], elsewhere: dict[str, FaultProxy | At]) -> Sluice:
    sluice = serve(
        POOL_WAIT_SECONDS="0.1",
        CONNECT_SECONDS=str(CONNECT),
        FIRST_BYTE_SECONDS=str(FIRST_BYTE),
        IDLE_SECONDS=str(IDLE),
        TOTAL_SECONDS=str(TOTAL),
        HEARTBEAT_SECONDS="0.2",
    )
    upstream, proxy = upstreams
    sluice.add_openai(upstream, prefix="sim", secret="sk-sim-ok")
    sluice.add_openai(proxy, prefix="tcp", secret="sk-sim-ok")
    sluice.add_openai(proxy, prefix="pair", secret="sk-sim-ok", priority=10)
    sluice.add_openai(upstream, prefix="pair", secret="sk-sim-ok~2")
    for prefix, there in elsewhere.items():
        settings = {"ca_pem": AUTHORITY.pem} if prefix == "trusted" else {}
        sluice.add_openai(there, prefix=prefix, secret="sk-sim-ok", **settings)
    sluice.manage("refresh_models")  # so that no sweep comes between the tests
    sluice.wait_for("sim", "trusted")
    return sluice


@pytest.fixture(scope="module")
def told(quick: Sluice) -> Iterator[Told]:
    """What each call was told, by its request id. At the end each must have its one row: looking them up one by one takes long."""
    outcomes: Told = {}
    yield outcomes
    rows: dict[str, list[dict[str, Any]]] = {}

    def all_there() -> bool:
        rows.clear()
        for row in quick.usage():
            rows.setdefault(row["request_id"], []).append(row)
        return outcomes.keys() <= rows.keys()

    eventually(all_there, "some calls have no row")
    for request_id, outcome in outcomes.items():
        [row] = rows[request_id]
        if outcome is None:
            continue
        assert (row["error"], row["attempts"]) == (outcome.code, 1), row
        assert row["status"] in (outcome.status, 502), row
        assert outcome is not AWAY or row["cost_usd"] == 0, row


@pytest.fixture
def upstream(upstreams: tuple[OpenAIUpstream, FaultProxy]) -> OpenAIUpstream:
    upstreams[0].reset()
    return upstreams[0]


@pytest.fixture
def proxy(upstreams: tuple[OpenAIUpstream, FaultProxy], upstream: OpenAIUpstream) -> FaultProxy:
    return upstreams[1]


@pytest.fixture(scope="module")
def client(quick: Sluice) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{quick.url}/v1", headers={"authorization": f"Bearer {quick.issue_key()}"}, timeout=15) as client:
        yield client


def ask(client: httpx.Client, model: str, *, stream: bool) -> httpx.Response:
    return client.post("chat/completions", json={"model": model, "messages": HELLO, "stream": stream})


def holds(outcome: Outcome, sluice: Sluice, client: httpx.Client, model: str, told: Told, *, stream: bool) -> httpx.Response:
    """Ask, and compare all that can be seen with the table."""
    log_starts = sluice.log_size()
    began = time.monotonic()
    answer = ask(client, model, stream=stream)
    took = time.monotonic() - began

    assert outcome.after * 0.9 <= took < outcome.after + 1
    *events, last = answer.text.strip().split("\n\n")
    if outcome.status == 200:
        assert answer.status_code == 200
        assert '"error"' not in answer.text
        assert not stream or answer.content.endswith(DONE.rstrip(b"\n")) or answer.content.rstrip().endswith(b"data: [DONE]")
    else:
        if answer.status_code == 200:  # something has been said already: a comment at least
            assert stream
            assert events
            assert last.startswith("data: ")
        else:
            assert answer.status_code == outcome.status
            assert events == []
        problem = json.loads(last.removeprefix("data: "))["error"]
        assert problem["code"] == outcome.code
        assert len(problem["message"]) < 200
        assert "[DONE]" not in answer.text
        for word in ("Traceback", "127.0.0.1", "<html", "sk-sim", "httpx", "garbage"):
            assert word not in answer.text
    told[answer.headers["x-request-id"]] = outcome
    assert "Traceback" not in sluice.log(log_starts)
    return answer


@pytest.mark.parametrize(
    ("scenario", "stream"),
    [(name, stream) for name, outcomes in SCENARIOS.items() for stream in (False, True) if outcomes[stream] is not None],
)
def test_f06_what_an_upstream_does_wrong(
    client: httpx.Client, quick: Sluice, told: Told, upstream: OpenAIUpstream, scenario: str, stream: bool
) -> None:
    outcome = SCENARIOS[scenario][stream]
    assert outcome is not None

    holds(outcome, quick, client, f"sim/sim-{scenario}", told, stream=stream)

    assert len(upstream.posts) == 1
    eventually(lambda: upstream.posts[0].finished_at or upstream.posts[0].peer_left_at, "the upstream goes on", seconds=1)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", FAULTS)
def test_f06_what_happens_on_the_way(client: httpx.Client, quick: Sluice, told: Told, proxy: FaultProxy, name: str, stream: bool) -> None:
    fault, *outcomes = FAULTS[name]
    proxy.play(fault)

    holds(outcomes[stream], quick, client, "tcp/gpt-4o", told, stream=stream)

    eventually(lambda: proxy.open == 0 or outcomes[stream] == OK, "the connection is still there", seconds=1)
    proxy.play(Fault())
    assert ask(client, "tcp/gpt-4o", stream=stream).status_code == 200


@pytest.mark.parametrize("at", [20, 300, 450, 620, 700, 1000])
def test_f06_a_spoilt_byte_anywhere_never_hangs_or_shows(
    client: httpx.Client, quick: Sluice, told: Told, proxy: FaultProxy, at: int
) -> None:
    """It may hit a letter of the text, which nobody can know. Whatever it hits, there is an answer and a row."""
    for stream in (False, True):
        proxy.play(Fault(corrupt_at=at))
        began = time.monotonic()
        answer = ask(client, "tcp/gpt-4o", stream=stream)
        assert time.monotonic() - began < FIRST_BYTE + IDLE + 1
        assert answer.status_code in (200, 502, 504)
        assert "Traceback" not in answer.text
        told[answer.headers["x-request-id"]] = None


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("prefix", ["nobody-listens", "no-tls", "unknown-authority"])
def test_f06_an_upstream_that_cannot_be_reached(client: httpx.Client, quick: Sluice, told: Told, prefix: str, stream: bool) -> None:
    log_starts = quick.log_size()

    holds(AWAY, quick, client, f"{prefix}/gpt-4o", told, stream=stream)

    if prefix == "unknown-authority":
        assert "Its certificate was not accepted" in quick.log(log_starts)


def test_f06_an_upstream_whose_authority_is_given(client: httpx.Client, quick: Sluice, told: Told) -> None:
    for stream in (False, True):
        holds(OK, quick, client, "trusted/gpt-4o", told, stream=stream)


def test_f06_a_name_that_nobody_knows(client: httpx.Client, quick: Sluice) -> None:
    """How soon that is known is the resolver's to say; it is not waited for longer than for a connection."""
    began = time.monotonic()
    answer = ask(client, "no-such-name/gpt-4o", stream=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreachable")
    assert time.monotonic() - began < CONNECT + 1
    assert "no-such-host" not in answer.text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_f07_connections_that_are_never_made(client: httpx.Client, quick: Sluice, told: Told, stream: bool) -> None:
    holds(Outcome(502, "upstream_unreachable", CONNECT), quick, client, "never-connects/gpt-4o", told, stream=stream)


def test_f06_an_event_of_a_mebibyte_and_twenty_thousand_events(client: httpx.Client, quick: Sluice, upstream: OpenAIUpstream) -> None:
    words = [sse({"id": "x", "choices": [{"index": 0, "delta": {"content": f"{number} "}}]}) for number in range(20_000)]
    large = sse({"id": "x", "choices": [{"index": 0, "delta": {"content": "x" * (1 << 20)}}]})
    end = [sse({"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}), DONE]
    upstream.script(Step(scenario="coalesced", frames=[*words, large, *end]))

    answer = ask(client, "sim/gpt-4o", stream=True)

    assert answer.content == b"".join([*words, large, *end])
    assert quick.row(answer.headers["x-request-id"])["status"] == 200


def test_f07_the_total_ends_even_what_never_stops_talking(
    client: httpx.Client, quick: Sluice, told: Told, upstream: OpenAIUpstream
) -> None:
    upstream.script(Step(text="word " * 200, delay_frame_ms=100))

    answer = holds(late(TOTAL), quick, client, "sim/gpt-4o", told, stream=True)

    assert answer.text.count('"content":') > 10
    eventually(lambda: upstream.posts[0].peer_left_at, "the upstream goes on", seconds=1)


# F09


def test_f09_a_kept_connection_that_died_unread_costs_one_execution(
    client: httpx.Client, proxy: FaultProxy, upstream: OpenAIUpstream
) -> None:
    proxy.play(Fault(kept="unread"))
    for stream in (False, True):
        for _ in range(2):
            answer = ask(client, "tcp/gpt-4o", stream=stream)
            assert answer.status_code == 200
            assert upstream.bill(answer.headers["x-request-id"]).posts == 1
    assert proxy.connections == 4


def test_f09_a_kept_connection_that_died_on_the_way_back_costs_two_at_most(
    client: httpx.Client, quick: Sluice, proxy: FaultProxy, upstream: OpenAIUpstream
) -> None:
    proxy.play(Fault(kept="executed"))
    posts = []
    for _ in range(2):
        answer = ask(client, "tcp/gpt-4o", stream=False)
        assert answer.status_code == 200
        posts.append(upstream.bill(answer.headers["x-request-id"]).posts)
        assert quick.row(answer.headers["x-request-id"])["attempts"] == 1
    assert posts == [1, 2]


@pytest.mark.parametrize("cut_after", [0, 1, IN_THE_HEAD, IN_THE_BODY, IN_THE_WORDS])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_f09_on_a_new_connection_a_request_is_executed_once(
    client: httpx.Client, proxy: FaultProxy, upstream: OpenAIUpstream, cut_after: int, stream: bool
) -> None:
    proxy.play(Fault(cut_after=cut_after, end="reset"))
    answer = ask(client, "tcp/gpt-4o", stream=stream)
    assert upstream.bill(answer.headers["x-request-id"]).posts == 1
    assert proxy.connections == 1


def test_f09_after_the_first_word_no_other_account_is_asked(client: httpx.Client, proxy: FaultProxy, upstream: OpenAIUpstream) -> None:
    for cut_after, posts in ((IN_THE_BODY, 2), (IN_THE_WORDS, 1)):
        proxy.play(Fault(cut_after=cut_after, end="reset"))
        answer = ask(client, "pair/gpt-4o", stream=True)
        assert upstream.bill(answer.headers["x-request-id"]).posts == posts
        assert (b"[DONE]" in answer.content) is (posts == 2)


# When all connections are taken


async def test_a_full_pool_is_a_503_that_says_when_to_come_back_and_costs_nothing(tmp_path: Any) -> None:
    def full(request: httpx.Request) -> httpx.Response:
        raise httpx.PoolTimeout("All connections to the upstream are in use.")

    house = House(tmp_path, full)
    for _ in range(6):  # one more than would eject a sick upstream
        reply = await house.call()
        assert (reply.status, reply.error()["code"], reply.headers["retry-after"]) == (503, "overloaded", "1")
    assert (house.settled().usage_source, house.settled().cost) == ("missing", 0)
