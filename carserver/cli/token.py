"""`carserver token`: prints a token, or makes all of them anew."""

import shlex

import click

from carserver.cli.endpoint import Daemon
from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.output import data, note
from carserver.core.principals import agent_token
from carserver.stores.folder import FolderError, SecretSettingError


@click.command()
@click.option("--agent", "agent_id", metavar="ID", help="The token of that agent, instead of everyone's.")
@click.option("--host", "for_host", is_flag=True, help="The host's token, which sees and cancels everything.")
@click.option("--env", "as_env", is_flag=True, help="As shell commands that set up a CAR client.")
@click.option("--rotate", is_flag=True, help="Make all tokens anew; refused while a daemon runs.")
@click.option("--state-dir", metavar="DIR", help="The daemon's state folder.")
@click.option("--url", metavar="URL", help="With --env: the address to print.")
def token(
    *, agent_id: str | None, for_host: bool, as_env: bool, rotate: bool, state_dir: str | None, url: str | None
) -> None:
    """Print the auth token, or another one. The folder and its tokens are made where there are none yet."""
    if sum([agent_id is not None, for_host, rotate]) > 1 or (rotate and as_env):
        raise CommandError("--agent, --host and --rotate exclude each other, as do --rotate and --env", ExitCode.USAGE)
    daemon = Daemon(state_dir, url)
    try:
        if rotate:
            _rotate(daemon)
            return
        secrets = daemon.folder.secrets(daemon.settings)
        chosen = secrets.host_token if for_host else secrets.auth_token
        if agent_id is not None:
            chosen = agent_token(secrets.agent_key, agent_id)
    except (SecretSettingError, ValueError) as error:
        raise CommandError(str(error), ExitCode.USAGE) from None
    except FolderError as error:
        raise CommandError(str(error)) from None
    if as_env:
        data(f"export CAR_AUTH_TOKEN={shlex.quote(chosen)}")
        data(f"export CAR_DAEMON_URL={shlex.quote(_url(daemon))}")
    else:
        data(chosen)


def _rotate(daemon: Daemon) -> None:
    daemon.folder.rotate()
    note(f"all tokens of {daemon.folder.path} are new; those given out before are worth nothing")
    kept = [name for name in ("auth_token", "host_token") if _overridden(daemon, name)]
    if kept:
        note(f"but {' and '.join(kept)} come from the configuration and stay as they are")


def _overridden(daemon: Daemon, name: str) -> bool:
    return getattr(daemon.settings, name) is not None or getattr(daemon.settings, f"{name}_file") is not None


def _url(daemon: Daemon) -> str:
    """The running daemon's address, or the one that it would have."""
    try:
        return daemon.url()
    except CommandError as error:
        if error.code is not ExitCode.UNREACHABLE:
            raise
    host, port = daemon.settings.host, daemon.settings.port
    if port == 0:
        raise CommandError("no daemon is running, and its port is picked when it starts", ExitCode.UNREACHABLE)
    note("no daemon is running: this is the address that it will have by its settings")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not listened on
    return f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
