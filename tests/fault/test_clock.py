"""The wall clock set forward and back, by an hour and by a year, under the daemon.

It is moved from outside, by the preloaded library, and where there is no compiler from within, by a method module.
"""

import asyncio
import contextlib
import itertools
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import EXIT_S, Daemon
from tests.fault.audit import Producer, audit_runs, read_log
from tests.fault.faults import listed
from tests.fault.preload import CannotPreload, Faults
from tests.fault.test_drain import exit_code, stalled_peer, tell
from tests.peer import Peer, Refused, peer
from tests.rawpeer import raw_peer, raw_socket
from tests.trace import subscribe, text, until_at_most, until_ended
from tests.unit.storing import write_lock

HOUR, YEAR = 3_600.0, 365 * 86_400.0
JUMPS = (HOUR, -HOUR, YEAR, -YEAR)
TIMES = 10  # that each of them is made under load
LONG_S = 120.0  # longer than any of these tests, shorter than any jump
TIMERS = (
    "handshakes_refused",
    "unauthenticated_dropped",
    "write_timeouts",
    "ping_timeouts",
    "storage_deadlines",
    "runs_interrupted",
)


class Clock:
    """The daemon's, that of the wall."""

    def __init__(self, faults: Faults | None) -> None:
        self._faults = faults
        self.wrapper = faults.wrapper if faults else ()
        self.args = () if faults else ("--methods", "tests.fault.clockwork")

    async def move(self, hand: Peer, seconds: float) -> None:
        """Forward, or back; `hand` is any connection."""
        if self._faults is not None:
            self._faults.move_clock(seconds)
        else:
            await hand.call("test.move_clock", {"seconds": seconds})


@pytest.fixture
def clock(preload: Path | CannotPreload, tmp_path: Path) -> Clock:
    if isinstance(preload, CannotPreload):
        print(f"{preload}: the clock is moved from within")
        return Clock(None)
    return Clock(Faults(preload, tmp_path / "faults"))


async def now_ms(reader: Peer) -> int:
    """What the daemon's clock says."""
    return int((await reader.call("server.ping"))["now_ms"])


async def fired(daemon: Daemon) -> dict[str, float]:
    """The timers that have fired, by their counters."""
    figures = await asyncio.to_thread(daemon.metrics)
    return {name: figures[name] for name in TIMERS if figures[name]}


# Times.


async def test_under_load_times_within_a_run_never_go_back_and_nothing_is_lost_doubled_or_interrupted(
    clock: Clock, start: StartDaemon
) -> None:
    daemon = start(*clock.args, wrapper=clock.wrapper)
    acknowledgements = asyncio.Semaphore(0)
    async with contextlib.AsyncExitStack() as stack:
        owners = [await stack.enter_async_context(peer(daemon)) for _ in range(2)]
        viewer, reader = [await stack.enter_async_context(peer(daemon, "host-token")) for _ in range(2)]
        runs = [(await owners[0].create())["id"] for _ in range(3)]
        for run_id in runs:
            await subscribe(viewer, run_id)
        producers = [
            Producer(f"p{n}", owner, runs[n : n + 2], window=2, acknowledgements=acknowledgements)
            for n, owner in enumerate(owners)
        ]
        work = [asyncio.create_task(producer.run()) for producer in producers]
        before = await now_ms(reader)
        for jump in JUMPS * TIMES:
            await clock.move(reader, jump)
            for _ in range(10):
                await acknowledgements.acquire()
        after = await now_ms(reader)
        for owner in owners:
            await owner.socket.close()
        await asyncio.gather(*work)
        await until_at_most(daemon, "connections", 3)  # these two, and the one that asks
        await until_at_most(daemon, "storage_waiting_commands", 0)

        found = await audit_runs(reader, [batch for producer in producers for batch in producer.sent])
        assert found.good, found
        logs = {run_id: await read_log(reader, run_id) for run_id in runs}
        streams: dict[str, list[dict[str, Any]]] = {run_id: [] for run_id in runs}
        for _ in range(sum(1 + len(log) for log in logs.values())):
            params = await viewer.next("runs.trace.event")
            if params["record"].pop("record") == "event":
                streams[params["run_id"]].append(params["record"])
        assert streams == logs
        for log in logs.values():  # the times went with the clock as far as that was forward
            assert log[-1]["timestamp_ms"] - log[0]["timestamp_ms"] > (YEAR - HOUR) * 1000
        assert after - before < LONG_S * 1000  # and the clock is where it was, also for a new run
        created = (await reader.create())["created_at_ms"]
        assert after <= created <= after + LONG_S * 1000
        assert await fired(daemon) == {}
    print(f"{TIMES} jumps of each kind, {found.acknowledged} events acknowledged: {found}")


