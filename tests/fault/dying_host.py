"""A host of tools that dies when it is told to: `python -m tests.fault.dying_host URL TOOL STAGE`, token on its input.

It says `ready` once its tool is registered, and `asked` when it is as far as its stage says; then a line on its
standard input is the way it dies: `reset`, `half`; to be killed it needs to be told nothing. The standard library
alone, and no event loop: it starts fast, and nothing tidies up behind it.
"""

import base64
import json
import os
import select
import socket
import struct
import sys
import time
from typing import Any
from urllib.parse import urlsplit

REQUESTS = 6
"""Calls that it is asked for before it is as far as its stage says."""
PACE_S = 0.002  # between two pieces of a stream: it is to be cut off, not to flood


class Socket:
    """As much of a WebSocket as this takes."""

    def __init__(self, url: str, token: str) -> None:
        at = urlsplit(url)
        self.socket = socket.create_connection((at.hostname, at.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        self._read = self.socket.makefile("rb")
        assert b" 101 " in self._read.readline()
        while self._read.readline() != b"\r\n":
            pass

    def send(self, members: dict[str, Any]) -> None:
        """A message."""
        payload = json.dumps({"jsonrpc": "2.0", **members}).encode()
        assert len(payload) < 65_536
        head = struct.pack("!BB", 0x81, 0x80 | len(payload))
        if len(payload) > 125:
            head = struct.pack("!BBH", 0x81, 0x80 | 126, len(payload))
        self.socket.sendall(head + bytes(4) + payload)

    def next(self) -> dict[str, Any]:
        """The next message."""
        length = self._read.read(2)[1]
        if length > 125:
            length = int.from_bytes(self._read.read(2 if length == 126 else 8), "big")
        message: dict[str, Any] = json.loads(self._read.read(length))
        return message

    def asked(self) -> str:
        """The id of the next `tools.execute`."""
        while (message := self.next()).get("method") != "tools.execute":
            pass
        id_: str = message["id"]
        return id_

    def chunk(self, request_id: str, **chunk: Any) -> None:
        """A piece of a request's stream."""
        self.send({"method": "tools.chunk", "params": {"request_id": request_id, "chunk": chunk}})

    def reset(self) -> None:
        """Ends it without a word, not even FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._read.close()
        self.socket.close()

    def half(self) -> None:
        """Sends no more, but does not go."""
        self.socket.shutdown(socket.SHUT_WR)


def main() -> None:
    """Hosts, and dies."""
    url, tool, stage = sys.argv[1:]
    host = Socket(url, sys.stdin.readline().strip())
    host.send({"id": 1, "method": "tools.register", "params": [{"name": tool}]})
    assert host.next()["result"] == 1
    say("ready")
    asked = [host.asked() for _ in range(REQUESTS)]
    if stage in ("streaming", "ended"):
        for id_ in asked:
            host.chunk(id_, kind="text", text="begun")
    if stage == "ended":
        for id_ in asked:
            host.chunk(id_, kind="done", result=id_)
    say("asked")
    while not select.select([sys.stdin], [], [], PACE_S if stage in ("streaming", "stalled") else None)[0]:
        for id_ in asked:
            host.chunk(id_, kind="text", text=f"at {time.monotonic()}")
    way = sys.stdin.readline().strip()
    if way == "reset":
        host.reset()
    elif way == "half":
        host.half()
    say("dead")
    sys.stdin.readline()  # until it is killed


def say(word: str) -> None:
    """To the parent."""
    print(word, flush=True)


if __name__ == "__main__":
    main()
