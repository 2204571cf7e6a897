"""As in a container: process 1 reaps zombies of others, signals arrive, the exit code is the daemon's; it is found."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from carserver.client.finding import is_held
from carserver.stores.folder import StateFolder
from tests.fault.container import children
from tests.fault.processes import command, environment

UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", *([] if os.geteuid() == 0 else ["--map-root-user"])]
WAIT_S = 20.0

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    try:
        subprocess.run([*UNSHARE, "true"], check=True, capture_output=True, timeout=WAIT_S)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no process namespace can be made here: {error}")


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command as process 1 of a namespace of its own."""
    started: list[subprocess.Popen[str]] = []

    def start_one(*arguments: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [*UNSHARE, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def listening(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().startswith("listening on ws://")


def until_children(parent: int, count: int) -> list[int]:
    deadline = time.monotonic() + WAIT_S
    while len(found := children(parent)) != count:
        assert time.monotonic() < deadline, f"{parent} has the children {found}"
        time.sleep(0.02)
    return found


def first_of(process: subprocess.Popen[str]) -> int:
    return until_children(process.pid, 1)[0]


def serve(state: Path, *arguments: str) -> list[str]:
    return command("serve", "--state-dir", str(state), "--port", "0", *arguments)


def test_an_orphan_that_ends_is_no_zombie_for_long_and_the_daemon_goes_on(start: Start, tmp_path: Path) -> None:
    until_told = tmp_path / "until-told"
    os.mkfifo(until_told)
    # The orphan's parent is a shell that ends at once; `true` is a zombie when the daemon takes the shell's place.
    leave = f'(cat "{until_told}" &); true & exec "$@"'
    process = start("sh", "-c", leave, "sh", *serve(tmp_path / "state"))
    listening(process)
    first = first_of(process)
    daemon_and_orphan = until_children(first, 2)
    with until_told.open("w"):
        pass
    (daemon,) = until_children(first, 1)
    assert daemon in daemon_and_orphan
    assert is_held(tmp_path / "state")
    os.kill(first, signal.SIGTERM)
    assert process.wait(WAIT_S) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_daemon_and_the_exit_code_is_0(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(*serve(tmp_path / "state"))
    listening(process)
    os.kill(first_of(process), number)
    _, log = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, log
    assert log.count("draining: what") == 1, "the signal came once"
    assert not (tmp_path / "state/endpoint.json").exists()


def test_a_terminals_ctrl_c_is_one_signal_not_two(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    with os.fdopen(master, "wb", buffering=0) as keyboard:
        process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *UNSHARE, *serve(tmp_path / "state")],
            env=environment(),
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(slave)
        try:
            listening(process)
            keyboard.write(b"\x03")
            _, log = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
            process.communicate()
    assert "second signal" not in log
    assert log.count("draining: what") == 1


def test_a_daemon_that_is_killed_ends_the_container_with_the_code_of_the_signal(start: Start, tmp_path: Path) -> None:
    process = start(*serve(tmp_path / "state"))
    listening(process)
    (daemon,) = until_children(first_of(process), 1)
    os.kill(daemon, signal.SIGKILL)
    assert process.wait(WAIT_S) == 128 + signal.SIGKILL


def test_a_daemon_that_cannot_start_ends_the_container_with_its_own_code(start: Start, tmp_path: Path) -> None:
    with StateFolder(tmp_path / "state"):
        process = start(*serve(tmp_path / "state"))
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "is held by" in errors


def test_the_exit_status_of_a_child_of_the_daemons_own_is_not_taken_from_it(start: Start) -> None:
    waits = (
        "import os, subprocess, sys\n"
        "from carserver.cli.firstprocess import leave_first_process\n"
        "assert os.getpid() == 1\n"
        "leave_first_process()\n"
        "assert os.getpid() != 1\n"
        "sys.exit(sum(subprocess.run(['sh', '-c', 'exit 7']).returncode for _ in range(10)))\n"
    )
    process = start(sys.executable, "-c", waits)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 70, errors


def test_a_daemon_that_listens_everywhere_tells_the_commands_a_name_that_is_not_refused(
    start: Start, tmp_path: Path
) -> None:
    process = start("unshare", "--net", *serve(tmp_path / "state", "--host", "0.0.0.0"))  # where nobody else can be
    assert process.stdout is not None
    port = process.stdout.readline().removeprefix("listening on ws://0.0.0.0:").strip()
    assert json.loads((tmp_path / "state/endpoint.json").read_bytes())["url"] == f"ws://127.0.0.1:{port}"
