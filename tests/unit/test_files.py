"""The file root: hostile shapes, files that change, a race of ten thousand swaps, and the threads that read."""

import asyncio
import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.outputs import Body, Fingerprint
from carserver.core.outputstore import FileChanged, FileRefused
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.stores import files
from carserver.stores.files import FilePool, FileRoot, FileRootError

SECRET = b"what lies outside of the root\n"
MEANT = b"what was appended, exactly so\n"
SWAPS = 10_000


def go_on() -> None:
    """Somebody still waits."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A root with a file `d/f`, beside a folder that is not in it."""
    (tmp_path / "root/d").mkdir(parents=True)
    (tmp_path / "root/d/f").write_bytes(MEANT)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/f").write_bytes(SECRET)
    return tmp_path / "root"


@pytest.fixture
def root(folder: Path) -> Iterator[FileRoot]:
    root = FileRoot(folder, 1_000_000)
    yield root
    root.close()


def test_what_is_examined_is_the_size_the_digest_and_whether_it_is_text(root: FileRoot, folder: Path) -> None:
    body, fingerprint = root.examine("d/f", go_on)
    status = (folder / "d/f").stat()
    assert body == Body(len(MEANT), hashlib.sha256(MEANT).hexdigest(), utf8=True)
    assert fingerprint == Fingerprint(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )
    assert root.read("d/f", fingerprint, 5, 8) == MEANT[5:13]
    assert root.read("./d//f", fingerprint, 20, 1000) == MEANT[20:]
    assert root.read("d/f", fingerprint, len(MEANT), 10) == b""


@pytest.mark.parametrize(
    ("content", "utf8"),
    [
        (b"", True),
        ("é".encode() * 200_000, True),
        (b"x" + "é".encode() * 200_000, True),  # one is split between two pieces
        ("é".encode() * 200_000 + b"\xc3", False),
        (b"\xff" + b"x" * 300_000, False),
        (b"x" * 300_000 + b"\xed\xa0\x80", False),
    ],
)
def test_a_file_is_text_if_the_whole_of_it_is_utf8(root: FileRoot, folder: Path, content: bytes, utf8: bool) -> None:
    (folder / "f").write_bytes(content)
    body, fingerprint = root.examine("f", go_on)
    assert body == Body(len(content), hashlib.sha256(content).hexdigest(), utf8)
    assert root.read("f", fingerprint, 0, 10**9) == content


# What is no plain file below the root.


