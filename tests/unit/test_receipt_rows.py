"""Receipts, turns and outcomes in storage: kept with their run, gone with it, and found where a bit of them flipped."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from carserver.core.edits import KeptReceipt
from carserver.core.ports import Damaged
from carserver.core.principals import CLIENT, HOST
from carserver.core.receipts import CancelForReceipt, Finish, Receipted
from carserver.core.runs import EVENT, MODEL_TURN, TURN, Head
from carserver.protocol.errors import RpcError
from carserver.protocol.runs import Status
from carserver.stores.damage import Unreadable
from carserver.stores.inspection import inspect
from carserver.stores.receipts import ReceiptRows
from carserver.stores.rows import read_entries, read_head
from carserver.stores.salvage import Salvage
from carserver.stores.schema import DamagedFile, open_reader, open_writer
from tests.unit.editing import delete, fail
from tests.unit.storing import NOW_MS, Opened, complete, create, event, opened, other_connection, record_turns


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "carserver.db"


def cancel(run_id: str, key: str = "k", reason: str = "r") -> CancelForReceipt:
    """The first part of a cancel with a receipt."""
    return CancelForReceipt(principal=CLIENT, run_id=run_id, key=key, reason=reason, now_ms=NOW_MS + 3)


def finish(run_id: str, key: str = "k") -> Finish:
    """Its second part."""
    return Finish(principal=CLIENT, run_id=run_id, key=key, reason="r", confirmed=True)


async def turned(store: Opened, run_id: str) -> Head:
    """A run with an event, two turns and a model's, which was completed with an outcome."""
    await store.submit(create(run_id))
    await store.append(run_id, event(0))
    await store.submit(record_turns(run_id, b',"output":"o"}', b"}"))
    await store.submit(record_turns(run_id, b',"recorded_at":"now"}', kind=MODEL_TURN))
    await store.submit(complete(run_id, b'{"status":"success","n":1.50}'))
    return await store.head(run_id)


# Turns and outcomes.


async def test_turns_and_an_outcome_are_what_they_were_for_the_next_daemon(path: Path) -> None:
    async with opened(path) as store:
        head = await turned(store, "run")
        assert (head.turns, head.outcome, head.run.status) == (3, b'{"status":"success","n":1.50}', Status.COMPLETED)
    async with opened(path) as store:
        assert await store.head("run") == head
        log = (await store.store.scan(head, 0, head.cursor, 10, None)).entries
        assert [entry.kind for entry in log] == [EVENT, TURN, TURN, MODEL_TURN]
        assert [entry.raw for entry in log[1:]] == [
            b'{"type":"turn","index":1,"output":"o"}',
            b'{"type":"turn","index":2}',
            b'{"type":"model_turn","index":3,"recorded_at":"now"}',
        ]
        assert [entry.status for entry in log] == [0, 2, 2, 2]
    inspect(path, 2**30, thorough=True)


@pytest.mark.parametrize(
    ("change", "table"),
    [
        ("UPDATE runs SET turns = turns + 1", "runs"),
        ("UPDATE texts SET outcome = x'7b7d'", "texts"),
        ("UPDATE texts SET outcome = NULL", "texts"),
        ("UPDATE receipts SET final = 0", "receipts"),
        ("UPDATE receipts SET no = no + 1", "receipts"),
        ("UPDATE receipts SET receipt = x'7b7d'", "receipts"),
    ],
)
async def test_a_value_that_changed_is_found_by_a_start_and_by_a_read(path: Path, change: str, table: str) -> None:
    async with opened(path) as store:
        await turned(store, "run")
        await store.store.edit(cancel("run"))
    with other_connection(path) as connection:
        connection.execute(change)
    with pytest.raises(DamagedFile, match=f"a row of {table!r}"):
        inspect(path, 2**30, thorough=False)
    async with opened(path, check_bytes=1) as store:
        with pytest.raises(RpcError, match="damaged"):
            await (store.store.edit(cancel("run")) if table == "receipts" else store.head("run"))


@pytest.mark.parametrize("bit", range(8))
async def test_a_bit_of_an_entrys_kind_or_status_that_flipped_is_found_by_a_read(path: Path, bit: int) -> None:
    async with opened(path) as store:
        head = await turned(store, "run")
    with other_connection(path) as connection:
        connection.execute(f"UPDATE events SET status = (status | {1 << bit}) - (status & {1 << bit}) WHERE at_ms")
    with contextlib.closing(open_reader(path)) as connection, pytest.raises(Damaged, match="event 0 of run 'run'"):
        list(read_entries(connection, head, 0, head.cursor))


# Receipts.


