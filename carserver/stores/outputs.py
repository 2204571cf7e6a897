"""Outputs as rows: what the writer's transaction adds and removes, and what the readers find.

The value of inline content is the last column: SQLite reads it only where it is asked for, so a page of a list does not
read what it leaves out. It has a checksum of its own, which the checksum of all other columns includes.
"""

import sqlite3
import zlib
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Raw
from msgspec.structs import replace

from carserver.core.edits import Removed
from carserver.core.outputs import Body, Fingerprint, Listed, Output, content_of, with_content
from carserver.core.ports import Damaged
from carserver.core.principals import HOST, Principal
from carserver.protocol.codec import encode
from carserver.protocol.outputs import Artifact, Inline, LatestOutput, ListOutputs, OutputEvent, OutputRecord
from carserver.stores.lookups import find_by_index
from carserver.stores.schema import row_checksum

_COLUMNS = (
    "no, id, owner, task_id, attempt, producer_agent, artifact, run_id, created_at_ms, key, key_digest, event,"
    " parent_refs, size, sha256, flags, fingerprint, value_checksum, checksum"
)
_UTF8, _PRIVATE = 1, 2  # what `flags` says: of the content, and of who sees it; NULL is neither
# A value that is damaged is not taken for private: it is not passed over, but met, and said.
_NOT_ANOTHERS = f"(flags IS NULL OR flags NOT IN ({_PRIVATE}, {_PRIVATE | _UTF8}) OR owner = ?)"
_WHOLE = f"SELECT {_COLUMNS}, value FROM outputs"  # noqa: S608 - constants
_LISTED = f"SELECT {_COLUMNS}, CASE WHEN size <= ? THEN value END FROM outputs"  # noqa: S608 - constants
_INSERT = f"INSERT INTO outputs ({_COLUMNS}, value) VALUES ({', '.join('?' * 20)})"  # noqa: S608 - constants

_event_decoder = msgspec.json.Decoder(OutputEvent)
_refs_decoder = msgspec.json.Decoder(list[str])
_fingerprint_decoder = msgspec.json.Decoder(Fingerprint)


