"""What `outputs.*` mean, over the socket (contract, section 8)."""

import asyncio
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from carserver.core.principals import agent_token
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.outputs import append, file_ref, final, inline, params, read, read_whole, refused
from tests.peer import peer

MIB = 1024 * 1024


def agent(daemon: Daemon, agent_id: str) -> str:
    """The token of an agent."""
    return agent_token(daemon.token("agent-key"), agent_id)


# Records.


async def test_a_record_is_what_was_said_of_it_and_absent_options_are_null(served: Daemon, root: Path) -> None:
    (root / "record").write_bytes(b"x")
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"type": "progress", "stage": "s"}, {"note": None}),
        ({"type": "progress", "stage": "", "note": "n\n"}, {}),
        ({"type": "partial", "chunk": inline({"a": [1.5, None]})}, {}),
        ({"type": "artifact", "name": "n", "content": inline("é")}, {}),
        ({"type": "final", "content": inline(None), "ok": False}, {}),
    ]
    before = time.time_ns() // 1_000_000
    async with peer(served) as client:
        for event, added in cases:
            id_ = await append(client, event, "records", unknown_member=1)
            record = await client.call("outputs.get", {"id": id_})
            assert re.fullmatch("out-[0-9a-f]{10}", id_)
            assert before <= record.pop("created_at_ms") <= time.time_ns() // 1_000_000
            said = params({**event, **added}, "records", parent_refs=[])
            assert record == {"id": id_, **said}
        id_ = await append(client, final(file_ref("record")), "records")
        record = await client.call("outputs.get", {"id": id_})
        assert record["event"]["content"] == file_ref("record", mime=None, size_hint=None)
        id_ = await append(client, final(file_ref("record", mime="text/x", size_hint=7)), "records")
        record = await client.call("outputs.get", {"id": id_})
        assert record["event"]["content"] == file_ref("record", mime="text/x", size_hint=7)


async def test_a_value_comes_back_by_its_own_literals_and_compact(served: Daemon) -> None:
    async with peer(served) as client:
        given = json.dumps(params(final(inline("VALUE")), "literals"))
        value = '{ "n" : 1.50e+3 , "big":123456789012345678901, "s":"\\u00e9\\/" }'
        given = given.replace('"VALUE"', value)
        answer = await client.raw(f'{{"jsonrpc":"2.0","id":"x","method":"outputs.append","params":{given}}}')
        id_ = json.dumps(answer["result"])
        await client.socket.send(f'{{"jsonrpc":"2.0","id":"y","method":"outputs.get","params":{id_}}}')
        frame = await client.next_frame()
        assert b'"value":{"n":1.50e+3,"big":123456789012345678901,"s":"\\u00e9\\/"}' in frame


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"event": final({"kind": "inline"})}, "event.content"),
        ({"event": final({"kind": "else", "value": 1})}, "event.content.kind"),
        ({"event": {"type": "else"}}, "event.type"),
        ({"event": {"type": "final", "content": inline(1)}}, "event"),
        ({"event": {"type": "artifact", "name": "", "content": inline(1)}}, "event.name"),
        ({"event": {"type": "artifact", "name": "a\tb", "content": inline(1)}}, "event.name"),
        ({"event": {"type": "progress", "stage": 3}}, "event.stage"),
        ({"event": {"type": "progress", "stage": "\x1b"}}, "event.stage"),
        ({"event": final(file_ref(""))}, "event.content.path"),
        ({"event": final(file_ref("x" * 4_096))}, "event.content.path"),
        ({"event": final(file_ref("x", size_hint=-1))}, "event.content.size_hint"),
        ({"event": 3}, "event"),
        ({"attempt": 2**32}, "attempt"),
        ({"attempt": -1}, "attempt"),
        ({"attempt": "1"}, "attempt"),
        ({"task_id": ""}, "task_id"),
        ({"task_id": "a\nb"}, "task_id"),
        ({"producer_agent": ""}, "producer_agent"),
        ({"parent_refs": "out-0000000000"}, "parent_refs"),
        ({"parent_refs": ["x\n"]}, "parent_refs[0]"),
        ({"idempotency_key": ""}, "idempotency_key"),
    ],
)
async def test_params_of_the_wrong_shape_are_refused_at_their_place(
    served: Daemon, change: dict[str, Any], path: str
) -> None:
    async with peer(served) as client:
        error = await refused(client, "outputs.append", params(final(inline(1)), "shapes") | change)
        assert (error.type, error.data["path"]) == ("invalid_params", path)
        assert (await client.call("outputs.list", {"task_id": "shapes", "attempt": 1}))["outputs"] == []


