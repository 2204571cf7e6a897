"""A database of a version before: it answers as it did and goes on; what cuts its migration off leaves it alone."""

import asyncio
import contextlib
import gzip
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from carserver.core.ports import Damaged
from carserver.core.principals import CLIENT, agent_token
from carserver.protocol.outputs import ListOutputs
from carserver.stores import schema
from carserver.stores.inspection import inspect
from carserver.stores.outputs import read_outputs
from carserver.stores.rows import read_head
from carserver.stores.salvage import Salvage
from tests.daemon import Daemon, NotStarted, running
from tests.fault.audit import read_log
from tests.fault.processes import environment
from tests.peer import Peer, peer

DATA = Path(__file__).parent.parent / "data"
KEYED = ["plain", "tools", "task", "plan", "err", "cancel"]  # the keys of its first runs; each has one batch, b0
RUNS = 3_000  # of a larger file, and 10 events each


def former(path: Path, version: int = 1) -> Path:
    """A file that a release before made."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(gzip.decompress((DATA / f"schema-{version}.db.gz").read_bytes()))
    path.chmod(0o600)
    return path


def answers(version: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What that release answered of it: runs with their logs, and outputs."""
    found = answered(version)
    return (found, []) if version == 1 else (found["runs"], found["outputs"])


def answered(version: int) -> Any:
    """All that it did; `tools` is a run with open handles, and the keys that there are (since version 3)."""
    return json.loads(gzip.decompress((DATA / f"schema-{version}.json.gz").read_bytes()))


def changed(path: Path, *statements: str) -> None:
    """Rows that are not what was stored."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that changes nothing."""
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        yield connection


def content(path: Path, version: int = 1) -> dict[str, list[Any]]:
    """Every row, as this version has it; but for the checksums of those that have more columns now."""
    runs = (
        "no, id, owner, session_id, agent_id, parent_run_id, epoch, key_digest, created_at_ms, status,"
        " event_count, updated_at_ms, ended_at_ms, last_at_ms, revision, endings"
    )
    texts = "no, prompt, outcome_description, metadata, result_text, error, cancel_reason, interrupted_reason"
    tables = {"runs": runs, "texts": texts, "events": "*"}
    tables["batches"] = "no, batch_id, digest, first_sequence, count, status"
    if version > 1:
        tables |= {"runs": f"{runs}, log_bytes", "batches": "*", "outputs": "*"}
    if version > 2:
        tables |= {"handles": "*", "tool_keys": "*"}
    with opened(path) as connection:
        return {name: connection.execute(f"SELECT {rows} FROM {name}").fetchall() for name, rows in tables.items()}


def version(path: Path) -> int:
    """Of its schema."""
    with opened(path) as connection:
        found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return found


def large(path: Path) -> Path:
    """A larger file of version 1: the same runs, with other names, many times."""
    former(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        execute = connection.execute
        execute("BEGIN")
        numbers = f"(WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {RUNS}) SELECT n FROM n)"
        run = ", ".join(
            {"no": "n + 10", "id": "'run-' || n", "event_count": "10"}.get(name, name)
            for _, name, *_ in execute("PRAGMA table_info(runs)").fetchall()
        )
        execute(f"INSERT INTO runs SELECT {run} FROM (SELECT * FROM runs WHERE no = 1), {numbers}")
        execute(f"INSERT INTO texts (no, prompt) SELECT n + 10, 'a prompt' FROM {numbers}")
        events = execute("SELECT place & 0xffffff, at_ms, status, event FROM events WHERE place >> 24 = 4 LIMIT 10")
        from carserver.stores.rows import checksum, place  # noqa: PLC0415

        rows = [
            (key := place(no, sequence), at_ms, status, checksum(key, at_ms, status, event), event)
            for sequence, at_ms, status, event in events.fetchall()
            for no in range(11, 11 + RUNS)
        ]
        connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)
        execute("COMMIT")
    return path


async def as_it_was(host: Peer, version: int) -> None:
    """All of it is answered, as that release did; and what was open is closed."""
    expected, outputs = answers(version)
    tools = answered(version)["tools"] if version > 2 else None
    listed = (await host.call("runs.list", {"limit": 1000}))["runs"]
    assert {run["id"] for run in listed} == {one["run"]["id"] for one in [*expected, *([tools] if tools else [])]}
    if tools:
        log = await read_log(host, tools["run"]["id"])
        count = len(tools["events"])
        assert [{name: entry[name] for name in tools["events"][0]} for entry in log[:count]] == tools["events"]
        assert {entry["event"]["type"] for entry in log[count:]} == {"tool_end"}
        assert sorted(entry["event"]["id"] for entry in log[count:]) == sorted(tools["open"])
    for one in expected:
        run = await host.call("runs.get", {"run_id": one["run"]["id"]})
        assert run == one["run"]
        log = await read_log(host, run["id"])
        assert [{name: entry[name] for name in one["events"][0]} for entry in log] == one["events"] or not log
    assert [record["id"] for record in (await host.call("outputs.list"))["outputs"]] == [one["id"] for one in outputs]
    for one in outputs:
        assert await host.call("outputs.get", {"id": one["id"]}) == one