class OutputRows:
    """Implements `core.edits.StoredOutputs`; used in the writer's thread alone."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        # A number is used once, so that a page of a list goes on where it was whatever was deleted meanwhile.
        last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outputs'").fetchone()
        self._last_no: int = last[0] if last else 0

    def get(self, output_id: str) -> Output | None:
        """See `core.edits.StoredOutputs`."""
        return read_output(self._connection, output_id, HOST)

    def exists(self, output_id: str, to: Principal) -> bool:
        """See `core.edits.StoredOutputs`."""
        where, values = _where(("id = ?", output_id), _visible(to))
        return self._connection.execute(f"SELECT 1 FROM outputs {where}", values).fetchone() is not None  # noqa: S608 - constants

    def keyed(self, owner: str, key: str) -> Output | None:
        """See `core.edits.StoredOutputs`."""
        return read_keyed(self._connection, owner, key)

    def add(self, output: Output) -> Output:
        """See `core.edits.StoredOutputs`."""
        self._last_no += 1
        output = replace(output, no=self._last_no)
        self._connection.execute(_INSERT, _row(output))
        return output

    def remove_old(self, before_ms: int, limit: int) -> Removed:
        """See `core.edits.StoredOutputs`."""
        return self._remove("run_id IS NULL AND created_at_ms < ? ORDER BY created_at_ms", before_ms, limit)

    def remove_of_run(self, run_id: str, limit: int) -> Removed:
        """See `core.edits.StoredOutputs`."""
        return self._remove("run_id = ?", run_id, limit)

    def _remove(self, which: str, value: object, limit: int) -> Removed:
        found = self._connection.execute(
            f"SELECT no, coalesce(length(value), 0) FROM outputs WHERE {which} LIMIT ?",  # noqa: S608 - constants
            (value, limit),
        ).fetchall()
        self._connection.executemany("DELETE FROM outputs WHERE no = ?", [(no,) for no, _ in found])
        return Removed(len(found), sum(size for _, size in found))


def _row(output: Output) -> tuple[Any, ...]:
    """An output as a row: the values of `_COLUMNS`, and the value of its inline content."""
    record, body = output.record, output.body
    content = content_of(record.event)
    event, value = record.event, None
    if isinstance(content, Inline):
        assert isinstance(content.value, Raw)  # noqa: S101 - only a list leaves it out
        event, value = with_content(event, Inline()), bytes(content.value)
    values = (
        output.no,
        record.id,
        output.owner,
        record.task_id,
        record.attempt,
        record.producer_agent,
        event.name if isinstance(event, Artifact) else None,
        None if record.run_id is UNSET else record.run_id,
        record.created_at_ms,
        output.key,
        output.key_digest,
        encode(event),
        encode(record.parent_refs),
        None if body is None else body.size,
        None if body is None else body.sha256,
        _flags(output),
        None if output.fingerprint is None else encode(output.fingerprint),
        None if value is None else zlib.crc32(value),
    )
    return (*values, row_checksum(*values), value)


def _flags(output: Output) -> int | None:
    if output.body is None and not output.private:
        return None
    return _UTF8 * (output.body is not None and output.body.utf8) + _PRIVATE * output.private


def output_of(row: Sequence[Any], inline_bytes: int | None = None) -> Output:
    """A row of `_WHOLE`; or of `_LISTED`, where a value of more than `inline_bytes` is left out.

    Raises:
        Damaged: it is not what was stored.
    """
    *values, stored, value = row
    no, id_, owner, task_id, attempt, producer, _, run_id, created, key, key_digest, *rest = values
    event_json, parent_refs, size, sha256, flags, fingerprint, value_checksum = rest
    if row_checksum(*values) != stored or not _is_value(value, value_checksum, size, inline_bytes):
        raise Damaged(f"output {id_!r} is stored under number {no!r}, and its row is damaged")
    event: OutputEvent = _event_decoder.decode(event_json)
    if value_checksum is not None:
        content = Inline(omitted=True, size=size) if value is None else Inline(value=Raw(value))
        event = with_content(event, content)
    record = OutputRecord(
        id=id_,
        task_id=task_id,
        attempt=attempt,
        producer_agent=producer,
        event=event,
        parent_refs=_refs_decoder.decode(parent_refs),
        created_at_ms=created,
        run_id=UNSET if run_id is None else run_id,
        private=True if flags is not None and flags & _PRIVATE else UNSET,
    )
    return Output(
        no=no,
        owner=owner,
        record=record,
        body=None if size is None else Body(size, sha256, bool(flags & _UTF8)),
        fingerprint=None if fingerprint is None else _fingerprint_decoder.decode(fingerprint),
        key=key,
        key_digest=key_digest,
    )


def _is_value(value: Any, stored: int | None, size: int, inline_bytes: int | None) -> bool:
    """Whether this is the value that was stored, or none was, or it is rightly left out."""
    if value is None:
        return stored is None or (inline_bytes is not None and size > inline_bytes)
    return stored is not None and isinstance(value, bytes) and zlib.crc32(value) == stored


def read_output(connection: sqlite3.Connection, output_id: str, to: Principal) -> Output | None:
    """The output of this id; None if there is none that `to` sees."""
    row = find_by_index(connection, f"{_WHOLE} WHERE id = ?", "sqlite_autoindex_outputs_1", (output_id,))
    if row is None:
        return None
    output = output_of(row)
    if output.record.id != output_id:
        raise Damaged(f"the index of output ids is damaged: {output_id!r} leads to {output.record.id!r}")
    return output if output.visible_to(to) else None


def read_keyed(connection: sqlite3.Connection, owner: str, key: str) -> Output | None:
    """What `owner` appended with this idempotency key; None if nothing."""
    row = find_by_index(connection, f"{_WHOLE} WHERE owner = ? AND key = ?", "outputs_by_key", (owner, key))
    return None if row is None else output_of(row)


def read_latest(connection: sqlite3.Connection, filters: LatestOutput, to: Principal) -> Output | None:
    """The newest output that fits and that `to` sees; None if none does."""
    where, values = _where(
        ("producer_agent = ?", filters.name),
        ("artifact = ?", filters.artifact),
        ("task_id = ?", filters.task_id),
        ("attempt = ?", filters.attempt),
        _visible(to),
    )
    row = connection.execute(f"{_WHOLE} {where} ORDER BY no DESC LIMIT 1", values).fetchone()
    return None if row is None else output_of(row)


def read_outputs(
    connection: sqlite3.Connection,
    filters: ListOutputs,
    to: Principal,
    after: int,
    limit: int,
    inline_bytes: int,
    page_bytes: int,
) -> Listed:
    """Outputs that `to` sees, in order, from behind `after`: at most `limit` and `page_bytes`, at least one.

    A value of more than `inline_bytes` is left out.
    """
    where, values = _where(
        ("task_id = ?", filters.task_id), ("attempt = ?", filters.attempt), ("no > ?", after), _visible(to)
    )
    rows = connection.execute(f"{_LISTED} {where} ORDER BY no LIMIT ?", (inline_bytes, *values, limit + 1))
    records: list[bytes] = []
    taken, last, more = 0, after, False
    try:
        for row in rows:
            output = output_of(row, inline_bytes)
            if output.no <= last:
                raise Damaged("the order in which outputs are stored is damaged")  # else a list might never end
            record = encode(output.record)
            more = len(records) == limit or (bool(records) and taken + len(record) > page_bytes)
            if more:
                break
            records.append(record)
            taken += len(record)
            last = output.no
    finally:
        rows.close()
    return Listed(records, last, more)


def _visible(to: Principal) -> tuple[str, str | None]:
    """The term for what `to` sees: all, as the host."""
    return _NOT_ANOTHERS, None if to.role == "host" else to.name


def _where(*terms: tuple[str, Any]) -> tuple[str, list[Any]]:
    """The clause of the terms that have a value."""
    given = [(term, value) for term, value in terms if value is not None]
    return "WHERE " + " AND ".join(term for term, _ in given), [value for _, value in given]
