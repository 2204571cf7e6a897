"""What is true of an output: what an event must be to be kept, and how its content is sliced. Pure.

Content is bytes to `outputs.read`: a string's own, the compact JSON of another value, or those of a file.
"""

import base64
import hashlib
from typing import Literal, NamedTuple

import msgspec
import orjson
from msgspec import Raw, Struct

from carserver.config import Settings
from carserver.core.principals import Principal
from carserver.protocol.codec import check_name, check_text, too_deep
from carserver.protocol.errors import invalid_params, limit_exceeded
from carserver.protocol.outputs import (
    Artifact,
    Content,
    FileRef,
    Final,
    GivenArtifact,
    GivenContent,
    GivenEvent,
    GivenFinal,
    GivenPartial,
    Inline,
    OutputEvent,
    OutputRecord,
    OutputSlice,
    Partial,
    Progress,
)

MORE = 3
"""Bytes beyond a slice that show where its last character ends: one of UTF-8 has at most four."""


TOOL = "tool:"
"""Stands before a tool's name in the producer of its results, which may be longer by that than other names."""

_PATH_BYTES = 4_096  # Linux's PATH_MAX, the NUL at the end included


class Body(Struct, frozen=True):
    """The content of an output as bytes: how many, their SHA-256 in hex, and whether all of them are UTF-8."""

    size: int
    sha256: str
    utf8: bool


