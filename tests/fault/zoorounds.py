"""Rounds of the whole zoo at once, against a daemon; `scripts/tool_rounds` runs many of them.

Each animal is let run to its end, and stopped somewhere on its way: by a cancel, a deadline, its run's or its
connection's end. Looked at are what its handle says, what of it lives at that very moment, and what is left.
"""

import asyncio
import contextlib
import json
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tests.daemon import Daemon
from tests.fault.audit import read_log
from tests.fault.tooling import children, descriptors
from tests.fault.zoo import ALL, Animal, descendants, described, marked, memory, until_none
from tests.peer import Peer, peer

SHORT: dict[str, Any] = {
    "kill_after_s": 0.3,
    "settle_s": 0.3,
    "unconfirmed_s": 60.0,
}  # that of a slow machine is no survivor
CONNECTIONS = 4
STOP_WITHIN_S = 0.5
PROOF_MS = 15_000
LAST = ("done", "error")

Told = dict[str, Any]


@dataclass
class Figures:
    """What rounds came to; `wrong` is what should not be."""

    rounds: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    proven: int = 0  # stops of which nothing lived when they were confirmed
    chunks: int = 0
    dropped: int = 0
    largest: int = 0  # bytes of memory after a round
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        statuses = ", ".join(f"{count} {status}" for status, count in sorted(self.statuses.items()))
        return (
            f"{self.rounds} rounds: {statuses}, {self.proven} stops proven, {self.chunks} chunks"
            f" and {self.dropped} dropped, {self.largest / 2**20:.0f} MiB of memory, {len(self.wrong)} wrong"
        )


