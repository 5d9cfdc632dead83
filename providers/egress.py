"""The only door out: resolve once, check every address, connect to one that was checked.

Only public addresses are reached; others need the operator's word in `EGRESS_ALLOW`. Redirects are never followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


# What the standard library of some Python takes for public: protocol assignments, old relays, and for IPv6 whatever
# lies outside the unicast space that has been handed out (2000::/3).
_NOT_PUBLIC: dict[int, tuple[Network, ...]] = {
    4: (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("192.88.99.0/24")),
    6: (
        ipaddress.ip_network("::/3"),
        ipaddress.ip_network("4000::/2"),
        ipaddress.ip_network("8000::/1"),
        ipaddress.ip_network("3fff::/20"),
    ),
}


class EgressRefused(Exception):
    """The upstream lives where calls may not go. The message names the setting that would allow it."""


@dataclass(frozen=True, slots=True)
class Egress:
    """What the operator allows besides the public internet."""

    allow: tuple[Network, ...] = ()
    _asked: dict[str, asyncio.Task[list[str]]] = field(default_factory=dict, compare=False, repr=False)

    async def addresses(self, host: str, port: int) -> list[str]:
        """The addresses of `host`, each checked. Raises EgressRefused if one may not be reached, OSError if none is found."""
        addresses = [host] if _is_address(host) else await self._resolved(host)
        for text in addresses:
            self.check(text)
        return addresses

    async def _resolved(self, host: str) -> list[str]:
        """One look-up for all who ask for the same name at the same time.

        A look-up that nobody answers keeps a thread busy for half a minute, whoever stops waiting for it, and there are
        few threads: one slow name must not take them all. Nothing is remembered."""
        look_up = self._asked.get(host)
        if look_up is None or look_up.get_loop() is not asyncio.get_running_loop():
            look_up = self._asked[host] = asyncio.create_task(_look_up(host))
            look_up.add_done_callback(partial(self._answered, host))
        return await asyncio.shield(look_up)

    def _answered(self, host: str, look_up: asyncio.Task[list[str]]) -> None:
        if self._asked.get(host) is look_up:
            del self._asked[host]

    def check(self, text: str) -> None:
        """Raises EgressRefused unless this address is public or allowed."""
        address = _plain(ipaddress.ip_address(text.partition("%")[0]))
        if not self._may_reach(address):
            line = ",".join([*map(str, self.allow), f"{address}/{address.max_prefixlen}"])
            raise EgressRefused(f"The upstream's address {address} is not on the public internet. To allow it: EGRESS_ALLOW={line}")

    def _may_reach(self, address: Address) -> bool:
        if any(address.version == network.version and address in network for network in self.allow):
            return True
        return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_PUBLIC[address.version])


async def _look_up(host: str) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror as problem:
        raise OSError(f"The name {host[:100]} was not found ({problem.strerror}).") from None
    except UnicodeError:  # a label that is empty or too long is refused before any look-up
        raise OSError(f"{host[:100]} is not a host name.") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _plain(address: Address) -> Address:
    """The IPv4 address inside a mapped, 6to4 or NAT64 one: that is where the packets go."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return inner or address
    return address


def networks(words: Iterable[str]) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(word) for word in words)


@lru_cache(maxsize=256)
def trust(ca_pem: str) -> ssl.SSLContext:
    """Whose certificates are believed: the system's authorities, and those given. Raises ssl.SSLError for what is none."""
    return fresh_trust(ca_pem)


def fresh_trust(ca_pem: str) -> ssl.SSLContext:
    """The same, for somebody who changes it."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_pem:
        context.load_verify_locations(cadata=ca_pem)
        # From Python 3.13 on a certificate must have all that RFC 5280 asks of it. Those that people make for their own servers seldom do.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context
