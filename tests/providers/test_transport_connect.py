"""Getting there: names, addresses, time, certificates and proxies."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
import uvloop

from providers.egress import Egress, EgressRefused, networks
from providers.exchange import failure_of
from providers.failures import NoConnectionFree, UpstreamUnreachable, gateway_error
from tests.proxies.calls import QUICK, call, fetch, settle, transport
from tests.proxies.certificates import Authority
from tests.proxies.scripted import HELLO, Peer, answers, origin

AUTHORITY = Authority()
IMPATIENT = replace(QUICK, pool_wait_seconds=0.1, connect_seconds=0.3)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A resolver of our own: name -> addresses, or an exception to raise, or a number of seconds to keep silent."""
    known: dict[str, Any] = {}

    def getaddrinfo(host: str, port: object, *_: object, **__: object) -> list[object]:
        asked.append(host)
        answer = known.get(host, socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
        if isinstance(answer, float):
            time.sleep(answer)
            answer = ["127.0.0.1"]
        if isinstance(answer, Exception):
            raise answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0)) for address in answer]

    asked: list[str] = []
    known["asked"] = asked
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


@contextmanager
def black_hole(port: int = 0) -> Iterator[tuple[str, int]]:
    """An address at which connections are begun and never made: its line of callers is full."""
    with ExitStack() as sockets:
        listener, *callers = (sockets.enter_context(socket.socket()) for _ in range(5))
        listener.bind(("127.0.0.3", port))
        listener.listen(0)
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield listener.getsockname()


# Names


async def test_f21_a_name_that_does_not_resolve_is_told_at_once(names: dict[str, Any]):
    async with transport() as via:
        with pytest.raises(httpx.ConnectError, match=r"nowhere\.example was not found"):
            await fetch(via, call("http://nowhere.example"))


async def test_f21_a_slow_resolver_costs_no_more_than_the_time_to_connect(names: dict[str, Any]):
    names["slow.example"] = 0.7
    async with transport(timeouts=IMPATIENT) as via:
        began = time.monotonic()
        with pytest.raises(httpx.ConnectTimeout):
            await fetch(via, call("http://slow.example"))
        assert time.monotonic() - began < 0.3 + 1
        [pool] = via._pools.values()
        assert pool.taken == 0
    await asyncio.sleep(0.5)


async def test_f21_one_slow_name_keeps_one_thread_busy_and_no_other_name_waits(names: dict[str, Any]):
    names["slow.example"] = 0.7
    names["quick.example"] = ["127.0.0.1"]
    async with origin(answers(HELLO)) as there, transport(timeouts=IMPATIENT) as via:
        slow = [asyncio.create_task(fetch(via, call(f"http://slow.example:{there.port}", credential_id=n))) for n in range(40)]
        await asyncio.sleep(0.01)
        assert await fetch(via, call(f"http://quick.example:{there.port}")) == (200, b"hello")
        results = await asyncio.gather(*slow, return_exceptions=True)
        assert {type(result) for result in results} == {httpx.ConnectTimeout}
        assert names["asked"].count("slow.example") == 1
    await asyncio.sleep(0.5)


async def test_f21_a_failed_look_up_spoils_nothing(names: dict[str, Any]):
    """Neither the connections that there are, nor the next look-up."""
    names["there.example"] = ["127.0.0.1"]
    async with origin(answers(HELLO)) as there, transport() as via:
        url = f"http://there.example:{there.port}"
        assert await fetch(via, call(url)) == (200, b"hello")
        names["there.example"] = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        assert await fetch(via, call(url)) == (200, b"hello")
        with pytest.raises(httpx.ConnectError):
            await fetch(via, call(url, credential_id=2))
        names["there.example"] = ["127.0.0.1"]
        assert await fetch(via, call(url, credential_id=2)) == (200, b"hello")
        assert there.connections == 2


