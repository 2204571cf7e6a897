"""One connection to a daemon: calls, and the notifications that come in between. It does not reconnect.

Bytes are not decoded before somebody wants them as values: a result can be had as `msgspec.Raw`, a notification's
params always come so.
"""

import asyncio
import itertools
import logging
import os
import ssl
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple, TypeVar, overload
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as websocket_connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from carserver.client.errors import CallError, CallTimeout, ClientError, ConnectionLost, NotAuthorised, Unreachable
from carserver.protocol.closing import Close
from carserver.protocol.errors import ErrorKind

FRAME_BYTES = 16 * 1024 * 1024 + 64 * 1024  # the daemon's largest frame, and slack for what is around it
NOTIFICATIONS = 1_024  # the daemon's own bound for one subscription
OVERFLOW = 16  # times NOTIFICATIONS are taken in while a call waits for its answer, which comes behind them
OPEN_S = 10.0  # the daemon's own bound for a handshake
CLOSE_S = 2.0
_ABNORMAL = 1006  # RFC 6455, 7.1.5: no close frame came

# websockets prints headers, and so tokens, at DEBUG: this logger's own level keeps that from happening.
_logger = logging.getLogger("carserver.client.websocket")
_logger.setLevel(logging.INFO)
_log = logging.getLogger("carserver.client")

T = TypeVar("T")


class Notification(NamedTuple):
    """What the daemon said without being asked."""

    method: str
    params: Raw


class Request(NamedTuple):
    """What the daemon asks of this side: to be answered by `Connection.answer` or `refuse`, once."""

    id: int | str
    method: str
    params: Raw


Handler = Callable[["Connection", Request], None]
"""What serves a method of the daemon's: it starts what it takes, and returns at once, for it holds up the reading."""


class _Error(Struct):
    code: int
    message: str
    data: Any = None


class _Frame(Struct):
    id: int | str | None = None
    method: str | UnsetType = UNSET
    params: Raw = Raw(b"null")
    result: Raw | UnsetType = UNSET
    error: _Error | UnsetType = UNSET


class _Request(Struct, kw_only=True):
    jsonrpc: str = "2.0"
    id: int
    method: str
    params: Any = UNSET


_frame_decoder = msgspec.json.Decoder(_Frame)
_encode = msgspec.json.Encoder().encode


@asynccontextmanager
async def open_connection(
    url: str,
    token: str | None = None,
    *,
    notifications: int = NOTIFICATIONS,
    open_timeout: float = OPEN_S,
) -> AsyncIterator["Connection"]:
    """A connection to the daemon at `url`, as `dial` makes it, closed at the end of the `async with`."""
    connection = await dial(url, token, notifications=notifications, open_timeout=open_timeout)
    try:
        yield connection
    finally:
        await connection.close()


async def dial(
    url: str,
    token: str | None = None,
    *,
    notifications: int = NOTIFICATIONS,
    serves: Mapping[str, Handler] | None = None,
    open_timeout: float = OPEN_S,
) -> "Connection":
    """A connection to the daemon at `url`, which the caller closes.

    Args:
        url: `ws://…` or `wss://…`, without a user part.
        token: the auth token, the host's, or an agent's.
        notifications: how many may wait to be taken before reading pauses; 0 throws them away.
        serves: what the daemon may ask of this side, by method; all else is declined.
        open_timeout: seconds for the connection and the handshake together.

    Raises:
        NotAuthorised: the token is wrong.
        Unreachable: any other reason for which there is no connection.
    """
    return Connection(await _open(url, token, open_timeout), notifications, serves)


