"""`carserver runs …`: looking at runs, following one, recording one, cancelling one."""

from datetime import UTC, datetime
from typing import Any

import click
import msgspec
from msgspec import Raw, Struct

from carserver.cli.endpoint import Daemon, daemon_options
from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.output import at_terminal, data, in_colour, json_data, note
from carserver.cli.plain import clipped, visible, visible_lines
from carserver.protocol.runs import Cancelled, Snapshot, Status

STATUS_COLOURS: dict[str, str] = {
    Status.COMPLETED: "green",
    Status.FAILED: "red",
    Status.CANCELLED: "yellow",
    Status.INTERRUPTED: "yellow",
}
_LIVE_COLOUR = "cyan"
_HEADINGS = ("RUN", "STATUS", "AGENT", "SESSION", "EVENTS", "CREATED", "PROMPT")
_WHOLE = frozenset({"RUN", "STATUS", "EVENTS", "CREATED"})
_PAGE = 1_000  # the daemon's own bound


class _Page(Struct):
    runs: list[Raw]
    next_page: str | None = None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def runs() -> None:
    """Look at runs, follow, record or cancel one."""


@runs.command("ls")
@click.option("--status", type=click.Choice([status.value for status in Status]), help="Only those in this status.")
@click.option("--session", "session_id", metavar="ID", help="Only those of this session.")
@click.option("--agent", "agent_id", metavar="ID", help="Only those of this agent.")
@click.option("--limit", type=click.IntRange(min=1), default=50, help="How many at most. [50]")
@click.option("--json", "as_json", is_flag=True, help="One run a line, as the daemon has it.")
@daemon_options
def list_runs(*, limit: int, as_json: bool, state_dir: str | None, url: str | None, **filters: str | None) -> None:
    """List runs, newest first: a table at a terminal, tab-separated lines in a pipe."""
    from carserver.cli.talk import ANSWER_S, talk  # noqa: PLC0415 - brings websockets

    open_connection = Daemon(state_dir, url).looker(notifications=0)

    async def conversation() -> list[Raw]:
        found: list[Raw] = []
        params: dict[str, Any] = {name: value for name, value in filters.items() if value is not None}
        async with open_connection() as connection:
            while True:
                params["limit"] = min(limit - len(found), _PAGE)
                page = await connection.call("runs.list", params, ANSWER_S, result_type=_Page)
                found += page.runs
                if page.next_page is None or len(found) >= limit:
                    return found
                params["page"] = page.next_page

    found = talk(conversation())
    if as_json:
        for raw in found:
            json_data(raw, indented=False)
        return
    snapshots = [msgspec.json.decode(raw, type=Snapshot) for raw in found]
    if at_terminal():
        _table(snapshots)
    else:
        for run in snapshots:
            data("\t".join(visible(cell) for cell in _cells(run, _utc(run.created_at_ms))))
    if not found:
        note("no such run")


