"""The command line as a whole: exit codes, one-line errors, starting the daemon, the smaller commands."""

import gc
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from carserver.cli.app import run
from carserver.cli.settings import ConfigError
from carserver.config import Settings
from carserver.core.principals import HOST, Principal, principal_of_token
from carserver.protocol.errors import ErrorKind, RpcError, not_found
from carserver.stores.folder import FolderHeld, StateFolder
from tests.unit.fakedaemon import FakeDaemon, Session, Unanswered

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("state")


def one_line(capsys: Captured) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("carserver: ")
    return lines[0]


# ---------------------------------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["serve", "--port", "x"], "'--port'"),
        (["serve", "--durability", "much"], "'--durability'"),
        (["call"], "Missing argument 'METHOD'"),
        (["call", "m", "{"], "not JSON"),
        (["call", "m", "3"], "object or array"),
        (["call", "m", "--as", "nobody", "--url", "ws://127.0.0.1:1"], "'nobody' is nobody"),
        (["call", "m", "--url", "http://127.0.0.1:1"], "write ws://HOST:PORT"),
        (["call", "m", "--url", "ws://u:secret@127.0.0.1:1"], "user part"),
        (["token", "--host", "--rotate"], "exclude"),
        (["token", "--agent", "bad/id"], "agent id 'bad/id'"),
        (["runs", "trace", "run-1", "--cursor", "3"], "--cursor needs --epoch"),
        (["runs", "record", "--run", "run-1", "--prompt", "x"], "--run names a run that exists"),
        (["runs", "ls", "--status", "over"], "'--status'"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(arguments: list[str], said: str, capsys: Captured) -> None:
    assert run(arguments) == 2
    line = one_line(capsys)
    assert said in line
    assert "secret" not in line


def test_a_configuration_error_is_exit_code_2_in_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("CARSERVER_PROT", "1")
    for arguments in (["serve"], ["runs", "ls"], ["health"], ["token"]):
        assert run(arguments) == 2
        assert "did you mean CARSERVER_PORT" in one_line(capsys)


def test_without_a_daemon_the_exit_code_is_69_and_the_line_says_what_to_do(
    state: StateFolder, capsys: Captured
) -> None:
    for arguments in (["health"], ["runs", "ls"], ["call", "server.ping"]):
        assert run(arguments) == 69
        assert "start one with `carserver serve`" in one_line(capsys)
    state.prepare()
    state.write_endpoint("ws://127.0.0.1:1", 1, "boot")
    for arguments in (["health"], ["runs", "ls"]):
        assert run(arguments) == 69
        assert "is not running" in one_line(capsys)
    for arguments in (["health"], ["runs", "ls"]):
        assert run([*arguments, "--url", "ws://127.0.0.1:1"]) == 69
        assert "connection refused" in one_line(capsys)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ErrorKind.NOT_FOUND, 3),
        (ErrorKind.FORBIDDEN, 77),
        (ErrorKind.AUTH_REQUIRED, 77),
        (ErrorKind.DEADLINE_EXCEEDED, 75),
        (ErrorKind.CONFLICT, 1),
        (ErrorKind.INTERNAL_ERROR, 1),
    ],
)
def test_each_error_of_the_daemon_has_its_exit_code(kind: ErrorKind, code: int, capsys: Captured) -> None:
    def refuse(session: Session, params: Any) -> Any:
        raise RpcError(kind, "no\x1b[31m\nsecond line")

    with FakeDaemon({"m": refuse}) as daemon:
        assert run(["call", "m", "--url", daemon.url]) == code
    assert "\x1b" not in one_line(capsys)