async def test_times_given_by_the_recorder_lie_between_the_last_event_and_now_whatever_now_was_before(
    clock: Clock, start: StartDaemon
) -> None:
    daemon = start(*clock.args, wrapper=clock.wrapper)
    async with peer(daemon) as owner:
        run_id = (await owner.create())["id"]
        await owner.record(run_id, text(0))
        (first,) = [entry["timestamp_ms"] for entry in await read_log(owner, run_id)]
        await clock.move(owner, YEAR)
        month, before = first + 30 * 86_400_000, await now_ms(owner)
        await owner.record(run_id, text(1), text(2), at_ms=[month, 0])  # the past is open now, but only in order
        await owner.record(run_id, text(3), at_ms=[before * 2])
        ahead = await now_ms(owner)
        await clock.move(owner, -YEAR)
    daemon.kill()
    daemon.start()  # which remembers where time has been
    async with peer(daemon) as owner:
        await owner.record(run_id, text(4), text(5), at_ms=[first, ahead * 2])
        await owner.record(run_id, text(6))
        await clock.move(owner, YEAR + 2 * HOUR)
        later = await now_ms(owner)
        await owner.record(run_id, text(7))
        log = [entry["timestamp_ms"] for entry in await read_log(owner, run_id)]
        run = await owner.call("runs.get", {"run_id": run_id})
    assert log[:3] == [first, month, month]
    assert before <= log[3] <= ahead
    assert log[4:7] == [log[3]] * 3
    assert log[7] == run["updated_at_ms"] >= later > ahead


async def test_the_list_of_runs_is_in_the_order_of_their_times_and_its_pages_have_no_gap_and_no_duplicate(
    clock: Clock, start: StartDaemon
) -> None:
    daemon = start(*clock.args, wrapper=clock.wrapper)
    async with peer(daemon) as owner:
        runs = []
        for jump in (0.0, *JUMPS, -YEAR, YEAR + HOUR):
            await clock.move(owner, jump)
            before = await now_ms(owner)
            made = [await owner.create() for _ in range(3)]
            after = await now_ms(owner)
            assert all(before <= run["created_at_ms"] <= after for run in made)
            runs += made
        placed = sorted(enumerate(runs), key=lambda at: (at[1]["created_at_ms"], at[0]), reverse=True)
        newest_first = [run["id"] for _, run in placed]
        assert len(set(newest_first)) == len(runs)
        assert [run["id"] async for run in listed(owner)] == newest_first
        # Page by page, while the clock goes on to jump and runs are made: those that were there come all, and once.
        shown: list[str] = []
        page: dict[str, Any] = {"limit": 4}
        for jump in itertools.cycle(JUMPS):
            answer = await owner.call("runs.list", page)
            shown += [run["id"] for run in answer["runs"]]
            if answer["next_page"] is None:
                break
            page = {"page": answer["next_page"], "limit": 4}
            await clock.move(owner, jump)
            await owner.create()
        assert [run_id for run_id in shown if run_id in newest_first] == newest_first
        assert len(set(shown)) == len(shown)


# Timers.


async def test_a_run_is_interrupted_when_its_grace_has_really_passed_and_not_while_it_is_attended(
    clock: Clock, start: StartDaemon
) -> None:
    grace_s = 0.4
    daemon = start(*clock.args, wrapper=clock.wrapper, grace_s=grace_s)
    async with peer(daemon) as owner, peer(daemon, "host-token") as viewer:
        attended = (await owner.create())["id"]
        for jump in JUMPS:
            async with peer(daemon) as leaving:
                run_id = (await leaving.create())["id"]
                await subscribe(viewer, run_id)
                left = time.monotonic()
            await clock.move(owner, jump)
            ended = (await until_ended(viewer))[-1]
            assert (ended["run_id"], ended["run_status"]) == (run_id, "interrupted")
            assert time.monotonic() - left >= grace_s
            run = await viewer.call("runs.get", {"run_id": run_id})
            assert run["created_at_ms"] <= run["updated_at_ms"] == run["ended_at_ms"]
            assert (await owner.call("runs.get", {"run_id": attended}))["status"] == "created"
        assert await fired(daemon) == {"runs_interrupted": len(JUMPS)}
        await owner.record(attended, {"type": "agent_end", "text": "done"})


