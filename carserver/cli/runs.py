"""`carserver runs …`: looking at runs, following one, recording one, cancelling and deleting some."""

from typing import Any

import click
import msgspec
from msgspec import Raw

from carserver.cli.endpoint import Daemon, daemon_options
from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.output import at_terminal, data, in_colour, json_data, local_time, note, takes_a_view, utc_time
from carserver.cli.plain import visible, visible_lines
from carserver.cli.table import print_table
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
_SPARE = ("SESSION", "CREATED", "AGENT", "PROMPT", "EVENTS")  # at a narrow terminal, as in `runs watch`


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def runs() -> None:
    """Look at runs, follow, record or cancel one."""


@runs.command("ls")
@click.option("--status", type=click.Choice([status.value for status in Status]), help="Only those in this status.")
@click.option("--session", "session_id", metavar="ID", help="Only those of this session.")
@click.option("--agent", "agent_id", metavar="ID", help="Only those of this agent.")
@click.option("--limit", type=click.IntRange(min=1), default=50, metavar="N", help="How many at most. [50]")
@click.option("--json", "as_json", is_flag=True, help="One run a line, as the daemon has it.")
@daemon_options
def list_runs(*, limit: int, as_json: bool, state_dir: str | None, url: str | None, **filters: str | None) -> None:
    """List runs, newest first.

    At a terminal it is a table of the columns that it has room for, in a pipe all of them in tab-separated lines.
    """
    from carserver.cli.talk import talk  # noqa: PLC0415 - brings websockets
    from carserver.cli.watch import newest  # noqa: PLC0415 - likewise

    given = {name: value for name, value in filters.items() if value is not None}
    open_connection = Daemon(state_dir, url).looker(notifications=0)

    async def conversation() -> list[Raw]:
        async with open_connection() as connection:
            return await newest(connection, given, limit)

    found = talk(conversation())
    if as_json:
        for raw in found:
            json_data(raw, indented=False)
        return
    snapshots = [msgspec.json.decode(raw, type=Snapshot) for raw in found]
    if at_terminal():
        rows = [_cells(run, local_time(run.created_at_ms, "%m-%d %H:%M")) for run in snapshots]
        colours = {"STATUS": lambda cell: STATUS_COLOURS.get(cell, _LIVE_COLOUR)}
        print_table(_HEADINGS, rows, whole=_WHOLE, spare=_SPARE, styles=colours)
    else:
        for run in snapshots:
            data("\t".join(visible(cell) for cell in _cells(run, utc_time(run.created_at_ms))))
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


@runs.command("delete")
@click.argument("run_ids", metavar="ID...", nargs=-1, required=True)
@click.option("--as", "who", default="client", metavar="WHO", help="Whose runs: client, host or agent:ID. [client]")
@daemon_options
def delete_runs(*, run_ids: tuple[str, ...], who: str, state_dir: str | None, url: str | None) -> None:
    """Delete runs that are over, with their outputs.

    Only their owner may; the host has `carserver prune`.
    """
    from carserver.cli.talk import ANSWER_S, talk  # noqa: PLC0415 - brings websockets

    open_connection = Daemon(state_dir, url).opener(who, notifications=0)

    async def conversation() -> None:
        async with open_connection() as connection:
            for run_id in run_ids:
                await connection.call("runs.delete", {"run_id": run_id}, ANSWER_S, result_type=Raw)
                data(f"{visible(run_id)}: deleted")

    talk(conversation())


