"""Deleting runs and outputs: one by one, or by age, number and size (contract, sections 7 and 9).

Only whole runs that are over go, oldest ended first, so what goes by any criteria is the beginning of that order: a
plan is a place in it. Each transaction looks again at what is over up to that place. A run that went on meanwhile has
left it; one that has ended since stands behind it.
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.edits import Edit, Edited, End, Removed, Stored
from carserver.core.ports import Criteria, Damaged, PruneLog
from carserver.core.principals import HOST, owned
from carserver.protocol.errors import conflict, unavailable
from carserver.protocol.pruning import Pruned
from carserver.protocol.runs import Deleted


class Delete(Edit, frozen=True, kw_only=True):
    """`runs.delete`: one's own run that is over. Its outputs go first, a piece at a time; then the answer is None."""

    run_id: str
    outputs: int
    changes_runs: ClassVar[bool] = True

    def edit(self, stored: Stored) -> Edited:
        head = owned(stored.runs.head(self.run_id), self.principal, "run", self.run_id)
        if head.live:
            raise conflict("run_live", f"run {self.run_id!r} is {head.run.status}: one that is over can be deleted")
        if stored.outputs.remove_of_run(self.run_id, self.outputs).outputs == self.outputs:
            return Edited(None)
        stored.runs.remove(head)
        return Edited(Deleted(deleted=True), deleted=[head])


class Went(NamedTuple):
    """What one transaction removed; `last` is the place of the last run that it is done with, if it has done any."""

    run_ids: list[str]
    outputs: int
    bytes: int
    damaged: int
    last: End | None
    more: bool


class PruneRuns(Edit, frozen=True, kw_only=True):
    """The next runs that are over, behind the place `after` and up to `until`: at most `runs`, and `outputs` of them.

    The outputs of a run go before it, also over several of these.
    """

    after: End | None
    until: End
    runs: int
    outputs: int
    changes_runs: ClassVar[bool] = True

    def edit(self, stored: Stored) -> Edited:
        found = stored.runs.ended(self.after, self.until, self.runs)
        last, more = self.after, len(found) == self.runs
        deleted = []
        outputs = size = damaged = 0
        for run_id, end in found:
            try:
                head = stored.runs.head(run_id)
            except Damaged:
                head = None
            if head is None or head.live:  # it stays, for whoever repairs the file; the others do not wait for that
                damaged += 1
                last = end
                continue
            removed = stored.outputs.remove_of_run(run_id, self.outputs - outputs)
            outputs += removed.outputs
            size += removed.bytes
            if outputs == self.outputs:  # there may be more of them
                more = True
                break
            stored.runs.remove(head)
            deleted.append(head)
            size += head.log_bytes
            last = end
        went = Went([head.run.id for head in deleted], outputs, size, damaged, last, more)
        return Edited(went, deleted=deleted)


class PruneOutputs(Edit, frozen=True, kw_only=True):
    """The oldest outputs without a run, made before `before_ms`."""

    before_ms: int
    limit: int

    def edit(self, stored: Stored) -> Edited:
        return Edited(stored.outputs.remove_old(self.before_ms, self.limit))


class Pruner:
    """Prunes in many small transactions, so that others are served between.

    Args:
        log: Where everything is kept.
        settings: `prune_runs`, `prune_outputs`, `page_entries`.
        counters: What is counted.
        stopping: Whether the daemon drains: then it ends early, with whole runs deleted.
    """

    def __init__(self, log: PruneLog, settings: Settings, counters: Counters, stopping: Callable[[], bool]) -> None:
        self._log = log
        self._settings = settings
        self._counters = counters
        self._stopping = stopping

    async def prune(self, criteria: Criteria, *, dry_run: bool = False) -> Pruned:
        """Prunes by `criteria`, or says what would go.

        Raises:
            RpcError: what storage raises; unavailable where the daemon drains. What went until then is gone.
        """
        self._check_stopping()
        plan = await self._log.plan(criteria, self._settings.page_entries)
        if dry_run:
            return _answer(plan.runs, plan.outputs, plan.bytes, list(plan.ids), dry_run=True)
        self._counters.prunes += 1
        runs = outputs = size = damaged = 0
        ids: list[str] = []
        last: End | None = None
        while plan.until is not None:
            went = await self._prune_runs(last, plan.until)
            runs += len(went.run_ids)
            outputs += went.outputs
            size += went.bytes
            damaged += went.damaged
            ids += went.run_ids[: self._settings.page_entries - len(ids)]
            last = went.last
            if not went.more:
                break
        if criteria.before_ms is not None:
            old_outputs, old_bytes = await self._prune_outputs(criteria.before_ms)
            outputs += old_outputs
            size += old_bytes
        return _answer(runs, outputs, size, ids, damaged=damaged)

    async def _prune_runs(self, after: End | None, until: End) -> Went:
        self._check_stopping()
        settings = self._settings
        edit = PruneRuns(
            principal=HOST, after=after, until=until, runs=settings.prune_runs, outputs=settings.prune_outputs
        )
        went: Went = await self._log.edit(edit)
        self._counters.outputs_pruned += went.outputs
        return went

    async def _prune_outputs(self, before_ms: int) -> Removed:
        total = Removed(0, 0)
        while True:
            self._check_stopping()
            edit = PruneOutputs(principal=HOST, before_ms=before_ms, limit=self._settings.prune_outputs)
            removed: Removed = await self._log.edit(edit)
            self._counters.outputs_pruned += removed.outputs
            total = Removed(total.outputs + removed.outputs, total.bytes + removed.bytes)
            if removed.outputs < self._settings.prune_outputs:
                return total

    def _check_stopping(self) -> None:
        if self._stopping():
            raise unavailable("the daemon stops: what was pruned until now is gone, the rest is there")


def _answer(runs: int, outputs: int, size: int, ids: list[str], *, damaged: int = 0, dry_run: bool = False) -> Pruned:
    return Pruned(
        runs=runs,
        outputs=outputs,
        bytes=size,
        dry_run=dry_run,
        run_ids=ids,
        more_runs=runs - len(ids),
        damaged_runs=damaged,
    )
