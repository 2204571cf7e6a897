"""`tools ls` and `tools cancel`, and what arguments are made of."""

import json
from typing import Any

import msgspec
import pytest

from carserver.cli import output, tools
from carserver.cli.app import run
from carserver.cli.tools_arguments import typed
from carserver.config import Settings
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.stores.folder import StateFolder
from tests.unit.fakedaemon import FakeDaemon, Session
from tests.unit.faketool import HANDLE, HOSTILE, VISIBLE

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("state")


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": "integer"}, "12345678901234567890.0", "12345678901234567890.0"),
        ({"type": "boolean"}, "true", "true"),
        ({"type": ["string", "null"]}, "null", '"null"'),
        ({"type": ["number", "null"]}, "null", "null"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "5", "5"),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "5", '"5"'),
        ({"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/x"}]}, "5", '"5"'),
        ({"enum": [1, 2]}, "2", "2"),
        ({"enum": [1, "two"]}, "1", '"1"'),
        ({"description": "anything"}, "5", '"5"'),
        (True, "5", '"5"'),
        (None, HOSTILE, json.dumps(HOSTILE, ensure_ascii=False)),
    ],
)
def test_a_value_is_json_where_the_schema_takes_no_text(schema: Any, value: str, expected: str) -> None:
    whole = msgspec.Raw(msgspec.json.encode({"properties": {} if schema is None else {"x": schema}}))
    assert bytes(typed({"x": value}, whole)["x"]).decode() == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "count=abc"], "--set count=abc: the tool wants JSON here (integer)"),
        (["--set", "count"], "--set count: write KEY=VALUE"),
        (["--set", "=1"], "write KEY=VALUE"),
        (["--set", "\udcff=1"], "write KEY=VALUE"),
        (["--set", "a=1", "--set", "a=2"], "--set a is given twice"),
        (["{"], "the arguments are not JSON"),
        (["[1]"], "must be a JSON object"),
        (["--timeout", "0"], "--timeout"),
        (["--set", "count=\udcff"], "wants JSON here (integer)"),
        (["--set", "name=\udcff"], "wants UTF-8"),
    ],
)
def test_arguments_that_are_none_are_a_usage_error(arguments: list[str], said: str, capfd: Captured) -> None:
    tool = {"name": "t", "source": "client", "description": "", "idempotent": False}
    listed = {"tools": [{**tool, "parameters": {"properties": {"count": {"type": "integer"}}}}], "count": 1}
    with FakeDaemon({"tools.list": listed}) as daemon:
        assert run(["tools", "invoke", "t", *arguments, "--url", daemon.url]) == 2
        assert daemon.params_of("tools.invoke") == []
    assert said in capfd.readouterr().err


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person looks at standard output, at a terminal without colour."""
    monkeypatch.setattr(output, "at_terminal", lambda: True)
    monkeypatch.setattr(tools, "at_terminal", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


# ------------------------------------------------------------------------------------------------------ ls and cancel

LISTED: dict[str, Any] = {
    "name": "grep",
    "source": "process",
    "description": HOSTILE,
    "parameters": {"properties": {"pattern": {}, "folder": {}, "case": {}}, "required": ["pattern", "folder"]},
    "idempotent": False,
    "unknown_member": 2**70,
}
BARE_TOOL = {**LISTED, "name": "bare", "source": "client", "description": "", "parameters": True}
TOOLS = {"tools.list": {"tools": [LISTED, BARE_TOOL], "count": 2}}
LIVE = {"handle": HANDLE, "tool": "t", "action_id": "", "status": "running", "started_at_ms": 1_795_143_091_053}


def test_ls_gives_a_pipe_a_line_a_tool(state: StateFolder, capsys: Captured) -> None:
    secrets = state.secrets(Settings())
    with FakeDaemon(TOOLS) as daemon:
        assert run(["tools", "ls", "--url", daemon.url]) == 0
        assert daemon.sessions[0].authorization == f"Bearer {secrets.host_token}"
        assert capsys.readouterr().out.splitlines() == [
            f"grep\tprocess\tpattern, folder, case?\t{VISIBLE}",
            "bare\tclient\t\t",
        ]
        assert run(["tools", "ls", "--json", "--url", daemon.url]) == 0
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [LISTED, BARE_TOOL]


@pytest.mark.usefixtures("terminal")
def test_ls_at_a_terminal_is_a_table_that_interprets_nothing(capsys: Captured) -> None:
    with FakeDaemon(TOOLS) as daemon:
        assert run(["tools", "ls", "--url", daemon.url]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["TOOL", "SOURCE", "PARAMETERS", "DESCRIPTION"]
    assert f"pattern, folder, case?  {VISIBLE}" in out
    assert "\x1b" not in out


def test_ls_running_has_everyones_handles(capsys: Captured) -> None:
    handles = [{**LIVE, "run_id": "run-1", "owner": "agent:a"}, {**LIVE, "owner": "client"}]
    with FakeDaemon({"tools.handles": {"handles": handles}}) as daemon:
        assert run(["tools", "ls", "--running", "--url", daemon.url]) == 0
        since = "2026-11-20T02:51:31.053Z"
        assert capsys.readouterr().out.splitlines() == [
            f"{HANDLE}\tt\trun-1\tagent:a\t{since}",
            f"{HANDLE}\tt\t\tclient\t{since}",
        ]
        assert daemon.calls == [("tools.handles", {"all": True})]


def test_ls_running_of_who_is_not_the_host_has_its_own(capsys: Captured) -> None:
    def handles(_: Session, params: Any) -> Any:
        if params.get("all"):
            raise RpcError(ErrorKind.FORBIDDEN, "the host alone sees everyone's")
        return {"handles": [LIVE]}

    with FakeDaemon({"tools.handles": handles}) as daemon:
        assert run(["tools", "ls", "--running", "--url", daemon.url]) == 0
    assert capsys.readouterr().out.startswith(f"{HANDLE}\tt\t\t\t")


def test_where_there_is_nothing_it_says_so(capsys: Captured) -> None:
    with FakeDaemon({"tools.list": {"tools": [], "count": 0}, "tools.handles": {"handles": []}}) as daemon:
        assert run(["tools", "ls", "--url", daemon.url]) == 0
        assert "no tools" in capsys.readouterr().err
        assert run(["tools", "ls", "--running", "--url", daemon.url]) == 0
        assert "nothing runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "code", "said"),
    [
        ({"a": ("cancelled", "confirmed")}, 0, ["a: cancelled: nothing of it lives"]),
        ({"a": ("succeeded", None)}, 0, ["a: was over already: succeeded"]),
        (
            {"a": ("cancelled", "unconfirmed"), "b": ("cancelled", "confirmed")},
            1,
            [
                "a: cancelled, but it could not be seen that it ended: something of it may go on",
                "b: cancelled: nothing of it lives",
            ],
        ),
        ({"a": ("cancelled", "unconfirmed"), HOSTILE: (None, None)}, 3, ["a: cancelled, but"]),
    ],
)
def test_cancel_waits_for_the_proof_and_says_it(
    answers: dict[str, tuple[str | None, str | None]], code: int, said: list[str], capsys: Captured
) -> None:
    def cancel(_: Session, params: Any) -> Any:
        status, proof = answers[params["handle"]]
        return {"cancelled": status is not None} | ({} if proof is None else {"cancel": proof})

    def status(_: Session, params: Any) -> Any:
        return {"handle": params["handle"], "status": answers[params["handle"]][0]}

    with FakeDaemon({"tools.cancel": cancel, "tools.status": status}) as daemon:
        assert run(["tools", "cancel", *answers, "--url", daemon.url]) == code
        waits = ["wait_ms" in params for params in daemon.params_of("tools.cancel")]
    captured = capsys.readouterr()
    assert [line[: len(told)] for line, told in zip(captured.out.splitlines(), said, strict=True)] == said
    assert ("unknown handle" in captured.err, "\x1b" in captured.err) == (code == 3, False)
    assert waits == [False] * len(answers) + [True] * len(answers), "all are asked to end before any is waited for"