def test_no_answer_is_exit_code_75_and_a_wrong_token_77(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def silence(session: Session, params: Any) -> Any:
        raise Unanswered

    monkeypatch.setenv("CARSERVER_AUTH_TOKEN", "secret-one")
    with FakeDaemon({"m": silence}) as daemon:
        assert run(["call", "m", "--url", daemon.url, "--timeout", "0.05"]) == 75
        assert "was not answered" in one_line(capsys)
    with FakeDaemon(token="another") as daemon:
        assert run(["call", "m", "--url", daemon.url]) == 77
        assert "secret-one" not in one_line(capsys)


def test_a_defect_is_one_line_without_the_exceptions_text(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("with a secret in it")

    monkeypatch.setattr("carserver.cli.health._get", broken)
    with FakeDaemon() as daemon:
        assert run(["health", "--url", daemon.url]) == 1
    line = one_line(capsys)
    assert "ZeroDivisionError" in line
    assert "secret" not in line


def test_ctrl_c_ends_quietly_with_130(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("carserver.cli.health._get", interrupted)
    with FakeDaemon() as daemon:
        assert run(["health", "--url", daemon.url]) == 130
    assert capsys.readouterr().err.strip() == ""


def test_a_reader_that_has_seen_enough_ends_the_command_quietly() -> None:
    with FakeDaemon({"m": lambda _, params: ["x" * 100_000]}) as daemon:
        command = [sys.executable, "-m", "carserver", "call", "m", "--url", daemon.url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        process.stderr.close()
        assert process.wait() == 0


def test_an_output_that_finds_no_room_is_one_line_and_no_defect() -> None:
    with FakeDaemon({"m": lambda _, params: ["x" * 100_000]}) as daemon, open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "carserver", "call", "m", "--url", daemon.url]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "carserver: cannot write: No space left on device; make room, or send the output elsewhere\n"


def test_a_closed_standard_output_is_one_line_and_no_defect() -> None:
    command = [sys.executable, "-m", "carserver", "runs", "ls"]
    ended = subprocess.run(  # a shell closes it: `subprocess` cannot
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "standard output is closed" in ended.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["runs", "--help"], ["serve", "-h"], ["--version"]])
def test_help_is_data_and_exit_code_0(arguments: list[str], capsys: Captured) -> None:
    assert run(arguments) == 0
    assert "carserver" in capsys.readouterr().out


def test_help_names_every_command_and_how_to_complete_them(capsys: Captured) -> None:
    run(["--help"])
    out = capsys.readouterr().out
    for word in ("call", "health", "runs", "serve", "token", "_CARSERVER_COMPLETE=bash_source", "69 unreachable"):
        assert word in out


def test_health_does_not_import_what_only_others_need() -> None:
    program = (
        "import sys; from carserver.cli.app import run; run(['health']); "
        "print(*{'rich', 'websockets', 'asyncio', 'orjson', 'carserver.daemon', 'carserver.client.connection'}"
        " & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# ----------------------------------------------------------------------------------------------------------- serve


@pytest.fixture
def daemon_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """Stands in for the daemon, which the layer below builds: what `serve` gives it, and how it ends."""
    monkeypatch.setattr("carserver.cli.logs.set_up", lambda *_: None)  # the tests' own logging stays as it is
    monkeypatch.setattr("carserver.cli.serve.leave_first_process", lambda: None)  # which the tests may be
    stub = types.SimpleNamespace(given=[], outcome=0, StartError=type("StartError", (Exception,), {}))

    def start(settings: Settings) -> int:
        stub.given.append(settings)
        if isinstance(stub.outcome, Exception):
            raise stub.outcome
        return int(stub.outcome)

    module = types.ModuleType("carserver.daemon")
    module.__dict__.update(run=start, StartError=stub.StartError)
    monkeypatch.setitem(sys.modules, "carserver.daemon", module)
    yield stub
    gc.enable()  # as the daemon does once it is ready: the tests that follow need it


def test_serve_gives_its_flags_to_the_daemon_and_returns_its_exit_code(
    daemon_module: types.SimpleNamespace, tmp_path: Path
) -> None:
    daemon_module.outcome = 5
    flags = ["--port", "0", "--durability", "normal", "--no-auth", "--log-level", "debug", "--host", "::1"]
    lists = ["--allow-host", "a", "--allow-host", "b", "--allow-origin", "https://x", "--methods", "extra"]
    assert run(["serve", *flags, *lists]) == 5
    assert daemon_module.given == [
        Settings(
            host="::1",
            port=0,
            state_dir=str(tmp_path / "state"),
            durability="normal",
            auth=False,
            allow_host=("a", "b"),
            allow_origin=("https://x",),
            methods=("extra",),
            log_level="debug",
        )
    ]


def test_serve_without_flags_leaves_the_environment_its_say(
    daemon_module: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARSERVER_AUTH", "false")
    assert run(["serve"]) == 0
    assert daemon_module.given[0].auth is False


def test_a_daemon_that_cannot_start_is_one_line(daemon_module: types.SimpleNamespace, capsys: Captured) -> None:
    for error, code in [
        (daemon_module.StartError("port 9100 is taken"), 1),
        (FolderHeld("held by process 7"), 1),
        (ConfigError("no such module"), 2),
    ]:
        daemon_module.outcome = error
        assert run(["serve"]) == code
        assert str(error) in one_line(capsys)


# -------------------------------------------------------------------------------------------- call, token, health


def test_call_prints_the_result_as_it_came(capsys: Captured) -> None:
    def answer(session: Session, params: Any) -> Any:
        session.notify("something.else", {})
        session.send('{"jsonrpc":"2.0","id":1,"result":{"n":1.0,"big":36893488147419103232,"t":"\\u001b\u202e"}}')
        raise Unanswered

    with FakeDaemon({"m": answer}) as daemon:
        assert run(["call", "m", '{"a": 1.50}', "--url", daemon.url]) == 0
    assert capsys.readouterr().out == '{"n":1.0,"big":36893488147419103232,"t":"\\u001b\\u202e"}\n'
    assert daemon.calls == [("m", {"a": 1.5})]


def test_call_reads_params_from_standard_input() -> None:
    with FakeDaemon({"m": lambda _, params: params}) as daemon:
        command = [sys.executable, "-m", "carserver", "call", "m", "-", "--url", daemon.url]
        done = subprocess.run(command, input='["ü"]', capture_output=True, text=True, check=True)
    assert done.stdout == '["ü"]\n'


def test_call_acts_as_client_unless_told_otherwise(state: StateFolder) -> None:
    secrets = state.secrets(Settings())
    with FakeDaemon({"m": 1}) as daemon:
        for who in ([], ["--as", "host"], ["--as", "agent:a b"]):
            assert run(["call", "m", "--url", daemon.url, *who]) == 0
        tokens = [(session.authorization or "").removeprefix("Bearer ") for session in daemon.sessions]
    assert tokens[:2] == [secrets.auth_token, secrets.host_token]
    assert principal_of_token(secrets, tokens[2]) == Principal("agent", "a b")


def test_the_running_daemon_is_found_by_its_folder(state: StateFolder) -> None:
    with FakeDaemon({"m": 1}) as daemon, state:
        state.write_endpoint(daemon.url, 1, "boot")
        assert run(["call", "m"]) == 0
        assert run(["health"]) == 0


def test_token_prints_each_of_the_tokens_and_makes_them_if_need_be(state: StateFolder, capsys: Captured) -> None:
    printed = []
    for arguments in ([], ["--host"], ["--agent", "a1"]):
        assert run(["token", *arguments]) == 0
        printed.append(capsys.readouterr().out.strip())
    secrets = state.secrets(Settings())
    assert printed[0] == secrets.auth_token
    assert principal_of_token(secrets, printed[1]) == HOST
    assert principal_of_token(secrets, printed[2]) == Principal("agent", "a1")


def test_token_env_sets_up_a_shell(state: StateFolder, capsys: Captured) -> None:
    assert run(["token", "--env"]) == 0
    secrets = state.secrets(Settings())
    assert capsys.readouterr().out.splitlines() == [
        f"export CAR_AUTH_TOKEN={secrets.auth_token}",
        "export CAR_DAEMON_URL=ws://127.0.0.1:9100",
    ]
    with state:
        state.write_endpoint("ws://127.0.0.1:4711", 1, "boot")
        assert run(["token", "--env", "--agent", "a b"]) == 0
    out = capsys.readouterr().out
    assert "export CAR_AUTH_TOKEN='a b." in out
    assert "export CAR_DAEMON_URL=ws://127.0.0.1:4711" in out


def test_token_rotate_is_refused_while_a_daemon_runs(state: StateFolder, capsys: Captured) -> None:
    before = state.secrets(Settings())
    with state:
        assert run(["token", "--rotate"]) == 1
    assert "is held by" in one_line(capsys)
    assert run(["token", "--rotate"]) == 0
    assert state.secrets(Settings()).auth_token != before.auth_token


def test_health_says_what_is_wrong(capsys: Captured) -> None:
    with FakeDaemon() as daemon:
        assert run(["health", "--url", daemon.url]) == 0
        assert capsys.readouterr().out == "ok\n"
        daemon.pages["/readyz"] = (503, "not ready: storage: disk\x1b full\n")  # as the daemon says it
        assert run(["health", "--url", daemon.url]) == 1
        assert capsys.readouterr().out == "not ready: storage: disk\\x1b full\n"
        daemon.pages["/healthz"] = (500, "")
        assert run(["health", "--url", daemon.url]) == 1
        assert capsys.readouterr().out.startswith("not healthy")


def test_an_unknown_run_is_exit_code_3(capsys: Captured) -> None:
    def unknown(session: Session, params: Any) -> Any:
        raise not_found("run", params["run_id"])

    with FakeDaemon({"runs.get": unknown, "runs.cancel": unknown, "runs.trace.subscribe": unknown}) as daemon:
        for command in ("get", "cancel", "trace"):
            assert run(["runs", command, "run-x", "--url", daemon.url]) == 3
            assert "unknown run 'run-x'" in one_line(capsys)
