"""Where a request comes from, by what the proxies that are trusted say of it. One rule for programs and for people. No Django here."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from accounts.principal import Network


def client_address(address: str, forwarded: str, trusted: Sequence[Network]) -> str:
    """The nearest address that is not a trusted proxy's. `address` is the socket's, `forwarded` what X-Forwarded-For says."""
    if not trusted:
        return address
    hops = [hop.strip() for hop in forwarded.split(",") if hop.strip()]
    while hops and lies_in(address, trusted):
        address = hops.pop()
    return address


def lies_in(address: str, networks: Sequence[Network]) -> bool:
    ip = parsed(address)
    return ip is not None and any(ip.version == network.version and ip in network for network in networks)


def parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for what is no address. One of IPv4 that an IPv6 socket shows is one of IPv4."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return None
    return ip.ipv4_mapped or ip if isinstance(ip, ipaddress.IPv6Address) else ip
