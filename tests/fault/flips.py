"""Rounds of a flipped bit in the files of a database; `scripts/flip_rounds` runs many of them.

Whatever a daemon serves of such a file must be what was stored. What it does not serve, it must have said: in words at
the start, or to whoever asked.
"""

import asyncio
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Raw

from carserver.core.edits import OpenHandle
from carserver.core.handleedits import Opened as OpenedHandle
from carserver.core.ports import Place
from carserver.core.principals import CLIENT, HOST
from carserver.core.prune import Delete
from carserver.core.receipts import CancelForReceipt, Finish
from carserver.core.runs import MODEL_TURN, Entry, Head
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.protocol.outputs import ListOutputs
from carserver.protocol.runs import ListRuns
from carserver.stores.schema import StorageError
from tests.unit.handling import close_handle, open_handle, used
from tests.unit.outputting import Outputs, artifact, final, ids
from tests.unit.storing import NOW_MS, Opened, complete, create, event, opened, record, record_turns

RUNS = 12
FILES = ("", "-wal")


@dataclass
class Truth:
    """What was stored."""

    heads: dict[str, Head] = field(default_factory=dict)
    logs: dict[str, list[Entry]] = field(default_factory=dict)
    batches: dict[tuple[str, str], tuple[list[Any], Any]] = field(default_factory=dict)
    outputs: dict[int, bytes] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # of tool calls, and the handle that each has made
    open_handles: set[OpenHandle] = field(default_factory=set)
    receipts: dict[str, bytes] = field(default_factory=dict)  # by the run that was cancelled


@dataclass
class Round:
    """What one flip came to."""

    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    refused: str = ""
    set_aside: bool = False

    @property
    def kind(self) -> str:
        """In a word."""
        if self.wrong:
            return "served wrong"
        if self.refused:
            return "refused"
        if self.set_aside:
            return "found at start"
        if self.missing:
            return "found at read" if self.said else "missing unsaid"
        return "said" if self.said else "harmless"

    @property
    def good(self) -> bool:
        """Whether nothing false was served, and nothing left out without a word."""
        return not self.wrong and (not self.missing or bool(self.said))


# The file.


async def make(path: Path, chance: random.Random) -> Truth:
    """A database with all that there is in one; after this it is closed."""
    truth = Truth()
    async with opened(path) as store:
        await fill(store, chance, truth)
    return truth


async def fill(store: Opened, chance: random.Random, truth: Truth) -> None:
    """Runs with logs, texts, batches and turns, some of them over; outputs; handles, some of them open; receipts."""
    outputs = Outputs(store, new_id=ids(len(truth.outputs)))
    first = len(truth.heads)
    for number in range(first, first + RUNS):
        run_id = f"run-{number}"
        said: dict[str, Any] = {
            "session_id": f"s{number % 3}",
            "agent_id": f"a{number % 2}",
            "prompt": "p" * chance.choice((5, 5000)),
        }
        await store.submit(create(run_id, now_ms=NOW_MS + number, **said))
        for batch in range(chance.randrange(5)):
            events = [event(n, chance.choice((3, 40, 300, 300))) for n in range(chance.randrange(1, 30))]
            batch_id = f"b{batch}"
            answer = await store.append(run_id, *events, batch_id=batch_id)
            truth.batches[run_id, batch_id] = (events, answer)
        if not number % 3:
            await store.submit(record_turns(run_id, b',"output":"%b"}' % (b"o" * chance.choice((5, 500))), b"}"))
            await store.submit(record_turns(run_id, b"}", kind=MODEL_TURN))
        if number % 4 == 1:
            await store.append(run_id, event(0, type_="agent_end")._replace(text="the end"))
        elif number % 4 == 3:
            await store.submit(complete(run_id, b'{"status":"success","n":%d}' % number))
        await outputs.append(final({"n": number, "x": "y" * chance.choice((5, 3000))}), run_id=run_id)
        await outputs.append(artifact(f"name-{number}"), key=f"key-{number}", said=b"digest")
        if not number % 2:
            handle, key = f"handle-{number}", f"key of {number}"
            await store.store.edit(open_handle(handle, run_id, key=used(key, handle)))
            truth.keys[key] = handle
            truth.open_handles.add(OpenHandle(handle, run_id, "grep"))
        if not number % 4:
            await store.store.edit(open_handle(f"ended-{number}", run_id))
            await store.store.edit(close_handle(f"ended-{number}", run_id))
            value = Raw(b'"' + b"z" * chance.choice((5, 9000)) + b'"')
            await outputs.store.keep_result(CLIENT, f"ended-{number}", "grep", value, run_id)
    for number in range(first, first + RUNS, 4):
        run_id = f"cancelled-{number}"
        await store.submit(create(run_id))
        await store.store.edit(cancel(run_id))
        truth.receipts[run_id] = await store.store.edit(
            Finish(principal=CLIENT, run_id=run_id, key=f"cancel of {run_id}", reason="r", confirmed=True)
        )
    await store.submit(create(f"deleted-{first}"))
    await store.append(f"deleted-{first}", event(1, 5000, type_="agent_end")._replace(text=""))
    await store.store.edit(Delete(principal=CLIENT, run_id=f"deleted-{first}", outputs=1_000))
    truth.heads, truth.logs = await read_runs(store)
    truth.outputs = await read_outputs(store)


