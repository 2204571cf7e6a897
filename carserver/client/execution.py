"""One call of a tool that this process hosts: run, streamed, answered; and cancelled, if the daemon says so.

What streams faster than the socket takes it, waits.
"""

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from contextvars import ContextVar
from typing import Any

import msgspec
from msgspec import Raw, Struct

from carserver.client.connection import Connection
from carserver.client.run import cut, told
from carserver.client.signatures import Kind, Tool
from carserver.protocol.tools import (
    DataChunk,
    ExecuteTool,
    GivenChunk,
    HostChunk,
    ProgressChunk,
    TextChunk,
)

THREADS = 16  # for functions that may block; more of them wait for one
LARGEST_BYTES = 15 * 1024 * 1024  # of a result or chunk as JSON: the daemon's own bound, which fits a frame
TEXT_CHARACTERS = 1024 * 1024  # longer text goes in several chunks; six bytes each, at most, as JSON
MESSAGE_BYTES = 8 * 1024  # of an exception's words, as UTF-8

_WENT_ON = "cancelled: it runs in a thread, could not be stopped and went on to its end"
_encode = msgspec.json.Encoder().encode
_current: "ContextVar[Execution]" = ContextVar("carserver_client_execution")


class Progress(Struct, frozen=True):
    """How far a tool is: `fraction` from 0 to 1, and what it says of it. To be yielded by a generator."""

    fraction: float
    message: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"progress is a fraction from 0 to 1, not {self.fraction!r}")


class Result(Struct, frozen=True):
    """What a tool came to. To be yielded by a generator, as its last value: an async one cannot return any."""

    value: Any


class TooLarge(ValueError):
    """A result or chunk is larger than the daemon takes; nothing of it was sent."""


def progress(fraction: float, message: str | None = None) -> None:
    """Tells how far the tool is that runs here; where none does, nobody is told.

    It does not wait. A newer figure replaces one that the socket has not taken yet.

    Args:
        fraction: from 0 to 1.
        message: what there is to say of it.

    Raises:
        CancelledError: the call was cancelled, and runs in a thread, where this is how it learns of it.
        ValueError: `fraction` is no such.
    """
    news = Progress(fraction, message)
    execution = _current.get(None)
    if execution is not None:
        execution.report(news)


