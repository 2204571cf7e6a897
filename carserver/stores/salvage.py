"""What can be trusted of a damaged database, copied into a new one.

A run is carried over whole, with its number, or not at all: its row and its texts, every event of its log and all that
is kept of its batches must have the checksum they were stored with. So must an output, an open handle, the key of a
tool call, a receipt and an approval, each by itself. A tree of the file may be broken: numbers are read by ranges, and
a range that fails is halved until what cannot be read is skipped. The source is never changed.
"""

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from carserver.core.ports import Damaged
from carserver.core.runs import Head
from carserver.protocol.runs import Snapshot
from carserver.stores.damage import Unreadable, in_words
from carserver.stores.former import CHECKED, TURNED, FormerHeads
from carserver.stores.inspection import LEAST_BYTES, size_of, without_trace
from carserver.stores.outputs import output_of
from carserver.stores.rows import (
    RUN_COLUMNS,
    TEXTS,
    entry_row,
    mark_copied,
    read_entries,
    run_row,
    texts_row,
)
from carserver.stores.schema import SEQUENCE_BITS, VERSION, open_new, row_checksum

log = logging.getLogger("carserver.storage")

# What a row may do to whoever reads it; where the schema itself is damaged, it has not even its columns.
_MALFORMED = (Damaged, msgspec.MsgspecError, LookupError, TypeError, ValueError)
_FAILURES = 100_000  # reads that may fail before the rest of a table is given up
_COMMIT_ROWS = 50_000
_HANDLES, _RECEIPTS = 3, 4  # the schema versions from which on there are rows of these
_PROGRESS_S = 5.0
_NUMBERS = 1 << (63 - SEQUENCE_BITS)  # a greater one cannot be: the keys of its events would not fit
_BATCHES = "SELECT no, batch_id, digest, first_sequence, count, status, {} FROM batches WHERE no = ?"
_RUN_NUMBERS = (
    "SELECT max(no) FROM texts",
    f"SELECT max(place) >> {SEQUENCE_BITS} FROM events",  # noqa: S608 - a constant
    "SELECT value + 0 FROM meta WHERE name = 'no'",
)
_OUTPUT_NUMBERS = ("SELECT seq FROM sqlite_sequence WHERE name = 'outputs'",)


_DISK = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_BUSY}  # primary codes


class _NotWhole(Exception):
    """This much of the source cannot be read, or is not what was stored."""


def _not_the_disk(error: Exception) -> None:
    """A read failed: what the disk did not give this time is not lost, and must not be left behind for that.

    Raises:
        OSError: it is the disk.
    """
    code = getattr(error, "sqlite_errorcode", 0)
    if code & 0xFF in _DISK and code != sqlite3.SQLITE_IOERR_SHORT_READ:
        raise OSError(f"it cannot be read now: {error}; see that its disk works") from error


