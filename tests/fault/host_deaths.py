"""Hosts of tools that die in mid-call, each a process of its own; `scripts/host_rounds` runs many rounds.

A round is a stage (what the host has said by then) and a way to die. Its calls are polled, called and followed live;
each of them must end once, for every one who looks, within a second. Somebody else's tool goes on beside it.
"""

import asyncio
import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon import ROOT, Daemon
from tests.fault.dying_host import REQUESTS
from tests.hosting import Host, invoked_until_refused
from tests.peer import Peer, peer

STAGES = ("silent", "streaming", "unread", "stalled", "ended")
WAYS = ("kill", "reset", "half")
ROUNDS = tuple(itertools.product(STAGES, WAYS))
CALLED = 2  # of the REQUESTS; one more is cancelled before, all others are polled
ENDED_S = 1.0  # after the death
TERMINAL = ("done", "error")
SOME = 20  # chunks: the stream is under way


@dataclass
class Figures:
    """What the rounds came to."""

    rounds: int = 0
    handles: int = 0
    slowest_s: float = 0.0
    slowest_round: str = ""
    slowest_other_s: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.rounds} hosts died, {self.handles} handles ended, {len(self.wrong)} wrong, the last of a round"
            f" after {self.slowest_s * 1000:.0f} ms at most ({self.slowest_round}); other hosts' calls took"
            f" {self.slowest_other_s * 1000:.0f} ms at most"
        )


class DyingHost:
    """A process of `tests.fault.dying_host`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def says(self, word: str) -> None:
        """Waits for it."""
        assert self._process.stdout is not None
        said = (await self._process.stdout.readline()).decode().strip()
        assert said == word, f"the host said {said!r}"

    def tell(self, line: str) -> None:
        """A line on its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    async def die(self, way: str) -> None:
        """Its socket is closed, or half of it, when this returns."""
        if way == "kill":
            self._process.kill()
            await self._process.wait()
        else:
            self.tell(way)
            await self.says("dead")


