"""`carserver tools` against a daemon, at a terminal and in a pipe; with the examples, as their README runs them."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.daemon import ROOT, Daemon, running
from tests.peer import peer
from tests.terminal import Terminal, terminal

EXAMPLES = ROOT / "examples"
SECONDS = 30.0
OWN_TOOLS = """
[tools.flood]
command = ["yes", "all work and no play"]

[tools.says]
command = ["printf", "{text}"]
parameters = { type = "object", required = ["text"], properties = { text = { type = "string" } } }

[tools.stubborn]
command = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"]
"""
TESTS = """
import pathlib, time

def test_one(): pass

def test_two():
    while not (pathlib.Path(__file__).parent / "go").exists():
        time.sleep(0.02)

def test_three(): assert 1 == 2, "one is not two"
"""


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with the tools of the examples; pytest is on their PATH."""
    path = f"PATH={Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    state = tmp_path_factory.mktemp("tooled") / "state"
    with running(state, "--tools", str(EXAMPLES / "tools.toml"), wrapper=("env", path)) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def tools_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tools of these tests."""
    path = tmp_path_factory.mktemp("tools") / "tools.toml"
    path.write_text(OWN_TOOLS)
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, tools_file: Path) -> Iterator[Daemon]:
    """A daemon with these."""
    state = tmp_path_factory.mktemp("own") / "state"
    with running(state, "--tools", str(tools_file), kill_after_s=0.1, unconfirmed_s=30) as daemon:
        yield daemon


def command(daemon: Daemon, *arguments: str) -> "subprocess.Popen[str]":
    """`carserver tools …` in a pipe."""
    words = [sys.executable, "-m", "carserver", "tools", *arguments, "--state-dir", str(daemon.state)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


async def ran(daemon: Daemon, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with command(daemon, *arguments) as process:
        out, err = await asyncio.to_thread(process.communicate, timeout=SECONDS)
        return process.returncode, out, err


def given_back(view: Terminal) -> bool:
    """Whether the terminal is as it was: a cursor, wrapping, and nothing at the foot."""
    return {"?25h", "?7h"} <= view.modes and view.foot == "" and view.foreign == []


def processes(word: str) -> list[str]:
    """The command lines of others that have a word in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [line] if word in line and " -m carserver " not in line else []
    return found


# ------------------------------------------------------------------------------------------------------- the examples


async def test_tail_follows_a_file_at_a_terminal_until_ctrl_c(tooled: Daemon, tmp_path: Path) -> None:
    log = tmp_path / "growing.log"
    log.write_text("first\n")
    with terminal(tooled, "tools", "invoke", "tail", "--set", f"file={log}") as view:
        await view.until(lambda: "first\n" in view.scrollback and "tail" in view.foot)
        with log.open("a") as file:
            file.write("second\x1b[2J\nno line end yet")
        await view.until(lambda: "second\\x1b[2J\n" in view.scrollback and "no line end yet\n" in view.foot)
        view.resize(30, 10)
        view.type("\x03")
        assert await view.ended() == 130
    assert view.scrollback == "first\nsecond\\x1b[2J\nno line end yet\n■ cancelled: nothing of it lives\n"
    assert given_back(view)
    assert processes(str(log)) == []
    assert "?1049h" not in view.modes, "what a tool says stays in the terminal"


async def test_tail_in_a_pipe_ends_with_its_reader(tooled: Daemon, tmp_path: Path) -> None:
    log = tmp_path / "growing.log"
    log.write_text("first\n")
    with command(tooled, "invoke", "tail", "--set", f"file={log}") as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "first\n"
        process.stdout.close()
        with log.open("a") as file:
            file.write("second\n")
        assert await asyncio.to_thread(process.wait, SECONDS) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert processes(str(log)) == []


async def test_grep_finds_in_a_tree_and_its_pattern_is_no_option(tooled: Daemon, tmp_path: Path) -> None:
    tree = tmp_path / "-tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "a.py").write_text("nothing\nHere --help is\n")
    (tree / "b.txt").write_text("here --help is\n")
    code, out, err = await ran(
        tooled, "invoke", "grep", "--set", "pattern=--help", "--set", f"folder={tree}", "--set", "include=*.py"
    )
    assert (code, out) == (0, f"{tree}/deep/a.py:2:Here --help is\n")
    assert err.startswith("carserver: succeeded in ")
    assert err.endswith(", exit code 0\n")
    arguments = json.dumps({"pattern": "^HERE", "folder": str(tree), "case": "ignore-case"})
    _, out, _ = await ran(tooled, "invoke", "grep", arguments)
    assert sorted(out.splitlines()) == [f"{tree}/b.txt:1:here --help is", f"{tree}/deep/a.py:2:Here --help is"]
    code, out, err = await ran(tooled, "invoke", "grep", "--set", "pattern=nowhere", "--set", f"folder={tree}")
    assert (code, out) == (1, "")
    assert err.endswith(": exit code 1\n")


