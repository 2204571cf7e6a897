"""The file root: the one folder below which outputs may refer to files, and the only door to them.

What is read is opened once, by `openat2`, which follows no link in any part of the path and never leaves the root (a
check of the path that is followed by an open is a race). All that is decided is decided on that descriptor: a plain
file, with one name, not too large, and the same before and after it was read.
"""

import asyncio
import codecs
import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.outputs import Body, Fingerprint
from carserver.core.outputstore import FileChanged, FileRefused
from carserver.protocol.errors import ErrorKind, RpcError, overloaded, unavailable
from carserver.stores.deadlines import Deadlines, resolve

T = TypeVar("T")

log = logging.getLogger("carserver.files")

_OPENAT2 = 437  # on every architecture that Python 3.11 runs on
_RESOLVE = 0x02 | 0x04 | 0x08  # NO_MAGICLINKS, NO_SYMLINKS, BENEATH
# Non-blocking, so that a FIFO without a writer does not hold the thread; it is refused once its descriptor is there.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW
_PIECE = 256 * 1024  # bytes read at a time: between two, it is seen whether somebody still waits
_REALTIME_COARSE = 5  # the clock that the kernel stamps files by
_TICK_NS = 20_000_000  # it moves on in steps, of 10 ms at most
_SHORT_S = 0.001
_SETTLES_S = 0.2  # that a file has to leave the tick of its last change: ten ticks

_WHY = {
    errno.ENOENT: "there is no such file below the file root",
    errno.ENOTDIR: "a part of it that should be a folder is none",
    errno.ELOOP: "it, or a folder on the way, is a symbolic link",
    errno.EXDEV: "it leads out of the file root",
    errno.EACCES: "the daemon may not read it",
    errno.ENAMETOOLONG: "it, or a name in it, is longer than one may be",
    errno.ENXIO: "it is not a plain file",
}
# Of the machine, not of the path: the same file may be readable in a moment.
_NOT_ITS_FAULT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN, errno.EINTR})


class FileRootError(Exception):
    """The file root cannot be used; the message is one line that says why and what to do."""


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_libc = ctypes.CDLL(None, use_errno=True)


def _openat2(folder: int, path: bytes) -> int:
    how = _OpenHow(_FLAGS, 0, _RESOLVE)
    descriptor: int = _libc.syscall(
        ctypes.c_long(_OPENAT2), ctypes.c_int(folder), ctypes.c_char_p(path), ctypes.byref(how), ctypes.c_size_t(24)
    )
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor


