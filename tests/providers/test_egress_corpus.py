"""S05: addresses that want the gateway to call where it may not, and S06: a secret goes to its own origin alone.

No way of writing an inner address leads to a connection, whichever door it is tried at. What counts as a connection is
any attempt of a socket, and whatever reaches a listener that stands on loopback for all of them.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from django.core.exceptions import ValidationError

from providers import given
from providers.actions import add_credential, change_credential, secret_of
from providers.egress import Egress, EgressRefused, networks
from providers.exchange import FAILURES
from providers.failures import UpstreamUnreachable
from providers.models import Credential
from providers.secrets import SealBroken
from providers.transport import PooledTransport
from tests.proxies.calls import call, fetch, transport
from tests.proxies.scripted import HELLO, Peer, answers, origin
from tests.serving import Sluice
from tests.upstreams.openai import OpenAIUpstream

# Names that the resolver of these tests knows. What is not here is only understood if it is a number in some notation.
INNER_NAMES = {
    "localhost": ["127.0.0.1"],
    "localhost.": ["127.0.0.1"],
    "localhost.localdomain": ["127.0.0.1"],
    "ip6-localhost": ["::1"],
    "127.0.0.1.nip.example": ["127.0.0.1"],
    "rebound.example": ["10.0.0.5"],
    "metadata.google.internal": ["169.254.169.254"],
    "metadata": ["169.254.169.254"],
    "instance-data.ec2.internal": ["169.254.169.254"],
    "kubernetes.default.svc": ["10.96.0.1"],
    "host.docker.internal": ["192.168.65.254"],
    "gateway.lan": ["192.168.1.1"],
    "mixed.example": ["93.184.216.34", "127.0.0.1"],
    "mixed-six.example": ["93.184.216.34", "::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "zero.example": ["0.0.0.0"],
    "six-zero.example": ["::"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "sixtofour.example": ["2002:7f00:1::"],
    "teredo.example": ["2001:0:4136:e378:8000:63bf:3fff:fdd2"],
    "multicast.example": ["224.0.0.251"],
    "broadcast.example": ["255.255.255.255"],
    "cgn.example": ["100.64.0.1"],
    "linklocal.example": ["fe80::1"],
    "unique.example": ["fd12:3456:789a::1"],
    "xn--bcher-kva.example": ["10.0.0.7"],
    "a" * 63 + ".example": ["10.0.0.8"],
}

HOSTS = [
    # Loopback as it is usually written, and as few people write it.
    "127.0.0.1", "127.0.0.2", "127.1.2.3", "127.255.255.254", "127.1", "127.0.1", "0", "0.0.0.0", "0.0", "00000000",
    "2130706433", "017700000001", "0x7f000001", "0X7F000001", "0x7f.0.0.1", "0x7f.1", "0177.0.0.1", "0177.1", "127.0x1",
    "0x7f.0x0.0x0.0x1", "0177.0000.0000.0001", "127.0.0.01", "127.00.00.01", "0x00000000007f000001", "127.0.0.1.",
    # IPv6, and IPv4 in its clothes.
    "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[0000::0001]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:127.0.0.1]",
    "[::127.0.0.1]", "[::7f00:1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::]", "[::ffff:0:127.0.0.1]", "[::ffff:169.254.169.254]", "[::ffff:0.0.0.0]", "[::ffff:10.0.0.1]", "[2001:db8::1]",
    "[fe80::1]", "[fec0::1]", "[fc00::1]", "[fd00:ec2::254]", "[ff02::1]", "[ff0e::1]", "[100::1]", "[3fff::1]", "[5f00::1]",
    "[2001::1]", "[2001:10::1]",
    # Networks of one's own, metadata services, and what is nobody's.
    "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.254", "192.168.0.1", "169.254.169.254", "169.254.170.2", "169.254.0.1",
    "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "0xA9.0xFE.0xA9.0xFE", "169.254.43518", "100.64.0.1", "100.100.100.200", "192.0.0.1",
    "192.0.0.170", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1", "224.0.0.1", "239.255.255.255", "240.0.0.1",
    "255.255.255.255", "4294967295", "0xffffffff", "168430081",
    *INNER_NAMES,
]  # fmt: skip

# Written so that two readers might see two hosts, or so that a careless one sees an allowed one.
ODD = [
    "http://93.184.216.34@127.0.0.1:{port}/",
    "http://user:pass@127.0.0.1:{port}/",
    "http://93.184.216.34:80@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}@93.184.216.34/",
    "http://93.184.216.34%40127.0.0.1:{port}/",
    "http://93.184.216.34#@127.0.0.1:{port}/",
    "http://93.184.216.34?@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@93.184.216.34/",
    "http://93.184.216.34\\@127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}/",
    "http:/127.0.0.1:{port}/",
    "http:127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11:{port}/",
    "http://127\u30020\u30020\u30021:{port}/",
    "http://\u2460\u2461\u2466.0.0.1:{port}/",
    "http://loc\u0430lhost:{port}/",
    "http://localho\u017ft:{port}/",
    "http://b\u00fccher.example:{port}/",
    "http://127.0.0.1%00.example:{port}/",
    "http://127.0.0.1\x00.example:{port}/",
    "http://127.0.0.1%2eexample:{port}/",
    "http://127%2e0%2e0%2e1:{port}/",
    "http://%6c%6f%63%61%6c%68%6f%73%74:{port}/",
    "http://127.0.0.1\t:{port}/",
    "http://127.0.0.1 :{port}/",
    " http://127.0.0.1:{port}/",
    "http://\r\n127.0.0.1:{port}/",
    "http://93.184.216.34\r\nHost: 127.0.0.1:{port}/",
    "http://[::1%25lo]:{port}/",
    "http://[fe80::1%25eth0]:{port}/",
    "http://[::1%lo]:{port}/",
    "http://[v1.127.0.0.1]:{port}/",
    "http://[127.0.0.1]:{port}/",
    "http://::1:{port}/",
    "http://127.0.0.1:+{port}/",
    "http://127.0.0.1:0{port}0/",
    "http://127.0.0.1:/{port}",
    "http://127.0.0.1:\uff18\uff10/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/_GET",
    "ftp://127.0.0.1:{port}/",
    "unix:///var/run/docker.sock",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/",
    "ws://127.0.0.1:{port}/",
    "dict://127.0.0.1:{port}/",
    "javascript:127.0.0.1",
    "127.0.0.1:{port}",
    "",
]

Door = Callable[[PooledTransport, str], Awaitable[Any]]


async def natively(via: PooledTransport, url: str) -> None:
    await fetch(via, call(url, "/"))


async def over_httpx(via: PooledTransport, url: str) -> None:
    async with httpx.AsyncClient(transport=via) as client:
        await client.post(url, content=b"{}")


async def through_a_proxy(via: PooledTransport, url: str) -> None:
    await fetch(via, call(url, "/", proxy_url="http://93.184.216.34:3128"))


async def as_a_proxy(via: PooledTransport, url: str) -> None:
    await fetch(via, call("http://93.184.216.34", "/", proxy_url=url.rstrip("/") or "nowhere"))


DOORS: list[Door] = [natively, over_httpx, through_a_proxy, as_a_proxy]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that any socket tried to reach. Only loopback is really tried: the tests stay on this machine."""
    tried: list[str] = []
    real_connect, real_getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            tried.append(address[0])
            if not address[0].startswith(("127.", "::1")):
                raise ConnectionRefusedError("not from here")
        real_connect(self, address)

    def getaddrinfo(host: str, port: Any, *rest: Any, **named: Any) -> list[Any]:
        if host in INNER_NAMES:
            families = {one: socket.AF_INET6 if ":" in one else socket.AF_INET for one in INNER_NAMES[host]}
            return [(family, socket.SOCK_STREAM, 6, "", (one, port or 0)) for one, family in families.items()]
        return real_getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return tried


