"""`/ws/usage`: a page that is open hears of new usage, under each server; strangers and other sites hear nothing."""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from asgiref.sync import sync_to_async
from channels.auth import AuthMiddlewareStack
from channels.testing import WebsocketCommunicator
from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.backends.db import SessionStore
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from accounts.models import Membership, Organization, Role, User
from proxy.dash import live
from tests.project.raw_http import Peer, memory_of, request, took
from tests.serving import Sluice, eventually
from tests.upstreams.openai import OpenAIUpstream, Step

SIGN_IN = """
from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.backends.db import SessionStore
from accounts.models import Membership, Organization, User
organization, _ = Organization.objects.get_or_create(slug={slug!r}, defaults={{"name": {slug!r}}})
user = User.objects.create_user({email!r}, "correct horse battery")
Membership.objects.create(user=user, organization=organization, role={role!r})
session = SessionStore()
session[SESSION_KEY], session[HASH_SESSION_KEY] = str(user.pk), user.get_session_auth_hash()
session[BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
session.save()
print(session.session_key)
"""


@dataclass
class Person:
    """A member of an organization, signed in."""

    email: str
    slug: str
    session: str


class House:
    """A Sluice under one of the servers."""

    def __init__(self, sluice: Sluice, server: str) -> None:
        self.sluice, self.server = sluice, server

    def person(self, role: str = "owner", slug: str = "") -> Person:
        slug = slug or f"live-{uuid.uuid4().hex[:8]}"
        email = f"{uuid.uuid4().hex[:8]}@example.org"
        return Person(
            email,
            slug,
            self.sluice.python(SIGN_IN.format(slug=slug, email=email, role=role)).strip(),
        )

    def key(self, person: Person) -> tuple[str, int]:
        """Its clear text and its number."""
        key = self.sluice.issue_key(email=person.email, organization=person.slug)
        number = self.sluice.python(f"from accounts.models import ApiKey; print(ApiKey.objects.get(handle={key[10:20]!r}).pk)")
        return key, int(number)

    def call(self, key: str) -> None:
        body = {"model": "sim/gpt-4o", "messages": [{"role": "user", "content": "hello"}]}
        answer = httpx.post(f"{self.sluice.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200

    def stored(self, person: Person) -> list[Any]:
        """The usage rows of the person's organization."""
        return [row for row in self.sluice.usage() if row["organization"] == person.slug]

    @contextmanager
    def opens(
        self, person: Person | None, slug: str = "", *, origin: str | None = "", path: str = "/ws/usage"
    ) -> Iterator[ClientConnection]:
        origin = self.sluice.url if origin == "" else origin
        slug = slug or (person.slug if person else "default")
        cookie = {"cookie": f"sessionid={person.session}"} if person else {}
        url = f"ws://127.0.0.1:{self.sluice.port}{path}?organization={slug}"
        with connect(url, origin=origin, additional_headers=cookie, open_timeout=20) as page:
            yield page

    def refuses(self, person: Person | None, slug: str = "", **options: Any) -> bool:
        with pytest.raises(InvalidStatus) as refusal, self.opens(person, slug, **options):
            pass
        return refusal.value.response.status_code == 403


@pytest.fixture(scope="module", params=["uvicorn", "daphne"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, upstream_server: OpenAIUpstream) -> Iterator[House]:
    sluice = Sluice(tmp_path_factory.mktemp(request.param) / "data", DRAIN_SECONDS="20", READER_SECONDS="1.5")
    sluice.migrate()
    sluice.add_openai(upstream_server, prefix="sim")
    yield House(sluice, request.param)
    sluice.close()


@pytest.fixture
def house(running: House, upstream: OpenAIUpstream) -> House:
    if running.sluice._server is None:
        running.sluice.start_again("--server", running.server)
    return running


def hears(page: ClientConnection, seconds: float = 8) -> Any:
    return json.loads(page.recv(timeout=seconds))


def hears_nothing(page: ClientConnection, seconds: float = 1.5) -> bool:
    with pytest.raises(TimeoutError):
        page.recv(timeout=seconds)
    return True


def end_of(page: ClientConnection) -> int:
    with pytest.raises(ConnectionClosed) as end:
        while True:
            page.recv(timeout=10)
    assert end.value.rcvd is not None
    return end.value.rcvd.code


def test_an_owner_hears_of_every_key_of_the_organization_and_of_no_other(house: House) -> None:
    owner, stranger = house.person(), house.person()
    member = house.person("member", owner.slug)
    (key, number), (members, members_number) = house.key(owner), house.key(member)
    with house.opens(owner) as page, house.opens(stranger) as other:
        house.call(key)
        assert hears(page) == {"keys": [number]}
        house.call(members)
        assert hears(page) == {"keys": [members_number]}
        assert hears_nothing(other)


def test_a_member_hears_of_own_keys_alone(house: House) -> None:
    owner = house.person()
    member = house.person("member", owner.slug)
    (key, _), (own, number) = house.key(owner), house.key(member)
    with house.opens(member) as page:
        house.call(key)
        assert hears_nothing(page)
        house.call(own)
        assert hears(page) == {"keys": [number]}


def test_what_was_used_before_the_page_could_listen_is_told_first(house: House) -> None:
    owner = house.person()
    member = house.person("member", owner.slug)
    (key, number), (own, members_number) = house.key(owner), house.key(member)
    house.call(key)
    house.call(own)
    eventually(lambda: len(house.stored(owner)) == 2, "not stored")
    with house.opens(owner) as page:
        assert set(hears(page)["keys"]) == {number, members_number}
    with house.opens(member) as page:
        assert hears(page) == {"keys": [members_number]}


def test_strangers_and_other_sites_hear_nothing(house: House) -> None:
    person, other = house.person(), house.person()
    forged = Person(person.email, person.slug, "a" * 32)
    assert house.refuses(None, person.slug)
    assert house.refuses(forged)
    assert house.refuses(person, other.slug)
    assert house.refuses(person, "nowhere")
    for origin in (
        None,
        "null",
        "https://evil.example",
        "http://127.0.0.1.evil.example",
        f"http://127.0.0.1:{house.sluice.port + 1}",
        "http://localhost",
    ):
        assert house.refuses(person, origin=origin), origin
    for path in ("/", "/ws", "/ws/usage/", "/ws/other", "/admin/", "/healthz", "/ws//usage"):
        assert house.refuses(person, path=path), path
    with house.opens(person) as page:
        assert page.ping().wait(5)


def test_where_the_gateway_answers_an_offer_is_ignored(house: House, upstream: OpenAIUpstream) -> None:
    person = house.person()
    key, _ = house.key(person)
    with pytest.raises(InvalidStatus) as refusal, house.opens(person, path="/v1/models"):
        pass
    assert refusal.value.response.status_code == 401
    assert json.loads(refusal.value.response.body)["error"]["code"] == "invalid_api_key"
    more = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
    body = {"model": "sim/gpt-4o", "messages": [{"role": "user", "content": "hello"}]}
    for _ in range(2):
        with Peer(house.sluice.port) as peer:
            assert peer.send(request(key=key, body=body, more=more)).answer().status == 200
    assert len(upstream.posts) == 2


def test_nothing_is_to_be_said_to_it(house: House) -> None:
    with house.opens(house.person()) as page:
        page.send("hello")
        assert end_of(page) == 4400


def test_who_leaves_is_forgotten(house: House) -> None:
    owner = house.person()
    key, number = house.key(owner)
    for _ in range(2):
        with house.opens(owner):
            pass
    house.call(key)
    with house.opens(owner) as page:
        house.call(key)
        assert hears(page)["keys"] == [number]


def test_a_drain_ends_it_at_once_and_says_why(house: House, upstream: OpenAIUpstream) -> None:
    person = house.person()
    key, _ = house.key(person)
    upstream.script(Step(text="one two three four five", delay_frame_ms=300))
    with house.opens(person) as page, Peer(house.sluice.port) as peer:
        body = {"model": "sim/gpt-4o", "messages": [{"role": "user", "content": "hello"}], "stream": True}
        peer.send(request(key=key, body=body))
        eventually(lambda: upstream.posts and upstream.posts[0].frames_sent, "not begun")
        server = house.sluice._server
        server.terminate()
        began = time.monotonic()
        assert end_of(page) == 1012
        assert took(began) < 1.2
        assert peer.answer().body.endswith(b"data: [DONE]\n\n")
    house.sluice._server = None
    assert server.wait(10) == 0
    assert took(began) < 10  # of the 20 s that it had
    assert "Traceback" not in house.sluice.log()


def test_an_open_page_alone_keeps_no_process(house: House) -> None:
    with house.opens(house.person()) as page, socket.create_connection(("127.0.0.1", house.sluice.port)):
        began = time.monotonic()
        assert house.sluice.stop() == 0
        assert took(began) < 8
        assert end_of(page) == 1012


def test_who_pings_and_does_not_read_costs_little(house: House) -> None:
    person = house.person()
    ping = b"\x89\xfd\0\0\0\0" + b"p" * 125
    head = request(
        f"/ws/usage?organization={person.slug}",
        method="GET",
        more="Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        f"Origin: {house.sluice.url}\r\nCookie: sessionid={person.session}\r\n",
    ).replace(b"Host: 127.0.0.1", f"Host: 127.0.0.1:{house.sluice.port}".encode())
    with Peer(house.sluice.port, receive_buffer=4096, send_buffer=4096, timeout=1) as peer:
        assert peer.send(head)._until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        before = memory_of(house.sluice.pid)
        began, sent = time.monotonic(), 0
        try:
            while sent < 64 << 20 and took(began) < 6:
                peer.send(ping * 500)
                sent += len(ping) * 500
        except (TimeoutError, ConnectionError):
            pass
        assert memory_of(house.sluice.pid) - before < 8 << 20
        assert sent < 16 << 20


# What happens in its process


@pytest.fixture
def watching(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A signed-in owner, and what makes a socket of theirs."""
    monkeypatch.setattr(live, "CHECK_AGAIN_SECONDS", 0)
    organization = Organization.objects.create(slug="acme", name="Acme")
    user = User.objects.create_user("owner@example.org", "correct horse battery")
    place = Membership.objects.create(user=user, organization=organization, role=Role.OWNER)
    session = SessionStore()
    session[SESSION_KEY], session[HASH_SESSION_KEY] = str(user.pk), user.get_session_auth_hash()
    session[BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
    session.save()
    headers = [(b"cookie", f"sessionid={session.session_key}".encode()), (b"host", b"testserver"), (b"origin", b"http://testserver")]
    return place, session, lambda: WebsocketCommunicator(live_socket, "/ws/usage?organization=acme", headers=headers)


async def live_socket(scope: Any, receive: Any, send: Any) -> None:
    await AuthMiddlewareStack(live.UsageConsumer.as_asgi())(scope, receive, send)


def ends_the_session(place: Membership, session: SessionStore) -> None:
    session.flush()


def changes_the_password(place: Membership, session: SessionStore) -> None:
    place.user.set_password("another horse battery")
    place.user.save(update_fields=["password"])


def leaves_the_organization(place: Membership, session: SessionStore) -> None:
    place.delete()


def is_switched_off(place: Membership, session: SessionStore) -> None:
    User.objects.filter(pk=place.user.pk).update(is_active=False)


def loses_the_organization(place: Membership, session: SessionStore) -> None:
    Organization.objects.update(is_active=False)


@pytest.mark.parametrize(
    "what",
    [ends_the_session, changes_the_password, leaves_the_organization, is_switched_off, loses_the_organization],
    ids=lambda what: what.__name__,
)
async def test_who_may_no_longer_look_hears_no_more(watching: Any, what: Callable[[Membership, SessionStore], None]) -> None:
    place, session, opens = watching
    used = [(place.organization_id, 7, place.user_id)]
    socket = opens()
    assert (await socket.connect(5))[0]
    await live.tell(used)
    assert json.loads(await socket.receive_from(5)) == {"keys": [7]}
    await sync_to_async(what)(place, session)
    await live.tell(used)
    assert await socket.receive_output(5) == {"type": "websocket.close", "code": 4403}
    await socket.disconnect()
    assert not live.watched


async def test_who_becomes_a_member_hears_of_own_keys_from_then_on(watching: Any) -> None:
    place, _, opens = watching
    socket = opens()
    await socket.connect(5)
    await Membership.objects.aupdate(role=Role.MEMBER)
    own, anothers = (place.organization_id, 7, place.user_id), (place.organization_id, 8, place.user_id + 1)
    elsewhere = (place.organization_id + 1, 9, place.user_id)
    await live.tell([own, anothers, elsewhere])
    assert json.loads(await socket.receive_from(5)) == {"keys": [7]}
    await live.tell([anothers])
    assert await socket.receive_nothing(0.2)
    await socket.disconnect()


async def test_very_many_keys_are_told_as_many(watching: Any) -> None:
    place, _, opens = watching
    socket = opens()
    await socket.connect(5)
    await live.tell([(place.organization_id, number, place.user_id) for number in range(live.MOST_KEYS_TOLD + 1)])
    assert json.loads(await socket.receive_from(5)) == {"keys": None}
    await socket.disconnect()
    assert not live.watched
