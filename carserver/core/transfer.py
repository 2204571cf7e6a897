"""Import: runs and outputs as an export has them, line by line, with their ids, times, sequences and statuses.

A line is checked by itself as it is taken in; the edit checks it against what came before it and what is stored. A run
appears with its last event, as its importer's; until then it is staged. What is there already is compared and skipped.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import msgspec
from msgspec import UNSET, Raw, Struct
from msgspec.structs import replace

from carserver.config import Settings
from carserver.core.edits import Edit, Edited, Staged, Stored
from carserver.core.intake import take_in_metadata, take_in_one, take_in_outcome
from carserver.core.outputs import Body, Output, check_producer, take_in
from carserver.core.runs import CODES, EVENT, Entry, Head
from carserver.protocol.codec import check_name, check_text, decode, encode
from carserver.protocol.errors import RpcError, conflict, forbidden, invalid_params, limit_exceeded
from carserver.protocol.outputs import OutputRecord
from carserver.protocol.runs import FINAL, LIVE, RECORDS, STATUSES, Snapshot, Status
from carserver.protocol.trace import TURN_HEADS
from carserver.protocol.transfer import (
    PAGE_EVENTS,
    Imported,
    ImportedEvent,
    ImportedOutput,
    ImportedRun,
    ImportLine,
)

LOG_EVENTS = 2**24
"""What storage has room for in one log: more than `run_events`, which the daemon's own events are exempt from."""

_FINAL_CODES = frozenset(CODES[status] for status in FINAL)
_NAMES = ("id", "session_id", "agent_id", "parent_run_id")
_TEXTS = ("prompt", "result_text", "error", "cancel_reason", "interrupted_reason", "outcome_description")
_MEMBERS = ImportedRun.__struct_fields__
_OF_SNAPSHOT = [name for name in _MEMBERS if name != "outcome"]

_line_decoder = msgspec.json.Decoder(ImportLine)
_run_decoder = msgspec.json.Decoder(ImportedRun)
_members_decoder = msgspec.json.Decoder(dict[str, Raw])


class RunPart(NamedTuple):
    """A run that begins; `source` is `run` as JSON, the same for the same run."""

    at: str
    run: ImportedRun
    source: bytes


class OutputPart(NamedTuple):
    """An output."""

    at: str
    output: Output


class EventsPart(NamedTuple):
    """A page of a run's events, in their order."""

    at: str
    run_id: str
    entries: list[Entry]


Part = RunPart | EventsPart | OutputPart


def take_in_line(source: bytes, at: str, settings: Settings) -> Part:
    """One line, checked by itself; it is known to be JSON.

    Raises:
        RpcError: invalid_params, limit_exceeded; the path begins with `at`.
    """
    line = decode(_line_decoder, source, at)
    given = [name for name in ("run", "run_id", "output") if getattr(line, name) is not UNSET]
    if len(given) != 1 or (line.run_id is UNSET) != (line.events is UNSET):
        raise invalid_params(at, "one of a run, an output, or a run_id and its events is wanted")
    if isinstance(line.run, ImportedRun):
        run = _checked_run(line.run, f"{at}.run", settings)
        return RunPart(at, run, encode(run))
    if isinstance(line.run_id, str) and isinstance(line.events, list):
        return EventsPart(at, line.run_id, _checked_events(line.events, at, settings))
    assert isinstance(line.output, ImportedOutput)  # noqa: S101 - one of the three is given
    return OutputPart(at, _checked_output(line.output, line, f"{at}.output", settings))


