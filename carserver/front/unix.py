"""The Unix socket: its file, and who may come in by it (contract, section 5).

The file is for its owner alone, and whoever gets past that is asked of the kernel: the daemon's own user, or nobody.
"""

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Final, Self

from carserver.core.principals import CLIENT, HOST
from carserver.front.lines import LineConnection
from carserver.front.stream import State
from carserver.protocol.closing import Close

log = logging.getLogger("carserver.front")

PATH_BYTES: Final = 107  # sun_path has 108 (unix(7)), with a zero byte at its end
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


class UnixError(Exception):
    """There can be no socket at that path; the message is one line that says what to do."""


class UnixSocket:
    """A listening socket and its file, which `remove` takes away again."""

    def __init__(self, path: Path, sock: socket.socket) -> None:
        self.path = path
        self.sock = sock
        self._made: tuple[int, int] | None = _place(path.lstat())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
        self.sock.close()

    def remove(self) -> None:
        """Takes the file away, once, while it is the one that was made. To be called before the socket is closed.

        Until then nothing else can have its inode's number; afterwards the path may be another daemon's.
        """
        made, self._made = self._made, None
        with contextlib.suppress(OSError):
            if made is not None and _place(self.path.lstat()) == made:
                self.path.unlink()


def listen(path: Path, backlog: int) -> UnixSocket:
    """A socket that listens at `path`, its file 0600; what a daemon that was killed left there goes first.

    Raises:
        UnixError: the path is too long, somebody listens there, something else is there, or the system refuses.
    """
    if len(os.fsencode(path)) > PATH_BYTES:
        raise UnixError(f"--unix {path}: a socket's path has at most {PATH_BYTES} bytes; choose a shorter one")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_way(path)
        mask = os.umask(0o177)
        try:
            sock.bind(os.fspath(path))
        finally:
            os.umask(mask)
        sock.listen(backlog)  # at once: until then a second daemon would take it for one that is left over
        return UnixSocket(path, sock)
    except UnixError:
        sock.close()
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        sock.close()
        why = error.strerror if isinstance(error, OSError) else error
        raise UnixError(f"--unix {path}: cannot listen there: {why}; choose another path") from None


def _make_way(path: Path) -> None:
    """Removes the file of a socket at which nobody listens."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise UnixError(f"--unix {path}: there is something there that is no socket; remove it, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        refused = probe.connect_ex(os.fspath(path))
    if refused in (0, errno.EAGAIN):  # EAGAIN: more than its backlog wait for it
        raise UnixError(f"--unix {path}: somebody listens there already; stop that daemon, or choose another path")
    if refused != errno.ECONNREFUSED:
        raise UnixError(f"--unix {path}: there is a socket there: {os.strerror(refused)}; choose another path")
    log.info("removing %s: nobody listens there any more", path)
    if _place(path.lstat()) == _place(found):
        path.unlink()


def _place(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


class UnixConnection(LineConnection):
    """A peer on the Unix socket: `client` to begin with, and whoever `session.auth` then proves it to be."""

    def _admit(self) -> None:
        sock = self._transport.get_extra_info("socket")
        # As for TCP, but here it is not inherited from the listening socket.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._settings.send_buffer_bytes)
        _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid != os.geteuid():
            self._counters.unix_peers_refused += 1
            self._refuse(Close.POLICY, f"this socket is for user {os.geteuid()} alone, not for user {uid}")
        elif (limit := self._front.full(self)) is not None:
            self._counters.handshakes_refused += 1
            self._refuse(Close.TRY_AGAIN_LATER, f"no room for another connection: {limit}")
        else:
            self._begin(CLIENT if self._settings.auth else HOST, provisional=True)

    def _refuse(self, code: Close, reason: str) -> None:
        self.state = State.OPEN
        self.end(code, reason)
