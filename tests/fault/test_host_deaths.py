"""Hosts of tools that die in mid-call: every stage and every way to die once; 100 by `scripts/host_rounds`."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon, running
from tests.fault.host_deaths import ENDED_S, ROUNDS, Figures, Watcher, death_round
from tests.hosting import until_ended
from tests.peer import peer
from tests.rawpeer import raw_peer

ROOM_S = 20 * ENDED_S
"""Two cores that run other tests too: the bound of the command, `ENDED_S`, holds for the daemon alone."""
LONG_S = 3 * ROOM_S  # for whatever else a handle's end might wait for


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("hosts") / "state", ping_s=LONG_S, kill_after_s=LONG_S) as daemon:
        yield daemon


@pytest.mark.parametrize(("stage", "way"), [pytest.param(*case, id=", ".join(case)) for case in ROUNDS])
async def test_a_host_that_dies_fails_its_handles_at_once_and_each_once_and_no_others(
    served: Daemon, stage: str, way: str
) -> None:
    figures = Figures()
    await death_round(served, stage, way, figures)
    print(figures)
    assert figures.wrong == []
    assert figures.slowest_s < ROOM_S, f"at most {ENDED_S} s is wanted"


async def test_a_host_that_vanishes_without_a_word_is_missed_at_its_next_ping(start: StartDaemon) -> None:
    daemon = start(ping_s=0.2, pong_s=2, close_s=0.2)
    async with peer(daemon) as caller, raw_peer(daemon) as host:  # which answers no ping
        host.send_call(1, "tools.register", [{"name": "a"}])
        assert (await host.message())["result"] == 1
        handle = (await caller.call("tools.invoke", {"tool": "a"}))["handle"]
        chunks, answer = await until_ended(caller, handle)
        assert chunks == [{"kind": "error", "message": "the host's connection ended"}]
        assert answer["status"] == "failed"


# The negative control: what the rounds rely on finds every kind of damage.

TEXT: dict[str, Any] = {"kind": "text", "text": "t"}
END: dict[str, Any] = {"kind": "error", "message": "m"}


@pytest.mark.parametrize(
    ("seen", "is_wrong"),
    [
        ([(0, TEXT), (3, TEXT), (4, END)], False),
        ([(0, END)], False),
        ([], True),
        ([(0, TEXT)], True),
        ([(0, TEXT), (1, END), (2, END)], True),
        ([(0, TEXT), (1, END), (2, TEXT)], True),
        ([(0, TEXT), (0, TEXT), (1, END)], True),
        ([(1, TEXT), (0, TEXT), (2, END)], True),
    ],
    ids=["a gap", "the end alone", "nothing", "no end", "two ends", "text after the end", "one twice", "another order"],
)
def test_the_checker_finds_a_missing_a_second_and_a_misplaced_end(
    seen: list[tuple[int, dict[str, Any]]], is_wrong: bool
) -> None:
    watcher = Watcher()
    for sequence, chunk in seen:
        watcher.add("h", sequence, chunk)
    assert bool(watcher.wrong({"h"})) == is_wrong