@pytest.mark.parametrize("version", range(1, schema.VERSION))
async def test_a_file_of_a_version_before_answers_everything_as_it_did_and_work_goes_on_with_its_runs(
    tmp_path: Path, version: int
) -> None:
    path = former(tmp_path / "state" / "carserver.db", version)
    before, (expected, outputs) = content(path), answers(version)
    with running(path.parent) as daemon:
        async with peer(daemon, "host-token") as host, peer(daemon) as client:
            await as_it_was(host, version)
            agent = agent_token(daemon.token("agent-key"), "coder")
            async with peer(daemon, agent) as coder:
                owners = [client, host, coder] * 2
                for owner, name, one in zip(owners, KEYED, expected[: len(KEYED)], strict=True):
                    await _goes_on(owner, name, one)
            if version > 1:
                await _is_appended_once(client, outputs, expected[0]["run"]["id"])
            new = await client.create("new")
            await client.record(new["id"], {"type": "text_delta", "text": "new"}, batch_id="b0")
        daemon.kill()
        (daemon.state / "damaged").touch()  # so that every checksum is looked at
        daemon.start()
        assert "is sound: it stays in use" in daemon.log
        assert not (daemon.state / "damaged").exists()
        async with peer(daemon, "host-token") as host:
            assert (await host.call("runs.get", {"run_id": new["id"]}))["event_count"] == 1
            assert len((await host.call("runs.list"))["runs"]) == len(before["runs"]) + 1
    assert set(before["events"]) <= set(content(path)["events"])


async def _goes_on(owner: Peer, name: str, one: dict[str, Any]) -> None:
    """The same key is the same run, the same batch is the same answer, and the log goes on."""
    run, events = one["run"], [entry["event"] for entry in one["events"]]
    params = {"prompt": "", "session_id": run["session_id"], "metadata": run["metadata"], "idempotency_key": name}
    assert (await owner.create(**params))["id"] == run["id"]
    again = await owner.record(run["id"], *events, batch_id="b0")
    assert (again["first_sequence"], again["count"]) == (0, len(events))
    more = await owner.record(run["id"], {"type": "text_delta", "text": "more"}, batch_id="b1")
    assert more["first_sequence"] == len(events)


async def _is_appended_once(client: Peer, outputs: list[dict[str, Any]], run_id: str) -> None:
    """The same key is the same output."""
    params = {"task_id": "u", "attempt": 2, "producer_agent": "a", "parent_refs": [], "run_id": run_id}
    event = {"type": "final", "content": {"kind": "inline", "value": None}, "ok": True}
    again = await client.call("outputs.append", {**params, "event": event, "idempotency_key": "o0"})
    assert again["id"] == next(one["id"] for one in outputs if one["event"] == event)


@pytest.mark.parametrize("of", range(2, schema.VERSION))
def test_no_value_of_a_version_with_outputs_changes_and_who_sees_them_stays(tmp_path: Path, of: int) -> None:
    path = former(tmp_path / "carserver.db", of)
    before = content(path, of)
    assert len(before["outputs"]) == 5
    inspect(path, 0, thorough=True)
    schema.open_writer(path, synchronous="FULL").close()
    assert content(path, of) == before
    inspect(path, 0, thorough=True)
    with opened(path) as connection:
        found = read_outputs(connection, ListOutputs(), CLIENT, 0, 10, 4096, 2**20)
    assert [json.loads(record) | {"event": ...} for record in found.records] == [
        record | {"event": ...} for record in answers(of)[1]
    ]
    assert sum(record.get("private", False) for record in answers(of)[1]) == of - 2


@pytest.mark.parametrize("of", range(2, schema.VERSION))
@pytest.mark.parametrize(
    ("change", "table"),
    [
        ("UPDATE batches SET count = count + 1 WHERE no = 2", "batches"),
        ("UPDATE runs SET revision = revision + 1 WHERE no = 2", "runs"),
        ("UPDATE texts SET error = 'e' WHERE no = 2", "texts"),
    ],
)
def test_a_row_of_a_version_with_checksums_that_changed_is_seen_before_anything_is_written(
    tmp_path: Path, of: int, change: str, table: str
) -> None:
    path = former(tmp_path / "carserver.db", of)
    changed(path, change)
    with pytest.raises(schema.DamagedFile, match=f"a row of {table!r}, at 2, is not what was stored"):
        inspect(path, 2**30, thorough=False)
    assert version(path) == of


@pytest.mark.parametrize("of", range(2, schema.VERSION))
def test_a_damaged_row_is_as_damaged_after_a_migration_that_did_not_look_and_the_others_are_sound(
    tmp_path: Path, of: int
) -> None:
    path = former(tmp_path / "carserver.db", of)
    changed(path, "UPDATE runs SET revision = revision + 1 WHERE no = 2", "UPDATE texts SET error = 'e' WHERE no = 3")
    schema.open_writer(path, synchronous="FULL").close()
    assert version(path) == schema.VERSION
    damaged = []
    with opened(path) as connection:
        for no, run_id in connection.execute("SELECT no, id FROM runs ORDER BY no").fetchall():
            try:
                assert read_head(connection, run_id) is not None
            except Damaged:
                damaged.append(no)
    assert damaged == [2, 3]
    with pytest.raises(schema.DamagedFile, match="a row of 'runs', at 2, is not what was stored"):
        inspect(path, 0, thorough=True)