class Fingerprint(Struct, frozen=True, array_like=True):
    """What tells a file from another, and from itself after a change: device, inode, bytes, times in nanoseconds."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Output(Struct, frozen=True, kw_only=True):
    """All that is stored of an output.

    `no` is its place in the order of appending (0 before it is stored), `owner` who appended it, `record` what
    `outputs.get` answers. `body` is that of its content (None: it has none, it is progress), `fingerprint` that of its
    file (None: there is none, or none that could be read since an import). `key` and `key_digest` are the idempotency
    key and what it was used with.
    """

    no: int = 0
    owner: str
    record: OutputRecord
    body: Body | None = None
    fingerprint: Fingerprint | None = None
    key: str | None = None
    key_digest: bytes | None = None

    @property
    def private(self) -> bool:
        """Whether its owner and the host alone see it."""
        return self.record.private is True

    def visible_to(self, principal: Principal) -> bool:
        """Whether `principal` sees it."""
        return not self.private or principal.sees(self.owner)


class Listed(NamedTuple):
    """A page of outputs as JSON, large values left out; the number of the last, and whether there are more."""

    records: list[bytes]
    last: int
    more: bool


class TakenIn(NamedTuple):
    """An event as it is kept; of inline content the body, of a file its reference and where in the params it stood."""

    event: OutputEvent
    body: Body | None = None
    file: FileRef | None = None
    where: str = ""


def take_in(given: GivenEvent, settings: Settings, *, private: bool = False) -> TakenIn:
    """The event of an `outputs.append`, or of one that is imported, checked; it is known to be JSON.

    The result of a handle, which is private, may be as large as results are.

    Raises:
        RpcError: invalid_params, limit_exceeded.
    """
    match given:
        case Progress():
            check_name(given.stage, settings.name_chars, "event.stage")
            check_text(given.note or "", "text_bytes", settings.text_bytes, "event.note")
            return TakenIn(given)
        case GivenPartial():
            content, body = _content(given.chunk, "event.chunk", settings, private=private)
            return _taken_in(Partial(chunk=content), body, content, "event.chunk")
        case GivenArtifact():
            check_name(given.name, settings.name_chars, "event.name")
            content, body = _content(given.content, "event.content", settings, private=private)
            return _taken_in(Artifact(name=given.name, content=content), body, content, "event.content")
        case GivenFinal():
            content, body = _content(given.content, "event.content", settings, private=private)
            return _taken_in(Final(content=content, ok=given.ok), body, content, "event.content")


def _taken_in(event: OutputEvent, body: Body | None, content: Content, where: str) -> TakenIn:
    if isinstance(content, FileRef):
        return TakenIn(event, file=content, where=f"{where}.path")
    return TakenIn(event, body)


def _content(given: GivenContent, where: str, settings: Settings, *, private: bool) -> tuple[Content, Body | None]:
    if isinstance(given, FileRef):
        if len(given.path.encode()) >= _PATH_BYTES:
            raise invalid_params(f"{where}.path", "it is longer than a path may be")
        check_name(given.mime or "", settings.name_chars, f"{where}.mime")
        return given, None
    where = f"{where}.value"
    raw = msgspec.json.format(bytes(given.value), indent=-1)
    content, body = inline(Raw(raw))
    limit, size, maximum = "output_bytes", body.size, settings.output_bytes
    if private:
        limit, size, maximum = "result_bytes", len(raw), settings.result_bytes
    if size > maximum:
        raise limit_exceeded(limit, size, maximum, where)
    if not raw.startswith(b'"') and too_deep(raw, orjson.loads(raw), settings.value_nesting):
        raise limit_exceeded("value_nesting", settings.value_nesting + 1, settings.value_nesting, where)
    return content, body


def inline(value: Raw) -> tuple[Inline, Body]:
    """A compact JSON value as content, and what it is as bytes."""
    content = bytes_of(value)
    return Inline(value=value), Body(len(content), hashlib.sha256(content).hexdigest(), utf8=True)


def check_producer(name: str, settings: Settings, where: str) -> None:
    """Refuses what cannot be the name of a producer.

    Raises:
        RpcError: limit_exceeded, invalid_params.
    """
    check_name(name, settings.name_chars + (len(TOOL) if name.startswith(TOOL) else 0), where)


def bytes_of(value: Raw) -> bytes:
    """An inline value as `outputs.read` reads it."""
    raw = bytes(value)
    if not raw.startswith(b'"'):
        return raw
    # Without escapes it is what stands between the quotes: parsing 15 MiB takes 40 ms.
    return raw[1:-1] if b"\\" not in raw else orjson.loads(raw).encode()


def check_slice(body: Body, offset: int) -> None:
    """Refuses an offset behind the end.

    Raises:
        RpcError: invalid_params.
    """
    if offset > body.size:
        raise invalid_params("offset", f"the content has {body.size} bytes, there is nothing at {offset}")


def slice_of(body: Body, offset: int, length: int, window: bytes) -> OutputSlice:
    """The slice at `offset` of at most `length` bytes; in UTF-8 it is whole characters, and at least one.

    Args:
        body: What is true of the whole.
        offset: Where the slice begins.
        length: How long it may be; at least 1.
        window: The content from `offset` on: `length` and `MORE` bytes, or up to its end.

    Raises:
        RpcError: invalid_params where `offset` is inside a character.
    """
    taken = _characters(window, length) if body.utf8 else window[:length]
    encoding: Literal["utf8", "base64"] = "utf8" if body.utf8 else "base64"
    return OutputSlice(
        data=taken.decode() if body.utf8 else base64.b64encode(taken).decode(),
        encoding=encoding,
        size=body.size,
        sha256=body.sha256,
        eof=offset + len(taken) >= body.size,
    )


def _characters(window: bytes, length: int) -> bytes:
    if window and _is_inside(window[0]):
        raise invalid_params("offset", "it is inside a character; begin where the slice before it ended")
    end = length
    while 0 < end < len(window) and _is_inside(window[end]):
        end -= 1
    if end == 0:  # the first character is longer than what was asked for
        end = 1
        while end < len(window) and _is_inside(window[end]):
            end += 1
    return window[:end]


def _is_inside(byte: int) -> bool:
    """Whether a byte of UTF-8 is not the first of its character."""
    return byte & 0xC0 == 0x80


def content_of(event: OutputEvent) -> Content | None:
    """The content of an event; None of progress."""
    match event:
        case Partial():
            return event.chunk
        case Artifact() | Final():
            return event.content
        case Progress():
            return None


def with_content(event: OutputEvent, content: Content) -> OutputEvent:
    """The same event with other content."""
    match event:
        case Partial():
            return Partial(chunk=content)
        case Artifact():
            return Artifact(name=event.name, content=content)
        case Final():
            return Final(content=content, ok=event.ok)
        case Progress():
            return event
