"""The programs in examples/ that use the client, run as programs against a real daemon."""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import ROOT, Daemon
from tests.fakemodel import FakeModel, Turn
from tests.hosting import polled, until_ended
from tests.peer import Peer, peer

EXAMPLES = ROOT / "examples"
TOOLS_FILE = str(EXAMPLES / "tools.toml")

needs_a3s = pytest.mark.skipif(
    importlib.util.find_spec("a3s_code") is None,
    reason="a3s-code, the agent runtime of examples/a3s.py, is not installed (requirements/a3s.in)",
)


@contextlib.asynccontextmanager
async def example(
    name: str | Path, daemon: Daemon, *args: str, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """An example, or another program that may import them, ended with the block."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CARSERVER", "CAR_"))}
    path = os.pathsep.join([str(ROOT), str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / name),
        *args,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=kept | environment | {"CARSERVER_STATE_DIR": str(daemon.state), "PYTHONPATH": path},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().rstrip("\n")


async def finished(process: asyncio.subprocess.Process) -> str:
    """What it said, once it has ended well."""
    said, complained = await process.communicate()
    assert process.returncode == 0, complained.decode()
    return said.decode()


async def events_of(caller: Peer, run_id: str) -> list[dict[str, Any]]:
    page = await caller.call("runs.events", {"run_id": run_id})
    assert not page["has_more"]
    return [entry["event"] for entry in page["events"]]


def joined(events: list[dict[str, Any]], kind: str, member: str) -> str:
    return "".join(event[member] for event in events if event["type"] == kind)


def named(events: list[dict[str, Any]], kind: str) -> list[str]:
    return [event["name"] for event in events if event["type"] == kind]


# The plain loop.


async def test_the_plain_agent_calls_both_tools_streams_and_finishes(start: StartDaemon, tmp_path: Path) -> None:
    daemon = start("--tools", TOOLS_FILE)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "a.py").write_text("# TODO one\n# TODO two\n")
    async with peer(daemon) as caller, example("agent.py", daemon, "What is left?", str(folder)) as program:
        run_id, _, words = (await finished(program)).partition(" ")
        assert words == f"This is left to do:\n2 {folder / 'a.py'}\n\n"
        run = await caller.call("runs.get", {"run_id": run_id})
        assert (run["status"], run["prompt"], run["result_text"]) == ("completed", "What is left?", words[:-1])
        while len(ends := named(events := await events_of(caller, run_id), "tool_end")) < 2:
            pass  # the log tells of a tool's end a little after the handle does
        assert named(events, "tool_start") == ["grep", "count"]
        assert sorted(ends) == ["count", "grep"]
        assert joined(events, "text_delta", "text") == words[:-1]


# The hosted tools.


async def test_the_hosted_tools_run_and_are_there_again_after_a_restart_of_the_daemon(start: StartDaemon) -> None:
    daemon = start()
    async with example("hosted_tool.py", daemon) as program:
        assert await line_of(program) == "hosting count and digest"
        async with peer(daemon) as caller:
            parameters = {"to": 2, "pause_s": 0}
            handle = (await caller.call("tools.invoke", {"tool": "count", "parameters": parameters}))["handle"]
            chunks, answer = await until_ended(caller, handle)
            assert [chunk["text"] for chunk in chunks if chunk["kind"] == "text"] == ["1\n", "2\n"]
            assert answer["result"] == {"counted_to": 2}
            handle = (await caller.call("tools.invoke", {"tool": "count", "parameters": {"to": 100}}))["handle"]
            await polled(caller, handle, wait_ms=10_000, after=0)
            cancel = await caller.call("tools.cancel", {"handle": handle, "wait_ms": 10_000})
            assert cancel == {"cancelled": True, "cancel": "confirmed"}
            assert await line_of(program) == "stopped counting"
        daemon.kill()
        daemon.start()
        async with peer(daemon) as caller:
            while (await caller.call("tools.list"))["count"] < 2:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)
            answer = await caller.call("tools.call", {"tool": "digest", "parameters": {"path": TOOLS_FILE}})
            assert len(answer["result"]) == 64
        program.send_signal(signal.SIGINT)
        assert await finished(program) == ""


async def test_a_host_that_is_killed_fails_its_calls_and_a_new_one_takes_its_tools(daemon: Daemon) -> None:
    async with peer(daemon) as caller:
        async with example("hosted_tool.py", daemon) as program:
            await line_of(program)
            handle = (await caller.call("tools.invoke", {"tool": "count", "parameters": {"to": 100}}))["handle"]
            await polled(caller, handle, wait_ms=10_000, after=0)
            program.kill()
            _, answer = await until_ended(caller, handle)
            assert (answer["status"], answer["error"]) == ("failed", "the host's connection ended")
        async with example("hosted_tool.py", daemon) as program:
            await line_of(program)
            assert (await caller.call("tools.list"))["count"] == 2


# The real agent.


AND_WHAT_IT_KEPT = """
import a3s, asyncio, json, sys
session = asyncio.run(a3s.main(*sys.argv[1:]))
print(json.dumps([entry["event"] for entry in session.run_events(session.runs()[-1]["id"])]))
"""


@needs_a3s
async def test_the_runtimes_own_events_are_the_runs_log_word_for_word(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.md").write_text("one\ntwo\n")
    (tmp_path / "program.py").write_text(AND_WHAT_IT_KEPT)
    turns = Turn("I will look.", "bash", {"command": "cat notes.md; echo three"}), Turn("There are three lines.")
    with FakeModel(*turns) as model:
        told = "How many lines?", str(tmp_path / "work")
        async with (
            peer(daemon) as caller,
            example(tmp_path / "program.py", daemon, *told, **model.environment) as program,
        ):
            run_id, kept = (await finished(program)).splitlines()
            events = await events_of(caller, run_id)
            run = await caller.call("runs.get", {"run_id": run_id})
    assert events == json.loads(kept)
    assert (run["status"], run["result_text"]) == ("completed", "There are three lines. ")
    assert joined(events, "tool_output_delta", "delta") == "one\ntwo\nthree\n"
    assert joined(events, "text_delta", "text") == "I will look. There are three lines. "
    assert [event["type"] for event in events if event["type"].startswith("agent_")] == [
        "agent_mode_changed",
        "agent_start",
        "agent_end",
    ]
    assert model.requests[1]["messages"][-1]["content"] == "one\ntwo\nthree\n"


@needs_a3s
async def test_cancelling_the_run_stops_the_runtime(daemon: Daemon, tmp_path: Path) -> None:
    with FakeModel(Turn()) as model:
        arguments = "Wait.", "--folder", str(tmp_path)
        async with peer(daemon) as caller, example("a3s.py", daemon, *arguments, **model.environment) as program:
            run_id = await line_of(program)
            while "turn_start" not in [event["type"] for event in await events_of(caller, run_id)]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await caller.call("runs.cancel", {"run_id": run_id, "reason": "enough"})
            await program.communicate()
            run = await caller.call("runs.get", {"run_id": run_id})
            assert (run["status"], run["cancel_reason"]) == ("cancelled", "enough")
