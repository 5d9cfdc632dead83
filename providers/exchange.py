"""One HTTP exchange as values: where it goes, what goes out, and what comes back.

Adapters make an `Outgoing`; a `Transport` sends it and gives an `Answer`. Whatever happens below speaks httpx's
exceptions, so that a transport of httpx's and our own fail in the same words.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from functools import lru_cache
from ipaddress import IPv6Address
from typing import NamedTuple, Protocol

import httpx
from msgspec import Struct, field

from providers.egress import EgressRefused
from providers.failures import (
    NoConnectionFree,
    UpstreamFailure,
    UpstreamProtocol,
    UpstreamServer,
    UpstreamTimeout,
    UpstreamUnreachable,
)

Origin = tuple[str, str, int]  # scheme, host, port

_PORTS = {"http": 80, "https": 443}
# One parser for the check and for the call. It takes no user name, no escapes, no zones and nothing beyond ASCII:
# what could mean two things to two readers is no address here.
_ADDRESS = re.compile(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(\d{1,5}))?(/[\x21-\x7e]*)?", re.IGNORECASE | re.ASCII)

_NO_ADDRESS = "The upstream's address cannot be used: it is not an address such as https://llm.example.org/v1."


class Place(NamedTuple):
    """Where a connection leads and who may share it: connections are kept by this, and never lent to another."""

    origin: Origin
    credential_id: int = 0
    ca_pem: str = ""  # trusted besides the system's own authorities
    proxy_url: str = ""
    http2: bool = False  # offered to the upstream, which may decline

    @property
    def host_header(self) -> str:
        return _host_header(self.origin)


@lru_cache(maxsize=1024)
def _host_header(origin: Origin) -> str:
    scheme, host, port = origin
    name = f"[{host}]" if ":" in host else host
    return name if port == _PORTS[scheme] else f"{name}:{port}"


@lru_cache(maxsize=4096)
def place_of(url: str, credential_id: int = 0, ca_pem: str = "", proxy_url: str = "", *, http2: bool = False) -> tuple[Place, str]:
    """The place that a URL leads to, and its path. Raises UpstreamUnreachable for what is no plain address."""
    found = _ADDRESS.fullmatch(url)
    if found is None or re.search(r"[\\?#]", found[4] or ""):
        raise UpstreamUnreachable(_NO_ADDRESS)
    scheme, host, path = found[1].lower(), found[2].lower(), found[4] or ""
    port = int(found[3] or _PORTS[scheme])
    if not 0 < port < 65536 or (host[0] == "[" and not _is_ipv6(host[1:-1])):
        raise UpstreamUnreachable(_NO_ADDRESS)
    return Place((scheme, host.strip("[]"), port), credential_id, ca_pem, proxy_url, http2), path


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


class Outgoing(Struct, frozen=True):
    """A request as it leaves. `headers` are all that an adapter wants said; Host, length and the like are the transport's."""

    method: str
    place: Place
    path: str  # with the query, escaped: as it stands in the request line
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    id: str = ""  # goes out as X-Request-ID

    def __repr__(self) -> str:
        # Headers carry secrets, bodies people's words, and some upstreams take a key in the query.
        return f"<Outgoing {self.method} {self.url.partition('?')[0]}>"

    @property
    def url(self) -> str:
        return f"{self.place.origin[0]}://{self.place.host_header}{self.path}"

    def as_httpx(self) -> httpx.Request:
        headers = {**self.headers, "X-Request-ID": self.id} if self.id else self.headers
        return httpx.Request(self.method, self.url, headers=headers, content=self.body or None)


class Watch(Protocol):
    """Told by whoever reads an answer whose turn it is. Ends the exchange by cancelling it."""

    def waiting(self) -> None:
        """The upstream's turn."""

    def busy(self) -> None:
        """Ours, or the client's."""


class Unwatched:
    """For calls that stand under a time limit as a whole."""

    def waiting(self) -> None: ...
    def busy(self) -> None: ...


class Answer(Protocol):
    """An answer whose head has come. Its body is read once, decompressed, by `chunks` or by `read`."""

    status: int

    @property
    def headers(self) -> Mapping[str, str]:
        """By lower-case name; a repeated one is joined with a comma."""

    @property
    def content_type(self) -> str: ...

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come: to read what is left takes no waiting."""

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives, never empty. Raises httpx.TransportError or httpx.DecodingError when it is cut off."""

    async def read(self, limit: int) -> bytes:
        """The body, or its first `limit` bytes when it is longer. Raises as `chunks` does."""

    async def close(self) -> None:
        """Give back the connection, or end it where the body has not been read. May be called twice, and under cancellation."""


class Transport(Protocol):
    async def send(self, call: Outgoing, watch: Watch) -> Answer:
        """Send it and wait for the head of the answer. Cancelling it leaves nothing behind. The answer must be closed.

        Raises httpx.TransportError, or EgressRefused. No redirect is followed."""

    async def aclose(self) -> None:
        """End all connections."""


# What a transport raises, the particular before the general.
FAILURES = (TimeoutError, EgressRefused, httpx.TransportError, httpx.DecodingError)


def failure_of(problem: Exception) -> UpstreamFailure:
    """One of FAILURES in the vocabulary that adapters and clients share."""
    failure = _failure_of(problem)
    failure.detail = "" if isinstance(problem, EgressRefused) else str(problem)
    return failure


def _failure_of(problem: Exception) -> UpstreamFailure:
    match problem:
        case EgressRefused():
            return UpstreamUnreachable(str(problem))
        case httpx.PoolTimeout():
            return NoConnectionFree("Too many calls to this upstream are under way.", retry_after_seconds=1)
        case httpx.ConnectTimeout():
            return UpstreamUnreachable("The upstream could not be reached in time.")
        case httpx.ConnectError() | httpx.UnsupportedProtocol() | httpx.ProxyError():
            return UpstreamUnreachable("The upstream could not be reached.")
        case TimeoutError() | httpx.TimeoutException():
            return UpstreamTimeout("The upstream did not answer in time.")
        case httpx.ProtocolError() | httpx.DecodingError():
            return UpstreamProtocol("The upstream's answer was cut off or not HTTP.")
    return UpstreamServer("The connection to the upstream was lost.")
