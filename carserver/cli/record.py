"""`carserver runs record`: standard input becomes the events of a run, which is attended until the input ends.

One batch is under way at a time, and while it is, the next ones gather: so a batch that has to be sent again, with the
same batch_id, can never come behind a later one.
"""

import asyncio
import re
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeAlias
from uuid import uuid4

import msgspec
from msgspec import Raw, Struct

from carserver.cli.errors import CommandError
from carserver.cli.lines import Entry, LineError, Reader, batches
from carserver.cli.output import counted, data, note
from carserver.cli.plain import visible
from carserver.cli.talk import ANSWER_S, explained
from carserver.client import CallError, ClientError, Connection, Pauses
from carserver.client.trace import Opener
from carserver.protocol.runs import LIVE, Recorded, RunCancelled, Snapshot, Status

_PREPARED = 2  # batches that wait while one is under way
_PLACE = re.compile(r"events\[(\d+)\]")


class Batch(Struct, frozen=True):
    """What one `runs.record` carries; the id stays the same however often it is sent."""

    id: str
    entries: list[Entry]


Batches: TypeAlias = asyncio.Queue[Batch | LineError | None]
"""What is to be recorded; None is the end of the input, an error the line at which it broke off."""


class RunStopped(Exception):
    """The run was cancelled while it was being recorded."""


async def record(
    open_connection: Opener,
    *,
    run_id: str | None,
    creation: dict[str, Any],
    mode: str,
    patience_s: float,
    as_json: bool,
) -> None:
    """Records standard input; prints the run's id as soon as there is one, or the result at the end as JSON.

    Raises:
        CommandError: a line was refused, or the run was cancelled.
        ClientError: no daemon, and the patience is at its end.
    """
    if sys.stdin is None:
        raise CommandError("there is no standard input to record")
    if sys.stdin.isatty():
        note("reading events from the terminal; Ctrl-D ends them")
    source = batches(Reader(sys.stdin.fileno()), mode)

    def began(run_id: str) -> None:
        if not as_json:
            data(visible(run_id))

    recorder = Recorder(open_connection, run_id, creation, began, Pauses(patience_s))
    try:
        await recorder.record(source)
    except (RunStopped, LineError, ClientError) as error:
        if recorder.events:
            note(f"{counted(recorder.events, 'event')} acknowledged, then it broke off")
        if isinstance(error, ClientError):
            raise
        raise CommandError(visible(str(error))) from None
    _report(recorder, as_json=as_json)


def _report(recorder: "Recorder", *, as_json: bool) -> None:
    result = {
        "run_id": recorder.run_id,
        "events": recorder.events,
        "cursor": recorder.cursor,
        "status": recorder.status,
    }
    if as_json:
        data(msgspec.json.encode(result).decode())
    note(f"{counted(recorder.events, 'event')} recorded, the run is {recorder.status}")
    if recorder.status in LIVE:
        note("nobody attends it any more: unless somebody goes on with it, it becomes interrupted")