async def test_the_same_key_has_the_same_receipt_until_the_final_one_takes_its_place(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        first = await store.store.edit(cancel("run"))
        assert (first.final, first.is_new) == (False, True)
        assert await store.store.edit(cancel("run")) == Receipted(first.receipt, final=False, is_new=False)
        last = await store.store.edit(finish("run"))
        assert last != first.receipt
    async with opened(path) as store:
        assert await store.store.edit(cancel("run")) == Receipted(last, final=True, is_new=False)
        with pytest.raises(RpcError, match="another run_id or reason"):
            await store.store.edit(cancel("run", reason="other"))
        assert (await store.store.edit(cancel("run", key="other"))).is_new
    inspect(path, 2**30, thorough=True)


async def test_a_run_that_was_deleted_and_made_anew_has_no_receipt_of_the_old_ones_cancel(path: Path) -> None:
    async with opened(path) as store:
        await store.submit(create("run"))
        await store.store.edit(cancel("run"))
        await store.store.edit(delete("run"))
        await store.submit(create("run"))
        with pytest.raises(RpcError, match="run"):
            await store.store.edit(finish("run"))
        assert (await store.store.edit(cancel("run"))).is_new
        assert (await store.head("run")).run.status is Status.CANCELLED


async def test_receipts_go_with_their_run_and_no_others(path: Path) -> None:
    async with opened(path) as store:
        for run_id in ("one", "two"):
            await store.submit(create(run_id))
            for key in "ab":
                await store.store.edit(cancel(run_id, key=f"{key} of {run_id}"))
        await store.store.edit(delete("one"))
        assert store.writing.execute("SELECT key FROM receipts").fetchall() == [("a of two",), ("b of two",)]
        await store.submit(create("one"))
        await store.submit(fail("one"))
        assert (await store.store.edit(cancel("one", key="a of one"))).is_new


@contextlib.contextmanager
def rows(path: Path) -> Iterator[tuple[sqlite3.Connection, ReceiptRows]]:
    """Receipts as the writer has them."""
    with contextlib.closing(open_writer(path, synchronous="FULL")) as connection:
        yield connection, ReceiptRows(connection)


def kept(key: str, owner: str = CLIENT.name, receipt: bytes = b"{}", *, final: bool = False) -> KeptReceipt:
    """A receipt of some run."""
    return KeptReceipt(owner, key, 1, b"digest", final, receipt)


def test_a_key_belongs_to_its_owner_and_what_is_put_takes_the_place_of_what_was_there(path: Path) -> None:
    with rows(path) as (_, receipts):
        assert receipts.get(CLIENT.name, "k") is None
        for one in (kept("k"), kept("k", HOST.name), kept("k", receipt=b'{"n":1}', final=True)):
            receipts.put(one)
            assert receipts.get(one.owner, "k") == one
        assert receipts.get(HOST.name, "k") == kept("k", HOST.name)


def test_no_bit_of_a_key_that_flips_makes_a_receipt_unknown(path: Path) -> None:
    keys = [f"key-{n:03}" for n in range(100)]
    with rows(path) as (connection, receipts):
        for key in keys:
            receipts.put(kept(key))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    content = path.read_bytes()
    at = content.index(b"clientkey-050") + len("client")
    found = 0
    for bit in range(8 * len("key-050")):
        changed = bytearray(content)
        changed[at + bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with rows(path) as (_, receipts):
            try:
                there = receipts.get(CLIENT.name, "key-050")
            except (Damaged, *Unreadable):
                found += 1
            else:
                assert there == kept("key-050")
    assert found > 0


# Carrying over.


async def test_a_damaged_file_is_carried_over_with_its_turns_outcomes_and_receipts(path: Path, tmp_path: Path) -> None:
    async with opened(path) as store:
        heads = [await turned(store, f"run-{number}") for number in range(3)]
        for head in heads:
            await store.store.edit(cancel(head.run.id, key=head.run.id))
    with other_connection(path) as connection:
        connection.execute("UPDATE runs SET turns = 4 WHERE id = 'run-1'")
    salvage = Salvage(path)
    salvage.into(tmp_path / "new")
    assert (salvage.runs, salvage.events, salvage.lost) == (2, 8, ["'run-1'"])
    assert (salvage.forgotten_receipts, salvage.forgotten_approvals) == (False, False)
    inspect(tmp_path / "new", 2**30, thorough=True)
    with contextlib.closing(open_reader(tmp_path / "new")) as connection, contextlib.closing(open_reader(path)) as old:
        assert connection.execute("SELECT key FROM receipts").fetchall() == [("run-0",), ("run-2",)]
        for head in (heads[0], heads[2]):
            assert read_head(connection, head.run.id) == head
            entries = [list(read_entries(file, head, 0, head.cursor)) for file in (connection, old)]
            assert entries[0] == entries[1]


async def test_where_a_receipt_or_an_approval_may_be_missing_that_is_said(path: Path, tmp_path: Path) -> None:
    async with opened(path) as store:
        await turned(store, "run")
        await store.store.edit(cancel("run"))
        store.writing.execute("INSERT INTO approvals VALUES ('a', 'client', 1, NULL, x'7b7d', 0)")
    with other_connection(path) as connection:
        connection.execute("UPDATE receipts SET final = 0")
    salvage = Salvage(path)
    salvage.into(tmp_path / "new")
    assert (salvage.runs, salvage.forgotten_receipts, salvage.forgotten_approvals) == (1, True, True)
    inspect(tmp_path / "new", 2**30, thorough=True)
    with contextlib.closing(open_reader(tmp_path / "new")) as connection:
        for table in ("receipts", "approvals"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
