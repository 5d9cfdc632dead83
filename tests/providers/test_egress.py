"""S05, a start: which addresses a call may go to, and the words for those it may not."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import httpx
import pytest

from providers.egress import Egress, EgressRefused, networks
from providers.transport import PooledTransport

PUBLIC = ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::"]
INNER = {
    "127.0.0.1": "127.0.0.1/32",
    "127.8.9.1": "127.8.9.1/32",
    "10.0.0.1": "10.0.0.1/32",
    "172.16.5.4": "172.16.5.4/32",
    "192.168.1.1": "192.168.1.1/32",
    "100.64.0.1": "100.64.0.1/32",
    "169.254.169.254": "169.254.169.254/32",
    "0.0.0.0": "0.0.0.0/32",
    "255.255.255.255": "255.255.255.255/32",
    "224.0.0.1": "224.0.0.1/32",
    "239.255.255.250": "239.255.255.250/32",
    "192.0.2.1": "192.0.2.1/32",
    "198.18.0.1": "198.18.0.1/32",
    "::": "::/128",
    "::1": "::1/128",
    "fe80::1": "fe80::1/128",
    "fe80::1%eth0": "fe80::1/128",
    "fc00::1": "fc00::1/128",
    "fd00:ec2::254": "fd00:ec2::254/128",
    "ff02::1": "ff02::1/128",
    "2001:db8::1": "2001:db8::1/128",
    # An IPv4 address in the clothes of an IPv6 one is where the packets go.
    "::ffff:127.0.0.1": "127.0.0.1/32",
    "::ffff:169.254.169.254": "169.254.169.254/32",
    "64:ff9b::7f00:1": "127.0.0.1/32",
    "64:ff9b::a9fe:a9fe": "169.254.169.254/32",
    "2002:7f00:1::": "127.0.0.1/32",
    "2002:a00:1::1": "10.0.0.1/32",
    # Where Pythons differ on what is public.
    "::127.0.0.1": "::7f00:1/128",
    "::ffff:0:127.0.0.1": "::ffff:0:7f00:1/128",
    "64:ff9b:1::7f00:1": "64:ff9b:1::7f00:1/128",
    "fec0::1": "fec0::1/128",
    "3fff::1": "3fff::1/128",
    "192.88.99.1": "192.88.99.1/32",
    "192.0.0.8": "192.0.0.8/32",
}


@pytest.mark.parametrize("address", PUBLIC)
def test_the_public_internet_is_open(address: str):
    Egress().check(address)


@pytest.mark.parametrize(("address", "network"), INNER.items())
def test_everything_else_is_shut_and_says_what_would_open_it(address: str, network: str):
    with pytest.raises(EgressRefused) as refused:
        Egress().check(address)

    line = f"EGRESS_ALLOW={network}"
    assert str(refused.value).endswith(line)
    Egress(networks([network])).check(address)


def test_the_line_keeps_what_is_allowed_already():
    egress = Egress(networks(["10.0.0.0/8"]))
    egress.check("10.1.2.3")

    with pytest.raises(EgressRefused, match=r"EGRESS_ALLOW=10\.0\.0\.0/8,127\.0\.0\.1/32$"):
        egress.check("127.0.0.1")


def test_one_open_network_opens_no_other():
    egress = Egress(networks(["192.168.0.0/16", "fd00::/8"]))

    egress.check("192.168.7.7")
    egress.check("fd00::7")
    for address in ("10.0.0.1", "fe80::1", "::1"):
        with pytest.raises(EgressRefused):
            egress.check(address)


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    async def getaddrinfo(self: object, host: str, port: int, **_: object) -> list[object]:
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses
        ]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)


async def test_one_inner_address_among_public_ones_shuts_the_name(monkeypatch: pytest.MonkeyPatch):
    resolving(monkeypatch, "93.184.216.34", "10.0.0.5")

    with pytest.raises(EgressRefused, match=r"10\.0\.0\.5/32"):
        await Egress().addresses("mixed.example.org", 443)


async def test_a_public_name_is_its_addresses_each_once(monkeypatch: pytest.MonkeyPatch):
    resolving(monkeypatch, "93.184.216.34", "93.184.216.34", "1.1.1.1")

    assert await Egress().addresses("example.org", 443) == ["93.184.216.34", "1.1.1.1"]


@pytest.mark.parametrize("host", ["a" * 70 + ".example.org", ".example.org", "no-such-host.invalid"])
async def test_what_is_no_name_is_not_found(host: str):
    with pytest.raises(OSError, match="not"):
        await Egress().addresses(host, 443)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://2130706433:{port}/",  # decimal
        "http://0x7f000001:{port}/",
        "http://0177.0.0.1:{port}/",
        "http://127.1:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://0.0.0.0:{port}/",
        "http://localhost.:{port}/",
    ],
)
async def test_no_way_of_writing_loopback_reaches_it(url: str):
    reached: list[object] = []

    async def seen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(writer)
        writer.close()

    server = await asyncio.start_server(seen, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, PooledTransport(Egress()) as transport:
        with pytest.raises((EgressRefused, httpx.TransportError, httpx.InvalidURL)):
            await transport.handle_async_request(httpx.Request("GET", url.format(port=port)))

    assert reached == []


async def test_what_is_allowed_is_reached_and_at_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(head) + head)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    resolving(monkeypatch, "127.0.0.1")
    async with server, PooledTransport(Egress((ipaddress.ip_network("127.0.0.1/32"),))) as transport:
        response = await transport.handle_async_request(httpx.Request("GET", f"http://llm.example.org:{port}/"))
        body = await response.aread()

    assert f"host: llm.example.org:{port}".encode() in body.lower()


async def test_a_redirect_is_not_followed():
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, PooledTransport(Egress((ipaddress.ip_network("127.0.0.1/32"),))) as transport:
        response = await transport.handle_async_request(httpx.Request("GET", f"http://127.0.0.1:{port}/"))
        await response.aclose()

    assert response.status_code == 302
