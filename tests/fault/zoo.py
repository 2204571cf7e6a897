"""The zoo: process tools of every kind (`tests.fault.animals`), what must become of each, and how to find what is left.

Each is started by env(1) with a mark of its own in its environment, which everything has that comes of it; who hides
that is found as a descendant of the daemon.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fault import animals
from tests.fault.tooling import children, pids

MARK = "ZOO"
MIB = 1 << 20
FLOOD_BYTES = 1024 * MIB
LEFT_S = 30.0  # within which nothing is left, on the slowest machine
BECOMING_S = 10.0  # that execve(2) takes, at most, there
FEW = f"max_output = {MIB}"
LINES = 'output = "jsonl"'
FATAL = "the process that looks after the command was killed"
ANIMAL = ("env", f"{MARK}={{mark}}", sys.executable, "-IS", str(Path(animals.__file__).absolute()))


@dataclass(frozen=True, kw_only=True)
class Animal:
    """A tool, and what becomes of it when nobody stops it.

    `text` and `errors` are what its two streams must hold, None where that is left open; `kinds` are its chunks but
    the last, pieces of text that follow one another taken as one. `settings` are further lines of its table.
    """

    name: str
    ends: bool = True  # by itself
    error: str = ""  # empty: it succeeds
    early: bool = False  # its handle fails before it has ended
    text: str | None = ""
    errors: str = ""
    kinds: Sequence[str] | None = None
    settings: str = ""
    command: Sequence[str] = ()  # instead of the animal of this name
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> str:
        """As the tools file has it."""
        command = [*self.command] or [*ANIMAL, self.name]
        properties = ", ".join(f"{name} = {{}}" for name in ("mark", *self.arguments))
        return (
            f"[tools.{self.name}]\ncommand = {json.dumps(command)}\n{self.settings}\n"
            f"parameters.properties = {{ {properties} }}\n"
        )


_ARGUMENT = "\u20ac" * 36_000  # 108,000 bytes: one of a command may have 128 KiB, and 15 of these are 1.5 MiB
_ARGUMENTS = 15
BY_THEMSELVES = [
    Animal(name="silent", command=["true"]),
    Animal(name="line", text="x" * animals.LINE + "\n"),
    Animal(name="halves", text="€😀" * 3, errors="€😀" * 3),
    Animal(name="forks_and_exits"),
    Animal(name="daemonizes"),
    Animal(name="closes_its_output", error="exit code 4"),
    Animal(name="exits_3", error="exit code 3"),
    Animal(name="cannot_start", command=["no/such"], error="cannot start: no/such: No such file or directory"),
    Animal(name="kills_itself", error="killed by signal 9"),
    Animal(name="reads_its_input", text="0 bytes"),
    Animal(
        name="floods",
        settings=FEW,
        text=None,
        error=f"output is more than max_output allows ({MIB} bytes)",
        early=True,
    ),
    Animal(name="forks_without_pause"),
    Animal(name="herds", text=f"{animals.HERD} children"),
    Animal(name="kills_its_parent", error=FATAL, early=True),
    Animal(name="writes_to_both", text="1" * animals.BOTH * animals.UNIT, errors="2" * animals.BOTH * animals.UNIT),
    Animal(name="writes_when_it_has_ended", text=None),
    Animal(name="has_an_odd_name"),
    Animal(name="has_no_environment"),
    Animal(name="reaps_for_itself"),
    Animal(name="has_reapers_below"),
    Animal(name="has_a_terminal"),
    Animal(name="opens_files", text="open"),
    Animal(name="leaves_zombies"),
    Animal(
        name="prints_lines",
        settings=LINES,
        text="toldno JSON\n\ufffd\n[1,2",
        kinds=["text", "data", "progress", "data", "data", "data", "data", "text", "data", "text"],
    ),
    Animal(name="says_that_it_failed", settings=LINES, error="the disk is on fire"),
    Animal(
        name="counts_its_arguments",
        command=[*ANIMAL, "counts_its_arguments", *["{a}"] * _ARGUMENTS],
        arguments={"a": _ARGUMENT},
        text=f"{_ARGUMENTS} arguments, {_ARGUMENTS * len(_ARGUMENT)} characters",
    ),
    Animal(
        name="has_too_long_an_argument",
        command=[*ANIMAL, "silent", "{a}"],
        arguments={"a": _ARGUMENT * 2},
        error="cannot start: env: Argument list too long",
    ),
]
FOREVER = [
    Animal(name=name, ends=False, text=None)
    for name in ("ignores_term", "ignores_everything", "stops_itself", "forks_on_term", "writes_on_term")
]
if animals.CLONE:
    BY_THEMSELVES += [Animal(name="clones_in_silence"), Animal(name="clones_a_sibling")]
    FOREVER.append(Animal(name="has_lost_its_head", ends=False, text=None))
if os.geteuid() == 0:
    FOREVER.append(Animal(name="is_nobody", ends=False, text=None))
ALL = [*BY_THEMSELVES, *FOREVER]
APART = [  # what they do is not for others to share
    Animal(name="stops_its_parent", ends=False, text=None),
    Animal(name="kills_the_keeper", error="the keeper of process tools died", early=True),
    Animal(
        name="writes",
        command=[*ANIMAL, "writes", "{bytes}"],
        arguments={"bytes": 0},
        text=None,
        settings=f"max_output = {FLOOD_BYTES}",
    ),
]


def write_zoo(path: Path) -> str:
    """Writes the tools file of all animals; its path."""
    path.write_text("\n".join(animal.table for animal in (*ALL, *APART)))
    return str(path)


# What is left.


def marked(mark: str) -> list[int]:
    """Every process that has come of the tools with this mark, or with one that begins with it and a point."""
    found = []
    for pid in pids():
        variables = _environment(pid).split(b"\0")
        if any(one == f"{MARK}={mark}".encode() or one.startswith(f"{MARK}={mark}.".encode()) for one in variables):
            found.append(pid)
    return found


def _environment(pid: int) -> bytes:
    """What a process was started with; one that is just becoming another program shows it a moment later."""
    late = time.monotonic() + BECOMING_S
    try:
        while not (content := Path(f"/proc/{pid}/environ").read_bytes()):
            if not _is_becoming(pid):
                return Path(f"/proc/{pid}/environ").read_bytes()
            assert time.monotonic() < late, f"process {pid} does not become what it is to be"
            os.sched_yield()
    except OSError:  # it is gone
        return b""
    return content


def _is_becoming(pid: int) -> bool:
    """Whether a process is within execve(2): it has no end of an environment yet (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    ended, of_the_kernel = fields[0] in {b"Z", b"X"}, int(fields[6]) & 0x0020_0000
    return not ended and not of_the_kernel and fields[48] == b"0"


def descendants(pid: int) -> list[int]:
    """All below a process, zombies too."""
    below = children(pid)
    return below + [deeper for one in below for deeper in descendants(one)]


def identities(found: Sequence[int]) -> set[tuple[int, bytes]]:
    """Of these processes those that live, and when each began: so they are told from others of the same id."""
    return {(pid, began) for pid in found if (began := _began(pid))}


def _began(pid: int) -> bytes:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return b""
    return b"" if fields[0] in {b"Z", b"X"} else fields[19]


def described(found: Sequence[int]) -> str:
    """Processes, for a person."""
    said = []
    for pid in found:
        try:
            said.append(Path(f"/proc/{pid}/stat").read_text(errors="replace")[:60])
            said.append(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")[-60:])
        except OSError:
            said.append(f"{pid}, which has just ended")
    return "; ".join(said)


async def until_none(look: Callable[[], list[int]]) -> str:
    """Waits until nobody is found; who is found yet after the longest time."""
    deadline = time.monotonic() + LEFT_S
    while found := look():
        if time.monotonic() > deadline:
            return described(found)
        await asyncio.sleep(0.02)
    return ""


def memory(*processes: int) -> int:
    """Bytes that these have, what they share with others in proportion."""
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in processes]
    return sum(int(line.split()[1]) * 1024 for rollup in rollups for line in rollup.splitlines() if "Pss:" in line)
