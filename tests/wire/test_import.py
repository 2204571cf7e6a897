"""`runs.import`: what comes in is what it was, once; nothing half or wrong does, and a kill leaves nothing of it."""

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from carserver.protocol.transfer import PAGE_EVENTS
from tests.conftest import StartDaemon
from tests.daemon import Daemon, running
from tests.peer import Peer, Refused, peer
from tests.rawpeer import call_frame, raw_peer

AT_MS = 1_700_000_000_000
LAST_MS = 253_402_214_400_000  # the last day of the year 9999 begins
NOTHING = {"runs": 0, "events": 0, "outputs": 0, "skipped": 0}
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("import") / "state") as daemon:
        yield daemon


_ids = iter(range(10**6))


def run(status: str = "completed", events: int = 3, **members: Any) -> Lines:
    """The lines of a run, two events a page."""
    run_id = f"run-imported-{next(_ids)}"
    over = status in ("completed", "failed", "cancelled", "interrupted")
    snapshot = {
        "id": run_id,
        "session_id": "s",
        "agent_id": "a",
        "status": status,
        "prompt": "é\u2028",
        "created_at_ms": AT_MS,
        "updated_at_ms": AT_MS + max(100, events),
        "event_count": events,
        **({"ended_at_ms": AT_MS + 50} if over else {}),
        **members,
    }
    entries = [
        {"sequence": n, "timestamp_ms": AT_MS + n, "status": "executing", "event": {"type": "text", "n": n}}
        for n in range(events)
    ]
    pages = [{"run_id": run_id, "events": entries[first : first + 2]} for first in range(0, events, 2)]
    return [{"run": snapshot}, *pages]


def output(**members: Any) -> dict[str, Any]:
    record = {
        "id": f"out-{next(_ids):010x}",
        "task_id": "t",
        "attempt": 0,
        "producer_agent": "p",
        "event": {"type": "final", "content": {"kind": "inline", "value": {"k": [1]}}, "ok": True},
        "parent_refs": ["out-0000000bad"],
        "created_at_ms": AT_MS,
        **members,
    }
    return {"output": record, "size": None, "sha256": None}


async def imports(host: Peer, lines: Lines) -> dict[str, int]:
    answer: dict[str, int] = await host.call("runs.import", {"lines": lines})
    return answer


async def refused(host: Peer, lines: Lines) -> Refused:
    with pytest.raises(Refused) as error:
        await imports(host, lines)
    return error.value


# What comes in.


@pytest.mark.parametrize(
    "status", ["created", "planning", "executing", "verifying", "completed", "failed", "cancelled", "interrupted"]
)
async def test_a_run_is_what_it_was_but_for_its_epoch_and_its_owner(status: str, served: Daemon) -> None:
    texts: dict[str, Any] = {"result_text": "r", "error": "e", "cancel_reason": "c", "interrupted_reason": "i"}
    lines = run(status, **texts, outcome_description="o", parent_run_id="p", metadata={"k": [1, {"é": None}]})
    snapshot = lines[0]["run"]
    async with peer(served, "host-token") as host, peer(served) as client:
        assert await imports(host, lines) == {"runs": 1, "events": 3, "outputs": 0, "skipped": 0}
        there = await host.call("runs.get", {"run_id": snapshot["id"]})
        epoch = there.pop("epoch")
        assert there == snapshot
        page = await host.call("runs.events", {"run_id": snapshot["id"]})
        entries = [entry for line in lines[1:] for entry in line["events"]]
        assert page["events"] == [{k: v for k, v in entry.items() if k != "status"} for entry in entries]
        await host.call("runs.trace.subscribe", {"run_id": snapshot["id"]})
        statuses: list[str] = []
        while len(statuses) < 3:
            frame = await host.next("runs.trace.event")
            if frame["record"]["record"] == "event":
                statuses.append(frame["run_status"])
        assert statuses == [entry["status"] for entry in entries]
        with pytest.raises(Refused, match="unknown run"):
            await client.call("runs.get", {"run_id": snapshot["id"]})
        other = run()
        await imports(host, other)
        assert (await host.call("runs.get", {"run_id": other[0]["run"]["id"]}))["epoch"] != epoch
        assert await imports(host, lines) == {**NOTHING, "skipped": 1}