def cancel(run_id: str) -> CancelForReceipt:
    """The first part of a cancel with a receipt."""
    key = f"cancel of {run_id}"
    return CancelForReceipt(principal=CLIENT, run_id=run_id, key=key, reason="r", now_ms=NOW_MS + 3)


# What is served.


async def read_runs(store: Opened) -> tuple[dict[str, Head], dict[str, list[Entry]]]:
    """Every run by the list, and its log."""
    heads: dict[str, Head] = {}
    after: Place | None = None
    while found := await store.store.list(None, ListRuns(), after, 5):
        heads |= {head.run.id: head for head in found}
        after = Place(found[-1].run.created_at_ms, found[-1].no)
    return heads, {run_id: await read_log(store, head) for run_id, head in heads.items()}


async def read_log(store: Opened, head: Head) -> list[Entry]:
    """A log, page by page."""
    log: list[Entry] = []
    while len(log) < head.cursor:
        log += (await store.store.scan(head, len(log), head.cursor, 100, None)).entries
    return log


async def read_outputs(store: Opened) -> dict[int, bytes]:
    """Every output by the list."""
    found: dict[int, bytes] = {}
    last, more = 0, True
    while more:
        records, last, more = await store.store.outputs(ListOutputs(), HOST, last, 5)
        found |= {len(found) + n: record_ for n, record_ in enumerate(records)}
    return found


class Asking:
    """Asks an opened store for everything, and compares."""

    def __init__(self, store: Opened, truth: Truth, found: Round) -> None:
        self._store = store
        self._truth = truth
        self._found = found

    async def everything(self) -> None:
        """Lists, runs one by one, their logs, their batches again, outputs."""
        try:
            heads, _ = await read_runs(self._store)
        except RpcError as error:
            self._error("the list", error)
        else:
            self._found.missing += [f"run {run_id} in the list" for run_id in self._truth.heads.keys() - heads.keys()]
            for run_id, head in heads.items():
                self._compare_head(run_id, self._as_it_was(head))
        for run_id in self._truth.heads:
            await self._run(run_id)
        try:
            outputs = await read_outputs(self._store)
        except RpcError as error:
            self._error("the outputs", error)
        else:
            lost = [value for value in self._truth.outputs.values() if value not in outputs.values()]
            self._found.missing += [f"output {value[:40]!r}" for value in lost]
            self._found.wrong += [
                f"output {value[:80]!r}" for value in outputs.values() if value not in self._truth.outputs.values()
            ]

        for key, handle in self._truth.keys.items():
            await self._key(key, handle)
        for run_id, receipt in self._truth.receipts.items():
            await self._receipt(run_id, receipt)
        opens = set(self._store.store.found_open)
        self._found.missing += [f"open {row}" for row in self._truth.open_handles - opens]
        self._found.wrong += [f"open {row}" for row in opens - self._truth.open_handles if row.handle[:5] != "ended"]

    async def _key(self, key: str, handle: str) -> None:
        """A tool that is called again with its key: it must not run, unless it was said that it may."""
        try:
            again = await self._store.store.edit(open_handle("again", key=used(key, "again")))
        except RpcError as error:
            self._error(f"key {key}", error)
            return
        if again == OpenedHandle(handle, is_new=False):
            return
        said = self._found.said
        told = any("may run twice" in line or "write-ahead log" in line for line in said)
        # Where nothing is said, it is missing unsaid. By "again", an earlier look has found that it is missing.
        lost = told or not said if again.is_new else again.handle == "again"
        (self._found.missing if lost else self._found.wrong).append(f"key {key}: {again}")

    async def _receipt(self, run_id: str, receipt: bytes) -> None:
        """A cancel again: it must have the same receipt, unless it was said that it may not."""
        try:
            again = await self._store.store.edit(cancel(run_id))
        except RpcError as error:
            if error.kind is ErrorKind.NOT_FOUND:
                self._found.missing.append(f"receipt of {run_id}")
            else:
                self._error(f"receipt of {run_id}", error)
            return
        if again.receipt != receipt:
            said = self._found.said
            told = any("another receipt" in line or "write-ahead log" in line for line in said)
            (self._found.missing if told or not said else self._found.wrong).append(f"receipt of {run_id}: {again}")

    async def _run(self, run_id: str) -> None:
        try:
            head = await self._store.store.head(run_id)
            if head is None:
                self._found.missing.append(f"run {run_id}")
                return
            head = self._as_it_was(head)
            self._compare_head(run_id, head)
            for entry in await read_log(self._store, head):
                if entry != self._truth.logs[run_id][entry.sequence]:
                    self._found.wrong.append(f"event {entry.sequence} of {run_id}")
        except RpcError as error:
            self._error(f"run {run_id}", error)
            return
        for (of, batch_id), (events, answer) in self._truth.batches.items():
            if of == run_id and head == self._truth.heads[run_id]:
                await self._batch(run_id, batch_id, events, answer)

    async def _batch(self, run_id: str, batch_id: str, events: list[Any], answer: Any) -> None:
        try:
            again = await self._store.submit(record(run_id, *events, batch_id=batch_id))
        except RpcError as error:
            self._error(f"batch {batch_id} of {run_id}", error)
        else:
            if again != answer and any("may be recorded twice" in line for line in self._found.said):
                self._found.missing.append(f"batch {batch_id} of {run_id}")
            elif again != answer:
                self._found.wrong.append(f"batch {batch_id} of {run_id} again: {again}")

    def _as_it_was(self, head: Head) -> Head:
        """In a file that is made of another one the logs have new epochs, and must."""
        true = self._truth.heads.get(head.run.id)
        if true is None or not self._found.set_aside:
            return head
        if head.run.epoch == true.run.epoch:
            self._found.wrong.append(f"run {head.run.id}: the epoch of before")
        return msgspec.structs.replace(head, run=msgspec.structs.replace(head.run, epoch=true.run.epoch))

    def _compare_head(self, run_id: str, head: Head) -> None:
        true = self._truth.heads.get(run_id)
        # An earlier state is what is left where the end of the write-ahead log was damaged.
        if (true is not None and head.revision < true.revision) or run_id.startswith("deleted-"):
            self._found.missing.append(f"the last of run {run_id}")
        elif head != true:
            self._found.wrong.append(f"run {run_id}: {head}")

    def _error(self, what: str, error: RpcError) -> None:
        self._found.missing.append(f"{what}: {error}")
        if "damaged" not in str(error) and "malformed" not in str(error):
            self._found.wrong.append(f"{what}: {error}")


