"""For upstreams that take and give plain text alone: the text of a chat message, and what of a request they cannot honour."""

from __future__ import annotations

from typing import Any

from providers.failures import InvalidAtUpstream
from providers.wire import Json


def refuse_what_text_cannot_be(body: Json, *, also: frozenset[str] = frozenset()) -> None:
    """Raises InvalidAtUpstream for a parameter without which the answer would be another than the one that was asked for.

    `also`: parameters that this upstream lacks beside those, refused when they are set to anything that asks for something."""
    for name in ("tools", "functions", "audio", "web_search_options", *sorted(also)):
        if body.get(name) not in (None, False, [], 0):
            raise _unsupported(name, f"This upstream has no '{name}'.")
    for name in ("tool_choice", "function_call"):
        if body.get(name) not in (None, "none", "auto"):
            raise _unsupported(name, "This upstream cannot call tools.")
    if (body.get("n") or 1) > 1:
        raise _unsupported("n", "This upstream gives one answer at a time.")
    if (body.get("response_format") or {}).get("type") not in (None, "text"):
        raise _unsupported("response_format", "This upstream answers in text, and cannot be held to a format.")
    if body.get("modalities") not in (None, [], ["text"]):
        raise _unsupported("modalities", "This upstream answers in text alone.")


def messages_of(body: Json) -> list[Json]:
    """The messages. Raises InvalidAtUpstream when there are none."""
    messages: list[Json] = body.get("messages") or []
    if not messages:
        raise InvalidAtUpstream("There is no message to answer.", param="messages", code="empty_array")
    return messages


def text_of(message: Json, at: int) -> str:
    """The text of the message at this place, its parts joined by line ends. Raises InvalidAtUpstream for an image and the like."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_text_of_part(part, at) for part in content)
    if content is None and message.get("role") in ("assistant", "tool", "function"):
        return ""
    raise InvalidAtUpstream(
        f"Invalid type for 'messages[{at}].content': expected a string or a list of parts.",
        param=f"messages[{at}].content",
        code="invalid_type",
    )


def unsupported_role(message: Json, at: int) -> InvalidAtUpstream:
    role = message.get("role")
    shown = role if isinstance(role, str) and role.isidentifier() and len(role) <= 20 else "that"
    return InvalidAtUpstream(
        f"This upstream takes no messages of the role '{shown}'.", param=f"messages[{at}].role", code="unsupported_role"
    )


def _text_of_part(part: Any, at: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("refusal" if kind == "refusal" else "text") if kind in ("text", "refusal") else None
    if not isinstance(text, str):
        raise InvalidAtUpstream(
            "This upstream takes text alone: no images, audio or files.", param=f"messages[{at}].content", code="unsupported_content"
        )
    return text


def _unsupported(name: str, message: str) -> InvalidAtUpstream:
    return InvalidAtUpstream(message, param=name, code="unsupported_parameter")
