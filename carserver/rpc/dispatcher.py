"""From a message to its answer: envelope, table, params, method, reply. Knows no method by name, and no transport.

`receive` never raises and never waits: a method that has to wait goes on in a task of its connection's. One door leads
from exceptions to the wire (`_refusal`). This is the path of every request, so it is flat where it could be pretty.
"""

import logging
from typing import Any, Protocol

import msgspec
from msgspec import Raw

from carserver.protocol import codec, frames
from carserver.protocol.closing import Close
from carserver.protocol.errors import ErrorKind, RpcError, limit_exceeded, unavailable
from carserver.protocol.frames import InvalidRequest
from carserver.rpc import eager
from carserver.rpc.method import Encoded, Method, Replied, Table
from carserver.rpc.session import Callback, Services, Session
from carserver.rpc.unknown import UnknownMethod

log = logging.getLogger("carserver.rpc")

# What any method may answer without declaring it: refusals of the envelope, of who calls, of limits, of storage.
UNDECLARED = frozenset(
    {
        ErrorKind.PARSE_ERROR,
        ErrorKind.INVALID_REQUEST,
        ErrorKind.METHOD_NOT_FOUND,
        ErrorKind.INVALID_PARAMS,
        ErrorKind.INTERNAL_ERROR,
        ErrorKind.AUTH_REQUIRED,
        ErrorKind.LIMIT_EXCEEDED,
        ErrorKind.OVERLOADED,
        ErrorKind.DEADLINE_EXCEEDED,
        ErrorKind.UNAVAILABLE,
    }
)
_SHORT_REPLY = 1024  # bytes: an error with the longest id


class Receiver(Protocol):
    """Where the outcome of a call goes: the session, or the batch that the call is part of."""

    def deliver(self, _id: bytes | None, reply: bytes | None, then: Callback | None, /) -> None:
        """A call is done. `reply` is None where it wants none; `then` is to happen once the reply is queued."""
        ...


