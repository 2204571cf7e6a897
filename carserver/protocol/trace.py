"""The frames of a run's live trace (contract, section 7).

One function makes an event's frame, for those who watch live and for those who read the log later, from what the log
keeps: so both get the same bytes.
"""

from datetime import UTC, datetime

from carserver.protocol.codec import encode
from carserver.protocol.frames import notification
from carserver.protocol.runs import (
    FINAL,
    STATUSES,
    EndedRecord,
    LiveStatus,
    Snapshot,
    StartedRecord,
    Status,
    TraceClosed,
    TraceEvent,
)


def live_status(status: Status) -> LiveStatus:
    """`status` of a trace frame: how far the run is, in one of three words."""
    if status is Status.INTERRUPTED:
        return "incomplete"
    return "completed" if status in FINAL else "in_progress"


_TAILS = tuple(b',"status":%b,"run_status":%b}}' % (encode(live_status(status)), encode(status)) for status in STATUSES)


class TraceFrames:
    """Makes the frames of one run; what is the same in all of them is encoded once."""

    __slots__ = ("_agent_id", "_head", "_run_id")

    def __init__(self, run_id: str, agent_id: str) -> None:
        self._run_id = run_id
        self._agent_id = agent_id
        self._head = (
            b'{"jsonrpc":"2.0","method":"runs.trace.event","params":{"run_id":%b,"agent_id":%b,"record":{"record":"event"'
            % (encode(run_id), encode(agent_id))
        )

    def event(self, sequence: int, timestamp_ms: int, status: int, event: bytes) -> bytes:
        """An entry of the log; `status` is the place in STATUSES of the run's status after it."""
        return b'%b,"sequence":%d,"timestamp_ms":%d,"event":%b},"cursor":%d%b' % (
            self._head,
            sequence,
            timestamp_ms,
            event,
            sequence + 1,
            _TAILS[status],
        )

    def started(self, run: Snapshot) -> bytes:
        """What a stream begins with that begins at 0. `intent` is the prompt now: `agent_start` may have filled it."""
        record = StartedRecord(
            run_id=run.id,
            agent_id=run.agent_id,
            intent=run.prompt,
            outcome_description=run.outcome_description,
            started_at=rfc3339(run.created_at_ms),
        )
        return self._frame(record, 0, Status.CREATED)

    def ended(self, run: Snapshot) -> bytes:
        """The state of a run that is over."""
        record = EndedRecord(
            run_id=run.id,
            run_status=run.status,
            result_text=run.result_text,
            error=run.error,
            ended_at=rfc3339(run.ended_at_ms or run.updated_at_ms),
        )
        return self._frame(record, run.event_count, run.status)

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