async def test_events_keep_their_own_bytes_and_metadata_its_numbers(served: Daemon) -> None:
    event = b'{"type" : "x",  "n": 1.50, "big": 123456789012345678901234567890, "e": 1E5, "s": "\\u00e9/\\/"}'
    (first, page) = run(events=1)
    metadata = b'{"n":1.0,"big":123456789012345678901234567890}'
    source = json.dumps(first).encode()[:-2] + b', "metadata": ' + metadata + b"}}"
    line = json.dumps(page).encode().replace(b'{"type": "text", "n": 0}', event)
    async with peer(served, "host-token") as host:
        call = b'{"jsonrpc":"2.0","id":77,"method":"runs.import","params":{"lines":[%b,%b]}}' % (source, line)
        assert (await host.raw(call.decode()))["result"]["runs"] == 1
        for method in ("runs.events", "runs.get"):
            params = json.dumps({"run_id": first["run"]["id"]})
            await host.socket.send(f'{{"jsonrpc":"2.0","id":78,"method":"{method}","params":{params}}}')
            answer = await host.next_frame()
            assert (event if method == "runs.events" else metadata) in answer


async def test_a_run_appears_with_its_last_event_and_may_come_in_several_calls(served: Daemon) -> None:
    lines = run(events=5)
    run_id = lines[0]["run"]["id"]
    async with peer(served, "host-token") as host:
        for line in lines[:-1]:
            assert (await imports(host, [line]))["runs"] == 0
            with pytest.raises(Refused, match="unknown run"):
                await host.call("runs.get", {"run_id": run_id})
        # Begun anew: what came before does not count.
        assert await imports(host, lines[:2]) == {**NOTHING, "events": 2}
        assert await imports(host, lines[2:]) == {**NOTHING, "runs": 1, "events": 3}
        assert len((await host.call("runs.events", {"run_id": run_id}))["events"]) == 5
        assert await imports(host, lines) == {**NOTHING, "skipped": 1}


async def test_a_run_of_the_last_day_that_is_taken_can_be_watched(served: Daemon) -> None:
    lines = run(events=0, created_at_ms=LAST_MS, updated_at_ms=LAST_MS, ended_at_ms=LAST_MS)
    async with peer(served, "host-token") as host:
        assert (await imports(host, lines))["runs"] == 1
        await host.call("runs.trace.subscribe", {"run_id": lines[0]["run"]["id"]})
        records = [(await host.next("runs.trace.event"))["record"] for _ in range(2)]
    assert [records[0]["started_at"], records[1]["ended_at"]] == ["9999-12-31T00:00:00.000Z"] * 2


async def test_outputs_come_in_with_their_ids_and_parents_are_not_looked_for(served: Daemon) -> None:
    lines = run()
    of_run = output(run_id=lines[0]["run"]["id"])
    alone = output(event={"type": "progress", "stage": "s", "note": None})
    async with peer(served, "host-token") as host, peer(served) as client:
        assert await imports(host, [*lines, of_run, alone]) == {"runs": 1, "events": 3, "outputs": 2, "skipped": 0}
        for line in (of_run, alone):
            assert await client.call("outputs.get", {"id": line["output"]["id"]}) == line["output"]
        assert (await client.call("outputs.read", {"id": of_run["output"]["id"]}))["data"] == '{"k":[1]}'
        assert await imports(host, [*lines, of_run, alone]) == {**NOTHING, "skipped": 3}


