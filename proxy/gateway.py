"""The ASGI application of `/v1`: the whole trip of a request on one screen.

    authenticate -> (read the body) -> route -> admit -> translate -> upstream -> translate -> respond -> meter

What comes before `admit` costs nothing and is answered at once. What comes after it is settled in `finally`, exactly
once, whether the answer is whole, the upstream broke, the client left or we have a bug.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from accounts.principal import Principal
from providers import wire
from providers.adapter import Ask, Target
from providers.clock import Clock, Timeouts
from providers.exchange import Transport
from providers.failures import CredentialRefused, UpstreamBroke, UpstreamFailed, UpstreamFailure, UpstreamUnreachable, UsageOptionRefused
from providers.wire import ApiError
from proxy.call import Admission, Asked, Incoming, Message, Outcome, Receive, Scope, Send, new_request_id
from proxy.catalog import Catalog, Current
from proxy.errors import ClientClosed, GatewayError, InvalidRequest, ModelNotFound, TooLarge, Unavailable, UnknownPath, WrongMethod
from proxy.http import Site, client_address, cors_headers, header_dict, host_is_allowed, preflight
from proxy.journal import Journal
from proxy.pipeline import respond, translate, upstream
from proxy.pipeline.admit import admit
from proxy.pipeline.authenticate import Loader, authenticate
from proxy.pipeline.meter import meter
from proxy.pipeline.respond import Reply, Wait
from proxy.pipeline.route import route, visible_models
from proxy.refusals import Refusals
from proxy.stores.health import Health
from proxy.stores.limits import LimitStore

log = logging.getLogger(__name__)

MOST_ATTEMPTS = 3
MOST_DISCARDED_BYTES = 1 << 20
DISCARD_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One line of the closed table: a path, and how its requests are read. All are metered but the lists of models."""

    name: str
    head: type[wire.Head] | None  # None = answered from memory
    method: str = "POST"
    default_model: str | None = None
    seed: bool = False  # the OpenAI-workers form: defaults where the client sent nothing


ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": Endpoint("chat/completions", wire.ChatHead),
    "/v1/completions": Endpoint("completions", wire.CompletionHead),
    "/v1/embeddings": Endpoint("embeddings", wire.EmbeddingsHead),
    "/v1/moderations": Endpoint("moderations", wire.ModerationsHead, default_model="omni-moderation-latest"),
    "/v1/responses": Endpoint("responses", wire.ResponsesHead),
    "/v1/rerank": Endpoint("rerank", wire.RerankHead),
    "/v1/images/generations": Endpoint("images/generations", wire.ImagesHead, default_model="gpt-image-1"),
    "/v1/audio/speech": Endpoint("audio/speech", wire.SpeechHead),
    "/v1/models": Endpoint("models", None, method="GET"),
    "/": Endpoint("chat/completions", wire.ChatHead, seed=True),
    "/compat/openai-worker": Endpoint("chat/completions", wire.ChatHead, seed=True),
}


