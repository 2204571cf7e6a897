"""Damaged files: what a daemon serves of them is what was stored, what it does not serve it has said, and it starts.

More flips by `scripts/flip_rounds`.
"""

import asyncio
import contextlib
import random
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carserver.config import Settings
from carserver.protocol.errors import RpcError
from carserver.protocol.runs import ListRuns
from carserver.stores import inspection, recovery, salvage
from carserver.stores.schema import StorageError, open_reader
from tests.conftest import StartDaemon
from tests.daemon import Daemon, NotStarted, running
from tests.fault.audit import read_log
from tests.fault.flips import KINDS, Truth, ask, copied, flip, flipped_round, killed, listening, make
from tests.fault.test_migration import former
from tests.peer import Peer, Refused, peer
from tests.unit.handling import close_handle
from tests.unit.storing import create, event, opened

PAGE = 4096
PROCESSES = 5


async def database(folder: Path, chance: random.Random) -> tuple[Path, Truth]:
    """A closed one, and what is in it."""
    folder.mkdir()  # noqa: ASYNC240 - nothing else is to be done meanwhile
    path = folder / "carserver.db"
    return path, await make(path, chance)


# Flipped bits.


async def test_of_a_file_with_a_flipped_bit_nothing_wrong_is_served_and_nothing_is_missing_without_a_word(
    tmp_path: Path, chance: random.Random
) -> None:
    closed, truth = await database(tmp_path / "closed", chance)
    (tmp_path / "killed").mkdir()
    left, truth_left = await killed(tmp_path / "killed", chance)
    for kind, ((suffix, settings), rounds) in zip(KINDS, zip(KINDS.values(), (10, 5, 5), strict=True), strict=True):
        source, true = (closed, truth) if suffix == "" else (left, truth_left)
        counted: Counter[str] = Counter()
        for _ in range(rounds):
            bit, found = await flipped_round(source, tmp_path / "round", true, suffix, chance, **settings)
            assert found.good, (kind, bit, found)
            counted[found.kind] += 1
        print(kind, dict(counted))


