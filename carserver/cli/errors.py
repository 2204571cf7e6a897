"""Exit codes, and the one exception by which a command ends with one (contract, section 11)."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a script learns from a command's end; the numbers from 64 are those of BSD's sysexits.h."""

    OK = 0
    RUNTIME = 1
    USAGE = 2
    NOT_FOUND = 3
    UNREACHABLE = 69
    TIMED_OUT = 75
    NOT_AUTHORISED = 77
    INTERRUPTED = 130


class CommandError(Exception):
    """Ends a command with one line on standard error and `code`. The message is free of control characters."""

    def __init__(self, message: str, code: ExitCode = ExitCode.RUNTIME) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
