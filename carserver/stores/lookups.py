"""Lookups that found nothing: is it not there, or was the search led astray?

A bit that flips in a key of a tree can hide a row, its own or another one, from every search for it. Such a search ends
beside that very key: so the two neighbours of a place that is empty are looked at, and must be what was stored.
"""

import sqlite3
from collections.abc import Sequence
from functools import cache
from typing import Any

from carserver.core.ports import Damaged
from carserver.stores.schema import row_checksum


def check_neighbours(connection: sqlite3.Connection, index: str, values: Sequence[Any]) -> None:
    """No row has these values in this index: its entries before and after them must agree with their rows.

    Raises:
        Damaged: one does not, so nobody can tell whether the row is there.
    """
    for query in _queries(index):
        found = connection.execute(query, values).fetchone()
        if found is not None and found[: len(values)] != found[len(values) :]:
            raise Damaged(f"the index {index!r} is damaged near {', '.join(map(repr, values))}")


def find_row(connection: sqlite3.Connection, table: str, key: Sequence[Any]) -> tuple[Any, ...] | None:
    """The row with this key, of a table that is sorted by it and whose rows end in a checksum; None if there is none.

    Raises:
        Damaged: it is not what was stored; or it is not there, and what stands beside its place is not.
    """
    from_there, before = _row_queries(table)
    row = _sound(connection, table, from_there, key)
    if row is not None and row[: len(key)] == tuple(key):
        return row
    _sound(connection, table, before, key)
    return None


def _sound(connection: sqlite3.Connection, table: str, query: str, key: Sequence[Any]) -> tuple[Any, ...] | None:
    row: tuple[Any, ...] | None = connection.execute(query, key).fetchone()
    if row is not None and row_checksum(*row[:-1]) != row[-1]:
        raise Damaged(f"the table {table!r} is damaged, at or beside {', '.join(map(repr, key))}")
    return row


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


@cache
def _row_queries(table: str) -> tuple[str, str]:
    """The first row from a key on, and the last one before it."""
    names = _KEYS[table]
    columns = names.split(", ")
    marks = ", ".join("?" * len(columns))
    down = ", ".join(f"{column} DESC" for column in columns)
    return (
        f"SELECT * FROM {table} WHERE ({names}) >= ({marks}) ORDER BY {names} LIMIT 1",  # noqa: S608 - constants
        f"SELECT * FROM {table} WHERE ({names}) < ({marks}) ORDER BY {down} LIMIT 1",  # noqa: S608 - constants
    )


@cache
def _queries(index: str) -> tuple[str, str]:
    """The entry before and the one after, each beside its row: one statement, so neither changes meanwhile."""
    table, names = _INDEXES[index]
    columns = names.split(", ")
    marks = ", ".join("?" * len(columns))
    entry, row = (", ".join(f"{one}.{column}" for column in columns) for one in ("entry", "row"))

    def neighbour(sign: str, order: str) -> str:
        by = ", ".join(f"{column} {order}" for column in columns)
        return (
            f"SELECT {entry}, {row} FROM (SELECT no, {names} FROM {table} INDEXED BY {index}"  # noqa: S608 - constants
            f" WHERE ({names}) {sign} ({marks}) AND {columns[-1]} IS NOT NULL ORDER BY {by} LIMIT 1) AS entry"
            f" LEFT JOIN {table} AS row NOT INDEXED ON row.no = entry.no"
        )

    return neighbour("<", "DESC"), neighbour(">", "ASC")