@dataclass(frozen=True, slots=True)
class Gateway:
    """Its parts are handed in: `project/asgi.py` fills it for a server, a test fills it with what it wants to see."""

    current: Current
    load: Loader
    limits: LimitStore
    health: Health
    journal: Callable[[], Journal]
    transport: Transport
    site: Site
    timeouts: Timeouts = field(default_factory=Timeouts)
    refusals: Refusals = field(default_factory=Refusals)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = header_dict(scope["headers"])
        incoming = Incoming(
            id=new_request_id(),
            method=scope["method"],
            path=scope["path"],
            headers=headers,
            address=client_address(scope, headers, self.site),
            receive=receive,
            callers_key=(headers.get(b"x-upstream-key") or headers.get(b"x-openai-key") or b"").decode("latin-1").strip(),
            seed_errors=headers.get(b"x-error-format", b"").lower() == b"seed",
        )
        reply = Reply(send, incoming.id, cors_headers(headers, self.site), seed_errors=incoming.seed_errors)
        principal: Principal | None = None
        try:
            if not host_is_allowed(headers, self.site):
                raise InvalidRequest("This host name is not served here: see ALLOWED_HOSTS.", code="invalid_host")
            if not (incoming.callers_key.isascii() and incoming.callers_key.isprintable()):
                raise InvalidRequest("X-Upstream-Key holds what no key can hold.", code="invalid_upstream_key")
            if incoming.method == "OPTIONS":
                return await reply.whole(204, b"", headers=preflight(headers))
            endpoint, model_id = find_endpoint(incoming)
            catalog = self.current.catalog
            principal = await authenticate(incoming, catalog, self.load)
            if endpoint.head is None:
                return await self._models(reply, principal, catalog, model_id)
            raw = await read_body(incoming, self.site.body_limit_bytes)
            asked = translate.read(
                endpoint.name,
                endpoint.head,
                raw,
                content_type=headers.get(b"content-type", b"").decode("latin-1"),
                default_model=endpoint.default_model,
                seed=endpoint.seed,
            )
            targets = translate.that_have(route(principal, asked.model, incoming.callers_key, catalog, self.health), asked.endpoint)
            outcome = Outcome()
            admission = await admit(incoming, principal, asked, targets, catalog, self.limits, self.journal(), outcome)
        except ClientClosed:
            return None
        except ApiError as problem:
            self.refusals.count(principal, problem.status, problem.code or problem.type)
            return await reply.error(problem, before_closing=unread_body(incoming))
        except Exception:
            log.exception("Request %s failed before it was admitted", incoming.id)
            return await reply.error(GatewayBug("The gateway failed."))
        self.refusals.count_shadowed(principal, outcome.shadowed)
        await self._admitted(incoming, asked, admission, targets, catalog, reply, outcome)

    async def _admitted(
        self,
        incoming: Incoming,
        asked: Asked,
        admission: Admission,
        targets: Sequence[Target],
        catalog: Catalog,
        reply: Reply,
        outcome: Outcome,
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        watcher = asyncio.create_task(watch(incoming.receive, reply, outcome, task))
        try:
            if asked.stream:
                reply.keep_alive(self.timeouts.heartbeat_seconds)
            await self._first_that_answers(incoming, asked, targets, catalog, reply, outcome)
            outcome.status = 200
        except ApiError as problem:
            outcome.status, outcome.error = problem.status, problem.code or problem.type
            await reply.error(problem)
        except asyncio.CancelledError:
            # Clients close as soon as they have read [DONE], often before the upstream's own end has come.
            if outcome.complete:
                outcome.status = 200
            else:
                outcome.status, outcome.error = (499, "client_closed") if outcome.client_left else (503, "shutdown")
            if not outcome.client_left:
                if not outcome.complete:
                    await reply.error(Unavailable("The gateway is being stopped. Try again.", code="shutdown", retry_after_seconds=1))
                raise
            task.uncancel()
        except Exception:
            log.exception("Request %s failed", incoming.id)
            outcome.status, outcome.error = 500, "internal_error"
            await reply.error(GatewayBug("The gateway failed."))
        finally:
            reply.quiet()
            watcher.cancel()
            meter(admission, outcome, self.limits, self.journal())

    async def _first_that_answers(
        self, incoming: Incoming, asked: Asked, targets: Sequence[Target], catalog: Catalog, reply: Reply, outcome: Outcome
    ) -> None:
        deadline = asyncio.get_running_loop().time() + self.timeouts.total_seconds
        pool = [target.credential_id for target in targets]
        tried = list(targets[:MOST_ATTEMPTS])
        for target in tried:
            ask = translate.ask_of(asked, incoming.id, add_usage_option=self.health.takes_usage_option(target))
            try:
                try:
                    return await self._from(target, ask, catalog, incoming, reply, outcome, deadline)
                except UsageOptionRefused:
                    if ask.client_wants_usage or not ask.add_usage_option:
                        raise
                    ask.add_usage_option = False
                    await self._from(target, ask, catalog, incoming, reply, outcome, deadline)
                    self.health.refuses_usage_option(target)  # only now is it known that the option was to blame
                    return None
            except UpstreamFailure as problem:
                self.health.failed(target, problem, pool)
                note(target, problem, incoming)
                if not isinstance(problem, UpstreamFailed):
                    raise
                if reply.content_sent:
                    raise UpstreamBroke(problem.message, code=problem.code) from None
                if target is tried[-1]:
                    raise

    async def _from(
        self, target: Target, ask: Ask, catalog: Catalog, incoming: Incoming, reply: Reply, outcome: Outcome, deadline: float
    ) -> None:
        outcome.begin(target, catalog.prices.find(target.public_model, incoming.at))
        request = translate.outgoing(ask, target)
        clock = Clock(self.timeouts, deadline)
        outcome.reached = True
        try:
            async with upstream.answer(self.transport, request, target, clock) as response:
                if not 200 <= response.status < 300:
                    body = await upstream.error_body(response)
                    raise translate.failure(target, response.status, response.headers, body)
                outcome.first_byte = time.monotonic()
                if ask.stream:
                    reader, chunks = translate.reader(ask, target), response.chunks()
                    try:
                        await respond.stream(reply, chunks, reader)
                    finally:
                        outcome.tokens, outcome.output_estimate = reader.tokens, reader.estimated_output()
                        outcome.complete = reader.finished
                    await upstream.farewell(chunks)
                else:
                    body = await upstream.whole_body(response)
                    answer = translate.whole(ask, target, body, response.content_type)
                    outcome.tokens, outcome.output_estimate = answer.tokens, len(answer.body) // 4
                    await reply.whole(200, answer.body, answer.content_type)
            self.health.succeeded(target)
        except UpstreamFailure as problem:
            if not reply.content_sent and (problem.upstream_status or isinstance(problem, UpstreamUnreachable)):
                outcome.reached = False  # it refused, or never had the request: nothing is billed
            raise

    async def _models(self, reply: Reply, principal: Principal, catalog: Catalog, model_id: str) -> None:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name, owner in visible_models(principal, catalog)]
        if not model_id:
            return await reply.json({"object": "list", "data": listed})
        for one in listed:
            if one["id"] == model_id:
                return await reply.json(one)
        raise ModelNotFound(f"The model '{model_id}' does not exist or you do not have access to it.", param="model")