class Visit:
    """One animal, run once; `mark` is what all that comes of it has in its environment."""

    def __init__(self, animal: Animal, mark: str, caller: Peer, chance: random.Random, figures: Figures) -> None:
        self.animal = animal
        self.mark = mark
        self.caller = caller
        self.chance = chance
        self.figures = figures
        self.handle = ""
        self.run_id: str | None = None
        self.allowed = {self.animal.error} if animal.ends else set[str]()  # what its handle may say

    def wrong(self, what: str) -> None:
        self.figures.wrong.append(f"{self.animal.name}: {what}")

    def order(self, **params: Any) -> dict[str, Any]:
        run = {} if self.run_id is None else {"run_id": self.run_id}
        return {
            "tool": self.animal.name,
            "parameters": {"mark": self.mark, **self.animal.arguments},
            **run,
            **params,
        }

    async def pause(self) -> None:
        """Anywhere on its way; or once it is there, where it stays."""
        if self.animal.ends or not self.handle or self.chance.random() < 1 / 2:
            await asyncio.sleep(self.chance.uniform(0, STOP_WITHIN_S))
        else:
            await until_up(self.caller, self.handle)

    # Ways to its end.

    async def call(self) -> None:
        told = await self.caller.call("tools.call", self.order())
        self.nothing_lives()
        self.handle = told["handle"]
        await self.follow()

    async def invoke(self) -> None:
        await self._invoked()
        await self.follow()
        self.nothing_lives()

    async def in_a_run(self) -> None:
        self.run_id = (await self.caller.create())["id"]
        await self.call()

    async def by_cancel(self) -> None:
        await self._invoked()
        await self.pause()
        told = await self.caller.call("tools.cancel", {"handle": self.handle})
        if "cancel" in told:
            self.allowed = {"cancelled by client"}
        await self.proven()
        await self.follow()

    async def by_deadline(self) -> None:
        milliseconds = self.chance.randint(1, round(STOP_WITHIN_S * 1000))
        await self._invoked(timeout_ms=milliseconds)
        self.allowed.add(f"deadline of {milliseconds} ms")
        await self.follow()
        await self.proven()

    async def by_its_run(self) -> None:
        self.run_id = (await self.caller.create())["id"]
        await self._invoked()
        await self.pause()
        await self.caller.call("runs.cancel", {"run_id": self.run_id, "reason": "enough"})
        self.allowed.add("its run is over")
        await self.follow()
        await self.proven()

    async def by_its_connection(self, daemon: Daemon) -> None:
        async with peer(daemon) as leaving:
            calling = leaving.start("tools.call", self.order())
            await self.pause()
        with contextlib.suppress(ConnectionError):
            await calling

    async def _invoked(self, **params: Any) -> None:
        self.handle = (await self.caller.call("tools.invoke", self.order(**params)))["handle"]

    # What must hold.

    def nothing_lives(self) -> None:
        """Now: so it must be when a command's own end is told."""
        if not self.animal.early and (found := marked(self.mark)):
            self.wrong(f"it has ended, and there lives: {described(found)}")

    async def proven(self) -> None:
        """Waits for the proof of its stop, if the daemon stopped it: then nothing of it lives."""
        told = await self.caller.call("tools.cancel", {"handle": self.handle, "wait_ms": PROOF_MS})
        found = marked(self.mark)
        if "cancel" not in told:
            self.nothing_lives()
        elif told["cancel"] != "confirmed":
            self.wrong(f"its stop is {told['cancel']}")
        elif found:
            self.wrong(f"its stop is confirmed, and there lives: {described(found)}")
        else:
            self.figures.proven += 1

    async def follow(self) -> None:
        """Its chunks to the end: one last one, and what stands before it."""
        chunks: list[Told] = []
        after = dropped = 0
        while True:
            told = await self.caller.call("tools.poll", {"handle": self.handle, "after": after, "wait_ms": PROOF_MS})
            dropped += told["first_sequence"] - after
            after = told["first_sequence"] + len(told["chunks"])
            chunks += told["chunks"]
            if told["status"] != "running":
                break
        self.figures.chunks += len(chunks)
        self.figures.dropped += dropped
        self._judge(told)
        if [chunk["kind"] in LAST for chunk in chunks] != [False] * (len(chunks) - 1) + [True]:
            self.wrong(f"{len(chunks)} chunks, not with one last one: {chunks[-3:]}")
        elif chunks[-1].get("message", "") != told.get("error", ""):
            self.wrong(f"its last chunk is {chunks[-1]}, its poll {told}")
        if not dropped and told.get("error", "") == self.animal.error and self.animal.ends:
            self._compare(chunks[:-1])

    def _judge(self, told: Told) -> None:
        error = told.get("error", "")
        cancelled = error.startswith("cancelled by ") or error == "its run is over"
        status = "cancelled" if cancelled else "failed" if error else "succeeded"
        if error not in self.allowed or told["status"] != status:
            self.wrong(f"{told['status']}: {error!r}, not one of {sorted(self.allowed)}")
        if status == "succeeded" and (told["result"]["exit_code"] != 0 or told["result"]["duration_ms"] < 0):
            self.wrong(f"its result is {told['result']}")

    def _compare(self, chunks: list[Told]) -> None:
        for wanted, stream in ((self.animal.text, None), (self.animal.errors, "stderr")):
            text = "".join(one["text"] for one in chunks if one["kind"] == "text" and one.get("stream") == stream)
            if wanted is not None and text != wanted:
                self.wrong(f"it wrote {len(text)} characters: {text[:200]!r}")
        if self.animal.kinds is not None:
            around = pairwise([{"kind": ""}, *chunks])
            kinds = [one["kind"] for before, one in around if (before["kind"], one["kind"]) != ("text", "text")]
            if kinds != self.animal.kinds:
                self.wrong(f"its chunks are {chunks}")

    async def leave(self) -> None:
        """What its run's log has of it; then its handle is polled twice, and forgotten."""
        if not self.handle:
            return
        if self.run_id is not None:
            await self._logged(self.run_id)
        said = [await self.caller.call("tools.poll", {"handle": self.handle}) for _ in range(3)]
        if said[0] is None or said[1] is None or said[2] is not None:
            self.wrong(f"it was polled, and there came {said}")
        self.figures.statuses[said[0]["status"]] += 1

    async def _logged(self, run_id: str) -> None:
        events = [entry["event"] for entry in await read_log(self.caller, run_id)]
        types = [event["type"] for event in events if event.get("id") == self.handle]
        if types[:1] != ["tool_start"] or types[-1:] != ["tool_end"] or set(types[1:-1]) - {"tool_output_delta"}:
            self.wrong(f"its run's log has {types}")
        elif events[-1].get("error", "") not in self.allowed:
            self.wrong(f"its run's log ends with {events[-1]}")


