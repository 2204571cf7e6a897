"""Rows and what they mean: heads, entries and batches, from the tables."""

import sqlite3
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import uuid4

import msgspec
from msgspec import UNSET, Raw

from carserver.core.commands import Batch
from carserver.core.ports import Damaged, Deleted, Place, Scan
from carserver.core.runs import Entry, Head, LiveRun
from carserver.protocol.runs import LIVE, STATUSES, ListRuns, Recorded, Snapshot
from carserver.stores.lookups import find_by_index, find_row
from carserver.stores.schema import SEQUENCE_BITS, row_checksum

RUN_COLUMNS = (
    "no, id, owner, session_id, agent_id, parent_run_id, epoch, key_digest, created_at_ms,"
    " status, event_count, updated_at_ms, ended_at_ms, last_at_ms, revision, endings, log_bytes, turns"
)
_RUN_VALUES = len(RUN_COLUMNS.split(","))
_REVISION = RUN_COLUMNS.split(", ").index("revision")
TEXTS = (
    *("prompt", "outcome_description", "metadata", "result_text", "error", "cancel_reason", "interrupted_reason"),
    "outcome",
)
_HEADS = f"SELECT {RUN_COLUMNS}, runs.checksum, {', '.join(TEXTS)}, texts.checksum FROM runs LEFT JOIN texts USING (no)"  # noqa: S608 - constants
_LIVE_CODES = ", ".join(str(STATUSES.index(status)) for status in sorted(LIVE))
COPIED, RENEWED = "copied", "renewed"
"""Names in `meta`: of a copy that nobody used yet, and while its log is the one that it began itself: one value."""
STATUS_BITS = 4
"""Of an event's status column; above them is the place in RECORDS of its record."""
STATUS_MASK = (1 << STATUS_BITS) - 1
_checksummed = struct.Struct("<qqB").pack


class _EventType(msgspec.Struct):
    type: str


_event_type = msgspec.json.Decoder(_EventType)


def place(no: int, sequence: int) -> int:
    """The key of an event."""
    return (no << SEQUENCE_BITS) + sequence


def checksum(key: int, at_ms: int, status: int, event: bytes) -> int:
    """Of an event and of where it stands: a row that changed, or changed places, shows."""
    return zlib.crc32(event, zlib.crc32(_checksummed(key, at_ms, status)))


def entry_row(no: int, entry: Entry) -> tuple[Any, ...]:
    """An entry of the log with this number as a row of `events`."""
    key = place(no, entry.sequence)
    status = entry.status | entry.kind << STATUS_BITS
    return key, entry.timestamp_ms, status, checksum(key, entry.timestamp_ms, status, entry.raw), entry.raw


def run_row(head: Head) -> tuple[Any, ...]:
    """A head as a row of `runs`: the values of `RUN_COLUMNS`, and their checksum."""
    run = head.run
    values = (
        head.no,
        run.id,
        head.owner,
        run.session_id,
        run.agent_id,
        run.parent_run_id,
        run.epoch,
        head.key_digest,
        run.created_at_ms,
        STATUSES.index(run.status),
        run.event_count,
        run.updated_at_ms,
        run.ended_at_ms,
        head.last_at_ms,
        head.revision,
        head.endings,
        head.log_bytes,
        head.turns,
    )
    return (*values, row_checksum(*values))


def texts_of(head: Head) -> tuple[Any, ...]:
    """The values of `TEXTS`; they may be long, so they are compared, and their checksum is taken only to be stored."""
    return tuple(_text(head, name) for name in TEXTS)


def texts_row(head: Head) -> tuple[Any, ...]:
    """A head as a row of `texts`, with its checksum."""
    values = (head.no, *texts_of(head))
    return (*values, row_checksum(*values))


def _text(head: Head, name: str) -> Any:
    if name == "metadata":
        return bytes(head.run.metadata) if head.run.metadata else None
    return head.outcome if name == "outcome" else getattr(head.run, name)


def head_of(row: Sequence[Any]) -> Head:
    """A row of `_HEADS`.

    Raises:
        Damaged: it is not what was stored.
    """
    values, (stored, *texts, stored_of_texts) = row[:_RUN_VALUES], row[_RUN_VALUES:]
    no, id_ = values[:2]
    if row_checksum(*values) != stored or row_checksum(no, *texts) != stored_of_texts:
        raise Damaged(f"run {id_!r} is stored under number {no!r}, and its row is damaged")
    return head_from(values, texts)


