"""Rounds of reading a run's trace through a proxy that cuts, while the daemon is killed; `scripts/trace_rounds`.

A producer records 20,000 events; the daemon is killed and started again in between, three times. What `car.runs.trace`
yields must be every record once, in order, and the end.
"""

import asyncio
import contextlib
import logging
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed

from carserver.client import Traced
from carserver.client.car import connect
from tests.daemon import Daemon
from tests.fault.cutting import Cut, Cutting, cutting
from tests.peer import peer

EVENTS = 20_000
KILLS = 3
PADS = (0, 50, 200)  # characters of an event, at most one of these; one in LARGE_OF has LARGE
LARGE, LARGE_OF = 70_000, 2_000  # a frame with a long header, of more than one piece
BATCHES = (1, 30, 300)  # events of a batch, at most: one of these
GRACE_S = 600.0  # however slow the machine is, the run is not interrupted

Wanted = list[dict[str, Any]]


@dataclass
class Figures:
    """What the rounds came to."""

    rounds: int = 0
    records: int = 0
    connections: int = 0
    kills: int = 0
    within_frames: int = 0
    cuts: dict[Cut, int] = field(default_factory=lambda: dict.fromkeys(Cut, 0))
    slowest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cuts = ", ".join(f"{count} {cut}" for cut, count in self.cuts.items())
        return (
            f"{self.rounds} rounds, {self.records} records read, {self.kills} kills, {self.connections} connections "
            f"({cuts}; {self.within_frames} in the middle of a frame), {len(self.wrong)} wrong, "
            f"slowest round {self.slowest_s:.1f} s"
        )


async def trace_round(daemon: Daemon, chance: random.Random, figures: Figures) -> None:
    """One round. The daemon runs, before and after."""
    began = time.monotonic()
    wanted = list(_events(chance))
    async with cutting(daemon.url, chance) as proxy, connect(proxy.url, token=daemon.token()) as car:
        async with peer(daemon) as owner:
            run_id = (await owner.create())["id"]
        proxy.cuts = True
        first, records = asyncio.Event(), list[Traced]()

        async def read() -> None:
            async for record in car.runs.trace(run_id):
                records.append(record)
                first.set()

        async with asyncio.TaskGroup() as work:
            reader = work.create_task(read())
            await first.wait()
            proxy.cut_all()  # with nothing but the beginning told: which must not be told again
            figures.kills += await _produce(daemon, proxy, run_id, wanted, chance)
            await reader
    figures.rounds += 1
    figures.records += len(records)
    figures.connections += proxy.connections
    figures.within_frames += proxy.within_frames
    for cut, count in proxy.done.items():
        figures.cuts[cut] += count
    figures.slowest_s = max(figures.slowest_s, time.monotonic() - began)
    figures.wrong += audit(records, wanted)


def _events(chance: random.Random) -> Iterator[dict[str, Any]]:
    yield {"type": "agent_start", "prompt": "count"}
    for number in range(1, EVENTS - 1):
        pad = LARGE if number % LARGE_OF == 0 else chance.randint(0, chance.choice(PADS))
        yield {"type": "text_delta", "n": number, "text": "x" * pad}
    yield {"type": "agent_end", "text": "counted"}


async def _produce(daemon: Daemon, proxy: Cutting, run_id: str, events: Wanted, chance: random.Random) -> int:
    """Records all of it, batch by batch; what was not acknowledged when the daemon was killed is sent again.

    How often it was killed.
    """
    batches = _batches(run_id, events, chance)
    killed = 0
    kills = set(chance.sample(range(1, len(batches) + 1), KILLS))
    while batches:
        with contextlib.suppress(ConnectionError, ConnectionClosed):
            async with peer(daemon) as producer:
                while batches:
                    recorded = producer.start("runs.record", batches[0])
                    if len(batches) in kills:
                        kills.remove(len(batches))
                        await _kill(daemon, proxy, chance)
                        killed += 1
                    await recorded
                    batches.pop(0)
    return killed


def _batches(run_id: str, events: Wanted, chance: random.Random) -> list[dict[str, Any]]:
    """The params of `runs.record`, in their order."""
    batches: list[dict[str, Any]] = []
    place = 0
    while place < len(events):
        taken = events[place : place + chance.randint(1, chance.choice(BATCHES))]
        batches.append({"run_id": run_id, "events": taken, "batch_id": f"from {place}"})
        place += len(taken)
    return batches


async def _kill(daemon: Daemon, proxy: Cutting, chance: random.Random) -> None:
    """Kills it amid a commit, before or after; it comes back elsewhere."""
    await asyncio.sleep(chance.uniform(0, 0.01))
    daemon.kill()
    await asyncio.to_thread(daemon.start)
    proxy.lead_to(daemon.url)


def audit(records: list[Traced], wanted: Wanted) -> list[str]:
    """What is wrong with what a trace of a run of these events yielded; the first of each kind."""
    kinds = [record.kind for record in records]
    if kinds != ["started", *["event"] * len(wanted), "ended"]:
        counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        return [f"not the beginning, {len(wanted)} events and the end: {counts}, last {kinds[-1:]}"]
    wrong = [_place(place, record, wanted[place]) for place, record in enumerate(records[1:-1])]
    first = next(filter(None, wrong), "")
    end = records[-1]
    if (end.cursor, end.run_status) != (len(wanted), "completed"):
        return [first, f"the end is at {end.cursor}, {end.run_status}"]
    return [first] if first else []


def _place(place: int, record: Traced, event: dict[str, Any]) -> str:
    found = (record.record["sequence"], record.cursor)
    if found != (place, place + 1):
        return f"record {place} has sequence and cursor {found}"
    return "" if record.record["event"] == event else f"record {place} is another event: {record.record['event']}"


async def _many(rounds: int, seed: int) -> Figures:
    figures, chance = Figures(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="carserver-traces-") as folder:
        daemon = Daemon(Path(folder) / "state", grace_s=GRACE_S).start()
        try:
            while figures.rounds < rounds and not figures.wrong:
                await trace_round(daemon, chance, figures)
            daemon.terminate()
        finally:
            if daemon.process is not None:
                daemon.kill()
    return figures


def main() -> int:
    """`trace_rounds [ROUNDS [SEED]]`: one line of figures; 0 if every trace was whole, and nothing was in it twice."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of calls that a kill has cut off it would tell each
    figures = asyncio.run(_many(rounds, seed))
    for wrong in figures.wrong:
        print(wrong, file=sys.stderr)
    print(f"{figures} (seed {seed})")
    return 0 if not figures.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
