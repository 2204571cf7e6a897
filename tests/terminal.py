"""A terminal for tests: a command in a pseudo-terminal, and what one would see there.

It knows the control sequences that carserver writes, and no others: anything else is kept in `foreign`, as is every
control character, so that a test learns of what an agent's text would have done to a real terminal.
"""

import asyncio
import codecs
import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from typing import Any

from tests.daemon import ROOT, Daemon

EXIT_S = 30.0
# The command gets the terminal as its own: Ctrl-C and a new size reach it as signals.
_START = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
_TOKEN = re.compile(
    r"\x1b\[(?P<sequence>\??[\d;]*[A-Za-z])|(?P<newline>\r?\n)|(?P<text>[^\x00-\x1f\x7f-\x9f\u202a-\u202e]+)|(?P<foreign>.)",
    re.DOTALL,
)
_PLACE = re.compile(r"(\d+);1H")
_MODES = {"?1049h", "?1049l", "?25h", "?25l", "?7h", "?7l"}


class Terminal:
    """A command and its screen.

    `rows` is the second screen, `scrollback` what the first one has got, `foot` what is below that for the moment: it
    is written without wrapping, and erased from its beginning on.
    """

    def __init__(self, columns: int, lines: int) -> None:
        self.rows: dict[int, str] = {}
        self._scrolled: list[str] = []
        self.foot = ""
        self.foreign: list[str] = []
        self.modes: set[str] = set()  # those that were set last: of each h and l, one
        self.styles: set[str] = set()  # of text: colours, bold
        self.frames = 0  # writes on the second screen that began a line anew
        self.size = (columns, lines)
        self.ours, self.theirs = os.openpty()
        self.process: subprocess.Popen[bytes] | None = None
        self._row = 0
        self._rest = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._news = asyncio.Event()
        self.resize(columns, lines)

    def start(self, *arguments: str, **variables: str) -> None:
        """Starts `carserver` with these arguments, as somebody at this terminal would."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("CARSERVER", "CAR_"))}
        environment.pop("NO_COLOR", None)
        environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **variables}
        command = [sys.executable, "-c", _START, sys.executable, "-m", "carserver", *arguments]
        self.process = subprocess.Popen(
            command, stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, start_new_session=True, env=environment
        )
        os.close(self.theirs)  # its end is then the end of what it writes
        self.theirs = -1
        asyncio.get_running_loop().add_reader(self.ours, self._read)

    def resize(self, columns: int, lines: int) -> None:
        """As a person drags the window."""
        self.size = (columns, lines)
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: str) -> None:
        """As a person presses keys."""
        os.write(self.ours, keys.encode())

    def send(self, number: signal.Signals) -> None:
        """A signal for the command."""
        assert self.process is not None
        self.process.send_signal(number)

    @property
    def is_open(self) -> bool:
        """Whether the second screen is shown."""
        return "?1049h" in self.modes

    @property
    def scrollback(self) -> str:
        """The first screen's text, from its beginning."""
        self._scrolled = ["".join(self._scrolled)]
        return self._scrolled[0]

    @property
    def screen(self) -> str:
        """The second screen as text."""
        return "\n".join(self.rows.get(row, "") for row in range(1, max(self.rows, default=0) + 1))

    async def until(self, reached: Callable[[], Any]) -> None:
        """Waits for something to be seen; the test's own timeout bounds it."""
        while not reached():
            self._news.clear()
            await self._news.wait()

    async def stopped(self) -> None:
        """Waits until the command is stopped, as by Ctrl-Z."""
        assert self.process is not None
        await asyncio.to_thread(os.waitid, os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    async def ended(self) -> int:
        """Waits for the command's end: its exit code."""
        assert self.process is not None
        code = await asyncio.to_thread(self.process.wait, EXIT_S)
        await self.until(lambda: self.ours < 0)  # all that it wrote has been read
        return code

    def close(self) -> None:
        """Ends what is left."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for descriptor in (self.ours, self.theirs):
            if descriptor >= 0:
                if descriptor == self.ours:
                    asyncio.get_running_loop().remove_reader(descriptor)
                os.close(descriptor)

    # What the command writes.

    def _read(self) -> None:
        try:
            data = os.read(self.ours, 64 * 1024)
        except OSError:  # EIO: nobody has the other end open any more
            data = b""
        if data:
            self._take(self._rest + self._decoder.decode(data))
        else:
            asyncio.get_running_loop().remove_reader(self.ours)
            os.close(self.ours)
            self.ours = -1
        self._news.set()

    def _take(self, text: str) -> None:
        begun = re.search(r"\x1b\[?\??[\d;]*\Z|\r\Z", text)  # a sequence that is not here yet as a whole
        self._rest = text[begun.start() :] if begun else ""
        for found in _TOKEN.finditer(text[: begun.start()] if begun else text):
            if found["sequence"]:
                self._obey(found["sequence"])
            elif found["foreign"]:
                self.foreign.append(found["foreign"])
            elif "?7l" in self.modes and not self.is_open:
                self.foot += found["text"] or "\n"
            elif self.is_open:
                self.rows[self._row] = self.rows.get(self._row, "") + (found["text"] or "")
                if found["newline"]:
                    self.foreign.append(found["newline"])  # every line is put at its place
            else:
                self._scrolled.append(found["text"] or "\n")

    def _obey(self, sequence: str) -> None:
        place = _PLACE.fullmatch(sequence)
        if sequence in _MODES:
            self.modes -= {sequence[:-1] + "h", sequence[:-1] + "l"}
            self.modes.add(sequence)
        elif sequence.endswith("m"):
            self.styles.add(sequence)
        elif not self.is_open:
            self._obey_at_the_foot(sequence)
        elif place:
            self._row = int(place[1])
            self.frames += 1
        elif sequence == "2K":
            self.rows[self._row] = ""
        elif sequence in {"2J", "J"}:
            self.rows = {row: line for row, line in self.rows.items() if sequence == "J" and row < self._row}
        else:
            self.foreign.append(sequence)

    def _obey_at_the_foot(self, sequence: str) -> None:
        if sequence == "J":
            self.foot = ""
        elif sequence != "G" and not (sequence == "A" and "?7l" in self.modes):
            self.foreign.append(sequence)


@contextlib.contextmanager
def terminal(
    daemon: Daemon, *arguments: str, columns: int = 80, lines: int = 24, **variables: Any
) -> Iterator[Terminal]:
    """A command that talks to `daemon`, in a terminal of its own for the length of the block."""
    one = Terminal(columns, lines)
    try:
        one.start(*arguments, "--state-dir", str(daemon.state), **variables)
        yield one
    finally:
        one.close()
