"""What the core is given of the running loop and of the machine: time, timers, something to wait for, random names."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from secrets import token_hex
from typing import Any


class LoopClock:
    """Time and timers of the running loop; implements `core.runstore.Clock`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.monotonic = self._loop.time
        self.call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle] = self._loop.call_later

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        return time.time_ns() // 1_000_000

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs work of the daemon's own."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class LoopSignal:
    """Something that one waits for; implements `core.handles.Signal`.

    A bare future and a timer: it may be waited for where there is no task (`rpc.eager`).
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._happened: asyncio.Future[bool] = self._loop.create_future()

    def set(self) -> None:
        """It has happened."""
        self._end(happened=True)

    async def wait(self, timeout_s: float | None) -> bool:
        """Waits for it; False where it has not happened in time."""
        if timeout_s is None:
            return await self._happened
        timer = self._loop.call_later(timeout_s, lambda: self._end(happened=False))
        try:
            return await self._happened
        finally:
            timer.cancel()

    def _end(self, *, happened: bool) -> None:
        if not self._happened.done():
            self._happened.set_result(happened)


def new_output_id() -> str:
    """A random name for an output."""
    return f"out-{token_hex(5)}"


def new_handle() -> str:
    """A random name for a handle, or for a request to a host: 32 hex characters (seed 000)."""
    return token_hex(16)