async def test_the_result_of_a_handle_comes_in_private_and_whole_and_is_the_hosts(served: Daemon) -> None:
    value = "é" * (7 * 1024 * 1024)
    content = {"kind": "inline", "value": value}
    line = output(
        task_id="0" * 32,
        producer_agent="tool:" + "x" * 256,
        parent_refs=[],
        event={"type": "final", "content": content, "ok": True},
        private=True,
    )
    id_ = line["output"]["id"]
    ways: list[tuple[str, dict[str, Any]]] = [
        ("outputs.get", {"id": id_}),
        ("outputs.read", {"id": id_, "offset": 2, "length": 4}),
        ("outputs.latest", {"name": line["output"]["producer_agent"]}),
    ]
    async with peer(served, "host-token") as host, peer(served) as client:
        # Not as escapes: it fits a message by its bytes.
        lines = json.dumps({"lines": [line]}, ensure_ascii=False)
        answer = await host.raw(f'{{"jsonrpc":"2.0","id":"import","method":"runs.import","params":{lines}}}')
        assert answer["result"] == NOTHING | {"outputs": 1}
        got, part, latest = [await host.call(method, params) for method, params in ways]
        assert got == latest == line["output"]
        assert (part["data"], part["size"], part["eof"]) == ("éé", 2 * len(value), False)
        page = await host.call("outputs.list", {"task_id": "0" * 32})
        assert page["outputs"] == [got | {"event": got["event"] | {"content": page["outputs"][0]["event"]["content"]}}]
        assert page["outputs"][0]["event"]["content"] == {"kind": "inline", "omitted": True, "size": 2 * len(value)}
        assert (await imports(host, [output(parent_refs=[id_])]))["outputs"] == 1
        for method, params in ways:
            with pytest.raises(Refused) as unseen:
                await client.call(method, params)
            assert unseen.value.type == "not_found"
        assert (await client.call("outputs.list", {"task_id": "0" * 32}))["outputs"] == []
        given = {"task_id": "t", "attempt": 0, "producer_agent": "p", "event": {"type": "progress", "stage": "s"}}
        with pytest.raises(Refused) as parent:
            await client.call("outputs.append", given | {"parent_refs": [id_]})
        assert parent.value.type == "not_found"
        appended = await client.call("outputs.append", given | {"private": True})
        assert "private" not in await host.call("outputs.get", appended), "there is no such param: it is everyone's"


async def test_a_file_is_read_where_its_digest_agrees_and_changed_where_not(start: StartDaemon, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "same").write_text("content")
    (root / "other").write_text("something else")
    daemon = start(file_root=str(root))
    digest = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    async with peer(daemon, "host-token") as host:
        for path, size, sha256, data in (
            ("same", 7, digest, "content"),
            ("other", 7, digest, None),
            ("gone", 7, digest, None),
            ("same", None, None, None),
        ):
            content = {"kind": "file_ref", "path": path, "mime": None, "size_hint": None}
            line = output(event={"type": "artifact", "name": "n", "content": content})
            line |= {"size": size, "sha256": sha256}
            assert (await imports(host, [line]))["outputs"] == 1
            read = {"id": line["output"]["id"]}
            if data is not None:
                assert (await host.call("outputs.read", read))["data"] == data
            else:
                with pytest.raises(Refused) as error:
                    await host.call("outputs.read", read)
                assert error.value.data["reason"] == "file_changed"
            assert (await imports(host, [line]))["skipped"] == 1


async def test_a_live_run_is_attended_by_nobody_and_interrupted_after_the_grace(start: StartDaemon) -> None:
    daemon = start(grace_s=0.2)
    async with peer(daemon, "host-token") as host:
        left, attended = run("executing"), run("planning")
        await imports(host, [*left, *attended])
        await host.call("runs.resume", {"run_id": attended[0]["run"]["id"]})  # it is the host's now
        await daemon.until("runs_interrupted", 1)
        statuses = [
            (await host.call("runs.get", {"run_id": lines[0]["run"]["id"]}))["status"] for lines in (left, attended)
        ]
        assert statuses == ["interrupted", "planning"]


# What does not.


def changed(lines: Lines, change: Callable[[Lines], Any]) -> Lines:
    other = copy.deepcopy(lines)
    change(other)
    return other


