"""Outputs on a real store: the tests of the seed, and what is kept, found, left out, removed and damaged."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as generated
from hypothesis import settings
from hypothesis import strategies as st
from msgspec import Raw

from carserver.config import Settings
from carserver.core.outputs import MORE, Body, bytes_of, slice_of, take_in
from carserver.core.ports import Damaged
from carserver.core.principals import CLIENT, HOST, Principal
from carserver.loop import new_output_id
from carserver.protocol.codec import encode
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.protocol.outputs import GivenFinal, GivenInline, LatestOutput, ListOutputs
from carserver.stores import outputs as rows
from carserver.stores.schema import open_writer
from tests.unit.outputting import Outputs, artifact, final, given, ids, progress
from tests.unit.storing import NOW_MS, create, opened, other_connection


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "carserver.db"


async def listed(outputs: Outputs, after: int = 0, limit: int = 1000, **filters: Any) -> list[dict[str, Any]]:
    """A page, parsed."""
    found = await outputs.store.list(ListOutputs(**filters), CLIENT, after, limit)
    return [json.loads(record) for record in found.records]


async def refused(awaitable: Any) -> RpcError:
    with pytest.raises(RpcError) as caught:
        await awaitable
    return caught.value


_SETTINGS = Settings()


# The seed's tests, each under its own name.


async def test_append_then_get_roundtrip(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        id_ = await outputs.append(final("hello"), task="task-1", by="agent-a")
        got = (await outputs.store.get(id_, CLIENT)).record
        assert json.loads(encode(got)) == {
            "id": id_,
            "task_id": "task-1",
            "attempt": 1,
            "producer_agent": "agent-a",
            "event": final("hello"),
            "parent_refs": [],
            "created_at_ms": NOW_MS,
        }


async def test_list_for_attempt_orders_by_insertion(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store, new_id=iter(["out-ffffffffff", "out-0000000000"]).__next__)
        id1 = await outputs.append(progress("s1"))
        id2 = await outputs.append(progress("s2"), now_ms=NOW_MS - 1)
        assert [record["id"] for record in await listed(outputs, task_id="t", attempt=1)] == [id1, id2]


def test_an_out_ref_is_the_short_prefixed_form() -> None:
    drawn = [new_output_id() for _ in range(100)]
    assert all(re.fullmatch("out-[0-9a-f]{10}", id_) for id_ in drawn)
    assert len(set(drawn)) == 100


async def test_get_latest_by_name_returns_the_newest_emit(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        await outputs.append(progress("first"), by="agent-a")
        id2 = await outputs.append(progress("second"), task="t2", by="agent-a")
        await outputs.append(progress("other"), by="agent-b")
        got = await outputs.store.latest(LatestOutput(name="agent-a"), CLIENT)
        assert (got.id, got.task_id) == (id2, "t2")


async def test_get_latest_by_name_of_an_unknown_name_is_not_found(path: Path) -> None:
    async with opened(path) as store:
        error = await refused(Outputs(store).store.latest(LatestOutput(name="nobody"), CLIENT))
        assert (error.kind, error.data["what"]) == (ErrorKind.NOT_FOUND, "output")


async def test_get_of_what_is_missing_is_not_found(path: Path) -> None:
    async with opened(path) as store:
        error = await refused(Outputs(store).store.get("missing", CLIENT))
        assert (error.kind, error.data["what"]) == (ErrorKind.NOT_FOUND, "output")


async def test_parent_refs_are_persisted(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        parents = (await outputs.append(progress("a")), await outputs.append(final(None)))
        id_ = await outputs.append(final(None), parents=(*parents, parents[0]))
        assert (await outputs.store.get(id_, CLIENT)).record.parent_refs == [*parents, parents[0]]


# Appending.


async def test_a_parent_that_does_not_exist_is_not_found_and_nothing_is_stored(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        error = await refused(outputs.append(final(None), parents=("out-00000000ff",)))
        assert (error.kind, error.data["what"]) == (ErrorKind.NOT_FOUND, "output")
        assert await listed(outputs) == []
        assert outputs.counters.outputs_appended == 0


async def test_an_id_that_is_taken_is_drawn_again(path: Path) -> None:
    async with opened(path) as store:
        drawn = iter(["out-0000000001", "out-0000000001", "out-0000000001", "out-0000000002"])
        outputs = Outputs(store, new_id=drawn.__next__)
        assert [await outputs.append(progress("s")) for _ in range(2)] == ["out-0000000001", "out-0000000002"]


async def test_ids_that_are_all_taken_are_no_endless_search(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store, new_id=lambda: "out-0000000001")
        await outputs.append(progress("s"))
        assert (await refused(outputs.append(progress("s")))).kind is ErrorKind.UNAVAILABLE


async def test_a_run_is_ones_own_and_may_be_over(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        await store.submit(create("run"))
        await outputs.append(progress("mine"), run_id="run")
        stranger = Principal("agent", "a")
        assert (await refused(outputs.append(progress("s"), run_id="run", principal=stranger))).data["what"] == "run"
        assert (await refused(outputs.append(progress("s"), run_id="run", principal=HOST))).kind is ErrorKind.FORBIDDEN
        assert (await refused(outputs.append(progress("s"), run_id="nope"))).kind is ErrorKind.NOT_FOUND
        assert [record["run_id"] for record in await listed(outputs)] == ["run"]


async def test_the_same_key_gives_the_same_id_and_with_other_params_a_conflict(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        id_ = await outputs.append(progress("s"), key="k", said=b"1")
        assert await outputs.append(progress("s"), key="k", said=b"1") == id_
        error = await refused(outputs.append(progress("s"), key="k", said=b"2"))
        assert error.data["reason"] == "key_reused"
        other = await outputs.append(progress("s"), key="k", said=b"2", principal=Principal("agent", "a"))
        assert other != id_
        assert len(await listed(outputs)) == outputs.counters.outputs_appended == 2
    async with opened(path) as store:  # it is durable
        assert await Outputs(store).append(progress("s"), key="k", said=b"1") == id_


@pytest.mark.parametrize(
    ("event", "limit"),
    [
        (final("é" * 524_289), "output_bytes"),
        (final(["x" * 1_048_574]), "output_bytes"),
        (final(json.loads("[" * 49 + "]" * 49)), "value_nesting"),
        (progress("s" * 257), "name_chars"),
        (progress("s") | {"note": "n" * 262_145}, "text_bytes"),
        (artifact("n" * 257), "name_chars"),
        (final(1) | {"content": {"kind": "file_ref", "path": "p", "mime": "m" * 257}}, "name_chars"),
    ],
)
def test_what_is_over_a_limit_is_refused_and_the_limit_named(event: dict[str, Any], limit: str) -> None:
    with pytest.raises(RpcError) as caught:
        take_in(given(**event), _SETTINGS)
    assert caught.value.data["limit"] == limit


@pytest.mark.parametrize(
    "event",
    [
        final("é" * 524_288),
        final(["x" * 1_048_572]),
        final(json.loads("[" * 48 + "]" * 48)),
        progress("s" * 256) | {"note": "n" * 262_144},
    ],
)
def test_what_is_at_a_limit_is_taken(event: dict[str, Any]) -> None:
    assert json.loads(encode(take_in(given(**event), _SETTINGS).event)) == event


# Reading.


async def test_the_latest_is_of_a_producer_or_of_an_artifact_within_task_and_attempt(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        made: dict[tuple[str, int, str, str], str] = {}
        for turn in range(2):  # the second of each is the newest
            for task in ("t1", "t2"):
                for attempt in (1, 2):
                    for by in ("a", "b"):
                        for name in ("x", "y"):
                            event = artifact(name, turn)
                            id_ = await outputs.append(event, task=task, attempt=attempt, by=by)
                            made[task, attempt, by, name] = id_

        async def latest(**filters: Any) -> str:
            return (await outputs.store.latest(LatestOutput(**filters), CLIENT)).id

        assert await latest(name="a") == made["t2", 2, "a", "y"]
        assert await latest(name="a", task_id="t1") == made["t1", 2, "a", "y"]
        assert await latest(name="a", task_id="t1", attempt=1) == made["t1", 1, "a", "y"]
        assert await latest(artifact="x") == made["t2", 2, "b", "x"]
        assert await latest(artifact="x", task_id="t1") == made["t1", 2, "b", "x"]
        assert await latest(artifact="x", task_id="t1", attempt=1) == made["t1", 1, "b", "x"]
        for filters in ({"name": "a", "task_id": "t3"}, {"artifact": "x", "task_id": "t1", "attempt": 3}):
            assert (await refused(latest(**filters))).kind is ErrorKind.NOT_FOUND


async def test_pages_follow_each_other_without_gap_or_repeat_whatever_is_removed_meanwhile(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        made = [await outputs.append(progress("s"), attempt=n % 2) for n in range(20)]
        first = await outputs.store.list(ListOutputs(task_id="t", attempt=0), CLIENT, 0, 9)
        assert ([json.loads(record)["id"] for record in first.records], first.more) == (made[0:18:2], True)
        with other_connection(path) as connection:
            connection.execute("DELETE FROM outputs WHERE no <= 4 OR no >= 17")
    async with opened(path) as store:
        outputs = Outputs(store, new_id=ids(100))
        made = [await outputs.append(progress("s"), attempt=n % 2) for n in range(4)]
        rest = await listed(outputs, after=first.last, task_id="t", attempt=0)
        assert [record["id"] for record in rest] == made[0::2]


async def test_a_page_ends_by_number_or_by_size_and_has_at_least_one(path: Path) -> None:
    async with opened(path, page_bytes=3_000) as store:
        outputs = Outputs(store)
        for value in ("x" * 4_000, "y" * 1_000, "z" * 1_000, "", ""):
            await outputs.append(final(value))
        pages = []
        after, more = 0, True
        while more:
            records, after, more = await outputs.store.list(ListOutputs(), CLIENT, after, 3)
            pages.append([len(json.loads(record)["event"]["content"]["value"]) for record in records])
        assert pages == [[4_000], [1_000, 1_000, 0], [0]]


async def test_a_list_leaves_large_values_out_and_says_their_size(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        await outputs.append(final("é" * 2_048))
        await outputs.append(final("é" * 2_048 + "e"))
        await outputs.append({"type": "partial", "chunk": {"kind": "inline", "value": ["x" * 4_093]}})
        found = await listed(outputs)
        assert found[0]["event"] == final("é" * 2_048)
        assert found[1]["event"]["content"] == {"kind": "inline", "omitted": True, "size": 4_097}
        assert found[2]["event"]["chunk"] == {"kind": "inline", "omitted": True, "size": 4_097}
        assert json.loads(encode((await outputs.store.get(found[1]["id"], CLIENT)).record))["event"] == final(
            "é" * 2_048 + "e"
        )


def test_a_value_keeps_its_literals_and_loses_its_spaces() -> None:
    value = Raw(b'{"n": 1.50e+3,\n "big": 123456789012345678901}')
    event = take_in(GivenFinal(content=GivenInline(value=value), ok=True), _SETTINGS).event
    assert b'"value":{"n":1.50e+3,"big":123456789012345678901}' in encode(event)


async def test_what_is_read_of_inline_content_is_the_string_or_the_compact_json(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        for value, content in (
            ("a\nü\u0000", "a\nü\u0000"),
            ("", ""),
            ({"a": [1, "ü"]}, '{"a":[1,"ü"]}'),
            (None, "null"),
        ):
            part = await outputs.store.read(await outputs.append(final(value)), CLIENT, 0, 100)
            size = len(content.encode())
            assert (part.data, part.encoding, part.size, part.eof) == (content, "utf8", size, True)
        error = await refused(outputs.store.read(await outputs.append(progress("s")), CLIENT, 0, 1))
        assert (error.kind, error.data["path"]) == (ErrorKind.INVALID_PARAMS, "id")


async def test_an_offset_at_the_end_is_the_end_and_one_behind_it_is_refused(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        id_ = await outputs.append(final("abc"))
        part = await outputs.store.read(id_, CLIENT, 3, 10)
        assert (part.data, part.eof) == ("", True)
        error = await refused(outputs.store.read(id_, CLIENT, 4, 10))
        assert (error.kind, error.data["path"]) == (ErrorKind.INVALID_PARAMS, "offset")


@settings(deadline=None, max_examples=400)
@generated(st.text(max_size=40), st.integers(0, 60), st.integers(1, 60))
def test_a_slice_of_text_is_the_characters_that_fit_and_at_least_one(text: str, offset: int, length: int) -> None:
    content = text.encode()
    offset = min(offset, len(content))
    starts = [len(text[:n].encode()) for n in range(len(text) + 1)]
    body = Body(len(content), "", utf8=True)
    window = content[offset : offset + length + MORE]
    if offset not in starts:
        with pytest.raises(RpcError) as caught:
            slice_of(body, offset, length, window)
        assert caught.value.data["path"] == "offset"
        return
    part = slice_of(body, offset, length, window)
    fitting = max((end for end in starts if offset < end <= offset + length), default=None)
    end = fitting if fitting is not None else min((end for end in starts if end > offset), default=offset)
    assert part.data.encode() == content[offset:end]
    assert part.eof == (end == len(content))


@settings(deadline=None, max_examples=200)
@generated(st.text(max_size=200), st.integers(1, 9))
def test_slices_one_after_another_are_the_whole_text(text: str, length: int) -> None:
    content = bytes_of(Raw(encode(text)))
    body = Body(len(content), "", utf8=True)
    read, eof = b"", False
    while not eof:
        part = slice_of(body, len(read), length, content[len(read) : len(read) + length + MORE])
        assert part.data or part.eof
        read, eof = read + part.data.encode(), part.eof
    assert read == text.encode()


# Removing.


async def test_a_runs_outputs_go_with_it_and_the_old_ones_without_a_run_by_age(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        for run_id in ("gone", "stays"):
            await store.submit(create(run_id))
            await outputs.append(progress(run_id), run_id=run_id, now_ms=1)
        for n in range(4):
            await outputs.append(progress(str(n)), now_ms=10 - n)
    connection = open_writer(path, synchronous="OFF")
    stored = rows.OutputRows(connection)
    assert [stored.remove_of_run("gone", 10).outputs for _ in range(2)] == [1, 0]
    assert [stored.remove_old(10, 2).outputs for _ in range(3)] == [2, 1, 0]
    connection.close()
    async with opened(path) as store:
        assert [record["event"]["stage"] for record in await listed(Outputs(store))] == ["stays", "0"]


# Damage.


@pytest.mark.parametrize(
    "damage",
    [
        "task_id = 'other'",
        "attempt = 2",
        "artifact = 'other'",
        "size = 3",
        "sha256 = NULL",
        "flags = 0",
        "flags = 3",
        "run_id = 'other'",
        "value = '\"forged\"'",
        "value = NULL",
        "value_checksum = NULL",
        "no = 77",
    ],
)
async def test_a_row_that_changed_is_never_served(path: Path, damage: str) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        id_ = await outputs.append(artifact("n", "true"))
        with other_connection(path) as connection:
            connection.execute(f"UPDATE outputs SET {damage}")
        for awaitable in (
            outputs.store.get(id_, CLIENT),
            outputs.store.read(id_, CLIENT, 0, 9),
            outputs.store.list(ListOutputs(), CLIENT, 0, 9),
        ):
            with pytest.raises(Damaged, match="damaged"):
                await awaitable


# No read looks at all there is.


def test_no_statement_scans_or_sorts_the_outputs(path: Path) -> None:
    connection = open_writer(path, synchronous="OFF")
    stored = rows.OutputRows(connection)
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    stored.get("x")
    stored.exists("x", CLIENT)
    stored.keyed("x", "y")
    stored.remove_of_run("x", 2)
    stored.remove_old(1, 2)
    for within in ({}, {"task_id": "x"}, {"task_id": "x", "attempt": 1}):
        rows.read_latest(connection, LatestOutput(name="x", **within), CLIENT)
        rows.read_latest(connection, LatestOutput(artifact="x", **within), CLIENT)
        rows.read_outputs(connection, ListOutputs(**within), CLIENT, 5, 10, 4096, 2**20)
    connection.set_trace_callback(None)
    assert len(statements) > 12
    for statement in set(statements) - {"BEGIN", "ROLLBACK"}:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
        # A lookup that found none before its key takes the first entry of its index; `entry` are its one or two.
        first = ("SCAN outputs USING COVERING INDEX",) if "LIMIT 1)" in statement else ()
        assert any(step.startswith(("SEARCH outputs USING", *first)) for step in plan), (statement, plan)
        for step in plan:
            assert not step.startswith(("SCAN row", "USE TEMP")), (statement, plan)
            assert first or not step.startswith("SCAN outputs"), (statement, plan)
    connection.close()
