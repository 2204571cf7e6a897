"""Results of handles as outputs: their owner and the host see them, and to all others they do not exist."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET, Raw

from carserver.config import Settings
from carserver.core.outputs import Output, check_producer
from carserver.core.ports import Damaged
from carserver.core.principals import CLIENT, HOST, Principal
from carserver.core.transfer import Import, OutputPart, take_in_line
from carserver.protocol.codec import encode
from carserver.protocol.errors import RpcError
from carserver.protocol.outputs import LatestOutput, ListOutputs
from carserver.stores.inspection import inspect
from carserver.stores.schema import DamagedFile
from tests.unit.editing import delete, fail
from tests.unit.outputting import Outputs, artifact, final, ids, progress
from tests.unit.storing import NOW_MS, Opened, create, opened, other_connection

MIB = 1024 * 1024
AGENT, OTHER = Principal("agent", "a"), Principal("agent", "b")
ALL = (HOST, CLIENT, AGENT, OTHER)
HANDLE = "0123456789abcdef" * 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "carserver.db"


async def keep(outputs: Outputs, owner: Principal, value: bytes = b'{"n": 1}', run_id: str | None = None) -> Output:
    """The result of a handle of `owner`."""
    return await outputs.store.keep_result(owner, HANDLE, "grep", Raw(value), run_id)


async def outcome(awaitable: Any) -> Any:
    """What is answered: the answer, or all that there is of the error."""
    try:
        return await awaitable
    except RpcError as error:
        return f"{error.kind.name} {error.message} {error.data}"


def visible_to(owner: Principal) -> set[Principal]:
    return {owner, HOST}


@pytest.mark.parametrize("owner", [HOST, CLIENT, AGENT])
async def test_a_result_is_read_by_its_owner_and_the_host_and_to_others_it_is_as_unknown(
    path: Path, owner: Principal
) -> None:
    async with opened(path) as store:
        outputs = Outputs(store, new_id=iter(["out-0000000001"]).__next__)
        kept = await keep(outputs, owner)
        id_, unknown = kept.record.id, "out-0000000002"
        for principal in ALL:
            sees = principal in visible_to(owner)
            methods = _methods(outputs, principal)
            if sees:
                del methods["append"]
            for name, method in methods.items():
                there, nowhere = ("tool:grep", "tool:none") if name == "latest" else (id_, unknown)
                found = await outcome(method(there))
                assert isinstance(found, str) is not sees, (principal, name)
                if not sees:
                    assert found.replace(there, nowhere) == await outcome(method(nowhere))
                    assert found.startswith("NOT_FOUND")
            listed = await outputs.store.list(ListOutputs(task_id=HANDLE), principal, 0, 10)
            assert listed.records == ([encode(kept.record)] if sees else [])
            assert (listed.last, listed.more) == (kept.no if sees else 0, False)


def _methods(outputs: Outputs, principal: Principal) -> dict[str, Callable[[str], Any]]:
    """What names an output, or its producer."""
    return {
        "get": lambda of: outputs.store.get(of, principal),
        "read": lambda of: outputs.store.read(of, principal, 0, 100),
        "latest": lambda name: outputs.store.latest(LatestOutput(name=name), principal),
        "append": lambda of: outputs.append(final(None), parents=(of,), principal=principal),
    }


@pytest.mark.parametrize("owner", [CLIENT, AGENT])
async def test_whoever_sees_a_result_may_name_it_as_a_parent(path: Path, owner: Principal) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        kept = await keep(outputs, owner)
        for principal in visible_to(owner):
            id_ = await outputs.append(final(None), parents=(kept.record.id,), principal=principal)
            assert (await outputs.store.get(id_, OTHER)).record.parent_refs == [kept.record.id]


async def test_a_result_is_the_final_output_of_its_handle(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        await store.submit(create("run"))
        kept = await keep(outputs, CLIENT, b' {"n":  1.50, "e": "\\u00e9"}', "run")
        assert json.loads(encode(kept.record)) == {
            "id": kept.record.id,
            "task_id": HANDLE,
            "attempt": 0,
            "producer_agent": "tool:grep",
            "event": final({"n": 1.5, "e": "é"}),
            "parent_refs": [],
            "created_at_ms": NOW_MS,
            "run_id": "run",
            "private": True,
        }
        assert await outputs.store.get(kept.record.id, CLIENT) == kept
        part = await outputs.store.read(kept.record.id, CLIENT, 0, 100)
        assert part.data == '{"n":1.50,"e":"\\u00e9"}'
        assert outputs.counters.outputs_appended == 1


async def test_what_is_appended_is_everyones_and_says_nothing_of_it(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        for event in (progress("s"), artifact("n"), final(None)):
            id_ = await outputs.append(event, principal=AGENT)
            for principal in ALL:
                record = (await outputs.store.get(id_, principal)).record
                assert record.private is UNSET
                assert b"private" not in encode(record)


async def test_the_latest_and_pages_pass_over_what_one_does_not_see(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        public = [await outputs.append(artifact("n"), by="tool:grep", now_ms=NOW_MS + n) for n in range(3)]
        mine = [(await keep(outputs, CLIENT)).record.id, await outputs.append(final(None), by="x")]
        others = [(await keep(outputs, owner)).record.id for owner in (AGENT, AGENT, HOST)]
        for principal, newest, seen in (
            (OTHER, public[-1], [*public, mine[1]]),
            (CLIENT, mine[0], [*public, *mine]),
            (AGENT, others[1], [*public, mine[1], *others[:2]]),
            (HOST, others[2], [*public, *mine, *others]),
        ):
            assert (await outputs.store.latest(LatestOutput(name="tool:grep"), principal)).id == newest
            found: list[str] = []
            last, more = 0, True
            while more:
                records, last, more = await outputs.store.list(ListOutputs(), principal, last, 2)
                assert len(records) == 2 or not more
                found += [json.loads(record)["id"] for record in records]
            assert found == seen


# Where it is kept.


@pytest.mark.parametrize("by", [CLIENT, AGENT])
async def test_a_result_whose_run_was_deleted_is_kept_without_one(path: Path, by: Principal) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        await store.submit(create("run"))
        kept = await keep(outputs, CLIENT, run_id="run")
        await store.submit(fail("run"))
        await store.store.edit(delete("run"))
        assert (await outcome(outputs.store.get(kept.record.id, CLIENT))).startswith("NOT_FOUND")
        if by is AGENT:  # or there is another one by now, of somebody else
            await store.submit(create("run", owner=CLIENT))
        late = await keep(outputs, by, run_id="run")
        assert late.record.run_id is UNSET
        assert (await outputs.store.get(late.record.id, by)) == late


async def test_a_result_outlives_the_daemon_and_a_change_of_who_sees_it_is_damage(path: Path) -> None:
    async with opened(path) as store:
        kept = await keep(Outputs(store), CLIENT)
    async with opened(path) as store:
        outputs = Outputs(store)
        assert await outputs.store.get(kept.record.id, CLIENT) == kept
        assert (await outcome(outputs.store.get(kept.record.id, OTHER))).startswith("NOT_FOUND")
        for change in ("flags = 1", "owner = 'agent:b'", "flags = NULL"):
            with other_connection(path) as connection:
                connection.execute("UPDATE outputs SET flags = 3, owner = 'client'")
                connection.execute(f"UPDATE outputs SET {change}")
            for reading in (
                outputs.store.get(kept.record.id, OTHER),
                outputs.store.list(ListOutputs(), OTHER, 0, 9),
                outputs.store.latest(LatestOutput(name="tool:grep"), OTHER),
            ):
                with pytest.raises(Damaged):
                    await reading
    with pytest.raises(DamagedFile):
        inspect(path, 2**30, thorough=False)


async def test_a_value_of_15_mib_is_kept_listed_read_and_got(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        text = '"' + "x" * (15 * MIB - 2) + '"'
        rows = json.dumps([{"n": n, "text": "ä" * 100} for n in range(1000)], ensure_ascii=False)
        for value in (text, rows):
            kept = await keep(outputs, CLIENT, value.encode())
            got = await outputs.store.get(kept.record.id, CLIENT)
            assert len(encode(got.record)) < Settings().frame_bytes
            whole = json.dumps(json.loads(value), separators=(",", ":"), ensure_ascii=False)
            content = whole.strip('"').encode() if value is text else whole.encode()
            (listed,) = (await outputs.store.list(ListOutputs(), CLIENT, kept.no - 1, 1)).records
            assert json.loads(listed)["event"]["content"] == {"kind": "inline", "omitted": True, "size": len(content)}
            offset = len(content) // 2 // 4 * 4
            part = await outputs.store.read(kept.record.id, CLIENT, offset, MIB)
            assert (part.size, part.sha256) == (len(content), hashlib.sha256(content).hexdigest())
            assert content[offset:].startswith(part.data.encode())


async def test_results_that_wait_together_have_an_id_each(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store, new_id=iter(["out-0000000001"] * 3 + ["out-0000000002", "out-0000000003"]).__next__)
        kept = await asyncio.gather(*(keep(outputs, owner) for owner in (CLIENT, AGENT, CLIENT)))
        assert {output.record.id for output in kept} == {f"out-000000000{n}" for n in (1, 2, 3)}


# Its name.


def test_the_producer_of_results_may_be_longer_by_what_stands_before_its_tools_name() -> None:
    settings = Settings()
    check_producer("tool:" + "x" * 256, settings, "name")
    check_producer("x" * 256, settings, "name")
    for name in ("tool:" + "x" * 257, "x" * 257):
        with pytest.raises(RpcError) as refused:
            check_producer(name, settings, "name")
        assert refused.value.data["limit"] == "name_chars"


async def test_the_longest_name_of_a_tool_is_found_again(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store)
        kept = await outputs.store.keep_result(CLIENT, HANDLE, "ä" * 256, Raw(b"1"), None)
        assert await outputs.store.latest(LatestOutput(name="tool:" + "ä" * 256), CLIENT) == kept.record


# There and back.


def line(record: Any, size: int | None = None) -> OutputPart:
    """A line of an import, taken in."""
    part = take_in_line(encode({"output": record, "size": size, "sha256": None}), "lines[0]", Settings())
    assert isinstance(part, OutputPart)
    return part


async def imported(store: Opened, part: OutputPart) -> Any:
    return await store.store.edit(Import(principal=HOST, parts=[part], epoch="e", bytes=1))


async def test_an_imported_result_is_the_hosts_and_still_private_and_the_same_again_is_skipped(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store, new_id=ids(100))
        kept = await outputs.store.keep_result(AGENT, HANDLE, "x" * 256, Raw(b'"' + b"y" * (2 * MIB) + b'"'), None)
        record = encode(kept.record)
        assert (await imported(store, line(kept.record))).skipped == 1
        other = Raw(record.replace(kept.record.id.encode(), b"out-00000000ff"))
        assert (await imported(store, line(other))).outputs == 1
        got = await outputs.store.get("out-00000000ff", HOST)
        assert (got.owner, got.private) == ("host", True)
        assert encode(got.record) == bytes(other)
        assert (await outcome(outputs.store.get("out-00000000ff", AGENT))).startswith("NOT_FOUND")
        public = Raw(bytes(other).replace(b',"private":true', b""))
        with pytest.raises(RpcError, match="exists with another event"):
            await imported(store, line(Raw(bytes(other).replace(b"yy", b"zz", 1))))
        with pytest.raises(RpcError) as refused:
            line(public)
        assert refused.value.data["limit"] == "output_bytes"


async def test_the_mark_alone_makes_another_output_of_it(path: Path) -> None:
    async with opened(path) as store:
        outputs = Outputs(store, new_id=ids(100))
        kept = await keep(outputs, HOST)
        public = Raw(encode(kept.record).replace(b',"private":true', b""))
        with pytest.raises(RpcError, match="exists with another private"):
            await imported(store, line(public))


async def test_progress_that_is_imported_as_private_is_private(path: Path) -> None:
    async with opened(path) as store:
        record = {
            "id": "out-0000000001",
            "task_id": "t",
            "attempt": 0,
            "producer_agent": "p",
            "event": progress("s") | {"note": None},
            "parent_refs": [],
            "created_at_ms": NOW_MS,
            "private": True,
        }
        assert (await imported(store, line(record))).outputs == 1
        outputs = Outputs(store)
        assert json.loads(encode((await outputs.store.get("out-0000000001", HOST)).record)) == record
        assert (await outputs.store.list(ListOutputs(), CLIENT, 0, 9)).records == []


def test_a_result_beyond_its_limit_is_not_imported() -> None:
    content = {"kind": "inline", "value": "y" * (15 * MIB)}
    event = {"type": "final", "content": content, "ok": True}
    members = {"task_id": "t", "attempt": 0, "producer_agent": "p", "parent_refs": [], "created_at_ms": 1}
    with pytest.raises(RpcError) as refused:
        line({"id": "out-0000000001", **members, "event": event, "private": True})
    assert refused.value.data["limit"] == "result_bytes"
