"""A tool's arguments: what they must be by its JSON Schema, and that nobody's schema or text can stall the loop.

Drafts 4 to 2020-12, by `$schema`, else 2020-12; `format` is an annotation. A schema is used offline: what it refers to
stands in it. Patterns are matched without backtracking, so those with look-around or back-references are refused.

The library bounds nothing itself. What is allowed here was measured: the worst schema with the worst arguments takes
about half a second, an ordinary one microseconds.
"""

import re
from collections.abc import Callable
from typing import Any

import msgspec
import orjson

from carserver.config import KIB, MIB, Settings
from carserver.core.explain import describe, explain
from carserver.core.schemas import BadSchema, Weighed, below, shorten, weigh
from carserver.protocol.codec import STRINGS, too_deep
from carserver.protocol.errors import ErrorKind, RpcError, invalid_params, limit_exceeded

AT = "parameters"
NOTHING = b"{}"

_TWINS = "an object has two members of the same name"
_WORK = 5_000_000  # parts of a schema tried on values: 0.1 µs each
_UNIQUE_BYTES = 5_000_000_000  # the same for bytes, where texts must be unique, which takes 0.1 ns each
_MATCHING = 10_000_000_000  # bytes of compiled patterns times characters: 0.03 ns each, where nothing helps
_PATTERN_SIZES = (KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB)  # tried in turn, until one has room
_PATTERNS_BYTES = 16 * MIB  # of all patterns of a schema, compiled, which takes 4 ms a MiB
_STATES_BYTES = 64 * KIB  # that a pattern may remember of what it has matched
_LARGE = re.compile(rb"\d{19}")  # what no machine word holds is compared one by one
_LARGE_UNIQUE = 256  # of them, where a schema wants unique items: the time goes with their square
_EXPLAINED = 32 * MIB  # weight times bytes: every part that does not fit keeps a copy of its value
_STEPS = 1_000_000  # weight, once for each level of values: of a schema that refers to itself, tried anew each time


class Arguments:
    """What a tool's parameters must be.

    Args:
        schema: A JSON Schema, known to be JSON; `{}` takes any object.
        settings: `value_nesting`.

    Raises:
        BadSchema: it is none, or none that can be used here.
    """

    def __init__(self, schema: bytes, settings: Settings) -> None:
        self._nesting = settings.value_nesting
        self._patterns = _Patterns()
        self._weighed: Weighed | None = None
        self._schema: Any = None
        if schema != NOTHING:
            given = orjson.loads(schema)
            if type(given) is not dict and type(given) is not bool:
                raise BadSchema("", "a JSON Schema is wanted, an object")
            if type(given) is dict and _has_twins(schema, _count(given)[1]):
                raise BadSchema("", _TWINS)
            self._weighed = weigh(given)
            self._patterns.compile(self._weighed)
            self._schema = _compile(schema.decode(), self._patterns)

    @property
    def pattern_bytes(self) -> int:
        """What its compiled patterns take."""
        return self._patterns.size

    def check(self, given: bytes) -> bytes:
        """Parameters, known to be JSON, as they are passed on: compact, with every number's own literal.

        Raises:
            RpcError: invalid_params, with the place below `parameters`; limit_exceeded.
        """
        raw = msgspec.json.format(given, indent=-1)
        value = msgspec.json.decode(raw)  # large integers stay what they are
        if type(value) is not dict:
            raise invalid_params(AT, "an object is wanted")
        if too_deep(raw, value, self._nesting):
            raise limit_exceeded("value_nesting", self._nesting + 1, self._nesting, AT)
        values, members, levels = _count(value)
        if _has_twins(raw, members):  # whoever reads it next might take the other one, which nobody has looked at
            raise invalid_params(AT, _TWINS)
        if self._weighed is not None:
            self._bound(self._weighed, raw, values)
            if not self._fits(value):
                raise self._refusal(self._weighed, raw, value, levels)
        return raw

    def _bound(self, weighed: Weighed, raw: bytes, values: int) -> None:
        """Refuses what could take long."""
        names = sum(self._patterns.sizes[name] for name in weighed.names)
        for work, most in (
            (weighed.weight * values, _WORK),
            (weighed.weight * len(raw) if weighed.unique else 0, _UNIQUE_BYTES),
            (weighed.times * names * len(raw), _MATCHING),
            (len(_LARGE.findall(raw)) if weighed.unique else 0, _LARGE_UNIQUE),
        ):
            if work > most:
                raise _too_much(work, most)

    def _fits(self, value: Any) -> bool:
        self._patterns.left = _MATCHING
        fits: bool = self._schema.is_valid(value)
        if self._patterns.left < 0:
            raise _too_much(_MATCHING - self._patterns.left, _MATCHING)
        return fits

    def _refusal(self, weighed: Weighed, raw: bytes, value: Any, levels: int) -> RpcError:
        steps = weighed.weight**levels if weighed.recursive else 0
        if steps > _STEPS or weighed.weight * len(raw) > _EXPLAINED:
            return invalid_params(AT, "do not fit the tool's schema; where, would take too long to find out")
        self._patterns.left = _MATCHING
        place, message = explain(self._schema, value)
        return invalid_params(_at(AT, place), message)


