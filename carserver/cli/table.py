"""A table for a person at a terminal."""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

from carserver.cli.output import in_colour
from carserver.cli.plain import clipped, visible

_SHOWN = 200  # characters of a cell
_LEAST = 12  # cells of a column that may be narrowed: with fewer it says nothing
_GAP = 2  # between two columns, at most


def print_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    whole: Collection[str],
    spare: Sequence[str] = (),
    styles: Mapping[str, Callable[[str], str]] = MappingProxyType({}),
) -> None:
    """Prints rows below their headings; the cells came from agents.

    Args:
        headings: of all columns. One that says nothing in any row is left out.
        rows: a cell for each heading.
        whole: headings of the columns that are never narrowed: an id is of use as a whole.
        spare: headings of those that are left out where the terminal has no room for all, the least important first.
        styles: how a column's cells look, by what they say.
    """
    from rich.console import Console  # noqa: PLC0415 - at a terminal only
    from rich.table import Table  # noqa: PLC0415 - likewise
    from rich.text import Text  # noqa: PLC0415 - likewise

    console = Console(no_color=not in_colour(), highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    widths = {
        heading: max([len(heading), *(len(visible(row[n])) for row in rows)])
        for n, heading in enumerate(headings)
        if heading in whole or any(row[n] for row in rows)
    }
    least = {heading: width if heading in whole else min(width, _LEAST) for heading, width in widths.items()}
    for heading in spare:
        if sum(least.values()) + _GAP * (len(least) - 1) > console.width:
            least.pop(heading, None)
    shown = [n for n, heading in enumerate(headings) if heading in least]
    for n in shown:
        width = widths[headings[n]] if headings[n] in whole else None
        table.add_column(headings[n], width=width, no_wrap=width is not None)  # rich narrows those that may wrap
    for row in rows:
        cells = []
        for n in shown:
            style = styles[headings[n]](row[n]) if headings[n] in styles else ""
            # `Text` is never read as markup.
            cells.append(Text(visible(clipped(row[n], _SHOWN)), style, no_wrap=True, overflow="ellipsis"))
        table.add_row(*cells)
    console.print(table)
