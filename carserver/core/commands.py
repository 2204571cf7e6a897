"""The commands that change runs. The writer's transaction applies them one by one: the only authority on a head.

A command is data and a pure `apply(head, prior)`: what is stored of the run now (None: nothing), and of the batch that
the command names, go in; an `Applied` comes out, or an `RpcError` is raised and nothing is stored.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from msgspec import Struct

from carserver.core import runs
from carserver.core.principals import Principal, owned, visible
from carserver.core.runs import Entry, Event, Head
from carserver.core.turns import Turn, events_of
from carserver.protocol.errors import conflict, limit_exceeded
from carserver.protocol.runs import FINAL, Cancelled, Recorded, Snapshot, Status


class Batch(NamedTuple):
    """What is kept of a `runs.record` with a `batch_id`: the digest of its events, and its first answer."""

    batch_id: str
    digest: bytes
    answer: Recorded


class Applied(NamedTuple):
    """What a command came to: the run's head after it, what is to be stored, and the caller's answer."""

    head: Head
    answer: Any
    entries: Sequence[Entry] = ()
    batch: Batch | None = None
    ended: bool = False  # the run came to be over by this command


class Command(Protocol):
    """Something that changes one run."""

    @property
    def run_id(self) -> str:
        """The run."""
        ...

    @property
    def principal(self) -> Principal:
        """Who wants it."""
        ...

    @property
    def attends(self) -> bool:
        """Whether whoever submitted it attends the run from then on."""
        ...

    @property
    def batch_id(self) -> str | None:
        """The batch that it looks up and keeps."""
        ...

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        """What it comes to. Raises RpcError where it is refused."""
        ...

    @property
    def size(self) -> int:
        """About how many bytes it keeps while it waits."""
        ...


class _Change(Struct, frozen=True, kw_only=True):
    """What most commands are."""

    run_id: str
    principal: Principal
    now_ms: int
    batch_id: str | None = None
    attends: ClassVar[bool] = False

    @property
    def size(self) -> int:
        return 1024

    def _own(self, head: Head | None) -> Head:
        return owned(head, self.principal, "run", self.run_id)


class Create(_Change, frozen=True, kw_only=True):
    """`runs.create`: `head` is the run to be; under a key, what is there answers if it was made the same way."""

    head: Head
    attends: ClassVar[bool] = True

    @property
    def size(self) -> int:
        return self.head.size

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        if head is None:
            return Applied(self.head, self.head.run)
        if head.key_digest != self.head.key_digest:
            raise conflict("key_reused", "idempotency_key was used before with other params", run_id=self.run_id)
        return Applied(head, head.run)


class Start(Create, frozen=True, kw_only=True):
    """`runs.start`: a key is the run's id, so it is a name among all principals."""

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        if head is not None and head.owner != self.principal.name:
            raise conflict("exists", f"idempotency_key: there is a run {self.run_id!r} of somebody else's")
        return super().apply(head, prior)


class Record(_Change, frozen=True, kw_only=True):
    """`runs.record`: all of `events`, or none."""

    events: list[Event]
    at_ms: list[int] | None = None
    expected_sequence: int | None = None
    run_events: int
    attends: ClassVar[bool] = True

    @property
    def size(self) -> int:
        return 1024 + sum(len(event.raw) + 128 for event in self.events)

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        head = self._own(head)
        digest = self._digest() if self.batch_id is not None else b""
        if prior is not None:
            if prior.digest != digest:
                raise conflict("batch_reused", f"batch_id {self.batch_id!r} was used before with other events")
            return Applied(head, prior.answer)
        cursor = head.cursor
        if self.expected_sequence is not None and self.expected_sequence != cursor:
            raise conflict(
                "sequence", f"expected_sequence {self.expected_sequence}, the log is at {cursor}", cursor=cursor
            )
        if cursor + len(self.events) > self.run_events:
            raise limit_exceeded("run_events", cursor + len(self.events), self.run_events, "events")
        after, entries = runs.advance(head, self.events, self.now_ms, self.at_ms)
        answer = Recorded(
            run_id=self.run_id,
            first_sequence=cursor,
            count=len(entries),
            cursor=after.cursor,
            status=after.run.status,
        )
        batch = Batch(self.batch_id, digest, answer) if self.batch_id is not None else None
        return Applied(after, answer, entries, batch, ended=after.endings > head.endings)

    def _digest(self) -> bytes:
        digest = hashlib.sha256()
        for event in self.events:
            digest.update(b"%d:" % len(event.raw))
            digest.update(event.raw)
        return digest.digest()


