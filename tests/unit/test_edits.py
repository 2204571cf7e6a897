"""Edits within the writer's transaction: what they remove and add, what undoes them, and what their neighbours see."""

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast
from unittest.mock import Mock

import pytest

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.edits import Edit, Edited, Stored
from carserver.core.outputs import Output
from carserver.core.ports import Criteria, Damaged, Done, RunLog
from carserver.core.principals import CLIENT, HOST, Principal
from carserver.core.prune import Pruner, PruneRuns
from carserver.core.runs import Head
from carserver.core.runstore import RunStore
from carserver.core.transfer import Import, OutputPart, run_source
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.protocol.outputs import OutputRecord, Progress
from carserver.protocol.runs import Status
from carserver.stores.rows import read_head
from carserver.stores.runrows import BEFORE_ALL
from tests.unit.editing import delete, imported, over
from tests.unit.storing import NOW_MS, Opened, create, event, opened, other_connection, record, together
from tests.unit.test_retention import Clock

MIB = 1024 * 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "carserver.db"


async def refusal(store: Opened, edit: Edit) -> RpcError:
    with pytest.raises(RpcError) as refused:
        await store.store.edit(edit)
    return refused.value


# Deleting.


async def test_a_run_that_is_over_goes_and_who_publishes_is_told_its_head(path: Path) -> None:
    async with opened(path) as store:
        await over(store, "run", 3)
        head = await store.head("run")
        answer = await store.store.edit(delete("run"))
        assert answer.deleted
        assert await store.store.head("run") is None
        (done,) = store.published[-1]
        assert isinstance(done, Done)
        assert done.edited.deleted == [head]
        assert (await refusal(store, delete("run"))).kind is ErrorKind.NOT_FOUND


async def test_a_live_run_and_a_run_of_another_are_not_deleted(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("live"))
        await over(store, "run")
        assert (await refusal(store, delete("live"))).data == {"reason": "run_live"}
        assert (await refusal(store, delete("run", HOST))).kind is ErrorKind.FORBIDDEN
        stranger, nowhere = await refusal(store, delete("run", Principal("agent", "a"))), delete("no", CLIENT)
        assert (stranger.kind, stranger.data) == (ErrorKind.NOT_FOUND, (await refusal(store, nowhere)).data)
        assert (await store.head("run")).run.status is Status.FAILED


async def test_what_waits_with_a_delete_sees_the_run_go_and_come_again(path: Path) -> None:
    async with opened(path) as store:
        await over(store, "run", 2)
        old = await store.head("run")
        late, deleted, refused, created, appended = await together(
            store,
            record("run", event(9)),
            delete("run"),
            record("run", event(8)),
            create("run"),
            record("run", event(7)),
        )
        assert (late.cursor, deleted.deleted, created.event_count, appended.cursor) == (3, True, 0, 1)
        assert isinstance(refused, RpcError)
        assert refused.kind is ErrorKind.NOT_FOUND
        new = await store.head("run")
        assert new.no > old.no
        assert new.cursor == 1


async def test_a_number_is_never_used_again_not_even_after_a_restart(path: Path) -> None:
    numbers = []
    for _ in range(3):
        async with opened(path) as store:
            await over(store, "run")
            numbers.append((await store.head("run")).no)
            await store.store.edit(delete("run"))
    assert numbers == sorted(set(numbers)), "each is greater than the ones before"


# What is undone.


class Breaking(Edit, frozen=True, kw_only=True):
    """Does what it is told, then looks at the runs again, then raises."""

    does: Callable[[Stored], None]
    error: Exception
    looks_at: tuple[str, ...] = ()
    changes_runs: ClassVar[bool] = True

    def edit(self, stored: Stored) -> Edited:
        self.does(stored)
        for run_id in self.looks_at:
            stored.runs.head(run_id)
        raise self.error


def adds(run_id: str) -> Callable[[Stored], None]:
    head = create(run_id).head

    def add(stored: Stored) -> None:
        stored.runs.add(Head(no=stored.runs.new_no(), owner="host", run=head.run, revision=1, endings=0, last_at_ms=0))

    return add


