"""Cuts what an upstream streams into frames: server-sent events, lines of JSON, objects with nothing between them, or text.

Which of these it is, the bytes tell, not the Content-Type (protocol reference 0.4, rules 2 to 5 and 11).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from providers import wire
from providers.failures import UpstreamProtocol

_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_PAGE = "The upstream answered with a page instead of an answer."
_NOT_EVENTS = "The upstream answered with something that is not an event stream."
_TOO_LARGE = "The upstream sent an event that is too large."
_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
_EVENT_NAME = re.compile(rb"(?:^|[\r\n])event:[ ]?([^\r\n]*)")
_FIRST_BYTE = re.compile(rb"[^ \t\r\n]")

Form = Literal["", "events", "objects", "lines", "text"]


class Frame(NamedTuple):
    """One event, object, or piece of text: never empty."""

    data: bytes
    event: str = ""  # of a server-sent event, where it was named


class Frames:
    """Fed bytes as they arrive, cut anywhere; gives whole frames, the same ones however the bytes were cut.

    Each byte is looked at a fixed number of times, however small the pieces are. `plain_text`: what is neither events nor JSON is
    text, handed on as it comes; otherwise it is refused. `lines`: what is no event stream stands in lines, one frame each, so that
    one that cannot be read does not swallow the next. `feed` and `end` raise UpstreamProtocol for a page and for what has no
    end; when frames came before it in the same piece, these are given first and the failure waits in `problem` for the next call."""

    def __init__(self, *, plain_text: bool = False, lines: bool = False, most_bytes: int = wire.MOST_EVENT_BYTES) -> None:
        self.form: Form = ""  # "" until the bytes have told
        self.problem: UpstreamProtocol | None = None
        self._plain_text = plain_text
        self._lines = lines
        self._most_bytes = most_bytes
        self._rest = bytearray()  # it grows in place: bytes would be copied with every piece
        self._searched = 0  # of the rest: no end of a frame lies before
        self._depth, self._in_string = 0, False

    def feed(self, data: bytes) -> list[Frame]:
        self._raise_what_waits()
        frames: list[Frame] = []
        try:
            self._rest += data
            if self.form or self._detect():
                self._cut(frames)
            if len(self._rest) > self._most_bytes:
                raise UpstreamProtocol(_TOO_LARGE)
        except UpstreamProtocol as problem:
            self._put_off(problem, frames)
        return frames

    def end(self) -> list[Frame]:
        """The stream is over: what is left is the last frame, whole or not."""
        self._raise_what_waits()
        rest, self._rest = bytes(self._rest), bytearray()
        frames: list[Frame] = []
        if self.form == "events":
            try:
                self._events(rest + b"\n\n", frames)
            except UpstreamProtocol as problem:
                self._put_off(problem, frames)
        elif rest.strip():
            if not self.form and not self._plain_text:
                raise UpstreamProtocol(_NOT_EVENTS)
            self.form = self.form or "text"
            frames.append(Frame(rest if self.form == "text" else rest.strip(_SPACE)))
        return frames

    def _raise_what_waits(self) -> None:
        if self.problem is not None:
            raise self.problem

    def _put_off(self, problem: UpstreamProtocol, frames: list[Frame]) -> None:
        if not frames:
            raise problem
        self.problem = problem

    def _detect(self) -> bool:
        """Whether the first bytes have told what this is."""
        if len(self._rest) < len(_BOM) and _BOM.startswith(bytes(self._rest)):
            return False
        if self._rest.startswith(_BOM):
            del self._rest[: len(_BOM)]
        first = _FIRST_BYTE.search(self._rest, self._searched)
        if first is None:  # some send blank lines to keep the connection alive; of a text they are a part
            if self._plain_text:
                self._searched = len(self._rest)
            else:
                self._rest.clear()
            return False
        at = self._searched = first.start()
        seen = bytes(self._rest[at : at + len(max(_FIELDS, key=len))])
        if seen[:1] == b"<":
            raise UpstreamProtocol(_PAGE)
        if seen[:1] in (b"{", b"["):
            self.form = "lines" if self._lines else "objects"
        elif seen.startswith(_FIELDS):
            self.form = "events"
        elif any(field.startswith(seen) for field in _FIELDS):
            return False  # the beginning of a field's name, or of a text
        elif self._lines:
            self.form = "lines"
        elif self._plain_text:
            self.form, at = "text", 0
        else:
            raise UpstreamProtocol(_NOT_EVENTS)
        del self._rest[:at]
        self._searched = 0
        return True

    def _cut(self, frames: list[Frame]) -> None:
        if self.form == "text":
            letters = _whole_letters(self._rest)  # no letter is cut in two
            if letters:
                frames.append(Frame(self._take(letters)))
        elif self.form == "objects":
            self._objects(frames)
        elif self.form == "lines":
            end = self._rest.rfind(b"\n", self._searched) + 1
            for line in self._take(end).split(b"\n"):
                if bare := line.strip(_SPACE):
                    self._add(Frame(bare), frames)
            self._searched = len(self._rest)
        else:
            cut = wire.whole_events(bytes(self._rest[self._searched :]))
            if cut:
                self._events(self._take(self._searched + cut), frames)
            self._searched = max(0, len(self._rest) - 2)  # a blank line may begin in the last two bytes

    def _take(self, count: int) -> bytes:
        taken = bytes(self._rest[:count])
        del self._rest[:count]
        return taken

    def _objects(self, frames: list[Frame]) -> None:
        """Values of JSON, with line ends, spaces or nothing between them: an end is where the outermost bracket closes."""
        fresh, ends = bytes(self._rest[self._searched :]), []
        for found in _BRACKETS.finditer(fresh):
            mark = found[0]
            if mark == b"\n":
                # No string of JSON holds a line end: a line that was cut off in a string must not swallow those behind it.
                if self._in_string:
                    self._in_string, self._depth = False, 0
                    ends.append(found.end())
            elif self._in_string:
                if mark == b'"':
                    self._in_string = False
            elif mark == b'"':
                self._in_string = True
            elif mark in (b"{", b"["):
                self._depth += 1
            elif mark in (b"}", b"]"):
                self._depth = max(0, self._depth - 1)
                if not self._depth:
                    ends.append(found.end())
        begin = 0
        for end in ends:
            if one := bytes(self._rest[begin : self._searched + end]).strip(_SPACE):
                self._add(Frame(one), frames)
            begin = self._searched + end
        del self._rest[:begin]
        # An escape may be cut in two: its first half is looked at again.
        backslashes = len(fresh) - len(fresh.rstrip(b"\\"))
        self._searched = max(0, len(self._rest) - backslashes % 2)

    def _events(self, whole: bytes, frames: list[Frame]) -> None:
        for one in wire.split_events(whole):
            data = wire.data_of(one)
            if data.strip():
                named = _EVENT_NAME.search(one) if b"event:" in one else None
                self._add(Frame(data, named[1].strip().decode("utf-8", "replace") if named else ""), frames)
                continue
            bare = one.strip(_SPACE)
            if bare[:1] == b"<":
                raise UpstreamProtocol(_PAGE)
            if bare[:1] == b"{":  # an error is often said bare, also behind the comments that kept the connection alive
                self._add(Frame(bare), frames)

    def _add(self, frame: Frame, frames: list[Frame]) -> None:
        if len(frame.data) > self._most_bytes:
            raise UpstreamProtocol(_TOO_LARGE)
        frames.append(frame)


_BRACKETS = re.compile(rb'\\.|["{}\[\]\n]', re.DOTALL)


def _whole_letters(text: bytes | bytearray) -> int:
    """How many bytes are whole UTF-8 letters: at most three at the end may belong to one that is still to come."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte < 0x80:
            return len(text)
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(text) if back >= needed else len(text) - back
    return len(text)
