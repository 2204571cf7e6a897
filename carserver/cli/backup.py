"""`carserver backup`: a copy of all that a running daemon stores."""

from pathlib import Path

import click
import msgspec

from carserver.cli.endpoint import Daemon, daemon_options
from carserver.cli.output import counted, data, json_data, note
from carserver.cli.plain import visible
from carserver.protocol.server import BackedUp


@click.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="The daemon's answer.")
@daemon_options
def backup(*, path: str, as_json: bool, state_dir: str | None, url: str | None) -> None:
    """Copy everything into the new file PATH, while work goes on.

    The daemon writes the file, so with --url of another machine or container PATH is a path there. It is for the
    daemon's user alone, and replaces nothing. To restore it, put it as carserver.db into an empty folder and start the
    daemon with that as --state-dir; the tokens are not in it.
    """
    from carserver.cli.talk import talk  # noqa: PLC0415 - brings websockets

    target = str(Path(path).absolute())
    open_connection = Daemon(state_dir, url).opener("host", notifications=0)

    async def conversation() -> msgspec.Raw:
        async with open_connection() as connection:
            # However long it takes: the connection itself tells whether the daemon is there.
            return await connection.call("server.backup", {"path": target}, result_type=msgspec.Raw)

    raw = talk(conversation())
    if as_json:
        json_data(raw)
        return
    made = msgspec.json.decode(raw, type=BackedUp)
    data(visible(made.path))
    note(f"{counted(made.bytes, 'byte')}, {counted(made.runs, 'run')}")
