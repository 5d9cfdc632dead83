"""The simulated Google refuses what Google refuses: one that accepts anything would prove nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from tests.upstreams.gemini import BYPASS, GeminiUpstream, Step

HI: Any = {"role": "user", "parts": [{"text": "hi there"}]}
CALL: Any = {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {}}}]}
RESULT: Any = {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"result": "x"}}}]}
FORM = {"client_id": "c", "client_secret": "s"}


@pytest.fixture(scope="module")
def google() -> Iterator[GeminiUpstream]:
    with GeminiUpstream() as upstream:
        yield upstream


@pytest.fixture
def client(google: GeminiUpstream) -> Iterator[httpx.Client]:
    google.reset()
    with httpx.Client(base_url=google.base_url, headers={"authorization": "Bearer ya29.sim-ok"}, timeout=5) as client:
        yield client


def generate(client: httpx.Client, *contents: Any, model: str = "gemini-2.5-pro", **request: Any) -> httpx.Response:
    body = {"model": model, "project": "my-project-123", "request": {"contents": list(contents or (HI,)), **request}}
    return client.post("/v1internal:generateContent", json=body)


def declared(**declaration: Any) -> Any:
    return [{"functionDeclarations": [{"name": "f", **declaration}]}]


def with_signature(signature: str) -> Any:
    return {"role": "model", "parts": [{**CALL["parts"][0], "thoughtSignature": signature}]}


THREE = "gemini-3-flash-preview"
REFUSED: list[tuple[str, list[Any], dict[str, Any]]] = [
    ('Unknown name "messages"', [HI], {"messages": []}),
    ('Unknown name "max_tokens"', [HI], {"generationConfig": {"max_tokens": 5}}),
    ('Unknown name "$schema"', [HI], {"tools": declared(parameters={"$schema": "x"})}),
    ('Unknown name "const"', [HI], {"tools": declared(parameters={"properties": {"a": {"const": 1}}})}),
    ('Unknown name "reasoning"', [{"role": "user", "parts": [{"text": "x", "reasoning": "y"}]}], {}),
    ("oneof", [{"role": "user", "parts": [{"thought": True}]}], {}),
    ("parts must not be empty", [{"role": "user", "parts": []}], {}),
    ("valid role", [{"role": "assistant", "parts": [{"text": "x"}]}], {}),
    ("Base64", [{"role": "user", "parts": [{"inlineData": {"mimeType": "image/png", "data": "%"}}]}], {}),
    ("number of function response parts", [HI, CALL], {}),
    ("number of function response parts", [HI, CALL, HI], {}),
    ("number of function response parts", [HI, RESULT], {}),
    ("number of function response parts", [HI, CALL, {"role": "user", "parts": RESULT["parts"] * 2}], {}),
    ("missing a thought_signature", [HI, CALL, RESULT], {"model": THREE}),
    ("Corrupted thought signature", [HI, with_signature("QUJD"), RESULT], {"model": THREE}),
    ("Invalid function name", [HI], {"tools": [{"functionDeclarations": [{"name": "a b"}]}]}),
    ("Duplicate function", [HI], {"tools": [{"functionDeclarations": [{"name": "f"}, {"name": "f"}]}]}),
    (
        "Allowed function names",
        [HI],
        {"tools": declared(), "toolConfig": {"functionCallingConfig": {"mode": "AUTO", "allowedFunctionNames": ["f"]}}},
    ),
    ("must be declared", [HI], {"toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["g"]}}}),
    ("only one of thinking", [HI], {"generationConfig": {"thinkingConfig": {"thinkingBudget": 5, "thinkingLevel": "LOW"}}}),
    ("thinking budget", [HI], {"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}}),
    ("Thinking level", [HI], {"model": "gemini-3-pro-preview", "generationConfig": {"thinkingConfig": {"thinkingLevel": "MEDIUM"}}}),
    ("not supported by this model", [HI], {"model": "gemma-4-31b-it", "generationConfig": {"thinkingConfig": {}}}),
    ("temperature", [HI], {"generationConfig": {"temperature": 3}}),
    ("candidateCount", [HI], {"generationConfig": {"candidateCount": 2}}),
    ("seed", [HI], {"generationConfig": {"seed": 2**31}}),
    ("maxOutputTokens", [HI], {"generationConfig": {"maxOutputTokens": 65_537}}),
    ("stop sequences", [HI], {"generationConfig": {"stopSequences": list("abcdef")}}),
    ("Penalty", [HI], {"model": THREE, "generationConfig": {"presencePenalty": 1}}),
    ("is unsupported", [HI], {"tools": declared(), "generationConfig": {"responseMimeType": "application/json"}}),
]


@pytest.mark.parametrize(("words", "contents", "request_"), REFUSED)
def test_what_google_refuses_is_refused(client: httpx.Client, words: str, contents: list[Any], request_: dict[str, Any]) -> None:
    answer = generate(client, *contents, **{"model": "gemini-2.5-pro", **request_})

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["status"]) == (400, 400, "INVALID_ARGUMENT")
    assert words in error["message"]


def test_unknown_names_are_told_with_their_place_and_recorded(client: httpx.Client, google: GeminiUpstream) -> None:
    error = generate(client, generationConfig={"max_tokens": 5}).json()["error"]

    assert error["details"][0]["fieldViolations"][0]["field"] == "request.generation_config"
    assert google.last.unknown_fields == {"request.generation_config.max_tokens": 5}


def test_both_spellings_of_a_name_are_taken(client: httpx.Client) -> None:
    assert generate(client, generation_config={"max_output_tokens": 5}, systemInstruction={"parts": [{"text": "x"}]}).status_code == 200


def test_tokens_projects_models_and_paths_are_looked_up(client: httpx.Client, google: GeminiUpstream) -> None:
    def status(headers: dict[str, str] | None = None, **body: Any) -> tuple[int, str]:
        given = {"model": "gemini-2.5-pro", "project": "my-project-123", "request": {"contents": [HI]}, **body}
        answer = client.post("/v1internal:generateContent", json=given, headers=headers or {})
        return answer.status_code, answer.json()["error"]["status"]

    assert status({"authorization": "Bearer ya29.real"}) == (401, "UNAUTHENTICATED")
    assert status(project="default") == (403, "PERMISSION_DENIED")
    assert status(model="gemini-1") == (404, "NOT_FOUND")
    assert client.post("/v1internal/generateContent", json={}).status_code == 404
    google.expired.add("ya29.sim-ok")
    assert status() == (401, "UNAUTHENTICATED")


def test_a_signature_that_was_issued_or_the_bypass_is_taken(client: httpx.Client) -> None:
    asked = {"role": "user", "parts": [{"text": "hi #sim:tool=f"}]}
    said = generate(client, asked, model=THREE, tools=declared()).json()["response"]["candidates"][0]["content"]

    assert generate(client, asked, said, RESULT, model=THREE).status_code == 200
    assert generate(client, asked, with_signature(BYPASS), RESULT, model=THREE).status_code == 200
    # What lies before the last question is not looked at any more.
    assert generate(client, asked, CALL, RESULT, {"role": "model", "parts": [{"text": "x"}]}, HI, model=THREE).status_code == 200


def test_a_stream_is_events_with_alt_sse_and_else_an_array(client: httpx.Client) -> None:
    body = {"model": "gemini-2.5-pro", "project": "my-project-123", "request": {"contents": [HI]}}
    events = client.post("/v1internal:streamGenerateContent?alt=sse", json=body)
    array = client.post("/v1internal:streamGenerateContent", json=body)

    assert events.headers["content-type"] == "text/event-stream"
    frames = [json.loads(one.removeprefix(b"data: ")) for one in events.content.strip().split(b"\r\n\r\n")]
    texts = [one["response"]["candidates"][0]["content"]["parts"][0]["text"] for one in frames]
    assert "".join(texts) == "echo: hi there"
    assert [len(one) for one in (frames, array.json())] == [4, 4]
    assert b"[DONE]" not in events.content
    assert [frame["response"]["usageMetadata"].get("promptTokenCount") for frame in frames] == [None, None, None, 2]
    refused = client.post("/v1internal:streamGenerateContent?alt=sse", json={**body, "model": "sim-429"})
    assert refused.json()[0]["error"]["code"] == 429


def test_thoughts_are_not_counted(client: httpx.Client) -> None:
    def count(*parts: Any) -> httpx.Response:
        body = {"request": {"model": "models/gemini-2.5-pro", "contents": [{"role": "user", "parts": list(parts)}]}}
        return client.post("/v1internal:countTokens", json=body)

    assert count({"text": "hi there"}).json() == {"totalTokens": 2}
    assert count({"text": "hm", "thought": True}).status_code == 400


def test_the_free_tier_takes_no_project(client: httpx.Client) -> None:
    headers = {"authorization": "Bearer ya29.sim-new"}
    body: dict[str, Any] = {"tierId": "free-tier", "metadata": {}}
    refused = client.post("/v1internal:onboardUser", json={**body, "cloudaicompanionProject": "p"}, headers=headers)
    begun = client.post("/v1internal:onboardUser", json=body, headers=headers).json()
    polled = [client.get(f"/v1internal/{begun['name']}", headers=headers).json()["done"] for _ in range(2)]

    assert refused.json()["error"]["status"] == "FAILED_PRECONDITION"
    assert (begun["done"], polled) == (False, [False, True])


def test_a_sign_in_gives_tokens_for_its_code_once(client: httpx.Client, google: GeminiUpstream) -> None:
    verifier = "v" * 43
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
    asked = {"response_type": "code", "client_id": "c", "redirect_uri": "http://127.0.0.1:8085/oauth2callback", "state": "abc"}
    back = client.get(google.authorize_url, params={**asked, "access_type": "offline", "code_challenge": challenge})
    given = parse_qs(urlsplit(back.headers["location"]).query)
    form = {
        **FORM,
        "grant_type": "authorization_code",
        "code": given["code"][0],
        "redirect_uri": asked["redirect_uri"],
        "code_verifier": verifier,
    }

    assert (back.status_code, given["state"]) == (302, ["abc"])
    reply = client.post(google.token_url, data=form).json()
    assert reply["refresh_token"].startswith("1//sim-refresh")
    assert (
        client.get("/oauth2/v2/userinfo", headers={"authorization": f"Bearer {reply['access_token']}"}).json()["email"] == "a@example.org"
    )
    assert client.post(google.token_url, data=form).json()["error"] == "invalid_grant"
    denied = client.get(google.authorize_url, params={**asked, "error": "access_denied"})
    assert "error=access_denied" in denied.headers["location"]


def test_a_refresh_token_works_until_it_is_dead(client: httpx.Client, google: GeminiUpstream) -> None:
    form = {**FORM, "grant_type": "refresh_token", "refresh_token": "1//sim-refresh"}

    reply = client.post(google.token_url, data=form).json()
    assert "refresh_token" not in reply
    google.clock_offset = 4000
    assert client.get("/oauth2/v2/userinfo", headers={"authorization": f"Bearer {reply['access_token']}"}).status_code == 401
    google.rotates = True
    assert "refresh_token" in client.post(google.token_url, data=form).json()
    google.token_errors.append((503, {}))
    assert client.post(google.token_url, data=form).status_code == 503
    google.dead.add("1//sim-refresh")
    assert client.post(google.token_url, data=form).status_code == 400
    assert client.post(google.token_url, data={**form, "client_id": ""}).json()["error"] == "invalid_request"
    google.client = ("other", "s")
    assert client.post(google.token_url, data=form).status_code == 401
    google.client = None


def test_a_script_goes_before_everything_else(client: httpx.Client, google: GeminiUpstream) -> None:
    google.script(Step(text="scripted", reasoning="hm", finish_reason="SAFETY"), Step(scenario="503"))
    first = generate(client).json()["response"]

    assert first["candidates"][0] == {
        "content": {"role": "model", "parts": [{"thought": True, "text": "hm"}, {"text": "scripted"}]},
        "finishReason": "SAFETY",
    }
    assert first["usageMetadata"]["totalTokenCount"] == 4
    assert [generate(client).status_code, generate(client).status_code] == [503, 200]