def _checked_run(run: ImportedRun, at: str, settings: Settings) -> ImportedRun:
    for name in _NAMES:
        if (value := getattr(run, name)) is not None:
            check_name(value, settings.name_chars, f"{at}.{name}")
    for name in _TEXTS:
        if (value := getattr(run, name)) is not None:
            check_text(value, "text_bytes", settings.text_bytes, f"{at}.{name}")
    if run.event_count > LOG_EVENTS:
        raise limit_exceeded("run_events", run.event_count, LOG_EVENTS, f"{at}.event_count")
    if run.updated_at_ms < run.created_at_ms:
        raise invalid_params(f"{at}.updated_at_ms", "it is before created_at_ms")
    if (run.ended_at_ms is None) != _live(run):
        raise invalid_params(f"{at}.ended_at_ms", f"a run that is {run.status} has {'none' if _live(run) else 'one'}")
    if run.ended_at_ms is not None and not run.created_at_ms <= run.ended_at_ms <= run.updated_at_ms:
        raise invalid_params(f"{at}.ended_at_ms", "it is not between created_at_ms and updated_at_ms")
    if isinstance(run.outcome, Raw):
        if run.status not in (Status.COMPLETED, Status.FAILED):
            raise invalid_params(f"{at}.outcome", f"a run that is {run.status} has none")
        run = replace(run, outcome=take_in_outcome(bytes(run.outcome), settings, f"{at}.outcome"))
    if isinstance(run.metadata, Raw):
        run = replace(run, metadata=take_in_metadata(bytes(run.metadata), settings, f"{at}.metadata"))
    return run


def _live(run: ImportedRun) -> bool:
    return run.status in LIVE


def _checked_events(events: Sequence[ImportedEvent], at: str, settings: Settings) -> list[Entry]:
    if len(events) > PAGE_EVENTS:
        raise limit_exceeded("page_events", len(events), PAGE_EVENTS, f"{at}.events")
    entries: list[Entry] = []
    for place, given in enumerate(events):
        event = take_in_one(bytes(given.event), settings, f"{at}.", place)
        kind, raw = EVENT, event.raw
        if given.record is not UNSET:
            kind = RECORDS.index(given.record)
            raw = _checked_turn(raw, kind, given.sequence, f"{at}.events[{place}].event")
        entry = Entry(given.sequence, given.timestamp_ms, CODES[given.status], raw, kind)
        if entries:
            _check_follows(entry, entries[-1], f"{at}.events[{place}]")
        entries.append(entry)
    return entries


def _checked_turn(event: bytes, kind: int, sequence: int, at: str) -> bytes:
    """A turn as `protocol.trace.turn_event` makes it, compact: its record is made of its bytes."""
    raw = msgspec.json.format(event, indent=-1)
    head = b"%b%d" % (TURN_HEADS[kind], sequence)
    if not raw.startswith((head + b",", head + b"}")):
        raise invalid_params(at, f"a {RECORDS[kind]} that begins with {head.decode()} is wanted")
    if b'"record"' in raw and "record" in decode(_members_decoder, raw, at):
        raise invalid_params(f"{at}.record", "no turn has such a member: in its record this name is taken")
    return raw


def _check_follows(entry: Entry, before: Entry, at: str) -> None:
    """What holds of any two neighbours in a log."""
    if entry.sequence != before.sequence + 1:
        raise invalid_params(f"{at}.sequence", f"{entry.sequence} follows {before.sequence}")
    if entry.timestamp_ms < before.timestamp_ms:
        raise invalid_params(f"{at}.timestamp_ms", "times do not go back within a run")
    if before.status in _FINAL_CODES and entry.status != before.status:
        raise invalid_params(f"{at}.status", f"a run that is {STATUSES[before.status]} stays so")


def _checked_output(given: ImportedOutput, line: ImportLine, at: str, settings: Settings) -> Output:
    run_id = None if given.run_id is UNSET else given.run_id
    for name, value in (("task_id", given.task_id), ("run_id", run_id or "")):
        check_name(value, settings.name_chars, f"{at}.{name}")
    check_producer(given.producer_agent, settings, f"{at}.producer_agent")
    if len(given.parent_refs) > settings.output_parents:
        raise limit_exceeded("output_parents", len(given.parent_refs), settings.output_parents, f"{at}.parent_refs")
    for place, parent in enumerate(given.parent_refs):
        check_name(parent, settings.name_chars, f"{at}.parent_refs[{place}]")
    try:
        taken = take_in(given.event, settings, private=given.private is True)
    except RpcError as error:
        path = {"path": f"{at}.{error.data['path']}"} if "path" in error.data else {}
        raise RpcError(error.kind, f"{at}.{error.message}", **(error.data | path)) from None
    body = taken.body
    if taken.file is not None:
        # Whether it is UTF-8 is seen when the file is: until then nothing of it can be read.
        body = Body(line.size or 0, line.sha256 or "", utf8=False)
    elif body is not None and line.sha256 not in (None, body.sha256):
        raise invalid_params(f"{at.removesuffix('.output')}.sha256", "it is not that of the content")
    members = {name: getattr(given, name) for name in given.__struct_fields__}
    return Output(owner="", record=OutputRecord(**members | {"event": taken.event}), body=body)


