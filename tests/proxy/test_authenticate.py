"""Who calls: the whole key decides, nothing else does, and a wrong one costs nearly nothing."""

import ipaddress
import logging
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounts.principal import Principal, digest, mint
from proxy.call import Incoming, new_request_id
from proxy.catalog import Catalog
from proxy.errors import ApiError, InvalidRequest, IpNotAuthorized, Unauthenticated
from proxy.pipeline.authenticate import authenticate

PEPPER = b"p" * 32


class Database:
    """Counts how often it is asked."""

    def __init__(self, **keys: Principal) -> None:
        self.keys = {digest(PEPPER, key): principal for key, principal in keys.items()}
        self.asked = 0

    async def __call__(self, digests) -> Principal | None:
        self.asked += 1
        return next((self.keys[one] for one in digests if one in self.keys), None)


def principal(number: int = 1, **fields) -> Principal:
    return Principal(key_id=number, organization_id=1, user_id=1, **fields)


def catalog(keys: dict[str, Principal]) -> Catalog:
    return Catalog(peppers=(PEPPER,), principals={digest(PEPPER, key): one for key, one in keys.items()})


def incoming(headers: dict[bytes, bytes], address: str = "203.0.113.7") -> Incoming:
    return Incoming(id=new_request_id(), method="POST", path="/v1/chat/completions", headers=headers, address=address, receive=None)


def call(headers: dict[bytes, bytes], known: Catalog, load=None, address: str = "203.0.113.7") -> Principal:
    trip = authenticate(incoming(headers, address), known, load or Database())
    try:
        trip.send(None)  # nothing here waits, so no loop is needed
    except StopIteration as end:
        return end.value
    raise AssertionError("It waits for something.")


@pytest.mark.parametrize("header", [b"authorization", b"x-api-key", b"x-goog-api-key"])
def test_the_key_may_come_in_any_of_three_headers(header):
    key, _ = mint()
    value = f"Bearer {key}" if header == b"authorization" else key
    assert call({header: value.encode()}, catalog({key: principal(5)})).key_id == 5


def test_the_same_key_twice_is_one_key_and_two_that_differ_are_refused():
    key, other = mint()[0], mint()[0]
    known = catalog({key: principal(1), other: principal(2)})
    same = {b"authorization": f"Bearer {key}".encode(), b"x-api-key": key.encode()}
    assert call(same, known).key_id == 1
    with pytest.raises(InvalidRequest):
        call(same | {b"x-api-key": other.encode()}, known)


@pytest.mark.parametrize(
    "value", [b"", b"Bearer", b"Bearer ", b"Basic abc", b"Bearer x", "Bearer schlüssel-lang-genug".encode(), b"Bearer a\0bcdefghij"]
)
def test_what_cannot_be_a_key_is_refused_without_a_look_up(value):
    database = Database()
    with pytest.raises(Unauthenticated):
        call({b"authorization": value}, catalog({}), database)
    assert database.asked == 0


def test_a_typo_in_an_issued_key_is_refused_without_a_look_up():
    key, _ = mint()
    database = Database(**{key: principal()})
    for position in range(len("sk-sluice-"), len(key)):
        typo = key[:position] + ("a" if key[position] != "a" else "b") + key[position + 1 :]
        with pytest.raises(Unauthenticated):
            call({b"x-api-key": typo.encode()}, catalog({key: principal()}), database)
    assert database.asked == 0


def test_a_key_that_memory_does_not_know_is_looked_up_once():
    key, _ = mint()
    database = Database(**{key: principal(9)})
    assert call({b"x-api-key": key.encode()}, catalog({}), database).key_id == 9
    assert database.asked == 1


@given(st.binary(max_size=300))
@settings(max_examples=2000, deadline=None)
def test_b07_whatever_stands_in_the_header_is_refused_at_the_cost_of_one_look_up(value):
    """SQL, NUL, unicode, anything: the value is hashed before the database sees it, and the answer is 401 or 400."""
    database = Database()
    with pytest.raises(ApiError) as refused:
        call({b"authorization": b"Bearer " + value, b"x-api-key": value}, catalog({mint()[0]: principal()}), database)
    assert refused.value.status in (400, 401)
    assert database.asked <= 1
    shown = value.decode("latin-1").strip()
    assert len(shown) < 12 or shown not in refused.value.message


