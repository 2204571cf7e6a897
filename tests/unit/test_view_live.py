"""The live view and its way through a daemon: where it begins, and what it leaves when it breaks off."""

import functools
from typing import Any

import pytest

from carserver.cli import view_live
from carserver.cli.app import run
from carserver.protocol.errors import ErrorKind, RpcError
from tests.unit.fakedaemon import FakeDaemon, Session, snapshot, trace_ended, trace_event, trace_started

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("state")


@pytest.fixture(autouse=True)
def _view(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person looks at standard output, wherever it goes."""
    monkeypatch.setattr("carserver.cli.runs.takes_a_view", lambda: True)


def stream(*records: dict[str, Any], close: int | None = None) -> Any:
    """`runs.trace.subscribe` with what follows."""

    def subscribe(session: Session, params: Any) -> Any:
        for record in records:
            session.later(functools.partial(session.notify, "runs.trace.event", record))
        if close is not None:
            session.later(lambda: session.close(close))
        return {"run": snapshot(), "cursor": params["cursor"], "epoch": "e1", "recovered": "epoch" in params}

    return subscribe


def test_of_a_long_log_the_last_part_is_read_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(view_live, "TAIL_EVENTS", 10)
    records = [trace_event(49, {"type": "turn_start", "turn": 7}), trace_ended(50, result_text="Done.")]
    answers = {
        "runs.get": snapshot(status="completed", event_count=50),
        "runs.trace.subscribe": stream(*records),
    }
    with FakeDaemon(answers) as daemon:
        assert run(["runs", "trace", "run-1", "--url", daemon.url]) == 0
        seen = capsys.readouterr().out
        assert run(["runs", "trace", "run-1", "--url", daemon.url, "--cursor", "0"]) == 0
        assert run(["runs", "trace", "run-1", "--url", daemon.url, "--cursor", "3", "--epoch", "e1"]) == 0
    assert daemon.params_of("runs.trace.subscribe") == [
        {"run_id": "run-1", "cursor": 40, "epoch": "e1"},
        {"run_id": "run-1", "cursor": 0},
        {"run_id": "run-1", "cursor": 3, "epoch": "e1"},
    ]
    assert "the first 40 events are not shown here" in seen
    assert "the first" not in capsys.readouterr().out.partition("Done.")[0], "the second began at the beginning"


def test_a_run_that_is_over_is_shown_without_taking_the_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(view_live, "_ENDED_S", 3600.0)
    answers = {
        "runs.get": snapshot(status="completed", event_count=1),
        "runs.trace.subscribe": stream(trace_started(), trace_event(0, {"type": "turn_start"}), trace_ended(1)),
    }
    with FakeDaemon(answers) as daemon:
        assert run(["runs", "trace", "run-1", "--url", daemon.url]) == 0
    out = capsys.readouterr().out
    assert "\x1b[?1049h" not in out
    assert "completed" in out


def test_a_view_that_breaks_off_leaves_what_was_seen_and_says_where_to_go_on(capsys: Captured) -> None:
    records = [trace_started(), trace_event(0, {"type": "text_delta", "text": "half"})]
    answers = {"runs.get": snapshot(event_count=1), "runs.trace.subscribe": stream(*records, close=1008)}
    with FakeDaemon(answers) as daemon:
        assert run(["runs", "trace", "run-1", "--url", daemon.url]) == 69
    captured = capsys.readouterr()
    assert captured.out.rindex("half") > captured.out.rfind("\x1b[?1049l"), "on the terminal's own screen"
    assert "--cursor 1 --epoch e1" in captured.err


def test_a_run_that_was_deleted_while_it_was_watched_is_not_to_be_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(view_live, "_LOOK_AGAIN_S", 0.0)
    runs = iter([snapshot(event_count=1), snapshot(status="interrupted", event_count=1)])

    def get(_: Session, params: Any) -> Any:
        found = next(runs, None)
        if found is None:
            raise RpcError(ErrorKind.NOT_FOUND, "it was deleted")
        return found

    answers = {"runs.get": get, "runs.trace.subscribe": stream(trace_started(), trace_ended(1, "interrupted"))}
    with FakeDaemon(answers) as daemon:
        assert run(["runs", "trace", "run-1", "--url", daemon.url]) == 3
    captured = capsys.readouterr()
    assert "interrupted" in captured.out
    assert captured.err == "carserver: it was deleted\n"


def test_a_reason_that_cannot_be_had_is_missed_and_nothing_else(capsys: Captured) -> None:
    runs = iter([snapshot(status="cancelled", event_count=1)])

    def get(_: Session, params: Any) -> Any:
        found = next(runs, None)
        if found is None:
            raise RpcError(ErrorKind.NOT_FOUND, "it was deleted")
        return found

    answers = {"runs.get": get, "runs.trace.subscribe": stream(trace_started(), trace_ended(1, "cancelled"))}
    with FakeDaemon(answers) as daemon:
        assert run(["runs", "trace", "run-1", "--url", daemon.url]) == 0
    assert "cancelled" in capsys.readouterr().out
