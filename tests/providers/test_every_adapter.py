"""What every adapter must do, whatever its upstream speaks: shown on the recordings of each.

An adapter brings two files in `fixtures/<name>/`, the bytes of its upstream's answers to one question: `hello.stream`
and `hello.whole`. Both say the same words, and how many tokens were counted.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from providers import registry
from providers.adapter import Adapter, Ask, Reader, Target
from providers.failures import UpstreamFailure
from providers.secrets import SecretText
from proxy.pipeline import authenticate

FIXTURES = Path(__file__).parent / "fixtures"
SECRET = "sk-recorded-0123456789"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Recorded:
    """An adapter, and what its upstream answered."""

    adapter: Adapter
    stream: bytes
    whole: bytes

    @property
    def target(self) -> Target:
        name = self.adapter.name
        return Target(name, 1, "recorded", self.adapter.base_url, SecretText(SECRET), "their-model", f"{name}/their-model")

    def ask(self, *, stream: bool) -> Ask:
        body = {"model": f"{self.adapter.name}/their-model", "messages": [{"role": "user", "content": "Hello"}], "stream": stream, "n": 1}
        return Ask("chat/completions", body, stream=stream, request_id="0123456789abcdef", client_wants_usage=True)

    def reader(self) -> Reader:
        return self.adapter.reader(self.ask(stream=True), self.target)


@pytest.fixture(params=registry.names())
def recorded(request: pytest.FixtureRequest) -> Recorded:
    files = [FIXTURES / request.param / name for name in ("hello.stream", "hello.whole")]
    for file in files:
        assert file.exists(), f"The adapter '{request.param}' has no recording: {file.relative_to(FIXTURES.parent.parent.parent)}"
    stream, whole = (file.read_bytes() for file in files)
    return Recorded(registry.adapter(request.param), stream, whole)


def events_of(data: bytes) -> list[dict[str, Any]]:
    """The decoded events, without the time at which they were made."""
    events = [json.loads(event.removeprefix(b"data: ")) for event in data.split(b"\n\n") if event.startswith(b"data: {")]
    return [{name: value for name, value in event.items() if name != "created"} for event in events]


def text_of(data: bytes) -> str:
    return "".join(choice["delta"].get("content") or "" for event in events_of(data) for choice in event["choices"])


def read(reader: Reader, *parts: bytes) -> bytes:
    return b"".join(reader.feed(part) for part in parts) + reader.end()


def a_request_goes_to_its_target_alone(recorded: Recorded) -> None:
    for stream in (True, False):
        ask = recorded.ask(stream=stream)
        before = copy.deepcopy(ask.body)
        request = recorded.adapter.request(ask, recorded.target)
        assert str(request.url).startswith(f"{recorded.target.base_url}/")
        assert SECRET not in str(request.url)
        assert SECRET.encode() not in request.body
        assert b"their-model" in request.body
        assert f"{recorded.adapter.name}/their-model".encode() not in request.body
        assert ask.body == before, "the next target must find the body as the client sent it"


def a_stream_becomes_openais_events(recorded: Recorded) -> None:
    reader = recorded.reader()
    said = read(reader, recorded.stream)
    events = events_of(said)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert text_of(said)
    assert [choice["finish_reason"] for event in events for choice in event["choices"]].count("stop") == 1
    assert said.endswith(DONE)
    assert (reader.started, reader.finished) == (True, True)
    assert reader.events > 0
    assert (reader.tokens is not None) == recorded.adapter.counts_tokens
    if reader.tokens is not None:
        assert events[-1]["usage"]["total_tokens"] == reader.tokens.total
    else:
        assert events[-1]["usage"]["completion_tokens"] == reader.estimated_output() > 0


def a_stream_reads_the_same_however_it_is_cut(recorded: Recorded) -> None:
    expected = events_of(read(recorded.reader(), recorded.stream))
    for size in (1, 7, 100):
        parts = [recorded.stream[start : start + size] for start in range(0, len(recorded.stream), size)]
        assert events_of(read(recorded.reader(), *parts)) == expected


def nothing_is_said_before_the_stream_has_started(recorded: Recorded) -> None:
    reader, said = recorded.reader(), b""
    for at in range(len(recorded.stream)):
        said += reader.feed(recorded.stream[at : at + 1])
        assert reader.started or not text_of(said), "another target could still be tried, and would repeat it"


def a_stream_that_was_cut_off_never_looks_whole(recorded: Recorded) -> None:
    broken = 0
    for end in range(len(recorded.stream)):
        reader = recorded.reader()
        try:
            said = read(reader, recorded.stream[:end])
        except UpstreamFailure:
            broken += 1
        else:
            # All was said that matters: only what stands behind the last word was lost.
            assert '"finish_reason":"stop"' in said.decode("utf-8", "replace").replace(" ", "")
            assert said.rstrip().endswith(b"data: [DONE]")
    assert broken


def a_whole_answer_says_what_the_stream_says(recorded: Recorded) -> None:
    whole = recorded.adapter.answer(recorded.ask(stream=False), recorded.target, recorded.whole, "application/json")
    answer = json.loads(whole.body)
    assert answer["object"] == "chat.completion"
    [choice] = answer["choices"]
    reader = recorded.reader()
    assert choice["message"]["content"] == text_of(read(reader, recorded.stream))
    assert choice["finish_reason"] == "stop"
    assert (whole.tokens is not None) == recorded.adapter.counts_tokens
    assert whole.tokens == reader.tokens
    if whole.tokens is not None:
        assert answer["usage"]["total_tokens"] == whole.tokens.total
    else:
        assert answer["usage"]["completion_tokens"] == whole.estimated_output() == reader.estimated_output() > 0


def rubbish_is_a_failure_of_the_upstream(recorded: Recorded) -> None:
    for rubbish in (b"<html>Bad gateway</html>\n\n", b"", b"\xff\xfe\x00", b"[" * 50_000 + b"\n\n"):
        with pytest.raises(UpstreamFailure):
            recorded.adapter.answer(recorded.ask(stream=False), recorded.target, rubbish, "application/json")
        with pytest.raises(UpstreamFailure):
            read(recorded.reader(), rubbish)


def a_refusal_is_told_by_its_status(recorded: Recorded) -> None:
    codes = {401: "upstream_auth_failed", 404: "model_not_found", 429: "rate_limit_exceeded", 500: "upstream_error"}
    for status, code in codes.items():
        failure = recorded.adapter.failure(recorded.target, status, {}, b"<html>no</html>")
        assert (failure.code, failure.upstream_status) == (code, status)
        assert "<html>" not in failure.message


def it_sees_no_header_that_carries_a_key(recorded: Recorded) -> None:
    names = {name.encode() for name in recorded.adapter.reads}
    assert all(name == name.lower() for name in names)
    assert names.isdisjoint({*authenticate.HEADERS, b"x-upstream-key", b"x-openai-key", b"cookie", b"proxy-authorization"})


CHECKS: list[Callable[[Recorded], None]] = [
    a_request_goes_to_its_target_alone,
    a_stream_becomes_openais_events,
    a_stream_reads_the_same_however_it_is_cut,
    nothing_is_said_before_the_stream_has_started,
    a_stream_that_was_cut_off_never_looks_whole,
    a_whole_answer_says_what_the_stream_says,
    rubbish_is_a_failure_of_the_upstream,
    a_refusal_is_told_by_its_status,
    it_sees_no_header_that_carries_a_key,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_adapter(check: Callable[[Recorded], None], recorded: Recorded) -> None:
    check(recorded)