def removes(run_id: str) -> Callable[[Stored], None]:
    def remove(stored: Stored) -> None:
        head = stored.runs.head(run_id)
        assert head is not None
        stored.runs.remove(head)

    return remove


async def test_an_edit_that_raises_leaves_nothing_and_spoils_no_neighbour(path: Path) -> None:
    async with opened(path) as store:
        await over(store, "run", 2)
        broken = Breaking(principal=HOST, does=removes("run"), error=ZeroDivisionError("x"), looks_at=("run",))
        added = Breaking(principal=HOST, does=adds("new"), error=ZeroDivisionError("x"), looks_at=("new",))
        before, first, second, after, nowhere = await together(
            store, record("run", event(2)), broken, added, record("run", event(3)), record("new", event(0), by=HOST)
        )
        assert (before.cursor, after.cursor) == (3, 4)
        assert isinstance(first, ZeroDivisionError)
        assert isinstance(second, ZeroDivisionError)
        assert isinstance(nowhere, RpcError)
        assert nowhere.kind is ErrorKind.NOT_FOUND, "the run that was not added is not there"
        assert (await store.head("run")).cursor == 4
        assert await store.store.head("new") is None
    async with opened(path) as store:
        assert (await store.append("run", event(4))).first_sequence == 4


async def test_after_a_commit_that_failed_runs_are_as_they_were(path: Path) -> None:
    async with opened(path, probe_s=0.01) as store:
        await over(store, "run", 2)
        pages = store.writing.execute("PRAGMA page_count").fetchone()[0]
        store.writing.execute(f"PRAGMA max_page_count = {pages}")
        results = await together(
            store,
            delete("run"),
            create("run"),
            record("run", *(event(number, 100_000) for number in range(20))),
        )
        assert [type(result) for result in results] == [RpcError] * 3
        store.writing.execute(f"PRAGMA max_page_count = {2**30}")
        assert (await store.append("run", event(2))).first_sequence == 2
        assert (await store.store.edit(delete("run"))).deleted


class Adding(Edit, frozen=True, kw_only=True):
    """Adds a run."""

    run_id: str
    changes_runs: ClassVar[bool] = True

    def edit(self, stored: Stored) -> Edited:
        adds(self.run_id)(stored)
        return Edited(None)


async def test_a_run_that_was_added_in_a_commit_that_failed_is_not_there(path: Path) -> None:
    async with opened(path, probe_s=0.01) as store:
        await over(store, "run")
        pages = store.writing.execute("PRAGMA page_count").fetchone()[0]
        store.writing.execute(f"PRAGMA max_page_count = {pages}")
        refused = record("new", event(0), by=HOST, expected_sequence=1)  # it reads the head, and changes nothing
        large = record("run", event(1, 500_000))
        added, *_ = await together(store, Adding(principal=HOST, run_id="new"), refused, large)
        store.writing.execute(f"PRAGMA max_page_count = {2**30}")
        assert isinstance(added, RpcError)
        with pytest.raises(RpcError, match="unknown run"):
            await store.append("new", event(0), by=HOST)


# Pruning.


async def prune(store: Opened, *, dry_run: bool = False, stopping: Callable[[], bool] = bool, **criteria: Any) -> Any:
    pruner = Pruner(store.store, store.store._settings, store.counters, stopping)
    return await pruner.prune(Criteria(**criteria), dry_run=dry_run)


async def left(store: Opened, *run_ids: str) -> list[str]:
    return [run_id for run_id in run_ids if await store.store.head(run_id) is not None]


async def test_the_oldest_ended_go_first_in_many_transactions_and_the_dry_run_said_so(path: Path) -> None:
    async with opened(path, prune_runs=2, page_entries=3) as store:
        names = [f"r{number}" for number in range(7)]
        for place, name in enumerate(reversed(names)):
            await over(store, name, at_ms=NOW_MS + 100 - place)  # r6 ended last, though it was made first
        await store.submit(create("live", now_ms=1))
        commits = store.counters.commits
        told = await prune(store, dry_run=True, max_runs=3)
        assert (told.runs, told.run_ids, told.more_runs, told.dry_run) == (5, names[:3], 2, True)
        assert store.counters.commits == commits
        done = await prune(store, max_runs=3)
        assert store.counters.commits == commits + 3
        assert (done.runs, done.bytes, done.run_ids, done.more_runs) == (5, told.bytes, told.run_ids, 2)
        assert await left(store, *names, "live") == ["r5", "r6", "live"]
        assert (await prune(store, max_runs=3)).runs == 0


