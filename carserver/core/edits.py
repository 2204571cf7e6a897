"""Changes beside a run's own: they add, remove or move whole runs and outputs, within the writer's transaction.

An edit decides what is true by what it finds through `Stored`, and changes it there. Where it raises, all of it is
undone, and its neighbours in the same commit are not touched.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from msgspec import Struct

from carserver.core.principals import Principal
from carserver.core.runs import Head


class Edited(NamedTuple):
    """What an edit came to: the caller's answer, and what the loop must know of runs."""

    answer: Any
    appeared: Sequence[Head] = ()
    deleted: Sequence[Head] = ()


class StoredRuns(Protocol):
    """The runs of a transaction."""

    def head(self, run_id: str) -> Head | None:
        """The head of a run as it is by now; None if there is none."""
        ...

    def add(self, head: Head) -> Head:
        """Stores the head of a run whose log is stored; `head.no` is from `new_no`."""
        ...

    def remove(self, head: Head) -> int:
        """The run is no more, nor are its outputs; how many these were. Its log goes later, a piece at a time."""
        ...

    def new_no(self) -> int:
        """A number that no run has or had."""
        ...


class Stored(Protocol):
    """What is stored, within the writer's transaction."""

    @property
    def runs(self) -> StoredRuns:
        """Runs."""
        ...


class Edit(Struct, frozen=True, kw_only=True):
    """One such change.

    `principal` is who wants it. `changes_runs`: it adds or removes runs, so what the writer holds back of their heads
    is written before it.
    """

    principal: Principal
    changes_runs: ClassVar[bool] = False

    @property
    def size(self) -> int:
        """About how many bytes it keeps while it waits."""
        return 1024

    @abstractmethod
    def edit(self, stored: Stored) -> Edited:
        """Does it. Raises RpcError where it is refused."""
