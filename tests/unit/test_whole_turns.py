"""Turns that were recorded whole, by agents of the CAR dialect, as every native reader has and shows them."""

import functools
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carserver.cli.app import run
from carserver.cli.trace import TraceView
from carserver.cli.view import record, screen
from carserver.cli.view_model import RunModel
from carserver.cli.view_words import Tokens
from carserver.client import Traced
from carserver.client.connection import Connection, open_connection
from carserver.client.trace import trace
from tests.unit.fakedaemon import FakeDaemon, Session, snapshot, trace_ended, trace_event, trace_started, trace_turn
from tests.unit.test_view import ANY, HOSTILE, NOW_MS, OBEYED, fits, plain
from tests.unit.test_view_model import model_of, shape

Captured = pytest.CaptureFixture[str]

SAID = {
    "turn_index": 1,
    "assistant_text": "I look at it.\n\nThen I fix it.\n",
    "requested_tool_calls": [{"id": "c1", "name": "bash", "arguments": {"command": "ls -l"}}],
    "model_id": "m-8b",
    "token_usage": {"prompt_tokens": 1_200, "completion_tokens": 34},
    "duration_ms": 2_140,
}
OUTCOME = {
    "status": "success",
    "summary": "All is well.",
    "evidence": [{"kind": "tool_result", "description": "the tests", "data": {"passed": 2}}, {"kind": "diff"}],
    "metrics": {"turns": 1_000, "tool_calls": 1, "duration_ms": 9_000},
    "tools_called": ["bash"],
    "timestamp": "2026-01-01T00:00:00Z",
}
RECORDS = [
    trace_started(),
    trace_turn(0, "model_turn", recorded_at="2026-11-20T00:00:02.000Z", **SAID),
    trace_turn(1, tool="bash", parameters={"command": "ls -l"}, output="total 0", verifier_verdict="not_run"),
    trace_turn(2, tool="bash", parameters={"command": "rm"}, output="no", policy_rejected=True),
    trace_turn(3, prompt="why", output={"k": 1}, verifier_verdict="passed", policy_rejected=False),
    trace_ended(4, result_text="All is well.", termination={"kind": "outcome", "outcome": OUTCOME}),
]


def subscribed(params: Any) -> dict[str, Any]:
    return {"run": snapshot(), "cursor": params["cursor"], "epoch": "e1", "recovered": params.get("epoch") == "e1"}


def stream(session: Session, params: Any) -> Any:
    """All records from a cursor on."""
    for params_of in RECORDS:
        if params["cursor"] == 0 or params_of["cursor"] > params["cursor"] or params_of is RECORDS[-1]:
            session.later(functools.partial(session.notify, "runs.trace.event", params_of))
    return subscribed(params)


def model_of_records(*records: dict[str, Any]) -> RunModel:
    model = model_of([])
    for one in records:
        model.take(msgspec.convert(one, Traced))
    return model


# ---------------------------------------------------------------------------------------------------- the client


def opener(daemon: FakeDaemon) -> Callable[[], AbstractAsyncContextManager[Connection]]:
    return lambda: open_connection(daemon.url)


async def test_a_trace_has_turns_as_they_came_and_goes_on_after_one_where_the_connection_was_lost() -> None:
    def subscribe(session: Session, params: Any) -> Any:
        if params["cursor"] > 0:
            return stream(session, params)
        for params_of in RECORDS[:2]:
            session.later(functools.partial(session.notify, "runs.trace.event", params_of))
        session.later(lambda: session.close(1012))
        return subscribed(params)

    with FakeDaemon({"runs.trace.subscribe": subscribe}) as daemon:
        records = [record async for record in trace(opener(daemon), "run-1")]
        assert [call["cursor"] for call in daemon.params_of("runs.trace.subscribe")] == [0, 1]
    assert [json.loads(bytes(record.raw)) for record in records] == RECORDS
    assert [record.record for record in records] == [params["record"] for params in RECORDS]
    assert [record.kind for record in records] == ["started", "model_turn", "turn", "turn", "turn", "ended"]
    assert [record.cursor for record in records] == [0, 1, 2, 3, 4, 4]


def test_the_kind_of_a_record_tells_a_type_checker_its_members() -> None:
    """The assertions hold anyway; that mypy takes this function is what is tested."""

    def told(traced: Traced) -> str:
        record = traced.typed
        if record["record"] == "turn":
            return f"{record['index']}: {record.get('tool')}"
        if record["record"] == "model_turn":
            return f"{record['index']}, {record['recorded_at']}: {record.get('model_id')}"
        if record["record"] == "event":
            return f"{record['sequence']}: {record['event']['type']}"
        if record["record"] == "ended":
            return record["termination"]["outcome"]["status"] if "termination" in record else record["run_status"]
        return record["intent"]

    records = [msgspec.convert(params, Traced) for params in (*RECORDS[:3], trace_event(2, {"type": "x"}), RECORDS[-1])]
    assert [told(record) for record in records] == [
        "do it",
        "0, 2026-11-20T00:00:02.000Z: m-8b",
        "1: bash",
        "2: x",
        "success",
    ]


