"""The state folder: who may look into it, which daemon holds it, its secrets, and where that daemon listens.

Contract, sections 5 and 11. Everything in it is for its owner alone (0700, files 0600). Nothing here ever puts a token
into a message.
"""

import contextlib
import fcntl
import os
import secrets as random
import stat
import time
from pathlib import Path
from typing import Literal, Self

import msgspec

from carserver.config import Settings
from carserver.core.principals import Secrets, same_secret
from carserver.protocol.folder import AGENT_KEY, AUTH_TOKEN, ENDPOINT, HOST_TOKEN, LOCK, SMALL, Endpoint, token_problem

SecretName = Literal["auth-token", "host-token", "agent-key"]
TokenSetting = Literal["auth_token", "host_token"]
SECRET_NAMES: tuple[SecretName, ...] = (AUTH_TOKEN, HOST_TOKEN, AGENT_KEY)

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_PROBES = 10  # who looks whether it is held takes the lock for an instant; a refusal counts when it outlasts that
_PROBE_S = 0.01


class FolderError(Exception):
    """The state folder cannot be used; the message is one line that says what to do."""


class FolderHeld(FolderError):
    """Another daemon holds the state folder."""


class SecretSettingError(FolderError):
    """A setting that overrides a secret cannot be used: a mistake in the configuration, not in the folder."""


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/carserver`, else `~/.local/state/carserver`.

    Raises:
        FolderError: there is no home directory to put it in.
    """
    base = os.environ.get("XDG_STATE_HOME", "")
    if base and Path(base).is_absolute():  # a relative one is to be ignored (XDG base directory specification)
        return Path(base) / "carserver"
    try:
        return Path.home() / ".local" / "state" / "carserver"
    except RuntimeError:
        raise FolderError("no home directory for the state folder: name one with --state-dir") from None


class StateFolder:
    """One state folder. Making the object touches no file; it owns the lock from `lock` to `unlock`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_fd: int | None = None

    def __enter__(self) -> Self:
        self.lock()
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    def prepare(self) -> None:
        """Creates the folder, and its parents, 0700 where they are missing.

        Raises:
            FolderError: it is no directory, belongs to another user, or others may look into it.
        """
        try:
            for missing in reversed([p for p in (self.path, *self.path.parents) if not p.exists()]):
                missing.mkdir(mode=0o700, exist_ok=True)
            found = self.path.stat()
        except FileExistsError:
            raise FolderError(f"{self.path} is not a directory: name another with --state-dir") from None
        except OSError as error:
            raise FolderError(f"cannot use {self.path}: {_why(error)}; name another with --state-dir") from None
        if not stat.S_ISDIR(found.st_mode):
            raise FolderError(f"{self.path} is not a directory: name another with --state-dir")
        self._check_owner(self.path, found, "chmod 700")

    # ------------------------------------------------------------------------------------------------- the lock

    def lock(self) -> None:
        """Takes the folder for this process, until `unlock` or its end, and writes the process id into the lock file.

        Raises:
            FolderHeld: another process has it; the message names the folder, its pid and its url.
            FolderError: the folder cannot be used.
        """
        if self._lock_fd is not None:
            return
        self.prepare()
        try:
            fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise FolderError(f"cannot open {self.path / LOCK}: {_why(error)}") from None
        try:
            self._take(fd)
        except BaseException:
            os.close(fd)
            raise
        self._lock_fd = fd

    def unlock(self) -> None:
        """Gives the folder free again; harmless when it was not taken."""
        if self._lock_fd is not None:
            fd, self._lock_fd = self._lock_fd, None
            os.ftruncate(fd, 0)
            os.close(fd)

    def _take(self, fd: int) -> None:
        for attempt in range(_PROBES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _PROBES - 1:
                    raise FolderHeld(self._held_message(fd)) from None
                time.sleep(_PROBE_S)
            except OSError as error:
                raise FolderError(f"cannot lock {self.path / LOCK}: {_why(error)}; use a local disk") from None
        pid = b"%d\n" % os.getpid()
        try:
            os.pwrite(fd, pid, 0)  # over the one before: that needs no room
            os.ftruncate(fd, len(pid))
        except OSError:  # the disk is full, and the lock holds all the same; whose it is cannot be told then
            os.ftruncate(fd, 0)

    def _held_message(self, fd: int) -> str:
        pid = os.pread(fd, 32, 0).strip()
        holder = f"process {int(pid)}" if pid.isdigit() else "another process"
        endpoint = self.read_endpoint()
        where = f" at {endpoint.url}" if endpoint and pid == str(endpoint.pid).encode() else ""
        return f"{self.path} is held by {holder}{where}: stop that daemon, or name another folder with --state-dir"

    # ---------------------------------------------------------------------------------------------- the secrets

    def secrets(self, settings: Settings) -> Secrets:
        """The three secrets: from the settings where these have them, else from the folder; what is missing is made.

        Two processes that make one at the same time both get the one that came first.

        Raises:
            SecretSettingError: an override is blank, unreadable, given twice or in characters that no header takes.
            FolderError: a file others may read, a blank one, or one token for both client and host.
        """
        self.prepare()
        auth = configured_token(settings, "auth_token") or self._made(AUTH_TOKEN)
        host = configured_token(settings, "host_token") or self._made(HOST_TOKEN)
        if same_secret(auth, host):
            raise FolderError("auth token and host token are the same: give two, or leave one of them to be made")
        return Secrets(auth_token=auth, host_token=host, agent_key=self._made(AGENT_KEY))

    def read_secret(self, name: SecretName) -> str | None:
        """The secret in the folder's file of that name, or None where there is none.

        Raises:
            FolderError: others may read it, or it is blank or damaged.
        """
        path = self.path / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise FolderError(f"cannot read {path}: {_why(error)}") from None
        with os.fdopen(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise FolderError(f"{path} is not a regular file: remove it, and a new one is made at the next start")
            self._check_owner(path, found, "chmod 600")
            content = file.read(SMALL)
        if problem := token_problem(token := _text(content)):
            raise FolderError(f"{path} {problem}: remove it, and a new one is made at the next start")
        return token

    def rotate(self) -> None:
        """Makes all three secrets anew. Tokens given out before, agents' too, are worth nothing from then on.

        Raises:
            FolderHeld: a daemon holds the folder and would go on with the old ones.
            FolderError: the folder cannot be used.
        """
        if self._lock_fd is not None:
            raise FolderHeld(f"{self.path} is held by this process: its secrets are in use")
        with self:
            for name in SECRET_NAMES:
                self._replace(name, _new_secret())

    def _made(self, name: SecretName) -> str:
        found = self.read_secret(name)
        if found is not None:
            return found
        temporary = self._write_temporary(name, _new_secret())
        path = self.path / name
        try:
            # A link, unlike a rename, never takes the place of a file that another process has made meanwhile.
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(temporary)
        except OSError as error:
            raise FolderError(f"cannot create {path}: {_why(error)}") from None
        finally:
            temporary.unlink(missing_ok=True)
        self._sync()
        made = self.read_secret(name)
        if made is None:
            raise FolderError(f"{path} disappeared as it was made: is something else cleaning {self.path}?")
        return made

    # --------------------------------------------------------------------------------------------- the endpoint

    def write_endpoint(self, url: str, pid: int, boot_id: str) -> None:
        """Tells the commands where this daemon listens.

        Raises:
            FolderError: the disk refused.
        """
        self._replace(ENDPOINT, msgspec.json.encode(Endpoint(url, pid, boot_id)) + b"\n")

    def read_endpoint(self) -> Endpoint | None:
        """Where the daemon of this folder listens, or did when it was killed; None where nothing readable says so."""
        try:
            with (self.path / ENDPOINT).open("rb") as file:
                return msgspec.json.decode(file.read(SMALL), type=Endpoint)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def remove_endpoint(self) -> None:
        """Takes back what `write_endpoint` said; harmless when it is gone."""
        with contextlib.suppress(OSError):
            (self.path / ENDPOINT).unlink()

    # ------------------------------------------------------------------------------------------------ the files

    def _check_owner(self, path: Path, found: os.stat_result, cure: str) -> None:
        if found.st_uid != os.geteuid():
            raise FolderError(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}: chown it, or use another")
        if found.st_mode & _OTHERS:
            mode = stat.S_IMODE(found.st_mode)
            raise FolderError(f"{path} is open to other users (mode {mode:04o}): {cure} {path}")

    def _replace(self, name: str, content: bytes) -> None:
        temporary = self._write_temporary(name, content)
        try:
            temporary.replace(self.path / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise FolderError(f"cannot write {self.path / name}: {_why(error)}") from None
        self._sync()

    def _write_temporary(self, name: str, content: bytes) -> Path:
        """A complete file on disk, 0600, beside the one that it is to become."""
        path = self.path / f".{name}.{random.token_hex(8)}"
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            path.unlink(missing_ok=True)
            raise FolderError(f"cannot write in {self.path}: {_why(error)}") from None
        return path

    def _sync(self) -> None:
        """Makes the names in the folder as durable as the files' content."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise FolderError(f"cannot write in {self.path}: {_why(error)}") from None


def configured_token(settings: Settings, setting: TokenSetting) -> str | None:
    """The token that `setting`, or its `_file` form, gives; None where neither is set.

    Raises:
        SecretSettingError: both are set; it is blank, unreadable, or in characters that no header takes.
    """
    file_setting = f"{setting}_file"
    value: str | None = getattr(settings, setting)
    file: str | None = getattr(settings, file_setting)
    if value is not None and file is not None:
        raise SecretSettingError(f"{setting} and {file_setting} are both set: give one of them")
    if value is not None:
        token, where = value.strip(), str(setting)
    elif file is not None:
        token, where = _token_of_file(file, file_setting), f"{file_setting} ({file})"
    else:
        return None
    if problem := token_problem(token):
        raise SecretSettingError(f"{where} {problem}: give a token, or leave {setting} unset to have one made")
    return token


def _token_of_file(file: str, setting: str) -> str:
    # Neither its owner nor its mode is looked at: container secrets are readable links that root has made.
    if not file.strip():
        raise SecretSettingError(f"{setting} is blank: name a file, or leave it unset")
    try:
        with Path(file).open("rb") as opened:
            return _text(opened.read(SMALL))
    except OSError as error:
        raise SecretSettingError(f"{setting}: cannot read {file}: {_why(error)}") from None


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace").strip()


def _new_secret() -> bytes:
    return random.token_hex(32).encode() + b"\n"


def _why(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
