"""`runs ls | get | cancel | trace`: what a person sees, and what a pipe gets."""

import functools
import json
from typing import Any

import msgspec
import pytest

from carserver.cli import output, runs
from carserver.cli.app import run
from carserver.cli.trace import TraceView
from carserver.client import Traced
from carserver.config import Settings
from carserver.stores.folder import StateFolder
from tests.unit.fakedaemon import FakeDaemon, Session, snapshot, trace_ended, trace_event, trace_started

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("state")
HOSTILE = "[red]x[/]\x1b]0;title\x07\u202e\nsecond"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person looks at standard output, at a terminal without colour."""
    monkeypatch.setattr(output, "at_terminal", lambda: True)
    monkeypatch.setattr(runs, "at_terminal", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


def pages(session: Session, params: Any) -> Any:
    """Seven runs, at most three a page."""
    first = int(params.get("page", "0"))
    last = min(first + min(params["limit"], 3), 7)
    found = [snapshot(id=f"run-{n}", prompt=HOSTILE, agent_id="a", event_count=n) for n in range(first, last)]
    return {"runs": found, "next_page": str(last) if last < 7 else None}


def test_ls_gives_a_pipe_a_line_a_run_in_tab_separated_cells(capsys: Captured) -> None:
    with FakeDaemon({"runs.list": pages}) as daemon:
        assert run(["runs", "ls", "--url", daemon.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[2].split("\t") == [
        "run-2",
        "executing",
        "a",
        "",
        "2",
        "2026-11-20T02:51:31.053Z",
        "[red]x[/]\\x1b]0;title\\x07\\u202e\\nsecond",
    ]


def test_ls_asks_as_host_for_no_more_than_it_was_told_to(state: StateFolder, capsys: Captured) -> None:
    secrets = state.secrets(Settings())
    filters = ["--status", "failed", "--session", "s", "--agent", "a", "--limit", "4"]
    with FakeDaemon({"runs.list": pages}) as daemon:
        assert run(["runs", "ls", "--url", daemon.url, *filters]) == 0
        assert daemon.sessions[0].authorization == f"Bearer {secrets.host_token}"
    wanted = {"status": "failed", "session_id": "s", "agent_id": "a"}
    assert daemon.params_of("runs.list") == [{**wanted, "limit": 4}, {**wanted, "limit": 1, "page": "3"}]
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_ls_json_is_the_daemons_own_snapshots_a_line_each(capsys: Captured) -> None:
    run_ = snapshot(metadata={"n": 2**70}, unknown_member=1)
    with FakeDaemon({"runs.list": {"runs": [run_], "next_page": None}}) as daemon:
        assert run(["runs", "ls", "--json", "--url", daemon.url]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [run_]


@pytest.mark.usefixtures("terminal")
def test_ls_at_a_terminal_is_a_table_that_interprets_nothing(capsys: Captured) -> None:
    with FakeDaemon({"runs.list": pages}) as daemon:
        assert run(["runs", "ls", "--url", daemon.url]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["RUN", "STATUS", "AGENT", "EVENTS", "CREATED", "PROMPT"], "no session"
    assert "[red]x[/]\\x1b]0;title\\x07\\u202e\\nsecond" in out
    assert "\x1b" not in out


@pytest.mark.usefixtures("terminal")
def test_ls_at_a_narrow_terminal_keeps_the_ids_whole(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    id_ = "run-22d4e49f-edbe-40d6-a954-fc3c9d450d0d"
    runs = [snapshot(id=id_, status="interrupted", prompt="long " * 50, event_count=n) for n in range(2)]
    with FakeDaemon({"runs.list": {"runs": runs, "next_page": None}}) as daemon:
        assert run(["runs", "ls", "--url", daemon.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [[id_, "interrupted"]] * 2
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("columns", "headings"),
    [
        (200, "RUN STATUS AGENT SESSION EVENTS CREATED PROMPT"),
        (100, "RUN STATUS AGENT EVENTS CREATED PROMPT"),
        (80, "RUN STATUS EVENTS PROMPT"),
        (65, "RUN STATUS EVENTS"),
        (55, "RUN STATUS"),
    ],
)
def test_ls_has_the_columns_that_say_something_at_a_terminal_so_wide(
    columns: int, headings: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    id_ = "run-22d4e49f-edbe-40d6-a954-fc3c9d450d0d"
    found = [snapshot(id=id_, status="completed", prompt="add up what there is", agent_id="analyst", session_id="s")]
    with FakeDaemon({"runs.list": {"runs": found, "next_page": None}}) as daemon:
        assert run(["runs", "ls", "--url", daemon.url]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == headings.split()
    assert ("PROMPT" in headings) == ("add up what" in line)
    assert f"{id_}  completed" in line


def test_get_shows_the_members_of_a_snapshot(capsys: Captured) -> None:
    with FakeDaemon({"runs.get": snapshot(status="failed", error=HOSTILE, metadata={"k": [1]})}) as daemon:
        assert run(["runs", "get", "run-1", "--url", daemon.url]) == 0
        shown = capsys.readouterr().out
        assert run(["runs", "get", "run-1", "--json", "--url", daemon.url]) == 0
        assert json.loads(capsys.readouterr().out)["error"] == HOSTILE
    assert "status               failed\n" in shown
    assert 'metadata             {"k":[1]}\n' in shown
    assert "error                [red]x[/]\\x1b]0;title\\x07\\u202e\n                     second\n" in shown


def test_cancel_says_whether_it_was_this_that_ended_the_run(capsys: Captured) -> None:
    answers = iter([{"cancelled": True, "status": "cancelled"}, {"cancelled": False, "status": "completed"}])
    with FakeDaemon({"runs.cancel": lambda _, params: next(answers)}) as daemon:
        assert run(["runs", "cancel", "run-1", "--reason", "enough", "--url", daemon.url]) == 0
        assert run(["runs", "cancel", "run-1", "--url", daemon.url]) == 0
    assert capsys.readouterr().out == "run-1: cancelled\nrun-1: was over already: completed\n"
    assert daemon.params_of("runs.cancel") == [{"run_id": "run-1", "reason": "enough"}, {"run_id": "run-1"}]


# ----------------------------------------------------------------------------------------------------------- trace


def stream(*records: dict[str, Any]) -> Any:
    def subscribe(session: Session, params: Any) -> Any:
        for record in records:
            session.later(functools.partial(session.notify, "runs.trace.event", record))
        return {"run": snapshot(), "cursor": 0, "epoch": "e1", "recovered": params.get("epoch") == "e1"}

    return subscribe


def test_trace_prints_events_as_lines_and_joins_text(capsys: Captured) -> None:
    events: list[dict[str, Any]] = [
        {"type": "agent_start", "prompt": "hello"},
        {"type": "text_delta", "text": "All "},
        {"type": "text_delta", "text": "done.\nReally\x1b[2J"},
        {"type": "text_delta", "text": ".\n"},
        {"type": "tool_start", "id": "c1", "name": "bash"},
        {"type": "tool_output_delta", "id": "c1", "name": "bash", "delta": "hi"},
        {"type": "tool_output_delta", "id": "c2", "name": "bash", "delta": "ho"},
        {"type": "turn_end", "turn": 1},
    ]
    records = [
        trace_started(),
        *(trace_event(n, event) for n, event in enumerate(events)),
        trace_ended(8, "failed", error="boom"),
    ]
    with FakeDaemon({"runs.trace.subscribe": stream(*records)}) as daemon:
        assert run(["runs", "trace", "run-1", "--url", daemon.url]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "run-1, 2026-11-20: do it",
        "      0     +0.000  agent_start          hello",
        "      1     +0.001  text_delta           All done.",
        "                                         Really\\x1b[2J.",
        "      4     +0.004  tool_start           bash  c1",
        "      5     +0.005  tool_output_delta    hi",
        "      6     +0.006  tool_output_delta    ho",
        '      7     +0.007  turn_end             {"turn":1}',
        "failed: boom",
    ]
    assert captured.err == ""


def test_the_trace_of_a_run_that_was_stopped_ends_with_the_reason_if_that_can_be_had(capsys: Captured) -> None:
    for status, why in (("cancelled", "cancel_reason"), ("interrupted", "interrupted_reason")):
        methods = {"runs.trace.subscribe": stream(trace_ended(0, status))}
        with FakeDaemon({**methods, "runs.get": snapshot(status=status, **{why: "enough\x1b"})}) as daemon:
            assert run(["runs", "trace", "run-1", "--url", daemon.url]) == 0
        with FakeDaemon(methods) as daemon:
            assert run(["runs", "trace", "run-1", "--url", daemon.url]) == 0
        assert capsys.readouterr().out == f"{status}: enough\\x1b\n{status}\n"


def test_trace_tells_what_the_daemon_records_of_its_tools(capsys: Captured) -> None:
    reference = {"id": "out-0123456789", "size": 219_000, "preview": "\x1b"}
    events: list[dict[str, Any]] = [
        {"type": "tool_output_delta", "id": "h", "name": "tail", "delta": "line", "truncated": True},
        {"type": "tool_end", "id": "h", "name": "tail", "output": "", "result_ref": reference},
    ]
    records = [*(trace_event(n, event) for n, event in enumerate(events)), trace_ended(2)]
    with FakeDaemon({"runs.trace.subscribe": stream(*records)}) as daemon:
        assert run(["runs", "trace", "run-1", "--url", daemon.url]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "      0     +0.000  tool_output_delta    line",
        "                                         … (more was not recorded)",
        "      1     +0.001  tool_end             tail  the result is output out-0123456789, 213 KiB",
    ]


def test_trace_json_prints_the_params_as_they_came(capsys: Captured) -> None:
    records = [trace_started(), trace_event(0, {"type": "x", "n": 2**70}), trace_ended(1)]
    with FakeDaemon({"runs.trace.subscribe": stream(*records)}) as daemon:
        assert run(["runs", "trace", "run-1", "--json", "--url", daemon.url, "--cursor", "0", "--epoch", "e1"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == records
    assert daemon.params_of("runs.trace.subscribe") == [{"run_id": "run-1", "cursor": 0, "epoch": "e1"}]


def test_a_trace_that_breaks_off_says_where_to_go_on(capsys: Captured) -> None:
    def subscribe(session: Session, params: Any) -> Any:
        session.later(
            lambda: session.notify("runs.trace.event", trace_event(0, {"type": "text_delta", "text": "half"}))
        )
        session.later(lambda: session.close(1008, "enough"))
        return {"run": snapshot(), "cursor": 0, "epoch": "e1", "recovered": False}

    with FakeDaemon({"runs.trace.subscribe": subscribe}) as daemon:
        assert run(["runs", "trace", "run-1", "--url", daemon.url]) == 69
    captured = capsys.readouterr()
    assert captured.out.endswith("half\n")
    assert "--cursor 1 --epoch e1" in captured.err
    assert "connection lost (1008: enough)" in captured.err


def test_colour_follows_meaning_and_only_where_it_is_wanted() -> None:
    def shown(coloured: bool) -> str:
        record = msgspec.convert(trace_event(0, {"type": "error", "message": "boom"}), Traced)
        return TraceView(coloured=coloured).show(record)

    assert "\x1b[31mboom" in shown(True)
    assert "\x1b" not in shown(False)


def test_what_an_event_has_empty_leaves_no_room_in_its_line() -> None:
    event = {"type": "tool_end", "name": "look", "error": "no", "output": ""}
    record = msgspec.convert(trace_event(0, event), Traced)
    assert TraceView(coloured=False).show(record).endswith(" look  no\n")


def test_a_long_value_is_cut_with_a_mark() -> None:
    record = msgspec.convert(trace_event(0, {"type": "agent_end", "text": "x" * 1_000}), Traced)
    assert TraceView(coloured=False).show(record).endswith("x…\n")
