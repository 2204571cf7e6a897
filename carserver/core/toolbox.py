"""The tools that there are, by name: those that sessions host and those of the tools file (contract, section 6).

A handle keeps what runs it: what was unregistered, or replaced, goes on running.
"""

from collections.abc import Sequence

import msgspec
import orjson
from msgspec import UNSET, Raw, Struct, UnsetType

from carserver.config import MIB, Settings
from carserver.core.arguments import NOTHING, Arguments
from carserver.core.execution import ToolHost
from carserver.core.schemas import BadSchema
from carserver.protocol.codec import check_name, encode, too_deep
from carserver.protocol.errors import conflict, invalid_params, limit_exceeded
from carserver.protocol.tools import GivenTool, Source, Tool

PATTERN_BYTES = 64 * MIB
"""What the patterns of all schemas may take, compiled: a short one may take a million times its length."""


class Definition(Struct, frozen=True):
    """A tool, checked: as it is listed, also as JSON, and what its arguments must be."""

    tool: Tool
    listed: bytes
    arguments: Arguments


class Entry(Struct, frozen=True, kw_only=True):
    """One tool.

    `timeout_ms` is its own deadline; `hosting` is the session's host, None for a tool of the tools file.
    """

    definition: Definition
    host: ToolHost
    timeout_ms: int | None
    hosting: ToolHost | None

    @property
    def tool(self) -> Tool:
        """As it is listed."""
        return self.definition.tool

    @property
    def arguments(self) -> Arguments:
        """What its parameters must be."""
        return self.definition.arguments


def define(given: GivenTool, source: Source, settings: Settings, at: str) -> Definition:
    """A definition, checked; `at` is its place in params.

    Raises:
        RpcError: invalid_params, limit_exceeded.
    """
    if not given.name:
        raise invalid_params(f"{at}.name", "it is empty")
    check_name(given.name, settings.name_chars, f"{at}.name")
    parameters = _schema(given.parameters, settings, f"{at}.parameters")
    returns = _schema(given.returns, settings, f"{at}.returns")
    tool = Tool(
        name=given.name,
        source=source,
        description=given.description,
        parameters=Raw(NOTHING if parameters is None else parameters),
        returns=UNSET if returns is None else Raw(returns),
        idempotent=given.idempotent,
    )
    listed = encode(tool)
    if len(listed) > settings.tool_bytes:
        raise limit_exceeded("tool_bytes", len(listed), settings.tool_bytes, at)
    try:
        return Definition(tool, listed, Arguments(bytes(tool.parameters), settings))
    except BadSchema as error:
        place = f"{at}.parameters" + (f".{error.place}" if error.place else "")
        raise invalid_params(place, error.message) from None


def _schema(given: Raw | UnsetType, settings: Settings, at: str) -> bytes | None:
    """A schema as compact JSON; None where there is none."""
    if given is UNSET:
        return None
    raw = msgspec.json.format(bytes(given), indent=-1)
    value = orjson.loads(raw)
    if type(value) is not dict and type(value) is not bool:
        raise invalid_params(at, "a JSON Schema is wanted, an object")
    if too_deep(raw, value, settings.value_nesting):
        raise limit_exceeded("value_nesting", settings.value_nesting + 1, settings.value_nesting, at)
    return raw


