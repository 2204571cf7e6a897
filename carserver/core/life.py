"""The life of a handle between its start and its end: what its host feeds, what stops it, and what the end entails.

Whoever runs the tool knows this as a `Feed`; the store stops it by `cancel` and `fail`. All of it is atomic on the
loop, and everything goes through `Handle.hears`, so each handle gets one last chunk, whoever is first.
"""

from collections.abc import Callable

import msgspec
import orjson
from msgspec import Raw, Struct

from carserver.config import Settings
from carserver.core.chunks import encoded, pieces, preview, result_of
from carserver.core.counters import Counters
from carserver.core.execution import CLOSED, Call, Execution, Exit, TerminalError, ToolHost
from carserver.core.handles import Handle, Input, Recording
from carserver.core.outputstore import OutputStore
from carserver.core.ports import Timer
from carserver.core.runstore import Clock
from carserver.core.toolstream import ToolStreams
from carserver.protocol.codec import encode
from carserver.protocol.errors import RpcError
from carserver.protocol.tools import (
    DataChunk,
    DoneChunk,
    ErrorChunk,
    GivenChunk,
    GivenDone,
    ProgressChunk,
    ResultRef,
    TextChunk,
    ToolStatus,
)

_exit_decoder = msgspec.json.Decoder(Exit)


class Around(Struct, frozen=True, kw_only=True):
    """What all handles live in.

    `started` is called when a tool is about to run, `settled` once when nothing of it runs any more, or will not be
    heard of, `ended` when a handle has its last status.
    """

    settings: Settings
    counters: Counters
    clock: Clock
    streams: ToolStreams
    outputs: OutputStore
    started: Callable[[], None]
    settled: Callable[["Life"], None]
    ended: Callable[["Life"], None]


