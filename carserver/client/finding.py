"""Where the daemon is, and which token it gets (contract, section 11).

The address: the argument, CARSERVER_URL, CAR_DAEMON_URL, else `endpoint.json` in the state folder. A token: the
argument, the environment, else the state folder. The folder's tokens are for the folder's daemon: they are never sent
to a distant address unless the folder was named too.
"""

import fcntl
import os
import stat
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec

from carserver.client.errors import FolderUnusable, Misconfigured, Unreachable
from carserver.protocol.folder import (
    AGENT_KEY,
    AUTH_TOKEN,
    CONFIGURATION,
    ENDPOINT,
    HOST_TOKEN,
    LOCK,
    SMALL,
    Endpoint,
    agent_token,
    token_problem,
)

TokenSetting = Literal["auth_token", "host_token"]
_SECRET: Final[Mapping[TokenSetting, str]] = {"auth_token": AUTH_TOKEN, "host_token": HOST_TOKEN}
_MAC_CHARACTERS = 64  # behind the last dot of an agent's token
_START = "start one with `carserver serve`"


class Target(NamedTuple):
    """Where a daemon is, and what proves to it who we are."""

    url: str
    token: str | None

    def __repr__(self) -> str:
        return f"Target({self.url!r}, …)"


class Place:
    """The daemon that is meant. Nothing is looked up before it is asked for, and everything anew each time.

    Args:
        url: its address, if not the environment's or the folder's.
        state_dir: its state folder, if not CARSERVER_STATE_DIR or the default.
        environ: the environment.
    """

    def __init__(
        self,
        url: str | None = None,
        state_dir: str | PathLike[str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._environ = os.environ if environ is None else environ
        self._url = url or self._environ.get("CARSERVER_URL") or self._environ.get("CAR_DAEMON_URL") or None
        self._named = os.fspath(state_dir or "") or self._environ.get("CARSERVER_STATE_DIR", "")

    @property
    def folder(self) -> Path:
        """The state folder.

        Raises:
            Misconfigured: there is no home directory to look for it in.
        """
        if self._named:
            return Path(self._named).expanduser().absolute()
        return default_state_dir()

    def url(self) -> str:
        """The daemon's address, now: after a restart it may be another one.

        Raises:
            Misconfigured: the address that was given is none.
            Unreachable: nobody says where it is, or the folder's daemon does not run.
        """
        if self._url is not None:
            return _checked_url(self._url)
        endpoint = self._endpoint()
        # Another user's program may have taken the port of a daemon that was killed: it must not get our token.
        if not is_held(self.folder):
            raise Unreachable(f"the daemon of {self.folder} is not running: {_START}")
        return endpoint.url

    def token(self, setting: TokenSetting) -> str | None:
        """The auth token or the host's; None where there is none.

        Raises:
            Misconfigured: it is set and cannot be used.
            FolderUnusable: so it is with the folder's.
        """
        variable = f"CARSERVER_{setting.upper()}"
        names = (variable, f"{variable}_FILE")
        if any(name in self._environ for name in names):
            return _configured(setting, *map(self._environ.get, names))
        from_car = self._environ.get("CAR_AUTH_TOKEN", "").strip() if setting == "auth_token" else ""
        if from_car or not self._folder_serves():
            return from_car or None
        configuration = self._configuration()
        given = [configuration.get(name) for name in (setting, f"{setting}_file")]
        return _configured(setting, *given) or read_secret(self.folder / _SECRET[setting])

    def agents_token(self, agent_id: str) -> str | None:
        """The token of an agent: the environment's, or one made with the folder's key; None where there is neither.

        Raises:
            Misconfigured: the environment's is another agent's, or `agent_id` cannot be one.
            FolderUnusable: the key cannot be used.
        """
        given = self.given_agents_token()
        if given is not None:
            if given.rpartition(".")[0] != agent_id:
                raise Misconfigured(f"CARSERVER_AGENT_TOKEN is not a token of agent {agent_id!r}")
            return given
        key = read_secret(self.folder / AGENT_KEY) if self._folder_serves() else None
        try:
            return None if key is None else agent_token(key, agent_id)
        except ValueError as error:
            raise Misconfigured(str(error)) from None

    def given_agents_token(self) -> str | None:
        """The environment's, of whichever agent."""
        return self._environ.get("CARSERVER_AGENT_TOKEN", "").strip() or None

    def _endpoint(self) -> Endpoint:
        try:
            with (self.folder / ENDPOINT).open("rb") as file:
                return msgspec.json.decode(file.read(SMALL), type=Endpoint)
        except PermissionError:
            raise Unreachable(_others(self.folder)) from None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise Unreachable(f"no daemon found in {self.folder}: {_START}, or name it by its url") from None

    def _configuration(self) -> dict[str, Any]:
        """What `carserver.toml` says: a daemon may have its tokens there."""
        path = Path(self._environ.get("CARSERVER_CONFIG") or self.folder / CONFIGURATION)
        try:
            with path.open("rb") as file:
                import tomllib  # noqa: PLC0415 - most folders have no file

                return tomllib.load(file)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return {}
        except (OSError, ValueError) as error:
            raise Misconfigured(f"cannot read {path}: {error}") from None

    def _folder_serves(self) -> bool:
        """Whether the folder's tokens may be sent to the address in use."""
        return self._url is None or bool(self._named) or is_loopback(urlsplit(_checked_url(self._url)).hostname or "")


class Where:
    """Says where the daemon is and gives the token that `connect` is to use; a `link.Finder`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        host_token: str | None = None,
        agent_id: str | None = None,
        state_dir: str | PathLike[str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        if token is not None and host_token is not None:
            raise Misconfigured("token and host_token are both given: give one of them")
        if host_token is not None and agent_id is not None:
            raise Misconfigured("host_token and agent_id are both given: the host is no agent")
        for name, given in (("token", token), ("host_token", host_token)):
            if given is not None and (problem := token_problem(given.strip())):
                raise Misconfigured(f"{name} {problem}")
        owner, _, mac = (token or "").strip().rpartition(".")
        if agent_id is not None and owner not in {"", agent_id} and len(mac) == _MAC_CHARACTERS:
            raise Misconfigured(f"token is not a token of agent {agent_id!r}")
        self._place = Place(url, state_dir, environ)
        self._given = token or host_token
        self._agent_id = agent_id

    def __call__(self) -> Target:
        """See `link.Finder`."""
        return Target(self._place.url(), self._token())

    def _token(self) -> str | None:
        if self._given is not None:
            return self._given.strip()
        if self._agent_id is not None:
            return self._place.agents_token(self._agent_id)
        # An agent's token says the most of whom this program is to be; the host's is for want of another.
        place = self._place
        return place.given_agents_token() or place.token("auth_token") or place.token("host_token")


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/carserver`, else `~/.local/state/carserver`.

    Raises:
        Misconfigured: there is no home directory.
    """
    base = os.environ.get("XDG_STATE_HOME", "")
    if base and Path(base).is_absolute():  # a relative one is to be ignored (XDG base directory specification)
        return Path(base) / "carserver"
    try:
        return Path.home() / ".local" / "state" / "carserver"
    except RuntimeError:
        raise Misconfigured("no home directory for the state folder: name one with state_dir") from None


def is_held(folder: Path) -> bool:
    """Whether a daemon holds the folder. Creates nothing."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that only look do not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def read_secret(path: Path) -> str | None:
    """The secret in a state folder's file, or None where there is none.

    Raises:
        FolderUnusable: it is another user's, others may read it, or it is blank or damaged.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise FolderUnusable(_others(path.parent)) from None
    except OSError as error:
        raise FolderUnusable(f"cannot read {path}: {_why(error)}") from None
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise FolderUnusable(f"{path} is not a regular file: remove it, and a new one is made at the next start")
        if found.st_uid != os.geteuid():
            raise FolderUnusable(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}: name your own folder")
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            mode = stat.S_IMODE(found.st_mode)
            raise FolderUnusable(f"{path} is open to other users (mode {mode:04o}): chmod 600 {path}")
        token = file.read(SMALL).decode("utf-8", "replace").strip()
    if problem := token_problem(token):
        raise FolderUnusable(f"{path} {problem}: remove it, and a new one is made at the next start")
    return token


def _configured(setting: TokenSetting, value: str | None, file: str | None) -> str | None:
    """The token that a setting or its `_file` form gives; None where neither is set."""
    if value is not None and file is not None:
        raise Misconfigured(f"{setting} and {setting}_file are both set: give one of them")
    where: str = setting
    if file is not None:
        where = f"{setting}_file ({file})"
        if not str(file).strip():
            raise Misconfigured(f"{setting}_file is blank: name a file, or leave it unset")
        try:
            # Neither its owner nor its mode is looked at: container secrets are readable links that root has made.
            with Path(file).open("rb") as opened:
                value = opened.read(SMALL).decode("utf-8", "replace")
        except OSError as error:
            raise Misconfigured(f"{setting}_file: cannot read {file}: {_why(error)}") from None
    if value is None:
        return None
    if problem := token_problem(str(value).strip()):
        raise Misconfigured(f"{where} {problem}: give a token, or leave it unset")
    return str(value).strip()


def _checked_url(url: str) -> str:
    # Before anything that may fail: what fails shows the address.
    if "@" in url.partition("//")[2].partition("/")[0] or "@" in url.partition("/")[0]:
        raise Misconfigured("an address with a user part is not accepted: tokens never stand in it")
    try:
        parts = urlsplit(url)
        fine = parts.scheme in {"ws", "wss"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine:
        raise Misconfigured(f"{url!r} is no address of a daemon: write ws://HOST:PORT")
    return url


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own; a name other than localhost is not looked up."""
    import ipaddress  # noqa: PLC0415 - for an address that was given, not for the folder's

    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _others(folder: Path) -> str:
    return f"{folder} is not open to user {os.geteuid()}: run as its owner, or name your own folder"


def _why(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
