"""The ASGI application: `/v1` goes to the gateway before Django is reached, the rest to Django."""

from __future__ import annotations

import logging
import os
from typing import Any, cast

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

from channels.routing import ProtocolTypeRouter
from django.core.asgi import get_asgi_application

django = get_asgi_application()

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError

from project.runtime import Runtime
from providers.wire import encode_json
from proxy.call import Message, Receive, Scope, Send, new_request_id
from proxy.errors import Unavailable, UnknownPath

log = logging.getLogger(__name__)

runtime = Runtime()
NOT_HERE = encode_json(UnknownPath("This process serves the other half: see `serve --only`.").body())
NOT_STARTED = encode_json(Unavailable("The gateway has not started; its log says why.").body())


def is_gateways(scope: Scope) -> bool:
    """By the raw path alone, before anything else is looked at."""
    path = scope["path"]
    if path == "/":
        return scope["method"] not in ("GET", "HEAD")
    first = path.lstrip("/").partition("/")[0]
    return first in ("v1", "compat")


async def http(scope: Scope, receive: Receive, send: Send) -> None:
    path = scope["path"]
    gateways = is_gateways(scope)
    if not gateways:
        send = with_request_id(send)
    if path in ("/healthz", "/readyz"):
        return await probe(path, send)
    if ("web" if gateways else "gateway") == settings.SERVE_ONLY:
        return await say(404, NOT_HERE, send)
    if settings.SERVE_ONLY != "web" and not await started():
        return await say(503, NOT_STARTED, send)
    if gateways:
        return await runtime.gateway(scope, receive, send)
    await django(cast(dict[str, Any], scope), receive, send)  # type: ignore[arg-type]


def with_request_id(send: Send) -> Send:
    """Every answer carries one; the gateway's own stand in the usage rows, too."""

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-request-id", new_request_id().encode())]
        await send(message)

    return send_with_id


async def started() -> bool:
    """Start now, if that has not happened yet. False when it cannot; the log has the reason, in words where we have them."""
    try:
        await runtime.start()
    except ImproperlyConfigured as problem:
        log.error("Not started: %s", problem)
    except DatabaseError as problem:
        log.error("Not started: the database cannot be used (%s). Is it migrated?", problem)
    return runtime.ready


async def probe(path: str, send: Send) -> None:
    """`/healthz`: the process answers. `/readyz`: it also takes requests (and starts, where no lifespan event said so)."""
    if path == "/readyz" and settings.SERVE_ONLY != "web":
        await started()
    if path == "/healthz":
        status = "ok"
    elif runtime.unready:
        status = sorted(runtime.unready)[0]
    else:
        status = "ok" if runtime.ready or settings.SERVE_ONLY == "web" else "starting"
    await say(200 if status == "ok" else 503, encode_json({"status": status}), send)


async def say(status: int, body: bytes, send: Send) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            good = settings.SERVE_ONLY == "web" or await started()
            await send({"type": "lifespan.startup.complete" if good else "lifespan.startup.failed"})
        else:
            await runtime.stop()
            return await send({"type": "lifespan.shutdown.complete"})


application = ProtocolTypeRouter({"http": http, "lifespan": lifespan})