class Dispatcher:
    """Maps messages onto methods."""

    def __init__(self, table: Table, services: Services) -> None:
        self._table = table
        self._native = table.spoken("")
        self._daemon = services.daemon
        self._counters = services.counters
        self._settings = services.settings
        self._frame_bytes = services.settings.frame_bytes

    def receive(self, session: Session, message: bytes) -> None:
        """One message of a peer; its answer, if it wants one, goes to the session's outbox, now or later."""
        if len(message) <= frames.SHORT_BYTES and self._short(session, message):
            return
        try:
            value = codec.parse(message, self._settings.nesting, self._settings.brackets)
        except RpcError as error:
            self._refuse(session, error)
            self._end_call(session, message, error)
            return
        if type(value) is dict:
            self._call(session, value, message, session)
        elif type(value) is list and value:
            self._batch(session, value, message)
        else:
            self._refuse(session, InvalidRequest(b"null", "a request object, or a batch of at least one"))

    def _short(self, session: Session, message: bytes) -> bool:
        """What nearly every request is: short, one call, as declared. False, and nothing is done, for all else."""
        request = frames.read_short(message, self._settings.id_chars)
        if request is None:
            return False
        id_, name, params = request
        try:
            entry = self._find(session, name)
            arguments = entry.short_arguments(params)
        except (RpcError, msgspec.DecodeError, ValueError):
            return False
        self._counters.requests += 1
        self._run(session, id_, entry, arguments, session)
        return True

    def _refuse(self, session: Session, error: RpcError) -> None:
        """A message of which no request could be read."""
        self._counters.errors += 1
        session.outbox.send(frames.error_frame(b"null", error))

    def _end_call(self, session: Session, message: bytes, error: RpcError) -> None:
        """Where what a limit refused is the answer to a request of ours, there comes no other."""
        hosting = session.hosting
        if hosting is None or not hosting.asked or error.kind is not ErrorKind.LIMIT_EXCEEDED:
            return  # what is not JSON says nothing
        id_ = frames.answers(message)
        if id_ is not None and hosting.expects(id_):
            hosting.answered(id_, None, f"the host's answer was refused: {error.message}")

    def _batch(self, session: Session, calls: list[Any], message: bytes) -> None:
        if len(calls) > self._settings.batch_calls:
            self._refuse(session, limit_exceeded("batch_calls", len(calls), self._settings.batch_calls, "batch"))
            return
        sources = frames.raw_list_decoder.decode(message)
        batch = _Batch(session, len(calls), self._frame_bytes)
        for call, source in zip(calls, sources, strict=True):
            if type(call) is dict:
                self._call(session, call, source, batch)
            else:
                self._counters.errors += 1
                error = InvalidRequest(b"null", "a request is an object")
                batch.deliver(b"null", frames.error_frame(b"null", error), None)

    def _call(self, session: Session, value: dict[str, Any], message: bytes | Raw, to: Receiver) -> None:
        """One request or notification; or an answer to a request of ours, which is never itself answered."""
        entry: Method | None = None
        id_: bytes | None = None
        try:
            if "method" not in value and self._take_reply(session, value, message):
                to.deliver(None, None, None)
                return
            self._counters.requests += 1
            if session.dialect and value.get("params") is None:
                value.pop("params", None)  # the CAR client sends null where it has none
            null_params = bool(session.dialect)
            id_, name, params = frames.read_request(value, self._settings.id_chars, null_params=null_params)
            entry = self._find(session, name)
            arguments = entry.arguments(params, message)
        except Exception as error:  # noqa: BLE001 - the one door to the wire
            if isinstance(error, InvalidRequest):
                id_ = error.id_
            elif isinstance(error, UnknownMethod):
                error = error.with_hint(self._table.spoken(session.dialect), session.dialect)
            self._fail(session, id_, self._refusal(session, error, entry), to)
            return
        self._run(session, id_, entry, arguments, to)

    def _take_reply(self, session: Session, value: dict[str, Any], message: bytes | Raw) -> bool:
        """A message without a method: an answer, to a request of ours or to none; False where it is no answer."""
        id_ = value.get("id")
        hosting = session.hosting
        if hosting is not None and type(id_) is str and hosting.expects(id_):
            result, error = frames.read_reply(value, message, self._settings.value_nesting)
            hosting.answered(id_, result, error, terminal=frames.is_terminal(value))
            return True
        stray = "result" in value or "error" in value
        self._counters.stray_replies += stray
        return stray

    def _run(self, session: Session, id_: bytes | None, entry: Method, arguments: Any, to: Receiver) -> None:
        """Runs a method up to its first wait."""
        try:
            result = entry.run(session, arguments)
        except BaseException as error:  # noqa: BLE001 - the one door to the wire; a method may raise a cancel of its own
            self._fail(session, id_, self._refusal(session, error, entry), to)
            return
        if type(result) is eager.Pending:
            session.begin_request(waits=result.waits, pages=entry.pages)
            session.transport.spawn(self._finish(session, entry, id_, result, to))
            if result.waits:
                session.transport.give_turn()
        else:
            self._answer(session, entry, id_, result, to)

    def _find(self, session: Session, name: str) -> Method:
        """The method, if this session may call it now."""
        entry = self._table.find(name, session.dialect) if session.dialect else self._native.get(name)
        principal = session.principal
        if principal is None and (entry is None or entry.role != "anyone"):
            raise RpcError(ErrorKind.AUTH_REQUIRED, "not authenticated: session.auth comes first")
        if entry is None:
            raise UnknownMethod(name)
        if entry.role == "host" and principal is not None and principal.role != "host":
            raise RpcError(ErrorKind.FORBIDDEN, f"{entry.name} is for the host")
        self._check_draining(entry)
        return entry

    def _check_draining(self, entry: Method) -> None:
        if self._daemon.draining and not entry.while_draining:
            raise unavailable("the daemon stops: reconnect later", retry_after_ms=self._settings.retry_after_ms)

    async def _finish(
        self, session: Session, entry: Method, id_: bytes | None, pending: eager.Pending, to: Receiver
    ) -> None:
        """The rest of a method that waits."""
        waits = pending.waits
        try:
            if waits:
                self._check_draining(entry)  # it begins only now
            rest = pending.rest()
            del pending  # and the arguments with it: they may be large, and the method may last
            result = await rest
        except BaseException as error:
            if session.closed:
                raise  # it is cancelled with its connection
            self._fail(session, id_, self._refusal(session, error, entry), to)
        else:
            self._answer(session, entry, id_, result, to)
        finally:
            session.end_request(waits=waits, pages=entry.pages)

    def _answer(self, session: Session, entry: Method, id_: bytes | None, result: Any, to: Receiver) -> None:
        then: Callback | None = None
        if type(result) is Replied:
            result, then = result.result, result.then
        if id_ is None:
            to.deliver(None, None, then)
            return
        try:
            reply = frames.result_frame(id_, result.data if type(result) is Encoded else codec.encode(result))
        except Exception as error:  # noqa: BLE001 - a result that cannot be encoded is an error like any other
            reply = frames.error_frame(id_, self._refusal(session, error, entry))
        if len(reply) > self._frame_bytes:
            too_large = limit_exceeded("frame_bytes", len(reply), self._frame_bytes, "result")
            reply = frames.error_frame(id_, self._refusal(session, too_large, entry))
            if then is not None:
                then(False)
                then = None
        if to is session and then is None:
            session.outbox.send(reply)
        else:
            to.deliver(id_, reply, then)

    def _fail(self, session: Session, id_: bytes | None, refusal: RpcError, to: Receiver) -> None:
        then: Callback | None = None
        if refusal.kind is ErrorKind.AUTH_REQUIRED:  # answered first, in a batch with all of it

            def then(_: bool) -> None:
                session.transport.end(Close.POLICY, "authentication required: session.auth comes first")

        to.deliver(id_, None if id_ is None else frames.error_frame(id_, refusal), then)

    def _refusal(self, session: Session, error: BaseException, entry: Method | None) -> RpcError:
        """The one door from exceptions to the wire: of a defect, nothing but an incident's number gets out."""
        self._counters.errors += 1
        if not isinstance(error, RpcError):
            self._counters.internal_errors += 1
            incident = self._daemon.new_id()
            name = entry.name if entry else "?"
            log.error("internal error %s in %s", incident, name, exc_info=error, extra={"client": session.client_id})
            message = f"a defect of the daemon; its log has the details under incident {incident}"
            return RpcError(ErrorKind.INTERNAL_ERROR, message, incident=incident)
        self._counters.overloads += error.kind is ErrorKind.OVERLOADED
        if entry is not None and error.kind not in UNDECLARED and error.kind not in entry.errors:
            self._counters.undeclared_errors += 1
            log.error("%s raised %s, which it does not declare", entry.name, error.kind.type)
        return error


