"""The tools file: `[tools.NAME]` tables in TOML, each a command that the daemon runs as a tool (contract, section 6).

It is read once, at the start, and all of it or none: every error is one line that says where, what is wrong and what
would be right.
"""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Raw, Struct

from carserver.config import Bytes, Settings
from carserver.core.schemas import below
from carserver.core.toolbox import PATTERN_BYTES, Definition, define
from carserver.hosts.spec import SECRETS, Output, ProcessSpec, placeholders
from carserver.protocol.errors import RpcError, limit_exceeded
from carserver.protocol.tools import GivenTool, TimeoutMs

_NUL = "\0"
_SHOWN = 80  # characters of a value in a message


class ToolsFileError(Exception):
    """The tools file cannot be used; the message is one line."""


class Declared(Struct, frozen=True):
    """A tool of the file: as it is listed, and what it runs."""

    definition: Definition
    spec: ProcessSpec


class _Table(Struct, frozen=True, kw_only=True):
    """What `[tools.NAME]` may have."""

    command: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    description: str = ""
    parameters: dict[str, Any] = {}
    cwd: str = "."
    env: tuple[str, ...] = ()
    output: Output = "text"
    timeout_ms: TimeoutMs | None = None
    max_output: Bytes | None = None
    idempotent: bool = False


_FIELDS = {field.name: field.type for field in msgspec.structs.fields(_Table)}
_EXPECTED = {
    "command": 'a list of texts, the program first: ["grep", "-r", "{pattern}"]',
    "description": "a text",
    "parameters": "a JSON Schema, a table",
    "cwd": "a folder, a text",
    "env": 'a list of names of variables: ["SSH_AUTH_SOCK"]',
    "output": '"text" or "jsonl"',
    "timeout_ms": "milliseconds, an integer, at least 1",
    "max_output": "bytes, an integer, at least 1",
    "idempotent": "true or false",
}


def read_tools(path: Path, settings: Settings) -> list[Declared]:
    """The tools of a file, by name.

    Args:
        path: The file; a relative `cwd` is one below its folder, which is the default.
        settings: `tool_bytes`, `tools_bytes`, `name_chars`, `value_nesting`, `max_output`.

    Raises:
        ToolsFileError: it cannot be read, or has something that is wrong.
    """
    content = _read(path)
    try:
        declared = _all_declared(content, path.absolute().parent, settings)
        _check_sizes(declared, settings)
    except _Wrong as error:
        raise ToolsFileError(f"{path}: {error}") from None
    except RpcError as error:  # from where it is checked what a session declares, too
        raise ToolsFileError(f"{path}: {error.message}") from None
    return declared


class _Wrong(Exception):
    """What is wrong, and where in the file."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(f"{place}: {message}" if place else message)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ToolsFileError(f"cannot read the tools file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ToolsFileError(f"cannot read the tools file {path}: not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ToolsFileError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise ToolsFileError(f"{path}: brackets nest too deep") from None


def _all_declared(content: dict[str, Any], folder: Path, settings: Settings) -> list[Declared]:
    _check_keys(content, ["tools"], "")
    tables = content.get("tools", {})
    if type(tables) is not dict:
        raise _Wrong("tools", "it must be tables, one for each tool: [tools.NAME]")
    return [_declared(name, tables[name], folder, settings) for name in sorted(tables)]


def _check_sizes(declared: list[Declared], settings: Settings) -> None:
    size = sum(len(one.definition.listed) for one in declared)
    if size > settings.tools_bytes:
        raise limit_exceeded("tools_bytes", size, settings.tools_bytes, "tools")
    size = sum(one.definition.arguments.pattern_bytes for one in declared)
    if size > PATTERN_BYTES:
        raise limit_exceeded("pattern_bytes", size, PATTERN_BYTES, "tools")


def _declared(name: str, given: Any, folder: Path, settings: Settings) -> Declared:
    at = below("tools", name)
    if type(given) is not dict:
        raise _Wrong(at, f"it must be a table: [{at}]")
    _check_keys(given, list(_FIELDS), at)
    if "command" not in given:
        raise _Wrong(f"{at}.command", f"it is missing: it must be {_EXPECTED['command']}")
    table = _Table(**{field: _checked(field, value, at) for field, value in given.items()})
    _check_texts(table, at)
    tool = GivenTool(
        name=name,
        description=table.description,
        parameters=_as_json(table.parameters, f"{at}.parameters") if table.parameters else UNSET,
        idempotent=table.idempotent,
    )
    definition = define(tool, "process", settings, at)
    _check_placeholders(table, at)
    spec = ProcessSpec(
        name=name,
        command=table.command,
        cwd=str(folder / table.cwd),
        env=table.env,
        output=table.output,
        max_output=settings.max_output if table.max_output is None else table.max_output,
        timeout_ms=table.timeout_ms,
    )
    return Declared(definition, spec)


def _check_keys(table: dict[str, Any], known: list[str], at: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(known)}"
            raise _Wrong(at, f"unknown key {key!r}; {hint}")


def _checked(field: str, value: Any, at: str) -> Any:
    try:
        return msgspec.convert(value, _FIELDS[field])
    except msgspec.ValidationError:
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
        raise _Wrong(f"{at}.{field}", f"it is {shown}: it must be {_EXPECTED[field]}") from None


def _check_texts(table: _Table, at: str) -> None:
    for field, texts in (("command", table.command), ("cwd", [table.cwd]), ("env", table.env)):
        if any(_NUL in text for text in texts):
            raise _Wrong(f"{at}.{field}", "it has a NUL character, which the system cannot pass on: leave it out")
    if not table.command[0]:
        raise _Wrong(f"{at}.command[0]", "it is empty: it must be the program's name or path")
    for place, name in enumerate(table.env):
        if name in SECRETS:
            raise _Wrong(
                f"{at}.env[{place}]", f"{name} is carserver's own secret, which no tool may have: leave it out"
            )
        if not name or "=" in name:
            raise _Wrong(f"{at}.env[{place}]", f"it is {name!r}: it must be the name of a variable, without its value")


def _check_placeholders(table: _Table, at: str) -> None:
    """Every `{name}` is a parameter; one that names the program is never left out."""
    properties = table.parameters.get("properties", {})
    required = table.parameters.get("required", [])
    for place, element in enumerate(table.command):
        where = f"{at}.command[{place}]"
        try:
            names = placeholders(element)
        except ValueError as error:
            raise _Wrong(where, f"it has {error}") from None
        for name in names:
            if name not in properties:
                near = difflib.get_close_matches(name, list(properties), n=1)
                hint = f"did you mean {{{near[0]}}}?" if near else "declare it, or write `{{` for a brace"
                raise _Wrong(where, f"{{{name}}} is not among parameters.properties; {hint}")
            if place == 0 and name not in required:
                raise _Wrong(where, f"{{{name}}} names the program: it must be among parameters.required")


def _as_json(value: Any, at: str) -> Raw:
    try:
        return Raw(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode())
    except (TypeError, ValueError):  # a date or a time; not a number, or infinite
        raise _Wrong(at, "it has a date, a time, inf or nan, which JSON has not: write a text or a number") from None
