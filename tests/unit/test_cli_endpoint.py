"""Which daemon a command means, and which token it may have."""

from pathlib import Path

import pytest

from carserver.cli.endpoint import Daemon
from carserver.cli.errors import CommandError, ExitCode
from carserver.config import Settings
from carserver.core.principals import Secrets
from carserver.stores.folder import StateFolder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateFolder:
    """The default folder, where it is when nobody names one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return StateFolder(tmp_path / "carserver")


@pytest.fixture
def secrets(folder: StateFolder) -> Secrets:
    return folder.secrets(Settings())


def test_the_address_is_the_flag_then_the_variables_then_the_folders(folder: StateFolder) -> None:
    environ = {"CARSERVER_URL": "ws://b:1", "CAR_DAEMON_URL": "ws://c:1"}
    assert Daemon(None, "ws://a:1", environ).url() == "ws://a:1"
    assert Daemon(None, None, environ).url() == "ws://b:1"
    assert Daemon(None, None, {"CAR_DAEMON_URL": "ws://c:1"}).url() == "ws://c:1"
    with folder:
        folder.write_endpoint("ws://d:1", 1, "boot")
        assert Daemon(None, None, {}).url() == "ws://d:1"


def test_an_endpoint_that_no_daemon_stands_behind_gets_no_token(folder: StateFolder) -> None:
    folder.prepare()
    folder.write_endpoint("ws://127.0.0.1:9100", 1, "boot")
    with pytest.raises(CommandError) as caught:
        Daemon(None, None, {}).url()
    assert caught.value.code is ExitCode.UNREACHABLE


def test_a_variables_token_wins_over_the_folders(secrets: Secrets) -> None:
    daemon = Daemon(
        None, None, {"CARSERVER_AUTH_TOKEN": "one", "CAR_AUTH_TOKEN": "two", "CARSERVER_HOST_TOKEN": "three"}
    )
    assert (daemon.token("client"), daemon.token("host")) == ("one", "three")
    daemon = Daemon(None, None, {"CAR_AUTH_TOKEN": "two"})
    assert (daemon.token("client"), daemon.token("host")) == ("two", secrets.host_token)


def test_a_blank_variable_is_a_mistake_that_is_named() -> None:
    with pytest.raises(CommandError, match="auth_token is blank") as caught:
        Daemon(None, None, {"CARSERVER_AUTH_TOKEN": " "}).token("client")
    assert caught.value.code is ExitCode.USAGE


def test_the_folders_tokens_are_not_sent_to_a_distant_address_unless_the_folder_was_named(
    folder: StateFolder, secrets: Secrets
) -> None:
    for url in ("ws://elsewhere.example:9100", "wss://10.0.0.1"):
        for who in ("client", "host", "agent:a"):
            assert Daemon(None, url, {}).token(who) is None
        assert Daemon(str(folder.path), url, {}).token("host") == secrets.host_token
        assert Daemon(None, url, {"CARSERVER_STATE_DIR": str(folder.path)}).token("host") == secrets.host_token
    assert Daemon(None, "ws://localhost:1", {}).token("host") == secrets.host_token
    assert Daemon(None, "ws://[::1]:1", {}).token("client") == secrets.auth_token


def test_an_agents_own_token_must_be_of_that_agent(secrets: Secrets) -> None:
    environ = {"CARSERVER_AGENT_TOKEN": "a.b.mac"}
    assert Daemon(None, None, environ).token("agent:a.b") == "a.b.mac"
    with pytest.raises(CommandError, match="not a token of agent 'a'") as caught:
        Daemon(None, None, environ).token("agent:a")
    assert "a.b.mac" not in str(caught.value)


def test_without_a_folder_there_is_no_token_and_none_is_made(folder: StateFolder) -> None:
    for who in ("client", "host", "agent:a"):
        assert Daemon(None, "ws://127.0.0.1:1", {}).token(who) is None
    assert not folder.path.exists()


def test_a_looker_without_the_host_token_looks_as_client_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Daemon(None, "ws://elsewhere:1", {"CARSERVER_AUTH_TOKEN": "one"}).looker()
    assert "only the runs of the auth token" in capsys.readouterr().err
