"""The ASGI application: `/v1` goes to the gateway before Django is reached, the rest to Django."""

from __future__ import annotations

import logging
import os
from typing import Any, cast

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

from channels.routing import ProtocolTypeRouter
from django.core.asgi import get_asgi_application

django = get_asgi_application()

from project.runtime import Runtime
from proxy.call import Receive, Scope, Send

log = logging.getLogger(__name__)

runtime = Runtime()
TEXT = [(b"content-type", b"application/json")]


def is_gateways(scope: Scope) -> bool:
    """By the raw path alone, before anything else is looked at."""
    path = scope["path"]
    if path == "/":
        return scope["method"] not in ("GET", "HEAD")
    first = path.lstrip("/").partition("/")[0]
    return first in ("v1", "compat")


async def http(scope: Scope, receive: Receive, send: Send) -> None:
    path = scope["path"]
    if path in ("/healthz", "/readyz"):
        return await probe(path, send)
    if not runtime.ready:
        await runtime.start()  # a server without lifespan events
    if is_gateways(scope):
        return await runtime.gateway(scope, receive, send)
    await django(cast(dict[str, Any], scope), receive, send)  # type: ignore[arg-type]


async def probe(path: str, send: Send) -> None:
    """`/healthz`: the process answers. `/readyz`: it also takes requests."""
    good = path == "/healthz" or runtime.ready
    await send({"type": "http.response.start", "status": 200 if good else 503, "headers": TEXT})
    await send({"type": "http.response.body", "body": b'{"status":"ok"}' if good else b'{"status":"starting"}'})


async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            try:
                await runtime.start()
            except Exception as problem:
                log.error("Not started: %s", problem, exc_info=not _is_said_in_words(problem))
                return await send({"type": "lifespan.startup.failed", "message": ""})
            await send({"type": "lifespan.startup.complete"})
        else:
            await runtime.stop()
            return await send({"type": "lifespan.shutdown.complete"})


def _is_said_in_words(problem: Exception) -> bool:
    from django.core.exceptions import ImproperlyConfigured

    return isinstance(problem, ImproperlyConfigured)


application = ProtocolTypeRouter({"http": http, "lifespan": lifespan})
