"""Heads as a file of an earlier schema version has them: without the columns that were added since.

A file is looked at, and salvaged, before it is brought to this version; its checksums are of what it has.
"""

from collections.abc import Sequence
from typing import Any

from carserver.core.ports import Damaged
from carserver.core.runs import Head
from carserver.stores.rows import RUN_COLUMNS, TEXTS, head_from
from carserver.stores.schema import row_checksum

CHECKED, TURNED = 2, 4
"""The schema versions from which on rows beside the events have checksums, and runs turns and outcomes."""
_ADDED: dict[str, tuple[int, Any]] = {"log_bytes": (CHECKED, 0), "turns": (TURNED, 0), "outcome": (TURNED, None)}
"""Columns that came later: with which version, and what stands for one in a row of before."""


class FormerHeads:
    """How to read the heads of a file of this schema version.

    `query` gives rows that `head` understands, and takes what SQL may follow a `FROM`.
    """

    def __init__(self, version: int) -> None:
        self._checked = version >= CHECKED
        self._runs = [name for name in RUN_COLUMNS.split(", ") if _since(name) <= version]
        self._texts = [name for name in TEXTS if _since(name) <= version]
        sums = ["runs.checksum", "texts.checksum"] if self._checked else ["NULL", "NULL"]
        columns = ", ".join([*self._runs, *self._texts, *sums])
        self.query = f"SELECT {columns} FROM runs LEFT JOIN texts USING (no)"  # noqa: S608 - constants

    def head(self, row: Sequence[Any]) -> Head:
        """A row of `query`.

        Raises:
            Damaged: it is not what was stored. Where it has no checksum, nothing of it was compared.
        """
        *values, of_run, of_texts = row
        run, texts = values[: len(self._runs)], values[len(self._runs) :]
        if self._checked and (row_checksum(*run) != of_run or row_checksum(run[0], *texts) != of_texts):
            raise Damaged(f"run {run[1]!r} is stored under number {run[0]!r}, and its row is damaged")
        return head_from(_filled(RUN_COLUMNS.split(", "), self._runs, run), _filled(TEXTS, self._texts, texts))


def _since(name: str) -> int:
    return _ADDED[name][0] if name in _ADDED else 1


def _filled(wanted: Sequence[str], there: Sequence[str], values: Sequence[Any]) -> list[Any]:
    found = dict(zip(there, values, strict=True))
    return [found[name] if name in found else _ADDED[name][1] for name in wanted]
