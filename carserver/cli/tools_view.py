"""A tool's invocation at a terminal: its text as it comes, and below it, on a line of its own, how far it is.

The text stays in the terminal as any command's does. What is not text for good is the foot: the line that is not ended
yet, and the one that says how far it is. The cursor is left at its beginning, where a terminal keeps it when it is made
narrower and moves its lines about: so from there to the end of the screen is always the whole of it.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from functools import partial
from types import TracebackType
from typing import Any, Self

import click
import msgspec
from msgspec import Raw
from rich.text import Text

from carserver.cli.beside import beside
from carserver.cli.output import counted, duration, in_colour, json_data
from carserver.cli.plain import clipped, visible, visible_json, visible_lines
from carserver.cli.tools_lines import STDERR, STDOUT, Outcome, told, where, write
from carserver.cli.view import ansi, bar, fit, spinner
from carserver.cli.view_live import now_ms
from carserver.cli.view_screen import restore, silence
from carserver.protocol.tools import Chunk, DataChunk, ProgressChunk, ResultRef, TextChunk, ToolStatus

_FRAME_S = 0.1
_LINE = 4_096  # characters of a line that does not end: then a line is made of it
_SMALLEST = 20  # columns
_ERASE = "\x1b[0m\x1b[G\x1b[J"
_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"
_CROP, _WRAP = "\x1b[?7l", "\x1b[?7h"  # what is too long for its line
_SIGNS = {
    ToolStatus.SUCCEEDED: ("✓", "green"),
    ToolStatus.FAILED: ("✗", "red"),
    ToolStatus.CANCELLED: ("■", "yellow"),
}


class View:
    """See the module; one object for one invocation."""

    def __init__(self, tool: str) -> None:
        self._tool = tool
        self._began_s = time.monotonic()
        self._line: list[tuple[str, str]] = []  # the one that is not ended: pieces, each with the stream it came from
        self._after_return = False  # the last character was a carriage return
        self._fraction: float | None = None
        self._message = ""
        self._trouble = ""
        self._asked = False  # for its end
        self._errors_here = os.isatty(STDERR)
        self._order = asyncio.Lock()  # what comes first is written first
        self._lock = threading.Lock()  # of the terminal
        self._foot_shown = False
        self._settings: list[Any] | None = None
        self._painter: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._take_terminal()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTSTP, self._pause)
        self._painter = asyncio.create_task(self._paint(), name="carserver tools: painting")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTSTP)
        if self._painter is not None:
            self._painter.cancel()
            await asyncio.gather(self._painter, return_exceptions=True)
        self._give_terminal(self._end_line())

    # What comes.

    async def take(self, chunks: list[Raw], missing: int) -> None:
        written: list[str] = []
        if missing:
            written.append(f"{self._end_line()}\x1b[2m… {counted(missing, 'chunk')} missing here\x1b[0m\n")
        for raw in chunks:
            match msgspec.json.decode(raw, type=Chunk):
                case TextChunk(text=text, stream="stderr") if not self._errors_here:
                    await beside(partial(write, STDERR, text))
                case TextChunk(text=text, stream=stream):
                    written.append(self._text(text, stream or ""))
                case DataChunk(data=data):
                    written.append(f"{self._end_line()}{visible_json(bytes(data).decode())}\n")
                case ProgressChunk(fraction=fraction, message=message):
                    self._fraction, self._message = fraction, message or ""
        await self._write("".join(written))

    def trouble(self, what: str) -> None:
        self._trouble = what

    def cancelling(self) -> None:
        self._asked = True

    def end(self, outcome: Outcome) -> None:
        result = outcome.own_result
        if result is not None:
            json_data(result)
        if isinstance(outcome.result_ref, ResultRef):
            click.echo(where(outcome.result_ref), err=True)
        sign, colour = _SIGNS[outcome.status]
        click.echo(f"{click.style(sign, fg=colour) if in_colour() else sign} {told(outcome)}", err=True)

    def _text(self, text: str, stream: str) -> str:
        """What of a text makes whole lines, as it is written; the rest waits for the end of its line."""
        if self._after_return and text.startswith("\n"):
            text = text[1:]
        self._after_return = text.endswith("\r")
        # What a tool writes over itself, at a terminal of its own, stands below each other here: nothing is hidden.
        first, *rest = visible_lines(text.replace("\r\n", "\n").replace("\r", "\n")).split("\n")
        if first:
            self._line.append((first, stream))
        if not rest:
            return self._end_line() if sum(len(piece) for piece, _ in self._line) > _LINE else ""
        ended = self._end_line(blank=True)
        *lines, last = rest
        self._line.append((last, stream))
        return ended + "".join(f"{_styled(line, stream)}\n" for line in lines)

    def _end_line(self, *, blank: bool = False) -> str:
        """The line that is not ended, ended; an empty one is none, unless it is to be a blank line."""
        line = "".join(_styled(piece, stream) for piece, stream in self._line)
        self._line.clear()
        return f"{line}\n" if line or blank else ""

    # The terminal.

    async def _paint(self) -> None:
        while True:
            await self._write("")
            await asyncio.sleep(_FRAME_S)

    async def _write(self, text: str) -> None:
        """Writes text above the foot. Waits for as long as the terminal takes nothing."""
        async with self._order:
            foot = self._foot()
            await beside(partial(self._put, text, foot))

    def _put(self, text: str, foot: str) -> None:
        with self._lock:
            erased = _ERASE if self._foot_shown else ""
            self._foot_shown = True
            write(STDOUT, erased + text + foot)

    def _foot(self) -> str:
        width = max(_columns(), _SMALLEST)
        status = self._status(width)
        line = Text.assemble(*((piece, _style(stream)) for piece, stream in self._line)) if self._line else Text()
        line.expand_tabs(8)
        if not line:
            return f"{_CROP}{ansi([status])[0]}\x1b[G{_WRAP}"
        while (excess := line.cell_len - width + 1) > 0:  # its end is news
            line = line[max(excess // 2, 1) :]  # a character has two cells at most
        above, below = ansi([line, status])
        return f"{_CROP}{above}\n{below}\x1b[G\x1b[A{_WRAP}"

    def _status(self, width: int) -> Text:
        now = now_ms()
        left = Text.assemble((spinner(now), "cyan"), " ", (visible(clipped(self._tool, width)), "bold"))
        if self._trouble or self._asked:
            left.append(f"  {self._trouble or 'cancelling… (Ctrl-C again does not wait)'}", "yellow")
        elif self._message:
            left.append(f"  {visible(clipped(self._message, width))}")
        elapsed = duration(round((time.monotonic() - self._began_s) * 1000))
        return fit(left, Text.assemble(bar(self._fraction, width), (f"  {elapsed}", "dim")), width - 1)

    def _take_terminal(self) -> None:
        with self._lock:
            self._settings = silence()
            write(STDOUT, _HIDE)

    def _give_terminal(self, last: str = "") -> None:
        with self._lock:
            with contextlib.suppress(OSError):  # it is gone
                write(STDOUT, f"{_ERASE if self._foot_shown else ''}{last}{_SHOW}")
            self._foot_shown = False
            restore(self._settings)

    def _pause(self) -> None:
        """Ctrl-Z: the terminal is somebody else's until the process goes on."""
        self._give_terminal()
        os.kill(os.getpid(), signal.SIGSTOP)  # and here it goes on
        self._take_terminal()


def _style(stream: str) -> str:
    return "" if not stream else "red" if in_colour() else "dim"


def _styled(text: str, stream: str) -> str:
    """A piece of text as a terminal shows it: standard error's is told apart."""
    style = _style(stream)
    return f"\x1b[{31 if style == 'red' else 2}m{text}\x1b[0m" if style and text else text


def _columns() -> int:
    with contextlib.suppress(OSError):
        return os.get_terminal_size(sys.stdout.fileno()).columns
    return 80
