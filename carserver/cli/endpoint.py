"""How a command finds the daemon and its tokens (contract, section 11).

The address: --url, CARSERVER_URL, CAR_DAEMON_URL, else `endpoint.json` in the state folder. The tokens: the
environment, else the configuration and the state folder. Those of the folder are for the daemon of the folder: they
are never sent to a distant address unless the folder was named too.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import click

from carserver.cli.errors import CommandError, ExitCode
from carserver.cli.output import note
from carserver.cli.settings import ConfigError, is_loopback, load_settings
from carserver.core.principals import agent_token
from carserver.stores.folder import FolderError, SecretName, SecretSettingError, StateFolder, configured_token

if TYPE_CHECKING:  # websockets and asyncio are for the commands that connect
    from carserver.client import Connection
    from carserver.client.trace import Opener

Command = TypeVar("Command", bound=Callable[..., Any])
_SECRET_FILES: Mapping[Literal["auth_token", "host_token"], SecretName] = {
    "auth_token": "auth-token",
    "host_token": "host-token",
}


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
        self._folder_named = bool(state_dir or self._environ.get("CARSERVER_STATE_DIR"))
        self._url = url or self._environ.get("CARSERVER_URL") or self._environ.get("CAR_DAEMON_URL") or None

    def url(self) -> str:
        """Its address, now: after a restart it may be another one.

        Raises:
            CommandError: nobody says where it is, or the folder's daemon does not run.
        """
        if self._url is not None:
            return _checked_url(self._url)
        endpoint = self.folder.read_endpoint()
        if endpoint is None:
            raise CommandError(
                f"no daemon found in {self.folder.path}: start one with `carserver serve`, or name it with --url",
                ExitCode.UNREACHABLE,
            )
        # Another user's program may have taken the port of a daemon that was killed: it must not get our token.
        if not self.folder.is_held():
            raise CommandError(
                f"the daemon of {self.folder.path} is not running: start it with `carserver serve`",
                ExitCode.UNREACHABLE,
            )
        return endpoint.url

    def opener(self, who: str, *, notifications: int | None = None) -> "Opener":
        """What makes connections as `who`: `host`, `client` or `agent:ID`.

        It looks the address up each time, and has no other errors than the client's: whoever reconnects to a daemon
        that is being restarted finds none for a moment.
        """
        from carserver.client import Unreachable, connect  # noqa: PLC0415 - for the commands that connect
        from carserver.client.connection import NOTIFICATIONS  # noqa: PLC0415 - likewise

        room = NOTIFICATIONS if notifications is None else notifications
        self.url()  # what is wrong with either is told at once, with its own exit code
        self.token(who)

        def open_connection() -> AbstractAsyncContextManager["Connection"]:
            try:
                return connect(self.url(), self.token(who), notifications=room)
            except CommandError as error:
                raise Unreachable(error.message) from None

        return open_connection

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
        try:
            if who == "client":
                return self._token("auth_token", self._environ.get("CAR_AUTH_TOKEN", "").strip())
            if who == "host":
                return self._token("host_token", "")
            if who.startswith("agent:"):
                return self._agent_token(who.removeprefix("agent:"))
        except SecretSettingError as error:
            raise CommandError(str(error), ExitCode.USAGE) from None
        except FolderError as error:
            raise CommandError(str(error)) from None
        raise CommandError(f"{who!r} is nobody: say host, client or agent:ID", ExitCode.USAGE)

    def _token(self, setting: Literal["auth_token", "host_token"], from_car: str) -> str | None:
        variable = f"CARSERVER_{setting.upper()}"
        if variable in self._environ or f"{variable}_FILE" in self._environ:
            return configured_token(self.settings, setting)
        if from_car:
            return from_car
        if not self._folder_serves():
            return None
        return configured_token(self.settings, setting) or self.folder.read_secret(_SECRET_FILES[setting])

    def _agent_token(self, agent_id: str) -> str | None:
        given = self._environ.get("CARSERVER_AGENT_TOKEN", "").strip()
        if given:
            if given.rpartition(".")[0] != agent_id:
                raise CommandError(f"CARSERVER_AGENT_TOKEN is not a token of agent {agent_id!r}", ExitCode.USAGE)
            return given
        key = self.folder.read_secret("agent-key") if self._folder_serves() else None
        if key is None:
            return None
        try:
            return agent_token(key, agent_id)
        except ValueError as error:
            raise CommandError(str(error), ExitCode.USAGE) from None

    def _folder_serves(self) -> bool:
        """Whether the folder's tokens may be sent to the address in use."""
        if self._url is None or self._folder_named:
            return True
        return is_loopback(urlsplit(_checked_url(self._url)).hostname or "")


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in {"ws", "wss"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
        parts = None
    if not fine or parts is None:
        raise CommandError(f"{url!r} is no address of a daemon: write ws://HOST:PORT", ExitCode.USAGE)
    if "@" in parts.netloc:
        raise CommandError("an address with a user part is not accepted: tokens never stand in it", ExitCode.USAGE)
    return url
