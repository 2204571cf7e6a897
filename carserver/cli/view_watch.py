"""The live table of runs: what runs now, and dimmed below it what is over."""

from collections.abc import Mapping
from heapq import nsmallest
from typing import NamedTuple

from rich.text import Text

from carserver.cli.output import duration, local_time
from carserver.cli.plain import clipped, visible
from carserver.cli.view import LIVE_STYLE, STATUS_STYLES, fit
from carserver.cli.view_live import Link, giving_back, now_ms, print_lines, shown
from carserver.cli.view_screen import Screen
from carserver.cli.watch import Runs, Seen, watch
from carserver.client.trace import Opener
from carserver.protocol.runs import LIVE

_BUSY_MS = 10_000  # runs that changed within it keep their order, rather than change places with every event
_RECORD_LINES = 20
_NAME_CELLS = 16  # of an agent or a session, at most
_ID_CELLS = 40
_SHORT_ID_CELLS = 12  # where it does not fit whole, it is of no use but to tell runs apart
_LEAST_ID_CELLS = 8
_LEAST_PROMPT_CELLS = 12
_GAP = 2


class _Column(NamedTuple):
    heading: str
    cells: list[str]
    width: int
    to_the_right: bool = False


async def watch_live(open_connection: Opener, filters: Mapping[str, str]) -> None:
    """Shows the runs until Ctrl-C, and leaves the table in the terminal.

    Raises:
        ClientError: as `watch`.
    """
    link = Link(open_connection)
    runs = Runs(filters.get("status"))
    display = Screen()
    with giving_back(display):
        try:
            await shown(display, WatchView(link, runs), watch(link.connection, filters, runs, lambda _: None))
        finally:
            if runs.changes:
                print_lines(table(runs, display.size[0], _RECORD_LINES, now_ms()))


class WatchView:
    """The table on the screen."""

    def __init__(self, link: Link, runs: Runs) -> None:
        self._link = link
        self._runs = runs

    @property
    def changes(self) -> int:
        """Grows with every change of a run."""
        return self._runs.changes

    def draw(self, width: int, height: int, now_ms: int) -> list[Text]:
        """The table, and what is to be said about it."""
        lines = table(self._runs, width, height - 1, now_ms)
        footer = Text("Ctrl-C ends the view", "dim")
        if not self._link.up:
            footer = Text("connection lost, trying again", "yellow")
        return [*lines, *[Text()] * (height - 1 - len(lines)), fit(footer, Text(), width)]


def table(runs: Runs, width: int, height: int, now_ms: int) -> list[Text]:
    """At most `height` lines of at most `width` cells: the live runs, then those that ended lately."""

    def place(seen: Seen) -> tuple[bool, int, int, str]:
        run = seen.run
        if run.status not in LIVE:
            return True, -run.updated_at_ms, 0, run.id
        return False, max(now_ms - run.updated_at_ms, 0) // _BUSY_MS, -run.created_at_ms, run.id

    rows = nsmallest(max(height - 2, 0), runs, key=place)
    columns = _columns(rows, width, now_ms)
    live = sum(seen.run.status in LIVE for seen in runs)
    total = sum(1 for _ in runs)
    more = f" · {total - len(rows):,} more" if total > len(rows) else ""
    lost = f" · {runs.dropped:,} not kept" if runs.dropped else ""
    lines = [
        Text.assemble(
            (f"{live:,} live", LIVE_STYLE if live else "bold"), (f" · {total - live:,} over{more}{lost}", "dim")
        ),
        Text((" " * _GAP).join(_padded(column, column.heading) for column in columns), "bold"),
    ]
    for n, seen in enumerate(rows):
        over = seen.run.status not in LIVE
        line = Text(style="dim" if over else "")
        for column in columns:
            style = STATUS_STYLES.get(seen.run.status, LIVE_STYLE) if column.heading == "STATUS" else ""
            line.append(" " * _GAP if line else "")
            line.append(_padded(column, column.cells[n]), style.replace("bold", "not dim") if over else style)
        lines.append(line)
    return [fit(line, Text(), width) for line in lines[:height]]


def _columns(rows: list[Seen], width: int, now_ms: int) -> list[_Column]:
    """As many columns as there is room for, in the order of `runs ls`; the less important ones go first."""
    runs = [seen.run for seen in rows]
    status = _column("STATUS", [run.status for run in runs])
    elapsed = _column("ELAPSED", [_elapsed(seen, now_ms) for seen in rows], to_the_right=True)
    room = width - status.width - elapsed.width - 2 * _GAP
    id_ = _column("RUN", [run.id for run in runs], _ID_CELLS)
    if id_.width > room:
        id_ = id_._replace(width=max(min(room, _SHORT_ID_CELLS), _LEAST_ID_CELLS))
    room -= id_.width
    events = _column("EVENTS", [f"{run.event_count:,}" for run in runs], to_the_right=True)
    prompt = _column("PROMPT", [run.prompt for run in runs])
    agent = _column("AGENT", [run.agent_id for run in runs], _NAME_CELLS)
    session = _column("SESSION", [run.session_id for run in runs], _NAME_CELLS)
    created = _column("CREATED", [local_time(run.created_at_ms, "%m-%d %H:%M") for run in runs])
    chosen = [id_, status, elapsed]
    for column, least in (
        (events, events.width),
        (prompt, _LEAST_PROMPT_CELLS),
        (agent, agent.width),
        (created, created.width),
        (session, session.width),
    ):
        if any(column.cells) and least + _GAP <= room:
            chosen.append(column)
            room -= least + _GAP
    wide_prompt = prompt._replace(width=_LEAST_PROMPT_CELLS + room)
    order = [id_, status, agent, session, events, created, elapsed]
    return [column for column in order if column in chosen] + ([wide_prompt] if prompt in chosen else [])


def _column(heading: str, cells: list[str], most: int = 200, *, to_the_right: bool = False) -> _Column:
    told = [visible(clipped(cell, 200)) for cell in cells]
    return _Column(heading, told, min(max([len(heading), *(Text(cell).cell_len for cell in told)]), most), to_the_right)


def _padded(column: _Column, cell: str) -> str:
    text = Text(cell)
    text.truncate(column.width, overflow="ellipsis", pad=not column.to_the_right)
    return " " * (column.width - text.cell_len) + text.plain


def _elapsed(seen: Seen, now_ms: int) -> str:
    run = seen.run
    until = now_ms if run.status in LIVE else run.ended_at_ms or run.updated_at_ms
    return duration(max(until - run.created_at_ms, 0))
