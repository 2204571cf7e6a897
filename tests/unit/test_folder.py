"""The state folder: permissions, secrets, the lock, the endpoint."""

import fcntl
import os
import re
import stat
import threading
from pathlib import Path

import pytest

from carserver.client.finding import is_held
from carserver.config import Settings
from carserver.core.principals import Secrets
from carserver.stores.folder import FolderError, FolderHeld, SecretSettingError, StateFolder, default_state_dir


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / "state")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_missing_folder_and_its_parents_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    StateFolder(tmp_path / "a" / "b").prepare()
    assert [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")] == [0o700, 0o700]


def test_a_folder_that_others_may_look_into_is_refused_and_the_message_has_the_cure(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    with pytest.raises(FolderError, match=f"chmod 700 {tmp_path}"):
        StateFolder(tmp_path).prepare()


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_folders_place_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="not a directory"):
        StateFolder(tmp_path / "file" / below).prepare()


def test_secrets_are_made_once_for_their_owner_alone_and_read_again(folder: StateFolder) -> None:
    made = folder.secrets(Settings())
    assert StateFolder(folder.path).secrets(Settings()) == made
    assert len({made.auth_token, made.host_token, made.agent_key}) == 3
    for name in ("auth-token", "host-token", "agent-key"):
        assert re.fullmatch(r"[0-9a-f]{64}\n", (folder.path / name).read_text())
        assert mode(folder.path / name) == 0o600
    assert len(list(folder.path.iterdir())) == 3, "nothing temporary is left"


def test_processes_that_make_the_secrets_at_the_same_time_agree(tmp_path: Path) -> None:
    for attempt in range(20):
        results = _made_at_the_same_time(tmp_path / str(attempt))
        assert len(results) == 8
        assert all(result == results[0] for result in results)


def _made_at_the_same_time(path: Path) -> list[Secrets]:
    barrier = threading.Barrier(8)
    results: list[Secrets] = []

    def one() -> None:
        barrier.wait()
        results.append(StateFolder(path).secrets(Settings()))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_secret_that_others_may_read_is_refused_and_the_message_has_the_cure(folder: StateFolder) -> None:
    secret = folder.secrets(Settings()).host_token
    (folder.path / "host-token").chmod(0o640)
    with pytest.raises(FolderError, match=f"chmod 600 {folder.path}/host-token") as caught:
        folder.secrets(Settings())
    assert secret not in str(caught.value)


@pytest.mark.parametrize("content", ["", "  \n", "two words\n", "a\x1bb", "caf\u00e9"])
def test_a_blank_or_damaged_secret_is_refused_and_never_shown(folder: StateFolder, content: str) -> None:
    folder.prepare()
    file = folder.path / "auth-token"
    file.write_text(content, encoding="utf-8")
    file.chmod(0o600)
    with pytest.raises(FolderError, match="auth-token") as caught:
        folder.secrets(Settings())
    assert not content.strip() or content.strip() not in str(caught.value)


def test_a_secret_that_is_a_link_or_a_pipe_is_refused(folder: StateFolder, tmp_path: Path) -> None:
    folder.prepare()
    (tmp_path / "elsewhere").write_text("x" * 64)
    (folder.path / "auth-token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FolderError, match="cannot read"):
        folder.read_secret("auth-token")
    os.mkfifo(folder.path / "host-token", 0o600)
    with pytest.raises(FolderError, match="not a regular file"):
        folder.read_secret("host-token")


def test_settings_override_the_folders_tokens(folder: StateFolder, tmp_path: Path) -> None:
    (tmp_path / "mounted").write_text("from-a-file\n")  # as containers mount secrets: readable to all
    (tmp_path / "mounted").chmod(0o644)
    secrets = folder.secrets(Settings(auth_token=" given ", host_token_file=str(tmp_path / "mounted")))
    assert (secrets.auth_token, secrets.host_token) == ("given", "from-a-file")
    assert [file.name for file in folder.path.iterdir()] == ["agent-key"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (Settings(auth_token="  "), "auth_token is blank"),
        (Settings(host_token=""), "host_token is blank"),
        (Settings(auth_token_file=" "), "auth_token_file is blank"),
        (Settings(auth_token_file="/nowhere/at-all"), "auth_token_file: cannot read /nowhere/at-all"),
        (Settings(host_token_file="/dev/null"), r"host_token_file \(/dev/null\) is blank"),
        (Settings(auth_token="one", auth_token_file="/x"), "auth_token and auth_token_file are both set"),
        (Settings(auth_token="two words"), "auth_token has spaces"),
    ],
)
def test_an_override_that_cannot_be_used_is_refused_by_its_settings_name(
    folder: StateFolder, settings: Settings, named: str
) -> None:
    with pytest.raises(SecretSettingError, match=named) as caught:
        folder.secrets(settings)
    assert "two words" not in str(caught.value)


def test_one_token_for_both_client_and_host_is_refused(folder: StateFolder) -> None:
    with pytest.raises(FolderError, match="the same") as caught:
        folder.secrets(Settings(auth_token="equal-one", host_token="equal-one"))
    assert "equal-one" not in str(caught.value)


def test_the_second_to_lock_is_told_who_holds_the_folder(folder: StateFolder) -> None:
    with folder:
        folder.write_endpoint("ws://127.0.0.1:9100", os.getpid(), "boot")
        with pytest.raises(FolderHeld, match=rf"{folder.path} is held by process {os.getpid()} at ws://127.0.0.1:9100"):
            StateFolder(folder.path).lock()


def test_an_endpoint_left_by_another_process_is_not_taken_for_the_holders(folder: StateFolder) -> None:
    with folder:
        folder.write_endpoint("ws://old:1", 1, "boot")
        with pytest.raises(FolderHeld) as caught:
            StateFolder(folder.path).lock()
    assert "ws://old:1" not in str(caught.value)


def test_the_lock_ends_with_unlock_and_is_not_inherited_by_programs(folder: StateFolder) -> None:
    folder.lock()
    folder.lock()  # again is harmless
    assert folder._lock_fd is not None
    assert not os.get_inheritable(folder._lock_fd)
    folder.unlock()
    folder.unlock()
    with StateFolder(folder.path):
        pass


def test_whether_a_folder_is_held_can_be_asked_without_touching_it(folder: StateFolder) -> None:
    assert not is_held(folder.path)
    assert not folder.path.exists()
    with folder:
        assert is_held(folder.path)
    assert not is_held(folder.path)
    with (folder.path / "lock").open() as probe:
        fcntl.flock(probe, fcntl.LOCK_SH)
        assert not is_held(folder.path), "two that only look do not see each other"


def test_a_start_is_not_refused_because_somebody_looked_just_then(
    folder: StateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.prepare()
    with (folder.path / "lock").open("w") as probe:
        fcntl.flock(probe, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda _: fcntl.flock(probe, fcntl.LOCK_UN))
        folder.lock()
    assert is_held(folder.path)
    folder.unlock()


def test_rotation_makes_all_secrets_anew(folder: StateFolder) -> None:
    before = folder.secrets(Settings())
    folder.rotate()
    after = folder.secrets(Settings())
    assert before.auth_token != after.auth_token
    assert before.host_token != after.host_token
    assert before.agent_key != after.agent_key
    assert mode(folder.path / "agent-key") == 0o600
    assert not is_held(folder.path)


def test_rotation_is_refused_while_a_daemon_holds_the_folder(folder: StateFolder) -> None:
    before = folder.secrets(Settings())
    with folder:
        for one in (folder, StateFolder(folder.path)):
            with pytest.raises(FolderHeld):
                one.rotate()
    assert folder.secrets(Settings()) == before


def test_the_endpoint_is_written_read_and_removed(folder: StateFolder) -> None:
    folder.prepare()
    folder.write_endpoint("ws://127.0.0.1:1", 7, "boot")
    endpoint = folder.read_endpoint()
    assert endpoint is not None
    assert (endpoint.url, endpoint.pid, endpoint.boot_id) == ("ws://127.0.0.1:1", 7, "boot")
    assert mode(folder.path / "endpoint.json") == 0o600
    folder.remove_endpoint()
    folder.remove_endpoint()
    assert folder.read_endpoint() is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b'{"url": 1, "pid": 1, "boot_id": "x"}', b"[" * 9999]
)
def test_an_endpoint_that_is_garbage_counts_as_none(folder: StateFolder, content: bytes) -> None:
    folder.prepare()
    (folder.path / "endpoint.json").write_bytes(content)
    assert folder.read_endpoint() is None


def test_the_default_folder_follows_xdg_and_ignores_a_relative_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert default_state_dir() == Path("/var/state/carserver")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert default_state_dir() == Path("/home/someone/.local/state/carserver")
