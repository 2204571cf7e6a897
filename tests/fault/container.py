"""Runs the built image as a container engine would, and looks at it from outside; `scripts/container` calls this.

As root, in a network namespace made for it. The container has namespaces of its own for processes, mounts, host name
and IPC; its files are read-only but for /state, and it runs as the image's user without privileges to gain. What is
asked of the image is what its configuration says: entrypoint, environment, user, health check, stop signal.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from websockets.asyncio.client import connect

from tests import hosting
from tests.peer import Peer
from tests.trace import subscribe, until_ended

URL = "ws://127.0.0.1:9100"  # what the image exposes
STARTED_S = 15.0
COMMAND_S = 20.0
TOOLS_S = 60.0
STOP_S = 10.0  # what engines give a container between TERM and KILL
EVENTS, BATCH = 5_000, 100
MARK = "a-tool-of-this-container"  # an argument of every process of a tool: so they are found from outside
LOOK = """
id -u
grep -E '^(CapEff|NoNewPrivs)' /proc/self/status
touch x 2>/dev/null || echo read-only
touch /state/x
"""
IGNORE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def stay(seconds):
    print("on", flush=True)
    time.sleep(seconds)
"""
STAY = f"{IGNORE}stay(1000)"
FORK = f"""{IGNORE}
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        stay(1000)
    os._exit(0)
os.wait()
time.sleep(float(sys.argv[1]))
"""
TOOLS = f"""
[tools.look]
command = ["sh", "-c", {json.dumps(LOOK)}]

[tools.obeys]
command = ["sh", "-c", "echo on; sleep 1000; :", "{MARK}"]

[tools.ignores]
command = ["python3", "-c", {json.dumps(STAY)}, "{MARK}"]

[tools.forks]
command = ["python3", "-c", {json.dumps(FORK)}, "{{stay_s}}", "{MARK}"]
parameters.properties.stay_s.type = "number"
parameters.required = ["stay_s"]
"""
MOUNTS = """
set -e
mount --bind "$ROOT" "$ROOT"
touch "$ROOT/tools.toml"
mount --bind "$TOOLS" "$ROOT/tools.toml"
mount --bind "$STATE" "$ROOT/state"
mount --rbind /dev "$ROOT/dev"
mount -t proc proc "$ROOT/proc"
mount -o remount,bind,ro "$ROOT"
hostname carserver
cd /
exec setpriv --no-new-privs chroot --userspec="$USERSPEC" --groups= "$ROOT" /usr/bin/env -i "$@"
"""


