"""Who calls? From the head alone: the body has not been read yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from accounts.addresses import lies_in
from accounts.principal import LONGEST_KEY, Principal, digest, is_plausible
from proxy.call import Incoming
from proxy.catalog import Catalog
from proxy.errors import Frozen, InvalidRequest, IpNotAuthorized, Unauthenticated

HEADERS = (b"authorization", b"x-api-key", b"x-goog-api-key")


class Loader(Protocol):
    async def __call__(self, digests: Sequence[bytes]) -> Principal | None:
        """Ask the database for a key that memory does not know. Raises Unavailable when it cannot be asked."""


async def authenticate(incoming: Incoming, catalog: Catalog, load: Loader) -> Principal:
    """The caller. Raises Unauthenticated, IpNotAuthorized, InvalidRequest (two keys that differ), Unavailable."""
    key = presented_key(incoming.headers)
    # Memory before the look at its form: an imported key may have any. Only what could be a key of ours is worth a look-up.
    digests: list[bytes] = []
    if len(key) <= LONGEST_KEY:
        for pepper in catalog.peppers:
            digests.append(digest(pepper, key))
            if (principal := catalog.principals.get(digests[-1])) is not None:
                return let_in(principal, incoming.address)
    if not is_plausible(key):
        raise Unauthenticated("Incorrect API key provided. You can see your keys on the gateway's pages.")
    return let_in(await load(digests), incoming.address)


def let_in(principal: Principal | None, address: str | None) -> Principal:
    """The caller, unless the key is nobody's or has expired, or must not be used from this address (None: not looked at).

    Raises Unauthenticated, IpNotAuthorized."""
    if principal is None or (principal.expires_at is not None and principal.expires_at <= time.time()):
        raise Unauthenticated("Incorrect API key provided, or the key has been revoked or has expired.")
    if principal.networks and address is not None and not lies_in(address, principal.networks):
        raise IpNotAuthorized("Your IP address is not authorized to use this key.")
    return principal


def check_not_frozen(principal: Principal) -> None:
    """Raises Frozen while somebody has frozen the key, its team or its organization."""
    now = time.time()
    if principal.frozen_until is not None and principal.frozen_until > now:
        why = f": {principal.frozen_reason}" if principal.frozen_reason else "."
        raise Frozen(f"This key is frozen for now{why}", retry_after_seconds=principal.frozen_until - now)


def presented_key(headers: dict[bytes, bytes]) -> str:
    """The one key that the headers carry. A key in a query or a cookie is never looked at."""
    key = ""
    for name in HEADERS:
        if name not in headers:
            continue
        value = headers[name].decode("latin-1").strip()
        if value and name == b"authorization":
            scheme, _, value = value.partition(" ")
            if scheme != "Bearer" and scheme.lower() != "bearer":
                raise Unauthenticated("Send your key as 'Authorization: Bearer …'.")
            value = value.lstrip()
        if key and value and value != key:
            raise InvalidRequest(
                "Two different keys were sent: use one of Authorization, x-api-key and x-goog-api-key.", code="conflicting_credentials"
            )
        key = value or key
    if not key:
        raise Unauthenticated("You didn't provide an API key. Send it in an Authorization header: 'Authorization: Bearer YOUR_KEY'.")
    return key
