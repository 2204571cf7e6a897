"""Tools that this process offers: registered on every new connection, run when the daemon asks (contract, section 6).

A coroutine runs as a task; a function, which may block, in one of THREADS threads. Every request is answered, and that
is the proof that nothing of it lives: so one that was cancelled is answered when it has ended, and not before.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Raw

from carserver.client.connection import Connection, Request
from carserver.client.errors import CallError, ClientError, ConnectionLost
from carserver.client.execution import Execution, Threads
from carserver.client.link import Link
from carserver.client.pauses import Pauses
from carserver.client.signatures import Tool
from carserver.protocol.errors import ErrorKind
from carserver.protocol.tools import CancelExecution, ExecuteTool

AT_ONCE = 64  # calls that run, or wait for a thread; one more is refused
ANSWER_S = 30.0  # for a registration
CLOSE_S = 2.0  # at the end, for what runs to stop and be answered
_FIRST_S = 0.5  # before a name that was taken is tried again; the pauses grow
_LONGEST_S = 10.0
_RUN = "carserver client: tool"

_logger = logging.getLogger("carserver.client.tools")
_execute = msgspec.json.Decoder(ExecuteTool)
_cancel = msgspec.json.Decoder(CancelExecution)


class Hosting:
    """The tools of a `Car`. All of it belongs to the link's event loop.

    Args:
        link: the connection; it is told what is served over it.
        at_once: calls that may run at a time, or wait for a thread.
    """

    def __init__(self, link: Link, *, at_once: int = AT_ONCE) -> None:
        self._link = link
        self._at_once = at_once
        self._tools: dict[str, Tool] = {}
        self._registered: set[str] = set()  # on the connection that is up
        self._taken: dict[str, CallError] = {}  # that somebody else hosts; tried again
        self._connection: Connection | None = None
        self._one_by_one = asyncio.Lock()
        self._running: dict[str, Execution] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._offers: set[asyncio.Task[None]] = set()
        self._trying: asyncio.Task[None] | None = None
        self._threads = Threads()
        self._closing = False
        link.serve("tools.execute", self._asked)
        link.on("tools.cancel", self._told_to_stop)
        link.on_up(self._up)
        link.on_close(self._close)

    # What is offered.

    def offer(self, tool: Tool) -> None:
        """Offers a tool from now on; over a connection that is up it is registered soon, see `settled`.

        Raises:
            ValueError: there is one of this name.
        """
        if tool.name in self._tools:
            raise ValueError(f"there is a tool {tool.name!r} already: name it otherwise, @car.tool(name=…)")
        self._tools[tool.name] = tool
        if self._connection is not None:
            task = self._go(self._register_soon, "carserver client: tools, registering")
            self._offers.add(task)
            task.add_done_callback(self._offers.discard)

    @property
    def settling(self) -> bool:
        """Whether tools were offered of which it is not known yet what the daemon says."""
        return bool(self._offers)

    async def settled(self) -> None:
        """Waits until the daemon has answered what was offered so far."""
        while self._offers:
            await asyncio.wait(self._offers)

    # Registering.

    async def _up(self, connection: Connection) -> None:
        self._connection = connection
        self._registered.clear()  # what an older connection still answers is not added
        self._taken.clear()
        self._go(lambda: self._watch(connection), "carserver client: tools, watcher")
        await self._register()

    async def _watch(self, connection: Connection) -> None:
        """Ends what runs for a connection together with it: nobody waits for it any more."""
        await connection.ended()
        if self._connection is connection:
            self._connection = None
        for execution in list(self._running.values()):
            if execution.connection is connection:
                execution.cancel()

    async def _register_soon(self) -> None:
        with suppress(ClientError):  # a refusal is logged; a connection that was lost is followed by one that has all
            await self._register()

    async def _register(self) -> None:
        """Registers what is not; each by itself, for a name that is taken is to spoil no other.

        Raises:
            CallError: a tool is refused, and not offered any more; the others are registered.
            ConnectionLost, CallTimeout: it is not known what is registered.
        """
        async with self._one_by_one:
            connection = self._connection
            missing = [tool for tool in self._tools.values() if tool.name not in self._registered]
            if connection is None or not missing:
                return
            calls = (self._register_one(connection, tool) for tool in missing)
            failures = [failure for failure in await asyncio.gather(*calls, return_exceptions=True) if failure]
            if self._taken and self._trying is None:
                self._trying = self._go(self._try_again, "carserver client: tools, taken names")
        for failure in failures:
            raise failure

    async def _register_one(self, connection: Connection, tool: Tool) -> None:
        try:
            await connection.call("tools.register", [tool.given], ANSWER_S, result_type=int)
        except CallError as error:
            if error.type == ErrorKind.CONFLICT.type:
                if tool.name not in self._taken:
                    _logger.warning("tool %r is not registered: %s; it is tried again", tool.name, error)
                self._taken[tool.name] = error
                return
            if not error.passing:
                del self._tools[tool.name]
                _logger.error("tool %r is refused: %s", tool.name, error)  # noqa: TRY400 - the words are all
            raise
        if connection is self._connection:
            self._registered.add(tool.name)
        if self._taken.pop(tool.name, None) is not None:
            _logger.info("tool %r is registered now", tool.name)

    async def _try_again(self) -> None:
        """Until nobody else has a tool's name; a session that died unnoticed has it for a minute at most."""
        pauses = Pauses(math.inf, first_s=_FIRST_S, longest_s=_LONGEST_S)
        try:
            while self._taken and self._connection is not None and await pauses.pause():
                with suppress(ClientError):
                    await self._register()
        finally:
            self._trying = None

    # What the daemon asks.

    def _asked(self, connection: Connection, request: Request) -> None:
        asked = _execute.decode(request.params)
        tool = self._tools.get(asked.tool)
        if tool is None or self._closing:
            self._refuse(connection, request, f"this host has no tool {asked.tool!r}", ErrorKind.NOT_FOUND)
        elif len(self._running) >= self._at_once:
            words = f"this host runs {len(self._running)} calls already (at_once)"
            self._refuse(connection, request, words, ErrorKind.OVERLOADED)
        else:  # known at once: news that it is to stop may be next
            execution = self._running[asked.request_id] = Execution(connection, asked, tool, self._threads)
            self._go(lambda: self._run(execution), _RUN)

    def _refuse(self, connection: Connection, request: Request, words: str, kind: ErrorKind) -> None:
        self._go(lambda: connection.refuse(request.id, words, kind), "carserver client: refusal")

    async def _run(self, execution: Execution) -> None:
        try:
            await execution.run()
        finally:
            del self._running[execution.request_id]

    def _told_to_stop(self, params: Raw) -> None:
        execution = self._running.get(_cancel.decode(params).request_id)
        if execution is not None:
            execution.cancel()

    def _go(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> asyncio.Task[None]:
        async def go() -> None:
            with suppress(ConnectionLost):  # of the connection that it was for: nobody is there any more
                await work()

        task = asyncio.create_task(go(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # The end.

    async def _close(self) -> None:
        """Takes the tools back, stops what runs and waits a little for its answers."""
        self._closing = True
        try:
            with suppress(ClientError, TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._take_back()
            running = [task for task in self._tasks if task.get_name() == _RUN]
            for execution in self._running.values():
                execution.cancel()
            if running:
                await asyncio.wait(running, timeout=CLOSE_S)
        finally:
            left = [*self._tasks]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            self._threads.close()

    async def _take_back(self) -> None:
        connection = self._connection
        if connection is not None:
            calls = [connection.call("tools.unregister", {"name": name}) for name in self._registered]
            await asyncio.gather(*calls, return_exceptions=True)