@contextmanager
def listening(said: list[str]) -> Iterator[None]:
    """What the daemon logs as a warning or worse."""

    class Listen(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            said.append(entry.getMessage())

    handler, logger = Listen(logging.WARNING), logging.getLogger("carserver")
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


async def ask(path: Path, truth: Truth, **settings: Any) -> Round:
    """Opens the files, asks for everything, compares."""
    found = Round()
    with listening(found.said):
        try:
            async with opened(path, **settings) as store:
                found.set_aside = any(path.parent.glob(f"{path.name}.damaged-*"))
                await Asking(store, truth, found).everything()
                if store.store.slow_check is not None:
                    await asyncio.to_thread(store.store.slow_check.done.wait)
        except StorageError as error:
            found.refused = str(error)
            found.said.append(str(error))
    return found


def flip(path: Path, bit: int) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def copied(source: Path, target: Path) -> Path:
    """The database with its log, alone in a folder; its path there."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(mode=0o700)
    for suffix in FILES:
        file = source.with_name(source.name + suffix)
        if file.exists():
            shutil.copy(file, target / file.name)
    return target / source.name


async def flipped_round(
    source: Path, folder: Path, truth: Truth, suffix: str, chance: random.Random, **settings: Any
) -> tuple[int, Round]:
    """One flip anywhere in the file of this suffix; which bit, and what it came to."""
    path = copied(source, folder)
    file = path.with_name(path.name + suffix)
    bit = chance.randrange(file.stat().st_size * 8)
    flip(file, bit)
    return bit, await ask(path, truth, **settings)


async def killed(folder: Path, chance: random.Random) -> tuple[Path, Truth]:
    """The files as a kill leaves them: half of it in the database, half in its log."""
    truth = Truth()
    path = folder / "carserver.db"
    async with opened(path) as store:
        await fill(store, chance, truth)
    async with opened(path) as store:
        await fill(store, chance, truth)
        return copied(path, folder / "killed"), truth


# The command.

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "a file that is checked at start": ("", {}),
    "a file too large for that": ("", {"check_bytes": 1, "check_after_s": 0.001}),
    "the write-ahead log": ("-wal", {}),
}


async def _many(rounds: int, seed: int, tell: Callable[[str], None]) -> bool:
    chance, good = random.Random(seed), True
    with tempfile.TemporaryDirectory(prefix="carserver-flips-") as name:
        folder = Path(name)
        closed = folder / "carserver.db"
        (folder / "log").mkdir()
        sources = {"": (closed, await make(closed, chance)), "-wal": await killed(folder / "log", chance)}
        line = []
        for kind, (suffix, settings) in KINDS.items():
            source, truth = sources[suffix]
            counted: Counter[str] = Counter()
            for _ in range(rounds if not settings else rounds // 2):
                bit, found = await flipped_round(source, folder / "round", truth, suffix, chance, **settings)
                counted[found.kind] += 1
                if not found.good:
                    good = False
                    tell(f"{kind}, bit {bit} (page {bit // 8 // 4096 + 1}): {found}")
            line.append(f"{kind}: {', '.join(f'{count} {name}' for name, count in counted.most_common())}")
        print(f"{'; '.join(line)} (seed {seed})")
    return good


def main() -> int:
    """`flip_rounds [ROUNDS [SEED]]`: one line of figures; 0: nothing wrong was served, or left out unsaid."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    good = asyncio.run(_many(rounds, seed, lambda line: print(line, file=sys.stderr)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
