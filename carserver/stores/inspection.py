"""Is a database file what was written? Looked at before it is opened for writing, and never changed by looking.

What costs little is looked at always: the sizes, the schema, the end of the write-ahead log. The whole structure, and
the rows beside the events, only where the file is small, or where damage was met before: then the events, too.
"""

import contextlib
import logging
import os
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from carserver.core.ports import Damaged
from carserver.stores.damage import Unreadable
from carserver.stores.former import CHECKED, FormerHeads
from carserver.stores.outputs import output_of
from carserver.stores.rows import COPIED, RENEWED, read_entries, read_meta
from carserver.stores.schema import (
    DamagedFile,
    StorageError,
    cannot_open,
    check_version,
    open_reader,
    row_checksum,
    schema_of,
    stored_schema,
)

log = logging.getLogger("carserver.storage")

# https://www.sqlite.org/fileformat2.html#the_write_ahead_log and https://www.sqlite.org/walformat.html
_LOG_HEADER = struct.Struct(">6I 2I")  # magic, version, page size, number, two salts; checksum
_FRAME = struct.Struct(">2I 2I 2I")  # page, size of the database after a commit or 0; two salts; checksum
_LOG_MAGICS = {0x377F0682: "<6I", 0x377F0683: ">6I"}  # and in which order its checksums take the bytes
_INDEX_HEADER = struct.Struct("=3I BBH I")  # of the log's index; the last is the last page of the last commit
_WORD = 0xFFFFFFFF
LEAST_BYTES = 512
"""Of a database: no page is smaller."""
MAY_RUN_TWICE = "a tool that was called before, and is called again now with the same key, may run twice"
"""What is said where keys may be missing."""
_TABLES = ("runs", "texts", "batches", "handles", "tool_keys", "receipts", "approvals")  # whose rows have a checksum
_NUMBERS = (
    ("SELECT max(no) FROM dropped", "SELECT value + 0 FROM meta WHERE name = 'no'"),
    ("SELECT max(no) FROM outputs", "SELECT seq FROM sqlite_sequence WHERE name = 'outputs'"),
)


def beside(path: Path, suffix: str) -> Path:
    """A file that belongs to the database: `-wal`, `-shm`."""
    return path.with_name(f"{path.name}{suffix}")


def size_of(path: Path) -> int:
    """In bytes; 0 where there is no file. Never opens it: closing would drop SQLite's locks."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def without_trace(path: Path) -> Iterator[None]:
    """A reader, while it is the only one, makes files beside the database: afterwards there are those that were."""
    made = [file for file in (beside(path, "-wal"), beside(path, "-shm")) if not file.exists()]
    try:
        yield
    finally:
        for file in made:
            file.unlink(missing_ok=True)


def inspect(path: Path, check_bytes: int, *, thorough: bool) -> None:
    """Looks at the database before anybody has it open.

    Args:
        path: The file; it need not be there.
        check_bytes: Up to this size, the structure and the rows beside the events are looked at.
        thorough: All is looked at, the events too, whatever the size.

    Raises:
        DamagedFile: it is not what was written.
        StorageError: it is none of ours, or newer, or cannot be read.
    """
    log_bytes = size_of(beside(path, "-wal"))
    if size_of(path) < LEAST_BYTES:  # SQLite must not see it: it would take it for new, and remove the log beside it
        if log_bytes or size_of(path):
            raise DamagedFile(f"it has {size_of(path)} bytes, and its write-ahead log {log_bytes}")
        if path.exists():
            log.error("%s is empty, as if it had been cut off; starting with no runs; %s", path, MAY_RUN_TWICE)
        return
    try:
        with without_trace(path):
            if log_bytes:
                _look_at_origin(path)
            with contextlib.closing(open_reader(path)) as connection:
                _look(connection, path, whole=thorough or size_of(path) <= check_bytes, events=thorough)
            if log_bytes:
                _look_at_log(path)
    except Damaged as error:
        raise DamagedFile(error.message) from error
    except (*Unreadable, OSError) as error:
        raise cannot_open(path, error) from error


def _look(connection: sqlite3.Connection, path: Path, *, whole: bool, events: bool) -> None:
    version = check_version(connection, path)
    if not version:
        return
    found = stored_schema(connection)
    for name, sql in schema_of(version).items():
        if found.get(name, "") != sql:
            raise DamagedFile(f"its {name!r} is not as schema version {version} has it")
    if not size_of(beside(path, "-wal")):
        _look_at_size(connection, path)
    if whole:
        for (problem,) in connection.execute("PRAGMA integrity_check(1)"):
            if problem != "ok":
                raise DamagedFile(" ".join(problem.split()))
    if version >= CHECKED:
        _look_at_numbers(connection)
        if whole:
            _look_at_rows(connection, [table for table in _TABLES if table in found])
        if events:
            _look_at_events(connection, FormerHeads(version))


def _look_at_size(connection: sqlite3.Connection, path: Path) -> None:
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
    if pages * page_bytes != size_of(path):
        raise DamagedFile(f"it has {size_of(path)} bytes, and says that it has {pages} pages of {page_bytes}")


# The rows.


def _look_at_numbers(connection: sqlite3.Connection) -> None:
    """What a start reads, beside the live runs, and what would do harm if it were wrong."""
    for query in ("SELECT * FROM meta", "SELECT max(no) FROM runs"):
        connection.execute(query).fetchall()
    for table in ("dropped", "imports"):  # the sweep would remove the log of a run that is there
        if connection.execute(f"SELECT 1 FROM {table} CROSS JOIN runs USING (no)").fetchone():  # noqa: S608 - constants
            raise DamagedFile(f"a run that is there is among {table!r}")
    for last, said in _NUMBERS:
        if connection.execute(f"SELECT ({last}) > ({said})").fetchone()[0]:
            raise DamagedFile("a number that was given out would be given out again")


def _look_at_rows(connection: sqlite3.Connection, tables: Sequence[str]) -> None:
    for table in tables:
        for row in connection.execute(f"SELECT {_checksum_last(connection, table)} FROM {table}"):  # noqa: S608 - constants
            if row_checksum(*row[:-1]) != row[-1]:
                raise DamagedFile(f"a row of {table!r}, at {row[0]!r}, is not what was stored")
    if connection.execute("SELECT 1 FROM runs WHERE no NOT IN (SELECT no FROM texts)").fetchone():
        raise DamagedFile("the texts of a run are missing")
    for row in connection.execute("SELECT * FROM outputs"):
        output_of(row)


def _checksum_last(connection: sqlite3.Connection, table: str) -> str:
    """The columns of a table, in the order that its checksums take them: some were added behind the checksum's."""
    names = [name for (name,) in connection.execute("SELECT name FROM pragma_table_info(?)", (table,))]
    return ", ".join([*(name for name in names if name != "checksum"), "checksum"])