@runs.command("trace")
@click.argument("run_id", metavar="ID")
@click.option(
    "--cursor", type=click.IntRange(min=0), metavar="N", help="Go on from there; other than 0 it needs --epoch."
)
@click.option("--epoch", help="The log that the cursor is of.")
@click.option("--plain", is_flag=True, help="A line for each event at a terminal too, not the live view.")
@click.option("--json", "as_json", is_flag=True, help="One record a line, as the daemon sends it.")
@daemon_options
def trace_run(
    *,
    run_id: str,
    cursor: int | None,
    epoch: str | None,
    plain: bool,
    as_json: bool,
    state_dir: str | None,
    url: str | None,
) -> None:
    """Follow run ID to its end, live, through restarts of the daemon.

    At a terminal it is a view of what goes on, which leaves a record when the run or the view ends; in a pipe it is a
    line for each event.
    """
    if cursor and epoch is None:
        raise CommandError("--cursor needs --epoch: a position counts in one log only", ExitCode.USAGE)
    from carserver.cli.talk import talk  # noqa: PLC0415 - brings websockets

    open_connection = Daemon(state_dir, url).looker()
    if takes_a_view() and not plain and not as_json:
        from carserver.cli.view_live import follow_live  # noqa: PLC0415 - brings rich

        talk(follow_live(open_connection, run_id, cursor=cursor, epoch=epoch))
    else:
        from carserver.cli.trace import follow  # noqa: PLC0415 - brings websockets

        talk(follow(open_connection, run_id, cursor=cursor or 0, epoch=epoch, as_json=as_json))


@runs.command("watch")
@click.option("--status", type=click.Choice([status.value for status in Status]), help="Only those in this status.")
@click.option("--session", "session_id", metavar="ID", help="Only those of this session.")
@click.option("--agent", "agent_id", metavar="ID", help="Only those of this agent.")
@click.option("--plain", is_flag=True, help="A line for each change at a terminal too, not the live table.")
@click.option("--json", "as_json", is_flag=True, help="A run a line with each change, as the daemon has it.")
@daemon_options
def watch_runs(*, plain: bool, as_json: bool, state_dir: str | None, url: str | None, **given: str | None) -> None:
    """Watch what runs now, through restarts of the daemon.

    At a terminal it is a live table, which stays when it is ended; in a pipe it is a line for each change, in the cells
    of `runs ls`.
    """
    from carserver.cli.talk import talk  # noqa: PLC0415 - brings websockets

    filters = {name: value for name, value in given.items() if value is not None}
    open_connection = Daemon(state_dir, url).looker()
    if takes_a_view() and not plain and not as_json:
        from carserver.cli.view_watch import watch_live  # noqa: PLC0415 - brings rich

        talk(watch_live(open_connection, filters))
    else:
        from carserver.cli.watch import print_changes  # noqa: PLC0415 - brings websockets

        def cells(run: Snapshot) -> list[str]:
            return _cells(run, utc_time(run.created_at_ms))

        talk(print_changes(open_connection, filters, cells, as_json=as_json))


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
@click.option(
    "--patience", type=click.FloatRange(min=0), default=60.0, metavar="SECONDS", help="To wait for a lost daemon. [60]"
)
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
    """Record standard input as a run's events.

    The run is attended until the input ends. A line that is a JSON object with a string "type" is an event; any other
    line is recorded as a text_delta. Prints the run's id. Ends with exit code 1 if the run is cancelled.
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
            raw = given["metadata"].encode()
            msgspec.json.decode(raw, type=dict[str, Raw])
        except (ValueError, RecursionError):  # what msgspec and the encoding raise is a ValueError
            raise CommandError("--metadata must be a JSON object", ExitCode.USAGE) from None
        params["metadata"] = Raw(raw)  # as it is: numbers keep their digits
    return params


def _ask(daemon: Daemon, method: str, params: dict[str, Any]) -> Raw:
    """One question, as a looker."""
    from carserver.cli.talk import ask  # noqa: PLC0415 - brings websockets

    return ask(daemon.looker(notifications=0), method, params)


def _member(name: str, value: Raw) -> str:
    """One member of a snapshot, for a person."""
    decoded = msgspec.json.decode(value)
    if isinstance(decoded, str):
        text = visible_lines(decoded).replace("\n", "\n" + " " * 21)
        if name == "status" and in_colour():
            return click.style(text, fg=STATUS_COLOURS.get(decoded, _LIVE_COLOUR))
        return text
    if name.endswith("_at_ms") and isinstance(decoded, int):
        return local_time(decoded)
    return visible(bytes(value).decode())


def _cells(run: Snapshot, created: str) -> list[str]:
    return [run.id, run.status, run.agent_id, run.session_id, str(run.event_count), created, run.prompt]
