"""Peers that speak in lines, over a Unix socket or a daemon's standard input and output: bare streams, not ours."""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

from websockets.asyncio.client import ClientConnection

from tests.daemon import ROOT, STARTED, Daemon
from tests.peer import Peer

MIB = 1024 * 1024
LONGEST = 32 * MIB  # bytes of a line that a peer here takes
EXIT_S = 20.0
CLOSING = b'{"jsonrpc":"2.0","method":"server.closing"'


class LineSocket:
    """As much of the `websockets` client as `Peer` uses, with a line for a frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.close_code: int | None = None
        self.close_reason: str | None = None

    async def send(self, frame: str | bytes) -> None:
        self.writer.write((frame if isinstance(frame, bytes) else frame.encode()) + b"\n")
        await self.writer.drain()

    def __aiter__(self) -> "LineSocket":
        return self

    async def __anext__(self) -> bytes:
        while line := await self.reader.readline():
            if not line.startswith(CLOSING):
                assert line.endswith(b"\n")
                return line[:-1]
            assert self.close_code is None, "there is one last line"
            said = json.loads(line)["params"]
            self.close_code, self.close_reason = said["code"], said["reason"]
        raise StopAsyncIteration

    async def wait_closed(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


def line_peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Peer:
    """A peer over these two."""
    return Peer(cast("ClientConnection", LineSocket(reader, writer)))


def is_there(path: Path) -> bool:
    """Whether it has its file."""
    return path.is_socket()


@contextlib.asynccontextmanager
async def unix_streams(path: Path) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection to a Unix socket."""
    reader, writer = await asyncio.open_unix_connection(path, limit=LONGEST)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def unix_peer(path: Path) -> AsyncIterator[Peer]:
    """A peer on a Unix socket."""
    async with unix_streams(path) as streams:
        yield line_peer(*streams)


class StdioDaemon(Daemon):
    """A daemon that is this process's child; its standard input and output are a peer's."""

    def __init__(self, state: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(state)
        self.stdout, self.stdin = reader, writer

    def stop_reading(self) -> None:
        """Nothing is taken from its standard output any more."""
        self._output.pause_reading()

    def go_on_reading(self) -> None:
        """All is taken."""
        self._output.resume_reading()

    def hang_up(self) -> None:
        """Nobody can read its standard output any more."""
        self._output.close()

    @property
    def _output(self) -> asyncio.ReadTransport:
        return cast("asyncio.ReadTransport", self.stdout._transport)  # type: ignore[attr-defined]

    async def ready(self) -> "StdioDaemon":
        """Waits until it listens; `url` is known then."""
        await self.said("listening on ws:")
        found = re.search(STARTED, self.log)
        assert found is not None
        self.url = found[1]
        return self

    async def said(self, words: str) -> None:
        """Waits until they are in its log."""
        while words not in self.log:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            await asyncio.sleep(0.02)

    async def exit_code(self) -> int:
        """Waits for its end."""
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, EXIT_S)

    async def rest(self) -> list[Any]:
        """Every line until its standard output ends, parsed."""
        return [json.loads(line) for line in (await asyncio.wait_for(self.stdout.read(), EXIT_S)).splitlines()]


async def streams_of(process: subprocess.Popen[bytes]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Its standard output, to read, and its standard input, to write."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LONGEST)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), process.stdout)
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), process.stdin
    )
    return reader, asyncio.StreamWriter(transport, protocol, None, loop)


def stdio_command(state: Path, *args: str) -> list[str]:
    """The command line of a daemon that speaks in lines."""
    return [sys.executable, "-m", "carserver", "serve", "--stdio", "--state-dir", str(state), "--port", "0", *args]


def environment(**settings: object) -> dict[str, str]:
    """Nothing of the tests' own environment that a daemon would take for a setting, and these."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CARSERVER", "CAR_"))}
    given = {f"CARSERVER_{name.upper()}": str(value) for name, value in settings.items()}
    return clean | given | {"PYTHONPATH": str(ROOT)}


@contextlib.asynccontextmanager
async def stdio_daemon(state: Path, *args: str, **settings: object) -> AsyncIterator[StdioDaemon]:
    """A child for the length of a block; it is killed where the block does not end it."""
    process = await asyncio.to_thread(_start, state, args, settings)
    reader, writer = await streams_of(process)
    daemon = StdioDaemon(state, reader, writer)
    daemon.process = process
    try:
        yield daemon
    finally:
        daemon.hang_up()
        if not writer.transport.is_closing():
            writer.transport.abort()
        process.kill()
        await asyncio.to_thread(process.wait, EXIT_S)


def _start(state: Path, args: tuple[str, ...], settings: dict[str, object]) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    with open(f"{state}.log", "wb") as log:
        return subprocess.Popen(
            stdio_command(state, *args), stdin=pipe, stdout=pipe, stderr=log, env=environment(**settings)
        )
