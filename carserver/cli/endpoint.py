"""The daemon that a command means, and the token that it may have: the client's rules, and a command's words.

The rules are those of `client.finding` (contract, section 11).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.output import note
from carserver.cli.settings import ConfigError, load_settings
from carserver.client.errors import FolderUnusable, Misconfigured, Unreachable
from carserver.client.finding import Place
from carserver.stores.folder import StateFolder

if TYPE_CHECKING:  # websockets and asyncio are for the commands that connect
    from carserver.client.connection import Connection
    from carserver.client.trace import Opener

Command = TypeVar("Command", bound=Callable[..., Any])


def daemon_options(command: Command) -> Command:
    """`--state-dir` and `--url`, which every command that talks to a daemon takes."""
    state_dir = click.option("--state-dir", metavar="DIR", help="The daemon's state folder: where it is, its tokens.")
    url = click.option("--url", metavar="URL", help="The daemon's address, ws://HOST:PORT, instead of the folder's.")
    return state_dir(url(command))


class Daemon:
    """The daemon that a command means. Nothing is looked up before it is asked for."""

    def __init__(self, state_dir: str | None, url: str | None, environ: Mapping[str, str] | None = None) -> None:
        self._environ = os.environ if environ is None else environ
        try:
            self.settings = load_settings({"state_dir": state_dir}, self._environ)
        except ConfigError as error:
            raise CommandError(str(error), ExitCode.USAGE) from None
        self.folder = StateFolder(Path(self.settings.state_dir))
        self._place = Place(url, state_dir, self._environ)

    def url(self) -> str:
        """Its address, now: after a restart it may be another one.

        Raises:
            CommandError: nobody says where it is, or the folder's daemon does not run.
        """
        with _explained():
            return self._place.url()

    def opener(self, who: str, *, notifications: int | None = None) -> "Opener":
        """What makes connections as `who`: `host`, `client` or `agent:ID`.

        It looks the address up each time, and has no other errors than the client's: whoever reconnects to a daemon
        that is being restarted finds none for a moment.
        """
        from carserver.client.connection import NOTIFICATIONS, open_connection  # noqa: PLC0415 - see above

        room = NOTIFICATIONS if notifications is None else notifications
        self.url()  # what is wrong with either is told at once, with its own exit code
        self.token(who)

        def opened() -> AbstractAsyncContextManager["Connection"]:
            return open_connection(self._place.url(), self._token(who), notifications=room)

        return opened

    def looker(self, *, notifications: int | None = None) -> "Opener":
        """What makes connections that look and cancel: as host where there is its token, else as client."""
        who = "host"
        if self.token("host") is None and self.token("client") is not None:
            note("no host token was found: only the runs of the auth token are seen")
            who = "client"
        return self.opener(who, notifications=notifications)

    def token(self, who: str) -> str | None:
        """The token of `host`, `client` or `agent:ID`; None where there is none.

        Raises:
            CommandError: it is there and cannot be used, or `who` is nobody.
        """
        with _explained():
            return self._token(who)

    def _token(self, who: str) -> str | None:
        if who == "client":
            return self._place.token("auth_token")
        if who == "host":
            return self._place.token("host_token")
        if who.startswith("agent:"):
            return self._place.agents_token(who.removeprefix("agent:"))
        raise Misconfigured(f"{who!r} is nobody: say host, client or agent:ID")


@contextmanager
def _explained() -> Iterator[None]:
    """What the client says of a daemon that it cannot find, as the end of a command."""
    try:
        yield
    except Misconfigured as error:
        raise CommandError(str(error), ExitCode.USAGE) from None
    except FolderUnusable as error:
        raise CommandError(str(error)) from None
    except Unreachable as error:
        raise CommandError(str(error), ExitCode.UNREACHABLE) from None