async def test_tests_show_how_far_they_are(tooled: Daemon, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "test_some.py").write_text(TESTS)
    folder = f"folder={tmp_path / 'some'}"
    with terminal(tooled, "tools", "invoke", "tests", "--set", folder, columns=100) as view:
        await view.until(lambda: "1 of 3 tests" in view.foot and "━━━━━───────────  33 %" in view.foot)
        (tmp_path / "some" / "go").touch()
        assert await view.ended() == 1
    assert "test_three failed:\n" in view.scrollback
    assert "AssertionError: one is not two\n" in view.scrollback
    assert '{"passed":2,"failed":1,"skipped":0}\n' in view.scrollback
    assert view.scrollback.splitlines()[-1].endswith(": 1 failed")
    assert given_back(view)


async def test_tests_tell_a_program_their_figures(tooled: Daemon, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "test_some.py").write_text("def test_one(): print('noise')\n")
    code, out, err = await ran(tooled, "invoke", "tests", "--set", f"folder={tmp_path / 'some'}", "--json")
    *chunks, outcome = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [chunk["kind"] for chunk in chunks] == ["progress", "done"]
    assert (outcome["status"], outcome["result"]) == ("succeeded", {"passed": 1, "failed": 0, "skipped": 0})


@contextlib.contextmanager
def hosting(daemon: Daemon) -> Iterator["subprocess.Popen[str]"]:
    """examples/host.py, once its tool is there."""
    environment = {**os.environ, "CAR_AUTH_TOKEN": daemon.token(), "CAR_DAEMON_URL": daemon.url}
    words = [sys.executable, str(EXAMPLES / "host.py")]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "hosting count\n"
            yield process
        finally:
            process.kill()


async def test_a_programs_tool_is_seen_and_told_of_ctrl_c(daemon: Daemon) -> None:
    with hosting(daemon):
        code, out, _ = await ran(daemon, "ls")
        assert (code, out) == (0, "count\tclient\tto\tCounts aloud.\n")
        code, out, err = await ran(daemon, "invoke", "count", "--set", "to=1")
        assert (code, out, 'carserver: result: {"counted_to":1}\n' in err) == (0, "1\n", True)
        with terminal(daemon, "tools", "invoke", "count", '{"to": 1000}') as view:
            await view.until(lambda: "2\n" in view.scrollback)
            view.type("\x03")
            assert await view.ended() == 130
        assert view.scrollback.endswith("■ cancelled: nothing of it lives\n"), "the program answered"
        code, _, err = await ran(daemon, "invoke", "count", "--set", "to=many")
        assert (code, "--set to=many: the tool wants JSON here (integer)" in err) == (2, True)
        code, _, err = await ran(daemon, "invoke", "count", '{"to": 0}')
        assert (code, "parameters.to" in err) == (2, True)


async def test_a_tool_whose_program_goes_fails(daemon: Daemon) -> None:
    with hosting(daemon) as host, command(daemon, "invoke", "count", "--set", "to=1000") as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "1\n"
        host.kill()
        _, err = await asyncio.to_thread(process.communicate, timeout=SECONDS)
        assert process.returncode == 1
        assert err.endswith(": the host's connection ended\n")


# ------------------------------------------------------------------------------------------------------------ the ends


async def test_what_cannot_be_invoked_or_ended_is_an_exit_code(own: Daemon) -> None:
    assert (await ran(own, "invoke", "nothing"))[0] == 3
    code, _, err = await ran(own, "invoke", "says", "{}")
    assert (code, "text" in err) == (2, True)
    assert (await ran(own, "invoke", "says", "--set", "text=x", "--run", "run-nowhere"))[0] == 3
    code, _, err = await ran(own, "cancel", "0" * 32)
    assert (code, "unknown handle" in err) == (3, True)


async def test_text_in_a_pipe_is_what_the_tool_wrote(own: Daemon) -> None:
    said = "\x1b[2Jé\r\n\tno line end"
    words = [sys.executable, "-m", "carserver", "tools", "invoke", "says", json.dumps({"text": said})]
    words += ["--state-dir", str(own.state)]
    ended = await asyncio.to_thread(subprocess.run, words, cwd=ROOT, capture_output=True, check=False, timeout=SECONDS)
    assert (ended.returncode, ended.stdout) == (0, said.encode())


