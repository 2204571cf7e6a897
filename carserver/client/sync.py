"""The client for programs without an event loop: every method blocks, and a thread of its own keeps the connection.

with carserver.client.sync.connect() as car:
    with car.run("fix the tests") as run:
        run.text("Looking at the failures.")
    for record in car.runs.trace(run.id):
        print(record.kind, record.cursor)

Everything may be used from any thread; what is interrupted from the keyboard is given up.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Generator
from contextlib import aclosing, suppress
from contextvars import Token
from functools import cached_property, wraps
from os import PathLike
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, overload

from carserver.client import api_sync, car
from carserver.client.api_sync import Outputs, Rpc, Server, Session, Tools
from carserver.client.background import Background
from carserver.client.current import current
from carserver.client.link import PATIENCE_S
from carserver.client.run import Run as AsyncRun
from carserver.client.run import RunCancelled
from carserver.client.trace import Traced
from carserver.protocol.runs import Snapshot

READ_AHEAD = 256  # records of a trace that wait for the thread that reads it

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
T = TypeVar("T")


def connect(
    url: str | None = None,
    *,
    token: str | None = None,
    host_token: str | None = None,
    agent_id: str | None = None,
    state_dir: str | PathLike[str] | None = None,
    patience_s: float = PATIENCE_S,
) -> "Car":
    """A daemon to work with; `with` connects to it and, at its end, disconnects. See `carserver.client.connect`."""
    return Car(
        car.connect(
            url, token=token, host_token=host_token, agent_id=agent_id, state_dir=state_dir, patience_s=patience_s
        )
    )


def _run(make: Callable[Concatenate[car.Car, P], AsyncRun]) -> Callable[Concatenate["Car", P], "Run"]:
    """`Run` as a method, with the parameters of the asynchronous one."""

    @wraps(make, assigned=["__doc__"], updated=[])
    def run(sync: "Car", /, *args: P.args, **kwargs: P.kwargs) -> "Run":
        return Run(sync.background, make(sync.beneath, *args, **kwargs))

    return run


class Car:
    """A daemon, through a link that is kept up in the background. Made by `connect`."""

    def __init__(self, beneath: car.Car) -> None:
        self.beneath = beneath
        self.background = Background("carserver client")

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Connects, where `with` does not fit.

        Raises:
            NotAuthorised, Unreachable, Misconfigured: there is no connection, in words that say what to do.
        """
        self.background.start()
        try:
            self.background.run(self.beneath.open())
        except BaseException:
            self.background.stop()
            raise

    def close(self) -> None:
        """Disconnects; harmless when it is closed."""
        if self.background.runs:
            try:
                self.background.run(self.beneath.close())
            finally:
                self.background.stop()

    # Runs and tools of this process.

    run = _run(AsyncRun)

    @overload
    def tool(self, function: F, /) -> F: ...
    @overload
    def tool(
        self, /, *, name: str | None = None, description: str | None = None, idempotent: bool = False
    ) -> Callable[[F], F]: ...
    def tool(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        description: str | None = None,
        idempotent: bool = False,
    ) -> Any:
        """Offers a function as a tool, and leaves it as it is; see the asynchronous `Car.tool`.

        It is called in other threads, several at a time; a coroutine, in the background's.
        """

        def offer(given: F) -> F:
            async def on_loop() -> F:
                return self.beneath.tool(name=name, description=description, idempotent=idempotent)(given)

            if self.background.runs:
                return self.background.run(on_loop())
            return self.beneath.tool(name=name, description=description, idempotent=idempotent)(given)

        return offer if function is None else offer(function)

    # The daemon's methods, by namespace.

    @cached_property
    def runs(self) -> "Runs":
        """`runs.*`, and `trace`."""
        return Runs(self)

    @cached_property
    def tools(self) -> Tools:
        """`tools.*`."""
        return Tools(self)

    @cached_property
    def outputs(self) -> Outputs:
        """`outputs.*`."""
        return Outputs(self)

    @cached_property
    def server(self) -> Server:
        """`server.*`."""
        return Server(self)

    @cached_property
    def session(self) -> Session:
        """`session.*`."""
        return Session(self)

    @cached_property
    def rpc(self) -> Rpc:
        """`rpc.*`."""
        return Rpc(self)

    @overload
    def call(
        self, method: str, params: Any = None, *, timeout: float | None = None, again: bool | None = None
    ) -> Any: ...
    @overload
    def call(
        self,
        method: str,
        params: Any = None,
        *,
        result_type: type[T],
        timeout: float | None = None,
        again: bool | None = None,
    ) -> T: ...
    def call(
        self,
        method: str,
        params: Any = None,
        *,
        result_type: Any = Any,
        timeout: float | None = None,
        again: bool | None = None,
    ) -> Any:
        """Asks the daemon, and waits for the answer; see the asynchronous `Car.call`."""
        asked = self.beneath.call(method, params, result_type=result_type, timeout=timeout, again=again)
        return self.background.run(asked)


