"""Reads a body as it arrives and takes the compression off, in pieces of bounded size: a small body may stand for a huge one."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from typing import Protocol, Self

import brotli
import httpx

MOST_PIECE_BYTES = 64 << 10
_GZIP, _ZLIB, _RAW_DEFLATE = 31, 15, -15


class Decoder(Protocol):
    def feed(self, data: bytes) -> None:
        """Only once `piece` has nothing more to give."""

    def piece(self) -> bytes:
        """The next piece, b"" when more input is needed. Raises httpx.DecodingError."""

    def end(self) -> None:
        """There is no more input. Raises httpx.DecodingError when it was cut off."""


def decoder_for(coding: str) -> Decoder | None:
    """For the value of a Content-Encoding header; None where nothing is to be done. Raises httpx.DecodingError."""
    match coding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip":
            return Inflate(_GZIP)
        case "deflate":
            return Inflate(_ZLIB)
        case "br":
            return Brotli()
    raise httpx.DecodingError("The answer is compressed in a way that was not asked for.")


class Body:
    """The reader's side of an answer's body, whatever it arrives over: `chunks` and `read` of `exchange.Answer`."""

    __slots__ = ("_decoder",)

    def __init__(self) -> None:
        self._decoder: Decoder | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come: to read what is left takes no waiting."""
        return False

    async def arrived(self) -> bytes:
        """All that has come and was not read yet; waits when there is nothing, and is b"" at the end."""
        raise NotImplementedError

    def chunks(self) -> AsyncIterator[bytes]:
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        # An iterator and not a generator: one that is left in the middle has nothing to clean up.
        data = await self.arrived() if self._decoder is None else await self._decoded(self._decoder)
        if not data:
            raise StopAsyncIteration
        return data

    async def read(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in self:
            parts.append(part)
            size += len(part)
            if size >= limit:
                break
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        return whole[:limit]

    async def _decoded(self, decoder: Decoder) -> bytes:
        while not (piece := decoder.piece()):
            data = await self.arrived()
            if not data:
                decoder.end()
                break
            decoder.feed(data)
        return piece


class Inflate:
    """gzip (also several members in a row) and deflate."""

    def __init__(self, wbits: int) -> None:
        self._wbits = wbits
        self._zlib = zlib.decompressobj(wbits)
        self._input = b""
        self._begun = False
        self._has_more = False  # output that was held back by the size of a piece

    def feed(self, data: bytes) -> None:
        self._input += data

    def piece(self) -> bytes:
        if not self._begun and not self._begin():
            return b""
        while self._input or self._has_more:
            if self._zlib.eof:
                if self._wbits != _GZIP:
                    self._input = b""  # what follows the end of the data is not ours to understand
                    break
                self._zlib = zlib.decompressobj(_GZIP)
            try:
                out = self._zlib.decompress(self._input, MOST_PIECE_BYTES)
            except zlib.error:
                raise httpx.DecodingError("The compressed answer could not be read.") from None
            self._has_more = len(out) == MOST_PIECE_BYTES and not self._zlib.eof
            self._input = self._zlib.unconsumed_tail or self._zlib.unused_data
            if out:
                return out
        return b""

    def _begin(self) -> bool:
        """Many servers mean the bare stream when they say deflate: the first two bytes tell."""
        if self._wbits == _ZLIB:
            if len(self._input) < 2:
                return False
            first, second = self._input[:2]
            if first & 0x0F != 8 or (first << 8 | second) % 31:
                self._zlib = zlib.decompressobj(_RAW_DEFLATE)
        self._begun = bool(self._input)
        return self._begun

    def end(self) -> None:
        if (self._begun or self._input) and not self._zlib.eof:
            raise httpx.DecodingError("The compressed answer was cut off.")


class Brotli:
    """Its pieces may be half as large again: the library stops growing its buffer only after the limit."""

    def __init__(self) -> None:
        self._brotli = brotli.Decompressor()
        self._input = b""
        self._begun = False
        self._has_more = False

    def feed(self, data: bytes) -> None:
        self._input += data

    def piece(self) -> bytes:
        if not self._input and not self._has_more:
            return b""
        # While it holds output back it takes no input.
        data, self._input = (b"", self._input) if self._has_more else (self._input, b"")
        self._begun = True
        try:
            out: bytes = self._brotli.process(data, output_buffer_limit=MOST_PIECE_BYTES)
        except brotli.error:
            raise httpx.DecodingError("The compressed answer could not be read.") from None
        self._has_more = len(out) >= MOST_PIECE_BYTES
        return out or self.piece()

    def end(self) -> None:
        if self._begun and not self._brotli.is_finished():
            raise httpx.DecodingError("The compressed answer was cut off.")
