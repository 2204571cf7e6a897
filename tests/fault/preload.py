"""Faults from outside, under a daemon as it is: `preload.c`, compiled and preloaded into its process."""

import enum
import errno
import mmap
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("preload.c")
COMPILE_S = 60.0
NEVER_AGAIN = 2**62  # the number of a call that is never made: all from the first one on fail

_OFFSET, _PART, _OF = 0, 8, 16  # where the members of `struct control` are
_CALLS = struct.Struct("=4q")  # seen, first, last, error


class Call(enum.IntEnum):
    """What can be made to fail, on the files of the database: `enum kind`."""

    WRITE = 0
    READ = 1
    SYNC = 2
    TRUNCATE = 3
    OPEN = 4


class CannotPreload(Exception):
    """The message says what this machine is without."""


def compiled(folder: Path) -> Path:
    """The library, made in `folder`.

    Raises:
        CannotPreload: there is no C compiler, or it cannot make it.
    """
    library = folder / "preload.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CannotPreload("no C compiler (cc, gcc): no library to preload")
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-o", str(library), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S, check=False)
    if done.returncode:
        raise CannotPreload(f"{compiler} cannot make preload.c: {done.stderr}")
    return library


class Faults:
    """What one daemon suffers; changed while it runs, and kept when it starts again.

    Args:
        library: The compiled one.
        path: Where the file is made that tells it.
    """

    def __init__(self, library: Path, path: Path) -> None:
        path.write_bytes(bytes(_OF + _CALLS.size * len(Call)))
        with path.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), 0)
        self.wrapper = ("env", f"LD_PRELOAD={library}", f"FAULTS={path}")

    def seen(self, call: Call) -> int:
        """How many of these calls were made; 0 from the beginning on: the library is not where the calls are."""
        seen: int = self._calls(call)[0]
        return seen

    def failed(self, call: Call) -> int:
        """How many of them failed since `fail`."""
        seen, first, last, _ = self._calls(call)
        return max(0, min(seen, last) - first + 1) if first else 0

    def fail(
        self, call: Call, nth: int = 1, *, times: int = NEVER_AGAIN, error: int = errno.EIO, part: int = 0
    ) -> None:
        """Lets the `nth` of these calls from now on fail, and those after it: `times` in all.

        A write that fails writes its first `part` bytes nevertheless.
        """
        first = self._calls(call)[0] + nth
        struct.pack_into("=q", self._control, _PART, part)
        # The number of the first one is what switches it on, so it comes last.
        struct.pack_into("=2q", self._control, self._at(call) + 16, first + times - 1, error)
        struct.pack_into("=q", self._control, self._at(call) + 8, first)

    def heal(self) -> None:
        """No call fails any more."""
        for call in Call:
            struct.pack_into("=q", self._control, self._at(call) + 8, 0)

    def move_clock(self, seconds: float) -> None:
        """Sets the wall clock forward, or back, from where it is."""
        (offset,) = struct.unpack_from("=q", self._control, _OFFSET)
        struct.pack_into("=q", self._control, _OFFSET, offset + round(seconds * 1e9))

    def _at(self, call: Call) -> int:
        return _OF + _CALLS.size * call

    def _calls(self, call: Call) -> tuple[int, ...]:
        return _CALLS.unpack_from(self._control, self._at(call))
