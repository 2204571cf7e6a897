"""The socket that the daemon listens on, and what peers call it by."""

import errno
import socket
from typing import Any

from carserver.config import Settings

# "Every address" is no name of a Host: the commands of this machine, who read endpoint.json, would be refused for it.
LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - it is listened on where an operator says so


class CannotListen(Exception):
    """There is no such address, or it is taken; the message says which, and what to do."""


def bind(settings: Settings) -> socket.socket:
    """The listening socket. Its send buffer is inherited: a stalled peer shows itself after that, not megabytes on.

    Raises:
        CannotListen: naming `host` and `port`.
    """
    family, _, _, _, address = _resolve(settings)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, settings.send_buffer_bytes)
        sock.bind(address)
        # At once: SO_REUSEADDR lets a second daemon bind as long as the first does not listen.
        sock.listen(settings.backlog)
    except OSError as error:
        sock.close()
        hint = "; is another daemon there? choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise CannotListen(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}{hint}") from None
    return sock


def _resolve(settings: Settings) -> tuple[Any, ...]:
    try:
        return socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise CannotListen(f"--host {settings.host!r}: {error.strerror}") from None


def url_of(host: str, port: int) -> str:
    """As a WebSocket client wants it."""
    return f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