async def test_the_write_ahead_log_stays_short_while_many_runs_with_outputs_come_and_go(path: Path) -> None:
    async with opened(path, wal_bytes=MIB) as store:
        largest, log = 0, Path(f"{path}-wal")
        names = random.Random(1)  # wherever they belong in the indexes, so that many pages are written
        for _ in range(20):
            parts: list[Any] = []
            for _ in range(50):
                ended = {"status": Status.FAILED, "ended_at_ms": NOW_MS, "updated_at_ms": NOW_MS}
                run = imported(f"run-{names.random()}", event_count=0, agent_id=f"a{names.random()}", **ended)
                parts += [run, *(_output(f"out-{names.getrandbits(40):010x}", run.run.id, names) for _ in range(3))]
            await store.store.edit(Import(principal=HOST, parts=parts, epoch="e", bytes=1))
            largest = max(largest, size(log))
        print(f"{largest} bytes of log for {size(path)} imported")
        assert largest < 6 * MIB
        assert (await prune(store, max_runs=0)).runs == 1_000
        print(f"{size(log)} bytes of log after all of them were pruned")
        assert size(log) < 6 * MIB


def size(path: Path) -> int:
    return path.stat().st_size


def _output(output_id: str, run_id: str, names: random.Random) -> OutputPart:
    record = OutputRecord(
        id=output_id,
        task_id=f"t{names.random()}",
        attempt=0,
        producer_agent=f"p{names.random()}",
        event=Progress(stage="s"),
        parent_refs=[],
        created_at_ms=NOW_MS,
        run_id=run_id,
    )
    return OutputPart("lines[0]", Output(owner="", record=record))


async def test_max_bytes_counts_what_live_runs_have_and_max_runs_counts_live_runs(path: Path) -> None:
    async with opened(path) as store:
        for place, name in enumerate(("a", "b", "c")):
            await over(store, name, 10, NOW_MS + place, size=1000)
        await store.submit(create("live"))
        await store.append("live", *(event(number, 1000) for number in range(10)))
        one = (await store.head("a")).log_bytes
        assert (await prune(store, dry_run=True, max_bytes=4 * one)).runs == 0
        assert (await prune(store, dry_run=True, max_bytes=4 * one - 1)).run_ids == ["a"]
        assert (await prune(store, dry_run=True, max_runs=0)).run_ids == ["a", "b", "c"]
        assert (await prune(store, max_bytes=0)).runs == 3
        assert await left(store, "a", "b", "c", "live") == ["live"]


async def test_by_age_goes_what_ended_before_not_what_began_before(path: Path) -> None:
    async with opened(path) as store:
        await over(store, "old", at_ms=NOW_MS + 10)
        await over(store, "new", at_ms=NOW_MS + 20)
        assert (await prune(store, before_ms=NOW_MS + 10)).runs == 0
        assert (await prune(store, before_ms=NOW_MS + 11)).run_ids == ["old"]
        assert (await prune(store, before_ms=-1)).runs == 0


async def test_a_run_that_went_on_since_the_plan_stays(path: Path) -> None:
    """One that is over when the plan is made, and live when its transaction comes."""
    async with opened(path) as store:
        await over(store, "a")
        plan = await store.store.plan(Criteria(max_runs=0), 10)
        assert plan.until is not None
        await store.store.edit(delete("a"))
        await store.submit(create("a"))
        edit = PruneRuns(principal=HOST, after=None, until=plan.until, runs=10, outputs=10)
        went = await store.store.edit(edit)
        assert (went.run_ids, went.last, went.more) == ([], None, False)
        assert await left(store, "a") == ["a"]