class Toolbox:
    """All tools.

    Args:
        settings: `tool_bytes`, `tools_bytes`, `hosted_tools`, `name_chars`, `value_nesting`.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._entries: dict[str, Entry] = {}
        self._hosted: dict[ToolHost, set[str]] = {}
        self._bytes = 0
        self._pattern_bytes = 0
        self._list: bytes | None = None  # until something changes

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes of all definitions."""
        return self._bytes

    def find(self, name: str) -> Entry | None:
        """The tool of this name; None if there is none."""
        return self._entries.get(name)

    def list(self) -> bytes:
        """All tools, by name: a `ToolList`, as JSON."""
        if self._list is None:
            listed = [self._entries[name].definition.listed for name in sorted(self._entries)]
            self._list = b'{"tools":[%b],"count":%d}' % (b",".join(listed), len(listed))
        return self._list

    def declare(self, definition: Definition, host: ToolHost, timeout_ms: int | None) -> None:
        """A tool of the tools file, whose names are its own and whose limits were checked there."""
        self._put(Entry(definition=definition, host=host, timeout_ms=timeout_ms, hosting=None))

    def define(self, given: GivenTool, place: int) -> Definition:
        """A definition of a session's; `place` is its number in the params.

        Raises:
            RpcError: invalid_params, limit_exceeded.
        """
        return define(given, "client", self._settings, f"[{place}]")

    def register(self, hosting: ToolHost, definitions: Sequence[Definition]) -> int:
        """The tools of a session, all or none; their number. One's own of the same names are replaced.

        Raises:
            RpcError: conflict (name_taken); invalid_params for a name given twice; limit_exceeded.
        """
        names: set[str] = set()
        for place, definition in enumerate(definitions):
            self._check_name(hosting, definition.tool.name, names, f"[{place}].name")
            names.add(definition.tool.name)
        own = self._hosted.get(hosting, set())
        self._check_limits(definitions, len(own | names), [self._entries[name] for name in own & names])
        for definition in definitions:
            self._put(Entry(definition=definition, host=hosting, timeout_ms=None, hosting=hosting))
        if names:
            self._hosted.setdefault(hosting, set()).update(names)
        return len(definitions)

    def unregister(self, hosting: ToolHost | None, name: str) -> int:
        """Takes one's own tool of this name away; 1, or 0 where there is none."""
        entry = self._entries.get(name)
        if hosting is None or entry is None or entry.hosting is not hosting:
            return 0
        self._remove(name)
        own = self._hosted[hosting]
        own.remove(name)
        if not own:
            del self._hosted[hosting]
        return 1

    def drop(self, hosting: ToolHost) -> None:
        """Takes all tools of a session away: it hosts no more."""
        for name in self._hosted.pop(hosting, ()):
            self._remove(name)

    def _check_name(self, hosting: ToolHost, name: str, given: set[str], at: str) -> None:
        if name in given:
            raise invalid_params(at, f"{name!r} stands in this array twice")
        there = self._entries.get(name)
        if there is not None and there.hosting is not hosting:
            whose = "the tools file declares" if there.hosting is None else "another session hosts"
            raise conflict("name_taken", f"{at}: {whose} a tool {name!r} already", path=at)

    def _check_limits(self, definitions: Sequence[Definition], count: int, replaced: Sequence[Entry]) -> None:
        if count > self._settings.hosted_tools:
            raise limit_exceeded("hosted_tools", count, self._settings.hosted_tools)
        size = self._bytes + sum(len(definition.listed) for definition in definitions)
        size -= sum(len(entry.definition.listed) for entry in replaced)
        if size > self._settings.tools_bytes:
            raise limit_exceeded("tools_bytes", size, self._settings.tools_bytes)
        patterns = self._pattern_bytes + sum(definition.arguments.pattern_bytes for definition in definitions)
        patterns -= sum(entry.arguments.pattern_bytes for entry in replaced)
        if patterns > PATTERN_BYTES:
            raise limit_exceeded("pattern_bytes", patterns, PATTERN_BYTES)

    def _put(self, entry: Entry) -> None:
        if entry.tool.name in self._entries:
            self._remove(entry.tool.name)
        self._entries[entry.tool.name] = entry
        self._bytes += len(entry.definition.listed)
        self._pattern_bytes += entry.arguments.pattern_bytes
        self._list = None

    def _remove(self, name: str) -> None:
        entry = self._entries.pop(name)
        self._bytes -= len(entry.definition.listed)
        self._pattern_bytes -= entry.arguments.pattern_bytes
        self._list = None
