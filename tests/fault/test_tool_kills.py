"""`kill -9` of the daemon, its keeper, a sub-reaper, or several of them, with tools of the zoo: none lives on."""

import asyncio
import os
import signal
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.fault.audit import read_log
from tests.fault.tooling import children
from tests.fault.zoo import FATAL, FOREVER, descendants, identities, marked, until_none, write_zoo
from tests.fault.zoorounds import SHORT, keeper_of, left_of, until_idle, until_up
from tests.hosting import polled
from tests.peer import Peer, Refused, peer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process tools need Linux")

KEEPER_DIED = "the keeper of process tools died"
RESTARTED = "the daemon was restarted while the tool ran"
FLOCK = uuid.uuid4().hex


@pytest.fixture
def daemon(start: StartDaemon, tmp_path: Path) -> Daemon:
    return start("--tools", write_zoo(tmp_path / "zoo.toml"), **SHORT)


async def all_up(caller: Peer, run_id: str | None = None) -> list[str]:
    """One of each that does not end by itself, there and running: their handles."""
    run = {} if run_id is None else {"run_id": run_id}
    handles = []
    for animal in FOREVER:
        order = {"tool": animal.name, "parameters": {"mark": f"{FLOCK}.{animal.name}"}, **run}
        handles.append((await caller.call("tools.invoke", order))["handle"])
    for handle in handles:
        await until_up(caller, handle)
    return handles


def kill(*processes: int) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# Beside the daemon. All of them at once, sub-reapers and keeper, is more than can be withstood: nobody is left to look.
KILLED = ["alone", "with the keeper", "with a sub-reaper", "with all sub-reapers", "while the keeper is stopped"]


@pytest.mark.parametrize("also", KILLED)
async def test_no_tool_outlives_a_daemon_that_is_killed_and_the_next_one_closes_them_in_their_runs(
    daemon: Daemon, also: str
) -> None:
    async with peer(daemon) as caller:
        run_id = (await caller.create())["id"]
        handles = await all_up(caller, run_id)
        keyed = {"tool": "ignores_term", "parameters": {"mark": f"{FLOCK}.keyed"}, "idempotency_key": "once"}
        handle = (await caller.call("tools.invoke", keyed))["handle"]
        await until_up(caller, handle)
        keeper = await keeper_of(daemon)
        everything = identities(descendants(daemon.pid))
        others = {
            "with the keeper": [keeper],
            "with a sub-reaper": children(keeper)[:1],
            "with all sub-reapers": children(keeper),
        }
        if also == KILLED[-1]:
            os.kill(keeper, signal.SIGSTOP)
        kill(*others.get(also, []), daemon.pid)
        daemon.kill()
    try:
        assert await until_none(lambda: marked(FLOCK)) == ""
    finally:
        with suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGCONT)  # one that stays stopped is never seen again
    assert await until_none(lambda: [pid for pid, began in everything if (pid, began) in identities([pid])]) == ""

    daemon.start()
    async with peer(daemon) as caller:
        await until_idle(daemon)
        events = [entry["event"] for entry in await read_log(caller, run_id)]
        ends = {event["id"]: event["error"] for event in events if event["type"] == "tool_end"}
        died = {RESTARTED, KEEPER_DIED, FATAL}
        assert ends.keys() == set(handles)
        assert set(ends.values()) <= (died if also.startswith("with") else {RESTARTED}), ends
        assert len([event for event in events if event["type"] == "tool_end"]) == len(handles)
        assert await polled(caller, handle) is None
        with pytest.raises(Refused) as refused:
            await caller.call("tools.invoke", keyed)
        assert (refused.value.type, refused.value.data["reason"]) == ("conflict", "exists")
        assert marked(FLOCK) == []
        assert (await caller.call("tools.call", {"tool": "silent"}))["status"] == "succeeded"


@pytest.mark.parametrize("by", ["the test", "a tool"])
async def test_when_the_keeper_is_killed_its_handles_fail_with_words_and_the_next_tool_runs(
    daemon: Daemon, by: str
) -> None:
    keeper = await keeper_of(daemon)
    async with peer(daemon) as caller:
        run_id = (await caller.create())["id"]
        handles = await all_up(caller, run_id)
        calling = caller.start("tools.call", {"tool": "ignores_term", "parameters": {"mark": f"{FLOCK}.called"}})
        while not marked(f"{FLOCK}.called"):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)
        if by == "the test":
            kill(keeper)
        else:
            order = {"tool": "kills_the_keeper", "parameters": {"mark": f"{FLOCK}.killer"}}
            assert (await caller.call("tools.call", order))["error"] == KEEPER_DIED
        for handle in handles:
            told = await polled(caller, handle, wait_ms=15_000, after=1)
            assert (told["status"], told["error"]) == ("failed", KEEPER_DIED)
            assert [chunk["kind"] for chunk in told["chunks"]] == ["error"]
        told = await calling
        assert (told["status"], told["error"]) == ("failed", KEEPER_DIED)
        assert (await caller.call("tools.call", {"tool": "silent"}))["status"] == "succeeded"
        await until_idle(daemon)
        events = [entry["event"] for entry in await read_log(caller, run_id)]
        ends = {event["id"]: event["error"] for event in events if event["type"] == "tool_end"}
        assert ends == dict.fromkeys(handles, KEEPER_DIED)
    assert await until_none(lambda: marked(FLOCK)) == ""
    assert daemon.metrics()["keepers_replaced"] == 1
    assert await left_of(daemon.pid, FLOCK, (set(children(daemon.pid)) - {keeper}).pop()) == []


async def test_when_a_sub_reaper_is_killed_its_handle_alone_fails(daemon: Daemon) -> None:
    keeper = await keeper_of(daemon)
    async with peer(daemon) as caller:
        handles = await all_up(caller)
        kill(children(keeper)[0])
        told = [await polled(caller, handle) for handle in handles]
        while not any(one["status"] == "failed" for one in told):
            await asyncio.sleep(0.02)
            told = [await polled(caller, handle, after=0) for handle in handles]
        assert sorted(one.get("error", "") for one in told) == [""] * (len(handles) - 1) + [FATAL]
        assert (await caller.call("tools.cancel_all"))["cancelled"] == len(handles) - 1
        await until_idle(daemon)
    assert await left_of(daemon.pid, FLOCK, keeper) == []
