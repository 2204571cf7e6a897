"""What a command writes, as chunks. Bytes in, chunks out: nothing here reads a pipe.

Contract, section 6, Processes: text is decoded as UTF-8, and a character that two reads divide is joined; what is no
UTF-8 becomes U+FFFD. With `output = "jsonl"` a line of JSON on standard output is a `data` chunk, or the chunk itself
if it is one; a line that is no JSON, or larger or deeper than a chunk may be, is text, with its line break.
"""

import codecs
from collections.abc import Iterator
from typing import Protocol

import orjson
from msgspec import UNSET, Raw

from carserver.config import Settings
from carserver.core.chunks import encoded, read_chunk
from carserver.protocol.codec import too_deep
from carserver.protocol.errors import RpcError
from carserver.protocol.tools import DataChunk, GivenChunk, TextChunk

_Utf8 = codecs.getincrementaldecoder("utf-8")
_BREAK = b"\n"
_JSON_BEGINS = frozenset(b'{["-0123456789tfn \t')  # what begins otherwise need not be tried
_WRAPPING_BYTES = 64  # more than what stands around the value in a data chunk: only a longer line has to be measured


class Decoder(Protocol):
    """Makes chunks of one stream."""

    def take(self, data: bytes) -> Iterator[GivenChunk]:
        """The chunks that the next bytes complete."""
        ...

    def end(self) -> Iterator[GivenChunk]:
        """The chunks that are left when the stream has ended."""
        ...


class TextDecoder:
    """Text: a chunk for what was read at once."""

    def __init__(self, *, is_stderr: bool = False) -> None:
        self._decoder = _Utf8(errors="replace")
        self._is_stderr = is_stderr

    def take(self, data: bytes) -> Iterator[GivenChunk]:
        return self._chunk(self._decoder.decode(data))

    def end(self) -> Iterator[GivenChunk]:
        return self._chunk(self._decoder.decode(b"", final=True))

    def _chunk(self, text: str) -> Iterator[GivenChunk]:
        if text:
            yield TextChunk(text=text, stream="stderr" if self._is_stderr else UNSET)


class LineDecoder:
    """Lines of JSON, and text between them; holds at most `chunk_bytes` of a line that has not ended."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._line = bytearray()
        self._is_long = False  # the line that has not ended is longer than a chunk: it is text, as it comes
        self._text = TextDecoder()

    def take(self, data: bytes) -> Iterator[GivenChunk]:
        text = bytearray()  # lines that are text, one after the other: one chunk for all of them
        *lines, rest = data.split(_BREAK)
        for ended in lines:
            line = self._joined(ended)
            chunk = None if self._is_long else self._read(line)
            self._is_long = False
            if chunk is None:
                text += line
                text += _BREAK
                continue
            yield from self._flushed(text)
            yield chunk
        self._line += rest
        if self._is_long or len(self._line) > self._settings.chunk_bytes:
            self._is_long = True
            text += self._joined(b"")
        if text:
            yield from self._text.take(bytes(text))

    def end(self) -> Iterator[GivenChunk]:
        line = self._joined(b"")
        chunk = None if self._is_long else self._read(line)
        if chunk is None:
            yield from self._text.take(line)
        yield from self._text.end()
        if chunk is not None:
            yield chunk

    def _joined(self, data: bytes) -> bytes:
        """The line so far and what follows; it is held no longer."""
        if not self._line:
            return data
        self._line += data
        line = bytes(self._line)
        self._line.clear()
        return line

    def _flushed(self, text: bytearray) -> Iterator[GivenChunk]:
        if text:
            yield from self._text.take(bytes(text))  # it ends with a line break, so no character is divided here
            text.clear()

    def _read(self, line: bytes) -> GivenChunk | None:
        """The chunk that a line is; None where it is text. `orjson.loads` is the proof that it is JSON."""
        maximum, nesting = self._settings.chunk_bytes, self._settings.value_nesting
        if not line or line[0] not in _JSON_BEGINS or len(line) > maximum:
            return None
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            return None
        if type(value) is dict and "kind" in value:
            try:
                chunk = read_chunk(line, self._settings)
            except RpcError:
                pass  # an object of the tool's own that looks like a chunk: data
            else:
                return chunk
        if too_deep(line, value, nesting):
            return None
        chunk = DataChunk(data=Raw(line))
        return chunk if len(line) + _WRAPPING_BYTES <= maximum or len(encoded(chunk)) <= maximum else None
