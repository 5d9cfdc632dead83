"""CodeGeeX: the chat of the vendor's editor plugin, a private interface that nobody documents (protocol reference of it, section 4)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import msgspec

from providers import wire
from providers.adapter import USER_AGENT, Adapter, Ask, Reader, Target, Whole
from providers.chat import BadFrame, ChatReader
from providers.exchange import Outgoing
from providers.failures import ForbiddenAtUpstream, InvalidAtUpstream, UpstreamFailure, UpstreamProtocol
from providers.plain import messages_of, refuse_what_text_cannot_be, text_of, unsupported_role
from providers.said import Said, clean, failure_of_said, said_in, wait_seconds_in
from providers.wire import Json

# Settings that go out under their own names. They are of one account, as its token is: none goes out with another's.
IDENTITY = ("user_id", "user_role", "ide", "ide_version", "plugin_version")
NOT_HERE = frozenset({"logprobs", "top_logprobs"})
TURNS = {"system": "system", "developer": "system", "user": "query", "tool": "query", "function": "query", "assistant": "answer"}
WELL = frozenset({0, 200})


class CodeGeeX(Adapter):
    name = "codegeex"
    title = "CodeGeeX"
    base_url = "https://codegeex.cn"
    policy = "restricted"
    policy_source = "https://codegeex.cn"
    policy_note = (
        "A private interface, made for the vendor's own plugin and documented nowhere: it may change or close without notice, "
        "and the vendor may end accounts that are used through it."
    )
    settings = frozenset({"user_id", "user_role", "ide", "ide_version", "plugin_version", "machine_id", "talk_id", "locale"})
    counts_tokens = False

    def request(self, ask: Ask, target: Target) -> Outgoing:
        refuse_what_text_cannot_be(ask.body, also=NOT_HERE)
        # A token that the caller brought is of an account of which we know nothing.
        settings: Mapping[str, str] = {} if target.callers_key else target.settings
        talk_id = settings.get("talk_id") or str(uuid5(NAMESPACE_URL, f"{ask.request_id}/{target.credential_id}"))
        talk = _talk(messages_of(ask.body))
        body: Json = {
            **{name: _as_sent(name, settings[name]) for name in IDENTITY if settings.get(name)},
            "machineId": settings.get("machine_id") or _machine_id(target),
            "talkId": talk_id,
            "locale": target.settings.get("locale") or "en",
            "model": target.model,
            "agent": None,
            "candidates": {"candidate_msg_id": "", "candidate_type": "", "selected_candidate": ""},
            "prompt": talk.prompt,
            "history": [
                {"query": query, "answer": answer, "id": str(uuid5(NAMESPACE_URL, f"{talk_id}/{at}"))}
                for at, (query, answer) in enumerate(talk.history)
            ],
        }
        headers = {
            "code-token": target.secret.reveal(),
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",
            "User-Agent": USER_AGENT,
        }
        # Whole answers are put together from the stream: no client has shown what the other form looks like.
        return target.post("/prod/code/chatCodeSseV3/chat", headers, wire.encode_json(body))

    def reader(self, ask: Ask, target: Target) -> Reader:
        return Turn(ask, target)

    def answer(self, ask: Ask, target: Target, body: bytes, content_type: str) -> Whole:
        return Turn(ask, target).whole(body)

    def failure(self, target: Target, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        said = said_in(body)
        return _failure(target, status, said if said.message else _msg_in(body), wait_seconds_in(headers))

    def models_request(self, target: Target) -> Outgoing:
        """The list is the same for all, and is asked for without a token, as the plugin does."""
        return target.get("/prod/v3/chat/model", {"Accept": "application/json", "User-Agent": USER_AGENT})

    def models(self, body: bytes) -> dict[str, Json]:
        try:
            listed = wire.decode_answer(body)
        except (msgspec.DecodeError, RecursionError):
            raise UpstreamProtocol("The list of models could not be read.") from None
        options = listed.get("options") if isinstance(listed, dict) else None
        if not isinstance(options, list):
            raise UpstreamProtocol("The list of models has an unknown shape.")
        found = {one["id"]: one for one in options if isinstance(one, dict) and isinstance(one.get("id"), str) and one["id"]}
        return {name: {key: one[key] for key in ("id", "name") if key in one} for name, one in found.items()}


def _as_sent(name: str, value: str) -> int | str:
    return int(value) if name == "user_role" and value.isascii() and value.isdecimal() and len(value) < 10 else value


def _machine_id(target: Target) -> str:
    """Of an account whose plugin's machine is not known: always the same, and another for each token. The token cannot be had from it."""
    return hashlib.sha256(f"sluice machine {target.secret.reveal()}".encode()).hexdigest()[:32]


