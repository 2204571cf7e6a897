"""Storage for unit tests: real files, and commands as the methods would make them."""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carserver.config import Settings
from carserver.core.commands import Command, Complete, Create, Record, RecordTurns
from carserver.core.counters import Counters
from carserver.core.edits import Edit, Edited, Stored
from carserver.core.principals import CLIENT, Principal
from carserver.core.runs import TURN, Event, Head
from carserver.core.turns import Turn
from carserver.protocol.runs import Recorded, Snapshot, Status
from carserver.stores.sqlite import SqliteStore

NOW_MS = 1_700_000_000_000
CLOSE_S = 20.0


def create(run_id: str, *, prompt: str = "p", now_ms: int = NOW_MS, owner: Principal = CLIENT, **said: Any) -> Create:
    """The command of `runs.create`."""
    run = Snapshot(
        id=run_id,
        prompt=prompt,
        status=Status.CREATED,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        event_count=0,
        epoch=f"epoch of {run_id}",
        **({"session_id": "", "agent_id": ""} | said),
    )
    head = Head(no=0, owner=owner.name, run=run, revision=1, endings=0, last_at_ms=now_ms)
    return Create(run_id=run_id, principal=owner, now_ms=now_ms, head=head)


def event(number: int, size: int = 0, type_: str = "text_delta") -> Event:
    """An event that can be told from others, of at least `size` bytes."""
    return Event(b'{"type":"%b","n":%d,"text":"%b"}' % (type_.encode(), number, b"x" * size), type_, None)


def record(run_id: str, *events: Event, by: Principal = CLIENT, **more: Any) -> Record:
    """The command of `runs.record`."""
    return Record(
        run_id=run_id, principal=by, now_ms=NOW_MS + 1, events=list(events), **({"run_events": 1_000_000} | more)
    )


def record_turns(run_id: str, *members: bytes, kind: int = TURN, by: Principal = CLIENT) -> RecordTurns:
    """The command of `runs.record_turns`; of a turn, what comes behind its index."""
    turns = [Turn(kind, rest) for rest in members]
    return RecordTurns(
        run_id=run_id, principal=by, now_ms=NOW_MS + 1, turns=turns, run_turns=2_000, run_events=1_000_000
    )


def complete(run_id: str, outcome: bytes = b'{"status":"success"}', by: Principal = CLIENT) -> Complete:
    """The command of `runs.complete`."""
    return Complete(
        run_id=run_id, principal=by, now_ms=NOW_MS + 2, status=Status.COMPLETED, text="done", outcome=outcome
    )


@dataclass
class Opened:
    """A store, and what it did."""

    store: SqliteStore
    path: Path
    counters: Counters
    published: list[list[Any]] = field(default_factory=list)
    fatal: list[str] = field(default_factory=list)

    async def submit(self, command: Command) -> Any:
        """Its answer."""
        return await self.store.submit(command, None)

    async def append(self, run_id: str, *events: Event, **more: Any) -> Recorded:
        """Records events."""
        recorded: Recorded = await self.submit(record(run_id, *events, **more))
        return recorded

    async def head(self, run_id: str) -> Head:
        """The head of a run that is there."""
        head = await self.store.head(run_id)
        assert head is not None
        return head

    @property
    def writing(self) -> sqlite3.Connection:
        """The writer's own connection; for when it is idle."""
        return self.store._writer._connection


@contextlib.asynccontextmanager
async def opened(path: Path, **settings: Any) -> AsyncIterator[Opened]:
    """A store on `path`."""
    counters = Counters()
    fatal: list[str] = []
    store = SqliteStore(path, "boot", Settings(**settings), counters, fatal.append)
    opened_ = Opened(store, path, counters, fatal=fatal)

    def publish(changes: Sequence[Any]) -> None:
        opened_.published.append(list(changes))

    store.on_commit(publish)
    try:
        yield opened_
    finally:
        assert await store.close(within_s=CLOSE_S)


class Held(Edit, frozen=True, kw_only=True):
    """Changes nothing; its commit ends when it is released, so what is submitted meanwhile shares the one after it."""

    begun: threading.Event
    released: threading.Event

    def edit(self, stored: Stored) -> Edited:
        self.begun.set()
        assert self.released.wait(CLOSE_S), "nobody released it"
        return Edited(None)


def held() -> Held:
    """One that is neither begun nor released."""
    return Held(principal=CLIENT, begun=threading.Event(), released=threading.Event())


async def together(store: Opened, *changes: Command | Edit) -> list[Any]:
    """What becomes of changes that share a commit; for fewer than a commit's bounds."""
    first = held()
    holding = asyncio.create_task(store.store.edit(first))
    assert await asyncio.to_thread(first.begun.wait, CLOSE_S)
    work = [asyncio.create_task(_do(store, change)) for change in changes]
    await asyncio.sleep(0)
    first.released.set()
    await holding
    return await asyncio.gather(*work, return_exceptions=True)


async def _do(store: Opened, change: Command | Edit) -> Any:
    return await (store.store.edit(change) if isinstance(change, Edit) else store.submit(change))


@contextlib.contextmanager
def other_connection(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of somebody else's to the same file."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=5)
    try:
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def write_lock(path: Path) -> Iterator[None]:
    """Somebody else writes: the writer has to wait."""
    with other_connection(path) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
