"""Edits for unit tests: runs that are over, deletes, and lines of imports."""

from typing import Any

from carserver.core.commands import Fail
from carserver.core.principals import CLIENT, Principal
from carserver.core.prune import Delete
from carserver.core.transfer import RunPart
from carserver.protocol.codec import encode
from carserver.protocol.runs import Snapshot
from carserver.protocol.transfer import ImportedRun
from tests.unit.storing import NOW_MS, Opened, create, event


def fail(run_id: str, by: Principal = CLIENT, now_ms: int = NOW_MS + 2) -> Fail:
    """The command of `runs.fail`."""
    return Fail(run_id=run_id, principal=by, now_ms=now_ms, error="e")


def delete(run_id: str, by: Principal = CLIENT) -> Delete:
    """The edit of `runs.delete`."""
    return Delete(principal=by, run_id=run_id, outputs=1_000)


async def over(store: Opened, run_id: str, events: int = 1, at_ms: int = NOW_MS + 2, size: int = 0) -> None:
    """A run with so many events that has failed at that time."""
    await store.submit(create(run_id))
    if events:
        await store.append(run_id, *(event(number, size) for number in range(events)))
    await store.submit(fail(run_id, now_ms=at_ms))


def imported(run_id: str, **members: Any) -> RunPart:
    """The line of a run."""
    run: Snapshot = create(run_id).head.run
    values = {name: getattr(run, name) for name in ImportedRun.__struct_fields__ if name not in ("metadata", "outcome")}
    part = ImportedRun(**values | members)
    return RunPart("lines[0]", part, encode(part))
