"""What the daemon, the keeper of process tools and its sub-reapers say to one another, each word as one packet.

A word is one byte; then comes a number, and perhaps what it is about.
"""

from collections.abc import Collection, Sequence

# The daemon to the keeper:
START = b"S"  # an execution's number, with four descriptors: control socket, stdout, stderr, and what is to be run
ABANDON = b"B"  # an execution's number: its sub-reaper does not answer, so the keeper is to do its work
# The keeper to the daemon:
LOST = b"L"  # an execution's number: its sub-reaper was killed, and nothing of it lives any more
# The daemon to a sub-reaper:
TERMINATE = b"T"  # milliseconds until KILL
KILL = b"K"
# A sub-reaper to the daemon:
TAKEN = b"A"  # it is there; nothing was started before this
STARTED = b"P"  # the command's process id
FAILED = b"F"  # an errno, and which of these three failed
EXITED = b"E"  # the command's exit code, or its signal's number below 0
GONE = b"G"  # how many processes ended by KILL: nothing of it lives; the last word
PROGRAM, FOLDER, PROCESS = b"program", b"folder", b"process"
PACKET_BYTES = 64  # the longest is far shorter
_NUMBER_BYTES = 8


def packet(word: bytes, number: int = 0, about: bytes = b"") -> bytes:
    """What is said, as bytes."""
    return word + number.to_bytes(_NUMBER_BYTES, "little", signed=True) + about


def read_packet(data: bytes) -> tuple[bytes, int, bytes]:
    """The word, the number, and what it is about."""
    return data[:1], int.from_bytes(data[1 : 1 + _NUMBER_BYTES], "little", signed=True), data[1 + _NUMBER_BYTES :]


def plan(argv: Sequence[bytes], folder: bytes, environment: Collection[bytes]) -> bytes:
    """What is to be run, as bytes: none of these can hold a NUL."""
    return b"\0".join([folder, b"%d" % len(argv), *argv, *environment])


def read_plan(data: bytes) -> tuple[list[bytes], bytes, dict[bytes, bytes]]:
    """The argument list, the folder and the environment of a `plan`."""
    folder, count, *rest = data.split(b"\0")
    argv, environment = rest[: int(count)], rest[int(count) :]
    return argv, folder, dict(variable.split(b"=", 1) for variable in environment)
