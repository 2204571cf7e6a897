"""Tools that a peer hosts: what its session is sent, and what it says of it (contract, section 6, Hosting). No I/O.

A request is a frame in the session's outbox; chunks and answers come from the dispatcher. The answer to a request is
the proof that nothing of it lives. All that is kept is bounded by `handles`: so many requests may wait for an answer.
"""

from collections import deque

from msgspec import UNSET, Raw

from carserver.config import Settings
from carserver.core.chunks import read_chunk
from carserver.core.execution import Call, Feed, TerminalError
from carserver.core.outbox import Outbox
from carserver.core.ports import Timer
from carserver.core.runstore import Clock
from carserver.protocol.errors import RpcError, limit_exceeded, overloaded, unavailable
from carserver.protocol.frames import notification, request
from carserver.protocol.tools import CancelExecution, ErrorChunk, ExecuteTool, GivenDone

GONE = "the host's connection ended"
_NOT_ANY_MORE = "its host's connection has ended"
_NO_CHUNK = "the host's chunk is none"
_NO_WORDS = "the host answered an error without a message"


class Hosting:
    """What runs the tools of one session; implements `core.execution.ToolHost`.

    Args:
        outbox: The session's.
        client_id: And its name.
        clock: Timers.
        settings: `frame_bytes`, `handles`, `kill_after_s`, `unconfirmed_s`, and those of a chunk.
    """

    def __init__(self, outbox: Outbox, client_id: str, clock: Clock, settings: Settings) -> None:
        self._outbox = outbox
        self._client_id = client_id
        self._clock = clock
        self._settings = settings
        self._closed = False
        self._open: dict[str, _Request] = {}
        self._unasked: deque[_Request] = deque()  # that were taken, until the outbox has room for them
        self._untold: deque[_Request] = deque()  # that are to stop, until the outbox has room to say so
        self._told_when_low = False  # the outbox will call

    @property
    def asked(self) -> int:
        """Requests that wait for room, or for an answer."""
        return len(self._open)

    # core.execution.ToolHost.

    def refuses(self, call: Call, *, admitted: bool = False) -> RpcError | None:
        """Why the host cannot be asked; one that is admitted waits for room."""
        size = len(self._frame(call, b"{}")) - 2 + len(call.parameters)
        return self._impediment(call.tool, size) or (None if admitted else self._want_of_room(call.tool, size))

    def start(self, call: Call, feed: Feed) -> "_Request":
        """Asks the host, as soon as there is room; an error, where it cannot be asked any more."""
        asked = _Request(self, call.request_id, call.action_id, feed)
        frame = self._frame(call, call.parameters)
        impediment = self._impediment(call.tool, len(frame))
        if impediment is None:
            self._open[call.request_id] = asked
            asked.frame = frame
            self._unasked.append(asked)
            self._tell()
        else:
            feed.take(ErrorChunk(message=f"cannot start: {impediment.message}"))
            feed.gone()
        return asked

    def _impediment(self, tool: str, size: int) -> RpcError | None:
        """What does not pass."""
        if self._closed or self._outbox.sealed:
            return unavailable(f"tool {tool!r}: {_NOT_ANY_MORE}")
        if size > self._settings.frame_bytes:
            return limit_exceeded("frame_bytes", size, self._settings.frame_bytes, "parameters")
        if len(self._open) >= self._settings.handles:
            words = f"tool {tool!r}: its host has {len(self._open)} requests to answer already (handles)"
            return overloaded(words, self._settings.retry_after_ms)
        return None

    def _want_of_room(self, tool: str, size: int) -> RpcError | None:
        if self._untold or self._unasked or not self._outbox.has_room(size):
            words = f"tool {tool!r}: its host reads too slowly, {self._outbox.size} bytes wait for it (outbox_bytes)"
            return overloaded(words, self._settings.retry_after_ms)
        return None

    def _frame(self, call: Call, parameters: bytes) -> bytes:
        execute = ExecuteTool(
            request_id=call.request_id,
            tool=call.tool,
            parameters=Raw(parameters),
            action_id=call.action_id,
            attempt=call.attempt,
            timeout_ms=call.timeout_ms,
            session_id=self._client_id,
            run_id=UNSET if call.run_id is None else call.run_id,
        )
        return request(call.request_id, "tools.execute", execute)

    # What the host says.

    def chunk(self, request_id: str, raw: bytes) -> bool:
        """A piece of a request's stream, known to be JSON; False: of none that waits for an answer."""
        if not self.expects(request_id):
            return False
        asked = self._open[request_id]
        try:
            chunk = read_chunk(raw, self._settings)
        except RpcError as error:
            words = f"{_NO_CHUNK}: {error.message}"
            asked.feed.take(ErrorChunk(message=words))
            self.stop(asked, words)
        else:
            asked.feed.take(chunk)
            if isinstance(chunk, GivenDone | ErrorChunk):
                self._expect_answer(asked)
        return True

    def expects(self, request_id: str) -> bool:
        """Whether this request was sent, and waits for an answer."""
        asked = self._open.get(request_id)
        return asked is not None and not asked.frame

    def answered(self, request_id: str, result: bytes | None, error: str | None, *, terminal: bool = False) -> None:
        """The answer to a request that waits for it: a result, JSON, or the words of an error, perhaps a terminal one.

        It is the last chunk, unless there was one, and says that nothing of it lives.
        """
        asked = self._open[request_id]
        asked.answered = True
        self._forget(asked)
        if not asked.feed.over:
            if error is not None:
                kind = TerminalError if terminal else ErrorChunk
                asked.feed.take(kind(message=error or _NO_WORDS))
            elif result is None or result == b"null":
                asked.feed.take(GivenDone())
            else:
                asked.feed.take(GivenDone(result=Raw(result)))
        asked.feed.gone()

    def close(self, why: str) -> None:
        """The session hosts nothing any more: its connection has ended, or it acts as somebody else.

        What runs is told to stop, where there is somebody to tell; what becomes of it will not be known.
        """
        self._closed = True
        for asked in [one for one in self._unasked if one.frame]:
            asked.feed.close(why)
            self._call_off(asked)
        for asked in list(self._open.values()):
            self.stop(asked, why)
            self._forget(asked)
            asked.feed.close(why)
            asked.feed.survives()

    # The end of a request.

    def stop(self, asked: "_Request", reason: str) -> None:
        """Tells the host, as soon as there is room, and gives it time to answer; nothing, if that is so already."""
        if asked.timer is not None or asked.request_id not in self._open:
            return
        if asked.frame:
            self._call_off(asked)
            return
        asked.reason = reason
        self._untold.append(asked)
        self._tell()
        self._expect_answer(asked)

    def _call_off(self, asked: "_Request") -> None:
        """The host was never asked."""
        self._forget(asked)
        asked.feed.gone()

    def _tell(self) -> None:
        """No new request is sent before all stops are, so they are never more than requests that may wait."""
        while self._untold:
            asked = self._untold[0]
            if not asked.answered:
                cancel = CancelExecution(request_id=asked.request_id, action_id=asked.action_id, reason=asked.reason)
                frame = notification("tools.cancel", cancel)
                if not self._outbox.has_room(len(frame)):
                    self._tell_when_low()
                    return
                self._outbox.send(frame)
            self._untold.popleft()
        while self._unasked:
            asked = self._unasked[0]
            if asked.frame:
                if not self._outbox.has_room(len(asked.frame)):
                    self._tell_when_low()
                    return
                self._outbox.send(asked.frame)
                asked.frame = b""
            self._unasked.popleft()

    def _tell_when_low(self) -> None:
        if not self._told_when_low:
            self._told_when_low = True
            self._outbox.when_low(self._is_low)

    def _is_low(self) -> None:
        self._told_when_low = False
        self._tell()

    def _expect_answer(self, asked: "_Request") -> None:
        """A host that ended its stream, or is to, has so long for its answer."""
        if asked.timer is None and asked.request_id in self._open:
            wait_s = self._settings.kill_after_s + self._settings.unconfirmed_s
            asked.timer = self._clock.call_later(wait_s, lambda: self._give_up(asked))

    def _give_up(self, asked: "_Request") -> None:
        self._forget(asked)
        asked.feed.survives()

    def _forget(self, asked: "_Request") -> None:
        asked.frame = b""
        self._open.pop(asked.request_id, None)
        if asked.timer is not None:
            asked.timer.cancel()


class _Request:
    """A request that was sent, or is to be; implements `core.execution.Execution`."""

    __slots__ = ("_hosting", "action_id", "answered", "feed", "frame", "reason", "request_id", "timer")

    def __init__(self, hosting: Hosting, request_id: str, action_id: str, feed: Feed) -> None:
        self._hosting = hosting
        self.request_id = request_id
        self.action_id = action_id
        self.feed = feed
        self.frame = b""  # until it is sent
        self.answered = False
        self.reason = ""  # why it is to stop
        self.timer: Timer | None = None  # of its answer, once it has ended or is to

    def stop(self, reason: str) -> None:
        """It is to end."""
        self._hosting.stop(self, reason)
