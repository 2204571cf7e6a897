"""Lookups that found nothing: is it not there, or was the search led astray?

A bit that flips in a tree can hide rows from every search for them, its own row or others. So where a search finds
nothing, the gap is looked at: the row before the key and, by a step in the tree instead of another search, the row
behind it. Both must be what was stored, and the key must lie between them. What this cannot see is a tree whose own
pointers lead past a row; SQLite tells of most of these, and the check at the start of all.
"""

import sqlite3
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from carserver.core.ports import Damaged
from carserver.stores.schema import row_checksum

_KEYS = {
    "batches": "no, batch_id",
    "handles": "handle",
    "tool_keys": "owner, method, key",
    "receipts": "owner, key",
    "approvals": "id",
}
_INDEXES = {
    "sqlite_autoindex_runs_1": ("runs", "id"),
    "sqlite_autoindex_outputs_1": ("outputs", "id"),
    "outputs_by_key": ("outputs", "owner, key"),
}

Row = tuple[Any, ...]


def find_row(connection: sqlite3.Connection, table: str, key: Sequence[Any]) -> Row | None:
    """The row with this key, of a table that is sorted by it and whose rows end in a checksum; None if there is none.

    Raises:
        Damaged: it is not what was stored; or it is not there, and what stands about its place is not.
    """
    row = _find(connection, _row_lookup(table), key, _is_sound)
    if row is not None and not _is_sound(row):
        raise _damaged(f"table {table!r}", key)
    return row


def find_by_index(connection: sqlite3.Connection, query: str, index: str, values: Sequence[Any]) -> Row | None:
    """The row that `query` finds with these values by this index; None if there is none. Nothing of it is checked here.

    Raises:
        Damaged: it is not there, and what stands about its place in the index is not what the rows say.
    """

    def agrees(entry: Row) -> bool:
        return entry[: len(values)] == entry[len(values) :]

    return _find(connection, _index_lookup(index)._replace(exact=query), values, agrees)


class _Lookup(NamedTuple):
    """Queries: for the row of a key; the last one before it; it and the one behind it; the first of all."""

    what: str
    exact: str
    before: str
    onwards: str
    first: str


def _find(
    connection: sqlite3.Connection, lookup: _Lookup, key: Sequence[Any], agrees: Callable[[Row], bool]
) -> Row | None:
    row: Row | None = connection.execute(lookup.exact, key).fetchone()
    if row is not None:
        return row
    if connection.in_transaction:
        _check_gap(connection, lookup, key, agrees)
        return None
    connection.execute("BEGIN")  # so that all of it is of one moment, the search, too
    try:
        return _find(connection, lookup, key, agrees)
    finally:
        _end(connection)


def _end(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:  # some errors have ended it
        connection.execute("ROLLBACK")


def _check_gap(
    connection: sqlite3.Connection, lookup: _Lookup, key: Sequence[Any], agrees: Callable[[Row], bool]
) -> None:
    """There is a gap where the key would be."""
    size = len(key)
    before: Row | None = connection.execute(lookup.before, key).fetchone()
    if before is None:
        onwards = connection.execute(lookup.first).fetchall()
    else:
        again, *onwards = connection.execute(lookup.onwards, before[:size]).fetchall() or (None,)
        if again != before or not agrees(before) or not before[:size] < tuple(key):
            raise _damaged(lookup.what, key)
    if not all(agrees(behind) and behind[:size] > tuple(key) for behind in onwards):
        raise _damaged(lookup.what, key)


def _damaged(what: str, key: Sequence[Any]) -> Damaged:
    return Damaged(f"the {what} is damaged, at or beside {', '.join(map(repr, key))}")


def _is_sound(row: Row) -> bool:
    return bool(row_checksum(*row[:-1]) == row[-1])


@cache
def _row_lookup(table: str) -> _Lookup:
    names = _KEYS[table]
    rows = f"SELECT * FROM {table} WHERE {{}}"  # noqa: S608 - constants
    return _lookup(f"table {table!r}", names, rows)


@cache
def _index_lookup(index: str) -> _Lookup:
    """Each entry beside its row."""
    table, names = _INDEXES[index]
    columns = names.split(", ")
    entry, row = (", ".join(f"{one}.{column}" for column in columns) for one in ("entry", "row"))
    entries = (
        f"SELECT {entry}, {row} FROM"  # noqa: S608 - constants
        f" (SELECT no, {names} FROM {table} INDEXED BY {index} WHERE {columns[-1]} IS NOT NULL AND {{}}) AS entry"
        f" LEFT JOIN {table} AS row NOT INDEXED ON row.no = entry.no"
    )
    return _lookup(f"index {index!r}", names, entries)


def _lookup(what: str, names: str, query: str) -> _Lookup:
    marks = ", ".join("?" for _ in names.split(", "))
    down = names.replace(",", " DESC,") + " DESC"
    return _Lookup(
        what,
        exact=query.format(f"({names}) = ({marks})"),
        before=query.format(f"({names}) < ({marks}) ORDER BY {down} LIMIT 1"),
        onwards=query.format(f"({names}) >= ({marks}) ORDER BY {names} LIMIT 2"),
        first=query.format(f"TRUE ORDER BY {names} LIMIT 1"),
    )
