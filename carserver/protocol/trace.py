"""The frames of a run's live trace (contract, section 7).

One function makes an event's frame, for those who watch live and for those who read the log later, from what the log
keeps: so both get the same bytes.
"""

from datetime import UTC, datetime

from msgspec import UNSET, Raw

from carserver.protocol.codec import encode
from carserver.protocol.frames import notification
from carserver.protocol.runs import (
    FINAL,
    RECORDS,
    STATUSES,
    EndedRecord,
    LiveStatus,
    Snapshot,
    StartedRecord,
    Status,
    Termination,
    TraceClosed,
    TraceEvent,
)


def live_status(status: Status) -> LiveStatus:
    """`status` of a trace frame: how far the run is, in one of three words."""
    if status is Status.INTERRUPTED:
        return "incomplete"
    return "completed" if status in FINAL else "in_progress"


_TAILS = tuple(b',"status":%b,"run_status":%b}}' % (encode(live_status(status)), encode(status)) for status in STATUSES)


def entry_record(sequence: int, timestamp_ms: int, event: bytes, kind: int) -> bytes:
    """An entry of the log as the stream has it; `kind` is the place in RECORDS of its record."""
    if kind:
        return turn_record(event)
    return b'{"record":"event","sequence":%d,"timestamp_ms":%d,"event":%b}' % (sequence, timestamp_ms, event)


def turn_record(event: bytes) -> bytes:
    """A turn as the stream has it: the first member of its event is its type, which is that of the record, too."""
    return b'{"record"%b' % event[_TYPE:]


_TYPE = len(b'{"type"')
TURN_HEADS = tuple(b'{"type":"%b","index":' % name.encode() for name in RECORDS)
"""How the event of a turn begins, by the place in RECORDS of its record; its sequence follows."""


def turn_event(kind: int, sequence: int, members: bytes) -> bytes:
    """A turn as an event; `members` is the rest of it, JSON from the first comma to the closing brace."""
    return b"%b%d%b" % (TURN_HEADS[kind], sequence, members)


def started_record(run: Snapshot) -> StartedRecord:
    """What a stream begins with that begins at 0. `intent` is the prompt now: `agent_start` may have filled it."""
    return StartedRecord(
        run_id=run.id,
        agent_id=run.agent_id,
        intent=run.prompt,
        outcome_description=run.outcome_description,
        started_at=rfc3339(run.created_at_ms),
    )


def ended_record(run: Snapshot, outcome: bytes | None) -> EndedRecord:
    """The state of a run that is over; `outcome` is what it was completed with."""
    return EndedRecord(
        run_id=run.id,
        run_status=run.status,
        result_text=run.result_text,
        error=run.error,
        termination=UNSET if outcome is None else Termination(outcome=Raw(outcome)),
        ended_at=rfc3339(run.ended_at_ms or run.updated_at_ms),
    )


class TraceFrames:
    """Makes the frames of one run; what is the same in all of them is encoded once."""

    __slots__ = ("_agent_id", "_head", "_run_id")

    def __init__(self, run_id: str, agent_id: str) -> None:
        self._run_id = run_id
        self._agent_id = agent_id
        self._head = b'{"jsonrpc":"2.0","method":"runs.trace.event","params":{"run_id":%b,"agent_id":%b,"record":' % (
            encode(run_id),
            encode(agent_id),
        )

    def entry(self, sequence: int, timestamp_ms: int, status: int, event: bytes, kind: int) -> bytes:
        """An entry of the log; `status` is the place in STATUSES of the run's status after it."""
        if kind:
            return b'%b%b,"cursor":%d%b' % (self._head, turn_record(event), sequence + 1, _TAILS[status])
        return b'%b{"record":"event","sequence":%d,"timestamp_ms":%d,"event":%b},"cursor":%d%b' % (
            self._head,
            sequence,
            timestamp_ms,
            event,
            sequence + 1,
            _TAILS[status],
        )

    def started(self, run: Snapshot) -> bytes:
        """What a stream begins with that begins at 0."""
        return self._frame(started_record(run), 0, Status.CREATED)

    def ended(self, run: Snapshot, outcome: bytes | None) -> bytes:
        """The state of a run that is over."""
        return self._frame(ended_record(run, outcome), run.event_count, run.status)

    def _frame(self, record: StartedRecord | EndedRecord, cursor: int, status: Status) -> bytes:
        params = TraceEvent(
            run_id=self._run_id,
            agent_id=self._agent_id,
            record=record,
            cursor=cursor,
            status=live_status(status),
            run_status=status,
        )
        return notification("runs.trace.event", params)


def closed_frame(run_id: str, reason: str) -> bytes:
    """The last word of a stream that cannot go on."""
    return notification("runs.trace.closed", TraceClosed(run_id=run_id, reason=reason))


def rfc3339(timestamp_ms: int) -> str:
    """Milliseconds since 1970 as a UTC time with milliseconds."""
    moment = datetime.fromtimestamp(timestamp_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