async def test_who_stops_waiting_for_a_name_does_not_stop_the_others(names: dict[str, Any]):
    names["slow.example"] = 0.2
    async with origin(answers(HELLO)) as there, transport() as via:
        first, second = (asyncio.create_task(fetch(via, call(f"http://slow.example:{there.port}"))) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        assert await second == (200, b"hello")
        assert names["asked"] == ["slow.example"]


async def test_an_address_is_not_looked_up(names: dict[str, Any]):
    async with origin(answers(HELLO)) as there, transport() as via:
        assert await fetch(via, call(there.url)) == (200, b"hello")
    assert names["asked"] == []


# Addresses


async def test_the_second_address_serves_when_the_first_does_not(names: dict[str, Any]):
    names["two.example"] = ["127.0.0.2", "127.0.0.1"]  # nobody listens on the first
    async with origin(answers(HELLO)) as there, transport() as via:
        assert await fetch(via, call(f"http://two.example:{there.port}")) == (200, b"hello")


async def test_an_address_that_never_answers_leaves_time_for_the_next(names: dict[str, Any]):
    async with origin(answers(HELLO)) as there, transport(timeouts=replace(QUICK, connect_seconds=2)) as via:
        with black_hole(there.port) as (address, port):
            names["two.example"] = [address, "127.0.0.1"]
            assert await fetch(via, call(f"http://two.example:{port}")) == (200, b"hello")


async def test_f07_connecting_takes_no_longer_than_its_timer():
    with black_hole() as (address, port):
        async with transport(timeouts=IMPATIENT) as via:
            began = time.monotonic()
            with pytest.raises(httpx.ConnectTimeout):
                await fetch(via, call(f"http://{address}:{port}"))
            assert 0.27 <= time.monotonic() - began < 1.3


async def test_f07_the_time_to_connect_includes_tls():
    async def silent(peer: Peer) -> None:
        await asyncio.sleep(5)

    async with origin(silent) as there, transport(timeouts=IMPATIENT) as via:
        began = time.monotonic()
        with pytest.raises(httpx.ConnectTimeout):
            await fetch(via, call(there.url.replace("http:", "https:")))
        assert 0.27 <= time.monotonic() - began < 1.3
        await settle()
        [pool] = via._pools.values()
        assert pool.taken == 0


# TLS

LOOPS: list[Callable[[], Any]] = [asyncio.new_event_loop, uvloop.new_event_loop]


def run(new_loop: Callable[[], Any], main: Any) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_tls_with_an_authority_of_ones_own(new_loop: Callable[[], Any]):
    async def main() -> None:
        async with origin(answers(HELLO), tls=AUTHORITY.server("127.0.0.1")) as there, transport() as via:
            url = there.url.replace("http:", "https:")
            with pytest.raises(httpx.ConnectError, match=r"certificate was not accepted: (self-signed|unable to get local issuer)"):
                await fetch(via, call(url))
            for _ in range(2):
                assert await fetch(via, call(url, ca_pem=AUTHORITY.pem)) == (200, b"hello")
            await settle()
            assert there.open == 1

    run(new_loop, main())


@pytest.mark.parametrize("certified", ["127.0.0.9", "other.example"])
async def test_tls_for_another_name_is_refused(certified: str):
    async with origin(answers(HELLO), tls=AUTHORITY.server(certified)) as there, transport() as via:
        with pytest.raises(httpx.ConnectError, match=r"certificate was not accepted: (IP address mismatch|Hostname mismatch)"):
            await fetch(via, call(there.url.replace("http:", "https:"), ca_pem=AUTHORITY.pem))


async def test_tls_asks_for_the_name_and_not_for_the_address(names: dict[str, Any]):
    names["llm.example"] = names["llm.example."] = ["127.0.0.1"]
    asked: list[str | None] = []
    tls = AUTHORITY.server("llm.example")
    tls.sni_callback = lambda connection, name, context: asked.append(name)
    async with origin(answers(HELLO), tls=tls) as there, transport() as via:
        for host in ("llm.example", "LLM.example.", "llm.example."):
            assert await fetch(via, call(f"https://{host}:{there.port}", ca_pem=AUTHORITY.pem)) == (200, b"hello")
    assert asked == ["llm.example", "llm.example"]


async def test_one_authority_is_not_believed_for_another_credential():
    async with origin(answers(HELLO), tls=AUTHORITY.server("127.0.0.1")) as there, transport() as via:
        url = there.url.replace("http:", "https:")
        await fetch(via, call(url, ca_pem=AUTHORITY.pem))
        for ca_pem in ("", Authority().pem):
            with pytest.raises(httpx.ConnectError):
                await fetch(via, call(url, ca_pem=ca_pem))


async def test_no_tls_where_tls_was_meant_and_the_reverse():
    async def plainly(peer: Peer) -> None:
        await peer.reader.read(100)
        await peer.say(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    async with origin(plainly) as plain, transport() as via:
        with pytest.raises(httpx.ConnectError):
            await fetch(via, call(plain.url.replace("http:", "https:")))
    async with origin(answers(HELLO), tls=AUTHORITY.server("127.0.0.1")) as secure, transport() as via:
        with pytest.raises(httpx.TransportError):
            await fetch(via, call(secure.url))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_an_old_tls_is_refused():
    old = AUTHORITY.server("127.0.0.1")
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    async with origin(answers(HELLO), tls=old) as there, transport() as via:
        with pytest.raises(httpx.ConnectError):
            await fetch(via, call(there.url.replace("http:", "https:"), ca_pem=AUTHORITY.pem))


async def test_a_text_that_is_no_certificate_is_a_failure_to_connect():
    async with transport() as via:
        with pytest.raises(httpx.ConnectError):
            await fetch(via, call("https://127.0.0.1:9", ca_pem="rubbish"))


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_large_body_over_tls_is_held_back_and_whole(new_loop: Callable[[], Any]):
    body = b"x" * (8 << 20)

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body)

    async def main() -> None:
        async with origin(script, tls=AUTHORITY.server("127.0.0.1")) as there, transport() as via:
            outgoing = call(there.url.replace("http:", "https:"), ca_pem=AUTHORITY.pem, body=b"y" * (2 << 20))
            for _ in range(2):
                status, came = await fetch(via, outgoing)
                assert (status, len(came)) == (200, len(body))
            assert there.connections == 1

    run(new_loop, main())


# Proxies


async def proxying(peer: Peer) -> None:
    """An HTTP proxy: tunnels after CONNECT, and fetches what is asked for with a whole address."""
    head = await peer.reader.readuntil(b"\r\n\r\n")
    SEEN.append(head.split(b"\r\n")[0])
    method, target, _ = head.split(b" ", 2)
    host, _, port = target.removeprefix(b"http://").partition(b"/")[0].rpartition(b":")
    reader, writer = await asyncio.open_connection(host.decode(), int(port))
    if method == b"CONNECT":
        peer.writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    else:
        writer.write(head)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)

    try:
        await asyncio.gather(pump(peer.reader, writer), pump(reader, peer.writer))
    finally:
        writer.close()


