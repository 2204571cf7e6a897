"""Where the client finds the daemon and its token, and what it says where it does not."""

import os
import secrets as random
from pathlib import Path

import pytest

from carserver.client.errors import FolderUnusable, Misconfigured, Unreachable
from carserver.client.finding import Target, Where
from carserver.config import Settings
from carserver.core.principals import Secrets, agent_token
from carserver.stores.folder import StateFolder

NOWHERE = "ws://127.0.0.1:1"
FAR = "wss://elsewhere.example"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateFolder:
    """The default folder, where it is when nobody names one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return StateFolder(tmp_path / "carserver")


@pytest.fixture
def secrets(folder: StateFolder) -> Secrets:
    return folder.secrets(Settings())


def test_the_address_is_the_argument_then_the_environments_then_the_folders(folder: StateFolder) -> None:
    environ = {"CARSERVER_URL": "ws://b:1", "CAR_DAEMON_URL": "ws://c:1"}
    assert Where("ws://a:1", environ=environ)().url == "ws://a:1"
    assert Where(environ=environ)().url == "ws://b:1"
    assert Where(environ={"CAR_DAEMON_URL": "ws://c:1"})().url == "ws://c:1"
    with folder:
        folder.write_endpoint("ws://d:1", 1, "boot")
        where = Where(environ={})
        assert where().url == "ws://d:1"
        folder.write_endpoint("ws://e:1", 1, "boot")
        assert where().url == "ws://e:1", "it is read again each time"
    with StateFolder(folder.path.with_name("other")) as other:
        other.write_endpoint("ws://f:1", 1, "boot")
        assert Where(state_dir=other.path, environ={})().url == "ws://f:1"
        assert Where(environ={"CARSERVER_STATE_DIR": str(other.path)})().url == "ws://f:1"


def test_a_token_is_the_argument_then_the_environments_then_the_folders(
    folder: StateFolder, secrets: Secrets, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("in-a-file\n")

    def token(environ: dict[str, str], **arguments: str) -> str | None:
        return Where(NOWHERE, environ=environ, **arguments)().token

    environ = {"CARSERVER_AUTH_TOKEN": "auth", "CAR_AUTH_TOKEN": "car", "CARSERVER_HOST_TOKEN": "host"}
    assert token(environ, token="mine") == "mine"
    assert token(environ, host_token="the-hosts") == "the-hosts"
    assert token(environ) == "auth"
    assert token({**environ, "CARSERVER_AGENT_TOKEN": "a.mac"}) == "a.mac"
    assert token({"CARSERVER_AUTH_TOKEN_FILE": str(file), "CAR_AUTH_TOKEN": "car"}) == "in-a-file"
    assert token({"CAR_AUTH_TOKEN": "car"}) == "car"
    assert token({}) == secrets.auth_token
    assert token({}, agent_id="coder") == agent_token(secrets.agent_key, "coder")
    (folder.path / "carserver.toml").write_text('auth_token = "configured"\nport = 0\n')
    assert token({}) == "configured"
    assert Where(FAR, environ={"CARSERVER_HOST_TOKEN": "host"})().token == "host", "for want of another"


def test_the_folders_tokens_are_not_sent_to_a_distant_address_unless_the_folder_was_named(
    folder: StateFolder, secrets: Secrets
) -> None:
    for agent_id in (None, "coder"):
        for url in ("ws://elsewhere.example:9100", FAR, "wss://10.0.0.1"):
            assert Where(url, agent_id=agent_id, environ={})().token is None
            assert Where(agent_id=agent_id, environ={"CARSERVER_URL": url})().token is None
            assert Where(url, agent_id=agent_id, state_dir=folder.path, environ={})().token is not None
    assert Where("ws://[::1]:1", environ={})().token == secrets.auth_token


def test_a_daemon_that_is_not_there_is_told_with_its_folder(folder: StateFolder) -> None:
    with pytest.raises(Unreachable, match=rf"no daemon found in {folder.path}: start one with `carserver serve`"):
        Where(environ={})()
    folder.prepare()
    (folder.path / "endpoint.json").write_text("{")
    with pytest.raises(Unreachable, match="no daemon found"):
        Where(environ={})()


def test_an_endpoint_that_no_daemon_stands_behind_gets_no_token(folder: StateFolder) -> None:
    folder.prepare()
    folder.write_endpoint("ws://127.0.0.1:9100", 1, "boot")
    with pytest.raises(Unreachable, match=rf"the daemon of {folder.path} is not running"):
        Where(environ={})()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_folder_of_another_user_is_told_of(folder: StateFolder, secrets: Secrets) -> None:
    os.chown(folder.path / "auth-token", 4711, -1)
    with pytest.raises(FolderUnusable, match="auth-token belongs to user 4711, not to 0: name your own folder"):
        Where(NOWHERE, environ={})()


@pytest.mark.parametrize("content", ["", "two words"])
def test_a_folders_token_that_is_none_is_told_of(folder: StateFolder, secrets: Secrets, content: str) -> None:
    (folder.path / "auth-token").write_text(content)
    with pytest.raises(FolderUnusable, match=r"auth-token (is blank|has spaces)"):
        Where(NOWHERE, environ={})()


def test_a_folders_token_that_others_may_read_or_that_is_no_file_is_told_of(
    folder: StateFolder, secrets: Secrets
) -> None:
    token = folder.path / "auth-token"
    token.chmod(0o644)
    with pytest.raises(FolderUnusable, match=rf"is open to other users \(mode 0644\): chmod 600 {token}"):
        Where(NOWHERE, environ={})()
    token.unlink()
    os.mkfifo(token, 0o600)
    with pytest.raises(FolderUnusable, match="is not a regular file"):
        Where(NOWHERE, environ={})()
    token.unlink()
    token.symlink_to(folder.path / "host-token")
    with pytest.raises(FolderUnusable, match="cannot read"):
        Where(NOWHERE, environ={})()


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        ({"url": "http://a:1"}, {}, "'http://a:1' is no address of a daemon: write ws://HOST:PORT"),
        ({"url": "ws://a:99999"}, {}, "is no address"),
        ({"url": "ws://x:y@a:1"}, {}, "user part"),
        ({"url": "ws://x:y@a:99999"}, {}, "user part"),
        ({"url": "ws://x:y@[a"}, {}, "user part"),
        ({}, {"CARSERVER_URL": "ws://"}, "is no address"),
        ({"token": "a", "host_token": "b"}, {}, "token and host_token are both given"),
        ({"host_token": "b", "agent_id": "c"}, {}, "the host is no agent"),
        ({"token": " "}, {}, "token is blank"),
        ({"token": "two words"}, {}, "token has spaces"),
        ({"token": f"one.{'0' * 64}", "agent_id": "two"}, {}, "token is not a token of agent 'two'"),
        ({"agent_id": "two"}, {"CARSERVER_AGENT_TOKEN": "one.mac"}, "CARSERVER_AGENT_TOKEN is not a token of agent"),
        ({"agent_id": "a/b"}, {}, "agent id 'a/b' must be"),
        ({}, {"CARSERVER_AUTH_TOKEN": " "}, "auth_token is blank"),
        ({}, {"CARSERVER_AUTH_TOKEN": "a", "CARSERVER_AUTH_TOKEN_FILE": "/f"}, "are both set"),
        ({}, {"CARSERVER_AUTH_TOKEN_FILE": "/not/there"}, "cannot read /not/there: no such file"),
        ({}, {"CARSERVER_AUTH_TOKEN_FILE": " "}, "auth_token_file is blank"),
    ],
)
def test_what_was_given_and_cannot_be_used_is_named_and_no_token_shown(
    folder: StateFolder, secrets: Secrets, arguments: dict[str, str], environ: dict[str, str], said: str
) -> None:
    with pytest.raises(Misconfigured, match=said) as caught:
        Where(**{"url": None if "CARSERVER_URL" in environ else NOWHERE, **arguments}, environ=environ)()
    assert "0" * 64 not in str(caught.value)


def test_an_agents_token_of_that_agent_and_an_auth_token_beside_an_agent_are_taken() -> None:
    mac = random.token_hex(32)
    assert Where(NOWHERE, token=f"a.b.{mac}", agent_id="a.b", environ={})().token == f"a.b.{mac}"
    assert Where(NOWHERE, token=mac, agent_id="a.b", environ={})().token == mac


def test_a_target_does_not_show_its_token() -> None:
    assert "s3cret" not in f"{Target('ws://a:1', 's3cret')!r} {Target('ws://a:1', 's3cret')}"