def run_source(head: Head) -> bytes:
    """A run that is stored as the line of an export has it."""
    values = {name: getattr(head.run, name) for name in _OF_SNAPSHOT}
    return encode(ImportedRun(**values, outcome=UNSET if head.outcome is None else Raw(head.outcome)))


class _Counts(Struct):
    runs: int = 0
    events: int = 0
    outputs: int = 0
    skipped: int = 0


class Import(Edit, frozen=True, kw_only=True):
    """`runs.import`: all of its lines, or none. `epoch` names the logs of the runs that appear by it."""

    parts: list[Part]
    epoch: str
    bytes: int
    changes_runs: ClassVar[bool] = True

    @property
    def size(self) -> int:
        return 1024 + self.bytes

    def edit(self, stored: Stored) -> Edited:
        counts = _Counts()
        appeared: list[Head] = []
        for part in self.parts:
            head = self._take(part, stored, counts)
            if head is not None:
                appeared.append(head)
                counts.runs += 1
        answer = Imported(runs=counts.runs, events=counts.events, outputs=counts.outputs, skipped=counts.skipped)
        return Edited(answer, appeared=appeared)

    def _take(self, part: Part, stored: Stored, counts: _Counts) -> Head | None:
        """Does what a line says; the run that appeared by it."""
        match part:
            case RunPart():
                return self._run(part, stored, counts)
            case EventsPart():
                return self._events(part, stored, counts)
            case OutputPart():
                self._output(part, stored, counts)
        return None

    def _output(self, part: OutputPart, stored: Stored, counts: _Counts) -> None:
        """Stores an output as the importer's. Its parents are not looked for: they may have been deleted since.

        Its run is the importer's, too: the host writes into nobody else's (contract, section 5).
        """
        record = part.output.record
        there = stored.outputs.get(record.id)
        if there is not None:
            _compare_outputs(part, there)
            counts.skipped += 1
            return
        if isinstance(record.run_id, str):
            at, run = f"{part.at}.output.run_id", stored.runs.head(record.run_id)
            if run is None:
                raise invalid_params(at, f"the lines of run {record.run_id!r} have to come first")
            if run.owner != self.principal.name:
                raise forbidden(f"{at}: run {record.run_id!r} belongs to another principal")
        stored.outputs.add(replace(part.output, owner=self.principal.name))
        counts.outputs += 1

    def _run(self, part: RunPart, stored: Stored, counts: _Counts) -> Head | None:
        """Begins a run; it is there at once where it has no events."""
        there = stored.runs.head(part.run.id)
        if there is not None:
            _compare_runs(part, there)
            counts.skipped += 1
            return None
        staged = stored.imports.begin(part.run.id, part.source, part.run.created_at_ms)
        return None if part.run.event_count else self._appear(staged, part.run, part.at, stored)

    def _events(self, part: EventsPart, stored: Stored, counts: _Counts) -> Head | None:
        """The next events of a run; the run, where these are its last."""
        staged = stored.imports.get(part.run_id)
        if staged is None:
            there = stored.runs.head(part.run_id)
            if there is None:
                raise invalid_params(f"{part.at}.run_id", f"the line of run {part.run_id!r} has to come first")
            _compare_events(part, there, stored)
            return None
        run = _run_decoder.decode(staged.run)
        _check_fits(part, staged, run)
        stored.runs.append(staged.no, part.entries)
        counts.events += len(part.entries)
        last = part.entries[-1]
        staged = staged._replace(
            cursor=last.sequence + 1,
            last_at_ms=last.timestamp_ms,
            status=last.status,
            log_bytes=staged.log_bytes + sum(len(entry.raw) for entry in part.entries),
            turns=staged.turns + sum(entry.kind != EVENT for entry in part.entries),
        )
        if staged.cursor == run.event_count:
            return self._appear(staged, run, part.at, stored)
        stored.imports.grown(staged)
        return None

    def _appear(self, staged: Staged, run: ImportedRun, at: str, stored: Stored) -> Head:
        if stored.runs.head(run.id) is not None:
            raise _exists(at, run.id, f"run {run.id!r} was made by somebody else while it was imported")
        values = {name: getattr(run, name) for name in _OF_SNAPSHOT}
        head = Head(
            no=staged.no,
            owner=self.principal.name,
            run=Snapshot(**values, epoch=self.epoch),
            revision=1,
            endings=int(not _live(run)),
            last_at_ms=staged.last_at_ms,
            log_bytes=staged.log_bytes,
            turns=staged.turns,
            outcome=bytes(run.outcome) if isinstance(run.outcome, Raw) else None,
        )
        stored.imports.finished(staged)
        return stored.runs.add(head)