class Runs(api_sync.Runs):
    """`runs.*`."""

    def __init__(self, calls: Car) -> None:
        super().__init__(calls)
        self._car = calls

    def trace(self, run_id: str, *, cursor: int = 0, epoch: str | None = None) -> Generator[Traced, None, None]:
        """The records of a run as they happen, each once and in order, until the run is over.

        See the asynchronous `Runs.trace`. Where it is left before its end, `contextlib.closing` ends it at once.
        """
        background = self._car.background
        reading = _Reading()
        reader = background.run(reading.start(self._car.beneath.runs.trace(run_id, cursor=cursor, epoch=epoch)))
        try:
            while records := background.run(reading.take()):
                yield from records
        finally:
            with suppress(RuntimeError):  # the car is closed, and the trace ended with it
                background.run(_ended(reader))


class _Reading:
    """A trace that is read ahead on the loop, so that a record does not cost a thread's wake-up. Bounded."""

    def __init__(self) -> None:
        self._records: deque[Traced] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._failure: BaseException | None = None
        self._over = False

    async def start(self, records: Any) -> "asyncio.Task[None]":
        return asyncio.create_task(self._read(records), name="carserver client: trace")

    async def take(self) -> list[Traced]:
        """What has come, at least one; none at the end."""
        while not self._records and not self._over:
            self._changed.clear()
            await self._changed.wait()
        if not self._records and self._failure is not None:
            raise self._failure
        taken = list(self._records)
        self._records.clear()
        self._room.set()
        return taken

    async def _read(self, records: Any) -> None:
        try:
            async with aclosing(records):
                async for record in records:
                    self._records.append(record)
                    self._changed.set()
                    while len(self._records) >= READ_AHEAD:
                        self._room.clear()
                        await self._room.wait()
        except Exception as error:  # noqa: BLE001 - it is the reader's
            self._failure = error
        finally:
            self._over = True
            self._changed.set()


async def _ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])


class Run:
    """One run of this program's: `with car.run(…) as run`; the asynchronous `Run` says what it does.

    Another thread's code cannot be cancelled: when the run is cancelled from outside, the next `record`, `text` or
    `flush` raises RunCancelled, and `cancelled` says so before.
    """

    def __init__(self, background: Background, beneath: AsyncRun) -> None:
        self._background = background
        self.beneath = beneath
        self._token: Token[AsyncRun | None] | None = None

    def __enter__(self) -> Self:
        self._background.run(self.beneath.open(None))
        self._token = current.set(self.beneath)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._background.run(self.beneath.close(error))
        finally:
            if self._token is not None:
                with suppress(ValueError):  # left in another context than entered
                    current.reset(self._token)

    # Recording.

    def record(self, *events: object) -> None:
        """Records events; where the buffer is full, it waits for room, or raises BufferFull, as the run was made.

        Raises:
            RunCancelled: the run was cancelled from outside.
            BufferFull, EventRefused, NotRecorded, RunOver, TypeError, ValueError: as the asynchronous one.
        """
        self._check()
        self.beneath.record_from_thread(*events)

    def text(self, text: str) -> None:
        """Records a piece of what the agent writes; raises as `record` does."""
        self._check()
        self.beneath.text_from_thread(text)

    def flush(self) -> None:
        """Waits until what was recorded so far is durable.

        Raises:
            RunCancelled: the run was cancelled from outside.
            NotRecorded, EventRefused: it is not.
        """
        self._check()
        self._background.run(self.beneath.flush())

    # What is known of it.

    @property
    def id(self) -> str:
        """The run's id."""
        return self.beneath.id

    @property
    def prompt(self) -> str:
        """What the agent is to do."""
        return self.beneath.prompt

    @property
    def result(self) -> str:
        """What the agent came to: the `text` of the `agent_end` at the end of the block."""
        return self.beneath.result

    @result.setter
    def result(self, text: str) -> None:
        self.beneath.result = text

    @property
    def snapshot(self) -> Snapshot | None:
        """The run as it was when the block began."""
        return self.beneath.snapshot

    @property
    def cancelled(self) -> bool:
        """Whether the run was cancelled from outside."""
        return self.beneath.cancelled

    @property
    def cancel_reason(self) -> str | None:
        """Why it was."""
        return self.beneath.cancel_reason

    def _check(self) -> None:
        if self.beneath.cancelled:
            raise RunCancelled(self.id, self.beneath.cancel_reason or "")
