"""Ends calls under way whose callers would not be let in any more, where the operator wants that."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from proxy.catalog import Current
from proxy.errors import Frozen, IpNotAuthorized, Unauthenticated, Unavailable
from proxy.leaving import Leaving
from proxy.pipeline.authenticate import Loader, authenticate, check_not_frozen


async def cut_refused(under_way: Collection[Leaving], current: Current, load: Loader) -> None:
    """Ask the first step of the trip again about each of these calls. While it cannot tell, the database being away, they go on."""
    for call in list(under_way):
        try:
            check_not_frozen(await authenticate(call.incoming, current.catalog, load))
        except Unauthenticated:
            call.refuse(Unauthenticated("Your API key has been revoked, or has expired, since this call began.", code="key_revoked"))
        except (Frozen, IpNotAuthorized) as problem:
            call.refuse(problem)
        except Unavailable:
            continue
        await asyncio.sleep(0)  # there may be thousands: others have their turn between two of them
