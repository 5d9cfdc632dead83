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
from functools import partial

from accounts.principal import Principal
from providers import wire
from providers.adapter import Ask, Target
from providers.clock import Clock, Overseer, Timeouts
from providers.exchange import Transport
from providers.failures import (
    CredentialRefused,
    OptionRefused,
    UpstreamBroke,
    UpstreamFailed,
    UpstreamFailure,
    UpstreamUnreachable,
    UsageOptionRefused,
    gateway_error,
)
from providers.wire import ApiError
from proxy.call import FREE, LINE, Admission, Asked, Incoming, Line, Message, Outcome, Receive, Scope, Send, current_request, new_request_id
from proxy.catalog import Catalog, Current
from proxy.errors import (
    ClientClosed,
    GatewayError,
    InvalidRequest,
    ModelNotFound,
    OverLimit,
    TooLarge,
    Unavailable,
    UnknownPath,
    WrongMethod,
)
from proxy.http import Site, can_be_a_key, client_address, cors_headers, header_dict, host_is_allowed, preflight
from proxy.journal import Journal
from proxy.leaving import Leaving
from proxy.metrics import Metrics
from proxy.pipeline import respond, translate, upstream
from proxy.pipeline.admit import admit
from proxy.pipeline.authenticate import Loader, authenticate, check_not_frozen
from proxy.pipeline.meter import meter
from proxy.pipeline.respond import Reply, Wait
from proxy.pipeline.route import Routed, route, visible_models
from proxy.refusals import Refusals
from proxy.stores.health import Health
from proxy.stores.limits import LimitStore
from proxy.stores.renewals import Renewals

log = logging.getLogger(__name__)

MOST_ATTEMPTS = 3
MOST_DISCARDED_BYTES = 1 << 20
DISCARD_SECONDS = 1.0
MOST_DRAINS = 100  # calls of one worker that go on without their clients; the next to be left is cancelled


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

