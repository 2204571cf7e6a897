"""Chunks as they come and as they are kept: what a host says is read here, and long text is split."""

from collections.abc import Iterator

import msgspec
import orjson
from msgspec import UNSET

from carserver.config import Settings
from carserver.protocol.codec import decode, encode, too_deep
from carserver.protocol.errors import RpcError, invalid_params, limit_exceeded
from carserver.protocol.tools import DataChunk, ErrorChunk, GivenChunk, GivenDone, ProgressChunk, TextChunk

_decoder: "msgspec.json.Decoder[GivenChunk]" = msgspec.json.Decoder(GivenChunk)
_KINDS = ("text", "data", "progress", "done", "error")
_CHARACTER_BYTES = 4  # of UTF-8, at most


def read_chunk(raw: bytes, settings: Settings) -> GivenChunk:
    """A chunk that a host sent; it is known to be JSON.

    Raises:
        RpcError: invalid_params, limit_exceeded; the path begins with `chunk`.
    """
    if raw.count(b"{") + raw.count(b"[") > settings.value_nesting and too_deep(
        raw, orjson.loads(raw), settings.value_nesting
    ):
        raise limit_exceeded("value_nesting", settings.value_nesting + 1, settings.value_nesting, "chunk")
    try:
        return decode(_decoder, raw, "chunk")
    except RpcError as error:
        if error.data.get("path") == "chunk.kind":
            raise invalid_params("chunk.kind", f"one of {', '.join(_KINDS)} is wanted") from None
        raise


def encoded(chunk: TextChunk | DataChunk | ProgressChunk | ErrorChunk) -> bytes:
    """A chunk as compact JSON; the numbers in its data keep their own digits."""
    if isinstance(chunk, DataChunk):
        return b'{"kind":"data","data":%b}' % msgspec.json.format(bytes(chunk.data), indent=-1)
    return encode(chunk)


def result_of(chunk: GivenDone) -> bytes | None:
    """The result of a last chunk, compact; None where there is none, or it is null."""
    if chunk.result is UNSET:
        return None
    raw = msgspec.json.format(bytes(chunk.result), indent=-1)
    return None if raw == b"null" else raw


def pieces(chunk: TextChunk, maximum: int) -> Iterator[TextChunk]:
    """A text chunk as chunks of at most `maximum` bytes of UTF-8 each; no character is cut."""
    text = chunk.text
    if len(text) * _CHARACTER_BYTES <= maximum or len(text.encode()) <= maximum:
        yield chunk
        return
    for piece in split(text, maximum):
        yield TextChunk(text=piece, stream=chunk.stream)


def split(text: str, maximum: int) -> Iterator[str]:
    """Text as texts of at most `maximum` bytes of UTF-8 each, or of one character."""
    data = text.encode()
    start = 0
    while start < len(data):
        end = min(start + maximum, len(data))
        while start < end < len(data) and _is_inside(data[end]):
            end -= 1
        if end == start:  # one character is longer than that
            end += 1
            while end < len(data) and _is_inside(data[end]):
                end += 1
        yield data[start:end].decode()
        start = end


def _is_inside(byte: int) -> bool:
    """Whether a byte of UTF-8 is not the first of its character."""
    return byte & 0xC0 == 0x80


def preview(result: bytes, characters: int) -> str:
    """How a result begins: a string itself, or the compact JSON of another value."""
    text: str = (
        orjson.loads(result)
        if result.startswith(b'"')
        else result[: characters * _CHARACTER_BYTES].decode(errors="ignore")
    )
    return text[:characters]
