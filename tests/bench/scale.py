"""What a run of many events, and a store of many runs, cost: `scripts/scale [EVENTS [RUNS]]`.

Every figure is taken by a client over a socket, of a daemon with its default durability: a median, and in brackets the
least and the most. What grows with the store shows in the ratios.
"""

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from tests.daemon import Daemon, running
from tests.peer import Peer, peer

EVENTS, RUNS = 1_000_000, 100_000
BATCH = 1_000  # events, the most that one call takes
TIMED = 50  # batches at either end of the run, and single appends
LOOKS = 100  # reads of each kind
IN_FLIGHT = 64
STARTS = 7


def main() -> None:
    """Runs it."""
    events, runs = (int(given) for given in (*sys.argv[1:], *map(str, (EVENTS, RUNS)[len(sys.argv) - 1 :])))
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_long_run(Path(folder) / "long", events))
        asyncio.run(_many_runs(Path(folder) / "many", runs))


async def _long_run(state: Path, events: int) -> None:
    print(f"a run of {events:,} events of {len(json.dumps(_event(0)))} bytes")
    with running(state, run_events=events + 10 * TIMED) as daemon:
        async with peer(daemon) as client:
            run = await client.create()
            first_single = [await _timed(client.record, run["id"], _event(n)) for n in range(TIMED)]
            batches: list[float] = []
            done = TIMED
            while done < events:
                count = min(BATCH, events - done)
                batches.append(await _timed(client.record, run["id"], *map(_event, range(done, done + count))))
                done += count
            last_single = [await _timed(client.record, run["id"], _event(n)) for n in range(TIMED)]
            first, last = batches[1 : TIMED + 1], batches[-TIMED - 1 : -1]
            _say(f"append {BATCH} at the start", first)
            _say(f"append {BATCH} at the end", last, against=first)
            _say("append 1 at the start", first_single)
            _say("append 1 at the end", last_single, against=first_single)
            await _pages(client, run["id"], events)
            await _subscriptions(daemon, run["id"], run["epoch"], events)
    _say("ready", _ready(state))


async def _pages(client: Peer, run_id: str, events: int) -> None:
    chosen = random.Random(1)
    for limit in (100, BATCH):
        places = [chosen.randrange(max(events - limit, 1)) for _ in range(LOOKS)]
        times = [
            await _timed(client.call, "runs.events", {"run_id": run_id, "after": place, "limit": limit})
            for place in places
        ]
        _say(f"a page of {limit} anywhere", times)


async def _subscriptions(daemon: Daemon, run_id: str, epoch: str, events: int) -> None:
    replies, whole = [], []
    behind = min(BATCH, events)
    for _ in range(LOOKS // 4):
        async with peer(daemon) as viewer:
            began = time.perf_counter()
            params = {"run_id": run_id, "cursor": events - behind, "epoch": epoch}
            subscribed = await viewer.call("runs.trace.subscribe", params)
            replies.append(time.perf_counter() - began)
            while (await viewer.next("runs.trace.event"))["cursor"] < subscribed["run"]["event_count"]:
                pass
            whole.append(time.perf_counter() - began)
    _say(f"subscribing {behind} before the end, its reply", replies)
    _say("and all the rest of the log", whole)


async def _many_runs(state: Path, runs: int) -> None:
    print(f"a store of {runs:,} runs of 2 events")
    empty = _ready(state)
    with running(state, grace_s=86_400) as daemon:
        async with peer(daemon) as client:
            await _create(client, 0, 1_000)
            few = await _lists(client)
            await _create(client, 1_000, runs)
            many = await _lists(client)
            for name, times in many.items():
                _say(name, times, against=few[name])
    print(f"  {'on disk':<44} {_size(state) / runs:9.0f} bytes a run")
    _say("ready", _ready(state), against=empty)


async def _create(client: Peer, first: int, end: int) -> None:
    room = asyncio.Semaphore(IN_FLIGHT)

    async def one(number: int) -> None:
        async with room:
            run = await client.create(session_id=f"session {number % 100}", agent_id=f"agent {number % 10}")
            await client.record(
                run["id"], {"type": "agent_start", "prompt": "p"}, {"type": "agent_end", "text": "done"}
            )

    for start in range(first, end, 1_000):
        await asyncio.gather(*map(one, range(start, min(start + 1_000, end))))


async def _lists(client: Peer) -> dict[str, list[float]]:
    asked: dict[str, dict[str, Any]] = {
        "runs.list, the first page": {},
        "runs.list of a session": {"session_id": "session 7", "limit": 10},
        "runs.list of an agent that completed": {"agent_id": "agent 3", "status": "completed", "limit": 10},
        "runs.list of a status that none has": {"status": "failed"},
    }
    times = {
        name: [await _timed(client.call, "runs.list", dict(params)) for _ in range(LOOKS)]
        for name, params in asked.items()
    }
    page: dict[str, Any] = {"limit": 1_000}
    later = []
    for _ in range(20):
        began = time.perf_counter()
        found = await client.call("runs.list", page)
        later.append(time.perf_counter() - began)
        if found["next_page"] is None:
            break
        page = {"limit": 1_000, "page": found["next_page"]}
    return times | {"runs.list, pages of 1,000 one after the other": later}


def _ready(state: Path) -> list[float]:
    """How long the daemon takes to listen, several times."""
    times = []
    for _ in range(STARTS):
        daemon = Daemon(state, grace_s=86_400)
        began = time.perf_counter()
        daemon.start()
        times.append(time.perf_counter() - began)
        daemon.terminate()
    return times


async def _timed(call: Callable[..., Awaitable[Any]], *args: Any) -> float:
    began = time.perf_counter()
    await call(*args)
    return time.perf_counter() - began


def _size(state: Path) -> int:
    return sum(file.stat().st_size for file in state.glob("carserver.db*"))


def _event(number: int) -> dict[str, Any]:
    return {"type": "text_delta", "text": f"{number:>8} " + "words of an agent " * 8}


def _say(what: str, seconds: Sequence[float], against: Sequence[float] | None = None) -> None:
    middle = statistics.median(seconds)
    ratio = "" if against is None else f"   {middle / statistics.median(against):.2f} times that of few"
    print(f"  {what:<44} {middle * 1000:9.2f} ms ({min(seconds) * 1000:.2f} to {max(seconds) * 1000:.2f}){ratio}")


if __name__ == "__main__":
    main()