class _Batch:
    """Gathers the replies to a batch; they go out as one frame when the last is there."""

    __slots__ = ("_left", "_limit", "_replies", "_session", "_size", "_then")

    def __init__(self, session: Session, calls: int, limit: int) -> None:
        self._session = session
        self._left = calls
        self._limit = limit
        self._size = 2
        self._replies: list[bytes] = []
        self._then: list[tuple[Callback, bool]] = []

    def deliver(self, id_: bytes | None, reply: bytes | None, then: Callback | None) -> None:
        """One call is done."""
        as_it_is = id_ is None or reply is None or self._keep(id_, reply)
        if then is not None:
            self._then.append((then, as_it_is))
        self._left -= 1
        if self._left == 0:
            if self._replies:
                self._session.outbox.send(frames.batch_frame(self._replies))
            for callback, as_it_is in self._then:
                callback(as_it_is)

    def _keep(self, id_: bytes, reply: bytes) -> bool:
        """Whether it fits; what does not is refused in its place."""
        room = self._limit - self._size - (self._left - 1) * _SHORT_REPLY  # what follows can at least be refused
        fits = len(reply) <= room
        if not fits:
            reply = frames.error_frame(id_, limit_exceeded("frame_bytes", len(reply), max(room, 0), "batch"))
        self._replies.append(reply)
        self._size += len(reply) + 1
        return fits
