"""`--stdio`: the parent process as one more peer, the host, on the daemon's standard input and output.

Two threads carry bytes between these and one end of a socket pair; its other end is a connection like any other. So
pipes, files and terminals all do, nothing here can block the loop, and the kernel's buffers are the only ones.
"""

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from carserver.core.principals import HOST
from carserver.front.lines import LineConnection
from carserver.front.stream import Register

T = TypeVar("T")

log = logging.getLogger("carserver.front")

_STDIN: Final = 0
_STDOUT: Final = 1
_STDERR: Final = 2
_READ_BYTES: Final = 64 * 1024  # of one read: what a pipe holds
_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET})  # the parent, or the connection: an end like any other


class Stdio:
    """The daemon's standard input and output, for frames alone."""

    def __init__(self) -> None:
        """Takes both: from now on nothing else in the process can read the one or print to the other.

        What reads standard input gets its end, what prints to standard output prints to standard error.

        Raises:
            OSError: one of the three is closed.
        """
        if None in (sys.__stdin__, sys.__stdout__, sys.__stderr__):
            # Closed when the process began: by now their numbers may be other files'.
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._input = os.dup(_STDIN)
        self._output = os.dup(_STDOUT)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, _STDIN)
        os.close(nothing)
        os.dup2(_STDERR, _STDOUT)
        self._writer = threading.Thread(target=self._write, name="stdout", daemon=True)

    @property
    def writing(self) -> bool:
        """Whether there may be something left that standard output has not taken."""
        return self._writer.is_alive()

    async def connect(self, front: Register, ended: Callable[[], None]) -> None:
        """Begins to serve the parent; `ended` is called when it has no more to say or is gone."""
        near, self._far = socket.socketpair()
        for end in (near, self._far):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, front.settings.send_buffer_bytes)
        near.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: StdioConnection(front, ended), near)
        self._writer.start()
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def _read(self) -> None:
        """Standard input, until its end or the connection's."""
        with contextlib.suppress(OSError):
            while data := _patiently(self._input, select.POLLIN, partial(os.read, self._input, _READ_BYTES)):
                self._far.sendall(data)
        with contextlib.suppress(OSError):
            self._far.shutdown(socket.SHUT_WR)

    def _write(self) -> None:
        """What is for standard output, until all of it is written or nobody reads it; then the connection ends."""
        try:
            while data := self._far.recv(_READ_BYTES):
                while data:
                    data = data[_patiently(self._output, select.POLLOUT, partial(os.write, self._output, data)) :]
        except OSError as error:
            if error.errno not in _GONE:
                log.warning("standard output takes no more: %s", error.strerror)
        with contextlib.suppress(OSError):
            self._far.shutdown(socket.SHUT_RDWR)


def _patiently(fd: int, event: int, work: Callable[[], T]) -> T:
    """Reads or writes, also where the parent has made the descriptor non-blocking, as some runtimes do."""
    while True:
        try:
            return work()
        except BlockingIOError:
            watch = select.poll()
            watch.register(fd, event)
            watch.poll()


class StdioConnection(LineConnection):
    """The parent: when it has no more to say, or is gone, the daemon is not wanted any more."""

    def __init__(self, front: Register, ended: Callable[[], None]) -> None:
        super().__init__(front)
        self._ended = ended

    def _admit(self) -> None:
        self._begin(HOST)

    def _answered(self) -> None:
        """The drain ends the connection, as it ends all: the parent is told, like everyone."""
        self._cancel_timer()
        self._ended()

    def connection_lost(self, exc: Exception | None) -> None:
        """It hung up, or did not read."""
        super().connection_lost(exc)
        self._ended()
