"""`carserver serve`: from flags to settings to the daemon."""

import gc
import os
import typing
from typing import Any

import click

from carserver.cli import logs
from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.firstprocess import leave_first_process
from carserver.cli.settings import ConfigError, load_settings
from carserver.config import Durability, LogLevel, Settings


@click.command()
@click.option("--host", metavar="ADDRESS", help="Address to listen on. [127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65_535), metavar="PORT", help="Port; 0 picks a free one. [9100]")
@click.option("--unix", metavar="PATH", help="A Unix socket to listen on, too, for this user's processes.")
@click.option("--stdio", is_flag=True, help="The parent is host: a frame a line on standard input and output.")
@click.option("--state-dir", metavar="DIR", help="Where everything is kept. [$XDG_STATE_HOME/carserver]")
@click.option(
    "--durability",
    type=click.Choice(typing.get_args(Durability)),
    help="What an acknowledgement survives: a power cut, a kill, or nothing. [full]",
)
@click.option("--file-root", metavar="DIR", help="Outputs may refer to files below it; all who have a token read them.")
@click.option("--tools", metavar="FILE", help="A TOML file of commands that are tools: [tools.NAME] command = […]")
@click.option("--no-auth", is_flag=True, help="No tokens: everyone is host. Loopback only.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="A Host name beside the loopback ones. Repeatable.")
@click.option("--allow-origin", multiple=True, metavar="ORIGIN", help="An Origin that browsers may have. Repeatable.")
@click.option("--methods", multiple=True, metavar="MODULE", help="A module of @method functions to add. Repeatable.")
@click.option("--log-level", type=click.Choice(typing.get_args(LogLevel)), help="[info]")
@click.option("--config", metavar="FILE", help="Settings file. [carserver.toml in the state folder]")
def serve(*, no_auth: bool, stdio: bool, config: str | None, **flags: Any) -> int:
    """Run the daemon until TERM or INT.

    Prints `listening on ws://…` once it is ready (with --stdio on standard error). Every setting is also read from
    CARSERVER_<NAME> and from carserver.toml; a flag wins over the environment, the environment over the file.
    """
    try:
        switches = {"auth": False if no_auth else None, "stdio": stdio or None}
        settings = load_settings({**flags, **switches}, os.environ, config)
    except ConfigError as error:
        raise CommandError(str(error), ExitCode.USAGE) from None
    return _run(settings)


def _run(settings: Settings) -> int:
    leave_first_process()
    gc.disable()  # until the daemon is ready: what is imported and built now stays, so looking for garbage is in vain
    # Here, not above: `serve --help` and a wrong flag need no daemon.
    from carserver.daemon import StartError, run  # noqa: PLC0415
    from carserver.stores.folder import FolderError, SecretSettingError  # noqa: PLC0415

    logs.set_up(settings.log_level)
    try:
        return run(settings)
    except (ConfigError, SecretSettingError) as error:
        raise CommandError(str(error), ExitCode.USAGE) from None
    except (StartError, FolderError) as error:
        raise CommandError(str(error)) from None
