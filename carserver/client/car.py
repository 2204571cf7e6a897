"""What an agent's author holds: `async with connect() as car`, and on it every method of the daemon's, typed.

A call waits for the link. What was lost on the way is sent again on the next connection where nothing more comes of
twice than of once (`api.AGAIN`: reads, and what has its key); otherwise its outcome is unknown, and the caller is told.
"""

import asyncio
from collections.abc import Callable, Mapping
from functools import cached_property, wraps
from os import PathLike
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, overload

from carserver.client.api import AGAIN, Outputs, Rpc, Server, Session, Tools
from carserver.client.errors import CallError, CallTimeout, ConnectionLost
from carserver.client.finding import Where
from carserver.client.hosting import Hosting
from carserver.client.link import PATIENCE_S, Finder, Link
from carserver.client.pauses import Pauses
from carserver.client.run import Run
from carserver.client.runs import Runs
from carserver.client.signatures import read_tool
from carserver.protocol.errors import ErrorKind

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
    """A daemon to work with; `async with` connects to it and, at its end, disconnects.

    What is not given is looked for: in the environment (CARSERVER_URL, CARSERVER_AUTH_TOKEN, CARSERVER_AGENT_TOKEN,
    CARSERVER_HOST_TOKEN; CAR_DAEMON_URL, CAR_AUTH_TOKEN), then in the state folder.

    Args:
        url: `ws://HOST:PORT`, or `wss://…`.
        token: the auth token, or an agent's.
        host_token: to act as the host, instead.
        agent_id: to act as this agent: with its token, or with one made from the state folder's key.
        state_dir: the daemon's state folder, other than CARSERVER_STATE_DIR or `$XDG_STATE_HOME/carserver`.
        patience_s: how long a call waits for a connection that was lost, seconds.
    """
    find = Where(url, token=token, host_token=host_token, agent_id=agent_id, state_dir=state_dir)
    return Car(find, patience_s=patience_s)


def _run(make: Callable[Concatenate["Car", P], Run]) -> Callable[Concatenate["Car", P], Run]:
    """`Run` as a method: its parameters stand once."""

    @wraps(make, assigned=["__doc__"], updated=[])
    def run(car: "Car", /, *args: P.args, **kwargs: P.kwargs) -> Run:
        return make(car, *args, **kwargs)

    return run


class Car:
    """A daemon, through a link that is kept up. Made by `connect`; all of it belongs to one event loop."""

    def __init__(self, find: Finder, *, patience_s: float = PATIENCE_S) -> None:
        self.link = Link(find, patience_s=patience_s)
        self._hosting = Hosting(self.link)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connects, where `async with` does not fit; see `Link.open`."""
        await self.link.open()

    async def close(self) -> None:
        """Disconnects; harmless when it is closed."""
        await self.link.close()

    # Runs and tools of this process.

    run = _run(Run)

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
        """Offers a function, coroutine, generator or async generator as a tool, and leaves it as it is.

        Its parameters' type hints become its JSON Schema (`Annotated[int, msgspec.Meta(ge=1, description="…")]` says
        more), its docstring its description. What it returns is the result. What a generator yields is streamed: a
        `str` as text, a `Progress` as progress, a `Result` as the result and the end, any other value as data; the
        value that a plain generator returns is its result. `progress(…)` tells how far the rest are.

        A call that is cancelled ends with CancelledError in a coroutine. A thread cannot be stopped: a function goes
        on to its end, unless it calls `progress`, and a generator to its next `yield`; there it is CancelledError, too.

        Args:
            function: what is offered.
            name: instead of the function's own.
            description: instead of its docstring.
            idempotent: twice does no more than once; callers are told so.

        Raises:
            TypeError: the function cannot be a tool, and why.
            ValueError: there is one of this name.
        """

        def offer(given: F) -> F:
            self._hosting.offer(read_tool(given, name=name, description=description, idempotent=idempotent))
            return given

        return offer if function is None else offer(function)

    # The daemon's methods, by namespace.

    @cached_property
    def runs(self) -> Runs:
        """`runs.*`, and `trace`."""
        return Runs(self, self.link.another, self.link.patience_s)

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
    async def call(
        self,
        method: str,
        params: Any = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - see below
        again: bool | None = None,
    ) -> Any: ...
    @overload
    async def call(
        self,
        method: str,
        params: Any = None,
        *,
        result_type: type[T],
        timeout: float | None = None,  # noqa: ASYNC109 - see below
        again: bool | None = None,
    ) -> T: ...
    async def call(
        self,
        method: str,
        params: Any = None,
        *,
        result_type: Any = Any,
        timeout: float | None = None,  # noqa: ASYNC109 - its end is an error of our own
        again: bool | None = None,
    ) -> Any:
        """Asks the daemon, on this connection or, where that is harmless, on the next.

        Args:
            method: its name.
            params: an object or an array: anything that msgspec encodes; None leaves them out.
            result_type: what the result is decoded as; `msgspec.Raw` leaves it as it came.
            timeout: seconds for all of it; None waits for as long as it takes.
            again: whether twice does no more than once; None: as the daemon's declarations say.

        Raises:
            CallError: the daemon's answer is an error; one that says "later" (overloaded, draining) only after
                `patience_s`.
            CallTimeout: no answer in time; the outcome is unknown.
            ClientError: the result is not of `result_type`.
            ConnectionLost: the connection ended first, and the outcome is unknown; or the car is closed.
            NotAuthorised, Unreachable: there is no connection, and none came within `patience_s`.
        """
        harmless = _harmless(method, params) if again is None else again
        pauses = Pauses(self.link.patience_s)
        timed = asyncio.timeout(timeout)
        try:
            async with timed:
                if self._hosting.settling:  # what was offered before this is to be there
                    await self._hosting.settled()
                while True:
                    connection = await self.link.connection()
                    try:
                        return await connection.call(method, params, result_type=result_type)
                    except ConnectionLost as error:
                        if not (harmless and error.passing):
                            raise
                    except CallError as error:
                        if not _later(error, harmless=harmless) or not await pauses.pause(_asked_for(error)):
                            raise
        except TimeoutError:
            if not timed.expired():
                raise
            raise CallTimeout(f"{method} was not answered within {timeout:g} s") from None


def _harmless(method: str, params: Any) -> bool:
    """Whether nothing more comes of sending this twice than of sending it once."""
    again = AGAIN.get(method, False)
    if isinstance(again, bool):
        return again
    return isinstance(params, Mapping) and params.get(again) is not None


def _later(error: CallError, *, harmless: bool) -> bool:
    """Whether the same may be sent again a little later: the daemon says so, and what it may have done is known."""
    not_done = error.type == ErrorKind.OVERLOADED.type or error.data.get("outcome") == "not_done"
    return error.passing and (not_done or harmless)


def _asked_for(error: CallError) -> float:
    """The pause that the daemon asks for, seconds."""
    wanted = error.data.get("retry_after_ms")
    return wanted / 1000 if isinstance(wanted, int | float) else 0.0