def _set(where: dict[str, Any], **members: Any) -> None:
    where.update(members)


async def test_other_content_under_the_same_id_is_a_conflict_that_names_it(served: Daemon) -> None:
    lines = [*run(events=4, metadata={"k": 1}), output()]
    run_id = lines[0]["run"]["id"]
    cases: list[tuple[Callable[[Lines], Any], str, str]] = [
        (lambda o: _set(o[0]["run"], prompt="x"), "lines[0]", "another prompt"),
        (lambda o: _set(o[0]["run"], metadata={"k": 1.0}), "lines[0]", "another metadata"),
        (lambda o: _set(o[0]["run"], updated_at_ms=AT_MS + 101), "lines[0]", "another updated_at_ms"),
        (lambda o: _set(o[0]["run"], event_count=5), "lines[0]", "another event_count"),
        (lambda o: _set(o[2]["events"][1], event={"type": "x"}), "lines[2]", "another event 3"),
        (lambda o: _set(o[2]["events"][0], timestamp_ms=AT_MS + 3), "lines[2]", "another event 2"),
        (lambda o: _set(o[1]["events"][1], status="planning"), "lines[1]", "another event 1"),
        (lambda o: o[2]["events"].append({**o[2]["events"][1], "sequence": 4}), "lines[2]", "with 4 events"),
        (lambda o: _set(o[3]["output"], attempt=1), "lines[3]", "another attempt"),
        (
            lambda o: _set(o[3]["output"]["event"], ok=False),
            "lines[3]",
            "another event",
        ),
    ]
    async with peer(served, "host-token") as host:
        await imports(host, lines)
        before = await host.call("runs.events", {"run_id": run_id})
        for change, path, words in cases:
            error = await refused(host, changed(lines, change))
            assert (error.data["reason"], error.data["path"]) == ("exists", path)
            assert words in error.error["message"], error
        assert await host.call("runs.events", {"run_id": run_id}) == before
        assert await imports(host, lines) == {**NOTHING, "skipped": 2}