# What goes there


@dataclass(slots=True)
class Talk:
    """A conversation in this upstream's form: what is asked now, and the questions and answers before it."""

    prompt: str = ""
    history: list[tuple[str, str]] = field(default_factory=list)


def _talk(messages: list[Json]) -> Talk:
    """Raises InvalidAtUpstream for what is no text, and where the last word is not the client's."""
    system: list[str] = []
    turns: list[tuple[str, list[str]]] = []  # of the query and of the answer in turn; one after the other of the same side is one turn
    for at, message in enumerate(messages):
        role = message.get("role")
        side = TURNS.get(role) if isinstance(role, str) else None
        if side is None:
            raise unsupported_role(message, at)
        text = _with_calls(message, text_of(message, at))
        if side == "system":
            system.append(text)
        elif turns and turns[-1][0] == side:
            turns[-1][1].append(text)
        else:
            turns.append((side, [text]))
    if turns and turns[-1][0] == "answer":
        raise InvalidAtUpstream("The last message must be the user's: this upstream does not go on with an answer.", param="messages")
    if turns and turns[0][0] == "answer":
        turns.insert(0, ("query", []))
    said = ["\n\n".join(filter(None, texts)) for _, texts in turns] or [""]
    if system:
        said[0] = "\n\n".join(filter(None, ["[System]\n" + "\n\n".join(system), said[0] and f"[User]\n{said[0]}"]))
    return Talk(prompt=said[-1], history=list(zip(said[:-1:2], said[1::2], strict=True)))


def _with_calls(message: Json, text: str) -> str:
    """Calls of tools in the history, and what they gave, are told in words: this upstream knows neither."""
    if message.get("role") in ("tool", "function"):
        return f"[Result of the tool {message.get('name') or message.get('tool_call_id') or ''}]\n{text}"
    calls = message.get("tool_calls")
    functions = (
        [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else [message.get("function_call")]
    )
    told = [f"[Call of the tool {one.get('name')}]\n{one.get('arguments')}" for one in functions if isinstance(one, dict)]
    return "\n\n".join(filter(None, [text, *told]))


# What comes back


class Turn(ChatReader):
    """Events `add` with a piece each and `finish` with the whole text again; or one object with all of it, or with an error."""

    def __init__(self, ask: Ask, target: Target) -> None:
        super().__init__(ask, target)
        self._added: list[str] = []

    def frame(self, data: bytes, event: str) -> None:
        value = wire.decode_json(data)
        if not isinstance(value, dict):
            raise BadFrame
        if event == "add":
            self._added.append(_text_in(value))
            self.text(self._added[-1])
        elif event == "finish":
            self._finish(_text_in(value), value.get("finish_reason"))
        else:  # `processing` tells of a search, and what comes with no name or a new one is nothing to say, but it may be an error
            self._other(value)

    def _finish(self, whole: str, reason: Any) -> None:
        """The text is the whole answer: at most what is missing of it is said. Where it differs, what was said already stands."""
        added = "".join(self._added)
        if not (whole or added):
            raise UpstreamProtocol("The upstream's answer is empty.")
        if whole.startswith(added):
            self.text(whole[len(added) :])
        self.reason(reason if isinstance(reason, str) and reason else "stop")
        self.complete()

    def _other(self, value: Json) -> None:
        code, inner = value.get("code"), value.get("data")
        if isinstance(code, int) and code not in WELL:
            raise _failure(self._target, code, _msg_of(value), None)
        if self.form == "objects" and isinstance(inner, dict) and _text_in(inner):
            self._finish(_text_in(inner), inner.get("finish_reason"))


def _text_in(value: Json) -> str:
    text = value.get("text")
    return text if isinstance(text, str) else ""


def _msg_in(body: bytes) -> Said:
    try:
        value = wire.decode_answer(body)
    except (msgspec.DecodeError, RecursionError):
        return Said()
    return _msg_of(value) if isinstance(value, dict) else Said()


def _msg_of(value: Json) -> Said:
    msg = value.get("msg")
    return Said(message=clean(msg) if isinstance(msg, str) else "")


def _failure(target: Target, status: int, said: Said, wait_seconds: float | None) -> UpstreamFailure:
    problem = failure_of_said(target, status, said, wait_seconds)
    if isinstance(problem, ForbiddenAtUpstream):
        problem.whole_account = True  # here that says the same as 401: the token is good for nothing any more
    return problem
