"""`outputs ls | get | read`: what a person sees, and what a pipe gets."""

import base64
import hashlib
import json
from typing import Any

import pytest

from carserver.cli import output, outputs
from carserver.cli.app import run
from carserver.config import Settings
from carserver.protocol.errors import conflict, not_found
from carserver.stores.folder import StateFolder
from tests.unit.fakedaemon import FakeDaemon, Session

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("state")
HOSTILE = "[red]x[/]\x1b]0;title\x07\u202e\nsecond"
VISIBLE = "[red]x[/]\\x1b]0;title\\x07\\u202e\\nsecond"
MIB = 1024 * 1024


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person looks at standard output, at a terminal without colour."""
    monkeypatch.setattr(output, "at_terminal", lambda: True)
    monkeypatch.setattr(outputs, "at_terminal", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


def record(number: int = 0, event: Any = None, **members: Any) -> dict[str, Any]:
    """An output, with what the test wants otherwise."""
    return {
        "id": f"out-{number:010x}",
        "task_id": "t",
        "attempt": 1,
        "producer_agent": HOSTILE,
        "event": event or {"type": "progress", "stage": "s", "note": HOSTILE},
        "parent_refs": [],
        "created_at_ms": 1_795_143_091_053,
        **members,
    }


def pages(_: Session, params: Any) -> Any:
    """Seven outputs, at most three a page."""
    first = int(params.get("page", "0"))
    last = min(first + min(params["limit"], 3), 7)
    return {"outputs": [record(n) for n in range(first, last)], "next_page": str(last) if last < 7 else None}


def content(data: bytes, *, sha256: str | None = None) -> Any:
    """The answers of `outputs.read` for this content."""
    try:
        data.decode()
        encoding = "utf8"
    except UnicodeDecodeError:
        encoding = "base64"

    def read(_: Session, params: Any) -> Any:
        end = min(params["offset"] + params["length"], len(data))
        while encoding == "utf8" and end < len(data) and data[end] & 0xC0 == 0x80:
            end += 1 if end - params["offset"] == 1 else -1
        part = data[params["offset"] : end]
        return {
            "data": part.decode() if encoding == "utf8" else base64.b64encode(part).decode(),
            "encoding": encoding,
            "size": len(data),
            "sha256": sha256 or hashlib.sha256(data).hexdigest(),
            "eof": end == len(data),
        }

    return read


def test_ls_gives_a_pipe_a_line_an_output_in_tab_separated_cells(capsys: Captured) -> None:
    inline = {"kind": "inline", "value": {"a": [1]}}
    events: list[tuple[Any, str, str]] = [
        ({"type": "progress", "stage": "s", "note": None}, "progress", "s"),
        ({"type": "progress", "stage": "s", "note": HOSTILE}, "progress", f"s: {VISIBLE}"),
        ({"type": "partial", "chunk": {"kind": "inline", "value": HOSTILE}}, "partial", VISIBLE),
        ({"type": "artifact", "name": "n", "content": inline}, "artifact", 'n: {"a":[1]}'),
        (
            {"type": "final", "ok": True, "content": {"kind": "inline", "omitted": True, "size": 9}},
            "final",
            "ok: 9 bytes",
        ),
        (
            {"type": "final", "ok": False, "content": {"kind": "file_ref", "path": "a/b\x1b", "mime": None}},
            "final",
            "not ok: file a/b\\x1b",
        ),
    ]
    answer = {"outputs": [record(n, event) for n, (event, _, _) in enumerate(events)], "next_page": None}
    with FakeDaemon({"outputs.list": answer}) as daemon:
        assert run(["outputs", "ls", "--url", daemon.url]) == 0
    captured = capsys.readouterr()
    when = "2026-11-20T02:51:31.053Z"
    assert [line.split("\t") for line in captured.out.splitlines()] == [
        [f"out-{n:010x}", type_, "t", "1", VISIBLE, when, what] for n, (_, type_, what) in enumerate(events)
    ]


def test_ls_asks_for_the_attempt_and_says_where_there_are_more(state: StateFolder, capsys: Captured) -> None:
    secrets = state.secrets(Settings())
    with FakeDaemon({"outputs.list": pages}) as daemon:
        assert run(["outputs", "ls", "--url", daemon.url, "--task", "t", "--attempt", "0", "--limit", "4"]) == 0
        assert daemon.sessions[0].authorization == f"Bearer {secrets.host_token}"
        captured = capsys.readouterr()
        assert (len(captured.out.splitlines()), "the first 4" in captured.err) == (4, True)
        assert run(["outputs", "ls", "--url", daemon.url]) == 0
        captured = capsys.readouterr()
        assert (len(captured.out.splitlines()), captured.err) == (7, "")
        assert run(["outputs", "ls", "--url", daemon.url, "--attempt", "1"]) == 2
    asked = daemon.params_of("outputs.list")
    wanted = {"task_id": "t", "attempt": 0}
    assert asked[:2] == [{**wanted, "limit": 4}, {**wanted, "limit": 1, "page": "3"}]


def test_ls_json_is_the_daemons_own_records_a_line_each(capsys: Captured) -> None:
    event = {"type": "final", "ok": True, "content": {"kind": "inline", "value": 2**70}}
    with FakeDaemon({"outputs.list": {"outputs": [record(1, event, unknown_member=1)], "next_page": None}}) as daemon:
        assert run(["outputs", "ls", "--json", "--url", daemon.url]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [record(1, event, unknown_member=1)]


@pytest.mark.usefixtures("terminal")
def test_ls_at_a_terminal_is_a_table_that_interprets_nothing(capsys: Captured) -> None:
    with FakeDaemon({"outputs.list": pages}) as daemon:
        assert run(["outputs", "ls", "--url", daemon.url]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["OUTPUT", "TYPE", "TASK", "ATTEMPT", "PRODUCER", "CREATED", "WHAT"]
    assert f"s: {VISIBLE}" in out
    assert "\x1b" not in out


def test_get_shows_the_members_of_a_record(capsys: Captured) -> None:
    with FakeDaemon({"outputs.get": record(1)}) as daemon:
        assert run(["outputs", "get", "out-0000000001", "--url", daemon.url]) == 0
        shown = capsys.readouterr().out
        assert run(["outputs", "get", "out-0000000001", "--json", "--url", daemon.url]) == 0
        assert json.loads(capsys.readouterr().out) == record(1)
    assert f"producer_agent       {VISIBLE}\n" in shown
    assert '                       "stage": "s",\n' in shown
    assert "\x1b" not in shown


def test_what_is_not_there_is_exit_code_3(capsys: Captured) -> None:
    def get(_: Session, params: Any) -> Any:
        raise not_found("output", params["id"])

    with FakeDaemon({"outputs.get": get, "outputs.read": get}) as daemon:
        for command in ("get", "read"):
            assert run(["outputs", command, "out-0000000001", "--url", daemon.url]) == 3
            assert capsys.readouterr().err == "carserver: unknown output 'out-0000000001'\n"


@pytest.mark.parametrize(
    "data",
    [b"", "aé漢😀\x1b[2J\r\n".encode(), b"\xff\x00\r\n", "é".encode() * MIB + b"z", bytes(2 * MIB + 1) + b"\xff"],
)
def test_read_gives_a_pipe_the_very_bytes(capsysbinary: pytest.CaptureFixture[bytes], data: bytes) -> None:
    with FakeDaemon({"outputs.read": content(data)}) as daemon:
        assert run(["outputs", "read", "out-0000000001", "--url", daemon.url]) == 0
    assert capsysbinary.readouterr().out == data
    assert all(params["length"] == MIB for params in daemon.params_of("outputs.read"))


def test_read_takes_as_many_bytes_as_were_asked_for(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    data = bytes(3 * MIB) + b"\xfe\xff"
    with FakeDaemon({"outputs.read": content(data)}) as daemon:
        for offset, length in ((3, 5), (1, 2 * MIB + 7), (3 * MIB, 10)):
            given = ["--offset", str(offset), "--length", str(length)]
            assert run(["outputs", "read", "out-0000000001", "--url", daemon.url, *given]) == 0
            assert capsysbinary.readouterr().out == data[offset : offset + length]


def test_read_of_text_ends_before_a_character_that_does_not_fit(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    with FakeDaemon({"outputs.read": content("é".encode() * 10)}) as daemon:
        assert run(["outputs", "read", "out-0000000001", "--url", daemon.url, "--length", "5"]) == 0
    assert capsysbinary.readouterr().out == b"\xc3\xa9\xc3\xa9"


@pytest.mark.usefixtures("terminal")
def test_read_at_a_terminal_shows_text_and_refuses_what_is_none(capsys: Captured) -> None:
    with FakeDaemon({"outputs.read": content(f"{HOSTILE}\n".encode())}) as daemon:
        assert run(["outputs", "read", "out-0000000001", "--url", daemon.url]) == 0
        assert capsys.readouterr().out == "[red]x[/]\\x1b]0;title\\x07\\u202e\nsecond\n"
        daemon.answers["outputs.read"] = content(b"no line end")
        assert run(["outputs", "read", "out-0000000001", "--url", daemon.url]) == 0
        assert capsys.readouterr().out == "no line end\n", "the prompt that follows has a line of its own"
        daemon.answers["outputs.read"] = content(b"\xff\x1b")
        assert run(["outputs", "read", "out-0000000001", "--url", daemon.url]) == 2
        captured = capsys.readouterr()
        assert (captured.out, "file or a pipe" in captured.err) == ("", True)


def test_content_that_is_not_what_was_appended_is_an_error(capsys: Captured) -> None:
    def changed(_: Session, params: Any) -> Any:
        raise conflict("file_changed", "'f' is not the file that was appended: it has changed since")

    with FakeDaemon({"outputs.read": content(b"abc", sha256="0" * 64)}) as daemon:
        assert run(["outputs", "read", "out-0000000001", "--url", daemon.url]) == 1
        assert "SHA-256" in capsys.readouterr().err
        assert run(["outputs", "read", "out-0000000001", "--url", daemon.url, "--offset", "1"]) == 0
        daemon.answers["outputs.read"] = changed
        assert run(["outputs", "read", "out-0000000001", "--url", daemon.url]) == 1
        assert "not the file" in capsys.readouterr().err
