"""`carserver call`: any method, by hand or from a script."""

import sys

import click
import msgspec
import orjson
from msgspec import Raw

from carserver.cli.endpoint import Daemon, daemon_options
from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.output import json_data


@click.command()
@click.argument("method")
@click.argument("params", metavar="[JSON]", required=False)
@click.option("--as", "who", default="client", metavar="WHO", help="host, client or agent:ID. [client]")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    metavar="SECONDS",
    help="To wait for the answer. [30]",
)
@daemon_options
def call(*, method: str, params: str | None, who: str, timeout: float, state_dir: str | None, url: str | None) -> None:
    """Call METHOD with the params JSON.

    They are an object or an array; - reads them from standard input. Prints the result as JSON: indented at a terminal,
    on one line in a pipe.
    """
    from carserver.cli.talk import talk  # noqa: PLC0415 - brings websockets

    given = _params(params)
    open_connection = Daemon(state_dir, url).opener(who, notifications=0)

    async def conversation() -> Raw:
        async with open_connection() as connection:
            return await connection.call(method, given, timeout, result_type=Raw)

    json_data(talk(conversation()))


def _params(text: str | None) -> Raw | None:
    """The params by their very bytes, once they are known to be JSON."""
    if text is None:
        return None
    source = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
    try:
        value = orjson.loads(source)
    except orjson.JSONDecodeError as error:
        raise CommandError(f"the params are not JSON: {error}", ExitCode.USAGE) from None
    if not isinstance(value, dict | list):
        raise CommandError("the params must be a JSON object or array", ExitCode.USAGE)
    return Raw(msgspec.json.format(source, indent=-1))