def _device(folder: Path) -> None:
    try:
        os.mknod(folder / "x", 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes a device, and not in every container")


def _unreadable(folder: Path) -> None:
    (folder / "x").write_bytes(MEANT)
    (folder / "x").chmod(0)
    if os.geteuid() == 0:
        pytest.skip("root reads everything")


def _socket(folder: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind("x")
    finally:
        os.chdir(here)


SHAPES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "above": ("../outside/f", lambda _: None, "leads upwards"),
    "above and back": ("d/../d/f", lambda _: None, "leads upwards"),
    "above by a folder's link": ("x/f", lambda root: (root / "x").symlink_to("../outside"), "symbolic link"),
    "absolute": ("/etc/passwd", lambda _: None, "leads out"),
    "absolute, below the root": ("{root}/d/f", lambda _: None, "leads out"),
    "a link to outside": ("x", lambda root: (root / "x").symlink_to(root.parent / "outside/f"), "symbolic link"),
    "a link to inside": ("x", lambda root: (root / "x").symlink_to("d/f"), "symbolic link"),
    "a link to inside, on the way": ("x/f", lambda root: (root / "x").symlink_to("d"), "symbolic link"),
    "a link to a descriptor": ("x", lambda root: (root / "x").symlink_to("/proc/self/fd/0"), "symbolic link"),
    "a circle of links": ("x", lambda root: (root / "x").symlink_to("x"), "symbolic link"),
    "a hard link to outside": ("x", lambda root: (root / "x").hardlink_to(root.parent / "outside/f"), "2 names"),
    "a hard link to inside": ("d/f", lambda root: (root / "x").hardlink_to(root / "d/f"), "2 names"),
    "a FIFO": ("x", lambda root: os.mkfifo(root / "x"), "not a plain file"),
    "a device": ("x", _device, "not a plain file"),
    "a socket": ("x", _socket, "not a plain file"),
    "a folder": ("d", lambda _: None, "not a plain file"),
    "the root": (".", lambda _: None, "not a plain file"),
    "a file as a folder": ("d/f/", lambda _: None, "should be a folder"),
    "nothing": ("d/g", lambda _: None, "no such file"),
    "not readable": ("x", _unreadable, "may not read"),
    "too large": ("x", lambda root: (root / "x").write_bytes(bytes(1_000_001)), "file_bytes"),
    "a path with NUL": ("d/f\0/x", lambda _: None, "NUL"),
    "a path too long": ("d/" * 4_000 + "f", lambda _: None, "longer than"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_hostile_shape_is_taken_or_read(root: FileRoot, folder: Path, shape: str) -> None:
    path, make, why = SHAPES[shape]
    path = path.replace("{root}", str(folder))
    _, fingerprint = root.examine("d/f", go_on)
    make(folder)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileRefused, match=why):
        root.examine(path, go_on)
    with pytest.raises(FileRefused, match=why):
        root.read(path, fingerprint, 0, 10)
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors


# What changed.


def _overwrite(file: Path, content: bytes, at: int = 0) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(content)


def _replace(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(MEANT)
    other.rename(file)


def _to_link(file: Path) -> None:
    moved = file.with_name("moved")
    file.rename(moved)
    file.symlink_to(moved)


CHANGES: dict[str, Callable[[Path], object]] = {
    "written in place": lambda file: _overwrite(file, SECRET[: len(MEANT)]),
    "longer": lambda file: _overwrite(file, b"more", at=len(MEANT)),
    "shorter": lambda file: os.truncate(file, 3),
    "touched": os.utime,
    "touched back": lambda file: os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns)),
    "another": _replace,
    "gone": lambda file: file.unlink(),
    "a link to itself elsewhere": _to_link,
    "linked": lambda file: file.with_name("second").hardlink_to(file),
    "its folder moved": lambda file: file.parent.rename(file.parent.with_name("e")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_since_is_not_read(root: FileRoot, folder: Path, change: str) -> None:
    _, fingerprint = root.examine("d/f", go_on)
    assert root.read("d/f", fingerprint, 0, 100) == MEANT
    CHANGES[change](folder / "d/f")
    with pytest.raises((FileRefused, FileChanged)):
        root.read("d/f", fingerprint, 0, 10)


@pytest.mark.parametrize("change", ["written in place", "longer", "shorter", "touched", "linked"])
@pytest.mark.parametrize("use", ["examined", "read"])
def test_a_file_that_changes_while_it_is_read_is_not_served(
    root: FileRoot, folder: Path, monkeypatch: pytest.MonkeyPatch, change: str, use: str
) -> None:
    _, fingerprint = root.examine("d/f", go_on)
    really = os.pread

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        monkeypatch.undo()
        CHANGES[change](folder / "d/f")
        return really(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(FileChanged):
        root.examine("d/f", go_on) if use == "examined" else root.read("d/f", fingerprint, 0, 100)


def test_a_change_in_the_same_tick_of_the_clock_shows(root: FileRoot, folder: Path) -> None:
    file = folder / "d/f"
    for _ in range(50):
        _overwrite(file, MEANT)
        _, fingerprint = root.examine("d/f", go_on)
        _overwrite(file, SECRET[: len(MEANT)])
        with pytest.raises(FileChanged):
            root.read("d/f", fingerprint, 0, 10)


def test_a_file_of_this_tick_is_examined_in_the_next(
    root: FileRoot, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_ns = (folder / "d/f").stat().st_ctime_ns
    clock = [changed_ns + 1, changed_ns, changed_ns - 1, changed_ns - 10_000_000]
    monkeypatch.setattr(time, "clock_gettime_ns", lambda _: clock.pop())
    monkeypatch.setattr(files, "_SETTLES_S", 3_600.0)
    assert root.examine("d/f", go_on)[1].ctime_ns == changed_ns
    assert clock == []
    clock.append(changed_ns - 3_600_000_000_000)  # the clock was set back: nothing to wait for
    root.examine("d/f", go_on)


def test_who_was_kept_waiting_for_the_next_tick_looks_once_more(
    root: FileRoot, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_ns = (folder / "d/f").stat().st_ctime_ns
    clock = [changed_ns + 1, changed_ns]
    monkeypatch.setattr(time, "clock_gettime_ns", lambda _: clock.pop())
    monkeypatch.setattr(time, "monotonic", lambda: 0.0 if len(clock) == 2 else 3_600.0)
    assert root.examine("d/f", go_on)[1].ctime_ns == changed_ns


def test_a_file_that_is_written_to_in_every_tick_holds_nobody(
    root: FileRoot, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_ns = (folder / "d/f").stat().st_ctime_ns
    monkeypatch.setattr(time, "clock_gettime_ns", lambda _: changed_ns)
    monkeypatch.setattr(files, "_SETTLES_S", 0.01)
    with pytest.raises(FileChanged, match="all the time"):
        root.examine("d/f", go_on)


# The race.

_SWAPPER = """
import os, sys
os.chdir(sys.argv[1])
for turn in range(int(sys.argv[2])):
    os.rename("d", "parked")
    if turn % 2:
        os.symlink("../outside", "d")
        os.unlink("d")
    else:
        os.rename("other", "d")
        os.rename("d", "other")
    os.rename("parked", "d")
    os.rename("g", "kept")
    shape = turn % 3
    if shape == 0:
        os.symlink("../outside/f", "g")
    elif shape == 1:
        os.link("../outside/f", "g")
    else:
        os.mkfifo("g")
    os.unlink("g")
    os.rename("kept", "g")
"""


def test_of_a_path_that_is_swapped_ten_thousand_times_nothing_is_served_that_was_not_meant(
    root: FileRoot, folder: Path
) -> None:
    (folder / "g").write_bytes(MEANT)
    (folder / "other").mkdir()
    (folder / "other/f").write_bytes(SECRET[::-1])
    _, fingerprint = root.examine("d/f", go_on)
    meant, other = root.examine("g", go_on)[0], root.examine("other/f", go_on)[0]
    attempts: list[tuple[Callable[[], object], tuple[object, ...]]] = [
        (lambda: root.read("d/f", fingerprint, 0, 100), (MEANT,)),
        (lambda: root.examine("d/f", go_on)[0], (meant, other)),  # either is there for a moment, and below the root
        (lambda: root.examine("g", go_on)[0], (meant,)),
    ]
    tries = served = 0
    with subprocess.Popen([sys.executable, "-c", _SWAPPER, str(folder), str(SWAPS)]) as swapper:
        while swapper.poll() is None:
            for attempt, allowed in attempts:
                tries += 1
                try:
                    found = attempt()
                except (FileRefused, FileChanged):
                    continue
                served += 1
                assert found in allowed
    print(f"{served} of {tries} served during {SWAPS} swaps")
    assert swapper.returncode == 0
    assert root.read("d/f", fingerprint, 0, 100) == MEANT  # and what was meant still is
    assert root.examine("g", go_on)[0] == meant


# The folder itself.


def test_a_root_is_a_folder_that_is_there(tmp_path: Path, folder: Path) -> None:
    for path in (tmp_path / "nowhere", folder / "d/f"):
        with pytest.raises(FileRootError, match="--file-root"):
            FileRoot(path, 1)


def test_a_root_that_holds_the_daemons_own_files_is_refused(folder: Path) -> None:
    for apart in (folder, folder / "d", folder / "d/../d"):
        with pytest.raises(FileRootError, match="secrets"):
            FileRoot(folder, 1, (apart,))
    FileRoot(folder, 1, (folder.parent, folder.parent / "outside")).close()


def test_without_openat2_there_is_no_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(files, "_openat2", missing)
    with pytest.raises(FileRootError, match=r"Linux 5\.6") as caught:
        FileRoot(folder, 1)
    assert "\n" not in str(caught.value)


def test_a_root_that_was_removed_is_said_to_be_that_even_where_another_took_its_place(
    root: FileRoot, folder: Path
) -> None:
    folder.rename(folder.with_name("elsewhere"))
    assert root.examine("d/f", go_on)[0].size == len(MEANT), "it is that folder, wherever it is"
    shutil.rmtree(folder.with_name("elsewhere"))
    (folder / "d").mkdir(parents=True)
    (folder / "d/f").write_bytes(MEANT)
    with pytest.raises(FileRefused, match="restart the daemon"):
        root.examine("d/f", go_on)


def test_a_root_that_may_not_be_read_is_said_to_be_that(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files, "_openat2", closed)
    with pytest.raises(FileRootError, match="Permission denied; name a folder that the daemon may read"):
        FileRoot(folder, 1)


def test_what_is_the_machines_fault_is_not_said_of_the_path(root: FileRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(files, "_openat2", full)
    with pytest.raises(OSError, match="Too many"):
        root.examine("d/f", go_on)


# The threads.


class _SlowRoot:
    """A root whose files take as long as the test wants."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.begun = self.done = 0

    def examine(self, _: str, go_on: Callable[[], None]) -> tuple[Body, Fingerprint]:
        self.begun += 1
        self.may_end.wait(20)
        go_on()
        self.done += 1
        return Body(0, "", utf8=True), Fingerprint(0, 0, 0, 0, 0)

    def read(self, _: str, fingerprint: Fingerprint, offset: int, length: int) -> bytes:
        return MEANT[offset : offset + length]


async def refusal(awaitable: object) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await awaitable  # type: ignore[misc]  # an awaitable
    return caught.value


async def test_more_files_than_may_wait_are_overloaded_and_the_others_are_read() -> None:
    slow = _SlowRoot()
    pool = FilePool(slow, Settings(file_threads=1, file_queue=3), Counters())  # type: ignore[arg-type]
    waiting = [asyncio.create_task(pool.examine("f")) for _ in range(3)]
    await asyncio.sleep(0)
    assert pool.waiting == 3
    assert (await refusal(pool.examine("f"))).kind is ErrorKind.OVERLOADED
    slow.may_end.set()
    await asyncio.gather(*waiting)
    assert pool.waiting == 0
    await pool.examine("f")
    pool.close()


async def test_a_file_that_takes_too_long_is_given_up_and_those_behind_it_are_never_begun() -> None:
    slow, counters = _SlowRoot(), Counters()
    pool = FilePool(slow, Settings(file_threads=1, storage_s=0.05), counters)  # type: ignore[arg-type]
    waiting = [asyncio.create_task(pool.examine("f")) for _ in range(3)]
    assert [(await refusal(task)).kind for task in waiting] == [ErrorKind.DEADLINE_EXCEEDED] * 3
    assert counters.storage_deadlines == 3
    slow.may_end.set()
    while pool.waiting:  # noqa: ASYNC110 - a gauge
        await asyncio.sleep(0.001)  # the test's own timeout bounds it
    assert slow.begun <= 1
    pool.close()


async def test_a_slice_does_not_wait_behind_whole_files() -> None:
    slow = _SlowRoot()
    pool = FilePool(slow, Settings(file_threads=1), Counters())  # type: ignore[arg-type]
    whole = [asyncio.create_task(pool.examine("f")) for _ in range(3)]
    await asyncio.sleep(0)
    assert await pool.read("f", Fingerprint(0, 0, 0, 0, 0), 5, 8) == MEANT[5:13]
    assert pool.waiting == 3
    slow.may_end.set()
    await asyncio.gather(*whole)
    pool.close()


async def test_of_what_nobody_waits_for_any_more_no_more_is_read() -> None:
    slow = _SlowRoot()
    pool = FilePool(slow, Settings(file_threads=1), Counters())  # type: ignore[arg-type]
    gone = [asyncio.create_task(pool.examine("f")) for _ in range(3)]
    while not slow.begun:  # noqa: ASYNC110 - of a thread
        await asyncio.sleep(0.001)  # the test's own timeout bounds it
    for task in gone:
        task.cancel()
    await asyncio.wait(gone)
    slow.may_end.set()
    await pool.examine("f")
    assert (slow.begun, slow.done, pool.waiting) == (2, 1, 0)
    pool.close()


async def test_what_cannot_be_read_is_unavailable_and_a_defect_is_raised(folder: Path, root: FileRoot) -> None:
    counters = Counters()
    pool = FilePool(root, Settings(), counters)
    body, fingerprint = await pool.examine("d/f")
    assert await pool.read("d/f", fingerprint, 0, 4) == MEANT[:4]
    assert counters.file_bytes_read == body.size + 4
    with pytest.raises(FileRefused):
        await pool.examine("d")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_openat2", _failing)
        assert (await refusal(pool.examine("d/f"))).kind is ErrorKind.UNAVAILABLE
    pool.close()


def _failing(*_: object) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))
