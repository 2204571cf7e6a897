"""What a person sees at a terminal: the real command in a pseudo-terminal, with a real daemon."""

import json
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import Peer, peer
from tests.terminal import Terminal, terminal

RUNS = json.loads((Path(__file__).parent.parent / "data" / "agent-runs.json").read_bytes())
HOSTILE = "[red]x[/]\x1b]0;title\x07\x1b[2J\x9b31m\u202eevil\r\n\tsecond 日本語🚀"
START: dict[str, Any] = {"type": "turn_start", "turn": 1}
FLOOD, BATCH = 20_000, 1_000
HELD, KIBIBYTE = 16_000, 1_024  # 16 MiB: more than all the buffers between the daemon and who does not read


@asynccontextmanager
async def traced(daemon: Daemon, prompt: str = "do it", **options: Any) -> AsyncIterator[tuple[Peer, str, Terminal]]:
    """A run that its owner attends, and a terminal that shows it."""
    async with peer(daemon) as owner:
        run = await owner.create(prompt)
        await owner.record(run["id"], START)
        with terminal(daemon, "runs", "trace", run["id"], **options) as view:
            await view.until(lambda: "turn 1" in view.screen)
            yield owner, run["id"], view


def given_back(view: Terminal) -> bool:
    """Whether the terminal is as it was: the first screen, a cursor, wrapping."""
    return {"?1049l", "?25h", "?7h"} <= view.modes


async def test_a_run_is_seen_as_it_happens_and_leaves_a_record(daemon: Daemon) -> None:
    async with traced(daemon) as (owner, run_id, view):
        await view.until(lambda: "executing  do it" in view.screen)
        await owner.record(run_id, {"type": "tool_start", "id": "c1", "name": "bash"})
        await view.until(lambda: "bash" in view.screen)
        await owner.record(run_id, {"type": "tool_progress", "id": "c1", "fraction": 0.5})
        await view.until(lambda: "50 %" in view.screen)
        await owner.record(run_id, {"type": "text_delta", "text": "All is "})
        await owner.record(run_id, {"type": "text_delta", "text": "well."})
        await view.until(lambda: "All is well." in view.screen)
        assert view.scrollback.strip() == "", "the terminal's own screen is left alone meanwhile"
        await owner.record(run_id, {"type": "agent_end", "text": "Done.", "usage": {"total_tokens": 1234}})
        assert await view.ended() == 0
        assert given_back(view)
        assert view.foreign == []
        lines = view.scrollback.splitlines()
        assert lines[0].startswith("✓ completed  do it")
        assert "6 events · 1 turn · 1 tool · 1,234 tokens" in lines[1]
        assert lines[2] == run_id
        assert lines[-1] == "Done."


async def test_the_view_follows_the_terminals_size(daemon: Daemon) -> None:
    async with traced(daemon, columns=200, lines=50) as (owner, run_id, view):
        for columns, lines in ((100, 30), (40, 10), (20, 4), (120, 40)):
            before = view.frames
            view.resize(columns, lines)
            await owner.record(run_id, {"type": "text_delta", "text": "word " * 200})
            await view.until(lambda: view.frames > before and "executing" in view.screen)  # noqa: B023 - now
            await view.until(lambda: len(view.rows) == view.size[1])
            await view.until(lambda: max(map(len, view.rows.values())) <= view.size[0])


async def test_hostile_text_never_reaches_the_terminal(daemon: Daemon) -> None:
    events: list[dict[str, Any]] = [
        {"type": "agent_start", "prompt": HOSTILE},
        {"type": "step_start", "step_id": HOSTILE, "description": HOSTILE},
        {"type": "tool_start", "id": "c1", "name": HOSTILE},
        {"type": "tool_output_delta", "id": "c1", "delta": HOSTILE},
        {"type": "tool_end", "id": "c1", "name": HOSTILE, "error": HOSTILE, "exit_code": 1},
        {"type": "unheard_of", HOSTILE: HOSTILE},
        {"type": "text_delta", "text": HOSTILE * 20},
    ]
    async with traced(daemon, HOSTILE, columns=100) as (owner, run_id, view):
        await owner.record(run_id, *events)
        await view.until(lambda: "unheard_of" in view.screen)
        await view.until(lambda: "[red]x[/]\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\u202eevil" in view.screen)
        await owner.record(run_id, {"type": "error", "message": HOSTILE})
        assert await view.ended() == 0
        assert "✗ failed" in view.scrollback
        assert view.foreign == [] or set(view.foreign) == {"\t"}, "a result's tabs stay, so that it can be copied"


