"""Damaged and failing storage, as the peers of a real daemon see it; full disks: test_full_disk.py."""

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.daemon import EXIT_S, Daemon
from tests.fault.processes import carserver
from tests.fault.test_drain import exit_code
from tests.peer import Refused, peer, records

TEXT = {"type": "text_delta", "text": "on"}


# Damage.


async def test_a_bit_that_flipped_in_the_file_is_named_to_whoever_reads_and_closes_a_viewer_after_what_is_sound(
    daemon: Daemon,
) -> None:
    async with peer(daemon) as owner:
        run_id, sound = [(await owner.create())["id"] for _ in range(2)]
        await owner.record(run_id, *[{"type": "text_delta", "text": f"marker-{n:03}"} for n in range(200)])
        await owner.record(sound, TEXT)
    assert daemon.terminate() == 0  # all is in the one file
    file = daemon.state / "carserver.db"
    content = bytearray(file.read_bytes())
    content[content.index(b"marker-123") + 9] ^= 1  # marker-122 it is now, and valid JSON
    file.write_bytes(content)

    daemon.start()
    async with peer(daemon) as owner, peer(daemon) as viewer:
        page = await owner.call("runs.events", {"run_id": run_id})
        assert (len(page["events"]), page["cursor"], page["has_more"]) == (123, 123, True)
        with pytest.raises(Refused) as refused:
            await owner.call("runs.events", {"run_id": run_id, "after": 123})
        assert (refused.value.type, refused.value.data["outcome"]) == ("unavailable", "not_done")
        assert f"event 123 of run '{run_id}' is missing or damaged" in str(refused.value)
        after = await owner.call("runs.events", {"run_id": run_id, "after": 124})
        assert [entry["sequence"] for entry in after["events"]] == list(range(124, 200))

        await viewer.call("runs.trace.subscribe", {"run_id": run_id})
        frames = [await viewer.next_frame() for _ in range(1 + 123)]
        assert [record["cursor"] for record in records(frames)] == list(range(124))
        closed = await viewer.next("runs.trace.closed")
        assert closed["run_id"] == run_id
        assert "event 123 " in closed["reason"]
        # The run takes new events, and its viewer may go on behind the damage; other runs have nothing of it.
        assert (await owner.record(run_id, TEXT))["first_sequence"] == 200
        epoch = page["epoch"]
        await viewer.call("runs.trace.subscribe", {"run_id": run_id, "cursor": 200, "epoch": epoch})
        assert (await viewer.next("runs.trace.event"))["cursor"] == 201
        assert len((await owner.call("runs.events", {"run_id": sound}))["events"]) == 1
        assert (await asyncio.to_thread(daemon.metrics))["subscriptions_closed"] == 1


def test_a_database_of_a_newer_carserver_is_one_clear_line_and_exit_1_and_is_left_alone(daemon: Daemon) -> None:
    assert daemon.terminate() == 0
    file = daemon.state / "carserver.db"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("PRAGMA user_version = 1000")
    before = file.read_bytes()
    refused = carserver("serve", "--state-dir", str(daemon.state), "--port", "0")
    assert (refused.returncode, refused.stdout) == (1, "")
    (line,) = refused.stderr.splitlines()
    assert f"{file} has schema version 1000" in line
    assert file.read_bytes() == before


# A disk that does not confirm: from within, for machines where test_io_errors.py cannot fail the call itself.


async def test_after_a_failed_fsync_the_daemon_says_so_acknowledges_nothing_and_exits_1(start: StartDaemon) -> None:
    daemon = start("--methods", "tests.fault.breaking")
    async with peer(daemon) as owner:
        run_id = (await owner.create())["id"]
        await owner.record(run_id, TEXT)
        await owner.call("test.break_fsync")
        appends = [owner.start("runs.record", {"run_id": run_id, "events": [TEXT]}) for _ in range(10)]
        results = await asyncio.gather(*appends, return_exceptions=True)
        for result in results:
            assert isinstance(result, Refused)
            assert result.type == "unavailable"
        assert isinstance(results[0], Refused)
        assert results[0].data["outcome"] == "unknown"
        assert (await owner.closed())[0] == 1012
    assert await asyncio.to_thread(exit_code, daemon, EXIT_S) == 1
    assert "fsync failed" in daemon.log
    assert not (daemon.state / "endpoint.json").exists()
    daemon.args = ()
    daemon.start()
    async with peer(daemon) as owner:
        assert (await owner.call("runs.get", {"run_id": run_id}))["event_count"] == 1


# In memory.


def in_memory(daemon: Daemon) -> set[Path]:
    """What daemons of this folder have there; other tests have theirs."""
    return set(Path("/dev/shm").glob(f"carserver-*-{daemon.state.stat().st_ino:x}-*"))


async def test_memory_durability_leaves_nothing_in_the_folder_nor_in_memory_at_exit_and_a_killed_ones_goes_at_the_next(
    start: StartDaemon,
) -> None:
    daemon = start(durability="memory")
    (place,) = in_memory(daemon)
    async with peer(daemon) as owner:
        run_id = (await owner.create())["id"]
        await owner.record(run_id, TEXT)
        assert (await owner.call("server.status"))["storage"]["durability"] == "memory"
    assert min(file.name for file in place.iterdir()) == "carserver.db"
    assert place.stat().st_mode & 0o777 == 0o700
    daemon.kill()
    assert place.exists()  # nobody was there to remove it
    daemon.start()
    assert not place.exists()
    (place,) = in_memory(daemon)
    async with peer(daemon) as owner:
        with pytest.raises(Refused, match="unknown run"):
            await owner.call("runs.get", {"run_id": run_id})
    assert daemon.terminate() == 0
    assert not place.exists()
    assert sorted(file.name for file in daemon.state.iterdir()) == ["agent-key", "auth-token", "host-token", "lock"]
