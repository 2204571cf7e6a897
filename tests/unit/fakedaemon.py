"""A daemon for tests of the client side: a real WebSocket on loopback, in threads, that answers as it is told."""

import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Self

import msgspec
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from carserver.protocol.errors import ErrorKind, RpcError

Answer = Callable[["Session", Any], Any]
PATIENCE_S = 20  # a test that waits longer has failed


class Unanswered(Exception):
    """Raised by an answer that is to be none."""


class Session:
    """One connection, as an answer sees it."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        request = connection.request
        assert request is not None
        self.authorization = request.headers.get("Authorization")
        self._later: list[Callable[[], object]] = []

    def send(self, text: str) -> None:
        self._connection.send(text)

    def notify(self, method: str, params: Any) -> None:
        self.send(msgspec.json.encode({"jsonrpc": "2.0", "method": method, "params": params}).decode())

    def later(self, act: Callable[[], object]) -> None:
        """Once the reply is sent."""
        self._later.append(act)

    def act(self) -> None:
        while self._later:
            self._later.pop(0)()

    def close(self, code: int, reason: str = "") -> None:
        self._connection.close(code, reason)


class FakeDaemon:
    """`answers` by method: a value, or a function of session and params that returns one or raises RpcError."""

    def __init__(self, answers: dict[str, Any] | None = None, token: str | None = None) -> None:
        self.answers: dict[str, Any] = answers or {}
        self.pages: dict[str, tuple[int, str]] = {"/healthz": (200, "ok"), "/readyz": (200, "ok")}
        self.calls: list[tuple[str, Any]] = []
        self.frames: list[dict[str, Any]] = []  # what came that is no call: replies
        self.sessions: list[Session] = []
        self.replied = threading.Event()
        self._token = token

    def __enter__(self) -> Self:
        self._server = serve(self._serve, "127.0.0.1", 0, process_request=self._process, compression=None)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for session in self.sessions:
            session.close(1001)
        self._server.shutdown()
        self._thread.join(PATIENCE_S)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}"

    def params_of(self, method: str) -> list[Any]:
        return [params for called, params in self.calls if called == method]

    def _process(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path in self.pages:
            status, text = self.pages[request.path]
            return connection.respond(HTTPStatus(status), text)
        if self._token is not None and request.headers.get("Authorization") != f"Bearer {self._token}":
            return connection.respond(HTTPStatus.UNAUTHORIZED, "token mismatch\n")
        return None

    def _serve(self, connection: ServerConnection) -> None:
        session = Session(connection)
        self.sessions.append(session)
        try:
            for message in connection:
                self._take(session, msgspec.json.decode(message))
        except ConnectionClosed:
            pass

    def _take(self, session: Session, frame: dict[str, Any]) -> None:
        if "method" not in frame:
            self.frames.append(frame)
            self.replied.set()
            return
        method, params = frame["method"], frame.get("params")
        self.calls.append((method, params))
        reply: dict[str, Any] = {"jsonrpc": "2.0", "id": frame["id"]}
        try:
            answer = self.answers[method]
            reply["result"] = answer(session, params) if callable(answer) else answer
        except Unanswered:
            return
        except KeyError:
            reply["error"] = RpcError(ErrorKind.METHOD_NOT_FOUND, f"no method {method!r}").to_wire()
        except RpcError as error:
            reply["error"] = error.to_wire()
        session.send(msgspec.json.encode(reply).decode())
        session.act()


def snapshot(**members: Any) -> dict[str, Any]:
    """A run, executing, with what the test wants otherwise."""
    return {
        "id": "run-1",
        "session_id": "",
        "agent_id": "",
        "status": "executing",
        "prompt": "do it",
        "created_at_ms": 1_795_143_091_053,
        "updated_at_ms": 1_795_143_091_053,
        "event_count": 0,
        "epoch": "e1",
        **members,
    }


def trace_event(sequence: int, event: dict[str, Any], **members: Any) -> dict[str, Any]:
    """Params of a `runs.trace.event` that carries an event."""
    record = {"record": "event", "sequence": sequence, "timestamp_ms": 1_000 + sequence, "event": event}
    return _traced(record, sequence + 1, **members)


def trace_turn(index: int, kind: str = "turn", **members: Any) -> dict[str, Any]:
    """Params of a `runs.trace.event` that carries a turn that was recorded whole: `turn` or `model_turn`."""
    return _traced({"record": kind, "index": index, **members}, index + 1)


def trace_started(**members: Any) -> dict[str, Any]:
    record = {"record": "started", "run_id": "run-1", "agent_id": "", "intent": "do it", "started_at": "2026-11-20"}
    return _traced(record, 0, **members)


def trace_ended(cursor: int, status: str = "completed", **members: Any) -> dict[str, Any]:
    record = {"record": "ended", "run_id": "run-1", "run_status": status, "ended_at": "2026-11-20", **members}
    return _traced(record, cursor, run_status=status)


def _traced(record: dict[str, Any], cursor: int, **members: Any) -> dict[str, Any]:
    return {
        "run_id": "run-1",
        "agent_id": "",
        "record": record,
        "cursor": cursor,
        "status": "in_progress",
        "run_status": "executing",
        **members,
    }
