"""Lookups that found nothing: is it not there, or was the search led astray?

A bit that flips in a key of a tree can hide a row, its own or another one, from every search for it. Such a search ends
beside that very key: so the two neighbours of a place that is empty are looked at, and must be what was stored.
"""

import sqlite3
from collections.abc import Sequence
from functools import cache
from typing import Any

from carserver.core.ports import Damaged


def check_neighbours(connection: sqlite3.Connection, index: str, values: Sequence[Any]) -> None:
    """No row has these values in this index: its entries before and after them must agree with their rows.

    Raises:
        Damaged: one does not, so nobody can tell whether the row is there.
    """
    for query in _queries(index):
        found = connection.execute(query, values).fetchone()
        if found is not None and found[: len(values)] != found[len(values) :]:
            raise Damaged(f"the index {index!r} is damaged near {', '.join(map(repr, values))}")


_INDEXES = {
    "sqlite_autoindex_runs_1": ("runs", "id"),
    "sqlite_autoindex_outputs_1": ("outputs", "id"),
    "outputs_by_key": ("outputs", "owner, key"),
}


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
