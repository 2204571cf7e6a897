"""What a log must hold of the batches that were sent: the checker of the fault tests, and the producers it checks."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from websockets.exceptions import ConnectionClosed

from tests.peer import Peer, Refused

GONE = (ConnectionError, ConnectionClosed, TimeoutError)


@dataclass
class Batch:
    """One `runs.record` as it was sent, and its answer if one came."""

    run_id: str
    batch_id: str
    events: list[dict[str, Any]]
    answer: dict[str, Any] | None = None

    @property
    def params(self) -> dict[str, Any]:
        """To be sent, once or again."""
        return {"run_id": self.run_id, "events": self.events, "batch_id": self.batch_id}


@dataclass
class Findings:
    """What is wrong with a log; nothing, if all is well. `lost` and `duplicated` count events."""

    acknowledged: int = 0
    lost: int = 0
    duplicated: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing was found."""
        return not (self.lost or self.duplicated or self.wrong)

    def add(self, other: "Findings") -> None:
        """Sums two."""
        self.acknowledged += other.acknowledged
        self.lost += other.lost
        self.duplicated += other.duplicated
        self.wrong += other.wrong


def audit(log: Sequence[dict[str, Any]], sent: Sequence[Batch]) -> Findings:
    """Compares one run's log (entries of `runs.events`) with all that was sent to it.

    Every acknowledged batch stands whole where its answer says; every other one stands whole somewhere or not at all;
    nothing stands there twice, and nothing that was never sent; sequences have no gap, times do not go back.
    """
    found = Findings()
    for place, entry in enumerate(log):
        if entry["sequence"] != place:
            found.wrong.append(f"place {place} has sequence {entry['sequence']}")
            break
    if any(after["timestamp_ms"] < before["timestamp_ms"] for before, after in itertools.pairwise(log)):
        found.wrong.append("times go back")
    by_sequence = {entry["sequence"]: _text(entry["event"]) for entry in log}
    sequences: dict[str, list[int]] = {}
    for entry in log:
        sequences.setdefault(_text(entry["event"]), []).append(entry["sequence"])
    for batch in sent:
        events = [_text(event) for event in batch.events]
        first = sequences.get(events[0], [0])[0]
        if batch.answer is not None:
            found.acknowledged += len(events)
            first = batch.answer["first_sequence"]
        there = [by_sequence.get(first + place) == event for place, event in enumerate(events)]
        found.duplicated += sum(max(0, len(sequences.get(event, ())) - 1) for event in events)
        if batch.answer is not None:
            found.lost += there.count(False)
        elif any(there) and not all(there):
            found.wrong.append(f"batch {batch.batch_id} is there in part")
    known = {_text(event) for batch in sent for event in batch.events}
    if strangers := sequences.keys() - known:
        found.wrong.append(f"{len(strangers)} events that nobody sent")
    return found


def _text(event: Mapping[str, Any]) -> str:
    return json.dumps(event, sort_keys=True)


async def read_log(peer: Peer, run_id: str) -> list[dict[str, Any]]:
    """The whole log of a run, page by page."""
    log: list[dict[str, Any]] = []
    cursor, more = 0, True
    while more:
        page = await peer.call("runs.events", {"run_id": run_id, "after": cursor})
        log += page["events"]
        cursor, more = page["cursor"], page["has_more"]
    return log


async def audit_runs(peer: Peer, sent: Sequence[Batch]) -> Findings:
    """`audit` of every run that something was sent to."""
    found = Findings()
    by_run: dict[str, list[Batch]] = {}
    for batch in sent:
        by_run.setdefault(batch.run_id, []).append(batch)
    for run_id, batches in by_run.items():
        log = await read_log(peer, run_id)
        found.add(audit(log, batches))
        count = (await peer.call("runs.get", {"run_id": run_id}))["event_count"]
        if count != len(log):
            found.wrong.append(f"event_count {count}, but {len(log)} events")
    return found


class Producer:
    """Sends batches over one connection, `window` of them under way, until it is refused or the connection ends.

    Args:
        name: Tells its events from those of others.
        peer: The connection.
        run_ids: Where it records, in turns.
        sizes: Events of its batches, in turns.
        window: Batches under way.
        acknowledgements: Released for each.
    """

    def __init__(
        self,
        name: str,
        peer: Peer,
        run_ids: Sequence[str],
        *,
        sizes: Sequence[int] = (1, 7, 20),
        window: int = 8,
        acknowledgements: asyncio.Semaphore,
    ) -> None:
        self.sent: list[Batch] = []
        self.refusals: list[Refused] = []
        self._name = name
        self._peer = peer
        self._runs = itertools.cycle(run_ids)
        self._sizes = itertools.cycle(sizes)
        self._window = window
        self._acknowledgements = acknowledgements

    async def run(self) -> None:
        """Produces."""
        async with asyncio.TaskGroup() as lanes:
            for _ in range(self._window):
                lanes.create_task(self._lane())

    async def _lane(self) -> None:
        with contextlib.suppress(*GONE):
            while not self.refusals:
                batch = self._next()
                self.sent.append(batch)
                try:
                    batch.answer = await self._peer.call("runs.record", batch.params)
                except Refused as refusal:
                    self.refusals.append(refusal)
                else:
                    self._acknowledgements.release()

    def _next(self) -> Batch:
        number = len(self.sent)
        events = [
            {"type": "text_delta", "producer": self._name, "batch": number, "n": n, "text": "é" * (n * 13 % 97)}
            for n in range(next(self._sizes))
        ]
        return Batch(next(self._runs), f"{self._name}-{number}", events)