@pytest.mark.parametrize(
    ("change", "limit", "maximum"),
    [
        ({"event": final(inline("x" * (MIB + 1)))}, "output_bytes", MIB),
        ({"event": final(inline(json.loads("[" * 49 + "]" * 49)))}, "value_nesting", 48),
        ({"task_id": "t" * 257}, "name_chars", 256),
        ({"event": {"type": "progress", "stage": "s" * 257}}, "name_chars", 256),
        ({"parent_refs": ["out-0000000000"] * 1_001}, "output_parents", 1_000),
    ],
)
async def test_what_is_over_a_limit_is_told_which(
    served: Daemon, change: dict[str, Any], limit: str, maximum: int
) -> None:
    async with peer(served) as client:
        error = await refused(client, "outputs.append", params(final(inline(1))) | change)
        assert (error.type, error.data["limit"], error.data["maximum"]) == ("limit_exceeded", limit, maximum)


async def test_references_that_do_not_exist_are_not_found(served: Daemon) -> None:
    async with peer(served) as client:
        for method, given in (
            ("outputs.get", {"id": "out-0000000000"}),
            ("outputs.get", {"id": "missing"}),
            ("outputs.read", {"id": ""}),
            ("outputs.append", params(final(inline(1)), "dangling", parent_refs=["out-0000000000"])),
            ("outputs.latest", {"name": "nobody"}),
            ("outputs.latest", {"artifact": "nothing"}),
        ):
            error = await refused(client, method, given)
            assert (error.error["code"], error.type, error.data["what"]) == (-32010, "not_found", "output")
        assert (await client.call("outputs.list", {"task_id": "dangling", "attempt": 1}))["outputs"] == []


# Who sees what.


async def test_outputs_are_shared_by_everyone_who_is_authenticated(served: Daemon) -> None:
    async with peer(served, agent(served, "one")) as one, peer(served, agent(served, "two")) as two:
        run = await one.create()
        parent = await append(one, final(inline("x")), "shared", run_id=run["id"])
        child = await append(two, final(inline("y")), "shared", parent_refs=[parent])
        async with peer(served) as client, peer(served, "host-token") as host:
            for reader in (two, client, host):
                assert (await reader.call("outputs.get", {"id": parent}))["run_id"] == run["id"]
                assert (await read(reader, child))["data"] == "y"
                page = await reader.call("outputs.list", {"task_id": "shared", "attempt": 1})
                assert [record["id"] for record in page["outputs"]] == [parent, child]


async def test_an_output_belongs_to_a_run_of_ones_own_even_one_that_is_over(served: Daemon) -> None:
    async with peer(served) as client, peer(served, agent(served, "one")) as other, peer(served, "host-token") as host:
        run_id = (await client.create())["id"]
        await client.call("runs.fail", {"run_id": run_id, "error": "x"})
        await append(client, final(inline(1)), run_id=run_id)
        mine = params(final(inline(1)), run_id=run_id)
        unknown = await refused(other, "outputs.append", params(final(inline(1)), run_id="run-unknown"))
        hidden = await refused(other, "outputs.append", mine)
        assert hidden.error == json.loads(json.dumps(unknown.error).replace("run-unknown", run_id))
        assert (await refused(host, "outputs.append", mine)).type == "forbidden"


async def test_a_deleted_runs_outputs_are_gone(served: Daemon) -> None:
    async with peer(served) as client:
        run_id = (await client.create())["id"]
        id_ = await append(client, final(inline(1)), "deleted", run_id=run_id)
        kept = await append(client, final(inline(1)), "deleted")
        await client.call("runs.cancel", {"run_id": run_id})
        await client.call("runs.delete", {"run_id": run_id})
        assert (await refused(client, "outputs.get", {"id": id_})).type == "not_found"
        page = await client.call("outputs.list", {"task_id": "deleted", "attempt": 1})
        assert [record["id"] for record in page["outputs"]] == [kept]


