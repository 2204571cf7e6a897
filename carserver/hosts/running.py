"""One execution of a process tool, as the daemon knows it: what its command writes, how it ended, whether it lives.

Its sub-reaper (`hosts.subreaper`) starts, kills and proves; here it is decided what that means for the handle:

- The command ends by itself → its pipes are read to their end, for at most `settle_s` → what it left is killed →
  nothing of it lives → the last chunk, `gone`.
- It is stopped, by the core or by `max_output` → TERM, `kill_after_s` later KILL, while what it writes is read and
  thrown away, or it could not end for a full pipe → `gone`; or `survives`, `unconfirmed_s` after KILL.
- The keeper or the sub-reaper dies → the handle fails at once, all of it is killed → `gone`, or `survives`.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol

from msgspec import Raw

from carserver.config import Settings
from carserver.core.counters import Counters
from carserver.core.execution import Exit, Feed
from carserver.hosts.decoding import Decoder, LineDecoder, TextDecoder
from carserver.hosts.packets import (
    ABANDON,
    EXITED,
    FAILED,
    FOLDER,
    GONE,
    KILL,
    PACKET_BYTES,
    PROGRAM,
    STARTED,
    TAKEN,
    TERMINATE,
    packet,
    read_packet,
)
from carserver.hosts.spec import ProcessSpec
from carserver.protocol.codec import encode
from carserver.protocol.tools import ErrorChunk, GivenChunk, GivenDone

KEEPER_DIED = "the keeper of process tools died"
REAPER_DIED = "the process that looks after the command was killed"
NOT_TAKEN = "cannot start: the keeper of process tools could not take it; see the daemon's log"

_READ_BYTES = 64 * 1024  # in a turn, at most: what a pipe holds, unless a command asks for more
_LINES_BYTES = 16 * 1024  # likewise, of lines, each of which may be a chunk
_FIRST_BYTES, _LEAST_BYTES = 4 * 1024, 512
_TURN_S = 0.002  # for what one read of each execution brings, all together; a longer one is followed by a smaller one
_LEAST_TURN_S = 0.0002  # of one
_LAST_READS = 16  # of a pipe whose writers are gone: the most that a pipe may hold, 1 MiB


class Pool(Protocol):
    """What an execution needs of those who started it."""

    settings: Settings
    counters: Counters

    @property
    def live(self) -> int:
        """Executions that share the loop."""
        ...

    def tell(self, message: bytes) -> None:
        """Tells the keeper."""
        ...

    def closed(self, number: int) -> None:
        """The execution of this number holds nothing any more."""
        ...


class _Stream:
    """One of the command's two pipes, until its end."""

    def __init__(self, descriptor: int, decoder: Decoder) -> None:
        self.descriptor = descriptor
        self.decoder = decoder
        self._most_bytes = _LINES_BYTES if isinstance(decoder, LineDecoder) else _READ_BYTES
        self._next_bytes = min(_FIRST_BYTES, self._most_bytes)

    def read(self, size: int = 0) -> bytes | None:
        """What is there, empty at the end; None where nothing is there yet. `size` is a turn's unless it is given."""
        try:
            return os.read(self.descriptor, size or self._next_bytes)
        except BlockingIOError:
            return None

    def took(self, seconds: float, turn_s: float) -> None:
        """How long this thread worked to pass on what was read, and what it should be: so the next read is sized."""
        if seconds > turn_s:
            self._next_bytes = max(round(self._next_bytes * turn_s / seconds), _LEAST_BYTES)
        elif seconds < turn_s / 4:
            self._next_bytes = min(self._next_bytes * 2, self._most_bytes)


