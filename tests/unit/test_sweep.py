"""The sweep: what deleted runs left goes in pieces, others are served between, and the file gets shorter."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from carserver.core.principals import HOST
from carserver.core.runs import Entry
from carserver.core.transfer import EventsPart, Import
from carserver.stores.rows import place
from tests.unit.editing import delete, fail, imported, over
from tests.unit.storing import NOW_MS, Opened, create, event, opened, other_connection, write_lock

BATCH = 500


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "carserver.db"


async def large(store: Opened, run_id: str, events: int = 6_000, size: int = 200) -> None:
    """A run of so many events that is over."""
    await store.submit(create(run_id))
    for first in range(0, events, BATCH):
        await store.append(
            run_id, *(event(number, size) for number in range(first, first + BATCH)), batch_id=f"{first}"
        )
    await store.submit(fail(run_id))


def count(path: Path, table: str) -> int:
    with other_connection(path) as connection:
        found: int = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    return found


def size(path: Path) -> int:
    return path.stat().st_size


async def swept(store: Opened) -> None:
    """The sweep has nothing left."""
    while store.store._writer._sweep.pending:  # noqa: ASYNC110 - another thread
        await asyncio.sleep(0.005)


async def test_events_batches_and_numbers_go_and_the_file_gets_shorter(path: Path) -> None:
    async with opened(path, sweep_pause_s=0.001, sweep_events=1_000) as store:
        await large(store, "run")
        await over(store, "stays", 3)
        store.writing.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        before = size(path)
        await store.store.edit(delete("run"))
        await swept(store)
        assert (count(path, "events"), count(path, "batches"), count(path, "dropped")) == (3, 0, 0)
        while size(path) > before / 2:  # noqa: ASYNC110 - by the checkpoint behind the last piece, in another thread
            await asyncio.sleep(0.005)
        print(f"{before} bytes before, {size(path)} after")
        with other_connection(path) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert (await store.append("stays", event(3))).first_sequence == 3


async def test_a_piece_is_bounded_by_events_and_by_bytes(path: Path) -> None:
    for settings, at_most in (({"sweep_events": 100}, 100), ({"sweep_bytes": 30_000}, 110)):
        async with opened(path, sweep_pause_s=0.001, **settings) as store:
            await large(store, "run", events=1_000, size=250)
            lefts: list[int] = []
            step = store.store._writer._sweep.step

            def stepped(step: Any = step, lefts: list[int] = lefts) -> int:
                written: int = step()
                lefts.append(store.writing.execute("SELECT count(*) FROM events").fetchone()[0])
                return written

            store.store._writer._sweep.step = stepped  # type: ignore[method-assign]
            await store.store.edit(delete("run"))
            await swept(store)
            gone = [before - after for before, after in zip([1_000, *lefts], lefts, strict=False)]
            assert max(gone) <= at_most
            assert sum(gone) == 1_000


async def test_many_small_runs_are_few_pieces(path: Path) -> None:
    async with opened(path, sweep_pause_s=0.001, sweep_events=1_000) as store:
        for number in range(30):
            await over(store, f"r{number}", 2)
        pieces: list[int] = []
        step = store.store._writer._sweep.step

        def stepped() -> int:
            written: int = step()
            pieces.append(written)
            return written

        store.store._writer._sweep.step = stepped  # type: ignore[method-assign]
        with write_lock(path):  # so that most of them are deleted before the first piece is taken
            work = [asyncio.create_task(store.store.edit(delete(f"r{number}"))) for number in range(30)]
            await asyncio.sleep(0)
        await asyncio.gather(*work)
        await swept(store)
        assert (count(path, "events"), count(path, "dropped")) == (0, 0)
        assert len(pieces) < 10


async def test_appends_go_on_while_it_sweeps(path: Path) -> None:
    async with opened(path, sweep_pause_s=0.001, sweep_events=50) as store:
        await large(store, "run")
        await store.submit(create("live"))
        sweep, appended, between = store.store._writer._sweep, 0, []
        step = sweep.step

        def stepped() -> int:
            """The first piece; those behind it when somebody appended twice, whichever thread is the faster one."""
            between.append(appended)
            if len(between) > 1 and appended < between[0] + 2:
                sweep.put_off(0.001)
                return 0
            return step()

        sweep.step = stepped  # type: ignore[method-assign]
        await store.store.edit(delete("run"))
        while sweep.pending:
            await store.append("live", event(appended))
            appended += 1
        assert (await store.head("live")).cursor == appended
        assert count(path, "events") == appended > 1


async def test_what_a_stopped_daemon_left_is_removed_by_the_next(path: Path) -> None:
    async with opened(path, sweep_pause_s=60) as store:
        await large(store, "run")
        await store.store.edit(delete("run"))
        while count(path, "events") == 6_000:  # noqa: ASYNC110 - another thread
            await asyncio.sleep(0.005)
    assert 0 < count(path, "events") < 6_000
    async with opened(path, sweep_pause_s=0.001) as store:
        await store.submit(create("run"))
        await store.append("run", event(0))
        await swept(store)
        head = await store.head("run")
        with other_connection(path) as connection:
            assert connection.execute("SELECT place FROM events").fetchall() == [(place(head.no, 0),)]


async def test_what_an_import_left_unfinished_is_removed_by_the_next_daemon_and_its_number_stays_used(
    path: Path,
) -> None:
    async with opened(path) as store:
        page = EventsPart("lines[1]", "half", [Entry(0, NOW_MS, 0, event(0).raw)])
        parts: list[Any] = [imported("half", event_count=2, updated_at_ms=NOW_MS), page]
        await store.store.edit(Import(principal=HOST, parts=parts, epoch="e", bytes=1))
    assert (count(path, "imports"), count(path, "events")) == (1, 1)
    async with opened(path, sweep_pause_s=0.001) as store:
        await swept(store)
        assert (count(path, "imports"), count(path, "dropped"), count(path, "events")) == (0, 0, 0)
        await store.submit(create("run"))
        assert (await store.head("run")).no == 2


async def test_a_sweep_that_fails_is_tried_again_later_and_holds_up_nobody(path: Path) -> None:
    async with opened(path, sweep_pause_s=0.001, probe_s=0.05) as store:
        await large(store, "run", events=500)
        sweep, failed = store.store._writer._sweep, asyncio.Event()
        step, loop = sweep.step, asyncio.get_running_loop()

        def failing() -> int:
            sweep.step = step  # type: ignore[method-assign]
            loop.call_soon_threadsafe(failed.set)
            raise sqlite3.OperationalError("disk I/O error")

        sweep.step = failing  # type: ignore[method-assign]
        await store.store.edit(delete("run"))
        await failed.wait()
        await store.submit(create("other"))
        await swept(store)
        assert count(path, "events") == 0
