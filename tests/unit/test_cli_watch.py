"""`runs watch` in a pipe: a line for each change, nothing missed, through resets and lost connections."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from carserver.cli import watch as watching
from carserver.cli.app import run
from carserver.cli.watch import Runs, Seen
from carserver.protocol.runs import Snapshot
from tests.unit.fakedaemon import FakeDaemon, Session, snapshot

Captured = pytest.CaptureFixture[str]
Run = dict[str, Any]
Act = Callable[[Session], object]
pytestmark = pytest.mark.usefixtures("state")
HOSTILE = "[red]x[/]\x1b]0;title\x07\u202e\nsecond"


class Daemon:
    """What a daemon says to who watches: each time that it is asked for the list, the next scene."""

    def __init__(self, *scenes: "tuple[list[Run], list[Act]]", status: str | None = None) -> None:
        self._scenes = iter(scenes)
        self._runs: list[Run] = []
        self._acts: list[Act] = []
        self._last = status or "verifying"  # what is asked for last: the client lists one live status after another
        self._first = status
        self.answers = {"runs.watch": {"watching": True}, "runs.list": self._list}

    def _list(self, session: Session, params: Any) -> Any:
        status = params.get("status")
        if status == self._first:
            self._runs, self._acts = next(self._scenes)
        if status == self._last:
            for act in self._acts:
                session.later(functools.partial(act, session))
        return {"runs": [one for one in self._runs if status in {None, one["status"]}], "next_page": None}


def over(session: Session) -> None:
    """The connection ends, and no client comes back: so ends what would go on for ever."""
    session.close(1008)


def changed(**members: Any) -> Act:
    return lambda session: session.notify("runs.changed", {"run": snapshot(**members)})


def reset(session: Session) -> None:
    session.notify("runs.watch.reset", {"reason": "overflow"})


def restart(session: Session) -> None:
    session.close(1012)


def printed(captured: Captured) -> list[tuple[str, str, str]]:
    """Id, status and number of events of each line."""
    cells = [line.split("\t") for line in captured.readouterr().out.splitlines()]
    return [(cell[0], cell[1], cell[4]) for cell in cells]


def test_what_runs_is_printed_and_then_a_line_for_each_change(capsys: Captured) -> None:
    before = [snapshot(id="run-0", status="completed", updated_at_ms=9), snapshot(updated_at_ms=1)]
    news = [changed(updated_at_ms=2, event_count=7), changed(id="run-2", prompt=HOSTILE), over]
    with FakeDaemon(Daemon((before, news)).answers) as daemon:
        assert run(["runs", "watch", "--url", daemon.url]) == 69
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["run-1", "run-1", "run-2"], "what was over before is no news"
    assert lines[2].split("\t") == [
        "run-2",
        "executing",
        "",
        "",
        "0",
        "2026-11-20T02:51:31.053Z",
        "[red]x[/]\\x1b]0;title\\x07\\u202e\\nsecond",
    ]


def test_it_watches_before_it_lists_and_passes_its_filters_on() -> None:
    filters = ["--session", "s", "--agent", "a", "--status", "failed"]
    with FakeDaemon(Daemon(([], [over]), status="failed").answers) as daemon:
        assert run(["runs", "watch", "--url", daemon.url, *filters]) == 69
    wanted = {"session_id": "s", "agent_id": "a", "status": "failed"}
    assert daemon.calls == [("runs.watch", wanted), ("runs.list", {**wanted, "limit": 1_000})]


def test_all_live_runs_are_listed_page_by_page(capsys: Captured) -> None:
    many = [snapshot(id=f"run-{n}", updated_at_ms=n) for n in range(5)]

    def pages(session: Session, params: Any) -> Any:
        if params.get("status") == "verifying":
            session.later(functools.partial(over, session))
        if params.get("status") != "executing":
            return {"runs": [], "next_page": None}
        first = int(params.get("page", "0"))
        return {"runs": many[first : first + 2], "next_page": str(first + 2) if first < 4 else None}

    with FakeDaemon({"runs.watch": {"watching": True}, "runs.list": pages}) as daemon:
        assert run(["runs", "watch", "--url", daemon.url]) == 69
    assert [id_ for id_, _, _ in printed(capsys)] == [f"run-{n}" for n in range(5)]


def test_json_is_the_daemons_own_snapshot_with_each_change(capsys: Captured) -> None:
    wide = {"unknown_member": 2**70}
    scene = ([snapshot(updated_at_ms=1, **wide)], [changed(updated_at_ms=2, **wide), over])
    with FakeDaemon(Daemon(scene).answers) as daemon:
        assert run(["runs", "watch", "--json", "--url", daemon.url]) == 69
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [snapshot(updated_at_ms=1, **wide), snapshot(updated_at_ms=2, **wide)]


def test_of_two_states_of_a_run_the_newer_one_counts(capsys: Captured) -> None:
    stale = [changed(updated_at_ms=4, event_count=4), changed(updated_at_ms=5, event_count=4)]
    ended = changed(updated_at_ms=5, event_count=5, status="failed")
    scene = (
        [snapshot(updated_at_ms=5, event_count=5)],
        [*stale, ended, changed(updated_at_ms=5, event_count=5), over],
    )
    with FakeDaemon(Daemon(scene).answers) as daemon:
        assert run(["runs", "watch", "--url", daemon.url]) == 69
    assert printed(capsys) == [("run-1", "executing", "5"), ("run-1", "failed", "5")]


def test_a_run_that_leaves_the_status_is_told_once(capsys: Captured) -> None:
    news = [
        changed(updated_at_ms=2, status="completed"),
        changed(updated_at_ms=3, status="completed", event_count=9),
        changed(id="run-9", status="planning"),
        changed(id="run-2"),
        over,
    ]
    with FakeDaemon(Daemon(([snapshot(updated_at_ms=1)], news), status="executing").answers) as daemon:
        assert run(["runs", "watch", "--status", "executing", "--url", daemon.url]) == 69
    assert printed(capsys) == [("run-1", "executing", "0"), ("run-1", "completed", "0"), ("run-2", "executing", "0")]


@pytest.mark.parametrize("event", [reset, restart])
def test_after_a_reset_or_a_restart_it_lists_again_and_tells_what_is_new(event: Act, capsys: Captured) -> None:
    first = [snapshot(updated_at_ms=1), snapshot(id="run-gone", updated_at_ms=1)]
    second = [snapshot(updated_at_ms=1), snapshot(id="run-2", status="failed", updated_at_ms=3)]
    scenes = (first, [event]), (second, [changed(updated_at_ms=9, event_count=9), over])
    with FakeDaemon(Daemon(*scenes).answers) as daemon:
        assert run(["runs", "watch", "--url", daemon.url]) == 69
    assert printed(capsys) == [
        ("run-1", "executing", "0"),
        ("run-gone", "executing", "0"),
        ("run-2", "failed", "0"),
        ("run-1", "executing", "9"),
    ]
    assert len(daemon.params_of("runs.watch")) == len(daemon.sessions) == (2 if event is restart else 1)


def test_a_daemon_that_does_not_know_it_says_so(capsys: Captured) -> None:
    with FakeDaemon() as daemon:
        assert run(["runs", "watch", "--url", daemon.url]) == 1
    assert "runs.watch" in capsys.readouterr().err


def test_of_very_many_runs_those_that_changed_longest_ago_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "KEPT", 10)
    runs = Runs()
    for n in range(100):
        status = "executing" if n == 3 else "completed"
        raw = msgspec.Raw(msgspec.json.encode(snapshot(id=f"run-{n}", updated_at_ms=n, status=status)))
        runs.take(Seen(msgspec.json.decode(raw, type=Snapshot), raw))
    kept = {seen.run.id for seen in runs}
    assert len(kept) <= 20
    assert {"run-3", "run-99"} <= kept, "live ones, and the latest"
    assert runs.dropped + len(kept) == 100


def test_a_pipe_does_not_wait_for_what_only_a_terminal_needs() -> None:
    program = (
        "import sys, carserver.cli.runs, carserver.cli.trace, carserver.cli.watch; sys.exit('rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
