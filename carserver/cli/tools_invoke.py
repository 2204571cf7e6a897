"""`carserver tools invoke`: one invocation, followed by polls to its end, through lost connections.

A poll names the chunk that it goes on from, and only what is before it goes: one whose answer was lost is asked again,
and nothing is lost but what the daemon had to drop. Writing is done beside the loop, so that a pipe that is full, or a
terminal that is stopped, holds back neither the connection nor Ctrl-C.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.output import note
from carserver.cli.talk import ANSWER_S, explained
from carserver.cli.tools_arguments import typed
from carserver.cli.tools_lines import Outcome
from carserver.client import CallError, ClientError, Connection, Pauses
from carserver.client.trace import PATIENCE_S, Opener
from carserver.protocol.errors import ErrorKind
from carserver.protocol.tools import Invoked, Proof, ResultRef, Tool, ToolCancelled, ToolStatus

T = TypeVar("T")

_WAIT_MS = 30_000  # of a poll, and of a cancel for its proof: the longest that the daemon allows
_DEADLINE = "deadline of "  # so begins the error of a handle that was stopped at its timeout


class Order(NamedTuple):
    """What is to be invoked, as it was given; `pairs` are arguments whose types the tool's schema tells."""

    tool: str
    arguments: dict[str, Raw]
    pairs: dict[str, str]
    run_id: str | None
    timeout_ms: int | None
    key: str | None


class Poll(Struct):
    """`protocol.tools.HandlePoll`, its chunks and its result by their bytes."""

    status: ToolStatus
    chunks: list[Raw]
    first_sequence: int
    dropped_chunks: int = 0
    result: Raw | UnsetType = UNSET
    result_ref: ResultRef | UnsetType = UNSET
    error: str | UnsetType = UNSET


