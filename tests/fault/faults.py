"""Rounds in which another call on the database's files fails each time; `scripts/fault_rounds` runs all there are.

The same piece of work is done on one daemon again and again, and its first write fails, then its second, and so on.
What is acknowledged must then be there once, what is refused must be nowhere, for readers, for a viewer, and after a
kill and a restart on a disk that is well. A failed fsync ends the daemon, so each of them has a daemon of its own, and
so has each call that fails as the daemon starts.
"""

import asyncio
import errno
import itertools
import json
import logging
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon import DEFECTS, EXIT_S, Daemon, NotStarted
from tests.fault.audit import GONE, Batch, Findings, audit_runs, read_log
from tests.fault.preload import Call, CannotPreload, Faults, compiled
from tests.peer import Peer, Refused, peer, records
from tests.trace import subscribe

SETTINGS: dict[str, object] = {
    "wal_bytes": 48 * 1024,  # so that there is a checkpoint in each round
    "probe_s": 0.02,
    "catch_up_retry_s": 0.02,
}
LARGE = "x" * 20_000
CURE = re.compile(r"; (make room on|see that) its disk|; start again")
STARTS = 40  # of each kind, at most: they are slow
COUNTED = 3  # pieces of work without a fault, to know how many calls there are: they differ a little

Seen = list[tuple[int, Any]]  # sequences and events


@dataclass(frozen=True)
class Fault:
    """What fails: `times` calls in a row."""

    call: Call
    error: int
    times: int = 1
    part: int = 0

    def __str__(self) -> str:
        times = f" {self.times} times" if self.times > 1 else ""
        return f"{self.call.name.lower()}{times} {errno.errorcode[self.error]}{' in part' if self.part else ''}"


WHILE_IT_RUNS = (
    Fault(Call.WRITE, errno.EIO),
    Fault(Call.WRITE, errno.ENOSPC, part=2_000),
    Fault(Call.WRITE, errno.ENOSPC, times=5),
    Fault(Call.READ, errno.EIO),  # SQLite takes this one for damage
    Fault(Call.READ, errno.ENOMEM),
)
AT_THE_START = (
    Fault(Call.OPEN, errno.EMFILE),
    Fault(Call.WRITE, errno.ENOSPC),
    Fault(Call.READ, errno.EIO),
    Fault(Call.WRITE, errno.EIO),
    Fault(Call.TRUNCATE, errno.EIO),
    Fault(Call.SYNC, errno.EIO),
)


@dataclass
class Figures:
    """What the rounds of one fault came to."""

    what: str
    rounds: int = 0
    hit: int = 0  # rounds in which the call was made, and failed
    refused: int = 0
    closed: int = 0  # streams of viewers
    ended: int = 0  # daemons
    found: Findings = field(default_factory=Findings)

    def note(self, wrong: str) -> None:
        """Something is not as it must be."""
        self.found.wrong.append(wrong)

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.rounds} rounds, {self.hit} hit, {self.refused} requests refused, "
            f"{self.closed} streams closed, {self.ended} daemons ended; {self.found.acknowledged} events acknowledged, "
            f"{self.found.lost} lost, {self.found.duplicated} duplicated, {len(self.found.wrong)} otherwise wrong"
        )