def _open_damaged(path: Path) -> sqlite3.Connection:
    """A connection that only reads, and reads on where the file is shorter than it says, or a name is damaged."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    connection.execute("PRAGMA query_only = 1")
    connection.execute("PRAGMA writable_schema = 1")
    connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
    return connection


class Salvage:
    """One carrying over; its time grows with the file, and with nothing else.

    Args:
        source: The damaged file, which nobody has open.
    """

    def __init__(self, source: Path) -> None:
        self._path = source
        self._rows = 0  # since the last commit
        self._next_s = time.monotonic() + _PROGRESS_S
        self.runs = 0
        self.events = 0
        self.outputs = 0
        self.lost: list[str] = []  # runs that are not whole: their ids, where these can be read, or numbers
        self.lost_outputs = 0
        self.unreadable = ""  # why no run at all could be read
        self.forgotten = False  # some batches of runs that are carried over may be missing
        self.unclosed = False  # some open handles of such runs may be missing
        self.forgotten_keys = True  # some keys of tool calls may be missing
        self.forgotten_receipts = False  # some receipts of runs that are carried over may be missing
        self.forgotten_approvals = True  # some approvals may be missing

    def into(self, target: Path) -> None:
        """Makes `target` of what can be trusted; it is complete, and not yet synced, after that.

        Raises:
            sqlite3.Error, OSError: the target cannot be written, or the disk does not give what the source has.
        """
        with without_trace(self._path), contextlib.closing(open_new(target)) as self._target:
            if size_of(self._path) < LEAST_BYTES:
                self.unreadable = "there is hardly anything of it"
                return
            try:
                self._source = _open_damaged(self._path)
            except Unreadable as error:
                self.unreadable = in_words(error)
                return
            with contextlib.closing(self._source):
                self._target.execute("BEGIN")
                try:
                    self._carry()
                except _MALFORMED:  # damage of a kind that nobody has thought of: the daemon starts all the same
                    log.exception("not all of %s could be looked at", self._path)
                    self.lost.append("all that come after these")
                mark_copied(self._target)
                self._target.execute("COMMIT")

    def _carry(self) -> None:
        columns = {name for (name,) in self._all("SELECT name FROM pragma_table_info('runs')")}
        version = TURNED if "turns" in columns else CHECKED if "checksum" in columns else 1
        self._checked = version >= CHECKED
        self._heads = FormerHeads(version)
        self._carry_meta(self._carry_runs())
        self.forgotten = bool(self.runs) and not self._has_all("batches", checked=self._checked)
        self._carry_outputs()
        self._carry_handles()
        self._carry_receipts()

    # Runs.

    def _carry_runs(self) -> int:
        """All that are whole; the highest number that any run had."""
        carried: set[int] = set()
        found = sorted({*self._numbers("runs"), *self._numbers("texts")})
        for no in found:
            try:
                self._carry_run(no)
                carried.add(no)
            except _NotWhole:
                pass
            self._progress(len(found))
        # The index of ids knows of runs whose rows cannot be read, and what they were called.
        every = self._all("SELECT no, id FROM runs INDEXED BY sqlite_autoindex_runs_1")
        ids = {no: run_id for no, run_id in every if isinstance(no, int)}
        for no in sorted({*found, *ids} - carried):
            self.lost.append(repr(ids[no]) if no in ids else self._name(no))
        if not (self.runs or self.lost):  # there were none, or nobody can tell
            try:
                self._source.execute("SELECT no FROM runs").fetchone()
            except Unreadable as error:
                self.unreadable = in_words(error)
        return max((no for no in found if no < _NUMBERS), default=0)

    def _carry_run(self, no: int) -> None:
        head = self._head(no)
        self._target.execute("SAVEPOINT run")
        try:
            events, size = self._copy_events(head)
            if not self._checked:
                head = replace(head, log_bytes=size)
            self._insert(f"runs ({RUN_COLUMNS}, checksum)", [run_row(head)])
            self._insert(f"texts (no, {', '.join(TEXTS)}, checksum)", [texts_row(head)])
            self._insert("batches", self._batches(head))
        except (_NotWhole, sqlite3.IntegrityError, *_MALFORMED) as error:  # two rows with one id: neither is trusted
            self._target.execute("ROLLBACK TO run")
            raise _NotWhole from error
        finally:
            self._target.execute("RELEASE run")
        self.runs += 1
        self.events += events
        self._rows += events + 2

    def _head(self, no: int) -> Head:
        row = self._one(f"{self._heads.query} WHERE no = ?", (no,))
        try:
            head = self._heads.head(row)
            if not self._checked:  # that its values have their types is all that can be told
                msgspec.json.decode(head.run.metadata or b"null")
                msgspec.json.decode(msgspec.json.encode(head.run), type=Snapshot)
        except _MALFORMED as error:
            raise _NotWhole from error
        return head

    def _copy_events(self, head: Head) -> tuple[int, int]:
        """How many these were, and their bytes."""
        count = size = 0

        def entries() -> Iterator[tuple[Any, ...]]:
            nonlocal count, size
            try:
                for entry in read_entries(self._source, head, 0, head.cursor):
                    yield entry_row(head.no, entry)
                    count += 1
                    size += len(entry.raw)
            except (*Unreadable, Damaged) as error:
                _not_the_disk(error)
                raise _NotWhole from error

        if head.cursor:
            self._target.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", entries())
        return count, size

    def _batches(self, head: Head) -> list[tuple[Any, ...]]:
        found = []
        query = _BATCHES.format("checksum" if self._checked else "NULL")
        try:
            for *values, stored in self._source.execute(query, (head.no,)):
                computed = row_checksum(*values)
                if stored not in (computed, None) or values[3] + values[4] > head.cursor:
                    raise _NotWhole
                found.append((*values, computed))
        except (*Unreadable, TypeError) as error:
            _not_the_disk(error)
            raise _NotWhole from error
        return found

    def _has_all(self, table: str, *, checked: bool = True) -> bool:
        """Whether none of its rows can be missing: how many there were is written nowhere else."""
        try:
            if self._one(f"PRAGMA integrity_check({table})", ()) != ("ok",):
                return False
            every = self._source.execute(f"SELECT * FROM {table}")  # noqa: S608 - a constant
            return not checked or all(row_checksum(*row[:-1]) == row[-1] for row in every)
        except (*Unreadable, _NotWhole) as error:
            _not_the_disk(error)
            return False

    def _name(self, no: int) -> str:
        try:
            return repr(self._one("SELECT id FROM runs WHERE no = ?", (no,))[0])
        except _NotWhole:
            return f"the one with number {no}"

    # What is beside them.

    def _carry_meta(self, highest: int) -> None:
        """The boot before, and a number that no run, not even a lost or a deleted one, had."""
        for name, value in self._all("SELECT name, value FROM meta"):
            if name == "boot_id":
                self._insert("meta", [(name, value)])
            elif name == "no" and str(value).isdecimal() and int(value) < _NUMBERS:
                highest = max(highest, int(value))
        self._insert("meta", [("no", str(highest))])

    def _carry_outputs(self) -> None:
        """All that are whole, but those of a run that is not carried over."""
        for no in self._numbers("outputs"):
            try:
                self._carry_output(no)
                self.outputs += 1
                self._rows += 1
            except (_NotWhole, sqlite3.IntegrityError):
                self.lost_outputs += 1
            self._progress(0)
        for (last,) in self._all("SELECT seq FROM sqlite_sequence WHERE name = 'outputs'"):
            if not isinstance(last, int) or last >= _NUMBERS:
                continue
            self._target.execute("DELETE FROM sqlite_sequence WHERE name = 'outputs' AND seq < ?", (last,))
            self._target.execute(
                "INSERT INTO sqlite_sequence SELECT 'outputs', ?"
                " WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'outputs')",
                (last,),
            )

    def _carry_output(self, no: int) -> None:
        row = self._one("SELECT * FROM outputs WHERE no = ?", (no,))
        try:
            run_id = output_of(row).record.run_id
        except _MALFORMED as error:
            raise _NotWhole from error
        if (
            isinstance(run_id, str)
            and not self._target.execute("SELECT 1 FROM runs WHERE id = ?", (run_id,)).fetchone()
        ):
            raise _NotWhole
        self._insert("outputs", [row])

    def _carry_handles(self) -> None:
        """Keys of tool calls; and the handles that are open in the log of a run that is carried over.

        These are closed by the start that follows.
        """
        if self._is_before(_HANDLES, "tool_keys"):
            self.forgotten_keys = False
            return
        runs = "SELECT 1 FROM runs WHERE id = ?"
        whole = self._carry_rows("handles", ("handle",), lambda row: any(self._target.execute(runs, (row[1],))))
        self.unclosed = bool(self.runs) and not whole
        self.forgotten_keys = not self._carry_rows("tool_keys", ("owner", "method", "key"), lambda _: True)

    def _carry_receipts(self) -> None:
        """Receipts of cancels of the runs that are carried over; and approvals."""
        if self._is_before(_RECEIPTS, "receipts"):
            self.forgotten_approvals = False
            return
        runs = "SELECT 1 FROM runs WHERE no = ?"
        whole = self._carry_rows("receipts", ("owner", "key"), lambda row: any(self._target.execute(runs, (row[2],))))
        self.forgotten_receipts = bool(self.runs) and not whole
        self.forgotten_approvals = not self._carry_rows("approvals", ("id",), lambda _: True)

    def _is_before(self, version: int, table: str) -> bool:
        """Whether the file is older than this version of the schema, which brought this table."""
        (said,) = next(self._all("PRAGMA user_version"), (VERSION,))
        return 0 < said < version and not any(self._all(f"SELECT 1 FROM pragma_table_info('{table}')"))  # noqa: S608 - constants

    def _carry_rows(self, table: str, key: Sequence[str], wanted: Callable[[Sequence[Any]], bool]) -> bool:
        """Rows that end in their checksum, and have it; whether none of them can be missing."""
        columns = len(self._target.execute("SELECT 1 FROM pragma_table_info(?)", (table,)).fetchall())
        whole = self._has_all(table)
        # What cannot be read is passed by on the way from the other end.
        for order in ("", " DESC")[: 1 if whole else 2]:
            by = ", ".join(f"{column}{order}" for column in key)
            for row in self._all(f"SELECT * FROM {table} ORDER BY {by}"):  # noqa: S608 - constants
                if len(row) == columns and row_checksum(*row[:-1]) == row[-1] and wanted(row):
                    self._insert(table, [row], "OR IGNORE")
                    self._rows += 1
                self._progress(0)
        return whole

    # Reading what may be broken, and writing what is not.

    def _numbers(self, table: str) -> Iterator[int]:
        """The keys of a table, as far as they can be read: a range that fails is halved, a single one skipped."""
        query = f"SELECT no FROM {table} WHERE no >= ? AND no < ? ORDER BY no"  # noqa: S608 - a constant
        spans = [(0, self._highest(table) + 1)]
        failures = 0
        while spans and failures < _FAILURES:
            low, high = spans.pop()
            try:
                for (no,) in self._source.execute(query, (low, high)):
                    if isinstance(no, int):  # by a damaged schema it may be anything
                        low = no + 1
                        yield no
            except Unreadable as error:
                _not_the_disk(error)
                failures += 1
                if high - low > 1:
                    middle = (low + high) // 2
                    spans += [(middle, high), (low, middle)]

    def _highest(self, table: str) -> int:
        """The highest number that this table may have, by whatever still can be asked."""
        others = _OUTPUT_NUMBERS if table == "outputs" else _RUN_NUMBERS
        queries = (f"SELECT max(no) FROM {table}", *others)  # noqa: S608 - a constant
        found = [row[0] for query in queries for row in self._all(query)]
        return max((no for no in found if isinstance(no, int) and no < _NUMBERS), default=0)

    def _all(self, query: str) -> Iterator[tuple[Any, ...]]:
        """Rows, up to where they cannot be read."""
        try:
            yield from self._source.execute(query)
        except Unreadable as error:
            _not_the_disk(error)

    def _one(self, query: str, values: Sequence[Any]) -> tuple[Any, ...]:
        try:
            row: tuple[Any, ...] | None = self._source.execute(query, values).fetchone()
        except Unreadable as error:
            _not_the_disk(error)
            raise _NotWhole from error
        if row is None:
            raise _NotWhole
        return row

    def _insert(self, table: str, rows: Sequence[Sequence[Any]], or_else: str = "") -> None:
        for row in rows:
            self._target.execute(f"INSERT {or_else} INTO {table} VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608 - constants

    def _progress(self, found: int) -> None:
        if self._rows >= _COMMIT_ROWS:
            self._target.execute("COMMIT")
            self._target.execute("BEGIN")
            self._rows = 0
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _PROGRESS_S
            log.info("carried over %d runs so far, of at most %d, and %d outputs", self.runs, found, self.outputs)