def _look_at_events(connection: sqlite3.Connection, heads: FormerHeads) -> None:
    for row in connection.execute(f"{heads.query} ORDER BY no"):
        head = heads.head(row)
        for _ in read_entries(connection, head, 0, head.cursor):
            pass


# The end of the write-ahead log. SQLite reads it up to the first page that is not whole, and says nothing of the rest.


class Frames(NamedTuple):
    """How many pages the log has, by what they themselves say, and which of them end a transaction."""

    last: int
    commits: list[int]


def frames_of(log_path: Path) -> Frames | None:
    """The pages of a write-ahead log; None where its own header is not whole."""
    with log_path.open("rb", buffering=0) as file:
        header = file.read(_LOG_HEADER.size)
        if len(header) < _LOG_HEADER.size:
            return Frames(0, [])  # not even begun
        magic, _, page_bytes, _, salt0, salt1, sum0, sum1 = _LOG_HEADER.unpack(header)
        if _checksum_of(magic, header) != (sum0, sum1):
            return None
        last, commits = 0, []
        stride = _FRAME.size + page_bytes
        offsets = range(_LOG_HEADER.size, size_of(log_path) - stride + 1, stride)
        for number, offset in enumerate(offsets, 1):  # a log may have a million
            _, committed, found0, found1, _, _ = _FRAME.unpack(os.pread(file.fileno(), _FRAME.size, offset))
            if (found0, found1) == (salt0, salt1):  # others are of an earlier log, which this one overwrites
                last = number
                if committed:
                    commits.append(number)
    return Frames(last, commits)


def _checksum_of(magic: int, header: bytes) -> tuple[int, int] | None:
    if magic not in _LOG_MAGICS:
        return None
    words = struct.unpack_from(_LOG_MAGICS[magic], header)
    first = second = 0
    for n in range(0, len(words), 2):
        first = (first + words[n] + second) & _WORD
        second = (second + words[n + 1] + first) & _WORD
    return first, second


def _look_at_log(path: Path) -> None:
    frames = frames_of(beside(path, "-wal"))
    if frames is None:
        raise DamagedFile("the header of its write-ahead log is damaged")
    taken = _taken_frames(path)
    if taken >= frames.last:
        return
    later = [number for number in frames.commits if number > taken]
    # Each transaction is on disk before the next one begins, so only the last can be torn: by a power cut, or a kill.
    if later and later[0] < frames.last:
        raise DamagedFile(f"its write-ahead log is damaged at page {taken + 1} of {frames.last}, or soon after it")
    log.warning(
        "the write-ahead log of %s ends in a transaction that is not whole, and so is not there: a kill or a power cut"
        " leaves that, and then it was never acknowledged; if there was neither, is the disk failing?",
        path,
    )


def _look_at_origin(path: Path) -> None:
    """Whether the log beside a copy was begun by it, or by the database that was there before: the two would be mixed.

    Raises:
        StorageError: by the latter. Nothing was changed.
    """
    alone = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)  # without its log
    copied = renewed = None
    with contextlib.closing(alone), contextlib.suppress(*Unreadable):  # a kill during a checkpoint leaves anything
        copied = read_meta(alone, COPIED)
    if copied is None:
        return
    with contextlib.suppress(*Unreadable), contextlib.closing(open_reader(path)) as connection:
        renewed = read_meta(connection, RENEWED)
    if renewed != copied and _taken_frames(path):
        names = " and ".join(beside(path, suffix).name for suffix in ("-wal", "-shm"))
        raise StorageError(
            f"{path} is a copy that was put in place, and the log beside it is of the database that was there before:"
            f" move {names} away, and start again"
        )


def _taken_frames(path: Path) -> int:
    """The last page of the log that SQLite took when it read it just now."""
    with beside(path, "-shm").open("rb") as file:  # nobody has it open: there is no lock to lose
        header = file.read(_INDEX_HEADER.size)
    return int(_INDEX_HEADER.unpack(header)[-1])
