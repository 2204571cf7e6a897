"""A table for a person at a terminal."""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

from carserver.cli.output import in_colour
from carserver.cli.plain import clipped, visible

_SHOWN = 200  # characters of a cell


def print_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    whole: Collection[str],
    styles: Mapping[str, Callable[[str], str]] = MappingProxyType({}),
) -> None:
    """Prints rows below their headings; the cells came from agents.

    Args:
        headings: of all columns. One that says nothing in any row is left out.
        rows: a cell for each heading.
        whole: headings of the columns that are never narrowed: an id is of use as a whole.
        styles: how a column's cells look, by what they say.
    """
    from rich.console import Console  # noqa: PLC0415 - at a terminal only
    from rich.table import Table  # noqa: PLC0415 - likewise
    from rich.text import Text  # noqa: PLC0415 - likewise

    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = [n for n, heading in enumerate(headings) if heading in whole or any(row[n] for row in rows)]
    for n in shown:
        heading = headings[n]
        width = max([len(heading), *(len(visible(row[n])) for row in rows)]) if heading in whole else None
        table.add_column(heading, width=width, no_wrap=width is not None)  # rich narrows those that may wrap
    for row in rows:
        cells = []
        for n in shown:
            style = styles[headings[n]](row[n]) if headings[n] in styles else ""
            # `Text` is never read as markup.
            cells.append(Text(visible(clipped(row[n], _SHOWN)), style, no_wrap=True, overflow="ellipsis"))
        table.add_row(*cells)
    Console(no_color=not in_colour(), highlight=False).print(table)
