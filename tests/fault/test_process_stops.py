"""How process tools are stopped, and what stops with what: nothing of a tool may live on, whatever it does."""

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import uvloop

from carserver.core.execution import Execution
from carserver.hosts import process
from carserver.hosts.packets import EXITED, GONE, STARTED, TAKEN, packet
from carserver.hosts.running import Running
from tests.fault.processes import ROOT, environment
from tests.fault.tooling import SHORT, WAIT_S, Feed, Rig, children, descriptors, lives, marked, pids, rig, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process tools need Linux")

# How a command leaves a process behind, and says so when it is there.
LEAVES = {
    "a child": "(echo left; exec sleep 1000) &",
    "many children": "for i in $(seq 50); do sleep 1000 & done; echo left",
    "a child of another session": "setsid sh -c 'echo left; exec sleep 1000' &",
    "an orphan of another session": "(setsid sh -c 'echo left; exec sleep 1000' &)",
    "a child that ignores TERM": "(trap '' TERM HUP INT; echo left; while true; do sleep 1000; done) &",
    "a child that is stopped": "sh -c 'echo left; kill -STOP $$' &",
    "a child without output": "sleep 1000 >/dev/null 2>&1 & echo left",
    "a child with children": "(sh -c 'sleep 1000 & setsid sleep 1000 & wait' & sleep 1000 & echo left; wait) &",
    "a child with an odd name": "cp $(command -v sleep) ') R 1 1 (\n'; './) R 1 1 (\n' 1000 & echo left",
}
# Three at a time, each of a session of its own, that ignore TERM, fork and exit as fast as they can.
CHAIN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(2):
    if os.fork() == 0:
        break
os.write(1, b"left\\n")
for _ in range(20_000):  # then it stays: whoever does not kill it must not fill the machine with it
    if os.fork(): os._exit(0)
    os.setsid()
time.sleep(1000)
"""


@pytest.mark.parametrize("way", LEAVES)
async def test_what_a_command_leaves_behind_is_killed_when_it_has_exited(way: str, tmp_path: Path) -> None:
    async with rig() as pool:
        spec = pool.sh(f"{LEAVES[way]}\nwhile [ ! -e exit ]; do sleep 0.01; done; exit 5")
        feed, _ = pool.start(msgspec.structs.replace(spec, cwd=str(tmp_path)))
        await feed.until_text("left")
        (tmp_path / "exit").touch()
        await feed.until_told("last", "gone")
        assert feed.error == "exit code 5"
        assert pool.counters.tool_processes_killed >= 1


@pytest.mark.parametrize("way", LEAVES)
async def test_a_stop_ends_all_of_it(way: str, tmp_path: Path) -> None:
    async with rig() as pool:
        spec = pool.sh(f"{LEAVES[way]}\nwhile true; do sleep 1000; done")
        feed, execution = pool.start(msgspec.structs.replace(spec, cwd=str(tmp_path)))
        await feed.until_text("left")
        await stopped(feed, execution)


async def test_a_chain_that_forks_and_exits_is_killed() -> None:
    async with rig() as pool:
        feed = await pool.run(pool.python(CHAIN))
        assert feed.result["exit_code"] == 0
        assert pool.counters.tool_processes_killed >= 3
        feed, execution = pool.start(pool.python("if os.fork(): time.sleep(1000)\n" + CHAIN))
        await feed.until_text("left")
        await stopped(feed, execution)


TERMS = """
path = "command"
if os.fork() == 0:
    os.setsid()
    path = "child"
def term(*_):
    with open(path, "a") as file:
        file.write("term\\n")
signal.signal(signal.SIGTERM, term)
os.write(1, b"up\\n")
while not os.path.exists("exit"):
    time.sleep(0.01)
