"""Turns and outcomes, exported and imported: whoever watches the copy sees what who watched the run has seen."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import Peer, Refused, peer
from tests.wire.test_export import command, environment
from tests.wire.test_import import NOTHING, Lines, imports, run
from tests.wire.test_import import refused as refused_lines

__all__ = ["environment"]  # a fixture of every test here

OUTCOME = {"status": "success", "summary": "é", "evidence": [{"kind": "k", "data": {"x": 1.50}}], "more": None}
# Members of its own may have any name, and be anything.
ODD = {"prompt": "p", "sequence": "none", "timestamp_ms": 1.5, "event": [{}], "cursor": None, "run_id": "é\u2028"}
MODEL = {"turn_index": 1, "assistant_text": "a", "requested_tool_calls": [], "model_id": "m"}


async def fill(daemon: Daemon) -> list[str]:
    """Runs with turns among events, with many turns, with large ones, over and live, with outcomes and without."""
    async with peer(daemon) as agent, peer(daemon) as client:
        await agent.call("server.handshake", {"protocol_version": 3})
        runs = [(await agent.call("runs.start", {"intent": "i", "agent_name": "a"}))["run_id"] for _ in range(5)]
        mixed, many, large, failed, _ = runs
        for _ in range(3):
            await agent.call("runs.record_turns", {"run_id": mixed, "turns": [ODD, {}]})
            await client.record(mixed, {"type": "turn", "index": 7}, {"type": "x", "record": "turn"})
            given = {**MODEL, "token_usage": {"in": 1}, "duration_ms": 5}
            await agent.call("runs.record_model_turn", {"run_id": mixed, **given})
        await agent.call("runs.complete", {"run_id": mixed, "outcome": OUTCOME})
        await client.record(mixed, {"type": "late"})
        batches: list[tuple[str, list[dict[str, Any]]]] = [
            *((many, [{"output": n} for n in range(first, first + 250)]) for first in range(0, 1_500, 250)),
            *((large, [{f"m{n}": "x" * 16_000 for n in range(14)}]) for _ in range(24)),  # more than is gathered ahead
        ]
        for run_id, turns in batches:
            await agent.call("runs.record_turns", {"run_id": run_id, "turns": turns})
        await agent.call("runs.complete", {"run_id": failed, "outcome": {"status": "give_up"}})
        return runs


async def frames(host: Peer, run_id: str, ended: bool) -> list[bytes]:
    """All that is sent of a run to who watches it from its beginning, to the byte."""
    answer = await host.call("runs.trace.subscribe", {"run_id": run_id})
    count = answer["run"]["event_count"] + 1 + ended
    found = [await host.next_frame() for _ in range(count)]
    await host.call("runs.trace.unsubscribe", {"run_id": run_id})
    return found


async def test_turns_and_outcomes_go_there_and_back_and_the_copy_is_watched_as_the_run_was(
    start: StartDaemon, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    full, empty = start(name="full", grace_s=600), start(name="empty", grace_s=600)
    runs = await fill(full)
    first, second = tmp_path / "first", tmp_path / "second"
    assert await command(full, "export", str(first)) == 0
    assert await command(empty, "import", str(first)) == 0
    assert await command(empty, "export", str(second)) == 0
    assert first.read_bytes() == second.read_bytes()
    capfd.readouterr()
    assert await command(full, "import", str(first)) == 0
    assert "0 runs, 0 events and 0 outputs imported; 5 were there already" in capfd.readouterr().err
    async with peer(full, "host-token") as one, peer(empty, "host-token") as other:
        for run_id in runs:
            live = run_id in runs[1:3] + runs[4:]
            sent = await frames(one, run_id, not live)
            assert sent == await frames(other, run_id, not live)
            if run_id == runs[0]:
                kinds = [json.loads(frame)["params"]["record"]["record"] for frame in sent[1:-2]]
                assert kinds == ["turn", "turn", "event", "event", "model_turn"] * 3
                assert json.loads(sent[-1])["params"]["record"]["termination"] == {
                    "kind": "outcome",
                    "outcome": OUTCOME,
                }
            page = {"run_id": run_id, "limit": 1_000}
            entries = (await one.call("runs.events", page))["events"]
            assert entries == (await other.call("runs.events", page))["events"], "times, too"
            if run_id == runs[1]:
                assert len({entry["timestamp_ms"] for entry in entries}) > 1
        for host in (one, other):
            await host.call("server.handshake", {"protocol_version": 3})
        listed = [await host.call("runs.list", {"agent_id": "name:a"}) for host in (one, other)]
        assert listed[0] == listed[1]
        assert {found["run_id"]: found["turn_count"] for found in listed[0]["runs"]} == dict(
            zip(runs, (9, 1_500, 24, 0, 0), strict=True)
        )
        traces = [await host.call("runs.get_trace", {"run_id": runs[0]}) for host in (one, other)]
        assert traces[0] == traces[1]


async def test_what_a_run_was_completed_with_is_told_to_who_subscribes(daemon: Daemon) -> None:
    *_, failed, live = await fill(daemon)
    async with peer(daemon, "host-token") as host:
        answer = await host.call("runs.trace.subscribe", {"run_id": failed})
        assert answer["termination"] == {"kind": "outcome", "outcome": {"status": "give_up"}}
        assert "termination" not in await host.call("runs.trace.subscribe", {"run_id": live})


async def test_a_turn_that_no_daemon_has_written_and_an_outcome_that_cannot_be_are_refused_by_their_path(
    daemon: Daemon,
) -> None:
    def turn(**members: Any) -> Lines:
        """A run whose last event, 2, is a turn, with an outcome."""
        lines = run(result_text="r", outcome=OUTCOME)
        lines[2]["events"][0] |= {"record": "turn", "event": {"type": "turn", "index": 2, "output": "o"}} | members
        return lines

    def outcome(value: Any, **members: Any) -> Lines:
        lines = turn()
        lines[0]["run"] |= {"outcome": value, **members}
        return lines

    event = "lines[2].events[0].event"
    cases: list[tuple[Lines, str, str]] = [
        (turn(event={"type": "turn", "index": 1}), event, "invalid_params"),
        (turn(event={"type": "turn", "index": 20}), event, "invalid_params"),
        (turn(event={"type": "turn", "index": 2.5}), event, "invalid_params"),
        (turn(event={"type": "model_turn", "index": 2}), event, "invalid_params"),
        (turn(event={"index": 2, "type": "turn"}), event, "invalid_params"),
        (turn(event={"type": "turn"}), event, "invalid_params"),
        (turn(record="model_turn"), event, "invalid_params"),
        (turn(event={"type": "turn", "index": 2, "record": "ended"}), f"{event}.record", "invalid_params"),
        (turn(record="started"), "lines[2].events[0].record", "invalid_params"),
        (turn(event={"type": "turn", "index": 2, "x": "x" * 2**20}), "", "limit_exceeded"),
        (outcome([]), "lines[0].run.outcome", "invalid_params"),
        (outcome("done"), "lines[0].run.outcome", "invalid_params"),
        (outcome(None), "lines[0].run.outcome", "invalid_params"),
        (outcome({"x": "x" * 2**20}), "", "limit_exceeded"),
        (outcome({"deep": json.loads("[" * 48 + "]" * 48)}), "", "limit_exceeded"),
        (outcome({}, status="executing", ended_at_ms=None), "lines[0].run.outcome", "invalid_params"),
        (outcome({}, status="cancelled"), "lines[0].run.outcome", "invalid_params"),
    ]
    async with peer(daemon, "host-token") as host:
        for lines, path, kind in cases:
            error = await refused_lines(host, lines)
            assert (error.type, error.data.get("path", "")) == (kind, path), error
            with pytest.raises(Refused, match="unknown run"):
                await host.call("runs.get", {"run_id": lines[0]["run"]["id"]})
        changes: list[tuple[Callable[[Lines], Any], str]] = [
            (lambda o: o[0]["run"].update(outcome={}), "another outcome"),
            (lambda o: o[0]["run"].pop("outcome"), "another outcome"),
            (lambda o: o[2]["events"][0].pop("record"), "another event 2"),
        ]
        lines = turn()
        assert await imports(host, lines) == {**NOTHING, "runs": 1, "events": 3}
        assert await imports(host, lines) == {**NOTHING, "skipped": 1}
        for change, words in changes:
            other = copy.deepcopy(lines)
            change(other)
            with pytest.raises(Refused, match=words) as there:
                await imports(host, other)
            assert there.value.data["reason"] == "exists"