def _check_fits(part: EventsPart, staged: Staged, run: ImportedRun) -> None:
    """Whether a page goes on where the one before it ended, and does not go past the run."""
    first, last = part.entries[0], part.entries[-1]
    at = f"{part.at}.events[0]"
    if first.sequence != staged.cursor:
        raise invalid_params(f"{at}.sequence", f"event {staged.cursor} of run {run.id!r} is next, not {first.sequence}")
    if staged.status is None:
        if first.timestamp_ms < run.created_at_ms:
            raise invalid_params(f"{at}.timestamp_ms", "it is before the run's created_at_ms")
    else:
        _check_follows(first, Entry(staged.cursor - 1, staged.last_at_ms, staged.status, b""), at)
    if last.sequence >= run.event_count:
        raise invalid_params(f"{part.at}.events", f"run {run.id!r} has {run.event_count} events, and no more")
    at = f"{part.at}.events[{len(part.entries) - 1}]"
    if last.timestamp_ms > run.updated_at_ms:
        raise invalid_params(f"{at}.timestamp_ms", "it is after the run's updated_at_ms")
    if last.status in _FINAL_CODES and STATUSES[last.status] is not run.status:
        raise invalid_params(f"{at}.status", f"the run is {run.status}: no event of it was {STATUSES[last.status]}")


def _compare_runs(part: RunPart, there: Head) -> None:
    stored = run_source(there)
    if stored == part.source:
        return
    ours = _run_decoder.decode(stored)
    other = [name for name in _MEMBERS if _value(ours, name) != _value(part.run, name)]
    raise _exists(part.at, part.run.id, f"run {part.run.id!r} exists with another {', '.join(other)}")


def _value(run: ImportedRun, name: str) -> object:
    value = getattr(run, name)
    return bytes(value) if isinstance(value, Raw) else value


def _compare_events(part: EventsPart, there: Head, stored: Stored) -> None:
    first, end = part.entries[0].sequence, part.entries[-1].sequence + 1
    if end > there.cursor:
        raise _exists(part.at, part.run_id, f"run {part.run_id!r} exists with {there.cursor} events, not {end} or more")
    for ours, given in zip(stored.runs.entries(there, first, end), part.entries, strict=True):
        if ours != given:
            words = f"run {part.run_id!r} exists with another event {ours.sequence}"
            raise _exists(part.at, part.run_id, words, sequence=ours.sequence)


def _compare_outputs(part: OutputPart, there: Output) -> None:
    ours, given = there.record, part.output.record
    other = [name for name in ours.__struct_fields__ if _encoded(ours, name) != _encoded(given, name)]
    digests = {body.sha256 for body in (there.body, part.output.body) if body is not None and body.sha256}
    if len(digests) > 1 and not other:
        other.append("file")
    if other:
        words = f"output {given.id!r} exists with another {', '.join(other)}"
        raise conflict("exists", f"{part.at}: {words}", path=part.at, id=given.id)


def _encoded(record: OutputRecord, name: str) -> bytes:
    value = getattr(record, name)
    return b"" if value is UNSET else encode(value)


def _exists(at: str, run_id: str, words: str, **more: int) -> RpcError:
    return conflict("exists", f"{at}: {words}", path=at, run_id=run_id, **more)