async def zoo_round(daemon: Daemon, chance: random.Random, figures: Figures) -> None:
    """Visits every animal, twice and all at once; adds to the figures, and to what is wrong.

    The daemon runs, with the tools of `zoo.write_zoo` and the settings of `SHORT`; nobody else talks to it.
    """
    keeper = await keeper_of(daemon)
    before = descriptors(daemon.pid)
    flock = uuid.uuid4().hex  # no other round on this machine has it
    visits: list[Visit] = []
    async with contextlib.AsyncExitStack() as stack:
        follower, *callers = [await stack.enter_async_context(peer(daemon)) for _ in range(1 + CONNECTIONS)]
        await follower.call("tools.stream.subscribe", {})
        ways = []
        for animal in chance.sample(ALL, len(ALL)):
            for stopped in (not animal.ends, True):
                visits.append(Visit(animal, f"{flock}.{len(visits)}", chance.choice(callers), chance, figures))
                ways.append(_way(visits[-1], daemon, stopped=stopped)())
        await asyncio.gather(*ways)
        await until_idle(daemon)
        for visit in visits:
            await visit.leave()
        figures.wrong += _two_ends(follower)
    figures.rounds += 1
    figures.wrong += await left_of(daemon.pid, flock, keeper)
    await until_none(lambda: [daemon.pid] if descriptors(daemon.pid) > before else [])
    if (now := descriptors(daemon.pid)) > before:
        figures.wrong.append(f"the daemon has {now} descriptors, and had {before}")
    figures.largest = max(figures.largest, memory(daemon.pid, keeper))


async def until_up(caller: Peer, handle: str) -> None:
    """Until a tool has written something."""
    told = await caller.call("tools.poll", {"handle": handle, "after": 0, "wait_ms": PROOF_MS})
    assert told["chunks"], told


async def keeper_of(daemon: Daemon) -> int:
    """The keeper of a daemon that runs no tool now."""
    while not (below := children(daemon.pid)):  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.02)
    (keeper,) = below
    return keeper


async def until_idle(daemon: Daemon) -> None:
    """Until no tool runs, and what runs' logs must have of them is there."""
    names = ("handles_live", "handles_running", "tool_processes", "tool_records_waiting")
    figures = await asyncio.to_thread(daemon.metrics)
    while any(figures[name] for name in names):
        await asyncio.sleep(0.02)
        figures = await asyncio.to_thread(daemon.metrics)


async def left_of(daemon: int, flock: str, keeper: int) -> list[str]:
    """What is left of tools that have ended, after as long as that may take."""
    left = {
        "of the tools": await until_none(lambda: marked(flock)),
        "below the daemon": await until_none(lambda: [pid for pid in descendants(daemon) if pid != keeper]),
    }
    return [f"processes {where}: {found}" for where, found in left.items() if found]


def _way(visit: Visit, daemon: Daemon, *, stopped: bool) -> Callable[[], Awaitable[None]]:
    if not stopped:
        return visit.chance.choice([visit.call, visit.invoke, visit.in_a_run])
    ways = [visit.by_cancel, visit.by_cancel, visit.by_deadline, visit.by_its_run]
    return visit.chance.choice([*ways, lambda: visit.by_its_connection(daemon)])


def _two_ends(follower: Peer) -> list[str]:
    """Handles of which the live stream told more than one end."""
    ends: Counter[str] = Counter()
    while not follower.pushed.empty():
        params = json.loads(follower.pushed.get_nowait())["params"]
        ends[params["handle"]] += params["chunk"]["kind"] in LAST
    return [f"the live stream of {handle} has {count} ends" for handle, count in ends.items() if count > 1]
