"""What a process tool runs: how its arguments become those of a command, and what it sees of the daemon's environment.

Contract, section 6, Processes. Nothing here starts anything; what starts it is handed `argv`, `cwd` and `environment`.
"""

import re
from collections.abc import Mapping
from typing import Literal

import msgspec
from msgspec import Raw, Struct

PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ")
"""The variables of the daemon's that every tool has; it has those too that its `env` names."""
SECRETS = frozenset(
    {
        "CARSERVER_AUTH_TOKEN",
        "CARSERVER_AUTH_TOKEN_FILE",
        "CARSERVER_HOST_TOKEN",
        "CARSERVER_HOST_TOKEN_FILE",
        "CARSERVER_AGENT_TOKEN",
        "CAR_AUTH_TOKEN",
    }
)
"""The variables that no tool may have: a tool's output is untrusted, and these make whoever holds them a peer."""

Output = Literal["text", "jsonl"]

_BRACE, _LONE = "{{", "{"
_PART = re.compile(r"\{\{|\{([^{}]+)\}|\{")
_arguments = msgspec.json.Decoder(dict[str, Raw])


class BadArgument(ValueError):
    """An argument that no program can be given: the name of the parameter, and a message for a person."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"parameters.{name}: {message}")
        self.name = name
        self.message = message


class ProcessSpec(Struct, frozen=True, kw_only=True):
    """One tool of the tools file, as it is run.

    `command` are templates, the first of them the program; `cwd` is absolute; `env` names variables of the daemon's;
    `max_output` is bytes, of both streams; `timeout_ms` is for whoever invokes it without one (None: no deadline).
    """

    name: str
    command: tuple[str, ...]
    cwd: str
    env: tuple[str, ...]
    output: Output
    max_output: int
    timeout_ms: int | None

    def argv(self, parameters: bytes) -> list[str]:
        """The program and its arguments.

        Args:
            parameters: A JSON object, compact, as validated.

        Raises:
            BadArgument: a NUL; or the program itself would be left out.
        """
        given = {name: text for name, raw in _arguments.decode(parameters).items() if (text := _text(raw)) is not None}
        argv = [filled for element in self.command if (filled := _fill(element, given)) is not None]
        if _fill(self.command[0], given) is None:  # else its first argument would be run in its place
            missing = ", ".join(name for name in placeholders(self.command[0]) if name not in given)
            raise BadArgument(missing, "the program is named by it, so it cannot be left out")
        return argv

    def environment(self, of: Mapping[str, str]) -> dict[str, str]:
        """What the command sees of the environment `of`, the daemon's."""
        return {name: of[name] for name in (*PASSED_ON, *self.env) if name in of}


def placeholders(element: str) -> list[str]:
    """The parameters that an element of a command names, in order.

    Raises:
        ValueError: a brace that opens no `{name}`.
    """
    names = []
    for part in _PART.finditer(element):
        if part[0] == _LONE:
            raise ValueError("a `{` that opens no `{name}`: write `{{` for a brace")
        if part[1]:
            names.append(part[1])
    return names


def _fill(element: str, given: Mapping[str, str]) -> str | None:
    """An element with its arguments in place; None where one of them is absent.

    It is read once: an argument that looks like a placeholder, or like anything else, stays what it is.
    """
    names = placeholders(element)
    if any(name not in given for name in names):
        return None
    for name in names:
        if "\0" in given[name]:
            raise BadArgument(name, "a NUL character, which no program's argument can have")
    return _PART.sub(lambda part: "{" if part[0] == _BRACE else given[part[1]], element)


def _text(value: Raw) -> str | None:
    """A string as it is, null as absent, any other value as its JSON: a number by the very literal that came."""
    raw = bytes(value)
    if raw == b"null":
        return None
    return msgspec.json.decode(raw, type=str) if raw.startswith(b'"') else raw.decode()