async def test_a_prune_that_a_drain_interrupts_has_deleted_whole_runs(path: Path) -> None:
    async with opened(path, prune_runs=1) as store:
        for place in range(4):
            await over(store, f"r{place}", at_ms=NOW_MS + 10 + place)
        looks = iter([False, False, False, True])
        with pytest.raises(RpcError) as refused:
            await prune(store, stopping=lambda: next(looks), max_runs=0)
        assert refused.value.kind is ErrorKind.UNAVAILABLE
        assert await left(store, "r0", "r1", "r2", "r3") == ["r2", "r3"]


async def test_a_damaged_run_stays_and_the_others_do_not_wait_for_it(path: Path) -> None:
    async with opened(path, prune_runs=1, writer_heads=1) as store:
        for place in range(3):
            await over(store, f"r{place}", at_ms=NOW_MS + 10 + place)
        with other_connection(path) as connection:
            connection.execute("UPDATE runs SET session_id = 'x' WHERE id = 'r1'")
        pruned = await prune(store, max_runs=0)
        assert (pruned.run_ids, pruned.damaged_runs) == (["r0", "r2"], 1)


def test_the_place_before_all_is_before_a_run_that_ended_at_no_time() -> None:
    assert BEFORE_ALL < (0, 0)


async def test_a_run_that_goes_or_comes_while_it_is_looked_for_is_no_damage(path: Path) -> None:
    async with opened(path) as store:
        for run_id in ("a", "c"):
            await over(store, run_id)
        with other_connection(path) as connection, other_connection(path) as meanwhile:
            goes = Meanwhile(connection, meanwhile, "DELETE FROM runs WHERE id IN ('a', 'c')")
            assert read_head(cast("sqlite3.Connection", goes), "b") is None
            assert not connection.in_transaction
        await over(store, "d")
        with other_connection(path) as connection, other_connection(path) as meanwhile:
            comes = Meanwhile(connection, meanwhile, "UPDATE runs SET id = 'b' WHERE id = 'd'")
            with pytest.raises(Damaged, match="its row is damaged"):  # it is found, and is not what was stored
                read_head(cast("sqlite3.Connection", comes), "b")
            assert not connection.in_transaction


class Meanwhile:
    """A connection; after its first statement, and each one that finds anything, somebody else does something."""

    def __init__(self, connection: sqlite3.Connection, other: sqlite3.Connection, does: str) -> None:
        self._connection = connection
        self._other = other
        self._does = does
        self._first = True

    def execute(self, *query: Any) -> Any:
        found = self._connection.execute(*query).fetchall()
        if found or self._first:
            self._first = False
            self._other.execute(self._does)
        return Mock(fetchone=lambda: found[0] if found else None, fetchall=lambda: found)

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction


# Importing.


async def test_unfinished_imports_are_bounded_and_the_first_goes_for_the_next(path: Path) -> None:
    async with opened(path, imports=2) as store:
        for name in ("a", "b", "c"):
            parts: list[Any] = [imported(name, event_count=1)]
            await store.store.edit(Import(principal=HOST, parts=parts, epoch="e", bytes=1))
        with other_connection(path) as connection:
            assert connection.execute("SELECT run_id FROM imports ORDER BY no").fetchall() == [("b",), ("c",)]
        assert store.store.imports_given_up == 1


def test_what_is_imported_is_counted_whether_or_not_its_importer_waits_for_the_answer() -> None:
    counters = Counters()
    runs = RunStore(cast("RunLog", None), Clock(), Settings(), counters)
    edit = Import(principal=HOST, parts=[], epoch="e", bytes=1)
    runs.committed([Done(edit, Edited(None, appeared=[create(run_id).head for run_id in ("a", "b")]))])
    assert counters.runs_imported == 2


async def test_a_run_without_events_is_there_at_once_and_is_the_same_as_its_line(path: Path) -> None:
    async with opened(path) as store:
        part = imported("a", event_count=0)
        answer = await store.store.edit(Import(principal=HOST, parts=[part], epoch="e", bytes=1))
        assert (answer.runs, answer.skipped) == (1, 0)
        head = await store.head("a")
        assert (head.owner, head.run.epoch, run_source(head)) == ("host", "e", part.source)
        (done,) = store.published[-1]
        assert done.edited.appeared == [head]