class _Patterns:
    """The patterns of a schema, and how much matching may still be done."""

    def __init__(self) -> None:
        self.left = 0
        self.sizes: dict[str, int] = {}
        self._matches: dict[str, Callable[[str], bool]] = {}

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    def compile(self, weighed: Weighed) -> None:
        for pattern, place in weighed.patterns.items():
            self._add(pattern, place)
            if self.size > _PATTERNS_BYTES:
                raise BadSchema(place, f"the patterns up to here take more than {_PATTERNS_BYTES} bytes, compiled")

    def _add(self, pattern: str, place: str) -> None:
        import jsonschema_rs  # noqa: PLC0415 - 18 ms: not at the daemon's start

        for size in _PATTERN_SIZES:
            options = jsonschema_rs.RegexOptions(size_limit=size, dfa_size_limit=_STATES_BYTES)
            try:
                compiled = jsonschema_rs.Draft202012Validator({"pattern": pattern}, pattern_options=options)
            except jsonschema_rs.ValidationError:
                continue
            self._matches[pattern] = compiled.is_valid
            self.sizes[pattern] = size
            return
        shown = shorten(pattern, 80)
        raise BadSchema(
            place,
            f"`{shown}` is no pattern that is matched in bounded time: look-around, back-references and very many "
            "repetitions are not",
        )

    def match(self, pattern: str, text: str) -> bool:
        """Whether it does; anything, once too much was matched."""
        self.left -= self.sizes[pattern] * len(text)
        return self.left >= 0 and self._matches[pattern](text)


def _compile(schema: str, patterns: _Patterns) -> Any:
    """The library's validator, whose patterns are matched by `patterns`.

    Raises:
        BadSchema: it is no schema.
    """
    import jsonschema_rs  # noqa: PLC0415 - 18 ms: not at the daemon's start

    class Pattern:
        """The keyword `pattern`."""

        def __init__(self, parent: Any, value: Any, place: list[str | int]) -> None:
            self._pattern = value

        def validate(self, instance: Any) -> None:
            if type(instance) is str and not patterns.match(self._pattern, instance):
                raise ValueError(f"a text is wanted that matches `{shorten(self._pattern, 80)}`")

    try:
        return jsonschema_rs.validator_for(
            schema,
            offline=True,
            validate_formats=False,
            mask="it",
            keywords={"pattern": Pattern} if patterns.sizes else None,
            pattern_options=jsonschema_rs.RegexOptions(size_limit=_PATTERN_SIZES[-1], dfa_size_limit=_STATES_BYTES),
        )
    except jsonschema_rs.ValidationError as error:
        place, message = describe(error)
        if error.kind.name == "anyOf":
            message = "it is none of what may stand here"
        raise BadSchema(_at("", place), f"no JSON Schema: {message}") from None
    except (jsonschema_rs.ReferencingError, ValueError) as error:
        raise BadSchema("", f"no JSON Schema: {shorten(str(error), 200)}") from None


def _at(place: str, steps: list[str | int]) -> str:
    for step in steps:
        place = below(place, step)
    return place


def _count(value: Any) -> tuple[int, int, int]:
    """How many values stand in an object, itself included; how many of them are members; in how many levels."""
    values, members, levels = 1, 0, 0
    level = [value]
    while level:
        levels += 1
        members += sum(len(container) for container in level if type(container) is dict)
        values += sum(len(container) for container in level)
        level = [
            inner
            for container in level
            for inner in (container.values() if type(container) is dict else container)
            if type(inner) is dict or type(inner) is list
        ]
    return values, members, levels


def _has_twins(raw: bytes, members: int) -> bool:
    """Whether JSON with so many members, read, has more of them, written: two of the same name."""
    return raw.count(b":") != members and STRINGS.sub(b"", raw).count(b":") != members


def _too_much(work: int, most: int) -> RpcError:
    return RpcError(
        ErrorKind.LIMIT_EXCEEDED,
        f"{AT}: checking them by the tool's schema could take too long; they are too large for such a schema",
        limit="schema_work",
        value=work,
        maximum=most,
    )
