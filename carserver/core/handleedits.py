"""What a handle leaves in storage: its events in its run's log, its row while it is open, and its idempotency key.

An open handle of a run is a row, written with its `tool_start` and removed with its `tool_end`: so what a daemon that
was killed left open is closed by the next one, and nothing else is looked at. A key is kept with the handle that it
made, for `tool_key_s`, in the transaction that the tool's start waits for: nothing runs twice for it.
"""

from typing import NamedTuple

from carserver.core.commands import BeginHandle, RecordAside
from carserver.core.edits import Change, Edit, Edited, OpenHandle, Stored, UsedKey
from carserver.core.principals import HOST, Principal
from carserver.core.runs import Event
from carserver.protocol.errors import conflict


class Opened(NamedTuple):
    """The handle that an invocation has: the one it was made for, or the one that its key has made before."""

    handle: str
    is_new: bool


class Open(Edit, frozen=True, kw_only=True):
    """Before a tool starts: its key is used, and its `tool_start` is in its run's log. Answers with an `Opened`.

    `start` is that event, for an invocation in a run. `key_ms` is for how long a key is kept.
    """

    handle: str
    tool: str
    now_ms: int
    run_id: str | None = None
    start: Event | None = None
    key: UsedKey | None = None
    key_ms: int = 0

    @property
    def attends(self) -> str | None:
        return self.run_id

    def edit(self, stored: Stored) -> Edited:
        if self.key is not None and (prior := self._use_key(stored, self.key)) is not None:
            return Edited(Opened(prior.handle, is_new=False))
        applied: list[Change] = []
        if self.run_id is not None and self.start is not None:
            command = BeginHandle(run_id=self.run_id, principal=self.principal, now_ms=self.now_ms, events=[self.start])
            applied.append(stored.runs.apply(command))
            stored.handles.open(OpenHandle(self.handle, self.run_id, self.tool))
        return Edited(Opened(self.handle, is_new=True), applied=applied)

    def _use_key(self, stored: Stored, key: UsedKey) -> UsedKey | None:
        stored.handles.forget_keys(self.now_ms - self.key_ms)
        prior = stored.handles.used_key(key.owner, key.method, key.key)
        if prior is None:
            stored.handles.use_key(key)
        elif prior.digest != key.digest:
            raise conflict("key_reused", "idempotency_key was used before with other params", handle=prior.handle)
        return prior


class Close(Edit, frozen=True, kw_only=True):
    """The end of a handle in its run's log: what is left of its output, and its `tool_end`. Answers with nothing.

    One that is not open was closed before, or never opened; a run that was deleted has no log.
    """

    handle: str
    run_id: str
    events: list[Event]
    now_ms: int
    principal: Principal = HOST

    @property
    def size(self) -> int:
        return 1024 + sum(len(event.raw) + 128 for event in self.events)

    def edit(self, stored: Stored) -> Edited:
        if not stored.handles.close(self.handle) or stored.runs.head(self.run_id) is None:
            return Edited(None)
        command = RecordAside(run_id=self.run_id, principal=HOST, now_ms=self.now_ms, events=self.events)
        return Edited(None, applied=[stored.runs.apply(command)])