async def _open(url: str, token: str | None, open_timeout: float) -> ClientConnection:
    if "@" in urlsplit(url).netloc:
        raise Unreachable("an address with a user part is not accepted: a token never stands in an address")
    if token is not None and not (token.isascii() and token.isprintable()):
        raise NotAuthorised("the token has characters that no header takes")
    try:
        return await websocket_connect(
            url,
            additional_headers={"Authorization": f"Bearer {token}"} if token else None,
            compression=None,
            max_size=FRAME_BYTES,
            max_queue=4,
            open_timeout=open_timeout,
            close_timeout=CLOSE_S,
            proxy=None,  # a token is for the daemon, not for a proxy on the way
            logger=_logger,
        )
    except InvalidStatus as error:
        raise _refused(url, error) from None
    except InvalidURI as error:
        raise Unreachable(f"{url!r} is no WebSocket address: {error.msg}") from None
    except TimeoutError:
        raise Unreachable(f"{url} did not answer within {open_timeout:g} s") from None
    except ssl.SSLError as error:
        raise Unreachable(f"no TLS with {url}: {_why_no_tls(error)}") from None
    except OSError as error:
        raise Unreachable(f"cannot connect to {url}: {_why(error)}; is the daemon running?") from None
    except InvalidHandshake as error:
        raise Unreachable(f"what listens at {url} does not speak WebSocket: {error}") from None


def _refused(url: str, error: InvalidStatus) -> Exception:
    status = error.response.status_code
    if status == 401:
        return NotAuthorised(f"{url} does not accept this token")
    text = (error.response.body or b"")[:500].decode("utf-8", "replace").strip()
    said = text.splitlines()[0] if text else error.response.reason_phrase
    return Unreachable(f"{url} refused the connection ({status}: {said})")


def _why_no_tls(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message})"
    if error.reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"}:
        return "what listens there does not speak it; is it ws:// that you mean?"
    return (error.reason or "the handshake failed").lower().replace("_", " ")


def _why(error: OSError) -> str:
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    # An unknown name has a text of its own; the errors of several addresses are joined into a long one without any.
    return (error.strerror or "none of its addresses answers").lower()


