"""What an invocation came to, in words; and as lines and texts, for a pipe or a program."""

import os
from collections.abc import Mapping
from typing import Self

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.cli.beside import beside
from carserver.cli.output import counted, duration, json_data, note, size
from carserver.cli.plain import visible, visible_json, visible_lines
from carserver.protocol.tools import Chunk, DataChunk, ProgressChunk, Proof, ResultRef, TextChunk, ToolStatus

PROVEN: Mapping[Proof, str] = {
    "confirmed": ": nothing of it lives",
    "unconfirmed": ", but it could not be seen that it ended: something of it may go on",
    "requested": ", but it has not ended yet: something of it may go on",
}
_BARE = frozenset({"exit_code", "duration_ms"})  # all that a command's result says, where it gave none itself
STDOUT, STDERR = 1, 2


class Outcome(Struct, kw_only=True):
    """What an invocation came to; as JSON it is the last line of `--json`.

    `cancel` is the proof of a cancel by this command, `missing_chunks` how many were dropped before they could be read.
    """

    handle: str
    tool: str
    status: ToolStatus
    result: Raw | UnsetType = UNSET
    result_ref: ResultRef | UnsetType = UNSET
    error: str | UnsetType = UNSET
    cancel: Proof | UnsetType = UNSET
    missing_chunks: int | UnsetType = UNSET
    took_ms: int

    @property
    def bare(self) -> dict[str, int] | None:
        """The result of a command that gave none itself: its exit code and its duration."""
        if isinstance(self.result, UnsetType):
            return None
        result = msgspec.json.decode(self.result)
        return result if isinstance(result, dict) and result.keys() == _BARE else None

    @property
    def own_result(self) -> Raw | None:
        """The result, where there is one that says more than that."""
        return self.result if isinstance(self.result, Raw) and self.bare is None else None


def told(outcome: Outcome) -> str:
    """What an invocation came to, in a line."""
    took = duration(outcome.took_ms)
    error = "" if isinstance(outcome.error, UnsetType) else visible(outcome.error)
    match outcome.status:
        case ToolStatus.SUCCEEDED:
            bare = outcome.bare
            if bare is None:
                said = f"succeeded in {took}"
            else:  # its own time: this command may have come in later, by a key
                said = f"succeeded in {duration(bare['duration_ms'])}, exit code {bare['exit_code']}"
        case ToolStatus.CANCELLED if not isinstance(outcome.cancel, UnsetType):
            said = f"cancelled{PROVEN[outcome.cancel]}"
        case status:
            said = f"{status} after {took}: {error}"
    if isinstance(outcome.missing_chunks, int):
        said += f"; {counted(outcome.missing_chunks, 'chunk')} of what it said were not read in time, and are gone"
    return said


def where(reference: ResultRef) -> str:
    """How a large result is had."""
    id_ = visible(reference.id)
    return f"the result is output {id_}, {size(reference.size)}: carserver outputs read {id_}"


# ---------------------------------------------------------------------------------------------------------- in a pipe


class _Written:
    """What the displays for programs have in common: they write lines and texts, and take no terminal."""

    _trouble = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def trouble(self, what: str) -> None:
        if what not in {"", self._trouble}:
            note(what)
        self._trouble = what

    def cancelling(self) -> None:
        note("cancelling…")


class JsonLines(_Written):
    """Each chunk as the daemon has it, and the outcome."""

    async def take(self, chunks: list[Raw], missing: int) -> None:
        lines = [visible_json(bytes(chunk).decode()) for chunk in chunks]
        await beside(lambda: write(STDOUT, "\n".join([*lines, ""])))

    def end(self, outcome: Outcome) -> None:
        json_data(msgspec.json.encode(outcome), indented=False)


class Lines(_Written):
    """The tool's own text on the streams that it came from, its data as lines; all else on standard error.

    What goes to a terminal (standard error, or one that cannot be painted) is made visible.
    """

    def __init__(self) -> None:
        self._terminals = frozenset(fd for fd in (STDOUT, STDERR) if os.isatty(fd))
        self._said = False  # something, on standard output
        self._midway = False  # in a line of it
        self._progress = ""

    async def take(self, chunks: list[Raw], missing: int) -> None:
        written = [self._shown(msgspec.json.decode(chunk, type=Chunk)) for chunk in chunks]
        await beside(lambda: write_all([one for one in written if one is not None]))

    def _shown(self, chunk: Chunk) -> tuple[int, str] | None:
        match chunk:
            case TextChunk(text=text, stream="stderr"):
                return STDERR, self._safe(STDERR, text)
            case TextChunk(text=text):
                return self._said_on_stdout(self._safe(STDOUT, text))
            case DataChunk(data=data):
                begin = "\n" if self._midway else ""
                return self._said_on_stdout(f"{begin}{visible_json(bytes(data).decode())}\n")
            case ProgressChunk(fraction=fraction, message=message):
                line = f"{int(fraction * 100)} %" + (f"  {visible(message)}" if message else "")
                news, self._progress = line != self._progress, line
                return (STDERR, f"carserver: {line}\n") if news else None
        return None

    def _said_on_stdout(self, text: str) -> tuple[int, str]:
        self._said = self._said or bool(text)
        self._midway = not text.endswith("\n") if text else self._midway
        return STDOUT, text

    def _safe(self, descriptor: int, text: str) -> str:
        return visible_lines(text.replace("\r\n", "\n")) if descriptor in self._terminals else text

    def end(self, outcome: Outcome) -> None:
        if self._midway and STDOUT in self._terminals:
            write(STDOUT, "\n")  # what follows is none of it
        result = outcome.own_result
        if result is not None:
            if self._said:
                note(f"result: {visible_json(bytes(result).decode())}")
            else:
                json_data(result, indented=False)
        if isinstance(outcome.result_ref, ResultRef):
            note(where(outcome.result_ref))
        note(told(outcome))


def write_all(written: list[tuple[int, str]]) -> None:
    """In the order in which it came; neighbours of one stream at once."""
    at = 0
    while at < len(written):
        descriptor = written[at][0]
        end = next((n for n in range(at, len(written)) if written[n][0] != descriptor), len(written))
        write(descriptor, "".join(text for _, text in written[at:end]))
        at = end


def write(descriptor: int, text: str) -> None:
    """Writes to a descriptor: a file object has a lock, and the end of the process would wait for that."""
    rest = memoryview(text.encode("utf-8", "backslashreplace"))
    while rest:
        rest = rest[os.write(descriptor, rest) :]