class Display(Protocol):
    """Where an invocation is shown, for the length of an `async with`."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def take(self, chunks: list[Raw], missing: int) -> None:
        """The next chunks, before which so many are missing; they are written before the next are taken.

        Raises:
            OSError: nobody reads on, or there is no room.
        """

    def trouble(self, what: str) -> None:
        """Why nothing comes; empty where all is well again."""

    def cancelling(self) -> None:
        """The person has asked for its end."""

    def end(self, outcome: Outcome) -> None:
        """What it came to; after the block."""


# ------------------------------------------------------------------------------------------------- the conversation


async def invoke(open_connection: Opener, order: Order, display: Display) -> ExitCode:
    """Invokes a tool and shows it to its end, which Ctrl-C, TERM or a reader that goes away brings about.

    Raises:
        CommandError: it cannot be invoked so, or its handle is gone.
        ClientError: no connection, and the patience is at its end.
        OSError: what it wrote could not be written; it was cancelled.
    """
    invocation = Invocation(open_connection, order, display)
    try:
        with _interrupting(invocation.stop, display.cancelling):
            async with display:
                outcome = await invocation.run()
            display.end(outcome)
            return _exit_code(outcome, interrupted=invocation.stop.is_set())
    except ClientError:
        if invocation.handle:
            note(f"what became of it is not known; its handle is {invocation.handle}")
        raise
    except asyncio.CancelledError:
        if not invocation.stop.is_set():
            raise
        return ExitCode.INTERRUPTED  # asked twice: what became of it is not waited for


@contextmanager
def _interrupting(stop: asyncio.Event, tell: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C or TERM sets `stop`, and says so; the second of them ends the block."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def interrupt() -> None:
        if not stop.is_set():
            stop.set()
            tell()
        elif task is not None:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _exit_code(outcome: Outcome, *, interrupted: bool) -> ExitCode:
    if interrupted:
        return ExitCode.INTERRUPTED
    if outcome.status is ToolStatus.SUCCEEDED:  # what is incomplete must not pass for the whole in a script
        return ExitCode.OK if isinstance(outcome.missing_chunks, UnsetType) else ExitCode.RUNTIME
    late = outcome.status is ToolStatus.FAILED and str(outcome.error).startswith(_DEADLINE)
    return ExitCode.TIMED_OUT if late else ExitCode.RUNTIME


class Invocation:
    """One invocation, and who follows it. `stop` is set to have it cancelled."""

    def __init__(self, open_connection: Opener, order: Order, display: Display) -> None:
        self.stop = asyncio.Event()
        self.handle = ""  # once there is one
        self._open = open_connection
        self._order = order
        self._display = display
        self._pauses = Pauses(PATIENCE_S)
        self._began_s = time.monotonic()
        self._next = 0  # the sequence of the chunk that comes next
        self._missing = 0
        self._polled = False
        self._proof: Proof | UnsetType = UNSET
        self._writing: asyncio.Task[None] | None = None

    async def run(self) -> Outcome:
        """Invokes it, and follows it until it has ended and all that it said is written.

        Raises:
            CommandError: it cannot be invoked so, or its handle is gone.
            ClientError: no connection at first, or none within the patience later.
            OSError: what it wrote could not be written.
        """
        while True:
            try:
                async with self._open() as connection:
                    if not self.handle:
                        self.handle = await self._begin(connection)
                    self._display.trouble("")
                    return await self._follow(connection)
            except ClientError as error:
                if not self.handle or not error.passing:
                    raise
                self._display.trouble("connection lost, trying again")
                if not await self._pauses.pause():
                    raise

    async def _begin(self, connection: Connection) -> str:
        order = self._order
        arguments = dict(order.arguments)
        if order.pairs:
            arguments |= typed(order.pairs, await _schema(connection, order.tool))
        given = {"run_id": order.run_id, "timeout_ms": order.timeout_ms, "idempotency_key": order.key}
        params = {
            "tool": order.tool,
            "parameters": arguments,
            **{name: value for name, value in given.items() if value is not None},
        }
        try:
            return (await connection.call("tools.invoke", params, ANSWER_S, result_type=Invoked)).handle
        except CallError as error:
            if error.type == ErrorKind.INVALID_PARAMS.type:
                raise CommandError(explained(error).message, ExitCode.USAGE) from None
            raise

    async def _follow(self, connection: Connection) -> Outcome:
        try:
            while not self.stop.is_set():
                poll = await self._unless_stopped(self._poll(connection, _WAIT_MS))
                if poll is not None and await self._take(poll):
                    return await self._outcome(poll)
        except OSError as error:
            if isinstance(error, ClientError):  # some of which are timeouts
                raise
            await cancelled(connection, self.handle)
            raise
        self._proof = (await cancelled(connection, self.handle)).cancel
        poll = await self._poll(connection, 0)
        await self._take(poll)
        return await self._outcome(poll)

    async def _poll(self, connection: Connection, wait_ms: int) -> Poll:
        params = {"handle": self.handle, "after": self._next, "wait_ms": wait_ms}
        raw = await connection.call("tools.poll", params, ANSWER_S + wait_ms / 1000, result_type=Raw)
        poll = msgspec.json.decode(raw, type=Poll | None)
        if poll is None:
            raise CommandError(f"{self.handle} is gone: the daemon was started anew, or somebody else polled it")
        self._pauses.reset()
        return poll

    async def _take(self, poll: Poll) -> bool:
        """Shows what came, for as long as nobody asks for the end; whether that was the last."""
        missing = poll.first_sequence - self._next
        if not self._polled:  # with a key, somebody may have taken what came before: that is not missing
            missing = poll.dropped_chunks
            self._polled = True
        self._missing += missing
        self._next = poll.first_sequence + len(poll.chunks)
        if poll.chunks:
            await self._written()
            self._writing = asyncio.create_task(self._display.take(poll.chunks, missing), name="carserver: writing")
            await self._unless_stopped(self._written())
        return poll.status is not ToolStatus.RUNNING

    async def _written(self) -> None:
        if self._writing is not None:
            await asyncio.shield(self._writing)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What `work` comes to; None where the end is asked for sooner."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for one in (task, stopped):
                one.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)

    async def _outcome(self, poll: Poll) -> Outcome:
        await self._written()
        return Outcome(
            handle=self.handle,
            tool=self._order.tool,
            status=poll.status,
            result=poll.result,
            result_ref=poll.result_ref,
            error=poll.error,
            cancel=self._proof,
            missing_chunks=self._missing or UNSET,
            took_ms=round((time.monotonic() - self._began_s) * 1000),
        )


class _Tools(Struct):
    tools: list[Tool]


async def _schema(connection: Connection, name: str) -> Raw:
    """What a tool's arguments are to be; of an unknown one nothing is known, and its invocation says so."""
    listed = await connection.call("tools.list", {}, ANSWER_S, result_type=_Tools)
    return next((tool.parameters for tool in listed.tools if tool.name == name), Raw(b"true"))


async def cancelled(connection: Connection, handle: str) -> ToolCancelled:
    """Asks for a handle's end, and waits until it is seen."""
    params = {"handle": handle, "wait_ms": _WAIT_MS}
    return await connection.call("tools.cancel", params, ANSWER_S + _WAIT_MS / 1000, result_type=ToolCancelled)
