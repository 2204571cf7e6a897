"""One daemon per state folder, in a race too; a taken port; a stale `endpoint.json`."""

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from carserver.client.finding import is_held
from tests.daemon import Daemon
from tests.fault.processes import carserver, serve
from tests.peer import peer

RACERS, ROUNDS = 8, 2


@contextmanager
def taken_port() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken


def endpoint(daemon: Daemon) -> dict[str, object]:
    content: dict[str, object] = json.loads((daemon.state / "endpoint.json").read_bytes())
    return content


def test_a_second_daemon_says_who_holds_the_folder_and_exits_1_and_the_first_goes_on(daemon: Daemon) -> None:
    second = carserver("serve", "--state-dir", str(daemon.state), "--port", "0")
    assert (second.returncode, second.stdout) == (1, "")
    (line,) = second.stderr.splitlines()
    assert f"{daemon.state} is held by process {daemon.pid} at {daemon.url}: " in line
    assert endpoint(daemon)["pid"] == daemon.pid
    assert carserver("health", "--state-dir", str(daemon.state)).returncode == 0


def test_of_eight_daemons_started_at_once_exactly_one_listens_each_time_the_last_was_killed(tmp_path: Path) -> None:
    state = tmp_path / "state"  # which the first eight also race to make
    for _ in range(ROUNDS):
        racers = [serve(state) for _ in range(RACERS)]
        try:
            winners: list[subprocess.Popen[str]] = []
            losers: list[subprocess.Popen[str]] = []
            for racer in racers:
                assert racer.stdout is not None
                said = racer.stdout.readline()  # ends when it listens, or exits
                (winners if said.startswith("listening on ws://") else losers).append(racer)
            assert len(winners) == 1, [racer.communicate() for racer in losers]
            for loser in losers:
                _, errors = loser.communicate()
                (line,) = errors.splitlines()
                assert loser.returncode == 1
                assert f"{state} is held by " in line
            assert json.loads((state / "endpoint.json").read_bytes())["pid"] == winners[0].pid
            assert winners[0].poll() is None
        finally:
            end_all(racers)


def end_all(racers: list[subprocess.Popen[str]]) -> None:
    for racer in racers:
        racer.kill()
        racer.wait()
        for pipe in (racer.stdout, racer.stderr):
            if pipe is not None:
                pipe.close()


async def test_after_a_kill_the_folder_is_free_at_once_and_the_next_daemon_says_where_it_is(daemon: Daemon) -> None:
    before, old_pid = endpoint(daemon), daemon.pid
    async with peer(daemon) as client:
        run = await client.create()
        daemon.kill()
    assert endpoint(daemon) == before  # nobody was there to remove it
    assert (daemon.state / "lock").read_text() == f"{old_pid}\n"
    daemon.start()
    after = endpoint(daemon)
    assert set(after) == {"url", "pid", "boot_id"}
    assert (after["url"], after["pid"]) == (daemon.url, daemon.pid)
    async with peer(daemon) as client:
        assert after["boot_id"] == (await client.call("server.status"))["boot_id"] != before["boot_id"]
        assert (await client.call("runs.get", {"run_id": run["id"]}))["epoch"] == run["epoch"]


def test_a_taken_port_is_one_clear_line_and_exit_1_and_the_folder_is_free_again(tmp_path: Path) -> None:
    with taken_port() as taken:
        port = taken.getsockname()[1]
        refused = carserver("serve", "--state-dir", str(tmp_path / "state"), "--port", str(port))
    assert (refused.returncode, refused.stdout) == (1, "")
    (line,) = refused.stderr.splitlines()
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line
    assert "--port" in line
    assert (tmp_path / "state" / "lock").read_bytes() == b""  # given back, not only dropped by the process's end
    assert not is_held(tmp_path / "state")


def test_the_port_of_a_daemon_on_another_folder_is_taken_too(daemon: Daemon) -> None:
    port = daemon.url.rpartition(":")[2]
    other = carserver("serve", "--state-dir", str(daemon.state.with_name("other")), "--port", port)
    assert (other.returncode, other.stdout) == (1, "")
    assert "Address already in use" in other.stderr
    assert carserver("health", "--state-dir", str(daemon.state)).returncode == 0


@pytest.mark.parametrize("arguments", [("health",), ("call", "server.ping")], ids=["health", "call"])
def test_the_endpoint_that_a_killed_daemon_left_misleads_no_command_to_whoever_listens_there_now(
    daemon: Daemon, arguments: tuple[str, ...]
) -> None:
    port = int(daemon.url.rpartition(":")[2])
    daemon.kill()
    with socket.create_server(("127.0.0.1", port), reuse_port=False) as stranger:
        done = carserver(*arguments, "--state-dir", str(daemon.state))
        assert (done.returncode, done.stdout) == (69, "")
        (line,) = done.stderr.splitlines()
        assert "is not running" in line
        stranger.setblocking(False)
        with pytest.raises(BlockingIOError):
            stranger.accept()  # nobody has called, let alone shown a token
    daemon.start()
    assert endpoint(daemon)["pid"] == daemon.pid
    assert carserver("health", "--state-dir", str(daemon.state)).stdout == "ok\n"


def test_a_daemon_that_has_taken_the_folder_removes_a_stale_endpoint_before_it_can_fail(daemon: Daemon) -> None:
    daemon.kill()
    assert (daemon.state / "endpoint.json").exists()
    with taken_port() as taken:
        refused = carserver("serve", "--state-dir", str(daemon.state), "--port", str(taken.getsockname()[1]))
    assert refused.returncode == 1
    assert not (daemon.state / "endpoint.json").exists()


def test_a_clean_exit_takes_the_endpoint_back_and_health_says_unreachable(daemon: Daemon) -> None:
    assert endpoint(daemon)["pid"] == daemon.pid
    assert daemon.terminate() == 0
    assert not (daemon.state / "endpoint.json").exists()
    assert (daemon.state / "lock").read_bytes() == b""
    assert carserver("health", "--state-dir", str(daemon.state)).returncode == 69
