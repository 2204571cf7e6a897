"""What the service manager is told (sd_notify(3)): ready when it listens, stopping when it drains."""

import contextlib
import logging
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from carserver.front.notify import READY, STOPPING, notify
from tests.conftest import StartDaemon

TOLD_S = 10.0


@contextlib.contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """The manager's end of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0", 1))
        sock.settimeout(TOLD_S)
        yield sock


@pytest.fixture(params=["path", "abstract"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with tempfile.TemporaryDirectory(prefix="notify-") as folder:  # short: a socket's path has 107 characters
        address = f"{folder}/socket" if request.param == "path" else f"@{folder}"
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        with manager(address) as sock:
            yield sock


def test_a_daemon_says_when_it_is_ready_and_where_and_when_it_stops(told: socket.socket, start: StartDaemon) -> None:
    daemon = start()
    assert told.recv(4096).decode() == f"READY=1\nSTATUS=listening on {daemon.url}"
    assert daemon.get("/readyz") == "ok\n"
    assert daemon.terminate() == 0
    assert told.recv(4096).decode() == "STOPPING=1\nSTATUS=draining"
    told.setblocking(False)
    with pytest.raises(BlockingIOError):
        told.recv(4096)


def test_a_manager_that_has_gone_is_a_warning_and_the_daemon_serves(
    monkeypatch: pytest.MonkeyPatch, start: StartDaemon, tmp_path: Path
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/socket")
    daemon = start()
    assert daemon.get("/readyz") == "ok\n"
    assert "cannot be told READY=1: No such file or directory" in daemon.log


def test_a_manager_that_does_not_read_is_not_waited_for(told: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(10_000):  # more than any socket holds; the test's timeout would end one that waits
            notify(READY, "x" * 1_000)
            if caplog.records:
                break
    assert "cannot be told READY=1" in caplog.text


def test_without_a_manager_nothing_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    with caplog.at_level(logging.WARNING):
        notify(STOPPING, "draining")
    assert not caplog.records
