"""`tools invoke`: what a person sees, what a pipe gets, and that Ctrl-C or a reader that goes away cancels."""

import io
import json
import re
import signal
import subprocess
import sys
import threading
from typing import Any

import msgspec
import pytest
from rich.cells import cell_len

from carserver.cli.app import run
from carserver.cli.tools_view import View
from carserver.config import Settings
from carserver.protocol.errors import ErrorKind, RpcError, conflict, invalid_params, not_found
from carserver.stores.folder import StateFolder
from tests.unit.fakedaemon import PATIENCE_S, FakeDaemon, Session, Unanswered
from tests.unit.faketool import BARE, HANDLE, HOSTILE, VISIBLE, FakeTool, done, failure, interrupt, lost, text

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("state")


def invoked(tool: FakeTool, *arguments: str) -> tuple[int, list[tuple[str, Any]]]:
    """The exit code, and what was asked."""
    with FakeDaemon(tool.answers) as daemon:
        return run(["tools", "invoke", "t", *arguments, "--url", daemon.url]), daemon.calls


# ------------------------------------------------------------------------------------------------------ in a pipe


def test_a_pipe_has_the_tools_text_as_it_came_and_all_else_is_on_standard_error(capfdbinary: Any) -> None:
    tool = FakeTool(
        [text("a\x1b[2J\r\n\u202e"), text("warning\n", stream="stderr"), text("é half")],
        [text(" and half\n"), {"kind": "progress", "fraction": 0.5, "message": HOSTILE}, text("no line end")],
        [{"kind": "data", "data": {"a": [1, "é\x1b"]}}, done(BARE)],
    )
    code, _ = invoked(tool)
    captured = capfdbinary.readouterr()
    assert code == 0
    assert captured.out == (
        b"a\x1b[2J\r\n\xe2\x80\xae\xc3\xa9 half and half\nno line end\n" + '{"a":[1,"é\\u001b"]}\n'.encode()
    )
    assert captured.err.decode().splitlines() == [
        "warning",
        f"carserver: 50 %  {VISIBLE}",
        "carserver: succeeded in 1.2 s, exit code 0",
    ]


def test_the_result_of_a_tool_that_says_nothing_is_its_data(capfd: Captured) -> None:
    assert invoked(FakeTool([done({"sum": 2**60})]))[0] == 0
    captured = capfd.readouterr()
    assert captured.out == '{"sum":1152921504606846976}\n'
    assert captured.err.startswith("carserver: succeeded in ")
    assert invoked(FakeTool([text("3\n"), done({"sum": 3})]))[0] == 0
    captured = capfd.readouterr()
    assert captured.out == "3\n", "what has text has said it: the result does not come between"
    assert 'result: {"sum":3}' in captured.err


def test_a_large_result_is_said_where_it_is(capfd: Captured) -> None:
    reference = {"id": "out-0123456789", "size": 219_000, "preview": "x"}
    assert invoked(FakeTool([done()], result_ref=reference))[0] == 0
    said = "carserver: the result is output out-0123456789, 213 KiB: carserver outputs read out-0123456789\n"
    assert said in capfd.readouterr().err


def test_json_is_a_line_for_each_chunk_and_one_for_what_it_came_to(capfd: Captured) -> None:
    chunks = [text(f"{HOSTILE}\n"), {"kind": "progress", "fraction": 0.5, "later_member": 1}, failure("exit code 2")]
    assert invoked(FakeTool(chunks[:1], chunks[1:]), "--json")[0] == 1
    captured = capfd.readouterr()
    *told, outcome = [json.loads(line) for line in captured.out.splitlines()]
    assert (told, captured.err) == (chunks, "")
    assert outcome.pop("took_ms") >= 0
    assert outcome == {"handle": HANDLE, "tool": "t", "status": "failed", "error": "exit code 2"}


@pytest.mark.parametrize(
    ("scene", "status", "code", "said"),
    [
        ([failure("exit code 2")], "failed", 1, "failed after "),
        ([failure("deadline of 2000 ms")], "failed", 75, ": deadline of 2000 ms"),
        ([failure("cancelled by host")], "cancelled", 1, "cancelled after "),
        ([failure(HOSTILE)], "failed", 1, VISIBLE),
    ],
)
def test_a_tool_that_does_not_succeed_is_an_exit_code(
    scene: list[Any], status: str, code: int, said: str, capfd: Captured
) -> None:
    tool = FakeTool()
    tool._push(*scene, status=status)
    assert invoked(tool)[0] == code
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (not_found("tool", "t"), 3),
        (invalid_params("parameters.count", "is not of type 'integer'"), 2),
        (conflict("run_terminal", "the run is over"), 1),
        (RpcError(ErrorKind.FORBIDDEN, "not yours"), 77),
    ],
)
def test_what_cannot_be_invoked_is_an_exit_code(error: RpcError, code: int, capfd: Captured) -> None:
    def refuse(_: Session, __: Any) -> Any:
        raise error

    with FakeDaemon({"tools.invoke": refuse}) as daemon:
        assert run(["tools", "invoke", "t", "--url", daemon.url]) == code
    assert capfd.readouterr() == ("", f"carserver: {error.message}\n")