@contextlib.asynccontextmanager
async def dying_host(daemon: Daemon, tool: str, stage: str) -> AsyncIterator[DyingHost]:
    """A host of `tool`, as far as its registration."""
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-m", "tests.fault.dying_host", daemon.url, tool, stage]
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT)
    host = DyingHost(process)
    try:
        host.tell(daemon.token())
        await host.says("ready")
        yield host
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Watcher:
    """What one who looks at handles has seen of each: sequences and chunks."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self._news = asyncio.Event()

    def add(self, handle: str, sequence: int, chunk: dict[str, Any]) -> bool:
        """One more; whether it is the last one."""
        self.seen.setdefault(handle, []).append((sequence, chunk))
        self._news.set()
        return chunk["kind"] in TERMINAL

    async def until_in_midst(self, handle: str) -> None:
        """Waits until some of it were seen."""
        while len(self.seen.get(handle, [])) < SOME:
            self._news.clear()
            await self._news.wait()

    async def follow(self, viewer: Peer, handles: set[str]) -> None:
        """The live stream, until all of these have ended."""
        left = set(handles)
        while left:
            event = await viewer.next("tools.stream.event")
            if self.add(event["handle"], event["sequence"], event["chunk"]):
                left.discard(event["handle"])

    async def poll(self, caller: Peer, handle: str) -> None:
        """Polls with `after`, until it has ended."""
        after = 0
        while True:
            answer = await caller.call("tools.poll", {"handle": handle, "wait_ms": 10_000, "after": after})
            for place, chunk in enumerate(answer["chunks"]):
                self.add(handle, answer["first_sequence"] + place, chunk)
            after = answer["first_sequence"] + len(answer["chunks"])
            if answer["status"] != "running":
                return

    def wrong(self, handles: set[str]) -> list[str]:
        """Handles without exactly one last chunk, in its place, and sequences that do not rise."""
        wrong = []
        for handle in handles:
            seen = self.seen.get(handle, [])
            ends = [chunk["kind"] in TERMINAL for _, chunk in seen]
            if ends.count(True) != 1 or not ends[-1]:
                wrong.append(f"{handle}: {ends.count(True)} last chunks among {len(ends)}")
            sequences = [sequence for sequence, _ in seen]
            if sequences != sorted(set(sequences)):
                wrong.append(f"{handle}: sequences {sequences}")
        return wrong


async def death_round(daemon: Daemon, stage: str, way: str, figures: Figures) -> None:
    """One host, from its start to the last look at its handles."""
    async with (
        dying_host(daemon, "dying", stage) as dying,
        peer(daemon) as caller,
        peer(daemon) as viewer,
        _others(daemon, figures),
    ):
        await viewer.call("tools.stream.subscribe", {})
        handles = [(await caller.call("tools.invoke", {"tool": "dying"}))["handle"] for _ in range(REQUESTS - CALLED)]
        calls = [caller.start("tools.call", {"tool": "dying"}) for _ in range(CALLED)]
        await dying.says("asked")
        handles += await _called(caller, handles, calls, stage)
        handles += await _filled(caller) if stage in ("unread", "stalled") else []
        cancelled = handles[0] if stage != "ended" else None
        if cancelled is not None:
            await caller.call("tools.cancel", {"handle": cancelled})
        polls, follows, all_ = Watcher(), Watcher(), set(handles)
        follow = asyncio.create_task(follows.follow(viewer, all_))
        watching = [asyncio.create_task(polls.poll(caller, handle)) for handle in handles]
        if cancelled is not None:
            watching.append(caller.start("tools.cancel", {"handle": cancelled, "wait_ms": 30_000}))
        if stage in ("streaming", "stalled"):
            await polls.until_in_midst(handles[1])
        began = time.monotonic()
        await dying.die(way)
        await asyncio.gather(follow, *watching, *calls)
        _time(figures, time.monotonic() - began, f"{stage}, {way}")
        figures.wrong += await _wrong(caller, handles, cancelled, stage, calls)
        figures.wrong += polls.wrong(all_) + follows.wrong(all_)
        figures.wrong += _differences(polls, follows)
        while not viewer.pushed.empty():
            figures.wrong.append(f"after the end: {await viewer.next_frame()!r}")
    figures.rounds += 1
    figures.handles += len(handles)


def _time(figures: Figures, took_s: float, round_: str) -> None:
    if took_s > figures.slowest_s:
        figures.slowest_s, figures.slowest_round = took_s, round_


async def _called(caller: Peer, invoked: list[str], calls: "list[asyncio.Task[Any]]", stage: str) -> list[str]:
    """The handles of the calls, which their answers tell only at the end."""
    if stage == "ended":
        return [(await call)["handle"] for call in calls]
    live = (await caller.call("tools.handles"))["handles"]
    return [entry["handle"] for entry in live if entry["handle"] not in invoked]


async def _filled(caller: Peer) -> list[str]:
    """Invokes until the host is told no more: its outbox is full. The handles."""
    handles, refused = await invoked_until_refused(caller, "dying")
    assert refused.type == "overloaded"
    return handles


async def _wrong(
    caller: Peer, handles: list[str], cancelled: str | None, stage: str, calls: "list[asyncio.Task[Any]]"
) -> list[str]:
    """What a late look finds wrong: another status or error than there should be, something after the end."""
    wrong = []
    for handle in handles:
        poll = await caller.call("tools.poll", {"handle": handle, "after": 0})
        wanted = _wanted(handle, cancelled, stage)
        if (poll["status"], poll.get("error")) != wanted:
            wrong.append(f"{handle}: {poll['status']}, {poll.get('error')}; {wanted} was wanted")
        if poll["chunks"][-1]["kind"] not in TERMINAL:
            wrong.append(f"{handle}: {poll['chunks'][-1]} is its last chunk")
    for call in calls:
        answer = call.result()
        if (answer["status"], answer.get("error")) != _wanted(answer["handle"], None, stage):
            wrong.append(f"tools.call: {answer}")
    if cancelled is not None:
        told = await caller.call("tools.status", {"handle": cancelled})
        if told["cancel"] != "unconfirmed":
            wrong.append(f"a cancelled handle whose host has died: {told}")
    return wrong


def _wanted(handle: str, cancelled: str | None, stage: str) -> tuple[str, str | None]:
    if stage == "ended":
        return "succeeded", None
    return ("cancelled", "cancelled by client") if handle == cancelled else ("failed", "the host's connection ended")


def _differences(polls: Watcher, follows: Watcher) -> list[str]:
    """Handles whose last chunk is another one to who polls than to who follows."""
    pairs = ((handle, seen[-1:], follows.seen.get(handle, [])[-1:]) for handle, seen in polls.seen.items())
    return [f"{handle}: {one} and {other}" for handle, one, other in pairs if one != other]


@contextlib.asynccontextmanager
async def _others(daemon: Daemon, figures: Figures) -> AsyncIterator[None]:
    """Another host, whose tool is called again and again, and one call that is under way all the time.

    Its caller is somebody else: who follows all of their own handles sees none of these.
    """
    async with peer(daemon) as other, peer(daemon, "host-token") as caller:
        host = Host(other)
        await host.register("steady", "long")
        long = caller.start("tools.call", {"tool": "long"})
        asked = await host.asked()
        stopping = asyncio.Event()
        work = asyncio.create_task(_call_steadily(host, caller, stopping, figures))
        try:
            yield
        finally:
            stopping.set()
            await work
        await asked.answer("untouched")
        if (answer := await long).get("result") != "untouched":
            figures.wrong.append(f"another host's call: {answer}")


async def _call_steadily(host: Host, caller: Peer, stopping: asyncio.Event, figures: Figures) -> None:
    while not stopping.is_set():
        began = time.monotonic()
        call = caller.start("tools.call", {"tool": "steady"})
        await (await host.asked()).answer(1)
        if (answer := await call)["status"] != "succeeded":
            figures.wrong.append(f"another host's call: {answer}")
        figures.slowest_other_s = max(figures.slowest_other_s, time.monotonic() - began)
        await asyncio.sleep(0.005)  # it is to be there, not to be the load


async def _many(rounds: int, seed: int) -> Figures:
    figures, chance = Figures(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="carserver-hosts-") as folder:
        daemon = Daemon(Path(folder) / "state").start()
        try:
            while figures.rounds < rounds and not figures.wrong:
                for stage, way in chance.sample(ROUNDS, min(len(ROUNDS), rounds - figures.rounds)):
                    await death_round(daemon, stage, way, figures)
            left = {name: daemon.metrics()[name] for name in ("handles_live", "handles_running")}
            if any(left.values()):
                figures.wrong.append(f"left over: {left}")
            daemon.terminate()
        finally:
            if daemon.process is not None:
                daemon.kill()
    return figures


def main() -> int:
    """`host_rounds [ROUNDS [SEED]]`: one line of figures; 0 if every handle ended once, and within a second."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    figures = asyncio.run(_many(rounds, seed))
    for wrong in figures.wrong:
        print(wrong, file=sys.stderr)
    print(f"{figures} (seed {seed})")
    return 0 if not figures.wrong and figures.slowest_s <= ENDED_S else 1


if __name__ == "__main__":
    sys.exit(main())