"""


async def test_a_stop_is_term_first_once_and_whoever_left_the_group_has_it_too(tmp_path: Path) -> None:
    patient = msgspec.structs.replace(SHORT, kill_after_s=WAIT_S)
    async with rig(patient) as pool:
        feed, execution = pool.start(msgspec.structs.replace(pool.python(TERMS), cwd=str(tmp_path)))
        await feed.until(lambda: feed.text == "up\nup\n")
        execution.stop("enough")
        await until((tmp_path / "child").exists)
        (tmp_path / "exit").touch()
        await feed.until_told("gone")
    assert (tmp_path / "command").read_text() == "term\n"
    assert (tmp_path / "child").read_text() == "term\n"


async def test_a_command_that_ends_on_term_is_gone_long_before_kill() -> None:
    patient = msgspec.structs.replace(SHORT, kill_after_s=WAIT_S)
    async with rig(patient) as pool:
        feed, execution = pool.start(pool.sh("echo up; exec sleep 1000"))
        await feed.until_text("up")
        async with asyncio.timeout(WAIT_S / 2):
            await stopped(feed, execution)
        assert pool.counters.tool_processes_killed == 0


async def test_a_command_that_waits_to_write_can_end_on_term(tmp_path: Path) -> None:
    """Its pipe is read on: else it would wait for room in it until KILL."""
    patient = msgspec.structs.replace(SHORT, kill_after_s=WAIT_S)
    write = "os.write(1, bytes(300_000) + b'end')"
    script = f"def term(*_):\n    {write}\n    os._exit(0)\nsignal.signal(signal.SIGTERM, term)\nos.write(1, b'up')\n"
    async with rig(patient) as pool:
        feed, execution = pool.start(pool.python(f"{script}while True: time.sleep(1000)"))
        await feed.until_text("up")
        async with asyncio.timeout(WAIT_S / 2):
            await stopped(feed, execution)
        assert pool.counters.tool_output_ignored_bytes == 300_003
        assert "end" not in feed.text


async def test_a_stopped_command_ends_on_term() -> None:
    patient = msgspec.structs.replace(SHORT, kill_after_s=WAIT_S)
    async with rig(patient) as pool:
        feed, execution = pool.start(pool.sh("echo up; kill -STOP $$"))
        await feed.until_text("up")
        await stopped(feed, execution)
        assert pool.counters.tool_processes_killed == 0


async def test_a_stop_at_once_ends_it_wherever_it_is() -> None:
    async with rig() as pool:
        for wait in range(30):
            feed, execution = pool.start(pool.sh("setsid sleep 1000 & exec sleep 1000"))
            for _ in range(wait):
                await asyncio.sleep(0)
            await stopped(feed, execution)


async def test_what_is_stopped_before_the_keeper_takes_it_is_never_started(tmp_path: Path) -> None:
    async with rig() as pool:
        os.kill(pool.keeper, signal.SIGSTOP)
        feed, execution = pool.start(pool.spec("touch", str(tmp_path / "started")))
        execution.stop("enough")
        os.kill(pool.keeper, signal.SIGCONT)
        await feed.until_told("gone")
        assert pool.counters.tool_processes_started == 1, "the rig's own"
    assert not (tmp_path / "started").exists()


async def test_starts_wait_while_the_keeper_does_not_listen() -> None:
    async with rig() as pool:
        keeper = pool.processes._keeper
        assert keeper is not None
        keeper._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as little as this kernel has
        os.kill(pool.keeper, signal.SIGSTOP)
        running: list[asyncio.Future[Feed]] = []
        while not pool.processes.waiting and len(running) < 500:
            running.append(asyncio.ensure_future(pool.run(pool.spec("true"))))
            await asyncio.sleep(0)
        assert pool.processes.waiting
        os.kill(pool.keeper, signal.SIGCONT)
        await asyncio.gather(*running)
        assert pool.processes.waiting == 0


async def test_a_command_that_kills_its_sub_reaper_fails_and_the_keeper_kills_the_rest() -> None:
    async with rig() as pool:
        feed, _ = pool.start(pool.sh("setsid sleep 1000 & sleep 1000 & echo up; kill -KILL $PPID; sleep 1000"))
        await feed.until_told("last", "gone")
        assert feed.error == "the process that looks after the command was killed"
        await pool.run(pool.spec("true"))
        feed, _ = pool.start(
            pool.python(f"if os.fork() == 0:\n    os.kill(os.getppid(), 9)\nelse:\n    time.sleep(9)\n{CHAIN}")
        )
        await feed.until_told("last", "gone")


async def test_a_command_that_stops_its_sub_reaper_may_survive_but_not_for_long() -> None:
    async with rig() as pool:
        pool.processes.settings = msgspec.structs.replace(SHORT, unconfirmed_s=0.2)
        feed, execution = pool.start(pool.sh("kill -STOP $PPID; setsid sleep 1000 & echo up; sleep 1000"))
        await feed.until_text("up")
        execution.stop("enough")
        await feed.until_told("survives")
        await until(lambda: pool.processes.live == 0)
        assert feed.told == ["survives"], "it is told once"


async def test_when_the_keeper_is_killed_its_handles_fail_and_the_next_one_works() -> None:
    async with rig() as pool:
        keeper = pool.keeper
        before = descriptors()
        running = [pool.start(pool.sh("setsid sleep 1000 & echo up; trap '' TERM; sleep 1000")) for _ in range(5)]
        for feed, _ in running:
            await feed.until_text("up")
        os.kill(keeper, signal.SIGKILL)
        for feed, _ in running:
            await feed.until_told("last", "gone")
            assert feed.error == "the keeper of process tools died"
        assert (await pool.run(pool.spec("true"))).result["exit_code"] == 0
        assert pool.keeper != keeper
        assert pool.counters.keepers_replaced == 1
        await until(lambda: descriptors() == before)
        await until(lambda: not children(os.getpid(), {keeper}))


def test_what_a_sub_reaper_said_last_is_heard_though_it_left_something_unread() -> None:
    """That is an error first, which the daemon's loop tells once, and never reads the socket again."""

    async def main() -> None:
        async with rig() as pool:
            feed = Feed()
            control, reaper = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            control.setblocking(False)
            (stdout, out), (stderr, err) = os.pipe(), os.pipe()
            Running(0, pool.spec("true"), "true", feed, pool.processes, (control, stdout, stderr))
            with reaper:
                for descriptor in (out, err):
                    os.close(descriptor)
                for word in (TAKEN, STARTED, EXITED):
                    reaper.send(packet(word))
                await until(lambda: bool(select.select([reaper], [], [], 0)[0]))  # KILL, for what is left
                reaper.send(packet(GONE))
            await feed.until_told("last", "gone")

    uvloop.run(asyncio.wait_for(main(), WAIT_S))