@runs.command("get")
@click.argument("run_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="The snapshot, as the daemon has it.")
@daemon_options
def get_run(*, run_id: str, as_json: bool, state_dir: str | None, url: str | None) -> None:
    """Show the state of run ID."""
    raw = _ask(Daemon(state_dir, url), "runs.get", {"run_id": run_id})
    if as_json:
        json_data(raw)
        return
    for name, value in msgspec.json.decode(raw, type=dict[str, Raw]).items():
        data(f"{visible(name):<20} {_member(name, value)}")


@runs.command("cancel")
@click.argument("run_id", metavar="ID")
@click.option("--reason", help="Why; it is kept with the run, and told to its owner.")
@click.option("--json", "as_json", is_flag=True, help="The daemon's answer.")
@daemon_options
def cancel_run(*, run_id: str, reason: str | None, as_json: bool, state_dir: str | None, url: str | None) -> None:
    """Cancel run ID. One that is over stays as it is."""
    params = {"run_id": run_id} if reason is None else {"run_id": run_id, "reason": reason}
    raw = _ask(Daemon(state_dir, url), "runs.cancel", params)
    if as_json:
        json_data(raw)
        return
    answer = msgspec.json.decode(raw, type=Cancelled)
    data(f"{visible(run_id)}: {'' if answer.cancelled else 'was over already: '}{answer.status}")


@runs.command("trace")
@click.argument("run_id", metavar="ID")
@click.option("--cursor", type=click.IntRange(min=0), default=0, help="Go on from there; needs --epoch.")
@click.option("--epoch", help="The log that the cursor is of.")
@click.option("--json", "as_json", is_flag=True, help="One record a line, as the daemon sends it.")
@daemon_options
def trace_run(
    *, run_id: str, cursor: int, epoch: str | None, as_json: bool, state_dir: str | None, url: str | None
) -> None:
    """Follow run ID from its beginning to its end, live, through restarts of the daemon."""
    if cursor and epoch is None:
        raise CommandError("--cursor needs --epoch: a position counts in one log only", ExitCode.USAGE)
    from carserver.cli.talk import talk  # noqa: PLC0415 - brings websockets
    from carserver.cli.trace import follow  # noqa: PLC0415 - likewise

    talk(follow(Daemon(state_dir, url).looker(), run_id, cursor=cursor, epoch=epoch, as_json=as_json))


@runs.command("record")
@click.option("--run", "run_id", metavar="ID", help="An existing run of yours; else a new one is made.")
@click.option("--prompt", help="What the new run is about.")
@click.option("--session", "session_id", metavar="ID", help="The conversation that the new run belongs to.")
@click.option("--agent", "agent_id", metavar="ID", help="The agent that the new run names.")
@click.option("--metadata", metavar="JSON", help="An object that is kept with the new run.")
@click.option(
    "--input",
    "mode",
    type=click.Choice(["auto", "events", "text"]),
    default="auto",
    help="What a line is: an event where it looks like one, always an event, always text. [auto]",
)
@click.option("--as", "who", default="client", metavar="WHO", help="client, host or agent:ID. [client]")
@click.option("--patience", type=click.FloatRange(min=0), default=60.0, help="Seconds to wait for a lost daemon. [60]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON at the end, not the run's id first.")
@daemon_options
def record_run(
    *,
    run_id: str | None,
    mode: str,
    who: str,
    patience: float,
    as_json: bool,
    state_dir: str | None,
    url: str | None,
    **creation: str | None,
) -> None:
    """Record standard input as a run's events, and attend the run until the input ends.

    A line that is a JSON object with a string "type" is an event; any other line is recorded as a text_delta. Prints
    the run's id. Ends with exit code 1 if the run is cancelled.
    """
    from carserver.cli.record import record  # noqa: PLC0415 - brings websockets
    from carserver.cli.talk import talk  # noqa: PLC0415 - likewise

    given = {name: value for name, value in creation.items() if value is not None}
    if run_id is not None and given:
        raise CommandError("--run names a run that exists: the other options are for a new one", ExitCode.USAGE)
    open_connection = Daemon(state_dir, url).opener(who)
    talk(
        record(
            open_connection, run_id=run_id, creation=_creation(given), mode=mode, patience_s=patience, as_json=as_json
        )
    )


def _creation(given: dict[str, str]) -> dict[str, Any]:
    """The params of `runs.create`."""
    params: dict[str, Any] = {"prompt": "", **given}
    if "metadata" in given:
        try:
            params["metadata"] = msgspec.json.decode(given["metadata"], type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            raise CommandError("--metadata must be a JSON object", ExitCode.USAGE) from None
    return params


def _ask(daemon: Daemon, method: str, params: dict[str, Any]) -> Raw:
    """One question, as a looker."""
    from carserver.cli.talk import ANSWER_S, talk  # noqa: PLC0415 - brings websockets

    open_connection = daemon.looker(notifications=0)

    async def conversation() -> Raw:
        async with open_connection() as connection:
            return await connection.call(method, params, ANSWER_S, result_type=Raw)

    return talk(conversation())


def _member(name: str, value: Raw) -> str:
    """One member of a snapshot, for a person."""
    decoded = msgspec.json.decode(value)
    if isinstance(decoded, str):
        text = visible_lines(decoded).replace("\n", "\n" + " " * 21)
        if name == "status" and in_colour():
            return click.style(text, fg=STATUS_COLOURS.get(decoded, _LIVE_COLOUR))
        return text
    if name.endswith("_at_ms") and isinstance(decoded, int):
        return _local(decoded)
    return visible(bytes(value).decode())


def _table(snapshots: list[Snapshot]) -> None:
    from rich.console import Console  # noqa: PLC0415 - at a terminal only
    from rich.table import Table  # noqa: PLC0415 - likewise
    from rich.text import Text  # noqa: PLC0415 - likewise

    rows = [_cells(run, _local(run.created_at_ms, "%m-%d %H:%M")) for run in snapshots]
    # An id and a status are of use whole; a column that says nothing is left out.
    shown = [n for n, heading in enumerate(_HEADINGS) if heading in _WHOLE or any(row[n] for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for n in shown:
        heading = _HEADINGS[n]
        whole = max([len(heading), *(len(visible(row[n])) for row in rows)]) if heading in _WHOLE else None
        table.add_column(heading, width=whole, no_wrap=whole is not None)  # rich narrows those that may wrap
    for run, row in zip(snapshots, rows, strict=True):
        # `Text` is never read as markup: these words came from agents.
        cells = [Text(visible(clipped(cell, 200)), no_wrap=True, overflow="ellipsis") for cell in row]
        cells[1].stylize(STATUS_COLOURS.get(run.status, _LIVE_COLOUR))
        table.add_row(*(cells[n] for n in shown))
    Console(no_color=not in_colour(), highlight=False).print(table)


def _cells(run: Snapshot, created: str) -> list[str]:
    return [run.id, run.status, run.agent_id, run.session_id, str(run.event_count), created, run.prompt]


def _utc(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _local(milliseconds: int, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone().strftime(form)
