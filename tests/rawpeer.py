"""A peer below the WebSocket library: every bit of its frames is the test's, and it reads only when it is told to."""

import asyncio
import base64
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.daemon import Daemon

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
ANSWER_S = 20.0


class Frame(NamedTuple):
    """One frame of the daemon's."""

    opcode: int
    payload: bytes

    @property
    def code(self) -> int:
        """Of a close frame."""
        (code,) = struct.unpack_from("!H", self.payload)
        return int(code)

    @property
    def reason(self) -> str:
        """Of a close frame."""
        return self.payload[2:].decode()


def frame(opcode: int, payload: bytes, *, fin: bool = True, reserved: int = 0, masked: bool = True) -> bytes:
    """A frame as a client sends it, or as it should not."""
    first = (0x80 if fin else 0) | reserved << 4 | opcode
    mask_bit = 0x80 if masked else 0
    if len(payload) < 126:
        head = struct.pack("!BB", first, mask_bit | len(payload))
    elif len(payload) < 65_536:
        head = struct.pack("!BBH", first, mask_bit | 126, len(payload))
    else:
        head = struct.pack("!BBQ", first, mask_bit | 127, len(payload))
    return head + (bytes(4) + payload if masked else payload)  # a mask of zeros changes nothing


def call_frame(id_: Any, method: str, params: Any = None) -> bytes:
    """A request in its frame; several that are sent as one arrive together, whatever this process does meanwhile."""
    members = {} if params is None else {"params": params}
    return frame(TEXT, json.dumps({"jsonrpc": "2.0", "id": id_, "method": method, **members}).encode())


def request(path: str = "/", *, host: str = "localhost", headers: tuple[str, ...] = ()) -> bytes:
    """The bytes of an upgrade request."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
        *headers,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class RawPeer:
    """One socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self.writer.write(data)

    def send_text(self, text: str | bytes) -> None:
        """A text message."""
        self.send(frame(TEXT, text.encode() if isinstance(text, str) else text))

    def send_call(self, id_: Any, method: str, params: Any = None) -> None:
        """A request."""
        self.send(call_frame(id_, method, params))

    async def head(self) -> bytes:
        """The head of the answer to the upgrade request."""
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), ANSWER_S)

    async def frame(self) -> Frame:
        """The next frame."""
        return await asyncio.wait_for(self._frame(), ANSWER_S)

    async def _frame(self) -> Frame:
        first, second = await self.reader.readexactly(2)
        assert first & 0x70 == 0
        assert second & 0x80 == 0
        length = second
        if length == 126:
            (length,) = struct.unpack("!H", await self.reader.readexactly(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", await self.reader.readexactly(8))
        return Frame(first & 0x0F, await self.reader.readexactly(length))

    async def message(self) -> Any:
        """The next text message, parsed; pings are passed over."""
        while (got := await self.frame()).opcode == PING:
            pass
        assert got.opcode == TEXT, got
        return json.loads(got.payload)

    async def close_frame(self) -> Frame:
        """The close frame; what comes before it is passed over."""
        while (got := await self.frame()).opcode != CLOSE:
            pass
        return got

    async def rest(self) -> bytes:
        """All that comes until the socket ends."""
        return await asyncio.wait_for(self.reader.read(), ANSWER_S)


@contextlib.asynccontextmanager
async def raw_socket(daemon: Daemon, receive_buffer: int | None = None) -> AsyncIterator[RawPeer]:
    """A socket to the daemon on which nothing was said."""
    at = urlsplit(daemon.url)
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (at.hostname, at.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=2**16 if receive_buffer is None else receive_buffer)
    try:
        yield RawPeer(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def raw_peer(
    daemon: Daemon, token: str | None = "auth-token", receive_buffer: int | None = None
) -> AsyncIterator[RawPeer]:
    """An upgraded connection; `token` names a secret file, None: not authenticated."""
    async with raw_socket(daemon, receive_buffer) as peer:
        headers = () if token is None else (f"Authorization: Bearer {daemon.token(token)}",)
        peer.send(request(headers=headers))
        assert (await peer.head()).startswith(b"HTTP/1.1 101 ")
        yield peer
