"""What would go if the runs were pruned by some criteria: read, page by page, and not changed."""

import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

from carserver.core.edits import End
from carserver.core.ports import Criteria, Plan
from carserver.stores.runrows import BEFORE_ALL

_PAGE = 1_000  # runs; a reader that stays open would hold back checkpoints
# The sizes of values are known without reading them.
_ENDED = """
    SELECT ended_at_ms, no, id, log_bytes,
        (SELECT count(*) FROM outputs WHERE run_id = runs.id),
        (SELECT coalesce(sum(length(value)), 0) FROM outputs WHERE run_id = runs.id)
    FROM runs WHERE ended_at_ms IS NOT NULL AND (ended_at_ms, no) > (?, ?) ORDER BY ended_at_ms, no LIMIT ?
"""
_RUNS = "SELECT count(*) FROM runs"
_BYTES = """
    SELECT (SELECT coalesce(sum(log_bytes), 0) FROM runs)
        + (SELECT coalesce(sum(length(value)), 0) FROM outputs WHERE run_id IS NOT NULL)
"""
_OLD_OUTPUTS = """
    SELECT count(*), coalesce(sum(length(value)), 0) FROM outputs WHERE run_id IS NULL AND created_at_ms < ?
"""


class _Ended(NamedTuple):
    end: End
    run_id: str
    log_bytes: int
    outputs: int
    output_bytes: int


def read_plan(connection: sqlite3.Connection, criteria: Criteria, ids: int) -> Plan:
    """What would go, with at most so many `ids`: one pass over what is over, oldest ended first, as far as it goes."""
    before_ms, max_runs, max_bytes = criteria
    too_many = _one(connection, _RUNS) - max_runs if max_runs is not None else 0
    too_much = _one(connection, _BYTES) - max_bytes if max_bytes is not None else 0
    plan = Plan()
    found: list[str] = []
    for run in _ended(connection):
        too_old = before_ms is not None and run.end.ended_at_ms < before_ms
        if not (too_old or plan.runs < too_many or plan.bytes < too_much):
            break
        if len(found) < ids:
            found.append(run.run_id)
        plan = Plan(
            runs=plan.runs + 1,
            outputs=plan.outputs + run.outputs,
            bytes=plan.bytes + run.log_bytes + run.output_bytes,
            until=run.end,
        )
    if before_ms is not None:
        outputs, size = connection.execute(_OLD_OUTPUTS, (before_ms,)).fetchone()
        plan = plan._replace(outputs=plan.outputs + outputs, bytes=plan.bytes + size)
    return plan._replace(ids=found)


def _one(connection: sqlite3.Connection, query: str) -> int:
    value: int = connection.execute(query).fetchone()[0]
    return value


def _ended(connection: sqlite3.Connection) -> Iterator[_Ended]:
    after = BEFORE_ALL
    while True:
        rows = connection.execute(_ENDED, (*after, _PAGE)).fetchall()
        for ended_at_ms, no, *rest in rows:
            yield _Ended(End(ended_at_ms, no), *rest)
        if len(rows) < _PAGE:
            return
        after = End(*rows[-1][:2])
