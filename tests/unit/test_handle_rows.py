"""What handles leave in storage: their events, their rows, their keys; and what undoes, damages and carries it over."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from carserver.core.edits import Edit, Edited, OpenHandle, Stored
from carserver.core.handleedits import Opened
from carserver.core.ports import Damaged, Done
from carserver.core.principals import CLIENT, HOST, Principal
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.protocol.runs import Status
from carserver.stores.damage import Unreadable
from carserver.stores.handles import HandleRows
from carserver.stores.inspection import inspect
from carserver.stores.salvage import Salvage
from carserver.stores.schema import DamagedFile, open_reader, open_writer
from tests.fault.flips import flip, listening
from tests.fault.test_migration import former
from tests.unit.editing import delete, fail, over
from tests.unit.handling import DAY_MS, close_handle, open_handle, used
from tests.unit.storing import NOW_MS, create, event, opened, other_connection, record, together, write_lock
from tests.unit.storing import Opened as Store

PAGE = 4096
SMALLEST_PAGE = 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "carserver.db"


async def log_of(store: Store, run_id: str) -> list[str]:
    """The types of a run's events."""
    head = await store.head(run_id)
    scan = await store.store.scan(head, 0, head.cursor, 1000, None)
    return [entry.raw.split(b'"')[3].decode() for entry in scan.entries]


async def refused(store: Store, edit: Edit) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await store.store.edit(edit)
    return caught.value


# Opening and closing.