# ------------------------------------------------------------------------------------------------------ its arguments


def test_it_invokes_as_the_client_with_what_it_was_given(state: StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = state.secrets(Settings())
    options = ["--run", "run-1", "--timeout", "1.5", "--key", "k"]
    with FakeDaemon(FakeTool([done()]).answers) as daemon:
        assert run(["tools", "invoke", "t", '{"big": 1180591620717411303424.50}', *options, "--url", daemon.url]) == 0
        assert daemon.sessions[0].authorization == f"Bearer {secrets.auth_token}"
        (given,) = daemon.params_of("tools.invoke")
    assert given == {
        "tool": "t",
        "parameters": {"big": 1180591620717411303424.50},
        "run_id": "run-1",
        "timeout_ms": 1500,
        "idempotency_key": "k",
    }
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"from": "stdin"}')))
    _, calls = invoked(FakeTool([done()]), "-")
    assert calls[0] == ("tools.invoke", {"tool": "t", "parameters": {"from": "stdin"}})


def test_arguments_one_by_one_have_the_types_of_the_tools_schema() -> None:
    schema = {"properties": {"count": {"type": "integer"}, "name": {"type": "string"}, "tags": {"type": "array"}}}
    tool = {"name": "t", "source": "process", "description": "", "parameters": schema, "idempotent": False}
    fake = FakeTool([done()])
    fake.answers["tools.list"] = lambda _, __: {"tools": [{**tool, "name": "s", "parameters": True}, tool], "count": 2}
    pairs = ["count=3", "name=3", 'tags=["a",1]', "unknown=a=b"]
    _, calls = invoked(fake, '{"name": "x", "more": null}', *(word for pair in pairs for word in ("--set", pair)))
    assert calls[1][1]["parameters"] == {"name": "3", "more": None, "count": 3, "tags": ["a", 1], "unknown": "a=b"}


# ----------------------------------------------------------------------------------------- connections that are lost


def test_a_lost_connection_loses_and_doubles_nothing(capfd: Captured) -> None:
    tool = FakeTool([text("1\n")], [text("2\n")], lost, [text("3\n")], lost, lost, [text("4\n"), done(BARE)])
    code, calls = invoked(tool)
    captured = capfd.readouterr()
    assert (code, captured.out) == (0, "1\n2\n3\n4\n")
    assert captured.err.count("connection lost, trying again") == 3
    assert [method for method, _ in calls].count("tools.invoke") == 1


def test_a_handle_that_did_not_survive_its_daemon_is_said_to_be_gone(capfd: Captured) -> None:
    tool = FakeTool([text("1\n")], lost)

    def poll(session: Session, params: Any) -> Any:
        return tool._poll(session, params) if len(daemon.sessions) == 1 else None

    tool.answers["tools.poll"] = poll
    with FakeDaemon(tool.answers) as daemon:
        assert run(["tools", "invoke", "t", "--url", daemon.url]) == 1
    captured = capfd.readouterr()
    assert captured.out == "1\n"
    assert f"{HANDLE} is gone" in captured.err


def test_what_is_lost_for_good_has_a_handle_to_ask_for(capfd: Captured) -> None:
    tool = FakeTool([text("1\n")], lambda session: session.close(1008))
    assert invoked(tool)[0] == 69
    assert f"its handle is {HANDLE}" in capfd.readouterr().err


def test_a_first_connection_that_fails_is_not_tried_again(capfd: Captured) -> None:
    assert run(["tools", "invoke", "t", "--url", "ws://127.0.0.1:1"]) == 69
    assert "cannot connect" in capfd.readouterr().err


def test_what_came_too_fast_is_counted_and_does_not_pass_for_the_whole(capfd: Captured) -> None:
    tool = FakeTool([text("1\n")], [text("2\n"), text("3\n"), text("4\n"), done(BARE)])

    def poll(session: Session, params: Any) -> Any:
        tool.dropped = 3 if params["after"] else 0
        return FakeTool._poll(tool, session, params)

    tool.answers["tools.poll"] = poll
    assert invoked(tool)[0] == 1
    captured = capfd.readouterr()
    assert captured.out == "1\n4\n"
    assert "2 chunks of what it said were not read in time, and are gone" in captured.err


# ------------------------------------------------------------------------------------------- Ctrl-C, and who goes away


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("proof", "said"),
    [
        ("confirmed", "carserver: cancelled: nothing of it lives"),
        ("unconfirmed", "carserver: cancelled, but it could not be seen that it ended: something of it may go on"),
    ],
)
def test_ctrl_c_cancels_and_waits_for_the_proof(number: signal.Signals, proof: str, said: str, capfd: Captured) -> None:
    tool = FakeTool([text("hello\n")], interrupt(number), proof=proof)
    code, calls = invoked(tool)
    captured = capfd.readouterr()
    assert (code, captured.out) == (130, "hello\nand goodbye\n"), "what it said until its end is shown"
    assert captured.err.splitlines() == ["carserver: cancelling…", said]
    assert [method for method, _ in calls][-2:] == ["tools.cancel", "tools.poll"]


