"""Process tools of every ugly kind, on a real daemon: five rounds of all at once; 50 by `scripts/tool_rounds`."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.conftest import StartDaemon
from tests.fault.tooling import until
from tests.fault.zoo import MARK, MIB, descendants, marked, until_none, write_zoo
from tests.fault.zoorounds import PROOF_MS, SHORT, Figures, keeper_of, left_of, until_up, zoo_round
from tests.peer import peer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process tools need Linux")

ROUNDS = 5
MOST = 256 * MIB  # of memory after a round: what one flood writes is more, if somebody kept it


@pytest.fixture
def zoo(tmp_path: Path) -> str:
    return write_zoo(tmp_path / "zoo.toml")


@pytest.fixture
def it() -> str:
    """A mark that nothing else on this machine has: other tests run at the same time."""
    return uuid.uuid4().hex


@pytest.mark.parametrize("number", range(ROUNDS))
async def test_every_tool_has_the_right_end_whatever_it_does_and_nothing_is_left(
    start: StartDaemon, zoo: str, number: int, chance: random.Random
) -> None:
    figures = Figures()
    daemon = start("--tools", zoo, **SHORT)
    await zoo_round(daemon, chance, figures)
    print(figures)
    assert figures.wrong == []
    assert figures.proven > 0
    assert figures.largest < MOST
    assert daemon.metrics()["keepers_replaced"] == 0


async def test_a_stop_is_requested_while_something_lives_and_confirmed_when_nothing_does(
    start: StartDaemon, zoo: str, it: str
) -> None:
    daemon = start("--tools", zoo, kill_after_s=1000)
    async with peer(daemon) as caller:
        handle = (await caller.call("tools.invoke", {"tool": "ignores_term", "parameters": {"mark": it}}))["handle"]
        await until_up(caller, handle)
        both = marked(it)
        assert len(both) == 2
        requested = {"cancelled": True, "cancel": "requested"}
        assert await caller.call("tools.cancel", {"handle": handle}) == requested
        while both:
            await until(lambda: set(marked(it)) == set(both))
            assert await caller.call("tools.cancel", {"handle": handle, "wait_ms": 200}) == requested
            told = await caller.call("tools.status", {"handle": handle})
            assert told == {"handle": handle, "status": "cancelled", "cancel": "requested"}
            os.kill(both.pop(), signal.SIGKILL)
        told = await caller.call("tools.cancel", {"handle": handle, "wait_ms": PROOF_MS})
        assert marked(it) == []
        assert told["cancel"] == "confirmed"


async def test_a_stop_that_could_not_be_seen_in_time_is_unconfirmed_and_still_nothing_is_left(
    start: StartDaemon, zoo: str, it: str
) -> None:
    daemon = start("--tools", zoo, kill_after_s=0.1, unconfirmed_s=0.1)
    keeper = await keeper_of(daemon)
    async with peer(daemon) as caller:
        order = {"tool": "stops_its_parent", "parameters": {"mark": it}}
        handle = (await caller.call("tools.invoke", order))["handle"]
        await until_up(caller, handle)
        told = await caller.call("tools.cancel", {"handle": handle, "wait_ms": PROOF_MS})
        assert told["cancel"] == "unconfirmed"
        assert await left_of(daemon.pid, it, keeper) == []
        assert daemon.metrics()["stops_unconfirmed"] == 1


def test_the_search_finds_what_is_marked_until_it_is_gone(it: str) -> None:
    """The negative control of all that is said about what is left."""
    command = ["sh", "-c", "sleep 1000 & echo; wait"]
    with subprocess.Popen(command, env=os.environ | {MARK: f"{it}.1"}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        both = {process.pid, *descendants(process.pid)}
        try:
            assert len(both) == 2
            assert set(marked(it)) == set(marked(f"{it}.1")) == both
            assert marked(it[:-1]) == marked(f"{it}.") == []
        finally:
            for pid in both:
                os.kill(pid, signal.SIGKILL)
    assert asyncio.run(until_none(lambda: marked(it))) == ""
