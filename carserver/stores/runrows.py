"""The runs of the writer's transaction: heads kept between commits, what commands store, runs that come and go.

The row of a head is written once per transaction, however many commands changed it. Everything here runs in the
writer's thread.
"""

import sqlite3
from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from carserver.config import Settings
from carserver.core.cache import SizedCache
from carserver.core.commands import Applied, Command
from carserver.core.edits import Change, End
from carserver.core.runs import CODES, Entry, Head
from carserver.protocol.errors import not_found
from carserver.stores.rows import (
    RUN_COLUMNS,
    TEXTS,
    entry_row,
    read_batch,
    read_entries,
    read_head,
    run_row,
    texts_of,
    texts_row,
)
from carserver.stores.schema import row_checksum

_LAST_NO = (
    "SELECT max(coalesce((SELECT max(no) FROM runs), 0), coalesce((SELECT value + 0 FROM meta WHERE name = 'no'), 0))"
)
BEFORE_ALL = End(-1, -1)
"""A place before that of every run that is over."""


class RunRows:
    """Implements `core.edits.StoredRuns`.

    Args:
        connection: The one that writes.
        settings: `writer_heads`, `writer_heads_bytes`.
    """

    def __init__(self, connection: sqlite3.Connection, settings: Settings) -> None:
        self._connection = connection
        self._heads: SizedCache[str, Head] = SizedCache(settings.writer_heads, settings.writer_heads_bytes)
        self._stored: dict[str, Head] = {}  # the heads that this transaction changed, as their rows are
        self._new: dict[str, Head] = {}  # and as their rows will be
        self._moved: list[str] = []  # the runs that its edits added or removed
        self.dropped = False  # since the sweep was last told
        self.appended = 0  # events, in all
        self._last_no: int = connection.execute(_LAST_NO).fetchone()[0]

    # The transaction.

    def flush(self) -> None:
        """The rows of all heads that changed."""
        for run_id, head in self._new.items():
            self._write_head(self._stored[run_id], head)
            self._stored[run_id] = head

    def committed(self) -> None:
        """What was written is durable."""
        for run_id, head in self._new.items():
            self._heads.put(run_id, head, head.size)
        self._stored.clear()
        self._new.clear()
        self._moved.clear()

    def undone(self) -> None:
        """Nothing of the transaction is left. The numbers that it gave out are not used again."""
        for run_id in self._stored:
            self._heads.pop(run_id)
        self.forget_moved()
        self._stored.clear()
        self._new.clear()
        self._moved.clear()

    # Commands.

    def head(self, run_id: str) -> Head | None:
        """See `core.edits.StoredRuns`."""
        head = self._new.get(run_id) or self._heads.get(run_id)
        if head is None:
            head = read_head(self._connection, run_id)
            if head is not None:
                self._heads.put(run_id, head, head.size)
        return head

    def applied(self, command: Command, head: Head | None) -> Applied:
        """What a command comes to, on a run whose head is `head`. Nothing is written yet.

        Raises:
            RpcError: its refusal.
        """
        batch_id = command.batch_id
        prior = read_batch(self._connection, head, batch_id) if batch_id is not None and head is not None else None
        return command.apply(head, prior)

    def write(self, applied: Applied, before: Head | None) -> Applied:
        """The rows of one command, but for its head's; the head has its number after it."""
        head = applied.head
        if before is None:
            head = replace(head, no=self.new_no())
            applied = applied._replace(head=head)
            self._insert(head)
        if applied.entries:
            self.append(head.no, applied.entries)
        if applied.batch is not None:
            batch_id, digest, answer = applied.batch
            values = (head.no, batch_id, digest, answer.first_sequence, answer.count, CODES[answer.status])
            self._connection.execute(
                "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?)", (*values, row_checksum(*values))
            )
        return applied

    def changed(self, head: Head, before: Head | None) -> None:
        """A command was written: its run's head from now on."""
        self._stored.setdefault(head.run.id, before or head)
        self._new[head.run.id] = head

    def apply(self, command: Command) -> Change:
        """See `core.edits.StoredRuns`. The head is as it was until the writer calls `changed` for it."""
        before = self.head(command.run_id)
        if before is None:
            raise not_found("run", command.run_id)
        applied = self.applied(command, before)
        return Change(command, applied if applied.head is before else self.write(applied, before), before)

    def _insert(self, head: Head) -> None:
        row = run_row(head)
        marks = ", ".join("?" * len(row))
        self._connection.execute(f"INSERT INTO runs ({RUN_COLUMNS}, checksum) VALUES ({marks})", row)  # noqa: S608 - constants
        self._write_texts(head)

    def _write_head(self, stored: Head, head: Head) -> None:
        if head is stored:
            return  # created in this transaction, and no more
        # What changes stands at the end of the row.
        row = run_row(head)
        self._connection.execute(
            "UPDATE runs SET status = ?, event_count = ?, updated_at_ms = ?, ended_at_ms = ?, last_at_ms = ?,"
            " revision = ?, endings = ?, log_bytes = ?, turns = ?, checksum = ? WHERE no = ?",
            (*row[-10:], head.no),
        )
        if texts_of(stored) != texts_of(head):
            self._write_texts(head)

    def _write_texts(self, head: Head) -> None:
        row = texts_row(head)
        columns = f"no, {', '.join(TEXTS)}, checksum"
        self._connection.execute(f"REPLACE INTO texts ({columns}) VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608 - constants

    # Edits. What these change is flushed before, so that undoing one leaves what came before it.

    def new_no(self) -> int:
        """See `core.edits.StoredRuns`."""
        self._last_no += 1
        return self._last_no

    def append(self, no: int, entries: Sequence[Entry]) -> None:
        """See `core.edits.StoredRuns`."""
        self._connection.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?)", [entry_row(no, entry) for entry in entries]
        )
        self.appended += len(entries)

    def entries(self, head: Head, start: int, stop: int) -> Iterator[Entry]:
        """See `core.edits.StoredRuns`."""
        return read_entries(self._connection, head, start, stop)

    def ended(self, after: End | None, until: End, limit: int) -> Sequence[tuple[str, End]]:
        """See `core.edits.StoredRuns`."""
        rows = self._connection.execute(
            "SELECT id, ended_at_ms, no FROM runs WHERE ended_at_ms IS NOT NULL"
            " AND (ended_at_ms, no) > (?, ?) AND (ended_at_ms, no) <= (?, ?) ORDER BY ended_at_ms, no LIMIT ?",
            (*(after or BEFORE_ALL), *until, limit),
        )
        return [(run_id, End(ended_at_ms, no)) for run_id, ended_at_ms, no in rows.fetchall()]

    def add(self, head: Head) -> Head:
        """See `core.edits.StoredRuns`."""
        self._moved.append(head.run.id)
        self._insert(head)
        return head

    def forget_moved(self) -> None:
        """An edit was undone: what was read of the runs that it moved is void."""
        for run_id in self._moved:
            self._heads.pop(run_id)

    def remove(self, head: Head) -> None:
        """See `core.edits.StoredRuns`."""
        self._moved.append(head.run.id)
        self._new.pop(head.run.id, None)
        self._stored.pop(head.run.id, None)
        self._heads.pop(head.run.id)
        execute = self._connection.execute
        execute("DELETE FROM runs WHERE no = ?", (head.no,))
        execute("DELETE FROM texts WHERE no = ?", (head.no,))
        # Its id may be used again, by a run that these handles are not of.
        execute("DELETE FROM handles WHERE run_id = ?", (head.run.id,))
        execute("DELETE FROM receipts WHERE no = ?", (head.no,))
        self.drop_log(head.no)

    def drop_log(self, no: int) -> None:
        """The events of this number belong to no run any more: `sweep` removes them, and the number is used up."""
        self.dropped = True
        self._connection.execute("INSERT INTO dropped VALUES (?)", (no,))
        self.use_up()

    def use_up(self) -> None:
        """The numbers given out so far are used up, whether runs have them or not."""
        self._connection.execute("REPLACE INTO meta VALUES ('no', ?)", (str(self._last_no),))
