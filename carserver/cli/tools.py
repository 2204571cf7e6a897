"""`carserver tools …`: which tools there are and what runs, invoking one, and cancelling what runs."""

from typing import TYPE_CHECKING

import click
import msgspec
from msgspec import Raw, Struct, UnsetType

from carserver.cli.endpoint import Daemon, daemon_options
from carserver.cli.errors import ExitCode
from carserver.cli.output import at_terminal, data, json_data, local_time, note, takes_a_view, utc_time
from carserver.cli.plain import visible
from carserver.cli.table import print_table
from carserver.cli.tools_arguments import given_object, given_pairs, schema_members
from carserver.protocol.errors import ErrorKind
from carserver.protocol.tools import HandleStatus, LiveHandle, Tool, ToolStatus

if TYPE_CHECKING:
    from carserver.cli.tools_invoke import Display
    from carserver.client import Connection

_TOOL_HEADINGS = ("TOOL", "SOURCE", "PARAMETERS", "DESCRIPTION")
_HANDLE_HEADINGS = ("HANDLE", "TOOL", "RUN", "OWNER", "SINCE")
_WHOLE = frozenset({"TOOL", "SOURCE", "HANDLE", "SINCE"})


class _Tools(Struct):
    tools: list[Raw]


class _Handles(Struct):
    handles: list[Raw]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def tools() -> None:
    """Look at tools, invoke one, or cancel what runs."""


# ---------------------------------------------------------------------------------------------------------------- ls


@tools.command("ls")
@click.option("--running", is_flag=True, help="What runs now, of everyone, instead.")
@click.option("--json", "as_json", is_flag=True, help="One tool, or handle, a line, as the daemon has it.")
@daemon_options
def list_tools(*, running: bool, as_json: bool, state_dir: str | None, url: str | None) -> None:
    """List the tools that there are, or what runs.

    At a terminal it is a table, in a pipe tab-separated lines. A parameter with a ? may be left out.
    """
    from carserver.cli.talk import talk  # noqa: PLC0415 - brings websockets

    open_connection = Daemon(state_dir, url).looker(notifications=0)

    async def conversation() -> list[Raw]:
        async with open_connection() as connection:
            return await (_live_handles(connection) if running else _all_tools(connection))

    found = talk(conversation())
    if as_json:
        for raw in found:
            json_data(raw, indented=False)
    elif running:
        _show_handles([msgspec.json.decode(raw, type=LiveHandle) for raw in found])
    else:
        _show(_TOOL_HEADINGS, [_tool_cells(msgspec.json.decode(raw, type=Tool)) for raw in found])
    if not found:
        note("nothing runs" if running else "no tools: declare some in a file (`carserver serve --tools FILE`)")


async def _all_tools(connection: "Connection") -> list[Raw]:
    from carserver.cli.talk import ANSWER_S  # noqa: PLC0415 - brings websockets

    return (await connection.call("tools.list", {}, ANSWER_S, result_type=_Tools)).tools


async def _live_handles(connection: "Connection") -> list[Raw]:
    """Everyone's, or one's own where this is not the host."""
    from carserver.cli.talk import ANSWER_S  # noqa: PLC0415 - brings websockets
    from carserver.client import CallError  # noqa: PLC0415 - likewise

    try:
        found = await connection.call("tools.handles", {"all": True}, ANSWER_S, result_type=_Handles)
    except CallError as error:
        if error.type != ErrorKind.FORBIDDEN.type:
            raise
        found = await connection.call("tools.handles", {}, ANSWER_S, result_type=_Handles)
    return found.handles


def _show_handles(handles: list[LiveHandle]) -> None:
    person = at_terminal()
    rows = []
    for one in handles:
        since = local_time(one.started_at_ms, "%m-%d %H:%M:%S") if person else utc_time(one.started_at_ms)
        rows.append([one.handle, one.tool, _or_none(one.run_id), _or_none(one.owner), since])
    _show(_HANDLE_HEADINGS, rows)


def _or_none(text: str | UnsetType) -> str:
    return "" if isinstance(text, UnsetType) else text


def _show(headings: tuple[str, ...], rows: list[list[str]]) -> None:
    if not at_terminal():
        for row in rows:
            data("\t".join(visible(cell) for cell in row))
    elif rows:
        print_table(headings, rows, whole=_WHOLE)


def _tool_cells(tool: Tool) -> list[str]:
    return [tool.name, tool.source, _parameters(tool.parameters), tool.description]


def _parameters(schema: Raw) -> str:
    """The parameters that a JSON Schema names, in short."""
    properties, required = schema_members(schema)
    return ", ".join(name if name in required else f"{name}?" for name in properties)