# ------------------------------------------------------------------------------------------------- lines, and JSON


def test_a_trace_prints_turns_and_the_outcome(capsys: Captured) -> None:
    with FakeDaemon({"runs.trace.subscribe": stream}) as daemon:
        assert run(["runs", "trace", "run-1", "--url", daemon.url]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert run(["runs", "trace", "run-1", "--json", "--url", daemon.url]) == 0
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == RECORDS
    assert [line.rstrip() for line in lines] == [
        "run-1, 2026-11-20: do it",
        "      0     +0.000  model_turn           I look at it.",
        "",
        "                                         Then I fix it.",
        '                                         → bash  {"command":"ls -l"}',
        "                                         m-8b · 1,234 tokens (1,200 in, 34 out) · 2.1 s",
        '      1             turn                 bash  {"command":"ls -l"}  → total 0',
        '      2             turn                 rejected by policy  bash  {"command":"rm"}  → no',
        '      3             turn                 verifier: passed  why  → {"k":1}',
        "completed: All is well.",
        "  outcome: success",
        '  evidence: tool_result: the tests  {"passed":2}',
        "  evidence: diff",
        "  metrics: turns 1,000 · tool calls 1 · duration 9.0 s",
        '  tools_called: ["bash"]',
    ]


def test_members_that_an_agent_named_like_those_of_an_event_are_taken_for_none() -> None:
    """A turn keeps whatever it was given, under any name."""
    disguised: dict[str, Any] = {
        "type": "text_delta",
        "text": HOSTILE,
        "sequence": HOSTILE,
        "timestamp_ms": 5,
        "event": {"type": "error", "message": HOSTILE},
    }
    params = trace_turn(7, tool="echo", **disguised)
    assert TraceView(coloured=False).show(msgspec.convert(params, Traced)) == f"{'7':>7} {'':>10}  {'turn':<20} echo\n"
    model = model_of_records(params)
    assert shape(model.tree.root) == [["turn 7", "done"]]
    assert model.error is None


# ------------------------------------------------------------------------------------------------- the live view


def test_the_live_view_has_whole_turns_as_turns() -> None:
    model = model_of_records(*RECORDS[:-1])
    assert shape(model.tree.root) == [
        ["model turn 1", "done", [["asks for bash", "done"]]],
        ["turn 1", "done"],
        ["turn 2", "failed"],
        ["turn 3", "done"],
    ]
    assert model.tokens == Tokens(1_200, 34, 1_234)
    shown = plain(screen(model, 80, 24, NOW_MS))
    assert shown[1] == "4 events · 4 turns · 1,234 tokens (1,200 in, 34 out)"
    assert shown[3] == f"{'✓ model turn 1  m-8b':<59} 1,234 tokens   2.1 s"
    assert shown[4:8] == [
        "  → asks for bash  ls -l",
        "✓ turn 1  bash  ls -l  → total 0",
        "✗ turn 2  rejected by policy  bash  rm  → no",
        '✓ turn 3  verifier: passed  why  → {"k":1}',
    ]
    assert shown[9:12] == ["I look at it.", "", "Then I fix it."]
    assert "✗ turn 2  rejected by p…" in plain(screen(model, 24, 24, NOW_MS)), "what matters most comes first"


def test_the_turn_of_an_action_is_the_tool_that_is_shown_already() -> None:
    turn: dict[str, Any] = {"tool": "grep", "parameters": {"pattern": "TODO"}, "output": "3", "action_id": "a"}
    model = model_of_records(
        trace_started(),
        trace_event(0, {"type": "tool_start", "id": "h1", "name": "grep"}),
        trace_turn(1, handle="h1", **turn),
        trace_event(2, {"type": "tool_end", "id": "h1", "name": "grep", "output": "3"}),
        trace_turn(3, handle="h2", **turn),  # its start was not seen
        trace_turn(4, **turn),
        trace_event(5, {"type": "tool_start", "id": "h3", "name": "look"}),
        trace_event(6, {"type": "tool_end", "id": "h3", "name": "look", "output": '{"error":"no"}'}),
        trace_turn(7, handle="h3", status="failed", **turn),
    )
    nodes = [["grep", "done"], ["turn 3", "done"], ["turn 4", "done"], ["look", "failed"]]
    assert shape(model.tree.root) == nodes
    assert model.tree.counts["failed"] == 1
    assert plain(screen(model, 80, 24, NOW_MS))[3].startswith("✓ grep  TODO  → 3 ")


def test_an_action_that_failed_took_as_long_as_its_tool() -> None:
    def shown() -> list[str]:
        (line,) = [line for line in plain(screen(model, 80, 24, NOW_MS)) if line.startswith("✗ look")]
        return line.split()

    turn: dict[str, Any] = {"tool": "look", "output": {"error": "no"}, "action_id": "a", "status": "failed"}
    model = model_of_records(
        trace_started(),
        trace_event(0, {"type": "tool_start", "id": "h1", "name": "look"}),
        trace_event(500, {"type": "note"}),
        trace_turn(501, handle="h1", **turn),
    )
    assert shown() == ["✗", "look"], "when it ended nobody has said yet"
    end = trace_event(3_000, {"type": "tool_end", "id": "h1", "name": "look", "error": "no"})
    model.take(msgspec.convert(end, Traced))
    assert shown() == ["✗", "look", "→", "no", "3.0", "s"]
    assert model.tree.counts["failed"] == 1


def test_the_record_of_a_view_has_the_outcome_and_a_reopened_run_has_none() -> None:
    model = model_of_records(*RECORDS)
    kept = plain(record(model, 40, NOW_MS))
    assert kept[-7:] == [
        "─ result ───────────────────────────────",
        "All is well.",
        "─ outcome: success ─────────────────────",
        'evidence: tool_result: the tests  {"passed":2}',
        "evidence: diff",
        "metrics: turns 1,000 · tool calls 1 · duration 9.0 s",
        'tools_called: ["bash"]',
    ]
    model.take(msgspec.convert(trace_turn(4, tool="late"), Traced))
    assert model.outcome is None


def test_a_turn_that_asks_for_much_is_shown_in_bounds() -> None:
    calls = [{"id": f"c{n}", "name": "echo", "arguments": "x" * 1_000} for n in range(500)]
    evidence = [{"kind": "k", "description": "x" * 1_000}] * 500
    termination = {"kind": "outcome", "outcome": {"status": "failure", "evidence": evidence}}
    records = [trace_turn(0, "model_turn", requested_tool_calls=calls), trace_ended(1, termination=termination)]
    view = TraceView(coloured=False)
    lines = "".join(view.show(msgspec.convert(one, Traced)) for one in records).splitlines()
    assert len(lines) < 50
    assert max(map(len, lines)) < 1_000
    assert any("→ 480 more calls" in line for line in lines), "what is not shown is counted"
    assert lines[-1] == "  evidence: … 480 more"
    assert len(plain(record(model_of_records(*records), 80, NOW_MS))) < 60


def test_hostile_text_in_turns_is_shown_rather_than_obeyed() -> None:
    everywhere: list[Any] = [HOSTILE, {HOSTILE: HOSTILE}]
    names = ("prompt", "tool", "parameters", "output", "cli_outcome", "verifier_verdict", "policy_rejected")
    calls = [HOSTILE, {"name": HOSTILE, "arguments": {HOSTILE: HOSTILE}}]
    for value in everywhere:
        outcome = dict.fromkeys((*OUTCOME, HOSTILE), value) | {"evidence": [value], "metrics": {HOSTILE: value}}
        records = [
            trace_turn(0, "turn", **dict.fromkeys(names, value)),
            trace_turn(1, "model_turn", **dict.fromkeys(SAID, value)),
            trace_turn(2, "model_turn", requested_tool_calls=calls),
            trace_ended(3, termination={"kind": "outcome", "outcome": outcome}),
        ]
        view = TraceView(coloured=False)
        written = "".join(view.show(msgspec.convert(one, Traced)) for one in records)
        assert not OBEYED.search(written.replace("\n", "").replace("\t", "")), "a text's own lines and tabs stay"
        model = model_of_records(*records)
        for width in (24, 80, 120):
            fits(screen(model, width, 24, NOW_MS), width, 24)
            assert not OBEYED.search("".join(plain(record(model, width, NOW_MS))))


TURNS = st.builds(
    lambda kind, members: trace_turn(0, kind, **members),
    st.sampled_from(["turn", "model_turn"]),
    st.dictionaries(st.sampled_from([*SAID, "tool", "parameters", "output", "prompt", "recorded_at", "type"]), ANY),
)


@settings(max_examples=80, deadline=None)
@given(turns=st.lists(TURNS, max_size=6), termination=ANY, outcome=ANY, width=st.integers(20, 150))
def test_turns_of_any_shape_are_taken_in_and_shown(
    turns: list[dict[str, Any]], termination: Any, outcome: Any, width: int
) -> None:
    ends = [trace_ended(1, termination=termination), trace_ended(1, termination={"outcome": outcome})]
    records = [msgspec.convert(one, Traced) for one in (*turns, *ends)]
    view = TraceView(coloured=False)
    model = model_of([])
    for one in records:
        assert view.show(one).endswith("\n")
        model.take(one)
        fits(screen(model, width, 24, NOW_MS), width, 24)
        record(model, width, NOW_MS)
