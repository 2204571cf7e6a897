"""Where an export goes: standard output, or a file that appears whole or not at all."""

import asyncio
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from carserver.cli.beside import beside
from carserver.cli.errors import CommandError

_BUFFER = 1024 * 1024  # bytes that gather before they are written
_CLEAR_LINE = "\r\x1b[K"


class Sink:
    """Takes lines; writes them beside the loop, so that the connection lives on while a pipe is full.

    It writes to a descriptor: a file object has a lock, and the end of the process would wait for that.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: list[bytes] = []
        self._size = 0
        self._writing = asyncio.Lock()

    def put(self, line: bytes) -> None:
        """One line, without its line break."""
        self._lines.append(line)
        self._size += len(line) + 1

    async def make_room(self) -> None:
        """Writes what has gathered, if that is much."""
        if self._size >= _BUFFER:
            await self.flush()

    async def flush(self) -> None:
        """Writes what has gathered."""
        async with self._writing:
            lines, self._lines, self._size = self._lines, [], 0
            if lines:
                lines.append(b"")
                await beside(lambda: self._write(b"\n".join(lines)))

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]


def progress(text: str = "") -> None:
    """How far it is, for a person, in place of what was said last; without a text that is gone."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{_CLEAR_LINE}{text}")
        sys.stderr.flush()


@contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[int]:
    """The descriptor of a file that is at `path` if the block ends well, durably; this user's alone.

    Raises:
        CommandError: something is there already (with `force`: something else than a file), or it cannot be written.
    """
    if os.path.lexists(path) and not (force and path.is_file()):
        raise _exists(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _put_in_place(temporary, path, force=force)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _put_in_place(temporary: Path, path: Path, *, force: bool) -> None:
    if force:
        temporary.replace(path)
    else:
        try:
            os.link(temporary, path)  # unlike a rename it never takes the place of another
        except FileExistsError:
            raise _exists(path) from None
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _exists(path: Path) -> CommandError:
    way = "choose another name, or say --force"
    if not path.is_file():
        way = "it is no file that could be replaced, so choose another name"  # /dev/null, a pipe, a folder
    return CommandError(f"{path} is there already: {way}")