async def test_a_flood_is_read_as_it_comes_and_painted_in_bounds(daemon: Daemon) -> None:
    async with traced(daemon) as (owner, run_id, view):
        began = time.monotonic()
        painted = view.frames
        kinds = [
            [
                {"type": "turn_start", "turn": n},
                {"type": "tool_start", "id": f"c{n}", "name": "bash"},
                {"type": "text_delta", "text": f"word {n} "},
                {"type": "tool_end", "id": f"c{n}", "output": "x", "exit_code": 0},
            ]
            for n in range(FLOOD // 4)
        ]
        events = [event for kind in kinds for event in kind]
        for first in range(0, FLOOD, BATCH):
            await owner.record(run_id, *events[first : first + BATCH])
        await owner.record(run_id, {"type": "agent_end", "text": "Done."})
        assert await view.ended() == 0
        frames = 10 * (time.monotonic() - began) + 2
        assert view.frames - painted <= frames * view.size[1], "a frame paints each line at most once"
        assert view.scrollback.splitlines()[1].startswith(f"{FLOOD + 2:,} events · {FLOOD // 4 + 1:,} turns")
        assert "lines above, and" in view.scrollback, "what is not shown is counted"


async def test_a_terminal_that_takes_nothing_does_not_hold_back_the_reading(daemon: Daemon) -> None:
    async with traced(daemon) as (owner, run_id, view):
        view.type("\x13")  # Ctrl-S: the terminal takes nothing any more
        delivered = daemon.metrics()["events_delivered"]
        events = [{"type": "text_delta", "text": f"{n} ".ljust(KIBIBYTE, ".")} for n in range(HELD)]
        for first in range(0, HELD, BATCH):
            await owner.record(run_id, *events[first : first + BATCH])
        await daemon.until("events_delivered", delivered + HELD)
        assert view.is_open
        view.type("\x11")  # Ctrl-Q
        await owner.record(run_id, {"type": "agent_end", "text": "Done."})
        assert await view.ended() == 0
        assert f"{HELD + 2:,} events" in view.scrollback


async def test_ctrl_c_ends_the_view_and_not_the_run(daemon: Daemon) -> None:
    async with traced(daemon) as (owner, run_id, view):
        view.type("\x03")
        assert await view.ended() == 130
        assert given_back(view)
        assert "▸ executing  do it" in view.scrollback
        assert f"the run goes on: carserver runs trace {run_id}" in view.scrollback
        assert (await owner.call("runs.get", {"run_id": run_id}))["status"] == "executing"


async def test_term_gives_the_terminal_back(daemon: Daemon) -> None:
    async with traced(daemon) as (_, _, view):
        view.send(signal.SIGTERM)
        assert await view.ended() == -signal.SIGTERM
        assert given_back(view)
        assert "▸ executing  do it" in view.scrollback


async def test_ctrl_z_lends_the_terminal_to_the_shell(daemon: Daemon) -> None:
    async with traced(daemon) as (owner, run_id, view):
        view.type("\x1a")
        await view.stopped()
        await view.until(lambda: given_back(view))
        await owner.record(run_id, {"type": "turn_start", "turn": 2})
        view.send(signal.SIGCONT)
        await view.until(lambda: view.is_open and "turn 2" in view.screen)


async def test_who_comes_late_gets_the_record_of_a_real_run(daemon: Daemon) -> None:
    for name, (log, *_) in RUNS.items():
        async with peer(daemon) as owner:
            run = await owner.create(log["snapshot"]["prompt"])
            await owner.record(run["id"], *(entry["event"] for entry in log["events"]))
            if log["snapshot"]["status"] == "cancelled":
                await owner.call("runs.cancel", {"run_id": run["id"], "reason": "enough of it"})
        with terminal(daemon, "runs", "trace", run["id"]) as view:
            assert await view.ended() == 0
        assert f"{log['snapshot']['status']}  {log['snapshot']['prompt']}" in view.scrollback
        last = log["snapshot"].get("result_text", "circuit breaker")
        assert ("enough of it" if name == "cancel" else last.strip()) in view.scrollback
        assert view.foreign == []


async def test_an_interrupted_run_is_waited_for_and_goes_on(start: StartDaemon) -> None:
    daemon = start(grace_s=0.1)
    async with traced(daemon) as (owner, run_id, view):
        await owner.socket.close()
        await view.until(lambda: "interrupted: it goes on when its owner comes back" in view.screen)
        async with peer(daemon) as again:
            await again.record(run_id, {"type": "turn_start", "turn": 2})
            await view.until(lambda: "executing" in view.screen and "turn 2" in view.screen)
            await again.record(run_id, {"type": "agent_end", "text": "Done after all."})
            assert await view.ended() == 0
    assert "Done after all." in view.scrollback


async def test_a_run_that_its_owner_resumed_is_live_before_anything_happens_in_it(start: StartDaemon) -> None:
    daemon = start(grace_s=0.1)
    async with traced(daemon) as (owner, run_id, view):
        await owner.socket.close()
        await view.until(lambda: "interrupted: it goes on when its owner comes back" in view.screen)
        async with peer(daemon) as again:
            await again.call("runs.resume", {"run_id": run_id})
            await view.until(lambda: "executing" in view.screen and "interrupted" not in view.screen)
            await again.record(run_id, {"type": "agent_end", "text": "Done after all."})
            assert await view.ended() == 0
    assert "Done after all." in view.scrollback


async def test_the_view_goes_on_through_a_restart_of_the_daemon(start: StartDaemon) -> None:
    daemon = start()
    async with traced(daemon) as (_, run_id, view):
        daemon.kill()
        await view.until(lambda: "connection lost, trying again" in view.screen)
        daemon.start()
        async with peer(daemon) as owner:
            await owner.record(run_id, {"type": "turn_start", "turn": 2})
            await view.until(lambda: "turn 2" in view.screen and "connection lost" not in view.screen)
            await owner.record(run_id, {"type": "agent_end", "text": "Done."})
            assert await view.ended() == 0
    assert "2 turns" in view.scrollback


async def test_who_wants_no_colour_has_the_view_without_it(daemon: Daemon) -> None:
    async with traced(daemon, NO_COLOR="1") as (owner, run_id, view):
        await owner.record(run_id, {"type": "error", "message": "x"})
        assert await view.ended() == 0
    assert "failed" in view.scrollback
    assert not [style for style in view.styles if re.search(r"\b[34]\dm?\b|\b9\d\b", style)]


async def test_who_wants_no_view_gets_lines(daemon: Daemon) -> None:
    async with peer(daemon) as owner:
        run = await owner.create()
        await owner.record(run["id"], START, {"type": "agent_end", "text": "Done."})
    wishes: list[tuple[list[str], dict[str, Any]]] = [
        (["--plain"], {}),
        (["--json"], {}),
        ([], {"TERM": "dumb"}),
    ]
    for options, variables in wishes:
        with terminal(daemon, "runs", "trace", run["id"], *options, columns=200, **variables) as view:
            assert await view.ended() == 0
        assert view.modes == set()
        assert "turn_start" in view.scrollback


async def test_what_is_wrong_is_said_without_a_view(daemon: Daemon) -> None:
    with terminal(daemon, "runs", "trace", "run-nowhere") as view:
        assert await view.ended() == 3
    assert view.modes == set()
    assert "run-nowhere" in view.scrollback


async def test_what_runs_now_is_a_table_that_stays_when_it_ends(start: StartDaemon) -> None:
    daemon = start()
    async with peer(daemon) as owner:
        first = await owner.create("the first")
        with terminal(daemon, "runs", "watch", columns=120) as view:
            await view.until(lambda: "1 live" in view.screen and "the first" in view.screen)
            second = await owner.create(HOSTILE)
            await view.until(lambda: "2 live" in view.screen and "[red]x[/]\\x1b]0" in view.screen)
            await owner.record(first["id"], {"type": "agent_end", "text": "x"})
            await view.until(lambda: "1 live · 1 over" in view.screen)
            await view.until(lambda: 0 < view.screen.find(second["id"]) < view.screen.find(first["id"]))
            await owner.call("runs.delete", {"run_id": first["id"]})
            await view.until(lambda: "1 live · 0 over" in view.screen and first["id"] not in view.screen)
            daemon.kill()
            await view.until(lambda: "connection lost, trying again" in view.screen)
            daemon.start()
            async with peer(daemon) as again:
                await again.create("the third")
                await view.until(lambda: "the third" in view.screen and "connection lost" not in view.screen)
                view.type("\x03")
                assert await view.ended() == 130
    assert given_back(view)
    assert view.foreign == []
    assert second["id"] in view.scrollback
    assert "the third" in view.scrollback
