"""The terminal, while a live view has it: its second screen, painted line by line; the first comes back as it was.

Each line is put at its place and lines are never wrapped by the terminal, so that a character which the terminal takes
for wider than we do spoils its own line and no other. What is as it was is not written again.
"""

import contextlib
import os
import sys
import termios
import threading
from typing import Any, TextIO

Size = tuple[int, int]
"""Columns and lines."""

_SMALLEST: Size = (20, 3)
_USUAL: Size = (80, 24)  # where the terminal does not know
_OPEN = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"  # second screen, no cursor, no wrapping, cleared
_CLOSE = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"


class Screen:
    """Open or closed. Its calls may come from several threads: one at a time is carried out."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._lock = threading.Lock()
        self._open = False
        self._shown: list[str] = []
        self._size = _USUAL
        self._settings: list[Any] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the terminal is ours."""
        return self._open

    @property
    def size(self) -> Size:
        """The terminal's, now."""
        try:
            columns, lines = os.get_terminal_size(self._stream.fileno())
        except OSError:
            columns, lines = _USUAL
        if not columns or not lines:
            columns, lines = _USUAL
        return max(columns, _SMALLEST[0]), max(lines, _SMALLEST[1])

    def open(self) -> None:
        """Takes the second screen, and keeps what is typed from being shown on it."""
        with self._lock:
            if not self._open:
                self._open = True
                self._shown = []
                self._settings = silence()
                self._write(_OPEN)

    def close(self) -> None:
        """Gives the terminal back; waits for a frame that is under way."""
        with self._lock:
            if self._open:
                self._open = False
                self._write(_CLOSE)
                restore(self._settings)

    def show(self, lines: list[str], size: Size) -> None:
        """Paints a frame: lines with their escape sequences. Blocks for as long as the terminal takes nothing."""
        with self._lock:
            if not self._open:
                return
            if size != self._size:  # a terminal moves what it shows when its size changes
                self._shown = []
                self._size = size
            before = self._shown
            written = ["" if before else "\x1b[2J"]
            for n, line in enumerate(lines):
                if n >= len(before) or before[n] != line:
                    written.append(f"\x1b[{n + 1};1H\x1b[0m\x1b[2K{line}")  # behind a full line it would take a cell
            if len(lines) < len(before):
                written.append(f"\x1b[{len(lines) + 1};1H\x1b[J")
            self._shown = lines
            self._write("".join(written))

    def _write(self, text: str) -> None:
        if text:
            self._stream.write(text)
            self._stream.flush()


def silence() -> list[Any] | None:
    """Turns off the echo of what is typed; the settings as they were, or None where there is nothing to set."""
    if sys.stdin is None:
        return None
    try:
        descriptor = sys.stdin.fileno()
        if os.tcgetpgrp(descriptor) != os.getpgrp():  # in the background it is not ours to set
            return None
        settings = termios.tcgetattr(descriptor)
        silent = termios.tcgetattr(descriptor)
        silent[3] &= ~termios.ECHO
        silent[3] |= termios.NOFLSH  # else Ctrl-C takes what is on its way, and half an escape sequence is rubbish
        termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
    except (OSError, ValueError, termios.error):  # no terminal
        return None
    return settings


def restore(settings: list[Any] | None) -> None:
    """What was typed meanwhile was for the view: the shell does not get it."""
    if settings is not None:
        with contextlib.suppress(OSError, ValueError, termios.error):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSAFLUSH, settings)
