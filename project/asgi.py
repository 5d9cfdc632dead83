"""The ASGI application: `/v1` goes to the gateway before Django is reached, websockets to Channels, the rest to Django."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable
from typing import Any, cast

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

from asgiref.sync import markcoroutinefunction, sync_to_async
from channels.auth import AuthMiddlewareStack
from channels.routing import ProtocolTypeRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.core.asgi import get_asgi_application

django = get_asgi_application()

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError

from project import exposition
from project.runtime import Runtime
from providers.wire import encode_json
from proxy.call import Message, Receive, Scope, Send, current_request, new_request_id
from proxy.dash.live import UsageConsumer
from proxy.errors import MetricsNotPublic, Unavailable, UnknownPath

log = logging.getLogger(__name__)

runtime = Runtime()
BEGAN = time.time()
NOT_PUBLIC = encode_json(MetricsNotPublic("Metrics are for callers with METRICS_TOKEN or, where none is set, on this machine.").body())
SERVES_V1 = settings.SERVE_ONLY != "web"
NOT_HERE = encode_json(UnknownPath("This process serves the other half: see `serve --only`.").body())
NOT_STARTED = encode_json(Unavailable("The gateway has not started; its log says why.").body())


def is_gateways(scope: Scope) -> bool:
    """By the raw path alone, before anything else is looked at."""
    path = scope["path"]
    if path == "/":
        return scope["method"] not in ("GET", "HEAD")
    if path.startswith("/v1/"):
        return True
    first = path.lstrip("/").partition("/")[0]
    return first in ("v1", "compat")


async def http(scope: Scope, receive: Receive, send: Send) -> None:
    path = scope["path"]
    gateways = is_gateways(scope)
    if not gateways:
        send = with_request_id(send)
    if path in ("/healthz", "/readyz"):
        return await probe(path, send)
    if path == "/metrics":
        return await metrics(scope, send)
    if ("web" if gateways else "gateway") == settings.SERVE_ONLY:
        return await say(404, NOT_HERE, send)
    if settings.SERVE_ONLY != "web" and not await started():
        return await say(503, NOT_STARTED, send)
    if gateways:
        return await runtime.gateway(scope, receive, send)
    await django(cast(dict[str, Any], scope), receive, send)  # type: ignore[arg-type]


def with_request_id(send: Send) -> Send:
    """Every answer carries one, and what is logged meanwhile; the gateway's own stand in the usage rows, too."""
    request_id = new_request_id()
    current_request.set(request_id)

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
        await send(message)

    return send_with_id


async def started() -> bool:
    """Start now, if that has not happened yet. False when it cannot; the log has the reason, in words where we have them."""
    try:
        await runtime.start()
    except ImproperlyConfigured as problem:
        runtime.missing = "configuration"
        log.error("Not started: %s", problem)
    except DatabaseError as problem:
        runtime.missing = "database"
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
    missing = runtime.missing_parts() if path == "/readyz" and settings.SERVE_ONLY != "web" else []
    said: dict[str, object] = (
        {"status": status} if not missing else {"status": "starting" if status == "ok" else status, "missing": missing}
    )
    await say(200 if said == {"status": "ok"} else 503, encode_json(said), send)


async def metrics(scope: Scope, send: Send) -> None:
    """Prometheus' page. Never for the public: see `exposition.may_read`."""
    if not exposition.may_read(scope):
        return await say(403, NOT_PUBLIC, send)
    page = exposition.Page()
    if settings.SERVE_ONLY != "web":
        runtime.expose(page)
    await sync_to_async(exposition.accounts, thread_sensitive=False)(page)
    exposition.process(page, BEGAN)
    await say(200, page.text().encode(), send, exposition.CONTENT_TYPE)


async def say(status: int, body: bytes, send: Send, content_type: bytes = b"application/json") -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})
    await send({"type": "http.response.body", "body": body})


# Who is signed in to one of our pages; the address of no other page does.
WEBSOCKETS: dict[str, Any] = {
    "/ws/usage": AllowedHostsOriginValidator(AuthMiddlewareStack(UsageConsumer.as_asgi())),
}


async def websocket(scope: Scope, receive: Receive, send: Send) -> None:
    """Anything but a known path is refused, and so is a page of another site: a browser sends its cookies from there, too."""
    served = WEBSOCKETS.get(scope["path"]) if settings.SERVE_ONLY != "gateway" else None
    if served is None or not is_own_page(scope) or not (settings.SERVE_ONLY == "web" or await started()):
        await receive()
        return await send({"type": "websocket.close"})
    await served(scope, receive, send)


def is_own_page(scope: Scope) -> bool:
    """By the rule of Django's forms. An allowed host is not enough: other programs on it have other ports, and share its cookies."""
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    origin = headers.get(b"origin", "").lower()
    return origin.partition("://")[2] == headers.get(b"host", "").lower() or origin in settings.CSRF_TRUSTED_ORIGINS


async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            good = settings.SERVE_ONLY == "web" or await started()
            await send({"type": "lifespan.startup.complete" if good else "lifespan.startup.failed"})
        else:
            await runtime.stop()
            return await send({"type": "lifespan.shutdown.complete"})


router = ProtocolTypeRouter({"http": http, "websocket": websocket, "lifespan": lifespan})


@markcoroutinefunction
def application(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
    """What goes to a gateway that runs needs no further look; all else is sorted by the router."""
    if scope["type"] == "http" and runtime.ready and SERVES_V1 and is_gateways(scope):
        return runtime.gateway(scope, receive, send)
    return router(scope, receive, send)