class Life:
    """One handle's; implements `core.execution.Feed`.

    Args:
        handle: Whose it is.
        around: What it lives in.
    """

    def __init__(self, handle: Handle, around: Around) -> None:
        self.handle = handle
        self._around = around
        self._settings = around.settings
        self._counters = around.counters
        self._execution: Execution | None = None
        self._called_off: str | None = None  # why it is to be cancelled as soon as anybody knows of it
        self._opened = False
        self._started = False
        self._settled = False  # its execution is gone, or will not be heard of in time
        self._recording: Recording | None = None
        self._deadline: Timer | None = None

    def start(self, host: ToolHost, call: Call) -> None:
        """What was to be durable is: the tool starts, unless it was called off meanwhile."""
        self._opened = True
        if self._called_off is not None:
            self.cancel(self._called_off)
            return
        refusal = host.refuses(call, admitted=True)
        if refusal is not None:
            self.fail(f"cannot start: {refusal.message}")
            return
        self._started = True
        self._around.started()
        if call.timeout_ms is not None:
            words = f"deadline of {call.timeout_ms} ms"
            self._deadline = self._around.clock.call_later(call.timeout_ms / 1000, lambda: self._is_due(words))
        self._execution = host.start(call, self)
        if self.running and self.handle.proof is not None:  # what it fed at once was none of a chunk
            self._execution.stop(self.handle.error or "")

    def record(self, recording: Recording) -> None:
        """Its `tool_start` is in its run's log, so what follows goes there, too."""
        self._recording = recording
        if self.handle.ended:
            self._record_end(recording)

    @property
    def running(self) -> bool:
        """Whether something of it runs, as far as is known."""
        return self._started and not self._settled

    # core.execution.Feed.

    @property
    def over(self) -> bool:
        """Nothing that is said now is heard."""
        return self.handle.state.over

    def take(self, chunk: GivenChunk, exit_code: int | None = None) -> None:
        """The next chunk."""
        if self.handle.state.over:
            self._counters.late_chunks += 1
            return
        match chunk:
            case TextChunk():
                for piece in pieces(chunk, self._settings.chunk_bytes):
                    self._push(encoded(piece))
                if self._recording is not None:
                    self._recording.text(chunk.text)
            case DataChunk() | ProgressChunk():
                self._take_whole(chunk)
            case GivenDone():
                self._take_done(chunk, exit_code)
            case ErrorChunk():
                self.handle.terminal = isinstance(chunk, TerminalError)
                self._take_error(chunk.message, exit_code)

    def close(self, why: str = CLOSED) -> None:
        """The stream has ended without a last chunk."""
        self._end(Input.ERROR, error=why)

    def gone(self) -> None:
        """Nothing of it lives."""
        if self.handle.proof is not None:
            self.handle.proof = "confirmed"
        self.handle.lost = False
        self._settle()
        self.close()

    def survives(self) -> None:
        """Something of it may live on."""
        if self.handle.proof is not None:
            self.handle.proof = "unconfirmed"
            self._counters.stops_unconfirmed += 1
        self.handle.lost = True
        self._settle()
        self.close()

    def _settle(self) -> None:
        self.handle.wake()
        if not self._settled:
            self._settled = True
            self._execution = None
            self._around.settled(self)

    # What the store does to it.

    def cancel(self, reason: str) -> bool:
        """Cancels it, unless it has ended; before its start, of which nobody may come to know, it is called off."""
        if self._opened:
            return self._stop(Input.CANCEL, reason)
        is_new = self._called_off is None
        self._called_off = self._called_off or reason
        return is_new

    def fail(self, reason: str) -> bool:
        """The daemon ends it, unless its tool has."""
        return self._stop(Input.ERROR, reason)

    def _is_due(self, words: str) -> None:
        if self.fail(words):
            self._counters.handle_deadlines += 1

    def _stop(self, happened: Input, reason: str) -> bool:
        if self.handle.hears(happened) is None:
            return False
        self.handle.proof = "requested" if self.running else "confirmed"
        self._end(happened, error=reason)
        if self.running and self._execution is not None:
            self._execution.stop(reason)
        return True

    # Chunks.

    def _push(self, chunk: bytes, *, last: bool = False) -> None:
        handle = self.handle
        sequence = handle.next_sequence
        self._counters.chunks_dropped += handle.push(chunk)
        self._counters.chunks += 1
        self._around.streams.publish(handle.id, handle.owner, sequence, chunk, last=last)
        handle.wake()

    def _take_whole(self, chunk: DataChunk | ProgressChunk) -> None:
        raw = encoded(chunk)
        if len(raw) > self._settings.chunk_bytes:
            kind = "data" if isinstance(chunk, DataChunk) else "progress"
            self.fail(
                f"a {kind} chunk of {len(raw)} bytes is more than chunk_bytes allows ({self._settings.chunk_bytes})"
            )
        else:
            self._push(raw)

    def _take_error(self, message: str, exit_code: int | None) -> None:
        maximum = self._settings.text_bytes
        if len(message) * 4 > maximum and (size := len(message.encode())) > maximum:
            message = f"it failed, with an error message of {size} bytes, more than text_bytes allows ({maximum})"
        self._end(Input.ERROR, error=message, exit_code=exit_code)

    def _take_done(self, chunk: GivenDone, exit_code: int | None) -> None:
        result = result_of(chunk)
        size = len(result or b"")
        if size > self._settings.result_bytes:
            self.fail(f"a result of {size} bytes is more than result_bytes allows ({self._settings.result_bytes})")
        elif result is not None and size > self._settings.result_inline_bytes:
            self.handle.state = self.handle.hears(Input.LARGE) or self.handle.state
            self._drop_deadline()
            self._around.clock.spawn(self._store(result, exit_code))
        else:
            self._end(Input.DONE, result=result, exit_code=exit_code)

    async def _store(self, result: bytes, exit_code: int | None) -> None:
        """A large result becomes an output; the handle ends when that is durable."""
        handle = self.handle
        try:
            output = await self._around.outputs.keep_result(
                handle.principal, handle.id, handle.tool, Raw(result), handle.run_id
            )
        except Exception as error:
            why = error.message if isinstance(error, RpcError) else "a defect of the daemon; its log has the details"
            why = f"its result of {len(result)} bytes could not be stored: {why}"
            self._end(Input.UNSTORED, error=why, exit_code=exit_code)
            if not isinstance(error, RpcError):
                raise  # it is said where all defects are
            return
        shown = preview(result, self._settings.result_preview_chars)
        reference = ResultRef(id=output.record.id, size=len(result), preview=shown)
        self._end(Input.STORED, result_ref=reference, exit_code=exit_code)

    # The end.

    def _end(
        self,
        happened: Input,
        *,
        result: bytes | None = None,
        result_ref: ResultRef | None = None,
        error: str | None = None,
        exit_code: int | None = None,
    ) -> None:
        """The handle has its last status, and its last chunk; not heard where it had them before."""
        handle = self.handle
        state = handle.hears(happened)
        if state is None:
            return
        handle.state = state
        handle.result, handle.result_ref, handle.error, handle.exit_code = result, result_ref, error, exit_code
        self._drop_deadline()
        self._count(handle.status)
        self._push(self._last_chunk(), last=True)
        if self._recording is not None:
            self._record_end(self._recording)
        self._around.ended(self)

    def _last_chunk(self) -> bytes:
        handle = self.handle
        if handle.error is not None:
            return encode(ErrorChunk(message=handle.error))
        if handle.result_ref is not None:
            return encode(DoneChunk(result_ref=handle.result_ref))
        return encode(DoneChunk() if handle.result is None else DoneChunk(result=Raw(handle.result)))

    def _record_end(self, recording: Recording) -> None:
        handle = self.handle
        recording.end(self._output(), handle.exit_code, handle.error, handle.result_ref)

    def _output(self) -> str:
        """The result as `tool_end` has it, a string; what a command that gave none has said is in the log already."""
        result = self.handle.result
        if result is None or (self.handle.exit_code is not None and _is_exit(result)):
            return ""
        return str(orjson.loads(result)) if result.startswith(b'"') else result.decode()

    def _count(self, status: ToolStatus) -> None:
        if status is ToolStatus.SUCCEEDED:
            self._counters.handles_succeeded += 1
        elif status is ToolStatus.FAILED:
            self._counters.handles_failed += 1
        else:
            self._counters.handles_cancelled += 1

    def _drop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _is_exit(result: bytes) -> bool:
    """Whether a result says no more than how a command ended."""
    try:
        _exit_decoder.decode(result)
    except msgspec.DecodeError:
        return False
    return True
