"""What is true of a run: its head, and how events and operations move its status. Pure; contract, section 7.

The two tables of the contract are `EFFECTS` (events) and the functions `advance` (record), `fail`, `complete`,
`cancel`, `resume` and `interrupt` (operations): each takes a head and gives the next one. Late events are stored and
move nothing; the first final status wins.
"""

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from carserver.protocol.errors import conflict
from carserver.protocol.runs import FINAL, LIVE, RECORDS, STATUSES, Snapshot, Status


class Effect(NamedTuple):
    """What an event does to a live run: the status it leads to, and the text of it that is kept."""

    status: Status
    text: str | None = None  # the event's member that must be a string
    keeps_planning: bool = False


EFFECTS: dict[str, Effect] = {
    "agent_start": Effect(Status.EXECUTING, text="prompt"),
    "planning_start": Effect(Status.PLANNING),
    "step_start": Effect(Status.EXECUTING, keeps_planning=True),
    "turn_start": Effect(Status.EXECUTING, keeps_planning=True),
    "tool_start": Effect(Status.EXECUTING, keeps_planning=True),
    "tool_execution_start": Effect(Status.EXECUTING, keeps_planning=True),
    "verification_start": Effect(Status.VERIFYING),
    "agent_end": Effect(Status.COMPLETED, text="text"),
    "error": Effect(Status.FAILED, text="message"),
}

ASIDE_ENTRIES = 15_000_000
"""A log with so many entries takes no new handle: the key of an event has room for 2^24 (`stores.schema`)."""

CODES = {status: place for place, status in enumerate(STATUSES)}

EVENT, TURN, MODEL_TURN = range(len(RECORDS))
"""Places in RECORDS: how the live trace has an entry of the log."""


class Event(NamedTuple):
    """An event that has passed intake: its bytes on one line, its type, the text that its effect keeps, its kind."""

    raw: bytes
    type: str
    text: str | None
    kind: int = EVENT


class Entry(NamedTuple):
    """An event as the log keeps it.

    `status` is the place in STATUSES of the run's status after it, `kind` that in RECORDS of how the stream has it.
    """

    sequence: int
    timestamp_ms: int
    status: int
    raw: bytes
    kind: int = EVENT


class Head(Struct, frozen=True, kw_only=True):
    """All that is known of a run but its log.

    `no` is the storage's number of the run (0 before it is stored). `revision` counts changes, `endings` the times
    that the run came to be over, `last_at_ms` is the time of its newest event (its creation, before the first),
    `log_bytes` what its events take, `turns` how many of them are turns. `outcome` is how it ended in its agent's own
    words, where it was completed with one: a JSON object, compact.
    """

    no: int
    owner: str
    run: Snapshot
    revision: int
    endings: int
    last_at_ms: int
    log_bytes: int = 0
    turns: int = 0
    outcome: bytes | None = None
    key_digest: bytes | None = None

    @property
    def cursor(self) -> int:
        """How many events the log has."""
        return self.run.event_count

    @property
    def live(self) -> bool:
        """Whether the run is not over."""
        return self.run.status in LIVE

    @property
    def size(self) -> int:
        """About how many bytes it takes to keep this."""
        run = self.run
        texts = (run.prompt, run.result_text, run.error, run.cancel_reason, run.outcome_description)
        kept = (len(bytes(run.metadata)) if run.metadata else 0) + len(self.outcome or b"")
        return 1024 + sum(len(text) for text in texts if text) + kept


class LiveRun(NamedTuple):
    """A run that was live when the storage was opened."""

    run_id: str
    revision: int


class Advance(NamedTuple):
    """The head after an append, and the entries to store."""

    head: Head
    entries: list[Entry]


def advance(head: Head, events: Sequence[Event], now_ms: int, at_ms: Sequence[int] | None = None) -> Advance:
    """Appends events to a run.

    Args:
        head: The run before; an interrupted one is reopened.
        events: What is appended, in order.
        now_ms: The clock; times never go back, whatever it says.
        at_ms: One time per event, clamped between the time of the event before and now; None: all now.
    """
    run = head.run
    now = max(now_ms, run.updated_at_ms)
    state = _State(Status.EXECUTING if run.status is Status.INTERRUPTED else run.status, run)
    entries = []
    last = head.last_at_ms
    for place, event in enumerate(events):
        last = now if at_ms is None else min(max(at_ms[place], last), now)
        state.take(event)
        entries.append(Entry(run.event_count + place, last, CODES[state.status], event.raw, event.kind))
    reopened = run.status is Status.INTERRUPTED
    after = replace(
        run,
        status=state.status,
        prompt=state.prompt,
        result_text=state.result_text,
        error=state.error,
        interrupted_reason=None if reopened else run.interrupted_reason,
        event_count=run.event_count + len(entries),
        updated_at_ms=now,
    )
    return Advance(_changed(head, after, reopened=reopened, last_at_ms=last, events=events), entries)