# Keys.


async def test_an_append_that_is_sent_again_under_its_key_is_the_same_output(start: StartDaemon) -> None:
    daemon = start()
    given = params(final(inline({"a": 1, "b": 2})), idempotency_key="k")
    async with peer(daemon) as client:
        answers = [client.start("outputs.append", given) for _ in range(20)]
        ids = {(await answer)["id"] for answer in answers}
        assert len(ids) == 1
        again = params(final(inline({"b": 2, "a": 1})), idempotency_key="k", parent_refs=[])
        assert (await client.call("outputs.append", again))["id"] in ids
        for other in ({"attempt": 2}, {"event": final(inline({"a": 1, "b": 3}))}, {"producer_agent": "b"}):
            error = await refused(client, "outputs.append", given | other)
            assert (error.error["code"], error.data["reason"]) == (-32011, "key_reused")
    daemon.kill()
    daemon.start()
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        assert (await client.call("outputs.append", given))["id"] in ids
        assert len((await client.call("outputs.list", {}))["outputs"]) == 1
        assert (await host.call("outputs.append", given))["id"] not in ids  # a key is its principal's


async def test_what_is_acknowledged_is_there_after_a_kill(start: StartDaemon) -> None:
    daemon = start()
    async with peer(daemon) as client:
        ids = [await append(client, final(inline(n))) for n in range(20)]
        daemon.kill()
    daemon.start()
    async with peer(daemon) as client:
        page = await client.call("outputs.list", {"task_id": "t", "attempt": 1})
        assert [record["id"] for record in page["outputs"]] == ids
        assert [record["event"]["content"]["value"] for record in page["outputs"]] == list(range(20))


# Lists, and the latest.


async def test_pages_are_in_the_order_of_appending_and_carry_their_filters(served: Daemon) -> None:
    async with peer(served) as client:
        ids = [await append(client, final(inline(n)), "pages", attempt=n % 2) for n in range(10)]
        other = await append(client, final(inline("x")), "pages-other")

        async def pages(**filters: Any) -> list[list[str]]:
            found, page = [], await client.call("outputs.list", {**filters, "limit": 2})
            while True:
                found.append([record["id"] for record in page["outputs"]])
                if page["next_page"] is None:
                    return found
                page = await client.call("outputs.list", {"page": page["next_page"], "limit": 2})

        assert await pages(task_id="pages", attempt=0) == [ids[0:4:2], ids[4:8:2], ids[8:10:2]]
        assert await pages(task_id="pages") == [ids[0:2], ids[2:4], ids[4:6], ids[6:8], ids[8:10]]
        everything = [id_ for page in await pages() for id_ in page]
        assert [id_ for id_ in everything if id_ in {*ids, other}] == [*ids, other]
        unknown = await client.call("outputs.list", {"task_id": "pages", "attempt": 7})
        assert unknown == {"outputs": [], "next_page": None}

        page = (await client.call("outputs.list", {"task_id": "pages", "limit": 1}))["next_page"]
        for given, path in (
            ({"attempt": 1}, "attempt"),
            ({"page": "zz"}, "page"),
            ({"page": "7b7d"}, "page"),
            ({"page": page, "task_id": "other"}, "page"),
            ({"limit": 0}, "limit"),
        ):
            error = await refused(client, "outputs.list", given)
            assert (error.type, error.data["path"]) == ("invalid_params", path)
        error = await refused(client, "outputs.list", {"limit": 1_001})
        assert (error.data["limit"], error.data["maximum"]) == ("page_entries", 1_000)


async def test_a_page_has_a_mebibyte_at_most_and_leaves_large_values_out(served: Daemon) -> None:
    async with peer(served) as client:
        large = await append(client, final(inline("x" * MIB)), "large")
        partial = await append(client, {"type": "partial", "chunk": inline(["y" * 5_000])}, "large")
        await asyncio.gather(*(append(client, final(inline("z" * 4_096)), "large") for _ in range(300)))
        await append(client, final(inline("z")), "large")
        page = await client.call("outputs.list", {"task_id": "large", "attempt": 1})
        assert 200 < len(page["outputs"]) < 260
        assert page["next_page"] is not None
        assert page["outputs"][0]["event"]["content"] == {"kind": "inline", "omitted": True, "size": MIB}
        assert page["outputs"][1]["event"]["chunk"] == {"kind": "inline", "omitted": True, "size": 5_004}
        assert page["outputs"][2]["event"]["content"] == inline("z" * 4_096)
        assert (await client.call("outputs.get", {"id": large}))["event"]["content"] == inline("x" * MIB)
        latest = await client.call("outputs.latest", {"name": "a", "task_id": "large"})
        assert latest["event"]["content"] == inline("z")
        assert (await client.call("outputs.get", {"id": partial}))["event"]["chunk"] == inline(["y" * 5_000])