async def test_no_timer_fires_because_the_clock_jumped(clock: Clock, start: StartDaemon) -> None:
    durations = dict.fromkeys(("handshake_s", "auth_s", "write_s", "pong_s", "storage_s", "grace_s"), LONG_S)
    daemon = start(*clock.args, wrapper=clock.wrapper, ping_s=0.1, **durations)
    async with peer(daemon) as leaving:
        await leaving.create()
    async with (
        raw_socket(daemon) as half,
        raw_peer(daemon, token=None),
        raw_peer(daemon) as silent,
        stalled_peer(daemon),
        peer(daemon) as owner,
    ):
        half.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgr")
        await silent.frame()  # a ping, which it does not answer
        run_id = (await owner.create())["id"]
        with write_lock(daemon.state / "carserver.db"):
            waiting = owner.start("runs.record", {"run_id": run_id, "events": [text(0)]})
            await daemon.until("storage_waiting_commands", 1)
            for jump in JUMPS:
                await clock.move(owner, jump)
                for _ in range(3):
                    await owner.call("server.ping")  # the loop has turned, and what was due has been done
                assert await fired(daemon) == {}
        assert (await waiting)["cursor"] == 1


async def test_every_timer_fires_though_the_clock_was_set_back(clock: Clock, start: StartDaemon) -> None:
    # Long enough for this test's own requests on a slow machine, and on a disk that is.
    durations = dict.fromkeys(("handshake_s", "auth_s", "write_s", "pong_s", "storage_s", "grace_s"), 3.0)
    daemon = start(*clock.args, wrapper=clock.wrapper, ping_s=0.1, durability="normal", **durations)
    async with peer(daemon) as leaving:
        await leaving.create()
    async with (
        raw_socket(daemon),
        raw_peer(daemon, token=None),
        raw_peer(daemon) as silent,
        stalled_peer(daemon),
        peer(daemon) as owner,
    ):
        await silent.frame()
        run_id = (await owner.create())["id"]
        with write_lock(daemon.state / "carserver.db"):
            waiting = owner.start("runs.record", {"run_id": run_id, "events": [text(0)]})
            await daemon.until("storage_waiting_commands", 1)
            await clock.move(owner, -YEAR)
            with pytest.raises(Refused, match="storage did not answer within"):
                await waiting
        for timer in TIMERS:
            await daemon.until(timer, 1)


async def test_a_drain_has_its_time_though_the_clock_was_set_forward(clock: Clock, start: StartDaemon) -> None:
    daemon = start(*clock.args, wrapper=clock.wrapper, drain_s=LONG_S)
    async with peer(daemon) as owner, peer(daemon) as client:
        run_id = (await owner.create())["id"]
        with write_lock(daemon.state / "carserver.db"):
            begun = owner.start("runs.record", {"run_id": run_id, "events": [text(0)]})
            await daemon.until("storage_waiting_commands", 1)  # and the drain waits for it
            tell(daemon, signal.SIGTERM)
            await client.next("server.draining")
            await clock.move(client, YEAR)
            await asyncio.sleep(0.2)  # what must not happen meanwhile cannot be waited for
        assert (await begun)["cursor"] == 1
        assert [(await each.closed())[0] for each in (owner, client)] == [1012, 1012]
    assert await asyncio.to_thread(exit_code, daemon, EXIT_S) == 0


async def test_a_drain_ends_in_time_though_the_clock_was_set_back(clock: Clock, start: StartDaemon) -> None:
    daemon = start(*clock.args, wrapper=clock.wrapper, drain_s=2.0)
    async with peer(daemon) as owner, peer(daemon) as client:
        run_id = (await owner.create())["id"]
        with write_lock(daemon.state / "carserver.db"):
            hanging = owner.start("runs.record", {"run_id": run_id, "events": [text(0)]})
            await daemon.until("storage_waiting_commands", 1)
            tell(daemon, signal.SIGTERM)
            await client.next("server.draining")
            await clock.move(client, -YEAR)
            with pytest.raises(ConnectionError, match="closed 1012"):
                await hanging
            assert await asyncio.to_thread(exit_code, daemon, EXIT_S) == 1  # storage never came to its end
