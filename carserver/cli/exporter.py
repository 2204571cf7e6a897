"""`carserver export`: everything that the daemon keeps as JSON lines, through its public protocol alone.

A run's lines are the snapshot that its subscription came with, and exactly as many events as that says. Several runs
are fetched at a time and written in their order; one that is fetched ahead of its turn and is large is fetched again
when its turn has come, so memory is bounded.
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
from carserver.cli.sink import Sink, progress
from carserver.cli.talk import ANSWER_S
from carserver.client import CallError, ClientError, Connection
from carserver.protocol.runs import TraceClosed
from carserver.protocol.transfer import PAGE_EVENTS

PAGE_BYTES = 1024 * 1024  # of a page's events; a larger one has a page to itself
PAGE_BRACKETS = 60_000  # the daemon takes twice as many in a message
_LIST = 1_000  # the daemon's own bound
_AHEAD = 16  # runs that are fetched at a time
_GATHERED_BYTES = 4 * 1024 * 1024  # of one of them that are not written yet
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


class _Record(Struct):
    record: str
    sequence: int = -1
    timestamp_ms: int = 0
    event: Raw = Raw(b"")


class _Notice(Struct):
    run_id: str
    run_status: str
    record: _Record


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


_notice_decoder = msgspec.json.Decoder(_Notice)
_closed_decoder = msgspec.json.Decoder(TraceClosed)
_output_decoder = msgspec.json.Decoder(_Output)


class _Closed(Exception):
    """The stream of a run ended early. `written`: some of its lines are written already."""

    def __init__(self, reason: str, *, written: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.written = written


class _TooLarge(Exception):
    """A run that was fetched ahead of its turn."""


class RunLines:
    """The lines of one run, as its events come; `done` when all are there.

    They gather, so that nothing is written of a run that is deleted meanwhile. Where they are many, those that are
    there are written if it is the run's turn: if it has a sink.
    """

    def __init__(self, run_id: str, sink: Sink | None = None) -> None:
        self.run_id = run_id
        self.events = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sink = sink
        self._written = False
        self._wanted: int | None = None  # how many events; not known before the answer to the subscription
        self._early: list[_Notice] = []
        self._lines: list[bytes] = []
        self._size = 0
        self._page: list[bytes] = []
        self._page_bytes = 0
        self._page_brackets = 0

    def begin(self, run: dict[str, Raw]) -> None:
        """The snapshot: the first line."""
        self._wanted = int(bytes(run["event_count"]))
        self._line(b'{"run":%b}' % encode({name: value for name, value in run.items() if name != "epoch"}))
        early, self._early = self._early, []
        for notice in early:
            self.take(notice)
        self._end_if_complete()

    def take(self, notice: _Notice) -> None:
        """A record of the stream; what is not the next event of the run is none of its lines."""
        if self.done.done():
            return
        if self._wanted is None:
            self._early.append(notice)
            return
        record = notice.record
        if record.sequence != self.events or self.events >= self._wanted:
            return
        if record.record != "event":
            raise ClientError(f"a record of the kind {record.record!r} cannot be exported by this version")
        self._event(record, notice.run_status)
        self._end_if_complete()

    def write(self, sink: Sink) -> None:
        """Writes what has gathered."""
        for line in self._lines:
            sink.put(line)
        self._lines, self._size = [], 0
        self._written = True

    def _event(self, record: _Record, status: str) -> None:
        event = bytes(record.event)
        brackets = event.count(b"{") + event.count(b"[") + 1
        if self._page and (
            len(self._page) >= PAGE_EVENTS
            or self._page_bytes + len(event) > PAGE_BYTES
            or self._page_brackets + brackets > PAGE_BRACKETS
        ):
            self._end_page()
        self._page.append(
            b'{"sequence":%d,"timestamp_ms":%d,"status":%b,"event":%b}'
            % (record.sequence, record.timestamp_ms, encode(status), event)
        )
        self._page_bytes += len(event)
        self._page_brackets += brackets
        self.events += 1

    def _end_page(self) -> None:
        self._line(b'{"run_id":%b,"events":[%b]}' % (encode(self.run_id), b",".join(self._page)))
        self._page, self._page_bytes, self._page_brackets = [], 0, 0

    def _end_if_complete(self) -> None:
        if self._wanted != self.events:
            return
        if self._page:
            self._end_page()
        if not self.done.done():  # with its last page it may have become too large
            self.done.set_result(None)

    def _line(self, line: bytes) -> None:
        self._lines.append(line)
        self._size += len(line)
        if self._size <= _GATHERED_BYTES:
            return
        if self.sink is not None:
            self.write(self.sink)
        else:
            self._lines.clear()
            self.fail(_TooLarge())

    def close(self, reason: str) -> None:
        """The daemon ended the stream."""
        self.fail(_Closed(reason, written=self._written))

    def fail(self, error: Exception) -> None:
        """It does not come to its end."""
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # whoever waits raises it; nobody may any more


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
                    notice = _notice_decoder.decode(params)
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
            lines.begin(answer.run)
            await lines.done
        except _TooLarge:
            await self._unsubscribe(run_id)  # now: the rest of it is not sent for nothing
            raise
        finally:
            del self._fetched[run_id]
        await self._unsubscribe(run_id)
        return lines

    async def _unsubscribe(self, run_id: str) -> None:
        await self._connection.call("runs.trace.unsubscribe", {"run_id": run_id}, ANSWER_S)

    async def _write(self, run_id: str, fetching: "asyncio.Task[RunLines]") -> None:
        """Writes a run whose turn has come."""
        if (lines := self._fetched.get(run_id)) is not None:
            lines.sink = self._sink
        try:
            try:
                lines = await fetching
            except _TooLarge:
                lines = await self._fetch(run_id, self._sink)
        except CallError as error:
            if error.type != "not_found":
                raise
            return  # it was deleted since it was listed
        except _Closed as error:
            await self._leave_out(run_id, error)
            return
        lines.write(self._sink)
        await self._sink.make_room()
        self.runs += 1
        self.events += lines.events
        self._exported.add(run_id)

    async def _leave_out(self, run_id: str, closed: _Closed) -> None:
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
