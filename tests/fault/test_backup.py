"""Backups: taken under load, restored, cut off; and what is refused."""

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from carserver.stores import schema
from carserver.stores.inspection import inspect
from carserver.stores.rows import checksum, place
from tests.conftest import StartDaemon
from tests.daemon import EXIT_S, Daemon, running
from tests.fault.audit import Producer, audit_runs, read_log
from tests.fault.processes import carserver, command, environment
from tests.fault.test_drain import exit_code
from tests.fault.test_full_disk import MountedDisk
from tests.peer import Peer, Refused, peer

LARGE = 4_000  # events of a KiB each: more than one step of a copy
ENOUGH = 60  # acknowledgements, before and after the backup begins


def enlarge(path: Path) -> None:
    """Events that belong to no run, so that the file has a size."""
    with contextlib.closing(schema.open_writer(path, synchronous="OFF")) as connection:
        event = b'{"type":"text_delta","text":"%b"}' % (b"x" * 1000)
        keys = (place(1 << 20, n) for n in range(LARGE))
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO events VALUES (?, 0, 0, ?, ?)", ((key, checksum(key, 0, 0, event), event) for key in keys)
        )
        connection.execute("COMMIT")


def restored(backup: Path, state: Path) -> Path:
    """The backup as it is restored: the file, in a new state folder."""
    state.mkdir(mode=0o700)
    backup.rename(state / "carserver.db")
    return state


