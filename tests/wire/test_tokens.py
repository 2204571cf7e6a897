"""Token files, agent tokens, rotation, and no token in any log (contract, section 5)."""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus

from carserver.core.principals import agent_token
from carserver.stores.folder import SECRET_NAMES
from tests.conftest import StartDaemon
from tests.daemon import Daemon, NotStarted, running
from tests.peer import Refused, peer
from tests.rawpeer import raw_peer, raw_socket, request

ROOT = Path(__file__).parent.parent.parent
SECRET = re.compile(r"[0-9a-f]{64}")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("tokens") / "state") as daemon:
        yield daemon


def start_command(state: Path, *args: str) -> subprocess.Popen[str]:
    """`python -m carserver token …`, started."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CARSERVER", "CAR_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "carserver", "token", "--state-dir", str(state), *args],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(state: Path, *args: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    process = start_command(state, *args)
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


def secrets(daemon: Daemon) -> dict[str, str]:
    """What the files of the state folder hold."""
    return {name: daemon.token(name) for name in SECRET_NAMES}


async def may_enter(daemon: Daemon, token: str) -> bool:
    """Whether a bearer token opens a connection."""
    try:
        async with peer(daemon, token) as client:
            return bool(await client.call("server.ping"))
    except InvalidStatus as error:
        if error.response.status_code != 401:
            raise
        return False


# Files.


def test_the_folder_and_its_secrets_are_for_their_owner_alone_whatever_the_umask(start: StartDaemon) -> None:
    old = os.umask(0)
    try:
        daemon = start()
    finally:
        os.umask(old)
    assert stat.S_IMODE(daemon.state.stat().st_mode) == 0o700
    for name in SECRET_NAMES:
        found = (daemon.state / name).stat()
        assert (stat.S_IMODE(found.st_mode), found.st_nlink) == (0o600, 1)
        assert SECRET.fullmatch(daemon.token(name))  # 32 bytes
    assert len(set(secrets(daemon).values())) == 3
    for path in daemon.state.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert not [path for path in daemon.state.iterdir() if path.name.startswith(".")]  # nothing half made


def test_a_folder_that_is_not_there_yet_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    state = tmp_path / "a" / "b"
    code, out, _ = command(state)
    assert (code, SECRET.fullmatch(out.strip()) is not None) == (0, True)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_those_who_make_the_secrets_at_once_agree_on_them(tmp_path: Path) -> None:
    state = tmp_path / "state"
    processes = [start_command(state, "--host") for _ in range(6)]
    said = [process.communicate(timeout=20)[0] for process in processes]
    assert len(set(said)) == 1
    assert said[0].strip() == (state / "host-token").read_text().strip()


@pytest.mark.parametrize("name", SECRET_NAMES)
@pytest.mark.parametrize("content", ["", "\n", "  \n", "two words\n"])
def test_a_blank_or_damaged_secret_refuses_to_start_and_is_not_replaced(
    name: str, content: str, start: StartDaemon, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (state / name).touch(0o600)
    (state / name).write_text(content)
    with pytest.raises(NotStarted) as error:
        start()
    assert "exit 1:" in str(error.value)
    assert str(state / name) in str(error.value)
    assert (state / name).read_text() == content


@pytest.mark.parametrize(
    ("name", "mode"), [("auth-token", 0o640), ("host-token", 0o604), ("agent-key", 0o660), ("", 0o755), ("", 0o710)]
)
def test_a_secret_or_folder_that_others_may_look_into_refuses_to_start(
    name: str, mode: int, start: StartDaemon, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    assert command(state)[0] == 0
    held = {(state / each).read_text().strip() for each in SECRET_NAMES}
    (state / name).chmod(mode)
    with pytest.raises(NotStarted) as error:
        start()
    assert "exit 1:" in str(error.value)
    assert f"{mode:04o}" in str(error.value)
    assert not any(secret in str(error.value) for secret in held)


def test_a_secret_that_is_a_link_refuses_to_start(start: StartDaemon, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert command(state)[0] == 0
    (state / "auth-token").rename(tmp_path / "elsewhere")
    (state / "auth-token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotStarted):
        start()


async def test_tokens_of_the_configuration_stand_for_the_files(start: StartDaemon, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("host-from-a-file\n")
    daemon = start(auth_token="auth-from-the-environment", host_token_file=str(file))
    async with peer(daemon, "auth-from-the-environment") as client, peer(daemon, "host-from-a-file") as host:
        assert (await host.call("runs.get", {"run_id": (await client.create())["id"]}))["id"]
    assert not (daemon.state / "auth-token").exists()
    assert not (daemon.state / "host-token").exists()


@pytest.mark.parametrize("settings", [{"auth_token": " "}, {"auth_token": ""}, {"host_token_file": "/dev/null"}])
def test_a_blank_token_of_the_configuration_refuses_to_start(settings: dict[str, str], start: StartDaemon) -> None:
    with pytest.raises(NotStarted) as error:
        start(**settings)
    assert "exit 2:" in str(error.value)
    assert "blank" in str(error.value)


# Agents.


@pytest.mark.parametrize("agent_id", ["a", "7", "a.b", "A b:c@d-e_f", " a ", "x" * 128, "a.", "."])
async def test_an_agents_token_is_printed_and_makes_its_bearer_that_agent(agent_id: str, shared: Daemon) -> None:
    code, out, err = command(shared.state, f"--agent={agent_id}")
    token = out.removesuffix("\n")
    assert (code, err) == (0, "")
    assert token == agent_token(shared.token("agent-key"), agent_id)
    assert token.startswith(f"{agent_id}.")
    async with peer(shared, None) as client:
        answer = await client.call("session.auth", {"token": token})
        assert (answer["role"], answer["agent_id"]) == ("agent", agent_id)


@pytest.mark.parametrize("agent_id", ["", "é", "a/b", "a\nb", "x" * 129, "a*"])
def test_what_is_no_agent_id_gets_no_token(agent_id: str, shared: Daemon) -> None:
    code, out, err = command(shared.state, f"--agent={agent_id}")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1


# Rotation.


async def test_rotation_is_refused_while_the_daemon_runs_and_makes_all_tokens_anew_when_it_does_not(
    start: StartDaemon,
) -> None:
    daemon = start(wrong_token_s=0.01)
    old = secrets(daemon)
    code, out, err = command(daemon.state, "--rotate")
    assert (code, out) == (1, "")
    assert f"held by process {daemon.pid}" in err
    assert secrets(daemon) == old
    assert daemon.terminate() == 0

    code, out, err = command(daemon.state, "--rotate")
    assert (code, out) == (0, "")
    new = secrets(daemon)
    assert not set(new.values()) & set(old.values())
    for secret in (*old.values(), *new.values()):
        assert secret not in err
    for name in SECRET_NAMES:
        assert stat.S_IMODE((daemon.state / name).stat().st_mode) == 0o600

    daemon.start()
    for which, enters in ((old, False), (new, True)):
        for token in (which["auth-token"], which["host-token"], agent_token(which["agent-key"], "a")):
            assert await may_enter(daemon, token) is enters
    async with peer(daemon, None) as client:
        for params in ({"token": old["auth-token"]}, {"host_token": old["host-token"]}):
            with pytest.raises(Refused) as error:
                await client.call("session.auth", params)
            assert error.value.type == "auth_failed"


# Logs.


async def test_no_token_is_in_any_log_at_any_level(start: StartDaemon) -> None:
    daemon = start("--log-level", "debug", wrong_token_s=0.01, auth_s=3.0)
    assert daemon.process is not None
    assert daemon.process.stdout is not None
    stdout = os.dup(daemon.process.stdout.fileno())
    good = {**secrets(daemon), "agent": agent_token(daemon.token("agent-key"), "an agent")}
    wrong = "w" * 20 + "rong-token"
    async with peer(daemon, None) as late:
        await authenticate_in_every_way(daemon, good, wrong)
        for secret in (*good.values(), wrong):
            for data in hostile_requests(secret):
                async with raw_socket(daemon) as client:
                    client.send(data)
                    await client.rest()
        assert (await late.closed())[0] == 1008
    assert daemon.terminate() == 0
    with os.fdopen(stdout) as file:
        printed = file.read() + daemon.log
    # It was a log of all that, and not silence.
    for words in ("handshake refused", "closing: authentication required", "not authenticated within", "draining"):
        assert words in printed
    assert re.search(r"token mismatch|wrong token|Authorization is not", printed)
    mac = good["agent"].rpartition(".")[2]
    for secret in (*good.values(), mac, wrong):
        assert secret not in printed
        assert secret[:16] not in printed


async def authenticate_in_every_way(daemon: Daemon, good: dict[str, str], wrong: str) -> None:
    """By the upgrade and by `session.auth`, rightly and wrongly, once and again, and not at all."""
    tokens = [good["auth-token"], good["host-token"], good["agent"]]
    params = [{"token": tokens[0]}, {"host_token": tokens[1]}, {"token": tokens[2], "agent_id": "an agent"}]
    bad = [
        {"token": wrong},
        {"host_token": wrong},
        {"token": tokens[2], "agent_id": "another"},
        {"host_token": tokens[0]},
    ]
    bad += [{"token": good["agent-key"]}, {"token": tokens[0], "host_token": tokens[1]}]
    for token in tokens:
        async with peer(daemon, token) as client:
            for again in (*params, *bad):
                with_error = await client.request({"method": "session.auth", "params": again})
                assert "error" in with_error or with_error["result"]["ok"]
            # A token where none belongs.
            for method in ("server.ping", token, "runs.get"):
                await client.request({"method": method, "params": {"run_id": token, "token": token}})
            await client.raw(json.dumps({"jsonrpc": "1", "id": token * 3, "method": token}))
            await client.raw(f'{{"token":"{token}"')
    for token in (wrong, good["agent-key"]):
        assert not await may_enter(daemon, token)
    for right in params:
        async with peer(daemon, None) as client:
            for each in (*bad, right):
                await client.request({"method": "session.auth", "params": each})
    async with raw_peer(daemon, None) as raw:
        raw.send_call(1, "server.ping", {"token": tokens[0]})
        assert (await raw.close_frame()).code == 1008


def hostile_requests(secret: str) -> list[bytes]:
    """Requests that are refused, with a secret in many places."""
    bearer = f"Authorization: Bearer {secret}"
    return [
        request(headers=(bearer, bearer)),
        request(headers=(f"Authorization: Basic {secret}",)),
        request(headers=(f"Authorization: {secret}",)),
        request(headers=(bearer, "Origin: https://evil.example")),
        request(host="evil.example", headers=(bearer,)),
        request(f"/?token={secret}", host="evil.example"),
        request(f"/{secret}", headers=("Origin: https://evil.example",)),
        request(headers=(bearer, "x" * 9_000)),
        request(headers=(bearer,)).replace(b"GET", b"POST"),
        request(headers=(bearer,)).replace(b"HTTP/1.1", b"HTTP/2.0"),
        request(headers=(bearer,)).replace(b"Upgrade: websocket", b"Upgrade: h2c"),
        f"{secret}\r\n\r\n".encode(),
        f"GET {secret} HTTP/1.1\r\n{bearer}\r\n\r\n".encode(),
    ]