class Running:
    """One execution; implements `core.execution.Execution`. Owns the control socket and both pipes, until `closed`."""

    def __init__(
        self, number: int, spec: ProcessSpec, program: str, feed: Feed, pool: Pool, ends: tuple[socket.socket, int, int]
    ) -> None:
        self._number = number
        self._spec = spec
        self._program = program
        self._feed = feed
        self._pool = pool
        self._settings = pool.settings
        self._loop = asyncio.get_running_loop()
        self._control: socket.socket | None = ends[0]
        stdout = LineDecoder(self._settings) if spec.output == "jsonl" else TextDecoder()
        self._streams = [_Stream(ends[1], stdout), _Stream(ends[2], TextDecoder(is_stderr=True))]
        self._began_s = self._ended_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._written = 0  # bytes of both streams
        self._is_kept = True  # the keeper that has it lives
        self._is_taken = False  # it has a sub-reaper
        self._is_started = False  # its command runs, or ran
        self._lives = True
        self._code: int | None = None  # how the command ended: its exit code, or its signal's number below 0
        self._last: GivenChunk | None = None  # the outcome, where it is known before the command's end
        self._is_settled = False  # nothing more is expected of its pipes
        self._is_sealed = False  # the handle has its last chunk
        self._is_told = False  # of its end: gone, or survives
        self._is_finishing = False
        self._loop.add_reader(ends[0].fileno(), self._hear)
        for stream in self._streams:
            self._loop.add_reader(stream.descriptor, self._readable, stream)

    def stop(self, reason: str) -> None:
        """The handle was sealed: all of it is to end."""
        if not self._is_sealed:
            self._is_sealed = True
            self._terminate()

    def keeper_died(self) -> None:
        """Its sub-reaper, if it is there, kills everything by itself."""
        self._is_kept = False
        self._fail(KEEPER_DIED)
        if self._control is None and self._lives:
            self._give_up()
        elif not self._is_told:
            self._after(self._settings.unconfirmed_s, self._give_up)

    def lost(self) -> None:
        """Its sub-reaper was killed, and the keeper has killed the rest: nothing of it lives."""
        self._fail(REAPER_DIED)
        self._is_gone()

    def let_go(self) -> None:
        """The daemon ends and waits no longer."""
        self._is_kept = False
        self._give_up()
        self._release()

    # What the sub-reaper says.

    def _hear(self) -> None:
        while self._control:
            try:
                data = self._control.recv(PACKET_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it left something unread, which is told before what it said last
            if not data:
                self._reaper_ended()
                return
            self._heard(*read_packet(data))

    def _heard(self, word: bytes, number: int, about: bytes) -> None:
        if word == TAKEN:
            self._is_taken = True
        elif word == STARTED:
            self._is_started = True
            self._pool.counters.tool_processes_started += 1
        elif word == FAILED:
            what = {PROGRAM: self._program, FOLDER: f"the folder {self._spec.cwd}"}.get(about, "a process")
            self._last = ErrorChunk(message=f"cannot start: {what}: {os.strerror(number)}")
        elif word == EXITED:
            self._ended_s = self._loop.time()
            self._code = number
            self._settle()
        elif word == GONE:
            self._pool.counters.tool_processes_killed += number
            self._is_gone()

    def _reaper_ended(self) -> None:
        """Without a last word."""
        self._close_control()
        if not self._is_taken:  # so nothing was started
            self._last = self._last or ErrorChunk(message=NOT_TAKEN)
            self._is_settled = True
            self._is_gone()
            return
        self._fail(REAPER_DIED)
        if self._is_kept:
            self._after(self._settings.unconfirmed_s, self._give_up)
        else:
            self._give_up()

    # What the command writes.

    def _readable(self, stream: _Stream) -> None:
        data = stream.read()
        if data:
            began_s = time.thread_time()
            self._take(stream, data)
            turn_s = max(_TURN_S / max(self._pool.live, 1), _LEAST_TURN_S)
            stream.took(time.thread_time() - began_s, turn_s)
        elif data is not None:
            self._at_end(stream)
            self._advance()

    def _take(self, stream: _Stream, data: bytes) -> None:
        self._pool.counters.tool_output_bytes += len(data)
        if self._is_deaf:
            self._pool.counters.tool_output_ignored_bytes += len(data)
            return
        room = self._spec.max_output - self._written
        self._written += len(data)
        self._pass_on(stream.decoder.take(data[:room]))
        if len(data) > room and not self._is_deaf:
            self._fail(f"output is more than max_output allows ({self._spec.max_output} bytes)")
            self._terminate()

    @property
    def _is_deaf(self) -> bool:
        """What it writes is heard by nobody any more."""
        return self._is_sealed or self._last is not None or self._feed.over

    def _pass_on(self, chunks: Iterator[GivenChunk]) -> None:
        for chunk in chunks:
            if self._is_deaf:
                return
            if isinstance(chunk, GivenDone | ErrorChunk):
                self._last = chunk
                self._settle()
            else:
                self._feed.take(chunk)

    def _at_end(self, stream: _Stream) -> None:
        self._pass_on(stream.decoder.end())
        self._close_stream(stream)

    # How it ends.

    def _settle(self) -> None:
        """The command has ended, or has said its last: what is missing of the two, and of its pipes, has a moment."""
        if self._is_sealed or self._is_settled:
            return
        if self._code is not None and (self._last is not None or not self._streams):
            self._kill_rest()
        else:
            self._after(self._settings.settle_s, self._kill_rest)

    def _kill_rest(self) -> None:
        self._is_settled = True
        if self._lives:
            self._tell(packet(KILL))
            self._after(self._settings.unconfirmed_s, self._give_up)
        else:
            self._advance()

    def _terminate(self) -> None:
        if not self._lives:
            self._finish()
        elif not self._is_settled:
            self._tell(packet(TERMINATE, round(self._settings.kill_after_s * 1000)))
            self._after(self._settings.kill_after_s + self._settings.unconfirmed_s, self._give_up)

    def _is_gone(self) -> None:
        self._lives = False
        self._close_control()
        self._advance()

    def _advance(self) -> None:
        """Something has ended: the command's pipe, or all of it."""
        if self._lives:
            if self._code is not None and not self._streams and not self._is_sealed and not self._is_settled:
                self._kill_rest()
        elif self._is_sealed or self._is_settled or self._last is not None or not self._streams:
            self._finish()

    def _finish(self) -> None:
        """Nothing of it lives."""
        if self._is_finishing:
            return
        self._is_finishing = True
        for stream in list(self._streams):
            for _ in range(_LAST_READS):
                if not (data := stream.read(_READ_BYTES)):
                    break
                self._take(stream, data)
            self._at_end(stream)
        self._seal()
        if not self._is_told:
            self._is_told = True
            self._feed.gone()
        self._release()

    def _give_up(self) -> None:
        """It was killed, and was not seen to go in time. Whatever ends of it yet is still taken."""
        self._seal()
        if not self._is_told:
            self._is_told = True
            self._feed.survives()
        if self._is_kept:
            self._pool.tell(packet(ABANDON, self._number))  # if it is the sub-reaper that hangs: it may be stopped
        elif self._control is None:
            self._release()  # nobody is left who could tell

    def _seal(self) -> None:
        if self._is_sealed:
            return
        self._is_sealed = True
        if self._last is not None:
            self._feed.take(self._last, self._exit_code)
        elif self._code is None:
            self._feed.close()
        elif self._code == 0:
            result = Exit(exit_code=0, duration_ms=round((self._ended_s - self._began_s) * 1000))
            self._feed.take(GivenDone(result=Raw(encode(result))), 0)
        elif self._code > 0:
            self._feed.take(ErrorChunk(message=f"exit code {self._code}"), self._code)
        else:
            self._feed.take(ErrorChunk(message=f"killed by signal {-self._code}"))

    @property
    def _exit_code(self) -> int | None:
        """The command's, if it ran, and ended by itself."""
        return self._code if self._code is not None and self._code >= 0 and self._is_started else None

    def _fail(self, message: str) -> None:
        if not self._is_sealed:
            self._is_sealed = True
            self._feed.take(ErrorChunk(message=message))

    # Its descriptors.

    def _release(self) -> None:
        """Closes what it holds; with its end of the control socket gone, everything is killed."""
        if self._timer:
            self._timer.cancel()
        self._close_control()
        for stream in list(self._streams):
            self._close_stream(stream)
        self._pool.closed(self._number)

    def _tell(self, message: bytes) -> None:
        with suppress(OSError):  # it has ended: that is heard by itself
            if self._control:
                self._control.send(message)

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, then)

    def _close_control(self) -> None:
        if self._control:
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None

    def _close_stream(self, stream: _Stream) -> None:
        if stream not in self._streams:
            return  # passing on its last chunk has ended it all
        self._streams.remove(stream)
        self._loop.remove_reader(stream.descriptor)
        os.close(stream.descriptor)