async def test_a_timeout_is_exit_code_75(own: Daemon) -> None:
    code, _, err = await ran(own, "invoke", "stubborn", "--timeout", "0.5")
    assert code == 75
    assert err.endswith(": deadline of 500 ms\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_tool_that_ignores_term_is_killed_and_seen_to_be_gone(own: Daemon, number: signal.Signals) -> None:
    with command(own, "invoke", "stubborn") as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
        process.send_signal(number)
        _, err = await asyncio.to_thread(process.communicate, timeout=SECONDS)
    assert process.returncode == 130
    assert err == "carserver: cancelling…\ncarserver: cancelled: nothing of it lives\n"


async def test_a_flood_at_a_terminal_is_ended_by_ctrl_c(own: Daemon) -> None:
    with terminal(own, "tools", "invoke", "flood") as view:
        await view.until(lambda: len(view._scrolled) > 1_000)
        view.type("\x03")
        assert await view.ended() == 130
    *lines, last = view.scrollback.splitlines()
    sentence = "all work and no play"
    pieces = {sentence[:n] for n in range(len(sentence))} | {sentence[n:] for n in range(len(sentence))}
    assert {line for line in lines if not line.startswith("… ")} <= pieces, "what is dropped does not join its ends"
    assert last.startswith("■ cancelled: nothing of it lives")
    assert given_back(view), (view.modes, view.foot, view.foreign[:9])


async def test_a_terminal_that_cannot_be_painted_gets_lines(own: Daemon) -> None:
    with terminal(own, "tools", "invoke", "says", "--set", "text=no \x1b[2J line end", TERM="dumb") as view:
        assert await view.ended() == 0
    assert view.scrollback.startswith("no \\x1b[2J line end\ncarserver: succeeded in ")
    assert (view.modes, view.foreign) == (set(), [])


async def test_what_runs_is_listed_and_cancelled_from_elsewhere(own: Daemon) -> None:
    with command(own, "invoke", "stubborn") as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
        code, out, _ = await ran(own, "ls", "--running")
        ((handle, tool, run, owner, _since),) = [line.split("\t") for line in out.splitlines()]
        assert (code, tool, run, owner) == (0, "stubborn", "", "client")
        assert await ran(own, "cancel", handle) == (0, f"{handle}: cancelled: nothing of it lives\n", "")
        _, err = await asyncio.to_thread(process.communicate, timeout=SECONDS)
        assert process.returncode == 1
        assert err.endswith(": cancelled by host\n")
        assert await ran(own, "cancel", handle) == (0, f"{handle}: cancelled: nothing of it lives\n", "")
    assert (await ran(own, "ls", "--running"))[1:] == ("", "carserver: nothing runs\n")


async def test_the_same_key_is_the_same_invocation(own: Daemon) -> None:
    arguments = ["invoke", "says", "--set", r"text=hello\n", "--key", "k", "--json"]
    first, second = await ran(own, *arguments), await ran(own, *arguments)
    outcomes = [json.loads(out.splitlines()[-1]) for _, out, _ in (first, second)]
    assert outcomes[0]["handle"] == outcomes[1]["handle"]
    assert outcomes[0]["result"] == outcomes[1]["result"], "it ran once"
    assert first[0] == second[0] == 0


async def test_a_daemon_that_is_killed_takes_the_handle_along(start: StartDaemon, tools_file: Path) -> None:
    daemon = start("--tools", str(tools_file))
    with terminal(daemon, "tools", "invoke", "stubborn") as view:
        await view.until(lambda: "ready" in view.scrollback)
        daemon.kill()
        await view.until(lambda: "connection lost, trying again" in view.foot)
        daemon.start()
        assert await view.ended() == 1
    assert "is gone: the daemon was started anew" in view.scrollback
    assert given_back(view)


async def test_a_tool_in_a_run_is_seen_in_its_trace(own: Daemon) -> None:
    async with peer(own) as owner:
        run = await owner.create("do it")
        with terminal(own, "runs", "trace", run["id"], columns=100) as view:
            invoked = await ran(own, "invoke", "says", "--set", r"text=hello\nworld\n", "--run", run["id"])
            assert invoked[:2] == (0, "hello\nworld\n")
            await view.until(lambda: "✓ says  → world" in view.screen)
            await owner.record(run["id"], {"type": "agent_end", "text": "Done."})
            assert await view.ended() == 0
    assert "✓ says  → world" in view.scrollback
