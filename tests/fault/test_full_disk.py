"""A full disk: changes are refused as not done, everything else goes on, and service resumes by itself.

Each test runs on a small file system of its own (`mounted`) and, where that matters and anywhere it may not be mounted,
on a limit of the sizes of the daemon's files (`limited`): the test's name says which it was.
"""

import asyncio
import contextlib
import itertools
import os
import resource
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon, NotStarted, running
from tests.fault.audit import Batch, audit_runs
from tests.peer import Peer, Refused, peer
from tests.trace import subscribe, take

DISK_BYTES = 3 * 1024 * 1024
ROOM_BYTES = 64 * 1024  # that a limit leaves to the daemon's log
PROBE_S = 0.1
FULL = ("unavailable", "not_done")


class MountedDisk:
    """A small tmpfs as state folder, in a mount namespace that is gone when this process is, however it ends."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        mount = 'mount -t tmpfs -o "size=$1,mode=0700" tmpfs "$0" && echo mounted && exec cat'
        # `cat` holds the namespace, and ends with our end of its pipe.
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, str(place), str(DISK_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            _, problem = self._holder.communicate()
            raise OSError(problem.decode().strip())
        self.state = Path(f"/proc/{self._holder.pid}/root{place}")  # as it is seen from here
        self.args = ("--state-dir", str(place))
        self.wrapper = ("nsenter", "--target", str(self._holder.pid), "--mount", "--")
        self._ballast = self.state / "ballast"

    def fill(self, daemon: Daemon, leave: int = 0) -> None:
        """To the last page, or so that `leave` bytes are left."""
        with self._ballast.open("ab", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(4096))
        os.truncate(self._ballast, self._ballast.stat().st_size - leave)

    def make_room(self, daemon: Daemon) -> None:
        """As it was before it was filled."""
        self._ballast.unlink()

    def close(self) -> None:
        """Unmounted, with all that is on it."""
        self._holder.communicate()


class LimitedDisk:
    """No file of the daemon's may grow: every write beyond what is there fails, as the kernel does it."""

    args: tuple[str, ...] = ()
    wrapper: tuple[str, ...] = ()

    def __init__(self, place: Path) -> None:
        self.state = place

    def fill(self, daemon: Daemon) -> None:
        """From now on, and when it is started again."""
        size = max(daemon.log_path.stat().st_size + ROOM_BYTES, (daemon.state / "carserver.db-wal").stat().st_size)
        blocks = size // 512
        daemon.wrapper = ("sh", "-c", f'ulimit -S -f {blocks} && exec "$@"', "sh")
        if daemon.process is not None:
            self._limit(daemon, blocks * 512)

    def make_room(self, daemon: Daemon) -> None:
        """No limit any more."""
        daemon.wrapper = ()
        self._limit(daemon, resource.RLIM_INFINITY)

    def _limit(self, daemon: Daemon, size: int) -> None:
        _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (min(size, hard) if hard >= 0 else size, hard))

    def close(self) -> None:
        """Nothing is left."""


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[MountedDisk]:
    try:
        disk = MountedDisk(tmp_path / "disk")
    except OSError as reason:
        pytest.skip(f"no file system of its own ({reason}): the limited disk stands in for it")
    yield disk
    disk.close()