async def test_the_rounds_find_what_a_store_serves_that_does_not_check(
    tmp_path: Path, chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, truth = await database(tmp_path / "closed", chance)
    assert (await ask(copied(closed, tmp_path / "round"), truth)).kind == "harmless"
    path = copied(closed, tmp_path / "round")
    content = path.read_bytes()
    flip(path, 8 * content.index(b'"text":"xxx') + 8 * 9)
    monkeypatch.setattr("carserver.stores.rows._is_sound", lambda *_: True)
    found = await ask(path, truth)
    assert found.kind == "served wrong"


async def served(host: Peer) -> dict[str, Any]:
    """Everything that the host is told, but for epochs; of a run whose log cannot be read, what it was told of it.

    In a file that was set aside and made anew, all epochs are new: `flips.Asking` looks at them.
    """
    answers: dict[str, Any] = {}
    for run in (await host.call("runs.list", {"limit": 1000}))["runs"]:
        answers[run["id"]] = run | {"epoch": ""}
        with contextlib.suppress(Refused):
            answers[f"log of {run['id']}"] = await read_log(host, run["id"])
    page = await host.call("outputs.list", {"limit": 1000})
    answers |= {record["id"]: record for record in page["outputs"]}
    return answers


async def test_daemons_on_files_with_a_flipped_bit_start_and_what_they_serve_is_true_and_what_is_missing_they_have_said(
    tmp_path: Path, chance: random.Random
) -> None:
    closed, _ = await database(tmp_path / "closed", chance)
    async with opened(closed) as store:  # else each start ends them, at its own time
        for row in store.store.found_open:
            await store.store.edit(close_handle(row.handle, row.run_id))
    with running(copied(closed, tmp_path / "sound").parent) as daemon:
        async with peer(daemon, "host-token") as host:
            truth = await served(host)
    for number in range(PROCESSES):
        path = copied(closed, tmp_path / f"state-{number}")
        bit = chance.randrange(path.stat().st_size * 8)
        flip(path, bit)
        with running(path.parent) as daemon:
            async with peer(daemon, "host-token") as host:
                found: dict[str, Any] = {}
                with contextlib.suppress(Refused):
                    found = await served(host)
                assert found.items() <= truth.items(), bit
                if len(found) < len(truth):
                    assert "damaged" in daemon.log, bit
                    told = "restart the daemon" in daemon.log
                    assert (await asyncio.to_thread(daemon.metrics))["storage_damage"] >= told
                await host.create("goes on")


async def test_where_the_schema_itself_is_damaged_the_daemon_starts_and_serves_nothing_wrong(
    tmp_path: Path, chance: random.Random
) -> None:
    closed, truth = await database(tmp_path / "closed", chance)
    content = closed.read_bytes()
    schema = [at for at in range(0, len(content), PAGE) if b"CREATE TABLE" in content[at : at + PAGE]]
    places = [found.start() for found in re.finditer(rb"INTEGER PRIMARY|BLOB|, size", content)]  # keys, columns
    anything = [chance.randrange(8 * at, 8 * (at + PAGE)) for at in schema for _ in range(10)]
    for bit in [8 * (at + offset) for at in places for offset in (0, 4)] + anything:
        path = copied(closed, tmp_path / "round")
        flip(path, bit)
        found = await ask(path, truth)
        assert found.good, (bit, found)


# Truncated files.


@pytest.mark.parametrize("with_log", [False, True])
async def test_of_a_file_that_was_cut_off_anywhere_the_daemon_serves_what_is_true_and_says_what_is_missing(
    tmp_path: Path, chance: random.Random, with_log: bool
) -> None:
    if with_log:
        tmp_path.joinpath("killed").mkdir()
        source, truth = await killed(tmp_path / "killed", chance)
    else:
        source, truth = await database(tmp_path / "closed", chance)
    size = source.stat().st_size
    lengths = {0, 1, 99, 100, 511, 512, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, size // 2, size - PAGE, size - 1}
    for length in sorted(lengths):
        path = copied(source, tmp_path / "round")
        with path.open("r+b") as file:
            file.truncate(length)
        log_before = _size(path.with_name("carserver.db-wal"))
        found = await ask(path, truth)
        assert found.good, (length, found)
        assert not found.refused, (length, found)
        assert found.said or with_log, length  # what was cut off may stand in the log
        if found.set_aside:
            (aside,) = path.parent.glob("carserver.db.damaged-*Z")
            assert _size(aside) == length
            assert _size(aside.with_name(f"{aside.name}-wal")) == log_before
        again = await ask(path, truth)
        assert (again.wrong, again.said) == ([], [])  # nothing is left to be said


async def test_a_write_ahead_log_that_was_cut_off_loses_its_end_and_a_log_whose_database_is_gone_is_kept(
    tmp_path: Path, chance: random.Random
) -> None:
    (tmp_path / "killed").mkdir()
    source, truth = await killed(tmp_path / "killed", chance)
    path = copied(source, tmp_path / "round")
    log = path.with_name("carserver.db-wal")
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size // 2)
    found = await ask(path, truth)
    assert not found.wrong, found
    path = copied(source, tmp_path / "round")
    path.unlink()
    before = log.read_bytes()
    found = await ask(path, truth)
    assert found.good, found
    (aside,) = path.parent.glob("carserver.db.damaged-*-wal")
    assert aside.read_bytes() == before


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# Broken trees.


def page_of(path: Path, table: str) -> int:
    """The root page of a table's tree."""
    with inspection.without_trace(path), contextlib.closing(open_reader(path)) as connection:
        root: int = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()[0]
    return root


def blank(path: Path, page: int) -> None:
    """A page of a file of nothing."""
    with path.open("r+b") as file:
        file.seek((page - 1) * PAGE)
        file.write(bytes(PAGE))


async def test_where_a_tree_is_broken_the_runs_that_do_not_need_it_are_carried_over_and_the_others_named(
    tmp_path: Path, chance: random.Random
) -> None:
    closed, truth = await database(tmp_path / "closed", chance)
    for table, whole in (
        ("runs", set()),
        ("texts", set()),
        ("events", {run_id for run_id, head in truth.heads.items() if not head.cursor}),
        ("batches", set()),
        ("runs_by_time", truth.heads.keys()),
        ("sqlite_autoindex_runs_1", truth.heads.keys()),
        ("outputs", truth.heads.keys()),
    ):
        path = copied(closed, tmp_path / "round")
        blank(path, page_of(path, table))
        found = await ask(path, truth)
        assert found.good, (table, found)
        assert found.set_aside, table
        missing = {run_id for run_id in truth.heads if f"run {run_id} in the list" in found.missing}
        assert missing <= truth.heads.keys() - whole, (table, missing)
        said = "\n".join(found.said)
        assert all(repr(run_id) in said for run_id in missing), (table, said)


async def test_a_name_or_a_text_that_is_no_utf_8_any_more_is_damage_as_any_other_and_is_shown_to_nobody(
    tmp_path: Path, chance: random.Random
) -> None:
    closed, truth = await database(tmp_path / "closed", chance)
    path = copied(closed, tmp_path / "round")
    path.write_bytes(path.read_bytes().replace(b"runs_by_time", b"runs_by_tim\xd4"))
    found = await ask(path, truth)
    assert found.set_aside
    assert found.missing == []

    path = tmp_path / "carserver.db"
    async with opened(path) as store:
        await store.submit(create("broken", prompt="a secret"))
        await store.submit(create("sound"))
    path.write_bytes(path.read_bytes().replace(b"a secret", b"a secre\xd4"))
    async with opened(path, check_bytes=1) as store:
        both = [store.append("broken", event(0)), store.append("sound", event(0))]
        refused, done = await asyncio.gather(*both, return_exceptions=True)
        assert isinstance(refused, RpcError)
        assert "no UTF-8" in refused.message
        assert not isinstance(done, BaseException)  # a neighbour in the same transaction
        with pytest.raises(RpcError, match="no UTF-8") as read:
            await store.store.head("broken")
        assert "secre" not in read.value.message + refused.message
        assert store.store.damage.count == 2


async def test_a_damaged_file_of_the_version_before_is_carried_over_too(tmp_path: Path) -> None:
    path = former(tmp_path / "carserver.db")
    content = bytearray(path.read_bytes())
    blank(path, page_of(path, "runs_by_time"))
    content = bytearray(path.read_bytes())
    content[content.index(b"context_resolving") + 2] ^= 1  # of an event, whose run is not whole then
    path.write_bytes(content)
    said: list[str] = []
    with listening(said):
        async with opened(path) as store:
            assert await store.store.head("run-nobody") is None
            listed = await store.store.list(None, ListRuns(), None, 100)
    assert len(listed) == 9
    assert "9 runs (" in said[-1]
    assert sum("'run-" in line for line in said) == 1
    inspection.inspect(path, 0, thorough=True)


# Setting aside, cut off anywhere.


class Cut(BaseException):
    """The daemon is gone."""


def cut_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> Callable[[], int]:
    """Lets this many changes of names happen while a file is set aside; what is called tells how many did."""
    done = 0
    rename, sync = Path.rename, recovery.sync

    def step() -> None:
        nonlocal done
        if done == steps:
            raise Cut
        done += 1

    def counted_rename(self: Path, target: Path) -> Path:
        step()
        return rename(self, target)

    def counted_sync(path: Path) -> None:
        step()
        sync(path)

    monkeypatch.setattr(Path, "rename", counted_rename)
    monkeypatch.setattr(recovery, "sync", counted_sync)
    return lambda: done


async def test_setting_aside_that_is_cut_off_anywhere_is_made_up_for_by_the_next_start_and_loses_nothing(
    tmp_path: Path, chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killed").mkdir()
    source, truth = await killed(tmp_path / "killed", chance)
    blank(source, source.read_bytes().index(b'"text":"xxx') // PAGE + 1)  # of events of the first run that has any
    before = {suffix: source.with_name(f"carserver.db{suffix}").read_bytes() for suffix in ("", "-wal")}
    path = copied(source, tmp_path / "round")
    (path.parent / "damaged").touch()
    uncut = await ask(path, truth)
    assert len(uncut.missing) >= 2  # some run, from the list and by its name
    for steps in range(100):
        path = copied(source, tmp_path / "round")
        (path.parent / "damaged").touch()
        with monkeypatch.context() as patched:
            cut_after(patched, steps)
            try:
                recovery.open_database(path, Settings()).connection.close()
            except Cut:
                pass
            else:
                break
        found = await ask(path, truth)
        assert found.good, (steps, found)
        assert set(found.missing) == set(uncut.missing), (steps, found)
        assert not found.refused, (steps, found)
        (aside,) = path.parent.glob("carserver.db.damaged-*Z")
        for suffix, content in before.items():
            assert aside.with_name(f"{aside.name}{suffix}").read_bytes() == content, (steps, suffix)
        left = {file.name.removeprefix(aside.name) for file in path.parent.iterdir()}
        assert left <= {"carserver.db", "carserver.db-wal", "carserver.db-shm", "", "-wal", "-shm"}, (steps, left)
    assert 5 < steps < 20


async def test_a_kill_while_a_large_file_is_carried_over_is_harmless(tmp_path: Path, chance: random.Random) -> None:
    path = tmp_path / "state" / "carserver.db"
    path.parent.mkdir(mode=0o700)
    async with opened(path, durability="normal") as store:
        for number in range(40):
            await store.submit(create(f"run-{number}"))
            await store.append(f"run-{number}", *[event(n, 100) for n in range(1000)])
    blank(path, page_of(path, "runs_by_time"))
    (path.parent / "damaged").touch()
    daemon = Daemon(path.parent)
    new = path.with_name("carserver.db.salvage")
    for _ in range(2):
        start = asyncio.create_task(asyncio.to_thread(daemon.start))
        least = chance.randrange(1, 3_000_000)
        while not start.done() and not (daemon.process and _size(new) > least):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.001)
        if not start.done() and daemon.process is not None:
            daemon.process.kill()
        with contextlib.suppress(NotStarted):
            await start
        if daemon.process is not None:  # it was quicker than this process could see
            daemon.kill()
    with running(path.parent) as daemon:
        async with peer(daemon, "host-token") as host:
            assert len((await host.call("runs.list"))["runs"]) == 40
            assert len(await read_log(host, "run-7")) == 1000
        assert not new.exists()
        assert not list(path.parent.glob("*.carried-*"))
        assert len(list(path.parent.glob("carserver.db.damaged-*Z"))) == 1


async def test_where_there_is_no_room_for_what_can_be_trusted_that_is_said_and_the_file_is_not_touched(
    tmp_path: Path, chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = await database(tmp_path / "state", chance)
    blank(path, page_of(path, "runs_by_time"))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(salvage.Salvage, "_insert", full)
    with pytest.raises(StorageError, match="database or disk is full; it was not touched: make room") as refused:
        recovery.open_database(path, Settings())
    assert str(path) in str(refused.value)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# Damage that shows later.


async def test_damage_that_a_read_meets_is_told_counted_and_marked_and_the_next_start_sets_the_file_aside(
    start: StartDaemon,
) -> None:
    daemon = start(check_bytes=1)
    async with peer(daemon) as owner:
        broken, sound = [(await owner.create())["id"] for _ in range(2)]
        await owner.record(broken, *[{"type": "text_delta", "text": f"marker-{n:03}"} for n in range(200)])
        await owner.record(sound, {"type": "text_delta", "text": "on"})
    assert daemon.terminate() == 0
    file = daemon.state / "carserver.db"
    content = bytearray(file.read_bytes())
    content[content.index(b"marker-123") + 9] ^= 1
    file.write_bytes(content)
    daemon.start()
    mark = daemon.state / "damaged"
    async with peer(daemon) as owner:
        assert (await asyncio.to_thread(daemon.metrics))["storage_damage"] == 0
        for _ in range(3):
            with pytest.raises(Refused, match="event 123 of run"):
                await owner.call("runs.events", {"run_id": broken, "after": 123})
        assert (await asyncio.to_thread(daemon.metrics))["storage_damage"] == 3
    assert daemon.log.count("restart the daemon: it then checks all of") == 1
    assert "event 123" in mark.read_text()
    daemon.kill()
    daemon.start()
    assert not mark.exists()
    (aside,) = daemon.state.glob("carserver.db.damaged-*Z")
    assert f"it is kept as {aside}; 1 runs (1 events) and 0 outputs were carried over, 1 runs" in daemon.log
    assert f"runs that are not carried over: '{broken}'" in daemon.log
    assert "restore a backup" in daemon.log
    async with peer(daemon) as owner:
        assert len(await read_log(owner, sound)) == 1
        with pytest.raises(Refused, match="unknown run"):
            await owner.call("runs.get", {"run_id": broken})
        number = (await owner.create())["id"]
        await owner.record(number, {"type": "text_delta", "text": "more"})
    assert aside.read_bytes() == content


async def test_an_index_that_is_damaged_in_a_large_file_is_found_a_little_later_and_costs_no_run(
    start: StartDaemon,
) -> None:
    daemon = start(check_bytes=1, check_after_s=0.01)
    async with peer(daemon) as owner:
        runs = [(await owner.create(agent_id="a"))["id"] for _ in range(5)]
    daemon.terminate()
    daemon.start()
    while "was checked: nothing was found" not in daemon.log:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.01)
    assert (await asyncio.to_thread(daemon.metrics))["storage_damage"] == 0
    daemon.terminate()
    file = daemon.state / "carserver.db"
    blank(file, page_of(file, "runs_by_agent"))
    daemon.start()
    await daemon.until("storage_damage", 1)
    while not (daemon.state / "damaged").exists():  # noqa: ASYNC110 - another process: the mark follows the figure
        await asyncio.sleep(0.01)
    daemon.kill()
    daemon.start()
    assert len(list(daemon.state.glob("carserver.db.damaged-*Z"))) == 1
    async with peer(daemon) as owner:
        assert {run["id"] for run in (await owner.call("runs.list", {"agent_id": "a"}))["runs"]} == set(runs)


async def test_a_run_that_was_deleted_while_it_was_read_is_no_damage(tmp_path: Path) -> None:
    async with opened(tmp_path / "carserver.db") as store:
        await store.submit(create("run"))
        await store.append("run", event(0))
        head = await store.head("run")
        store.writing.execute("DELETE FROM events")
        store.writing.execute("DELETE FROM runs")
        with pytest.raises(Exception, match="was deleted, and its log with it"):
            await store.store.scan(head, 0, 1, 10, None)
        assert store.store.damage.count == 0
    assert not (tmp_path / "damaged").exists()


# What a start costs.


async def test_a_file_that_is_too_large_to_be_checked_whole_at_each_start_is_opened_without_reading_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "carserver.db"
    async with opened(path) as store:
        await store.submit(create("run"))
        await store.append("run", *[event(n, 1000) for n in range(1000)])
    statements: list[str] = []
    began = time.monotonic()
    original = open_reader

    def traced(file: Path) -> sqlite3.Connection:
        connection = original(file)
        connection.set_trace_callback(statements.append)
        return connection

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inspection, "open_reader", traced)
        inspection.inspect(path, 1, thorough=False)
        print(f"{(time.monotonic() - began) * 1000:.1f} ms")
        assert not any("integrity_check" in statement or "batches" in statement for statement in statements)
        inspection.inspect(path, 2**30, thorough=False)
        assert any("integrity_check" in statement for statement in statements)
