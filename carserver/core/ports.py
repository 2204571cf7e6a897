"""What the core wants of the world: a log of runs that keeps what it is given, and answers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from carserver.core.attendance import Attendant
from carserver.core.commands import Applied, Command
from carserver.core.edits import Edit, Edited, End
from carserver.core.runs import Entry, Head
from carserver.protocol.errors import ErrorKind, RpcError
from carserver.protocol.runs import ListRuns, Status
from carserver.protocol.tools import ToolStatus


class Committed(NamedTuple):
    """A command that is durable now; `by` is what it was submitted with, `before` the run's head before."""

    command: Command
    applied: Applied
    by: Attendant | None
    before: Head | None = None


class Done(NamedTuple):
    """An edit that is durable now; `by` is what it was submitted with."""

    edit: Edit
    edited: Edited
    by: Attendant | None = None


class Scan(NamedTuple):
    """The entries that were wanted, and the cursor past the last one looked at."""

    entries: list[Entry]
    cursor: int


class Place(NamedTuple):
    """Where a list of runs, newest first, goes on: after the run with this creation time and number."""

    created_at_ms: int
    no: int


class Criteria(NamedTuple):
    """What shall go: what ended before that time, and the oldest ended of what is more than that many or that much."""

    before_ms: int | None = None
    max_runs: int | None = None
    max_bytes: int | None = None


class Plan(NamedTuple):
    """What would go by some criteria: the runs that are over up to `until`, and the first of their ids.

    `bytes` is what the events and the outputs of these runs take, and the outputs without a run.
    """

    runs: int = 0
    outputs: int = 0
    bytes: int = 0
    ids: Sequence[str] = ()
    until: End | None = None


class Hooks(Protocol):
    """What is to be told of runs beside the peers: called on the loop once a change is durable; it only takes note."""

    def run_created(self, run_id: str, session_id: str) -> None:
        """A run is there; not one that was imported."""
        ...

    def run_cancelled(self, run_id: str, session_id: str, reason: str) -> None:
        """A run was cancelled; that it ended is said next."""
        ...

    def run_ended(self, run_id: str, session_id: str, status: Status) -> None:
        """A run came to be over: with a final status, or interrupted, after which it may go on and end again."""
        ...

    def tool_started(self, handle: str, tool: str, run_id: str) -> None:
        """A tool was invoked; `run_id` is empty where it is part of no run."""
        ...

    def tool_ended(self, handle: str, tool: str, status: ToolStatus, run_id: str) -> None:
        """A handle has its last status."""
        ...


class Damaged(RpcError):
    """What is stored is missing, or not what was stored: reading it again will not help."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorKind.UNAVAILABLE, message, outcome="not_done")


class Deleted(Damaged):
    """What was asked for is missing because its run was deleted meanwhile: no damage."""


class Timer(Protocol):
    """A call that will be made."""

    def cancel(self) -> None:
        """It is not wanted any more."""
        ...


CallLater = Callable[[float, Callable[[], None]], object]
"""Calls back after so many seconds."""

PageDone = Callable[[list[Entry] | Exception], None]


class PageReader(Protocol):
    """Reads pages of logs without being awaited."""

    def page(self, head: Head, start: int, stop: int, entries: int, size: int, done: PageDone) -> None:
        """The entries from `start` to before `stop`: at most `entries`, about `size` bytes, at least one.

        `done` is called once, later, on the loop, with them or with why not; a gap or a damaged entry is an error.
        """
        ...


class RunLog(PageReader, Protocol):
    """Keeps runs. What it acknowledges is durable; a commit is published, in order, before it is acknowledged."""

    async def submit(self, command: Command, by: Attendant | None, *, patient: bool = False) -> Any:
        """The command's answer, once it is durable.

        `patient`: it waits as long as that takes. The deadline is there to answer peers, and leaves the outcome open.

        Raises:
            RpcError: the command's refusal; unavailable, overloaded, deadline_exceeded.
        """
        ...

    async def edit(self, edit: Edit, by: Attendant | None = None, *, patient: bool = False) -> Any:
        """The edit's answer, once it is durable; it raises as `submit` does."""
        ...

    async def head(self, run_id: str) -> Head | None:
        """The head of a run; None if there is none."""
        ...

    async def scan(self, head: Head, start: int, stop: int, limit: int, types: Sequence[str] | None) -> Scan:
        """Entries for `runs.events`: of these types if given."""
        ...

    async def list(self, owner: str | None, filters: ListRuns, after: Place | None, limit: int) -> list[Head]:
        """Runs for `runs.list`, newest first, of this owner if given: at most `limit`.

        Where they fill more than a page, it ends with the one that does not fit, the second at the earliest.
        """
        ...


class PruneLog(Protocol):
    """What pruning wants of a `RunLog`."""

    async def edit(self, edit: Edit) -> Any:
        """See `RunLog`."""
        ...

    async def plan(self, criteria: Criteria, ids: int) -> Plan:
        """What would go by `criteria`, with at most so many `ids`."""
        ...