class Work:
    """One owner and one viewer, and all that they were told.

    Args:
        figures: Where what goes wrong is noted.
        may_end: Whether the daemon may end, with outcomes that are unknown; then it takes nothing after it said so.
    """

    def __init__(self, figures: Figures, *, may_end: bool = False) -> None:
        self.sent: list[Batch] = []  # but for what is refused as not done
        self.runs: list[str] = []
        self._figures = figures
        self._outcomes = {"not_done", "unknown"} if may_end else {"not_done"}
        self._is_to_end = False
        self._gone: tuple[type[Exception], ...] = GONE if may_end else ()
        self._numbers = itertools.count()

    async def once(self, owner: Peer, viewer: Peer) -> str | None:
        """A run that is created, watched, recorded in and read; its id, if its creation was acknowledged."""
        self._is_to_end = False
        run = await self._try(owner.create(f"run {next(self._numbers)}"))
        if run is None:
            return None
        run_id: str = run["id"]
        self.runs.append(run_id)
        await self._try(subscribe(viewer, run_id))
        await self._record(owner, run_id, 1)
        await self._read(owner, run_id)
        await self._record(owner, run_id, 3, LARGE)
        await asyncio.gather(*[self._record(owner, run_id, count) for count in (1, 2, 5)])
        await self._record(owner, run_id, 2)
        await self._read(owner, run_id)
        return run_id

    async def end(self, owner: Peer, viewer: Peer, run_id: str) -> None:
        """Now that nothing fails, the run comes to its end, and its viewer has seen all of it, in order, once."""
        batch = self._batch(run_id, [{"type": "agent_end", "text": "done"}])
        batch.answer = await owner.call("runs.record", batch.params)
        await subscribe(viewer, run_id)  # again, from the beginning: the stream that there was may have been closed
        log = [(entry["sequence"], entry["event"]) for entry in await read_log(owner, run_id)]
        *before, whole = await self._seen(viewer, run_id)
        if whole != log or any(stream != log[: len(stream)] for stream in before):
            self._figures.note(f"a viewer of {run_id} saw what its log is not")

    async def _seen(self, viewer: Peer, run_id: str) -> list[Seen]:
        """The streams of a run up to the first that is at its end."""
        streams: list[Seen] = []
        while True:
            message = json.loads(await viewer.next_frame())
            params = message["params"]
            if message["method"] == "runs.trace.closed":
                self._figures.closed += 1
            elif params["run_id"] == run_id:
                record = params["record"]
                if record["record"] == "ended" and len(streams) > 1:
                    return streams
                if record["record"] == "started":
                    streams.append([])
                elif record["record"] == "event":
                    streams[-1].append((record["sequence"], record["event"]))

    async def _read(self, owner: Peer, run_id: str) -> None:
        await self._try(owner.call("runs.get", {"run_id": run_id}))
        await self._try(owner.call("runs.events", {"run_id": run_id}))
        await self._try(owner.call("runs.list", {"limit": 3}))

    async def _record(self, owner: Peer, run_id: str, count: int, text: str = "") -> None:
        number = next(self._numbers)
        batch = self._batch(run_id, [{"type": "text_delta", "of": number, "n": n, "text": text} for n in range(count)])
        is_to_end = self._is_to_end
        batch.answer = await self._try(owner.call("runs.record", batch.params), batch)
        if is_to_end and batch.answer is not None:
            self._figures.note(f"{batch.batch_id} was acknowledged after a failed fsync")

    def _batch(self, run_id: str, events: list[dict[str, Any]]) -> Batch:
        batch = Batch(run_id, f"batch {next(self._numbers)}", events)
        self.sent.append(batch)
        return batch

    async def _try(self, call: Awaitable[Any], batch: Batch | None = None) -> Any:
        """The answer, or None where it was refused as it may be, or the daemon has ended."""
        try:
            return await call
        except Refused as refused:
            self._figures.refused += 1
            outcome = refused.data.get("outcome")
            if refused.type != "unavailable" or outcome not in self._outcomes:
                self._figures.note(f"refused otherwise: {refused} {refused.data}")
            self._is_to_end = "unknown" in self._outcomes
            if outcome == "not_done" and batch is not None:
                self.sent.remove(batch)
        except self._gone:
            pass
        return None