def test_json_says_what_a_cancel_came_to(capfd: Captured) -> None:
    assert invoked(FakeTool([text("x")], interrupt()), "--json")[0] == 130
    outcome = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (outcome["status"], outcome["cancel"]) == ("cancelled", "confirmed")


def test_a_second_ctrl_c_does_not_wait(capfd: Captured) -> None:
    tool = FakeTool([text("hello\n")], interrupt())

    def cancel(session: Session, _: Any) -> Any:
        interrupt()(session)
        raise Unanswered

    tool.answers["tools.cancel"] = cancel
    assert invoked(tool)[0] == 130
    assert capfd.readouterr().err == "carserver: cancelling…\n"


def test_ctrl_c_while_the_connection_is_lost_cancels_on_the_next_one(capfd: Captured) -> None:
    def both(session: Session) -> None:
        interrupt()(session)
        lost(session)

    tool = FakeTool([text("hello\n")], both)
    code, calls = invoked(tool)
    assert code == 130
    assert ("tools.cancel", {"handle": HANDLE, "wait_ms": 30_000}) in calls
    assert "cancelled: nothing of it lives" in capfd.readouterr().err


def test_ctrl_c_when_it_has_just_ended_says_how_it_ended(capfd: Captured) -> None:
    tool = FakeTool([text("hello\n")], interrupt())

    def cancel(session: Session, params: Any) -> Any:
        tool._push(done(BARE))
        return FakeTool._cancel(tool, session, params)

    tool.answers["tools.cancel"] = cancel
    assert invoked(tool)[0] == 130
    assert "succeeded in 1.2 s" in capfd.readouterr().err


def command(daemon: FakeDaemon, *arguments: str, **streams: Any) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-m", "carserver", "tools", "invoke", "t", *arguments, "--url", daemon.url]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **streams)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_goes_away_cancels_what_it_read(options: list[str]) -> None:
    tool = FakeTool(*[[text("x" * 100_000)] for _ in range(50)])
    with FakeDaemon(tool.answers) as daemon, command(daemon, *options) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr.read() == b""
        assert len(daemon.params_of("tools.cancel")) == 1


def test_a_reader_that_reads_nothing_does_not_hold_back_ctrl_c() -> None:
    tool = FakeTool([text("x" * 10_000_000)])
    asked = threading.Event()

    def cancel(session: Session, params: Any) -> Any:
        asked.set()
        return FakeTool._cancel(tool, session, params)

    tool.answers["tools.cancel"] = cancel
    with FakeDaemon(tool.answers) as daemon, command(daemon) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline() == "carserver: cancelling…\n".encode()
        assert asked.wait(PATIENCE_S), "nothing is read, and yet it is cancelled"
        rest = process.stdout.read()
        assert process.wait(PATIENCE_S) == 130
    assert first + rest == b"x" * 10_000_000 + b"and goodbye\n"


# ------------------------------------------------------------------------------------------------------- at a terminal


def shown(*pieces: "str | tuple[str, str]") -> tuple[str, str]:
    """What is written for good, and the line that is not ended."""
    view = View("t")
    written = "".join(view._text(*((piece, "") if isinstance(piece, str) else piece)) for piece in pieces)
    return written, "".join(piece for piece, _ in view._line)


def test_whole_lines_are_written_and_the_rest_waits_for_its_end() -> None:
    assert shown("one\ntwo\nth", "r", "ee") == ("one\ntwo\n", "three")
    assert shown("\n\n", "x\n\n") == ("\n\nx\n\n", "")
    assert shown("a\r", "\nb\r\n", "50 %\r100 %\r\n") == ("a\nb\n50 %\n100 %\n", ""), "nothing hides behind a return"
    assert shown("x" * 5_000, "y") == ("x" * 5_000 + "\n", "y"), "a line without an end is bounded"


def test_a_tools_text_is_shown_and_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown("\x1b[2J\x07\u202e\t.\n") == ("\\x1b[2J\\x07\\u202e\t.\n", "")
    assert shown("out, ", ("err\nerr\n", "stderr"), "out\n") == ("out, \x1b[2merr\x1b[0m\n\x1b[2merr\x1b[0m\nout\n", "")


@pytest.mark.parametrize("width", [1, 20, 40, 80, 250])
async def test_the_foot_fits_and_has_the_end_of_the_line(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carserver.cli.tools_view._columns", lambda: width)
    monkeypatch.setattr("carserver.cli.tools_view.write", lambda _, __: None)
    view = View(HOSTILE)
    progress = {"kind": "progress", "fraction": 0.5, "message": HOSTILE * 9}
    await view.take(
        [msgspec.Raw(msgspec.json.encode(chunk)) for chunk in (text("日本\t🚀" * 99 + "end."), progress)], 0
    )
    above, below = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", view._foot()).split("\n")
    assert above.endswith("end.")
    assert "50 %" in below
    assert max(cell_len(above), cell_len(below)) < max(width, 20)


def test_a_pipe_does_not_wait_for_what_only_a_terminal_needs() -> None:
    program = "import sys, carserver.cli.tools, carserver.cli.tools_invoke; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
