"""One exchange over HTTP/1.1: what goes out, how an answer is framed, and what is no answer."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib

import brotli
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.exchange import Outgoing, place_of
from providers.failures import UpstreamUnreachable
from providers.http1 import MOST_FIELDS, MOST_HEAD_BYTES, request_head
from tests.proxies.calls import call, fetch, send, settle, transport
from tests.proxies.scripted import HELLO, Peer, answers, answers_once, origin

OK = b"HTTP/1.1 200 OK\r\n"
HEADERS = {"User-Agent": "sluice/0.1", "Content-Type": "application/json", "Authorization": "Bearer sk-x", "X-Request-ID": "7"}


async def answered(*parts: bytes) -> tuple[int, bytes]:
    async with origin(answers_once(*parts)) as there, transport() as via:
        return await fetch(via, call(there.url))


# What goes out


def test_a_request_is_its_line_our_framing_and_the_headers_given():
    head = request_head(call("http://llm.example.org/v1", "/chat?a=b", headers=HEADERS, body=b"12345"))

    assert head == (
        b"POST /v1/chat?a=b HTTP/1.1\r\nHost: llm.example.org\r\nUser-Agent: sluice/0.1\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer sk-x\r\nX-Request-ID: 7\r\nContent-Length: 5\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://llm.example.org:443/v1", b"llm.example.org"),
        ("http://llm.example.org:443/v1", b"llm.example.org:443"),
        ("https://LLM.Example.org:8443", b"llm.example.org:8443"),
        ("http://[::1]:11434/v1", b"[::1]:11434"),
        ("http://127.0.0.1/v1", b"127.0.0.1"),
    ],
)
def test_the_host_header_is_the_places_own(url: str, host: bytes):
    assert b"\r\nHost: " + host + b"\r\n" in request_head(call(url))


def test_a_get_without_a_body_has_no_length_and_a_post_without_one_says_zero():
    assert b"Content-Length" not in request_head(call("http://a", method="GET", body=b""))
    assert b"Content-Length: 0\r\n" in request_head(call("http://a", body=b""))


INJECTED = st.text(st.sampled_from("a \r\n\0:\x7f\x0b\u2028é€"), min_size=1, max_size=12)


@given(value=INJECTED, name=INJECTED, path=INJECTED)
def test_b06_no_value_can_end_its_line(value: str, name: str, path: str):
    """Whatever is put into a header or a path either goes out as one line, or not at all."""
    for headers, target in (({"X-A": value}, "/p"), ({name: "v"}, "/p"), ({"X-A": "v"}, f"/{path}")):
        try:
            head = request_head(_with(target, headers))
        except httpx.LocalProtocolError:
            continue
        lines = head.decode("latin-1").split("\r\n")
        assert len(lines) == 6
        assert not any(letter in line for line in lines for letter in "\r\n\0")
        assert [line.partition(":")[0] for line in lines[1:4:2]] == ["Host", "Content-Length"]
        assert lines[0].count(" ") == 2


def _with(path: str, headers: dict[str, str]) -> Outgoing:
    return Outgoing("POST", place_of("http://a")[0], path, headers)


@pytest.mark.parametrize(
    "bad",
    [
        {"X-A": "1\r\nX-B: 2"},
        {"X-A": "1\nX-B: 2"},
        {"X-A": "1\rX-B: 2"},
        {"X-A": "1\0"},
        {"X-A": "€"},
        {"X-A:": "1"},
        {"X A": "1"},
        {"": "1"},
        {"X-A: 1\r\nX-B": "2"},
        {"Host": "evil.example"},
        {"host": "evil.example"},
        {"Content-Length": "3"},
        {"Transfer-Encoding": "chunked"},
        {"Connection": "upgrade"},
    ],
)
async def test_b06_nothing_is_sent_of_what_could_be_misread(bad: dict[str, str]):
    async with origin(answers(HELLO)) as there, transport() as via:
        with pytest.raises(httpx.LocalProtocolError):
            await send(via, call(there.url, headers=bad))
        for path in ("/a b", "/a\r\nX: y", "/\u00e9", "no-slash", "/a#b", "/a\0"):
            with pytest.raises(httpx.LocalProtocolError):
                await send(via, Outgoing("POST", call(there.url).place, path, {}))
        for method in ("GET /x HTTP/1.1\r\n", "get", "CONNECT", "HEAD", ""):
            with pytest.raises(httpx.LocalProtocolError):
                await send(via, call(there.url, method=method))
        await settle()
        assert there.connections == 0


def test_a_request_shows_neither_its_headers_nor_its_body_nor_its_query():
    shown = repr(call("http://a/v1", "/x?key=sk-secret", headers={"Authorization": "sk-secret"}, body=b"sk-secret"))

    assert shown == "<Outgoing POST http://a/v1/x>"


@pytest.mark.parametrize("body", [b"", b"{}", b"x" * 300_000])
@pytest.mark.parametrize(
    ("url", "path"), [("/v1", "/chat/completions"), ("", "/"), ("/v1", "/models/a%2Fb?x=%20&y=~"), ("/v1", "/x:generate?alt=sse")]
)
async def test_the_native_call_and_the_wrapper_put_the_same_bytes_on_the_wire(url: str, path: str, body: bytes):
    async def notes(peer: Peer) -> None:
        while True:
            there.requests.append(await peer.request())
            await peer.say(HELLO)

    async with origin(notes) as there, transport() as via:
        outgoing = call(there.url + url, path, headers=HEADERS, body=body)
        assert await fetch(via, outgoing) == (200, b"hello")
        for request in (outgoing.as_httpx(), httpx.Request("POST", outgoing.url, headers=HEADERS, content=body)):
            response = await via.handle_async_request(request)
            assert await response.aread() == b"hello"
            await response.aclose()
    assert len(there.requests) == 3
    assert there.requests[0] == there.requests[1] == there.requests[2]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a/",
        "//a/",
        "a",
        "",
        "http://",
        "http://user@a/",
        "http://user:pass@a/",
        "http://a\\b/",
        "http://a /",
        "http://a/ b",
        "http://a:0/",
        "http://a:65536/",
        "http://a:x/",
        "http://a?x",
        "http://a/#f",
        "http://a/p?q",
        "http://\uff11\uff12\uff17.0.0.1/",
        "http://b\u00fccher.example/",
        "http://localho\u017ft/",
        "http://\u212aimi.example/",
        "http://[fe80::1%25eth0]/",
        "http://a%2eb/",
        "http://a\r\nb/",
        "http://a/\u00e9",
        "http://[::1/",
        "http://[127.0.0.1]/",
        "http://[1::2::3]/",
    ],
)
def test_what_could_be_read_in_two_ways_is_no_address(url: str):
    with pytest.raises(UpstreamUnreachable, match="not an address"):
        place_of(url)


# How an answer is framed


@pytest.mark.parametrize(
    "wire",
    [
        [HELLO],
        [OK + b"content-length: 5\r\n", b"\r\n", b"he", b"llo"],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"],
        [OK + b"transfer-encoding: Chunked\r\n\r\n2;ext=1\r\nhe\r\n3\r\nl", b"lo\r\n0\r\nX-Trailer: 1\r\n\r\n"],
        [OK + b"\r\nhel", b"lo"],
        [b"HTTP/1.0 200 OK\r\n\r\nhello"],
        [b"HTTP/1.1 100 Continue\r\n\r\n", HELLO],
        [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + HELLO],
        [HELLO[:1], HELLO[1:20], HELLO[20:]],
    ],
)
async def test_a_body_is_found_however_it_is_framed(wire: list[bytes]):
    assert await answered(*wire) == (200, b"hello")


@pytest.mark.parametrize("status", [204, 304])
async def test_some_answers_have_no_body(status: int):
    async with origin(answers(b"HTTP/1.1 %d X\r\nETag: 1\r\n\r\n" % status)) as there, transport() as via:
        for _ in range(2):
            assert await fetch(via, call(there.url)) == (status, b"")
    assert there.connections == 1


async def test_headers_have_lower_case_names_and_repeated_ones_are_joined():
    async with (
        origin(answers(OK + b"X-A: 1\r\nx-a:  two \r\nSet-Cookie: caf\xe9\r\nContent-Length: 0\r\n\r\n")) as there,
        transport() as via,
    ):
        answer = await send(via, call(there.url))
        await answer.close()
    assert answer.headers == {"x-a": "1, two", "set-cookie": "caf\xe9", "content-length": "0"}


async def test_a_redirect_is_an_answer_like_any_other():
    wire = b"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    async with origin(answers(wire)) as there, transport() as via:
        assert (await fetch(via, call(there.url)))[0] == 307
    assert there.connections == 1


async def test_read_gives_the_whole_body_or_its_beginning():
    async with origin(answers(OK + b"Content-Length: 300000\r\n\r\n", b"x" * 300_000)) as there, transport() as via:
        for limit, length in ((10, 10), (300_000, 300_000), (1 << 20, 300_000)):
            answer = await send(via, call(there.url))
            assert len(await answer.read(limit)) == length
            await answer.close()
    assert there.connections == 2  # the one that was left in the middle is not used again


# What is no answer


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
        b"\x00\x01 this is not HTTP\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello",
        OK + b"Content-Length: -1\r\n\r\n",
        OK + b"Transfer-Encoding: gzip\r\n\r\nhello",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        OK + b"X-A: 1\r\n folded\r\n\r\n",
        OK + b"X\x00A: 1\r\n\r\n",
        OK + b"X-Big: " + b"a" * MOST_HEAD_BYTES + b"\r\n\r\n",
        OK + b"X-A: 1\r\n" * (MOST_FIELDS + 1) + b"\r\n",
        OK + b"".join(b"X-%d: %b\r\n" % (number, b"a" * 900) for number in range(90)) + HELLO[17:],
        OK + b"X-Endless: " + b"a" * 300_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 3000 + HELLO,
        HELLO.replace(b"200 OK", b"200 " + b"O" * 300_000),
    ],
)
async def test_what_is_no_answer_is_refused(wire: bytes):
    with pytest.raises(httpx.RemoteProtocolError):
        await answered(wire)


@pytest.mark.parametrize("what", [b"0\r\nX-Endless: ", b"5;endless="], ids=["trailer", "chunk extension"])
async def test_a_line_without_end_behind_a_body_is_refused_while_it_comes(what: bytes):
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n" + what + b"a" * 300_000)
        await peer.gone()

    async with origin(script) as there, transport() as via:
        answer = await send(via, call(there.url))
        with pytest.raises(httpx.RemoteProtocolError):
            async with asyncio.timeout(5):
                while await anext(answer.chunks()) == b"hello":
                    pass
        await answer.close()


async def test_a_head_just_within_its_limits_is_taken():
    fields = b"".join(b"X-%d: 1\r\n" % number for number in range(MOST_FIELDS - 1))
    assert await answered(OK + fields + HELLO[17:]) == (200, b"hello")
    assert await answered(OK + b"X-Big: " + b"a" * 60_000 + b"\r\n" + HELLO[17:]) == (200, b"hello")


@pytest.mark.parametrize(
    "wire",
    [
        [OK + b"Content-Length: 50\r\n\r\nhello"],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n32\r\nhello"],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b"zz\r\n"],
    ],
)
async def test_what_came_before_a_body_was_cut_off_is_given_and_then_it_is_told(wire: list[bytes]):
    async with origin(answers_once(*wire)) as there, transport() as via:
        answer = await send(via, call(there.url))
        seen = b""
        with pytest.raises(httpx.RemoteProtocolError):
            async for chunk in answer.chunks():
                seen += chunk
        await answer.close()
    assert seen == b"hello"


async def test_a_reset_in_the_middle_is_told_after_what_came_before():
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.say(OK + b"Content-Length: 50\r\n\r\nhello")
        await asyncio.sleep(0.02)
        peer.reset()

    async with origin(script) as there, transport() as via:
        answer = await send(via, call(there.url))
        seen = b""
        with pytest.raises(httpx.ReadError):
            async for chunk in answer.chunks():
                seen += chunk
        await answer.close()
    assert seen == b"hello"


# Compression

TEXT = b"".join(b'{"line": %d}\n' % number for number in range(20_000))
RAW_DEFLATE = zlib.compressobj(wbits=-15)
PACKED = {
    "gzip": gzip.compress(TEXT),
    "GZip ": gzip.compress(TEXT[:1000]) + gzip.compress(TEXT[1000:]),
    "deflate": zlib.compress(TEXT),
    "Deflate": RAW_DEFLATE.compress(TEXT) + RAW_DEFLATE.flush(),
    "br": brotli.compress(TEXT),
    "identity": TEXT,
}


def packed(coding: str, body: bytes) -> bytes:
    return OK + b"Content-Encoding: %b\r\nContent-Length: %d\r\n\r\n" % (coding.encode(), len(body)) + body


@pytest.mark.parametrize("coding", PACKED)
@pytest.mark.parametrize("step", [1, 100, 1 << 20])
async def test_compression_is_taken_off_however_it_arrives(coding: str, step: int):
    wire = packed(coding, PACKED[coding])
    cut = len(wire) - len(PACKED[coding])

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.writer.write(wire[:cut])
        for at in range(cut, len(wire), step):
            peer.writer.write(wire[at : at + step])
            if (at - cut) // step < 300:  # at first each piece arrives by itself
                await asyncio.sleep(0)
        await peer.writer.drain()

    async with origin(script) as there, transport() as via:
        assert await fetch(via, call(there.url)) == (200, TEXT)


@pytest.mark.parametrize("coding", [one for one in PACKED if one != "identity"])
async def test_a_compressed_body_that_was_cut_off_does_not_look_whole(coding: str):
    for cut in (1, 8, 500):
        with pytest.raises(httpx.DecodingError):
            await answered(packed(coding, PACKED[coding][:-cut]))


@pytest.mark.parametrize(
    ("coding", "body"), [("gzip", b"hello"), ("br", b"\xff" * 50), ("deflate", b"hello"), ("zstd", b"x"), ("gzip, br", b"x")]
)
async def test_what_is_not_compressed_as_it_says_is_refused(coding: str, body: bytes):
    with pytest.raises(httpx.DecodingError):
        await answered(packed(coding, body))


async def test_an_empty_body_may_call_itself_compressed():
    assert await answered(packed("gzip", b"")) == (200, b"")


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate"])
async def test_a_bomb_is_unpacked_piece_by_piece(coding: str):
    """256 MiB of nothing: what is held at any time is a small part of it, and the reader stops when it has had enough."""
    zeros = b"\0" * (1 << 20)
    packer = {"gzip": zlib.compressobj(wbits=31), "deflate": zlib.compressobj(), "br": None}[coding]
    if packer is None:
        bomb = brotli.compress(zeros * 256, quality=1)
    else:
        bomb = b"".join(packer.compress(zeros) for _ in range(256)) + packer.flush()
    async with origin(answers_once(packed(coding, bomb))) as there, transport() as via:
        answer = await send(via, call(there.url))
        tracemalloc.start()
        size = 0
        async for chunk in answer.chunks():
            size += len(chunk)
            assert len(chunk) <= 128 << 10
            if size > 100 << 20:
                break
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        await answer.close()
    assert most < 4 << 20


# A reader that does not read


async def test_a_peer_is_held_back_until_the_reader_has_made_room():
    sent = 0
    body = b"x" * (64 << 20)

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        peer.writer.write(OK + b"Content-Length: %d\r\n\r\n" % len(body))
        for at in range(0, len(body), 1 << 16):
            peer.writer.write(body[at : at + (1 << 16)])
            await peer.writer.drain()
            sent = at + (1 << 16)

    async with origin(script) as there, transport() as via:
        answer = await send(via, call(there.url))
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.1)
        assert sent < 16 << 20, "all but what the kernel takes"
        first = await anext(answer.chunks())
        assert len(first) <= 1 << 20
        assert len(first) + sum([len(chunk) async for chunk in answer.chunks()]) == len(body)
        await answer.close()


async def test_an_answer_may_come_before_all_of_the_request_was_sent():
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.say(b"HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\n\r\nlarge")
        await asyncio.sleep(5)

    async with origin(script) as there, transport() as via:
        for _ in range(2):
            assert await fetch(via, call(there.url, body=b"x" * (32 << 20))) == (413, b"large")
        assert there.connections == 2  # each was in the middle of a request
        await settle()


async def test_an_early_answer_is_heard_even_if_the_peer_then_hangs_up():
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.say(b"HTTP/1.1 401 No\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
        await asyncio.sleep(0.05)
        peer.reset()

    async with origin(script) as there, transport() as via:
        assert await fetch(via, call(there.url, body=b"x" * (32 << 20))) == (401, b"no")


# For those who speak httpx


async def test_httpxs_client_works_over_it():
    wire = OK + b"Content-Encoding: gzip\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(gzip.compress(b'{"a": 1}'))
    async with origin(answers(wire + gzip.compress(b'{"a": 1}'))) as there, transport() as via, httpx.AsyncClient(transport=via) as client:
        for _ in range(2):
            response = await client.post(f"{there.url}/v1/x", json={})
            assert (response.json(), response.headers["content-type"]) == ({"a": 1}, "application/json")
    assert there.connections == 1


async def test_httpxs_read_timeout_holds_for_the_head_and_for_each_part():
    async def script(peer: Peer) -> None:
        request = await peer.request()
        if b"/head" not in request:
            await peer.say(OK + b"Content-Length: 50\r\n\r\nhello")
        await asyncio.sleep(5)

    async with origin(script) as there, transport() as via, httpx.AsyncClient(transport=via, timeout=0.1) as client:
        for path in ("/head", "/body"):
            with pytest.raises(httpx.ReadTimeout):
                await client.post(f"{there.url}{path}")


async def test_httpx_cannot_smuggle_a_user_name_into_an_address():
    async with origin(answers(HELLO)) as there, transport() as via:
        with pytest.raises(httpx.UnsupportedProtocol):
            await via.handle_async_request(httpx.Request("GET", there.url.replace("127", "user@127")))
        assert there.connections == 0
