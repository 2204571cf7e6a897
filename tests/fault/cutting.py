"""A proxy between a client and a daemon that spoils connections: raw TCP, so it cuts wherever bytes happen to be.

Each connection gets a fate: after so many bytes from the daemon, often in the middle of a frame, it is reset, closed,
half-closed to either side, or held up for a while and then reset. Until then its bytes go through in small pieces,
some of them late.
"""

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator
from enum import StrEnum
from socket import SO_LINGER, SOL_SOCKET, socket

FATE_BYTES = (300, 5_000, 200_000, 600_000, 600_000)  # of a connection, at most: one of these; 300 is the handshake
STALL_S = 0.2  # at most
DELAY_S = 0.002  # at most, between two pieces
_PIECE = 64 * 1024  # bytes, at most


class Cut(StrEnum):
    """How a connection is spoiled."""

    RESET = "reset"
    CLOSE = "closed"
    CLOSE_DOWN = "closed to the client"  # the daemon may go on talking
    CLOSE_UP = "closed to the daemon"
    STALL = "stalled, then reset"


class Frames:
    """Follows the frames of a WebSocket from the server's first byte on: is the last one complete?"""

    def __init__(self) -> None:
        self._head: bytes | None = b""  # of the HTTP answer, until it is over
        self._waiting = b""  # of a frame's header
        self._missing = 0  # of its payload

    @property
    def within(self) -> bool:
        """Whether what came ends in the middle of a frame."""
        return self._head is None and bool(self._waiting or self._missing)

    def feed(self, data: bytes) -> None:
        """The next bytes."""
        if self._head is not None:
            self._head += data
            _, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self._head = None
        while data:
            taken = min(self._missing, len(data))
            self._missing -= taken
            data = data[taken:]
            if data:
                self._waiting, data = self._waiting + data[:1], data[1:]
                self._read_header()

    def _read_header(self) -> None:
        header = self._waiting
        if len(header) < 2:
            return
        length = header[1] & 0x7F
        more = {126: 2, 127: 8}.get(length, 0)
        if len(header) == 2 + more:
            self._missing = int.from_bytes(header[2:]) if more else length
            self._waiting = b""


class Cutting:
    """The proxy; made by `cutting`. It lets everything through until `cuts` is set."""

    def __init__(self, chance: random.Random) -> None:
        self.port = 0
        self.upstream = ("127.0.0.1", 0)
        self.cuts = False
        self.connections = 0
        self.done: dict[Cut, int] = dict.fromkeys(Cut, 0)
        self.within_frames = 0
        self._chance = chance
        self._live: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"ws://127.0.0.1:{self.port}"

    def lead_to(self, url: str) -> None:
        """Where connections go from now on: a daemon's address."""
        host, _, port = url.removeprefix("ws://").partition(":")
        self.upstream = (host, int(port))

    def cut_all(self) -> None:
        """Resets what is connected now."""
        for task in list(self._live):
            task.cancel()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client."""
        task = asyncio.current_task()
        assert task is not None
        self._live.add(task)
        self.connections += 1
        try:
            up_reader, up_writer = await asyncio.open_connection(*self.upstream)
        except OSError:  # the daemon is away
            _reset(writer)
            self._live.discard(task)
            return
        up = asyncio.create_task(_pump(reader, up_writer))
        try:
            await self._down(up_reader, writer, up_writer)
            await up  # the client has had its end of file, and answers it with its own
        except (OSError, asyncio.CancelledError):
            pass  # cut
        finally:
            self._live.discard(task)
            up.cancel()
            _reset(writer)
            _reset(up_writer)

    async def _down(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up_writer: asyncio.StreamWriter
    ) -> None:
        """Lets the daemon's bytes through, up to the connection's fate."""
        chance, frames = self._chance, Frames()
        left = chance.randint(1, chance.choice(FATE_BYTES)) if self.cuts else None
        piece = chance.choice((50, 1_000, _PIECE))
        while left is None or left > 0:
            data = await reader.read(chance.randint(1, piece) if left is None else min(left, chance.randint(1, piece)))
            if not data:
                _close(writer)
                return
            if left is not None:
                left -= len(data)
            frames.feed(data)
            writer.write(data)
            await writer.drain()
            if chance.random() < 0.01:
                await asyncio.sleep(chance.uniform(0, DELAY_S))
        await self._cut(chance.choice(list(Cut)), frames, reader, writer, up_writer)

    async def _cut(
        self,
        cut: Cut,
        frames: Frames,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        self.done[cut] += 1
        self.within_frames += frames.within
        if cut is Cut.CLOSE_UP:
            _close(up_writer)
            await _pump(reader, writer)  # what the daemon still has to say
            return
        if cut is Cut.STALL:
            await asyncio.sleep(self._chance.uniform(0, STALL_S))
        if cut is Cut.CLOSE_DOWN:
            _close(writer)
            while await reader.read(_PIECE):  # the daemon does not know yet
                pass
            return
        if cut is Cut.CLOSE:
            _close(writer)
            _close(up_writer)
            return
        raise ConnectionResetError


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # gone, or closed by a cut meanwhile
        while data := await reader.read(_PIECE):
            writer.write(data)
            await writer.drain()
        _close(writer)


def _close(writer: asyncio.StreamWriter) -> None:
    """An end of file; what was written comes before it."""
    with contextlib.suppress(OSError):
        if not writer.is_closing():
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Gone at once, and what was not sent yet with it."""
    sock: socket | None = writer.get_extra_info("socket")
    if sock is not None and not writer.is_closing():
        with contextlib.suppress(OSError):
            sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.asynccontextmanager
async def cutting(url: str, chance: random.Random) -> AsyncIterator[Cutting]:
    """A proxy to the daemon at `url`, for the length of a block."""
    proxy = Cutting(chance)
    proxy.lead_to(url)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut_all()
        await asyncio.sleep(0)