class Threads:
    """Where functions run; made when the first one does."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def run(self, function: Callable[[], Any]) -> "Future[Any]":
        """Runs it, in the context of the caller."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="carserver-tool")
        return self._pool.submit(contextvars.copy_context().run, function)

    def close(self) -> None:
        """Starts no more; what runs goes on to its end, for which Python waits before it exits."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class Execution:
    """A call, under way from now on.

    Args:
        connection: that it came over; chunks and the answer go there and nowhere else.
        asked: what the daemon sent.
        tool: what it means.
        threads: for what would block the loop.
    """

    def __init__(self, connection: Connection, asked: ExecuteTool, tool: Tool, threads: Threads) -> None:
        self.connection = connection
        self.request_id = asked.request_id
        self._parameters = asked.parameters
        self._tool = tool
        self._threads = threads
        self._feed = _Feed(connection, asked.request_id)
        self._stopping = False
        self._went_on = False  # a thread was not to be stopped
        self._work: asyncio.Task[Raw] = asyncio.create_task(self._call(), name=f"tool {tool.name}")

    def cancel(self) -> None:
        """It is to stop; `run` ends when it has."""
        self._stopping = True
        self._work.cancel()

    async def run(self) -> None:
        """Waits for its end, and answers.

        Raises:
            ConnectionLost: there is nobody to answer.
        """
        try:
            await asyncio.wait([self._work])
        finally:
            self._work.cancel()  # where it is this that was cancelled
        refusal = self._refusal()
        if refusal is None:
            await self._feed.flush()
            await self.connection.answer(self.request_id, self._work.result())
        else:
            await self.connection.refuse(self.request_id, refusal)

    def _refusal(self) -> str | None:
        """Why there is no result."""
        if self._work.cancelled():
            return _WENT_ON if self._went_on else "cancelled"
        error = self._work.exception()
        return None if error is None else cut(told(error), MESSAGE_BYTES)

    def report(self, news: Progress) -> None:
        """See `progress`."""
        if self._stopping and self._tool.kind.threaded:
            raise asyncio.CancelledError
        self._feed.report(news)

    # How it runs.

    async def _call(self) -> Raw:
        _current.set(self)
        given = self._tool.decode(self._parameters)
        return _checked("its result", _encode(await self._result(given)))

    async def _result(self, given: dict[str, Any]) -> Any:
        function = self._tool.function
        match self._tool.kind:
            case Kind.COROUTINE:
                return await function(**given)
            case Kind.ASYNC_GENERATOR:
                return await self._drain(function(**given))
            case Kind.FUNCTION:
                return await self._in_thread(lambda: function(**given))
            case Kind.GENERATOR:
                loop = asyncio.get_running_loop()
                return await self._in_thread(lambda: self._drain_here(function(**given), loop))

    async def _drain(self, generator: AsyncGenerator[Any, Any]) -> Any:
        async with aclosing(generator):
            async for value in generator:
                if isinstance(value, Result):
                    return value.value
                try:
                    await self._feed.send(value)
                except asyncio.CancelledError as error:
                    with suppress(StopAsyncIteration):
                        await generator.athrow(error)  # it learns of it as it would have, waiting itself
                    raise
        return None

    def _drain_here(self, generator: Generator[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Any:
        """The same in a thread, for a generator that blocks."""
        with closing(generator):
            try:
                while True:
                    value = next(generator)
                    while self._stopping:
                        value = generator.throw(asyncio.CancelledError())
                    if isinstance(value, Result):
                        return value.value
                    asyncio.run_coroutine_threadsafe(self._feed.send(value), loop).result()
            except StopIteration as stop:
                return stop.value

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        """What `work` returns; cancelled, it is waited for all the same, for the answer says that nothing lives."""
        future = self._threads.run(lambda: _outcome(work))
        waiter = asyncio.wrap_future(future)
        try:
            await asyncio.wait([waiter])
        except asyncio.CancelledError:
            if not future.cancel():
                await asyncio.wait([waiter])
                self._went_on = not isinstance(waiter.result().error, asyncio.CancelledError)
            raise
        outcome = waiter.result()
        if outcome.error is not None:
            raise outcome.error
        return outcome.value


class _Outcome(Struct):
    value: Any = None
    error: BaseException | None = None


def _outcome(work: Callable[[], Any]) -> _Outcome:
    """What came of `work`: not even SystemExit gets out of a thread in another way."""
    try:
        return _Outcome(work())
    except SystemExit as error:
        return _Outcome(error=RuntimeError(told(error)))
    except BaseException as error:  # noqa: BLE001 - CancelledError too
        return _Outcome(error=error)


class _Feed:
    """A call's chunks on their way to the daemon, one by one. Progress may come from any thread."""

    def __init__(self, connection: Connection, request_id: str) -> None:
        self._connection = connection
        self._request_id = request_id
        self._loop = asyncio.get_running_loop()
        self._one_by_one = asyncio.Lock()
        self._latest: Progress | None = None  # that was not sent yet
        self._woken = False  # the loop, for it
        self._sender: asyncio.Task[None] | None = None

    async def send(self, value: Any) -> None:
        """Sends what a tool yielded; returns when the socket has taken it.

        Raises:
            ConnectionLost: nobody is there any more.
            TooLarge: it was not sent.
        """
        async with self._one_by_one:
            await self._send_latest()
            if isinstance(value, str):
                for start in range(0, len(value), TEXT_CHARACTERS):
                    await self._send(TextChunk(text=value[start : start + TEXT_CHARACTERS]))
            elif isinstance(value, Progress):
                await self._send(_progress_chunk(value))
            else:
                await self._send(DataChunk(data=Raw(_encode(value))))
        await asyncio.sleep(0)  # a generator that never waits lets others have their turn, and can be cancelled

    def report(self, news: Progress) -> None:
        """Has progress sent soon, unless newer progress comes before; from any thread."""
        self._latest = news
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake)

    async def flush(self) -> None:
        """Sends what is left."""
        async with self._one_by_one:
            await self._send_latest()

    def _wake(self) -> None:
        self._woken = False  # before the latest is looked at: a thread may be telling more
        if self._sender is None or self._sender.done():
            self._sender = self._loop.create_task(self._send_soon())

    async def _send_soon(self) -> None:
        with suppress(Exception):  # a lost connection: whoever waits for it learns of that otherwise
            await self.flush()

    async def _send_latest(self) -> None:
        while self._latest is not None:
            news, self._latest = self._latest, None
            await self._send(_progress_chunk(news))

    async def _send(self, chunk: GivenChunk) -> None:
        raw = _checked("a chunk", _encode(chunk))
        await self._connection.notify("tools.chunk", HostChunk(request_id=self._request_id, chunk=raw))


def _progress_chunk(news: Progress) -> ProgressChunk:
    return ProgressChunk(fraction=news.fraction, message=news.message)


def _checked(what: str, encoded: bytes) -> Raw:
    if len(encoded) > LARGEST_BYTES:
        raise TooLarge(f"{what} has {len(encoded):,} bytes as JSON; at most {LARGEST_BYTES:,} are taken")
    return Raw(encoded)