def _numbers(calls: int, rounds: int | None) -> list[int]:
    """Of the calls that are to fail: all, or so many, evenly spread, the first and the last among them."""
    if rounds is None or rounds >= calls:
        return list(range(1, calls + 1))
    return [1 + n * (calls - 1) // (rounds - 1) for n in range(rounds)]


async def while_it_runs(faults: Faults, state: Path, fault: Fault, rounds: int | None = None) -> Figures:
    """One daemon, and a round for each of the calls that the work makes, or for `rounds` of them."""
    figures = Figures(str(fault))
    work = Work(figures)
    daemon = Daemon(state, wrapper=faults.wrapper, **SETTINGS).start()
    try:
        async with peer(daemon) as owner, peer(daemon, "host-token") as viewer:
            for number in _numbers(await _calls(faults, fault.call, work, owner, viewer), rounds):
                faults.fail(fault.call, number, times=fault.times, error=fault.error, part=fault.part)
                run_id = await work.once(owner, viewer)
                figures.rounds += 1
                figures.hit += faults.failed(fault.call) > 0
                faults.heal()
                await daemon.until("storage_writable", 1)
                if run_id is not None:
                    await work.end(owner, viewer, run_id)
            await _compare(daemon, work, figures)
        daemon.kill()
        daemon.start()
        await _compare(daemon, work, figures)
    finally:
        _end(daemon)
    return figures


async def _calls(faults: Faults, call: Call, work: Work, owner: Peer, viewer: Peer) -> int:
    """How many of these calls the work makes, at the most, when none of them fails."""
    most = 0
    for _ in range(COUNTED):
        before = faults.seen(call)
        await work.once(owner, viewer)
        most = max(most, faults.seen(call) - before)
    return most


async def failed_fsyncs(faults: Faults, state: Path, rounds: int | None = None) -> Figures:
    """A daemon for each fsync of the work that fails, or for `rounds` of them."""
    figures = Figures("failed fsync")
    work = Work(figures, may_end=True)
    daemon = Daemon(state, wrapper=faults.wrapper, **SETTINGS).start()
    try:
        async with peer(daemon) as owner, peer(daemon, "host-token") as viewer:
            calls = await _calls(faults, Call.SYNC, work, owner, viewer)
        for number in _numbers(calls, rounds):
            async with peer(daemon) as owner, peer(daemon, "host-token") as viewer:
                faults.fail(Call.SYNC, number, times=1)  # the next one succeeds, as the kernel has it, and would lie
                logged = len(daemon.log)
                run_id = await work.once(owner, viewer)
                figures.rounds += 1
                figures.hit += (hit := faults.failed(Call.SYNC) > 0)
                if hit:
                    await _has_ended(daemon, figures, logged)
                    await viewer.closed()
                    if number == 1 and run_id is not None:
                        figures.note("a run was acknowledged whose commit was not confirmed")
            faults.heal()
            if hit:
                daemon.start()
            await _look_and_send_again(daemon, work, figures)
            if run_id is not None:
                await _compare_shown(daemon, viewer, run_id, figures)
    finally:
        _end(daemon)
    return figures


async def _has_ended(daemon: Daemon, figures: Figures, logged: int) -> None:
    """By itself, with exit code 1, and it said why, once."""
    assert daemon.process is not None
    code = await asyncio.to_thread(daemon.process.wait, EXIT_S)
    assert daemon.process.stdout is not None
    daemon.process.stdout.close()
    daemon.process = None
    figures.ended += 1
    said = daemon.log[logged:]
    if code != 1 or said.count("fsync failed") != 1:
        figures.note(f"exit {code}: {said}")


async def _compare_shown(daemon: Daemon, viewer: Peer, run_id: str, figures: Figures) -> None:
    """What a viewer was shown before the daemon ended is there after it: it was durable before it was shown."""
    frames = [viewer.pushed.get_nowait() for _ in range(viewer.pushed.qsize())]
    shown = [params["record"] for params in records(frames) if "record" in params]  # and one says that it drains
    async with peer(daemon) as owner:
        log = await read_log(owner, run_id)
    events = [(record["sequence"], record["event"]) for record in shown if record["record"] == "event"]
    if events != [(entry["sequence"], entry["event"]) for entry in log[: len(events)]]:
        figures.note(f"a viewer of {run_id} was shown what is not there now")


async def _look_and_send_again(daemon: Daemon, work: Work, figures: Figures) -> None:
    """What was acknowledged is there; what is unknown is there whole or not at all, and once when it is sent again."""
    async with peer(daemon) as owner:
        figures.found.add(await audit_runs(owner, work.sent))
        for batch in work.sent:
            if batch.answer is None:
                batch.answer = await owner.call("runs.record", batch.params)
    figures.found.acknowledged = 0  # they are counted with those that were sent again
    await _compare(daemon, work, figures, all_runs=False)


async def at_the_start(
    faults: Faults, state: Path, fault: Fault, stop: Callable[[Daemon], object], rounds: int | None = None
) -> Figures:
    """A start for each of the calls that it makes, or for `rounds` of them: it serves, or says why not.

    Before it, `stop` has stopped the daemon: killed, all is in the write-ahead log; terminated, all is in the database.
    """
    figures = Figures(f"start after {stop.__name__}, {fault}")
    work = Work(figures)
    daemon = Daemon(state, wrapper=faults.wrapper, **SETTINGS).start()
    try:
        async with peer(daemon) as owner, peer(daemon, "host-token") as viewer:
            await work.once(owner, viewer)
        stop(daemon)
        before = faults.seen(fault.call)
        daemon.start()
        for number in _numbers(faults.seen(fault.call) - before, rounds):
            stop(daemon)
            logged = len(daemon.log)
            faults.fail(fault.call, number, error=fault.error)
            try:
                daemon.start()
            except NotStarted:
                figures.ended += 1
                *told, last = daemon.log[logged:].splitlines()
                if not last.startswith(f"carserver: cannot open {state}/") or not CURE.search(last):
                    figures.note(f"it did not start, and said {told} {last}")
            figures.rounds += 1
            figures.hit += faults.failed(fault.call) > 0
            faults.heal()
            if daemon.process is None:
                daemon.start()
            if " is kept as " in daemon.log:
                figures.note("a sound database was set aside")
            await daemon.until("storage_writable", 1)
            async with peer(daemon) as owner, peer(daemon, "host-token") as viewer:
                await work.once(owner, viewer)
            await _compare(daemon, work, figures)
    finally:
        _end(daemon)
    return figures


async def _compare(daemon: Daemon, work: Work, figures: Figures, *, all_runs: bool = True) -> None:
    """What the daemon has, and what it has told."""
    async with peer(daemon) as owner:
        figures.found.acknowledged = 0
        figures.found.add(await audit_runs(owner, work.sent))
        runs = [run["id"] async for run in listed(owner)]
    if sorted(runs) != sorted(work.runs) and (all_runs or not set(work.runs) <= set(runs)):
        figures.note(f"{len(runs)} runs are there, {len(work.runs)} were acknowledged")
    counted = await asyncio.to_thread(daemon.metrics)
    if any(counted[defect] for defect in DEFECTS):
        figures.note(f"defects: {daemon.log[-3000:]}")


async def listed(owner: Peer) -> AsyncIterator[dict[str, Any]]:
    """All runs that `owner` may see, page by page."""
    page: dict[str, Any] = {}
    while True:
        answer = await owner.call("runs.list", page)
        for run in answer["runs"]:
            yield run
        if answer["next_page"] is None:
            return
        page = {"page": answer["next_page"]}


def _end(daemon: Daemon) -> None:
    if daemon.process is not None:
        daemon.kill()


async def _all(folder: Path) -> bool:
    faults = Faults(compiled(folder), folder / "faults")
    places = (folder / f"state-{number}" for number in itertools.count())
    good = True
    for fault in WHILE_IT_RUNS:
        good &= _tell(await while_it_runs(faults, next(places), fault))
    good &= _tell(await failed_fsyncs(faults, next(places)))
    for fault, stop in itertools.product(AT_THE_START, (Daemon.kill, Daemon.terminate)):
        good &= _tell(await at_the_start(faults, next(places), fault, stop, STARTS))
    return good


def _tell(figures: Figures) -> bool:
    print(figures, flush=True)
    for wrong in figures.found.wrong:
        print(f"  {wrong}", file=sys.stderr)
    return figures.found.good


def main() -> int:
    """`fault_rounds`: a line of figures for each fault; 0 if nothing was lost, doubled or wrong."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would tell of each call that an end has cut off
    with tempfile.TemporaryDirectory(prefix="carserver-faults-") as folder:
        try:
            return 0 if asyncio.run(_all(Path(folder))) else 1
        except CannotPreload as reason:
            print(f"error: {reason}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
