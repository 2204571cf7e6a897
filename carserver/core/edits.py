"""Changes beside a run's own: they add, remove or move whole runs and outputs, within the writer's transaction.

An edit decides what is true by what it finds through `Stored`, and changes it there. Where it raises, all of it is
undone, and its neighbours in the same commit are not touched.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from msgspec import Struct

from carserver.core.commands import Applied, Command
from carserver.core.outputs import Output
from carserver.core.principals import Principal
from carserver.core.runs import Entry, Head


class End(NamedTuple):
    """A run's place among those that are over, oldest ended first: the time of its end, and its number."""

    ended_at_ms: int
    no: int


class Removed(NamedTuple):
    """What went: outputs, and the bytes of these that are inline and of events."""

    outputs: int
    bytes: int


class Staged(NamedTuple):
    """A run that is being imported, before its last event is there.

    `run` is its snapshot as JSON. Its events are stored under `no`: `cursor` of them, `turns` of these are turns,
    `log_bytes` in all. The newest has the time `last_at_ms` (before the first: the run's creation) and the status with
    the code `status` (None).
    """

    no: int
    run_id: str
    run: bytes
    cursor: int
    last_at_ms: int
    status: int | None
    log_bytes: int = 0
    turns: int = 0


class OpenHandle(NamedTuple):
    """The row of a handle whose `tool_start` is in its run's log, and its `tool_end` not yet."""

    handle: str
    run_id: str
    tool: str


class UsedKey(NamedTuple):
    """An idempotency key that a handle was made with: whose, of which method, with what params (digest), and when."""

    owner: str
    method: str
    key: str
    digest: bytes
    at_ms: int
    handle: str


class KeptReceipt(NamedTuple):
    """The receipt of a cancel: whose key made it, of what run (its number), with what params (digest).

    One that is not final says no more than was known when the run was cancelled; the final one takes its place.
    """

    owner: str
    key: str
    no: int
    digest: bytes
    final: bool
    receipt: bytes


class StoredApproval(NamedTuple):
    """An approval, as JSON, and whose it is; `resolved_at_ms` is None while it is pending."""

    id: str
    owner: str
    created_at_ms: int
    resolved_at_ms: int | None
    approval: bytes


class Change(NamedTuple):
    """A command that an edit made on a run: what it came to, and the run's head before."""

    command: Command
    applied: Applied
    before: Head


class Edited(NamedTuple):
    """What an edit came to: the caller's answer, and what the loop must know of runs."""

    answer: Any
    appeared: Sequence[Head] = ()
    deleted: Sequence[Head] = ()
    applied: Sequence[Change] = ()


class StoredRuns(Protocol):
    """The runs of a transaction."""

    def head(self, run_id: str) -> Head | None:
        """The head of a run as it is by now; None if there is none."""
        ...

    def apply(self, command: Command) -> Change:
        """Makes a command on a run that there is, as part of this edit: it is undone where the edit is.

        At most one of a run in an edit, which tells of it in `Edited.applied`. Raises the command's refusal.
        """
        ...

    def add(self, head: Head) -> Head:
        """Stores the head of a run whose log is stored; `head.no` is from `new_no`."""
        ...

    def remove(self, head: Head) -> None:
        """The run is no more; it has no outputs any more. Its log goes later, a piece at a time."""
        ...

    def new_no(self) -> int:
        """A number that no run has or had."""
        ...

    def ended(self, after: End | None, until: End, limit: int) -> Sequence[tuple[str, End]]:
        """The ids and places of runs that are over, oldest ended first: behind `after`, up to `until`."""
        ...

    def entries(self, head: Head, start: int, stop: int) -> Iterable[Entry]:
        """The log of a run from `start` to before `stop`, read as it is asked for. Raises Damaged."""
        ...

    def append(self, no: int, entries: Sequence[Entry]) -> None:
        """Stores entries under the number `no`; of a run, or of one that is being imported."""
        ...