MODEL = "/v1/models/"


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
    renewals: Renewals = field(default_factory=Renewals)
    metrics: Metrics = field(default_factory=Metrics)
    learned: dict[int, dict[str, str]] = field(default_factory=dict)  # by credential: see `Ask.learned`
    under_way: set[Leaving] | None = None  # the calls that are admitted, where they are to end with their keys: see cutting.py
    overseer: Overseer = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "overseer", Overseer(self.timeouts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = incoming_of(scope, receive, self.site)
        current_request.set(incoming.id)
        headers = incoming.headers
        reply = Reply(send, incoming.id, cors_headers(headers, self.site), line=incoming.line, seed_errors=incoming.seed_errors)
        principal: Principal | None = None
        routed: Routed | None = None
        try:
            if not host_is_allowed(headers, self.site):
                raise InvalidRequest("This host name is not served here: see ALLOWED_HOSTS.", code="invalid_host")
            if not can_be_a_key(incoming.callers_key):
                raise InvalidRequest("X-Upstream-Key holds what no key can hold.", code="invalid_upstream_key")
            if incoming.method == "OPTIONS":
                return await reply.whole(204, b"", headers=preflight(headers), before_closing=unread_body(incoming))
            endpoint, model_id = find_endpoint(incoming)
            catalog = self.current.catalog
            principal = await authenticate(incoming, catalog, self.load)
            if principal.frozen_until is not None:
                check_not_frozen(principal)
            if endpoint.head is None:
                return await self._models(reply, incoming, principal, catalog, model_id)
            raw = await read_body(incoming, self.site.body_limit_bytes)
            read_at = time.monotonic()
            asked = translate.read(
                endpoint.name,
                endpoint.head,
                raw,
                content_type=headers.get(b"content-type", b""),
                default_model=endpoint.default_model,
                seed=endpoint.seed,
            )
            routed = route(principal, asked.model, incoming.callers_key, catalog, self.health, asked.body)
            if routed.alias is not None:
                asked = translate.with_parameters(asked, routed.alias.parameters)
            targets = translate.that_have(routed.targets, asked.endpoint)
            outcome = Outcome(read_at=read_at)
            admission = await admit(incoming, principal, asked, targets, catalog, self.limits, self.journal(), outcome)
        except ClientClosed:
            return None
        except ApiError as problem:
            if routed is not None:
                self.health.was_not_called(routed.targets[0])
            code = problem.code or problem.type
            self.refusals.count(principal, problem.status, code)
            self.metrics.refuse(problem.status, code)
            if isinstance(problem, OverLimit) and problem.granted is not None:
                reply.rates(problem.granted)
            return await reply.error(problem, before_closing=unread_body(incoming))
        except Exception:
            log.exception("Request %s failed before it was admitted", incoming.id)
            self.metrics.refuse(500, GatewayBug.code)
            return await reply.error(GatewayBug("The gateway failed."))
        if outcome.granted is not FREE:
            reply.rates(outcome.granted)
            if outcome.granted.shadowed:
                self.refusals.count_shadowed(principal, outcome.granted.shadowed)
        drain_seconds = routed.alias.drain_seconds if routed.alias is not None else 0.0
        await self._admitted(incoming, asked, admission, targets, catalog, reply, outcome, drain_seconds)
        if routed.home is not None and outcome.target is not None:
            self.metrics.was_bound(at_home=outcome.target.credential_id == routed.home)

    async def _admitted(
        self,
        incoming: Incoming,
        asked: Asked,
        admission: Admission,
        targets: Sequence[Target],
        catalog: Catalog,
        reply: Reply,
        outcome: Outcome,
        drain_seconds: float,
    ) -> None:
        drain = partial(self._drain, drain_seconds, reply, outcome) if drain_seconds else None
        leaving = Leaving(incoming, outcome, reply.is_awaited, drain, self.under_way)
        self.metrics.begin(stream=asked.stream)
        try:
            if asked.stream:
                reply.keep_alive(self.timeouts.heartbeat_seconds)
            await self._first_that_answers(incoming, asked, targets, catalog, reply, outcome)
            outcome.status = 200
        except ApiError as problem:
            outcome.status, outcome.error = problem.status, problem.code or problem.type
            await reply.error(problem)
        except asyncio.CancelledError:
            if leaving.left:
                why: ApiError = ClientClosed("The client left.")
            else:
                why = leaving.refused or Unavailable("The gateway is being stopped. Try again.", code="shutdown", retry_after_seconds=1)
            # Clients close as soon as they have read [DONE], often before the upstream's own end has come.
            outcome.status, outcome.error = (200, "") if outcome.complete else (why.status, why.code or why.type)
            if not leaving.left:
                await reply.error(why, cut=leaving.refused is None)
                if leaving.refused is None:
                    raise
            leaving.forgive()
        except Exception:
            log.exception("Request %s failed", incoming.id)
            outcome.status, outcome.error = 500, "internal_error"
            await reply.error(GatewayBug("The gateway failed."))
        finally:
            reply.quiet()
            leaving.stop()
            if reply.mute:  # whatever came of it afterwards, its client has not had it
                self.metrics.draining -= 1
                outcome.status, outcome.error = 499, "client_closed"
            meter(admission, outcome, self.limits, self.journal(), self.metrics)

    def _drain(self, seconds: float, reply: Reply, outcome: Outcome) -> float:
        """For how long a call goes on whose client has left. Where no upstream has it there is no bill to wait for."""
        if not outcome.reached or self.metrics.draining >= MOST_DRAINS:
            return 0.0
        self.metrics.draining += 1
        reply.silence()
        return seconds

    async def _first_that_answers(
        self, incoming: Incoming, asked: Asked, targets: Sequence[Target], catalog: Catalog, reply: Reply, outcome: Outcome
    ) -> None:
        deadline = time.monotonic() + self.timeouts.total_seconds
        tried = targets[:MOST_ATTEMPTS]
        self.health.begins(tried[0])
        for number, target in enumerate(tried, 1):
            # What a caller's own account is like concerns nobody else.
            learned = {} if target.callers_key else self.learned.setdefault(target.credential_id, {})
            ask = translate.ask_of(asked, incoming, target, learned, add_usage_option=self.health.takes_usage_option(target))
            send = (
                self._from if target.lease is None else partial(self.renewals.call, self._from, lambda: reply.content_sent, learned.clear)
            )
            try:
                try:
                    return await send(target, ask, catalog, incoming, reply, outcome, deadline)
                except UsageOptionRefused:
                    if ask.client_wants_usage or not ask.add_usage_option:
                        raise
                    ask.add_usage_option, outcome.without = False, "stream_options"
                    await send(target, ask, catalog, incoming, reply, outcome, deadline)
                    self.health.refuses_usage_option(target)  # only now is it known that the option was to blame
                    return None
                except OptionRefused as refused:
                    if refused.option in ask.left_out:
                        raise
                    ask.left_out.add(refused.option)
                    outcome.without = refused.option
                    return await send(target, ask, catalog, incoming, reply, outcome, deadline)
            except UpstreamFailure as problem:
                self.health.failed(target, problem.cause or problem, [one.credential_id for one in targets])
                self.metrics.upstream_failed(target.kind, type(problem).__name__)
                note(target, problem, incoming)
                if problem.unlearn:
                    learned.clear()
                if not isinstance(problem, UpstreamFailed):
                    raise
                if reply.content_sent:
                    raise UpstreamBroke(problem.message, code=problem.code) from None
                if number == len(tried) or (gateway_error(problem) and not self.health.may_try_again(tried[number])):
                    raise

    async def _from(
        self, target: Target, ask: Ask, catalog: Catalog, incoming: Incoming, reply: Reply, outcome: Outcome, deadline: float
    ) -> None:
        if reply.mute:
            raise ClientClosed("The client left.")  # the bill to wait for is that of the attempt before: nobody wants another
        outcome.begin(target, catalog.prices.find(target.public_model, incoming.at))
        try:
            first_calls = translate.first_calls(ask, target)
            if first_calls is None:
                request = translate.outgoing(ask, target)
                outcome.sent = time.monotonic()
            else:
                outcome.sent = time.monotonic()
                request = await upstream.after_first_calls(self.transport, first_calls, target, self.overseer, deadline)
            clock = Clock(self.overseer, deadline, incoming.task)
            outcome.reached = True
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
                        outcome.heard = time.monotonic()
                    clock.served()
                    await upstream.farewell(response, chunks)
                else:
                    body = await upstream.whole_body(response)
                    outcome.heard = time.monotonic()
                    answer = translate.whole(ask, target, body, response.content_type)
                    outcome.tokens, outcome.output_estimate = answer.tokens, answer.estimated_output()
                    await reply.whole(200, answer.body, answer.content_type)
            self.health.succeeded(target)
        except UpstreamFailure as problem:
            outcome.failed = problem.code or problem.type, problem.upstream_status or 0
            if not reply.content_sent and (problem.upstream_status or isinstance(problem, UpstreamUnreachable)):
                outcome.reached = False  # it refused, or never had the request: nothing is billed
            raise

    async def _models(self, reply: Reply, incoming: Incoming, principal: Principal, catalog: Catalog, model_id: str) -> None:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name, owner in visible_models(principal, catalog)]
        if not model_id:
            return await reply.json({"object": "list", "data": listed}, before_closing=unread_body(incoming))
        for one in listed:
            if one["id"] == model_id:
                return await reply.json(one, before_closing=unread_body(incoming))
        raise ModelNotFound(f"The model '{model_id}' does not exist or you do not have access to it.", param="model")


