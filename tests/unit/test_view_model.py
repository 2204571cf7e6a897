"""A run's trace as a tree: what is folded from real logs, what stays bounded, and what words are understood."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from carserver.cli.view_model import RunModel
from carserver.cli.view_tree import NODES, TEXT_CHARACTERS, Kind, Node, State
from carserver.cli.view_words import Tokens, arguments
from carserver.client import Traced
from carserver.protocol.runs import Snapshot
from tests.unit.fakedaemon import snapshot, trace_ended, trace_event, trace_started

RUNS = json.loads((Path(__file__).parent.parent / "data" / "agent-runs.json").read_bytes())
Event = dict[str, Any]


def model_of(events: Iterable[Event], **members: Any) -> RunModel:
    model = RunModel(msgspec.convert(snapshot(created_at_ms=0, **members), Snapshot))
    for sequence, event in enumerate(events):
        model.take(msgspec.convert(trace_event(sequence, event), Traced))
    return model


def real(name: str) -> RunModel:
    return model_of(entry["event"] for entry in RUNS[name][0]["events"])


def shape(node: Node) -> list[Any]:
    """The tree as lists: title, state, and what is below."""
    return [[child.title, child.state.value, *([shape(child)] if child.children else [])] for child in node.children]


def kept(node: Node) -> int:
    return sum(1 + kept(child) for child in node.children)


def folded(node: Node) -> int:
    own = sum(number for kind, number in node.folded.items() if kind != "failed")
    return own + sum(folded(child) for child in node.children)


# ---------------------------------------------------------------------------------------------------- real logs


def test_a_real_run_with_tools_is_turns_with_their_tools() -> None:
    model = real("tools")
    assert shape(model.tree.root) == [
        ["context_resolved", "done"],
        ["turn 1", "done", [["bash", "done"], ["read", "done"]]],
        ["turn 2", "done", [["write", "done"]]],
        ["turn 3", "done"],
    ]
    bash = model.tree.root.children[1].children[0]
    assert arguments(bash.input) == "echo hi; seq 1 5"
    assert bash.output == "hi\n1\n2\n3\n4\n5\n"
    assert model.tokens == Tokens(33, 21, 54), "the agent's own sum, not twice the turns'"
    assert "".join(passage.text for passage in model.writing.passages) == "All done. The final answer is forty-two. "


def test_a_real_run_with_a_plan_is_steps_with_their_turns() -> None:
    model = real("plan")
    steps = [node for node in model.tree.root.children if node.kind is Kind.STEP]
    assert [(node.title, node.detail, node.state) for node in steps] == [
        ("step 1/2", "first", State.DONE),
        ("step 2/2", "second", State.DONE),
    ]
    assert [[child.title for child in node.children if child.kind is Kind.TURN] for node in steps] == [["turn 1"]] * 2
    assert (model.goal, model.fraction, model.prompt) == ("make it", 1.0, "do it")
    assert model.tokens == Tokens(22, 14, 36)


def test_a_real_run_that_failed_ends_its_turn_so() -> None:
    model = real("err")
    assert shape(model.tree.root)[-1] == ["turn 1", "failed"]
    assert model.error is not None
    assert "circuit breaker" in model.error


def test_a_real_run_that_was_cancelled_leaves_its_turn_open() -> None:
    model = real("cancel")
    assert model.tree.root.children[-1].open
    assert model.writing.passages[-1].text.startswith("tick0 tick1 ")


@pytest.mark.parametrize("name", RUNS)
def test_every_event_of_a_real_log_is_taken_in(name: str) -> None:
    model = real(name)
    assert model.cursor == len(RUNS[name][0]["events"]) == model.changes


# ------------------------------------------------------------------------------------------------------- bounds


def flood(kind: str) -> Iterator[Event]:
    for n in itertools.count():
        match kind:
            case "tools that never end":
                yield {"type": "tool_start", "id": f"c{n}", "name": "bash"}
            case "turns with tools":
                yield {"type": "turn_start", "turn": n}
                yield {"type": "tool_start", "id": f"c{n}", "name": "bash"}
                yield {"type": "tool_end", "id": f"c{n}", "exit_code": n % 2}
            case "steps":
                yield {"type": "step_start", "step_id": f"s{n}", "description": "more"}
                yield {"type": "turn_start", "turn": 1}
            case "starts of unknown kinds":
                yield {"type": f"thing{n}_start"}
            case "text":
                yield {"type": "text_delta", "text": f"word {n} "}
            case "text of many kinds":
                yield {"type": f"kind{n}_delta", "text": "ab"}


KINDS = [
    "tools that never end",
    "turns with tools",
    "steps",
    "starts of unknown kinds",
    "text",
    "text of many kinds",
]


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded_and_what_was_folded_is_counted(kind: str) -> None:
    model = model_of(itertools.islice(flood(kind), 12_000))
    root = model.tree.root
    assert kept(root) <= NODES
    made = sum(number for name, number in model.tree.counts.items() if name != "failed")
    assert kept(root) + folded(root) == made, "every line is shown or counted"
    assert len(model.tree.tools) + len(model.tree.steps) <= NODES, "and what is folded is not found by its id"
    assert sum(len(passage.text) for passage in model.writing.passages) <= 2 * TEXT_CHARACTERS
    if kind == "text":
        assert model.writing.cut > 0
        assert model.writing.passages[-1].text.endswith("word 11999 ")


def test_what_is_under_way_is_never_folded() -> None:
    events: list[Event] = [
        {"type": "step_start", "step_id": "s", "description": "long"},
        {"type": "turn_start", "turn": 7},
    ]
    model = model_of([*events, *itertools.islice(flood("tools that never end"), 5 * NODES)])
    (step,) = model.tree.root.children
    (turn,) = step.children
    assert (step.detail, turn.title) == ("long", "turn 7")
    assert turn.children[-1].key == f"c{5 * NODES - 1}"
    model.take(msgspec.convert(trace_event(0, {"type": "step_end", "step_id": "s", "status": "completed"}), Traced))
    assert step.state is State.DONE


def test_members_of_any_length_are_kept_short() -> None:
    long = "x" * 100_000
    model = model_of(
        [
            {"type": "tool_start", "id": long, "name": long},
            {"type": "tool_input_delta", "delta": long},
            {"type": "tool_output_delta", "id": long, "delta": long},
            {"type": "step_start", "step_id": long, "description": long},
            {"type": "unheard_of", "a": {"b": [long] * 1000}, long: long},
            {"type": long},
        ]
    )
    told = [value for node in model.tree.root.children for value in (node.title, node.detail, node.key, node.output)]
    assert max(map(len, told)) <= 400
    assert len(model.tree.root.children[0].input) <= 2048


# -------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"fraction": 0.25}, 0.25),
        ({"progress": 0.5}, 0.5),
        ({"progress": 50}, 0.5),
        ({"percent": 75}, 0.75),
        ({"percentage": 10.0}, 0.1),
        ({"current": 3, "total": 4}, 0.75),
        ({"progress": {"current": 1, "total": 2}}, 0.5),
        ({"completed_steps": 1, "total_steps": 4}, 0.25),
        ({"fraction": 7}, 1.0),
        ({"fraction": True}, None),
        ({"fraction": -1}, None),
        ({"fraction": "half"}, None),
        ({"current": 1, "total": 0}, None),
        ({"progress": {"progress": {"progress": {}}}}, None),
        ({"percent": 10**400}, None),
        ({}, None),
    ],
)
def test_progress_is_understood_by_the_names_in_use(event: Event, expected: float | None) -> None:
    model = model_of([{"type": "tool_start", "id": "c1", "name": "bash"}, {"type": "tool_news", "id": "c1", **event}])
    assert model.tree.root.children[0].fraction == expected


def test_what_a_tool_was_given_is_told_the_same_whether_it_came_whole_or_in_pieces() -> None:
    given = {"command": "ls -l", "timeout": 5}
    whole = model_of([{"type": "tool_start", "id": "c1", "name": "bash", "args": given}])
    pieces = [
        {"type": "tool_input_delta", "id": "c1", "delta": piece} for piece in re.findall("..?", json.dumps(given))
    ]
    streamed = model_of([{"type": "tool_start", "id": "c1", "name": "bash"}, *pieces])
    assert whole.tree.root.children[0].detail == "ls -l  5"
    assert arguments(streamed.tree.root.children[0].input) == "ls -l  5"


def test_news_of_a_tool_by_its_id_is_shown_at_the_tool() -> None:
    model = model_of(
        [
            {"type": "tool_start", "id": "c1", "name": "bash"},
            {"type": "tool_start", "id": "c2", "name": "read"},
            {"type": "anything", "id": "c1", "message": "40 of 100"},
            {"type": "tool_output_delta", "id": "c1", "delta": "late", "current": 1, "total": 2},
            {"type": "tool_end", "id": "c2", "error": "gone"},
        ]
    )
    bash, read = model.tree.root.children
    assert (bash.output, bash.fraction, bash.state) == ("40 of 100late", 0.5, State.RUNNING)
    assert (read.output, read.state) == ("gone", State.FAILED)


def test_a_tool_that_is_announced_and_then_executed_is_one() -> None:
    model = model_of(
        [
            {"type": "tool_start", "id": "c1", "name": "bash"},
            {"type": "tool_execution_start", "id": "c1", "name": "bash", "args": {"command": "ls"}},
            {"type": "tool_execution_end", "id": "c1", "exit_code": -9},
            {"type": "tool_end", "id": "elsewhere", "name": "read", "output": "x", "exit_code": 0},
        ]
    )
    bash, read = model.tree.root.children
    assert (bash.state, bash.exit_code, model.tree.counts["failed"]) == (State.FAILED, -9, 1)
    assert "ls" in bash.detail
    assert (read.title, read.state, read.started_ms) == ("read", State.DONE, None), "its start was before the view's"


def test_unknown_types_are_a_note_and_unknown_starts_have_ends() -> None:
    model = model_of(
        [
            {"type": "noticed", "n": 1},
            {"type": "wondered", "what": "why", "none": None},
            {"type": "compaction_start", "reason": "long"},
            {"type": "compaction_update", "fraction": 0.5},
            {"type": "compaction_failed", "error": "no"},
            {"type": "compaction_update", "fraction": 0.5},
        ]
    )
    assert shape(model.tree.root) == [["wondered", "done"], ["compaction", "failed"], ["compaction_update", "done"]]
    note, span, _ = model.tree.root.children
    assert (note.events, note.detail) == (2, "what: why")
    assert (span.detail, span.fraction) == ("error: no", 0.5)


# ------------------------------------------------------------------------------------------------------ its end


def test_the_end_brings_the_result_and_a_reopened_run_goes_on() -> None:
    model = model_of([{"type": "turn_start", "turn": 1}])
    model.take(msgspec.convert(trace_ended(1, "interrupted"), Traced))
    model.settle(msgspec.convert(snapshot(status="interrupted", interrupted_reason="owner gone"), Snapshot))
    assert (model.over, model.status, model.reason) == (True, "interrupted", "owner gone")
    model.take(msgspec.convert(trace_event(1, {"type": "turn_start", "turn": 2}), Traced))
    assert (model.over, model.status, model.reason) == (False, "executing", None)
    ended = trace_ended(2, "completed", result_text="fine", ended_at="1970-01-01T00:00:09.500Z")
    model.take(msgspec.convert(ended, Traced))
    assert (model.result_text, model.elapsed_ms(now_ms=99_999)) == ("fine", 9_500)


def test_a_prompt_is_that_of_the_run_or_what_its_first_events_say() -> None:
    model = model_of([{"type": "agent_start", "prompt": "later"}, {"type": "agent_start", "prompt": "x"}], prompt="")
    assert model.prompt == "later"
    model = model_of([], prompt="")
    model.take(msgspec.convert(trace_started(), Traced))
    assert model.prompt == "do it"


def test_a_clock_behind_the_daemons_gives_no_negative_time() -> None:
    model = model_of([{"type": "turn_start"}])
    assert model.elapsed_ms(now_ms=-5_000) == 1_000
