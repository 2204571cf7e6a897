"""`carserver import`: a file of lines, sent in batches; each is answered before the next is sent."""

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import orjson
from msgspec import Raw

from carserver.cli.beside import beside
from carserver.cli.errors import CommandError
from carserver.cli.plain import visible
from carserver.cli.sink import progress
from carserver.client import CallError
from carserver.client.trace import Opener
from carserver.protocol.transfer import Imported

BATCH_LINES = 1_000  # the daemon's own bound
BATCH_BYTES = 512 * 1024  # so that what others record does not wait long; a larger line has a batch to itself
BATCH_BRACKETS = 100_000  # the daemon's own bound for a message is 131,072
LINE_BYTES = 16 * 1024 * 1024 - 1024  # the daemon's own bound for a message, less what is around the line
_PLACE = re.compile(r"lines\[(\d+)\](?:\.|: )?")


class Batch(NamedTuple):
    """Lines, and the number of each in the file, from 1."""

    numbers: list[int]
    lines: list[bytes]


def batches(source: BinaryIO) -> Iterator[Batch]:
    """The lines of a file, as many at a time as fit.

    Raises:
        CommandError: a line is no JSON, or longer than any that the daemon takes; after those before it were yielded.
            The file cannot be read.
    """
    batch = Batch([], [])
    size = brackets = 0
    for number, line in enumerate(_lines(source), 1):
        if not line:
            continue
        problem = _problem(line)
        more = line.count(b"{") + line.count(b"[")
        fits = len(batch.lines) < BATCH_LINES and size + len(line) <= BATCH_BYTES and brackets + more <= BATCH_BRACKETS
        if batch.lines and (problem or not fits):
            yield batch
            batch, size, brackets = Batch([], []), 0, 0
        if problem:
            raise CommandError(f"line {number} {problem}")
        batch.numbers.append(number)
        batch.lines.append(line)
        size += len(line)
        brackets += more
    if batch.lines:
        yield batch


def _lines(source: BinaryIO) -> Iterator[bytes]:
    """The lines of a file without their ends; of one that is too long, more than LINE_BYTES of it."""
    while True:
        try:
            line = source.readline(LINE_BYTES + 2)
        except OSError as error:
            raise CommandError(f"the file cannot be read: {error.strerror}") from None
        if not line:
            return
        yield line.rstrip(b"\r\n")


def _problem(line: bytes) -> str | None:
    """What is wrong with a line that cannot be sent at all."""
    if len(line) > LINE_BYTES:
        return f"is longer than {LINE_BYTES} bytes"
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"is no JSON ({error}): is the file complete?"
    return None


async def send(open_connection: Opener, source: Iterator[Batch]) -> Imported:
    """Sends all batches; the counts of all answers together.

    Raises:
        CommandError: a line was refused.
        ClientError: no connection, or it is lost.
    """
    total = Imported(runs=0, events=0, outputs=0, skipped=0)
    async with open_connection() as connection:
        # Reading may wait for a pipe; the connection lives on meanwhile.
        while (batch := await beside(lambda: next(source, None))) is not None:
            params = {"lines": [Raw(line) for line in batch.lines]}
            try:
                # Files of outputs are read by it, so it may take long; a daemon that is gone shows by its pongs.
                answer = await connection.call("runs.import", params, result_type=Imported)
            except CallError as error:
                raise _refused(error, batch) from None
            total = Imported(
                runs=total.runs + answer.runs,
                events=total.events + answer.events,
                outputs=total.outputs + answer.outputs,
                skipped=total.skipped + answer.skipped,
            )
            progress(f"line {batch.numbers[-1]}: {total.runs} runs, {total.outputs} outputs")
    return total


def _refused(error: CallError, batch: Batch) -> Exception:
    """The daemon's error with the line of the file that it is about; itself where it is about none."""
    place = _PLACE.match(str(error.data.get("path", ""))) or _PLACE.search(error.message)
    if place is None and error.type != "limit_exceeded":
        return error
    if place is None:
        return CommandError(f"lines {batch.numbers[0]} to {batch.numbers[-1]}: {visible(error.message)}")
    number = batch.numbers[min(int(place[1]), len(batch.numbers) - 1)]
    return CommandError(f"line {number}: {visible(_PLACE.sub('', error.message, count=1))}")