class GatewayBug(GatewayError):
    """Our own mistake. The log has the traceback; the client has the request id."""

    type = "server_error"
    code = "internal_error"


def find_endpoint(incoming: Incoming) -> tuple[Endpoint, str]:
    """The line of the table for this path, and the id for `/v1/models/ID`. Raises UnknownPath, WrongMethod."""
    endpoint, model_id = ENDPOINTS.get(incoming.path), ""
    if endpoint is None and incoming.path.startswith(MODEL) and len(incoming.path) > len(MODEL):
        endpoint, model_id = ENDPOINTS["/v1/models"], incoming.path[len(MODEL) :]
    if endpoint is None:
        raise UnknownPath(f"Invalid URL ({incoming.method} {incoming.path[:200]})")
    if incoming.method != endpoint.method:
        raise WrongMethod(
            f"Not allowed to {incoming.method} on {incoming.path[:200]}. Use {endpoint.method}.", allow=f"{endpoint.method}, OPTIONS"
        )
    return endpoint, model_id


def incoming_of(scope: Scope, receive: Receive, site: Site) -> Incoming:
    line: Line | None = scope["extensions"].get(LINE) if "extensions" in scope else None
    headers = header_dict(scope["headers"]) if line is None else line.fields
    incoming = Incoming(
        id=new_request_id(),
        method=scope["method"],
        path=scope["path"],
        headers=headers,
        address=client_address(scope, headers, site),
        receive=receive,
        task=asyncio.current_task() if line is None else line.task,
        line=line,
    )
    if b"x-upstream-key" in headers or b"x-openai-key" in headers:
        incoming.callers_key = (headers.get(b"x-upstream-key") or headers.get(b"x-openai-key") or b"").decode("latin-1").strip()
    if b"x-error-format" in headers:
        incoming.seed_errors = headers[b"x-error-format"].lower() == b"seed"
    return incoming


async def read_body(incoming: Incoming, limit_bytes: int) -> bytes:
    """Raises TooLarge before the excess is read, ClientClosed when the client leaves meanwhile."""
    announced = incoming.headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > limit_bytes:
        raise TooLarge(f"The body is larger than {limit_bytes} bytes.")
    if incoming.line is not None and (body := incoming.line.whole_body()) is not None:
        incoming.body_read = True
        if len(body) > limit_bytes:
            raise TooLarge(f"The body is larger than {limit_bytes} bytes.")
        return body
    parts: list[bytes] = []
    size = 0
    while True:
        message: Message = await incoming.receive()
        if message["type"] == "http.disconnect":
            raise ClientClosed("The client left.")
        part = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise TooLarge(f"The body is larger than {limit_bytes} bytes.")
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