class Container:
    """The image, started at most once at a time on one state folder."""

    def __init__(self, root: Path, image: dict[str, Any], state: Path) -> None:
        self.root = root
        self.image = image
        self.state = state
        self.process: subprocess.Popen[str] | None = None
        uid, gid = map(int, image["User"].split(":"))  # by number: an engine must see that it is not root
        state.mkdir(mode=0o700, exist_ok=True)
        os.chown(state, uid, gid)  # as an engine does with a new volume
        self.tools = state.with_name("tools.toml")
        self.tools.write_text(TOOLS)

    def start(self) -> float:
        """Starts it, and waits until it listens; the seconds that took."""
        began = time.monotonic()
        command = [
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount",
            "--ipc",
            "--uts",
            "--propagation",
            "private",
        ]
        arguments = [*self.image["Env"], "CARSERVER_TOOLS=/tools.toml", *self.image["Entrypoint"], *self.image["Cmd"]]
        places = {"ROOT": self.root, "STATE": self.state, "TOOLS": self.tools}
        variables = {name: str(path) for name, path in places.items()} | {"USERSPEC": self.image["User"]}
        self.process = subprocess.Popen(
            [*command, "bash", "-c", MOUNTS, "bash", *arguments],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on ws://"), f"it said {line!r} and exit {self.process.poll()}"
        return time.monotonic() - began

    @property
    def first(self) -> int:
        """The pid, as seen from here, of what is process 1 inside."""
        assert self.process is not None
        (pid,) = children(self.process.pid)
        return pid

    @property
    def daemon(self) -> int:
        """The pid, as seen from here, of the daemon, which is the only child that process 1 keeps."""
        (pid,) = children(self.first)
        return pid

    @property
    def keeper(self) -> int:
        """Likewise of the keeper of process tools, the daemon's only child."""
        (pid,) = children(self.daemon)
        return pid

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the container, as the image's user: what an engine's `exec` does."""
        uid, gid = self.image["User"].split(":")
        enter = ["nsenter", f"--target={self.first}", "--pid", "--mount", "--ipc", "--uts", "--root", "--wd"]
        user = [f"--setuid={uid}", f"--setgid={gid}", "/usr/bin/env", "-i", *self.image["Env"]]
        return subprocess.run([*enter, *user, *command], capture_output=True, text=True, timeout=COMMAND_S, check=False)

    def stop(self, number: signal.Signals, pid: int | None = None) -> tuple[int, float]:
        """Sends process 1 a signal, or another of the container; the exit code, and the seconds until then."""
        assert self.process is not None
        began = time.monotonic()
        os.kill(pid or self.first, number)
        code = self.process.wait(STOP_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        return code, time.monotonic() - began


def of_processes(file: str) -> Iterator[tuple[int, bytes]]:
    """What /proc has in this file of each process, zombies included."""
    for name in os.listdir("/proc"):  # noqa: PTH208 - a glob looks at each, and fails where one has just ended
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                yield int(name), Path("/proc", name, file).read_bytes()


def children(parent: int) -> list[int]:
    """The processes, zombies included, whose parent it is."""
    return [pid for pid, stat in of_processes("stat") if int(stat.rpartition(b")")[2].split()[1]) == parent]


def marked() -> list[int]:
    """The processes of tools that live; a zombie has no arguments."""
    return [pid for pid, arguments in of_processes("cmdline") if f"\0{MARK}\0".encode() in arguments]


@contextlib.asynccontextmanager
async def peer(container: Container) -> AsyncIterator[Peer]:
    """A client of another make, from outside, with the token of the state folder."""
    token = (container.state / "auth-token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}"}
    async with connect(URL, additional_headers=headers, max_size=None, max_queue=None) as socket:
        yield Peer(socket)


def told(words: str) -> None:
    """One line for whoever reads along."""
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def look_inside(container: Container) -> None:
    """Process 1, its user, what it may write, its health check."""
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{container.first}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert status["NSpid"].split()[-1] == "1"
    assert status["Uid"].split() == [container.image["User"].split(":")[0]] * 4
    assert int(status["CapEff"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    told(f"process 1 is {status['Name']}, of user {status['Uid'].split()[0]}, without capabilities")
    for path, writable in (("/opt/carserver/x", False), ("/tmp/x", False), ("/state/x", True)):
        assert (container.inside("touch", path).returncode == 0) is writable, path
    (container.state / "x").unlink()
    told("of its files only /state can be written")
    missing = container.inside("python3", "-c", "import pip").stderr
    assert "No module named 'pip'" in missing, missing
    kind, *check = container.image["Healthcheck"]["Test"]
    assert kind == "CMD"
    began = time.monotonic()
    healthy = container.inside(*check)
    assert (healthy.returncode, healthy.stdout) == (0, "ok\n"), healthy
    told(f"the health check, {' '.join(check)!r}, says ok after {time.monotonic() - began:.2f} s")
    listed = container.inside("carserver", "runs", "ls", "--json")
    assert listed.returncode == 0, listed.stderr


async def record_and_watch(container: Container) -> list[dict[str, Any]]:
    """A run that one connection records and another watches; its trace."""
    began = time.monotonic()
    async with peer(container) as owner, peer(container) as viewer:
        run_id = (await owner.create("in a container"))["id"]
        await subscribe(viewer, run_id)
        events = [{"type": "text_delta", "text": f"word {number}"} for number in range(EVENTS - 1)]
        events.append({"type": "agent_end", "text": "done"})
        for first in range(0, EVENTS, BATCH):
            await owner.record(run_id, *events[first : first + BATCH])
        trace = await until_ended(viewer)
    assert [params["record"].get("event") for params in trace] == [None, *events, None]
    assert [params["cursor"] for params in trace] == [*range(EVENTS + 1), EVENTS]
    told(f"recorded and watched {EVENTS} events from outside in {time.monotonic() - began:.2f} s: no gap, none twice")
    return trace


async def all_is_there(container: Container, trace: list[dict[str, Any]]) -> None:
    """After another start the run is what it was, and a viewer gets the very rest of its trace."""
    seen = trace[: len(trace) // 2]
    run_id, cursor = seen[-1]["run_id"], seen[-1]["cursor"]
    async with peer(container) as viewer:
        run = await viewer.call("runs.get", {"run_id": run_id})
        assert (run["status"], run["event_count"], run["result_text"]) == ("completed", EVENTS, "done")
        subscribed = await subscribe(viewer, run_id, cursor=cursor, epoch=run["epoch"])
        assert subscribed["recovered"] is True
        assert seen + await until_ended(viewer) == trace
    told("everything is there, and a viewer went on from its cursor")


async def reaps(container: Container) -> None:
    """Orphans are handed to process 1, which waits for each: the daemon is its only child again."""
    leave = "for n in 1 2 3 4 5; do (sleep 1 >/dev/null 2>&1 &) ; done"
    assert container.inside("sh", "-c", leave).returncode == 0
    orphans = len(children(container.first)) - 1
    assert orphans > 0
    while len(children(container.first)) > 1:  # noqa: ASYNC110 - other processes
        await asyncio.sleep(0.05)
    told(f"{orphans} orphans became children of process 1; all were reaped")


async def begin(caller: Peer, tool: str, **parameters: Any) -> str:
    """Invokes a tool that says when it has begun; its handle."""
    handle: str = (await caller.call("tools.invoke", {"tool": tool, "parameters": parameters}))["handle"]
    answer = await hosting.polled(caller, handle, wait_ms=10_000, after=0)
    assert (answer["status"], answer["chunks"]) == ("running", [{"kind": "text", "text": "on\n"}]), answer
    return handle


async def until_nothing_is_left(container: Container) -> None:
    """No process of a tool lives or is a zombie: process 1 has the daemon, this the keeper, and the keeper nobody."""
    assert marked() == []
    while (  # noqa: ASYNC110 - other processes
        len(children(container.first)) > 1 or len(children(container.daemon)) > 1 or children(container.keeper)
    ):
        await asyncio.sleep(0.05)


async def run_tools(container: Container) -> None:
    """What process tools may do here, and that nothing of them stays, however they end."""
    async with peer(container) as caller:
        handle = (await caller.call("tools.invoke", {"tool": "look"}))["handle"]
        chunks, ended = await hosting.until_ended(caller, handle)
        assert ended["status"] == "succeeded", (chunks, ended)
        output = "".join(chunk["text"] for chunk in chunks if chunk["kind"] == "text")
        uid = container.image["User"].split(":")[0]
        assert output.split() == [uid, "CapEff:", "0" * 16, "NoNewPrivs:", "1", "read-only"], output
        told("a process tool runs as the daemon's user, without capabilities, and writes where the daemon may")
        for tool, parameters in (("obeys", {}), ("ignores", {}), ("forks", {"stay_s": 1000})):
            handle = await begin(caller, tool, **parameters)
            assert marked()
            began = time.monotonic()
            cancelled = await caller.call("tools.cancel", {"handle": handle, "wait_ms": 20_000})
            assert cancelled == {"cancelled": True, "cancel": "confirmed"}
            told(f"the tool {tool!r} was cancelled, and that proven after {time.monotonic() - began:.2f} s")
            await until_nothing_is_left(container)
        handle = await begin(caller, "forks", stay_s=0.2)
        _, ended = await hosting.until_ended(caller, handle)
        assert (ended["status"], ended["result"]["exit_code"]) == ("succeeded", 0), ended
        await until_nothing_is_left(container)
        told("a tool that forks twice and exits: succeeded, and what it left is gone")
        await lose_keeper(container, caller)


async def lose_keeper(container: Container, caller: Peer) -> None:
    """When the keeper is killed its tools go, too, and fail; then there is another."""
    handle = await begin(caller, "forks", stay_s=1000)
    keeper = container.keeper
    os.kill(keeper, signal.SIGKILL)
    _, ended = await hosting.until_ended(caller, handle)
    assert ended["status"] == "failed", ended
    while marked():  # noqa: ASYNC110 - other processes
        await asyncio.sleep(0.05)
    await begin_and_cancel(caller)
    await until_nothing_is_left(container)
    assert container.keeper != keeper
    told(f"its keeper was killed: {ended['error']!r}; nothing stays, and the next tool has another")


async def begin_and_cancel(caller: Peer) -> None:
    """A tool that does as it is told."""
    handle = await begin(caller, "obeys")
    cancelled = await caller.call("tools.cancel", {"handle": handle, "wait_ms": 20_000})
    assert cancelled["cancel"] == "confirmed"


async def lose_daemon(container: Container) -> None:
    """When the daemon is killed the container ends, with every tool."""
    async with peer(container) as caller:
        await begin(caller, "forks", stay_s=1000)
        await begin(caller, "ignores")
        code, took = await asyncio.to_thread(container.stop, signal.SIGKILL, container.daemon)
    assert code == 128 + signal.SIGKILL, code
    assert marked() == []
    told(f"the daemon was killed with two tools: exit {code} after {took:.2f} s, and no process is left")


async def ends_with_tools(container: Container) -> None:
    """The stop signal while tools that ignore TERM run."""
    async with peer(container) as caller:
        for tool, parameters in (("ignores", {}), ("forks", {"stay_s": 1000})):
            await begin(caller, tool, **parameters)
        code, took = await asyncio.to_thread(container.stop, signal.Signals[container.image["StopSignal"]])
    assert code == 0
    assert marked() == []
    told(f"the stop signal, with two tools that ignore TERM: exit 0 after {took:.2f} s, and no process is left")


async def ends(container: Container) -> None:
    """The stop signal: peers are told, exit 0, in less time than engines give."""
    async with peer(container) as viewer:
        await viewer.call("server.ping")
        number = signal.Signals[container.image["StopSignal"]]
        code, took = await asyncio.to_thread(container.stop, number)
        draining = await viewer.next("server.draining")
        closed, _ = await viewer.closed()
    assert (code, closed) == (0, 1012), (code, closed)
    told(f"{number.name}: a viewer was told {draining} and closed with 1012; exit 0 after {took:.2f} s")


async def check(container: Container) -> None:
    """Everything, in order."""
    told(f"listens {container.start():.2f} s after its start")
    look_inside(container)
    trace = await record_and_watch(container)
    async with asyncio.timeout(STARTED_S):
        await reaps(container)
    async with asyncio.timeout(TOOLS_S):
        await run_tools(container)
    await ends(container)
    told(f"started again on the same /state: listens after {container.start():.2f} s")
    await all_is_there(container, trace)
    code, _ = container.stop(signal.SIGKILL)
    assert code != 0
    told(f"killed, and started again: listens after {container.start():.2f} s")
    await all_is_there(container, trace)
    await lose_daemon(container)
    container.start()
    await ends_with_tools(container)


def main() -> None:
    """`python -m tests.fault.container ROOT IMAGE.json STATE`."""
    root, image, state = (Path(argument) for argument in sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("out of time"))  # so that the container ends, too
    container = Container(root, json.loads(image.read_text())["Docker"]["config"], state)
    try:
        asyncio.run(check(container))
    finally:
        if container.process is not None:
            container.process.kill()
            container.process.wait()


if __name__ == "__main__":
    main()
