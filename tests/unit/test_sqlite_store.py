"""The store on real files: what is acknowledged and when, pages, damage, deadlines, overload, files not ours."""

import asyncio
import random
import sqlite3
import stat
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from carserver.config import Settings
from carserver.core.ports import Committed, Place
from carserver.core.principals import Principal
from carserver.core.runs import Entry, Head
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.protocol.runs import ListRuns
from carserver.stores import schema
from carserver.stores.recovery import open_database
from carserver.stores.rows import place, read_head
from tests.unit.storing import NOW_MS, Opened, create, event, opened, other_connection, record, write_lock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "carserver.db"


async def page(store: Opened, head: Head, start: int, stop: int, entries: int = 1000, size: int = 2**20) -> list[Entry]:
    """A page by its callback; raises what it was called back with."""
    future: asyncio.Future[list[Entry] | Exception] = asyncio.get_running_loop().create_future()
    store.store.page(head, start, stop, entries, size, future.set_result)
    result = await future
    if isinstance(result, Exception):
        raise result
    return result


# Commits.


async def test_changes_submitted_at_once_share_few_commits(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        before = store.counters.commits
        with write_lock(path):  # the first of them waits for it in a transaction, the others behind it
            appends = [asyncio.create_task(store.append("run", event(n))) for n in range(500)]
            await asyncio.sleep(0)
        answers = await asyncio.gather(*appends)
        print(f"500 appends in {store.counters.commits - before} commits")
        assert store.counters.commits - before <= 3
        assert store.counters.commands == 501
        assert sorted(answer.first_sequence for answer in answers) == list(range(500))


async def test_a_commit_is_published_in_the_logs_order_and_before_any_of_it_is_acknowledged(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        order: list[tuple[str, int]] = []
        store.store.on_commit(
            lambda changes: order.extend(
                ("published", entry.sequence)
                for change in changes
                if isinstance(change, Committed)
                for entry in change.applied.entries
            )
        )

        async def append(number: int) -> None:
            answer = await store.append("run", event(number))
            order.append(("acknowledged", answer.first_sequence))

        await asyncio.gather(*[append(number) for number in range(200)])
        published = [sequence for what, sequence in order if what == "published"]
        assert published == list(range(200))
        for sequence in range(200):
            assert order.index(("published", sequence)) < order.index(("acknowledged", sequence))
        # And what is published is in the file: another connection sees it.
        with other_connection(path) as connection:
            assert connection.execute("SELECT count(*) FROM events").fetchone() == (200,)


async def test_what_is_published_is_on_disk_at_that_moment(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        seen: list[int] = []

        def look(_: object) -> None:
            with other_connection(path) as connection:
                seen.append(connection.execute("SELECT count(*) FROM events").fetchone()[0])

        store.store.on_commit(look)
        for number in range(3):
            await store.append("run", event(number))
        assert seen == [1, 2, 3]


async def test_a_caller_who_is_gone_takes_nothing_back(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        with write_lock(path):
            gone = asyncio.create_task(store.append("run", event(0)))
            await asyncio.sleep(0)
            gone.cancel()
        assert (await store.append("run", event(1))).first_sequence == 1
        assert [len(change.applied.entries) for commit in store.published[1:] for change in commit] == [1, 1]


# Pages.


@pytest.fixture
def sizes() -> list[int]:
    return [100, 100, 100, 50_000, 100, 100]


async def test_a_page_ends_with_its_entries_or_its_bytes_and_has_at_least_one_entry(
    path: Path, sizes: list[int]
) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        await store.append("run", *[event(n, size) for n, size in enumerate(sizes)])
        head = await store.head("run")
        whole = await page(store, head, 0, 6)
        assert [entry.sequence for entry in whole] == [0, 1, 2, 3, 4, 5]
        assert [entry.raw for entry in whole] == [event(n, size).raw for n, size in enumerate(sizes)]
        bounds = [
            ((0, 6, 2, 2**20), [0, 1]),
            ((0, 6, 9, 300), [0, 1]),
            ((3, 6, 9, 300), [3]),
            ((0, 2, 9, 2**20), [0, 1]),
        ]
        bounds += [((5, 6, 9, 1), [5]), ((6, 6, 9, 9), [])]
        for (start, stop, entries, size), expected in bounds:
            assert [entry.sequence for entry in await page(store, head, start, stop, entries, size)] == expected


async def test_a_scan_ends_with_its_limit_its_bytes_or_what_it_may_look_at_and_says_where(
    path: Path, sizes: list[int]
) -> None:
    async with opened(path, page_bytes=300, scan_entries=4, scan_bytes=10_000) as store:
        await store.submit(create("run"))
        events = [event(n, size, "even" if n % 2 == 0 else "odd") for n, size in enumerate(sizes)]
        await store.append("run", *events)
        head = await store.head("run")

        async def scan(start: int, limit: int, *types: str) -> tuple[list[int], int]:
            found = await store.store.scan(head, start, 6, limit, types or None)
            return [entry.sequence for entry in found.entries], found.cursor

        assert await scan(0, 2) == ([0, 1], 2)
        assert await scan(0, 9) == ([0, 1], 2)  # 300 bytes
        assert await scan(3, 9) == ([3], 4)  # larger than a page, but one at least
        assert await scan(0, 9, "even") == ([0, 2], 4)  # four entries looked at
        assert await scan(1, 9, "none") == ([], 4)  # 10,000 bytes looked at
        assert await scan(4, 9, "none") == ([], 6)
        assert await scan(6, 9) == ([], 6)


async def test_a_list_is_newest_first_filtered_and_goes_on_after_its_place(path: Path) -> None:
    async with opened(path) as store:
        agent = Principal("agent", "smith")
        for number in range(6):  # the clock stands still for two, then goes back
            await store.submit(
                create(f"run-{number}", now_ms=NOW_MS + (0, 1, 1, 2, 0, 3)[number], session_id="even"[: number % 2])
            )
        await store.submit(create("other", owner=agent))

        async def ids(owner: str | None, after: Place | None = None, limit: int = 99, **filters: Any) -> list[str]:
            return [head.run.id for head in await store.store.list(owner, ListRuns(**filters), after, limit)]

        newest_first = ["run-5", "run-3", "run-2", "run-1", "run-4", "run-0"]
        assert await ids("client") == newest_first
        assert await ids("agent:smith") == ["other"]
        assert set(await ids(None)) == {*newest_first, "other"}
        assert await ids("client", limit=2) == newest_first[:2]
        assert await ids("client", session_id="e") == ["run-5", "run-3", "run-1"]
        assert await ids("client", created_after_ms=NOW_MS, created_before_ms=NOW_MS + 2) == ["run-2", "run-1"]
        for at in range(6):
            last = await store.head(newest_first[at])
            assert await ids("client", Place(last.run.created_at_ms, last.no)) == newest_first[at + 1 :]


async def test_a_list_of_large_runs_reads_no_more_than_a_page_and_shows_that_it_goes_on(path: Path) -> None:
    async with opened(path, page_bytes=25_000) as store:
        for number in range(20):
            await store.submit(create(f"run-{number}", prompt="x" * 10_000))
        assert len(await store.store.list("client", ListRuns(), None, 1000)) == 3
        assert len(await store.store.list("client", ListRuns(), None, 1)) == 1
        await store.submit(create("large", prompt="x" * 100_000, now_ms=NOW_MS + 1))
        heads = await store.store.list("client", ListRuns(), None, 1000)
        assert [head.run.id for head in heads] == ["large", "run-19"]  # the second tells that there are more


# Damage.


def damage(path: Path, sql: str, *values: object) -> None:
    with other_connection(path) as connection:
        assert connection.execute(sql, values).rowcount > 0


FLIPS = 200


def flip(connection: sqlite3.Connection, key: int, chance: random.Random) -> str:
    """Flips one bit of a stored event, or of what stands beside it; which column."""
    column = chance.choice(["event", "event", "at_ms", "status", "checksum"])
    (value,) = connection.execute(f"SELECT {column} FROM events WHERE place = ?", (key,)).fetchone()
    if isinstance(value, bytes):
        bit = chance.randrange(len(value) * 8)
        changed: object = bytes(byte ^ (1 << bit % 8 if at == bit // 8 else 0) for at, byte in enumerate(value))
    else:
        changed = value ^ 1 << chance.randrange(40)
    connection.execute(f"UPDATE events SET {column} = ? WHERE place = ?", (changed, key))
    return column


async def test_every_flipped_bit_is_found_and_none_is_served_and_what_is_before_it_can_be_read(path: Path) -> None:
    count, seed = 2 * FLIPS, random.randrange(2**32)
    chance = random.Random(seed)
    async with opened(path) as store:
        await store.submit(create("run"))
        await store.append("run", *[event(n, n % 50) for n in range(count)])
        head = await store.head("run")
    flipped = sorted(chance.sample(range(count), FLIPS))
    with other_connection(path) as connection:
        columns = [flip(connection, place(head.no, sequence), chance) for sequence in flipped]
    assert set(columns) == {"event", "at_ms", "status", "checksum"}

    served, found = [], []
    async with opened(path) as store:
        cursor = 0
        while cursor < count:
            try:
                entries = (await store.store.scan(head, cursor, count, 1000, None)).entries
            except RpcError as refusal:
                found.append((cursor, refusal))
                with pytest.raises(RpcError, match=f"event {cursor} of run 'run'"):
                    await page(store, head, cursor, count)
                cursor += 1
            else:
                assert await page(store, head, cursor, count) == entries
                served += [entry.sequence for entry in entries]
                assert [entry.raw for entry in entries] == [event(n, n % 50).raw for n in range(cursor, served[-1] + 1)]
                cursor = served[-1] + 1
    print(f"{len(found)} of {FLIPS} flipped bits found, {len(set(served) & set(flipped))} served (seed {seed})")
    assert [sequence for sequence, _ in found] == flipped, seed
    assert sorted(served + flipped) == list(range(count))
    for sequence, error in found:
        assert (error.kind, error.data["outcome"]) == (ErrorKind.UNAVAILABLE, "not_done")
        assert f"event {sequence} of run 'run' is missing or damaged" in error.message


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM events WHERE place = ?",
        "UPDATE events SET place = place + 1000 WHERE place = ?",
        "UPDATE events SET event = CAST(event AS TEXT) WHERE place = ?",
        "UPDATE events SET event = 7 WHERE place = ?",
        "UPDATE events SET at_ms = 'soon' WHERE place = ?",
        "UPDATE events SET at_ms = at_ms + 0.5 WHERE place = ?",
        "UPDATE events SET status = 256 + status WHERE place = ?",
        "REPLACE INTO events SELECT place + 1, at_ms, status, checksum, event FROM events WHERE place = ? - 1",
    ],
)
async def test_a_row_that_is_missing_moved_or_of_another_type_is_found(path: Path, sql: str) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        await store.append("run", *[event(n) for n in range(5)])
        head = await store.head("run")
    damage(path, sql, place(head.no, 3))
    async with opened(path) as store:
        found = await store.store.scan(head, 0, 5, 1000, None)
        assert ([entry.sequence for entry in found.entries], found.cursor) == ([0, 1, 2], 3)
        with pytest.raises(RpcError, match="event 3 of run 'run' is missing or damaged"):
            await store.store.scan(head, 3, 5, 1000, None)
        assert [entry.sequence for entry in await page(store, head, 4, 5)] == [4]


async def test_a_lost_tail_is_found_because_the_head_knows_how_many_there_were(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        await store.append("run", *[event(n) for n in range(5)])
        head = await store.head("run")
    damage(path, "DELETE FROM events WHERE place >= ?", place(head.no, 4))
    async with opened(path) as store:
        with pytest.raises(RpcError, match="event 4 of run 'run' is missing or damaged"):
            await page(store, head, 4, 5)


# Deadlines and bounds.


async def test_a_writer_that_is_blocked_makes_a_deadline_whose_outcome_is_unknown_and_the_batch_tells_it(
    path: Path,
) -> None:
    async with opened(path, storage_s=0.05) as store:
        await store.store.submit(create("run"), None, patient=True)  # however long the disk takes
        batch = record("run", event(0), batch_id="b")
        with write_lock(path):
            with pytest.raises(RpcError, match=r"within 0\.05 s; whether it was done is unknown") as refusal:
                await store.submit(batch)
            assert refusal.value.kind is ErrorKind.DEADLINE_EXCEEDED
            assert store.counters.storage_deadlines == 1
        again = await store.store.submit(batch, None, patient=True)  # it was done after all
        assert (again.first_sequence, again.cursor) == (0, 1)
        with other_connection(path) as connection:
            head = read_head(connection, "run")
        assert head is not None
        assert head.cursor == 1
        assert sum(len(change.applied.entries) for commit in store.published for change in commit) == 1


async def test_a_reader_that_is_blocked_makes_a_deadline(path: Path) -> None:
    async with opened(path, storage_s=0.05, read_threads=1) as store:
        await store.store.submit(create("run"), None, patient=True)
        release = _block_reader(store)
        with pytest.raises(RpcError, match="storage did not answer") as refusal:
            await store.store.head("run")
        assert refusal.value.kind is ErrorKind.DEADLINE_EXCEEDED
        release()
        found = None
        while found is None:
            with suppress(RpcError):  # on a machine with much else to do
                found = await store.store.head("run")
        assert found.run.id == "run"


def _block_reader(store: Opened) -> Callable[[], None]:
    """Keeps the one reader thread busy until what is returned is called."""
    gate = threading.Event()
    store.store._readers._pool.submit(gate.wait)
    return gate.set


async def test_more_changes_than_may_wait_are_overloaded_and_the_others_are_done(path: Path) -> None:
    async with opened(path, write_queue=4) as store:
        await store.submit(create("run"))
        with write_lock(path):
            waiting = [asyncio.create_task(store.append("run", event(n))) for n in range(4)]
            await asyncio.sleep(0)
            with pytest.raises(RpcError) as refusal:
                await store.append("run", event(9))
            assert (refusal.value.kind, refusal.value.data) == (ErrorKind.OVERLOADED, {"retry_after_ms": 1000})
            assert store.store.status().waiting_commands == 4
        assert sorted(answer.first_sequence for answer in await asyncio.gather(*waiting)) == [0, 1, 2, 3]
        assert (await store.append("run", event(9))).first_sequence == 4
        assert store.store.status().waiting_commands == 0


async def test_more_bytes_than_may_wait_are_overloaded(path: Path) -> None:
    async with opened(path, write_queue_bytes=10_000) as store:
        await store.submit(create("run"))
        with write_lock(path):
            waiting = asyncio.create_task(store.append("run", event(0, 20_000)))  # one always may
            await asyncio.sleep(0)
            with pytest.raises(RpcError) as refusal:
                await store.append("run", event(1))
            assert refusal.value.kind is ErrorKind.OVERLOADED
        assert (await waiting).first_sequence == 0
        assert (await store.append("run", event(1))).first_sequence == 1


async def test_more_reads_than_may_wait_are_overloaded(path: Path) -> None:
    async with opened(path, read_queue=2, read_threads=1) as store:
        await store.submit(create("run"))
        release = _block_reader(store)
        waiting = [asyncio.create_task(store.head("run")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(RpcError) as refusal:
            await store.store.head("run")
        assert refusal.value.kind is ErrorKind.OVERLOADED
        release()
        assert [head.run.id for head in await asyncio.gather(*waiting)] == ["run", "run"]


# Files.


@pytest.mark.parametrize(("durability", "synchronous"), [("full", 2), ("normal", 1)])
async def test_durability_is_what_sqlite_was_told_and_the_files_are_for_their_owner_alone(
    path: Path, durability: str, synchronous: int
) -> None:
    async with opened(path, durability=durability) as store:
        await store.submit(create("run"))
        assert store.writing.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        assert store.writing.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        await store.head("run")
        for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


async def test_a_reader_cannot_write(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        with closing(schema.open_reader(path)) as reader, pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.execute("DELETE FROM runs")


async def test_a_store_that_is_opened_again_knows_the_boot_before_and_the_live_runs(path: Path) -> None:
    async with opened(path) as store:
        assert (store.store.old_boot_id, store.store.found_live) == (None, [])
        await store.submit(create("live"))
        await store.submit(create("over"))
        await store.append("over", event(0, type_="agent_end")._replace(text="done"))
    async with opened(path) as store:
        assert store.store.old_boot_id == "boot"
        assert [live.run_id for live in store.store.found_live] == ["live"]


def _newer(path: Path) -> None:
    schema.open_writer(path, synchronous="FULL").close()
    with other_connection(path) as connection:
        connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")


def _foreign(path: Path) -> None:
    with other_connection(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_newer, f"schema version {schema.VERSION + 1}, this carserver knows {schema.VERSION}"),
        (_foreign, "database of another program"),
    ],
)
def test_a_file_that_is_newer_or_foreign_is_refused_in_words_and_stays_as_it_was(
    path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(path)
    before = path.read_bytes()
    for refuse in (lambda: schema.open_writer(path, synchronous="FULL"), lambda: open_database(path, Settings())):
        with pytest.raises(schema.StorageError, match=message) as refusal:
            refuse()
        assert str(path) in str(refusal.value)
        assert path.read_bytes() == before
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def _garbage(path: Path) -> None:
    path.write_bytes(b"not a database at all\n" * 1000)


def _cut(path: Path) -> None:
    schema.open_writer(path, synchronous="FULL").close()
    path.write_bytes(path.read_bytes()[:5000])


def _renumbered(path: Path) -> None:
    schema.open_writer(path, synchronous="FULL").close()
    with other_connection(path) as connection:
        connection.execute("PRAGMA user_version = 0")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_garbage, "file is not a database"),
        (_cut, "malformed"),
        (_renumbered, "it has schema version 0"),
    ],
)
def test_a_file_that_is_damaged_is_set_aside_as_it_was_and_a_new_one_takes_its_place(
    path: Path, make: Callable[[Path], None], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(path)
    before = path.read_bytes()
    with pytest.raises(schema.DamagedFile, match=message):
        schema.open_writer(path, synchronous="FULL")
    open_database(path, Settings()).connection.close()
    (aside,) = path.parent.glob("carserver.db.damaged-*")
    assert aside.read_bytes() == before
    assert message in caplog.messages[-1]
    assert f"it is kept as {aside}" in caplog.messages[-1]
    open_database(path, Settings()).connection.close()
    assert list(path.parent.glob("carserver.db.damaged-*")) == [aside]


def test_a_place_where_no_file_can_be_is_refused_in_words(path: Path) -> None:
    path.mkdir()
    with pytest.raises(schema.StorageError, match=f"cannot open {path}"):
        schema.open_writer(path, synchronous="FULL")
