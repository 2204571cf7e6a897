"""Tools in runs: what the run's log has of a handle, whom it attends, and what the end of one means for the other."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.hosting import Host, polled, until_ended
from tests.peer import Peer, Refused, peer

TOOLS = """
[tools.flood]
command = ["sh", "-c", "yes | head -c 5000000"]

[tools.three]
command = ["sh", "-c", "echo out; echo err >&2; exit 3"]

[tools.sleep]
command = ["sh", "-c", "echo begun; exec sleep 600"]
"""


@pytest.fixture
def tools(tmp_path: Path) -> str:
    path = tmp_path / "tools.toml"
    path.write_text(TOOLS)
    return str(path)


async def log_of(caller: Peer, run_id: str) -> list[dict[str, Any]]:
    """All events of a run."""
    events: list[dict[str, Any]] = []
    more = True
    while more:
        page = await caller.call("runs.events", {"run_id": run_id, "after": len(events)})
        events += [entry["event"] for entry in page["events"]]
        more = page["has_more"]
    return events


async def until_logged(caller: Peer, run_id: str, ends: int = 1) -> list[dict[str, Any]]:
    """All events of a run, once it has so many `tool_end`."""
    await caller.call("runs.trace.subscribe", {"run_id": run_id})
    events: list[dict[str, Any]] = []
    while sum(event["type"] == "tool_end" for event in events) < ends:
        record = (await caller.next("runs.trace.event"))["record"]
        if record["record"] == "event":
            events.append(record["event"])
    await caller.call("runs.trace.unsubscribe", {"run_id": run_id})
    return events


async def test_a_runs_log_has_start_output_and_end_of_a_tool_in_order(start: StartDaemon, tools: str) -> None:
    daemon = start("--tools", tools)
    async with peer(daemon) as caller:
        run = await caller.create()
        answer = await caller.call("tools.call", {"tool": "three", "run_id": run["id"]})
        events = await until_logged(caller, run["id"])
        about = {"id": answer["handle"], "name": "three", "source": "carserver"}
        assert events[0] == {"type": "tool_start", **about}
        deltas = events[1:-1]
        assert sorted("".join(event["delta"] for event in deltas).splitlines()) == ["err", "out"]
        assert all(event == {"type": "tool_output_delta", **about, "delta": event["delta"]} for event in deltas)
        assert events[-1] == {"type": "tool_end", **about, "output": "", "exit_code": 3, "error": "exit code 3"}
        after = await caller.call("runs.get", {"run_id": run["id"]})
        assert (after["status"], after["event_count"]) == ("created", len(events)), "no tool of ours moves the status"


async def test_what_a_flood_leaves_in_the_log_is_bounded_and_says_so(start: StartDaemon, tools: str) -> None:
    daemon = start("--tools", tools)
    async with peer(daemon) as caller:
        run = await caller.create()
        answer = await caller.call("tools.call", {"tool": "flood", "run_id": run["id"]})
        assert answer["status"] == "succeeded"
        events = await until_logged(caller, run["id"])
        deltas = [event for event in events if event["type"] == "tool_output_delta"]
        assert [event["type"] for event in events] == ["tool_start"] + ["tool_output_delta"] * len(deltas) + [
            "tool_end"
        ]
        assert "".join(event["delta"] for event in deltas) == ("y\n" * 131_072)
        assert all(len(event["delta"]) <= 4_096 for event in deltas)
        assert [event.get("truncated", False) for event in deltas] == [False] * (len(deltas) - 1) + [True]


async def test_a_hosted_tools_result_and_error_are_in_the_log(daemon: Daemon) -> None:
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register("echo")
        run = await caller.create()
        results: list[tuple[Any, str]] = [
            ("as it is", "as it is"),
            ({"a": [1.50, None]}, '{"a":[1.5,null]}'),
            (None, ""),
            (False, "false"),
        ]
        for result, _ in results:
            called = caller.start("tools.call", {"tool": "echo", "run_id": run["id"]})
            asked = await host.asked()
            assert asked.params["run_id"] == run["id"]
            await asked.answer(result)
            await called
        called = caller.start("tools.call", {"tool": "echo", "run_id": run["id"]})
        await (await host.asked()).fail("no such file")
        await called
        ends = [event for event in await until_logged(caller, run["id"], 5) if event["type"] == "tool_end"]
        assert [event["output"] for event in ends] == [output for _, output in results] + [""]
        assert ends[-1]["error"] == "no such file"
        assert "exit_code" not in ends[0]
        assert "error" not in ends[0]


async def test_a_large_result_is_an_output_of_its_owner_and_the_host_alone(daemon: Daemon) -> None:
    large = {"rows": ["é" * 1_000] * 100}
    said = json.dumps(large, separators=(",", ":"))  # as the host says it
    agent = f"a.{await _agent_mac(daemon, 'a')}"
    async with peer(daemon, agent) as caller, peer(daemon) as other, peer(daemon, "host-token") as operator:
        host = Host(other)
        await host.register("query")
        run = await caller.create()
        called = caller.start("tools.call", {"tool": "query", "run_id": run["id"]})
        await (await host.asked()).answer(large)
        answer = await called
        assert answer["status"] == "succeeded", answer
        reference = answer["result_ref"]
        assert "result" not in answer
        assert reference["size"] == len(said)
        assert reference["preview"] == said[:256]
        record = await caller.call("outputs.get", {"id": reference["id"]})
        assert record["event"] == {"type": "final", "content": {"kind": "inline", "value": large}, "ok": True}
        assert (record["task_id"], record["attempt"], record["producer_agent"]) == (answer["handle"], 0, "tool:query")
        assert record["run_id"] == run["id"]
        chunks, polled_answer = await until_ended(caller, answer["handle"])
        assert chunks == [{"kind": "done", "result_ref": reference}]
        assert polled_answer["result_ref"] == reference
        events = await until_logged(caller, run["id"])
        assert events[-1]["result_ref"] == reference
        assert events[-1]["output"] == ""
        assert (await operator.call("outputs.get", {"id": reference["id"]}))["id"] == reference["id"]
        for method, params in (
            ("outputs.get", {"id": reference["id"]}),
            ("outputs.read", {"id": reference["id"]}),
            ("outputs.latest", {"name": "tool:query"}),
        ):
            with pytest.raises(Refused, match="not_found"):
                await other.call(method, params)
        listed = await other.call("outputs.list", {"task_id": answer["handle"], "attempt": 0})
        assert listed["outputs"] == []
        pieces, offset = "", 0
        while True:
            piece = await caller.call("outputs.read", {"id": reference["id"], "offset": offset, "length": 50_000})
            pieces += piece["data"]
            offset += len(piece["data"].encode())
            if piece["eof"]:
                break
        assert json.loads(pieces) == large


async def _agent_mac(daemon: Daemon, agent_id: str) -> str:
    from carserver.core.principals import agent_token  # noqa: PLC0415 - what `carserver token --agent` prints

    return agent_token(daemon.token("agent-key"), agent_id).rpartition(".")[2]


async def test_a_result_beyond_what_may_be_stored_fails_its_handle(start: StartDaemon) -> None:
    daemon = start(result_bytes=100_000)
    async with peer(daemon) as caller, peer(daemon) as other:
        host = Host(other)
        await host.register("query")
        called = caller.start("tools.call", {"tool": "query"})
        await (await host.asked()).answer("x" * 100_000)
        answer = await called
        assert answer["status"] == "failed"
        assert answer["error"] == "a result of 100002 bytes is more than result_bytes allows (100000)"


@pytest.mark.parametrize("end", ["cancel", "fail", "error event", "interrupted", "deleted"])
async def test_a_run_that_is_over_takes_its_handles_along(start: StartDaemon, tools: str, end: str) -> None:
    daemon = start("--tools", tools, grace_s=0.3)
    async with peer(daemon) as caller, peer(daemon, "host-token") as operator:
        async with peer(daemon) as owner:
            run_id = (await owner.create())["id"]
            handle = (await owner.call("tools.invoke", {"tool": "sleep", "run_id": run_id}))["handle"]
            await polled(owner, handle, wait_ms=10_000, after=0)
            if end == "cancel":
                await caller.call("runs.cancel", {"run_id": run_id})
            elif end == "fail":
                await caller.call("runs.fail", {"run_id": run_id, "error": "no budget"})
            elif end == "error event":
                await owner.record(run_id, {"type": "error", "message": "no budget"})
            elif end == "deleted":
                await owner.record(run_id, {"type": "agent_end", "text": "done"})
                assert (await caller.call("tools.status", {"handle": handle}))["status"] == "running"
                await caller.call("runs.delete", {"run_id": run_id})
        answer = await polled(operator, handle, wait_ms=10_000, after=1)  # who attends nothing by it
        assert (answer["status"], answer["error"]) == ("cancelled", "its run is over")
        proof = await caller.call("tools.cancel", {"handle": handle, "wait_ms": 10_000})
        assert proof == {"cancelled": True, "cancel": "confirmed"}
        if end != "deleted":
            events = await until_logged(caller, run_id)
            assert events[-1]["type"] == "tool_end" or end == "error event"
            assert next(event for event in events if event["type"] == "tool_end")["error"] == "its run is over"


async def test_a_run_that_is_completed_does_not(start: StartDaemon, tools: str) -> None:
    daemon = start("--tools", tools)
    async with peer(daemon) as caller:
        run_id = (await caller.create())["id"]
        handle = (await caller.call("tools.invoke", {"tool": "sleep", "run_id": run_id}))["handle"]
        await caller.record(run_id, {"type": "agent_end", "text": "done"})
        await polled(caller, handle, wait_ms=10_000, after=0)
        assert (await caller.call("tools.status", {"handle": handle}))["status"] == "running"
        await caller.call("tools.cancel", {"handle": handle})
        events = await until_logged(caller, run_id)
        assert events[-1]["error"] == "cancelled by client"
        after = await caller.call("runs.get", {"run_id": run_id})
        assert (after["status"], after["result_text"]) == ("completed", "done"), "late events move nothing"


async def test_only_ones_own_live_run_takes_a_tool(daemon: Daemon) -> None:
    async with peer(daemon) as caller, peer(daemon) as other, peer(daemon, "host-token") as operator:
        host = Host(other)
        await host.register("echo")
        over, live = (await caller.create())["id"], (await caller.create())["id"]
        await caller.call("runs.cancel", {"run_id": over})
        for who, run_id, kind, reason in (
            (caller, over, "conflict", "run_terminal"),
            (caller, "run-nope", "not_found", None),
            (operator, live, "forbidden", None),
        ):
            with pytest.raises(Refused) as refused:
                await who.call("tools.invoke", {"tool": "echo", "run_id": run_id})
            assert (refused.value.type, refused.value.data.get("reason")) == (kind, reason)
        assert (await log_of(caller, over), await log_of(caller, live)) == ([], [])
        assert (await caller.call("tools.handles"))["handles"] == []


async def test_who_invokes_or_polls_a_handle_of_a_run_attends_it(start: StartDaemon) -> None:
    daemon = start(grace_s=0.1)
    async with peer(daemon) as other, peer(daemon, "host-token") as operator:
        host = Host(other)
        await host.register("slow")

        async def interrupted_before(count: int) -> None:
            """Waits until a run that nobody attends from now on is interrupted, as the so many others were."""
            async with peer(daemon) as owner:
                unattended = (await owner.create())["id"]
            await daemon.until("runs_interrupted", count + 1)
            assert (await operator.call("runs.get", {"run_id": unattended}))["status"] == "interrupted"

        async with peer(daemon) as polling:
            async with peer(daemon) as invoking:
                async with peer(daemon) as owner:
                    run_id = (await owner.create())["id"]
                    handle = (await invoking.call("tools.invoke", {"tool": "slow", "run_id": run_id}))["handle"]
                    asked = await host.asked()
                await interrupted_before(0)
                await polled(polling, handle)
            await interrupted_before(1)
            assert (await polling.call("runs.get", {"run_id": run_id}))["status"] == "created"
            await polled(operator, handle)
        await daemon.until("runs_interrupted", 3)
        assert (await host.told_to_stop())["request_id"] == asked.id


async def test_after_a_kill_the_next_daemon_closes_what_was_open(start: StartDaemon, tools: str) -> None:
    daemon = start("--tools", tools)
    async with peer(daemon) as caller:
        run_id = (await caller.create())["id"]
        done = await caller.call("tools.call", {"tool": "three", "run_id": run_id})
        await until_logged(caller, run_id)
        handle = (await caller.call("tools.invoke", {"tool": "sleep", "run_id": run_id}))["handle"]
        await polled(caller, handle, wait_ms=10_000)
        deleted = (await caller.create())["id"]
        await caller.call("tools.invoke", {"tool": "sleep", "run_id": deleted})
        await until_text(caller, run_id)
    daemon.kill()
    daemon.start()
    async with peer(daemon) as caller:
        events = await until_logged(caller, run_id, 2)
        ends = [event for event in events if event["type"] == "tool_end"]
        assert [event["id"] for event in ends] == [done["handle"], handle]
        assert ends[1] == {
            "type": "tool_end",
            "id": handle,
            "name": "sleep",
            "output": "",
            "error": "the daemon was restarted while the tool ran",
            "source": "carserver",
        }
        assert (await until_logged(caller, deleted))[-1]["type"] == "tool_end"
        assert await polled(caller, handle) is None
        assert (await caller.call("runs.get", {"run_id": run_id}))["status"] == "created", "it has the grace to go on"
    daemon.terminate()
    daemon.start()
    async with peer(daemon) as caller:
        events = await log_of(caller, run_id)
        assert sum(event["type"] == "tool_end" for event in events) == 2, "and no daemon after it does so again"


async def until_text(caller: Peer, run_id: str) -> None:
    """Waits until the text of the last tool is in the log."""
    await caller.call("runs.trace.subscribe", {"run_id": run_id})
    texts = 0
    while texts < 2:
        record = (await caller.next("runs.trace.event"))["record"]
        texts += record["record"] == "event" and "begun" in record["event"].get("delta", "")
        texts += record["record"] == "event" and record["event"]["type"] == "tool_end"
    await caller.call("runs.trace.unsubscribe", {"run_id": run_id})


async def test_term_cancels_what_runs_and_its_end_is_in_the_log(start: StartDaemon, tools: str) -> None:
    daemon = start("--tools", tools)
    async with peer(daemon) as caller:
        run_id = (await caller.create())["id"]
        handle = (await caller.call("tools.invoke", {"tool": "sleep", "run_id": run_id}))["handle"]
        await polled(caller, handle, wait_ms=10_000)
        waiting = caller.start("tools.poll", {"handle": handle, "wait_ms": 30_000, "after": 1})
        await caller.call("server.ping")
        stopping = asyncio.create_task(asyncio.to_thread(daemon.terminate))
        answer = await waiting
        assert (answer["status"], answer["error"]) == ("cancelled", "the daemon stops")
        assert (await caller.closed())[0] == 1012
        assert await stopping == 0
    daemon.start()
    async with peer(daemon) as caller:
        events = await log_of(caller, run_id)
        assert (events[-1]["type"], events[-1]["error"]) == ("tool_end", "the daemon stops")