def test_what_is_whole_of_a_damaged_file_of_the_version_before_is_salvaged_with_its_handles_and_keys(
    tmp_path: Path,
) -> None:
    path, new = former(tmp_path / "carserver.db", 3), tmp_path / "new.db"
    before = content(path, 3)
    changed(path, "UPDATE runs SET revision = revision + 1 WHERE no = 2", "UPDATE texts SET error = 'e' WHERE no = 3")
    salvage = Salvage(path)
    salvage.into(new)
    assert (salvage.runs, len(salvage.lost), salvage.outputs, salvage.lost_outputs) == (9, 2, 4, 1)
    said = (salvage.forgotten_keys, salvage.unclosed, salvage.forgotten_receipts, salvage.forgotten_approvals)
    assert not any(said)
    after = content(new, 3)
    for table in ("runs", "texts"):
        assert after[table] == [row for row in before[table] if row[0] not in (2, 3)]
    for table in ("handles", "tool_keys"):
        assert after[table] == before[table]
    assert set(after["events"]) < set(before["events"])
    inspect(new, 0, thorough=True)


def test_every_row_is_there_after_a_migration_byte_for_byte_and_every_checksum_holds(tmp_path: Path) -> None:
    path = large(tmp_path / "carserver.db")
    before = content(path)
    schema.open_writer(path, synchronous="FULL").close()
    assert content(path) == before
    assert version(path) == schema.VERSION
    inspect(path, 0, thorough=True)


def test_what_stands_in_the_write_ahead_log_of_the_version_before_is_migrated_too(tmp_path: Path) -> None:
    source = former(tmp_path / "source" / "carserver.db")
    path = tmp_path / "carserver.db"
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("UPDATE texts SET prompt = 'from the log' WHERE no = 1")
        for suffix in ("", "-wal"):  # as a kill leaves them
            shutil.copy(source.with_name(source.name + suffix), path.with_name(path.name + suffix))
        before = content(source)
    assert path.with_name("carserver.db-wal").stat().st_size
    assert before["texts"][0][1] == "from the log"
    schema.open_writer(path, synchronous="FULL").close()
    assert content(path) == before
    inspect(path, 0, thorough=True)


@pytest.mark.parametrize("of", range(1, schema.VERSION))
def test_a_migration_whose_statement_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: int
) -> None:
    path = former(tmp_path / "carserver.db", of)
    before = path.read_bytes()
    *earlier, last = schema._MIGRATIONS
    with monkeypatch.context() as patched:
        patched.setattr(schema, "_MIGRATIONS", (*earlier, f"{last}; INSERT INTO runs (no) VALUES (1)"))
        with pytest.raises(schema.StorageError, match=f"cannot open {path}"):
            schema.open_writer(path, synchronous="FULL")
    assert path.read_bytes() == before
    schema.open_writer(path, synchronous="FULL").close()
    assert version(path) == schema.VERSION


MIDDLE = """
import sys, time
from pathlib import Path
from carserver.stores import schema

calls, row_checksum = 0, schema.row_checksum

def slow(*values):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        print("here", flush=True)
        time.sleep(60)
    return row_checksum(*values)

schema.row_checksum = slow
schema.open_writer(Path(sys.argv[1]), synchronous="FULL")
"""


@pytest.mark.parametrize("call", [1, RUNS + 500, 2 * RUNS + 15, 5 * RUNS])
def test_a_kill_in_the_middle_of_a_migration_leaves_the_version_before(tmp_path: Path, call: int) -> None:
    path = large(tmp_path / "carserver.db")
    before = content(path)
    process = subprocess.Popen(
        [sys.executable, "-c", MIDDLE, str(path), str(call)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.kill()
    process.communicate()
    assert version(path) == 1
    assert content(path) == before
    schema.open_writer(path, synchronous="FULL").close()
    assert content(path) == before
    inspect(path, 0, thorough=True)


async def test_a_migration_without_room_is_one_line_that_says_so_and_changes_nothing(tmp_path: Path) -> None:
    path = large(tmp_path / "state" / "carserver.db")
    before = path.read_bytes()
    blocks = 64 * 1024 // 512  # for any file that grows: of its write-ahead log, there will be more
    daemon = Daemon(path.parent, wrapper=("sh", "-c", f'ulimit -S -f {blocks} && exec "$@"', "sh"))
    with pytest.raises(NotStarted, match="exit 1"):
        await asyncio.to_thread(daemon.start)
    *_, line = daemon.log.splitlines()
    assert f"cannot open {path}" in line
    assert "make room" in line
    assert path.read_bytes() == before
    with running(path.parent) as daemon:
        async with peer(daemon, "host-token") as host:
            assert (await host.call("runs.get", {"run_id": "run-1"}))["event_count"] == 10
