"""What a JSON Schema could cost, before it is used: on the loop, where nothing may take long, and it is foreign.

The library compiles any schema quickly and tries a value quickly against an ordinary one; what it does not bound is how
often a schema has parts of itself tried. So that is counted here, and what it was made of is looked at.
"""

import re
from typing import Any
from urllib.parse import unquote

import msgspec
from msgspec import Struct

MOST = 10**12
"""A weight is not counted beyond this: doubling 1,000 times takes 60 KiB of schema."""

_CHAIN = 32
"""References that lead from one to the next: every one is followed on the stack."""
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_ANCHORS = ("$anchor", "$dynamicAnchor", "$id", "id")
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"})
"""Keywords whose members are named by the schema's author: a property may be called `enum`."""
_VALUES = frozenset({"const", "enum", "default", "examples"})
"""Keywords that hold values, where nothing is a schema."""
_TRIED_AGAIN = frozenset({"unevaluatedProperties", "unevaluatedItems"})
_AGAIN = 3
"""How often what stands beside one of these is tried, about: measured 2.6, for each level of them."""


class BadSchema(ValueError):
    """No schema that can be used; `place` is where it stands in it (`properties.a.type`), empty for all of it."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(f"{place}: {message}" if place else message)
        self.place = place
        self.message = message


class Weighed(Struct, frozen=True):
    """What a schema comes to.

    `weight` is how many of its parts are tried on one value at most, about. One that refers to itself counts once: the
    library remembers what it has tried on a value (it does not where it explains what is wrong: `recursive`). `times`
    is how often a part is tried, on average. `patterns` lead to their places, `names` are those for names of members,
    `unique` is whether anything must be.
    """

    weight: int
    times: int
    recursive: bool
    patterns: dict[str, str]
    names: set[str]
    unique: bool


def weigh(schema: Any) -> Weighed:
    """Looks at a schema, parsed.

    Raises:
        BadSchema: it refers to something outside of itself.
    """
    scales = _Scales(schema)
    scales.collect(schema, "")
    weight = scales.of(schema)
    times = 1 + weight // scales.parts
    return Weighed(weight, times, scales.recursive, scales.patterns, scales.names, scales.unique)


class _Scales:
    def __init__(self, root: Any) -> None:
        self.root = root
        self.recursive = False
        self.parts = 0
        self._seen: set[int] = set()  # objects that were looked at, which stay as long as the root
        self.patterns: dict[str, str] = {}
        self.names: set[str] = set()
        self.unique = False
        self._anchors: dict[str, Any] = {}
        self._known: dict[str, int | None] = {}  # by reference; None: it is being weighed
        self._depth = 0

    def collect(self, node: Any, place: str) -> None:
        """Finds anchors and patterns, and refuses what leads out of the schema."""
        self.parts += 1
        if type(node) is list:
            for number, inner in enumerate(node):
                self.collect(inner, f"{place}[{number}]")
        elif type(node) is dict:
            self._seen.add(id(node))
            self._look_at(node, place)
            for keyword, inner in node.items():
                if keyword in _MAPS and type(inner) is dict:
                    for name, part in inner.items():
                        self.collect(part, below(below(place, keyword), name))
                elif keyword not in _VALUES:
                    self.collect(inner, below(place, keyword))

    def _look_at(self, schema: dict[str, Any], place: str) -> None:
        for keyword in _REFERENCES:
            if type(reference := schema.get(keyword)) is str and not reference.startswith("#"):
                raise BadSchema(below(place, keyword), "it refers to another document: only `#…` is followed")
        for keyword in _ANCHORS:
            if type(name := schema.get(keyword)) is str:
                if keyword == "$id" and schema is not self.root and not name.startswith("#"):
                    raise BadSchema(below(place, keyword), "only the whole schema may have one")
                self._anchors.setdefault("#" + name.removeprefix("#"), schema)
        if type(pattern := schema.get("pattern")) is str:
            self.patterns.setdefault(pattern, below(place, "pattern"))
        if type(names := schema.get("patternProperties")) is dict:
            self.names.update(names)
            for name in names:
                self.patterns.setdefault(name, below(place, "patternProperties"))
        self.unique = self.unique or schema.get("uniqueItems") is True

    def of(self, node: Any) -> int:
        """How many values stand in it, those of what it refers to included, each as often as it does."""
        if type(node) is list:
            return min(MOST, 1 + sum(self.of(inner) for inner in node))
        if type(node) is not dict:
            return 1
        weight = 1 + sum(
            self._of_reference(inner) if keyword in _REFERENCES and type(inner) is str else self.of(inner)
            for keyword, inner in node.items()
            if keyword not in {"$defs", "definitions"}  # they count where they are referred to
        )
        return min(MOST, weight * _AGAIN if _TRIED_AGAIN & node.keys() else weight)

    def _of_reference(self, reference: str) -> int:
        known = self._known.get(reference, 0)
        if known is None:
            self.recursive = True
            return 1
        if not known:
            self._known[reference] = None
            self._depth += 1
            if self._depth > _CHAIN:
                raise BadSchema("", f"its references lead from one to the next more than {_CHAIN} times")
            self._known[reference] = known = self.of(self._found(reference))
            self._depth -= 1
        return known

    def _found(self, reference: str) -> Any:
        """What it leads to; what leads nowhere is for the library to say."""
        if reference in self._anchors:
            return self._anchors[reference]
        node = self.root
        for step in unquote(reference.removeprefix("#")).split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if type(node) is list and name.isdecimal() and int(name) < len(node):
                node = node[int(name)]
            elif type(node) is dict and name in node:
                node = node[name]
            else:
                return None
        if type(node) is dict and id(node) not in self._seen:
            raise BadSchema("", f"`{shorten(reference, 80)}` leads to a value, not to a schema")
        return node


_PLAIN = re.compile(r"[^\W\d][\w-]*")
_NAME_CHARS, _PLACE_CHARS = 64, 256  # of a name in a place, and of a place: they go into messages


def below(place: str, name: str | int) -> str:
    """The place of a member or element: `files[3].name`, and `env["a b"]` where a name is none."""
    if isinstance(name, int):
        return shorten(f"{place}[{name}]", _PLACE_CHARS)
    shown = shorten(name, _NAME_CHARS)
    if _PLAIN.fullmatch(name.removeprefix("$")):
        return shorten(f"{place}.{shown}" if place else shown, _PLACE_CHARS)
    return shorten(f"{place}[{msgspec.json.encode(shown).decode()}]", _PLACE_CHARS)


def shorten(text: str, characters: int) -> str:
    """At most so many characters, and an ellipsis if there were more."""
    return text if len(text) <= characters else f"{text[:characters]}…"