async def test_an_open_handle_is_in_its_runs_log_and_found_by_the_next_daemon_which_closes_it(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        assert await store.store.edit(open_handle("a", "run")) == Opened("a", is_new=True)
        await store.store.edit(open_handle("b", "run"))
        await store.store.edit(close_handle("b", "run", ends=2))
        await store.store.edit(open_handle("c"))
        assert store.store.found_open == []
    async with opened(path) as store:
        assert store.store.found_open == [OpenHandle("a", "run", "grep")]
        await store.store.edit(close_handle("a", "run"))
        await store.store.edit(close_handle("a", "run"))
        told = ["tool_start", "tool_start", "tool_output_delta", "tool_end", "tool_end"]
        assert await log_of(store, "run") == told
        assert (await store.head("run")).run.status is Status.CREATED
    async with opened(path) as store:
        assert store.store.found_open == []
    inspect(path, 2**30, thorough=True)


async def test_who_publishes_is_told_the_events_and_by_whom_they_were_made(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        before = await store.head("run")
        by: Any = object()
        await store.store.edit(open_handle("a", "run"), by)
        (done,) = store.published[-1]
        assert isinstance(done, Done)
        (change,) = done.edited.applied
        assert (done.by, change.before, change.applied.head) == (by, before, await store.head("run"))
        assert [entry.sequence for entry in change.applied.entries] == [0]


async def test_no_tool_starts_in_a_run_that_is_over_or_anothers_and_its_key_is_not_used(path: Path) -> None:
    async with opened(path) as store:
        await over(store, "over")
        await store.submit(create("run"))
        assert (await refused(store, open_handle("a", "over", key=used("k")))).data == {"reason": "run_terminal"}
        assert (await refused(store, open_handle("a", "none", key=used("k")))).kind is ErrorKind.NOT_FOUND
        stranger = open_handle("a", "run", by=Principal("agent", "a"))
        assert (await refused(store, stranger)).kind is ErrorKind.NOT_FOUND
        assert (await refused(store, open_handle("a", "run", by=HOST))).kind is ErrorKind.FORBIDDEN
        assert await store.store.edit(open_handle("b", "run", key=used("k", "b"))) == Opened("b", is_new=True)
    async with opened(path) as store:
        assert store.store.found_open == [OpenHandle("b", "run", "grep")]


async def test_a_run_under_the_id_of_a_deleted_one_gets_no_end_of_a_tool_that_it_did_not_start(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        await store.store.edit(open_handle("a", "run"))
        await store.submit(fail("run"))
        await store.store.edit(delete("run"))
        await store.submit(create("run"))
        await store.store.edit(close_handle("a", "run"))
        assert await log_of(store, "run") == []
    async with opened(path) as store:
        assert store.store.found_open == []


# What is undone.


class Breaking(Edit, frozen=True, kw_only=True):
    """Does what an edit does, then raises."""

    does: Edit
    error: Exception

    def edit(self, stored: Stored) -> Edited:
        self.does.edit(stored)
        raise self.error


async def test_an_edit_that_raises_leaves_a_head_that_was_not_flushed_as_it_was(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        await store.store.edit(open_handle("old", "run"))
        first, new, a, b, c, then, last = await together(
            store,
            record("run", event(0)),
            create("new"),
            record("run", event(1)),
            Breaking(principal=CLIENT, does=open_handle("a", "run", key=used("k")), error=ZeroDivisionError("x")),
            Breaking(principal=CLIENT, does=close_handle("old", "run", ends=3), error=ZeroDivisionError("x")),
            Breaking(principal=CLIENT, does=open_handle("b", "new"), error=ZeroDivisionError("x")),
            record("run", event(2)),
        )
        assert (first.cursor, new.event_count, a.cursor, last.cursor) == (2, 0, 3, 4)
        assert all(isinstance(error, ZeroDivisionError) for error in (b, c, then))
        both = await together(store, record("new", event(0)), open_handle("a", "run", key=used("k", "a")))
        assert both[0].first_sequence == 0
        assert both[1] == Opened("a", is_new=True), "the key was not used"
        kinds = ["tool_start", *["text_delta"] * 3, "tool_start"]
        assert await log_of(store, "run") == kinds
    async with opened(path) as store:
        assert await log_of(store, "run") == kinds
        assert {row.handle for row in store.store.found_open} == {"old", "a"}


async def test_an_edits_change_a_delete_and_what_comes_after_share_a_commit_in_their_order(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        results = await together(
            store,
            record("run", event(0)),
            open_handle("a", "run"),
            close_handle("a", "run"),
            record("run", event(1)),
            fail("run"),
            delete("run"),
            create("run"),
            open_handle("b", "run"),
            record("run", event(0)),
        )
        assert [result for result in results if isinstance(result, BaseException)] == []
        assert await log_of(store, "run") == ["tool_start", "text_delta"]


async def test_after_a_commit_that_failed_a_handle_is_not_open_and_its_key_not_used(path: Path) -> None:
    async with opened(path, probe_s=0.01) as store:
        await store.submit(create("run"))
        pages = store.writing.execute("PRAGMA page_count").fetchone()[0]
        store.writing.execute(f"PRAGMA max_page_count = {pages}")
        failed, _ = await together(store, open_handle("a", "run", key=used("k")), record("run", event(0, 500_000)))
        assert isinstance(failed, RpcError)
        store.writing.execute(f"PRAGMA max_page_count = {2**30}")
        assert await store.store.edit(open_handle("b", "run", key=used("k", "b"))) == Opened("b", is_new=True)
        assert (await log_of(store, "run"))[-1] == "tool_start"


# Keys.


async def test_a_key_is_one_handle_whose_it_is_and_of_one_method_also_after_a_restart(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        await store.store.edit(open_handle("a", "run", key=used("k", "a")))
    for _ in range(2):
        async with opened(path) as store:
            again = open_handle("b", "run", key=used("k", "b", at_ms=NOW_MS + 1))
            assert await store.store.edit(again) == Opened("a", is_new=False)
            other = await refused(store, open_handle("b", "run", key=used("k", "b", said=b"other")))
            assert other.data == {"reason": "key_reused", "handle": "a"}
            assert await log_of(store, "run") == ["tool_start"]
    async with opened(path) as store:
        for key in (used("k", "c", owner="host"), used("k", "c")._replace(method="tools.call"), used("K", "c")):
            assert (await store.store.edit(open_handle("c", key=key))).is_new


async def test_what_waits_together_with_the_same_key_is_one_handle(path: Path) -> None:
    async with opened(path) as store:
        edits = [open_handle(str(number), key=used("k", str(number))) for number in range(5)]
        found = await together(store, *edits)
        assert [result.handle for result in found] == ["0"] * 5
        assert [result.is_new for result in found] == [True, False, False, False, False]


@contextlib.contextmanager
def rows(path: Path) -> Iterator[HandleRows]:
    with contextlib.closing(open_writer(path, synchronous="OFF")) as connection:
        yield HandleRows(connection)


def test_old_keys_are_forgotten_some_at_a_time_and_no_other(path: Path) -> None:
    with rows(path) as handles:
        for number in range(500):
            handles.use_key(used(f"k{number}", at_ms=NOW_MS + number))

        def left() -> list[int]:
            return [n for n in range(500) if handles.used_key("client", "tools.invoke", f"k{n}") is not None]

        handles.forget_keys(NOW_MS)
        assert left() == list(range(500))
        handles.forget_keys(NOW_MS + 450)
        assert left() == list(range(200, 500))
        for _ in range(3):
            handles.forget_keys(NOW_MS + 450)
        assert left() == list(range(450, 500))


async def test_a_key_is_free_again_when_it_was_kept_for_its_time(path: Path) -> None:
    async with opened(path) as store:
        await store.store.edit(open_handle("a", key=used("k", "a")))
        late = used("k", "b", at_ms=NOW_MS + DAY_MS + 1)
        for now_ms, handle in ((NOW_MS + DAY_MS, "a"), (NOW_MS + DAY_MS + 1, "b")):
            assert (await store.store.edit(open_handle("b", key=late, now_ms=now_ms))).handle == handle


# Waiting.


async def test_who_is_patient_is_told_the_outcome_however_long_it_takes(path: Path) -> None:
    async with opened(path, storage_s=0.05) as store:
        await store.store.submit(create("run"), None, patient=True)  # however long the disk takes
        with write_lock(path):
            patient = asyncio.create_task(store.store.edit(open_handle("a", "run"), patient=True))
            command = asyncio.create_task(store.store.submit(record("run", event(0)), None, patient=True))
            with pytest.raises(RpcError) as late:
                await store.store.edit(open_handle("b"))
            assert late.value.kind is ErrorKind.DEADLINE_EXCEEDED
            assert not patient.done()
            assert not command.done()
        assert await patient == Opened("a", is_new=True)
        assert (await command).first_sequence == 1


# Damage.


@pytest.mark.parametrize(
    "damage",
    ["key = 'x'", "owner = 'host'", "handle = 'x'", "digest = x'00'", "at_ms = 1", "method = 'tools.call'"],
)
async def test_a_key_that_a_damaged_row_may_hide_runs_nothing(path: Path, damage: str) -> None:
    async with opened(path) as store:
        await store.store.edit(open_handle("a", key=used("k", "a")))
        with other_connection(path) as connection:
            connection.execute(f"UPDATE tool_keys SET {damage}")
        again = await refused(store, open_handle("b", key=used("k", "b", at_ms=NOW_MS + 2 * DAY_MS)))
        assert isinstance(again, Damaged)
        assert isinstance(await refused(store, open_handle("b", now_ms=NOW_MS + 2 * DAY_MS, key=used("k"))), Damaged)
        assert (await store.store.edit(open_handle("c"))).is_new
        assert store.store.damage.count == 2
    with pytest.raises(DamagedFile, match="tool_keys"):
        inspect(path, 2**30, thorough=False)


def test_a_flipped_bit_in_the_rows_of_keys_makes_no_key_free_and_one_in_their_tree_seldom(tmp_path: Path) -> None:
    content = _small_tree(tmp_path / "keys.db", keys=40)
    types = [content[page] for page in range(0, len(content), SMALLEST_PAGE)][1:]
    assert types == [2, 10, 10, 10, 10, 10], "a root and five leaves"
    values = _values_of(content, keys=40)
    sought = (3, 17, 20, 38, 39)  # of one leaf, of another, of the root, of the end
    hidden = [
        bit // 8
        for bit in range(100 * 8, 8 * len(content))  # behind the file's own header
        for _ in _not_found(_flipped(content, bit), sought)
    ]
    assert [place for place in hidden if place in values] == []
    assert len(hidden) * 2_000 < 8 * len(content) * len(sought)


def _small_tree(path: Path, keys: int) -> bytes:
    """The file of a database with these keys alone, on pages as small as there are."""
    with rows(path.with_name("whole.db")) as whole:
        (table,) = whole._connection.execute("SELECT sql FROM sqlite_master WHERE name = 'tool_keys'").fetchone()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA page_size = {SMALLEST_PAGE}")
        connection.execute(table)
        for number in range(keys):
            HandleRows(connection).use_key(used(f"key-{number:03}", f"h{number}"))
    return path.read_bytes()


def _values_of(content: bytes, keys: int) -> set[int]:
    """The places of the bytes that are values of rows, not of the tree; without the checksums, which end the rows."""
    places: set[int] = set()
    for number in range(keys):
        start = content.index(f"clienttools.invokekey-{number:03}".encode())
        end = content.index(f"h{number}".encode(), start) + len(f"h{number}")
        places.update(range(start, end))
    return places


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _not_found(content: bytes, numbers: Sequence[int]) -> Iterator[str]:
    """The keys that seem to be free."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(content)
        for number in numbers:
            try:
                there = HandleRows(connection).used_key("client", "tools.invoke", f"key-{number:03}")
            except (Damaged, *Unreadable):
                continue
            if there is None:
                yield f"key-{number:03}"
            else:
                assert (there.handle, there.digest) == (f"h{number}", b"said")


def _breaks_head(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE runs SET revision = revision + 1 WHERE id = 'broken'")


def _breaks_text(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE texts SET prompt = CAST(x'ff' AS TEXT) WHERE no = (SELECT min(no) FROM runs)")


@pytest.mark.parametrize("breaks", [_breaks_head, _breaks_text])
async def test_a_damaged_run_is_the_refusal_of_its_own_handles(
    path: Path, breaks: Callable[[sqlite3.Connection], None]
) -> None:
    async with opened(path, writer_heads=1) as store:
        await store.submit(create("broken"))
        await store.store.edit(open_handle("old", "broken"))
        await store.submit(create("sound"))
        with other_connection(path) as connection:
            breaks(connection)
        sound, opens, closes, then = await together(
            store,
            open_handle("a", "sound"),
            open_handle("b", "broken"),
            close_handle("old", "broken"),
            record("sound", event(0)),
        )
        assert sound.is_new
        assert isinstance(opens, Damaged)
        assert isinstance(closes, Damaged)
        assert then.first_sequence == 1
        assert store.store.problem is None
        assert store.store.damage.count == 2


# Carrying over.


def salvaged(path: Path, target: Path) -> Salvage:
    """What can be trusted of a file, carried over."""
    salvage = Salvage(path)
    salvage.into(target)
    inspect(target, 2**30, thorough=True)
    return salvage


def handles_of(path: Path) -> tuple[set[str], int]:
    """The open handles of a file, and how many keys it has."""
    with contextlib.closing(open_reader(path)) as connection:
        found = {handle for (handle,) in connection.execute("SELECT handle FROM handles")}
        return found, connection.execute("SELECT count(*) FROM tool_keys").fetchone()[0]


def blank_pages_with(path: Path, text: bytes) -> None:
    """Each page of a file that has it somewhere."""
    content = path.read_bytes()
    pages = [content[start : start + PAGE] for start in range(0, len(content), PAGE)]
    path.write_bytes(b"".join(bytes(PAGE) if text in page else page for page in pages))


def spoil_an_event(path: Path, text: bytes) -> None:
    """The first that has it."""
    flip(path, 8 * path.read_bytes().index(text) + 3)


async def make(path: Path) -> None:
    """A file with three runs, a handle open in each, and 300 keys."""
    async with opened(path) as store:
        for number in range(3):
            await store.submit(create(f"run-{number}"))
            await store.store.edit(open_handle(f"h{number}", f"run-{number}"))
        await asyncio.gather(*(store.store.edit(open_handle(str(n), key=used(f"key-{n:03}"))) for n in range(300)))


async def test_handles_of_runs_that_are_carried_over_and_all_keys_are_too(path: Path, tmp_path: Path) -> None:
    await make(path)
    with other_connection(path) as connection:
        connection.execute("UPDATE runs SET revision = revision + 1 WHERE id = 'run-1'")
    salvage = salvaged(path, tmp_path / "new")
    assert handles_of(tmp_path / "new") == ({"h0", "h2"}, 300)
    assert (salvage.forgotten_keys, salvage.unclosed, len(salvage.lost)) == (False, False, 1)


async def test_where_keys_or_handles_may_be_missing_that_is_said_and_the_others_are_carried_over(path: Path) -> None:
    await make(path)
    blank_pages_with(path, b"key-150")
    with other_connection(path) as connection:
        connection.execute("UPDATE handles SET tool = 'other' WHERE handle = 'h1'")
    said: list[str] = []
    with listening(said):
        async with opened(path) as store:
            assert {row.handle for row in store.store.found_open} == {"h0", "h2"}
            assert (await store.store.edit(open_handle("x", key=used("key-000")))).is_new is False
            assert (await store.store.edit(open_handle("x", key=used("key-299")))).is_new is False
            assert (await store.store.edit(open_handle("x", key=used("key-150")))).is_new
    assert "a tool that was called before, and is called again now with the same key, may run twice" in said[-1]
    assert "a tool that was running may have no end in its run's log" in said[-1]
    assert "3 runs (3 events)" in said[-1]


async def test_of_a_damaged_file_of_version_2_no_key_is_missing(path: Path) -> None:
    former(path, 2)
    spoil_an_event(path, b"planning_start")
    salvage = salvaged(path, path.with_name("new"))
    assert (salvage.runs, salvage.outputs, salvage.forgotten_keys, salvage.unclosed) == (9, 5, False, False)
    assert handles_of(path.with_name("new")) == (set(), 0)


async def test_a_copy_that_is_put_in_place_says_that_what_was_done_since_is_not_in_it(path: Path) -> None:
    said: list[str] = []
    async with opened(path) as store:
        await store.store.edit(open_handle("a", key=used("k", "a")))
        await store.store.backup(str(path.with_name("copy")))
    with listening(said):
        for _ in range(2):
            async with opened(path.with_name("copy")) as store:
                assert (await store.store.edit(open_handle("b", key=used("k", "b")))).handle == "a"
    assert len(said) == 1
    assert "does not know what was done since" in said[0]
    assert "may run twice" in said[0]
