"""The tools that there are, by name: those that sessions host and those of the tools file (contract, section 6).

A handle keeps what runs it: what was unregistered, or replaced, goes on running.

A name is one tool's, but for those that sessions of the CAR dialect host, each for itself, for every agent registers a
`finish` of its own. Such a session gets its own, and never another one's; everyone else gets whichever was there first.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import orjson
from msgspec import UNSET, Raw, Struct, UnsetType
from msgspec.structs import replace

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

    `timeout_ms` is its own deadline; `hosting` is the session's host, None for a tool of the tools file. `for_itself`:
    others that host for themselves do not get it.
    """

    definition: Definition
    host: ToolHost
    timeout_ms: int | None
    hosting: ToolHost | None
    for_itself: bool = False

    @property
    def tool(self) -> Tool:
        """As it is listed."""
        return self.definition.tool

    @property
    def arguments(self) -> Arguments:
        """What its parameters must be."""
        return self.definition.arguments

    @property
    def car_listed(self) -> bytes:
        """As it is listed in the CAR dialect, as JSON."""
        return self.definition.listed if self.hosting is None else encode(replace(self.tool, source="user_defined"))


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
        # Of each name by who hosts it, in the order in which they came. One that is not for itself is the first.
        self._entries: dict[str, dict[ToolHost | None, Entry]] = {}
        self._hosted: dict[ToolHost, dict[str, Entry]] = {}
        self._bytes = 0
        self._pattern_bytes = 0
        self._list: bytes | None = None  # until something changes

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    @property
    def size(self) -> int:
        """Bytes of all definitions."""
        return self._bytes

    def find(self, name: str, hosting: ToolHost | None = None, *, for_itself: bool = False) -> Entry | None:
        """The tool that a session means by this name; None if there is none.

        `hosting` is what runs the tools that it hosts itself, `for_itself` whether it hosts them so.
        """
        entries = self._entries.get(name)
        if entries is None:
            return None
        own, first = entries.get(hosting), _first(entries)
        return own or (None if for_itself and first.for_itself else first)

    def list(self) -> bytes:
        """All tools, by name: a `ToolList`, as JSON."""
        if self._list is None:
            self._list = _listed(_first(self._entries[name]).definition.listed for name in sorted(self._entries))
        return self._list

    def car_list(self, hosting: ToolHost | None) -> bytes:
        """The tools that a session means by their names: a `CarToolList`, as JSON."""
        found = (self.find(name, hosting, for_itself=True) for name in sorted(self._entries))
        return _listed(entry.car_listed for entry in found if entry is not None)

    def declare(self, definition: Definition, host: ToolHost, timeout_ms: int | None) -> None:
        """A tool of the tools file, whose names are its own and whose limits were checked there."""
        self._put(Entry(definition=definition, host=host, timeout_ms=timeout_ms, hosting=None))

    def define(self, given: GivenTool, place: int) -> Definition:
        """A definition of a session's; `place` is its number in the params.

        Raises:
            RpcError: invalid_params, limit_exceeded.
        """
        return define(given, "client", self._settings, f"[{place}]")

    def register(self, hosting: ToolHost, definitions: Sequence[Definition], *, for_itself: bool = False) -> int:
        """The tools of a session, all or none; their number. One's own of the same names are replaced.

        `for_itself`: it does not matter who else has tools of these names.

        Raises:
            RpcError: conflict (name_taken); invalid_params for a name given twice; limit_exceeded.
        """
        names: set[str] = set()
        for place, definition in enumerate(definitions):
            if definition.tool.name in names:
                raise invalid_params(f"[{place}].name", f"{definition.tool.name!r} stands in this array twice")
            if not for_itself:
                self._check_free(hosting, definition.tool.name, f"[{place}].name")
            names.add(definition.tool.name)
        own = self._hosted.get(hosting, {})
        self._check_limits(definitions, len(own.keys() | names), [own[name] for name in own.keys() & names])
        for definition in definitions:
            entry = Entry(definition=definition, host=hosting, timeout_ms=None, hosting=hosting, for_itself=for_itself)
            self._put(entry)
        return len(definitions)

    def unregister(self, hosting: ToolHost | None, name: str) -> int:
        """Takes one's own tool of this name away; 1, or 0 where there is none."""
        own = {} if hosting is None else self._hosted.get(hosting, {})
        entry = own.pop(name, None)
        if entry is None or hosting is None:
            return 0
        self._remove(entry)
        if not own:
            del self._hosted[hosting]
        return 1

    def drop(self, hosting: ToolHost) -> None:
        """Takes all tools of a session away: it hosts no more."""
        for entry in self._hosted.pop(hosting, {}).values():
            self._remove(entry)

    def _check_free(self, hosting: ToolHost, name: str, at: str) -> None:
        there = self._entries.get(name, {}).values()
        other = next((entry for entry in there if entry.hosting is not hosting), None)
        if other is not None:
            whose = "the tools file declares" if other.hosting is None else "another session hosts"
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
        name, hosting = entry.tool.name, entry.hosting
        entries = self._entries.setdefault(name, {})
        if (before := entries.get(hosting)) is not None:
            self._count(before, -1)
        entries[hosting] = entry
        if hosting is not None:
            self._hosted.setdefault(hosting, {})[name] = entry
        self._count(entry, 1)

    def _remove(self, entry: Entry) -> None:
        entries = self._entries[entry.tool.name]
        del entries[entry.hosting]
        if not entries:
            del self._entries[entry.tool.name]
        self._count(entry, -1)

    def _count(self, entry: Entry, sign: int) -> None:
        """It is there now (1), or no more (-1)."""
        self._bytes += sign * len(entry.definition.listed)
        self._pattern_bytes += sign * entry.arguments.pattern_bytes
        self._list = None


def _first(entries: Mapping[ToolHost | None, Entry]) -> Entry:
    return next(iter(entries.values()))


def _listed(tools: Iterable[bytes]) -> bytes:
    """A `ToolList`."""
    listed = [*tools]
    return b'{"tools":[%b],"count":%d}' % (b",".join(listed), len(listed))
