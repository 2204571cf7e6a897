"""The view of a run, and the table of runs, as lines: they fit, they read well, and nothing in them is obeyed."""

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text

from carserver.cli.output import duration, takes_a_view
from carserver.cli.view import Line, ansi, facts, line_of, record, screen
from carserver.cli.view_model import RunModel
from carserver.cli.view_tree import Kind
from carserver.cli.view_watch import table
from carserver.cli.watch import Runs, Seen
from carserver.client import Traced
from carserver.protocol.runs import Snapshot
from tests.unit.fakedaemon import snapshot, trace_ended, trace_event
from tests.unit.test_view_model import Event, model_of, real

NOW_MS = 10_000
SIZES = [(20, 3), (40, 10), (40, 24), (80, 24), (119, 12), (120, 40), (250, 60)]
HOSTILE = "[red]x[/]\x1b]0;title\x07\x9b2J\u202eevil\r\n\tsecond 日本語🚀"
OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")  # by some terminal
COLOURS = re.compile(r"\x1b\[([\d;]*)m")


def plain(lines: list[Text]) -> list[str]:
    return [line.plain.rstrip() for line in lines]


def end(model: RunModel, status: str, **members: Any) -> RunModel:
    model.take(msgspec.convert(trace_ended(model.cursor, status, **members), Traced))
    return model


def hostile_model() -> RunModel:
    events: list[Event] = [
        {"type": "agent_start", "prompt": HOSTILE},
        {"type": "goal_extracted", "goal": {"description": HOSTILE, "progress": 0.5}},
        {"type": "step_start", "step_id": HOSTILE, "description": HOSTILE},
        {"type": "turn_start", "turn": 1},
        {"type": "tool_start", "id": "c1", "name": HOSTILE},
        {"type": "tool_input_delta", "delta": f'{{"command": "{HOSTILE}"'},
        {"type": "tool_output_delta", "id": "c1", "delta": HOSTILE},
        {"type": "tool_start", "id": "c2", "name": "bash", "args": {HOSTILE: HOSTILE}},
        {"type": "tool_end", "id": "c2", "name": "bash", "error": HOSTILE, "exit_code": 1},
        {"type": HOSTILE, HOSTILE: HOSTILE},
        {"type": "text_delta", "text": HOSTILE},
        {"type": "reasoning_delta", "text": HOSTILE * 50},
    ]
    return model_of(events, prompt=HOSTILE, agent_id=HOSTILE, session_id=HOSTILE)


# ------------------------------------------------------------------------------------------------------- it fits


def fits(lines: list[Text], width: int, height: int) -> None:
    assert len(lines) == height
    assert max(line.cell_len for line in lines) <= width
    for line, written in zip(lines, ansi(lines), strict=True):
        assert "\n" not in written
        rest = COLOURS.sub("", written)
        assert rest == line.plain
        assert not OBEYED.search(rest)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("name", ["plain", "tools", "plan", "err", "cancel"])
