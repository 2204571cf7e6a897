"""`carserver export`: everything that the daemon keeps as JSON lines, through its public protocol alone.

A run's lines are the snapshot that its subscription came with, and exactly as many events as that says. The stream has
an agent's turns without their times: these are asked for, a page at a time. Several runs are fetched at a time and
written in their order; one that is fetched before its place and is large is fetched again when that has come, so memory
is bounded.
"""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw, Struct

from carserver.cli.errors import CommandError
from carserver.cli.output import note
from carserver.cli.plain import visible
from carserver.cli.runlines import TURNS, Closed, RunLines, Termination, TooLarge, notice_of
from carserver.cli.sink import Sink, progress
from carserver.cli.talk import ANSWER_S
from carserver.client import CallError, ClientError, Connection
from carserver.protocol.runs import TraceClosed

_LIST = 1_000  # the daemon's own bound
_AHEAD = 16  # runs that are fetched at a time
_AT_ONCE = 16  # outputs that are asked for at a time
_AT_ONCE_BYTES = 16 * 1024 * 1024  # and the bytes of what the list leaves out of them, or one larger

encode = msgspec.json.encode


class _RunPage(Struct):
    runs: list["_Id"]
    next_page: str | None


class _Id(Struct):
    id: str


class _Subscribed(Struct):
    run: dict[str, Raw]
    termination: Termination | None = None


class _Times(Struct):
    events: list["_Time"]


class _Time(Struct):
    sequence: int
    timestamp_ms: int


class _Content(Struct):
    kind: str
    omitted: bool = False
    size: int = 0


class _Event(Struct):
    chunk: _Content | None = None
    content: _Content | None = None


class _Output(Struct):
    id: str
    event: _Event
    run_id: str | None = None


class _Listed(NamedTuple):
    """An output as it is listed, and as it came."""

    output: _Output
    raw: Raw


class _OutputPage(Struct):
    outputs: list[Raw]
    next_page: str | None


class _Slice(Struct):
    size: int
    sha256: str


_closed_decoder = msgspec.json.Decoder(TraceClosed)
_output_decoder = msgspec.json.Decoder(_Output)