@pytest.fixture
def large(start: StartDaemon, tmp_path: Path) -> Daemon:
    """A daemon whose database is large, and whose backups can be held in their middle."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    enlarge(state / "carserver.db")
    return start("--methods", "tests.fault.holding")


@contextlib.asynccontextmanager
async def producing(daemon: Daemon) -> AsyncIterator[tuple[list[Producer], asyncio.Semaphore]]:
    """Three producers on two runs."""
    async with contextlib.AsyncExitStack() as stack:
        owner = await stack.enter_async_context(peer(daemon))
        runs = [(await owner.create())["id"] for _ in range(2)]
        acknowledgements = asyncio.Semaphore(0)
        producers = [
            Producer(f"p{n}", await stack.enter_async_context(peer(daemon)), runs, acknowledgements=acknowledgements)
            for n in range(3)
        ]
        work = [asyncio.create_task(producer.run()) for producer in producers]
        yield producers, acknowledgements
        await asyncio.gather(*work)


def partial(folder: Path) -> list[Path]:
    """What is being written, or was left."""
    return list(folder.glob(".*.partial"))


async def held(host: Peer, target: Path) -> "asyncio.Task[Any]":
    """A backup that is being written, and is held in its middle."""
    await host.call("test.hold_backups")
    backup = host.start("server.backup", {"path": str(target)})
    while not await host.call("test.is_backup_held"):  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.001)
    return backup


async def test_a_backup_taken_under_load_has_all_that_was_acknowledged_before_and_whole_batches_of_the_rest(
    large: Daemon, tmp_path: Path
) -> None:
    target = tmp_path / "backup.db"
    async with producing(large) as (producers, acknowledgements):
        async with peer(large, "host-token") as host:
            for _ in range(ENOUGH):
                await acknowledgements.acquire()
            before = {batch.batch_id for producer in producers for batch in producer.sent if batch.answer is not None}
            backup = await held(host, target)
            await host.create("after the snapshot")
            for _ in range(ENOUGH):
                await acknowledgements.acquire()
            await host.call("test.release_backups")
            made = await backup
        large.kill()
    sent = [batch for producer in producers for batch in producer.sent]
    assert (made["path"], made["bytes"], made["runs"]) == (str(target), target.stat().st_size, 2)
    assert target.stat().st_mode & 0o777 == 0o600
    assert partial(tmp_path) == []
    inspect(target, 0, thorough=True)
    with running(restored(target, tmp_path / "restored")) as other:
        async with peer(other) as client:
            known = [batch if batch.batch_id in before else replace(batch, answer=None) for batch in sent]
            found = await audit_runs(client, known)
            assert found.good, found
            assert found.acknowledged > ENOUGH
            for batch in sent[:5]:  # it goes on: a batch that is there is known again
                assert (await client.call("runs.record", batch.params))["count"] == len(batch.events)
    large.start()
    async with peer(large) as client:
        assert (await audit_runs(client, sent)).good


async def test_a_kill_in_the_middle_of_a_backup_leaves_no_file_of_its_name_and_the_next_one_clears_up(
    large: Daemon, tmp_path: Path
) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    target = folder / "backup.db"
    async with peer(large, "host-token") as host:
        run_id = (await host.create())["id"]
        backup = await held(host, target)
        (written,) = partial(folder)
        assert written.stat().st_mode & 0o777 == 0o600
        large.kill()
        with contextlib.suppress(Exception):
            await backup
    assert not target.exists()
    assert partial(folder) == [written]
    large.start()
    async with peer(large, "host-token") as host:
        assert (await host.call("runs.get", {"run_id": run_id}))["id"] == run_id
        await host.call("server.backup", {"path": str(target)})
        large.kill()  # right after the answer
    assert [file.name for file in folder.iterdir()] == [target.name]
    inspect(target, 0, thorough=True)
    large.start()


async def test_a_backup_is_given_up_when_its_caller_leaves_or_the_daemon_drains_and_nothing_is_left_of_it(
    large: Daemon, tmp_path: Path
) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    target = folder / "backup.db"
    async with peer(large, "host-token") as host:
        backup = await held(host, target)
        await host.socket.close()
        with pytest.raises(ConnectionError):
            await backup
    while partial(folder):  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.01)
    async with peer(large, "host-token") as host:
        backup = await held(host, target)
        assert large.process is not None
        large.process.send_signal(signal.SIGTERM)
        with pytest.raises(Refused, match="given up: the daemon drains") as refused:
            await backup
        assert (refused.value.type, refused.value.data["outcome"]) == ("unavailable", "not_done")
    assert await asyncio.to_thread(exit_code, large, EXIT_S) == 0
    assert list(folder.iterdir()) == []


async def test_one_backup_is_made_at_a_time_none_takes_the_place_of_a_file_and_the_log_that_grows_meanwhile_is_bounded(
    large: Daemon, tmp_path: Path
) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    async with peer(large, "host-token") as host:
        first = await held(host, folder / "first.db")
        with pytest.raises(Refused, match="one at a time") as refused:
            await host.call("server.backup", {"path": str(folder / "second.db")})
        assert refused.value.type == "overloaded"
        await host.call("test.release_backups")
        await first
        await host.call("server.backup", {"path": str(folder / "second.db")})
        third = await held(host, folder / "third.db")
        (folder / "third.db").write_text("mine")
        await host.call("test.release_backups")
        with pytest.raises(Refused, match="is there already"):
            await third
    assert (folder / "third.db").read_text() == "mine"
    assert {file.name for file in folder.iterdir()} == {"first.db", "second.db", "third.db"}
    assert (await asyncio.to_thread(large.metrics))["backups"] == 2
    large.terminate()
    large.settings["backup_log_bytes"] = 1
    large.start()
    async with peer(large, "host-token") as host:
        with pytest.raises(Refused, match="write-ahead log may not grow") as refused:
            await host.call("server.backup", {"path": str(folder / "fourth.db")})
        assert refused.value.data["outcome"] == "not_done"
    assert {file.name for file in folder.iterdir()} == {"first.db", "second.db", "third.db"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[MountedDisk]:
    try:
        disk = MountedDisk(tmp_path / "disk")
    except OSError as reason:
        pytest.skip(f"no file system of its own ({reason})")
    yield disk
    disk.close()


async def test_a_backup_for_which_there_is_no_room_is_not_done_and_nothing_is_left_of_it(
    small_disk: MountedDisk, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    enlarge(state / "carserver.db")
    with running(state, wrapper=small_disk.wrapper) as daemon:
        async with peer(daemon, "host-token") as host:
            with pytest.raises(Refused, match="full") as refused:
                await host.call("server.backup", {"path": str(tmp_path / "disk" / "backup.db")})
            assert (refused.value.type, refused.value.data["outcome"]) == ("unavailable", "not_done")
            await host.create("work goes on")
        assert list(small_disk.state.iterdir()) == []


async def test_a_path_that_is_not_absolute_taken_or_in_no_folder_is_refused_and_so_is_whoever_is_not_the_host(
    daemon: Daemon, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "other.db-wal").touch()
    refused_paths = {
        "backup.db": "an absolute path",
        "": "an absolute path",
        "/tmp/\0": "an absolute path",
        str(taken): "is there already",
        str(tmp_path): "is there already",
        str(tmp_path / "link"): "is there already",
        str(tmp_path / "other.db"): "other.db-wal is there already",
        str(tmp_path / "none" / "backup.db"): "is no folder",
        str(taken / "backup.db"): "is no folder",
        str(tmp_path / ("x" * 250)): "File name too long",
        str(daemon.state / "carserver.db.carried-x"): "the daemon's own",
        str(daemon.state / "damaged"): "the daemon's own",  # a start takes it for its mark, and removes it
    }
    async with peer(daemon, "host-token") as host, peer(daemon) as client:
        for path, why in refused_paths.items():
            with pytest.raises(Refused, match=why) as refused:
                await host.call("server.backup", {"path": path})
            assert (refused.value.type, refused.value.data["path"]) == ("invalid_params", "path"), path
        with pytest.raises(Refused) as refused:
            await client.call("server.backup", {"path": str(tmp_path / "backup.db")})
        assert refused.value.type == "forbidden"
    assert taken.read_text() == "mine"
    assert partial(tmp_path) == []


async def test_a_database_that_is_damaged_is_not_backed_up_as_if_it_were_sound(
    start: StartDaemon, tmp_path: Path
) -> None:
    daemon = start(check_bytes=1)
    async with peer(daemon, "host-token") as host:
        for _ in range(30):
            await host.create("x" * 4000)
    daemon.terminate()
    file = daemon.state / "carserver.db"
    content = file.read_bytes()
    page = content.rindex(b"xxxx") // 4096
    file.write_bytes(content[: page * 4096] + bytes(4096) + content[(page + 1) * 4096 :])
    daemon.start()
    async with peer(daemon, "host-token") as host:
        with pytest.raises(Refused, match="damaged, and no backup was made"):
            await host.call("server.backup", {"path": str(tmp_path / "backup.db")})
    assert (daemon.state / "damaged").exists()
    assert not (tmp_path / "backup.db").exists()


# The command.


def test_the_command_makes_the_path_absolute_and_prints_it(daemon: Daemon, tmp_path: Path) -> None:
    done = subprocess.run(
        command("backup", "mine.db", "--state-dir", str(daemon.state)),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    target = tmp_path / "mine.db"
    assert (done.returncode, done.stdout) == (0, f"{target}\n"), done.stderr
    assert f"{target.stat().st_size:,} bytes, 0 runs" in done.stderr
    again = carserver("backup", str(target), "--state-dir", str(daemon.state))
    assert (again.returncode, again.stdout) == (1, "")
    assert "is there already" in again.stderr


async def test_a_backup_of_runs_that_live_is_restored_with_them(daemon: Daemon, tmp_path: Path) -> None:
    async with peer(daemon, "host-token") as host:
        run_id = (await host.create())["id"]
        await host.record(run_id, {"type": "text_delta", "text": "on"})
        await host.call("server.backup", {"path": str(tmp_path / "backup.db")})
    with running(restored(tmp_path / "backup.db", tmp_path / "restored"), grace_s=0.1) as other:
        assert other.token("host-token") != daemon.token("host-token")
        await other.until("runs_interrupted", 1)
        async with peer(other, "host-token") as host:
            await _goes_on(host, run_id)


async def test_a_cursor_in_the_original_is_no_place_in_the_log_of_a_backup_that_was_restored_and_went_on(
    daemon: Daemon, tmp_path: Path
) -> None:
    async with peer(daemon, "host-token") as host:
        run = await host.create()
        await host.record(run["id"], {"type": "text_delta", "text": "in both"})
        await host.call("server.backup", {"path": str(tmp_path / "backup.db")})
        await host.record(run["id"], {"type": "text_delta", "text": "in the original"})
        place = {"run_id": run["id"], "cursor": 2, "epoch": run["epoch"]}
        assert (await host.call("runs.trace.subscribe", place))["recovered"]
    folder = restored(tmp_path / "backup.db", tmp_path / "restored")
    with running(folder) as other:
        async with peer(other, "host-token") as host:
            await host.record(run["id"], {"type": "text_delta", "text": "in the copy"})
            subscribed = await host.call("runs.trace.subscribe", place)
            assert (subscribed["recovered"], subscribed["cursor"]) == (False, 0)
        other.kill()
        other.start()
        async with peer(other, "host-token") as host:
            place = {"run_id": run["id"], "cursor": 2, "epoch": subscribed["epoch"]}
            assert (await host.call("runs.trace.subscribe", place))["recovered"], "from then on it has one"


async def _goes_on(host: Peer, run_id: str) -> None:
    log: list[Any] = await read_log(host, run_id)
    assert len(log) == 1
    assert (await host.record(run_id, {"type": "text_delta", "text": "again"}))["first_sequence"] == 1
