"""What a request's head says beside its key: the host, the caller's address, and what a browser may do (CORS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from accounts import addresses
from accounts.principal import Network
from proxy.call import Headers, Scope


@dataclass(frozen=True, slots=True)
class Site:
    """Where and how we are reached, as the operator said."""

    allowed_hosts: tuple[str, ...] = ("*",)
    cors_allow_origins: tuple[str, ...] = ("*",)
    trusted_proxies: tuple[Network, ...] = ()
    body_limit_bytes: int = 32 << 20


def header_dict(raw: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Headers by lower-case name. A repeated one is joined with a comma, as HTTP means it; underscores are dropped."""
    headers = dict(raw)
    if len(headers) == len(raw) and b"_" not in b"".join(headers):
        return headers
    headers = {}
    for name, value in raw:
        if b"_" in name:
            continue
        headers[name] = headers[name] + b", " + value if name in headers else value
    return headers


def host_is_allowed(headers: dict[bytes, bytes], site: Site) -> bool:
    if "*" in site.allowed_hosts:
        return True
    return _is_allowed(headers.get(b"host", b""), site.allowed_hosts)


@lru_cache(maxsize=256)
def _is_allowed(raw: bytes, allowed_hosts: tuple[str, ...]) -> bool:
    host = raw.decode("latin-1").lower()
    name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
    return any(
        name == allowed or (allowed.startswith(".") and (name.endswith(allowed) or name == allowed[1:])) for allowed in allowed_hosts
    )


def can_be_a_key(text: str) -> bool:
    """Whether a header could carry it on to an upstream."""
    return text.isascii() and text.isprintable()


def client_address(scope: Scope, headers: dict[bytes, bytes], site: Site) -> str:
    client = scope.get("client")
    address = str(client[0]) if client else ""
    if not site.trusted_proxies:
        return address
    return addresses.client_address(address, headers.get(b"x-forwarded-for", b"").decode("latin-1"), site.trusted_proxies)


FOR_ANYBODY: Headers = [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", b"*")]


def cors_headers(headers: dict[bytes, bytes], site: Site) -> Headers:
    """For every answer, errors included. Never with credentials: no cookie counts here."""
    if "*" in site.cors_allow_origins:
        return FOR_ANYBODY
    origin = headers.get(b"origin", b"").decode("latin-1")
    if origin and origin in site.cors_allow_origins:
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", b"*"),
            (b"vary", b"Origin"),
        ]
    return [(b"vary", b"Origin")]


def preflight(headers: dict[bytes, bytes]) -> Headers:
    """The answer to a browser that asks first: needs no key, and echoes the headers that were asked for."""
    wanted = headers.get(b"access-control-request-headers", b"Authorization, Content-Type, X-Upstream-Key, x-openai-key")
    return [
        (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
        (b"access-control-allow-headers", wanted),
        (b"access-control-max-age", b"86400"),
    ]