# ------------------------------------------------------------------------------------------------------------ invoke


@tools.command("invoke")
@click.argument("name")
@click.argument("arguments", metavar="[JSON]", required=False)
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="One argument; beside JSON, or in its place.")
@click.option("--run", "run_id", metavar="ID", help="The run of yours that it is part of: its log gets the output.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Then it is stopped. [never]"
)
@click.option("--key", metavar="KEY", help="Invoked again with the same key, it is the same invocation.")
@click.option("--as", "who", default="client", metavar="WHO", help="client, host or agent:ID. [client]")
@click.option("--json", "as_json", is_flag=True, help="A line for each chunk, and one for what it came to.")
@daemon_options
def invoke_tool(
    *,
    name: str,
    arguments: str | None,
    pairs: tuple[str, ...],
    run_id: str | None,
    timeout: float | None,
    key: str | None,
    who: str,
    as_json: bool,
    state_dir: str | None,
    url: str | None,
) -> int:
    """Invoke tool NAME, and follow it to its end.

    Its arguments are an object, JSON (- reads it from standard input), or given one by one: a VALUE is read as JSON
    where the tool does not want a text. In a pipe, standard output has the tool's text as it came and its data a line
    each, or the result of a tool that has neither; all else is on standard error. Ctrl-C cancels it and waits until
    nothing of it lives; a second one does not wait.

    The exit code is 0 if it succeeded, 75 at its timeout, 130 after Ctrl-C, else 1.
    """
    from carserver.cli.talk import talk  # noqa: PLC0415 - brings websockets
    from carserver.cli.tools_invoke import Order, invoke  # noqa: PLC0415 - likewise

    order = Order(
        tool=name,
        arguments=given_object(arguments),
        pairs=given_pairs(pairs),
        run_id=run_id,
        timeout_ms=None if timeout is None else max(round(timeout * 1000), 1),
        key=key,
    )
    open_connection = Daemon(state_dir, url).opener(who, notifications=0)
    return talk(invoke(open_connection, order, _display(name, as_json=as_json)))


def _display(name: str, *, as_json: bool) -> "Display":
    from carserver.cli.tools_lines import JsonLines, Lines  # noqa: PLC0415 - for what invokes

    if as_json:
        return JsonLines()
    if not takes_a_view():
        return Lines()
    from carserver.cli.tools_view import View  # noqa: PLC0415 - brings rich

    return View(name)


# ------------------------------------------------------------------------------------------------------------ cancel


@tools.command("cancel")
@click.argument("handles", metavar="HANDLE...", nargs=-1, required=True)
@daemon_options
def cancel_handles(*, handles: tuple[str, ...], state_dir: str | None, url: str | None) -> int:
    """Cancel what runs under these handles, and wait until nothing of it lives.

    All that runs: carserver tools ls --running | cut -f 1 | xargs carserver tools cancel. The exit code is 1 where it
    could not be seen that all of it ended.
    """
    from carserver.cli.talk import talk  # noqa: PLC0415 - brings websockets

    open_connection = Daemon(state_dir, url).looker(notifications=0)

    async def conversation() -> ExitCode:
        async with open_connection() as connection:
            return await _cancel(connection, handles)

    return talk(conversation())


async def _cancel(connection: "Connection", handles: tuple[str, ...]) -> ExitCode:
    """Asks for the end of all of them, and then waits for one after the other."""
    from carserver.cli.talk import ANSWER_S  # noqa: PLC0415 - brings websockets
    from carserver.cli.tools_invoke import cancelled  # noqa: PLC0415 - likewise
    from carserver.cli.tools_lines import PROVEN  # noqa: PLC0415 - for what cancels

    code = ExitCode.OK
    for handle in handles:
        await connection.call("tools.cancel", {"handle": handle}, ANSWER_S)
    for handle in handles:
        answer = await cancelled(connection, handle)
        if not answer.cancelled:
            note(f"unknown handle {visible(handle)!r}")
            code = ExitCode.NOT_FOUND
            continue
        raw = await connection.call("tools.status", {"handle": handle}, ANSWER_S, result_type=Raw)
        now = msgspec.json.decode(raw, type=HandleStatus | None)
        status = now.status if now is not None else ToolStatus.CANCELLED  # which it was a moment ago
        if isinstance(answer.cancel, UnsetType):
            data(f"{visible(handle)}: was over already: {status}")
            continue
        data(f"{visible(handle)}: {status}{PROVEN[answer.cancel]}")
        if answer.cancel != "confirmed" and code is ExitCode.OK:
            code = ExitCode.RUNTIME
    return code
