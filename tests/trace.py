"""Watching runs in tests: requests whose place among the pushed frames matters, and what a stream must look like."""

import asyncio
import contextlib
import json
import re
import socket
from base64 import b64encode
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect

from tests.daemon import Daemon
from tests.peer import Peer

SMALL_BUFFER = 4096  # bytes, of a peer whose socket shall not hide that it does not read

_PLACE = re.compile(rb'"cursor":(\d+),"status":"(\w+)","run_status":"(\w+)"}}$')


def text(n: int, pad: int = 0) -> dict[str, Any]:
    """An event that moves nothing, with a number to know it by."""
    return {"type": "text_delta", "n": n, **({"pad": "x" * pad} if pad else {})}


def sized(n: int, size: int, type_: str = "text_delta", member: str = "text") -> str:
    """An event of exactly `size` bytes."""
    bare = json.dumps({"type": type_, "n": n, member: ""}, separators=(",", ":"))
    return bare[:-2] + "x" * (size - len(bare)) + bare[-2:]


def cursor_of(frame: bytes) -> int:
    """The cursor of a trace frame, without parsing the rest of it."""
    found = _PLACE.search(frame, max(0, len(frame) - 100))
    assert found is not None, frame[:200]
    return int(found[1])


async def subscribe(viewer: Peer, run_id: str, **params: Any) -> dict[str, Any]:
    """Begins to watch; the answer."""
    answer: dict[str, Any] = await viewer.call("runs.trace.subscribe", {"run_id": run_id, **params})
    return answer


async def ask(peer: Peer, id_: str, method: str, params: dict[str, Any]) -> None:
    """Sends a request whose answer takes its place among the pushed frames."""
    await peer.socket.send(json.dumps({"jsonrpc": "2.0", "id": id_, "method": method, "params": params}))


async def until_answer(peer: Peer, id_: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The params of what is pushed before the answer to `ask`; the answer."""
    before: list[dict[str, Any]] = []
    while True:
        message = json.loads(await peer.next_frame())
        if message.get("id") == id_:
            return before, message
        before.append(message["params"])


async def take(viewer: Peer, count: int) -> list[dict[str, Any]]:
    """The params of the next so many frames, which must be of a trace."""
    messages = [json.loads(await viewer.next_frame()) for _ in range(count)]
    assert {message["method"] for message in messages} <= {"runs.trace.event"}
    return [message["params"] for message in messages]


async def until_ended(viewer: Peer) -> list[dict[str, Any]]:
    """The params of the frames up to the record `ended`."""
    found: list[dict[str, Any]] = []
    while not found or found[-1]["record"]["record"] != "ended":
        found += await take(viewer, 1)
    return found


async def nothing_waits(viewer: Peer) -> None:
    """Whatever the daemon has queued for this peer has come before the answer to a ping: it was nothing."""
    await viewer.call("server.ping")
    assert viewer.pushed.empty(), viewer.pushed.get_nowait()[:300]


def shown(stream: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """A stream in short: the kind of each record, its cursor, the run's status."""
    return [(params["record"]["record"], params["cursor"], params["run_status"]) for params in stream]


def connected(daemon: Daemon, receive_buffer: int | None = None) -> socket.socket:
    """A socket that is connected to the daemon; with a receive buffer of that size, which then cannot grow."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)  # later it would have no effect
    address = urlsplit(daemon.url)
    sock.connect((address.hostname, address.port))
    return sock


async def unhurried(daemon: Daemon, sock: socket.socket) -> ClientConnection:
    """A client that reads only when it is asked to: neither its socket nor its queue takes more than a little."""
    sock.setblocking(False)
    headers = {"Authorization": f"Bearer {daemon.token()}"}
    return await connect(
        daemon.url,
        sock=sock,
        additional_headers=headers,
        compression=None,
        ping_interval=None,
        max_size=None,
        max_queue=1,
    )


class RawViewer:
    """A peer without a WebSocket library: it upgrades, subscribes, and reads nothing unless it is told to."""

    def __init__(self, daemon: Daemon, sock: socket.socket, **params: Any) -> None:
        self.socket = sock
        address = urlsplit(daemon.url)
        key = b64encode(b"never reads at t").decode()
        self.socket.sendall(
            f"GET / HTTP/1.1\r\nHost: {address.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            f"Authorization: Bearer {daemon.token()}\r\n\r\n".encode()
        )
        request = {"jsonrpc": "2.0", "id": 1, "method": "runs.trace.subscribe", "params": params}
        payload = json.dumps(request).encode().ljust(126)
        mask = b"\0\0\0\0"  # a mask like any other: what is masked with it stays as it was
        self.socket.sendall(b"\x81" + bytes([0x80 | 126]) + len(payload).to_bytes(2) + mask + payload)

    def read(self, until: bytes | None = None) -> int:
        """Reads up to the end, or to a chunk that has `until` in it; how many bytes that were. It blocks."""
        self.socket.settimeout(10)
        received = 0
        with self.socket, contextlib.suppress(ConnectionResetError):
            while data := self.socket.recv(1 << 18):
                received += len(data)
                if until is not None and until in data:
                    break
        return received


async def until_at_most(daemon: Daemon, name: str, figure: float) -> None:
    """Waits for a figure to fall."""
    while (await asyncio.to_thread(daemon.metrics))[name] > figure:  # noqa: ASYNC110 - another process's event
        await asyncio.sleep(0.02)
