"""The file of the Unix socket: when it is made, when it goes, and what is left alone."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon, NotStarted
from tests.lines import is_there, unix_peer


@pytest.fixture
def path() -> Iterator[Path]:
    """Where a Unix socket may be: its name must be short."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "socket"


def bound(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Another's socket there."""
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(os.fspath(path))
    return sock


async def test_what_a_daemon_that_was_killed_left_is_removed_and_the_file_goes_at_exit(
    start: StartDaemon, path: Path
) -> None:
    daemon = start(unix=path)
    daemon.kill()
    assert is_there(path)
    daemon.start()
    async with unix_peer(path) as client:
        assert (await client.call("server.ping"))["now_ms"]
    assert daemon.terminate() == 0
    assert not is_there(path)
    daemon.start()


def listens(path: Path) -> socket.socket:
    sock = bound(path)
    sock.listen()
    return sock


def listens_and_is_full(path: Path) -> socket.socket:
    sock = bound(path)
    sock.listen(0)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.setblocking(False)
            waiting.connect_ex(os.fspath(path))
    return sock


def leads_elsewhere(path: Path) -> socket.socket:
    other = path.with_name("other")
    path.symlink_to(other)
    return bound(other)


THERE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a daemon": (listens, "somebody listens there already; stop that daemon, or choose another path"),
    "a busy one": (listens_and_is_full, "somebody listens there already; stop that daemon, or choose another path"),
    "a file": (Path.touch, "there is something there that is no socket; remove it, or choose another path"),
    "a folder": (Path.mkdir, "there is something there that is no socket; remove it, or choose another path"),
    "a link": (leads_elsewhere, "there is something there that is no socket; remove it, or choose another path"),
    "datagrams": (
        lambda path: bound(path, socket.SOCK_DGRAM),
        "there is a socket there: Protocol wrong type for socket; choose another path",
    ),
}


@pytest.mark.parametrize(("make", "words"), THERE.values(), ids=THERE.keys())
def test_what_somebody_else_has_there_is_left_alone_and_named_in_one_line(
    make: Callable[[Path], Any], words: str, tmp_path: Path, path: Path
) -> None:
    kept = make(path)
    before = path.lstat().st_ino
    with pytest.raises(NotStarted) as refused:
        Daemon(tmp_path / "state", unix=path).start()
    assert str(refused.value) == f"exit 1: carserver: --unix {path}: {words}\n"
    assert path.lstat().st_ino == before
    if kept is not None:
        kept.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 120, "a socket's path has at most 107 bytes; choose a shorter one"),
        ("no/such/folder", "cannot listen there: No such file or directory; choose another path"),
    ],
    ids=["too long", "no folder"],
)
def test_a_path_that_can_have_no_socket_is_refused_in_one_line(
    name: str, words: str, tmp_path: Path, path: Path
) -> None:
    with pytest.raises(NotStarted) as refused:
        Daemon(tmp_path / "state", unix=path.parent / name).start()
    assert str(refused.value) == f"exit 1: carserver: --unix {path.parent / name}: {words}\n"


async def test_a_second_daemon_leaves_the_socket_of_the_first_alone(start: StartDaemon, path: Path) -> None:
    first = start(unix=path)
    with pytest.raises(NotStarted, match="somebody listens there already"):
        Daemon(first.state.with_name("second"), unix=path).start()
    async with unix_peer(path) as client:
        assert (await client.call("server.ping"))["now_ms"]


def test_at_exit_the_file_of_another_at_the_same_path_is_left_alone(start: StartDaemon, path: Path) -> None:
    daemon = start(unix=path)
    path.unlink()
    with contextlib.closing(bound(path)):
        assert daemon.terminate() == 0
        assert path.is_socket()
    daemon.start()


async def test_a_flag_names_the_socket_too_and_the_log_has_it(start: StartDaemon, path: Path) -> None:
    daemon = start("--unix", os.fspath(path))
    async with unix_peer(path) as client:
        assert (await client.call("server.ping"))["now_ms"]
    assert f"listening on the Unix socket {path}" in daemon.log