def test_b07_twenty_thousand_headers_near_a_key_cost_one_look_up_each_at_most_and_are_in_no_log(caplog):
    """Half of them are mutations of a key that exists, the rest are what attackers try."""
    caplog.set_level(logging.DEBUG)
    key, chance = mint()[0], random.Random(7)
    tries = [
        b"' OR 1=1 --",
        b"\0",
        b"\xff" * 40,
        b"%s" * 30,
        b"../" * 30,
        "\u202e\u212a".encode() * 10,
        b"x" * 1_000_000,
        b"{{7*7}}" * 8,
        b"\r\nx: y",
    ]

    def mutated() -> bytes:
        value = bytearray(chance.choice([key.encode(), chance.choice(tries)[:1000]]))
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(value) + 1)
            value[at : at + chance.randint(0, 3)] = chance.choice(tries)[: chance.randint(0, 12)]
        return bytes(value)

    known, database = catalog({key: principal()}), Database()
    began = time.process_time()
    for value in [*tries, *(mutated() for _ in range(20_000))]:
        if value.decode("latin-1").strip() == key:
            continue  # space around it is no part of it
        asked = database.asked
        with pytest.raises(ApiError) as refused:
            call({chance.choice([b"x-api-key", b"x-goog-api-key"]): value}, known, database)
        assert refused.value.status in (400, 401)
        assert database.asked - asked <= 1
    assert time.process_time() - began < 20_000 * 0.05
    assert [record for record in caplog.records if record.name != "asyncio"] == []


def test_s09_keys_that_share_all_but_their_last_secret_character_never_meet():
    """Cache keys are digests of the whole key: a long common prefix is worth nothing."""
    body = mint()[0]
    imported = {f"{body[:40]}-{number:05}": principal(number) for number in range(20_000)}
    known = catalog(imported)
    for number, key in enumerate(imported):
        assert known.principals[digest(PEPPER, key)].key_id == number
    database = Database()
    for prefix in (body[:40], f"{body[:40]}-", f"{body[:40]}-0000", f"{body[:40]}-000000"):
        with pytest.raises(Unauthenticated):
            call({b"x-api-key": prefix.encode()}, known, database)


def test_s09_no_header_falls_through_to_another():
    """A bad bearer beside a good key in another header is a conflict, never a second try."""
    key, _ = mint()
    known = catalog({key: principal()})
    with pytest.raises(InvalidRequest):
        call({b"authorization": b"Bearer sk-somebody-else", b"x-api-key": key.encode()}, known)
    with pytest.raises(Unauthenticated):
        call({b"authorization": b"Basic abc", b"x-api-key": key.encode()}, known)


def test_a_key_of_the_pepper_before_still_works():
    key, _ = mint()
    old = digest(b"o" * 32, key)
    assert call({b"x-api-key": key.encode()}, Catalog(peppers=(PEPPER, b"o" * 32), principals={old: principal(3)})).key_id == 3


def test_an_expired_key_is_refused_although_memory_still_has_it():
    key, _ = mint()
    with pytest.raises(Unauthenticated):
        call({b"x-api-key": key.encode()}, catalog({key: principal(expires_at=time.time() - 1)}))
    assert call({b"x-api-key": key.encode()}, catalog({key: principal(expires_at=time.time() + 60)}))


@pytest.mark.parametrize(
    ("address", "passes"), [("10.1.2.3", True), ("::ffff:10.1.2.3", True), ("11.0.0.1", False), ("", False), ("2001:db8::1", False)]
)
def test_a_key_with_an_ip_list_works_from_there_alone(address, passes):
    key, _ = mint()
    known = catalog({key: principal(networks=(ipaddress.ip_network("10.0.0.0/8"),))})
    if passes:
        assert call({b"x-api-key": key.encode()}, known, address=address)
    else:
        with pytest.raises(IpNotAuthorized):
            call({b"x-api-key": key.encode()}, known, address=address)


# Imported keys: issued elsewhere, of any form


@pytest.mark.parametrize("key", ["1", "secret", "a" * 512, "sk-sluice-not-one-of-ours", "two words"])
def test_an_imported_key_of_any_form_is_known_from_memory(key):
    database = Database()
    assert call({b"authorization": f"Bearer {key}".encode()}, catalog({key: principal(4)}), database).key_id == 4
    assert database.asked == 0


@pytest.mark.parametrize("probe", ["2", "secreT", "sk-sluice-not-one-of-ourz", "a" * 513, "a" * 60_000])
def test_imported_keys_do_not_let_probes_reach_the_database(probe):
    database = Database()
    known = catalog({"1": principal(), "secret": principal(), "sk-sluice-not-one-of-ours": principal(), "a" * 512: principal()})
    with pytest.raises(Unauthenticated):
        call({b"x-api-key": probe.encode()}, known, database)
    assert database.asked == 0


def test_an_imported_key_that_memory_does_not_know_yet_is_looked_up_once():
    database = Database(**{"an-imported-key": principal(6)})
    assert call({b"x-api-key": b"an-imported-key"}, catalog({}), database).key_id == 6
    assert database.asked == 1
