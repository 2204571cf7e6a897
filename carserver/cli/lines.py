"""From standard input to batches of events: who reads, what a line is, when a batch is full.

The pipe is read by a thread of its own, for it may be a file or a terminal as well; what it has read waits in a short
queue, so a producer is slowed down rather than memory filled.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import msgspec
import orjson

BATCH_EVENTS = 256
BATCH_BYTES = 512 * 1024
LINGER_S = 0.05  # after a batch's first event
LINE_BYTES = 8 * 1024 * 1024  # of an event; the daemon's own limit for one is lower, and it says so
TEXT_CHARACTERS = 128 * 1024  # of one text_delta: at most 768 KiB as JSON, under the daemon's 1 MiB for an event
_READ_BYTES = 64 * 1024
_READ_AHEAD = 4  # chunks


class Chunks(Protocol):
    """What was read; an empty chunk is the end."""

    async def get(self) -> bytes:
        """The next chunk, when it is there."""


class LineError(Exception):
    """A line that cannot be recorded; the message names its number."""


class Entry(NamedTuple):
    """One event as JSON, the line that it came from (counted from 1), and when that was read."""

    line: int
    event: bytes
    at_ms: int


class Reader:
    """Reads a descriptor in a thread, a few chunks ahead of the loop that it was made in. It dies with the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self._room = threading.Semaphore(_READ_AHEAD)
        threading.Thread(target=self._read, name="carserver: standard input", daemon=True).start()

    async def get(self) -> bytes:
        """The next chunk; an empty one is the end."""
        chunk = await self._chunks.get()
        self._room.release()
        return chunk

    def _read(self) -> None:
        chunk = b"more"
        while chunk:
            self._room.acquire()
            try:
                chunk = os.read(self._descriptor, _READ_BYTES)
            except OSError:  # a terminal that is gone, a directory
                chunk = b""
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)


async def batches(
    chunks: Chunks,
    mode: str,
    *,
    most: int = BATCH_EVENTS,
    most_bytes: int = BATCH_BYTES,
    linger_s: float = LINGER_S,
) -> AsyncGenerator[list[Entry], None]:
    """The input's events, in its order, as many at a time as are there or as a batch takes.

    Args:
        chunks: what is read.
        mode: `auto`, `events` or `text`: what a line is.
        most: events in a batch.
        most_bytes: bytes in a batch; a larger event has one to itself.
        linger_s: how long a batch waits for more after its first event, seconds.

    Raises:
        LineError: after everything before that line has been yielded.
    """
    loop = asyncio.get_running_loop()
    splitter = _Splitter()
    batch: list[Entry] = []
    size = 0
    deadline: float | None = None
    chunk = b"more"
    while chunk:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await chunks.get()
        except TimeoutError:
            yield batch
            batch, size, deadline = [], 0, None
            continue
        lines, problem = splitter.split(chunk), None
        for number, line in lines:
            try:
                events = _events(number, line, mode)
            except LineError as error:
                problem = error
                break
            for event in events:
                if batch and (len(batch) >= most or size + len(event) > most_bytes):
                    yield batch
                    batch, size, deadline = [], 0, None
                batch.append(Entry(number, event, _now_ms()))
                size += len(event)
                deadline = deadline or loop.time() + linger_s
        if problem is None and splitter.problem is not None:
            problem = LineError(splitter.problem)
        if problem is not None or not chunk:
            if batch:
                yield batch
            if problem is not None:
                raise problem


class _Splitter:
    """Cuts chunks into numbered lines; the last may lack its line break."""

    def __init__(self) -> None:
        self._number = 0
        self._parts: list[bytes] = []
        self._size = 0
        self.problem: str | None = None

    def split(self, chunk: bytes) -> list[tuple[int, bytes]]:
        """The lines that `chunk` completes, without their line breaks; an empty chunk completes what is left."""
        *complete, rest = chunk.split(b"\n")
        lines = [self._line(part) for part in complete]
        if rest:
            self._parts.append(rest)
            self._size += len(rest)
        if self._size > LINE_BYTES:
            self.problem = f"line {self._number + 1} is longer than {LINE_BYTES} bytes"
        if not chunk and self._parts:
            lines.append(self._line(b""))
        return lines

    def _line(self, last: bytes) -> tuple[int, bytes]:
        line = b"".join([*self._parts, last])
        self._parts = []
        self._size = 0
        self._number += 1
        return self._number, line


def _events(number: int, line: bytes, mode: str) -> list[bytes]:
    """The events of one line: itself, or the text that it is."""
    if mode != "text":
        candidate = line.strip()
        if _is_event(candidate):
            return [candidate]
        if mode == "events":
            if not candidate:
                return []
            raise LineError(f'line {number} is no event: it must be a JSON object with a string "type"')
    text = line.removesuffix(b"\r").decode("utf-8", "replace") + "\n"
    pieces = [text[i : i + TEXT_CHARACTERS] for i in range(0, len(text), TEXT_CHARACTERS)]
    return [msgspec.json.encode({"type": "text_delta", "text": piece}) for piece in pieces]


def _is_event(line: bytes) -> bool:
    if not line.startswith(b"{"):
        return False
    try:
        value: Any = orjson.loads(line)  # as strict as the daemon: what passes can be sent as it stands
    except orjson.JSONDecodeError:
        return False
    return isinstance(value.get("type"), str)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