class FileRoot:
    """The folder itself, by a descriptor that is kept: it is that folder, whatever its path leads to later.

    Args:
        path: Where it is.
        file_bytes: The largest file.
        apart: Folders that must not lie in it: everyone who is authenticated reads what does.

    Raises:
        FileRootError: it is no folder, one of these lies in it, or the system has no `openat2`.
    """

    def __init__(self, path: Path, file_bytes: int, apart: tuple[Path, ...] = ()) -> None:
        self._file_bytes = file_bytes
        where = f"--file-root {path}"
        for folder in apart:
            if folder.resolve().is_relative_to(path.resolve()):
                raise FileRootError(f"{where}: {folder} lies in it, with the daemon's secrets; choose another folder")
        try:
            self._folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _unusable(where, error) from None
        try:
            os.close(_openat2(self._folder, b"."))
        except OSError as error:
            os.close(self._folder)
            if error.errno == errno.EACCES:
                raise _unusable(where, error) from None
            raise FileRootError(
                f"{where}: files cannot be opened safely here: openat2: {error.strerror} (Linux 5.6 or newer is needed,"
                " and a sandbox that allows it); start without --file-root"
            ) from None

    def close(self) -> None:
        """Lets go of the folder."""
        os.close(self._folder)

    def examine(self, path: str, go_on: Callable[[], None]) -> tuple[Body, Fingerprint]:
        """Reads a whole file; `go_on` is called between two pieces, and raises where nobody waits any more.

        Raises:
            FileRefused, FileChanged.
            OSError: it could not be read.
        """
        with self._open(path) as descriptor:
            before = _settled(descriptor)
            self._check_name(path, before)
            body = _body(descriptor, before.st_size, go_on)
            fingerprint = _fingerprint(before)
            if not self._is_fit(after := os.fstat(descriptor)) or _fingerprint(after) != fingerprint:
                raise FileChanged("it changed while it was read; append it when it is complete")
            return body, fingerprint

    def read(self, path: str, fingerprint: Fingerprint, offset: int, length: int) -> bytes:
        """The bytes of the file with this fingerprint from `offset` on: `length`, or up to its end.

        Raises:
            FileRefused, FileChanged.
            OSError: it could not be read.
        """
        with self._open(path) as descriptor:
            if _fingerprint(os.fstat(descriptor)) != fingerprint:
                raise FileChanged("it has changed since, or another file is there")
            data = _pread(descriptor, min(length, max(fingerprint.size - offset, 0)), offset)
            if not self._is_fit(after := os.fstat(descriptor)) or _fingerprint(after) != fingerprint:
                raise FileChanged("it changed while it was read")
            return data

    @contextlib.contextmanager
    def _open(self, path: str) -> Iterator[int]:
        """A descriptor of the plain file at `path`."""
        if "\0" in path:
            raise FileRefused("a path has no NUL character")
        if ".." in path.split("/"):
            raise FileRefused("it leads upwards: a path below the file root has no `..`")
        try:
            descriptor = _openat2(self._folder, path.encode())
        except OSError as error:
            if error.errno in _NOT_ITS_FAULT:
                raise
            raise FileRefused(self._why_not(error)) from None
        try:
            self._check(os.fstat(descriptor))
            yield descriptor
        finally:
            os.close(descriptor)

    def _why_not(self, error: OSError) -> str:
        if error.errno == errno.ENOENT and not os.fstat(self._folder).st_nlink:
            return "the file root was removed, and one that took its place is another folder; restart the daemon"
        return _WHY.get(error.errno or 0, f"it cannot be opened: {error.strerror}")

    def _check(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise FileRefused("it is not a plain file")
        if status.st_nlink != 1:
            names = f"it has {status.st_nlink} names (hard links)" if status.st_nlink else "it was deleted meanwhile"
            raise FileRefused(f"{names}: a file has this name alone")
        if status.st_size > self._file_bytes:
            raise FileRefused(f"{status.st_size} bytes are more than file_bytes allows ({self._file_bytes})")

    def _check_name(self, path: str, status: os.stat_result) -> None:
        """The one name that the file has is this one.

        Else a hard link to a file elsewhere, removed as soon as it is open, would pass for that file's only name. That
        it has one name all the while, its time of change shows at the end.
        """
        self._check(status)
        with self._open(path) as again:
            if not os.path.samestat(os.fstat(again), status):
                raise FileChanged("another file took its place while it was read")

    def _is_fit(self, status: os.stat_result) -> bool:
        try:
            self._check(status)
        except FileRefused:
            return False
        return True


def _unusable(where: str, error: OSError) -> FileRootError:
    return FileRootError(f"{where}: {error.strerror}; name a folder that the daemon may read")


def _fingerprint(status: os.stat_result) -> Fingerprint:
    return Fingerprint(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _settled(descriptor: int) -> os.stat_result:
    """The file's status once its time of change is past.

    The kernel's clock for these moves in ticks: a write in the tick of the last one would leave no trace in the times.

    Raises:
        FileChanged: it is written to in every tick.
    """
    patience = time.monotonic() + _SETTLES_S
    while True:
        late = time.monotonic() > patience  # asked first: a thread that was kept waiting looks once more
        status = os.fstat(descriptor)
        if not 0 <= status.st_ctime_ns - time.clock_gettime_ns(_REALTIME_COARSE) < _TICK_NS:
            return status  # past; or far in the future, where the clock was set back: then the next differs, too
        if late:
            raise FileChanged("it is written to all the time; append it when it is complete")
        time.sleep(_SHORT_S)


def _body(descriptor: int, size: int, go_on: Callable[[], None]) -> Body:
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    utf8 = True
    done = 0
    while piece := os.pread(descriptor, _PIECE, done):
        go_on()
        done += len(piece)
        if done > size:
            break
        digest.update(piece)
        utf8 = utf8 and _decodes(decoder, piece)
    if done != size:
        raise FileChanged("it grows or shrinks while it is read; append it when it is complete")
    return Body(size, digest.hexdigest(), utf8=utf8 and _decodes(decoder, b"", final=True))


def _decodes(decoder: codecs.IncrementalDecoder, piece: bytes, *, final: bool = False) -> bool:
    try:
        decoder.decode(piece, final)
    except UnicodeDecodeError:
        return False
    return True


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    pieces = []
    while length and (piece := os.pread(descriptor, length, offset)):
        pieces.append(piece)
        length -= len(piece)
        offset += len(piece)
    if length:
        raise FileChanged("it ends early")
    return b"".join(pieces)


class _Job(NamedTuple):
    future: "asyncio.Future[Any]"
    deadline: float
    work: Callable[[Callable[[], None]], Any]


class FilePool:
    """Implements `core.outputstore.Files`: a few threads beside the loop that read files of the root.

    Slices have a thread of their own, so that whoever reads one does not wait behind whole files.

    Args:
        root: The folder.
        settings: `file_threads`, `file_queue`, `storage_s`.
        counters: What is counted.
    """

    def __init__(self, root: FileRoot, settings: Settings, counters: Counters) -> None:
        self._root = root
        self._settings = settings
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._deadlines = Deadlines(settings.storage_s, self._give_up)
        self._whole: SimpleQueue[_Job | None] = SimpleQueue()
        self._slices: SimpleQueue[_Job | None] = SimpleQueue()
        self._closing = False
        self.waiting = 0  # files that are asked for and not done with
        # Not threads of an executor: those hold up the end of the process, and a file may hang.
        self._queues = [self._slices, *[self._whole] * settings.file_threads]  # a thread each
        for number, queue in enumerate(self._queues):
            threading.Thread(target=self._run, args=[queue], name=f"files-{number}", daemon=True).start()

    async def examine(self, path: str) -> tuple[Body, Fingerprint]:
        """See `core.outputstore.Files`."""
        body, fingerprint = await self._do(self._whole, lambda go_on: self._root.examine(path, go_on))
        self._counters.file_bytes_read += body.size
        return body, fingerprint

    async def read(self, path: str, fingerprint: Fingerprint, offset: int, length: int) -> bytes:
        """See `core.outputstore.Files`."""
        data = await self._do(self._slices, lambda _: self._root.read(path, fingerprint, offset, length))
        self._counters.file_bytes_read += len(data)
        return data

    def close(self) -> None:
        """Gives up what waits; what is being read ends at its next piece."""
        self._closing = True
        self._deadlines.close()
        for queue in self._queues:
            queue.put(None)

    async def _do(self, queue: "SimpleQueue[_Job | None]", work: Callable[[Callable[[], None]], T]) -> T:
        if self.waiting >= self._settings.file_queue:
            raise overloaded("too many files wait to be read", self._settings.retry_after_ms)
        future: asyncio.Future[T] = self._loop.create_future()
        self.waiting += 1
        queue.put(_Job(future, time.monotonic() + self._settings.storage_s, work))
        self._deadlines.expect(future, self.waiting)
        return await future

    def _run(self, queue: "SimpleQueue[_Job | None]") -> None:
        """A thread's life."""
        while (job := queue.get()) is not None:
            result = self._outcome(job)
            with contextlib.suppress(RuntimeError):  # the loop has ended, and whoever waited with it
                self._loop.call_soon_threadsafe(self._finish, job.future, result)

    def _outcome(self, job: _Job) -> Any:
        def go_on() -> None:
            if self._closing or job.future.done() or time.monotonic() > job.deadline:
                raise self._too_slow()  # or nobody waits: then nobody is told

        try:
            go_on()
            return job.work(go_on)
        except (FileRefused, FileChanged, RpcError) as error:
            return error
        except OSError as error:
            log.warning("a file below the file root cannot be read: %s", error.strerror)
            return unavailable(f"the file cannot be read now: {error.strerror}")
        except Exception as error:
            log.exception("a defect in a thread that reads files")
            return error

    def _finish(self, future: "asyncio.Future[Any]", result: object) -> None:
        self.waiting -= 1
        resolve(future, result)

    def _give_up(self, future: "asyncio.Future[Any]") -> None:
        self._counters.storage_deadlines += 1
        resolve(future, self._too_slow())

    def _too_slow(self) -> RpcError:
        return RpcError(
            ErrorKind.DEADLINE_EXCEEDED,
            f"the file was not read within {self._settings.storage_s:g} s; nothing was done",
        )