def head_from(values: Sequence[Any], texts: Sequence[Any]) -> Head:
    """The values of `RUN_COLUMNS` and of `TEXTS` as a head."""
    no, id_, owner, session_id, agent_id, parent, epoch, key_digest, created, status, *rest = values
    count, updated, ended, last_at_ms, revision, endings, log_bytes, turns = rest
    prompt, description, metadata, result, error, cancel, interrupted, outcome = texts
    run = Snapshot(
        id=id_,
        session_id=session_id,
        agent_id=agent_id,
        status=STATUSES[status],
        prompt=prompt,
        created_at_ms=created,
        updated_at_ms=updated,
        result_text=result,
        error=error,
        cancel_reason=cancel,
        interrupted_reason=interrupted,
        event_count=count,
        parent_run_id=parent,
        metadata=UNSET if metadata is None else Raw(metadata),
        ended_at_ms=ended,
        outcome_description=description,
        epoch=epoch,
    )
    return Head(
        no=no,
        owner=owner,
        run=run,
        revision=revision,
        endings=endings,
        last_at_ms=last_at_ms,
        log_bytes=log_bytes,
        turns=turns,
        outcome=outcome,
        key_digest=key_digest,
    )


def read_head(connection: sqlite3.Connection, run_id: str) -> Head | None:
    """The head of a run; None if there is none."""
    row = find_by_index(connection, f"{_HEADS} WHERE id = ?", "sqlite_autoindex_runs_1", (run_id,))
    if row is None:
        return None
    head = head_of(row)
    if head.run.id != run_id:
        raise Damaged(f"the index of run ids is damaged: {run_id!r} leads to {head.run.id!r}")
    return head


def read_batch(connection: sqlite3.Connection, head: Head, batch_id: str) -> Batch | None:
    """What is kept of a batch of a run.

    Raises:
        Damaged: see `lookups.find_row`.
    """
    row = find_row(connection, "batches", (head.no, batch_id))
    if row is None:
        return None
    _, _, digest, first, count, status, _ = row
    answer = Recorded(
        run_id=head.run.id, first_sequence=first, count=count, cursor=first + count, status=STATUSES[status]
    )
    return Batch(batch_id, digest, answer)


def read_live(connection: sqlite3.Connection) -> list[LiveRun]:
    """The runs that are live.

    Raises:
        Damaged: the row of one is not what was stored.
    """
    rows = connection.execute(f"SELECT {RUN_COLUMNS}, checksum FROM runs WHERE status IN ({_LIVE_CODES})")  # noqa: S608 - constants
    found = []
    for *values, stored in rows:
        if row_checksum(*values) != stored:
            raise Damaged(f"run {values[1]!r} is stored under number {values[0]!r}, and its row is damaged")
        found.append(LiveRun(values[1], values[_REVISION]))
    return found


def mark_copied(connection: sqlite3.Connection) -> None:
    """Says of a file that is made of another one that its logs will go on by themselves: see `renew_epochs`."""
    connection.execute("REPLACE INTO meta VALUES (?, ?)", (COPIED, str(uuid4())))


def renew_epochs(connection: sqlite3.Connection) -> bool:
    """In a copy that is used for the first time, every log gets a new epoch; whether this is one.

    Its runs may be behind what viewers saw of them before: a cursor of theirs must not be taken for a place in what is
    recorded from now on. A damaged row stays as it is, to be found.
    """
    copied = read_meta(connection, COPIED)
    if copied is None:
        return False
    connection.create_function("row_checksum", -1, row_checksum, deterministic=True)
    renewed = RUN_COLUMNS.replace(" epoch,", " :fresh || '-' || no,")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(
        f"UPDATE runs SET epoch = :fresh || '-' || no, checksum = row_checksum({renewed})"  # noqa: S608 - constants
        f" WHERE checksum = row_checksum({RUN_COLUMNS})",
        {"fresh": str(uuid4())},
    )
    connection.execute("DELETE FROM meta WHERE name = ?", (COPIED,))
    connection.execute("REPLACE INTO meta VALUES (?, ?)", (RENEWED, copied))
    connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.execute("DELETE FROM meta WHERE name = ?", (RENEWED,))  # the same backup may be put in place again
    return True


def read_boot_id(connection: sqlite3.Connection) -> str | None:
    """Of the daemon that had the file last; None if it is new."""
    return read_meta(connection, "boot_id")


def read_meta(connection: sqlite3.Connection, name: str) -> str | None:
    """What the file says of itself under this name."""
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else row[0]