class Exporter:
    """One export over one connection.

    Args:
        connection: The host's.
        sink: Where the lines go.
    """

    def __init__(self, connection: Connection, sink: Sink) -> None:
        self._connection = connection
        self._sink = sink
        self._fetched: dict[str, RunLines] = {}
        self._lost: Exception | None = None
        self._exported: set[str] = set()
        self.runs = 0
        self.events = 0
        self.outputs = 0
        self.left_out = 0

    async def export(self) -> None:
        """Writes all runs, oldest first, and all outputs.

        Raises:
            ClientError: the daemon refused, or the connection is lost.
            CommandError: a run that is half written is gone, or its log cannot be read.
        """
        router = asyncio.create_task(self._route(), name="carserver export: notifications")
        try:
            await self._runs(await self._ids())
            await self._outputs()
            await self._sink.flush()
        finally:
            router.cancel()
            await asyncio.gather(router, return_exceptions=True)

    async def _ids(self) -> list[str]:
        params: dict[str, Any] = {"limit": _LIST}
        ids: list[str] = []
        while True:
            page = await self._connection.call("runs.list", params, ANSWER_S, result_type=_RunPage)
            ids += [run.id for run in page.runs]
            if page.next_page is None:
                ids.reverse()
                return ids
            params["page"] = page.next_page

    # Runs.

    async def _route(self) -> None:
        """Hands each notification to the run that it is about."""
        error: Exception = ClientError("the connection was closed")
        try:
            async for method, params in self._connection.notifications():
                if method == "runs.trace.event":
                    notice = notice_of(params)
                    if (lines := self._fetched.get(notice.run_id)) is not None:
                        lines.take(notice)
                elif method == "runs.trace.closed":
                    closed = _closed_decoder.decode(params)
                    if (lines := self._fetched.get(closed.run_id)) is not None:
                        lines.close(closed.reason)
                await self._sink.make_room()
        except Exception as lost:  # noqa: BLE001 - whatever it was, it is raised where the run is waited for
            error = lost
        finally:
            self._lost = error
            for lines in self._fetched.values():
                lines.fail(error)

    async def _runs(self, ids: Sequence[str]) -> None:
        waiting = deque(ids)
        ahead: deque[tuple[str, asyncio.Task[RunLines]]] = deque()
        try:
            while waiting or ahead:
                while waiting and len(ahead) < _AHEAD:
                    run_id = waiting.popleft()
                    ahead.append((run_id, asyncio.create_task(self._fetch(run_id))))
                run_id, fetching = ahead.popleft()
                await self._write(run_id, fetching)
                progress(f"{self.runs} of {len(ids)} runs")
        finally:
            for _, fetching in ahead:
                fetching.cancel()
            await asyncio.gather(*(fetching for _, fetching in ahead), return_exceptions=True)

    async def _fetch(self, run_id: str, sink: Sink | None = None) -> RunLines:
        """All lines of a run: gathered, or written as they come."""
        lines = self._fetched[run_id] = RunLines(run_id, sink)
        if self._lost is not None:
            raise self._lost
        try:
            answer = await self._connection.call(
                "runs.trace.subscribe", {"run_id": run_id}, ANSWER_S, result_type=_Subscribed
            )
            lines.begin(answer.run, answer.termination)
            while (sequence := await lines.untimed()) is not None:
                lines.time(await self._times(run_id, sequence))
        except TooLarge:
            await self._unsubscribe(run_id)  # now: the rest of it is not sent for nothing
            raise
        finally:
            del self._fetched[run_id]
        await self._unsubscribe(run_id)
        return lines

    async def _times(self, run_id: str, sequence: int) -> dict[int, int]:
        """When turns were recorded, that one and those behind it, by their sequence; none where the run is gone."""
        params = {"run_id": run_id, "after": sequence, "types": TURNS}
        try:
            page = await self._connection.call("runs.events", params, ANSWER_S, result_type=_Times)
        except CallError as error:
            if error.type != "not_found":
                raise
            return {}
        return {entry.sequence: entry.timestamp_ms for entry in page.events}

    async def _unsubscribe(self, run_id: str) -> None:
        await self._connection.call("runs.trace.unsubscribe", {"run_id": run_id}, ANSWER_S)

    async def _write(self, run_id: str, fetching: "asyncio.Task[RunLines]") -> None:
        """Writes a run whose turn has come."""
        if (lines := self._fetched.get(run_id)) is not None:
            lines.sink = self._sink
        try:
            try:
                lines = await fetching
            except TooLarge:
                lines = await self._fetch(run_id, self._sink)
        except CallError as error:
            if error.type != "not_found":
                raise
            return  # it was deleted since it was listed
        except Closed as error:
            await self._leave_out(run_id, error)
            return
        lines.write(self._sink)
        await self._sink.make_room()
        self.runs += 1
        self.events += lines.events
        self._exported.add(run_id)

    async def _leave_out(self, run_id: str, closed: Closed) -> None:
        """The run was deleted meanwhile, or its log cannot be read."""
        if closed.written:
            reason = visible(closed.reason)
            raise CommandError(f"run {visible(run_id)} broke off when a part of it was written: {reason}; export again")
        try:
            await self._connection.call("runs.get", {"run_id": run_id}, ANSWER_S, result_type=Raw)
        except CallError as error:
            if error.type != "not_found":
                raise
            return
        self.left_out += 1
        progress()
        note(f"run {visible(run_id)} is left out: {visible(closed.reason)}")

    # Outputs.

    async def _outputs(self) -> None:
        params: dict[str, Any] = {}
        while True:
            page = await self._connection.call("outputs.list", params, ANSWER_S, result_type=_OutputPage)
            for few in _few_at_a_time(page.outputs):
                for line in await asyncio.gather(*map(self._output, few)):
                    if line is not None:
                        self._sink.put(line)
                        self.outputs += 1
                await self._sink.make_room()
            progress(f"{self.outputs} outputs")
            if page.next_page is None:
                return
            params["page"] = page.next_page

    async def _output(self, listed: _Listed) -> bytes | None:
        """The line of an output; None for that of a run that is not exported: it was made since, or left out."""
        output, raw = listed
        if output.run_id is not None and output.run_id not in self._exported:
            return None
        content = _content_of(output)
        size = sha256 = b"null"
        try:
            if content is not None and content.omitted:
                raw = await self._connection.call("outputs.get", {"id": output.id}, ANSWER_S, result_type=Raw)
            elif content is not None and content.kind == "file_ref":
                params = {"id": output.id, "length": 1}
                part = await self._connection.call("outputs.read", params, ANSWER_S, result_type=_Slice)
                size, sha256 = encode(part.size), encode(part.sha256)
        except CallError as error:
            if error.type == "not_found":
                return None  # it was deleted since it was listed
            if content is None or content.kind != "file_ref" or error.type not in {"conflict", "unavailable"}:
                raise
            progress()
            note(f"output {visible(output.id)} goes without its file's size and digest: {visible(error.message)}")
        return b'{"output":%b,"size":%b,"sha256":%b}' % (raw, size, sha256)


def _content_of(output: _Output) -> _Content | None:
    return output.event.chunk or output.event.content


def _few_at_a_time(outputs: Sequence[Raw]) -> Iterator[list[_Listed]]:
    """Outputs in their order, as many at a time as may be fetched at once."""
    few: list[_Listed] = []
    size = 0
    for raw in outputs:
        output = _output_decoder.decode(raw)
        content = _content_of(output)
        large = content.size if content is not None and content.omitted else 0
        if few and (len(few) == _AT_ONCE or size + large > _AT_ONCE_BYTES):
            yield few
            few, size = [], 0
        few.append(_Listed(output, raw))
        size += large
    if few:
        yield few
