"""The lines of one run in an export, made of its live stream, which may come faster than they are written."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from msgspec import Raw, Struct

from carserver.cli.sink import Sink
from carserver.client import ClientError
from carserver.protocol.runs import RECORDS
from carserver.protocol.transfer import PAGE_EVENTS

PAGE_BYTES = 1024 * 1024  # of a page's events; a larger one has a page to itself
PAGE_BRACKETS = 60_000  # the daemon takes twice as many in a message
TURNS = [record for record in RECORDS if record != "event"]
_GATHERED_BYTES = 4 * 1024 * 1024  # of one run, that are not written yet

encode = msgspec.json.encode


class Termination(Struct):
    """How a run ended in its agent's own words."""

    outcome: Raw


class Record(Struct):
    """Of a run's stream; one of its log is whole but for a turn's time."""

    record: str
    sequence: int = -1
    timestamp_ms: int = 0
    event: Raw = Raw(b"")


class Notice(NamedTuple):
    """What a run's stream has sent."""

    run_id: str
    run_status: str
    record: Record


class _Frame(Struct):
    run_id: str
    run_status: str
    record: Raw


class _Kind(Struct):
    record: str


class _Turn(Struct):
    index: int


_frame_decoder = msgspec.json.Decoder(_Frame)
_kind_decoder = msgspec.json.Decoder(_Kind)
_record_decoder = msgspec.json.Decoder(Record)
_turn_decoder = msgspec.json.Decoder(_Turn)


def notice_of(params: Raw) -> Notice:
    """The params of a `runs.trace.event`; a turn has members of its own, whatever their names, beside its index."""
    frame = _frame_decoder.decode(params)
    kind = _kind_decoder.decode(frame.record).record
    if kind in TURNS:
        event = Raw(b'{"type"' + bytes(frame.record).removeprefix(b'{"record"'))
        record = Record(kind, _turn_decoder.decode(frame.record).index, event=event)
    else:
        record = _record_decoder.decode(frame.record)
    return Notice(frame.run_id, frame.run_status, record)


class Closed(Exception):
    """The stream of a run ended early. `written`: some of its lines are written already."""

    def __init__(self, reason: str, *, written: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.written = written


class TooLarge(Exception):
    """A run that was fetched ahead of its turn."""


class RunLines:
    """The lines of one run, as its events come; `done` when all are there.

    They gather, so that nothing is written of a run that is deleted meanwhile. Where they are many, those that are
    there are written if it is the run's turn: if it has a sink. Whoever fetches the run calls `begin`, and then `time`
    for as long as `untimed` tells of a turn; what comes until then waits here, no more than is on its way.
    """

    def __init__(self, run_id: str, sink: Sink | None = None) -> None:
        self.run_id = run_id
        self.events = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(lambda _: self._news.set())
        self.sink = sink
        self._news = asyncio.Event()  # it is done, or a turn's time is wanted
        self._written = False
        self._wanted: int | None = None  # how many events; not known before the answer to the subscription
        self._times: Mapping[int, int] = {}  # of turns, by their sequence
        self._waiting: list[Notice] = []
        self._lines: list[bytes] = []
        self._size = 0
        self._page: list[bytes] = []
        self._page_bytes = 0
        self._page_brackets = 0

    def begin(self, run: dict[str, Raw], termination: Termination | None = None) -> None:
        """The snapshot, and how the run ended in its agent's own words: the first line."""
        self._wanted = int(bytes(run["event_count"]))
        outcome = {} if termination is None else {"outcome": termination.outcome}
        self._line(b'{"run":%b}' % encode({name: value for name, value in run.items() if name != "epoch"} | outcome))
        self._go_on()
        self._end_if_complete()

    async def untimed(self) -> int | None:
        """The sequence of a turn whose time is wanted; None when all lines are there.

        Raises:
            Exception: it did not come to its end.
        """
        await self._news.wait()
        self._news.clear()
        return self.done.result() if self.done.done() else self._waiting[0].record.sequence

    def time(self, times: Mapping[int, int]) -> None:
        """The times of that turn, and of others behind it: it goes on. A log without it is none of this run's."""
        if self._waiting and self._waiting[0].record.sequence not in times:
            self.close("the run was deleted")
        self._times = times
        self._go_on()

    def take(self, notice: Notice) -> None:
        """A record of the stream; what is not the next event of the run is none of its lines."""
        if self.done.done():
            return
        if self._wanted is None or self._waiting:
            self._waiting.append(notice)
            return
        record = notice.record
        if record.sequence != self.events or self.events >= self._wanted:
            return
        if record.record not in RECORDS:
            raise ClientError(f"a record of the kind {record.record!r} cannot be exported by this version")
        if record.record in TURNS:
            if record.sequence not in self._times:
                self._waiting.append(notice)
                self._news.set()
                return
            record.timestamp_ms = self._times[record.sequence]
        self._event(record, notice.run_status)
        self._end_if_complete()

    def _go_on(self) -> None:
        waiting, self._waiting = self._waiting, []
        for notice in waiting:
            self.take(notice)

    def write(self, sink: Sink) -> None:
        """Writes what has gathered."""
        for line in self._lines:
            sink.put(line)
        self._lines, self._size = [], 0
        self._written = True

    def _event(self, record: Record, status: str) -> None:
        event = bytes(record.event)
        brackets = event.count(b"{") + event.count(b"[") + 1
        if self._page and (
            len(self._page) >= PAGE_EVENTS
            or self._page_bytes + len(event) > PAGE_BYTES
            or self._page_brackets + brackets > PAGE_BRACKETS
        ):
            self._end_page()
        kind = b"" if record.record == "event" else b'"record":%b,' % encode(record.record)
        self._page.append(
            b'{"sequence":%d,"timestamp_ms":%d,"status":%b,%b"event":%b}'
            % (record.sequence, record.timestamp_ms, encode(status), kind, event)
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
            self.fail(TooLarge())

    def close(self, reason: str) -> None:
        """The daemon ended the stream."""
        self.fail(Closed(reason, written=self._written))

    def fail(self, error: Exception) -> None:
        """It does not come to its end."""
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # whoever waits raises it; nobody may any more
