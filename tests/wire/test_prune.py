"""`server.prune` and retention: what goes and what never does, who is told, and that others are served meanwhile."""

import asyncio
import contextlib
from typing import Any

import pytest

from tests.conftest import StartDaemon
from tests.daemon import Daemon
from tests.peer import Peer, Refused, peer
from tests.rawpeer import call_frame, raw_peer
from tests.wire.test_delete import closed, over

APPENDS = 200  # more than may be under way at once, so that they take several transactions
WAIT_MS = 30  # so that runs end in an order that their times show


async def listed(host: Peer) -> list[str]:
    """The ids of all runs, oldest first."""
    return [run["id"] for run in reversed((await host.call("runs.list", {"limit": 1000}))["runs"])]


async def some(client: Peer, number: int) -> list[str]:
    """So many runs that are over, each ended later than the one before."""
    found = []
    for _ in range(number):
        found.append(await over(client, {"type": "text", "text": "x" * 1_000}))
        await asyncio.sleep(0.002)  # the clock of `ended_at_ms` moves on
    return found


async def checked(host: Peer, **criteria: Any) -> list[str]:
    """Prunes, after a dry run that said the same and changed nothing; what went."""
    before = await listed(host)
    told = await host.call("server.prune", {**criteria, "dry_run": True})
    assert told.pop("dry_run") is True
    assert await listed(host) == before
    done = await host.call("server.prune", criteria)
    assert done.pop("dry_run") is False
    assert done == told
    assert await listed(host) == [run_id for run_id in before if run_id not in done["run_ids"]]
    ids: list[str] = done["run_ids"]
    return ids


async def test_by_number_the_oldest_ended_go_and_live_ones_count_but_stay(daemon: Daemon) -> None:
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        live = (await client.create())["id"]
        runs = await some(client, 5)
        assert await checked(host, max_runs=4) == runs[:2]
        assert await checked(host, max_runs=4) == []
        assert await checked(host, max_runs=0) == runs[2:]
        assert await listed(host) == [live]


async def test_by_size_goes_as_much_as_must(daemon: Daemon) -> None:
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        runs = await some(client, 4)
        content = {"kind": "inline", "value": "y" * 5_000}
        event = {"type": "final", "ok": True, "content": content}
        output = {"task_id": "t", "attempt": 0, "producer_agent": "p", "event": event}
        await client.call("outputs.append", {**output, "run_id": runs[0]})
        await client.call("outputs.append", output)  # of no run: not counted, and it stays
        assert await checked(host, max_bytes=10_000) == []
        assert await checked(host, max_bytes=9_000) == runs[:1], "its output counts, and goes with it"
        assert await checked(host, max_bytes=0) == runs[1:]
        assert len((await client.call("outputs.list", {"task_id": "t", "attempt": 0}))["outputs"]) == 1


async def test_by_age_go_runs_by_their_end_and_outputs_without_a_run(daemon: Daemon) -> None:
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        live = (await client.create())["id"]
        runs = await some(client, 2)
        output = {"task_id": "t", "attempt": 0, "producer_agent": "p", "event": {"type": "progress", "stage": "s"}}
        await client.call("outputs.append", output)
        await client.call("outputs.append", {**output, "run_id": live})
        assert await checked(host, older_than_ms=60_000) == []
        await asyncio.sleep(WAIT_MS / 1000)
        await client.record(runs[0], {"type": "late"})  # it does not end anew
        told = await host.call("server.prune", {"older_than_ms": WAIT_MS, "dry_run": True})
        assert (told["run_ids"], told["outputs"]) == (runs, 1)
        await client.call("runs.cancel", {"run_id": live})
        pruned = await host.call("server.prune", {"older_than_ms": WAIT_MS})
        assert (pruned["run_ids"][:2], pruned["outputs"]) == (runs, 1 + (live in pruned["run_ids"]))


async def test_several_criteria_are_each_met(daemon: Daemon) -> None:
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        runs = await some(client, 5)
        assert await checked(host, max_runs=4, max_bytes=3 * 1_100, older_than_ms=600_000) == runs[:2]


async def test_the_viewers_of_a_run_that_is_pruned_are_told(daemon: Daemon) -> None:
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        run_id, other = await some(client, 2)
        for watched in (run_id, other):
            await client.call("runs.trace.subscribe", {"run_id": watched})
        for _ in range(2):
            while (await client.next("runs.trace.event"))["record"]["record"] != "ended":
                pass
        await host.call("server.prune", {"max_runs": 1})
        await closed(client, run_id)