class GatewayBug(GatewayError):
    """Our own mistake. The log has the traceback; the client has the request id."""

    type = "server_error"
    code = "internal_error"


def find_endpoint(incoming: Incoming) -> tuple[Endpoint, str]:
    """The line of the table for this path, and the id for `/v1/models/ID`. Raises UnknownPath, WrongMethod."""
    path, model_id = incoming.path, ""
    if path.startswith("/v1/models/") and len(path) > len("/v1/models/"):
        path, model_id = "/v1/models", incoming.path[len("/v1/models/") :]
    endpoint = ENDPOINTS.get(path)
    if endpoint is None:
        raise UnknownPath(f"Invalid URL ({incoming.method} {incoming.path[:200]})")
    if incoming.method != endpoint.method:
        raise WrongMethod(
            f"Not allowed to {incoming.method} on {incoming.path[:200]}. Use {endpoint.method}.", allow=f"{endpoint.method}, OPTIONS"
        )
    return endpoint, model_id


async def read_body(incoming: Incoming, limit_bytes: int) -> bytes:
    """Raises TooLarge before the excess is read, ClientClosed when the client leaves meanwhile."""
    announced = incoming.headers.get(b"content-length", b"")
    too_large = TooLarge(f"The body is larger than {limit_bytes} bytes.")
    if announced.isdigit() and int(announced) > limit_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        message: Message = await incoming.receive()
        if message["type"] == "http.disconnect":
            raise ClientClosed("The client left.")
        part = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise too_large
        parts.append(part)
        if not message.get("more_body"):
            incoming.body_read = True
            return parts[0] if len(parts) == 1 else b"".join(parts)


def unread_body(incoming: Incoming) -> Wait | None:
    """What to do about a body that nobody will read. None: it is small, and the server may take it to keep the connection.

    A large one must not be taken, and the connection be closed. Closing at once would reset it, and the client, still
    sending, might lose the answer: so a little is taken first."""
    announced = incoming.headers.get(b"content-length", b"")
    small = announced.isdigit() and int(announced) <= MOST_DISCARDED_BYTES
    if incoming.body_read or small or not (announced or b"transfer-encoding" in incoming.headers):
        return None

    async def take_a_little() -> None:
        size = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while size < MOST_DISCARDED_BYTES:
                    message = await incoming.receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return
                    size += len(message.get("body", b""))

    return take_a_little


async def watch(receive: Receive, reply: Reply, outcome: Outcome, task: asyncio.Task[None]) -> None:
    """Cancel the trip as soon as the client leaves: the upstream stops at once, and so does its bill."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not reply.finished:
        outcome.client_left = True
        task.cancel()


def note(target: Target, problem: UpstreamFailure, incoming: Incoming) -> None:
    level = logging.WARNING if isinstance(problem, CredentialRefused | UpstreamFailed) else logging.INFO
    log.log(
        level,
        "Request %s: credential %s (%s) answered %s: %s %s",
        incoming.id,
        target.credential_id,
        target.label,
        problem.code,
        problem.message,
        problem.detail,
    )