async def test_what_is_not_as_an_export_writes_it_is_refused_by_its_path(served: Daemon) -> None:
    wrong = "invalid_params"
    cases: list[tuple[Callable[[Lines], Any], str, str]] = [
        (lambda o: _set(o[0]["run"], status="running"), "lines[0].run.status", wrong),
        (lambda o: o[0]["run"].pop("created_at_ms"), "lines[0].run", wrong),
        (lambda o: _set(o[0]["run"], updated_at_ms=AT_MS - 1), "lines[0].run.updated_at_ms", wrong),
        (lambda o: _set(o[0]["run"], ended_at_ms=None), "lines[0].run.ended_at_ms", wrong),
        (lambda o: _set(o[0]["run"], ended_at_ms=AT_MS + 101), "lines[0].run.ended_at_ms", wrong),
        (lambda o: _set(o[0]["run"], status="executing"), "lines[0].run.ended_at_ms", wrong),
        (lambda o: _set(o[0]["run"], created_at_ms=LAST_MS + 1), "lines[0].run.created_at_ms", wrong),
        (lambda o: _set(o[0]["run"], updated_at_ms=2**53), "lines[0].run.updated_at_ms", wrong),
        (lambda o: _set(o[1]["events"][0], timestamp_ms=2**53), "lines[1].events[0].timestamp_ms", wrong),
        (lambda o: o.append(output(created_at_ms=2**53)), "lines[3].output.created_at_ms", wrong),
        (lambda o: _set(o[1], events=o[1]["events"] * PAGE_EVENTS), "", "limit_exceeded"),
        (lambda o: _set(o[0]["run"], id=""), "lines[0].run.id", wrong),
        (lambda o: _set(o[0]["run"], session_id="\n"), "lines[0].run.session_id", wrong),
        (lambda o: _set(o[0]["run"], metadata=[]), "lines[0].run.metadata", wrong),
        (lambda o: _set(o[0]["run"], prompt="x" * 300_000), "", "limit_exceeded"),
        (lambda o: _set(o[0]["run"], event_count=2**30), "", "limit_exceeded"),
        (lambda o: _set(o[0]["run"], event_count=2), "lines[2].run_id", "exists"),
        (lambda o: _set(o[1]["events"][1], sequence=2), "lines[1].events[1].sequence", wrong),
        (lambda o: _set(o[2]["events"][0], sequence=3), "lines[2].events[0].sequence", wrong),
        (lambda o: _set(o[1]["events"][0], timestamp_ms=AT_MS - 1), "lines[1].events[0].timestamp_ms", wrong),
        (lambda o: _set(o[1]["events"][1], timestamp_ms=AT_MS - 1), "lines[1].events[1].timestamp_ms", wrong),
        (lambda o: _set(o[2]["events"][0], timestamp_ms=AT_MS), "lines[2].events[0].timestamp_ms", wrong),
        (lambda o: _set(o[2]["events"][0], timestamp_ms=AT_MS + 101), "lines[2].events[0].timestamp_ms", wrong),
        (lambda o: _set(o[1]["events"][0], status="done"), "lines[1].events[0].status", wrong),
        (lambda o: _set(o[1]["events"][0], status="failed"), "lines[1].events[1].status", wrong),
        (lambda o: _set(o[1]["events"][1], status="failed"), "lines[1].events[1].status", wrong),
        (lambda o: _set(o[1]["events"][1], status="completed"), "lines[2].events[0].status", wrong),
        (lambda o: _set(o[2]["events"][0], status="failed"), "lines[2].events[0].status", wrong),
        (lambda o: _set(o[1]["events"][0], event={"no": "type"}), "lines[1].events[0]", wrong),
        (lambda o: _set(o[1]["events"][0], event={"type": "error"}), "lines[1].events[0]", wrong),
        (lambda o: _set(o[1]["events"][0], event="x"), "lines[1].events[0]", wrong),
        (lambda o: _set(o[1], events=[]), "lines[1].events", wrong),
        (lambda o: _set(o[1], run_id="nobody's"), "lines[1].run_id", wrong),
        (lambda o: o.pop(0), "lines[0].run_id", wrong),
        (lambda o: o.pop(1), "lines[1].events[0].sequence", wrong),
        (lambda o: o[1].pop("run_id"), "lines[1]", wrong),
        (lambda o: _set(o[1], run=o[0]["run"]), "lines[1]", wrong),
        (lambda o: o.append({}), "lines[3]", wrong),
        (lambda o: o.append([]), "lines[3]", wrong),  # type: ignore[arg-type]
        (lambda o: o.append(output(id="out-x")), "lines[3].output.id", wrong),
        (lambda o: o.append(output(event={"type": "x"})), "lines[3].output.event.type", wrong),
        (lambda o: o.append(output(run_id="nobody's")), "lines[3].output.run_id", wrong),
        (lambda o: o.append(output() | {"sha256": "0" * 64}), "lines[3].sha256", wrong),
        (lambda o: o.append(output() | {"sha256": "x"}), "lines[3].sha256", wrong),
    ]
    async with peer(served, "host-token") as host:
        for change, path, kind in cases:
            lines = run()
            run_id = lines[0]["run"]["id"]
            error = await refused(host, changed(lines, change))
            if kind == "exists":  # the run was complete with its first page: the second goes past its end
                assert error.data["reason"] == "exists", error
            else:
                assert (error.type, error.data.get("path", "")) == (kind, path), error
            with pytest.raises(Refused, match="unknown run"):
                await host.call("runs.get", {"run_id": run_id})
            assert (await imports(host, lines))["runs"] == 1, "all of the lines were refused, so nothing is in the way"