def aside(head: Head, events: Sequence[Event], now_ms: int) -> Advance:
    """Appends events of the daemon's own, which are not what the agent did: the run's status stays as it is."""
    run = head.run
    now = max(now_ms, run.updated_at_ms)
    code = CODES[run.status]
    entries = [Entry(run.event_count + place, now, code, event.raw) for place, event in enumerate(events)]
    after = replace(run, event_count=run.event_count + len(entries), updated_at_ms=now)
    return Advance(_changed(head, after, last_at_ms=now, events=events), entries)


class _State:
    """The part of a snapshot that events move, while a batch is folded into it."""

    __slots__ = ("error", "prompt", "result_text", "status")

    def __init__(self, status: Status, run: Snapshot) -> None:
        self.status = status
        self.prompt = run.prompt
        self.result_text = run.result_text
        self.error = run.error

    def take(self, event: Event) -> None:
        effect = EFFECTS.get(event.type if event.kind == EVENT else "turn_start")  # one that is recorded has begun
        if effect is None or self.status not in LIVE:
            return
        if effect.keeps_planning and self.status is Status.PLANNING:
            return
        self.status = effect.status
        if event.type == "agent_start":
            self.prompt = self.prompt or event.text or ""
        elif event.type == "agent_end":
            self.result_text, self.error = event.text, None
        elif event.type == "error":
            self.error = event.text


def fail(head: Head, error: str, now_ms: int) -> Head:
    """The run failed, unless it has a final status."""
    if head.run.status in FINAL:
        return head
    return _changed(head, replace(head.run, status=Status.FAILED, error=error, updated_at_ms=_later(head, now_ms)))


def complete(head: Head, status: Status, text: str, outcome: bytes, now_ms: int) -> Head:
    """The run ended as its agent says: completed with `text` as its result, or failed with it as the error.

    Raises:
        RpcError: conflict run_terminal.
    """
    if head.run.status in FINAL:
        raise conflict("run_terminal", f"run {head.run.id!r} is {head.run.status} already")
    completed = status is Status.COMPLETED
    after = replace(
        head.run,
        status=status,
        result_text=text if completed else head.run.result_text,
        error=None if completed else text,
        interrupted_reason=None,
        updated_at_ms=_later(head, now_ms),
    )
    return _changed(head, after, outcome=outcome)


def cancel(head: Head, reason: str, now_ms: int) -> Head:
    """The run is cancelled, unless it has a final status."""
    if head.run.status in FINAL:
        return head
    after = replace(head.run, status=Status.CANCELLED, cancel_reason=reason, updated_at_ms=_later(head, now_ms))
    return _changed(head, after)


def resume(head: Head, now_ms: int) -> Head:
    """An interrupted run goes on; a live one is as it was.

    Raises:
        RpcError: conflict run_terminal.
    """
    if head.run.status in FINAL:
        raise conflict("run_terminal", f"run {head.run.id!r} is {head.run.status} and cannot be resumed")
    if head.live:
        return head
    after = replace(head.run, status=Status.EXECUTING, interrupted_reason=None, updated_at_ms=_later(head, now_ms))
    return _changed(head, after, reopened=True)


def interrupt(head: Head, reason: str, now_ms: int) -> Head:
    """A live run that nobody attends."""
    if not head.live:
        return head
    after = replace(head.run, status=Status.INTERRUPTED, interrupted_reason=reason, updated_at_ms=_later(head, now_ms))
    return _changed(head, after)


def _later(head: Head, now_ms: int) -> int:
    return max(now_ms, head.run.updated_at_ms)


def _changed(
    head: Head,
    run: Snapshot,
    *,
    reopened: bool = False,
    last_at_ms: int | None = None,
    events: Sequence[Event] = (),
    outcome: bytes | None = None,
) -> Head:
    """The next head: counts the change, and an ending where the run came to be over (again)."""
    over = run.status not in LIVE
    ended = over and (reopened or run.status is not head.run.status)
    if ended or not over:
        run = replace(run, ended_at_ms=run.updated_at_ms if over else None)
    return replace(
        head,
        run=run,
        revision=head.revision + 1,
        endings=head.endings + ended,
        last_at_ms=head.last_at_ms if last_at_ms is None else last_at_ms,
        log_bytes=head.log_bytes + sum(len(event.raw) for event in events),
        turns=head.turns + sum(event.kind != EVENT for event in events),
        outcome=head.outcome if outcome is None else outcome,
    )