@pytest.fixture(params=["mounted", "limited"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> MountedDisk | LimitedDisk:
    if request.param == "limited":
        return LimitedDisk(tmp_path / "state")
    found: MountedDisk = request.getfixturevalue("mounted")
    return found


class Owner:
    """A producer that knows what it was told."""

    def __init__(self, peer: Peer, run_id: str) -> None:
        self.peer = peer
        self.run_id = run_id
        self.acknowledged: list[Batch] = []

    async def record(self, batch_id: str, size: int = 50_000) -> None:
        """One event."""
        batch = Batch(self.run_id, batch_id, [{"type": "text_delta", "id": batch_id, "text": "x" * size}])
        batch.answer = await self.peer.call("runs.record", batch.params)
        self.acknowledged.append(batch)

    async def until_refused(self) -> tuple[str, str]:
        """Records until it is refused; what the refusal says."""
        for number in itertools.count(len(self.acknowledged)):
            try:
                await self.record(f"b{number}")
            except Refused as refused:
                return refused.type, refused.data["outcome"]
        raise AssertionError


@contextlib.asynccontextmanager
async def owner_of_a_run(daemon: Daemon) -> AsyncIterator[Owner]:
    async with peer(daemon) as connection:
        yield Owner(connection, (await connection.create())["id"])


def page(daemon: Daemon, path: str) -> tuple[int, str]:
    """Status and text of a page."""
    try:
        with urllib.request.urlopen(f"{daemon.http}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def reads_go_on(reader: Peer, daemon: Daemon, owner: Owner) -> None:
    """Everything that reads does; and it shows what was acknowledged, and no more."""
    assert (await reader.call("runs.get", {"run_id": owner.run_id}))["event_count"] == len(owner.acknowledged)
    assert owner.run_id in [run["id"] for run in (await reader.call("runs.list"))["runs"]]
    found = await audit_runs(reader, owner.acknowledged)
    assert found.good, found
    await subscribe(reader, owner.run_id)
    stream = await take(reader, 1 + len(owner.acknowledged))
    assert [record["cursor"] for record in stream] == list(range(1 + len(owner.acknowledged)))
    await reader.call("runs.trace.unsubscribe", {"run_id": owner.run_id})


async def says_that_it_is_full(daemon: Daemon) -> None:
    """To whoever asks: it lives, and takes no writes."""
    assert (await asyncio.to_thread(page, daemon, "/healthz"))[0] == 200
    status, text = await asyncio.to_thread(page, daemon, "/readyz")
    assert (status, bool(text.strip())) == (503, True)
    assert (await asyncio.to_thread(daemon.metrics))["storage_writable"] == 0


async def test_on_a_full_disk_changes_are_not_done_reads_go_on_and_service_resumes_by_itself(
    disk: MountedDisk | LimitedDisk,
) -> None:
    with running(disk.state, *disk.args, wrapper=disk.wrapper, probe_s=PROBE_S) as daemon:
        async with owner_of_a_run(daemon) as owner, peer(daemon) as viewer, peer(daemon) as reader:
            await subscribe(viewer, owner.run_id)
            for number in range(5):
                await owner.record(f"before {number}")
            disk.fill(daemon)
            assert await owner.until_refused() == FULL
            more = [owner.record(f"full {number}") for number in range(20)]
            for refusal in await asyncio.gather(*more, return_exceptions=True):
                assert isinstance(refusal, Refused)
                assert (refusal.type, refusal.data["outcome"]) == FULL
            with pytest.raises(Refused, match="storage fails"):
                await owner.peer.create("x" * 50_000)
            await reads_go_on(reader, daemon, owner)
            await says_that_it_is_full(daemon)
            assert (await reader.call("server.status"))["storage"]["problem"]

            disk.make_room(daemon)
            await daemon.until("storage_writable", 1)  # nobody writes: it has tried by itself
            assert await asyncio.to_thread(page, daemon, "/readyz") == (200, "ok\n")
            for number in range(5):
                await owner.record(f"after {number}")
            stream = await take(viewer, 1 + len(owner.acknowledged))  # of what was refused, nobody was shown anything
            assert [record["cursor"] for record in stream] == list(range(1 + len(owner.acknowledged)))
            await reads_go_on(reader, daemon, owner)
        daemon.kill()
        daemon.start()
        async with peer(daemon) as reader:
            await reads_go_on(reader, daemon, owner)


async def refused_as_full(connection: Peer, method: str, params: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        await connection.call(method, params)
    assert (refused.value.type, refused.value.data["outcome"]) == FULL, method


async def test_on_a_full_disk_no_cancel_has_a_receipt_no_turn_is_recorded_and_no_approval_is_asked_for(
    mounted: MountedDisk,
) -> None:
    padded = {"action": "go on", "details": "x" * 50_000}
    cancel = {"run_id": "a", "idempotency_key": "k", "reason": "x" * 50_000}
    turn = {"run_id": "a", "turns": [{"output": ["x" * 10_000] * 10}]}
    with running(mounted.state, *mounted.args, wrapper=mounted.wrapper, probe_s=PROBE_S) as daemon:
        async with owner_of_a_run(daemon) as owner, peer(daemon) as agent, peer(daemon) as viewer:
            for one in (agent, viewer):
                await one.call("server.handshake", {"protocol_version": 3})
            await agent.call("runs.start", {"intent": "i", "agent_id": "a", "idempotency_key": "a"})
            asked = (await agent.call("host.request_approval", padded))["id"]
            await viewer.call("host.subscribe")
            await viewer.call("runs.subscribe", {"run_id": "a"})
            await viewer.next("runs.trace.event")
            mounted.fill(daemon)
            await owner.until_refused()
            calls: dict[str, dict[str, Any]] = {
                "runs.cancel": cancel,
                "runs.record_turns": turn,
                "host.request_approval": padded,
            }
            for method, params in calls.items():
                await refused_as_full(agent, method, params)
            assert (await agent.call("runs.get", {"run_id": "a"}))["status"] == "created"
            assert [one["id"] for one in (await viewer.call("host.approvals"))["approvals"]] == [asked]
            assert viewer.pushed.empty(), "nobody is told of what was not done"

            mounted.make_room(daemon)
            await daemon.until("storage_writable", 1)
            resolve = {"approval_id": asked, "resolution": "approve"}
            assert (await agent.call("host.resolve_approval", resolve))["status"] == "resolved"
            receipt = await agent.call("runs.cancel", cancel)
            assert receipt["status"] == "cancelled_confirmed"
            assert (await viewer.next("host.event"))["kind"] == "approval.resolved"
        daemon.kill()
        daemon.start()
        async with peer(daemon) as agent:
            await agent.call("server.handshake", {"protocol_version": 3})
            assert await agent.call("runs.cancel", cancel) == receipt
            assert (await agent.call("host.approvals"))["approvals"] == []


async def test_a_daemon_that_was_killed_on_a_full_disk_starts_on_it_serves_reads_and_resumes_when_there_is_room(
    disk: MountedDisk | LimitedDisk,
) -> None:
    endpoint = disk.state / "endpoint.json"
    with running(disk.state, *disk.args, wrapper=disk.wrapper, probe_s=PROBE_S) as daemon:
        async with owner_of_a_run(daemon) as owner:
            disk.fill(daemon)
            assert await owner.until_refused() == FULL
        daemon.kill()
        endpoint.unlink()  # so that its place is taken, too
        disk.fill(daemon)
        daemon.start()
        async with peer(daemon) as owner.peer, peer(daemon) as reader:
            assert await owner.until_refused() == FULL
            await reads_go_on(reader, daemon, owner)
            await says_that_it_is_full(daemon)
            disk.make_room(daemon)
            await daemon.until("storage_writable", 1)
            await owner.record("room")
            await reads_go_on(reader, daemon, owner)
            boot_id = (await reader.call("server.status"))["boot_id"]
            while not endpoint.exists():  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)
            assert boot_id in endpoint.read_text()
        daemon.terminate()
        daemon.settings["grace_s"] = 0.1
        daemon.start()
        async with peer(daemon) as reader:
            await subscribe(reader, owner.run_id)
            await daemon.until("runs_interrupted", 1)
            run = await reader.call("runs.get", {"run_id": owner.run_id})
            assert boot_id in run["interrupted_reason"]  # it was stored late, but it was


async def test_nothing_is_written_outside_the_state_folder_so_that_no_other_disk_need_have_room(
    start: StartDaemon, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"  # where SQLite would put what a transaction has too much of, and remove it
    elsewhere.mkdir()
    before = elsewhere.stat().st_mtime_ns
    daemon = start(wrapper=("env", f"SQLITE_TMPDIR={elsewhere}"))
    async with peer(daemon) as owner:
        for _ in range(3):
            run = await owner.create("x" * 200_000, metadata={"of": "x" * 60_000})
            batch = {"run_id": run["id"], "events": [{"type": "text_delta", "text": "x" * 900}] * 1_000}
            await asyncio.gather(*[owner.call("runs.record", batch | {"batch_id": f"b{n}"}) for n in range(3)])
            await owner.record(run["id"], {"type": "agent_end", "text": "x" * 200_000})
        await owner.call("runs.list", {"limit": 1_000})
    assert elsewhere.stat().st_mtime_ns == before


async def test_a_checkpoint_without_room_is_harmless_and_is_made_up_for(mounted: MountedDisk) -> None:
    checkpoint = 600_000
    with running(
        mounted.state, *mounted.args, wrapper=mounted.wrapper, probe_s=PROBE_S, wal_bytes=checkpoint
    ) as daemon:
        async with owner_of_a_run(daemon) as owner, peer(daemon) as reader:
            for number in range(7):
                await owner.record(f"before {number}")
            mounted.fill(
                daemon, leave=75 * 4096
            )  # for the log to reach that size, and for half of it to be written back
            assert await owner.until_refused() == FULL
            assert "could not be written back" in daemon.log
            await reads_go_on(reader, daemon, owner)
            mounted.make_room(daemon)
            await daemon.until("storage_writable", 1)
            for number in range(14):
                await owner.record(f"after {number}")
            await daemon.until("storage_database_bytes", checkpoint)
            await reads_go_on(reader, daemon, owner)
        daemon.kill()
        daemon.start()
        async with peer(daemon) as reader:
            await reads_go_on(reader, daemon, owner)


async def test_where_there_is_no_room_to_open_the_database_that_is_one_clear_line_and_room_cures_it(
    mounted: MountedDisk,
) -> None:
    with running(mounted.state, *mounted.args, wrapper=mounted.wrapper) as daemon:
        async with owner_of_a_run(daemon) as owner:
            await owner.record("before")
        daemon.terminate()
        mounted.fill(daemon)
        before = len(daemon.log)
        with pytest.raises(NotStarted, match="exit 1"):
            daemon.start()
        (line,) = daemon.log[before:].splitlines()
        assert str(daemon.args[1]) in line
        assert "make room" in line
        mounted.make_room(daemon)
        daemon.start()
        async with peer(daemon) as reader:
            await reads_go_on(reader, daemon, owner)
