"""The real client of the CAR dialect, unmodified, opens a connection, with the tokens that there are, and keeps one."""

import asyncio
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from carserver.core.principals import agent_token
from tests.carclient import OLD, CarError, car_client, needs_car, needs_old_car
from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.fault.cutting import cutting
from tests.peer import peer

TOKEN_FILE = ".config/ai.parslee.car/auth-token"  # in its home
THREADS, CALLS = 4, 20


def printed_token(daemon: Daemon, agent_id: str) -> str:
    """What a user gets who asks for an agent's token."""
    command = [sys.executable, "-m", "carserver", "token", "--agent", agent_id, "--state-dir", str(daemon.state)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@needs_car
async def test_the_real_client_connects_and_learns_what_there_is_and_what_there_is_not(served: Daemon) -> None:
    async with car_client(served) as car, peer(served) as other:
        assert await car.call("connection_epoch") == 1
        await other.call("server.handshake", {"protocol_version": 3})
        schema = await car.call("server_schema")
        assert schema == await other.call("server.schema")
        shown = json.dumps(schema["schema"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert schema["digest"] == hashlib.sha256(shown.encode()).hexdigest()
        listed = await car.call("capabilities_list", {})
        assert listed == await other.call("capabilities.list")
        names = {entry["method"] for entry in listed["methods"]}
        assert {method["name"] for method in schema["schema"]["x-car"]} <= names
        for unknown in ("runs.strat", "agents.register_basics"):
            with pytest.raises(CarError) as refused:
                await car.daemon_call(unknown)
            assert (refused.value.type, refused.value.code) == ("DaemonRpcError", -32601)
            assert refused.value.data["type"] == "method_not_found"
            assert refused.value.data["hint"] in refused.value.message
        with pytest.raises(CarError, match=r"-32601 .*agents\.register_basics.*there are: .*capabilities\.list"):
            await car.call("register_agent_basics")
        assert await car.call("connection_epoch") == 1  # all on one connection


@needs_old_car
async def test_the_old_client_connects_and_is_told_likewise(served: Daemon) -> None:
    async with car_client(served, OLD) as car:
        with pytest.raises(CarError, match=r"-32601 .*agents\.register_basics") as refused:
            await car.call("register_agent_basics")
        assert refused.value.type == "RuntimeError"


# ------------------------------------------------------------------------------------------------------------- tokens


@needs_car
async def test_the_runs_of_a_client_with_an_agents_token_are_that_agents(served: Daemon) -> None:
    tokens = {"coder": printed_token(served, "coder"), "tester": agent_token(served.token("agent-key"), "tester")}
    async with car_client(served, token=tokens["coder"]) as coder, car_client(served, token=tokens["tester"]) as tester:
        mine = await coder.call("runs_start", {"intent": "fix", "agent_name": "Fixer"})
        assert mine["agent_id"] == "coder"  # the token says so, and the name is only a name
        run_id = mine["run_id"]
        assert [run["run_id"] for run in (await coder.call("runs_list", {"agent_id": "coder"}))["runs"]] == [run_id]
        assert (await coder.call("runs_get_trace", {"run_id": run_id}))["records"][0]["record"] == "started"

        assert (await tester.call("runs_list", {"agent_id": "coder"}))["runs"] == []
        assert await tester.call("runs_get_trace", {"run_id": run_id}) == {"run_id": run_id, "not_found": True}
        turns = {"run_id": run_id, "turns": [{"prompt": "hi"}]}
        assert (await tester.call("runs_record_turns", turns))["dropped"] == "run_not_found"
        for call, params in (
            ("runs_subscribe", {}),
            ("runs_resume", {}),
            ("runs_complete", {"outcome": {"status": "success"}}),
            ("runs_cancel", {"idempotency_key": "k", "reason": "no"}),
        ):
            with pytest.raises(CarError, match=f"unknown run '{run_id}'"):
                await tester.call(call, {"run_id": run_id} | params)
        assert (await coder.call("runs_record_turns", turns))["ok"]


@needs_car
async def test_a_client_without_a_token_is_refused_and_comes_in_where_none_is_asked_for(
    served: Daemon, start: StartDaemon, tmp_path: Path
) -> None:
    async with car_client(served, token=None, HOME=str(tmp_path)) as car:
        for _ in range(2):  # it begins anew each time
            with pytest.raises(CarError, match=r"server\.handshake rejected by daemon: -32001 .*session\.auth"):
                await car.call("connection_epoch")
    async with car_client(start("--no-auth"), token=None) as car:
        assert await car.call("connection_epoch") == 1
        assert (await car.call("runs_start", {"intent": "x", "agent_name": "n"}))["agent_id"] == "name:n"


@needs_car
async def test_a_client_with_a_wrong_token_is_refused_in_words_that_it_knows_and_a_new_one_is_taken_on_the_same_socket(
    start: StartDaemon, tmp_path: Path
) -> None:
    daemon = start(wrong_token_s=0.01)
    async with car_client(daemon, token="wrong") as car:
        with pytest.raises(CarError, match=r"token mismatch.*re-read returned same token"):
            await car.call("connection_epoch")
    file = tmp_path / TOKEN_FILE
    file.parent.mkdir(parents=True)
    os.mkfifo(file)  # so that the token is replaced exactly between the two times that the client reads it
    async with car_client(daemon, token=None, HOME=str(tmp_path)) as car:
        connected = car.start("connection_epoch")
        wrong = daemon.metrics()["wrong_tokens"]
        await asyncio.to_thread(file.write_text, "wrong\n")
        await daemon.until("wrong_tokens", wrong + 1)
        await asyncio.to_thread(file.write_text, f"{daemon.token()}\n")
        assert await connected == 1
    assert daemon.metrics()["wrong_tokens"] == wrong + 1


# ------------------------------------------------------------------------------------------------ one client, for long


@needs_car
async def test_the_same_client_goes_on_after_a_restart_of_the_daemon_and_says_that_it_is_another_connection(
    start: StartDaemon,
) -> None:
    daemon = start(close_s=0.1)  # the client answers no close frame, so the daemon waits for none
    async with cutting(daemon.url, random.Random(5)) as proxy, car_client(daemon, CAR_DAEMON_URL=proxy.url) as car:
        epoch = await car.call("connection_epoch")
        await car.call("register_tool", "echo")
        run_id = (await car.call("runs_start", {"intent": "x", "agent_name": "n"}))["run_id"]
        assert daemon.terminate() == 0
        with pytest.raises(CarError):  # there is nobody
            await car.call("runs_record_turns", {"run_id": run_id, "turns": [{"prompt": "lost"}]})
        proxy.lead_to(daemon.start().url)
        await car.reconnected(epoch)
        assert (await car.call("list_tools")) == []  # they were the old connection's
        await car.call("register_tool", "echo")
        assert [tool["name"] for tool in await car.call("list_tools")] == ["echo"]
        await car.call("runs_resume", {"run_id": run_id})
        turns = await car.call("runs_record_turns", {"run_id": run_id, "turns": [{"prompt": "kept"}]})
        assert (turns["ok"], turns["base_index"]) == (True, 0)


@needs_car
async def test_four_threads_share_one_connection_and_each_gets_its_own_answers(served: Daemon) -> None:
    async with car_client(served) as car:
        await car.call("connection_epoch")
        connections = served.metrics()["connections"]

        async def one_thread(name: str) -> list[tuple[str, str]]:
            found = []
            for number in range(CALLS):
                intent = f"{name} {number}"
                run = await car.call("runs_start", {"intent": intent, "agent_id": name})
                started = (await car.call("runs_get_trace", {"run_id": run["run_id"]}))["records"][0]
                found.append((started["agent_id"], started["intent"]))
            return found

        names = [f"thread {number}" for number in range(THREADS)]
        each = await asyncio.gather(*map(one_thread, names))
        assert each == [[(name, f"{name} {number}") for number in range(CALLS)] for name in names]
        assert served.metrics()["connections"] <= connections  # one of an earlier test may have ended meanwhile
        assert await car.call("connection_epoch") == 1