def read_entries(connection: sqlite3.Connection, head: Head, start: int, stop: int) -> Iterator[Entry]:
    """The log from `start` to before `stop`, row by row; close the iterator, or the reader holds back checkpoints.

    Raises:
        Damaged: an entry is missing, or not what was stored.
    """
    key = first = place(head.no, start)
    cursor = connection.execute(
        "SELECT place, at_ms, status, checksum, event FROM events WHERE place >= ? AND place < ? ORDER BY place",
        (first, place(head.no, stop)),
    )
    try:
        for found, at_ms, status, stored, event in cursor:
            if found != key or not _is_sound(found, at_ms, status, stored, event):
                break
            yield Entry(key - first + start, at_ms, status & STATUS_MASK, event, status >> STATUS_BITS)
            key += 1
    finally:
        cursor.close()
    if key - first + start < stop:
        sequence = key - first + start
        if connection.execute("SELECT 1 FROM runs WHERE no = ?", (head.no,)).fetchone() is None:
            raise Deleted(f"run {head.run.id!r} was deleted, and its log with it")
        raise Damaged(
            f"event {sequence} of run {head.run.id!r} is missing or damaged; the events before it can be read"
        )


def _is_sound(key: int, at_ms: Any, status: Any, stored: Any, event: Any) -> bool:
    """Whether a row is what was stored; damage may have changed the very types of its values."""
    try:
        return bool(checksum(key, at_ms, status, event) == stored)
    except (TypeError, struct.error):
        return False


def read_page(
    connection: sqlite3.Connection, head: Head, start: int, stop: int, entries: int, size: int
) -> list[Entry]:
    """A page of the log: at most `entries`, about `size` bytes, at least one entry.

    Raises:
        Damaged: its first entry is; where a later one is, the page ends before it.
    """
    page: list[Entry] = []
    taken = 0
    rows = read_entries(connection, head, start, min(stop, start + entries))
    try:
        for entry in rows:
            if page and taken + len(entry.raw) > size:
                break
            page.append(entry)
            taken += len(entry.raw)
    except Exception:
        if not page:
            raise
    finally:
        rows.close()  # type: ignore[attr-defined]  # a generator
    return page


def read_scan(
    connection: sqlite3.Connection,
    head: Head,
    start: int,
    stop: int,
    *,
    limit: int,
    types: Sequence[str] | None,
    page_bytes: int,
    scan_entries: int,
    scan_bytes: int,
) -> Scan:
    """Entries of `types` (None: all): at most `limit` and `page_bytes`; looks at `scan_entries` and `scan_bytes`.

    Raises:
        Damaged: the first entry looked at is.
    """
    wanted = None if types is None else frozenset(types)
    found: list[Entry] = []
    cursor, looked, taken = start, 0, 0
    rows = read_entries(connection, head, start, min(stop, start + scan_entries))
    try:
        for entry in rows:
            looked += len(entry.raw)
            if wanted is None or _event_type.decode(entry.raw).type in wanted:
                if found and taken + len(entry.raw) > page_bytes:
                    break
                found.append(entry)
                taken += len(entry.raw)
            cursor = entry.sequence + 1
            if len(found) >= limit or looked > scan_bytes:
                break
    except Exception:
        if cursor == start:
            raise
    finally:
        rows.close()  # type: ignore[attr-defined]  # a generator
    return Scan(found, cursor)


def read_list(
    connection: sqlite3.Connection,
    owner: str | None,
    filters: ListRuns,
    after: Place | None,
    limit: int,
    size: int,
) -> list[Head]:
    """Runs, newest first: at most `limit`, and no more than fill `size` bytes and show that there is another."""
    narrow = any(value is not None for value in (filters.session_id, filters.agent_id, filters.parent_run_id))
    terms: list[tuple[str, Any]] = [
        # The unary plus keeps the planner from the owner's index where a filter has a better one.
        ("+owner = ?" if narrow else "owner = ?", owner),
        ("session_id = ?", filters.session_id),
        ("agent_id = ?", filters.agent_id),
        ("parent_run_id = ?", filters.parent_run_id),
        ("status = ?", None if filters.status is None else STATUSES.index(filters.status)),
        ("created_at_ms > ?", filters.created_after_ms),
        ("created_at_ms < ?", filters.created_before_ms),
    ]
    given = [(term, value) for term, value in terms if value is not None]
    clauses = [term for term, _ in given]
    values = [value for _, value in given]
    if after is not None:
        clauses.append("(created_at_ms, no) < (?, ?)")
        values += [after.created_at_ms, after.no]
    where = f"WHERE {' AND '.join(clauses)}" if clauses else ""
    rows = connection.execute(f"{_HEADS} {where} ORDER BY created_at_ms DESC, no DESC LIMIT ?", (*values, limit))
    found: list[Head] = []
    taken = 0
    try:
        for row in rows:
            head = head_of(row)
            there = Place(head.run.created_at_ms, head.no)
            if after is not None and there >= after:
                raise Damaged("the order in which runs are stored is damaged")  # else a list might never end
            after = there
            found.append(head)
            taken += sum(len(value) for value in row if isinstance(value, str | bytes))  # less than the JSON will have
            if taken > size and len(found) > 1:
                break
    finally:
        rows.close()
    return found