@asynccontextmanager
async def trap() -> AsyncIterator[tuple[int, list[object]]]:
    """A listener on every address of this machine, and what has come to it."""
    caught: list[object] = []

    def came(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caught.append(writer.get_extra_info("peername"))
        writer.close()

    listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    async with await asyncio.start_server(came, sock=listener):
        yield listener.getsockname()[1], caught


REFUSALS = (*FAILURES, UpstreamUnreachable, httpx.InvalidURL, UnicodeError)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
async def test_s05_no_hostile_address_is_ever_connected_to(door: Door, attempts: list[str]):
    """About a hundred and seventy of them, on the port of a listener that would notice, and on the usual ports."""
    urls = [f"http://{host}:{{port}}/" for host in HOSTS] + [f"https://{host}/" for host in HOSTS] + ODD
    assert len({*HOSTS, *ODD}) > 150, "the corpus has shrunk"
    opened = []
    async with trap() as (port, caught), transport(egress=Egress()) as via:
        for url in urls:
            via._proxied_until.clear()
            try:
                await door(via, url.replace("{port}", str(port)))
                opened.append(url)
            except REFUSALS:
                pass
        await asyncio.sleep(0.05)
    # The proxy that lies on the public internet may be called; what was asked of it must then be public, too.
    public = {"93.184.216.34"}
    assert opened == []
    assert caught == []
    assert set(attempts) <= public
    if door in (natively, as_a_proxy):
        assert attempts == []


async def test_s05_the_trap_catches(attempts: list[str]):
    """The test above would notice: with loopback allowed, the same addresses do connect."""
    async with trap() as (port, caught), transport(egress=Egress(networks(["127.0.0.0/8", "::1/128"]))) as via:
        for host in ("127.0.0.1", "2130706433", "0x7f.1", "localhost", "mapped.example"):
            with pytest.raises(httpx.TransportError):
                await natively(via, f"http://{host}:{port}/")
        await asyncio.sleep(0.05)
    assert len(caught) >= 4
    assert attempts


@pytest.mark.parametrize("url", [url for url in ODD if url == url.strip()])
def test_s05_what_two_readers_could_read_differently_is_no_base_url(url: str):
    """At the door where operators and owners give an address it is refused already."""
    adapter = given.kind("openai")
    with pytest.raises(ValidationError):
        given.base_url(adapter, url.replace("{port}", "8080") or "x")


# Rebinding


class Rebinding:
    """A name whose address changes with each look-up."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked = 0

    def __call__(self, host: str, port: Any, *_: Any, **__: Any) -> list[Any]:
        if host != "rebinding.example":
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        address = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0))]


async def test_s05_what_was_checked_is_what_is_connected_to(attempts: list[str], monkeypatch: pytest.MonkeyPatch):
    """The first look-up gives a public address, any later one an inner one: there is no later one."""
    name = Rebinding("93.184.216.34", "127.0.0.1")
    monkeypatch.setattr(socket, "getaddrinfo", name)
    async with trap() as (port, caught), transport(egress=Egress()) as via:
        with pytest.raises(httpx.ConnectError):
            await natively(via, f"http://rebinding.example:{port}/")
        assert attempts == ["93.184.216.34"]
        assert name.asked == 1
        with pytest.raises(EgressRefused):
            await natively(via, f"http://rebinding.example:{port}/")
        await asyncio.sleep(0.02)
    assert attempts == ["93.184.216.34"]
    assert caught == []


async def test_s05_a_connection_that_is_kept_stays_where_it_was_checked(attempts: list[str], monkeypatch: pytest.MonkeyPatch):
    name = Rebinding("127.0.0.1", "127.0.0.2")
    monkeypatch.setattr(socket, "getaddrinfo", name)
    async with origin(answers(HELLO)) as there, transport(egress=Egress(networks(["127.0.0.1/32"]))) as via:
        for _ in range(3):
            assert await fetch(via, call(f"http://rebinding.example:{there.port}")) == (200, b"hello")
        with pytest.raises(EgressRefused, match=r"127\.0\.0\.2/32"):
            await fetch(via, call(f"http://rebinding.example:{there.port}", credential_id=2))
    assert set(attempts) == {"127.0.0.1"}


# S06


async def test_s06_a_redirect_takes_no_secret_along():
    async with origin(answers(HELLO)) as elsewhere:
        wire = b"HTTP/1.1 307 Moved\r\nLocation: %b/v1/chat\r\nContent-Length: 0\r\n\r\n" % elsewhere.url.encode()
        async with origin(answers(wire)) as there, transport() as via:
            assert (await fetch(via, call(there.url, headers={"Authorization": "Bearer sk-secret"})))[0] == 307
            async with httpx.AsyncClient(transport=via) as client:
                assert (await client.post(there.url)).status_code == 307
        assert elsewhere.connections == 0


async def test_s06_two_credentials_never_share_a_connection():
    """Not even at the same origin: what one's connection has been told, another's must not find there."""
    seen: dict[int, set[bytes]] = {}

    async def script(peer: Peer) -> None:
        while True:
            request = await peer.request()
            secret = next(line for line in request.split(b"\r\n") if line.startswith(b"Authorization"))
            seen.setdefault(peer.number, set()).add(secret)
            await peer.say(HELLO)

    async with origin(script) as there, transport() as via:
        calls = [call(there.url, credential_id=n % 3, headers={"Authorization": f"Bearer {n % 3}"}) for n in range(60)]
        for batch in range(0, 60, 12):
            await asyncio.gather(*(fetch(via, one) for one in calls[batch : batch + 12]))
    assert len(seen) <= 12
    assert all(len(secrets) == 1 for secrets in seen.values())


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("before", "after", "stays"),
    [
        ("https://a.example/v1", "https://b.example/v1", False),
        ("https://a.example/v1", "http://a.example/v1", False),
        ("https://a.example/v1", "https://a.example:8443/v1", False),
        ("https://a.example/v1", "https://a.example.evil.example/v1", False),
        ("https://a.example/v1", "", False),
        ("https://a.example/v1", "https://a.example/v2", True),
        ("https://a.example/v1", "https://A.EXAMPLE:443/v1", True),
    ],
)
def test_s06_a_secret_does_not_follow_its_account_to_another_origin(before: str, after: str, stays: bool):
    credential = add_credential("openai", "A", "sk-secret-of-a", base_url=before)

    notes = change_credential(credential, base_url=after)

    assert bool(credential.secret) is stays
    assert secret_of(credential).reveal() == ("sk-secret-of-a" if stays else "")
    assert bool(notes) is not stays


@pytest.mark.django_db
def test_s06_a_secret_does_not_open_at_an_origin_that_was_changed_behind_our_back():
    """A row edited in the database, or a backup mixed up: the seal knows for whom it was."""
    credential = add_credential("openai", "A", "sk-secret-of-a", base_url="https://a.example/v1")
    Credential.objects.filter(pk=credential.pk).update(base_url="https://evil.example/v1")

    with pytest.raises(SealBroken):
        secret_of(Credential.objects.get(pk=credential.pk))


def test_s06_no_client_can_say_to_whom_or_as_whom_we_speak(sluice: Sluice, sim: str, upstream: OpenAIUpstream):
    key = sluice.issue_key()
    hostile = {
        "x-forwarded-host": "evil.example",
        "x-host": "evil.example",
        "forwarded": "host=evil.example",
        "proxy-authorization": "Basic ZXZpbA==",
        "cookie": "authorization=evil",
        "x-upstream-authorization": "Bearer evil",
        "connection": "authorization, host",
        "openai-organization": "evil",
        "x-original-url": "http://evil.example/",
    }
    body: dict[str, Any] = {"model": f"{sim}/gpt-4o", "messages": [{"role": "user", "content": "hi"}], "user": "a\r\nHost: evil.example"}
    for path in ("/v1/chat/completions", "/v1/chat/completions?authorization=evil&host=evil.example"):
        answer = httpx.post(f"{sluice.url}{path}", json=body, headers={"authorization": f"Bearer {key}"} | hostile)
        assert answer.status_code == 200, answer.text
        seen = upstream.last
        assert seen.headers["host"] == f"127.0.0.1:{upstream.port}"
        assert seen.headers["authorization"] == "Bearer sk-sim-ok"
        assert (seen.path, seen.query) == ("/v1/chat/completions", {})
        assert "evil" not in str(seen.raw_headers)
    assert key not in str([(seen.raw_headers, seen.body) for seen in upstream.posts])