class Connection:
    """Calls may run concurrently; notifications have one reader. Made by `dial`.

    Reading pauses while as many notifications wait as `dial` allows, so the daemon's own flow control works; for
    as long as calls wait for their answers it goes on up to OVERFLOW times as many.
    """

    def __init__(
        self,
        websocket: ClientConnection,
        notifications: int = NOTIFICATIONS,
        serves: Mapping[str, Handler] | None = None,
    ) -> None:
        self._websocket = websocket
        self._serves = {} if serves is None else serves
        self.heard = False  # a message came: whatever is at the other end talks
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Raw]] = {}  # those that are not answered yet
        self._limit = notifications
        self._notifications: deque[Notification] = deque()
        self._news = asyncio.Event()  # a notification came, or the end
        self._room = asyncio.Event()  # a notification was taken, or a call began
        self._lost: ConnectionLost | None = None
        self._closing = False
        self._deaf = False  # nothing can be sent any more; what has come is still to be read
        self._gone = False  # there is nothing to be had from the network any more
        self._tasks = [
            asyncio.create_task(self._read(), name="carserver client: reader"),
            asyncio.create_task(self._watch(), name="carserver client: watcher"),
        ]

    @property
    def lost(self) -> bool:
        """Whether it has ended, as far as anything is to be sent."""
        return self._lost is not None or self._deaf

    @overload
    async def call(self, method: str, params: Any = None, timeout: float | None = None) -> Any: ...  # noqa: ASYNC109
    @overload
    async def call(
        self,
        method: str,
        params: Any = None,
        timeout: float | None = None,  # noqa: ASYNC109 - see below
        *,
        result_type: type[T],
    ) -> T: ...
    async def call(
        self,
        method: str,
        params: Any = None,
        timeout: float | None = None,  # noqa: ASYNC109 - its end is an error of our own
        *,
        result_type: Any = Any,
    ) -> Any:
        """Asks for `method` and waits for the answer.

        Args:
            method: its name.
            params: an object or an array: anything that msgspec encodes, `msgspec.Raw` included; None leaves them out.
            timeout: seconds; None waits for as long as the connection lives.
            result_type: what the result is decoded as; `msgspec.Raw` leaves it as it came.

        Raises:
            CallError: the daemon's answer is an error.
            CallTimeout: no answer in time; the outcome is unknown.
            ClientError: the result is not of `result_type`.
            ConnectionLost: the connection ended first; the outcome is unknown.
        """
        if self._lost is not None:
            raise self._lost_again()
        id_ = next(self._ids)
        frame = _encode(_Request(id=id_, method=method, params=UNSET if params is None else params))
        answer: asyncio.Future[Raw] = asyncio.get_running_loop().create_future()
        self._calls[id_] = answer
        self._room.set()
        try:
            async with asyncio.timeout(timeout):
                await self._send(frame)
                result = await answer
        except TimeoutError:
            raise CallTimeout(f"{method} was not answered within {timeout:g} s") from None
        finally:
            self._calls.pop(id_, None)
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # was looked at: asyncio need not complain when sending failed first
        if result_type is Raw:
            return result
        try:
            return msgspec.json.decode(result, type=result_type)
        except msgspec.ValidationError as error:
            raise ClientError(f"the answer to {method} is not what this client knows: {error}") from None

    async def notify(self, method: str, params: Any) -> None:
        """Tells the daemon something, and waits until the socket takes it.

        Raises:
            ConnectionLost: it may have been told, or not.
        """
        await self._send(_encode({"jsonrpc": "2.0", "method": method, "params": params}))

    async def answer(self, id_: int | str, result: Any) -> None:
        """Answers a request of the daemon's.

        Raises:
            ConnectionLost: nobody waits for the answer any more.
        """
        await self._send(_encode({"jsonrpc": "2.0", "id": id_, "result": result}))

    async def refuse(self, id_: int | str, message: str, kind: ErrorKind = ErrorKind.INTERNAL_ERROR) -> None:
        """Answers a request of the daemon's with an error.

        Raises:
            ConnectionLost: nobody waits for the answer any more.
        """
        error = {"code": kind.code, "message": message, "data": {"type": kind.type}}
        await self._send(_encode({"jsonrpc": "2.0", "id": id_, "error": error}))

    async def notifications(self) -> AsyncGenerator[Notification, None]:
        """What the daemon sends unasked, in its order; ends when this side closes the connection.

        Raises:
            ConnectionLost: the other side ended it; everything that came before has been yielded.
        """
        while True:
            while self._notifications:
                notification = self._notifications.popleft()
                self._room.set()
                yield notification
            if self._lost is not None:
                if self._closing:
                    return
                raise self._lost_again()
            self._news.clear()
            await self._news.wait()

    async def ended(self) -> None:
        """Waits for the connection's end, by whichever side."""
        await self._websocket.wait_closed()

    async def close(self) -> None:
        """Closes the connection; calls under way end with ConnectionLost. Takes at most CLOSE_S and a little."""
        self._closing = True
        self._end(ConnectionLost(Close.NORMAL, "closed by this side"))
        try:
            # asyncio's (3.11), where websockets aborts a transport that is gone already: a daemon that
            # went away in the middle of a long message.
            with suppress(AttributeError, TimeoutError):
                # websockets' own bound does not hold while it waits for room in a socket that nobody reads from.
                async with asyncio.timeout(CLOSE_S + 1.0):
                    await self._websocket.close()
        finally:
            with suppress(AttributeError):
                self._websocket.transport.abort()  # no more than a no-op where it is closed
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self, frame: bytes) -> None:
        try:
            await self._websocket.send(frame, text=True)
        except ConnectionClosed as error:
            # The reader learns of it when it comes to the end of what has come. Until then who asks for a connection is
            # not to get this one: sending fails at once, so who tried again and again would never let the reader run.
            self._deaf = True
            raise _lost(error) from None

    async def _read(self) -> None:
        """Takes frames until the connection ends; the one place that learns of its end."""
        try:
            while True:
                await self._take(await self._websocket.recv(decode=False))
        except ConnectionClosed as error:
            self._end(_lost(error))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._end(ConnectionLost(Close.PROTOCOL_ERROR, "the other side does not speak JSON-RPC"))
            await self._websocket.close(Close.PROTOCOL_ERROR, "not JSON-RPC 2.0")
        finally:
            self._end(ConnectionLost(_ABNORMAL))  # nobody waits for ever, whatever became of this task

    async def _watch(self) -> None:
        """Lets a reader that waits for room go on to learn that the connection is gone."""
        await self._websocket.wait_closed()
        self._gone = True
        self._room.set()

    async def _take(self, message: bytes) -> None:
        frame = _frame_decoder.decode(message)
        self.heard = True
        if isinstance(frame.method, str):
            # An id of null would be a request too, but no daemon asks without wanting to know which answer it got.
            if frame.id is not None:
                await self._serve(Request(frame.id, frame.method, frame.params))
            elif self._limit:
                await self._keep(Notification(frame.method, frame.params))
        elif isinstance(frame.error, _Error):
            self._fail(frame.id, _call_error(frame.error))
        elif isinstance(frame.id, int) and isinstance(frame.result, Raw):
            call = self._calls.pop(frame.id, None)
            if call is not None and not call.done():
                call.set_result(frame.result)
        else:
            raise msgspec.ValidationError("neither a request nor a reply")

    async def _keep(self, notification: Notification) -> None:
        while (
            not self._gone
            and not self._closing
            and len(self._notifications) >= self._limit * (OVERFLOW if self._calls else 1)
        ):
            self._room.clear()
            await self._room.wait()
        if not self._closing:  # then what still comes is read to the close frame behind it, and no more
            self._notifications.append(notification)
            self._news.set()

    async def _serve(self, request: Request) -> None:
        handler = self._serves.get(request.method)
        words, kind = f"this client does not serve {request.method}", ErrorKind.METHOD_NOT_FOUND
        if handler is not None:
            try:
                handler(self, request)
            except Exception:  # noqa: BLE001 - the daemon is told, and the connection lives on
                _log.exception("serving %s failed", request.method)
                words, kind = f"this client failed to serve {request.method}", ErrorKind.INTERNAL_ERROR
            else:
                return
        with suppress(ConnectionLost):  # the reader is about to learn of it
            await self.refuse(request.id, words, kind)

    def _fail(self, id_: int | str | None, error: CallError) -> None:
        """An error without an id answers something that the daemon could not read: any of what is under way."""
        for one in list(self._calls) if id_ is None else [id_]:
            call = self._calls.pop(one, None) if isinstance(one, int) else None  # no string is an id of ours
            if call is not None and not call.done():
                call.set_exception(error)

    def _end(self, lost: ConnectionLost) -> None:
        if self._lost is None:
            self._lost = lost
            for call in self._calls.values():
                if not call.done():
                    call.set_exception(self._lost_again())
            self._news.set()
            self._room.set()

    def _lost_again(self) -> ConnectionLost:
        """One exception object raised in several tasks would collect the tracebacks of all."""
        lost = self._lost or ConnectionLost(_ABNORMAL)
        return ConnectionLost(lost.code, lost.reason)


def _lost(error: ConnectionClosed) -> ConnectionLost:
    if error.rcvd is not None:
        return ConnectionLost(error.rcvd.code, error.rcvd.reason)
    if error.sent is not None:  # this side found the fault: a frame too big, a ping without an answer
        return ConnectionLost(error.sent.code, error.sent.reason)
    return ConnectionLost(_ABNORMAL)


def _call_error(error: _Error) -> CallError:
    data = error.data if isinstance(error.data, dict) else {}
    type_ = data.get("type")
    return CallError(error.code, type_ if isinstance(type_, str) else "", error.message, data)