async def test_the_latest_is_the_newest_of_a_producer_or_of_an_artifacts_name(served: Daemon) -> None:
    async with peer(served) as client:
        ids: list[str] = []
        for task, attempt, producer in (("l1", 1, "p"), ("l1", 2, "p"), ("l2", 1, "p"), ("l1", 1, "q")):
            event = {"type": "artifact", "name": "latest-report", "content": inline(len(ids))}
            ids.append(await append(client, event, task, attempt=attempt, producer_agent=producer))
        await append(client, final(inline("no artifact")), "l1", producer_agent="r")

        async def latest(**given: Any) -> str:
            id_: str = (await client.call("outputs.latest", given))["id"]
            return id_

        assert await latest(name="p") == ids[2]
        assert await latest(name="p", task_id="l1") == ids[1]
        assert await latest(name="p", task_id="l1", attempt=1) == ids[0]
        assert await latest(artifact="latest-report") == ids[3]
        assert await latest(artifact="latest-report", task_id="l1", attempt=2) == ids[1]
        for given, path in (
            ({}, "name"),
            ({"name": "p", "artifact": "x"}, "name"),
            ({"name": "p", "attempt": 1}, "attempt"),
        ):
            error = await refused(client, "outputs.latest", given)
            assert (error.type, error.data["path"]) == ("invalid_params", path)


# Slices.


async def test_a_slice_of_text_ends_at_a_character_and_has_at_least_one(served: Daemon) -> None:
    text = "aé漢😀z"  # 1, 2, 3, 4 and 1 bytes
    async with peer(served) as client:
        id_ = await append(client, final(inline(text)))
        whole = await read(client, id_)
        assert whole == {
            "data": text,
            "encoding": "utf8",
            "size": 11,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "eof": True,
        }
        assert [(await read(client, id_, length=n))["data"] for n in (1, 2, 3, 5, 6)] == ["a", "a", "aé", "aé", "aé漢"]
        assert (await read(client, id_, offset=6, length=1))["data"] == "😀"
        last = await read(client, id_, offset=11)
        assert (last["data"], last["eof"]) == ("", True)
        for offset in (2, 4, 5, 7, 8, 9, 12, 2**53):
            error = await refused(client, "outputs.read", {"id": id_, "offset": offset})
            assert (error.type, error.data["path"]) == ("invalid_params", "offset")
        for length in (1, 2, 3, 4, 7):
            assert (await read_whole(client, id_, length)).decode() == text
        error = await refused(client, "outputs.read", {"id": id_, "length": MIB + 1})
        assert (error.type, error.data["limit"], error.data["maximum"]) == ("limit_exceeded", "output_slice_bytes", MIB)
        for given in ({"length": 0}, {"offset": -1}):
            assert (await refused(client, "outputs.read", {"id": id_, **given})).type == "invalid_params"


async def test_what_is_read_of_another_value_is_its_compact_json(served: Daemon) -> None:
    value = {"a": [1, "z"], "b": None}
    content = json.dumps(value, separators=(",", ":")).encode()
    async with peer(served) as client:
        id_ = await append(client, {"type": "partial", "chunk": inline(value)})
        assert await read_whole(client, id_, 3) == content
        progress = await append(client, {"type": "progress", "stage": "s"})
        error = await refused(client, "outputs.read", {"id": progress})
        assert (error.type, error.data["path"]) == ("invalid_params", "id")


async def test_the_largest_text_of_the_worst_characters_is_read_in_one(served: Daemon) -> None:
    async with peer(served) as client:
        id_ = await append(client, final(inline("\0" * MIB)), "worst")
        part = await read(client, id_)
        assert (part["data"], part["eof"]) == ("\0" * MIB, True)