def test_a_keeper_that_is_killed_before_it_read_what_it_was_told_is_replaced_on_the_daemons_loop_too() -> None:
    """The daemon's loop tells an error of a socket once, and never reads it again."""

    async def main() -> None:
        async with rig() as pool:
            keeper = pool.keeper
            os.kill(keeper, signal.SIGSTOP)
            running = [pool.start(pool.spec("true"))[0] for _ in range(5)]
            os.kill(keeper, signal.SIGKILL)
            for feed in running:
                await feed.until_told("last", "gone")
            await until(lambda: pool.processes.live == 0 and pool.processes._keeper is None)
            await pool.run(pool.spec("true"))
            assert pool.counters.keepers_replaced == 1

    uvloop.run(asyncio.wait_for(main(), WAIT_S))


async def test_a_keeper_that_dies_again_and_again_is_started_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_FIRST_PAUSE_S", WAIT_S)
    monkeypatch.setattr(process, "_LONGEST_PAUSE_S", WAIT_S)
    async with rig() as pool:
        for _ in range(2):
            assert pool.processes.refuses() is None
            os.kill(pool.keeper, signal.SIGKILL)
            await until(lambda: pool.processes._keeper is None)
        assert "the keeper of process tools died 2 times in a row" in str(pool.processes.refuses())
        monkeypatch.setattr(process, "_FIRST_PAUSE_S", 0.0)
        assert pool.processes.refuses() is None
        await pool.run(pool.spec("true"))


async def test_when_a_sub_reaper_and_the_keeper_are_killed_the_command_dies_with_them() -> None:
    async with rig() as pool:
        feed, _ = pool.start(pool.sh("echo up; exec sleep 1000"))
        await feed.until_text("up")
        os.kill(pool.keeper, signal.SIGSTOP)  # or it might do its work before it is killed
        for pid in (*pool.reapers, pool.keeper):
            os.kill(pid, signal.SIGKILL)
        await feed.until_told("last", "survives")  # nobody is left who could tell


DAEMON = """
import asyncio, sys
from tests.fault.tooling import Rig
async def main():
    pool = Rig(mark=sys.argv[1])
    scripts = ["setsid sleep 1000 & echo up; trap '' TERM; while true; do sleep 1000; done", "echo up; exec yes"]
    for script in scripts * 3:
        feed, _ = pool.start(pool.sh(script))
        await feed.until(lambda: feed.text != "")
    print(pool.keeper, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


@pytest.mark.parametrize("also", ["alone", "with a sub-reaper", "with the keeper", "while the keeper is stopped"])
async def test_when_the_daemon_is_killed_no_tool_lives_on(also: str) -> None:
    mark = uuid.uuid4().hex
    daemon, keeper = started_daemon(mark)
    with daemon:
        assert marked(mark)
        killed = {"with a sub-reaper": children(keeper)[:1], "with the keeper": [keeper]}.get(also, [])
        if also == "while the keeper is stopped":
            os.kill(keeper, signal.SIGSTOP)
        for pid in (daemon.pid, *killed):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    await until(lambda: not marked(mark))
    with suppress(ProcessLookupError):
        os.kill(keeper, signal.SIGCONT)
    await until(lambda: not lives(keeper))


def started_daemon(mark: str) -> tuple[subprocess.Popen[str], int]:
    """A process with running tools, and the process id of its keeper."""
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, mark], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout is not None
    return daemon, int(daemon.stdout.readline())


async def test_closing_waits_for_those_who_were_stopped_and_kills_the_others() -> None:
    before = descriptors()
    pool = Rig()
    stubborn, execution = pool.start(pool.sh("trap '' TERM; echo up; sleep 1000"))
    running, _ = pool.start(pool.sh("setsid sleep 1000 & echo up; sleep 1000"))
    for feed in (stubborn, running):
        await feed.until_text("up")
    keeper = pool.keeper
    execution.stop("the daemon is ending")
    await pool.processes.close(4.0)
    assert str(pool.processes.refuses()) == "the daemon is ending"
    assert stubborn.told == ["gone"]
    assert marked(pool.mark) == []
    assert keeper not in pids()
    assert descriptors() == before


async def stopped(feed: Feed, execution: Execution) -> None:
    """Stops it, as the core would; nothing of it lives then, and nothing was said after the stop."""
    execution.stop("enough")
    said = len(feed.chunks)
    await feed.until_told("gone")
    assert len(feed.chunks) == said
