"""One authenticated connection that is kept up: for as long as the link is open, a lost one is replaced.

What is to hold on every connection (registrations, subscriptions) is made anew by those who asked with `on_up`, before
anybody else gets the connection.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec import Raw

from carserver.client.connection import NOTIFICATIONS, Connection, Handler, dial
from carserver.client.errors import CallError, ClientError, ConnectionLost, NotAuthorised, Unreachable
from carserver.client.finding import Target
from carserver.client.pauses import Pauses
from carserver.protocol.closing import Close
from carserver.protocol.errors import ErrorKind
from carserver.protocol.server import Draining

PATIENCE_S = 60.0  # for which a call waits for a connection
ANSWER_S = 30.0  # the daemon's storage answers within 25 s or says so
_decode_draining = msgspec.json.Decoder(Draining).decode
_NO_TOKEN = frozenset({ErrorKind.AUTH_REQUIRED.type, ErrorKind.AUTH_FAILED.type, ErrorKind.INVALID_PARAMS.type})

Up = Callable[[Connection], Awaitable[None]]
Told = Callable[[Raw], Awaitable[None] | None]
Remove = Callable[[], None]
F = TypeVar("F", bound=Callable[..., Any])

_logger = logging.getLogger("carserver.client")


class Finder(Protocol):
    """Says where the daemon is; asked before each attempt, for after a restart it may be elsewhere."""

    def __call__(self) -> Target:
        """Where it is now.

        Raises:
            ClientError: it cannot be told.
        """
        ...


class Link:
    """The connection of a `Car`. All of it belongs to one event loop.

    Args:
        find: where the daemon is.
        patience_s: how long `connection` waits for one, seconds.
        pauses: between two attempts; they grow until the daemon has said something.
    """

    def __init__(self, find: Finder, *, patience_s: float = PATIENCE_S, pauses: Pauses | None = None) -> None:
        self.patience_s = patience_s
        self._find = find
        self._pauses = Pauses(math.inf) if pauses is None else pauses
        self._live: Connection | None = None
        self._failure: ClientError | None = None  # why there is none
        self._closed = False
        self._changed = asyncio.Event()  # replaced whenever it is set: each wakes those who wait now
        self._keeper: asyncio.Task[None] | None = None
        self._up: list[Up] = []
        self._told: dict[str, list[Told]] = {}
        self._serves: dict[str, Handler] = {}
        self._closing: list[Callable[[], Awaitable[None]]] = []
        self._others: set[Connection] = set()
        self._rest_s = 0.0  # for which the daemon wants to be left alone, when it has closed the connection

        self.on("server.draining", self._told_to_rest)

    # Its life.

    async def open(self) -> None:
        """Connects. This first attempt is the only one: who starts is told at once why there is no daemon.

        Raises:
            NotAuthorised, Unreachable, Misconfigured: there is no connection, in words that say what to do.
            Exception: whatever a callback of `on_up` raises.
        """
        if self._keeper is not None or self._closed:
            raise RuntimeError("a link is opened once; make another with connect()")
        connection = await self._connect(self._prepare)
        self._live = connection
        self._keeper = asyncio.create_task(self._keep(connection), name="carserver client: link")

    async def close(self) -> None:
        """Ends the connection and every wait for one; what is under way ends with ConnectionLost."""
        if self._closed:
            return
        try:
            for callback in reversed(self._closing):
                try:
                    await callback()
                except Exception:
                    _logger.exception("a callback failed at the link's end")
        finally:
            self._closed = True
            self._wake()
            if self._keeper is not None:
                self._keeper.cancel()
                await asyncio.wait([self._keeper])
            left = self._others if self._live is None else {*self._others, self._live}
            await asyncio.gather(*(connection.close() for connection in left), return_exceptions=True)

    # What it is for.

    async def connection(self) -> Connection:
        """The live connection; waits for one, at most `patience_s`.

        Raises:
            ConnectionLost: the link is closed, or is not open yet.
            NotAuthorised: the daemon does not take the token any more.
            Unreachable: there was none in time; the message has the reason of the last attempt.
        """
        if (live := self._live) is not None and not live.lost:
            return live
        try:
            async with asyncio.timeout(self.patience_s):
                # Who learns of the loss before the keeper did waits for what the keeper makes of it.
                while (live := self._live) is None or live.lost:
                    self._check()
                    await self._changed.wait()
        except TimeoutError:
            raise Unreachable(f"no connection within {self.patience_s:g} s: {self._failure}") from None
        return live

    @property
    def failure(self) -> ClientError | None:
        """Why there is no connection; None where there is one."""
        return self._failure

    def another(self, *, notifications: int = NOTIFICATIONS) -> AbstractAsyncContextManager[Connection]:
        """A connection of one's own to the same daemon, that nobody replaces: `async with link.another() as …`.

        It ends with the link, at the latest.

        Args:
            notifications: how many may wait to be taken before reading pauses; 0 throws them away.
        """

        @asynccontextmanager
        async def opened() -> AsyncIterator[Connection]:
            self._check()
            target = self._find()
            connection = await dial(target.url, target.token, notifications=notifications)
            self._others.add(connection)
            try:
                self._check()  # it may have been closed meanwhile
                yield connection
            finally:
                self._others.discard(connection)
                await connection.close()

        return opened()

    def on_up(self, callback: Up) -> Remove:
        """Calls `callback` with every new connection, before anybody else gets it; not with one that is up already.

        It talks over the connection that it is given (`Connection.call`, with a timeout): nobody has another one
        meanwhile. What it raises at the first connection ends `open`; later, a loss or a passing error of the daemon
        is a reason to connect again, and anything else is logged.
        """
        return _added(self._up, callback)

    def on(self, method: str, callback: Told) -> Remove:
        """Calls `callback` with the params of every notification of that name, in their order.

        They wait while it does, and reading pauses when 1,024 do: so it had better be quick, and call nothing itself.
        """
        return _added(self._told.setdefault(method, []), callback)

    def serve(self, method: str, handler: Handler) -> None:
        """Has `handler` serve a method of the daemon's, on this connection and on those to come; None else may."""
        if method in self._serves:
            raise ValueError(f"{method} is served already")
        self._serves[method] = handler

    def on_close(self, callback: Callable[[], Awaitable[None]]) -> Remove:
        """Awaits `callback` when the link is about to close, while it still is connected; the newest first."""
        return _added(self._closing, callback)

    # How it is kept up.

    async def _keep(self, connection: Connection) -> None:
        while True:
            await self._hold(connection)
            connection = await self._again()

    async def _hold(self, connection: Connection) -> None:
        """Hands out what comes over the connection, until it is lost."""
        self._live = connection
        self._failure = None
        self._wake()
        try:
            async with aclosing(connection.notifications()) as notifications:
                async for method, params in notifications:
                    for callback in list(self._told.get(method, ())):
                        await _tell(callback, method, params)
        except ConnectionLost as error:
            self._failure = error
            _logger.info("%s; connecting again", error)
        finally:
            self._live = None
            if connection.heard:  # one that is lost again and again before that is not made anew in a hurry
                self._pauses.reset()
            await connection.close()

    async def _again(self) -> Connection:
        """The next connection, after as many attempts as it takes."""
        while True:
            await self._pauses.pause(self._rest_s)
            self._rest_s = 0.0
            try:
                return await self._connect(self._prepare_again)
            except ClientError as error:
                _logger.log(logging.INFO if error.passing else logging.WARNING, "no connection: %s", error)
                self._failure = error
            except Exception as error:
                _logger.exception("no connection")
                self._failure = Unreachable(f"{type(error).__name__}: {error}")
            self._wake()

    async def _connect(self, prepare: Up) -> Connection:
        target = self._find()
        connection = await dial(target.url, target.token, serves=self._serves)
        try:
            if target.token is None:
                await _check_open(connection, target.url)
            await prepare(connection)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _prepare(self, connection: Connection) -> None:
        for callback in list(self._up):
            await callback(connection)

    async def _prepare_again(self, connection: Connection) -> None:
        for callback in list(self._up):
            try:
                await callback(connection)
            except ClientError as error:
                if error.passing:
                    raise
                _logger.warning("connected again, but not all is as it was: %s", error)
            except Exception:
                _logger.exception("connected again, but a callback failed")

    def _told_to_rest(self, params: Raw) -> None:
        self._rest_s = _decode_draining(params).retry_after_ms / 1000

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _check(self) -> None:
        """Whether waiting for a connection makes sense."""
        if self._closed:
            raise ConnectionLost(Close.NORMAL, "closed by this side")
        if self._keeper is None:
            raise ConnectionLost(Close.NORMAL, "not open yet: use `async with connect() as car`")
        if isinstance(self._failure, NotAuthorised):
            raise NotAuthorised(str(self._failure))


async def _check_open(connection: Connection, url: str) -> None:
    """A daemon takes a connection without a token, and refuses every call, unless it runs with --no-auth."""
    try:
        await connection.call("session.auth", {}, ANSWER_S)
    except CallError as error:
        if error.type in _NO_TOKEN:
            raise NotAuthorised(
                f"no token for {url} was found: give one, set CARSERVER_AUTH_TOKEN, or name the daemon's state folder"
            ) from None


async def _tell(callback: Told, method: str, params: Raw) -> None:
    try:
        waits = callback(params)
        if waits is not None:
            await waits
    except Exception:
        _logger.exception("a callback for %s failed", method)


def _added(callbacks: list[F], callback: F) -> Remove:
    callbacks.append(callback)

    def remove() -> None:
        with suppress(ValueError):
            callbacks.remove(callback)

    return remove