SEEN: list[bytes] = []


async def test_a_credential_with_a_proxy_goes_through_it_and_no_other_does():
    SEEN.clear()
    async with (
        origin(answers(HELLO)) as plain,
        origin(answers(HELLO), tls=AUTHORITY.server("127.0.0.1")) as secure,
        origin(proxying) as proxy,
        transport() as via,
    ):
        assert await fetch(via, call(plain.url, proxy_url=proxy.url)) == (200, b"hello")
        url = secure.url.replace("http:", "https:")
        assert await fetch(via, call(url, proxy_url=proxy.url, ca_pem=AUTHORITY.pem)) == (200, b"hello")
        with pytest.raises(httpx.ConnectError):
            await fetch(via, call(url, proxy_url=proxy.url))
        assert await fetch(via, call(plain.url)) == (200, b"hello")
        assert [line.split(b" ")[0] for line in SEEN] == [b"POST", b"CONNECT", b"CONNECT"]


async def test_the_environments_proxies_have_no_say(monkeypatch: pytest.MonkeyPatch):
    async with origin(answers(HELLO)) as there, origin(proxying) as proxy, transport() as via:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert await fetch(via, call(there.url)) == (200, b"hello")
        assert proxy.connections == 0


async def test_a_proxy_must_be_allowed_and_so_must_what_lies_behind_it():
    async with origin(answers(HELLO)) as there, origin(proxying) as proxy:
        async with transport(egress=Egress()) as via:
            with pytest.raises(EgressRefused):
                await fetch(via, call("http://93.184.216.34", proxy_url=proxy.url))
        async with transport(egress=Egress(networks(["127.0.0.1/32"]))) as via:
            for inner in ("http://10.0.0.1", "http://169.254.169.254/latest", "http://127.0.0.2"):
                with pytest.raises(EgressRefused):
                    await fetch(via, call(inner, proxy_url=proxy.url))
        assert (there.connections, proxy.connections) == (0, 0)


async def test_a_proxy_that_is_away_is_an_upstream_that_cannot_be_reached():
    async with origin(answers(HELLO)) as gone:
        url = gone.url
    async with transport() as via:
        with pytest.raises(httpx.ConnectError):
            await fetch(via, call("http://127.0.0.1:9", proxy_url=url))


# In the words of the trip


def test_what_could_not_be_reached_is_told_to_clients_without_names():
    problem = failure_of(httpx.ConnectError("The name inner.example was not found"))

    assert type(problem) is UpstreamUnreachable
    assert "inner.example" not in problem.message
    assert "inner.example" in problem.detail


def test_a_full_pool_is_a_503_that_says_when_to_come_back_and_ejects_nobody():
    problem = failure_of(httpx.PoolTimeout("full"))

    assert isinstance(problem, NoConnectionFree)
    assert (problem.status, problem.code, problem.retry_after_seconds) == (503, "overloaded", 1)
    assert not gateway_error(problem)
    assert gateway_error(failure_of(httpx.ConnectError("")))
