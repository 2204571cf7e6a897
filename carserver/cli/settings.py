"""From flags, environment and `carserver.toml` to `Settings`: flag > CARSERVER_<FIELD> > file > default.

Contract, section 11. Every error is a `ConfigError` of one line: where the value stands, what it is, what would be
right. The value of a token is never part of it.
"""

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from carserver.client.finding import is_loopback
from carserver.config import Settings
from carserver.stores.folder import FolderError, default_state_dir

PREFIX = "CARSERVER_"
FILE = "carserver.toml"
CLIENT_VARIABLES = frozenset({"CARSERVER_URL", "CARSERVER_CONFIG", "CARSERVER_AGENT_TOKEN"})

_SECRET = frozenset({"auth_token", "host_token"})
_FLAGS = {"auth": "--no-auth"}
_FIELDS: dict[str, Any] = typing.get_type_hints(Settings, include_extras=True)


class ConfigError(Exception):
    """The configuration cannot be used: exit code 2."""


def load_settings(flags: Mapping[str, Any], environ: Mapping[str, str], config: str | None = None) -> Settings:
    """The settings of one command.

    Args:
        flags: by field name; None and an empty tuple count as not given.
        environ: the environment, whole.
        config: the file that `--config` names; without it, CARSERVER_CONFIG, else the state folder's, if it is there.

    Returns:
        Settings whose `state_dir` is an absolute path.

    Raises:
        ConfigError: an unknown key or variable, or a value that does not fit.
    """
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    variables = _variables(environ)
    named = config or environ.get("CARSERVER_CONFIG") or None
    values = {
        **{name: _from_variable(name, text) for name, text in variables.items()},
        **{name: _checked(name, value, f"flag `{_flag(name)}`") for name, value in given.items()},
    }
    values["state_dir"] = str(_state_dir(values.get("state_dir", "")))
    path = Path(named).expanduser() if named else Path(values["state_dir"]) / FILE
    from_file = _from_file(path, must_exist=named is not None)
    for token in _SECRET:  # a token given outside the file stands for the file's, in whichever form either is
        if token in values or f"{token}_file" in values:
            from_file.pop(token, None)
            from_file.pop(f"{token}_file", None)
    settings = Settings(**{**from_file, **values})
    _check_together(settings)
    return settings


def _check_together(settings: Settings) -> None:
    if not settings.host.strip():
        raise ConfigError("host is blank: give an address to listen on, 127.0.0.1 or 0.0.0.0")
    if not settings.auth and not is_loopback(settings.host):
        raise ConfigError(
            f"host {settings.host!r} with authentication off would let everyone on the network be host: "
            "listen on 127.0.0.1, or leave authentication on"
        )


def _state_dir(value: str) -> Path:
    if value:
        return Path(value).expanduser().absolute()
    try:
        return default_state_dir()
    except FolderError as error:
        raise ConfigError(str(error)) from None


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The CARSERVER_… variables that are settings, by field."""
    found = {}
    for variable, text in environ.items():
        if variable.startswith(PREFIX) and variable not in CLIENT_VARIABLES:
            name = variable.removeprefix(PREFIX).lower()
            if name not in _FIELDS or variable != variable.upper():
                known = [PREFIX + field.upper() for field in _FIELDS] + sorted(CLIENT_VARIABLES)
                raise ConfigError(f"unknown environment variable {variable!r}{_suggestion(variable, known)}")
            found[name] = text
    return found


def _from_file(path: Path, *, must_exist: bool) -> dict[str, Any]:
    import tomllib  # noqa: PLC0415 - most folders have no file

    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except (FileNotFoundError, NotADirectoryError):
        if must_exist:
            raise ConfigError(f"no such configuration file: {path}") from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"cannot read {path}: {reason}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for name in content:
        if name == "state_dir":
            raise ConfigError(f"{path}: `state_dir` cannot be set here: give --state-dir or CARSERVER_STATE_DIR")
        if name not in _FIELDS:
            raise ConfigError(f"{path}: unknown key {name!r}{_suggestion(name, list(_FIELDS))}")
    return {name: _checked(name, value, f"{path}: key `{name}`") for name, value in content.items()}


def _from_variable(name: str, text: str) -> Any:
    value: Any = text
    if _is_list(_FIELDS[name]):
        value = [part.strip() for part in text.split(",") if part.strip()]
    return _checked(name, value, f"environment variable `{PREFIX}{name.upper()}`", strict=False)


def _checked(name: str, value: Any, where: str, *, strict: bool = True) -> Any:
    type_ = _FIELDS[name]
    # A list of numbers is not a list of names that happen to be digits: strict for what is inside.
    try:
        return msgspec.convert(value, type_, strict=strict)
    except msgspec.ValidationError:
        shown = "a value that is not shown" if name in _SECRET else _shown(value)
        raise ConfigError(f"{where} is {shown}: it must be {_expected(type_)}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def _expected(type_: Any) -> str:
    """What a field takes, in words."""
    if typing.get_origin(type_) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(type_))
    if _is_list(type_):
        return "a list of texts"
    if _is_text(type_):
        return "a text"
    bounds: Any = None
    if type(None) in typing.get_args(type_):
        type_ = typing.get_args(type_)[0]
    if typing.get_origin(type_) is typing.Annotated:
        type_, bounds = typing.get_args(type_)
    what = {bool: "true or false", int: "an integer", float: "a number"}[type_]
    if bounds is None:
        return what
    low = f"at least {bounds.ge}" if bounds.ge is not None else f"more than {bounds.gt}"
    return f"{what}, {low}" + (f" and at most {bounds.le}" if bounds.le is not None else "")


def _is_list(type_: Any) -> bool:
    return typing.get_origin(type_) is tuple


def _is_text(type_: Any) -> bool:
    return type_ is str or str in typing.get_args(type_)


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def _suggestion(given: str, known: list[str]) -> str:
    import difflib  # noqa: PLC0415 - for an error only

    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