class StoredImports(Protocol):
    """The runs that are being imported: they are not there before their last event is."""

    def get(self, run_id: str) -> Staged | None:
        """What has come of it so far; None if nothing."""
        ...

    def begin(self, run_id: str, run: bytes, last_at_ms: int) -> Staged:
        """It begins, or begins anew: what came of it before is dropped, and where there are too many, the oldest is."""
        ...

    def grown(self, staged: Staged) -> None:
        """More of it has come."""
        ...

    def finished(self, staged: Staged) -> None:
        """It is a run now."""
        ...


class StoredOutputs(Protocol):
    """The outputs of a transaction."""

    def get(self, output_id: str) -> Output | None:
        """The output of this id; None if there is none."""
        ...

    def exists(self, output_id: str, to: Principal) -> bool:
        """Whether there is one that `to` sees."""
        ...

    def keyed(self, owner: str, key: str) -> Output | None:
        """What `owner` appended with this idempotency key; None if nothing."""
        ...

    def add(self, output: Output) -> Output:
        """Stores it, after all others: with its number. Nothing is checked here but that its id and key are new."""
        ...

    def remove_of_run(self, run_id: str, limit: int) -> Removed:
        """Outputs of a run are no more: at most `limit`."""
        ...

    def remove_old(self, before_ms: int, limit: int) -> Removed:
        """The oldest outputs without a run, made before that time, are no more: at most `limit`."""
        ...


class StoredHandles(Protocol):
    """What there is of handles in a transaction: those that are open in a run's log, and the keys of all."""

    def open(self, row: OpenHandle) -> None:
        """Its `tool_start` is recorded."""
        ...

    def close(self, handle: str) -> bool:
        """Its `tool_end` is about to be; False where it was not open."""
        ...

    def used_key(self, owner: str, method: str, key: str) -> UsedKey | None:
        """The handle that was made with it; None if none was."""
        ...

    def use_key(self, used: UsedKey) -> None:
        """It is used now; it was not before."""
        ...

    def forget_keys(self, before_ms: int) -> None:
        """Keys that were used before that time are free again; a bounded number of them at a time."""
        ...


class StoredReceipts(Protocol):
    """The receipts of cancels; they go with their runs."""

    def get(self, owner: str, key: str) -> KeptReceipt | None:
        """What was made with this key; None if nothing."""
        ...

    def put(self, kept: KeptReceipt) -> None:
        """Stores it, in place of the one that the same key has made."""
        ...


class StoredApprovals(Protocol):
    """The approvals of a transaction."""

    def get(self, approval_id: str) -> StoredApproval | None:
        """The approval of this id; None if there is none."""
        ...

    def pending(self) -> tuple[int, int]:
        """How many are pending, and their bytes."""
        ...

    def add(self, row: StoredApproval) -> None:
        """Stores a new one."""
        ...

    def resolve(self, row: StoredApproval) -> None:
        """Stores it in place of the pending one with its id."""
        ...

    def forget(self, but: str, keep: int, keep_bytes: int) -> Sequence[str]:
        """So many resolved ones stay, and so many bytes of them, and `but`; the ids of those that went, the oldest."""
        ...


class Stored(Protocol):
    """What is stored, within the writer's transaction."""

    @property
    def runs(self) -> StoredRuns:
        """Runs."""
        ...

    @property
    def outputs(self) -> StoredOutputs:
        """Outputs."""
        ...

    @property
    def handles(self) -> StoredHandles:
        """Handles."""
        ...

    @property
    def receipts(self) -> StoredReceipts:
        """Receipts."""
        ...

    @property
    def approvals(self) -> StoredApprovals:
        """Approvals."""
        ...

    @property
    def imports(self) -> StoredImports:
        """Unfinished imports."""
        ...


class Edit(Struct, frozen=True, kw_only=True):
    """One such change.

    `principal` is who wants it. `changes_runs`: it adds or removes runs, so what the writer holds back of their heads
    is written before it. `attends`: the run that whoever submitted it attends from then on.
    """

    principal: Principal
    changes_runs: ClassVar[bool] = False

    @property
    def attends(self) -> str | None:
        return None

    @property
    def size(self) -> int:
        """About how many bytes it keeps while it waits."""
        return 1024

    @abstractmethod
    def edit(self, stored: Stored) -> Edited:
        """Does it. Raises RpcError where it is refused."""