class Recorder:
    """Gets batches into one run, through lost connections; one object for one recording."""

    def __init__(
        self,
        open_connection: Opener,
        run_id: str | None,
        creation: dict[str, Any],
        began: Callable[[str], None],
        pauses: Pauses,
    ) -> None:
        self.run_id = run_id
        self.events = 0
        self.cursor = 0
        self.status = Status.CREATED
        self._open = open_connection
        self._creation = creation
        self._began = began
        self._pauses = pauses
        self._begun = False
        self._told = False  # that there is trouble
        self._waiting: Batches = asyncio.Queue(_PREPARED)
        self._current: Batch | LineError | None = None
        self._has_current = False

    async def record(self, source: AsyncGenerator[list[Entry], None]) -> None:
        """Records everything that `source` yields.

        Raises:
            RunStopped: the run was cancelled.
            LineError: a line is no event, or the daemon refused it.
            ClientError: no connection at first, or none within the patience later.
        """
        pump = asyncio.create_task(self._pump(source), name="carserver record: batches")
        try:
            while not await self._one_connection():
                pass
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    async def _pump(self, source: AsyncGenerator[list[Entry], None]) -> None:
        prefix = uuid4().hex
        number = 0
        try:
            async with aclosing(source):
                async for entries in source:
                    await self._waiting.put(Batch(f"{prefix}-{number}", entries))
                    number += 1
        except LineError as error:
            await self._waiting.put(error)
        else:
            await self._waiting.put(None)

    async def _one_connection(self) -> bool:
        """Whether everything is recorded; False after a pause, where it is to be tried on a new connection."""
        try:
            async with self._open() as connection:
                await self._begin(connection)
                await self._session(connection)
        except ClientError as error:
            if not self._begun or not error.passing:
                raise
            if not self._told:
                self._told = True
                note(f"{visible(explained(error).message)}; trying again")
            if not await self._pauses.pause(_asked_for(error)):
                raise
            return False
        return True

    async def _begin(self, connection: Connection) -> None:
        """Makes the run, or attends the one there is."""
        if self.run_id is None:
            run = await connection.call("runs.create", self._creation, ANSWER_S, result_type=Snapshot)
            self.run_id = run.id
        else:
            run = await self._attend(connection, self.run_id)
        self.status, self.cursor = run.status, max(self.cursor, run.event_count)
        if run.status is Status.CANCELLED:
            raise RunStopped(f"{run.id} was cancelled: {run.cancel_reason or 'no reason given'}")
        if not self._begun:
            self._begun = True
            self._began(run.id)
        if not self._has_current:
            self._through()

    def _through(self) -> None:
        """What was being tried is done."""
        self._told = False
        self._pauses.reset()

    async def _attend(self, connection: Connection, run_id: str) -> Snapshot:
        try:
            return await connection.call("runs.resume", {"run_id": run_id}, ANSWER_S, result_type=Snapshot)
        except CallError as error:
            if error.data.get("reason") != "run_terminal":
                raise
        return await connection.call("runs.get", {"run_id": run_id}, ANSWER_S, result_type=Snapshot)

    async def _session(self, connection: Connection) -> None:
        """Records until the input ends, the run is cancelled, or the connection is lost: whichever comes first."""
        watching = asyncio.create_task(self._watch(connection), name="carserver record: notifications")
        sending = asyncio.create_task(self._send(connection), name="carserver record: sending")
        try:
            await asyncio.wait({watching, sending}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and isinstance(watching.exception(), RunStopped):
                watching.result()
            for task in (sending, watching):  # what is all recorded needs no connection any more
                if task.done():
                    task.result()
        finally:
            watching.cancel()
            sending.cancel()
            await asyncio.gather(watching, sending, return_exceptions=True)

    async def _watch(self, connection: Connection) -> None:
        async with aclosing(connection.notifications()) as notifications:
            async for method, params in notifications:
                if method == "runs.cancelled":
                    cancelled = msgspec.json.decode(params, type=RunCancelled)
                    if cancelled.run_id == self.run_id:
                        raise RunStopped(f"{cancelled.run_id} was cancelled: {cancelled.reason}")

    async def _send(self, connection: Connection) -> None:
        while True:
            if not self._has_current:
                self._current = await self._waiting.get()
                self._has_current = True
            if isinstance(self._current, LineError):
                raise self._current
            if self._current is None:
                return
            await self._send_batch(connection, self._current)
            self._has_current = False
            self._through()

    async def _send_batch(self, connection: Connection, batch: Batch) -> None:
        params = {
            "run_id": self.run_id,
            "events": [Raw(entry.event) for entry in batch.entries],
            "at_ms": [entry.at_ms for entry in batch.entries],
            "batch_id": batch.id,
        }
        try:
            answer = await connection.call("runs.record", params, ANSWER_S, result_type=Recorded)
        except CallError as error:
            if error.passing:
                raise
            raise _line_error(error, batch) from None
        self.events += answer.count
        self.cursor, self.status = answer.cursor, answer.status
        if answer.status is Status.CANCELLED:
            raise RunStopped(f"{answer.run_id} was cancelled")


def _line_error(error: CallError, batch: Batch) -> Exception:
    """An error of the daemon with the line that it is about, where it is about one; itself where it is about none."""
    place = _PLACE.match(str(error.data.get("path", ""))) or _PLACE.search(error.message)
    if place is None:
        if error.type in {"not_found", "forbidden", "auth_required", "auth_failed"}:
            return error
        lines = f"lines {batch.entries[0].line} to {batch.entries[-1].line}"
        return LineError(f"{lines} were refused: {explained(error).message}")
    entry = batch.entries[min(int(place[1]), len(batch.entries) - 1)]
    return LineError(f"line {entry.line} was refused: {explained(error).message}")


def _asked_for(error: Exception) -> float:
    """Seconds that the daemon asked to be left alone."""
    asked = error.data.get("retry_after_ms") if isinstance(error, CallError) else None
    return asked / 1000 if isinstance(asked, int) else 0.0
