"""The runs, as methods use them: every change goes through the log, every answer comes from what is committed."""

from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from carserver.config import Settings
from carserver.core.attendance import Attendance, Attendant
from carserver.core.commands import Cancel, Command, Create, Interrupt
from carserver.core.counters import Counters
from carserver.core.edits import Edit, Edited
from carserver.core.hub import Hub
from carserver.core.ports import Committed, Damaged, Done, Hooks, Place, RunLog, Scan, Timer
from carserver.core.principals import HOST, Principal, visible
from carserver.core.runs import Head, LiveRun
from carserver.core.subscription import Topic
from carserver.core.watch import Watchers
from carserver.protocol.errors import RpcError, not_found
from carserver.protocol.frames import notification
from carserver.protocol.runs import ListRuns, RunCancelled, Status

DELETED = "the run was deleted"


class Clock(Protocol):
    """The daemon's clocks and timers."""

    def now_ms(self) -> int:
        """Milliseconds since 1970; may jump."""
        ...

    def monotonic(self) -> float:
        """Seconds; never jumps."""
        ...

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Calls back after so many seconds."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> object:
        """Runs work of the daemon's own, beside everything else."""
        ...


class RunStore:
    """All runs.

    Args:
        log: Where they are kept.
        clock: Time, timers.
        settings: The bounds.
        counters: What is counted.
        hooks: What else is told of runs.
    """

    def __init__(
        self, log: RunLog, clock: Clock, settings: Settings, counters: Counters, hooks: Hooks | None = None
    ) -> None:
        self._log = log
        self._clock = clock
        self._counters = counters
        self._hooks = hooks
        self.hub = Hub(log, clock.call_later, settings, counters)
        self.watchers = Watchers(settings, counters)
        self.attendance = Attendance(settings, clock.monotonic, clock.call_later, self._interrupt)
        self._tell_over: Callable[[str], None] = lambda _: None

    def on_over(self, tell: Callable[[str], None]) -> None:
        """Whom to tell the id of each run that failed, was cancelled, interrupted or deleted, once that is published.

        What goes on for such a run is not wanted any more. It is called on the loop, and only takes note.
        """
        self._tell_over = tell

    async def change(self, command: Command, by: Attendant | None) -> Any:
        """The command's answer, once it is durable and published; then `by` attends the run.

        Raises:
            RpcError: as the command says; deadline_exceeded, overloaded, unavailable.
        """
        with self._arriving(command.run_id if command.attends else None, command.principal):
            return await self._log.submit(command, by)

    async def edit(self, edit: Edit, by: Attendant | None = None, *, patient: bool = False) -> Any:
        """The edit's answer, once it is durable and published; then `by` attends the run that it names, if it does.

        `patient`: see `core.ports.RunLog`.

        Raises:
            RpcError: as the edit says; deadline_exceeded, overloaded, unavailable.
        """
        with self._arriving(edit.attends, edit.principal):
            return await self._log.edit(edit, by, patient=patient)

    @contextmanager
    def _arriving(self, run_id: str | None, principal: Principal) -> Iterator[None]:
        """While a change is on its way that lets somebody attend a run, unless it is known that it will be refused."""
        topic = None if run_id is None else self.hub.find(run_id)
        refused = topic is not None and topic.head is not None and topic.head.owner != principal.name
        if run_id is None or refused:
            yield
            return
        self.attendance.arriving(run_id)
        try:
            yield
        finally:
            self.attendance.arrived(run_id)

    def committed(self, changes: Sequence[Committed | Done]) -> None:
        """What one commit made, before any of it is acknowledged; called on the loop, in the log's order."""
        commands: list[Committed] = []
        for change in changes:
            if isinstance(change, Committed):
                commands.append(change)
                continue
            _, edited, by = change
            commands += [Committed(command, applied, by, before) for command, applied, before in edited.applied]
            if edited.appeared or edited.deleted:
                self._changed(commands)
                commands = []
                self._edited(edited)
        self._changed(commands)
        self.watchers.move()

    def _changed(self, changes: Sequence[Committed]) -> None:
        try:
            self.hub.publish((change.applied.head, change.applied.entries, change.applied.ended) for change in changes)
            self.watchers.publish((change.before, change.applied.head) for change in changes)
        finally:
            for change in changes:
                self._attend(change)

    def _attend(self, change: Committed) -> None:
        command, applied, by, _ = change
        self._counters.events_recorded += len(applied.entries)
        if applied.ended and isinstance(command, Cancel):
            self._tell_cancelled(command)
        if applied.ended and isinstance(command, Interrupt):
            self._counters.runs_interrupted += 1
        self.attendance.changed(applied.head, by if command.attends else None)
        if applied.ended and applied.head.run.status is not Status.COMPLETED:
            self._tell_over(command.run_id)
        if self._hooks is not None:
            self._tell_hooks(self._hooks, change)

    @staticmethod
    def _tell_hooks(hooks: Hooks, change: Committed) -> None:
        command, run = change.command, change.applied.head.run
        if change.before is None and isinstance(command, Create):
            hooks.run_created(run.id, run.session_id)
        if change.applied.ended:
            if isinstance(command, Cancel):
                hooks.run_cancelled(run.id, run.session_id, command.reason)
            hooks.run_ended(run.id, run.session_id, run.status)

    def _edited(self, edited: Edited) -> None:
        for head in edited.appeared:
            self._counters.runs_imported += 1
            self.hub.publish([(head, (), False)])
            self.attendance.changed(head, None)
        for head in edited.deleted:
            self._counters.runs_deleted += 1
            self.hub.close(head.run.id, DELETED)
            self._tell_over(head.run.id)
        self.watchers.publish((None, head) for head in edited.appeared)
        self.watchers.deleted(edited.deleted)

    async def topic(self, run_id: str, principal: Principal) -> Topic:
        """A run that `principal` may see, as the loop knows it.

        Raises:
            RpcError: not_found; what reading raises.
        """
        topic = self.hub.find(run_id)
        if topic is None or topic.head is None:
            topic = self.hub.pin(run_id)
            try:
                head = await self._log.head(run_id)
                if head is not None:
                    topic.update(head)
            finally:
                self.hub.unpin(topic)
        visible(None if topic.closed else topic.head, principal, "run", run_id)
        return topic

    async def scan(self, head: Head, after: int, limit: int, types: Sequence[str] | None) -> Scan:
        """Entries of a log from the cursor `after`, never past `head`."""
        try:
            return await self._log.scan(head, after, head.cursor, limit, types)
        except Damaged:
            now = await self._log.head(head.run.id)
            if now is None or now.no != head.no:
                raise not_found("run", head.run.id) from None  # it was deleted meanwhile, and its log with it
            raise

    async def list(self, principal: Principal, filters: ListRuns, after: Place | None, limit: int) -> list[Head]:
        """Runs that `principal` may see, newest first."""
        owner = None if principal.role == "host" else principal.name
        return await self._log.list(owner, filters, after, limit)

    def found_live(self, runs: Sequence[LiveRun], old_boot_id: str) -> None:
        """The runs that were live when the daemon started: they have the grace to be attended again."""
        self.attendance.found(runs, f"daemon restarted (boot {old_boot_id})")

    def _tell_cancelled(self, command: Cancel) -> None:
        frame = notification("runs.cancelled", RunCancelled(run_id=command.run_id, reason=command.reason))
        for attendant in self.attendance.attendants(command.run_id):
            attendant.outbox.send(frame)

    def _interrupt(self, run_id: str, revision: int, reason: str) -> None:
        command = Interrupt(
            run_id=run_id, principal=HOST, now_ms=self._clock.now_ms(), revision=revision, reason=reason
        )
        self._clock.spawn(self._submit_interrupt(command))

    async def _submit_interrupt(self, command: Interrupt) -> None:
        try:
            await self._log.submit(command, None)
        except Exception as error:
            self.attendance.again(command.run_id)
            if not isinstance(error, RpcError):
                raise