class RecordTurns(_Change, frozen=True, kw_only=True):
    """`runs.record_turns`: all of `turns`, or none. A final run takes no more; it answers with the first's sequence."""

    turns: list[Turn]
    run_turns: int
    run_events: int
    attends: ClassVar[bool] = True

    @property
    def size(self) -> int:
        return 1024 + sum(len(turn.members) + 128 for turn in self.turns)

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        head = self._own(head)
        if head.run.status in FINAL:
            raise conflict("run_terminal", f"run {self.run_id!r} is {head.run.status}: it takes no more turns")
        count = len(self.turns)
        if head.turns + count > self.run_turns:
            raise limit_exceeded("turns", head.turns + count, self.run_turns, "turns")
        if head.cursor + count > self.run_events:
            raise limit_exceeded("run_events", head.cursor + count, self.run_events, "turns")
        after, entries = runs.advance(head, events_of(self.turns, head.cursor), self.now_ms)
        return Applied(after, head.cursor, entries, ended=after.endings > head.endings)


class Complete(_Change, frozen=True, kw_only=True):
    """`runs.complete`: the run ended, with `status` and `text`, as `outcome` says. Answers with nothing."""

    status: Status
    text: str
    outcome: bytes

    @property
    def size(self) -> int:
        return 1024 + len(self.text) + len(self.outcome)

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        head = self._own(head)
        after = runs.complete(head, self.status, self.text, self.outcome, self.now_ms)
        return Applied(after, None, ended=True)


class Fail(_Change, frozen=True, kw_only=True):
    """`runs.fail`."""

    error: str

    @property
    def size(self) -> int:
        return 1024 + len(self.error)

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        head = self._own(head)
        return _answered_by_snapshot(head, runs.fail(head, self.error, self.now_ms))


class Cancel(_Change, frozen=True, kw_only=True):
    """`runs.cancel`: the host may, too."""

    reason: str

    @property
    def size(self) -> int:
        return 1024 + len(self.reason)

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        head = visible(head, self.principal, "run", self.run_id)
        after = runs.cancel(head, self.reason, self.now_ms)
        cancelled = after is not head
        return Applied(after, Cancelled(cancelled=cancelled, status=after.run.status), ended=cancelled)


class Resume(_Change, frozen=True, kw_only=True):
    """`runs.resume`."""

    attends: ClassVar[bool] = True

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        head = self._own(head)
        return _answered_by_snapshot(head, runs.resume(head, self.now_ms))


class Interrupt(_Change, frozen=True, kw_only=True):
    """The daemon's own, as host: nobody attends the run. Void if the run changed since that was seen (`revision`)."""

    revision: int
    reason: str

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        head = visible(head, self.principal, "run", self.run_id)
        if head.revision != self.revision:
            return Applied(head, False)
        after = runs.interrupt(head, self.reason, self.now_ms)
        interrupted = after.run.status is Status.INTERRUPTED and after is not head
        return Applied(after, interrupted, ended=interrupted)


def _answered_by_snapshot(before: Head, after: Head) -> Applied:
    run: Snapshot = after.run
    return Applied(after, run, ended=after.endings > before.endings)


class RecordAside(_Change, frozen=True, kw_only=True):
    """The daemon's own events about a handle: they neither attend nor reopen, move no status, and no limit holds them.

    Answers with nothing.
    """

    events: list[Event]

    @property
    def size(self) -> int:
        return 1024 + sum(len(event.raw) + 128 for event in self.events)

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        return self._recorded(visible(head, self.principal, "run", self.run_id))

    def _recorded(self, head: Head) -> Applied:
        after, entries = runs.aside(head, self.events, self.now_ms)
        return Applied(after, None, entries)


class BeginHandle(RecordAside, frozen=True, kw_only=True):
    """A `tool_start` in a live run of one's own, which the invoking connection attends from then on."""

    attends: ClassVar[bool] = True

    def apply(self, head: Head | None, prior: Batch | None) -> Applied:
        head = self._own(head)
        if not head.live:
            raise conflict("run_terminal", f"run {self.run_id!r} is {head.run.status}: no tool starts in it")
        if head.cursor >= runs.ASIDE_ENTRIES:
            raise limit_exceeded("run_entries", head.cursor + 1, runs.ASIDE_ENTRIES, "run_id")
        return self._recorded(head)