async def test_lines_are_bounded_and_for_the_host_alone(served: Daemon) -> None:
    async with peer(served, "host-token") as host, peer(served) as client:
        with pytest.raises(Refused) as error:
            await imports(client, run())
        assert error.value.type == "forbidden"
        too_many = [line for _ in range(1_001) for line in run(events=0)]
        assert (await refused(host, too_many)).data["limit"] == "import_lines"
        assert await imports(host, too_many[:1_000]) == {**NOTHING, "runs": 1_000}
        assert (await refused(host, [])).type == "invalid_params"


async def test_a_run_that_is_made_while_it_is_imported_is_a_conflict(served: Daemon) -> None:
    async with peer(served, "host-token") as host, peer(served) as client:
        key = f"k{next(_ids)}"
        made = await client.create(idempotency_key=key)
        await client.call("runs.cancel", {"run_id": made["id"]})
        await client.call("runs.delete", {"run_id": made["id"]})
        lines = run(id=made["id"])
        lines[1]["run_id"] = lines[2]["run_id"] = made["id"]
        await imports(host, lines[:2])
        await client.create(idempotency_key=key)
        assert (await refused(host, lines[2:])).data["reason"] == "exists"


async def test_what_others_have_made_is_compared_and_nothing_is_added_to_it(served: Daemon) -> None:
    async with peer(served, "host-token") as host, peer(served) as client:
        made = await client.create()
        await client.call("runs.cancel", {"run_id": made["id"]})
        there = await client.call("runs.get", {"run_id": made["id"]})
        line = {"run": {name: value for name, value in there.items() if name != "epoch"}}
        assert await imports(host, [line]) == {**NOTHING, "skipped": 1}
        error = await refused(host, [line, output(run_id=made["id"])])
        assert (error.type, error.error["message"].split(":")[0]) == ("forbidden", "lines[1].output.run_id")


# Kills, and load.


async def test_a_kill_in_the_middle_leaves_nothing_and_the_same_again_is_complete(start: StartDaemon) -> None:
    daemon = start()
    whole, half = run(events=200), run(events=2_000)
    lines = [*whole, *half]
    async with peer(daemon, "host-token") as host:
        for first in range(0, 600, 50):
            await imports(host, lines[first : first + 50])
        assert [found["id"] for found in (await host.call("runs.list"))["runs"]] == [whole[0]["run"]["id"]]
        more = asyncio.gather(*(imports(host, [line]) for line in lines[600:900]), return_exceptions=True)
        await daemon.until("commits", 13)
        daemon.kill()
        await more
    daemon.start()
    async with peer(daemon, "host-token") as host:
        assert [found["id"] for found in (await host.call("runs.list"))["runs"]] == [whole[0]["run"]["id"]]
        error = await refused(host, lines[900:901])
        assert "has to come first" in error.error["message"]
        skipped = 0
        for first in range(0, len(lines), 500):
            skipped += (await imports(host, lines[first : first + 500]))["skipped"]
        assert skipped == 1
        page = await host.call("runs.events", {"run_id": half[0]["run"]["id"], "after": 1_000})
        assert [entry["event"]["n"] for entry in page["events"]] == list(range(1_000, 2_000))


async def test_while_much_comes_in_others_are_answered(served: Daemon) -> None:
    entries = [{"type": "text", "n": n} for n in range(1_000)]
    async with raw_peer(served, "host-token") as host:
        lines: Lines = []
        for _ in range(20):
            head, *_ = run(events=1_000)
            page = [
                {"sequence": n, "timestamp_ms": AT_MS + 50, "status": "completed", "event": event}
                for n, event in enumerate(entries)
            ]
            lines += [head, {"run_id": head["run"]["id"], "events": page}]
        # On one connection, so that the order of the answers tells which was done first.
        pings = [call_frame(f"p{n}", "server.ping") for n in range(3)]
        host.send(b"".join([call_frame("import", "runs.import", {"lines": lines}), *pings]))
        answers = [await host.message() for _ in range(4)]
        assert [answer["id"] for answer in answers] == ["p0", "p1", "p2", "import"]
        assert answers[-1]["result"]["events"] == 20_000
