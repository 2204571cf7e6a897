"""A run written in the CAR dialect is read by every native reader: the client, the command's lines, the live view."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from carserver.client.car import connect
from tests.daemon import Daemon
from tests.peer import Peer, peer
from tests.terminal import terminal
from tests.wire.test_command_line import carserver

TURNS: list[dict[str, Any]] = [
    {"prompt": "look", "tool": "grep", "parameters": {"pattern": "TODO"}, "output": {"found": 3}},
    {"tool": "rm", "parameters": {"path": "/"}, "output": "\x1b[2Jno", "policy_rejected": True, "text": "its own"},
]
SAID: dict[str, Any] = {
    "turn_index": 1,
    "assistant_text": "I look for what is left to do.",
    "requested_tool_calls": [{"id": "c1", "name": "grep", "arguments": {"pattern": "TODO"}}],
    "model_id": "a-model",
    "token_usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    "duration_ms": 800,
}
OUTCOME: dict[str, Any] = {
    "status": "success",
    "summary": "Nothing is left.",
    "evidence": [{"kind": "tool_result", "description": "the search", "data": {"found": 0}}],
    "metrics": {"turns": 2, "tool_calls": 2},
    "tools_called": ["grep"],
}


@asynccontextmanager
async def written(daemon: Daemon) -> AsyncIterator[tuple[Peer, str]]:
    """A run that an agent of the CAR dialect has begun, with what its model said."""
    async with peer(daemon) as agent:
        await agent.call("server.handshake", {"protocol_version": 3, "client_version": "0.58.0"})
        run = await agent.call("runs.start", {"intent": "clean up", "agent_name": "Cleaner"})
        assert (await agent.call("runs.record_model_turn", {"run_id": run["run_id"], **SAID}))["ok"]
        yield agent, run["run_id"]


async def finish(agent: Peer, run_id: str) -> None:
    """The rest of the run."""
    assert (await agent.call("runs.record_turns", {"run_id": run_id, "turns": TURNS}))["ok"]
    await agent.call("runs.complete", {"run_id": run_id, "outcome": OUTCOME})


async def test_the_client_reads_what_the_dialect_wrote_over_a_restart_of_the_daemon(daemon: Daemon) -> None:
    async with connect(state_dir=daemon.state) as car:
        async with written(daemon) as (_, run_id):
            records = car.runs.trace(run_id)
            read = [await anext(records), await anext(records)]
        daemon.kill()
        await asyncio.to_thread(daemon.start)
        async with peer(daemon) as agent:
            await agent.call("server.handshake", {"protocol_version": 3})
            await agent.call("runs.resume", {"run_id": run_id})
            await finish(agent, run_id)
        read += [record async for record in records]
        entries = (await car.runs.events(run_id)).events
    kinds = [record.kind for record in read if record.kind != "ended"]
    assert kinds == ["started", "model_turn", "turn", "turn"]
    said, *turns = [record.record for record in read if record.kind in {"model_turn", "turn"}]
    assert said == {"record": "model_turn", "index": 0, "recorded_at": said["recorded_at"], **SAID}
    assert turns == [
        {"record": "turn", "index": n, "verifier_verdict": "not_run", **turn} for n, turn in enumerate(TURNS, 1)
    ]
    assert read[-1].record["termination"] == {"kind": "outcome", "outcome": OUTCOME}
    assert [record.cursor for record in read if record.kind != "ended"] == [0, 1, 2, 3]
    events = [json.loads(bytes(entry.event)) for entry in entries]
    assert [(event["type"], event["index"]) for event in events] == [("model_turn", 0), ("turn", 1), ("turn", 2)]


async def test_the_command_prints_what_the_dialect_wrote_as_lines_and_as_json(daemon: Daemon) -> None:
    async with written(daemon) as (agent, run_id):
        await finish(agent, run_id)
    printed = await asyncio.to_thread(carserver, daemon, "runs", "trace", run_id)
    lines = [line[41:] for line in printed.splitlines()[1:6]]  # beside the names of the records
    assert lines == [
        "I look for what is left to do.",
        '→ grep  {"pattern":"TODO"}',
        "a-model · 120 tokens (100 in, 20 out) · 800 ms",
        'grep  {"pattern":"TODO"}  → {"found":3}',
        'rejected by policy  rm  {"path":"/"}  → \\x1b[2Jno',
    ]
    assert printed.splitlines()[6:] == [
        "completed: Nothing is left.",
        "  outcome: success",
        '  evidence: tool_result: the search  {"found":0}',
        "  metrics: turns 2 · tool calls 2",
        '  tools_called: ["grep"]',
    ]
    printed = await asyncio.to_thread(carserver, daemon, "runs", "trace", run_id, "--json")
    records = [json.loads(line)["record"] for line in printed.splitlines()]
    assert [record["record"] for record in records] == ["started", "model_turn", "turn", "turn", "ended"]
    assert records[2]["output"] == {"found": 3}


async def test_the_live_view_shows_what_the_dialect_writes_as_it_comes(daemon: Daemon) -> None:
    async with written(daemon) as (agent, run_id):
        with terminal(daemon, "runs", "trace", run_id) as view:
            await view.until(lambda: "model turn 1  a-model" in view.screen and "asks for grep  TODO" in view.screen)
            await finish(agent, run_id)
            assert await view.ended() == 0
    assert view.foreign == []
    lines = view.scrollback.splitlines()
    assert lines[0].startswith("✓ completed  clean up")
    assert lines[1] == "3 events · 3 turns · 120 tokens (100 in, 20 out) · agent name:Cleaner"
    assert lines[-7:-3] == [
        "✗ turn 2  rejected by policy  rm  /  → \\x1b[2Jno",
        "─ result ".ljust(80, "─"),
        "Nothing is left.",
        "─ outcome: success ".ljust(80, "─"),
    ]
    assert lines[-2] == "metrics: turns 2 · tool calls 2"