def test_a_real_run_fits_every_terminal(name: str, width: int, height: int) -> None:
    fits(screen(real(name), width, height, NOW_MS), width, height)
    fits(screen(real(name), width, height, NOW_MS, "connection lost, trying again"), width, height)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_hostile_text_fits_and_is_shown_rather_than_obeyed(width: int, height: int) -> None:
    model = hostile_model()
    fits(screen(model, width, height, NOW_MS), width, height)
    kept = record(end(model, "failed", error=HOSTILE), width, NOW_MS)
    written = COLOURS.sub("", "".join(ansi(kept)))
    assert not OBEYED.search(written)
    assert "\\x1b]0;title\\x07\\x9b2J\\u202eevil" in written
    assert "[red]x[/]" in written, "and it is no markup"


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MEMBERS = ["id", "name", "text", "delta", "step_id", "tasks", "plan", "goal", "progress", "usage", "turn", "total"]
TYPES = [
    "agent_start agent_end error planning_start planning_end verification_start verification_end task_updated",
    "goal_extracted goal_progress step_start step_end turn_start turn_end tool_start tool_execution_start",
    "tool_input_delta tool_output_delta tool_end tool_progress text_delta thing_start thing_end turn model_turn note",
]
EVENTS = st.lists(
    st.builds(
        lambda type_, members: {**members, "type": type_},
        st.sampled_from(" ".join(TYPES).split()),
        st.dictionaries(st.sampled_from(MEMBERS), ANY, max_size=4),
    ),
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(events=EVENTS, width=st.integers(20, 150), height=st.integers(3, 40))
def test_events_of_any_shape_are_taken_in_and_shown(events: list[Event], width: int, height: int) -> None:
    model = model_of(events)
    fits(screen(model, width, height, NOW_MS), width, height)
    record(end(model, "completed"), width, NOW_MS)


# -------------------------------------------------------------------------------------------------- it reads well


def test_the_view_of_a_real_run_is_what_one_wants_to_know() -> None:
    shown = plain(screen(real("tools"), 90, 17, NOW_MS))
    assert shown[1] == "39 events · 3 turns · 3 tools · 54 tokens (33 in, 21 out)"
    assert [re.sub(r"  +\S+ (tokens|ms).*", "", line) for line in shown[3:10]] == [
        "· context_resolved (the latest of 3)  total_items: 1  total_tokens: 29",
        "✓ turn 1",
        "  ✓ bash  echo hi; seq 1 5  → 5",
        "  ✓ read  hello.txt  → 1 hello world",
        "✓ turn 2",
        "  ✓ write  out.txt  abc\\n  → Wrote 4 bytes (1 lines) to workspace/out.txt",
        "✓ turn 3",
    ]
    assert shown[10].startswith("─ text ─")
    assert shown[11] == "All done. The final answer is forty-two."
    assert shown[-1].endswith("run-1")


def test_progress_is_a_bar_and_the_goal_has_one() -> None:
    events: list[Event] = [
        {"type": "goal_extracted", "goal": {"description": "make it", "progress": 0.5}},
        {"type": "tool_start", "id": "c1", "name": "bash"},
        {"type": "tool_progress", "id": "c1", "fraction": 0.25},
    ]
    shown = plain(screen(model_of(events), 80, 16, NOW_MS))
    assert shown[2].startswith("goal make it")
    assert shown[2].endswith("━━━━━━━━────────  50 %")
    assert "━━━━────────────  25 %" in next(line for line in shown if " bash" in line)
    narrow = plain(screen(model_of(events), 40, 16, NOW_MS))
    assert "25 %" in next(line for line in narrow if " bash" in line), "in a narrow terminal the number has to do"


def test_a_tree_that_is_too_long_shows_what_is_under_way() -> None:
    events: list[Event] = [
        {"type": "task_updated", "tasks": [{"id": f"s{n}", "content": "x", "status": "pending"} for n in range(30)]},
        {"type": "step_start", "step_id": "s15", "description": "this one", "step_number": 16, "total_steps": 30},
    ]
    for height in (5, 10, 20):
        shown = plain(screen(model_of(events), 80, height, NOW_MS))
        assert any("step 16/30  this one" in line for line in shown)
        assert any("lines above" in line for line in shown)


def test_a_wide_terminal_has_the_text_beside_the_tree() -> None:
    wide = plain(screen(real("tools"), 140, 20, NOW_MS))
    assert any(line.startswith("✓ turn 1") and "│ All done." not in line for line in wide)
    assert any("│ All done. The final answer is forty-two." in line for line in wide)


def test_colours_are_the_terminals_own_and_never_black_or_white() -> None:
    models = [real(name) for name in ("tools", "plan", "err")]
    written = "".join("".join(ansi(screen(model, 100, 30, NOW_MS))) for model in models)
    codes = {code for found in COLOURS.findall(written) for code in found.split(";")}
    assert codes <= {"0", "1", "2", *(str(30 + colour) for colour in range(1, 7))}


def test_the_view_says_when_it_is_behind_the_log() -> None:
    model = model_of([{"type": "turn_start"}], event_count=4)
    assert plain(screen(model, 80, 20, NOW_MS))[-1].startswith("reading the log: 1 of 4 events")


def test_an_empty_run_says_so() -> None:
    assert "no events yet" in plain(screen(model_of([]), 80, 20, NOW_MS))


# ------------------------------------------------------------------------------------------------------ the record


def test_the_record_of_a_run_has_its_tree_and_its_result() -> None:
    model = end(real("tools"), "completed", result_text="one\n\ttwo\n", ended_at="1970-01-01T00:00:09Z")
    kept = plain(record(model, 80, NOW_MS))
    assert kept[0].startswith("✓ completed  do it")
    assert kept[0].endswith("9.0 s")
    assert kept[2] == "run-1"
    assert sum("✓ " in line for line in kept) == 7
    assert kept[-3].startswith("─ result ─")
    assert kept[-2:] == ["one", "\ttwo"], "as it was: it can be copied"


def test_the_record_of_a_failed_run_has_its_error_and_a_cancelled_one_its_reason() -> None:
    failed = plain(record(end(real("err"), "failed", error="boom"), 80, NOW_MS))
    assert failed[0].startswith("✗ failed")
    assert failed[-1] == "boom"
    cancelled = end(real("cancel"), "cancelled")
    cancelled.settle(msgspec.convert(snapshot(status="cancelled", cancel_reason="enough"), Snapshot))
    kept = plain(record(cancelled, 80, NOW_MS))
    assert kept[0].startswith("■ cancelled")
    assert "cancelled: enough" in kept
    assert any(line.startswith("■ turn 1") for line in kept), "it never ended"
    assert kept[-1] == "tick0 tick1 tick2 tick3 tick4 tick5 tick6 tick7 tick8 tick9"


def test_the_record_of_a_run_that_goes_on_says_so() -> None:
    kept = plain(record(real("cancel"), 80, NOW_MS))
    assert kept[0].startswith("▸ executing")
    assert kept[-1] == "the view ended here, the run goes on: carserver runs trace run-1"


def test_of_a_tools_progress_the_latest_is_shown_as_at_a_terminal() -> None:
    model = model_of(
        [
            {"type": "tool_start", "id": "c1", "name": "pip"},
            {"type": "tool_output_delta", "id": "c1", "delta": "begun\r\n 10 %\r 50 %\r"},
        ]
    )
    assert any("pip  → 50 %" in line for line in plain(screen(model, 80, 24, NOW_MS)))


def test_what_the_daemon_records_of_its_tools_is_told_once_and_in_words() -> None:
    own = {"source": "carserver"}
    reference = {"id": "out-0123456789", "size": 219_000, "preview": "{"}
    model = model_of(
        [
            {"type": "tool_start", "id": "h1", "name": "grep", **own},
            {"type": "tool_output_delta", "id": "h1", "name": "grep", "delta": "no such file\n", **own},
            {
                "type": "tool_end",
                "id": "h1",
                "name": "grep",
                "output": "",
                "exit_code": 2,
                "error": "exit code 2",
                **own,
            },
            {"type": "tool_start", "id": "h2", "name": "count", **own},
            {"type": "tool_end", "id": "h2", "name": "count", "output": "", "result_ref": reference, **own},
            {"type": "tool_start", "id": "h3", "name": "tail", **own},
            {"type": "tool_output_delta", "id": "h3", "name": "tail", "delta": "line\n", "truncated": True, **own},
            {"type": "tool_end", "id": "h3", "name": "tail", "output": "", "error": "cancelled by host", **own},
        ]
    )
    lines = [line_of(Line(0, node, node.folded), 100, 0, True) for node in model.tree.root.children]
    grep, counting, tail = plain(lines)
    assert grep.startswith("✗ grep  exit code 2  → no such file  ")
    assert counting.startswith("✓ count  → the result is output out-0123456789, 213 KiB  ")
    assert tail.startswith("✗ tail  → cancelled by host  (more was not recorded)")


def test_of_a_long_output_the_end_is_shown_and_that_it_is_not_all() -> None:
    output = {"output": '{"value":"' + "one " * 100 + 'end"}'}
    for events in ([{"type": "tool_end", **output}], [{"type": "tool_output_delta", "delta": output["output"]}]):
        model = model_of([{"type": "tool_start", "id": "h1", "name": "look"}, *({**one, "id": "h1"} for one in events)])
        (node,) = model.tree.root.children
        assert "→ …e one one " in plain([line_of(Line(0, node, node.folded), 80, 0, True)])[0]


@pytest.mark.parametrize("width", [24, 40, 80, 120])
def test_why_a_tool_failed_is_seen_however_much_it_was_given(width: int) -> None:
    given = {"content": "line\n" * 100, "path": "/tmp/x"}
    model = model_of(
        [
            {"type": "tool_start", "id": "h1", "name": "write", "args": given},
            {"type": "tool_end", "id": "h1", "name": "write", "error": "disk full"},
        ]
    )
    (node,) = model.tree.root.children
    (line,) = plain([line_of(Line(0, node, node.folded), width, 0, True)])
    assert line.startswith("✗ write")
    assert "→ d" in line
    assert width < 40 or "→ disk full " in line
    node.kind = Kind.TURN
    assert "✗ write  line" in plain([line_of(Line(0, node, node.folded), width, 0, True)])[0]


def test_the_record_of_a_long_run_is_short_and_says_what_it_leaves_out() -> None:
    events: list[Event] = []
    for n in range(3_000):
        events += [{"type": "turn_start", "turn": n}, {"type": "tool_start", "id": f"c{n}"}, {"type": "turn_end"}]
    kept = plain(record(end(model_of(events), "completed", result_text="x\n" * 5_000), 80, NOW_MS))
    assert len(kept) < 150
    assert any(re.match(r"⋮ [\d,]+ lines above, and [\d,]+ turns, [\d,]+ tools", line) for line in kept)
    assert "9,000 events · 3,000 turns · 3,000 tools" in kept[1]
    assert "more lines: carserver runs get run-1" in kept[-1]


def test_a_text_that_is_too_long_to_keep_says_what_is_missing() -> None:
    model = model_of({"type": "text_delta", "text": "word " * 100} for _ in range(200))
    kept = sum(len(passage.text) for passage in model.writing.passages)
    for width in (80, 140):
        shown = plain(screen(model, width, 24, NOW_MS))
        assert any(f"─ text, after {100_000 - kept:,} characters more ─" in line for line in shown)


def test_a_run_seen_from_its_middle_says_so() -> None:
    model = RunModel(msgspec.convert(snapshot(created_at_ms=0), Snapshot), first=500)
    model.take(msgspec.convert(trace_event(500, {"type": "turn_start"}), Traced))
    assert facts(model).startswith("501 events (from 501 on)")
    assert any("the first 500 events are not shown" in line for line in plain(record(model, 80, NOW_MS)))


@pytest.mark.parametrize(
    ("milliseconds", "told"),
    [(0, "0 ms"), (999, "999 ms"), (1_500, "1.5 s"), (12_345, "12 s"), (125_000, "2:05"), (3_725_000, "1:02:05")],
)
def test_a_span_of_time_is_told_shortly(milliseconds: int, told: str) -> None:
    assert duration(milliseconds) == told


# ------------------------------------------------------------------------------------------------- the table of runs


def runs(*members: dict[str, Any]) -> Runs:
    found = Runs()
    for one in members:
        raw = msgspec.Raw(msgspec.json.encode(snapshot(created_at_ms=0, **one)))
        found.take(Seen(msgspec.json.decode(raw, type=Snapshot), raw))
    return found


ROWS = (
    {"id": "run-old", "status": "completed", "updated_at_ms": 1_000, "ended_at_ms": 1_000},
    {"id": "run-live", "status": "executing", "updated_at_ms": 3_000, "event_count": 1_234, "prompt": HOSTILE},
    {"id": "run-new", "status": "failed", "updated_at_ms": 9_000, "ended_at_ms": 9_000, "agent_id": HOSTILE},
)


def test_live_runs_come_first_and_then_those_that_ended_lately() -> None:
    shown = plain(table(runs(*ROWS), 120, 20, NOW_MS))
    assert shown[0] == "1 live · 2 over"
    assert shown[1].split() == ["RUN", "STATUS", "AGENT", "EVENTS", "CREATED", "ELAPSED", "PROMPT"]
    assert [line.split()[0] for line in shown[2:]] == ["run-live", "run-new", "run-old"]
    assert "10 s" in shown[2]
    assert "9.0 s" in shown[3]


def test_busy_runs_do_not_change_places_with_every_event() -> None:
    busy = [{"id": f"run-{n}", "updated_at_ms": NOW_MS - 10 * n} for n in range(3)]
    quiet = {"id": "run-a", "updated_at_ms": NOW_MS - 60_000}
    order = [line.split()[0] for line in plain(table(runs(quiet, *busy), 120, 20, NOW_MS))[2:]]
    again = [line.split()[0] for line in plain(table(runs(*reversed(busy), quiet), 120, 20, NOW_MS))[2:]]
    assert order == again == ["run-0", "run-1", "run-2", "run-a"]


def test_an_id_that_does_not_fit_whole_leaves_room_for_what_tells_runs_apart() -> None:
    id_ = f"run-{'0123456789ab' * 3}"
    busy = runs({"id": id_, "status": "executing", "event_count": 7, "prompt": "count to five"})
    assert id_ in plain(table(busy, 80, 5, NOW_MS))[2]
    assert plain(table(busy, 55, 5, NOW_MS))[2].split("  ")[0] == "run-0123456…"
    assert "count to five" in plain(table(busy, 55, 5, NOW_MS))[2]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 250])
@pytest.mark.parametrize("height", [3, 10])
def test_the_table_fits_and_obeys_nothing(width: int, height: int) -> None:
    shown = table(runs(*ROWS), width, height, NOW_MS)
    fits(shown, width, min(height, 5))
    assert "executing" in shown[2].plain or width < 30


@pytest.mark.parametrize(
    ("variables", "encoding", "expected"),
    [
        ({}, "utf-8", True),
        ({"NO_COLOR": "1"}, "utf-8", True),
        ({"TERM": "dumb"}, "utf-8", False),
        ({}, "iso8859-1", False),
    ],
)
def test_a_view_is_for_terminals_that_can_show_it(
    variables: dict[str, str], encoding: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal:
        def __init__(self) -> None:
            self.encoding = encoding

        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", Terminal())
    assert takes_a_view() is expected
