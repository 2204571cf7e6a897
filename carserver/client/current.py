"""The run that the code at hand belongs to: that of the innermost `async with car.run(…)` around it.

Tasks and `asyncio.to_thread` begun within the block have it too; other threads do not, as contextvars have it.
"""

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from carserver.client.run import Run

current: ContextVar["Run | None"] = ContextVar("carserver_run", default=None)


def current_run() -> "Run | None":
    """The run of this block; None outside of any, and once it has ended."""
    run = current.get()
    return None if run is None or run.over else run