async def test_only_the_host_prunes_and_says_by_what(daemon: Daemon) -> None:
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        with pytest.raises(Refused) as refused:
            await client.call("server.prune", {"max_runs": 0})
        assert refused.value.type == "forbidden"
        for params in ({}, {"dry_run": True}, {"max_runs": -1}, {"max_runs": None}, {"older_than_ms": "1d"}):
            with pytest.raises(Refused) as refused:
                await host.call("server.prune", params)
            assert refused.value.type == "invalid_params"


async def test_more_ids_than_a_page_are_counted(start: StartDaemon) -> None:
    daemon = start(page_entries=3)
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        runs = await some(client, 5)
        pruned = await host.call("server.prune", {"max_runs": 0})
        assert (pruned["runs"], pruned["run_ids"], pruned["more_runs"]) == (5, runs[:3], 2)


async def test_while_it_prunes_others_record_and_are_answered(start: StartDaemon) -> None:
    daemon = start(prune_runs=5, sweep_pause_s=0.001, sweep_events=100)
    async with peer(daemon) as client, peer(daemon, "host-token") as host, raw_peer(daemon, "host-token") as both:
        await asyncio.gather(*(over(client, *({"type": "text", "n": n} for n in range(50))) for _ in range(300)))
        live = (await host.create())["id"]
        # Both on one connection, so that the order of the answers tells which was done first.
        event = {"type": "text"}
        appends = [call_frame(f"r{n}", "runs.record", {"run_id": live, "events": [event]}) for n in range(APPENDS)]
        both.send(b"".join([call_frame("prune", "server.prune", {"max_runs": 1}), *appends]))
        answers = [await both.message() for _ in range(1 + APPENDS)]
        assert [answer["id"] for answer in answers] == [*(f"r{n}" for n in range(APPENDS)), "prune"]
        assert answers[-1]["result"]["runs"] == 300
        assert (await host.call("runs.get", {"run_id": live}))["event_count"] == APPENDS
        assert await listed(host) == [live]


async def test_an_owner_that_comes_back_during_a_prune_has_a_whole_run_or_none(start: StartDaemon) -> None:
    """Interrupted runs are over until their owner records in them: which of the two comes first decides."""
    daemon = start(grace_s=0.05, prune_runs=3)
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        async with peer(daemon) as owner:
            runs = [(await owner.create())["id"] for _ in range(60)]
        await daemon.until("runs_interrupted", 60)
        pruning = host.start("server.prune", {"max_runs": 0})
        back = await asyncio.gather(*(client.record(run_id, {"type": "x"}) for run_id in runs), return_exceptions=True)
        pruned = await pruning
        gone = [run_id for run_id, answer in zip(runs, back, strict=True) if isinstance(answer, Refused)]
        assert pruned["runs"] == len(gone)
        assert sorted(pruned["run_ids"]) == sorted(gone)
        assert set(await listed(host)) == set(runs) - set(gone)


async def test_a_prune_that_a_drain_interrupts_leaves_whole_runs(start: StartDaemon) -> None:
    daemon = start(prune_runs=1)
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        events = [{"type": "text", "n": n} for n in range(20)]
        runs = await asyncio.gather(*(over(client, *events) for _ in range(300)))
        pruning = host.start("server.prune", {"max_runs": 0})
        await daemon.until("runs_deleted", 5)
        assert await asyncio.to_thread(daemon.terminate) == 0
        with contextlib.suppress(Refused, ConnectionError):  # it may have come to its end before
            await pruning
    daemon.start()
    async with peer(daemon, "host-token") as host:
        left = await listed(host)
        print(f"{len(runs) - len(left)} of {len(runs)} runs were pruned before the drain")
        for run_id in left:
            assert (await host.call("runs.get", {"run_id": run_id}))["event_count"] == 21
            assert len((await host.call("runs.events", {"run_id": run_id}))["events"]) == 21
        for run_id in set(runs) - set(left):
            with pytest.raises(Refused, match="unknown run"):
                await host.call("runs.events", {"run_id": run_id})


# Retention.


async def test_the_daemon_prunes_by_itself_and_says_so(start: StartDaemon) -> None:
    daemon = start(retention_runs=2, retention_first_s=0.2, retention_every_s=0.2)
    async with peer(daemon) as client, peer(daemon, "host-token") as host:
        live = (await client.create())["id"]
        runs = await some(client, 4)
        await daemon.until("runs_deleted", 3)
        assert await listed(host) == [live, runs[3]]
    assert "retention: " in daemon.log
